"""Making a new qcow2 image: the smallest set of tables, then whatever was to be preallocated.

The file is built in an order that a crash cannot make look finished: everything but the first
sector first, a barrier, then the header.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cowferry.block import scope, sysio
from cowferry.block.node import ZEROES, Extent, State
from cowferry.drivers import driver, fdsets
from cowferry.drivers.options import check_backing, check_known, flag, number, word
from cowferry.drivers.plan import DataFile, Plan, is_device
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.refcounts import CODES, swapped
from cowferry.errors import CowferryError, NotSupported

KNOWN = {
    "compat", "cluster_size", "refcount_bits", "lazy_refcounts", "preallocation",
    "backing_file", "backing_fmt", "extended_l2", "compression_type", "data_file",
    "data_file_raw", "encryption", "encrypt.format",
}  # fmt: skip
STEP = 1 << 30  # bytes of the disk that are preallocated between two flushes


@dataclass(frozen=True)
class Layout:
    """Where the tables of a new image lie. Positions and counts are in clusters."""

    header: headers.Header
    first_block: int  # of the refcount blocks, which lie in a row
    blocks: int
    used: int  # header, refcount table, refcount blocks and L1 table
    preallocation: str

    @property
    def fills(self) -> bool:
        """Whether each cluster of the disk gets its place now."""
        return self.preallocation != "off" or bool(self.header.autoclear & headers.DATA_FILE_RAW)

    @property
    def written(self) -> int:
        """Bytes of the file that are written, or set aside, when the image is made."""
        if self.preallocation in ("falloc", "full"):
            return self.total
        if not self.fills:
            return 0  # a few tables, most of which are holes
        size = self.header.cluster_size
        return self.total - (0 if self.header.data_file else -(-self.header.size // size) * size)

    @property
    def total(self) -> int:
        """Bytes of the file, at least, once everything is in its place."""
        h, clusters = self.header, self.used
        if self.fills:
            clusters += h.l1_size  # one L2 table for each entry
            if not h.data_file:
                clusters += -(-h.size // h.cluster_size)
            per_block = (h.cluster_size * 8) >> h.refcount_order
            clusters += max(-(-clusters // per_block) - self.blocks, 0)
        return clusters << h.cluster_bits


def plan(path: str, size: int, options: Mapping[str, Any]) -> Plan:
    """Return how to make an image of `size` bytes, rounded up to 512.

    Raises `CowferryError` naming the option that is wrong."""
    h = _header(path, size, options)
    how = word(options, "preallocation", "off", "metadata", "falloc", "full")
    if how != "off" and h.backing_file:
        raise CowferryError("preallocation and a backing file exclude each other")
    layout = _layout(path, h, how)
    data = None
    if h.data_file:
        data = DataFile(
            name=h.data_file,
            plan=driver("file").plan(
                h.data_file, h.size, {"preallocation": how} if how in ("falloc", "full") else {}
            ),
            shown=layout.fills,
        )
    return Plan(
        size=h.size,
        needs=layout.total,
        takes=layout.written,
        zero_on_device=not h.autoclear & headers.DATA_FILE_RAW,
        data=data,
        make=lambda path, data_path: _make(layout, path, data_path),
    )


def _header(path: str, size: int, options: Mapping[str, Any]) -> headers.Header:
    """The header that the options ask for. Raises `CowferryError` naming the wrong one."""
    check_known(options, KNOWN, "qcow2")
    check_backing(options)
    if flag(options, "encryption") or options.get("encrypt.format"):
        raise NotSupported("encrypted images are not supported", "leave the option out")
    if not 0 <= size <= 1 << 62:
        raise CowferryError(f"'{path}': a qcow2 image cannot have {size} bytes")
    size = -(-size // 512) * 512
    versions = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
    compat = word({"compat": "1.1", **options}, "compat", *versions)
    cluster = number(options, "cluster_size", 64 << 10)
    if cluster & (cluster - 1) or not 512 <= cluster <= 2 << 20:
        raise CowferryError("Cluster size must be a power of two between 512 and 2048k")
    width = number(options, "refcount_bits", 16)
    if width & (width - 1) or not 1 <= width <= 64:
        raise CowferryError("Refcount width must be a power of two and may not exceed 64 bits")
    h = headers.Header(version=versions[compat], cluster_bits=cluster.bit_length() - 1, size=size)
    h.refcount_order = width.bit_length() - 1
    extended = flag(options, "extended_l2")
    raw = flag(options, "data_file_raw")
    lazy = flag(options, "lazy_refcounts")
    compression = word(options, "compression_type", "zlib", "zstd")
    if h.version == 2:
        for bad, name in (
            (width != 16, "refcount widths other than 16 bits"),
            (extended, "extended L2 entries"),
            (lazy, "lazy refcounts"),
            (compression == "zstd", "zstd compression"),
            (options.get("data_file"), "an external data file"),
        ):
            if bad:
                raise CowferryError(f"{name} need compat=1.1")
    if extended:
        if cluster < 16 << 10:
            raise CowferryError("Extended L2 entries need a cluster size of at least 16k")
        h.incompatible |= headers.EXTENDED_L2
    if lazy:
        h.compatible |= headers.LAZY_REFCOUNTS
    if compression == "zstd":
        h.incompatible |= headers.COMPRESSION
        h.compression_type = 1
    if options.get("data_file") == "":
        raise CowferryError("'data_file' is empty", "name the external data file, or leave it out")
    if options.get("data_file"):
        h.incompatible |= headers.DATA_FILE
        h.data_file = str(options["data_file"])
        if raw:
            h.autoclear |= headers.DATA_FILE_RAW
    elif raw:
        raise CowferryError("'data_file_raw' needs 'data_file'")
    if options.get("backing_file"):
        if raw:
            raise CowferryError("a backing file and data_file_raw exclude each other")
        h.backing_file = str(options["backing_file"])
        if len(h.backing_file.encode("utf-8", "surrogateescape")) > headers.MAX_BACKING_NAME:
            raise CowferryError("the backing file's name is too long (1023 bytes at most)")
        h.backing_format = options.get("backing_fmt")
        if not h.backing_format:
            raise CowferryError(
                "a backing file needs its format with it", "add -F FORMAT (backing_fmt)"
            )
    return h


def _layout(path: str, h: headers.Header, how: str) -> Layout:
    """Place the tables, and note the places in the header. Raises `CowferryError`."""
    cluster, bits = h.cluster_size, h.cluster_bits
    h.l1_size = -(-h.size // (cluster * h.l2_entries))
    if h.l1_size * 8 > headers.MAX_L1:
        raise CowferryError(
            f"'{path}': {h.size} bytes need larger clusters than {cluster}",
            "use -o cluster_size=2M",
        )
    l1_clusters = -(-h.l1_size * 8 // cluster)
    # header, refcount table, refcount blocks, L1: a few blocks cover them all
    per_block = (cluster * 8) >> h.refcount_order
    blocks = 1
    while True:
        h.reftable_clusters = -(-blocks * 8 // cluster)
        first_block = 1 + h.reftable_clusters
        if first_block + blocks + l1_clusters <= blocks * per_block:
            break
        blocks += 1
    h.reftable_offset = cluster
    h.l1_offset = (first_block + blocks) << bits if h.l1_size else 0
    return Layout(h, first_block, blocks, first_block + blocks + l1_clusters, how)


def _make(layout: Layout, path: str, data_path: str | None) -> None:
    h, bits = layout.header, layout.header.cluster_bits
    fd = fdsets.open_fd(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if is_device(fd):
            # Another image may lie there. First its header goes, so that a crash leaves none of it.
            sysio.pwrite(fd, bytes(min(h.cluster_size, len(ZEROES))), 0)
            sysio.fdatasync(fd)
            for at in range(0, layout.used << bits, len(ZEROES)):
                sysio.pwrite(fd, ZEROES[: min(len(ZEROES), (layout.used << bits) - at)], at)
        else:
            sysio.ftruncate(fd, layout.used << bits)
        table = array("Q", ((layout.first_block + i) << bits for i in range(layout.blocks)))
        sysio.pwrite(fd, swapped(table), h.reftable_offset)
        per_block = (h.cluster_size * 8) >> h.refcount_order
        for i in range(layout.blocks):
            taken = max(min(layout.used - i * per_block, per_block), 0)
            sysio.pwrite(fd, _block(h, taken), (layout.first_block + i) << bits)
        at = headers.place_name(h, 0, 0) if h.backing_file else 0
        sector = headers.layout(h, at)
        if at:
            sysio.pwrite(fd, (h.backing_file or "").encode("utf-8", "surrogateescape"), at)
        sysio.fdatasync(fd)
        sysio.pwrite(fd, sector, 0)
    finally:
        os.close(fd)
    if layout.fills:
        _preallocate(layout, path, data_path)


def _block(h: headers.Header, taken: int) -> bytes:
    """A refcount block whose first `taken` clusters are in use once."""
    if h.refcount_order >= 3:
        code = CODES[h.refcount_order]
        return swapped(array(code, [1]) * taken)
    width = 1 << h.refcount_order
    bits = sum(1 << i * width for i in range(taken))
    return bits.to_bytes((taken * width + 7) // 8, "little")


def _preallocate(layout: Layout, path: str, data_path: str | None) -> None:
    """Give every cluster its place, and for falloc and full its room on the host, too."""
    children = {"file": _opened(path)}
    if data_path is not None:
        children["data-file"] = _opened(data_path)
    cls: Any = driver("qcow2")
    image = cls.open(cls.Options(driver="qcow2"), children)
    try:
        for offset in range(0, image.size, STEP):
            length = min(STEP, image.size - offset)
            if data_path is not None:
                room = [Extent(length, State.DATA, image.data_fd, offset, True)]
            else:
                room = image.reserve(offset, length) or []
            for r in room:
                scope.check()
                _place(image, layout, offset, r)
                offset += r.length
            image.flush()
    finally:
        image.close()


def _opened(path: str) -> Any:
    """A node over a file that the caller has locked."""
    cls: Any = driver("file")
    return cls.open(cls.Options(driver="file", filename=path, locking="off"), {})


def _place(image: Any, layout: Layout, offset: int, room: Extent) -> None:
    """Make the clusters from `offset` on lie in `room`, and read as zeroes."""
    h, how = layout.header, layout.preallocation
    old_bytes = image.data.is_device  # of the image that was there before
    if old_bytes and (how == "full" or h.version < 3):
        image.data.zero(room.host, room.length)
    elif not old_bytes and how in ("falloc", "full") and not image.external:
        sysio.fallocate(room.fd, 0, room.host, room.length)
        if how == "full":
            for at in range(0, room.length, len(ZEROES)):
                scope.check()
                n = min(len(ZEROES), room.length - at)
                sysio.pwrite(room.fd, ZEROES[:n], room.host + at)
    cluster, count = offset // h.cluster_size, -(-room.length // h.cluster_size)
    if not image.external:
        image.link(offset, room)
    else:
        with image.meta:
            image.map.link(cluster, count, offset)
    if old_bytes and how != "full" and h.version >= 3 and not h.autoclear & headers.DATA_FILE_RAW:
        image.zero_in_place(cluster, count)
