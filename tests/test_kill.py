"""kill -9 in the middle of a stream under load: the image is valid, flushed writes are there.

SIGKILL is no power cut (the page cache survives it); what it finds is state kept in memory only.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from chains import contents, differs, make_base, overlay
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from tests_support import need

SIZE = 48 << 20
SECTOR = 512
KILLS = 20 if os.environ.get("COWFERRY_SOAK") is None else 500


class Sectors:
    """What a crash may leave of each sector: the last flushed value, or any written since."""

    def __init__(self, flat: bytearray) -> None:
        self.flat = flat
        self.maybe: dict[int, list[bytes]] = {}

    def write(self, offset: int, data: bytes) -> None:
        """A write was sent, answered or not."""
        for i in range(0, len(data), SECTOR):
            sector = (offset + i) // SECTOR
            known = self.maybe.setdefault(sector, [self._value(sector)])
            known.append(data[i : i + SECTOR])

    def flushed(self) -> None:
        """A flush was answered: the last value is the only one."""
        for sector, values in self.maybe.items():
            self.flat[sector * SECTOR : (sector + 1) * SECTOR] = values[-1]
        self.maybe.clear()

    def adopt(self, got: bytearray) -> str:
        """Check what is there, and take it as the truth. Words for what is wrong, or empty."""
        for sector, values in self.maybe.items():
            at = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if bytes(got[at]) not in values:
                return f"sector {sector} has a value that was never written there"
            self.flat[at] = got[at]
        self.maybe.clear()
        return differs(got, self.flat)

    def _value(self, sector: int) -> bytes:
        return bytes(self.flat[sector * SECTOR : (sector + 1) * SECTOR])


def check_but_for_leaks(path: Path) -> None:
    done = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stdout + done.stderr


def load(client: NbdClient, sectors: Sectors, rnd: random.Random, first: threading.Event) -> None:
    """Write and flush until the server dies."""
    try:
        while True:
            offset = rnd.randrange(SIZE // SECTOR - 300) * SECTOR
            data = rnd.randbytes(SECTOR * rnd.choice([1, 8, 33, 260]))
            sectors.write(offset, data)
            client.pwrite(data, offset)
            if rnd.random() < 0.2:
                client.flush()
                sectors.flushed()
            first.set()
    except (OSError, EOFError):
        return


def test_killed_in_the_middle_of_a_stream_again_and_again(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "vm.qcow2"
    sectors = Sectors(make_base(tmp_path, SIZE))
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    rnd = random.Random(11)
    for kill in range(KILLS):
        run = tmp_path / f"run{kill}"
        daemon = subprocess.Popen(
            [sys.executable, "-m", "cowferry", "serve", f"vm={path}"],
            env={**os.environ, "COWFERRY_RUN": str(run)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert daemon.stdout is not None
        uri = daemon.stdout.readline().split(": ", 1)[1].strip()
        client = NbdClient(uri)
        begun = threading.Event()
        thread = threading.Thread(target=load, args=(client, sectors, rnd, begun))
        thread.start()
        assert begun.wait(30)
        # Killed when a random share of a slow stream is done: its progress is the clock.
        goal = rnd.randrange(1, 6 << 20)
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.connect(str(run / "qmp.sock"))
            answers = qmp.makefile("r")
            answers.readline()
            for line in (
                '{"execute": "qmp_capabilities"}',
                '{"execute": "block-stream", "arguments": {"device": "vm", "speed": 60000000}}',
            ):
                qmp.sendall(line.encode())
                answers.readline()
            for _ in range(2000):
                qmp.sendall(b'{"execute": "query-block-stream"}')
                line = answers.readline()
                while '"return"' not in line:
                    line = answers.readline()
                if f'"offset": {goal}' in line or _offset(line) >= goal:
                    break
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        thread.join(30)
        client.abort()
        check_but_for_leaks(path)
        node = opening.open_image(str(path), read_only=True)
        wrong = sectors.adopt(contents(node))
        opening.close_chain(node)
        assert not wrong, f"kill {kill}: {wrong}"
    finish(tmp_path, path, sectors)


def _offset(line: str) -> int:
    tail = line.partition('"offset": ')[2]
    return int(tail.split("}")[0].split(",")[0]) if tail else 1 << 62


def finish(folder: Path, path: Path, sectors: Sectors) -> None:
    """Streaming again completes, and then the base is not needed (ST3)."""
    import cowferry

    with cowferry.open(str(path)) as disk:
        cowferry.stream(disk)
    (folder / "base.raw").unlink()
    node = opening.open_image(str(path))
    assert node.backing is None
    assert not differs(contents(node), sectors.flat)
    node.close()
    check_but_for_leaks(path)
