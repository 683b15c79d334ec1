"""The qcow2 header: reading it with suspicion, and changing it so that no tear can break it.

Every number here may come from an attacker, so each is checked before anything is allocated
or read by it; the caps are those of the field (L1 32 MiB, refcount table 8 MiB, 65,536
snapshots). Opening a header opens no other file.

Changes after creation touch sector 0 and nothing else that is referenced (Q6). The header,
its extensions and the backing name live in the first cluster; a disk may tear a write at
512 bytes. So the extensions are kept within sector 0 (the feature-name table, which only
explains, is left out if it does not fit), a new backing name goes to bytes that the header on
disk does not refer to, and is flushed, before sector 0 changes in one sector write.

Source: the qcow2 specification (docs/interop/qcow2 of QEMU), sections Header, Header
extensions, Feature name table.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from cowferry.errors import ImageError, NotSupported

MAGIC = 0x514649FB
V2 = struct.Struct(">IIQIIQIIQQIIQ")
V3 = struct.Struct(">QQQII")

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_DATA_FILE = 0x44415441
EXT_BITMAPS_KEPT = 0x434F5746  # ours, see `bitmaps`: who keeps the bitmaps while they are in use

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
LAZY_REFCOUNTS = 1  # compatible
BITMAPS_VALID, DATA_FILE_RAW = 1, 2  # autoclear
BITMAPS_KEPT = 1 << 63  # autoclear, ours: nobody else wrote since the extension of that name

FEATURE_NAMES = [
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
]

MAX_L1 = 32 << 20  # bytes
MAX_REFTABLE = 8 << 20  # bytes
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023
SECTOR = 512
KNOWN_LENGTH = 112  # bytes of the fields of version 3 that we know, padding included


@dataclass
class Header:
    """The fields of the specification, under its names; offsets and sizes in bytes."""

    version: int = 3
    backing_file: str | None = None
    backing_format: str | None = None
    cluster_bits: int = 16
    size: int = 0
    l1_size: int = 0  # entries
    l1_offset: int = 0
    reftable_offset: int = 0
    reftable_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = 0  # 0 zlib, 1 zstd
    data_file: str | None = None
    extensions: list[tuple[int, bytes]] = field(default_factory=list)  # those not named above
    backing_offset: int = 0  # where the name lies now
    backing_length: int = 0
    further: bytes = b""  # fields behind those that we know; kept as they are

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """Whether entries are 16 bytes, with 32 subclusters."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def l2_entries(self) -> int:
        """Clusters that one L2 table maps."""
        return self.cluster_size // (16 if self.extended_l2 else 8)

    def extension(self, kind: int) -> bytes | None:
        """The data of one of `extensions`."""
        return next((data for k, data in self.extensions if k == kind), None)

    @property
    def header_length(self) -> int:
        """Bytes of the fixed part."""
        return 72 if self.version == 2 else KNOWN_LENGTH + len(self.further)


def first_cluster(sector: bytes) -> int:
    """Return how many bytes the header cluster has that begins with `sector`."""
    if len(sector) < V2.size:
        return SECTOR
    bits: int = V2.unpack_from(sector)[4]
    return 1 << min(max(bits, 9), 21)


def parse(name: str, start: bytes, file_size: int, checking: bool = False) -> Header:
    """Return the header in `start`, the first bytes of the file (a cluster, or all there is).

    With `checking` tables may lie where they cannot be: `check` reports that, and may repair it.
    Raises `ImageError` with one line that names the file and the field."""

    def bad(what: str, hint: str = "") -> ImageError:
        return ImageError(f"'{name}': {what}", hint or "the file was not changed")

    if len(start) < 72:
        raise bad("image is not in qcow2 format (too short for a header)")
    (magic, version, back_offset, back_size, bits, size, crypt, l1_size, l1_offset, rt_offset,
     rt_clusters, snapshots, snapshots_offset) = V2.unpack_from(start)  # fmt: skip
    if magic != MAGIC:
        raise bad(
            "image is not in qcow2 format",
            "give the format that it has (-f raw, say); formats are never guessed from content",
        )
    if version not in (2, 3):
        raise bad(f"unsupported qcow2 version {version}")
    h = Header(version=version, cluster_bits=bits, size=size, l1_size=l1_size)
    h.l1_offset, h.reftable_offset, h.reftable_clusters = l1_offset, rt_offset, rt_clusters
    h.nb_snapshots, h.snapshots_offset = snapshots, snapshots_offset
    if not 9 <= bits <= 21:
        raise bad(f"unsupported cluster size: 2^{bits} bytes (512 bytes to 2 MiB are)")
    if crypt:
        raise bad(
            "encrypted images are not supported",
            "decrypt it first, for example with qemu-img convert",
        )
    length = 72
    if version == 3:
        if len(start) < 104:
            raise bad("header is cut short")
        h.incompatible, h.compatible, h.autoclear, h.refcount_order, length = V3.unpack_from(
            start, 72
        )
        if not 104 <= length <= h.cluster_size or length % 8:
            raise bad(f"invalid header length {length}")
        if length > 104 and len(start) > 104:
            h.compression_type = start[104]
        h.further = start[KNOWN_LENGTH:length]
    unknown = h.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        names = _feature_names(start, length, h.cluster_size)
        bits = [b for b in range(64) if unknown >> b & 1]
        words = ", ".join(names.get((0, b)) or f"incompatible feature bit {b}" for b in bits[:4])
        more = f" and {len(bits) - 4} more" if len(bits) > 4 else ""
        raise bad(
            f"unsupported qcow2 feature(s): {words}{more}", "a newer program wrote this image"
        )
    if h.refcount_order > 6:
        raise bad(f"refcounts of 2^{h.refcount_order} bits are invalid (64 at most)")
    if h.compression_type > 1:
        raise bad(f"unknown compression type {h.compression_type}")
    if bool(h.compression_type) != bool(h.incompatible & COMPRESSION):
        raise bad("compression type and its feature bit disagree")
    if h.extended_l2 and bits < 14:
        raise bad("extended L2 entries need clusters of at least 16 KiB")
    if size > 1 << 62:
        raise bad(f"absurd size of {size} bytes")
    _check_tables(h, bad, file_size, checking)
    _read_extensions(h, start, length, bad)
    if back_offset:
        if back_size > MAX_BACKING_NAME or back_offset + back_size > min(
            h.cluster_size, len(start)
        ):
            raise bad("backing file name is too long or lies outside the header cluster")
        raw = start[back_offset : back_offset + back_size]
        h.backing_file = raw.decode("utf-8", "surrogateescape")
        h.backing_offset, h.backing_length = back_offset, back_size
        if not raw:
            h.backing_file = None
        elif b"\0" in raw:
            raise bad("backing file name has a NUL byte in it")
    return h


def _check_tables(h: Header, bad: object, file_size: int, checking: bool) -> None:
    assert callable(bad)
    mask = h.cluster_size - 1
    if h.l1_size * 8 > MAX_L1:
        raise bad(f"active L1 table too large ({h.l1_size} entries)")
    need = -(-h.size // (h.cluster_size * h.l2_entries))
    if h.l1_size < need:
        raise bad(f"L1 table is too small for {h.size} bytes ({h.l1_size} of {need} entries)")
    if h.reftable_clusters * h.cluster_size > MAX_REFTABLE:
        raise bad("refcount table too large")
    if not checking and not (h.reftable_clusters and h.reftable_offset):
        raise bad("image has no refcount table")
    for what, offset, length in (
        ("active L1 table", h.l1_offset, h.l1_size * 8),
        ("refcount table", h.reftable_offset, h.reftable_clusters * h.cluster_size),
        ("snapshot table", h.snapshots_offset if h.nb_snapshots else 0, 0),
    ):
        if offset >= 1 << 62:
            raise bad(f"{what} has the invalid offset {offset:#x}")
        if checking:
            continue
        if offset & mask:
            raise bad(f"{what} has the invalid offset {offset:#x}")
        if offset and offset + length > -(-file_size // h.cluster_size) * h.cluster_size:
            raise bad(
                f"{what} at {offset} lies beyond the end of the file at {file_size}",
                "the image is truncated; restore it from a backup",
            )
        if length and not offset:
            raise bad(f"{what} has no offset")
    if h.nb_snapshots > MAX_SNAPSHOTS and not checking:
        raise bad(f"too many snapshots ({h.nb_snapshots})")


def _walk_extensions(start: bytes, at: int, limit: int) -> list[tuple[int, bytes]] | None:
    """The (type, data) pairs, or None if one runs over the end."""
    found: list[tuple[int, bytes]] = []
    while at + 8 <= limit:
        kind, length = struct.unpack_from(">II", start, at)
        at += 8
        if kind == EXT_END:
            break
        if at + length > limit:
            return None
        found.append((kind, start[at : at + length]))
        at += (length + 7) & ~7
    return found


def _feature_names(start: bytes, at: int, limit: int) -> dict[tuple[int, int], str]:
    names: dict[tuple[int, int], str] = {}
    for kind, data in _walk_extensions(start, at, min(limit, len(start))) or []:
        if kind == EXT_FEATURES:
            for i in range(0, len(data) // 48 * 48, 48):
                text = data[i + 2 : i + 48].split(b"\0")[0].decode("ascii", "replace")
                names[data[i], data[i + 1]] = "".join(c for c in text if c.isprintable())
    return names


def _read_extensions(h: Header, start: bytes, at: int, bad: object) -> None:
    assert callable(bad)
    limit = min(h.cluster_size, len(start))
    back_offset = struct.unpack_from(">Q", start, 8)[0]
    if back_offset:
        if back_offset > limit or back_offset < at:
            raise bad(f"backing file name has the invalid offset {back_offset:#x}")
        limit = back_offset
    found = _walk_extensions(start, at, limit)
    if found is None:
        raise bad("a header extension is too large")
    for kind, data in found:
        if kind == EXT_BACKING_FORMAT:
            h.backing_format = data.decode("utf-8", "surrogateescape")
        elif kind == EXT_DATA_FILE:
            if b"\0" in data:
                raise bad("data file name has a NUL byte in it")
            h.data_file = data.decode("utf-8", "surrogateescape")
        elif kind != EXT_FEATURES:
            h.extensions.append((kind, data))


def layout(h: Header, name_offset: int) -> bytes:
    """Sector 0's worth of header for `h` with its backing name at `name_offset` (0: no name).

    Raises `NotSupported` if even without the feature names it does not fit into a sector."""
    name = (h.backing_file or "").encode("utf-8", "surrogateescape")
    out = bytearray(
        V2.pack(
            MAGIC,
            h.version,
            name_offset if name else 0,
            len(name),
            h.cluster_bits,
            h.size,
            0,
            h.l1_size,
            h.l1_offset,
            h.reftable_offset,
            h.reftable_clusters,
            h.nb_snapshots,
            h.snapshots_offset,
        )
    )
    if h.version == 3:
        out += V3.pack(h.incompatible, h.compatible, h.autoclear, h.refcount_order, h.header_length)
        out += bytes([h.compression_type]) + bytes(7) + h.further
    extensions = list(h.extensions)
    if h.backing_format and name:
        extensions.insert(
            0, (EXT_BACKING_FORMAT, h.backing_format.encode("utf-8", "surrogateescape"))
        )
    if h.data_file is not None:
        extensions.append((EXT_DATA_FILE, h.data_file.encode("utf-8", "surrogateescape")))
    features = b"".join(bytes(f[:2]) + f[2].ljust(46, b"\0") for f in FEATURE_NAMES)
    for wanted in ([*extensions, (EXT_FEATURES, features)], extensions):
        if h.version == 2 and wanted is not extensions:
            continue
        tail = b"".join(
            struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
            for kind, data in wanted
        ) + bytes(8)
        if len(out) + len(tail) <= (min(name_offset, SECTOR) if name else SECTOR):
            return bytes(out + tail)
    raise NotSupported(
        "the header's extensions and names do not fit into its first sector",
        "use shorter file names",
    )


def place_name(h: Header, old_offset: int, old_length: int) -> int:
    """An offset for the backing name that the header on disk does not refer to.

    With 512-byte clusters everything shares sector 0, which is written whole. Raises
    `NotSupported` if there is no room."""
    length = len((h.backing_file or "").encode("utf-8", "surrogateescape"))
    for at in (SECTOR, h.cluster_size - length, SECTOR + old_length):
        at = at // 8 * 8
        clear = at + length <= old_offset or old_offset + old_length <= at or not old_length
        if at >= SECTOR and at + length <= h.cluster_size and clear:
            return at
    return (SECTOR - length) // 8 * 8  # inside sector 0, if `layout` can fit it
