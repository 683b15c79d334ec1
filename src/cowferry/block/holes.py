"""Where a file has data and where it has holes: asked of the kernel once, and remembered.

`lseek` with SEEK_DATA and SEEK_HOLE walks over the file. On tmpfs it visits every page of a run of
data, which takes milliseconds in a large file; on a network it is a message. So each answer is kept
as a run, as long as the kernel tells it, and the next question about the run costs a look-up.

What may be remembered follows from one rule. To take a hole for data is always right, because a
hole reads as zeroes. To take data for a hole loses the data. Hence:

* a run of *data* is remembered for every file. It becomes wrong, without harm, when room is given
  back; `forget` is for this. `sysio` calls it for each fallocate, clone and truncate;
* a *hole* is remembered only while nothing can write into the file (`stable`). It is asked for each
  time in a file that guests write, because they do so by leases, past this module. The kernel finds
  the end of a hole quickly.
"""

from __future__ import annotations

import errno
import os
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

AROUND = 16 << 20  # bytes; a question is asked from the multiple of this before
MOST = 1 << 15  # runs of each kind that are remembered: 512 KiB
END = (1 << 63) - 1  # behind each file: beyond the end of a file all is a hole


class Runs:
    """Disjoint ranges of bytes, ascending; those that touch are one. Not thread-safe."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.stops = array("q")

    def around(self, at: int) -> int:
        """Return where the range that holds byte `at` stops; 0: none does."""
        i = bisect_right(self.starts, at) - 1
        return self.stops[i] if i >= 0 and self.stops[i] > at else 0

    def before(self, at: int) -> int:
        """Return where the last range before byte `at` stops, 0 if there is none."""
        i = bisect_right(self.starts, at) - 1
        return self.stops[i] if i >= 0 else 0

    def add(self, start: int, stop: int) -> None:
        """Join [start, stop) with what is there."""
        first = bisect_left(self.stops, start)
        last = bisect_right(self.starts, stop)
        if first < last:
            start = min(start, self.starts[first])
            stop = max(stop, self.stops[last - 1])
        elif len(self.starts) >= MOST:
            self.clear()
            first = last = 0
        self.starts[first:last] = array("q", [start])
        self.stops[first:last] = array("q", [stop])

    def remove(self, start: int, stop: int) -> None:
        """Take [start, stop) out."""
        first = bisect_right(self.stops, start)
        last = bisect_left(self.starts, stop)
        if first >= last:
            return
        pieces = [
            (a, b) for a, b in ((self.starts[first], start), (stop, self.stops[last - 1])) if a < b
        ]
        self.starts[first:last] = array("q", [a for a, _ in pieces])
        self.stops[first:last] = array("q", [b for _, b in pieces])

    def clear(self) -> None:
        """Take all out."""
        del self.starts[:]
        del self.stops[:]


class Holes:
    """What is known about one open file. Thread-safe; offsets and lengths in bytes.

    `stable` says that nothing can write into the file."""

    def __init__(self, fd: int, stable: bool) -> None:
        self.fd = fd
        self.stable = stable  # changed by `reset`
        self._lock = threading.Lock()  # guards all below; not held over a system call
        self._data = Runs()
        self._holes = Runs()
        self._epoch = 0  # how often something was forgotten

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yield (length, whether it is a hole) of each run of the range."""
        end = offset + length
        while offset < end:
            with self._lock:
                stop = self._data.around(offset)
                hole = not stop
                if hole:
                    stop = self._holes.around(offset)
            if not stop:
                stop, hole = self._ask(offset)
            stop = min(stop, end)
            yield stop - offset, hole
            offset = stop

    def forget(self, offset: int, length: int) -> None:
        """The bytes may be a hole now, or none any more."""
        with self._lock:
            self._epoch += 1
            self._data.remove(offset, offset + length)
            self._holes.remove(offset, offset + length)

    def reset(self, stable: bool) -> None:
        """Forget everything: the file can be written now, or cannot be any more."""
        with self._lock:
            self._epoch += 1
            self.stable = stable
            self._data.clear()
            self._holes.clear()

    def _ask(self, offset: int) -> tuple[int, bool]:
        """Return (stop, whether it is a hole) of the run that `offset` lies in, and remember it."""
        with self._lock:
            epoch = self._epoch
            start = min(max(offset // AROUND * AROUND, self._data.before(offset)), offset)
        # The run may begin far before. With luck one question tells: is all from `start` on data?
        stop = self._seek(start, os.SEEK_HOLE)
        if stop <= offset:
            if stop > start:
                self._keep(epoch, start, stop, False)
            start = offset
            stop = self._seek(offset, os.SEEK_DATA)
            if stop > offset:
                return self._keep(epoch, start, stop, True)
            stop = self._seek(offset, os.SEEK_HOLE)
        return self._keep(epoch, start, max(stop, offset + 1), False)

    def _keep(self, epoch: int, start: int, stop: int, hole: bool) -> tuple[int, bool]:
        with self._lock:
            if epoch == self._epoch and (not hole or self.stable):
                (self._holes if hole else self._data).add(start, stop)
        return stop, hole

    def _seek(self, at: int, whence: int) -> int:
        """Where the next data or hole begins. All is data where the kernel cannot tell."""
        try:
            return os.lseek(self.fd, at, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # it lies beyond the end, or no data follows
                return END if whence == os.SEEK_DATA else at
            return at if whence == os.SEEK_DATA else END
