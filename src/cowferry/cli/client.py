"""A small QMP client for the live commands: one socket, blocking, events on the side."""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import click

from cowferry.block.peers import STOPPED, peer_of, pid_of
from cowferry.cli.run import run_folder
from cowferry.errors import CowferryError
from cowferry.wire import qmp

GREETING_SECONDS = 10.0  # that a daemon may take to greet a client
ALIVE_SECONDS = 5.0  # without an answer, after which the client looks whether the daemon lives
ENDING_SECONDS = 15.0  # that an answer may take of a daemon that takes no clients any more
MOMENT = 0.05  # seconds
TIMEOUT = "cowferry.timeout"  # where the command line keeps what --timeout says


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
    "leave out x-on-ready": "leave out --finish",
    "resume it first, or use force": "resume it first, or leave out --soft",
    "use drain to wait for them, or force": "--drain SECONDS waits for them, --force does not",
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


class HungUp(CowferryError):
    """The daemon has closed the connection."""


class Gone(CowferryError):
    """Nothing listens at the daemon's socket."""


class Silent(CowferryError):
    """The daemon does not answer."""


def _splitter() -> qmp.Splitter:
    """A splitter of answers, which may be longer and deeper than commands."""
    return qmp.Splitter(qmp.MAX_ANSWER, qmp.MAX_ANSWER_DEPTH)


class Client:
    """A negotiated connection. Not thread-safe.

    A command may take long, because its storage does. So while it is not answered the client looks
    now and then whether the daemon answers others: `Silent` says that it does not. With a `timeout`
    in seconds that is all the time that an answer has."""

    def __init__(self, path: str, timeout: float | None = None) -> None:
        self.path = path
        self.timeout = timeout
        self.events: deque[dict[str, Any]] = deque()
        self._numbers = itertools.count(1)
        self._splitter = _splitter()
        self._texts: deque[bytes | qmp.ParseError] = deque()
        self.sock = self._connected(timeout or GREETING_SECONDS)
        try:
            greeting = self._message(time.monotonic() + (timeout or GREETING_SECONDS))
            if greeting is None:
                raise self._silent(timeout or GREETING_SECONDS)
            if "QMP" not in greeting:
                raise CowferryError(f"'{path}' is not a QMP socket")
            self.call("qmp_capabilities")
        except BaseException:
            self.sock.close()
            raise

    def _connected(self, seconds: float) -> socket.socket:
        """A socket to the daemon. Raises `CowferryError`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        until = time.monotonic() + seconds
        try:
            while True:
                try:
                    sock.connect(self.path)
                    break
                except BlockingIOError:  # so many wait that it takes nobody any more
                    if time.monotonic() >= until:
                        from cowferry.exports.sockets import holder_of

                        raise self._silent(seconds, holder_of(self.path)) from None
                    time.sleep(MOMENT)
        except OSError as error:
            sock.close()
            raise Gone(
                f"no daemon answers at '{self.path}': {error.strerror}",
                "start one with: cowferry serve NAME=FILE; or name its QMP socket with -c",
            ) from error
        except BaseException:
            sock.close()
            raise
        sock.setblocking(True)
        return sock

    @property
    def pid(self) -> int:
        """The daemon's process; 0 if it cannot be seen from here."""
        return pid_of(self.sock)

    def _silent(self, seconds: float, who: str = "") -> Silent:
        who = who or peer_of(self.sock)
        if STOPPED in who:
            hint = f"continue the daemon: kill -CONT {who.split()[1]}"
        else:
            hint = "if it is still opening its disks, wait; its log may say more"
        return Silent(
            f"the daemon at '{self.path}' has not answered within {seconds:g} s: {who}",
            f"its disks are intact, but their guests may have to wait as well; {hint}",
        )

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
        of options instead of QMP's members, and `Silent`."""
        plain = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
        try:
            return self.execute(command, plain, fds)
        except QmpError as error:
            error.hint = in_options(error.hint)
            raise

    def execute(self, command: str, arguments: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """Run a command with arguments as they are. Raises `QmpError`, `Silent`."""
        # Numbered, because Ctrl-C may have come between a question and its answer.
        number = next(self._numbers)
        message = {"execute": command, "arguments": arguments, "id": number}
        begin = time.monotonic()
        self._send(json.dumps(message).encode() + b"\n", fds)
        while True:
            answer = self._answer(begin)
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id", number) != number:
                continue
            elif "error" in answer:
                raise QmpError(answer["error"])
            elif "return" in answer:
                return answer["return"]

    def _answer(self, begin: float) -> dict[str, Any]:
        """The next message, for a question that was asked at `begin`. Raises `Silent`."""
        ending = float("inf")  # when a daemon that ends has no more time
        while True:
            if self.timeout is not None:
                answer = self._message(begin + self.timeout)
                if answer is None:
                    raise self._silent(self.timeout)
                return answer
            answer = self._message(time.monotonic() + ALIVE_SECONDS)
            if answer is not None:
                return answer
            try:
                self._check_alive()
            except (Gone, HungUp):  # it may yet answer those that it has taken
                ending = min(ending, time.monotonic() + ENDING_SECONDS)
                if time.monotonic() >= ending:
                    raise self._hung_up() from None

    def _hung_up(self) -> HungUp:
        return HungUp(
            f"the daemon at '{self.path}' has ended before it answered",
            "it was stopped or it crashed, and its log says more; start it again with cowferry "
            "serve, which finds each disk where it was",
        )

    def _check_alive(self) -> None:
        """Raise `Silent` unless the daemon greets another client; `Gone` if it takes none."""
        before, self.sock = self.sock, self._connected(GREETING_SECONDS)
        texts, self._texts = self._texts, deque()
        splitter, self._splitter = self._splitter, _splitter()
        try:
            if self._message(time.monotonic() + GREETING_SECONDS) is None:
                raise self._silent(GREETING_SECONDS)
        finally:
            self.sock.close()
            self.sock, self._texts, self._splitter = before, texts, splitter

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        self.sock.settimeout(self.timeout or GREETING_SECONDS)
        try:
            if fds:
                sent = socket.send_fds(self.sock, [data], list(fds))
                data = data[sent:]
            self.sock.sendall(data)
        except TimeoutError:
            raise self._silent(self.timeout or GREETING_SECONDS) from None
        except ConnectionError:
            raise self._hung_up() from None
        finally:
            self.sock.settimeout(None)

    def wait_events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come; ends when `timeout` seconds pass without one."""
        while True:
            if self.events:
                yield self.events.popleft()
                continue
            answer = self._message(None if timeout is None else time.monotonic() + timeout)
            if answer is None:
                return
            if "event" in answer:
                yield answer

    def _message(self, until: float | None) -> dict[str, Any] | None:
        """The next message; None if there is none by `until`."""
        while not self._texts:
            if until is not None:
                left = max(until - time.monotonic(), 0)
                if not select.select([self.sock], [], [], left)[0]:
                    return None
            try:
                data = self.sock.recv(65536)
            except ConnectionError:  # it has died with something of ours unread
                data = b""
            if not data:
                raise self._hung_up()
            self._texts.extend(self._splitter.feed(data))
        text = self._texts.popleft()
        if isinstance(text, qmp.ParseError):
            raise text
        return qmp.parse(text)


def connect(path: str | None) -> Client:
    """The daemon at `path`, else $COWFERRY_QMP, else the run folder's. Its answers have the seconds
    that `--timeout` says."""
    chosen = path or os.environ.get("COWFERRY_QMP") or os.path.join(run_folder(), "qmp.sock")
    context = click.get_current_context(silent=True)
    return Client(chosen, context.meta.get(TIMEOUT) if context is not None else None)
