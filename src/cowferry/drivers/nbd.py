"""The nbd driver: a node whose bytes are an export of an NBD server.

It is a protocol node, like `file`: a disk by itself, or below a format. Its runs have no
descriptor, so every byte goes through `pread` and `pwrite`, over one connection that many threads
share (`nbd_link.py`).

What the server holds may be changed by others, so nothing that it says of its runs is kept.

A lost connection. Requests that wait for an answer fail with EIO, and later ones connect anew; with
`reconnect-delay` they wait that many seconds for the server to come back, and are sent again. But a
server that comes back may have lost what it had answered and not flushed, and a later flush would
say that all is well. So:

* without a delay, writes that were answered and not flushed make flushes fail from then on, until
  the node is opened again (the rule for a failed flush, N6);
* with a delay they are kept here, up to `KEEP` bytes between two flushes, and written again.

A request that is sent again may, in principle, be overtaken by its elder brother in a server that
still works for a connection that is gone. That is NBD's, not ours to cure.

Source: the NBD specification; BlockdevOptionsNbd of QMP.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cowferry.block import identity, scope
from cowferry.block.identity import Place
from cowferry.block.node import ZEROES, Extent, Node, State, clear
from cowferry.block.scope import CalledOff
from cowferry.drivers import Common, register
from cowferry.drivers.nbd_link import Broken, Call, Link, Refused, connect
from cowferry.drivers.plan import Plan
from cowferry.errors import CowferryError, ImageError, NotSupported, reason
from cowferry.wire import nbd
from cowferry.wire.address import Address, from_qmp, parse_uri

ALLOCATION = "base:allocation"
HANDSHAKE = 10.0  # seconds for a connection and its handshake
PATIENCE = 30.0  # seconds that closing may take
PAUSE = 0.25  # seconds between two attempts to connect again
RARELY = 1.0  # the same, when nobody waits for it
KEEP = 16 << 20  # bytes of writes kept for a server that may come back
STATUS = 1 << 30  # bytes asked about at once
ZERO_AT_ONCE = 128 << 20  # bytes zeroed or trimmed by one request: what an abort waits for at most
MANY = 64 << 10  # bytes of a run, on average, below which asking is no use


@dataclass(eq=False)
class Kept:
    """A change that is not known to be durable, to be made again over a new connection."""

    kind: int
    flags: int
    offset: int
    length: int
    data: bytes | None
    answered: bool = False

    @property
    def weight(self) -> int:
        """Bytes of memory, about."""
        return 128 + len(self.data or b"")


@register("nbd")
class Nbd(Node):
    """An export of an NBD server. Thread-safe."""

    class Options(Common, kw_only=True, rename="kebab"):
        """QMP: BlockdevOptionsNbd. Times in seconds."""

        server: dict[str, Any]
        export: str = ""
        tls_creds: str | None = None
        tls_hostname: str | None = None
        tls_authz: str | None = None
        x_dirty_bitmap: str | None = None
        reconnect_delay: int = 0
        open_timeout: int = 0

    remote = True
    fd = -1
    is_device = True  # its size is not ours to change, and what was never written may be anything

    def __init__(self, address: Address, export: str, delay: float) -> None:
        self.address = address
        self.export = export
        self.delay = delay
        self.filename = address.uri(export)
        self.minimum, self.maximum = 1, nbd.MAX_REQUEST  # bytes of a request
        self._patching = threading.Lock()  # blocks that are written in part take turns
        self._since: dict[int, float] = {}  # thread -> when its request began; each sets its own
        # Duty: guards everything below; notified when any of it changes. Never held over I/O.
        self._changed = threading.Condition()
        self._link: Link | None = None
        self._connecting = False  # somebody connects anew
        self._attempt: socket.socket | None = None  # on which socket
        self._aborts = 0
        self._next_attempt = 0.0
        self._why = "the connection is lost"
        self._over = ""  # why the server is not to be asked again, for good
        self._closed = False
        self._places: list[Place] = []  # where the bytes lie, as the last connection told
        self._written = 0  # changes answered
        self._flushed = 0  # of those, durable
        self._failed: OSError | None = None  # N6: sticky
        self._kept: dict[Kept, None] = {}  # in the order of their beginning
        self._kept_bytes = 0

    @classmethod
    def open(cls, options: Nbd.Options, children: Mapping[str, Node]) -> Nbd:
        """Connect. Raises `CowferryError`."""
        for name in ("tls_creds", "tls_hostname", "tls_authz"):
            if getattr(options, name) is not None:
                raise NotSupported(
                    f"Parameter '{name.replace('_', '-')}': TLS is not supported",
                    "use a tunnel, and its near end as the server",
                )
        if options.x_dirty_bitmap is not None:
            raise NotSupported(
                "Parameter 'x-dirty-bitmap' is not supported",
                "what is not dirty would read as zeroes; ask for the bitmap with "
                "nbdinfo --map=qemu:dirty-bitmap:NAME",
            )
        for name, value in (
            ("reconnect-delay", options.reconnect_delay), ("open-timeout", options.open_timeout),
        ):  # fmt: skip
            if not 0 <= value < 1 << 32:
                raise CowferryError(f"Parameter '{name}' expects a number of seconds")
        nbd.check_string(options.export, "Parameter 'export'")
        node = cls(from_qmp(options.server, "server"), options.export, options.reconnect_delay)
        link = node._first(options.open_timeout)
        node.size, node.align = link.size, link.minimum
        node.minimum = link.minimum
        node.maximum = min(link.maximum, nbd.MAX_REQUEST) // link.minimum * link.minimum
        node.read_only = options.read_only
        try:
            if link.size % link.minimum:
                raise ImageError(
                    f"'{node.filename}' has {link.size} bytes, in blocks of {link.minimum}"
                )
            if link.flags & nbd.READ_ONLY and not options.read_only:
                if not options.auto_read_only:
                    raise ImageError(
                        f"'{node.filename}' is a read-only export",
                        "open it with read-only=on or auto-read-only=on",
                    )
                node.read_only = True
        except BaseException:
            link.close()
            raise
        node._link = link
        return node

    @classmethod
    def plan(cls, path: str, size: int, options: Mapping[str, Any]) -> Plan:
        """There is no such thing: the server makes its exports."""
        raise NotSupported(f"'{path}': an export is made by its server", "use one that is there")

    def info(self) -> dict[str, Any]:
        """Nothing that qemu-img would tell."""
        return {}

    def places(self) -> list[Place]:
        """What a server of ours told; of others only which export it is."""
        return self._places

    # Reading -----------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """As the server tells them; DATA what it does not tell.

        A ZERO run says that it is writable, so that nobody remembers it."""
        writable = not self.read_only
        m, end = self.minimum, offset + length
        questions = 16 + length // MANY
        while offset < end:
            n = min(end - offset, STATUS)
            runs: list[tuple[int, int]] = []
            if questions > 0:
                questions -= 1
                first = offset // m * m
                runs = self._status(first, -(-(offset + n) // m) * m - first, offset - first)
            for run, flags in runs or [(n if questions > 0 else end - offset, 0)]:
                run = min(run, end - offset)
                state = State.ZERO if flags & nbd.STATE_ZERO else State.DATA
                if run:
                    yield Extent(run, state, -1, offset, writable)
                offset += run

    def _status(self, offset: int, length: int, skip: int) -> list[tuple[int, int]]:
        """(length, flags) of the first runs, less `skip` bytes; none if the server does not say."""
        try:
            runs = self._do(nbd.BLOCK_STATUS, 0, offset, length).runs[ALLOCATION]
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return []
            raise
        while runs and runs[0][0] <= skip:
            skip -= runs.pop(0)[0]
        if runs:
            runs[0] = (runs[0][0] - skip, runs[0][1])
        return runs

    def pread(self, buf: memoryview, offset: int) -> None:
        """Bytes past the end are zeroes."""
        inside = max(min(len(buf), self.size - offset), 0)
        clear(buf[inside:])
        for at, n in self._blocks(offset, inside):
            view = buf[at - offset : at - offset + n]
            if at % self.minimum or n % self.minimum:
                view[:] = self._block(at)[at % self.minimum :][:n]
            else:
                self._do(nbd.READ, 0, at, n, into=view)

    def read_run(self, buf: memoryview, offset: int, extent: Extent) -> None:
        """A run of `extents`."""
        self.pread(buf, offset)

    def _blocks(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The range in pieces: a part of a block, or whole blocks that fit into one request."""
        m, end = self.minimum, offset + length
        while offset < end:
            if offset % m:
                n = min(m - offset % m, end - offset)
            else:
                n = min((end - offset) // m * m, self.maximum) or end - offset
            yield offset, n
            offset += n

    def _block(self, offset: int) -> memoryview:
        """The block around `offset`."""
        block = memoryview(bytearray(self.minimum))
        self._do(nbd.READ, 0, offset // self.minimum * self.minimum, len(block), into=block)
        return block

    # Writing -----------------------------------------------------------------------------

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write. A block that is written in part is read, changed and written back."""
        self._check(offset, len(buf))
        # With a delay an older write that is kept could be sent again over it: then by a flush.
        able = fua and not self.delay and self._flags() & nbd.SEND_FUA and self._failed is None
        flags = nbd.CMD_FUA if able else 0
        for at, n in self._blocks(offset, len(buf)):
            data = buf[at - offset : at - offset + n]
            if at % self.minimum or n % self.minimum:
                self._patch(at, data, flags)
            else:
                self._change(nbd.WRITE, flags, at, n, data)
        if fua and not able:
            self.flush()

    def zero(self, offset: int, length: int, unmap: bool = False, fast: bool = False) -> None:
        """By the server's own zeroing; else, unless `fast`, by writing zeroes."""
        self._check(offset, length)
        m, flags = self.minimum, self._flags()
        able = bool(flags & nbd.SEND_WRITE_ZEROES)
        how = 0 if unmap else nbd.CMD_NO_HOLE
        if fast:
            ragged = offset % m or (offset + length) % m
            if ragged or not able or not flags & nbd.SEND_FAST_ZERO:
                raise OSError(errno.EOPNOTSUPP, f"{self.filename}: no fast way to write zeroes")
            how |= nbd.CMD_FAST_ZERO
        end = offset + length
        while offset < end:
            n = min(end - offset, ZERO_AT_ONCE - offset % m)
            if offset % m or n < m:
                n = min(m - offset % m, n)
                self._patch(offset, memoryview(ZEROES)[:n])
            else:
                n = n // m * m
                try:
                    if not able:
                        raise OSError(errno.EOPNOTSUPP, "")
                    self._change(nbd.WRITE_ZEROES, how, offset, n)
                except OSError as error:
                    if fast or error.errno != errno.EOPNOTSUPP:
                        raise
                    able = False
                    n = min(n, len(ZEROES), self.maximum)
                    self._change(nbd.WRITE, 0, offset, n, memoryview(ZEROES)[:n])
            offset += n

    def discard(self, offset: int, length: int) -> None:
        """The whole blocks of it, if the server knows how."""
        self._check(offset, length)
        m, flags = self.minimum, self._flags()
        offset, end = -(-offset // m) * m, (offset + length) // m * m
        while flags & nbd.SEND_TRIM and offset < end:
            n = min(end - offset, ZERO_AT_ONCE)
            self._change(nbd.TRIM, 0, offset, n)
            offset += n

    def _check(self, offset: int, length: int) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, f"{self.filename} is open read-only")
        if offset + length > self.size:
            raise OSError(
                errno.ENOSPC, f"{self.filename}: {offset}+{length} is past its end at {self.size}"
            )

    def _patch(self, offset: int, data: memoryview, flags: int = 0) -> None:
        """Part of one block."""
        within = offset % self.minimum
        with self._patching:
            block = self._block(offset)
            block[within : within + len(data)] = data
            self._change(nbd.WRITE, flags, offset - within, len(block), block)

    def _change(
        self, kind: int, flags: int, offset: int, length: int, data: memoryview | None = None
    ) -> None:
        """One request that changes bytes, remembered until it is durable."""
        durable = flags & nbd.CMD_FUA
        kept = None
        if self.delay and not durable:
            # Before it is sent, or a new connection could miss one whose answer is just coming.
            raw = bytes(data) if data is not None else None
            kept = Kept(kind, flags & ~nbd.CMD_FAST_ZERO, offset, length, raw)
            self._keep(kept)
        try:
            call = self._do(kind, flags, offset, length, data)
        except BaseException:
            if kept is not None:
                self._forget([kept])
            raise
        if durable:
            return
        with self._changed:
            self._written += 1
            if kept is not None:
                kept.answered = True
            elif call.link is not self._link:  # there is another connection by now
                self._doubt()
            full = self._kept_bytes > KEEP
        if full:
            self.flush()

    def _keep(self, kept: Kept) -> None:
        with self._changed:
            self._kept[kept] = None
            self._kept_bytes += kept.weight

    def _forget(self, those: list[Kept]) -> None:
        with self._changed:
            for k in those:
                if k in self._kept:
                    del self._kept[k]
                    self._kept_bytes -= k.weight

    def flush(self) -> None:
        """What was answered is durable on return. Fails for good once it failed (N6)."""
        with self._changed:
            number, failed = self._written, self._failed
            covered = [k for k in self._kept if k.answered]
            if failed is None and number == self._flushed:
                return
        try:
            if failed is None and self._flags() & nbd.SEND_FLUSH:
                self._do(nbd.FLUSH, 0, 0, 0)
        except CalledOff:
            raise  # what the server has flushed is not known, and nothing has failed
        except OSError as error:
            with self._changed:
                self._failed = self._failed or error
        with self._changed:
            failed = self._failed  # by now, perhaps: it may have gone over a new connection
        if failed is not None:
            raise OSError(
                failed.errno or errno.EIO,
                f"{self.filename}: a flush has failed ({reason(failed, self.filename)}); every "
                "later flush fails, too, until the node is opened again",
            )
        with self._changed:
            self._flushed = max(self._flushed, number)
        self._forget(covered)

    # The connection ----------------------------------------------------------------------

    def _flags(self) -> int:
        with self._changed:
            return self._link.flags if self._link is not None else 0

    def _do(
        self,
        kind: int,
        flags: int,
        offset: int,
        length: int,
        data: memoryview | bytes | None = None,
        into: memoryview | None = None,
    ) -> Call:
        """One request, sent again if the connection is lost and there is a delay.

        Raises `OSError`; EOPNOTSUPP for a question that the server has no way to answer."""
        aborts = self._aborts
        self._since[threading.get_ident()] = now = time.monotonic()
        until = now + self.delay  # of the first loss, if there is one
        lost = False
        try:
            while True:
                link = self._link
                if link is None or link.failure is not None:
                    link = self._current(aborts, until)
                if kind == nbd.BLOCK_STATUS and not link.contexts:
                    raise OSError(errno.EOPNOTSUPP, f"{self.filename}: no block status")
                try:
                    return link.wait(link.submit(kind, flags, offset, length, data, into))
                except ConnectionError as error:  # ESHUTDOWN, which the server may send, is one
                    link.abort(str(error))
                    again = self._lost(link, error, aborts)
                    if not again:
                        raise self._no_more(self._told(error)) from error
                    if not lost:
                        until, lost = time.monotonic() + self.delay, True
        finally:
            del self._since[threading.get_ident()]

    def _lost(self, link: Link, error: ConnectionError, aborts: int) -> bool:
        """Take note. Whether it makes sense to send the request again."""
        with self._changed:
            if self._link is link:
                self._why = self._told(error)
                if isinstance(error, Broken):
                    self._over = self._over or self._why
                self._doubt()
            self._changed.notify_all()
            return bool(self.delay) and not self._over and aborts == self._aborts

    def _told(self, error: Exception) -> str:
        """Why a connection failed, without the name of the export."""
        return reason(error, self.filename)

    def _no_more(self, why: str) -> OSError:
        """The error of a request that no connection answers."""
        return OSError(errno.EIO, f"{self.filename}: {why}")

    def _doubt(self) -> None:
        """The connection is gone: what was written over it and not flushed may be, too.

        Caller holds the lock."""
        if self._written > self._flushed and (not self.delay or self._over):
            self._failed = self._failed or OSError(
                errno.EIO, "the connection was lost with writes that were not flushed"
            )

    def _current(self, aborts: int, until: float) -> Link:
        """The connection, made anew if need be. Raises `OSError` (EIO) at `until`, or at once if
        it was aborted since."""
        with self._changed:
            while True:
                if self._over:
                    raise self._no_more(self._over)
                if self._closed or aborts != self._aborts:
                    raise OSError(errno.EIO, f"{self.filename}: the request was given up")
                if self._link is not None and self._link.failure is None:
                    return self._link
                now = time.monotonic()
                if not self._connecting and now >= self._next_attempt:
                    self._connecting = True
                    self._doubt()
                elif now >= until:
                    raise self._no_more(self._why)
                else:
                    turn = math.inf if self._connecting else self._next_attempt
                    scope.wait(self._changed, min(turn, until) - now)
                    continue
                self._changed.release()
                try:
                    fresh, failure = self._again(min(max(until - now, 1.0), HANDSHAKE))
                finally:
                    self._changed.acquire()
                    self._connecting = False
                    self._changed.notify_all()
                if fresh is not None and aborts == self._aborts and not self._closed:
                    self._link = fresh
                elif fresh is not None:
                    fresh.abort()
                else:
                    self._why = failure
                    self._next_attempt = time.monotonic() + (PAUSE if self.delay else RARELY)

    def _again(self, timeout: float) -> tuple[Link | None, str]:
        """Connect anew, and write again what is kept. Return the connection, or None and why there
        is none. Calls of other threads wait."""
        old, link = self._link, None
        if old is not None:
            old.close()
        try:
            link = self._dial(timeout)
            same = link.size == self.size and link.minimum == self.minimum
            if not same or link.maximum < self.maximum:
                raise Broken("another export answers under that name now")
            if link.flags & nbd.READ_ONLY and not self.read_only:
                raise Broken("the export is read-only now")
            with self._changed:
                kept = list(self._kept)
            for k in kept:
                link.wait(link.submit(k.kind, k.flags, k.offset, k.length, k.data))
        except CalledOff:
            if link is not None:
                link.abort()
                link.close()
            raise
        except (OSError, CowferryError) as error:
            if link is not None:
                link.abort()
                link.close()
            if isinstance(error, Broken) or (link is not None and not _is_loss(error)):
                with self._changed:
                    self._over = self._told(error)
                    self._doubt()
            return None, self._told(error)
        finally:
            with self._changed:
                self._attempt = None
        return link, ""

    def _dial(self, timeout: float) -> Link:
        """A new connection. Raises `OSError`."""

        def begun(sock: socket.socket) -> None:
            with self._changed:
                self._attempt = sock

        start = time.monotonic()
        sock = connect(self.address, timeout, begun)
        left = max(timeout - (time.monotonic() - start), 0.1)
        link = Link(sock, self.export, self.filename, (ALLOCATION,), left, identify=True)
        told = identity.heard(link.storage)
        self._places = told or identity.of_server(identity.server_address(sock), self.export)
        return link

    def _first(self, patience: float) -> Link:
        """The first connection, tried for `patience` seconds, but at least once."""
        until = time.monotonic() + patience
        with scope.unhurried():
            while True:
                try:
                    return self._dial(HANDSHAKE)
                except CalledOff as error:
                    why = error.strerror
                    raise ImageError(f"Could not open '{self.filename}': {why}") from error
                except OSError as error:
                    serious = isinstance(error, Broken | Refused)
                    if serious or time.monotonic() + PAUSE >= until:
                        raise ImageError(
                            f"Could not open '{self.filename}': {error.strerror or error}"
                        ) from error
                time.sleep(PAUSE)

    def abort(self, patience: float = 0.0) -> None:
        """Fail every request that waits, now. Later ones connect anew.

        Writes that were answered and not flushed are in doubt then, as after any loss."""
        oldest = min(list(self._since.values()), default=math.inf)
        if patience and time.monotonic() - oldest < patience:
            return
        with self._changed:
            self._aborts += 1
            link, attempt = self._link, self._attempt
            self._changed.notify_all()
        if link is not None:
            link.abort("the request was given up")
        if attempt is not None:
            with contextlib.suppress(OSError):
                attempt.shutdown(socket.SHUT_RDWR)

    # The node as a whole -----------------------------------------------------------------

    def resize(self, size: int) -> None:
        """The size is the server's. Raises `OSError` (ENOSPC), or `NotSupported` to shrink."""
        if size > self.size:
            raise OSError(errno.ENOSPC, f"{self.filename}: an export of {self.size} bytes")
        if size < self.size:
            raise NotSupported(f"'{self.filename}' has the size that its server gives it")

    def reopen(self, read_only: bool) -> None:
        """Change what we allow ourselves. Raises `OSError` if the server does not."""
        if read_only and not self.read_only:
            self.flush()
        elif not read_only and self._flags() & nbd.READ_ONLY:
            raise OSError(errno.EPERM, f"{self.filename}: a read-only export")
        self.read_only = read_only

    def close(self) -> None:
        """Flush, and leave. Idempotent. Raises `OSError` if what was written may be lost.

        It takes no longer than `PATIENCE`, and asks nobody after an `abort`."""
        with self._changed:
            if self._closed:
                return
            link = self._link
            given_up = self._aborts and (link is None or link.failure is not None)
        limit = threading.Timer(PATIENCE, self.abort)
        limit.daemon = True
        try:
            if self._written > self._flushed and not (given_up or self._failed):
                limit.start()
                self.flush()
        finally:
            limit.cancel()
            with self._changed:
                self._closed = True
                link = self._link
                self._changed.notify_all()
            if link is not None:
                link.close()


def _is_loss(error: Exception) -> bool:
    """Whether it may go better another time."""
    return isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, Broken)


def options_of(uri: str) -> dict[str, Any]:
    """blockdev-add's options for a URI. Raises `CowferryError`."""
    address, export = parse_uri(uri)
    server: dict[str, Any] = {"type": "unix", "path": address.path}
    if not address.path:
        server = {"type": "inet", "host": address.host, "port": str(address.port)}
    return {"driver": "nbd", "server": server, "export": export}
