"""Waiting for a job, or for a group of them: progress, notes, Ctrl-C, and the exit status.

A verb starts its job and calls `follow` with what is followed (`JobWork` or `GroupWork`) and with
`Words`, which say what is intact after a cancel or a failure, for only the verb knows. Events say
how it ends; how far it is comes from looking, a few times a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal, NamedTuple

import click

from cowferry.cli.client import Client, QmpError, Silent
from cowferry.cli.sizes import human
from cowferry.errors import CowferryError

INTERRUPTED = 130  # exit status, as shells have it
LOOK = 0.2  # seconds between two looks at the progress
PAUSED = "paused: "
MOMENT = 0.01  # seconds
IMPATIENT = 1.0  # seconds within which a second Ctrl-C is the same one
LAST = 60.0  # seconds that an interrupted job has to stop

#: What is to happen when a job is ready: move over, end as a copy, or stay so and go home.
AtReady = Literal["pivot", "finish", "stay"]


class Words(NamedTuple):
    """What a verb says about its job."""

    title: str
    cancelled: str  # how things stand after a cancel
    failed: str  # the hint after a failure: what is intact, and what next
    pivoted: str = ""  # how they stand after a pivot ...
    finished: str = ""  # ... after a soft cancel of what was ready ...
    ready: str = ""  # ... and while it is ready: how to go on


class State(NamedTuple):
    """How far it is. `more` are members of its JSON line."""

    offset: int
    length: int
    status: str
    notes: list[str]
    more: dict[str, Any]


class End(NamedTuple):
    """How it ended: completed, cancelled or failed; `data` is what the event said."""

    outcome: str
    data: dict[str, Any]
    error: str = ""
    members: dict[str, str] | None = None  # of a group: job and outcome


class Work:
    """What is followed."""

    ready_event = ""

    def __init__(self, client: Client, id: str) -> None:
        self.client = client
        self.id = id

    def look(self) -> State | None:
        """How far it is; None: it is over, or nearly."""
        raise NotImplementedError

    def heard(self, event: dict[str, Any]) -> End | None:
        """What an event says about the end of it."""
        raise NotImplementedError

    def is_ready(self, event: dict[str, Any]) -> bool:
        """Whether an event says that it is ready."""
        data = event.get("data", {})
        return event["event"] == self.ready_event and self.id in (
            data.get("device"), data.get("id")
        )  # fmt: skip

    def settle(self) -> None:
        """It has ended: wait until its name may be used again."""

    def complete(self) -> None:
        """It is ready: let it finish."""
        raise NotImplementedError

    def cancel(self, force: bool = True) -> None:
        """Call it off; softly, what is ready ends as a copy."""
        raise NotImplementedError

    def name(self) -> dict[str, str]:
        """Its member in JSON."""
        raise NotImplementedError


class JobWork(Work):
    """One job."""

    ready_event = "BLOCK_JOB_READY"

    def look(self) -> State | None:
        for entry in self.client.call("query-block-jobs"):
            if entry["device"] == self.id:
                more = {k[2:]: entry[k] for k in ("x-dirty-rate", "x-copy-rate") if k in entry}
                return State(
                    entry["offset"], entry["len"], entry["status"], notes_of(entry), more
                )  # fmt: skip
        return None

    def heard(self, event: dict[str, Any]) -> End | None:
        return job_end(event) if event.get("data", {}).get("device") == self.id else None

    def settle(self) -> None:
        # The end of a job is told a moment before it is gone; one may have to be dismissed.
        while any(
            job["id"] == self.id and job["status"] not in ("concluded", "null")
            for job in self.client.call("query-jobs")
        ):
            next(self.client.wait_events(MOMENT), None)

    def complete(self) -> None:
        self.client.call("job-complete", id=self.id)

    def cancel(self, force: bool = True) -> None:
        if force:
            self.client.call("job-cancel", id=self.id)
        else:
            self.client.call("block-job-cancel", device=self.id, force=False)

    def name(self) -> dict[str, str]:
        return {"job": self.id}


class GroupWork(Work):
    """Jobs on several disks that end together."""

    ready_event = "JOB_GROUP_READY"

    def __init__(self, client: Client, id: str) -> None:
        super().__init__(client, id)
        self.ends: dict[str, End] = {}  # by job, of members that have ended

    def look(self) -> State | None:
        for group in self.client.call("x-query-groups"):
            if group["id"] == self.id:
                notes = [f"{m['device']}: {n}" for m in group["members"] for n in notes_of(m)]
                shown = ("device", "status", "offset", "len", "error")
                members = [{k: m[k] for k in shown if k in m} for m in group["members"]]
                return State(
                    group["offset"], group["len"], group["status"], notes, {"members": members}
                )  # fmt: skip
        return None

    def heard(self, event: dict[str, Any]) -> End | None:
        data = event.get("data", {})
        end = job_end(event)
        if end is not None:
            self.ends[data["device"]] = end
        if event["event"] != "JOB_GROUP_COMPLETED" or data["id"] != self.id:
            return None
        ends = {m: self.ends[m] for m in data["members"] if m in self.ends}
        members = {m: f"failed: {e.error}" if e.error else e.outcome for m, e in ends.items()}
        sums = {k: sum(e.data[k] for e in ends.values()) for k in ("len", "offset")}
        outcome = "cancelled" if data.get("cancelled") else "completed"
        if data.get("error"):
            outcome = "failed"
        return End(outcome, {"group": self.id, **sums}, data.get("error", ""), members)

    def complete(self) -> None:
        self.client.call("x-group-complete", id=self.id)

    def cancel(self, force: bool = True) -> None:
        self.client.call("x-group-cancel", id=self.id, force=force)

    def name(self) -> dict[str, str]:
        return {"group": self.id}


def job_end(event: dict[str, Any]) -> End | None:
    """The end that an event of a job tells of."""
    data = event.get("data", {})
    if event["event"] == "BLOCK_JOB_CANCELLED":
        return End("cancelled", data)
    if event["event"] == "BLOCK_JOB_COMPLETED":
        failed = "error" in data
        return End("failed" if failed else "completed", data, placed(data) if failed else "")
    return None


def placed(told: dict[str, Any]) -> str:
    """The error of a job that failed, and before it where that was, unless the error says so."""
    error, where = str(told["error"]), str(told.get("x-where", ""))
    named = not where or where.partition("'")[2].rstrip("'") in error
    return error if named else f"{where}: {error}"


def notes_of(entry: dict[str, Any]) -> list[str]:
    """What a person should know of a job that runs."""
    notes = [entry["x-note"]] if entry.get("x-note") else []
    if entry.get("paused") and entry.get("io-status", "ok") != "ok":
        cause = "no space left" if entry["io-status"] == "nospace" else "an I/O error"
        notes.append(f"{PAUSED}{cause}; then: cowferry job resume {entry['device']}")
    return notes


def in_kind(note: str) -> str:
    """A note without its numbers, which change from one look to the next."""
    return re.sub(r"\d+", "", note)


def started(work: Work, as_json: bool) -> int:
    """The answer of --async."""
    ((kind, id),) = work.name().items()
    where = "jobs" if kind == "job" else "group list"
    click.echo(json.dumps(work.name()) if as_json else f"{kind} {id} runs: cowferry {where}")
    return 0


def follow(
    work: Work,
    words: Words,
    as_json: bool,
    at_ready: AtReady | None = None,
    *,
    asked_to_stop: bool = False,
) -> int:
    """Show progress until it is over, or ready and to stay so; the exit status.

    `asked_to_stop`: a cancel is what was wanted, and no failure."""
    show = progress(words.title, as_json)
    with interrupted_once(), told_at_signal(show), contextlib.closing(show):
        try:
            return _until_over(work, words, show, at_ready, asked_to_stop)
        except Silent as error:
            ((kind, id),) = work.name().items()
            error.hint = (
                f"{kind} {id} goes on as soon as the daemon does; see cowferry jobs; {error.hint}"
            )
            raise
        except KeyboardInterrupt:
            with contextlib.suppress(QmpError):  # it has just ended
                work.cancel()
            for event in work.client.wait_events(LAST):
                end = work.heard(event)
                if end is not None:
                    return _finish(show, end, words, words.finished, asked_to_stop) and INTERRUPTED
            raise


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """An impatient Ctrl-C Ctrl-C is one: the second must not end us before we have cancelled.

    One that comes later does: then we go, and do not wait for the job to stop."""
    last = float("-inf")

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > IMPATIENT:
            last = now
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread()
    if not ours or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def told_at_signal(show: Progress) -> Iterator[None]:
    """Meanwhile SIGUSR1 has the progress written to standard error, as by qemu-img."""

    def tell(number: int, frame: FrameType | None) -> None:
        # Not through `sys.stderr`: the signal may have come while a line is written to it.
        os.write(2, show.line().encode())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _until_over(
    work: Work, words: Words, show: Progress, at_ready: AtReady | None, asked_to_stop: bool
) -> int:
    # What to add to the last words; of a verb that knows how it ends, at once.
    after = words.finished if asked_to_stop else "" if at_ready else words.pivoted
    while True:
        for event in work.client.wait_events(LOOK):
            end = work.heard(event)
            if end is not None:
                work.settle()
                return _finish(show, end, words, after, asked_to_stop)
            if at_ready is not None and work.is_ready(event):
                _look(work, show)
                if at_ready == "stay":
                    show.ready(work, words.ready)
                    return 0
                # The daemon knows how it is to end, and goes on to that by itself.
                after = words.pivoted if at_ready == "pivot" else words.finished
            elif event["event"] == "BLOCK_JOB_PENDING" and event["data"]["id"] == work.id:
                show.note(f"pending; then: cowferry job finalize {work.id}")
                return 0
        _look(work, show)


def _look(work: Work, show: Progress) -> None:
    state = work.look()
    if state is not None:
        show.tell(state.notes)
        show.update(state)


def _finish(show: Progress, end: End, words: Words, after: str, asked_to_stop: bool) -> int:
    """The last words, and the exit status."""
    offset, length = end.data["offset"], end.data["len"]
    show.update(State(offset, length, "concluded", [], {}))
    show.close()
    show.result(end, offset, after)
    if end.outcome == "cancelled":
        if asked_to_stop:
            if end.members is None or words.cancelled:
                show.note(f"cancelled{words.cancelled and '; '}{words.cancelled}")
            return 0
        click.echo(f"{words.title}: cancelled; {words.cancelled}", err=True)
        return 1
    if end.error:
        share = f" at {100 * offset // max(length, 1)}%" if end.members is None else ""
        raise CowferryError(f"{words.title} failed{share}: {end.error}", words.failed)
    return 0


class Progress:
    """Where progress goes: nowhere. Notes go to standard error, the result to standard output."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.last: State | None = None
        self.notes: list[str] = []  # the newest of each kind

    def update(self, state: State) -> None:
        """So far."""
        self.last = state

    def line(self) -> str:
        """Return the progress as one line."""
        state = self.last
        if state is None:
            return f"{self.title}: begins\n"
        share = 100 * state.offset / max(state.length, 1)
        return f"{self.title}: {state.status}, {share:.2f}% of {human(state.length)}\n"

    def tell(self, notes: list[str]) -> None:
        """The job's notes of now. One that differs in its numbers only is told once; a pause, as
        often as there is one."""
        self.notes = [n for n in self.notes if not n.startswith(PAUSED) or n in notes]
        for note in notes:
            kind = in_kind(note)
            told = next((n for n in self.notes if kind.startswith(in_kind(n))), None)
            if told is not None:
                self.notes.remove(told)
            self.notes.append(note)
            if told is None or in_kind(told) != kind:  # another, or the same and more
                self.note(note)

    def note(self, text: str) -> None:
        """Something that a person should know now."""
        click.echo(f"{self.title}: {text}", err=True)

    def ready(self, work: Work, text: str) -> None:
        """It is ready, and stays so."""
        self.close()
        click.echo(f"{self.title}: ready\n{text}")

    def result(self, end: End, offset: int, after: str) -> None:
        """How it ended. A cancel or a failure of one job is told by standard error alone."""
        if end.outcome == "completed":
            click.echo(f"{self.title}: completed, {human(offset)}{after and '; '}{after}")
        elif end.members is not None:
            click.echo(f"{self.title}: {end.outcome}")
        for member, outcome in (end.members or {}).items():
            click.echo(f"    {member}: {outcome}")

    def close(self) -> None:
        """No more."""


class JsonLines(Progress):
    """One JSON object a line."""

    def update(self, state: State) -> None:
        before = self.last
        super().update(state)
        if before is None or state[:4] != before[:4]:
            line = {"offset": state.offset, "len": state.length, "status": state.status}
            notes = {"notes": state.notes} if state.notes else {}
            click.echo(json.dumps({**line, **state.more, **notes}))

    def note(self, text: str) -> None:
        """In the line of the progress, and in the result's."""

    def ready(self, work: Work, text: str) -> None:
        state = self.last
        done = {"offset": state.offset, "len": state.length} if state else {}
        self._last_line({"result": "ready", **work.name(), **done})

    def result(self, end: End, offset: int, after: str) -> None:
        members = {"members": end.members} if end.members is not None else {}
        error = {"error": end.error} if end.error else {}
        self._last_line({"result": end.outcome, **end.data, **members, **error})

    def _last_line(self, line: dict[str, Any]) -> None:
        click.echo(json.dumps({**line, **({"notes": self.notes} if self.notes else {})}))


class Bar(Progress):
    """A bar on a terminal."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Rich

        self.rich = Rich(
            TextColumn("{task.description}", markup=False), BarColumn(),
            DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self.task = self.rich.add_task(title)
        self.rich.start()

    def update(self, state: State) -> None:
        super().update(state)
        paused = " (paused)" if state.status in ("paused", "standby") else ""
        self.rich.update(
            self.task, completed=state.offset, total=state.length, description=self.title + paused
        )

    def note(self, text: str) -> None:
        self.rich.console.print(f"{self.title}: {text}", markup=False, highlight=False)

    def close(self) -> None:
        self.rich.stop()


def progress(title: str, as_json: bool) -> Progress:
    """What suits where the output goes."""
    if as_json:
        return JsonLines(title)
    return Bar(title) if sys.stdout.isatty() else Progress(title)
