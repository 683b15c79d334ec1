"""The file driver: bytes of a host file or block device. The example to copy for a new driver.

What every driver has, in the order in which you will want to write it:

1. a module in this folder, named in `drivers.MODULES`, with one `Node` subclass that is
   decorated by `@register` with the names by which QMP and `-f` know it;
2. a nested `Options` struct: what `blockdev-add` takes. The command line, the schema and the
   checks come from its typed fields;
3. `open(options, children)`: children are opened nodes; never open another node yourself;
4. `extents`: the more it says (states, descriptors, what is writable) the less the lane and
   the jobs have to ask;
5. `pread`/`pwrite`/`zero`/`discard`/`flush`, raising `OSError`;
6. `plan`, if there is something to create (`drivers/plan.py`).

One duty is this driver's alone: its flush is the one that counts. A failed fdatasync is *sticky*
(N6) until the file is opened again, and flushes that arrive together are one system call
(`block/barrier.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from cowferry.block import identity, scope, sysio
from cowferry.block.barrier import Barrier
from cowferry.block.holes import Holes
from cowferry.block.identity import Place
from cowferry.block.node import ZEROES, Extent, Node, State, read_fully
from cowferry.drivers import Common, fdsets, register
from cowferry.drivers.locks import Lock
from cowferry.drivers.options import check_known, flag, number, word
from cowferry.drivers.plan import Plan, is_device
from cowferry.errors import CowferryError, DeviceInUse, ImageError, NotSupported

CREATION = frozenset({"preallocation", "nocow", "extent_size_hint"})
_handed_over: weakref.WeakSet[File] = weakref.WeakSet()  # nodes over descriptors of fdsets


@register("file", "host_device")
class File(Node):
    """A host file or block device. Thread-safe."""

    unmaps = True  # room is given back
    direct = no_flush = False  # cache options

    class Options(Common, kw_only=True, rename="kebab"):
        """QMP: BlockdevOptionsFile."""

        filename: str
        locking: Literal["auto", "on", "off"] = "auto"
        aio: str = "threads"

    def __init__(self, fd: int, filename: str, read_only: bool, lock: Lock | None) -> None:
        self.fd = fd
        # As one would open it again: by the set it came from, or by this very descriptor.
        passed = filename.startswith(fdsets.PREFIX)
        self.opened_as = filename if passed else f"/proc/self/fd/{fd}"
        self.filename = fdsets.path_of(filename)
        self.read_only = read_only
        self.lock = lock
        self.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._places: list[Place] | None = None
        self._growing = threading.Lock()  # guards `size` when it grows by itself
        self._barrier = Barrier(fd)
        self._holes = Holes(fd, self._stable())
        sysio.remapped[fd] = self._holes.forget
        self._closed = False

    @classmethod
    def open(cls, options: File.Options, children: Mapping[str, Node]) -> File:
        """Open and lock. Raises `OSError`, or `ImageError` if another process holds it."""
        if options.aio != "threads":
            raise NotSupported(
                f"aio={options.aio} is not supported: files are read and written by threads",
                "leave the option out, or say aio=threads",
            )
        read_only = options.read_only
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = fdsets.open_fd(options.filename, flags | (os.O_RDONLY if read_only else os.O_RDWR))
        except OSError as error:
            denied = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
            if not (options.auto_read_only and denied and not read_only):
                raise
            fd, read_only = fdsets.open_fd(options.filename, flags | os.O_RDONLY), True
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise ImageError(
                    f"'{options.filename}' is neither a regular file nor a block device"
                )
            lock = None
            if options.locking != "off":
                lock = Lock.take(fd, options.filename, read_only, options.force_share)
            node = cls(fd, options.filename, read_only, lock)
            node.unmaps = options.discard in ("unmap", "on")
            if options.cache is not None:
                node.direct, node.no_flush = options.cache.direct, options.cache.no_flush
            node.shares = options.force_share or options.locking == "off"
            if lock is not None and options.filename.startswith(fdsets.PREFIX):
                node._alone()
                node.shares = node.shares or read_only  # duplicates of one descriptor share locks
            return node
        except BaseException:
            sysio.remapped.pop(fd, None)
            os.close(fd)
            raise

    @classmethod
    def plan(cls, path: str, size: int, options: Mapping[str, Any]) -> Plan:
        """A file of `size` bytes, all zero; or a device, whose bytes stay as they are.

        The options are `preallocation` (off, falloc, or full, which also fills a device with
        zeroes), `nocow` and `extent_size_hint`."""
        check_known(options, CREATION, "raw")
        how = word(options, "preallocation", "off", "falloc", "full")
        nocow = flag(options, "nocow")
        hint = number(options, "extent_size_hint", 0)
        if not 0 <= hint < 1 << 32:
            raise CowferryError(f"Parameter 'extent_size_hint' cannot be {hint}")
        if not 0 <= size < 1 << 63:
            raise CowferryError(f"'{path}': an image cannot have {size} bytes")

        def make(path: str, _: str | None) -> None:
            fd = fdsets.open_fd(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if not is_device(fd):
                    if nocow:
                        sysio.set_nocow(fd)
                    if hint:
                        sysio.set_extent_size(fd, hint)
                    sysio.ftruncate(fd, size)
                if how != "off" and size:
                    _fill(fd, size, how == "full")
            finally:
                os.close(fd)

        return Plan(
            size=size,
            needs=size,
            takes=size if how != "off" else 0,
            zero_on_device=how == "full",
            never_on_device="nocow and extent_size_hint are options for regular files only"
            if nocow or hint
            else "",
            make=make,
        )

    def _alone(self) -> None:
        """Duplicates of one descriptor share its locks, so these have to be told apart by us."""
        for other in _handed_over:
            if (
                not (other._closed or other.read_only or self.read_only)
                and other.lock is not None
                and os.path.sameopenfile(other.fd, self.fd)
            ):
                raise DeviceInUse(
                    f"'{self.filename}' was handed over and is open for writing already",
                    "a second writer would damage it",
                )
        _handed_over.add(self)

    def places(self) -> list[Place]:
        """Where its bytes lie: as long as it is open that cannot change."""
        if self._places is None:
            self._places = identity.of_fd(self.fd, self.filename)
        return self._places

    def _stable(self) -> bool:
        """Whether nothing can write into the file while we have it open.

        A duplicate of a descriptor that was handed over shares its locks with the others."""
        passed = self.opened_as.startswith(fdsets.PREFIX)
        return (
            self.read_only and not passed and self.lock is not None and self.lock.keeps_writers_out
        )

    # Data ---------------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data and holes as the file system tells them; a hole is ZERO, and writable in place."""
        writable = not self.read_only
        if self.is_device:
            yield Extent(length, State.DATA, self.fd, offset, writable)
            return
        for run, hole in self._holes.runs(offset, length):
            yield Extent(run, State.ZERO if hole else State.DATA, self.fd, offset, writable)
            offset += run

    def served(self, offset: int, length: int) -> Iterator[Extent]:
        """As `extents`; but in a file that may be written nobody asks for holes, time and again."""
        if self._holes.stable:
            return self.extents(offset, length)
        return iter((Extent(length, State.DATA, self.fd, offset, not self.read_only),))

    def pread(self, buf: memoryview, offset: int) -> None:
        """Bytes past the end of the file are zeroes."""
        read_fully(self.fd, buf, offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write; a regular file grows as needed."""
        sysio.pwrite(self.fd, buf, offset)
        self._reaches(offset + len(buf))
        if fua:
            self.flush()

    def _reaches(self, end: int) -> None:
        if end > self.size and not self.is_device:
            with self._growing:  # or of two who write behind its end the nearer one would tell
                self.size = max(self.size, end)

    def zero(self, offset: int, length: int, unmap: bool = False, fast: bool = False) -> None:
        """By a hole, else by the file system's own zeroing, else (unless `fast`) by writing."""
        hole = sysio.PUNCH_HOLE | sysio.KEEP_SIZE
        modes = [sysio.ZERO_RANGE]
        if self.unmaps:
            modes = [hole, *modes] if unmap else [*modes, hole]
        for mode in modes:
            if mode & sysio.PUNCH_HOLE and offset + length > self.size:
                continue  # punching does not grow the file
            try:
                sysio.fallocate(self.fd, mode, offset, length)
            except OSError as error:
                if error.errno not in sysio.UNABLE:
                    raise
            else:
                self._reaches(offset + length)
                return
        if fast:
            raise OSError(errno.EOPNOTSUPP, f"{self.filename}: no fast way to write zeroes")
        while length:
            n = min(length, len(ZEROES))
            self.pwrite(memoryview(ZEROES)[:n], offset)
            offset, length = offset + n, length - n

    def discard(self, offset: int, length: int) -> None:
        """Give the room back where the file system can; else leave the bytes."""
        self.punch(offset, length)

    def punch(self, offset: int, length: int) -> None:
        """A hole, if the file system can; no error if it cannot."""
        if not self.unmaps:
            return
        try:
            sysio.fallocate(self.fd, sysio.PUNCH_HOLE | sysio.KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in sysio.UNABLE:
                raise

    def take_room(self, offset: int, length: int) -> None:
        """Have blocks set aside for the bytes `offset, length`, so that a later write there does
        not fail for lack of room.

        The bytes stay as they are. Those beyond the end of the file are zeroes, and the file grows
        over them. A device has its room already. A file system that cannot set blocks aside
        promises nothing, except for bytes beyond the end of the file, which are written.

        Raises `OSError` if there is no room: ENOSPC, EDQUOT, or EFBIG because of RLIMIT_FSIZE.
        Then no byte has changed, but the file may have grown."""
        end = offset + length
        if self.is_device:
            if end > self.size and end > self.refresh_size():
                raise OSError(
                    errno.ENOSPC, f"{self.filename}: the device has only {self.size} bytes"
                )
            return
        if length and sysio.take_room(self.fd, offset, length):
            self._reaches(end)
            return
        # Bytes that a job has written by itself may lie beyond `size`.
        for at in range(max(offset, self.refresh_size()), end, len(ZEROES)):
            self.pwrite(memoryview(ZEROES)[: min(len(ZEROES), end - at)], at)

    def refresh_size(self) -> int:
        """Look at the size of the file or device again. Keep and return it, in bytes.

        A device may have grown (lvextend, losetup -c) since it was opened."""
        with self._growing:
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            return self.size

    def flush(self) -> None:
        """One fdatasync for all flushes that wait together. Fails for good once it failed (N6).

        With the cache option direct the kernel forgets the bytes that it has, after that."""
        if self.no_flush:
            return
        try:
            self._barrier.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.filename}: a flush has failed ({error.strerror}); "
                "no later one counts until the file is opened again",
            ) from None
        if self.direct:
            with suppress(OSError):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def resize(self, size: int) -> None:
        """Truncate or extend; a device keeps its size."""
        if self.is_device:
            if size > self.refresh_size():
                raise OSError(
                    errno.ENOSPC, f"{self.filename}: the device has {self.size} bytes, not {size}"
                )
            return
        sysio.ftruncate(self.fd, size)
        self.size = size

    def reopen(self, read_only: bool) -> None:
        """Change access and locks under the same descriptor number, so that leases stay right."""
        if read_only == self.read_only:
            return
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        fresh = self._again(flags)
        try:
            if self.lock is not None:
                self.lock.drop()
            lock = self.lock and Lock.take(fresh, self.filename, read_only, False)
            os.dup2(fresh, self.fd, inheritable=False)
        except BaseException:
            if self.lock is not None:
                self.lock = Lock.take(self.fd, self.filename, self.read_only, False)
            raise
        finally:
            os.close(fresh)
        if lock is not None:
            lock.fd = self.fd
            self.lock = lock
        self.read_only = read_only
        self._holes.reset(self._stable())

    def _again(self, flags: int) -> int:
        """Another descriptor of the file, with that access.

        One that was handed over outlives its set: the set may be gone, and its number may be
        another file's by now. Raises `OSError`."""
        if self.opened_as.startswith(fdsets.PREFIX):
            ours = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
            if ours in (flags & os.O_ACCMODE, os.O_RDWR):
                return fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        fresh = fdsets.open_fd(self.opened_as, flags)
        if not os.path.sameopenfile(fresh, self.fd):
            os.close(fresh)
            raise PermissionError(
                errno.EACCES, "it was handed over read-only, and its set holds another file now"
            )
        return fresh

    def close(self) -> None:
        """Let the file and its locks go. Does not flush: the format above did."""
        if not self._closed:
            self._closed = True
            if self.lock is not None:
                self.lock.drop()  # a descriptor that was handed over is still open in its set
            # Whoever comes too late is refused: the number may be another file's a moment later.
            self._barrier.close()
            fd, self.fd = self.fd, -1
            sysio.remapped.pop(fd, None)
            os.close(fd)


def _fill(fd: int, size: int, write: bool) -> None:
    """Give all bytes of a new file their room, and with `write` zeroes; on a device zeroes only."""
    if is_device(fd):
        if not write:
            return  # a device has its room
        try:
            sysio.fallocate(fd, sysio.ZERO_RANGE, 0, size)
            return
        except OSError as error:
            if error.errno not in sysio.UNABLE:
                raise
    else:
        sysio.fallocate(fd, 0, 0, size)
    for at in range(0, size if write else 0, len(ZEROES)):
        scope.check()
        sysio.pwrite(fd, ZEROES[: min(len(ZEROES), size - at)], at)
