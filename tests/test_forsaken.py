"""A commit changes its base: overlays of it that stay open must not hold the disk up, and must not
be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks, contents
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told, a_daemon

SIZE = 4 << 20


class Scene:
    """`vm`: base.raw <- vm.qcow2 <- snap.qcow2 (node `snap`), committed to the base."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder, self.daemon, self.told = folder, daemon, Told(daemon)
        self.oracle = chain_of_disks(folder, ["base.raw", "vm.qcow2"], SIZE)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def ask(self, command: str, **given: Any) -> Any:
        return self.daemon.execute(command, {k.replace("_", "-"): v for k, v in given.items()})

    def snapshot(self, command: str) -> str:
        """The disk gets an overlay with a node name; what the disk is called."""
        snap = self.path("snap.qcow2")
        if command == "blockdev-snapshot-sync":
            self.daemon.open_disk("vm", self.path("vm.qcow2"))
            self.ask(command, device="vm", snapshot_file=snap, snapshot_node_name="snap")
            return "vm"
        opening.create_image(snap, "qcow2", SIZE, {})
        for name, file, more in (
            ("base", "base.raw", {}),
            ("root", "vm.qcow2", {"backing": "base"}),
            ("snap", "snap.qcow2", {"backing": None}),
        ):
            kind = "raw" if name == "base" else "qcow2"
            lower = {"driver": "file", "filename": self.path(file)}
            self.ask("blockdev-add", driver=kind, node_name=name, file=lower, **more)
        self.daemon.start_nbd({"type": "unix", "path": self.path("nbd.sock")})
        self.ask("block-export-add", type="nbd", id="e", node_name="root", writable=True)
        self.ask(command, node="root", overlay="snap")
        return "snap"

    def commit(self, device: str) -> None:
        self.ask("block-commit", device=device, job_id="j")
        self.told.wait("BLOCK_JOB_READY", device="j")
        self.ask("job-complete", id="j")
        assert "error" not in self.told.wait("BLOCK_JOB_COMPLETED", device="j")
        self.told.wait("JOB_STATUS_CHANGE", id="j", status="null")

    def files(self) -> set[str]:
        return {Path(n["file"]).name for n in self.ask("query-named-block-nodes")}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with a_daemon() as daemon:
        yield Scene(tmp_path, daemon)


def goes_on(scene: Scene, device: str) -> None:
    """All that a disk can do, it does."""
    disk = scene.daemon.graph.disk(device)
    disk.pwrite(memoryview(b"w" * 512), 1024)
    scene.oracle[1024:1536] = b"w" * 512
    scene.ask(
        "block_resize", **{"device" if device == "vm" else "node_name": device}, size=2 * SIZE
    )
    scene.oracle += bytes(SIZE)
    for job, command, given in (
        ("m", "drive-mirror", {"sync": "full", "target": scene.path("m.raw"), "format": "raw"}),
        ("b", "drive-backup", {"sync": "full", "target": scene.path("b.raw"), "format": "raw"}),
    ):
        scene.ask(command, device=device, job_id=job, **given)
        if job == "m":
            scene.told.wait("BLOCK_JOB_READY", device=job)
            scene.ask("block-job-cancel", device=job)
        scene.told.wait("JOB_STATUS_CHANGE", id=job, status="null")
        assert (scene.folder / f"{job}.raw").read_bytes() == scene.oracle
    named = {"node_name": device, "snapshot_node_name": "again"}
    given = {"device": "vm"} if device == "vm" else named
    scene.ask("blockdev-snapshot-sync", snapshot_file=scene.path("again.qcow2"), **given)
    root = disk.root.name
    scene.commit("vm" if device == "vm" else root)
    assert contents(scene.daemon.graph.disk(device)) == scene.oracle
    assert (scene.folder / "base.raw").read_bytes() == scene.oracle


def test_the_overlay_that_a_command_has_named_is_closed(scene: Scene) -> None:
    """As in QEMU: a monitor owns only what blockdev-add has opened."""
    scene.commit(scene.snapshot("blockdev-snapshot-sync"))
    assert scene.files() == {"base.raw"}
    with pytest.raises(CowferryError, match="Failed to find node"):
        scene.ask("blockdev-del", node_name="snap")
    goes_on(scene, "vm")


def test_the_overlay_of_a_command_is_not_the_monitors_to_close(scene: Scene) -> None:
    scene.snapshot("blockdev-snapshot-sync")
    with pytest.raises(CowferryError, match="snap"):
        scene.ask("blockdev-del", node_name="snap")
    scene.daemon.remove_disk("vm")
    assert scene.files() == set()


def test_overlays_that_were_added_stay_and_do_not_hold_up_the_base(scene: Scene) -> None:
    scene.commit(scene.snapshot("blockdev-snapshot"))
    assert scene.files() == {"base.raw", "vm.qcow2", "snap.qcow2"}
    goes_on(scene, "base")
    for name in ("snap", "root"):
        scene.ask("blockdev-del", node_name=name)
    assert scene.files() == {"base.raw"}


@pytest.mark.parametrize("name", ["snap", "root"])
def test_overlays_that_are_left_are_not_read(scene: Scene, name: str) -> None:
    """What lay below them has other bytes now."""
    scene.commit(scene.snapshot("blockdev-snapshot"))
    target = scene.path("t.raw")
    opening.create_image(scene.path("over.qcow2"), "qcow2", SIZE, {})
    over = {"driver": "file", "filename": scene.path("over.qcow2")}
    for command, given in (
        ("block-export-add", {"type": "nbd", "id": "f", "node_name": name}),
        ("drive-backup", {"device": name, "sync": "full", "target": target, "job_id": "k"}),
        ("drive-mirror", {"device": name, "sync": "full", "target": target, "job_id": "k"}),
        ("block-stream", {"device": name, "job_id": "k"}),
        ("block-commit", {"device": name, "job_id": "k"}),
        ("blockdev-snapshot", {"node": "base", "overlay": name}),
        ("blockdev-mirror", {"device": "base", "sync": "full", "target": name, "job_id": "k"}),
        ("blockdev-add", {"driver": "qcow2", "node_name": "n", "file": over, "backing": name}),
        ("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": name,
                             "file": "f", "backing": "base"}]}),
    ):  # fmt: skip
        with pytest.raises(CowferryError, match=r"base\.raw', over which it lay, has changed"):
            scene.ask(command, **given)
    assert contents(scene.daemon.graph.disk("base")) == scene.oracle
    assert not scene.daemon.jobs.all()


def test_layers_that_were_committed_below_the_disk_do_not_hold_up_the_base(scene: Scene) -> None:
    scene.snapshot("blockdev-snapshot")
    opening.create_image(scene.path("top.qcow2"), "qcow2", SIZE, {})
    file = {"driver": "file", "filename": scene.path("top.qcow2")}
    scene.ask("blockdev-add", driver="qcow2", node_name="top", file=file, backing=None)
    scene.ask("blockdev-snapshot", node="snap", overlay="top")
    scene.ask("block-commit", device="top", job_id="j", top_node="snap")
    assert "error" not in scene.told.wait("BLOCK_JOB_COMPLETED", device="j")
    scene.told.wait("JOB_STATUS_CHANGE", id="j", status="null")
    for name in ("snap", "root"):
        with pytest.raises(CowferryError, match=r"base\.raw', over which it lay, has changed"):
            scene.ask("block-export-add", type="nbd", id="f", node_name=name)
    scene.commit("top")
    goes_on(scene, "base")
    for name in ("snap", "root", "top"):
        scene.ask("blockdev-del", node_name=name)
    assert scene.files() == {"base.raw"}


def test_a_mirror_that_was_cancelled_closes_the_node_that_it_has_named(scene: Scene) -> None:
    scene.daemon.open_disk("vm", scene.path("vm.qcow2"))
    scene.ask("drive-mirror", device="vm", target=scene.path("m.raw"), node_name="m", sync="full",
              job_id="j", speed=65536)  # fmt: skip
    assert "m" in [n["node-name"] for n in scene.ask("query-named-block-nodes")]
    scene.ask("job-cancel", id="j")
    scene.told.wait("JOB_STATUS_CHANGE", id="j", status="null")
    assert scene.files() == {"vm.qcow2", "base.raw"}
    assert not (scene.folder / "m.raw").exists()
