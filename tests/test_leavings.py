"""What an operation made is gone if it failed, and what was there stays: devices, empty files,
other disks, headers."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks, contents
from cowferry.block import moves
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told, a_daemon
from loops import loop

SIZE = 4 << 20


class Scene:
    """`vm`: base.raw <- vm.qcow2; `two`: two.raw, exported."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder, self.daemon, self.told = folder, daemon, Told(daemon)
        self.oracle = chain_of_disks(folder, ["base.raw", "vm.qcow2"], SIZE)
        self.disk = daemon.open_disk("vm", str(folder / "vm.qcow2"))
        (folder / "two.raw").write_bytes(b"2" * SIZE)
        self.two = daemon.open_disk("two", self.path("two.raw"))
        daemon.start_nbd({"type": "unix", "path": self.path("nbd.sock")})
        daemon.add_export(self.two, "two")
        self.uri = f"nbd+unix:///two?socket={self.path('nbd.sock')}"

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def ended(self, job: str) -> None:
        self.told.wait("JOB_STATUS_CHANGE", id=job, status="null")

    def intact(self) -> None:
        assert contents(self.disk) == self.oracle
        assert contents(self.two) == b"2" * SIZE
        assert not self.daemon.graph.claims and not self.daemon.jobs.all()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with a_daemon() as daemon:
        yield Scene(tmp_path, daemon)


def test_a_device_node_stays_when_a_copy_to_it_is_called_off(scene: Scene) -> None:
    (scene.folder / "store").write_bytes(bytes(SIZE))
    with loop(scene.folder / "store") as device:
        alias = scene.path("device")
        os.mknod(alias, 0o600 | stat.S_IFBLK, os.stat(device).st_rdev)
        given = {"device": "vm", "target": alias, "job-id": "j", "speed": 65536}
        scene.daemon.execute("x-disk-copy", given)
        scene.daemon.execute("job-cancel", {"id": "j"})
        scene.ended("j")
        assert stat.S_ISBLK(os.stat(alias).st_mode)
        scene.intact()


@pytest.mark.parametrize(
    "command", ["x-disk-copy", "drive-mirror", "blockdev-mirror", "x-disk-backup", "drive-backup",
                "blockdev-backup"],
)  # fmt: skip
def test_an_export_of_another_disk_of_ours_is_no_target(scene: Scene, command: str) -> None:
    """Its guest has its data there."""
    given: dict[str, Any] = {"device": "vm", "target": scene.uri, "job-id": "j"}
    if command == "x-disk-backup":
        given = {"id": "j", "disks": [{"device": "vm", "target": scene.uri}]}
    elif command.startswith("drive-"):
        given |= {"sync": "full", "mode": "existing", "format": "raw"}
    elif command.startswith("blockdev-"):
        server = {"type": "unix", "path": scene.path("nbd.sock")}
        node = {"driver": "nbd", "node-name": "far", "server": server, "export": "two"}
        scene.daemon.execute("blockdev-add", node)
        given |= {"sync": "full", "target": "far"}
    with pytest.raises(CowferryError, match="is an export of disk 'two'"):
        scene.daemon.execute(command, given)
    scene.intact()


@pytest.mark.parametrize("command", ["x-disk-copy", "x-disk-backup"])
def test_a_target_that_another_job_writes_is_in_use(scene: Scene, command: str) -> None:
    target = scene.path("copy.raw")
    scene.daemon.execute("x-disk-copy", {"device": "two", "target": target, "job-id": "j"})
    scene.told.wait("BLOCK_JOB_READY", device="j")
    given: dict[str, Any] = {"device": "vm", "target": target, "format": "raw"}
    with pytest.raises(CowferryError) as error:
        if command == "x-disk-copy":
            scene.daemon.execute(command, given)
        else:
            scene.daemon.execute(command, {"disks": [given]})
    assert "remove" not in error.value.hint
    if command == "x-disk-copy":
        assert "in use" in error.value.desc, error.value.desc
    scene.daemon.execute("job-cancel", {"id": "j"})
    scene.ended("j")
    assert not os.path.exists(target)
    scene.intact()


@pytest.mark.parametrize("command", ["x-disk-copy", "drive-mirror", "x-disk-backup"])
@pytest.mark.parametrize("ending", ["refused", "called off"])
def test_an_empty_file_is_empty_again(
    scene: Scene, command: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody made it, with a mode of its own."""
    target = scene.path("new.qcow2")
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o640))
    os.chmod(target, 0o640)
    one = {"device": "vm", "target": target, "format": "qcow2"}
    given: dict[str, Any] = {**one, "job-id": "j", "speed": 65536}
    if command == "x-disk-backup":
        given = {"id": "j", "disks": [one], "speed": 65536}
    elif command == "drive-mirror":
        given["sync"] = "full"
    if ending == "refused":

        def adopt(*_: object, **__: object) -> None:
            raise CowferryError("it cannot be opened")

        monkeypatch.setattr(scene.daemon.graph, "adopt", adopt)
        with pytest.raises(CowferryError, match="it cannot be opened"):
            scene.daemon.execute(command, given)
    else:
        scene.daemon.execute(command, given)
        scene.daemon.execute("job-cancel", {"id": "j"})
        scene.ended("j")
    found = os.stat(target)
    assert found.st_size == 0 and stat.S_IMODE(found.st_mode) == 0o640
    assert not [name for name in os.listdir(scene.folder) if name.startswith("new.qcow2.")]
    scene.intact()


def test_the_header_of_an_overlay_is_as_it_was_if_the_snapshot_fails(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names no backing file, and gets the name when the disk moves."""
    path = scene.path("over.qcow2")
    opening.create_image(path, "qcow2", SIZE, {})
    before = opening.open_image(path)
    opening.close_chain(before)
    assert before.backing_spec is None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(moves, "record", full)
    given = {"device": "vm", "snapshot-file": path, "mode": "existing"}
    with pytest.raises(CowferryError):
        scene.daemon.execute("blockdev-snapshot-sync", given)
    monkeypatch.undo()
    after = opening.open_image(path)
    opening.close_chain(after)
    assert after.backing_spec is None
    scene.intact()
    scene.daemon.execute("blockdev-snapshot-sync", given)
    assert scene.disk.root.filename == path and scene.disk.root.backing_spec is not None
