"""The QED header: reading it with suspicion, and changing it so that no tear can break it.

Every number may come from an attacker, so each is checked before anything is allocated or read by
it. Opening a header opens no other file.

The header is 64 bytes and a disk tears writes at 512, so a change of it is one write that is there
or is not. A backing name that fits behind it goes along in the same sector; a longer one goes to
bytes that the header on disk does not refer to, and is durable before the header is (Q6).

**What a header says of the backing file's format** is one bit: "raw, do not probe". Without it
others look at the content, which a guest may have written (CVE-2008-2004); we never do. Then the
format is what the file's name says (`x.qcow2`, `x.qed`), and if that says nothing it is unknown.
So an overlay on a qcow2 image that is called `disk.img` cannot be recorded, and is refused.

Source: the specification, sections Header and Feature bits.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from cowferry.block.node import Node
from cowferry.drivers.formats import EXTENSIONS
from cowferry.errors import CowferryError, ImageError

MAGIC = b"QED\0"
LAYOUT = struct.Struct("<4sIIIQQQQQII")
SECTOR = 512

BACKING_FILE, NEED_CHECK, RAW_BACKING = 1, 2, 4  # QED_F_*; the last is BACKING_FORMAT_NO_PROBE
KNOWN = BACKING_FILE | NEED_CHECK | RAW_BACKING
RAW = ("raw", "file", "host_device")

MIN_CLUSTER, MAX_CLUSTER = 4 << 10, 64 << 20  # bytes
MAX_TABLE = 16  # clusters
MAX_NAME = 1023  # bytes
MAX_SIZE = 1 << 62  # bytes


@dataclass
class Header:
    """The fields of the specification; offsets and sizes in bytes but for the two in clusters."""

    cluster_size: int = 64 << 10
    table_size: int = 4  # clusters
    header_size: int = 1  # clusters
    features: int = 0
    compat: int = 0
    autoclear: int = 0
    l1_offset: int = 0
    size: int = 0
    name_offset: int = 0
    name_length: int = 0
    backing_file: str | None = None

    @property
    def bits(self) -> int:
        """A cluster is 1 << bits bytes."""
        return self.cluster_size.bit_length() - 1

    @property
    def header_bytes(self) -> int:
        """Where regular clusters begin."""
        return self.header_size * self.cluster_size

    @property
    def table_bytes(self) -> int:
        """Bytes of the L1 table, and of each L2 table."""
        return self.table_size * self.cluster_size

    @property
    def entries(self) -> int:
        """Entries of a table (TABLE_NOFFSETS)."""
        return self.table_bytes // 8

    @property
    def max_size(self) -> int:
        """The largest disk that the tables can map."""
        return min(self.entries * self.entries * self.cluster_size, MAX_SIZE)

    @property
    def l1_entries(self) -> int:
        """L1 entries that the disk needs."""
        return -(-self.size // (self.entries * self.cluster_size))

    @property
    def backing_format(self) -> str | None:
        """The backing file's format; None if neither the header nor the file's name says it."""
        if self.backing_file is None:
            return None
        return "raw" if self.features & RAW_BACKING else told_by_name(self.backing_file)

    def packed(self) -> bytes:
        """As it is written."""
        return LAYOUT.pack(
            MAGIC, self.cluster_size, self.table_size, self.header_size, self.features,
            self.compat, self.autoclear, self.l1_offset, self.size, self.name_offset,
            self.name_length,
        )  # fmt: skip


def parse(file: Node) -> Header:
    """The header of the image in `file`. Raises `ImageError` naming the file and the field."""

    def bad(what: str, hint: str = "") -> ImageError:
        return ImageError(f"'{file.filename}': {what}", hint or "the file was not changed")

    start = bytearray(LAYOUT.size)
    file.pread(memoryview(start), 0)
    fields = LAYOUT.unpack(start)
    if fields[0] != MAGIC:
        raise bad(
            "image is not in QED format",
            "give the format that it has (-f raw, say); formats are never guessed from content",
        )
    h = Header(*fields[1:])
    unknown = h.features & ~KNOWN
    if unknown:
        found = [str(b) for b in range(64) if unknown >> b & 1]
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise bad(
            f"unsupported QED feature(s): bit {', '.join(found[:4])}{more}",
            "a newer program wrote this image",
        )
    if not _power(h.cluster_size, MIN_CLUSTER, MAX_CLUSTER):
        raise bad(f"invalid cluster size of {h.cluster_size} bytes (4 KiB to 64 MiB are valid)")
    if not _power(h.table_size, 1, MAX_TABLE):
        raise bad(f"invalid table size of {h.table_size} clusters (1, 2, 4, 8 or 16 are valid)")
    if not h.header_size:
        raise bad("invalid header size of 0 clusters")
    if h.size > h.max_size:
        raise bad(f"absurd size of {h.size} bytes: its tables map {h.max_size} at most")
    if h.size % SECTOR:
        raise bad(f"invalid size of {h.size} bytes: it is no multiple of 512")
    if h.l1_offset % h.cluster_size or h.l1_offset < h.header_bytes:
        raise bad(f"L1 table has the invalid offset {h.l1_offset:#x}")
    if h.l1_offset + h.table_bytes > file.size // h.cluster_size * h.cluster_size:
        raise bad(
            f"L1 table at {h.l1_offset} lies beyond the end of the file at {file.size}",
            "the image is truncated; restore it from a backup",
        )
    if h.features & BACKING_FILE and h.name_length:
        h.backing_file = _name(h, file, bad)
    else:
        h.name_offset = h.name_length = 0  # of no meaning without the feature
    return h


def _name(h: Header, file: Node, bad: object) -> str:
    assert callable(bad)
    if h.name_length > MAX_NAME:
        raise bad(f"backing file name of {h.name_length} bytes is too long ({MAX_NAME} at most)")
    if h.name_offset < LAYOUT.size or h.name_offset + h.name_length > h.header_bytes:
        raise bad(f"backing file name at {h.name_offset} lies outside the header's clusters")
    raw = bytearray(h.name_length)
    file.pread(memoryview(raw), h.name_offset)
    if b"\0" in raw:
        raise bad("backing file name has a NUL byte in it")
    return raw.decode("utf-8", "surrogateescape")


def _power(value: int, least: int, most: int) -> bool:
    return least <= value <= most and not value & (value - 1)


def told_by_name(name: str) -> str | None:
    """The format that a backing file's name says, if it says one that is not raw."""
    found = EXTENSIONS.get(os.path.splitext(name)[1].lower())
    return None if found in RAW else found


def with_backing(h: Header, name: str | None, format: str | None) -> tuple[Header, bytes]:
    """The header that records another backing file, or none, and the name's bytes.

    Raises `CowferryError` for a name or a format that a header cannot hold."""
    raw = (name or "").encode("utf-8", "surrogateescape")
    features = h.features & ~(BACKING_FILE | RAW_BACKING)
    if name:
        features |= BACKING_FILE
        if len(raw) > MAX_NAME:
            raise CowferryError(
                f"backing file name of {len(raw)} bytes is too long ({MAX_NAME} at most)"
            )
        if format in RAW:
            features |= RAW_BACKING
        elif format is None or told_by_name(name) != format:
            raise CowferryError(
                f"a QED image cannot record that its backing file '{name}' is "
                f"{format or 'of an unknown format'}",
                "its header says only whether it is raw, and formats are never guessed from "
                "content: let the file's name say it (.qcow2, .qed)",
            )
    changed = Header(
        h.cluster_size, h.table_size, h.header_size, features, h.compat, h.autoclear, h.l1_offset,
        h.size, _place(h, len(raw)) if name else 0, len(raw), name or None,
    )  # fmt: skip
    return changed, raw


def _place(h: Header, length: int) -> int:
    """Where a name can lie: in the header's own sector, or clear of the name that is there.

    The header has 4096 bytes or more and a name 1023 at most, so behind the old one is room."""
    if LAYOUT.size + length <= SECTOR:
        return LAYOUT.size
    end = h.name_offset + h.name_length
    return SECTOR if SECTOR + length <= h.name_offset or end <= SECTOR else end
