"""Dirty bitmaps by name: who may do what to them, at which moment.

Each change is a part of a transaction, alone or with others, and takes effect inside a drain of
every disk that can change the node: so a bitmap that is added, or cleared, in the same transaction
as a snapshot or a backup tells exactly what has changed since *that* moment, on all of the disks.
What is looked at, in which order, and the words are QEMU's.

A persistent bitmap is durably what the command made it before the command is answered. Several
changes of one node are stored at once, by the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowferry.block import keeper
from cowferry.block.bitmap import MAX_BYTES, Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node, chain
from cowferry.block.walk import children
from cowferry.errors import CowferryError
from cowferry.operations.transaction import Part, Transaction

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

MAX_NAME = 1023  # bytes
MIN_GRANULARITY, MAX_GRANULARITY = 512, 1 << 31
FEW = 20  # names that an error tells
# The default granularity in bytes is a cluster, but no finer (it is not worth its memory unless it
# is asked for) and no coarser (a backup would copy what nobody wrote).
LEAST_DEFAULT, MOST_DEFAULT = 4096, 64 << 10

#: A bitmap of the node at hand by its name, or of another node: (node, name).
Named = str | tuple[str, str]


# Names ------------------------------------------------------------------------------------


def node_of(daemon: Daemon, name: str, so_far: Transaction | None = None) -> Node | None:
    """The node of that name, or the root that the disk of that name has after the parts so far.

    A filter has the bitmaps of the node below it."""
    with daemon.graph.lock:
        disk = daemon.graph.disks.get(name)
        node = daemon.graph.nodes.get(name)
    if disk is not None:
        node = disk.root if so_far is None else so_far.root(disk)
    return None if node is None else unfiltered(node)


def unfiltered(node: Node) -> Node:
    """The node below all filters."""
    while node.filter and node.file is not None:
        node = node.file
    return node


def find(node: Node, name: str, so_far: Transaction | None = None) -> Bitmap | None:
    """The node's bitmap of that name, there already or about to be added."""
    if name in node.bitmaps:
        return node.bitmaps[name]
    for part in so_far.parts if so_far is not None else []:
        if isinstance(part, Add) and part.node is node and part.bitmap.name == name:
            return part.bitmap
    return None


def look_up(
    daemon: Daemon, node_name: str, name: str, so_far: Transaction | None = None
) -> tuple[Node, Bitmap]:
    """The bitmap that two names mean, and its node. Raises `CowferryError`."""
    node = node_of(daemon, node_name, so_far)
    if node is None:
        raise CowferryError(f"Node '{node_name}' not found")
    bitmap = find(node, name, so_far)
    if bitmap is None:
        raise not_found(f"Dirty bitmap '{name}' not found", [node])
    return node, bitmap


def not_found(desc: str, nodes: list[Node]) -> CowferryError:
    """The error, with the names that there are."""
    names = sorted({name for node in nodes for name in node.bitmaps})
    shown = ", ".join(names[:FEW]) + (f", and {len(names) - FEW} more" if names[FEW:] else "")
    return CowferryError(desc, f"there are: {shown}" if names else "there is none")


def check_usable(
    node: Node, bitmap: Bitmap, *, changing: bool = False, broken: bool = False
) -> None:
    """Raise `CowferryError` for a bitmap that somebody uses, that is `broken` unless that is all
    right, or (if it is to be `changing`) that lies in an image opened read-only."""
    name = bitmap.name
    if bitmap.busy:
        raise CowferryError(
            f"Bitmap '{name}' is currently in use by another operation and cannot be used",
            f"{bitmap.busy} has it",
        )
    if changing and bitmap.persistent and node.read_only:
        raise CowferryError(
            f"Bitmap '{name}' is readonly and cannot be modified",
            f"node '{node.name}' is read-only, and so is what it stores",
        )
    if bitmap.inconsistent and not broken:
        raise CowferryError(
            f"Bitmap '{name}' is inconsistent and cannot be used",
            f"{bitmap.reason}; remove it with block-dirty-bitmap-remove, and begin again with a "
            "full backup",
        )


def default_granularity(node: Node) -> int:
    """Bytes: what the node allocates at once, within reason."""
    cluster: int = getattr(node, "cluster_size", MOST_DEFAULT)
    return min(max(LEAST_DEFAULT, cluster), MOST_DEFAULT)


def _is_file_of(node: Node, other: Node) -> bool:
    """Whether `other` writes the node without telling its bitmaps."""
    roles = [role for role, child in children(other) if child is node]
    return not other.filter and any(role != "backing" for role in roles)


# Parts of a transaction -------------------------------------------------------------------


def _wait(so_far: Transaction, *names: str) -> None:
    """Wait until no other command works on these nodes, and keep others away from them until the
    transaction is over: a bitmap is looked up now, and changed after guests were waited for."""
    graph = so_far.daemon.graph
    for name in names:
        graph.await_commands(name)
    for name in names:
        node = node_of(so_far.daemon, name, so_far)
        if node is not None:
            graph.change_bitmaps(node)


class _Change(Part):
    """A change of one node's bitmaps, at one moment for whoever may write the node."""

    def __init__(self, so_far: Transaction, node: Node, bitmap: Bitmap) -> None:
        self.so_far = so_far
        self.node = node
        self.bitmap = bitmap
        self.done = False
        self.storing = False  # has begun to store what this and others have changed

    def drains(self) -> list[Disk]:
        """The disks that read through the node; and if a job fills it, the one whose bytes those
        are, for the job writes only while it is inside the gate of that one."""
        daemon = self.so_far.daemon
        # In this order: a job that lets go of the node meanwhile has moved its disk there before.
        jobs = [daemon.jobs.get(held.holder) for held in daemon.graph.holders(self.node)]
        sources = [daemon.works_on.get(job) for job in jobs if job is not None]
        disks = daemon.graph.disks_above(self.node)
        return [*disks, *(d for d in sources if d is not None and d not in disks)]

    @property
    def stored(self) -> bool:
        """Whether it has to be durable."""
        return self.bitmap.persistent

    def approach(self) -> None:
        if self.stored:
            self.node.flush()  # most of what the keeper flushes inside the drain

    def settle(self) -> None:
        self.do()
        self.done = True
        if self.stored and self is self._together()[-1]:
            self.storing = True
            keeper.changed(self.node)

    def unsettle(self) -> None:
        if self.done:
            self.undo()
        if self.stored:
            together = self._together()
            if self is together[0] and together[-1].storing:
                keeper.changed(self.node)

    def _together(self) -> list[_Change]:
        """The changes of the node that are stored at once."""
        changes = (p for p in self.so_far.parts if isinstance(p, _Change) and p.stored)
        return [p for p in changes if p.node is self.node]

    def do(self) -> None:
        """In memory."""
        raise NotImplementedError

    def undo(self) -> None:
        """Exactly as it was."""
        raise NotImplementedError


class Add(_Change):
    """A new bitmap, clean."""

    def __init__(
        self,
        so_far: Transaction,
        node_name: str,
        name: str,
        *,
        granularity: int | None = None,
        persistent: bool = False,
        disabled: bool = False,
    ) -> None:
        if not name:
            raise CowferryError("Bitmap name cannot be empty")
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in name):
            raise CowferryError(f"Bitmap name '{name}' contains an invalid character")
        _wait(so_far, node_name)
        node = node_of(so_far.daemon, node_name, so_far)
        if node is None:
            raise CowferryError(f"Cannot find device='{node_name}' nor node-name='{node_name}'")
        if granularity is None:
            granularity = default_granularity(node)
        elif granularity < MIN_GRANULARITY or granularity & (granularity - 1):
            raise CowferryError("Granularity must be power of 2 and at least 512")
        if find(node, name, so_far) is not None:
            raise CowferryError(f"Bitmap already exists: {name}")
        refusal = f"Can't make bitmap '{name}' persistent in '{node_name}'"
        if len(name.encode()) > MAX_NAME:
            raise CowferryError(
                f"{refusal}: Name length exceeds maximum ({MAX_NAME} characters)"
                if persistent
                else f"Bitmap name too long: {name}"
            )
        above = [o.name for o in so_far.daemon.graph.every_node() if _is_file_of(node, o)]
        if above:
            raise CowferryError(
                f"Node '{node_name}' is written through '{above[0]}', where nobody would tell it",
                f"add the bitmap to '{above[0]}'",
            )
        if node.size // granularity // 8 > MAX_BYTES:
            raise CowferryError(
                f"Bitmap '{name}' of '{node_name}' would have {node.size // granularity} bits",
                "choose a larger granularity",
            )
        if persistent and node.read_only:
            raise CowferryError(f"{refusal}: it is read-only")
        if persistent and not keeper.can_keep(node):
            raise CowferryError(
                f"Can't store persistent bitmaps to {node_name}: Operation not supported",
                "they need an image in a local file or device, from its beginning on; without "
                "persistent it can have one",
            )
        bitmap = Bitmap(name, node.size, granularity, persistent=persistent)
        bitmap.recording = not disabled
        super().__init__(so_far, node, bitmap)

    def do(self) -> None:
        self.before = self.node.bitmaps
        self.node.bitmaps = {**self.before, self.bitmap.name: self.bitmap}

    def undo(self) -> None:
        self.node.bitmaps = self.before


class Remove(_Change):
    """No such bitmap any more, in memory and where it is kept."""

    def __init__(self, so_far: Transaction, node_name: str, name: str) -> None:
        _wait(so_far, node_name)
        node, bitmap = look_up(so_far.daemon, node_name, name, so_far)
        check_usable(node, bitmap, changing=True, broken=True)
        super().__init__(so_far, node, bitmap)
        bitmap.busy = "its removal"

    def do(self) -> None:
        self.before = self.node.bitmaps
        self.node.bitmaps = {k: b for k, b in self.before.items() if b is not self.bitmap}

    def undo(self) -> None:
        self.node.bitmaps = self.before

    def abort(self) -> None:
        self.bitmap.busy = ""


class Clear(_Change):
    """What has changed so far is forgotten."""

    def __init__(self, so_far: Transaction, node_name: str, name: str) -> None:
        _wait(so_far, node_name)
        node, bitmap = look_up(so_far.daemon, node_name, name, so_far)
        check_usable(node, bitmap, changing=True)
        super().__init__(so_far, node, bitmap)

    def do(self) -> None:
        self.before = self.bitmap.copy()
        self.bitmap.clear(0, self.bitmap.size)
        self.bitmap.since = b""  # it counts from now on, and that is no backup's moment

    def undo(self) -> None:
        self.bitmap.replace(self.before.bits)
        self.bitmap.since = self.before.since


class Record(_Change):
    """Writes are recorded from now on, or are not."""

    def __init__(self, so_far: Transaction, node_name: str, name: str, recording: bool) -> None:
        _wait(so_far, node_name)
        node, bitmap = look_up(so_far.daemon, node_name, name, so_far)
        check_usable(node, bitmap)
        super().__init__(so_far, node, bitmap)
        self.recording = recording

    @property
    def stored(self) -> bool:
        return self.bitmap.persistent and not self.node.read_only

    def do(self) -> None:
        self.before = self.bitmap.recording, self.bitmap.since
        self.bitmap.recording = self.recording
        if not self.recording:
            self.bitmap.since = b""  # a write from now on is not in it

    def undo(self) -> None:
        self.bitmap.recording, self.bitmap.since = self.before


class Merge(_Change):
    """What other bitmaps have set, one has set, too; they may be of other nodes as large."""

    def __init__(
        self, so_far: Transaction, node_name: str, target: str, sources: Sequence[Named]
    ) -> None:
        _wait(so_far, node_name, *(of for of, _ in (s for s in sources if not isinstance(s, str))))
        node, bitmap = look_up(so_far.daemon, node_name, target, so_far)
        check_usable(node, bitmap, changing=True)
        super().__init__(so_far, node, bitmap)
        self.sources: list[Bitmap] = []
        self.since = b""  # what the one source counts from, if it is of the same disk
        for source in sources:
            of, name = (node_name, source) if isinstance(source, str) else source
            where, found = look_up(so_far.daemon, of, name, so_far)
            check_usable(where, found)
            if found.size != bitmap.size:
                raise CowferryError(
                    f"Bitmaps are of different sizes (destination size is {bitmap.size}, source "
                    f"size is {found.size}) and can't be merged"
                )
            self.sources.append(found)
            if len(sources) == 1 and where in chain(node):
                self.since = found.since

    def do(self) -> None:
        self.before = self.bitmap.copy()
        for source in self.sources:
            if source is not self.bitmap:
                self.bitmap.merge(source)
        if not self.bitmap.since and self.bitmap.recording:
            self.bitmap.since = self.since  # it has all that the other one tells

    def undo(self) -> None:
        self.bitmap.replace(self.before.bits)
        self.bitmap.since = self.before.since


# Exports ----------------------------------------------------------------------------------


def for_export(daemon: Daemon, disk: Disk, names: Sequence[Named], writable: bool) -> list[Bitmap]:
    """The bitmaps that an export of the disk is to offer. Raises `CowferryError`.

    One named by itself is looked for in the whole chain, top first."""
    out: list[Bitmap] = []
    for wanted in names:
        if isinstance(wanted, str):
            nodes = list(chain(disk.root))
            found = [(n, n.bitmaps[wanted]) for n in nodes if wanted in n.bitmaps]
            if not found:
                raise not_found(f"Bitmap '{wanted}' is not found", nodes)
            node, bitmap = found[0]
            check_usable(node, bitmap)
            if not writable and not node.read_only and bitmap.recording:
                raise CowferryError(
                    f"Enabled bitmap '{wanted}' incompatible with readonly export",
                    "what it says would change while a client reads: disable it, or merge it into "
                    "one that is disabled and export that",
                )
        else:
            node, bitmap = look_up(daemon, *wanted)
            check_usable(node, bitmap)
        if any(b.name == bitmap.name and b is not bitmap for b in out):
            raise CowferryError(
                f"Two of the bitmaps are named '{bitmap.name}'", "clients know them by their names"
            )
        out.append(bitmap)
    return out
