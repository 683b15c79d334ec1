"""The NBD server: listens, shakes hands, and hands each connection to a lane.

Fixed newstyle only. A client has a deadline for the whole handshake, however slowly it talks,
and a limit for what it may send in it; nothing of a disk is touched before it has chosen one.

Locks: `NbdServer.lock` guards the tables of exports, listeners and connections; no I/O happens
under it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cowferry.block import identity
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.identity import STORAGE
from cowferry.block.node import State
from cowferry.block.peers import peer_of, watch_peer
from cowferry.errors import CowferryError
from cowferry.exports import Export
from cowferry.exports.nbd_lane import Connection, Context, Describe
from cowferry.exports.sockets import address_of, bind_tcp, bind_unix, close_listeners, shown
from cowferry.wire import nbd
from cowferry.wire.address import Address

log = logging.getLogger(__name__)

WORKERS = 8
FINISH_SECONDS = 3.0  # that clients who are sent away get answers to what they have asked
PEER_SECONDS = 60.0  # after which a TCP client that does not react is taken to be gone
FEW_PLACES = 8  # connections that one address may have, if a listener has room for so many
SAY_SECONDS = 30.0  # between two complaints that a listener is full
MAX_CONTEXTS = 64
TICK = 0.5  # seconds; how long a stop may go unnoticed by accept


def allocation(disk: Disk, offset: int, length: int) -> list[tuple[int, int]]:
    """base:allocation. A hole in the chain reads as zero and is not allocated."""
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    extents = disk.extents(offset, length)
    return [(e.length, 0 if e.state is State.DATA else hole) for e in extents]


def nothing(disk: Disk, offset: int, length: int) -> list[tuple[int, int]]:
    """x-cowferry-storage: says nothing of any range."""
    disk.check(offset, length)
    return [(length, 0)]


def depth(disk: Disk, offset: int, length: int) -> list[tuple[int, int]]:
    """qemu:allocation-depth: 0 nowhere, 1 in the top, 2 in its backing, ..."""
    return [(e.length, e.depth + 1) for e in disk.extents(offset, length)]


def dirty(bitmap: Bitmap) -> Describe:
    """qemu:dirty-bitmap:NAME: 1 where the bitmap is set."""

    def describe(disk: Disk, offset: int, length: int) -> list[tuple[int, int]]:
        disk.check(offset, length)
        out: list[tuple[int, int]] = []
        end = offset + length
        for start, run in bitmap.runs(offset, length):
            start, stop = max(start, offset), min(start + run, end)
            if start > offset:
                out.append((start - offset, 0))
            out.append((stop - start, nbd.STATE_DIRTY))
            offset = stop
        if offset < end:
            out.append((end - offset, 0))
        return out

    return describe


class NbdExport(Export):
    """A disk under a name."""

    type = "nbd"

    def __init__(
        self,
        id: str,
        disk: Disk,
        *,
        name: str | None = None,
        writable: bool = True,
        description: str = "",
        allocation_depth: bool = True,
        default: bool = False,
        writethrough: bool = False,
        bitmaps: tuple[Bitmap, ...] = (),
    ) -> None:
        super().__init__(id, disk, writable and not disk.read_only)
        self.name = id if name is None else name
        nbd.check_string(self.name, f"the name of export '{id}'")
        nbd.check_string(description, f"the description of export '{id}'")
        self.description = description
        self.default = default
        self.writethrough = writethrough  # every write is durable when it is answered
        self.contexts: dict[str, Describe] = {"base:allocation": allocation}
        if allocation_depth:
            self.contexts["qemu:allocation-depth"] = depth
        self.bitmaps = bitmaps
        for bitmap in bitmaps:
            self.contexts[f"qemu:dirty-bitmap:{bitmap.name}"] = dirty(bitmap)
        self.lanes: set[Connection] = set()  # guarded by `changed`
        self.changed = threading.Condition()
        # An export's own: one stalled disk (a remote base, say) stalls no other.
        # Reads and changes do not share them, because changes may all wait for a job.
        prefix = f"nbd {self.name[:32]}"
        self.workers = ThreadPoolExecutor(WORKERS, thread_name_prefix=prefix)
        self.readers = ThreadPoolExecutor(WORKERS, thread_name_prefix=prefix)

    @property
    def users(self) -> int:
        """Connections in transmission phase."""
        return len(self.lanes)

    def flags(self, structured: bool) -> int:
        """The transmission flags. Multi-conn holds because a flush covers the whole disk (N3);
        DF may be offered only with structured replies."""
        out = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_CACHE
        out |= nbd.CAN_MULTI_CONN | (nbd.SEND_DF if structured else 0)
        if self.writable:
            return out | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO
        return out | nbd.READ_ONLY

    def enter(self, lane: Connection) -> None:
        """A lane begins. Raises `ConnectionError` once the export is on its way out."""
        with self.changed:
            if self.shutting_down:
                raise ConnectionError("the export is gone")
            self.lanes.add(lane)

    def leave(self, lane: Connection) -> None:
        """A lane has ended, with nothing in flight."""
        with self.changed:
            self.lanes.discard(lane)
            self.changed.notify_all()

    def clients(self) -> list[str]:
        """Who is connected, in words."""
        with self.changed:
            return [peer_of(lane.sock) for lane in self.lanes]

    def stop(self, force: bool = False, seconds: float = math.inf) -> bool:
        """Let nobody use the disk through this export any more. With `force` clients are sent away
        once what they have asked for is answered, or `FINISH_SECONDS` have passed.

        Return False if requests on the disk have not finished within `seconds`."""
        until = time.monotonic() + seconds
        with self.changed:
            self.shutting_down = True
            if force:
                for lane in self.lanes:
                    lane.finish()
                self.changed.wait_for(lambda: not self.lanes, min(FINISH_SECONDS, seconds))
                for lane in self.lanes:
                    lane.hang_up()
            left = None if seconds == math.inf else max(until - time.monotonic(), 0)
            ended = self.changed.wait_for(lambda: not self.lanes, left)
        for pool in (self.workers, self.readers):
            pool.shutdown(wait=ended)
        return ended


class Place(NamedTuple):
    """Where a client is connected, and from which host; "" on a unix socket."""

    listener: socket.socket
    address: str


class NbdServer:
    """Listeners, exports and connections. Thread-safe."""

    def __init__(
        self,
        max_connections: int = 100,
        handshake_seconds: float = 10.0,
        peer_seconds: float = PEER_SECONDS,
    ) -> None:
        """`max_connections`: of each listener; 0: no limit. `peer_seconds`: after which a TCP
        client that does not react, because its host or the network is gone, is disconnected."""
        self.max_connections = max_connections or 1 << 30
        self.handshake_seconds = handshake_seconds
        self.peer_seconds = peer_seconds
        self.lock = threading.Lock()
        self.exports: dict[str, NbdExport] = {}  # by name
        self.listeners: list[tuple[socket.socket, str | None]] = []  # and the path to unlink
        self.connections: dict[socket.socket, Place] = {}
        self.threads: set[threading.Thread] = set()
        self.stopping = False
        self._say_again = 0.0  # when the next complaint may come; guarded by `lock`

    # Listening ---------------------------------------------------------------------------

    def listen_unix(self, path: str, mode: int = 0o600) -> None:
        """Listen on a socket file; a stale one of a dead server is replaced."""
        sock = bind_unix(path, mode)
        self.listen_socket(sock, path)

    def listen(self, address: Address) -> Address:
        """Listen on an address, and return it with the port that was free.

        Raises `CowferryError`."""
        if address.path:
            self.listen_unix(address.path)
            return address
        sock = bind_tcp(address)
        self.listen_socket(sock)
        return address_of(sock)

    def listen_tcp(self, host: str, port: int) -> int:
        """Listen on an address; returns the port (useful with port 0)."""
        return self.listen(Address("", host, port)).port

    def listen_socket(self, sock: socket.socket, path: str | None = None) -> None:
        """Serve a socket that listens already (socket activation)."""
        with self.lock:
            self.listeners.append((sock, path))
        self._spawn(lambda: self._accept(sock), "nbd listener")

    def uri(self, name: str) -> str:
        """The NBD URI of an export on the first listener."""
        return self.uris(name)[0]

    def uris(self, name: str) -> list[str]:
        """The NBD URI of an export on each listener."""
        with self.lock:
            listeners = list(self.listeners)
        addresses = [
            address_of(sock) if path is None else Address(path) for sock, path in listeners
        ]
        return [address.uri(name) for address in addresses]

    # Exports -----------------------------------------------------------------------------

    def check_name(self, name: str) -> None:
        """Raise `CowferryError` if an export has the name, or none may have it."""
        nbd.check_string(name, "the name of the export")
        with self.lock:
            if name in self.exports:
                raise CowferryError(f"NBD server already has export named '{name}'")

    def add(self, export: NbdExport) -> None:
        """Offer a disk. Raises `CowferryError` if the name is taken."""
        with self.lock:
            if export.name in self.exports:
                raise CowferryError(f"NBD server already has export named '{export.name}'")
            self.exports[export.name] = export

    def remove(self, export: NbdExport, force: bool = False) -> None:
        """Withdraw it; returns when it is truly gone. Without `force`, refuse while in use."""
        with self.lock:
            if not force and export.users:
                raise CowferryError(
                    f"export '{export.id}' still in use",
                    f"{export.users} client(s) are connected; mode=hard disconnects them",
                )
            if self.exports.get(export.name) is export:
                del self.exports[export.name]
        export.stop(force=True)

    def find(self, name: str) -> NbdExport | None:
        """The export of that name; the empty name means the only one, or the default."""
        with self.lock:
            found = self.exports.get(name)
            if found is None and name == "":
                chosen = [e for e in self.exports.values() if e.default]
                if not chosen and len(self.exports) == 1:
                    chosen = list(self.exports.values())
                found = chosen[0] if len(chosen) == 1 else None
            return found

    def stop(self, seconds: float = math.inf) -> bool:
        """Close every socket once what clients have asked for is answered, and forget every export.

        Return False if requests have not finished within `seconds`."""
        until = time.monotonic() + seconds
        with self.lock:
            self.stopping = True
            listeners, self.listeners = self.listeners, []
            exports, self.exports = list(self.exports.values()), {}
            connections = list(self.connections)
        close_listeners(listeners)
        lanes = [lane for export in exports for lane in list(export.lanes)]
        for lane in lanes:  # all at once, before one after the other is waited for
            lane.finish()
        serving = {lane.sock for lane in lanes}
        for sock in connections:
            if sock not in serving:  # it has not chosen an export yet
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        ended = True
        for export in exports:
            ended &= export.stop(True, max(until - time.monotonic(), 0.0))
        while True:  # a listener may have begun one more connection meanwhile
            with self.lock:
                left = self.threads - {threading.current_thread()}
            if not left or not ended:
                return ended
            for thread in left:
                thread.join(None if seconds == math.inf else max(until - time.monotonic(), 0.0))
                ended &= not thread.is_alive()

    # Connections -------------------------------------------------------------------------

    def _spawn(self, work: Callable[[], None], name: str) -> None:
        def main() -> None:
            try:
                work()
            finally:
                with self.lock:
                    self.threads.discard(threading.current_thread())

        thread = threading.Thread(target=main, name=name, daemon=True)
        with self.lock:  # started before anybody can find it to join it
            thread.start()
            self.threads.add(thread)

    def _accept(self, listener: socket.socket) -> None:
        while not self.stopping:
            try:
                sock, peer = listener.accept()
            except OSError:
                if self.stopping:
                    return
                time.sleep(0.05)  # out of descriptors, say: do not spin
                continue
            if not self._admit(sock, Place(listener, peer[0] if isinstance(peer, tuple) else "")):
                sock.close()
                continue
            self._spawn(lambda sock=sock: self._connection(sock), "nbd connection")  # type: ignore[misc]

    def _admit(self, sock: socket.socket, place: Place) -> bool:
        """Give a client a place at its listener, if there is one. A host has half of them at most,
        so that it cannot keep the others out."""
        most = self.max_connections
        each = max(most // 2, min(most, FEW_PLACES)) if place.address else most
        with self.lock:
            there = [p for p in self.connections.values() if p.listener is place.listener]
            mine = sum(p.address == place.address for p in there)
            full = len(there) >= most or mine >= each
            if not full and not self.stopping:
                self.connections[sock] = place
                return True
            quiet = self.stopping or time.monotonic() < self._say_again
            if not quiet:
                self._say_again = time.monotonic() + SAY_SECONDS
        if not quiet:
            who = f"{place.address or 'local clients'} has" if mine >= each else "all clients have"
            log.error(
                "nbd: refused a connection at %s: %s %d of %d places; raise max-connections, or "
                "close some connections",
                shown(place.listener), who, mine if mine >= each else len(there), most,
            )  # fmt: skip
        return False

    def _connection(self, sock: socket.socket) -> None:
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                watch_peer(sock, self.peer_seconds)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
            handshake = Handshake(self, sock, time.monotonic() + self.handshake_seconds)
            found = handshake.run()
            if found is None:
                return
            sock.settimeout(None)
            lane = Connection(
                sock, found.disk, found.writable, handshake.structured,
                handshake.contexts, found.workers, found.readers, found.writethrough,
            )  # fmt: skip
            try:
                found.enter(lane)
                lane.run()
            finally:
                lane.close()
                found.leave(lane)
        except (OSError, EOFError) as error:
            log.info("nbd client left: %s", error)
        finally:
            with self.lock:
                self.connections.pop(sock, None)
            sock.close()


class Handshake:
    """One client's option haggling: a loop over options, each answered before the next."""

    def __init__(self, server: NbdServer, sock: socket.socket, deadline: float) -> None:
        self.server = server
        self.sock = sock
        self.deadline = deadline
        self.structured = False
        self.no_zeroes = False
        self.contexts: list[Context] = []
        self.contexts_of: NbdExport | None = None

    def run(self) -> NbdExport | None:
        """The export chosen, or None if the client left. Raises `OSError`."""
        self._send(nbd.greeting())
        (flags,) = struct.unpack(">I", self._recv(4))
        if flags & ~(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES):
            return None  # the specification: unknown flags end the session
        self.no_zeroes = bool(flags & nbd.FLAG_NO_ZEROES)
        while True:
            magic, option, length = nbd.OPTION.unpack(self._recv(nbd.OPTION.size))
            if magic != nbd.IHAVEOPT:
                return None
            if length > nbd.MAX_OPTION:
                if option == nbd.OPT_EXPORT_NAME or length > nbd.MAX_REQUEST:
                    return None
                left = length
                while left:
                    left -= len(self._recv(min(left, 65536)))
                self._reply(option, nbd.REP_ERR_TOO_BIG, b"option is too long")
                continue
            payload = self._recv(length)
            if option == nbd.OPT_EXPORT_NAME:
                return self._export_name(payload)
            if option == nbd.OPT_ABORT:
                with contextlib.suppress(OSError):
                    self._reply(option, nbd.REP_ACK)
                return None
            chosen = self._option(option, payload)
            if chosen is not None:
                return chosen

    def _option(self, option: int, payload: bytes) -> NbdExport | None:
        if option == nbd.OPT_LIST:
            if payload:
                self._reply(option, nbd.REP_ERR_INVALID, b"LIST takes no data")
                return None
            with self.server.lock:
                offered = list(self.server.exports.values())
            for e in offered:
                entry = nbd.server_entry(e.name, e.description)
                self._reply(option, nbd.REP_SERVER, entry)
            self._reply(option, nbd.REP_ACK)
        elif option == nbd.OPT_STRUCTURED_REPLY:
            if payload:
                self._reply(option, nbd.REP_ERR_INVALID, b"STRUCTURED_REPLY takes no data")
            else:
                self.structured = True
                self._reply(option, nbd.REP_ACK)
        elif option in (nbd.OPT_INFO, nbd.OPT_GO):
            return self._info(option, payload)
        elif option in (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
            self._meta(option, payload)
        elif option == nbd.OPT_STARTTLS:
            self._reply(option, nbd.REP_ERR_POLICY, b"this server has no TLS")
        else:
            self._reply(option, nbd.REP_ERR_UNSUP, b"unknown option")
        return None

    def _export_name(self, payload: bytes) -> NbdExport | None:
        try:
            found = self.server.find(payload.decode())
        except UnicodeDecodeError:
            return None
        if found is None:
            return None  # this option has no way to say no but to hang up
        self._forget_contexts(found)
        out = struct.pack(">QH", found.disk.size, found.flags(self.structured))
        self._send(out if self.no_zeroes else out + bytes(124))
        return found

    def _info(self, option: int, payload: bytes) -> NbdExport | None:
        asked = nbd.parse_info(payload)
        if asked is None:
            self._reply(option, nbd.REP_ERR_INVALID, b"malformed request")
            return None
        name, kinds = asked
        found = self._find(option, name)
        if found is None:
            return None
        if nbd.INFO_NAME in kinds:
            self._reply(option, nbd.REP_INFO, nbd.info_text(nbd.INFO_NAME, found.name))
        if nbd.INFO_DESCRIPTION in kinds and found.description:
            text = nbd.info_text(nbd.INFO_DESCRIPTION, found.description)
            self._reply(option, nbd.REP_INFO, text)
        sizes = nbd.info_block_size(1, nbd.PREFERRED, nbd.MAX_REQUEST)
        self._reply(option, nbd.REP_INFO, sizes)
        self._reply(
            option, nbd.REP_INFO, nbd.info_export(found.disk.size, found.flags(self.structured))
        )
        self._reply(option, nbd.REP_ACK)
        if option == nbd.OPT_INFO:
            return None
        self._forget_contexts(found)
        return found

    def _find(self, option: int, name: str) -> NbdExport | None:
        found = self.server.find(name) if len(name.encode()) <= nbd.MAX_STRING else None
        if found is None:
            self._reply(option, nbd.REP_ERR_UNKNOWN, f"no export named '{name[:64]}'".encode())
        return found

    def _forget_contexts(self, chosen: NbdExport) -> None:
        if self.contexts_of is not chosen:
            self.contexts = []

    def _meta(self, option: int, payload: bytes) -> None:
        if option == nbd.OPT_SET_META_CONTEXT:  # a SET that fails leaves none
            self.contexts, self.contexts_of = [], None
        if not self.structured:
            self._reply(option, nbd.REP_ERR_INVALID, b"negotiate structured replies first")
            return
        asked = nbd.parse_meta(payload)
        if asked is None:
            self._reply(option, nbd.REP_ERR_INVALID, b"malformed request")
            return
        name, queries = asked
        found = self._find(option, name)
        if found is None:
            return
        if STORAGE in queries:  # from one of us: nobody else knows of it, and a list is without it
            self._storage(option, found)
        matches = [
            c for c in found.contexts
            if any(self._matches(q, c, option) for q in queries)
            or (option == nbd.OPT_LIST_META_CONTEXT and not queries)
        ]  # fmt: skip
        for number, context in enumerate(matches[:MAX_CONTEXTS], 1):
            ident = number if option == nbd.OPT_SET_META_CONTEXT else 0
            self._reply(option, nbd.REP_META_CONTEXT, nbd.meta_context(ident, context))
            if option == nbd.OPT_SET_META_CONTEXT:
                self.contexts.append((number, context, found.contexts[context]))
        if option == nbd.OPT_SET_META_CONTEXT:
            self.contexts_of = found
        self._reply(option, nbd.REP_ACK)

    def _storage(self, option: int, found: NbdExport) -> None:
        """Tell where the bytes of an export lie (`block/identity.py`).

        What is selected is an empty context: it says that we are a server that can be asked."""
        if option == nbd.OPT_SET_META_CONTEXT:
            self._reply(option, nbd.REP_META_CONTEXT, nbd.meta_context(MAX_CONTEXTS + 1, STORAGE))
            self.contexts.append((MAX_CONTEXTS + 1, STORAGE, nothing))
            return
        for context in identity.told(found.disk.root, found.disk.store):
            self._reply(option, nbd.REP_META_CONTEXT, nbd.meta_context(0, context))

    @staticmethod
    def _matches(query: str, context: str, option: int) -> bool:
        if query == context:
            return True
        # "base:" and "qemu:" list a namespace; they select nothing.
        return (
            option == nbd.OPT_LIST_META_CONTEXT
            and query.endswith(":")
            and context.startswith(query)
        )

    def _reply(self, option: int, kind: int, payload: bytes = b"") -> None:
        self._send(nbd.option_reply(option, kind, payload))

    def _patience(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("handshake took too long")
        return left

    def _send(self, data: bytes) -> None:
        self.sock.settimeout(self._patience())
        self.sock.sendall(data)

    def _recv(self, length: int) -> bytes:
        out = bytearray()
        while len(out) < length:
            self.sock.settimeout(self._patience())
            part = self.sock.recv(length - len(out))
            if not part:
                raise EOFError("client hung up")
            out += part
        return bytes(out)


def export_of(disk: Disk, name: str) -> NbdExport:
    """A plain writable export of a disk under `name`."""
    return NbdExport(name, disk, name=name)
