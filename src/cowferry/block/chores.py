"""Chores: what is done now and then for each of several things, any of which may hang.

A disk whose server does not answer must not keep the others from being flushed. So each chore has a
thread of its own, and whoever asks for it waits a moment: as long as nothing hangs, one runs after
another, and a hundred disks are not flushed at once. One that takes longer is left behind, and what
it is about is not asked again before it has ended. So there are at most as many threads as things.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)

MOMENT = 1.0  # seconds


class Chores:
    """Those that run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards `_running`; not held while a chore is waited for
        self._running: dict[Hashable, threading.Thread] = {}

    def do(self, about: Hashable, work: Callable[[], None]) -> None:
        """Do it, unless the last one about this still runs; returns when it is done, or later.

        `work` handles its own errors."""

        def run() -> None:
            try:
                work()
            except Exception:
                log.exception("a chore failed: %s", about)
            finally:
                with self._lock:
                    del self._running[about]

        with self._lock:
            if about in self._running:
                return
            thread = threading.Thread(target=run, name="chore", daemon=True)
            try:
                thread.start()  # what it does at its end waits for us
            except RuntimeError as error:  # no more threads just now
                log.error("a chore is put off: %s: %s", about, error)
                return
            self._running[about] = thread
        thread.join(MOMENT)

    def end(self, seconds: float = math.inf) -> bool:
        """Wait for all of them, for `seconds` at most. Return whether all have ended.

        The caller sees to it that no thread asks for another one meanwhile."""
        with self._lock:
            running = list(self._running.values())
        until = time.monotonic() + seconds
        for thread in running:
            thread.join(None if seconds == math.inf else max(until - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in running)
