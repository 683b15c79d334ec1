"""blockdev-backup and drive-backup, each by itself or as an action of a transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cowferry.commands import command
from cowferry.commands.jobs import JobOptions, OnError
from cowferry.commands.transaction import action, alone
from cowferry.errors import CowferryError, NotSupported
from cowferry.operations import backup
from cowferry.operations.backup import Perf, Start, What
from cowferry.operations.transaction import Transaction

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

Sync = Literal["top", "full", "none", "incremental", "bitmap"]
BitmapMode = Literal["on-success", "never", "always"]
OnCbwError = Literal["break-guest-write", "break-snapshot"]


class BackupPerf(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: int = 0


class _Backup(JobOptions, kw_only=True):
    """What both take. `x-scratch` is the folder for old bytes that wait for a slow target."""

    target: str
    sync: Sync
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None
    compress: bool = False
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    on_cbw_error: OnCbwError = "break-guest-write"
    discard_source: bool = False
    filter_node_name: str | None = None
    x_perf: BackupPerf | None = None
    x_scratch: str | None = None
    x_scratch_limit: int = 0

    def common(self) -> dict[str, Any]:
        if self.discard_source:
            raise NotSupported(
                "Parameter 'discard-source' is not supported",
                "the source stays as it is; discard it once the backup is over",
            )
        if self.x_scratch_limit < 0:
            raise CowferryError("Parameter 'x-scratch-limit' expects a number of bytes")
        perf = self.x_perf or BackupPerf()
        return {
            **super().common(),
            "on_source_error": self.on_source_error,
            "on_target_error": self.on_target_error,
            "on_cbw_error": self.on_cbw_error,
            "perf": Perf(
                perf.use_copy_range, perf.max_workers, perf.max_chunk, perf.min_cluster_size
            ),
            "scratch": self.x_scratch,
            "scratch_limit": self.x_scratch_limit,
        }

    @property
    def what(self) -> What:
        return What(self.sync, self.bitmap, self.bitmap_mode, self.compress)


class BlockdevBackup(_Backup, kw_only=True):
    pass


class DriveBackup(_Backup, kw_only=True):
    format: str | None = None
    mode: Literal["absolute-paths", "existing"] = "absolute-paths"
    node_name: str | None = None


@action("blockdev-backup", is_job=True)
def by_node(daemon: Daemon, args: BlockdevBackup, so_far: Transaction) -> Start:
    """Into a node."""
    daemon.graph.check_name(args.filter_node_name)  # there is no filter here to bear it
    return backup.into_node(
        daemon, so_far, args.device, args.target, args.what, **args.common()
    )  # fmt: skip


@action("drive-backup", is_job=True)
def by_file(daemon: Daemon, args: DriveBackup, so_far: Transaction) -> Start:
    """Into a file."""
    daemon.graph.check_name(args.filter_node_name)
    return backup.into_file(
        daemon, so_far, args.device, args.target, args.what, format=args.format, mode=args.mode,
        node_name=args.node_name, **args.common(),
    )  # fmt: skip


@command("blockdev-backup")
def blockdev_backup(daemon: Daemon, args: BlockdevBackup) -> None:
    """Copy what a disk holds now to a node, while its guest goes on writing."""
    alone(daemon, "backup", by_node, args)


@command("drive-backup")
def drive_backup(daemon: Daemon, args: DriveBackup) -> None:
    """Copy what a disk holds now to a file, which is made unless mode is existing."""
    alone(daemon, "backup", by_file, args)
