"""How far an offline command is: shown with -p, and on SIGUSR1, as qemu-img does."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

import click


class Report:
    """Progress of one command: on standard output with `show`, on standard error at SIGUSR1.

    A context manager. `total` in bytes. Used by the main thread."""

    def __init__(self, total: int, show: bool) -> None:
        self.total = max(total, 1)
        self.show = show
        self.done = 0

    def __enter__(self) -> Report:
        signal.signal(signal.SIGUSR1, self._asked)
        self.at(0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes too late kills nobody
        if self.show:
            click.echo()

    def at(self, done: int) -> None:
        """So many bytes are done."""
        self.done = min(done, self.total)
        if self.show:
            click.echo(f"{self._text()}\r", nl=False)
            sys.stdout.flush()

    def _text(self) -> str:
        return f"    ({100 * self.done / self.total:.2f}/100%)"

    def _asked(self, number: int, frame: FrameType | None) -> None:
        click.echo(self._text(), err=True)
