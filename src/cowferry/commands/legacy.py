"""The commands of the 2011 discussion, exactly as it ends (Image streaming API, version 2).

`block_stream`, `block_stream_cancel`, `query-block-stream` and the event
BLOCK_STREAM_COMPLETED, with the error classes named there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cowferry.commands import Args, NoArgs, command, event
from cowferry.commands.jobs import Device
from cowferry.errors import CowferryError, DeviceInUse, DeviceNotActive
from cowferry.operations import stream

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class BlockStream2011(Args):
    device: str
    base: str | None = None


@command("block_stream")
def block_stream(daemon: Daemon, args: BlockStream2011) -> None:
    """Copy data from a backing file into a disk, in the background."""
    stream.start(daemon, args.device, base=args.base)


@command("block_stream_cancel", locked=False)
def block_stream_cancel(daemon: Daemon, args: Device) -> None:
    """Stop an active stream; returns once it has stopped. The image keeps its backing file."""
    found = daemon.job_on(args.device)
    if found is None or found.type != "stream":
        raise DeviceNotActive(
            f"No active stream on device '{args.device}'", "query-block-stream lists them"
        )
    if found.cancelling:
        raise DeviceInUse(f"The stream on '{args.device}' is being cancelled already")
    try:
        found.cancel()
    except CowferryError:
        raise DeviceNotActive(f"The stream on '{args.device}' has just ended") from None
    found.wait()


@command("query-block-stream", locked=False)
def query_block_stream(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """Every active stream: device, len and offset in bytes."""
    return [
        {"device": daemon.device_of(j), "len": j.length, "offset": j.offset}
        for j in daemon.jobs.all()
        if j.type == "stream" and j.status.value not in ("concluded", "null")
    ]


@event("BLOCK_STREAM_COMPLETED")
class BlockStreamCompleted(msgspec.Struct):
    device: str
    len: int
    offset: int
    error: str | None = None
