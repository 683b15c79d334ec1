"""Scopes: a thread's waits can be called off, and have a deadline.

A thread waits inside a scope, and every wait of ours that may last looks at the scopes of its
thread: the wait for a range of a disk, for an answer of a server, for a connection, for a flush
that another thread does. So a job that is cancelled by force, a command whose time is over and a
daemon that ends are free of a peer that does not answer, and each wait needs no deadline of its
own.

    with Scope(30, "disk 'vm'") as scope:   # after 30 s: OSError (ETIMEDOUT)
        ...
    scope.call_off("the job was cancelled")  # from any thread: OSError (ECANCELED)

A system call that hangs in the kernel cannot be called off. The thread notices after it.

Scopes nest: a wait ends when any scope of its thread says so. A thread without a scope (a guest's
request) waits for as long as it takes.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

LOOK_SECONDS = 0.2  # between two looks of a waiting thread at its scopes


class CalledOff(OSError):
    """The wait was called off, or its time is over."""


class Scope:
    """Something whose waits end together. May be entered by several threads, one after another or
    at once, and by one thread several times."""

    def __init__(self, seconds: float | None = None, what: str = "") -> None:
        """`seconds`: the deadline, from now on. `what` had not come by then, in words."""
        self.until = None if seconds is None else time.monotonic() + seconds
        self.seconds = seconds
        self.what = what
        self.reason: str | None = None  # why it was called off

    def call_off(self, reason: str) -> None:
        """End every wait inside with an `OSError` (ECANCELED), those to come, too."""
        self.reason = self.reason or reason

    def check(self, hurry: bool = True) -> None:
        """Raise `CalledOff` if it was called off or, in a `hurry`, if its time is over."""
        if self.reason is not None:
            raise CalledOff(errno.ECANCELED, self.reason)
        if hurry and self.until is not None and time.monotonic() >= self.until:
            raise CalledOff(errno.ETIMEDOUT, f"{self.what} within {self.seconds:g} s")

    def __enter__(self) -> Scope:
        _stack.scopes = (*_stack.scopes, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        _stack.scopes = _stack.scopes[:-1]


class _Stack(threading.local):
    scopes: tuple[Scope, ...] = ()
    unhurried = False  # deadlines do not count


_stack = _Stack()


def current() -> tuple[Scope, ...]:
    """The scopes of the calling thread, to be entered by a thread that works for it (`inside`)."""
    return _stack.scopes


@contextmanager
def inside(scopes: tuple[Scope, ...]) -> Iterator[None]:
    """The calling thread is in these scopes, and in no others."""
    before, _stack.scopes = _stack.scopes, scopes
    try:
        yield
    finally:
        _stack.scopes = before


@contextmanager
def unhurried() -> Iterator[None]:
    """The deadlines of the thread's scopes do not count: the wait has one of its own."""
    before, _stack.unhurried = _stack.unhurried, True
    try:
        yield
    finally:
        _stack.unhurried = before


def check() -> None:
    """Raise `CalledOff` if a scope of the calling thread has ended."""
    for scope in _stack.scopes:
        scope.check(not _stack.unhurried)


def wait(changed: threading.Condition, timeout: float | None = None) -> None:
    """Wait for a notification, or a moment: the caller looks again whether what it waits for is
    there. The caller holds `changed`. Raises `CalledOff`.

    `timeout` in seconds."""
    if not _stack.scopes:
        changed.wait(timeout)
        return
    check()
    changed.wait(LOOK_SECONDS if timeout is None else min(timeout, LOOK_SECONDS))


def acquire(lock: threading.Lock) -> None:
    """Take a lock. Raises `CalledOff`; then it is not taken."""
    if not _stack.scopes:
        lock.acquire()
        return
    check()
    while not lock.acquire(timeout=LOOK_SECONDS):
        check()


def wait_for(changed: threading.Condition, so: Callable[[], bool]) -> None:
    """Wait until it is so. The caller holds `changed`. Raises `CalledOff`."""
    while not so():
        wait(changed)
