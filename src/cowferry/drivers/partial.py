"""A raw image that holds a part of its bytes so far: the rest is still in its backing image.

A raw file cannot say which of its bytes are there. So a file beside it does, `IMAGE.filling`
(`block/bitmap_file.py`; of a device in the state folder): one bit for each granule, and the name
and format of the image that has the others. With it a guest runs on a raw image from the first
moment, a stream fills it, and whatever interrupts that, it goes on where it was. It is qcow2 in
miniature:

* a granule with a bit is what the raw file says, the others are holes to look up below;
* a write into a hole puts the whole granule into the file, the rest of it read from below, and sets
  the bit in memory. `flush` is ordered: the file is durable, then the bits are written, and are
  durable. So a crash forgets granules that were not flushed, and never shows a wrong byte;
* a bit is never cleared again: what was zeroed or discarded does not read as the backing image
  (ST4).

**Room is the final place.** What `reserve` hands out to a stream is where a guest's write into the
same hole has to go. So a granule without a bit is somebody's alone: the stream's from `reserve` to
`filled`, a guest's while it writes. A guest waits until the stream has filled the piece, of `ROOM`
bytes, for which nobody needs the gate; the stream leaves what a guest is writing to its second
look, inside the gate. From a backing image on the other side of a network it takes no room: it
fetches the bytes into memory, and places them inside the gate where there still are holes. So
no guest waits for what the stream asked of a server.

**The end.** When there is to be no backing image any more (ST2), what still is a hole is made zero
in the file; everything is durable; then `IMAGE.filling` says that there is no backing image, and
that rename is the moment. Then the mark and the file go, and the image is a raw one like others.

**When `IMAGE.filling` is lost** the raw file is no good, and does not look like it. Therefore the
file has a mark, an extended attribute with the token that `IMAGE.filling` has, too, where the file
system knows such. An image with the mark and without the file, or with one that is damaged or
another image's, is refused to whoever opens it. What is written first, and removed last, is such
that no crash leaves an image that is taken for a complete one.

**When another program has written the image** what it wrote into holes is not seen. At rest
`IMAGE.filling` says the image's time of change, and an image that was changed since is refused. Who
crashed could not say the time, and a copy of both is another file: there it is believed.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from bitarray import bitarray

from cowferry.block import bitmap_file, moves, origin, scope, sysio
from cowferry.block.bitmap_file import Contents, Damaged, Entry, Marks, Stamp, Unknown
from cowferry.block.node import ZEROES, Extent, Node, State, read, resolve
from cowferry.block.origin import Origin
from cowferry.drivers import fdsets
from cowferry.drivers.file import CREATION as file_options
from cowferry.drivers.file import File
from cowferry.drivers.options import check_format, check_known, number
from cowferry.drivers.plan import Plan, is_device
from cowferry.drivers.raw import Raw
from cowferry.errors import CowferryError, ImageError, NotSupported

log = logging.getLogger(__name__)

FILLING = ".filling"
ATTRIBUTE = "user.cowferry.filling"
NAME = "filling"  # of the bitmap
GRANULE, MIN_GRANULE, MAX_GRANULE = 64 << 10, 512, 2 << 20
ROOM = 4 << 20  # bytes that a stream fills while a guest's write into them waits
CREATION = frozenset({"backing_file", "backing_fmt", "granularity"})  # options of ours

Granules = tuple[int, int]  # [first, stop)


class Filling:
    """What `IMAGE.filling` says, and the file. One caller at a time, but for `mark`."""

    def __init__(self, path: str, contents: Contents, like: Origin) -> None:
        self.path = path
        self.contents = contents
        self.like = like  # permissions of the file
        self.marks: Marks | None = None  # while the image is open for writing
        self.inode = 0  # of the file that `marks` has
        self.seen: Stamp | None = None  # of the image, when the file was taken into use
        self.doubt: OSError | None = None  # another file may be there under its name

    @property
    def entry(self) -> Entry:
        """The bitmap, as it is durably."""
        return self.contents.entries[0]

    def use(self, file: File) -> None:
        """The image is about to be written: the file says so, durably. Raises as `store`."""
        self.seen = bitmap_file.stamp_of(file.fd)
        self.store(at_rest=True, in_use=True)

    def store(self, *, at_rest: bool = False, **changes: Any) -> None:
        """Let the file say this instead, durably; `at_rest` as in `Marks`. Raises `OSError`,
        `ImageError`; then it is as before, or no `mark` works any more until a `store` has
        worked."""
        new = replace(self.contents, **changes)
        try:
            marks = Marks(self.path, new, self.like, at_rest=at_rest)
        except (OSError, ImageError) as error:
            if self.marks is not None and not self._is_there():
                self.doubt = OSError(errno.EIO, f"'{self.path}' could not be replaced")
            if isinstance(error, OSError):
                what = f"'{self.path}' cannot be written: {error.strerror or error}"
                raise OSError(error.errno, what) from error
            raise
        if self.marks is not None:
            self.marks.close()
        self.contents, self.marks, self.doubt = new, marks, None
        self.inode = os.stat(self.path).st_ino

    def _is_there(self) -> bool:
        """Whether the file that `marks` has is still the one of that name."""
        try:
            return os.stat(self.path).st_ino == self.inode
        except OSError:
            return False

    def mark(self, bits: bitarray) -> None:
        """Durably: these bits. Raises `OSError`."""
        if self.doubt is not None:
            raise OSError(self.doubt.errno, self.doubt.strerror)
        assert self.marks is not None
        self.marks.replace(self.entry, bits)
        self.marks.flush()

    def rest(self, file: File) -> None:
        """Nobody writes the image any more. The file says the same as before, with checksums, and
        the image's time of change. If neither has changed, every byte is as it was."""
        if self.marks is not None:
            with suppress(OSError, ImageError):  # it may go on saying that it is in use
                if bitmap_file.stamp_of(file.fd) == self.seen and self.marks.put_back():
                    self.contents = replace(self.contents, in_use=False)
                else:
                    sysio.fsync(file.fd)  # or the image might lose its time of change
                    self.store(in_use=False, stamp=bitmap_file.stamp_of(file.fd))
            self.marks.close()
            self.marks = None

    def end(self, file: File) -> None:
        """The image is complete, which the file says durably: it goes."""
        end(file, self.path)
        if self.marks is not None:
            self.marks.close()
            self.marks = None


class Partial(Raw):
    """A raw image that is being filled. Thread-safe in the manner of `Node`.

    `have` is None once it is complete."""

    holes_read_zero = False
    room_is_place = True
    file: File

    def __init__(self, file: File, filling: Filling) -> None:
        super().__init__(file, 0, None)
        assert filling.contents.backing is not None
        name, format = filling.contents.backing
        self.filling = filling
        self.size = filling.contents.size
        self.granule = filling.entry.granularity
        self.room = max(ROOM, self.granule)
        self.backing_spec = (name, format or None)
        self.flushing = threading.Lock()  # one ordered flush at a time; taken before `meta`
        self.meta = threading.Condition(threading.Lock())  # guards the next four
        self.have: bitarray | None = filling.entry.bits.copy()
        self.changed = False  # `have` says more than the file
        self.rooms: list[Granules] = []  # handed out, and not `filled` yet
        self.writes: list[Granules] = []  # of guests, into holes
        self._closed = False
        if not self.read_only:
            filling.use(file)

    @property
    def held(self) -> int:
        """Bytes of the disk that are in the file."""
        with self.meta:
            if self.have is None:
                return self.size
            count = self.have.count() * self.granule
            if self.size % self.granule and self.have[-1]:
                count -= self.granule - self.size % self.granule
            return count

    # Reading -----------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The file's own runs where there are bits, and holes."""
        for start, n, ours in self._runs(offset, length):
            if ours:
                yield from self.file.extents(start, n)
            else:
                yield Extent(n, State.HOLE)

    def served(self, offset: int, length: int) -> Iterator[Extent]:
        """As `extents`, with the runs that the file serves."""
        for start, n, ours in self._runs(offset, length):
            if ours:
                yield from self.file.served(start, n)
            else:
                yield Extent(n, State.HOLE)

    def pread(self, buf: memoryview, offset: int) -> None:
        read(self, buf, offset)

    def _runs(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(offset, length, whether the file has it) of each run, as it is at one moment."""
        with self.meta:
            if self.have is None:
                return [(offset, length, True)]
            runs, end = [], offset + length
            while offset < end:
                ours = bool(self.have[offset // self.granule])
                other = self.have.find(not ours, offset // self.granule)
                stop = min(end, other * self.granule) if other >= 0 else end
                runs.append((offset, stop - offset, ours))
                offset = stop
            return runs

    # Writing -----------------------------------------------------------------------------

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Caller holds `exclusive` over the granules."""
        for start, n, ours in self._runs(offset, len(buf)):
            part = buf[start - offset :][:n]
            if ours:
                self.file.pwrite(part, start)
            else:
                self._put(part, start)
        if fua:
            self.flush()

    def _put(self, buf: memoryview, offset: int) -> None:
        """Write into holes: whole granules, filled up from below."""
        granule = self.granule
        while len(buf):
            start = offset // granule * granule
            whole = len(buf) if offset + len(buf) == self.size else len(buf) // granule * granule
            if start == offset and whole:
                with self._alone(offset, offset + whole):
                    self.file.pwrite(buf[:whole], offset)
                buf, offset = buf[whole:], offset + whole
                continue
            stop = min(start + granule, self.size)
            part = buf[: stop - offset]
            end = offset + len(part)
            view = memoryview(bytearray(stop - start))
            with self._alone(start, stop):
                read(self.backing, view[: offset - start], start)
                read(self.backing, view[end - start :], end)
                view[offset - start : end - start] = part
                self.file.pwrite(view, start)
            buf, offset = buf[len(part) :], end

    @contextmanager
    def _alone(self, start: int, end: int) -> Iterator[None]:
        """The granules of the range are filled by us, and nobody else; then they have their bits.

        Waits for room that is being filled. Caller holds `exclusive` over them."""
        mine = self._granules(start, end - start)
        with self.meta:
            while _meet(self.rooms, mine):
                scope.wait(self.meta)
            self.writes.append(mine)
        try:
            yield
            self._set(mine)
        finally:
            with self.meta:
                self.writes.remove(mine)

    def _granules(self, offset: int, length: int) -> Granules:
        """Those of a range that begins with one, and ends with one or the disk."""
        return offset // self.granule, -(-(offset + length) // self.granule)

    def _set(self, granules: Granules) -> None:
        """They are in the file now."""
        first, stop = granules
        with self.meta:
            if self.have is not None and self.have.find(0, first, stop) >= 0:
                self.have[first:stop] = True
                self.changed = True

    def zero(self, offset: int, length: int, unmap: bool = False, fast: bool = False) -> None:
        """Zeroes of the file's own, in holes as well (ST4)."""
        if self.have is None:
            return super().zero(offset, length, unmap, fast)
        whole, parts = self._cut(offset, length)
        if whole is not None:  # first: a file that cannot do it fast has changed nothing then
            with self._alone(*whole):
                self.file.zero(whole[0], whole[1] - whole[0], unmap, fast)
        for start, end in parts:
            if self._runs(start, end - start)[0][2]:
                self.file.zero(start, end - start, unmap, fast)
            elif any(e.state is not State.ZERO for e in resolve(self, start, end - start)):
                for at in range(start, end, len(ZEROES)):
                    self.pwrite(memoryview(ZEROES)[: min(end - at, len(ZEROES))], at)

    def discard(self, offset: int, length: int) -> None:
        """Give the room back; a hole becomes zero, if that costs nothing, or stays as it is."""
        if self.have is None:
            return super().discard(offset, length)
        whole, parts = self._cut(offset, length)
        for start, end in parts:
            if self._runs(start, end - start)[0][2]:
                self.file.discard(start, end - start)
        for start, n, ours in self._runs(whole[0], whole[1] - whole[0]) if whole else ():
            if ours:
                self.file.discard(start, n)
                continue
            try:
                with self._alone(start, start + n):
                    self.file.zero(start, n, unmap=True, fast=True)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise

    def _cut(self, offset: int, length: int) -> tuple[Granules | None, list[tuple[int, int]]]:
        """[start, end) in bytes: the whole granules of a range, and the parts of others."""
        granule, end = self.granule, offset + length
        first = -(-offset // granule) * granule
        last = end if end == self.size else end // granule * granule
        if first < last:
            parts = [(offset, first), (last, end)]
            return (first, last), [p for p in parts if p[0] < p[1]]
        edge = min(first, end)
        return None, [p for p in ((offset, edge), (edge, end)) if p[0] < p[1]]

    # Room, which is the final place ------------------------------------------------------

    def reserve(self, offset: int, length: int) -> list[Extent] | None:
        """The place of whole granules that are holes, and that no guest is writing just now."""
        granules = self._granules(offset, length)
        with self.meta:
            if (
                self.have is None
                or self.have.find(1, *granules) >= 0
                or _meet(self.rooms, granules)
                or _meet(self.writes, granules)
            ):
                return None
            self.rooms.append(granules)
        return [Extent(length, State.DATA, self.file.fd, offset, True)]

    def filled(self, room: list[Extent]) -> None:
        with self.meta:
            for r in room:
                with suppress(ValueError):
                    self.rooms.remove(self._granules(r.host, r.length))
            self.meta.notify_all()

    def link(self, offset: int, room: Extent) -> None:
        self.filled([room])
        self._set(self._granules(offset, room.length))

    def unreserve(self, room: Extent) -> None:
        self.filled([room])

    # Durability --------------------------------------------------------------------------

    @property
    def unflushed(self) -> bool:
        return self.changed

    def flush(self) -> None:
        """The file is durable, then the bits are: one that was set has its bytes."""
        with self.flushing:
            with self.meta:
                bits = self.have.copy() if self.have is not None and self.changed else None
                self.changed = False
            if bits is not None:
                try:
                    self.file.flush()
                    self.filling.mark(bits)
                except BaseException:
                    with self.meta:
                        self.changed = True
                    raise
                return
        self.file.flush()

    # The image as a whole ----------------------------------------------------------------

    def set_backing(self, filename: str | None, format: str | None) -> None:
        """Durably: another backing image, or none; then this is a raw image like others."""
        if self.read_only:
            raise OSError(errno.EPERM, f"{self.filename} is open read-only")
        if filename is None:
            self._complete()
            self.backing_spec = None
            return
        if self.have is None:
            self._begin_again()
        self.flush()
        with self.flushing:
            self.filling.store(backing=(filename, format or ""))
        self.backing_spec = (filename, format)

    def _complete(self) -> None:
        for start, n, ours in self._runs(0, self.size):
            if not ours:
                with self._alone(start, start + n):
                    self.file.zero(start, n, unmap=True)
        self.flush()
        with self.flushing:
            if self.have is not None:
                self.filling.store(backing=None)
                self.filling.end(self.file)
            with self.meta:
                self.have = None

    def _begin_again(self) -> None:
        """It was complete a moment ago, and whoever ended it thought better of it."""
        with self.flushing:
            self.filling.store(backing=None)  # until the mark is there this counts
            mark(self.file.fd, self.filling.contents.token)
            with self.meta:
                self.have = self.filling.entry.bits.copy()

    def resize(self, size: int) -> None:
        """Grow or shrink. What is new is zero, and the file's own; a device keeps its size."""
        if self.have is None or size == self.size:
            return super().resize(size)
        if self.file.is_device:
            raise NotSupported(f"'{self.filename}': a device that is being filled keeps its size")
        if self.size % self.granule and size > self.size:
            # Of the last granule more is to be seen: not what the backing image has there.
            last = memoryview(bytearray(1))
            read(self, last, self.size - 1)
            self.pwrite(last, self.size - 1)
        self.flush()
        with self.flushing:
            entry = self.filling.entry
            longer = self.have.copy()
            count = -(-size // self.granule)
            if count > len(longer):
                longer.extend(bitarray("1", endian="little") * (count - len(longer)))
            both = replace(entry, bits=longer)
            self.filling.store(next_size=size, entries=[both])
            self.file.resize(size)
            self.file.flush()
            after = replace(entry, bits=longer[:count])
            self.filling.store(size=size, next_size=None, entries=[after])
            with self.meta:
                self.have = after.bits.copy()
            self.size = size

    def reopen(self, read_only: bool) -> None:
        if read_only == self.read_only:
            return
        if read_only:
            self.flush()
        super().reopen(read_only)
        if read_only:
            self.filling.rest(self.file)
        elif self.have is not None:
            try:
                self.filling.use(self.file)
            except BaseException:
                super().reopen(True)
                raise

    def close(self) -> None:
        """Flush, and let the files go."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only:
                self.flush()
        finally:
            self.filling.rest(self.file)
            super().close()


def _meet(some: list[Granules], one: Granules) -> bool:
    return any(first < one[1] and one[0] < stop for first, stop in some)


# The mark -----------------------------------------------------------------------------------


def marked(fd: int) -> bytes | None:
    """The token of an image that is being filled, b"" if it has none; None where none can be."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return None
    try:
        return bytes.fromhex(os.getxattr(fd, ATTRIBUTE).decode("latin-1"))
    except ValueError:
        return b"?"  # it has one, and not of ours
    except OSError as error:
        return b"" if error.errno == errno.ENODATA else None


def mark(fd: int, token: bytes) -> None:
    """Durably give an image its token, if it can have one."""
    if marked(fd) is not None:
        try:
            sysio.set_attribute(fd, ATTRIBUTE, token.hex().encode())
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.ENOSYS):
                raise
        else:
            sysio.fsync(fd)


def unmark(fd: int) -> None:
    """Durably take the token off."""
    if marked(fd):
        sysio.set_attribute(fd, ATTRIBUTE, None)
        sysio.fsync(fd)


def end(file: File, path: str) -> None:
    """What says that the image is complete is not needed any more; the mark goes before it."""
    try:
        unmark(file.fd)
        bitmap_file.remove(path)
    except OSError as error:  # whoever opens the image next for writing tries again
        log.warning("'%s' is not needed any more, and stays: %s", path, error)


# Opening ------------------------------------------------------------------------------------


def find(file: File) -> Filling | None:
    """What says which part of a raw image is in `file`; None if all of it is.

    Raises `ImageError` if that cannot be told."""
    image, token = file.filename, marked(file.fd)
    found = _beside(image)
    if found is None:
        if token:
            raise _lost(image)
        return None
    try:
        contents = bitmap_file.read(found)
    except Damaged as error:
        raise _refused(image, found, f"is {error.what}") from error
    except Unknown as error:
        raise ImageError(error.desc, "use the version that made it; nothing was changed") from error
    except OSError as error:
        raise _refused(image, found, f"cannot be read: {error.strerror}") from error
    if contents is None and token:
        raise _lost(image)
    if contents is None or (contents.backing is None and token in (b"", None, contents.token)):
        if not file.read_only:
            end(file, found)  # somebody crashed a moment after the end
        return None
    if token is not None and token != contents.token:
        raise ImageError(
            f"'{found}' is of another image than '{image}'",
            f"if '{image}' is complete, remove that file; if the two do belong together, which a "
            "copy without extended attributes does not show: "
            f"setfattr -n {ATTRIBUTE} -v {contents.token.hex()} '{image}'",
        )
    fitting = _fitting(image, found, contents, file.size)
    _check_stamp(file, found, contents)
    return Filling(found, fitting, origin.beside(file.fd))


def _check_stamp(file: File, path: str, contents: Contents) -> None:
    """Raise `ImageError` for an image that another program has written, as far as that shows."""
    image, was, now = file.filename, contents.stamp, bitmap_file.stamp_of(file.fd)
    if file.is_device:
        if was.inode and now.inode and was.inode != now.inode:
            raise ImageError(
                f"'{path}' is of another device than the one that is '{image}' now",
                f"nothing was changed; if '{image}' is complete, remove that file",
            )
    elif (
        not contents.in_use
        and was.mtime_ns
        and was.mtime_ns != now.mtime_ns
        and (was.inode, was.version) == (now.inode, now.version)
    ):
        seconds, rest = divmod(was.mtime_ns, 10**9)
        raise ImageError(
            f"'{image}' holds a part only, and another program has changed it since",
            "what that wrote where nothing is yet would not be seen: make the image anew. If it "
            f"wrote nothing: touch -d @{seconds}.{rest:09} '{image}'. If it wrote all that was "
            f"missing: cowferry rebase --complete '{image}'",
        )


def _fitting(image: str, path: str, contents: Contents, size: int) -> Contents:
    """The contents for an image of that size. Raises `ImageError` if they are not."""
    if size not in (contents.size, contents.next_size):
        raise _refused(
            image, path, f"is of an image of {contents.size} bytes, and '{image}' has {size}"
        )
    if [e.kind for e in contents.entries] != ["allocated"]:
        raise _refused(image, path, "is damaged: it has other bitmaps than that one")
    if contents.entries[0].granularity > MAX_GRANULE:
        raise _refused(image, path, "is damaged: its granules are too large")
    fitting = replace(contents, size=size, next_size=None)
    entry = contents.entries[0]
    fitting.entries = [replace(entry, bits=entry.bits[: fitting.bits(entry.granularity)])]
    return fitting


def _beside(image: str) -> str | None:
    places = moves.places(image, FILLING)
    return next((p for p in places if os.path.lexists(p)), None)


def _lost(image: str) -> ImageError:
    path = moves.places(image, FILLING)[0]
    return _refused(image, path, "is not there")


def _refused(image: str, path: str, what: str) -> ImageError:
    return ImageError(
        f"'{image}' holds a part only, and '{path}', which says which part, {what}",
        "nothing was changed; put back the file that was there, or make the image anew. If it is "
        f"complete after all: cowferry rebase --complete '{image}'",
    )


def check_bare(node: Node) -> None:
    """Raise `ImageError` for a file that must not be read as it is: it is being filled."""
    if isinstance(node, File) and find(node) is not None:
        raise ImageError(
            f"'{node.filename}' holds a part only, and its bytes without the others are no disk",
            'put a node of driver "raw" over it, which finds the rest',
        )


# Making and mending -------------------------------------------------------------------------


def plan(path: str, size: int, options: Mapping[str, Any]) -> Plan:
    """Return how to make a raw image. With `backing_file` and `backing_fmt` it is to be filled from
    that one, in granules of `granularity` bytes; a device keeps its own size."""
    check_known(options, CREATION | file_options, "raw")
    whole = File.plan(path, size, {k: v for k, v in options.items() if k not in CREATION})
    backing, format = options.get("backing_file"), options.get("backing_fmt")
    if backing and not format:
        raise CowferryError("backing file specified without backing format", "add -F FORMAT")
    check_format(format)
    granule = _granule(options)
    if not backing:
        if set(options) & CREATION:
            raise CowferryError(
                f"'{path}': backing_fmt and granularity are for an image with a backing file",
                "add -b FILE",
            )
        return whole

    def make(path: str, _: str | None) -> None:
        _write_map(path, size, (str(backing), str(format)), granule)
        whole.make(path, None)

    return replace(whole, make=make, has_map=True)


def _write_map(path: str, size: int, backing: tuple[str, str], granule: int) -> None:
    """Durably say that nothing of the image in the file is there yet. `size` is not a device's."""
    fd = fdsets.open_fd(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        total = os.lseek(fd, 0, os.SEEK_END) if is_device(fd) else size
        token = secrets.token_bytes(16)
        bits = bitarray(-(-total // granule), endian="little")
        bits.setall(False)
        entry = Entry(NAME, "allocated", granule, bits)
        stamp = bitmap_file.stamp_of(fd)._replace(mtime_ns=0)  # it is about to change
        contents = Contents(total, token=token, stamp=stamp, backing=backing, entries=[entry])
        image = os.path.realpath(fdsets.path_of(path))
        bitmap_file.write(moves.place(image, FILLING), contents, origin.beside(fd))
        mark(fd, token)
    finally:
        os.close(fd)


def tied(fd: int) -> bool:
    """Whether a map that says which part of an image is there can be told from one of another image
    in the same place: by the mark, which a device and some file systems cannot have."""
    return marked(fd) is not None


def retire(image: str) -> Callable[[], None]:
    """Durably let the map of an image that is about to be replaced fit no image at all.

    The image is refused until the map is removed (`forget`) or put back by the function that is
    returned. Raises `OSError`, `ImageError`."""
    undo = ExitStack()
    for path in moves.places(image, FILLING):
        try:
            contents = bitmap_file.read(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (Damaged, Unknown):
            continue  # the image is refused because of it
        if contents is not None and contents.backing is not None:
            like = origin.beside(image)
            undo.callback(bitmap_file.write, path, contents, like)
            wrong = Entry(NAME, "dirty", MAX_GRANULE, bitarray(endian="little"))
            bitmap_file.write(
                path, replace(contents, size=0, next_size=None, entries=[wrong]), like
            )
    return undo.close


def forget(image: str, keep: Collection[str] = ()) -> None:
    """Durably remove the maps of an older image under this name, but for those to `keep`.

    Raises `OSError`."""
    for path in moves.places(image, FILLING):
        if path not in keep:
            bitmap_file.remove(path)


def _granule(options: Mapping[str, Any]) -> int:
    """Bytes, from the options. Raises `CowferryError`."""
    granule = number(options, "granularity", GRANULE)
    if granule & granule - 1 or not MIN_GRANULE <= granule <= MAX_GRANULE:
        raise CowferryError(
            f"Parameter 'granularity' is {granule}, and has to be a power of two between "
            f"{MIN_GRANULE} and {MAX_GRANULE >> 20}M"
        )
    return granule


def declare_complete(file: Node) -> None:
    """The image in `file` is complete, says somebody who knows: its `IMAGE.filling` was lost, or is
    no good. Raises `CowferryError` if that is there and knows better."""
    assert isinstance(file, File)
    try:
        filling = find(file)
    except ImageError:
        filling = None
    if filling is not None:
        raise CowferryError(
            f"'{file.filename}' is not complete: '{filling.path}' is there, and says so",
            "fill it: cowferry stream, or cowferry rebase -b ''",
        )
    unmark(file.fd)
    for path in moves.places(file.filename, FILLING):
        try:
            bitmap_file.remove(path)
        except OSError as error:
            raise ImageError(
                f"'{path}' is in the way, and cannot be removed: {error.strerror or error}",
                "remove it; nothing else is left to do",
            ) from error
