"""Memory comes back: what an operation has made is gone with it, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks
from cowferry.cli.client import Client
from cowferry.daemon import Daemon
from cowferry.drivers import making
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from cowferry.monitor import qmp
from daemons import PATIENCE, environment
from tracking import Tracker, of_the_house

SIZE = 1 << 20
SOAK = os.environ.get("COWFERRY_SOAK") is not None
BEFORE, TIMES = 3, 4  # runs of an operation before the first look, and between the two

Say = Callable[[str, dict[str, Any]], Any]


class World:
    """A daemon with the disk vm, exported, and what clients do with it.

    `say` runs a command; `told` has the events."""

    def __init__(self, folder: Path, say: Say, told: Callable[[], tuple[str, dict[str, Any]]]):
        self.folder = folder
        self.say = say
        self.told = told
        self.number = 0
        self.size = SIZE

    def run(self, command: str, **given: Any) -> Any:
        return self.say(command, {k.replace("_", "-"): v for k, v in given.items()})

    def wait(self, name: str, **members: Any) -> dict[str, Any]:
        while True:
            got, data = self.told()
            if got == name and all(data.get(k) == v for k, v in members.items()):
                return data

    def gone(self, ident: str = "vm") -> None:
        """The job of that id has ended."""
        self.wait("JOB_STATUS_CHANGE", id=ident, status="null")

    def complete(self) -> None:
        self.wait("BLOCK_JOB_READY")
        self.run("job-complete", id="vm")
        self.gone()

    def new(self, ending: str = "qcow2") -> str:
        """A file name that nothing has yet."""
        self.number += 1
        return str(self.folder / f"t{self.number}.{ending}")

    def image(self, ending: str = "qcow2", size: int = 0, **options: str) -> str:
        path = self.new(ending)
        making.create_image(path, ending, size or self.size, options)
        return path

    def client(self, name: str = "vm") -> NbdClient:
        return NbdClient(f"nbd+unix:///{name}?socket={self.folder / 'nbd'}", ("base:allocation",))

    def write(self) -> None:
        with self.client() as guest:
            guest.pwrite(b"w" * 512, 4096)


def fails(do: Callable[[], object]) -> None:
    """Not `pytest.raises`, which keeps the error, and so every frame that it passed."""
    try:
        do()
    except (CowferryError, OSError):
        return
    raise AssertionError("it did not fail")


# Operations: what each begins, it ends. ----------------------------------------------------

OPERATIONS: dict[str, Callable[[World], None]] = {}


def operation(do: Callable[[World], None]) -> Callable[[World], None]:
    OPERATIONS[do.__name__] = do
    return do


@operation
def mirror_cancelled(w: World) -> None:
    w.run("drive-mirror", device="vm", target=w.new(), sync="full", speed=1)
    w.run("job-cancel", id="vm")
    w.gone()


@operation
def mirror_completed(w: World) -> None:
    w.run("drive-mirror", device="vm", target=w.new(), sync="full")
    w.complete()


@operation
def mirror_that_blocks_writes(w: World) -> None:
    w.run(
        "drive-mirror", device="vm", target=w.new(), sync="full", copy_mode="write-blocking"
    )  # fmt: skip
    w.wait("BLOCK_JOB_READY")
    w.write()
    w.run("block-job-cancel", device="vm")
    w.gone()


@operation
def mirror_that_fails(w: World) -> None:
    path = w.image("raw", SIZE // 2)
    file = {"driver": "file", "filename": path}
    w.run("blockdev-add", driver="raw", node_name="small", file=file)
    w.run("blockdev-mirror", device="vm", target="small", sync="full", job_id="vm")
    w.gone()
    w.run("blockdev-del", node_name="small")


@operation
def copy_paused_and_cancelled(w: World) -> None:
    w.run("x-disk-copy", device="vm", target=w.new("raw"), speed=1)
    w.run("job-pause", id="vm")
    w.run("block-job-set-speed", device="vm", speed=2)
    w.run("job-resume", id="vm")
    w.run("job-cancel", id="vm")
    w.gone()


@operation
def snapshot_and_stream(w: World) -> None:
    w.run("blockdev-snapshot-sync", device="vm", snapshot_file=w.new())
    w.run("block-stream", device="vm", speed=1)
    w.run("job-cancel", id="vm")
    w.gone()
    w.run("block-stream", device="vm")
    w.gone()


@operation
def snapshot_and_commit(w: World) -> None:
    w.run("x-disk-snapshot", disks=[{"device": "vm", "snapshot-file": w.new()}])
    w.run("block-commit", device="vm", speed=1)
    w.run("job-cancel", id="vm")
    w.gone()
    w.run("block-commit", device="vm")
    w.complete()


@operation
def backup_pushed(w: World) -> None:
    w.run("x-disk-backup", id="b", disks=[{"device": "vm", "target": w.new()}], bitmap="inc")
    w.gone("b")
    w.run("block-dirty-bitmap-remove", node="vm", name="inc")


@operation
def backup_cancelled(w: World) -> None:
    w.run("drive-backup", device="vm", target=w.new(), sync="full", speed=1)
    w.write()
    w.run("job-cancel", id="vm")
    w.gone()


@operation
def backup_refused(w: World) -> None:
    w.run("drive-mirror", device="vm", target=w.new(), sync="full", speed=1)
    more = {"target": w.new(), "sync": "full", "job_id": "other"}
    fails(lambda: w.run("drive-backup", device="vm", **more))
    w.run("job-cancel", id="vm")
    w.gone()


@operation
def backup_pulled(w: World) -> None:
    w.run("x-backup-export", id="p", disks=[{"device": "vm", "name": "pull"}])
    with w.client("pull") as puller:
        w.write()
        puller.pread(4096, 0)
    w.run("x-backup-export-end", id="p")
    w.wait("BLOCK_EXPORT_DELETED", id="p-vm")


@operation
def backup_in_a_transaction(w: World) -> None:
    path = w.image()
    file = {"driver": "file", "filename": path}
    w.run("blockdev-add", driver="qcow2", node_name="to", file=file)
    data = {"device": "vm", "target": "to", "sync": "full", "job-id": "vm"}
    w.run("transaction", actions=[{"type": "blockdev-backup", "data": data}])
    w.gone()
    abort = {"type": "abort", "data": {}}
    both = [{"type": "blockdev-backup", "data": data}, abort]
    fails(lambda: w.run("transaction", actions=both))
    w.gone()
    w.run("blockdev-del", node_name="to")


@operation
def group(w: World) -> None:
    for how in ("x-group-cancel", "x-group-complete"):
        w.run("x-group-start", id="g", type="copy", members=[{"device": "vm", "target": w.new()}])
        w.wait("JOB_GROUP_READY")
        w.run(how, id="g")
        w.wait("JOB_GROUP_COMPLETED")


@operation
def bitmaps(w: World) -> None:
    for name in ("one", "two"):
        w.run("block-dirty-bitmap-add", node="vm", name=name, persistent=name == "one")
    w.write()
    w.run("block-dirty-bitmap-merge", node="vm", target="one", bitmaps=["two"])
    w.run("block-dirty-bitmap-clear", node="vm", name="one")
    for name in ("one", "two"):
        w.run("block-dirty-bitmap-remove", node="vm", name=name)


@operation
def a_bitmap_carried_along(w: World) -> None:
    w.run("block-dirty-bitmap-add", node="vm", name="b", persistent=True)
    w.run("x-disk-copy", device="vm", target=w.new())
    w.complete()
    w.run("block-dirty-bitmap-remove", node="vm", name="b")


@operation
def disks_added_and_removed(w: World) -> None:
    for ending in ("qcow2", "qed", "raw"):
        w.run("x-disk-add", device="more", filename=w.image(ending))
        w.run("block_resize", device="more", size=w.size + 65536)
        w.run("x-disk-remove", device="more")


@operation
def a_raw_image_filled(w: World) -> None:
    below = {"backing_file": str(w.folder / "base.raw"), "backing_fmt": "raw"}
    w.run("x-disk-add", device="fill", filename=w.image("raw", SIZE, **below))
    w.run("block-stream", device="fill", job_id="vm")
    w.gone()
    w.run("x-disk-remove", device="fill")


@operation
def nodes_added_and_removed(w: World) -> None:
    server = {"type": "unix", "path": str(w.folder / "nbd")}
    w.run("blockdev-add", driver="nbd", node_name="n", export="vm", server=server, read_only=True)
    w.run("blockdev-del", node_name="n")
    limits = {"iops-total": 10**6}
    w.run("object-add", qom_type="throttle-group", id="tg", limits=limits)
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": w.image()}}
    w.run("blockdev-add", driver="throttle", node_name="n", throttle_group="tg", file=below)
    w.run("blockdev-del", node_name="n")
    w.run("object-del", id="tg")


@operation
def images_created(w: World) -> None:
    options = {"driver": "file", "filename": w.new("raw"), "size": 65536}
    w.run("blockdev-create", job_id="c", options=options)
    w.wait("JOB_STATUS_CHANGE", id="c", status="concluded")
    w.run("job-dismiss", id="c")


@operation
def another_medium(w: World) -> None:
    w.run("x-disk-add", device="cd", filename=w.image("raw"))
    w.run("change", device="cd", target=w.image("raw"), format="raw")
    w.run("x-disk-remove", device="cd")


@operation
def exports(w: World) -> None:
    w.run("block-export-add", type="nbd", id="e", node_name="vm", name="e")
    with w.client("e") as guest:
        guest.pread(4096, 0)
        guest.pread(512 << 10, 0)
        guest.block_status(SIZE, 0)
    w.run("block-export-del", id="e", mode="hard")
    w.wait("BLOCK_EXPORT_DELETED", id="e")


@operation
def clients(w: World) -> None:
    with w.client() as guest:
        guest.pwrite(b"c" * (300 << 10), 0)
        guest.zero(65536, 0)
        guest.trim(65536, 65536)
        guest.flush()
        fails(lambda: guest.pread(512, 1 << 40))
    rude = w.client()
    rude.sock.close()
    rude.abort()


@operation
def monitors(w: World) -> None:
    with Client(str(w.folder / "qmp")) as client:
        client.call("query-block")
        fails(lambda: client.call("frobnicate"))


@operation
def limits(w: World) -> None:
    w.run("x-disk-limit", device="vm", iops=10**6)
    w.write()
    w.run("x-disk-limit", device="vm", group="other", bps=10**9)
    w.run("x-disk-limit", device="vm", bps=1, iops=0)  # the wait is long ...
    with w.client() as guest:
        calls = [guest.link.submit(0, 0, 0, 4096, into=memoryview(bytearray(4096)))] * 2
        calls.append(guest.link.submit(0, 0, 0, 4096, into=memoryview(bytearray(4096))))
        while not w.run("x-query-limits", device="vm")[0]["waiting"]:
            pass
        w.run("x-disk-limit", device="vm", off=True)  # ... and over
        for call in calls:
            guest.link.wait(call)


@operation
def resizes(w: World) -> None:
    w.size += 65536
    w.run("block_resize", device="vm", size=w.size)


@operation
def refused(w: World) -> None:
    (w.folder / "bad.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(100) + b"\xff" * 70_000)
    bad = {"driver": "file", "filename": str(w.folder / "bad.qcow2")}
    for command, given in (
        ("frobnicate", {}),
        ("block-commit", {"device": "none"}),
        ("drive-mirror", {"device": "vm", "target": "/none/x", "sync": "full"}),
        ("drive-backup", {"device": "vm", "target": "/none/x", "sync": "full"}),
        ("blockdev-mirror", {"device": "vm", "target": "vm", "sync": "full", "job-id": "m"}),
        ("blockdev-add", {"driver": "qcow2", "node-name": "bad", "file": bad}),
        ("blockdev-add", {"driver": "qed", "node-name": "bad", "file": bad}),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "none"}),
        ("x-disk-add", {"device": "vm", "filename": "/none"}),
        ("block_resize", {"device": "vm", "size": 1 << 62}),
        ("x-backup-export", {"id": "p", "disks": [{"device": "vm", "name": "vm"}]}),
    ):
        fails(partial(w.say, command, given))
    w.run("human-monitor-command", command_line="frobnicate")


# In this process: nothing of ours is left, and nobody had to look for it ---------------------


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    return Tracker(monkeypatch, of_the_house())


@pytest.fixture
def house(tracker: Tracker, tmp_path: Path) -> Iterator[tuple[World, Daemon]]:
    logging.disable()  # pytest keeps what is logged, with errors and their frames
    daemon, server = Daemon(), None
    events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    chain_of_disks(tmp_path, ["base.raw", "vm.qcow2"], SIZE)
    try:
        server = qmp.server(daemon)
        server.listen_unix(str(tmp_path / "qmp"))
        daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd")})
        daemon.add_export(daemon.open_disk("vm", str(tmp_path / "vm.qcow2")), "vm")
        daemon.events.listen(lambda name, data: events.put((name, data)))
        yield World(tmp_path, daemon.execute, lambda: events.get(timeout=PATIENCE)), daemon
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()
        if server is not None:
            server.stop_listening()
        daemon.close()
        if server is not None:
            server.stop()


def held(tracker: Tracker, daemon: Daemon, path: Path) -> dict[str, int]:
    """How much there is of everything that an operation may leave behind."""
    found = tracker.counts()
    graph, server = daemon.graph, daemon.nbd
    assert server is not None
    for name, table in vars(graph).items():
        if isinstance(table, dict | set | list):
            found[f"graph.{name}"] = len(table)
    found["listeners"] = len(daemon.events.listeners)
    found["jobs"] = len(daemon.jobs.jobs) + len(daemon.jobs.ending) + len(daemon.jobs.groups)
    found["exports"] = len(daemon.exports) + len(server.exports) + len(daemon.pulls)
    found["connections"] = len(server.connections) + len(server.threads)
    found["slots"] = sum(len(disk.gate.slots) for disk in graph.all_disks())
    found["threads"] = threading.active_count()
    mine = str(path)
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found["descriptors"] += os.readlink(f"/proc/self/fd/{fd}").startswith((mine, "socket:"))
    return dict(found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_left_of_an_operation(
    tracker: Tracker, house: tuple[World, Daemon], name: str
) -> None:
    world, daemon = house
    do = OPERATIONS[name]
    for _ in range(BEFORE):
        do(world)
    time.sleep(0.05)
    gc.collect()
    gc.disable()
    before = held(tracker, daemon, world.folder)
    for _ in range(TIMES):
        do(world)
    deadline = time.monotonic() + PATIENCE
    more: dict[str, int] = {}
    while True:  # threads that have told of the end are about to end
        after = held(tracker, daemon, world.folder)
        more = {k: n - before.get(k, 0) for k, n in after.items()}
        more = {k: n for k, n in more.items() if n >= TIMES}
        if not more or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    assert not more


# As a program, a thousand times ---------------------------------------------------------------

FEW, MANY = 50, 1000


if SOAK:  # it takes minutes for each

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_after_a_thousand_the_daemon_is_as_large_as_after_fifty(
        tmp_path: Path, name: str
    ) -> None:
        chain_of_disks(tmp_path, ["base.raw", "vm.qcow2"], SIZE)
        command = [sys.executable, "-m", "cowferry", "serve", f"vm={tmp_path}/vm.qcow2"]
        with subprocess.Popen(
            [*command, "--socket", f"{tmp_path}/nbd"],
            env=environment(tmp_path / "run"), stdout=subprocess.PIPE, text=True,
        ) as child:  # fmt: skip
            try:
                assert child.stdout is not None and child.stdout.readline()
                os.symlink(tmp_path / "run" / "qmp.sock", tmp_path / "qmp")
                with Client(str(tmp_path / "qmp")) as client:

                    def told() -> tuple[str, dict[str, Any]]:
                        found = next(client.wait_events(PATIENCE))
                        return found["event"], found["data"]

                    world = World(tmp_path, client.execute, told)
                    sizes: list[int] = []
                    for times in (FEW, MANY - FEW):
                        for _ in range(times):
                            OPERATIONS[name](world)
                            for path in tmp_path.glob("t*"):
                                if str(path) not in str(client.call("query-block")):
                                    path.unlink()
                        time.sleep(6)  # what is kept for a while has gone
                        sizes.append(resident(child.pid))
                assert sizes[1] < sizes[0] * 1.2
            finally:
                child.terminate()


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
