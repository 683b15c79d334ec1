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
inside the gate of the disk over it, so that its readers see one version or the other never half.

If old bytes can be saved nowhere, `on_cbw_error` says who loses: the guest its write, or the backup
its point in time.

A bitmap goes on recording during the job. In the end the policy says which bits stay: those written
since T0 (it succeeded), all of them (it failed; B3), or since T0 and what was not copied (always).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cowferry.block import sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.copy import Copier, Kind, spans
from cowferry.block.disk import Disk
from cowferry.block.gate import Gate
from cowferry.block.node import Extent, Node, read
from cowferry.block.spill import UNIT, Spill
from cowferry.jobs.job import Job, Progress, ReadFailed

MIN_CHUNK = 1 << 20
MAX_CHUNK = 8 << 20  # read into memory at once
MAX_CLONE = 64 << 20  # shared between files at once
STEP = 0.02  # seconds a chunk should take: a guest's write to it waits for as long
IDLE = 0.25  # seconds between looks while there is nothing to do
CROWDED = 256 << 20  # bytes in the scratch file: moving those on comes first
WRITEBACK = 1 << 20  # runs of this size are handed to the disk at once
BITMAP_MODES = ("on-success", "never", "always")
CBW_POLICIES = ("break-guest-write", "break-snapshot")


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

    `base`: what only it, or a layer below, could answer is not copied (sync top). `bitmap`: what is
    pending at T0 is what it says if `by_bitmap`, and `bitmap_mode` says what becomes of it.
    `everything` False: only what is about to be overwritten (sync none)."""

    type = "backup"

    def __init__(
        self,
        disk: Disk,
        target: Disk,
        *,
        base: Node | None = None,
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
        released: Callable[[bool], None] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(length=disk.size, on_error=on_source_error, **common)
        self.disk = disk
        self.source = disk.root
        self.target = target
        self.base = base
        self.everything = everything
        self.bitmap = bitmap
        self.by_bitmap = by_bitmap
        self.bitmap_mode = bitmap_mode
        self.on_target_error = on_target_error
        self.on_cbw_error = on_cbw_error
        self.max_chunk = max_chunk or MAX_CHUNK
        # What is to be saved and is not yet: cleared inside the gate, with the bytes in hand.
        self.pending = Bitmap("", disk.size, UNIT)
        self.missing = Bitmap("", disk.size, UNIT)  # what the target does not have, of all that
        self.since: Bitmap | None = None  # what was written since T0, for the bitmap
        self.spill = Spill(disk.size, scratch, scratch_limit)
        self.copier = Copier()
        self.clones: bool | None = None  # whether the two files can share bytes; None: not known
        self.chunk = MIN_CHUNK
        self.cursor = 0
        self.broke: OSError | None = None  # why the point in time is lost
        self._buffer = memoryview(bytearray(0))  # what `_hand` lies in, used again and again
        self._saving = Gate()  # a unit is saved by one of those who overwrite parts of it
        self._hand: list[tuple[int, memoryview | None]] = []  # read, not written; None: zeroes
        self._attached = False
        self._ended = False  # well
        self._released = released

    @property
    def holds(self) -> Bitmap | None:
        """Where a guest's write has to come by."""
        return self.pending

    # The moment --------------------------------------------------------------------------

    def attach(self) -> None:
        """T0. Inside a drain of the disk."""
        bitmap = self.bitmap
        if self.by_bitmap and bitmap is not None:
            for offset, length in bitmap.runs():
                self.pending.set(offset, length)
        else:
            self.pending.set(0, self.disk.size)
        if self.everything:
            self.missing.merge(self.pending)
            self.length = self.pending.count()
        if bitmap is not None:
            self.since = Bitmap("", self.disk.size, bitmap.granularity)
            self.since.recording = bitmap.recording
            bitmap.busy = "backup"
            self.disk.bitmaps[self._key] = self.since
        self.disk.taps = (*self.disk.taps, self)
        self._attached = True

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
        while True:
            if self.broke is not None:
                raise self.broke
            begin = time.monotonic()
            runs, spilled = self._next()
            if not runs:
                if self.everything:
                    break
                yield Progress(idle=IDLE)
                continue
            if not spilled and self.clones is not False:
                shared = yield from self.attempt("write", partial(self._share, runs))
                if shared is None:
                    self._give_up(runs)
            else:
                loaded = yield from self.attempt("read", partial(self.load, runs, spilled))
                if loaded is None:
                    self._give_up(runs)
                elif (yield from self.attempt("write", self.store)) is not None and spilled:
                    for offset, length in runs:
                        self.spill.drop(offset, length)
            length = sum(n for _, n in runs)
            self._adapt(time.monotonic() - begin, length)
            yield Progress(done=length, moved=length)
        yield from self.attempt("write", self._flush)

    def _next(self) -> tuple[list[tuple[int, int]], bool]:
        """The next runs to be copied, and whether they are spilled."""
        limit = self._limit()
        crowded = self.spill.filed > CROWDED
        for spilled in (True, False) if crowded else (False, True):
            if spilled:
                runs = list(self.spill.runs(min(limit, self.max_chunk)))
            else:
                runs = self._pending_runs(limit) if self.everything else []
            if runs:
                return runs, spilled
        return [], False

    def _pending_runs(self, limit: int) -> list[tuple[int, int]]:
        for again in (False, True):
            for offset, length in self.pending.runs(self.cursor):
                length = min(length, limit)
                self.cursor = offset + length
                return [(offset, length)]
            if again or not self.cursor:
                break
            self.cursor = 0
        return []

    def _limit(self) -> int:
        limit = self.chunk
        if self.clones is None:
            limit = UNIT  # the first piece finds out
        elif not self.clones:
            limit = min(limit, self.max_chunk)
        if self.throttle.speed:
            limit = min(limit, self.throttle.speed // 10)
        return max(limit // UNIT, 1) * UNIT

    def _adapt(self, took: float, length: int) -> None:
        if length < self.chunk // 2:
            return
        if took < STEP / 2:
            self.chunk = min(self.chunk * 2, MAX_CLONE)
        elif took > STEP * 2:
            self.chunk = max(self.chunk // 2, MIN_CHUNK)

    def _give_up(self, runs: list[tuple[int, int]]) -> None:
        """An error was ignored: the range stays missing, and the job fails in the end."""
        self._hand = []
        for offset, length in runs:
            self.pending.clear(offset, length)
            if self.spill.held.any(offset, length):
                self.spill.drop(offset, length)

    def load(self, runs: list[tuple[int, int]], spilled: bool) -> int:
        """Have the old bytes of the runs in hand: from then on a guest may overwrite them."""
        hand: list[tuple[int, memoryview | None]] = []
        used = 0  # bytes of the buffer
        total = sum(n for _, n in runs)
        if len(self._buffer) < total:
            self._buffer = memoryview(bytearray(total))
        for offset, length in runs:
            if spilled:
                buf = self._buffer[used : used + length]
                used += length
                self.spill.take(buf, offset)
                hand.append((offset, buf))
                continue
            with self.disk.shared(offset, length):
                for at, n in list(self.pending.runs(offset, length)):
                    n = min(at + n, offset + length) - at
                    for span in spans(self.source, at, n, UNIT, self.base):
                        if span.kind is Kind.KEEP:
                            self.missing.clear(span.offset, span.length)
                        elif span.kind is Kind.ZERO:
                            hand += self._zeroes(span.offset, span.length)
                        else:
                            buf = self._buffer[used : used + span.length]
                            used += span.length
                            read(self.source, buf, span.offset)
                            hand.append((span.offset, buf))
                self.pending.clear(offset, length)
            self.disk.leases.drop(offset, offset + length)
        self._hand = hand
        return sum(len(b) for _, b in hand if b is not None)

    def _zeroes(self, offset: int, length: int) -> list[tuple[int, memoryview | None]]:
        """Zeroes in hand: as many entries as there are units, for an entry has no length."""
        return [(at, None) for at in range(offset, offset + length, UNIT)]

    def store(self) -> int:
        """Write to the target what is in hand. Raises `OSError`; then it stays in hand."""
        moved = 0
        while self._hand:
            offset, data = self._hand[0]
            count = 1
            if data is None:  # neighbours together
                while count < len(self._hand) and self._hand[count] == (
                    offset + count * UNIT,
                    None,
                ):
                    count += 1
                length = min(count * UNIT, self.disk.size - offset)
            else:
                length = len(data)
            self._put(offset, length, data)
            moved += length if data is not None else 0
            del self._hand[:count]
        return moved

    def _put(self, offset: int, length: int, data: memoryview | None) -> None:
        """Old bytes (None: zeroes) reach the target."""
        root = self.target.root
        with self.target.exclusive(offset, length):
            root.changing(offset, length)
            if data is None:
                root.zero(offset, length, unmap=True)
            else:
                root.pwrite(data, offset)
                if length >= WRITEBACK:
                    for e in root.extents(offset, length):
                        if e.fd >= 0:
                            sysio.start_writeback(e.fd, e.host, e.length)
        self.missing.clear(offset, length)

    def _share(self, runs: list[tuple[int, int]]) -> int:
        """Copy between the files, shared where the file system can; the bytes that were moved.

        Shared bytes take no time, so this is inside the gate. What is dirty is written out before,
        or the clone would wait for it there."""
        moved = 0
        for offset, length in runs:
            if self.clones:
                for e in self.disk.extents(offset, length):
                    if e.fd >= 0:
                        sysio.write_out(e.fd, e.host, e.length)
            with self.disk.shared(offset, length):
                for at, n in list(self.pending.runs(offset, length)):
                    n = min(at + n, offset + length) - at
                    for span in spans(self.source, at, n, UNIT, self.base):
                        if span.kind is not Kind.KEEP:
                            moved += self._place(span)
                        self.missing.clear(span.offset, span.length)
                    self.pending.clear(at, n)
            self.disk.leases.drop(offset, offset + length)
        if self.clones is None and (self.copier.cloned or self.copier.moved):
            self.clones = bool(self.copier.cloned)
        return moved

    def _place(self, span: Any) -> int:
        try:
            with self.target.exclusive(span.offset, span.length):
                self.target.root.changing(span.offset, span.length)
                self.copier.place(self.source, self.target.root, span)
        except OSError as error:
            raise self._blame(error, span.offset, span.length) from error
        return int(span.length) if span.kind is Kind.COPY else 0

    def _blame(self, error: OSError, offset: int, length: int) -> OSError:
        """Whose error it was: the source's, if it cannot be read now."""
        scratch = memoryview(bytearray(min(length, MIN_CHUNK)))
        try:
            for at in range(offset, offset + length, len(scratch)):
                read(self.source, scratch[: min(len(scratch), offset + length - at)], at)
        except OSError as cause:
            return ReadFailed(cause.errno, cause.strerror or str(cause))
        return error

    def _flush(self) -> int:
        self.target.flush()
        return 0

    def policy(self, operation: str) -> str:
        return self.on_error if operation == "read" else self.on_target_error

    # A tap of the disk -------------------------------------------------------------------

    def before(self, offset: int, length: int) -> None:
        """A guest is about to overwrite the range: its old bytes are saved first (K2)."""
        start = offset // UNIT * UNIT
        end = min(-(-(offset + length) // UNIT) * UNIT, self.disk.size)
        if not self.pending.any(start, end - start):
            return
        claim = self._saving.claim(start, end)
        try:
            for at, n in list(self.pending.runs(start, end - start)):
                self._save(at, min(at + n, end) - at)
        finally:
            self._saving.release(claim)

    def _save(self, offset: int, length: int) -> None:
        for span in spans(self.source, offset, length, UNIT, self.base):
            if span.kind is not Kind.KEEP or not self.everything:
                for at in range(span.offset, span.offset + span.length, UNIT):
                    n = min(UNIT, span.offset + span.length - at)
                    if not self._save_unit(at, n, span.kind is Kind.ZERO):
                        return
            else:
                self.missing.clear(span.offset, span.length)
            self.pending.clear(span.offset, span.length)

    def _save_unit(self, offset: int, length: int, zero: bool) -> bool:
        """False: the point in time is lost, and there is nothing left to save."""
        try:
            buf = memoryview(bytearray(length))
            if not zero:
                read(self.source, buf, offset)
            if self.everything:
                try:
                    self.spill.put(offset, bytes(buf))
                except OSError:  # no room: then the guest waits for the target after all
                    self._put(offset, length, None if zero else buf)
            else:
                self._put(offset, length, None if zero else buf)
        except OSError as error:
            if self.on_cbw_error == "break-guest-write":
                raise
            self._break(error)
            return False
        return True

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
        if root.backing is self.source:
            with self.target.exclusive():
                root.backing = Lost(self.disk.size, self.source.filename)

    def after(self, offset: int, length: int, data: memoryview | None) -> None:
        """Nothing to do: the target wants what was there before."""

    def failed(self, offset: int, length: int) -> None:
        """Nothing to do: the old bytes are saved all the same."""

    # The end -----------------------------------------------------------------------------

    def approach(self) -> None:
        self.target.flush()

    def drains(self) -> list[Disk]:
        return [self.disk]

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

    def _keep(self) -> None:
        """What is on disk of the bitmap follows."""
        keeper = self.source.keeper
        if self.bitmap is not None and self.bitmap.persistent and keeper is not None:
            with self.disk.exclusive():
                keeper.checkpoint()

    def clean(self) -> None:
        try:
            self._lose()
            if self._attached:
                with self.disk.exclusive():
                    self._settle_bitmap()
                    self.detach()
                if self.bitmap_mode == "always":
                    self._keep()
        finally:
            self.spill.close()
            if self._released is not None:
                self._released(not self._ended)

    def details(self) -> dict[str, Any]:
        return {"x-scratch": self.spill.filed}
