"""Groups: what the policy says happens to everybody, in whichever order they come.

Members that do nothing show who is finished by whom; mirrors of two disks show what becomes of
the disks."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import contents, make_base, overlay
from cowferry.block import moves
from cowferry.block.disk import Disk
from cowferry.block.lease import WRITABLE
from cowferry.block.moves import Move
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.jobs import group as groups
from cowferry.jobs.group import Group
from cowferry.jobs.job import Job, Jobs, Progress
from cowferry.jobs.mirror import Mirror
from cowferry.jobs.states import Status
from daemons import PATIENCE, Told, a_daemon
from orders import failing, on_call, until

SIZE = 1 << 20
POLICIES = groups.POLICIES


@pytest.fixture(autouse=True)
def _short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "TICK", 0.005)


class Member(Job):
    """Its work is over as soon as `free` is set, and it logs what is made of it."""

    type = "stream"

    def __init__(self, free: bool = True, ready: bool = False, **more: Any) -> None:
        super().__init__(length=1, **more)
        self.free = threading.Event()
        if free:
            self.free.set()
        self.ready = ready  # it converges, and goes on until it is told to complete
        self.log: list[str] = []

    def run(self) -> Iterator[Progress]:
        self.log.append("run")
        while not self.free.is_set():
            yield Progress(idle=0.001)
        while self.ready and not self.completing:
            yield Progress(ready=True, idle=0.001)
        yield Progress(done=1)

    def settle(self) -> None:
        self.log.append("settle")

    def unsettle(self) -> None:
        self.log.append("unsettle")

    def switch(self) -> None:
        self.log.append("switch")

    def clean(self) -> None:
        self.log.append("clean")


class Patient(Member):
    """Whoever calls it off is slow: it acts first, if anything lets it."""

    slow = False

    def cancel(self, force: bool = True) -> None:
        if self.slow:
            assert self.wait(PATIENCE)
        super().cancel(force)


class Heard:
    """A group's jobs, and every event of theirs and its own, in order."""

    def __init__(self, policy: str) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.jobs = Jobs(self._emit)
        self.group = Group("g", policy, emit=self._emit, gone=self.jobs.forget_group)
        self.jobs.add_group(self.group)

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def start(self, **members: Job) -> None:
        for name, job in members.items():
            self.group.add(job)
            self.jobs.start(job, name)
        self.group.open()

    def over(self) -> dict[str, Any]:
        """What the group's last event said."""
        until(lambda: self.count("JOB_GROUP_COMPLETED"), "the end of the group")
        for job in self.group.members:
            assert job.wait(PATIENCE)
        assert self.count("JOB_GROUP_COMPLETED") == 1
        assert not self.jobs.groups
        return next(data for name, data in self.events if name == "JOB_GROUP_COMPLETED")

    def count(self, name: str) -> int:
        return [n for n, _ in self.events].count(name)


# Called off ---------------------------------------------------------------------------------------


def test_all_nobody_goes_on_when_one_is_called_off_while_the_others_wait_for_its_work() -> None:
    heard = Heard("all")
    a, b, c = Patient(), Patient(), Member(free=False)
    heard.start(a=a, b=b, c=c)
    until(lambda: heard.group.arrived >= {a, b}, "a and b have done their work")
    a.slow = b.slow = True
    c.cancel()
    assert heard.over() == {"id": "g", "members": ["a", "b", "c"], "cancelled": True}
    assert [j.log for j in (a, b, c)] == [["run", "clean"]] * 3
    assert all(j.cancelled for j in (a, b, c))


def test_all_nobody_goes_on_when_one_is_called_off_while_the_others_are_to_finish() -> None:
    heard = Heard("all")
    a, b, c = Patient(), Patient(), Member(auto_finalize=False)
    heard.start(a=a, b=b, c=c)
    until(lambda: heard.group.finishing >= {a, b}, "a and b wait to be finished")
    until(lambda: c.status is Status.PENDING, "c is pending")
    a.slow = b.slow = True
    c.cancel()
    assert heard.over()["cancelled"]
    assert [j.log for j in (a, b, c)] == [["run", "clean"]] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_was_called_off_is_finished_by_nobody(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread has raised, and the group has not been told yet: the other comes to finish."""
    heard = Heard(policy)
    a, b = Member(), Member(auto_finalize=False)
    raised, go = threading.Event(), threading.Event()

    def preempted() -> None:
        raised.set()
        assert go.wait(PATIENCE)

    on_call(monkeypatch, heard.group, "failed", preempted)
    heard.start(a=a, b=b)
    until(lambda: a in heard.group.finishing, "a waits to be finished")
    until(lambda: b.status is Status.PENDING, "b is pending")
    a.cancel()
    assert raised.wait(PATIENCE)
    b.finalize()
    assert b.wait(PATIENCE)
    go.set()
    assert heard.over()["cancelled"]
    assert a.log == ["run", "clean"] and a.cancelled
    alone = ["run", "settle", "switch", "clean"]
    assert b.log == (alone if policy == "each" else ["run", "clean"])


def test_when_one_cannot_be_created_the_others_have_not_begun() -> None:
    """As in QEMU, where a job that never started has no event but those of its states."""
    heard = Heard("all")
    a, b = Member(), Member()
    for name, job in (("a", a), ("b", b)):
        heard.group.add(job)
        heard.jobs.start(job, name)
    heard.group.add(Member())  # and now it turns out that it cannot
    heard.group.withdraw()
    for job in (a, b):
        assert job.thread is None and job.log == ["clean"] and job.status is Status.NULL
    assert {name for name, _ in heard.events} == {"JOB_STATUS_CHANGE"}
    states = [d["status"] for _, d in heard.events if d["id"] == "a"]
    assert states == ["created", "aborting", "concluded", "null"]
    heard.jobs.check_id("g")
    heard.jobs.check_id("a")


# Failing at the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_cannot_settle(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(policy)
    a, b, c = Member(), Member(), Member()
    on_call(monkeypatch, b, "settle", failing(errno.EIO))
    heard.start(a=a, b=b, c=c)
    error = heard.over()["error"]
    assert b.log == ["run", "unsettle", "clean"]
    if policy == "each":
        assert error == "b: Input/output error"
        assert a.log == c.log == ["run", "settle", "switch", "clean"]
        assert not (a.error or c.error)
    else:
        assert a.log == ["run", "settle", "unsettle", "clean"]
        assert c.log == ["run", "clean"]
        assert all(j.error and "could not finish" in j.error for j in (a, b, c))


class Pair:
    """Two disks, and a mirror of each, in one group."""

    def __init__(self, folder: Path, policy: str) -> None:
        self.heard = Heard(policy)
        self.disks = [self._disk(folder, name) for name in ("one", "two")]
        self.sources = [d.root for d in self.disks]
        self.targets = [
            opening.open_image(str(_empty(folder / f"{d.name}-new.raw"))) for d in self.disks
        ]
        self.jobs = [self._mirror(n) for n in range(2)]
        self.heard.start(one=self.jobs[0], two=self.jobs[1])
        until(lambda: self.heard.count("JOB_GROUP_READY"), "both are ready")

    @staticmethod
    def _disk(folder: Path, name: str) -> Disk:
        disk = Disk(opening.open_image(str(_empty(folder / f"{name}.raw"))), name)
        disk.pwrite(memoryview(name.encode() * 100), 0)
        return disk

    def _mirror(self, n: int) -> Mirror:
        disk, target = self.disks[n], self.targets[n]
        old = disk.root.filename
        return Mirror(disk, target, move=lambda: [Move(disk.name, old, target.filename, "raw")])

    def moved(self) -> list[bool]:
        """Of each disk; in memory and by the records, which agree."""
        now = [d.root is t for d, t in zip(self.disks, self.targets, strict=True)]
        for disk, source in zip(self.disks, self.sources, strict=True):
            assert moves.follow(source.filename).path == disk.root.filename
        return now

    def judge(self) -> None:
        """Wherever they are, the disks are as ever."""
        for disk in self.disks:
            assert contents(disk)[: 3 * 100] == disk.name.encode() * 100
            assert not disk.taps and not disk.bitmaps and not disk.read_only
            disk.pwrite(memoryview(b"x" * 512), 4096)
            assert disk._leased(4096, 4096 + 512, WRITABLE) is not None

    def close(self) -> None:
        for node in (*self.sources, *self.targets):
            node.close()


def _empty(path: Path) -> Path:
    opening.create_image(str(path), "raw", SIZE, {})
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[[str], Pair]]:
    made: list[Pair] = []

    def make(policy: str) -> Pair:
        made.append(Pair(tmp_path, policy))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("step", ["approach", "settle"])
@pytest.mark.parametrize("policy", POLICIES)
def test_S4_one_mirror_of_two_cannot_pivot(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, policy: str, step: str
) -> None:
    """With `each` the other disk moves; with `all` neither does, and no record says so."""
    both = pair(policy)
    on_call(monkeypatch, both.jobs[1], step, failing(errno.EIO))
    both.heard.group.complete()
    error = both.heard.over()["error"]
    assert "two: " in error and ("one: " in error) == (policy == "all")
    assert both.moved() == [policy == "each", False]
    both.judge()


@pytest.mark.parametrize("policy", POLICIES)
def test_S4_when_the_records_cannot_be_made_neither_disk_moves(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    both = pair(policy)
    on_call(monkeypatch, moves, "record", failing(errno.ENOSPC))
    both.heard.group.complete()
    assert "No space left" in both.heard.over()["error"]
    assert both.moved() == [False, False]
    both.judge()


@pytest.mark.parametrize("policy", POLICIES)
def test_S4_two_mirrors_pivot_together(pair: Callable[[str], Pair], policy: str) -> None:
    both = pair(policy)
    both.heard.group.complete()
    assert both.heard.over() == {"id": "g", "members": ["one", "two"]}
    assert both.moved() == [True, True]
    both.judge()


# Ready --------------------------------------------------------------------------------------------


def test_a_group_is_ready_when_the_last_is_and_no_member_is_completed_alone() -> None:
    heard = Heard("all")
    a, b = Member(ready=True), Member(free=False, ready=True)
    heard.start(a=a, b=b)
    until(lambda: a.status is Status.READY, "a is ready")
    assert not heard.count("JOB_GROUP_READY")
    with pytest.raises(CowferryError, match="not ready"):
        heard.group.complete()
    with pytest.raises(CowferryError, match="member of group 'g'"):
        a.complete()
    b.free.set()
    until(lambda: heard.count("JOB_GROUP_READY"), "the group is ready")
    heard.group.complete()
    assert "error" not in heard.over()
    assert heard.count("JOB_GROUP_READY") == 1
    assert "switch" in a.log and "switch" in b.log


def test_each_the_rest_is_ready_without_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard("each")
    a, b = Member(ready=True), Member(free=False, ready=True)
    heard.start(a=a, b=b)
    until(lambda: a.status is Status.READY, "a is ready")
    b.cancel()
    until(lambda: heard.count("JOB_GROUP_READY"), "the group is ready without b")
    heard.group.complete()
    heard.over()
    assert heard.count("JOB_GROUP_READY") == 1
    assert "switch" in a.log and "switch" not in b.log


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with a_daemon() as daemon:
        yield daemon


def test_a_group_of_streams_is_ready_once_before_any_of_them_ends(
    daemon: Daemon, tmp_path: Path
) -> None:
    """A stream has no moment of its own at which it is ready: it is when all have done the work."""
    told = Told(daemon)
    make_base(tmp_path, SIZE)
    for name in ("one", "two", "three"):
        path = overlay(tmp_path, f"{name}.qcow2", "base.raw", "raw", SIZE)
        daemon.open_disk(name, str(path), "qcow2")
    members = [{"device": name} for name in ("one", "two", "three")]
    daemon.execute("x-group-start", {"id": "g", "type": "stream", "members": members})
    done = told.wait("JOB_GROUP_COMPLETED", id="g")
    assert done == {"id": "g", "members": ["g-one", "g-two", "g-three"]}
    names = [n for n, _ in told.seen if n in ("JOB_GROUP_READY", "BLOCK_JOB_COMPLETED")]
    assert names == ["JOB_GROUP_READY"] + ["BLOCK_JOB_COMPLETED"] * 3
    for name in ("one", "two", "three"):
        assert daemon.graph.disk(name).root.backing is None
