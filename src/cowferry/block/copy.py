"""Moving bytes from a chain of nodes into one node: the routine that every job shares.

A copy has three layers, each usable alone.

`spans` looks at a range of the source chain and says, granule by granule of the target, what has
to happen there: COPY (some byte is data), ZERO (all of it reads as zero) or KEEP (only the base
could answer, so the target needs nothing).

`Copier.fill` puts a range of the source into *room*: a place in a file that nothing points to
yet. It shares the extents where the file system can (reflink), lets the kernel copy where both
sides have descriptors (`copy_file_range`), and reads and writes otherwise. What a pair of files
cannot do is remembered, so the price of asking is paid once.

`Copier.place` does the whole for a target that nobody else uses (convert, rebase): room, fill,
link; or zeroes; or plain writes where the driver has no notion of room.

Jobs on a live disk use the first two outside the gate, and inside it only look again and `link`;
a guest is held back for as long as it takes to change a mapping, not to copy bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum
from functools import partial
from typing import NamedTuple

from cowferry.block import scope, sysio
from cowferry.block.behind import Behind
from cowferry.block.node import (
    Extent,
    Node,
    State,
    far,
    part,
    read,
    read_fully,
    read_runs,
    resolve,
)

BUFFER = 128 << 10  # bytes moved through memory at once: stays in the processor's cache
CLONE_ALIGN = 4096  # what reflink file systems ask of offsets and lengths
KERNEL_COPY = 16 << 20  # bytes asked of one copy_file_range
REMOTE = 1 << 20  # bytes moved at once to or from a server
ON_THE_WAY = 4  # such pieces at the same time: an answer takes its time
COMPARED = 1 << 20  # bytes of each of two images that are read at once to compare them
BLOCK = 16 << 20  # bytes whose runs are looked up together
SHORT = 64 << 10  # bytes; a run that is shorter is not worth system calls of its own
WRITEBACK = 1 << 20  # copies of this size are handed to the disk at once

#: errnos by which a kernel or file system says "not for this pair of files".
UNABLE = (
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EBADF,
    errno.EISDIR,
    errno.ETXTBSY,
    errno.EPERM,
)


class Kind(Enum):
    """What a span of the target needs."""

    COPY = 1
    ZERO = 2
    KEEP = 3


class Span(NamedTuple):
    """Bytes `offset, length` and what they need."""

    offset: int
    length: int
    kind: Kind


KINDS = {State.DATA: Kind.COPY, State.ZERO: Kind.ZERO, State.HOLE: Kind.KEEP}


def spans(
    source: Node | None, offset: int, length: int, granule: int, base: Node | None = None
) -> Iterator[Span]:
    """What each granule of `offset, length` needs, equal neighbours joined.

    `offset` is a multiple of `granule`; `length` too, or it ends the disk. A granule whose
    parts differ is a COPY: the rest of it is then read from wherever it lies."""
    start, stop, kind = offset, offset, Kind.KEEP
    for piece in _pieces(resolve(source, offset, length, base), offset, length, granule):
        if piece.kind is not kind:
            if stop > start:
                yield Span(start, stop - start, kind)
            start, kind = piece.offset, piece.kind
        stop = piece.offset + piece.length
    if stop > start:
        yield Span(start, stop - start, kind)


def differing(
    base: Node | None, target: Node, offset: int, length: int, unit: int, holes: bool
) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the units of a range in which the target does not read as `base`.

    Without `holes` the holes of the target are trusted to show `base`, and are not read. Nobody may
    write to the range of either meanwhile. Raises `OSError`."""
    at, end = offset, offset + length
    for e in list(target.extents(offset, length)):
        stop = min(at + e.length, end)
        if e.state is State.HOLE and not holes:
            at = stop
            continue
        while at < stop:
            step = min(COMPARED - at % unit, stop - at)
            ours, theirs = (memoryview(bytearray(step)) for _ in range(2))
            read(base, ours, at)
            read(target, theirs, at)
            if ours != theirs:
                edge = unit - at % unit
                for first in [0, *range(edge, step, unit)]:
                    last = min(first + edge if not first else first + unit, step)
                    if ours[first:last] != theirs[first:last]:
                        yield at + first, last - first
            at += step


def _pieces(runs: Iterator[Extent], offset: int, length: int, granule: int) -> Iterator[Span]:
    """The runs cut at granules; a granule made of several runs is one piece."""
    at, end = offset, offset + length
    mixed = Kind.KEEP  # of the granule that `at` lies inside, if it does
    for e in runs:
        kind, stop = KINDS[e.state], at + e.length
        if at % granule:
            first = at // granule * granule
            edge = min(first + granule, end)
            mixed = kind if kind is mixed else Kind.COPY
            if stop < edge:
                at = stop
                continue
            yield Span(first, edge - first, mixed)
            at = edge
        whole = end if stop == end else stop // granule * granule
        if whole > at:
            yield Span(at, whole - at, kind)
        at, mixed = stop, kind


def _joined(runs: Iterator[Extent]) -> Iterator[Extent]:
    """Neighbours that are short, as one run without a place: to be moved through memory.

    Two system calls for all of them cost less than one or two for each."""
    short = 0  # bytes
    for e in runs:
        if e.length < SHORT:
            short += e.length
            continue
        if short:
            yield Extent(short, State.DATA)
            short = 0
        yield e
    if short:
        yield Extent(short, State.DATA)


def _read(source: Node | None, offset: int, buf: memoryview, done: int) -> None:
    read(source, buf, offset + done)


class Copier:
    """Moves bytes, and knows what each pair of files can do. Used by one thread at a time.

    `behind` is where what it has copied leaves memory, if nobody is about to read it. `unmap`: the
    target gives back the room of what becomes zero."""

    def __init__(self, behind: Behind | None = None, unmap: bool = True) -> None:
        self.behind = behind
        self.unmap = unmap
        self._cannot_clone: set[tuple[int, int]] = set()
        self._cannot_copy: set[tuple[int, int]] = set()
        self._buffer: memoryview | None = None
        self._pool: ThreadPoolExecutor | None = None  # only if a server is involved
        self._spare: list[memoryview] = []  # buffers of the pool's threads
        self.cloned = 0  # bytes shared by reflink
        self.moved = 0  # bytes copied, by the kernel or by us
        self.touched = False  # `place` may have changed what a target reads as

    def fill(self, source: Node | None, offset: int, room: list[Extent]) -> None:
        """Put the source's bytes from `offset` on into `room`, in order. Raises `OSError`.

        Every byte of the room is written: it may be recycled, with old bytes in it."""
        length = sum(r.length for r in room)
        if not length:
            return
        rest = iter(room)
        place = next(rest)
        used = 0  # bytes of `place`
        for e in _joined(resolve(source, offset, length)):
            done = 0
            while done < e.length:
                if used == place.length:
                    place, used = next(rest), 0
                n = min(e.length - done, place.length - used)
                host = place.host + used
                if e.state is State.ZERO:
                    self._zero(place.fd, host, n)
                elif e.fd >= 0:
                    self._move(e.fd, e.host + done, place.fd, host, n)
                else:  # short, or only its node can read it (compressed, say)
                    self._through(place.fd, host, n, partial(_read, source, offset), far(source))
                done, used, offset = done + n, used + n, offset + n

    def fetch(self, source: Node | None, offset: int, length: int) -> memoryview:
        """The source's bytes, which a server holds, in memory. Raises `OSError`."""
        whole = memoryview(bytearray(length))

        def get(buf: memoryview, done: int) -> None:
            read(source, whole[done : done + len(buf)], offset + done)

        self.in_pieces(length, get, far(source))
        return whole

    def store(self, target: Node, offset: int, data: memoryview) -> None:
        """Write bytes that are in memory to a target that a server holds. Raises `OSError`."""

        def put(buf: memoryview, done: int) -> None:
            target.pwrite(data[done : done + len(buf)], offset + done)

        self.in_pieces(len(data), put, far(target))

    def place(self, source: Node | None, target: Node, span: Span) -> None:
        """Make `span` of `target`, which nobody else uses, read as `source` does there."""
        offset, length = span.offset, span.length
        if span.kind is Kind.KEEP:
            return
        target.changing(offset, length)
        if span.kind is Kind.ZERO:
            self.touched = True
            target.zero(offset, length, self.unmap)
            return
        if target.remote:
            self._write(source, target, offset, length)
            return
        granule = target.granule
        for r in list(target.extents(offset, length)):
            end = offset + r.length
            if r.writable and r.fd >= 0:  # it has a place already
                self._overwrite(source, offset, r)
            else:
                first = min(-(-offset // granule) * granule, end)
                last = end if end == target.size else max(end // granule * granule, first)
                self._write(source, target, offset, first - offset)
                self._place_new(source, target, first, last - first)
                self._write(source, target, last, end - last)
            offset = end

    def _overwrite(self, source: Node | None, offset: int, run: Extent) -> None:
        """Fill a run where it lies. A hole for which there was no room reads as before."""
        before, self.touched = self.touched, True
        try:
            self.fill(source, offset, [run])
        except OSError:
            if not before and run.state is State.ZERO:
                self.touched = not _reads_zero(run)
            raise

    def _place_new(self, source: Node | None, target: Node, offset: int, length: int) -> None:
        """Whole granules that need a place."""
        room = target.reserve(offset, length) if length else None
        if room is None:
            self._write(source, target, offset, length)
            return
        linked = 0
        try:
            self.fill(source, offset, room)
            for r in room:
                target.link(offset, r)
                self.touched = True
                linked, offset = linked + 1, offset + r.length
        except BaseException:
            for r in room[linked:]:
                target.unreserve(r)
            raise

    # -------------------------------------------------------------------------------------

    def _move(self, source: int, at: int, fd: int, host: int, length: int) -> None:
        if source == fd and at == host:
            return  # a granule that is in part the target's own
        pair = (source, fd)
        if pair not in self._cannot_clone and at % CLONE_ALIGN == host % CLONE_ALIGN:
            lead = min(-at % CLONE_ALIGN, length)
            whole = (length - lead) // CLONE_ALIGN * CLONE_ALIGN
            if whole and self._clone(source, at + lead, fd, host + lead, whole):
                if lead:
                    self._copy(source, at, fd, host, lead)
                done = lead + whole
                at, host, length = at + done, host + done, length - done
        if length:
            self._copy(source, at, fd, host, length)

    def _clone(self, source: int, at: int, fd: int, host: int, length: int) -> bool:
        try:
            # What is dirty is written first: the clone would do that inside the file's lock.
            sysio.write_out(source, at, length)
            sysio.clone(source, at, fd, host, length)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
            # EINVAL may be about this range only: a source that ends inside it, say.
            if error.errno != errno.EINVAL or os.lseek(source, 0, os.SEEK_END) >= at + length:
                self._cannot_clone.add((source, fd))
            return False
        self.cloned += length
        return True

    def _copy(self, source: int, at: int, fd: int, host: int, length: int) -> None:
        pair = (source, fd)
        self.moved += length
        begin, whole = host, length
        while length and pair not in self._cannot_copy:
            try:
                n = sysio.copy_range(source, at, fd, host, min(length, KERNEL_COPY))
            except OSError as error:
                if error.errno not in UNABLE:
                    raise
                self._cannot_copy.add(pair)
                break
            if n == 0:  # the source ends here, and beyond its end it reads as zero
                self._zero(fd, host, length)
                return
            at, host, length = at + n, host + n, length - n

        def read_file(buf: memoryview, done: int) -> None:
            n = 0
            while n < len(buf):
                k = os.preadv(source, [buf[n:]], at + done + n)
                if k == 0:
                    buf[n:] = bytes(len(buf) - n)
                    return
                n += k

        if length:
            self._through(fd, host, length, read_file, [])
        if self.behind is not None:
            self.behind.wrote(fd, begin, whole)
        elif whole >= WRITEBACK:
            sysio.start_writeback(fd, begin, whole)

    def _zero(self, fd: int, host: int, length: int) -> None:
        try:
            sysio.fallocate(fd, sysio.ZERO_RANGE, host, length)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
            zeroes = bytes(min(length, BUFFER))
            while length:
                n = min(length, len(zeroes))
                sysio.pwrite(fd, memoryview(zeroes)[:n], host)
                host, length = host + n, length - n

    def _through(
        self,
        fd: int,
        host: int,
        length: int,
        get: Callable[[memoryview, int], None],
        remote: list[Node],
    ) -> None:
        """Copy through memory; `get(buf, done)` fills `buf` with what lies `done` bytes on."""

        def move(buf: memoryview, done: int) -> None:
            get(buf, done)
            sysio.pwrite(fd, buf, host + done)

        self.in_pieces(length, move, remote)

    def _write(self, source: Node | None, target: Node, offset: int, length: int) -> None:
        remote = far(target) + far(source)
        self.touched = self.touched or length > 0
        for at in range(offset, offset + length, BLOCK):
            n = min(BLOCK, offset + length - at)
            self.in_pieces(
                n, partial(_place_piece, source, target, at, _runs(source, at, n)), remote
            )

    def in_pieces(
        self, length: int, move: Callable[[memoryview, int], None], remote: list[Node]
    ) -> None:
        """`move(buf, done)` each piece, in order; or several at once, if `remote` are involved.

        The threads that do so wait within the scopes of the caller.

        Nothing is on the way any more on return. Raises the first error."""
        if not remote or length <= REMOTE:
            step = min(length, REMOTE if remote else BUFFER)
            if self._buffer is None or len(self._buffer) < step:
                self._buffer = memoryview(bytearray(max(step, BUFFER)))
            for done in range(0, length, step or 1):
                move(self._buffer[: min(step, length - done)], done)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(ON_THE_WAY, "copy")
        starts = iter(range(0, length, REMOTE))
        errors: list[BaseException] = []

        scopes = scope.current()

        def work() -> None:
            buf = self._spare.pop() if self._spare else memoryview(bytearray(REMOTE))
            try:
                with scope.inside(scopes):
                    move_all(buf)
            except BaseException as error:
                errors.append(error)
            self._spare.append(buf)

        def move_all(buf: memoryview) -> None:
            while not errors and (done := next(starts, -1)) >= 0:  # one step of the interpreter
                move(buf[: min(REMOTE, length - done)], done)

        running: list[Future[None]] = []
        try:
            pieces = -(-length // REMOTE)
            running.extend(self._pool.submit(work) for _ in range(min(ON_THE_WAY, pieces)))
            wait(running)
        except BaseException as error:  # an interrupt
            errors.insert(0, error)
            while wait(running, 0.1).not_done:  # one may have been about to ask when we aborted
                for node in remote:
                    node.abort()
        if errors:
            raise errors[0]


def _reads_zero(run: Extent) -> bool:
    """Whether the bytes of a run with a place are zeroes, as far as they can be read."""
    buf = memoryview(bytearray(min(run.length, COMPARED)))
    try:
        for done in range(0, run.length, len(buf)):
            part = buf[: min(len(buf), run.length - done)]
            read_fully(run.fd, part, run.host + done)
            if part != bytes(len(part)):
                return False
    except OSError:
        return False
    return True


def _runs(source: Node | None, offset: int, length: int) -> list[Extent]:
    return list(resolve(source, offset, length))


def _place_piece(
    source: Node | None, target: Node, offset: int, runs: list[Extent], buf: memoryview, done: int
) -> None:
    """Write what the runs from `offset` on hold `done` bytes further into the same place."""
    read_runs(source, part(runs, done, len(buf)), buf, offset + done)
    target.pwrite(buf, offset + done)
