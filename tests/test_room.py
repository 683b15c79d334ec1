"""Room in a file system: set aside before it is relied on, found again when a device grows."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowferry.drivers.file import File
from mounts import MiB, Mount, fill, limited, mount
from tests_support import need, unavailable

__all__ = ["mount"]


def file_at(path: Path, size: int = 0) -> File:
    """A node over a new file with a few bytes in it."""
    with open(path, "wb") as f:
        f.truncate(size)
    return File.open(File.Options(driver="file", filename=str(path)), {})


@contextmanager
def closing(file: File) -> Iterator[File]:
    try:
        yield file
    finally:
        file.close()


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as error:
        yield
    assert error.value.errno == code


def test_room_that_was_taken_is_there_when_the_storage_is_full(mount: Mount) -> None:
    point = mount("tmpfs")
    with closing(file_at(point / "image", 2 * MiB)) as file:
        file.pwrite(memoryview(b"a" * 100), 70_000)
        file.take_room(64 << 10, 64 << 10)
        file.take_room(2 * MiB, 64 << 10)
        assert file.size == 2 * MiB + (64 << 10), "the file has not grown over the room"
        fill(point)
        with refused(errno.ENOSPC):
            file.take_room(MiB, 4096)
        with refused(errno.ENOSPC):
            file.pwrite(memoryview(bytes(4096)), MiB)
        for at in (64 << 10, 2 * MiB):
            file.pwrite(memoryview(b"b" * (64 << 10)), at)
        file.flush()


def test_taking_room_changes_no_byte(tmp_path: Path) -> None:
    with closing(file_at(tmp_path / "image", MiB)) as file:
        file.pwrite(memoryview(b"a" * 5000), 3000)
        before = (tmp_path / "image").read_bytes()
        file.take_room(0, MiB)
        assert (tmp_path / "image").read_bytes() == before
        file.take_room(0, 0)


def test_room_is_taken_for_bytes_that_another_file_shares(mount: Mount) -> None:
    point = mount("xfs")
    with closing(file_at(point / "image")) as file:
        file.pwrite(memoryview(b"a" * MiB), 0)
        file.flush()
        if subprocess.run(["cp", "--reflink=always", point / "image", point / "copy"]).returncode:
            unavailable("this xfs shares no blocks")
        file.take_room(0, MiB // 2)
        os.sync()
        fill(point)
        fd = os.open(point / "image", os.O_RDWR | os.O_DSYNC)
        try:
            os.pwrite(fd, b"b" * (MiB // 2), 0)  # as much as room was taken for
        finally:
            os.close(fd)
        assert (point / "copy").read_bytes() == b"a" * MiB


def test_a_limit_on_the_size_of_files_refuses_room(tmp_path: Path) -> None:
    with closing(file_at(tmp_path / "image", MiB)) as file:
        with limited(MiB):
            file.take_room(0, MiB)
            with refused(errno.EFBIG):
                file.take_room(MiB, 4096)
        assert file.size == os.path.getsize(tmp_path / "image") == MiB


def test_a_device_is_as_large_as_it_is_now(tmp_path: Path) -> None:
    need("losetup")
    image = tmp_path / "device"
    image.write_bytes(bytes(MiB))
    done = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True)
    if done.returncode:
        unavailable(f"no loop device: {done.stderr.strip()}")
    path = done.stdout.strip()
    try:
        with closing(File.open(File.Options(driver="file", filename=path), {})) as file:
            with refused(errno.ENOSPC):
                file.take_room(MiB, 4096)
            with pytest.raises(OSError, match=f"{path}: the device has {MiB} bytes, not {2 * MiB}"):
                file.resize(2 * MiB)
            os.truncate(image, 2 * MiB)
            subprocess.run(["losetup", "-c", path], check=True)
            file.take_room(MiB, 4096)
            assert file.size == 2 * MiB
            os.truncate(image, 3 * MiB)
            subprocess.run(["losetup", "-c", path], check=True)
            assert file.refresh_size() == 3 * MiB
    finally:
        subprocess.run(["losetup", "-d", path], check=True)
