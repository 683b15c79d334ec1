"""The flushes of one file.

Flushes that wait together are one system call: a flush is answered by any fdatasync that *started*
after the flush arrived. And a failed one is *sticky* (N6): Linux marks the pages clean after it has
told of the error once, so a later success would be a lie; every flush fails from then on.
"""

from __future__ import annotations

import errno
import threading

from cowferry.block import sysio


class Barrier:
    """What a descriptor's owner flushes it by, and closes it by. Thread-safe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._changed = threading.Condition(threading.Lock())  # guards the rest; not held over I/O
        self._started = 0  # fdatasyncs begun
        self._finished = 0  # the last of them that went well
        self._running = False
        self._failed: OSError | None = None

    def flush(self) -> None:
        """All that was written before the call is durable on return. Raises `OSError`, and goes on
        doing so once it has."""
        with self._changed:
            mine = self._started + 1  # the next one to start covers us
            while self._failed is None and self._finished < mine:
                if self._running:
                    self._changed.wait()
                else:
                    self._sync()
            if self._failed is not None:
                raise OSError(self._failed.errno or errno.EIO, self._failed.strerror)

    def _sync(self) -> None:
        """One fdatasync; the lock is let go meanwhile."""
        self._running = True
        self._started += 1
        number = self._started
        failure: OSError | None = None
        done = self._finished
        self._changed.release()
        try:
            sysio.fdatasync(self._fd)
            done = number
        except OSError as error:
            failure = error
        finally:
            self._changed.acquire()
            self._running = False
            self._finished = done
            self._failed = self._failed or failure
            self._changed.notify_all()

    def fail(self, error: OSError) -> None:
        """No flush succeeds from now on: the file does not hold what its owner takes it to."""
        with self._changed:
            self._failed = self._failed or error

    def close(self) -> None:
        """No fdatasync runs on the descriptor when this returns, and none will: its number may be
        another file's soon. Every flush fails from now on."""
        with self._changed:
            while self._running:
                self._changed.wait()
            self._failed = self._failed or OSError(errno.EBADF, "it was closed")
