"""Where the tables of an image lie, so that no other byte is ever put there.

The header, the L1 and refcount tables, refcount blocks and L2 tables are noted when an image is
opened; for writing, also the snapshot table and all tables of internal snapshots. Two tables in one
place are damage: the image can still be read, and the first write to it marks it corrupt. Only an
L2 table may be named by several L1 entries if its refcount says so: each write copies it first.

The image's `meta` lock guards what is noted. While an image is opened, no other thread has it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING

from cowferry.drivers.qcow2 import snapshots
from cowferry.drivers.qcow2.refcounts import OFFSET, big_endian
from cowferry.errors import ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

MAX_INACTIVE = 256 << 20  # bytes of the snapshots' L1 tables, for an image that is to be written


def note(image: Qcow2) -> None:
    """Set `metadata`, `inactive_tables` and `overlap` of the image.

    Raises `OSError` if a table cannot be read, `ImageError` if there are too many."""
    h, cluster = image.header, image.cluster_size
    image.metadata = {0} | image.bitmap_clusters
    _table(image, "the L1 table", h.l1_offset, h.l1_size * 8)
    _table(image, "the refcount table", h.reftable_offset, h.reftable_clusters * cluster)
    if _many(image, "a refcount block", image.refcounts.table):
        image.overlap = image.overlap or "two entries of the refcount table name one block"
    shared = _many(image, "an L2 table", image.map.l1)
    if shared and not image.read_only and not all(_is_shared(image, s) for s in shared):
        image.overlap = image.overlap or "several L1 entries name one L2 table"
    if image.snapshots and not image.read_only:
        _note_snapshots(image)


def _many(image: Qcow2, name: str, entries: array[int]) -> list[int]:
    """Note tables of one cluster each, and return the offsets that are named several times.

    There may be millions, so that little work is done for each."""
    bits, mask, end = image.header.cluster_bits, image.cluster_size - 1, image.file.size
    named = [offset for entry in entries if (offset := entry & OFFSET)]
    found = {offset >> bits for offset in named if not offset & mask and offset < end}
    if not image.overlap and not image.metadata.isdisjoint(found):
        place = min(image.metadata & found) << bits
        image.overlap = f"{name} at host offset {place:#x} overlaps another table"
    image.metadata |= found
    if len(found) == len(named):
        return []
    return [o for o, n in Counter(named).items() if n > 1 and o >> bits in found]


def _is_shared(image: Qcow2, offset: int) -> bool:
    """Whether the refcount of an L2 table says that several entries name it."""
    refs, cluster = image.refcounts, offset >> image.header.cluster_bits
    index = cluster // refs.per_block
    if index >= len(refs.table) or refs.misplaced(refs.table[index] & OFFSET):
        return False
    return refs.get(cluster) > 1


def _note_snapshots(image: Qcow2) -> None:
    """Note the snapshot table, and the tables of the snapshots.

    These may share L2 tables with the active L1 table and with each other."""
    h = image.header
    _table(image, "the snapshot table", h.snapshots_offset, snapshots.table_size(image))
    tables: set[int] = set()
    seen: set[int] = set()
    left = MAX_INACTIVE
    for s in image.snapshots:
        if s.l1_offset in seen:
            image.overlap = image.overlap or "two snapshots have one L1 table"
            continue
        seen.add(s.l1_offset)
        left -= s.l1_size * 8
        if left < 0:
            raise ImageError(
                f"'{image.filename}': the L1 tables of its {len(image.snapshots)} internal "
                f"snapshots have more than {MAX_INACTIVE >> 20} MiB",
                "it can be read; delete snapshots (qemu-img snapshot -d) to write it",
            )
        _table(image, f"the L1 table of snapshot {s.id}", s.l1_offset, s.l1_size * 8)
        data = bytearray(s.l1_size * 8)
        image.file.pread(memoryview(data), s.l1_offset)
        tables.update(e & OFFSET for e in big_endian("Q", data))
    tables -= {entry & OFFSET for entry in image.map.l1} | {0}
    mask, end = h.cluster_size - 1, image.file.size
    image.inactive_tables = {offset for offset in tables if not offset & mask and offset < end}
    for offset in image.inactive_tables:
        _table(image, "an L2 table of a snapshot", offset, h.cluster_size)


def _table(image: Qcow2, name: str, offset: int, length: int) -> None:
    """Note a table. An offset at which none can lie is left to the use of the entry that has it."""
    bits = image.header.cluster_bits
    if not length or offset & ((1 << bits) - 1) or offset >= image.file.size:
        return
    clusters = range(offset >> bits, (offset + length + (1 << bits) - 1) >> bits)
    if not image.overlap and not image.metadata.isdisjoint(clusters):
        image.overlap = f"{name} at host offset {offset:#x} overlaps another table"
    image.metadata.update(clusters)
