"""What a second review of the core of issue 4 found, each as the sequence that showed it."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowferry.block import keeper, sysio, unfinished
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.gate import END
from cowferry.block.node import Extent, Node
from cowferry.block.origin import Origin
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.jobs.backup import Backup
from cowferry.jobs.ending import finish
from daemons import a_daemon

KIB, MIB = 1 << 10, 1 << 20
SIZE = 37 * MIB + 3 * 512


def new(path: Path, size: int = SIZE, **options: Any) -> Node:
    format = path.suffix[1:]
    opening.create_image(str(path), format, size, options)
    return opening.open_image(str(path), format)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An empty raw disk, whose size is a multiple of nothing."""
    disk = Disk(new(tmp_path / "vm.raw"), "vm")
    yield disk
    disk.root.close()


# D2: a drain is short, however many runs a bitmap has ----------------------------------------


@pytest.mark.parametrize("granularity", [512, 64 * KIB, 4 * MIB])
@pytest.mark.parametrize("cluster", [64 * KIB, 2 * MIB])
def test_D2_an_increment_begins_in_few_steps_however_scattered_it_is(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: int, cluster: int
) -> None:
    """One for each run was ten seconds for a disk of 64 GiB of which every second unit is dirty."""
    bitmap = Bitmap("b0", SIZE, granularity)
    order = random.Random(granularity + cluster)
    for _ in range(40):
        bitmap.set(order.randrange(SIZE), 1)
    want = Bitmap("", SIZE, 64 * KIB)
    for offset, length in bitmap.runs():
        start = offset // cluster * cluster
        want.set(start, -(-(offset + length) // cluster) * cluster - start)
    target = new(tmp_path / "target.qcow2", cluster_size=cluster)
    job = Backup(disk, Disk(target, "t"), bitmap=bitmap, by_bitmap=True)
    with monkeypatch.context() as patch, disk.exclusive():
        for name in ("set", "runs"):
            patch.setattr(Bitmap, name, lambda *_: pytest.fail("one step for each run"))
        job.attach()
    assert job.todo.bits == job.missing.bits == want.bits
    assert list(job.pending.runs()) == list(want.runs())
    assert job.length == sum(length for _, length in want.runs())
    with disk.exclusive():
        job.detach()
    job.clean()
    target.close()


# E2: what fails for want of room leaves the guest as it was --------------------------------------


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_E2_a_snapshot_that_finds_no_room_takes_none_from_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The image has to rest, and its bitmap with it, which takes a little room. Afterwards each
    write of the guest wanted a new file for the bitmap, and failed, in clusters that it has."""
    image = tmp_path / f"vm.{format}"
    node = new(image, 2 * MIB)
    node.pwrite(memoryview(bytes([1]) * 2 * MIB), 0)
    node.close()
    overlay = str(tmp_path / "snap.qcow2")
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", str(image))
        daemon.execute("block-dirty-bitmap-add", {"node": "vm", "name": "b0", "persistent": True})
        disk.pwrite(memoryview(b"1"), 0)
        with monkeypatch.context() as patch:
            full(patch, image.name)
            with pytest.raises(CowferryError, match="No space left"):
                daemon.execute("blockdev-snapshot-sync", {"device": "vm", "snapshot-file": overlay})
            for at in (0, MIB):
                disk.pwrite(memoryview(b"2"), at)
            disk.flush()
            folder = tmp_path / "crashed"
            folder.mkdir()
            for name in (image.name, f"{image.name}.bitmaps"):
                shutil.copy(tmp_path / name, folder)
        daemon.execute("blockdev-snapshot-sync", {"device": "vm", "snapshot-file": overlay})
    found = opening.open_image(str(folder / image.name), format, read_only=True)
    bitmap = found.bitmaps["b0"]
    if format == "qcow2":  # a copy of another one is another image
        assert not bitmap.inconsistent and bitmap.any(0, 1) and bitmap.any(MIB, 1)
    opening.close_chain(found)


def full(patch: pytest.MonkeyPatch, name: str) -> None:
    """No file whose name begins so grows, and none of that name can be made."""
    create, pwrite = sysio.create, sysio.pwrite

    def made(path: str, flags: int, like: Origin | None = None) -> int:
        if os.path.basename(path).startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(path, flags, like)

    def written(fd: int, buf: Any, offset: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        grows = offset + len(memoryview(buf)) > os.fstat(fd).st_size
        if grows and os.path.basename(path).startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pwrite(fd, buf, offset)

    patch.setattr(sysio, "create", made)
    patch.setattr(sysio, "pwrite", written)


@pytest.mark.parametrize("what", ["backup", "copy"])
def test_D2_no_drain_waits_for_all_that_a_guest_has_written(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What makes bits go durably flushes the image inside a drain: before, most of it outside."""
    flushes: list[bool] = []  # whether the disk was drained meanwhile
    flush = disk.root.flush

    def flushed() -> None:
        flushes.append(any(c.end == END for c in disk.gate.claims))
        flush()

    monkeypatch.setattr(disk.root, "flush", flushed)
    if what == "backup":
        bitmap = Bitmap("b0", SIZE)
        with disk.exclusive():
            keeper.keep(disk.root, bitmap)
        disk.pwrite(memoryview(b"x"), 0)
        target = new(tmp_path / "target.raw")
        job = Backup(disk, Disk(target, "t"), bitmap=bitmap)
        flushes.clear()
        for _ in job.run():
            pass
        finish([job])
        job.clean()
        target.close()
    else:
        new(tmp_path / "target.raw").close()
        unfinished.begin(disk, str(tmp_path / "target.raw"))
    first = flushes.index(True)
    assert first and not flushes[first - 1]


def test_E2_a_pull_backup_whose_scratch_file_keeps_its_name_leaves_no_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new(tmp_path / "vm.raw").close()
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(tmp_path / "vm.raw"))
        daemon.start_nbd({"type": "unix", "path": str(tmp_path / "n")})
        nodes = set(daemon.graph.nodes)
        unlink = sysio.unlink

        def unlinked(path: str) -> None:
            if path.endswith(".qcow2"):  # the scratch file itself, and nothing beside it
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            unlink(path)

        monkeypatch.setattr(sysio, "unlink", unlinked)
        with pytest.raises(CowferryError, match="Read-only file system"):
            daemon.execute("x-backup-export", {"disks": [{"device": "vm"}]})
        assert set(daemon.graph.nodes) == nodes and not daemon.graph.claims


def test_a_backup_of_many_runs_does_not_look_at_them_again_for_each_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks ahead for zeroes. All of 64 MiB each time was a minute for as much in small runs."""
    size = 4 * MIB
    root = new(tmp_path / "vm.qcow2", size, cluster_size=512)
    for at in range(0, size, 64 * KIB):
        root.pwrite(memoryview(b"x" * 512), at)
    disk = Disk(root, "vm")
    target = new(tmp_path / "target.raw", size)
    job = Backup(disk, Disk(target, "t"))
    looked: list[int] = []
    extents = root.extents

    def asked(offset: int, length: int) -> Iterator[Extent]:
        looked.append(length)
        return extents(offset, length)

    monkeypatch.setattr(root, "extents", asked)
    for _ in job.run():
        pass
    assert sum(looked) < 8 * size
    finish([job])
    job.clean()
    want = (b"x" * 512).ljust(64 * KIB, b"\0") * (size // (64 * KIB))
    assert (tmp_path / "target.raw").read_bytes() == want
    target.close()
    root.close()
