"""One peer, or one file system, that does not answer holds up the command that needs it, and nobody
else: no other command, no guest, and not the end of the daemon."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cowferry import daemon as daemons
from cowferry.cli.live import draw
from cowferry.commands import block
from cowferry.daemon import Daemon
from cowferry.drivers.nbd import Nbd
from cowferry.drivers.nbd_client import NbdClient
from cowferry.drivers.opening import create_image, open_image
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.exports import nbd as nbd_exports
from daemons import PATIENCE, Told, a_daemon
from frozen_fs import frozen_fs
from nbd_servers import frozen, nbdkit, until
from tests_support import need

SIZE = 1 << 20
SOON = 5.0  # seconds: what answers at once has answered by then, however busy the machine is


class Mute:
    """An NBD server that takes every connection and never says a word; `asked` once a client has
    come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(8)
        self.clients: list[socket.socket] = []
        self.asked = threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.clients.append(self.listener.accept()[0])
                self.asked.set()

    def hang_up(self) -> None:
        """Send everybody away, and take nobody any more."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)
        for sock in self.clients:
            sock.close()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///x?socket={self.path}"

    @property
    def options(self) -> dict[str, Any]:
        return {"driver": "nbd", "server": {"type": "unix", "path": str(self.path)}, "export": "x"}


class World:
    """A daemon that serves `vm`, a mute server, and threads for commands that hang."""

    def __init__(self, daemon: Daemon, mute: Mute, folder: Path) -> None:
        self.daemon, self.mute, self.folder = daemon, mute, folder
        self.pool = ThreadPoolExecutor(8)

    def begin(self, command: str, **arguments: Any) -> Future[Any]:
        """Run a command in a thread of its own."""
        given = {k.replace("_", "-"): v for k, v in arguments.items()}
        return self.pool.submit(self.daemon.execute, command, given)

    def at_once(self, command: str, **arguments: Any) -> Any:
        return self.begin(command, **arguments).result(SOON)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    for name in ("vm.raw", "other.raw"):
        create_image(str(tmp_path / name), "raw", SIZE, {})
    mute = Mute(tmp_path / "mute.sock")
    with a_daemon() as daemon:
        daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd.sock")})
        disk = daemon.open_disk("vm", str(tmp_path / "vm.raw"))
        daemon.add_export(disk, "vm")
        found = World(daemon, mute, tmp_path)
        try:
            yield found
        finally:
            mute.hang_up()
            found.pool.shutdown()


#: Commands that wait for a server: (command, arguments without the server's URI or options).
WAITING: dict[str, Callable[[World], tuple[str, dict[str, Any]]]] = {
    "add": lambda w: ("x-disk-add", {"device": "far", "filename": w.mute.uri}),
    "blockdev-add": lambda w: ("blockdev-add", {"node-name": "far", **w.mute.options}),
    "change": lambda w: ("change", {"device": "vm", "target": w.mute.uri}),
    "copy": lambda w: ("x-disk-copy", {"device": "vm", "target": w.mute.uri}),
    "drive-mirror": lambda w: (
        "drive-mirror",
        {"device": "vm", "target": w.mute.uri, "sync": "full", "mode": "existing"},
    ),
    "backup": lambda w: (
        "x-disk-backup",
        {"id": "b", "disks": [{"device": "vm", "target": w.mute.uri}]},
    ),
    "drive-backup": lambda w: (
        "drive-backup",
        {"device": "vm", "target": w.mute.uri, "sync": "full", "mode": "existing"},
    ),
    "transaction": lambda w: (
        "transaction",
        {
            "actions": [
                {
                    "type": "drive-backup",
                    "data": {
                        "device": "vm", "target": w.mute.uri, "sync": "full", "mode": "existing",
                    },
                }
            ]
        },
    ),
    "group": lambda w: (
        "x-group-start",
        {"id": "g", "type": "copy", "members": [{"device": "vm", "target": w.mute.uri}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITING)
def test_D2_a_mute_server_holds_up_one_command_alone(world: World, name: str) -> None:
    command, arguments = WAITING[name](world)
    daemon = world.daemon
    hanging = world.pool.submit(daemon.execute, command, arguments)
    assert world.mute.asked.wait(PATIENCE)
    # Whatever looks, answers.
    assert world.at_once("query-status")["running"]
    assert [d["device"] for d in world.at_once("query-block")] == ["vm"]
    for query in ("query-jobs", "query-block-jobs", "query-named-block-nodes", "x-query-tree",
                  "x-query-locks", "query-block-exports", "x-query-groups"):  # fmt: skip
        world.at_once(query)
    # Another disk comes, is copied, and goes.
    assert daemon.nbd is not None
    world.at_once("x-disk-add", device="other", filename=str(world.folder / "other.raw"))
    told = Told(daemon)
    copy = {"device": "other", "target": str(world.folder / "copy.raw"), "job-id": "copy"}
    world.at_once("x-disk-copy", **copy)
    told.wait("BLOCK_JOB_READY", device="copy")
    world.at_once("job-cancel", id="copy")
    told.wait("JOB_STATUS_CHANGE", id="copy", status="null")
    world.at_once("x-disk-remove", device="other")
    # The guest of the very disk goes on.
    with NbdClient(daemon.nbd.uri("vm"), timeout=SOON) as guest:
        guest.pwrite(b"g" * 4096, 8192)
        guest.flush()
        assert guest.pread(4096, 8192) == b"g" * 4096
    assert not hanging.done()
    # The command fails when its server goes, and leaves nothing.
    world.mute.hang_up()
    with pytest.raises(CowferryError):
        hanging.result(PATIENCE)
    assert not daemon.graph.claims and not daemon.graph.reserved.names
    assert not daemon.jobs.reserved and not daemon.jobs.all()
    assert not daemon.graph.reserved.pins and not daemon.graph.reserved.paths
    assert {n.name for n in daemon.graph.every_node()} == {"#block101", "#block102"}
    world.at_once("x-disk-snapshot", disks=[{"device": "vm"}])


def test_a_server_that_does_not_answer_is_told_beside_the_layers_that_do(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("nbdkit")
    monkeypatch.setattr(block, "LAYER_SECONDS", 0.3)
    with nbdkit(world.folder / "nk", "memory", str(SIZE)) as server:
        uri = f"nbd+unix:///?socket={world.folder / 'nk'}"
        world.daemon.execute("x-disk-add", {"device": "far", "filename": uri})
        with frozen(server):
            far, vm = sorted(world.at_once("x-query-tree"), key=lambda tree: str(tree["device"]))
        assert "data" not in far["chain"][0]
        assert "its server has not answered within 0.3 s, on a server" in "\n".join(draw(far))
        assert vm["chain"][0]["data"] + vm["chain"][0]["zero"] <= SIZE
        world.daemon.execute("x-disk-remove", {"device": "far"})


def test_a_name_that_is_being_opened_is_taken(world: World) -> None:
    first = world.begin("blockdev-add", node_name="far", **world.mute.options)
    assert world.mute.asked.wait(PATIENCE)
    file = {"driver": "file", "filename": str(world.folder / "other.raw"), "read-only": True}
    with pytest.raises(CowferryError, match="Duplicate nodes with node-name='far'") as refused:
        world.at_once("blockdev-add", node_name="far", **file)
    assert "opened" in refused.value.hint
    with pytest.raises(CowferryError, match="'far'"):
        world.at_once("x-disk-add", device="far", filename=str(world.folder / "other.raw"))
    world.mute.hang_up()
    with pytest.raises(CowferryError):
        first.result(PATIENCE)
    world.at_once("blockdev-add", node_name="far", **file)


def test_a_disk_whose_copy_waits_for_a_server_is_not_changed(world: World) -> None:
    """The claim comes before the wait: nothing that the copy has looked at can change under it."""
    hanging = world.begin("x-disk-copy", device="vm", target=world.mute.uri, job_id="c")
    assert world.mute.asked.wait(PATIENCE)
    for command, arguments in (
        ("x-disk-snapshot", {"disks": [{"device": "vm"}]}),
        ("block_resize", {"device": "vm", "size": 2 * SIZE}),
        ("x-disk-remove", {"device": "vm"}),
        ("x-disk-copy", {"device": "vm", "target": str(world.folder / "d"), "job-id": "d"}),
    ):
        with pytest.raises(DeviceInUse, match="mirror 'c'"):
            world.daemon.execute(command, arguments)
    world.at_once("x-disk-add", device="other", filename=str(world.folder / "other.raw"))
    with pytest.raises(CowferryError, match="Job ID 'c' already in use"):
        world.at_once(
            "x-disk-copy", device="other", target=str(world.folder / "e"), job_id="c"
        )  # fmt: skip
    world.mute.hang_up()
    with pytest.raises(CowferryError):
        hanging.result(PATIENCE)


def test_a_node_below_one_that_is_being_opened_stays(world: World) -> None:
    """The overlay's own file is on the mute server; its backing node is ours, by name."""
    daemon = world.daemon
    file = {"driver": "file", "filename": str(world.folder / "other.raw"), "read-only": True}
    daemon.execute("blockdev-add", {"node-name": "base", **file})
    hanging = world.begin(
        "blockdev-add", node_name="top", driver="qcow2", backing="base", file=world.mute.options
    )
    assert world.mute.asked.wait(PATIENCE)
    with pytest.raises(CowferryError, match="another node is being opened over it"):
        world.at_once("blockdev-del", node_name="base")
    world.mute.hang_up()
    with pytest.raises(CowferryError):
        hanging.result(PATIENCE)
    world.at_once("blockdev-del", node_name="base")


def test_two_commands_make_one_file_once(world: World) -> None:
    """The second does not remove what the first has made."""
    daemon, target = world.daemon, world.folder / "target.raw"
    daemon.execute(
        "x-disk-add", {"device": "other", "filename": str(world.folder / "other.raw")}
    )  # fmt: skip
    with daemon.graph.making(str(target)):  # as a command does while it makes a file
        with pytest.raises(DeviceInUse, match="being made by another command"):
            world.at_once("x-disk-copy", device="vm", target=str(target), job_id="a")
        with pytest.raises(DeviceInUse, match="being made by another command"):
            world.at_once(
                "blockdev-add", node_name="n", driver="file", filename=str(target)
            )  # fmt: skip
    for _ in range(10):
        both = [
            world.begin("x-disk-copy", device=disk, target=str(target), job_id=f"copy-{disk}")
            for disk in ("vm", "other")
        ]
        done = [f for f in both if f.exception(PATIENCE) is None]
        assert len(done) == 1 and target.exists()
        for job in daemon.jobs.all():
            job.cancel()
            assert job.wait(PATIENCE)
        until(lambda: not target.exists())


def test_the_daemon_ends_while_commands_wait(world: World) -> None:
    hanging = world.begin("x-disk-add", device="far", filename=world.mute.uri)
    assert world.mute.asked.wait(PATIENCE)
    begin = time.monotonic()
    world.daemon.close()
    assert time.monotonic() - begin < 10
    world.mute.hang_up()
    with pytest.raises(CowferryError):
        hanging.result(PATIENCE)


def test_a_command_waits_for_another_one_on_the_same_disk(world: World) -> None:
    """As when one ran after the other: both succeed, in some order."""
    daemon = world.daemon
    names = [f"bitmap{n}" for n in range(8)]
    jobs = [world.begin("block-dirty-bitmap-add", node="vm", name=name) for name in names]
    jobs += [world.begin("x-disk-snapshot", disks=[{"device": "vm"}]) for _ in range(2)]
    for job in jobs:
        job.result(PATIENCE)
    found = [b["name"] for b in daemon.execute("x-query-bitmaps", {"device": "vm"})]
    assert set(found) == set(names)
    chain = daemon.execute("x-query-tree", {"device": "vm"})[0]["chain"]
    assert len(chain) == 3 and all(os.path.exists(layer["filename"]) for layer in chain)


# The end of the daemon ------------------------------------------------------------------------


def ends(daemon: Daemon) -> list[str]:
    """Close it, within the time that it may take; what it did not wait for."""
    begin = time.monotonic()
    with contextlib.suppress(OSError):  # something could not be flushed
        daemon.close()
    assert time.monotonic() - begin < 10
    return daemon.unfinished


def test_the_end_waits_for_no_frozen_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk, a job and a guest's read are stuck; another disk is flushed and free afterwards."""
    need("nbdkit")
    monkeypatch.setattr(daemons, "HUNG", 0.5)
    monkeypatch.setattr(nbd_exports, "FINISH_SECONDS", 0.5)
    with nbdkit(tmp_path / "nk", "memory", str(SIZE)) as server, a_daemon() as daemon:
        nbd = daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd.sock")})
        uri = f"nbd+unix:///?socket={tmp_path / 'nk'}"
        for name, path in (("far", uri), ("near", str(tmp_path / "near.qcow2"))):
            if name == "near":
                create_image(path, "qcow2", SIZE, {})
            daemon.add_export(daemon.open_disk(name, path), name)
        daemon.graph.disk("far").pwrite(memoryview(b"f" * 512), 0)
        daemon.graph.disk("near").pwrite(memoryview(b"n" * 512), 0)
        with NbdClient(nbd.uri("far"), timeout=PATIENCE) as guest, ThreadPoolExecutor(1) as pool:
            copy = {"device": "far", "target": str(tmp_path / "copy.raw"), "job-id": "j"}
            daemon.execute("x-disk-copy", {**copy, "speed": 1 << 16})
            with frozen(server):
                reading = pool.submit(guest.pread, 4096, 0)
                daemon.jobs.jobs["j"].set_speed(0)
                node = next(n for n in daemon.graph.every_node() if isinstance(n, Nbd))
                until(lambda: len(node._since) > 1)
                unfinished = ends(daemon)
            with contextlib.suppress(OSError):
                reading.result(PATIENCE)
    assert "disk 'near'" not in unfinished
    assert not os.path.exists(tmp_path / "nbd.sock")
    assert open_bytes(tmp_path / "near.qcow2", 512) == b"n" * 512


def test_however_many_images_hang_the_end_has_time_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve disks on a server that is frozen are closed before the one that is not."""
    need("nbdkit")
    monkeypatch.setattr(daemons, "END_SECONDS", 2.0)
    monkeypatch.setattr(daemons, "CLOSE_SECONDS", 1.5)
    create_image(str(tmp_path / "near.qcow2"), "qcow2", SIZE, {})
    with nbdkit(tmp_path / "nk", "memory", str(SIZE)) as server, a_daemon() as daemon:
        far = [f"far{n}" for n in range(12)]
        for name in ("near", *far):
            uri = f"nbd+unix:///{name}?socket={tmp_path / 'nk'}"
            path = str(tmp_path / "near.qcow2") if name == "near" else uri
            daemon.open_disk(name, path).pwrite(memoryview(b"n" * 512), 0)
        with frozen(server):
            assert set(ends(daemon)) <= {f"disk '{name}'" for name in far}
        assert open_bytes(tmp_path / "near.qcow2", 512) == b"n" * 512


def open_bytes(path: Path, length: int) -> bytes:
    """The first bytes of an image, whose lock nobody holds."""
    node, view = open_image(str(path)), memoryview(bytearray(length))
    node.pread(view, 0)
    node.close()
    return bytes(view)


def test_a_frozen_file_system_holds_up_one_command_and_not_the_end(tmp_path: Path) -> None:
    """A copy and a backup are to be made there; nothing in the kernel can be called off."""
    create_image(str(tmp_path / "vm.raw"), "raw", SIZE, {})
    create_image(str(tmp_path / "other.raw"), "raw", SIZE, {})
    with frozen_fs(tmp_path) as fs, a_daemon() as daemon, ThreadPoolExecutor(4) as pool:
        fs.freeze()
        try:
            for name in ("vm", "other"):
                daemon.open_disk(name, str(tmp_path / f"{name}.raw"))
            hanging = [
                pool.submit(daemon.execute, command, arguments)
                for command, arguments in (
                    ("x-disk-copy", {"device": "vm", "target": str(fs.path / "copy.raw")}),
                    (
                        "x-disk-backup",
                        {
                            "id": "b",
                            "disks": [{"device": "other", "target": str(fs.path / "b.qcow2")}],
                        },
                    ),
                )
            ]
            until(lambda: len(daemon.graph.reserved.paths) == 2)
            begin = time.monotonic()
            for query in ("query-status", "query-block", "query-jobs", "x-query-tree"):
                daemon.execute(query, {})
            create_image(str(tmp_path / "third.raw"), "raw", SIZE, {})
            daemon.execute(
                "x-disk-add", {"device": "third", "filename": str(tmp_path / "third.raw")}
            )
            assert time.monotonic() - begin < SOON
            assert not any(command.done() for command in hanging)
            ends(daemon)
        finally:
            fs.thaw()
        for command in hanging:
            with pytest.raises(CowferryError):
                command.result(PATIENCE)
        assert not list(fs.path.glob("*.raw")) and not list(fs.path.glob("*.qcow2"))


def test_guests_go_on_beside_a_copy_to_a_frozen_file_system(tmp_path: Path) -> None:
    """Writes into the very range that is being copied."""
    create_image(str(tmp_path / "vm.qcow2"), "qcow2", 8 * SIZE, {})
    with frozen_fs(tmp_path, 64 << 20) as fs, a_daemon() as daemon, ThreadPoolExecutor(4) as pool:
        daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd.sock")})
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        export = daemon.add_export(disk, "vm")
        assert daemon.nbd is not None
        for at in range(0, 8 * SIZE, SIZE):
            disk.pwrite(memoryview(b"o" * SIZE), at)
        told = Told(daemon)
        copy = {"device": "vm", "target": str(fs.path / "t.raw"), "speed": SIZE, "job-id": "c"}
        daemon.execute("x-disk-copy", copy)
        job = daemon.jobs.jobs["c"]
        until(lambda: job.offset)
        fs.freeze()
        try:
            job.set_speed(0)
            until(lambda: stuck_in_kernel("job c"))
            with NbdClient(daemon.nbd.uri("vm"), timeout=SOON) as guest:
                for at in range(0, 8 * SIZE, SIZE // 2):
                    guest.zero(64 << 10, at)
                    guest.pwrite(b"g" * 4096, at)
                assert guest.pread(4096, 0) == b"g" * 4096
            assert export.users >= 0
        finally:
            fs.thaw()
        told.wait("BLOCK_JOB_READY", device="c")
        pool.submit(daemon.execute, "block-job-cancel", {"device": "c"}).result(SOON)
        told.wait("BLOCK_JOB_COMPLETED", device="c")
        ours, theirs = memoryview(bytearray(8 * SIZE)), (fs.path / "t.raw").read_bytes()
        disk.pread(ours, 0)
        assert ours == theirs


def stuck_in_kernel(name: str) -> bool:
    """Whether the thread of that name waits for a file system."""
    for thread in threading.enumerate():
        if thread.name == name:
            stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] == "D"
    return False
