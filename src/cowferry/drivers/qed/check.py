"""Checking an image: each cluster belongs to one owner at most, and lies in the file.

An entry that points nowhere, or to what has an owner already, is a *corruption*. A cluster without
an owner is a *leak*: room lost, nothing worse.

What can be mended: `crash` drops entries that point beyond the end of the file, which is what a
writer leaves that crashed before the file had grown (it had promised nothing yet); `all` drops
those that can be no place at all, too. Where two entries point to one cluster nobody can tell whose
it is: that stays, and a reader gets what is there. Leaks at the end of the file are cut off, but
not by a repair that drops an entry to which they may have belonged. Others stay, because the format
has no list of free room.

Tables may be large and files sparse, so only what is no hole is read. Source: the specification,
section Consistency checking.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from bitarray import bitarray
from bitarray.util import zeros

from cowferry.block.node import State
from cowferry.drivers.qed.tables import HOLE, PAGE, ZERO, Tables, entries_of
from cowferry.drivers.result import Notes, Result
from cowferry.errors import ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qed.image import Qed

MOST_CLUSTERS = 1 << 30  # of a file that can be checked


class Wrong:
    """Entries that can be dropped. There may be millions: nothing but numbers is kept of them."""

    def __init__(self) -> None:
        self.roots: array[int] = array("Q")  # indexes in the L1 table
        self.clusters: array[int] = array("Q")  # guest clusters


class Walk:
    """One look at all tables as they are in the file."""

    def __init__(self, image: Qed) -> None:
        self.image = image
        self.bits = image.header.bits
        self.clusters = image.whole >> self.bits
        if self.clusters > MOST_CLUSTERS:
            raise ImageError(
                f"'{image.filename}': a file of {image.whole} bytes is too large to be checked",
                f"it may have {MOST_CLUSTERS} clusters; nothing was changed",
            )
        self.used: bitarray = zeros(self.clusters)
        self.beyond = Wrong()  # they point beyond the end of the file
        self.absurd = Wrong()  # or to what can be no place
        self.notes = Notes()
        self.result = Result(total_clusters=-(-image.size >> self.bits))
        self._last = -1  # host offset of the data cluster before
        self._own(0, image.header.header_bytes)
        self._own(image.header.l1_offset, image.header.table_bytes)
        tables = image.tables.l1
        sound = [index for index, offset in enumerate(tables) if offset and self._table(index)]
        for index in sound:
            for first, entries in self._entries(tables[index]):
                self._data(index * image.header.entries + first, entries)
        self.result.leaks = self.clusters - self.used.count()
        self.result.messages = self.notes.lines

    def _own(self, host: int, length: int) -> bool:
        """The clusters have an owner now. False if one of them had before."""
        part = slice(host >> self.bits, (host + length) >> self.bits)
        free = not self.used[part].any()
        if free:
            self.used[part] = 1
        return free

    def _bad(self, text: str) -> None:
        self.result.corruptions += 1
        self.notes.add(f"ERROR {text}")

    def _wrong(self, host: int) -> Wrong:
        image = self.image
        place = not host % image.cluster_size and host >= image.header.header_bytes
        return self.beyond if place else self.absurd

    def _table(self, index: int) -> bool:
        """Whether an L2 table lies where one can, and nowhere else."""
        image, offset = self.image, self.image.tables.l1[index]
        length = image.header.table_bytes
        if not image.holds(offset, length):
            self._bad(f"L2 table {index} has the invalid offset {offset:#x}")
            self._wrong(offset).roots.append(index)
        elif not self._own(offset, length) or offset in image.tables.clashing:
            self._bad(f"L2 table {index} at {offset:#x} lies over another table")
        else:
            return True
        return False

    def _entries(self, offset: int) -> Iterator[tuple[int, array[int]]]:
        """(first slot, entries) of those parts of a table that are no holes in the file."""
        at = offset
        for e in self.image.file.extents(offset, self.image.header.table_bytes):
            for piece in range(at, at + e.length, PAGE) if e.state is State.DATA else ():
                data = bytearray(min(PAGE, at + e.length - piece))
                self.image.file.pread(memoryview(data), piece)
                if any(data):
                    yield (piece - offset) // 8, entries_of(data)
            at += e.length

    def _data(self, cluster: int, entries: array[int]) -> None:
        size, count = 1 << self.bits, len(entries)
        slot = 0
        while slot < count:
            host, run = entries[slot], 1
            if host in (HOLE, ZERO):
                slot += 1
                continue
            while slot + run < count and entries[slot + run] == host + run * size:
                run += 1
            if self.image.holds(host, run * size) and self._own(host, run * size):
                self._count(host, run)
            else:
                for n in range(run):
                    self._one(cluster + slot + n, host + n * size)
            slot += run

    def _one(self, cluster: int, host: int) -> None:
        where = f"the cluster at guest offset {cluster << self.bits}"
        if not self.image.holds(host, 1 << self.bits):
            self._bad(f"{where} has the invalid offset {host:#x}")
            self._wrong(host).clusters.append(cluster)
        elif not self._own(host, 1 << self.bits):
            self._bad(f"{where} lies at {host:#x}, where something else lies, too")
        else:
            self._count(host, 1)

    def _count(self, host: int, clusters: int) -> None:
        self.result.allocated_clusters += clusters
        if self._last >= 0 and host != self._last + (1 << self.bits):
            self.result.fragmented_clusters += 1
        self._last = host + (clusters - 1 << self.bits)


def check(image: Qed, fix: Literal["crash", "leaks", "all"] | None = None) -> Result:
    """Check, and mend if asked and open for writing. Not while anybody writes.

    An image without corruptions is marked clean if it was to be mended. Raises `OSError` if it
    cannot be read, `ImageError` if it is too large."""
    if not image.read_only:
        image.flush()
    walk = Walk(image)
    result = walk.result
    if fix is None:
        return result
    drop = {"leaks": (), "crash": (walk.beyond,), "all": (walk.beyond, walk.absurd)}[fix]
    lost = False  # whether clusters at the end may belong to what is dropped
    if any(wrong.roots or wrong.clusters for wrong in drop):
        for wrong in drop:
            _drop(image, wrong)
            lost = lost or bool(wrong.roots) or (wrong is walk.absurd and bool(wrong.clusters))
        dropped = sum(len(wrong.roots) + len(wrong.clusters) for wrong in drop)
        result.repairs = (f"Repairing: {dropped} table entries with invalid offsets are cleared",)
        walk = Walk(image)
        result.corruptions_fixed = result.corruptions - walk.result.corruptions
        result.corruptions, result.leaks = walk.result.corruptions, walk.result.leaks
        result.left = walk.result.messages
    image.broken = bool(result.corruptions)
    if not image.broken and not lost:
        end = walk.used.find(1, right=True) + 1
        result.leaks_fixed = walk.clusters - end
        result.leaks -= result.leaks_fixed
        with image.meta:
            if end << walk.bits < image.file.size:
                image.cut_off(end << walk.bits)
    elif lost:
        result.repairs += (
            "Clusters that look leaked are left alone, because they may belong to the cleared "
            "entries; another repair gives back those at the end of the file",
        )
    if not image.broken:
        image.mark_clean()
    return result


def _drop(image: Qed, wrong: Wrong) -> None:
    """The clusters are not allocated, durably."""
    with image.meta:
        tables = image.tables
        for index in wrong.roots:
            tables.l1[index] = 0
        tables.l1_dirty.update(wrong.roots)
    for cluster in wrong.clusters:
        with image.meta:
            tables.fill(cluster, 1, HOLE)
        image.bound_dirty()
    image.flush()
    with image.meta:
        image.tables = Tables(image)
