"""QED images for tests, and the words in them.

Clusters of 4 KiB and tables of one cluster make everything small: a table has 512 entries.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any, Literal

from chains import contents, make_base
from cowferry.drivers import opening
from cowferry.drivers.qed.image import Qed
from cowferry.drivers.result import Result

CLUSTER = 4096
SPAN = 512 * CLUSTER  # bytes of the disk in one L2 table
SIZE = 1 << 20
L1, FIRST = CLUSTER, 2 * CLUSTER  # host offsets of the L1 table and of the first regular cluster

FIELDS = {
    "magic": (0, "<I"), "cluster_size": (4, "<I"), "table_size": (8, "<I"),
    "header_size": (12, "<I"), "features": (16, "<Q"), "compat": (24, "<Q"),
    "autoclear": (32, "<Q"), "l1_offset": (40, "<Q"), "size": (48, "<Q"),
    "name_offset": (56, "<I"), "name_length": (60, "<I"),
}  # fmt: skip


def make(folder: Path, name: str = "vm.qed", size: int = SIZE, **options: Any) -> Path:
    path = folder / name
    given = {"cluster_size": CLUSTER, "table_size": 1, **options}
    opening.create_image(str(path), "qed", size, given)
    return path


def over_base(folder: Path, size: int = SIZE, **options: Any) -> tuple[Path, bytearray]:
    """An overlay on `base.raw`, and what it reads as."""
    oracle = make_base(folder, size)
    return make(folder, size=size, backing_file="base.raw", backing_fmt="raw", **options), oracle


def opened(path: Path, **how: Any) -> Qed:
    node = opening.open_image(str(path), "qed", **how)
    assert isinstance(node, Qed)
    return node


def put(image: Qed, oracle: bytearray, offset: int, data: bytes) -> None:
    image.pwrite(memoryview(data), offset)
    oracle[offset : offset + len(data)] = data


def field(path: Path, name: str, value: int | None = None) -> int:
    """A field of the header; set, if a value is given."""
    offset, code = FIELDS[name]
    with open(path, "r+b") as f:
        if value is not None:
            f.seek(offset)
            f.write(struct.pack(code, value))
        f.seek(offset)
        found: int = struct.unpack(code, f.read(struct.calcsize(code)))[0]
    return found


def entry(path: Path, at: int, value: int | None = None) -> int:
    """The table entry at a host offset; set, if a value is given."""
    with open(path, "r+b") as f:
        if value is not None:
            f.seek(at)
            f.write(struct.pack("<Q", value))
        f.seek(at)
        found: int = struct.unpack("<Q", f.read(8))[0]
    return found


def written(path: Path, clusters: int = 4) -> tuple[bytearray, int]:
    """Write the first clusters; what the disk reads as now, and where its L2 table lies."""
    image = opened(path)
    oracle = contents(image)
    put(image, oracle, 0, random.Random(1).randbytes(clusters * CLUSTER))
    opening.close_chain(image)
    return oracle, entry(path, L1)


def check(path: Path, fix: Literal["leaks", "all"] | None = None) -> Result:
    """As `cowferry check` does it."""
    image = opened(path, read_only=fix is None, repair=fix is not None, backing=False)
    try:
        return image.check(fix)
    finally:
        image.close()
