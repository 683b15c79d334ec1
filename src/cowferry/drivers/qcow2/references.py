"""What the tables of an image point to, counted for each cluster of the file.

The file is read as it lies on disk, and no number in it is believed before it is checked: `check`
must get through images that others damaged or made up. Time and memory follow what the tables
hold. An L2 table that is named a thousand times is read once, and counts a thousand times; a table
in a hole of the file is not read at all.

**Which table is believed.** Two structures may claim one cluster. The one that matters more for the
guest is counted first, and the later one is reported: header, active L1 table, its L2 tables,
snapshots, bitmaps, guest data. The refcount structures come last, because they can be rebuilt
(`stored.py`).

**Lost tables.** If a table cannot be followed (it lies at an odd offset, beyond the end of the
file, or over another table), what it names is unknown. Then `lost` says why, and a repair must
neither give back clusters that look unused, nor write into them. A table that is mostly wrong was
hardly meant to be one, and is not written either.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from cowferry.block.node import State
from cowferry.drivers.qcow2 import bitmap_directory, snapshots
from cowferry.drivers.qcow2.bitmap_directory import Entry
from cowferry.drivers.qcow2.clusters import ALL, COMPRESSED, COPIED, SUBCLUSTERS, ZERO_FLAG
from cowferry.drivers.qcow2.counts import Counts
from cowferry.drivers.qcow2.refcounts import OFFSET, big_endian
from cowferry.drivers.result import Notes, Result
from cowferry.errors import ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

PAGE = 256  # clusters that are counted together
PIECE = 64 << 10  # bytes of a table that are looked at together
JUNK = 4  # wrong entries, at least, of what looks like no table
REACH = 16  # references so many times beyond the end of the file are counted
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE

HEADER, L1, SNAPSHOTS, INACTIVE_L1, DIRECTORY, BITMAP = range(1, 7)  # BITMAP + n: the n-th bitmap
ROLES = {
    HEADER: "the header",
    L1: "the active L1 table",
    SNAPSHOTS: "the snapshot table",
    INACTIVE_L1: "the L1 table of a snapshot",
    DIRECTORY: "the bitmap directory",
}


class Root(NamedTuple):
    """An L1 entry that is not zero. `number` is None in the table of a snapshot."""

    position: int  # of the entry in the file
    entry: int
    by: int  # how many L1 tables it is part of
    number: int | None


class Run(NamedTuple):
    """L2 entries in a row whose clusters lie in a row, too; or one compressed entry."""

    slot: int
    clusters: int
    entry: int  # the first


class References:
    """The references that were found, and what is wrong with the tables that make them."""

    def __init__(self, image: Qcow2) -> None:
        h = image.header
        self.image, self.file, self.bits = image, image.file, h.cluster_bits
        self.cluster_size = h.cluster_size
        self.words = 2 if h.extended_l2 else 1
        self._needed = -(-h.size // (h.cluster_size * h.l2_entries))  # entries of the L1 table
        self.clusters = -(-image.file.size >> h.cluster_bits)  # in the file
        self.per_block = (h.cluster_size * 8) >> h.refcount_order
        page = min(PAGE, self.per_block)
        self.counts = Counts(page)
        self.roles = Counts(page)  # of tables, other than L2 and the refcount structures
        self.tables = Counts(page)  # of L2 tables: how many L1 entries name them
        self.blank = Counts(page)  # of these, those that are all zero
        self.clashing: set[int] = set()  # tables that lie over something else: never written
        self.notes = Notes()
        self.result = Result(total_clusters=-(-h.size // h.cluster_size))
        self.lost = ""
        # What can be corrected without doubt: where in the file, and the value.
        self.edits: tuple[array[int], array[int]] = (array("Q"), array("Q"))
        self.bitmaps: list[Entry] = []
        self.bad_bitmaps: dict[int, str] = {}  # number in the directory -> what is wrong
        self.bitmap_problem = ""  # of the directory itself
        self.stray_snapshot_table = False  # the header has an invalid place, and no snapshots
        self.incomplete_snapshots = 0  # entries without the extra data that version 3 demands
        self.inactive: dict[int, list[int]] = {}  # L1 offset -> entries, one number per snapshot
        self._sectors = 62 - (self.bits - 8)  # the bit of a compressed entry where their number is
        self._reach = REACH * self.clusters
        self._beyond = 0  # guest clusters beyond the end of the file
        self._last = -1  # host offset of the guest cluster before, for the fragmentation
        self._count_all()

    # What is wrong -------------------------------------------------------------------------

    def bad(self, text: str, count: int = 1) -> None:
        """Count corruptions, with one message."""
        self.result.corruptions += count
        self.notes.add(f"ERROR {text}", count)

    def _bad_end(self, what: str, cluster: int, count: int = 1) -> None:
        more = f", with {count - 1} behind it," if count > 1 else ""
        self.bad(f"{what}{more} lies beyond the end of the file", count)
        self._beyond += count * (cluster < self._reach)

    def _lose(self, text: str) -> None:
        self.bad(text)
        self.lost = self.lost or text

    def _unreadable(self, what: str, error: OSError) -> None:
        self.result.check_errors += 1
        self.notes.add(f"ERROR {what} cannot be read: {error.strerror or error}")
        self.lost = self.lost or f"{what} cannot be read"

    def role(self, cluster: int) -> str:
        """Return what lies in a cluster, in words."""
        found = self.roles[cluster]
        if found >= BITMAP:
            return f"bitmap '{self.bitmaps[found - BITMAP].shown}'"
        return ROLES.get(found, "an L2 table")

    # Everything in its order ---------------------------------------------------------------

    def _count_all(self) -> None:
        h = self.image.header
        self.counts.add(0)
        self.roles.add(0, 1, HEADER)
        self._l1 = self._region("the active L1 table", L1, h.l1_offset, h.l1_size * 8)
        self._name_tables(active=True)
        self._count_snapshots()
        self._name_tables(active=False)
        self._count_bitmaps()
        for cluster, by, index in self.each_table():
            self._count_table(cluster, by, index)

    def _region(self, what: str, role: int, offset: int, length: int) -> bool:
        """Count a table that lies in a row. False if it cannot be followed."""
        if not length:
            return True
        if not offset or offset & (self.cluster_size - 1):
            self._lose(f"{what} has the invalid offset {offset:#x}")
            return False
        first = offset >> self.bits
        count = (length + self.cluster_size - 1) >> self.bits
        beyond = first + count - self.clusters
        if beyond > 0:
            self._lose(f"{what} at {offset:#x} lies beyond the end of the file")
        over = self._clash(first, count)
        if over:
            self._lose(f"{what} at {offset:#x} lies over {over}")
        else:
            self.roles.add(first, count, role)
        self._count(first, count)
        return not over and beyond < count

    def _over(self, first: int, count: int = 1) -> str:
        """Return what table lies in these clusters, in words; empty if none does."""
        for kind in (self.roles, self.tables):
            for cluster in kind.used(first, count):
                return self.role(cluster)
        return ""

    def _clash(self, first: int, count: int = 1) -> str:
        """Note that something else lies in these clusters, and return what `_over` does.

        A table that lies there is not written any more, and a bitmap not believed."""
        over = self._over(first, count)
        if over:
            for kind in (self.roles, self.tables):
                for cluster in kind.used(first, count):
                    self.clashing.add(cluster)
                    number = self.roles[cluster] - BITMAP
                    if number >= 0:
                        self.bad_bitmaps.setdefault(number, "something else lies over it")
        return over

    def _count(self, first: int, count: int = 1, by: int = 1) -> None:
        """Count references, also beyond the end of the file, or room that is in use might be handed
        out when the file grows again; but not to where such a file never can have been."""
        count = min(count, self._reach - first)
        if count > 0:
            self.counts.add(first, count, by)

    # L1 tables -----------------------------------------------------------------------------

    def roots(self, active: bool | None = None) -> Iterator[Root]:
        """Yield L1 entries, those of the active table first; or of one kind only."""
        h = self.image.header
        if self._l1 and active is not False:
            for index, word in self.words_at(h.l1_offset, h.l1_size):
                yield Root(h.l1_offset + 8 * index, word, 1, index)
        if active is True:
            return
        for offset, sizes in self.inactive.items():
            by = len(sizes)
            for index, word in self.words_at(offset, sizes[-1]):
                while sizes[len(sizes) - by] <= index:
                    by -= 1
                yield Root(offset + 8 * index, word, by, None)

    def words_at(self, offset: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (index, word) of each word that is not zero. Holes of the file are not read."""
        for at, length in self._filled(offset, count * 8):
            data = self._read(at, length)
            if data is not None:
                first = (at - offset) // 8
                for i, word in enumerate(big_endian("Q", data)):
                    if word:
                        yield first + i, word

    def data_at(self, offset: int, length: int) -> bytearray | None:
        """Return bytes of the file, None if all are zero. What cannot be read is reported."""
        filled = list(self._filled(offset, length, length))
        return self._read(offset, length) if filled else None

    def _filled(self, offset: int, length: int, most: int = PIECE) -> Iterator[tuple[int, int]]:
        """Yield (offset, bytes) of what is no hole, in pieces; multiples of 8 bytes."""
        if offset >= self.file.size:
            return
        try:
            done = 0  # a file that ends inside a word has extents that do, too
            for e in self.file.extents(offset, length):
                if e.state is not State.ZERO:
                    start = max(offset // 8 * 8, done)
                    done = max(-(-(offset + e.length) // 8) * 8, start)
                    for at in range(start, done, most):
                        yield at, min(most, done - at)
                offset += e.length
        except OSError as error:
            self._unreadable(f"the table at {offset:#x}", error)

    def _read(self, offset: int, length: int) -> bytearray | None:
        data = bytearray(length)
        try:
            self.file.pread(memoryview(data), offset)
        except OSError as error:
            self._unreadable(f"the table at {offset:#x}", error)
            return None
        return data if any(data) else None

    def _name_tables(self, active: bool) -> None:
        """Count the L2 tables that are named, and look at each entry that names one."""
        words, wrong = Counter[int](), Counter[int]()  # by cluster of the L1 tables
        for root in self.roots(active):
            here = root.position >> self.bits
            words[here] += 1
            wrong[here] += not self._name_table(root)
        for here, number in wrong.items():
            if number >= JUNK and number * 2 > words[here]:
                self.clashing.add(here)
                at = here << self.bits
                self._lose(f"the L1 table at {at:#x} is probably no table: most entries are wrong")

    def _name_table(self, root: Root) -> bool:
        """Count the L2 table that an entry names. Return whether all is well with the entry."""
        where = "of a snapshot " if root.number is None else f"{root.number} "
        place, cluster = root.entry & OFFSET, (root.entry & OFFSET) >> self.bits
        reserved = root.entry & L1_RESERVED
        if not place:  # it reads as if it were 0
            self.bad(f"L1 entry {where}has flags, and no table: {root.entry:#x}")
            if root.number is None or root.number < self._needed:
                self._edit(root.position, 0)
            return False
        if reserved:
            self.bad(f"L1 entry {where}has reserved bits set: {root.entry:#x}")
        if place & (self.cluster_size - 1) or cluster >= self.clusters:
            if place & (self.cluster_size - 1):
                self._lose(f"L2 table {where}has the odd offset {place:#x}")
            else:
                self._lose(f"L2 table {where}at {place:#x} lies beyond the end of the file")
                self._count(cluster, 1, root.by)
            if root.number is None:  # this may be no L1 table at all
                self.clashing.add(root.position >> self.bits)
            return False
        self._count(cluster, 1, root.by)
        if self.roles[cluster]:
            self.clashing.add(cluster)
            self._lose(f"L2 table {where}at {place:#x} lies over {self.role(cluster)}")
            return False
        self.tables.add(cluster, 1, root.by)
        if reserved:
            self._edit(root.position, root.entry & ~reserved)
        return not reserved

    def each_table(self) -> Iterator[tuple[int, int, int | None]]:
        """Yield each L2 table once: its cluster, how often it is named, its index in the active L1
        table or None."""
        seen: set[int] = set()
        for root in self.roots():
            cluster = (root.entry & OFFSET) >> self.bits
            if root.entry & OFFSET & (self.cluster_size - 1) or cluster >= self.clusters:
                continue
            by = self.tables[cluster]
            if by > 1:
                if cluster in seen:
                    continue
                seen.add(cluster)
            if by:
                yield cluster, by, root.number

    def _edit(self, position: int, value: int) -> None:
        self.edits[0].append(position)
        self.edits[1].append(value)

    # Snapshots and bitmaps -----------------------------------------------------------------

    def _count_snapshots(self) -> None:
        h = self.image.header
        if not h.nb_snapshots:
            if h.snapshots_offset & (self.cluster_size - 1) or h.snapshots_offset >> 62:
                self.stray_snapshot_table = True
                self.bad(f"the snapshot table has the invalid offset {h.snapshots_offset:#x}")
            return
        try:
            table = snapshots.scan(self.image)
        except OSError as error:
            self._unreadable("the snapshot table", error)
            return
        for problem in table.problems:
            self._lose(problem)
        if not table.size:
            return
        self._region("the snapshot table", SNAPSHOTS, h.snapshots_offset, table.size)
        span = h.cluster_size * h.l2_entries
        by_offset: dict[int, list[int]] = {}
        for number, s in enumerate(table.snapshots):
            if h.version >= 3 and not s.complete:
                self.bad(f"the entry of snapshot {number} is incomplete: it has no disk size")
                self.incomplete_snapshots += 1
            if s.disk_size is not None and s.l1_size < -(-s.disk_size // span):
                self._lose(f"the L1 table of snapshot {number} is too small for its disk")
            if s.l1_size:
                by_offset.setdefault(s.l1_offset, []).append(s.l1_size)
        for offset, sizes in sorted(by_offset.items()):
            sizes.sort()
            whole = sizes[-1] * 8
            if not self._region("the L1 table of a snapshot", INACTIVE_L1, offset, whole):
                continue
            self.inactive[offset] = sizes
            before = 0  # further snapshots that have the same table, or the beginning of it
            for by in range(len(sizes) - 1, 0, -1):
                end = (sizes[-1 - by] * 8 + self.cluster_size - 1) >> self.bits
                if end > before:
                    self._count((offset >> self.bits) + before, end - before, by)
                    before = end

    def _count_bitmaps(self) -> None:
        """Count each cluster of bitmaps, also of those that are damaged, and note which are."""
        try:
            found = bitmap_directory.look(self.image)
        except ImageError as error:
            self.bitmap_problem = error.desc
            self.bad(error.desc)
            return
        except OSError as error:
            self._unreadable("the bitmap directory", error)
            return
        if found.problem:
            self.bitmap_problem = found.problem
            self.bad(found.problem)
        if not found.size:
            return
        first = found.offset >> self.bits
        count = (found.size + self.cluster_size - 1) >> self.bits
        self._count(first, count)
        over = self._clash(first, count)
        if over:
            self.bitmap_problem = f"the bitmap directory lies over {over}"
            self.bad(self.bitmap_problem)
            return
        self.roles.add(first, count, DIRECTORY)
        self.bitmaps = found.entries
        for number, entry in enumerate(found.entries):
            if entry.flaw:
                self._bad_bitmap(number, entry, entry.flaw)
            offset, length = entry.table_offset, entry.table_size
            sound = offset and not offset & (self.cluster_size - 1)
            if not sound or length << self.bits > bitmap_directory.MAX_BYTES:
                continue
            self._count_bits(number, entry, offset, length * 8)
            for _, word in self.words_at(offset, length):
                if word != bitmap_directory.ALL_ONES:
                    self._count_bits(number, entry, word, self.cluster_size)

    def _count_bits(self, number: int, entry: Entry, offset: int, length: int) -> None:
        first, count = offset >> self.bits, (length + self.cluster_size - 1) >> self.bits
        if offset & (self.cluster_size - 1) or offset & ~OFFSET or first + count > self.clusters:
            self._bad_bitmap(number, entry, f"it has the invalid offset {offset:#x}")
            return
        self._count(first, count)
        over = self._over(first, count)
        if over:
            self._bad_bitmap(number, entry, f"it lies over {over} at {offset:#x}")
        else:
            self.roles.add(first, count, BITMAP + number)

    def _bad_bitmap(self, number: int, entry: Entry, why: str) -> None:
        if number not in self.bad_bitmaps:
            self.bad_bitmaps[number] = why
            self.bad(f"bitmap '{entry.shown}' is damaged: {why}")

    # L2 tables -----------------------------------------------------------------------------

    def table(self, cluster: int) -> array[int] | None:
        """Return the L2 table in a cluster, None if all of it is zero."""
        data = self.data_at(cluster << self.bits, self.cluster_size)
        return big_endian("Q", data) if data is not None else None

    def runs(self, table: array[int]) -> Iterator[Run]:
        """Yield the entries of an L2 table that point to host clusters, fused where they can be."""
        size = self.cluster_size
        first = count = 0
        want = -1  # no entry is negative
        entries = table if self.words == 1 else table[::2]
        for slot, entry in enumerate(entries):
            if entry == want:
                count += 1
                want += size
                continue
            if count:
                yield Run(first, count, entries[first])
                count, want = 0, -1
            if entry & ~ZERO_FLAG:
                if entry & COMPRESSED:
                    yield Run(slot, 1, entry)
                else:
                    first, count, want = slot, 1, entry + size
        if count:
            yield Run(first, count, entries[first])

    def _count_table(self, cluster: int, by: int, index: int | None) -> None:
        table = self.table(cluster)
        if table is None:
            self.blank.add(cluster)
            return
        at = cluster << self.bits
        before = self._doubtful
        notes, self.notes = self.notes, Notes()
        self._count_entries(table, at, by, index)
        mine, self.notes = self.notes, notes
        wrong = self._doubtful - before
        least = JUNK if index is None or index < self._needed else 1
        if wrong < least or wrong * 2 <= len(table) - table.count(0):
            notes.extend(mine)
            return
        self.clashing.add(cluster)
        where = "of a snapshot" if index is None else str(index)
        self._lose(f"L2 table {where} at {at:#x} is probably no table: most entries are wrong")

    @property
    def _doubtful(self) -> int:
        """How many entries are wrong, and do not just show that the file was cut short."""
        return self.result.corruptions - self._beyond

    def _count_entries(self, table: array[int], at: int, by: int, index: int | None) -> None:
        if self.words == 2:
            self._check_bitmaps(table, index)
        elif self.image.header.version < 3 and ZERO_FLAG in table:
            where = self._guest(index, table.index(ZERO_FLAG))
            self.bad(f"{where} has reserved bits set in its L2 entry", table.count(ZERO_FLAG))
        unusual = COMPRESSED | L2_RESERVED | ZERO_FLAG | (self.cluster_size - 1)
        if self.image.external:  # nothing of it counts here
            unusual = (1 << 64) - 1
        for run in self.runs(table):
            if run.entry & COMPRESSED:
                self._count_compressed(table, at, run, by, index)
            elif run.entry & unusual or not self._count_plain(run, by, index):
                self._count_run(table, at, run, by, index)

    def _count_plain(self, run: Run, by: int, index: int | None) -> bool:
        """The quick way through almost all entries. False if they need a closer look."""
        host, n = run.entry & OFFSET, run.clusters
        first = host >> self.bits
        if not first or first + n > self.clusters:
            return False
        if self.roles.any(first, n) or self.tables.any(first, n):
            return False
        self.counts.add(first, n, by)
        if index is not None:
            self._allocated(host, n)
        return True

    def _allocated(self, host: int, clusters: int) -> None:
        """Count guest clusters that lie in a row."""
        self.result.allocated_clusters += clusters
        if self._last >= 0 and host != self._last + self.cluster_size:
            self.result.fragmented_clusters += 1
        self._last = host + (clusters - 1 << self.bits)

    def _guest(self, index: int | None, slot: int) -> str:
        """Which guest cluster an entry is for, in words."""
        if index is None:
            return f"a snapshot's cluster (entry {slot} of its L2 table)"
        offset = (index * self.image.header.l2_entries + slot) << self.bits
        return f"the cluster at guest offset {offset}"

    def _check_bitmaps(self, table: array[int], index: int | None) -> None:
        """Look at the subclusters of each entry."""
        for slot in range(len(table) // 2):
            entry, subclusters = table[2 * slot], table[2 * slot + 1]
            if not subclusters:
                continue
            here = entry & OFFSET or (self.image.external and entry & COPIED)
            if entry & COMPRESSED:
                self.bad(f"{self._guest(index, slot)} is compressed and has subclusters")
            elif subclusters & ALL and not here:
                self.bad(
                    f"{self._guest(index, slot)} has allocated subclusters, but no host offset"
                )
            elif subclusters & ALL & (subclusters >> SUBCLUSTERS):
                self.bad(f"{self._guest(index, slot)} has an invalid subcluster bitmap")

    def _reads_zero(self, table: array[int], slot: int) -> bool:
        """Whether the guest sees nothing of the cluster that an entry points to."""
        if self.words == 2:
            return not table[2 * slot + 1] & ALL
        return bool(table[slot] & ZERO_FLAG) and self.image.header.version >= 3

    def _make_plain(self, table: array[int], at: int, slot: int) -> None:
        """A zero cluster stays one without the place that it cannot have."""
        if self.words == 2:
            self._edit(at + 16 * slot, 0)
        else:
            self._edit(at + 8 * slot, ZERO_FLAG)

    def _count_compressed(
        self, table: array[int], at: int, run: Run, by: int, index: int | None
    ) -> None:
        place = run.entry & ((1 << self._sectors) - 1)
        length = (((run.entry & (COMPRESSED - 1)) >> self._sectors) + 1) * 512 - place % 512
        first = place >> self.bits
        count = ((place + length - 1) >> self.bits) - first + 1
        if index is not None:
            self.result.compressed_clusters += 1
            self.result.allocated_clusters += 1
            self.result.fragmented_clusters += 1
        if self.image.external:
            self.bad(f"{self._guest(index, run.slot)} is compressed in an external data file")
            return
        if run.entry & COPIED:
            self.bad(f"{self._guest(index, run.slot)} is compressed and flagged COPIED")
            self._edit(at + 8 * self.words * run.slot, run.entry & ~COPIED)
        if place + length - self.file.size >= self.cluster_size:
            self._bad_end(self._guest(index, run.slot), first)
        self._count(first, count, by)
        over = self._clash(first, count)
        if over:
            self.bad(f"{self._guest(index, run.slot)} lies over {over}")

    def _count_run(self, table: array[int], at: int, run: Run, by: int, index: int | None) -> None:
        reserved = run.entry & (L2_RESERVED | (ZERO_FLAG if self.image.header.version < 3 else 0))
        if reserved:
            self.bad(f"{self._guest(index, run.slot)} has reserved bits set in its L2 entry",
                     run.clusters)  # fmt: skip
            if not reserved & ZERO_FLAG:  # QEMU would not read it, so it may mean either
                for slot in range(run.slot, run.slot + run.clusters):
                    here = slot * self.words
                    self._edit(at + 8 * here, table[here] & ~reserved)
        host = run.entry & OFFSET
        external = self.image.external
        if not host and not (external and run.entry & COPIED):
            if run.clusters > 1:  # it points nowhere, and the next one begins the file
                entry = run.entry + self.cluster_size
                self._count_run(table, at, Run(run.slot + 1, run.clusters - 1, entry), by, index)
            return
        if index is not None and not run.entry & ZERO_FLAG:
            self._allocated(host, run.clusters)
        if host & (self.cluster_size - 1):
            for slot in range(run.slot, run.slot + run.clusters):
                self._count_odd(table, at, slot, by, index)
        elif not external:
            self._count_data(table, at, run, by, index)
        elif index is not None:
            self._check_external(table, at, run, index)

    def _check_external(self, table: array[int], at: int, run: Run, index: int) -> None:
        """In an external data file each cluster lies at its guest offset."""
        host = run.entry & OFFSET
        if host == (index * self.image.header.l2_entries + run.slot) << self.bits:
            return
        where = f"lies at another offset, {host:#x}, of the external data file"
        self.bad(f"{self._guest(index, run.slot)} {where}", run.clusters)
        for slot in range(run.slot, run.slot + run.clusters):
            if self._reads_zero(table, slot):
                self._make_plain(table, at, slot)

    def _count_odd(self, table: array[int], at: int, slot: int, by: int, index: int | None) -> None:
        host = table[slot * self.words] & OFFSET
        self.bad(f"{self._guest(index, slot)} has the odd host offset {host:#x}")
        if self._reads_zero(table, slot):
            self._make_plain(table, at, slot)
        elif not self.image.external:
            self._count(host >> self.bits, 2, by)  # it may be in either, or in both
            self._clash(host >> self.bits, 2)

    def _count_data(self, table: array[int], at: int, run: Run, by: int, index: int | None) -> None:
        first = (run.entry & OFFSET) >> self.bits
        beyond = min(max(first + run.clusters - self.clusters, 0), run.clusters)
        inside = run.clusters - beyond
        if beyond and inside:  # the end of the file cuts through
            entry = run.entry + (inside << self.bits)
            self._count_data(table, at, run._replace(clusters=inside), by, index)
            self._count_data(table, at, Run(run.slot + inside, beyond, entry), by, index)
            return
        tables = self.roles.any(first, run.clusters) or self.tables.any(first, run.clusters)
        if not beyond and not tables:
            self.counts.add(first, run.clusters, by)
            return
        if beyond == run.clusters and not self._reads_zero(table, run.slot) and self.words == 1:
            self._bad_end(self._guest(index, run.slot), first, beyond)
            self._count(first, beyond, by)
            return
        for slot in range(run.slot, run.slot + run.clusters):
            cluster = first + slot - run.slot
            over = self._over(cluster)
            if over:
                self.bad(f"{self._guest(index, slot)} lies over {over}")
            elif cluster >= self.clusters:
                self._bad_end(self._guest(index, slot), cluster)
            else:
                self._count(cluster, 1, by)
                continue
            if self._reads_zero(table, slot):
                self._make_plain(table, at, slot)
            else:
                self._count(cluster, 1, by)
                self._clash(cluster)
