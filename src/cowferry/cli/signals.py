"""The signals that end a program of ours cleanly, and the end that waits for no thread."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn

#: Beside the usual ones: the end of an alarm or of CPU time that a parent has set, and SIGPWR, by
#: which containers are told to stop. Without a handler each of them would kill.
ENDING = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGXCPU, signal.SIGPWR,
)  # fmt: skip


def heard() -> list[signal.Signals]:
    """Return those that this process is to hear.

    A signal that its parent has it ignore stays ignored, as with nohup. SIGINT does not, because a
    shell without job control has each background process ignore it."""
    always = (signal.SIGINT, signal.SIGTERM)
    return [n for n in ENDING if n in always or signal.getsignal(n) is not signal.SIG_IGN]


def end_at_once(status: int) -> NoReturn:
    """End the program with this exit status.

    The interpreter would first wait for all threads, and a thread may wait for a server or for
    storage that does not answer."""
    for stream in (sys.stdout, sys.stderr):
        # A signal may have come in the middle of a flush: then RuntimeError.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(status)
