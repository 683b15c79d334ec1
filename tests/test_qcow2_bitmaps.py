"""Dirty bitmaps inside qcow2 images: QEMU reads ours and we read QEMU's, bit for bit; B1 and B2."""

from __future__ import annotations

import errno
import itertools
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmapping import (
    MIB,
    OTHER,
    SIZE,
    TOKEN,
    StorageDaemon,
    agree_with_qemu,
    contents_of,
    dirty,
    image_at,
    info_of_qemu,
    known,
    make,
    opened,
    stored,
)
from chains import contents, differs
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.drivers.qcow2 import bitmap_directory as listing
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.errors import CowferryError, NotSupported
from orders import Other, failing, on_call
from test_cli_offline import cowferry as run
from test_qcow2_peers import qemu_img
from tests_support import need

# QEMU's, read by us -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "cluster", "granularities"),
    [
        (SIZE, "64k", ["512", "4k", "64k", "1M"]),
        (SIZE + 512, "512", ["512", "64k", "2G"]),
        (1 << 40, "64k", ["64k", "1M"]),
        (9 << 30, "4k", ["32k"]),
    ],
)
def test_bitmaps_of_qemu_are_read_bit_for_bit(
    tmp_path: Path, size: int, cluster: str, granularities: list[str]
) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, size)
    for g in granularities:
        qemu_img("bitmap", "--add", "-g", g, path, f"b{g}")
    rnd = random.Random(size)
    writes = [(0, 512), (size - 512, 512)]
    writes += [(rnd.randrange(size // 65536) * 65536, 65536 * rnd.randrange(1, 3)) for _ in "12345"]
    commands = [f"-c write -z {at} {min(n, size - at)}" for at, n in writes]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *itertools.chain(*(c.split(" ", 1) for c in commands)), path],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    qemu_img("bitmap", "--disable", path, f"b{granularities[0]}")
    agree_with_qemu(path)
    for b in stored(path):
        assert b.persistent and not b.inconsistent
        assert b.recording == (b.name != f"b{granularities[0]}")
        want = Bitmap(b.name, size, b.granularity)
        for at, n in writes:
            want.set(at, min(n, size - at))
        assert b.bits == want.bits


@pytest.mark.parametrize("lazy", ["off", "on"])
def test_B2_what_qemu_left_in_a_crash_is_inconsistent(tmp_path: Path, lazy: str) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"lazy_refcounts={lazy}", path, SIZE)
    qemu_img("bitmap", "--add", path, "b0")
    qsd = StorageDaemon(path, read_only=False)
    qsd.call("block-dirty-bitmap-add", node="n", name="young", persistent=True)
    qsd.call("nbd-server-start", addr={"type": "unix", "data": {"path": str(qsd.socket)}})
    qsd.call("block-export-add", type="nbd", id="e", **{"node-name": "n"}, writable=True)
    write = ["qemu-io", "-f", "raw", "-c", "write 0 64k", f"nbd+unix:///n?socket={qsd.socket}"]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    qsd.kill()
    (b0,) = stored(path)
    assert b0.name == "b0" and b0.inconsistent
    with image_at(path) as image:
        assert bool(image.header.compatible & headers.LAZY_REFCOUNTS) == (lazy == "on")
    agree_with_qemu(path)
    with image_at(path) as image:  # it stays so, whatever is beside it, until it is removed
        image.write_bitmaps([*image.read_bitmaps(), dirty("b1")], TOKEN)
        image.write_bitmaps([b0, dirty("b1")])
    agree_with_qemu(path)
    assert [b.inconsistent for b in stored(path)] == [True, False]
    qemu_img("bitmap", "--remove", path, "b0")
    assert [b.name for b in stored(path)] == ["b1"]


# Ours, read by QEMU -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "granularities"),
    [
        (SIZE, {}, [512, 65536, MIB]),
        (SIZE + 512, {"cluster_size": "512", "refcount_bits": "1"}, [512, 1024, 65536]),
        (SIZE, {"cluster_size": "2M"}, [512, 1 << 31]),
        (SIZE, {"extended_l2": "on", "cluster_size": "16k"}, [4096]),
        (SIZE, {"data_file": "vm.raw"}, [4096]),
        ((1 << 40) + 3 * MIB, {}, [65536]),
    ],
    ids=str,
)
def test_our_bitmaps_are_read_by_qemu_bit_for_bit(
    tmp_path: Path, size: int, options: dict[str, str], granularities: list[int]
) -> None:
    need("qemu-img")
    if "data_file" in options:
        options = {"data_file": str(tmp_path / options["data_file"])}
    path = make(tmp_path / "vm.qcow2", size, **options)
    bitmaps = [dirty(f"größe {g}", size, g) for g in granularities]
    full, empty = dirty("full", size, granularities[0]), Bitmap("empty", size, persistent=True)
    full.set(0, size)
    bitmaps[0].recording = False
    with image_at(path) as image:
        image.write_bitmaps([*bitmaps, full, empty])
        assert known(image.read_bitmaps()) == known([*bitmaps, full, empty])
    agree_with_qemu(path)
    assert known(stored(path)) == known([*bitmaps, full, empty])


def test_qemu_goes_on_with_ours_and_we_with_its(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    path = make(tmp_path / "vm.qcow2")
    mine = dirty("b0", granularity=4096, share=0.1)
    with image_at(path) as image:
        image.write_bitmaps([mine])
    for at in (1 * MIB, 2 * MIB + 8192):
        write = ["qemu-io", "-f", "qcow2", "-c", f"write {at} 8192", str(path)]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
        mine.set(at, 8192)
        (found,) = stored(path)
        assert found.bits == mine.bits
        found.set(at + 65536, 1)
        mine.set(at + 65536, 1)
        with image_at(path) as image:
            image.write_bitmaps([found])
        agree_with_qemu(path)


# In use, and by whom ------------------------------------------------------------------------


def test_in_use_by_us_is_in_use_for_qemu_and_the_token_says_by_whom(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    path = make(tmp_path / "vm.qcow2")
    bitmaps = [dirty("b0"), dirty("b1", granularity=512)]
    bitmaps[1].recording = False
    with image_at(path) as image:
        assert image.bitmap_token() == b""
        image.write_bitmaps(bitmaps)
        image.write_bitmaps(bitmaps, TOKEN)
        assert image.bitmap_token() == TOKEN
    agree_with_qemu(path)  # which looked at it, and wrote nothing
    with image_at(path, read_only=True) as image:
        assert image.bitmap_token() == TOKEN
        assert all(b.inconsistent for b in image.read_bitmaps())
        assert known(image.read_bitmaps()) == known(bitmaps), "its keeper may still want the bits"
    with image_at(path) as image:
        assert image.bitmap_token() == TOKEN, "to open it is not to write to it"
        image.write_bitmaps(bitmaps, OTHER)
        assert image.bitmap_token() == OTHER
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "flush", path], check=True)
    with image_at(path) as image:
        assert image.bitmap_token() == b"", "somebody else had it open for writing"
        assert all(b.inconsistent for b in image.read_bitmaps())
        image.resize(image.size)
        image.write_bitmaps([])
    agree_with_qemu(path)
    assert "bitmaps" not in info_of_qemu(path)


def test_to_open_and_close_takes_no_room_and_writes_no_bits(tmp_path: Path) -> None:
    """So an image whose refcounts are wrong can be opened to be repaired."""
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    bitmaps = [dirty("b0", granularity=512), dirty("b1")]
    with image_at(path) as image:
        image.write_bitmaps(bitmaps)
    before, size = path.read_bytes(), path.stat().st_size
    with image_at(path) as image:
        found = image.read_bitmaps()
        image.write_bitmaps(found, TOKEN)
        assert image.bitmap_token() == TOKEN
        image.write_bitmaps(found)
        assert not image.refcounts.dirty
    assert path.stat().st_size == size
    assert path.read_bytes()[512:] == before[512:]


def test_B1_the_first_change_that_nobody_keeps_marks_what_records(tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2")
    quiet = dirty("quiet")
    quiet.recording = False
    changes: list[Callable[[Qcow2], object]] = [
        lambda image: image.pwrite(memoryview(b"x"), 100),
        lambda image: image.zero(0, 65536),
        lambda image: image.discard(65536, 65536),
        lambda image: image.reserve(0, 65536),
    ]
    for change in changes:
        with image_at(path) as image:
            image.write_bitmaps([dirty("b0"), quiet])
            image.pwrite(memoryview(b"x" * 65536), 0)
            image.write_bitmaps([dirty("b0"), quiet])
        with image_at(path, read_only=True) as image:
            assert not any(b.inconsistent for b in image.read_bitmaps())
        with image_at(path) as image:
            assert not any(e.writable for e in image.extents(0, SIZE)), "a write past our eyes"
            image.flush()
            image.set_backing(None, None)
            assert not any(b.inconsistent for b in image.read_bitmaps())
            change(image)
            assert [b.inconsistent for b in image.read_bitmaps()] == [True, False]
            assert any(e.writable for e in image.extents(0, SIZE)) or change is changes[1]
        assert [b.inconsistent for b in stored(path)] == [True, False]


def test_B1_with_a_keeper_writes_go_in_place_at_once(tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2")
    with image_at(path) as image:
        image.pwrite(memoryview(b"x" * 65536), 0)
        image.write_bitmaps([dirty("b0")])
    with image_at(path) as image:
        bitmaps = image.read_bitmaps()
        image.write_bitmaps(bitmaps, TOKEN)
        assert next(iter(image.extents(0, SIZE))).writable
        image.pwrite(memoryview(b"y" * 65536), 0)
        image.write_bitmaps(bitmaps)
        assert not next(iter(image.extents(0, SIZE))).writable
    assert not any(b.inconsistent for b in stored(path))


# Changing them ------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
def test_any_order_of_changes_leaves_what_was_last_written_and_no_leak(
    tmp_path: Path, cluster: str
) -> None:
    need("qemu-img")
    rnd = random.Random(cluster)
    path = make(tmp_path / "vm.qcow2", cluster_size=cluster)
    flat = bytearray(SIZE)
    bitmaps: list[Bitmap] = []
    image = opened(path)
    for step in range(24):
        act = rnd.randrange(6)
        if act == 0 or not bitmaps:
            granularity = 512 << rnd.randrange(8)
            bitmaps.append(dirty(f"b{step}", image.size, granularity, step))
        elif act == 1:
            bitmaps.remove(rnd.choice(bitmaps))
        elif act == 2:
            bitmap = rnd.choice(bitmaps)
            bitmap.recording = not bitmap.recording
        elif act == 3:
            rnd.choice(bitmaps).clear(0, rnd.randrange(image.size))
        elif act == 4:
            rnd.choice(bitmaps).set(rnd.randrange(image.size), 300_000)
        else:
            at, data = rnd.randrange(SIZE - 5000), rnd.randbytes(5000)
            image.write_bitmaps(bitmaps, TOKEN)  # or they would be given up
            image.pwrite(memoryview(data), at)
            flat[at : at + 5000] = data
            image.flush()
        token = rnd.choice([b"", TOKEN])
        image.write_bitmaps(bitmaps, token)
        assert known(image.read_bitmaps()) == known(bitmaps)
        assert image.bitmap_token() == (token if bitmaps else b"")
        qemu_img("check", "-U", path)
        result = image.check()
        assert not result.corruptions and not result.leaks, result.messages
        if rnd.random() < 0.3:
            image.close()
            image = opened(path)
            assert known(image.read_bitmaps()) == known(bitmaps)
    image.write_bitmaps(bitmaps)
    assert not differs(contents(image), flat)
    image.close()
    agree_with_qemu(path)


def test_a_bitmap_that_did_not_change_stays_where_it_is(tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    same, other = dirty("same", granularity=512), dirty("other", granularity=512)
    with image_at(path) as image:
        image.write_bitmaps([same, other])
        before = {e.name: e for e in listing.directory(image)}
        other.clear(0, MIB)
        image.write_bitmaps([other, same])
        after = {e.name: e for e in listing.directory(image)}
        assert after[b"same"] == before[b"same"]
        assert after[b"other"].table_offset != before[b"other"].table_offset


def test_the_disk_grows_with_its_bitmaps(tmp_path: Path) -> None:
    """The table gets longer at 16 MiB for 512 bytes in 4 KiB clusters."""
    need("qemu-img")
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    bitmaps = [dirty("b0", granularity=512), dirty("b1"), dirty("full", granularity=512)]
    bitmaps[2].set(0, SIZE)
    with image_at(path) as image:
        for size, token in (
            (SIZE + 512, b""),
            (20 * MIB, TOKEN),
            (64 * MIB, b""),
            (90 * MIB, TOKEN),
        ):
            image.write_bitmaps(bitmaps, token)
            image.resize(size)
            for b in bitmaps:
                b.resize(size)
            assert known(image.read_bitmaps()) == known(bitmaps)
            assert image.bitmap_token() == token
            qemu_img("check", "-U", path)
        image.write_bitmaps(bitmaps)
    agree_with_qemu(path)


def test_a_disk_with_an_inconsistent_bitmap_does_not_grow(tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2")
    with image_at(path) as image:
        image.write_bitmaps([dirty("b0"), dirty("b1")])
        image.pwrite(memoryview(b"x"), 0)  # nobody keeps them
        before = path.read_bytes()
        with pytest.raises(CowferryError, match="'b0' is inconsistent") as error:
            image.resize(2 * SIZE)
        assert "remove" in error.value.hint
        assert image.size == SIZE
        image.flush()
        assert path.read_bytes()[: len(before)][:512] == before[:512]
        image.write_bitmaps([])
        image.resize(2 * SIZE)


@pytest.mark.parametrize(
    ("bitmap", "words"),
    [
        (Bitmap("b" * 1024, SIZE), "name of 1024 bytes"),
        (Bitmap("", SIZE), "name of 0 bytes"),
        (Bitmap("b", SIZE, 256), "granularity 256"),
        (Bitmap("b", SIZE // 2), "2097152 bytes, and"),
    ],
    ids=["long name", "no name", "granularity", "size"],
)
def test_what_cannot_be_stored_is_refused_and_nothing_is_lost(
    tmp_path: Path, bitmap: Bitmap, words: str
) -> None:
    need("qemu-img")
    path = make(tmp_path / "vm.qcow2")
    with image_at(path) as image:
        image.write_bitmaps([dirty("b0")])
        with pytest.raises(CowferryError, match=words):
            image.write_bitmaps([dirty("b1"), bitmap])
        assert known(image.read_bitmaps()) == known([dirty("b0")])
    agree_with_qemu(path)


def test_a_version_2_image_has_no_room_for_bitmaps(tmp_path: Path) -> None:
    with image_at(make(tmp_path / "vm.qcow2", compat="0.10")) as image:
        assert not image.stores_bitmaps
        assert image.read_bitmaps() == []
        with pytest.raises(NotSupported, match="version 2"):
            image.write_bitmaps([dirty("b0")])


def test_no_room_for_the_extension_in_sector_0_is_told_before_anything_changes(
    tmp_path: Path,
) -> None:
    """With clusters of 512 bytes a long backing name leaves little."""
    need("qemu-img")
    path = make(
        tmp_path / "vm.qcow2", cluster_size="512", backing_file="b" * 330, backing_fmt="raw"
    )
    with image_at(path) as image:
        with pytest.raises(NotSupported, match="sector"):
            image.write_bitmaps([dirty("b0")], TOKEN)
        assert image.read_bitmaps() == []
        result = image.check()
        assert not result.corruptions and not result.leaks


@pytest.mark.parametrize("cluster", ["512", "4k"])
def test_a_backing_name_that_qemu_put_in_the_way_is_moved(tmp_path: Path, cluster: str) -> None:
    need("qemu-img")
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    path = tmp_path / "vm.qcow2"
    more = ["-b", "base.raw", "-F", "raw", "-o", f"cluster_size={cluster}", str(path)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *more], check=True)
    with image_at(path) as image:
        assert image.header.backing_offset < 200
        image.write_bitmaps([dirty("b0")], TOKEN)
        image.write_bitmaps([dirty("b0")])
        assert image.backing_spec == ("base.raw", "raw")
    said = subprocess.run(["qemu-img", "info", str(path)], capture_output=True, text=True).stdout
    assert "name: b0" in said and "backing file: base.raw" in said
    assert subprocess.run(["qemu-img", "check", "-q", str(path)]).returncode == 0


# With a keeper, and by the command line ------------------------------------------------------


def killed(path: Path, folder: Path) -> Path:
    """The image and what lies beside it, as a process that dies now leaves them."""
    folder.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, folder)
    return folder / path.name


def test_B2_a_disk_with_bitmaps_of_qemu_is_written_killed_and_given_back(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    qemu_img("create", "-f", "qcow2", path, 16 * MIB)
    qemu_img("bitmap", "--add", "-g", "4k", path, "b0")
    qemu_img("bitmap", "--add", "--disable", path, "b1")
    disk = Disk(opening.open_image(str(path)), "vm")
    disk.pwrite(memoryview(b"x" * 5000), 4096)
    disk.flush()
    dead, robbed = (killed(path, tmp_path / name) for name in ("dead", "robbed"))
    disk.resize(20 * MIB)
    disk.pwrite(memoryview(b"x" * 4096), 19 * MIB)
    want = known(disk.root.bitmaps.values())
    assert list(disk.root.bitmaps["b0"].runs()) == [(4096, 8192), (16 * MIB, 4 * MIB)]
    opening.close_chain(disk.root)
    assert known(stored(path)) == want
    agree_with_qemu(path)

    assert info_of_qemu(dead)["bitmaps"][0]["flags"] == ["in-use", "auto"]
    node = opening.open_image(str(dead))
    b0, b1 = node.bitmaps.values()
    assert not b0.inconsistent and b0.any(4096, 8192) and b0.recording
    assert not b1.inconsistent and not b1.count() and not b1.recording
    node.close()
    agree_with_qemu(dead)

    write = ["qemu-io", "-f", "qcow2", "-c", "write 8M 4k", str(robbed)]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    node = opening.open_image(str(robbed))  # between our crash and now somebody else wrote
    assert all(b.inconsistent for b in node.bitmaps.values())
    node.close()
    agree_with_qemu(robbed)


def test_repairing_keeps_the_bitmaps_and_gives_nothing_away(tmp_path: Path) -> None:
    """All refcounts are 0: whoever allocates before the repair overwrites something."""
    need("qemu-img")
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    data = random.Random(1).randbytes(50_000)
    with image_at(path) as image:
        image.pwrite(memoryview(data), 10_000)
        image.write_bitmaps([dirty("b0", granularity=512), dirty("b1")])
        block = image.refcounts.table[0]
    with open(path, "r+b") as f:
        f.seek(block)
        f.write(bytes(4096))
    run("check", "-r", "all", path)
    agree_with_qemu(path)
    assert known(stored(path)) == known([dirty("b0", granularity=512), dirty("b1")])
    assert contents_of(path)[10_000:60_000] == data


def test_it_may_be_read_only_for_a_while(tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2")
    with image_at(path) as image:
        image.write_bitmaps([dirty("b0")])
    node = opening.open_image(str(path))
    for at in (0, MIB):
        assert [b.inconsistent for b in stored_beside(path)] == [False]
        Disk(node).pwrite(memoryview(b"x"), at)
        assert [b.inconsistent for b in stored_beside(path)] == [True]
        node.reopen(True)
        assert [b.inconsistent for b in stored_beside(path)] == [False]
        node.reopen(False)
    Disk(node).pwrite(memoryview(b"x"), SIZE // 2)
    node.close()
    (b0,) = stored(path)
    assert b0.any(SIZE // 2, 1) and not b0.inconsistent


def stored_beside(path: Path) -> list[Bitmap]:
    """As the file has them while we have it open."""
    node = opening.open_image(str(path), read_only=True, force_share=True)
    try:
        return node.read_bitmaps()
    finally:
        node.close()


def test_info_and_convert_show_and_copy_them_as_qemu_img_does(tmp_path: Path) -> None:
    need("qemu-img")
    path, bad = tmp_path / "vm.qcow2", tmp_path / "bad.qcow2"
    bitmaps = [dirty("b0"), dirty("größe", granularity=512)]
    bitmaps[0].recording = False
    with image_at(make(path)) as image:
        image.write_bitmaps(bitmaps)
    shutil.copy(path, bad)
    assert run("info", path) == qemu_img("info", path)
    run("convert", "-O", "qcow2", "--bitmaps", path, tmp_path / "copy.qcow2")
    assert known(stored(tmp_path / "copy.qcow2")) == known(bitmaps)
    agree_with_qemu(tmp_path / "copy.qcow2")
    run("convert", "-n", "-O", "qcow2", "--bitmaps", path, bad, code=1)  # they are there already
    with image_at(bad) as image:
        image.pwrite(memoryview(b"x"), 0)  # nobody keeps them
    target = tmp_path / "some.qcow2"
    run("convert", "-O", "qcow2", "--bitmaps", bad, target, code=1)
    assert not target.exists()
    run("convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", bad, target)
    assert known(stored(target)) == known(bitmaps[:1])


def test_what_does_not_come_to_rest_is_still_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a failed close, and at a failed change to read-only, after which the guest goes on."""
    path = make(tmp_path / "vm.qcow2")
    with image_at(path) as image:
        image.write_bitmaps([dirty("b0", granularity=4096, share=0)])
    node = opening.open_image(str(path))
    assert isinstance(node, Qcow2)
    disk = Disk(node)
    disk.pwrite(memoryview(b"x" * 4096), MIB)
    with monkeypatch.context() as patch:
        on_call(patch, node.file, "reopen", failing(errno.EMFILE))
        with pytest.raises(OSError, match="Too many open files"):
            node.reopen(True)
    assert not node.read_only
    disk.pwrite(memoryview(b"y" * 4096), 2 * MIB)
    with monkeypatch.context() as patch:
        on_call(patch, node, "write_bitmaps", failing(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            node.close()
    again = opening.open_image(str(path))
    (b0,) = again.bitmaps.values()
    assert not b0.inconsistent and b0.any(MIB, 4096) and b0.any(2 * MIB, 4096)
    got = contents(again)
    assert got[MIB : MIB + 4096] == b"x" * 4096 and got[2 * MIB : 2 * MIB + 4096] == b"y" * 4096
    again.close()
    agree_with_qemu(path)


def test_guests_go_on_while_bitmaps_are_stored(tmp_path: Path) -> None:
    need("qemu-img")
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    image = opened(path)
    bitmaps = [dirty("b0", granularity=512), dirty("b1")]
    image.write_bitmaps(bitmaps, TOKEN)
    flat = bytearray(SIZE)
    rnd = random.Random(6)

    def guest() -> None:
        for step in range(300):
            at, data = rnd.randrange(SIZE - 6000), rnd.randbytes(6000)
            image.pwrite(memoryview(data), at)
            flat[at : at + 6000] = data
            if step % 10 == 0:
                image.flush()

    other = Other(guest)
    steps = 0
    while other.is_alive() or steps < 10:
        bitmaps[0].clear(0, SIZE)
        bitmaps[0].set(steps % 64 * 65536, 300_000)
        image.write_bitmaps(bitmaps, TOKEN if steps % 2 else OTHER)
        steps += 1
    other.end()
    assert known(image.read_bitmaps()) == known(bitmaps)
    assert not differs(contents(image), flat)
    image.write_bitmaps(bitmaps)
    image.close()
    agree_with_qemu(path)
    assert contents_of(path) == flat
