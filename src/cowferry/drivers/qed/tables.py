"""The tables: L1 in memory, L2 in pages, and what an entry means.

An L2 table may be a gigabyte (16 clusters of 64 MiB), so it is never held whole. What is read,
kept and written are *pages* of it, of 64 KiB at most; they are numbered through all the tables, so
page `p` maps the guest clusters from `p * per_page` on.

An entry is the host offset of a cluster, 0 for one that is not allocated, 1 for one that reads as
zeroes. It is believed only if the cluster lies behind the header, within the file, and clear of
every table: then no guest can write where its own mapping lies.

Guarded by the image's `meta` lock, which the caller holds. Pages are written by the image's
ordered flush only; a dirty page is never dropped from memory.

Source: the specification, sections Tables and Data cluster offsets.
"""

from __future__ import annotations

import sys
import weakref
from array import array
from bisect import bisect_left
from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

from cowferry.block.node import Extent, State

if TYPE_CHECKING:
    from cowferry.drivers.qed.image import Qed

HOLE, ZERO = 0, 1  # entries that are no offsets
PAGE = 64 << 10  # bytes
CLEAN_BYTES = 4 << 20  # of unmodified pages kept in memory


def entries_of(data: bytes | bytearray) -> array[int]:
    """Little-endian words of the file as host integers."""
    out = array("Q")
    out.frombytes(data)
    if sys.byteorder == "big":
        out.byteswap()
    return out


def bytes_of(entries: array[int]) -> bytes:
    """The reverse."""
    if sys.byteorder == "big":
        entries = array("Q", entries)
        entries.byteswap()
    return entries.tobytes()


class Tables:
    """The L1 table of an image and the pages of its L2 tables."""

    def __init__(self, image: Qed) -> None:
        h = image.header
        # A weak one, so that an image that was let go goes at once, with its tables.
        self.image: Qed = weakref.proxy(image)
        self.bits = h.bits
        self.table_bytes = h.table_bytes
        self.page_bytes = min(PAGE, h.table_bytes)
        self.per_page = self.page_bytes // 8  # clusters
        self.pages_per_table = h.table_bytes // self.page_bytes
        self.l1 = self._read_l1(0, h.l1_entries)
        self.pages: OrderedDict[int, array[int]] = OrderedDict()
        self.dirty: set[int] = set()  # pages to write
        self.writing: set[int] = set()  # pages that a flush is writing: the file may be older
        self.l1_dirty: set[int] = set()  # L1 entries to write
        self.keep = max(CLEAN_BYTES // self.page_bytes, 4)
        good = [offset for offset in self.l1 if offset and self._fits(offset)]
        #: Host offsets of all tables, the L1 among them, ascending.
        self.starts = sorted([h.l1_offset, *good])
        #: Those that lie over each other: nobody knows whose the bytes are.
        self.clashing = {
            offset
            for pair in zip(self.starts, self.starts[1:], strict=False)
            if pair[1] - pair[0] < self.table_bytes
            for offset in pair
        }

    def _read_l1(self, first: int, count: int) -> array[int]:
        data = bytearray(8 * count)
        self.image.file.pread(memoryview(data), self.image.header.l1_offset + 8 * first)
        return entries_of(data)

    def _fits(self, offset: int) -> bool:
        return self.image.holds(offset, self.table_bytes)

    def table(self, index: int) -> int:
        """Host offset of L2 table `index`, 0 if there is none. Raises EIO for a bad entry."""
        offset = self.l1[index] if index < len(self.l1) else 0
        if offset and (not self._fits(offset) or offset in self.clashing):
            raise self.image.damaged(f"L2 table {index} has the invalid offset {offset:#x}")
        return offset

    def place(self, page: int) -> int:
        """Host offset of a page, 0 if its table is not allocated."""
        index, number = divmod(page, self.pages_per_table)
        offset = self.table(index)
        return offset and offset + number * self.page_bytes

    def page(self, number: int) -> array[int] | None:
        """The entries of a page, None if its table is not allocated."""
        found = self.pages.get(number)
        if found is not None:
            self.pages.move_to_end(number)
            return found
        offset = self.place(number)
        if not offset:
            return None
        data = bytearray(self.page_bytes)
        self.image.file.pread(memoryview(data), offset)
        entries = self.pages[number] = entries_of(data)
        unsafe = self.dirty | self.writing | {number}
        excess = len(self.pages) - self.keep - len(unsafe)
        if excess > 0:
            for old in list(islice((p for p in self.pages if p not in unsafe), excess)):
                del self.pages[old]
        return entries

    def for_writing(self, number: int) -> array[int]:
        """Return a page that is about to change, of a table that is made if need be.

        The file system has set blocks aside for what a flush will write. Raises `OSError` if there
        is no room; then no entry has changed."""
        index, within = divmod(number, self.pages_per_table)
        if number not in self.dirty:
            self.image.take_room_for_header()
            if self.table(index):
                self.image.file.take_room(self.place(number), self.page_bytes)
            else:
                self._new_table(index, within * self.page_bytes)
        entries = self.page(number)
        assert entries is not None
        self.dirty.add(number)
        return entries

    def _new_table(self, index: int, within: int) -> None:
        """At the end of the file, where nothing but zeroes has ever been. It is about to change at
        byte `within`."""
        image = self.image
        image.file.take_room(image.header.l1_offset + 8 * index, 8)
        offset = image.at_the_end(self.table_bytes >> self.bits)
        try:
            image.file.take_room(offset + within, self.page_bytes)
        except BaseException:
            image.give_back(offset, self.table_bytes >> self.bits)
            raise
        self.l1[index] = offset
        self.l1_dirty.add(index)
        self.starts.append(offset)

    def prepare(self, cluster: int, count: int) -> None:
        """Guest clusters `cluster, count` are about to be linked, and that will not fail for lack
        of room unless the file is copied by reflink meanwhile. Raises `OSError`."""
        for number in range(cluster // self.per_page, (cluster + count - 1) // self.per_page + 1):
            self.for_writing(number)

    # What entries mean -------------------------------------------------------------------

    def runs(self, offset: int, length: int) -> list[Extent]:
        """The extents of guest bytes `offset, length`, equal neighbours fused."""
        out: list[Extent] = []
        bits, end = self.bits, offset + length
        span = self.per_page << bits
        while offset < end:
            number = offset // span
            entries = self.page(number)
            if entries is None:  # nor have the other pages of this table
                table = span * self.pages_per_table
                stop = min(end, (offset // table + 1) * table)
                _add(out, Extent(stop - offset, State.HOLE))
            else:
                start = number * span
                stop = min(end, start + span)
                self._page_runs(out, entries, offset - start, stop - start)
            offset = stop
        return out

    def _page_runs(self, out: list[Extent], entries: array[int], start: int, stop: int) -> None:
        bits = self.bits
        size, last = 1 << bits, (stop - 1) >> bits
        fd, writable = self.image.data_fd, self.image.writable
        slot = start >> bits
        while slot <= last:
            entry, run = entries[slot], 1
            step = 0 if entry in (HOLE, ZERO) else size
            want = entry + step
            while slot + run <= last and entries[slot + run] == want:
                run += 1
                want += step
            at = max(slot << bits, start)
            length = min((slot + run) << bits, stop) - at
            if entry == HOLE:
                _add(out, Extent(length, State.HOLE))
            elif entry == ZERO:
                _add(out, Extent(length, State.ZERO))
            else:
                self._believe(entry, run << bits)
                host = entry + at - (slot << bits)
                _add(out, Extent(length, State.DATA, fd, host, writable))
            slot += run

    def _believe(self, host: int, length: int) -> None:
        """Raise EIO unless data can lie there."""
        if not self.image.holds(host, length):
            raise self.image.damaged(f"a cluster has the invalid offset {host:#x}")
        following = bisect_left(self.starts, host)
        before = self.starts[following - 1] + self.table_bytes if following else 0
        after = self.starts[following] if following < len(self.starts) else host + length
        if before > host or after < host + length:
            raise self.image.damaged(f"the cluster at {host:#x} lies in a table")

    # Changing entries --------------------------------------------------------------------

    def link(self, cluster: int, count: int, host: int) -> None:
        """Guest clusters `cluster, count` lie at `host` from now on: all of them, or none if this
        raises `OSError` for lack of room."""
        self.prepare(cluster, count)
        size = 1 << self.bits
        while count:
            number, slot = divmod(cluster, self.per_page)
            run = min(count, self.per_page - slot)
            entries = self.for_writing(number)
            entries[slot : slot + run] = array("Q", range(host, host + run * size, size))
            cluster, count, host = cluster + run, count - run, host + run * size

    def fill(self, cluster: int, count: int, entry: int) -> None:
        """`HOLE` or `ZERO` for all of guest clusters `cluster, count`."""
        while count:
            number, slot = divmod(cluster, self.per_page)
            run = min(count, self.per_page - slot)
            self.for_writing(number)[slot : slot + run] = array("Q", [entry]) * run
            cluster, count = cluster + run, count - run

    def grow(self, old: int, new: int) -> None:
        """The disk is about to have `new` clusters: what lies in the tables there is forgotten.

        There is nothing unless somebody put it there; no guest may come by it."""
        table = self.per_page * self.pages_per_table
        more = self._read_l1(len(self.l1), -(-new // table) - len(self.l1))
        for index, entry in enumerate(more, len(self.l1)):
            if entry:
                self.l1_dirty.add(index)
        at, stop = old, min(new, len(self.l1) * table)
        self.l1.extend(array("Q", bytes(8 * len(more))))
        while at < stop:
            number, slot = divmod(at, self.per_page)
            run = min(stop - at, self.per_page - slot)
            entries = self.page(number)
            if entries is None:
                return
            if any(entries[slot : slot + run]):
                self.fill(at, run, HOLE)
            at += run


def _add(out: list[Extent], e: Extent) -> None:
    if out:
        last = out[-1]
        if (
            last.state is e.state
            and last.fd == e.fd
            and (e.state is not State.DATA or last.host + last.length == e.host)
        ):
            out[-1] = last._replace(length=last.length + e.length)
            return
    out.append(e)
