"""Dirty bitmaps: which granules of a disk were written since somebody began to ask.

A set bit says "perhaps changed", a clear one "certainly not". One byte of Python per bit
would be a gigabyte for a large disk; `bitarray` packs them, little-endian like qcow2's own.

Bitmaps that have a name for users belong to a node (`Node.bitmaps`), as in QEMU: a snapshot leaves
them with the image whose changes they tell. Those of jobs belong to a disk (`Disk.bitmaps`). What
makes the persistent ones outlive a crash is a *keeper* (`block/keeper.py`), not this class.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from bitarray import bitarray

log = logging.getLogger(__name__)

MOST_TOLD = 20  # bitmaps that are told of when an image is opened
MOST_BITS = 1 << 28  # of a bitmap that follows a guest: 32 MiB
MAX_BYTES = 512 << 20  # of memory for the bits of one bitmap
PIECE = 1 << 18  # bits that are merged at once


def finest(size: int) -> int:
    """Bytes in which what a guest writes to a disk of `size` bytes is told apart: few, for that is
    saved or copied again; more where the bitmap would be too large."""
    granularity = 4096
    while size // granularity > MOST_BITS:
        granularity *= 2
    return granularity


class Bitmap:
    """Bits over `size` bytes at `granularity` bytes each (a power of two). Thread-safe."""

    def __init__(
        self, name: str, size: int, granularity: int = 64 << 10, *, persistent: bool = False
    ) -> None:
        self.name = name
        self.persistent = persistent  # its node's keeper makes it durable
        self.inconsistent = False  # nobody kept it for a while: it can be removed, nothing else
        self.reason = ""  # why it is inconsistent, in words that follow "it is: "
        self.guarded = False  # its keeper marks regions before a write, recorded or not
        self.busy = ""  # who uses it now and must not be disturbed; "" nobody
        # The backup (`block/lineage.py`) since which it tells every change; b"" if none is known.
        self.since = b""
        self.granularity = granularity
        self.recording = True  # written only inside a drain of the disk
        self.written = 0  # bytes marked in all, recorded or not; near enough for a rate
        self.lock = threading.Lock()  # guards bits and size
        self.size = size
        self.bits = bitarray(-(-size // granularity), endian="little")
        self.bits.setall(False)
        self.ones = 0  # kept, because counting a large bitmap takes long

    def mark(self, offset: int, length: int) -> None:
        """The bytes are about to change."""
        self.written += length
        if self.recording:
            first, bits = offset // self.granularity, self.bits
            inside = offset + length <= (first + 1) * self.granularity and first < len(bits)
            if not (inside and bits[first]):  # most often it is set, and nothing is to be done
                self.set(offset, length)

    def set(self, offset: int, length: int) -> None:
        """Set the bits of a range, whether or not writes are being recorded."""
        if length:
            first, stop = offset // self.granularity, -(-(offset + length) // self.granularity)
            with self.lock:
                stop = min(stop, len(self.bits))
                if first < stop:
                    self.ones += stop - first - self.bits.count(1, first, stop)
                    self.bits[first:stop] = True

    def clear(self, offset: int, length: int) -> None:
        """Forget the granules that lie wholly inside the range."""
        with self.lock:
            first, stop = -(-offset // self.granularity), (offset + length) // self.granularity
            if offset + length >= self.size:
                stop = len(self.bits)
            if first < stop:
                self.ones -= self.bits.count(1, first, stop)
                self.bits[first:stop] = False

    def join(self, one: Bitmap, other: Bitmap) -> None:
        """Set what is set in both of two bitmaps of the same shape. Under a drain."""
        with self.lock:
            self.bits |= one.bits & other.bits
            self.ones = self.bits.count()

    def merge(self, other: Bitmap) -> None:
        """Set what is set in `other`, of whatever granularity, too."""
        with other.lock:
            bits, granularity = other.bits.copy(), other.granularity
        # In pieces that stay in the processor's cache, and of them only those with a bit.
        span = max(min(granularity, self.granularity) * PIECE, granularity, self.granularity)
        with self.lock:
            for first in range(0, len(bits), span // granularity):
                piece = bits[first : first + span // granularity]
                if not piece.any():
                    continue
                if granularity < self.granularity:
                    piece = folded(piece, self.granularity // granularity)
                else:
                    piece = spread(piece, granularity // self.granularity)
                at = first * granularity // self.granularity
                stop = min(at + len(piece), len(self.bits))
                if at < stop:
                    self.bits[at:stop] |= piece[: stop - at]
            self.ones = self.bits.count()

    def copy(self, name: str = "") -> Bitmap:
        """The same bits at this moment, kept by nobody."""
        with self.lock:
            other = Bitmap(name or self.name, self.size, self.granularity)
            other.since = self.since
            other.bits, other.ones = self.bits.copy(), self.ones
        return other

    def replace(self, bits: bitarray) -> None:
        """These bits instead: as many, of the same granularity."""
        with self.lock:
            assert len(bits) == len(self.bits)
            self.bits, self.ones = bits.copy(), bits.count()

    def any(self, offset: int, length: int) -> bool:
        """Whether a bit of the range is set."""
        with self.lock:
            stop = -(-(offset + length) // self.granularity)
            return self.bits.find(1, offset // self.granularity, stop) >= 0

    def count(self) -> int:
        """Dirty bytes, rounded up to granules."""
        with self.lock:
            return self.ones * self.granularity

    def inside(self) -> int:
        """Dirty bytes of the disk: fewer than `count` says, if its last granule is short."""
        with self.lock:
            excess = len(self.bits) * self.granularity - self.size
            last = bool(self.bits) and self.bits[-1]
            return self.ones * self.granularity - excess * last

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of each dirty run, as it is when the run is reached."""
        at = offset // self.granularity
        stop = len(self.bits)
        if length is not None:
            stop = min(stop, -(-(offset + length) // self.granularity))
        while at < stop:
            with self.lock:
                first = self.bits.find(1, at, stop)
                if first < 0:
                    return
                end = self.bits.find(0, first, stop)
            end = stop if end < 0 else end
            start = first * self.granularity
            yield start, min(end * self.granularity, self.size) - start
            at = end

    def info(self) -> dict[str, Any]:
        """QMP: BlockDirtyInfo. Those of jobs have no name."""
        out: dict[str, Any] = {"name": self.name} if self.name else {}
        out |= {
            "count": self.count(),
            "granularity": self.granularity,
            "recording": self.recording and not self.inconsistent,
            "busy": bool(self.busy) or not self.name,
            "persistent": self.persistent,
        }
        return {**out, "inconsistent": True} if self.inconsistent else out

    def fits(self, size: int) -> bool:
        """Whether there is memory for the bits of a disk of `size` bytes."""
        return size // self.granularity // 8 <= MAX_BYTES

    def resize(self, size: int) -> None:
        """The disk has another size now; new bytes count as clean. Inside a drain."""
        with self.lock:
            want = -(-size // self.granularity)
            have = len(self.bits)
            if want < have:
                del self.bits[want:]
            else:
                self.bits.extend(bitarray(want - have, endian="little"))
                self.bits[have:] = False
            self.ones = self.bits.count()
            self.size = size


# A drain waits for these on large disks: eight bits at a time is thirty times as fast as two.


def folded(bits: bitarray, factor: int) -> bitarray:
    """One bit for each `factor` (a power of two): whether any of them is set."""
    while factor >= 8:
        data, bits = bits.tobytes(), bitarray(endian="little")
        bits.pack(data)
        factor //= 8
    while factor > 1:
        if len(bits) % 2:
            bits = bits + bitarray("0")
        bits = bits[::2] | bits[1::2]
        factor //= 2
    return bits


def spread(bits: bitarray, factor: int) -> bitarray:
    """`factor` bits (a power of two) for each."""
    power = factor.bit_length() - 1
    for _ in range(power % 3):
        finer = bitarray(2 * len(bits), endian="little")
        finer[::2] = finer[1::2] = bits
        bits = finer
    for _ in range(power // 3):
        data, bits = bits.unpack(one=b"\xff"), bitarray(endian="little")
        bits.frombytes(data)
    return bits


def tell_of_bad(bitmaps: Iterable[Bitmap], filename: str) -> None:
    """Log which bitmaps of an image cannot be used, and why; of thousands only how many there are
    beside the first."""
    bad = [bitmap for bitmap in bitmaps if bitmap.inconsistent]
    for bitmap in bad[:MOST_TOLD]:
        log.warning("'%s': bitmap '%s' is inconsistent: %s", filename, bitmap.name, bitmap.reason)
    if len(bad) > MOST_TOLD:
        log.warning("'%s': and so are %d more", filename, len(bad) - MOST_TOLD)
