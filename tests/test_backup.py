"""The backup job's rules, K1, K2 and B3, stepped by hand: the guest writes between any steps."""

from __future__ import annotations

import errno
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node, State
from cowferry.block.spill import UNIT
from cowferry.drivers import opening
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.jobs import backup
from cowferry.jobs.backup import Backup
from cowferry.jobs.ending import finish
from cowferry.jobs.job import Job
from cowferry.operations.backup import Unknown
from orders import failing, on_call
from tests_support import need

KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512
SIZE = 5 * MIB // 2 + 3 * SECTOR  # ends inside a granule of everything but sectors
CLUSTERS = [0, 4 * KIB, 64 * KIB, 2 * MIB]  # 0: a raw image


def make(folder: Path, name: str, cluster: int, over: str | None = None) -> Node:
    """An image of that cluster size (0: raw), perhaps over another."""
    kind = "qcow2" if cluster else "raw"
    options: dict[str, Any] = {"cluster_size": cluster} if cluster else {}
    if over is not None:
        kind_below = "raw" if over.endswith("raw") else "qcow2"
        options |= {"backing_file": over, "backing_fmt": kind_below}
    path = folder / f"{name}.{kind}"
    opening.create_image(str(path), kind, SIZE, options)
    return opening.open_image(str(path))


class Bench:
    """A disk with a guest, and what it must read as."""

    def __init__(self, folder: Path, source: Node) -> None:
        self.folder = folder
        self.disk = Disk(source, "vm")
        self.random = random.Random(4)
        self.oracle = contents(source)
        self.open: list[Node] = [source]

    def bitmap(self, granularity: int = 64 * KIB) -> Bitmap:
        """A bitmap of the guest's writes from now on."""
        bitmap = Bitmap("b0", SIZE, granularity)
        with self.disk.exclusive():
            self.disk.root.bitmaps["b0"] = bitmap
        return bitmap

    def write(self, offset: int, length: int) -> None:
        data = self.random.randbytes(length)
        self.disk.pwrite(memoryview(data), offset)
        self.oracle[offset : offset + length] = data

    def anything(self) -> tuple[int, int]:
        """What a guest does, anywhere, aligned or not; where it was."""
        length = self.random.choice([SECTOR, 5000, 64 * KIB, 300 * KIB])
        offset = self.random.randrange(SIZE - length)
        kind = self.random.choice(["write", "write", "zero", "discard"])
        if kind == "write":
            self.write(offset, length)
            return offset, length
        if kind == "zero":
            self.disk.zero(offset, length, unmap=self.random.random() < 0.5)
        else:
            self.disk.discard(offset, length)
        part = bytearray(length)
        self.disk.pread(memoryview(part), offset)
        self.oracle[offset : offset + length] = part
        return offset, length

    def backup(self, target: Node, **options: Any) -> Backup:
        """A job whose moment is now."""
        self.open.append(target)
        job = Backup(self.disk, Disk(target, "t"), max_chunk=UNIT, **options)
        with self.disk.exclusive():
            job.attach()
        return job

    def put_away(self, node: Node) -> None:
        """Close a target, which others may lie over from then on."""
        self.open.remove(node)
        opening.close_chain(node)

    def close(self) -> None:
        for node in reversed(self.open):
            opening.close_chain(node)


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    """Whatever a test opens is closed in the end."""
    out: list[Bench] = []
    yield out
    for bench in out:
        bench.close()


def a_bench(benches: list[Bench], folder: Path, cluster: int, **more: Any) -> Bench:
    bench = Bench(folder, make(folder, "vm", cluster, **more))
    benches.append(bench)
    bench.write(0, SIZE // 2)
    for _ in range(5):
        bench.anything()
    return bench


def run(job: Backup, between: Callable[[], object] = lambda: None) -> None:
    """To the end, and well."""
    for _ in job.run():
        between()
    assert job.ignored is None
    finish([job])
    job.clean()


# K1: the target is the disk of T0 ------------------------------------------------------------


@pytest.mark.parametrize("target", CLUSTERS)
@pytest.mark.parametrize("source", CLUSTERS)
def test_K1_a_full_backup_is_the_disk_of_its_start(
    benches: list[Bench], tmp_path: Path, source: int, target: int
) -> None:
    bench = a_bench(benches, tmp_path, source)
    node = make(tmp_path, "t", target)
    job = bench.backup(node)
    moment = bytes(bench.oracle)
    run(job, bench.anything)
    assert not differs(contents(node), moment)
    assert not differs(contents(bench.disk), bench.oracle)
    assert not bench.disk.taps and not bench.disk.bitmaps


def test_K1_whatever_was_there_before_is_overwritten(benches: list[Bench], tmp_path: Path) -> None:
    bench = a_bench(benches, tmp_path, 64 * KIB)
    node = make(tmp_path, "t", 64 * KIB)
    node.pwrite(memoryview(b"old" * (SIZE // 3)), 0)
    job = bench.backup(node)
    moment = bytes(bench.oracle)
    run(job, bench.anything)
    assert not differs(contents(node), moment)


@pytest.mark.parametrize("target", CLUSTERS[1:])
@pytest.mark.parametrize("source", CLUSTERS[1:])
def test_K1_a_backup_of_the_top_shows_the_moment_over_the_base(
    benches: list[Bench], tmp_path: Path, source: int, target: int
) -> None:
    base = make(tmp_path, "base", 0)
    base.pwrite(memoryview(random.Random(1).randbytes(SIZE)), 0)
    base.close()
    bench = Bench(tmp_path, make(tmp_path, "vm", source, over="base.raw"))
    benches.append(bench)
    for _ in range(4):
        bench.anything()
    node = make(tmp_path, "t", target, over="base.raw")
    job = bench.backup(node, base=bench.disk.root.backing)
    moment = bytes(bench.oracle)
    run(job, bench.anything)
    assert not differs(contents(node), moment)
    if max(source, target) <= UNIT:
        held = sum(e.length for e in node.extents_with_data())
        assert held < SIZE, "what only the base has was copied, too"


@pytest.mark.parametrize("target", CLUSTERS[1:])
@pytest.mark.parametrize("granularity", [4 * KIB, 64 * KIB, MIB])
@pytest.mark.parametrize("known", [True, False], ids=["over-the-last", "by-itself"])
def test_K1_an_increment_over_the_backup_before_is_the_moment(
    benches: list[Bench], tmp_path: Path, granularity: int, target: int, known: bool
) -> None:
    """Whether the target lies over the last backup already, or is laid over it afterwards."""
    bench = a_bench(benches, tmp_path, 4 * KIB)
    bitmap = bench.bitmap(granularity)
    full = make(tmp_path, "full", 64 * KIB)
    run(bench.backup(full, bitmap=bitmap), bench.anything)
    bench.put_away(full)
    for n in range(2):
        bench.anything()
        below = "full.qcow2" if n == 0 else f"inc{n - 1}.qcow2"
        if known:
            node = make(tmp_path, f"inc{n}", target, over=below)
        else:
            node = make(tmp_path, f"inc{n}", target)
            node.backing = Unknown(SIZE)  # as `operations` lends it
        job = bench.backup(node, bitmap=bitmap, by_bitmap=True)
        moment = bytes(bench.oracle)
        run(job, bench.anything)
        if not known:
            node.backing = None
            node.set_backing(below, "qcow2")
        bench.put_away(node)
        now = opening.open_image(str(tmp_path / f"inc{n}.qcow2"), read_only=True)
        try:
            assert not differs(contents(now), moment)
        finally:
            opening.close_chain(now)


@pytest.mark.parametrize("target", CLUSTERS[1:])
@pytest.mark.parametrize("source", CLUSTERS)
def test_K1_the_overlay_of_a_pull_backup_shows_the_moment_all_the_time(
    benches: list[Bench], tmp_path: Path, source: int, target: int
) -> None:
    bench = a_bench(benches, tmp_path, source)
    node = make(tmp_path, "t", target)
    node.backing = bench.disk.root
    job = bench.backup(node, everything=False)
    moment = bytes(bench.oracle)
    steps = job.run()
    for _ in range(20):
        next(steps)
        bench.anything()
        assert not differs(contents(job.target), moment)
    steps.close()  # type: ignore[attr-defined]
    job.clean()
    bench.write(0, SIZE)
    if any(e.state is State.HOLE for e in node.extents(0, SIZE)):
        with pytest.raises(OSError, match="the backup that kept this moment is over"):
            contents(job.target)  # rather than bytes of another moment
    else:
        assert not differs(contents(job.target), moment)
    node.backing = None


def test_K1_a_pull_backup_that_suffices_ends_well_and_shows_nothing_any_more(
    benches: list[Bench], tmp_path: Path
) -> None:
    bench = a_bench(benches, tmp_path, 0)
    bitmap = bench.bitmap()
    bench.write(0, SECTOR)
    node = make(tmp_path, "t", 64 * KIB)
    node.backing = bench.disk.root
    job = bench.backup(node, everything=False, bitmap=bitmap)
    steps = job.run()
    next(steps)
    bench.write(MIB, SECTOR)
    job.suffice()
    assert not list(steps)
    lost: list[bool] = []
    finish([job, Watcher(job, lost)])
    assert lost == [True], "the view has to go before the guest may write unseen"
    job.clean()
    assert list(bitmap.runs()) == [(MIB, UNIT)]
    node.backing = None


class Watcher(Job):
    """Ends along with a backup, and looks whether its view is gone before the drain is over."""

    def __init__(self, job: Backup, seen: list[bool]) -> None:
        super().__init__()
        self.job, self.seen = job, seen

    def switch(self) -> None:
        self.seen.append(self.job.target.root.backing is not self.job.source)


# B3 and the bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["on-success", "never", "always"])
@pytest.mark.parametrize("outcome", ["success", "cancel", "failure"])
def test_B3_which_bits_stay(
    benches: list[Bench], tmp_path: Path, mode: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = a_bench(benches, tmp_path, 0)
    bitmap = bench.bitmap(UNIT)
    for unit in (1, 3, 4, 9, 20, 30):
        bench.write(unit * UNIT, SECTOR)
    before = units(bitmap)
    assert before == {1, 3, 4, 9, 20, 30}
    node = make(tmp_path, "t", UNIT)
    node.backing = Unknown(SIZE)
    job = bench.backup(node, bitmap=bitmap, by_bitmap=True, bitmap_mode=mode)
    job.clones = False
    steps = job.run()
    next(steps)  # copies unit 1
    for unit in (3, 12, 30):
        bench.write(unit * UNIT, SECTOR)
    next(steps)  # copies from unit 3 on, of which the guest has written some
    since = {3, 12, 30}
    copied = before - units(job.missing)
    assert 1 in copied and 30 not in copied
    if outcome == "success":
        list(steps)
        finish([job])
    elif outcome == "cancel":
        steps.close()  # type: ignore[attr-defined]
    else:
        on_call(monkeypatch, node, "pwrite", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            list(steps)
    job.clean()
    wanted = {
        ("on-success", "success"): since,
        ("always", "success"): since,
        ("always", "cancel"): since | (before - copied),
        ("always", "failure"): since | (before - copied),
    }
    assert units(bitmap) == wanted.get((mode, outcome), before | since)
    assert not bitmap.busy
    bench.write(40 * UNIT - SECTOR, SECTOR)
    assert 39 in units(bitmap), "it records no more"
    node.backing = None


def units(bitmap: Bitmap) -> set[int]:
    """Which bits are set."""
    return {n for o, length in bitmap.runs() for n in range(o // UNIT, -(-(o + length) // UNIT))}


def test_B3_always_takes_back_what_was_copied_and_no_more(
    benches: list[Bench], tmp_path: Path
) -> None:
    """The target of a backup that failed, and the next one over it, are the moment together."""
    bench = a_bench(benches, tmp_path, 4 * KIB)
    bitmap = bench.bitmap(16 * KIB)
    full = make(tmp_path, "full", UNIT)
    run(bench.backup(full, bitmap=bitmap))
    bench.put_away(full)
    for _ in range(6):
        bench.anything()
    first = make(tmp_path, "first", UNIT, over="full.qcow2")
    job = bench.backup(first, bitmap=bitmap, by_bitmap=True, bitmap_mode="always")
    job.clones = False
    steps = job.run()
    for _ in range(3):
        next(steps)
        bench.anything()
    steps.close()  # type: ignore[attr-defined]
    job.clean()
    bench.put_away(first)
    second = make(tmp_path, "second", UNIT, over="first.qcow2")
    again = bench.backup(second, bitmap=bitmap, by_bitmap=True)
    moment = bytes(bench.oracle)
    run(again, bench.anything)
    assert not differs(contents(second), moment)


# K2 and errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_K2_old_bytes_that_can_be_saved_nowhere_fail_one_of_the_two(
    benches: list[Bench], tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull backup whose scratch image is full."""
    bench = a_bench(benches, tmp_path, 0)
    before = bytes(bench.oracle)
    node = make(tmp_path, "t", 64 * KIB)
    node.backing = bench.disk.root
    job = bench.backup(node, everything=False, on_cbw_error=policy)
    steps = job.run()
    next(steps)
    on_call(monkeypatch, node, "pwrite", failing(errno.ENOSPC))
    if policy == "break-guest-write":
        with pytest.raises(OSError, match="No space left"):
            bench.disk.pwrite(memoryview(b"x" * SECTOR), 0)
        assert not differs(contents(bench.disk), before), "a write that failed has changed it"
        assert not differs(contents(job.target), before)
        bench.write(0, SECTOR)  # there is room again
        assert not differs(contents(job.target), before)
        next(steps)
        steps.close()  # type: ignore[attr-defined]
    else:
        bench.write(0, SECTOR)
        with pytest.raises(OSError, match="the backup that kept this moment is over"):
            contents(job.target)
        with pytest.raises(OSError, match="the backup is broken: No space left"):
            next(steps)
    job.clean()
    bench.write(0, SIZE)
    node.backing = None


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_K2_a_push_waits_for_the_target_where_there_is_no_scratch_space(
    benches: list[Bench], tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = a_bench(benches, tmp_path, 0)
    node = make(tmp_path, "t", 64 * KIB)
    job = bench.backup(node, on_cbw_error=policy)
    moment = bytes(bench.oracle)
    monkeypatch.setattr(job.spill, "put", lambda *_: failing(errno.ENOSPC)())
    steps = job.run()
    next(steps)
    at = SIZE - SECTOR
    bench.write(at, SECTOR)
    assert contents(node)[at:] == moment[at:], "it was not saved before it was overwritten"
    on_call(monkeypatch, node, "pwrite", failing(errno.EIO))
    if policy == "break-guest-write":
        with pytest.raises(OSError, match="Input/output error"):
            bench.disk.pwrite(memoryview(b"x" * SECTOR), MIB)
        list(steps)
        finish([job])
        assert not differs(contents(node), moment)
    else:
        bench.write(MIB, SECTOR)
        with pytest.raises(OSError, match="the backup is broken: Input/output error"):
            list(steps)
    job.clean()


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("policy", ["report", "ignore", "enospc", "stop"])
def test_policies_for_errors_of_either_side(
    benches: list[Bench], tmp_path: Path, side: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = a_bench(benches, tmp_path, 4 * KIB)
    node = make(tmp_path, "t", 64 * KIB)
    given = {"on_source_error" if side == "read" else "on_target_error": policy}
    job = bench.backup(node, **given)
    moment = bytes(bench.oracle)
    job.clones = False
    steps = job.run()
    next(steps)
    code = errno.ENOSPC if side == "write" else errno.EIO
    if side == "write":
        on_call(monkeypatch, node, "pwrite", failing(code))
    else:
        on_call(monkeypatch, backup, "spans", failing(code))
    stops = policy == "stop" or (policy == "enospc" and code == errno.ENOSPC)
    if policy == "ignore":
        list(steps)
        assert job.ignored is not None and job.ignored.errno == code
        assert job.missing.count(), "the gap is not known"
    elif stops:
        paused = next(steps)
        assert paused.error is not None and paused.error.errno == code
        bench.anything()
        list(steps)
        finish([job])
        assert not differs(contents(node), moment)
    else:
        with pytest.raises(OSError):
            list(steps)
    job.clean()
    assert not bench.disk.taps


def test_K1_a_compressed_cluster_that_is_given_back_while_the_overlay_reads_it(
    benches: list[Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader is inside the overlay's gate, which a guest who writes elsewhere does not pass."""
    need("qemu-img")
    plain = tmp_path / "plain.raw"
    plain.write_bytes((random.Random(2).randbytes(1000) * (SIZE // 1000 + 1))[:SIZE])
    command = ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M"]
    subprocess.run([*command, str(plain), str(tmp_path / "vm.qcow2")], check=True, timeout=60)
    source = opening.open_image(str(tmp_path / "vm.qcow2"))
    assert isinstance(source, Qcow2)
    bench = Bench(tmp_path, source)
    benches.append(bench)
    source.pieces._last = (0, b"")
    node = make(tmp_path, "t", 64 * KIB)
    node.backing = source
    job = bench.backup(node, everything=False)
    moment = bytes(bench.oracle)

    def written_and_reused() -> None:
        bench.write(0, SECTOR)
        bench.disk.flush()
        bench.write(2 * MIB, SECTOR)  # takes what was given back
        bench.disk.flush()

    on_call(monkeypatch, source.file, "pread", written_and_reused)
    part = bytearray(UNIT)
    job.target.pread(memoryview(part), MIB)
    assert not differs(part, moment[MIB : MIB + UNIT])
    job.clean()
    node.backing = None


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_is_empty_takes_few_steps_and_what_was_there_is_copied(
    tmp_path: Path, kind: str
) -> None:
    size, at = 1 << 30, 500 * MIB
    for name in ("vm", "t"):
        opening.create_image(str(tmp_path / name), kind, size, {})
    nodes = [opening.open_image(str(tmp_path / name), kind) for name in ("vm", "t")]
    disk, target = (Disk(node, "d") for node in nodes)
    for node in nodes:  # the target's own is to go
        node.pwrite(memoryview(node.filename.encode() * 1000), at)
    wanted = bytearray(64 * KIB)
    disk.pread(memoryview(wanted), at)
    job = Backup(disk, target)
    with disk.exclusive():
        job.attach()
    disk.discard(at, 4096)  # now it looks empty, too
    steps = 0
    for _ in job.run():
        steps += 1
        disk.pwrite(memoryview(b"x" * 512), size - steps * MIB)
    finish([job])
    job.clean()
    got = bytearray(64 * KIB)
    target.pread(memoryview(got), at)
    assert not differs(got, wanted)
    assert steps < 80
    assert sum(e.length for e in target.extents(0, size) if e.state is State.DATA) < 2 * MIB
    for node in nodes:
        node.close()
