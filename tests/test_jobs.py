"""Jobs: every state with every verb, and the order of the events, as clients know them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cowferry.block.throttle import Throttle
from cowferry.errors import CowferryError
from cowferry.jobs.job import Job, Jobs, Progress
from cowferry.jobs.states import TRANSITIONS, VERBS, Status, allow

PATIENCE = 30.0

# Written down again from qmp.md, section 2.2, not taken from the code.
STATES = [
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]
NEXT = {
    "created": "running aborting null",
    "running": "paused ready waiting aborting",
    "paused": "running",
    "ready": "standby waiting aborting",
    "standby": "ready",
    "waiting": "pending aborting",
    "pending": "aborting concluded",
    "aborting": "aborting concluded",
    "concluded": "null",
    "null": "",
}
LIVE = "created running paused ready standby"
ACCEPTS = {
    "cancel": LIVE + " waiting pending",
    "pause": LIVE,
    "resume": LIVE,
    "set-speed": LIVE,
    "change": LIVE,
    "complete": "ready standby",
    "finalize": "pending",
    "dismiss": "concluded",
}


@pytest.mark.parametrize("state", STATES)
def test_the_transitions_of_each_state(state: str) -> None:
    assert {s.value for s in TRANSITIONS[Status(state)]} == set(NEXT[state].split())


@pytest.mark.parametrize("verb", ACCEPTS)
@pytest.mark.parametrize("state", STATES)
def test_each_verb_in_each_state(verb: str, state: str) -> None:
    if state in ACCEPTS[verb].split():
        allow("j", Status(state), verb)
    else:
        with pytest.raises(CowferryError) as error:
            allow("j", Status(state), verb)
        assert error.value.desc == (
            f"Job 'j' in state '{state}' cannot accept command verb '{verb}'"
        )
    assert set(VERBS) == set(ACCEPTS)


class Work(Job):
    """Steps that the test lets pass one by one."""

    type = "stream"

    def __init__(self, steps: int = 3, fail: list[OSError] | None = None, **more: Any) -> None:
        super().__init__(length=steps, **more)
        self.steps = steps
        self.fail = fail or []
        self.gate = threading.Semaphore(0)
        self.free = False
        self.cleaned = 0
        self.closed = False
        self.prepared = False
        self.becomes_ready = False

    def one(self) -> int:
        if not self.free:
            assert self.gate.acquire(timeout=PATIENCE)
        if self.fail:
            raise self.fail.pop(0)
        return 1

    def run(self) -> Iterator[Progress]:
        try:
            for _ in range(self.steps):
                done = yield from self.attempt("read", self.one)
                yield Progress(done=1, moved=done or 0)
            if self.becomes_ready:
                while not self.completing:
                    yield Progress(ready=True)
                    with self.changed:
                        self.changed.wait_for(
                            lambda: self.completing or self.cancelling or self.user_paused,
                            PATIENCE,
                        )
        finally:
            self.closed = True

    def switch(self) -> None:
        self.prepared = True

    def clean(self) -> None:
        self.cleaned += 1


class Bench:
    """Jobs, and what they said."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.data: dict[str, dict[str, Any]] = {}
        self.heard = threading.Condition()
        self.jobs = Jobs(self.hear)

    def hear(self, name: str, data: dict[str, Any]) -> None:
        with self.heard:
            self.events.append(data["status"] if name == "JOB_STATUS_CHANGE" else name)
            self.data[name] = data
            self.heard.notify_all()

    def until(self, event: str, times: int = 1) -> None:
        with self.heard:
            assert self.heard.wait_for(lambda: self.events.count(event) >= times, PATIENCE), (
                f"no {event} in {self.events}"
            )

    def start(self, job: Work, free: bool = False) -> Work:
        job.free = free
        self.jobs.start(job, "j")
        return job


def test_events_of_success() -> None:
    bench = Bench()
    job = bench.start(Work(), free=True)
    bench.until("null")
    assert bench.events == [
        "created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null",
    ]  # fmt: skip
    assert bench.data["BLOCK_JOB_COMPLETED"] == {
        "type": "stream", "device": "j", "len": 3, "offset": 3, "speed": 0,
    }  # fmt: skip
    assert job.prepared and job.cleaned == 1
    assert bench.jobs.get("j") is None


def test_events_with_manual_finalize_and_dismiss() -> None:
    bench = Bench()
    job = bench.start(Work(auto_finalize=False, auto_dismiss=False), free=True)
    bench.until("BLOCK_JOB_PENDING")
    assert not job.prepared, "the result was made true before it was finalised"
    assert bench.data["BLOCK_JOB_PENDING"] == {"type": "stream", "id": "j"}
    job.finalize()
    bench.until("concluded")
    assert bench.jobs.get("j") is job
    job.dismiss()
    assert bench.events == [
        "created", "running", "waiting", "pending", "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED",
        "concluded", "null",
    ]  # fmt: skip
    assert bench.jobs.get("j") is None


def test_cancel_while_running() -> None:
    bench = Bench()
    job = bench.start(Work())
    job.gate.release()
    job.cancel()
    job.gate.release()
    bench.until("null")
    assert bench.events == [
        "created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null",
    ]  # fmt: skip
    assert job.closed and job.cleaned == 1 and not job.prepared


def test_cancel_while_pending_keeps_everything() -> None:
    bench = Bench()
    job = bench.start(Work(auto_finalize=False), free=True)
    bench.until("BLOCK_JOB_PENDING")
    job.cancel()
    bench.until("null")
    assert bench.events[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    assert not job.prepared


def test_pause_resume_and_cancel_while_paused() -> None:
    bench = Bench()
    job = bench.start(Work())
    job.pause()
    with pytest.raises(CowferryError, match="Job is already paused"):
        job.pause()
    job.gate.release()
    bench.until("paused")
    job.resume()
    with pytest.raises(CowferryError, match="Can't resume a job that was not paused"):
        job.resume()
    bench.until("running", 2)
    job.pause()
    job.gate.release(2)
    bench.until("paused", 2)
    job.cancel()
    bench.until("null")
    assert not job.query_block()["paused"]
    assert job.cleaned == 1 and not job.prepared


def test_failure_reports_and_leaves_nothing_prepared() -> None:
    bench = Bench()
    job = bench.start(Work(fail=[OSError(errno.EIO, "Input/output error")]), free=True)
    bench.until("null")
    assert bench.events == [
        "created", "running", "BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded",
        "null",
    ]  # fmt: skip
    assert bench.data["BLOCK_JOB_COMPLETED"]["error"] == "Input/output error"
    assert bench.data["BLOCK_JOB_ERROR"] == {
        "device": "j", "operation": "read", "action": "report",
    }  # fmt: skip
    assert not job.prepared


@pytest.mark.parametrize(
    ("policy", "code", "status"),
    [
        ("stop", errno.ENOSPC, "nospace"),
        ("stop", errno.EIO, "failed"),
        ("enospc", errno.ENOSPC, "nospace"),
        ("auto", errno.ENOSPC, "nospace"),
    ],
)
def test_E1_stop_pauses_and_resume_does_the_same_chunk_again(
    policy: str, code: int, status: str
) -> None:
    bench = Bench()
    job = bench.start(Work(fail=[OSError(code, "bad luck")], on_error=policy), free=True)
    bench.until("paused")
    assert bench.events == ["created", "running", "BLOCK_JOB_ERROR", "paused"]
    assert job.query_block()["io-status"] == status
    assert job.offset == 0
    job.resume()
    assert job.query_block()["io-status"] == "ok"
    bench.until("null")
    assert job.offset == 3 and job.error is None and job.prepared


@pytest.mark.parametrize(("policy", "code"), [("report", errno.ENOSPC), ("enospc", errno.EIO)])
def test_policies_that_report(policy: str, code: int) -> None:
    bench = Bench()
    job = bench.start(Work(fail=[OSError(code, "bad luck")], on_error=policy), free=True)
    bench.until("null")
    assert job.error == "bad luck"


def test_ignore_goes_on_and_fails_at_the_end() -> None:
    bench = Bench()
    job = bench.start(Work(fail=[OSError(errno.EIO, "bad luck")], on_error="ignore"), free=True)
    bench.until("null")
    assert job.offset == 3, "it did not go on"
    assert job.error == "bad luck" and not job.prepared


def test_ready_complete() -> None:
    bench = Bench()
    job = Work()
    job.becomes_ready = True
    bench.start(job, free=True)
    bench.until("BLOCK_JOB_READY")
    job.pause()
    bench.until("standby")
    job.resume()
    bench.until("ready", 2)
    job.complete()
    bench.until("null")
    assert bench.events == [
        "created", "running", "ready", "BLOCK_JOB_READY", "standby", "ready", "waiting", "pending",
        "BLOCK_JOB_COMPLETED", "concluded", "null",
    ]  # fmt: skip


def test_ids() -> None:
    bench = Bench()
    bench.start(Work())
    with pytest.raises(CowferryError, match="Job ID 'j' already in use"):
        bench.jobs.start(Work(), "j")
    for bad in ("", "9x", "a b", "#x"):
        with pytest.raises(CowferryError, match=f"Invalid job ID '{bad}'"):
            bench.jobs.start(Work(), bad)
    with pytest.raises(CowferryError, match="non-negative"):
        Work(speed=-1)
    job = bench.jobs.get("j")
    assert isinstance(job, Work)
    with pytest.raises(CowferryError, match="non-negative"):
        job.set_speed(-1)
    job.free = True
    job.gate.release()
    bench.until("null")


def test_the_rate_is_right_on_average_and_a_new_speed_counts_at_once() -> None:
    now = [0.0]
    throttle = Throttle(1000, lambda: now[0])
    moved = 0
    for _ in range(100):
        delay = throttle.charge(50)
        moved += 50
        now[0] += delay
    assert moved / now[0] == pytest.approx(1000, rel=0.05)
    throttle.speed = 0
    assert throttle.charge(1 << 30) == 0
    throttle.speed = 100
    assert throttle.charge(100) == pytest.approx(1.0)
    now[0] += 1000
    assert throttle.charge(10) == 0, "idle time is credit, a little"
    assert throttle.charge(1000) > 9, "but not much"
