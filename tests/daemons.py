"""Daemons for tests: one in this process with its sockets, or real programs beside it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chains import make_base, overlay
from cowferry.daemon import Daemon
from cowferry.monitor import qmp

PATIENCE = 30.0  # seconds until a test gives up on something that should come at once
Happened = tuple[str, dict[str, Any]]


class Told:
    """What a daemon's events said, in order; `wait` for one."""

    def __init__(self, daemon: Daemon) -> None:
        self.queue: queue.Queue[Happened] = queue.Queue()
        self.seen: list[Happened] = []
        daemon.events.listen(lambda name, data: self.queue.put((name, data)))

    def wait(self, name: str, **members: Any) -> dict[str, Any]:
        """The next event of that name with those members."""
        while True:
            got, data = self.queue.get(timeout=PATIENCE)
            self.seen.append((got, data))
            if got == name and all(data.get(k) == v for k, v in members.items()):
                return data


@contextmanager
def a_daemon(path: Path | None = None) -> Iterator[Daemon]:
    """A daemon in this process; with `path`, its QMP socket is there."""
    daemon = Daemon()
    server = qmp.server(daemon)
    try:
        if path is not None:
            server.listen_unix(str(path))
        yield daemon
    finally:
        server.stop_listening()
        daemon.close()
        server.stop()


def chain_of(folder: Path, name: str, size: int) -> bytearray:
    """`folder/name.qcow2` over `folder/base.raw`; returns its bytes."""
    oracle = make_base(folder, size)
    overlay(folder, f"{name}.qcow2", "base.raw", "raw", size)
    return oracle


def environment(run: Path) -> dict[str, str]:
    """For a child whose run folder is `run`."""
    return {**os.environ, "COWFERRY_RUN": str(run), "PYTHONUNBUFFERED": "1"}


@contextmanager
def program(
    run: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """`cowferry serve ARGUMENTS` as a process of its own, and a function that reads a line."""
    command = [sys.executable, "-m", "cowferry", "serve", *arguments]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(run)
    )
    assert child.stdout is not None and child.stderr is not None
    try:
        yield child, child.stdout.readline
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise
        child.stdout.close()
        child.stderr.close()
