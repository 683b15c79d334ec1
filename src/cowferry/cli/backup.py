"""backup: what disks hold at one moment, pushed into new files, or pulled by others over NBD."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import click

from cowferry.cli.client import Client, QmpError, connect
from cowferry.cli.groups import free_id
from cowferry.cli.moving import may_be_made
from cowferry.cli.options import (
    absolute,
    control,
    in_background,
    job_id,
    json_lines,
    on_error,
    pair,
    speed,
)
from cowferry.cli.sizes import human
from cowferry.cli.waiting import (
    INTERRUPTED,
    LOOK,
    GroupWork,
    JobWork,
    Words,
    follow,
    interrupted_once,
    started,
)
from cowferry.errors import CowferryError

PULL = "pull"  # what a pull backup is called unless it is given a name


@click.command("backup")
@click.argument("disks", metavar="DISK DEST | DISK=DEST...", nargs=-1)
@click.option(
    "--incremental", is_flag=True, help="Copy only what --bitmap records; DEST lies over --base."
)
@click.option(
    "--top", is_flag=True, help="Copy only DISK's own image; DEST lies over its backing file."
)
@click.option(
    "--bitmap", metavar="NAME",
    help="The bitmap of the changes since a backup. A full backup begins it.",
)  # fmt: skip
@click.option(
    "--base", "bases", multiple=True, metavar="[DISK=]FILE",
    help="The previous backup (with --incremental or --pull).",
)  # fmt: skip
@click.option("--base-format", metavar="FORMAT", help="Format of --base [by its name].")
@click.option(
    "--unsafe", is_flag=True,
    help="Do not check that --bitmap counts from --base, nor that --base is unchanged.",
)  # fmt: skip
@click.option(
    "--format", metavar="FORMAT",
    help="Format of DEST [by its name, else DISK's; raw on a device or a server].",
)  # fmt: skip
@click.option("--compress", is_flag=True, help="Write compressed clusters; DEST is qcow2.")
@click.option(
    "--bitmap-mode", type=click.Choice(["on-success", "never", "always"]), default="on-success",
    show_default=True, help="When the bitmap counts anew from the moment of this backup.",
)  # fmt: skip
@click.option(
    "--scratch", metavar="DIR",
    help="Folder for old data until DEST or the pulling program has it [beside DISK's image].",
)  # fmt: skip
@click.option(
    "--on-cbw-error", type=click.Choice(["break-guest-write", "break-snapshot"]),
    help="If old data can be saved nowhere: fail the guest's write [push] or the backup [pull].",
)  # fmt: skip
@speed
@on_error("--on-source-error", "a read")
@on_error("--on-target-error", "a write")
@click.option("--pull", is_flag=True, help="Export every DISK of this moment, until Ctrl-C.")
@click.option("--end", is_flag=True, help="End a pull backup that went well.")
@click.option(
    "--failed", is_flag=True, help="With --end: the backup failed; bitmaps keep every bit."
)
@click.option(
    "--id", metavar="ID", help="The name of a pull backup, or of a group [pull, backup-group]."
)
@in_background
@json_lines
@control
def backup_command(
    disks: tuple[str, ...], pull: bool, end: bool, failed: bool, in_background: bool,
    as_json: bool, path: str | None, **more: Any,
) -> int:  # fmt: skip
    """Back up disks as they are at one moment, while their guests go on writing.

    Push: each DISK goes into a new file DEST. With --bitmap a full backup begins to record what
    changes from then on, and --incremental copies that into an overlay over the previous backup.
    The last DEST of a chain reads as the whole disk, and qemu-img or cowferry convert restores it.
    cowferry refuses --base if the bitmap counts from another backup, or if it was written since.

    \b
        cowferry backup vm /backup/mon.qcow2 --bitmap b0
        cowferry backup vm /backup/tue.qcow2 --incremental --bitmap b0 --base /backup/mon.qcow2
        cowferry backup vm=/backup/vm.qcow2 data=/backup/data.qcow2

    Pull: each DISK is exported over NBD, read-only, for another program to read; its URIs are
    printed. With --bitmap the export says what has changed (qemu:dirty-bitmap:NAME). --end, from
    any shell, ends the backup: the bitmap then says what has changed since the backup's moment.
    After Ctrl-C, or --end --failed, the bitmap keeps every bit.

    \b
        cowferry backup --pull vm data --bitmap b0
        cowferry backup --end

    A DEST that exists is refused, unless it is a block device or an NBD URI, which are overwritten.
    If the backup fails, a DEST that it made is removed, and the bitmap still says what it said
    before, and what was written since.
    """
    if failed and not end:
        raise click.UsageError("--failed goes with --end")
    if pull and end:
        raise click.UsageError("--pull and --end exclude each other")
    if end:
        if disks:
            raise click.UsageError("--end takes no DISK: it ends the backup called --id")
        with connect(path) as client:
            client.call("x-backup-export-end", id=more["id"] or PULL, failed=failed)
        return 0
    if not disks:
        raise click.UsageError("name a DISK")
    with connect(path) as client:
        if pull:
            return _pull(client, disks, in_background, as_json, **more)
        return _push(client, disks, in_background, as_json, **more)


def _push(
    client: Client, disks: tuple[str, ...], in_background: bool, as_json: bool, *,
    incremental: bool, top: bool, bases: tuple[str, ...], base_format: str | None,
    format: str | None, id: str | None, unsafe: bool, **more: Any,
) -> int:  # fmt: skip
    if unsafe and not incremental:
        raise click.UsageError("--unsafe needs --incremental")
    if incremental and top:
        raise click.UsageError("--incremental and --top exclude each other")
    mode = "incremental" if incremental else "top" if top else "full"
    pairs = _pairs(disks)
    before = _bases(bases, [disk for disk, _ in pairs])
    wanted = []
    for disk, dest in pairs:
        dest = absolute(dest)
        if os.path.isdir(dest):
            raise CowferryError(f"'{dest}' is a folder", f"name the file: {dest}/{disk}.qcow2")
        one = {
            "device": disk, "target": dest, "format": format, "base": before.get(disk),
            "base-format": base_format,
        }  # fmt: skip
        plain: dict[str, Any] = {k: v for k, v in one.items() if v is not None}
        wanted.append({**plain, "unsafe": True} if unsafe else plain)
    work: JobWork | GroupWork
    if len(pairs) > 1:
        work = GroupWork(client, id or free_id(client, "backup-group"))
        title = f"group {work.id}"
    else:
        work = JobWork(client, id or free_id(client, job_id("backup", pairs[0][0])))
        title = f"backup {pairs[0][0]}"
    if more["scratch"] is not None:
        more["scratch"] = absolute(more["scratch"])
    try:
        client.call("x-disk-backup", id=work.id, disks=wanted, mode=mode, **more)
    except QmpError as error:
        error.hint = error.hint.replace("name it as its base", "--base FILE names it")
        error.hint = error.hint.replace("name it; a", "--bitmap NAME names it; a")
        raise
    if in_background:
        return started(work, as_json)
    several = len(pairs) > 1
    kept = [f"'{one['target']}'" for one in wanted if not may_be_made(one["target"])]
    made = "DESTs that the backup made are" if several else "a DEST that the backup made is"
    gone = f"{made} removed"
    if kept:
        part = f"{' and '.join(kept)} may hold a part of the backup"
        gone = part if len(kept) == len(wanted) else f"{gone}; {part}"
    bits = "; the bitmap keeps every bit" if more["bitmap"] else ""
    if more["bitmap"] and more["bitmap_mode"] == "always":
        gone, bits = "what was copied stays: the next increment goes over it", ""
    files = ", ".join(one["target"] for one in wanted)
    words = Words(
        title,
        f"{gone}{bits}",
        f"the guest went on, and {gone}{bits}; once the cause is mended, run it again",
        pivoted=f"as of one moment in {files}" if several else f"as of its start in '{files}'",
    )
    return follow(work, words, as_json)


def _pairs(disks: tuple[str, ...]) -> list[tuple[str, str]]:
    """(disk, dest) of DISK DEST, or of DISK=DEST ... Raises `CowferryError`."""
    if len(disks) == 2 and "=" not in disks[0]:
        return [(disks[0], disks[1])]
    pairs = []
    for disk, dest in map(pair, disks):
        if dest is None:
            raise CowferryError(f"'{disk}' needs a destination", f"{disk}=FILE")
        pairs.append((disk, dest))
    return pairs


def _bases(given: tuple[str, ...], disks: list[str]) -> dict[str, str]:
    """The backup before, by disk. Raises `CowferryError`."""
    if len(disks) == 1 and len(given) == 1:
        file = given[0].removeprefix(f"{disks[0]}=")
        return {disks[0]: absolute(file)}
    out = {}
    for disk, base in map(pair, given):
        if disk not in disks or base is None:
            raise CowferryError(
                f"--base {disk} is for none of the disks", f"--base {disks[0]}=FILE, and so on"
            )
        out[disk] = absolute(base)
    return out


# Pull -------------------------------------------------------------------------------------


def _pull(
    client: Client, disks: tuple[str, ...], in_background: bool, as_json: bool, *,
    incremental: bool, top: bool, bases: tuple[str, ...], base_format: str | None,
    format: str | None, id: str | None, bitmap: str | None, bitmap_mode: str, scratch: str | None,
    on_cbw_error: str | None, speed: int, compress: bool, unsafe: bool, **unused: Any,
) -> int:  # fmt: skip
    if incremental or top or format or compress or speed or unsafe:
        raise click.UsageError(
            "--pull takes --bitmap, --bitmap-mode, --base, --base-format, --scratch and --id only"
        )
    before = _bases(bases, list(disks))
    wanted = [
        {k: v for k, v in one.items() if v is not None}
        for one in ({"device": d, "base": before.get(d), "base-format": base_format} for d in disks)
    ]
    if bitmap_mode == "always":
        raise click.UsageError("--bitmap-mode always is for a push: who pulls says how it went")
    id = id or PULL
    title = f"backup {id}"
    found = client.call(
        "x-backup-export", id=id, disks=wanted, bitmap=bitmap,
        anew=bitmap_mode != "never", on_cbw_error=on_cbw_error,
        scratch=absolute(scratch) if scratch is not None else None,
    )  # fmt: skip
    with interrupted_once():
        try:
            _show(title, found, as_json)
            if in_background:
                return 0
            return _hold(client, id, title)
        except KeyboardInterrupt:
            with contextlib.suppress(QmpError):  # it has just ended
                client.call("x-backup-export-end", id=id, failed=True)
            kept = "; the bitmap keeps every bit" if bitmap else ""
            click.echo(f"{title}: called off, the exports are gone{kept}", err=True)
            return INTERRUPTED


def _show(title: str, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    for disk in found["disks"]:
        click.echo(f"{disk['device']}: {disk['uris'][0] if disk['uris'] else disk['name']}")
    first = [disk for disk in found["disks"] if disk.get("first")]
    if first:
        name = first[0]["bitmap"]
        click.echo(f"{title}: bitmap '{name}' begins now, and says that all is dirty", err=True)
    end = f"cowferry backup --end{'' if found['id'] == PULL else ' --id ' + found['id']}"
    click.echo(f"{title}: kept until it is ended with: {end}", err=True)


def _hold(client: Client, id: str, title: str) -> int:
    """Until somebody ends it, or a moment is lost."""
    largest = 0  # bytes
    while True:
        next(client.wait_events(LOOK), None)
        found = [b for b in client.call("x-query-backup-exports") if b["id"] == id]
        if not found:
            click.echo(f"{title}: ended; at most {human(largest)} were in scratch files", err=True)
            return 0
        largest = max(largest, sum(d["scratch-bytes"] for d in found[0]["disks"]))
        for disk in found[0]["disks"]:
            if disk["state"] == "lost":
                with contextlib.suppress(QmpError):  # which says the same
                    client.call("x-backup-export-end", id=id, failed=True)
                raise CowferryError(
                    f"{title}: the moment of '{disk['device']}' is lost: {disk['error']}",
                    "what was read is no good; the disks are intact, the bitmaps keep every bit: "
                    "begin again, perhaps with --scratch on a larger file system",
                )
