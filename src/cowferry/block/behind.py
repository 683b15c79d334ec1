"""What a long copy has written goes to the disk behind it, and out of memory.

A copy that only writes leaves a trail of dirty pages as long as the memory allows. At its end the
flush waits for all of them; until then they take the place of what guests have cached; and on a
machine that lends its free memory out each new page is dear (measured: 1 GiB took 0.7 s with this
and 1.2 to 4.7 s without). So each piece is handed to the disk as soon as it is written, and once
`KEEP` bytes have followed it is waited for and its pages are let go of, to be used again.

This is for what nobody is about to read: the target of a backup, a converted image. It makes
nothing durable and hears of no error: for that there is the flush at the end.
"""

from __future__ import annotations

import os
from collections import deque

from cowferry.block import sysio

KEEP = 64 << 20  # bytes that may be on their way
LEAST = 256 << 10  # a shorter piece is not worth the system calls


class Behind:
    """One copy's trail. Used by one thread at a time."""

    def __init__(self) -> None:
        self._trail: deque[tuple[int, int, int]] = deque()  # (fd, offset, length), oldest first
        self._length = 0  # bytes of the trail
        # By the writer's descriptor one of ours: to wait is to hear of a write that has failed,
        # and what one descriptor has heard its next fdatasync does not tell (N6).
        self._own: dict[int, int] = {}

    def wrote(self, fd: int, offset: int, length: int) -> None:
        """These bytes of a file were written. Waits for little: may be called inside a gate."""
        if length < LEAST:
            return
        own = self._own.get(fd)
        if own is None:
            own = self._own[fd] = sysio.another(fd)
        if own < 0:
            return
        sysio.start_writeback(own, offset, length)
        self._trail.append((own, offset, length))
        self._length += length

    def catch_up(self) -> None:
        """Wait until no more than `KEEP` bytes are on their way. Outside any gate."""
        while self._length > KEEP:
            fd, offset, length = self._trail.popleft()
            self._length -= length
            sysio.let_go(fd, offset, length)

    def close(self) -> None:
        """The copy has ended. What is still in memory stays there until the kernel wants it."""
        self._trail.clear()
        self._length = 0
        while self._own:
            fd = self._own.popitem()[1]
            if fd >= 0:
                os.close(fd)
