"""Limits of disks, as QEMU has them (block_set_io_throttle), and as a person changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cowferry.block.limits import NONE, Group, Limits
from cowferry.commands import Args, command
from cowferry.errors import CowferryError

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.daemon import Daemon
    from cowferry.graph import Graph


class Bursts(Args, kw_only=True, rename=str):
    """What both commands take. Per second; the lengths are in seconds, iops_size in bytes."""

    bps_max: int | None = None
    bps_rd_max: int | None = None
    bps_wr_max: int | None = None
    iops_max: int | None = None
    iops_rd_max: int | None = None
    iops_wr_max: int | None = None
    bps_max_length: int | None = None
    bps_rd_max_length: int | None = None
    bps_wr_max_length: int | None = None
    iops_max_length: int | None = None
    iops_rd_max_length: int | None = None
    iops_wr_max_length: int | None = None
    iops_size: int | None = None
    group: str | None = None

    def limits(self) -> dict[str, int]:
        """The members that were given and are limits."""
        fields = msgspec.to_builtins(self)
        return {k: v for k, v in fields.items() if v is not None and k in KNOWN}


KNOWN = frozenset(NONE.flat())


class SetIoThrottle(Bursts, kw_only=True, rename=str):
    """QMP: BlockIOThrottle."""

    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    device: str | None = None
    id: str | None = None


@command("block_set_io_throttle")
def block_set_io_throttle(daemon: Daemon, args: SetIoThrottle) -> None:
    """Limit what guests read and write of a disk, from now on. All zero: no limits.

    The limits are those of a group, all of whose disks share them: the one named, else the one in
    which the disk is, else one that is called as the disk is."""
    if (args.device is None) == (args.id is None):
        raise CowferryError("Need exactly one of 'device' and 'id'")
    disk = daemon.graph.disk(args.device or args.id or "")
    put(daemon, disk, Limits.of(args.limits()), args.group)


class DiskLimit(Bursts, kw_only=True, rename=str):
    device: str
    bps: int | None = None
    bps_rd: int | None = None
    bps_wr: int | None = None
    iops: int | None = None
    iops_rd: int | None = None
    iops_wr: int | None = None
    off: bool = False


@command("x-disk-limit")
def disk_limit(daemon: Daemon, args: DiskLimit) -> dict[str, Any]:
    """Change some of a disk's limits, and leave the others; what they are then.

    A total takes the place of those for reads and writes, and the reverse. `group` alone puts the
    disk into a group that exists; `off` takes all limits away."""
    graph = daemon.graph
    disk = graph.disk(args.device)
    changes = args.limits()
    if args.off:
        if changes or args.group is not None:
            raise CowferryError("'off' takes all limits away, and goes with no other limit")
        put(daemon, disk, NONE, None)
        return entry(daemon, disk)
    if not changes and args.group is None:
        raise CowferryError(
            f"no limit was given for '{args.device}'", "x-query-limits tells what they are"
        )
    tidy(graph)
    group = graph.groups.get(args.group) if args.group is not None else None
    if args.group is not None and group is None and not changes:
        raise CowferryError(
            f"Throttle group '{args.group}' does not exist", "give limits, and it is made"
        )
    if group is None and disk.limits is not None and args.group in (None, disk.limits.group.name):
        group = disk.limits.group
    put(daemon, disk, (group.limits if group else NONE).with_changes(changes), args.group)
    return entry(daemon, disk)


class QueryLimits(Args):
    device: str | None = None


@command("x-query-limits", locked=False)
def query_limits(daemon: Daemon, args: QueryLimits) -> list[dict[str, Any]]:
    """The limits of a disk, or of each that has some: {device, group, with, waiting, limits}.

    `also`: {group, limits} of each further group, if it lies over several throttle nodes."""
    if args.device is not None:
        return [entry(daemon, daemon.graph.disk(args.device))]
    return [entry(daemon, d) for d in daemon.graph.all_disks() if d.limits is not None]


def entry(daemon: Daemon, disk: Disk) -> dict[str, Any]:
    """One disk's limits: those that are set. `with`: the other disks of its group."""
    member = disk.limits
    out: dict[str, Any] = {"device": called(daemon.graph, disk), "limits": {}, "waiting": 0}
    if member is not None:
        graph = daemon.graph
        others = [called(graph, d) for d in sharing(graph, member.group) if d is not disk]
        out |= {"group": member.group.name, "with": others}
        out["waiting"] = sum(m.waiting for m in disk.members)
        out["limits"] = shown(member.group.limits)
        if len(disk.members) > 1:
            groups = [m.group for m in disk.members[1:]]
            out["also"] = [{"group": g.name, "limits": shown(g.limits)} for g in groups]
    return out


def called(graph: Graph, disk: Disk) -> str:
    """A disk's name, or that of the node that is its root now."""
    return disk.name if disk in graph.disks.values() else disk.root.name


def shown(limits: Limits) -> dict[str, int]:
    """The numbers that say something, in QMP's names."""
    flat = limits.flat()
    return {
        name: value
        for name, value in flat.items()
        if value and (not name.endswith("_length") or flat[name.removesuffix("_length")])
    }


def sharing(graph: Graph, group: Group) -> list[Disk]:
    """The disks that keep to a group's limits."""
    return [d for d in graph.all_disks() if any(m.group is group for m in d.members)]


def users(daemon: Daemon, name: str) -> list[str]:
    """Who needs the group of that name: disks, and throttle nodes."""
    graph = daemon.graph
    group = graph.groups.get(name)
    disks = [called(graph, d) for d in sharing(graph, group)] if group is not None else []
    nodes = [n.name for n in graph.every_node() if n.throttle_group == name]
    return [*dict.fromkeys(disks + nodes)]


def tidy(graph: Graph) -> None:
    """Forget groups that came with a disk's limits and that nobody is in any more."""
    with graph.lock:
        named = {n.throttle_group for n in graph.nodes.values()}
        for name, group in list(graph.groups.items()):
            if not (group.owned or name in named or sharing(graph, group)):
                del graph.groups[name]


def put(daemon: Daemon, disk: Disk, limits: Limits, name: str | None) -> None:
    """Let a disk keep to limits, as those of a group. Raises `CowferryError` for what would have
    no effect, with everything as it was."""
    graph = daemon.graph
    tidy(graph)
    present = disk.limits.group if disk.limits is not None else None
    if name == "":
        raise CowferryError("Parameter 'group' expects a name")
    name = name or (present.name if present is not None else disk.name)
    if present is not None and (not limits or name != present.name):
        named = [n for n in graph.every_node() if n.throttle_group == present.name]
        held = next((n for n in named if disk in graph.disks_above(n)), None)
        if held is not None:
            raise CowferryError(
                f"The limits of '{called(graph, disk)}' come from throttle node '{held.name}'",
                f"change those of its group: qom-set {present.name}; or give the node another "
                "group: blockdev-reopen",
            )
    if not limits:
        disk.limit(None)
    else:
        check_reached(graph, disk)
        reads = any(r.average for r in (limits.bps, limits.bps_rd, limits.iops, limits.iops_rd))
        if disk.read_only and not reads:
            raise CowferryError(
                f"Disk '{disk.name}' is read-only: a limit for its writes has no effect",
                "limit its reads, or all of it",
            )
        group = graph.groups.get(name)
        if group is None:
            group = graph.groups[name] = Group(name, limits)
        else:
            group.change(limits)
        if group is not present:
            disk.limit(group)
    tidy(graph)


def check_reached(graph: Graph, disk: Disk) -> None:
    """Raise `CowferryError` if no guest's request can come to a disk: it has no name of its own,
    and nobody exports it."""
    with graph.lock:
        if disk in graph.disks.values() or graph.exported(disk.root):
            return
        over = graph.stranger(disk.root, [])
    if over is not None:
        raise CowferryError(
            f"{graph.called(disk.root)} lies below '{graph.short(over)}': no guest sends requests "
            "to it directly",
            f"limit '{graph.short(over)}' instead",
        )
    raise CowferryError(
        f"{graph.called(disk.root)} is not exported: no guest sends requests to it",
        "export it first (block-export-add), or put a throttle node over it",
    )
