"""Who uses what: the tables of nodes and disks, and what jobs, commands and exports hold of them.

`Graph` is the rest: how nodes and disks come into these tables, and leave them.
"""

from __future__ import annotations

import threading
import time

from cowferry.block import keeper
from cowferry.block.disk import Disk
from cowferry.block.held import Held, refuse_floating, refuse_held
from cowferry.block.identity import Place
from cowferry.block.node import Node, chain
from cowferry.block.open_files import OpenFiles
from cowferry.block.reserved import Reserved
from cowferry.block.turn import Turn
from cowferry.block.walk import children, parents_first, parts
from cowferry.errors import CowferryError, DeviceInUse

GENERATED = "#block"  # how the names begin that nobody gave
COMMAND_SECONDS = 10.0  # that a command waits for another one that works on the same nodes


class Uses:
    """The tables. Thread-safe: `lock` guards all of them."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.lock = threading.RLock()
        self.freed = threading.Condition(self.lock)  # notified when a claim is released
        self.nodes: dict[str, Node] = {}
        self.disks: dict[str, Disk] = {}  # named by somebody
        self.bare: dict[str, Disk] = {}  # over a node that was added by itself, by node-name
        self.claims: dict[int, list[Held]] = {}  # by id(node): one, or several that share it
        self.locks: dict[int, str] = {}  # id(disk) -> why an administrator locked it
        self.users: dict[int, list[bool]] = {}  # id(disk) -> of each export, whether it writes
        self.files = OpenFiles()
        self.reserved = Reserved()  # for commands that are opening, making or closing something

    def all_disks(self) -> list[Disk]:
        """Every disk, bare ones too."""
        with self.lock:
            return [*self.disks.values(), *self.bare.values()]

    def every_node(self) -> list[Node]:
        """All nodes, those without a name of their own too."""
        with self.lock:
            return list(self.nodes.values())

    def disks_above(self, node: Node) -> list[Disk]:
        """Every disk that reads through `node`: in its chain, or below a node of it."""
        return [d for d in self.all_disks() if node in parents_first([d.root])]

    def written(self, node: Node) -> bool:
        """Whether an export writes to a disk over the node."""
        return any(any(self.users.get(id(d), [])) for d in self.all_disks() if d.root is node)

    def floats(self, node: Node) -> bool:
        """Whether it lies over a node that is being written, and nobody keeps what it showed.

        Such an overlay is there to become a backup's view of one moment. Until then it shows no
        moment at all, so nobody may use it."""
        with self.lock:
            if node.backing is None or self.keeps(node):
                return False
            return self.written(node.backing)

    def keeps(self, node: Node) -> bool:
        """Whether it shows what the node that it lies over was like at one moment."""
        with self.lock:
            return any(held.kept for held in self.holders(node))

    def called(self, node: Node) -> str:
        """What a person calls a node: by the name that somebody gave it, or as a disk or a file."""
        if node.name and not node.name.startswith(GENERATED):
            return f"Node '{node.name}'"
        with self.lock:
            disk = next((d.name for d in self.disks.values() if d.root is node), None)
        return f"Image '{node.filename}'" if disk is None else f"Disk '{disk}'"

    def short(self, node: Node) -> str:
        """As `called`, without the quotes and what kind of a thing it is."""
        return self.called(node).partition("'")[2][:-1]

    def holders(self, node: Node) -> list[Held]:
        """Who holds it: one, or several that share it."""
        with self.lock:
            return list(self.claims.get(id(node), ()))

    def await_commands(self, name: str) -> None:
        """Wait, without the caller's turn, until no other command works on the disk or node of that
        name or on what lies below it. A command waits before it looks at a disk, because the other
        one may be changing it.

        Raises `DeviceInUse` if that takes longer than `COMMAND_SECONDS`."""
        until = time.monotonic() + COMMAND_SECONDS
        while why := self._worked_on(name):
            left = until - time.monotonic()
            if left <= 0:
                raise DeviceInUse(
                    f"'{name}' is in use by another command, which has not finished within "
                    f"{COMMAND_SECONDS:g} s: {why}",
                    "its storage or its server may not answer; nothing was changed",
                )
            with self.turn.apart(), self.lock:
                if self._worked_on(name):
                    self.freed.wait(left)

    def _worked_on(self, name: str) -> str:
        """What another command does to the disk or node of that name; nothing: ""."""
        me = threading.get_ident()
        with self.lock:
            found = self.disks.get(name)
            nodes = list(chain(found.root if found is not None else self.nodes.get(name)))
            for held in (held for n in nodes for held in self.holders(n)):
                if held.brief and held.thread != me:
                    return held.why
            if any(self.reserved.bitmaps.get(id(n), me) != me for n in nodes):
                return "a change of its bitmaps"
            return ""

    def change_bitmaps(self, node: Node) -> None:
        """Keep other commands away from a node and its bitmaps, until `bitmaps_changed`.

        The caller has waited for other commands (`await_commands`) in its present turn."""
        with self.lock:
            self.reserved.bitmaps[id(node)] = threading.get_ident()

    def bitmaps_changed(self) -> None:
        """Undo every `change_bitmaps` of the calling thread."""
        with self.lock:
            mine = threading.get_ident()
            kept = {n: t for n, t in self.reserved.bitmaps.items() if t != mine}
            self.reserved.bitmaps = kept
            self.freed.notify_all()

    def claim(
        self,
        nodes: list[Node],
        why: str,
        holder: str = "",
        *,
        wanted: str = "",
        served: Node | None = None,
        kept: Node | None = None,
        shared: Node | None = None,
        brief: bool = True,
    ) -> None:
        """Hold nodes for a job (`holder` is its id) or for a command; all or none.

        Only `served` may be exported then, and `kept`, an overlay over it that goes on showing this
        moment, for reading. Others may hold `shared` as well, if it is what they share, too.

        `brief`: a command does not hold them for long, so that other commands wait for it
        (`await_commands`). Raises `DeviceInUse` naming who has one, and what is `wanted`, or the
        lock that an administrator set."""
        with self.lock:
            for node in nodes:
                self.check_free(node, wanted or why, node is kept, node is shared)
            thread = threading.get_ident()
            for node in nodes:
                held = Held(
                    node, why, holder, brief and not holder, thread,
                    node is served, node is kept, node is shared,
                )  # fmt: skip
                self.claims.setdefault(id(node), []).append(held)

    def check_free(
        self, node: Node, wanted: str, afloat: bool = False, sharing: bool = False
    ) -> None:
        """Raise `DeviceInUse` if the node is held, floats, or belongs to a locked disk."""
        with self.lock:
            for held in self.holders(node):
                if not (sharing and held.shared):
                    raise refuse_held(held, self.called(node), wanted)
            if not afloat and self.floats(node):
                raise self.refuse_floating(node, wanted)
            for disk in self.all_disks():
                reason = self.locks.get(id(disk))
                if reason is not None and any(n is node for n in chain(disk.root)):
                    raise DeviceInUse(
                        f"Disk '{disk.name}' is locked, which excludes {wanted}: {reason}",
                        f"cowferry unlock {disk.name}",
                    )

    def check_top(self, node: Node) -> None:
        """Raise `CowferryError` if any other node lies over `node`."""
        with self.lock:
            for other in self.nodes.values():
                for role, child in children(other):
                    if child is node:
                        what = "backing hd" if role == "backing" else role
                        raise CowferryError(
                            f"{self.called(node)} is busy: node is used as {what} of "
                            f"'{self.short(other)}'"
                        )

    def refuse_floating(self, node: Node, wanted: str) -> DeviceInUse:
        """The refusal of what is `wanted` of an overlay over a node that is being written."""
        below = self.short(node.backing) if node.backing is not None else ""
        return refuse_floating(self.called(node), below, wanted)

    def check_sole(self, node: Node, wanted: str) -> None:
        """Raise `DeviceInUse` if another open node lies over bytes of `node` under another name: it
        would see what is about to be written there."""
        with self.lock:
            files = [n for n in (node, *parts(node)) if n.file is None]
            self.files.check_sole(self.called(node), files, wanted, self._user)

    def check_unused(self, path: str, places: list[Place]) -> None:
        """Raise `DeviceInUse` if the file or device at `path` is open, by whatever name. Its bytes
        are in `places`."""
        with self.lock:
            self.files.check_unused(path, places, self._user)

    def _user(self, node: Node) -> str:
        """Who has a node open, in words."""
        disks = [f"'{disk.name}'" for disk in self.disks_above(node) if disk.name in self.disks]
        if disks:
            return f"in use by disk {' and '.join(disks)}"
        above = [over for over in self.nodes.values() if node in parents_first([over])]
        for held in (held for over in above for held in self.holders(over)):
            return f"in use by {held.user}"
        for over in above:
            if not over.name.startswith(GENERATED):
                return f"in use by node '{over.name}'"
        return "in use by another node" if node.name else "in use by the same chain"

    def check_idle(self, node: Node) -> None:
        """Raise `CowferryError` if any node, disk or export lies over `node`."""
        with self.lock:
            self.check_top(node)
            if self.exported(node) or any(d.root is node for d in self.disks.values()):
                raise CowferryError(f"Block device {self.short(node)} is in use")

    def release(self, nodes: list[Node], why: str, holder: str = "") -> None:
        """Undo `claim`. Nodes that somebody else holds by now are left alone."""
        with self.lock:
            for node in nodes:
                left = [h for h in self.holders(node) if (h.why, h.holder) != (why, holder)]
                if left:
                    self.claims[id(node)] = left
                else:
                    self.claims.pop(id(node), None)
            self.freed.notify_all()

    def hold(self, disk: Disk, writable: bool) -> None:
        """An export begins to use a disk. Raises `CowferryError` if it must not, or not write."""
        with self.lock:
            for held in self.holders(disk.root):
                # What a job fills has no gate of ours around it; and no second writer comes in
                # while one works on the disk.
                if not held.served and (writable or not held.kept):
                    raise refuse_held(held, self.called(disk.root), "an export")
                if writable and any(self.users.get(id(disk), [])):
                    raise refuse_held(held, self.called(disk.root), "a second export for writing")
            floating = next((n for n in chain(disk.root) if self.floats(n)), None)
            if floating is not None:
                raise self.refuse_floating(floating, "an export")
            if writable:
                keeper.check_bypass(disk.root)
            for other in self.nodes.values():
                for role, child in children(other):
                    if child is not disk.root or self.keeps(other):
                        continue
                    if writable:
                        raise CowferryError(
                            f"Conflicts with use by '{self.short(other)}' as '{role}', which does "
                            f"not allow 'write' on '{self.short(child)}'",
                            "export it read-only, or export the node above it",
                        )
                    if role != "backing" and child.file is not None and not other.read_only:
                        raise CowferryError(
                            f"Conflicts with use by '{self.short(other)}' as '{role}', which "
                            f"writes '{self.short(child)}'",
                            "export the node above it",
                        )
            self.users.setdefault(id(disk), []).append(writable)

    def unhold(self, disk: Disk, writable: bool) -> None:
        """Undo `hold`."""
        with self.lock:
            left = self.users.get(id(disk), [])
            if writable in left:
                left.remove(writable)
            if not left:
                self.users.pop(id(disk), None)

    def exported(self, node: Node) -> bool:
        """Whether an export serves a disk over the node."""
        return any(d.root is node and self.users.get(id(d)) for d in self.all_disks())
