"""The gate: shared passes shared, exclusive waits for what overlaps and holds back what comes."""

from __future__ import annotations

import random
import threading

from cowferry.block.gate import END, Gate


def test_shared_entries_pass_each_other() -> None:
    gate = Gate()
    a, b = gate.slot(), gate.slot()
    assert gate.try_enter(a, 0, 100)
    assert gate.try_enter(b, 50, 150)


def test_a_claim_holds_back_what_overlaps_and_nothing_else() -> None:
    gate = Gate()
    slot = gate.slot()
    claim = gate.claim(100, 200)
    assert not gate.try_enter(slot, 199, 200)
    assert gate.try_enter(slot, 200, 300)
    gate.leave(slot)
    gate.release(claim)
    assert gate.try_enter(slot, 100, 200)


def test_a_claim_waits_for_those_inside() -> None:
    gate = Gate()
    slot = gate.slot()
    assert gate.try_enter(slot, 0, 10)
    order: list[str] = []

    def claimer() -> None:
        claim = gate.claim(5, 6)
        order.append("claimed")
        gate.release(claim)

    thread = threading.Thread(target=claimer)
    thread.start()
    with gate.changed:
        gate.changed.wait_for(lambda: bool(gate.claims), timeout=10)
    assert gate.contended, "the claim does not stand"
    assert not order
    order.append("left")
    gate.leave(slot)
    thread.join(10)
    assert order == ["left", "claimed"]


def test_D2_a_standing_claim_is_not_starved_by_newcomers() -> None:
    gate = Gate()
    inside, newcomer = gate.slot(), gate.slot()
    assert gate.try_enter(inside, 0, 10)
    thread = threading.Thread(target=lambda: gate.release(gate.claim(0, END)))
    thread.start()
    with gate.changed:
        gate.changed.wait_for(lambda: bool(gate.claims), timeout=10)
    assert not gate.try_enter(newcomer, 500, 600)
    gate.leave(inside)
    thread.join(10)
    assert not thread.is_alive()


def test_claims_that_overlap_take_turns_and_never_deadlock() -> None:
    gate = Gate()
    held = [0] * 64  # by granule: how many think that it is theirs
    wrong: list[int] = []

    def worker(seed: int) -> None:
        rnd = random.Random(seed)
        slot = gate.slot()
        for _ in range(400):
            a = rnd.randrange(64)
            b = rnd.randrange(a + 1, 65)
            if rnd.random() < 0.5:
                claim = gate.claim(a, b)
                for i in range(a, b):
                    held[i] += 1
                    if held[i] != 1:
                        wrong.append(i)
                for i in range(a, b):
                    held[i] -= 1
                gate.release(claim)
            else:
                gate.enter(slot, a, b)
                if any(held[a:b]):
                    wrong.append(-a)
                gate.leave(slot)
        gate.drop(slot)

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads), "deadlock"
    assert not wrong
    assert not gate.claims
    assert not gate.slots


def test_a_drain_covers_the_largest_disk_that_there_can_be() -> None:
    gate = Gate()
    slot = gate.slot()
    last = (1 << 63) - 1  # the largest size of a file
    claim = gate.claim(0, END)
    assert not gate.try_enter(slot, last - 1, last)
    assert gate.try_claim(last - 1, last) is None
    gate.release(claim)
    assert gate.try_enter(slot, last - 1, last)
    assert gate.try_claim(0, END) is None and not gate.claims
    gate.leave(slot)
    other = gate.try_claim(0, END)
    assert other is not None and gate.claims == (other,)


def test_what_is_tried_and_fails_leaves_no_trace() -> None:
    gate = Gate()
    slot = gate.slot()
    gate.enter(slot, 0, 100)
    assert gate.try_claim(50, 60) is None
    held = gate.try_claim(100, 200)
    assert held is not None
    assert gate.try_claim(150, 160) is None
    assert gate.claims == (held,)
    gate.release(held)
    gate.leave(slot)
    assert not gate.claims
