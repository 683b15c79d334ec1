"""kill -9 around what two disks of one guest do together: groups of jobs, and transactions.

S4: whenever it comes, both disks are found in their new images, or both in the old ones.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from killing import SLOW, Rig, State, Talk, each_state


class Both:
    """An operation on the disks "one" and "two", as a group "both"."""

    moves = True
    type = ""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.goals: dict[str, str] = {}

    def prepare(self, talk: Talk) -> None:
        """Layers, as many as it needs."""
        for name, drive in self.rig.drives.items():
            if self.type != "copy" and (self.type == "stream" or len(drive.chain) < 2):
                self.rig.snapshot(talk, name)
        self.rig.work()

    def start(self, talk: Talk, **common: Any) -> None:
        members = []
        for name, drive in self.rig.drives.items():
            goal = str(self.rig.file(f"copy-{name}")) if self.type == "copy" else drive.chain[-1]
            self.goals[name] = goal if self.moves else drive.at
            members.append({"device": name} | ({"target": goal} if self.type == "copy" else {}))
        talk("x-group-start", id="both", type=self.type, members=members, **common)

    def check(self) -> None:
        """Both members have said so."""
        for name, drive in self.rig.drives.items():
            assert drive.at == self.goals[name]
            assert self.type == "copy" or len(drive.chain) == 1


class CopyingBoth(Both):
    type = "copy"


class CommittingBoth(Both):
    type = "commit"


class StreamingBoth(Both):
    moves = False
    type = "stream"


def running(op: Both, talk: Talk) -> None:
    op.start(talk, speed=SLOW)
    op.rig.work()


def waiting(op: Both, talk: Talk) -> None:
    """One member has done its work, the other has not."""
    op.start(talk, speed=SLOW)
    talk("block-job-set-speed", device="both-one", speed=0)
    talk.state("waiting", "both-one")
    op.rig.work()


def ready(op: Both, talk: Talk) -> None:
    op.start(talk)
    talk.until("JOB_GROUP_READY")
    op.rig.work()


def cancelling(op: Both, talk: Talk) -> None:
    op.start(talk, speed=SLOW)
    op.rig.work()
    talk.send("x-group-cancel", id="both")
    op.rig.moment(0.01)


def completing(op: Both, talk: Talk) -> None:
    ready(op, talk)
    talk.send("x-group-complete", id="both")
    op.rig.moment(0.04)


def at_full_speed(op: Both, talk: Talk) -> None:
    op.start(talk)
    op.rig.moment(0.05)


def over(op: Both, talk: Talk) -> None:
    op.start(talk)
    if op.moves:
        talk.until("JOB_GROUP_READY")
        talk("x-group-complete", id="both")
    talk.until("JOB_GROUP_COMPLETED")


OF_MOVING = (running, cancelling, ready, completing, over)
OF_STREAMS = (running, cancelling, waiting, at_full_speed, over)
MOVED: dict[State, bool | None] = {over: True, completing: None}


@pytest.mark.parametrize("kind", [CopyingBoth, CommittingBoth, StreamingBoth])
def test_S4_killed_in_every_state_of_a_group_both_disks_moved_or_neither(
    tmp_path: Path, kind: type[Both]
) -> None:
    states = OF_MOVING if kind.moves else OF_STREAMS
    outcomes = each_state(tmp_path, ("one", "two"), kind, states, over, MOVED)
    assert len(outcomes) == len(states)


class Snapshotting(Both):
    """A transaction. How long one takes is found out first, to come in the middle of others."""

    took = 0.0

    def prepare(self, talk: Talk) -> None:
        if not self.took:
            begin = time.monotonic()
            self.start(talk)
            talk.answer()
            self.took = time.monotonic() - begin
            for name, drive in self.rig.drives.items():
                drive.at = self.goals[name]

    def start(self, talk: Talk, **common: Any) -> None:
        actions = []
        for name in self.rig.drives:
            self.goals[name] = str(self.rig.file(name))
            data = {"device": name, "snapshot-file": self.goals[name]}
            actions.append({"type": "blockdev-snapshot-sync", "data": data})
        talk.send("transaction", actions=actions)

    def check(self) -> None:
        for name, drive in self.rig.drives.items():
            assert drive.at == self.goals[name]


def snapshotting(op: Snapshotting, talk: Talk) -> None:
    op.start(talk)
    op.rig.moment(1.5 * op.took)


def snapshotted(op: Snapshotting, talk: Talk) -> None:
    op.start(talk)
    talk.answer()
    op.rig.work()


def test_S3_S4_killed_in_the_middle_of_a_snapshot_of_two_disks(tmp_path: Path) -> None:
    moved: dict[State, bool | None] = {snapshotting: None, snapshotted: True}
    states = (snapshotting, snapshotting)
    outcomes = each_state(tmp_path, ("one", "two"), Snapshotting, states, snapshotted, moved)
    assert outcomes["snapshotted"] == {True}
