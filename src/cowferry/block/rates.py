"""How fast a copy goes and how fast its guest makes it undone: measured, smoothed, extrapolated."""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW = 0.5  # seconds over which rates are measured


def fitted(size: int, took: float, step: float, least: int, most: int) -> int:
    """How large the next chunk should be, after one of `size` bytes that took so many seconds: a
    chunk should take about `step` seconds."""
    if took < step / 2:
        return min(size * 2, most)
    return max(size // 2, least) if took > step * 2 else size


class Rates:
    """Rates in bytes per second. `look` now and then; one thread at a time, any may read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.copy_rate = 0.0  # brought up to date
        self.write_rate = 0.0  # written by guests, whether or not it was up to date
        self.dirty_rate = 0.0  # that was up to date, and is not any more
        self.left = 0  # bytes that are not up to date
        self.total = 0  # bytes copied in all, some of them again and again
        self._copied = 0  # bytes since the last look
        self._at = clock()
        self._before: tuple[int, int] | None = None  # what was left and written at the last look
        self._fresh = True  # no rate is known of how things are done now

    def copied(self, length: int) -> None:
        """So many bytes more."""
        self._copied += length
        self.total += length

    def look(self, left: int, written: int) -> bool:
        """What is left to copy, and what guests have written in all; whether the rates are new."""
        now = self.clock()
        self.left = left
        if self._before is None:
            self._before, self._at, self._copied = (left, written), now, 0
            return False
        took = now - self._at
        if took < WINDOW:
            return False
        before, already = self._before
        self.copy_rate = self._smooth(self.copy_rate, self._copied / took)
        self.write_rate = self._smooth(self.write_rate, (written - already) / took)
        undone = max(left - before + self._copied, 0)
        self.dirty_rate = self._smooth(self.dirty_rate, undone / took)
        self._before, self._at, self._copied, self._fresh = (left, written), now, 0, False
        return True

    def _smooth(self, old: float, new: float) -> float:
        return new if self._fresh else (old + new) / 2

    def restart(self) -> None:
        """Something was changed, or the copy stood still: measure anew."""
        self._before = None
        self._fresh = True

    @property
    def known(self) -> bool:
        """Whether the rates are those of how things are done now."""
        return not self._fresh

    @property
    def demand(self) -> float:
        """What guests can undo, going on so, once all is up to date.

        Both parts are less than that at times: a range that waits to be copied is not undone by
        writing it, and one that is written in small pieces is undone in granules."""
        return max(self.write_rate, self.dirty_rate)

    def predict(self) -> float:
        """Seconds until nothing is left, if all goes on so."""
        if not self.left:
            return 0.0
        gain = self.copy_rate - self.dirty_rate
        return self.left / gain if gain > 0 else float("inf")
