"""Raw images that are being filled: what they read as, whoever writes, streams or harms them.

Use case 2c of the discussion of 2011: a raw file, and beside it what says which part it holds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains import contents, differs, make_base, overlay
from cowferry.block import moves, sysio
from cowferry.block.copy import Copier
from cowferry.block.disk import Disk
from cowferry.block.node import Extent, Node, State
from cowferry.drivers import opening
from cowferry.drivers.partial import ATTRIBUTE, FILLING, Partial
from cowferry.drivers.raw import whole_sectors
from cowferry.errors import CowferryError, NotSupported
from cowferry.jobs.stream import Fill, Stream
from cowferry.wire import nbd
from daemons import PATIENCE, Told, a_daemon
from mounts import Device, device
from nbd_servers import Forgetful
from nbd_servers import node_of as node_of_server

__all__ = ["device"]  # a fixture

SIZE = (3 << 20) + 1024
GRANULES = [512, 4096, 64 << 10]


def a_partial(
    folder: Path, size: int = SIZE, base_size: int | None = None, **options: Any
) -> tuple[Path, bytearray]:
    """`vm.raw`, to be filled from `base.raw`, and what it reads as."""
    oracle = make_base(folder, size if base_size is None else base_size)
    path = folder / "vm.raw"
    given = {"backing_file": "base.raw", "backing_fmt": "raw", **options}
    opening.create_image(str(path), "raw", size, given)
    return path, oracle[:size].ljust(size, b"\0")


def filling_of(path: Path) -> Path:
    return path.with_name(path.name + FILLING)


@contextlib.contextmanager
def opened(path: Path, **how: Any) -> Iterator[Node]:
    node = opening.open_image(str(path), **how)
    try:
        yield node
    finally:
        opening.close_chain(node)


@contextlib.contextmanager
def a_disk(folder: Path, size: int = SIZE, **options: Any) -> Iterator[tuple[Disk, bytearray]]:
    path, oracle = a_partial(folder, size, **options)
    with opened(path) as node:
        yield Disk(node, "vm"), oracle


def node_of(disk: Disk) -> Partial:
    assert isinstance(disk.root, Partial)
    return disk.root


def complete(path: Path) -> bool:
    """A raw image like others: nothing beside it, and no mark on it."""
    return not filling_of(path).exists() and ATTRIBUTE not in os.listxattr(path)


def put(disk: Disk, oracle: bytearray, offset: int, data: bytes) -> None:
    disk.pwrite(memoryview(data), offset)
    oracle[offset : offset + len(data)] = data


def stream(disk: Disk, **how: Any) -> None:
    """All of it, by hand; what was below is closed."""
    old = disk.root.backing
    job = Stream(disk, **how)
    for _ in job.run():
        pass
    job.prepare()
    if disk.root.backing is None:
        opening.close_chain(old)


# Against a flat oracle ----------------------------------------------------------------------

where = st.floats(0, 1)
lengths = st.sampled_from([1, 511, 512, 4096, 5000, 65_536, 70_000, 200_000])
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "zero", "unmap", "fast", "discard"]), where, lengths),
        st.tuples(st.sampled_from(["flush", "again", "rest", "fill", "prepare", "settle"]),
                  where, lengths),
        st.tuples(st.sampled_from(["grow", "shrink"]), where, lengths),
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    steps=steps,
    granule=st.sampled_from(GRANULES),
    size=st.integers(1, 300_000).map(whole_sectors),
    base_size=st.integers(0, 400_000),
    seed=st.integers(0, 1 << 20),
)
def test_whatever_is_done_it_reads_as_a_flat_disk_would(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, float, int]], granule: int,
    size: int, base_size: int, seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("flat")
    path, oracle = a_partial(folder, size, base_size, granularity=granule)
    rnd = random.Random(seed)
    disk = Disk(opening.open_image(str(path)), "vm")
    fill = Fill(disk, disk.root, None)
    half_done: tuple[Any, ...] | None = None
    for act, at, length in steps:
        offset = min(int(at * len(oracle)), len(oracle) - 1)
        length = min(length, len(oracle) - offset)
        chunk = offset // granule * granule
        if act == "write":
            put(disk, oracle, offset, rnd.randbytes(length))
        elif act in ("zero", "unmap", "fast"):
            disk.zero(offset, length, unmap=act == "unmap", fast=act == "fast")
            oracle[offset : offset + length] = bytes(length)
        elif act == "discard":
            disk.discard(offset, length)
            got = contents(disk)
            kept = oracle[offset : offset + length]
            now = got[offset : offset + length]
            assert all(g in (0, k) for g, k in zip(now, kept, strict=True)), "ST4"
            oracle[offset : offset + length] = now
        elif act == "flush":
            disk.flush()
        elif act == "fill":
            fill.chunk(chunk, min(128 << 10, len(oracle) - chunk))
        elif act == "prepare" and half_done is None:  # a guest writes between the two steps
            length = min(128 << 10, len(oracle) - chunk)
            half_done = (chunk, length, *fill.prepare(chunk, length))
        elif act == "settle" and half_done is not None:
            fill.settle(*half_done)
            half_done = None
        elif half_done is not None:
            continue  # a disk with a job on it is not closed, and has its size
        elif act == "again":
            opening.close_chain(disk.root)
            disk = Disk(opening.open_image(str(path)), "vm")
            fill = Fill(disk, disk.root, None)
        elif act == "rest":
            disk.root.reopen(True)
            disk.root.reopen(False)
        elif act == "grow":
            disk.resize(len(oracle) + length)
            oracle.extend(bytes(whole_sectors(length)))
        elif act == "shrink":
            size = max(len(oracle) - length, 1)
            disk.resize(size)
            del oracle[whole_sectors(size) :]
        assert not differs(contents(disk), oracle), act
        assert 0 <= node_of(disk).held <= len(oracle)
    if half_done is not None:
        fill.settle(*half_done)
    stream(disk, chunk=64 << 10)
    assert not differs(contents(disk), oracle)
    disk.root.close()
    assert complete(path)
    assert not differs(path.read_bytes(), oracle)


def test_ST1_a_guest_writes_between_each_two_steps_of_a_stream(tmp_path: Path) -> None:
    with a_disk(tmp_path) as (disk, oracle):
        rnd = random.Random(3)
        old, job = disk.root.backing, Stream(disk, chunk=256 << 10)
        for _ in job.run():
            for length in (1, 700, 66_000):
                put(disk, oracle, rnd.randrange(SIZE - length), rnd.randbytes(length))
            assert not differs(contents(disk), oracle)
        job.prepare()
        opening.close_chain(old)
        assert not differs(contents(disk), oracle)
        put(disk, oracle, 5, b"and goes on")
        disk.flush()
    (tmp_path / "base.raw").unlink()
    assert not differs((tmp_path / "vm.raw").read_bytes(), oracle)


def test_ST3_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        steps = iter(Stream(Disk(node, "vm"), chunk=512 << 10).run())
        for _ in range(3):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        node.flush()
        held = node_of(Disk(node)).held
        assert held == 3 * (512 << 10)
    with opened(path) as node:
        disk = Disk(node, "vm")
        old, job = node.backing, Stream(disk, chunk=512 << 10)
        assert node_of(disk).held == held
        moved = sum(p.moved for p in job.run())
        assert moved == SIZE - held
        job.prepare()
        opening.close_chain(old)
        assert not differs(contents(disk), oracle)


# Room is the final place --------------------------------------------------------------------


class Waits:
    """Hears that somebody waits for room."""

    def __init__(self, node: Partial) -> None:
        self.heard = threading.Event()
        plain = node.meta.wait

        def wait(timeout: float | None = None) -> bool:
            self.heard.set()
            return plain(timeout)

        node.meta.wait = wait  # type: ignore[method-assign]


def test_ST1_a_guest_waits_for_the_room_that_a_stream_is_filling_and_writes_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the stream, which writes into the same place and later, would have the last word."""
    with a_disk(tmp_path) as (disk, oracle):
        waits = Waits(node_of(disk))
        guests: list[threading.Thread] = []
        plain = Copier.fill

        def fill(copier: Copier, source: Node | None, offset: int, room: list[Extent]) -> None:
            data = b"guest" * 40
            guests.append(threading.Thread(target=put, args=(disk, oracle, offset + 100, data)))
            guests[-1].start()
            assert waits.heard.wait(PATIENCE), "the guest does not wait"
            plain(copier, source, offset, room)
            assert guests[-1].is_alive()

        monkeypatch.setattr(Copier, "fill", fill)
        work = Fill(disk, disk.root, None)
        room, rest = work.prepare(0, 512 << 10)
        guests[0].join(PATIENCE)  # it needs no more than that the piece is filled
        assert not guests[0].is_alive() and not differs(contents(disk), oracle)
        work.settle(0, 512 << 10, room, rest)
        assert not differs(contents(disk), oracle)
        assert node_of(disk).held == 512 << 10


def test_ST1_a_stream_leaves_the_place_to_a_guest_that_is_writing_there(tmp_path: Path) -> None:
    with a_disk(tmp_path) as (disk, oracle):
        node = node_of(disk)
        asked: list[list[Extent] | None] = []
        plain = node.file.pwrite

        def pwrite(buf: memoryview, offset: int, fua: bool = False) -> None:
            asked.append(node.reserve(0, 128 << 10))
            asked.append(node.reserve(128 << 10, 64 << 10))
            plain(buf, offset, fua)

        node.file.pwrite = pwrite  # type: ignore[method-assign]
        put(disk, oracle, 70_000, b"guest")
        assert asked[0] is None, "two write into one place"
        room = asked[1]
        assert room is not None
        (elsewhere,) = room
        node.unreserve(elsewhere)
        assert node.reserve(0, 128 << 10) is None  # one of them is no hole any more
        del node.file.pwrite
        stream(disk)
        assert not differs(contents(disk), oracle)


def test_D2_ST1_a_guest_writes_where_a_stream_waits_for_a_server_that_hangs(
    tmp_path: Path,
) -> None:
    with a_disk(tmp_path) as (disk, oracle):
        server = Forgetful(tmp_path / "s", len(oracle))
        server.volatile[:] = oracle
        hangs, goes_on = threading.Event(), threading.Event()

        def before(kind: int) -> None:
            if kind == nbd.READ:
                hangs.set()
                assert goes_on.wait(PATIENCE)

        server.before = before
        local, disk.root.backing = disk.root.backing, node_of_server(tmp_path / "s")
        opening.close_chain(local)
        job = threading.Thread(target=stream, args=(disk,))
        guest = threading.Thread(
            target=put, args=(disk, oracle, 64 << 10, b"guest" * 39_321 + b"...")
        )
        try:
            job.start()
            assert hangs.wait(PATIENCE)
            guest.start()  # whole granules, of which no byte is the server's
            guest.join(PATIENCE)
            assert not guest.is_alive() and job.is_alive(), "the guest waits for the server"
        finally:
            goes_on.set()
            job.join(PATIENCE)
        assert disk.root.backing is None and not differs(contents(disk), oracle)
        server.crash()


def test_an_error_of_the_base_gives_the_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_disk(tmp_path) as (disk, oracle):
        with monkeypatch.context() as patch:
            error = OSError(errno.EIO, "the base is gone")

            def fill(*_: object) -> None:
                raise error

            patch.setattr(Copier, "fill", fill)
            with pytest.raises(OSError):
                Fill(disk, disk.root, None).chunk(0, 1 << 20)
        put(disk, oracle, 0, b"it did not wait for ever")
        stream(disk)
        assert not differs(contents(disk), oracle)


def test_ST1_guests_and_a_stream_at_full_speed(tmp_path: Path) -> None:
    size = 24 << 20
    with a_disk(tmp_path, size, granularity=16 << 10) as (disk, oracle):
        failed: list[BaseException] = []

        def guest(share: int) -> None:
            rnd = random.Random(share)
            try:
                for _ in range(250):
                    length = rnd.choice([1, 3000, 16 << 10, 50_000])
                    offset = rnd.randrange(share * size // 4, (share + 1) * size // 4 - length)
                    put(disk, oracle, offset, rnd.randbytes(length))
            except BaseException as error:
                failed.append(error)

        guests = [threading.Thread(target=guest, args=(n,)) for n in range(4)]
        for thread in guests:
            thread.start()
        stream(disk, chunk=1 << 20)
        for thread in guests:
            thread.join(PATIENCE)
        assert not failed and not differs(contents(disk), oracle)
    assert not differs((tmp_path / "vm.raw").read_bytes(), oracle)


# Zeroes, discards, durability ----------------------------------------------------------------


@pytest.mark.parametrize("act", ["zero", "unmap", "discard"])
def test_ST4_what_is_zeroed_or_discarded_does_not_read_as_the_base(
    tmp_path: Path, act: str
) -> None:
    with a_disk(tmp_path) as (disk, oracle):
        start, length = 1000, 300_000  # a hole, and parts of granules on both sides
        if act == "discard":
            disk.discard(start, length)
        else:
            disk.zero(start, length, unmap=act == "unmap")
        got = contents(disk)
        assert not any(got[64 << 10 : 256 << 10])
        if act != "discard":
            assert not any(got[start : start + length])
        assert got[:start] == oracle[:start]
        assert got[start + length :] == oracle[start + length :]
        (run,) = node_of(disk)._runs(64 << 10, 192 << 10)
        assert run[2], "a hole is left, which the base shines through"
        oracle[:] = got
        stream(disk)
        assert not differs(contents(disk), oracle)


def test_what_is_not_durable_has_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N6: a flush of the file that fails leaves the map as it was, and fails from then on."""
    path, oracle = a_partial(tmp_path)
    node = opening.open_image(str(path))
    Disk(node).pwrite(memoryview(b"x" * 4096), 0)
    before = filling_of(path).read_bytes()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "fdatasync", broken)
        with pytest.raises(OSError):
            node.flush()
    assert filling_of(path).read_bytes() == before
    with pytest.raises(OSError):
        node.flush()
    with pytest.raises(OSError):
        opening.close_chain(node)
    with opened(path) as node:
        assert not differs(contents(node), oracle)


def test_a_map_that_cannot_be_flushed_fails_every_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = a_partial(tmp_path)
    node = opening.open_image(str(path))
    map_of = filling_of(path).stat().st_ino
    plain = sysio.fdatasync

    def broken(fd: int) -> None:
        if os.fstat(fd).st_ino == map_of:
            raise OSError(errno.EIO, "Input/output error")
        plain(fd)

    disk = Disk(node)
    disk.pwrite(memoryview(b"x" * 4096), 0)
    with monkeypatch.context() as patch:
        patch.setattr(sysio, "fdatasync", broken)
        with pytest.raises(OSError, match="filling"):
            disk.flush()
    with pytest.raises(OSError, match="filling"):
        disk.flush()
    with contextlib.suppress(OSError):
        opening.close_chain(node)


def test_no_room_for_a_new_map_leaves_the_old_one_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, oracle = a_partial(tmp_path)
    (tmp_path / "other.raw").write_bytes((tmp_path / "base.raw").read_bytes())
    with opened(path) as node:
        disk = Disk(node)

        def full(source: str, target: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(sysio, "rename", full)
            with pytest.raises(OSError):
                node.set_backing("other.raw", "raw")
        put(disk, oracle, 99, b"it is still kept")
        disk.flush()
        assert node.backing_spec == ("base.raw", "raw")
    with opened(path, read_only=True) as node:
        assert node.backing_spec == ("base.raw", "raw")
        assert not differs(contents(node), oracle)


# Operations over it ------------------------------------------------------------------------------


def run_job(daemon: Any, told: Told, command: str, **arguments: Any) -> None:
    plain = {k.replace("_", "-"): v for k, v in arguments.items()}
    daemon.execute(command, {"device": "vm", **plain})
    if command != "block-stream":
        told.wait("BLOCK_JOB_READY", device="vm")
        daemon.execute("job-complete", {"id": "vm"})
    told.wait("JOB_STATUS_CHANGE", status="null")
    (done,) = [data for name, data in told.seen if name == "BLOCK_JOB_COMPLETED"]
    assert "error" not in done, done
    told.seen.clear()


def test_a_stream_by_qmp_down_to_a_base_and_then_all_the_way(tmp_path: Path) -> None:
    oracle = make_base(tmp_path, SIZE)
    middle = overlay(tmp_path, "sn1.qcow2", "base.raw", "raw", SIZE)
    with opened(middle) as node:
        put(Disk(node), oracle, 1 << 20, b"m" * 70_000)
    path = tmp_path / "vm.raw"
    opening.create_image(
        str(path), "raw", SIZE, {"backing_file": "sn1.qcow2", "backing_fmt": "qcow2"}
    )
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(path))
        run_job(daemon, told, "block-stream", base=str(tmp_path / "base.raw"))
        assert disk.root.backing_spec == ("base.raw", "raw")
        (image,) = daemon.execute("query-block", {})
        assert image["inserted"]["backing_file_depth"] == 1
        assert not differs(contents(disk), oracle)
        with pytest.raises(CowferryError):
            daemon.execute("blockdev-del", {"node-name": "vm"})
    with opened(path) as node:
        assert not differs(contents(node), oracle)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(path))
        run_job(daemon, told, "block-stream")
        assert disk.root.backing is None and complete(path)
        put(disk, oracle, 4096, b"a raw image like others")
        with pytest.raises(NotSupported, match="no backing file to stream from") as refused:
            daemon.execute("block-stream", {"device": "vm"})
        assert "vm.raw.filling' is lost" in refused.value.hint
    assert not differs(path.read_bytes(), oracle)


def test_a_snapshot_over_it_and_back(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(path))
        put(disk, oracle, 3000, b"before")
        daemon.execute(
            "blockdev-snapshot-sync", {"device": "vm", "snapshot-file": str(tmp_path / "s.qcow2")}
        )
        put(disk, oracle, 100_000, b"after")
        assert not differs(contents(disk), oracle)
    with opened(tmp_path / "s.qcow2", read_only=True) as node:
        assert isinstance(node.backing, Partial)
        assert not differs(contents(node), oracle)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(path))
        assert disk.root.filename == str(tmp_path / "s.qcow2")
        run_job(daemon, told, "block-commit", base=str(path))
        assert disk.root.filename == str(path) and isinstance(disk.root, Partial)
        assert not differs(contents(disk), oracle)
        put(disk, oracle, 200_000, b"and it goes on being filled")
        run_job(daemon, told, "block-stream")
    assert complete(path)
    assert not differs(path.read_bytes(), oracle)


def test_a_layer_that_is_being_filled_is_streamed_and_committed(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        put(Disk(node), oracle, 1 << 20, b"in the layer" * 6000)
    over = overlay(tmp_path, "over.qcow2", "vm.raw", "raw", SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(over))
        put(disk, oracle, 2 << 20, b"on top")
        layer = disk.root.backing
        assert isinstance(layer, Partial) and layer.read_only
        daemon.execute("block-stream", {"device": layer.name, "job-id": "j"})
        done = told.wait("BLOCK_JOB_COMPLETED", device="j")
        assert "error" not in done, done
        assert not differs(contents(disk), oracle)
    assert complete(path)
    with opened(over) as node:
        assert not differs(contents(node), oracle)


def test_it_is_committed_into_its_base(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(path))
        put(disk, oracle, 5000, b"on top" * 20_000)
        run_job(daemon, told, "block-commit")
        assert disk.root.filename == str(tmp_path / "base.raw")
        assert not differs(contents(disk), oracle)
    assert not differs((tmp_path / "base.raw").read_bytes(), oracle)


@pytest.mark.parametrize("goal", ["copy.qcow2", "copy.raw"])
def test_it_is_copied_elsewhere_as_it_reads(tmp_path: Path, goal: str) -> None:
    path, oracle = a_partial(tmp_path)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(path))
        put(disk, oracle, 5000, b"written" * 20_000)
        format = goal.split(".")[1]
        target = str(tmp_path / goal)
        run_job(daemon, told, "drive-mirror", target=target, sync="full", format=format)
        assert disk.root.filename == str(tmp_path / goal)
        assert not differs(contents(disk), oracle)
    with opened(tmp_path / goal, read_only=True) as node:
        assert not differs(contents(node), oracle)


def test_a_copy_goes_into_one_that_is_being_filled(tmp_path: Path) -> None:
    """What the disk has from the same base is not copied."""
    goal, oracle = a_partial(tmp_path)
    source = overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(source))
        put(disk, oracle, 70_000, b"in the overlay")
        run_job(
            daemon, told, "drive-mirror", target=str(goal), sync="top", mode="existing",
            format="raw",
        )  # fmt: skip
        assert isinstance(disk.root, Partial) and 0 < disk.root.held < SIZE // 2
        assert not differs(contents(disk), oracle)
    with opened(goal) as node:
        assert not differs(contents(node), oracle)


def test_another_name_for_the_base_and_another_size(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path, SIZE, SIZE + (1 << 20))
    (tmp_path / "moved.raw").write_bytes((tmp_path / "base.raw").read_bytes())
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", str(path))
        node = disk.root
        put(disk, oracle, 0, b"x")
        daemon.execute(
            "change-backing-file",
            {"device": "vm", "image-node-name": node.name, "backing-file": "moved.raw"},
        )
        daemon.execute("block_resize", {"device": "vm", "size": SIZE + 70_144})
        oracle.extend(bytes(70_144))
        assert not differs(contents(disk), oracle), "the base shows where the disk has grown"
    (tmp_path / "base.raw").unlink()
    with opened(path) as again:
        assert again.backing_spec == ("moved.raw", "raw") and again.size == len(oracle)
        assert not differs(contents(again), oracle)


def test_a_group_that_fails_at_the_end_leaves_it_as_it_was(tmp_path: Path) -> None:
    """Its end is undone: it has its backing file, its map and its mark again."""
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        disk = Disk(node, "vm")
        job = Stream(disk, chunk=1 << 20)
        for _ in job.run():
            pass
        job.approach()
        with disk.exclusive():
            job.settle()
            assert complete(path) and node.backing_spec is None
            job.unsettle()
        assert node.backing_spec == ("base.raw", "raw") and not complete(path)
        put(disk, oracle, 1, b"later")
    with opened(path) as node:
        assert isinstance(node, Partial) and node.held == SIZE
        assert not differs(contents(node), oracle)
        stream(Disk(node))
    assert complete(path)


def test_where_no_file_can_lie_beside_it_the_map_is_in_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("COWFERRY_STATE", str(state))
    monkeypatch.setattr(moves, "place", lambda image, suffix: moves.places(image, suffix)[-1])
    path, oracle = a_partial(tmp_path)
    assert not filling_of(path).exists() and len(list(state.iterdir())) == 1
    with opened(path) as node:
        assert not differs(contents(node), oracle)
        stream(Disk(node))
    assert not list(state.iterdir())
    assert State.HOLE not in {e.state for e in opening.open_image(str(path)).extents(0, SIZE)}


def test_a_device_is_filled_and_then_a_device_like_others(device: Device, tmp_path: Path) -> None:
    oracle = make_base(tmp_path, SIZE)
    path = Path(device(4 << 20))  # full of what is not zero
    oracle.extend(bytes((4 << 20) - SIZE))
    base = str(tmp_path / "base.raw")
    opening.create_image(str(path), "raw", SIZE, {"backing_file": base, "backing_fmt": "raw"})
    with opened(path) as node:
        assert node.size == 4 << 20
        disk = Disk(node, "vm")
        assert not differs(contents(disk), oracle)
        put(disk, oracle, 70_000, b"guest" * 1000)
        with pytest.raises(NotSupported, match="keeps its size"):
            disk.resize(8 << 20)
    with opened(path) as node:
        assert not differs(contents(node), oracle)
        stream(Disk(node))
    assert not list((tmp_path / "state").iterdir())
    with opened(path) as node:
        assert type(node) is not Partial and not differs(contents(node), oracle)
