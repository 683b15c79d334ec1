"""Making a new QED image: a header, an empty L1 table, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cowferry.block import sysio
from cowferry.drivers import fdsets
from cowferry.drivers.options import check_backing, check_known, number
from cowferry.drivers.plan import Plan
from cowferry.drivers.qed import header as headers
from cowferry.errors import CowferryError

KNOWN = {"cluster_size", "table_size", "backing_file", "backing_fmt"}


def plan(path: str, size: int, options: Mapping[str, Any]) -> Plan:
    """Return how to make an image of `size` bytes, rounded up to 512.

    Raises `CowferryError` naming the option that is wrong."""
    h, name = _header(path, size, options)
    whole = h.l1_offset + h.table_bytes
    return Plan(
        size=h.size,
        needs=whole,
        never_on_device="a QED image grows at the end of its file: use raw or qcow2",
        make=lambda path, _: _make(path, h, name),
    )


def _header(path: str, size: int, options: Mapping[str, Any]) -> tuple[headers.Header, bytes]:
    """The header that the options ask for, and the backing name's bytes.

    Raises `CowferryError` naming the wrong option."""
    check_known(options, KNOWN, "QED")
    check_backing(options)
    cluster = number(options, "cluster_size", 64 << 10)
    if cluster & (cluster - 1) or not headers.MIN_CLUSTER <= cluster <= headers.MAX_CLUSTER:
        raise CowferryError("QED cluster size must be a power of two between 4k and 64M")
    table = number(options, "table_size", 4)
    if table & (table - 1) or not 1 <= table <= headers.MAX_TABLE:
        raise CowferryError("QED table size must be a power of two between 1 and 16 clusters")
    h = headers.Header(cluster_size=cluster, table_size=table)
    h.l1_offset = h.header_bytes
    h.size = -(-size // headers.SECTOR) * headers.SECTOR
    if not 0 <= h.size <= h.max_size:
        raise CowferryError(
            f"'{path}': a QED image with these clusters and tables has {h.max_size} bytes at most, "
            f"not {size}",
            "use larger ones: -o cluster_size=1M,table_size=16",
        )
    if options.get("backing_file"):
        return headers.with_backing(h, str(options["backing_file"]), options.get("backing_fmt"))
    return h, b""


def _make(path: str, h: headers.Header, name: bytes) -> None:
    """Build the image in an empty file. A crash leaves no header, or all of the image."""
    fd = fdsets.open_fd(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        sysio.ftruncate(fd, h.l1_offset + h.table_bytes)
        if name:
            sysio.pwrite(fd, name, h.name_offset)
        sysio.fdatasync(fd)
        sysio.pwrite(fd, h.packed(), 0)
    finally:
        os.close(fd)
