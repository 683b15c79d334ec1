"""Stream: fill an overlay from the layers below it, then let them go.

    before: base <- sn1 <- sn2 <- vm.img        stream vm.img down to base
    after:  base <- vm.img

Bytes that a guest can see never change: what the job places is what was to be read there
anyway, and only where the overlay still has a hole (ST1). The work is done in chunks, each in
two steps. Outside the gate, with the guest running: see which granules are holes, take room for
them in the overlay's file, fill it from the layers below, which are immutable. Inside
`exclusive(chunk)`: look again, link what is still a hole, give back what a guest has written
meanwhile. The guest waits for a change of mapping, never for a copy.

Holes below which everything reads as zero stay holes when the whole chain is streamed, for a
hole without backing reads as zero (but for a raw image that is being filled: there it reads as
what its file has there). With a base they become explicit zeroes, or the base would shine through.

The record of progress is the overlay's own allocation. After a crash the image is valid, and
streaming again goes on where it stopped (ST3): the job flushes now and then, outside the gate, so
a crash costs about a second of its work. The end is in this order (ST2): flush the data; under a
drain write the header without the old backing, and flush that; then let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from cowferry.block.copy import Copier, Kind, Span, spans
from cowferry.block.disk import Disk, in_order
from cowferry.block.node import ZEROES, Extent, Node, State, chain, far, read
from cowferry.block.rates import fitted
from cowferry.errors import NotSupported
from cowferry.jobs.job import Job, Progress

MIN_CHUNK = 1 << 20
MAX_CHUNK = 64 << 20
STEP = 0.05  # seconds a chunk should take: pause, cancel and speed act between chunks
CHECKPOINT = 1.0  # seconds of work that a crash costs, if a flush takes less than a
SHARE = 4  # fourth of that; else so many times what it takes


class Fill:
    """Fills the holes of `top`, chunk by chunk, from the layers between it and `base`.

    Knows nothing of jobs; steps of it are what tests interleave with writes. The disk is the
    one over `top`; `base` None means the whole chain."""

    def __init__(self, disk: Disk, top: Node, base: Node | None) -> None:
        self.disk = disk
        self.top = top
        self.base = base
        self.copier = Copier()
        self.brought = 0  # bytes that `prepare` has placed already
        self.holes_stay = base is None and top.holes_read_zero

    def chunk(self, offset: int, length: int) -> int:
        """Fill one chunk, both steps of it. Returns the bytes that had to be copied.

        `offset` is a multiple of the top's granule; `length` too, or it ends the disk. Raises
        `OSError`; then the chunk is as it was, but for what is already filled, and may be
        tried again."""
        before = self.brought
        room, rest = self.prepare(offset, length)
        copied = sum(r.length for _, r in room) + sum(s.length for s in rest)
        copied += self.brought - before
        self.settle(offset, length, room, rest)
        return copied

    def prepare(self, offset: int, length: int) -> tuple[list[tuple[int, Extent]], list[Span]]:
        """Outside the gate: room already filled, by its offset, and what is left for inside."""
        top, granule = self.top, self.top.granule
        room: list[tuple[int, Extent]] = []
        rest: list[Span] = []
        try:
            for start, end in self.holes(offset, length):
                first = -(-start // granule) * granule
                last = end if end == top.size else end // granule * granule
                if first >= last:  # parts of a granule whose other parts are allocated
                    rest.append(Span(start, end - start, Kind.COPY))
                    continue
                if start < first:
                    rest.append(Span(start, first - start, Kind.COPY))
                for span in spans(top.backing, first, last - first, granule, self.base):
                    if span.kind is Kind.ZERO and not self.holes_stay:
                        rest.append(span)
                    elif span.kind is Kind.COPY:
                        self._fill(span, room, rest)
                if last < end:
                    rest.append(Span(last, end - last, Kind.COPY))
        except BaseException:
            for _, r in room:
                top.unreserve(r)
            raise
        return room, rest

    def _fill(self, span: Span, room: list[tuple[int, Extent]], rest: list[Span]) -> None:
        for start in range(span.offset, span.offset + span.length, self.top.room):
            part = Span(start, min(self.top.room, span.offset + span.length - start), span.kind)
            if self.top.room_is_place and far(self.top.backing):
                self._bring(part)
                continue
            got = self.top.reserve(*part[:2])
            if got is None:
                rest.append(part)
                continue
            at = start
            for r in got:
                room.append((at, r))  # before the bytes: the caller gives it back on an error
                at += r.length
            try:
                self.copier.fill(self.top.backing, start, got)
            finally:
                self.top.filled(got)

    def _bring(self, part: Span) -> None:
        """A server's bytes, into memory first: else a guest's write into the same place, which
        needs none of them, would wait for the server, too, and for one that hangs."""
        data = self.copier.fetch(self.top.backing, *part[:2])
        step = max(MIN_CHUNK, self.top.granule)
        for at in range(0, part.length, step):
            begin, n = part.offset + at, min(step, part.length - at)
            with self.disk.exclusive(begin, n):
                for start, end in self.holes(begin, n):
                    self.top.pwrite(data[start - part.offset : end - part.offset], start)
        self.brought += part.length

    def settle(
        self, offset: int, length: int, room: list[tuple[int, Extent]], rest: list[Span]
    ) -> None:
        """Inside the gate: link what is still a hole, fill the rest, give back what is not needed.

        ST1: a guest's write between the two steps has made its granule no hole any more."""
        if not room and not rest:
            return
        spare: list[Extent] = []
        todo = list(room)
        with self.disk.exclusive(offset, length):
            try:
                while todo:
                    at, r = todo.pop()
                    self._link(at, r, spare)
                for span in rest:
                    for start, end in self.holes(span.offset, span.length):
                        if span.kind is Kind.ZERO:
                            self._zero(start, end)
                        else:
                            self._write(start, end)
            finally:
                for r in spare + [r for _, r in todo]:
                    self.top.unreserve(r)

    def _link(self, at: int, room: Extent, spare: list[Extent]) -> None:
        top, granule = self.top, self.top.granule
        cursor, stop = at, at + room.length  # of the room, [at, cursor) is settled
        try:
            for start, end in self.holes(at, room.length):
                first = -(-start // granule) * granule
                last = end if end == top.size else end // granule * granule
                if first >= last:
                    self._write(start, end)
                    continue
                if start < first:
                    self._write(start, first)
                if cursor < first:
                    spare.append(room._replace(length=first - cursor, host=room.host + cursor - at))
                cursor = first
                top.link(first, room._replace(length=last - first, host=room.host + first - at))
                cursor = last
                if last < end:
                    self._write(last, end)
        finally:
            if cursor < stop:
                spare.append(room._replace(length=stop - cursor, host=room.host + cursor - at))

    def holes(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """[start, end) of the top's own holes, neighbours joined."""
        start = at = offset
        for e in list(self.top.extents(offset, length)):
            if e.state is not State.HOLE:
                if start < at:
                    yield start, at
                start = at + e.length
            at += e.length
        if start < at:
            yield start, at

    def _zero(self, start: int, end: int) -> None:
        """Explicit zeroes, for the base is about to be the backing. Inside the gate.

        A driver may leave a hole that reads as zero already, through the layers that go."""
        self.top.zero(start, end - start)
        for at, stop in list(self.holes(start, end - start)):
            for piece in range(at, stop, len(ZEROES)):
                self.top.pwrite(memoryview(ZEROES)[: min(stop - piece, len(ZEROES))], piece)

    def _write(self, start: int, end: int) -> None:
        """A piece that no room fits: read and written in place. Inside the gate."""
        while start < end:
            buf = memoryview(bytearray(min(MIN_CHUNK, end - start)))
            read(self.top.backing, buf, start)
            self.top.pwrite(buf, start)
            start += len(buf)


class Stream(Job):
    """The job around `Fill`: whole chain, or down to `base`, which stays.

    `above` names every disk whose chain has `top` in it; they are drained for the moment in which
    the backing is let go. `backing` is the name to record for `base` (None: none). `detached`
    hears of the nodes that nobody below needs any more, once that is durable."""

    type = "stream"

    def __init__(
        self,
        disk: Disk,
        base: Node | None = None,
        *,
        above: Callable[[], list[Disk]] | None = None,
        backing: tuple[str, str] | None = None,
        detached: Callable[[Node, Node | None], None] | None = None,
        released: Callable[[], None] | None = None,
        chunk: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        **common: Any,
    ) -> None:
        super().__init__(length=disk.size, **common)
        top = disk.root
        if base is not None and (base is top or base not in list(chain(top))):
            raise NotSupported(f"'{base.filename}' is not below '{top.filename}'")
        self.disk = disk
        self.top = top
        self.base = base
        self.old: Node | None = None  # what is let go at the end
        self.was: tuple[str, str | None] | None = None  # what the header recorded for it
        self.backing = backing
        self.work = Fill(disk, top, base)
        self.fixed = chunk
        self.was_read_only = top.read_only
        self._above = above or (lambda: [disk])
        self._detached = detached
        self._released = released
        self._clock = clock
        self._due = 0.0  # when the next checkpoint is

    def doing(self, operation: str) -> str:
        return f"filling '{self.top.filename}'"

    def run(self) -> Iterator[Progress]:
        top, granule = self.top, self.top.granule
        if top.backing is None or top.backing is self.base:
            yield Progress(done=self.length)
            return
        if self.was_read_only:
            yield from self.attempt("write", partial(self._reopen, False))
        offset = 0
        size = self.fixed or max(MIN_CHUNK, granule)
        self._due = self._clock() + CHECKPOINT
        while offset < self.disk.size:
            begin = self._clock()
            limit = size
            if self.throttle.speed:
                limit = min(size, max(self.throttle.speed // 10 // granule, 1) * granule)
            length = min(limit, self.disk.size - offset)
            copied = yield from self.attempt("read", partial(self.work.chunk, offset, length))
            yield Progress(done=length, moved=copied or 0)
            offset += length
            if self.fixed is None:
                least, most = max(MIN_CHUNK, granule), max(MAX_CHUNK, granule)
                size = fitted(size, self._clock() - begin, STEP, least, most)
            if top.unflushed and self._clock() >= self._due:
                yield from self.attempt("write", self._checkpoint)

    def _checkpoint(self) -> None:
        """What is filled so far is there after a crash, too."""
        begin = self._clock()
        self.top.flush()
        end = self._clock()
        self._due = end + max(CHECKPOINT, SHARE * (end - begin))

    # ST2: the data is durable, then the header says so, durably; then the old chain goes.

    def approach(self) -> None:
        self.old = self.top.backing
        self.top.flush()

    def drains(self) -> list[Disk]:
        return self._above()

    def settle(self) -> None:
        if self.old is not None and self.old is not self.base:
            name, format = self.backing or (None, None)
            self.top.flush()
            self.was = self.top.backing_spec
            self.top.set_backing(name, format)

    def unsettle(self) -> None:
        if self.was is not None and self.top.backing_spec != self.was:
            self.top.set_backing(*self.was)

    def switch(self) -> None:
        self.top.backing = self.base

    def parted(self) -> None:
        if self._detached is not None and self.old is not None and self.old is not self.base:
            self._detached(self.old, self.base)

    def _reopen(self, read_only: bool) -> int:
        with ExitStack() as drained:
            for disk in in_order(self._above()):
                drained.enter_context(disk.exclusive())
            self.top.reopen(read_only)
        return 0

    def clean(self) -> None:
        try:
            if self.was_read_only and not self.top.read_only:
                self._reopen(True)
        finally:
            if self._released is not None:
                self._released()
