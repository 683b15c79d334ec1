"""Leases: where a disk's bytes lie, remembered so that a request is a look-up and a system call.

A disk is cut into granules (a qcow2 cluster; 64 KiB of a raw file). What `resolve` said of a
granule is kept as one integer, so that the table is a typed array which compiled code can walk:

    bits 63..24   host offset / 512      (48 bits of host offset: 256 TiB files)
    bits 23..8    index into `fds`
    bit  2        writable: may be overwritten in place
    bits 1..0     0 nothing known (a miss), 1 DATA at fd:host, 2 reads as ZERO

Arrays cover `SPAN` granules each and are made on first use, so a 1 TiB disk costs nothing until
it is touched; beyond `TABLES` arrays the oldest goes.

Rules (design.md, section 1): a lease is used only between enter and leave; leaving an exclusive
section drops the leases of its range; an answer wider than what one has entered is kept only if
no exclusive section ended meanwhile. `epoch` counts those ends.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Iterator

from cowferry.block.bitmap import Bitmap
from cowferry.block.node import Extent, Node, State, resolve

SPAN_BITS = 10
SPAN = 1 << SPAN_BITS  # granules in one array
NEAR = 32  # granules around a miss that are resolved with it in any case
FEW_RUNS = 4  # so few there say that the whole array is resolved soon
TABLES = 4096  # arrays kept: 32 MiB

NONE, DATA, ZERO, WRITABLE = 0, 1, 2, 4
EMPTY = array("q", bytes(8 * SPAN))
MAX_FDS = 1 << 16
MAX_HOST = 1 << 48


# A whole array as one integer, an entry in each 64 bits of it: what is done to all entries of a run
# is then one step of the interpreter, not one for each. No entry carries over into the next.
ALL = (1 << 64 * SPAN) - 1
ONES = ALL // ((1 << 64) - 1)
READ_ONLY = ALL - WRITABLE * ONES
COUNTING = sum(i << 64 * i for i in range(SPAN))


def _whole(entries: array[int]) -> int:
    if sys.byteorder == "big":
        entries.byteswap()
    return int.from_bytes(entries.tobytes(), "little")


def _entries(whole: int, count: int) -> array[int]:
    """The lowest `count` entries of it."""
    out = array("q")
    out.frombytes(whole.to_bytes(8 * count, "little"))
    if sys.byteorder == "big":
        out.byteswap()
    return out


class Leases:
    """The lease table of one disk. `tables` and `fds` are read by the lane inside the gate."""

    def __init__(self, granule: int) -> None:
        self.shift = granule.bit_length() - 1  # a granule is 1 << shift bytes
        # Ranges set in any of these get no write lease: somebody has to be there when they change.
        # None: nothing gets one. Changed by `reset` only; bits are set inside `exclusive` only.
        self.holds: tuple[Bitmap, ...] | None = ()
        self.tables: dict[int, array[int]] = {}  # written under `filling`, read inside the gate
        self.fds: list[int] = []  # append-only between resets
        self._index: dict[int, int] = {}  # fd -> its place in fds; guarded by `filling`
        self.epoch = 0  # guarded by `filling`
        # Duty: the test of `epoch` and the filling of `tables` are one step against `drop`.
        self.filling = threading.Lock()

    def drop(self, start: int, end: int) -> None:
        """Forget [start, end) in bytes: its exclusive section ends."""
        with self.filling:
            self.epoch += 1
            first, last = start >> self.shift, (end - 1) >> self.shift
            if (last >> SPAN_BITS) - (first >> SPAN_BITS) >= len(self.tables):
                for key in [k for k in self.tables if first >> SPAN_BITS <= k <= last >> SPAN_BITS]:
                    del self.tables[key]
                return
            for key in range(first >> SPAN_BITS, (last >> SPAN_BITS) + 1):
                table = self.tables.get(key)
                if table is None:
                    continue
                a = max(first - (key << SPAN_BITS), 0)
                b = min(last - (key << SPAN_BITS), SPAN - 1) + 1
                table[a:b] = EMPTY[a:b]

    def reset(self, granule: int, holds: tuple[Bitmap, ...] | None = ()) -> None:
        """Forget everything, descriptors included: the root changed. Inside a drain."""
        with self.filling:
            self.holds = holds
            self.epoch += 1
            self.tables = {}
            self.fds = []
            self._index = {}
            self.shift = granule.bit_length() - 1

    def held(self, offset: int, length: int) -> bool:
        """Whether a granule of the range gets no write lease: to fill it for a write is in vain."""
        if not self.holds:
            return self.holds is None
        start = offset >> self.shift << self.shift
        end = -(-(offset + length) >> self.shift) << self.shift
        return any(hold.any(start, end - start) for hold in self.holds)

    def fill(self, root: Node, offset: int, length: int) -> None:
        """Resolve what is not known around `offset, length` (which the caller has entered), and
        keep it: as much as one array holds, but where many runs make that slow, only the near."""
        shift = self.shift
        first, stop = offset >> shift, -(-(offset + length) >> shift)
        for key in range(first >> SPAN_BITS, ((stop - 1) >> SPAN_BITS) + 1):
            epoch = self.epoch
            base = key << SPAN_BITS
            a, b = max(first - base, 0), min(stop - base, SPAN)
            near = self._gap(key, a, b, NEAR)
            runs = self._resolve(root, base, *near)
            if len(runs) <= FEW_RUNS:
                whole = self._gap(key, a, b, SPAN)
                if whole != near:
                    near, runs = whole, self._resolve(root, base, *whole)
            with self.filling:
                if self.epoch == epoch:
                    self._keep(key, *near, runs)

    def _resolve(self, root: Node, base: int, a: int, b: int) -> list[Extent]:
        start, end = (base + a) << self.shift, min((base + b) << self.shift, root.size)
        return list(resolve(root, start, end - start, serve=True))

    def _gap(self, key: int, a: int, b: int, far: int) -> tuple[int, int]:
        """Granules `a` to `b` of an array, and what lies around them and is not known either."""
        low, high = max(a - far, 0), min(b + far, SPAN)
        table = self.tables.get(key)
        if table is None:
            return low, high
        while a > low and not table[a - 1]:
            a -= 1
        while b < high and not table[b]:
            b += 1
        return a, b

    def _keep(self, key: int, a: int, b: int, runs: list[Extent]) -> None:
        """Note the runs of granules `a` to `b` of an array."""
        part = array("q", EMPTY[a:b])
        granule = 1 << self.shift
        whole = sum(r.length for r in runs)
        at = 0  # bytes from granule `a`
        for e in _joined(runs):
            first = -(-at // granule)
            stop = (at + e.length) // granule  # whole granules only
            if at + e.length == whole:
                stop = -(-(at + e.length) // granule)  # the disk's last, short granule is whole
            if first < stop and not e.compressed:
                if e.state is State.ZERO and not e.writable:
                    part[first:stop] = array("q", [ZERO]) * (stop - first)
                elif e.fd >= 0:
                    self._lay(part, first, stop, e.host + first * granule - at, e)
            at += e.length
        self._withhold(part, ((key << SPAN_BITS) + a) << self.shift)
        table = self.tables.get(key)
        if table is not None:
            table[a:b] = part
            return
        if len(self.tables) >= TABLES:
            del self.tables[next(iter(self.tables))]
        table = array("q", EMPTY)
        table[a:b] = part
        self.tables[key] = table

    def _lay(self, table: array[int], first: int, stop: int, host: int, e: Extent) -> None:
        granule = 1 << self.shift
        if host % 512 or host + (stop - first) * granule > MAX_HOST:
            return
        index = self._index.get(e.fd)
        if index is None:
            if len(self.fds) >= MAX_FDS:
                return
            index = self._index[e.fd] = len(self.fds)
            self.fds.append(e.fd)
        entry = (host >> 9) << 24 | index << 8 | DATA
        if e.writable and self.holds is not None:
            entry |= WRITABLE
        count = stop - first
        steps = (granule >> 9 << 24) * COUNTING  # entry, entry + step, entry + 2 * step, ...
        table[first:stop] = _entries((steps + entry * ONES) & ALL >> 64 * (SPAN - count), count)

    def _withhold(self, part: array[int], start: int) -> None:
        """Make what lies in a held range read-only; `part` begins with the granule at `start`."""
        for hold in self.holds or ():
            for offset, length in hold.runs(start, len(part) << self.shift):
                first = max((offset - start) >> self.shift, 0)
                stop = min(-(-(offset + length - start) >> self.shift), len(part))
                if first < stop:
                    part[first:stop] = _entries(_whole(part[first:stop]) & READ_ONLY, stop - first)


def _joined(runs: list[Extent]) -> Iterator[Extent]:
    """Runs that lie together in one file and may be written there as one, its holes included.

    Or a granule that a guest has written in part, in a sparse file, would never get a lease."""
    before: Extent | None = None
    for e in runs:
        if (
            before is not None
            and e.writable
            and before.writable
            and e.fd == before.fd >= 0
            and e.host == before.host + before.length
        ):
            before = before._replace(length=before.length + e.length, state=State.DATA)
        else:
            if before is not None:
                yield before
            before = e
    if before is not None:
        yield before
