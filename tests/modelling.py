"""What the stateful model of a whole daemon is made of: chains, guests, and jobs on reins.

A job runs its own code in its own thread, as ever; but its generator is wrapped, so that it waits
before each yield until it is let go on. While it waits nothing of it moves, so a test that writes
to the disk between two steps is deterministic, and shrinks. The same job let off the reins runs
freely: then the races are the machine's.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from chains import contents
from cowferry.block.disk import Disk
from cowferry.block.lane import DONE, ZEROES, Lane
from cowferry.block.node import Node
from cowferry.block.throttle import Throttle
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.file import File
from cowferry.drivers.nbd_client import NbdClient
from cowferry.jobs import backup, commit, mirror, stream
from cowferry.jobs import group as groups
from cowferry.jobs.job import Job, Jobs, Progress
from cowferry.jobs.states import Status

PATIENCE = 60.0  # seconds until a job that should have come to rest is given up
OVER = (Status.CONCLUDED, Status.NULL)

# Chains -----------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One image of a chain. A raw one has to be the lowest."""

    kind: str  # raw, v2, v3, ext or qed
    cluster: int
    size: int  # bytes

    @property
    def format(self) -> str:
        return self.kind if self.kind in ("raw", "qed") else "qcow2"

    def options(self) -> dict[str, Any]:
        """qemu-img's -o options, but for the backing file."""
        if self.kind == "raw":
            return {}
        if self.kind == "qed":
            return {"cluster_size": max(self.cluster, 4096), "table_size": 2}
        if self.kind == "ext":
            return {"cluster_size": max(self.cluster, 16 << 10), "extended_l2": "on"}
        return {"cluster_size": self.cluster, "compat": "0.10" if self.kind == "v2" else "1.1"}


clusters = st.sampled_from([512, 4096, 16 << 10, 64 << 10])
sizes = st.one_of(
    st.integers(1, 300).map(lambda k: k * 1024),
    st.integers(1, 600).map(lambda k: k * 512),
    st.sampled_from([4096, 65_536, 65_536 + 512, 131_072]),
)
overlays = st.builds(Layer, st.sampled_from(["v2", "v3", "v3", "ext", "qed"]), clusters, sizes)
odd_sizes = st.one_of(sizes, sizes, st.integers(1, 200_000))
bottoms = st.one_of(st.builds(Layer, st.just("raw"), clusters, odd_sizes), overlays)
chains_of_layers = st.builds(
    lambda bottom, above: [bottom, *above], bottoms, st.lists(overlays, max_size=3)
)


def make_image(path: Path, layer: Layer, below: Path | None = None, below_format: str = "") -> None:
    """An image as `layer` says, over another one if that is named."""
    options = layer.options()
    if below is not None:
        options |= {"backing_file": below.name, "backing_fmt": below_format}
        if below.parent != path.parent:
            options["backing_file"] = str(below)
    opening.create_image(str(path), layer.format, layer.size, options)


def make_chain(
    folder: Path, name: str, layers: list[Layer], rnd: random.Random, base: Path | None = None
) -> tuple[Path, bytearray]:
    """Images over each other, each with bytes and zeroes of its own; the top and what it reads as.

    With `base` that raw image is the lowest layer."""
    oracle = bytearray()
    below: Path | None = None
    format = ""
    for n, layer in enumerate(layers):
        if n == 0 and base is not None:
            path, oracle, format = base, bytearray(base.read_bytes()), "raw"
        else:
            path = folder / f"{name}{n}.{layer.format}"
            make_image(path, layer, below, format)
            node = opening.open_image(str(path))
            oracle = oracle[: node.size].ljust(node.size, b"\0")
            for _ in range(rnd.randrange(5)):
                offset = rnd.randrange(node.size)
                length = min(rnd.choice([1, 512, 5000, 40_000, 100_000]), node.size - offset)
                data = rnd.randbytes(length)
                if rnd.random() < 0.3:
                    data = bytes(length)
                    node.zero(offset, length, unmap=rnd.random() < 0.5)
                else:
                    node.pwrite(memoryview(data), offset)
                oracle[offset : offset + length] = data
            opening.close_chain(node)
            format = layer.format
        below = path
    assert below is not None
    return below, oracle


def image_bytes(path: str, format: str) -> bytearray:
    """What an image reads as to one who opens it now, beside whoever has it open."""
    node = opening.open_image(path, format, read_only=True, force_share=True)
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


class Frozen:
    """A file that nobody may change."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.digest = self._digest()
        self.stamp = self._stamp()

    def check(self, thoroughly: bool = False) -> None:
        """It is as it was: it was not written, or at least no byte of it is another one."""
        if thoroughly or self._stamp() != self.stamp:
            assert self._digest() == self.digest, f"S2: '{self.path}' was changed"
            self.stamp = self._stamp()

    def _digest(self) -> str:
        return hashlib.sha1(Path(self.path).read_bytes()).hexdigest()

    def _stamp(self) -> tuple[int, int]:
        st = os.stat(self.path)
        return st.st_mtime_ns, st.st_size


def open_files(folder: Path) -> list[str]:
    """The images below a folder that this process has open; not what bitmaps are kept in, and no
    scratch files, which have no name."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith(str(folder)) and not path.endswith(
                (".sock", ".bitmaps", "(deleted)")
            ):
                found.append(path)
    return found


def files_of(daemon: Daemon) -> list[str]:
    """The files that the daemon's nodes have open."""
    return [n.filename for n in daemon.graph.every_node() if isinstance(n, File)]


# Guests -----------------------------------------------------------------------------------------

Span = tuple[int, int]  # [start, end) in bytes


class Guest:
    """A disk as its guest knows it: what was written is what is read, by whichever way."""

    def __init__(self, disk: Disk, path: Path, oracle: bytearray) -> None:
        self.disk = disk
        self.path = path  # where the disk was at first
        self.oracle = oracle
        self.lane = Lane(disk)
        self.nbd: NbdClient | None = None
        self.uri = ""
        self.burst: Burst | None = None
        # Images that the disk has left: format and size.
        self.left: dict[str, tuple[str, int]] = {}

    @property
    def root(self) -> Node:
        return self.disk.root

    def connect(self, uri: str) -> None:
        """Go through NBD as well. Again after a resize: a client is told the size once."""
        self.leave()
        self.uri = uri
        self.nbd = NbdClient(uri, timeout=PATIENCE)

    def leave(self) -> None:
        if self.nbd is not None:
            self.nbd.close()
            self.nbd = None

    def range(self, at: float, length: int) -> Span:
        """A range of the disk, of which nothing belongs to a burst. It may be empty."""
        size = len(self.oracle)
        offset = min(int(at * size), size - 1)
        end = min(offset + length, size)
        if self.burst is not None:
            start, stop = self.burst.span
            if start <= offset < stop:
                return offset, offset
            if offset < start:
                end = min(end, start)
        return offset, end

    def read(self, offset: int, length: int, via: str = "disk") -> bytearray:
        buf = bytearray(length)
        if via == "nbd" and self.nbd is not None and length:
            return self.nbd.pread(length, offset)
        if via == "lane" and length:
            answer = self.lane.read(memoryview(buf), offset, length)
            if answer == DONE:
                return buf
            if answer == ZEROES:
                return bytearray(length)
        self.disk.pread(memoryview(buf), offset)
        return buf

    def write(self, offset: int, data: bytes, via: str = "disk", fua: bool = False) -> None:
        put(self.disk, self.lane, offset, data, via, fua, self.nbd)
        self.oracle[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, unmap: bool, via: str) -> None:
        if via == "nbd" and self.nbd is not None and length:
            self.nbd.zero(length, offset)
        else:
            self.disk.zero(offset, length, unmap=unmap)
        self.oracle[offset : offset + length] = bytes(length)

    def trim(self, offset: int, length: int, via: str) -> None:
        if via == "nbd" and self.nbd is not None and length:
            self.nbd.trim(length, offset)
        else:
            self.disk.discard(offset, length)
        got = self.read(offset, length)
        was = self.oracle[offset : offset + length]
        if got != was and any(got):  # ST4: zero, or as before; never something older
            assert all(g in (0, w) for g, w in zip(got, was, strict=True))
        self.oracle[offset : offset + length] = got

    def same(self, got: bytes | bytearray) -> str:
        """Where bytes differ from what the disk should read as, in words; empty if nowhere.

        What a burst is writing is not looked at."""
        want = self.oracle
        if len(got) != len(want):
            return f"{len(got)} bytes, not {len(want)}"
        start, stop = self.burst.span if self.burst is not None else (0, 0)
        if got[:start] == want[:start] and got[stop:] == want[stop:]:
            return ""
        wrong = [i for i in range(len(want)) if got[i] != want[i] and not start <= i < stop]
        sectors = sorted({i // 512 for i in wrong})
        zero = sum(got[i] == 0 for i in wrong)
        return f"{len(wrong)} bytes ({zero} zero) from {wrong[0]} on; sectors {sectors[:8]}"


def put(
    disk: Disk, lane: Lane, offset: int, data: bytes, via: str, fua: bool, nbd: NbdClient | None
) -> None:
    """A guest's write by one of the ways in."""
    if not data:
        return
    if via == "nbd" and nbd is not None:
        nbd.pwrite(data, offset, fua=fua)
    elif via != "lane" or fua or lane.write(memoryview(bytearray(data)), offset, len(data)) != DONE:
        disk.pwrite(memoryview(data), offset, fua=fua)


class Burst(threading.Thread):
    """A guest that goes on writing into a range of its own while other things happen."""

    def __init__(self, guest: Guest, span: Span, seed: int, writes: int) -> None:
        super().__init__(name="burst", daemon=True)
        self.guest = guest
        self.span = span
        self.rnd = random.Random(seed)
        self.writes = writes
        self.want = bytearray(guest.oracle[span[0] : span[1]])  # what it has written, in order
        self.failure: BaseException | None = None

    def run(self) -> None:
        lane = Lane(self.guest.disk)
        start, stop = self.span
        try:
            for _ in range(self.writes):
                offset = self.rnd.randrange(start, stop)
                length = min(self.rnd.choice([1, 512, 3000, 9000]), stop - offset)
                data = self.rnd.randbytes(length)
                via = self.rnd.choice(["disk", "lane", "lane", "zero"])
                if via == "zero":
                    data = bytes(length)
                    self.guest.disk.zero(offset, length, unmap=self.rnd.random() < 0.5)
                else:
                    put(self.guest.disk, lane, offset, data, via, False, None)
                self.want[offset - start : offset - start + length] = data
                if self.rnd.random() < 0.1:
                    time.sleep(0.001)
        except BaseException as error:
            self.failure = error
        finally:
            lane.close()

    def end(self) -> None:
        """What it wrote is the guest's from now on."""
        self.join(PATIENCE)
        assert not self.is_alive(), "a guest's writes hang"
        if self.failure is not None:
            raise self.failure
        self.guest.oracle[self.span[0] : self.span[1]] = self.want
        self.guest.burst = None


# Jobs on reins ----------------------------------------------------------------------------------


class Reins:
    """One job, going on a step at a time or, let off, freely."""

    def __init__(self, job: Job, free: bool) -> None:
        self.job = job
        self.free = free
        self.held = False  # the job's thread waits here; guarded by the job's `changed`
        self.last: Progress | None = None  # what it has just done and nobody has looked at
        self.look: Callable[[Reins], None] = lambda reins: None  # runs in the model's thread
        whole = job.run
        setattr(job, "run", lambda: self._steps(whole()))  # noqa: B010

    def _steps(self, work: Iterator[Progress]) -> Iterator[Progress]:
        try:
            self._hold(None)
            for step in work:
                self._hold(step)
                yield step
        finally:
            work.close()  # type: ignore[attr-defined]

    def _hold(self, step: Progress | None) -> None:
        with self.job.changed:
            self.last, self.held = step, not self.free
            self.job.changed.notify_all()
            self.job.changed.wait_for(lambda: not self.held or self.job.cancelling)
            self.held = False

    def step(self) -> None:
        """Let it go on to the end of its next step, or to wherever it has to wait."""
        with self.job.changed:
            self.held = False
            self.job.changed.notify_all()
        self.settle()

    def settle(self) -> None:
        """Until it can do nothing by itself: held, paused, pending, waiting for others, over."""
        end = time.monotonic() + PATIENCE
        with self.job.changed:
            while not self._at_rest():
                assert time.monotonic() < end, f"{self.job.id} hangs {self.job.status.value}"
                self.job.changed.wait(0.002)
        if self.held:
            self.look(self)
            self.last = None

    def _at_rest(self) -> bool:
        job, status = self.job, self.job.status
        if job.thread is None or not job.thread.is_alive():
            return True
        if job.cancelling:
            return False
        if self.held or (status is Status.PENDING and not (job.auto_finalize or job.finalizing)):
            return True
        if status in (Status.PAUSED, Status.STANDBY):
            return job.user_paused
        group = job.group
        if group is None or group.culprit is not None or status is not Status.WAITING:
            return False
        return job in group.arrived and not group.live <= group.arrived

    @property
    def over(self) -> bool:
        return self.job.thread is not None and not self.job.thread.is_alive()


class ReinedJobs(Jobs):
    """Jobs that a test leads. Their clocks leap, so that a rate limit costs no time."""

    def __init__(self, daemon: Daemon, free: bool) -> None:
        super().__init__(daemon.jobs.emit)
        self.free = free
        self.reins: list[Reins] = []
        daemon.jobs = self

    def admit(self, job: Job, job_id: str, reserved: bool = False) -> None:
        reins = Reins(job, self.free)
        ticks = itertools.count(step=1000)
        job.throttle = Throttle(job.throttle.speed, lambda: float(next(ticks)))
        super().admit(job, job_id, reserved)
        self.reins.append(reins)


@contextlib.contextmanager
def small_steps(chunk: int, idle: float) -> Iterator[None]:
    """Jobs that take small disks in many steps of one size, whatever the time they take."""
    values: list[tuple[Any, str, Any]] = [
        (mirror, "MIN_CHUNK", chunk), (mirror, "STEP", 0.0), (mirror, "IDLE", idle),
        (mirror, "WINDOW", float("inf")), (commit, "MIN_CHUNK", chunk), (commit, "STEP", 0.0),
        (stream, "MIN_CHUNK", chunk), (stream, "STEP", 0.0), (groups, "TICK", 0.005),
        (backup, "MIN_CHUNK", chunk), (backup, "MAX_CHUNK", chunk), (backup, "STEP", 0.0),
        (backup, "IDLE", idle),
    ]  # fmt: skip
    before = [(module, name, getattr(module, name)) for module, name, _ in values]
    for module, name, value in values:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
