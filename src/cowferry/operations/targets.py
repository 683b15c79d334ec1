"""Where copies and backups go: files that are made here, files that exist, devices, exports."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from cowferry.block import identity, moves, names, origin, sysio
from cowferry.block.node import Node, chain
from cowferry.drivers import OVERLAYS, fdsets, formats, opening
from cowferry.errors import CowferryError, NotSupported

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.daemon import Daemon

log = logging.getLogger(__name__)


class Made(NamedTuple):
    """A file that was made here. `over` an empty one, if somebody had put that there."""

    path: str
    over: bool = False


def create(
    daemon: Daemon, path: str, format: str, size: int, like: Node, backing: Node | None,
    made: list[Made], *, goal: bool = True,
) -> None:  # fmt: skip
    """Make the image over `backing`, with the permissions of `like`, and of its shape if it has
    the same format. Add it to `made`, unless it is a device. `goal`: a disk has yet to move there.
    The caller has reserved the path (`Graph.making`), and gives its turn away meanwhile. Raises
    `CowferryError`."""
    if os.path.exists(path) and os.path.isfile(path) and os.path.getsize(path):
        raise CowferryError(
            f"'{path}' exists", "name another file, or use mode=existing to overwrite what it holds"
        )
    options: dict[str, Any] = {}
    if format in OVERLAYS:
        if like.driver == format:
            options |= getattr(like, "geometry", {"cluster_size": like.granule})
        if backing is not None:
            name, kind = _named(path, backing)
            options |= {"backing_file": name, "backing_fmt": kind}
    existed = os.path.exists(path)
    with daemon.graph.turn.apart():
        opening.create_image(path, format, size, options, goal=goal, like=origin.of_node(like))
    if os.path.isfile(path):
        made.append(Made(path, existed))


def opened(
    daemon: Daemon, path: str, format: str, backing: Node | None, size: int,
    node_name: str | None = None,
) -> Node:  # fmt: skip
    """Open it, over `backing` and nothing else. The caller gives its turn away meanwhile. Raises
    `CowferryError`."""
    options = opening.image_options(path, format)
    if node_name is not None:
        options["node-name"] = node_name
    if format == "raw":
        if is_there(path):
            options["size"] = size  # it may be larger
    else:
        options["backing"] = backing.name if backing is not None else None
    return daemon.graph.adopt(options)


def existing(
    daemon: Daemon, path: str, format: str, below: Node | None, size: int,
    node_name: str | None = None,
) -> Node:  # fmt: skip
    """Open an image that is there: over `below` if its header names that image or none, else over
    the images that its header names. With `below` None, over nothing. Raises `CowferryError`."""
    if format in OVERLAYS and below is not None:
        look = opening.image_options(path, format, read_only=True)
        seen = daemon.graph.adopt({**look, "backing": None})
        try:
            spec = seen.backing_spec
            elsewhere = spec is not None and not leads_to(seen.filename, spec, below)
        finally:
            daemon.graph.let_go(seen)
        if elsewhere:
            options = opening.image_options(path, format)
            if node_name is not None:
                options["node-name"] = node_name
            return daemon.graph.adopt(options)
        below = below if spec is not None else None  # whoever lends it has the header name it
    return opened(daemon, path, format, below, size, node_name)


def is_there(path: str) -> bool:
    """Whether it is there already, and of a size of its own: a device, or an export of a server."""
    return names.is_uri(path) or (os.path.exists(path) and not os.path.isfile(path))


def format_by_name(target: str) -> str | None:
    """The format that a new image's name says. What a server exports is the disk: raw."""
    if names.is_uri(target):
        return "raw"
    return formats.named(target)


def unmake(daemon: Daemon, made: list[Made]) -> None:
    """Remove what was made; an empty file that was there is empty again. The caller gives its turn
    away meanwhile."""
    with daemon.graph.turn.apart():
        while made:
            path, over = made.pop()
            if not os.path.exists(path):
                continue
            moves.no_backup(path)
            if over:
                empty(path)
            else:
                sysio.unlink(path)


def empty(path: str) -> None:
    """Make a file empty."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        sysio.ftruncate(fd, 0)
    finally:
        os.close(fd)


def let_go(daemon: Daemon, nodes: list[Node], failed: bool) -> None:
    """Close the nodes that an operation opened, the last one first, unless they are in use. The
    caller gives its turn away meanwhile.

    If the operation has `failed`, nobody wants what they hold: an error while they are closed (a
    full target, say) is only logged. Else the first error is raised after all were tried."""
    first: Exception | None = None
    for node in reversed(nodes):
        try:
            daemon.graph.let_go(node)
        except (OSError, CowferryError) as error:
            log.info("'%s' was closed after a failure: %s", node.filename, error)
            first = first or error
    if first is not None and not failed:
        raise first


def check_path(refusal: str, disk: Disk, path: str, hint: str = "") -> None:
    """Raise `CowferryError` if a write to what is at `path`, or to a file made there, would change
    a byte that the disk reads. To be asked before it is made or opened; `refusal` begins the error.

    A URI passes: ask `check_node` once the export is open, before it is written."""
    places = identity.of_path(fdsets.path_of(path))
    identity.check_apart(refusal, path, places, layers(disk), hint)


def check_unused(daemon: Daemon, path: str) -> None:
    """Raise `DeviceInUse` if what is at `path` is open here, by whatever name: what is written
    there would change under whoever has it. The caller gives its turn away meanwhile."""
    with daemon.graph.turn.apart():
        places = identity.of_path(fdsets.path_of(path))
    daemon.graph.check_unused(path, places)


def check_node(refusal: str, disk: Disk, node: Node) -> None:
    """Raise `CowferryError` if a write to an open node would change a byte that the disk reads."""
    identity.check_apart(refusal, node.filename, identity.of_node(node), layers(disk))


def check_target(daemon: Daemon, refusal: str, disk: Disk, node: Node) -> None:
    """Raise `CowferryError` if a copy to an open node would change a byte that the disk reads, or
    if the node is an export of another disk of ours, whose guest has its data there."""
    check_node(refusal, disk, node)
    others = [
        identity.Layer(whose, whose, [identity.Place(other.store)], top=True)
        for other in list(daemon.graph.disks.values())
        for whose in [f"disk '{other.name}'"]
        if other is not disk
    ]
    places = [place for place in identity.of_node(node) if not place.within]
    identity.check_apart("the target is in use", node.filename, places, others)


def check_folder(refusal: str, disk: Disk, folder: str) -> None:
    """Raise `CowferryError` if files made in a folder would be stored inside the disk itself."""
    identity.check_apart(refusal, folder, identity.of_folder(folder), layers(disk))


def circles(disk: Disk, node: Node) -> bool:
    """Whether the bytes of a node are those of an export of the disk itself."""
    own = identity.Place(disk.store)
    return any(identity.meet(own, place) for n in chain(node) for place in identity.of_node(n))


def layers(disk: Disk) -> list[identity.Layer]:
    """All that a disk lies in, for `identity.check_apart`."""
    return identity.layers(disk.root, f"disk '{disk.name}'", disk.store)


Spec = tuple[str, str | None]  # a backing file's name as a header records it, and its format


class Below(NamedTuple):
    """How a target shows what is not copied to it, now and when it is opened again.

    `lent` is the node that it lies over as long as the job runs, if it lies over none. `compare`:
    it lies over another image than the disk does, so what it shows is to be compared. `record` is
    the (name, format) that its header has to name in the end; None: it is right already."""

    lent: Node | None = None
    compare: bool = False
    record: Spec | None = None


def below(target: Node, shown: Node | None) -> Below:
    """Return how the target is to show `shown` where nothing is copied. Raises `CowferryError` if
    it cannot."""
    if shown is None:
        return Below()
    if target.backing is None:
        check_backing(target, shown)
        return Below(lent=shown, record=_to_record(target, shown))
    record = _to_record(target, target.backing)
    if record is not None:
        target.check_backing(*record)
    return Below(compare=not identity.one_image(target.backing, shown), record=record)


def _named(path: str, backing: Node) -> tuple[str, str]:
    """What an image at `path` is to record of its backing file: name and format."""
    below = names.absolute(backing.filename)
    if os.path.dirname(below) == os.path.dirname(os.path.abspath(path)):
        below = os.path.basename(below)
    return below, backing.driver


def _to_record(target: Node, backing: Node) -> Spec | None:
    """Return what the header of `target` has to name for `backing`; None: it does so already."""
    spec = target.backing_spec
    if spec is None or not leads_to(target.filename, spec, backing):
        return _named(target.filename, backing)
    return None if spec[1] else (spec[0], backing.driver)


def leads_to(image: str, spec: Spec, node: Node) -> bool:
    """Whether the (backing name, format) that `image` records means the image of `node`, by
    whatever name. A format that is not recorded may be any."""
    recorded, format = spec
    if format and {"file": "raw", "host_device": "raw"}.get(format, format) != node.driver:
        return False
    if opening.leads_to(image, recorded, node.filename):
        return True
    try:
        there = identity.of_path(opening.backing_path(image, recorded))
    except CowferryError:
        return False
    return identity.same(there, identity.of_node(node))


def check_backing(target: Node, backing: Node) -> None:
    """Raise `CowferryError` unless a target that lies over nothing can show `backing`, now and when
    it is opened again."""
    if target.driver in ("raw", "file"):
        raise NotSupported(
            f"'{target.filename}' is a {target.driver} image, which has no backing file: what is "
            "not copied would read as zeroes",
            "use sync=full, or a qcow2 target",
        )
    spec = target.backing_spec
    if spec is None:
        target.check_backing(names.absolute(backing.filename), backing.driver)
    elif not leads_to(target.filename, spec, backing):
        raise CowferryError(
            f"'{target.filename}' names another backing file: '{spec[0]}', format {spec[1]}",
            f"the job does not copy '{backing.filename}' ({backing.driver}): create the target "
            "over that image, or open the target with the backing file that it names",
        )
