"""Ctrl-C and other signals that end a command, at moments at which nothing is half done.

Python raises KeyboardInterrupt between any two steps of a program. Between the two steps by which a
cluster is taken and is linked, say, that would leave tables in memory that contradict each other,
and closing the image would write them. So commands that change images work inside `Interrupts`: a
signal calls off what they wait for, and they look for it (`scope.check`) where they can stop.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from cowferry.block.scope import Scope
from cowferry.cli.signals import heard
from cowferry.errors import CowferryError


class Interrupts:
    """A context manager: the first signal calls off the waits inside, a second one ends the command
    wherever it is. `number` is the signal that came, or 0."""

    def __init__(self) -> None:
        self.number = 0
        self._scope = Scope()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._came) for n in heard()}
        self._scope.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._scope.__exit__(kind, error, trace)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number and isinstance(error, (OSError, CowferryError)):
            raise self._end() from error

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise self._end()
        self.number = number
        self._scope.call_off("interrupted")

    def _end(self) -> BaseException:
        if self.number == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + self.number)
