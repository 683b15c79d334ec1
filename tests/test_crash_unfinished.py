"""A power cut during a copy to a raw image: what is on disk lets it go on, with every byte right.

Use case 2c of the discussion, for copies: the record beside the target and a persistent bitmap of
the source say what the target lacks. At each moment the disk is what its guest may have written;
the copy goes on or begins anew, and ends equal to the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chains import contents
from cowferry.block import keeper, moves, names, sysio, unfinished
from cowferry.block.bitmap_file import Stamp
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.jobs import mirror
from crashes import SPEED, Judge, World, Wrong, a_disk, the_job
from daemons import Told


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large disk is: several regions, checkpoints often. A replay has other inodes."""
    monkeypatch.setattr(unfinished, "GRANULARITY", 4096)
    monkeypatch.setattr(keeper, "REGION", 32 << 10)
    monkeypatch.setattr(keeper, "HOLD", 4096)
    monkeypatch.setattr(mirror, "CHECKPOINT", 0.0)
    monkeypatch.setattr(names, "identity", lambda path: 0)
    monkeypatch.setattr(keeper, "stamp", lambda node: Stamp())


class Again:
    """The copy once more, in a daemon that was started after the crash."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.went_on = self.anew = 0

    def __call__(self, daemon: Daemon, told: Told) -> None:
        disk = daemon.graph.disk("vm")
        if disk.root.filename == str(self.target):
            return  # it had moved
        arguments: dict[str, Any] = {"device": "vm", "target": str(self.target)}
        try:
            daemon.execute("x-disk-copy", arguments)
            self.went_on += moves.half_copied(str(self.target)) is not None
        except CowferryError as error:
            assert "exists" in error.desc, error.desc  # made, and not yet on record
            self.anew += 1
            sysio.unlink(str(self.target))  # a log may be listening
            daemon.execute("x-disk-copy", arguments)
        told.wait("BLOCK_JOB_READY", device="vm")
        daemon.execute("block-job-cancel", {"device": "vm"})
        done = told.wait("BLOCK_JOB_COMPLETED", device="vm")
        assert "error" not in done, done
        assert self.target.read_bytes() == contents(disk)
        assert not moves.half_copied(str(self.target))
        assert not disk.root.bitmaps


def look(source: Path, target: Path) -> int:
    """Where no bit is set, the target has what the disk has. How many bytes that are."""
    body = moves.half_copied(str(target)) if target.exists() else None
    if body is None:
        return 0
    node = opening.open_image(str(source), read_only=True)
    try:
        bitmap = node.bitmaps.get(body["bitmap"])
        if bitmap is None:  # the record has outlived it: then the copy had moved, or was over
            return 0
        assert not bitmap.inconsistent, bitmap.reason
        want, got = contents(node), target.read_bytes()
        for at in range(0, node.size, 4096):
            if not bitmap.any(at, 1):
                assert got[at : at + 4096] == want[at : at + 4096], f"clean, and not so, at {at}"
        return node.size - bitmap.count()
    finally:
        opening.close_chain(node)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_B2_a_copy_to_raw_goes_on_after_a_crash(tmp_path: Path, format: str, mode: str) -> None:
    copied_and_judged(tmp_path, format, mode)


def test_these_tests_notice_a_flush_of_the_target_that_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its bits go: the one flush that is this copy's own."""
    whole = mirror.Mirror.checkpoint

    def broken(job: mirror.Mirror) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(job.target, "flush", lambda: None)
            return whole(job)

    monkeypatch.setattr(mirror.Mirror, "checkpoint", broken)
    with pytest.raises(Wrong):
        copied_and_judged(tmp_path, "raw", "background")


def copied_and_judged(tmp_path: Path, format: str, mode: str) -> None:
    world = World(tmp_path)
    target = world.there / "copy.raw"
    source = a_disk(world, format)
    world.open("vm", source, new=target)
    with world:
        world.execute("x-disk-copy", device="vm", target=str(target), speed=SPEED, copy_mode=mode)
        job = the_job(world)
        work = world.ready(job)
        world.churn(3)
        job.complete()
        world.end([job], work)
        assert not moves.half_copied(str(target)) and contents(world.disk()) is not None
    judge, again = Judge(world), Again(target)
    clean: list[int] = []
    judge.each(
        seed=3, samples=2, count=60, again=again, also=lambda _: clean.append(look(source, target))
    )
    assert max(clean) > 64 << 10, "what was copied is known"
    assert again.went_on, "some of the crashes left a copy to go on with"
