"""The raw format: the disk's bytes are the file's bytes, or a window of them.

A disk has whole sectors of 512 bytes, so that an overlay of it, a copy in another format, and QEMU
have the same size. A file that ends inside a sector is read as if zeroes followed, and grows when
the guest writes there.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from typing import Any

from cowferry.block import moves
from cowferry.block.node import Extent, Node
from cowferry.drivers import Common, register
from cowferry.drivers.file import File
from cowferry.drivers.plan import Plan
from cowferry.errors import CowferryError, NotSupported

SECTOR = 512  # bytes


def whole_sectors(size: int) -> int:
    """Return `size` bytes, rounded up to whole sectors."""
    return -(-size // SECTOR) * SECTOR


def _is_host_file(node: Node) -> bool:
    """Whether its last sector can be completed: an export or another node's window cannot grow."""
    return node.file is None and not node.remote


@register("raw")
class Raw(Node):
    """Bytes `start .. start + size` of its file. As thread-safe as that."""

    class Options(Common, kw_only=True, rename="kebab"):
        """QMP: BlockdevOptionsRaw. `offset` and `size` in bytes."""

        offset: int = 0
        size: int | None = None

    def __init__(self, file: Node, start: int, size: int | None) -> None:
        self.file: Node = file
        self.start = start
        self.from_start = start == 0
        self.whole = size is None and start == 0
        if size is None:
            size = file.size - start
            if _is_host_file(file):
                size = whole_sectors(size)
        self.size = size
        self.span = None if self.whole else (start, start + self.size)
        self._cleared = 0  # bytes up to which what lies behind the disk has been zeroed
        self.read_only = file.read_only
        self.remote = file.remote

    @classmethod
    def open(cls, options: Raw.Options, children: Mapping[str, Node]) -> Raw:
        """A raw node over `file`, or one that is being filled (`partial.py`).

        Raises `CowferryError` if the window does not fit, or a part of the image is not here."""
        from cowferry.drivers import partial

        if "file" not in children:
            raise CowferryError("A block device must be specified for 'file'")
        file = children["file"]
        end = options.offset + (options.size or 0)
        if options.offset < 0 or (options.size or 0) < 0 or end > file.size:
            raise CowferryError(
                f"'{file.filename}' has {file.size} bytes, and {options.size or 0} bytes at offset "
                f"{options.offset} do not fit",
                "it is too small for the disk, or has been made smaller",
            )
        filling = partial.find(file) if isinstance(file, File) else None
        if filling is None or not isinstance(file, File):
            return cls(file, options.offset, options.size)
        if options.offset or options.size not in (None, filling.contents.size):
            raise NotSupported(
                f"'{file.filename}' is being filled from its backing file, and has no windows",
                "leave out offset and size",
            )
        return partial.Partial(file, filling)

    @classmethod
    def plan(cls, path: str, size: int, options: Mapping[str, Any]) -> Plan:
        """A raw image of whole sectors; with a backing file, to be filled from it."""
        from cowferry.drivers import partial

        return partial.plan(path, whole_sectors(size), options)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The file's own runs."""
        return self.file.extents(self.start + offset, length)

    def served(self, offset: int, length: int) -> Iterator[Extent]:
        """The file's own runs."""
        return self.file.served(self.start + offset, length)

    def pread(self, buf: memoryview, offset: int) -> None:
        self.file.pread(buf, self.start + offset)

    def read_run(self, buf: memoryview, offset: int, extent: Extent) -> None:
        """A run of a file without a descriptor."""
        self.file.read_run(buf, self.start + offset, extent)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self.file.pwrite(buf, self.start + offset, fua)

    def zero(self, offset: int, length: int, unmap: bool = False, fast: bool = False) -> None:
        self.file.zero(self.start + offset, length, unmap, fast)

    def discard(self, offset: int, length: int) -> None:
        self.file.discard(self.start + offset, length)

    def flush(self) -> None:
        self.file.flush()

    def change_size(self, size: int) -> None:
        """See `Node`; a file gets whole sectors."""
        super().change_size(whole_sectors(size) if _is_host_file(self.file) else size)

    def prepare_resize(self, size: int) -> None:
        """Zero what a device holds behind the disk, up to `size`: old bytes of others, perhaps."""
        if not self.whole and size > self.size:
            self._check_window(size)
            self.file.zero(self.start + self.size, size - self.size, unmap=True)
            self.file.flush()
            self._cleared = size

    def resize(self, size: int) -> None:
        """Truncate or extend the file, durably.

        A device becomes no smaller. A disk that is the beginning of a larger device changes its
        size within the device, and the new size is recorded (`moves.resized`). Other windows into a
        file have a fixed size."""
        if self.whole:
            if size < self.size and self.file.is_device:
                raise NotSupported(
                    f"'{self.filename}' is a device of {self.size} bytes, and cannot be made "
                    "smaller",
                    "nothing was changed; make the device itself smaller while nothing has it open",
                )
            self.file.resize(size)
            self.file.flush()  # the caller may rely on the new size
            self.size = size
            return
        if size > max(self.size, self._cleared):
            self.prepare_resize(size)
        self._check_window(size)
        moves.resized(self.filename or self.file.filename, size)
        self.size = size
        self.span = self.start, self.start + size
        self._cleared = 0

    def _check_window(self, size: int) -> None:
        """Raise unless the window may have `size` bytes."""
        if self.start or not self.file.is_device or "file" in self.lent:
            raise NotSupported(
                f"'{self.filename}' is a window into '{self.file.filename}' and has a fixed size",
                "only a disk at the beginning of a device or an export of its own can be resized",
            )
        limit = self.file.refresh_size()
        if size > limit:
            raise OSError(
                errno.ENOSPC, f"{self.filename}: its device has {limit} bytes, not {size}"
            )

    def reopen(self, read_only: bool) -> None:
        """The file's access, and ours."""
        if read_only == self.read_only:
            return
        if read_only:
            self.file.flush()
            if self.keeper is not None:
                self.keeper.rest()
        try:
            self.file.reopen(read_only)  # a node that was lent has no other writer
            self.read_only = read_only
            if not read_only and self.keeper is not None:
                self.keeper.resume()
        except BaseException:
            if not read_only:  # nobody may write: its bitmaps are not kept
                self.file.reopen(True)
                self.read_only = True
            elif self.keeper is not None:
                self.keeper.resume()
            raise

    def close(self) -> None:
        """Flush, and close the file below if it is ours."""
        try:
            if self.keeper is not None:
                self.keeper.rest()
        finally:
            if "file" not in self.lent:
                self.file.close()
            elif not self.read_only:
                self.file.flush()
