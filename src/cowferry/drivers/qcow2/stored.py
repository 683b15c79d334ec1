"""The refcounts as they lie in the file, compared with the references that were counted.

The refcount table and the blocks are believed only if each of them lies where nothing else does. A
block that is named twice, for example, is damage: it is looked at once. `why` then says why the
structures cannot be repaired in place, and `repair` builds new ones.

Counts are compared a page at a time as bytes, because almost all pages are right.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

from cowferry.drivers.qcow2.counts import Counts, Page
from cowferry.drivers.qcow2.refcounts import CODES, OFFSET, big_endian, swapped
from cowferry.drivers.qcow2.references import References

RESERVED = 0x1FF  # bits of an entry of the refcount table
TOGETHER = 64  # pages that are skipped at once where nothing is counted or used


def unpack(order: int, data: bytes | bytearray) -> array[int]:
    """Return the refcounts, 2^order bits wide each, that bytes of a refcount block hold."""
    if order >= 3:
        return big_endian(CODES[order], data)
    width, step = 1 << order, 8 >> order
    out = array("B", bytes(len(data) * step))
    for i in range(step):  # the lowest bits belong to the first cluster
        out[i::step] = array("B", [b >> i * width & (1 << width) - 1 for b in data])
    return out


def pack(order: int, numbers: Sequence[int]) -> bytes:
    """Return the bytes of a refcount block for these counts. Raises `OverflowError`."""
    if order >= 3:
        return swapped(array(CODES[order], numbers))
    width, step = 1 << order, 8 >> order
    if max(numbers, default=0) >> width:
        raise OverflowError
    out = bytearray(len(numbers) // step)
    for i in range(step):
        for k, n in enumerate(numbers[i::step]):
            out[k] |= n << i * width
    return bytes(out)


@lru_cache(64)
def _uniform(order: int, number: int, size: int) -> bytes | None:
    try:
        return pack(order, [number] * size)
    except OverflowError:
        return None


class Stored:
    """The refcount structures of an image. What is wrong is added to what `refs` found."""

    def __init__(self, refs: References) -> None:
        h = refs.image.header
        self.refs = refs
        self.order = h.refcount_order
        self.max = (1 << (1 << self.order)) - 1
        self.size = refs.counts.size  # clusters in a page
        self.page_bytes = max((self.size << self.order) // 8, 1)
        self.pages = refs.per_block // self.size  # in a block
        self.why = ""  # the counts cannot be repaired in place
        self.places: array[int] = array("Q")  # cluster of each block, 0: none
        self.unknown: set[int] = set()  # blocks that cannot be read, or not be believed
        self.own: list[tuple[int, int]] = []  # runs of clusters that hold the structures
        self.differs: set[int] = set()  # pages with a wrong count
        self.end = 0  # behind the last cluster that is in use, or counted so
        self._read_table()
        self._claim()

    def _doubt(self, text: str) -> None:
        self.refs.bad(text)
        self.why = self.why or text

    def _read_table(self) -> None:
        refs, h = self.refs, self.refs.image.header
        offset, count = h.reftable_offset, h.reftable_clusters
        self.places = array("Q", bytes(8 * (count << refs.bits - 3)))
        if not count:
            self._doubt("the image has no refcount table")
            return
        first = offset >> refs.bits
        if not offset or offset & (refs.cluster_size - 1):
            self._doubt(f"the refcount table has the invalid offset {offset:#x}")
        elif first + count > refs.clusters:
            self._doubt(f"the refcount table at {offset:#x} lies beyond the end of the file")
        elif refs.counts.any(first, count):
            self._doubt(f"the refcount table at {offset:#x} lies over something else")
        else:
            self.own.append((first, count))
            with self._readable("the refcount table"):
                self._read_entries(offset, range(first, first + count))

    def _read_entries(self, offset: int, table: range) -> None:
        refs = self.refs
        named = Counts()
        sound: list[int] = []
        for index, entry in refs.words_at(offset, len(self.places)):
            place, cluster = entry & OFFSET, (entry & OFFSET) >> refs.bits
            if entry & RESERVED or entry & ~OFFSET:
                self._doubt(f"refcount table entry {index} has reserved bits set: {entry:#x}")
                self.unknown.add(index)
            if not place:
                continue
            wrong = ""
            if place & (refs.cluster_size - 1):
                wrong = "has an odd offset"
            elif cluster >= refs.clusters:
                wrong = "lies beyond the end of the file"
            elif cluster in table or refs.counts[cluster]:
                wrong = "lies over something else"
            elif named[cluster]:
                wrong = "is named before"
            if wrong:
                self._doubt(f"refcount block {index} at {place:#x} {wrong}")
                self.unknown.add(index)
            else:
                named.add(cluster)
                sound.append(index)
                self.places[index] = cluster
                self.unknown.discard(index)
        self.own += [(self.places[index], 1) for index in sound]

    def _claim(self) -> None:
        for first, count in self.own:
            self.refs.counts.add(first, count)

    # Reading -------------------------------------------------------------------------------

    def block(self, index: int) -> bytearray | None:
        """Return the bytes of a refcount block, None if all of it is zero, or if there is none."""
        if index >= len(self.places) or not self.places[index] or index in self.unknown:
            return None
        refs = self.refs
        with self._readable(f"refcount block {index}") as errors:
            data = refs.data_at(self.places[index] << refs.bits, refs.cluster_size)
        if errors:
            self.unknown.add(index)
        return data

    @contextmanager
    def _readable(self, what: str) -> Iterator[list[str]]:
        """What cannot be read inside is no obstacle: new refcounts will do. Yields the errors."""
        refs, errors = self.refs, list[str]()
        before = refs.result.check_errors, refs.lost
        yield errors
        if refs.result.check_errors > before[0]:
            refs.result.check_errors, refs.lost = before
            errors.append(what)
            self._doubt(f"{what} cannot be read")

    def page(self, number: int) -> array[int] | None:
        """Return the refcounts of a page; None if they are not known."""
        index, within = divmod(number, self.pages)
        if index in self.unknown:
            return None
        data = bytearray(self.page_bytes)
        if index < len(self.places) and self.places[index]:
            offset = (self.places[index] << self.refs.bits) + within * self.page_bytes
            self.refs.file.pread(memoryview(data), offset)
        return unpack(self.order, data)

    def has_one(self, cluster: int) -> bool:
        """Whether the refcount of a cluster is 1, as far as it is known."""
        number, at = divmod(cluster, self.size)
        if number in self.differs:
            found = self.page(number)
            if found is not None:
                return found[at] == 1
        return self.refs.counts[cluster] == 1

    # Comparing -----------------------------------------------------------------------------

    def indexes(self, pages: list[int]) -> list[int]:
        """Return which blocks count a cluster, or should, in order."""
        wanted = {number // self.pages for number in pages}
        wanted.update(i for i, place in enumerate(self.places) if place)
        return sorted(wanted)

    def compare(self) -> None:
        """Compare all counts, and report where they differ."""
        pages = self.refs.counts.pages()
        self.end = self.refs.counts.end()
        for index in self.indexes(pages):
            first = bisect_left(pages, index * self.pages)
            last = bisect_left(pages, (index + 1) * self.pages)
            self._compare_block(index, pages[first:last])

    def _compare_block(self, index: int, pages: list[int]) -> None:
        data = self.block(index)
        counts = self.refs.counts
        if index in self.unknown:
            return
        if data is None:
            for number in pages:
                self._differ(number, array("B", bytes(self.size)))
            if pages and not (index < len(self.places) and self.places[index]):
                self.why = self.why or f"clusters have no refcount: block {index} is missing"
            return
        begin, step = index * self.pages, self.page_bytes
        wanted = {number // TOGETHER for number in pages}
        for first in range(begin, begin + self.pages, TOGETHER):
            at = (first - begin) * step
            pieces = bytes(data[at : at + TOGETHER * step])
            if first // TOGETHER not in wanted and not any(pieces):
                continue
            for number in range(first, min(first + TOGETHER, begin + self.pages)):
                at = (number - first) * step
                piece = pieces[at : at + step]
                if piece != self._bytes(counts.page(number)):
                    self._differ(number, unpack(self.order, piece))

    def _bytes(self, page: Page) -> bytes | None:
        """The bytes that a block has for a page; None if they are too narrow."""
        if isinstance(page, bytes):
            return _uniform(self.order, page[0], self.size)
        numbers = [int(n == page) for n in range(self.size)] if isinstance(page, int) else page
        try:
            return pack(self.order, numbers)
        except OverflowError:
            return None

    def _differ(self, number: int, have: array[int]) -> None:
        """Report the clusters of a page whose count is wrong, if there are any."""
        refs = self.refs
        want = refs.counts.numbers(number)
        used = next((at for at in range(self.size - 1, -1, -1) if have[at]), -1)
        self.end = max(self.end, number * self.size + used + 1)
        result, notes = refs.result, refs.notes
        if have == want:
            return
        self.differs.add(number)
        for at, (h, w) in enumerate(zip(have, want, strict=True)):
            cluster = number * self.size + at
            # Beyond the end of the file no room is lost. A repair corrects these, too.
            if h == w or (h > w and cluster >= refs.clusters):
                continue
            if h > w:
                result.leaks += 1
            else:
                result.corruptions += 1
            if notes.full:
                notes.add("")
                continue
            kind = "Leaked" if h > w else "ERROR"
            wide = ", which is more than it can be" if w > self.max else ""
            notes.add(f"{kind} cluster {cluster} refcount={h} reference={w}{wide}")
