"""block-stream, under today's name and with today's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowferry.commands import command
from cowferry.commands.jobs import JobOptions, OnError
from cowferry.operations import stream

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class AlongTheChain(JobOptions, kw_only=True):
    """What jobs take that move data between the layers of one chain."""

    base: str | None = None
    base_node: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    on_error: OnError = "report"
    filter_node_name: str | None = None
    x_unsafe: bool = False

    def common(self) -> dict[str, Any]:
        return {
            **super().common(),
            "base": self.base,
            "base_node": self.base_node,
            "backing_file": self.backing_file,
            "unsafe": self.x_unsafe,
            "on_error": self.on_error,
        }


class BlockStream(AlongTheChain, kw_only=True):
    bottom: str | None = None


@command("block-stream")
def block_stream(daemon: Daemon, args: BlockStream) -> None:
    """Fill a disk from its backing chain, down to a base or all of it."""
    daemon.graph.check_name(args.filter_node_name)  # there is no filter here to bear it
    stream.start(daemon, args.device, bottom=args.bottom, **args.common())
