"""A guest that checks itself: fio's NBD client against an export, writing until it is told to stop.

It does three things at once. On the first part of the disk it writes blocks of mixed sizes in
random order, each once; stopped, it writes down how far it came, and a second run reads back
exactly those blocks. On the last part it writes everything and verifies everything, over and over.
And it reads all over the disk. So what was written before a pivot is verified after it, and what
is verified all the time crosses it. With a storm it writes in the middle of the disk as well, as
fast as it is told to, unchecked.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowferry.drivers.nbd_client import NbdClient
from daemons import PATIENCE
from tests_support import need, unavailable

AGAIN = 2 << 20  # bytes at the end of the disk that are written over and over
ONCE = "2m"  # bytes per second of what is written once: it should outlast the operation
TICK = 0.03  # seconds between looks at a disk
BLOCK = 4096  # the smallest of fio's blocks
MIXED = "4k-128k"


def need_fio() -> None:
    """Skip, or fail under CI, without a fio that speaks NBD."""
    need("fio")
    listed = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, timeout=30)
    if "nbd" not in listed.stdout.split():
        unavailable("this fio has no nbd engine")


def fio(folder: Path, jobs: list[list[str]], *options: str) -> subprocess.Popen[str]:
    """fio at work on `jobs`, each a list of options; its report goes to `folder`/report.json."""
    words = [f"--{o}" for job in jobs for o in job]
    return subprocess.Popen(
        ["fio", "--output-format=json", "--output=report.json", "--aux-path=.", "--eta=never",
         "--thread", *(f"--{o}" for o in options), *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def report(folder: Path) -> dict[str, Any]:
    """fio's report, by job."""
    text = (folder / "report.json").read_text()
    return {job["jobname"]: job for job in json.loads(text[text.index("{") :])["jobs"]}


class Guest:
    """One fio on one disk. `stop` it, then `verify`."""

    def __init__(self, folder: Path, uri: str, size: int, rate: str, storm: str | None) -> None:
        self.folder = folder
        self.uri = uri
        self.size = size
        self.rate = rate
        self.storm = storm
        self.once = size // 4 if storm else size - AGAIN  # bytes at the start of the disk
        self.storm_rate = 0.0  # bytes per second of the storm; known when stopped
        self.written = 0  # bytes, each once; known when stopped
        # The first: what the second run makes of its seed depends on the place.
        self.process = fio(folder, [self._once(), *self._meanwhile()])

    def _once(self) -> list[str]:
        return [
            "name=once", "ioengine=nbd", f"uri={self.uri}", "rw=randwrite",
            f"bsrange={MIXED}", f"size={self.once}", "iodepth=8", f"rate={ONCE}",
            "randseed=7", "verify=crc32c", "verify_fatal=1", "do_verify=1", "verify_state_save=1",
        ]  # fmt: skip

    def _meanwhile(self) -> list[list[str]]:
        common = ["ioengine=nbd", f"uri={self.uri}", f"bsrange={MIXED}", "iodepth=4"]
        common.append(f"rate={self.rate}")
        storm = [
            "name=storm", "ioengine=nbd", f"uri={self.uri}", "rw=randwrite", "bs=64k", "iodepth=8",
            f"offset={self.once}", f"size={self.size - self.once - AGAIN}", f"rate={self.storm}",
            "time_based=1", "runtime=600",
        ]  # fmt: skip
        return [
            *([storm] if self.storm else []),
            ["name=again", *common, "rw=randwrite", f"offset={self.size - AGAIN}", f"size={AGAIN}",
             "loops=1000000", "verify=crc32c", "verify_fatal=1", "do_verify=1",
             "verify_state_save=0"],
            ["name=reads", *common, "rw=randread", f"size={self.size}", "time_based=1",
             "runtime=600"],
        ]  # fmt: skip

    @property
    def writing(self) -> bool:
        """Whether fio is there and has found nothing wrong yet."""
        return self.process.poll() is None

    def goes_on(self, times: int = 2) -> None:
        """Wait until the last part of the disk was written anew `times` times: as it is verified
        between two rounds, all of it was then written and verified since the call."""
        with NbdClient(self.uri) as client:
            for _ in range(times):
                before = client.pread(AGAIN, self.size - AGAIN)
                end = time.monotonic() + PATIENCE
                while _same_blocks(before, client.pread(AGAIN, self.size - AGAIN)):
                    assert self.writing, f"fio ended: {self._said()}"
                    assert time.monotonic() < end, "fio writes no more"
                    time.sleep(TICK)

    def stop(self) -> None:
        """Let fio write down how far it came, and end. Fails if it found anything wrong."""
        assert self.writing, f"fio ended: {self._said()}"
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=PATIENCE)
        jobs = report(self.folder)
        assert not any(job["error"] for job in jobs.values()), said
        self.written = jobs["once"]["write"]["io_bytes"]
        assert self.written and jobs["again"]["write"]["io_bytes"], said
        assert jobs["again"]["read"]["io_bytes"], f"nothing was verified meanwhile: {said}"
        if self.storm:
            self.storm_rate = jobs["storm"]["write"]["bw_bytes"]
        assert jobs["reads"]["read"]["io_bytes"], f"nothing was read: {said}"

    def verify(self) -> None:
        """Read back what was written once, all of it. Fails if a byte is wrong."""
        stopped = (self.folder / "local-once-0-verify.state").exists()  # or all was written
        how = ["verify_only=1", *(["verify_state_load=1"] if stopped else [])]
        checked = fio(self.folder, [self._once()], *how)
        said, _ = checked.communicate(timeout=120)
        job = report(self.folder)["once"]
        assert checked.returncode == 0 and job["error"] == 0, said
        assert job["read"]["io_bytes"] == self.written, said

    def _said(self) -> str:
        return self.process.communicate(timeout=PATIENCE)[0]


def _same_blocks(a: bytes | bytearray, b: bytes | bytearray) -> bool:
    """Whether any block is still the same."""
    return any(a[i : i + BLOCK] == b[i : i + BLOCK] for i in range(0, len(a), BLOCK))


@contextmanager
def guest(
    folder: Path, uri: str, size: int, rate: str = "16m", storm: str | None = None
) -> Iterator[Guest]:
    """fio on the disk at `uri`, writing `rate` a second over and over; its files: `folder`."""
    folder.mkdir()
    running = Guest(folder, uri, size, rate, storm)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()
