"""Groups of jobs: an extension, so the names begin with x-."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cowferry.commands import Args, NoArgs, command, event
from cowferry.commands.jobs import OnReady
from cowferry.errors import CowferryError
from cowferry.jobs.group import Group
from cowferry.jobs.job import check_speed
from cowferry.operations import commit, mirror, stream

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class Member(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """One disk of a group; `target` is for a copy, `base` for the others."""

    device: str
    target: str | None = None
    base: str | None = None
    format: str | None = None


class GroupStart(Args):
    id: str
    type: Literal["stream", "copy", "commit"]
    members: list[Member]
    policy: Literal["all", "each"] = "all"
    speed: int = 0
    copy_mode: Literal["background", "write-blocking"] = "background"
    converge_by: float = 0
    on_ready: OnReady = "stay"


@command("x-group-start")
def group_start(daemon: Daemon, args: GroupStart) -> None:
    """Start the same operation on several disks, as one: all members start, or none does."""
    daemon.jobs.check_id(args.id)
    check_speed(args.speed)
    if not args.members:
        raise CowferryError("a group needs members")
    names = [m.device for m in args.members]
    if len(set(names)) < len(names):
        raise CowferryError(f"a disk is named twice: {', '.join(names)}")
    group = Group(
        args.id, args.policy, on_ready=args.on_ready, emit=daemon.events.emit,
        gone=daemon.jobs.forget_group,
    )  # fmt: skip
    daemon.jobs.add_group(group)
    try:
        for m in args.members:
            job_id = f"{args.id}-{m.device}"
            common: dict[str, Any] = {"job_id": job_id, "speed": args.speed, "group": group}
            if args.type == "stream":
                stream.start(daemon, m.device, base=m.base, **common)
            elif args.type == "commit":
                commit.start(daemon, m.device, base=m.base, carry=True, **common)
            else:
                if m.target is None:
                    raise CowferryError(f"member '{m.device}' needs a target")
                mirror.copy(
                    daemon, m.device, m.target, format=m.format, copy_mode=args.copy_mode,
                    converge_by=args.converge_by, **common,
                )  # fmt: skip
    except BaseException:
        group.withdraw()
        raise
    group.open()


class GroupId(Args):
    id: str


def _group(daemon: Daemon, id: str) -> Group:
    group = daemon.jobs.groups.get(id)
    if group is None:
        known = ", ".join(daemon.jobs.groups) or "none"
        raise CowferryError(f"Group '{id}' not found", f"there are: {known}")
    return group


@command("x-group-complete")
def group_complete(daemon: Daemon, args: GroupId) -> None:
    """Let every member of a ready group finish, at one point in time."""
    _group(daemon, args.id).complete()


class GroupCancel(Args):
    id: str
    force: bool = True


@command("x-group-cancel")
def group_cancel(daemon: Daemon, args: GroupCancel) -> None:
    """Call every member off; without force a ready copy ends as a consistent copy."""
    _group(daemon, args.id).cancel(args.force)


@command("x-query-groups", locked=False)
def query_groups(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """Every group as one thing, with its members."""
    return [g.query() for g in list(daemon.jobs.groups.values())]


@event("JOB_GROUP_READY")
class JobGroupReady(msgspec.Struct):
    id: str


@event("JOB_GROUP_COMPLETED")
class JobGroupCompleted(msgspec.Struct):
    id: str
    members: list[str]
    error: str | None = None
    cancelled: bool = False
