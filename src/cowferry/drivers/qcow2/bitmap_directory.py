"""The directory of the dirty bitmaps inside an image, read with suspicion.

A header extension says where the *directory* is; each of its entries has a name, flags, and the
place of a *table*, whose words say where the clusters of the bits are, or that they are all 0 or 1.

**Damage.** A bitmap whose entry, table or bits cannot be right has a *flaw*, and costs no other
bitmap anything. If the directory itself cannot be read, no name is known, and all are lost.

**Names** are bytes on disk, and may be no UTF-8. Everywhere else a name is text that can be typed,
shown and put into JSON: bytes that are no UTF-8 are shown as `\\xNN` (`text`).

Source: the qcow2 specification, sections Bitmaps extension and Bitmaps.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.refcounts import OFFSET, big_endian
from cowferry.errors import ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

EXTENSION = struct.Struct(">IIQQ")  # how many, zero, bytes and place of the directory
ENTRY = struct.Struct(">QIIBBHI")
FLAGS_AT = 12  # bytes into an entry
IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4  # flags
KNOWN_FLAGS = IN_USE | AUTO | EXTRA_COMPATIBLE
DIRTY_TRACKING = 1  # the only type
ALL_ONES = 1  # in a table: no cluster, all bits set

MAX_BITMAPS = 65535
MAX_DIRECTORY = MAX_BITMAPS * 1024  # bytes; QEMU's
MAX_NAME = 1023  # bytes
MAX_BYTES = 512 << 20  # of the bits of one bitmap (QEMU's), and of all together


@dataclass(frozen=True)
class Entry:
    """One bitmap as the directory has it; places in bytes."""

    name: bytes
    granularity_bits: int
    flags: int
    table_offset: int
    table: array[int]  # of each cluster of bits: where it lies, or 0, or ALL_ONES
    kind: int = DIRTY_TRACKING
    extra: bytes = b""
    shown: str = ""  # the name as text, which no other bitmap of the image has
    flaw: str = ""  # why it is damaged; then its table is not believed
    unread: str = ""  # why its table was not read; it stays as it is
    raw: bytes = b""  # with a flaw, or unread: the entry as it lies in the directory

    @property
    def understood(self) -> bool:
        """Whether it is of a kind that we may use."""
        strange = self.extra and not self.flags & EXTRA_COMPATIBLE
        return self.kind == DIRTY_TRACKING and not self.flags & ~KNOWN_FLAGS and not strange

    @property
    def usable(self) -> bool:
        """Whether its bits can be read and changed."""
        return self.understood and not self.flaw and not self.unread

    @property
    def table_size(self) -> int:
        """How many words the table has, read or not."""
        return int(ENTRY.unpack_from(self.raw)[1]) if self.raw else len(self.table)

    @property
    def tracks(self) -> bool:
        """Whether others rely on it to know of every write."""
        return self.understood and self.flags & (AUTO | IN_USE) == AUTO

    def in_use(self) -> Entry:
        """Return the entry of the bitmap while it is in use: others do not rely on it."""
        raw = bytearray(self.raw)
        if raw:
            struct.pack_into(">I", raw, FLAGS_AT, self.flags | IN_USE)
        return replace(self, flags=self.flags | IN_USE, raw=bytes(raw))

    def encode(self) -> bytes:
        """As it lies in the directory."""
        if self.raw:
            return self.raw
        fixed = ENTRY.pack(
            self.table_offset, len(self.table), self.flags, self.kind, self.granularity_bits,
            len(self.name), len(self.extra),
        )  # fmt: skip
        whole = fixed + self.extra + self.name
        return whole + bytes(-len(whole) % 8)


def clusters_for(size: int, granularity_bits: int, cluster_bits: int) -> int:
    """How many clusters the bits of a disk of `size` bytes take."""
    return -(-size >> granularity_bits + 3 + cluster_bits)


def text(name: bytes) -> str:
    """Return a name as text: bytes that are no UTF-8, and NUL, become `\\xNN`.

    The text has at most MAX_NAME bytes in UTF-8."""
    out = name.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    whole = out.encode()
    if len(whole) > MAX_NAME:
        out = f"{whole[: MAX_NAME - 9].decode('utf-8', 'ignore')}~{zlib.crc32(name):08x}"
    return out


@dataclass
class Directory:
    """The bitmaps of an image, the damaged ones among them."""

    offset: int = 0  # bytes
    size: int = 0  # bytes
    entries: list[Entry] = field(default_factory=list)
    problem: str = ""  # why it may lack bitmaps

    @property
    def sound(self) -> bool:
        """Whether nothing of it is damaged."""
        return not self.problem and not any(e.flaw for e in self.entries)


class _Flaw(Exception):
    """What is wrong with one bitmap."""


def directory(image: Qcow2) -> list[Entry]:
    """Return the bitmaps of the image, those with a `flaw` among them. See `look`."""
    return look(image).entries


def look(image: Qcow2) -> Directory:
    """Read the bitmap directory and the tables.

    Raises `OSError`, and `ImageError` if the directory cannot be found or read at all."""
    h, file = image.header, image.file

    def bad(what: str) -> ImageError:
        return ImageError(
            f"'{image.filename}': {what}",
            "the disk's own bytes are not concerned; opened for writing it loses its bitmaps",
        )

    extension = h.extension(headers.EXT_BITMAPS)
    if extension is None or not h.autoclear & headers.BITMAPS_VALID:
        return Directory()
    if len(extension) != EXTENSION.size:
        raise bad(f"the bitmaps extension has {len(extension)} bytes, not {EXTENSION.size}")
    number, reserved, size, offset = EXTENSION.unpack(extension)
    if reserved or not 1 <= number <= MAX_BITMAPS:
        raise bad(f"the bitmaps extension is invalid ({number} bitmaps)")
    if not number * ENTRY.size < size <= MAX_DIRECTORY:
        raise bad(f"the bitmap directory has the invalid size {size}")
    claims = Claims(image)
    try:
        claims.add(claims.check(offset, size, "the bitmap directory"))
    except _Flaw as flaw:
        raise bad(str(flaw)) from None
    data = bytearray(size)
    file.pread(memoryview(data), offset)
    found = Directory(offset, size)
    names: set[bytes] = set()
    shown: dict[str, int] = {}
    at = total = 0
    for i in range(number):
        if at + ENTRY.size > size:
            found.problem = f"the bitmap directory ends before bitmap {i}"
            return found
        place, length, flags, kind, bits, name_size, extra = ENTRY.unpack_from(data, at)
        start = at + ENTRY.size + extra
        end = start + name_size
        if end > size:
            found.problem = f"bitmap {i} runs over the end of the bitmap directory"
            return found
        name = bytes(data[start:end])
        entry = Entry(
            name, bits, flags, place, array("Q"), kind, bytes(data[start - extra : start]),
            _unique(text(name) or "unnamed", shown),
        )  # fmt: skip
        raw = bytes(data[at:end]) + bytes(-(end - at) % 8)
        at = (end + 7) & ~7
        if (total + length) << h.cluster_bits > MAX_BYTES >= length << h.cluster_bits:
            why = f"the bitmaps of the image have more than {MAX_BYTES >> 20} MiB"
            found.entries.append(replace(entry, unread=why, raw=raw))
            continue
        try:
            _check_entry(image, entry, length, name in names)
            entry = replace(entry, table=_table(image, claims, place, length))
            total += length
        except _Flaw as flaw:
            entry = replace(entry, flaw=str(flaw), raw=raw)
        names.add(name)
        found.entries.append(entry)
    if at < size:
        found.problem = "the bitmap directory has something behind its last bitmap"
    return found


def _unique(name: str, taken: dict[str, int]) -> str:
    """Return the name, or if it is another's one like it. `taken` has the names that were given
    away, and of beginnings of names how many were: a hostile directory has thousands alike."""
    found, stem = name, name[: MAX_NAME // 8]
    while found in taken:
        taken[stem] = taken.get(stem, 1) + 1
        found = f"{stem}~{taken[stem]}"
    taken.setdefault(found, 1)
    return found


def _check_entry(image: Qcow2, entry: Entry, length: int, known: bool) -> None:
    """Raise `_Flaw` if an entry with a table of `length` words cannot be right."""
    bits = entry.granularity_bits
    if not 1 <= len(entry.name) <= MAX_NAME:
        raise _Flaw(f"its name has {len(entry.name)} bytes")
    if known:
        raise _Flaw("another bitmap has the same name")
    if entry.kind == DIRTY_TRACKING and not 9 <= bits <= 31:
        raise _Flaw(f"its granularity 2^{bits} is invalid")
    need = clusters_for(image.size, bits, image.header.cluster_bits)
    strict = entry.understood and not entry.flags & IN_USE
    if not length or (strict and length != need):
        raise _Flaw(f"its table has {length} clusters, but this disk needs {need}")
    if length << image.header.cluster_bits > MAX_BYTES:
        raise _Flaw(f"its {length} clusters are more than {MAX_BYTES >> 20} MiB")


def _table(image: Qcow2, claims: Claims, place: int, length: int) -> array[int]:
    """Return the table of a bitmap and claim what it names. Raises `_Flaw`; then nothing is."""
    mine = set(claims.check(place, length * 8, "its table"))
    words = bytearray(length * 8)
    image.file.pread(memoryview(words), place)
    table = big_endian("Q", words)
    for word in table:
        if word > ALL_ONES:
            (cluster,) = claims.check(word, image.cluster_size, "a cluster of it")
            if cluster in mine:
                raise _Flaw(f"its cluster at {word:#x} overlaps with something else")
            mine.add(cluster)
    claims.add(mine)
    return table


class Claims:
    """Which clusters were said to hold what: none twice, none of another table, all in the file."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        bits = image.header.cluster_bits
        self.mask, self.end = (1 << bits) - 1, -(-image.file.size >> bits) << bits
        self.taken: set[int] = set()

    def check(self, offset: int, length: int, what: str) -> range:
        """Return the clusters of a range that can be claimed. Raises `_Flaw`."""
        if not offset or offset & ~OFFSET or offset & self.mask:
            raise _Flaw(f"{what} has the invalid offset {offset:#x}")
        if offset + length > self.end:
            raise _Flaw(f"{what} at {offset:#x} lies beyond the end of the file")
        found = clusters(self.image, offset, length)
        for cluster in found:
            other = cluster in self.image.metadata and cluster not in self.image.bitmap_clusters
            if other or cluster in self.taken:
                raise _Flaw(f"{what} at {offset:#x} overlaps with something else")
        return found

    def add(self, found: Iterable[int]) -> None:
        """These are claimed."""
        self.taken.update(found)


def clusters(image: Qcow2, offset: int, length: int) -> range:
    """The host clusters of a range of bytes that begins with one."""
    bits = image.header.cluster_bits
    return range(offset >> bits, (offset + length + (1 << bits) - 1) >> bits)


def places(image: Qcow2, entries: Iterable[Entry]) -> Iterator[int]:
    """Yield the host cluster of each part of the directory, the tables and the bits, but for those
    of damaged bitmaps: they may be another owner's."""
    extension = image.header.extension(headers.EXT_BITMAPS)
    if extension is not None and entries:
        _, _, size, offset = EXTENSION.unpack(extension)
        yield from clusters(image, offset, size)
    for entry in entries:
        yield from own_places(image, entry)


def own_places(image: Qcow2, entry: Entry) -> Iterator[int]:
    """Yield the host clusters of the table and the bits of one bitmap."""
    if not entry.raw:
        yield from clusters(image, entry.table_offset, len(entry.table) * 8)
        yield from (w >> image.header.cluster_bits for w in entry.table if w > ALL_ONES)
