"""Daemons by the hundred: `cowferry serve`, forked from an interpreter that has loaded it already.

Each is a process of its own that runs the program's own entry; only the third of a second that
Python needs to load it is spent once. `Nursery` is the parent's end; run as a program, this file is
the interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import cowferry
from cowferry.cli.client import Client


class Child:
    """A daemon, what it serves, and a QMP connection to it."""

    def __init__(self, pid: int, pidfd: int, out: int, run: Path) -> None:
        self.pid = pid
        self._pidfd = pidfd
        with os.fdopen(out) as lines:
            text = lines.readline()
            try:
                served = json.loads(text)
            except ValueError:
                self.kill()
                raise AssertionError(f"the daemon did not start: {text}{lines.read()}") from None
        self.uris: dict[str, str] = {d["name"]: d["uri"] for d in served["disks"]}
        self.qmp = Client(str(run / "qmp.sock"))

    def kill(self) -> None:
        """SIGKILL; returns when all that the process held is free."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        assert select.select([self._pidfd], [], [], 30)[0]
        os.close(self._pidfd)


class Nursery:
    """Starts daemons, which complain into a file in `folder`. Thread-safe; a context manager, at
    whose end none of them is left."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        with theirs, open(folder / "stderr", "wb") as log:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=log)
        self.sock = ours
        self.lock = threading.Lock()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self.process.wait(30)

    def serve(self, run: Path, **disks: Path | str) -> Child:
        """`cowferry serve NAME=FILE...` with its sockets in the folder `run`."""
        reader, writer = os.pipe()
        argv = ["serve", "--json", *(f"{name}={path}" for name, path in disks.items())]
        message = json.dumps({"argv": argv, "env": {"COWFERRY_RUN": str(run)}}).encode()
        try:
            with self.lock:
                socket.send_fds(self.sock, [message], [writer])
                answer, fds, _, _ = socket.recv_fds(self.sock, 100, 1)
        finally:
            os.close(writer)
        return Child(int(answer), fds[0], reader, run)


def become(argv: list[str], env: dict[str, str], out: int) -> NoReturn:
    """In a child: the program."""
    from cowferry.cli import main

    status: Any = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(env)
        os.dup2(out, 1)
        os.close(out)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # the old one was opened on another file
        sys.argv = ["cowferry", *argv]
        main()
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status if isinstance(status, int) else 1)


def nurse(sock: socket.socket) -> None:
    """Fork a daemon for each message, until the other end is closed."""
    for module in pkgutil.walk_packages(cowferry.__path__, "cowferry."):
        if module.name != "cowferry.__main__":
            importlib.import_module(module.name)
    children: list[int] = []
    while True:
        message, fds, _, _ = socket.recv_fds(sock, 1 << 16, 1)
        if not message:
            break
        wanted = json.loads(message)
        pid = os.fork()
        if not pid:
            sock.close()
            for fd in children:
                os.close(fd)
            become(wanted["argv"], wanted["env"], fds[0])
        os.close(fds[0])
        children.append(os.pidfd_open(pid))
        socket.send_fds(sock, [str(pid).encode()], [children[-1]])
        for fd in list(children):  # those that are over
            if select.select([fd], [], [], 0)[0]:
                os.waitid(os.P_PIDFD, fd, os.WEXITED)
                os.close(fd)
                children.remove(fd)
    for fd in children:
        signal.pidfd_send_signal(fd, signal.SIGKILL)


if __name__ == "__main__":
    nurse(socket.socket(fileno=int(sys.argv[1])))
