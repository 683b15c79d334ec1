"""Making a new QED image: a header, an empty L1 table, and nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

from cowferry.block import sysio
from cowferry.block.origin import Origin
from cowferry.drivers import driver
from cowferry.drivers.options import number
from cowferry.drivers.qed import header as headers
from cowferry.errors import CowferryError, ImageError

KNOWN = {"cluster_size", "table_size", "backing_file", "backing_fmt", "size"}


def plan(path: str, size: int, options: Mapping[str, Any]) -> tuple[headers.Header, bytes]:
    """The header that the options ask for, and the backing name's bytes.

    Raises `CowferryError` naming the wrong option."""
    unknown = set(options) - KNOWN
    if unknown:
        raise CowferryError(f"QED images have no option '{min(unknown)}'")
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


def make(path: str, size: int, options: Mapping[str, Any], like: Origin | None = None) -> None:
    """Create the image at `path`, of `size` bytes (rounded up to 512). Durable on return.

    A crash leaves no header, or all of the image."""
    h, name = plan(path, size, options)
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ImageError(
            f"'{path}' is a device: a QED image grows at the end of its file", "use raw or qcow2"
        )
    driver("file").create(path, h.l1_offset + h.table_bytes, {}, like)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if name:
            sysio.pwrite(fd, name, h.name_offset)
            sysio.fdatasync(fd)
        sysio.pwrite(fd, h.packed(), 0)
        sysio.fdatasync(fd)
    finally:
        os.close(fd)
