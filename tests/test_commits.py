"""Commits: which images they may touch, with which access, and what is left when they fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks, contents, differs
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.lease import WRITABLE
from cowferry.block.node import Node, chain
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.jobs.job import Job
from cowferry.jobs.states import Status
from cowferry.operations import commit
from daemons import PATIENCE, a_daemon
from orders import on_call, until

SIZE = 1 << 20
NAMES = ["base.raw", "sn1.qcow2", "sn2.qcow2", "vm.qcow2"]


class World:
    """A daemon with a disk over a chain of four, and what the disk must read as."""

    def __init__(self, folder: Path, daemon: Daemon, names: list[str]) -> None:
        self.folder = folder
        self.daemon = daemon
        self.oracle = chain_of_disks(folder, names, SIZE)
        self.disk: Disk = daemon.open_disk("vm", self.path(names[-1]), "qcow2")

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def execute(self, command: str, **arguments: Any) -> Any:
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.daemon.execute(command, given)

    def commit(self, **arguments: Any) -> Job:
        """Begin one, called `c`, that is not dismissed by itself."""
        self.execute("block-commit", device="vm", job_id="c", auto_dismiss=False, **arguments)
        job = self.daemon.jobs.get("c")
        assert job is not None
        return job

    def write(self, offset: int, data: bytes) -> None:
        self.disk.pwrite(memoryview(data), offset)
        self.oracle[offset : offset + len(data)] = data

    def node(self, name: str) -> Node:
        return next(n for n in chain(self.disk.root) if n.filename == self.path(name))

    def names(self) -> list[str]:
        """The chain, base first."""
        return [os.path.basename(n.filename) for n in chain(self.disk.root)][::-1]

    def serve(self) -> None:
        address = {"type": "unix", "data": {"path": self.path("nbd")}}
        self.execute("nbd-server-start", addr=address)

    def judge(self, *names: str) -> None:
        """The disk is as ever, over these images, now and when it is opened again."""
        assert self.names() == list(names)
        assert not differs(contents(self.disk), self.oracle)
        self.disk.flush()
        top = opening.open_image(self.path(names[-1]), read_only=True, force_share=True)
        assert not differs(contents(top), self.oracle)
        assert [os.path.basename(n.filename) for n in chain(top)][::-1] == list(names)
        opening.close_chain(top)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with a_daemon() as daemon:
        yield daemon


@pytest.fixture
def world(tmp_path: Path, daemon: Daemon) -> World:
    return World(tmp_path, daemon, NAMES)


# Of layers that lie anywhere ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "base", "left"),
    [
        ("sn1.qcow2", "base.raw", ["base.raw", "sn2.qcow2", "vm.qcow2"]),
        ("sn2.qcow2", "base.raw", ["base.raw", "vm.qcow2"]),
        ("sn2.qcow2", "sn1.qcow2", ["base.raw", "sn1.qcow2", "vm.qcow2"]),
    ],
)
def test_C3_the_image_above_the_top_gets_another_backing_file_wherever_it_lies(
    world: World, top: str, base: str, left: list[str]
) -> None:
    """It is the disk's root, or a layer that is open read-only, and stays so."""
    job = world.commit(top=world.path(top), base=world.path(base))
    assert job.wait(PATIENCE) and job.error is None
    world.judge(*left)
    for node in chain(world.disk.root):
        assert node.read_only == (node is not world.disk.root)
        assert node.file is None or node.file.read_only == node.read_only
    assert not world.daemon.graph.claims
    closed = set(NAMES) - set(left)
    assert not closed & {os.path.basename(n.filename) for n in world.daemon.graph.every_node()}


def test_a_commit_is_not_planned_over_a_chain_that_another_is_about_to_change(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is pending: its top is in the chain, and goes before the second could start."""
    layers = {"top": world.path("sn2.qcow2"), "base": world.path("sn1.qcow2")}
    first = world.commit(**layers, auto_finalize=False)
    until(lambda: first.status is Status.PENDING, "pending")

    def goes() -> None:
        first.finalize()
        assert first.wait(PATIENCE)

    on_call(monkeypatch, commit, "begin", goes)
    member = {"device": "vm", "base": world.path("base.raw")}
    for command, arguments in (
        ("block-commit", {"device": "vm", "job_id": "d", "top": layers["top"]}),
        ("x-group-start", {"id": "g", "type": "commit", "members": [member]}),
    ):
        with pytest.raises(DeviceInUse, match="job 'c'"):
            world.execute(command, **arguments)
    assert [job.id for job in world.daemon.jobs.all()] == ["c"] and not world.daemon.jobs.groups
    world.judge(*NAMES)
    first.finalize()
    assert first.wait(PATIENCE) and first.error is None
    world.judge("base.raw", "sn1.qcow2", "vm.qcow2")
    with pytest.raises(CowferryError, match="not in this backing file chain"):
        world.execute("block-commit", device="vm", job_id="d", top=layers["top"])


# Whose images they are ----------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["sn2.qcow2", None])
@pytest.mark.parametrize("exported", ["base.raw", "sn1.qcow2", "sn2.qcow2"])
def test_no_commit_into_or_over_an_image_that_is_exported_by_itself(
    world: World, top: str | None, exported: str
) -> None:
    """Its client would see the base change, or a layer lose its sense."""
    world.serve()
    node = world.node(exported)
    world.execute("block-export-add", type="nbd", id="e", node_name=node.name, name="seen")
    before = Path(world.path(exported)).read_bytes()
    arguments = {"top": world.path(top)} if top else {}
    with pytest.raises(DeviceInUse, match=f"Image '.*{exported}' is exported by itself"):
        world.commit(**arguments)
    assert not world.daemon.jobs.all() and not world.daemon.graph.claims
    assert Path(world.path(exported)).read_bytes() == before
    world.execute("block-export-del", id="e")
    job = world.commit(**arguments, auto_finalize=False)
    waits = Status.PENDING if top else Status.READY
    until(lambda: job.status is waits, waits.value)
    with pytest.raises(DeviceInUse, match="'c'"):  # nor does one come while it runs
        world.execute("block-export-add", type="nbd", id="e", node_name=node.name, name="seen")
    if top is None:
        job.complete()
        until(lambda: job.status is Status.PENDING, "pending")
    job.finalize()
    assert job.wait(PATIENCE) and job.error is None
    world.judge(*(["base.raw"] if top is None else ["base.raw", "vm.qcow2"]))


@pytest.mark.parametrize("end", ["pivot", "cancel"])
def test_the_access_of_a_lent_file_follows_its_parent_over_a_commit(
    tmp_path: Path, daemon: Daemon, end: str
) -> None:
    """Protocol nodes of their own, as libvirt makes them: one each for base and overlay."""
    chain_of_disks(tmp_path, ["base.raw", "vm.qcow2"], SIZE)
    base, top = str(tmp_path / "base.raw"), str(tmp_path / "vm.qcow2")
    add = {"read-only": True}
    for options in (
        {"driver": "file", "node-name": "base-file", "filename": base, **add},
        {"driver": "raw", "node-name": "base", "file": "base-file", **add},
        {"driver": "file", "node-name": "vm-file", "filename": top},
        {"driver": "qcow2", "node-name": "vm", "file": "vm-file", "backing": "base"},
    ):
        daemon.execute("blockdev-add", options)
    access = [daemon.graph.node("base-file"), daemon.graph.node("base")]
    daemon.execute("block-commit", {"device": "vm", "job-id": "c", "auto-dismiss": False})
    job = daemon.jobs.get("c")
    assert job is not None
    until(lambda: job.status is Status.READY, "ready")
    assert [n.read_only for n in access] == [False, False]
    if end == "pivot":
        job.complete()
    else:
        job.cancel()
    assert job.wait(PATIENCE)
    assert [n.read_only for n in access] == [end == "cancel"] * 2
    if end == "cancel":
        opening.open_image(base, "raw", read_only=True).close()  # the lock went back, too
    else:
        with pytest.raises(DeviceInUse):
            opening.open_image(base, "raw", read_only=True)
        daemon.graph.disk("base").pwrite(memoryview(b"x" * 512), 0)


# When they fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["sn2.qcow2", None])
def test_a_commit_whose_clean_up_fails_lets_go_of_the_disk_all_the_same(
    tmp_path: Path, top: str | None
) -> None:
    """No flush of the base succeeds any more, so that it cannot be made read-only again (N6)."""
    with pytest.MonkeyPatch.context() as patch:
        daemon = Daemon()
        world = World(tmp_path, daemon, NAMES)
        world.write(4096, b"a" * 65_536)
        base = world.node("base.raw")
        assert base.file is not None
        broken, real = getattr(base.file, "fd"), sysio.fdatasync  # noqa: B009

        def fdatasync(fd: int) -> None:
            if fd == broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        patch.setattr(sysio, "fdatasync", fdatasync)
        job = world.commit(**({"top": world.path(top)} if top else {}))
        assert job.wait(PATIENCE)
        assert job.error is not None and "flush has failed" in job.error
    assert not world.disk.bitmaps and not world.disk.taps
    assert not daemon.graph.claims
    world.write(8192, b"b" * 512)
    assert world.disk._leased(8192, 8192 + 512, WRITABLE) is not None, "in place, as ever"
    overlay = str(tmp_path / "next.qcow2")
    daemon.execute("blockdev-snapshot-sync", {"device": "vm", "snapshot-file": overlay})
    world.write(0, b"c" * 512)
    assert not differs(contents(world.disk), world.oracle)
    with pytest.raises(OSError, match="flush has failed"):
        daemon.close()
