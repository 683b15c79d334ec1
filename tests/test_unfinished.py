"""Copies to a raw image that were interrupted: gone on with, or refused with the reason (2c).

Whoever cannot tell what the target lacks says so, and touches nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import contents, make_base, overlay
from cowferry.block import moves, unfinished
from cowferry.daemon import Daemon
from cowferry.errors import CowferryError, ImageError
from cowferry.jobs import mirror
from daemons import Told, environment, program

SIZE = 2 << 20
SLOW = 640 << 10  # bytes a second: not over before we say so


class World:
    """A raw disk, and where it is copied to."""

    def __init__(self, folder: Path) -> None:
        self.source, self.target = folder / "base.raw", folder / "there" / "copy.raw"
        self.target.parent.mkdir()
        make_base(folder, SIZE)
        self.start()

    def start(self) -> None:
        self.daemon = Daemon()
        self.told = Told(self.daemon)
        self.disk = self.daemon.open_disk("vm", str(self.source))

    def copy(self, **more: Any) -> None:
        given = {"device": "vm", "target": str(self.target), "job-id": "c", **more}
        self.daemon.execute("x-disk-copy", given)

    def interrupted(self) -> None:
        """The daemon ended while the copy ran, and another one was started."""
        self.copy(speed=SLOW)
        job = self.daemon.jobs.get("c")
        assert isinstance(job, mirror.Mirror)
        with job.changed:
            assert job.changed.wait_for(lambda: job.offset > 128 << 10, 30)
        self.daemon.close()
        self.start()

    def completed(self) -> None:
        self.told.wait("BLOCK_JOB_READY", device="c")
        self.daemon.execute("block-job-cancel", {"device": "c"})
        done = self.told.wait("BLOCK_JOB_COMPLETED", device="c")
        assert "error" not in done
        assert self.target.read_bytes() == contents(self.disk)
        assert moves.half_copied(str(self.target)) is None and not self.disk.root.bitmaps
        left = {p.name for p in (*self.source.parent.iterdir(), *self.target.parent.iterdir())}
        assert left == {"base.raw", "there", "copy.raw"}

    @contextmanager
    def refused(self, *words: str) -> Iterator[None]:
        """With those words; what was there stays."""
        before = self.target.read_bytes() if self.target.exists() else None
        with pytest.raises(CowferryError) as found:
            yield
        text = f"{found.value.desc} {found.value.hint}"
        assert all(word in text for word in words), text
        assert (self.target.read_bytes() if self.target.exists() else None) == before
        assert not self.daemon.jobs.all() and not self.daemon.graph.claims


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.daemon.close()


def test_a_copy_goes_on_when_the_daemon_has_ended(world: World) -> None:
    world.interrupted()
    world.disk.pwrite(memoryview(b"x" * 70_000), 5)  # before anybody has thought of the copy
    world.copy()
    job = world.daemon.jobs.get("c")
    assert isinstance(job, mirror.Mirror) and job.unfinished is not None
    assert job.unfinished.resumed
    world.completed()


def test_a_copy_goes_on_after_an_error_of_its_target(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: mirror.Mirror, runs: list[tuple[int, int]]) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mirror.Mirror, "copy_runs", failing)
        world.copy()
        assert "No space" in world.told.wait("BLOCK_JOB_COMPLETED", device="c")["error"]
    world.told.wait("JOB_STATUS_CHANGE", id="c", status="null")
    assert world.target.exists() and moves.half_copied(str(world.target))
    world.copy()
    world.completed()


def test_what_is_cancelled_leaves_nothing(world: World) -> None:
    world.copy(speed=SLOW)
    world.daemon.execute("job-cancel", {"id": "c"})
    world.told.wait("JOB_STATUS_CHANGE", id="c", status="null")
    assert not world.target.exists() and moves.half_copied(str(world.target)) is None
    assert not world.disk.root.bitmaps and world.disk.root.keeper is None


def test_a_copy_that_could_not_be_gone_on_with_says_so(tmp_path: Path) -> None:
    """The bitmap's token does not fit into the header beside a long name."""
    make_base(tmp_path, SIZE)
    small = overlay(tmp_path, "vm.qcow2", "./" * 160 + "base.raw", "raw", SIZE, cluster_size="512")
    daemon = Daemon()
    daemon.open_disk("vm", str(small))
    given = {"device": "vm", "target": str(tmp_path / "copy.raw"), "speed": SLOW}
    daemon.execute("x-disk-copy", given)
    (job,) = daemon.execute("query-block-jobs", {})
    assert "begins anew if it is interrupted: the header's extensions" in job["x-note"]
    daemon.close()
    assert not (tmp_path / "copy.raw").exists()


def test_half_a_copy_is_not_opened_as_a_disk(world: World) -> None:
    world.interrupted()
    with pytest.raises(ImageError, match="an unfinished copy of") as found:
        world.daemon.open_disk("other", str(world.target))
    assert str(world.source) in found.value.hint
    world.copy()
    world.completed()


def test_without_the_record_nobody_guesses(world: World) -> None:
    world.interrupted()
    os.unlink(f"{world.target}{moves.COPYING}")
    with world.refused("exists"):
        world.copy()


def test_without_the_bitmap_nobody_guesses(world: World) -> None:
    world.interrupted()
    name = unfinished.name_of(str(world.target))
    world.daemon.execute("block-dirty-bitmap-remove", {"node": "vm", "name": name})
    with world.refused("which part is not known", "is gone", "to begin anew"):
        world.copy()


def test_a_bitmap_that_is_not_to_be_trusted_is_not(world: World) -> None:
    world.interrupted()
    world.daemon.close()
    world.source.write_bytes(world.source.read_bytes()[::-1])  # by another program
    world.start()
    with world.refused("which part is not known", "changed by another program"):
        world.copy()


def test_another_image_in_its_place_is_not_taken_for_it(world: World) -> None:
    world.interrupted()
    other = world.target.with_suffix(".other")
    other.write_bytes(bytes(SIZE))
    os.rename(other, world.target)
    with world.refused("another image was put in its place"):
        world.copy()


@pytest.mark.parametrize("ended", ["well", "in a crash"])
def test_a_target_that_another_program_has_written_is_not_gone_on_with(
    world: World, ended: str
) -> None:
    """Its time of change says so; who crashed could not say that, but then the bytes may."""
    world.interrupted()
    (bitmap,) = world.disk.root.bitmaps.values()
    assert 0 < bitmap.count() < SIZE, "some of it is there"
    if ended == "well":
        with open(world.target, "r+b") as f:
            f.seek(next(bitmap.runs())[0])  # where nothing was copied
            f.write(b"x")
    else:
        body = moves.half_copied(str(world.target))
        assert body is not None and body.pop("mtime_ns")
        moves.copying(str(world.target), *(body[k] for k in ("source", "bitmap", "size", "inode")))
        world.target.write_bytes(bytes(SIZE))
    with world.refused("which part is not known", "another program has written there"):
        world.copy()


@pytest.mark.parametrize("whose", ["disk", "target"])
def test_another_size_is_refused(world: World, whose: str) -> None:
    world.interrupted()
    if whose == "disk":
        world.daemon.execute("block_resize", {"device": "vm", "size": SIZE + 512})
    else:
        os.truncate(world.target, SIZE // 2)
    with world.refused("it was of 2097152 bytes"):
        world.copy()


def test_a_copy_of_another_disk_is_not_gone_on_with(world: World) -> None:
    world.interrupted()
    other = world.source.with_name("other.raw")
    other.write_bytes(bytes(SIZE))
    world.daemon.open_disk("other", str(other))
    with world.refused("it is one of", "'other' is not there any more"):
        world.copy(device="other")


def test_a_damaged_record_is_named(world: World) -> None:
    world.interrupted()
    Path(f"{world.target}{moves.COPYING}").write_text("{")
    with world.refused(moves.COPYING):
        world.copy()


def test_the_same_command_goes_on_after_kill_9(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    source, target, run = tmp_path / "base.raw", tmp_path / "copy.raw", tmp_path / "r"
    copy = [sys.executable, "-m", "cowferry", "copy", "vm", str(target)]
    for speed in ("200K", "0"):
        with program(run, f"vm={source}") as (child, line):
            assert "vm" in line()
            more = ["--finish"] if speed == "0" else []
            with subprocess.Popen(
                [*copy, "--speed", speed, *more],
                env=environment(run), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ) as asked:  # fmt: skip
                assert asked.stderr is not None
                if speed != "0":
                    while moves.half_copied(str(target)) is None:
                        assert asked.poll() is None, asked.stderr.read()
                    child.kill()
                    child.wait()
                    told = asked.communicate(timeout=30)[1]
                    assert asked.returncode and "the same command goes on from there" in told
                else:
                    told = asked.communicate(timeout=60)[1]
                    assert asked.returncode == 0, told
    assert target.read_bytes() == source.read_bytes()
    assert not Path(f"{target}{moves.COPYING}").exists()
