"""The bitmap file: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import errno
import os
import random
import re
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from bitarray import bitarray

from cowferry.block import bitmap_file, sysio
from cowferry.block.bitmap_file import HEADER, SECTOR, Contents, Entry, Marks, Stamp
from cowferry.errors import ImageError
from orders import Other, Unflushed

NAMES = [
    "magic", "version", "header_length", "incompatible", "compatible", "state", "count",
    "generation", "token", "size", "next_size", "inode", "mtime_ns", "region", "directory",
    "directory_length", "directory_crc", "backing", "format", "version_of_inode",
]  # fmt: skip
SIZE = (40 << 20) + 512


def some(size: int, granularity: int, seed: int = 1) -> bitarray:
    """Random bits for an image of that size."""
    rnd = random.Random(seed)
    count = -(-size // granularity)
    return bitarray([rnd.random() < 0.3 for _ in range(count)], endian="little")


def contents(**more: object) -> Contents:
    """A file with three bitmaps of different granules."""
    made = Contents(
        size=SIZE,
        generation=7,
        token=bytes(range(16)),
        stamp=Stamp(1234, -5, 99),
        region=4 << 20,
        entries=[
            Entry("b0", "dirty", 65536, some(SIZE, 65536)),
            Entry("täglich", "dirty", 4096, some(SIZE, 4096), recording=False, guarded=True),
            Entry("x" * 1023, "allocated", 512, some(SIZE, 512), inconsistent=True),
        ],
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made


def seal(data: bytearray) -> bytes:
    """With the header's checksum put right."""
    data[SECTOR - 4 : SECTOR] = struct.pack("<I", zlib.crc32(data[: SECTOR - 4]))
    return bytes(data)


@pytest.mark.parametrize("in_use", [False, True])
def test_what_is_written_is_read(tmp_path: Path, in_use: bool) -> None:
    path = str(tmp_path / "vm.bitmaps")
    for made in (
        contents(in_use=in_use),
        contents(in_use=in_use, backing=("../base ü.qcow2", "qcow2"), next_size=SIZE - 512),
        Contents(size=0, in_use=in_use, entries=[Entry("b", "dirty", 512, bitarray())]),
        Contents(size=512, in_use=in_use),
    ):
        bitmap_file.write(path, made)
        assert bitmap_file.read(path) == made
    assert os.listdir(tmp_path) == ["vm.bitmaps"]


def test_what_is_marked_in_place_is_read_and_is_durable(tmp_path: Path) -> None:
    path = str(tmp_path / "vm.bitmaps")
    made = contents(in_use=True)
    marks = Marks(path, made)
    rnd = random.Random(5)
    with Unflushed() as unflushed:
        for step in range(200):
            entry = rnd.choice(made.entries)
            first = rnd.randrange(len(entry.bits))
            if step % 5:
                want = entry.bits.copy()
                want[first : first + 5000] = True
                marks.set(entry, first, first + 5000)
            else:
                want = some(SIZE, entry.granularity, step)
                marks.replace(entry, want[: len(want) - step])
                want[len(want) - step :] = False
            assert entry.bits == want
            assert bitmap_file.read(path) == made
            if step % 7 == 0:
                marks.flush()
                assert not unflushed.has(path)
    marks.close()


def test_only_sectors_with_bits_that_change_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = contents(in_use=True)
    marks = Marks(str(tmp_path / "f"), made)
    written: list[int] = []
    plain = sysio.pwrite

    def noting(fd: int, data: bytes, at: int) -> None:
        written.append(len(data))
        plain(fd, data, at)

    monkeypatch.setattr(sysio, "pwrite", noting)
    entry = made.entries[2]  # 20 sectors of bits
    entry.bits.setall(False)
    marks.set(entry, 4095, 4097)
    assert written == [1024]
    marks.set(entry, 4095, 4097)
    assert written == [1024]
    new = entry.bits.copy()
    new[0], new[3 * 4096], new[4 * 4096 + 4095], new[9 * 4096] = 1, 1, 1, 1
    marks.replace(entry, new)
    assert written == [1024, 512, 1024, 512]
    marks.close()


def test_marks_that_wait_together_are_one_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = contents(in_use=True)
    marks = Marks(str(tmp_path / "f"), made)
    inside, go = threading.Event(), threading.Event()
    calls: list[int] = []
    plain = sysio.fdatasync

    def slow(fd: int) -> None:
        calls.append(fd)
        inside.set()
        assert go.wait(30)
        plain(fd)

    monkeypatch.setattr(sysio, "fdatasync", slow)
    first = Other(marks.flush)
    assert inside.wait(30)
    waiting = threading.Semaphore(0)
    plain_wait = marks._barrier._changed.wait

    def wait(timeout: float | None = None) -> bool:
        waiting.release()
        return plain_wait(timeout)

    monkeypatch.setattr(marks._barrier._changed, "wait", wait)
    more = [Other(marks.flush) for _ in range(5)]
    for _ in more:
        assert waiting.acquire(timeout=30)
    go.set()
    for other in (first, *more):
        other.end()
    assert len(calls) == 2  # the one that ran already covers nobody who came later
    marks.close()


def test_a_file_is_closed_after_the_flush_that_runs_and_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another file's a moment later."""
    marks = Marks(str(tmp_path / "f"), contents(in_use=True))
    inside, go, closing = threading.Event(), threading.Event(), threading.Event()
    calls: list[int] = []
    plain = sysio.fdatasync
    plain_wait = marks._barrier._changed.wait

    def slow(fd: int) -> None:
        calls.append(fd)
        inside.set()
        assert go.wait(30)
        plain(fd)

    def wait(timeout: float | None = None) -> bool:
        closing.set()
        return plain_wait(timeout)

    monkeypatch.setattr(sysio, "fdatasync", slow)
    monkeypatch.setattr(marks._barrier._changed, "wait", wait)
    flush = Other(marks.flush)
    assert inside.wait(30)
    close = Other(marks.close)
    assert closing.wait(30)
    go.set()
    flush.end()
    close.end()
    with pytest.raises(OSError, match="it was closed") as error:
        marks.flush()
    assert error.value.errno == errno.EBADF
    assert len(calls) == 1


def test_N6_a_failed_flush_of_marks_is_sticky(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = Marks(str(tmp_path / "f"), contents(in_use=True))

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "fdatasync", broken)
        with pytest.raises(OSError):
            marks.flush()
    with pytest.raises(OSError, match="f' cannot be flushed"):
        marks.flush()
    marks.close()


def test_a_file_that_was_removed_says_nothing_even_if_its_name_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "f")
    bitmap_file.write(path, contents(in_use=True))
    bitmap_file.remove(path)
    assert os.listdir(tmp_path) == []
    bitmap_file.remove(path)
    bitmap_file.write(path, contents(in_use=True))
    with monkeypatch.context() as patch, Unflushed() as unflushed:
        patch.setattr(sysio, "unlink", lambda path: None)
        bitmap_file.remove(path)
        assert not unflushed.has(path)
    assert bitmap_file.read(path) is None


@pytest.mark.parametrize("in_use", [False, True])
def test_a_file_that_is_cut_short_is_told_at_each_length(tmp_path: Path, in_use: bool) -> None:
    path = tmp_path / "vm.bitmaps"
    small = Contents(size=1 << 20, in_use=in_use)
    small.entries = [Entry("b0", "dirty", 4096, some(1 << 20, 4096))]
    bitmap_file.write(str(path), small)
    whole = 4096 + len(small.entries[0].bits) // 8  # what follows is the rest of a sector
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        if length < whole:
            with pytest.raises(ImageError) as error:
                bitmap_file.read(str(path))
            assert "vm.bitmaps" in error.value.desc and error.value.hint
            assert "cut short" in error.value.desc
        else:
            assert bitmap_file.read(str(path)) == small


def test_each_damaged_bit_of_header_and_directory_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "vm.bitmaps"
    made = contents(backing=("base", "raw"))
    bitmap_file.write(str(path), made)
    data = path.read_bytes()
    length = HEADER.unpack_from(data)[NAMES.index("directory_length")]
    with open(path, "r+b", buffering=0) as f:
        for at in range(SECTOR + length):
            os.pwrite(f.fileno(), bytes([data[at] ^ 1 << at % 8]), at)
            with pytest.raises(bitmap_file.Damaged) as error:
                bitmap_file.read(str(path))
            assert "\n" not in error.value.desc and error.value.hint
            os.pwrite(f.fileno(), data[at : at + 1], at)
    assert bitmap_file.read(str(path)) == made


def test_damaged_bits_are_noticed_at_rest_and_the_names_are_told(tmp_path: Path) -> None:
    path = tmp_path / "vm.bitmaps"
    bitmap_file.write(str(path), contents())
    data = bytearray(path.read_bytes())
    data[-SECTOR] ^= 1
    path.write_bytes(data)
    with pytest.raises(bitmap_file.Damaged, match="checksum of bitmap") as error:
        bitmap_file.read(str(path))
    assert [name for name, _ in error.value.names] == ["b0", "täglich", "x" * 1023]


ABSURD: list[tuple[str, int, str]] = [
    ("version", 2, "version 2"),
    ("version", 0, "version 0"),
    ("incompatible", 1, "features 0x1"),
    ("incompatible", 1 << 63, "features 0x8"),
    ("header_length", 0, "a header of 0 bytes"),
    ("header_length", 1 << 31, "a header of"),
    ("state", 3, "no state 3"),
    ("count", 4, "damaged"),
    ("count", (1 << 32) - 1, "4294967295 bitmaps"),
    ("size", 0, "bytes of bits"),
    ("size", 1 << 62, "bytes of bits"),
    ("size", 1 << 63, "no image has its size"),
    ("generation", (1 << 64) - 1, "no image was opened"),
    ("next_size", SIZE * 2, "bytes of bits"),
    ("next_size", (1 << 64) - 2, "no image has its size"),
    ("directory", 0, "bytes about them"),
    ("directory", 511, "bytes about them"),
    ("directory", 1 << 40, "cut short"),
    ("directory_length", 0, "checksum"),
    ("directory_length", 16 << 20, "16777216 bytes about them"),
    ("directory_length", (1 << 32) - 1, "bytes about them"),
    ("directory_crc", 0, "checksum"),
    ("backing", 65535, "damaged"),
    ("format", 65535, "damaged"),
]


@pytest.mark.parametrize(("field", "value", "says"), ABSURD)
def test_absurd_values_in_the_header_are_refused(
    tmp_path: Path, field: str, value: int, says: str
) -> None:
    path = tmp_path / "vm.bitmaps"
    bitmap_file.write(str(path), contents(backing=("base", "raw")))
    data = bytearray(path.read_bytes())
    fields = list(HEADER.unpack_from(data))
    fields[NAMES.index(field)] = value
    HEADER.pack_into(data, 0, *fields)
    path.write_bytes(seal(data))
    with pytest.raises(ImageError, match=says) as error:
        bitmap_file.read(str(path))
    assert "vm.bitmaps" in error.value.desc and error.value.hint


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (0, "<Q", 0),  # where the bits are
        (0, "<Q", 4097),
        (0, "<Q", 1 << 62),
        (8, "<Q", 0),  # how many bytes
        (8, "<Q", 1 << 40),
        (20, "<I", 2),  # kind
        (24, "<I", 0),  # granularity
        (24, "<I", 513),
        (24, "<I", 256),
        (32, "<H", 0),  # length of the name
        (32, "<H", 1024),
        (32, "<H", 65535),
        (40, "<B", 0xFF),  # the name
    ],
)
def test_absurd_values_in_the_directory_are_refused(
    tmp_path: Path, at: int, form: str, value: int
) -> None:
    path = tmp_path / "vm.bitmaps"
    bitmap_file.write(str(path), contents())
    data = bytearray(path.read_bytes())
    fields = list(HEADER.unpack_from(data))
    start, length = fields[NAMES.index("directory")], fields[NAMES.index("directory_length")]
    struct.pack_into(form, data, start + at, value)
    fields[NAMES.index("directory_crc")] = zlib.crc32(data[start : start + length])
    HEADER.pack_into(data, 0, *fields)
    path.write_bytes(seal(data))
    with pytest.raises(ImageError, match=r"damaged|cut short"):
        bitmap_file.read(str(path))


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    for made in (
        Contents(size=512, entries=[Entry("", "dirty", 512, bitarray("0", endian="little"))]),
        Contents(
            size=512, entries=[Entry("ü" * 512, "dirty", 512, bitarray("0", endian="little"))]
        ),
        Contents(size=512, backing=("x" * 5000, "raw")),
        Contents(size=1 << 60, entries=[Entry("b", "dirty", 512, bitarray())]),
    ):
        with pytest.raises(ImageError):
            bitmap_file.write(path, made)
    assert os.listdir(tmp_path) == []


def test_what_is_no_file_is_not_read_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError):
        bitmap_file.read(str(tmp_path / "fifo"))
    with pytest.raises(OSError):
        bitmap_file.remove(str(tmp_path / "fifo"))
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="no file"):
        bitmap_file.remove(str(tmp_path / "fifo"))
    assert os.read(reader, 512) == b""
    os.close(reader)
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(OSError):
        bitmap_file.read(str(tmp_path / "link"))
    with pytest.raises(FileNotFoundError):
        bitmap_file.read(str(tmp_path / "none"))


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "rename", "flush_directory"])
def test_a_file_that_could_not_be_replaced_is_the_old_or_the_new_one(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "f")
    old, new = contents(), contents(generation=8)
    bitmap_file.write(path, old)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sysio, call, broken)
        with pytest.raises(OSError):
            bitmap_file.write(path, new)
    assert bitmap_file.read(path) == (new if call == "flush_directory" else old)
    assert os.listdir(tmp_path) == ["f"]


def test_on_full_storage_a_file_can_be_taken_into_use_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "f")
    old, used = contents(), contents(generation=8, in_use=True)
    bitmap_file.write(path, old)
    plain = sysio.create

    def full(name: str, *more: Any) -> int:
        fd = plain(name, *more)
        os.close(fd)
        return os.open("/dev/full", os.O_RDWR)  # every write finds no room

    monkeypatch.setattr(sysio, "create", full)
    others = contents(generation=8, in_use=True)
    others.entries[0].bits.setall(True)
    for different in (contents(generation=8), others):
        with pytest.raises(OSError):
            bitmap_file.write(path, different)
        assert bitmap_file.read(path) == old and os.listdir(tmp_path) == ["f"]
    marks = Marks(path, used)
    assert bitmap_file.read(path) == used and os.listdir(tmp_path) == ["f"]
    marks.set(used.entries[0], 5, 6)
    marks.flush()
    marks.close()
    found = bitmap_file.read(path)
    assert found is not None and found.entries[0].bits[5]


def test_the_header_is_as_documented(tmp_path: Path) -> None:
    """Each field lies where docs/bitmaps.md says."""
    text = (Path(__file__).parent.parent / "docs" / "bitmaps.md").read_text()
    table = text.split("| offset | bytes | field |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    told = [(int(offset), int(length)) for offset, length in rows]
    at = 0
    for offset, length in told:
        assert offset == at
        at += length
    assert at == SECTOR
    letters = {"I": 4, "Q": 8, "q": 8, "H": 2, "8s": 8, "16s": 16}
    fields = re.findall(r"\d+s|[A-Za-z]", HEADER.format[1:])
    assert [letters[f] for f in fields] == [n for _, n in told][: len(fields)]
