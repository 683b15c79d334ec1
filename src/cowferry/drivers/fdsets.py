"""Descriptors that somebody else opened: `/dev/fdset/N` names a set of them.

A daemon without the right to open or create a file is handed a descriptor over its monitor socket
(SCM_RIGHTS) with `add-fd`, and is then told to open `/dev/fdset/N`. A set may hold several
descriptors of one file, for reading and for writing; the one with the right access is duplicated.

A process has one table of descriptors, so there is one registry. Thread-safe.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

from cowferry.errors import CowferryError

PREFIX = "/dev/fdset/"
BLKROGET = 0x125E


class Passed(NamedTuple):
    """One descriptor of a set."""

    fd: int
    opaque: str | None


_lock = threading.Lock()  # guards the two tables
_sets: dict[int, list[Passed]] = {}
_named: dict[str, int] = {}  # getfd

#: The descriptors that came with the command being run, in order.
received: ContextVar[list[int] | None] = ContextVar("received", default=None)


@contextlib.contextmanager
def given(fds: list[int]) -> Iterator[None]:
    """While a command runs it may take these, from the front."""
    token = received.set(fds)
    try:
        yield
    finally:
        received.reset(token)


def take() -> int:
    """The next descriptor that came with the command. Raises `CowferryError`.

    Anything but a regular file or a block device is refused, and closed."""
    fds = received.get()
    if not fds:
        raise CowferryError("No file descriptor supplied via SCM_RIGHTS")
    fd = fds.pop(0)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise CowferryError(
            "the descriptor is neither a regular file nor a block device", "pass an open image file"
        )
    return fd


def add(fd: int, number: int | None = None, opaque: str | None = None) -> int:
    """Put a descriptor into a set, a new one unless `number` is given; returns its number."""
    with _lock:
        if number is None:
            number = next(n for n in range(len(_sets) + 1) if n not in _sets)
        _sets.setdefault(number, []).append(Passed(fd, opaque))
        return number


def remove(number: int, fd: int | None = None) -> None:
    """Close a set, or one descriptor of it. Raises `CowferryError`."""
    with _lock:
        members = _sets.get(number, [])
        gone = [p for p in members if fd is None or p.fd == fd]
        if not gone:
            what = f"fdset-id:{number}" + (f", fd:{fd}" if fd is not None else "")
            raise CowferryError(f"File descriptor named '{what}' not found")
        left = [p for p in members if p not in gone]
        if left:
            _sets[number] = left
        else:
            del _sets[number]
    for p in gone:
        os.close(p.fd)


def all_sets() -> dict[int, list[Passed]]:
    """Every set, by number."""
    with _lock:
        return {n: list(members) for n, members in _sets.items()}


def name(text: str, fd: int) -> None:
    """Keep a descriptor under a name, in the place of an older one."""
    with _lock:
        old = _named.pop(text, None)
        _named[text] = fd
    if old is not None:
        os.close(old)


def unname(text: str) -> None:
    """Close it. Raises `CowferryError`."""
    with _lock:
        fd = _named.pop(text, None)
    if fd is None:
        raise CowferryError(f"File descriptor named '{text}' not found")
    os.close(fd)


def path_of(filename: str) -> str:
    """What a person calls the file behind `/dev/fdset/N`; other names as they are."""
    if filename.startswith(PREFIX):
        with contextlib.suppress(OSError, ValueError, LookupError):
            with _lock:
                fd = _sets[int(filename[len(PREFIX) :])][0].fd
            return os.readlink(f"/proc/self/fd/{fd}")
    return filename


def open_fd(filename: str, flags: int) -> int:
    """`os.open`, and for `/dev/fdset/N` a duplicate of the member with that access.

    Raises `OSError`: ENOENT without such a set, EACCES without that access, EROFS for a read-only
    device, which root may open for writing, and which then refuses each write."""
    if not filename.startswith(PREFIX):
        fd = os.open(filename, flags)
        if flags & os.O_ACCMODE != os.O_RDONLY and _is_read_only_device(fd):
            os.close(fd)
            raise OSError(errno.EROFS, "the device is read-only", filename)
        return fd
    wanted = flags & os.O_ACCMODE
    with _lock:
        members = list(_sets.get(_number(filename), []))
        if not members:
            raise FileNotFoundError(2, "No such fdset", filename)
        for p in members:
            if fcntl.fcntl(p.fd, fcntl.F_GETFL) & os.O_ACCMODE == wanted:
                return fcntl.fcntl(p.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        for p in members:  # more access than is wanted will do
            if fcntl.fcntl(p.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                return fcntl.fcntl(p.fd, fcntl.F_DUPFD_CLOEXEC, 0)
    raise PermissionError(13, "no descriptor of the set has that access", filename)


def _is_read_only_device(fd: int) -> bool:
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return False
    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(fd, BLKROGET, bytes(4))
        return int.from_bytes(answer, sys.byteorder) != 0
    return False


def _number(filename: str) -> int:
    text = filename[len(PREFIX) :]
    return int(text) if text.isdigit() else -1
