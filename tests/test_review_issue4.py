"""What a review of the core of issue 4 found, each as the sequence that showed it."""

from __future__ import annotations

import errno
import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowferry.block import keeper, unfinished
from cowferry.block.bitmap import Bitmap
from cowferry.block.copy import Copier
from cowferry.block.disk import Disk
from cowferry.block.limits import Group, Limits
from cowferry.block.node import Node, chain
from cowferry.block.throttle import WRITE
from cowferry.drivers import opening
from cowferry.drivers.raw import Raw
from cowferry.drivers.throttle import Throttle
from cowferry.errors import CowferryError
from cowferry.jobs import job as jobs
from cowferry.jobs.backup import Backup
from cowferry.jobs.ending import Ending, finish
from cowferry.jobs.job import Job, Jobs
from cowferry.jobs.mirror import Mirror
from daemons import PATIENCE, a_daemon
from nbd_servers import bytes_of, empty, nbdkit, node_of, qemu_nbd, until, view
from orders import Other, failing, held_back, on_call
from tests_support import need

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * 64 * KIB + 512


# D2: a drain is short, however large the disk is --------------------------------------------


@pytest.mark.parametrize("to", [512 << n for n in range(14)])
@pytest.mark.parametrize("of", [512, 4 * KIB, 64 * KIB, 4 * MIB])
def test_B2_merged_into_any_granularity_no_bit_is_lost_and_none_is_made_up(
    of: int, to: int
) -> None:
    size = 37 * MIB + 3 * 512
    source, target = Bitmap("a", size, of), Bitmap("b", size, to)
    order = random.Random(of + to)
    for _ in range(20):
        source.set(order.randrange(size), 1)
    source.set(size - 1, 1)
    target.merge(source)
    want = Bitmap("c", size, to)
    for offset, length in source.runs():
        want.set(offset, length)
    assert target.bits == want.bits and target.ones == want.ones


# D2: who is called off does not wait for ever ------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A raw disk full of data, whose size is a multiple of nothing."""
    path = tmp_path / "vm.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    disk = Disk(opening.open_image(str(path), "raw"), "vm")
    yield disk
    disk.root.close()


def new(folder: Path, format: str) -> Node:
    path = str(folder / f"target.{format}")
    opening.create_image(path, format, SIZE, {})
    return opening.open_image(path, format)


@pytest.mark.parametrize("kind", ["backup", "mirror"])
def test_D2_a_job_is_called_off_though_its_server_answers_no_more(
    disk: Disk, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("nbdkit")
    monkeypatch.setattr(jobs, "GRACE", 0.05)
    server = nbdkit(tmp_path / "s", "--filter=delay", "memory", str(SIZE), "delay-write=1000")
    with server:
        target = node_of(tmp_path / "s")
        job: Job = (
            Backup(disk, Disk(target, "t"), auto_dismiss=False)
            if kind == "backup"
            else Mirror(disk, target, auto_dismiss=False)
        )
        Jobs(lambda name, data: None).start(job, "j")
        until(lambda: target._link is not None and target._link._calls)
        job.cancel()
        assert job.wait(PATIENCE), "it waits for its server"
        assert job.cancelled
        with disk.exclusive():  # and nobody else does
            pass
        target.close()


def test_D2_a_backup_is_called_off_while_it_waits_for_its_targets_limits(
    disk: Disk, tmp_path: Path
) -> None:
    target = Disk(new(tmp_path, "raw"), "t")
    group = Group("slow", Limits.of({"bps": 1}))
    target.limit(group)
    target.wait(WRITE, MIB)  # passes at once, and holds up the next for days
    job = Backup(disk, target, auto_dismiss=False)
    Jobs(lambda name, data: None).start(job, "j")
    limits = target.limits
    assert limits is not None
    until(lambda: limits.waiting)
    job.cancel()
    assert job.wait(PATIENCE), "it waits for its turn"
    assert job.cancelled and not limits.waiting
    target.root.close()


def test_K2_a_guest_is_not_failed_for_a_backup_that_is_called_off(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old bytes can be saved nowhere, and nobody wants them any more."""
    target = new(tmp_path, "raw")
    job = Backup(disk, Disk(target, "t"))
    with disk.exclusive():
        job.attach()
    monkeypatch.setattr(job.spill, "put", lambda *_: failing(errno.ENOSPC)())
    for call in range(2):
        on_call(monkeypatch, target, "pwrite", failing(errno.EIO))
        if call:
            job.cancelling = True
            disk.pwrite(memoryview(b"new"), 0)
        else:
            with pytest.raises(OSError, match="Input/output"):
                disk.pwrite(memoryview(b"new"), 0)
    job.clean()
    target.close()


# B3: a backup that has lost its moment does not end well --------------------------------------


@pytest.mark.parametrize("lost", ["before", "after"])
def test_B3_a_moment_that_is_lost_before_it_suffices_is_lost(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Between two looks of the job; and when nobody reads any more it is no matter."""
    bitmap = Bitmap("b0", SIZE)
    bitmap.set(0, SIZE)
    with disk.exclusive():
        disk.root.bitmaps["b0"] = bitmap
    root = new(tmp_path, "qcow2")
    root.backing = disk.root
    job = Backup(
        disk, Disk(root, "t"), everything=False, bitmap=bitmap, on_cbw_error="break-snapshot"
    )
    steps = job.run()
    next(steps)
    on_call(monkeypatch, root, "pwrite", failing(errno.ENOSPC))
    if lost == "before":
        disk.pwrite(memoryview(b"new"), 0)
        job.suffice()
        with pytest.raises(OSError, match="broken"):
            next(steps)
    else:
        job.suffice()
        disk.pwrite(memoryview(b"new"), 0)
        assert next(steps, None) is None
        finish([job])
    job.clean()
    assert list(bitmap.runs()) == [(0, SIZE if lost == "before" else 64 * KIB)]
    root.backing = None
    root.close()


# B2: what was cut off and is there again, as zeroes, has changed --------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_B2_a_disk_that_shrank_and_grew_has_changed_there(disk: Disk, persistent: bool) -> None:
    bitmap = Bitmap("b0", SIZE)
    with disk.exclusive():
        if persistent:
            keeper.keep(disk.root, bitmap)
        else:
            disk.root.bitmaps["b0"] = bitmap
    small = 64 * KIB + 512
    disk.resize(small)
    if persistent:  # and it is remembered
        disk.root.close()
        disk = Disk(opening.open_image(disk.root.filename, "raw"), "vm")
    disk.resize(SIZE)
    there = bytearray(SIZE)
    disk.pread(memoryview(there), 0)
    assert not any(there[small:])
    assert list(disk.root.bitmaps["b0"].runs()) == [(64 * KIB, SIZE - 64 * KIB)]
    disk.root.close()


# Limits: what waits for a server is known as such through a filter -----------------------------


def test_a_server_below_a_filter_is_far(tmp_path: Path) -> None:
    need("nbdkit")
    with nbdkit(tmp_path / "s", "memory", str(SIZE)):
        disk = Disk(Throttle(Raw(node_of(tmp_path / "s"), 0, None), "g"), "vm")
        assert disk.may_wait(0, 512), "a guest's reader would wait for the server itself"
        disk.root.close()


# N2: what was durable is not undone by what is sent again ----------------------------------------


def test_N2_an_older_write_that_is_sent_again_does_not_lie_over_one_with_FUA(
    tmp_path: Path,
) -> None:
    need("qemu-nbd")
    image = empty(tmp_path / "t.raw")
    with qemu_nbd(tmp_path / "s", image):
        node = node_of(tmp_path / "s", reconnect_delay=60)
        node.pwrite(view(b"older"), 0)
        node.pwrite(view(b"newer"), 0, fua=True)
    (tmp_path / "s").unlink(missing_ok=True)
    with qemu_nbd(tmp_path / "s", image):
        node.pwrite(view(b"other"), 512)  # the connection is made anew
        node.flush()
        assert bytes_of(node, 0, 5) == b"newer"
        node.close()


# B2: a bitmap that changes while a job writes its node ------------------------------------------


def test_B2_a_bitmap_of_a_base_is_not_cleared_between_a_commits_mark_and_its_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into places that the base has already the commit writes without holding up guests; who
    clears a bitmap waits for it all the same."""
    paths = [str(tmp_path / name) for name in ("base.raw", "mid.qcow2", "top.qcow2")]
    Path(paths[0]).write_bytes(bytes([1]) * MIB)
    for below, path in itertools.pairwise(paths):
        spec = {"backing_file": below, "backing_fmt": below.rsplit(".")[-1]}
        opening.create_image(path, "qcow2", MIB, spec)
    mid = opening.open_image(paths[1])
    mid.pwrite(memoryview(bytes([2]) * MIB), 0)
    opening.close_chain(mid)
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", paths[2])
        base = list(chain(disk.root))[2]
        named = {"node": base.name, "name": "b0"}
        daemon.execute("block-dirty-bitmap-add", named)
        waits, orders = threading.Event(), []
        held_back(monkeypatch, disk.gate, waits)
        fill = Copier.fill

        def filling(*given: Any) -> None:
            other = Other(lambda: daemon.execute("block-dirty-bitmap-clear", named))
            until(lambda: waits.is_set() or not other.is_alive())
            orders.append((other, other.is_alive()))
            fill(*given)

        monkeypatch.setattr(Copier, "fill", filling)
        daemon.execute(
            "block-commit", {"device": "vm", "job-id": "j", "top": paths[1], "base": paths[0]}
        )
        until(lambda: daemon.jobs.get("j") is None)
        assert orders and all(waited for _, waited in orders)
        for other, _ in orders:
            other.end()
        assert not any(base.bitmaps["b0"].runs())


# An unfinished copy is gone on with in the file that it was, and in no other ----------------------


def test_a_new_file_with_the_inode_of_an_unfinished_copy_is_not_taken_for_it(
    disk: Disk, tmp_path: Path
) -> None:
    """ext4 gives the number of a file that was removed to the next one that is made, most often."""
    target = tmp_path / "target.raw"
    empty(target, SIZE)
    unfinished.begin(disk, str(target))
    found = unfinished.find(disk, str(target))
    assert found is not None and found.resumed
    target.unlink()
    empty(target, SIZE)
    with pytest.raises(CowferryError, match="another image"):
        unfinished.find(disk, str(target))


# D2: who drains both disks of a backup, and a guest that is on its way from one to the other ------


class Both(Ending):
    """What changes something of a backup's source and its target, at one moment."""

    def __init__(self, *disks: Disk) -> None:
        self.disks = disks

    def drains(self) -> list[Disk]:
        return [*self.disks]


@pytest.mark.parametrize("everything", [True, False])
def test_D2_a_drain_of_source_and_target_does_not_meet_a_guest_between_them(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    """The guest is inside its range of the source, and is about to enter the target's."""
    root = new(tmp_path, "qcow2")
    root.backing = None if everything else disk.root
    job = Backup(disk, Disk(root, "t"), everything=everything)
    with disk.exclusive():
        job.attach()
    monkeypatch.setattr(job.spill, "put", lambda *_: failing(errno.ENOSPC)())
    waits, drains = threading.Event(), []
    for one in (disk, job.target):
        held_back(monkeypatch, one.gate, waits, whole=True)

    def drain() -> None:
        drains.append(Other(lambda: finish([Both(job.target, disk)])))
        assert waits.wait(PATIENCE)

    on_call(monkeypatch, job, "_put", drain)
    Other(lambda: disk.pwrite(memoryview(b"new"), 0)).end()
    drains[0].end()
    job.clean()
    root.backing = None
    root.close()


def test_a_backup_and_a_bitmap_of_its_target_begin_in_one_transaction(tmp_path: Path) -> None:
    """Both need the target to stand still."""
    (tmp_path / "vm.raw").write_bytes(bytes(SIZE))
    new(tmp_path, "qcow2").close()
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", str(tmp_path / "vm.raw"))
        file = {"driver": "file", "filename": str(tmp_path / "target.qcow2")}
        daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "t", "file": file})
        backup = {"device": "vm", "job-id": "j", "target": "t", "sync": "none"}
        actions = [
            {"type": "blockdev-backup", "data": backup},
            {"type": "block-dirty-bitmap-add", "data": {"node": "t", "name": "b0"}},
        ]
        daemon.execute("transaction", {"actions": actions})
        disk.pwrite(memoryview(b"x"), 0)
        assert list(daemon.graph.nodes["t"].bitmaps["b0"].runs()) == [(0, 64 * KIB)]
        daemon.execute("block-job-cancel", {"device": "j"})
        until(lambda: daemon.jobs.get("j") is None)
