"""Copies of a disk that is in use, side by side: mirror and backup to raw and to qcow2, commit of
both kinds; and a backup to a slow target.

Each is run on a plain file system and on one that shares extents, once with nobody there and once
under a guest: fio, which writes 4 KiB at random places at a fixed rate, so that both daemons have
the same load to carry. It is given many requests at once, or a stall would be seen by a few of
them only. What counts is what it sees between the start of the job and its end: the requests served
per second, and the 99th percentile of the latencies of those that were due, of all rounds together.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench_common import (
    GIB,
    OURS,
    QSD,
    Daemon,
    Line,
    median,
    random_file,
    reflink_folder,
    run,
    warm,
)

RATE = 2000  # requests per second that the guest asks for
DEPTH = 64
SETTLE = 1.0  # seconds that the guest runs before the job
RESOLUTION = 1e-3  # seconds, of the times in fio's log
HOLE = 8 << 20  # bytes, in every
STRIDE = 64 << 20  # bytes, of the source
DATA = GIB * (STRIDE - HOLE) // STRIDE


class Measured(NamedTuple):
    """One job: seconds, seconds of processor time of the daemon, what its guest saw."""

    took: float
    cpu: float
    iops: float
    waits: list[float]  # seconds, of each request


class Case(NamedTuple):
    """A job to run on both daemons, over the files that `Files` has made."""

    name: str
    nodes: tuple[str, ...]  # --blockdev options; {f} is the folder
    disk: str  # the node that the guest is on
    command: str
    arguments: dict[str, str]
    fresh: str  # the file to be made anew each time
    make: tuple[str, ...]  # the arguments of qemu-img create
    same: tuple[str, str, str, str] | None = None  # format, file, format, file: equal afterwards
    aim: float = 0  # how many times as fast, if it is not what the file system lets one expect


SOURCE = "driver=raw,node-name=d,file.driver=file,file.filename={f}/source.raw"
CHAIN = (
    "driver=raw,node-name=b,read-only=on,file.driver=file,file.filename={f}/base.raw",
    "driver=qcow2,node-name=m,backing=b,file.driver=file,file.filename={f}/middle.qcow2",
)
CASES = (
    Case(
        "mirror raw to raw",
        (SOURCE, "driver=raw,node-name=t,file.driver=file,file.filename={f}/target.raw"),
        "d", "blockdev-mirror", {"device": "d", "target": "t", "sync": "full"},
        "target.raw", ("-f", "raw", "{f}/target.raw", "1G"),
        ("raw", "source.raw", "raw", "target.raw"),
    ),
    Case(
        "mirror raw to qcow2",
        (SOURCE, "driver=qcow2,node-name=t,file.driver=file,file.filename={f}/target.qcow2"),
        "d", "blockdev-mirror", {"device": "d", "target": "t", "sync": "full"},
        "target.qcow2", ("-f", "qcow2", "{f}/target.qcow2", "1G"),
        ("raw", "source.raw", "qcow2", "target.qcow2"),
    ),
    Case(
        "backup raw to raw",
        (SOURCE, "driver=raw,node-name=t,file.driver=file,file.filename={f}/target.raw"),
        "d", "blockdev-backup", {"device": "d", "target": "t", "sync": "full"},
        "target.raw", ("-f", "raw", "{f}/target.raw", "1G"),
        ("raw", "source.raw", "raw", "target.raw"), 1.5,
    ),
    Case(
        "backup raw to qcow2",
        (SOURCE, "driver=qcow2,node-name=t,file.driver=file,file.filename={f}/target.qcow2"),
        "d", "blockdev-backup", {"device": "d", "target": "t", "sync": "full"},
        "target.qcow2", ("-f", "qcow2", "{f}/target.qcow2", "1G"),
        ("raw", "source.raw", "qcow2", "target.qcow2"), 1.5,
    ),
    Case(
        "commit of a layer",
        (CHAIN[0], CHAIN[1].replace("backing=b", "backing=b,read-only=on"),
         "driver=qcow2,node-name=t,backing=m,file.driver=file,file.filename={f}/top.qcow2"),
        "t", "block-commit", {"device": "t", "top-node": "m", "base-node": "b"},
        "top.qcow2",
        ("-f", "qcow2", "-b", "{f}/middle.qcow2", "-F", "qcow2", "{f}/top.qcow2", "1G"),
        ("qcow2", "middle.qcow2", "raw", "base.raw"),
    ),
    Case(
        "commit of the active layer", CHAIN,
        "m", "block-commit", {"device": "m", "base-node": "b"},
        "", (),
        ("qcow2", "middle.qcow2", "raw", "base.raw"),
    ),
)  # fmt: skip


class Guest:
    """fio on an export, from `__enter__` on; afterwards, what it saw in a span of time."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.log = folder / "guest"
        self.child = subprocess.Popen(
            [
                "fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite",
                "--bs=4k", f"--iodepth={DEPTH}", f"--rate_iops={RATE}", "--size=1g",
                "--time_based", "--runtime=600", f"--write_lat_log={self.log}",
                "--log_unix_epoch=1",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> Guest:
        time.sleep(SETTLE)
        return self

    def __exit__(self, *_: object) -> None:
        self.child.send_signal(signal.SIGINT)
        self.child.wait(30)

    def seen(self, begin: float, end: float) -> tuple[float, list[float]]:
        """(requests answered per second, latencies in seconds) from `begin` to `end`.

        In a stall fio sends nothing more, and makes up for it afterwards. So a request's latency
        counts from when it was due, not from when it was sent, as exactly as the log tells."""
        rows = []
        for line in Path(f"{self.log}_lat.1.log").read_text().splitlines():
            answered_ms, took_ns = (int(field) for field in line.split(",")[:2])
            rows.append((answered_ms / 1e3 - took_ns / 1e9, took_ns / 1e9))
        rows.sort()
        waits = []
        for number, (sent, took) in enumerate(rows):
            due = rows[0][0] + number / RATE
            if begin <= due < end:
                waits.append(took + max(sent - due - RESOLUTION, 0.0))
        answered = sum(begin <= sent + took < end for sent, took in rows)
        return answered / (end - begin), waits


def p99(waits: list[float]) -> float:
    return sorted(waits)[math.ceil(len(waits) * 0.99) - 1]


def make_files(folder: Path) -> None:
    """A raw disk with holes; and a base, all data, under a layer that is like that disk."""
    source = folder / "source.raw"
    random_file(source, GIB)
    fd = os.open(source, os.O_RDWR)
    for at in range(STRIDE - HOLE, GIB, STRIDE):
        run("fallocate", "-p", "-o", str(at), "-l", str(HOLE), str(source))
    os.fsync(fd)
    os.close(fd)
    random_file(folder / "base.raw", GIB)
    middle = folder / "middle.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(source), str(middle))
    run(
        "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(folder / "base.raw"), "-F", "raw",
        str(middle),
    )  # fmt: skip


def once(name: str, folder: Path, case: Case, loaded: bool) -> Measured:
    """Run one job to its end."""
    if case.fresh:
        (folder / case.fresh).unlink(missing_ok=True)
        run("qemu-img", "create", "-q", *(a.format(f=folder) for a in case.make))
    for record in (*folder.glob("*.moved"), *folder.glob("*.committing")):
        record.unlink()  # the files are used again as if nothing had happened
    os.sync()
    warm(3 * GIB)
    options = [o for n in case.nodes for o in ("--blockdev", n.format(f=folder))]
    with ExitStack() as stack:
        daemon = stack.enter_context(
            Daemon(
                name, folder, *options,
                "--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'}",
                "--export", f"type=nbd,id=e,node-name={case.disk},name=d,writable=on",
            )
        )  # fmt: skip
        guest = None
        if loaded:
            guest = stack.enter_context(Guest(f"nbd+unix:///d?socket={daemon.socket}", folder))
        before, begin = daemon.cpu(), time.time()
        took = daemon.job(case.command, **case.arguments)
        cpu = daemon.cpu() - before
        if guest is not None:
            time.sleep(SETTLE)  # what was held back at the end is answered, and counts
    if guest is None:
        return Measured(took, cpu, 0.0, [])
    return Measured(took, cpu, *guest.seen(begin, begin + took))


def check_same(folder: Path, case: Case) -> None:
    """A fast copy that is wrong is none."""
    if case.same is not None:
        f, a, g, b = case.same
        run("qemu-img", "compare", "-f", f, "-F", g, str(folder / a), str(folder / b))


def bench_copies(folder: Path, rounds: int) -> Iterator[Line]:
    """Mirror and commit of 1 GiB with some holes: idle and under a guest, plain and reflink."""
    with ExitStack() as stack:
        shared = stack.enter_context(reflink_folder(stack))
        for place, kind, aim in ((folder, "plain", 1.3), (shared, "reflink", 20.0)):
            if place is None:
                continue
            make_files(place)
            for case in CASES:
                for loaded in (False, True):
                    found: dict[str, list[Measured]] = {OURS: [], QSD: []}
                    for number in range(rounds):
                        for name in found:
                            found[name].append(once(name, place, case, loaded))
                            if not number and not loaded:
                                check_same(place, case)
                    what = f"{case.name}, {kind}{', guest' if loaded else ''}"
                    yield from lines(what, found[OURS], found[QSD], case.aim or aim)
                if case.fresh:
                    (place / case.fresh).unlink()
            for path in place.iterdir():
                if path.is_file():
                    path.unlink()


SLOW = 8 << 20  # bytes per second that a slow target takes
WATCHED = 10.0  # seconds of a backup that a guest is watched


def bench_slow_target(folder: Path, rounds: int) -> Iterator[Line]:
    """What a guest waits for while a backup goes to a target that takes 8 MiB a second."""
    make_files(folder)
    target = folder / "target.raw"
    found: dict[str, tuple[list[float], list[float]]] = {OURS: ([], []), QSD: ([], [])}
    for _ in range(rounds):
        for name, (idle, busy) in found.items():
            target.unlink(missing_ok=True)
            run("qemu-img", "create", "-q", "-f", "raw", str(target), "1G")
            os.sync()
            warm(3 * GIB)
            with (
                Daemon(
                    name, folder,
                    "--object", f"throttle-group,id=slow,limits.bps-total={SLOW}",
                    "--blockdev", SOURCE.format(f=folder),
                    "--blockdev", "driver=throttle,node-name=t,throttle-group=slow,"
                    f"file.driver=raw,file.file.driver=file,file.file.filename={target}",
                    "--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'}",
                    "--export", "type=nbd,id=e,node-name=d,name=d,writable=on",
                ) as daemon,
                Guest(f"nbd+unix:///d?socket={daemon.socket}", folder) as guest,
            ):  # fmt: skip
                begin = time.time()
                time.sleep(WATCHED)
                daemon.qmp.call("blockdev-backup", job_id="j", device="d", target="t", sync="full")
                time.sleep(WATCHED)
                end = time.time()
                daemon.qmp.call("block-job-cancel", device="j", force=True)
                time.sleep(SETTLE)
            idle += guest.seen(begin, begin + WATCHED)[1]
            busy += guest.seen(begin + WATCHED, end)[1]
    target.unlink()
    what = "backup to a slow target"
    (a, b), (c, d) = ([p99(waits) * 1e3 for waits in side] for side in found.values())
    yield Line(f"{what}: the guest's p99", "ms", b, d, d / b, 0)
    yield Line(f"{what}: p99, times idle", "", b / a, d / c, 3 * a / b, 1.0)


def lines(what: str, ours: list[Measured], theirs: list[Measured], aim: float) -> Iterator[Line]:
    a, b = (median([m.took for m in side]) for side in (ours, theirs))
    gib = DATA / GIB
    yield Line(what, "GiB/s", gib / a, gib / b, b / a, aim)
    a, b = (median([m.cpu for m in side]) / gib for side in (ours, theirs))
    yield Line(f"{what}: processor", "s/GiB", a, b, b / max(a, 0.01), 0)
    if not ours[0].waits:
        return
    a, b = (median([m.iops for m in side]) for side in (ours, theirs))
    yield Line(f"{what}: the guest's rate", "IOPS", a, b, a / b, 0)
    a, b = (p99([w for m in side for w in m.waits]) * 1e3 for side in (ours, theirs))
    yield Line(f"{what}: the guest's p99", "ms", a, b, b / a, 1.0)
