"""Power cuts around transactions of bitmaps: of one image all changes are there, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chains import contents
from cowferry.block.lane import Lane
from cowferry.daemon import Daemon
from cowferry.errors import CowferryError
from test_bitmaps import action
from test_crash_bitmaps import FINE, FORMATS, Kept, Set, judged, small


class Told(Kept):
    """Whose bitmaps are changed by commands."""

    def open(self, read_only: bool = False) -> None:
        self.daemon = Daemon()
        given = {"driver": "file", "filename": self.path}
        options = {"node-name": "vm", "driver": self.format, "file": given}
        self.daemon.execute("blockdev-add", options)
        self.disk = self.daemon.graph.disk("vm")
        self.lane = Lane(self.disk)

    def flat(self) -> bytes:
        return bytes(contents(self.disk.root))

    def transaction(self, after: Set, *actions: dict[str, Any]) -> None:
        """All of it or nothing of it is found meanwhile, and all of it afterwards."""
        self.expect(self.now, after)
        self.daemon.execute("transaction", {"actions": list(actions)})
        self.expect(after)


@pytest.mark.parametrize(("format", "options"), FORMATS[:2], ids=["raw", "qcow2"])
def test_B2_a_transaction_is_all_there_or_not_at_all(
    tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    with small():
        world = Told(tmp_path, format, **options)
        with world.recorded():
            begin = world.flat()
            world.transaction(
                {"a": ((begin, None),), "b": ((begin, None),)},
                action("add", "vm", "a", persistent=True, granularity=FINE),
                action("add", "vm", "b", persistent=True),
                action("add", "vm", "memory"),
            )
            world.churn(6)
            switch = (
                action("add", "vm", "copy", persistent=True, disabled=True, granularity=4096),
                action("merge", "vm", "copy", bitmaps=["a", "memory"]),
                action("clear", "vm", "a"),
                action("disable", "vm", "b"),
                action("clear", "vm", "memory"),
            )
            world.expect(world.now)
            with pytest.raises(CowferryError, match="abort"):
                world.daemon.execute("transaction", {"actions": [*switch, {"type": "abort"}]})
            world.expect(world.now)
            world.churn(2)
            now = world.flat()
            after: Set = {"a": ((now, None),), "b": ((begin, now),), "copy": ((begin, now),)}
            world.transaction(after, *switch)
            world.churn(4)
            last = world.flat()
            world.transaction(
                {"a": ((now, last), (begin, now)), "b": ((begin, now), (last, None))},
                action("merge", "vm", "a", bitmaps=["copy"]),
                action("remove", "vm", "copy"),
                action("enable", "vm", "b"),
                action("disable", "vm", "a"),
            )
            world.churn(3)
            world.daemon.close()
        judged(world)
