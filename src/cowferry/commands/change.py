"""Another image for a disk or a node: change, change-backing-file, blockdev-reopen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowferry.commands import Args, command
from cowferry.errors import CowferryError, NotSupported
from cowferry.jobs.job import check_speed
from cowferry.operations import change as operation
from cowferry.operations import reopen

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class ChangeMedium(Args):
    device: str
    target: str
    arg: str | None = None
    format: str | None = None
    notify: bool = True
    force: bool = False
    unsafe: bool = False
    speed: int = 0
    x_job_id: str | None = None


def _check_speed(speed: int, job_id: str | None) -> None:
    check_speed(speed)
    if speed and job_id is None:
        raise CowferryError("Parameter 'speed' limits a job, so it needs 'x-job-id'")


@command("change", locked=False)
def change(daemon: Daemon, args: ChangeMedium) -> None:
    """Switch a disk to another image, under a drain (`format` may stand in `arg`, too).

    With `notify` false the guest is not told: the image has to hold the same bytes, and the move is
    recorded. They are compared first, unless it is `unsafe`; with `x-job-id` by a job, and this
    returns when that has started. An image whose backing file is the present one goes on top."""
    if args.device == "vnc":
        raise NotSupported("there is no VNC here")
    if args.force:
        daemon.cancel_on(args.device)
    _check_speed(args.speed, args.x_job_id)
    if args.x_job_id is not None and (args.notify or args.unsafe):
        raise CowferryError(
            "Parameter 'x-job-id' needs notify=false, and excludes unsafe",
            "the job compares the two images; in other cases nothing is compared",
        )
    with daemon.turn():
        operation.change(
            daemon, args.device, args.target, args.format or args.arg, quietly=not args.notify,
            unsafe=args.unsafe, job_id=args.x_job_id, speed=args.speed,
        )  # fmt: skip


class ChangeBackingFile(Args):
    device: str
    image_node_name: str
    backing_file: str
    unsafe: bool = False
    speed: int = 0
    x_job_id: str | None = None


@command("change-backing-file", locked=False)
def change_backing_file(daemon: Daemon, args: ChangeBackingFile) -> dict[str, str]:
    """Write another backing file name into an image's header, if it leads to the same bytes.

    What is there is compared, unless it is the same file, or it is `unsafe`. With `x-job-id` a job
    does that: this returns when the job has started, with its id as `job`, if there is one."""
    _check_speed(args.speed, args.x_job_id)
    with daemon.turn():
        job = operation.change_backing_file(
            daemon, args.device, args.image_node_name, args.backing_file, unsafe=args.unsafe,
            job_id=args.x_job_id, speed=args.speed,
        )  # fmt: skip
    return {} if job is None else {"job": job.id}


class BlockdevReopen(Args):
    options: list[dict[str, Any]]


@command("blockdev-reopen")
def blockdev_reopen(daemon: Daemon, args: BlockdevReopen) -> None:
    """Change access, backing or file of nodes: all of them, or none."""
    reopen.reopen(daemon, args.options)
