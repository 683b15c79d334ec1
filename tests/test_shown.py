"""What a partial copy does not copy shows through its target: the target is compared, not believed.

A target that exists may lie over another image than the disk, over none, or have bytes of its own
where the disk's top has a hole. In the end it reads as the disk did, also for QEMU and after a
restart.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, overlay
from cowferry.block.node import chain
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told, a_daemon
from tests_support import need

SIZE = 2 << 20
KIB = 1 << 10
OPTIONS = {"cluster_size": "4096"}


def filled(path: Path, seed: int, parts: list[tuple[int, int]], size: int = SIZE) -> bytearray:
    """A qcow2 image with random bytes at these (offset, length)."""
    opening.create_image(str(path), "qcow2", size, OPTIONS)
    flat = bytearray(size)
    node = opening.open_image(str(path))
    for offset, length in parts:
        data = random.Random(seed + offset).randbytes(length)
        node.pwrite(memoryview(data), offset)
        flat[offset : offset + length] = data
    node.close()
    return flat


def write(path: Path, offset: int, data: bytes, **more: Any) -> None:
    node = opening.open_image(str(path), **more)
    node.pwrite(memoryview(data), offset)
    opening.close_chain(node)


class Scene:
    """`vm`: base.qcow2 <- vm.qcow2, with holes, zeroes and data in each."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder, self.daemon, self.told = folder, daemon, Told(daemon)
        self.base = filled(folder / "base.qcow2", 1, [(0, 900 * KIB), (1200 * KIB, 700 * KIB)])
        overlay(folder, "vm.qcow2", "base.qcow2", "qcow2", SIZE, **OPTIONS)
        write(folder / "vm.qcow2", 30 * KIB, random.Random(2).randbytes(80_000))
        self.disk = daemon.open_disk("vm", str(folder / "vm.qcow2"))
        self.disk.zero(300 * KIB, 64 * KIB)
        self.disk.flush()
        self.target = folder / "t.qcow2"

    def run(self, command: str, **more: Any) -> None:
        self.daemon.execute(command, {"device": "vm", "job-id": "j", "sync": "top", **more})

    def over(self) -> None:
        assert "error" not in self.told.wait("BLOCK_JOB_COMPLETED", device="j")
        self.told.wait("JOB_STATUS_CHANGE", id="j", status="null")

    def check(self, want: bytearray) -> None:
        """As qemu-img reads the target, and as we do when it is opened again."""
        out = self.folder / "out.raw"
        command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw"]
        subprocess.run([*command, str(self.target), str(out)], check=True, timeout=60)
        assert not differs(out.read_bytes(), want)
        node = opening.open_image(str(self.target), read_only=True, force_share=True)
        assert not differs(contents(node), want)
        opening.close_chain(node)
        subprocess.run(["qemu-img", "check", "-qU", str(self.target)], check=True, timeout=60)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    need("qemu-img")
    with a_daemon() as daemon:
        yield Scene(tmp_path, daemon)


def over_none(scene: Scene) -> None:
    filled(scene.target, 3, [])


def over_the_same(scene: Scene) -> None:
    overlay(scene.folder, "t.qcow2", "base.qcow2", "qcow2", SIZE, **OPTIONS)


def with_own_data(scene: Scene) -> None:
    over_the_same(scene)
    write(scene.target, 700 * KIB + 5, b"own" * 40_000)
    write(scene.target, 1900 * KIB, b"\0" * 8192)


def over_a_copy(scene: Scene) -> None:
    """Of the base, which was brought there before."""
    filled(scene.folder / "copy.qcow2", 1, [(0, 900 * KIB), (1200 * KIB, 700 * KIB)])
    overlay(scene.folder, "t.qcow2", "copy.qcow2", "qcow2", SIZE, **OPTIONS)


def over_another(scene: Scene) -> None:
    filled(scene.folder / "other.qcow2", 7, [(100 * KIB, 500 * KIB), (1500 * KIB + 100, 7)])
    overlay(scene.folder, "t.qcow2", "other.qcow2", "qcow2", SIZE, **OPTIONS)


def over_a_shorter_one(scene: Scene) -> None:
    filled(scene.folder / "short.qcow2", 1, [(0, 100 * KIB)], 128 * KIB)
    overlay(scene.folder, "t.qcow2", "short.qcow2", "qcow2", SIZE, **OPTIONS)


def over_the_same_as_raw(scene: Scene) -> None:
    """The header has the right name, and another format."""
    overlay(scene.folder, "t.qcow2", "base.qcow2", "raw", SIZE, **OPTIONS)


def over_a_link(scene: Scene) -> None:
    (scene.folder / "link.qcow2").symlink_to(scene.folder / "base.qcow2")
    overlay(scene.folder, "t.qcow2", "link.qcow2", "qcow2", SIZE, **OPTIONS)


TARGETS: list[Callable[[Scene], None]] = [
    over_none, over_the_same, with_own_data, over_a_copy, over_another, over_a_shorter_one,
    over_the_same_as_raw, over_a_link,
]  # fmt: skip
TRUSTED = (over_none, over_the_same, over_a_link)  # nothing but the top is copied


def target_node(scene: Scene, chain: bool) -> str:
    options = opening.image_options(str(scene.target), "qcow2")
    if not chain:
        options["backing"] = None
    scene.daemon.execute("blockdev-add", {**options, "node-name": "t"})
    return "t"


def start(scene: Scene, kind: str, how: str, **more: Any) -> None:
    command = {"file": f"drive-{kind}", "chain": f"blockdev-{kind}", "null": f"blockdev-{kind}"}
    if how == "file":
        given = {"target": str(scene.target), "mode": "existing", "format": "qcow2"}
        scene.run(command[how], **given, **more)
    else:
        scene.run(command[how], target=target_node(scene, how == "chain"), **more)


@pytest.mark.parametrize("how", ["file", "chain"])
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("make", TARGETS)
def test_a_shallow_copy_reads_as_the_disk(
    scene: Scene, make: Callable[[Scene], None], how: str, mode: str
) -> None:
    make(scene)
    start(scene, "mirror", how, **{"copy-mode": mode})
    scene.disk.pwrite(memoryview(b"early" * 9000), 650 * KIB)
    scene.told.wait("BLOCK_JOB_READY", device="j")
    scene.disk.pwrite(memoryview(b"late" * 9000), 1000 * KIB + 3)
    want = contents(scene.disk)
    scene.daemon.execute("job-complete", {"id": "j"})
    scene.over()
    assert scene.disk.root.filename == str(scene.target)
    assert contents(scene.disk) == want
    scene.disk.flush()
    scene.check(want)
    if make in TRUSTED and how == "file":
        held = sum(e.length for e in scene.disk.root.extents_with_data())
        assert held < 400 * KIB, "what the base has was copied, too"
        scene.daemon.remove_disk("vm")
        again = scene.daemon.open_disk("vm", str(scene.folder / "vm.qcow2"))
        assert [n.driver for n in chain(again.root)] == ["qcow2", "qcow2"]
        assert contents(again) == want


@pytest.mark.parametrize("how", ["file", "chain"])
@pytest.mark.parametrize("make", TARGETS)
def test_a_backup_of_the_top_reads_as_the_disk_did(
    scene: Scene, make: Callable[[Scene], None], how: str
) -> None:
    make(scene)
    want = contents(scene.disk)
    start(scene, "backup", how, speed=4 << 20)
    for offset in (0, 705 * KIB, 1300 * KIB, 1890 * KIB):
        scene.disk.pwrite(memoryview(b"later" * 9000), offset)
    scene.daemon.execute("block-job-set-speed", {"device": "j", "speed": 0})
    scene.over()
    scene.check(want)


@pytest.mark.parametrize("kind", ["mirror", "backup"])
def test_a_node_without_its_backing_is_taken_if_its_header_names_the_right_one(
    scene: Scene, kind: str
) -> None:
    with_own_data(scene)
    want = contents(scene.disk)
    start(scene, kind, "null")
    if kind == "mirror":
        scene.told.wait("BLOCK_JOB_READY", device="j")
        scene.daemon.execute("block-job-cancel", {"device": "j"})
    scene.over()
    scene.check(want)


@pytest.mark.parametrize("kind", ["mirror", "backup"])
@pytest.mark.parametrize("make", [over_another, over_the_same_as_raw])
def test_a_node_without_its_backing_is_refused_if_its_header_names_another(
    scene: Scene, kind: str, make: Callable[[Scene], None]
) -> None:
    make(scene)
    before = scene.target.read_bytes()
    with pytest.raises(CowferryError, match="names another backing file"):
        start(scene, kind, "null")
    assert scene.target.read_bytes() == before


def test_a_copy_of_what_is_written_from_now_on_shows_the_disk_below_it(scene: Scene) -> None:
    """sync=none: what the overlay had of its own does not hide the disk."""
    overlay(scene.folder, "t.qcow2", "vm.qcow2", "qcow2", SIZE, **OPTIONS)
    write(scene.target, 700 * KIB, b"own" * 9000, backing=False)
    given = {"target": str(scene.target), "mode": "existing", "format": "qcow2", "sync": "none"}
    scene.run("drive-mirror", **given)
    scene.told.wait("BLOCK_JOB_READY", device="j")
    scene.disk.pwrite(memoryview(b"late" * 9000), 1000 * KIB + 3)
    want = contents(scene.disk)
    scene.daemon.execute("job-complete", {"id": "j"})
    scene.over()
    assert contents(scene.disk) == want
    scene.disk.flush()
    scene.check(want)


def test_a_copy_of_what_is_written_from_now_on_lies_over_nothing_else(scene: Scene) -> None:
    over_another(scene)
    with pytest.raises(CowferryError, match="and not over 'vm'"):
        scene.run("blockdev-mirror", target=target_node(scene, chain=True), sync="none")
    assert not scene.daemon.jobs.all()
