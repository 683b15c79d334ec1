"""Disks whose root, file or access changes: what a guest meets then, who may do it, and what the
next one finds."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs
from cowferry.block import moves, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.lane import Lane
from cowferry.block.lease import WRITABLE
from cowferry.block.node import Node, chain
from cowferry.daemon import Daemon
from cowferry.drivers import fdsets, opening
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.jobs.ending import finish
from cowferry.jobs.job import Job
from cowferry.jobs.states import Status
from cowferry.operations.snapshot import Snapshot
from daemons import PATIENCE, a_daemon
from orders import Other, failing, held_back, on_call, until

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB


class World:
    """A daemon, its images in one folder."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder = folder
        self.daemon = daemon
        self.graph = daemon.graph

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def execute(self, command: str, **arguments: Any) -> Any:
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.daemon.execute(command, given)

    def create(self, name: str, backing: str | None = None, cluster: int = 64 * KIB) -> str:
        path = self.path(name)
        options: dict[str, Any] = {}
        if name.endswith("qcow2"):
            options["cluster_size"] = cluster
        if backing is not None:
            options |= {"backing_file": backing, "backing_fmt": backing.rpartition(".")[2]}
        opening.create_image(path, name.rpartition(".")[2], SIZE, options)
        return path

    def open(self, name: str) -> Disk:
        """A disk of that name, over a new image."""
        return self.daemon.open_disk(name, self.create(f"{name}.qcow2"), "qcow2")

    def add(self, **options: Any) -> Node:
        self.execute("blockdev-add", **options)
        return self.graph.node(options["node_name"])

    def add_image(self, name: str, **more: Any) -> Node:
        """A node over a new image."""
        kind = name.rpartition(".")[2]
        file = {"driver": "file", "filename": self.create(name)}
        return self.add(driver=kind, node_name=name.partition(".")[0], file=file, **more)

    def add_raw(self, name: str) -> Disk:
        """A raw node over a file node of its own: `vm` over `vm-file`."""
        self.add(driver="file", node_name=f"{name}-file", filename=self.create(f"{name}.raw"))
        self.add(driver="raw", node_name=name, file=f"{name}-file")
        return self.graph.disk(name)

    def serve(self, node: str, writable: bool) -> None:
        address = {"type": "unix", "data": {"path": self.path("nbd")}}
        self.execute("nbd-server-start", addr=address)
        self.execute("block-export-add", type="nbd", id="e", node_name=node, writable=writable)

    def reopen(self, **options: Any) -> None:
        given = {key.replace("_", "-"): value for key, value in options.items()}
        self.execute("blockdev-reopen", options=[given])

    def mirror(self, target: str, id: str = "m", **more: Any) -> Job:
        """One of the disk `vm`, ready."""
        self.execute(
            "drive-mirror", device="vm", target=self.path(target), sync="full", job_id=id, **more
        )
        return self.ready(id)

    def ended(self, id: str) -> bool:
        job = self.daemon.jobs.get(id)
        return job is None or job.status is Status.CONCLUDED

    def ready(self, id: str) -> Job:
        job = self.daemon.jobs.get(id)
        assert job is not None
        until(lambda: job.status is Status.READY, "ready")
        return job


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with a_daemon() as daemon:
        yield World(tmp_path, daemon)


def put(disk: Disk, offset: int, data: bytes) -> None:
    disk.pwrite(memoryview(data), offset)


def get(disk: Disk, offset: int, length: int) -> bytes:
    buf = bytearray(length)
    disk.pread(memoryview(buf), offset)
    return bytes(buf)


# What a guest meets ---------------------------------------------------------------------------


def test_a_write_that_waited_over_a_change_of_root_is_alone_in_the_new_root_s_granule(
    world: World,
) -> None:
    """Two neighbours in small clusters of the old root are one cluster of the new one."""
    world.create("small.qcow2", cluster=4 * KIB)
    world.create("large.qcow2", cluster=64 * KIB)
    old, new = (opening.open_image(world.path(f"{n}.qcow2")) for n in ("small", "large"))
    disk = Disk(old, "vm")
    held: list[list[tuple[int, int]]] = []

    def guest(offset: int) -> None:
        with disk.exclusive(offset, 4 * KIB):
            mine = [c for c in disk.gate.claims if c.owner == threading.get_ident()]
            held.append([(c.start, c.end) for c in mine])

    with disk.exclusive():
        guests = [Other(partial(guest, at)) for at in (0, 4 * KIB)]
        until(lambda: len(disk.gate.claims) == 3, "both wait at the gate")
        disk.root = new
    for one in guests:
        one.end()
    assert held == [[(0, 64 * KIB)]] * 2
    old.close()
    new.close()


@pytest.mark.parametrize("way", ["disk", "lane", "lane, several granules"])
def test_a_write_in_place_that_fails_halfway_is_marked_in_the_bitmaps(
    world: World, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Some of it may be there: a mirror or a backup has to look."""
    disk = Disk(opening.open_image(world.create("vm.raw")), "vm")
    offset, length = (60 * KIB, 8 * KIB) if way != "lane" else (8 * KIB, 8 * KIB)
    put(disk, offset, b"o" * length)
    assert disk._leased(offset, offset + length, WRITABLE) is not None
    bitmap = disk.bitmaps["seen"] = Bitmap("seen", SIZE, 4 * KIB)
    real = sysio.pwrite

    def half(fd: int, buf: Any, at: int) -> None:
        real(fd, memoryview(buf)[: len(buf) // 2], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sysio, "pwrite", half)
    data = memoryview(bytearray(b"n" * length))
    with pytest.raises(OSError, match="No space"):
        if way == "disk":
            disk.pwrite(data, offset)
        else:
            Lane(disk).write(data, offset, length)
    assert list(bitmap.runs()) == [(offset, length)]
    disk.root.close()


@pytest.mark.parametrize("where", ["the record", "the second disk"])
def test_S4_of_a_snapshot_that_fails_no_guest_gets_to_know(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Both disks are as they were before either guest goes on: their writes are good."""
    disks = [world.open("one"), world.open("two")]
    roots = [d.root for d in disks]
    guests: list[Other] = []

    def full() -> None:
        """The disks are drained, the old image of the first is read-only: and the guests write."""
        assert roots[0].read_only
        guests.extend(Other(partial(put, disk, 0, b"g" * 4096)) for disk in disks)
        failing(errno.ENOSPC)()

    def after_the_drain() -> None:
        for guest in guests:
            guest.join(PATIENCE)

    if where == "the record":
        on_call(monkeypatch, moves, "record", full)
    else:
        on_call(monkeypatch, roots[1], "reopen", full)
    on_call(monkeypatch, Snapshot, "abort", after_the_drain)
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {"device": d.name, "snapshot-file": world.path(f"{d.name}-over.qcow2")},
        }
        for d in disks
    ]
    with pytest.raises(CowferryError, match="No space left") as error:
        world.execute("transaction", actions=actions)
    assert error.value.hint == "every disk is as it was"
    assert len(guests) == 2
    for guest in guests:
        guest.end()
    for disk, root in zip(disks, roots, strict=True):
        assert disk.root is root and not root.read_only
        assert get(disk, 0, 4096) == b"g" * 4096
        assert moves.follow(root.filename).path == root.filename
        assert not os.path.exists(world.path(f"{disk.name}-over.qcow2"))
    assert not world.graph.claims
    monkeypatch.undo()
    world.execute("transaction", actions=actions)
    assert all(d.root is not root for d, root in zip(disks, roots, strict=True))


def test_N1_a_guest_s_flush_that_meets_a_pivot_is_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image that it flushes is not closed under it: the pivot waits."""
    world.create("vm.raw")
    disk = world.daemon.open_disk("vm", world.path("vm.raw"), "raw")
    job = world.mirror("new.raw")
    met = threading.Event()
    held_back(monkeypatch, disk.gate, met, whole=True)

    def over(name: str, data: dict[str, Any]) -> None:
        if data.get("status") == "concluded":
            met.set()

    world.daemon.events.listen(over)

    def pivot() -> None:
        job.complete()
        assert met.wait(PATIENCE)  # it waits for us; or it is over

    on_call(monkeypatch, disk.root, "flush", pivot)
    put(disk, 0, b"x" * 512)
    disk.flush()
    assert job.wait(PATIENCE) and job.error is None
    assert disk.root.filename == world.path("new.raw")
    assert get(disk, 0, 512) == b"x" * 512


@pytest.mark.parametrize("what", ["mirror", "commit", "snapshot"])
def test_D2_a_guest_does_not_wait_for_whoever_changes_the_graph(world: World, what: str) -> None:
    """Somebody closes an image for a minute, with the graph in hand: the drain does without."""
    world.create("base.qcow2")
    world.create("vm.qcow2", backing="base.qcow2")
    disk = world.daemon.open_disk("vm", world.path("vm.qcow2"), "qcow2")
    put(disk, 0, b"x" * 4096)
    old = disk.root
    ending: Callable[[], object]
    if what == "snapshot":
        part = Snapshot(world.daemon, "vm").with_file(world.path("over.qcow2"))
        ending = lambda: finish([part])  # noqa: E731
    elif what == "mirror":
        job = world.mirror("new.qcow2", format="qcow2")
        ending = job.complete
    else:
        world.execute("block-commit", device="vm", job_id="c")
        job = world.ready("c")
        ending = job.complete
    with world.graph.lock:
        other = Other(ending)
        until(lambda: disk.root is not old, "the disk's root is switched")
        assert Other(lambda: get(disk, 0, 4096)).end() == b"x" * 4096
        Other(lambda: put(disk, 0, b"y" * 4096)).end()
    other.end()
    if what != "snapshot":
        assert job.wait(PATIENCE) and job.error is None
    assert get(disk, 0, 4096) == b"y" * 4096
    until(lambda: not world.graph.claims, "all is given back")


# Whose images they are ------------------------------------------------------------------------


def test_M5_a_disk_with_a_writable_export_becomes_nobody_s_backing_file(world: World) -> None:
    lower, upper = world.add_image("lower.qcow2"), world.add_image("upper.qcow2", backing=None)
    world.serve("lower", writable=True)
    change = {"driver": "qcow2", "node_name": "upper", "backing": "lower"}
    with pytest.raises(CowferryError, match="'lower' is in use by a writable export"):
        world.reopen(**change)
    assert upper.backing is None
    put(world.graph.disk("lower"), 0, b"x" * 512)
    world.execute("block-export-del", id="e")
    world.reopen(**change)
    assert upper.backing is lower


def test_a_file_below_a_disk_is_not_a_disk_to_snapshot(world: World) -> None:
    disk = world.add_raw("vm")
    put(disk, 0, b"1" * 512)
    for arguments in (
        {"node_name": "vm-file", "snapshot_node_name": "o"},
        {"device": "vm-file"},
    ):
        with pytest.raises(CowferryError, match="Need a root block node"):
            world.execute(
                "blockdev-snapshot-sync", snapshot_file=world.path("o.qcow2"), **arguments
            )
    assert not os.path.exists(world.path("o.qcow2"))
    put(disk, 0, b"2" * 512)
    assert get(disk, 0, 512) == b"2" * 512


def test_a_file_is_not_made_read_only_below_a_node_that_writes(world: World) -> None:
    disk = world.add_raw("vm")
    disks = world.graph.disks_above(world.graph.node("vm-file"))
    assert disk in disks, "all of them are drained when it changes"
    change = {"driver": "file", "node_name": "vm-file", "filename": world.path("vm.raw")}
    with pytest.raises(CowferryError, match="in use by 'vm' as 'file'") as error:
        world.reopen(**change, read_only=True)
    assert error.value.hint == "reopen 'vm' instead"
    put(disk, 0, b"1" * 512)
    world.reopen(driver="raw", node_name="vm", file="vm-file", read_only=True)
    assert disk.read_only and world.graph.node("vm-file").read_only


def test_M5_one_descriptor_that_was_handed_over_has_one_writer(world: World) -> None:
    """Its duplicates share its locks, so that no lock tells two of them apart."""
    path = world.create("vm.qcow2")
    number = fdsets.add(os.open(path, os.O_RDWR))
    file = {"driver": "file", "filename": f"/dev/fdset/{number}"}
    try:
        node = world.add(driver="qcow2", node_name="vm", file=file)
        with pytest.raises(DeviceInUse, match="is open for writing already"):
            world.add(driver="qcow2", node_name="again", file=file)
        reader = world.add(driver="qcow2", node_name="reader", file=file, read_only=True)
        assert reader.read_only and not node.read_only
        world.execute("blockdev-del", node_name="reader")
        world.execute("blockdev-del", node_name="vm")
        assert number in fdsets.all_sets(), "the set is still there"
        opening.open_image(path).close()  # and holds no lock for a node that is gone
        world.add(driver="qcow2", node_name="vm", file=file)
        world.execute("blockdev-del", node_name="vm")
    finally:
        fdsets.remove(number)


def test_a_disk_is_known_by_the_job_that_runs_on_it(world: World) -> None:
    """Not by one that ended and that nobody has dismissed."""
    disk = world.open("vm")
    world.mirror("old.raw", "old", format="raw", auto_dismiss=False).cancel()
    until(lambda: world.ended("old"), "the first is over")
    job = world.mirror("new.raw", "new", format="raw")
    assert world.daemon.job_on("vm") is job
    world.execute("block-job-complete", device="vm")
    assert job.wait(PATIENCE) and job.error is None
    assert disk.root.filename == world.path("new.raw")


# Overlays -------------------------------------------------------------------------------------


def test_a_root_that_nobody_added_goes_when_the_disk_moves_on(world: World) -> None:
    """It may be deleted as the added one was, for nobody else could; and it goes by itself."""
    added = world.add_image("vm.qcow2")
    disk = world.graph.disk("vm")
    disk.pwrite(memoryview(b"x" * 512), 0)
    snap = {"snapshot_file": world.path("snap.qcow2"), "format": "qcow2"}
    world.execute("blockdev-snapshot-sync", device="vm", **snap)
    overlay = disk.root
    world.execute("drive-mirror", device=overlay.name, job_id="m", target=world.path("copy.qcow2"),
                  sync="full", format="qcow2")  # fmt: skip
    job = world.ready("m")
    job.complete()
    assert job.wait(PATIENCE)
    moved = disk.root
    assert moved.filename == world.path("copy.qcow2")
    there = {n.name for n in world.graph.every_node() if n.file is not None}
    assert there == {"vm", moved.name}, "the overlay was left open"
    world.execute("blockdev-del", node_name=moved.name)
    world.execute("blockdev-del", node_name=added.name)
    assert not world.graph.every_node()


def test_S3_after_a_reopen_the_disk_is_in_the_file_that_it_was_given(world: World) -> None:
    """The next overlay names it, and a record leads to it."""
    disk = world.add_raw("vm")
    world.add(driver="file", node_name="other", filename=world.create("other.raw"))
    put(disk, 0, b"old!")
    world.reopen(driver="raw", node_name="vm", file="other")
    assert moves.follow(world.path("vm.raw")).path == world.path("other.raw")
    put(disk, 0, b"new!")
    assert Path(world.path("other.raw")).read_bytes()[:4] == b"new!"
    assert Path(world.path("vm.raw")).read_bytes()[:4] == b"old!"
    world.execute(
        "blockdev-snapshot-sync", node_name="vm", snapshot_node_name="over",
        snapshot_file=world.path("over.qcow2"),
    )  # fmt: skip
    assert world.graph.node("over").backing_spec == (world.path("other.raw"), "raw")
    disk.flush()
    top = opening.open_image(world.path("over.qcow2"), read_only=True, force_share=True)
    assert not differs(contents(top), contents(disk)) and contents(top)[:4] == b"new!"
    opening.close_chain(top)
    assert moves.follow(world.path("vm.raw")).path == world.path("over.qcow2")


@pytest.mark.parametrize("by", ["file", "node"])
def test_an_overlay_whose_header_names_another_backing_file_is_refused(
    world: World, by: str
) -> None:
    """Opened again, the disk would read as something else."""
    disk = world.open("vm")
    put(disk, 0, b"x" * 512)
    root = disk.root
    world.create("other.qcow2")
    wrong = world.create("wrong.qcow2", backing="other.qcow2")
    right = world.create("right.qcow2", backing="vm.qcow2")

    def snapshot(path: str) -> None:
        if by == "file":
            world.execute(
                "blockdev-snapshot-sync", device="vm", snapshot_file=path, mode="existing"
            )
            return
        name = Path(path).stem
        file = {"driver": "file", "filename": path}
        world.add(driver="qcow2", node_name=name, file=file, backing=None)
        world.execute("blockdev-snapshot", node="vm", overlay=name)

    with pytest.raises(CowferryError, match=r"names 'other\.qcow2'"):
        snapshot(wrong)
    assert disk.root is root and not root.read_only and not world.graph.claims
    assert os.path.exists(wrong)
    snapshot(right)
    assert [n.filename for n in chain(disk.root)] == [right, world.path("vm.qcow2")]
    assert get(disk, 0, 512) == b"x" * 512


def test_a_snapshot_that_fails_removes_no_file_that_was_there_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody made it, with an owner and a mode of its own."""
    disk = world.open("vm")
    path = world.path("made.qcow2")
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o640))
    on_call(monkeypatch, moves, "record", failing(errno.ENOSPC))
    for file in (path, world.path("new.qcow2")):
        with pytest.raises(CowferryError):
            world.execute("blockdev-snapshot-sync", device="vm", snapshot_file=file)
        on_call(monkeypatch, moves, "record", failing(errno.ENOSPC))
    assert os.stat(path).st_size == 0 and stat.S_IMODE(os.stat(path).st_mode) == 0o640
    assert not os.path.exists(world.path("new.qcow2"))
    put(disk, 0, b"x" * 512)
