"""The ordered flush: changed tables reach the disk, each step durable before the next.

1. refcount blocks, and by the same barrier all data and copied-on-write bytes;
2. the refcount table, if it has new blocks, and the header, if the table moved;
3. L2 tables;
4. L1 entries of new L2 tables;
5. only now are clusters that nothing points to any more given back.

So a crash between flushes may leak clusters and never corrupts (Q1, Q2): whatever subset of a
step's writes survives, nothing points to bytes that are not there.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cowferry.drivers.qcow2.refcounts import OFFSET, swapped

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

FULL = (errno.ENOSPC, errno.EDQUOT)
TRIES = 16  # of a change for which there is no room, while others make and take room

T = TypeVar("T")


def write_tables(image: Qcow2) -> None:
    """Make durable what the tables in memory say, as of one moment.

    The caller holds the image's `flushing`. Raises `OSError`; then the next flush writes it all."""
    bits, refs, table_map = image.header.cluster_bits, image.refcounts, image.map
    with image.meta:  # one moment's picture of all tables
        if not image.on_device and image.file.size < refs.end << bits:
            # The last cluster may be written in part. Reading is quicker if it is whole.
            # Under `meta`: room taken a moment later may be filled beyond this end, and must
            # not be cut off again.
            with contextlib.suppress(OSError):
                image.file.resize(refs.end << bits)
        blocks = [(refs.table[i] & OFFSET, refs.encode(i)) for i in sorted(refs.dirty)]
        tables = [
            (table_map.l1[i] & OFFSET, swapped(table_map.tables[i]))
            for i in sorted(table_map.dirty)
        ]
        roots = [
            (table_map.l1_offset + 8 * i, struct.pack(">Q", table_map.l1[i]))
            for i in sorted(table_map.l1_dirty)
        ]
        links = [(refs.table_offset + 8 * i, struct.pack(">Q", refs.table[i])) for i in refs.new]
        moved = refs.moved
        if moved:
            links = [(refs.table_offset, swapped(refs.table))]
        gone = refs.take_pending()
        was = (refs.dirty, refs.new, table_map.dirty, table_map.l1_dirty)
        refs.dirty, refs.new, table_map.dirty, table_map.l1_dirty = set(), set(), set(), set()
        # Not to be thrown out and read again from the file before they are there.
        refs.writing, table_map.writing = was[0], was[2]
        refs.moved = False
    try:
        _write_durably(image, blocks)
        if links:
            _write_durably(image, links)
            if moved:
                image.header.reftable_offset = refs.table_offset
                image.header.reftable_clusters = len(refs.table) * 8 >> bits
                image.write_header()
        for step in (tables, roots):
            if step:
                _write_durably(image, step)
    except BaseException:
        with image.meta:  # nothing is forgotten: the next flush, if one can, writes it all
            refs.writing, table_map.writing = set(), set()
            refs.dirty |= was[0]
            refs.new |= was[1]
            table_map.dirty |= was[2]
            table_map.l1_dirty |= was[3]
            refs.moved = refs.moved or moved
            refs.put_back_pending(gone)
        raise
    with image.meta:
        refs.writing, table_map.writing = set(), set()
        free = refs.settle_pending(gone)
    image._punch(free)


def with_room(image: Qcow2, work: Callable[[], T]) -> T:
    """Do `work`; if there is no room for it, again, once what was let go of is free.

    Other requests may take that room first, and let go of more. So this is repeated. The work
    changes nothing if it fails for want of room."""
    refs = image.refcounts
    for _ in range(TRIES):
        freed = refs.freed
        try:
            return work()
        except OSError as error:
            if error.errno not in FULL:
                raise
            with image.meta:
                waits = bool(refs.pending or refs.leaving)
                if not waits and refs.freed == freed:
                    raise
        if waits:
            image.flush()
    return work()


def _write_durably(image: Qcow2, pieces: list[tuple[int, bytes]]) -> None:
    """Write bytes at offsets of the file, then wait for the barrier."""
    for offset, data in pieces:
        image._write(offset, data)
    image._barrier()
