"""block-stream, under today's name and with today's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cowferry.commands import Args, command
from cowferry.operations import stream

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

OnError = Literal["report", "ignore", "enospc", "stop", "auto"]


class BlockStream(Args):
    device: str
    job_id: str | None = None
    base: str | None = None
    base_node: str | None = None
    bottom: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    speed: int = 0
    on_error: OnError = "report"
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@command("block-stream")
def block_stream(daemon: Daemon, args: BlockStream) -> None:
    """Fill a disk from its backing chain, down to a base or all of it."""
    daemon.graph.check_name(args.filter_node_name)  # there is no filter here to bear it
    stream.start(
        daemon,
        args.device,
        job_id=args.job_id,
        base=args.base,
        base_node=args.base_node,
        bottom=args.bottom,
        backing_file=args.backing_file,
        speed=args.speed,
        on_error=args.on_error,
        auto_finalize=args.auto_finalize,
        auto_dismiss=args.auto_dismiss,
    )
