"""query-qmp-schema: QAPI introspection made from the types of commands and events.

Builtin types keep their names; all others are numbered, as QEMU masks its own, for a client is
to follow references, not to know names.
"""

from __future__ import annotations

import types
import typing
from enum import Enum
from typing import Any, Literal

import msgspec

from cowferry import commands

BUILTIN = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
    type(None): ("null", "null"),
}


class Schema:
    """Collects entries; each type is described once."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.names: dict[Any, str] = {}
        for name, json in {**dict(BUILTIN.values()), "any": "value"}.items():
            self.entries.append({"name": name, "meta-type": "builtin", "json-type": json})

    def name(self, key: Any) -> tuple[str, bool]:
        """The masked name of a type, and whether it is new."""
        if key in self.names:
            return self.names[key], False
        self.names[key] = str(len(self.names))
        return self.names[key], True

    def named(self, kind: Any) -> str:
        """The name of a Python type in the schema."""
        origin = typing.get_origin(kind)
        if kind in BUILTIN:
            return BUILTIN[kind][0]
        if origin in (typing.Union, types.UnionType):
            members = [k for k in typing.get_args(kind) if k is not type(None)]
            return self.named(members[0]) if len(members) == 1 else self.alternate(members)
        if origin is list:
            element = self.named(typing.get_args(kind)[0])
            name = f"[{element}]"
            if name not in self.names:
                self.names[name] = name
                self.entries.append({"name": name, "meta-type": "array", "element-type": element})
            return name
        if origin is Literal:
            return self.enum(tuple(typing.get_args(kind)))
        if isinstance(kind, type) and issubclass(kind, Enum):
            return self.enum(tuple(m.value for m in kind))
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.struct(kind)
        return "any"

    def alternate(self, members: list[Any]) -> str:
        """A value of one of several types."""
        name, new = self.name(("alternate", tuple(map(str, members))))
        if new:
            self.entries.append(
                {"name": name, "meta-type": "alternate",
                 "members": [{"type": self.named(m)} for m in members]}
            )  # fmt: skip
        return name

    def enum(self, values: tuple[str, ...]) -> str:
        """One of several words."""
        name, new = self.name(("enum", values))
        if new:
            self.entries.append(
                {"name": name, "meta-type": "enum", "values": list(values),
                 "members": [{"name": v} for v in values]}
            )  # fmt: skip
        return name

    def struct(self, kind: type[msgspec.Struct]) -> str:
        """An object; a member with a default is optional, and says so by `default: null`."""
        name, new = self.name(kind)
        if new:
            members = []
            for field in msgspec.structs.fields(kind):
                member: dict[str, Any] = {
                    "name": field.encode_name,
                    "type": self.named(field.type),
                }
                if not field.required:
                    member["default"] = None
                members.append(member)
            self.entries.append({"name": name, "meta-type": "object", "members": members})
        return name

    def empty(self) -> str:
        """The object without members."""
        return self.struct(commands.NoArgs)

    def driver_options(self) -> str:
        """BlockdevOptions: an object whose further members depend on `driver`."""
        from cowferry import drivers

        name, new = self.name("BlockdevOptions")
        if new:
            cases = []
            for driver in drivers.MODULES:
                options = drivers.driver(driver).Options
                cases.append({"case": driver, "type": self.struct(options)})
            members = [
                {"name": "driver", "type": self.enum(tuple(drivers.MODULES))},
                {"name": "node-name", "type": "str", "default": None},
                {"name": "read-only", "type": "bool", "default": None},
                {"name": "auto-read-only", "type": "bool", "default": None},
                {"name": "force-share", "type": "bool", "default": None},
            ]
            self.entries.append(
                {"name": name, "meta-type": "object", "members": members, "tag": "driver",
                 "variants": cases}
            )  # fmt: skip
        return name


def schema() -> list[dict[str, Any]]:
    """Everything that is registered, as query-qmp-schema returns it."""
    commands.load()
    out = Schema()
    for name, c in sorted(commands.COMMANDS.items()):
        plain = isinstance(c.args, type) and issubclass(c.args, msgspec.Struct)
        returns = c.returns
        out.entries.append(
            {
                "name": name,
                "meta-type": "command",
                "arg-type": out.struct(c.args) if plain else out.driver_options(),
                "ret-type": out.empty() if returns in (None, type(None)) else out.named(returns),
                "allow-oob": False,
            }
        )
    for name, struct in sorted(commands.EVENTS.items()):
        out.entries.append({"name": name, "meta-type": "event", "arg-type": out.struct(struct)})
    return out.entries
