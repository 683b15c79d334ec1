"""Disks by name: add, remove, lock. Extensions, so their names begin with x-."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowferry.commands import Args, NoArgs, command
from cowferry.errors import CowferryError

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class DiskAdd(Args):
    device: str
    filename: str
    format: str | None = None
    read_only: bool = False
    copy_on_read: bool = False


@command("x-disk-add")
def disk_add(daemon: Daemon, args: DiskAdd) -> dict[str, Any]:
    """Open the image in a file (or the one it has moved to) as a disk; what was opened, and where.

    It is exported under its name if the NBD server runs."""
    disk = daemon.open_disk(
        args.device,
        args.filename,
        args.format,
        copy_on_read=args.copy_on_read,
        read_only=args.read_only,
    )
    if daemon.nbd is not None:
        try:
            daemon.add_export(disk, args.device, writable=not disk.read_only)
        except BaseException:
            daemon.graph.remove_disk(args.device)
            raise
    uris = daemon.nbd.uris(args.device) if daemon.nbd is not None else []
    return {"filename": disk.root.filename, "uris": uris}


class DiskRemove(Args):
    device: str
    force: bool = False


@command("x-disk-remove", locked=False)
def disk_remove(daemon: Daemon, args: DiskRemove) -> None:
    """Close a disk and withdraw its exports.

    Refused while a job works on it or clients are connected; with force both are called off."""
    daemon.remove_disk(args.device, args.force)


class DiskLock(Args):
    device: str
    reason: str


@command("x-disk-lock")
def disk_lock(daemon: Daemon, args: DiskLock) -> None:
    """Let nobody start an operation on a disk, remove it or resize it, until it is unlocked."""
    graph = daemon.graph
    disk = graph.disk(args.device)
    with graph.lock:
        held = graph.locks.get(id(disk))
        if held is not None:
            raise CowferryError(f"Disk '{args.device}' is locked already: {held}")
        graph.check_free(disk.root, "a lock")
        graph.locks[id(disk)] = args.reason


class DiskUnlock(Args):
    device: str


@command("x-disk-unlock")
def disk_unlock(daemon: Daemon, args: DiskUnlock) -> None:
    """Undo x-disk-lock."""
    graph = daemon.graph
    disk = graph.disk(args.device)
    with graph.lock:
        if graph.locks.pop(id(disk), None) is None:
            raise CowferryError(f"Disk '{args.device}' is not locked")


@command("x-query-locks", locked=False)
def query_locks(daemon: Daemon, args: NoArgs) -> list[dict[str, str]]:
    """Every locked disk, and why."""
    graph = daemon.graph
    with graph.lock:
        return [
            {"device": d.name, "reason": graph.locks[id(d)]}
            for d in graph.all_disks()
            if id(d) in graph.locks
        ]
