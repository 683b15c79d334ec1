"""Live snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from cowferry.block import names
from cowferry.commands import Args, command
from cowferry.commands.transaction import action, alone
from cowferry.drivers import OVERLAYS, formats
from cowferry.errors import CowferryError
from cowferry.operations.quiesce import Guests
from cowferry.operations.snapshot import Snapshot, beside
from cowferry.operations.transaction import Transaction

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class BlockdevSnapshot(Args):
    node: str
    overlay: str


class BlockdevSnapshotSync(Args):
    snapshot_file: str
    device: str | None = None
    node_name: str | None = None
    snapshot_node_name: str | None = None
    format: str = "qcow2"
    mode: Literal["absolute-paths", "existing"] = "absolute-paths"


@action("blockdev-snapshot")
def by_node(daemon: Daemon, args: BlockdevSnapshot, so_far: Transaction) -> Snapshot:
    """An overlay that was opened before."""
    return Snapshot(daemon, args.node).with_node(args.overlay)


@action("blockdev-snapshot-sync")
def by_file(daemon: Daemon, args: BlockdevSnapshotSync, so_far: Transaction) -> Snapshot:
    """An overlay in a file."""
    name = args.device or args.node_name
    if name is None:
        raise CowferryError("Cannot find device='' nor node-name=''")
    if args.device is None and args.snapshot_node_name is None:
        raise CowferryError("New overlay node-name missing", "give snapshot-node-name")
    return Snapshot(daemon, name, path=args.snapshot_file).with_file(
        args.snapshot_file, args.format, args.mode, args.snapshot_node_name
    )


@command("blockdev-snapshot")
def blockdev_snapshot(daemon: Daemon, args: BlockdevSnapshot) -> None:
    """Put an overlay, opened with "backing": null, on top of a disk."""
    alone(daemon, "snapshot", by_node, args)


@command("blockdev-snapshot-sync")
def blockdev_snapshot_sync(daemon: Daemon, args: BlockdevSnapshotSync) -> None:
    """Make an overlay file, or take one that exists, and put it on top of a disk."""
    alone(daemon, "snapshot", by_file, args)


class SnapshotBlkdev(Args):
    device: str
    snapshot_file: str
    format: str = "qcow2"


@command("snapshot_blkdev")
def snapshot_blkdev(daemon: Daemon, args: SnapshotBlkdev) -> None:
    """The same under the name of 2011."""
    given = BlockdevSnapshotSync(
        device=args.device, snapshot_file=args.snapshot_file, format=args.format
    )
    alone(daemon, "snapshot", by_file, given)


class DiskToSnapshot(Args):
    device: str
    snapshot_file: str | None = None
    format: str | None = None
    mode: Literal["absolute-paths", "existing"] = "absolute-paths"
    node_name: str | None = None


class DiskSnapshot(Args):
    disks: list[DiskToSnapshot]
    quiesce: list[str] | None = None
    quiesce_timeout: float = 10.0


class NewTop(msgspec.Struct, rename="kebab"):
    device: str
    snapshot_file: str
    node_name: str


class DiskSnapshotTaken(msgspec.Struct, rename="kebab", omit_defaults=True):
    disks: list[NewTop]
    filesystems: int
    frozen_seconds: float | None = None


@command("x-disk-snapshot", locked=False)
def disk_snapshot(daemon: Daemon, args: DiskSnapshot) -> DiskSnapshotTaken:
    """Snapshot several disks at one point in time, their guests' file systems frozen meanwhile.

    `quiesce` names the unix sockets of the guests' agents. Nobody else's command waits for them."""
    if not args.disks:
        raise CowferryError("Parameter 'disks' names no disk")
    with Guests(args.quiesce or [], args.quiesce_timeout) as guests, daemon.at_end(guests.call_off):
        guests.greet()
        parts: list[Snapshot] = []
        with Transaction(daemon, "snapshot") as so_far:
            with daemon.turn(guests.patience):
                for wanted in args.disks:
                    parts.append(by_name(daemon, wanted, parts, not guests.agents))
                    so_far.parts.append(parts[-1])
            for part in parts:
                part.approach()  # once while the guests run: most of the flush is done then
            with guests.frozen():
                so_far.finish(guests)
    guests.check()
    tops = [p.overlay for p in parts if p.overlay is not None]
    return DiskSnapshotTaken(
        [
            NewTop(p.device, names.absolute(top.filename), top.name)
            for p, top in zip(parts, tops, strict=True)
        ],
        guests.filesystems,
        guests.seconds if args.quiesce else None,
    )


def by_name(
    daemon: Daemon, args: DiskToSnapshot, parts: list[Snapshot], brief: bool = True
) -> Snapshot:
    """An overlay for a disk; without a file name one beside the image that the disk is on. `brief`
    as in `Snapshot`."""
    part = Snapshot(daemon, args.device, carry=True, path=args.snapshot_file, brief=brief)
    if any(p.disk is part.disk for p in parts):
        raise CowferryError(f"'{args.device}' is named twice")
    path = args.snapshot_file
    if path is None:
        if args.mode == "existing":
            raise CowferryError(
                "Parameter 'snapshot-file' is missing", "mode=existing names a file that is there"
            )
        path = beside(part.old.filename)
    told = formats.named(path)
    format = args.format or (told if told in OVERLAYS else "qcow2")
    return part.with_file(path, format, args.mode, args.node_name)
