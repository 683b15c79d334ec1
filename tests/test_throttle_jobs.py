"""Every kind of job keeps to its `speed`, as commands give it and change it.

The jobs are stepped by hand, on a clock that moves by what each step has to wait: the time that a
job would take at an infinitely fast machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cowferry.block.node import chain
from cowferry.block.throttle import Throttle
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceNotActive
from cowferry.jobs.job import Job
from cowferry.jobs.states import Status
from daemons import Told

SIZE = 8 << 20
SPEED = 2 << 20
LAYERS = ["base.raw", "sn1.qcow2", "vm.qcow2"]


class Paced:
    """A daemon whose jobs begin when they are stepped."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder = folder
        self.daemon = daemon
        self.now = 0.0
        self.longest = 0.0  # seconds between two steps
        (folder / LAYERS[0]).write_bytes(random.Random(1).randbytes(SIZE))
        below = LAYERS[0]
        for name in LAYERS[1:]:
            kind = below.rsplit(".", 1)[1]
            opening.create_image(
                str(folder / name), "qcow2", SIZE, {"backing_file": below, "backing_fmt": kind}
            )
            below = name
        for name in ("new", "other"):
            opening.create_image(str(folder / f"{name}.qcow2"), "qcow2", SIZE, {})

    def open(self, filled: str | None) -> None:
        """The disk vm, with all of it written in one more layer."""
        if filled is not None:
            node = opening.open_image(str(self.folder / filled))
            node.pwrite(memoryview(random.Random(2).randbytes(SIZE)), 0)
            opening.close_chain(node)
        self.disk = self.daemon.open_disk("vm", str(self.folder / LAYERS[-1]))
        file = {"driver": "file", "filename": str(self.folder / "new.qcow2")}
        self.daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "new", "file": file})

    def start(self, command: str, **arguments: Any) -> Job:
        given = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.daemon.execute(
            command, {"device": "vm", "job-id": "j", "auto-dismiss": False, **given}
        )
        job = self.daemon.jobs.get("j")
        assert job is not None
        return job

    def steps(self, job: Job) -> Iterator[int]:
        """Bytes moved in each step, until the job has copied all there is."""
        throttle = Throttle(job.throttle.speed, lambda: self.now)
        job.throttle = throttle
        work = job.run()
        try:
            for step in work:
                delay = throttle.charge(step.moved)
                self.now += delay
                self.longest = max(self.longest, delay)
                yield step.moved
                if step.ready:
                    return
        finally:
            work.close()  # type: ignore[attr-defined]

    def finish(self, job: Job) -> None:
        job.clean()
        job.status = Status.CONCLUDED
        job.dismiss()


@pytest.fixture
def paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paced]:
    def begin(self: Job) -> None:
        self.status = Status.RUNNING

    monkeypatch.setattr(Job, "start", begin)
    daemon = Daemon()
    try:
        yield Paced(tmp_path, daemon)
    finally:
        daemon.close()


Begin = Callable[[Paced, int], Job]

JOBS: dict[str, tuple[str | None, Begin]] = {
    "stream": (None, lambda p, speed: p.start("block-stream", speed=speed)),
    "commit": (
        LAYERS[1],
        lambda p, speed: p.start("block-commit", top=str(p.folder / LAYERS[1]), speed=speed),
    ),
    "active commit": (LAYERS[2], lambda p, speed: p.start("block-commit", speed=speed)),
    "mirror": (
        None, lambda p, speed: p.start("blockdev-mirror", target="new", sync="full", speed=speed)
    ),
    "blocking mirror": (
        None,
        lambda p, speed: p.start(
            "blockdev-mirror", target="new", sync="full", copy_mode="write-blocking", speed=speed
        ),
    ),
    "drive-mirror": (
        None,
        lambda p, speed: p.start(
            "drive-mirror", target=str(p.folder / "x.raw"), format="raw", sync="full", speed=speed
        ),
    ),
    "backup": (
        None, lambda p, speed: p.start("blockdev-backup", target="new", sync="full", speed=speed)
    ),
}  # fmt: skip
KINDS = list(JOBS)


@pytest.mark.parametrize("name", KINDS)
def test_a_job_takes_as_long_as_its_speed_says(paced: Paced, name: str) -> None:
    filled, begin = JOBS[name]
    paced.open(filled)
    job = begin(paced, SPEED)
    moved = sum(paced.steps(job))
    assert moved == SIZE
    assert paced.now == pytest.approx(SIZE / SPEED, rel=0.05)
    assert paced.longest <= 0.3, "in small steps, so that a change is felt soon"
    paced.finish(job)


@pytest.mark.parametrize("name", KINDS)
def test_a_speed_that_is_changed_counts_from_then_on(paced: Paced, name: str) -> None:
    filled, begin = JOBS[name]
    paced.open(filled)
    job = begin(paced, 0)
    moved, changed = 0, 0
    for step in paced.steps(job):
        moved += step
        if not changed:
            assert paced.now == 0.0
            paced.daemon.execute("block-job-set-speed", {"device": "j", "speed": SPEED})
            changed = 1
            first = moved
        elif changed == 1 and moved >= SIZE * 3 // 4:
            paced.daemon.execute("block-job-set-speed", {"device": "j", "speed": 8 * SPEED})
            changed, second, half = 2, moved, paced.now
    if not changed or first >= SIZE // 2:
        pytest.fail(f"{first} bytes were moved in one step: no speed can act on that")
    assert half == pytest.approx((second - first) / SPEED, rel=0.1)
    assert paced.now - half == pytest.approx((SIZE - second) / (8 * SPEED), rel=0.15)
    paced.finish(job)


@pytest.mark.parametrize("speed", [1, 1000])
@pytest.mark.parametrize("name", KINDS)
def test_a_speed_below_a_cluster_is_kept_to_as_well(paced: Paced, name: str, speed: int) -> None:
    """What cannot be split is moved, and paid for."""
    filled, begin = JOBS[name]
    paced.open(filled)
    job = begin(paced, speed)
    moved = 0
    for step in paced.steps(job):
        moved += step
        if moved >= 256 << 10:
            break
    assert paced.now == pytest.approx(moved / speed, rel=0.01)
    paced.finish(job)


def test_a_speed_that_cannot_take_effect_is_an_error(paced: Paced) -> None:
    paced.open(None)
    negative = "Parameter 'speed' expects a non-negative value"
    for name in KINDS:
        with pytest.raises(CowferryError) as error:
            JOBS[name][1](paced, -1)
        assert error.value.desc == negative, name
        with pytest.raises(CowferryError, match="Invalid parameter type for 'speed', expected"):
            JOBS[name][1](paced, 1 << 63)
        with pytest.raises(CowferryError, match="Invalid parameter type for 'speed', expected"):
            JOBS[name][1](paced, True)
    # It copies what guests are about to overwrite, whenever they do: a speed would change nothing.
    useless = "Parameter 'speed' has no effect"
    backup = {"target": "new", "sync": "none"}
    with pytest.raises(CowferryError, match=useless):
        paced.start("blockdev-backup", **backup, speed=5)
    job = paced.start("blockdev-backup", **backup)
    change = "block-job-set-speed"
    with pytest.raises(CowferryError, match=useless):
        paced.daemon.execute(change, {"device": "j", "speed": 5})
    paced.daemon.execute(change, {"device": "j", "speed": 0})
    with pytest.raises(CowferryError, match=negative):
        paced.daemon.execute(change, {"device": "j", "speed": -5})
    with pytest.raises(CowferryError, match="Invalid parameter type for 'speed', expected"):
        paced.daemon.execute(change, {"device": "j", "speed": 1 << 63})
    job.status = Status.PENDING
    with pytest.raises(CowferryError, match="cannot accept command verb 'set-speed'"):
        paced.daemon.execute(change, {"device": "j", "speed": 0})
    with pytest.raises(DeviceNotActive):
        paced.daemon.execute(change, {"device": "nope", "speed": 5})
    paced.finish(job)
    made = {"driver": "qcow2", "filename": str(paced.folder / "made.qcow2"), "size": SIZE}
    paced.daemon.execute("blockdev-create", {"job-id": "c", "options": made})
    with pytest.raises(DeviceNotActive, match="Block job 'c' not found"):  # it has no speed
        paced.daemon.execute(change, {"device": "c", "speed": 5})
    assert len(list(chain(paced.disk.root))) == 3


def test_a_backup_keeps_to_the_limits_of_its_target(tmp_path: Path) -> None:
    """By the filter over it; what the job writes passes the turnstiles of the disk over that."""
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    source.write_bytes(bytes(range(256)) * (SIZE // 256))
    target.write_bytes(bytes(SIZE))
    passed: list[int] = []
    daemon = Daemon()
    try:
        daemon.open_disk("vm", str(source))
        limits = {"bps-total": 1 << 40}
        daemon.execute("object-add", {"qom-type": "throttle-group", "id": "g", "limits": limits})
        file = {"driver": "raw", "file": {"driver": "file", "filename": str(target)}}
        daemon.execute(
            "blockdev-add",
            {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": file},
        )
        disk = daemon.graph.disk("t")
        assert disk.limits is not None
        wait = disk.wait

        def counted(way: int, length: int, *more: Any) -> None:
            passed.append(length)
            wait(way, length, *more)

        setattr(disk, "wait", counted)  # noqa: B010
        told = Told(daemon)
        daemon.execute("blockdev-backup", {"device": "vm", "target": "t", "sync": "full"})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED")
        assert sum(passed) == SIZE, "all of it"
        with pytest.raises(CowferryError, match="Filters cannot be used as targets"):
            daemon.execute("blockdev-backup", {"device": "vm", "target": "t", "sync": "none"})
    finally:
        daemon.close()
    assert target.read_bytes() == source.read_bytes()
