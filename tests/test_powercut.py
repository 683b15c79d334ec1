"""The power fails at the very completion event of a stream, and the base is already deleted.

The image lies on an XFS on a loop device that is shut down without flushing its log: every byte
and every table that was not made durable is gone, as after a power cut. What has to be there is
what the event promised (ST2, ST3), and every write that was flushed (N1).
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import contents, overlay
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from daemons import program
from test_kill import Sectors
from tests_support import need, unavailable

FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
SIZE = 16 << 20
CUTS = 20 if os.environ.get("COWFERRY_SOAK") is None else 200
ENDLESS = 1 << 30  # writes


class Loop:
    """A file system on a loop device, which can lose its power."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "fs.img"
        self.where = folder / "fs"
        self.where.mkdir()
        with open(self.image, "wb") as f:
            f.truncate(400 << 20)
        tell("mkfs.xfs", "-q", "-m", "reflink=1", str(self.image))
        done = subprocess.run(
            ["mount", "-o", "loop", str(self.image), str(self.where)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            unavailable(f"no loop mounts here: {done.stderr.strip()}")

    def cut(self) -> None:
        """Nothing that is not durable now will ever be."""
        fd = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def again(self) -> None:
        """Power is back."""
        tell("umount", str(self.where))
        tell("mount", "-o", "loop", str(self.image), str(self.where))

    def gone(self) -> None:
        subprocess.run(["umount", "-l", str(self.where)], capture_output=True)


def tell(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    need("mkfs.xfs", "mount", "qemu-img")
    if os.geteuid() != 0:
        unavailable("loop mounts need root")
    made = Loop(tmp_path)
    try:
        yield made
    finally:
        made.gone()


@contextmanager
def monitor(path: Path) -> Iterator[tuple[Any, Any]]:
    """(send a command, next message) of a QMP socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        lines = sock.makefile("r")

        def send(name: str, **arguments: Any) -> None:
            sock.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())

        def hear() -> dict[str, Any]:
            message = json.loads(lines.readline())
            assert isinstance(message, dict) and "error" not in message, message
            return message

        hear()
        send("qmp_capabilities")
        hear()
        yield send, hear


def write_on(
    client: NbdClient, sectors: Sectors, rnd: random.Random, begun: threading.Event, writes: int
) -> None:
    """A guest that flushes each of its writes, until there is no disk any more."""
    try:
        for _ in range(writes):
            offset = rnd.randrange(SIZE // 512 - 300) * 512
            data = rnd.randbytes(512 * rnd.choice([1, 8, 40, 257]))
            sectors.write(offset, data)
            client.pwrite(data, offset)
            client.flush()
            sectors.flushed()
            begun.set()
    except (OSError, EOFError):
        return


def stream_and_cut(
    loop: Loop, base: Path, content: bytes, rnd: random.Random, run: Path, writes: int
) -> str:
    """One stream, one power cut. What is wrong afterwards, in words; empty if nothing."""
    base.write_bytes(content)
    vm = overlay(loop.where, "vm.qcow2", str(base), "raw", SIZE)
    os.sync()  # what was there before the stream is not the matter here
    sectors = Sectors(bytearray(content))
    with program(run, f"vm={vm}") as (child, line):
        client = NbdClient(line().split(": ", 1)[1].strip())
        begun = threading.Event()
        guest = threading.Thread(target=write_on, args=(client, sectors, rnd, begun, writes))
        guest.start()
        assert begun.wait(30)
        with monitor(run / "qmp.sock") as (send, hear):
            send("block-stream", device="vm", **{"job-id": "j", "speed": 128 << 20})
            hear()
            base.unlink()
            while (message := hear()).get("event") != "BLOCK_JOB_COMPLETED":
                pass
            loop.cut()
        child.send_signal(signal.SIGKILL)
        child.wait()
        guest.join(30)
        client.abort()
    if "error" in message["data"]:
        return f"the stream failed: {message['data']['error']}"
    loop.again()
    base.unlink(missing_ok=True)
    node = opening.open_image(str(vm), read_only=True)
    if node.backing is not None:
        return "the image still wants its base"
    wrong = sectors.adopt(contents(node))
    node.close()
    checked = subprocess.run(["qemu-img", "check", str(vm)], capture_output=True, text=True)
    vm.unlink()
    if checked.returncode not in (0, 3):
        return checked.stdout + checked.stderr
    return wrong


@pytest.mark.parametrize("where", ["elsewhere", "on the same file system"])
def test_power_cut_at_the_completion_event_st2_st3(loop: Loop, tmp_path: Path, where: str) -> None:
    """20 of 20 read back right. With the base on the same file system the stream is reflinks.

    Every other guest falls silent early: its flushes would hide one that the stream forgot."""
    base = (tmp_path if where == "elsewhere" else loop.where) / "base.raw"
    rnd = random.Random(23)
    content = rnd.randbytes(SIZE)
    wrong = [
        f"cut {cut}: {why}"
        for cut in range(CUTS if where == "elsewhere" else CUTS // 2)
        if (
            why := stream_and_cut(
                loop, base, content, rnd, tmp_path / f"run{cut}", (5, ENDLESS)[cut % 2]
            )
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_the_power_cut_is_one(loop: Loop) -> None:
    """What was not flushed is lost, and what was flushed is not; else the test above is blind."""
    kept, lost = loop.where / "kept", loop.where / "lost"
    for path in (kept, lost):
        path.write_bytes(bytes(1 << 20))
    os.sync()
    for path in (kept, lost):
        with open(path, "r+b") as f:
            f.write(b"\1" * (1 << 20))
            f.flush()
            if path == kept:
                os.fdatasync(f.fileno())
    loop.cut()
    loop.again()
    assert kept.read_bytes() == b"\1" * (1 << 20)
    assert lost.read_bytes() == bytes(1 << 20)
