"""Damaged qcow2 images that are written to: no table and no byte of another owner is overwritten.

As with QEMU, such a write fails with EIO and the image is marked corrupt, before a byte changes.
Where only a refcount is wrong and the tables are sound, guests go on. QEMU makes each image: data
at 0, an internal snapshot, and other data since.
"""

from __future__ import annotations

import errno
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from chains import contents, differs
from cowferry.drivers import opening
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.errors import CowferryError

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
SIZE = 4 * MIB
COPIED = 1 << 63
OFFSET = 0x00FFFFFFFFFFFE00


class Tables(NamedTuple):
    """Host offsets of the tables of an image, bytes."""

    l1: int
    reftable: int
    block: int
    l2: int
    snapshots: int
    inactive_l1: int
    inactive_l2: int


def u64(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">Q", data, at)[0])


def tables(data: bytes) -> Tables:
    l1, reftable, snapshots = u64(data, 40), u64(data, 48), u64(data, 64)
    inactive = u64(data, snapshots)
    return Tables(
        l1, reftable, u64(data, reftable), u64(data, l1) & OFFSET, snapshots, inactive,
        u64(data, inactive) & OFFSET,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overlaps") / "made.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)], check=True)
    for step in (
        ["qemu-io", "-c", "write -P 1 0 512k", str(path)],
        ["qemu-img", "snapshot", "-c", "one", str(path)],
        ["qemu-io", "-c", "write -P 2 256k 512k", str(path)],
    ):
        subprocess.run(step, check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "vm.qcow2"
    shutil.copy(made, copy)
    return copy


ACTIVE = b"\1" * (256 * KIB) + b"\2" * (512 * KIB) + bytes(SIZE - 768 * KIB)
TAKEN = b"\1" * (512 * KIB) + bytes(SIZE - 512 * KIB)


def patch(path: Path, at: int, value: int, format: str = ">Q") -> None:
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(struct.pack(format, value))


def set_refcount(path: Path, cluster: int, value: int) -> None:
    patch(path, tables(path.read_bytes()).block + 2 * cluster, value, ">H")


def opened(path: Path, read_only: bool = False) -> Qcow2:
    node = opening.open_image(str(path), "qcow2", read_only=read_only)
    assert isinstance(node, Qcow2)
    return node


def snapshot_bytes(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    convert = ["qemu-img", "convert", "-l", "snapshot.name=one", "-O", "raw"]
    subprocess.run([*convert, str(path), str(raw)], check=True)
    return raw.read_bytes()


def marked_corrupt(path: Path) -> bool:
    return bool(u64(path.read_bytes(), 72) & 2)


def try_everything(image: Qcow2) -> list[int | None]:
    """Write, zero and discard all over the disk; the errno of each attempt."""
    found: list[int | None] = []

    def attempt(work: Callable[[], None]) -> None:
        try:
            work()
            found.append(None)
        except OSError as error:
            found.append(error.errno)

    for at in range(0, SIZE, 128 * KIB):
        attempt(lambda at=at: image.pwrite(memoryview(b"w" * KIB), at + 512))  # type: ignore[misc]
        attempt(lambda at=at: image.zero(at + CLUSTER, CLUSTER))  # type: ignore[misc]
        attempt(lambda at=at: image.discard(at, CLUSTER))  # type: ignore[misc]
        attempt(lambda: image.flush())
        attempt(lambda at=at: image.pwrite(memoryview(b"x" * CLUSTER), at))  # type: ignore[misc]
    return found


def close(image: Qcow2) -> None:
    try:
        image.close()
    except OSError:
        assert image.broken


TABLE_NAMES = ("l1", "reftable", "block", "l2", "snapshots", "inactive_l1", "inactive_l2")


@pytest.mark.parametrize("flags", [0, COPIED, 1, COPIED | 1], ids=["shared", "own", "0", "own0"])
@pytest.mark.parametrize("name", TABLE_NAMES)
def test_Q4_an_entry_that_names_a_table_never_gets_it_written_or_freed(
    path: Path, name: str, flags: int
) -> None:
    before = path.read_bytes()
    where = tables(before)
    target = getattr(where, name)
    patch(path, where.l2 + 8 * 4, target | flags)  # the guest's bytes from 256 KiB on
    damaged = path.read_bytes()
    image = opened(path)
    errors = try_everything(image)
    assert errno.EIO in errors and image.broken
    close(image)
    assert marked_corrupt(path)
    after = path.read_bytes()
    for other in ("reftable", "snapshots", "inactive_l1", "inactive_l2"):
        at = getattr(where, other)
        assert after[at : at + CLUSTER] == damaged[at : at + CLUSTER], other
    assert after[:8] == before[:8], "the header is whole"
    assert snapshot_bytes(path) == TAKEN
    with pytest.raises(CowferryError, match="corrupt"):
        opened(path)


@pytest.mark.parametrize("entry", [0x200 | 1, COPIED | 0x200 | 1, 0x50200, COPIED | 0x8200])
def test_Q4_an_entry_with_an_odd_offset_frees_nothing(path: Path, entry: int) -> None:
    """Rounded down, it would be the header's cluster, or that of a table."""
    where = tables(path.read_bytes())
    patch(path, where.l2 + 8 * 4, entry)
    damaged = path.read_bytes()
    image = opened(path)
    errors = try_everything(image)
    assert errno.EIO in errors
    close(image)
    after = path.read_bytes()
    assert marked_corrupt(path) and after[:8] == damaged[:8]
    assert after[8 * 4 + where.l2 :][:8] == struct.pack(">Q", entry)
    assert snapshot_bytes(path) == TAKEN


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_Q4_a_table_whose_refcount_is_0_is_never_handed_out(path: Path, name: str) -> None:
    where = tables(path.read_bytes())
    set_refcount(path, getattr(where, name) >> 16, 0)
    damaged = path.read_bytes()
    image = opened(path)
    try_everything(image)
    close(image)
    after = path.read_bytes()
    assert after[:4] == b"QFI\xfb"
    for other in ("reftable", "snapshots", "inactive_l1", "inactive_l2"):
        at = getattr(where, other)
        assert after[at : at + CLUSTER] == damaged[at : at + CLUSTER], other
    assert snapshot_bytes(path) == TAKEN


@pytest.mark.parametrize("which", ["active", "snapshot"])
def test_data_whose_refcount_is_0_stays_what_it_is(path: Path, which: str) -> None:
    """The refcounts contradict the tables: nothing else is put there, and guests go on."""
    data = path.read_bytes()
    where = tables(data)
    table = where.l2 if which == "active" else where.inactive_l2
    for slot in (4, 5, 7):
        set_refcount(path, (u64(data, table + 8 * slot) & OFFSET) >> 16, 0)
    image, oracle = opened(path), bytearray(ACTIVE)
    for at in range(MIB, 2 * MIB, CLUSTER):
        image.pwrite(memoryview(b"n" * CLUSTER), at)
        oracle[at : at + CLUSTER] = b"n" * CLUSTER
    image.pwrite(memoryview(b"m" * KIB), 5 * CLUSTER)
    oracle[5 * CLUSTER : 5 * CLUSTER + KIB] = b"m" * KIB
    assert not differs(contents(image), oracle)
    image.close()
    image = opened(path, read_only=True)
    assert not differs(contents(image), oracle)
    image.close()
    assert not marked_corrupt(path) and snapshot_bytes(path) == TAKEN


def test_a_flag_that_contradicts_the_refcount_does_not_let_a_snapshot_be_overwritten(
    path: Path,
) -> None:
    """COPIED promises one owner; the refcount says that there are two."""
    data = path.read_bytes()
    where = tables(data)
    for slot in range(4):  # shared with the snapshot
        entry = u64(data, where.l2 + 8 * slot)
        assert entry & OFFSET and not entry & COPIED
        patch(path, where.l2 + 8 * slot, entry | COPIED)
    patch(path, where.l1, where.inactive_l2 | COPIED)  # the L2 table itself, too
    set_refcount(path, where.inactive_l2 >> 16, 2)
    set_refcount(path, where.l2 >> 16, 0)
    image = opened(path)
    image.pwrite(memoryview(b"w" * (128 * KIB)), 32 * KIB)
    image.discard(192 * KIB, CLUSTER)
    image.close()
    assert snapshot_bytes(path) == TAKEN


@pytest.mark.parametrize("name", ["l1", "reftable", "block", "snapshots", "inactive_l1"])
def test_Q4_an_L1_entry_that_names_another_table_is_damage(path: Path, name: str) -> None:
    where = tables(path.read_bytes())
    patch(path, where.l1, getattr(where, name) | COPIED)
    damaged = path.read_bytes()
    image = opened(path)
    with pytest.raises(OSError, match="overlaps") as refused:
        image.pwrite(memoryview(b"w" * KIB), 0)
    assert refused.value.errno == errno.EIO
    close(image)
    after = bytearray(path.read_bytes())
    assert marked_corrupt(path)
    after[72:80] = damaged[72:80]  # the mark
    assert differs(after[:CLUSTER], damaged[:CLUSTER]) == "" or after[:72] == damaged[:72]
    assert after[CLUSTER:] == damaged[CLUSTER:]


def test_Q4_two_entries_of_the_refcount_table_for_one_block_are_damage(path: Path) -> None:
    where = tables(path.read_bytes())
    patch(path, where.reftable + 8, where.block)
    image = opened(path)
    with pytest.raises(OSError, match="name one block"):
        image.pwrite(memoryview(b"w" * KIB), 0)
    close(image)
    assert marked_corrupt(path) and snapshot_bytes(path) == TAKEN


def test_new_data_of_a_truncated_image_does_not_land_on_clusters_in_use(path: Path) -> None:
    """The refcounts say what is in use, and the file's end does not."""
    data = path.read_bytes()
    where = tables(data)
    last = max(u64(data, where.l2 + 8 * slot) & OFFSET for slot in range(12))
    with open(path, "r+b") as f:
        f.truncate(last)
    image = opened(path)
    image.pwrite(memoryview(b"n" * (512 * KIB)), 2 * MIB)
    entries = [e.host for e in image.extents(2 * MIB, 512 * KIB)]
    assert min(entries) > last
    got = memoryview(bytearray(CLUSTER))
    image.pread(got, 11 * CLUSTER)
    assert bytes(got) in (bytes(CLUSTER), b"\2" * CLUSTER)
    image.close()


def test_an_L2_table_beyond_the_end_of_the_file_is_an_error_and_not_a_hole(path: Path) -> None:
    where = tables(path.read_bytes())
    patch(path, where.l1, 1 << 40 | COPIED)
    image = opened(path)
    with pytest.raises(OSError, match="beyond the end") as refused:
        image.pread(memoryview(bytearray(KIB)), 0)
    assert refused.value.errno == errno.EIO
    close(image)
    assert snapshot_bytes(path) == TAKEN


@pytest.mark.parametrize("entry", [0, COPIED], ids=["no place", "flag only"])
@pytest.mark.parametrize("bitmap", [1, 0xFFFFFFFF, 1 << 32 | 1])
def test_subclusters_without_a_place_are_an_error_and_not_the_header(
    tmp_path: Path, entry: int, bitmap: int
) -> None:
    path = tmp_path / "vm.qcow2"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", str(path), "1M"],
        ["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 128k", str(path)],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    data = bytearray(path.read_bytes())
    at = (u64(bytes(data), u64(bytes(data), 40)) & OFFSET) + 16
    struct.pack_into(">QQ", data, at, entry, bitmap)
    path.write_bytes(data)
    theirs = subprocess.run(["qemu-io", "-r", "-c", "read 64k 512", str(path)], capture_output=True)
    assert b"Input/output error" in theirs.stdout + theirs.stderr
    before = path.read_bytes()
    node = opened(path, read_only=True)
    with pytest.raises(OSError, match="subclusters"):
        node.pread(memoryview(bytearray(512)), CLUSTER)
    node.close()
    assert path.read_bytes() == before
    node = opened(path)
    with pytest.raises(OSError, match="subclusters"):
        node.pwrite(memoryview(b"x" * 512), CLUSTER)
    close(node)
    after = path.read_bytes()
    assert after[112:].rstrip(b"\0") == before[112:].rstrip(b"\0") and marked_corrupt(path)
