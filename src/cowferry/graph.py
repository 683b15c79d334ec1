"""The graph: which nodes and disks there are, what they are called, and who uses them.

Nodes have node-names; those that nobody named get one that begins with '#'. A disk has a name of
its own and a root node. Whoever serves or changes a disk holds the one `Disk` over its root, or
two gates would let two writers into one range; so the disk over a bare node is made here, once.

`lock` guards all tables below. It is held for look-ups and changes of names, never over I/O on
guest data.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cowferry.block import identity, keeper, names
from cowferry.block.disk import Disk
from cowferry.block.limits import Group
from cowferry.block.node import Node, chain
from cowferry.drivers import driver, opening, partial
from cowferry.errors import CowferryError, DeviceInUse, DeviceNotFound, ImageError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")


class Held(NamedTuple):
    """A node that is not to be changed by anybody else: why, and the job's id if it is a job.

    `served`: exports may be added over it meanwhile, one of them for writing. `kept`: exports that
    only read may; it lies over a node that is being written, and shows it as it was. `shared`: its
    holder only reads it, as a disk, and so may others that hold it in this way."""

    node: Node
    why: str
    holder: str
    served: bool
    kept: bool = False
    shared: bool = False


class Graph:
    """Nodes by node-name, disks by name. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.nodes: dict[str, Node] = {}
        self.disks: dict[str, Disk] = {}  # named by somebody
        self.bare: dict[str, Disk] = {}  # over a node that was added by itself, by node-name
        self.explicit: set[str] = set()  # added by blockdev-add, gone by blockdev-del only
        self.inherited: set[str] = set()  # of those, roots that took the place of an added one
        self.claims: dict[int, list[Held]] = {}  # by id(node): one, or several that share it
        self.locks: dict[int, str] = {}  # id(disk) -> why an administrator locked it
        self.users: dict[int, list[bool]] = {}  # id(disk) -> of each export, whether it writes
        self.groups: dict[str, Group] = {}  # of limits, by name
        self._number = 100

    # Nodes -------------------------------------------------------------------------------

    def add_node(self, options: Mapping[str, Any]) -> Node:
        """blockdev-add. Raises `CowferryError`; then nothing was opened."""
        name = options.get("node-name")
        if not isinstance(name, str):
            raise CowferryError("'node-name' must be specified for the root node")
        with self.lock:
            node = self._open(options, may_float=True)
            self.explicit.add(name)
            return node

    def adopt(self, options: Mapping[str, Any], explicit: bool = False) -> Node:
        """Open a node for an operation; it goes when nobody uses it. Raises `CowferryError`."""
        with self.lock:
            node = self._open(options)
            if explicit:
                self.explicit.add(node.name)
            return node

    def let_go(self, node: Node) -> None:
        """Close a node that an operation opened and does not need, unless somebody uses it."""
        with self.lock:
            self.explicit.discard(node.name)
            if self.nodes.get(node.name) is node:
                self._release(node)

    def tidy(self, nodes: list[Node]) -> None:
        """Close those of the nodes that nobody uses any more, and what only they used."""
        with self.lock:
            for node in nodes:
                if self.nodes.get(node.name) is node:
                    self._release(node)

    def _open(self, options: Mapping[str, Any], may_float: bool = False) -> Node:
        """Open under `lock`: two opens at once could take one name."""
        self._check_names(options, set())
        self._check_references(options, may_float)
        self._check_groups(options)
        made: list[Node] = []
        index: identity.Index[Node] = identity.Index()
        for other in self.nodes.values():
            _remember(other, index)

        def opened(node: Node, given: Mapping[str, Any]) -> None:
            made.append(node)
            self._check_alone(node, index)

        node = opening.open_node(options, self.node, opened)
        for n in made:
            n.name = n.name or self._generated()
            self.nodes[n.name] = n
            for part in _parts(n):  # what a disk over it remembers is about to be wrong
                disk = self.bare.get(part.name)
                if disk is not None and not self.users.get(id(disk)):
                    self.bare.pop(part.name).retire()
        return node

    def _check_alone(self, node: Node, index: identity.Index[Node]) -> None:
        """Raise `DeviceInUse` if a node was opened over bytes of another one, by whatever name, and
        one of both writes. Locks of files do not tell: a loop device has none of its file's.

        Nothing has been written yet: a format is opened after its file."""
        if node.file is not None or node.fd < 0:
            return
        for mine, theirs, other in index.find(node.places()):
            reading = node.read_only and other.read_only
            if not (reading or node.shares or other.shares):
                over = identity.Layer(other.filename, self._user(other), other.places())
                how = identity.connection(node.filename, mine, over, theirs)
                raise DeviceInUse(
                    f"cannot open '{node.filename}': {how}",
                    "nothing was changed; two nodes that write the same bytes would damage them",
                )
        index.add(node.places(), node)

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
                raise _afloat(node, f"its use as {key}")
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
                            f"Node '{child}' is in use by '{other.name}' as '{role}'",
                            "two nodes over one file would damage it",
                        )
            if self._written(node) and not (may_float and key == "backing"):
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
        if (disks or self.exported(node)) and not self._written(node):
            raise CowferryError(
                f"Node '{node.name}' is in use: it is a disk of its own, or exported",
                "lay it below the other node before it is exported",
            )

    def _written(self, node: Node) -> bool:
        """Whether an export writes to a disk over the node."""
        return any(any(self.users.get(id(d), [])) for d in self.all_disks() if d.root is node)

    def floats(self, node: Node) -> bool:
        """Whether it lies over a node that is being written, and nobody keeps what it showed.

        Such an overlay is there to become a backup's view of one moment. Until then it shows no
        moment at all, so nobody may use it."""
        with self.lock:
            if node.backing is None or self.keeps(node):
                return False
            return self._written(node.backing)

    def keeps(self, node: Node) -> bool:
        """Whether it shows what the node that it lies over was like at one moment."""
        with self.lock:
            return any(held.kept for held in self.holders(node))

    def holders(self, node: Node) -> list[Held]:
        """Who holds it: one, or several that share it."""
        with self.lock:
            return list(self.claims.get(id(node), ()))

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
        return f"#block{self._number}"

    def node(self, name: str) -> Node:
        """The node of that name. Raises `CowferryError`."""
        with self.lock:
            found = self.nodes.get(name)
            if found is None:
                raise CowferryError(f"Failed to find node with node-name='{name}'")
            return found

    def delete_node(self, name: str) -> None:
        """blockdev-del. Raises `CowferryError` while anybody uses the node."""
        with self.lock:
            node = self.node(name)
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
            if name not in self.explicit:
                raise CowferryError(f"Node {name} is not owned by the monitor")
            self.explicit.discard(name)
            self._release(node)

    def _release(self, node: Node | None) -> None:
        """Close a node that lost a user, and whatever only it used.

        The first error is raised after all were tried."""
        first: Exception | None = None
        while node is not None:
            if node.name in self.explicit or self._used(node):
                break
            below = node.backing
            gone = [node, *(c for c in _parts(node) if c.name not in self.explicit)]
            for n in gone:
                self.nodes.pop(n.name, None)
                self.inherited.discard(n.name)
                disk = self.bare.pop(n.name, None)
                if disk is not None:
                    disk.retire()
            try:
                node.close()
            except (OSError, CowferryError) as error:
                first = first or error
            node = below
        if first is not None:
            raise first

    def _used(self, node: Node) -> bool:
        if any(d.root is node for d in self.disks.values()) or id(node) in self.claims:
            return True
        if self.exported(node):
            return True
        return any(child is node for n in self.nodes.values() for _, child in children(n))

    # Disks -------------------------------------------------------------------------------

    def open_disk(self, name: str, options: Mapping[str, Any], copy_on_read: bool = False) -> Disk:
        """A named disk over a new node. Raises `CowferryError`."""
        with self.lock:
            if not name or len(name) > 255 or not name.isprintable() or "/" in name:
                raise CowferryError(f"Invalid disk name '{name}'")
            if name in self.disks or name in self.nodes:
                raise CowferryError(f"there is a disk or node named '{name}' already")
            root = self._open(options)
            disk = self.disks[name] = self._disk(root, name, copy_on_read)
            return disk

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
            disk.retire()
            self._release(disk.root)

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

    def all_disks(self) -> list[Disk]:
        """Every disk, bare ones too."""
        with self.lock:
            return [*self.disks.values(), *self.bare.values()]

    def every_node(self) -> list[Node]:
        """All nodes, those without a name of their own too."""
        with self.lock:
            return list(self.nodes.values())

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

    def disks_above(self, node: Node) -> list[Disk]:
        """Every disk that reads through `node`: in its chain, or below a node of it."""
        return [d for d in self.all_disks() if node in parents_first([d.root])]

    # Who uses what -----------------------------------------------------------------------

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
    ) -> None:
        """Hold nodes for a job (or for a moment); all or none. Only `served` may be exported then,
        and `kept`, an overlay over it that goes on showing this moment, for reading. Others may
        hold `shared` as well, if it is what they share, too.

        Raises `DeviceInUse` naming who has one, and what is `wanted`, or the lock that an
        administrator set."""
        with self.lock:
            for node in nodes:
                self.check_free(node, wanted or why, node is kept, node is shared)
            for node in nodes:
                held = Held(node, why, holder, node is served, node is kept, node is shared)
                self.claims.setdefault(id(node), []).append(held)

    def check_free(
        self, node: Node, wanted: str, afloat: bool = False, sharing: bool = False
    ) -> None:
        """Raise `DeviceInUse` if the node is held, floats, or belongs to a locked disk."""
        with self.lock:
            for held in self.holders(node):
                if not (sharing and held.shared):
                    raise _busy(held, wanted)
            if not afloat and self.floats(node):
                raise _afloat(node, wanted)
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
                            f"Node '{node.name}' is busy: node is used as {what} of '{other.name}'"
                        )

    def check_sole(self, node: Node, wanted: str) -> None:
        """Raise `DeviceInUse` if another open node lies over bytes of `node` under another name: it
        would see what is about to be written there."""
        with self.lock:
            files = [n for n in (node, *_parts(node)) if n.file is None]
            index: identity.Index[Node] = identity.Index()
            for other in self.nodes.values():
                if other not in files and not other.shares:
                    _remember(other, index)
            for file in files:
                for mine, theirs, other in index.find(file.places() if file.fd >= 0 else ()):
                    over = identity.Layer(other.filename, self._user(other), other.places())
                    raise DeviceInUse(
                        f"Node '{node.name}' is busy, which excludes {wanted}: "
                        f"{identity.connection(file.filename, mine, over, theirs)}",
                        "nothing was changed; what is written there would change under it",
                    )

    def _user(self, node: Node) -> str:
        """Who has a node open, in words."""
        disks = [f"'{disk.name}'" for disk in self.disks_above(node) if disk.name in self.disks]
        if disks:
            return f"in use by disk {' and '.join(disks)}"
        return f"in use by node '{node.name}'" if node.name else "in use by the same chain"

    def check_idle(self, node: Node) -> None:
        """Raise `CowferryError` if any node, disk or export lies over `node`."""
        with self.lock:
            self.check_top(node)
            if self.exported(node) or any(d.root is node for d in self.disks.values()):
                raise CowferryError(f"Block device {node.name} is in use")

    def release(self, nodes: list[Node], why: str, holder: str = "") -> None:
        """Undo `claim`. Nodes that somebody else holds by now are left alone."""
        with self.lock:
            for node in nodes:
                left = [h for h in self.holders(node) if (h.why, h.holder) != (why, holder)]
                if left:
                    self.claims[id(node)] = left
                else:
                    self.claims.pop(id(node), None)

    def hold(self, disk: Disk, writable: bool) -> None:
        """An export begins to use a disk. Raises `CowferryError` if it must not, or not write."""
        with self.lock:
            for held in self.holders(disk.root):
                # What a job fills has no gate of ours around it; and no second writer comes in
                # while one works on the disk.
                if not held.served and (writable or not held.kept):
                    raise _busy(held, "an export")
                if writable and any(self.users.get(id(disk), [])):
                    raise _busy(held, "a second export for writing")
            floating = next((n for n in chain(disk.root) if self.floats(n)), None)
            if floating is not None:
                raise _afloat(floating, "an export")
            if writable:
                keeper.check_bypass(disk.root)
            for other in self.nodes.values():
                for role, child in children(other):
                    if child is not disk.root or self.keeps(other):
                        continue
                    if writable:
                        raise CowferryError(
                            f"Conflicts with use by '{other.name}' as '{role}', which does not "
                            f"allow 'write' on '{child.name}'",
                            "export it read-only, or export the node above it",
                        )
                    if role != "backing" and child.file is not None and not other.read_only:
                        raise CowferryError(
                            f"Conflicts with use by '{other.name}' as '{role}', which writes "
                            f"'{child.name}'",
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
        with self.lock:
            node: Node | None = old
            while node is not None and node is not base:
                below = node.backing
                if node.name in self.explicit or self._used(node):
                    return
                node.backing = None
                self._release(node)
                node = below

    def close(self) -> None:
        """Flush and close everything. The first error is raised after all were tried."""
        with self.lock:
            nodes = parents_first(list(self.nodes.values()))
            for disk in self.all_disks():
                disk.retire()
            self.disks.clear()
            self.bare.clear()
            self.nodes.clear()
            first: Exception | None = None
            formats = [n for n in nodes if n.file is not None and not n.read_only]
            # A child's close is idempotent: its parent may have closed it.
            for step in (*(n.flush for n in formats), *(n.close for n in nodes)):
                try:
                    step()
                except (OSError, CowferryError) as error:
                    first = first or error
            if first is not None:
                raise first


def _busy(held: Held, wanted: str) -> DeviceInUse:
    job = f" '{held.holder}'" if held.holder else ""
    return DeviceInUse(
        f"Node '{held.node.name}' is busy: {held.why}{job}, which excludes {wanted}",
        f"wait for job{job}, or cancel it" if job else "wait for it",
    )


def _afloat(node: Node, wanted: str) -> DeviceInUse:
    below = node.backing.name if node.backing is not None else ""
    return DeviceInUse(
        f"Node '{node.name}' is busy: '{below}' below it is in use by a writable export, so it "
        f"shows no moment, which excludes {wanted}",
        "blockdev-backup with sync=none keeps the moment at which it starts; use it after that",
    )


def _remember(node: Node, index: identity.Index[Node]) -> None:
    """Note which local file or device the node is, if it is one."""
    if node.file is None and node.fd >= 0:
        index.add(node.places(), node)


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


def _parts(node: Node) -> Iterator[Node]:
    """What a node is made of, down to the protocol: all below it but its backing."""
    for role, child in children(node):
        if role != "backing":
            yield child
            yield from _parts(child)


def _is_filter(options: Mapping[str, Any]) -> bool:
    """Whether what they open passes on what it is told, to bitmaps too."""
    name = options.get("driver")
    return isinstance(name, str) and bool(driver(name).filter)


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


def actual_size(path: str) -> int:
    """Bytes that a file occupies on the host; none, if a server holds it. Raises `ImageError`.

    A device occupies all of its bytes, although the kernel counts no blocks for its name."""
    if names.is_uri(path):
        return 0
    try:
        st = os.stat(path)
        if stat.S_ISBLK(st.st_mode):
            number = f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
            with open(f"/sys/dev/block/{number}/size", encoding="ascii") as sectors:
                return int(sectors.read()) * 512
        return st.st_blocks * 512
    except OSError as error:
        raise ImageError(f"'{path}': {error.strerror}") from error
