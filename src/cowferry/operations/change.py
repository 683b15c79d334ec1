"""Another image for a disk, and another backing file's name in a header.

    change                  another medium, of which the guest is told; nothing is compared
    change, quietly         the same disk somewhere else, of which the guest is not told
    change-backing-file     the same backing file under another name; only a header changes

The last two must not change a byte that the guest reads. So a job compares first
(`jobs/verify.py`), unless the caller takes that upon itself (`unsafe`). A comparison may take as
long as reading the disk: it can be watched, slowed and called off like any job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowferry.block import identity, names
from cowferry.block.disk import Disk, in_order
from cowferry.block.moves import Move
from cowferry.block.node import Node, State, chain
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.jobs.ending import finish
from cowferry.jobs.verify import Verify, first_difference, through_holes
from cowferry.operations import (
    Claim,
    begin,
    find,
    free,
    job_name,
    move_of,
    root_disk,
    targets,
    wait_for_disk,
)
from cowferry.operations.transaction import Part

if TYPE_CHECKING:
    from collections.abc import Callable

    from cowferry.daemon import Daemon

UNSAFE = "to do it anyway, use unsafe"


class Change(Part):
    """Another image for a disk. `quietly`: it holds the same bytes, and the disk moves there."""

    def __init__(
        self, daemon: Daemon, disk: Disk, new: Node, under: Node | None, quietly: bool, held: Claim
    ) -> None:
        """`under`: the node of the present chain over which the new image is to lie, if any. What
        is `held` is given back in the end."""
        self.graph = daemon.graph
        self.disk = disk
        self.old = disk.root
        self.new = new
        self.under = under
        self.quietly = quietly
        self.held = held
        self.was_read_only = self.old.read_only

    def compare(self, offset: int, length: int) -> int | None:
        """Return the first offset of a range at which the two images differ, else None. The caller
        is inside the range. Raises `OSError`."""
        at = offset
        for e in list(self.new.extents(offset, length)) if self.under is not None else ():
            # A hole of the new image shows the image below it.
            shown = self.new if e.state is not State.HOLE else self.under
            if shown is not self.old:
                found = first_difference(self.old, shown, at, e.length)
                if found is not None:
                    return found
            at += e.length
        if self.under is None:
            return first_difference(self.old, self.new, offset, length)
        return None

    def approach(self) -> None:
        self.old.flush()
        self.new.flush()  # whoever made it may not have

    def drains(self) -> list[Disk]:
        return [self.disk]

    def settle(self) -> None:
        self.old.flush()
        if self.under is self.old and not self.old.read_only:
            self.old.reopen(True)

    def unsettle(self) -> None:
        if self.old.read_only != self.was_read_only:
            self.old.reopen(self.was_read_only)

    def moves(self) -> list[Move]:
        if not self.quietly:
            return []
        return [move_of(self.disk, self.old, self.new)]

    def switch(self) -> None:
        if self.under is not None:
            self.new.backing = self.under
        self.disk.root = self.new

    def parted(self) -> None:
        self.graph.reroot(self.disk, self.new)
        self.held.release()
        self.graph.detached(self.old, None)

    def abort(self) -> None:
        """As it was."""
        self.held.release()
        self.graph.let_go(self.new)


def change(
    daemon: Daemon,
    device: str,
    path: str,
    format: str | None,
    *,
    quietly: bool,
    unsafe: bool = False,
    job_id: str | None = None,
    speed: int = 0,
) -> Verify | None:
    """Switch a disk to the image at `path`. Raises `CowferryError`; then the disk is as it was.

    `quietly`, and not `unsafe`, the images are compared first: with a `job_id` by a job, which is
    returned. Else the disk has changed when this returns."""
    graph = daemon.graph
    wait_for_disk(daemon, device, path)
    disk = graph.disk(device)
    old = disk.root
    free(daemon, device, "change")
    if graph.stranger(old, []) is not None:
        raise DeviceInUse(f"'{device}' lies below another node")
    verify = quietly and not unsafe
    name = job_name(daemon, device, job_id) if verify and job_id is not None else ""
    held = Claim(daemon, [old], old, "change", name, brief=not verify)
    opened: list[Node] = []
    try:
        with daemon.apart():
            opening.check_whole(path)
            options = opening.image_options(path, format, read_only=old.read_only)
        new, under = _opened(daemon, options, old)
        opened.append(new)
        held.add(new)
        if quietly or not new.read_only:
            targets.check_node(f"cannot change '{device}'", disk, new)
        elif targets.circles(disk, new):
            raise CowferryError(f"cannot change '{device}': '{path}' is an export of the disk")
        if quietly and new.size != old.size:
            raise CowferryError(
                f"'{path}' has {new.size} bytes and '{device}' {old.size}",
                "a guest that is not notified cannot know; change with notify",
            )
    except BaseException:
        held.withdraw()
        for node in opened:
            graph.let_go(node)
        raise
    part = Change(daemon, disk, new, under, quietly, held)
    if verify:

        def refused(at: int) -> CowferryError:
            return CowferryError(
                f"'{path}' differs from '{device}' at offset {at}",
                f"a guest that is not notified must find the same bytes; {UNSAFE}",
            )

        return _verified(daemon, disk, held, part, part.compare, refused, "change", speed)
    _at_once(daemon, part, lambda: finish([part]), f"'{device}' could not be changed")
    return None


def _at_once(daemon: Daemon, part: Part, work: Callable[[], object], failed: str) -> None:
    """Bring a part to its end, without the caller's turn. Raises `CowferryError`; then it is
    aborted."""
    try:
        with daemon.apart():
            work()
    except BaseException as error:
        part.abort()
        if isinstance(error, OSError):
            raise CowferryError(
                f"{failed}: {error.strerror or error}", "everything is as it was"
            ) from error
        raise


def _opened(daemon: Daemon, options: dict[str, object], old: Node) -> tuple[Node, Node | None]:
    """Return the new image, and the node of the present chain over which it lies, if there is one.
    Else it is opened with the backing files that its header names. Raises `CowferryError`."""
    new = daemon.graph.adopt({**options, "backing": None})
    spec = new.backing_spec
    if spec is None:
        return new, None
    for node in chain(old):
        if targets.leads_to(new.filename, spec, node):
            return new, node
    daemon.graph.let_go(new)
    return daemon.graph.adopt(options), None


def _verified(
    daemon: Daemon,
    disk: Disk,
    held: Claim,
    part: Part,
    compare: Callable[[int, int], int | None],
    refused: Callable[[int], CowferryError],
    verb: str,
    speed: int,
) -> Verify | None:
    """Compare, and then take `part` to its end: by a job, which is returned, or at once if no id is
    held for one. Raises `CowferryError`; then the part is aborted."""

    def released(ended: bool) -> None:
        if not ended:
            part.abort()

    def make(held: Claim) -> Verify:
        return Verify(disk, verb, compare, part, refused, released=released, speed=speed)

    def check() -> None:
        if daemon.ending:
            raise CowferryError("the daemon is stopping")

    if not held.holder:
        failed = f"'{disk.name}' could not be compared"
        _at_once(daemon, part, lambda: make(held).at_once(check), failed)
        return None
    try:
        job = begin(daemon, disk, held, make)
    except BaseException:
        part.abort()
        raise
    assert isinstance(job, Verify)
    return job


# The name in a header ---------------------------------------------------------------------------


class Rename(Part):
    """Another name, which leads to the same bytes, for a backing file in the header of `node`."""

    def __init__(self, daemon: Daemon, node: Node, spec: targets.Spec, held: Claim) -> None:
        self.graph = daemon.graph
        self.node = node
        self.spec = spec
        self.was = node.backing_spec
        self.held = held
        self.other: Node | None = None  # what is there under that name, opened to be compared

    def compare(self, offset: int, length: int) -> int | None:
        """Return the first offset of a range at which the image would read differently."""
        return through_holes(self.node, self.node.backing, self.other, offset, length)

    def drains(self) -> list[Disk]:
        return in_order(self.graph.disks_above(self.node))

    def settle(self) -> None:
        self._record(self.spec)

    def unsettle(self) -> None:
        if self.was is not None and self.node.backing_spec != self.was:
            self._record(self.was)

    def _record(self, spec: targets.Spec) -> None:
        was_read_only = self.node.read_only
        if was_read_only:
            self.node.reopen(False)
        try:
            self.node.set_backing(*spec)
        finally:
            if was_read_only:
                self.node.reopen(True)

    def parted(self) -> None:
        self._let_go()

    def abort(self) -> None:
        """The header names the old backing file."""
        self._let_go()

    def _let_go(self) -> None:
        other, self.other = self.other, None
        try:
            if other is not None:
                opening.close_chain(other)
        finally:
            self.held.release()


def change_backing_file(
    daemon: Daemon,
    device: str,
    image: str,
    backing_file: str,
    *,
    unsafe: bool = False,
    job_id: str | None = None,
    speed: int = 0,
) -> Verify | None:
    """Record another backing file in the header of a node of a disk's chain, and nothing else.

    The name must not lead back to the image, or to one above it. Unless it leads to the backing
    file that is there now, or it is `unsafe`, what is there is compared with that: with a `job_id`
    by a job, which is returned. Raises `CowferryError`; then the header is as it was."""
    wait_for_disk(daemon, device)
    disk = root_disk(daemon, device)
    node = find(daemon, image)
    if node.backing is None:
        raise CowferryError("not allowing backing file change on an image without a backing file")
    layers = list(chain(disk.root))
    if node not in layers:
        raise CowferryError(f"'{device}' and image file are not in the same chain", f"'{image}'")
    spec = (backing_file, node.backing.driver)
    node.check_backing(*spec)
    with daemon.apart():
        same = targets.leads_to(node.filename, spec, node.backing)
        if not same:
            check_no_circle(node.filename, spec, layers[: layers.index(node) + 1])
    verify = not (same or unsafe)
    if verify:
        free(daemon, device, "change-backing-file")
    name = job_name(daemon, device, job_id) if verify and job_id is not None else ""
    verb = "change-backing-file"
    held = Claim(daemon, list(chain(node)), disk.root, verb, name, brief=not verify)
    part = Rename(daemon, node, spec, held)
    if not verify:
        failed = f"the header of '{node.filename}' could not be changed"
        _at_once(daemon, part, lambda: finish([part]), failed)
        return None
    below = node.backing.filename
    try:
        path = opening.backing_path(node.filename, backing_file)
        with daemon.apart():
            part.other = _other(path, spec[1])
    except BaseException:
        held.withdraw()
        part.abort()
        raise

    def refused(at: int) -> CowferryError:
        return CowferryError(
            f"'{path}' differs from '{below}' in what '{node.filename}' shows, at offset {at}",
            f"the disk would read differently; {UNSAFE}",
        )

    return _verified(daemon, disk, held, part, part.compare, refused, "change-backing-file", speed)


def _other(path: str, format: str) -> Node:
    try:
        return opening.open_image(path, format, read_only=True, force_share=True)
    except CowferryError as error:
        raise CowferryError(f"'{path}' cannot be the backing file: {error.desc}", UNSAFE) from error


def check_no_circle(image: str, spec: targets.Spec, above: list[Node]) -> None:
    """Raise `CowferryError` if the backing name `spec` that `image` is to record leads to one of
    the images `above`, or to an image that lies over one of them; or is none that an image may
    name. What is not there leads nowhere."""
    refusal = f"'{image}' cannot have the backing file '{spec[0]}'"
    layers = [
        layer
        for node in above
        for layer in identity.layers(node, f"'{node.filename}'")
        if layer.top
    ]
    hint = "nothing was changed: an image that lies over itself cannot be opened"
    if names.is_uri(image):
        return  # whatever it names is not followed
    path = opening.backing_path(image, spec[0])
    identity.check_apart(refusal, spec[0], identity.of_path(path), layers, hint)
    try:
        other = opening.open_image(path, spec[1], read_only=True, force_share=True)
    except CowferryError:
        return
    try:
        for node in chain(other):
            identity.check_apart(refusal, node.filename, identity.of_node(node), layers, hint)
    finally:
        opening.close_chain(other)


def check_name(daemon: Daemon, above: Node, spec: targets.Spec, lower: Node, unsafe: bool) -> None:
    """Raise `CowferryError` unless the name that a job is to record in `above` leads to `lower`,
    which lies below it in the end. If it is `unsafe` it only must not lead in a circle. The caller
    has claimed both, and gives its turn away meanwhile."""
    over = [n for n in daemon.graph.every_node() if above in list(chain(n))]
    with daemon.apart():
        leads = targets.leads_to(above.filename, spec, lower)
        if not leads:
            check_no_circle(above.filename, spec, over)
    if not (leads or unsafe):
        raise CowferryError(
            f"'{spec[0]}', seen from '{above.filename}', does not lead to '{lower.filename}'",
            "with that name the disk could not be opened again, or would read differently; to "
            "record the name anyway, use x-unsafe",
        )
