"""Starting a mirror: into a node, into a new file, or into a whole chain of new files."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cowferry.block import names, unfinished
from cowferry.block.bitmap import MOST_BITS, finest
from cowferry.block.node import Node, chain
from cowferry.block.unfinished import Unfinished
from cowferry.drivers import OVERLAYS
from cowferry.drivers.formats import format_of
from cowferry.errors import CowferryError, DeviceInUse, NotSupported
from cowferry.jobs.job import POLICIES, Job
from cowferry.jobs.mirror import MODES, Layer, Mirror
from cowferry.jobs.states import Status
from cowferry.operations import (
    Claim,
    begin,
    check_mode,
    check_unlimited,
    free,
    job_name,
    move_of,
    root_disk,
    targets,
    wait_for_disk,
)

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.daemon import Daemon
    from cowferry.graph import Graph
    from cowferry.jobs.group import Group

log = logging.getLogger(__name__)

SYNC = ("top", "full", "none", "incremental", "bitmap")
MIN_GRANULARITY, MAX_GRANULARITY = 512, 64 << 20
SAME = "Can't mirror node into itself"


def _check(disk: Disk, sync: str, granularity: int | None, more: dict[str, Any]) -> None:
    check_mode("sync", sync, SYNC)
    if sync in ("incremental", "bitmap"):
        raise CowferryError(f"Sync mode '{sync}' not supported")
    if granularity:
        if not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
            raise CowferryError("Parameter 'granularity' expects a value in range [512B, 64MB]")
        if granularity & (granularity - 1):
            raise CowferryError("Parameter 'granularity' expects a power of 2")
        if disk.size // granularity > MOST_BITS:
            raise CowferryError(
                f"granularity {granularity} is too fine for the {disk.size} bytes of '{disk.name}'",
                f"leave it out, or give {finest(disk.size)} or more",
            )
    check_mode("copy-mode", more.get("copy_mode", MODES[0]), MODES)
    for key in ("on_source_error", "on_target_error"):
        check_mode(key.replace("_", "-"), more.get(key, "report"), POLICIES)
    if more.get("converge_by", 0) < 0:
        raise CowferryError("Parameter 'converge-by' expects a non-negative number of seconds")


def _check_replaces(daemon: Daemon, disk: Disk, replaces: str | None) -> None:
    if replaces is not None and daemon.graph.node(replaces) is not disk.root:
        raise NotSupported(
            f"'{replaces}' cannot be replaced", f"only the root can be: '{disk.root.name}'"
        )


def into_node(
    daemon: Daemon,
    device: str,
    target: str,
    *,
    sync: str,
    job_id: str | None = None,
    replaces: str | None = None,
    granularity: int | None = None,
    group: Group | None = None,
    **more: Any,
) -> Job:
    """blockdev-mirror. Raises `CowferryError`."""
    graph = daemon.graph
    wait_for_disk(daemon, device)
    wait_for_disk(daemon, target)
    disk = root_disk(daemon, device)
    node = graph.disk(target).root
    check_unlimited(node, "targets")
    if node is disk.root:
        raise CowferryError(SAME)
    _check(disk, sync, granularity, more)
    _check_replaces(daemon, disk, replaces)
    users = graph.stranger(node, [])
    if users is not None:
        raise DeviceInUse(
            f"{graph.called(node)} is busy: node is used as backing hd of '{graph.short(users)}'",
            "mirror into a node that nobody else uses",
        )
    targets.check_target(daemon, SAME, disk, node)
    if node.read_only:
        raise CowferryError(f"Block node is read-only: '{target}'", "open the target for writing")
    if graph.exported(node) or any(d.root is node for d in graph.disks.values()):
        raise DeviceInUse(
            f"{graph.called(node)} is in use: it is a disk of its own, or exported",
            "mirror into a node that nobody else uses",
        )
    free(daemon, device, "mirror")
    partly = _partly(disk, node, sync)
    name = job_name(daemon, device, job_id)
    held = Claim(daemon, [disk.root, node], disk.root, "mirror", name)
    return _start(
        daemon, disk, node, held, granularity=granularity, group=group, **partly, **more,
    )  # fmt: skip


def _partly(disk: Disk, node: Node, sync: str) -> dict[str, Any]:
    """What the job has to know of what is not copied to `node`, and shows through it.

    Raises `CowferryError` if it cannot."""
    root = disk.root
    shown = {"full": None, "top": root.backing, "none": root}[sync]
    under = targets.below(node, shown)
    if sync == "none" and under.compare:  # the guest writes what would have to be compared
        assert node.backing is not None
        raise CowferryError(
            f"'{node.filename}' lies over '{node.backing.filename}', and not over '{disk.name}'",
            "sync=none needs a target that is an overlay of the disk; sync=full copies everything",
        )
    return {
        "base": root.backing if sync == "top" else None,
        "everything": sync != "none",
        "backing": under.lent,
        "compare": under.compare,
        "record": under.record,
    }


def _start(
    daemon: Daemon,
    disk: Disk,
    target: Node,
    held: Claim,
    *,
    layers: tuple[Layer, ...] = (),
    abandoned: Callable[[Job], None] | None = None,
    group: Group | None = None,
    **more: Any,
) -> Job:
    """`abandoned` hears that the disk stays where it is. Raises `CowferryError`; then nothing is
    held any more."""
    graph = daemon.graph
    old = disk.root

    def make(held: Claim) -> Job:
        def released() -> None:
            job = made()  # the job calls this, so it is there
            with contextlib.ExitStack() as steps:  # in reverse order, each whatever the others do
                steps.callback(held.end)
                if disk.root is not target and abandoned is not None and job is not None:
                    steps.callback(abandoned, job)
                steps.callback(held.release)

        def detached() -> None:
            with contextlib.ExitStack() as steps:  # in reverse order, each whatever the others do
                steps.callback(_closed_or_read_only, graph, old)  # M5: never both writable
                if not old.read_only:
                    steps.callback(old.flush)
                steps.callback(held.release)
                for layer in layers:
                    steps.callback(layer.target.reopen, True)

        job = Mirror(
            disk,
            target,
            layers=layers,
            move=lambda: [move_of(disk, old, target)],
            switched=lambda: graph.reroot(disk, target),
            detached=detached,
            released=released,
            **more,
        )
        made = weakref.ref(job)  # or the job and `released` would keep each other
        return job

    return begin(daemon, disk, held, make, group)


def _closed_or_read_only(graph: Graph, old: Node) -> None:
    try:
        graph.detached(old, None)
    finally:
        if any(n is old for n in graph.every_node()):
            with contextlib.suppress(NotSupported):
                old.reopen(True)


def into_file(
    daemon: Daemon,
    device: str,
    target: str,
    *,
    sync: str,
    format: str | None = None,
    mode: str = "absolute-paths",
    node_name: str | None = None,
    job_id: str | None = None,
    replaces: str | None = None,
    granularity: int | None = None,
    group: Group | None = None,
    **more: Any,
) -> Job:
    """drive-mirror: into a file that is made here, or exists. Raises `CowferryError`.

    What was made here goes again if the copy fails or is called off."""
    graph = daemon.graph
    wait_for_disk(daemon, device, target)
    disk = root_disk(daemon, device)
    _check(disk, sync, granularity, more)
    check_mode("mode", mode, ("absolute-paths", "existing"))
    _check_replaces(daemon, disk, replaces)
    free(daemon, device, "mirror")
    root = disk.root
    targets.check_path(SAME, disk, target)
    backing = {"full": None, "top": root.backing, "none": root}[sync]
    if mode == "existing":
        format = format or format_of(target)
    else:
        format = format or (root.driver if root.driver in ("raw", *OVERLAYS) else "raw")
        if backing is not None and format == "raw":
            raise NotSupported("a raw image has no backing file", "use format=qcow2 or sync=full")
    # The job itself lays the target over the root: others may write there, as nobody else could.
    below = backing if sync == "top" else None
    made: list[targets.Made] = []
    nodes: list[Node] = []

    def abandoned(job: Job) -> None:
        failed = job.status is Status.ABORTING
        with contextlib.ExitStack() as steps:  # in reverse order, each whatever the others do
            if failed:
                steps.callback(targets.unmake, daemon, made)
            steps.callback(targets.let_go, daemon, nodes, failed)

    held = Claim(daemon, [root], root, "mirror", job_name(daemon, device, job_id))
    try:
        with graph.making(target):
            targets.check_unused(daemon, target)
            if mode == "existing":
                node = targets.existing(daemon, target, format, below, disk.size, node_name)
            else:
                targets.create(daemon, target, format, disk.size, root, backing, made)
                node = targets.opened(daemon, target, format, below, disk.size, node_name)
        nodes.append(node)
        targets.check_target(daemon, SAME, disk, node)
        held.add(node)
        if node.size != disk.size:
            raise CowferryError(
                f"Source and target image have different sizes: '{target}' has {node.size} bytes "
                f"and '{device}' {disk.size}",
                "nothing was written; make the target as large as the disk",
            )
        return _start(
            daemon, disk, node, held, granularity=granularity, group=group, abandoned=abandoned,
            **_partly(disk, node, sync), **more,
        )  # fmt: skip
    except BaseException:
        with contextlib.ExitStack() as steps:  # in reverse order, each whatever the others do
            steps.callback(targets.unmake, daemon, made)
            steps.callback(targets.let_go, daemon, nodes, True)
            steps.callback(held.withdraw)
        raise


def copy(
    daemon: Daemon,
    device: str,
    target: str,
    *,
    format: str | None = None,
    shallow: bool = False,
    keep: list[str] | None = None,
    job_id: str | None = None,
    group: Group | None = None,
    **more: Any,
) -> Job:
    """Copy a disk, or its whole chain, to `target` and files beside it. Raises `CowferryError`.

    `keep` names images below the disk that become images of their own beside `target`, under
    their own names; what lies between them is collapsed into the next one above. "*" keeps all.
    `shallow` makes `target` an overlay on the disk's present backing file instead. What was made
    here goes again if the copy fails or is called off."""
    graph = daemon.graph
    wait_for_disk(daemon, device, target)
    disk = root_disk(daemon, device)
    _check(disk, "full", more.get("granularity"), more)
    free(daemon, device, "mirror")
    root = disk.root
    below = list(chain(root))[1:]
    if shallow and keep:
        raise CowferryError("'shallow' and 'keep' cannot be given together")
    if shallow and not below:
        raise CowferryError(f"'{device}' has no backing file to share", "leave out --shallow")
    kept = below if keep == ["*"] else [graph.find_base(disk, k) for k in keep or []]
    kept = [n for n in reversed(below) if n in kept]  # bottom first
    targets.check_path(SAME, disk, target)
    overlaid = bool(kept) or shallow
    like = root.driver if root.driver in ("raw", *OVERLAYS) else "raw"
    format = format or targets.format_by_name(target) or ("qcow2" if overlaid else like)
    if overlaid and format == "raw":
        raise NotSupported(f"'{target}': a raw image has no backing file", "use --format qcow2")
    beside = [os.path.join(os.path.dirname(target), os.path.basename(n.filename)) for n in kept]
    elsewhere = "copy to another folder"
    for path in beside:
        targets.check_path("an image would be overwritten", disk, path, elsewhere)
        if names.same(path, target):
            raise CowferryError(f"'{path}' would be overwritten", elsewhere)
    made: list[targets.Made] = []
    nodes: list[Node] = []
    layers: list[Layer] = []
    resumable = format == "raw" and not (overlaid or names.is_uri(target))
    half: Unfinished | None = None
    # With layers the images below are being read as they are.
    claimed = [root, *below] if kept else [root]
    held = Claim(daemon, claimed, root, "mirror", job_name(daemon, device, job_id))

    def opened(path: str, format: str, under: Node | None, size: int) -> Node:
        node = targets.opened(daemon, path, format, under, size)
        nodes.append(node)
        targets.check_target(daemon, SAME, disk, node)
        held.add(node)
        return node

    previous: tuple[Node, Node] | None = None  # (source, its copy) of the layer below
    try:
        with contextlib.ExitStack() as making:
            for path in (*beside, target):
                making.enter_context(graph.making(path))
            targets.check_unused(daemon, target)
            if resumable:
                with daemon.apart():
                    half = unfinished.find(disk, target)
            for source, path in zip(kept, beside, strict=True):
                as_it_is = (*OVERLAYS, "raw") if previous is None else OVERLAYS
                kind = source.driver if source.driver in as_it_is else "qcow2"
                under = previous[1] if previous is not None else None
                targets.create(daemon, path, kind, source.size, source, under, made)
                copied = opened(path, kind, under, source.size)
                base = previous[0] if previous is not None else None
                layers.append(Layer(source, base, copied))
                previous = (source, copied)
            if shallow:
                previous = (below[0], below[0])
            under = previous[1] if previous is not None else None
            # A device is there, and so is what a copy before has made.
            if half is None and (format != "raw" or not targets.is_there(target)):
                targets.create(daemon, target, format, disk.size, root, under, made)
            node = opened(target, format, under, disk.size)
        later: Callable[[], tuple[Unfinished | None, str]] | None = None
        note = ""
        if half is None and resumable:
            later = partial(_begin, disk, target)
            if group is None:  # else another member may yet be refused
                with daemon.apart():
                    half, note = later()
                later = None

        def abandoned(job: Job) -> None:
            assert isinstance(job, Mirror)
            failed, left = job.status is Status.ABORTING, job.unfinished
            with contextlib.ExitStack() as steps:  # in reverse order, each whatever the others do
                if failed and left is not None and (job.error is not None or daemon.ending):
                    steps.callback(left.rest)  # it can be gone on with
                elif failed:
                    if left is not None and os.path.isfile(target):
                        # By this copy, or by the one that it went on with.
                        made.append(targets.Made(target))
                    steps.callback(targets.unmake, daemon, made)
                    if left is not None:
                        steps.callback(_over, disk, left)
                steps.callback(targets.let_go, daemon, nodes, failed)

        return _start(
            daemon, disk, node, held,
            base=previous[0] if previous is not None else None,
            layers=tuple(layers), backing=under, group=group, abandoned=abandoned,
            unfinished=half, begin=later, note=note, carry=True, **more,
        )  # fmt: skip
    except BaseException:
        with contextlib.ExitStack() as steps:  # in reverse order, each whatever the others do
            steps.callback(targets.unmake, daemon, made)
            if half is not None:
                steps.callback(_put_back, daemon, disk, half)
            steps.callback(targets.let_go, daemon, nodes, True)
            steps.callback(held.withdraw)
        raise


def _over(disk: Disk, half: Unfinished) -> None:
    """Nobody wants a copy that was begun."""
    with disk.exclusive():
        half.over()


def _put_back(daemon: Daemon, disk: Disk, half: Unfinished) -> None:
    """A copy that is not finished did not begin, or did not go on."""
    with daemon.graph.turn.apart():
        if half.resumed:
            half.rest()
        else:
            _over(disk, half)


def _begin(disk: Disk, target: str) -> tuple[Unfinished | None, str]:
    """Have it kept what the target lacks, where that can be: a crash costs little then. Else why
    not, in words."""
    if disk.root.read_only:
        return None, ""
    try:
        return unfinished.begin(disk, target), ""
    except (OSError, CowferryError) as error:
        log.warning("'%s' begins anew if it is interrupted: %s", target, error)
        why = error.desc if isinstance(error, CowferryError) else error.strerror or str(error)
        return None, f"begins anew if it is interrupted: {why}"
