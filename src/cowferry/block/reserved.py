"""What commands have reserved while they open, make or close something outside of all locks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cowferry.block.node import Node
from cowferry.errors import CowferryError, DeviceInUse


class Reserved:
    """Names, paths and nodes. The graph's lock guards all of it."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # of nodes and disks -> "opened" or "closed"
        self.paths: dict[str, int] = {}  # of files being made -> the thread of that command
        self.pins: Counter[int] = Counter()  # id(node) -> how many nodes are being opened over it
        self.bitmaps: dict[
            int, int
        ] = {}  # id(node) -> the thread whose command changes its bitmaps

    def check_name(self, name: str) -> None:
        """Raise `CowferryError` if a command is opening or closing a node or disk of that name."""
        if name in self.names:
            raise CowferryError(
                f"Duplicate nodes with node-name='{name}'",
                f"'{name}' is being {self.names[name]} by another command, which waits for its "
                "storage or server; nothing was changed",
            )

    def check_path(self, path: str) -> None:
        """Raise `DeviceInUse` if another command is making the file. `path` has no links in it."""
        if self.paths.get(path, threading.get_ident()) != threading.get_ident():
            raise DeviceInUse(
                f"'{path}' is being made by another command",
                "wait until that command is over, or choose another file",
            )

    def keep(self, nodes: list[Node]) -> None:
        """Nodes are being opened over these: they stay."""
        self.pins.update(id(n) for n in nodes)

    def let_go(self, nodes: list[Node]) -> None:
        """Undo `keep`."""
        self.pins.subtract(id(n) for n in nodes)
        self.pins += Counter()  # without those that nobody keeps

    def keeps(self, node: Node) -> bool:
        """Whether a node is being opened over it."""
        return self.pins[id(node)] > 0


def references(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(role, node-name) of each child that blockdev-add's options give by name, at any depth."""
    for key in ("file", "backing", "data-file"):
        child = options.get(key)
        if isinstance(child, Mapping):
            yield from references(child)
        elif isinstance(child, str) and child:
            yield key, child


def filenames(options: Mapping[str, Any]) -> Iterator[str]:
    """The host files that blockdev-add's options name, at any depth."""
    for value in options.values():
        if isinstance(value, Mapping):
            yield from filenames(value)
    filename = options.get("filename")
    if isinstance(filename, str):
        yield filename
