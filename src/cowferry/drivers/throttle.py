"""The throttle filter: a name for limits on top of a node. It passes everything on.

Who limits is the disk: it takes the limits of the group named here when it is put over this node,
and keeps them whatever its root is later. So leases still lead straight to the file, and no request
waits inside a gate. Filters may lie over each other: the disk keeps to the limits of each. Below
any other node the filter would limit nobody, and is refused there (`opening.py`).

To the rest of the house it is the node below: its format, its backing, its bitmaps. Only its name
and `filter` are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cowferry.block.node import Node
from cowferry.drivers import Common, register
from cowferry.drivers.plan import Plan
from cowferry.errors import CowferryError


@register("throttle")
class Throttle(Node):
    """What lies over it keeps to the limits of `throttle_group`. As thread-safe as its file."""

    class Options(Common, kw_only=True, rename="kebab"):
        """QMP: BlockdevOptionsThrottle."""

        throttle_group: str

    filter = "throttle"
    file: Node

    def __init__(self, file: Node, group: str) -> None:
        self.file = file
        self.throttle_group = group

    @classmethod
    def open(cls, options: Throttle.Options, children: Mapping[str, Node]) -> Throttle:
        """A filter over `file`. Raises `CowferryError` if there is none."""
        if "file" not in children:
            raise CowferryError("A block device must be specified for 'file'")
        return cls(children["file"], options.throttle_group)

    @classmethod
    def plan(cls, path: str, size: int, options: Mapping[str, Any]) -> Plan:
        """There is no such image."""
        raise CowferryError("Driver 'throttle' does not support image creation")

    def close(self) -> None:
        """Close the node below if it is ours."""
        if "file" not in self.lent:
            self.file.close()
        elif not self.read_only:
            self.file.flush()

    def __getattr__(self, name: str) -> Any:
        """What only the format below has."""
        if name == "file":  # not there yet
            raise AttributeError(name)
        return getattr(self.file, name)


class _Passed:
    """An attribute or a method of the node below."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, node: Throttle | None, owner: type) -> Any:
        return getattr(Node if node is None else node.file, self.name)

    def __set__(self, node: Throttle, value: Any) -> None:
        setattr(node.file, self.name, value)


OWN = {"name", "file", "lent", "filter", "throttle_group", "close"}
OWN |= {"ignores_discard", "detects_zeroes"}

for _name in {*vars(Node), *Node.__annotations__} - OWN:
    if not _name.startswith("__"):
        setattr(Throttle, _name, _Passed(_name))
