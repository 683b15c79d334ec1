"""Objects that have a name and no disk: I/O threads, and groups of limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cowferry.block.limits import QOM_NAMES, Group, Limits
from cowferry.commands import Args, command, convert
from cowferry.commands.throttle import users
from cowferry.errors import CowferryError, DeviceNotFound
from cowferry.jobs.job import valid_id

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

CONTAINER = "/objects"
OURS = {qom: name for name, qom in QOM_NAMES.items()}


class ThrottleLimits(Args):
    """QMP: ThrottleLimits. Per second; the lengths are in seconds, iops-size in bytes."""

    bps_total: int | None = None
    bps_total_max: int | None = None
    bps_total_max_length: int | None = None
    bps_read: int | None = None
    bps_read_max: int | None = None
    bps_read_max_length: int | None = None
    bps_write: int | None = None
    bps_write_max: int | None = None
    bps_write_max_length: int | None = None
    iops_total: int | None = None
    iops_total_max: int | None = None
    iops_total_max_length: int | None = None
    iops_read: int | None = None
    iops_read_max: int | None = None
    iops_read_max_length: int | None = None
    iops_write: int | None = None
    iops_write_max: int | None = None
    iops_write_max_length: int | None = None
    iops_size: int | None = None


class ObjectAdd(Args):
    """An `iothread` has no further members. Those with x- are older names of the limits."""

    qom_type: str
    id: str
    limits: ThrottleLimits | None = None
    x_bps_total: int | None = None
    x_bps_total_max: int | None = None
    x_bps_total_max_length: int | None = None
    x_bps_read: int | None = None
    x_bps_read_max: int | None = None
    x_bps_read_max_length: int | None = None
    x_bps_write: int | None = None
    x_bps_write_max: int | None = None
    x_bps_write_max_length: int | None = None
    x_iops_total: int | None = None
    x_iops_total_max: int | None = None
    x_iops_total_max_length: int | None = None
    x_iops_read: int | None = None
    x_iops_read_max: int | None = None
    x_iops_read_max_length: int | None = None
    x_iops_write: int | None = None
    x_iops_write_max: int | None = None
    x_iops_write_max_length: int | None = None
    x_iops_size: int | None = None


@command("object-add")
def object_add(daemon: Daemon, args: ObjectAdd) -> None:
    """Make an `iothread` or a `throttle-group`.

    The former changes nothing, for each connection has a thread of its own; exports may name it.
    The latter is named by `throttle` nodes, and by block_set_io_throttle."""
    given = {k: v for k, v in msgspec.to_builtins(args).items() if v is not None}
    kind, ident = given.pop("qom-type"), given.pop("id")
    if kind not in ("iothread", "throttle-group"):
        raise CowferryError(f"invalid object type: {kind}", "iothread and throttle-group are known")
    if kind == "iothread" and given:
        raise CowferryError(f"Parameter '{min(given)}' is unexpected")
    if not valid_id(ident):
        raise CowferryError(
            "Parameter 'id' expects an identifier",
            "a letter, then letters, digits, '-', '.' and '_'",
        )
    groups = daemon.graph.groups
    if ident in daemon.iothreads or (ident in groups and groups[ident].owned):
        raise CowferryError(
            f"attempt to add duplicate property '{ident}' to object (type 'container')"
        )
    if kind == "iothread":
        daemon.iothreads.add(ident)
        return
    if users(daemon, ident):
        raise CowferryError("A group with this name already exists", "a disk's limits made it")
    limits = given.pop("limits", {})
    older = {k.removeprefix("x-"): v for k, v in given.items()}
    twice = next((name for name in older if limits.get(name, older[name]) != older[name]), None)
    if twice is not None:
        raise CowferryError(
            f"Parameters 'limits.{twice}' and 'x-{twice}' differ", "give one of them"
        )
    limits |= older
    groups[ident] = Group(ident, Limits.of(in_our_names(limits)), owned=True)


def in_our_names(given: dict[str, Any]) -> dict[str, int]:
    """What QOM calls bps-total is `bps`; members that are null were not given."""
    return {OURS[name]: value for name, value in given.items() if value is not None}


class ObjectDel(Args):
    id: str


@command("object-del")
def object_del(daemon: Daemon, args: ObjectDel) -> None:
    """Forget an object. Raises while a disk keeps to its limits, or a node names it."""
    if args.id in daemon.iothreads:
        daemon.iothreads.discard(args.id)
        return
    group = daemon.graph.groups.get(args.id)
    if group is None or not group.owned:
        raise CowferryError(f"object '{args.id}' not found")
    named = users(daemon, args.id)
    if named:
        raise CowferryError(
            f"object '{args.id}' is in use, can not be deleted", f"by {', '.join(named)}"
        )
    del daemon.graph.groups[args.id]


class QomPath(Args):
    path: str


class QomProperty(Args):
    path: str
    property: str


class QomSet(Args):
    path: str
    property: str
    value: Any


class ObjectProperty(msgspec.Struct):
    """QMP: ObjectPropertyInfo."""

    name: str
    type: str


def found(daemon: Daemon, path: str) -> tuple[str, Group | None]:
    """(type, the group if it is one) of an object by its id or path. Raises `DeviceNotFound`."""
    ident = path.removeprefix(f"{CONTAINER}/")
    group = daemon.graph.groups.get(ident)
    if group is not None and group.owned:
        return "throttle-group", group
    if ident in daemon.iothreads:
        return "iothread", None
    raise DeviceNotFound(f"Device '{path}' not found", "qom-list path=/objects lists the objects")


@command("qom-list", locked=False)
def qom_list(daemon: Daemon, args: QomPath) -> list[ObjectProperty]:
    """What there is under /objects, or the properties of an object."""
    own = ObjectProperty("type", "string")
    if args.path == "/":
        return [own, ObjectProperty(CONTAINER[1:], "child<container>")]
    if args.path.rstrip("/") == CONTAINER:
        kinds = dict.fromkeys(daemon.iothreads, "iothread")
        kinds |= {n: "throttle-group" for n, g in daemon.graph.groups.items() if g.owned}
        return [own, *(ObjectProperty(n, f"child<{k}>") for n, k in sorted(kinds.items()))]
    _, group = found(daemon, args.path)
    if group is None:
        return [own]
    older = [ObjectProperty(f"x-{name}", "int") for name in OURS]
    return [own, ObjectProperty("limits", "ThrottleLimits"), *older]


@command("qom-get", locked=False)
def qom_get(daemon: Daemon, args: QomProperty) -> Any:
    """A property of an object: `limits` of a throttle-group, one of the older names, `type`."""
    kind, group = found(daemon, args.path)
    if args.property == "type":
        return kind
    if group is not None:
        limits = {QOM_NAMES[name]: value for name, value in group.limits.flat().items()}
        if args.property == "limits":
            return limits
        if args.property.startswith("x-") and args.property[2:] in limits:
            return limits[args.property[2:]]
    raise CowferryError(f"Property '{kind}.{args.property}' not found")


@command("qom-set")
def qom_set(daemon: Daemon, args: QomSet) -> None:
    """Change `limits` of a throttle-group, with all who wait because of it. Members that are not
    given stay as they are."""
    kind, group = found(daemon, args.path)
    if group is not None and args.property == "limits":
        if not isinstance(args.value, dict):
            raise CowferryError("Invalid parameter type for 'limits', expected: object")
        given = convert(ObjectAdd, {"qom-type": kind, "id": group.name, "limits": args.value})
        limits = msgspec.to_builtins(given)["limits"]
        group.change(Limits.of(group.limits.flat() | in_our_names(limits)))
        return
    if group is not None and args.property.startswith("x-") and args.property[2:] in OURS:
        raise CowferryError("Property cannot be set after initialization", "set 'limits'")
    if args.property == "type":
        raise CowferryError(f"Property '{kind}.type' is not writable")
    raise CowferryError(f"Property '{kind}.{args.property}' not found")
