"""The disk: what guests, exports and jobs hold.

A disk has a root node that can be swapped live, a gate, leases and bitmaps. Its rules
(design.md, section 2), each held by a test:

* every consumer of a disk enters the gate, without exception;
* a worker leaves its shared entry before it asks for `exclusive`;
* inside `exclusive`, talk to nodes, never to the disk;
* lock order is disk range, then image metadata; no socket I/O inside the gate;
* whoever is inside `exclusive` may change bytes or mapping of that range of the root's
  chain; leaving drops the leases.
"""

from __future__ import annotations

import errno
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import Protocol

from cowferry.block import sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.gate import END, Gate, Slot
from cowferry.block.lease import DATA, SPAN, SPAN_BITS, WRITABLE, ZERO, Leases
from cowferry.block.limits import Group, Member
from cowferry.block.node import (
    ZEROES,
    Extent,
    Node,
    State,
    cached,
    clear,
    far,
    read,
    read_fully,
    with_holes,
)
from cowferry.block.rates import fitted
from cowferry.block.scope import CalledOff, Scope
from cowferry.block.throttle import READ, WRITE, Brake, Turnstile, let_through

Buffer = memoryview | None  # bytes, or None for zeroes

COPY_ON_READ_MAX = 1 << 20
# Bytes of a large TRIM or WRITE_ZEROES that one exclusive section changes: at least, at most, and
# at most while a tap may have to copy them.
LEAST, MOST, MOST_TAPPED = 1 << 20, 64 << 20, 4 << 20
MOMENT = 0.005  # seconds that such a section should take, because guests wait for it
DRAIN_SECONDS = 20.0  # that a drain waits for requests in flight; then guests go on
LOOK = 0.1  # seconds between looks whether somebody is called off


class Tap(Protocol):
    """Somebody who has to be there when the disk changes: a write-blocking mirror, a backup.

    Where `holds` is set (everywhere, if it is None) no write lease is handed out, so every write
    there comes by `Disk`, and both calls happen inside `exclusive` over the range. What they raise
    is the guest's answer. Bits of `holds` may be cleared at any time, and set inside a drain."""

    @property
    def holds(self) -> Bitmap | None: ...

    @property
    def slow(self) -> bool:
        """Whether they may wait for more than local files and memory."""

    def before(self, offset: int, length: int) -> None:
        """The range is about to change."""

    def after(self, offset: int, length: int, data: memoryview | None) -> None:
        """It has changed, to `data` if that is given; read the root otherwise."""

    def failed(self, offset: int, length: int) -> None:
        """The change failed, and some of the range may have changed."""


class _Place:
    """A thread's slot; it goes when the thread does, so that the gate does not collect them."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.slot = gate.slot()

    def __del__(self) -> None:
        self.gate.drop(self.slot)


class _Exclusive:
    """One stay inside `Disk.exclusive`. A class, because a generator costs each request more."""

    __slots__ = ("claim", "disk", "end", "length", "offset", "start")

    def __init__(self, disk: Disk, offset: int, length: int | None) -> None:
        self.disk, self.offset, self.length = disk, offset, length

    def try_enter(self) -> bool:
        """Enter a range if that needs no waiting. On False nothing has been entered."""
        assert self.length is not None
        gate, shift = self.disk.gate, self.disk.leases.shift
        self.start = self.offset >> shift << shift
        self.end = -(-(self.offset + self.length) >> shift) << shift
        claim = gate.try_claim(self.start, self.end)
        if claim is not None and shift != self.disk.leases.shift:
            gate.release(claim)  # the disk has another root by now, with other granules
            claim = None
        if claim is not None:
            self.claim = claim
        return claim is not None

    def __enter__(self) -> None:
        leases, gate, length = self.disk.leases, self.disk.gate, self.length
        if length is None:
            with Scope(DRAIN_SECONDS, f"requests on disk '{self.disk.name}' have not finished"):
                self.start, self.end, self.claim = 0, END, gate.claim(0, END)
            return
        while True:
            shift = leases.shift
            start = self.offset >> shift << shift
            end = -(-(self.offset + length) >> shift) << shift
            claim = gate.claim(start, end)
            if shift == leases.shift:
                break
            gate.release(claim)  # another root, with other granules, came while we waited
        self.start, self.end, self.claim = start, end, claim

    def __exit__(self, *_: object) -> None:
        disk = self.disk
        try:
            if self.length is None:
                disk.leases.reset(disk.root.granule, disk._holds())
            else:
                disk.leases.drop(self.start, self.end)
        finally:
            disk.gate.release(self.claim)


class Disk:
    """A virtual disk. Thread-safe; offsets and lengths in bytes; data paths raise `OSError`."""

    def __init__(self, root: Node, name: str = "", copy_on_read: bool = False) -> None:
        self.name = name
        self.retired = False  # closed, or about to be. Set inside a drain
        self.origin = ""  # the image by whose name it was opened, if it has moved since or may
        self.store = secrets.token_hex(16)  # what `block/identity.py` calls the disk itself
        self.root = root  # swapped only inside exclusive() over the whole disk
        self.gate = Gate()
        self.leases = Leases(root.granule)
        self.bitmaps: dict[str, Bitmap] = {}  # of jobs, beside the root's. Changed inside a drain
        self.taps: tuple[Tap, ...] = ()  # changed only inside a drain
        self.late: list[Callable[[], None]] = []  # what `in_drain` has put off
        self.rank = 0  # one more than that of the disk whose tap writes this one: see `in_order`
        # What a request passes before it enters the gate, in this order: none, on most disks.
        self.turnstiles: tuple[Turnstile, ...] = ()
        # Its places in groups of limits, the first of them: one that `limit` sets, and those of
        # the throttle nodes below the topmost one. Changed by `limit`.
        self.members: tuple[Member, ...] = ()
        self._was_in: Group | None = None  # the group that it left when its limits were taken away
        self._brake: Brake | None = None  # the last of them. Set by `brake`
        self._turning = threading.Lock()  # guards the four above
        self.copy_on_read = copy_on_read and not root.read_only
        # What the image was opened with holds for the disk, whatever its root is later.
        self.ignores_discard = any(n.ignores_discard for n in _format(root))
        self.detects_zeroes = max(n.detects_zeroes for n in _down(root))
        self.leases.reset(root.granule, self._holds())
        self._local = threading.local()  # .place: this thread's place in the gate

    @property
    def size(self) -> int:
        """Bytes. Changes only inside a drain."""
        return self.root.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused with EPERM."""
        return self.root.read_only

    @property
    def limits(self) -> Member | None:
        """Its place in the group whose limits are its own; there may be others beside."""
        return self.members[0] if self.members else None

    def limit(self, group: Group | None, *others: Group) -> None:
        """Its guests' requests keep to a group's limits from now on, or to none.

        `others`: with that, to the limits of these, too. Left out, they stay, but with None. The
        limits are the disk's: they stay, whatever its root is."""
        with self._turning:
            old = self.members
            if group is None or not old:
                groups = (group, *others) if group is not None else ()
                first = [Member(g, self._was_in) for g in groups[:1]]
                self.members = (*first, *(Member(g) for g in groups[1:]))
                self._was_in = old[0].group if old else self._was_in
                self._turn()
        if group is None:
            for member in old:
                member.leave()
        elif old:
            old[0].move(group)

    @property
    def brake(self) -> Brake | None:
        """What slows writes down, a little each, while a job holds it down."""
        return self._brake

    @brake.setter
    def brake(self, brake: Brake | None) -> None:
        with self._turning:
            self._brake = brake
            self._turn()

    def _turn(self) -> None:
        self.turnstiles = tuple(t for t in (*self.members, self._brake) if t is not None)

    def wait(self, direction: int, length: int, unless: Callable[[], bool] | None = None) -> None:
        """Pass the turnstiles with a request of so many bytes. For a thread that may sleep.

        Raises ESHUTDOWN if the disk is closed meanwhile, ECANCELED once `unless` says so."""
        turnstiles = self.turnstiles
        while turnstiles and turnstiles[0].admit(direction, length):
            turnstiles = turnstiles[1:]
        if turnstiles:
            answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
            let_through(turnstiles, direction, length, answer.put, answer)
            while unless is not None and answer.empty():
                if unless():
                    for turnstile in turnstiles:
                        turnstile.dismiss(answer, False)
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                with suppress(queue.Empty):
                    answer.put(answer.get(timeout=LOOK))
            if not answer.get():
                raise OSError(errno.ESHUTDOWN, f"disk '{self.name}' was closed")

    def retire(self) -> None:
        """It is about to be closed: whoever waits for his turn is not to come any more, and nobody
        is in it when this returns. The number of a closed file may be another file's."""
        with self._turning:
            members, self.members, self.turnstiles = self.members, (), ()
        for member in members:
            member.leave(go=False)
        with self.exclusive():
            self.retired = True

    def in_drain(self, work: Callable[[], None], patience: float) -> bool:
        """Do `work` inside a drain, if requests in flight finish within `patience` seconds. Else it
        is done later (`do_late`), and this returns False: nobody waits for it."""
        try:
            with Scope(patience, f"requests on disk '{self.name}' have not finished"):
                drain = self.exclusive()
                drain.__enter__()
        except CalledOff:
            self.late.append(work)
            return False
        try:
            work()
        finally:
            drain.__exit__()
        return True

    def do_late(self, patience: float = 0.2) -> None:
        """Do what could not be done in a drain before."""
        late, self.late = self.late, []
        for work in late:
            self.in_drain(work, patience)

    def slot(self) -> Slot:
        """The calling thread's own place in the gate."""
        place: _Place | None = getattr(self._local, "place", None)
        if place is None:
            place = self._local.place = _Place(self.gate)
        return place.slot

    def exclusive(self, offset: int = 0, length: int | None = None) -> _Exclusive:
        """The range, rounded out to granules, is this thread's alone; None: the whole disk.

        Entering raises `CalledOff` (an `OSError`) if a scope of the thread ends, and for the whole
        disk if requests are in flight for `DRAIN_SECONDS`: while it waits, guests are held back.
        Inside, talk to nodes. Leaving drops the leases of the range. Not reentrant."""
        return _Exclusive(self, offset, length)

    @contextmanager
    def shared(self, offset: int, length: int) -> Iterator[None]:
        """The calling thread is inside `offset, length` along with other requests."""
        slot = self.slot()
        self.gate.enter(slot, offset, offset + length)
        try:
            yield
        finally:
            self.gate.leave(slot)

    def afloat(self) -> AbstractContextManager[None]:
        """The calling thread is in the way of drains, and of no request: what it has looked up may
        change, but no file of the chain is closed meanwhile."""
        return self.shared(END - 1, 1)

    def check(self, offset: int, length: int, write: bool = False, discard: bool = False) -> None:
        """Check a request's range, for every consumer. Raises EINVAL, ENOSPC, EPERM.

        A request past the end is ENOSPC if it writes. It is EINVAL if it reads or discards (the
        NBD specification, "Error values")."""
        if offset < 0 or length < 0:
            raise OSError(errno.EINVAL, f"disk '{self.name}': negative offset or length")
        if (write or discard) and self.root.read_only:
            raise OSError(errno.EPERM, f"disk '{self.name}' is read-only")
        if offset + length > self.root.size:
            code = errno.ENOSPC if write else errno.EINVAL
            raise OSError(
                code, f"disk '{self.name}': {offset}+{length} is past its end at {self.root.size}"
            )

    # Requests. `paid`: the caller has passed the turnstiles already ------------------------

    def pread(self, buf: memoryview, offset: int, paid: bool = False) -> None:
        """Fill `buf` with the disk's bytes at `offset`."""
        length = len(buf)
        if not length:
            return
        if self.turnstiles and not paid:
            self.wait(READ, length)
        with self.shared(offset, length):
            self.check(offset, length)
            if not self.copy_on_read and self.serve_read(buf, offset):
                return
            read(self.root, buf, offset)
        if self.copy_on_read:
            self._keep_read(buf, offset)

    def read_pieces(self, offset: int, length: int, worth: int) -> list[tuple[int, Buffer]]:
        """Read a range: (length, bytes) of each piece, in order.

        The bytes of a piece are None if leases say that it reads as zeroes; such a piece has
        `worth` bytes at least. This never asks a file system where data is: the bytes that have
        no lease are read. The caller has passed the turnstiles. Raises `OSError`."""
        pieces: list[tuple[int, Buffer]] = []
        with self.shared(offset, length):
            self.check(offset, length)
            runs = None if self.copy_on_read else self._leased_or_filled(offset, offset + length)
            if runs is not None and any(fd < 0 and n >= worth for fd, _, n in runs):
                for zero, some in groupby(runs, lambda run: run[0] < 0 and run[2] >= worth):
                    wanted = list(some)
                    n = sum(run[2] for run in wanted)
                    part = None if zero else memoryview(bytearray(n))
                    if part is not None:
                        _read_runs(wanted, part)
                    pieces.append((n, part))
                return pieces
            data = memoryview(bytearray(length))
            if runs is not None:
                _read_runs(runs, data)
            else:
                read(self.root, data, offset)
        if self.copy_on_read:
            self._keep_read(data, offset)
        return [(length, data)]

    def serve_read(self, buf: memoryview, offset: int) -> bool:
        """Fill `buf` from leases, filling those first. Caller is inside. False: not all leased."""
        runs = self._leased_or_filled(offset, offset + len(buf))
        if runs is None:
            return False
        _read_runs(runs, buf)
        return True

    def _leased_or_filled(self, offset: int, end: int) -> list[tuple[int, int, int]] | None:
        """Call `_leased` for reading, after one try to fill missing leases. Caller is inside."""
        runs = self._leased(offset, end, 0)
        if runs is None:
            self.leases.fill(self.root, offset, end - offset)
            runs = self._leased(offset, end, 0)
        return runs

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False, paid: bool = False) -> None:
        """Write; with `fua` durable on return (N2). A part may be written if it raises."""
        length = len(buf)
        if not length:
            return
        if self.turnstiles and not paid:
            self.wait(WRITE, length)
        if self.detects_zeroes and _is_zero(buf):
            return self.zero(offset, length, self.detects_zeroes == "unmap", fua, paid=True)
        # Where no write lease is handed out, none is looked for.
        if self.leases.held(offset, length) or not self._in_place(buf, offset):
            self._change(offset, length, lambda: self.root.pwrite(buf, offset), buf)
        if fua:
            self.flush()

    def try_pwrite(self, buf: memoryview, offset: int) -> bool:
        """Write without waiting for anybody else's request, for a job, a server or a cold disk.

        False: nothing was done, and a thread that may wait has to call `pwrite`. The caller has
        passed the turnstiles, and asks after no lease was found. Raises `OSError`."""
        length = len(buf)
        if self.gate.contended or self.detects_zeroes:  # cheaper to see here
            return False
        alone = _Exclusive(self, offset, length)
        if not alone.try_enter():
            return False
        if self.may_wait(offset, length) or not self._at_hand(offset, length):
            self.gate.release(alone.claim)  # nothing has changed: the leases stay
            return False
        try:
            self._change_inside(offset, length, partial(self.root.pwrite, buf, offset), buf)
        finally:
            alone.__exit__()
        return True

    def _at_hand(self, offset: int, length: int) -> bool:
        """Whether what a write has to copy first is in memory, as far as leases can tell.

        A granule that is written in part may be copied from below. The caller is inside
        `exclusive`."""
        leases, end = self.leases, offset + length
        shift = leases.shift
        for granule in {offset >> shift, end - 1 >> shift}:
            if offset <= granule << shift and (granule + 1) << shift <= end:
                continue  # written as a whole
            table = leases.tables.get(granule >> SPAN_BITS)
            entry = table[granule & (SPAN - 1)] if table is not None else 0
            if entry & 3 == ZERO:
                continue
            if not entry:
                return False
            fd, host = leases.fds[entry >> 8 & 0xFFFF], entry >> 24 << 9
            # The page cache is filled by more than a granule at a time: both ends tell enough.
            if not (cached(fd, host) and cached(fd, host + (1 << shift) - 1)):
                return False
        return True

    def _in_place(self, buf: memoryview, offset: int) -> bool:
        """Write by leases, filling those first. False: not all leased, nothing was done."""
        length = len(buf)
        with self.shared(offset, length):
            self.check(offset, length, write=True)
            runs = self._leased(offset, offset + length, WRITABLE)
            if runs is None and self._leased(offset, offset + length, 0) is None:
                self.leases.fill(self.root, offset, length)
                runs = self._leased(offset, offset + length, WRITABLE)
            if runs is None:
                return False
            try:
                for fd, host, run in runs:
                    sysio.pwrite(fd, buf[:run], host)
                    buf = buf[run:]
            finally:  # a write that failed may have changed some of it
                self.mark(offset, length)
        return True

    def zero(
        self, offset: int, length: int, unmap: bool = False, fua: bool = False, fast: bool = False,
        paid: bool = False,
    ) -> None:  # fmt: skip
        """Make the range read as zeroes. `fast`: EOPNOTSUPP rather than a slow way."""
        if not length:
            return
        if self.turnstiles and not paid:
            self.wait(WRITE, 0)
        for _ in self.zeroing(offset, length, unmap, fast):
            pass
        if fua:
            self.flush()

    def discard(self, offset: int, length: int, fua: bool = False, paid: bool = False) -> None:
        """The range is needed no more; it never reads as an older layer again (ST4)."""
        if not length:
            return
        if self.turnstiles and not paid:
            self.wait(WRITE, 0)
        for _ in self.discarding(offset, length):
            pass
        if fua:
            self.flush()

    def zeroing(
        self, offset: int, length: int, unmap: bool = False, fast: bool = False
    ) -> Iterator[None]:
        """`zero` in steps, for a caller that lets other requests go first. Does not flush.

        The caller has passed the turnstiles. Nothing is held when this yields."""

        unmap = unmap and not self.ignores_discard

        def work(at: int, n: int) -> None:
            self.root.zero(at, n, unmap, fast)

        return self._in_steps(offset, length, work, discard=False)

    def discarding(self, offset: int, length: int) -> Iterator[None]:
        """`discard` in steps, as `zeroing`."""

        if self.ignores_discard:
            self.check(offset, length, discard=True)
            return iter(())

        def work(at: int, n: int) -> None:
            self.root.discard(at, n)

        return self._in_steps(offset, length, work, discard=True)

    def _in_steps(
        self, offset: int, length: int, work: Callable[[int, int], None], discard: bool
    ) -> Iterator[None]:
        """Change a range piece by piece, each piece in an exclusive section of its own.

        Requests of other clients get in between two pieces. A piece takes about `MOMENT`. Its
        borders are borders of granules, so that no granule is changed in part without need."""
        with self.shared(offset, length):
            self.check(offset, length, not discard, discard)
        end, size = offset + length, max(LEAST, self.root.granule)
        while offset < end:
            stop = min((offset // size + 1) * size, end)
            begin = time.monotonic()
            self._change(offset, stop - offset, partial(work, offset, stop - offset), None, discard)
            took = time.monotonic() - begin
            least = max(LEAST, self.root.granule)
            most = max(MOST_TAPPED if self.taps else MOST, least)
            size = min(fitted(size, took, MOMENT, least, most), most)
            offset = stop
            yield

    def flush(self) -> None:
        """Every write that returned before the call is durable on return (N1, N3).

        Inside like any other request, but overlapping with drains only: the root that it flushes
        is not closed under it."""
        with self.afloat():
            if not self.retired:  # or it was flushed when it was closed
                self.root.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The resolved runs of the range, with depth, as they are at one moment."""
        with self.shared(offset, length):
            self.check(offset, length)
            return list(with_holes(self.root, offset, length))

    def resize(self, size: int) -> None:
        """Change the disk's size under a drain."""
        self.root.prepare_resize(size)
        with self.exclusive():
            self.root.change_size(size)
            for bitmap in self.bitmaps.values():
                bitmap.resize(self.root.size)

    def _change(
        self,
        offset: int,
        length: int,
        work: Callable[[], None],
        data: memoryview | None = None,
        discard: bool = False,
    ) -> None:
        """Do `work`, a change of the root's range, alone in it, with bitmaps and taps there."""
        with self.exclusive(offset, length):
            self._change_inside(offset, length, work, data, discard)
        if self.root.crowded:
            with suppress(OSError):  # the guest that asks for a flush gets the error
                self.flush()

    def _change_inside(
        self,
        offset: int,
        length: int,
        work: Callable[[], None],
        data: memoryview | None,
        discard: bool = False,
    ) -> None:
        """`_change` by a caller that holds `exclusive` over the range."""
        self.check(offset, length, not discard, discard)
        keeper = self.root.keeper
        if keeper is not None and keeper.holds.any(offset, length):
            self.leases.drop(*keeper.protect(offset, length))  # they may be written in place
        self.mark(offset, length)
        for tap in self.taps:
            tap.before(offset, length)
        try:
            work()
        except BaseException:
            for tap in self.taps:
                tap.failed(offset, length)
            raise
        finally:  # a job may have read the old bytes after the mark above
            for bitmap in self.bitmaps.values():
                bitmap.mark(offset, length)
        for tap in self.taps:
            tap.after(offset, length, data)

    def mark(self, offset: int, length: int) -> None:
        """A write of the range is about to be visible: tell the bitmaps. Caller is inside."""
        for bitmap in self.bitmaps.values():
            bitmap.mark(offset, length)
        for bitmap in self.root.bitmaps.values():
            bitmap.mark(offset, length)

    def may_wait(self, offset: int, length: int) -> bool:
        """Whether a write may have to wait for more than the file that it goes to.

        Then a thread whose wait would hold up others must not do it."""
        keeper = self.root.keeper
        if keeper is not None and keeper.holds.any(offset, length):
            return True
        return any(tap.slow for tap in self.taps) or bool(far(self.root))

    def _holds(self) -> tuple[Bitmap, ...] | None:
        """Where write leases are not handed out. Inside a drain."""
        if self.detects_zeroes:
            return None
        keeper = self.root.keeper
        holds = [] if keeper is None else [keeper.holds]
        for tap in self.taps:
            if tap.holds is None:
                return None
            holds.append(tap.holds)
        return tuple(holds)

    # -------------------------------------------------------------------------------------

    def _leased(self, offset: int, end: int, need: int) -> list[tuple[int, int, int]] | None:
        """(fd, host, length) of each run, fd -1 for zeroes; None if a granule is not leased so."""
        leases = self.leases
        shift, tables, fds = leases.shift, leases.tables, leases.fds
        runs: list[tuple[int, int, int]] = []
        while offset < end:
            granule = offset >> shift
            table = tables.get(granule >> SPAN_BITS)
            entry = table[granule & (SPAN - 1)] if table is not None else 0
            if not entry or entry & need != need:
                return None
            within = offset & ((1 << shift) - 1)
            length = min((1 << shift) - within, end - offset)
            if entry & 3 == ZERO:
                fd, host = -1, 0
            else:
                assert entry & 3 == DATA
                fd, host = fds[entry >> 8 & 0xFFFF], (entry >> 24 << 9) + within
            if runs and runs[-1][0] == fd and (fd < 0 or sum(runs[-1][1:]) == host):
                runs[-1] = (fd, runs[-1][1], runs[-1][2] + length)
            else:
                runs.append((fd, host, length))
            offset += length
        return runs

    def _keep_read(self, buf: memoryview, offset: int) -> None:
        """Copy-on-read: place what was just read wherever the root still has a hole.

        The guest has its answer whether this works or not; a failure only costs the copy."""
        granule = self.root.granule
        start = offset // granule * granule
        stop = min(-(-(offset + len(buf)) // granule) * granule, self.root.size)
        while start < stop:
            length = min(COPY_ON_READ_MAX, stop - start)
            if any(e.state is State.HOLE for e in self.root.extents(start, length)):
                try:
                    self._place(start, length)
                except OSError:
                    return
            start += length

    def _place(self, start: int, length: int) -> None:
        with self.exclusive(start, length):
            at = start
            for e in list(self.root.extents(start, length)):
                if e.state is State.HOLE and self.root.backing is not None:
                    part = memoryview(bytearray(e.length))
                    read(self.root.backing, part, at)
                    self.root.pwrite(part, at)
                at += e.length


def _read_runs(runs: Iterable[tuple[int, int, int]], buf: memoryview) -> None:
    """Fill `buf` from (fd, host, length) of each run, fd -1 for zeroes. Raises `OSError`."""
    for fd, host, length in runs:
        if fd < 0:
            clear(buf[:length])
        else:
            read_fully(fd, buf[:length], host)
        buf = buf[length:]


def in_order(disks: Iterable[Disk]) -> list[Disk]:
    """Each once, in the order in which whoever drains several of them has to do it (D2): a guest
    who is inside a disk may have to enter the one that a tap of it writes, never the reverse."""
    return sorted({id(d): d for d in disks}.values(), key=lambda d: (d.rank, id(d)))


def os_error(code: int, text: str) -> OSError:
    """An `OSError` with the field's wording and a name of whose it is."""
    return OSError(code, f"{text}: {os.strerror(code)}")


def _down(node: Node | None) -> Iterator[Node]:
    """A node, and the nodes that its bytes lie in."""
    while node is not None:
        yield node
        node = node.file


def _format(node: Node) -> Iterator[Node]:
    """The filters on top of an image, and the image itself."""
    for layer in _down(node):
        yield layer
        if not layer.filter:
            return


def _is_zero(buf: memoryview) -> bool:
    """Whether all bytes are zero. Looks no further than the first piece that is not."""
    return all(
        buf[at : at + len(ZEROES)] == ZEROES[: min(len(ZEROES), len(buf) - at)]
        for at in range(0, len(buf), len(ZEROES))
    )
