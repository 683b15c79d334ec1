"""A copy that its guest outruns: it says so, and with a deadline it catches up.

The steering takes no time here: a clock of the test's own moves with what is copied, and the guest
writes between the steps. The last test is the real thing, with fio and by the wall clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base
from cowferry.block.disk import Disk
from cowferry.block.lane import DONE, Lane
from cowferry.block.rates import WINDOW, Rates
from cowferry.block.throttle import HOLD, LONGEST, SLICE, Brake
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.exports.nbd import NbdExport, NbdServer
from cowferry.jobs.mirror import SLOWEST, Mirror
from cowferry.jobs.states import Status
from cowferry.wire import nbd
from daemons import PATIENCE
from fio import guest, need_fio
from test_use_cases import Vm, converted, digest, serving
from tests_support import need
from timers import AtOnce, ByHand

SIZE = 8 << 20
GRANULE = 64 << 10
SPEED = 2 << 20  # bytes per second of the copy, by the test's clock
HOT = "write-blocking on the ranges that are written again and again"
EVERYWHERE = "write-blocking everywhere"

Writer = Callable[[int], None]


class Course:
    """A mirror of a raw disk into a raw file, stepped by hand on a clock of its own."""

    def __init__(self, folder: Path, speed: int = SPEED, copies: int = SPEED, **options: Any):
        make_base(folder, SIZE)
        target = folder / "target.raw"
        with open(target, "wb") as f:
            f.truncate(SIZE)
        self.disk = Disk(opening.open_image(str(folder / "base.raw"), "raw"), "vm")
        self.target = opening.open_image(str(target), "raw")
        self.now = 1000.0
        self.copies = copies  # bytes per second
        self.job = Mirror(
            self.disk, self.target, speed=speed, granularity=GRANULE, clock=lambda: self.now,
            **options,
        )  # fmt: skip
        self.work = self.job.run()
        self.random = random.Random(5)
        self.at = 0
        self.owed = 0.0  # bytes that the guest has still to write
        self.ready = False
        self.timer = AtOnce()  # of the brake

    def steps(self, guest: Writer, rate: float, seconds: float = 1000) -> Iterator[None]:
        """The copy goes on for so long, or until it is ready; `guest` writes `rate` bytes a second,
        a granule in each call."""
        end = self.now + seconds
        while self.now < end and not self.ready:
            before = self.job._rates.total
            self.ready = next(self.work).ready
            if self.disk.brake is not None:
                self.disk.brake.timer = self.timer
            took = max(self.job._rates.total - before, GRANULE) / self.copies
            self.now += took
            self.owed += rate * took
            while self.owed >= GRANULE:
                self.owed -= GRANULE
                guest(GRANULE)
            yield

    def go(self, guest: Writer, rate: float, seconds: float = 1000) -> None:
        for _ in self.steps(guest, rate, seconds):
            assert not self.behind(), "M1: a byte differs that no bit tells of"

    def write(self, offset: int, length: int) -> None:
        """The guest writes something new."""
        self.disk.pwrite(memoryview(self.random.randbytes(length)), offset)

    def anywhere(self, length: int) -> None:
        """Write somewhere."""
        self.write(self.random.randrange(SIZE // GRANULE) * GRANULE, length)

    def round_and_round(self, length: int) -> None:
        """Write what follows the last write."""
        self.write(self.at, length)
        self.at = (self.at + length) % SIZE

    def within(self, start: int, size: int) -> Writer:
        """A guest that writes somewhere in there."""
        return lambda length: self.write(
            start + self.random.randrange(size // GRANULE) * GRANULE, length
        )

    def behind(self) -> list[int]:
        """Granules that differ on the target though they are not dirty."""
        here, there = contents(self.disk.root), contents(self.target)
        return [
            at
            for at in range(0, SIZE, GRANULE)
            if here[at : at + GRANULE] != there[at : at + GRANULE]
            and not self.job.dirty.bits[at // GRANULE]
        ]

    @property
    def did(self) -> list[str]:
        """What the job did to converge, without the times."""
        return [d.partition(" (after")[0] for d in self.job.did]

    def told(self) -> dict[str, Any]:
        return self.job.details()

    def is_ready(self) -> None:
        """What the runner does when the work says so, and the work's next step."""
        self.job.status = Status.READY
        next(self.work)

    def in_place(self) -> bool:
        """Whether a guest's write is served from a lease, as before any of this."""
        lane = Lane(self.disk)
        try:
            return lane.write(memoryview(b"x" * 512), 0, 512) == DONE
        finally:
            lane.close()


@pytest.fixture
def course(tmp_path: Path) -> Iterator[Callable[..., Course]]:
    """Makes a course; its images are closed at the end."""
    made: list[Course] = []

    def make(**options: Any) -> Course:
        made.append(Course(tmp_path, **options))
        return made[-1]

    yield make
    for c in made:
        c.work.close()  # type: ignore[attr-defined]
        c.job.clean()
        if c.disk.root is not c.target:
            c.disk.root.close()
        else:
            c.job.source.close()
        c.target.close()


# Rates and brakes --------------------------------------------------------------------------


def test_rates_are_what_is_copied_written_and_undone_in_a_second() -> None:
    now = 0.0
    rates = Rates(lambda: now)
    assert not rates.look(1000, 0) and not rates.known
    rates.copied(300)
    now = WINDOW / 2
    assert not rates.look(800, 400), "too early to tell"
    now = 1.0
    rates.copied(100)
    assert rates.look(900, 700)
    assert (rates.copy_rate, rates.write_rate, rates.dirty_rate) == (400, 700, 300)
    assert rates.demand == 700 and rates.predict() == 900 / (400 - 300)
    now = 2.0
    rates.copied(400)
    assert rates.look(1000, 700)
    assert (rates.copy_rate, rates.write_rate, rates.dirty_rate) == (400, 350, 400), "smoothed"
    assert rates.predict() == float("inf")
    assert rates.total == 800


def test_rates_are_measured_anew_after_a_change() -> None:
    now = 0.0
    rates = Rates(lambda: now)
    rates.look(1000, 0)
    now = 1.0
    rates.copied(500)
    rates.look(1000, 500)
    now = 50.0  # it stood still
    rates.restart()
    assert not rates.look(1000, 9000) and not rates.known
    now = 51.0
    rates.copied(100)
    assert rates.look(900, 9000)
    assert (rates.copy_rate, rates.write_rate, rates.dirty_rate) == (100, 0, 0)
    assert rates.predict() == 9


def test_a_brake_holds_back_no_write_for_long_and_forgives_the_rest() -> None:
    now = 0.0
    brake = Brake(1000, lambda: now)
    assert brake.charge(50) == pytest.approx(0.05)
    now = 1.0
    assert not brake.charge(int(1000 * SLICE)), "within the credit"
    assert brake.charge(10**9) == pytest.approx(LONGEST), "however much was written"
    now = 1.0 + LONGEST + SLICE
    assert not brake.charge(int(1000 * SLICE)), "that much later it is forgotten"


def test_a_brake_that_nobody_holds_down_is_off() -> None:
    now = 0.0
    brake = Brake(1000, lambda: now)
    assert brake.charge(5000) == pytest.approx(LONGEST)
    now = HOLD
    assert brake.charge(5000) == 0
    brake.hold()
    assert brake.charge(5000) == pytest.approx(LONGEST)


def test_a_disk_with_a_brake_holds_back_its_writers_and_nobody_else(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw"), "raw"), "vm")
    timer = AtOnce()
    disk.brake = Brake(1 << 20, lambda: 0.0, timer)
    disk.pwrite(memoryview(bytes(1 << 20)), 0)
    assert timer.asked == [pytest.approx(LONGEST)]
    disk.pread(memoryview(bytearray(1 << 20)), 0)
    assert len(timer.asked) == 1
    disk.root.close()


def test_a_guest_whose_writes_are_braked_reads_as_ever(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw"), "raw"), "vm")
    timer = ByHand()
    disk.taps = (Nobody(),)  # as in write-blocking, the only mode in which there is a brake
    disk.leases.reset(disk.root.granule, None)
    disk.brake = Brake(1, lambda: 0.0, timer)
    server = NbdServer()
    server.add(NbdExport("vm", disk))
    server.listen_unix(str(tmp_path / "s"))
    try:
        with NbdClient(server.uri("vm")) as client:
            client.link.submit(nbd.WRITE, 0, 0, 4096, bytes(4096))
            assert client.pread(4096, 8192) == contents(disk)[8192 : 8192 + 4096]
            timer.advance(LONGEST)
    finally:
        timer.advance(LONGEST)
        server.stop()
        disk.root.close()


class Nobody:
    """A tap that does nothing."""

    holds = None
    slow = True

    def before(self, offset: int, length: int) -> None: ...
    def after(self, offset: int, length: int, data: memoryview | None) -> None: ...
    def failed(self, offset: int, length: int) -> None: ...


# What the status says ----------------------------------------------------------------------


def test_a_copy_that_cannot_converge_says_so(course: Callable[..., Course]) -> None:
    c = course()
    for _ in c.steps(c.anywhere, SPEED * 1.25, 1.5 * SIZE / SPEED):
        pass
    steps = c.steps(c.anywhere, SPEED * 1.25, 4 * SIZE / SPEED)
    notes = [c.told().get("x-note", "") for _ in steps]
    assert not c.ready and not c.job.did
    assert len(notes) > 30 and all(
        n.startswith("does not converge: the guest writes") for n in notes
    )
    told = c.told()
    assert told["x-copy-rate"] == pytest.approx(SPEED, rel=0.05)
    assert told["x-dirty-rate"] == pytest.approx(SPEED * 1.25, rel=0.15)
    assert told["x-remaining"] == c.job.dirty.count() > 0
    assert "the guest writes 3 MB/s and 2 MB/s are copied" in told["x-note"]


def test_small_writes_are_counted_by_what_has_to_be_copied_for_them(
    course: Callable[..., Course],
) -> None:
    c = course()
    c.go(lambda n: c.write(c.random.randrange(SIZE // 4096) * 4096, 4096), SPEED * 2, 16)
    # A granule's worth of time each, so a sixteenth of that rate; but each undoes a granule.
    assert not c.ready and "does not converge" in c.told()["x-note"]
    assert c.told()["x-dirty-rate"] > SPEED * 0.8


def test_a_copy_that_keeps_up_says_nothing_and_does_nothing(
    course: Callable[..., Course],
) -> None:
    c = course(converge_by=60)
    for _ in c.steps(c.anywhere, SPEED / 2):
        assert "x-note" not in c.told()
    assert c.ready and not c.job.did and c.disk.brake is None
    assert c.told()["copy-mode"] == "background" and not c.disk.taps


def test_a_small_hot_spot_is_not_called_diverging(course: Callable[..., Course]) -> None:
    c = course()
    for _ in c.steps(c.within(SIZE // 2, GRANULE), SPEED * 3):
        assert "x-note" not in c.told()
    assert c.ready


# What is done ------------------------------------------------------------------------------


def test_first_the_hot_ranges_only(course: Callable[..., Course]) -> None:
    c = course(converge_by=25)
    hot = c.within(0, SIZE // 4)
    began = c.now
    for _ in c.steps(hot, SPEED * 3):
        assert not c.behind()
        if c.did:
            break
    assert c.did == [HOT] and c.told()["copy-mode"] == "write-blocking"
    assert "to converge: write-blocking on the ranges" in c.told()["x-note"]
    # A hot range goes to both sides, a cold one is left to the copy.
    at = next(c.job.again.runs())[0]
    c.write(at, GRANULE)
    c.write(SIZE - GRANULE, GRANULE)
    here, there = contents(c.disk.root), contents(c.target)
    assert here[at : at + GRANULE] == there[at : at + GRANULE]
    assert here[-GRANULE:] != there[-GRANULE:] and c.job.dirty.bits[SIZE // GRANULE - 1]
    c.go(hot, SPEED * 3)
    assert c.ready and c.now - began <= 25
    assert c.did == [HOT], "that was enough"


def test_what_was_undone_before_is_hot_from_the_first_moment(
    course: Callable[..., Course],
) -> None:
    c = course(converge_by=1000)
    c.go(c.within(0, SIZE // 4), SPEED, 2)
    undone = c.job.copied.bits & c.job.dirty.bits
    assert undone.any() and not c.did
    c.job._block(c.job.again)
    assert c.job.hot is c.job.again and not (undone & ~c.job.again.bits).any()
    at = undone.find(1) * GRANULE
    c.write(at, GRANULE)
    there = contents(c.target)
    assert contents(c.disk.root)[at : at + GRANULE] == there[at : at + GRANULE]


def test_then_everywhere(course: Callable[..., Course]) -> None:
    c = course(converge_by=9)
    began = c.now
    c.go(c.round_and_round, SPEED * 1.25)
    assert c.ready and c.now - began <= 9
    assert c.did == [HOT, EVERYWHERE]
    assert c.disk.brake is None
    note = c.told()["x-note"]
    assert (
        note.startswith("to converge: write-blocking on the ranges") and "everywhere (aft" in note
    )


def test_everywhere_at_once_when_there_is_no_time_to_try(course: Callable[..., Course]) -> None:
    c = course(converge_by=SIZE / SPEED + 2)
    c.go(c.anywhere, SPEED * 1.25)
    assert c.ready and c.did[0] == EVERYWHERE


def test_then_a_brake_harder_and_harder_and_bounded(
    course: Callable[..., Course], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowferry.jobs.mirror.MIN_CHUNK", 256 << 10)
    c = course(converge_by=1, speed=0, copy_mode="write-blocking", copies=3 << 20)
    speeds: list[int] = []
    for _ in c.steps(c.anywhere, 8 << 20):
        brake = c.disk.brake
        if brake is not None and brake.speed not in speeds:
            speeds.append(brake.speed)
    assert speeds[0] == pytest.approx(3 << 19, rel=0.1), "half of what the copy does"
    assert speeds[1:] == [SLOWEST]
    assert c.timer.asked and max(c.timer.asked) <= LONGEST + 1e-9
    assert c.ready
    assert len(c.job.did) == 1, "one brake, however hard"
    assert "braking the guest's writes towards 1 MB/s" in c.told()["x-note"]


def braked(course: Callable[..., Course]) -> Course:
    """A copy that has just braked its guest."""
    c = course(converge_by=1, speed=0, copy_mode="write-blocking", copies=8 << 20)
    for _ in c.steps(c.anywhere, 16 << 20):
        if c.disk.brake is not None:
            return c
    raise AssertionError("it never braked")


def test_the_brake_goes_when_the_copy_is_ready(course: Callable[..., Course]) -> None:
    c = braked(course)
    c.go(c.anywhere, 1 << 20)
    assert c.ready
    c.is_ready()
    assert c.disk.brake is None


def test_the_brake_goes_at_the_pivot_and_the_guest_writes_in_place_again(
    course: Callable[..., Course],
) -> None:
    c = braked(course)
    c.go(c.anywhere, 1 << 20)
    c.job.status, c.job.completing = Status.READY, True
    for _ in c.work:
        pass
    c.job.prepare()
    assert c.disk.root is c.target and c.disk.brake is None and not c.disk.taps
    assert c.in_place()


def test_the_brake_goes_when_the_copy_is_called_off(course: Callable[..., Course]) -> None:
    c = braked(course)
    assert not c.in_place()
    c.work.close()  # type: ignore[attr-defined]
    c.job.clean()
    assert c.disk.brake is None and not c.disk.taps and not c.disk.bitmaps
    assert c.in_place()


def test_the_brake_goes_when_somebody_wants_background(course: Callable[..., Course]) -> None:
    c = braked(course)
    c.job.status = Status.RUNNING
    c.job.change("background")
    assert c.disk.brake is None and c.in_place()


def test_the_brake_is_off_while_the_job_is_paused(course: Callable[..., Course]) -> None:
    c = braked(course)
    brake = c.disk.brake
    assert brake is not None and brake.charge(64 << 20) == pytest.approx(LONGEST)
    c.now += HOLD
    assert brake.charge(64 << 20) == 0
    next(c.work)
    assert brake.charge(64 << 20) == pytest.approx(LONGEST)


def test_no_brake_where_the_job_s_own_speed_limit_is_too_low(
    course: Callable[..., Course],
) -> None:
    c = course(converge_by=2, copies=SPEED)
    c.go(c.anywhere, SPEED * 1.25, 3)
    assert not c.ready and c.did == [EVERYWHERE] and c.disk.brake is None
    assert c.told()["x-note"].endswith("its speed limit of 2 MB/s is too low")
    c.job.throttle.speed = 0  # the administrator sees it
    c.copies *= 8
    c.go(c.anywhere, SPEED * 1.25)
    assert c.ready and "too low" not in c.told()["x-note"]


def test_a_pause_is_no_slowness(course: Callable[..., Course]) -> None:
    c = course(converge_by=100)
    c.go(c.anywhere, SPEED / 4, 2)
    rate = c.told()["x-copy-rate"]
    c.job.status, c.job.user_paused = Status.PAUSED, True
    c.now += 60
    c.job.resume()
    c.job.status = Status.RUNNING
    c.go(c.anywhere, SPEED / 4, 1)
    assert c.told()["x-copy-rate"] == pytest.approx(rate, rel=0.1)
    assert c.told()["x-dirty-rate"] < SPEED / 2
    assert not c.did


# The real thing ----------------------------------------------------------------------------


def test_a_guest_writing_40_mb_s_is_caught_up_with_by_a_copy_limited_to_32_mb_s(
    tmp_path: Path,
) -> None:
    """The figures of the issue, deadline and all; so this one test does assert on time."""
    need("qemu-img")
    need_fio()
    size = 160 << 20
    image, target = tmp_path / "vm.raw", tmp_path / "new.raw"
    image.write_bytes(random.Random(3).randbytes(1 << 20) * (size >> 20))
    copy: dict[str, Any] = {"device": "vm", "target": str(target), "speed": 32_000_000}
    with ExitStack() as held:
        vm = held.enter_context(serving(tmp_path, vm=image))
        running = held.enter_context(guest(tmp_path / "fio", vm.uris["vm"], size, "2m", "36m"))
        running.goes_on(1)
        # Without a deadline it says that it gets nowhere.
        vm.client.call("x-disk-copy", **copy)
        told = status(vm, lambda job: "x-note" in job)
        note = told["x-note"]
        assert note.startswith("does not converge: the guest writes "), note
        assert told["x-dirty-rate"] > told["x-copy-rate"] * 0.9 > 20_000_000
        assert told["status"] == "running" and told["x-remaining"] > size // 8
        vm.client.call("job-cancel", id="vm")
        vm.event("BLOCK_JOB_CANCELLED", device="vm")
        target.unlink(missing_ok=True)
        # With one it is ready in time, and says how.
        began = time.monotonic()
        vm.client.call("x-disk-copy", **copy, converge_by=20)
        vm.event("BLOCK_JOB_READY", device="vm")
        took = time.monotonic() - began
        told = status(vm, lambda job: True)
        assert took <= 25, told
        assert told["x-note"].startswith("to converge: write-blocking "), told
        running.goes_on(1)
        vm.client.call("job-complete", id="vm")
        vm.event("BLOCK_JOB_COMPLETED", device="vm")
        left = digest(image)
        running.goes_on(2)
        running.stop()
        assert running.storm_rate > 20_000_000, "the guest was starved"
        running.verify()
        live = vm.live("vm")
        vm.stop()
        assert not differs(converted(target), live)
        assert digest(image) == left


def status(vm: Vm, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job's entry, once it is as wanted; it must not be over or ready before."""
    end = time.monotonic() + PATIENCE
    while True:
        (job,) = vm.client.call("query-block-jobs")
        if wanted(job):
            return dict(job)
        assert not job["ready"], job
        assert time.monotonic() < end, job
        time.sleep(0.1)
