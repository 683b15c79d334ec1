"""Refcounts: how many tables point to each cluster of the file, and room taken and given back.

In memory a refcount block is a typed array with one element per cluster, whatever its width
on disk (1 to 64 bits), so that a run of a thousand clusters is one slice. Blocks are loaded on
demand. Increments are visible here at once and reach the disk at the next flush, before any
table that relies on them (Q1). Decrements are never made directly: `release` puts them on a
list, and only after the tables that let go of the cluster are durable does `settle` carry them
out, so that nothing is handed out, or punched, while a crash could bring the old table back.

Everything here is guarded by the image's `meta` lock, which the caller holds.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

CODES = {0: "B", 1: "B", 2: "B", 3: "B", 4: "H", 5: "I", 6: "Q"}  # by refcount order
OFFSET = 0x00FFFFFFFFFFFE00
CLEAN_BLOCKS = 64  # kept in memory at the most


def swapped(values: array[int]) -> bytes:
    """Big-endian bytes of a typed array."""
    if sys.byteorder == "little":
        values = array(values.typecode, values)
        values.byteswap()
    return values.tobytes()


def big_endian(code: str, data: bytes | bytearray) -> array[int]:
    """The typed array that big-endian bytes hold."""
    values: array[int] = array(code)
    values.frombytes(data)
    if sys.byteorder == "little":
        values.byteswap()
    return values


class Refcounts:
    """The refcount structures of one image."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        h = image.header
        self.order = h.refcount_order
        self.cluster_bits = h.cluster_bits
        self.per_block = (h.cluster_size * 8) >> self.order
        self.max = (1 << (1 << self.order)) - 1
        data = bytearray(h.reftable_clusters << h.cluster_bits)
        image.file.pread(memoryview(data), h.reftable_offset)
        self.table = big_endian("Q", data)  # host offset of each block, 0: none
        self.table_offset = h.reftable_offset
        self.blocks: dict[int, array[int]] = {}
        self.dirty: set[int] = set()  # blocks to be written at the next flush
        self.writing: set[int] = set()  # blocks that a flush is writing: the file may be older
        self.new: set[int] = set()  # blocks whose entry in the table is not on disk
        self.moved = False  # the table itself has another place than on disk
        self.pending: list[tuple[int, int]] = []  # (cluster, count) to let go of, see `settle`
        self.hint = 0  # no cluster below it is free
        self.packed = 0  # byte behind the last piece that was packed; its cluster is in use
        size = image.file.size
        self.end = max((size + h.cluster_size - 1) >> self.cluster_bits, 1)
        if image.on_device:  # its end says nothing of what is in use
            self.end = self._last_used() + 1

    def _last_used(self) -> int:
        for index in range(len(self.table) - 1, -1, -1):
            block = self.block(index)
            if block is not None and any(block):
                return index * self.per_block + max(i for i, n in enumerate(block) if n)
        return 0

    def block(self, index: int) -> array[int] | None:
        """Refcount block `index`, or None if there is none. Raises EIO for a bad table entry."""
        found = self.blocks.get(index)
        if found is not None:
            return found
        if index >= len(self.table) or not self.table[index]:
            return None
        offset = self.table[index] & OFFSET
        if offset & ((1 << self.cluster_bits) - 1):
            raise self.image.damaged(f"refcount block {index} has the odd offset {offset:#x}")
        data = bytearray(1 << self.cluster_bits)
        self.image.file.pread(memoryview(data), offset)
        if self.order >= 3:
            found = big_endian(CODES[self.order], data)
        else:
            found = array("B", bytes(self.per_block))
            width, mask = 1 << self.order, (1 << (1 << self.order)) - 1
            for i in range(8 >> self.order):  # the lowest bits belong to the first cluster
                found[i :: 8 >> self.order] = array("B", [b >> i * width & mask for b in data])
        unsafe = self.dirty | self.writing
        if len(self.blocks) >= CLEAN_BLOCKS + len(unsafe):
            for old in list(self.blocks):
                if old not in unsafe:
                    del self.blocks[old]
                    break
        self.blocks[index] = found
        return found

    def encode(self, index: int) -> bytes:
        """The bytes of block `index` as they lie on disk."""
        block = self.blocks[index]
        if self.order >= 3:
            return swapped(block)
        width, step = 1 << self.order, 8 >> self.order
        out = bytearray(1 << self.cluster_bits)
        for i in range(step):
            part = block[i::step]
            for k, v in enumerate(part):
                if v:
                    out[k] |= v << i * width
        return bytes(out)

    def get(self, cluster: int) -> int:
        """The refcount of a host cluster."""
        block = self.block(cluster // self.per_block)
        return block[cluster % self.per_block] if block is not None else 0

    # Taking ------------------------------------------------------------------------------

    def allocate(self, count: int) -> tuple[int, int]:
        """Take up to `count` free clusters in a row: (first cluster, how many, at least one).

        Large requests go to the end of the file, where they stay in one piece."""
        if count < 8:
            for first, run in self._gaps():
                got = min(run, count)
                self._take(first, got)
                self.hint = first + got
                return first, got
        return self._tail(count)

    def _tail(self, count: int) -> tuple[int, int]:
        while self.block(self.end // self.per_block) is None:
            self._new_block(self.end // self.per_block)  # it lies at the end, and moves it
        first = self.end
        self._room_on_device(first + 1)
        count = min(count, self.per_block - first % self.per_block)
        if self.image.on_device:
            count = min(count, (self.image.file.size >> self.cluster_bits) - first)
        self._take(first, count)
        self.end = first + count
        return first, count

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Runs of free clusters below the end, from the hint on."""
        at = self.hint
        while at < self.end:
            index, within = divmod(at, self.per_block)
            block = self.block(index)
            stop = min(self.end - index * self.per_block, self.per_block)
            if block is None:
                # room without a block is not worth a new block: skip to the next
                at = (index + 1) * self.per_block
                continue
            try:
                i = block.index(0, within, stop)
            except ValueError:
                at = (index + 1) * self.per_block
                continue
            j = i + 1
            while j < stop and block[j] == 0 and j - i < 64:
                j += 1
            yield index * self.per_block + i, j - i
            at = index * self.per_block + j
        self.hint = self.end

    def contiguous(self, count: int) -> int:
        """Take exactly `count` clusters in a row (a table) at the end; returns the first."""
        while True:
            first = self.end
            blocks = range(first // self.per_block, (first + count - 1) // self.per_block + 1)
            missing = [b for b in blocks if self.block(b) is None]
            if not missing:
                break
            self._new_block(missing[0])
        self._room_on_device(first + count)
        self._take(first, count)
        self.end = first + count
        return first

    def _room_on_device(self, end: int) -> None:
        """A block device does not grow. Raises ENOSPC before anything is taken."""
        file = self.image.file
        if self.image.on_device and end << self.cluster_bits > file.size:
            raise OSError(errno.ENOSPC, f"{file.filename}: the device is full")

    def _take(self, first: int, count: int) -> None:
        self.image.check_overlap(first, count)
        while count:
            index, within = divmod(first, self.per_block)
            run = min(count, self.per_block - within)
            block = self.block(index)
            assert block is not None
            block[within : within + run] = array(block.typecode, [1]) * run
            self.dirty.add(index)
            first, count = first + run, count - run

    def _new_block(self, index: int) -> None:
        """A block for clusters that have none; it describes, and lies in, the room it opens.

        Nothing on disk points to it until the flush that writes it has been followed by one
        that writes the table."""
        if index >= len(self.table):
            self._grow_table(index)
        if self.block(index) is not None:
            return
        block = array(CODES[self.order], bytes(self.per_block * array(CODES[self.order]).itemsize))
        place = max(self.end, index * self.per_block)
        if place // self.per_block != index:
            place = index * self.per_block
        self.image.check_overlap(place, 1)
        self.blocks[index] = block
        self.table[index] = place << self.cluster_bits
        block[place % self.per_block] = 1
        self.image.metadata.add(place)
        self.dirty.add(index)
        self.new.add(index)
        self.end = max(self.end, place + 1)

    def _grow_table(self, index: int) -> None:
        """A larger table at the end of the file; the header follows at the next flush."""
        per_cluster = (1 << self.cluster_bits) // 8
        clusters = -(-(index + 1 + len(self.table) // 2 + per_cluster) // per_cluster)
        old, old_clusters = self.table_offset >> self.cluster_bits, len(self.table) // per_cluster
        if clusters << self.cluster_bits > 8 << 20:
            raise OSError(errno.EFBIG, f"{self.image.filename}: the refcount table is full")
        self.table.extend(array("Q", bytes(8 * (clusters * per_cluster - len(self.table)))))
        first = self.contiguous(clusters)
        self.image.metadata.update(range(first, first + clusters))
        self.table_offset = first << self.cluster_bits
        self.moved = True
        self.release(old, old_clusters)
        self.image.metadata.difference_update(range(old, old + old_clusters))

    def pack(self, length: int) -> int:
        """Take `length` bytes, at most a cluster, right behind what was packed last: their offset.

        A cluster counts every piece that touches it. If it cannot count one more (1 bit wide, say),
        or the piece does not fit and the next cluster is not to be had, another one is begun."""
        size = 1 << self.cluster_bits
        at, left = self.packed, -self.packed % size
        if left and self.get(at >> self.cluster_bits) == self.max:
            left = 0
        if left < length:
            first, _ = self.allocate(1)
            if not left or first << self.cluster_bits != at + left:
                at, left = first << self.cluster_bits, 0
        if left:
            self._share(at >> self.cluster_bits)
        self.packed = at + length
        return at

    def _share(self, cluster: int) -> None:
        """One more piece lies in a cluster that is in use."""
        block = self.block(cluster // self.per_block)
        assert block is not None
        block[cluster % self.per_block] += 1
        self.dirty.add(cluster // self.per_block)

    # Giving back -------------------------------------------------------------------------

    def release(self, first: int, count: int = 1) -> None:
        """A table lets go of clusters. They stay taken until that is durable."""
        if self.pending and sum(self.pending[-1]) == first:
            first, count = self.pending[-1][0], self.pending[-1][1] + count
            self.pending[-1] = (first, count)
        else:
            self.pending.append((first, count))

    def settle(self, gone: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Carry out releases that are durable. Returns the runs that nobody uses any more."""
        free: list[tuple[int, int]] = []
        for first, count in gone:
            for cluster in range(first, first + count):
                block = self.block(cluster // self.per_block)
                if block is None or not block[cluster % self.per_block]:
                    continue  # was wrong on disk already: check says so
                block[cluster % self.per_block] -= 1
                self.dirty.add(cluster // self.per_block)
                if not block[cluster % self.per_block]:
                    self.hint = min(self.hint, cluster)
                    if self.packed >> self.cluster_bits == cluster:
                        self.packed = 0  # it may be anybody's soon
                    if free and sum(free[-1]) == cluster:
                        free[-1] = (free[-1][0], free[-1][1] + 1)
                    else:
                        free.append((cluster, 1))
        return free

    def put(self, cluster: int, value: int) -> None:
        """Set a refcount outright (check -r)."""
        self.packed = 0
        index = cluster // self.per_block
        if self.block(index) is None:
            if not value:
                return
            self._new_block(index)
        block = self.block(index)
        assert block is not None
        block[cluster % self.per_block] = min(value, self.max)
        self.dirty.add(index)
