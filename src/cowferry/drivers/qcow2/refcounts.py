"""Refcounts: how many tables point to each cluster of the file, and room taken and given back.

In memory a refcount block is a typed array with one element per cluster, whatever its width
on disk (1 to 64 bits), so that a run of a thousand clusters is one slice. Blocks are loaded on
demand. Increments are visible here at once and reach the disk at the next flush, before any
table that relies on them (Q1). Decrements are never made directly: `release` puts them on a
list, and only after the tables that let go of the cluster are durable does `settle` carry them
out, so that no cluster is handed out, or punched, while a crash could bring the old table back.

**Where room comes from.** First from clusters that are free below the end (`free.py`), lowest
first, so that the file grows only when nothing is left to reuse. Then from the end. A range whose
clusters have no refcount block yet gets one, which lies in that range or, at the end, in front of
what is taken; if the refcount table has no entry left, a larger table is laid out with them.

**Room comes with the place.** On a file system that fills up, the flush must still find room for
the tables. So a cluster for a table, and a refcount block that is about to change, get their room
from the file system before anything relies on them. A failed call changes nothing.

The image's `meta` lock guards everything here, and the caller holds it.
"""

from __future__ import annotations

import errno
import logging
import sys
import weakref
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowferry.block.node import State
from cowferry.drivers.qcow2.free import FreeRuns

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

log = logging.getLogger(__name__)

CODES = {0: "B", 1: "B", 2: "B", 3: "B", 4: "H", 5: "I", 6: "Q"}  # by refcount order
OFFSET = 0x00FFFFFFFFFFFE00
CLEAN_BLOCKS = 64  # kept in memory at the most
MAX_TABLE = 8 << 20  # bytes of the refcount table; QEMU opens no larger one
SCAN = 4  # refcount blocks looked through for one allocation, while the file may grow
CRUMB = 1 << 20  # bytes; a large request takes no shorter run while little room is free
MANY = 4 << 20  # bytes; a request from this size on is large
ALL = 1 << 62  # of tables, or of refcount blocks


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
        # A weak one, so that an image that was let go goes at once, with its tables.
        self.image: Qcow2 = weakref.proxy(image)
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
        self.pending_clusters = 0
        self.leaving = False  # a flush is about to free what was pending
        self.freed = 0  # how often a flush has freed some
        self.packed = 0  # byte behind the last piece that was packed; its cluster is in use
        self.free = FreeRuns()
        self._roomy: set[int] = set()  # blocks that have their room in the file system
        self._ones: array[int] = array(CODES[self.order], [1]) * self.per_block
        # Clusters from `end` on are taken only if nothing below is free. The file's own end says
        # nothing about a device, and nothing beyond what the table can count.
        self.end = self._last_used() + 1
        filled = (image.file.size + h.cluster_size - 1) >> self.cluster_bits
        if not image.on_device:
            self.end = max(self.end, min(filled, len(self.table) * self.per_block))
        # No byte was ever written from this cluster on. A device may hold anything.
        self.untouched = max(filled, self.end) if not image.on_device else 1 << 62

    def _last_used(self) -> int:
        """The last cluster that a refcount block counts."""
        for index in self.filled_blocks():
            block = self.block(index)
            if block is not None and any(block):
                return index * self.per_block + max(i for i, n in enumerate(block) if n)
        return 0

    def filled_blocks(self) -> Iterator[int]:
        """Yield which blocks may count something, the last one first. A block that is named twice
        counts once, and one in a hole of the file counts nothing: neither is read."""
        seen: set[int] = set()
        file, size = self.image.file, 1 << self.cluster_bits
        for index in range(len(self.table) - 1, -1, -1):
            offset = self.table[index] & OFFSET
            if index in self.blocks:
                yield index
                continue
            if offset in seen or self.misplaced(offset):
                continue
            seen.add(offset)
            start = next(iter(file.extents(offset, size)), None)
            if start is None or start.state is not State.ZERO or start.length < size:
                yield index

    def used(self, index: int) -> int:
        """Return how many clusters of a block are counted. Raises as `block` does."""
        block = self.block(index)
        return len(block) - block.count(0) if block is not None else 0

    def misplaced(self, offset: int) -> bool:
        """Whether no refcount block can lie at `offset`."""
        odd = offset & ((1 << self.cluster_bits) - 1)
        return not offset or bool(odd) or offset >= self.image.file.size

    def block(self, index: int) -> array[int] | None:
        """Refcount block `index`, or None if there is none. Raises EIO for a bad table entry."""
        found = self.blocks.get(index)
        if found is not None:
            return found
        if index >= len(self.table) or not self.table[index]:
            return None
        offset = self.table[index] & OFFSET
        if self.misplaced(offset):
            raise self.image.damaged(f"refcount block {index} has the invalid offset {offset:#x}")
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

    def sole(self, first: int, count: int) -> bool:
        """Whether each of the clusters is counted exactly once."""
        while count:
            index, within = divmod(first, self.per_block)
            run = min(count, self.per_block - within)
            block = self.block(index)
            if block is None or block[within : within + run] != self._ones[:run]:
                return False
            first, count = first + run, count - run
        return True

    # Taking ------------------------------------------------------------------------------

    def allocate(self, count: int) -> tuple[int, int]:
        """Take up to `count` free clusters in a row: (first cluster, how many, at least one).

        Raises ENOSPC if a device has none, and what the file system says; then nothing changed."""
        self._find(count)
        found = None if self._only_crumbs(count) and self._grows() else self.free.take(count)
        if found is None:
            return self._extend(count)
        try:
            self._take(*found)
        except BaseException:
            self.free.add(*found)
            raise
        return found

    def contiguous(self, count: int) -> int:
        """Take exactly `count` clusters in a row, with their room, for a table: the first of them.

        Raises as `allocate` does."""
        self._find(count)
        first = self.free.take_exactly(count)
        if first is None:
            return self._extend(count, table=True)[0]
        try:
            self.image.take_room(first << self.cluster_bits, count << self.cluster_bits)
            self._take(first, count)
        except BaseException:
            self.free.add(first, count)
            raise
        return first

    def _only_crumbs(self, count: int) -> bool:
        """Whether a large request would be cut into small pieces for the sake of little room.

        Up to an eighth of the file may lie unused for that."""
        free, bits = self.free, self.cluster_bits
        if count << bits < MANY or free.full or free.largest << bits >= CRUMB:
            return False
        return free.total < self.end >> 3

    def forget_free(self) -> None:
        """Look for free clusters anew: counts below were changed by other means."""
        self.free = FreeRuns()
        self.packed = 0

    def _grows(self) -> bool:
        """Whether there is room at the end, without asking the file system."""
        need = (self.end + 1) << self.cluster_bits
        return not self.image.on_device or need <= self._device(need)

    def _device(self, need: int) -> int:
        """The bytes that the device has. If they are fewer than `need`, it may have grown."""
        file = self.image.file
        return file.size if file.size >= need else file.refresh_size()

    def _find(self, count: int) -> None:
        """Look through refcount blocks until `free` has `count` clusters in a row, or all is seen.

        While the file may grow, one call looks through a few blocks only."""
        free = self.free
        if free.frontier >= self.end or free.has(count):
            return
        grows = self._grows()
        survey = self.image.survey
        if not survey.done and not survey.advance(*(() if grows else (ALL,))):
            return
        blocks = SCAN if grows else ALL
        while blocks and free.frontier < self.end and not free.full and not free.has(count):
            try:
                self._scan()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                return  # no room for a refcount block: the runs that are known have to do
            blocks -= 1

    def _scan(self) -> None:
        """Put the free clusters of one refcount block on the list, from the frontier on."""
        start = self.free.frontier
        index = start // self.per_block
        stop = min((index + 1) * self.per_block, self.end)
        if self.block(index) is None:
            self._open_range(index, start, stop)
        block = self.block(index)
        self.free.frontier = stop
        if block is None:
            return
        base = index * self.per_block
        at, last = start - base, stop - base
        withheld = self.image.survey.withheld
        while at < last:
            try:
                at = block.index(0, at, last)
            except ValueError:
                return
            begin = at
            while at < last and not block[at] and base + at not in withheld:
                at += 1
            if at > begin:
                self.free.add(base + begin, at - begin)
            if self.free.frontier < stop:
                return  # the list is full
            if at < last and not block[at]:
                at += 1  # withheld

    def _open_range(self, index: int, start: int, stop: int) -> None:
        """Give a block to clusters below the end that have none. It lies among them."""
        if index >= len(self.table):
            return
        withheld = self.image.survey.withheld
        place = next((c for c in range(start, stop) if c not in withheld), None)
        if place is None:
            return
        self.image.check_overlap(place, 1)
        self.image.take_room(place << self.cluster_bits, 1 << self.cluster_bits)
        self._add_block(index, place)
        self._count(place, 1)

    def _extend(self, count: int, table: bool = False) -> tuple[int, int]:
        """Take clusters at the end, with the refcount blocks and the larger table they need.

        For a `table` exactly `count`, with their room; else up to `count`, at least one."""
        if not table:
            count = min(count, self.per_block)
        start = self._clear_end(count)
        blocks: list[int] = []
        rooms = 0  # clusters of a larger refcount table
        while True:  # each round needs at least what the one before did, so it ends
            first = start + rooms + len(blocks)
            if self.image.on_device:
                need_to = (first + count) << self.cluster_bits
                fit = (self._device(need_to) >> self.cluster_bits) - first
                if fit < 1 or (table and fit < count):
                    name = self.image.file.filename
                    raise OSError(errno.ENOSPC, f"{name}: the device is full")
                count = min(count, fit)
            last = (first + count - 1) // self.per_block
            need = [i for i in range(start // self.per_block, last + 1) if not self._has_block(i)]
            larger = self._larger_table(last) if last >= len(self.table) else 0
            if len(need) <= len(blocks) and larger <= rooms:
                break
            blocks, rooms = need, max(rooms, larger)
        tables = rooms + len(blocks) + (count if table else 0)
        self.image.check_overlap(start, first + count - start)
        if tables:
            self.image.take_room(start << self.cluster_bits, tables << self.cluster_bits)
        self._ready(start, first + count - start)
        if rooms:
            self._move_table(start, rooms)
        for number, index in enumerate(blocks):
            self._add_block(index, start + rooms + number)
        self._count(start, first + count - start)
        self.end = first + count
        self.untouched = max(self.untouched, self.end)
        if self.free.frontier >= start:
            self.free.frontier = self.end
        return first, count

    def _clear_end(self, count: int) -> int:
        """The first cluster from `end` on that no withheld cluster follows too soon."""
        withheld = self.image.survey.withheld
        beyond = max((c for c in withheld if self.end <= c < self.end + 4 * count + 64), default=-1)
        return max(self.end, beyond + 1)

    def _has_block(self, index: int) -> bool:
        return index < len(self.table) and bool(self.table[index])

    def _larger_table(self, index: int) -> int:
        """How many clusters a refcount table with an entry `index` has, and with some to spare."""
        per_cluster = (1 << self.cluster_bits) // 8
        most = MAX_TABLE >> self.cluster_bits
        least = index // per_cluster + 1
        if least > most:
            name = self.image.filename
            raise OSError(errno.EFBIG, f"{name}: the refcount table is full; use larger clusters")
        wanted = -(-(index + 1 + len(self.table) // 2 + per_cluster) // per_cluster)
        return max(least, min(wanted, most))

    def _move_table(self, first: int, clusters: int) -> None:
        """A larger refcount table lies at `first`; the header follows at the next flush."""
        per_cluster = (1 << self.cluster_bits) // 8
        old, old_clusters = self.table_offset >> self.cluster_bits, len(self.table) // per_cluster
        self.table.extend(array("Q", bytes(8 * (clusters * per_cluster - len(self.table)))))
        self.image.metadata.update(range(first, first + clusters))
        self.table_offset = first << self.cluster_bits
        self.moved = True
        self.release(old, old_clusters)

    def _add_block(self, index: int, place: int) -> None:
        """An empty refcount block `index` lies at cluster `place`.

        Nothing on disk points to it until the flush that writes it has been followed by one
        that writes the table."""
        code = CODES[self.order]
        self.blocks[index] = array(code, bytes(self.per_block * array(code).itemsize))
        self.table[index] = place << self.cluster_bits
        self.image.metadata.add(place)
        self.dirty.add(index)
        self.new.add(index)
        self._roomy.add(index)

    def _take(self, first: int, count: int) -> None:
        """Count free clusters that have refcount blocks once. Raises before anything changes."""
        self.image.check_overlap(first, count)
        self._ready(first, count)
        self._count(first, count)
        self.untouched = max(self.untouched, first + count)

    def _ready(self, first: int, count: int) -> None:
        """Have room in the file system for the blocks that count these clusters, if they exist."""
        for index in range(first // self.per_block, (first + count - 1) // self.per_block + 1):
            if index not in self._roomy and self.block(index) is not None:
                self.image.take_room(self.table[index] & OFFSET, 1 << self.cluster_bits)
                self._roomy.add(index)

    def _count(self, first: int, count: int) -> None:
        while count:
            index, within = divmod(first, self.per_block)
            run = min(count, self.per_block - within)
            block = self.block(index)
            assert block is not None
            block[within : within + run] = self._ones[:run]
            self.dirty.add(index)
            first, count = first + run, count - run

    def pack(self, length: int) -> int:
        """Take `length` bytes, at most a cluster, right behind what was packed last: their offset.

        A cluster counts every piece that touches it. If it cannot count one more (1 bit wide, say),
        or the piece does not fit and the next cluster is not to be had, another one is begun."""
        size = 1 << self.cluster_bits
        at, left = self.packed, -self.packed % size
        if left and self.get(at >> self.cluster_bits) == self.max:
            left = 0
        if left:
            self._ready(at >> self.cluster_bits, 1)
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
        self.pending_clusters += count
        if self.pending and sum(self.pending[-1]) == first:
            first, count = self.pending[-1][0], self.pending[-1][1] + count
            self.pending[-1] = (first, count)
        else:
            self.pending.append((first, count))

    def take_pending(self) -> list[tuple[int, int]]:
        """Return what was released and not settled. The caller ends with `settle_pending`, or with
        `put_back_pending`."""
        gone, self.pending, self.pending_clusters = self.pending, [], 0
        self.leaving = bool(gone)
        return gone

    def settle_pending(self, gone: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """End `take_pending`: the change that let go of them is durable. See `settle`."""
        self.leaving = False
        free = self.settle(gone)
        self.freed += bool(free)
        return free

    def put_back_pending(self, gone: list[tuple[int, int]]) -> None:
        """Undo `take_pending`: the change that let go of them is not durable."""
        self.leaving = False
        self.pending = gone + self.pending
        self.pending_clusters += sum(count for _, count in gone)

    def settle(self, gone: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Carry out releases that are durable. Returns the runs that nothing uses any more.

        Where a refcount block cannot be changed (unreadable, or no room for it) its clusters leak:
        they stay counted, and `check` finds them."""
        free: list[tuple[int, int]] = []
        for first, count in gone:
            for cluster in range(first, first + count):
                index, within = divmod(cluster, self.per_block)
                try:
                    block = self.block(index)
                    if block is None or not block[within]:
                        continue  # was wrong on disk already: check says so
                    self._ready(cluster, 1)
                except OSError as error:
                    log.warning("%s: cluster %d leaks: %s", self.image.filename, cluster, error)
                    continue
                block[within] -= 1
                self.dirty.add(index)
                if not block[within]:
                    if self.packed >> self.cluster_bits == cluster:
                        self.packed = 0  # another owner may take it soon
                    if free and sum(free[-1]) == cluster:
                        free[-1] = (free[-1][0], free[-1][1] + 1)
                    else:
                        free.append((cluster, 1))
        for first, count in free:
            self.image.metadata.difference_update(range(first, first + count))
            self.free.add(first, count)
        return free

    def put(self, cluster: int, value: int) -> None:
        """Set the refcount of a cluster that has a refcount block outright (check -r)."""
        index = cluster // self.per_block
        block = self.block(index)
        if block is None:
            if not value:
                return
            raise OSError(errno.EIO, f"{self.image.filename}: cluster {cluster} has no refcount")
        block[cluster % self.per_block] = min(value, self.max)
        self.dirty.add(index)
