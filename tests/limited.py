"""A house with a limited disk, and guests that send without waiting for the answers."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chains import chain_of_disks, contents, differs
from cowferry.block.disk import Disk
from cowferry.daemon import Daemon
from cowferry.exports.nbd import NbdExport
from cowferry.wire import nbd
from daemons import PATIENCE, Told
from timers import ByHand

SIZE = 4 << 20
BLOCK = 4096
LAYERS = ["base.raw", "sn1.qcow2", "vm.qcow2"]
NO_LIMITS = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}


def until(ready: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.001)


class Guest:
    """An NBD client that sends without waiting for the answers."""

    def __init__(self, path: Path, name: str = "vm") -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.settimeout(PATIENCE)
        self._receive(18)
        self.sock.sendall(struct.pack(">I", 3))
        wanted = name.encode()
        self.sock.sendall(nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, len(wanted)) + wanted)
        self._receive(10)
        self.sent = 0
        self.held: bytearray | None = None

    def _receive(self, length: int) -> bytes:
        out = b""
        while len(out) < length:
            part = self.sock.recv(length - len(out))
            if not part:
                raise EOFError
            out += part
        return out

    def send(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> int:
        """The request's cookie; cookies count from 1."""
        self.sent += 1
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, kind, self.sent, offset, length)
        if self.held is None:
            self.sock.sendall(head + data)
        else:
            self.held += head + data
        return self.sent

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is sent meanwhile goes out together: a socket takes few small pieces."""
        self.held = bytearray()
        yield
        self.sock.sendall(self.held)
        self.held = None

    def write(self, number: int, length: int = BLOCK) -> int:
        """Write the block of that number full of it."""
        return self.send(nbd.WRITE, number * BLOCK, length, bytes([number % 251 + 1]) * length)

    def read(self, number: int, length: int = BLOCK) -> int:
        return self.send(nbd.READ, number * BLOCK, length)

    def answer(self, length: int = 0) -> int:
        """The cookie of the next answer, which is no error and brings `length` bytes."""
        magic, code, cookie = nbd.SIMPLE.unpack(self._receive(16))
        assert (magic, code) == (nbd.SIMPLE_MAGIC, 0)
        self._receive(length)
        return int(cookie)

    def answers(self, count: int, length: int = 0) -> list[int]:
        return [self.answer(length) for _ in range(count)]

    def rest(self) -> list[int]:
        """The cookies of the answers that still come before the server hangs up."""
        found: list[int] = []
        with suppress(EOFError, ConnectionResetError):
            while True:
                found.append(self.answer())
        return found

    def gone(self) -> bool:
        """Whether the server has hung up."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()


class House:
    """A daemon in this process whose disk `vm` stands on two layers, and is exported."""

    def __init__(self, folder: Path, daemon: Daemon, clock: ByHand) -> None:
        self.folder = folder
        self.daemon = daemon
        self.clock = clock
        self.told = Told(daemon)
        self.oracle = chain_of_disks(folder, LAYERS, SIZE)
        daemon.start_nbd({"type": "unix", "path": str(folder / "nbd")})
        self.disk = daemon.open_disk("vm", str(folder / LAYERS[-1]))
        self.export = daemon.add_export(self.disk, "vm")

    def guest(self, name: str = "vm") -> Guest:
        return Guest(self.folder / "nbd", name)

    def limit(self, device: str = "vm", /, **given: Any) -> None:
        self.daemon.execute("block_set_io_throttle", {"device": device, **NO_LIMITS, **given})

    def add(self, name: str) -> Disk:
        """One more disk, raw and empty, exported."""
        path = self.folder / f"{name}.raw"
        path.write_bytes(bytes(SIZE))
        disk = self.daemon.open_disk(name, str(path))
        self.daemon.add_export(disk, name)
        return disk

    def waiting(self, count: int, disk: Disk | None = None) -> None:
        """Until so many requests wait for their turn."""
        member = (disk or self.disk).limits
        assert member is not None
        until(lambda: member.waiting == count, f"{member.waiting} wait, not {count}")

    def wrote(self, *numbers: int) -> None:
        for n in numbers:
            self.oracle[n * BLOCK : (n + 1) * BLOCK] = bytes([n % 251 + 1]) * BLOCK

    def check(self) -> None:
        assert not differs(contents(self.disk.root), self.oracle)

    def export_of(self, name: str) -> NbdExport:
        found = self.daemon.exports[name]
        assert isinstance(found, NbdExport)
        return found


@contextmanager
def a_house(folder: Path, clock: ByHand) -> Iterator[House]:
    daemon = Daemon()
    try:
        yield House(folder, daemon, clock)
    except BaseException:
        clock.advance(1e9)  # a test that failed leaves no write at a brake
        raise
    finally:
        daemon.close()
