"""The rules of the disk: leases never outlive what they say, exclusive means exclusive."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chains import contents, differs, make_base, overlay_disk
from cowferry.block import sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.lease import WRITABLE
from cowferry.block.node import Extent, State
from cowferry.drivers import opening
from cowferry.jobs.stream import Fill

SIZE = 4 << 20
GRANULE = 64 << 10


@contextmanager
def guests(disk: Disk, oracle: bytearray) -> Iterator[threading.Event]:
    """Four threads write and read back sectors of their own; the oracle has it all at the end."""
    stop = threading.Event()
    started = threading.Barrier(5)
    wrong: list[str] = []

    def guest(lane: int) -> None:
        rnd = random.Random(lane)
        mine: dict[int, bytes] = {}
        started.wait()
        while not stop.is_set():
            sector = rnd.randrange(SIZE // 2048) * 4 + lane
            mine[sector] = data = rnd.randbytes(512)
            disk.pwrite(memoryview(data), sector * 512)
            back = memoryview(bytearray(512))
            disk.pread(back, sector * 512)
            if back != mine[sector]:
                wrong.append(f"sector {sector} of guest {lane}")
        for sector, data in mine.items():
            oracle[sector * 512 : sector * 512 + 512] = data

    threads = [threading.Thread(target=guest, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    assert not differs(contents(disk), oracle)


def fill(disk: Disk, chunk: int = GRANULE) -> Iterator[int]:
    """The steps of a stream, without the job around them."""
    work = Fill(disk, disk.root, None)
    for offset in range(0, disk.size, chunk):
        yield work.chunk(offset, min(chunk, disk.size - offset))


def test_ST1_writes_between_the_steps_of_a_stream(tmp_path: Path) -> None:
    disk, oracle = overlay_disk(tmp_path, SIZE)
    rnd = random.Random(2)
    for _ in fill(disk, 256 << 10):
        for _ in range(4):
            offset = rnd.randrange(SIZE - 90_000)
            data = rnd.randbytes(rnd.randrange(1, 90_000))
            disk.pwrite(memoryview(data), offset)
            oracle[offset : offset + len(data)] = data
        assert not differs(contents(disk), oracle)
    with disk.exclusive():
        backing, disk.root.backing = disk.root.backing, None
    opening.close_chain(backing)
    assert not differs(contents(disk), oracle)
    disk.root.close()


def test_ST1_a_write_between_the_two_halves_of_a_chunk_wins(tmp_path: Path) -> None:
    disk, oracle = overlay_disk(tmp_path, SIZE)
    work = Fill(disk, disk.root, None)
    room, rest = work.prepare(0, 1 << 20)
    assert room, "nothing was prepared"
    data = b"guest" * 100
    disk.pwrite(memoryview(data), 70_000)
    oracle[70_000 : 70_000 + len(data)] = data
    work.settle(0, 1 << 20, room, rest)
    assert not differs(contents(disk), oracle)
    disk.root.flush()
    opening.close_chain(disk.root)


def test_ST1_writers_and_a_stream_at_once(tmp_path: Path) -> None:
    disk, oracle = overlay_disk(tmp_path, SIZE)
    with guests(disk, oracle):
        for _ in range(3):
            for _ in fill(disk):
                pass
    opening.close_chain(disk.root)


def test_room_filled_while_a_flush_writes_tables_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush makes the file as long as the clusters taken; a stream may be filling more."""
    disk, _ = overlay_disk(tmp_path, SIZE)
    root = disk.root
    data = random.Random(7).randbytes(8 * GRANULE)
    room: list[Extent] = []
    whole = sysio.pwrite

    def between(fd: int, buf: bytes, offset: int) -> None:
        whole(fd, buf, offset)
        if not room:  # the flush's first write: another thread takes room and fills it
            got = root.reserve(2 << 20, len(data))
            assert got is not None
            room.extend(got)
            whole(room[0].fd, data, room[0].host)

    disk.pwrite(memoryview(bytes(GRANULE)), 0)
    spare = root.reserve(0, 16 * GRANULE)  # taken, never written: the file has to grow
    assert spare
    monkeypatch.setattr(sysio, "pwrite", between)
    root.flush()
    monkeypatch.undo()
    assert os.pread(room[0].fd, len(data), room[0].host) == data


def test_a_table_resolved_across_a_change_is_not_kept(tmp_path: Path) -> None:
    """Deterministic: granule 1 gets a place while a miss on granule 0 resolves the whole array."""
    disk, oracle = overlay_disk(tmp_path, SIZE)
    top = disk.root
    plain, changed = top.extents, []
    new = bytes(range(256)) * 2

    def write() -> None:
        disk.pwrite(memoryview(new), GRANULE)
        changed.append(True)

    def extents(offset: int, length: int) -> Iterator[Extent]:
        answer = list(plain(offset, length))
        if not changed and length > GRANULE:
            # the old answer is in hand; the mapping changes before it can be kept
            thread = threading.Thread(target=write)
            top.extents = plain  # type: ignore[method-assign]
            thread.start()
            thread.join(10)
        return iter(answer)

    top.extents = extents  # type: ignore[method-assign]
    disk.pread(memoryview(bytearray(512)), 0)
    assert changed, "the change did not happen in the middle"
    oracle[GRANULE : GRANULE + 512] = new
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)


def test_leaving_exclusive_drops_the_leases_of_the_range(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw")), "d")
    contents(disk)
    assert disk._leased(0, SIZE, 0) is not None
    with disk.exclusive(GRANULE, GRANULE):
        pass
    assert disk._leased(GRANULE, 2 * GRANULE, 0) is None
    assert disk._leased(0, GRANULE, 0) is not None
    assert disk._leased(2 * GRANULE, SIZE, 0) is not None
    opening.close_chain(disk.root)


def test_a_granule_written_in_part_in_a_sparse_file_is_leased_again_after_a_drain(
    tmp_path: Path,
) -> None:
    """Its bytes lie in one place, whatever the file system has of them."""
    path = tmp_path / "d.raw"
    opening.create_image(str(path), "raw", SIZE, {})
    disk = Disk(opening.open_image(str(path), "raw"))
    disk.pwrite(memoryview(b"x" * 4096), GRANULE + 8192)
    with disk.exclusive():
        pass
    disk.leases.fill(disk.root, 0, SIZE)
    assert len({e.state for e in disk.root.extents(GRANULE, GRANULE)}) == 2, "a granule in parts"
    assert disk._leased(0, SIZE, WRITABLE) is not None
    oracle = bytearray(SIZE)
    oracle[GRANULE + 8192 : GRANULE + 12288] = b"x" * 4096
    assert contents(disk) == oracle
    disk.root.close()


def test_after_an_allocating_write_only_what_it_changed_is_resolved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, oracle = overlay_disk(tmp_path, SIZE)
    data = memoryview(b"g" * 512)
    disk.pread(memoryview(bytearray(512)), 0)
    asked: list[tuple[int, int]] = []
    extents = disk.root.extents

    def counted(offset: int, length: int) -> Iterator[Extent]:
        asked.append((offset, length))
        return extents(offset, length)

    monkeypatch.setattr(disk.root, "extents", counted)
    for granule in (3, 9, 10):
        at = granule * GRANULE + 1024
        disk.pwrite(data, at)  # allocates: the leases say that it cannot be written in place
        disk.pwrite(data, at + 512)  # in place
        oracle[at : at + 1024] = b"g" * 1024
        beyond = [a for a in asked if a[0] // GRANULE != granule or a[1] > GRANULE]
        assert asked and not beyond, beyond
        asked.clear()
    assert not differs(contents(disk), oracle)
    disk.root.close()


@pytest.mark.parametrize(
    ("offset", "length", "code"),
    [
        (SIZE, 1, errno.ENOSPC),
        (SIZE - 1, 2, errno.ENOSPC),
        (-1, 1, errno.EINVAL),
        (1 << 63, 1, errno.ENOSPC),
        ((1 << 64) - 512, 512, errno.ENOSPC),
    ],
)
def test_a_range_outside_the_disk_is_refused(
    tmp_path: Path, offset: int, length: int, code: int
) -> None:
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw")), "d")
    acts: list[Callable[[], None]] = [
        lambda: disk.pwrite(memoryview(bytes(length)), offset),
        lambda: disk.zero(offset, length),
    ]
    for act in acts:
        with pytest.raises(OSError) as error:
            act()
        assert error.value.errno == code
    acts = [
        lambda: disk.discard(offset, length),
        lambda: disk.pread(memoryview(bytearray(length)), offset),
    ]
    for act in acts:  # neither needs room
        with pytest.raises(OSError) as error:
            act()
        assert error.value.errno == errno.EINVAL
    opening.close_chain(disk.root)


def test_copy_on_read_keeps_what_was_read_and_only_that(tmp_path: Path) -> None:
    disk, oracle = overlay_disk(tmp_path, SIZE)
    disk.copy_on_read = True
    buf = memoryview(bytearray(1000))
    disk.pread(buf, 3 * GRANULE + 17)
    assert buf == oracle[3 * GRANULE + 17 : 3 * GRANULE + 1017]
    states = [
        e.state for e in disk.root.extents(0, 5 * GRANULE) for _ in range(e.length // GRANULE)
    ]
    assert states == [State.HOLE] * 3 + [State.DATA] + [State.HOLE]
    with guests(disk, oracle):
        contents(disk)
    opening.close_chain(disk.root)


def test_bitmaps_hear_of_every_kind_of_write(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw")), "d")
    disk.bitmaps["b"] = bitmap = Bitmap("b", SIZE, GRANULE)
    contents(disk)
    assert bitmap.count() == 0
    disk.pwrite(memoryview(b"x"), GRANULE)
    disk.zero(3 * GRANULE - 1, 2)
    disk.discard(8 * GRANULE, GRANULE)
    assert list(bitmap.runs()) == [(GRANULE, 3 * GRANULE), (8 * GRANULE, GRANULE)]
    opening.close_chain(disk.root)


def test_reads_do_not_see_half_of_an_exclusive_section(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw")), "d")
    stop = threading.Event()
    torn: list[bytes] = []
    disk.pwrite(memoryview(bytes(8192)), 0)

    def reader() -> None:
        buf = bytearray(8192)
        while not stop.is_set():
            disk.pread(memoryview(buf), 0)
            if buf[0] != buf[-1]:
                torn.append(bytes(buf[:1] + buf[-1:]))

    thread = threading.Thread(target=reader)
    thread.start()
    for n in range(300):
        with disk.exclusive(0, 8192):
            disk.root.pwrite(memoryview(bytes([n % 251]) * 4096), 0)
            disk.root.pwrite(memoryview(bytes([n % 251]) * 4096), 4096)
    stop.set()
    thread.join()
    assert not torn
    opening.close_chain(disk.root)


def test_a_read_only_disk_refuses_writes(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw"), read_only=True), "d")
    with pytest.raises(OSError) as error:
        disk.pwrite(memoryview(b"x"), 0)
    assert error.value.errno == errno.EPERM
    assert os.path.getsize(tmp_path / "base.raw") == SIZE
    opening.close_chain(disk.root)
