"""What limits let through: rates, bursts, groups. No time passes here but by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conversations import Refused, speaking
from cowferry.block.limits import MOST, NONE, QOM_NAMES, RATES, Group, Limits, Member, Rate
from cowferry.block.throttle import READ, WRITE
from cowferry.errors import CowferryError
from tests_support import need
from timers import ByHand

MB = 10**6
BOTH = "bps/iops/max total values and read/write values cannot be used at the same time"


class Guest:
    """Sends requests of one kind to a member of a group, and counts what was let through.

    `depth` requests wait at any time; with depth 0 it only sends what it is told to."""

    def __init__(
        self, group: Group, direction: int = READ, length: int = 4096, depth: int = 0
    ) -> None:
        self.member = Member(group)
        self.direction = direction
        self.length = length
        self.passed: list[Any] = []  # names of requests, in order
        self.dropped: list[Any] = []
        self.names = itertools.count()
        self.busy = depth > 0
        for _ in range(depth):
            self.send()

    def send(self, name: Any = None, direction: int | None = None, owner: object = None) -> None:
        name = next(self.names) if name is None else name
        way = self.direction if direction is None else direction
        while self.member.admit(way, self.length):
            self.passed.append(name)
            if not self.busy:
                return
            name = next(self.names)

        def go(passed: bool) -> None:
            (self.passed if passed else self.dropped).append(name)
            if passed and self.busy:
                self.send()

        self.member.queue(way, self.length, go, owner)

    @property
    def count(self) -> int:
        return len(self.passed)

    @property
    def moved(self) -> int:
        return self.count * self.length


def limits(**given: int) -> Limits:
    return Limits.of(given)


@pytest.fixture
def clock() -> ByHand:
    return ByHand()


# Rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [512, 4096, 65536, 1 << 20, 3 << 20])
def test_bytes_per_second_are_right_on_average_whatever_the_sizes(
    clock: ByHand, length: int
) -> None:
    guest = Guest(Group("g", limits(bps=1 * MB), clock), length=length, depth=32)
    seconds = 5 if length < MB else 100
    clock.advance(seconds)
    assert guest.moved == pytest.approx(seconds * MB, abs=0.1 * MB + 2 * length)


@pytest.mark.parametrize("rate", [1, 7, 1000])
def test_operations_per_second_are_right_on_average(clock: ByHand, rate: int) -> None:
    guest = Guest(Group("g", limits(iops=rate), clock), depth=4)
    clock.advance(10)
    assert guest.count == pytest.approx(10 * rate, abs=0.1 * rate + 2)


def test_a_request_larger_than_a_second_passes_whole_and_is_paid_for(clock: ByHand) -> None:
    guest = Guest(Group("g", limits(bps=1 * MB), clock), length=32 * MB)
    guest.send("first")
    guest.send("second")
    assert guest.passed == ["first"]
    clock.advance(31.8)
    assert guest.passed == ["first"]
    clock.advance(0.2)
    assert guest.passed == ["first", "second"]


def test_what_is_limited_for_reads_leaves_writes_alone_and_the_reverse(clock: ByHand) -> None:
    for name, way in (("bps_rd", READ), ("iops_rd", READ), ("bps_wr", WRITE), ("iops_wr", WRITE)):
        guest = Guest(Group("g", limits(**{name: 1}), clock))
        for n in range(5):
            guest.send(("limited", n), way)
            guest.send(("free", n), 1 - way)
        assert guest.passed == [("limited", 0), *(("free", n) for n in range(5))], name


def test_reads_and_writes_that_share_a_rate_take_turns(clock: ByHand) -> None:
    guest = Guest(Group("g", limits(iops=10), clock))
    guest.send("first")
    for n in range(6):
        guest.send(("r", n), READ)
    for n in range(3):
        guest.send(("w", n), WRITE)
    clock.advance(0.95)
    kinds = [name[0] for name in guest.passed[1:]]
    assert kinds[:6] in (list("rwrwrw"), list("wrwrwr"))
    assert kinds[6:] == ["r"] * 3


def test_the_stricter_of_two_rates_decides(clock: ByHand) -> None:
    small = Guest(Group("g", limits(bps=1 * MB, iops=100), clock), length=512, depth=8)
    large = Guest(Group("h", limits(bps=1 * MB, iops=100), clock), length=100_000, depth=8)
    clock.advance(10)
    assert small.count == pytest.approx(1000, rel=0.02)
    assert large.moved == pytest.approx(10 * MB, rel=0.03)


def test_a_large_request_is_as_many_operations_as_iops_size_says(clock: ByHand) -> None:
    group = Group("g", limits(iops=100, iops_size=4096), clock)
    guest = Guest(group, length=40960, depth=4)
    clock.advance(10)
    assert guest.count == pytest.approx(100, abs=3)
    small = Guest(Group("h", limits(iops=100, iops_size=4096), clock), length=512, depth=4)
    clock.advance(10)
    assert small.count == pytest.approx(1000, rel=0.02), "a small one is one, not a part of one"


def test_zeroing_and_trimming_are_operations_and_no_bytes(clock: ByHand) -> None:
    guest = Guest(Group("g", limits(bps_wr=1, iops_wr=10), clock), WRITE, length=0, depth=2)
    clock.advance(10)
    assert guest.count == pytest.approx(100, abs=3)


# Bursts -------------------------------------------------------------------------------------


def test_a_burst_of_so_many_seconds_then_the_rate_then_again_after_a_pause(clock: ByHand) -> None:
    group = Group("g", limits(iops=20, iops_max=400, iops_max_length=6), clock)
    guest = Guest(group, depth=64)
    seen = []
    for _ in range(12):
        before = guest.count
        clock.advance(1)
        seen.append(guest.count - before)
    # What is in the bucket leaks at the rate meanwhile, so a burst lasts a little longer.
    assert all(n == pytest.approx(400, rel=0.15) for n in seen[:6]), seen
    assert all(n == pytest.approx(20, abs=2) for n in seen[7:]), seen
    guest.busy = False
    clock.advance(1000)
    guest.busy, again = True, guest.count
    for _ in range(64):
        guest.send()
    clock.advance(3)
    assert guest.count - again == pytest.approx(1200, rel=0.1), "it was saved up again"


def test_a_burst_without_a_length_is_a_second_of_it_at_once(clock: ByHand) -> None:
    guest = Guest(Group("g", limits(bps=1 * MB, bps_max=50 * MB), clock), length=1 * MB)
    for _ in range(60):
        guest.send()
    assert guest.count == pytest.approx(51, abs=1)
    clock.advance(4)
    assert guest.count == pytest.approx(55, abs=1)


def test_without_a_burst_a_pause_saves_up_a_tenth_of_a_second(clock: ByHand) -> None:
    guest = Guest(Group("g", limits(iops=1000), clock))
    clock.advance(3600)
    for _ in range(500):
        guest.send()
    assert guest.count == pytest.approx(101, abs=1)


# Queues -------------------------------------------------------------------------------------


def test_first_come_first_served_on_one_disk(clock: ByHand) -> None:
    group = Group("g", limits(iops=100), clock)
    guest = Guest(group)
    for n in range(50):
        guest.send(n)
        if n % 7 == 0:
            clock.advance(0.013)
    clock.advance(1)
    assert guest.passed == list(range(50))


def test_one_that_comes_does_not_pass_those_who_wait(clock: ByHand) -> None:
    """Even if the bucket has room just now: the timer is about to call."""
    group = Group("g", limits(iops=10), clock)
    first, other = Guest(group), Guest(group)
    for n in range(3):
        first.send(n)
    clock.now += 0.15  # the time has come, and nobody has been called yet
    assert not other.member.admit(READ, 4096)
    other.send("late")
    assert first.passed == [0, 1, 2] and not other.passed


@pytest.mark.parametrize("name", ["bps", "bps_rd"])
def test_disks_of_a_group_get_equal_parts_of_the_bytes_whatever_they_send(
    clock: ByHand, name: str
) -> None:
    group = Group("g", limits(**{name: MB}), clock)
    small = Guest(group, length=4096, depth=4)
    large = Guest(group, length=1 << 20, depth=64)
    many = Guest(group, length=65536, depth=1)
    clock.advance(60)
    for guest in (small, large, many):
        assert guest.moved == pytest.approx(20 * MB, rel=0.1)


def test_disks_of_a_group_get_equal_parts_of_the_operations(clock: ByHand) -> None:
    group = Group("g", limits(iops=60), clock)
    guests = [Guest(group, length=size, depth=depth)
              for size, depth in ((512, 1), (65536, 32), (4096, 200))]  # fmt: skip
    clock.advance(60)
    for guest in guests:
        assert guest.count == pytest.approx(1200, rel=0.02)


def test_a_disk_that_paused_neither_saves_up_nor_is_punished(clock: ByHand) -> None:
    group = Group("g", limits(iops=100), clock)
    steady = Guest(group, depth=8)
    clock.advance(100)
    late = Guest(group, depth=8)
    before = steady.count
    clock.advance(10)
    assert late.count == pytest.approx(500, rel=0.05)
    assert steady.count - before == pytest.approx(500, rel=0.05)


def test_what_a_disk_does_not_use_the_others_get(clock: ByHand) -> None:
    group = Group("g", limits(iops=100), clock)
    busy, idle = Guest(group, depth=8), Guest(group)
    for _ in range(100):
        idle.send()
        clock.advance(0.1)
    assert idle.count >= 99, "it asks for less than its half, and gets it"
    assert busy.count == pytest.approx(900, rel=0.03)


def test_the_timer_is_asked_once_however_many_wait(clock: ByHand) -> None:
    group = Group("g", limits(iops=10, iops_size=512), clock)
    guests = [Guest(group, direction, 4096, depth=20) for direction in (READ, WRITE) * 5]
    clock.advance(20)
    assert sum(g.count for g in guests) == pytest.approx(25, abs=3)
    assert len(clock._calls) <= 3


def test_calls_that_came_too_late_do_not_add_up(clock: ByHand) -> None:
    """One that must wait for less than those who wait already asks the timer again."""
    group = Group("g", limits(iops_rd=5, iops_wr=1), clock)
    Guest(group, WRITE, depth=50)
    guest = Guest(group)
    for _ in range(60):
        for _ in range(3):
            guest.send()
        clock.advance(0.7)
    assert len(clock._calls) <= 5


# Changes ------------------------------------------------------------------------------------


def test_a_new_limit_counts_at_once_for_those_who_wait(clock: ByHand) -> None:
    group = Group("g", limits(iops=1), clock)
    guest = Guest(group)
    for n in range(20):
        guest.send(n)
    assert guest.count == 1
    group.change(limits(iops=100))
    assert guest.count == pytest.approx(11, abs=1)
    clock.advance(1)
    assert guest.passed == list(range(20))


def test_a_stricter_limit_counts_at_once_too(clock: ByHand) -> None:
    group = Group("g", limits(iops=1000), clock)
    guest = Guest(group, depth=8)
    clock.advance(1)
    group.change(limits(iops=10))
    before = guest.count
    clock.advance(10)
    assert guest.count - before == pytest.approx(100, abs=4)


BURST = {"iops": 100, "iops_max": 1000, "iops_max_length": 2}


def same(guest: Guest, clock: ByHand) -> None:
    guest.member.group.change(limits(**BURST))


def another_member(guest: Guest, clock: ByHand) -> None:
    bps = 10**12 + guest.count
    guest.member.group.change(limits(**BURST, bps=bps, iops_size=1 << 20))


def a_smaller_burst_and_back(guest: Guest, clock: ByHand) -> None:
    guest.member.group.change(limits(**BURST | {"iops_max": 200}))
    same(guest, clock)


def a_larger_burst_and_back(guest: Guest, clock: ByHand) -> None:
    guest.member.group.change(limits(**BURST | {"iops_max_length": 3}))
    same(guest, clock)


def no_burst_and_back(guest: Guest, clock: ByHand) -> None:
    guest.member.group.change(limits(iops=100))
    same(guest, clock)


def a_little_more_or_less(guest: Guest, clock: ByHand) -> None:
    guest.member.group.change(limits(**BURST | {"iops": 100 + guest.count % 2}))


def parts_instead_of_the_total(guest: Guest, clock: ByHand) -> None:
    guest.member.group.change(
        limits(**{f"{k[:4]}{end}{k[4:]}": v for k, v in BURST.items() for end in ("_rd", "_wr")})
    )
    same(guest, clock)


def a_new_group(guest: Guest, clock: ByHand) -> None:
    guest.member.move(Group("new", limits(**BURST), clock))


def an_empty_group_and_back(guest: Guest, clock: ByHand) -> None:
    group = guest.member.group
    guest.member.move(Group("empty", limits(iops=100), clock))
    guest.member.move(group)


WAYS = [
    same, another_member, a_smaller_burst_and_back, a_larger_burst_and_back, no_burst_and_back,
    a_little_more_or_less, parts_instead_of_the_total, a_new_group, an_empty_group_and_back,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_change_of_limits_refills_no_burst(
    clock: ByHand, way: Callable[[Guest, ByHand], None]
) -> None:
    guest = Guest(Group("g", limits(**BURST), clock), depth=8)
    for _ in range(100):
        way(guest, clock)
        clock.advance(0.1)
    # The burst, and the rate for ten seconds; a bucket that is just full lets one pass.
    larger = 1000 if way is a_larger_burst_and_back else 0
    assert -60 < guest.count - (2000 + 10 * 100 + larger) < 260


@pytest.mark.parametrize("rate", [1, 7, 100])
def test_the_same_limit_again_lets_nothing_through(clock: ByHand, rate: int) -> None:
    group = Group("g", limits(iops=rate), clock)
    guest = Guest(group, depth=8)
    for _ in range(1000):
        group.change(limits(iops=rate))
        clock.advance(0.01)
    assert guest.count == pytest.approx(10 * rate, abs=0.1 * rate + 2)


def test_a_debt_stays_a_debt_and_is_paid_at_the_better_of_both_rates(clock: ByHand) -> None:
    for rate, wait in ((MB, 9.9), (2 * MB, 4.9), (100, 9.9)):
        group = Group("g", limits(bps=MB), clock)
        guest = Guest(group, length=10 * MB)
        guest.send("large")
        group.change(limits(bps=rate))
        guest.send("next")
        clock.advance(wait - 0.01)
        assert guest.passed == ["large"], rate
        clock.advance(0.02)
        assert guest.passed == ["large", "next"], rate


def test_a_burst_that_was_used_comes_back_as_it_would_without_a_change(clock: ByHand) -> None:
    group = Group("g", limits(**BURST), clock)
    guest = Guest(group, depth=0)
    clock.advance(1)
    for change in (limits(iops=100), limits(**BURST)):
        for n in range(3000):
            guest.send(n)
            clock.advance(0.001)
        group.change(change)
    clock.advance(100)
    had = guest.count
    clock.advance(30)  # idle: everything leaks
    for n in range(500):
        guest.send(n)
        clock.advance(0.001)
    assert guest.count - had == 500


def test_a_group_with_other_disks_keeps_its_own_account(clock: ByHand) -> None:
    crowd, alone = Group("crowd", limits(**BURST), clock), Group("a", limits(**BURST), clock)
    stays, guest = Guest(crowd), Guest(alone, depth=8)
    clock.advance(5)
    guest.member.move(crowd)
    stays.busy = True
    for _ in range(8):
        stays.send()
    clock.advance(1)
    assert stays.count + guest.count >= 2000 + 300 + 900, "its burst was taken away"


def test_no_limit_lets_all_who_wait_go_on_in_order(clock: ByHand) -> None:
    for leaves in (False, True):
        group = Group("g", limits(iops=1), clock)
        guest = Guest(group)
        for n in range(20):
            guest.send(n)
        if leaves:
            guest.member.leave()
        else:
            group.change(NONE)
        assert guest.passed == list(range(20))
        guest.send("more")
        assert guest.passed[-1] == "more"


def test_a_disk_moves_to_another_group_with_those_who_wait(clock: ByHand) -> None:
    slow, fast = Group("slow", limits(iops=1), clock), Group("fast", limits(iops=100), clock)
    guest, stays = Guest(slow), Guest(slow)
    for n in range(15):
        guest.send(n)
        stays.send(n)
    guest.member.move(fast)
    clock.advance(0.5)
    assert guest.passed == list(range(15))
    clock.advance(15)
    assert stays.count == pytest.approx(15, abs=1), "the others have its part"


def test_whoever_is_sent_away_is_dropped_and_nobody_else(clock: ByHand) -> None:
    group = Group("g", limits(iops=1), clock)
    guest, me, other = Guest(group), object(), object()
    guest.send("first")
    for n in range(5):
        guest.send(("mine", n), owner=me)
        guest.send(("other", n), owner=other)
    guest.member.dismiss(me, go=False)
    assert guest.dropped == [("mine", n) for n in range(5)]
    clock.advance(5)
    assert guest.passed == ["first", *(("other", n) for n in range(5))]


def test_whoever_says_goodbye_is_served_at_once_and_it_counts(clock: ByHand) -> None:
    group = Group("g", limits(iops=1), clock)
    guest, me = Guest(group), object()
    guest.send("first")
    for n in range(5):
        guest.send(n, owner=me)
    guest.member.dismiss(me, go=True)
    assert guest.passed == ["first", *range(5)] and not guest.dropped
    guest.send("next")
    clock.advance(5.8)
    assert guest.passed[-1] == 4
    clock.advance(0.2)
    assert guest.passed[-1] == "next"


# What can take effect -----------------------------------------------------------------------

REFUSED: list[tuple[dict[str, int], str]] = [
    ({"bps": 1, "bps_rd": 1}, BOTH),
    ({"iops": 1, "iops_wr": 1}, BOTH),
    ({"bps": 9, "bps_max": 9, "bps_wr_max": 9}, BOTH),
    ({"bps_max": 5}, "bps_max/iops_max require corresponding bps/iops values"),
    ({"iops_rd_max": 5}, "bps_max/iops_max require corresponding bps/iops values"),
    ({"bps": 5, "bps_max": 4}, "bps_max/iops_max cannot be lower than bps/iops"),
    ({"bps": 5, "bps_max_length": 2}, "burst length set without burst rate"),
    ({"iops_max_length": 2}, "burst length set without burst rate"),
    ({"bps": 5, "bps_max": 6, "bps_max_length": 0}, "the burst length cannot be 0"),
    ({"bps": 5, "bps_max": MOST, "bps_max_length": 2},
     "burst length too high for this burst rate"),
    ({"bps": 5, "bps_max": 9, "bps_max_length": -1},
     "burst length too high for this burst rate"),
    ({"bps": -1}, f"bps/iops/max values must be within [0, {MOST}]"),
    ({"iops_wr": MOST + 1}, f"bps/iops/max values must be within [0, {MOST}]"),
    ({"bps": 5, "bps_max": -6}, f"bps/iops/max values must be within [0, {MOST}]"),
    ({"iops_size": 4096}, "iops size requires an iops value to be set"),
    ({"iops_size": 4096, "bps": 5}, "iops size requires an iops value to be set"),
    ({"iops_size": -1, "iops": 5}, f"iops size must be within [0, {MOST}]"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_limit_that_cannot_take_effect_is_an_error(given: dict[str, int], text: str) -> None:
    with pytest.raises(CowferryError) as error:
        Limits.of(given)
    assert error.value.desc == text
    assert error.value.hint


def test_every_limit_that_is_taken_has_an_effect(clock: ByHand) -> None:
    """Of each member that is set, there is a load that shows it."""
    for name in RATES:
        group = Group("g", limits(**{name: 10}), clock)
        way = WRITE if name.endswith("wr") else READ
        guest = Guest(group, way, length=1, depth=1)
        clock.advance(10)
        assert guest.count == pytest.approx(100, abs=3), name
        group = Group("g", limits(**{name: 10, f"{name}_max": 100}), clock)
        guest = Guest(group, way, length=1)
        for _ in range(200):
            guest.send()
        assert guest.count == pytest.approx(101, abs=1), name


def test_our_verdicts_and_words_on_limits_are_qemus(tmp_path: Path) -> None:
    """The same limits to both: both take them and say the same of them, or refuse in one text."""
    need("qemu-storage-daemon")
    rng = random.Random(7)
    numbers = [0, 0, 0, 1, 5, 1000, MOST, MOST + 1, -1]

    def some() -> dict[str, int]:
        chosen = rng.sample(list(QOM_NAMES), rng.randint(1, 4))
        return {
            name: rng.choice([0, 1, 2, 60] if name.endswith("_length") else numbers)
            for name in chosen
        }

    tried = [given for given, _ in REFUSED] + [some() for _ in range(300)]
    taken = 0
    with speaking(tmp_path, ("qemu-storage-daemon",)) as qemu:
        for number, given in enumerate(tried):
            theirs: dict[str, int] | str
            ours: dict[str, int] | str
            wire = {QOM_NAMES[k]: v for k, v in given.items()}
            name = f"g{number}"
            try:
                qemu.quietly("object-add", qom_type="throttle-group", id=name, limits=wire)
                theirs = qemu.quietly("qom-get", path=name, property="limits")
                qemu.quietly("object-del", id=name)
            except Refused as refused:
                theirs = str(refused.desc)
            try:
                ours = {QOM_NAMES[k]: v for k, v in Limits.of(given).flat().items()}
                taken += 1
            except CowferryError as error:
                ours = error.desc
            if given.get("iops_size", 0) < 0 or given.get("iops_size", 0) > MOST:
                assert isinstance(ours, str), "QEMU takes these sizes, and they mean nothing"
                continue
            assert ours == theirs, given
    assert taken > 30


def changes() -> Iterator[tuple[dict[str, int], dict[str, int], dict[str, int]]]:
    """(limits, change, limits then) as a person means it."""
    yield {}, {"bps": 5}, {"bps": 5}
    yield {"bps": 5}, {"iops_wr": 7}, {"bps": 5, "iops_wr": 7}
    yield {"bps_rd": 5, "bps_wr": 6}, {"bps": 7}, {"bps": 7}
    yield {"bps": 5, "bps_max": 9}, {"bps_wr": 7}, {"bps_wr": 7}
    yield {"bps": 5, "bps_max": 9, "bps_max_length": 3}, {"bps": 0}, {}
    yield {"bps": 5, "bps_max": 9, "bps_max_length": 3}, {"bps_max": 0}, {"bps": 5}
    yield {"iops": 5, "iops_size": 4096, "bps": 6}, {"iops": 0}, {"bps": 6}
    yield {"iops": 5}, {"iops_max": 9, "iops_max_length": 3}, \
        {"iops": 5, "iops_max": 9, "iops_max_length": 3}  # fmt: skip


@pytest.mark.parametrize(("before", "change", "after"), list(changes()))
def test_a_change_leaves_what_it_does_not_name(
    before: dict[str, int], change: dict[str, int], after: dict[str, int]
) -> None:
    assert Limits.of(before).with_changes(change) == Limits.of(after)


def test_names_are_those_of_qmp_both_ways() -> None:
    some = Limits(bps=Rate(5, 9, 3), iops_rd=Rate(7), iops_size=512)
    assert Limits.of(some.flat()) == some
    assert set(some.flat()) == set(QOM_NAMES) and bool(some) and not NONE
