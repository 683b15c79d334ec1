"""Endings: how jobs, snapshots and changes of a medium make their results true, alone or together.

`finish` takes any number of them through the same steps under one drain: all of them take effect at
one moment, or none does. Up to the decision every one can still be given up.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import ClassVar

from cowferry.block import moves
from cowferry.block.disk import Disk, in_order
from cowferry.block.moves import Move
from cowferry.block.scope import CalledOff, Scope, inside

log = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0  # between two tries to stop disks, for guests to go on
NO_ANSWER = "storage or a server has not answered"
SETTLE_SECONDS = 20.0  # that guests stand still while a result is made true


class Cancelled(Exception):
    """Raised at a yield of a job that is to stop."""


class Ending:
    """Something that ends in the steps of a job: a job, a snapshot, a change of medium. `finish`
    takes any number of them through these, together."""

    #: Whether it is tried again if guests' requests, or a server, do not finish in time.
    patient: ClassVar[bool] = False
    #: Whether its result is about to be recorded, or is: nothing of it can be given up any more.
    decided: bool = False

    def waiting(self) -> AbstractContextManager[object]:
        """What each of its steps runs in: a scope by which its waits can be called off."""
        return nullcontext()

    def check(self) -> None:
        """Before each step, and at last before the decision. Raise if it is not to end so."""

    def decide(self) -> None:
        """It has settled, and is about to be recorded. May raise."""
        self.check()
        self.decided = True

    def approach(self) -> None:
        """Before the drain: whatever makes it short. May raise."""

    def drains(self) -> list[Disk]:
        """The disks that have to stand still while the result is made true."""
        return []

    def settle(self) -> None:
        """Inside the drain: the last work that may fail. Raising leaves everything as it was."""

    def unsettle(self) -> None:
        """Inside the drain, after a `settle` that failed or stays without effect: as it was."""

    def moves(self) -> list[Move]:
        """Which disks are about to leave which image, to be recorded."""
        return []

    def switch(self) -> None:
        """Inside the drain: change the graph in memory. Must not fail."""

    def parted(self) -> None:
        """After the drain: let go of what is not needed any more. Errors are only logged."""


def finish(endings: Sequence[Ending], each: bool = False) -> dict[Ending, Exception]:
    """Make the results of `endings` true together, under one drain. Raises before any is changed.

    With `each`, those that cannot are left out, and returned with the reason. The order is the
    one that keeps a pivot decidable: drain, last bytes, flush (all in `settle`), the durable
    record, the switch, and the guests go on."""
    failed: dict[Ending, Exception] = {}

    def step(ending: Ending, do: Callable[[], None]) -> None:
        try:
            if ending not in failed:
                ending.check()
                with ending.waiting():
                    do()
        except Exception as error:
            if not each:
                raise
            failed[ending] = error

    while True:
        try:
            for ending in endings:
                step(ending, ending.approach)
            begun = _together(endings, failed, step)
            break
        except CalledOff as error:
            before = len(failed)
            for ending in endings:
                step(ending, ending.check)  # is it one of them that was called off?
            if error.errno == errno.ETIMEDOUT and all(e.patient for e in endings):
                log.warning("disks could not be stopped, and are tried again: %s", error.strerror)
                time.sleep(PAUSE_SECONDS)  # guests go on
            elif len(failed) == before:
                raise
    for ending in begun:
        try:
            ending.parted()
        except Exception:
            log.exception("what %s left behind could not be closed", ending)
    return failed


def _together(
    endings: Sequence[Ending],
    failed: dict[Ending, Exception],
    step: Callable[[Ending, Callable[[], None]], None],
) -> list[Ending]:
    """The part of `finish` during which the disks stand still; the endings that took effect.

    Raises what a step raises, and `CalledOff` if disks cannot be stopped, or stand still for too
    long because a server does not answer. Then everything is as it was."""
    live = [e for e in endings if e not in failed]
    begun: list[Ending] = []
    with ExitStack() as drained:
        with ExitStack() as scopes:
            for ending in live:
                scopes.enter_context(ending.waiting())
            for disk in in_order(d for e in live for d in e.drains()):
                drained.enter_context(disk.exclusive())
        try:
            with Scope(SETTLE_SECONDS, NO_ANSWER):
                for ending in live:
                    begun.append(ending)
                    step(ending, ending.settle)
                    if ending in failed:
                        _undo(begun.pop())
            for ending in begun:
                step(ending, ending.decide)
            for ending in [e for e in begun if e in failed]:
                begun.remove(ending)
                _undo(ending)
            moving = [m for e in begun for m in e.moves()]
            if moving:
                moves.record(moving)
        except BaseException:
            for ending in reversed(begun):
                _undo(ending)
            raise
        for ending in begun:
            ending.switch()
    return begun


def _undo(ending: Ending) -> None:
    ending.decided = False
    try:
        # Whatever was called off: this has to be done, and takes no longer than settling may.
        with inside((Scope(SETTLE_SECONDS, NO_ANSWER),)):
            ending.unsettle()
    except Exception:
        log.exception("%s could not be put back", ending)
