"""A model of several backups of one disk: each keeps its own moment, whatever the others do.

They are stepped by hand, and begin and end in any order, while the guest writes. Each must end as
what the disk read as when *it* began (K1), and a bitmap must go on from there (B3)."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chains import contents, differs
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.block.spill import UNIT
from cowferry.drivers import opening
from cowferry.jobs.backup import BITMAP_MODES, Backup
from cowferry.jobs.ending import finish
from cowferry.jobs.job import Progress

KIB = 1 << 10
SECTOR = 512
SIZE = 14 * UNIT + 3 * SECTOR
SOAK = os.environ.get("COWFERRY_SOAK") is not None
BITMAPS = ["x", "y"]
KINDS = ["full", "top", "none", *BITMAPS]
seed = st.integers(0, 1 << 30)


@dataclass
class Running:
    """A backup, what the disk read as when it began, and what its target shows."""

    kind: str
    job: Backup
    steps: Iterator[Progress]
    moment: bytes


class Backups(RuleBasedStateMachine):
    """A disk over a base, its guest, and any number of backups."""

    @initialize(
        top=st.sampled_from([4 * KIB, 64 * KIB, 256 * KIB]), whole=st.booleans(), number=seed
    )
    def begin(self, top: int, whole: bool, number: int) -> None:
        self.random = random.Random(number)
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.number = 0
        base = self.image("raw")
        base.pwrite(memoryview(self.random.randbytes(SIZE)), 0)
        base.close()
        under = {"backing_file": base.filename, "backing_fmt": "raw"}
        root = self.image("raw") if whole else self.image("qcow2", cluster_size=top, **under)
        self.disk = Disk(root, "vm")
        self.oracle = contents(root)
        self.running: list[Running] = []
        # An increment goes into a raw copy that the increments before it have kept up.
        self.bitmaps = {name: Bitmap(name, SIZE, 64 * KIB) for name in BITMAPS}
        self.copies = {name: self.image("raw") for name in BITMAPS}
        for name in BITMAPS:
            root.bitmaps[name] = self.bitmaps[name]
            self.copies[name].pwrite(memoryview(bytes(self.oracle)), 0)

    def image(self, format: str, **options: Any) -> Node:
        self.number += 1
        path = str(self.folder / f"{self.number}")
        opening.create_image(path, format, SIZE, options)
        return opening.open_image(path, format)

    # The guest ---------------------------------------------------------------------------

    @rule(at=st.integers(0, SIZE // SECTOR - 1), length=st.sampled_from([1, 8, 20, 150, 600]))
    def write(self, at: int, length: int) -> None:
        start, end = at * SECTOR, min((at + length) * SECTOR, SIZE)
        data = self.random.randbytes(end - start)
        self.disk.pwrite(memoryview(data), start)
        self.oracle[start:end] = data

    @rule(at=st.integers(0, SIZE // SECTOR - 1), length=st.integers(1, 600), unmap=st.booleans())
    def zero(self, at: int, length: int, unmap: bool) -> None:
        start, end = at * SECTOR, min((at + length) * SECTOR, SIZE)
        self.disk.zero(start, end - start, unmap)
        self.oracle[start:end] = bytes(end - start)

    # The backups -------------------------------------------------------------------------

    @rule(
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
        memory=st.sampled_from([0, 9000, 1 << 20]), mode=st.sampled_from(BITMAP_MODES),
    )  # fmt: skip
    def start(self, kinds: list[str], memory: int, mode: str) -> None:
        """Some at one moment."""
        kinds = [k for k in kinds if k not in {r.kind for r in self.running} or k not in BITMAPS]
        jobs = [self.job(kind, mode) for kind in kinds]
        with self.disk.exclusive():
            for job in jobs:
                job.spill.memory = memory
                job.attach()
        moment = bytes(self.oracle)
        self.running += [
            Running(kind, job, iter(job.run()), moment)
            for kind, job in zip(kinds, jobs, strict=True)
        ]

    def job(self, kind: str, mode: str) -> Backup:
        root = self.disk.root
        more: dict[str, Any] = {"scratch": str(self.folder), "max_chunk": UNIT}
        if kind in BITMAPS:
            bitmap = self.bitmaps[kind]
            return Backup(
                self.disk, Disk(self.copies[kind], kind), bitmap=bitmap, by_bitmap=True,
                bitmap_mode=mode, **more,
            )  # fmt: skip
        target = self.image("qcow2" if kind != "full" else self.random.choice(["qcow2", "raw"]))
        if kind == "none":
            target.backing = root
            return Backup(self.disk, Disk(target, kind), everything=False, **more)
        base = None
        if kind == "top":
            base = target.backing = root.backing
        return Backup(self.disk, Disk(target, kind), base=base, **more)

    @rule(which=st.integers(0, 5), count=st.integers(1, 6))
    def step(self, which: int, count: int) -> None:
        if self.running:
            running = self.running[which % len(self.running)]
            for _ in range(count):
                if next(running.steps, None) is None:
                    self.ended_well(running)
                    return

    @rule(which=st.integers(0, 5), well=st.booleans())
    def end(self, which: int, well: bool) -> None:
        if self.running:
            running = self.running[which % len(self.running)]
            if well:
                running.job.suffice()
                for _ in running.steps:
                    pass
                self.ended_well(running)
            else:
                running.steps.close()  # type: ignore[attr-defined]
                self.over(running)

    def ended_well(self, running: Running) -> None:
        finish([running.job])
        if running.kind != "none":  # that one shows nothing any more
            assert not differs(contents(running.job.target), running.moment), running.kind
        self.over(running)

    def over(self, running: Running) -> None:
        self.running.remove(running)
        running.job.clean()
        assert running.job not in self.disk.taps
        if running.kind not in BITMAPS:
            running.job.target.root.backing = None
            running.job.target.root.close()

    # What holds --------------------------------------------------------------------------

    @invariant()
    def the_guest_reads_what_it_wrote(self) -> None:
        assert not differs(contents(self.disk), self.oracle)

    @invariant()
    def a_pull_shows_its_moment(self) -> None:
        for r in self.running:
            if r.kind == "none":
                assert not differs(contents(r.job.target), r.moment)

    @invariant()
    def a_bitmap_has_whatever_its_copy_lacks(self) -> None:
        for name in BITMAPS:
            if name in {r.kind for r in self.running}:
                continue
            copy, bitmap = contents(self.copies[name]), self.bitmaps[name]
            for at in range(0, SIZE, bitmap.granularity):
                piece = slice(at, at + bitmap.granularity)
                assert copy[piece] == self.oracle[piece] or bitmap.any(at, 1), (name, at)

    def teardown(self) -> None:
        for running in list(self.running):
            running.steps.close()  # type: ignore[attr-defined]
            self.over(running)
        assert not self.disk.taps and not self.disk.bitmaps
        opening.close_chain(self.disk.root)
        for copy in self.copies.values():
            copy.close()
        shutil.rmtree(self.folder)


Backups.TestCase.settings = settings(
    max_examples=2000 if SOAK else 40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_K1_B3_backups_of_one_disk_are_each_of_their_own_moment = Backups.TestCase
