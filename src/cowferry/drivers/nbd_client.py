"""A small blocking NBD client: one request at a time over one connection.

The server is a stranger: sizes, lengths and texts that it sends are checked before anything is
allocated for them, and an answer that does not fit its request ends the connection.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

from cowferry.errors import CowferryError, ImageError
from cowferry.wire import nbd

_LOCAL = {wire: code for code, wire in nbd.ERRNOS.items()}
MAX_REPLY = 64 << 10  # bytes of an option's reply
MAX_REPLIES = 4096  # to one option
MAX_CHUNKS = 1 << 16  # in one answer


def connect(uri: str, timeout: float) -> tuple[socket.socket, str]:
    """A connected socket and the export name of nbd://HOST[:PORT]/NAME or
    nbd+unix:///NAME?socket=PATH. Raises `CowferryError`."""
    parts = urlsplit(uri)
    name = unquote(parts.path.removeprefix("/"))
    try:
        if parts.scheme == "nbd+unix":
            paths = parse_qs(parts.query).get("socket")
            if not paths:
                raise CowferryError(f"'{uri}': no socket=PATH")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Blocking: with a timeout set, a full backlog is EAGAIN at once.
                limit = struct.pack("ll", int(timeout), 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
                sock.connect(paths[0])
                sock.settimeout(timeout)
            except BaseException:
                sock.close()
                raise
            return sock, name
        if parts.scheme == "nbd":
            where = (parts.hostname or "localhost", parts.port or 10809)
            sock = socket.create_connection(where, timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock, name
    except (OSError, ValueError) as error:
        raise CowferryError(f"cannot connect to '{uri}': {error}") from error
    raise CowferryError(f"'{uri}' is not an NBD URI", "nbd://HOST/NAME, nbd+unix:///NAME?socket=P")


class NbdClient:
    """One connection. Not thread-safe. Offsets and lengths in bytes; requests raise `OSError`
    with the server's errno, `ConnectionError` if it hung up or broke the protocol."""

    def __init__(self, uri: str, contexts: tuple[str, ...] = (), timeout: float = 30.0) -> None:
        self.sock, self.name = connect(uri, timeout)
        self.uri = uri
        self.size = 0
        self.flags = 0
        self.structured = False
        self.contexts: dict[int, str] = {}
        self._cookie = 0
        try:
            self._negotiate(contexts)
        except (OSError, struct.error, UnicodeDecodeError) as error:
            self.sock.close()
            raise ImageError(f"'{uri}': {error}") from error
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye. Idempotent."""
        if self.sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._request(nbd.DISC, 0, 0, 0)
            self.sock.close()

    def abort(self) -> None:
        """Fail a blocked request now; callable by any thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    # Requests ----------------------------------------------------------------------------

    def pread(self, length: int, offset: int, flags: int = 0) -> bytearray:
        """`length` bytes at `offset`."""
        out = bytearray(length)
        self._request(nbd.READ, flags, offset, length)
        self._answer(memoryview(out), offset)
        return out

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        """Write; with `fua` durable on return."""
        self._request(nbd.WRITE, nbd.CMD_FUA if fua else 0, offset, len(data))
        self.sock.sendall(data)
        self._answer()

    def flush(self) -> None:
        """What was answered before is durable on return."""
        self._request(nbd.FLUSH, 0, 0, 0)
        self._answer()

    def trim(self, length: int, offset: int, fua: bool = False) -> None:
        """The range is needed no more."""
        self._request(nbd.TRIM, nbd.CMD_FUA if fua else 0, offset, length)
        self._answer()

    def zero(self, length: int, offset: int, flags: int = 0) -> None:
        """Make the range read as zeroes; `flags`: CMD_FUA, CMD_NO_HOLE, CMD_FAST_ZERO."""
        self._request(nbd.WRITE_ZEROES, flags, offset, length)
        self._answer()

    def cache(self, length: int, offset: int) -> None:
        """Have the range read ahead."""
        self._request(nbd.CACHE, 0, offset, length)
        self._answer()

    def block_status(
        self, length: int, offset: int, flags: int = 0
    ) -> dict[str, list[tuple[int, int]]]:
        """(length, flags) of runs from `offset` on, for each context negotiated."""
        self._request(nbd.BLOCK_STATUS, flags, offset, length)
        return self._answer()

    def _request(self, kind: int, flags: int, offset: int, length: int) -> None:
        self._cookie += 1
        self.sock.sendall(
            nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, self._cookie, offset, length)
        )

    # Answers -----------------------------------------------------------------------------

    def _recv(self, length: int) -> bytes:
        out = bytearray(length)
        self._recv_into(memoryview(out))
        return bytes(out)

    def _recv_into(self, view: memoryview) -> None:
        while len(view):
            n = self.sock.recv_into(view)
            if n == 0:
                raise ConnectionError("the server hung up")
            view = view[n:]

    def _broken(self, why: str) -> ConnectionError:
        self.abort()
        return ConnectionError(f"{self.uri}: the server broke the protocol: {why}")

    def _answer(
        self, into: memoryview | None = None, offset: int = 0
    ) -> dict[str, list[tuple[int, int]]]:
        """Read one answer, data into `into`. Raises the server's error."""
        status: dict[str, list[tuple[int, int]]] = {}
        failed: OSError | None = None
        seen: list[tuple[int, int]] = []  # what of a read has arrived
        for _ in range(MAX_CHUNKS):
            (magic,) = struct.unpack(">I", self._recv(4))
            if magic == nbd.SIMPLE_MAGIC:
                code, cookie = struct.unpack(">IQ", self._recv(12))
                if cookie != self._cookie:
                    raise self._broken("an answer to no request")
                if code:
                    raise self._failure(code, "")
                if into is not None:
                    if self.structured:
                        raise self._broken("a simple reply to a read")
                    self._recv_into(into)
                return status
            if magic != nbd.CHUNK_MAGIC or not self.structured:
                raise self._broken("no reply magic")
            flags, kind, cookie, length = struct.unpack(">HHQI", self._recv(16))
            if cookie != self._cookie:
                raise self._broken("an answer to no request")
            if kind in (nbd.CHUNK_DATA, nbd.CHUNK_HOLE):
                seen.append(self._piece(kind, length, into, offset))
            elif length > MAX_REPLY + 8 * (1 << 17):
                raise self._broken(f"a chunk of {length} bytes")
            elif kind == nbd.CHUNK_STATUS:
                name, runs = self._status(self._recv(length))
                status[name] = runs
            elif kind & 1 << 15:
                payload = self._recv(length)
                code, size = struct.unpack_from(">IH", payload) if length >= 6 else (5, 0)
                failed = self._failure(code, payload[6 : 6 + size].decode(errors="replace"))
            elif kind != nbd.CHUNK_NONE or length:
                raise self._broken(f"a chunk of type {kind}")
            if flags & nbd.CHUNK_DONE:
                if failed is not None:
                    raise failed
                if into is not None and not covers(seen, offset, len(into)):
                    raise self._broken("a read with parts missing")
                return status
        raise self._broken("an answer without an end")

    def _piece(
        self, kind: int, length: int, into: memoryview | None, offset: int
    ) -> tuple[int, int]:
        head = 8 if kind == nbd.CHUNK_DATA else 12
        if into is None or length < head or (kind == nbd.CHUNK_HOLE and length != head):
            raise self._broken(f"a piece of data in {length} bytes")
        (start,) = struct.unpack(">Q", self._recv(8))
        size = length - 8 if kind == nbd.CHUNK_DATA else struct.unpack(">I", self._recv(4))[0]
        at = start - offset
        if at < 0 or at + size > len(into) or not size:
            raise self._broken("data that was not asked for")
        if kind == nbd.CHUNK_DATA:
            self._recv_into(into[at : at + size])
        else:
            into[at : at + size] = bytes(size)
        return start, size

    def _status(self, payload: bytes) -> tuple[str, list[tuple[int, int]]]:
        if len(payload) < 12 or len(payload) % 8 != 4:
            raise self._broken("a malformed block status")
        flat = struct.unpack(f">{len(payload) // 4}I", payload)
        if flat[0] not in self.contexts or 0 in flat[1::2]:
            raise self._broken("a block status that makes no sense")
        return self.contexts[flat[0]], list(zip(flat[1::2], flat[2::2], strict=True))

    def _failure(self, code: int, text: str) -> OSError:
        local = _LOCAL.get(code, errno.EINVAL)
        return OSError(local, f"{self.uri}: {text[: nbd.MAX_STRING] or os.strerror(local)}")

    # Handshake ---------------------------------------------------------------------------

    def _negotiate(self, contexts: tuple[str, ...]) -> None:
        if self._recv(16) != struct.pack(">QQ", nbd.NBDMAGIC, nbd.IHAVEOPT):
            raise ConnectionError("not a newstyle NBD server")
        (flags,) = struct.unpack(">H", self._recv(2))
        if not flags & nbd.FLAG_FIXED_NEWSTYLE:
            raise ConnectionError("the server does not know the fixed newstyle")
        self.sock.sendall(struct.pack(">I", flags & 3))
        self.structured = bool(self._option(nbd.OPT_STRUCTURED_REPLY, b"", optional=True))
        raw = self.name.encode()
        named = struct.pack(">I", len(raw)) + raw
        if contexts and self.structured:
            asked = struct.pack(">I", len(contexts))
            for c in contexts:
                asked += struct.pack(">I", len(c)) + c.encode()
            for kind, data in self._option(nbd.OPT_SET_META_CONTEXT, named + asked, optional=True):
                if kind == nbd.REP_META_CONTEXT and len(data) >= 4:
                    self.contexts[int.from_bytes(data[:4], "big")] = data[4:].decode()
        for kind, data in self._option(nbd.OPT_GO, named + struct.pack(">H", 0)):
            if kind == nbd.REP_INFO and data[:2] == struct.pack(">H", nbd.INFO_EXPORT):
                _, self.size, self.flags = struct.unpack(">HQH", data)
        if self.size >= 1 << 63:
            raise ConnectionError(f"a size of {self.size} bytes")
        if not self.flags & nbd.HAS_FLAGS:
            raise ConnectionError("the server told no transmission flags")

    def _option(self, number: int, data: bytes, optional: bool = False) -> list[tuple[int, bytes]]:
        """All replies up to the ACK, which is the last. An error: empty if `optional`."""
        self.sock.sendall(nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data)) + data)
        return list(self._replies(number, optional))

    def _replies(self, number: int, optional: bool) -> Iterator[tuple[int, bytes]]:
        for _ in range(MAX_REPLIES):
            magic, option, kind, length = nbd.OPTION_REPLY.unpack(self._recv(20))
            if magic != nbd.REPLY_MAGIC or option != number or length > MAX_REPLY:
                raise ConnectionError("a malformed option reply")
            payload = self._recv(length)
            if kind & nbd.ERROR:
                if optional:
                    return
                text = payload[: nbd.MAX_STRING].decode(errors="replace")
                raise ConnectionError(text or f"the server refused option {number}")
            yield kind, payload
            if kind == nbd.REP_ACK:
                return
        raise ConnectionError("too many replies to one option")


def covers(pieces: list[tuple[int, int]], offset: int, length: int) -> bool:
    """Whether (start, length) pieces are exactly the range, without overlap."""
    for start, size in sorted(pieces):
        if start != offset:
            return False
        offset, length = start + size, length - size
    return length == 0
