"""A small QMP client for the live commands: one socket, blocking, events on the side."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from cowferry.cli.run import run_folder
from cowferry.errors import CowferryError
from cowferry.wire import qmp


class QmpError(CowferryError):
    """The daemon's refusal, with its class."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(str(body.get("desc", "unknown error")), str(body.get("hint", "")))
        self.error_class = str(body.get("class", "GenericError"))


#: What a hint calls something in QMP, and what the command line calls it.
OPTIONS = {
    "mode=existing": "--reuse-external",
    "use unsafe": "use --unsafe",
    "use x-unsafe": "use --unsafe",
    "resume it first, or use force": "resume it first, or leave out --soft",
    "use force": "use --force",
    "query-jobs lists": "cowferry jobs lists",
    "x-backup-export-end": "cowferry backup --end",
    "another id": "another --id",
    "without persistent it can": "with --transient it can",
    "with block-dirty-bitmap-remove": "with cowferry bitmap --remove",
}


def in_options(hint: str) -> str:
    """A hint as the command line says it."""
    for member, option in OPTIONS.items():
        hint = hint.replace(member, option)
    return hint


class Client:
    """A negotiated connection. Not thread-safe."""

    def __init__(self, path: str) -> None:
        self.events: deque[dict[str, Any]] = deque()
        self._numbers = itertools.count(1)
        self._splitter = qmp.Splitter(qmp.MAX_ANSWER, qmp.MAX_ANSWER_DEPTH)
        self._texts: deque[bytes | qmp.ParseError] = deque()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(path)
        except OSError as error:
            self.sock.close()
            raise CowferryError(
                f"no daemon answers at '{path}': {error.strerror}",
                "start one with: cowferry serve NAME=FILE; or name its QMP socket with -c",
            ) from error
        if "QMP" not in self._message():
            raise CowferryError(f"'{path}' is not a QMP socket")
        self.call("qmp_capabilities")

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, command: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """Run a command for a verb of the command line; keyword underscores become dashes.

        Arguments that are None are left out; `fds` go along. Raises `QmpError`, whose hint speaks
        of options instead of QMP's members."""
        plain = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
        try:
            return self.execute(command, plain, fds)
        except QmpError as error:
            error.hint = in_options(error.hint)
            raise

    def execute(self, command: str, arguments: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """Run a command with arguments as they are. Raises `QmpError`."""
        # Numbered, because Ctrl-C may have come between a question and its answer.
        number = next(self._numbers)
        message = {"execute": command, "arguments": arguments, "id": number}
        self._send(json.dumps(message).encode() + b"\n", fds)
        while True:
            answer = self._message()
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id", number) != number:
                continue
            elif "error" in answer:
                raise QmpError(answer["error"])
            elif "return" in answer:
                return answer["return"]

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if fds:
            sent = socket.send_fds(self.sock, [data], list(fds))
            data = data[sent:]
        self.sock.sendall(data)

    def wait_events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come; ends when `timeout` seconds pass without one."""
        while True:
            if self.events:
                yield self.events.popleft()
                continue
            self.sock.settimeout(timeout)
            try:
                answer = self._message()
            except TimeoutError:
                return
            finally:
                self.sock.settimeout(None)
            if "event" in answer:
                yield answer

    def _message(self) -> dict[str, Any]:
        while not self._texts:
            data = self.sock.recv(65536)
            if not data:
                raise CowferryError("the daemon has hung up", "look at its log; is it still there?")
            self._texts.extend(self._splitter.feed(data))
        text = self._texts.popleft()
        if isinstance(text, qmp.ParseError):
            raise text
        return qmp.parse(text)


def connect(path: str | None) -> Client:
    """The daemon at `path`, else $COWFERRY_QMP, else the run folder's."""
    chosen = path or os.environ.get("COWFERRY_QMP") or os.path.join(run_folder(), "qmp.sock")
    return Client(chosen)
