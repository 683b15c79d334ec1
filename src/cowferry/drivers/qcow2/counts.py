"""Numbers for the clusters of a file, most of which are zero: sparse, and cheap for long runs.

`check` counts references with it. A damaged or hostile table may point anywhere in a file that is
mostly a hole, so memory must follow what the tables hold and not the size of the file. Numbers are
kept in *pages*, made on first use. A page takes one of three forms:

* an int `n`: cluster number `n` of the page has 1, the others have 0;
* one byte: all clusters of the page have that number;
* an array with one number for each cluster, as wide as it has to be.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TypeAlias

CODES = "BHIQ"  # array types, narrow to wide
Page: TypeAlias = "int | bytes | array[int]"  # see above


class Counts:
    """A number for each cluster. `size` clusters, a power of two, make a page. Not thread-safe."""

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self.bits = size.bit_length() - 1
        self._pages: dict[int, Page] = {}

    def __getitem__(self, cluster: int) -> int:
        """Return the number of one cluster."""
        page = self._pages.get(cluster >> self.bits)
        if page is None:
            return 0
        at = cluster & (self.size - 1)
        if isinstance(page, int):
            return int(page == at)
        return page[0] if isinstance(page, bytes) else page[at]

    def add(self, first: int, count: int = 1, by: int = 1) -> None:
        """Add `by` to the numbers of `count` clusters from `first` on. No number gets below 0."""
        if count == 1 and by == 1:
            number, at = first >> self.bits, first & (self.size - 1)
            page = self._pages.get(number)
            if page is None:
                self._pages[number] = at
                return
            if isinstance(page, array) and page[at] < 255:
                page[at] += 1
                return
        stop = first + count
        while first < stop:
            number, at = first >> self.bits, first & (self.size - 1)
            run = min(stop - first, self.size - at)
            self._add(number, at, run, by)
            first += run

    def _add(self, number: int, at: int, run: int, by: int) -> None:
        page = self._pages.get(number)
        if page is None:
            page = b"\0"
        if run == self.size and isinstance(page, bytes) and page[0] + by < 256:
            self._pages[number] = bytes((page[0] + by,))
            return
        counts = self._spread(page)
        part = counts[at : at + run]
        same = part.count(part[0]) == run
        values = [part[0] + by] * run if same else [n + by for n in part]
        while True:
            try:
                counts[at : at + run] = array(counts.typecode, values)
                break
            except OverflowError:
                counts = array(CODES[CODES.index(counts.typecode) + 1], counts)
        self._pages[number] = counts

    def _spread(self, page: Page) -> array[int]:
        """Return the numbers of a page as an array; a page that is one already is returned."""
        if isinstance(page, int):
            counts = array("B", bytes(self.size))
            counts[page] = 1
            return counts
        return array("B", page * self.size) if isinstance(page, bytes) else page

    def pages(self) -> list[int]:
        """Return which pages may have numbers that are not 0, in order."""
        return sorted(self._pages)

    def page(self, number: int) -> Page:
        """Return a page in one of its forms; the caller does not change it."""
        return self._pages.get(number, b"\0")

    def numbers(self, number: int) -> array[int]:
        """Return the numbers of a page, which the caller does not change."""
        return self._spread(self.page(number))

    def any(self, first: int, count: int = 1) -> bool:
        """Whether one of these clusters has another number than 0."""
        if count == 1:
            return (first >> self.bits) in self._pages and self[first] != 0
        return next(self.used(first, count), None) is not None

    def used(self, first: int, count: int) -> Iterator[int]:
        """Yield the clusters of a range whose number is not 0, in order."""
        stop = first + count
        while first < stop:
            number, at = first >> self.bits, first & (self.size - 1)
            run = min(stop - first, self.size - at)
            if number in self._pages:
                for i, n in enumerate(self.numbers(number)[at : at + run]):
                    if n:
                        yield first + i
            first += run

    def all_are(self, first: int, count: int, value: int) -> bool:
        """Whether all of these clusters have the number `value`."""
        stop = first + count
        while first < stop:
            at = first & (self.size - 1)
            run = min(stop - first, self.size - at)
            page = self.page(first >> self.bits)
            if isinstance(page, bytes):
                same = page[0] == value
            else:
                same = self._spread(page)[at : at + run].count(value) == run
            if not same:
                return False
            first += run
        return True

    def end(self) -> int:
        """Return the cluster behind the last one whose number is not 0."""
        for number in reversed(self.pages()):
            numbers = self.numbers(number)
            for at in range(self.size - 1, -1, -1):
                if numbers[at]:
                    return (number << self.bits) + at + 1
        return 0
