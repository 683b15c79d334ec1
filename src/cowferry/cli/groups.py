"""group: jobs on several disks of one guest, which are one thing and end at one point in time."""

from __future__ import annotations

import itertools
import json
from typing import Any

import click

from cowferry.cli.client import Client, QmpError, connect
from cowferry.cli.jobs import in_words, intent_of
from cowferry.cli.options import (
    ON_READY,
    absolute,
    control,
    copy_mode,
    ending,
    exclusive,
    image,
    in_background,
    json_lines,
    json_output,
    no_waiting,
    pair,
    speed,
)
from cowferry.cli.sizes import human
from cowferry.cli.waiting import AtReady, GroupWork, Words, follow, started
from cowferry.errors import CowferryError

PIVOTED = {
    "stream": "every disk has been filled",
    "copy": "every disk has moved",
    "commit": "every disk has moved",
}
CANCELLED = {
    "stream": "the disks keep their backing files",
    "commit": "every disk reads as before; the bases are of no use by themselves until it is done",
    "copy": "every disk stays where it is; the copies are gone (a device keeps a part)",
}
FAILED = "every disk is intact, and reads as before; once the cause is mended, run it again"

name = click.option("--id", metavar="ID", help="The group's name [its type, as in copy-group].")
policy = click.option(
    "--policy", type=click.Choice(["all", "each"]), default="all", show_default=True,
    help="When one fails: call all of them off, or let each go on.",
)  # fmt: skip


@click.group("group")
def group_command() -> None:
    """Stream, copy or commit several disks as one.

    The group is ready when all its members are, and then moves all of them at one point in time:
    every disk of a guest, or none. It is shown as one thing, with its members.

    \b
        cowferry group copy vda=/fast/vda.raw vdb=/fast/vdb.raw --pivot
    """


@group_command.command("stream", short_help="Fill several disks from their backing chains.")
@click.argument("disks", metavar="DISK[=BASE]...", nargs=-1, required=True)
@name
@policy
@speed
@in_background
@json_lines
@control
def group_stream(
    disks: tuple[str, ...], in_background: bool, as_json: bool, path: str | None, **more: Any
) -> int:
    """Fill every DISK from its backing chain, down to BASE if one is named.

    The disks let go of what is below at one point in time: all of them, or none.

    \b
        cowferry group stream vda vdb=base.raw --policy each
    """
    members = [{"device": d, "base": image(base)} for d, base in map(pair, disks)]
    return _start("stream", members, None, in_background, as_json, path, **more)


@group_command.command("copy", short_help="Copy several disks, and move them at one point in time.")
@click.argument("disks", metavar="DISK=DEST...", nargs=-1, required=True)
@name
@policy
@click.option("--format", metavar="FORMAT", help="Of every DEST [by its name, else the disk's].")
@ending(
    "When all are ready, move every DISK to its DEST.",
    "When all are ready, end with copies of that moment.",
)
@in_background
@copy_mode
@speed
@json_lines
@control
def group_copy(
    disks: tuple[str, ...], format: str | None, pivot: bool, finish: bool, in_background: bool,
    as_json: bool, path: str | None, **more: Any,
) -> int:  # fmt: skip
    """Copy every DISK to its DEST; with --pivot, move all of them there at one point in time.

    With neither --pivot nor --finish this command returns when all are ready, and says how to go
    on; with --async, at once.

    \b
        cowferry group copy vda=/fast/vda.raw vdb=/fast/vdb.raw --id night --pivot
    """
    at_ready = exclusive(pivot, finish) or "stay"
    members = []
    for disk, dest in map(pair, disks):
        if dest is None:
            raise CowferryError(f"'{disk}' needs a destination", f"{disk}=FILE")
        members.append({"device": disk, "target": absolute(dest), "format": format})
    return _start("copy", members, at_ready, in_background, as_json, path, **more)


@group_command.command("commit", short_help="Merge several disks into images of their chains.")
@click.argument("disks", metavar="DISK[=BASE]...", nargs=-1, required=True)
@name
@policy
@ending(
    "When all are ready, move every DISK to its base. This is the default.",
    "When all are ready, end with the disks where they are.",
)
@in_background
@speed
@json_lines
@control
def group_commit(
    disks: tuple[str, ...], pivot: bool, finish: bool, in_background: bool, as_json: bool,
    path: str | None, **more: Any,
) -> int:  # fmt: skip
    """Merge every DISK into BASE, else into the lowest image of its chain, all at one point.

    \b
        cowferry group commit vda vdb
    """
    at_ready = exclusive(pivot, finish) or ("stay" if in_background else "pivot")
    members = [{"device": d, "base": image(base)} for d, base in map(pair, disks)]
    return _start("commit", members, at_ready, in_background, as_json, path, **more)


def _start(
    kind: str, members: list[dict[str, Any]], at_ready: AtReady | None, in_background: bool,
    as_json: bool, path: str | None, *, id: str | None, **more: Any,
) -> int:  # fmt: skip
    with connect(path) as client:
        id = id or free_id(client, f"{kind}-group")
        work = GroupWork(client, id)
        plain = [{k: v for k, v in m.items() if v is not None} for m in members]
        try:
            client.call(
                "x-group-start", id=id, type=kind, members=plain,
                on_ready=ON_READY[at_ready] if at_ready is not None else None, **more,
            )  # fmt: skip
        except QmpError as error:
            if "--reuse-external" in error.hint:  # which is for one disk
                error.hint = "a group only copies to new files: name another one"
            raise
        if in_background:
            return started(work, as_json)
        words = Words(
            f"group {id}", CANCELLED[kind], FAILED,
            pivoted=PIVOTED[kind],
            finished="every disk stays where it is, and there is a copy of each at one moment",
            ready="    every destination follows its disk. To go on:\n"
            f"    move all of them:  cowferry group complete {id}\n"
            f"    end with copies:   cowferry group cancel --soft {id}",
        )  # fmt: skip
        return follow(work, words, as_json, at_ready)


def free_id(client: Client, wanted: str) -> str:
    """`wanted`, or with a number behind it if a group or a job has that name already."""
    taken = {e["id"] for asked in ("x-query-groups", "query-jobs") for e in client.call(asked)}
    names = itertools.chain([wanted], (f"{wanted}{n}" for n in itertools.count(2)))
    return next(name for name in names if name not in taken)


def find(client: Client, id: str) -> dict[str, Any]:
    """A group's entry in x-query-groups. Raises `CowferryError`."""
    entries: list[dict[str, Any]] = client.call("x-query-groups")
    for entry in entries:
        if entry["id"] == id:
            return entry
    known = ", ".join(e["id"] for e in entries) or "none"
    raise CowferryError(f"Group '{id}' not found", f"there are: {known}")


def draw(group: dict[str, Any]) -> list[str]:
    """A group on one line, and its members below."""
    share = 100 * group["offset"] / max(group["len"], 1)
    lines = [
        f"{group['id']}  {group['status']}  {share:.1f}% of {human(group['len'])}, "
        f"policy {group['policy']}"
    ]
    lines += [f"    {note}" for note in intent_of(group)]
    if group["status"] == "ready":
        id = group["id"]
        lines.append(
            f"    cowferry group complete {id} moves over; cowferry group cancel --soft {id} "
            "does not"
        )
    for member in group["members"]:
        shown = {**member, "ready": False, "x-on-ready": ""}  # the group's own are above
        lines += [f"    {line}" for line in in_words(shown)]
    return lines


@group_command.command("list", short_help="List the groups.")
@json_output
@control
def list_groups(as_json: bool, path: str | None) -> int:
    """List the groups, each with its members."""
    with connect(path) as client:
        entries = client.call("x-query-groups")
    if as_json:
        click.echo(json.dumps(entries, indent=4))
        return 0
    if not entries:
        click.echo("No active groups")
    for entry in entries:
        click.echo("\n".join(draw(entry)))
    return 0


@group_command.command("show", short_help="Show one group.")
@click.argument("id")
@json_output
@control
def show_group(id: str, as_json: bool, path: str | None) -> int:
    """Show one group, with its members."""
    with connect(path) as client:
        entry = find(client, id)
    click.echo(json.dumps(entry, indent=4) if as_json else "\n".join(draw(entry)))
    return 0


@group_command.command("complete", short_help="Let a ready group finish: all disks move.")
@click.argument("id")
@no_waiting
@json_lines
@control
def complete_group(id: str, in_background: bool, as_json: bool, path: str | None) -> int:
    """Let a ready group finish, and wait until it has: every disk moves at one point in time."""
    with connect(path) as client:
        work = GroupWork(client, id)
        work.complete()
        if in_background:
            return 0
        words = Words(
            f"group {id}", "every disk stays where it is", FAILED, pivoted="every disk has moved"
        )
        return follow(work, words, as_json)


@group_command.command("cancel", short_help="Call a group off.")
@click.argument("id")
@click.option("--soft", is_flag=True, help="Ready copies end as copies of one moment.")
@json_lines
@control
def cancel_group(id: str, soft: bool, as_json: bool, path: str | None) -> int:
    """Call every member of a group off, and wait until all have stopped.

    With --soft the members of a ready group of copies end well instead: their targets are copies
    of one moment.
    """
    with connect(path) as client:
        work = GroupWork(client, id)
        work.cancel(force=not soft)
        cancelled = "it was not ready, so its targets are incomplete" if soft else ""
        words = Words(
            f"group {id}", cancelled, FAILED, finished="there is a copy of each at one moment"
        )
        return follow(work, words, as_json, asked_to_stop=True)
