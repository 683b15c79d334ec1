"""Jobs: long work on disks that can be watched, paused, slowed and called off.

A job is a generator. `run()` yields `Progress` between chunks, and a yield is the only place
where a job can be paused, throttled or cancelled; cancelling closes the generator, so its
`finally` is the clean-up and no write is ever torn out of flight. Everything around the
generator is here: the states, the events and their order, the error policy, the rate limit.

A new kind of job is one new file with one subclass of `Job` that says

* `type`, the name that QMP gives it;
* `run()`, the work, as a generator;
* the end, in steps that make the result true: `approach` (outside any drain), `drains` (which
  disks stand still), `settle` (the last work that may fail; `unsettle` undoes it), `moves` (which
  image a disk leaves for which: recorded durably), `switch` (in memory; cannot fail, and waits for
  nobody), then `parted`, outside again.
  They run when the job is finalised, so with `auto_finalize` off the graph changes only then.
  The members of a group take each step together, under one drain: all end so, or none does;
* `clean()`, run last, whatever happened.

I/O that may fail goes through `attempt`, which knows the error policies: it retries, pauses or
raises as the policy says, and hands the same chunk to the work again after a resume.

A test steps a job by hand: `for _ in job.run(): ...`, with writes in between.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from cowferry.block.node import Node, read
from cowferry.block.scope import CalledOff, Scope, inside
from cowferry.block.throttle import TIMER, Throttle, unless_gone
from cowferry.errors import CowferryError
from cowferry.jobs.ending import NO_ANSWER, PAUSE_SECONDS, Cancelled, Ending, finish
from cowferry.jobs.states import TRANSITIONS, Status, allow

if TYPE_CHECKING:
    from cowferry.jobs.group import Group

log = logging.getLogger(__name__)
T = TypeVar("T")

ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
SCRATCH = 1 << 20  # bytes read at once to see whose error it was
ON_READY = ("stay", "complete", "cancel")
POLICIES = ("report", "ignore", "enospc", "stop", "auto")
MOMENT_SECONDS = 1.0  # that a job has to stop by itself when the daemon ends
GRACE = 5.0  # seconds after which a job that was called off gives up I/O that hangs
CLEAN_SECONDS = 60.0  # that what is left to do at the end of a job may wait
SOON_SECONDS = 2.0  # the same of a job that was given up: for each thing it waits for
MAX_FAILURES = 32  # jobs that failed and are listed
Emit = Callable[[str, dict[str, Any]], None]


class Progress(NamedTuple):
    """What a yield says: bytes gone over since the last one, and bytes moved (the throttle's)."""

    done: int = 0
    moved: int = 0
    error: OSError | None = None  # the policy says stop: pause, then go on with the same chunk
    ready: bool = False  # converged; the job goes on until it is told to complete
    idle: float = 0.0  # seconds to wait, for there is nothing to do


class Job(Ending):
    """One job. Verbs may be called from any thread; the generator runs in the job's own."""

    type: ClassVar[str] = ""
    patient = True
    paced: bool = True  # whether it is the job that does the work, so that its speed matters
    is_block_job: ClassVar[bool] = True  # BLOCK_JOB_* events, and a place in query-block-jobs

    def __init__(
        self,
        *,
        length: int = 0,
        speed: int = 0,
        on_error: str = "report",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_ready: str = "stay",
    ) -> None:
        """`on_ready`: what it does once it is ready: stay so, complete, or end by a soft cancel."""
        if on_error not in POLICIES:
            raise CowferryError(f"Parameter 'on-error' does not accept value '{on_error}'")
        if on_ready not in ON_READY:
            raise CowferryError(f"Parameter 'on-ready' does not accept value '{on_ready}'")
        check_speed(speed)
        self.on_ready = on_ready
        self.id = ""  # given by Jobs
        self.length = length  # bytes in all
        self.offset = 0  # bytes done
        self.on_error = on_error
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.throttle = Throttle(speed)
        self.error: str | None = None
        self.where = ""  # of an error that ended it, in words: "writing '/x/t.raw'"
        self.ignored: OSError | None = None  # the first error that policy "ignore" passed over
        self.io_status = "ok"
        # Duty: `changed` guards everything below, and is notified whenever any of it changes.
        self.changed = threading.Condition(threading.RLock())
        self.status = Status.UNDEFINED
        self.user_paused = False
        self.cancelling = False
        self.cancelled = False  # it ended so
        self.completing = False
        self.finalizing = False
        self.busy = False
        self.scope = Scope()  # of all that it waits for, and of what guests wait for because of it
        self.held_up = ""  # what it waits for beside its own work, in words
        self.group: Group | None = None  # set before the start
        self._emit: Emit = _nobody
        self._on_null: Callable[[Job], None] = _nothing
        self.thread: threading.Thread | None = None

    # What a subclass says ----------------------------------------------------------------

    def run(self) -> Iterator[Progress]:
        """The work. Raise `OSError` or `CowferryError` to fail."""
        raise NotImplementedError

    def clean(self) -> None:
        """Let go of everything; runs exactly once, before the job says that it is over."""

    def strands(self) -> list[Node]:
        """The nodes that nobody but the job waits for."""
        return []

    def details(self) -> dict[str, Any]:
        """Further members of this job's entry in query-block-jobs."""
        return {}

    def doing(self, operation: str) -> str:
        """What an operation ("read", "write") does, and to which file, in words; "" if unknown."""
        return ""

    # For the work ------------------------------------------------------------------------

    def policy(self, operation: str) -> str:
        """What is to happen when an operation ("read", "write") fails."""
        return self.on_error

    def attempt(
        self, operation: str, work: Callable[[], T | None]
    ) -> Generator[Progress, None, T | None]:
        """Do `work`, as the error policy says. None: the error was ignored and noted, or `work`
        says None itself.

        Use: `copied = yield from self.attempt("read", lambda: ...)`. Work that both reads and
        writes raises `ReadFailed` where it was the reading that failed."""
        while True:
            try:
                done = work()
                self.held_up = ""
                return done
            except OSError as error:
                if self.cancelling:  # it was given up, perhaps, for that
                    raise Cancelled from error
                if isinstance(error, CalledOff) and error.errno == errno.ETIMEDOUT:
                    log.warning("job %s: %s", self.id, error.strerror)
                    self.held_up = error.strerror or str(error)
                    yield Progress(idle=PAUSE_SECONDS)  # guests go on meanwhile
                    continue
                operation = "read" if isinstance(error, ReadFailed) else operation
                action = self._action(error, self.policy(operation))
                log.warning("job %s: %s failed, action %s: %s", self.id, operation, action, error)
                if self.is_block_job:
                    data = {"device": self.id, "operation": operation, "action": action}
                    self._emit("BLOCK_JOB_ERROR", data)
                if action in ("report", "ignore") and self.ignored is None:
                    self.where = self.doing(operation)
                if action == "report":
                    raise
                if action == "ignore":
                    self.ignored = self.ignored or error
                    return None
                yield Progress(error=error)

    def _action(self, error: OSError, policy: str) -> str:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if policy in ("enospc", "auto"):
            return "stop" if full else "report"
        return policy

    # Verbs -------------------------------------------------------------------------------

    def pause(self) -> None:
        """Pause at the next yield. Raises `CowferryError` if it is paused already."""
        with self.changed:
            allow(self.id, self.status, "pause")
            if self.user_paused:
                raise CowferryError("Job is already paused")
            self.user_paused = True
            self.changed.notify_all()

    def resume(self) -> None:
        """Go on, with the chunk that failed if an error stopped it."""
        with self.changed:
            allow(self.id, self.status, "resume")
            if not self.user_paused:
                raise CowferryError("Can't resume a job that was not paused")
            self.user_paused = False
            self.io_status = "ok"
            self.changed.notify_all()

    def cancel(self, force: bool = True) -> None:
        """Stop at the next yield. Returns at once; `wait` tells when it is over.

        What still waits for storage or a server after `GRACE` seconds is given up, in every state
        up to the decision."""
        with self.changed:
            allow(self.id, self.status, "cancel")
            if self.decided:
                raise CowferryError(
                    f"Job '{self.id}' in state '{self.status.value}' cannot accept command verb "
                    "'cancel'",
                    "its result is being recorded",
                )
            self.cancelling = True
            self.user_paused = False  # and whatever error it was stopped for, it ends otherwise
            self.io_status = "ok"
            self.changed.notify_all()
        TIMER.after(GRACE, unless_gone(self.give_up))

    def complete(self) -> None:
        """A ready job is to finish its work. A member of a group finishes with its group."""
        with self.changed:
            allow(self.id, self.status, "complete")
            if self.group is not None and not self.group.completing:
                raise CowferryError(
                    f"Job '{self.id}' is a member of group '{self.group.id}'",
                    "complete the group: its members pivot together",
                )
            self.completing = True
            self.changed.notify_all()

    def finalize(self) -> None:
        """A pending job is to make its result true."""
        with self.changed:
            allow(self.id, self.status, "finalize")
            self.finalizing = True
            self.changed.notify_all()

    def dismiss(self) -> None:
        """A concluded job is to be forgotten."""
        with self.changed:
            allow(self.id, self.status, "dismiss")
            self._go()

    def set_speed(self, speed: int) -> None:
        """Bytes per second from now on; 0 is unlimited."""
        with self.changed:
            allow(self.id, self.status, "set-speed")
            check_speed(speed, self.paced)
            self.throttle.speed = speed
            self.changed.notify_all()

    def change(self, copy_mode: str | None = None) -> None:
        """Nothing of this kind of job can be changed while it runs, unless it says so."""
        allow(self.id, self.status, "change")
        raise CowferryError("Job type does not support change")

    def wait(self, timeout: float | None = None) -> bool:
        """Until the job is concluded (or gone). False: the time-out came first."""
        over = (Status.CONCLUDED, Status.NULL)
        with self.changed:
            return self.changed.wait_for(lambda: self.status in over, timeout)

    # Queries -----------------------------------------------------------------------------

    def query(self) -> dict[str, Any]:
        """QMP: JobInfo."""
        with self.changed:
            out: dict[str, Any] = {
                "id": self.id,
                "type": self.type,
                "status": self.status.value,
                "current-progress": self.offset,
                "total-progress": self.length,
            }
            if self.error is not None or self.cancelled:
                out["error"] = self.error or os.strerror(errno.ECANCELED)
            return out

    def query_block(self) -> dict[str, Any]:
        """QMP: BlockJobInfo."""
        with self.changed:
            out: dict[str, Any] = {
                "type": self.type,
                "device": self.id,
                "len": self.length,
                "offset": self.offset,
                "busy": self.busy,
                "paused": self.user_paused,
                "speed": self.throttle.speed,
                "io-status": self.io_status,
                "ready": self.status in (Status.READY, Status.STANDBY),
                "status": self.status.value,
                "auto-finalize": self.auto_finalize,
                "auto-dismiss": self.auto_dismiss,
                **self.details(),
            }
            on_ready = self.on_ready if self.group is None else self.group.on_ready
            if on_ready != "stay":
                out["x-on-ready"] = on_ready
            if self.held_up:
                out.setdefault("x-note", f"waits: {self.held_up}")
            if self.error is not None or self.cancelled:
                out["error"] = self.error or os.strerror(errno.ECANCELED)
            return out

    # The runner --------------------------------------------------------------------------

    def create(self, emit: Emit, on_null: Callable[[Job], None]) -> None:
        """It exists, and has not begun. Called once, by `Jobs`."""
        self._emit, self._on_null = emit, on_null
        with self.changed:
            self._move(Status.CREATED)

    def start(self) -> None:
        """Begin. Called once, by whoever created it."""
        with self.changed:
            self._move(Status.RUNNING)
        self.thread = threading.Thread(target=self._main, name=f"job {self.id}", daemon=True)
        self.thread.start()

    def withdraw(self) -> None:
        """Instead of a start: what it was created for is not going to be. No BLOCK_JOB event."""
        with self.changed:
            self._move(Status.ABORTING)
        try:
            self.clean()
        finally:
            with self.changed:
                self._move(Status.CONCLUDED)
                self._go()

    def give_up(self) -> None:
        """It was called off a while ago: what it still waits for, and what guests wait for because
        of it, fails now (D2). Not once the decision is made: its target may be the disk's."""
        with self.changed:
            if self.decided or self.status in (Status.CONCLUDED, Status.NULL):
                return
            self.scope.call_off("the job was cancelled")
        for node in self.strands():
            node.abort()
        if self.strands():  # what was about to be asked when we aborted hangs again
            TIMER.after(GRACE, unless_gone(self.give_up))

    def _main(self) -> None:
        failure: BaseException | None = None
        succeeded = False
        try:
            with self.scope:
                self._work()
                self._finish()
            succeeded = True
        except Cancelled:
            pass
        except BaseException as error:  # whatever the work raised is this job's error
            given_up = isinstance(error, OSError) and self.cancelling and not self.decided
            failure = None if given_up else error
            if not isinstance(error, OSError | CowferryError):
                log.exception("job %s failed", self.id)
        try:
            self._conclude(succeeded, failure)
        finally:
            del failure  # its traceback has this frame, which would keep both

    def waiting(self) -> AbstractContextManager[object]:
        return self.scope

    def check(self) -> None:
        if self.cancelling:
            raise Cancelled

    def decide(self) -> None:
        with self.changed:
            super().decide()

    def _work(self) -> None:
        work = self.run()
        try:
            while True:
                self._pause_point()
                self.busy = True
                try:
                    step = next(work)
                except StopIteration:
                    break
                finally:
                    self.busy = False
                with self.changed:
                    self.offset = min(self.offset + step.done, max(self.length, self.offset))
                    if step.error is not None:
                        self._stop_for(step.error)
                    self.changed.notify_all()
                if step.ready and self.status is Status.RUNNING:
                    self._ready()
                delay = max(self.throttle.charge(step.moved), step.idle)
                if delay > 0:
                    self._sleep(delay)
        finally:
            close = getattr(work, "close", None)
            if close is not None:
                close()
        if self.ignored is not None:
            raise self.ignored

    def _stop_for(self, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        self.io_status = "nospace" if full else "failed"
        self.user_paused = True

    def _pause_point(self) -> None:
        with self.changed:
            if self.cancelling:
                raise Cancelled
            if not self.user_paused:
                return
            back = self.status
            self._move(Status.STANDBY if back is Status.READY else Status.PAUSED)
            self.changed.wait_for(lambda: self.cancelling or not self.user_paused)
            self._move(back)
            if self.cancelling:
                raise Cancelled

    def _sleep(self, seconds: float) -> None:
        """Throttled: wait, unless something else is wanted. A new speed counts at once."""
        with self.changed:
            speed = self.throttle.speed
            self.changed.wait_for(
                lambda: (
                    self.cancelling
                    or self.user_paused
                    or self.completing
                    or self.throttle.speed != speed
                ),
                seconds,
            )

    def _ready(self) -> None:
        with self.changed:
            self._move(Status.READY)
        self._event("BLOCK_JOB_READY")
        if self.group is not None:
            self.group.ready(self)
            return
        with suppress(CowferryError):  # a verb has ended it just now
            if self.on_ready == "complete":
                self.complete()
            elif self.on_ready == "cancel":
                self.cancel(force=False)

    def _finish(self) -> None:
        with self.changed:
            if self.cancelling:
                raise Cancelled
            self._move(Status.WAITING)
        if self.group is not None:
            self.group.arrive(self)
        with self.changed:
            if self.cancelling:
                raise Cancelled
            self._move(Status.PENDING)
        if not self.auto_finalize:
            if self.is_block_job:
                self._emit("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})
            with self.changed:
                self.changed.wait_for(lambda: self.cancelling or self.finalizing)
                if self.cancelling:
                    raise Cancelled
        if self.group is not None:
            self.group.finish(self)
        else:
            finish([self])

    def prepare(self) -> None:
        """Make the result true now. For one who steps the job by hand."""
        finish([self])

    def _conclude(self, succeeded: bool, failure: BaseException | None) -> None:
        if failure is not None:
            self.error = _words(failure)
        self.cancelled = not succeeded and failure is None
        if not succeeded:
            with self.changed:
                self._move(Status.ABORTING)
            if self.group is not None:
                self.group.failed(self, failure)
        seconds = CLEAN_SECONDS if self.scope.reason is None else SOON_SECONDS
        try:
            with inside((Scope(seconds, NO_ANSWER),)):
                self.clean()
        except Exception:
            log.exception("job %s: clean-up failed", self.id)
        if succeeded:
            self.offset = self.length = max(self.length, self.offset)
        with self.changed:
            self._end("BLOCK_JOB_CANCELLED" if self.cancelled else "BLOCK_JOB_COMPLETED")
        if self.group is not None:
            self.group.over(self)

    def _end(self, event: str = "") -> None:
        """Conclude, and go unless a client has to dismiss the job. The caller holds `changed`.

        The state is that of the end, and the id is free, before the first event of the end leaves:
        a client that reacts to it at once must not find the disk or the id in use."""
        self._become(Status.CONCLUDED)
        told = [Status.CONCLUDED]
        if self.auto_dismiss:
            self._on_null(self)
            self._become(Status.NULL)
            told.append(Status.NULL)
        if event:
            self._event(event)
        for status in told:
            self._tell(status)

    def _go(self) -> None:
        """Caller holds `changed`. The id is free before anybody hears that the job is gone."""
        self._on_null(self)
        self._move(Status.NULL)

    def _event(self, name: str) -> None:
        if not self.is_block_job:
            return
        data: dict[str, Any] = {
            "type": self.type,
            "device": self.id,
            "len": self.length,
            "offset": self.offset,
            "speed": self.throttle.speed,
        }
        if self.error is not None and name == "BLOCK_JOB_COMPLETED":
            data["error"] = self.error
            if self.where:
                data["x-where"] = self.where
        self._emit(name, data)

    def _move(self, to: Status) -> None:
        """Caller holds `changed`; the event leaves in the order of the moves."""
        self._become(to)
        self._tell(to)

    def _become(self, to: Status) -> None:
        assert to in TRANSITIONS[self.status], f"{self.status} -> {to}"
        self.status = to
        self.changed.notify_all()

    def _tell(self, status: Status) -> None:
        self._emit("JOB_STATUS_CHANGE", {"id": self.id, "status": status.value})


class ReadFailed(OSError):
    """Of work that reads and writes, the reading failed."""


def blame(error: OSError, source: Node, offset: int, length: int) -> OSError:
    """Of work that read a range of `source` and wrote it elsewhere: whose error it was. It was the
    source's, if that cannot be read now."""
    scratch = memoryview(bytearray(min(length, SCRATCH)))
    try:
        for at in range(offset, offset + length, len(scratch)):
            read(source, scratch[: min(len(scratch), offset + length - at)], at)
    except OSError as cause:
        return ReadFailed(cause.errno, cause.strerror or str(cause))
    return OSError(error.errno, error.strerror or str(error))


class Jobs:
    """All jobs by id. Thread-safe; `emit` is called with (event name, data), in order per job."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.lock = threading.Lock()  # guards the five below
        self.reserved: set[str] = set()  # ids of jobs that are being prepared
        self.jobs: dict[str, Job] = {}
        self.ending: weakref.WeakValueDictionary[str, Job] = weakref.WeakValueDictionary()
        self.groups: dict[str, Group] = {}
        self.failures: dict[str, dict[str, Any]] = {}  # by id: the last jobs that failed, as told

    def start(self, job: Job, job_id: str, reserved: bool = False) -> Job:
        """Give the job its id and let it run, unless it is to start with its group. Raises
        `CowferryError` for a bad or taken id. `reserved` as in `admit`."""
        self.admit(job, job_id, reserved)
        if job.group is None:
            job.start()
        return job

    def admit(self, job: Job, job_id: str, reserved: bool = False) -> None:
        """Give the job its id; it is to be started later, or withdrawn. Raises like `start`.

        `reserved`: the caller has reserved the id, and it is the job's from now on."""
        with self.lock:
            if reserved:
                self.reserved.discard(job_id)
            self._check_id(job_id)
            job.id = job_id
            self.jobs[job_id] = job
            self.failures.pop(job_id, None)  # it was tried again
        job.create(self.emit, self._forget)

    def check_id(self, job_id: str) -> None:
        """Raise `CowferryError` for an id that no new job may have."""
        with self.lock:
            self._check_id(job_id)

    def reserve(self, job_id: str) -> None:
        """Keep an id for a job that is being prepared. Raises like `check_id`."""
        with self.lock:
            self._check_id(job_id)
            self.reserved.add(job_id)

    def unreserve(self, job_id: str) -> None:
        """Undo `reserve`; nothing happens if the job has its id already."""
        with self.lock:
            self.reserved.discard(job_id)

    def _check_id(self, job_id: str) -> None:
        if not valid_id(job_id):
            raise CowferryError(f"Invalid job ID '{job_id}'")
        if job_id in self.jobs or job_id in self.groups or job_id in self.reserved:
            raise CowferryError(f"Job ID '{job_id}' already in use")

    def add_group(self, group: Group) -> None:
        """Remember a group."""
        with self.lock:
            self.groups[group.id] = group

    def forget_group(self, group: Group) -> None:
        """It is over."""
        with self.lock:
            self.groups.pop(group.id, None)

    def _forget(self, job: Job) -> None:
        failed = job.is_block_job and job.auto_dismiss and job.error is not None
        told = {**job.query_block(), "x-ended": int(time.time())} if failed else None
        if told is not None and job.where:
            told["x-where"] = job.where
        with self.lock:
            self.jobs.pop(job.id, None)
            self.ending[job.id] = job
            if told is not None:
                self.failures[job.id] = told
                while len(self.failures) > MAX_FAILURES:
                    del self.failures[next(iter(self.failures))]

    def failed(self) -> list[dict[str, Any]]:
        """The last jobs that failed and that no client had to dismiss, oldest first: their entries
        of `query_block`, with the time of their end as `x-ended`, in seconds since 1970. A new job
        of the same id takes its entry away."""
        with self.lock:
            return list(self.failures.values())

    def forget_failure(self, job_id: str) -> bool:
        """Take an entry out of `failed`. Return False if there is none."""
        with self.lock:
            return self.failures.pop(job_id, None) is not None

    def spoken_of(self, job_id: str) -> Job | None:
        """The job that an event which leaves now speaks of. It may be gone already."""
        with self.lock:
            return self.ending.get(job_id) or self.jobs.get(job_id)

    def get(self, job_id: str) -> Job | None:
        """The job of that id, if there is one."""
        with self.lock:
            return self.jobs.get(job_id)

    def all(self) -> list[Job]:
        """Every job, oldest first."""
        with self.lock:
            return list(self.jobs.values())

    def shutdown(self, seconds: float = 30.0) -> list[Job]:
        """Cancel whatever runs. What does not stop by itself at once is given up. Return the jobs
        that have not ended within `seconds`."""
        until = time.monotonic() + seconds
        for job in self.all():
            with suppress(CowferryError):  # it is ending already
                job.cancel()
        with self.lock:
            left = [*self.jobs.values(), *self.ending.values()]
        left = [job for job in left if job.thread is not threading.current_thread()]
        for limit in (min(until, time.monotonic() + MOMENT_SECONDS), until):
            for job in left:
                if job.thread is not None:
                    job.thread.join(max(limit - time.monotonic(), 0))
            left = [job for job in left if job.thread is not None and job.thread.is_alive()]
            for job in left:
                job.give_up()
        return left


def valid_id(text: str) -> bool:
    """QEMU's rule for ids: a letter, then letters, digits, '-', '.', '_'."""
    return ID.fullmatch(text) is not None


def check_speed(speed: int, paced: bool = True) -> None:
    """Raise `CowferryError` for a speed that cannot take effect."""
    if speed < 0:
        raise CowferryError("Parameter 'speed' expects a non-negative value")
    if speed >= 1 << 63:
        raise CowferryError(
            "Invalid parameter type for 'speed', expected: integer", "bytes per second, 0: no limit"
        )
    if speed and not paced:
        raise CowferryError(
            "Parameter 'speed' has no effect: this job copies only what guests overwrite",
            "limit the disk: cowferry limit, or block_set_io_throttle",
        )


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, CowferryError):
        return error.desc
    return f"internal error: {error}"


def _nobody(name: str, data: dict[str, Any]) -> None:
    """No one listens."""


def _nothing(job: Job) -> None:
    """No one minds."""
