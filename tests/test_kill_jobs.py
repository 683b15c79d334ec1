"""kill -9 in every state of every job, again and again, with a guest that writes.

After each kill the files alone say which image is current; it checks clean, holds what the guest
may have written, is served again under the name that the disk had first; and a client that was told
of success finds it true. At the end the operation completes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from killing import SLOW, Rig, State, Talk, each_state


class Operation:
    """A job on the disk "vm": what it needs, how it starts, what its success means."""

    becomes_ready = False
    moves = False

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def prepare(self, talk: Talk) -> None:
        """Layers, as many as it needs."""

    def start(self, talk: Talk, **common: Any) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """It has completed: that is true on disk."""

    def layers(self, talk: Talk, count: int) -> None:
        while len(self.rig.drives["vm"].chain) < count:
            self.rig.snapshot(talk, "vm")
            self.rig.work()


class Streaming(Operation):
    def prepare(self, talk: Talk) -> None:
        self.rig.snapshot(talk, "vm")  # an empty one each time, or there would be nothing to do

    def start(self, talk: Talk, **common: Any) -> None:
        talk("block-stream", device="vm", **common)

    def check(self) -> None:
        assert len(self.rig.drives["vm"].chain) == 1


class Committing(Operation):
    """Of the layer below the active one."""

    def prepare(self, talk: Talk) -> None:
        self.layers(talk, 3)

    def start(self, talk: Talk, **common: Any) -> None:
        self.top = self.rig.drives["vm"].chain[1]
        talk("block-commit", device="vm", top=self.top, **common)

    def check(self) -> None:
        assert self.top not in self.rig.drives["vm"].chain


class ActiveCommitting(Operation):
    becomes_ready = moves = True

    def prepare(self, talk: Talk) -> None:
        self.layers(talk, 2)

    def start(self, talk: Talk, **common: Any) -> None:
        talk("block-commit", device="vm", **common)

    def check(self) -> None:
        assert len(self.rig.drives["vm"].chain) == 1


class Mirroring(Operation):
    becomes_ready = moves = True
    mode = "background"

    def start(self, talk: Talk, **common: Any) -> None:
        format = self.rig.rnd.choice(["raw", "qcow2"])
        self.goal = str(self.rig.file("copy", format))
        talk(
            "drive-mirror", device="vm", target=self.goal, sync="full", format=format,
            copy_mode=self.mode, **common,
        )  # fmt: skip

    def check(self) -> None:
        assert self.rig.drives["vm"].at == self.goal


class MirroringBlocking(Mirroring):
    mode = "write-blocking"


def running(op: Operation, talk: Talk) -> None:
    op.start(talk, speed=SLOW)
    talk.state("running")
    op.rig.work()


def paused(op: Operation, talk: Talk) -> None:
    op.start(talk, speed=SLOW)
    op.rig.work(4)
    talk("job-pause", id="vm")
    talk.state("paused")
    op.rig.work()


def ready(op: Operation, talk: Talk) -> None:
    op.start(talk)
    talk.until("BLOCK_JOB_READY")
    op.rig.work()


def standby(op: Operation, talk: Talk) -> None:
    ready(op, talk)
    talk("job-pause", id="vm")
    talk.state("standby")
    op.rig.work()


def to_the_end(op: Operation, talk: Talk, **common: Any) -> None:
    """As far as it goes by itself."""
    op.start(talk, **common)
    if op.becomes_ready:
        talk.until("BLOCK_JOB_READY")
        talk("job-complete", id="vm")


def pending(op: Operation, talk: Talk) -> None:
    to_the_end(op, talk, auto_finalize=False)
    talk.until("BLOCK_JOB_PENDING")
    op.rig.work()


def concluded(op: Operation, talk: Talk) -> None:
    to_the_end(op, talk, auto_dismiss=False)
    talk.state("concluded")
    op.rig.work()


def cancelling(op: Operation, talk: Talk) -> None:
    op.start(talk, speed=SLOW)
    op.rig.work(4)
    talk.send("job-cancel", id="vm")
    op.rig.moment(0.01)


def finalizing(op: Operation, talk: Talk) -> None:
    pending(op, talk)
    talk.send("job-finalize", id="vm")
    op.rig.moment(0.03)


def completing(op: Operation, talk: Talk) -> None:
    ready(op, talk)
    talk.send("job-complete", id="vm")
    op.rig.moment(0.03)


def ending_softly(op: Operation, talk: Talk) -> None:
    ready(op, talk)
    talk.send("block-job-cancel", device="vm", force=False)
    op.rig.moment(0.03)


def at_full_speed(op: Operation, talk: Talk) -> None:
    op.start(talk)
    op.rig.moment(0.05)


STATES = (running, paused, cancelling, pending, finalizing, concluded)
OF_READY = (ready, standby, completing, ending_softly)
OF_OTHERS = (at_full_speed,)
# Whether the disk is in its new image then, if the job moves it; None: either.
MOVED: dict[State, bool | None] = {concluded: True, completing: None, finalizing: None}


@pytest.mark.parametrize(
    "kind", [Streaming, Committing, ActiveCommitting, Mirroring, MirroringBlocking]
)
def test_killed_in_every_state_of_a_job(tmp_path: Path, kind: type[Operation]) -> None:
    further = OF_READY if kind.becomes_ready else OF_OTHERS
    outcomes = each_state(tmp_path, ("vm",), kind, (*STATES, *further), concluded, MOVED)
    assert len(outcomes) == len(STATES) + len(further)
