"""The graph: which nodes and disks there are, what they are called, and who uses them.

Nodes have node-names; those that nobody named get one that begins with '#'. A disk has a name of
its own and a root node. Whoever serves or changes a disk holds the one `Disk` over its root, or
two gates would let two writers into one range; so the disk over a bare node is made here, once.

`lock` guards all tables below. It is held for look-ups and changes of names, never over I/O: a node
is opened and closed outside of `lock` and of the commands' turn, because its storage or its server
may not answer. Its name is reserved meanwhile, and the nodes that it refers to are kept.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from cowferry.block import closing, identity, names
from cowferry.block.disk import Disk
from cowferry.block.limits import Group
from cowferry.block.node import Node, chain
from cowferry.block.reserved import filenames, references
from cowferry.block.scope import CalledOff
from cowferry.block.turn import Turn
from cowferry.block.uses import GENERATED, Uses
from cowferry.block.walk import children, filters, parents_first, parts
from cowferry.drivers import driver, opening, partial
from cowferry.drivers.locks import OpenHere
from cowferry.errors import CowferryError, DeviceInUse, DeviceNotFound

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")


class Gone(NamedTuple):
    """What nobody uses any more. It is in no table, and has to be closed."""

    nodes: list[Node]  # in the order in which they are closed
    disks: list[Disk]  # over them; retired before


class Graph(Uses):
    """Nodes by node-name, disks by name. Thread-safe.

    A method that opens or closes nodes gives away the `turn` of its caller meanwhile."""

    def __init__(self, turn: Turn | None = None) -> None:
        super().__init__(turn or Turn())
        self.closing: list[Node] = []  # in no table any more, and not closed yet
        self.closed = False
        self.explicit: set[str] = set()  # added by blockdev-add, gone by blockdev-del only
        self.inherited: set[str] = set()  # of those, roots that took the place of an added one
        self.forsaken: dict[str, str] = {}  # overlays left by a commit -> the file of their base
        self.groups: dict[str, Group] = {}  # of limits, by name
        self._number = 100

    # Nodes -------------------------------------------------------------------------------

    def add_node(self, options: Mapping[str, Any]) -> Node:
        """blockdev-add. Raises `CowferryError`; then nothing was opened."""
        if not isinstance(options.get("node-name"), str):
            raise CowferryError("'node-name' must be specified for the root node")
        return self._open(options, self._owned, may_float=True)

    def adopt(self, options: Mapping[str, Any]) -> Node:
        """Open a node for an operation; it goes when nobody uses it. Raises `CowferryError`."""
        return self._open(options, lambda node: node)

    def _owned(self, node: Node) -> Node:
        self.explicit.add(node.name)
        return node

    def let_go(self, node: Node) -> None:
        """Close a node that an operation opened and does not need, unless somebody uses it."""
        with self.lock:
            self.explicit.discard(node.name)
            gone = self._unlink([node])
        self._close(gone)

    def tidy(self, nodes: list[Node]) -> None:
        """Close those of the nodes that nobody uses any more, and what only they used."""
        with self.lock:
            gone = self._unlink(nodes)
        self._close(gone)

    def _open(
        self,
        options: Mapping[str, Any],
        commit: Callable[[Node], T],
        *,
        may_float: bool = False,
        disk: str | None = None,
    ) -> T:
        """Open a node and enter it into the tables, together with what `commit` makes of it.

        Opening waits for storage and servers, so it is done without `lock`, and without the
        caller's turn. Two commands cannot open one name, because it is reserved before. `disk` is
        a further name to reserve. Raises `CowferryError`; then nothing stays open."""
        made: list[Node] = []
        with self.turn.apart():
            paths = [names.real(path) for path in filenames(options)]
        with contextlib.ExitStack() as stack:
            with self.lock:
                self._check_open()
                for path in paths:
                    self.reserved.check_path(path)
                kept = self._reserve(stack, options, may_float, disk)
            with self.turn.apart():
                node = self._opened(options, lambda name: kept.get(name) or self.node(name), made)
            try:
                while True:
                    # A disk without users over a part of it remembers what is about to be wrong.
                    with self.lock:
                        below = [p.name for n in made for p in parts(n) if p.name in self.bare]
                        idle = [n for n in below if not self.users.get(id(self.bare[n]))]
                        disks = [self.bare.pop(n) for n in idle]
                        if not disks:
                            stack.close()
                            self._check_open()
                            self._check_references(options, may_float)
                            for n in made:
                                n.name = n.name or self._generated()
                                self.nodes[n.name] = n
                            return commit(node)
                    self._close(Gone([], disks))
            except BaseException:
                with contextlib.suppress(OSError, CowferryError):
                    self._close(Gone(made[::-1], []))
                raise

    def _opened(
        self, options: Mapping[str, Any], lookup: Callable[[str], Node], made: list[Node]
    ) -> Node:
        """Open a node; `made` gets all nodes that were opened for it. Raises `CowferryError`."""

        def note(node: Node, given: Mapping[str, Any]) -> None:
            made.append(node)
            if node.file is None and node.fd >= 0:
                places = node.places()
                with self.lock:
                    self.files.add(node, places, self._user)

        try:
            return opening.open_node(options, lookup, note)
        except BaseException as error:
            with self.lock:
                self.files.discard(made)
            if isinstance(error, OpenHere):  # say which disk or job has it
                self.check_unused(error.path, identity.of_path(error.path))
            raise

    def _check_open(self) -> None:
        if self.closed:
            raise CowferryError("the daemon is stopping")

    def _reserve(
        self,
        stack: contextlib.ExitStack,
        options: Mapping[str, Any],
        may_float: bool,
        disk: str | None,
    ) -> dict[str, Node]:
        """Reserve the names that `options` give, until `stack` is closed, and keep the nodes that
        they refer to. Return these by name. The caller holds `lock`. Raises `CowferryError`."""
        taken: set[str] = set()
        if disk is not None:
            self.reserved.check_name(disk)
            taken.add(disk)
        self._check_names(options, taken)
        self._check_references(options, may_float)
        self._check_groups(options)
        kept: dict[str, Node] = {}
        beneath: list[Node] = []
        for key, name in references(options):
            kept[name] = self.node(name)
            if key != "backing" and not any(n is kept[name] for n in beneath):
                beneath.append(kept[name])
        why = "it is being opened as a part of another node"
        self.claim(beneath, why, wanted="its use below another node")
        self.reserved.names |= dict.fromkeys(taken, "opened")
        self.reserved.keep(list(kept.values()))

        def undo() -> None:
            with self.lock:
                self.release(beneath, why)
                self.reserved.let_go(list(kept.values()))
                for name in taken:
                    self.reserved.names.pop(name, None)

        stack.callback(undo)
        return kept

    @contextlib.contextmanager
    def making(self, path: str) -> Iterator[None]:
        """Let no other command make or open a file at `path` while the caller does.

        Raises `DeviceInUse` if another command is at it."""
        path = names.real(path)
        with self.lock:
            self.reserved.check_path(path)
            self.reserved.paths[path] = threading.get_ident()
        try:
            yield
        finally:
            with self.lock:
                del self.reserved.paths[path]

    def check_name(self, name: str | None) -> None:
        """Raise `CowferryError` for a node-name that no new node may have. None is no name."""
        with self.lock:
            self._check_names({"node-name": name}, set())

    def _check_names(self, options: Mapping[str, Any], seen: set[str]) -> None:
        name = options.get("node-name")
        if name is not None:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise CowferryError(
                    f"Invalid node-name: '{name}'",
                    "a letter, then at most 30 letters, digits, '-', '.' or '_'",
                )
            self.reserved.check_name(name)
            if name in self.nodes or name in seen:
                raise CowferryError(f"Duplicate nodes with node-name='{name}'")
            seen.add(name)
            if name in self.disks:
                raise CowferryError(f"node-name={name} is conflicting with a device id")
        for key in ("file", "backing", "data-file"):
            child = options.get(key)
            if isinstance(child, Mapping):
                self._check_names(child, seen)

    def _check_references(self, options: Mapping[str, Any], may_float: bool = False) -> None:
        """A node taken over by name must not be written by somebody else as well.

        `may_float`: below the top there may be one that is (`floats`)."""
        for key in ("file", "backing", "data-file"):
            child = options.get(key)
            if isinstance(child, Mapping):
                self._check_references(child)
                continue
            node = self.nodes.get(child) if isinstance(child, str) else None
            if node is not None and self.floats(node):
                raise self.refuse_floating(node, f"its use as {key}")
            if node is None:
                continue
            if key != "backing":
                self._check_beneath(node, key, options)
            if node.read_only:
                continue
            mine = options.get("read-only") not in (True, "on") and key != "backing"
            if mine and node.bitmaps and not _is_filter(options):
                raise CowferryError(
                    f"Node '{child}' has dirty bitmaps, and writes through another node are not in "
                    f"them: {', '.join(node.bitmaps)}",
                    "remove them, or write the node itself",
                )
            for other in self.nodes.values():
                for role, held in children(other):
                    if held is node and role != "backing" and (mine or not other.read_only):
                        raise CowferryError(
                            f"Node '{child}' is in use by '{self.short(other)}' as '{role}'",
                            "two nodes over one file would damage it",
                        )
            if self.written(node) and not (may_float and key == "backing"):
                raise CowferryError(
                    f"Node '{child}' is in use by a writable export",
                    "what lies below another node must not change",
                )

    def _check_beneath(self, node: Node, key: str, options: Mapping[str, Any]) -> None:
        """Raise `CowferryError` if somebody has a disk over a node that is to be another's file.

        There would be two gates over one image, and what is written through one of them would be
        hidden from the jobs, bitmaps and leases of the other."""
        self.check_free(node, f"its use as {key}")
        if node.file is None and not _is_filter(options):
            return  # where the bytes of a host's file are never changes
        disks = any(d.root is node for d in self.disks.values())
        if (disks or self.exported(node)) and not self.written(node):
            raise CowferryError(
                f"Node '{node.name}' is in use: it is a disk of its own, or exported",
                "lay it below the other node before it is exported",
            )

    def _check_groups(self, options: Mapping[str, Any]) -> None:
        group = options.get("throttle-group")
        if isinstance(group, str) and group not in self.groups:
            raise CowferryError(
                f"Throttle group '{group}' does not exist",
                "make it first: object-add qom-type=throttle-group",
            )
        for key in ("file", "backing", "data-file"):
            child = options.get(key)
            if isinstance(child, Mapping):
                self._check_groups(child)

    def _generated(self) -> str:
        self._number += 1
        return f"{GENERATED}{self._number}"

    def node(self, name: str) -> Node:
        """The node of that name. Raises `CowferryError`."""
        with self.lock:
            found = self.nodes.get(name)
            if found is None:
                raise CowferryError(f"Failed to find node with node-name='{name}'")
            self.check_kept(found)
            return found

    def check_kept(self, node: Node) -> None:
        """Raise `CowferryError` if a node is an overlay that `forsake` has left."""
        below = self.forsaken.get(node.name)
        if below is not None:
            raise CowferryError(
                f"Node '{node.name}' cannot be used: '{below}', over which it lay, has changed",
                f"what it holds was committed there; blockdev-del '{node.name}' closes it",
            )

    def delete_node(self, name: str) -> None:
        """blockdev-del. Raises `CowferryError` while anybody uses the node."""
        with self.lock:
            node = self.nodes[name] if name in self.forsaken else self.node(name)
            self.check_free(node, "blockdev-del", afloat=True)
            self.check_top(node)
            for disk in self.disks.values():
                if disk.root is node:
                    raise CowferryError(f"Node {name} is in use by disk '{disk.name}'")
            if self.exported(node):
                raise CowferryError(
                    f"Block device {name} is in use", "an export has it: block-export-del"
                )
            for bitmap in node.bitmaps.values():
                if bitmap.busy:
                    raise CowferryError(
                        f"Node '{name}' is busy: {bitmap.busy} uses its bitmap '{bitmap.name}'"
                    )
            if self.reserved.keeps(node):
                raise CowferryError(
                    f"Node '{name}' is busy: another node is being opened over it",
                    "wait until that command is over",
                )
            if name not in self.explicit:
                raise CowferryError(f"Node {name} is not owned by the monitor")
            self.explicit.discard(name)
            gone = self._unlink([node])
        self._close(gone)

    def _unlink(self, nodes: list[Node]) -> Gone:
        """Take those of `nodes` that have no user out of the tables, and whatever only they used.

        The caller holds `lock`, and closes what is returned after it has released `lock`."""
        gone = Gone([], [])
        for first in nodes:
            node: Node | None = first if self.nodes.get(first.name) is first else None
            while node is not None and node.name not in self.explicit and not self._used(node):
                for n in (node, *(c for c in parts(node) if c.name not in self.explicit)):
                    self.nodes.pop(n.name, None)
                    self.inherited.discard(n.name)
                    self.forsaken.pop(n.name, None)
                    self.reserved.names[n.name] = "closed"
                    disk = self.bare.pop(n.name, None)
                    if disk is not None:
                        gone.disks.append(disk)
                    if n is not node:
                        self.closing.append(n)
                gone.nodes.append(node)
                node = node.backing
        self.closing += gone.nodes
        return gone

    def _close(self, gone: Gone) -> None:
        """Close what is in no table any more, without the caller's turn. The caller does not hold
        `lock`. Raises the first error after all were tried.

        If requests on a disk do not finish in time, the rest is done in the background, and
        `DeviceInUse` is raised: a descriptor that a request uses stays open."""
        with self.turn.apart():
            for disk in gone.disks:
                try:
                    disk.retire()
                except CalledOff as error:
                    threading.Thread(
                        target=self._close_late, args=(gone,), name="close", daemon=True
                    ).start()
                    raise DeviceInUse(
                        f"disk '{disk.name}' is removed, but {error.strerror}",
                        "its images are closed as soon as these have finished",
                    ) from error
            first: Exception | None = None
            for node in gone.nodes:
                try:
                    node.close()
                except (OSError, CowferryError) as error:
                    first = first or error
        self._closed(gone)
        if first is not None:
            raise first

    def _close_late(self, gone: Gone) -> None:
        """`_close`, whenever the requests on its disks have finished."""
        for disk in gone.disks:
            while not disk.retired:
                with contextlib.suppress(CalledOff):
                    disk.retire()
        with contextlib.suppress(OSError, CowferryError):
            self._close(Gone(gone.nodes, []))

    def _closed(self, gone: Gone) -> None:
        """The nodes are closed: their names and files may be used again."""
        with self.lock:
            over = [p for n in gone.nodes for p in (n, *parts(n))]
            self.closing = [n for n in self.closing if not any(n is o for o in over)]
            self.files.discard(over)
            for n in over:
                if self.reserved.names.get(n.name) == "closed":
                    del self.reserved.names[n.name]

    def _used(self, node: Node) -> bool:
        if any(d.root is node for d in self.disks.values()) or id(node) in self.claims:
            return True
        if self.reserved.keeps(node):
            return True
        if self.exported(node):
            return True
        return any(child is node for n in self.nodes.values() for _, child in children(n))

    # Disks -------------------------------------------------------------------------------

    def open_disk(
        self,
        name: str,
        options: Mapping[str, Any],
        copy_on_read: bool = False,
        origin: str = "",
    ) -> Disk:
        """A named disk over a new node; `origin` as in `Disk`. Raises `CowferryError`."""
        with self.lock:
            if not name or len(name) > 255 or not name.isprintable() or "/" in name:
                raise CowferryError(f"Invalid disk name '{name}'")
            if name in self.disks or name in self.nodes:
                raise CowferryError(f"there is a disk or node named '{name}' already")

        def commit(root: Node) -> Disk:
            disk = self.disks[name] = self._disk(root, name, copy_on_read)
            disk.origin = origin
            return disk

        return self._open(options, commit, disk=name)

    def _disk(self, root: Node, name: str, copy_on_read: bool = False) -> Disk:
        """A new disk, which keeps to the limits of a throttle node from the beginning."""
        disk = Disk(root, name, copy_on_read)
        limited = [self.groups[n.throttle_group] for n in filters(root) if n.throttle_group]
        if limited:
            disk.limit(*limited)
        return disk

    def remove_disk(self, name: str) -> None:
        """Forget a named disk; its node is closed unless somebody else uses it.

        Raises `DeviceInUse` for one that is held, locked or exported, `DeviceNotFound`."""
        with self.lock:
            disk = self.disks.get(name)
            if disk is None:
                raise DeviceNotFound(f"Device '{name}' not found", "nodes go by blockdev-del")
            self.check_free(disk.root, "its removal")
            if self.users.get(id(disk)):
                raise DeviceInUse(f"Device '{name}' is exported", "withdraw the export first")
            del self.disks[name]
            gone = self._unlink([disk.root])
            gone.disks.insert(0, disk)
        self._close(gone)

    def disk(self, device: str) -> Disk:
        """The disk of that name, or the one over the node of that name.

        Raises `DeviceNotFound`."""
        with self.lock:
            if device in self.disks:
                return self.disks[device]
            node = self.nodes.get(device)
            if node is None:
                raise DeviceNotFound(
                    f"Device '{device}' not found",
                    f"there are: {', '.join(sorted(self.names())) or 'none'}",
                )
            return self.disk_over(node)

    def disk_over(self, node: Node) -> Disk:
        """The one disk whose root is `node`, or a filter over it; made if nobody has asked before.

        Raises `ImageError` for a bare file that is no disk by itself."""
        with self.lock:
            self.check_kept(node)
            node = self._through_filters(node)
            for disk in (*self.disks.values(), *self.bare.values()):
                if disk.root is node:
                    return disk
            partial.check_bare(node)
            disk = self.bare[node.name] = self._disk(node, node.name)
            return disk

    def _through_filters(self, node: Node) -> Node:
        """The topmost of the filters over a node, or itself: all are names of one disk."""
        for other in self.nodes.values():
            if other.filter and other.file is node:
                return self._through_filters(other)
        return node

    def names(self) -> list[str]:
        """What a person may call a disk."""
        with self.lock:
            return [*self.disks, *sorted(self.explicit)]

    def stranger(self, node: Node, ours: list[Node]) -> Node | None:
        """A node that lies over `node` and is none of ours, nor what a filter of ours is over."""
        ours = [*ours, *(f.file for n in ours for f in filters(n) if f.file is not None)]
        with self.lock:
            for other in self.nodes.values():
                if other not in ours and any(child is node for _, child in children(other)):
                    return other
            return None

    def means(self, node: Node, name: str, by_node: bool = False) -> bool:
        """Whether `name` is what somebody may call the node."""
        if by_node:
            return node.name == name
        return name in (node.filename, node.name) or names.same(name, node.filename)

    def reroot(self, disk: Disk, node: Node) -> None:
        """`node` has become the root of `disk`: a bare disk is known by its root's name, and
        whoever may close the old one may close the new one, for nobody else would."""
        with self.lock:
            was = [key for key, d in self.bare.items() if d is disk]
            for key in [key for key, d in self.bare.items() if d is disk or d.root is node]:
                del self.bare[key]
            if was:
                self.bare[node.name] = disk
                if not self.explicit.isdisjoint(was):
                    self._inherit(was, node.name)

    def _inherit(self, was: list[str], name: str) -> None:
        """One that nobody added was to stay as long as it was the root."""
        for key in self.inherited.intersection(was):
            self.inherited.discard(key)
            self.explicit.discard(key)
        if name not in self.explicit:
            self.inherited.add(name)
            self.explicit.add(name)

    # Chains ------------------------------------------------------------------------------

    def find_base(self, disk: Disk, name: str, by_node: bool = False) -> Node:
        """The node below the disk's root that `name` means. Raises `CowferryError`.

        A file name may be given as the overlay records it, as one would type it, or in full."""
        below = list(chain(disk.root))[1:]
        for node in below:
            if by_node:
                if node.name == name:
                    return node
            elif self.means(node, name):
                return node
        if not by_node:
            for above in chain(disk.root):
                spec, backing = above.backing_spec, above.backing
                if backing is not None and spec is not None and spec[0] == name:
                    return backing
            named = [n for n in below if os.path.basename(n.filename) == name]
            if len(named) == 1:
                return named[0]
        kind = "Node" if by_node else "Image"
        names = " <- ".join(n.name if by_node else n.filename for n in reversed(below)) or "nothing"
        raise CowferryError(
            f"{kind} '{name}' is not a backing image of '{disk.name}'", f"below it: {names}"
        )

    def backing_name(self, above: Node, below: Node | None) -> tuple[str, str] | None:
        """What the header of `above` is to record for `below`: (name, format), or None.

        A name that some header of the chain already records is kept if it is still right."""
        if below is None:
            return None
        for n in list(chain(above)):
            if n.backing is below and n.backing_spec is not None:
                recorded = n.backing_spec[0]
                if opening.leads_to(above.filename, recorded, below.filename):
                    return recorded, below.driver
        return names.absolute(below.filename), below.driver

    def detached(self, old: Node, base: Node | None) -> None:
        """An overlay has let go of `old` and what is between it and `base`: close what is idle."""
        all_gone = Gone([], [])
        with self.lock:
            node: Node | None = old
            while node is not None and node is not base:
                below = node.backing
                if node.name in self.explicit or self._used(node):
                    break
                node.backing = None
                gone = self._unlink([node])
                all_gone.nodes.extend(gone.nodes)
                all_gone.disks.extend(gone.disks)
                node = below
        self._close(all_gone)

    def forsake(self, old: Node, base: Node) -> None:
        """Cut off the overlays from `old` down to `base` that are still open, because blockdev-add
        opened them: a commit has changed `base`, so they do not show any more what they did. Each
        can only be closed now."""
        with self.lock:
            for node in list(chain(old)):
                if self.nodes.get(node.name) is node:
                    self.forsaken[node.name] = base.filename
                if node.backing is base:
                    node.backing = None
                    return

    def close(self, seconds: float = math.inf) -> list[str]:
        """Flush and close everything; nothing is opened any more.

        Return what has not been closed within `seconds`, in words: it goes on in threads of its
        own. Raise the first error after all were tried."""
        with self.lock:
            self.closed = True
            nodes = parents_first(list(self.nodes.values()))
            disks = self.all_disks()
            self.disks.clear()
            self.bare.clear()
            self.nodes.clear()
        return closing.close_all(nodes, disks, seconds)


def _is_filter(options: Mapping[str, Any]) -> bool:
    """Whether what they open passes on what it is told, to bitmaps too."""
    name = options.get("driver")
    return isinstance(name, str) and bool(driver(name).filter)
