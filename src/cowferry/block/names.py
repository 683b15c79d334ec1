"""Names of images: paths, and URIs of exports of NBD servers; and what tells an image from
another one that has its name.

A URI is taken where a person names an image, and in what we record of a move. Inside an image it
is never followed (`drivers/opening.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat

FS_IOC_GETVERSION = 0x80087601
URI = re.compile(r"nbds?(\+[a-z]+)?://")


def is_uri(name: str) -> bool:
    """Whether `name` is a URI, and so no path."""
    return URI.match(name) is not None


def absolute(name: str) -> str:
    """The absolute path, or the URI as it is."""
    return name if is_uri(name) else os.path.abspath(name)


def real(name: str) -> str:
    """The absolute path without symbolic links, or the URI as it is."""
    return name if is_uri(name) else os.path.realpath(name)


def same(a: str, b: str) -> bool:
    """Whether both name one image, however a path is spelled. A file need not be there."""
    try:
        return os.path.samefile(a, b)
    except OSError:  # one is not there, or in a folder that is closed to us, or no path
        return real(a) == real(b)


def version(fd: int) -> int:
    """What tells a file from older ones of the same inode number, which is used again at once; 0
    where a file system has no such thing."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETVERSION, bytes(8))[:4], "little")
    except OSError:
        return 0


def of_device(device: int) -> int:
    """Return a number for a block device, from what it says of itself beyond its name; else 0."""
    folder = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for name in ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial", "loop/backing_file"):
        with contextlib.suppress(OSError), open(f"{folder}/{name}", "rb") as f:
            if text := f.read(4096).strip():
                return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    return 0


def identity(path: str) -> int:
    """What tells it from another file that is put in its place. Raises `OSError`."""
    st = os.stat(path)
    if not stat.S_ISREG(st.st_mode):
        return st.st_ino
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return version(fd) << 64 | st.st_ino
    finally:
        os.close(fd)
