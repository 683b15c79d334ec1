"""QMP's wire format: a stream of JSON objects, in and out. No sockets.

The input is a *stream*: QEMU's own client sends no newline, others send several objects in one
packet or one object in many. So objects are cut out by their brackets, strings and escapes, byte
by byte, before the JSON parser sees them. What is too long or too deep is refused while it
arrives. After an error the stream goes on at the next newline or object.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

from cowferry.errors import CowferryError

MAX_MESSAGE = 1 << 20  # bytes of one object that a client sends
MAX_DEPTH = 64  # levels of it
# The same of what a client reads, because a chain of images is as many levels deep: query-block.
MAX_ANSWER = 256 << 20
MAX_ANSWER_DEPTH = 2048
MAX_DIGITS = 40  # of one number: larger ones cost quadratic time and mean nothing
#: Levels of calls that the interpreter allows: those of the deepest answer, and some.
RECURSION = MAX_ANSWER_DEPTH + 2048

SPACE = b" \t\r\n"
OPEN, CLOSE = b"{[", b"}]"
QUOTES = b"\"'"
BACKSLASH = 0x5C
NEWLINE = 0x0A
# What ends a stretch of bytes that only has to be kept: outside of strings, and inside.
MARKS = re.compile(rb"[\[\]{}\"']")
IN_STRING = {quote: re.compile(rb"[\\\n%c]" % quote) for quote in QUOTES}


class ParseError(CowferryError):
    """Input that is not QMP; the text is for the client."""


class Splitter:
    """Cuts a byte stream into JSON texts. Feed bytes, get texts and errors in order.

    `most` is the size of a text in bytes, `deepest` the levels that it may have: by default, of
    what a client may send to a server."""

    def __init__(self, most: int = MAX_MESSAGE, deepest: int = MAX_DEPTH) -> None:
        self._most = most
        self._deepest = deepest
        self._text = bytearray()
        self._depth = 0
        self._quote = 0  # the quote we are in, or 0
        self._escaped = False
        self._skipping = False  # after an error, until a newline

    def feed(self, data: bytes) -> list[bytes | ParseError]:
        """The objects that are complete now; a `ParseError` in place of a broken one."""
        out: list[bytes | ParseError] = []
        at = 0
        while at < len(data):
            if self._skipping:
                at = data.find(b"\n", at) + 1 or len(data)
                if data[at - 1] == NEWLINE:
                    self._reset()
                continue
            stop = at
            if self._depth and not self._escaped:  # as many bytes at once as can be
                marks = IN_STRING[self._quote] if self._quote else MARKS
                found = marks.search(data, at)
                stop = found.start() if found else len(data)
                room = self._most - len(self._text)
                self._text += data[at : min(stop, at + room)]
                if stop - at > room:
                    self._too_long(out)
                    at += room + 1
                    continue
            if stop < len(data):
                self._one(data[stop], out)
            at = stop + 1
        return out

    def _too_long(self, out: list[bytes | ParseError]) -> None:
        self._fail(out, f"JSON parse error, message of more than {self._most} bytes")

    def _one(self, byte: int, out: list[bytes | ParseError]) -> None:
        if self._quote:
            self._text.append(byte)
            if self._escaped:
                self._escaped = False
            elif byte == BACKSLASH:
                self._escaped = True
            elif byte == self._quote:
                self._quote = 0
            elif byte == NEWLINE:
                self._fail(out, "JSON parse error, stray newline in a string", skip=False)
        elif byte in OPEN:
            if not self._depth and self._text:
                self._word(out)
            self._depth += 1
            self._text.append(byte)
            if self._depth > self._deepest:
                self._fail(out, f"JSON parse error, nested deeper than {self._deepest} levels")
        elif byte in CLOSE:
            self._text.append(byte)
            self._depth -= 1
            if self._depth < 0:
                self._fail(out, f"JSON parse error, expecting value, not '{chr(byte)}'", skip=False)
            elif not self._depth:
                out.append(bytes(self._text))
                self._reset()
        elif not self._depth and byte in SPACE + b",":
            if self._text:
                self._word(out)
        elif byte in QUOTES and self._depth:
            self._quote = byte
            self._text.append(byte)
        else:
            self._text.append(byte)
        if len(self._text) > self._most:
            self._too_long(out)

    def _word(self, out: list[bytes | ParseError]) -> None:
        """Something at top level that is no object."""
        word = bytes(self._text).decode("utf-8", "replace")[:64]
        text = "".join(c if c.isprintable() else "?" for c in word)
        try:
            json.loads(word)
            self._fail(out, "QMP input must be a JSON object", skip=False)
        except (ValueError, RecursionError):
            self._fail(out, f"JSON parse error, invalid keyword '{text}'", skip=False)

    def _fail(self, out: list[bytes | ParseError], text: str, skip: bool = True) -> None:
        out.append(ParseError(text))
        self._reset()
        self._skipping = skip

    def _reset(self) -> None:
        self._text.clear()
        self._depth = self._quote = 0
        self._escaped = self._skipping = False


def _number(text: str) -> float:
    """What has no place in 64 bits is no integer to any command."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"number of {len(text)} digits")
    value = int(text)
    return value if -(1 << 63) <= value < 1 << 63 else float(value)


def _double_quoted(text: str) -> str:
    """QMP allows strings in single quotes; JSON does not."""
    if "'" not in text:
        return text
    out: list[str] = []
    quote = ""
    escaped = False
    for c in text:
        if not quote:
            if c in "\"'":
                quote, c = c, '"'
        elif escaped:
            escaped = False
            if c == "'":
                out.pop()
        elif c == "\\":
            escaped = True
        elif c == quote:
            quote, c = "", '"'
        elif c == '"':
            c = '\\"'
        out.append(c)
    return "".join(out)


def parse(text: bytes) -> dict[str, Any]:
    """One object out of its text. Raises `ParseError`."""
    try:
        value = json.loads(_double_quoted(text.decode()), parse_int=_number)
    except UnicodeDecodeError:
        raise ParseError("JSON parse error, invalid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ParseError(f"JSON parse error, {error.msg[0].lower()}{error.msg[1:]}") from None
    except (ValueError, RecursionError) as error:
        raise ParseError(f"JSON parse error, {error}") from None
    if not isinstance(value, dict):
        raise ParseError("QMP input must be a JSON object")
    return value


class Request:
    """A command that a client sent: its name, arguments, id, and whether out of band."""

    __slots__ = ("arguments", "command", "id", "oob")

    def __init__(self, command: str, arguments: dict[str, Any], id: Any, oob: bool) -> None:
        self.command = command
        self.arguments = arguments
        self.id = id
        self.oob = oob


def request(value: dict[str, Any]) -> Request:
    """The command in an object. Raises `ParseError` for members that do not belong."""
    for key in value:
        if key not in ("execute", "exec-oob", "arguments", "id", "control"):
            raise ParseError(f"QMP input member '{key}' is unexpected")
    if "execute" in value and "exec-oob" in value:
        raise ParseError("QMP input member 'execute' clashes with 'exec-oob'")
    oob = "exec-oob" in value
    name = value.get("exec-oob" if oob else "execute")
    if name is None:
        raise ParseError("QMP input lacks member 'execute'")
    if not isinstance(name, str):
        key = "exec-oob" if oob else "execute"
        raise ParseError(f"QMP input member '{key}' must be a string")
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ParseError("QMP input member 'arguments' must be an object")
    return Request(name, arguments, value.get("id"), oob)


def encode(value: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(value, separators=(", ", ": ")).encode() + b"\r\n"


def greeting(version: dict[str, Any]) -> bytes:
    """What a server says first."""
    return encode({"QMP": {"version": version, "capabilities": ["oob"]}})


def result(value: Any, id: Any = None) -> bytes:
    """The answer to a command."""
    out: dict[str, Any] = {"return": value}
    if id is not None:
        out["id"] = id
    return encode(out)


def error(problem: CowferryError, id: Any = None) -> bytes:
    """A refusal: class and words as QEMU's, and a hint of our own beside them."""
    body = {"class": problem.klass, "desc": problem.desc}
    if problem.hint:
        body["hint"] = problem.hint
    out: dict[str, Any] = {"error": body}
    if id is not None:
        out["id"] = id
    return encode(out)


def event(name: str, data: dict[str, Any]) -> bytes:
    """An event, stamped with the time now."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return encode({"timestamp": stamp, "event": name, "data": data})
