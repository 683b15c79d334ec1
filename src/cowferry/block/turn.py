"""The turn: the one lock under which commands look at the graph and change it.

A command holds the turn while it checks and changes what is in memory. A command that has to wait,
for storage, for a server, for guests' requests or for a job, first reserves what it needs (names,
claims on nodes, the id of a job) and then gives its turn away (`apart`), so that a peer which does
not answer holds up that one command and no other.

What a command knew before `apart` may have changed after it, unless the command had reserved it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """A reentrant lock whose holder can give all of it away for a while. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Written by the holder of `_lock` only. A thread that is not the holder may read an old
        # owner, but never its own number.
        self._owner: int | None = None
        self._depth = 0

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds the turn."""
        return self._owner == threading.get_ident()

    def acquire(self, timeout: float = -1.0) -> bool:
        """Wait for the turn, for at most `timeout` seconds if that is not negative.

        Return False if the time is over."""
        if not self.mine:
            if not self._lock.acquire(timeout=timeout):
                return False
            self._owner = threading.get_ident()
        self._depth += 1
        return True

    def release(self) -> None:
        """Undo one `acquire`."""
        assert self.mine
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Give the turn away inside, and take it again at the end.

        A thread that does not hold the turn passes through."""
        if not self.mine:
            yield
            return
        depth, self._depth = self._depth, 0
        self._owner = None
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._owner = threading.get_ident()
            self._depth = depth
