"""Following a disk: how the bytes of a disk reach a target while guests write the disk.

A bitmap says which granules the target does not have yet. Copying a granule is: clear its bit,
then read what the disk has and write it to the target. A guest's write sets the bit before it
leaves the gate. So whichever comes second is seen by the other, and at every moment the target
differs from the disk only where a bit is set or a request is in flight (M1). The copy itself does
not enter the range: whatever a guest changes there meanwhile is copied again, so no guest waits for
the target. While files are copied the job is in the way of drains, so that none of them is closed.
What goes to a server is read into memory first, and nothing at all waits while it is written.

As a tap of the disk, the job sees to it that a guest's write goes to both sides inside the gate and
is answered when both have it (M3); what the target refuses becomes a set bit, never skipped. The
target has a gate of its own. The copy of a chunk holds it from before it reads the disk until the
target has the bytes, so a guest's write to the same range reaches the target after the older bytes
of the copy. A target that has not taken a guest's write within `TAP_SECONDS` has failed, too.

A target may be a node below the disk's own root. Its mapping must not change under a reader of the
chain, so a chunk that needs it is copied exclusively; one that overwrites what the layers above
cover is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from cowferry.block.bitmap import Bitmap, finest
from cowferry.block.copy import Copier, Kind, spans
from cowferry.block.disk import Disk
from cowferry.block.gate import Claim, Gate
from cowferry.block.node import Node, chain, far, read, served_plainly
from cowferry.block.scope import CalledOff, Scope
from cowferry.jobs.job import Job, ReadFailed, blame

Enter = Callable[[int, int], AbstractContextManager[None]]  # into a range: offset, length

MIN_CHUNK = 1 << 20
MAX_CHUNK = 64 << 20
PIECE = 128 << 10  # bytes of a small piece moved through memory at once
TAP_SECONDS = 20.0  # that a guest's write waits for the target at most


class Follower(Job):
    """A job that lets `target` follow `disk`. What is copied when is a subclass's business.

    `granularity` in bytes: of the bitmap; None: as fine as is sensible. `fresh`: nothing has been
    copied so far. `remember`: which granules were copied, and which of them were written since."""

    def __init__(
        self,
        disk: Disk,
        target: Node,
        *,
        granularity: int | None,
        fresh: bool,
        remember: bool,
        **common: Any,
    ) -> None:
        super().__init__(length=disk.size, **common)
        self.disk = disk
        self.source = disk.root
        self.target = target
        self.granularity = granularity or finest(disk.size)
        self.inside = any(n is target for n in chain(disk.root))
        self.unit = max(self.granularity, target.granule)  # what is copied for the first time
        self.dirty = Bitmap("", disk.size, self.granularity)
        self.remember = remember
        known = disk.size if remember else 0
        self.copied = Bitmap("", known, self.granularity)
        self.again = Bitmap("", known, self.granularity)
        self.hot: Bitmap | None = None  # write-blocking only there; None: everywhere
        self.copier = Copier()
        self.fresh = fresh  # nothing was gone over twice yet
        self._tap_error: OSError | None = None
        self._behind = False  # a guest's write has failed to reach the target: none waits for it
        self._last_error = ""  # of a copy, in words
        self._plain = served_plainly(target)
        self._target_gate = Gate()  # the target's granules may be larger than the disk's

    # The job's own copies --------------------------------------------------------------------

    def copy_runs(self, runs: list[tuple[int, int]]) -> int:
        """`copy` for each."""
        return sum(self.copy(offset, length) for offset, length in runs)

    def copy(self, offset: int, length: int) -> int:
        """Bring a dirty range of the target up to date; the bytes that had to be moved.

        Raises `OSError`, `ReadFailed`; the range is dirty again then."""
        self.dirty.clear(offset, length)
        try:
            if self.inside and not self._plain:
                moved = self._copy_inside(offset, length)
            else:
                try:
                    moved = self._copy_beside(offset, length, self._afloat)
                except CalledOff:
                    raise
                except OSError:
                    if not self.dirty.any(offset, length):
                        raise
                    # A guest has changed the range meanwhile: what was read was no whole thing.
                    moved = self._copy_beside(offset, length, self.disk.shared)
        except BaseException as error:
            self.dirty.set(offset, length)
            if isinstance(error, OSError):
                self._last_error = error.strerror or str(error)
            raise
        self._behind = False
        self._note_hot(offset, length)
        return moved

    def _afloat(self, offset: int, length: int) -> AbstractContextManager[None]:
        """In the way of drains alone."""
        return self.disk.afloat()

    def _copy_beside(self, offset: int, length: int, enter: Enter) -> int:
        """`copy` to a target whose mapping no reader of the disk uses. Reading is done in what
        `enter` gives for a range."""
        if self._plain:
            return self._carry(offset, length, enter)
        with enter(offset, length):
            return self._copy(offset, length)

    def _copy_inside(self, offset: int, length: int) -> int:
        """`copy` to a node of the disk's own chain, whose mapping a reader may be using."""
        with self.disk.shared(offset, length):
            done = self._in_place(offset, length)
            moved = self._copy(offset, length, changing=False) if done else 0
        if not done:
            step = max(MIN_CHUNK, self.unit)  # a guest waits for it
            for at in range(offset, offset + length, step):
                part = min(step, offset + length - at)
                with self.disk.exclusive(at, part):
                    moved += self._copy(at, part)
        return moved

    def _carry(self, offset: int, length: int, enter: Enter) -> int:
        """`copy` to a server, several pieces at once. Nobody waits while a piece is written, but
        for guests' writes to the very piece that have to reach the server after it."""
        moved: list[int] = []

        def move(buf: memoryview, done: int) -> None:
            at = offset + done
            with enter(at, len(buf)):
                claim = self._claim(at, len(buf))
                try:
                    parts = self._read(buf, at)
                except BaseException:
                    self._target_gate.release(claim)
                    raise
            try:
                moved.append(self._write(parts))
            finally:
                self._target_gate.release(claim)

        self.copier.in_pieces(length, move, far(self.target) + far(self.source))
        return sum(moved)

    def _read(self, buf: memoryview, offset: int) -> list[tuple[int, int, memoryview | None]]:
        """What the target lacks of the range of `buf`: (offset, length, bytes or None for zeroes).

        Raises `ReadFailed`."""
        parts: list[tuple[int, int, memoryview | None]] = []
        small = not self.fresh and len(buf) < MIN_CHUNK
        try:
            for span in spans(self.source, offset, len(buf), self.granularity, self._shines()):
                data = buf[span.offset - offset :][: span.length]
                if span.kind is Kind.COPY:
                    read(self.source, data, span.offset)
                    zero = small and not self.inside and data == bytes(len(data))
                    parts.append((span.offset, span.length, None if zero else data))
                elif span.kind is Kind.ZERO:
                    parts.append((span.offset, span.length, None))
        except CalledOff:
            raise
        except OSError as error:
            raise ReadFailed(error.errno, error.strerror or str(error)) from error
        return parts

    def _write(self, parts: list[tuple[int, int, memoryview | None]]) -> int:
        """Write what was read; the bytes that had to be moved. The caller has claimed the range of
        the target. Raises `OSError`."""
        moved = 0
        for at, length, data in parts:
            self.target.changing(at, length)
            if data is None:
                self.target.zero(at, length, self.copier.unmap)
            else:
                self.target.pwrite(data, at)
                moved += length
            self.target.changing(at, length)  # a bitmap may have been cleared meanwhile
        return moved

    def _in_place(self, offset: int, length: int) -> bool:
        """Whether a copy changes no mapping that a reader of the disk may be using.

        What it overwrites in a commit's base, the layers above cover."""
        if not self.inside:
            return True
        return all(e.writable and e.fd >= 0 for e in self.target.extents(offset, length)) and all(
            span.kind is not Kind.ZERO
            for span in spans(self.source, offset, length, self.granularity, self._shines())
        )

    def _copy(self, offset: int, length: int, changing: bool = True) -> int:
        """Between files. `changing`: the target's mapping may change. Aligned to the target's
        granules where it can be."""
        moved = 0
        small = not self.fresh and length < MIN_CHUNK
        try:
            with self._alone(offset, length):
                if small and not (self.inside and changing):
                    return self._patch(offset, length)
                end = offset + length
                whole = not (offset % self.unit or (end % self.unit and end < self.disk.size))
                step = self.unit if whole else self.granularity
                for span in spans(self.source, offset, length, step, self._shines()):
                    self.copier.place(self.source, self.target, span)
                    if span.kind is Kind.COPY:
                        moved += span.length
        except OSError as error:
            raise blame(error, self.source, offset, length) from error
        return moved

    def _patch(self, offset: int, length: int) -> int:
        """A small piece that the guest has just written: through memory, in two system calls.

        Sharing it, as some file systems would, waits inside the file's lock until it is on the
        disk, and the guest's next write to it would have to copy it again."""
        for at in range(offset, offset + length, PIECE):
            piece = memoryview(bytearray(min(PIECE, offset + length - at)))
            self.source.pread(piece, at)
            self.target.changing(at, len(piece))
            if piece.obj == bytes(len(piece)) and not self.inside:
                self.target.zero(at, len(piece), self.copier.unmap)
            else:
                self.target.pwrite(piece, at)
        return length

    @contextmanager
    def _alone(self, offset: int, length: int) -> Iterator[None]:
        """The target's granules of the range are this thread's alone, inside the disk's own gate.

        A guest's write and a chunk may be apart on the disk and in one granule of the target."""
        claim = self._claim(offset, length)
        try:
            yield
        finally:
            self._target_gate.release(claim)

    def _claim(self, offset: int, length: int) -> Claim:
        """What `_alone` holds, to be released by the caller. A thread that holds it enters no range
        of the disk any more, because a guest's write holds its range and waits for this."""
        granule = 1 if self._plain else self.target.granule
        start, stop = offset // granule * granule, -(-(offset + length) // granule) * granule
        return self._target_gate.claim(start, stop)

    def _shines(self) -> Node | None:
        """The node whose bytes the target shows by itself, where it has none of its own.

        Only a commit's: a copy must hold the bytes of a granule that was written and discarded."""
        return self.target if self.inside else None

    def _carry_last(self) -> int:
        """Read all that is left under a drain, and write it to the server after the drain; the
        bytes that were left. In between guests' writes of these ranges wait for it, if they have to
        reach the server, too."""
        runs: list[tuple[int, int]] = []
        held: list[Claim] = []
        try:
            with self.disk.exclusive():
                runs = list(self.dirty.runs())
                left = sum(n for _, n in runs)
                if runs:
                    first, last = runs[0][0], sum(runs[-1])
                    held.append(self._claim(first, last - first))
                found = []
                for offset, length in runs:
                    found.append(self._read(memoryview(bytearray(length)), offset))
                    self.dirty.clear(offset, length)
            for parts in found:
                self._write(parts)
        except BaseException:
            for offset, length in runs:
                self.dirty.set(offset, length)
            raise
        finally:
            for claim in held:
                self._target_gate.release(claim)
        return left

    def _copy_all(self) -> None:
        """Inside a drain: every bit that is left."""
        for offset, length in list(self.dirty.runs()):
            for at in range(offset, offset + length, MAX_CHUNK):
                part = min(MAX_CHUNK, offset + length - at)
                self.dirty.clear(at, part)
                try:
                    self._copy(at, part)
                except BaseException:
                    self.dirty.set(at, part)
                    raise

    def _note_hot(self, offset: int, length: int) -> None:
        """What is copied for the second time is hot."""
        if self.remember:
            for at, run in self.copied.runs(offset, length):
                self.again.set(at, run)
            self.copied.set(offset, length)

    # Write-blocking: a tap of the disk -------------------------------------------------------

    holds: Bitmap | None = None  # every write comes by
    slow = True

    def before(self, offset: int, length: int) -> None:
        """Nothing to do: the target wants what is new."""

    def after(self, offset: int, length: int, data: memoryview | None) -> None:
        """A guest's change has reached the source: the target gets it before the guest hears (M3).

        If the target fails, the range is dirty and the job's policy is asked; the guest's write
        is good all the same, for the source is the disk until the pivot."""
        hot = self.hot
        if hot is not None and next(hot.runs(offset, length), None) is None:
            self.dirty.set(offset, length)
            return
        if self._behind:
            self.dirty.set(offset, length)
            return
        try:
            with self.scope, Scope(TAP_SECONDS, "the target has not taken a guest's write"):
                self._follow(offset, length, data)
        except OSError as error:
            self.dirty.set(offset, length)
            self._behind = True
            if self._tap_error is None:  # the target's error, also if it is only late
                self._tap_error = OSError(error.errno, error.strerror or str(error))

    def _follow(self, offset: int, length: int, data: memoryview | None) -> None:
        """Let the target have what the guest has just changed. Raises `OSError`."""
        with self._alone(offset, length):
            if data is not None:
                self.target.changing(offset, length)
                self.target.pwrite(data, offset)
            else:
                for span in spans(self.source, offset, length, 1, self._shines()):
                    Copier(unmap=self.copier.unmap).place(self.source, self.target, span)

    def failed(self, offset: int, length: int) -> None:
        """The source may have changed in part: the target is to get whatever is there now."""
        self.dirty.set(offset, length)
