"""Making a new qcow2 image: the smallest set of tables, then whatever was to be preallocated.

The file is built in an order that a crash cannot make look finished: everything but the first
sector first, a barrier, then the header.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Mapping
from typing import Any

from cowferry.block import sysio
from cowferry.block.node import Extent, State
from cowferry.block.origin import Origin
from cowferry.drivers import driver
from cowferry.drivers.options import number
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.refcounts import CODES, swapped
from cowferry.errors import CowferryError, ImageError, NotSupported

KNOWN = {
    "compat", "cluster_size", "refcount_bits", "lazy_refcounts", "preallocation",
    "backing_file", "backing_fmt", "extended_l2", "compression_type", "data_file",
    "data_file_raw", "encryption", "encrypt.format", "size",
}  # fmt: skip


def _flag(options: Mapping[str, Any], key: str) -> bool:
    value = options.get(key, False)
    if value in (True, "on", "yes", "true"):
        return True
    if value in (False, "off", "no", "false"):
        return False
    raise CowferryError(f"Parameter '{key}' expects 'on' or 'off', not '{value}'")


def plan(path: str, size: int, options: Mapping[str, Any]) -> headers.Header:
    """The header that the options ask for. Raises `CowferryError` naming the wrong one."""
    unknown = set(options) - KNOWN
    if unknown:
        raise CowferryError(f"qcow2 images have no option '{min(unknown)}'")
    if _flag(options, "encryption") or options.get("encrypt.format"):
        raise NotSupported("encrypted images are not supported", "leave the option out")
    if not 0 <= size <= 1 << 62:
        raise CowferryError(f"'{path}': an image cannot have {size} bytes")
    size = -(-size // 512) * 512
    compat = str(options.get("compat", "1.1"))
    versions = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
    if compat not in versions:
        raise CowferryError(f"Parameter 'compat' does not accept value '{compat}'")
    cluster = number(options, "cluster_size", 64 << 10)
    if cluster & (cluster - 1) or not 512 <= cluster <= 2 << 20:
        raise CowferryError("Cluster size must be a power of two between 512 and 2048k")
    width = number(options, "refcount_bits", 16)
    if width & (width - 1) or not 1 <= width <= 64:
        raise CowferryError("Refcount width must be a power of two and may not exceed 64 bits")
    h = headers.Header(version=versions[compat], cluster_bits=cluster.bit_length() - 1, size=size)
    h.refcount_order = width.bit_length() - 1
    extended = _flag(options, "extended_l2")
    raw = _flag(options, "data_file_raw")
    compression = str(options.get("compression_type", "zlib"))
    if compression not in ("zlib", "zstd"):
        raise CowferryError(f"Parameter 'compression_type' does not accept value '{compression}'")
    if h.version == 2:
        for bad, name in (
            (width != 16, "refcount widths other than 16 bits"),
            (extended, "extended L2 entries"),
            (_flag(options, "lazy_refcounts"), "lazy refcounts"),
            (compression == "zstd", "zstd compression"),
            (options.get("data_file"), "an external data file"),
        ):
            if bad:
                raise CowferryError(f"{name} need compat=1.1")
    if extended:
        if cluster < 16 << 10:
            raise CowferryError("Extended L2 entries need a cluster size of at least 16k")
        h.incompatible |= headers.EXTENDED_L2
    if _flag(options, "lazy_refcounts"):
        h.compatible |= headers.LAZY_REFCOUNTS
    if compression == "zstd":
        h.incompatible |= headers.COMPRESSION
        h.compression_type = 1
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


def make(path: str, size: int, options: Mapping[str, Any], like: Origin | None = None) -> None:
    """Create the image at `path`, of `size` bytes (rounded up to 512). Durable on return."""
    h = plan(path, size, options)
    how = options.get("preallocation", "off")
    if how not in ("off", "metadata", "falloc", "full"):
        raise CowferryError(f"Parameter 'preallocation' does not accept value '{how}'")
    if how != "off" and h.backing_file:
        raise CowferryError("preallocation and a backing file exclude each other")
    cluster, bits = h.cluster_size, h.cluster_bits
    h.l1_size = -(-h.size // (cluster * h.l2_entries))
    if h.l1_size * 8 > headers.MAX_L1:
        raise CowferryError(
            f"'{path}': {h.size} bytes need larger clusters than {cluster}",
            "use -o cluster_size=2M",
        )
    l1_clusters = max(-(-h.l1_size * 8 // cluster), 1)
    # header, refcount table, refcount blocks, L1: a few blocks cover them all
    per_block = (cluster * 8) >> h.refcount_order
    blocks = 1
    while 2 + blocks + l1_clusters > blocks * per_block:
        blocks += 1
    h.reftable_clusters = -(-blocks * 8 // cluster)
    h.reftable_offset = cluster
    first_block = 1 + h.reftable_clusters
    while first_block + blocks + l1_clusters > blocks * per_block:
        blocks += 1
    h.l1_offset = (first_block + blocks) << bits
    used = first_block + blocks + l1_clusters
    data_file = options.get("data_file")
    data_path = None
    if data_file:
        data_path = os.path.join(os.path.dirname(path), str(data_file))
        driver("file").create(data_path, h.size, {"preallocation": "off"}, like)
    driver("file").create(path, 0, {}, like)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            sysio.ftruncate(fd, used << bits)
        elif os.lseek(fd, 0, os.SEEK_END) < used << bits:
            raise ImageError(f"device '{path}' is too small for an image of {h.size} bytes")
        else:  # old bytes lie there
            for at in range(0, used << bits, 1 << 20):
                sysio.pwrite(fd, bytes(min(1 << 20, (used << bits) - at)), at)
        table = array("Q", ((first_block + i) << bits for i in range(blocks)))
        sysio.pwrite(fd, swapped(table), h.reftable_offset)
        for i in range(blocks):
            taken = max(min(used - i * per_block, per_block), 0)
            sysio.pwrite(fd, _block(h, taken), (first_block + i) << bits)
        at = headers.place_name(h, 0, 0) if h.backing_file else 0
        sector = headers.layout(h, at)
        if at:
            sysio.pwrite(fd, (h.backing_file or "").encode("utf-8", "surrogateescape"), at)
        sysio.fdatasync(fd)
        sysio.pwrite(fd, sector, 0)
        sysio.fdatasync(fd)
    finally:
        os.close(fd)
    if how != "off" or h.autoclear & headers.DATA_FILE_RAW:
        _preallocate(path, data_path, how)


def _block(h: headers.Header, taken: int) -> bytes:
    """A refcount block whose first `taken` clusters are in use once."""
    if h.refcount_order >= 3:
        code = CODES[h.refcount_order]
        return swapped(array(code, [1]) * taken)
    width = 1 << h.refcount_order
    bits = sum(1 << i * width for i in range(taken))
    return bits.to_bytes((taken * width + 7) // 8, "little")


def _preallocate(path: str, data_path: str | None, how: str) -> None:
    """Give every cluster its place, and for falloc and full its room on the host, too."""
    file_class: Any = driver("file")
    cls: Any = driver("qcow2")
    file = file_class.open(file_class.Options(driver="file", filename=path), {})
    children = {"file": file}
    if data_path is not None:
        children["data-file"] = file_class.open(
            file_class.Options(driver="file", filename=data_path), {}
        )
    image = cls.open(cls.Options(driver="qcow2"), children)
    try:
        step = 1 << 30
        for offset in range(0, image.size, step):
            length = min(step, image.size - offset)
            if data_path is not None:
                clusters = -(-length // image.cluster_size)
                with image.meta:
                    image.map.link(offset // image.cluster_size, clusters, offset)
                room = [Extent(length, State.DATA, image.data_fd, offset, True)]
            else:
                room = image.reserve(offset, length) or []
            at = offset
            for r in room:
                if how in ("falloc", "full"):
                    sysio.fallocate(r.fd, 0, r.host, r.length)
                for x in range(0, r.length if how == "full" else 0, 1 << 20):
                    sysio.pwrite(r.fd, bytes(min(1 << 20, r.length - x)), r.host + x)
                if data_path is None:
                    image.link(at, r)
                at += r.length
            image.flush()
    except OSError as error:
        raise ImageError(f"'{path}': cannot preallocate: {error.strerror}") from error
    finally:
        image.close()
