"""blockdev-mirror, drive-mirror, and a copy of a whole chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from cowferry.commands import command
from cowferry.commands.jobs import JobOptions, OnError, OnReady
from cowferry.errors import CowferryError
from cowferry.operations import mirror

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

Sync = Literal["top", "full", "none", "incremental", "bitmap"]
CopyMode = Literal["background", "write-blocking"]


class _Mirror(JobOptions, kw_only=True):
    """What every kind of mirror takes. Chunks are sized by their time, up to `buf-size`."""

    target: str
    granularity: int = 0
    buf_size: int | None = None
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    copy_mode: CopyMode = "background"
    converge_by: float = 0
    x_on_ready: OnReady = "stay"

    def common(self) -> dict[str, Any]:
        if self.buf_size is not None and self.buf_size < 0:
            raise CowferryError("Invalid parameter 'buf-size'", "it is a number of bytes")
        return {
            **super().common(),
            "granularity": self.granularity or None,
            "buf_size": self.buf_size or 0,
            "on_source_error": self.on_source_error,
            "on_target_error": self.on_target_error,
            "copy_mode": self.copy_mode,
            "converge_by": self.converge_by,
            "on_ready": self.x_on_ready,
        }


class BlockdevMirror(_Mirror, kw_only=True):
    sync: Sync
    replaces: str | None = None
    filter_node_name: str | None = None
    target_is_zero: bool = False


@command("blockdev-mirror")
def blockdev_mirror(daemon: Daemon, args: BlockdevMirror) -> None:
    """Copy a disk to a node while its guest writes; complete it to move over."""
    daemon.graph.check_name(args.filter_node_name)  # there is no filter here to bear it
    mirror.into_node(
        daemon, args.device, args.target, sync=args.sync, replaces=args.replaces, **args.common()
    )


class DriveMirror(_Mirror, kw_only=True):
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
        node_name=args.node_name, replaces=args.replaces, unmap=args.unmap, **args.common(),
    )  # fmt: skip


class DiskCopy(_Mirror, kw_only=True):
    format: str | None = None
    shallow: bool = False
    keep: list[str] | None = None


@command("x-disk-copy")
def disk_copy(daemon: Daemon, args: DiskCopy) -> None:
    """Copy a disk to a file, alone or with the layers of its chain that `keep` names ("*": all)."""
    mirror.copy(
        daemon, args.device, args.target, format=args.format, shallow=args.shallow,
        keep=args.keep, **args.common(),
    )  # fmt: skip
