"""One connection to an NBD server: many requests in flight, from many threads.

There is no reader thread. Whoever waits for an answer while nobody reads becomes the *reader*: it
takes answers off the socket, each by its cookie and data straight into its owner's buffer, until
its own is there; then it names one of those who wait as its heir. So a lone job pays no switch of
threads per request, and eight threads have eight requests in flight.

Only the reader ends a request. A connection that fails elsewhere (a send, `abort`) is shut down,
and the reader finds that out: so nobody's buffer is written to after its request has ended, and
nobody waits who could read.

The server is a stranger. Sizes, lengths, offsets and texts that it sends are checked before
anything is allocated for them; an answer that does not fit its request ends the connection with
`Broken`; the handshake has a deadline that no trickle of bytes extends. What it can still do is
not answer. There is no time limit on a request, but `abort` fails all of them at once, and a thread
whose scope ends (`block/scope.py`) gives up its own request alone. The answer to a request that was
given up is thrown away when it comes. If that request was to change bytes, later changes wait for
its answer, because a server may do what it was asked in any order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cowferry.block import scope
from cowferry.block.identity import STORAGE
from cowferry.block.peers import watch_peer
from cowferry.block.scope import LOOK_SECONDS, CalledOff
from cowferry.errors import one_line
from cowferry.wire import nbd
from cowferry.wire.address import Address, parse_uri

BUFFER = 32 << 10  # bytes received ahead: several small answers in one system call
MAX_SIZE = 1 << 62  # bytes of an export
MAX_REPLY = 64 << 10  # bytes of an option's reply
MAX_REPLIES = 4096  # to one option
MAX_CHUNKS = 1 << 16  # in one answer
MAX_RUNS = 1 << 17  # in one block status
PEER_SECONDS = 60.0  # after which a host that does not react is taken to be gone
TORN_SECONDS = 5.0  # that the rest of an answer may take which nobody wants any more
CHANGES = (nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM)


class Broken(ConnectionError):
    """The server broke the protocol: there is no use in asking it again."""


def canonical(uri: str) -> str:
    """The URI as we write it. Raises `CowferryError`."""
    address, export = parse_uri(uri)
    return address.uri(export)


def connect(
    address: Address, timeout: float, begun: Callable[[socket.socket], None] | None = None
) -> socket.socket:
    """A connected socket. `begun` gets each socket before it connects, to shut it down from
    another thread. Raises `OSError`, `CalledOff`; never takes much longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    if address.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if begun is not None:
                begun(sock)
            # Blocking: with a timeout set, a full backlog is EAGAIN at once.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(LOOK_SECONDS))
            while True:
                try:
                    sock.connect(address.path)
                    break
                except BlockingIOError:  # its backlog is full
                    scope.check()
                    if time.monotonic() >= deadline:
                        raise
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
        except BaseException:
            sock.close()
            raise
        return sock
    failure: OSError = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    for family, kind, proto, _, where in resolved(address.host, address.port, deadline):
        sock = socket.socket(family, kind, proto)
        try:
            if begun is not None:
                begun(sock)
            _connect(sock, where, deadline)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            watch_peer(sock, PEER_SECONDS)
            return sock
        except CalledOff:
            sock.close()
            raise
        except OSError as error:
            failure = error
            sock.close()
        except BaseException:
            sock.close()
            raise
    raise failure


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _connect(sock: socket.socket, where: Any, deadline: float) -> None:
    """Connect a socket by `deadline`, and leave it blocking. Raises `OSError`, `CalledOff`."""
    sock.setblocking(False)
    code = sock.connect_ex(where)
    if code == errno.EINPROGRESS:
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while not poll.poll(LOOK_SECONDS * 1000):
            scope.check()
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
    sock.setblocking(True)


def resolved(host: str, port: int, deadline: float) -> list[Any]:
    """What `socket.getaddrinfo` says, by `deadline`. Raises `OSError`, `CalledOff`.

    A resolver may take much longer, and cannot be interrupted: it has a thread of its own."""
    found: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            found.put(error)

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            answer = found.get(timeout=LOOK_SECONDS)
            if isinstance(answer, OSError):
                raise answer
            return answer
        scope.check()
        if time.monotonic() >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"the name '{host}' was not resolved in time")


class Call:
    """One request, and what has come of its answer. Its reader's until `done`, then its owner's."""

    __slots__ = (
        "chunks", "cookie", "done", "error", "failed", "into", "kind", "left", "length", "link",
        "offset", "runs", "seen", "wake", "wanted",
    )  # fmt: skip

    def __init__(
        self, link: Link, kind: int, offset: int, length: int, into: memoryview | None
    ) -> None:
        self.link = link
        self.cookie = 0
        self.kind = kind
        self.offset = offset
        self.length = length
        self.into = into
        self.left = length  # bytes of data that may still come
        self.seen: list[tuple[int, int]] = []  # what of a read has come
        self.runs: dict[str, list[tuple[int, int]]] = {}  # (length, flags) for each context
        self.chunks = 0
        self.failed: OSError | None = None  # told by a chunk that was not the last
        self.error: OSError | None = None
        self.done = False
        self.wanted = True  # False: it was given up, and its answer is thrown away
        self.wake: threading.Lock | None = None  # held by its owner, who sleeps on it


class Link:
    """A connection after its handshake. Thread-safe.

    `size`, `minimum` and `maximum` in bytes: of the export, and of requests."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        where: str,
        contexts: tuple[str, ...] = (),
        timeout: float = 10.0,
        identify: bool = False,
    ) -> None:
        """Negotiate over a connected socket, which is ours from now on, in `timeout` seconds.

        With `identify` a server of ours is asked where the bytes of the export lie (`storage`).

        Raises `OSError`: `Broken` if the server makes no sense, `ConnectionError` with its words
        if it refuses."""
        self.sock = sock
        self.where = where
        self.size = self.flags = 0
        self.minimum, self.maximum = 1, nbd.MAX_REQUEST
        self.structured = False
        self.contexts: dict[int, str] = {}
        self.storage: list[str] = []  # see `identity.heard`
        self._buffer = memoryview(bytearray(BUFFER))
        self._start = self._end = 0  # what was received ahead; the reader's
        self._deadline: float | None = time.monotonic() + timeout
        self._between = False  # the reader waits for the beginning of an answer; the reader's
        self._torn = 0.0  # when a reader that was called off began to wait; the reader's
        self._filling: Call | None = None  # whose buffer the reader may write to; the reader's
        self._sending = threading.Lock()  # a request is sent whole
        self._settling = threading.Lock()  # one thread at a time waits for `_given_up`
        # Duty: guards everything below. Never held over a send or a receive.
        self._state = threading.Lock()
        self._quiet = threading.Condition(self._state)  # of a link that is over: nobody reads
        self.failure: ConnectionError | None = None  # it is over, and why
        self._calls: dict[int, Call] = {}  # by cookie
        self._asleep: dict[Call, None] = {}  # whose owners sleep, in the order of their coming
        self._given_up: list[Call] = []  # changes of bytes that nobody waits for any more
        self._reading = False
        self._cookie = 0
        try:
            self._negotiate(name, contexts, identify)
        except (ValueError, struct.error) as error:  # a UnicodeError, too
            sock.close()
            raise Broken(f"the server makes no sense: {error}") from error
        except BaseException:
            sock.close()
            raise
        self._deadline = None
        sock.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # then a thread looks at its scope
            sock.setsockopt(socket.SOL_SOCKET, option, _timeval(LOOK_SECONDS))

    # Requests ----------------------------------------------------------------------------

    def submit(
        self,
        kind: int,
        flags: int,
        offset: int,
        length: int,
        data: memoryview | bytes | bytearray | None = None,
        into: memoryview | None = None,
    ) -> Call:
        """Send a request; `wait` has to follow. `into` is written to until then.

        Raises `ConnectionError` if the connection is over, `CalledOff`."""
        if kind in CHANGES and self._given_up:
            self._settle()
        call = Call(self, kind, offset, length, into)
        with self._state:
            if self.failure is not None:
                raise self._told()
            self._cookie += 1
            cookie = call.cookie = self._cookie
            self._calls[cookie] = call
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, cookie, offset, length)
        parts = [memoryview(head)] if data is None else [memoryview(head), memoryview(data)]
        try:
            self._send(call, parts)
        except CalledOff:
            raise
        except OSError as error:
            self.abort(f"the connection is lost: {error.strerror or error}")
        except BaseException:
            self.abort("a request was torn")
            self._finish(call)
            raise
        return call

    def _send(self, call: Call, parts: list[memoryview]) -> None:
        """Send a request whole. Raises `OSError`, `CalledOff`.

        If it is called off half-way, another thread sends the rest: what follows would make no
        sense to the server otherwise."""
        try:
            scope.acquire(self._sending)
        except CalledOff:
            with self._state:
                self._calls.pop(call.cookie, None)
            raise
        mine = True
        begun = False
        try:
            while parts:
                try:
                    sent = self.sock.sendmsg(parts)
                except BlockingIOError:
                    scope.check()
                    continue
                begun = begun or sent > 0
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = parts[0][sent:]
        except CalledOff:
            if begun:
                mine = False
                rest = b"".join(parts)
                self._let_go(call)
                threading.Thread(
                    target=self._send_rest, args=(rest,), name="nbd sender", daemon=True
                ).start()
            else:
                with self._state:
                    self._calls.pop(call.cookie, None)
            raise
        finally:
            if mine:
                self._sending.release()

    def _send_rest(self, rest: bytes) -> None:
        """Send the rest of a request that was given up. `_sending` is this thread's."""
        left = memoryview(rest)
        try:
            while left:
                with contextlib.suppress(BlockingIOError):
                    left = left[self.sock.send(left) :]
        except OSError as error:
            self.abort(f"the connection is lost: {error.strerror or error}")
        finally:
            self._sending.release()

    def wait(self, call: Call) -> Call:
        """Until the answer is there. Raises its error; `ConnectionError` if the link is over,
        `CalledOff` if the request was given up because a scope of the thread has ended."""
        while True:
            with self._state:
                if call.done:
                    break
                reader = not self._reading
                if reader:
                    self._reading = True
                else:
                    call.wake = call.wake or threading.Lock()
                    call.wake.acquire()  # free: nobody else knows it yet, or it was let go
                    self._asleep[call] = None
            if reader:
                self._read_until(call)
                break
            self._sleep(call)
        if call.error is not None:
            error, call.error, call.failed = call.error, None, None
            try:
                raise error
            finally:
                del error  # its traceback has this frame: they would keep each other
        return call

    def _sleep(self, call: Call) -> None:
        """Wait until the reader wakes us. Raises `CalledOff`."""
        assert call.wake is not None
        try:
            scope.acquire(call.wake)
            call.wake.release()
        except CalledOff:
            with self._state:
                asleep = self._asleep.pop(call, call) is None
            if asleep:  # else we were woken just now, and `wait` looks again
                self._let_go(call)
                raise
        except BaseException:  # an interrupt: its buffer is not ours for long, so all of it ends
            self.abort("a wait was interrupted")
            with self._state:
                self._asleep.pop(call, None)
                self._name_heir()
            raise

    def _let_go(self, call: Call) -> None:
        """Nobody waits for the answer any more. On return nobody writes to the call's buffer."""
        with self._state:
            if call.done:
                return
            call.wanted = False
            call.wake = None
            if call.kind in CHANGES and call not in self._given_up:
                self._given_up.append(call)
            if call.into is not None:  # for the reader, which looks at it after it said `_filling`
                call.into = memoryview(bytearray(len(call.into)))
        until = time.monotonic() + TORN_SECONDS
        while self._filling is call and not call.done:
            if time.monotonic() > until:
                self.abort("an answer stopped half-way")
            time.sleep(0.005)

    def _settle(self) -> None:
        """Wait for the answers to changes that were given up. Raises `CalledOff`."""
        scope.acquire(self._settling)
        try:
            while self._given_up:
                try:
                    self.wait(self._given_up[0])
                except CalledOff:
                    raise
                except OSError:  # nobody asks what became of it
                    pass
                self._given_up.pop(0)
        finally:
            self._settling.release()

    def abort(self, why: str = "the connection was given up") -> None:
        """Fail every request now, and all to come. Callable by any thread."""
        with self._state:
            if self.failure is None:
                self.failure = ConnectionError(f"{self.where}: {why}")
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say goodbye, if there is anybody to hear it. Idempotent; what is in flight fails."""
        if self.failure is None and self._sending.acquire(timeout=1):
            try:
                with contextlib.suppress(OSError):
                    self.sock.settimeout(1)
                    self.sock.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.DISC, 0, 0, 0))
            finally:
                self._sending.release()
        self.abort("the connection was closed")
        # The number of the descriptor must not be another's while somebody still reads from it.
        with self._sending, self._state:
            self._quiet.wait_for(lambda: not self._reading)
            self.sock.close()

    # The reader --------------------------------------------------------------------------

    def _read_until(self, call: Call) -> None:
        """Read answers until this call's is there, then hand over. Raises `CalledOff`."""
        failure: ConnectionError | None = None
        called_off: CalledOff | None = None
        try:
            while not call.done:
                self._receive()
        except CalledOff as error:
            called_off = error
        except Broken as error:
            failure = Broken(f"{self.where}: the server broke the protocol: {error}")
        except (ValueError, struct.error) as error:
            failure = Broken(f"{self.where}: the server broke the protocol: {error}")
        except OSError as error:
            failure = ConnectionError(f"{self.where}: {error.strerror or error}")
        except BaseException:
            failure = ConnectionError(f"{self.where}: an answer was torn")
            raise
        finally:
            if failure is not None:
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)
            self._filling = None
            with self._state:
                self._reading = False
                if self.failure is not None:
                    self._quiet.notify_all()
                if failure is not None:
                    self.failure = self.failure or failure
                    for other in list(self._calls.values()):
                        other.error = self._told()
                        self._end_of(other)
                    self._calls.clear()
                self._name_heir()
        if called_off is not None:
            self._let_go(call)
            raise called_off

    def _name_heir(self) -> None:
        """Somebody who sleeps is to read, or to find that somebody does. Caller holds the state."""
        for heir in self._asleep:
            self._wake(heir)
            break

    def _told(self) -> ConnectionError:
        """The failure, as an exception of the caller's own."""
        assert self.failure is not None
        return type(self.failure)(str(self.failure))

    def _finish(self, call: Call, error: OSError | None = None) -> None:
        with self._state:
            self._calls.pop(call.cookie, None)
            call.error = error
            self._end_of(call)

    def _end_of(self, call: Call) -> None:
        """Caller holds the state."""
        call.done = True
        call.into = None
        if call in self._asleep:
            self._wake(call)

    def _wake(self, call: Call) -> None:
        del self._asleep[call]
        assert call.wake is not None
        call.wake.release()

    def _receive(self) -> None:
        """One reply, or one chunk of one. Raises `Broken`, `ValueError`, `OSError`, `CalledOff`."""
        self._between = True
        head = self._take(16)
        self._between = False
        magic, a, b, cookie = struct.unpack(">IHHQ", head)
        self._filling = self._calls.get(cookie)
        self._answer(magic, a, b, self._filling)
        self._filling = None

    def _answer(self, magic: int, a: int, b: int, call: Call | None) -> None:
        """The rest of a reply to `call`, whose header has come. Raises like `_receive`."""
        if magic == nbd.SIMPLE_MAGIC:
            if call is None or call.chunks:
                raise Broken("an answer to no request")
            code = a << 16 | b
            if code:
                self._finish(call, self._failure(code, ""))
                return
            if self.structured and call.kind in (nbd.READ, nbd.BLOCK_STATUS):
                raise Broken("a simple reply to a read")
            if call.into is not None:
                self._fill(call.into)
            self._finish(call)
            return
        if magic != nbd.CHUNK_MAGIC or not self.structured:
            raise Broken("no reply magic")
        (length,) = struct.unpack(">I", self._take(4))
        if call is None:
            raise Broken("an answer to no request")
        call.chunks += 1
        if call.chunks > MAX_CHUNKS:
            raise Broken("an answer without an end")
        if b in (nbd.CHUNK_DATA, nbd.CHUNK_HOLE):
            self._piece(call, b, length)
        elif length > max(MAX_REPLY, 4 + 8 * MAX_RUNS):
            raise Broken(f"a chunk of {length} bytes")
        elif b == nbd.CHUNK_STATUS:
            self._status(call, self._payload(length))
        elif b & 1 << 15:
            code, text = nbd.parse_error(self._payload(length))
            call.failed = call.failed or self._failure(code, text)
        elif b != nbd.CHUNK_NONE or length or not a & nbd.CHUNK_DONE:
            raise Broken(f"a chunk of type {b} and {length} bytes")
        if a & nbd.CHUNK_DONE:
            self._complete(call)

    def _complete(self, call: Call) -> None:
        if call.failed is None:
            if call.into is not None and (
                call.left or not covers(call.seen, call.offset, call.length)
            ):
                raise Broken("a read with parts missing")
            if call.kind == nbd.BLOCK_STATUS and len(call.runs) != len(self.contexts):
                raise Broken("a block status without an answer")
        self._finish(call, call.failed)

    def _piece(self, call: Call, kind: int, length: int) -> None:
        into = call.into
        head = 8 if kind == nbd.CHUNK_DATA else 12
        if into is None or length < head or (kind == nbd.CHUNK_HOLE and length != head):
            raise Broken(f"a piece of data in {length} bytes")
        (start,) = struct.unpack(">Q", self._take(8))
        size = length - 8
        if kind == nbd.CHUNK_HOLE:
            (size,) = struct.unpack(">I", self._take(4))
        at = start - call.offset
        if at < 0 or not size or at + size > len(into) or size > call.left:
            raise Broken("data that was not asked for")
        call.left -= size
        call.seen.append((start, size))
        if kind == nbd.CHUNK_DATA:
            self._fill(into[at : at + size])
        else:
            into[at : at + size] = bytes(size)

    def _status(self, call: Call, payload: bytes) -> None:
        number, runs = nbd.parse_status(payload)
        context = self.contexts.get(number)
        if call.kind != nbd.BLOCK_STATUS or context is None or context in call.runs:
            raise Broken("a block status that was not asked for")
        if sum(n for n, _ in runs[:-1]) >= call.length:
            raise Broken("a block status of more than was asked for")
        call.runs[context] = runs

    def _failure(self, code: int, text: str) -> OSError:
        local = nbd.from_wire(code)
        return OSError(local, f"{self.where}: {one_line(text) or os.strerror(local)}")

    # Bytes -------------------------------------------------------------------------------

    def _recv(self, view: memoryview) -> int:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the handshake takes too long")
            self.sock.settimeout(min(left, LOOK_SECONDS))
        while True:
            try:
                n = self.sock.recv_into(view)
                break
            except BlockingIOError:
                self._look()
            except TimeoutError:  # of a handshake; or the owner of the socket has set one
                if self._deadline is None:
                    raise
                self._look()
        if n == 0:
            raise ConnectionError("the server hung up")
        return n

    def _look(self) -> None:
        """Nothing has come for a moment. Raises `CalledOff` if the thread may stop to read here,
        `ConnectionError` if it may not and has waited for long, `TimeoutError` if the handshake
        takes too long."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise TimeoutError("the handshake takes too long")
        if self._between or self._deadline is not None:
            scope.check()
            return
        try:
            scope.check()
            self._torn = 0.0
        except CalledOff:
            now = time.monotonic()
            self._torn = self._torn or now
            if now > self._torn + TORN_SECONDS:
                raise ConnectionError("an answer stopped half-way") from None

    def _take(self, length: int) -> memoryview:
        """The next few bytes; good until the next call."""
        view = self._buffer
        if self._end - self._start < length:
            rest = self._end - self._start
            view[:rest] = view[self._start : self._end]
            self._start, self._end = 0, rest
            while self._end < length:
                self._end += self._recv(view[self._end :])
        self._start += length
        return view[self._start - length : self._start]

    def _fill(self, into: memoryview) -> None:
        """What was received ahead, and the rest straight from the socket."""
        n = min(self._end - self._start, len(into))
        into[:n] = self._buffer[self._start : self._start + n]
        self._start += n
        while n < len(into):
            n += self._recv(into[n:])

    def _payload(self, length: int) -> bytes:
        out = bytearray(length)
        self._fill(memoryview(out))
        return bytes(out)

    # Handshake ---------------------------------------------------------------------------

    def _negotiate(self, name: str, contexts: tuple[str, ...], identify: bool) -> None:
        if bytes(self._take(16)) != struct.pack(">QQ", nbd.NBDMAGIC, nbd.IHAVEOPT):
            raise Broken("not a newstyle NBD server")
        (flags,) = struct.unpack(">H", self._take(2))
        if not flags & nbd.FLAG_FIXED_NEWSTYLE:
            raise Broken("the server does not know the fixed newstyle")
        self.sock.sendall(struct.pack(">I", flags & 3))
        self.structured = self._option(nbd.OPT_STRUCTURED_REPLY, b"", optional=True) is not None
        if self.structured and identify:
            # A server of ours selects the name of the namespace as a context, others do not.
            self._select(name, (*contexts, STORAGE))
            if STORAGE in self.contexts.values():
                asked = nbd.meta(name, (STORAGE,))
                replies = self._option(nbd.OPT_LIST_META_CONTEXT, asked, optional=True) or ()
                listed = [
                    data[4:].decode() for kind, data in replies if kind == nbd.REP_META_CONTEXT
                ]
                self.storage = listed
                self._select(name, contexts)
        elif self.structured and contexts:
            self._select(name, contexts)
        for kind, data in self._option(nbd.OPT_GO, nbd.go(name, [nbd.INFO_BLOCK_SIZE])) or ():
            about = int.from_bytes(data[:2], "big")
            if kind == nbd.REP_INFO and about == nbd.INFO_EXPORT:
                _, self.size, self.flags = struct.unpack(">HQH", data)
            elif kind == nbd.REP_INFO and about == nbd.INFO_BLOCK_SIZE:
                self.minimum, _, self.maximum = nbd.parse_block_size(data)
        if self.size > MAX_SIZE:
            raise ValueError(f"a size of {self.size} bytes")
        if not self.flags & nbd.HAS_FLAGS:
            raise ValueError("no transmission flags")

    def _select(self, name: str, contexts: tuple[str, ...]) -> None:
        """Select meta contexts, those that the server has; none selected before stays."""
        self.contexts = {}
        asked = nbd.meta(name, contexts)
        for kind, data in self._option(nbd.OPT_SET_META_CONTEXT, asked, optional=True) or ():
            if kind == nbd.REP_META_CONTEXT:
                number, context = int.from_bytes(data[:4], "big"), data[4:].decode()
                if context not in contexts or context in self.contexts.values():
                    raise ValueError(f"a meta context '{context[:64]}'")
                self.contexts[number] = context

    def _option(
        self, number: int, data: bytes, optional: bool = False
    ) -> list[tuple[int, bytes]] | None:
        """All replies up to the ACK. None if the server refuses, and it is `optional`."""
        self.sock.sendall(nbd.option(number, data))
        try:
            return list(self._replies(number))
        except Refused:
            if not optional:
                raise
            return None

    def _replies(self, number: int) -> Iterator[tuple[int, bytes]]:
        for _ in range(MAX_REPLIES):
            magic, option, kind, length = nbd.OPTION_REPLY.unpack(self._take(20))
            if magic != nbd.REPLY_MAGIC or option != number or length > MAX_REPLY:
                raise Broken("a malformed option reply")
            payload = self._payload(length)
            if kind & nbd.ERROR:
                text = one_line(payload[: nbd.MAX_STRING].decode(errors="replace"))
                raise Refused(text or refusal(kind, number))
            if kind == nbd.REP_ACK:
                return
            yield kind, payload
        raise Broken("too many replies to one option")


class Refused(ConnectionError):
    """The server understood, and does not want to."""


def refusal(kind: int, option: int) -> str:
    """The server's error in words, when it gave none."""
    return {
        nbd.REP_ERR_UNKNOWN: "the server has no such export",
        nbd.REP_ERR_TLS_REQD: "the server wants TLS",
        nbd.REP_ERR_POLICY: "the server does not allow it",
        nbd.REP_ERR_SHUTDOWN: "the server is shutting down",
        nbd.REP_ERR_UNSUP: f"the server does not know option {option}",
    }.get(kind, f"the server refused option {option}")


def covers(pieces: list[tuple[int, int]], offset: int, length: int) -> bool:
    """Whether (start, length) pieces are exactly the range, without overlap."""
    for start, size in sorted(pieces):
        if start != offset:
            return False
        offset, length = start + size, length - size
    return length == 0
