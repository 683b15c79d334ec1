"""A power cut during a backup: the disk is the guest's, a backup that was told done is whole, and
the bitmap that the next one goes by has missed nothing.

Three moments count: P, at which the bitmap began (the backup before); T0, at which this backup
began; and the end, from which on bits tell of what changed since T0 only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from chains import contents
from cowferry.block import keeper
from cowferry.block.bitmap_file import Stamp
from cowferry.drivers import opening
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.jobs.backup import Backup
from cowferry.jobs.ending import finish
from crashes import SIZE, SPEED, Judge, World, Wrong, a_disk, sound, the_job
from writelog import State

GRANULARITY = 4096
FEW = bytes(b"etaoinsh"[n % 8] for n in range(256))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several regions, as a large disk has. A replay has other inodes."""
    monkeypatch.setattr(keeper, "REGION", 32 << 10)
    monkeypatch.setattr(keeper, "HOLD", 4096)
    monkeypatch.setattr(keeper, "stamp", lambda node: Stamp())


def covered(source: Path, then: bytes | bytearray, now: bytes | bytearray) -> bool:
    """Whether the bitmap that is found on disk is set wherever the bytes differ."""
    node = opening.open_image(str(source), read_only=True)
    try:
        bitmap = node.bitmaps["b0"]
        assert not bitmap.inconsistent, bitmap.reason
        return all(
            bitmap.any(at, 1)
            for at in range(0, len(now), GRANULARITY)
            if then[at : at + GRANULARITY] != now[at : at + GRANULARITY]
        )
    finally:
        opening.close_chain(node)


@pytest.mark.parametrize("sync", ["full", "incremental"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_J3_B2_a_backup_that_was_told_done_is_whole_and_the_bitmap_missed_nothing(
    tmp_path: Path, format: str, sync: str
) -> None:
    backed_up_and_judged(tmp_path, format, sync)


def test_these_tests_notice_a_target_that_is_not_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backup, "_flush", lambda job: 0)
    monkeypatch.setattr(Backup, "approach", lambda job: None)
    with pytest.raises(Wrong):
        backed_up_and_judged(tmp_path, "raw", "full")


def test_these_tests_notice_a_bitmap_that_lets_go_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Backup.attach

    def attach(job: Backup) -> None:
        whole(job)
        assert job.bitmap is not None and job.source.keeper is not None
        job.bitmap.clear(0, job.disk.size)
        job.source.keeper.checkpoint()

    monkeypatch.setattr(Backup, "attach", attach)
    with pytest.raises(Wrong):
        backed_up_and_judged(tmp_path, "raw", "full")


class Text(random.Random):
    """Whose bytes shrink when they are compressed."""

    def randbytes(self, n: int) -> bytes:
        return super().randbytes(n).translate(FEW)


def test_Q1_a_power_cut_leaves_no_compressed_cluster_without_its_bytes(tmp_path: Path) -> None:
    compressed_and_judged(tmp_path)


def test_these_tests_notice_an_entry_that_is_written_before_what_it_points_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Qcow2._write_tables
    monkeypatch.setattr(Qcow2, "_barrier", lambda image: None)
    monkeypatch.setattr(Qcow2, "_write_tables", lambda i: (whole(i), i.file.flush()))
    with pytest.raises(Wrong):
        compressed_and_judged(tmp_path)


def compressed_and_judged(tmp_path: Path) -> None:
    """Backups into one image, one after the other: a piece replaces another, whose place is given
    back in the flush between two steps and used again."""
    world = World(tmp_path, seed=3)
    world.rnd = Text(3)
    source, target = a_disk(world, "raw"), world.there / "backup.qcow2"
    source.write_bytes(Text(1).randbytes(SIZE))
    disk = world.open("vm", source)
    opening.create_image(str(target), "qcow2", SIZE, {"cluster_size": GRANULARITY})
    file = {"driver": "file", "filename": str(target)}
    world.execute("blockdev-add", node_name="t", driver="qcow2", file=file)

    def backed_up() -> Iterator[None]:
        world.execute(
            "blockdev-backup", device="vm", target="t", sync="full", compress=True, speed=SPEED
        )
        job = the_job(world)
        for step in job.run():
            assert step.error is None
            yield
        finish([job])
        job.clean()
        world.daemon.jobs._forget(job)

    moments = [bytes(contents(disk))]
    list(backed_up())
    with world:
        for _ in range(2):
            world.churn(8)
            moments.append(bytes(contents(disk)))
            for _ in backed_up():
                world.disk("t").flush()
                world.churn(1)
            world.log.mark(("done",), look=True)
        image = world.disk("t").root
        assert isinstance(image, Qcow2)
        assert image.check().compressed_clusters > 20
    judge = Judge(world)

    def look(state: State) -> None:
        done = sum(m[0] == "done" for m in state.marks)
        got = sound(str(target), None, state.what)
        for at in range(0, SIZE, GRANULARITY):
            piece = slice(at, at + GRANULARITY)
            assert got[piece] in [m[piece] for m in moments[done : done + 2]], at

    assert judge.each(seed=4, samples=2, count=60, also=look) > 50


def backed_up_and_judged(tmp_path: Path, format: str, sync: str) -> None:
    world = World(tmp_path, seed=11)
    source, target = a_disk(world, format), world.there / "backup.qcow2"
    world.open("vm", source)
    world.execute(
        "block-dirty-bitmap-add", node="vm", name="b0", granularity=GRANULARITY, persistent=True
    )
    before = bytes(contents(world.disk()))  # P
    opening.create_image(str(target), "qcow2", SIZE, {"cluster_size": 4096})
    file = {"driver": "file", "filename": str(target)}
    world.execute("blockdev-add", node_name="t", driver="qcow2", file=file)
    with world:
        world.churn(6)
        world.flush()
        then = bytes(contents(world.disk()))  # T0
        world.execute(
            "blockdev-backup", device="vm", target="t", sync=sync, bitmap="b0",
            bitmap_mode="on-success", speed=SPEED,
        )  # fmt: skip
        job = the_job(world)
        assert isinstance(job, Backup)
        work = iter(job.run())
        for step in work:
            assert step.error is None
            world.churn(2)
        world.flush()
        world.log.mark(("finish",), look=True)
        finish([job])
        job.clean()
        world.daemon.jobs._forget(job)
        world.log.mark(("done",), look=True)
        world.churn(6)
        world.flush()
    judge = Judge(world)

    def look(state: State) -> None:
        passed = {m[0] for m in state.marks}
        now = sound(str(source), None, state.what)
        if "finish" in passed:
            assert covered(source, then, now), "since T0"
        else:
            assert covered(source, before, now), "since the backup before"
        if "done" in passed:
            whole = sync == "full"
            got = sound(str(target), None, state.what)
            for at in range(0, len(then), GRANULARITY):
                if whole or then[at : at + GRANULARITY] != before[at : at + GRANULARITY]:
                    assert got[at : at + GRANULARITY] == then[at : at + GRANULARITY], at

    assert judge.each(seed=4, samples=2, count=60, also=look) > 100
