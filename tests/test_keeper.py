"""Keepers of persistent bitmaps, one thing at a time: B1, B2. Power cuts: test_crash_bitmaps.py."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chains import contents
from cowferry.block import bitmap_file, keeper, moves, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.keeper import Keeper
from cowferry.block.lane import DONE, SLOW, Lane
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError, ImageError
from nursery import Nursery
from orders import Other, failing, on_call
from test_crash_bitmaps import FORMATS, lacks

SIZE = 24 << 20
REGION = 4 << 20
K64 = 64 << 10
LIVES = 3 if os.environ.get("COWFERRY_SOAK") is None else 50

Image = tuple[Path, str]


@pytest.fixture(params=FORMATS, ids=["raw", "qcow2", "qcow2-0.10", "qed"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    """A new image of each format."""
    format, options = request.param
    path = tmp_path / f"vm.{format}"
    opening.create_image(str(path), format, SIZE, dict(options))
    return path, format


@pytest.fixture(autouse=True)
def _regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as in a large disk."""
    monkeypatch.setattr(keeper, "FEW_REGIONS", 1)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "vm.raw"
    opening.create_image(str(path), "raw", SIZE, {})
    return path


def a_disk(path: Path, format: str = "raw") -> Disk:
    return Disk(opening.open_image(str(path), format), "vm")


def keep(disk: Disk, name: str = "b0", granularity: int = K64) -> Bitmap:
    bitmap = Bitmap(name, disk.size, granularity)
    with disk.exclusive():
        keeper.keep(disk.root, bitmap)
    return bitmap


def kept(disk: Disk) -> Keeper:
    found = disk.root.keeper
    assert found is not None
    return found


def checkpoint(disk: Disk) -> None:
    with disk.exclusive():
        kept(disk).checkpoint()


def write(disk: Disk, offset: int, data: bytes = b"x" * 4096) -> None:
    disk.pwrite(memoryview(data), offset)


def on_disk(path: Path, name: str = "b0") -> Bitmap:
    """What a crash would leave of a bitmap."""
    found = bitmap_file.read(f"{path}.bitmaps")
    assert found is not None and found.in_use
    (entry,) = [e for e in found.entries if e.name == name]
    bitmap = Bitmap(name, found.size, entry.granularity)
    bitmap.replace(entry.bits)
    return bitmap


def look(path: Path, format: str = "raw", read_only: bool = True) -> dict[str, Bitmap]:
    """The bitmaps of an image that nobody has open."""
    node = opening.open_image(str(path), format, read_only=read_only)
    try:
        return dict(node.bitmaps)
    finally:
        opening.close_chain(node)


def crash(disk: Disk) -> None:
    """As SIGKILL would: what was written is there, and nobody tidies up."""
    found = disk.root.keeper
    if found is not None:
        found.close()
    bottom = disk.root
    while bottom.file is not None:
        bottom = bottom.file
    bottom.close()


# What is on disk when --------------------------------------------------------------------------


def test_B1_a_region_is_marked_durably_before_its_first_write(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, format = image
    disk = a_disk(path, format)
    bitmap = keep(disk)
    order: list[str] = []
    marks = kept(disk)._marks
    on_call(monkeypatch, marks, "set", lambda: order.append("set"))
    on_call(monkeypatch, marks, "flush", lambda: order.append("flush"))
    on_call(monkeypatch, disk.root, "pwrite", lambda: order.append("write"))
    write(disk, 5 << 20)
    assert order == ["set", "flush", "write"]
    assert list(bitmap.runs()) == [(5 << 20, K64)]
    assert list(on_disk(path).runs()) == [(REGION, REGION)]
    opening.close_chain(disk.root)


def test_B1_in_a_marked_region_a_guest_writes_by_leases_and_nobody_is_asked(raw: Path) -> None:
    disk = a_disk(raw)
    write(disk, 0)  # where there is data, there are leases
    keep(disk)
    lane = Lane(disk)
    data = memoryview(bytearray(b"y" * 4096))
    assert lane.write(data, 8192, 4096) == SLOW
    write(disk, 8192)
    assert lane.write(data, 8192, 4096) == DONE
    assert lane.write(data, REGION - 4096, 4096) == DONE
    assert lane.write(data, REGION, 4096) == SLOW
    assert {offset for offset, _ in disk.root.bitmaps["b0"].runs()} == {0, REGION - K64}
    opening.close_chain(disk.root)


def test_B1_a_checkpoint_gives_back_what_was_marked_without_need(raw: Path) -> None:
    disk = a_disk(raw)
    bitmap = keep(disk)
    lane = Lane(disk)
    data = memoryview(bytearray(4096))
    write(disk, 0)
    assert lane.write(data, 10 * K64, 4096) == DONE
    assert kept(disk).coarse == REGION - 2 * K64
    checkpoint(disk)
    assert kept(disk).coarse == 0
    assert on_disk(raw).bits == bitmap.bits
    assert lane.write(data, 0, 4096) == DONE  # what is dirty needs no mark
    assert lane.write(data, 10 * K64 + 512, 4096) == DONE
    assert lane.write(data, 11 * K64, 4096) == SLOW
    write(disk, 11 * K64)
    assert list(on_disk(raw).runs()) == [(0, REGION)]
    opening.close_chain(disk.root)


def test_B1_a_disk_that_is_made_later_hands_out_no_lease_either(raw: Path) -> None:
    first = a_disk(raw)
    write(first, 0)
    keep(first)
    opening.close_chain(first.root)
    disk = a_disk(raw)
    lane = Lane(disk)
    assert lane.write(memoryview(bytearray(512)), 0, 512) == SLOW
    opening.close_chain(disk.root)


def test_bitmaps_that_do_not_record_hold_nobody_up(raw: Path) -> None:
    disk = a_disk(raw)
    write(disk, 0)
    bitmap = keep(disk)
    with disk.exclusive():
        bitmap.recording = False
        keeper.changed(disk.root)
    assert Lane(disk).write(memoryview(bytearray(512)), 0, 512) == DONE
    assert not on_disk(raw).ones
    opening.close_chain(disk.root)
    assert not look(raw)["b0"].recording


def test_a_guarded_bitmap_is_marked_though_it_does_not_record(raw: Path) -> None:
    disk = a_disk(raw)
    bitmap = Bitmap("guard", SIZE, K64)
    bitmap.recording, bitmap.guarded = False, True
    with disk.exclusive():
        keeper.keep(disk.root, bitmap)
    write(disk, REGION)
    assert not bitmap.ones
    assert list(on_disk(raw, "guard").runs()) == [(REGION, REGION)]
    crash(disk)
    found = look(raw)["guard"]
    assert (found.recording, found.guarded, found.count()) == (False, True, REGION)


def test_bitmaps_of_different_granules_are_marked_together(raw: Path) -> None:
    disk = a_disk(raw)
    small, large = keep(disk, "small", 512), keep(disk, "large", 8 << 20)
    write(disk, 17 << 20, b"x")
    assert kept(disk).region == 8 << 20
    assert (small.count(), large.count()) == (512, 8 << 20)
    assert list(on_disk(raw, "small").runs()) == [(16 << 20, 8 << 20)]
    checkpoint(disk)
    assert on_disk(raw, "small").bits == small.bits
    assert kept(disk).holds.count() == SIZE  # of the large granule not all is small's
    opening.close_chain(disk.root)


def test_who_writes_on_and_on_is_marked_further_and_further_ahead(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = a_disk(raw)
    keep(disk)
    monkeypatch.setattr(keeper, "AHEAD", 3 * REGION)
    marked = []
    for offset in (0, REGION, 3 * REGION):
        write(disk, offset)
        marked.append(on_disk(raw).count() // REGION)
    assert marked == [1, 3, 6]
    checkpoint(disk)
    write(disk, 2 * REGION)  # somewhere else
    assert on_disk(raw).count() == REGION + 3 * K64
    opening.close_chain(disk.root)


def test_a_write_by_a_job_is_marked_first_too(raw: Path) -> None:
    disk = a_disk(raw)
    bitmap = keep(disk)
    with disk.exclusive(0, 4096):
        disk.root.changing(0, 4096)
    assert bitmap.count() == K64 and on_disk(raw).count() == REGION
    opening.close_chain(disk.root)


# From one life to the next ----------------------------------------------------------------------


def test_B2_closed_in_order_bitmaps_are_precise(image: Image) -> None:
    path, format = image
    disk = a_disk(path, format)
    bitmap = keep(disk)
    keep(disk, "off", 4096)
    with disk.exclusive():
        disk.root.bitmaps["off"].recording = False
        keeper.changed(disk.root)
    for at in range(3):
        write(disk, at * (7 << 20) + 5000)
    opening.close_chain(disk.root)
    for read_only in (True, False, True):
        found = look(path, format, read_only)
        assert list(found) == ["b0", "off"]
        assert found["b0"].bits == bitmap.bits and found["b0"].recording
        assert not found["off"].recording and not found["off"].ones
        assert not any(b.inconsistent for b in found.values())


def test_B2_after_a_crash_bitmaps_are_supersets_and_go_on(image: Image) -> None:
    path, format = image
    disk = a_disk(path, format)
    precise = keep(disk).bits
    for life in range(3):
        write(disk, (life * 5 << 20) + 5000)
        disk.flush()
        precise |= disk.root.bitmaps["b0"].bits
        crash(disk)
        found = look(path, format)["b0"]
        assert not found.inconsistent, found.reason
        assert found.recording and not (precise & ~found.bits).any()
        disk = a_disk(path, format)
        assert disk.root.bitmaps["b0"].bits == found.bits
    opening.close_chain(disk.root)
    assert not look(path, format)["b0"].inconsistent


def test_looking_at_bitmaps_changes_nothing(image: Image) -> None:
    path, format = image
    disk = a_disk(path, format)
    keep(disk)
    write(disk, 0)
    for end in (crash, lambda d: opening.close_chain(d.root)):
        end(disk)
        before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir()}
        assert look(path, format)["b0"].count()
        assert before == {
            p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir()
        }
        disk = a_disk(path, format)
    opening.close_chain(disk.root)


def test_an_image_that_becomes_read_only_is_at_rest(image: Image) -> None:
    path, format = image
    disk = a_disk(path, format)
    bitmap = keep(disk)
    write(disk, 0)
    for _ in range(2):
        with disk.exclusive():
            disk.root.reopen(read_only=True)
        with pytest.raises(CowferryError, match="read-only"):
            keeper.changed(disk.root)
        assert look(path, format)["b0"].bits == bitmap.bits
        with disk.exclusive():
            disk.root.reopen(read_only=False)
        write(disk, 9 << 20)
        assert (bitmap.bits & ~on_disk(path).bits).count() == 0
    opening.close_chain(disk.root)


def test_without_persistent_bitmaps_there_is_no_file(image: Image) -> None:
    path, format = image
    disk = a_disk(path, format)
    first, second = keep(disk, "first"), keep(disk, "second")
    write(disk, 0)
    for bitmap in (first, second):
        with disk.exclusive():
            disk.root.bitmaps = {k: b for k, b in disk.root.bitmaps.items() if b is not bitmap}
            keeper.changed(disk.root)
    assert disk.root.keeper is None
    assert os.listdir(path.parent) == [path.name]
    assert Lane(disk).write(memoryview(bytearray(512)), 0, 512) == DONE
    opening.close_chain(disk.root)
    assert not look(path, format)


def test_a_file_in_the_state_folder_is_found_and_comes_back(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Path(moves.places(str(raw), ".bitmaps")[-1])
    with monkeypatch.context() as patch:  # a folder in which we may not write
        patch.setattr(moves, "place", lambda image, suffix: moves.places(image, suffix)[-1])
        disk = a_disk(raw)
        keep(disk)
        write(disk, 0)
        crash(disk)
        assert apart.exists() and os.listdir(raw.parent) == ["vm.raw"]
        assert look(raw)["b0"].count() == REGION
    disk = a_disk(raw)
    assert not apart.exists()
    assert on_disk(raw).count() == REGION
    opening.close_chain(disk.root)


# Races, each in one order ------------------------------------------------------------------------


def during_flush(
    patch: pytest.MonkeyPatch, disk: Disk, do: Callable[[], object]
) -> list[threading.Thread]:
    """While the marks of the next protect are being flushed, somebody else does something."""
    others: list[threading.Thread] = []
    plain, mine = sysio.fdatasync, kept(disk)._marks
    assert mine is not None

    def flush(fd: int) -> None:
        plain(fd)
        if fd == mine._fd and not others:
            others.append(Other(do))
            others[0].end()  # type: ignore[attr-defined]

    patch.setattr(sysio, "fdatasync", flush)
    return others


def test_B1_a_region_that_is_cleared_while_its_marks_are_flushed_is_marked_again(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = a_disk(raw)
    keep(disk)
    write(disk, 8 << 20)
    found = kept(disk)
    others = during_flush(monkeypatch, disk, found.checkpoint)
    start, end = found.protect(0, 4096)
    assert others and (start, end) == (0, REGION)
    assert on_disk(raw).count() == REGION + K64
    assert not found.holds.any(0, REGION) and found.holds.any(9 << 20, REGION)
    opening.close_chain(disk.root)


def test_B1_a_region_is_marked_in_the_file_that_replaced_the_one_it_was_marked_in(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = a_disk(raw)
    keep(disk)
    found = kept(disk)

    def another() -> None:
        disk.root.bitmaps = {**disk.root.bitmaps, "b1": Bitmap("b1", SIZE, 4096, persistent=True)}
        found.changed()

    # The old file is closed only when nobody flushes it: not the flusher's turn to wait for us.
    monkeypatch.setattr(found._marks, "close", lambda: None)
    assert during_flush(monkeypatch, disk, another) is not None
    found.protect(0, 4096)
    assert on_disk(raw, "b0").count() == on_disk(raw, "b1").count() == REGION
    assert not found.holds.any(0, REGION)
    opening.close_chain(disk.root)


def test_B1_a_checkpoint_waits_for_the_writes_that_are_on_their_way(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = a_disk(raw)
    bitmap = keep(disk)
    write(disk, 0)  # so that the next write goes by a lease
    slot = disk.gate.slot()
    assert disk.gate.try_enter(slot, K64, 2 * K64)  # a leased write that is about to be told
    waiting = threading.Event()
    real = disk.gate._blocked

    def blocked(*arguments: Any) -> bool:
        waiting.set()
        return real(*arguments)

    monkeypatch.setattr(disk.gate, "_blocked", blocked)
    other = Other(lambda: checkpoint(disk))
    assert waiting.wait(30)
    disk.mark(K64, 512)
    disk.gate.leave(slot)
    other.end()
    assert on_disk(raw).bits == bitmap.bits and bitmap.count() == 2 * K64
    opening.close_chain(disk.root)


def test_B2_a_guest_and_checkpoints_at_once(raw: Path) -> None:
    """Nothing is stepped here: whatever happens, what a crash leaves is a superset."""
    disk = a_disk(raw)
    before = bytes(contents(disk.root))
    keep(disk, "b0", 4096)
    over = threading.Event()

    def guest(seed: int) -> None:
        rnd, lane = random.Random(seed), Lane(disk)
        while not over.is_set():
            offset = rnd.randrange(SIZE // 512) * 512
            data = memoryview(rnd.randbytes(512))
            if lane.write(data, offset, 512) == SLOW:
                disk.pwrite(data, offset)

    guests = [Other(partial(guest, seed)) for seed in range(3)]
    for _ in range(12):
        checkpoint(disk)
        with disk.exclusive():
            assert not lacks(on_disk(raw), before, contents(disk.root))
    over.set()
    for g in guests:
        g.end()
    with disk.exclusive():
        assert not lacks(on_disk(raw), before, contents(disk.root))
    opening.close_chain(disk.root)


# What fails -------------------------------------------------------------------------------------


def test_B1_a_write_whose_mark_fails_has_changed_nothing(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = a_disk(raw)
    keep(disk)
    before = raw.read_bytes()
    for call in ("fdatasync", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(sysio, call, lambda *_: failing(errno.EIO)())
            patch.setattr(sysio, "create", lambda *_: failing(errno.ENOSPC)())
            with pytest.raises(OSError):
                write(disk, 0)
            assert Lane(disk).write(memoryview(bytearray(512)), 0, 512) == SLOW
    assert raw.read_bytes() == before
    write(disk, 0)
    assert on_disk(raw).count() == REGION
    opening.close_chain(disk.root)


def test_marks_that_could_not_be_flushed_are_written_once_more_if_there_is_no_room(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = a_disk(raw)
    keep(disk)
    write(disk, 9 << 20)
    old = os.stat(f"{raw}.bitmaps").st_ino
    wrote: list[int] = []
    plain = sysio.pwrite

    def pwrite(fd: int, buf: Any, offset: int) -> None:
        wrote.append(os.fstat(fd).st_ino)
        plain(fd, buf, offset)

    on_call(monkeypatch, sysio, "fdatasync", failing(errno.EIO))
    monkeypatch.setattr(sysio, "create", lambda *_: failing(errno.ENOSPC)())
    monkeypatch.setattr(sysio, "pwrite", pwrite)
    write(disk, 0)
    assert os.stat(f"{raw}.bitmaps").st_ino == old and wrote.count(old) == 3  # bits, bits, header
    assert on_disk(raw).count() == 2 * REGION


def test_marks_that_could_not_be_flushed_are_written_to_a_new_file(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux marks pages clean once it has told of a failure (N6): another flush proves nothing."""
    disk = a_disk(raw)
    keep(disk)
    write(disk, 9 << 20)
    old = os.stat(f"{raw}.bitmaps").st_ino
    on_call(monkeypatch, sysio, "fdatasync", failing(errno.EIO))
    write(disk, 0)
    assert os.stat(f"{raw}.bitmaps").st_ino != old
    assert on_disk(raw).count() == 2 * REGION
    opening.close_chain(disk.root)


@pytest.mark.parametrize("call", ["create", "pwrite", "fdatasync", "rename", "flush_directory"])
def test_B2_a_bitmap_that_could_not_be_added_is_not_there_and_the_others_are_kept(
    image: Image, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, format = image
    disk = a_disk(path, format)
    for name in ("b0", "b1"):
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(sysio, call, lambda *_: failing(errno.EIO)())
                if call == "fdatasync":  # the image itself is well
                    patch.setattr(disk.root, "flush", lambda: None)
                with pytest.raises(OSError), disk.exclusive():
                    keeper.keep(disk.root, Bitmap(name, SIZE, K64))
            assert name not in disk.root.bitmaps
            write(disk, 5 << 20)
        keep(disk, name)
        write(disk, 0)
    disk.flush()
    crash(disk)
    found = look(path, format)
    assert set(found) == {"b0", "b1"}
    assert all(not b.inconsistent and b.any(0, 1) for b in found.values())


@pytest.mark.parametrize("call", ["create", "fsync", "rename", "flush_directory"])
def test_B2_if_bitmaps_cannot_come_to_rest_they_are_supersets(
    raw: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = a_disk(raw)
    keep(disk)
    write(disk, 0)
    with monkeypatch.context() as patch:
        patch.setattr(sysio, call, lambda *_: failing(errno.EIO)())
        with pytest.raises(OSError), disk.exclusive():
            disk.root.reopen(read_only=True)
    assert not disk.read_only
    write(disk, 9 << 20)  # and goes on, marked in a file that is in use
    assert on_disk(raw).any(9 << 20, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sysio, call, lambda *_: failing(errno.EIO)())
        with pytest.raises(OSError, match="' are left as by a crash: Input/output error"):
            opening.close_chain(disk.root)
    found = look(raw)["b0"]
    assert not found.inconsistent and found.any(0, 1) and found.any(9 << 20, 1)


@pytest.mark.parametrize("call", ["create", "rename", "flush_directory"])
def test_B1_an_image_whose_bitmaps_cannot_be_kept_is_not_written(
    image: Image, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image with a bitmap file is not opened; one that holds its bitmaps refuses the write."""
    path, format = image
    disk = a_disk(path, format)
    keep(disk)
    write(disk, 0)
    opening.close_chain(disk.root)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sysio, call, lambda *_: failing(errno.EIO)())
        patch.setattr(bitmap_file.Marks, "_take_over", lambda *_: failing(errno.EIO)())
        if disk.root.stores_bitmaps:
            node = opening.open_image(str(path), format)
            with pytest.raises(OSError, match="Input/output error"):
                write(Disk(node, "vm"), 0)
            opening.close_chain(node)
        else:
            with pytest.raises(ImageError, match="cannot be kept: Input/output error") as error:
                opening.open_image(str(path), format)
            assert str(path) in error.value.desc and "read-only" in error.value.hint
            node = opening.open_image(str(path), format, read_only=True)
            with pytest.raises(OSError):
                node.reopen(read_only=False)
            assert node.read_only
            opening.close_chain(node)
        assert path.read_bytes() == before
        assert look(path, format)["b0"].count() == K64
    assert not look(path, format, read_only=False)["b0"].inconsistent


def test_an_image_that_is_opened_and_not_written_keeps_every_byte(image: Image) -> None:
    path, format = image
    disk = a_disk(path, format)
    keep(disk)
    write(disk, 0)
    opening.close_chain(disk.root)
    files = sorted(path.parent.iterdir())
    before = [file.read_bytes() for file in files]
    for _ in range(2):
        node = opening.open_image(str(path), format)
        node.reopen(read_only=True)
        node.reopen(read_only=False)
        opening.close_chain(node)
    assert sorted(path.parent.iterdir()) == files
    assert [file.read_bytes() for file in files] == before
    disk = a_disk(path, format)
    write(disk, 9 << 20)
    opening.close_chain(disk.root)
    assert look(path, format)["b0"].count() == 2 * K64


# With a daemon --------------------------------------------------------------------------------


def test_a_daemon_makes_coarse_bitmap_files_precise(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowferry.daemon.COARSE", REGION)
    daemon = Daemon()
    try:
        disk = daemon.open_disk("vm", str(raw), "raw")
        keep(disk)
        write(disk, 0)
        daemon.refine()
        assert kept(disk).coarse == REGION - K64  # not worth it
        write(disk, 9 << 20)
        daemon.refine()
        assert kept(disk).coarse == 0
        assert Lane(disk).write(memoryview(bytearray(512)), 2 * K64, 512) == SLOW
    finally:
        daemon.close()


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_B2_killed_again_and_again_bitmaps_are_supersets(tmp_path: Path, format: str) -> None:
    """SIGKILL: the page cache survives it, what was only in memory does not."""
    path = tmp_path / f"vm.{format}"
    opening.create_image(str(path), format, SIZE, {})
    before = bytes(SIZE)
    rnd = random.Random(7)
    run = Path(tempfile.mkdtemp(prefix="cf-"))  # a short name, for sockets
    with Nursery(tmp_path) as nursery:
        for life in range(LIVES):
            child = nursery.serve(run, vm=path)
            try:
                if not life:
                    child.qmp.execute(
                        "block-dirty-bitmap-add", {"node": "vm", "name": "b0", "persistent": True}
                    )
                with NbdClient(child.uris["vm"]) as guest:
                    for _ in range(rnd.randrange(1, 40)):
                        guest.pwrite(rnd.randbytes(5000), rnd.randrange(SIZE - 5000))
                    if life % 2:
                        guest.flush()
            finally:
                child.kill()
                child.qmp.close()
            node = opening.open_image(str(path), format, read_only=True)
            bitmap = node.bitmaps["b0"]
            assert not bitmap.inconsistent, bitmap.reason
            assert not lacks(bitmap, before, contents(node))
            opening.close_chain(node)
    shutil.rmtree(run)
