"""The QMP server: many clients over unix and TCP sockets, or one over a pair of streams.

Each client has a thread that reads and runs its commands, and one that writes. Answers and
events go through one bounded queue per client, so their order is the order in which they
happened, and a client that never reads stalls nobody: when its queue is full it is disconnected.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cowferry.block.peers import watch_peer
from cowferry.commands.monitor import VERSION
from cowferry.drivers import fdsets
from cowferry.errors import CommandNotFound, CowferryError, reason
from cowferry.exports.sockets import address_of, bind_tcp, bind_unix, close_listeners
from cowferry.wire import qmp
from cowferry.wire.address import Address

log = logging.getLogger(__name__)

MAX_FDS = 16  # descriptors that may come with one command
BACKLOG = 4096  # events that may wait for one client
ROOM = 4 << 20  # bytes that may wait for a client before its next command is answered
AT_ONCE = 1 << 20  # bytes that are sent together
PEER_SECONDS = 60.0  # after which a TCP client that does not react is taken to be gone
LAST_WORDS = 2.0  # seconds that clients who do not read may delay the end


class Commands(Protocol):
    """What a monitor needs of the daemon."""

    events: Any

    def execute(self, name: str, arguments: dict[str, Any]) -> Any: ...
    def answering(self) -> AbstractContextManager[None]: ...


class Stream(Protocol):
    """Bytes both ways."""

    def recv(self, length: int) -> bytes: ...
    def sendall(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class Pipe:
    """A pair of descriptors (stdio) as a stream."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.woken, self.wake = os.pipe()

    def recv(self, length: int) -> bytes:
        ready = select.select([self.source, self.woken], [], [])[0]
        return b"" if self.woken in ready else os.read(self.source, length)

    def shutdown(self, how: int) -> None:
        """Make a blocked `recv` return, as for a socket."""
        os.write(self.wake, b".")

    def sendall(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.target, data) :]

    def close(self) -> None:
        pass


class Outbox:
    """The messages that are on their way to one client. Thread-safe."""

    def __init__(self) -> None:
        # Guards all below, and is notified when any of it changes.
        self.changed = threading.Condition()
        self.messages: deque[bytes] = deque()
        self.bytes = 0  # of these
        self.ended = False  # nothing more comes
        self.lost = False  # nothing more can be sent

    def add(self, message: bytes) -> bool:
        """Add a message without waiting. False: too many wait already."""
        with self.changed:
            if len(self.messages) >= BACKLOG:
                return False
            self._add(message)
            return True

    def add_patiently(self, message: bytes) -> None:
        """Add a message once there is room for it, or drop it if the client is lost."""
        with self.changed:
            self.changed.wait_for(lambda: self.lost or self.bytes < ROOM)
            self._add(message)

    def _add(self, message: bytes) -> None:
        if not self.lost:
            self.messages.append(message)
            self.bytes += len(message)
            self.changed.notify_all()

    def take(self) -> bytes:
        """Wait for messages, and return those to be sent next; nothing after the last of them."""
        out: list[bytes] = []
        with self.changed:
            self.changed.wait_for(lambda: self.messages or self.ended or self.lost)
            size = 0
            while self.messages and size < AT_ONCE:
                out.append(self.messages.popleft())
                size += len(out[-1])
            self.bytes -= size
            self.changed.notify_all()
        return b"".join(out)

    def end(self) -> None:
        """Nothing more comes."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def lose(self) -> None:
        """The client is gone: wake the threads that wait, and drop all messages."""
        with self.changed:
            self.lost = True
            self.messages.clear()
            self.bytes = 0
            self.changed.notify_all()


class Session:
    """One QMP client."""

    def __init__(self, daemon: Commands, stream: Stream) -> None:
        self.daemon = daemon
        self.stream = stream
        self.negotiated = False
        self.oob = False
        self.fds: list[int] = []  # received, and not taken by a command yet
        self.out = Outbox()
        self.writer = threading.Thread(target=self._write, name="qmp writer", daemon=True)

    def run(self) -> None:
        """Serve until the client leaves."""
        self.writer.start()
        self.out.add(qmp.greeting(VERSION))
        self.daemon.events.listen(self._event)
        splitter = qmp.Splitter()
        try:
            while data := self._receive():
                for text in splitter.feed(data):
                    with fdsets.given(self.fds), self.daemon.answering():
                        self._one(text)
        except OSError:
            pass
        finally:
            self.daemon.events.forget(self._event)
            self.out.end()
            self.writer.join(5)
            hang_up(self.stream)  # a client that does not read holds the writer
            self.writer.join(5)
            self.stream.close()
            self._drop_fds()

    def _receive(self) -> bytes:
        """The next bytes, and descriptors that came along: for the command that they end."""
        if not isinstance(self.stream, socket.socket) or self.stream.family != socket.AF_UNIX:
            return self.stream.recv(65536)
        data, fds, _, _ = socket.recv_fds(self.stream, 65536, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if fds:
            self._drop_fds()  # those that no command wanted
            self.fds += fds
        return data

    def _drop_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def _one(self, text: bytes | qmp.ParseError) -> None:
        ident = None
        try:
            if isinstance(text, qmp.ParseError):
                raise text
            value = qmp.parse(text)
            ident = value.get("id")
            request = qmp.request(value)
            answer = qmp.result(self._run(request), ident)
        except RecursionError:
            problem = CowferryError(
                "the answer is nested too deeply", "ask for less: flat=true, or one device"
            )
            answer = qmp.error(problem, ident)
        except CowferryError as error:
            answer = qmp.error(error, ident)
        except OSError as error:
            answer = qmp.error(CowferryError(reason(error)), ident)
        except Exception as error:
            log.exception("a QMP command failed")
            problem = CowferryError(f"internal error: {error}", "please report it, with the log")
            answer = qmp.error(problem, ident)
        self.out.add_patiently(answer)  # a client that asks on and on has to read

    def _run(self, request: qmp.Request) -> Any:
        if request.oob and not self.oob:
            raise qmp.ParseError("QMP input member 'exec-oob' is unexpected")
        if request.command == "qmp_capabilities" and not self.negotiated:
            self._negotiate(request.arguments)
            return {}
        if not self.negotiated:
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        return self.daemon.execute(request.command, request.arguments)

    def _negotiate(self, arguments: dict[str, Any]) -> None:
        for key in arguments:
            if key != "enable":
                raise CowferryError(f"Parameter '{key}' is unexpected")
        enable = arguments.get("enable", [])
        if not isinstance(enable, list):
            raise CowferryError("Invalid parameter type for 'enable', expected: array")
        for capability in enable:
            if capability != "oob":
                raise CowferryError(f"Parameter 'enable' does not accept value '{capability}'")
        self.oob = "oob" in enable
        self.negotiated = True

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if self.negotiated and not self.out.add(qmp.event(name, data)):
            log.warning("a QMP client does not read; it is disconnected")
            self.out.lose()
            hang_up(self.stream)

    def _write(self) -> None:
        try:
            while data := self.out.take():
                self.stream.sendall(data)
        except OSError:
            hang_up(self.stream)
        finally:
            self.out.lose()


def hang_up(stream: Any, how: int = socket.SHUT_RDWR) -> None:
    """Make a blocked reader return."""
    with contextlib.suppress(OSError, AttributeError):
        stream.shutdown(how)


class Server:
    """Listeners whose clients each get a session in a thread of their own."""

    def __init__(self, serve: Callable[[Stream], None], name: str) -> None:
        self.serve = serve
        self.name = name
        self.lock = threading.Lock()  # guards the two below
        self.listeners: list[tuple[socket.socket, str | None]] = []
        self.clients: dict[Any, threading.Thread] = {}
        self.stopping = False
        self.ready = threading.Event()  # until then clients can connect, and are told nothing
        self.ready.set()

    def listen_unix(self, path: str, mode: int = 0o600) -> None:
        """Listen on a socket file. Raises `CowferryError`."""
        self.listen(bind_unix(path, mode), path)

    def listen_at(self, address: Address) -> Address:
        """Listen on an address, and return it with the port that was free.

        Raises `CowferryError`."""
        if address.path:
            self.listen_unix(address.path)
            return address
        sock = bind_tcp(address)
        self.listen(sock)
        return address_of(sock)

    def listen_tcp(self, host: str, port: int) -> int:
        """Listen on an address; returns the port. Raises `CowferryError`."""
        return self.listen_at(Address("", host, port)).port

    def listen(self, sock: socket.socket, path: str | None = None) -> None:
        """Serve a socket that listens already."""
        with self.lock:
            self.listeners.append((sock, path))
        threading.Thread(
            target=self._accept, args=(sock,), name=f"{self.name} listener", daemon=True
        ).start()

    def connect(self, sock: socket.socket) -> None:
        """Serve the other end of a connection that we made (socket client)."""
        self._start(sock)

    def attach(self, stream: Stream) -> threading.Thread:
        """Serve one stream (stdio)."""
        return self._start(stream)

    def _accept(self, listener: socket.socket) -> None:
        while not self.stopping:
            try:
                sock, _ = listener.accept()
                if sock.family != socket.AF_UNIX:
                    watch_peer(sock, PEER_SECONDS)
            except OSError:
                if self.stopping:
                    return
                threading.Event().wait(0.05)
                continue
            self._start(sock)

    def _start(self, stream: Stream) -> threading.Thread:
        def main() -> None:
            try:
                self.ready.wait()
                self.serve(stream)
            finally:
                with self.lock:
                    self.clients.pop(stream, None)

        thread = threading.Thread(target=main, name=f"{self.name} client", daemon=True)
        with self.lock:
            self.clients[stream] = thread
        thread.start()
        return thread

    def stop_listening(self) -> None:
        """Take no new client, and remove the socket files."""
        with self.lock:
            self.stopping = True
            listeners, self.listeners = self.listeners, []
        close_listeners(listeners)

    def stop(self) -> None:
        """Close every socket, once its client has been told what is on its way to it."""
        self.stop_listening()
        with self.lock:
            clients = list(self.clients.items())
        for client, _ in clients:
            hang_up(client, socket.SHUT_RD)
        self.ready.set()
        patience = time.monotonic() + LAST_WORDS
        for client, thread in clients:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(max(patience - time.monotonic(), 0))
            hang_up(client)


def server(daemon: Commands) -> Server:
    """A QMP server on a daemon."""
    return Server(lambda stream: Session(daemon, stream).run(), "qmp")
