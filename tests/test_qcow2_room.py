"""Room in a qcow2 image: free clusters are used again, and a refused allocation changes nothing.

Devices here are loop devices, and full file systems are tmpfs: they say no at once. Images of small
clusters make every table small, so that a few hundred writes meet every border.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains import contents, differs
from cowferry.drivers import opening
from cowferry.drivers.qcow2 import free
from cowferry.drivers.qcow2.clusters import COPIED, ZERO_FLAG
from cowferry.drivers.qcow2.free import FreeRuns
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.errors import CowferryError
from mounts import Device, Mount, device, limited, mount

__all__ = ["device", "mount"]  # fixtures

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB


def make(path: str | Path, size: int, **options: Any) -> None:
    opening.create_image(str(path), "qcow2", size, options)


def opened(path: str | Path, **how: Any) -> Qcow2:
    node = opening.open_image(str(path), "qcow2", **how)
    assert isinstance(node, Qcow2)
    return node


def put(image: Qcow2, oracle: bytearray, offset: int, data: bytes) -> None:
    image.pwrite(memoryview(data), offset)
    oracle[offset : offset + len(data)] = data


def qemu_check(path: str | Path) -> int:
    """The exit code of QEMU's own check: 0 is clean, 3 has leaks."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True
    )
    return done.returncode


def judge(path: str | Path, oracle: bytes | bytearray) -> None:
    """The image reads as the oracle, for us and for QEMU, and has neither leaks nor damage."""
    image = opened(path, read_only=True)
    assert not differs(contents(image), oracle)
    image.close()
    assert qemu_check(path) == 0
    with tempfile.TemporaryDirectory() as folder:
        raw = f"{folder}/plain.raw"
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), raw], check=True
        )
        assert not differs(Path(raw).read_bytes(), oracle)


# The list of free runs ----------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60)
def test_a_list_of_free_runs_holds_what_a_set_of_clusters_would(data: st.DataObject) -> None:
    runs, model = FreeRuns(), set[int]()
    runs.frontier = frontier = 64
    for _ in range(data.draw(st.integers(1, 40))):
        verb = data.draw(st.sampled_from(["add", "take", "exactly", "discard"]))
        first, count = data.draw(st.integers(0, 63)), data.draw(st.integers(1, 9))
        clusters = set(range(first, min(first + count, frontier)))
        if verb == "add" and not clusters & model:
            runs.add(first, count)
            model |= clusters
        elif verb == "take":
            found = runs.take(count)
            assert (found is None) == (not model)
            if found is not None:
                got = set(range(found[0], found[0] + found[1]))
                assert got <= model and len(got) == found[1] <= count
                model -= got
        elif verb == "exactly":
            start = runs.take_exactly(count)
            row = [c for c in model if set(range(c, c + count)) <= model]
            assert start == min(row, default=None)
            if start is not None:
                model -= set(range(start, start + count))
        elif verb == "discard":
            runs.discard(first, count)
            model -= set(range(first, first + count))
        assert runs.total == len(model)


def test_a_list_of_free_runs_forgets_the_highest_when_it_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(free, "MAX_RUNS", 3)
    runs = FreeRuns()
    runs.frontier = 100
    for first in (90, 10, 50, 30):
        runs.add(first, 2)
    assert runs.frontier == 90 and runs.total == 6
    runs.add(95, 1)
    assert runs.total == 6, "what lies above the frontier is found again by looking"


# Free clusters are used again ---------------------------------------------------------------------


def test_a_disk_that_is_trimmed_and_filled_again_and_again_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    make(path, 16 * MIB)
    image = opened(path)
    for round in range(1, 8):
        image.discard(0, 16 * MIB)
        image.flush()
        image.pwrite(memoryview(bytes([round]) * (16 * MIB)), 0)
    image.close()
    assert path.stat().st_size <= 17 * MIB
    judge(path, bytes([7]) * (16 * MIB))


@pytest.mark.parametrize("size", [CLUSTER, 3 * CLUSTER, 4 * MIB])
def test_room_is_used_again_without_a_flush_of_the_guest(
    device: Device, size: int, tmp_path: Path
) -> None:
    """A device has room for one copy of the data and a little more."""
    path = device(9 * MIB)
    make(path, 8 * MIB)
    image, oracle = opened(path), bytearray(8 * MIB)
    for round in range(1, 6):
        for at in range(0, 8 * MIB, size):
            n = min(size, 8 * MIB - at)
            image.discard(at, n)
            put(image, oracle, at, bytes([round]) * n)
    image.close()
    judge(path, oracle)


def test_room_that_an_earlier_program_left_free_is_used(tmp_path: Path) -> None:
    """Nothing says beforehand where an image that was opened has free clusters."""
    path = tmp_path / "vm.qcow2"
    make(path, 16 * MIB)
    image = opened(path)
    image.pwrite(memoryview(b"a" * (16 * MIB)), 0)
    image.close()
    image = opened(path)
    oracle = bytearray(b"a" * (16 * MIB))
    for at in range(0, 16 * MIB, 2 * CLUSTER):
        image.discard(at, CLUSTER)
        oracle[at : at + CLUSTER] = bytes(CLUSTER)
    image.close()
    before = path.stat().st_size
    image = opened(path)
    for at in range(0, 8 * MIB, 2 * CLUSTER):
        put(image, oracle, at, b"b" * CLUSTER)
    image.close()
    assert path.stat().st_size <= before
    judge(path, oracle)


def test_a_large_request_is_not_cut_into_crumbs_while_little_is_free(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    make(path, 64 * MIB)
    image = opened(path)
    image.pwrite(memoryview(b"a" * (32 * MIB)), 0)
    for at in range(0, 1 * MIB, 2 * CLUSTER):
        image.discard(at, CLUSTER)
    image.flush()
    room = image.reserve(32 * MIB, 8 * MIB)
    assert room is not None and len(room) == 1
    image.unreserve(room[0])
    image.close()


@pytest.mark.parametrize("width", [1, 2, 16, 64])
@pytest.mark.parametrize("cluster", [512, 4096])
def test_small_clusters_grow_their_refcount_table_and_blocks_in_place(
    tmp_path: Path, cluster: int, width: int
) -> None:
    """A block for a range used to be put at its start, whatever lay there."""
    path = tmp_path / "vm.qcow2"
    size = 8 * MIB if cluster == 512 else 24 * MIB
    make(path, size, cluster_size=cluster, refcount_bits=width)
    image, oracle = opened(path), bytearray(size)
    for at in range(0, size // 2, 256 * KIB):
        put(image, oracle, at, bytes([at >> 18 & 0xFF | 1]) * (256 * KIB))
    image.flush()
    for at in range(size // 2, size // 2 + 64 * KIB, 3 * cluster):
        put(image, oracle, at, b"z" * cluster)
    image.close()
    judge(path, oracle)


@pytest.mark.parametrize("larger", [MIB << 9, 1 << 40])
def test_resizing_an_image_of_small_clusters_ends(tmp_path: Path, larger: int) -> None:
    cluster = 512 if larger < 1 << 35 else 64 * KIB
    path = tmp_path / "vm.qcow2"
    make(path, 4 * MIB, cluster_size=cluster)
    image = opened(path)
    image.pwrite(memoryview(b"a" * MIB), 0)
    with limited(64 * MIB):
        image.change_size(larger)
        image.close()
    image = opened(path)
    assert image.size == larger
    image.pwrite(memoryview(b"b" * KIB), larger - KIB)
    image.close()
    assert qemu_check(path) == 0


@given(st.data())
@settings(max_examples=15)
def test_any_order_of_writes_trims_and_flushes_leaves_an_image_that_is_right(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The file is never much larger than the most that was in use at once."""
    cluster = data.draw(st.sampled_from([512, 4096, 64 * KIB]))
    width = data.draw(st.sampled_from([1, 8, 16, 64]))
    clusters = 256 if cluster < 64 * KIB else 48
    size = clusters * cluster
    path = tmp_path_factory.mktemp("room") / "vm.qcow2"
    make(path, size, cluster_size=cluster, refcount_bits=width)
    image, oracle, most = opened(path), bytearray(size), 0
    for number in range(data.draw(st.integers(1, 30))):
        verb = data.draw(st.sampled_from(["write", "write", "discard", "zero", "flush", "reopen"]))
        first = data.draw(st.integers(0, clusters - 1))
        count = min(data.draw(st.sampled_from([1, 2, 7, 64, 256])), clusters - first)
        at, n = first * cluster, count * cluster
        if verb == "write":
            cut = data.draw(st.sampled_from([0, 1, cluster // 2]))
            put(image, oracle, at + cut, bytes([number % 255 + 1]) * (n - cut))
        elif verb == "discard":
            image.discard(at, n)
            oracle[at : at + n] = bytes(n)
        elif verb == "zero":
            image.zero(at, n, unmap=number % 2 == 0)
            oracle[at : at + n] = bytes(n)
        elif verb == "flush":
            image.flush()
        else:
            image.close()
            image = opened(path)
        most = max(most, sum(map(bool, (oracle[i : i + cluster].strip(b"\0")
                                        for i in range(0, size, cluster)))))  # fmt: skip
        assert not differs(contents(image), oracle)
    image.close()
    assert path.stat().st_size <= 1.3 * most * cluster + 4 * MIB
    judge(path, oracle)


# A refused allocation changes nothing -------------------------------------------------------------


def test_a_write_that_does_not_fit_a_device_leaks_nothing(device: Device) -> None:
    path = device(6 * MIB)
    make(path, 64 * MIB)
    image, oracle = opened(path), bytearray(64 * MIB)
    with pytest.raises(OSError, match="full") as refused:
        image.pwrite(memoryview(b"a" * (8 * MIB)), 32 * MIB)
    assert refused.value.errno == errno.ENOSPC
    start = contents(image)
    assert set(bytes(start)) <= {0, ord("a")}
    oracle[:] = start
    image.discard(32 * MIB, 8 * MIB)
    oracle[32 * MIB : 40 * MIB] = bytes(8 * MIB)
    put(image, oracle, 4 * MIB, b"b" * (4 * MIB))
    image.close()
    judge(path, oracle)


def test_a_full_device_serves_what_fits_into_its_free_clusters(device: Device) -> None:
    path = device(4 * MIB)
    make(path, 16 * MIB)
    image, oracle = opened(path), bytearray(16 * MIB)
    at = 0
    with pytest.raises(OSError, match="full"):
        while True:
            put(image, oracle, at, bytes([at >> 16 & 0xFF | 1]) * CLUSTER)
            at += CLUSTER
    for hole in range(0, at, 5 * CLUSTER):
        image.discard(hole, CLUSTER)
        oracle[hole : hole + CLUSTER] = bytes(CLUSTER)
    for again in range(0, at, 5 * CLUSTER):
        put(image, oracle, 8 * MIB + again, b"n" * CLUSTER)
    with pytest.raises(OSError, match="full"):
        image.pwrite(memoryview(b"x" * CLUSTER), 15 * MIB)
    image.close()
    judge(path, oracle)


def full_device(device: Device) -> tuple[Qcow2, bytearray, int]:
    """An image on a device that is full, its oracle, and how many clusters of it are written."""
    path = device(6 * MIB)
    make(path, 8 * MIB)
    image, oracle = opened(path), bytearray(8 * MIB)
    for number in range(8 * MIB // CLUSTER):
        try:
            put(image, oracle, number * CLUSTER, bytes([number + 1]) * CLUSTER)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return image, oracle, number
    raise AssertionError("the device is larger than the image")


def test_a_write_waits_for_room_that_a_flush_is_about_to_free(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, oracle, used = full_device(device)
    refused, failed = threading.Event(), list[OSError]()
    whole, extend = image._barrier, image.refcounts._extend

    def refusing(*given: Any, **more: Any) -> Any:
        try:
            return extend(*given, **more)
        except OSError:
            refused.set()
            raise

    def write() -> None:
        try:
            put(image, oracle, used * CLUSTER, b"w" * CLUSTER)
        except OSError as error:
            failed.append(error)

    writer = threading.Thread(target=write)

    def barrier() -> None:
        if not writer.ident:
            writer.start()
            assert refused.wait(30)
        whole()

    image.discard(0, CLUSTER)
    oracle[:CLUSTER] = bytes(CLUSTER)
    monkeypatch.setattr(image.refcounts, "_extend", refusing)
    monkeypatch.setattr(image, "_barrier", barrier)
    image.flush()
    writer.join(30)
    image.close()
    assert not failed
    judge(image.filename, oracle)


def test_a_write_is_tried_again_if_another_took_the_room_that_was_freed(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, oracle, used = full_device(device)
    image.discard(0, CLUSTER)
    oracle[:CLUSTER] = bytes(CLUSTER)
    flush, others = image.flush, iter(range(5))

    def meanwhile() -> None:
        flush()
        for number in others:
            put(image, oracle, number * CLUSTER, b"o" * CLUSTER)
            image.discard((number + 1) * CLUSTER, CLUSTER)
            oracle[(number + 1) * CLUSTER : (number + 2) * CLUSTER] = bytes(CLUSTER)
            return

    monkeypatch.setattr(image, "flush", meanwhile)
    put(image, oracle, used * CLUSTER, b"w" * CLUSTER)
    assert next(others, None) is None
    image.close()
    judge(image.filename, oracle)


def test_a_device_that_grew_has_room(device: Device, tmp_path: Path) -> None:
    path = device(4 * MIB)
    make(path, 16 * MIB)
    image, oracle = opened(path), bytearray(16 * MIB)
    with pytest.raises(OSError, match="full"):
        image.pwrite(memoryview(b"a" * (8 * MIB)), 0)
    oracle[:] = contents(image)
    os.truncate(tmp_path / "device0", 20 * MIB)
    subprocess.run(["losetup", "-c", path], check=True)
    put(image, oracle, 0, b"b" * (8 * MIB))
    image.close()
    judge(path, oracle)


@pytest.mark.parametrize("limit", [2 * MIB, 2 * MIB + 513])
def test_after_a_write_beyond_a_size_limit_the_image_can_be_flushed_and_written(
    tmp_path: Path, limit: int
) -> None:
    path = tmp_path / "vm.qcow2"
    make(path, 64 * MIB)
    image, oracle = opened(path), bytearray(64 * MIB)
    with limited(limit):
        put(image, oracle, CLUSTER, b"a" * CLUSTER)
        with pytest.raises(OSError) as refused:
            image.pwrite(memoryview(b"b" * (4 * MIB)), 10 * MIB)
        assert refused.value.errno == errno.EFBIG
        oracle[:] = contents(image)
        put(image, oracle, 2 * CLUSTER, b"c" * CLUSTER)
        with pytest.raises(OSError):
            for at in range(20 * MIB, 24 * MIB, KIB):
                put(image, oracle, at, b"d" * KIB)
        oracle[:] = contents(image)
        image.flush()
        image.close()
    judge(path, oracle)


@pytest.mark.parametrize("step", [CLUSTER, 4 * KIB])
@pytest.mark.parametrize("spread", [1, 37])
def test_E2_what_was_answered_on_a_file_system_that_filled_up_can_be_flushed(
    mount: Mount, step: int, spread: int
) -> None:
    """Room for the tables of a mapping is taken with the data."""
    folder = mount("tmpfs", f"{6 * MIB}")
    path, size = folder / "vm.qcow2", 1 << 34
    make(path, size)
    image, answered = opened(path), dict[int, bytes]()
    with pytest.raises(OSError) as full:
        for number in range(4096):
            at = number * spread * (MIB if spread > 1 else step) % size
            image.pwrite(memoryview(bytes([number % 255 + 1]) * step), at)
            answered[at] = bytes([number % 255 + 1]) * step
    assert full.value.errno == errno.ENOSPC
    assert answered
    image.flush()
    image.close()
    image = opened(path)
    got = memoryview(bytearray(step))
    for at, want in answered.items():
        image.pread(got, at)
        assert bytes(got) == want, at
    first = next(iter(answered))
    image.discard(first, CLUSTER)
    image.flush()
    image.pwrite(memoryview(b"n" * 512), first)
    image.close()
    assert qemu_check(path) == 0


def test_E2_tables_that_a_copy_made_sparse_get_their_room_before_they_change(
    mount: Mount, tmp_path: Path
) -> None:
    """`cp --sparse=always` leaves holes where a table is zero."""
    make(tmp_path / "vm.qcow2", 1 << 30)
    image = opened(tmp_path / "vm.qcow2")
    image.pwrite(memoryview(b"a" * CLUSTER), 0)
    image.close()
    folder = mount("tmpfs", f"{2 * MIB}")
    path = folder / "vm.qcow2"
    subprocess.run(["cp", "--sparse=always", str(tmp_path / "vm.qcow2"), str(path)], check=True)
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    image = opened(path)
    with pytest.raises(OSError) as full:
        image.pwrite(memoryview(b"b" * CLUSTER), 256 * MIB)
    assert full.value.errno == errno.ENOSPC
    image.flush()
    image.close()
    os.unlink(folder / "filler")
    image = opened(path)
    image.pwrite(memoryview(b"b" * CLUSTER), 256 * MIB)
    image.close()
    assert qemu_check(path) == 0


def test_a_reservation_that_fails_halfway_is_given_back(device: Device) -> None:
    path = device(4 * MIB)
    make(path, 64 * MIB)
    image = opened(path)
    with pytest.raises(OSError, match="full"):
        image.reserve(0, 32 * MIB)
    room = image.reserve(0, 3 * MIB)
    assert room is not None
    for r in room:
        image.unreserve(r)
    image.close()
    assert qemu_check(path) == 0


def test_a_resize_that_finds_no_room_leaves_the_image_as_it_was(device: Device) -> None:
    path = device(MIB)
    make(path, 4 * MIB, cluster_size=512)
    image = opened(path)
    with pytest.raises(OSError):
        image.change_size(32 << 30)
    assert image.size == 4 * MIB
    image.pwrite(memoryview(b"a" * KIB), 0)
    image.close()
    judge(path, (b"a" * KIB).ljust(4 * MIB, b"\0"))


@pytest.mark.parametrize("size", [MIB + 100, MIB + 1, 3 * MIB - 511])
def test_a_size_that_is_no_multiple_of_512_is_refused(tmp_path: Path, size: int) -> None:
    """QEMU reads such a size in whole sectors, so the end of the disk would be lost."""
    path = tmp_path / "vm.qcow2"
    make(path, MIB)
    before = path.read_bytes()
    image = opened(path)
    with pytest.raises(CowferryError, match="multiple of 512") as refused:
        image.change_size(size)
    assert str(-(-size // 512) * 512) in refused.value.hint
    image.close()
    assert path.read_bytes() == before


def test_the_header_keeps_fields_that_a_newer_program_put_behind_ours(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    with open(path, "r+b") as f:
        data = bytearray(f.read(512))
        further = bytes(range(1, 17))
        data[112:112] = further
        data[88:96] = struct.pack(">Q", 1 << 40)  # an autoclear bit that we do not know
        data[100:104] = struct.pack(">I", 128)
        f.seek(0)
        f.write(data[:512])
    opened(path).close()
    data = bytearray(path.read_bytes()[:512])
    assert data[100:104] == struct.pack(">I", 128) and data[112:128] == further
    assert data[88:96] == bytes(8), "it was opened for writing"
    assert qemu_check(path) == 0


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
@pytest.mark.parametrize("bitmap", [False, True])
def test_a_size_that_no_image_can_have_is_refused_and_changes_nothing(
    tmp_path: Path, format: str, bitmap: bool
) -> None:
    """A bitmap of that many bits, or an L1 table of terabytes, is never laid out in memory."""
    path = tmp_path / f"vm.{format}"
    opening.create_image(str(path), format, MIB, {})
    if bitmap:
        run = [sys.executable, "-m", "cowferry", "bitmap", "--add", str(path), "b"]
        assert not subprocess.run(run, capture_output=True).returncode
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "cowferry", "resize", str(path), "+7E"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and str(path) in done.stderr and "Traceback" not in done.stderr
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert left[path.name] == before[path.name] or bitmap
    assert left.keys() == before.keys()


# An external data file grows with the disk --------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_a_data_file_grows_with_the_disk_and_reads_right_by_itself(
    tmp_path: Path, raw: bool
) -> None:
    path, data = tmp_path / "vm.qcow2", tmp_path / "vm.data"
    make(path, MIB, data_file=str(data), data_file_raw=raw)
    image, oracle = opened(path), bytearray(3 * MIB)
    put(image, oracle, 0, b"a" * MIB)
    with open(data, "ab") as f:
        f.write(b"x" * MIB)  # what lay there before the disk reached over it
    image.change_size(3 * MIB)
    image.close()
    assert data.stat().st_size == 3 * MIB
    if raw:
        assert data.read_bytes() == oracle
    image = opened(path)
    put(image, oracle, 2 * MIB, b"b" * 1000)
    assert not differs(contents(image), oracle)
    image.close()
    assert qemu_check(path) == 0


def test_a_data_file_on_a_device_has_to_be_large_enough(device: Device, tmp_path: Path) -> None:
    path, data = tmp_path / "vm.qcow2", device(4 * MIB)
    make(path, 2 * MIB, data_file=data, data_file_raw=True)
    image = opened(path, data_file=data)
    before = path.read_bytes()
    with pytest.raises(OSError, match=f"the device has {4 * MIB} bytes, not {8 * MIB}"):
        image.change_size(8 * MIB)
    assert image.size == 2 * MIB and path.read_bytes() == before
    image.change_size(4 * MIB)
    assert contents(image)[2 * MIB :] == bytes(2 * MIB)
    image.close()
    assert Path(data).read_bytes()[2 * MIB :] == bytes(2 * MIB)


def test_a_data_file_is_as_long_as_before_if_the_image_cannot_grow(tmp_path: Path) -> None:
    path, data = tmp_path / "vm.qcow2", tmp_path / "vm.data"
    make(path, MIB, data_file=str(data))
    image = opened(path)
    with limited(2 * MIB), pytest.raises(OSError) as refused:
        image.change_size(8 * MIB)
    assert refused.value.errno == errno.EFBIG
    with limited(path.stat().st_size), pytest.raises(OSError):
        image.change_size(1 << 50)
    image.close()
    assert data.stat().st_size == MIB and qemu_check(path) == 0


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("verb", ["discard", "zero"])
def test_zeroes_take_no_room_in_a_data_file(
    tmp_path: Path, raw: bool, extended: bool, verb: str
) -> None:
    """A guest that makes a file system discards the whole disk first."""
    path, data = tmp_path / "vm.qcow2", tmp_path / "vm.data"
    make(path, 8 * MIB, data_file=str(data), data_file_raw=raw, extended_l2=extended)
    image, oracle = opened(path), bytearray(8 * MIB)
    change = getattr(image, verb)
    change(0, 8 * MIB)
    image.flush()
    if verb == "discard" or not raw:  # a zero request keeps the place of what has one
        assert data.stat().st_blocks == 0
    put(image, oracle, MIB + 1000, b"a" * (2 * MIB))
    for offset, length in ((MIB, 3000), (2 * MIB + 512, 100_000), (5 * MIB, MIB)):
        change(offset, length)
        oracle[offset : offset + length] = bytes(length)
    assert not differs(contents(image), oracle)
    image.close()
    if raw:
        assert not differs(data.read_bytes(), oracle)
    image = opened(path, read_only=True)
    assert not differs(contents(image), oracle)
    image.close()
    assert qemu_check(path) == 0


def test_zeroes_cover_what_a_data_file_held_before(tmp_path: Path) -> None:
    """A cluster without a place reads as zero, whatever the file holds there."""
    path, data = tmp_path / "vm.qcow2", tmp_path / "vm.data"
    make(path, MIB, data_file=str(data), data_file_raw=True)
    image = opened(path)
    with image.meta:
        for cluster in range(MIB // CLUSTER):
            image.map.set(cluster, 0)
    image.flush()
    data.write_bytes(b"x" * MIB)
    image.zero(0, MIB // 2)
    image.discard(MIB // 2, MIB // 2)
    assert not any(contents(image))
    image.close()
    assert data.read_bytes() == bytes(MIB)


@pytest.mark.parametrize("length", [5000, 3 * CLUSTER])
def test_a_write_that_failed_leaves_a_data_file_that_reads_as_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """The part of the write that was done before storage was full is in the file."""
    path, data = tmp_path / "vm.qcow2", tmp_path / "vm.data"
    make(path, MIB, data_file=str(data), data_file_raw=True)
    image = opened(path)
    image.pwrite(memoryview(b"a" * 1000), 7 * CLUSTER)
    with image.meta:
        image.map.set(1, CLUSTER | COPIED | ZERO_FLAG)  # keeps its place
        image.map.set(3, 0)
    whole = image.data.pwrite

    def half(buf: memoryview, offset: int, fua: bool = False) -> None:
        whole(buf[: len(buf) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(image.data, "pwrite", half)
        for cluster in (1, 3):
            with pytest.raises(OSError, match="No space"):
                image.pwrite(memoryview(b"b" * length), cluster * CLUSTER)
    got = contents(image)
    image.close()
    assert data.read_bytes() == got
