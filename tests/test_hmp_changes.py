"""The human monitor's words for changing a chain, QEMU's and those of the 2011 discussion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from chains import chain_of_disks, contents, differs
from cowferry.block import moves
from cowferry.block.disk import Disk
from cowferry.block.node import chain
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.monitor import hmp
from daemons import Told, a_daemon

SIZE = 2 << 20
LAYERS = ["base.raw", "sn1.qcow2", "vm.qcow2"]


class Scene(NamedTuple):
    """A disk `virtio-blk0` over base <- sn1 <- vm."""

    folder: Path
    daemon: Daemon
    disk: Disk
    oracle: bytearray
    told: Told

    def say(self, line: str) -> str:
        return hmp.run_line(self.daemon, line)

    def quietly(self, line: str) -> None:
        """A line that has to succeed."""
        assert self.say(line) == ""

    def chain(self) -> list[str]:
        """The names of the disk's images, base first."""
        return [os.path.basename(n.filename) for n in chain(self.disk.root)][::-1]

    def write(self, data: bytes, offset: int) -> None:
        self.disk.pwrite(memoryview(data), offset)
        self.disk.flush()
        self.oracle[offset : offset + len(data)] = data

    def check(self) -> None:
        assert not differs(contents(self.disk), self.oracle)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with a_daemon() as daemon:
        oracle = chain_of_disks(tmp_path, LAYERS, SIZE)
        disk = daemon.open_disk("virtio-blk0", str(tmp_path / "vm.qcow2"))
        yield Scene(tmp_path, daemon, disk, oracle, Told(daemon))


def bytes_of(path: Path, format: str | None = None) -> bytearray:
    """What an image reads as, whoever has it open."""
    node = opening.open_image(str(path), format, read_only=True, force_share=True)
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


def test_snapshot_blkdev_makes_an_overlay_or_takes_one(scene: Scene) -> None:
    scene.quietly(f"snapshot_blkdev virtio-blk0 {scene.folder}/destination.qcow2 qcow2")
    assert scene.chain() == [*LAYERS, "destination.qcow2"]
    scene.write(b"s" * 512, 0)
    opening.create_image(str(scene.folder / "made"), "qcow2", SIZE, {})
    scene.quietly(f"snapshot_blkdev -n virtio-blk0 {scene.folder}/made qcow2")
    assert scene.chain() == [*LAYERS, "destination.qcow2", "made"]
    scene.check()


def test_snapshot_blkdev_without_a_file_says_what_qemu_says(scene: Scene) -> None:
    said = scene.say("snapshot_blkdev virtio-blk0")
    assert said.startswith("Error: Parameter 'snapshot_file' is missing")
    assert "snapshot_blkdev [-n] DEVICE [FILE] [FORMAT]" in said
    said = scene.say(f"snapshot_blkdev virtio-blk0 {scene.folder}/sn1.qcow2")
    assert said.startswith("Error: ") and "is a backing file of disk" in said
    said = scene.say(f"snapshot_blkdev -f virtio-blk0 {scene.folder}/x")
    assert said.startswith("Error: unsupported option -f")
    assert scene.chain() == LAYERS


def test_the_live_block_copy_of_2011_step_by_step(scene: Scene) -> None:
    """Create the destination on the disk's image, switch to it, stream (without its format in
    its name, the destination's format has to be said)."""
    over = scene.folder / "vm_1.img"
    backing = {"backing_file": "vm.qcow2", "backing_fmt": "qcow2"}
    opening.create_image(str(over), "qcow2", SIZE, backing)
    said = scene.say(f"change -n virtio-blk0 {over}")
    assert said.startswith("Error: ") and "its name does not say its format" in said
    scene.quietly(f"change -n virtio-blk0 {over} qcow2")
    assert scene.chain() == [*LAYERS, "vm_1.img"]
    scene.write(b"c" * 4096, 8192)
    scene.quietly("block_stream -a virtio-blk0")
    scene.told.wait("BLOCK_STREAM_COMPLETED", device="virtio-blk0")
    assert scene.chain() == ["vm_1.img"]
    scene.check()


def test_change_to_a_raw_image_with_and_without_a_word_to_the_guest(scene: Scene) -> None:
    same, other = scene.folder / "same.img", scene.folder / "other.img"
    same.write_bytes(scene.oracle)
    other.write_bytes(b"o" * 1024)
    scene.quietly(f"change -n virtio-blk0 {same}")
    scene.check()
    assert moves.follow(str(scene.folder / "vm.qcow2")).path == str(same)
    said = scene.say(f"change -n virtio-blk0 {other}")
    assert said.startswith("Error: ") and "1024 bytes" in said
    scene.quietly(f"change virtio-blk0 {other} raw")
    assert contents(scene.disk) == b"o" * 1024
    assert scene.say("change vnc password").startswith("Error: there is no VNC here")


@pytest.mark.parametrize(
    ("flags", "left"), [("-f", ["new.qcow2"]), ("", ["base.raw", "sn1.qcow2", "new.qcow2"])]
)
def test_drive_mirror_copies_all_or_the_top_and_completes(
    scene: Scene, flags: str, left: list[str]
) -> None:
    scene.quietly(f"drive_mirror {flags} virtio-blk0 {scene.folder}/new.qcow2 qcow2")
    scene.told.wait("BLOCK_JOB_READY", device="virtio-blk0")
    said = scene.say("info block-jobs")
    assert said.startswith("Type mirror, device virtio-blk0: Completed ")
    assert said.endswith(" bytes, speed limit 0 bytes/s\n")
    scene.write(b"m" * 1024, 1024)
    scene.quietly("block_job_complete virtio-blk0")
    done = scene.told.wait("BLOCK_JOB_COMPLETED", device="virtio-blk0")
    assert done["type"] == "mirror" and "error" not in done
    assert scene.chain() == left
    scene.check()


def test_drive_mirror_into_an_image_that_exists_and_a_cancel_that_keeps_the_copy(
    scene: Scene,
) -> None:
    target = scene.folder / "there.raw"
    target.write_bytes(b"x" * SIZE)
    said = scene.say(f"drive_mirror -f virtio-blk0 {target} raw")
    assert said.startswith("Error: ") and "exists" in said
    scene.quietly(f"drive_mirror -n -f virtio-blk0 {target} raw")
    scene.told.wait("BLOCK_JOB_READY", device="virtio-blk0")
    scene.quietly("block_job_cancel virtio-blk0")
    scene.told.wait("BLOCK_JOB_COMPLETED", device="virtio-blk0")
    assert scene.chain() == LAYERS
    assert bytes_of(target) == scene.oracle
    scene.told.wait("JOB_STATUS_CHANGE", id="virtio-blk0", status="null")
    scene.quietly(f"drive_mirror -nf virtio-blk0 {target} raw")
    scene.told.wait("BLOCK_JOB_READY", device="virtio-blk0")
    scene.quietly("block_job_cancel -f virtio-blk0")
    scene.told.wait("BLOCK_JOB_CANCELLED", device="virtio-blk0")


def test_block_commit_of_layers_between_and_of_the_active_one(scene: Scene) -> None:
    scene.quietly(f"snapshot_blkdev virtio-blk0 {scene.folder}/sn3.qcow2")
    scene.write(b"b" * 512, 512)
    folder = scene.folder
    scene.quietly(f"block_commit virtio-blk0 {folder}/vm.qcow2 {folder}/sn1.qcow2")
    scene.told.wait("BLOCK_JOB_COMPLETED", type="commit")
    assert scene.chain() == ["base.raw", "sn1.qcow2", "sn3.qcow2"]
    scene.check()
    scene.told.wait("JOB_STATUS_CHANGE", status="null")
    scene.quietly("block_commit virtio-blk0")
    scene.told.wait("BLOCK_JOB_READY", type="commit")
    assert scene.say("info block-jobs").startswith("Type commit, device virtio-blk0: Completed ")
    scene.quietly("block_job_complete virtio-blk0")
    scene.told.wait("BLOCK_JOB_COMPLETED", type="commit")
    assert scene.chain() == ["base.raw"]
    scene.check()
    said = scene.say("block_commit virtio-blk0")
    assert said.startswith("Error: ") and "nothing to commit into" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("snapshot_blkdev nope x", "Device 'nope' not found"),
        ("drive_mirror nope /tmp/none.raw", "Device 'nope' not found"),
        ("drive_mirror virtio-blk0", "wrong number of arguments"),
        ("drive_mirror -f virtio-blk0 /nowhere/x.raw raw", "No such file or directory"),
        ("drive_mirror virtio-blk0 /nowhere/x.raw raw", "a raw image has no backing file"),
        ("block_commit nope", "Device 'nope' not found"),
        ("block_commit virtio-blk0 none.qcow2", "'none.qcow2' is not in this backing file chain"),
        ("change nope x", "Device 'nope' not found"),
        ("change virtio-blk0", "wrong number of arguments"),
        ("change -x virtio-blk0 y", "unsupported option -x"),
        ("change virtio-blk0 /nowhere/x.raw", "No such file or directory"),
        ("block_job_complete virtio-blk0", "Block job 'virtio-blk0' not found"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(scene: Scene, line: str, said: str) -> None:
    out = scene.say(line)
    assert out.startswith("Error: ") and said in out and out.count("\n") == 1
    assert scene.chain() == LAYERS and not scene.daemon.jobs.all()
    scene.check()


def test_help_tells_the_words(scene: Scene) -> None:
    told = scene.say("help")
    for usage in (
        "snapshot_blkdev [-n] DEVICE [FILE] [FORMAT]",
        "drive_mirror [-n] [-f] DEVICE TARGET [FORMAT]",
        "block_commit DEVICE [TOP [BASE]]",
        "change [-n] DEVICE TARGET [FORMAT]",
        "block_job_cancel [-f] DEVICE",
    ):
        assert f"{usage} -- " in told
    assert scene.say("help change").count("\n") == 1
