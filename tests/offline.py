"""The command line in this process, for tests: as fast as a call, and judged like a program."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cowferry.cli import main
from cowferry.cli.signals import ENDING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIGNALS = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cowferry(*arguments: object, code: int = 0, cwd: Path | None = None) -> str:
    """Run a command; what it printed, errors last. The exit code is as expected."""
    out, errors = io.StringIO(), io.StringIO()
    here = os.getcwd()
    status: Any = 0
    with _handlers_kept(), redirect_stdout(out), redirect_stderr(errors):
        os.chdir(cwd or here)
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            status = end.code or 0
        finally:
            with suppress(FileNotFoundError):
                os.chdir(here)
    text = out.getvalue() + errors.getvalue()
    assert status == code, (arguments, status, text)
    return text


def program(*arguments: object, code: int = 0, **more: Any) -> str:
    """The same as a process of its own, which may have limits of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cowferry", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, **more,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    text: str = done.stdout + done.stderr
    return text


SIGNALLED = """
import os, signal, sys
from cowferry.block import sysio
from cowferry.cli import main

count, plain = 0, sysio.pwrite

def pwrite(fd, buf, offset):
    global count
    plain(fd, buf, offset)
    count += 1
    if count == int(sys.argv[1]):
        for number in sys.argv[2].split(","):
            os.kill(os.getpid(), int(number))

sysio.pwrite = pwrite
main(sys.argv[3:])
"""


def signalled(after: int, numbers: Sequence[int], *arguments: object, code: int) -> str:
    """Run a command as a process that gets signals after so many writes; what it printed."""
    signals = ",".join(str(int(n)) for n in numbers)
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(after), signals, *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    text: str = done.stdout + done.stderr
    return text
