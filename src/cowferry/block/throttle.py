"""Rate limits: a bucket that may go into debt, paid off by waiting.

A job asks after it has moved bytes, not before: the debt says how long to wait until the
average is right again. Clock and wait are given, so a test needs no time to pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLICE = 0.1  # seconds of credit that may pile up while there is nothing to do


class Throttle:
    """Bytes per second; 0 is unlimited. One thread charges; any may change `speed`."""

    def __init__(self, speed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.speed = speed
        self._clock = clock
        self._debt = 0.0  # bytes moved ahead of the rate
        self._last = clock()

    def charge(self, length: int) -> float:
        """`length` bytes were moved: the seconds to wait before the next ones."""
        now = self._clock()
        speed = self.speed
        if speed <= 0:
            self._debt, self._last = 0.0, now
            return 0.0
        self._debt = max(self._debt - (now - self._last) * speed, -SLICE * speed) + length
        self._last = now
        return max(self._debt / speed, 0.0)
