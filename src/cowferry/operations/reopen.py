"""Changing nodes that are in use: access, backing, file, and the backing name in a header."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowferry.block import keeper, moves
from cowferry.block.disk import Disk, in_order
from cowferry.block.moves import Move
from cowferry.block.node import Node, chain
from cowferry.block.walk import children
from cowferry.errors import CowferryError, NotSupported
from cowferry.operations import find, wait_for_disk

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

STEP = 1 << 20


def reopen(daemon: Daemon, options: list[dict[str, Any]]) -> None:
    """blockdev-reopen: all of them or none, under a drain of every disk above."""
    graph = daemon.graph
    for given in options:
        if isinstance(given.get("node-name"), str):
            wait_for_disk(daemon, given["node-name"])
    taken: list[Node] = []  # nodes that take the place of a child
    plans = [_plan(daemon, given, taken) for given in options]
    nodes = [node for node, _ in plans]
    left = {id(n): n.filename for n in nodes}
    replaced = [c for node in nodes for c in (node.backing, node.file) if c is not None]
    why = "blockdev-reopen"
    claimed = [*nodes, *(n for n in dict.fromkeys(taken) if n not in nodes)]
    graph.claim(claimed, why)
    try:
        disks = in_order(d for node in nodes for d in graph.disks_above(node))
        with daemon.graph.turn.apart():
            _reopen(plans, disks, left)
    except OSError as error:
        raise CowferryError(
            f"cannot reopen: {error.strerror or error}", "every node is as it was"
        ) from error
    finally:
        graph.release(claimed, why)
    for child in replaced:
        graph.detached(child, None)  # closed, with what is below it, unless somebody uses it


Steps = list[tuple[Callable[[], None], Callable[[], None]]]  # (do, undo) of each


def _reopen(plans: list[tuple[Node, Steps]], disks: list[Disk], left: dict[int, str]) -> None:
    """Take all steps, or none, under a drain of `disks`. `left`: the file of each node, by id.

    Raises `OSError`, `CowferryError`."""
    undo: list[Callable[[], None]] = []
    with ExitStack() as drained:
        for disk in disks:
            drained.enter_context(disk.exclusive())
        try:
            for _, steps in plans:
                for do, back in steps:
                    do()
                    undo.append(back)
            moving = [
                Move(d.name, left[id(n)], n.filename, n.driver)
                for n, _ in plans
                for d in disks
                if d.root is n and n.filename != left[id(n)]
            ]
            if moving:
                moves.record(moving)
        except BaseException:
            for back in reversed(undo):
                back()
            raise


def _plan(daemon: Daemon, given: Mapping[str, Any], taken: list[Node]) -> tuple[Node, Steps]:
    """What is to be done to one node, as (do, undo) pairs. Add the nodes that become its children
    to `taken`. Raises `CowferryError`."""
    graph = daemon.graph
    name = given.get("node-name")
    if not isinstance(name, str):
        raise CowferryError("node-name not specified")
    node = graph.node(name)
    kind = node.filter or node.driver
    if given.get("driver") != kind:
        raise CowferryError("Cannot change the option 'driver'", f"'{name}' is {kind}")
    steps: Steps = []
    if node.throttle_group:
        steps += _throttle_group(daemon, node, given)
    elif node.backing is not None and "backing" not in given:
        raise CowferryError(f"backing is missing for '{name}'")
    if "backing" in given:
        steps += _backing(daemon, node, given["backing"], taken)
    if "file" in given and not node.throttle_group:
        steps += _file(daemon, node, given["file"], taken)
    read_only = given.get("read-only", False) in (True, "on")
    if read_only != node.read_only:
        was = node.read_only
        if read_only and any(w for d in graph.all_disks() if d.root is node
                             for w in graph.users.get(id(d), [])):  # fmt: skip
            raise CowferryError(f"'{name}' is in use by a writable export")
        if not read_only:
            graph.check_sole(node, "blockdev-reopen")
        else:
            for other in graph.every_node():
                for role, child in children(other):
                    if child is node and role != "backing" and not other.read_only:
                        raise CowferryError(
                            f"'{name}' is in use by '{graph.short(other)}' as '{role}', which "
                            "writes",
                            f"reopen '{graph.short(other)}' instead",
                        )
        steps.append((lambda: node.reopen(read_only), lambda: node.reopen(was)))
    return node, steps


def _throttle_group(daemon: Daemon, node: Node, given: Mapping[str, Any]) -> Steps:
    """What is a throttle node's own; its disks move along."""
    graph = daemon.graph
    wanted = given.get("throttle-group")
    if not isinstance(wanted, str):
        raise CowferryError("Parameter 'throttle-group' is missing")
    if wanted not in graph.groups:
        raise CowferryError(f"Throttle group '{wanted}' does not exist")
    assert node.file is not None
    file = given.get("file", node.file.name)
    if (file.get("node-name") if isinstance(file, Mapping) else file) != node.file.name:
        raise NotSupported(f"the 'file' of throttle node '{node.name}' cannot be replaced")
    if "backing" in given:
        raise CowferryError(f"'{node.name}' is a throttle node, which has no backing")
    old = node.throttle_group

    def put(name: str, before: str) -> None:
        node.throttle_group = name
        for disk in graph.disks_above(node):
            member = next((m for m in disk.members if m.group is graph.groups[before]), None)
            if member is not None:
                member.move(graph.groups[name])

    return [(lambda: put(wanted, old), lambda: put(old, wanted))]


def _backing(daemon: Daemon, node: Node, wanted: Any, taken: list[Node]) -> Steps:
    if wanted is not None and not isinstance(wanted, str):
        raise NotSupported("'backing' can only be replaced by a node-name or null")
    old = node.backing
    new = find(daemon, wanted) if wanted is not None else None
    if new is old:
        return []
    if new is not None and any(n is node for n in chain(new)):
        raise CowferryError(
            f"Making '{wanted}' a backing child of '{node.name}' would create a cycle"
        )
    if node.driver in ("raw", "file", "nbd"):
        raise CowferryError(f"'{node.driver}' nodes have no backing")
    if new is not None:
        graph = daemon.graph
        graph.check_free(new, "blockdev-reopen")
        if any(w for d in graph.all_disks() if d.root is new for w in graph.users.get(id(d), [])):
            raise CowferryError(
                f"Node '{wanted}' is in use by a writable export",
                "what lies below another node must not change",
            )
        taken.append(new)

    def put(to: Node | None) -> None:
        node.backing = to

    return [(lambda: put(new), lambda: put(old))]


def _file(daemon: Daemon, node: Node, wanted: Any, taken: list[Node]) -> Steps:
    if isinstance(wanted, Mapping):
        wanted = wanted.get("node-name", wanted.get("filename"))
        if node.file is not None and wanted in (node.file.name, node.file.filename):
            return []
    if node.file is None or not isinstance(wanted, str):
        raise NotSupported("'file' can only be replaced by a node-name")
    old = node.file
    if wanted == old.name:
        return []
    new = find(daemon, wanted)
    daemon.graph.check_idle(new)
    daemon.graph.check_free(new, "blockdev-reopen")
    if new.read_only and not node.read_only:
        raise CowferryError(f"Block node is read-only: '{wanted}'", "open it for writing")
    if node.driver != "raw" or getattr(node, "start", False) or new.size < node.size:
        raise NotSupported(
            f"'{node.name}': only a raw node's file can be replaced, by one as large",
            "open the other image as a node of its own, and use change",
        )

    if node.keeper is not None or keeper.there(new.filename):
        raise NotSupported(
            f"'{node.name}': a file with persistent bitmaps neither is replaced nor replaces one",
            "open the other image as a node of its own, and use change",
        )

    taken.append(new)

    def put(to: Node) -> None:
        assert node.file is not None
        node.file.flush()
        node.file = to
        node.filename = to.filename

    return [(lambda: put(new), lambda: put(old))]
