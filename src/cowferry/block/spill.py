"""A spill: old bytes of a disk, kept for a while for one who is slower than the guest.

A backup has to save what a guest is about to overwrite. If it wrote that to its target at once, the
guest would wait for the target: seconds, if that is far away. So old bytes go here first: into
memory while there is little, then into a scratch file on local storage, which has no name and is
gone with its last user. The job moves them on at the target's pace.

Nothing here is durable, and need not be: a backup that is interrupted begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
from collections.abc import Iterator

from cowferry.block import sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.node import read_fully

UNIT = 64 << 10  # bytes; what is put, taken and told apart
MEMORY = 64 << 20  # bytes kept in memory before the file is used


class Spill:
    """Old bytes by their offset on the disk, in units. Thread-safe.

    `folder` is where the scratch file is made when it is needed (None: the folder for temporary
    files); `limit` the most bytes that it may hold (0: what the file system has)."""

    def __init__(
        self, size: int, folder: str | None = None, limit: int = 0, memory: int = MEMORY
    ) -> None:
        self.size = size
        self.folder = folder
        self.limit = limit
        self.memory = memory
        self.held = Bitmap("", size, UNIT)  # what is here; guarded by itself
        self.lock = threading.Lock()  # guards the four below
        self._buffers: dict[int, bytes] = {}  # unit's offset -> its bytes
        self._resident = 0  # bytes of those
        self._filed = 0  # bytes in the file
        self._fd = -1

    def put(self, offset: int, data: bytes) -> None:
        """Keep the bytes of one unit. Raises `OSError`, ENOSPC if there is no room."""
        with self.lock:
            if self._resident + len(data) <= self.memory:
                self._buffers[offset] = data
                self._resident += len(data)
                self.held.set(offset, len(data))
                return
            if self.limit and self._filed + len(data) > self.limit:
                raise OSError(errno.ENOSPC, "the scratch file has reached its limit")
            if self._fd < 0:
                self._fd = _unnamed(self.folder)
            self._filed += len(data)
        try:
            sysio.pwrite(self._fd, data, offset)
        except BaseException:
            with self.lock:
                self._filed -= len(data)
            raise
        self.held.set(offset, len(data))

    def runs(self, length: int) -> Iterator[tuple[int, int]]:
        """What is held, as (offset, length), no more than `length` bytes of it."""
        for offset, run in self.held.runs():
            if length <= 0:
                return
            yield offset, min(run, length)
            length -= run

    def take(self, buf: memoryview, offset: int) -> None:
        """Fill `buf` with what is held there; it goes on being held. Raises `OSError`."""
        for at in range(offset, offset + len(buf), UNIT):
            part = buf[at - offset : at - offset + UNIT]
            with self.lock:
                found = self._buffers.get(at)
            if found is not None:
                part[:] = found
            else:
                read_fully(self._fd, part, at)

    def drop(self, offset: int, length: int) -> None:
        """It is not needed any more."""
        self.held.clear(offset, length)
        filed: list[tuple[int, int]] = []
        with self.lock:
            for at in range(offset, offset + length, UNIT):
                found = self._buffers.pop(at, None)
                if found is not None:
                    self._resident -= len(found)
                else:
                    n = min(UNIT, self.size - at)
                    self._filed -= n
                    filed.append((at, n))
        for at, n in filed:
            with contextlib.suppress(OSError):  # then the room comes back at the end
                sysio.fallocate(self._fd, sysio.PUNCH_HOLE | sysio.KEEP_SIZE, at, n)

    @property
    def filed(self) -> int:
        """Bytes in the scratch file."""
        with self.lock:
            return self._filed

    def close(self) -> None:
        """Nobody puts or takes any more."""
        with self.lock:
            self._buffers.clear()
            self._resident = self._filed = 0
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


def _unnamed(folder: str | None) -> int:
    folder = folder or tempfile.gettempdir()
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError:  # not every file system knows it
        fd, path = tempfile.mkstemp(prefix=".cowferry-scratch-", dir=folder)
        os.unlink(path)
        return fd
