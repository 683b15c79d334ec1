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
from cowferry.block import keeper
from cowferry.block.bitmap import Bitmap
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


# What lies beside an image -----------------------------------------------------------------


def with_bitmap(path: Path) -> None:
    disk = Disk(opening.open_image(str(path)), "vm")
    with disk.exclusive():
        keeper.keep(disk.root, Bitmap("b0", disk.size))
    opening.close_chain(disk.root)


def dirty(path: Path) -> Bitmap:
    """The bitmap of an image at rest."""
    node = opening.open_image(str(path), read_only=True)
    found = node.bitmaps["b0"]
    opening.close_chain(node)
    assert not found.inconsistent
    return found


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_an_image_with_bitmaps_on_full_storage_is_read_and_written_as_far_as_there_is_room(
    mount: Mount, format: str
) -> None:
    path = mount("tmpfs", "6m") / f"vm.{format}"
    with guest(path, 4 * MiB) as g:
        g.write(0)
        g.write(3 * MiB)
        opening.close_chain(g.disk.root)
        with_bitmap(path)
        fill(path.parent)
        g.open()
        assert not differs(contents(g.disk), g.oracle)
        if format == "qcow2":  # its bitmaps need a file, for which there is no room
            g.refused(0)
            with g.disk.exclusive(), pytest.raises(OSError):
                g.disk.root.change_size(8 * MiB)
            assert g.disk.size == 4 * MiB
        else:  # the file only has to say that it is in use
            g.write(0)
        with suppress(OSError):  # they stay in use, as by a crash, where there is no room
            opening.close_chain(g.disk.root)
        g.open()
        empty(path.parent)
        g.write(MiB)
        g.write(3 * MiB)
        g.check()
        opening.close_chain(g.disk.root)
        bitmap = dirty(path)
        for at in (MiB, 3 * MiB):
            assert bitmap.any(at, PIECE)
        assert bitmap.any(0, PIECE) == (format != "qcow2") and not bitmap.any(2 * MiB, PIECE)


def test_bitmaps_that_waited_for_room_are_right_after_a_crash(mount: Mount) -> None:
    path = mount("tmpfs", "6m") / "vm.qcow2"
    with guest(path, 4 * MiB) as g:
        g.write(0)
        g.write(3 * MiB)
        opening.close_chain(g.disk.root)
        with_bitmap(path)
        fill(path.parent)
        g.open()
        g.refused(3 * MiB)
        empty(path.parent)
        g.write(3 * MiB)
        g.disk.flush()
        left = path.parent / "crashed"
        left.mkdir()
        for file in (path, Path(f"{path}.bitmaps")):  # as a crash leaves them
            subprocess.run(["cp", file, left], check=True)
        assert dirty(left / path.name).any(3 * MiB, PIECE)


def test_an_image_that_is_being_filled_is_read_and_written_on_full_storage(
    mount: Mount, tmp_path: Path
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(9).randbytes(4 * MiB))
    path = mount("tmpfs", "6m") / "vm.raw"
    with guest(path, 4 * MiB, backing_file=str(base), backing_fmt="raw") as g:
        g.oracle[:] = base.read_bytes()
        g.write(0)
        g.write(MiB)
        g.disk.flush()
        opening.close_chain(g.disk.root)
        fill(path.parent)
        g.open()
        assert not differs(contents(g.disk), g.oracle)
        g.write(MiB, 512)
        g.refused(2 * MiB)
        g.check()
        empty(path.parent)
        g.write(2 * MiB)
        g.check()


@pytest.mark.parametrize("format", ["raw", "qed", "filled"])
def test_what_a_crash_left_is_opened_on_full_storage(
    mount: Mount, tmp_path: Path, format: str
) -> None:
    point = mount("tmpfs", "12m")
    path = point / ("vm.qed" if format == "qed" else "vm.raw")
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(9).randbytes(4 * MiB))
    options = {"backing_file": str(base), "backing_fmt": "raw"} if format == "filled" else {}
    with guest(path, 4 * MiB, **options) as g:
        if format == "filled":
            g.oracle[:] = base.read_bytes()
        else:
            opening.close_chain(g.disk.root)
            with_bitmap(path)
            g.open()
        g.write(MiB)
        g.write(3 * MiB)
        g.disk.flush()
        left = point / "crashed"
        left.mkdir()
        # In use, with bits that were set since the file was made. A copy is another file: only what
        # is filled is believed of one, because its mark goes along.
        if format == "filled":
            subprocess.run(["cp", "-a", path, f"{path}.filling", left], check=True)
        else:
            assert g.disk.root.keeper is not None
            g.disk.root.keeper.close()
            g.disk.root.keeper = None
        opening.close_chain(g.disk.root)
        g.path = left / path.name if format == "filled" else path
        fill(point)
        g.open()
        assert not differs(contents(g.disk), g.oracle)
        g.write(MiB, 512)
        g.disk.flush()
        assert not differs(contents(g.disk), g.oracle)
        if format != "filled":
            bitmap = g.disk.root.bitmaps["b0"]
            assert not bitmap.inconsistent and bitmap.any(3 * MiB, PIECE)
        empty(point)
