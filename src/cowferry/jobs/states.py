"""The states of a job: one table of transitions, one table of verbs.

Both are QEMU's, as clients know them (qmp.md, section 2.2). Whatever wants to know what may
happen to a job asks here; there is no second place that says it.
"""

from __future__ import annotations

from enum import Enum

from cowferry.errors import CowferryError


class Status(Enum):
    """QMP: JobStatus."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


S = Status

TRANSITIONS: dict[Status, frozenset[Status]] = {
    S.UNDEFINED: frozenset({S.CREATED}),
    S.CREATED: frozenset({S.RUNNING, S.ABORTING, S.NULL}),
    S.RUNNING: frozenset({S.PAUSED, S.READY, S.WAITING, S.ABORTING}),
    S.PAUSED: frozenset({S.RUNNING}),
    S.READY: frozenset({S.STANDBY, S.WAITING, S.ABORTING}),
    S.STANDBY: frozenset({S.READY}),
    S.WAITING: frozenset({S.PENDING, S.ABORTING}),
    S.PENDING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.ABORTING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.CONCLUDED: frozenset({S.NULL}),
    S.NULL: frozenset(),
}

_LIVE = frozenset({S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY})

VERBS: dict[str, frozenset[Status]] = {
    "cancel": _LIVE | {S.WAITING, S.PENDING},
    "pause": _LIVE,
    "resume": _LIVE,
    "set-speed": _LIVE,
    "change": _LIVE,
    "complete": frozenset({S.READY, S.STANDBY}),
    "finalize": frozenset({S.PENDING}),
    "dismiss": frozenset({S.CONCLUDED}),
}


def allow(job_id: str, status: Status, verb: str) -> None:
    """Raise `CowferryError` unless a job in this state accepts the verb."""
    if status not in VERBS[verb]:
        raise CowferryError(
            f"Job '{job_id}' in state '{status.value}' cannot accept command verb '{verb}'"
        )
