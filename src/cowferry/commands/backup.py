"""blockdev-backup and drive-backup, each by itself or as an action of a transaction; and backups of
several disks at one moment, pushed into new files or pulled by others over NBD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cowferry.commands import Args, NoArgs, command
from cowferry.commands.jobs import JobOptions, OnError
from cowferry.commands.transaction import action, alone
from cowferry.errors import CowferryError, NotSupported
from cowferry.jobs.group import Group
from cowferry.jobs.job import check_speed
from cowferry.operations import backup, pull
from cowferry.operations.backup import Perf, Start, Wanted, What
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


# Several disks at one moment ----------------------------------------------------------------


class DiskToBackup(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """`base`: of an increment, the backup before it. `unsafe`: the bitmap is not asked whether it
    counts from that backup."""

    device: str
    target: str
    format: str | None = None
    base: str | None = None
    base_format: str | None = None
    unsafe: bool = False


class DiskBackup(Args):
    id: str
    disks: list[DiskToBackup]
    mode: Literal["full", "incremental", "top"] = "full"
    bitmap: str | None = None
    bitmap_mode: BitmapMode = "on-success"
    compress: bool = False
    speed: int = 0
    auto_dismiss: bool = True
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    on_cbw_error: OnCbwError = "break-guest-write"
    scratch: str | None = None
    scratch_limit: int = 0


@command("x-disk-backup")
def disk_backup(daemon: Daemon, args: DiskBackup) -> None:
    """Back up disks into new files, all at one moment. `id` is the job's; of several, the group's.

    A bitmap that a full backup names counts from this moment on, if it succeeds."""
    check_speed(args.speed)
    daemon.jobs.check_id(args.id)
    _named_once([d.device for d in args.disks])
    group = None
    if len(args.disks) > 1:
        group = Group(args.id, emit=daemon.events.emit, gone=daemon.jobs.forget_group)
    with Transaction(daemon, "backup", group) as so_far:
        for d in args.disks:
            wanted = Wanted(d.device, d.target, d.format, d.base, d.base_format, d.unsafe)
            part = backup.into_new(
                daemon, so_far, wanted, args.mode,
                args.id if group is None else f"{args.id}-{d.device}",
                bitmap=args.bitmap, bitmap_mode=args.bitmap_mode, compress=args.compress,
                speed=args.speed, auto_dismiss=args.auto_dismiss,
                on_source_error=args.on_source_error, on_target_error=args.on_target_error,
                on_cbw_error=args.on_cbw_error, scratch=args.scratch,
                scratch_limit=args.scratch_limit,
            )  # fmt: skip
            so_far.parts.append(part)
        if group is not None:
            daemon.jobs.add_group(group)
        try:
            so_far.finish()
        except BaseException:
            if group is not None:
                daemon.jobs.forget_group(group)
            raise


def _named_once(names: list[str]) -> None:
    if not names:
        raise CowferryError("Parameter 'disks' names no disk")
    if len(set(names)) < len(names):
        raise CowferryError(f"a disk is named twice: {', '.join(names)}")


class DiskToExport(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """`base`: the backup before, from which the bitmap has to count."""

    device: str
    name: str | None = None
    base: str | None = None
    base_format: str | None = None


class BackupExport(Args):
    disks: list[DiskToExport]
    id: str = "pull"
    bitmap: str | None = None
    anew: bool = True
    scratch: str | None = None
    on_cbw_error: OnCbwError = "break-snapshot"


class ExportedDisk(msgspec.Struct, rename="kebab", omit_defaults=True):
    """`state` is "kept", or "lost" with the reason. `first`: the bitmap began now, all is dirty.

    `backup_id` is what the bitmap counts from if this backup ends well; `since` is the `backup_id`
    of the backup from which it counts until then, if that is known."""

    device: str
    name: str
    uris: list[str]
    job: str
    state: str
    scratch_bytes: int
    error: str | None = None
    bitmap: str | None = None
    first: bool = False
    backup_id: str | None = None
    since: str | None = None


class ExportedBackup(msgspec.Struct):
    id: str
    disks: list[ExportedDisk]


def _told(daemon: Daemon, found: pull.Pull) -> ExportedBackup:
    return ExportedBackup(
        found.id,
        [
            ExportedDisk(
                part.device, part.name, daemon.nbd.uris(part.name) if daemon.nbd else [],
                part.job_id, "lost" if part.over else "kept", part.scratch_bytes,
                (part.job.error or "cancelled") if part.over else None,
                part.bitmap.name if part.bitmap is not None else None, part.first,
                part.id.hex() if part.bitmap is not None else None,
                part.frozen.since.hex() or None if part.frozen is not None else None,
            )
            for part in found.parts
        ],
    )  # fmt: skip


@command("x-backup-export")
def backup_export(daemon: Daemon, args: BackupExport) -> ExportedBackup:
    """Export disks, read-only over NBD, as they are at this one moment, while their guests write.

    With a bitmap, what it says at this moment goes along as qemu:dirty-bitmap:NAME. If the backup
    ends well it counts anew from the moment on, unless `anew` is false; else it keeps every bit."""
    _named_once([d.device for d in args.disks])
    wanted = [
        pull.Wanted(d.device, d.name or f"{args.id}-{d.device}", d.base, d.base_format)
        for d in args.disks
    ]
    found = pull.begin(
        daemon, args.id, wanted, bitmap=args.bitmap, anew=args.anew, scratch=args.scratch,
        on_cbw_error=args.on_cbw_error,
    )  # fmt: skip
    return _told(daemon, found)


class BackupExportEnd(Args):
    id: str = "pull"
    failed: bool = False


@command("x-backup-export-end", locked=False)
def backup_export_end(daemon: Daemon, args: BackupExportEnd) -> None:
    """Withdraw the exports of a pull backup. It ended well, unless it has `failed`."""
    pull.end(daemon, args.id, args.failed)


@command("x-query-backup-exports", locked=False)
def query_backup_exports(daemon: Daemon, args: NoArgs) -> list[ExportedBackup]:
    """The pull backups that are going on."""
    return [_told(daemon, found) for found in list(daemon.pulls.values())]
