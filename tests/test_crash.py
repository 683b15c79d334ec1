"""Power cuts, enumerated: Q1, Q2, Q6, ST1 to ST4, N1, N2, N6.

Check-clean is not correct: every state is opened and its bytes are compared with the oracle.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chains import contents, differs, make_base, overlay
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.drivers.qed.image import Qed
from cowferry.errors import CowferryError
from cowferry.jobs.stream import Stream
from tests_support import need
from writelog import Log, Oracle, State, put, states

SIZE = 512 << 10
SOAK = os.environ.get("COWFERRY_SOAK") is not None
SAMPLES = 40 if SOAK else 3


def oracle_at(marks: list[tuple[str, int, bytes]], flat: bytearray) -> Oracle:
    """The oracle as it stands after these marks."""
    oracle = Oracle(flat)
    for kind, offset, data in marks:
        if kind == "write":
            oracle.write(offset, data)
        elif kind == "flushed":
            oracle.flush()
    return oracle


def churn(disk: Disk, log: Log, rnd: random.Random, steps: int) -> None:
    """Guest requests, marked before they are sent and after a flush is answered."""
    for _ in range(steps):
        act = rnd.randrange(10)
        offset = rnd.randrange(disk.size - 1)
        length = min(rnd.choice([1, 512, 5000, 40_000]), disk.size - offset)
        if act < 6:
            data = rnd.randbytes(length)
            log.mark(("write", offset, data))
            disk.pwrite(memoryview(data), offset, fua=act == 5)
            if act == 5:
                log.mark(("flushed", 0, b""))  # N2, and a FUA here flushes all
        elif act == 6:
            log.mark(("write", offset, bytes(length)))
            disk.zero(offset, length, unmap=rnd.random() < 0.5)
        elif act == 7:
            offset, length = offset // 65536 * 65536, 65536
            length = min(length, disk.size - offset)
            old = isinstance(disk.root, Qcow2) and disk.root.header.version == 2
            if not old:  # version 2 has no zero clusters: it keeps the bytes
                log.mark(("write", offset, bytes(length)))
            disk.discard(offset, length)
        else:
            disk.flush()
            log.mark(("flushed", 0, b""))  # N1


def verify(state: State, folder: Path, base: bytearray, name: str = "vm.qcow2") -> None:
    """No corruption, and no byte that the oracle does not allow."""
    put(state, folder)
    node = opening.open_image(str(folder / name), read_only=True)
    try:
        assert isinstance(node, (Qcow2, Qed))
        result = node.check()
        assert not result.corruptions, f"{state.what}: {result.messages[:3]}"
        wrong = oracle_at([m for m in state.marks if m[0] != "done"], base).wrong(contents(node))
        assert not wrong, f"{state.what}: {wrong}"
    finally:
        opening.close_chain(node)


def each(
    log: Log, folder: Path, base: bytearray, seed: int, every: int = 1, name: str = "vm.qcow2"
) -> int:
    """Verify every state; a few by qemu-img, too. Returns how many there were."""
    count = 0
    for count, state in enumerate(states(log, seed, SAMPLES, every), 1):
        verify(state, folder, base, name)
        if count % 150 == 0:
            done = subprocess.run(
                ["qemu-img", "check", str(folder / name)], capture_output=True, text=True
            )
            assert done.returncode in (0, 3), f"{state.what}: {done.stdout}{done.stderr}"
    return count


def recorded(
    folder: Path,
    options: dict[str, str],
    work: Callable[[Disk, Log], None],
    name: str = "vm.qcow2",
) -> tuple[Log, bytearray, Path]:
    """A log of `work` on an overlay with a base, the base's bytes, and a folder for states."""
    run, spare = folder / "run", folder / "states"
    run.mkdir()
    spare.mkdir()
    base = make_base(run, SIZE)
    path = overlay(run, name, "base.raw", "raw", SIZE, **options)
    disk = Disk(opening.open_image(str(path)), "vm")
    with Log(run) as log:
        work(disk, log)
    opening.close_chain(disk.root)
    return log, base, spare


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": "4k"},
        {"cluster_size": "512"},
        {"cluster_size": "64k"},
        {"compat": "0.10", "cluster_size": "4k"},
        {"extended_l2": "on", "cluster_size": "16k"},
        {"refcount_bits": "1", "cluster_size": "1k"},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_Q1_Q2_N1_N2_no_crash_corrupts_or_loses_what_was_flushed(
    tmp_path: Path, options: dict[str, str]
) -> None:
    need("qemu-img")
    log, base, spare = recorded(
        tmp_path, options, lambda disk, log: churn(disk, log, random.Random(3), 40)
    )
    each(log, spare, base, 1, every=max(len(log.entries) // (2000 if SOAK else 60), 1))


def test_Q6_a_torn_change_of_the_backing_file_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    def work(disk: Disk, log: Log) -> None:
        for name in ("base.raw", "./base.raw", "././base.raw", "base.raw"):
            disk.root.set_backing(name, "raw")
        disk.root.set_backing(None, None)
        log.mark(("done", 0, b""))

    log, _, spare = recorded(tmp_path, {}, work)
    seen = set()
    for state in states(log, 1, 20):
        put(state, spare)
        node = opening.open_image(str(spare / "vm.qcow2"), read_only=True)
        seen.add(node.backing_spec)
        assert (node.backing is None) == (node.backing_spec is None)
        if state.marks:
            assert node.backing_spec is None, "done, and it still has a backing file"
        opening.close_chain(node)
    assert len(seen) == 4


def stream_under_writes(base_name: str | None = None) -> Callable[[Disk, Log], None]:
    """The steps of a stream with guest writes between them, to its very end."""

    def work(disk: Disk, log: Log) -> None:
        rnd = random.Random(9)
        job = Stream(disk, chunk=64 << 10)
        old = disk.root.backing
        for _ in job.run():
            churn(disk, log, rnd, 3)
        job.prepare()
        log.mark(("done", 0, b""))
        churn(disk, log, rnd, 5)
        opening.close_chain(old)

    return work


@pytest.mark.parametrize("cluster", ["4k", "64k"])
def test_ST1_to_ST4_every_crash_of_a_stream_leaves_the_right_bytes(
    tmp_path: Path, cluster: str
) -> None:
    need("qemu-img")
    log, base, spare = recorded(tmp_path, {"cluster_size": cluster}, stream_under_writes())
    every = max(len(log.entries) // (3000 if SOAK else 80), 1)
    again = 0
    for number, state in enumerate(states(log, 2, SAMPLES, every)):
        done = any(m[0] == "done" for m in state.marks)
        if done:  # ST2: the event is true after a power cut: the base is not needed
            state.files.pop(str(tmp_path / "run" / "base.raw"))
            (spare / "base.raw").unlink(missing_ok=True)
        verify(state, spare, base)
        if not done and number % 40 == 0:  # ST3: stream again, and it completes
            again += 1
            before = contents_of(spare / "vm.qcow2")
            disk = Disk(opening.open_image(str(spare / "vm.qcow2")), "vm")
            old = disk.root.backing
            job = Stream(disk)
            for _ in job.run():
                pass
            job.prepare()
            opening.close_chain(disk.root)
            opening.close_chain(old)
            (spare / "base.raw").unlink()
            assert not differs(contents_of(spare / "vm.qcow2"), before)
    assert again


def contents_of(path: Path) -> bytearray:
    """All bytes of an image, opened and closed."""
    node = opening.open_image(str(path), read_only=True)
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


@pytest.mark.parametrize("skipped", range(4))
def test_the_crash_test_notices_a_missing_flush(
    tmp_path: Path, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard of the guard: with every fourth fdatasync left out, some state must be wrong."""
    plain = sysio.fdatasync
    calls = [0]

    def forgetful(fd: int) -> None:
        calls[0] += 1
        if calls[0] % 4 != skipped:
            plain(fd)

    monkeypatch.setattr(sysio, "fdatasync", forgetful)
    log, base, spare = recorded(
        tmp_path, {"cluster_size": "4k"}, lambda disk, log: churn(disk, log, random.Random(3), 60)
    )
    monkeypatch.setattr(sysio, "fdatasync", plain)
    with pytest.raises((AssertionError, OSError, CowferryError)):
        for state in states(log, 1, 12, every=3):
            verify(state, spare, base)


def test_N6_a_failed_flush_is_sticky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(tmp_path, SIZE)
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "vm.qcow2")), "vm")
    disk.pwrite(memoryview(b"x" * 4096), 0)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "fdatasync", broken)
        with pytest.raises(OSError):
            disk.flush()
    for _ in range(2):  # the disk is well again, and still no flush may claim to have worked
        with pytest.raises(OSError) as error:
            disk.flush()
        assert error.value.errno == errno.EIO
    with pytest.raises(OSError):
        opening.close_chain(disk.root)
