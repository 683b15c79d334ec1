"""Commands on jobs: today's `job-*`, and the older `block-job-*` that clients still use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cowferry.commands import Args, NoArgs, command, event
from cowferry.errors import CowferryError, DeviceNotActive
from cowferry.jobs.job import Job, check_speed
from cowferry.jobs.states import allow

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class JobId(Args):
    id: str


class Device(Args):
    device: str


OnReady = Literal["stay", "complete", "cancel"]
OnError = Literal["report", "ignore", "enospc", "stop", "auto"]


class JobOptions(Args, kw_only=True):
    """What every command takes that starts a job on a disk."""

    device: str
    job_id: str | None = None
    speed: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True

    def common(self) -> dict[str, Any]:
        """The same, as operations take it; the device goes before."""
        return {
            "job_id": self.job_id,
            "speed": self.speed,
            "auto_finalize": self.auto_finalize,
            "auto_dismiss": self.auto_dismiss,
        }


def job(daemon: Daemon, id: str) -> Job:
    """The job of that id, for the `job-*` commands."""
    found = daemon.jobs.get(id)
    if found is None:
        raise CowferryError("Job not found", "query-jobs lists them")
    return found


def block_job(daemon: Daemon, device: str) -> Job:
    """The job of that id or on that device, for the `block-job-*` commands."""
    found = daemon.job_on(device)
    if found is None or not found.is_block_job:
        raise DeviceNotActive(f"Block job '{device}' not found")
    return found


@command("query-jobs", locked=False)
def query_jobs(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """Every job: id, type, status, progress, error."""
    return [j.query() for j in daemon.jobs.all()]


@command("query-block-jobs", locked=False)
def query_block_jobs(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """Every job on a disk, in bytes."""
    return [j.query_block() for j in daemon.jobs.all() if j.is_block_job]


@command("x-query-failed-jobs", locked=False)
def query_failed_jobs(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """The last jobs that failed, if they dismissed themselves: as in query-block-jobs, with the
    error, and the time of the end as `x-ended`. job-dismiss forgets one."""
    return daemon.jobs.failed()


@command("job-pause")
def job_pause(daemon: Daemon, args: JobId) -> None:
    """Pause a job at its next chunk."""
    job(daemon, args.id).pause()


@command("job-resume")
def job_resume(daemon: Daemon, args: JobId) -> None:
    """Let a paused job go on."""
    job(daemon, args.id).resume()


@command("job-cancel")
def job_cancel(daemon: Daemon, args: JobId) -> None:
    """Call a job off; its events tell when it is over."""
    job(daemon, args.id).cancel(force=True)


@command("job-complete")
def job_complete(daemon: Daemon, args: JobId) -> None:
    """Let a ready job finish."""
    job(daemon, args.id).complete()


@command("job-finalize")
def job_finalize(daemon: Daemon, args: JobId) -> None:
    """Make a pending job's result true."""
    job(daemon, args.id).finalize()


@command("job-dismiss")
def job_dismiss(daemon: Daemon, args: JobId) -> None:
    """Forget a concluded job, or one of x-query-failed-jobs."""
    if daemon.jobs.get(args.id) is not None or not daemon.jobs.forget_failure(args.id):
        job(daemon, args.id).dismiss()


@command("block-job-pause")
def block_job_pause(daemon: Daemon, args: Device) -> None:
    """Pause the job on a disk."""
    block_job(daemon, args.device).pause()


@command("block-job-resume")
def block_job_resume(daemon: Daemon, args: Device) -> None:
    """Let the job on a disk go on."""
    block_job(daemon, args.device).resume()


@command("block-job-complete")
def block_job_complete(daemon: Daemon, args: Device) -> None:
    """Let the ready job on a disk finish."""
    block_job(daemon, args.device).complete()


@command("block-job-finalize")
def block_job_finalize(daemon: Daemon, args: JobId) -> None:
    """Make a pending job's result true."""
    block_job(daemon, args.id).finalize()


@command("block-job-dismiss")
def block_job_dismiss(daemon: Daemon, args: JobId) -> None:
    """Forget a concluded job."""
    block_job(daemon, args.id).dismiss()


class BlockJobCancel(Args):
    device: str
    force: bool = False


@command("block-job-cancel")
def block_job_cancel(daemon: Daemon, args: BlockJobCancel) -> None:
    """Call off the job on a disk; a paused one only with force."""
    found = block_job(daemon, args.device)
    if found.user_paused and not args.force:
        raise CowferryError(
            f"The block job for device '{args.device}' is currently paused",
            "resume it first, or use force",
        )
    found.cancel(force=args.force)


class BlockJobSetSpeed(Args):
    device: str
    speed: int


@command("block-job-set-speed")
def block_job_set_speed(daemon: Daemon, args: BlockJobSetSpeed) -> None:
    """Bytes per second from now on; 0 is unlimited."""
    found = block_job(daemon, args.device)
    check_speed(args.speed)
    found.set_speed(args.speed)


class BlockJobChange(Args):
    id: str
    type: Literal["mirror", "stream", "commit", "backup", "create"]
    copy_mode: Literal["background", "write-blocking"] | None = None


@command("block-job-change", locked=False)
def block_job_change(daemon: Daemon, args: BlockJobChange) -> None:
    """Change a running job's options."""
    found = block_job(daemon, args.id)
    allow(found.id, found.status, "change")
    if found.type != args.type:
        raise CowferryError(
            "Job type does not support change", f"job '{args.id}' is a {found.type}"
        )
    if args.copy_mode is None and found.type == "mirror":
        raise CowferryError("Parameter 'copy-mode' is missing")
    found.change(args.copy_mode)


@event("JOB_STATUS_CHANGE")
class JobStatusChange(msgspec.Struct):
    id: str
    status: str


class _BlockJobEvent(msgspec.Struct):
    type: str
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_COMPLETED")
class BlockJobCompleted(_BlockJobEvent, kw_only=True):
    error: str | None = None
    x_where: str | None = msgspec.field(name="x-where", default=None)  # in words


@event("BLOCK_JOB_CANCELLED")
class BlockJobCancelled(_BlockJobEvent):
    pass


@event("BLOCK_JOB_READY")
class BlockJobReady(_BlockJobEvent):
    pass


@event("BLOCK_JOB_PENDING")
class BlockJobPending(msgspec.Struct):
    type: str
    id: str


@event("BLOCK_JOB_ERROR")
class BlockJobError(msgspec.Struct):
    device: str
    operation: str
    action: str
