"""The cluster map: L1 and L2 tables in memory, and what an entry means.

An L2 table is held as one typed array of host-endian words, so that a thousand clusters in a
row are linked, scanned or compared as one slice. With extended L2 entries (subclusters) each
cluster has two words: the entry, and a bitmap whose low half says which of its 32 subclusters
are allocated and whose high half which read as zeroes.

Guarded by the image's `meta` lock, which the caller holds. Tables are written by the
image's ordered flush only; a dirty table is never dropped from memory.
"""

from __future__ import annotations

import weakref
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowferry.block.node import Extent, State
from cowferry.drivers.qcow2.refcounts import OFFSET, big_endian

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

COPIED = 1 << 63  # refcount is exactly one: may be written in place
COMPRESSED = 1 << 62
ZERO_FLAG = 1
SUBCLUSTERS = 32
ALL = (1 << SUBCLUSTERS) - 1
CLEAN_BYTES = 4 << 20  # of unmodified tables kept in memory


class Map:
    """The active L1 table and its L2 tables."""

    def __init__(self, image: Qcow2) -> None:
        # A weak one, so that an image that was let go goes at once, with its tables.
        self.image: Qcow2 = weakref.proxy(image)
        h = image.header
        self.bits = h.cluster_bits
        self.words = 2 if h.extended_l2 else 1  # per cluster
        self.per_table = h.l2_entries
        self.compressed_shift = 62 - (self.bits - 8)  # below it the offset, above it the sectors
        data = bytearray(h.l1_size * 8)
        image.file.pread(memoryview(data), h.l1_offset)
        self.l1 = big_endian("Q", data)
        self.l1_offset = h.l1_offset
        self.tables: OrderedDict[int, array[int]] = OrderedDict()  # by L1 index
        self.dirty: set[int] = set()  # tables to write
        self.writing: set[int] = set()  # tables that a flush is writing: the file may be older
        self.l1_dirty: set[int] = set()  # L1 entries to write
        self.keep = max(CLEAN_BYTES >> self.bits, 4)
        self._roomy: set[int] = set()  # tables that may be written in place: checked, with room

    def offset(self, index: int) -> int:
        """Host offset of L2 table `index`, 0 if there is none. Raises EIO for a bad entry."""
        if index >= len(self.l1):
            return 0
        offset = self.l1[index] & OFFSET
        if offset & ((1 << self.bits) - 1):
            raise self.image.damaged(f"L2 table {index} has the odd offset {offset:#x}")
        return offset

    def table(self, index: int) -> array[int] | None:
        """L2 table `index`, None if its clusters are all unallocated."""
        found = self.tables.get(index)
        if found is not None:
            self.tables.move_to_end(index)
            return found
        offset = self.offset(index)
        return self._keep(index, self.load(offset)) if offset else None

    def peek(self, index: int) -> array[int] | None:
        """L2 table `index`, without keeping it in memory; None if there is none."""
        offset = self.offset(index)
        return self.tables.get(index) or (self.load(offset) if offset else None)

    def load(self, offset: int) -> array[int]:
        """The L2 table at a host offset. Raises `OSError`, also if the file ends before it."""
        if offset >= self.image.file.size:
            raise self.image.damaged(f"the L2 table at {offset:#x} lies beyond the end of the file")
        data = bytearray(1 << self.bits)
        self.image.file.pread(memoryview(data), offset)
        return big_endian("Q", data)

    def _keep(self, index: int, table: array[int]) -> array[int]:
        self.tables[index] = table
        unsafe = self.dirty | self.writing
        if len(self.tables) > self.keep + len(unsafe):
            for old in self.tables:
                if old not in unsafe and old != index:
                    del self.tables[old]
                    break
        return table

    def prepare(self, cluster: int, count: int = 1) -> None:
        """Have tables of our own, with their room, for guest clusters that are to be linked.

        After that `link` finds all it needs. Raises `OSError`; no guest byte changes either way."""
        for index in range(cluster // self.per_table, (cluster + count - 1) // self.per_table + 1):
            self.for_writing(index)

    def for_writing(self, index: int) -> array[int]:
        """L2 table `index`, ours alone, with its room, and about to change; made or copied first
        if need be. Raises `OSError`; then nothing changed."""
        image, refs = self.image, self.image.refcounts
        table = self.table(index)
        entry = self.l1[index]
        old = entry & OFFSET
        # A flag that contradicts the refcount may hide that a snapshot has the table, too.
        if table is not None and entry & COPIED and refs.get(old >> self.bits) <= 1:
            if index not in self._roomy:
                image.take_room(old, 1 << self.bits)
                self._roomy.add(index)
        else:
            image.take_room(self.l1_offset + 8 * index // 512 * 512, 512)
            first = refs.contiguous(1)
            image.metadata.add(first)
            if table is None:
                table = self._keep(index, array("Q", bytes(1 << self.bits)))
            if old:  # a snapshot has it too: copy on write, and our share of it goes
                refs.release(old >> self.bits)
            self.l1[index] = first << self.bits | COPIED
            self.l1_dirty.add(index)
            self._roomy.add(index)
        self.dirty.add(index)
        return table

    def entry(self, cluster: int) -> tuple[int, int]:
        """Return (entry, subcluster bitmap) of a guest cluster; bitmap 0 without extended L2.

        Raises EIO, and the image is marked corrupt, if the entry cannot be right."""
        index, slot = divmod(cluster, self.per_table)
        table = self.table(index)
        if table is None:
            return 0, 0
        if self.words == 1:
            entry, bitmap = table[slot], 0
        else:
            entry, bitmap = table[2 * slot], table[2 * slot + 1]
        if entry or bitmap:
            self._check(cluster, entry, bitmap)
        return entry, bitmap

    def _check(self, cluster: int, entry: int, bitmap: int = 0) -> None:
        """Raise EIO if the entry of a guest cluster cannot be right."""
        if entry & COMPRESSED:
            return
        host, external = entry & OFFSET, self.image.external
        if host & ((1 << self.bits) - 1):
            wrong = f"has the odd host offset {host:#x}"
        elif external and (host or entry & COPIED) and host != cluster << self.bits:
            wrong = f"lies at another offset, {host:#x}, of the external data file"
        elif entry & ZERO_FLAG and self.image.header.version < 3:
            wrong = "is flagged as zero, which version 2 does not have"
        elif bitmap & ALL & (bitmap >> SUBCLUSTERS):
            wrong = "has subclusters that are both allocated and zero"
        elif bitmap & ALL and not (host or (external and entry & COPIED)):
            wrong = "has allocated subclusters, but no host offset"
        else:
            return
        raise self.image.damaged(f"the cluster at guest offset {cluster << self.bits} {wrong}")

    def kept_places(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(length, host offset or 0) of the pieces of guest bytes that are zero: a cluster that was
        zeroed may keep its place."""
        size, end = 1 << self.bits, offset + length
        while offset < end:
            index, slot = divmod(offset >> self.bits, self.per_table)
            stop = min(end, (index + 1) * self.per_table << self.bits)
            last = slot + ((stop - 1) >> self.bits) - (offset >> self.bits) + 1
            table = self.table(index)
            words = (
                [] if table is None else table[slot * self.words : last * self.words : self.words]
            )
            if not any(entry & OFFSET for entry in words):
                yield stop - offset, 0
                offset = stop
            for entry in words if offset < stop else ():
                n = min(size - offset % size, stop - offset)
                host = entry & OFFSET
                yield n, host + offset % size if host else 0
                offset += n

    # What entries mean -------------------------------------------------------------------

    def runs(self, offset: int, length: int) -> list[Extent]:
        """The extents of guest bytes `offset, length`, equal neighbours fused."""
        out: list[Extent] = []
        span = self.per_table << self.bits
        end = offset + length
        while offset < end:
            index = offset // span
            stop = min(end, (index + 1) * span)
            table = self.table(index)
            if table is None:
                _add(out, Extent(stop - offset, State.HOLE))
            elif self.words == 1:
                self._plain(out, table, offset - index * span, stop - index * span, index)
            else:
                self._extended(out, table, offset - index * span, stop - index * span, index)
            offset = stop
        return out

    def _plain(
        self, out: list[Extent], table: array[int], start: int, stop: int, index: int
    ) -> None:
        bits = self.bits
        size, mask = 1 << bits, (1 << bits) - 1
        first, last = start >> bits, (stop - 1) >> bits
        fd, writable = self.image.data_fd, self.image.leasable
        external = self.image.external
        slot = first
        while slot <= last:
            entry = table[slot]
            run = 1
            host = entry & OFFSET
            if entry & COMPRESSED:
                e = Extent(size, State.DATA, compressed=True)
            elif entry & ZERO_FLAG:
                if self.image.header.version < 3:
                    self._check(index * self.per_table + slot, entry)
                while slot + run <= last and table[slot + run] == entry:
                    run += 1
                e = Extent(run << bits, State.ZERO)
            elif not host and not (external and entry & COPIED):
                while slot + run <= last and table[slot + run] == entry:
                    run += 1
                e = Extent(run << bits, State.HOLE)
            else:
                if host & mask or external:
                    self._check(index * self.per_table + slot, entry)
                want = entry + size
                while slot + run <= last and table[slot + run] == want:
                    run += 1
                    want += size
                ours = writable and bool(entry & COPIED) and self.ours(host >> bits, run)
                e = Extent(run << bits, State.DATA, fd, host, ours)
            at = slot << bits
            lead, tail = max(start - at, 0), max(at + e.length - stop, 0)
            if lead or tail:
                host = e.host + lead if e.state is State.DATA and not e.compressed else 0
                e = e._replace(length=e.length - lead - tail, host=host)
            _add(out, e)
            slot += run

    def _extended(
        self, out: list[Extent], table: array[int], start: int, stop: int, index: int
    ) -> None:
        bits = self.bits
        sub = bits - 5
        fd, writable = self.image.data_fd, self.image.leasable
        at = start
        while at < stop:
            slot = at >> bits
            entry, bitmap = table[2 * slot], table[2 * slot + 1]
            edge = min(stop, (slot + 1) << bits)
            host = entry & OFFSET
            if entry & COMPRESSED:
                _add(out, Extent(edge - at, State.DATA, compressed=True))
                at = edge
                continue
            if entry or bitmap:
                self._check(index * self.per_table + slot, entry, bitmap)
            ours = writable and bool(entry & COPIED) and self.ours(host >> bits, 1)
            while at < edge:
                if bitmap in (0, ALL, ALL << SUBCLUSTERS):
                    run = edge - at
                else:
                    run = min(((at >> sub) + 1) << sub, edge) - at
                i = (at >> sub) & (SUBCLUSTERS - 1)
                if bitmap >> (SUBCLUSTERS + i) & 1:
                    e = Extent(run, State.ZERO)
                elif bitmap >> i & 1:
                    place = host + (at & ((1 << bits) - 1))
                    e = Extent(run, State.DATA, fd, place, ours)
                else:
                    e = Extent(run, State.HOLE)
                _add(out, e)
                at += run

    def ours(self, first: int, count: int) -> bool:
        """Whether host clusters that entries call COPIED may be written in place: the refcounts
        agree, and none of them holds a table."""
        image = self.image
        if image.external:
            return True
        return image.refcounts.sole(first, count) and image.metadata.isdisjoint(
            range(first, first + count)
        )

    def host_clusters(self, entry: int) -> range:
        """The host clusters that an entry points to, if it does.

        Raises EIO, and the image is marked corrupt, where that cannot be guest data: at an odd
        offset, or where a table lies. Such a cluster must be neither written nor given back."""
        image = self.image
        if entry & COMPRESSED:
            first, last = self.compressed_clusters(entry)
            found = range(first, last + 1)
        elif not entry & OFFSET or image.external:
            return range(0)
        else:
            if entry & OFFSET & ((1 << self.bits) - 1):
                raise image.damaged(f"an L2 entry has the odd host offset {entry & OFFSET:#x}")
            found = range((entry & OFFSET) >> self.bits, ((entry & OFFSET) >> self.bits) + 1)
        if not image.metadata.isdisjoint(found):
            raise image.damaged(
                f"an L2 entry points to host offset {found[0] << self.bits:#x}, where a table lies"
            )
        return found

    def compressed_place(self, entry: int) -> tuple[int, int]:
        """(host offset, bytes at most) of a compressed cluster."""
        offset = entry & ((1 << self.compressed_shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> self.compressed_shift
        return offset, (sectors + 1) * 512 - offset % 512

    def compressed_clusters(self, entry: int) -> tuple[int, int]:
        """First and last host cluster that a compressed cluster touches."""
        offset, length = self.compressed_place(entry)
        return offset >> self.bits, (offset + length - 1) >> self.bits

    # Changing entries --------------------------------------------------------------------

    def link(self, cluster: int, count: int, host: int) -> None:
        """Guest clusters `cluster, count` lie at `host` from now on, whole and ours.

        Raises `OSError`; then nothing changed."""
        size = 1 << self.bits
        steps: list[tuple[array[int], int, int, list[range]]] = []
        at, left = cluster, count
        while left:
            index, slot = divmod(at, self.per_table)
            run = min(left, self.per_table - slot)
            table = self.for_writing(index)
            words = table[slot * self.words : (slot + run) * self.words : self.words]
            steps.append((table, slot, run, self._gone(words)))
            at, left = at + run, left - run
        for table, slot, run, gone in steps:
            first = host | COPIED
            fresh = array("Q", range(first, first + run * size, size))
            if self.words == 1:
                table[slot : slot + run] = fresh
            else:
                table[2 * slot : 2 * (slot + run) : 2] = fresh
                table[2 * slot + 1 : 2 * (slot + run) : 2] = array("Q", [ALL]) * run
            self._let_go(gone)
            host += run * size

    def set(self, cluster: int, entry: int, bitmap: int = 0) -> None:
        """Change one entry; what the old one pointed to, and the new one does not, is let go.

        Raises `OSError`; then nothing changed."""
        index, slot = divmod(cluster, self.per_table)
        table = self.for_writing(index)
        at = slot * self.words
        old = table[at]
        gone: list[range] = []
        if old & COMPRESSED or old & OFFSET != entry & OFFSET:
            gone = [self.host_clusters(old)]
        table[at] = entry
        if self.words == 2:
            table[at + 1] = bitmap
        self._let_go(gone)

    def _gone(self, old: array[int]) -> list[range]:
        """The host clusters that these entries point to."""
        if old.count(0) == len(old):
            return []
        return [self.host_clusters(entry) for entry in old if entry & (COMPRESSED | OFFSET)]

    def _let_go(self, gone: list[range]) -> None:
        """Our share of these goes, once the change is durable."""
        for clusters in gone:
            if clusters:
                self.image.refcounts.release(clusters[0], len(clusters))

    def walk(self) -> Iterator[int]:
        """The L1 indexes that have a table."""
        for index in range(len(self.l1)):
            if self.l1[index] & OFFSET:
                yield index


def _add(out: list[Extent], e: Extent) -> None:
    if e.length <= 0:
        return
    if out:
        last = out[-1]
        if (
            last.state is e.state
            and last.fd == e.fd
            and last.writable == e.writable
            and not (last.compressed or e.compressed)
            and (e.state is not State.DATA or last.host + last.length == e.host)
        ):
            out[-1] = last._replace(length=last.length + e.length)
            return
    out.append(e)
