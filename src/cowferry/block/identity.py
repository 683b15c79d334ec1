"""The storage in which an image lies: what tells whether two names mean the same bytes.

A path does not say that. A loop device over a file of ours, a partition, a URI of our own export
and a symbolic link all lead to bytes that have another name as well. So nothing in the house
compares names to find out whether a target is the disk itself. It compares *places*.

A **place** is a range of a *store*: of a file (device and inode) or of a block device. Two images
share bytes if two of their places are in one store and overlap. An image has several places,
because stores lie in each other: `/dev/loop0p1` is a range of `/dev/loop0`, which is a range of the
file behind it, which lies in a file system on `/dev/vda1`. Of the last one only the device is
known, not the range; such a place is `within` it. Two files may be within one device and share
nothing, but a device that is written as a whole takes everything within it along.

A store is called by a hash, so that a server may tell its clients in which stores an export lies
without telling them anything else. The hash is keyed by the host's boot id: it is the same in all
processes of a host, and another one on another host. Our NBD server tells the places of an export
(`told`), which include those that other servers of ours told it. So an own export is known by
whatever URI it is reached, and so is a circle over the disks of two daemons. A disk has a store of
its own, too (`Disk.store`), because it may move to other files while a client is connected.

`check_apart` is the one question that every operation asks before it makes, opens or writes a
target.

Source: loop(4), LOOP_GET_STATUS64; sysfs, Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import hmac
import os
import re
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from cowferry.block import names
from cowferry.block.node import Node, chain
from cowferry.errors import CowferryError

T = TypeVar("T")

STORAGE = "x-cowferry-storage:"  # the namespace of the NBD contexts that tell places
END = (1 << 63) - 1  # bytes: the end of a store whose size may change
DEPTH = 16  # stores that lie in each other; the kernel allows fewer loop devices
MAX_TOLD = 2048  # places of one export

LOOP_MAJOR, LOOP_GET_STATUS64 = 7, 0x4C05
LOOP_INFO = struct.Struct("<QQQQQ")  # device, inode, rdevice, offset, sizelimit; of 232 bytes
SECTOR = 512  # bytes, sysfs's unit
TOLD = re.compile(r"(own|below):([0-9a-f]{32}):([0-9]{1,19})-([0-9]{1,19})(:within)?")


class Place(NamedTuple):
    """The bytes from `start` to `stop` of a store, or some bytes `within` that range.

    `below` marks bytes that a server only reads, because they lie below what it would write.
    `how` and `name` are for a person: the image "is a loop device over" the file "'/x/vm.raw'"."""

    store: str
    start: int = 0
    stop: int = END
    within: bool = False
    below: bool = False
    how: str = ""
    name: str = ""


class Layer(NamedTuple):
    """A file of an image: what a person calls it, what it is to the disk, and its places.

    `top` marks what the disk's guest writes: the disk itself, its image, that one's data file."""

    name: str
    role: str
    places: Sequence[Place]
    top: bool = False


# Stores -------------------------------------------------------------------------------------


@functools.cache
def _boot() -> bytes:
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", "rb") as f:
        return f.read().strip()
    return socket.gethostname().encode()


def store(*what: object) -> str:
    """The name of a store: the same in every process of this host, and meaningless elsewhere."""
    text = "\0".join(map(str, what)).encode("utf-8", "surrogateescape")
    return hmac.new(_boot(), text, hashlib.sha256).hexdigest()[:32]


def of_fd(fd: int, name: str) -> list[Place]:
    """The places of an open file or block device that a person calls `name`."""
    st = os.fstat(fd)
    if stat.S_ISBLK(st.st_mode):
        return list(_in_device(st.st_rdev, Place(""), "is", f"'{name}'", fd))
    return list(_in_file(st.st_dev, st.st_ino, Place(""), "is", f"'{name}'"))


def of_path(path: str) -> list[Place]:
    """The places of what a path leads to, or of the folder in which it would be made.

    A URI has none: the node over the export knows them. What cannot be looked at has none."""
    if names.is_uri(path):
        return []
    try:
        st = os.stat(path)
    except OSError:
        return of_folder(os.path.dirname(os.path.abspath(path)))
    if not stat.S_ISBLK(st.st_mode):
        return list(_in_file(st.st_dev, st.st_ino, Place(""), "is", f"'{path}'"))
    fd = -1
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return list(_in_device(st.st_rdev, Place(""), "is", f"'{path}'", fd))
    finally:
        if fd >= 0:
            os.close(fd)


def of_folder(folder: str) -> list[Place]:
    """The places within which files lie that are made in a folder."""
    try:
        st = os.stat(folder)
    except OSError:
        return []
    return list(_in_file_system(st.st_dev, 0))


def of_server(address: object, export: str) -> list[Place]:
    """The place of an export whose server does not say where its bytes lie."""
    return [Place(store("nbd", address, export), how="is", name="the same export")]


def other_names(fd: int, name: str) -> list[str]:
    """Return the paths that lead to bytes of an open file or device, called `name`, as well: what a
    loop device or a partition lies on, and the loop devices and partitions that lie on it.

    A loop device over a hard link is not found: the files of all loop devices would have to be
    looked at for that, and the storage of one of them may not answer."""
    st = os.fstat(fd)
    found: list[str] = []
    devices: set[int] = set()
    if stat.S_ISBLK(st.st_mode):
        devices.add(st.st_rdev)
        found += (place.name[1:-1] for place in of_fd(fd, name)[1:] if not place.within)
    paths = {os.readlink(f"/proc/self/fd/{fd}"), *found, *map(_dev, devices)}
    loops = list(_loops())
    while True:
        on_them = (_device_of(f"/sys/block/{loop}/dev") for loop, path in loops if path in paths)
        above = {device for device in on_them if device is not None}
        above |= {part for device in devices for part in _partitions(device)}
        above -= devices
        if not above:
            break
        devices |= above
        found += map(_dev, above)
        paths.update(found)
    mine = of_fd(fd, name) if found else []
    return [path for path in dict.fromkeys(found) if overlap(of_path(path), mine)]


def _loops() -> Iterator[tuple[str, str]]:
    """Each loop device that is attached, by its name in sysfs, and the path of what it lies on."""
    with suppress(OSError):
        for loop in os.listdir("/sys/block"):
            if loop.startswith("loop"):
                with suppress(OSError):
                    yield loop, _backing_file(f"/sys/block/{loop}/loop")


def _backing_file(folder: str) -> str:
    """The path of what a loop device lies on, from its folder in sysfs. Raises `OSError` if it is
    attached to nothing."""
    fd = os.open(f"{folder}/backing_file", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fsdecode(os.read(fd, 4096)).removesuffix("\n")
    finally:
        os.close(fd)


def _partitions(device: int) -> Iterator[int]:
    """The partitions of a block device."""
    folder = _sys(device)
    with suppress(OSError):
        for entry in os.listdir(folder):
            if os.path.exists(f"{folder}/{entry}/partition"):
                part = _device_of(f"{folder}/{entry}/dev")
                if part is not None:
                    yield part


def server_address(sock: socket.socket) -> object:
    """What tells the server at the other end of a connected socket from others, whatever name led
    there. All addresses of this host are one."""
    try:
        peer, own = sock.getpeername(), sock.getsockname()
    except OSError:
        return id(sock)
    if sock.family == socket.AF_UNIX:
        try:
            st = os.stat(peer)
        except (OSError, TypeError, ValueError):
            return peer
        return "unix", st.st_dev, st.st_ino
    return "inet", "here" if peer[0] == own[0] else peer[0], peer[1]


def _in_file(
    device: int, inode: int, at: Place, how: str, name: str, deep: int = 0
) -> Iterator[Place]:
    yield at._replace(store=store("file", device, inode), how=how, name=name)
    yield from _in_file_system(device, deep + 1)


def _in_file_system(device: int, deep: int) -> Iterator[Place]:
    """The block device under a file system: some of its bytes."""
    if os.major(device) and os.path.isdir(_sys(device)):
        at = Place("", within=True)
        yield from _in_device(device, at, "lies in a file system on", f"'{_dev(device)}'", -1, deep)


def _in_device(
    device: int, at: Place, how: str, name: str, fd: int, deep: int = 0
) -> Iterator[Place]:
    """The range `at` of a block device, and where that lies in its turn. `fd`: it, or a partition
    of it, open; or -1."""
    yield at._replace(store=store("device", device), how=how, name=name)
    if deep > DEPTH:
        return
    folder = _sys(device)
    if (number := _number(f"{folder}/partition")) is not None and number > 0:
        parent = _device_of(f"{folder}/../dev")
        start, size = (_number(f"{folder}/{key}") for key in ("start", "size"))
        if parent is not None and start is not None and size is not None:
            part = _inside(at, start * SECTOR, size * SECTOR)
            how = "lies on a partition of" if at.within else "is a partition of"
            yield from _in_device(parent, part, how, f"'{_dev(parent)}'", fd, deep + 1)
    elif os.major(device) == LOOP_MAJOR:
        yield from _behind_loop(device, at, fd, deep)
    else:  # a logical volume, an array: which bytes of the devices are its own is not asked
        with suppress(OSError):
            for slave in sorted(os.listdir(f"{folder}/slaves")):
                below = _device_of(f"{folder}/slaves/{slave}/dev")
                if below is not None:
                    some = Place("", within=True)
                    yield from _in_device(below, some, "lies on", f"'{_dev(below)}'", -1, deep + 1)


def _behind_loop(device: int, at: Place, fd: int, deep: int) -> Iterator[Place]:
    """The file, or the device, under a loop device."""
    folder = f"{_sys(device)}/loop"
    try:
        path = _backing_file(folder).removesuffix(" (deleted)")
    except OSError:
        return  # nothing is attached to it
    offset, limit = (_number(f"{folder}/{key}") or 0 for key in ("offset", "sizelimit"))
    found: tuple[int, int, int] | None = None  # device, inode, and the device that the inode is
    with suppress(OSError):  # the path may be another file's by now, so the kernel is asked first
        own = os.open(_dev(device), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if fd < 0 else fd
        try:
            status = fcntl.ioctl(own, LOOP_GET_STATUS64, bytes(232))
            found_device, inode, rdevice, offset, limit = LOOP_INFO.unpack_from(status)
            found = found_device, inode, rdevice
        finally:
            if fd < 0:
                os.close(own)
    if found is None:
        with suppress(OSError):
            st = os.stat(path)
            found = st.st_dev, st.st_ino, st.st_rdev if stat.S_ISBLK(st.st_mode) else 0
    if found is None:
        return
    part = _inside(at, offset, limit or END)
    how = "lies on a loop device over" if at.within else "is a loop device over"
    if found[2]:
        yield from _in_device(found[2], part, how, f"'{path}'", -1, deep + 1)
    else:
        yield from _in_file(found[0], found[1], part, how, f"'{path}'", deep + 1)


def _inside(at: Place, offset: int, size: int) -> Place:
    """The range of the store below, where ours is `size` bytes from `offset` on."""
    start = min(offset + min(at.start, size), END)
    return at._replace(start=start, stop=min(offset + min(at.stop, size), END))


def _sys(device: int) -> str:
    return f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"


def _dev(device: int) -> str:
    """The name of a block device below /dev."""
    with suppress(OSError):
        return "/dev/" + os.path.basename(os.readlink(_sys(device))).replace("!", "/")
    return f"device {os.major(device)}:{os.minor(device)}"


def _number(path: str) -> int | None:
    with suppress(OSError, ValueError), open(path, encoding="ascii") as f:
        return int(f.read())
    return None


def _device_of(path: str) -> int | None:
    """The number of a block device, from a `dev` file of sysfs."""
    with suppress(OSError, ValueError), open(path, encoding="ascii") as f:
        major, _, minor = f.read().strip().partition(":")
        return os.makedev(int(major), int(minor))
    return None


# Nodes --------------------------------------------------------------------------------------


def of_node(node: Node) -> list[Place]:
    """The places that a write to an open node may change: those of its file and its data file."""
    return [place for layer in _files(node, "") for place in layer.places]


def layers(root: Node, whose: str, disk: str = "") -> list[Layer]:
    """All that the disk called `whose` lies in: its image, that one's data file, and all below.

    `disk` is the store of the disk itself, if there is one."""
    found = [Layer(whose, whose, [Place(disk)], top=True)] if disk else []
    for node in chain(root):
        top = node is root
        role = f"the image of {whose}" if top else f"a backing file of {whose}"
        found += (file._replace(top=top) for file in _files(node, role))
    return found


def _files(node: Node, role: str) -> Iterator[Layer]:
    """The files of one node, down to the protocol."""
    if node.file is None:
        yield Layer(node.filename, role, node.places())
        return
    if node.filter:  # it passes on what the node below says of itself
        yield from _files(node.file, role)
        return
    data = getattr(node, "data", None)
    cut = node.file.file is None and not node.file.remote  # else its offsets are not the store's
    for file in _files(node.file, role):
        if cut and node.span is not None:
            file = file._replace(places=[_window(p, *node.span) for p in file.places])
        yield file
    if isinstance(data, Node) and data is not node.file:
        yield from _files(data, f"the data file of '{node.filename}'")


def _window(place: Place, start: int, stop: int) -> Place:
    """The part of a place that a window of its image is."""
    if place.within:
        return place
    return place._replace(
        start=min(place.start + start, place.stop), stop=min(place.start + stop, place.stop)
    )


# Telling clients ----------------------------------------------------------------------------


def told(root: Node, disk: str) -> list[str]:
    """What our server tells of the storage of an export, as the names of NBD contexts."""
    found: dict[str, None] = {}
    for layer in layers(root, "", disk):
        for p in layer.places:
            who = "own" if layer.top and not p.below else "below"
            within = ":within" if p.within else ""
            found[f"{STORAGE}{who}:{p.store}:{p.start}-{p.stop}{within}"] = None
            if len(found) >= MAX_TOLD:
                return list(found)
    return list(found)


def heard(contexts: Iterable[str]) -> list[Place]:
    """The places that a server of ours told; what makes no sense is left out."""
    found = []
    for context in contexts:
        match = TOLD.fullmatch(context.removeprefix(STORAGE))
        if match is not None and context.startswith(STORAGE):
            who, name, start, stop, within = match.groups()
            found.append(
                Place(name, int(start), int(stop), bool(within), who == "below", "is an export of")
            )
    return found[:MAX_TOLD]


# Comparing ----------------------------------------------------------------------------------


def meet(a: Place, b: Place) -> bool:
    """Whether two places share bytes, as far as that can be known."""
    if a.store != b.store or (a.within and b.within):
        return False
    return a.start < b.stop and b.start < a.stop


class Index(Generic[T]):
    """Things by the places that they are sure to lie in: finds one that shares bytes with another
    without comparing all of them. Used by one thread at a time."""

    def __init__(self) -> None:
        self._by_store: dict[str, list[tuple[Place, T]]] = {}

    def add(self, places: Iterable[Place], thing: T) -> None:
        """Remember a thing by its places."""
        for place in places:
            if not place.within:
                self._by_store.setdefault(place.store, []).append((place, thing))

    def discard(self, places: Iterable[Place], thing: T) -> None:
        """Forget a thing, which was added with these places."""
        for store in {place.store for place in places}:
            left = [(p, t) for p, t in self._by_store.get(store, ()) if t is not thing]
            if left:
                self._by_store[store] = left
            else:
                self._by_store.pop(store, None)

    def find(self, places: Iterable[Place]) -> Iterator[tuple[Place, Place, T]]:
        """Each thing that shares bytes with `places`, and by which two places."""
        for mine in places:
            if not mine.within:
                for theirs, thing in self._by_store.get(mine.store, ()):
                    if meet(mine, theirs):
                        yield mine, theirs, thing


def check_apart(
    refusal: str, target: str, places: Sequence[Place], source: Sequence[Layer], hint: str = ""
) -> None:
    """Raise `CowferryError` if a write to `target` would change what the source lies in, or if the
    target reads from the source's own image.

    `refusal` begins the error: what could not be done. `places` are those of the target (`of_path`
    before it is opened, `of_node` after it), `source` is what `layers` says of the source. Nothing
    may have been written yet."""
    for layer in source:
        for theirs in layer.places:
            for mine in places:
                # What lies below the target is only read, so a backing file may be shared.
                if meet(mine, theirs) and (layer.top or not mine.below):
                    raise CowferryError(
                        f"{refusal}: {connection(target, mine, layer, theirs)}",
                        hint or "nothing was changed; name another target",
                    )


def connection(target: str, mine: Place, layer: Layer, theirs: Place) -> str:
    """How a target and a layer hang together, whose places `mine` and `theirs` meet, in words."""
    if mine.below:
        return f"'{target}' lies over {layer.role}, so the copy would read from itself"
    direct = theirs.how in ("", "is")
    if mine.how == "is an export of":
        return f"'{target}' is an export of {layer.role}"
    if mine.how in ("", "is"):
        if direct:
            return f"'{target}' is {layer.role}"
        return f"'{layer.name}', {layer.role}, {theirs.how} '{target}'"
    if direct:
        return f"'{target}' {mine.how} {mine.name}, which is {layer.role}"
    return (
        f"'{target}' {mine.how} {mine.name}, and '{layer.name}', {layer.role}, "
        f"{theirs.how} {theirs.name}"
    )


def overlap(a: Sequence[Place], b: Sequence[Place]) -> bool:
    """Whether a byte is certainly in both."""
    return any(meet(p, q) for p in a for q in b if not (p.within or q.within))


def same(a: Sequence[Place], b: Sequence[Place]) -> bool:
    """Whether both are exactly the same bytes, as far as that can be known."""
    return _stores(a) == _stores(b) != set()


def _stores(places: Sequence[Place]) -> set[tuple[str, int, int]]:
    return {(p.store, p.start, p.stop) for p in places if not p.within}


def one_image(a: Node | None, b: Node | None) -> bool:
    """Whether two nodes read the same, because they and all below them are the same files in the
    same formats."""
    while a is not b:
        if a is None or b is None or a.driver != b.driver or a.size != b.size:
            return False
        if a.remote or not same(of_node(a), of_node(b)):
            return False
        a, b = a.backing, b.backing
    return True
