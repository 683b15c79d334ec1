"""Internal snapshots: read for `info` and `check`; their clusters are never written in place.

A snapshot's tables share clusters with the active ones by refcount, so leaving them
undamaged needs no code here: a cluster without the COPIED flag is copied on write.
Source: the qcow2 specification, section Snapshots.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cowferry.errors import ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

ENTRY = struct.Struct(">QIHHIIQII")
MAX_EXTRA = 1024
MAX_TABLE = 64 << 20


@dataclass
class Snapshot:
    """One entry of the snapshot table; offsets in bytes."""

    l1_offset: int
    l1_size: int  # entries
    id: str
    name: str
    seconds: int
    nanoseconds: int
    clock: int  # ns of guest time
    vm_state_size: int
    icount: int = -1

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


def read(image: Qcow2) -> list[Snapshot]:
    """The snapshot table. Raises `ImageError` if it is damaged."""
    h = image.header
    out: list[Snapshot] = []
    at = start = h.snapshots_offset
    for number in range(h.nb_snapshots):
        fixed = _bytes(image, at, ENTRY.size)
        l1, l1_size, id_size, name_size, sec, nsec, clock, state, extra = ENTRY.unpack(fixed)
        if extra > MAX_EXTRA:
            raise ImageError(f"'{image.filename}': snapshot {number} has too much extra data")
        rest = _bytes(image, at + ENTRY.size, extra + id_size + name_size)
        vm_state, icount = state, -1
        if extra >= 8:
            vm_state = struct.unpack_from(">Q", rest)[0]
        if extra >= 24:
            icount = struct.unpack_from(">q", rest, 16)[0]
        if l1_size * 8 > 32 << 20 or l1 % h.cluster_size:
            raise ImageError(f"'{image.filename}': snapshot {number} has an invalid L1 table")
        ident = rest[extra : extra + id_size].decode("utf-8", "replace")
        name = rest[extra + id_size :].decode("utf-8", "replace")
        out.append(Snapshot(l1, l1_size, ident, name, sec, nsec, clock, vm_state, icount))
        at += ENTRY.size + extra + id_size + name_size
        at = (at + 7) & ~7
        if at - start > MAX_TABLE:
            raise ImageError(f"'{image.filename}': the snapshot table is too large")
    return out


def table_size(image: Qcow2) -> int:
    """Bytes of the snapshot table."""
    h = image.header
    at = h.snapshots_offset
    for _ in range(h.nb_snapshots):
        fixed = ENTRY.unpack(_bytes(image, at, ENTRY.size))
        at = (at + ENTRY.size + fixed[8] + fixed[2] + fixed[3] + 7) & ~7
    return at - h.snapshots_offset


def _bytes(image: Qcow2, offset: int, length: int) -> bytes:
    if offset + length > image.file.size:
        raise ImageError(
            f"'{image.filename}': the snapshot table runs over the end of the file",
            "the image is truncated or damaged; restore it from a backup",
        )
    data = bytearray(length)
    image.file.pread(memoryview(data), offset)
    return bytes(data)
