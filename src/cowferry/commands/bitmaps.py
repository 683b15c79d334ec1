"""Dirty bitmaps: add, remove, clear, enable, disable, merge; each is an action of transactions,
too."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from cowferry.commands import Args, command
from cowferry.commands.transaction import action, alone
from cowferry.errors import CowferryError
from cowferry.operations import bitmaps
from cowferry.operations.transaction import Transaction

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class BlockDirtyBitmap(Args):
    node: str
    name: str


class BlockDirtyBitmapAdd(BlockDirtyBitmap):
    granularity: int | None = None
    persistent: bool = False
    disabled: bool = False


class BitmapOfNode(msgspec.Struct, forbid_unknown_fields=True):
    """A bitmap of another node."""

    node: str
    name: str


class BlockDirtyBitmapMerge(Args):
    node: str
    target: str
    bitmaps: list[str | BitmapOfNode]


class Sha256(msgspec.Struct):
    sha256: str


def named(wanted: list[str | BitmapOfNode]) -> list[bitmaps.Named]:
    """As operations take them."""
    return [w if isinstance(w, str) else (w.node, w.name) for w in wanted]


@action("block-dirty-bitmap-add")
def add(daemon: Daemon, args: BlockDirtyBitmapAdd, so_far: Transaction) -> bitmaps.Add:
    """A new bitmap of a node."""
    if args.granularity is not None and not 0 <= args.granularity < 1 << 32:
        raise CowferryError("Parameter 'granularity' expects uint32_t")
    return bitmaps.Add(
        daemon,
        args.node,
        args.name,
        granularity=args.granularity,
        persistent=args.persistent,
        disabled=args.disabled,
        so_far=so_far,
    )


@action("block-dirty-bitmap-remove")
def remove(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Remove:
    """No such bitmap."""
    return bitmaps.Remove(daemon, args.node, args.name, so_far)


@action("block-dirty-bitmap-clear")
def clear(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Clear:
    """Nothing is dirty."""
    return bitmaps.Clear(daemon, args.node, args.name, so_far)


@action("block-dirty-bitmap-enable")
def enable(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Record:
    """Writes are recorded."""
    return bitmaps.Record(daemon, args.node, args.name, True, so_far)


@action("block-dirty-bitmap-disable")
def disable(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Record:
    """Writes are not recorded."""
    return bitmaps.Record(daemon, args.node, args.name, False, so_far)


@action("block-dirty-bitmap-merge")
def merge(daemon: Daemon, args: BlockDirtyBitmapMerge, so_far: Transaction) -> bitmaps.Merge:
    """What others have set is set."""
    return bitmaps.Merge(daemon, args.node, args.target, named(args.bitmaps), so_far)


@command("block-dirty-bitmap-add")
def block_dirty_bitmap_add(daemon: Daemon, args: BlockDirtyBitmapAdd) -> None:
    """Record from now on which granules of a node are written."""
    alone(daemon, "bitmap", add, args)


@command("block-dirty-bitmap-remove")
def block_dirty_bitmap_remove(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Stop recording, and forget what was recorded; the one thing for an inconsistent bitmap."""
    alone(daemon, "bitmap", remove, args)


@command("block-dirty-bitmap-clear")
def block_dirty_bitmap_clear(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Forget what was recorded, and go on."""
    alone(daemon, "bitmap", clear, args)


@command("block-dirty-bitmap-enable")
def block_dirty_bitmap_enable(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Record writes (again)."""
    alone(daemon, "bitmap", enable, args)


@command("block-dirty-bitmap-disable")
def block_dirty_bitmap_disable(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Keep what was recorded, and record no more."""
    alone(daemon, "bitmap", disable, args)


@command("block-dirty-bitmap-merge")
def block_dirty_bitmap_merge(daemon: Daemon, args: BlockDirtyBitmapMerge) -> None:
    """Add what other bitmaps have recorded, of this node or of others of the same size."""
    alone(daemon, "bitmap", merge, args)


@command("x-debug-block-dirty-bitmap-sha256")
def block_dirty_bitmap_sha256(daemon: Daemon, args: BlockDirtyBitmap) -> Sha256:
    """The hash of the bits, as QEMU computes it: in whole words of 64."""
    _, bitmap = bitmaps.look_up(daemon, args.node, args.name)
    bits = bitmap.copy().bits.tobytes()
    return Sha256(hashlib.sha256(bits + bytes(max(-len(bits) % 8, 0 if bits else 8))).hexdigest())
