"""The QEMU guest agent's wire format: commands and answers, a JSON object on each line. No sockets.

The channel outlives its users, so what comes first may be the rest of an answer to somebody who
has gone. `sync` says which answer is ours: the agent sends a byte 0xFF, which no JSON text holds,
and then the number that it was given; whatever comes before that is dropped.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

from cowferry.errors import CowferryError
from cowferry.wire import qmp

SENTINEL = b"\xff"
MAX_ANSWER = 64 << 10  # bytes of one answer; those that we wait for have 20

SYNC = "guest-sync-delimited"
STATUS = "guest-fsfreeze-status"
FREEZE = "guest-fsfreeze-freeze"
THAW = "guest-fsfreeze-thaw"


class Answer(NamedTuple):
    """What a command returned, or the text of the agent's refusal."""

    value: Any
    refusal: str | None = None


class Garbage(CowferryError):
    """Bytes that are no answer; the text says what is wrong with them."""


def command(name: str, **arguments: Any) -> bytes:
    """A command as it goes out."""
    body: dict[str, Any] = {"execute": name}
    if arguments:
        body["arguments"] = arguments
    return qmp.encode(body)


class Answers:
    """Cuts what an agent sends into answers. Feed it bytes."""

    def __init__(self) -> None:
        self._rest = b""  # of a line that is not whole yet
        self._awaited: int | None = None  # the number with which answers begin to count

    @property
    def syncing(self) -> bool:
        """Whether the answer to `sync` is still to come."""
        return self._awaited is not None

    def sync(self) -> bytes:
        """A command to send; nothing that the agent says before its answer to it counts."""
        self._rest = b""
        self._awaited = secrets.randbits(31)
        # The sentinel makes the agent forget half a command that somebody left behind.
        return SENTINEL + command(SYNC, id=self._awaited)

    def feed(self, data: bytes) -> list[Answer]:
        """The answers that are complete now. Raises `Garbage`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        out = []
        for line in lines:
            if self._awaited is None:
                if line.strip():
                    out.append(answer(line))
            elif is_answer(line, self._awaited):
                self._awaited = None
        if self._awaited is not None:
            _, sentinel, number = self._rest.rpartition(SENTINEL)
            self._rest = sentinel + number if sentinel else b""
        if len(self._rest) > MAX_ANSWER:
            raise Garbage(f"an answer of more than {MAX_ANSWER} bytes")
        return out


def is_answer(line: bytes, number: int) -> bool:
    """Whether a line ends in the sentinel and an agent's answer to `sync` with that number."""
    _, sentinel, text = line.rpartition(SENTINEL)
    try:
        return bool(sentinel) and answer(text) == Answer(number)
    except Garbage:
        return False


def answer(line: bytes) -> Answer:
    """An answer out of its line. Raises `Garbage`."""
    if len(line) > MAX_ANSWER:
        raise Garbage(f"an answer of more than {MAX_ANSWER} bytes")
    try:
        body = qmp.parse(line)
    except qmp.ParseError:
        raise Garbage(f"what is no JSON object: {shown(line)}") from None
    if "return" in body:
        return Answer(body["return"])
    error = body.get("error")
    if not isinstance(error, dict):
        raise Garbage(f"what is no answer: {shown(line)}")
    return Answer(None, shown(str(error.get("desc", error)).encode()))


def shown(text: bytes) -> str:
    """The beginning of an agent's text, fit for one line of ours."""
    words = text.decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in words)[:200]
