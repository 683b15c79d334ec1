"""Verify: compare what a disk reads as with another image while its guest writes, then change over.

    change vm to new.raw, without telling the guest      the guest would read other bytes there,
                                                         unless both images hold the same ones

The job goes over the whole disk in chunks. A guest's write sets a bit, so that its range is
compared again. A chunk that seems to differ is compared once more while it stands still, for a
guest may have written between the two reads. Then the job takes its *ending* (`jobs/job.py`)
through its steps: in `settle`, under the drain, what was written last is compared before the ending
settles. So the images are the same at the very moment at which one takes the place of the other. If
they differ, the job fails with the first offset at which they do, and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cowferry.block.bitmap import Bitmap, finest
from cowferry.block.disk import Disk
from cowferry.block.moves import Move
from cowferry.block.node import ONCE, Node, State, read
from cowferry.errors import CowferryError
from cowferry.jobs.ending import Ending, finish
from cowferry.jobs.job import Job, Progress

CHUNK = 1 << 20  # bytes compared at once
FEW = 4 << 20  # bytes that are compared under the drain rather than chased
ROUNDS = 8  # times that what a guest writes is chased

#: Return the first offset of the range at which two images differ; None if they do not.
Compare = Callable[[int, int], int | None]


class Verify(Job):
    """The job. `refused` makes the error from the first offset that differs."""

    def __init__(
        self,
        disk: Disk,
        type: str,
        compare: Compare,
        ending: Ending,
        refused: Callable[[int], CowferryError],
        *,
        released: Callable[[bool], None] | None = None,
        **common: Any,
    ) -> None:
        """`type` is what QMP calls the job. `released` is called in the end, with whether it ended
        well."""
        super().__init__(length=disk.size, **common)
        self.type = type  # type: ignore[misc]
        self.disk = disk
        self.compare = compare
        self.ending = ending
        self.refused = refused
        self.left = Bitmap("", disk.size, finest(disk.size))  # what is not known to be the same
        self._attached = False
        self._ended = False
        self._released = released

    def run(self) -> Iterator[Progress]:
        self.left.set(0, self.disk.size)
        with self.disk.exclusive():
            self.disk.bitmaps[self._key] = self.left
            self._attached = True
        for _ in range(ROUNDS):
            for offset, length in self.left.runs():
                for at in range(offset, offset + length, CHUNK):
                    n = min(CHUNK, offset + length - at)
                    yield from self.attempt("read", partial(self.chunk, at, n))
                    self.length = max(self.length, self.offset + n)
                    yield Progress(done=n, moved=n)
            if self.left.count() <= FEW:
                break

    def chunk(self, offset: int, length: int) -> int:
        """Compare a range. Raises `CowferryError` if it differs, and `OSError`."""
        self.left.clear(offset, length)
        try:
            with self.disk.shared(offset, length):
                found = self.compare(offset, length)
            if found is not None:  # or a guest has written there between the two reads
                with self.disk.exclusive(offset, length):
                    self._still(offset, length)
        except BaseException:
            self.left.set(offset, length)
            raise
        return length

    def _still(self, offset: int, length: int) -> None:
        """Compare a range in which nobody writes. Raises as `chunk`."""
        for at in range(offset, offset + length, CHUNK):
            found = self.compare(at, min(CHUNK, offset + length - at))
            if found is not None:
                raise self.refused(found)

    # The end -----------------------------------------------------------------------------

    def approach(self) -> None:
        for offset, length in list(self.left.runs()):
            for at in range(offset, offset + length, CHUNK):
                self.chunk(at, min(CHUNK, offset + length - at))
        self.ending.approach()

    def drains(self) -> list[Disk]:
        disks = self.ending.drains()
        return disks if self.disk in disks else [self.disk, *disks]

    def settle(self) -> None:
        for offset, length in list(self.left.runs()):
            self._still(offset, length)
        self.ending.settle()

    def unsettle(self) -> None:
        self.ending.unsettle()

    def moves(self) -> list[Move]:
        return self.ending.moves()

    def switch(self) -> None:
        self._detach()
        self._ended = True
        self.ending.switch()

    def parted(self) -> None:
        self.ending.parted()

    def clean(self) -> None:
        try:
            if self._attached:
                with self.disk.exclusive():
                    self._detach()
        finally:
            if self._released is not None:
                self._released(self._ended)

    def at_once(self, check: Callable[[], None]) -> None:
        """Do all of it in the calling thread, as no job that others see. `check` is called now and
        then, and raises if it is to stop. Raises `CowferryError`, `OSError`."""
        try:
            for _ in self.run():
                check()
            finish([self])
        finally:
            self.clean()

    def _detach(self) -> None:
        """Inside a drain."""
        self.disk.bitmaps.pop(self._key, None)
        self._attached = False

    @property
    def _key(self) -> str:
        return f"#verify {id(self)}"


def first_difference(one: Node | None, other: Node | None, offset: int, length: int) -> int | None:
    """Return the first offset of the range at which two chains read differently, else None.

    Raises `OSError`."""
    a, b = (memoryview(bytearray(min(length, CHUNK))) for _ in range(2))
    for at in range(offset, offset + length, len(a)):
        n = min(len(a), offset + length - at)
        read(one, a[:n], at, ONCE)
        read(other, b[:n], at, ONCE)
        if a[:n] != b[:n]:
            return at + next(i for i in range(n) if a[i] != b[i])
    return None


def through_holes(
    above: Node, one: Node | None, other: Node | None, offset: int, length: int
) -> int | None:
    """Return the first offset of the range at which two chains differ in what shows through the
    holes of `above`, else None. Raises `OSError`."""
    at = offset
    for e in list(above.extents(offset, length)):
        if e.state is State.HOLE:
            found = first_difference(one, other, at, e.length)
            if found is not None:
                return found
        at += e.length
    return None
