"""Backup: what a disk held at one moment, copied elsewhere while its guest goes on writing.

    T0                          the moment at which the job is attached, inside a drain
    target                      ends as the exact bytes of T0 (K1)

The job is a tap of the disk. Where a range is still *pending* no write lease is handed out, so a
guest's write comes by, and its old bytes are saved before they are overwritten (K2): into a spill
(`block/spill.py`), not to the target, so that the guest waits for a copy in memory and never for a
slow target. Once saved, or copied, a range is pending no more, gets its write leases back, and the
guest is as fast as ever. The job itself reads a chunk inside the gate and writes it to the target
outside.

What is pending at T0 is the kind of backup: everything (full), what the top layer holds (top), what
a dirty bitmap says (incremental, bitmap), or everything that will be overwritten and nothing else
(none): then the target is an overlay of the disk that shows the disk as it was at T0, and is
exported while the job runs (a pull backup, "fleecing"). There old bytes go to the target at once,
inside the gate of the disk over it, so that its readers see one version or the other, never half.

If old bytes can be saved nowhere, `on_cbw_error` says who loses: the guest its write, or the backup
its point in time.

A bitmap goes on recording during the job. In the end the policy says which bits stay: those written
since T0 (it succeeded), all of them (it failed; B3), or since T0 and what was not copied (always).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from cowferry.block import lineage, sysio
from cowferry.block.behind import LEAST, Behind
from cowferry.block.bitmap import Bitmap, finest
from cowferry.block.compress import Compressed
from cowferry.block.copy import Copier, Kind, Span, differing, spans
from cowferry.block.disk import Disk
from cowferry.block.gate import Gate
from cowferry.block.node import ONCE, Extent, Node, State, far, read, resolve
from cowferry.block.rates import fitted
from cowferry.block.spill import UNIT, Spill
from cowferry.block.throttle import WRITE
from cowferry.errors import CowferryError
from cowferry.jobs.job import Job, Progress, blame, check_speed
from cowferry.jobs.states import Status

T = TypeVar("T")

MIN_CHUNK = 1 << 20
MAX_CHUNK = 2 << 20  # read into memory at once: more does not stay in the cache
MAX_CLONE = 64 << 20  # shared between files at once, or zeroed where there are only zeroes
STEP = 0.02  # seconds a chunk should take: a guest's write to it waits for as long
ASIDE = 512 << 10  # bytes; for less it is not worth to wake another thread
IDLE = 0.25  # seconds between looks while there is nothing to do
CROWDED = 256 << 20  # bytes in the scratch file: moving those on comes first
LOSE_SECONDS = 30.0  # that the readers of an overlay may take before they see that it is lost
DETACH_SECONDS = 2.0  # that letting go of the disk waits for requests in flight
BITMAP_MODES = ("on-success", "never", "always")
CBW_POLICIES = ("break-guest-write", "break-snapshot")


class Hand:
    """What was read of a range of `length` bytes, and is not written yet: whose the old bytes are.

    `parts` are (offset, bytes), None for a unit of zeroes; they lie in `used` bytes of `buffer`."""

    def __init__(self, length: int, buffer: memoryview) -> None:
        self.length = length
        self.buffer = buffer
        self.used = 0
        self.parts: list[tuple[int, memoryview | None]] = []


class Found(NamedTuple):
    """A range to be copied next; `empty`: a long one, with nothing but zeroes just now."""

    offset: int
    length: int
    empty: bool


class _Begun(Generic[T]):
    """A call that is made once ahead of time, by another thread if there is one.

    Called, it gives what that gave or raises what that raised; called again, it is made anew."""

    def __init__(self, call: Callable[[], T], pool: ThreadPoolExecutor | None = None) -> None:
        self._call = call
        self._first: Future[T] | None = Future()
        if pool is not None:
            self._first = pool.submit(call)
            return
        try:
            self._first.set_result(call())
        except OSError as error:
            self._first.set_exception(error)

    def wait(self) -> None:
        """Until it is under way no more."""
        if self._first is not None:
            wait([self._first])

    def __call__(self) -> T:
        first, self._first = self._first, None
        return first.result() if first is not None else self._call()


class Lost(Node):
    """What lies below the overlay of a pull backup once it is over: nobody keeps that moment."""

    driver = "lost"
    read_only = True

    def __init__(self, size: int, filename: str) -> None:
        self.size, self.filename = size, filename

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        raise OSError(errno.EIO, f"{self.filename}: the backup that kept this moment is over")


class Backup(Job):
    """The job. `target` is the disk over the node that is written.

    `base`: what only it, or a layer below, could answer is not copied (sync top). With `look` the
    target was not made just now: where it has bytes of its own, or everywhere if it is to be
    `compare`d, it is read, and what it does not show is copied. `record`: the backing file and its
    format that the target's header has to name in the end. `bitmap`: what is
    pending at T0 is what it says if `by_bitmap`, and `bitmap_mode` says what becomes of it.
    `everything` False: only what is about to be overwritten (sync none). `lasting` False: nobody
    wants the target once the job is over. `stamped` makes a durable target say that it is backup
    `backup_id`, from which the bitmap counts then. `compress`: the target can, and is to hold whole
    granules compressed."""

    type = "backup"

    def __init__(
        self,
        disk: Disk,
        target: Disk,
        *,
        base: Node | None = None,
        look: bool = False,
        compare: bool = False,
        record: tuple[str, str | None] | None = None,
        everything: bool = True,
        bitmap: Bitmap | None = None,
        by_bitmap: bool = False,
        bitmap_mode: str = "on-success",
        scratch: str | None = None,
        scratch_limit: int = 0,
        on_source_error: str = "report",
        on_target_error: str = "report",
        on_cbw_error: str = "break-guest-write",
        max_chunk: int = 0,
        lasting: bool = True,
        backup_id: bytes = b"",
        stamped: Callable[[], None] | None = None,
        compress: bool = False,
        released: Callable[[bool], None] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(length=disk.size, on_error=on_source_error, **common)
        self.disk = disk
        self.source = disk.root
        self.target = target
        target.rank = disk.rank + 1
        self.base = base
        # Whether the target may hide what is not copied, and lie over something else than `base`.
        self.look = look and base is not None
        self.compare = compare
        self._record = record  # what its header has to name in the end
        self.everything = self.paced = everything
        check_speed(self.throttle.speed, self.paced)
        self.bitmap = bitmap
        self.by_bitmap = by_bitmap
        self.bitmap_mode = bitmap_mode
        self.on_target_error = on_target_error
        self.on_cbw_error = on_cbw_error
        self.max_chunk = max_chunk or MAX_CHUNK
        self.lasting = lasting
        self.backup_id = backup_id or lineage.new_id()  # from which the bitmap counts in the end
        self._stamped = stamped
        self.compress = compress
        self.unit = max(UNIT, target.root.granule) if compress else UNIT  # bytes copied as one
        # What the disk still has as it was, and nobody has saved. In pieces, for a guest waits.
        self.pending = Bitmap("", disk.size, min(finest(disk.size), UNIT) if everything else UNIT)
        self.todo = Bitmap("", disk.size, UNIT)  # what is to be copied and is not in hand yet
        self.missing = Bitmap("", disk.size, UNIT)  # what the target does not have, of all that
        self.since: Bitmap | None = None  # what was written since T0, for the bitmap
        self.spill = Spill(scratch, scratch_limit)
        self.behind = Behind()
        self.copier = Copier(self.behind)
        self.clones: bool | None = None  # whether the two files can share bytes; None: not known
        self.chunk = MIN_CHUNK
        self.cursor = 0
        self.enough = False  # of a backup that has no end of its own: it is to end well
        self.broke: OSError | None = None  # why the point in time is lost
        self._spare: list[memoryview] = []  # buffers of hands that are empty
        self._writer: ThreadPoolExecutor | None = None
        self._saving = Gate()  # a unit is saved by one of those who overwrite parts of it
        self._attached = False
        self._over = False  # no guest has to wait for it any more
        self._ended = False  # well
        self._released = released

    @property
    def holds(self) -> Bitmap | None:
        """Where a guest's write has to come by."""
        return self.pending

    @property
    def slow(self) -> bool:
        """While there is memory for old bytes, a guest's write waits for nothing else."""
        return not (self.everything and self.spill.roomy)

    # The moment --------------------------------------------------------------------------

    def attach(self) -> None:
        """T0. Inside a drain of the disk."""
        bitmap = self.bitmap
        if self.by_bitmap and bitmap is not None:
            # Whole granules of the target: what else of them is written is not a guest's, or older.
            granule = max(UNIT, self.target.root.granule)
            wanted = Bitmap("", self.disk.size, granule)
            wanted.merge(bitmap)
            for mine in (self.todo, self.pending):
                mine.merge(wanted)
        else:
            self.todo.set(0, self.disk.size)
            self.pending.set(0, self.disk.size)
        if self.everything:
            self.missing.merge(self.todo)
            self.length = self.todo.inside()
        if bitmap is not None:
            self.since = Bitmap("", self.disk.size, bitmap.granularity)
            self.since.recording = bitmap.recording
            bitmap.busy = "backup"
            self.disk.bitmaps[self._key] = self.since
        self.disk.taps = (*self.disk.taps, self)
        self._attached = True
        if self.compress or far(self.source) or far(self.target.root):
            self.clones = False  # nothing is shared with a server, nor waited for inside the gate

    def detach(self) -> None:
        """Inside a drain of the disk. May be called again."""
        self.disk.taps = tuple(t for t in self.disk.taps if t is not self)
        self.disk.bitmaps.pop(self._key, None)
        if self.bitmap is not None and self._attached:
            self.bitmap.busy = ""
        self._attached = False

    @property
    def _key(self) -> str:
        return f"#backup {id(self)}"

    # The work ----------------------------------------------------------------------------

    def run(self) -> Iterator[Progress]:
        if not self._attached:
            with self.disk.exclusive():
                self.attach()
        hand: Hand | None = None  # the next range, read and not written
        while True:
            if self.broke is not None and not self.enough:
                raise self.broke
            begin = time.monotonic()
            found = self._next() if self.everything else None
            if found is None and hand is None:
                if self.everything or self.enough:
                    break
                saved = self.disk.size - self.pending.inside()
                yield Progress(done=saved - self.offset, idle=IDLE)
                continue
            empty = found is not None and found.empty
            if found is not None and self.clones is not False and not empty:
                share = partial(self._share, found.offset, found.length)
                moved = yield from self.attempt("write", share)
                self._done_with(found.offset, found.length)
                self.behind.catch_up()
                done = found.length
            else:
                hand, done, moved = yield from self._exchange(hand, found)
            if done:
                if not empty and done >= self.chunk // 2:
                    took = time.monotonic() - begin
                    self.chunk = fitted(self.chunk, took, STEP, MIN_CHUNK, MAX_CLONE)
                yield Progress(done=done, moved=moved or 0)
        if self.lasting:
            yield from self.attempt("write", self._flush)

    def _next(self) -> Found | None:
        """The next range to be copied: in order, or out of the scratch file if that is large."""
        limit = self._limit()
        if self.spill.filed > CROWDED and self.spill.oldest >= 0:
            self.cursor = self.spill.oldest // self.unit * self.unit
        for _ in range(2):
            for offset, length in self.todo.runs(self.cursor):
                empty = self._empty(offset, min(length, MAX_CLONE), limit)
                long = empty > limit
                length = empty if long else min(length, limit - offset % self.unit)
                self.cursor = offset + length
                return Found(offset, length, long)
            self.cursor = 0
        return None

    def _empty(self, offset: int, length: int, step: int) -> int:
        """How many bytes from there on are zeroes, or are not to be copied: as it is just now.

        Looked for `step` bytes ahead, then farther and farther, for where runs are many it is dear
        to look at all of them again for each chunk."""
        end, stop = offset, offset + length
        with suppress(OSError):  # whoever reads it will be told
            while end < stop:
                ahead = min(step, stop - end)
                with self.disk.shared(end, ahead):
                    for e in resolve(self.source, end, ahead, self.base):
                        if e.state is State.DATA or (self.look and e.state is State.HOLE):
                            stop = end
                            break
                        end += e.length
                step *= 2
        if end < offset + length:
            end = max(end // self.unit * self.unit, offset)
        return 0 if self.spill.pieces(offset, end - offset) else end - offset

    def _limit(self) -> int:
        limit = self.max_chunk if self.compress else self.chunk
        if self.target.turnstiles:
            self.clones = False  # what is shared would pass them unseen
            limit = min(limit, 4 * UNIT)
        elif self.clones is None:
            limit = UNIT  # the first piece finds out
        elif not self.clones:
            limit = min(limit, self.max_chunk)
        if self.throttle.speed:
            limit = min(limit, self.throttle.speed // 10)
        return max(limit // self.unit, 1) * self.unit

    def _exchange(
        self, full: Hand | None, found: Found | None
    ) -> Generator[Progress, None, tuple[Hand | None, int, int | None]]:
        """Write what is in hand while the next range is read into the other.

        That other, the bytes that are done with, and how many of them were moved. Nothing is
        under way whenever this yields."""
        done, moved = 0, None
        writing = reading = None
        if full is not None:
            aside = found is not None and full.used >= ASIDE
            writing = _Begun(partial(self._store, full), self._aside() if aside else None)
        if found is not None:
            reading = _Begun(partial(self.load, found.offset, found.length))
        if writing is not None and full is not None:
            writing.wait()
            moved = yield from self.attempt("write", writing)
            done = full.length
            self._spare.append(full.buffer)
        hand = None
        if reading is not None and found is not None:
            hand = yield from self.attempt("read", reading)
            if hand is None:  # its error is ignored, and it stays missing
                self._done_with(found.offset, found.length)
                done += found.length
        return hand, done, moved

    def _aside(self) -> ThreadPoolExecutor:
        """The thread that writes while the job's own reads."""
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"backup {self.id[:32]}")
        return self._writer

    def _done_with(self, offset: int, length: int) -> None:
        """The target has the range; or it never will."""
        self.todo.clear(offset, length)
        self.pending.clear(offset, length)
        self.spill.drop(offset, length)

    def load(self, offset: int, length: int) -> Hand:
        """Have the old bytes of the range in hand: from then on a guest may overwrite them."""
        room = min(length, max(self.max_chunk, self.unit))  # a longer one has only zeroes
        buffer = self._spare.pop() if self._spare else memoryview(bytearray(room))
        if len(buffer) < room:
            buffer = memoryview(bytearray(room))
        hand = Hand(length, buffer)
        with self.disk.shared(offset, length):
            for at, n in self._left(offset, length):
                whole = at % self.unit == 0 and (n % self.unit == 0 or at + n == self.disk.size)
                grain = self.unit if whole else UNIT
                for span in spans(self.source, at, n, grain, self.base):
                    saved = self.spill.pieces(span.offset, span.length)
                    if span.kind is Kind.KEEP and not saved:
                        self.missing.clear(span.offset, span.length)
                        for start, wrong in self._hidden(span):
                            self.missing.set(start, wrong)
                            buf = memoryview(bytearray(wrong))
                            read(self.base, buf, start, ONCE)
                            hand.parts.append((start, buf))
                    elif span.kind is Kind.ZERO and not saved:
                        hand.parts += [
                            (unit, None)
                            for unit in range(span.offset, span.offset + span.length, UNIT)
                        ]
                    else:
                        buf = buffer[hand.used : hand.used + span.length]
                        hand.used += span.length
                        if len(buf) < span.length:  # somebody has just written there after all
                            buf = memoryview(bytearray(span.length))
                        read(self.source, buf, span.offset, ONCE)
                        self.spill.lay(buf, span.offset)
                        hand.parts.append((span.offset, buf))
            self.pending.clear(offset, length)
            self.todo.clear(offset, length)
        self.disk.leases.drop(offset, offset + length)
        self.spill.drop(offset, length)
        return hand

    def _left(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The runs of the range that are still to be done. Inside the gate."""
        end = offset + length
        return [(at, min(at + n, end) - at) for at, n in self.todo.runs(offset, length)]

    def _store(self, hand: Hand) -> int:
        """`store`, by whichever thread: what it waits for ends with the job."""
        with self.scope:
            return self.store(hand)

    def store(self, hand: Hand) -> int:
        """Write to the target what is in hand. Raises `OSError`; what is left stays in hand."""
        moved, parts = 0, hand.parts
        while parts:
            offset, data = parts[0]
            count = 1
            if data is None:  # neighbours together
                while count < len(parts) and parts[count] == (offset + count * UNIT, None):
                    count += 1
                length = min(count * UNIT, self.disk.size - offset)
            else:
                length = len(data)
            # Its own limits, if it has any: as a guest's zeroes, ours are no bytes.
            self.target.wait(WRITE, length if data is not None else 0, lambda: self.cancelling)
            self._put(offset, length, data)
            if data is not None and length >= LEAST:
                self._leave_behind(offset, length)
            moved += length if data is not None else 0
            del parts[:count]
        self.behind.catch_up()
        return moved

    def _leave_behind(self, offset: int, length: int) -> None:
        """What was written there leaves memory."""
        with self.target.shared(offset, length):
            for e in self.target.root.extents(offset, length):
                if e.fd >= 0:
                    self.behind.wrote(e.fd, e.host, e.length)

    def _put(self, offset: int, length: int, data: memoryview | None) -> None:
        """Old bytes (None: zeroes) reach the target."""
        root = self.target.root
        if self.compress and data is not None:
            with Compressed(root, offset, data) as packed, self.target.exclusive(offset, length):
                root.changing(offset, length)
                packed.put()
            self.missing.clear(offset, length)
            return
        with self.target.exclusive(offset, length):
            root.changing(offset, length)
            if data is None:
                root.zero(offset, length, unmap=True)
            else:
                root.pwrite(data, offset)
        self.missing.clear(offset, length)

    def _share(self, offset: int, length: int) -> int:
        """Copy between the files, shared where the file system can; the bytes that were moved.

        Shared bytes take no time, so this is inside the gate. What is dirty is written out before,
        or the clone would wait for it there."""
        moved = 0
        if self.clones:
            for e in self.disk.extents(offset, length):
                if e.fd >= 0:
                    sysio.write_out(e.fd, e.host, e.length)
        with self.disk.shared(offset, length):
            for at, n in self._left(offset, length):
                for span in spans(self.source, at, n, UNIT, self.base):
                    if span.kind is not Kind.KEEP:
                        moved += self._place(span)
                    else:
                        for start, wrong in self._hidden(span):
                            moved += self._place(Span(start, wrong, Kind.COPY))
                    for p in self.spill.pieces(span.offset, span.length):
                        buf = memoryview(bytearray(p.length))
                        self.spill.fill(buf, p)
                        self._put(p.offset, p.length, buf)
                    self.missing.clear(span.offset, span.length)
                self.pending.clear(at, n)
                self.todo.clear(at, n)
        self.disk.leases.drop(offset, offset + length)
        if self.clones is None and (self.copier.cloned or self.copier.moved):
            self.clones = bool(self.copier.cloned)
        return moved

    def _hidden(self, span: Span) -> list[tuple[int, int]]:
        """Where the target does not show what only `base` answers for. Inside the gate."""
        if not self.look:
            return []
        base, root, unit = self.base, self.target.root, self.unit
        return list(differing(base, root, span.offset, span.length, unit, self.compare))

    def _place(self, span: Span) -> int:
        try:
            with self.target.exclusive(span.offset, span.length):
                self.copier.place(self.source, self.target.root, span)
        except OSError as error:
            raise blame(error, self.source, span.offset, span.length) from error
        return span.length if span.kind is Kind.COPY else 0

    def _flush(self) -> int:
        self.target.flush()
        return 0

    def doing(self, operation: str) -> str:
        if operation == "read":
            return f"reading '{self.source.filename}'"
        return f"writing '{self.target.root.filename}'"

    def policy(self, operation: str) -> str:
        return self.on_error if operation == "read" else self.on_target_error

    # A tap of the disk -------------------------------------------------------------------

    def before(self, offset: int, length: int) -> None:
        """A guest is about to overwrite the range: its old bytes are saved first (K2)."""
        piece = self.pending.granularity
        start = offset // piece * piece
        end = min(-(-(offset + length) // piece) * piece, self.disk.size)
        if not self.pending.any(start, end - start):
            return
        if self._over:  # the disk could not be let go of yet
            return
        claim = None
        if self.source.granule < UNIT:  # or the guest has entered whole units
            claim = self._saving.claim(start // UNIT * UNIT, -(-end // UNIT) * UNIT)
        try:
            with self.scope:  # what the guest waits for ends with the job
                for at in range(start // UNIT * UNIT, end, UNIT):  # a unit, or what is touched
                    self._save(at, max(at, start), min(at + UNIT, end))
        except OSError as error:
            over = self.cancelling or self.status is Status.ABORTING  # the backup is lost anyway
            if self.on_cbw_error == "break-guest-write" and not over:
                raise
            self._break(error)
        finally:
            if claim is not None:
                self._saving.release(claim)

    def _save(self, unit: int, start: int, end: int) -> None:
        """Of one unit, the bytes from `start` to `end`, if they are pending."""
        whole = min(unit + UNIT, self.disk.size) - unit
        if self.base is not None and not self.look and self._kept(unit, whole):
            for bitmap in (self.pending, self.todo, self.missing):
                bitmap.clear(unit, whole)  # or what the guest writes would look like old bytes
            return
        for at, n in list(self.pending.runs(start, end - start)):
            n = min(at + n, end) - at
            old = bytearray(n)
            self.source.pread(memoryview(old), at)
            if not self.everything:
                self._put(at, n, memoryview(old))
            else:
                zero = not old[0] and old == bytes(n)
                try:
                    self.spill.put(at, n, None if zero else old)
                except OSError:  # no room: then the guest waits for the target after all
                    self._unload(unit, whole)
                    return
            self.pending.clear(at, n)

    def _kept(self, unit: int, length: int) -> bool:
        """Whether only what is below `base` answers for the unit: the target shows that, too."""
        return self.todo.any(unit, 1) and all(
            s.kind is Kind.KEEP for s in spans(self.source, unit, length, UNIT, self.base)
        )

    def _unload(self, unit: int, length: int) -> None:
        """The whole unit goes to the target at once. Raises `OSError`; then nothing has changed.

        The unit may be larger than what the guest has entered. The rest of it nobody can change:
        while it is pending, whoever would has to come by, and waits for us."""
        buf = memoryview(bytearray(length))
        read(self.source, buf, unit)
        self.spill.lay(buf, unit)
        self._put(unit, length, buf)
        for bitmap in (self.pending, self.todo):
            bitmap.clear(unit, length)
        self.spill.drop(unit, length)

    def _break(self, error: OSError) -> None:
        """The guest goes on; what it overwrites now, the backup has lost."""
        self.broke = OSError(
            error.errno, f"old data could not be saved, the backup is broken: {error.strerror}"
        )
        self.pending.clear(0, self.disk.size)
        self._lose()
        with self.changed:
            self.changed.notify_all()

    def _lose(self) -> None:
        """Whoever reads the overlay of a pull backup is not to see bytes of another moment."""
        root = self.target.root

        def lose() -> None:
            if root.backing is self.source:
                root.backing = Lost(self.disk.size, self.source.filename)

        if root.backing is self.source and not self.target.in_drain(lose, LOSE_SECONDS):
            lose()  # a read that hangs has begun before

    def after(self, offset: int, length: int, data: memoryview | None) -> None:
        """Nothing to do: the target wants what was there before."""

    def failed(self, offset: int, length: int) -> None:
        """Nothing to do: the old bytes are saved all the same."""

    # The end -----------------------------------------------------------------------------

    def approach(self) -> None:
        self._lose()
        if self.lasting:
            self.target.flush()
            if self._record is not None:
                self.target.root.set_backing(*self._record)
            if self._stamped is not None:
                self._stamped()

    def suffice(self) -> None:
        """Whoever reads the overlay of a pull backup has all of it: end, and end well.

        If the moment was kept until now; if it is lost later, nobody misses it."""
        with self.changed:
            self.enough = self.broke is None
            self.changed.notify_all()

    def drains(self) -> list[Disk]:
        return [self.disk]

    def strands(self) -> list[Node]:
        return [self.target.root]

    def switch(self) -> None:
        self._ended = True
        self._settle_bitmap()
        self.detach()

    def parted(self) -> None:
        self._keep()

    def _settle_bitmap(self) -> None:
        """Inside a drain: which bits stay (B3)."""
        bitmap, since = self.bitmap, self.since
        if bitmap is None or since is None or not self._attached:
            return
        if self.bitmap_mode == "never" or (not self._ended and self.bitmap_mode != "always"):
            return
        if not self._ended:
            since.merge(self.missing)
        bitmap.replace(since.bits)
        bitmap.since = self.backup_id if bitmap.recording else b""

    def _let_go(self) -> None:
        """Inside a drain."""
        self._settle_bitmap()
        self.detach()

    def _secure(self) -> None:
        """It failed. What the bitmap is to let go of has to be durable on the target."""
        if self.bitmap is not None and self.bitmap_mode == "always":
            try:
                self.target.flush()
                if self._stamped is not None:
                    self._stamped()
            except (OSError, CowferryError):
                self.bitmap_mode = "on-success"  # nothing is to be relied on: every bit stays

    def _keep(self) -> None:
        """What is on disk of the bitmap follows."""
        keeper = self.source.keeper
        if self.bitmap is not None and self.bitmap.persistent and keeper is not None:
            self.source.flush()  # most of what is flushed inside the drain
            with self.disk.exclusive():
                keeper.checkpoint()

    def clean(self) -> None:
        try:
            if self._attached or self._ended:
                self._lose()
            if self._attached:
                self._secure()
                self._over = True
                self.disk.in_drain(self._let_go, DETACH_SECONDS)
                if self.bitmap_mode == "always":
                    self._keep()
        finally:
            if self._writer is not None:
                self._writer.shutdown(wait=self.scope.reason is None)
            self.spill.close()
            self.behind.close()
            released = self._released
            self._released = self._stamped = None  # whose they are knows the job, too
            if released is not None:
                released(not self._ended)

    def details(self) -> dict[str, Any]:
        return {"x-scratch": self.spill.filed}
