"""What made-up qcow2 images cost: time and memory of `check` follow what their tables hold.

Each image is checked, repaired and opened for writing by a process that may have one gigabyte and
some seconds of the processor.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from damage import COPIED, Image
from test_qcow2_peers import qemu_img
from tests_support import need, unavailable

GIB = 1 << 30
SPARSE = 15 << 40  # the largest file of ext4 is 16 TiB
SECONDS = 60


def limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def cowferry(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line within the limits. Never a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "cowferry", *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=limits,
    )
    assert "Traceback" not in done.stderr and done.returncode >= 0, done.stderr[-2000:]
    return done


def made(path: Path, size: str, length: int, **options: str) -> Image:
    """An empty image in a file of `length` bytes, most of which is a hole."""
    need("qemu-img")
    more = ["-o", ",".join(f"{k}={v}" for k, v in options.items())] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *more, path, size)
    try:
        os.truncate(path, max(length, path.stat().st_size))
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        unavailable(f"the file system has no file of {length} bytes")
    return Image(path)


def write(image: Image, at: int, data: bytes) -> None:
    with open(image.path, "r+b") as f:
        f.seek(at)
        f.write(data)


def one_block_named_often(path: Path) -> None:
    image = made(path, "1M", 256 << 10)
    write(image, image.block(), struct.pack(">H", 1) * 32768)
    write(image, image.table, struct.pack(">Q", image.block()) * 8192)


def sparse_tail(path: Path) -> None:
    image = made(path, "1G", SPARSE)
    image.put(image.table, 0)


def sparse_tail_of_small_clusters(path: Path) -> None:
    image = made(path, "10M", SPARSE, cluster_size="512", refcount_bits="64")
    write(image, image.table, bytes(512))


def one_l2_table_named_often(path: Path) -> None:
    image = made(path, "50T", 0)
    end = -(-path.stat().st_size // image.cluster) * image.cluster
    entries = range(end + image.cluster, end + image.cluster * 8193, image.cluster)
    write(image, end, struct.pack(">8192Q", *(e | COPIED for e in entries)))
    os.truncate(path, end + image.cluster * 8193)
    write(image, image.l1, struct.pack(">Q", end | COPIED) * 20_000)


def snapshots_of_one_l1_table(path: Path) -> None:
    made(path, "1T", 0)
    qemu_img("snapshot", "-c", "a", path)
    image = Image(path)
    table = image.get(image.snapshots)
    snapshots(image, lambda _: table, 2048)


def snapshots_in_holes(path: Path) -> None:
    """Each has an L1 table of 32 MiB of its own, 128 GiB in all."""
    image = made(path, "1T", 256 << 30)
    snapshots(image, lambda number: GIB + (number << 25), (32 << 20) // 8, 4096)


def snapshots(image: Image, place: Callable[[int], int], size: int, count: int = 16384) -> None:
    entries = []
    for number in range(count):
        fixed = struct.pack(">QIHHIIQII", place(number), size, 5, 5, 0, 0, 0, 0, 16)
        entry = fixed + struct.pack(">QQ", 0, 1 << 40) + b"%05d%05d" % (number, number)
        entries.append(entry + bytes(-len(entry) % 8))
    write(image, 1 << 23, b"".join(entries))
    image.put(64, 1 << 23)
    image.put(60, count, "I")


def entries_everywhere(path: Path) -> None:
    """Each of 8192 entries points to another part of a file that is a hole."""
    image = made(path, "512M", SPARSE, cluster_size="64k", refcount_bits="1")
    places = range(GIB, SPARSE - GIB, SPARSE // 8192 >> 16 << 16)
    write(image, 1 << 20, struct.pack(">8000Q", *(p | COPIED for p in places[:8000])))
    image.put(image.l1, 1 << 20 | COPIED)


def garbage_for_refcounts(path: Path) -> None:
    image = made(path, "1G", 0, cluster_size="64k", refcount_bits="1")
    write(image, image.block(), random.Random(1).randbytes(65536))


def blocks_in_holes(path: Path) -> None:
    """A refcount table that names 5000 blocks, all in a hole."""
    image = made(path, "1G", SPARSE)
    places = range(64 << 20, (64 << 20) + 14 * 5000 * image.cluster, 14 * image.cluster)
    write(image, 1 << 20, struct.pack(">5000Q", *places))
    image.put(48, 1 << 20)
    image.put(56, 1, "I")


def bitmaps(image: Image, number: int, directory: bytes, place: int = 1 << 20) -> None:
    """Have the header name a directory of this many bitmaps."""
    size = max(len(directory), number * 32)
    extension = struct.pack(">IIIIQQ", 0x23852875, 24, number, 0, size, place)
    with open(image.path, "r+b") as f:
        f.seek(image.get(100, "I"))
        f.write(extension + bytes(8))
    image.put(88, 1)
    write(image, place, directory)


def entry(place: int, words: int, number: int, granularity: int = 16) -> bytes:
    """A bitmap whose table has so many words."""
    name = b"%08d" % number
    return struct.pack(">QIIBBHI", place, words, 2, 1, granularity, len(name), 0) + name


def many_bitmaps(path: Path) -> None:
    image = made(path, "1M", GIB)
    entries = (entry((256 << 20) + (n << 13), 1, n) for n in range(10000))
    bitmaps(image, 10000, b"".join(entries))


def bitmaps_in_a_hole(path: Path) -> None:
    bitmaps(made(path, "1M", GIB), 10000, b"", 256 << 20)


def damaged_bitmaps_of_much(path: Path) -> None:
    """Each of 300 would have 512 MiB of bits, but for the offset of its table."""
    image = made(path, "16T", GIB)
    bitmaps(image, 300, b"".join(entry((64 << 20) + 512, 8192, n, 12) for n in range(300)))


def snapshots_with_long_names(path: Path) -> None:
    image = made(path, "1M", GIB)
    fixed = struct.pack(">QIHHIIQII", 256 << 20, 1, 500, 500, 0, 0, 0, 0, 1000)
    write(image, 1 << 20, (fixed + b"n" * 2000) * 30000)
    image.put(64, 1 << 20)
    image.put(60, 30000, "I")


def snapshots_of_nothing(path: Path) -> None:
    image = made(path, "1M", GIB)
    image.put(64, 256 << 20)
    image.put(60, 65536, "I")


def a_large_refcount_table(path: Path) -> None:
    """65536 blocks, each in another place of a hole."""
    image = made(path, "1M", SPARSE)
    places = range(GIB, GIB + (13 << 32), 13 << 16)
    write(image, 16 << 20, struct.pack(f">{len(places)}Q", *places))
    image.put(48, 16 << 20)
    image.put(56, 8, "I")


MADE_UP = [
    one_block_named_often, sparse_tail, sparse_tail_of_small_clusters, one_l2_table_named_often,
    snapshots_of_one_l1_table, snapshots_in_holes, entries_everywhere, garbage_for_refcounts,
    blocks_in_holes,
]  # fmt: skip
OPENED = [
    *MADE_UP, many_bitmaps, bitmaps_in_a_hole, damaged_bitmaps_of_much, snapshots_with_long_names,
    snapshots_of_nothing, a_large_refcount_table,
]  # fmt: skip


@pytest.mark.parametrize("make", MADE_UP, ids=lambda m: m.__name__)
def test_memory_and_time_follow_what_the_tables_hold(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "vm.qcow2"
    make(path)
    found = cowferry("check", path)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) < 200
    mended = cowferry("check", "-r", "all", path)
    assert mended.returncode in (0, 2), mended.stderr[-500:]
    if make in (sparse_tail, sparse_tail_of_small_clusters):
        assert cowferry("check", path).returncode == 0
        assert Image(path).table < 1 << 30, "new tables lie at the end of the hole"


USE = """
import sys
from cowferry.block.disk import Disk
from cowferry.cli import main
from cowferry.drivers import opening
from cowferry.errors import CowferryError

def run(*arguments):
    try:
        main(list(arguments))
    except SystemExit as end:
        assert end.code in (0, 1, None), (arguments, end.code)

path, copy, dirty = sys.argv[1:]
run("info", path)
run("bitmap", "--list", path)
run("map", "--max-length", "64M", path)
if copy == "copy":  # it holds little
    run("map", path)
    run("convert", "-O", "qcow2", path, path + ".copy.qcow2")
for image in (path, dirty):
    try:
        disk = Disk(opening.open_image(image, "qcow2"), "vm")
        disk.pwrite(memoryview(b"x" * 4096), 4096)
        disk.flush()
        disk.root.close()
    except (OSError, CowferryError) as error:
        print(error)
"""


@pytest.mark.parametrize("make", OPENED, ids=lambda m: m.__name__)
def test_what_opens_an_image_keeps_to_the_same_bounds(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """It is looked at, mapped, copied, written, and opened as one that was not closed cleanly."""
    path, dirty = tmp_path / "vm.qcow2", tmp_path / "dirty.qcow2"
    make(path)
    subprocess.run(["cp", "--sparse=always", path, dirty], check=True)
    Image(dirty).put(72, 1)
    copy = "copy" if make not in (one_l2_table_named_often, entries_everywhere) else ""
    done = subprocess.run(
        [sys.executable, "-c", USE, path, copy, dirty],
        capture_output=True, text=True, preexec_fn=limits,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("make", [one_block_named_often, blocks_in_holes])
def test_an_image_that_was_not_closed_is_opened_within_the_same_bounds(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "vm.qcow2"
    make(path)
    Image(path).put(72, 1)  # its dirty bit
    done = cowferry("resize", path, "2G")
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["qemu-img", "check", path], capture_output=True).returncode == 0
