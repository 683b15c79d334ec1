"""A disk's limits: bytes and operations per second, with bursts, alone or shared by a group.

There are six rates: bytes and operations, each in total, read and written. A rate is a leaky bucket
(`block/throttle.py`) that holds a tenth of a second's worth. With a burst it holds more: `burst`
units a second for so many `seconds`, and where these are several a second bucket keeps the burst
itself to its rate. A request waits for every bucket that it fills, and fills them when it passes.

Disks of one group share its buckets. Each has queues of its own, one for reads and one for writes,
first come, first served. Among the disks that wait it is the turn of the one that has had least of
what is scarce, be it bytes or operations, counted in seconds of the limit; so one with large
requests, or many, gets no more than its part. One that comes after a pause begins where the others
are and cannot save up. Reads and writes that share a rate take turns.

A change of limits refills no bucket. The new buckets hold as many units as the old ones. A debt
stays the same in units, or in seconds if that is less. If a burst becomes smaller, or goes, the
group remembers how much of it was used. A disk that moves to a group without other disks takes its
use along. The buckets of a group with other disks belong to the group, and stay as they are.

What counts: reads and writes by their bytes and as an operation (or, with `iops_size`, one for each
so many bytes of a large one). TRIM and WRITE_ZEROES are operations that write no bytes. Flushes are
free, and so is what jobs do: they have a `speed` of their own. Only a backup passes the turnstiles
of its target.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from copy import copy
from typing import NamedTuple

from cowferry.block.throttle import READ, SLICE, TIMER, WRITE, Bucket, Go, Timer, unless_gone
from cowferry.errors import CowferryError

MOST = 10**15  # units per second, and units of a burst in all: QEMU's bound
LONGEST = 60.0  # seconds until the timer looks again, however long a request has to wait
SOON = 1e-9  # seconds that are no time: a clock's rounding


class Rate(NamedTuple):
    """One rate: on average, and for so many seconds at a time."""

    average: int = 0  # units per second; 0: no limit
    burst: int = 0  # units per second; 0: none but a tenth of a second's worth
    seconds: int = 1

    def buckets(self) -> list[Bucket]:
        """What keeps to it."""
        if not self.average:
            return []
        if not self.burst:
            return [Bucket(self.average, self.average * SLICE)]
        out = [Bucket(self.average, self.burst * self.seconds)]
        if self.seconds > 1:
            out.append(Bucket(self.burst, self.burst * SLICE))
        return out


class Limits(NamedTuple):
    """What a group lets through: `bps` is bytes per second, `iops` operations per second."""

    bps: Rate = Rate()
    bps_rd: Rate = Rate()
    bps_wr: Rate = Rate()
    iops: Rate = Rate()
    iops_rd: Rate = Rate()
    iops_wr: Rate = Rate()
    iops_size: int = 0  # bytes of an operation; 0: each request is one

    @classmethod
    def of(cls, given: Mapping[str, int]) -> Limits:
        """From QMP's names: bps, bps_max, bps_max_length, bps_rd, ... iops_size.

        Raises `CowferryError` for what cannot take effect."""
        rates = {
            name: Rate(
                given.get(name, 0), given.get(f"{name}_max", 0), given.get(f"{name}_max_length", 1)
            )
            for name in RATES
        }
        out = cls(**rates, iops_size=given.get("iops_size", 0))
        out._check()
        return out

    def flat(self) -> dict[str, int]:
        """In QMP's names, all of them."""
        out: dict[str, int] = {}
        for name in RATES:
            rate: Rate = getattr(self, name)
            out |= {name: rate.average, f"{name}_max": rate.burst}
            out[f"{name}_max_length"] = rate.seconds
        return out | {"iops_size": self.iops_size}

    def with_changes(self, given: Mapping[str, int]) -> Limits:
        """These, with the members given replaced, as a person means it: a total takes the place of
        what is said for reads and writes, and the reverse; a rate of 0 takes its burst along.

        Raises `CowferryError`."""
        flat = self.flat()
        for total in ("bps", "iops"):
            parts = (f"{total}_rd", f"{total}_wr")
            gone = [n for n in (total, *parts) if given.get(n) == 0]
            if given.get(total):
                gone += parts
            if any(given.get(p) for p in parts):
                gone.append(total)
            for name in gone:
                flat |= {name: 0, f"{name}_max": 0, f"{name}_max_length": 1}
        for name in RATES:
            if given.get(f"{name}_max") == 0:
                flat[f"{name}_max_length"] = 1
        flat |= given
        if not any(flat[n] for n in ("iops", "iops_rd", "iops_wr")) and "iops_size" not in given:
            flat["iops_size"] = 0
        return Limits.of(flat)

    def _check(self) -> None:
        """Raise `CowferryError`, in QEMU's words and its order."""
        flat = self.flat()
        for total in ("bps", "iops"):
            for end in ("", "_max"):
                parts = [f"{total}_rd{end}", f"{total}_wr{end}"]
                if flat[total + end] and any(flat[p] for p in parts):
                    raise CowferryError(
                        "bps/iops/max total values and read/write values cannot be used at the "
                        "same time",
                        f"give {total}{end}, or {' and '.join(parts)}",
                    )
        if self.iops_size and not (self.iops.average or self.iops_rd[0] or self.iops_wr[0]):
            raise CowferryError(
                "iops size requires an iops value to be set",
                "iops_size says what counts as one operation: give iops, iops_rd or iops_wr",
            )
        if not 0 <= self.iops_size <= MOST:
            raise CowferryError(f"iops size must be within [0, {MOST}]", f"not {self.iops_size}")
        for name in RATES:
            average, burst, seconds = getattr(self, name)
            said = f"{name}={average}, {name}_max={burst}"
            said += f", {name}_max_length={seconds}" if seconds != 1 else ""
            if not (0 <= average <= MOST and 0 <= burst <= MOST):
                raise CowferryError(f"bps/iops/max values must be within [0, {MOST}]", said)
            if not seconds:
                raise CowferryError("the burst length cannot be 0", said)
            if seconds < 0 or burst * seconds > MOST:
                raise CowferryError("burst length too high for this burst rate", said)
            if seconds > 1 and not burst:
                raise CowferryError("burst length set without burst rate", said)
            if burst and not average:
                raise CowferryError("bps_max/iops_max require corresponding bps/iops values", said)
            if burst and burst < average:
                raise CowferryError("bps_max/iops_max cannot be lower than bps/iops", said)

    def __bool__(self) -> bool:
        return any(getattr(self, name).average for name in RATES)


RATES = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
ENDS = ("_rd", "_wr")

#: What `throttle-group` objects and `-drive throttling.*` call the same.
QOM_RATES = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")
QOM_NAMES = {
    name + end: qom + end.replace("_", "-")
    for name, qom in zip(RATES, QOM_RATES, strict=True)
    for end in ("", "_max", "_max_length")
} | {"iops_size": "iops-size"}


#: Whose use says something about a rate that has not been used itself.
FAMILY = {
    **{f"{total}{end}": (f"{total}{end}", total) for total in ("bps", "iops") for end in ENDS},
    **{total: (total, *(f"{total}{end}" for end in ENDS)) for total in ("bps", "iops")},
}

NONE = Limits()


class Waiting(NamedTuple):
    """A request at a turnstile."""

    length: int  # bytes
    go: Go
    owner: object


# Duty: guards the buckets and queues of every group, and which member is in which. One for all, for
# a member may move. Held for arithmetic only: whoever may go on is called after it is released.
_lock = threading.Lock()


class Group:
    """Limits that one disk has or several share. Thread-safe."""

    def __init__(
        self, name: str, limits: Limits = NONE, timer: Timer | None = None, *, owned: bool = False
    ) -> None:  # fmt: skip
        self.name = name
        self.owned = owned  # an object of its own, which stays when no disk is in it
        self.limits = limits
        self._timer = timer or TIMER
        self._waiting: tuple[list[Member], list[Member]] = ([], [])  # by direction; in no order
        self._members = 0  # disks in it
        self._turn = READ  # the direction that is looked at first
        self._floor = 0.0  # seconds of the limit that those who wait have had at least
        self._alarm: float | None = None  # when the timer calls next
        self._buckets: dict[str, list[Bucket]] = {name: [] for name in RATES}
        self._last_used: dict[str, Bucket] = {}  # the first bucket that each rate has, or had last
        self._fill()

    def _fill(self) -> None:
        """Make the buckets for `limits`, which hold what the old buckets held.

        The caller holds the lock, or is the only user. It has seen to it that they have leaked."""
        self._last = self._timer.clock()
        before, made = self._buckets, {n: getattr(self.limits, n).buckets() for n in RATES}
        for name, buckets in made.items():
            for old, new in zip(before[name], buckets, strict=False):
                new.level = min(old.level, old.size, new.size) + old.debt(new.rate)
            family = [self._last_used[n] for n in FAMILY[name] if n in self._last_used]
            if buckets and family:
                first, used = buckets[0], max(bucket.used for bucket in family)
                if getattr(self.limits, name).burst:
                    first.level = max(first.level, min(used, first.size))
                first.beyond = max(used - first.level, 0.0)
        self._last_used |= {name: buckets[0] for name, buckets in made.items() if buckets}
        self._buckets = made
        self._bytes = tuple(made["bps"] + made[d] for d in ("bps_rd", "bps_wr"))
        self._operations = tuple(made["iops"] + made[d] for d in ("iops_rd", "iops_wr"))
        self._all = [b for buckets in made.values() for b in buckets]
        self._all += [b for name, b in self._last_used.items() if not made[name]]

    def change(self, limits: Limits) -> None:
        """Keep to other limits from now on. Requests that wait may go on at once."""
        with _lock:
            self._leak()
            self.limits = limits
            self._fill()
            ready = self._ready()
        _go(ready)

    def _join(self, before: Group | None) -> None:
        """A disk comes, from another group perhaps. The caller holds the lock."""
        self._members += 1
        if before is None or before is self or self._members > 1:
            return
        before._leak()
        self._leak()
        for name, old in before._last_used.items():
            mine = self._last_used.get(name)
            if mine is None or mine.used < old.used:
                self._last_used[name] = copy(old)
        for name, buckets in before._buckets.items():
            if buckets and sum(b.level for b in buckets) > sum(
                b.level for b in self._buckets[name]
            ):
                self._buckets[name] = buckets
        self._fill()

    def _leak(self) -> None:
        now = self._timer.clock()
        for bucket in self._all:
            bucket.leak(now - self._last)
        self._last = now

    def _wait(self, direction: int) -> float:
        waits = [b.wait() for b in self._bytes[direction]]
        waits += [b.wait() for b in self._operations[direction]]
        wait = max(waits, default=0.0)
        return wait if wait > SOON else 0.0

    def _charge(self, direction: int, length: int) -> float:
        """Fill the buckets; the seconds of the limit that it was."""
        size = self.limits.iops_size
        operations = max(length / size, 1.0) if size else 1.0
        took = 0.0
        for amount, buckets in (
            (length, self._bytes[direction]), (operations, self._operations[direction])
        ):  # fmt: skip
            for bucket in buckets:
                bucket.level += amount
                took = max(took, amount / bucket.rate)
        return took

    def _ready(self) -> list[Go]:
        """Take those whose time has come off the queues, and see to it that the next are called
        in time. Caller holds the lock."""
        self._leak()
        out: list[Go] = []
        while True:
            for direction in (self._turn, 1 - self._turn):
                if self._waiting[direction] and not self._wait(direction):
                    break
            else:
                break
            member = min(self._waiting[direction], key=lambda m: m.had)
            queue = member.queues[direction]
            waiting = queue.popleft()
            if not queue:
                self._waiting[direction].remove(member)
            self._floor = member.had
            member.had += self._charge(direction, waiting.length)
            out.append(waiting.go)
            self._turn = 1 - direction
        waits = [self._wait(d) for d in (READ, WRITE) if self._waiting[d]]
        if waits:
            wait = min(*waits, LONGEST)
            due = self._last + wait
            if self._alarm is None or due < self._alarm:
                self._alarm = due
                self._timer.after(wait, unless_gone(self._due, due))
        return out

    def _due(self, due: float) -> None:
        with _lock:
            if self._alarm != due:
                return  # another call was asked for since, an earlier one
            self._alarm = None
            ready = self._ready()
        _go(ready)

    def _add(self, member: Member, direction: int, waiting: Waiting) -> None:
        """Caller holds the lock."""
        if not any(member.queues):
            member.had = max(member.had, self._floor)
        if not member.queues[direction]:
            self._waiting[direction].append(member)
        member.queues[direction].append(waiting)


class Member:
    """One disk in a group: a turnstile, with the requests that wait at it. Thread-safe."""

    def __init__(self, group: Group, before: Group | None = None) -> None:
        """`before`: the group that the disk was in, until now or a while ago."""
        self.group = group
        self.queues: tuple[deque[Waiting], deque[Waiting]] = (deque(), deque())  # by direction
        self.had = 0.0  # seconds of the group's limit
        self._gone = False
        with _lock:
            group._join(before)

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return len(self.queues[READ]) + len(self.queues[WRITE])

    def admit(self, direction: int, length: int) -> bool:
        """It may pass if nobody in the group waits, and no bucket is too full."""
        with _lock:
            group = self.group
            if self._gone:
                return True
            if group._waiting[direction]:
                return False
            group._leak()
            if group._wait(direction):
                return False
            group._charge(direction, length)
            group._turn = 1 - direction
            return True

    def queue(self, direction: int, length: int, go: Go, owner: object = None) -> None:
        """Wait behind those of this disk and direction, and take turns with other disks."""
        with _lock:
            if self._gone:
                ready = [go]
            else:
                self.group._add(self, direction, Waiting(length, go, owner))
                ready = self.group._ready()
        _go(ready)

    def dismiss(self, owner: object, go: bool) -> None:
        """Nobody of this owner waits any longer. Those that `go` on are counted all the same."""
        with _lock:
            gone = self._take(owner)
            if go:
                for direction, waiting in gone:
                    self.group._charge(direction, waiting.length)
            ready = self.group._ready()
        _go(ready)
        _go([waiting.go for _, waiting in gone], go)

    def move(self, group: Group) -> None:
        """Be in another group from now on, with all who wait."""
        with _lock:
            taken = self._take(None)
            ready = self.group._ready()
            before, self.group, self.had = self.group, group, 0.0
            before._members -= 1
            group._join(before)
            for direction, waiting in taken:
                group._add(self, direction, waiting)
            ready += group._ready()
        _go(ready)

    def leave(self, go: bool = True) -> None:
        """No limit any more: all who wait `go` on, or are dropped."""
        with _lock:
            self.group._members -= not self._gone
            self._gone = True
            mine = [waiting.go for _, waiting in self._take(None)]
            ready = self.group._ready()
        _go(mine, go)
        _go(ready)

    def _take(self, owner: object) -> list[tuple[int, Waiting]]:
        """Out of the queues: who is of this owner (None: all). Caller holds the lock."""
        out: list[tuple[int, Waiting]] = []
        for direction in (READ, WRITE):
            queue = self.queues[direction]
            mine = [w for w in queue if owner is None or w.owner is owner]
            if mine:
                out += [(direction, w) for w in mine]
                rest = [w for w in queue if owner is not None and w.owner is not owner]
                queue.clear()
                queue.extend(rest)
                if not rest:
                    self.group._waiting[direction].remove(self)
        return out


def _go(ready: list[Go], passed: bool = True) -> None:
    for go in ready:
        go(passed)
