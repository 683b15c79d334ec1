"""Streams: where layers differ in size, how they fail, and what guests see meanwhile."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base, overlay, overlay_disk
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.node import State, chain
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.exports.nbd import NbdExport, NbdServer
from cowferry.jobs.job import Jobs
from cowferry.jobs.stream import Stream
from tests_support import need

SIZE = 4 << 20


def run(job: Stream) -> None:
    """All of a job, by hand."""
    for _ in job.run():
        pass
    job.prepare()


@pytest.mark.parametrize(
    "options", [{}, {"compat": "0.10"}, {"cluster_size": "16k", "extended_l2": "on"}]
)
def test_ST1_where_a_middle_layer_ends_the_base_must_not_shine_through(
    tmp_path: Path, options: dict[str, str]
) -> None:
    (tmp_path / "base.raw").write_bytes(random.Random(1).randbytes(500 << 10))
    overlay(tmp_path, "sn1.qcow2", "base.raw", "raw", 172 << 10)
    path = overlay(tmp_path, "vm.qcow2", "sn1.qcow2", "qcow2", 461 << 10, **options)
    disk = Disk(opening.open_image(str(path)))
    want = contents(disk)
    nodes = list(chain(disk.root))
    run(Stream(disk, nodes[2], backing=("base.raw", "raw")))
    assert disk.root.backing is nodes[2]
    assert not differs(contents(disk), want)
    for node in nodes:
        node.close()
    again = opening.open_image(str(path), read_only=True)
    assert len(list(chain(again))) == 2
    assert not differs(contents(again), want)
    opening.close_chain(again)


def test_only_what_lies_above_the_base_is_copied(tmp_path: Path) -> None:
    oracle = make_base(tmp_path, SIZE)
    sn1 = overlay(tmp_path, "sn1.qcow2", "base.raw", "raw", SIZE)
    node = opening.open_image(str(sn1))
    node.pwrite(memoryview(b"x" * 65536), 1 << 20)
    oracle[1 << 20 : (1 << 20) + 65536] = b"x" * 65536
    opening.close_chain(node)
    path = overlay(tmp_path, "vm.qcow2", "sn1.qcow2", "qcow2", SIZE)
    disk = Disk(opening.open_image(str(path)))
    nodes = list(chain(disk.root))
    run(Stream(disk, nodes[2], backing=("base.raw", "raw")))
    held = sum(e.length for e in disk.root.extents(0, SIZE) if e.state is State.DATA)
    assert held == 65536
    assert not differs(contents(disk), oracle)
    for node in nodes:
        node.close()


def test_ST3_a_stream_cancelled_half_way_goes_on_where_it_stopped(tmp_path: Path) -> None:
    disk, oracle = overlay_disk(tmp_path, SIZE)
    base = disk.root.backing
    first = Stream(disk, chunk=512 << 10)
    steps = iter(first.run())
    for _ in range(4):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert disk.root.backing is base, "a cancelled stream keeps its backing file"
    again = Stream(disk, chunk=512 << 10)
    moved = sum(p.moved for p in again.run())
    assert moved == sum(e.length for e in _data(base, 2 << 20)), "it copied something twice"
    again.prepare()
    opening.close_chain(base)
    (tmp_path / "base.raw").unlink()
    assert not differs(contents(disk), oracle)
    disk.root.close()


@pytest.mark.parametrize("name", ["vm.raw", "vm.qcow2", "vm.qed"])
def test_ST3_a_kill_costs_a_second_of_work(tmp_path: Path, name: str) -> None:
    """What the files say at each step is what somebody finds who is killed there."""
    chunk, now = 256 << 10, 0.0
    make_base(tmp_path, SIZE)
    path = tmp_path / name
    options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    opening.create_image(str(path), path.suffix[1:], SIZE, options)
    disk = Disk(opening.open_image(str(path)), "vm")
    job = Stream(disk, chunk=chunk, clock=lambda: now)
    found = tmp_path / "found"
    done, lost = 0, []
    for step in job.run():
        done += step.moved
        now += 0.4
        found.mkdir()
        (found / "base.raw").symlink_to(tmp_path / "base.raw")
        for file in tmp_path.glob("vm.*"):
            shutil.copy2(file, found)
        node = opening.open_image(str(found / name), read_only=True)
        lost.append(done - sum(e.length for e in node.extents(0, SIZE) if e.state is State.DATA))
        opening.close_chain(node)
        shutil.rmtree(found)
    assert max(lost) == 3 * chunk, "no more than a second, and no flush for each chunk"
    opening.close_chain(disk.root)


def _data(node: Any, start: int) -> Iterator[Any]:
    return (e for e in node.extents(start, SIZE - start) if e.state is State.DATA)


@pytest.mark.parametrize("policy", ["report", "stop", "enospc"])
def test_E1_E2_a_full_disk_in_mid_stream(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mount", "umount")
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "small", str(folder)])
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        oracle = make_base(tmp_path, SIZE)
        path = overlay(folder, "vm.qcow2", str(tmp_path / "base.raw"), "raw", SIZE)
        disk = Disk(opening.open_image(str(path)), "vm")
        base = disk.root.backing
        filler = folder / "filler"
        filler.write_bytes(bytes(1 << 20))
        jobs = Jobs(lambda name, data: None)
        job = Stream(disk, chunk=256 << 10, on_error=policy, auto_dismiss=False)
        jobs.start(job, "s")
        if policy == "report":
            assert job.wait(30)
            assert job.error == os.strerror(errno.ENOSPC)
            assert disk.root.backing is base
        else:
            with job.changed:
                assert job.changed.wait_for(lambda: job.status.value == "paused", 30)
            assert job.query_block()["io-status"] == "nospace"
            assert not differs(contents(disk), oracle)
            filler.unlink()
            subprocess.run(["mount", "-o", "remount,size=12m", str(folder)], check=True)
            job.resume()
            assert job.wait(30)
            assert job.error is None
            assert disk.root.backing is None
        assert not differs(contents(disk), oracle)
        if policy == "report":  # room for the tables of the closing flush
            filler.unlink()
        disk.root.close()
        opening.close_chain(base)
        checked = opening.open_image(str(path), read_only=True)
        assert not checked.check().corruptions  # type: ignore[attr-defined]
        assert not differs(contents(checked), oracle)
        opening.close_chain(checked)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_chain_two_hundred_deep_is_served_and_streamed(tmp_path: Path) -> None:
    size = 1 << 20
    oracle = make_base(tmp_path, size)
    below, format = "base.raw", "raw"
    rnd = random.Random(6)
    for n in range(200):
        path = overlay(tmp_path, f"sn{n}.qcow2", below, format, size, cluster_size="4k")
        node = opening.open_image(str(path), backing=False)
        offset = rnd.randrange(size // 4096) * 4096
        data = rnd.randbytes(4096)
        node.pwrite(memoryview(data), offset)
        oracle[offset : offset + 4096] = data
        node.close()
        below, format = path.name, "qcow2"
    disk = Disk(opening.open_image(str(path)))
    assert not differs(contents(disk), oracle)
    old = disk.root.backing
    run(Stream(disk))
    opening.close_chain(old)
    assert not differs(contents(disk), oracle)
    disk.root.close()


def test_a_stream_by_reflink_moves_no_bytes(tmp_path: Path) -> None:
    need("mkfs.xfs", "mount")
    image, mount = tmp_path / "fs", tmp_path / "mnt"
    mount.mkdir()
    with open(image, "wb") as f:
        f.truncate(400 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)]).returncode:
        pytest.skip("mounting needs root and loop devices")
    try:
        disk, oracle = overlay_disk(mount, SIZE)
        base = disk.root.backing
        job = Stream(disk)
        run(job)
        assert job.work.copier.cloned >= 3 << 20
        assert job.work.copier.moved == 0
        opening.close_chain(base)
        assert not differs(contents(disk), oracle)
        disk.root.close()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def test_peers_see_a_right_disk_while_a_stream_runs(tmp_path: Path) -> None:
    need("nbdinfo", "nbdcopy", "qemu-img", "fio")
    size = 64 << 20
    oracle = make_base(tmp_path, size)
    for name in ("a", "b"):
        overlay(tmp_path, f"{name}.qcow2", "base.raw", "raw", size)
    disks = {n: Disk(opening.open_image(str(tmp_path / f"{n}.qcow2")), n) for n in ("a", "b")}
    bases = [d.root.backing for d in disks.values()]
    server = NbdServer()
    server.listen_unix(str(tmp_path / "nbd.sock"))
    for name, disk in disks.items():
        server.add(NbdExport(name, disk))
    jobs = Jobs(lambda name, data: None)
    streams = [Stream(d, speed=24 << 20, auto_dismiss=False) for d in disks.values()]
    for name, job in zip(disks, streams, strict=True):
        jobs.start(job, name)
    try:
        uri = server.uri("a")
        for _ in range(3):
            done = subprocess.run(["nbdinfo", "--map", uri], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            out = tmp_path / "copy.raw"
            subprocess.run(["nbdcopy", uri, str(out)], check=True, timeout=60)
            assert not differs(out.read_bytes(), oracle)
        fio = subprocess.run(
            ["fio", "--name=v", "--ioengine=nbd", f"--uri={server.uri('b')}", "--rw=randrw",
             "--bsrange=512-64k", "--numjobs=4", "--iodepth=8", "--size=12m",
             "--offset_increment=16m", "--verify=crc32c", "--verify_fatal=1",
             "--verify_backlog=256", "--group_reporting"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert fio.returncode == 0, fio.stdout + fio.stderr
        client = NbdClient(server.uri("a"))
        want = oracle[5_000_000:5_100_000]
        assert client.pread(100_000, 5_000_000) == want
        client.close()
        for job in streams:
            assert job.wait(60)
            assert job.error is None
    finally:
        server.stop()
        jobs.shutdown()
    for disk, base in zip(disks.values(), bases, strict=True):
        disk.root.close()
        opening.close_chain(base)
        path = tmp_path / f"{disk.name}.qcow2"
        subprocess.run(["qemu-img", "check", str(path)], check=True, capture_output=True)
    (tmp_path / "base.raw").unlink()
    node = opening.open_image(str(tmp_path / "a.qcow2"), read_only=True)
    assert not differs(contents(node), oracle)
    node.close()


def test_a_read_error_of_the_base_fails_the_job_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, oracle = overlay_disk(tmp_path, SIZE)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "copy_range", broken)
        patch.setattr(sysio, "clone", broken)
        job = Stream(disk, auto_dismiss=False)
        Jobs(lambda name, data: None).start(job, "s")
        assert job.wait(30)
    assert job.error == "Input/output error"
    assert disk.root.backing is not None
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)
    node = opening.open_image(str(tmp_path / "vm.qcow2"), read_only=True)
    result = node.check()  # type: ignore[attr-defined]
    assert not result.corruptions and not result.leaks, "room was not given back"
    opening.close_chain(node)
    shutil.rmtree(tmp_path)
