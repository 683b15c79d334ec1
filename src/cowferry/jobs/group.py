"""A group: jobs on several disks of one guest that are one thing.

The members run side by side. The group is ready once all of them are, finishes all of them under
one drain (so the disks of a guest change at one point in time, and their moves are one durable
decision), and is shown with its members.

What a member's failure means is the group's policy: `all` calls the others off, `each` lets them
go on without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cowferry.errors import CowferryError, reason
from cowferry.jobs.ending import Cancelled, Ending, finish
from cowferry.jobs.job import Emit, Job
from cowferry.jobs.states import Status

POLICIES = ("all", "each")
TICK = 0.1  # seconds after which a waiting member looks whether it was cancelled
LAST = 60.0  # seconds that a failing member waits for the others to stop


class Group:
    """Jobs that end together. Thread-safe; members are created one after another, and start once
    all of them are there."""

    def __init__(
        self,
        id: str,
        policy: str = "all",
        *,
        on_ready: str = "stay",
        emit: Emit,
        gone: Callable[[Group], None],
    ) -> None:
        """`on_ready` as of a job: what the group does once all its members are ready."""
        if policy not in POLICIES:
            raise CowferryError(f"Parameter 'policy' does not accept value '{policy}'")
        self.id = id
        self.policy = policy
        self.on_ready = on_ready
        self._emit = emit
        self._gone = gone
        # Duty: guards everything below; taken before no lock of a job.
        self.changed = threading.Condition()
        self.members: list[Job] = []
        self.live: set[Job] = set()  # neither failed nor over
        self.arrived: set[Job] = set()  # all work done, waiting for the others
        self.finishing: set[Job] = set()
        self.readied: set[Job] = set()
        self.told_ready = False
        self.completing = False
        self.culprit: Job | None = None
        self.called_off = False  # policy `all`, and one did not make it: nobody does
        self.told_off = False  # whoever was the first has told the others
        # None, "begun", an error of all, or the errors of each
        self.outcome: BaseException | dict[Ending, Exception] | str | None = None
        self.ended = 0

    def add(self, job: Job) -> None:
        """Before the job is created."""
        job.group = self
        with self.changed:
            self.members.append(job)
            self.live.add(job)

    def open(self) -> None:
        """Every member has been created: they start."""
        for job in self.members:
            job.start()

    def withdraw(self) -> None:
        """A member could not be created: the others are undone, and the group is gone."""
        for job in self.members:
            if job.status is Status.CREATED:
                job.withdraw()
        self._gone(self)
        self._part()

    # Verbs ---------------------------------------------------------------------------------

    def complete(self) -> None:
        """Every member is ready: let all of them finish, at one point in time."""
        with self.changed:
            missing = [j.id for j in self.members if j in self.live and j not in self.readied]
            if missing or not self.live:
                raise CowferryError(
                    f"Group '{self.id}' is not ready", f"still busy: {', '.join(missing) or 'none'}"
                )
            self.completing = True
            jobs = [j for j in self.live if j not in self.arrived]  # those are on their way
        for job in jobs:
            with suppress(CowferryError):  # it has just failed, and the group will say so
                job.complete()

    def cancel(self, force: bool = True) -> None:
        """Call every member off."""
        with self.changed:
            jobs = list(self.live)
        for job in jobs:
            with suppress(CowferryError):  # it has just ended
                job.cancel(force)

    def query(self) -> dict[str, Any]:
        """The group as one thing, with its members."""
        with self.changed:
            members = list(self.members)
            live = set(self.live)
        entries = [j.query_block() for j in members]
        if any(j not in live and j.error for j in members):
            status = "failing" if live else "failed"
        elif all(j.status in (Status.CONCLUDED, Status.NULL) for j in members):
            status = "concluded"
        elif self.told_ready:
            status = "ready"
        else:
            status = "running"
        intent = {} if self.on_ready == "stay" else {"x-on-ready": self.on_ready}
        return {
            "id": self.id,
            "status": status,
            "policy": self.policy,
            **intent,
            "len": sum(e["len"] for e in entries),
            "offset": sum(e["offset"] for e in entries),
            "members": entries,
        }

    # What members tell ---------------------------------------------------------------------

    def ready(self, job: Job) -> None:
        """A member has converged."""
        with self.changed:
            self.readied.add(job)
        self._check_ready()

    def _check_ready(self) -> None:
        with self.changed:
            first = not self.told_ready and bool(self.live) and self.live <= self.readied
            self.told_ready = self.told_ready or first
        if first:
            self._emit("JOB_GROUP_READY", {"id": self.id})
            with suppress(CowferryError):  # a member has just ended, which the group will tell
                if self.on_ready == "complete":
                    self.complete()
                elif self.on_ready == "cancel":
                    self.cancel(force=False)

    def arrive(self, job: Job) -> None:
        """A member has done its work; returns once all have. Raises `Cancelled`."""
        with self.changed:
            self.arrived.add(job)
            self.readied.add(job)  # a stream has no other moment at which it is ready
            self.changed.notify_all()
        self._check_ready()
        with self.changed:
            self._stay(job)
            while not self.live <= self.arrived:
                self.changed.wait(TICK)
                self._stay(job)

    def _stay(self, job: Job) -> None:
        """Caller holds `changed`. Raises `Cancelled` for one that is called off.

        In one step with that it is out of `live`: nobody finishes it, or without it by mistake."""
        if job.cancelling or self.called_off:
            self._drop(job)
            raise Cancelled

    def _drop(self, job: Job) -> None:
        """Caller holds `changed`."""
        self.live.discard(job)
        self.culprit = self.culprit or job
        self.called_off = self.called_off or self.policy == "all"
        self.changed.notify_all()

    def finish(self, job: Job) -> None:
        """A member is to make its result true: the last to come does it for all of them."""
        with self.changed:
            self.finishing.add(job)
            self.changed.notify_all()
            while self.outcome is None:
                self._stay(job)
                if self.live <= self.finishing:
                    break
                self.changed.wait(TICK)
            mine = self.outcome is None
            if mine:
                self.outcome = "begun"
            together = [j for j in self.members if j in self.live]
        if mine:
            outcome: BaseException | dict[Ending, Exception]
            try:
                outcome = finish(together, each=self.policy == "each")
            except BaseException as error:
                outcome = error
            with self.changed:
                self.outcome = outcome
                self.changed.notify_all()
        with self.changed:
            self.changed.wait_for(lambda: self.outcome != "begun")
            result = self.outcome
        if isinstance(result, dict):
            if job in result:
                raise result[job]
        elif isinstance(result, Cancelled):
            raise Cancelled
        elif isinstance(result, Exception):
            why = reason(result)
            raise CowferryError(f"group '{self.id}' could not finish: {why}")

    def failed(self, job: Job, failure: BaseException | None) -> None:
        """A member failed or was cancelled. With policy `all` the others are called off first."""
        with self.changed:
            self._drop(job)
            others = list(self.live) if self.called_off and not self.told_off else []
            self.told_off = self.called_off
        for other in others:
            with suppress(CowferryError):
                other.cancel()
        for other in others:
            other.wait(LAST)

    def over(self, job: Job) -> None:
        """A member is concluded."""
        with self.changed:
            self.live.discard(job)
            self.ended += 1
            last = self.ended == len(self.members)
            self.changed.notify_all()
        self._check_ready()
        if last:
            data: dict[str, Any] = {"id": self.id, "members": [j.id for j in self.members]}
            errors = [f"{j.id}: {j.error}" for j in self.members if j.error]
            if errors:
                data["error"] = "; ".join(errors)
            elif self.culprit is not None:
                data["cancelled"] = True
            self._gone(self)  # first: whoever hears of the end may use the id again
            self._emit("JOB_GROUP_COMPLETED", data)
            self._part()

    def _part(self) -> None:
        """All members are over: they and the group no longer keep each other in memory."""
        for job in self.members:
            job.group = None
        self.outcome = None
