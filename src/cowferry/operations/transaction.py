"""Several things at one point in time: all of them, or none.

A transaction's *parts* are prepared one after another, so that each may rely on what those before
it are going to do (`Transaction.parts`, `root`), then brought to their end together, under one
drain of all their disks (`jobs/job.py`, `finish`). In it each part is settled in the same order:
what the first has settled, the second finds done. The first failure is the only one that is told;
everything is undone then, in reverse.

A job is a part as well. It is made and claims its nodes when it is prepared, attaches itself to its
disk in `settle`, at the same moment at which the other parts take effect, and starts in `parted`.
Where a `group` is given the job joins it there, and ends together with the others.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TYPE_CHECKING

from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.errors import CowferryError
from cowferry.jobs.ending import Ending, finish

if TYPE_CHECKING:
    from cowferry.daemon import Daemon
    from cowferry.jobs.group import Group

log = logging.getLogger(__name__)


class Part(Ending):
    """One part: an ending that can be called off before it has begun.

    Made in the turn of its command, which it may give away while it opens files; making it raises
    `CowferryError`, with nothing changed and nothing claimed. Its `settle` sees what the parts
    before it did, and its `unsettle` is also called after a `settle` that failed half-way."""

    def abort(self) -> None:
        """It will not be: let go of whatever was made and claimed for it."""

    def becomes(self, disk: Disk) -> Node | None:
        """What this part makes the root of `disk`, if it does."""
        return None


class Transaction:
    """The parts of one; a context that undoes all of them if something in it fails.

    Raises `CowferryError` for an `OSError`, too; `what` is what failed then."""

    def __init__(self, daemon: Daemon, what: str, group: Group | None = None) -> None:
        self.daemon = daemon
        self.what = what
        self.group = group  # what the jobs among the parts are to end with; None: each by itself
        self.parts: list[Part] = []

    def root(self, disk: Disk) -> Node:
        """The root that the disk is going to have after the parts so far."""
        tops = (part.becomes(disk) for part in reversed(self.parts))
        return next((top for top in tops if top is not None), disk.root)

    def finish(self, *others: Ending) -> None:
        """Make all of them true at one moment, along with `others`. Raises before any is.

        The caller gives its turn away: this waits for guests, storage and servers. What the parts
        rely on they have claimed."""
        with self.daemon.graph.turn.apart():
            finish([*self.parts, *others])
        if self.group is not None:
            self.group.open()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        parts, self.parts = self.parts, []  # each of them knows us
        if error is None:
            self.daemon.graph.bitmaps_changed()
            return
        for part in reversed(parts):
            try:
                part.abort()
            except (OSError, CowferryError):
                log.exception("%s: a part could not be undone", self.what)
        self.daemon.graph.bitmaps_changed()
        if isinstance(error, OSError):
            raise CowferryError(
                f"the {self.what} failed: {error.strerror or error}", "every disk is as it was"
            ) from error
