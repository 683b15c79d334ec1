"""Orders in which things meet, fixed by events: for tests of what must not depend on luck."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cowferry.block import sysio
from cowferry.block.gate import END, Claim, Gate
from daemons import PATIENCE


def on_call(
    patch: pytest.MonkeyPatch, owner: object, name: str, do: Callable[[], object], nth: int = 1
) -> None:
    """Right before the nth call of that method of that object, `do` is done. If it raises, the
    call has failed."""
    real = getattr(owner, name)
    calls = itertools.count(1)

    def wrapped(*args: Any, **more: Any) -> Any:
        if next(calls) == nth:
            do()
        return real(*args, **more)

    patch.setattr(owner, name, wrapped)


def failing(code: int) -> Callable[[], None]:
    """What a call does that fails so."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that comes by itself."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"it never came: {what}"
        time.sleep(0.001)


class Other(threading.Thread):
    """Somebody else: a guest, a command. It begins at once."""

    def __init__(self, do: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.do = do
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.do()
        except BaseException as error:
            self.error = error

    def end(self) -> Any:
        """What came of it, once it is over. Raises what it raised."""
        self.join(PATIENCE)
        assert not self.is_alive(), "somebody hangs"
        if self.error is not None:
            raise self.error
        return self.result


def held_back(
    patch: pytest.MonkeyPatch, gate: Gate, event: threading.Event, whole: bool = False
) -> None:
    """`event` is set once somebody's claim (of the whole disk) has to wait at the gate."""
    real = gate._blocked

    def wrapped(mine: Claim, earlier: tuple[Claim, ...]) -> bool:
        answer = real(mine, earlier)
        if answer and (not whole or mine.end == END):
            event.set()
        return answer

    patch.setattr(gate, "_blocked", wrapped)


class Unflushed:
    """Which files were written and not flushed since; a context manager."""

    def __init__(self) -> None:
        self.files: set[tuple[int, int]] = set()

    def __enter__(self) -> Unflushed:
        assert sysio.recorder is None
        sysio.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        sysio.recorder = None

    def has(self, path: str | Path) -> bool:
        """Whether that file is one of them."""
        st = os.stat(path)
        return (st.st_dev, st.st_ino) in self.files

    def wrote(self, fd: int, offset: int, data: bytes) -> None:
        st = os.fstat(fd)
        self.files.add((st.st_dev, st.st_ino))

    def truncated(self, fd: int, size: int) -> None:
        self.wrote(fd, 0, b"")

    def flushed(self, fd: int, attributes: bool = False) -> None:
        st = os.fstat(fd)
        self.files.discard((st.st_dev, st.st_ino))

    def created(self, path: str) -> None: ...
    def renamed(self, source: str, target: str) -> None: ...
    def unlinked(self, path: str) -> None: ...
    def directory_flushed(self, path: str) -> None: ...
    def attributed(self, fd: int, name: str, value: bytes | None) -> None: ...
