"""Mirror: copy a disk to another node while its guest writes, and then move over to it.

    before: vm.img               mirror vm to new.img, and pivot
    after:  new.img              (vm.img is left as it was at the pivot)

How the bytes get there is `jobs/follow.py`: a bitmap says which granules the target does not have,
and guests' writes set its bits.

Two modes. In *background* the guest writes as ever, and the copy runs after it. In
*write-blocking* the job is a tap of the disk: a guest's write is answered when both sides have it
(M3). The modes are switched both ways while the job runs.

The job is ready when no bit is set and the target is flushed (M2). The end is the order that makes
a pivot decidable: drain, last bits, flush the target, the durable record, the switch.

A copy that cannot converge says so in its status: the rate at which the guest dirties against the
rate at which we copy. With `converge_by` it acts: write-blocking on the granules that come back
dirty again and again, then on all of them, then a brake on the guest's writes, bounded.

The same job is an active commit: its target is then a node below the disk's own root.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from cowferry.block import keeper, moves
from cowferry.block.bitmap import Bitmap
from cowferry.block.copy import Kind, differing, spans
from cowferry.block.disk import Disk
from cowferry.block.moves import Move
from cowferry.block.node import Node, State
from cowferry.block.rates import WINDOW, Rates, fitted
from cowferry.block.scope import CalledOff
from cowferry.block.throttle import Brake
from cowferry.block.unfinished import Unfinished
from cowferry.errors import CowferryError
from cowferry.jobs.follow import MAX_CHUNK, MIN_CHUNK, Follower
from cowferry.jobs.job import Progress, blame
from cowferry.jobs.states import Status, allow

log = logging.getLogger(__name__)

STEP = 0.02  # seconds a chunk should take: a guest's allocating write waits for as long
LOOKED = 4 << 20  # bytes compared between yields
SCAN = 64 << 20  # bytes looked at between yields when the first bits are set
CHECKPOINT = 5.0  # seconds of copying that a crash may cost at most
IDLE = 0.05  # seconds between looks at the bitmap when nothing is dirty
CLOSE = 1 << 20  # dirty bytes that are copied under a short drain rather than chased
SLOWEST = 1 << 20  # bytes per second that a braked guest may write at least
SAFE = 0.8  # of the time that is left is what a prediction may take
EVEN = 0.9  # of the copy rate is what a guest may undo before the copy gets nowhere
TRIAL = 3 * WINDOW  # seconds that a gentler measure costs if it does not help
FEW = 4  # dirty granules that are not worth chasing
MANY = 32  # dirty runs copied between yields
DETACH_SECONDS = 2.0  # that letting go of the disk waits for requests in flight
RETRY_MOST = 8.0  # seconds between two tries of what fails again and again
LOST_SECONDS = 20.0  # of errors alone, after which a copy that ignores them has failed
MODES = ("background", "write-blocking")


class Layer(NamedTuple):
    """An image below the disk that is to exist at the destination, too: copied before all else."""

    source: Node
    base: Node | None  # of `source`: what is at or below it is not copied
    target: Node


class Mirror(Follower):
    """The job. `base`: what only it, or a layer below it, could answer is not copied."""

    type = "mirror"

    def __init__(
        self,
        disk: Disk,
        target: Node,
        *,
        base: Node | None = None,
        everything: bool = True,
        layers: tuple[Layer, ...] = (),
        granularity: int | None = None,
        buf_size: int = 0,
        unmap: bool = True,
        copy_mode: str = "background",
        on_source_error: str = "report",
        on_target_error: str = "report",
        converge_by: float = 0,
        backing: Node | None = None,
        compare: bool = False,
        record: tuple[str, str | None] | None = None,
        unfinished: Unfinished | None = None,
        begin: Callable[[], tuple[Unfinished | None, str]] | None = None,
        carry: bool = False,
        note: str = "",
        move: Callable[[], list[Move]] = list,
        switched: Callable[[], None] | None = None,
        detached: Callable[[], None] | None = None,
        released: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        **common: Any,
    ) -> None:
        super().__init__(
            disk, target, granularity=granularity, fresh=everything, remember=bool(converge_by),
            on_error=on_source_error, **common,
        )  # fmt: skip
        self.base = base
        self.everything = everything  # False: only what is written from now on (sync none)
        self.layers = layers
        self.copy_mode = copy_mode
        self.on_target_error = on_target_error
        self.converge_by = converge_by
        self.copier.unmap = unmap
        self.buf_size = buf_size or MAX_CHUNK  # bytes that one chunk has at most
        self.pivot = True  # False: a soft cancel; the target is left as a copy of that moment
        self.chunk = MIN_CHUNK
        self.cursor = 0
        self._left = 0  # dirty bytes when last asked whether we are near
        self.did: list[str] = []  # what was done to converge
        self.note = note  # how it began, in words, if that is worth knowing
        self.limited = False  # it is the job's own speed limit that misses the deadline
        self.unfinished = unfinished  # lets the copy go on after a crash
        self._begin_unfinished = begin  # makes that, and a note, when the job begins
        self._checked = clock()  # when it was told last how far we are
        self._written = 0  # by guests, until then
        self.carry = carry  # the disk's bitmaps go along with it; else they stay, as in QEMU
        self._bitmaps: dict[str, Bitmap] | None = None  # those that the target had, if so
        self._moving = move
        self._backing = backing
        self.compare = compare  # what the target lies over is not known to read as `base`
        self._record = record  # what its header has to name in the end: (backing file, format)
        self._switched = switched
        self._detached = detached
        self._released = released
        self._clock = clock
        self._began = clock()
        self._rates = Rates(clock)
        self.first: int | None = None  # bytes to copy, once it is known where the target differs
        self._failures = 0  # rounds that met an error, one after another
        self._failed_now = False  # this round has met one
        self._least = disk.size + 1  # dirty bytes, whenever an error was met
        self._gained = clock()  # when they became less
        self._attached = False
        self._lent = False  # the target has its backing node from us

    # The work ------------------------------------------------------------------------------

    def run(self) -> Iterator[Progress]:
        if self.target.size != self.disk.size and not self.inside:
            self.where = (
                f"'{self.target.filename}' has {self.target.size} bytes and '{self.disk.name}' "
                f"{self.disk.size}"
            )
            raise CowferryError("Source and target image have different sizes")
        if self._begin_unfinished is not None:
            self.unfinished, self.note = self._begin_unfinished()
            self._begin_unfinished = None
        for layer in self.layers:
            yield from self._copy_layer(layer)
        yield from self.attempt("write", self._attach)
        self._began = self._clock()
        if self.everything:
            yield from self._first_bits()
        elif self.target.backing is self.source:
            yield from self._own_bits()
        self.first = self.dirty.count()
        told = False
        while True:
            with suppress(CalledOff):  # guests' requests do not finish: another time
                self._steer()
            if self._tap_error is not None:
                yield from self._tell_tap_error()
            if self.unfinished is not None and self._due():
                if not told or self._written != self.dirty.written:
                    self._written = self.dirty.written
                    yield from self.attempt("write", self.checkpoint)
                self._checked = self._clock()
            runs = self._next()
            chasing = told and not self.completing
            if runs and (chasing or not self._near()):
                if self.completing and not self._blocking:
                    # Or a busy guest would never let it end.
                    yield from self.attempt("write", self._block)
                length = sum(n for _, n in runs)
                begin = self._clock()
                copied = yield from self.attempt("write", partial(self.copy_runs, runs))
                self._adapt(self._clock() - begin, length)
                # an error that is ignored would be met again at once
                idle = 0.0 if copied is not None else self._failed_again(chasing)
                done = length if copied is not None else 0
                self._rates.copied(done)
                yield self._progress(done, copied or 0)._replace(idle=idle)
                continue
            caught = None if chasing else (yield from self.attempt("write", self._catch_up))
            if caught is None:
                self._failed_now = False  # each time is a round by itself
                idle = IDLE if chasing else self._failed_again(chasing)
                yield self._progress(0, 0)._replace(idle=idle)
                continue
            self._failures = 0
            completing = self.completing  # a verb that comes now finds the job ready, or not
            told = True
            yield self._progress(caught, caught)._replace(ready=not completing)
            if completing:
                self.ignored = None  # what was passed over is there by now
                return

    def _progress(self, done: int, moved: int) -> Progress:
        """The length grows with what the guest dirties: done, and what is left."""
        self.length = self.offset + done + self.dirty.count()
        return Progress(done=done, moved=moved)

    def _attach(self) -> None:
        if self._backing is not None and self.target.backing is None:
            # From the start: a target that copies on write must find the right bytes below.
            self.target.backing = self._backing
            self._lent = True
        with self.disk.exclusive():
            self.disk.bitmaps[f"#{self.id or 'mirror'}"] = self.dirty
            self._attached = True
            self._mode(self.copy_mode)

    def _detach(self) -> None:
        """Inside a drain."""
        self.disk.bitmaps.pop(f"#{self.id or 'mirror'}", None)
        self.disk.taps = tuple(t for t in self.disk.taps if t is not self)
        self.disk.brake = None
        self._attached = False

    def _mode(self, mode: str) -> None:
        """Inside a drain: leaving it hands out write leases, or does not."""
        self.copy_mode = mode
        blocking = mode == "write-blocking"
        self.dirty.recording = not blocking  # a write that both sides took needs no bit
        others = tuple(t for t in self.disk.taps if t is not self)
        self.disk.taps = (*others, self) if blocking else others
        if not blocking:
            self.disk.brake = None

    def _due(self) -> bool:
        """Whether it is time for a checkpoint: a crash costs a fifth of the work, or little."""
        now = self._clock()
        return now - self._checked >= min(CHECKPOINT, (now - self._began) / 5 + CHECKPOINT / 50)

    def checkpoint(self) -> int:
        """Have it on record how far the copy is: what was copied is on the target's disk first."""
        assert self.unfinished is not None
        self.target.flush()
        self.source.flush()  # most of what is flushed inside the drain
        with self.disk.exclusive():
            if self._blocking:  # guests' writes have gone there meanwhile
                self.target.flush()
            self.unfinished.checkpoint(self.dirty)
        return 0

    def _first_bits(self) -> Iterator[Progress]:
        if self.unfinished is not None and self.unfinished.resumed:
            self.dirty.merge(self.unfinished.bitmap)
            there = self.disk.size - self.dirty.count()
            self.note = (
                f"went on with a copy that was not finished: {there / 1e6:.1f} MB of "
                f"{self.disk.size / 1e6:.1f} MB were there"
            )
            yield self._progress(0, 0)
            return
        if self.base is None:
            self.dirty.set(0, self.disk.size)
            yield self._progress(0, 0)
            return
        at = 0
        while at < self.disk.size:
            length = min(SCAN, self.disk.size - at)
            with self.disk.shared(at, length):
                wanted = list(spans(self.source, at, length, self.unit, self.base))
            for s in wanted:
                if s.kind is not Kind.KEEP:
                    self.dirty.set(s.offset, s.length)
                elif not self.inside:
                    yield from self._compare(s.offset, s.length)
            at += length
            yield self._progress(0, 0)

    def _own_bits(self) -> Iterator[Progress]:
        """Set the bits where an overlay of the disk has bytes of its own, which hide the disk's."""
        for at in range(0, self.disk.size, SCAN):
            start = at
            for e in list(self.target.extents(at, min(SCAN, self.disk.size - at))):
                if e.state is not State.HOLE:
                    self.dirty.set(start, e.length)
                start += e.length
            yield self._progress(0, 0)

    def _compare(self, offset: int, length: int) -> Iterator[Progress]:
        """Set the bits where the target does not show `base` by itself, as it has to: it may have
        bytes of its own there, or lie over something else."""
        for at in range(offset, offset + length, LOOKED):
            part = min(LOOKED, offset + length - at)
            found = yield from self.attempt("write", partial(self._wrong, at, part))
            for start, n in found if found is not None else [(at, part)]:
                self.dirty.set(start, n)
            yield self._progress(0, 0)

    def _wrong(self, offset: int, length: int) -> list[tuple[int, int]]:
        base, unit = self.base, self.unit
        try:
            return list(differing(base, self.target, offset, length, unit, self.compare))
        except OSError as error:
            raise blame(error, self.source, offset, length) from error

    def _next(self) -> list[tuple[int, int]]:
        """The next dirty runs after the last one, together no longer than a chunk."""
        left = self._limit()
        runs: list[tuple[int, int]] = []
        for offset, length in self.dirty.runs(self.cursor):
            length = min(length, left)
            left -= length
            runs.append((offset, length))
            self.cursor = offset + length
            if left <= 0 or len(runs) == MANY:
                return runs
        if not runs and self.cursor:  # round and round
            self.cursor, self.fresh = 0, False
            self._failures = self._failures if self._failed_now else 0
            self._failed_now = False
            return self._next()
        return runs

    def _failed_again(self, chasing: bool) -> float:
        """An error was ignored. Return the seconds to wait: longer in each round that meets one.

        Raise it if there is nothing but errors for `LOST_SECONDS`, unless the job was ready before
        and only follows its guest (`chasing`)."""
        if not self._failed_now:
            self._failed_now = True
            self._failures += 1
        left, now = self.dirty.count(), self._clock()
        if chasing or left < self._least:
            self._least, self._gained = left, now
        elif now - self._gained >= LOST_SECONDS and self.ignored is not None:
            raise OSError(
                self.ignored.errno,
                f"{left} bytes could not be copied, even after repeated tries: "
                f"{self.ignored.strerror or self.ignored}",
            )
        return self._retry

    @property
    def _retry(self) -> float:
        """Seconds between two tries of what has failed."""
        return min(IDLE * 2.0 ** min(self._failures, 16), RETRY_MOST)

    def _limit(self) -> int:
        limit = min(self.chunk, self.buf_size)
        if self._blocking:
            limit = min(limit, MIN_CHUNK)  # guests' writes wait for it
        if self.throttle.speed:
            limit = min(limit, self.throttle.speed // 10)
        return max(limit // self.unit, 1) * self.unit

    def _adapt(self, took: float, length: int) -> None:
        if length >= self.chunk // 2:
            self.chunk = fitted(self.chunk, took, STEP, MIN_CHUNK, MAX_CHUNK)

    @property
    def _blocking(self) -> bool:
        return self.copy_mode == "write-blocking"

    def doing(self, operation: str) -> str:
        if operation == "read":
            return f"reading '{self.disk.root.filename}'"
        return f"writing '{self.target.filename}'"

    def policy(self, operation: str) -> str:
        return self.on_error if operation == "read" else self.on_target_error

    def _near(self) -> bool:
        """Little enough is left for a drain, and going on would not make it less."""
        left, before = self.dirty.count(), self._left
        self._left = left
        if left > min(CLOSE, self._rates.copy_rate / 20 + self.granularity):
            return False
        return left <= FEW * self.granularity or left >= before

    def _catch_up(self) -> int:
        """No bit is set, and the target is flushed (M2): under a short drain, if bits are left.

        The bytes that were left. The flush comes after the drain: before it, a guest would dirty
        much meanwhile."""
        left = self.dirty.count()
        if left and self._plain:
            left = self._carry_last()
        elif left:
            with self.disk.exclusive():
                left = self.dirty.count()
                self._copy_all()
        if not self.completing:  # or `approach` is about to
            self.target.flush()
        return left

    def _copy_layer(self, layer: Layer) -> Iterator[Progress]:
        """An immutable layer: no gate."""
        at, size = 0, layer.source.size
        granule = max(layer.target.granule, 4096)
        self.length += size
        while at < size:
            length = min(self._limit_for(granule), size - at)
            copied = yield from self.attempt("write", partial(self._place, layer, at, length))
            yield Progress(done=length, moved=copied or 0)
            at += length
        yield from self.attempt("write", partial(_flushed, layer.target))

    def _limit_for(self, granule: int) -> int:
        limit = min(MAX_CHUNK // 4, self.buf_size)
        if self.throttle.speed:
            limit = min(limit, self.throttle.speed // 10)
        return max(limit // granule, 1) * granule

    def _place(self, layer: Layer, offset: int, length: int) -> int:
        moved = 0
        granule = max(layer.target.granule, 4096)
        for span in spans(layer.source, offset, length, granule, layer.base):
            self.copier.place(layer.source, layer.target, span)
            moved += span.length if span.kind is Kind.COPY else 0
        return moved

    def _tell_tap_error(self) -> Iterator[Progress]:
        error, self._tap_error = self._tap_error, None
        assert error is not None
        tried = False

        def again() -> int:
            nonlocal tried
            if not tried:  # told once; the range itself is dirty, and copied in its turn
                tried = True
                raise error
            return 0

        yield from self.attempt("write", again)

    # Converging ------------------------------------------------------------------------------

    def _steer(self) -> None:
        """Look at the rates; with a deadline, escalate while the prediction misses it.

        Each measure is given time to show what it does before the next. A brake is held down
        while the job runs, and comes off once it is ready: nothing that a guest then writes can
        put the copy behind, for it goes to both sides."""
        rates = self._rates
        new = rates.look(self.dirty.count(), self.dirty.written)
        if self.status in (Status.READY, Status.STANDBY):
            self.disk.brake = None
            return
        if self.disk.brake is not None:
            self.disk.brake.hold()
        if not new or not self.converge_by:
            return
        speed = self.throttle.speed
        left = (self._began + self.converge_by - self._clock()) * SAFE
        late = rates.predict() > left and not self._near()
        everywhere = self._blocking and self.hot is None
        self.limited = late and everywhere and bool(speed) and rates.copy_rate > speed * SAFE
        if not late:
            return
        if not everywhere:
            spare = left - rates.left / max(rates.copy_rate, 1.0)  # if nothing more were undone
            if not self._blocking and spare > TRIAL:
                self._block(self.again)
                self._say("write-blocking on the ranges that are written again and again")
            elif spare < max(TRIAL, left / 3):
                self._block()
                self._say("write-blocking everywhere")
        elif not self.limited:
            self._brake()

    def _brake(self) -> None:
        """Slow the guest's writes down, or slow them down further; a guest that hardly writes is
        not what keeps the copy back."""
        brake, rates = self.disk.brake, self._rates
        if brake is not None:
            brake.speed = max(brake.speed // 2, SLOWEST)
            self.did.pop()
        elif rates.write_rate > SLOWEST:
            speed = max(int(min(rates.write_rate, rates.copy_rate) / 2), SLOWEST)
            brake = self.disk.brake = Brake(speed, self._clock)
        else:
            return
        self._say(f"braking the guest's writes towards {brake.speed / 1e6:.0f} MB/s")

    def _say(self, what: str) -> None:
        self.did.append(f"{what} (after {self._clock() - self._began:.0f} s)")
        self._rates.restart()

    def _block(self, hot: Bitmap | None = None) -> None:
        with self.disk.exclusive():
            if hot is not None:
                hot.join(self.copied, self.dirty)
            self.hot = hot
            self._mode("write-blocking")

    def details(self) -> dict[str, Any]:
        r = self._rates
        out: dict[str, Any] = {
            "actively-synced": self._blocking and self.hot is None and not self.dirty.count(),
            "copy-mode": self.copy_mode,
            "x-remaining": self.dirty.count(),
            "x-dirty-rate": int(r.dirty_rate if self._blocking else r.demand),
            "x-copy-rate": int(r.copy_rate),
        }
        note = self._note()
        if self._failures and self._last_error:
            note += "; " if note else ""
            note += f"an error is ignored, and the copy tried again every {self._retry:.1f} s: "
            note += self._last_error
        if note:
            out["x-note"] = note
        return out

    def _note(self) -> str:
        r = self._rates
        waiting = self.status not in (Status.READY, Status.STANDBY)
        if self.did:
            done = "to converge: " + ", then ".join(self.did)
            speed = self.throttle.speed
            if waiting and self.limited and speed:
                done += f"; its speed limit of {speed / 1e6:.0f} MB/s is too low"
            return done
        # All was copied once, and some of it again.
        chasing = waiting and r.total > (self.first or 0)
        if chasing and not self._blocking and r.known and r.demand >= r.copy_rate * EVEN:
            return (
                f"does not converge: the guest writes {r.demand / 1e6:.0f} MB/s and "
                f"{r.copy_rate / 1e6:.0f} MB/s are copied; use copy-mode write-blocking, "
                "a higher speed, or converge-by"
            )
        return self.note

    # Verbs -----------------------------------------------------------------------------------

    def resume(self) -> None:
        self._rates.restart()  # it has stood still
        self._tap_error = None  # of a write while it did: the range is dirty, and tried again
        super().resume()

    def cancel(self, force: bool = True) -> None:
        """Softly, a ready mirror ends as a consistent copy; anything else is called off."""
        with self.changed:
            if not force and self.status in (Status.READY, Status.STANDBY):
                self.pivot = False
                self.completing = True
                self.user_paused = False
                self.changed.notify_all()
                return
        super().cancel(force)

    def change(self, copy_mode: str | None = None) -> None:
        """Switch the copy mode, either way. Raises `CowferryError`."""
        with self.changed:
            allow(self.id, self.status, "change")
        if copy_mode not in MODES:
            raise CowferryError(f"Parameter 'copy-mode' does not accept value '{copy_mode}'")
        if copy_mode == self.copy_mode:
            return
        with self.disk.exclusive():
            if self._attached:
                self.hot = None
                self._mode(copy_mode)
            else:  # not begun, or over meanwhile
                self.copy_mode = copy_mode

    # The end ---------------------------------------------------------------------------------

    def approach(self) -> None:
        """What was dirtied while the job was pending, and most of the flush, before the drain."""
        if not self._blocking or self.hot is not None:
            self._block()  # nothing is added to what is left
        while self.dirty.count() > FEW * self.granularity and (runs := self._next()):
            self.copy_runs(runs)
        self.target.flush()

    def drains(self) -> list[Disk]:
        return [self.disk]

    def strands(self) -> list[Node]:
        return [] if self.inside else [self.target]

    def settle(self) -> None:
        self._copy_all()
        if self._record is not None and self._lasts:
            self.target.set_backing(*self._record)
        elif not self.inside and self.target.backing is None and self.target.backing_spec:
            self.target.set_backing(None, None)  # a whole copy: what it was over must not show
        self.target.flush()
        if self.pivot and self.carry:
            self._bitmaps = keeper.carry(self.source, self.target)

    def unsettle(self) -> None:
        if self._bitmaps is not None:
            before, self._bitmaps = self._bitmaps, None
            keeper.put_back(self.target, before)

    @property
    def _lasts(self) -> bool:
        """The target is something by itself: not what was written over a disk that goes on."""
        return self.pivot or self._backing is not self.source

    def moves(self) -> list[Move]:
        return self._moving() if self.pivot else []

    def switch(self) -> None:
        self._detach()
        self._lent = self._lent and not self._lasts
        if self.pivot:
            self.disk.root = self.target

    def parted(self) -> None:
        if not self.pivot and self._lasts and not self.inside:
            moves.apart(self.target.filename, self.disk.root.filename)
        if self.pivot and self._switched is not None:
            self._switched()
        if self.unfinished is not None:
            self._finished(self.unfinished)
        if self.pivot and self._detached is not None:
            self._detached()

    def _finished(self, copy: Unfinished) -> None:
        try:
            if self.pivot:
                copy.over()
            else:
                self.source.flush()  # most of what is flushed inside the drain
                with self.disk.exclusive():
                    copy.over()
        except (OSError, CowferryError):
            log.exception("what was kept beside '%s' could not be removed", copy.target)

    def clean(self) -> None:
        try:
            if self._attached:
                self._behind = True  # no guest waits for the target any more, and none goes on
                self.scope.call_off("the job is over")
                self.disk.in_drain(self._detach, DETACH_SECONDS)
            if self._lent:
                self.target.backing = None
        finally:
            if self._released is not None:
                self._released()


def _flushed(node: Node) -> int:
    node.flush()
    return 0
