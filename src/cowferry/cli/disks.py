"""snapshot, change, backing, add, remove, lock: what changes a disk at one moment, with no job."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import click

from cowferry.block import names as image_names
from cowferry.cli.client import TIMEOUT, Client, QmpError, connect
from cowferry.cli.options import (
    absolute,
    control,
    job_id,
    json_lines,
    json_output,
    pair,
    socket_path,
    speed,
)
from cowferry.cli.serve import disk_name
from cowferry.cli.sizes import Seconds
from cowferry.cli.waiting import JobWork, Words, follow
from cowferry.errors import CowferryError


@click.command("snapshot")
@click.argument("disks", metavar="DISK[=FILE]...", nargs=-1, required=True)
@click.option(
    "--quiesce", multiple=True, metavar="SOCKET",
    help="A guest agent's socket: freeze that guest's file systems meanwhile. May be repeated.",
)  # fmt: skip
@click.option(
    "--timeout", type=Seconds(), metavar="SECONDS",
    help="How long the daemon may take; with --quiesce, how long a guest may be frozen [10].",
)  # fmt: skip
@click.option("--reuse-external", is_flag=True, help="FILE exists: an empty overlay.")
@click.option(
    "--pass-fd", is_flag=True,
    help="FILE exists; open it here and hand it over, for a daemon that may not open it.",
)  # fmt: skip
@json_output
@socket_path
@click.pass_context
def snapshot_command(
    ctx: click.Context, /, disks: tuple[str, ...], quiesce: tuple[str, ...],
    timeout: float | None, reuse_external: bool, pass_fd: bool, as_json: bool, path: str | None,
) -> int:  # fmt: skip
    """Put a new image on top of every DISK, all at one point in time, while guests run.

    From then on FILE takes what the guest writes, and the old image stays as it was at that
    moment. Without FILE the daemon makes one beside the present image. FILE is QED if it is called
    so (x.qed), else qcow2. All disks, or none.

    \b
        cowferry snapshot vm
        cowferry snapshot vda=/images/vda.1.qcow2 vdb=/images/vdb.1.qcow2
        cowferry snapshot vda vdb --quiesce /run/vm/qga.sock --timeout 5
        cowferry snapshot vm=/images/mine.qcow2 --pass-fd
    """
    existing = reuse_external or pass_fd
    if not quiesce:
        ctx.meta[TIMEOUT], timeout = timeout, None
    chosen = [(disk, file and absolute(file)) for disk, file in map(pair, disks)]
    for disk, file in chosen:
        if existing and file is None:
            raise CowferryError(f"which file is to be used for '{disk}'?", f"{disk}=FILE")
    with connect(path) as client, handed_over(client, chosen if pass_fd else []) as names:
        entries: list[dict[str, Any]] = []
        for disk, file in chosen:
            entry: dict[str, Any] = {"device": disk}
            if file is not None:
                entry["snapshot-file"] = names.get(file, file)
            if existing:
                entry["mode"] = "existing"
            entries.append(entry)
        try:
            result = client.call(
                "x-disk-snapshot",
                disks=entries,
                quiesce=[absolute(socket) for socket in quiesce] or None,
                quiesce_timeout=timeout,
            )
        except QmpError as error:
            if "Permission denied" in error.desc and not pass_fd:
                error.hint = "the daemon lacks the right: make FILE yourself, and add --pass-fd"
            raise
        except KeyboardInterrupt:
            click.echo("snapshot: whether it has been taken says: cowferry tree", err=True)
            raise
    if as_json:
        click.echo(json.dumps(result))
        return 0
    for taken in result["disks"]:
        click.echo(f"{taken['device']}: {taken['snapshot-file']}")
    if result.get("frozen-seconds") is not None:
        count = f"{result.get('filesystems', 0)} file systems"
        click.echo(f"frozen for {result['frozen-seconds']:.3f} s: {count}")
    return 0


@contextlib.contextmanager
def handed_over(client: Client, chosen: list[tuple[str, str | None]]) -> Iterator[dict[str, str]]:
    """Open files here and lend the daemon their descriptors: what it calls each meanwhile."""
    names: dict[str, str] = {}
    sets: list[int] = []
    try:
        for _, file in chosen:
            if file is None or file in names:
                continue
            try:
                fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise CowferryError(
                    f"'{file}' cannot be opened: {error.strerror}",
                    f"make it first: cowferry create -f qcow2 {file} SIZE",
                ) from error
            try:
                number = client.call("add-fd", fds=[fd], opaque=f"snapshot {file}")["fdset-id"]
            finally:
                os.close(fd)
            sets.append(number)
            names[file] = f"/dev/fdset/{number}"
        yield names
    finally:
        for number in sets:
            with contextlib.suppress(CowferryError):
                client.call("remove-fd", fdset_id=number)


@click.command("change")
@click.argument("disk")
@click.argument("file")
@click.option("--format", metavar="FORMAT", help="raw, qcow2, qed [by FILE's name].")
@click.option(
    "--no-notify", is_flag=True,
    help="FILE holds what the disk does: the guest must not notice. The move is recorded.",
)  # fmt: skip
@click.option("--unsafe", is_flag=True, help="With --no-notify: do not compare the two images.")
@click.option("--force", is_flag=True, help="Cancel what runs on DISK first.")
@speed
@json_lines
@control
def change_command(
    disk: str, file: str, format: str | None, no_notify: bool, unsafe: bool, force: bool,
    speed: int, as_json: bool, path: str | None,
) -> int:  # fmt: skip
    """Switch DISK to the image in FILE, between two writes of its guest.

    Without options, FILE is another medium in the drive, of any size. With --no-notify it is the
    same disk somewhere else: FILE holds the same bytes, or is an overlay over the present image,
    and cowferry records that DISK is there now. cowferry compares the two first, which may take
    long; what the guest writes meanwhile is compared again. Ctrl-C cancels; the disk then stays
    where it is.

    \b
        cowferry change cdrom debian.iso
        cowferry change vm /srv/images/vm_1.qcow2 --no-notify
    """
    verify = no_notify and not unsafe
    if unsafe and not no_notify:
        raise click.UsageError(
            "--unsafe needs --no-notify, because another medium is never compared"
        )
    if speed and not verify:
        raise click.UsageError(
            "--speed limits the comparison: it needs --no-notify and excludes --unsafe"
        )
    target = absolute(file)
    with connect(path) as client:
        work = JobWork(client, job_id("change", disk))
        client.call(
            "change",
            device=disk, target=target, format=format, notify=not no_notify, force=force,
            unsafe=unsafe or None, speed=speed or None, x_job_id=work.id if verify else None,
        )  # fmt: skip
        if not verify:
            return 0
        words = Words(
            f"change {disk}",
            f"{disk} stays where it is",
            f"{disk} is intact and stays where it is; a guest that is not notified must find the "
            "same bytes (--unsafe skips the comparison)",
            pivoted=f"{disk} is on '{target}' now",
        )
        return follow(work, words, as_json)


@click.command("backing")
@click.argument("disk")
@click.argument("image")
@click.argument("name")
@click.option("--unsafe", is_flag=True, help="Do not compare the file NAME with the present one.")
@speed
@json_lines
@control
def backing_command(
    disk: str, image: str, name: str, unsafe: bool, speed: int, as_json: bool, path: str | None
) -> int:
    """Record NAME as the backing file in the header of IMAGE, which is in DISK's chain.

    This is `rebase -u` while the guest runs: for a backing file that has been moved, or will be
    found under another name. Only the header changes. IMAGE is a file or a node-name; NAME is
    recorded as it stands; if it is relative, it starts at IMAGE's folder. The file NAME must read
    the same as the present backing file: cowferry compares the two, unless --unsafe is given. A
    NAME that leads back to IMAGE is refused.

    \b
        cowferry backing vm vm.qcow2 ../templates/base.raw
    """
    if unsafe and speed:
        raise click.UsageError("--unsafe excludes --speed, which limits the comparison")
    with connect(path) as client:
        node = node_in(client, disk, image)
        work = JobWork(client, job_id("backing", disk))
        started = client.call(
            "change-backing-file",
            device=disk, image_node_name=node, backing_file=name, unsafe=unsafe or None,
            speed=speed or None, x_job_id=work.id,
        )  # fmt: skip
        if not started.get("job"):
            return 0
        words = Words(
            f"backing {disk}",
            "the header names the old backing file",
            "the header names the old backing file; the new one must hold the same bytes where the "
            "disk shows them (--unsafe skips the comparison)",
            pivoted=f"the header names '{name}'",
        )
        return follow(work, words, as_json)


def node_in(client: Client, disk: str, image: str) -> str:
    """The node-name of an image in a disk's chain. Raises `CowferryError`."""
    (tree,) = client.call("x-query-tree", device=disk)
    layers = tree["chain"]
    here = os.path.realpath(image) if os.path.exists(image) else image
    for layer in layers:
        names = (layer["node-name"], layer["filename"], os.path.realpath(layer["filename"]))
        if image in names or here in names:
            return str(layer["node-name"])
    named = [x for x in layers if os.path.basename(x["filename"]) == image]
    if len(named) == 1:
        return str(named[0]["node-name"])
    below = " <- ".join(x["filename"] for x in reversed(layers))
    raise CowferryError(f"Image '{image}' is not in the chain of '{disk}'", below)


@click.command("add")
@click.argument("disk", metavar="[NAME=]FILE")
@click.option("-f", "--format", metavar="FORMAT", help="raw, qcow2, qed [by FILE's name].")
@click.option("-r", "--read-only", is_flag=True, help="Open FILE read-only.")
@click.option("--copy-on-read", is_flag=True, help="Keep what is read from the backing chain.")
@control
def add_command(
    disk: str, format: str | None, read_only: bool, copy_on_read: bool, path: str | None
) -> int:
    """Open FILE as one more disk of a daemon that runs, and export it under NAME.

    NAME is the file's own if it is not given. A disk that has moved since (a snapshot, a copy) is
    opened where it is now.

    \b
        cowferry add data=/images/data.qcow2
    """
    name, file = disk_name(disk)
    with connect(path) as client:
        opened = client.call(
            "x-disk-add",
            device=name, filename=absolute(file), format=format, read_only=read_only,
            copy_on_read=copy_on_read,
        )  # fmt: skip
    from cowferry.drivers import opening

    where = opened["filename"]
    if not image_names.same(opening.canonical(file), where):
        click.echo(f"{name}: '{file}' has moved to '{where}'", err=True)
    for uri in opened["uris"]:
        click.echo(f"{name}: {uri}")
    return 0


@click.command("remove")
@click.argument("disk")
@click.option("--force", is_flag=True, help="Cancel what runs on DISK, and disconnect its clients.")
@control
def remove_command(disk: str, force: bool, path: str | None) -> int:
    """Let go of DISK: it is exported no more, and its images are closed.

    The files stay. A disk on which something runs is not removed, unless --force cancels it first;
    one that is locked is not removed at all.

    \b
        cowferry remove vm --force
    """
    with connect(path) as client:
        client.call("x-disk-remove", device=disk, force=force)
    return 0


@click.command("lock")
@click.argument("disk")
@click.option("--reason", required=True, metavar="TEXT", help="What others are told.")
@control
def lock_command(disk: str, reason: str, path: str | None) -> int:
    """Let nobody change DISK: no job starts on it, and it is not resized or removed.

    Its guest reads and writes as ever. The lock holds until `cowferry unlock`, or until the daemon
    ends.

    \b
        cowferry lock vm --reason "under legal hold, ask Ada"
    """
    if not reason.strip():
        raise CowferryError("an empty --reason", "say why: it is what others are told")
    with connect(path) as client:
        client.call("x-disk-lock", device=disk, reason=reason)
    return 0


@click.command("unlock")
@click.argument("disk")
@control
def unlock_command(disk: str, path: str | None) -> int:
    """Undo `cowferry lock`."""
    with connect(path) as client:
        client.call("x-disk-unlock", device=disk)
    return 0


@click.command("locks")
@json_output
@control
def locks_command(as_json: bool, path: str | None) -> int:
    """List the disks that are locked, and why."""
    with connect(path) as client:
        locks = client.call("x-query-locks")
    if as_json:
        click.echo(json.dumps(locks, indent=4))
        return 0
    for lock in locks:
        click.echo(f"{lock['device']}: {lock['reason']}")
    if not locks:
        click.echo("No disk is locked")
    return 0
