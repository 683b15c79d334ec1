"""What every benchmark needs: the two daemons, clients, images, and one measured line."""

from __future__ import annotations

import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cowferry.cli.client import Client
from cowferry.errors import CowferryError

T = TypeVar("T")

GIB = 1 << 30
OURS, QSD = "cowferry", "qemu-storage-daemon"


class Line(NamedTuple):
    """One thing measured: ours and theirs in `unit`; `ratio` above one means that we are better."""

    name: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    aim: float  # 0: nothing is promised

    @property
    def missed(self) -> bool:
        """Whether the ratio is below what the project aims at."""
        return self.ratio < self.aim


def median(values: list[float]) -> float:
    return statistics.median(values)


def run(*command: str) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return done.stdout


def patiently(what: Callable[[], T], seconds: float = 20) -> T:
    """The first result of `what` that is not an error: a daemon takes a moment to come up."""
    end = time.monotonic() + seconds
    while True:
        try:
            return what()
        except (OSError, CowferryError):
            if time.monotonic() > end:
                raise
            time.sleep(0.005)


class Daemon:
    """A storage daemon: ours or QEMU's, started with the very same options."""

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        self.socket = folder / "nbd.sock"
        monitor = folder / "qmp.sock"
        for path in (self.socket, monitor):
            path.unlink(missing_ok=True)
        program = [QSD] if name == QSD else [sys.executable, "-m", "cowferry", "serve"]
        self.child = subprocess.Popen(
            [
                *program,
                *options,
                "--chardev", f"socket,id=c,path={monitor},server=on,wait=off",
                "--monitor", "chardev=c",
            ],
            env={**os.environ, "COWFERRY_RUN": str(folder / "run")},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.qmp = patiently(lambda: Client(str(monitor)))

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()
        self.child.terminate()
        self.child.wait(30)

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """MiB."""
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise LookupError("VmRSS")

    def job(self, command: str, **arguments: Any) -> float:
        """Run a block job to its end (a ready one is completed); the seconds it took."""
        begin = time.monotonic()
        self.qmp.call(command, job_id="j", **arguments)
        for event in self.qmp.wait_events(600):
            name, data = event["event"], event["data"]
            if name == "BLOCK_JOB_READY":
                self.qmp.call("job-complete", id="j")
            if name == "BLOCK_JOB_COMPLETED":
                if "error" in data:
                    raise RuntimeError(data["error"])
                break
        took = time.monotonic() - begin
        self.qmp.events.clear()
        return took


def fio(uri: str, depth: int, kind: str, seconds: int) -> dict[str, float]:
    """4 KiB random requests for a while; requests per second and the 99th percentile in us."""
    out = run(
        "fio", "--name=j", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", "--bs=4k",
        f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--output-format=json",
        "--size=256m", "--randrepeat=1",
    )  # fmt: skip
    job = json.loads(out[out.index("{") :])["jobs"][0]["read" if "read" in kind else "write"]
    return {"iops": job["iops"], "p99": job["clat_ns"]["percentile"]["99.000000"] / 1000}


def warm(size: int) -> None:
    """Have `size` bytes of free memory at hand.

    A virtual machine lends free memory to its host, and what it takes back is slow when first
    touched: whoever runs first would pay for both."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, size, flags=flags).close()


def random_file(path: Path, size: int) -> None:
    block = random.Random(1).randbytes(4 << 20)
    with open(path, "wb") as f:
        f.writelines(n.to_bytes(8, "big") + block[8:] for n in range(0, size, len(block)))
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def reflink_folder(stack: ExitStack) -> Iterator[Path | None]:
    """A folder on a file system that shares extents; None if this user cannot mount one."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    image, mount = place / "xfs.img", place / "mnt"
    mount.mkdir()
    with open(image, "wb") as f:
        f.truncate(8 * GIB)
    try:
        run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        run("mount", "-o", "loop", str(image), str(mount))
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield mount
    finally:
        run("umount", str(mount))
