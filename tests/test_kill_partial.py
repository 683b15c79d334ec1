"""Use case 2c of the discussion of 2011, killed: a guest on a raw image that is being filled.

The daemon is killed with SIGKILL twenty times in mid-stream, with fio writing and verifying over
NBD, and is started again each time, by nothing but the name of the raw file; the stream is started
again, and goes on. What fio had flushed is verified after each kill, and all of it at the end, by
fio and byte by byte; then the base is not needed any more.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from chains import differs, make_base
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.drivers.partial import ATTRIBUTE, FILLING, Partial
from fio import TICK, fio, need_fio, report
from killing import KILLS as STATE_KILLS
from killing import PATIENCE, Rig, Talk
from killing import SIZE as SECTORS
from nursery import Nursery
from test_kill_jobs import (
    Operation,
    at_full_speed,
    cancelling,
    concluded,
    finalizing,
    paused,
    pending,
    running,
)

KILLS = 20 if os.environ.get("COWFERRY_SOAK") is None else 200
SIZE = 24 << 20
PART = 512 << 10  # bytes of the disk, written once by fio in one life
PARTS = 20
STORM = 2 << 20  # bytes at the end of the disk, written by another fio when the daemon is killed
SLOWLY = 256 << 10  # bytes a second: the stream is not at its end before the last kill
# In this order: nothing is left to do after some of them, and a new image is made after the last.
STATES = (running, paused, cancelling, at_full_speed, pending, finalizing, concluded)
ROUNDS = -(-STATE_KILLS // 3)


def a_partial(folder: Path, size: int, **options: Any) -> tuple[Path, bytearray]:
    """`vm.raw`, to be filled from `base.raw`, and its bytes."""
    oracle = make_base(folder, size)
    path = folder / "vm.raw"
    options |= {"backing_file": "base.raw", "backing_fmt": "raw"}
    opening.create_image(str(path), "raw", size, options)
    return path, oracle


def part(number: int, uri: str) -> list[str]:
    """fio's job on one part of the disk: every byte of it, in random order."""
    return [
        f"name=part{number}", "ioengine=nbd", f"uri={uri}", "rw=randwrite", "bs=4k", "iodepth=8",
        f"offset={number * PART}", f"size={PART}", f"randseed={number + 1}", "verify=crc32c",
        "verify_fatal=1", "do_verify=1", "end_fsync=1",
    ]  # fmt: skip


def storm(uri: str) -> list[str]:
    """And on the last of it, until the daemon is gone."""
    return [
        "name=storm", "ioengine=nbd", f"uri={uri}", "rw=randwrite", "bsrange=512-128k",
        "bs_unaligned=1", f"offset={SIZE - STORM}", f"size={STORM}", "iodepth=8", "loops=1000000",
        "verify=crc32c", "verify_fatal=1", "rate=20m",
    ]  # fmt: skip


def done(folder: Path, jobs: list[list[str]]) -> None:
    """Let fio do these jobs to their end, one after another, and find nothing wrong."""
    working = fio(folder, [[*job, "stonewall"] for job in jobs])
    said, _ = working.communicate(timeout=PATIENCE)
    told = report(folder)
    assert working.returncode == 0 and not any(job["error"] for job in told.values()), said
    assert all(job["read"]["io_bytes"] == PART for job in told.values()), said


def served(uri: str) -> bytearray:
    """All bytes of a disk, as its export shows them."""
    with NbdClient(uri) as client:
        return bytearray().join(client.pread(PART, at) for at in range(0, SIZE, PART))


def storms(uri: str, running: subprocess.Popen[str]) -> None:
    """Wait until fio writes there."""
    with NbdClient(uri) as client:
        before = client.pread(STORM, SIZE - STORM)
        end = time.monotonic() + PATIENCE
        while client.pread(STORM, SIZE - STORM) == before:
            assert running.poll() is None and time.monotonic() < end, "fio does not write"
            time.sleep(TICK)


def test_use_case_2_under_fio_killed_twenty_times(tmp_path: Path) -> None:
    need_fio()
    path, base = a_partial(tmp_path, SIZE)
    run = Path(tempfile.mkdtemp(prefix="cf-"))
    other = tmp_path / "storm"
    other.mkdir()
    held = []
    with Nursery(tmp_path) as nursery:
        for life in range(KILLS):
            child = nursery.serve(run, vm=path)
            talk, uri = Talk(child.qmp), child.uris["vm"]
            talk("block-stream", device="vm", speed=SLOWLY)
            raging = fio(other, [storm(uri)])
            try:
                storms(uri, raging)
                before = [[*part(life % PARTS - 1, uri), "verify_only=1"]] if life % PARTS else []
                done(tmp_path, [*before, part(life % PARTS, uri)])
                (job,) = talk("query-block-jobs")
                assert job["type"] == "stream" and job["status"] == "running"
            finally:
                child.kill()
                talk.client.close()
                raging.kill()
                raging.communicate(timeout=PATIENCE)
            node = opening.open_image(str(path), read_only=True)
            assert isinstance(node, Partial), "it was filled too soon"
            held.append(node.held)
            opening.close_chain(node)
        assert held == sorted(held) and held[-1] > held[0] + KILLS * PART // 2, "it begins anew"
        child = nursery.serve(run, vm=path)
        talk, uri = Talk(child.qmp), child.uris["vm"]
        try:
            talk("block-stream", device="vm")
            talk.until("BLOCK_JOB_COMPLETED", device="vm")
            (tmp_path / "base.raw").unlink()
            done(tmp_path, [[*part(n, uri), "verify_only=1"] for n in range(min(KILLS, PARTS))])
            live = served(uri)
            untouched = slice(min(KILLS, PARTS) * PART, SIZE - STORM)
            assert not differs(live[untouched], base[untouched])
        finally:
            child.kill()
            talk.client.close()
    assert not filling_of(path).exists() and ATTRIBUTE not in os.listxattr(path)
    assert not differs(path.read_bytes(), live)


class Filling(Operation):
    """A stream into the raw image. Once it is complete, it is the base of another one."""

    def start(self, talk: Talk, **common: Any) -> None:
        talk("block-stream", device="vm", **common)

    def check(self) -> None:
        assert len(self.rig.drives["vm"].chain) == 1

    def renew(self, path: Path) -> None:
        base = self.rig.file("base", "raw")
        opening.close_chain(opening.open_image(str(path)))  # who was killed a moment after the end
        assert not filling_of(path).exists() and ATTRIBUTE not in os.listxattr(path)
        path.rename(base)
        given = {"backing_file": base.name, "backing_fmt": "raw", "granularity": 4096}
        opening.create_image(str(path), "raw", SECTORS, given)


def test_killed_in_every_state_of_filling_it(tmp_path: Path) -> None:
    path, _ = a_partial(tmp_path, SECTORS, granularity=4096)
    complete = set()
    with Nursery(tmp_path) as nursery, Rig(nursery, tmp_path, 5) as rig:
        rig.add("vm", path)
        op = Filling(rig)
        for state in STATES * ROUNDS:
            rig.round(partial(state, op))
            if rig.completed:
                op.check()
            if len(rig.drives["vm"].chain) == 1:
                complete.add(state)
                op.renew(path)
    assert concluded in complete


def filling_of(path: Path) -> Path:
    return path.with_name(path.name + FILLING)
