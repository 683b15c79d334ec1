"""Starting a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowferry.block.node import Node, chain
from cowferry.drivers.partial import FILLING
from cowferry.errors import CowferryError, NotSupported
from cowferry.jobs.job import Job
from cowferry.jobs.stream import Stream
from cowferry.operations import Claim, begin, free, job_name, wait_for_disk
from cowferry.operations.change import check_name

if TYPE_CHECKING:
    from cowferry.daemon import Daemon
    from cowferry.jobs.group import Group


def start(
    daemon: Daemon,
    device: str,
    *,
    job_id: str | None = None,
    base: str | None = None,
    base_node: str | None = None,
    bottom: str | None = None,
    backing_file: str | None = None,
    speed: int = 0,
    on_error: str = "report",
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
    unsafe: bool = False,
    group: Group | None = None,
) -> Job:
    """Fill a disk, or a layer of one, from what is below it. Raises `CowferryError`.

    A `backing_file` that is to be recorded has to lead to the base, unless it is `unsafe`."""
    graph = daemon.graph
    wait_for_disk(daemon, device)
    disk = graph.disk(device)
    top = disk.root
    free(daemon, device, "stream")
    job_id = job_name(daemon, device, job_id)
    given = {"base": base, "base-node": base_node, "bottom": bottom}
    lowest = [f"'{name}'" for name, value in given.items() if value is not None]
    if len(lowest) > 1:
        raise CowferryError(f"{' and '.join(lowest)} cannot be specified at the same time")
    if backing_file is not None and base is None and base_node is None and bottom is None:
        raise CowferryError("backing file specified, but streaming the entire chain")
    if top.driver in ("raw", "file") and top.backing is None:
        hint = "a qcow2 image can have one, and so can a raw image that was created with one"
        if not top.remote:
            hint += (
                f"; if this one was, its map '{top.filename}{FILLING}' is lost: put the map back "
            )
            hint += "before anything writes to the image"
        raise NotSupported(
            f"'{device}' is a {top.driver} image: it has no backing file to stream from", hint
        )
    layer = any(n.backing is top for n in graph.every_node())
    if top.read_only and not layer:
        raise NotSupported(f"'{device}' is read-only", "open it for writing")
    graph.check_sole(top, "stream")
    below: Node | None = None
    if base is not None:
        below = graph.find_base(disk, base)
    elif base_node is not None:
        below = graph.find_base(disk, base_node, by_node=True)
    elif bottom is not None:
        below = graph.find_base(disk, bottom, by_node=True).backing
    record = graph.backing_name(top, below)
    if backing_file is not None:
        if record is None:
            raise CowferryError("backing file specified, but streaming the entire chain")
        record = (backing_file, record[1])
    if record is not None:
        top.check_backing(*record)
    between = [n for n in chain(top) if below is None or n not in list(chain(below))]

    def make(held: Claim) -> Job:
        def detached(old: Node, base_now: Node | None) -> None:
            held.release()
            graph.detached(old, base_now)

        return Stream(
            disk,
            below,
            above=lambda: graph.disks_above(top) or [disk],
            backing=record,
            detached=detached,
            released=held.end,
            speed=speed,
            on_error=on_error,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
        )

    held = Claim(daemon, between, top, "stream", job_id)
    if backing_file is not None and record is not None and below is not None:
        try:
            check_name(daemon, top, record, below, unsafe)
        except BaseException:
            held.withdraw()
            raise
    return begin(daemon, disk, held, make, group)
