"""Changes that a header makes true: another backing file, another size with the bitmaps for it.

Everything that the new header will refer to is written elsewhere and durable before; then sector 0
changes in one write, so that a crash or a tear leaves the image as it was or as it is to be (Q6).
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowferry.drivers.qcow2 import bitmaps
from cowferry.drivers.qcow2 import header as headers
from cowferry.errors import CowferryError, NotSupported

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2


def record_backing(image: Qcow2, filename: str | None, format: str | None) -> None:
    """Another backing file, or none. Raises `NotSupported` if the header has no room for it."""
    name = (filename or "").encode("utf-8", "surrogateescape")
    if len(name) > headers.MAX_BACKING_NAME:
        raise CowferryError(f"backing file name of {len(name)} bytes is too long (1023 at most)")
    with image.flushing, image.meta:
        h = image.header
        old = (h.backing_file, h.backing_format, h.backing_offset, h.backing_length)
        try:
            h.backing_file, h.backing_format = filename or None, format
            at = headers.place_name(h, h.backing_offset, h.backing_length) if name else 0
            sector = headers.layout(h, at)
        except NotSupported:
            h.backing_file, h.backing_format = old[0], old[1]
            raise
        if at >= headers.SECTOR:
            image._write(at, name)
            image.file.flush()
        elif name:
            sector = sector.ljust(at, b"\0") + name
        image._write(0, sector.ljust(headers.SECTOR, b"\0"))
        image.file.flush()
        h.backing_offset, h.backing_length = at, len(name)
        image.backing_spec = (filename, format) if filename else None


def grow(image: Qcow2, size: int) -> None:
    """Make the disk larger. What is new reads as zero, durably, before the header has it."""
    if size < image.size:
        raise NotSupported(
            f"'{image.filename}': a qcow2 image cannot be made smaller",
            "convert it into a new, smaller image; nothing was changed",
        )
    if image.snapshots and image.header.version < 3:
        raise NotSupported(f"'{image.filename}': cannot resize a version 2 image with snapshots")
    if size > 1 << 62:
        raise CowferryError(f"'{image.filename}': absurd size of {size} bytes")
    if size % headers.SECTOR and size != image.size:
        raise CowferryError(
            f"'{image.filename}': a qcow2 image cannot have {size} bytes, which is no multiple of "
            f"{headers.SECTOR}",
            f"use {-(-size // headers.SECTOR) * headers.SECTOR}; nothing was changed",
        )
    if size == image.size:
        return
    need = -(-size // (image.cluster_size * image.map.per_table))
    if need * 8 > headers.MAX_L1:
        raise CowferryError(
            f"'{image.filename}': {size} bytes need too large an L1 table",
            "use larger clusters (convert -o cluster_size=2M)",
        )
    image.flush()
    with image.flushing:  # whether its bitmaps can grow, before anything is changed
        fresh = bitmaps.Fresh(image)
        try:
            bitmaps.fits(image.header, bitmaps.grown(image, size, fresh)[1])
        finally:
            fresh.undo()
    with _data_grown(image, size):
        if need > len(image.map.l1):
            _enlarge_l1(image, need)
        _clear(image, size)
        h = image.header
        was = h.size, h.extensions, h.autoclear
        with image.flushing:
            fresh = bitmaps.Fresh(image)
            trying = False  # to write the header: if that fails nobody knows which one is on disk
            try:
                stored, grown = bitmaps.grown(image, size, fresh)
                image._write_tables()  # those of the zeroes, too
                h.size = size
                bitmaps.set_extensions(h, grown)
                trying = True
                image.write_header()
            except BaseException:
                h.size, h.extensions, h.autoclear = was
                if not trying:
                    fresh.undo()
                raise
            gone = image.bitmap_clusters
            bitmaps.note(image, stored)
            bitmaps.give_back(image, gone - image.bitmap_clusters)
    image.size = size


@contextlib.contextmanager
def _data_grown(image: Qcow2, size: int) -> Iterator[None]:
    """Have an external data file of at least `size` bytes. It is as it was if the block raises.

    One that is to read right by itself (data_file_raw) gets zeroes where the disk is to grow. The
    flush in the block makes that durable. Raises `OSError` if a device is too small."""
    if not image.external:
        yield
        return
    data = image.data
    before = data.refresh_size()
    try:
        if before < size:
            data.resize(size)
        if image.header.autoclear & headers.DATA_FILE_RAW:
            data.zero(image.size, size - image.size, unmap=True)
        yield
    except BaseException:
        if data.size > before:
            with contextlib.suppress(OSError):
                data.resize(before)
        raise


def _enlarge_l1(image: Qcow2, entries: int) -> None:
    """A larger L1 table in another place, durable before the header names it.

    No other flush comes between: it would write to the one while the header names the other."""
    h, table_map, bits = image.header, image.map, image.header.cluster_bits
    clusters = (entries * 8 + image.cluster_size - 1) >> bits
    was = table_map.l1_offset, h.l1_size
    old = range(was[0] >> bits, (was[0] >> bits) + -(-was[1] * 8 // image.cluster_size))
    with image.flushing:
        with image.meta:
            first = image.refcounts.contiguous(clusters)
            image.metadata.update(range(first, first + clusters))
        trying = False  # to write the header: if that fails, either may be on disk
        try:
            with image.meta:
                table_map.l1_offset = first << bits
                table_map.l1.extend(array("Q", bytes(8 * (entries - len(table_map.l1)))))
                table_map.l1_dirty.update(range(entries))
                image._write(table_map.l1_offset, bytes(clusters << bits))
            image._write_tables()
            h.l1_offset, h.l1_size = table_map.l1_offset, entries
            trying = True
            image.write_header()
        except BaseException:
            with image.meta:  # the header names the old table: what changes goes there
                table_map.l1_offset, h.l1_size = was
                h.l1_offset = was[0]
                del table_map.l1[h.l1_size :]
                table_map.l1_dirty = set(range(h.l1_size))
                if not trying:
                    image._punch(image.refcounts.settle([(first, clusters)]))
            raise
        bitmaps.give_back(image, set(old))


def _clear(image: Qcow2, size: int) -> None:
    """What would show beyond the old end is zero once the tables are written: what the last cluster
    holds there, and the bytes of a longer backing file.

    It is as large meanwhile as it is going to be, but not in its header, and inside a drain. What
    it shows is the same, so nobody's bitmaps have to know."""
    old, unkept = image.size, image.unkept
    below = image.backing.size if image.backing is not None else 0
    end = min(size, max(below, -(-old // image.cluster_size) * image.cluster_size))
    if end == old:
        return
    image.size, image.unkept = size, False
    try:
        image.zero(old, end - old)
    finally:
        image.size, image.unkept = old, unkept
