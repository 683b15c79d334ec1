"""The local files and devices of all nodes that are open or are being opened, by their storage.

A file's locks do not say that two nodes lie over the same bytes: a loop device has none of the
locks of its file. So each protocol node is noted here as soon as it is open, and before a format is
opened over it, which may write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cowferry.block import identity
from cowferry.block.identity import Place
from cowferry.block.node import Node
from cowferry.errors import DeviceInUse

User = Callable[[Node], str]  # who has a node open, in words


class OpenFiles:
    """The protocol nodes by the storage in which they lie. The graph's lock guards all of it."""

    def __init__(self) -> None:
        self._index: identity.Index[Node] = identity.Index()
        self._places: dict[int, Sequence[Place]] = {}  # by id(node)

    def add(self, node: Node, places: Sequence[Place], user: User) -> None:
        """Note a node. Raise `DeviceInUse` instead if it lies over bytes of another node, by
        whatever name, and one of the two writes."""
        for mine, theirs, other in self._index.find(places):
            reading = node.read_only and other.read_only
            if not (reading or node.shares or other.shares):
                raise DeviceInUse(
                    f"cannot open '{node.filename}': {_met(node, mine, other, theirs, user)}",
                    "nothing was changed; two nodes that write the same bytes would damage them",
                )
        self._index.add(places, node)
        self._places[id(node)] = places

    def discard(self, nodes: Iterable[Node]) -> None:
        """The nodes are closed."""
        for node in nodes:
            self._index.discard(self._places.pop(id(node), ()), node)

    def check_sole(self, whose: str, files: list[Node], wanted: str, user: User) -> None:
        """Raise `DeviceInUse` if another node lies over bytes of the `files` of a node, which is
        called `whose`, under another name: it would see what is about to be written there."""
        for file in files:
            for mine, theirs, other in self._index.find(self._places.get(id(file), ())):
                if not any(other is f for f in files) and not other.shares:
                    raise DeviceInUse(
                        f"{whose} is busy, which excludes {wanted}: "
                        f"{_met(file, mine, other, theirs, user)}",
                        "nothing was changed; a write to one of the two would change the other",
                    )

    def check_unused(self, path: str, places: list[Place], user: User) -> None:
        """Raise `DeviceInUse` if a node lies over bytes of the file or device at `path`, which are
        in `places`."""
        for mine, theirs, other in self._index.find(places):
            over = identity.Layer(other.filename, user(other), other.places())
            raise DeviceInUse(
                f"{identity.connection(path, mine, over, theirs)}", "nothing was changed"
            )


def _met(node: Node, mine: Place, other: Node, theirs: Place, user: User) -> str:
    over = identity.Layer(other.filename, user(other), other.places())
    return identity.connection(node.filename, mine, over, theirs)
