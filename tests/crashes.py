"""A daemon whose jobs are stepped by hand, a guest that writes in between, and the judge of what
each power cut leaves.

`World` is a run: disks in two folders, under a write log, changed by real commands while `churn`
writes through the gate. Three marks say how far an operation is:

    finish     it begins to make its result true
    switched   guests go on after it (and write at once, before anybody is told)
    done       whoever asked has been told

Until `finish` a disk's current image is the old one, from `switched` on it is the new one, and in
between it is either; and whichever it is, its bytes are what the guest may have written.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chains import contents, make_base, overlay
from cowferry import daemon as daemons
from cowferry.block.disk import Disk
from cowferry.block.node import chain
from cowferry.daemon import Daemon
from cowferry.drivers import OVERLAYS, opening
from cowferry.drivers.formats import format_of
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.drivers.qed.image import Qed
from cowferry.errors import CowferryError
from cowferry.jobs.commit import ActiveCommit, Commit
from cowferry.jobs.ending import finish
from cowferry.jobs.job import Job, Jobs
from cowferry.jobs.mirror import Mirror
from cowferry.jobs.states import Status
from cowferry.jobs.stream import Stream
from cowferry.operations.change import Change
from cowferry.operations.snapshot import Snapshot
from daemons import Told
from tests_support import need
from writelog import Log, Oracle, State, put_attributes, states

SOAK = os.environ.get("COWFERRY_SOAK") is not None
SIZE = 256 << 10
CLUSTER = "4k"
SPEED = 640 << 10  # a tenth of it is a chunk, and nobody waits between steps
ENDINGS = (Snapshot, Change, Stream, Commit, ActiveCommit, Mirror)
# For the guard of these tests: what is broken while a world is recorded.
BREAK: list[Callable[[pytest.MonkeyPatch], None]] = []

Again = Callable[[Daemon, Told], None]  # the operation once more, to its end


class Wrong(AssertionError):
    """A state that no crash may leave."""


class Stepped(Jobs):
    """Jobs without threads of their own: the test is their thread."""

    def admit(self, job: Job, job_id: str, reserved: bool = False) -> None:
        super().admit(job, job_id, reserved)

        def start() -> None:
            with job.changed:
                job._move(Status.RUNNING)

        setattr(job, "start", start)  # noqa: B010


class Drive:
    """One disk of the world: where it was first, where it is, and where it is going."""

    def __init__(self, name: str, disk: Disk, original: Path) -> None:
        self.name = name
        self.original = str(original)
        self.old = disk.root.filename  # the image before the operation
        self.new = self.old  # and after it
        self.between: list[str] = []  # further images that it is in on its way
        self.until = ""  # the mark from which on the guest writes to something else
        self.flat = contents(disk)  # when the log began


class World:
    """A run of operations under a log. A context manager: inside, everything is recorded."""

    def __init__(self, folder: Path, seed: int = 5) -> None:
        self.here, self.there = folder / "here", folder / "there"
        self.here.mkdir()
        self.there.mkdir()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(daemons, "FLUSH_EVERY", 1e6)  # flushes come when the test says so
        self.daemon = Daemon()
        self.daemon.jobs = Stepped(self.daemon._job_event)
        self.rnd = random.Random(seed)
        self.drives: dict[str, Drive] = {}
        self.freezes: dict[str, str] = {}  # image -> disk that it is a copy of from `switched` on
        self.frozen: dict[str, bytes] = {}  # and its bytes
        self.went_on = False  # guests have gone on after the drain that ended an operation

    def open(self, name: str, path: Path, new: Path | None = None) -> Disk:
        """A disk, and the image that it is to be in at the end."""
        disk = self.daemon.open_disk(name, str(path))
        drive = self.drives[name] = Drive(name, disk, path)
        drive.new = str(new) if new is not None else drive.old
        return disk

    def disk(self, name: str = "vm") -> Disk:
        return self.daemon.graph.disk(name)

    def __enter__(self) -> World:
        for drive in self.drives.values():
            drive.flat = contents(self.disk(drive.name))
        self.log = Log(self.here, self.there)
        self.log.__enter__()
        for ending in ENDINGS:
            self._patch.setattr(ending, "approach", self._approaching(ending.approach))
            self._patch.setattr(ending, "parted", self._parting(ending.parted))
        for broken in BREAK:
            broken(self._patch)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        self.log.__exit__(*error)
        for job in self.daemon.jobs.all():
            job.clean()
        self.daemon.close()

    def _approaching(self, plain: Callable[[Any], None]) -> Callable[[Any], None]:
        """The last things before the drain are a guest's write, its flush, and a write."""

        def approach(ending: Any) -> None:
            plain(ending)
            self._write(*self.drives)
            self.flush()
            self._write(*self.drives)

        return approach

    def _parting(self, plain: Callable[[Any], None]) -> Callable[[Any], None]:
        """The first thing after the drain is a guest's write, and its flush."""

        def parted(ending: Any) -> None:
            if not self.went_on:
                self.went_on = True
                for path, name in self.freezes.items():
                    self.frozen[path] = bytes(contents(self.disk(name)))
                self.log.mark(("switched",), look=True)
                self.churn(2)
                self.flush()
            plain(ending)

        return parted

    # The guest -----------------------------------------------------------------------------

    def churn(self, steps: int, *names: str) -> None:
        """Requests to each disk, marked before they are sent and after a flush is answered."""
        for _ in range(steps):
            for name in names or self.drives:
                self._request(name)

    def _write(self, *names: str) -> None:
        for name in names:
            disk = self.disk(name)
            offset, data = self.rnd.randrange(disk.size - 9000), self.rnd.randbytes(9000)
            self.log.mark(("write", name, offset, data))
            disk.pwrite(memoryview(data), offset)

    def _request(self, name: str) -> None:
        disk, rnd = self.disk(name), self.rnd
        act = rnd.randrange(10)
        offset = rnd.randrange(disk.size - 1)
        length = min(rnd.choice([1, 512, 5000, 40_000]), disk.size - offset)
        if act < 6:
            data = rnd.randbytes(length)
            self.log.mark(("write", name, offset, data))
            disk.pwrite(memoryview(data), offset, fua=act == 5)
            if act == 5:
                self.log.mark(("flush", name))
        elif act == 6:
            self.log.mark(("write", name, offset, bytes(length)))
            disk.zero(offset, length, unmap=rnd.random() < 0.5)
        elif act == 7:
            offset = offset // 65536 * 65536
            length = min(65536, disk.size - offset)
            self.log.mark(("write", name, offset, bytes(length)))
            disk.discard(offset, length)
            kept = bytearray(length)  # where nothing can be given back, the bytes stay
            disk.pread(memoryview(kept), offset)
            if any(kept):
                self.log.mark(("write", name, offset, bytes(kept)))
        else:
            self.flush(name)

    def flush(self, *names: str) -> None:
        for name in names or self.drives:
            self.disk(name).flush()
            self.log.mark(("flush", name))

    # Operations ----------------------------------------------------------------------------

    def execute(self, command: str, **arguments: Any) -> Any:
        """A QMP command; underscores of the argument names are hyphens."""
        return self.daemon.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def now(self, command: str, **arguments: Any) -> None:
        """A command that does its work at once, such as a snapshot."""
        self.log.mark(("finish",), look=True)
        self.went_on = False
        self.execute(command, **arguments)
        self.log.mark(("done",), look=True)

    def ready(self, *jobs: Job) -> list[Iterator[Any]]:
        """Step jobs in turn, the guest writing in between, until each is ready or has no more."""
        work = [iter(job.run()) for job in jobs]
        waiting = list(zip(jobs, work, strict=True))
        while waiting:
            for pair in list(waiting):
                job, steps = pair
                step = next(steps, None)
                if step is None or (step.ready and job.status is Status.RUNNING):
                    waiting.remove(pair)
                    if step is not None:
                        job._ready()
                        self._note_ready(job)
                    continue
                assert step.error is None
                self.churn(1)
        return work

    def _note_ready(self, job: Job) -> None:
        """M2: the target holds all of the disk at this moment, durably."""
        assert isinstance(job, Mirror)
        if job.everything:
            mark = ("ready", job.target.filename, bytes(contents(job.disk)))
            self.log.mark(mark, look=True)

    def end(self, jobs: Sequence[Job], work: list[Iterator[Any]]) -> None:
        """The last steps of jobs that were told to complete, and their result, together."""
        for steps in work:
            for step in steps:
                assert step.error is None
                self.churn(1)
        self.churn(2)
        self.log.mark(("finish",), look=True)
        self.went_on = False
        finish(jobs)
        for job in jobs:
            job.clean()
            self.daemon.jobs._forget(job)
        self.log.mark(("done",), look=True)

    def call_off(self, job: Job, work: Iterator[Any]) -> None:
        """Cancelled: the generator is closed at a yield, and the job lets go."""
        work.close()  # type: ignore[attr-defined]
        job.clean()
        self.daemon.jobs._forget(job)
        self.log.mark(("done",), look=True)


class Judge:
    """Puts states of a log back where they were recorded, and looks at them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.folders = (world.here, world.there)
        self.there: dict[str, bytearray] = {}  # what lies in the folders now
        self.outcomes: set[bool] = set()  # moved or not, of the states between finish and switched
        self.oracles: dict[str, tuple[Oracle, int]] = {}  # and how many marks they have heard

    def put(self, state: State) -> None:
        for folder in self.folders:
            for left in folder.iterdir():
                if str(left) not in state.files:
                    left.unlink()
        for path, data in state.files.items():
            if self.there.get(path) != data:
                Path(path).write_bytes(data)
            put_attributes(Path(path), state.attributes[path])
        self.there = state.files

    def forget(self) -> None:
        """Somebody changed the files."""
        self.there = {}

    def look(self, state: State) -> dict[str, bytearray]:
        """Every rule that holds for every operation. Returns the bytes of each disk."""
        self.put(state)
        passed = {m[0] for m in state.marks}
        moved = set()
        found = {}
        for drive in self.world.drives.values():
            path, format = opening.current_image(drive.original)
            allowed = (drive.old, drive.new, *drive.between)
            assert path in allowed, f"'{path}' is current"
            if drive.old != drive.new and not drive.between:
                moved.add(path == drive.new)
                if "switched" not in passed and "finish" not in passed:
                    assert path == drive.old, "moved before its time"
                if "switched" in passed or "done" in passed:
                    assert path == drive.new, "the disk was left behind"
            got = found[drive.name] = sound(path, format, state.what)
            wrong = self.oracle(state, drive).wrong(got)
            assert not wrong, f"disk '{drive.name}': {wrong}"
        assert len(moved) < 2, "one disk of the group moved, another did not"  # S4
        if "finish" in passed and "switched" not in passed:
            self.outcomes |= moved
        if state.marks and state.marks[-1][0] == "ready":  # M2: and nothing was written since
            _, path, want = state.marks[-1]
            if path in state.files:  # or somebody else made it, and not durably
                assert sound(path, None, state.what) == want, "ready, and it is not"
        if "switched" in passed:
            for path, want in self.world.frozen.items():
                assert sound(path, None, state.what) == want, f"'{path}' changed"
        return found

    def oracle(self, state: State, drive: Drive) -> Oracle:
        """What the guest of a disk may find. States come in order: only new marks are heard."""
        oracle, heard = self.oracles.get(drive.name, (Oracle(drive.flat), 0))
        for kind, *more in state.marks[heard:]:
            if kind == drive.until:
                self.oracles[drive.name] = oracle, len(self.world.log.entries)
                return oracle
            if more and more[0] == drive.name:
                hear(oracle, kind, *more[1:])
        self.oracles[drive.name] = oracle, max(heard, len(state.marks))
        return oracle

    def each(
        self,
        seed: int,
        samples: int = 3,
        count: int = 40,
        again: Again | None = None,
        also: Callable[[State], None] | None = None,
    ) -> int:
        """Judge about `count` moments of the log, and more where names change; how many states.

        `also` has more to say of each state. `again` starts the operation once more, in a daemon
        that was started after the crash, and waits for its end: that is tried now and then."""
        entries = self.world.log.entries
        if SOAK:
            samples, count = samples * 10, count * 40
        every = max(len(entries) // count, 1)
        number = 0
        for number, state in enumerate(states(self.world.log, seed, samples, every), 1):
            try:
                found = self.look(state)
                if also is not None:
                    also(state)
            except (AssertionError, OSError, CowferryError) as error:
                raise Wrong(f"{state.what}: {error}") from error
            if number % 100 == 1:
                self.ask_qemu()
            if again is not None and number % 40 == 1:
                self.start_again(state, found, again, number == 41 or SOAK)
        assert number
        return number

    def ask_qemu(self) -> None:
        """The same of every current image by somebody else: it is sound, leaks apart."""
        need("qemu-img")
        for drive in self.world.drives.values():
            path, format = opening.current_image(drive.original)
            if (format or format_of(path)) in OVERLAYS:
                done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
                assert done.returncode in (0, 3), done.stdout + done.stderr

    def start_again(
        self, state: State, found: dict[str, bytearray], again: Again, twice: bool
    ) -> None:
        """By the name that the disk had first; at the end it has the bytes that it has now.

        Nobody writes meanwhile, so with `twice`, the power fails once more at each moment of it,
        it has them then, too."""
        with Log(*self.folders) as log:
            daemon = Daemon()
            try:
                told = Told(daemon)
                for drive in self.world.drives.values():
                    daemon.open_disk(drive.name, drive.original)
                again(daemon, told)
                for drive in self.world.drives.values():
                    assert contents(daemon.graph.disk(drive.name)) == found[drive.name]
            finally:
                daemon.close()
                self.forget()
        self._unchanged(found, f"{state.what}, again")
        every = max(len(log.entries) // (200 if SOAK else 10), 1)
        for second in states(log, 1, 1, every) if twice else ():
            self.put(second)
            self._unchanged(found, f"{state.what}, and again {second.what}")
        self.forget()

    def _unchanged(self, found: dict[str, bytearray], what: str) -> None:
        for drive in self.world.drives.values():
            got = sound(*opening.current_image(drive.original), what)
            assert got == found[drive.name], f"{what}: the bytes differ"


def hear(oracle: Oracle, kind: str, *more: Any) -> None:
    """A mark of a guest's."""
    if kind == "write":
        oracle.write(*more)
    elif kind == "grow":
        oracle.grow(*more)
    elif kind == "grown":
        oracle.sizes = [*more]
    else:
        oracle.flush()


def sound(path: str, format: str | None, what: str) -> bytearray:
    """The bytes of an image and its chain; no layer of it has any corruption."""
    node = opening.open_image(path, format, read_only=True)
    try:
        for layer in chain(node):
            if isinstance(layer, (Qcow2, Qed)):
                result = layer.check()
                assert not result.corruptions, f"{what}: {layer.filename}: {result.messages[:3]}"
        return contents(node)
    finally:
        opening.close_chain(node)


# What disks are made of -----------------------------------------------------------------------


def a_disk(world: World, format: str, name: str = "vm", folder: Path | None = None) -> Path:
    """An image with random bytes in it: raw, or an overlay on such a one."""
    folder = folder or world.here
    make_base(folder, SIZE, seed=len(name))
    os.rename(folder / "base.raw", folder / f"{name}-base.raw")
    if format == "raw":
        return folder / f"{name}-base.raw"
    over = f"{name}.{format}"
    return overlay(folder, over, f"{name}-base.raw", "raw", SIZE, cluster_size=CLUSTER)


def fill(path: Path, seed: int) -> None:
    """Random bytes in a third of an image, here and there."""
    rnd = random.Random(seed)
    node = opening.open_image(str(path))
    try:
        for _ in range(12):
            at = rnd.randrange(node.size - 8000)
            node.pwrite(memoryview(rnd.randbytes(7000)), at)
        node.flush()
    finally:
        opening.close_chain(node)


def a_chain(
    world: World, *layers: str, base: str = "raw", base_size: int = SIZE, name: str = "base"
) -> tuple[Path, list[Path]]:
    """A base and overlays of those names, each with bytes of its own: the base, the overlays.

    Over a QED base the overlays are QED, too."""
    folder = world.here
    make_base(folder, base_size, seed=len(layers))
    below, format = folder / f"{name}.raw", "raw"
    (folder / "base.raw").rename(below)
    kind = "qed" if base == "qed" else "qcow2"
    if base != "raw":
        lower = folder / f"{name}.{base}"
        opening.create_image(str(lower), base, base_size, {"cluster_size": CLUSTER})
        node = opening.open_image(str(lower))
        node.pwrite(memoryview(below.read_bytes()), 0)
        opening.close_chain(node)
        below.unlink()
        below, format = lower, base
    bottom = below
    made = []
    for number, layer in enumerate(layers):
        over = overlay(folder, f"{layer}.{kind}", below.name, format, SIZE, cluster_size=CLUSTER)
        fill(over, number)
        made.append(over)
        below, format = over, kind
    return bottom, made


def the_job(world: World, id: str = "vm") -> Job:
    job = world.daemon.jobs.get(id)
    assert job is not None
    return job


def wait_over(told: Told, job: str = "vm") -> None:
    done = told.wait("BLOCK_JOB_COMPLETED", device=job)
    assert "error" not in done, done
