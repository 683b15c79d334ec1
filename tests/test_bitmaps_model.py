"""A model of dirty bitmaps: whatever is done to a disk and its chain, each bitmap is right.

A bitmap is right if it has every granule that was changed in its node while it recorded (B2). Where
only guests wrote, and bitmaps were merged, it has no other: then it is `exact`. What a job writes
into a layer is known by its bytes; the job may have written more.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chains import contents
from cowferry.block.disk import Disk
from cowferry.block.node import Node, chain
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told
from test_bitmaps import action

SIZE = 1 << 20
SOAK = os.environ.get("COWFERRY_SOAK") is not None
NAMES = ["a", "b", "c"]
seed = st.integers(0, 1 << 30)


@dataclass
class Want:
    """What a bitmap has to be."""

    granularity: int
    persistent: bool
    recording: bool
    bits: set[int] = field(default_factory=set)
    exact: bool = True
    stored: bool | None = None  # what its image says of `recording`, if it could not be told

    def mark(self, offset: int, length: int) -> None:
        if self.recording:
            last = offset + length
            self.bits.update(range(offset // self.granularity, -(-last // self.granularity)))


Wants = dict[str, dict[str, Want]]  # by the file of the node, then by name


class Bitmaps(RuleBasedStateMachine):
    """A disk `vm`, at first in one image."""

    daemon: Daemon
    disk: Disk

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="bitmaps"))
        self.numbers = iter(range(1000))
        self.want: Wants = {}

    @initialize(format=st.sampled_from(["raw", "qcow2", "qed"]))
    def begin(self, format: str) -> None:
        self.path = self.new(format)
        self.open()

    def open(self) -> None:
        self.daemon = Daemon()
        self.told = Told(self.daemon)
        self.disk = self.daemon.open_disk("vm", self.path)

    def teardown(self) -> None:
        self.daemon.close()
        shutil.rmtree(self.folder)

    def new(self, format: str, **options: str) -> str:
        path = str(self.folder / f"{next(self.numbers)}.{format}")
        size = self.disk.size if hasattr(self, "disk") else SIZE
        opening.create_image(path, format, size, options)
        return path

    def ask(self, command: str, **arguments: Any) -> None:
        self.daemon.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def of(self, node: Node) -> dict[str, Want]:
        return self.want.setdefault(os.path.basename(node.filename), {})

    # The guest -------------------------------------------------------------------------------

    def requests(self, rnd: random.Random) -> None:
        for _ in range(3):
            length = rnd.choice([1, 512, 4096, 70_000])
            offset = rnd.randrange(self.disk.size - length)
            how = rnd.randrange(4)
            if how == 0:
                self.disk.zero(offset, length)
            elif how == 1:
                self.disk.discard(offset, length)
            else:
                self.disk.pwrite(memoryview(rnd.randbytes(length)), offset, fua=rnd.random() < 0.2)
            for want in self.of(self.disk.root).values():
                want.mark(offset, length)

    # Bitmaps ---------------------------------------------------------------------------------

    @rule(seed=seed)
    def use(self, seed: int) -> None:
        """What it is all about, several times."""
        rnd = random.Random(seed)
        for _ in range(6):
            self.requests(rnd)
            self.transaction(rnd, rnd.randrange(1, 4), abort=rnd.random() < 0.15)
            self.right()

    def transaction(self, rnd: random.Random, count: int, abort: bool) -> None:
        """All of it, or none of it if one of the changes cannot be."""
        nodes = list(chain(self.disk.root))
        after = copy.deepcopy(self.want)
        actions: list[dict[str, Any]] = []
        right = True
        removed: set[tuple[str, str]] = set()
        for _ in range(count):
            node = rnd.choice([self.disk.root, *nodes])
            of = after.setdefault(os.path.basename(node.filename), {})
            verb = rnd.choice(["add", "remove", "clear", "clear", "enable", "disable", "merge"])
            likely = [n for n in NAMES if (n in of) == (verb != "add")]
            name = rnd.choice(likely if likely and rnd.random() < 0.9 else NAMES)
            found = of.get(name)
            # QEMU: what is removed is in use until the transaction is over.
            right &= (node.filename, name) not in removed
            if verb == "add":
                more: dict[str, Any] = {
                    "granularity": 1 << rnd.randrange(9, 18),
                    "persistent": rnd.random() < 0.5,
                    "disabled": rnd.random() < 0.2,
                }
                right &= found is None and not (more["persistent"] and node.read_only)
                of[name] = Want(
                    int(more["granularity"]), bool(more["persistent"]), not more["disabled"]
                )
                actions.append(action("add", node.name, name, **more))
                continue
            right &= found is not None
            fixed = found is not None and found.persistent and node.read_only
            more = {}
            if verb == "merge":
                other = rnd.choice(nodes)
                there = after.setdefault(os.path.basename(other.filename), {})
                source = rnd.choice(sorted(there) if there and rnd.random() < 0.9 else NAMES)
                more = {"bitmaps": [{"node": other.name, "name": source}]}
                given = there.get(source)
                right &= given is not None and (other.filename, source) not in removed
                right &= given is None or node.size == other.size
                if found is not None and given is not None:
                    merged(found, given)
            elif verb == "remove":
                of.pop(name, None)
                removed.add((node.filename, name))
            elif found is not None and verb == "clear":
                found.bits, found.exact = set(), True
            elif found is not None:
                if fixed and found.stored is None:
                    found.stored = found.recording
                found.recording = verb == "enable"
            right &= not (fixed and verb in ("merge", "clear", "remove"))
            actions.append(action(verb, node.name, name, **more))
        if abort:
            actions.append({"type": "abort"})
            right = False
        try:
            self.ask("transaction", actions=actions)
        except CowferryError as error:
            assert not right, f"{actions}: {error}"
        else:
            assert right, f"{actions} was not refused"
            self.want = after

    # The chain -------------------------------------------------------------------------------

    @rule()
    def snapshot(self) -> None:
        """QEMU's: the bitmaps stay."""
        path = str(self.folder / f"{next(self.numbers)}.qcow2")
        self.ask("blockdev-snapshot-sync", device="vm", snapshot_file=path)
        self.path = path

    @rule(seed=seed)
    def mirror(self, seed: int) -> None:
        """QEMU's; bitmaps of the target, if it had any, tell what is new in it."""
        rnd = random.Random(seed)
        path = self.new(rnd.choice(["raw", "qcow2"]))
        given = {"driver": "file", "filename": path}
        node = f"n{next(self.numbers)}"
        self.ask("blockdev-add", node_name=node, driver=path.rsplit(".")[-1], file=given)
        before = bytes(self.disk.size)
        self.ask("block-dirty-bitmap-add", node=node, name="a", persistent=rnd.random() < 0.5)
        target = self.daemon.graph.node(node)
        persistent = target.bitmaps["a"].persistent
        self.of(target)["a"] = Want(65536, persistent, True)
        self.ask("blockdev-mirror", job_id="j", device="vm", target=node, sync="full")
        self.told.wait("BLOCK_JOB_READY")
        self.ask("job-complete", id="j")
        self.over()
        self.path = path
        self.changed(target, before)

    @rule(seed=seed)
    def commit(self, seed: int) -> None:
        """Of the active layer, or of others."""
        nodes = list(chain(self.disk.root))
        if len(nodes) == 1:
            return
        rnd = random.Random(seed)
        top = rnd.randrange(len(nodes) - 1)
        base = nodes[rnd.randrange(top + 1, len(nodes))]
        before = bytes(contents(base))
        for node in (base, *nodes[max(top - 1, 0) : top]):  # they are writable for a while
            for want in self.of(node).values():
                want.stored = None
        given = {"top_node": nodes[top].name, "base_node": base.name}
        self.ask("block-commit", job_id="j", device="vm", **given)
        if top == 0:
            self.told.wait("BLOCK_JOB_READY")
            self.ask("job-complete", id="j")
            self.path = base.filename
        self.over()
        self.changed(base, before)

    @rule()
    def stream(self) -> None:
        """Not a byte of the disk changes, and no bitmap."""
        if self.disk.root.driver != "raw":
            self.ask("block-stream", job_id="j", device="vm")
            self.over()

    def over(self) -> None:
        over = self.told.wait("BLOCK_JOB_COMPLETED", device="j")
        assert "error" not in over, over
        self.told.wait("JOB_STATUS_CHANGE", id="j", status="null")
        there = {os.path.basename(n.filename) for n in self.daemon.graph.every_node()}
        for file in [file for file in self.want if file not in there]:
            self.closed(file)

    def changed(self, node: Node, before: bytes) -> None:
        """A job has written the node."""
        now = contents(node)
        for want in self.of(node).values():
            want.exact &= not want.recording
            for at in range(0, len(now), 512):
                if before[at : at + 512] != now[at : at + 512]:
                    want.mark(at, min(512, len(now) - at))

    # Coming back -----------------------------------------------------------------------------

    @rule()
    def again(self) -> None:
        """The daemon ends, and another one is there."""
        self.daemon.close()
        for file in self.want:
            self.closed(file)
        self.open()

    def closed(self, file: str) -> None:
        kept = self.want[file].items()
        self.want[file] = {name: want for name, want in kept if want.persistent}
        for want in self.want[file].values():
            if want.stored is not None:
                want.recording, want.stored = want.stored, None

    @invariant()
    def right(self) -> None:
        for node in chain(self.disk.root):
            want = self.of(node)
            assert set(node.bitmaps) == set(want)
            for name, bitmap in node.bitmaps.items():
                one = want[name]
                got = {
                    at // one.granularity
                    for offset, length in bitmap.runs()
                    for at in range(offset, offset + length, one.granularity)
                }
                assert not bitmap.inconsistent, bitmap.reason
                assert one.bits <= got, f"'{name}' lacks {sorted(one.bits - got)}"
                assert not one.exact or got == one.bits, f"'{name}': {sorted(got - one.bits)}"
                assert (bitmap.granularity, bitmap.persistent, bitmap.recording, bitmap.busy) == (
                    one.granularity, one.persistent, one.recording, "",
                )  # fmt: skip


def merged(into: Want, given: Want) -> None:
    """Of whatever granularity."""
    recording = into.recording
    into.recording = True
    for bit in list(given.bits):
        into.mark(bit * given.granularity, given.granularity)
    into.recording = recording
    into.exact &= given.exact


Bitmaps.TestCase.settings = settings(
    max_examples=400 if SOAK else 12,
    stateful_step_count=40 if SOAK else 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_B2_whatever_is_done_each_bitmap_is_right = Bitmaps.TestCase
