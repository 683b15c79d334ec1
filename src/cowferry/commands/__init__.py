"""Commands: what a monitor can be asked, typed.

A command is a function `(daemon, args) -> result` under a QMP name; its arguments are a msgspec
struct, and the checks, the texts of the errors and the schema all come from that struct's fields.
A new command is one decorated function in a module of this package that is named in `MODULES`.
Events are declared the same way, as structs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from cowferry.errors import CommandNotFound, CowferryError, one_line

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

MODULES = (
    "monitor", "block", "disks", "jobs", "stream", "commit", "mirror", "transaction", "snapshot",
    "bitmaps", "backup", "change", "groups", "descriptors", "exports", "legacy",
    "throttle", "objects",
)  # fmt: skip


class Args(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The arguments of a command; subclass it with typed fields."""


class NoArgs(Args):
    """A command without arguments."""


class Command(NamedTuple):
    """One command: its name, its function, and the types of what goes in and out."""

    name: str
    run: Callable[[Daemon, Any], Any]
    args: type[Args]
    returns: Any  # a type, for the schema
    help: str
    locked: bool  # runs in its turn: no other command looks at the graph meanwhile


COMMANDS: dict[str, Command] = {}
EVENTS: dict[str, type[msgspec.Struct]] = {}

F = TypeVar("F", bound=Callable[..., Any])
E = TypeVar("E", bound=type[msgspec.Struct])


def command(name: str, locked: bool = True) -> Callable[[F], F]:
    """Register a function as a QMP command. Its second parameter's annotation gives the types.

    A `locked` command runs in its turn (`Daemon.turn`), and gives it away whenever it waits for
    storage, a server or guests (`Daemon.apart`). A command that is not `locked` only looks, or
    takes its turn itself."""

    def keep(function: F) -> F:
        hints = typing.get_type_hints(function, localns={"Daemon": Any})
        kinds = [k for n, k in hints.items() if n not in ("return", "daemon")]
        COMMANDS[name] = Command(
            name,
            function,
            kinds[0] if kinds else NoArgs,
            hints.get("return"),
            (function.__doc__ or "").strip().split("\n")[0],
            locked,
        )
        return function

    return keep


def event(name: str) -> Callable[[E], E]:
    """Register a struct as the data of an event."""

    def keep(struct: E) -> E:
        EVENTS[name] = struct
        return struct

    return keep


def load() -> None:
    """Import every module of commands. Done once, when a monitor first needs them."""
    for module in MODULES:
        importlib.import_module(f"cowferry.commands.{module}")


def execute(daemon: Daemon, name: str, arguments: Mapping[str, Any]) -> Any:
    """Run one command with arguments as they came off the wire. Raises `CowferryError`."""
    load()
    found = COMMANDS.get(name)
    if found is None:
        raise CommandNotFound(f"The command {name} has not been found")
    args = convert(found.args, arguments)
    try:
        with daemon.turn() if found.locked else contextlib.nullcontext():
            result = found.run(daemon, args)
    except ValueError:  # as the system refuses such a name
        check_names(arguments)
        raise
    return {} if result is None else msgspec.to_builtins(result)


def check_names(value: Any) -> None:
    """Raise `CowferryError` if a string in `value` can be no name of a file: it has a NUL, or a
    character that cannot be encoded."""
    if isinstance(value, str):
        try:
            bad = b"\0" in os.fsencode(value)
        except UnicodeEncodeError:
            bad = True
        if bad:
            raise CowferryError(f"'{one_line(value)}' cannot be the name of a file")
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            check_names(part)


def convert(kind: type[Args], arguments: Mapping[str, Any]) -> Args:
    """Typed arguments. Raises `CowferryError` in QMP's words."""
    try:
        return msgspec.convert(dict(arguments), kind)
    except msgspec.ValidationError as error:
        raise CowferryError(in_words(str(error), kind, arguments)) from None


TYPES = {
    "str": "string",
    "int": "integer",
    "bool": "boolean",
    "object": "object",
    "array": "array",
    "float": "number",
}


def in_words(text: str, kind: type[Args], arguments: Mapping[str, Any]) -> str:
    """QMP's text for one of msgspec's."""
    path = re.search(r"at `\$\.?([^`]*)`", text)
    where = path[1] if path else ""
    if found := re.match(r"Object contains unknown field `([^`]*)`", text):
        name = f"{where}.{found[1]}" if where else found[1]
        return f"Parameter '{name}' is unexpected"
    if found := re.match(r"Object missing required field `([^`]*)`", text):
        name = f"{where}.{found[1]}" if where else found[1]
        return f"Parameter '{name}' is missing"
    if found := re.match(r"Invalid enum value '?([^']*)'?", text):
        return f"Parameter '{where}' does not accept value '{found[1]}'"
    if found := re.match(r"Expected `([^`]*)`", text):
        wanted = found[1].split(" | ")[0]
        return f"Invalid parameter type for '{where}', expected: {TYPES.get(wanted, wanted)}"
    return f"Parameter '{where}': {text}"
