"""Starting a backup: into a node, or into a file that is made here or exists.

A backup is a part of a transaction, even if it is the only one: it attaches itself to its disk
inside the drain that all parts share, which is the moment that it keeps. What is looked at, in
which order, and the words are QEMU's.

The target's backing node is no part of the backup's own business, and has to be right all the same,
for a target that copies on write reads it. Where the target has none it is lent one meanwhile:

    top                     what the disk's root lies over: that is not copied
    none                    the disk's root itself. The target is the disk's overlay, and shows the
                            moment to whoever it is exported to. In the end that view is lost
    incremental, bitmap     nobody knows what: the target may be laid over an older backup later, so
                            zeroes have to be written and not left out
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cowferry.block import lineage, names, spill
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.held import BY_JOB
from cowferry.block.lineage import Stamp
from cowferry.block.node import Extent, Node, State, clear
from cowferry.block.spill import UNIT
from cowferry.drivers import OVERLAYS, driver, opening
from cowferry.drivers.formats import format_of
from cowferry.errors import CowferryError, DeviceInUse, NotSupported
from cowferry.jobs.backup import BITMAP_MODES, CBW_POLICIES, Backup
from cowferry.jobs.job import POLICIES
from cowferry.operations import (
    bitmaps,
    check_mode,
    check_unlimited,
    free,
    job_name,
    targets,
    wait_for_disk,
)
from cowferry.operations.transaction import Part, Transaction

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

log = logging.getLogger(__name__)

SYNC = ("top", "full", "none", "incremental", "bitmap")
BY_BITMAP = ("incremental", "bitmap")
MAX_WORKERS = (1 << 31) - 1
WHY = f"{BY_JOB}backup"
SAME = "Source and target cannot be the same"


class Unknown(Node):
    """What a target that gets changes only is laid over later. It reads as data, so that zeroes
    are written over it."""

    driver = "unknown"
    read_only = True

    def __init__(self, size: int) -> None:
        self.size = size

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(length, State.DATA)

    def read_run(self, buf: memoryview, offset: int, extent: Extent) -> None:
        clear(buf)


class What(NamedTuple):
    """What is to be copied; `bitmap` by name, and what becomes of it."""

    sync: str = "full"
    bitmap: str | None = None
    bitmap_mode: str | None = None
    compress: bool = False


class Perf(NamedTuple):
    """QEMU's x-perf. Here work is sized by the time it takes, and shared extents are used wherever
    the file system has them, so that two of these tell nothing that has an effect."""

    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: int = 0


class Hold:
    """A disk's root, the id of a job and a bitmap, held for a backup from before its target is
    opened. Others may share the root: several backups of a disk run at once."""

    def __init__(self, daemon: Daemon, disk: Disk, job_id: str, bitmap: Bitmap | None) -> None:
        """Raises `CowferryError`; then nothing is held."""
        self.daemon = daemon
        self.root = disk.root
        self.job_id = job_id
        self.bitmap = bitmap
        self.nodes: list[Node] = []
        daemon.jobs.reserve(job_id)
        try:
            self.add(disk.root)
        except BaseException:
            daemon.jobs.unreserve(job_id)
            raise
        if bitmap is not None:
            bitmap.busy = "backup"

    def add(self, node: Node, kept: bool = False) -> None:
        """Hold a node as well; `kept` as in `Graph.claim`. Raises `DeviceInUse`."""
        self.daemon.graph.claim(
            [node], WHY, self.job_id, wanted="backup", served=self.root,
            kept=node if kept else None, shared=self.root,
        )  # fmt: skip
        self.nodes.append(node)

    def release(self) -> None:
        """Give the nodes back. May be called again."""
        self.daemon.graph.release(self.nodes, WHY, self.job_id)

    def withdraw(self) -> None:
        """There will be no job: give everything back."""
        if self.bitmap is not None:
            self.bitmap.busy = ""
        self.daemon.jobs.unreserve(self.job_id)
        self.release()


class Start(Part):
    """A backup as a part: made and claimed when prepared, attached in the drain, then started."""

    def __init__(
        self,
        daemon: Daemon,
        so_far: Transaction,
        disk: Disk,
        target: Node,
        held: Hold,
        *,
        sync: str,
        under: targets.Below | None = None,
        bitmap_mode: str = "on-success",
        made: list[targets.Made] | None = None,
        adopted: bool = False,
        scratch: str | None = None,
        parent: bytes | None = None,
        **more: Any,
    ) -> None:
        """`parent`: the target is stamped in the end as the backup from which the bitmap counts
        then, made over the backup of that id (all zeroes: over none). `held` becomes the part's
        own. Raises `CowferryError`; then the caller has it still."""
        bitmap, job_id = held.bitmap, held.job_id
        self.daemon = daemon
        self.held = held
        self.disk = disk
        self.target = daemon.graph.disk_over(target)
        self.bitmap = bitmap
        self.made = made if made is not None else []
        self.adopted = adopted
        self.job_id = job_id
        self.lent = self._to_lend(sync)
        self.lending = False
        self.id = lineage.new_id()
        self.parent = parent
        self.job = Backup(
            disk,
            self.target,
            base=disk.root.backing if sync == "top" else None,
            look=under is not None,
            compare=under is not None and under.compare,
            record=under.record if under is not None else None,
            everything=sync != "none",
            bitmap=bitmap,
            by_bitmap=sync in BY_BITMAP,
            bitmap_mode=bitmap_mode,
            scratch=scratch or spill.beside(disk.root.filename),
            backup_id=self.id,
            stamped=self._stamp if parent is not None else None,
            released=self._released,
            **more,
        )
        try:
            held.add(target, kept=sync == "none")
            if so_far.group is not None:
                so_far.group.add(self.job)
            daemon.works_on[self.job] = disk
            daemon.jobs.admit(self.job, job_id, reserved=True)
        except BaseException:
            del self.job  # it knows us, and we would keep each other
            raise

    def _to_lend(self, sync: str) -> Node | None:
        """What the target is to lie over meanwhile, if it lies over nothing."""
        node = self.target.root
        if node.backing is not None or node.driver not in OVERLAYS:
            return None
        if sync == "none":
            return self.disk.root
        if sync == "top":
            return self.disk.root.backing
        # A full copy whose header names something that was not opened must hide that, too.
        only_part = sync in BY_BITMAP or node.backing_spec is not None
        return Unknown(node.size) if only_part else None

    # The steps ---------------------------------------------------------------------------

    def drains(self) -> list[Disk]:
        return [self.disk, self.target]

    def settle(self) -> None:
        if self.lent is not None:
            self.target.root.backing = self.lent
            self.lending = True
        self.job.attach()

    def unsettle(self) -> None:
        self.job.detach()
        self._unlend()

    def parted(self) -> None:
        if self.job.group is None:  # else it starts with all of them
            self.job.start()

    def abort(self) -> None:
        if self.bitmap is not None:
            self.bitmap.busy = ""
        self.job.withdraw()  # which releases everything

    # -------------------------------------------------------------------------------------

    def _unlend(self) -> None:
        """Inside a drain of the target."""
        if self.lending and self.target.root.backing is self.lent:
            self.target.root.backing = None  # else the view is lost, and stays so
        self.lending = False

    def _take_back(self) -> None:
        if self.lending:
            with self.target.exclusive():
                self._unlend()

    def _stamp(self) -> None:
        """The target is durable: let it say which backup it is. Raises `OSError`."""
        assert self.parent is not None
        lineage.stamp(self.target.root, Stamp(self.id, self.parent))

    def _released(self, failed: bool) -> None:
        """The job is over."""
        try:
            self._take_back()
            self._release()
        except (OSError, CowferryError) as error:
            if not failed:
                raise
            log.info("what backup '%s' made of its target is not whole: %s", self.job_id, error)
        finally:
            # With mode always the bitmap has let go of what was copied: then that has to stay.
            if failed and self.job.bitmap_mode != "always":
                targets.unmake(self.daemon, self.made)

    def _release(self) -> None:
        graph = self.daemon.graph
        self.held.release()
        try:
            if self.adopted:
                graph.let_go(self.target.root)
        finally:
            graph.tidy(self.held.nodes)


# By node ----------------------------------------------------------------------------------


def into_node(
    daemon: Daemon,
    so_far: Transaction,
    device: str,
    target: str,
    what: What,
    *,
    job_id: str | None = None,
    perf: Perf | None = None,
    **more: Any,
) -> Start:
    """blockdev-backup. Raises `CowferryError`."""
    graph = daemon.graph
    wait_for_disk(daemon, device)
    wait_for_disk(daemon, target)
    source = node_named(daemon, device)
    node_named(daemon, target)  # or it is refused in these words
    node = graph.disk(target).root  # with its filter: the job keeps to that
    disk = graph.disk(device)
    bitmap, mode = _bitmap(daemon, so_far, source, what)
    if what.sync == "none":  # else the job keeps to the limits of its target
        check_unlimited(node, "targets")
    if node is source:
        raise CowferryError(SAME)
    _check_compression(what, node, target)
    chunk = _check(disk, perf or Perf(), more, max(UNIT, node.granule) if what.compress else UNIT)
    if node.size != source.size:
        raise CowferryError(
            "Source and target image have different sizes",
            f"'{device}' has {source.size} bytes and '{target}' {node.size}",
        )
    _check_target(daemon, node, target)
    targets.check_target(daemon, SAME, disk, node)
    check_source(daemon, disk, device, node)
    under = _check_sync(source, node, what.sync)
    held = Hold(daemon, disk, job_name(daemon, device, job_id), bitmap)
    try:
        return Start(
            daemon, so_far, disk, node, held, sync=what.sync, under=under, bitmap_mode=mode,
            max_chunk=chunk, compress=what.compress, **more,
        )  # fmt: skip
    except BaseException:
        held.withdraw()
        raise


def node_named(daemon: Daemon, name: str) -> Node:
    """The node of that name, or a disk's root, below its filters. Raises `CowferryError`."""
    node = bitmaps.node_of(daemon, name)
    if node is None:
        raise CowferryError(
            f"Cannot find device='{name}' nor node-name='{name}'",
            f"there are: {', '.join(daemon.graph.names()) or 'none'}",
        )
    return node


def _bitmap(
    daemon: Daemon, so_far: Transaction, source: Node, what: What
) -> tuple[Bitmap | None, str]:
    """The bitmap that is meant, and what becomes of it in the end. Raises `CowferryError`."""
    sync, name, mode = what.sync, what.bitmap, what.bitmap_mode
    check_mode("sync", sync, SYNC)
    if mode is not None:
        check_mode("bitmap-mode", mode, BITMAP_MODES)
    if sync in BY_BITMAP and name is None:
        raise CowferryError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync == "incremental":
        if mode not in (None, "on-success"):
            raise CowferryError(
                "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
                "sync=bitmap has the other modes",
            )
        mode = "on-success"
    if name is None:
        if mode is not None:
            raise CowferryError("Cannot specify bitmap sync mode without a bitmap")
        return None, "on-success"
    bitmap = bitmaps.find(source, name, so_far)
    if bitmap is None:
        raise bitmaps.not_found(f"Bitmap '{name}' could not be found", [source])
    if mode is None:
        raise CowferryError("Bitmap sync mode must be given when providing a bitmap")
    bitmaps.check_usable(source, bitmap)
    if sync == "none":
        raise CowferryError(f"sync mode '{sync}' does not produce meaningful bitmap outputs")
    if mode == "never" and sync not in BY_BITMAP:
        raise CowferryError(
            f"Bitmap sync mode '{mode}' has no meaningful effect when combined with sync mode "
            f"'{sync}'"
        )
    if mode != "never":
        bitmaps.check_usable(source, bitmap, changing=True)
    return bitmap, mode


def _check_compression(what: What, target: Node, name: str) -> None:
    """Raise if that is wanted and the target cannot hold it."""
    if what.compress:
        try:
            target.check_compression()
        except NotSupported as error:
            raise NotSupported(
                f"Compression is not supported for this drive {name}: {error.desc}", error.hint
            ) from None


def _check(disk: Disk, perf: Perf, more: dict[str, Any], unit: int = UNIT) -> int:
    """Check the options that have nothing to do with the target. Return the largest chunk in bytes,
    0 if we may choose it. `unit` is the number of bytes that are copied as one.

    Raises `CowferryError`."""
    check_scratch(disk, more.get("scratch"))
    for key in ("on_source_error", "on_target_error"):
        check_mode(key.replace("_", "-"), more.get(key, "report"), POLICIES)
    check_mode("on-cbw-error", more.get("on_cbw_error", CBW_POLICIES[0]), CBW_POLICIES)
    if not 1 <= perf.max_workers <= MAX_WORKERS:
        raise CowferryError(f"max-workers must be between 1 and {MAX_WORKERS}")
    if perf.max_chunk < 0:
        raise CowferryError("max-chunk must be zero (which means no limit) or positive")
    if 0 < perf.max_chunk < unit:
        raise CowferryError(
            f"Required max-chunk ({perf.max_chunk}) is less than backup cluster size ({unit})"
        )
    least = perf.min_cluster_size
    if least and least & (least - 1):
        raise CowferryError("min-cluster-size needs to be a power of 2")
    if least > unit:
        raise NotSupported(
            f"min-cluster-size {least} is not supported", f"old data is saved in units of {UNIT}"
        )
    return perf.max_chunk


def check_scratch(disk: Disk, folder: str | None) -> None:
    """Raise `CowferryError` for a folder where scratch files cannot be, or must not be: files that
    are stored inside the disk itself would grow with each write that they save."""
    if folder is None:
        return
    if not os.path.isdir(folder):
        raise CowferryError(f"'{folder}' is no folder for scratch files")
    targets.check_folder(f"scratch files of '{disk.name}' cannot be there", disk, folder)


def _check_target(daemon: Daemon, node: Node, name: str) -> None:
    """Raise unless nobody else uses the node, and it may be written."""
    graph = daemon.graph
    if node.read_only:
        raise CowferryError(f"Block node is read-only: '{name}'", "open the target for writing")
    over = graph.stranger(node, [])
    if over is not None:
        raise DeviceInUse(
            f"{graph.called(node)} is busy: node is used as backing hd of '{graph.short(over)}'",
            "back up into a node that nobody else uses",
        )
    if graph.exported(node) or any(d.root is node for d in graph.disks.values()):
        raise DeviceInUse(
            f"{graph.called(node)} is in use: it is a disk of its own, or exported",
            "back up into a node that nobody else uses",
        )


def check_source(daemon: Daemon, disk: Disk, device: str, target: Node | None) -> None:
    """Raise unless all who may write the disk come by its gate."""
    root, graph = disk.root, daemon.graph
    ours = [n for n in graph.every_node() if n.backing is root]  # an overlay only reads it
    over = graph.stranger(root, ours if target is None else [*ours, target])
    if over is not None and not root.read_only:
        graph.check_free(root, "backup")
        raise CowferryError(
            "Need a root block node", f"'{device}' lies below '{graph.short(over)}'"
        )
    free(daemon, device, "backup", beside="backup")


def _check_sync(source: Node, target: Node, sync: str) -> targets.Below:
    """Return how what is not copied is seen through the target. Raises `CowferryError` if it
    cannot be."""
    if sync == "none":
        if target.backing is not None and target.backing is not source:
            raise CowferryError(
                f"'{target.name}' lies over '{target.backing.name}' and not over '{source.name}'",
                f"sync=none wants an overlay of it: open it with backing={source.name}, or none",
            )
        if target.driver not in OVERLAYS:
            targets.check_backing(target, source)
    return targets.below(target, source.backing if sync == "top" else None)


# By file ----------------------------------------------------------------------------------


def into_file(
    daemon: Daemon,
    so_far: Transaction,
    device: str,
    target: str,
    what: What,
    *,
    format: str | None = None,
    mode: str = "absolute-paths",
    node_name: str | None = None,
    job_id: str | None = None,
    perf: Perf | None = None,
    **more: Any,
) -> Start:
    """drive-backup: into a file that is made here, or exists. Raises `CowferryError`.

    What was made here goes again if the backup fails or is called off."""
    wait_for_disk(daemon, device, target)
    source = node_named(daemon, device)
    disk = daemon.graph.disk(device)
    check_mode("mode", mode, ("absolute-paths", "existing"))
    sync = what.sync
    bitmap, bitmap_mode = _bitmap(daemon, so_far, source, what)
    chunk = _check(disk, perf or Perf(), more)
    check_source(daemon, disk, device, None)
    job_id = job_name(daemon, device, job_id)
    targets.check_path(SAME, disk, target)
    # What the header names: for `none` nothing, because it is not there any more afterwards.
    below = source.backing if sync == "top" else None
    if mode == "existing":
        format = format or format_of(target)
    else:
        format = format or (source.driver if source.driver in ("raw", *OVERLAYS) else "raw")
        driver(format)
        if format not in OVERLAYS and (below is not None or sync == "none"):
            raise NotSupported(
                f"Backing file not supported for file format '{format}'",
                "use format=qcow2 or sync=full",
            )
    made: list[targets.Made] = []
    node: Node | None = None
    held = Hold(daemon, disk, job_id, bitmap)
    try:
        with daemon.graph.making(target):
            targets.check_unused(daemon, target)
            if mode != "existing":
                targets.create(daemon, target, format, source.size, source, below, made, goal=False)
            if mode == "existing" and sync == "top":
                node = targets.existing(daemon, target, format, below, source.size, node_name)
            else:
                node = _open(daemon, target, format, sync, below, source.size, node_name)
        targets.check_target(daemon, SAME, disk, node)
        if node.size != source.size:
            raise CowferryError(
                "Source and target image have different sizes",
                f"'{device}' has {source.size} bytes and '{target}' {node.size}",
            )
        _check_compression(what, node, target)
        return Start(
            daemon, so_far, disk, node, held, sync=sync, under=_check_sync(source, node, sync),
            bitmap_mode=bitmap_mode, made=made, adopted=True, max_chunk=chunk,
            compress=what.compress, **more,
        )  # fmt: skip
    except BaseException:
        _withdraw(daemon, held, [] if node is None else [node], made)
        raise


def _withdraw(daemon: Daemon, held: Hold, nodes: list[Node], made: list[targets.Made]) -> None:
    """There will be no backup: let go of the nodes that were opened for it, in order, and of what
    was made."""
    held.withdraw()
    try:
        for node in nodes:
            daemon.graph.let_go(node)
    finally:
        targets.unmake(daemon, made)


def _open(
    daemon: Daemon, path: str, format: str, sync: str, below: Node | None, size: int,
    node_name: str | None,
) -> Node:  # fmt: skip
    """The file as a node, over what it is to be over, or (changes only) over what it names."""
    if sync in ("top", "none") or format not in OVERLAYS:
        return targets.opened(daemon, path, format, below, size, node_name)
    options = opening.image_options(path, format)
    if node_name is not None:
        options["node-name"] = node_name
    return daemon.graph.adopt(options)


# Of several disks, into new files -----------------------------------------------------------

MODES = ("full", "incremental", "top")


class Wanted(NamedTuple):
    """One disk of a backup. `base` is the backup before, which an increment is laid over."""

    device: str
    target: str
    format: str | None = None
    base: str | None = None
    base_format: str | None = None
    unsafe: bool = False  # whatever the base is


def into_new(
    daemon: Daemon,
    so_far: Transaction,
    wanted: Wanted,
    mode: str,
    job_id: str,
    *,
    bitmap: str | None = None,
    bitmap_mode: str = "on-success",
    compress: bool = False,
    **more: Any,
) -> Start:
    """A backup into a file that is not there yet. Raises `CowferryError`.

    `full`: all of it. `incremental`: an overlay of `wanted.base` with what the bitmap says.
    `top`: an overlay of what the disk lies over. A full one that names a bitmap begins it, or lets
    it count anew from this moment on, if the backup succeeds; if it fails, all is dirty. An
    increment is refused over any other backup than that from which its bitmap counts, unless that
    is `wanted.unsafe` (`block/lineage.py`)."""
    device, target = wanted.device, wanted.target
    wait_for_disk(daemon, device, target, wanted.base)
    check_mode("mode", mode, MODES)
    source = node_named(daemon, device)
    disk = daemon.graph.disk(device)
    if (wanted.base is None) == (mode == "incremental"):
        raise CowferryError(
            f"an increment of '{device}' needs the backup before it, and no other has one",
            "name it as its base",
        )
    if mode == "incremental":
        what = What("bitmap", bitmap, bitmap_mode, compress)
        if bitmap is None:
            raise CowferryError(
                "an increment needs the bitmap that the backup before it began",
                "name it; a full backup that names one begins it",
            )
    else:
        what = What(mode, bitmap, bitmap_mode if bitmap is not None else None, compress)
        if bitmap is not None and bitmaps.find(source, bitmap, so_far) is None:
            so_far.parts.append(all_dirty(so_far, device, bitmap))
    found, _ = _bitmap(daemon, so_far, source, what)
    _check(disk, Perf(), more)
    check_source(daemon, disk, device, None)
    base = wanted.base
    targets.check_path(SAME, disk, target)
    if base is not None:
        targets.check_path(
            f"no backup of '{device}'", disk, base, "name the previous backup of the disk"
        )
    known = targets.format_by_name(target)
    like = source.driver if source.driver in OVERLAYS and not targets.is_there(target) else "raw"
    format = wanted.format or known or (like if mode == "full" else "qcow2")
    driver(format)
    if format not in OVERLAYS and mode != "full" and (base is not None or source.backing):
        raise NotSupported(
            f"'{target}': a {format} image has no backing file", "use format=qcow2, or a full one"
        )
    under = source.backing if mode == "top" else None
    made: list[targets.Made] = []
    nodes: list[Node] = []  # opened here, the target first
    parent = lineage.NONE
    held = Hold(daemon, disk, job_id, found)
    try:
        with daemon.graph.making(target):
            targets.check_unused(daemon, target)
            if base is not None:
                under = opened_before(daemon, base, wanted.base_format)
                nodes.append(under)
                targets.check_node(f"no backup of '{device}'", disk, under)
                held.add(under)
                parent = check_before(daemon, under, found, device, wanted.unsafe)
            if format != "raw" or not targets.is_there(target):
                if os.path.isfile(target) and os.path.getsize(target):
                    raise CowferryError(
                        f"'{target}' exists", "a backup overwrites no file: name another one"
                    )
                targets.create(daemon, target, format, source.size, source, under, made, goal=False)
            node = targets.opened(daemon, target, format, under, source.size)
        nodes.insert(0, node)
        targets.check_target(daemon, SAME, disk, node)
        _check_compression(what, node, target)
        return Start(
            daemon, so_far, disk, node, held, sync=what.sync,
            bitmap_mode=what.bitmap_mode or "on-success", made=made, adopted=True,
            parent=parent if found is not None else None, compress=compress, **more,
        )  # fmt: skip
    except BaseException:
        _withdraw(daemon, held, nodes, made)
        raise


def check_before(
    daemon: Daemon, base: Node, bitmap: Bitmap | None, device: str, unsafe: bool
) -> bytes:
    """Return the id of the backup `base`, over which an increment by `bitmap` is to be laid.

    Raises `CowferryError` unless the bitmap counts from it, or it is `unsafe`. The caller gives its
    turn away meanwhile."""
    name = base.filename
    try:
        with daemon.apart():
            if unsafe or bitmap is None:
                found = lineage.stamp_of(base)
                return found.id if found is not None and not found.written else lineage.NONE
            hint = f"to make the increment over '{name}' anyway, use unsafe"
            return lineage.check(base, bitmap.since, bitmap.name, device, hint)
    except OSError as error:
        raise CowferryError(f"'{name}' cannot be read: {error.strerror or error}") from error


def opened_before(daemon: Daemon, path: str, format: str | None) -> Node:
    """The backup before, with all that it lies over. Raises `CowferryError`."""
    if not (names.is_uri(path) or os.path.exists(path)):
        raise CowferryError(f"the backup before, '{path}', is not there", "name where it is")
    options = opening.image_options(path, format, read_only=True)
    return daemon.graph.adopt(options)


def all_dirty(so_far: Transaction, device: str, name: str) -> bitmaps.Add:
    """A new persistent bitmap. Until the backup that begins it has succeeded all is dirty, so that
    nobody takes it for the word of one that failed."""
    added = bitmaps.Add(so_far, device, name, persistent=True)
    added.bitmap.set(0, added.bitmap.size)
    return added
