"""Runs of free clusters, lowest first: which room of the file can be used again.

The list is complete below the *frontier*: each free cluster there is in one of its runs. Above the
frontier nothing is known yet, and the refcount blocks have to be looked at. The list is bounded: if
it grows beyond `MAX_RUNS`, the highest runs are forgotten and the frontier moves down to them.

All numbers are clusters. The image's `meta` lock guards the list, and the caller holds it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

MAX_RUNS = 4096


class FreeRuns:
    """The free clusters below `frontier`."""

    def __init__(self) -> None:
        self.frontier = 0
        self.total = 0  # clusters in all runs
        self._starts: list[int] = []  # sorted; neighbouring runs are joined
        self._counts: list[int] = []

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._starts)

    @property
    def full(self) -> bool:
        """Whether the list holds as many runs as it may."""
        return len(self._starts) >= MAX_RUNS

    @property
    def largest(self) -> int:
        """The length of the longest run, 0 if there is none."""
        return max(self._counts, default=0)

    def has(self, count: int) -> bool:
        """Whether `count` clusters in a row are in the list."""
        return bool(self._counts) if count == 1 else self.largest >= count

    def add(self, first: int, count: int) -> None:
        """Note that `first, count` are free. Clusters at or above the frontier are not noted."""
        count = min(count, self.frontier - first)
        if count <= 0:
            return
        at = bisect_right(self._starts, first)
        self.total += count
        if at and self._starts[at - 1] + self._counts[at - 1] == first:
            at -= 1
            self._counts[at] += count
        else:
            self._starts.insert(at, first)
            self._counts.insert(at, count)
        if at + 1 < len(self._starts) and first + count == self._starts[at + 1]:
            self._counts[at] += self._counts.pop(at + 1)
            del self._starts[at + 1]
        while len(self._starts) > MAX_RUNS:
            self.frontier = self._starts.pop()
            self.total -= self._counts.pop()

    def take(self, count: int) -> tuple[int, int] | None:
        """Remove up to `count` clusters in a row: (first, how many), None if no cluster is free.

        The lowest run that holds all of them is used, else the longest run."""
        if not self._starts:
            return None
        if self._counts[0] >= count:
            at = 0
        else:
            longest = max(self._counts)
            if longest >= count:
                at = next(i for i, n in enumerate(self._counts) if n >= count)
            else:
                at, count = self._counts.index(longest), longest
        return self._remove(at, count), count

    def take_exactly(self, count: int) -> int | None:
        """Remove `count` clusters in a row and return the first; None if no run is so long."""
        for at, have in enumerate(self._counts):
            if have >= count:
                return self._remove(at, count)
        return None

    def discard(self, first: int, count: int) -> None:
        """Note that `first, count` are free no longer, as far as they are in the list."""
        stop = first + count
        at = max(bisect_right(self._starts, first) - 1, 0)
        while at < len(self._starts) and self._starts[at] < stop:
            start, end = self._starts[at], self._starts[at] + self._counts[at]
            if end <= first:
                at += 1
                continue
            del self._starts[at], self._counts[at]
            self.total -= end - start
            for a, b in ((start, first), (stop, end)):
                if a < b:
                    at = bisect_left(self._starts, a)
                    self._starts.insert(at, a)
                    self._counts.insert(at, b - a)
                    self.total += b - a
                    at += 1

    def _remove(self, at: int, count: int) -> int:
        """Take the first `count` clusters of run number `at` off the list."""
        first = self._starts[at]
        self.total -= count
        if self._counts[at] == count:
            del self._starts[at], self._counts[at]
        else:
            self._starts[at] += count
            self._counts[at] -= count
        return first
