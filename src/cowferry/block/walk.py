"""Walking the nodes: the children of one, its parts, its filters, and an order for all of them."""

from __future__ import annotations

from collections.abc import Iterator

from cowferry.block.node import Node


def children(node: Node) -> list[tuple[str, Node]]:
    """(role, node) of each child."""
    out: list[tuple[str, Node]] = []
    if node.file is not None:
        out.append(("file", node.file))
    data = getattr(node, "data", None)
    if isinstance(data, Node) and data is not node.file:
        out.append(("data-file", data))
    if node.backing is not None:
        out.append(("backing", node.backing))
    return out


def filters(node: Node | None) -> Iterator[Node]:
    """The filters that a node consists of, from the topmost on; none, if it is another node."""
    while node is not None and node.filter:
        yield node
        node = node.file


def parts(node: Node) -> Iterator[Node]:
    """What a node is made of, down to the protocol: all below it but its backing."""
    for role, child in children(node):
        if role != "backing":
            yield child
            yield from parts(child)


def parents_first(nodes: list[Node]) -> list[Node]:
    """The nodes in an order in which nobody comes after its own child."""
    out: list[Node] = []
    seen: set[int] = set()
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, done = stack.pop()
            if done:
                out.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((child, False) for _, child in children(node))
    return out[::-1]
