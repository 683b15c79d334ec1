"""The cluster map: L1 and L2 tables in memory, and what an entry means.

An L2 table is held as one typed array of host-endian words, so that a thousand clusters in a
row are linked, scanned or compared as one slice. With extended L2 entries (subclusters) each
cluster has two words: the entry, and a bitmap whose low half says which of its 32 subclusters
are allocated and whose high half which read as zeroes.

Guarded by the image's `meta` lock, which the caller holds. Tables are written by the
image's ordered flush only; a dirty table is never dropped from memory.
"""

from __future__ import annotations

import errno
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
        self.image = image
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
        if not offset:
            return None
        data = bytearray(1 << self.bits)
        self.image.file.pread(memoryview(data), offset)
        return self._keep(index, big_endian("Q", data))

    def _keep(self, index: int, table: array[int]) -> array[int]:
        self.tables[index] = table
        unsafe = self.dirty | self.writing
        if len(self.tables) > self.keep + len(unsafe):
            for old in self.tables:
                if old not in unsafe and old != index:
                    del self.tables[old]
                    break
        return table

    def for_writing(self, index: int) -> array[int]:
        """L2 table `index`, ours alone and about to change; made or copied if need be."""
        image = self.image
        table = self.table(index)
        entry = self.l1[index]
        if table is None or not entry & COPIED:
            first = image.refcounts.contiguous(1)
            image.metadata.add(first)
            old = entry & OFFSET
            if table is None:
                table = self._keep(index, array("Q", bytes(1 << self.bits)))
            if old:  # a snapshot has it too: copy on write, and our share of it goes
                image.refcounts.release(old >> self.bits)
            self.l1[index] = first << self.bits | COPIED
            self.l1_dirty.add(index)
        self.dirty.add(index)
        return table

    def entry(self, cluster: int) -> tuple[int, int]:
        """(entry, subcluster bitmap) of a guest cluster; bitmap 0 without extended L2."""
        index, slot = divmod(cluster, self.per_table)
        table = self.table(index)
        if table is None:
            return 0, 0
        if self.words == 1:
            return table[slot], 0
        return table[2 * slot], table[2 * slot + 1]

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
            elif entry & ZERO_FLAG and self.image.header.version >= 3:
                while slot + run <= last and table[slot + run] == entry:
                    run += 1
                e = Extent(run << bits, State.ZERO)
            elif not host and not (external and entry & COPIED):
                while slot + run <= last and table[slot + run] == entry:
                    run += 1
                e = Extent(run << bits, State.HOLE)
            else:
                if host & mask:
                    raise self.image.damaged(
                        f"the cluster at guest offset {(index * self.per_table + slot) << bits} "
                        f"has the odd host offset {host:#x}"
                    )
                want = entry + size
                while slot + run <= last and table[slot + run] == want:
                    run += 1
                    want += size
                e = Extent(run << bits, State.DATA, fd, host, writable and bool(entry & COPIED))
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
            if host & ((1 << bits) - 1) or bitmap & ALL & (bitmap >> SUBCLUSTERS):
                raise self.image.damaged(
                    f"the entry of the cluster at guest offset "
                    f"{(index * self.per_table + slot) << bits} is invalid"
                )
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
                    e = Extent(run, State.DATA, fd, place, writable and bool(entry & COPIED))
                else:
                    e = Extent(run, State.HOLE)
                _add(out, e)
                at += run

    def release_data(self, entry: int) -> None:
        """Our share of what an entry pointed to goes (once the change is durable)."""
        image = self.image
        if entry & COMPRESSED:
            first, last = self.compressed_clusters(entry)
            image.refcounts.release(first, last - first + 1)
        elif entry & OFFSET and not image.external:
            image.refcounts.release((entry & OFFSET) >> self.bits)

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
        """Guest clusters `cluster, count` lie at `host` from now on, whole and ours."""
        size = 1 << self.bits
        while count:
            index, slot = divmod(cluster, self.per_table)
            run = min(count, self.per_table - slot)
            table = self.for_writing(index)
            first = host | COPIED
            fresh = array("Q", range(first, first + run * size, size))
            if self.words == 1:
                self._let_go(table[slot : slot + run])
                table[slot : slot + run] = fresh
            else:
                at = slice(2 * slot, 2 * (slot + run), 2)
                self._let_go(table[at])
                table[at] = fresh
                table[2 * slot + 1 : 2 * (slot + run) : 2] = array("Q", [ALL]) * run
            cluster, count, host = cluster + run, count - run, host + run * size

    def set(self, cluster: int, entry: int, bitmap: int = 0) -> None:
        """One entry; what the old one pointed to, and the new one does not, is let go."""
        index, slot = divmod(cluster, self.per_table)
        table = self.for_writing(index)
        at = slot * self.words
        old = table[at]
        if old & COMPRESSED or old & OFFSET != entry & OFFSET:
            self.release_data(old)
        table[at] = entry
        if self.words == 2:
            table[at + 1] = bitmap

    def _let_go(self, old: array[int]) -> None:
        if old.count(0) == len(old):
            return
        for entry in old:
            if entry & (COMPRESSED | OFFSET):
                self.release_data(entry)

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


def no_decompressor(name: str) -> OSError:
    """The error for a compression type whose library is not installed."""
    return OSError(
        errno.EOPNOTSUPP,
        f"{name}: zstd clusters need the package backports.zstd (pip install 'cowferry[zstd]')",
    )
