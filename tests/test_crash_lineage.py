"""A power cut during an increment: whatever backup the bitmap names, over it the next increment
restores the disk, and that backup is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chains import contents
from cowferry.block import keeper, lineage
from cowferry.block.bitmap_file import Stamp
from cowferry.block.keeper import Keeper
from cowferry.drivers import opening
from cowferry.jobs.backup import Backup
from cowferry.jobs.ending import finish
from crashes import SPEED, Judge, World, Wrong, a_disk, sound, the_job
from writelog import State

GRANULARITY = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several regions, as a large disk has. A replay has other inodes."""
    monkeypatch.setattr(keeper, "REGION", 32 << 10)
    monkeypatch.setattr(keeper, "HOLD", 4096)
    monkeypatch.setattr(keeper, "stamp", lambda node: Stamp())


def missed(path: Path, then: bytes, now: bytes | bytearray) -> tuple[bytes, int]:
    """(the backup that the bitmap on disk names, where it has missed a change since `then`; -1)."""
    node = opening.open_image(str(path), read_only=True)
    try:
        bitmap = node.bitmaps["b0"]
        assert not bitmap.inconsistent, bitmap.reason
        wrong = (
            at
            for at in range(0, len(now), GRANULARITY)
            if then[at : at + GRANULARITY] != now[at : at + GRANULARITY] and not bitmap.any(at, 1)
        )
        return bitmap.since, next(wrong, -1)
    finally:
        opening.close_chain(node)


def stamp_of(path: Path) -> lineage.Stamp | None:
    node = opening.open_image(str(path), read_only=True)
    try:
        return lineage.stamp_of(node)
    finally:
        opening.close_chain(node)


def run(world: World, name: str, base: str | None, between: Callable[[], Any]) -> bytes:
    """One backup, stepped; what the disk read as at its moment."""
    then = bytes(contents(world.disk()))
    disk: dict[str, Any] = {"device": "vm", "target": str(world.there / name)}
    disk |= {} if base is None else {"base": str(world.there / base)}
    world.execute(
        "x-disk-backup", id="b", disks=[disk], bitmap="b0", speed=SPEED,
        mode="full" if base is None else "incremental",
    )  # fmt: skip
    job = the_job(world, "b")
    assert isinstance(job, Backup)
    for step in job.run():
        assert step.error is None
        between()
    finish([job])
    job.clean()
    world.daemon.jobs._forget(job)
    return then


def increased_and_judged(tmp_path: Path, format: str) -> None:
    world = World(tmp_path, seed=11)
    source = a_disk(world, format)
    world.open("vm", source)
    sun = run(world, "sun.qcow2", None, lambda: None)
    first = world.disk().root.bitmaps["b0"].since
    with world:
        world.churn(6)
        world.flush()
        mon = run(world, "mon.qcow2", "sun.qcow2", lambda: world.churn(2))
        world.log.mark(("done",), look=True)
        world.churn(6)
        world.flush()
    named = set()

    def look(state: State) -> None:
        now = sound(str(source), None, state.what)
        since, _ = missed(source, sun, now)
        then, path = (sun, "sun.qcow2") if since == first else (mon, "mon.qcow2")
        made = stamp_of(world.there / path)
        assert made is not None and not made.written and made.id == since, "which backup it is"
        assert sound(str(world.there / path), None, state.what) == then, "the backup"
        assert missed(source, then, now)[1] < 0, "what was written since the backup"
        if "done" in {m[0] for m in state.marks}:
            assert since != first, "told done, and the bitmap counts from the backup before"
        named.add(since)

    assert Judge(world).each(seed=4, samples=2, count=60, also=look) > 100
    assert len(named) == 2


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_B2_a_bitmap_names_the_backup_from_which_it_counts_at_every_moment(
    tmp_path: Path, format: str
) -> None:
    increased_and_judged(tmp_path, format)


def test_these_tests_notice_bits_that_go_before_the_backup_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "_counts_anew", lambda keeper: False)
    with pytest.raises(Wrong):
        increased_and_judged(tmp_path, "raw")


def test_these_tests_notice_a_stamp_that_comes_after_the_bitmap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, parted = lineage.stamp, Backup.parted
    late: list[Callable[[], None]] = []
    monkeypatch.setattr(lineage, "stamp", lambda node, made: late.append(lambda: plain(node, made)))

    def end(job: Backup) -> None:
        parted(job)
        while late:
            late.pop()()

    monkeypatch.setattr(Backup, "parted", end)
    with pytest.raises(Wrong):
        increased_and_judged(tmp_path, "raw")
