"""New images: a refused or failed creation changes nothing, and what is there is replaced whole."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import contents
from cowferry.block import keeper, moves, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.moves import Move
from cowferry.drivers import fdsets, opening
from cowferry.errors import CowferryError, DeviceInUse, ImageError
from daemons import Told, a_daemon
from loops import loop, mounted, ran
from tests_support import need

MiB = 1 << 20
SIZE = MiB
OLD = bytes(range(1, 255)) * (SIZE // 254 + 1)
OLD = OLD[:SIZE]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWFERRY_STATE", str(tmp_path / "state"))


def everything(folder: Path) -> dict[str, Any]:
    """Of every file: its bytes, and what `stat` says of it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        st = os.lstat(path)
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif stat.S_ISREG(st.st_mode):
            also = st.st_ino, st.st_mode, st.st_uid, st.st_nlink, st.st_mtime_ns, st.st_blocks
            found[str(path)] = path.read_bytes(), also
    return found


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = everything(folder)
    yield
    assert everything(folder) == before


def an_image(path: Path, format: str = "qcow2", **options: str) -> Path:
    """An image full of bytes, with all that can be recorded of one."""
    opening.create_image(str(path), format, SIZE, options)
    node = opening.open_image(str(path), format)
    node.pwrite(memoryview(OLD), 0)
    keeper.keep(node, Bitmap("b", node.size, 65536, persistent=True))
    opening.close_chain(node)
    there = path.parent / "elsewhere.raw"
    there.write_bytes(OLD)
    moves.record([Move("vm", str(path), str(there), "raw")])
    moves.committing(str(path), str(path.parent / "top"))
    moves.copying(str(path), str(path.parent / "source"), "b", SIZE, 1)
    return path


@pytest.fixture
def limit() -> Iterator[None]:
    """No file of this process grows beyond 2 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MiB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


BAD: list[tuple[str, int, dict[str, str], str]] = [
    ("qcow2", SIZE, {"cluster_size": "7"}, "Cluster size"),
    ("qcow2", SIZE, {"no_such": "1"}, "no option 'no_such'"),
    ("qcow2", SIZE, {"preallocation": "some"}, "does not accept value 'some'"),
    ("qcow2", SIZE, {"lazy_refcounts": "maybe"}, "expects 'on' or 'off'"),
    ("qcow2", 1 << 62, {"cluster_size": "512"}, "larger clusters"),
    ("qcow2", SIZE, {"backing_file": "x"}, "format"),
    ("qcow2", SIZE, {"backing_fmt": "raw"}, "without backing file"),
    ("qed", SIZE, {"backing_fmt": "raw"}, "without backing file"),
    ("qcow2", SIZE, {"data_file": "vm.image"}, "its own data file"),
    ("qcow2", 7 << 60, {"data_file": "data.raw"}, "bytes"),
    ("qcow2", SIZE, {"data_file": "no/such/folder"}, "No such file or directory"),
    ("raw", 7 << 60, {}, "File too large"),
    ("raw", SIZE, {"preallocation": "metadata"}, "does not accept value 'metadata'"),
    ("raw", SIZE, {"extent_size_hint": "x"}, "expects a size"),
    ("raw", SIZE, {"backing_file": "x"}, "format"),
    ("qed", 1 << 60, {}, "at most"),
    ("throttle", SIZE, {}, "does not support image creation"),
]


@pytest.mark.parametrize(("format", "size", "options", "why"), BAD)
def test_a_refused_creation_changes_nothing(
    tmp_path: Path, format: str, size: int, options: dict[str, str], why: str
) -> None:
    path = an_image(tmp_path / "vm.image")
    with unchanged(tmp_path), pytest.raises(CowferryError, match=why):
        opening.create_image(str(path), format, size, options)


@pytest.mark.parametrize("format", ["qcow2", "raw", "qed", "file"])
def test_an_image_in_use_is_named_and_keeps_its_records(tmp_path: Path, format: str) -> None:
    path = an_image(tmp_path / "vm.image")
    node = opening.open_image(str(path), "qcow2")
    with unchanged(tmp_path), pytest.raises(DeviceInUse, match=str(path)):
        opening.create_image(str(path), format, SIZE, {})
    opening.close_chain(node)


def test_a_data_file_in_use_is_named_and_keeps_its_bytes(tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    data.write_bytes(OLD)
    node = opening.open_image(str(data))
    with unchanged(tmp_path), pytest.raises(DeviceInUse, match=str(data)):
        opening.create_image(str(tmp_path / "new.qcow2"), "qcow2", SIZE, {"data_file": "data.raw"})
    opening.close_chain(node)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("how", ["full", "falloc"])
def test_an_image_that_does_not_fit_leaves_the_old_one_and_takes_no_room(
    tmp_path: Path, limit: None, format: str, how: str
) -> None:
    path = an_image(tmp_path / "vm.image")
    with unchanged(tmp_path), pytest.raises(ImageError, match="File too large") as error:
        opening.create_image(str(path), format, 4 * MiB, {"preallocation": how})
    assert "ulimit" in error.value.hint and "nothing was changed" in error.value.hint
    assert ".new" not in error.value.desc


@pytest.mark.parametrize("linked", [False, True], ids=["replaced", "in place"])
def test_preallocation_that_does_not_fit_gives_the_room_back(tmp_path: Path, linked: bool) -> None:
    with open(tmp_path / "disk.img", "wb") as f:
        f.truncate(24 * MiB)
    with loop(tmp_path / "disk.img") as device, mounted(device, tmp_path / "m") as small:
        path = small / "vm.raw"
        path.write_bytes(OLD)
        if linked:
            os.link(path, small / "other")
        free = os.statvfs(small).f_bfree
        for format, how, size in (
            ("raw", "falloc", 64 * MiB),
            ("qcow2", "falloc", 64 * MiB),
            ("raw", "full", 64 * MiB),
            ("qcow2", "metadata", 1 << 40),
        ):
            with unchanged(small), pytest.raises(ImageError) as error:
                opening.create_image(str(path), format, size, {"preallocation": how})
            assert "nothing was changed" in error.value.hint, error.value.hint
            assert os.statvfs(small).f_bfree >= free


def test_nothing_that_is_no_image_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, why in (
        (str(tmp_path / "fifo"), "neither a regular file nor a block device"),
        ("/dev/null", "neither a regular file nor a block device"),
        (str(tmp_path / "folder"), "Is a directory"),
        (str(tmp_path / "none" / "vm.raw"), "No such file or directory"),
        ("nbd://localhost/x", "is an export"),
    ):
        with unchanged(tmp_path), pytest.raises(CowferryError, match=why):
            opening.create_image(name, "raw", SIZE, {})


def test_a_new_image_has_the_mode_the_owner_and_the_attributes_of_the_old_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "vm.qcow2"
    path.write_bytes(b"old")
    os.chmod(path, 0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    os.setxattr(path, "user.note", b"mine")
    before = path.stat()
    opening.create_image(str(path), "qcow2", SIZE, {})
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode, before.st_uid, before.st_gid,
    )  # fmt: skip
    assert os.getxattr(path, "user.note") == b"mine"
    assert os.listdir(tmp_path) == ["vm.qcow2"]


def test_a_symbolic_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, old in (("a.raw", b"old"), ("b.raw", None)):
        there, link = tmp_path / "there" / name, tmp_path / name
        if old is not None:
            there.write_bytes(old)
        link.symlink_to(there)
        opening.create_image(str(link), "raw", SIZE, {})
        assert link.is_symlink() and not there.is_symlink() and there.stat().st_size == SIZE


def test_a_file_with_two_names_stays_one_file(tmp_path: Path) -> None:
    path, other = tmp_path / "vm.raw", tmp_path / "other"
    path.write_bytes(OLD)
    os.link(path, other)
    opening.create_image(str(path), "raw", 2 * SIZE, {})
    assert path.samefile(other) and path.read_bytes() == bytes(2 * SIZE)


def test_a_mount_point_is_written_in_place(tmp_path: Path) -> None:
    need("mount")
    real, name = tmp_path / "real", tmp_path / "a name"
    real.write_bytes(OLD)
    name.touch()
    if subprocess.run(["mount", "--bind", str(real), str(name)], timeout=30).returncode:
        pytest.skip("no bind mounts here")
    try:
        opening.create_image(str(name), "raw", 2 * SIZE, {})
    finally:
        ran("umount", str(name))
    assert real.read_bytes() == bytes(2 * SIZE)


def test_a_name_of_the_greatest_length_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("x" * 250 + ".raw", "é" * 125 + ".raw", "a\nb: -c'.raw", "\udcff.raw"):
        for _ in range(2):
            opening.create_image(str(tmp_path / name), "raw", SIZE, {})
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()


def test_another_process_that_makes_the_same_name_meanwhile_is_not_overwritten(
    tmp_path: Path,
) -> None:
    path = tmp_path / "vm.raw"
    with (
        pytest.raises(DeviceInUse, match="made by another process"),
        opening.new_image(str(path), "raw", SIZE, {}),
    ):
        path.write_bytes(OLD)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["vm.raw"]
    with (
        pytest.raises(DeviceInUse, match="replaced by another process"),
        opening.new_image(str(path), "raw", SIZE, {}),
    ):
        path.unlink()
        path.write_bytes(OLD)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["vm.raw"]


def test_an_interrupt_leaves_the_old_image(tmp_path: Path) -> None:
    path = an_image(tmp_path / "vm.image")
    with (
        unchanged(tmp_path),
        pytest.raises(KeyboardInterrupt),
        opening.new_image(str(path), "qcow2", SIZE, {"data_file": "data.raw"}) as new,
    ):
        assert os.path.exists(new.path)
        raise KeyboardInterrupt


def test_an_interrupt_after_the_moment_leaves_the_new_image_without_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = an_image(tmp_path / "vm.qcow2")
    plain = sysio.rename

    def rename(source: str, target: str) -> None:
        plain(source, target)
        if target == str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(sysio, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        opening.create_image(str(path), "qcow2", 2 * SIZE, {})
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.raw", "vm.qcow2"]
    assert opening.current_image(str(path))[0] == str(path)


def test_the_folder_of_a_data_file_that_cannot_be_replaced_leaves_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two renames fails."""
    path = an_image(tmp_path / "vm.qcow2", data_file="data.raw")
    plain = sysio.rename_new

    def rename_new(source: str, target: str) -> None:
        if target == str(path):
            raise OSError(5, "Input/output error")
        plain(source, target)

    monkeypatch.setattr(sysio, "rename_new", rename_new)
    with unchanged(tmp_path), pytest.raises(ImageError, match="Input/output error"):
        opening.create_image(str(path), "qcow2", SIZE, {"data_file": "data.raw"})


@pytest.mark.parametrize("linked", [False, True], ids=["replaced", "in place"])
def test_a_record_that_cannot_be_removed_does_not_undo_the_new_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    path = an_image(tmp_path / "vm.qcow2")
    if linked:
        os.link(path, tmp_path / "other")

    def fresh(image: str) -> None:
        raise OSError(5, "Input/output error", f"{image}.moved")

    monkeypatch.setattr(moves, "fresh", fresh)
    with pytest.raises(ImageError, match="was made, but") as error:
        opening.create_image(str(path), "qcow2", 2 * SIZE, {})
    assert f"{path}.moved" in error.value.desc
    node = opening.open_image(str(path), "qcow2", read_only=True)
    assert contents(node) == bytes(2 * SIZE)
    opening.close_chain(node)


@pytest.mark.parametrize("size", [7 << 60, 4 * MiB])
def test_a_file_in_place_that_may_not_be_so_large_is_kept(
    tmp_path: Path, size: int, limit: None
) -> None:
    path = an_image(tmp_path / "vm.raw", "raw")
    os.link(path, tmp_path / "other")
    with unchanged(tmp_path), pytest.raises(ImageError, match="File too large"):
        opening.create_image(str(path), "raw", size, {})


def test_an_error_after_the_moment_says_that_the_image_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = an_image(tmp_path / "vm.qcow2")
    plain = sysio.flush_directory

    def flush_directory(folder: str) -> None:
        if not any(name.endswith(".new") for name in os.listdir(folder)):
            raise OSError(5, "Input/output error")
        plain(folder)

    monkeypatch.setattr(sysio, "flush_directory", flush_directory)
    with pytest.raises(ImageError, match="was made, but a power cut may undo that"):
        opening.create_image(str(path), "qcow2", 2 * SIZE, {})
    monkeypatch.undo()
    node = opening.open_image(str(path), "qcow2", read_only=True)
    assert contents(node) == bytes(2 * SIZE)
    opening.close_chain(node)


def test_a_failure_in_place_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = an_image(tmp_path / "vm.qcow2")
    os.link(path, tmp_path / "other")
    with (
        pytest.raises(ImageError, match="No space left") as error,
        opening.new_image(str(path), "qcow2", SIZE, {}),
    ):
        raise OSError(28, "No space left on device")
    assert f"what was in '{path}' is lost: it was written in place because" in error.value.hint
    assert "nothing was changed" not in error.value.hint
    assert path.stat().st_size == 0


def test_attributes_of_ours_do_not_come_to_the_new_image(tmp_path: Path) -> None:
    path = tmp_path / "vm.raw"
    path.write_bytes(OLD)
    os.setxattr(path, "user.cowferry.filling", b"00")
    opening.create_image(str(path), "raw", SIZE, {})
    assert not os.listxattr(path)


# Devices ------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[[int], tuple[str, Path]]]:
    """Makes devices full of old bytes."""
    with ExitStack() as stack:

        def make(size: int) -> tuple[str, Path]:
            file = tmp_path / f"device{len(list(tmp_path.glob('device*')))}"
            file.write_bytes(b"\xaa" * size)
            return stack.enter_context(loop(file)), file

        yield make


Make = Callable[[int], tuple[str, Path]]


@pytest.mark.parametrize(
    ("format", "size", "options"),
    [
        ("raw", 5 * MiB, {}),
        ("qcow2", 1 << 40, {"cluster_size": "4k"}),
        ("qcow2", 4 * MiB, {"preallocation": "metadata"}),
        ("qcow2", 4 * MiB, {"preallocation": "full"}),
        ("qcow2", SIZE, {"cluster_size": "7"}),
        ("qed", SIZE, {}),
    ],
)
def test_a_device_is_changed_only_if_the_image_fits(
    device: Make, format: str, size: int, options: dict[str, str]
) -> None:
    name, file = device(4 * MiB)
    with pytest.raises(CowferryError) as error:
        opening.create_image(name, format, size, options)
    ran("sync", name)
    assert file.read_bytes() == b"\xaa" * (4 * MiB)
    assert not error.value.desc.startswith("device") or str(4 * MiB) in error.value.desc


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("how", ["off", "metadata", "falloc", "full"])
def test_a_new_qcow2_image_on_a_device_reads_as_zeroes(
    device: Make, how: str, compat: str, tmp_path: Path
) -> None:
    need("qemu-img")
    name, _ = device(4 * MiB)
    opening.create_image(name, "qcow2", 2 * MiB, {"preallocation": how, "compat": compat})
    node = opening.open_image(name, "qcow2", read_only=True)
    assert not any(contents(node))
    opening.close_chain(node)
    ran("qemu-img", "check", "-f", "qcow2", name)
    out = tmp_path / "out.raw"
    ran("qemu-img", "convert", "-f", "qcow2", "-O", "raw", name, str(out))
    assert not any(out.read_bytes())


@pytest.mark.parametrize("how", ["off", "metadata", "full"])
def test_an_image_over_a_data_file_on_a_device_reads_as_zeroes(
    device: Make, how: str, tmp_path: Path
) -> None:
    need("qemu-img")
    name, _ = device(2 * MiB)
    path = tmp_path / "vm.qcow2"
    opening.create_image(str(path), "qcow2", 2 * MiB, {"data_file": name, "preallocation": how})
    ran("qemu-img", "check", str(path))
    out = tmp_path / "out.raw"
    ran("qemu-img", "convert", "-O", "raw", str(path), str(out))
    assert not any(out.read_bytes())


def test_a_device_that_is_mounted_is_not_overwritten(tmp_path: Path) -> None:
    with open(tmp_path / "disk", "wb") as f:
        f.truncate(8 * MiB)
    with loop(tmp_path / "disk") as name, mounted(name, tmp_path / "m") as folder:
        (folder / "a").write_bytes(OLD)
        with pytest.raises(DeviceInUse, match="it is mounted"):
            opening.create_image(name, "qcow2", SIZE, {})
        assert (folder / "a").read_bytes() == OLD


def test_full_preallocation_of_a_raw_image_zeroes_a_device(device: Make) -> None:
    name, file = device(2 * MiB)
    opening.create_image(name, "raw", SIZE + 512, {"preallocation": "full"})
    ran("sync", name)
    data = file.read_bytes()
    assert not any(data[: SIZE + 512]) and data[SIZE + 512 :] == b"\xaa" * (SIZE - 512)


def test_a_descriptor_that_was_handed_over_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    path.write_bytes(OLD)
    number = fdsets.add(os.open(path, os.O_RDWR))
    try:
        with unchanged(tmp_path), pytest.raises(CowferryError, match="Cluster size"):
            opening.create_image(f"/dev/fdset/{number}", "qcow2", SIZE, {"cluster_size": "7"})
        inode = path.stat().st_ino
        options = {"preallocation": "metadata"}
        opening.create_image(f"/dev/fdset/{number}", "qcow2", 2 * SIZE, options)
    finally:
        fdsets.remove(number)
    assert path.stat().st_ino == inode
    node = opening.open_image(str(path), read_only=True)
    assert contents(node) == bytes(2 * SIZE)
    opening.close_chain(node)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_read_only_device_is_refused_before_anything_is_lost(tmp_path: Path, format: str) -> None:
    """Root may open it for writing."""
    file = tmp_path / "disk"
    file.write_bytes(b"d" * (4 * MiB))
    with loop(file, "-r") as name:
        for refused in (
            lambda: opening.create_image(name, format, MiB, {}),
            lambda: opening.open_image(name, "raw"),
            lambda: opening.open_image(name, "raw", read_only=True).reopen(False),
        ):
            with pytest.raises((CowferryError, OSError), match="read-only") as error:
                refused()
            assert "lost" not in getattr(error.value, "hint", "")
        node = opening.open_node({
            "driver": "raw", "auto-read-only": True,
            "file": {"driver": "file", "filename": name},
        })  # fmt: skip
        assert node.read_only
        opening.close_chain(node)
        with a_daemon() as daemon, pytest.raises(CowferryError, match="read-only"):
            daemon.open_disk("vm", name, "raw")
    assert file.read_bytes() == b"d" * (4 * MiB)


# blockdev-create ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["filename", "file", "node"])
def test_blockdev_create_that_fails_changes_nothing(tmp_path: Path, way: str) -> None:
    path = an_image(tmp_path / "vm.image")
    with a_daemon() as daemon:
        told = Told(daemon)
        where: Any = {"filename": str(path)} if way == "filename" else {"file": "f"}
        if way == "file":
            where = {"file": {"driver": "file", "filename": str(path)}}
        if way == "node":
            daemon.execute(
                "blockdev-add", {"driver": "file", "node-name": "f", "filename": str(path)}
            )
        with unchanged(tmp_path):
            for options in ({"cluster-size": 7}, {"size": 1 << 62, "cluster-size": 512}):
                wanted = {"driver": "qcow2", "size": SIZE, **where, **options}
                daemon.execute("blockdev-create", {"job-id": "c", "options": wanted})
                told.wait("JOB_STATUS_CHANGE", status="concluded")
                (job,) = daemon.execute("query-jobs", {})
                assert "error" in job
                daemon.execute("job-dismiss", {"id": "c"})
        good = {"driver": "qcow2", "size": 2 * SIZE, **where}
        daemon.execute("blockdev-create", {"job-id": "c", "options": good})
        told.wait("JOB_STATUS_CHANGE", status="concluded")
        (job,) = daemon.execute("query-jobs", {})
        assert "error" not in job, job
        if way == "node":  # the node sees the new file
            daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "f"})
            assert daemon.graph.nodes["q"].size == 2 * SIZE
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.raw", "vm.image"]
    node = opening.open_image(str(path), "qcow2", read_only=True)
    assert contents(node) == bytes(2 * SIZE) and not node.bitmaps
    opening.close_chain(node)


FILE: Any = {"driver": "file", "filename": "new"}
ODD: list[tuple[dict[str, Any], str]] = [
    ({"file": FILE, "filename": "other"}, "exclude each other"),
    ({"file": FILE | {"read-only": True}}, "'options.file.read-only' is unexpected"),
    ({"file": FILE | {"driver": "nbd"}}, "does not accept value 'nbd'"),
    ({"file": {"driver": "file"}}, "'options.file.filename' is missing"),
    ({"file": 7}, "Invalid parameter type for 'options.file'"),
    ({"file": FILE, "data-file": {"driver": "file"}}, "'options.data-file.filename' is missing"),
    ({"file": FILE, "data-file": 7}, "Invalid parameter type for 'options.data-file'"),
    ({"file": FILE, "data-file": "f"}, "'f' is a node"),
    ({"file": FILE, "backing-file": 7, "backing-fmt": "raw"}, "type for 'options.backing-file'"),
    ({"file": FILE, "encrypt": {"format": "luks"}}, "Invalid parameter type for 'options.encrypt'"),
    ({"file": FILE, "cluster-size": None}, "Invalid parameter type for 'options.cluster-size'"),
]


@pytest.mark.parametrize("options, why", ODD, ids=[why for _, why in ODD])
def test_blockdev_create_refuses_what_it_would_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = an_image(tmp_path / "vm.image")
    with a_daemon() as daemon:
        daemon.execute("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(path)})
        wanted = {"driver": "qcow2", "size": SIZE, **options}
        with unchanged(tmp_path), pytest.raises(CowferryError, match=re.escape(why)):
            daemon.execute("blockdev-create", {"job-id": "c", "options": wanted})
        assert not daemon.execute("query-jobs", {})


def test_blockdev_create_makes_the_data_file_that_is_described(tmp_path: Path) -> None:
    def file(name: str) -> dict[str, Any]:
        return {"driver": "file", "filename": str(tmp_path / name)}

    where = {"file": file("vm.qcow2"), "data-file": file("vm.data")}
    with a_daemon() as daemon:
        told = Told(daemon)
        options = {"driver": "qcow2", "size": SIZE, **where}
        daemon.execute("blockdev-create", {"job-id": "c", "options": options})
        told.wait("JOB_STATUS_CHANGE", status="concluded")
        daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "q", **where})
        daemon.graph.disk("q").pwrite(memoryview(b"x" * 512), 0)
    assert sorted(os.listdir(tmp_path)) == ["vm.data", "vm.qcow2"]
    assert (tmp_path / "vm.data").read_bytes()[:512] == b"x" * 512


@pytest.mark.parametrize("files", [{"file": "base.raw"}, {"file": "n", "data-file": "base.raw"}])
def test_blockdev_create_replaces_no_file_of_the_backing_chain(
    tmp_path: Path, files: dict[str, str]
) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    opening.create_image(
        str(tmp_path / "mid.qcow2"), "qcow2", SIZE,
        {"backing_file": "base.raw", "backing_fmt": "raw"},
    )  # fmt: skip
    made = {k: {"driver": "file", "filename": str(tmp_path / v)} for k, v in files.items()}
    backing = {"backing-file": "mid.qcow2", "backing-fmt": "qcow2"}
    with a_daemon() as daemon, unchanged(tmp_path):
        told = Told(daemon)
        options = {"driver": "qcow2", "size": SIZE, **made, **backing}
        daemon.execute("blockdev-create", {"job-id": "c", "options": options})
        told.wait("JOB_STATUS_CHANGE", status="concluded")
        (job,) = daemon.execute("query-jobs", {})
        assert "cannot be its own backing file" in job["error"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_blockdev_create_that_takes_long_is_cancelled(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preallocation writes piece by piece, and looks whether anybody still wants it."""
    path = an_image(tmp_path / "vm.image")
    plain, begun, go_on = sysio.pwrite, threading.Event(), threading.Event()

    def pwrite(fd: int, buf: Any, offset: int) -> None:
        if len(buf) == MiB:
            begun.set()
            go_on.wait(60)
        plain(fd, buf, offset)

    monkeypatch.setattr(sysio, "pwrite", pwrite)
    with a_daemon() as daemon, unchanged(tmp_path):
        told = Told(daemon)
        wanted = {"driver": format, "size": 64 * MiB, "filename": str(path)}
        options = {**wanted, "preallocation": "full"}
        daemon.execute("blockdev-create", {"job-id": "c", "options": options})
        assert begun.wait(60)
        daemon.execute("job-cancel", {"id": "c"})
        job = daemon.jobs.get("c")
        assert job is not None
        job.give_up()  # what a timer does a little later
        go_on.set()
        told.wait("JOB_STATUS_CHANGE", status="concluded")
        (found,) = daemon.execute("query-jobs", {})
        assert "the job was cancelled" in found["error"]


def test_a_creation_that_is_killed_leaves_the_old_image_and_a_file_of_a_known_name(
    tmp_path: Path,
) -> None:
    path = an_image(tmp_path / "vm.image")
    before = everything(tmp_path)
    script = (
        "import os, signal, sys\n"
        "from cowferry.drivers import opening\n"
        "with opening.new_image(sys.argv[1], 'qcow2', 1 << 20, {}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60)
    assert done.returncode == -9
    after = everything(tmp_path)
    (left,) = after.keys() - before.keys()
    assert os.path.basename(left).startswith(".vm.image.") and left.endswith(".new")
    assert {k: v for k, v in after.items() if k != left} == before
    opening.create_image(str(path), "qcow2", SIZE, {})  # it is in nobody's way


def test_the_new_image_is_locked_until_nothing_of_the_old_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = an_image(tmp_path / "vm.qcow2")
    plain = moves.fresh

    def fresh(image: str) -> None:
        with pytest.raises(CowferryError, match="lock"):
            opening.open_image(str(path))
        plain(image)

    monkeypatch.setattr(moves, "fresh", fresh)
    opening.create_image(str(path), "qcow2", SIZE, {})
    opening.close_chain(opening.open_image(str(path)))


def test_file_system_hints_are_honoured_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "vm.raw"
    opening.create_image(str(path), "raw", SIZE, {"nocow": "on"})
    try:
        opening.create_image(str(path), "raw", SIZE, {"extent_size_hint": "1M"})
    except ImageError:
        return  # this file system has no such thing
    with open(path, "rb") as f:
        found = fcntl.ioctl(f, sysio.FS_IOC_FSGETXATTR, bytes(sysio.FSXATTR.size))
    assert sysio.FSXATTR.unpack(found)[1] == MiB
