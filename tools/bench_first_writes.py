"""A guest's first writes into an overlay over a full base: alone, and beside a stream.

This is the main job: a disk has just booted from a base that lies elsewhere. Each write of 4 KiB
comes into a cluster of its own, so the rest of the cluster is copied from the base. The files lie
on a plain file system, on tmpfs and, as root, on loop devices.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench_common import GIB, OURS, QSD, Daemon, Line, median, random_file, run

WRITES = 6000  # of the 16384 clusters of the disk
DEPTH = 16
SPEED = 32 << 20  # bytes per second of the stream beside: it lasts longer than the writes


class Place(NamedTuple):
    """Where the two images lie."""

    name: str
    base: str
    top: str
    driver: str  # of both


def bench_first_writes(folder: Path, rounds: int) -> Iterator[Line]:
    """Requests per second of first writes, over a raw base of 1 GiB."""
    with ExitStack() as stack:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        places = [
            Place("ext4", f"{folder}/base.raw", f"{folder}/top.qcow2", "file"),
            Place("tmpfs", f"{memory}/base.raw", f"{memory}/top.qcow2", "file"),
        ]
        for place in places:
            random_file(Path(place.base), GIB)
        with open(f"{folder}/top.img", "wb") as f:
            f.truncate(GIB + GIB // 8)
        try:
            base, top = (
                stack.enter_context(loop(f"{folder}/{name}")) for name in ("base.raw", "top.img")
            )
            places.append(Place("device", base, top, "host_device"))
        except (OSError, subprocess.CalledProcessError):
            pass  # only root makes devices
        for place in places:
            for what, speed in (("", 0), (", beside a stream", SPEED)):
                found: dict[str, list[float]] = {OURS: [], QSD: []}
                for _ in range(rounds):
                    for name in found:
                        found[name].append(first_writes(name, folder, place, speed))
                a, b = median(found[OURS]), median(found[QSD])
                yield Line(f"first writes, {place.name}{what}", "IOPS", a, b, a / b, 0)
        for place in places[:2]:
            Path(place.base).unlink()


@contextmanager
def loop(path: str) -> Iterator[str]:
    """A loop device over a file."""
    device = run("losetup", "-f", "--show", path).strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


def first_writes(name: str, folder: Path, place: Place, speed: int) -> float:
    """Writes per second into a new overlay, if `speed` with a stream of so many bytes per second
    beside them."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", place.base, "-F", "raw", place.top, "1G")
    below, above = (
        f"file.driver={place.driver},file.filename={path}" for path in (place.base, place.top)
    )
    with Daemon(
        name, folder,
        "--blockdev", f"driver=raw,node-name=b,read-only=on,{below}",
        "--blockdev", f"driver=qcow2,node-name=t,backing=b,{above}",
        "--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'}",
        "--export", "type=nbd,id=e,node-name=t,name=d,writable=on",
    ) as daemon:  # fmt: skip
        if speed:
            daemon.qmp.call("block-stream", job_id="j", device="t", speed=speed)
        out = run(
            "fio", "--name=j", "--ioengine=nbd", f"--uri=nbd+unix:///d?socket={daemon.socket}",
            "--rw=randwrite", "--bs=4k", "--blockalign=64k", "--size=1g", f"--iodepth={DEPTH}",
            f"--number_ios={WRITES}", "--output-format=json",
        )  # fmt: skip
        if speed and not daemon.qmp.call("query-block-jobs"):
            raise RuntimeError("the stream was over before the writes were")
        if speed:
            daemon.qmp.call("block-job-cancel", device="j", force=True)
            for event in daemon.qmp.wait_events(60):
                if event["event"] == "BLOCK_JOB_CANCELLED":
                    break
    return float(json.loads(out[out.index("{") :])["jobs"][0]["write"]["iops"])
