"""One NBD request must not stall the others: large changes, status of fragmented disks, waiting."""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from chains import contents, differs
from cowferry.block import disk as disks
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.lane import SLOW, Lane
from cowferry.block.node import Extent, Node, cached
from cowferry.drivers import making, opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.exports import nbd_lane
from cowferry.exports.nbd import NbdExport, NbdServer
from cowferry.wire import nbd
from daemons import PATIENCE, a_daemon
from nbd_servers import program, qemu_nbd, until
from tests_support import need
from tracking import Tracker

MIB = 1 << 20
CLUSTER = 64 << 10
BASE = ("base:allocation",)


@contextmanager
def serving(folder: Path, format: str, size: int) -> Iterator[tuple[Disk, str]]:
    """A new disk of that format, exported as "d"; the disk and its URI."""
    path = folder / f"disk.{format}"
    if not path.exists():
        making.create_image(str(path), format, size, {})
    server = NbdServer()
    node = opening.open_image(str(path), format)
    disk = Disk(node, "d")
    try:
        server.add(NbdExport("d", disk, name="d"))
        server.listen_unix(str(folder / "s"))
        yield disk, f"nbd+unix:///d?socket={folder / 's'}"
    finally:
        server.stop()
        node.close()


class Watcher:
    """A tap: it sees each change before it happens, and may take its time."""

    holds: Bitmap | None = None
    slow = True

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.stop_at = 0  # so many changes pass, and the next one waits ...
        self.stopped = threading.Event()  # ... and says so ...
        self.go_on = threading.Event()  # ... until this is set

    def before(self, offset: int, length: int) -> None:
        self.seen.append((offset, length))
        if self.stop_at and len(self.seen) > self.stop_at:
            self.stopped.set()
            assert self.go_on.wait(PATIENCE)

    def after(self, offset: int, length: int, data: memoryview | None) -> None: ...
    def failed(self, offset: int, length: int) -> None: ...


def watch(disk: Disk) -> Watcher:
    watcher = Watcher()
    with disk.exclusive():
        disk.taps = (watcher,)
    return watcher


# Large changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nbd.TRIM, nbd.WRITE_ZEROES])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_requests_get_in_between_the_steps_of_a_large_change(
    tmp_path: Path, format: str, kind: int
) -> None:
    size = 256 * MIB
    with serving(tmp_path, format, size) as (disk, uri):
        watcher = watch(disk)
        with NbdClient(uri) as one, NbdClient(uri) as other:
            watcher.stop_at = 3
            call = one.link.submit(kind, 0, 0, size)
            assert watcher.stopped.wait(PATIENCE)
            at, length = watcher.seen[-1]  # one step is under way
            assert length <= 8 * MIB
            assert other.pread(4096, at - 4096) == bytes(4096)  # behind it
            watcher.stop_at = 0
            other.pwrite(b"x" * 4096, size - 4096)  # before it
            assert not call.done
            watcher.go_on.set()
            one.link.wait(call)
            assert other.pread(4096, size - 4096) == bytes(4096)
        changed = Bitmap("", size, 4096)
        for at, length in watcher.seen:
            changed.set(at, length)
        assert changed.count() == size
        assert max(length for _, length in watcher.seen) <= 8 * MIB


def test_large_changes_leave_workers_to_other_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(monkeypatch, [nbd_lane.Connection])

    def pending() -> int:
        return sum(lane.pending for lane in tracker.alive(nbd_lane.Connection))

    monkeypatch.setattr(nbd_lane, "TURN", 0.0)
    monkeypatch.setattr(disks, "MOST_TAPPED", MIB)
    size = 64 * MIB
    with serving(tmp_path, "raw", size) as (disk, uri):
        watcher = watch(disk)
        before: list[int] = []
        monkeypatch.setattr(disk, "flush", lambda: before.append(len(watcher.seen)))
        with NbdClient(uri) as one, NbdClient(uri) as other:
            with disk.exclusive():  # until all have been handed over
                calls = [one.link.submit(nbd.TRIM, 0, 0, size) for _ in range(24)]
                until(lambda: pending() == 24)
                flush = other.link.submit(nbd.FLUSH, 0, 0, 0)
                until(lambda: pending() == 25)
            other.link.wait(flush)
            for call in calls:
                one.link.wait(call)
        assert len(watcher.seen) == 24 * 64
        assert before[0] < 24 * 8, "the flush waited for most of the trims"


def test_what_is_left_of_a_change_is_dropped_when_its_client_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(monkeypatch, [nbd_lane.Connection])
    monkeypatch.setattr(disks, "MOST_TAPPED", MIB)
    size = 256 * MIB
    with serving(tmp_path, "raw", size) as (disk, uri):
        watcher = watch(disk)
        watcher.stop_at = 2
        client = NbdClient(uri)
        client.link.submit(nbd.TRIM, 0, 0, size)
        assert watcher.stopped.wait(PATIENCE)
        client.abort()
        client.sock.close()
        until(lambda: all(lane.closed for lane in tracker.alive(nbd_lane.Connection)))
        watcher.go_on.set()
        until(lambda: not any(lane.pending for lane in tracker.alive(nbd_lane.Connection)))
        assert len(watcher.seen) < 10


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_changes_in_steps_change_what_one_step_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr(disks, "LEAST", CLUSTER)
    monkeypatch.setattr(disks, "MOST", 4 * CLUSTER)
    size = 40 * CLUSTER - 512 * 7
    rng = random.Random(7)
    path = tmp_path / f"d.{format}"
    making.create_image(str(path), format, size, {})
    disk = Disk(opening.open_image(str(path), format), "d")
    oracle = bytearray(rng.randbytes(size))
    disk.pwrite(memoryview(bytes(oracle)), 0)
    for _ in range(60):
        start, stop = sorted(rng.randrange(size // 512 + 1) * 512 for _ in range(2))
        start, stop = min(start, size), min(stop, size)
        if rng.random() < 0.5:
            disk.zero(start, stop - start, unmap=rng.random() < 0.5)
            oracle[start:stop] = bytes(stop - start)
        else:
            disk.discard(start, stop - start)
            after = contents(disk)[start:stop]
            for at in range(0, len(after), 512):
                part = after[at : at + 512]
                assert part in (bytes(512), oracle[start + at : start + at + 512])
            oracle[start:stop] = after
        at = rng.randrange(size // 512) * 512
        disk.pwrite(memoryview(b"w" * 512), at)
        oracle[at : at + 512] = b"w" * 512
        assert not differs(contents(disk), oracle)
    disk.root.close()


# Waiting at the gate ---------------------------------------------------------------------


def test_a_write_that_waits_for_a_job_stalls_nothing_behind_it_on_its_connection(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "qcow2", 64 * MIB) as (disk, uri), NbdClient(uri) as client:
        client.pwrite(b"d" * CLUSTER, 32 * MIB)
        slot = disk.gate.slot()
        disk.gate.enter(slot, 0, 16 * MIB)  # as a job that copies the range
        try:
            writes = [  # they allocate; more than there are workers
                client.link.submit(nbd.WRITE, 0, i * CLUSTER, 4096, bytes(4096)) for i in range(24)
            ]
            assert client.pread(4096, 32 * MIB) == b"d" * 4096
            assert client.pread(512 << 10, 32 * MIB)[:CLUSTER] == b"d" * CLUSTER  # by a worker
            assert not any(call.done for call in writes)
        finally:
            disk.gate.leave(slot)
            disk.gate.drop(slot)
        for call in writes:
            client.link.wait(call)


def test_a_write_is_done_at_once_only_if_nobody_is_in_the_way(tmp_path: Path) -> None:
    with serving(tmp_path, "qcow2", 16 * MIB) as (disk, _):
        data = memoryview(b"x" * 4096)
        contents(disk)  # leases are there, as after a lane has looked
        slot = disk.gate.slot()
        disk.gate.enter(slot, 2 * MIB, 4 * MIB)
        assert not disk.try_pwrite(data, 3 * MIB)
        assert disk.try_pwrite(data, 4 * MIB)
        disk.gate.leave(slot)
        assert disk.try_pwrite(data, 3 * MIB)
        watch(disk)  # it may take its time
        contents(disk)
        assert not disk.try_pwrite(data, 5 * MIB)
        assert not disk.gate.claims
        got = contents(disk)
        assert [at for at in range(0, len(got), 4096) if any(got[at : at + 4096])] == [
            3 * MIB,
            4 * MIB,
        ]


def overlay_over_a_cold_base(folder: Path) -> Disk:
    """A disk over an empty overlay, whose base has bytes that are not in the page cache."""
    base = folder / "base.raw"
    base.write_bytes(b"b" * 16 * MIB)
    options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    making.create_image(str(folder / "top.qcow2"), "qcow2", 16 * MIB, options)
    disk = Disk(opening.open_image(str(folder / "top.qcow2"), "qcow2"), "top")
    assert disk.root.backing is not None and disk.root.backing.file is not None
    fd = disk.root.backing.file.fd
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(fd, 8 * MIB):
        opening.close_chain(disk.root)
        pytest.skip("this file system keeps its files in memory")
    return disk


def test_a_reader_does_not_wait_for_a_cold_base(tmp_path: Path) -> None:
    disk = overlay_over_a_cold_base(tmp_path)
    data = memoryview(b"x" * 4096)
    lane = Lane(disk)
    try:
        assert lane.write(data, 8 * MIB, 4096) == SLOW
        assert not disk.try_pwrite(data, 8 * MIB)  # the rest of the cluster is to be copied
        whole = memoryview(b"w" * CLUSTER)
        assert disk.try_pwrite(whole, 4 * MIB)  # nothing is to be copied
        disk.root.pread(memoryview(bytearray(CLUSTER)), 8 * MIB)  # by somebody else
        assert disk.try_pwrite(data, 8 * MIB)
        want = bytearray(b"b" * 16 * MIB)
        want[4 * MIB : 4 * MIB + CLUSTER] = whole
        want[8 * MIB : 8 * MIB + 4096] = data
        assert not differs(contents(disk), want)
    finally:
        lane.close()
        opening.close_chain(disk.root)


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_no_flush_that_is_due_happens_inside_the_gate_or_in_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    module = importlib.import_module(f"cowferry.drivers.{format}.image")
    size = 64 * MIB if format == "qcow2" else 4 << 30
    options = {"cluster_size": "4096"} if format == "qcow2" else {"table_size": "1"}
    step = 2 * MIB if format == "qcow2" else 32 * MIB  # each table on its own
    path = tmp_path / f"disk.{format}"
    making.create_image(str(path), format, size, options)
    monkeypatch.setattr(module, "MAX_DIRTY", (16 if format == "qcow2" else 64) * 4096)
    with serving(tmp_path, format, size) as (disk, uri), NbdClient(uri) as client:
        inside: list[bool] = []
        threads: set[str] = set()
        flush = disk.root.flush

        def flushed() -> None:
            inside.append(bool(disk.gate.claims))
            threads.add(threading.current_thread().name)
            flush()

        monkeypatch.setattr(disk.root, "flush", flushed)
        for at in range(0, size // 2, step):
            client.pwrite(b"r" * 512, at)  # by the reader
        until(lambda: inside)
        for at in range(size // 2, size, step):
            disk.pwrite(memoryview(b"d" * 512), at)
        assert len(inside) > 2 and not any(inside)
        assert not any("connection" in name for name in threads)


# Block status ----------------------------------------------------------------------------


def every_other_cluster(disk: Disk, clusters: int) -> None:
    for i in range(0, clusters, 2):
        disk.pwrite(memoryview(b"x" * CLUSTER), i * CLUSTER)


def asked(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the ranges whose runs are asked of a node from now on."""
    lengths: list[int] = []
    extents = node.extents

    def counted(offset: int, length: int) -> Iterator[Extent]:
        lengths.append(length)
        return extents(offset, length)

    monkeypatch.setattr(node, "extents", counted)
    return lengths


def test_a_status_of_one_run_looks_at_little_more_than_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, "qcow2", 1 << 40) as (disk, uri), NbdClient(uri, BASE) as client:
        every_other_cluster(disk, 400)
        lengths = asked(disk.root, monkeypatch)
        for i in range(200):
            runs = client.block_status(0xFFFF0000, i * CLUSTER, nbd.CMD_REQ_ONE)
            assert runs["base:allocation"] == [(CLUSTER, 3 if i % 2 else 0)]
        assert sum(lengths) <= 200 * 3 * CLUSTER
        lengths.clear()
        runs = client.block_status(0xFFFF0000, 1 << 30, nbd.CMD_REQ_ONE)
        assert runs["base:allocation"] == [(0xFFFF0000, 3)]
        assert len(lengths) < 100  # a hole is as long as can be said, and told in one answer


def test_a_status_stops_where_the_reply_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_lane, "MAX_RUNS", 64)
    with serving(tmp_path, "qcow2", 1 << 32) as (disk, uri), NbdClient(uri, BASE) as client:
        every_other_cluster(disk, 2000)
        lengths = asked(disk.root, monkeypatch)
        runs = client.block_status(0xFFFF0000, 0)["base:allocation"]
        assert runs == [(CLUSTER, 0), (CLUSTER, 3)] * 32
        assert sum(lengths) <= 64 * 4 * CLUSTER


def test_looking_at_a_whole_image_asks_a_piece_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    making.create_image(str(path), "qcow2", 1 << 40, {})
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", str(path))
        every_other_cluster(disk, 40)
        lengths = asked(disk.root, monkeypatch)
        (tree,) = daemon.execute("x-query-tree", {"device": "vm"})
        assert tree["chain"][0]["data"] == 20 * CLUSTER
        assert sum(lengths) == 1 << 40 and max(lengths) <= 1 << 30


def test_qemu_img_maps_a_fragmented_export_as_it_maps_the_image(tmp_path: Path) -> None:
    need("qemu-img")

    def mapped(name: str, format: str) -> list[tuple[tuple[bool, bool], int]]:
        text = subprocess.check_output(["qemu-img", "map", "-f", format, "--output=json", name])
        return [
            (kind, sum(e["length"] for e in some))
            for kind, some in groupby(json.loads(text), lambda e: (e["zero"], e["data"]))
        ]

    with serving(tmp_path, "qcow2", 64 * MIB) as (disk, uri):
        every_other_cluster(disk, 500)
        disk.zero(100 * CLUSTER, 200 * CLUSTER)
        disk.flush()
        ours = mapped(uri, "raw")
    theirs = mapped(str(tmp_path / "disk.qcow2"), "qcow2")
    assert ours == theirs
    assert len(ours) == 300


# Large reads -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_large_reads_ask_nobody_where_the_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    with serving(tmp_path, format, 16 * MIB) as (disk, uri), NbdClient(uri) as client:
        data = random.Random(3).randbytes(4 * MIB)
        client.pwrite(data, 2 * MIB)
        client.pread(16 * MIB, 0)  # leases are there
        lengths = asked(disk.root, monkeypatch)
        seeks: list[int] = []
        monkeypatch.setattr(os, "lseek", lambda *a: seeks.append(a[0]))
        got = client.pread(16 * MIB, 0)
        assert client.pread(MIB, 5 * MIB) == (data + bytes(MIB))[3 * MIB : 4 * MIB]
        assert not lengths and not seeks
        assert got == bytes(2 * MIB) + data + bytes(10 * MIB)


def test_what_leases_know_to_be_zeroes_is_not_sent(tmp_path: Path) -> None:
    with serving(tmp_path, "qcow2", 16 * MIB) as (disk, _):
        disk.pwrite(memoryview(b"x" * CLUSTER), 2 * MIB)
        pieces = disk.read_pieces(MIB + 512, 4 * MIB, 4096)
        assert [n for n, _ in pieces] == [MIB - 512, CLUSTER, 3 * MIB + 512 - CLUSTER]
        assert [part is None for _, part in pieces] == [True, False, True]
        assert bytes(pieces[1][1] or b"") == b"x" * CLUSTER
        whole = disk.read_pieces(MIB, 4 * MIB, 4 * MIB + 1)
        assert [n for n, _ in whole] == [4 * MIB]  # not worth a piece of its own


# Ranges at the edges ---------------------------------------------------------------------

KINDS = {
    "read": nbd.READ, "write": nbd.WRITE, "trim": nbd.TRIM, "cache": nbd.CACHE,
    "zero": nbd.WRITE_ZEROES, "status": nbd.BLOCK_STATUS,
}  # fmt: skip
PAST = [(0, 1), (0, 512), (-512, 1024), (-1, 2), (1 << 62, 512), (-(1 << 40), 0)]


def answers(uri: str, contexts: tuple[str, ...]) -> dict[tuple[str, int, int], int]:
    """The errno of each kind of request at each range that is not all inside; 0 for none."""
    out: dict[tuple[str, int, int], int] = {}
    with NbdClient(uri, contexts) as client:
        for name, kind in KINDS.items():
            for back, length in PAST:
                offset = (client.size + back) % (1 << 64)
                if back == -(1 << 40):
                    offset, length = (1 << 64) - 512, 512
                data = bytes(length) if kind == nbd.WRITE else b""
                into = memoryview(bytearray(length)) if kind == nbd.READ else None
                try:
                    call = client.link.submit(kind, 0, offset, length, data, into=into)
                    client.link.wait(call)
                    out[name, back, length] = 0
                except OSError as error:
                    out[name, back, length] = error.errno or -1
    return out


def test_a_request_past_the_end_is_answered_as_by_nbdkit(tmp_path: Path) -> None:
    need("nbdkit")
    sock = tmp_path / "kit"
    with program(sock, "nbdkit", "-f", "-U", str(sock), "memory", "4M"):
        theirs = answers(f"nbd+unix:///?socket={sock}", BASE)
    with serving(tmp_path, "qcow2", 4 * MIB) as (_, uri):
        ours = answers(uri, BASE)
    assert ours == theirs
    assert ours["trim", 0, 512] == errno.EINVAL and ours["write", 0, 512] == errno.ENOSPC


def test_a_trim_past_the_end_is_answered_as_by_qemu_nbd(tmp_path: Path) -> None:
    need("qemu-nbd")
    image, sock = tmp_path / "q.raw", tmp_path / "qemu"
    image.write_bytes(bytes(4 * MIB))
    with qemu_nbd(sock, image):
        theirs = answers(f"nbd+unix:///?socket={sock}", BASE)
    with serving(tmp_path, "raw", 4 * MIB) as (_, uri):
        ours = answers(uri, BASE)
    for name in ("read", "trim", "cache", "status"):  # QEMU has EINVAL for writes as well
        for back, length in PAST:
            key = (name, back, 512 if back == -(1 << 40) else length)
            assert ours[key] == theirs[key] == errno.EINVAL, key


def test_a_read_that_is_too_long_is_EINVAL(tmp_path: Path) -> None:
    with serving(tmp_path, "raw", 128 * MIB) as (_, uri), NbdClient(uri) as client:
        for kind in (nbd.READ, nbd.CACHE):
            for offset, length in ((0, 0xFFFFFFFF), (0, 33 * MIB), (127 * MIB, 0xFFFFFFFF)):
                into = memoryview(bytearray(length)) if length < 64 * MIB else memoryview(b"")
                with pytest.raises(OSError) as refused:
                    client.link.wait(client.link.submit(kind, 0, offset, length, into=into))
                assert refused.value.errno == errno.EINVAL
        assert client.pread(512, 0) == bytes(512)
