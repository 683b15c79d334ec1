"""The stateful model: whatever is done to a disk, it reads as a flat bytearray would.

Reads, writes, zeroes, trims and flushes at any alignment, growth, and streams with and without a
base, stepped by hand between the requests or run by a thread while they go on.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chains import contents, differs
from cowferry.block.compress import Compressed
from cowferry.block.disk import Disk
from cowferry.block.node import Node, chain
from cowferry.drivers import opening
from cowferry.jobs.job import Jobs, Progress
from cowferry.jobs.stream import Stream

LIMIT = 1 << 20
SOAK = os.environ.get("COWFERRY_SOAK") is not None
where = st.floats(0, 1)
lengths = st.sampled_from([1, 511, 512, 513, 4096, 4097, 30_000, 65_536, 150_000])


class Model(RuleBasedStateMachine):
    """One disk over a chain, and its oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="model-"))
        self.rnd = random.Random(0)
        self.step: Iterator[Progress] | None = None
        self.job: Stream | None = None
        self.thread: Stream | None = None

    @initialize(
        kind=st.sampled_from(["raw", "qcow2", "qcow2", "qed", "filling"]),
        cluster=st.sampled_from(["512", "4k", "64k"]),
        compat=st.sampled_from(["0.10", "1.1", "1.1", "ext"]),
        layers=st.integers(0, 2),
        sizes=st.lists(st.integers(1, 700), min_size=3, max_size=3),
        copy_on_read=st.booleans(),
        seed=st.integers(0, 1 << 20),
    )
    def build(
        self, kind: str, cluster: str, compat: str, layers: int, sizes: list[int],
        copy_on_read: bool, seed: int,
    ) -> None:  # fmt: skip
        self.rnd = random.Random(seed)
        size = sizes[0] * 1024
        options: dict[str, Any] = {"cluster_size": cluster, "compat": compat}
        if compat == "ext":
            options = {"cluster_size": "16k", "extended_l2": "on"}
        if compat != "0.10":
            options["compression_type"] = self.rnd.choice(["zlib", "zstd"])
            options["refcount_bits"] = self.rnd.choice([16, 16, 1, 2])
        if kind == "qed":
            table = self.rnd.choice([2, 16])
            options = {"cluster_size": cluster.replace("512", "8k"), "table_size": table}
        if kind == "filling":  # raw images, each to be filled from the one below
            options, kind = {"granularity": cluster}, "raw"
            layers += not layers
        elif kind == "raw":
            options, layers = {}, 0
        if not layers:
            path = self.folder / f"disk.{kind}"
            opening.create_image(str(path), kind, size, options)
            self.oracle = bytearray(size)
        else:
            self.oracle = bytearray(self.rnd.randbytes(size))
            (self.folder / "l0.raw").write_bytes(self.oracle)
            below, format = "l0.raw", "raw"
            for n in range(1, layers + 1):
                size = sizes[n] * 1024
                path = self.folder / f"l{n}.{kind}"
                given = options if n == layers else {}
                opening.create_image(
                    str(path), kind, size,
                    {**given, "backing_file": below, "backing_fmt": format},
                )  # fmt: skip
                self.oracle = self.oracle[:size].ljust(size, b"\0")
                if n < layers:
                    node = opening.open_image(str(path))
                    data = self.rnd.randbytes(min(size, 20_000))
                    node.pwrite(memoryview(data), size - len(data))
                    self.oracle[size - len(data) :] = data
                    node.zero(0, min(size, 8192))
                    self.oracle[: min(size, 8192)] = bytes(min(size, 8192))
                    opening.close_chain(node)
                below, format = path.name, kind
        self.path = path
        self.disk = Disk(opening.open_image(str(path)), "d", copy_on_read)
        self.leaks = False

    def range(self, at: float, length: int) -> tuple[int, int]:
        offset = min(int(at * self.disk.size), self.disk.size - 1)
        return offset, min(length, self.disk.size - offset)

    # What a guest does -------------------------------------------------------------------

    @rule(at=where, length=lengths, fua=st.booleans())
    def write(self, at: float, length: int, fua: bool) -> None:
        offset, length = self.range(at, length)
        data = self.rnd.randbytes(length)
        self.disk.pwrite(memoryview(data), offset, fua=fua)
        self.oracle[offset : offset + length] = data

    @rule(at=where, length=lengths, shrinks=st.sampled_from([True, True, False]))
    @precondition(lambda self: self.disk.root.driver == "qcow2")
    def write_compressed(self, at: float, length: int, shrinks: bool) -> None:
        offset, length = self.range(at, length)
        data = (self.rnd.randbytes(length // 5 + 1) * 5)[:length]
        if not shrinks:
            data = self.rnd.randbytes(length)
        with (
            Compressed(self.disk.root, offset, memoryview(data)) as packed,
            self.disk.exclusive(offset, length),
        ):
            if self.rnd.random() < 0.9:
                packed.put()
                self.oracle[offset : offset + length] = data

    @rule(at=where, length=lengths)
    def read(self, at: float, length: int) -> None:
        offset, length = self.range(at, length)
        buf = bytearray(length)
        self.disk.pread(memoryview(buf), offset)
        assert buf == self.oracle[offset : offset + length]

    @rule(at=where, length=lengths, unmap=st.booleans())
    def zero(self, at: float, length: int, unmap: bool) -> None:
        offset, length = self.range(at, length)
        self.disk.zero(offset, length, unmap=unmap)
        self.oracle[offset : offset + length] = bytes(length)

    @rule(at=where, length=lengths)
    def trim(self, at: float, length: int) -> None:
        offset, length = self.range(at, length)
        self.disk.discard(offset, length)
        got = bytearray(length)
        self.disk.pread(memoryview(got), offset)
        for i in range(length):  # ST4: zero, or as before; never something older
            assert got[i] in (0, self.oracle[offset + i])
        self.oracle[offset : offset + length] = got

    @rule()
    def flush(self) -> None:
        self.disk.flush()
        if self.step is None and self.thread is None:
            assert not self.disk.root.unflushed

    @rule(more=st.integers(1, 300))
    @precondition(lambda self: self.step is None and self.thread is None)
    def grow(self, more: int) -> None:
        size = min(self.disk.size + more * 1024, LIMIT)
        self.disk.resize(size)
        self.oracle.extend(bytes(size - len(self.oracle)))

    # What an administrator does ----------------------------------------------------------

    def streamable(self) -> bool:
        return self.step is None and self.thread is None and self.disk.root.backing is not None

    def stream(self, to_base: bool, **more: Any) -> Stream:
        below = list(chain(self.disk.root))[1:]
        base: Node | None = below[-1] if to_base and len(below) > 1 else None
        name = (base.filename, base.driver) if base is not None else None
        self.let_go = [n for n in below if n is not base]
        return Stream(self.disk, base, backing=name, **more)

    @rule(to_base=st.booleans(), chunk=st.sampled_from([64, 128, 512]))
    @precondition(streamable)
    def begin_stream(self, to_base: bool, chunk: int) -> None:
        self.job = self.stream(to_base, chunk=chunk << 10)
        self.step = iter(self.job.run())

    @rule(steps=st.integers(1, 4))
    @precondition(lambda self: self.step is not None)
    def step_stream(self, steps: int) -> None:
        assert self.step is not None and self.job is not None
        for _ in range(steps):
            if next(self.step, None) is None:
                self.job.prepare()
                self.step = None
                self.close_old()
                return

    @rule()
    @precondition(lambda self: self.step is not None)
    def cancel_stream(self) -> None:
        assert self.step is not None
        self.step.close()  # type: ignore[attr-defined]
        self.step = None
        assert self.disk.root.backing is not None

    @rule(to_base=st.booleans())
    @precondition(streamable)
    def stream_in_a_thread(self, to_base: bool) -> None:
        self.leaks = self.disk.root.driver == "qed"  # room that a guest's write made needless
        self.thread = self.stream(to_base, auto_dismiss=False)
        Jobs(lambda name, data: None).start(self.thread, "s")

    @rule()
    @precondition(lambda self: self.thread is not None)
    def end_thread(self) -> None:
        assert self.thread is not None
        assert self.thread.wait(60)
        assert self.thread.error is None
        self.thread = None
        self.close_old()

    def close_old(self) -> None:
        for node in self.let_go:
            node.close()

    @rule()
    @precondition(lambda self: self.step is None and self.thread is None)
    def reopen(self) -> None:
        opening.close_chain(self.disk.root)
        self.disk = Disk(opening.open_image(str(self.path)), "d", self.disk.copy_on_read)

    # What must hold ----------------------------------------------------------------------

    @invariant()
    def reads_as_the_oracle(self) -> None:
        if hasattr(self, "disk"):
            wrong = differs(contents(self.disk), self.oracle)
            assert not wrong, wrong

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            if self.thread is not None:
                self.end_thread()
            root = self.disk.root
            checker = getattr(root, "check", None)
            if checker is not None:
                opening.close_chain(root)
                result = opening.open_image(str(self.path), backing=False, read_only=True)
                found = result.check()  # type: ignore[attr-defined]
                result.close()
                assert not found.corruptions and (self.leaks or not found.leaks), found.messages
                if shutil.which("qemu-img") and self.rnd.random() < 0.2:
                    done = subprocess.run(
                        ["qemu-img", "check", str(self.path)], capture_output=True, text=True
                    )
                    wanted = (0, 3) if self.leaks else (0,)
                    assert done.returncode in wanted, done.stdout + done.stderr
            else:
                opening.close_chain(root)
        shutil.rmtree(self.folder)


Model.TestCase.settings = settings(
    max_examples=2000 if SOAK else 80,
    stateful_step_count=60 if SOAK else 25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestModel = Model.TestCase
