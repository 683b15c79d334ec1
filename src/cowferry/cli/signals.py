"""The signals that end a program of ours cleanly."""

from __future__ import annotations

import signal

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
