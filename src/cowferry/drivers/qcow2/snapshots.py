"""Internal snapshots: read for `info` and `check`; their clusters are never written in place.

A snapshot's tables share clusters with the active ones by refcount, so leaving them undamaged
needs no code here: a cluster without the COPIED flag is copied on write.
Source: the qcow2 specification, section Snapshots.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cowferry.drivers.qcow2 import header as headers
from cowferry.errors import ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

ENTRY = struct.Struct(">QIHHIIQII")
EXTRA = struct.Struct(">QQ")  # bytes of the machine's state, bytes of the disk: version 3 has both
MAX_EXTRA = 1024
MAX_TABLE = 64 << 20
MAX_L1 = 32 << 20  # bytes


@dataclass
class Snapshot:
    """One entry of the snapshot table; offsets and sizes in bytes."""

    l1_offset: int
    l1_size: int  # entries
    id: str
    name: str
    seconds: int
    nanoseconds: int
    clock: int  # ns of guest time
    vm_state_size: int
    disk_size: int | None = None  # None: not recorded
    icount: int = -1
    raw: bytes = b""  # the fixed part of the entry
    extra: bytes = b""
    names: bytes = b""  # id and name as they lie in the entry

    @property
    def complete(self) -> bool:
        """Whether the entry has all the extra data that version 3 demands."""
        return len(self.extra) >= EXTRA.size

    def info(self) -> dict[str, Any]:
        """QMP: SnapshotInfo."""
        out: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.seconds,
            "date-nsec": self.nanoseconds,
            "vm-clock-sec": self.clock // 1_000_000_000,
            "vm-clock-nsec": self.clock % 1_000_000_000,
        }
        if self.icount >= 0:
            out["icount"] = self.icount
        return out

    def completed(self, disk_size: int) -> bytes:
        """Return the entry as version 3 has it. If it records no size, the disk had `disk_size`."""
        extra = EXTRA.pack(self.vm_state_size, disk_size)[len(self.extra) :]
        extra = self.extra + extra
        fields = list(ENTRY.unpack(self.raw))
        fields[7], fields[8] = 0, len(extra)  # the short field for the state's size is not used
        entry = ENTRY.pack(*fields) + extra + self.names
        return entry + bytes(-len(entry) % 8)


@dataclass
class Table:
    """The snapshot table, as far as it can be read."""

    snapshots: list[Snapshot] = field(default_factory=list)
    size: int = 0  # bytes
    problems: list[str] = field(default_factory=list)  # what is wrong with it; may be many


def read(image: Qcow2) -> list[Snapshot]:
    """Return the snapshots. Raises `ImageError` if their table is damaged."""
    table = scan(image)
    if table.problems:
        raise ImageError(
            f"'{image.filename}': {table.problems[0]}",
            "the file was not changed; cowferry check says more",
        )
    return table.snapshots


def scan(image: Qcow2) -> Table:
    """Read the snapshot table as far as it goes. Raises `OSError`."""
    h, end = image.header, image.file.size
    table = Table()
    at = start = h.snapshots_offset
    if not h.nb_snapshots:
        return table
    if h.nb_snapshots > headers.MAX_SNAPSHOTS:
        table.problems.append(f"too many snapshots ({h.nb_snapshots})")
        return table
    if at & (h.cluster_size - 1) or not at:
        table.problems.append(f"the snapshot table has the invalid offset {at:#x}")
        return table
    for number in range(h.nb_snapshots):
        left = end - at
        sizes = None
        if left >= ENTRY.size:
            fixed = _bytes(image, at, ENTRY.size)
            l1, l1_size, id_size, name_size, sec, nsec, clock, state, extra = ENTRY.unpack(fixed)
            sizes = extra + id_size + name_size
            if extra > MAX_EXTRA:
                table.problems.append(f"snapshot {number} has {extra} bytes of extra data")
                return table
        if sizes is None or left < ENTRY.size + sizes:
            table.problems.append(
                f"the snapshot table runs over the end of the file in entry {number}"
            )
            return table
        rest = _bytes(image, at + ENTRY.size, sizes)
        found = Snapshot(
            l1, l1_size, rest[extra : extra + id_size].decode("utf-8", "replace"),
            rest[extra + id_size :].decode("utf-8", "replace"), sec, nsec, clock, state,
            raw=fixed, extra=rest[:extra], names=rest[extra:],
        )  # fmt: skip
        if extra >= 8:
            found.vm_state_size = struct.unpack_from(">Q", rest)[0]
        if extra >= 16:
            found.disk_size = struct.unpack_from(">Q", rest, 8)[0]
        if extra >= 24:
            found.icount = struct.unpack_from(">q", rest, 16)[0]
        if l1_size * 8 > MAX_L1 or l1 & (h.cluster_size - 1) or l1 >= 1 << 62:
            table.problems.append(
                f"the L1 table of snapshot {number} has the invalid offset {l1:#x}, or is too large"
            )
        else:
            table.snapshots.append(found)
        at = (at + ENTRY.size + sizes + 7) & ~7
        table.size = at - start
        if table.size > MAX_TABLE:
            table.problems.append("the snapshot table is too large")
            return table
    return table


def table_size(image: Qcow2) -> int:
    """Return the bytes of the snapshot table. Raises `OSError`."""
    return scan(image).size


def _bytes(image: Qcow2, offset: int, length: int) -> bytes:
    data = bytearray(length)
    image.file.pread(memoryview(data), offset)
    return bytes(data)
