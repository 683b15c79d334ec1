"""Dirty bitmaps inside qcow2 images: QEMU reads ours and we read QEMU's, bit for bit; B1 and B2.

These are about the store alone: who keeps bitmaps while an image is written is another matter
(`Keeper`), and the images here are opened as if nobody did.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs
from cowferry.block import sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.drivers import driver, opening
from cowferry.drivers.qcow2 import bitmaps as store
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.errors import CowferryError, NotSupported
from test_cli_offline import cowferry as run
from test_crash_guard import Without
from test_qcow2_peers import qemu_img
from tests_support import need
from writelog import Log, Oracle, State, put, states

MIB = 1 << 20
SIZE = 4 * MIB
SMALL = 1 * MIB
SOAK = os.environ.get("COWFERRY_SOAK") is not None
TOKEN, OTHER = b"the first token.", b"another token..."
Known = dict[str, tuple[bytes, bool]]  # the bits of each bitmap, and whether it records


def opened(path: Path, read_only: bool = False) -> Qcow2:
    """The image alone: no keeper."""
    files: Any = driver("file")

    def file(path: Path) -> Any:
        options = files.Options(driver="file", filename=str(path), read_only=read_only)
        return files.open(options, {})

    children = {"file": file(path)}
    try:
        for role, name in Qcow2.companions(children).items():
            children[role] = file(path.parent / name)
        return Qcow2.open(Qcow2.Options(driver="qcow2", read_only=read_only), children)
    except BaseException:
        for child in children.values():
            child.close()
        raise


@contextmanager
def image_at(path: Path, read_only: bool = False) -> Iterator[Qcow2]:
    """Open, and closed again."""
    image = opened(path, read_only)
    try:
        yield image
    finally:
        image.close()


def make(path: Path, size: int = SIZE, **options: Any) -> Path:
    """An empty image."""
    Qcow2.create(str(path), size, options)
    return path


def dirty(
    name: str, size: int = SIZE, granularity: int = 64 << 10, seed: int = 1, share: float = 0.3
) -> Bitmap:
    """A bitmap with runs of dirty granules, and its last one."""
    bitmap = Bitmap(name, size, granularity, persistent=True)
    rnd = random.Random(f"{name}{seed}")
    for _ in range(60):
        if rnd.random() < share:
            bitmap.set(rnd.randrange(size), rnd.randrange(1, 9) * granularity)
    bitmap.set(size - 1, 1)
    return bitmap


def known(bitmaps: Iterable[Bitmap]) -> Known:
    return {b.name: (b.bits.tobytes(), b.recording) for b in bitmaps}


def stored(path: Path) -> list[Bitmap]:
    """As another process finds them."""
    with image_at(path, read_only=True) as image:
        return image.read_bitmaps()


class StorageDaemon:
    """qemu-storage-daemon with `path` as node `n`, spoken to in QMP."""

    def __init__(self, path: Path, read_only: bool = True) -> None:
        need("qemu-storage-daemon", "nbdinfo")
        self.socket = path.with_suffix(".sock")
        file = f"file.driver=file,file.filename={path}"
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev",
             f"driver=qcow2,node-name=n,{file},read-only={'on' if read_only else 'off'}",
             "--chardev", "stdio,id=m", "--monitor", "chardev=m"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdin is not None
        self.out, self.into = self.process.stdout, self.process.stdin
        assert "QMP" in self.out.readline()
        self.call("qmp_capabilities")

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def kill(self) -> None:
        """No chance to store anything."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def call(self, command: str, **arguments: Any) -> Any:
        self.into.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.into.flush()
        while True:
            answer = json.loads(self.out.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """By name, as the node shows them."""
        (node,) = (n for n in self.call("query-named-block-nodes") if n["node-name"] == "n")
        return {b["name"]: b for b in node.get("dirty-bitmaps", [])}

    def export(self, *bitmaps: str) -> None:
        addr = {"type": "unix", "data": {"path": str(self.socket)}}
        self.call("nbd-server-start", addr=addr)
        self.call("block-export-add", type="nbd", id="e", **{"node-name": "n"}, bitmaps=bitmaps)

    def runs(self, bitmap: str) -> list[tuple[int, int]]:
        """The dirty runs, by way of an NBD client."""
        done = subprocess.run(
            ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}",
             f"nbd+unix:///n?socket={self.socket}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [(e["offset"], e["length"]) for e in json.loads(done.stdout) if e["type"] & 1]


def info_of_qemu(path: Path) -> Any:
    """The format-specific data of qemu-img's info."""
    shown = json.loads(qemu_img("info", "-U", "--output=json", path))
    return shown["format-specific"]["data"]


def agree_with_qemu(path: Path) -> None:
    """QEMU finds nothing wrong, shows what we show, and each bit is what we read."""
    qemu_img("check", "-U", path)
    with image_at(path, read_only=True) as image:
        bitmaps, info = image.read_bitmaps(), image.info()
        result = image.check()
    assert not result.corruptions and not result.leaks, result.messages
    assert info_of_qemu(path) == info
    usable = [b.name for b in bitmaps if not b.inconsistent]
    with StorageDaemon(path) as qsd:
        seen = qsd.bitmaps()
        assert list(seen) == [b.name for b in reversed(bitmaps)] or set(seen) == {
            b.name for b in bitmaps
        }
        for b in bitmaps:
            theirs = seen[b.name]
            assert theirs["granularity"] == b.granularity
            assert theirs["persistent"] and theirs.get("inconsistent", False) == b.inconsistent
            if not b.inconsistent:
                assert theirs["count"] == b.count()
                assert theirs["recording"] == b.recording
        if usable:
            qsd.export(*usable)
        for b in bitmaps:
            if not b.inconsistent:
                assert qsd.runs(b.name) == list(b.runs())


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
        before = {e.name: e for e in store.directory(image)}
        other.clear(0, MIB)
        image.write_bitmaps([other, same])
        after = {e.name: e for e in store.directory(image)}
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


# Crashes ------------------------------------------------------------------------------------


class Recorded:
    """Changes of an image's bitmaps under a log; at each mark what may be there from then on."""

    def __init__(self, folder: Path, **options: str) -> None:
        self.folder = folder / "run"
        self.folder.mkdir()
        self.states = folder / "states"
        self.states.mkdir()
        self.path = make(self.folder / "vm.qcow2", SMALL, **options)
        self.moments: list[tuple[Known, bytes, int]] = [({}, b"", SMALL)]  # bitmaps, token, size

    def record(self, broken: Without | None = None) -> None:
        """Rest, in use, changed, grown, rest, fewer, none; with guest bytes in between."""
        rnd = random.Random(3)
        image = opened(self.path)
        self.flat = bytearray(SMALL)
        patch = pytest.MonkeyPatch()
        self.log = Log(self.folder)
        with self.log:
            if broken is not None:
                broken(patch)
            try:
                self._work(image, rnd)
            finally:
                patch.undo()
        image.close()

    def _work(self, image: Qcow2, rnd: random.Random) -> None:
        b0, b1, b2 = dirty("b0", SMALL, 512), dirty("b1", SMALL), dirty("b2", SMALL, 4096)
        self.write(image, [b0, b1])
        self.write(image, [b0, b1], TOKEN)
        self.guest(image, rnd)
        b0.set(0, MIB // 2)
        b1.clear(0, MIB // 2)
        self.write(image, [b0, b1, b2], TOKEN)
        self.guest(image, rnd)
        self.write(image, [b0, b1, b2])
        self.write(image, [b0, b1, b2], OTHER)
        size = 3 * MIB  # in clusters of 512 bytes the table of b0 gets longer
        for b in (b0, b1, b2):
            b.resize(size)
        self.moment([b0, b1, b2], OTHER, size)
        self.log.mark(("grow", size))
        image.resize(size)
        self.log.mark(("done",))
        self.guest(image, rnd)
        b2.set(2 * MIB, MIB)
        self.write(image, [b0, b1, b2])
        b1.recording = False
        self.write(image, [b0, b1, b2])
        self.write(image, [b2, b0])
        self.write(image, [b2, b0], TOKEN)
        self.write(image, [])

    def moment(self, bitmaps: list[Bitmap], token: bytes, size: int) -> None:
        self.moments.append((known(bitmaps), token if bitmaps else b"", size))
        self.log.mark(("begin", len(self.moments) - 1))

    def write(self, image: Qcow2, bitmaps: list[Bitmap], token: bytes = b"") -> None:
        self.moment(bitmaps, token, image.size)
        image.write_bitmaps(bitmaps, token)
        self.log.mark(("done",))

    def guest(self, image: Qcow2, rnd: random.Random) -> None:
        """Writes, some of them flushed."""
        for _ in range(3):
            at, data = rnd.randrange(SMALL - 9000), rnd.randbytes(9000)
            self.log.mark(("write", at, data))
            image.pwrite(memoryview(data), at)
        image.flush()
        self.log.mark(("flushed",))

    def judge(self, state: State) -> None:
        """The old bitmaps or the new ones, each in use only if one of both is; guests' bytes."""
        put(state, self.states)
        oracle, at, done = Oracle(self.flat), 0, True
        for kind, *more in state.marks:
            if kind == "begin":
                at, done = more[0], False
            elif kind == "done":
                done = True
            elif kind == "grow":
                oracle.grow(more[0])
            elif kind == "write":
                oracle.write(more[0], more[1])
            else:
                oracle.flush()
        may_be = self.moments[at : at + 1] if done else self.moments[at - 1 : at + 1]
        with image_at(self.states / "vm.qcow2", read_only=True) as image:
            result = image.check()
            assert not result.corruptions, result.messages[:3]
            wrong = oracle.wrong(contents(image))
            assert not wrong, wrong
            found, token = image.read_bitmaps(), image.bitmap_token()
            assert not token or all(b.size == image.size for b in found)
        assert (known(found), image.size) in [(k, s) for k, _, s in may_be], "which bitmaps?"
        assert token in [t for _, t, _ in may_be], "whose token?"
        if any(b.inconsistent for b in found):
            assert token, "in use, and nobody says by whom"
        if done and token:
            assert all(b.inconsistent for b in found), "B1: not marked, and it may be written"


CRASHES = [{"cluster_size": "4k"}, {"cluster_size": "512"}, {"cluster_size": "64k"}]


@pytest.mark.parametrize("options", CRASHES, ids=lambda o: str(o["cluster_size"]))
def test_B1_B2_after_a_crash_they_are_the_old_ones_or_the_new_ones(
    tmp_path: Path, options: dict[str, str]
) -> None:
    need("qemu-img")
    run = Recorded(tmp_path, **options)
    run.record()
    number = 0
    every = 1 if SOAK else max(len(run.log.entries) // 60, 1)
    for number, state in enumerate(states(run.log, 4, 40 if SOAK else 3, every), 1):
        try:
            run.judge(state)
        except AssertionError as error:
            raise AssertionError(f"{state.what}: {error}") from error
        if number % 100 == 0:
            done = subprocess.run(
                ["qemu-img", "check", run.states / "vm.qcow2"], capture_output=True, text=True
            )
            assert done.returncode in (0, 3), f"{state.what}: {done.stdout}{done.stderr}"
    assert number > 100


@pytest.mark.parametrize(
    "broken",
    [Without("Qcow2._write_tables"), Without("_in_place"), Without("_switch"), Without("grow")],
    ids=["what the header refers to", "flags", "header", "growing"],
)
def test_the_crash_test_of_bitmaps_notices_a_missing_flush(tmp_path: Path, broken: Without) -> None:
    run = Recorded(tmp_path, cluster_size="4k")
    run.record(broken)
    with pytest.raises((AssertionError, OSError, CowferryError)):
        for state in states(run.log, 1, 12, every=2):
            run.judge(state)


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_write_that_fails_leaves_the_old_bitmaps_and_the_image_sound(
    tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    old, new = [dirty("b0", granularity=512)], [dirty("b0", granularity=512, seed=2), dirty("b1")]
    image = opened(path)
    image.write_bitmaps(old)
    calls = itertools.count(1)
    plain = sysio.pwrite

    def failing(fd: int, buf: Any, offset: int) -> None:
        if next(calls) == nth:
            raise OSError(28, os.strerror(28))
        plain(fd, buf, offset)

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "pwrite", failing)
        try:
            image.write_bitmaps(new)
            want = new
        except OSError:
            want = old
    assert known(image.read_bitmaps()) == known(want)
    result = image.check()
    assert not result.corruptions, result.messages
    image.write_bitmaps(new)
    assert known(image.read_bitmaps()) == known(new)
    image.close()
    assert known(stored(path)) == known(new)


# What we do not trust -----------------------------------------------------------------------

BOUNDS = {
    1: [0, 1, 2, 8, 9, 31, 32, 63, 255],
    2: [0, 1, 1023, 1024, 65535],
    4: [0, 1, 2, 3, 4, 8, 255, 65535, 65536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
    8: [0, 1, 2, 255, 256, 511, 512, 4096, 65536, 1 << 20, 1 << 40, 1 << 55, 1 << 56, 1 << 62,
        (1 << 63) - 1, 1 << 63, (1 << 64) - 1],
}  # fmt: skip


def fields(path: Path) -> list[tuple[str, int, int]]:
    """(name, place in the file, bytes) of each number of the bitmaps' structures."""
    data = path.read_bytes()
    ext = data.index(struct.pack(">II", headers.EXT_BITMAPS, 24)) + 8
    directory = struct.unpack_from(">Q", data, ext + 16)[0]
    table = struct.unpack_from(">Q", data, directory)[0]
    out = [("extension length", ext - 4, 4)]
    out += [(f"extension {n}", ext + at, w) for n, at, w in
            (("number", 0, 4), ("reserved", 4, 4), ("size", 8, 8), ("offset", 16, 8))]  # fmt: skip
    out += [(f"entry {n}", directory + at, w) for n, at, w in
            (("table", 0, 8), ("length", 8, 4), ("flags", 12, 4), ("type", 16, 1),
             ("granularity", 17, 1), ("name", 18, 2), ("extra", 20, 4))]  # fmt: skip
    return [*out, ("word 0", table, 8), ("word 1", table + 8, 8)]


@pytest.fixture(scope="module")
def seed_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make(tmp_path_factory.mktemp("seed") / "vm.qcow2", cluster_size="512")
    with image_at(path) as image:
        image.write_bitmaps([dirty("b0", granularity=512), dirty("b1"), dirty("b2")])
        image.write_bitmaps([dirty("b0", granularity=512), dirty("b1"), dirty("b2")], TOKEN)
        image.pwrite(memoryview(b"guest" * 1000), 5000)
        image.write_bitmaps([dirty("b0", granularity=512), dirty("b1"), dirty("b2")])
    return path


def try_image(path: Path, data: bytes) -> str:
    """What becomes of an image with these bytes: the error, or "". It stays usable."""
    path.write_bytes(data)
    said = ""
    with image_at(path, read_only=True) as image:
        info = image.info()
        try:
            found = image.read_bitmaps()
            assert [b["name"] for b in info.get("bitmaps", [])] == [b.name for b in found]
            assert image.check().corruptions == 0
        except CowferryError as error:
            assert "\n" not in error.desc and str(path) in error.desc and error.hint
            said = error.desc
            assert isinstance(error, NotSupported) or image.check().corruptions
    assert path.read_bytes() == data
    return said


def test_structures_with_absurd_numbers_are_told_and_the_disk_is_unharmed(
    tmp_path: Path, seed_image: Path
) -> None:
    need("qemu-img")
    whole = seed_image.read_bytes()
    path = tmp_path / "vm.qcow2"
    told = 0
    for (name, at, width), value in ((f, v) for f in fields(seed_image) for v in BOUNDS[f[2]]):
        data = bytearray(whole)
        data[at : at + width] = value.to_bytes(width, "big")
        if name == "extension length" and value != 24:
            continue  # of the header's extensions as a whole: not ours to judge here
        said = try_image(path, bytes(data))
        told += bool(said)
        if value % 3:
            continue
        with image_at(path) as image:  # and for writing, too
            assert not differs(contents(image), contents_of(seed_image))
            image.pwrite(memoryview(b"more"), 100_000)
            left = image.read_bitmaps()
            assert not said or not left
            assert not image.check().corruptions
            image.write_bitmaps([*left, dirty("new")])
        assert [b.name for b in stored(path)] == [*(b.name for b in left), "new"], name
    assert told > 60
    qemu_img("check", "-r", "leaks", path)


def contents_of(path: Path) -> bytes:
    with image_at(path, read_only=True) as image:
        return bytes(contents(image))


def test_structures_that_overlap_are_told(tmp_path: Path, seed_image: Path) -> None:
    whole, path = seed_image.read_bytes(), tmp_path / "vm.qcow2"
    with image_at(seed_image, read_only=True) as image:
        h, (entry, *_) = image.header, store.directory(image)
        ext = h.extension(headers.EXT_BITMAPS)
        assert ext is not None
        directory = store.EXTENSION.unpack(ext)[3]
        word = next(w for w in entry.table if w > store.ALL_ONES)
        tables = {
            "header": 0, "L1": h.l1_offset, "refcount table": h.reftable_offset,
            "refcount block": image.refcounts.table[0], "L2": image.map.l1[0] & ~(1 << 63),
            "directory": directory, "table": entry.table_offset, "bits": word,
        }  # fmt: skip
    places = {name: at for name, at, _ in fields(seed_image)}
    for field, own in (("extension offset", "directory"), ("entry table", "table"), ("word 0", "")):
        for name, place in tables.items():
            data = bytearray(whole)
            at = places[field]
            if name == own or (name == "header" and field == "word 0"):
                continue
            if name == "bits" and field == "word 0" and word == entry.table[0]:
                place = next(w for w in entry.table if w > store.ALL_ONES and w != word)
            data[at : at + 8] = place.to_bytes(8, "big")
            assert try_image(path, bytes(data)), f"{field} at the {name}"
    data = bytearray(whole)
    at = data.index(b"b1", directory)
    data[at : at + 2] = b"b2"
    assert "another's" in try_image(path, bytes(data))


def test_cut_short_or_written_by_a_program_without_bitmaps(
    tmp_path: Path, seed_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need("qemu-img")
    path = tmp_path / "vm.qcow2"
    data = bytearray(seed_image.read_bytes())
    data[95] &= 0xFE  # its autoclear bit
    path.write_bytes(data)
    assert stored(path) == []
    assert "void" in caplog.text and str(path) in caplog.text
    assert "bitmaps" not in info_of_qemu(path)
    with image_at(path, read_only=True) as image:
        leaks = image.check().leaks
        assert leaks
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
    assert done.returncode == 3 and f"{leaks} leaked" in done.stdout
    with image_at(path) as image:
        assert image.read_bitmaps() == []
        image.write_bitmaps([dirty("b9")])
        assert image.check("leaks").leaks_fixed == leaks
    agree_with_qemu(path)


@pytest.mark.parametrize(
    ("count", "length", "flags", "words"),
    [
        (65535, 1, store.IN_USE, "512 MiB"),  # each has little
        (1, 1 << 27, store.IN_USE, "512 MiB"),  # a table of a gibibyte
        (1, 256, 0, "clusters"),  # all that is allowed, and it is too little for the disk
    ],
)
def test_it_takes_little_memory_to_refuse_much(
    tmp_path: Path, count: int, length: int, flags: int, words: str
) -> None:
    """A disk of a pebibyte in granules of 512 bytes, and a file that is mostly a hole."""
    path = make(tmp_path / "vm.qcow2", 1 << 50, cluster_size="2M")
    data = bytearray(path.read_bytes())
    end = len(data)
    first = 1 << 40  # the tables
    entries = b"".join(
        struct.pack(">QIIBBHI", first + (i << 21), length, flags, 1, 9, 8, 0) + b"map%05d" % i
        for i in range(count)
    )
    at = 112  # the names of features were there
    extension = store.EXTENSION.pack(count, 0, len(entries), end)
    data[at : at + 40] = struct.pack(">II24s8x", headers.EXT_BITMAPS, 24, extension)
    data[95] |= 1
    with open(path, "wb") as f:
        f.write(data)
        f.seek(end)
        f.write(entries)
        f.truncate(1 << 42)
    program = (
        "import sys; sys.path.insert(0, 'tests'); import resource; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "from test_qcow2_bitmaps import stored\n"
        "from cowferry.errors import CowferryError\n"
        "try: stored(Path(sys.argv[1]))\n"
        "except CowferryError as error: print(error.desc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_what_we_do_not_understand_stays_as_it_is_byte_for_byte(
    tmp_path: Path, seed_image: Path
) -> None:
    strange = {
        "type": (16, b"\x07"), "flags": (12, b"\0\0\1\0"),
    }  # fmt: skip
    for name, (at, value) in strange.items():
        path = tmp_path / "vm.qcow2"
        data = bytearray(seed_image.read_bytes())
        where = {n: p for n, p, _ in fields(seed_image)}["entry table"] + at
        data[where : where + len(value)] = value
        path.write_bytes(data)
        with image_at(path) as image:
            (first, *others) = image.read_bitmaps()
            assert first.inconsistent and not any(b.inconsistent for b in others), name
            before = store.directory(image)[0]
            image.write_bitmaps([first, *others], TOKEN)
            image.write_bitmaps([others[0], first, dirty("b7")])
            after = {e.name: e for e in store.directory(image)}[before.name]
            assert after == before and after.encode() == before.encode()
            with pytest.raises(CowferryError, match="cannot be resized"):
                image.resize(2 * SIZE)
            image.write_bitmaps([])
            result = image.check()
            assert not result.corruptions and not result.leaks


@pytest.mark.parametrize("compatible", [True, False])
def test_extra_data_is_kept_and_a_bitmap_used_only_if_it_says_that_it_may(
    tmp_path: Path, compatible: bool
) -> None:
    path = make(tmp_path / "vm.qcow2")
    with image_at(path) as image:
        image.write_bitmaps([dirty("b0"), dirty("b1")])
        b0, b1 = store.directory(image)
        flags = b0.flags | (store.EXTRA_COMPATIBLE if compatible else 0)
        data = replace(b0, extra=b"extra data", flags=flags).encode() + b1.encode()
        ext = image.header.extension(headers.EXT_BITMAPS)
        assert ext is not None
        offset = store.EXTENSION.unpack(ext)[3]
        changed = store.EXTENSION.pack(2, 0, len(data), offset)
        image._write(offset, data)
        image.header.extensions = [(headers.EXT_BITMAPS, changed)]
        image.write_header()
    with image_at(path) as image:
        first, second = image.read_bitmaps()
        before = store.directory(image)[0]
        assert first.inconsistent is not compatible
        first.clear(0, SIZE)
        image.write_bitmaps([second, first])
        entry = store.directory(image)[1]
        assert entry.extra == b"extra data"
        assert bool(entry.flags & store.EXTRA_COMPATIBLE) == compatible
        if compatible:
            assert image.read_bitmaps()[1].count() == 0
        else:
            assert entry == before
        result = image.check()
        assert not result.corruptions and not result.leaks


def test_check_does_not_take_what_bitmaps_use_for_leaked(tmp_path: Path) -> None:
    need("qemu-img")
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    bitmaps = [dirty("b0", granularity=512), dirty("b1")]
    with image_at(path) as image:
        image.write_bitmaps(bitmaps)
        with image.meta:
            image.refcounts.allocate(3)
    with image_at(path) as image:
        assert image.check("leaks").leaks_fixed == 3
    agree_with_qemu(path)
    assert known(stored(path)) == known(bitmaps)
    with image_at(path) as image:  # the other way: counts too low are raised
        for cluster in image.bitmap_clusters:
            image.refcounts.put(cluster, 0)
    with image_at(path) as image, pytest.raises(OSError, match="counted as free"):
        image.refcounts.hint = 0
        image.refcounts.allocate(1)  # it is never handed out (Q4)


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
    assert [(at, n) for at, n in disk.root.bitmaps["b0"].runs()] == [(4096, 8192), (19 * MIB, 4096)]
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
    for _ in range(2):
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
