"""A guest in a few lines: a blocking client of one export, for tests and tools.

The `nbd` driver is the real user of `Link`; this is its plain face.
"""

from __future__ import annotations

from types import TracebackType

from cowferry.drivers.nbd_link import Link, connect
from cowferry.errors import CowferryError, ImageError
from cowferry.wire import nbd
from cowferry.wire.address import parse_uri


class NbdClient:
    """One connection. Offsets and lengths in bytes; requests raise `OSError` with the server's
    errno, `ConnectionError` if it hung up or broke the protocol. Thread-safe but for `close`."""

    def __init__(self, uri: str, contexts: tuple[str, ...] = (), timeout: float = 30.0) -> None:
        """`timeout` in seconds: of the connection, the handshake, and each answer."""
        address, name = parse_uri(uri)
        try:
            sock = connect(address, timeout)
        except OSError as error:
            raise CowferryError(f"cannot connect to '{uri}': {error}") from error
        try:
            self.link = Link(sock, name, uri, contexts, timeout)
        except OSError as error:
            raise ImageError(f"'{uri}': {error}") from error
        self.sock = sock
        self.sock.settimeout(timeout)
        self.uri = uri
        self.size, self.flags = self.link.size, self.link.flags
        self.structured, self.contexts = self.link.structured, self.link.contexts

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye. Idempotent."""
        self.link.close()

    def abort(self) -> None:
        """Fail a blocked request now; callable by any thread."""
        self.link.abort()

    def pread(self, length: int, offset: int, flags: int = 0) -> bytearray:
        """`length` bytes at `offset`."""
        out = bytearray(length)
        call = self.link.submit(nbd.READ, flags, offset, length, into=memoryview(out))
        self.link.wait(call)
        return out

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        """Write; with `fua` durable on return."""
        flags = nbd.CMD_FUA if fua else 0
        self.link.wait(self.link.submit(nbd.WRITE, flags, offset, len(data), data))

    def flush(self) -> None:
        """What was answered before is durable on return."""
        self._do(nbd.FLUSH, 0, 0, 0)

    def trim(self, length: int, offset: int, fua: bool = False) -> None:
        """The range is needed no more."""
        self._do(nbd.TRIM, nbd.CMD_FUA if fua else 0, offset, length)

    def zero(self, length: int, offset: int, flags: int = 0) -> None:
        """Make the range read as zeroes; `flags`: CMD_FUA, CMD_NO_HOLE, CMD_FAST_ZERO."""
        self._do(nbd.WRITE_ZEROES, flags, offset, length)

    def cache(self, length: int, offset: int) -> None:
        """Have the range read ahead."""
        self._do(nbd.CACHE, 0, offset, length)

    def block_status(
        self, length: int, offset: int, flags: int = 0
    ) -> dict[str, list[tuple[int, int]]]:
        """(length, flags) of runs from `offset` on, for each context negotiated."""
        call = self.link.submit(nbd.BLOCK_STATUS, flags, offset, length)
        return self.link.wait(call).runs

    def _do(self, kind: int, flags: int, offset: int, length: int) -> None:
        self.link.wait(self.link.submit(kind, flags, offset, length))
