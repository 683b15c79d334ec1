"""The file in which a daemon says its process id, for as long as it runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat

from cowferry.errors import CowferryError

LONGEST = 32  # bytes of a process id, with what stands around it


class Pidfile:
    """A file that is locked from the start, and says the process id after `write`.

    It belongs to the daemon that holds its lock. A file that is no pidfile is left alone."""

    def __init__(self, path: str) -> None:
        """Lock the file, which is made if it is not there. Its content does not change yet.

        Raises `CowferryError` if another daemon has it, or if it is something else."""
        self.path = os.path.abspath(path)
        self.made = False
        self.written = False
        try:
            self._fd = self._open()
        except OSError as error:
            raise CowferryError(f"cannot write pidfile '{path}': {error.strerror}") from error

    def write(self) -> None:
        """Let the file say our process id. Raises `CowferryError`."""
        self.written = True
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise CowferryError(f"cannot write pidfile '{self.path}': {error.strerror}") from error

    def drop(self) -> None:
        """Remove the file if it is ours: we have made it or written it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if (self.made or self.written) and self._is(fd):
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(fd)

    def _open(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o644)
                self.made = True
            except FileExistsError:
                try:
                    fd = os.open(self.path, flags)
                except FileNotFoundError:
                    continue  # it went in between
                self.made = False
            try:
                self._take(fd)
                if self._is(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its daemon has just ended, and removed it

    def _take(self, fd: int) -> None:
        found = os.pread(fd, LONGEST, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else b"?"
        if found.strip() and not found.strip().isdigit():
            raise CowferryError(
                f"'{self.path}' exists, and is no pidfile", "it was not changed; name another file"
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = found.strip().decode() or "another one"
            raise CowferryError(
                f"'{self.path}' is the pidfile of a daemon that runs: process {number}",
                "name another file, or stop that daemon first",
            ) from None

    def _is(self, fd: int) -> bool:
        """Whether the path leads to that file still."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(fd))
        except OSError:
            return False
