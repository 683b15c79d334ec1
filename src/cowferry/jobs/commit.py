"""Commit: put what a layer holds into one below it, while the guest runs.

    before: base <- sn1 <- sn2 <- vm.img      commit sn2 into base
    after:  base <- vm.img

*Intermediate* (`Commit`): the layers above the base, up to `top`, are immutable. What they hold is
placed in the base chunk by chunk. No byte that a guest can see changes, for what is overwritten in
the base is covered by the layers above; but the base's mapping may, so a chunk whose bytes have no
place in the base yet is placed inside `exclusive` of every disk above. At the end (C3): flush the
base; write the header of the image above `top`, and flush it; then let go.

*Active* (`ActiveCommit`): the top is being written, so this is a mirror whose target lies below
its own source: it becomes ready, and the pivot makes the base the disk.

The base is grown first, durably, if the top is larger (C1). From before the first byte until the
end it is recorded as no good by itself, and so are the layers between (C2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

from cowferry.block import moves
from cowferry.block.copy import Copier, Kind, Span, spans
from cowferry.block.disk import Disk, in_order
from cowferry.block.gate import END
from cowferry.block.node import Node, far, served_plainly
from cowferry.block.rates import fitted
from cowferry.block.scope import Scope
from cowferry.jobs.ending import NO_ANSWER, SETTLE_SECONDS
from cowferry.jobs.follow import MIN_CHUNK
from cowferry.jobs.job import Job, Progress
from cowferry.jobs.mirror import STEP, Mirror

IN_PLACE_CHUNK = 32 << 20


class Into:
    """What both kinds do to the base, and record of it."""

    def __init__(self, top: Node, base: Node, between: list[Node], size: int) -> None:
        self.top = top
        self.base = base
        self.between = between  # skipped: above the base, below the top
        self.size = size  # bytes that the base must have at least
        self.was_read_only = base.read_only
        self.marked: list[Node] = []  # marked by us, and by no commit before
        self.touched = False  # some bytes of the base may be those of the top

    def begin(self) -> None:
        """Make the base writable, mark it and the layers between, and make it large enough, all of
        it durably. May be called again after an error. Raises `OSError`.

        A base that another process has open cannot be the target, and is not marked."""
        if self.base.read_only:
            self.base.reopen(False)
        for node in (*self.between, self.base):
            if node not in self.marked and moves.half_committed(node.filename) is None:
                self.marked.append(node)
            moves.committing(node.filename, self.top.filename)
        if self.base.size < self.size:
            self.base.change_size(self.size)
            self.base.flush()

    def end(self) -> None:
        """Remove the mark of the base: everything is in it. The layers between stay marked, for
        they are of no use any more."""
        self.marked = []
        moves.committed(self.base.filename)

    def give_up(self) -> None:
        """Remove the marks if nothing was written to the base, so that it may be opened again by
        itself: it reads as before. The commit did not end well."""
        if not self.touched:
            while self.marked:
                moves.committed(self.marked.pop().filename)


class Commit(Job):
    """Of layers that nobody writes. `above` is the image over `top`, whose header is changed."""

    type = "commit"

    def __init__(
        self,
        disks: Callable[[], list[Disk]],
        above: Node,
        into: Into,
        *,
        backing: tuple[str, str],
        detached: Callable[[Node, Node], None] | None = None,
        released: Callable[[], None] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(length=into.top.size, **common)
        self.disks = disks
        self.above = above
        self.was = above.backing_spec  # what its header records until the end
        self.into = into
        self.backing = backing
        self.copier = Copier()
        self.plain = served_plainly(into.base)
        self._detached = detached
        self._released = released

    def run(self) -> Iterator[Progress]:
        into = self.into
        yield from self.attempt("write", self._begin)
        at, size = 0, into.top.size
        granule = max(into.base.granule, 4096)
        chunk = MIN_CHUNK
        while at < size:
            limit = chunk
            if self.throttle.speed:
                limit = min(limit, self.throttle.speed // 10)
            length = min(max(limit // granule, 1) * granule, size - at)
            begin = time.monotonic()
            moved = yield from self.attempt("write", partial(self.copy, at, length, granule))
            chunk = fitted(chunk, time.monotonic() - begin, STEP, MIN_CHUNK, IN_PLACE_CHUNK)
            yield Progress(done=length, moved=moved or 0)
            at += length

    def doing(self, operation: str) -> str:
        if operation == "read":
            return f"reading '{self.into.top.filename}'"
        return f"writing '{self.into.base.filename}'"

    def _begin(self) -> int:
        with self._exclusive(0, None), Scope(SETTLE_SECONDS, NO_ANSWER):
            self.into.begin()
        return 0

    def _afloat(self) -> AbstractContextManager[None]:
        """In the way of drains, and of nobody else: who changes the base's bitmaps is not to come
        between their marks and the write."""
        disks = self.disks()
        return disks[0].shared(END - 1, 1) if disks else nullcontext()

    def _exclusive(self, offset: int, length: int | None) -> ExitStack:
        held = ExitStack()
        try:
            for disk in in_order(self.disks()):
                held.enter_context(disk.exclusive(offset, length))
        except BaseException:
            held.close()
            raise
        return held

    def copy(self, offset: int, length: int, granule: int) -> int:
        """Copy one chunk, and return the bytes that had to be moved. Raises `OSError`; then it may
        be done again."""
        try:
            return self._copy(offset, length, granule)
        finally:
            self.into.touched = self.into.touched or self.copier.touched

    def _copy(self, offset: int, length: int, granule: int) -> int:
        into, moved = self.into, 0
        for span in spans(into.top, offset, length, granule, into.base):
            if span.kind is Kind.KEEP:
                continue
            if self.plain:  # nobody remembers where its bytes lie, and nobody waits for it
                self.copier.place(into.top, into.base, span)
                into.base.changing(span.offset, span.length)
            elif span.kind is Kind.COPY and all(
                e.writable and e.fd >= 0 for e in into.base.extents(span.offset, span.length)
            ):
                with self._afloat():
                    self.copier.place(into.top, into.base, span)
            else:
                for at in range(span.offset, span.offset + span.length, MIN_CHUNK):
                    n = min(MIN_CHUNK, span.offset + span.length - at)
                    self._place(span._replace(offset=at, length=n))
            moved += span.length if span.kind is Kind.COPY else 0
        return moved

    def _place(self, span: Span) -> None:
        """Place a span for which the base's mapping changes. Nobody waits for a server meanwhile:
        what one holds is fetched before, for the layers do not change."""
        into, data = self.into, None
        if span.kind is Kind.COPY and far(into.top):
            data = self.copier.fetch(into.top, span.offset, span.length)
        with self._exclusive(span.offset, span.length):
            if data is None:
                self.copier.place(into.top, into.base, span)
            else:
                into.base.changing(span.offset, span.length)
                into.base.pwrite(data, span.offset)

    # C3: the base is durable, then the header above says so, durably; then the layers go.

    def approach(self) -> None:
        self.into.base.flush()
        self.above.flush()  # the header's barrier in the drain is for what the guest writes, too

    def drains(self) -> list[Disk]:
        return self.disks()

    def settle(self) -> None:
        self.into.base.flush()
        self._name(self.backing)

    def unsettle(self) -> None:
        if self.was is not None and self.above.backing_spec != self.was:
            self._name(self.was)

    def _name(self, spec: tuple[str, str | None]) -> None:
        """Record a backing file in the header above: a layer, or a disk's root."""
        was_read_only = self.above.read_only
        if was_read_only:
            self.above.reopen(False)
        try:
            self.above.set_backing(*spec)
        finally:
            if was_read_only:
                self.above.reopen(True)

    def switch(self) -> None:
        self.above.backing = self.into.base

    def parted(self) -> None:
        try:
            self.into.end()
        finally:
            if self._detached is not None:
                self._detached(self.into.top, self.into.base)

    def clean(self) -> None:
        with ExitStack() as steps:  # in reverse order, each whatever the others do
            if self._released is not None:
                steps.callback(self._released)
            steps.callback(self.into.give_up)
            if self.into.was_read_only and not self.into.base.read_only:
                with self._exclusive(0, None):
                    self.into.base.reopen(True)


class ActiveCommit(Mirror):
    """Of the layer that the guest writes: a mirror into a node below."""

    type = "commit"

    def __init__(self, disk: Disk, into: Into, *, on_error: str = "report", **more: Any) -> None:
        super().__init__(
            disk,
            into.base,
            base=into.base,
            on_source_error=on_error,
            on_target_error=on_error,
            **more,
        )
        self.into = into

    def run(self) -> Iterator[Progress]:
        yield from self.attempt("write", self._begin)
        yield from super().run()

    def _begin(self) -> int:
        with self.disk.exclusive(), Scope(SETTLE_SECONDS, NO_ANSWER):
            self.into.begin()
        return 0

    def _copy(self, offset: int, length: int, changing: bool = True) -> int:
        try:
            return super()._copy(offset, length, changing)
        finally:
            self.into.touched = self.into.touched or self.copier.touched

    def _patch(self, offset: int, length: int) -> int:
        self.into.touched = True
        return super()._patch(offset, length)

    def after(self, offset: int, length: int, data: memoryview | None) -> None:
        self.into.touched = True
        super().after(offset, length, data)

    def switch(self) -> None:
        super().switch()
        if self.pivot:
            self.into.was_read_only = False  # it is the disk now

    def parted(self) -> None:
        try:
            self.into.end()  # without a pivot, too: the base is then a copy of that moment
        finally:
            super().parted()

    def clean(self) -> None:
        with ExitStack() as steps:  # in reverse order, each whatever the others do
            steps.callback(super().clean)
            steps.callback(self.into.give_up)
            if self.into.was_read_only and not self.into.base.read_only:
                with self.disk.exclusive():
                    self.into.base.reopen(True)
