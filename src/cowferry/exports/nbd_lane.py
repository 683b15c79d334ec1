"""The lane: serves one NBD connection from leases.

One reader per connection. It parses every request that a single `recv` brought, answers what
can be answered at once, and sends all those answers with a single `send`. "At once" means: the
range may be entered without waiting, its leases are there, and the system call will not block
(`RWF_NOWAIT` for reads; a write goes to the page cache). The reader also allocates, if it gets the
range for itself without waiting. Everything else is handed to workers, which answer by themselves:
allocation under contention, cold reads, flushes, trims. So the reader never waits at the gate, and
one cold read stalls nobody.

Reads and changes have workers of their own, because changes may all wait at the gate for a job.
A worker does a large TRIM or WRITE_ZEROES in steps (`Disk.discarding`). After a moment it puts the
rest of the request behind the requests that wait for a worker, so that a few large requests do not
keep all workers from everybody else.

A disk with limits, or a brake, has turnstiles in front of its gate. A request that they do not
admit at once waits in their queue, where it is no thread; a timer then hands it to the workers. It
takes its place among the requests that are in work, so whoever sends more than that many is not
read any further; his own connection stands, nobody else's. When the client is gone, or sent away,
requests that wait are dropped: they were never answered. After an orderly goodbye, and when the
export ends, they are served at once.

It knows no format. What it does with a disk is: enter, look at `leases`, `preadv` or `pwritev`,
leave; sockets are touched only outside. It is written to be compiled later: typed state, one
receive and one send buffer for the connection's whole life, memoryviews, no allocation per
request beyond what the interpreter makes of numbers.

Measured traps (prototypes/README.md): a window of 512 KiB receives three times faster than one
of 33 MiB, so the buffer grows only for a large write; slicing a bytearray copies, slicing a
memoryview does not; tmpfs refuses RWF_NOWAIT, and says so each time, so it is asked once a file.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from cowferry.block.disk import Disk
from cowferry.block.lane import SLOW, ZEROES, Lane
from cowferry.block.lease import SPAN
from cowferry.block.node import clear
from cowferry.block.throttle import READ, WRITE, let_through
from cowferry.wire import nbd

log = logging.getLogger(__name__)

WINDOW = 512 << 10  # bytes asked of one recv
COALESCE = 256 << 10  # bytes of answers sent together
INLINE = 256 << 10  # larger reads and writes go to a worker
PENDING = 64  # requests in the workers' hands; more wait in the socket
BUDGET = 33 << 20  # bytes of those requests and of their unsent answers
MAX_RUNS = 4096  # extents in one block status reply
LOOK_AHEAD = 64 << 10  # bytes, at least, that the first look of a block status covers
TURN = 0.02  # seconds that a worker spends on a large change before it lets others go first
SEND_PARTS = 64  # buffers in one sendmsg
LOOK = 0.5  # seconds after which a reader that waits looks whether its client is still there

Buffer = bytes | memoryview
Describe = Callable[[Disk, int, int], list[tuple[int, int]]]  # (length, flags) of a range
Context = tuple[int, str, Describe]


class Request:
    """A request that is in work: handed to a worker, or waiting for its turn."""

    __slots__ = ("cookie", "data", "flags", "kind", "length", "offset", "steps", "weight")

    def __init__(
        self, kind: int, flags: int, cookie: int, offset: int, length: int, data: bytearray | None
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.data = data  # of a write
        self.weight = 4096 + (length if kind in (nbd.READ, nbd.WRITE) else 0)  # bytes
        self.steps: Iterator[None] | None = None  # the rest of a large change


class Connection:
    """One connection in transmission phase, on one disk."""

    def __init__(
        self,
        sock: socket.socket,
        disk: Disk,
        writable: bool,
        structured: bool,
        contexts: list[Context],
        workers: ThreadPoolExecutor,
        readers: ThreadPoolExecutor,
        writethrough: bool = False,
    ) -> None:
        self.sock = sock
        self.disk = disk
        self.writable = writable
        self.structured = structured
        self.contexts = contexts
        self.workers = workers
        self.readers = readers
        self.implied = nbd.CMD_FUA if writethrough else 0  # flags that every write has
        self.lane = Lane(disk)
        self.sending = threading.Lock()  # guards sends; never taken inside the gate
        # Workers' answers: (its buffers, weight). Appended to by anyone; the head, which may
        # have been sent in part, belongs to the holder of `sending`.
        self.queue: deque[tuple[list[Buffer], int]] = deque()
        self.sender = False  # a thread of its own sends the queue; guarded by `sending`
        self.pending = 0  # requests handed over and not answered; guarded by `idle`
        self.held = 0  # their weight in bytes; guarded by `idle`
        self.idle = threading.Condition()
        self.closed = False
        # A worker flushes for the reader. The reader sets it, and the worker clears it.
        self.flushing = False
        self.goodbye = False  # the client has taken leave: what it asked for is still done
        self.out = bytearray(COALESCE + INLINE + 64)
        self.out_view = memoryview(self.out)
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
            if not self.goodbye:
                self.closed = True  # the rest of large changes is dropped
            over = False
            while not over:  # what was on its way to the next turnstile just now waits there
                self._dismiss(go=self.goodbye)
                with self.idle:
                    over = self.idle.wait_for(lambda: not self.pending, LOOK)

    def finish(self) -> None:
        """Read no more from the client. What it has sent is served and answered, and then the
        connection ends."""
        self.goodbye = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """Send the client away. What waits for its turn is dropped, what is in work finishes."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        with self.idle:
            self.idle.notify_all()

    def _dismiss(self, go: bool) -> None:
        """None of our requests waits at a turnstile any longer."""
        for turnstile in self.disk.turnstiles:
            turnstile.dismiss(self, go)

    def close(self) -> None:
        """Leave the disk's in-flight table."""
        self.lane.close()

    def _loop(self) -> None:
        buffer = bytearray(WINDOW)
        view = memoryview(buffer)
        head = nbd.REQUEST.size
        unpack = nbd.REQUEST.unpack_from
        recv = self.sock.recv_into
        disk = self.disk
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
                    if disk.turnstiles and self._held_up(kind, flags, cookie, offset, length, None):
                        pass
                    elif flags or length > INLINE or not self._read(cookie, offset, length):
                        self._hand_over(Request(kind, flags, cookie, offset, length, None))
                elif kind == nbd.WRITE:
                    if length > nbd.MAX_REQUEST:  # cannot be skipped at a sane price
                        log.warning("nbd client of '%s' wrote %d bytes", self.disk.name, length)
                        return
                    if filled - taken < head + length:
                        need = head + length
                        break
                    flags |= self.implied
                    data = view[taken + head : taken + head + length]
                    taken += head + length
                    if disk.turnstiles and self._held_up(kind, flags, cookie, offset, length, data):
                        pass
                    elif flags or length > INLINE or not self._write(cookie, offset, data):
                        kept = bytearray(data)
                        self._hand_over(Request(kind, flags, cookie, offset, length, kept))
                    data.release()
                elif kind == nbd.DISC:
                    self._flush_out()
                    self.goodbye = True
                    return
                else:
                    taken += head
                    if disk.turnstiles and self._held_up(kind, flags, cookie, offset, length, None):
                        continue
                    self._hand_over(Request(kind, flags, cookie, offset, length, None))
            if self.filled:
                self._flush_out()

    # What is answered at once ------------------------------------------------------------

    def _read(self, cookie: int, offset: int, length: int) -> bool:
        """Read from leases into the send buffer. False: nothing was done."""
        if not length:
            return False
        start = self.filled
        structured = self.structured
        at = start + (28 if structured else 16)  # the sizes of DATA and SIMPLE
        try:
            answer = self.lane.read(self.out_view[at : at + length], offset, length)
        except OSError:
            return False  # a worker tries again, and tells the client why it failed
        if answer == SLOW:
            return False
        if structured and answer == ZEROES:
            nbd.HOLE.pack_into(
                self.out, start, nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, nbd.CHUNK_HOLE, cookie, 12,
                offset, length,
            )  # fmt: skip
            self.filled = start + nbd.HOLE.size
        else:
            if structured:
                nbd.DATA.pack_into(
                    self.out, start, nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, nbd.CHUNK_DATA, cookie,
                    length + 8, offset,
                )  # fmt: skip
            else:
                nbd.SIMPLE.pack_into(self.out, start, nbd.SIMPLE_MAGIC, 0, cookie)
            if answer == ZEROES:
                clear(self.out_view[at : at + length])
            self.filled = at + length
        if self.filled >= COALESCE:
            self._flush_out()
        return True

    def _write(self, cookie: int, offset: int, data: memoryview) -> bool:
        """Write in place by leases. False: nothing was done, or it may be done again."""
        if not self.writable or not data:
            return False
        try:
            # Allocate now, if no other request is in the way: a worker would cost more.
            answer = self.lane.write(data, offset, len(data))
            if answer == SLOW:
                if not self.disk.try_pwrite(data, offset):
                    return False
                if self.disk.root.crowded and not self.flushing:
                    self._flush_behind()
        except OSError:
            return False  # a worker tries again, and tells the client why it failed
        self._simple(cookie, 0)
        return True

    def _flush_behind(self) -> None:
        """Have a worker flush what the reader's own allocations have left to be flushed."""

        def flush() -> None:
            try:
                self.disk.flush()
            except OSError as error:  # the client that asks for a flush is told
                log.warning("disk '%s' cannot be flushed: %s", self.disk.name, error)
            finally:
                self.flushing = False

        self.flushing = True
        try:
            self.workers.submit(flush)
        except RuntimeError:  # the server is stopping
            self.flushing = False

    def _simple(self, cookie: int, code: int) -> None:
        nbd.SIMPLE.pack_into(self.out, self.filled, nbd.SIMPLE_MAGIC, code, cookie)
        self.filled += nbd.SIMPLE.size
        if self.filled >= COALESCE:
            self._flush_out()

    # Sending ------------------------------------------------------------------------------

    def _flush_out(self) -> None:
        """The reader sends what it has answered. It may block: a client that does not read its
        answers gets no further requests read."""
        try:
            with self.sending:
                self._drain(0)
                self.sock.sendall(self.out_view[: self.filled])
            self.filled = 0
        finally:  # also when the client is gone: a worker's answer may have been queued meanwhile
            self._pump()

    def _pump(self) -> None:
        """Send the workers' answers as far as the socket takes them; never blocks.

        Whoever lets go of `sending` comes here afterwards, for an answer may have been queued
        by one who could not get it."""
        while self.queue and self.sending.acquire(blocking=False):
            try:
                if not self._drain(socket.MSG_DONTWAIT) and not self.sender:
                    self.sender = True
                    threading.Thread(target=self._send_slowly, daemon=True).start()
                if self.sender:
                    return
            finally:
                self.sending.release()

    def _send_slowly(self) -> None:
        """A client that reads slowly gets a thread of its own, so that it stalls no worker."""
        with self.sending:
            self._drain(0)
            self.sender = False
        self._pump()

    def _drain(self, flags: int) -> bool:
        """Send the queue; False if `flags` forbid to wait and it would have. Holds `sending`."""
        while self.queue:
            parts, weight = self.queue[0]
            try:
                while parts:
                    n = self.sock.sendmsg(parts[:SEND_PARTS], (), flags)
                    while parts and n >= len(parts[0]):
                        n -= len(parts.pop(0))
                    if n:
                        parts[0] = memoryview(parts[0])[n:]
            except BlockingIOError:
                return False
            except OSError:
                pass  # the client is gone; the reader finds out by itself
            self.queue.popleft()
            self._finished(weight)
        return True

    # What workers do ---------------------------------------------------------------------

    def _hand_over(self, request: Request) -> None:
        self._take_room(request)
        self._submit(request)

    def _held_up(
        self, kind: int, flags: int, cookie: int, offset: int, length: int, data: memoryview | None
    ) -> bool:
        """Pass the turnstiles. False: it has, or need not; True: it waits, and is seen to."""
        if kind in (nbd.READ, nbd.CACHE):
            direction, moved = READ, length
        elif kind in (nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM):
            direction, moved = WRITE, length if kind == nbd.WRITE else 0
        else:
            return False
        if not length or moved > nbd.MAX_REQUEST or offset + length > self.disk.size:
            return False  # what is refused is free
        turnstiles = self.disk.turnstiles
        while turnstiles and turnstiles[0].admit(direction, moved):
            turnstiles = turnstiles[1:]
        if not turnstiles:
            return False
        kept = bytearray(data) if data is not None else None
        request = Request(kind, flags, cookie, offset, length, kept)
        self._take_room(request)

        def go(passed: bool) -> None:
            if passed:
                self._submit(request)
            else:
                self._finished(request.weight)

        let_through(turnstiles, direction, moved, go, self)
        return True

    def _take_room(self, request: Request) -> None:
        """Take a place among the requests in work, which `_finished` gives back.

        Waits for a place if there is none, so that the client is not read any further."""
        weight = request.weight
        with self.idle:
            full = not self._room(weight)
        if full:
            self._flush_out()  # the client may wait for these before it sends more
        with self.idle:
            while not self.idle.wait_for(lambda: self.closed or self._room(weight), LOOK):
                if self.disk.turnstiles and self._left():
                    raise ConnectionError("the client has left")
            if self.closed:
                raise ConnectionError("the client was sent away")
            self.pending += 1
            self.held += weight

    def _left(self) -> bool:
        """Whether the client has hung up, as a reader that does not read cannot notice."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _submit(self, request: Request) -> None:
        reading = request.kind in (nbd.READ, nbd.BLOCK_STATUS, nbd.CACHE)
        try:
            (self.readers if reading else self.workers).submit(self._work, request)
        except RuntimeError:  # the server is stopping; the reader finds out by itself
            self._finished(request.weight)

    def _room(self, weight: int) -> bool:
        return not self.pending or (self.pending < PENDING and self.held + weight <= BUDGET)

    def _finished(self, weight: int) -> None:
        with self.idle:
            self.pending -= 1
            self.held -= weight
            self.idle.notify_all()

    def _work(self, request: Request) -> None:
        reply: list[Buffer] | None
        kind, cookie = request.kind, request.cookie
        try:
            reply = self._serve(request)
        except OSError as error:
            if not self.closed:
                log.warning(
                    "disk '%s': NBD command %d at %d+%d failed: %s",
                    self.disk.name, kind, request.offset, request.length, error,
                )  # fmt: skip
            reply = [self._error(kind, cookie, nbd.to_wire(error.errno), str(error))]
        except MemoryError:
            reply = [self._error(kind, cookie, nbd.to_wire(errno.ENOMEM), "out of memory")]
        except Exception:
            log.exception("disk '%s': NBD command %d failed", self.disk.name, kind)
            reply = [self._error(kind, cookie, nbd.to_wire(errno.EIO), "internal error")]
        if reply is None:
            self._submit(request)
            return
        self.queue.append((reply, request.weight))
        self._pump()

    def _error(self, kind: int, cookie: int, code: int, text: str) -> bytes:
        if self.structured and kind in (nbd.READ, nbd.BLOCK_STATUS):
            return nbd.error_chunk(cookie, code, text)
        return nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, code, cookie)

    def _serve(self, request: Request) -> list[Buffer] | None:
        """Do the request, and return its reply. None: more of it is left to be done later."""
        disk, kind, flags = self.disk, request.kind, request.flags
        cookie, offset, length = request.cookie, request.offset, request.length
        if request.steps is None:
            self._check_flags(kind, flags, offset, length)
        fua = bool((flags | self.implied) & nbd.CMD_FUA)
        if kind == nbd.READ:
            return self._read_reply(cookie, offset, length, bool(flags & nbd.CMD_DF))
        if kind == nbd.BLOCK_STATUS:
            return self._status_reply(cookie, offset, length, bool(flags & nbd.CMD_REQ_ONE))
        if kind == nbd.WRITE:
            assert request.data is not None
            disk.pwrite(memoryview(request.data), offset, fua, paid=True)
        elif kind == nbd.FLUSH:
            disk.flush()
        elif kind in (nbd.TRIM, nbd.WRITE_ZEROES):
            if length and not self._change(request):
                return None
            if fua:
                disk.flush()
        elif kind == nbd.CACHE:
            self._prefetch(offset, length)
        else:
            raise OSError(errno.EINVAL, f"unknown command {kind}")
        return [nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, cookie)]

    def _change(self, request: Request) -> bool:
        """Go on with a TRIM or WRITE_ZEROES for a moment. False: not all of it is done yet."""
        if request.steps is None and request.kind == nbd.TRIM:
            request.steps = self.disk.discarding(request.offset, request.length)
        elif request.steps is None:
            unmap = not request.flags & nbd.CMD_NO_HOLE
            fast = bool(request.flags & nbd.CMD_FAST_ZERO)
            request.steps = self.disk.zeroing(request.offset, request.length, unmap, fast)
        until = time.monotonic() + TURN
        for _ in request.steps:
            if self.closed:  # the client will not hear of it
                raise ConnectionError("the client has left")
            if time.monotonic() > until:
                return False
        return True

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
            with self.disk.shared(offset, length):  # outside, a snapshot may be half done
                self.disk.check(offset, length, kind != nbd.TRIM, kind == nbd.TRIM)
        elif kind != nbd.FLUSH:
            self.disk.check(offset, length)
            if kind in (nbd.READ, nbd.CACHE) and length > nbd.MAX_REQUEST:
                what = "reading" if kind == nbd.READ else "caching"
                raise OSError(errno.EINVAL, f"{what} {length} bytes at once (32 MiB at most)")
        if kind == nbd.BLOCK_STATUS and not (self.contexts and length):
            raise OSError(errno.EINVAL, "no metadata context was negotiated, or no bytes asked")

    def _read_reply(self, cookie: int, offset: int, length: int, whole: bool) -> list[Buffer]:
        if not self.structured:
            data = memoryview(bytearray(length))
            self.disk.pread(data, offset, paid=True)
            return [nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, cookie), data]
        if length == 0:
            return [nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, nbd.CHUNK_NONE, cookie, 0)]
        # A chunk of zeroes is worth its header only from a certain length on.
        worth = nbd.PREFERRED if not whole else length + 1
        pieces = self.disk.read_pieces(offset, length, worth)
        out: list[Buffer] = []
        for number, (n, part) in enumerate(pieces):
            done = nbd.CHUNK_DONE if number == len(pieces) - 1 else 0
            if part is None:
                head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, done, nbd.CHUNK_HOLE, cookie, 12)
                out.append(head + offset.to_bytes(8, "big") + n.to_bytes(4, "big"))
            else:
                out.append(
                    nbd.DATA.pack(nbd.CHUNK_MAGIC, done, nbd.CHUNK_DATA, cookie, n + 8, offset)
                )
                out.append(part)
            offset += n
        return out

    def _prefetch(self, offset: int, length: int) -> None:
        """CACHE: have the bytes read ahead; a copy-on-read disk keeps them, too."""
        while length:
            n = min(length, 1 << 20)
            self.disk.pread(memoryview(bytearray(n)), offset, paid=True)
            offset, length = offset + n, length - n

    def _status_reply(self, cookie: int, offset: int, length: int, one: bool) -> list[Buffer]:
        out: list[Buffer] = []
        for number, (ident, _, describe) in enumerate(self.contexts):
            payload = nbd.block_status(ident, self._runs(describe, offset, length, one))
            done = nbd.CHUNK_DONE if number == len(self.contexts) - 1 else 0
            head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, done, nbd.CHUNK_STATUS, cookie, len(payload))
            out.append(head + payload)
        return out

    def _runs(
        self, describe: Describe, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """Return the merged (length, flags) runs at `offset`, as many as one reply may hold.

        A client may ask about 4 GiB of clusters of 512 bytes. The disk is therefore asked about a
        piece at a time: two granules at first, then twice as much for as long as the runs are
        long. So a reply costs about as much as the runs that it tells."""
        most = 1 if one else MAX_RUNS
        granule = self.disk.root.granule
        piece, largest = max(2 * granule, LOOK_AHEAD), max(SPAN * granule, 1 << 20)
        runs: list[tuple[int, int]] = []
        while length:
            now = min(piece, length)
            for n, flags in describe(self.disk, offset, now):
                if runs and runs[-1][1] == flags:
                    runs[-1] = (runs[-1][0] + n, flags)
                elif len(runs) == most:
                    return runs
                else:
                    runs.append((n, flags))
            offset, length, piece = offset + now, length - now, min(2 * piece, largest)
        return runs
