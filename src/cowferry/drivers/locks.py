"""QEMU's image locks, honoured both ways.

QEMU keeps two processes from opening one image in ways that hurt each other by locks on single
bytes of the file itself. Byte 100+P is held by whoever *uses* permission P, byte 200+P by
whoever does *not let others* use it; both are shared locks, so any number of processes may
hold the same byte. After taking its own bytes, a process asks whether somebody holds the
opposite byte of any permission: uses what I do not share, or does not share what I use.

The locks are open-file-description locks, so they go with the descriptor, whatever else in
this process opens and closes the file.

A loop device or a partition has locks of its own, and none of the file or device on which it lies.
So the other names of the same bytes are asked as well, as far as this process may open them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from cowferry.block import identity
from cowferry.drivers import holders
from cowferry.errors import DeviceInUse

F_OFD_GETLK, F_OFD_SETLK = 36, 37
USED, UNSHARED = 100, 200  # first byte of each row

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
NAMES = {
    CONSISTENT_READ: "consistent read",
    WRITE: "write",
    WRITE_UNCHANGED: "write unchanged",
    RESIZE: "resize",
}

HINT = "nothing was changed. Is a guest using it? (info -U reads it meanwhile)"

_flock = struct.Struct("hhqqi4x")  # struct flock with 64-bit offsets


def _lock(kind: int, start: int, length: int) -> bytes:
    return _flock.pack(kind, os.SEEK_SET, start, length, 0)


class OpenHere(DeviceInUse):
    """This process itself has the image at `path` open."""

    def __init__(self, path: str, desc: str, hint: str) -> None:
        super().__init__(desc, hint)
        self.path = path


class Lock:
    """The bytes that one open file holds. Not thread-safe; used while opening and closing."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.keeps_writers_out = False  # other descriptors that ask for locks cannot write

    @classmethod
    def take(cls, fd: int, name: str, read_only: bool, force_share: bool) -> Lock:
        """Take and check the locks for an image. Raises `DeviceInUse` naming file and reason.

        A file system without such locks (some network ones) gets none, as with QEMU."""
        if force_share:
            used, unshared = [CONSISTENT_READ], []
        elif read_only:
            used, unshared = [CONSISTENT_READ], [WRITE, RESIZE]
        else:
            used, unshared = [CONSISTENT_READ, WRITE, RESIZE], [WRITE, RESIZE]
        if force_share:
            used = []  # reads whatever it finds: nobody has to share anything with it
        mine = cls(fd)
        try:
            for start in [USED + p for p in used] + [UNSHARED + p for p in unshared]:
                try:
                    fcntl.fcntl(fd, F_OFD_SETLK, _lock(fcntl.F_RDLCK, start, 1))
                except (BlockingIOError, PermissionError):  # somebody has it for themselves
                    row = USED if start < UNSHARED else UNSHARED
                    raise _refused(fd, name, row, start - row, "") from None
            for row, wanted, shared in ((UNSHARED, used, ""), (USED, unshared, "shared ")):
                for p in wanted:
                    if _holder(fd, row + p) is not None:
                        raise _refused(fd, name, row, p, shared)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return mine
            raise
        except DeviceInUse:
            mine.drop()
            raise
        try:
            for path in identity.other_names(fd, name) if used else ():
                _check_elsewhere(path, name, used, unshared)
        except DeviceInUse:
            mine.drop()
            raise
        mine.keeps_writers_out = WRITE in unshared
        return mine

    def drop(self) -> None:
        """Let go of every byte."""
        fcntl.fcntl(self.fd, F_OFD_SETLK, _lock(fcntl.F_UNLCK, USED, 200))


def _holder(fd: int, byte: int) -> int | None:
    """The process that has a lock in our way; 0 if the kernel does not say which, None if none."""
    kind, _, _, _, pid = _flock.unpack(fcntl.fcntl(fd, F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte, 1)))
    return None if kind == fcntl.F_UNLCK else max(int(pid), 0)


def _refused(fd: int, name: str, row: int, permission: int, shared: str) -> DeviceInUse:
    pid = _holder(fd, row + permission)
    holder = (
        holders.Holder(pid, holders.command(pid)) if pid else holders.find(fd, row + permission)
    )
    desc = (
        f"'{name}': failed to get {shared}\"{NAMES[permission]}\" lock: "
        f"{holder or 'another process'} has the image open"
    )
    if holder is not None and holder.pid == os.getpid():
        return OpenHere(name, desc, HINT)
    return DeviceInUse(desc, HINT)


def _check_elsewhere(path: str, name: str, used: list[int], unshared: list[int]) -> None:
    """Raise `DeviceInUse` if another process has locked `path`, which holds bytes of the image
    `name`, against what is `used`, or uses what is `unshared`. What this process itself has open is
    the graph's to compare."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it may not be looked at
        return
    try:
        for row, wanted in ((UNSHARED, used), (USED, unshared)):
            for byte in (row + p for p in wanted):
                if _holder(fd, byte) is None:
                    continue
                holder = holders.find(fd, byte)
                if holder is None or holder.pid != os.getpid():
                    raise DeviceInUse(
                        f"'{name}' cannot be opened: {holder or 'another process'} has '{path}' "
                        "open, which holds the same bytes",
                        HINT,
                    )
    except OSError:  # a file system without such locks
        return
    finally:
        os.close(fd)
