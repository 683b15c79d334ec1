"""blockdev-mirror, drive-mirror, and a copy of a whole chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from cowferry.commands import Args, command
from cowferry.commands.stream import OnError
from cowferry.errors import CowferryError
from cowferry.operations import mirror

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

Sync = Literal["top", "full", "none", "incremental", "bitmap"]
CopyMode = Literal["background", "write-blocking"]


class _Common(Args):
    device: str
    target: str
    job_id: str | None = None
    speed: int = 0
    granularity: int = 0
    buf_size: int | None = None
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    copy_mode: CopyMode = "background"
    converge_by: float = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


def common(args: _Common) -> dict[str, Any]:
    """What every kind of mirror takes. Chunks are sized by their time, up to `buf-size`."""
    if args.buf_size is not None and args.buf_size < 0:
        raise CowferryError("Invalid parameter 'buf-size'", "it is a number of bytes")
    return {
        "job_id": args.job_id,
        "speed": args.speed,
        "granularity": args.granularity or None,
        "buf_size": args.buf_size or 0,
        "on_source_error": args.on_source_error,
        "on_target_error": args.on_target_error,
        "copy_mode": args.copy_mode,
        "converge_by": args.converge_by,
        "auto_finalize": args.auto_finalize,
        "auto_dismiss": args.auto_dismiss,
    }


class BlockdevMirror(_Common, kw_only=True):
    sync: Sync
    replaces: str | None = None
    filter_node_name: str | None = None
    target_is_zero: bool = False


@command("blockdev-mirror")
def blockdev_mirror(daemon: Daemon, args: BlockdevMirror) -> None:
    """Copy a disk to a node while its guest writes; complete it to move over."""
    daemon.graph.check_name(args.filter_node_name)  # there is no filter here to bear it
    mirror.into_node(
        daemon, args.device, args.target, sync=args.sync, replaces=args.replaces, **common(args)
    )


class DriveMirror(_Common, kw_only=True):
    sync: Sync
    format: str | None = None
    mode: Literal["absolute-paths", "existing"] = "absolute-paths"
    node_name: str | None = None
    replaces: str | None = None
    unmap: bool = True


@command("drive-mirror")
def drive_mirror(daemon: Daemon, args: DriveMirror) -> None:
    """Copy a disk to a file, which is made unless mode is existing. Its format is never guessed."""
    mirror.into_file(
        daemon, args.device, args.target, sync=args.sync, format=args.format, mode=args.mode,
        node_name=args.node_name, replaces=args.replaces, **common(args),
    )  # fmt: skip


class DiskCopy(_Common):
    format: str | None = None
    shallow: bool = False
    keep: list[str] | None = None


@command("x-disk-copy")
def disk_copy(daemon: Daemon, args: DiskCopy) -> None:
    """Copy a disk to a file, alone or with the layers of its chain that `keep` names ("*": all)."""
    mirror.copy(
        daemon, args.device, args.target, format=args.format, shallow=args.shallow,
        keep=args.keep, **common(args),
    )  # fmt: skip
