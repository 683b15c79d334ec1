"""The lane: requests served from leases, without a wait and without an allocation.

One lane belongs to one thread (a connection's reader, a queue of a vhost-user device). It knows
no protocol and no format. For a request it enters the gate if that needs no waiting, looks up
where the bytes lie, does one system call into or out of the caller's buffer, and leaves. All
that cannot be done so is answered with `SLOW`: the caller hands the request to a thread that
may wait, which uses `Disk.pread` and its kin. `SLOW` promises that the request had no effect
that a repetition would not have, so handing it on is always right.

The rules it lives by (design.md, section 2): enter, then look up, then the system call, then
leave; nothing is sent to anybody inside the gate; the lane never waits at the gate, so a job's
exclusive section delays the requests it overlaps and no others on the connection.

Cached data is read with RWF_NOWAIT: what is not in the page cache comes back as `SLOW` rather
than stall everything behind it. Some file systems (tmpfs) refuse the flag; there reading never
waits for long, and the plain call is used.

Written for Cython's pure-Python mode: typed locals, no closures, no allocation in the common
case of a request within one granule; `sysio` and the `os` calls are what a .pxd replaces.
"""

from __future__ import annotations

import errno
import os

from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.lease import DATA, SPAN, SPAN_BITS, WRITABLE
from cowferry.block.node import NOWAIT, clear

DONE, ZEROES, SLOW = 0, 1, 2  # answers; ZEROES: reads as zeroes, the buffer was not touched

MASK = SPAN - 1


class Lane:
    """One thread's way into a disk. Not thread-safe: one lane for each thread."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.gate = disk.gate
        self.slot = disk.gate.slot()
        self.leases = disk.leases
        self.fds: list[int] = disk.leases.fds  # whose descriptors `waits` speaks of
        self.waits: set[int] = set()  # descriptors that know no RWF_NOWAIT
        self.barren: set[int] = set()  # granules that no fill gave a lease, at `epoch`
        self.epoch = -1

    def close(self) -> None:
        """The thread is done with the disk."""
        self.gate.drop(self.slot)

    def read(self, buf: memoryview, offset: int, length: int) -> int:
        """Fill buf[:length] from `offset`. DONE, ZEROES or SLOW; raises `OSError`."""
        end = offset + length
        slot = self.slot
        gate = self.gate
        if not gate.try_enter(slot, offset, end):
            return SLOW
        try:
            disk = self.disk
            if disk.copy_on_read or end > disk.root.size:
                return SLOW
            leases = self.leases
            shift = leases.shift
            granule = offset >> shift
            table = leases.tables.get(granule >> SPAN_BITS)
            entry = table[granule & MASK] if table is not None else 0
            if (end - 1) >> shift != granule:
                return self._read_wide(buf, offset, end)
            if not entry:
                entry = self._fill(granule, offset, length)
                if not entry:
                    return SLOW
            if entry & 3 != DATA:
                return ZEROES
            fd = leases.fds[entry >> 8 & 0xFFFF]
            host = (entry >> 24 << 9) + offset - (granule << shift)
            return self._preadv(fd, buf, host, length)
        finally:
            gate.leave(slot)

    def write(self, buf: memoryview, offset: int, length: int) -> int:
        """Write buf[:length] in place at `offset`. DONE or SLOW; raises `OSError`."""
        end = offset + length
        slot = self.slot
        gate = self.gate
        if not gate.try_enter(slot, offset, end):
            return SLOW
        try:
            disk = self.disk
            root = disk.root
            if end > root.size or root.read_only:
                return SLOW
            leases = self.leases
            shift = leases.shift
            granule = offset >> shift
            if (end - 1) >> shift != granule:
                return self._write_wide(buf, offset, end)
            table = leases.tables.get(granule >> SPAN_BITS)
            entry = table[granule & MASK] if table is not None else 0
            if not entry and not leases.held(offset, length):
                entry = self._fill(granule, offset, length)
            if not entry & WRITABLE:
                return SLOW
            fd = leases.fds[entry >> 8 & 0xFFFF]
            try:
                sysio.pwrite(fd, buf, (entry >> 24 << 9) + offset - (granule << shift))
            finally:  # a write that failed may have changed some of it
                if disk.bitmaps or root.bitmaps:
                    disk.mark(offset, length)
            return DONE
        finally:
            gate.leave(slot)

    # -------------------------------------------------------------------------------------

    def _fill(self, granule: int, offset: int, length: int) -> int:
        """The entry of a granule that was missed, after one try to fill it. Inside the gate."""
        leases = self.leases
        if leases.epoch != self.epoch:
            self.barren.clear()
            self.epoch = leases.epoch
        if self.gate.claims or granule in self.barren:
            return 0
        leases.fill(self.disk.root, offset, length)
        table = leases.tables.get(granule >> SPAN_BITS)
        entry = table[granule & MASK] if table is not None else 0
        if not entry and len(self.barren) < 1 << 16:
            self.barren.add(granule)
        return entry

    def _preadv(self, fd: int, buf: memoryview, host: int, length: int) -> int:
        """Read in one call. A short read (cold, or past the file's end) is SLOW."""
        if self.fds is not self.leases.fds:  # another root: the numbers mean other files
            self.fds = self.leases.fds
            self.waits.clear()
        if fd not in self.waits:
            try:
                if os.preadv(fd, (buf,), host, NOWAIT) == length:
                    return DONE
                return SLOW
            except BlockingIOError:
                return SLOW
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.waits.add(fd)
        return DONE if os.preadv(fd, (buf,), host) == length else SLOW

    def _read_wide(self, buf: memoryview, offset: int, end: int) -> int:
        """Several granules, runs that lie together in one call."""
        leases = self.leases
        shift = leases.shift
        size = 1 << shift
        done = 0  # bytes of buf
        zeroes = 0  # of these, bytes that read as zero and are not filled in yet
        at = offset
        while at < end:
            fd, host, run = self._run(at, end, shift, size, 0)
            if run == 0:
                return SLOW
            if fd < 0:
                if zeroes != done:
                    clear(buf[done : done + run])
                else:
                    zeroes += run
            else:
                if zeroes == done and done:
                    clear(buf[:done])
                    zeroes = -1
                elif not done:
                    zeroes = -1
                if self._preadv(fd, buf[done : done + run], host, run) == SLOW:
                    return SLOW
            done += run
            at += run
        return ZEROES if zeroes == done else DONE

    def _write_wide(self, buf: memoryview, offset: int, end: int) -> int:
        leases = self.leases
        shift = leases.shift
        size = 1 << shift
        at = offset
        while at < end:  # all or nothing: look first, then write
            run = self._run(at, end, shift, size, WRITABLE)[2]
            if run == 0:
                return SLOW
            at += run
        at = offset
        try:
            while at < end:
                fd, host, run = self._run(at, end, shift, size, WRITABLE)
                if run == 0:
                    return SLOW  # the table was thrown out between the two looks
                sysio.pwrite(fd, buf[at - offset : at - offset + run], host)
                at += run
        finally:
            if self.disk.bitmaps or self.disk.root.bitmaps:
                self.disk.mark(offset, end - offset)
        return DONE

    def _run(self, at: int, end: int, shift: int, size: int, need: int) -> tuple[int, int, int]:
        """(fd or -1 for zeroes, host, length) of the run at `at`; length 0 for a miss."""
        leases = self.leases
        granule = at >> shift
        table = leases.tables.get(granule >> SPAN_BITS)
        entry = table[granule & MASK] if table is not None else 0
        if not entry:
            entry = self._fill(granule, at, end - at)
        if not entry or entry & need != need:
            return -1, 0, 0
        within = at - (granule << shift)
        length = size - within
        # The next granules belong to the run while their entries go on where this one ends.
        step = (size >> 9) << 24 if entry & 3 == DATA else 0
        expect = entry + step
        while at + length < end:
            granule += 1
            if granule & MASK == 0:
                table = leases.tables.get(granule >> SPAN_BITS)
            if table is None or table[granule & MASK] != expect:
                break
            expect += step
            length += size
        if length > end - at:
            length = end - at
        if entry & 3 != DATA:
            return -1, 0, length
        return leases.fds[entry >> 8 & 0xFFFF], (entry >> 24 << 9) + within, length
