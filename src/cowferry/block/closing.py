"""Closing nodes, of which some may lie on storage, or on a server, that does not answer.

Nodes that hang together (a chain, and all chains that share a node with it) are closed in an order
in which every format is flushed before the file that holds it. Each such set has a thread of its
own, so one that hangs keeps no other from being closed. As long as nothing hangs, one set is closed
after another. In the second half of the time none waits for another any more, so that those which
do not hang are closed, however many hang.
"""

from __future__ import annotations

import math
import threading
import time

from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.block.scope import CalledOff, Scope
from cowferry.block.walk import children
from cowferry.errors import CowferryError

MOMENT = 1.0  # seconds that the next set waits at most for the one before
WAIT_SECONDS = 30.0  # for requests in flight, and for a server, at most


class Closing(threading.Thread):
    """One set of nodes, parents first, and the disks over them."""

    def __init__(self, nodes: list[Node], disks: list[Disk], seconds: float) -> None:
        super().__init__(name="close", daemon=True)
        self.nodes, self.disks, self.seconds = nodes, disks, min(seconds, WAIT_SECONDS)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._close()
        except BaseException as error:  # told by the thread that waits for us
            self.error = self.error or error

    def _close(self) -> None:
        idle = True
        for disk in self.disks:
            try:
                with Scope(self.seconds, f"requests on disk '{disk.name}' have not finished"):
                    disk.retire()
            except CalledOff as error:
                idle, self.error = False, self.error or error
        formats = [n for n in self.nodes if n.file is not None and not n.read_only]
        # A child's close is idempotent: its parent may have closed it. A descriptor that a request
        # still uses stays open, because its number might become another file's.
        closes = [n.close for n in self.nodes] if idle else []
        for step in (*(n.flush for n in formats), *closes):
            try:
                with Scope(self.seconds, "a server has not answered"):
                    step()
            except (OSError, CowferryError) as error:
                self.error = self.error or error

    def __str__(self) -> str:
        named = [f"disk '{d.name}'" for d in self.disks]
        return " and ".join(named) or f"node '{self.nodes[0].filename or self.nodes[0].name}'"


def close_all(nodes: list[Node], disks: list[Disk], seconds: float) -> list[str]:
    """Flush and close `nodes`, parents first, and retire `disks` before.

    Return what has not been closed within `seconds`, in words. Raise the first error after all were
    tried."""
    until, alone = time.monotonic() + seconds, time.monotonic() + seconds / 2
    threads: list[Closing] = []
    for group in together(nodes):
        over = [d for d in disks if any(d.root is n for n in group)]
        threads.append(Closing(group, over, seconds))
        threads[-1].start()
        threads[-1].join(max(min(MOMENT, alone - time.monotonic()), 0))
    for thread in threads:
        thread.join(None if seconds == math.inf else max(until - time.monotonic(), 0))
    late = [str(thread) for thread in threads if thread.is_alive()]
    for thread in threads:
        if thread.error is not None and not thread.is_alive():
            raise thread.error
    return late


def together(nodes: list[Node]) -> list[list[Node]]:
    """The nodes in sets of those that are each other's children, in the given order."""
    head = {id(n): id(n) for n in nodes}

    def find(key: int) -> int:
        while head[key] != key:
            head[key] = key = head[head[key]]
        return key

    for node in nodes:
        for _, child in children(node):
            if id(child) in head:
                head[find(id(child))] = find(id(node))
    groups: dict[int, list[Node]] = {}
    for node in nodes:
        groups.setdefault(find(id(node)), []).append(node)
    return list(groups.values())
