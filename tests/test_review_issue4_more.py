"""What a second review of the core of issue 4 found, each as the sequence that showed it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.drivers import opening
from cowferry.jobs.backup import Backup

KIB, MIB = 1 << 10, 1 << 20
SIZE = 37 * MIB + 3 * 512


def new(path: Path, size: int = SIZE, **options: Any) -> Node:
    format = path.suffix[1:]
    opening.create_image(str(path), format, size, options)
    return opening.open_image(str(path), format)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An empty raw disk, whose size is a multiple of nothing."""
    disk = Disk(new(tmp_path / "vm.raw"), "vm")
    yield disk
    disk.root.close()


# D2: a drain is short, however many runs a bitmap has ----------------------------------------


@pytest.mark.parametrize("granularity", [512, 64 * KIB, 4 * MIB])
@pytest.mark.parametrize("cluster", [64 * KIB, 2 * MIB])
def test_D2_an_increment_begins_in_few_steps_however_scattered_it_is(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: int, cluster: int
) -> None:
    """One for each run was ten seconds for a disk of 64 GiB of which every second unit is dirty."""
    bitmap = Bitmap("b0", SIZE, granularity)
    order = random.Random(granularity + cluster)
    for _ in range(40):
        bitmap.set(order.randrange(SIZE), 1)
    want = Bitmap("", SIZE, 64 * KIB)
    for offset, length in bitmap.runs():
        start = offset // cluster * cluster
        want.set(start, -(-(offset + length) // cluster) * cluster - start)
    target = new(tmp_path / "target.qcow2", cluster_size=cluster)
    job = Backup(disk, Disk(target, "t"), bitmap=bitmap, by_bitmap=True)
    with monkeypatch.context() as patch, disk.exclusive():
        for name in ("set", "runs"):
            patch.setattr(Bitmap, name, lambda *_: pytest.fail("one step for each run"))
        job.attach()
    assert job.todo.bits == job.missing.bits == want.bits
    assert list(job.pending.runs()) == list(want.runs())
    assert job.length == sum(length for _, length in want.runs())
    with disk.exclusive():
        job.detach()
    job.clean()
    target.close()
