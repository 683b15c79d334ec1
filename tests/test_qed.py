"""QED by itself: NEED_CHECK, room, zeroes and sizes, and what may fail in between."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.node import State
from cowferry.drivers import opening
from cowferry.drivers.qed import header
from cowferry.drivers.qed.image import Qed
from cowferry.errors import CowferryError, ImageError, NotSupported
from orders import failing, on_call
from qeds import (
    CLUSTER,
    FIRST,
    L1,
    SIZE,
    SPAN,
    check,
    entry,
    field,
    make,
    opened,
    over_base,
    put,
    written,
)
from test_cli_offline import cowferry

# NEED_CHECK ------------------------------------------------------------------------------------


def test_it_is_durable_before_the_first_table_and_gone_when_all_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path)
    image = opened(path)
    oracle = bytearray(SIZE)
    order: list[tuple[str, int]] = []
    plain, sync = sysio.pwrite, sysio.fdatasync

    def pwrite(fd: int, buf: Any, offset: int) -> None:
        order.append(("write", offset))
        plain(fd, buf, offset)

    def fdatasync(fd: int) -> None:
        order.append(("flush", 0))
        sync(fd)

    monkeypatch.setattr(sysio, "pwrite", pwrite)
    monkeypatch.setattr(sysio, "fdatasync", fdatasync)
    put(image, oracle, 0, b"a" * CLUSTER)
    assert field(path, "features") == 0
    image.flush()
    flush = ("flush", 0)
    table = ("write", FIRST)  # it is placed first, so that a write can still fail
    data = ("write", FIRST + CLUSTER)
    assert order == [data, ("write", 0), flush, table, flush, ("write", L1), flush]
    assert field(path, "features") == header.NEED_CHECK
    put(image, oracle, CLUSTER, b"b" * CLUSTER)
    order.clear()
    image.close()
    assert order[-3:] == [flush, ("write", 0), flush] and order.count(table) == 1
    assert field(path, "features") == 0


def test_reads_and_writes_in_place_need_no_check(tmp_path: Path) -> None:
    path = make(tmp_path)
    oracle, _ = written(path)
    image = opened(path)
    put(image, oracle, 100, b"x" * CLUSTER)
    image.zero(CLUSTER, 700, unmap=True)
    image.discard(2 * CLUSTER, CLUSTER)
    image.flush()
    assert field(path, "features") == 0 and not image.unflushed
    image.close()


def test_a_writer_that_crashed_before_the_file_had_grown(tmp_path: Path) -> None:
    """Its entries point beyond the end. Nothing had been promised, so they are dropped."""
    path = make(tmp_path)
    written(path, 1)
    oracle, l2 = written(path, 6)
    with open(path, "r+b") as f:  # the last two clusters never came, half of one did
        f.truncate(path.stat().st_size - 2 * CLUSTER + 1000)
    oracle[4 * CLUSTER : 6 * CLUSTER] = bytes(2 * CLUSTER)
    field(path, "features", header.NEED_CHECK)
    before = path.read_bytes()
    image = opened(path, read_only=True)
    buf = memoryview(bytearray(CLUSTER))
    image.pread(buf, 3 * CLUSTER)
    with pytest.raises(OSError):
        image.pread(buf, 4 * CLUSTER)
    image.close()
    assert path.read_bytes() == before
    image = opened(path)
    assert field(path, "features") == 0
    assert not differs(contents(image), oracle)
    put(image, oracle, 5 * CLUSTER, b"new" * 1000)
    image.close()
    assert check(path).exit_code == 0
    assert entry(path, l2 + 8 * 4) == 0


def test_leaks_at_the_end_are_cut_off_and_others_are_told(tmp_path: Path) -> None:
    path = make(tmp_path)
    oracle, l2 = written(path, 4)
    tight = path.stat().st_size
    with open(path, "ab") as f:
        f.write(b"junk" * 5000)
    assert check(path).exit_code == 3
    assert check(path, "leaks").exit_code == 0
    assert path.stat().st_size == tight
    with open(path, "ab") as f:
        f.write(b"junk" * 5000)
    field(path, "features", header.NEED_CHECK)
    image = opened(path)
    assert path.stat().st_size == tight and not differs(contents(image), oracle)
    image.close()
    entry(path, l2 + 8, 0)
    assert "1 leaked clusters" in cowferry("check", "-r", "all", path, code=3)


def test_a_file_whose_end_is_not_aligned_is_read_and_grows_behind_it(tmp_path: Path) -> None:
    path = make(tmp_path)
    oracle, _ = written(path)
    with open(path, "ab") as f:
        f.write(b"tail" * 300)
    size = path.stat().st_size
    image = opened(path)
    assert not differs(contents(image), oracle)
    put(image, oracle, 9 * CLUSTER + 5, b"more")
    image.close()
    assert path.read_bytes()[size - 1200 : size] == b"tail" * 300
    assert path.stat().st_size % CLUSTER == 0
    image = opened(path)
    assert not differs(contents(image), oracle)
    assert image.check().leaks == 1
    image.close()


# Room ------------------------------------------------------------------------------------------


def test_room_that_was_not_needed_is_used_next_and_what_is_left_goes_back_to_the_host(
    tmp_path: Path,
) -> None:
    path, oracle = over_base(tmp_path)
    image = opened(path)
    room = image.reserve(0, 4 * CLUSTER)
    assert room is not None and sum(r.length for r in room) == 4 * CLUSTER
    for r in room:
        sysio.pwrite(r.fd, b"old bytes of nobody.." * 780, r.host)
        image.unreserve(r)
    put(image, oracle, 100, b"in the first of them")  # its rest comes from below, not from before
    put(image, oracle, SIZE - 10, b"0123456789")
    image.close()
    assert path.stat().st_size == FIRST + 3 * CLUSTER  # a table and two clusters
    image = opened(path)
    assert not differs(contents(image), oracle)
    assert image.check().leaks == 0  # what is left lay at the end
    opening.close_chain(image)


def test_room_in_the_middle_that_was_not_needed_leaks_and_holds_no_bytes(tmp_path: Path) -> None:
    path, oracle = over_base(tmp_path)
    image = opened(path)
    (room,) = image.reserve(0, 2 * CLUSTER) or []
    sysio.pwrite(room.fd, b"x" * room.length, room.host)
    put(image, oracle, 8 * CLUSTER, b"behind it")
    image.unreserve(room)
    image.close()
    image = opened(path)
    assert not differs(contents(image), oracle) and image.check().leaks == 2
    assert path.stat().st_blocks * 512 <= path.stat().st_size - 2 * CLUSTER
    opening.close_chain(image)


def test_reserved_room_is_filled_and_linked(tmp_path: Path) -> None:
    path, oracle = over_base(tmp_path, SIZE + 512)
    image = opened(path)
    at = SIZE - 4 * CLUSTER
    for r in image.reserve(at, SIZE + 512 - at) or []:
        sysio.pwrite(r.fd, b"w" * r.length, r.host)
        image.link(at, r)
        oracle[at : at + r.length] = b"w" * r.length
        at += r.length
    assert at == SIZE + 512 and not differs(contents(image), oracle)
    image.resize(SIZE + CLUSTER)
    oracle.extend(bytes(CLUSTER - 512))
    assert not differs(contents(image), oracle)
    opening.close_chain(image)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_changes_nothing_and_its_room_is_used_again(
    tmp_path: Path, code: int
) -> None:
    path, oracle = over_base(tmp_path)
    image = opened(path)
    for offset, data in ((0, b"w" * 3 * CLUSTER), (5000, b"part")):
        with pytest.MonkeyPatch.context() as patch:
            on_call(patch, sysio, "pwrite", failing(code))
            with pytest.raises(OSError):
                image.pwrite(memoryview(data), offset)
        assert not differs(contents(image), oracle)
    put(image, oracle, 0, b"w" * 3 * CLUSTER)
    image.close()
    assert opened(path, read_only=True).check().leaks == 0


def test_E2_a_flush_that_fails_at_any_step_forgets_nothing(tmp_path: Path) -> None:
    step = 0
    while True:
        step += 1
        (tmp_path / str(step)).mkdir()
        path, oracle = over_base(tmp_path / str(step))
        image = opened(path)
        put(image, oracle, 0, b"1" * CLUSTER)
        with pytest.MonkeyPatch.context() as patch:
            on_call(patch, sysio, "pwrite", failing(errno.ENOSPC), step)
            try:
                image.flush()
            except OSError:
                failed = True
            else:
                failed = False
        put(image, oracle, 3 * CLUSTER, b"2" * 100)
        assert not differs(contents(image), oracle)
        image.flush()
        image.close()
        image = opened(path)
        assert not differs(contents(image), oracle) and image.check().exit_code == 0
        opening.close_chain(image)
        if not failed:
            assert step == 4  # the header, a page, the L1 entry
            return


def test_N6_a_failed_flush_is_sticky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    disk = Disk(opened(path), "vm")
    disk.pwrite(memoryview(b"x" * 4096), 0)
    with monkeypatch.context() as patch:
        patch.setattr(sysio, "fdatasync", _broken)
        with pytest.raises(OSError):
            disk.flush()
    for _ in range(2):
        with pytest.raises(OSError) as error:
            disk.flush()
        assert error.value.errno == errno.EIO
    with pytest.raises(OSError):
        opening.close_chain(disk.root)


def _broken(fd: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


# Zeroes, sizes, pages --------------------------------------------------------------------------


def states(image: Qed) -> list[tuple[int, State]]:
    return [(e.length // CLUSTER, e.state) for e in image.extents(0, image.size)]


def test_ST4_zeroes_and_discards_never_show_the_backing(tmp_path: Path) -> None:
    path, oracle = over_base(tmp_path, 8 * CLUSTER)
    image = opened(path)
    put(image, oracle, 0, b"d" * CLUSTER)
    image.zero(0, 3 * CLUSTER)
    image.discard(4 * CLUSTER, CLUSTER)
    oracle[: 3 * CLUSTER] = bytes(3 * CLUSTER)
    oracle[4 * CLUSTER : 5 * CLUSTER] = bytes(CLUSTER)
    assert states(image) == [
        (1, State.DATA), (2, State.ZERO), (1, State.HOLE), (1, State.ZERO), (3, State.HOLE),
    ]  # fmt: skip
    image.zero(5 * CLUSTER + 100, 2 * CLUSTER)  # parts of two, and one between
    oracle[5 * CLUSTER + 100 : 7 * CLUSTER + 100] = bytes(2 * CLUSTER)
    assert not differs(contents(image), oracle)
    put(image, oracle, CLUSTER + 7, b"into a zero cluster")
    assert not differs(contents(image), oracle)
    opening.close_chain(image)
    image = opened(path)
    assert not differs(contents(image), oracle) and image.check().exit_code == 0
    opening.close_chain(image)


def test_zeroes_without_a_backing_file_take_no_room(tmp_path: Path) -> None:
    path = make(tmp_path)
    size = path.stat().st_size
    image = opened(path)
    image.zero(0, SIZE)
    image.discard(0, SIZE)
    image.zero(1000, 5000)
    image.close()
    assert path.stat().st_size == size


def test_what_is_discarded_goes_back_to_the_host(tmp_path: Path) -> None:
    path = make(tmp_path, cluster_size="64k", size=8 << 20)
    image = opened(path)
    image.pwrite(memoryview(b"x" * (8 << 20)), 0)
    image.flush()
    full = path.stat().st_blocks
    image.discard(1 << 20, 6 << 20)
    image.flush()
    assert path.stat().st_blocks * 512 < (full * 512) - (5 << 20)  # of 6; extents cost blocks, too
    assert image.check().leaks == 0
    image.close()


@pytest.mark.parametrize("below", [SIZE - 3000, SIZE + 3000, SIZE + 5 * CLUSTER + 512])
@pytest.mark.parametrize("size", [SIZE - 512, SIZE - CLUSTER, SIZE - 7 * 512])
def test_what_a_disk_grows_by_reads_as_zero_whatever_lies_below(
    tmp_path: Path, size: int, below: int
) -> None:
    oracle = make_base(tmp_path, below)[:size].ljust(size, b"\0")
    path = make(tmp_path, size=size, backing_file="base.raw", backing_fmt="raw")
    for start in (0, 1):  # with its last cluster in place, and without
        image = opened(path)
        if start:
            put(image, oracle, image.size - 100, b"e" * 100)
        bigger = image.size + 3 * CLUSTER + 512
        image.resize(bigger)
        oracle.extend(bytes(bigger - len(oracle)))
        assert not differs(contents(image), oracle)
        opening.close_chain(image)
        image = opened(path, read_only=True)
        assert not differs(contents(image), oracle) and image.check().exit_code == 0
        opening.close_chain(image)


def test_entries_beyond_the_end_of_the_disk_do_not_become_its_bytes(tmp_path: Path) -> None:
    path = make(tmp_path, size=2 * CLUSTER)
    _, l2 = written(path, 2)
    entry(path, l2 + 8 * 5, entry(path, l2))
    entry(path, L1 + 8, l2)
    image = opened(path)
    image.resize(2 * SPAN)
    assert not any(contents(image)[2 * CLUSTER :])
    image.close()
    assert entry(path, l2 + 8 * 5) == 0 and entry(path, L1 + 8) == 0
    assert check(path).exit_code == 0


def test_it_cannot_shrink_nor_outgrow_its_tables(tmp_path: Path) -> None:
    image = opened(make(tmp_path))
    with pytest.raises(NotSupported, match="cannot be made smaller"):
        image.resize(SIZE - 512)
    with pytest.raises(CowferryError, match="its tables can map"):
        image.resize((1 << 30) + 512)
    image.resize(SIZE + 1)
    assert image.size == SIZE + 512
    image.resize(1 << 30)
    image.close()


def test_tables_are_read_in_pages_and_few_are_kept(tmp_path: Path) -> None:
    """A table of 256 KiB has four pages; only those that changed are written."""
    path = make(tmp_path, size=16 << 30, cluster_size="64k", table_size=4)
    image = opened(path)
    image.tables.keep = 3
    rnd = random.Random(5)
    wrote = {}
    for _ in range(60):
        at = rnd.randrange(16 << 30) // 512 * 512
        wrote[at] = rnd.randbytes(512)
        image.pwrite(memoryview(wrote[at]), at)
        if rnd.random() < 0.2:
            image.flush()
            image.extents(0, image.size)
            assert len(image.tables.pages) <= 4
    for _ in range(2):
        for at, data in wrote.items():
            buf = memoryview(bytearray(512))
            image.pread(buf, at)
            assert bytes(buf) == data
        image.close()
        image = opened(path)
        image.tables.keep = 3
    assert image.check().exit_code == 0
    image.close()


def test_clusters_of_64_MiB_are_copied_on_write_in_pieces(tmp_path: Path) -> None:
    size = (64 << 20) + 512
    with open(tmp_path / "base.raw", "wb") as f:
        f.write(b"head" * 100_000)
        f.truncate(size)
    path = make(
        tmp_path, size=size, cluster_size="64M", table_size=16,
        backing_file="base.raw", backing_fmt="raw",
    )  # fmt: skip
    oracle = bytearray((tmp_path / "base.raw").read_bytes())
    image = opened(path)
    put(image, oracle, (3 << 20) - 7, b"across two pieces" * 10)
    assert not differs(contents(image), oracle)
    opening.close_chain(image)
    assert path.stat().st_blocks * 512 < 8 << 20
    image = opened(path, read_only=True)
    assert not differs(contents(image), oracle) and image.check().exit_code == 0
    opening.close_chain(image)


def test_a_device_or_a_file_too_large_is_refused_with_one_line(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open(path, "r+b") as f:
        f.truncate(5 << 40)
    assert "too large to be checked" in cowferry("check", path, code=1)
    with pytest.raises(ImageError, match="neither a regular file nor a block device"):
        opening.create_image("/dev/null", "qed", SIZE, {})


def test_access_changes_and_the_image_is_clean_whenever_nobody_writes(tmp_path: Path) -> None:
    path, oracle = over_base(tmp_path)
    image = opened(path)
    put(image, oracle, 0, b"one")
    image.reopen(True)
    assert field(path, "features") == header.BACKING_FILE | header.RAW_BACKING
    with pytest.raises(OSError, match="read-only"):
        image.pwrite(memoryview(b"x"), 0)
    image.reopen(False)
    put(image, oracle, CLUSTER, b"two")
    assert not differs(contents(image), oracle)
    opening.close_chain(image)
    image = opened(path)
    assert not differs(contents(image), oracle) and image.check().exit_code == 0
    opening.close_chain(image)
