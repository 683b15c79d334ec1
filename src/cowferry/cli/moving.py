"""stream, commit, copy: the verbs that run a job on one disk, and wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from cowferry.block import moves
from cowferry.cli.client import QmpError, Silent, connect
from cowferry.cli.options import (
    ON_READY,
    absolute,
    control,
    copy_mode,
    ending,
    exclusive,
    image,
    in_background,
    job_id,
    json_lines,
    on_error,
    speed,
)
from cowferry.cli.sizes import Seconds, Size
from cowferry.cli.waiting import JobWork, Words, follow, started
from cowferry.errors import CowferryError

STREAM_CANCELLED = "the disk keeps its backing file"
STREAM_FAILED = (
    "the disk is intact and keeps its backing file; once the cause is mended, run it again"
)
COMMIT_CANCELLED = (
    "the disk reads as before; if anything was copied already, the base is of no use by itself "
    "until the commit has been run again"
)
COMMIT_FAILED = (
    "the disk is intact and reads as before; once the cause is mended, run it again: if anything "
    "was copied already, the base is of no use by itself until then"
)


@click.command("stream")
@click.argument("disk")
@click.option("--base", metavar="IMAGE", help="Keep this image, and what is below it.")
@speed
@on_error()
@in_background
@json_lines
@control
def stream_command(
    disk: str, base: str | None, speed: int, on_error: str,
    in_background: bool, as_json: bool, path: str | None,
) -> int:  # fmt: skip
    """Fill DISK from its backing chain while its guest runs.

    At the end the image needs its old backing no more, and it may be deleted. With --base, what
    is between DISK and IMAGE is taken over, and IMAGE stays. Ctrl-C cancels; the disk then keeps
    its backing file, and streaming again goes on from there.

    \b
        cowferry stream vm --speed 50M
    """
    with connect(path) as client:
        work = JobWork(client, job_id("stream", disk))
        client.call(
            "block-stream",
            job_id=work.id, device=disk, base=image(base), speed=speed, on_error=on_error,
        )  # fmt: skip
        if in_background:
            return started(work, as_json)
        words = Words(f"stream {disk}", STREAM_CANCELLED, STREAM_FAILED)
        return follow(work, words, as_json)


@click.command("commit")
@click.argument("disk")
@click.option("--top", metavar="IMAGE", help="Commit from this image down [what the guest writes].")
@click.option("--base", metavar="IMAGE", help="Commit into this image [the lowest].")
@click.option(
    "--backing-file", metavar="NAME",
    help="What the image above --top is to record as its backing file, as it stands.",
)  # fmt: skip
@click.option(
    "--unsafe", is_flag=True, help="Record --backing-file even if it does not lead to the base."
)
@speed
@on_error()
@ending(
    "When everything is in the base, move DISK there. This is the default.",
    "When everything is in the base, end with DISK where it is: the base is a copy of it.",
)
@in_background
@json_lines
@control
def commit_command(
    disk: str, top: str | None, base: str | None, backing_file: str | None, unsafe: bool,
    speed: int, on_error: str, pivot: bool, finish: bool, in_background: bool, as_json: bool,
    path: str | None,
) -> int:  # fmt: skip
    """Merge layers of DISK's chain downwards while its guest runs.

    What the images from --top down to --base hold goes into --base, and the chain gets shorter:

    \b
        of base <- sn1 <- sn2 <- vm        this leaves
        cowferry commit vm                 base
        cowferry commit vm --top sn2       base <- vm
        cowferry commit vm --base sn1      base <- sn1

    Without --top the image that the guest writes is committed, too; DISK then moves to the base
    (--pivot) unless --finish is given. With --async and neither of them such a job stays ready
    until it is told how to end: cowferry job complete ID, or cowferry job cancel --soft ID.

    An IMAGE is a file, the name that a header records, or a node-name. A base that is smaller
    grows first. Ctrl-C cancels: DISK reads as before, but the base holds a
    part of what was above it, and is of no use by itself until the commit has been run again.
    Never commit into an image that other disks stand on, too: the daemon refuses the disks that
    it knows, and cannot know those of others.
    """
    at_ready = exclusive(pivot, finish) or ("stay" if in_background else "pivot")
    if unsafe and backing_file is None:
        raise click.UsageError("--unsafe needs --backing-file")
    with connect(path) as client:
        work = JobWork(client, job_id("commit", disk))
        client.call(
            "block-commit",
            job_id=work.id, device=disk, top=image(top), base=image(base),
            backing_file=backing_file, speed=speed, on_error=on_error, x_carry_bitmaps=True,
            x_unsafe=unsafe or None, x_on_ready=ON_READY[at_ready],
        )  # fmt: skip
        if in_background:
            return started(work, as_json)
        words = Words(
            f"commit {disk}", COMMIT_CANCELLED, COMMIT_FAILED,
            pivoted=f"{disk} is on its base now; the images above it may be deleted",
            finished=f"the base is a copy of that moment, and {disk} stays where it is",
        )  # fmt: skip
        return follow(work, words, as_json, at_ready)


@click.command("copy")
@click.argument("disk")
@click.argument("dest")
@click.option("--format", metavar="FORMAT", help="raw, qcow2, qed [by DEST's name, else DISK's].")
@click.option("--shallow", is_flag=True, help="DEST is an overlay on DISK's backing file.")
@click.option(
    "--keep", multiple=True, metavar="IMAGE",
    help="Copy this image of the chain as one of its own, beside DEST. May be repeated.",
)  # fmt: skip
@click.option("--chain", is_flag=True, help="Keep every image of the chain.")
@click.option("--reuse-external", is_flag=True, help="DEST exists: overwrite what is there.")
@ending(
    "When the copy is ready, move DISK there.",
    "When the copy is ready, end with a copy of that moment.",
)
@in_background
@copy_mode
@click.option(
    "--converge-by", type=Seconds(), metavar="SECONDS",
    help="Be ready by then: block, then slow the guest's writes if it comes to that.",
)  # fmt: skip
@click.option(
    "--granularity",
    type=Size(),
    metavar="SIZE",
    help="Look after changes in pieces of this size, a power of two.",
)
@click.option(
    "--buf-size",
    type=Size(),
    metavar="SIZE",
    help="Move no more than this at once [pieces are sized by the time they take].",
)
@speed
@on_error("--on-source-error", "a read")
@on_error("--on-target-error", "a write")
@json_lines
@control
def copy_command(
    disk: str, dest: str, pivot: bool, finish: bool, in_background: bool, as_json: bool,
    path: str | None, **more: Any,
) -> int:  # fmt: skip
    """Copy DISK to DEST while its guest runs, and move it there if that is wanted.

    DEST, a file or a block device, gets all that DISK reads as. When it has caught up it is ready,
    and follows every write from then on: --pivot moves DISK over and leaves the old image as it
    was, --finish ends with DEST as a copy of that moment. With neither this command returns when
    the copy is ready, and says how to go on; with --async, at once. The daemon remembers --pivot
    and --finish: a terminal that is lost, or a verb that is killed, changes nothing.

    --chain copies a chain as a chain, into DEST and files of the old names beside it; --keep names
    the images that are to stay, and the others are merged into the next one above.

    \b
        cowferry copy vm /fast/vm.raw --pivot
        cowferry copy vm /fast/vm.qcow2 --chain --pivot --converge-by 60
        cowferry copy vm /backup/vm.qcow2 --finish
        cowferry copy vm /dev/vg/vm --format raw --pivot

    Ctrl-C cancels: DISK stays where it is, and a DEST that was made is removed. A copy to a raw
    image that was interrupted by a crash or an error goes on when the same command is given again:
    what it lacks is kept in a bitmap of DISK, which DEST.copying beside it names.
    """
    at_ready = exclusive(pivot, finish) or "stay"
    dest = absolute(dest)
    if os.path.isdir(dest):
        raise CowferryError(f"'{dest}' is a folder", f"name the file: {dest}/{disk}.qcow2")
    with goes_on(disk, dest), connect(path) as client:
        work = JobWork(client, job_id("copy", disk))
        command, arguments = copy_arguments(**more)
        several = bool(arguments.get("keep"))
        try:
            client.call(
                command, job_id=work.id, device=disk, target=dest, x_on_ready=ON_READY[at_ready],
                **arguments,
            )  # fmt: skip
        except QmpError as error:
            if several and "--reuse-external" in error.hint:  # which is for one image
                error.hint = "--chain and --keep copy to new files only: name another folder"
            raise
        if in_background:
            return started(work, as_json)
        written = f"'{dest}'{' and what was copied beside it' if several else ''}"
        if command == "drive-mirror" or not may_be_made(dest):
            left = f"{written} may hold a part of the copy"
        else:
            left = f"what the copy wrote to {written} is removed"
        words = Words(
            f"copy {disk}",
            f"{disk} stays where it is; {left}",
            f"{disk} is intact and stays where it is; {left}",
            pivoted=f"{disk} is on '{dest}' now",
            finished=f"'{dest}' is a copy of that moment",
            ready=f"    '{dest}' follows what {disk} writes. To go on:\n"
            f"    move {disk} there:  cowferry job complete {work.id}\n"
            f"    end with a copy:  cowferry job cancel --soft {work.id}",
        )  # fmt: skip
        return follow(work, words, as_json, at_ready)


def may_be_made(dest: str) -> bool:
    """Whether a copy to `dest` makes a file, and removes it again if it fails."""
    return os.path.isabs(dest) and not Path(dest).is_block_device()


@contextmanager
def goes_on(disk: str, dest: str) -> Iterator[None]:
    """If the copy ends other than by a refusal, say that it can be gone on with.

    While the daemon is silent, the job is still there."""
    try:
        yield
    except (QmpError, Silent):
        raise
    except CowferryError as error:
        with suppress(OSError):
            if moves.half_copied(dest) is not None:
                error.hint = f"{disk} is intact; the same command goes on from there"
        raise


def copy_arguments(
    shallow: bool, keep: tuple[str, ...], chain: bool, reuse_external: bool, **more: Any
) -> tuple[str, dict[str, Any]]:
    """The QMP command, and its arguments, for a copy. Raises `CowferryError`."""
    if chain and (keep or shallow):
        raise click.UsageError("--chain excludes --keep and --shallow")
    if keep and shallow:
        raise click.UsageError("--keep and --shallow exclude each other")
    if not reuse_external:
        kept = ["*"] if chain else [image(name) for name in keep]
        return "x-disk-copy", {**more, "shallow": shallow, "keep": kept or None}
    if chain or keep:
        raise click.UsageError("--reuse-external is for one image: not with --chain or --keep")
    sync = "top" if shallow else "full"
    return "drive-mirror", {**more, "sync": sync, "mode": "existing"}
