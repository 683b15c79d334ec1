"""block-commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowferry.commands import Args, command
from cowferry.commands.stream import OnError
from cowferry.operations import commit

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class BlockCommit(Args):
    device: str
    job_id: str | None = None
    base_node: str | None = None
    base: str | None = None
    top_node: str | None = None
    top: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    speed: int = 0
    on_error: OnError = "report"
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@command("block-commit")
def block_commit(daemon: Daemon, args: BlockCommit) -> None:
    """Put what a layer, or the active one, holds into a layer below it."""
    daemon.graph.check_name(args.filter_node_name)  # there is no filter here to bear it
    commit.start(
        daemon,
        args.device,
        job_id=args.job_id,
        base=args.base,
        base_node=args.base_node,
        top=args.top,
        top_node=args.top_node,
        backing_file=args.backing_file,
        speed=args.speed,
        on_error=args.on_error,
        auto_finalize=args.auto_finalize,
        auto_dismiss=args.auto_dismiss,
    )
