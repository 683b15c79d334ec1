"""The lane: serves one NBD connection from leases.

One reader per connection. It parses every request that a single `recv` brought, answers what
can be answered at once, and sends all those answers with a single `send`. "At once" means: the
range may be entered without waiting, its leases are there, and the system call will not block
(`RWF_NOWAIT` for reads; a write goes to the page cache). Everything else is handed to a few
workers, which answer by themselves: allocation and copy on write under contention, cold reads,
flushes, trims. So the reader never waits at the gate, and one cold read stalls nobody.

It knows no format. What it does with a disk is: enter, look at `leases`, `preadv` or `pwritev`,
leave; sockets are touched only outside. It is written to be compiled later: typed state, one
receive and one send buffer for the connection's whole life, memoryviews, no allocation per
request beyond what the interpreter makes of numbers.

Measured traps (prototypes/README.md): a window of 512 KiB receives three times faster than one
of 33 MiB, so the buffer grows only for a large write; slicing a bytearray copies, slicing a
memoryview does not; tmpfs refuses RWF_NOWAIT, and says so each time, so it is asked once a file.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.lease import SPAN, SPAN_BITS, WRITABLE, ZERO
from cowferry.block.node import Extent, State, clear
from cowferry.wire import nbd

log = logging.getLogger(__name__)

WINDOW = 512 << 10  # bytes asked of one recv
COALESCE = 256 << 10  # bytes of answers sent together
INLINE = 256 << 10  # larger reads and writes go to a worker
PENDING = 64  # requests in the workers' hands; more wait in the socket
MAX_RUNS = 4096  # extents in one block status reply
NOWAIT = getattr(os, "RWF_NOWAIT", 0)

Context = tuple[int, str, Callable[[list[Extent]], list[tuple[int, int]]]]


class Lane:
    """One connection in transmission phase, on one disk."""

    def __init__(
        self,
        sock: socket.socket,
        disk: Disk,
        writable: bool,
        structured: bool,
        contexts: list[Context],
        workers: ThreadPoolExecutor,
    ) -> None:
        self.sock = sock
        self.disk = disk
        self.writable = writable
        self.structured = structured
        self.contexts = contexts
        self.workers = workers
        self.slot = disk.gate.slot()
        self.sending = threading.Lock()  # whole replies only; never taken inside the gate
        self.room = threading.Semaphore(PENDING)  # bounds what workers hold of this connection
        self.pending = 0  # guarded by `idle`
        self.idle = threading.Condition()
        self.blocking: set[int] = set()  # descriptors that do not know RWF_NOWAIT
        self.closed = False
        self.out = bytearray(COALESCE + INLINE + 64)
        self.filled = 0  # bytes of `out` waiting to be sent; the reader's alone

    def run(self) -> None:
        """Serve until the client leaves or breaks the protocol. Then nothing is in flight."""
        try:
            self._loop()
        except (ConnectionError, TimeoutError, BrokenPipeError):
            pass
        except OSError as error:
            if not self.closed:
                log.info("nbd connection to '%s' ended: %s", self.disk.name, error)
        finally:
            with self.idle:
                self.idle.wait_for(lambda: not self.pending)
            self.disk.gate.drop(self.slot)

    def _loop(self) -> None:
        buffer = bytearray(WINDOW)
        view = memoryview(buffer)
        head = nbd.REQUEST.size
        unpack = nbd.REQUEST.unpack_from
        recv = self.sock.recv_into
        filled = taken = 0  # [taken, filled) of the buffer is not parsed yet
        need = head
        while True:
            if taken:
                view[: filled - taken] = view[taken:filled]
                filled, taken = filled - taken, 0
            if len(buffer) < need:  # one large write
                larger = bytearray(need)
                larger[:filled] = view[:filled]
                view.release()
                buffer, view = larger, memoryview(larger)
            elif len(buffer) > WINDOW and need <= WINDOW and filled <= WINDOW:
                smaller = bytearray(WINDOW)
                smaller[:filled] = view[:filled]
                view.release()
                buffer, view = smaller, memoryview(smaller)
            n = recv(view[filled:])
            if n == 0:
                return
            filled += n
            need = head
            while filled - taken >= head:
                magic, flags, kind, cookie, offset, length = unpack(buffer, taken)
                if magic != nbd.REQUEST_MAGIC:
                    log.warning("nbd client of '%s' sent no request magic", self.disk.name)
                    return
                if kind == nbd.READ:
                    taken += head
                    if flags or length > INLINE or not self._read(cookie, offset, length):
                        self._hand_over(kind, flags, cookie, offset, length, None)
                elif kind == nbd.WRITE:
                    if length > nbd.MAX_REQUEST:  # cannot be skipped at a sane price
                        log.warning("nbd client of '%s' wrote %d bytes", self.disk.name, length)
                        return
                    if filled - taken < head + length:
                        need = head + length
                        break
                    data = view[taken + head : taken + head + length]
                    taken += head + length
                    if flags or length > INLINE or not self._write(cookie, offset, data):
                        self._hand_over(kind, flags, cookie, offset, length, bytearray(data))
                    data.release()
                elif kind == nbd.DISC:
                    self._flush_out()
                    return
                else:
                    taken += head
                    self._hand_over(kind, flags, cookie, offset, length, None)
            if self.filled:
                self._flush_out()

    # What is answered at once ------------------------------------------------------------

    def _read(self, cookie: int, offset: int, length: int) -> bool:
        """Read from leases into the send buffer. False: nothing was done."""
        disk, slot = self.disk, self.slot
        gate, leases = disk.gate, disk.leases
        end = offset + length
        if disk.copy_on_read or not length:
            return False
        start = self.filled
        at = start + (nbd.DATA.size if self.structured else nbd.SIMPLE.size)
        if not gate.try_enter(slot, offset, end):
            return False
        try:
            if end > disk.root.size:
                return False
            out = memoryview(self.out)
            shift = leases.shift
            mask = (1 << shift) - 1
            position = offset
            while position < end:
                table = leases.tables.get(position >> shift >> SPAN_BITS)
                entry = table[position >> shift & (SPAN - 1)] if table is not None else 0
                if not entry:
                    if position != offset or gate.claims:
                        return False
                    leases.fill(disk.root, position, end - position)
                    table = leases.tables.get(position >> shift >> SPAN_BITS)
                    entry = table[position >> shift & (SPAN - 1)] if table is not None else 0
                    if not entry:
                        return False
                n = (1 << shift) - (position & mask)
                if position + n > end:
                    n = end - position
                if entry & 3 == ZERO:
                    clear(out[at : at + n])
                else:
                    fd = leases.fds[entry >> 8 & 0xFFFF]
                    if not self._pread(
                        fd, out[at : at + n], (entry >> 24 << 9) + (position & mask)
                    ):
                        return False
                position += n
                at += n
        finally:
            gate.leave(slot)
        if self.structured:
            nbd.DATA.pack_into(
                self.out, start, nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, nbd.CHUNK_DATA, cookie,
                length + 8, offset,
            )  # fmt: skip
        else:
            nbd.SIMPLE.pack_into(self.out, start, nbd.SIMPLE_MAGIC, 0, cookie)
        self.filled = at
        if at >= COALESCE:
            self._flush_out()
        return True

    def _pread(self, fd: int, part: memoryview, host: int) -> bool:
        """A read that does not block. False: it would, or is short."""
        if fd not in self.blocking and NOWAIT:
            try:
                return os.preadv(fd, [part], host, NOWAIT) == len(part)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.blocking.add(fd)
        return os.preadv(fd, [part], host) == len(part)

    def _write(self, cookie: int, offset: int, data: memoryview) -> bool:
        """Write in place by leases. False: nothing was done, or it may be done again."""
        disk, slot = self.disk, self.slot
        gate, leases = disk.gate, disk.leases
        end = offset + len(data)
        if not self.writable or not data:
            return False
        if not gate.try_enter(slot, offset, end):
            return False
        done = 0
        try:
            if end > disk.root.size:
                return False
            shift = leases.shift
            mask = (1 << shift) - 1
            position = offset
            while position < end:
                table = leases.tables.get(position >> shift >> SPAN_BITS)
                entry = table[position >> shift & (SPAN - 1)] if table is not None else 0
                if not entry & WRITABLE:
                    if entry or position != offset or gate.claims:
                        break
                    leases.fill(disk.root, position, end - position)
                    table = leases.tables.get(position >> shift >> SPAN_BITS)
                    entry = table[position >> shift & (SPAN - 1)] if table is not None else 0
                    if not entry & WRITABLE:
                        break
                n = (1 << shift) - (position & mask)
                if position + n > end:
                    n = end - position
                host = (entry >> 24 << 9) + (position & mask)
                sysio.pwrite(leases.fds[entry >> 8 & 0xFFFF], data[done : done + n], host)
                position += n
                done += n
            if done and disk.bitmaps:
                disk.mark(offset, done)
        except OSError:
            return False  # a worker tries again, and tells the client why it failed
        finally:
            gate.leave(slot)
        if done < len(data):
            if gate.contended:
                return False
            try:  # allocate here and now: cheaper than waking a worker
                disk.pwrite(data[done:], offset + done)
            except OSError:
                return False
        self._simple(cookie, 0)
        return True

    def _simple(self, cookie: int, code: int) -> None:
        nbd.SIMPLE.pack_into(self.out, self.filled, nbd.SIMPLE_MAGIC, code, cookie)
        self.filled += nbd.SIMPLE.size
        if self.filled >= COALESCE:
            self._flush_out()

    def _flush_out(self) -> None:
        with self.sending:
            self.sock.sendall(memoryview(self.out)[: self.filled])
        self.filled = 0

    # What workers do ---------------------------------------------------------------------

    def _hand_over(
        self, kind: int, flags: int, cookie: int, offset: int, length: int, data: bytearray | None
    ) -> None:
        if not self.room.acquire(blocking=False):
            self._flush_out()  # the client may wait for these before it sends more
            self.room.acquire()
        with self.idle:
            self.pending += 1
        try:
            self.workers.submit(self._work, kind, flags, cookie, offset, length, data)
        except RuntimeError:
            self._finished()
            raise ConnectionError("the server is stopping") from None

    def _finished(self) -> None:
        self.room.release()
        with self.idle:
            self.pending -= 1
            self.idle.notify_all()

    def _work(
        self, kind: int, flags: int, cookie: int, offset: int, length: int, data: bytearray | None
    ) -> None:
        try:
            try:
                reply = self._serve(kind, flags, cookie, offset, length, data)
            except OSError as error:
                log.warning(
                    "disk '%s': NBD command %d at %d+%d failed: %s",
                    self.disk.name, kind, offset, length, error,
                )  # fmt: skip
                reply = [self._error(kind, cookie, nbd.to_wire(error.errno), str(error))]
            except Exception:
                log.exception("disk '%s': NBD command %d failed", self.disk.name, kind)
                reply = [self._error(kind, cookie, nbd.to_wire(errno.EIO), "internal error")]
            with suppress(OSError), self.sending:
                for part in reply:
                    self.sock.sendall(part)
        finally:
            self._finished()

    def _error(self, kind: int, cookie: int, code: int, text: str) -> bytes:
        if self.structured and kind in (nbd.READ, nbd.BLOCK_STATUS):
            return nbd.error_chunk(cookie, code, text)
        return nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, code, cookie)

    def _serve(
        self, kind: int, flags: int, cookie: int, offset: int, length: int, data: bytearray | None
    ) -> list[bytes | memoryview]:
        disk = self.disk
        self._check_flags(kind, flags, offset, length)
        fua = bool(flags & nbd.CMD_FUA)
        if kind == nbd.READ:
            return self._read_reply(cookie, offset, length, bool(flags & nbd.CMD_DF))
        if kind == nbd.WRITE:
            assert data is not None
            disk.pwrite(memoryview(data), offset, fua)
        elif kind == nbd.FLUSH:
            disk.flush()
        elif kind == nbd.TRIM:
            disk.discard(offset, length, fua)
        elif kind == nbd.WRITE_ZEROES:
            unmap = not flags & nbd.CMD_NO_HOLE
            disk.zero(offset, length, unmap, fua, fast=bool(flags & nbd.CMD_FAST_ZERO))
        elif kind == nbd.CACHE:
            self._prefetch(offset, length)
        elif kind == nbd.BLOCK_STATUS:
            return self._status_reply(cookie, offset, length, bool(flags & nbd.CMD_REQ_ONE))
        else:
            raise OSError(errno.EINVAL, f"unknown command {kind}")
        return [nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, cookie)]

    FLAGS = {  # noqa: RUF012 - a constant table
        nbd.READ: nbd.CMD_DF | nbd.CMD_FUA,
        nbd.WRITE: nbd.CMD_FUA,
        nbd.FLUSH: nbd.CMD_FUA,
        nbd.TRIM: nbd.CMD_FUA,
        nbd.CACHE: nbd.CMD_FUA,
        nbd.WRITE_ZEROES: nbd.CMD_FUA | nbd.CMD_NO_HOLE | nbd.CMD_FAST_ZERO,
        nbd.BLOCK_STATUS: nbd.CMD_REQ_ONE | nbd.CMD_FUA,
    }

    def _check_flags(self, kind: int, flags: int, offset: int, length: int) -> None:
        if flags & ~self.FLAGS.get(kind, 0):
            raise OSError(errno.EINVAL, f"command {kind} does not know flags {flags:#x}")
        if kind in (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES):
            if not self.writable:
                raise OSError(errno.EPERM, "the export is read-only")
            self.disk.check(offset, length, write=True)
        elif kind != nbd.FLUSH:
            if kind == nbd.READ and length > nbd.MAX_REQUEST:
                raise OSError(errno.EOVERFLOW, f"a read of {length} bytes (32 MiB at most)")
            self.disk.check(offset, length)
        if kind == nbd.BLOCK_STATUS and not (self.contexts and length):
            raise OSError(errno.EINVAL, "no metadata context was negotiated, or no bytes asked")

    def _read_reply(
        self, cookie: int, offset: int, length: int, whole: bool
    ) -> list[bytes | memoryview]:
        if not self.structured:
            data = memoryview(bytearray(length))
            self.disk.pread(data, offset)
            return [nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, cookie), data]
        if length == 0:
            return [nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, nbd.CHUNK_NONE, cookie, 0)]
        runs = [(length, False)] if whole else self._zero_runs(offset, length)
        out: list[bytes | memoryview] = []
        for number, (n, zero) in enumerate(runs):
            done = nbd.CHUNK_DONE if number == len(runs) - 1 else 0
            if zero:
                head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, done, nbd.CHUNK_HOLE, cookie, 12)
                out.append(head + offset.to_bytes(8, "big") + n.to_bytes(4, "big"))
            else:
                data = memoryview(bytearray(n))
                self.disk.pread(data, offset)
                out.append(
                    nbd.DATA.pack(nbd.CHUNK_MAGIC, done, nbd.CHUNK_DATA, cookie, n + 8, offset)
                )
                out.append(data)
            offset += n
        return out

    def _zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(length, reads as zero) of each run; only long zeroes are worth a chunk."""
        runs: list[tuple[int, bool]] = []
        for e in self.disk.extents(offset, length):
            zero = e.state is State.ZERO and e.length >= nbd.PREFERRED
            if runs and runs[-1][1] == zero:
                runs[-1] = (runs[-1][0] + e.length, zero)
            else:
                runs.append((e.length, zero))
        # A guest may write where a zero was seen before the rest is read; each chunk is
        # right at some moment between request and reply, which is what the protocol asks.
        return runs

    def _prefetch(self, offset: int, length: int) -> None:
        """CACHE: have the bytes read ahead; a copy-on-read disk keeps them, too."""
        while length:
            n = min(length, 1 << 20)
            self.disk.pread(memoryview(bytearray(n)), offset)
            offset, length = offset + n, length - n

    def _status_reply(
        self, cookie: int, offset: int, length: int, one: bool
    ) -> list[bytes | memoryview]:
        extents = self.disk.extents(offset, length)
        out: list[bytes | memoryview] = []
        for number, (ident, _, describe) in enumerate(self.contexts):
            runs: list[tuple[int, int]] = []
            for n, flags in describe(extents):
                if runs and runs[-1][1] == flags and runs[-1][0] + n < 1 << 32:
                    runs[-1] = (runs[-1][0] + n, flags)
                    continue
                if len(runs) == (1 if one else MAX_RUNS):
                    break
                runs.append((n, flags))
            payload = nbd.block_status(ident, runs)
            done = nbd.CHUNK_DONE if number == len(self.contexts) - 1 else 0
            head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, done, nbd.CHUNK_STATUS, cookie, len(payload))
            out.append(head + payload)
        return out
