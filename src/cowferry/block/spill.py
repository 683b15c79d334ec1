"""A spill: old bytes of a disk, kept for a while for one who is slower than the guest.

A backup has to save what a guest is about to overwrite. If it wrote that to its target at once, the
guest would wait for the target: seconds, if that is far away. So old bytes go here first: into
memory while there is little, then into a scratch file on local storage, which has no name and is
gone with its last user. When the job comes to a range it reads the disk and lays over it what was
saved here.

Only what is overwritten is saved, not the granule around it: a guest that writes 4 KiB waits for
4 KiB. Nothing here is durable, and need not be: a backup that is interrupted begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
from collections import OrderedDict
from typing import NamedTuple

from cowferry.block import sysio
from cowferry.block.node import clear, read_fully

UNIT = 64 << 10  # bytes; what is dropped together
MEMORY = 128 << 20  # bytes kept in memory before the file is used


class Piece(NamedTuple):
    """Old bytes `offset, length`, inside one unit: here, in the file, or zeroes."""

    offset: int
    length: int
    data: bytearray | None
    filed: bool


class Spill:
    """Old bytes by their offset on the disk. Thread-safe; no byte is put twice before a drop.

    `folder` is where the scratch file is made when it is needed (None: the folder for temporary
    files); `limit` the most bytes that it may hold (0: what the file system has)."""

    def __init__(self, folder: str | None = None, limit: int = 0, memory: int = MEMORY) -> None:
        self.folder = folder
        self.limit = limit
        self.memory = memory
        self.lock = threading.Lock()  # guards all below
        # By the unit's offset, the oldest first. A plain dict finds its first one by passing all
        # that were dropped before it: with a million units a millisecond, each time.
        self._units: OrderedDict[int, list[Piece]] = OrderedDict()
        self._resident = 0  # bytes in memory
        self._filed = 0  # bytes in the file
        self._fd = -1

    def put(self, offset: int, length: int, data: bytearray | None) -> None:
        """Keep bytes of one unit (None: zeroes), which are ours then.

        Raises `OSError`, ENOSPC if there is no room."""
        with self.lock:
            if data is None or self._resident + length <= self.memory:
                self._resident += length if data is not None else 0
                self._add(Piece(offset, length, data, False))
                return
            if self.limit and self._filed + length > self.limit:
                raise OSError(errno.ENOSPC, "the scratch file has reached its limit")
            if self._fd < 0:
                self._fd = _unnamed(self.folder)
        sysio.pwrite(self._fd, data, offset)
        with self.lock:
            self._filed += length
            self._add(Piece(offset, length, None, True))

    def _add(self, piece: Piece) -> None:
        self._units.setdefault(piece.offset // UNIT * UNIT, []).append(piece)

    def pieces(self, offset: int, length: int) -> list[Piece]:
        """What is kept of the units in the range."""
        with self.lock:
            if not self._units:
                return []
            found = (self._units.get(at) for at in range(offset, offset + length, UNIT))
            return [p for pieces in found if pieces is not None for p in pieces]

    def fill(self, buf: memoryview, piece: Piece) -> None:
        """The bytes of one of `pieces`. Raises `OSError`."""
        if piece.filed:
            read_fully(self._fd, buf, piece.offset)
        elif piece.data is None:
            clear(buf)
        else:
            buf[:] = piece.data

    def lay(self, buf: memoryview, offset: int) -> None:
        """Lay what is kept over `buf`, which is what the disk has at `offset`. Raises `OSError`."""
        for p in self.pieces(offset, len(buf)):
            self.fill(buf[p.offset - offset : p.offset - offset + p.length], p)

    def drop(self, offset: int, length: int) -> None:
        """The units of the range are not needed any more."""
        gone: list[Piece] = []
        with self.lock:
            for at in range(offset, offset + length, UNIT):
                gone += self._units.pop(at, ())
            for p in gone:
                self._resident -= p.length if p.data is not None else 0
                self._filed -= p.length if p.filed else 0
        for p in gone:
            if p.filed:
                with contextlib.suppress(OSError):  # then the room comes back at the end
                    sysio.fallocate(
                        self._fd, sysio.PUNCH_HOLE | sysio.KEEP_SIZE, p.offset, p.length
                    )

    @property
    def oldest(self) -> int:
        """The offset of the unit that has been here for longest; -1: nothing is."""
        with self.lock:
            return next(iter(self._units), -1)

    @property
    def roomy(self) -> bool:
        """Whether there is memory for a few units more."""
        return self._resident + 16 * UNIT <= self.memory

    @property
    def filed(self) -> int:
        """Bytes in the scratch file."""
        return self._filed

    def close(self) -> None:
        """Nobody puts or takes any more."""
        with self.lock:
            self._units.clear()
            self._resident = self._filed = 0
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


def beside(image: str) -> str:
    """The folder for scratch files of a disk in `image`: its own, where files can be made there."""
    folder = os.path.dirname(os.path.abspath(image))
    plain = os.path.isfile(image) and not image.startswith(("/dev/", "/proc/"))
    return folder if plain and os.access(folder, os.W_OK | os.X_OK) else tempfile.gettempdir()


def _unnamed(folder: str | None) -> int:
    folder = folder or tempfile.gettempdir()
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError:  # not every file system knows it
        fd, path = tempfile.mkstemp(prefix=".cowferry-scratch-", dir=folder)
        sysio.unlink(path)
        return fd
