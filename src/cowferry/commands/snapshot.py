"""Live snapshots, and transactions of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from cowferry.commands import Args, command, convert
from cowferry.errors import CowferryError
from cowferry.jobs.job import finish
from cowferry.operations.quiesce import Guests
from cowferry.operations.snapshot import Snapshot, beside

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


log = logging.getLogger(__name__)


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


class Abort(Args):
    pass


def by_node(daemon: Daemon, args: BlockdevSnapshot) -> Snapshot:
    """An overlay that was opened before."""
    return Snapshot(daemon, args.node).with_node(args.overlay)


def by_file(daemon: Daemon, args: BlockdevSnapshotSync) -> Snapshot:
    """An overlay in a file."""
    name = args.device or args.node_name
    if name is None:
        raise CowferryError("Cannot find device='' nor node-name=''")
    if args.device is None and args.snapshot_node_name is None:
        raise CowferryError("New overlay node-name missing", "give snapshot-node-name")
    return Snapshot(daemon, name).with_file(
        args.snapshot_file, args.format, args.mode, args.snapshot_node_name
    )


def by_abort(daemon: Daemon, args: Abort) -> Snapshot:
    """Nothing at all, for tests of the roll-back."""
    raise CowferryError("Transaction aborted using Abort action")


@contextmanager
def all_or_none(daemon: Daemon, parts: list[Snapshot]) -> Iterator[None]:
    """What fails inside is undone on every disk. Raises `CowferryError`."""
    try:
        yield
    except BaseException as error:
        with daemon.commands:
            for part in reversed(parts):
                try:
                    part.abort()
                except (OSError, CowferryError):
                    log.exception("'%s' could not be put back", part.device)
        if isinstance(error, OSError):
            raise CowferryError(
                f"the snapshot failed: {error.strerror or error}", "every disk is as it was"
            ) from error
        raise


def together(daemon: Daemon, parts: list[Snapshot]) -> None:
    """All of them or none. Raises `CowferryError`."""
    with all_or_none(daemon, parts):
        finish(parts)


@command("blockdev-snapshot")
def blockdev_snapshot(daemon: Daemon, args: BlockdevSnapshot) -> None:
    """Put an overlay, opened with "backing": null, on top of a disk."""
    together(daemon, [by_node(daemon, args)])


@command("blockdev-snapshot-sync")
def blockdev_snapshot_sync(daemon: Daemon, args: BlockdevSnapshotSync) -> None:
    """Make an overlay file, or take one that exists, and put it on top of a disk."""
    together(daemon, [by_file(daemon, args)])


class SnapshotBlkdev(Args):
    device: str
    snapshot_file: str
    format: str = "qcow2"


@command("snapshot_blkdev")
def snapshot_blkdev(daemon: Daemon, args: SnapshotBlkdev) -> None:
    """The same under the name of 2011."""
    together(daemon, [Snapshot(daemon, args.device).with_file(args.snapshot_file, args.format)])


class Action(NamedTuple):
    """A type of action: its arguments, and how it is prepared."""

    args: type[Args]
    prepare: Callable[[Daemon, Any], Snapshot]


ACTIONS = {
    "blockdev-snapshot": Action(BlockdevSnapshot, by_node),
    "blockdev-snapshot-sync": Action(BlockdevSnapshotSync, by_file),
    "abort": Action(Abort, by_abort),
}


class TransactionAction(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    data: dict[str, Any] = {}


class Properties(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    completion_mode: Literal["individual", "grouped"] = "individual"


class Transaction(Args):
    actions: list[TransactionAction]
    properties: Properties | None = None


@command("transaction")
def transaction(daemon: Daemon, args: Transaction) -> None:
    """Several actions at one point in time: all, or none and everything as it was."""
    chosen = []
    grouped = args.properties is not None and args.properties.completion_mode == "grouped"
    for n, action in enumerate(args.actions):
        known = ACTIONS.get(action.type)
        if known is None:
            raise CowferryError(
                f"Parameter 'type' does not accept value '{action.type}'",
                f"in action {n}; there are: {', '.join(ACTIONS)}",
            )
        if grouped:
            raise CowferryError(
                f"Action '{action.type}' does not support transaction property "
                "completion-mode = grouped"
            )
        chosen.append((known, convert(known.args, action.data)))
    parts: list[Snapshot] = []
    with all_or_none(daemon, parts):
        for known, given in chosen:
            parts.append(known.prepare(daemon, given))
        finish(parts)


class DiskToSnapshot(Args):
    device: str
    snapshot_file: str | None = None
    format: str = "qcow2"
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
        with all_or_none(daemon, parts):
            with daemon.turn(guests.patience):
                for wanted in args.disks:
                    parts.append(by_name(daemon, wanted, parts))
            for part in parts:
                part.approach()  # once while the guests run: most of the flush is done then
            with guests.frozen(), daemon.turn(guests.patience):
                finish([*parts, guests])
    guests.check()
    tops = [p.overlay for p in parts if p.overlay is not None]
    return DiskSnapshotTaken(
        [
            NewTop(p.device, os.path.abspath(top.filename), top.name)
            for p, top in zip(parts, tops, strict=True)
        ],
        guests.filesystems,
        guests.seconds if args.quiesce else None,
    )


def by_name(daemon: Daemon, args: DiskToSnapshot, parts: list[Snapshot]) -> Snapshot:
    """An overlay for a disk; without a file name one beside the image that the disk is on."""
    part = Snapshot(daemon, args.device)
    if any(p.disk is part.disk for p in parts):
        raise CowferryError(f"'{args.device}' is named twice")
    path = args.snapshot_file
    if path is None:
        if args.mode == "existing":
            raise CowferryError(
                "Parameter 'snapshot-file' is missing", "mode=existing names a file that is there"
            )
        path = beside(part.old.filename)
    return part.with_file(path, args.format, args.mode, args.node_name)
