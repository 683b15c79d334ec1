"""Block devices as targets and bases: real ones, loop devices over files.

A device is not made, may be larger than the disk, and has its records in the state folder.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chains import chain_of_disks, contents, differs
from cowferry.block import keeper, moves, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.cli.offline.resize import resize_command
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told, a_daemon
from loops import loop
from mounts import Device, device

__all__ = ["device"]  # a fixture

SIZE = 4 << 20


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[tuple[Daemon, Told, bytearray]]:
    oracle = chain_of_disks(tmp_path, ["base.raw", "vm.qcow2"], SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        yield daemon, told, oracle


def pivot(daemon: Daemon, told: Told, command: str, **arguments: Any) -> None:
    """Start a job, let it get ready, complete it, and wait until it is gone."""
    plain = {k.replace("_", "-"): v for k, v in arguments.items()}
    daemon.execute(command, {"device": "vm", "job-id": "j", **plain})
    told.wait("BLOCK_JOB_READY")
    daemon.execute("job-complete", {"id": "j"})
    assert "error" not in told.wait("BLOCK_JOB_COMPLETED")
    told.wait("JOB_STATUS_CHANGE", status="null")


@pytest.mark.parametrize("command", ["x-disk-copy", "drive-mirror"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("spare", [0, 3 << 20])
def test_a_disk_moves_to_a_device_and_is_found_there(
    scene: tuple[Daemon, Told, bytearray], device: Device, tmp_path: Path,
    command: str, format: str, spare: int,
) -> None:  # fmt: skip
    daemon, told, oracle = scene
    if format == "qcow2":
        spare += 1 << 20  # for the tables
    path = device(SIZE + spare)
    more = {"sync": "full"} if command == "drive-mirror" else {}
    pivot(daemon, told, command, target=path, format=format, **more)
    disk = daemon.graph.disk("vm")
    assert disk.root.filename == path and disk.size == SIZE
    assert not differs(contents(disk), oracle)
    daemon.remove_disk("vm")
    again = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))  # by its first name
    assert again.root.filename == path
    assert again.size == SIZE, "the disk has grown because the device is larger"
    assert not differs(contents(again), oracle)
    if format == "raw":
        with open(path, "rb") as f:
            f.seek(SIZE)
            assert f.read() == b"\xaa" * spare, "something was written beyond the disk's end"


def test_from_device_to_device_and_down_into_one(
    scene: tuple[Daemon, Told, bytearray], device: Device, tmp_path: Path
) -> None:
    daemon, told, oracle = scene
    one, two = device(SIZE), device(2 * SIZE)
    for path in (one, two, one):
        pivot(daemon, told, "x-disk-copy", target=path, format="raw")
        assert moves.follow(str(tmp_path / "vm.qcow2")).path == path
    daemon.execute(
        "blockdev-snapshot-sync", {"device": "vm", "snapshot-file": str(tmp_path / "over.qcow2")}
    )
    daemon.graph.disk("vm").pwrite(memoryview(b"z" * 70_000), 1000)
    oracle[1000:71_000] = b"z" * 70_000
    pivot(daemon, told, "block-commit")
    disk = daemon.graph.disk("vm")
    assert disk.root.filename == one
    assert not differs(contents(disk), oracle)
    assert moves.follow(str(tmp_path / "vm.qcow2")).path == one


@pytest.mark.parametrize("command", ["x-disk-copy", "drive-mirror"])
def test_a_device_that_is_too_small_is_refused(
    scene: tuple[Daemon, Told, bytearray], device: Device, command: str
) -> None:
    daemon, _, oracle = scene
    path = device(SIZE // 2)
    more = {"sync": "full"} if command == "drive-mirror" else {}
    with pytest.raises(CowferryError, match=path):
        daemon.execute(command, {"device": "vm", "target": path, "format": "raw", **more})
    assert daemon.execute("query-jobs", {}) == []
    assert not differs(contents(daemon.graph.disk("vm")), oracle)
    with open(path, "rb") as f:
        assert f.read() == b"\xaa" * (SIZE // 2)


def test_B2_bitmaps_of_a_device_lie_in_the_state_folder_and_know_the_device(
    device: Device, tmp_path: Path
) -> None:
    path = device(SIZE)
    disk = Disk(opening.open_image(path, "raw"), "vm")
    with disk.exclusive():
        keeper.keep(disk.root, Bitmap("b0", SIZE))
    disk.pwrite(memoryview(b"x"), 0)
    (file,) = (tmp_path / "state").iterdir()
    assert file.name.endswith(".bitmaps")
    in_use = file.read_bytes()
    opening.close_chain(disk.root)
    at_rest = file.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    for same in (True, False):
        for found in (at_rest, in_use):
            file.write_bytes(found)
            node = opening.open_image(path, "raw", read_only=True)
            bitmap = node.bitmaps["b0"]
            assert bitmap.inconsistent != same and bitmap.any(0, 1)
            opening.close_chain(node)
        subprocess.run(["losetup", "-d", path], check=True)
        subprocess.run(["losetup", path, str(other)], check=True)


def grow(device: str, size: int) -> None:
    """What lvextend does to a logical volume."""
    listed = subprocess.run(
        ["losetup", "-n", "-O", "BACK-FILE", device], capture_output=True, text=True, check=True
    )
    with open(listed.stdout.strip(), "ab") as f:
        f.write(b"\xbb" * (size - f.tell()))
    subprocess.run(["losetup", "-c", device], check=True)


def test_a_disk_on_a_device_grows_when_the_device_has_grown(device: Device) -> None:
    path = device(SIZE)
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", path, "raw")
        with pytest.raises(CowferryError, match=f"the device has {SIZE} bytes, not {2 * SIZE}"):
            daemon.execute("block_resize", {"device": "vm", "size": 2 * SIZE})
        grow(path, 2 * SIZE)
        daemon.execute("block_resize", {"device": "vm", "size": 2 * SIZE})
        assert disk.size == 2 * SIZE
        disk.pwrite(memoryview(b"new"), 2 * SIZE - 3)
        assert contents(disk)[:SIZE] == b"\xaa" * SIZE


def test_a_disk_that_is_all_of_a_device_becomes_no_smaller(device: Device) -> None:
    path = device(SIZE)
    done = CliRunner().invoke(resize_command, ["-f", "raw", "--shrink", path, str(SIZE // 2)])
    assert "cannot be made smaller" in str(done.exception) and done.exit_code == 1
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", path, "raw")
        with pytest.raises(CowferryError, match="cannot be made smaller"):
            daemon.execute("block_resize", {"device": "vm", "size": SIZE // 2})
        assert disk.size == SIZE
        assert contents(disk) == b"\xaa" * SIZE


@pytest.mark.parametrize("grown", [False, True])
def test_a_disk_that_moved_to_a_larger_device_grows_there_and_stays_so(
    scene: tuple[Daemon, Told, bytearray], device: Device, tmp_path: Path, grown: bool
) -> None:
    daemon, told, oracle = scene
    path = device(SIZE if grown else 2 * SIZE)
    between = tmp_path / "between.raw"
    pivot(daemon, told, "x-disk-copy", target=str(between), format="raw")
    pivot(daemon, told, "x-disk-copy", target=path, format="raw")
    if grown:
        grow(path, 2 * SIZE)
    size = SIZE + (1 << 20)
    with pytest.raises(CowferryError, match=f"has {2 * SIZE} bytes, not {3 * SIZE}"):
        daemon.execute("block_resize", {"device": "vm", "size": 3 * SIZE})
    daemon.execute("block_resize", {"device": "vm", "size": size})
    oracle.extend(bytes(size - SIZE))  # not what the device held
    disk = daemon.graph.disk("vm")
    assert disk.size == size and not differs(contents(disk), oracle)
    disk.pwrite(memoryview(b"end"), size - 3)
    oracle[size - 3 :] = b"end"
    for name in (tmp_path / "vm.qcow2", between):  # all names lead to the disk with its new size
        daemon.remove_disk("vm")
        disk = daemon.open_disk("vm", str(name))
        assert disk.root.filename == path
        assert not differs(contents(disk), oracle)
    pivot(daemon, told, "x-disk-copy", target=str(tmp_path / "away.raw"), format="raw")
    pivot(daemon, told, "x-disk-copy", target=path, format="raw")
    daemon.remove_disk("vm")
    disk = daemon.open_disk("vm", str(between))
    assert not differs(contents(disk), oracle)
    if grown:
        return
    daemon.execute("block_resize", {"device": "vm", "size": SIZE})
    daemon.execute("block_resize", {"device": "vm", "size": size})
    assert not differs(contents(disk), oracle[:SIZE] + bytes(size - SIZE))
    daemon.remove_disk("vm")
    opening.create_image(path, "raw", 2 * SIZE, {})  # another image: no record is about it
    assert not [p.name for p in (tmp_path / "state").iterdir() if p.name.endswith(".size")]


def test_a_window_that_is_not_a_disk_of_its_own_keeps_its_size(
    device: Device, tmp_path: Path
) -> None:
    path = device(2 * SIZE)
    file = {"driver": "host_device", "filename": path}
    for options in ({"offset": SIZE, "size": SIZE // 2}, {"offset": SIZE}):
        node = opening.open_node({"driver": "raw", "file": file, **options})
        with pytest.raises(CowferryError, match="fixed size"):
            node.resize(SIZE)
        node.close()
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(SIZE))
    file = {"driver": "file", "filename": str(plain)}
    node = opening.open_node({"driver": "raw", "size": SIZE // 2, "file": file})
    with pytest.raises(CowferryError, match="fixed size"):
        node.resize(SIZE)
    node.close()


def test_a_size_that_cannot_be_recorded_is_refused(
    scene: tuple[Daemon, Told, bytearray], device: Device, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    daemon, told, oracle = scene
    path = device(2 * SIZE)
    pivot(daemon, told, "x-disk-copy", target=path, format="raw")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "rename", full)
        with pytest.raises(CowferryError, match="No space left"):
            daemon.execute("block_resize", {"device": "vm", "size": 2 * SIZE})
    disk = daemon.graph.disk("vm")
    assert disk.size == SIZE and not differs(contents(disk), oracle)
    daemon.remove_disk("vm")
    assert daemon.open_disk("vm", str(tmp_path / "vm.qcow2")).size == SIZE


def test_a_read_only_device_is_read_and_never_opened_for_writing(
    tmp_path: Path,
) -> None:
    (tmp_path / "d.img").write_bytes(bytes(SIZE))
    with loop(tmp_path / "d.img", "-r") as where:
        with pytest.raises(CowferryError, match="the device is read-only"):
            opening.open_image(where, "raw")
        node = opening.open_image(where, "raw", read_only=True)
        with pytest.raises(OSError, match="read-only"):
            node.reopen(False)
        assert contents(node) == bytes(SIZE)
        node.close()


def test_a_commit_into_a_read_only_device_leaves_no_mark(tmp_path: Path) -> None:
    (tmp_path / "d.img").write_bytes(bytes(SIZE))
    with loop(tmp_path / "d.img", "-r") as where, a_daemon() as daemon:
        told, over = Told(daemon), str(tmp_path / "over.qcow2")
        opening.create_image(over, "qcow2", SIZE, {"backing_file": where, "backing_fmt": "raw"})
        daemon.open_disk("vm", over).pwrite(memoryview(b"w" * 4096), 0)
        daemon.execute("block-commit", {"device": "vm", "job-id": "j"})
        error = told.wait("BLOCK_JOB_COMPLETED", device="j")["error"]
        assert "read-only" in error
        assert moves.half_committed(where) is None
        daemon.remove_disk("vm")
