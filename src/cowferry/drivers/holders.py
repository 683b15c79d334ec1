"""Which process holds a lock of a file: for an error message, as far as /proc tells.

The kernel does not say which process holds an open-file-description lock. But /proc/PID/fdinfo has
the locks of each descriptor. Only descriptors that this process may look at are found: those of its
own user, or all for root.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from cowferry.errors import one_line

PATIENCE = 1.0  # seconds that may be spent on looking
COMMAND = 80  # characters of a command that are told


class Holder(NamedTuple):
    """A process that holds a lock, and its command line."""

    pid: int
    command: str

    def __str__(self) -> str:
        if self.pid == os.getpid():
            return "this process"
        return f"process {self.pid} ({self.command})" if self.command else f"process {self.pid}"


def find(fd: int, byte: int) -> Holder | None:
    """Return a process that holds a lock over `byte` of the file, by another descriptor than `fd`.

    Return None if that cannot be told."""
    inode = f":{os.fstat(fd).st_ino}"
    deadline = time.monotonic() + PATIENCE
    try:
        numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return None
    # The newest process first: it is more likely than the system's own daemons.
    for pid in sorted(numbers, reverse=True):
        if time.monotonic() > deadline:
            return None
        try:
            descriptors = os.listdir(f"/proc/{pid}/fdinfo")
        except OSError:  # another user's, or it has ended
            continue
        own = str(fd) if pid == os.getpid() else ""
        if any(d != own and _locks(f"/proc/{pid}/fdinfo/{d}", inode, byte) for d in descriptors):
            return Holder(pid, command(pid))
    return None


def _locks(info: str, inode: str, byte: int) -> bool:
    """Whether a descriptor has a lock over a byte of the file; `inode` is ":" and the number."""
    try:
        with open(info, encoding="ascii", errors="replace") as lines:
            for line in lines:
                # lock: 1: OFDLCK ADVISORY READ -1 fe:00:2146486 201 201
                words = line.split() if line.startswith("lock:") else []
                if len(words) == 9 and words[6].endswith(inode):
                    end = words[8]
                    if int(words[7]) <= byte and (end == "EOF" or byte <= int(end)):
                        return True
    except (OSError, ValueError):
        pass
    return False


def command(pid: int) -> str:
    """Return a process's command line, in one short line; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            words = f.read(4096).decode("utf-8", "replace").split("\0")
    except OSError:
        return ""
    text = one_line(" ".join(words).strip())
    return text if len(text) <= COMMAND else f"{text[: COMMAND - 3]}..."
