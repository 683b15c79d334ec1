"""Rate limits: a bucket that may go into debt, paid off by waiting.

A job asks after it has moved bytes, not before: the debt says how long to wait until the
average is right again. Clock and wait are given, so a test needs no time to pass.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

SLICE = 0.1  # seconds of credit that may pile up while there is nothing to do
LONGEST = 0.25  # seconds that a brake holds back one write
HOLD = 2.0  # seconds after which a brake that nobody holds down is off


class Throttle:
    """Bytes per second; 0 is unlimited. One thread charges; any may change `speed`."""

    def __init__(
        self, speed: int = 0, clock: Callable[[], float] = time.monotonic, most: float = math.inf
    ) -> None:
        self.speed = speed
        self._clock = clock
        self._most = most  # seconds of debt; what is beyond is forgiven
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
        self._debt = min(self._debt, self._most * speed)
        self._last = now
        return max(self._debt / speed, 0.0)


class Brake:
    """A limit on those who write to a disk, bounded: each write waits for `LONGEST` at most.

    It works while somebody holds it down. Left alone (a job that has paused, failed or hangs), it
    is off by itself. Thread-safe."""

    def __init__(
        self,
        speed: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.speed = speed  # bytes per second; any thread may change it
        self.sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()  # guards the bucket
        self._bucket = Throttle(speed, clock, LONGEST)
        self._until = clock() + HOLD

    def hold(self) -> None:
        """Hold it down for a little longer."""
        self._until = self._clock() + HOLD

    def charge(self, length: int) -> float:
        """`length` bytes were written: the seconds by which to hold back the answer."""
        if self._clock() >= self._until:
            return 0.0
        with self._lock:
            self._bucket.speed = self.speed
            return self._bucket.charge(length)

    def wait(self, length: int) -> None:
        """Hold back the answer to a write of `length` bytes."""
        delay = self.charge(length)
        if delay:
            self.sleep(delay)
