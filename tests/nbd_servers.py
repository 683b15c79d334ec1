"""NBD servers for tests of the client: real ones, one that forgets, one that follows a script."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowferry.block.node import Node
from cowferry.drivers import opening
from cowferry.drivers.nbd import Nbd
from cowferry.wire import nbd
from daemons import PATIENCE

EVERYTHING = (
    nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES
    | nbd.SEND_FAST_ZERO
)  # fmt: skip


def until(so: Callable[[], object]) -> None:
    """Wait for it, and fail if it does not come."""
    deadline = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def answers(path: Path) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


def freeze(process: subprocess.Popen[Any]) -> None:
    """Stop a process (SIGSTOP). On return none of its threads answers any more."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    until(lambda: all(_stopped(task / "stat") for task in tasks.iterdir()))


def _stopped(stat: Path) -> bool:
    return stat.read_text().rpartition(")")[2].split()[0] == "T"


@contextmanager
def frozen(process: subprocess.Popen[Any]) -> Iterator[None]:
    """A process is stopped inside."""
    try:
        freeze(process)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def program(path: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server as a process of its own, which listens on the socket `path`."""
    with subprocess.Popen(command) as child:
        try:
            until(lambda: child.poll() is not None or answers(path))
            assert child.poll() is None, command
            yield child
        finally:
            child.kill()


@contextmanager
def qemu_nbd(path: Path, image: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-nbd over a raw image; the export has no name."""
    with program(
        path, "qemu-nbd", "-f", "raw", "-k", str(path), "-t", "-e", "20", *more, str(image)
    ) as child:
        yield child


@contextmanager
def nbdkit(path: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit with a plugin and filters."""
    with program(path, "nbdkit", "-f", "-U", str(path), *arguments) as child:
        yield child


def uri(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"


def node_of(path: Path, **more: Any) -> Nbd:
    """A node over the export of a unix socket."""
    options = {"driver": "nbd", "server": {"type": "unix", "path": str(path)}, **more}
    node = opening.open_node({k.replace("_", "-"): v for k, v in options.items()})
    assert isinstance(node, Nbd)
    return node


def view(content: bytes) -> memoryview:
    return memoryview(bytearray(content))


def bytes_of(node: Node, offset: int = 0, length: int | None = None) -> bytes:
    """By `pread`, without asking about runs."""
    out = memoryview(bytearray(node.size - offset if length is None else length))
    node.pread(out, offset)
    return bytes(out)


def empty(path: Path, size: int = 4 << 20) -> Path:
    with open(path, "wb") as f:
        f.truncate(size)
    return path


# What a server says ------------------------------------------------------------------------


def reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    return nbd.option_reply(option, kind, payload)


STRUCTURED = reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK)
CONTEXT = reply(
    nbd.OPT_SET_META_CONTEXT, nbd.REP_META_CONTEXT, nbd.meta_context(7, "base:allocation")
)
ENOUGH = reply(nbd.OPT_SET_META_CONTEXT, nbd.REP_ACK)


def export(size: int, flags: int = EVERYTHING) -> bytes:
    return reply(nbd.OPT_GO, nbd.REP_INFO, nbd.info_export(size, flags))


def blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    return reply(nbd.OPT_GO, nbd.REP_INFO, nbd.info_block_size(minimum, preferred, maximum))


GONE = reply(nbd.OPT_GO, nbd.REP_ACK)


def hello(size: int, flags: int = EVERYTHING) -> bytes:
    """All that a good server says until the first request."""
    return nbd.greeting() + STRUCTURED + CONTEXT + ENOUGH + export(size, flags) + GONE


def chunk(kind: int, payload: bytes = b"", cookie: int = 1, flags: int = nbd.CHUNK_DONE) -> bytes:
    return nbd.CHUNK.pack(nbd.CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload


def data(offset: int, content: bytes, cookie: int = 1, flags: int = nbd.CHUNK_DONE) -> bytes:
    return chunk(nbd.CHUNK_DATA, struct.pack(">Q", offset) + content, cookie, flags)


class Scripted:
    """Says to everybody who comes the same bytes, whatever he says, and hears him out."""

    def __init__(self, path: Path, says: bytes) -> None:
        self.says = says
        self.stays = False  # does not hang up when all is said
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(8)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                sock.sendall(self.says)
                if not self.stays:
                    sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)


class Forgetful:
    """A disk with a volatile cache: what was not flushed is lost in a crash. It counts requests,
    and can be made to hang, to drop a connection, to refuse."""

    def __init__(self, path: Path, size: int, flags: int = EVERYTHING) -> None:
        self.path, self.size, self.flags = path, size, flags
        self.volatile, self.durable = bytearray(size), bytearray(size)
        self.asked: list[int] = []  # types of the requests, in order
        self.fails: dict[int, int] = {}  # type -> error number that it is answered with
        self.overtaken = -1  # type of requests that are done after the next one of another type
        self.before: Callable[[int], None] = lambda kind: None  # called with each request
        self.up()

    def up(self) -> None:
        """Listen."""
        self.path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(8)
        self.clients: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._listen, args=(self.listener,), daemon=True)]
        self.threads[0].start()

    def crash(self) -> None:
        """Everybody is sent away, nobody comes in, and the cache is lost."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in self.clients:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self.threads):
            if thread is not threading.current_thread():
                thread.join(PATIENCE)
        self.volatile = bytearray(self.durable)

    def restart(self) -> None:
        """Crash, and come up again."""
        self.crash()
        self.up()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.clients.append(sock)
            self.threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
            self.threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.sendall(hello(self.size, self.flags))
            incoming = sock.makefile("rb")
            incoming.read(4)
            waiting: list[tuple[int, int, int, int, int, bytes]] = []
            for _ in range(3):  # structured replies, a meta context, go
                _, _, length = nbd.OPTION.unpack(incoming.read(nbd.OPTION.size))
                incoming.read(length)
            while len(head := incoming.read(nbd.REQUEST.size)) == nbd.REQUEST.size:
                _, flags, kind, cookie, offset, length = nbd.REQUEST.unpack(head)
                payload = incoming.read(length) if kind == nbd.WRITE else b""
                if kind == nbd.DISC:
                    return
                self.asked.append(kind)
                self.before(kind)
                waiting.append((kind, flags, cookie, offset, length, payload))
                if kind != self.overtaken:
                    while waiting:
                        sock.sendall(self._answer(*waiting.pop()))

    def _answer(
        self, kind: int, flags: int, cookie: int, offset: int, length: int, payload: bytes
    ) -> bytes:
        if kind in self.fails:
            return nbd.error_chunk(cookie, self.fails[kind], "no")
        end = offset + length
        if kind == nbd.READ:
            return data(offset, bytes(self.volatile[offset:end]), cookie)
        if kind == nbd.BLOCK_STATUS:
            return chunk(nbd.CHUNK_STATUS, nbd.block_status(7, [(length, 0)]), cookie)
        if kind in (nbd.WRITE, nbd.WRITE_ZEROES):
            self.volatile[offset:end] = payload or bytes(length)
        if kind == nbd.FLUSH:
            self.durable[:] = self.volatile
        if flags & nbd.CMD_FUA:
            self.durable[offset:end] = self.volatile[offset:end]
        return chunk(nbd.CHUNK_NONE, b"", cookie)
