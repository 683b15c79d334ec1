"""Every system call that changes an image, in one place.

Two reasons. A recorder can be put in front of all of them (`tests` replay each prefix and
many reorderings of what it recorded, which is how durability is proved rather than hoped
for), and the compiled lane replaces the same few names with their C counterparts.

Calls go through the module (`sysio.pwrite(...)`), never through a name bound at import time.
All take the descriptor first, offsets and lengths in bytes, and raise `OSError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cowferry.block.origin import Origin

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_renameat2 = _libc.renameat2
_renameat2.argtypes = [
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint,
]  # fmt: skip
AT_FDCWD, NOREPLACE = -100, 1

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, UNSHARE_RANGE = 0x01, 0x02, 0x10, 0x40
FICLONERANGE = 0x4020940D
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NOCOW = 0x80086601, 0x40086602, 0x00800000
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_XFLAG_EXTSIZE = 0x801C581F, 0x401C5820, 0x800
FSXATTR = struct.Struct("5I8x")  # flags, extent size, extents, project, extent size for copies

#: errnos by which a file system or a device says that it cannot do such a fallocate. A device that
#: another descriptor holds with O_EXCL answers EBUSY if a page of the range waits to be written.
UNABLE = (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EBUSY)


class Recorder(Protocol):
    """What sees every change: called after the call succeeded, with its arguments."""

    def created(self, path: str) -> None: ...
    def wrote(self, fd: int, offset: int, data: bytes) -> None: ...
    def flushed(self, fd: int, attributes: bool = False) -> None: ...
    def truncated(self, fd: int, size: int) -> None: ...
    def renamed(self, source: str, target: str) -> None: ...
    def unlinked(self, path: str) -> None: ...
    def directory_flushed(self, path: str) -> None: ...
    def attributed(self, fd: int, name: str, value: bytes | None) -> None: ...


recorder: Recorder | None = None

#: By descriptor: a function that hears which bytes `offset, length` of the file may have become a
#: hole. It belongs to the object that remembers where holes are (`block/holes.py`).
remapped: dict[int, Callable[[int, int], None]] = {}


def _remapped(fd: int, offset: int, length: int) -> None:
    hears = remapped.get(fd)
    if hears is not None:
        hears(offset, length)


def create(path: str, flags: int, like: Origin | None = None) -> int:
    """Open the file at `path`, and make it if it is not there. Return the descriptor.

    `flags` say the access, and O_EXCL if the file must be new. A new file has the permissions
    `like` before it has a byte; without `like` it has mode 0644 less the umask. A file that is
    there keeps its permissions. A new name is durable after `flush_directory`."""
    flags |= os.O_CLOEXEC
    fd = os.open(path, flags | os.O_CREAT, 0o644) if like is None else _create(path, flags, like)
    if recorder is not None:
        recorder.created(path)
    return fd


def _create(path: str, flags: int, like: Origin) -> int:
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        try:
            return os.open(path, flags)
        except FileNotFoundError:  # a symbolic link to a file that is not there yet
            return _create(os.path.realpath(path), flags | os.O_EXCL, like)
    for uid, gid in ((like.uid, like.gid), (-1, like.gid)):
        try:
            os.fchown(fd, uid, gid)
            break
        except OSError:  # this process may not give files away, or this file system has no owners
            continue
    else:
        like = like.in_another_group()
    with contextlib.suppress(OSError):  # some file systems have no modes: then it stays as it is
        os.fchmod(fd, like.mode)
    return fd


def pwrite(fd: int, buf: Any, offset: int) -> None:
    """Write all of `buf` at `offset`."""
    view = memoryview(buf)
    done = os.pwrite(fd, view, offset)
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    if recorder is not None:
        recorder.wrote(fd, offset, bytes(view))


def fdatasync(fd: int) -> None:
    """Durable: the data and the size. What a failure means is the file node's business (N6)."""
    os.fdatasync(fd)
    if recorder is not None:
        recorder.flushed(fd)


def fsync(fd: int) -> None:
    """Durable: the data, the size, the extended attributes, and the time of change."""
    os.fsync(fd)
    if recorder is not None:
        recorder.flushed(fd, attributes=True)


def set_attribute(fd: int, name: str, value: bytes | None) -> None:
    """Set an extended attribute, or remove it (None); durable after `fsync`."""
    if value is None:
        os.removexattr(fd, name)
    else:
        os.setxattr(fd, name, value)
    if recorder is not None:
        recorder.attributed(fd, name, value)


def set_nocow(fd: int) -> None:
    """Let writes into an empty file stay in place, on a file system that otherwise copies on write
    (btrfs). No other file system needs it, and one that has no such flag is no error."""
    with contextlib.suppress(OSError):
        (flags,) = struct.unpack("i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4)))
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("i", flags | FS_NOCOW))


def set_extent_size(fd: int, size: int) -> None:
    """Have an empty file grow in steps of `size` bytes on the disk. Raises `OSError` where the file
    system has no such thing."""
    flags, _, extents, project, cow = FSXATTR.unpack(
        fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(FSXATTR.size))
    )
    wanted = FSXATTR.pack(flags | FS_XFLAG_EXTSIZE, size, extents, project, cow)
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, wanted)
    if FSXATTR.unpack(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(FSXATTR.size)))[1] != size:
        raise OSError(errno.EOPNOTSUPP, "the file system has no extent size hints")


def ftruncate(fd: int, size: int) -> None:
    """Set the file's size."""
    os.ftruncate(fd, size)
    _remapped(fd, size, (1 << 63) - 1 - size)
    if recorder is not None:
        recorder.truncated(fd, size)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its flags. Raises EOPNOTSUPP where the file system has no such thing."""
    before = os.fstat(fd).st_size if recorder is not None else 0
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    zeroes = bool(mode & (PUNCH_HOLE | ZERO_RANGE))
    if zeroes:
        _remapped(fd, offset, length)
    if recorder is not None:
        if zeroes:
            recorder.wrote(fd, offset, bytes(length))
        elif (after := os.fstat(fd).st_size) > before:
            recorder.truncated(fd, after)


def take_room(fd: int, offset: int, length: int) -> bool:
    """Have blocks set aside for the bytes, so that a write there finds room. The file may grow.

    Overwriting a block that is shared by reflink needs a new block, so shared blocks are unshared
    where the file system can do that. Return False if it can set no blocks aside. Raises `OSError`
    if there is no room."""
    for mode in (UNSHARE_RANGE, 0):
        try:
            fallocate(fd, mode, offset, length)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
        else:
            return True
    return False


def clone(source: int, source_offset: int, fd: int, offset: int, length: int) -> None:
    """FICLONERANGE. Raises EOPNOTSUPP, EXDEV or EINVAL where it cannot be done."""
    fcntl.ioctl(fd, FICLONERANGE, struct.pack("qQQQ", source, source_offset, length, offset))
    _remapped(fd, offset, length)
    if recorder is not None:
        recorder.wrote(fd, offset, os.pread(source, length, source_offset))


def copy_range(source: int, source_offset: int, fd: int, offset: int, length: int) -> int:
    """copy_file_range; returns the bytes copied, 0 at the end of the source."""
    n = os.copy_file_range(source, fd, length, source_offset, offset)
    _remapped(fd, offset, n)
    if recorder is not None and n:
        recorder.wrote(fd, offset, os.pread(source, n, source_offset))
    return n


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to write these pages; waits for nothing and promises nothing.

    A long copy that does this has little left to do at its final flush."""
    _sync_file_range(fd, offset, length, 2)  # SYNC_FILE_RANGE_WRITE; only a hint: no error matters


def another(fd: int) -> int:
    """A second descriptor of the same file, opened anew; -1 if there is no way to it.

    Whoever waits for dirty pages hears of a write that has failed, and what one descriptor has
    heard its next fdatasync does not tell: so waiting is done by another."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def write_out(fd: int, offset: int, length: int) -> None:
    """Wait until the dirty pages of a range are written. Promises nothing."""
    own = another(fd)
    if own >= 0:
        try:
            _sync_file_range(own, offset, length, 7)  # WAIT_BEFORE, WRITE, WAIT_AFTER
        finally:
            os.close(own)


def let_go(own: int, offset: int, length: int) -> None:
    """Wait until a range is written, and have it leave the page cache. Promises nothing.

    `own` is `another` descriptor than the one that is flushed."""
    _sync_file_range(own, offset, length, 7)
    with contextlib.suppress(OSError):
        os.posix_fadvise(own, offset, length, os.POSIX_FADV_DONTNEED)


def rename(source: str, target: str) -> None:
    """Atomically replace `target`; durable only after `flush_directory`."""
    os.rename(source, target)
    if recorder is not None:
        recorder.renamed(source, target)


def rename_new(source: str, target: str) -> None:
    """`rename`, but raise `FileExistsError` if `target` is there."""
    if _renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), NOREPLACE):
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), source, None, target)
        if os.path.lexists(target):  # the file system cannot do both at once
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(source, target)
    if recorder is not None:
        recorder.renamed(source, target)


def unlink(path: str) -> None:
    """Remove a name; durable only after `flush_directory`."""
    os.unlink(path)
    if recorder is not None:
        recorder.unlinked(path)


def flush_directory(path: str) -> None:
    """Make the names in the folder `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    if recorder is not None:
        recorder.directory_flushed(path)
