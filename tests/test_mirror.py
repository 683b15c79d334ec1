"""The mirror's rules, M1 to M4, stepped by hand: the guest writes between any two steps.

Where two threads have to meet, the order in which they do is fixed by events."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chains import contents, differs, overlay
from cowferry.block import sysio
from cowferry.block.copy import Copier
from cowferry.block.disk import Disk
from cowferry.block.lease import WRITABLE
from cowferry.block.node import Node
from cowferry.drivers import opening
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.jobs import job as jobs
from cowferry.jobs import mirror
from cowferry.jobs.commit import ActiveCommit, Into
from cowferry.jobs.job import Jobs
from cowferry.jobs.mirror import CLOSE, Mirror
from cowferry.jobs.states import Status
from daemons import PATIENCE
from orders import Other, Unflushed, failing, held_back, on_call, until

KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512
ODD = 5 * MIB // 2 + 3 * SECTOR  # ends inside a granule of everything but sectors
BACKGROUND, BLOCKING = mirror.MODES


class Image(NamedTuple):
    """One side of a copy; `cluster` of a qcow2 image, 0 for a raw one."""

    cluster: int

    def make(self, folder: Path, name: str, size: int) -> Node:
        kind = "qcow2" if self.cluster else "raw"
        path = folder / f"{name}.{kind}"
        options = {"cluster_size": self.cluster} if self.cluster else {}
        opening.create_image(str(path), kind, size, options)
        return opening.open_image(str(path))


RAW = Image(0)


class Copy:
    """A disk, a target, and the job between them, which nobody runs."""

    def __init__(
        self,
        folder: Path,
        source: Image = RAW,
        target: Image = RAW,
        size: int = 4 * MIB,
        filled: bool = True,
        **options: Any,
    ) -> None:
        self.source = source.make(folder, "vm", size)
        self.target = target.make(folder, "new", size)
        self.disk = Disk(self.source, "vm")
        self.random = random.Random(4)
        self.oracle = bytearray(size)
        if filled:
            self.write(0, size * 3 // 4)
        self.job = Mirror(self.disk, self.target, **options)
        self.steps = self.job.run()
        self.job.status = Status.RUNNING  # the verbs may come

    def write(self, offset: int, length: int) -> None:
        data = self.random.randbytes(length)
        self.disk.pwrite(memoryview(data), offset)
        self.oracle[offset : offset + length] = data

    def zero(self, offset: int, length: int) -> None:
        self.disk.zero(offset, length, unmap=self.random.random() < 0.5)
        self.oracle[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.disk.discard(offset, length)
        part = bytearray(length)
        self.disk.pread(memoryview(part), offset)
        self.oracle[offset : offset + length] = part

    def anything(self) -> None:
        """What a guest does: anywhere, aligned or not."""
        do = self.random.choice([self.write, self.write, self.zero, self.discard])
        length = self.random.choice([SECTOR, 5000, 64 * KIB, 300 * KIB])
        do(self.random.randrange(self.disk.size - length), length)

    def until_ready(self) -> None:
        while not next(self.steps).ready:
            pass

    def end(self) -> None:
        """Complete and pivot."""
        self.job.completing = True
        for _ in self.steps:
            pass
        self.job.prepare()
        self.job.clean()

    def behind(self) -> list[int]:
        """Sectors that differ on the target though no bit says so (M1)."""
        here, there = contents(self.source), contents(self.target)
        if here == there:
            return []
        bits, granularity = self.job.dirty.bits, self.job.granularity
        return [
            at
            for at in range(0, len(here), SECTOR)
            if here[at : at + SECTOR] != there[at : at + SECTOR] and not bits[at // granularity]
        ]

    def close(self) -> None:
        self.source.close()
        self.target.close()


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Callable[..., Copy]]:
    """`Copy`, closed afterwards."""
    made: list[Copy] = []

    def make(**options: Any) -> Copy:
        made.append(Copy(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks stay small, whatever time they take."""
    monkeypatch.setattr(mirror, "MIN_CHUNK", 256 * KIB)
    monkeypatch.setattr(mirror, "STEP", 0.0)


class Started:
    """A job that runs by itself, and what was heard of it."""

    def __init__(self, job: Mirror) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.hears: Callable[[str], object] = lambda name: None
        self.job = job
        job.status = Status.UNDEFINED
        Jobs(self._heard).start(job, "copy")

    def _heard(self, name: str, data: dict[str, Any]) -> None:
        self.hears(name)
        self.events.append((name, data))

    def until_ready(self) -> None:
        until(lambda: self.job.status is Status.READY, "ready")


# M1: at every pause, what differs is dirty -----------------------------------------------------


GRANULES = [
    (RAW, RAW, None),
    (RAW, Image(64 * KIB), 4 * KIB),
    (Image(4 * KIB), Image(2 * MIB), None),
    (Image(2 * MIB), Image(4 * KIB), SECTOR),
    (Image(SECTOR), Image(64 * KIB), MIB),
    (Image(64 * KIB), RAW, None),
]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("modes", [(BACKGROUND,), (BLOCKING,), (BACKGROUND, BLOCKING)])
@pytest.mark.parametrize(("source", "target", "granularity"), GRANULES)
def test_M1_what_differs_between_two_steps_is_dirty(
    copy: Callable[..., Copy],
    source: Image,
    target: Image,
    granularity: int | None,
    modes: tuple[str, ...],
) -> None:
    """Whatever the granules of the three, in both modes and while they are switched."""
    one = copy(source=source, target=target, granularity=granularity, size=ODD, copy_mode=modes[0])
    ready = False
    for n in range(20):
        for _ in range(one.random.randrange(3)):
            one.anything()
        one.job.change(modes[n // 4 % len(modes)])
        step = next(one.steps)
        if step.ready:
            ready = True
            assert one.job.dirty.count() == 0
        assert not one.behind()
    if not ready:
        one.until_ready()
    one.anything()
    one.end()
    assert one.disk.root is one.target
    assert not differs(contents(one.target), one.oracle)


def test_M1_a_write_into_the_chunk_that_is_being_copied_is_dirty(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, beside the copy, and after that has read the bytes."""
    one = copy()
    next(one.steps)  # the first bits
    real = one.job.copier.place

    def placed(*args: Any) -> None:
        real(*args)
        Other(lambda: one.write(64 * KIB, SECTOR)).end()

    monkeypatch.setattr(one.job.copier, "place", placed)
    next(one.steps)
    assert contents(one.source) != contents(one.target) and not one.behind()
    monkeypatch.undo()
    one.until_ready()
    assert not differs(contents(one.target), one.oracle)


@pytest.mark.parametrize("verb", ["write", "zero", "discard"])
def test_M1_a_guest_s_change_that_fails_halfway_on_the_source_is_dirty(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """In write-blocking mode nothing else would say that the two differ."""
    one = copy(source=Image(SECTOR), size=MIB, copy_mode=BLOCKING)
    one.until_ready()
    assert one.job.dirty.count() == 0
    inner = "_write_part" if verb == "write" else "_zero_clusters"
    on_call(monkeypatch, one.source, inner, failing(errno.EIO), nth=2)
    with pytest.raises(OSError, match="Input/output"):
        getattr(one, verb)(64 * KIB, 96 * KIB)
    assert contents(one.source) != contents(one.target), "the first half has happened"
    assert not one.behind()
    next(one.steps)
    one.end()
    assert not differs(contents(one.target), contents(one.source))


# M2: ready means that no bit is set, and that the target is flushed ------------------------------


@pytest.mark.parametrize("mode", mirror.MODES)
@pytest.mark.parametrize("target", [RAW, Image(64 * KIB)])
@pytest.mark.parametrize("busy", [False, True])
def test_M2_ready_means_that_nothing_is_dirty_and_all_is_flushed(
    copy: Callable[..., Copy], target: Image, mode: str, busy: bool
) -> None:
    """Busy: there is always something left for the short drain."""
    one = copy(target=target, copy_mode=mode)
    with Unflushed() as unflushed:
        while not next(one.steps).ready:
            if busy:
                one.write(one.random.randrange(one.disk.size - SECTOR), SECTOR)
        assert one.job.dirty.count() == 0
        assert not one.target.unflushed
        assert not unflushed.has(one.target.filename)
        assert not differs(contents(one.target), one.oracle)


def test_M2_the_last_drain_is_short_though_the_target_flushes_slowly(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a guest writes while the target is flushed is copied with the guest running: it is
    what the target does not have at the moment that ready speaks of."""
    one = copy(size=16 * MIB, filled=False)
    drained: list[int] = []

    def slow() -> None:
        for at in range(0, 3 * CLOSE, MIB):
            one.write(at, MIB)

    on_call(monkeypatch, one.target, "flush", slow)
    for nth in range(1, 5):
        on_call(
            monkeypatch, one.job, "_copy_all", lambda: drained.append(one.job.dirty.count()), nth
        )
    while not next(one.steps).ready:
        one.write(15 * MIB, SECTOR)
    assert drained and max(drained) <= CLOSE
    assert not one.behind()
    one.end()
    assert not differs(contents(one.target), one.oracle)


def test_M2_little_is_left_for_the_drain_of_the_pivot(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as a guest may write while the job is pending, and while the target is flushed."""
    one = copy(size=16 * MIB, filled=False)
    one.until_ready()
    one.job.completing = True
    for _ in one.steps:
        pass
    one.write(0, 3 * CLOSE)
    drained: list[int] = []
    on_call(monkeypatch, one.target, "flush", lambda: one.write(CLOSE, 2 * CLOSE))
    on_call(monkeypatch, one.job, "_copy_all", lambda: drained.append(one.job.dirty.count()))
    one.job.prepare()
    assert len(drained) == 1 and drained[0] <= CLOSE
    assert one.disk.root is one.target
    assert not differs(contents(one.target), one.oracle)


# M3: write-blocking: both sides have it, or it is dirty and told ---------------------------------


@pytest.mark.parametrize(("source", "target", "granularity"), GRANULES)
def test_M3_a_guest_s_change_is_on_both_sides_when_it_is_answered(
    copy: Callable[..., Copy], source: Image, target: Image, granularity: int | None
) -> None:
    one = copy(
        source=source, target=target, granularity=granularity, size=3 * MIB, copy_mode=BLOCKING
    )
    one.until_ready()
    for _ in range(12):
        one.anything()
        assert one.job.dirty.count() == 0
        assert not differs(contents(one.target), one.oracle)


@pytest.mark.parametrize("policy", ["report", "stop", "ignore", "enospc"])
def test_M3_what_the_target_refuses_is_dirty_and_told(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """The guest's write is good all the same: the source is the disk."""
    one = copy(copy_mode=BLOCKING, on_target_error=policy)
    one.until_ready()
    told: list[dict[str, Any]] = []
    one.job._emit = lambda name, data: told.append(data) if name == "BLOCK_JOB_ERROR" else None
    on_call(monkeypatch, one.target, "pwrite", failing(errno.ENOSPC))
    one.write(64 * KIB, 100 * KIB)
    assert not differs(contents(one.disk), one.oracle)
    assert one.job.dirty.count() and not one.behind()
    if policy == "report":
        with pytest.raises(OSError, match="No space"):
            next(one.steps)
    else:
        step = next(one.steps)
        assert (step.error is not None) == (policy in ("stop", "enospc"))
        one.job.ignored = None
        one.end()
        assert not differs(contents(one.target), one.oracle)
    action = "stop" if policy == "enospc" else policy
    assert told == [{"device": "", "operation": "write", "action": action}]


def meeting(
    patch: pytest.MonkeyPatch, job: Mirror, target: Qcow2, second: Callable[[], None]
) -> list[Other]:
    """As soon as the first writes to the target, in room that is not linked yet, the second comes,
    and the first goes on when that one is writing, too, or has to wait."""
    met = threading.Event()
    others: list[Other] = []

    def meet() -> None:
        others.append(Other(second))
        assert met.wait(PATIENCE)

    held_back(patch, job._target_gate, met)
    on_call(patch, target.data, "pwrite", meet, nth=1)
    on_call(patch, target.data, "pwrite", met.set, nth=2)
    return others


def test_M3_two_writes_that_are_apart_on_the_disk_meet_in_one_cluster_of_the_target(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = copy(source=Image(64 * KIB), target=Image(2 * MIB), filled=False, copy_mode=BLOCKING)
    one.until_ready()
    assert isinstance(one.target, Qcow2)
    others = meeting(monkeypatch, one.job, one.target, lambda: one.write(64 * KIB, 64 * KIB))
    one.write(0, 64 * KIB)
    others[0].end()
    assert one.job.dirty.count() == 0
    assert not differs(contents(one.target), one.oracle)


def test_M1_what_is_being_copied_and_a_write_meet_in_one_cluster_of_the_target(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target has nothing there yet: each of them would make a cluster of its own."""
    one = copy(source=Image(64 * KIB), target=Image(2 * MIB), filled=False)
    assert isinstance(one.target, Qcow2)
    one.until_ready()
    one.write(0, 64 * KIB)
    one.job.change(BLOCKING)
    others = meeting(monkeypatch, one.job, one.target, lambda: one.write(64 * KIB, 64 * KIB))
    next(one.steps)
    others[0].end()
    assert one.job.dirty.count() == 0
    assert not differs(contents(one.target), one.oracle)


def test_M1_a_commit_s_base_has_larger_clusters_than_the_layer_that_the_guest_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * MIB
    Image(2 * MIB).make(tmp_path, "base", size).close()
    path = overlay(tmp_path, "vm.qcow2", "base.qcow2", "qcow2", size)
    root = opening.open_image(str(path))
    base = root.backing
    assert isinstance(base, Qcow2)
    disk = Disk(root, "vm")
    job = ActiveCommit(disk, Into(root, base, [], size), copy_mode=BLOCKING)
    steps = job.run()
    while not next(steps).ready:
        pass
    first, second = (memoryview(bytes([n]) * (64 * KIB)) for n in (1, 2))
    others = meeting(monkeypatch, job, base, lambda: disk.pwrite(second, 64 * KIB))
    disk.pwrite(first, 0)
    others[0].end()
    want = contents(root)
    job.completing = True
    for _ in steps:
        pass
    job.prepare()
    assert disk.root is base
    assert not differs(contents(base), want)
    root.close()
    base.close()


def test_M1_a_guest_s_zeroes_and_a_chunk_share_no_buffer(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two file systems all goes through memory; a raw target's zeroes may, too."""

    def apart(*_: Any) -> None:
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(sysio, "clone", apart)
    monkeypatch.setattr(sysio, "copy_range", apart)
    one = copy(size=8 * MIB, copy_mode=BLOCKING)
    next(one.steps)  # the first bits

    def guest() -> None:
        """It comes when the chunk has been read, and is not written yet."""

        def changes() -> None:
            one.discard(5 * MIB + SECTOR, 100)  # too little for a hole: the source is as it was
            one.zero(7 * MIB + 100, 70_000)

        Other(changes).end()

    on_call(monkeypatch, sysio, "pwrite", guest)
    next(one.steps)
    monkeypatch.undo()
    assert not one.behind()
    one.until_ready()
    assert not differs(contents(one.target), one.oracle)


# M4: called off when ready, the target is the disk at one moment -------------------------------


@pytest.mark.parametrize("mode", mirror.MODES)
@pytest.mark.parametrize("target", [RAW, Image(64 * KIB)])
def test_M4_called_off_when_ready_the_target_is_that_moment_flushed_before_the_event(
    copy: Callable[..., Copy], target: Image, mode: str
) -> None:
    one = copy(target=target, copy_mode=mode, auto_finalize=False)
    job = Started(one.job)
    heard: list[tuple[bool, bool]] = []

    def look(name: str) -> None:
        if name == "BLOCK_JOB_COMPLETED":
            flushed = not (unflushed.has(one.target.filename) or one.target.unflushed)
            heard.append((flushed, contents(one.target) == one.oracle))

    job.hears = look
    job.until_ready()
    with Unflushed() as unflushed:
        for _ in range(5):
            one.anything()
        one.job.cancel(force=False)
        until(lambda: one.job.status is Status.PENDING, "pending")
        one.anything()  # the moment is when it is finalized
        one.job.finalize()
        assert one.job.wait(PATIENCE)
    assert heard == [(True, True)]
    then = bytes(one.oracle)
    one.anything()
    assert one.disk.root is one.source and not one.disk.taps and not one.disk.bitmaps
    assert not differs(contents(one.target), then)
    assert not differs(contents(one.disk), one.oracle)


def test_M4_called_off_with_force_nothing_is_left_on_the_disk(copy: Callable[..., Copy]) -> None:
    one = copy(copy_mode=BLOCKING)
    job = Started(one.job)
    job.until_ready()
    one.job.cancel()
    assert one.job.wait(PATIENCE)
    assert "BLOCK_JOB_CANCELLED" in [name for name, _ in job.events]
    assert one.disk.root is one.source and not one.disk.taps and not one.disk.bitmaps


# The end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["pivot", "cancel"])
def test_a_change_of_mode_that_meets_the_end_leaves_no_tap_behind(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    one = copy()
    job = Started(one.job).job
    until(lambda: job.status is Status.READY, "ready")

    def over() -> None:
        """The command was allowed; before it has its drain, the job is over."""
        if end == "pivot":
            job.complete()
        else:
            job.cancel()
        assert job.wait(PATIENCE)

    on_call(monkeypatch, one.disk, "exclusive", over)
    job.change(BLOCKING)
    assert one.disk.taps == ()
    one.zero(0, 4096)
    one.discard(8192 + 100, 100)
    assert not differs(contents(one.disk), one.oracle)
    assert one.disk._leased(0, SECTOR, WRITABLE) is not None, "written in place, as ever"


def test_an_error_that_was_ignored_and_made_good_does_not_fail_the_job(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = copy(on_target_error="ignore")
    on_call(monkeypatch, one.job.copier, "place", failing(errno.EIO))
    started = Started(one.job)
    started.until_ready()
    assert [data for name, data in started.events if name == "BLOCK_JOB_ERROR"] == [
        {"device": "copy", "operation": "write", "action": "ignore"}
    ]
    one.job.complete()
    assert one.job.wait(PATIENCE)
    assert one.job.error is None
    assert one.disk.root is one.target
    assert not differs(contents(one.target), one.oracle)


def test_the_source_is_blamed_for_what_cannot_be_read(
    copy: Callable[..., Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side has its own policy."""
    one = copy(source=Image(64 * KIB), on_source_error="report", on_target_error="ignore")
    next(one.steps)
    told: list[dict[str, Any]] = []
    one.job._emit = lambda name, data: told.append(data)
    monkeypatch.setattr(Copier, "place", lambda *_: failing(errno.EIO)())
    monkeypatch.setattr(jobs, "read", lambda *_: failing(errno.EBADMSG)())
    with pytest.raises(OSError, match="Bad message"):
        next(one.steps)
    assert told == [{"device": "", "operation": "read", "action": "report"}]
    assert not one.behind()
