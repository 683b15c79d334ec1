"""A power cut on a real file system, end to end: XFS on a loop device, shut down under the daemon.

FS_IOC_SHUTDOWN without flushing the log is the nearest thing to pulling the plug: whatever was
not made durable is gone after the next mount.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chains import contents, differs
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from tests_support import need, unavailable

FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
CUTS = 20
SIZE = 4 << 20


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        unavailable(f"{command[0]}: {done.stderr.strip()}")


@contextmanager
def xfs(folder: Path) -> Iterator[Path]:
    """A mounted XFS of its own."""
    if os.geteuid() != 0:
        unavailable("mounting needs root")
    image, mount = folder / "fs.img", folder / "mnt"
    mount.mkdir()
    with open(image, "wb") as f:
        f.truncate(400 << 20)
    run("mkfs.xfs", "-q", str(image))
    run("mount", "-o", "loop", str(image), str(mount))
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], capture_output=True)


def cut(mount: Path, image: Path) -> None:
    """No power: what was not durable is gone."""
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(fd)


def remount(mount: Path, image: Path) -> None:
    run("umount", str(mount))
    run("mount", "-o", "loop", str(image), str(mount))


class Qmp:
    """A conversation by hand."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("r")
        self.lines.readline()
        self.say("qmp_capabilities")

    def say(self, command: str, **arguments: object) -> None:
        self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())

    def until(self, event: str) -> None:
        """Returns at the very arrival of an event."""
        needle = f'"{event}"'
        while needle not in self.lines.readline():
            pass


def test_ST2_J3_a_completed_stream_survives_a_power_cut(tmp_path: Path) -> None:
    need("mkfs.xfs", "mount", "losetup")
    with xfs(tmp_path) as mount:
        rnd = random.Random(3)
        elsewhere = tmp_path / "base.raw"  # the base lies on another file system
        for number in range(CUTS):
            base = bytearray(rnd.randbytes(SIZE))
            elsewhere.write_bytes(base)
            path = mount / f"vm{number}.qcow2"
            opening.create_image(
                str(path), "qcow2", SIZE,
                {"backing_file": str(elsewhere), "backing_fmt": "raw"},
            )  # fmt: skip
            run_folder = tmp_path / f"run{number}"
            daemon = subprocess.Popen(
                [sys.executable, "-m", "cowferry", "serve", f"vm={path}"],
                env={**os.environ, "COWFERRY_RUN": str(run_folder)},
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            try:
                assert daemon.stdout is not None
                uri = daemon.stdout.readline().split(": ", 1)[1].strip()
                client = NbdClient(uri)
                data = rnd.randbytes(70_000)
                client.pwrite(data, 1_000_000)
                client.flush()
                base[1_000_000:1_070_000] = data
                qmp = Qmp(run_folder / "qmp.sock")
                qmp.say("block-stream", device="vm", **{"job-id": "s"})
                qmp.until("BLOCK_JOB_COMPLETED")
                elsewhere.unlink()
                cut(mount, tmp_path / "fs.img")
                client.abort()
            finally:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()
            remount(mount, tmp_path / "fs.img")
            node = opening.open_image(str(path), read_only=True)
            assert node.backing is None
            wrong = differs(contents(node), base)
            node.close()
            assert not wrong, f"cut {number}: {wrong}"
            done = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True)
            assert done.returncode in (0, 3), done.stdout + done.stderr
            path.unlink()
            with contextlib.suppress(OSError):
                shutil.rmtree(run_folder)
