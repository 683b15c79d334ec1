"""Dirty bitmaps: add, remove, clear, enable, disable, merge; each is an action of transactions,
too."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import msgspec

from cowferry.block import keeper, moves
from cowferry.block.bitmap import Bitmap
from cowferry.block.node import Node, chain
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
        so_far,
        args.node,
        args.name,
        granularity=args.granularity,
        persistent=args.persistent,
        disabled=args.disabled,
    )


@action("block-dirty-bitmap-remove")
def remove(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Remove:
    """No such bitmap."""
    return bitmaps.Remove(so_far, args.node, args.name)


@action("block-dirty-bitmap-clear")
def clear(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Clear:
    """Nothing is dirty."""
    return bitmaps.Clear(so_far, args.node, args.name)


@action("block-dirty-bitmap-enable")
def enable(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Record:
    """Writes are recorded."""
    return bitmaps.Record(so_far, args.node, args.name, True)


@action("block-dirty-bitmap-disable")
def disable(daemon: Daemon, args: BlockDirtyBitmap, so_far: Transaction) -> bitmaps.Record:
    """Writes are not recorded."""
    return bitmaps.Record(so_far, args.node, args.name, False)


@action("block-dirty-bitmap-merge")
def merge(daemon: Daemon, args: BlockDirtyBitmapMerge, so_far: Transaction) -> bitmaps.Merge:
    """What others have set is set."""
    return bitmaps.Merge(so_far, args.node, args.target, named(args.bitmaps))


@command("block-dirty-bitmap-add")
def block_dirty_bitmap_add(daemon: Daemon, args: BlockDirtyBitmapAdd) -> None:
    """Record from now on which granules of a node are written."""
    alone(daemon, f"making of bitmap '{args.name}'", add, args)


@command("block-dirty-bitmap-remove")
def block_dirty_bitmap_remove(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Stop recording, and forget what was recorded; the one thing for an inconsistent bitmap."""
    alone(daemon, f"removal of bitmap '{args.name}'", remove, args)


@command("block-dirty-bitmap-clear")
def block_dirty_bitmap_clear(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Forget what was recorded, and go on."""
    alone(daemon, f"clearing of bitmap '{args.name}'", clear, args)


@command("block-dirty-bitmap-enable")
def block_dirty_bitmap_enable(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Record writes (again)."""
    alone(daemon, f"enabling of bitmap '{args.name}'", enable, args)


@command("block-dirty-bitmap-disable")
def block_dirty_bitmap_disable(daemon: Daemon, args: BlockDirtyBitmap) -> None:
    """Keep what was recorded, and record no more."""
    alone(daemon, f"disabling of bitmap '{args.name}'", disable, args)


@command("block-dirty-bitmap-merge")
def block_dirty_bitmap_merge(daemon: Daemon, args: BlockDirtyBitmapMerge) -> None:
    """Add what other bitmaps have recorded, of this node or of others of the same size."""
    alone(daemon, f"merge into bitmap '{args.target}'", merge, args)


@command("x-debug-block-dirty-bitmap-sha256", locked=False)
def block_dirty_bitmap_sha256(daemon: Daemon, args: BlockDirtyBitmap) -> Sha256:
    """The hash of the bits, as QEMU computes it: in whole words of 64."""
    _, bitmap = bitmaps.look_up(daemon, args.node, args.name)
    bits = bitmap.copy().bits.tobytes()
    return Sha256(hashlib.sha256(bits + bytes(max(-len(bits) % 8, 0 if bits else 8))).hexdigest())


class QueryBitmaps(Args):
    device: str | None = None


@command("x-query-bitmaps", locked=False)
def query_bitmaps(daemon: Daemon, args: QueryBitmaps) -> list[dict[str, Any]]:
    """Every bitmap of a disk's chain, top first, or of all nodes: where it is kept, who uses it."""
    if args.device is None:
        nodes = [n for n in daemon.graph.every_node() if not n.filter]
    else:
        nodes = [bitmaps.unfiltered(n) for n in chain(daemon.graph.disk(args.device).root)]
    return [described(n, b) for n in nodes for b in n.bitmaps.values()]


def described(node: Node, bitmap: Bitmap) -> dict[str, Any]:
    """A BlockDirtyInfo, and what a person wants to know besides."""
    out: dict[str, Any] = {"node-name": node.name, "filename": node.filename, "size": bitmap.size}
    out |= bitmap.info()
    if bitmap.persistent:
        inside = node.stores_bitmaps
        out["kept-in"] = node.filename if inside else moves.place(node.filename, keeper.SUFFIX)
    if bitmap.busy:
        out["used-by"] = bitmap.busy
    if bitmap.inconsistent:
        out["reason"] = bitmap.reason
    return out


class QueryBitmapExtents(BlockDirtyBitmap):
    offset: int = 0
    limit: int = 4096


class BitmapExtent(msgspec.Struct):
    offset: int
    length: int


class BitmapExtents(msgspec.Struct, omit_defaults=True):
    extents: list[BitmapExtent]
    next: int | None = None


@command("x-query-bitmap-extents", locked=False)
def query_bitmap_extents(daemon: Daemon, args: QueryBitmapExtents) -> BitmapExtents:
    """The dirty runs of a bitmap in bytes from `offset` on; `next` is where to ask for more."""
    if args.offset < 0 or not 1 <= args.limit <= 4096:
        raise CowferryError("Parameter 'limit' expects 1 to 4096, and 'offset' no negative number")
    node, bitmap = bitmaps.look_up(daemon, args.node, args.name)
    if bitmap.inconsistent:
        bitmaps.check_usable(node, bitmap)
    runs = [BitmapExtent(*run) for run in itertools.islice(bitmap.runs(args.offset), args.limit)]
    more = runs[-1].offset + runs[-1].length if len(runs) == args.limit else None
    return BitmapExtents(runs, more)
