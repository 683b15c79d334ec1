"""Rates: a leaky bucket, a job's limit, a timer, and what holds guests' requests back.

A bucket leaks so many units a second, and whoever moves some pours them in. What is in it beyond
its size is too much: the next one waits until that has leaked. So a request is never split, the
average is right whatever the sizes, and a bucket that was left alone lets a little through at once.
A job, a brake and a disk's limits (`block/limits.py`) are the same bucket.

A guest's request waits at a *turnstile*, outside the disk's gate, so that no drain waits for it
(D2); and it waits as an entry in a queue, not as a thread that sleeps: a timer lets it go on.
Clocks and timers are given, so that a test needs no time to pass.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

SLICE = 0.1  # seconds of credit that may pile up while there is nothing to do
LONGEST = 0.25  # seconds that a brake holds back one write
HOLD = 2.0  # seconds after which a brake that nobody holds down is off
READ, WRITE = 0, 1  # directions

Clock = Callable[[], float]  # seconds
Go = Callable[[bool], None]  # True: the request may go on; False: it was dropped


class Bucket:
    """Leaks `rate` units a second and holds `size`. Not thread-safe."""

    def __init__(self, rate: float, size: float) -> None:
        self.rate = rate
        self.size = size
        self.level = 0.0  # units; more than `size` is a debt
        # Units that a larger bucket, which this one has replaced, held beyond the level of this
        # one. They leak once this one is empty, and count if it is replaced by a larger one.
        self.beyond = 0.0

    def leak(self, seconds: float) -> None:
        """So much time has passed."""
        level = self.level - seconds * self.rate
        if level < 0.0:
            self.beyond = max(self.beyond + level, 0.0)
            level = 0.0
        self.level = level

    def wait(self) -> float:
        """Seconds until it holds no more than it should."""
        return max(self.level - self.size, 0.0) / self.rate

    @property
    def used(self) -> float:
        """Units that were moved and have not leaked yet, without a debt."""
        return min(self.level, self.size) + self.beyond

    def debt(self, rate: float) -> float:
        """Units owed that are to be paid at another rate: as many, or as many seconds if less."""
        return max(self.level - self.size, 0.0) * min(rate / self.rate, 1.0)


class Throttle:
    """A job's bytes per second; 0 is unlimited. One thread charges; any may change `speed`.

    A job asks after it has moved bytes, not before. What is owed is owed at the speed at which it
    was moved: a new speed begins with nothing owed, and no credit."""

    def __init__(
        self, speed: int = 0, clock: Clock = time.monotonic, most: float = math.inf
    ) -> None:
        self.speed = speed
        self._clock = clock
        self._most = most  # seconds of debt; what is beyond is forgiven
        self._bucket = Bucket(1, 0)
        self._last = clock()

    def charge(self, length: int) -> float:
        """`length` bytes were moved: the seconds to wait before the next ones."""
        now, speed, bucket = self._clock(), self.speed, self._bucket
        if speed <= 0:
            return 0.0
        if bucket.rate != speed:
            bucket = self._bucket = Bucket(speed, SLICE * speed)
            bucket.level, self._last = bucket.size, now
        bucket.leak(now - self._last)
        self._last = now
        bucket.level = min(bucket.level + length, bucket.size + self._most * speed)
        return bucket.wait()


def unless_gone(method: Callable[..., None], *arguments: object) -> Callable[[], None]:
    """Return a call of a bound method for a timer, which does not keep the method's object.

    It does nothing if the object is gone by then."""
    weak = weakref.WeakMethod(method)

    def call() -> None:
        alive = weak()
        if alive is not None:
            alive(*arguments)

    return call


class Timer:
    """Calls what is due, on one thread that begins with the first call. Thread-safe.

    What it calls must not block: it hands work to others. It keeps what it calls until then, so a
    call that is due late is `unless_gone`."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._changed = threading.Condition()
        # Guarded by `_changed`: (when, number, call), and whether the thread runs.
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._started = False
        self._numbers = itertools.count()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it in so many seconds; those that are due at one time in the order of asking."""
        with self._changed:
            entry = (self.clock() + seconds, next(self._numbers), call)
            heapq.heappush(self._calls, entry)
            if not self._started:
                self._started = True
                threading.Thread(target=self._main, name="timer", daemon=True).start()
            elif self._calls[0] is entry:
                self._changed.notify()

    def _main(self) -> None:
        while True:
            with self._changed:
                while not self._calls or self._calls[0][0] > self.clock():
                    self._changed.wait(self._calls[0][0] - self.clock() if self._calls else None)
                call = heapq.heappop(self._calls)[2]
            try:
                call()
            except Exception:
                log.exception("what was due failed")
            del call  # or it would be kept until the next one is due


TIMER = Timer()  # the process's


class Turnstile(Protocol):
    """What a guest's request has to pass before it enters the gate. Thread-safe."""

    def admit(self, direction: int, length: int) -> bool:
        """Whether a request may pass at once; it has passed then. Otherwise `queue` it."""

    def queue(self, direction: int, length: int, go: Go, owner: object) -> None:
        """Let it wait. `go` is called once, by some thread, perhaps before this returns; it must
        not block."""

    def dismiss(self, owner: object, go: bool) -> None:
        """Nobody of this owner waits any longer: `go` on now, or drop it."""


def let_through(
    turnstiles: tuple[Turnstile, ...], direction: int, length: int, go: Go, owner: object
) -> None:
    """Queue a request at the first turnstile, which did not admit it; then the others."""

    def onward(passed: bool) -> None:
        rest = turnstiles[1:]
        while passed and rest:
            if not rest[0].admit(direction, length):
                let_through(rest, direction, length, go, owner)
                return
            rest = rest[1:]
        go(passed)

    turnstiles[0].queue(direction, length, onward, owner)


class Brake:
    """A limit on those who write to a disk, bounded: each write waits for `LONGEST` at most.

    It works while somebody holds it down. Left alone (a job that has paused, failed or hangs), it
    is off by itself. Thread-safe. A turnstile without a queue: each write has a time of its own."""

    def __init__(self, speed: int, clock: Clock = time.monotonic, timer: Timer = TIMER) -> None:
        self.speed = speed  # bytes per second; any thread may change it
        self.timer = timer
        self._clock = clock
        self._lock = threading.Lock()  # guards the bucket
        self._bucket = Throttle(speed, clock, LONGEST)
        self._until = clock() + HOLD

    def hold(self) -> None:
        """Hold it down for a little longer."""
        self._until = self._clock() + HOLD

    def charge(self, length: int) -> float:
        """`length` bytes are to be written: the seconds by which to hold them back."""
        if self._clock() >= self._until:
            return 0.0
        with self._lock:
            self._bucket.speed = self.speed
            return self._bucket.charge(length)

    def admit(self, direction: int, length: int) -> bool:
        """Reads pass, and what writes no bytes."""
        return direction == READ or not length

    def queue(self, direction: int, length: int, go: Go, owner: object) -> None:
        """A write goes on when its time has come."""
        delay = self.charge(length)
        if delay:
            self.timer.after(delay, lambda: go(True))
        else:
            go(True)

    def dismiss(self, owner: object, go: bool) -> None:
        """What waits here does not wait for long."""
