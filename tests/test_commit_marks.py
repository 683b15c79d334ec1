"""C2: once a commit has changed a byte of its base, the base is marked as of no use by itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from chains import contents
from cowferry.block import moves
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import ImageError
from cowferry.jobs.commit import ActiveCommit, Commit, Into
from daemons import Told
from mounts import MiB, Mount, empty, fill, mount

__all__ = ["mount"]

SIZE = 4 * MiB
FORMATS = ("raw", "qcow2", "qed")


class Scene:
    """`vm`: base <- sn1 <- vm, the base on a small file system, the others elsewhere."""

    def __init__(self, folder: Path, small: Path, format: str) -> None:
        self.folder, self.small = folder, small
        self.base = small / f"base.{format}"
        opening.create_image(str(self.base), format, SIZE, {})
        node = opening.open_image(str(self.base))
        node.pwrite(memoryview(b"base" * 16384), 0)
        node.close()
        self.before = self.read()
        below, kind = str(self.base), format
        for name in ("sn1", "vm"):
            path = str(folder / f"{name}.qcow2")
            given = {"backing_file": below, "backing_fmt": kind}
            opening.create_image(path, "qcow2", SIZE, given)
            node = opening.open_image(path)
            node.pwrite(memoryview(random.Random(name).randbytes(1 << 20)), 1 << 20)
            opening.close_chain(node)
            below, kind = path, "qcow2"
        self.daemon = Daemon()
        self.told = Told(self.daemon)
        self.open()

    def open(self) -> None:
        self.disk = self.daemon.open_disk("vm", str(self.folder / "vm.qcow2"))

    def read(self) -> bytearray:
        node = opening.open_image(str(self.base), read_only=True)
        try:
            return contents(node)
        finally:
            node.close()

    def commit(self, active: bool, **more: object) -> None:
        top = {} if active else {"top": str(self.folder / "sn1.qcow2")}
        self.daemon.execute("block-commit", {"device": "vm", "job-id": "c", **top, **more})

    def failed(self) -> str:
        error = str(self.told.wait("BLOCK_JOB_COMPLETED", device="c")["error"])
        self.told.wait("JOB_STATUS_CHANGE", id="c", status="null")
        return error

    def by_itself(self) -> bytearray:
        """The base, opened as a disk of its own."""
        self.daemon.remove_disk("vm")
        disk = self.daemon.open_disk("base", str(self.base))
        try:
            return contents(disk)
        finally:
            self.daemon.remove_disk("base")

    def commits(self, active: bool) -> None:
        """There is room again: the same command ends well."""
        self.open()
        want = contents(self.disk)
        self.commit(active)
        if active:
            self.told.wait("BLOCK_JOB_READY", device="c")
            self.daemon.execute("job-complete", {"id": "c"})
        assert "error" not in self.told.wait("BLOCK_JOB_COMPLETED", device="c")
        self.told.wait("JOB_STATUS_CHANGE", id="c", status="null")
        assert contents(self.disk) == want
        assert moves.half_committed(str(self.base)) is None


@pytest.fixture(params=FORMATS)
def scene(request: pytest.FixtureRequest, tmp_path: Path, mount: Mount) -> Iterator[Scene]:
    small = mount("tmpfs", "24m")
    made = Scene(tmp_path, small, request.param)
    yield made
    made.daemon.close()


@pytest.mark.parametrize("active", [False, True])
def test_a_commit_that_found_no_room_leaves_its_base_as_it_was(scene: Scene, active: bool) -> None:
    fill(scene.small)
    scene.commit(active)
    assert "No space" in scene.failed()
    empty(scene.small)
    assert scene.by_itself() == scene.before
    scene.commits(active)


@pytest.mark.parametrize("active", [False, True])
def test_a_commit_that_could_not_grow_its_base_leaves_it_as_it_was(
    scene: Scene, active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.daemon.resize("vm", 2 * SIZE)
    if not active:
        scene.daemon.execute(
            "blockdev-snapshot-sync",
            {"device": "vm", "snapshot-file": str(scene.folder / "top.qcow2")},
        )
    base = next(n for n in scene.daemon.graph.every_node() if n.filename == str(scene.base)
                and n.file is not None)  # fmt: skip

    def no_room(size: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(base, "change_size", no_room)
        top = {} if active else {"top": str(scene.folder / "vm.qcow2")}
        scene.daemon.execute("block-commit", {"device": "vm", "job-id": "c", **top})
        assert "No space" in scene.failed()
    assert not [p for f in (scene.small, scene.folder) for p in f.glob("*.committing")]
    assert scene.by_itself() == scene.before


@pytest.mark.parametrize("active", [False, True])
def test_a_commit_that_was_cancelled_before_it_began_leaves_its_base_as_it_was(
    scene: Scene, active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Into.begin

    def cancelled(self: Into) -> None:
        begin(self)
        scene.daemon.execute("job-cancel", {"id": "c"})
        raise OSError(5, "the job looks at a cancel after an error")

    monkeypatch.setattr(Into, "begin", cancelled)
    scene.commit(active)
    scene.told.wait("BLOCK_JOB_CANCELLED", device="c")
    scene.told.wait("JOB_STATUS_CHANGE", id="c", status="null")
    assert scene.by_itself() == scene.before


@pytest.mark.parametrize("active", [False, True])
def test_a_base_that_has_a_part_is_of_no_use_by_itself(scene: Scene, active: bool) -> None:
    scene.commit(active, speed=128 << 10)
    job = scene.daemon.jobs.get("c")
    assert isinstance(job, Commit | ActiveCommit)
    with job.changed:
        assert job.changed.wait_for(lambda: job.into.touched, 30)
    scene.daemon.execute("job-cancel", {"id": "c"})
    scene.told.wait("BLOCK_JOB_CANCELLED", device="c")
    scene.told.wait("JOB_STATUS_CHANGE", id="c", status="null")
    with pytest.raises(ImageError, match="cannot be used by itself"):
        scene.by_itself()
    fill(scene.small)  # a second one that fails does not take the first one's mark away
    scene.open()
    scene.commit(active)
    scene.failed()
    empty(scene.small)
    with pytest.raises(ImageError, match="cannot be used by itself"):
        scene.by_itself()
    scene.commits(active)
