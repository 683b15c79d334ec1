"""Live snapshots, and transactions of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from cowferry.commands import Args, command, convert
from cowferry.errors import CowferryError
from cowferry.jobs.job import finish
from cowferry.operations.snapshot import Snapshot

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


def together(parts: list[Snapshot]) -> None:
    """All of them or none. Raises `CowferryError`."""
    try:
        finish(parts)
    except BaseException as error:
        for part in reversed(parts):
            part.abort()
        if isinstance(error, OSError):
            raise CowferryError(
                f"the snapshot failed: {error.strerror or error}", "every disk is as it was"
            ) from error
        raise


@command("blockdev-snapshot")
def blockdev_snapshot(daemon: Daemon, args: BlockdevSnapshot) -> None:
    """Put an overlay, opened with "backing": null, on top of a disk."""
    together([by_node(daemon, args)])


@command("blockdev-snapshot-sync")
def blockdev_snapshot_sync(daemon: Daemon, args: BlockdevSnapshotSync) -> None:
    """Make an overlay file, or take one that exists, and put it on top of a disk."""
    together([by_file(daemon, args)])


class SnapshotBlkdev(Args):
    device: str
    snapshot_file: str
    format: str = "qcow2"


@command("snapshot_blkdev")
def snapshot_blkdev(daemon: Daemon, args: SnapshotBlkdev) -> None:
    """The same under the name of 2011."""
    together([Snapshot(daemon, args.device).with_file(args.snapshot_file, args.format)])


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
                f"Parameter 'actions[{n}].type' does not accept value '{action.type}'",
                f"there are: {', '.join(ACTIONS)}",
            )
        if grouped:
            raise CowferryError(
                f"Action '{action.type}' does not support transaction property "
                "completion-mode = grouped"
            )
        chosen.append((known, convert(known.args, action.data)))
    parts: list[Snapshot] = []
    try:
        for known, given in chosen:
            parts.append(known.prepare(daemon, given))
    except BaseException:
        for part in reversed(parts):
            part.abort()
        raise
    if parts:
        together(parts)
