"""What a qcow2 image may say of its bitmaps and is not believed, or not understood.

The disk is unharmed by all of it: it reads the same, it can be written, and gets new bitmaps.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bitmapping import (
    SIZE,
    TOKEN,
    agree_with_qemu,
    contents_of,
    dirty,
    image_at,
    info_of_qemu,
    known,
    make,
    stored,
)
from chains import contents, differs
from cowferry.drivers.qcow2 import bitmap_directory as listing
from cowferry.drivers.qcow2 import header as headers
from cowferry.errors import CowferryError
from test_qcow2_peers import qemu_img
from tests_support import need

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
        except CowferryError as error:
            assert "\n" not in error.desc and str(path) in error.desc and error.hint
            said = error.desc
        else:
            assert [b["name"] for b in info.get("bitmaps", [])] == [b.name for b in found]
            flaws = [e.flaw or e.unread for e in listing.directory(image)]
            said = "; ".join([*filter(None, flaws), listing.look(image).problem]).strip("; ")
            for bitmap, flaw in zip(found, flaws, strict=True):
                assert flaw in bitmap.reason and (bitmap.inconsistent or not flaw)
        assert bool(said) == bool(image.check().corruptions)
    assert path.read_bytes() == data
    return said


def test_structures_with_absurd_numbers_are_told_and_the_disk_is_unharmed(
    tmp_path: Path, seed_image: Path
) -> None:
    need("qemu-img")
    whole = seed_image.read_bytes()
    seeds = known(stored(seed_image))
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
            left = image.read_bitmaps()
            image.pwrite(memoryview(b"more"), 100_000)
            sound = known(b for b in left if not b.inconsistent)
            others = {n: b for n, b in sound.items() if n != "b0"}
            assert others.items() <= seeds.items()
            assert len(others) == 2 or "directory" in said or "extension" in said, said
            image.write_bitmaps([*left, dirty("new")])
            assert not image.check().corruptions, (name, value, image.check().messages[:6])
        assert [b.name for b in stored(path)] == [*(b.name for b in left), "new"], name
        assert known(b for b in stored(path) if not b.inconsistent) == sound | known([dirty("new")])
        with image_at(path, read_only=True) as image:
            strange = any(not e.understood for e in listing.directory(image))
            ours = [e.name for e in listing.directory(image)]
        if not strange:  # QEMU opens no image with such bitmaps
            theirs = [b["name"] for b in info_of_qemu(path)["bitmaps"]]
            assert theirs == [n.partition(b"\0")[0].decode() for n in ours]  # QEMU ends them there
    assert told > 60
    qemu_img("check", "-r", "leaks", path)


def test_structures_that_overlap_are_told(tmp_path: Path, seed_image: Path) -> None:
    whole, path = seed_image.read_bytes(), tmp_path / "vm.qcow2"
    with image_at(seed_image, read_only=True) as image:
        h, (entry, *_) = image.header, listing.directory(image)
        ext = h.extension(headers.EXT_BITMAPS)
        assert ext is not None
        directory = listing.EXTENSION.unpack(ext)[3]
        word = next(w for w in entry.table if w > listing.ALL_ONES)
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
                place = next(w for w in entry.table if w > listing.ALL_ONES and w != word)
            data[at : at + 8] = place.to_bytes(8, "big")
            assert try_image(path, bytes(data)), f"{field} at the {name}"
    data = bytearray(whole)
    at = data.index(b"b1", directory)
    data[at : at + 2] = b"b2"
    assert "the same name" in try_image(path, bytes(data))


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
        (65535, 1, listing.IN_USE, "512 MiB"),  # each has little
        (1, 1 << 27, listing.IN_USE, "512 MiB"),  # a table of a gibibyte
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
    extension = listing.EXTENSION.pack(count, 0, len(entries), end)
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
        "from bitmapping import image_at\n"
        "with image_at(Path(sys.argv[1]), read_only=True) as image:\n"
        "    print({b.reason for b in image.read_bitmaps()}, image.check())\n"
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
            before = listing.directory(image)[0]
            image.write_bitmaps([first, *others], TOKEN)
            image.write_bitmaps([others[0], first, dirty("b7")])
            after = {e.name: e for e in listing.directory(image)}[before.name]
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
        b0, b1 = listing.directory(image)
        flags = b0.flags | (listing.EXTRA_COMPATIBLE if compatible else 0)
        data = replace(b0, extra=b"extra data", flags=flags).encode() + b1.encode()
        ext = image.header.extension(headers.EXT_BITMAPS)
        assert ext is not None
        offset = listing.EXTENSION.unpack(ext)[3]
        changed = listing.EXTENSION.pack(2, 0, len(data), offset)
        image._write(offset, data)
        image.header.extensions = [(headers.EXT_BITMAPS, changed)]
        image.write_header()
    with image_at(path) as image:
        first, second = image.read_bitmaps()
        before = listing.directory(image)[0]
        assert first.inconsistent is not compatible
        first.clear(0, SIZE)
        image.write_bitmaps([second, first])
        entry = listing.directory(image)[1]
        assert entry.extra == b"extra data"
        assert bool(entry.flags & listing.EXTRA_COMPATIBLE) == compatible
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
        image.refcounts.forget_free()
        image.refcounts.allocate(1)  # it is never handed out (Q4)
