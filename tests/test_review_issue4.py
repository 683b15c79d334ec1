"""What a review of the core of issue 4 found, each as the sequence that showed it."""

from __future__ import annotations

import random

import pytest

from cowferry.block.bitmap import Bitmap

KIB, MIB = 1 << 10, 1 << 20


# D2: a drain is short, however large the disk is --------------------------------------------


@pytest.mark.parametrize("to", [512 << n for n in range(14)])
@pytest.mark.parametrize("of", [512, 4 * KIB, 64 * KIB, 4 * MIB])
def test_B2_merged_into_any_granularity_no_bit_is_lost_and_none_is_made_up(
    of: int, to: int
) -> None:
    size = 37 * MIB + 3 * 512
    source, target = Bitmap("a", size, of), Bitmap("b", size, to)
    order = random.Random(of + to)
    for _ in range(20):
        source.set(order.randrange(size), 1)
    source.set(size - 1, 1)
    target.merge(source)
    want = Bitmap("c", size, to)
    for offset, length in source.runs():
        want.set(offset, length)
    assert target.bits == want.bits and target.ones == want.ones
