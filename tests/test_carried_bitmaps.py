"""Bitmaps go along when a disk moves to another image: tracking goes on over snapshots and copies.

With QMP's own commands they stay with the image whose changes they tell, as in QEMU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chains import contents, make_base
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from daemons import Told

SIZE = 4 << 20
KIB = 1024


class World:
    """A disk with a persistent bitmap, cleared, and one write since."""

    def __init__(self, folder: Path, format: str) -> None:
        self.folder = folder
        make_base(folder, SIZE)
        path = folder / "base.raw"
        if format == "qcow2":
            path = folder / "vm.qcow2"
            opening.create_image(
                str(path), "qcow2", SIZE,
                {"backing_file": "base.raw", "backing_fmt": "raw"},
            )  # fmt: skip
        self.path = path
        self.daemon = Daemon()
        self.told = Told(self.daemon)
        self.daemon.open_disk("vm", str(path))
        self.run("block-dirty-bitmap-add", node="vm", name="b0", persistent=True)
        self.write(0)

    def run(self, command: str, **arguments: Any) -> Any:
        return self.daemon.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def write(self, offset: int) -> None:
        self.daemon.graph.disk("vm").pwrite(memoryview(b"w" * 4096), offset)

    def dirty(self) -> list[int]:
        """Where b0 of the disk's present image is set; nothing if there is no b0."""
        bitmap = self.daemon.graph.disk("vm").root.bitmaps.get("b0")
        return [] if bitmap is None else [offset for offset, _ in bitmap.runs()]

    def again(self) -> None:
        """The daemon ends, and another one comes."""
        self.daemon.close()
        self.daemon = Daemon()
        self.told = Told(self.daemon)
        self.daemon.open_disk("vm", str(self.path))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.close()


@pytest.fixture(params=["raw", "qcow2"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    with World(tmp_path, request.param) as world:
        yield world


def test_tracking_goes_on_over_a_snapshot(world: World) -> None:
    old = world.daemon.graph.disk("vm").root
    world.run("x-disk-snapshot", disks=[{"device": "vm"}])
    assert world.daemon.graph.disk("vm").root is not old
    world.write(1 << 20)
    assert world.dirty() == [0, 1 << 20]
    assert [offset for offset, _ in old.bitmaps["b0"].runs()] == [0], "it tells of that moment"
    world.again()
    assert world.dirty() == [0, 1 << 20]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_tracking_goes_on_over_a_copy(world: World, format: str) -> None:
    target = world.folder / f"copy.{format}"
    world.run("x-disk-copy", device="vm", target=str(target))
    world.told.wait("BLOCK_JOB_READY", device="vm")
    world.write(1 << 20)
    world.run("job-complete", id="vm")
    assert "error" not in world.told.wait("BLOCK_JOB_COMPLETED", device="vm")
    assert world.daemon.graph.disk("vm").root.filename == str(target)
    world.write(2 << 20)
    assert world.dirty() == [0, 1 << 20, 2 << 20]
    world.again()
    assert world.dirty() == [0, 1 << 20, 2 << 20]


def test_tracking_goes_on_over_a_commit_of_the_active_layer(world: World) -> None:
    world.run("x-disk-snapshot", disks=[{"device": "vm"}])
    world.run("block-dirty-bitmap-clear", node="vm", name="b0")  # a backup, say
    world.write(1 << 20)
    bytes_before = contents(world.daemon.graph.disk("vm"))
    world.run("block-commit", device="vm", base=str(world.path), x_carry_bitmaps=True)
    world.told.wait("BLOCK_JOB_READY", device="vm")
    world.run("job-complete", id="vm")
    assert "error" not in world.told.wait("BLOCK_JOB_COMPLETED", device="vm")
    assert world.daemon.graph.disk("vm").root.filename == str(world.path)
    assert contents(world.daemon.graph.disk("vm")) == bytes_before
    assert world.dirty() == [0, 1 << 20], "what the base had of its own may count"
    world.again()
    assert world.dirty() == [0, 1 << 20]


def test_with_the_commands_of_qemu_they_stay(world: World) -> None:
    overlay = world.folder / "overlay.qcow2"
    world.run("blockdev-snapshot-sync", device="vm", snapshot_file=str(overlay))
    assert world.dirty() == []
    world.run("block-dirty-bitmap-add", node="vm", name="b0")
    world.write(1 << 20)
    assert world.dirty() == [1 << 20]
