"""The permissions of a file that is made from an image, or beside it.

An image of mode 0600 holds what other users must not read. Its overlays, copies, backups, bitmap
files and records hold parts of the same bytes, or tell about them. So each new file gets the
permissions of the image that it is made from: the *origin*. They are never wider than the origin's,
except that the owner of the new file may always read and write it. The new file gets the owner and
the group of the origin where this process may give them.

`sysio.create` applies them while the new file is still empty.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from cowferry.block.node import Node, chain, files

READ_WRITE = 0o666  # no execute, setuid, setgid or sticky bit is passed on


class Origin(NamedTuple):
    """Permission bits, user id and group id for a new file; -1: leave the id as it is."""

    mode: int
    uid: int = -1
    gid: int = -1

    def masked(self) -> Origin:
        """Return the permissions without those that the umask of this process forbids."""
        return self._replace(mode=self.mode & ~umask() | 0o600)

    def narrowed(self, other: Origin) -> Origin:
        """Return the permissions without those that `other` does not give to the same users."""
        mode = self.mode & (other.mode if self.gid == other.gid else _all_as_others(other.mode))
        return self._replace(mode=mode | 0o600)

    def in_another_group(self) -> Origin:
        """Return the permissions for a file whose group cannot be the origin's.

        The group of the file and the group of the origin get what both the origin's group and all
        others may do: each of the two groups is among the others of the other file."""
        return self._replace(mode=self.mode & _all_as_others(self.mode) | 0o600)


def _all_as_others(mode: int) -> int:
    """Give the group, and others, only what both of them have; keep the owner's bits."""
    both = mode >> 3 & mode & 0o7
    return mode & 0o700 | both << 3 | both


PRIVATE = Origin(0o600)  # for files beside an image that cannot be looked at


def of(image: str | int) -> Origin | None:
    """Return the permissions for files made from the image with this path or descriptor.

    The origin may be a block device: then the device node's permissions count. Return None if the
    image is not there, may not be looked at, or is an export of a server."""
    try:
        st = os.stat(image)
    except (OSError, ValueError):
        return None
    return Origin(stat.S_IMODE(st.st_mode) & READ_WRITE | 0o600, st.st_uid, st.st_gid)


def of_node(node: Node) -> Origin | None:
    """Return the permissions for files made from the disk under `node`.

    Such a file may hold bytes of each file in the chain. It gets the owner of the topmost one, and
    permissions that are no wider than any. Return None if the topmost image is a server's."""
    found: Origin | None = None
    for image in chain(node):
        for file in files(image):
            more = of(file.fd) if file.fd >= 0 else None
            if found is None:
                found = more
            elif more is not None:
                found = found.narrowed(more)
        if found is None:
            return None
    return found


def beside(image: str | int) -> Origin:
    """Return the permissions for a file beside an image: `of`, or the owner's alone."""
    return of(image) or PRIVATE


def umask() -> int:
    """Return the umask of this process. Setting it, to read it, would disturb other threads."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    return 0o077
