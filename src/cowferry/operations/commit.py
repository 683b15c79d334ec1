"""Starting a commit, of layers below the disk's root or of the root itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowferry.block.node import Node, chain
from cowferry.errors import CowferryError, DeviceInUse, NotSupported
from cowferry.jobs.commit import ActiveCommit, Commit, Into
from cowferry.jobs.job import Job
from cowferry.operations import (
    Claim,
    begin,
    free,
    job_name,
    move_of,
    root_disk,
    wait_for_disk,
)
from cowferry.operations.change import check_name

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.daemon import Daemon
    from cowferry.graph import Graph
    from cowferry.jobs.group import Group


def start(
    daemon: Daemon,
    device: str,
    *,
    job_id: str | None = None,
    base: str | None = None,
    base_node: str | None = None,
    top: str | None = None,
    top_node: str | None = None,
    backing_file: str | None = None,
    speed: int = 0,
    on_error: str = "report",
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
    carry: bool = False,
    unsafe: bool = False,
    on_ready: str = "stay",
    group: Group | None = None,
) -> Job:
    """Put what the layers from `top` down hold into `base`. Raises `CowferryError`.

    A `backing_file` that is to be recorded has to lead to `base`, unless it is `unsafe`.
    With `carry` the disk's bitmaps go along where it moves to the base; else they stay, as in QEMU.

    An unknown device is `DeviceNotFound` before anything else is looked at: clients probe so."""
    graph = daemon.graph
    wait_for_disk(daemon, device)
    disk = root_disk(daemon, device)
    free(daemon, device, "commit")
    job_id = job_name(daemon, device, job_id)
    root = disk.root
    layers = list(chain(root))
    if base is not None and base_node is not None:
        raise CowferryError("'base-node' and 'base' are mutually exclusive")
    if top is not None and top_node is not None:
        raise CowferryError("'top-node' and 'top' are mutually exclusive")

    def below(name: str, by_node: bool) -> Node:
        try:
            return graph.find_base(disk, name, by_node)
        except CowferryError as error:
            raise CowferryError(f"'{name}' is not in this backing file chain", error.hint) from None

    upper = root
    name = top if top is not None else top_node
    if name is not None and not graph.means(root, name, by_node=top is None):
        upper = below(name, top is None)
    name = base if base is not None else base_node
    if len(layers) == 1:
        raise NotSupported(
            f"'{device}' has no backing file: there is nothing to commit into", "see cowferry tree"
        )
    if name is None:
        lower = layers[-1]
    elif graph.means(upper, name, by_node=base is None):
        raise CowferryError("cannot commit an image into itself")
    else:
        lower = below(name, base is None)
    if lower is upper:
        raise CowferryError("cannot commit an image into itself")
    if layers.index(lower) < layers.index(upper):
        raise CowferryError(f"'{name}' is not in this backing file chain", "it lies above the top")
    active = upper is root
    if active and backing_file is not None:
        raise CowferryError("'backing-file' specified, but 'top' is the active layer")
    between = layers[layers.index(upper) + 1 : layers.index(lower)]
    for node in (lower, *between) + (() if active else (upper,)):
        stranger = graph.stranger(node, layers)
        if stranger is not None:
            raise DeviceInUse(
                f"{graph.called(node)} is busy: it is used as backing of "
                f"'{graph.short(stranger)}', too",
                "committing would change what that one reads",
            )
        if node is not root and graph.exported(node):
            raise DeviceInUse(
                f"{graph.called(node)} is exported by itself",
                "its client would see the commit's traces; withdraw that export first",
            )
    graph.check_sole(lower, "commit")
    into = Into(upper, lower, between, upper.size)
    common: dict[str, Any] = {
        "speed": speed, "on_error": on_error,
        "auto_finalize": auto_finalize, "auto_dismiss": auto_dismiss,
    }  # fmt: skip
    if active:
        if lower.size > root.size:
            raise CowferryError(
                f"'{lower.filename}' has {lower.size} bytes and '{device}' only {root.size}: the "
                "disk would change its size",
                f"grow the disk first: block_resize {device} {lower.size}",
            )
        held = Claim(daemon, layers[: layers.index(lower) + 1], root, "commit", job_id)
        return begin(
            daemon, disk, held,
            lambda held: _active(
                daemon, disk, into, held, {**common, "carry": carry, "on_ready": on_ready}
            ),
            group,
        )  # fmt: skip
    if on_ready == "cancel":
        raise CowferryError(
            f"a commit of '{upper.filename}' ends when everything is in the base",
            "only a commit of the image that the guest writes can end without moving the disk; "
            "leave out x-on-ready",
        )
    above = layers[layers.index(upper) - 1]
    if upper.size < min(lower.size, above.size):
        raise CowferryError(
            f"'{upper.filename}' is smaller than '{lower.filename}' and '{above.filename}': what "
            "lies beyond its end would shine through",
            "stream instead, or rebase offline",
        )
    claimed = layers[layers.index(above) : layers.index(lower) + 1]
    record = graph.backing_name(above, lower)
    assert record is not None
    if backing_file is not None:
        record = (backing_file, record[1])
    above.check_backing(*record)

    def make(held: Claim) -> Job:
        def detached(old: Node, base_now: Node) -> None:
            _part(graph, held, old, base_now)

        return Commit(
            lambda: graph.disks_above(lower),
            above,
            into,
            backing=record,
            detached=detached,
            released=held.end,
            **common,
        )

    held = Claim(daemon, claimed, root, "commit", job_id)
    if backing_file is not None:
        try:
            check_name(daemon, above, record, lower, unsafe)
        except BaseException:
            held.withdraw()
            raise
    return begin(daemon, disk, held, make, group)


def _active(daemon: Daemon, disk: Disk, into: Into, held: Claim, common: dict[str, Any]) -> Job:
    graph = daemon.graph
    old = into.top

    return ActiveCommit(
        disk,
        into,
        move=lambda: [move_of(disk, old, into.base)],
        switched=lambda: graph.reroot(disk, into.base),
        detached=lambda: _part(graph, held, old, into.base),
        released=held.end,
        **common,
    )


def _part(graph: Graph, held: Claim, old: Node, base: Node) -> None:
    """The layers from `old` down to `base` are in `base`: close them, or cut them off."""
    held.release()
    try:
        graph.detached(old, base)
    finally:
        graph.forsake(old, base)
