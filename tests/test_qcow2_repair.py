"""`check` of damaged qcow2 images, and its repair: no byte that a guest can read ever changes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chains import contents, differs
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from damage import (
    COMPRESSED,
    COPIED,
    OFFSET,
    ZERO,
    Image,
    check,
    damage,
    make,
    verdict,
    wrong_bytes,
)
from test_qcow2_peers import by_qemu, churn, qemu_img
from tests_support import need

SOAK = os.environ.get("COWFERRY_SOAK") is not None
ROUNDS = 400 if SOAK else 12
FLAVOURS = {
    "plain": ("", True),
    "version 2": ("compat=0.10,cluster_size=4k", True),
    "512": ("cluster_size=512", True),
    "2M": ("cluster_size=2M", True),
    "1 bit": ("cluster_size=4k,refcount_bits=1", False),
    "64 bits": ("cluster_size=4k,refcount_bits=64", True),
    "subclusters": ("extended_l2=on,cluster_size=16k", True),
    "external": ("data_file=ext.data,cluster_size=16k", False),
    "packed": ("cluster_size=4k", True),
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """One image of each kind, and its guest's bytes."""
    need("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("seeds")
    out = {}
    for name, (options, snapshot) in FLAVOURS.items():
        path = folder / f"{name.replace(' ', '-')}.qcow2"
        size = 16 << 20 if name == "2M" else 1 << 20
        with contextlib.chdir(folder):  # the image names its data file as it is given
            out[name] = path, make(path, options, size, snapshot, packed=name == "packed")
        assert check(path).exit_code == 0 == verdict(path), name
    return out


@pytest.fixture
def plain(seeds: dict[str, tuple[Path, bytes]], tmp_path: Path) -> tuple[Image, bytes]:
    """A copy of the plain image, to be damaged."""
    path, oracle = seeds["plain"]
    return Image(Path(shutil.copy(path, tmp_path / "vm.qcow2"))), oracle


Do = Callable[[Image], None]


def entry(image: Image, value: Callable[[int], int], guest: int = 0) -> None:
    """Another L2 entry for a guest offset."""
    at = image.l2(guest)
    image.put(at, value(image.get(at)))


def cut(image: Image, size: int) -> None:
    os.truncate(image.path, size)


def inactive(image: Image) -> Callable[[int], int]:
    """An entry that names the L1 table of the snapshot."""
    return lambda _: image.get(image.snapshots) | COPIED


def leaked(image: Image) -> None:
    """A cluster in the file that is counted, and used by nothing."""
    end = -(-image.path.stat().st_size // image.cluster)
    os.truncate(image.path, (end + 1) * image.cluster)
    image.set_refcount(end, 1)


def twice(image: Image) -> None:
    """Two guest clusters in one place."""
    image.put(image.l2(0), image.get(image.l2(image.size // 2)))


def without_size(image: Image) -> None:
    """A snapshot as version 2 has it, in an image of version 3."""
    with open(image.path, "r+b") as f:
        f.seek(image.snapshots)
        data = f.read(128)
        extra = int.from_bytes(data[36:40], "big")
        f.seek(image.snapshots)
        f.write(data[:36] + bytes(4) + data[40 + extra :])


# Name, damage, verdicts of check and of -r all, and whether the guest's bytes must be all there.
CASES: list[tuple[str, Do, int, int, bool]] = [
    ("block at data", lambda i: i.put(i.table, i.host(0)), 2, 0, True),
    ("block at the L1 table", lambda i: i.put(i.table, i.l1), 2, 0, True),
    ("block at an L2 table", lambda i: i.put(i.table, i.l2(0)), 2, 0, True),
    ("block at the header", lambda i: i.put(i.table, 0x200), 2, 0, True),
    ("block at the refcount table", lambda i: i.put(i.table, i.table), 2, 0, True),
    ("block at the snapshot table", lambda i: i.put(i.table, i.snapshots), 2, 0, True),
    ("block at an odd offset", lambda i: i.put(i.table, i.block() + 512), 2, 0, True),
    ("block beyond the end", lambda i: i.put(i.table, 1 << 40), 2, 0, True),
    ("another block beyond the end", lambda i: i.put(i.table + 8, 1 << 40), 2, 0, True),
    ("block with reserved bits", lambda i: i.put(i.table, i.block() | 4), 2, 0, True),
    ("block named twice", lambda i: i.put(i.table + 8, i.block()), 2, 0, True),
    ("no block", lambda i: i.put(i.table, 0), 2, 0, True),
    ("no refcount table", lambda i: i.put(56, 0, "I"), 2, 0, True),
    ("refcount table at the L1 table", lambda i: i.put(48, i.l1), 2, 0, True),
    ("refcount table at data", lambda i: i.put(48, i.host(0)), 2, 0, True),
    ("refcount table at an odd offset", lambda i: i.put(48, i.table + 512), 2, 0, True),
    ("refcount table beyond the end", lambda i: i.put(48, 1 << 40), 2, 0, True),
    ("refcount too low", lambda i: i.set_refcount(i.host(0) >> i.bits, 0), 2, 0, True),
    ("refcount too high", lambda i: i.set_refcount(i.host(0) >> i.bits, 7), 2, 0, True),
    ("refcount of nothing", leaked, 3, 0, True),
    ("refcount beyond the end", lambda i: i.set_refcount(1000, 1), 0, 0, True),
    ("L1 entry without COPIED", lambda i: i.put(i.l1, i.get(i.l1) & ~COPIED), 2, 0, True),
    ("L1 entry with reserved bits", lambda i: i.put(i.l1, i.get(i.l1) | 2), 2, 0, True),
    ("L1 entry at an odd offset", lambda i: i.put(i.l1, i.get(i.l1) + 512), 2, 2, False),
    ("L1 entry beyond the end", lambda i: i.put(i.l1, 1 << 40), 2, 2, False),
    ("L1 entry at the L1 table", lambda i: i.put(i.l1, i.l1 | COPIED), 2, 2, False),
    ("L2 entry without COPIED", lambda i: entry(i, lambda e: e & ~COPIED), 2, 0, True),
    ("L2 entry with reserved bits", lambda i: entry(i, lambda e: e | 2), 2, 0, True),
    ("L2 entry at an odd offset", lambda i: entry(i, lambda e: e + 512), 2, 2, False),
    ("L2 entry beyond the end", lambda i: entry(i, lambda e: 1 << 40), 2, 2, False),
    ("L2 entry at an L2 table", lambda i: entry(i, lambda e: i.l2(0) | COPIED), 2, 2, False),
    ("L2 entry at the header", lambda i: entry(i, lambda e: e & ~OFFSET | 0), 3, 0, False),
    ("L2 entry at the L1 table", lambda i: entry(i, lambda e: i.l1 | COPIED), 2, 2, False),
    ("L2 entry at a refcount block", lambda i: entry(i, lambda e: i.block()), 2, 0, False),
    ("L2 entry at the refcount table", lambda i: entry(i, lambda e: i.table), 2, 0, False),
    ("L2 entry at a snapshot's L1 table", lambda i: entry(i, inactive(i)), 2, 2, False),
    ("L2 entry in the header", lambda i: entry(i, lambda e: 0x200), 2, 2, False),
    ("L2 entry at the snapshot table", lambda i: entry(i, lambda e: i.snapshots), 2, 2, False),
    ("two L2 entries in one place", twice, 2, 0, False),
    ("zero cluster at an odd offset", lambda i: entry(i, lambda e: e + 513), 2, 0, False),
    ("zero cluster at the L1 table", lambda i: entry(i, lambda e: i.l1 | ZERO), 2, 0, False),
    ("zero cluster beyond the end", lambda i: entry(i, lambda e: 1 << 40 | ZERO), 2, 0, False),
    ("snapshot table beyond the end", lambda i: i.put(64, 1 << 40), 2, 2, True),
    ("snapshot table at an odd offset", lambda i: i.put(64, i.snapshots + 8), 2, 2, True),
    ("too many snapshots", lambda i: i.put(60, 70000, "I"), 2, 2, True),
    ("snapshot's L1 beyond the end", lambda i: i.put(i.snapshots, 1 << 40), 2, 2, True),
    ("snapshot's L1 at an odd offset", lambda i: i.put(i.snapshots, 0x30200), 2, 2, True),
    ("snapshot's L1 is the active one", lambda i: i.put(i.snapshots, i.l1), 2, 2, True),
    ("snapshot's L1 is too small", lambda i: i.put(i.snapshots + 8, 0, "I"), 2, 2, True),
    ("snapshot without a disk size", without_size, 2, 0, True),
    ("L1 table beyond the end", lambda i: i.put(40, 1 << 40), 2, 2, False),
    ("cut off in the middle", lambda i: cut(i, 0x90000), 2, 2, False),
    ("cut off before the tables", lambda i: cut(i, 0x20000), 2, 2, False),
]
# Where qemu-img says something else, and why we do not.
DIFFERENT = {
    "block at an odd offset": "it cannot look up refcounts then, and gives up",
    "refcount table at the L1 table": "the same",
    "refcount table at data": "the same",
    "refcount table at an odd offset": "it does not open the image",
    "snapshot's L1 is too small": "it gives back the clusters of the snapshot as leaks",
    "snapshot table at an odd offset": "it does not open the image",
    "too many snapshots": "it does not check the rest",
    "block at the header": "as of an odd offset",
    "block with reserved bits": "as of an odd offset",
}


@pytest.mark.parametrize(("name", "do", "found", "left", "whole"), CASES, ids=[c[0] for c in CASES])
def test_damage_is_found_and_no_repair_destroys_anything(
    plain: tuple[Image, bytes], name: str, do: Do, found: int, left: int, whole: bool
) -> None:
    image, oracle = plain
    snapshot = snapshot_of(image.path)
    do(image)
    before = image.path.read_bytes()
    result = check(image.path)
    assert result.exit_code == found and bool(result.messages) == bool(found)
    assert image.path.read_bytes() == before
    if name not in DIFFERENT:
        assert verdict(image.path) == found
    mended = check(image.path, "all")
    assert mended.exit_code == left, mended
    assert bool(mended.repairs) == bool(found)
    again = check(image.path)
    assert (again.corruptions, again.leaks) == (mended.corruptions, mended.leaks)
    if whole:
        assert not differs(by_qemu_or_us(image.path), oracle)
        assert left or snapshot_of(image.path) == snapshot
    if not left:
        assert verdict(image.path) == 0
    if found and not left:
        still_works(image.path)


def snapshot_of(path: Path) -> bytes:
    """The bytes of the snapshot."""
    out = path.with_suffix(".snapshot")
    qemu_img("convert", "-U", "-l", "one", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


def by_qemu_or_us(path: Path) -> bytes:
    """The guest's bytes, of which damage to snapshots takes none."""
    try:
        return by_qemu(path)
    except AssertionError:  # it opens no image with such a snapshot table
        data = bytearray(path.read_bytes())
        data[60:72] = bytes(12)
        bare = path.with_suffix(".bare")
        bare.write_bytes(data)
        return by_qemu(bare)


def still_works(path: Path) -> None:
    """A guest can write on, and its bytes and the image stay right."""
    disk = Disk(opening.open_image(str(path), "qcow2"))
    oracle = contents(disk)
    churn(disk, oracle, random.Random(1), steps=25)
    disk.flush()
    disk.root.close()
    assert not differs(by_qemu(path), oracle)
    assert verdict(path) == 0


def test_a_compressed_cluster_loses_a_flag_that_it_cannot_have(
    seeds: dict[str, tuple[Path, bytes]], tmp_path: Path
) -> None:
    seed, oracle = seeds["packed"]
    image = Image(Path(shutil.copy(seed, tmp_path / "vm.qcow2")))
    at = next(a for a in map(image.l2, range(0, image.size, 4096)) if image.get(a) & COMPRESSED)
    image.put(at, image.get(at) | COPIED)
    assert check(image.path).exit_code == 2 == verdict(image.path)
    assert check(image.path, "all").exit_code == 0 == verdict(image.path)
    assert not differs(by_qemu(image.path), oracle)
    still_works(image.path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster", ["512", "64k"])
def test_refcounts_of_every_width_are_counted_anew_and_corrected(
    tmp_path: Path, bits: int, cluster: str
) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    oracle = make(path, f"refcount_bits={bits},cluster_size={cluster}", 256 << 10, snapshot=False)
    image = Image(path)
    with open(path, "r+b") as f:  # in place: each count, or each second one, is wrong
        f.seek(image.block())
        f.write(b"\xa5" * 64)
    for anew in (False, True):
        if anew:
            image.put(image.table, 0)
        assert check(path).exit_code == 2 == verdict(path)
        assert check(path, "all").exit_code == 0 == verdict(path)
        assert not differs(by_qemu(path), oracle)
    still_works(path)


def test_counts_beyond_the_end_are_corrected_with_the_others(plain: tuple[Image, bytes]) -> None:
    """Else they would be leaks when the file grows over them."""
    image, _ = plain
    end = -(-image.path.stat().st_size // image.cluster)
    for cluster in range(end + 3, end + 9):
        image.set_refcount(cluster, 5)
    image.set_refcount(image.host(0) >> image.bits, 7)
    assert check(image.path, "all").exit_code == 0
    still_works(image.path)


def test_a_file_that_ends_inside_a_word_is_repaired_once(tmp_path: Path) -> None:
    """The new refcount table lies over its old end."""
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    oracle = make(path, "cluster_size=512", 256 << 10, snapshot=False)
    image = Image(path)
    end = -(-path.stat().st_size // 512) * 512
    for extra in range(1, 9):
        os.truncate(path, end + extra)
        image.put(image.table, 1 << 40)
        fix = check(path, "all")
        assert fix.exit_code == 0 == verdict(path)
        assert sum("counted anew" in text for text in fix.repairs) == 1, extra
        assert by_qemu(path) == oracle
        image = Image(path)
        end = path.stat().st_size


def test_entries_of_an_external_data_file_have_their_own_offset(
    seeds: dict[str, tuple[Path, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU answers EIO, and its check does not see it."""
    monkeypatch.chdir(tmp_path)  # the image names its data file as it is given
    seed, oracle = seeds["external"]
    image = Image(Path(shutil.copy(seed, tmp_path / "vm.qcow2")))
    shutil.copy(seed.parent / "ext.data", tmp_path)
    step = image.cluster
    first, zero = (
        next(a for a in range(0, image.size, step) if image.get(image.l2(a)) & ZERO == flag)
        for flag in (0, ZERO)
    )
    image.put(image.l2(first), first + 8 * step | COPIED)
    image.put(image.l2(zero), zero + 8 * step | COPIED | ZERO)
    found = check(image.path)
    assert found.corruptions == 2 and f"guest offset {first} lies at another" in found.messages[0]
    with pytest.raises(AssertionError, match=r"does not match|Input/output error"):
        by_qemu(image.path)
    data = (tmp_path / "ext.data").read_bytes()
    with pytest.raises(OSError, match="another offset"):
        wrong_bytes(image.path, oracle, set())
    node = opening.open_image(str(image.path), "qcow2")
    with pytest.raises(OSError, match="another offset"):
        node.pwrite(memoryview(b"x" * 512), zero)
    with pytest.raises(CowferryError, match="marked corrupt"):
        node.close()
        opening.open_image(str(image.path), "qcow2")
    assert (tmp_path / "ext.data").read_bytes() == data
    mended = check(image.path, "all")  # the zero cluster needs no place
    assert mended.corruptions == 1 and check(image.path).corruptions == 1
    assert not wrong_bytes(image.path, oracle, {first // step})


def test_behind_a_table_that_is_said_to_be_longer_nothing_is_corrected(tmp_path: Path) -> None:
    """What lies there is guest data and looks like damaged entries, few or many of them."""
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    make(path, "cluster_size=4k", snapshot=False)
    image = Image(path)
    start, end = image.l1 + 2 * image.cluster, image.l1 + 8 * image.cluster
    hosts = [image.host(guest) for guest in range(0, image.size, 4096)]
    assert set(range(start, end, 4096)) <= set(hosts)
    for number in range(3):
        image.put(start + 8 * number, 5 * (number == 1))
    with open(path, "r+b") as f:
        f.seek(start + 24)
        f.write(bytes(4096 - 24))
    oracle, data = by_qemu(path), path.read_bytes()[start:end]
    image.put(36, 4096, "I")  # entries of the L1 table
    assert check(path, "all").exit_code == 2
    assert path.read_bytes()[start:end] == data
    image.put(36, 1, "I")
    assert check(path, "all").exit_code == 0 == verdict(path)
    assert by_qemu(path) == oracle


def test_version_2_has_no_zero_clusters(
    seeds: dict[str, tuple[Path, bytes]], tmp_path: Path
) -> None:
    """QEMU answers EIO. Which of both is meant nobody knows."""
    image = Image(Path(shutil.copy(seeds["version 2"][0], tmp_path / "vm.qcow2")))
    here = next(a for a in range(0, image.size, 4096) if image.get(image.l2(a)) & OFFSET)
    hole = next(a for a in range(0, image.size, 4096) if not image.get(image.l2(a)))
    for guest in (here, hole):
        image.put(image.l2(guest), image.get(image.l2(guest)) | ZERO)
    with pytest.raises(AssertionError, match="Input/output error"):
        by_qemu(image.path)
    assert check(image.path).corruptions == 2 == check(image.path, "all").corruptions
    with contextlib.closing(opening.open_image(str(image.path), read_only=True)) as node:
        for guest in (here, hole):
            with pytest.raises(OSError, match="version 2"):
                node.pread(memoryview(bytearray(512)), guest)


def test_a_shared_table_is_written_once_its_refcount_says_so(tmp_path: Path) -> None:
    """Two entries of the active L1 table name one L2 table."""
    need("qemu-img", "qemu-io")
    make(tmp_path / "vm.qcow2", "cluster_size=4k", 4 << 20, snapshot=False)
    image, half = Image(tmp_path / "vm.qcow2"), 2 << 20
    image.put(image.l1 + 8, image.get(image.l1))
    node = opening.open_image(str(image.path), "qcow2")
    with pytest.raises(OSError, match="several L1 entries"):
        node.pwrite(memoryview(b"x" * 512), 0)
    node.close()
    assert check(image.path, "all").exit_code == 0 == verdict(image.path)
    want = bytearray(by_qemu(image.path))
    assert want[:half] == want[half:]
    disk = Disk(opening.open_image(str(image.path), "qcow2"))
    for offset in (0, half, half + (256 << 10)):
        disk.pwrite(memoryview(b"x" * 4096), offset)
        want[offset : offset + 4096] = b"x" * 4096
    disk.root.close()
    assert by_qemu(image.path) == want
    assert not check(image.path).leaks


@pytest.mark.parametrize("offset", [0x1200, 1 << 63])
def test_without_snapshots_the_header_names_no_table(tmp_path: Path, offset: int) -> None:
    """QEMU opens no image whose header names an odd place for it."""
    need("qemu-img", "qemu-io")
    oracle = make(tmp_path / "vm.qcow2", snapshot=False)
    image = Image(tmp_path / "vm.qcow2")
    image.put(64, offset)
    assert verdict(image.path) == 1 and check(image.path).exit_code == 2
    assert check(image.path, "all").exit_code == 0 == verdict(image.path)
    assert by_qemu(image.path) == oracle


def test_what_is_taken_for_a_table_by_mistake_is_not_corrected(plain: tuple[Image, bytes]) -> None:
    """An L1 entry leads to data, and the table that it had can still be found by a person."""
    image, oracle = plain
    right = image.get(image.l1)
    image.put(image.l1, image.host(image.size // 2) | COPIED)
    image.put(image.table, image.host(0))
    found = check(image.path, "all")
    assert found.exit_code == 2 and "is probably no table" in " ".join(found.messages)
    image.put(image.l1, right)
    assert check(image.path, "all").exit_code == 0 == verdict(image.path)
    assert not differs(by_qemu(image.path), oracle)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_of_random_damage_the_guest_loses_no_more_than_what_was_damaged(
    seeds: dict[str, tuple[Path, bytes]], tmp_path: Path, flavour: str
) -> None:
    seed, oracle = seeds[flavour]
    path = tmp_path / "vm.qcow2"
    shutil.copy(seed.parent / "ext.data", tmp_path)
    ends = set()
    for number in range(ROUNDS // 3 if flavour == "2M" else ROUNDS):
        rnd = random.Random(f"{flavour}{number}")
        shutil.copy(seed, path)
        done = damage(Image(path), rnd, rnd.choice([1, 1, 2, 4]))
        where = f"{number}: {done.done}"
        try:
            fix = check(path, "all")
        except CowferryError as error:
            assert not done.counts_only, f"{where}: {error}"
            continue
        ends.add(fix.exit_code)
        assert fix.exit_code in (0, 2, 3), where
        if done.counts_only:
            assert fix.exit_code == 0, f"{where}: {fix}"
        after = path.read_bytes()
        assert (check(path, "all").exit_code, path.read_bytes()) == (fix.exit_code, after), where
        try:
            wrong = wrong_bytes(path, oracle, done.guest)
        except CowferryError:  # it can be checked, and not opened
            assert fix.exit_code == 2, where
            continue
        assert not wrong, f"{where}: {wrong}"
        if fix.exit_code == 0:
            assert verdict(path) == 0, where
    assert 0 in ends
