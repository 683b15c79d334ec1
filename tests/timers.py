"""Timers that need no time to pass."""

from __future__ import annotations

from collections.abc import Callable

from cowferry.block.throttle import Timer


class ByHand(Timer):
    """A clock that moves when it is told to, and calls what is due then, in this thread."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lambda: self.now)
        self._started = True  # no thread of its own

    def advance(self, seconds: float) -> None:
        """Let time pass, stopping at each call that is due on the way."""
        end = self.now + seconds
        while True:
            with self._changed:
                due = self._calls and self._calls[0][0] <= end + 1e-9
                if due:
                    when, _, call = self._calls.pop(0)
                    self._calls.sort()
            if not due:
                break
            self.now = max(self.now, when)
            call()
        self.now = end


class AtOnce(Timer):
    """Remembers for how long it was asked to wait, and does not wait."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.asked: list[float] = []

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.asked.append(seconds)
        call()
