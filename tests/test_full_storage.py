"""Storage that is full: a write that finds no room fails, and what was answered before is kept."""

from __future__ import annotations

import errno
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from chains import contents, differs
from cowferry.block.copy import Copier, Kind, Span
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from mounts import MiB, Mount, empty, fill, limited, mount
from tests_support import need, unavailable

__all__ = ["mount"]

SIZE = 64 * MiB
PIECE = 64 << 10


class Guest:
    """Writes a disk, and knows what was answered."""

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.path = path
        self.oracle = bytearray(size)
        self.unclear: set[int] = set()  # offsets of writes that failed: the old bytes, or the new
        self.open()

    def open(self) -> None:
        self.disk = Disk(opening.open_image(str(self.path)), "vm")

    def write(self, offset: int, length: int = PIECE) -> None:
        data = random.Random(offset).randbytes(length)
        self.disk.pwrite(memoryview(data), offset)
        self.oracle[offset : offset + length] = data

    def refused(self, offset: int, length: int = PIECE, code: int = errno.ENOSPC) -> None:
        with pytest.raises(OSError) as error:
            self.write(offset, length)
        assert error.value.errno == code

    def write_until_refused(self, step: int = PIECE, start: int = 0, count: int = 1 << 30) -> int:
        """Returns where it was refused."""
        for at in range(start, len(self.oracle) - PIECE, step):
            try:
                self.write(at)
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EFBIG)
                return at
        raise AssertionError("there was room for everything")

    def check(self) -> None:
        """All that was answered is there; also after the image was closed and opened again."""
        self.disk.flush()
        assert not differs(contents(self.disk), self.oracle)
        opening.close_chain(self.disk.root)
        if self.path.suffix != ".raw":
            need("qemu-img")
            done = subprocess.run(
                ["qemu-img", "check", self.path], capture_output=True, text=True, timeout=60
            )
            assert done.returncode in (0, 3), done.stdout + done.stderr
        self.open()
        assert not differs(contents(self.disk), self.oracle)


@contextmanager
def guest(path: Path, size: int = SIZE, **options: str) -> Iterator[Guest]:
    opening.create_image(str(path), path.suffix[1:], size, options)
    made = Guest(path, size)
    try:
        yield made
    finally:
        opening.close_chain(made.disk.root)


FORMATS = ["qcow2", "qed"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("step", [PIECE, 4 * MiB + 4096])
def test_writes_until_the_storage_is_full_lose_nothing(
    mount: Mount, format: str, step: int
) -> None:
    point = mount("tmpfs", "2m")
    with guest(point / f"vm.{format}", SIZE * 4 if step > PIECE else SIZE, cluster_size="4k") as g:
        at = g.write_until_refused(step)
        g.disk.flush()
        g.refused(at)
        g.check()
        g.disk.discard(0, 8 * PIECE)
        g.oracle[: 8 * PIECE] = bytes(8 * PIECE)
        g.write(at, 4096)  # there is room again
        g.check()


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_file_system_refuses_the_first_write_into_a_table(
    mount: Mount, tmp_path: Path, format: str
) -> None:
    point = mount("tmpfs", "4m")
    with guest(tmp_path / f"vm.{format}", cluster_size="4k") as g:
        for at in range(0, SIZE, 8 * MiB):
            g.write(at, 512)
    sparse = point / f"vm.{format}"
    subprocess.run(["cp", "--sparse=always", g.path, sparse], check=True)
    g.path = sparse
    g.open()
    fill(point, 4096)  # for the data, and not for the part of the table that is a hole
    for at in range(4 * MiB, SIZE, 8 * MiB):
        with suppress(OSError):
            g.write(at, 4096)
            g.disk.flush()
    g.refused(MiB)
    g.write(8 * MiB, 512)  # has a place
    g.check()
    empty(point)
    g.write(MiB)
    g.check()
    opening.close_chain(g.disk.root)


@pytest.mark.parametrize("format", FORMATS)
def test_a_copy_by_reflink_takes_room_before_its_tables_change(mount: Mount, format: str) -> None:
    point = mount("xfs")
    with guest(point / f"origin.{format}") as g:
        for at in range(0, SIZE, 2 * MiB):
            g.write(at)
        g.disk.flush()
        copy = point / f"vm.{format}"
        opening.close_chain(g.disk.root)
        if subprocess.run(["cp", "--reflink=always", g.path, copy]).returncode:
            unavailable("this xfs shares no blocks")
        before = g.path.read_bytes()
        path, g.path = g.path, copy
        g.open()
        fill(point, MiB // 2)
        at = g.write_until_refused(2 * MiB, MiB)
        g.disk.flush()
        g.refused(at)
        g.check()
        assert path.read_bytes() == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_limit_on_the_size_of_the_file_refuses_what_does_not_fit(
    tmp_path: Path, format: str
) -> None:
    with guest(tmp_path / f"vm.{format}", cluster_size="64k") as g, limited(2 * MiB):
        at = g.write_until_refused()
        g.disk.flush()
        g.refused(at, 4 * MiB, errno.EFBIG)
        g.refused(at + 8 * MiB, 512, errno.EFBIG)
        g.write(0, 512)
        g.check()


@pytest.mark.parametrize("format", FORMATS)
def test_a_copy_into_full_storage_fails_leaks_nothing_and_can_be_repeated(
    mount: Mount, tmp_path: Path, format: str
) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(1).randbytes(6 * MiB))
    point = mount("tmpfs", "16m")
    path = point / f"vm.{format}"
    opening.create_image(str(path), format, 6 * MiB, {})
    fill(point, 3 * MiB)
    below = opening.open_image(str(source), read_only=True)
    for room in (False, True):
        if room:
            empty(point)
        target = opening.open_image(str(path))
        try:
            for at in range(0, 6 * MiB, MiB):
                Copier().place(below, target, Span(at, MiB, Kind.COPY))
        except OSError as error:
            assert error.errno == errno.ENOSPC and not room
        target.flush()
        done = opening.open_image(str(path), force_share=True, read_only=True)
        assert not room or contents(done) == source.read_bytes()
        opening.close_chain(done)
        opening.close_chain(target)
        check = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
        assert check.returncode == 0, f"leaks or worse: {check.stdout}"
    below.close()
