"""block-commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowferry.commands import command
from cowferry.commands.jobs import OnReady
from cowferry.commands.stream import AlongTheChain
from cowferry.operations import commit

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class BlockCommit(AlongTheChain, kw_only=True):
    top_node: str | None = None
    top: str | None = None
    x_carry_bitmaps: bool = False
    x_on_ready: OnReady = "stay"


@command("block-commit")
def block_commit(daemon: Daemon, args: BlockCommit) -> None:
    """Put what a layer, or the active one, holds into a layer below it."""
    daemon.graph.check_name(args.filter_node_name)  # there is no filter here to bear it
    commit.start(
        daemon, args.device, top=args.top, top_node=args.top_node, carry=args.x_carry_bitmaps,
        on_ready=args.x_on_ready, **args.common(),
    )  # fmt: skip
