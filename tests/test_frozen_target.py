"""A server that freezes (SIGSTOP) below a job: the guest goes on, or is freed when the job is given
up; and until the decision is durable every ending can be given up."""

from __future__ import annotations

import errno
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chains import make_base, overlay
from cowferry.block import moves
from cowferry.daemon import Daemon
from cowferry.drivers.nbd_client import NbdClient
from cowferry.drivers.opening import create_image
from cowferry.errors import CowferryError
from cowferry.jobs import follow
from cowferry.jobs import job as jobs
from daemons import PATIENCE, Told, a_daemon
from nbd_servers import freeze, nbdkit, until
from tests_support import need

SIZE = 8 << 20
SOON = 5.0  # seconds: what does not wait is over by then, however busy the machine is
GRACE = 0.3  # seconds, instead of the five that a job has to stop by itself


class Rig:
    """A daemon with an overlay `vm` that a guest writes, and a node `far` on a server."""

    def __init__(self, daemon: Daemon, server: subprocess.Popen[bytes], oracle: bytearray) -> None:
        self.daemon, self.server, self.oracle = daemon, server, oracle
        self.told = Told(daemon)
        self.pool = ThreadPoolExecutor(8)
        assert daemon.nbd is not None
        self.guest = NbdClient(daemon.nbd.uri("vm"), timeout=PATIENCE)

    def run(self, command: str, **arguments: Any) -> Any:
        """A command, which must not wait."""
        given = {k.replace("_", "-"): v for k, v in arguments.items()}
        return self.pool.submit(self.daemon.execute, command, given).result(SOON)

    def freeze(self) -> None:
        """Stop the server. On return none of its threads answers any more."""
        freeze(self.server)

    def thaw(self) -> None:
        self.server.send_signal(signal.SIGCONT)

    def write(self, offset: int, length: int = 4096, byte: bytes = b"g") -> None:
        """The guest writes, and is answered."""
        self.guest.pwrite(byte * length, offset)
        self.oracle[offset : offset + length] = byte * length

    def writing(self, offset: int, length: int = 4096, byte: bytes = b"h") -> Future[None]:
        """The guest writes, and may wait."""
        return self.pool.submit(self.write, offset, length, byte)

    def hangs(self, job: str) -> None:
        """Wait until a request of the daemon is on its way to the frozen server."""
        node = self.daemon.graph.nodes["far"]
        until(lambda: getattr(node, "_since", {}))

    def ended(self, job: str) -> str:
        """How the job ends, within the time that a forced cancel may take."""
        begin = time.monotonic()
        while True:
            name, data = self.told.queue.get(timeout=PATIENCE)
            if name in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") and data["device"] == job:
                assert time.monotonic() - begin < 10 - 5, "and the grace of a real daemon"
                return "failed" if "error" in data else name.removeprefix("BLOCK_JOB_").lower()

    def check(self) -> None:
        """The guest reads what it has written."""
        got = self.pool.submit(lambda: bytes(self.guest.pread(SIZE, 0))).result(SOON)
        assert got == bytes(self.oracle)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    need("nbdkit")
    monkeypatch.setattr(jobs, "GRACE", GRACE)
    oracle = make_base(tmp_path, SIZE)
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    socket = tmp_path / "nk.sock"
    with nbdkit(socket, "memory", str(SIZE)) as server, a_daemon() as daemon:
        daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd.sock")})
        daemon.add_export(daemon.open_disk("vm", str(tmp_path / "vm.qcow2")), "vm")
        where = {"type": "unix", "path": str(socket)}
        daemon.execute("blockdev-add", {"driver": "nbd", "node-name": "far", "server": where})
        made = Rig(daemon, server, oracle)
        try:
            yield made
        finally:
            made.thaw()
            made.guest.close()
            made.pool.shutdown()


def mirror(rig: Rig, mode: str, **more: Any) -> None:
    rig.run(
        "blockdev-mirror", job_id="m", device="vm", target="far", sync="full", copy_mode=mode,
        on_target_error="stop", **more,
    )  # fmt: skip


def ready(rig: Rig, mode: str, **more: Any) -> None:
    mirror(rig, mode, **more)
    rig.told.wait("BLOCK_JOB_READY", device="m")


def cancel(rig: Rig) -> None:
    rig.run("block-job-cancel", device="m", force=True)


def test_a_guest_goes_on_while_a_background_copy_waits(rig: Rig) -> None:
    """Allocating writes and what comes behind them on the connection, in the very range."""
    rig.freeze()
    mirror(rig, "background")
    rig.hangs("m")
    for offset in range(0, SIZE, 256 << 10):
        rig.writing(offset).result(SOON)
    rig.check()
    cancel(rig)
    assert rig.ended("m") == "cancelled"
    rig.check()


def test_M1_what_a_guest_wrote_behind_a_copy_that_hung_reaches_the_target(rig: Rig) -> None:
    rig.freeze()
    mirror(rig, "background")
    rig.hangs("m")
    for offset in range(0, SIZE, 512 << 10):
        rig.writing(offset).result(SOON)
    rig.thaw()
    rig.told.wait("BLOCK_JOB_READY", device="m")
    rig.run("block-job-cancel", device="m")
    assert rig.ended("m") == "completed"
    far = rig.daemon.graph.nodes["far"]
    view = memoryview(bytearray(SIZE))
    far.pread(view, 0)
    assert view == rig.oracle


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("how", ["soft", "complete", "running"])
def test_every_ending_can_be_given_up_while_the_target_is_frozen(
    rig: Rig, mode: str, how: str
) -> None:
    if how == "running":
        rig.freeze()
        mirror(rig, mode)
    else:
        ready(rig, mode)
        if mode == "background":
            rig.freeze()
        rig.write(0)
        rig.freeze()
        rig.run(*(("block-job-cancel",) if how == "soft" else ("job-complete",)), **(
            {"device": "m"} if how == "soft" else {"id": "m"}
        ))  # fmt: skip
    rig.hangs("m")
    guest = rig.writing(SIZE // 2)
    cancel(rig)
    assert rig.ended("m") == "cancelled"
    guest.result(SOON)
    rig.check()
    assert rig.daemon.graph.disk("vm").root.filename.endswith("vm.qcow2")
    assert not rig.daemon.graph.disk("vm").taps
    assert not list(Path(rig.daemon.graph.disk("vm").root.filename).parent.glob("*.moved"))


@pytest.mark.parametrize("error", [False, True])
def test_a_write_is_answered_when_the_job_that_it_waits_for_ends(rig: Rig, error: bool) -> None:
    """The job itself does not wait for the target, and ends at once. So does the guest's wait."""
    ready(rig, "write-blocking")
    job = rig.daemon.jobs.jobs["m"]
    rig.freeze()
    guest = rig.writing(0)
    rig.hangs("m")
    begin = time.monotonic()
    if error:  # as if another write had met an error that ends the job
        job.on_target_error = "report"  # type: ignore[attr-defined]
        job._tap_error = OSError(errno.EIO, "a test")  # type: ignore[attr-defined]
    else:
        cancel(rig)
    assert rig.ended("m") == ("failed" if error else "cancelled")
    guest.result(SOON)
    assert time.monotonic() - begin < SOON  # and not only when the target may take no longer
    rig.check()
    assert not rig.daemon.graph.disk("vm").taps


def test_a_write_that_the_target_does_not_take_is_answered_after_a_while(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In write-blocking mode, by the error policy; and the copy goes on from there."""
    monkeypatch.setattr(follow, "TAP_SECONDS", 0.5)
    ready(rig, "write-blocking")
    rig.freeze()
    rig.writing(0).result(SOON)
    rig.told.wait("BLOCK_JOB_ERROR", device="m", action="stop")
    begin = time.monotonic()
    for offset in range(0, SIZE, 1 << 20):  # nobody waits for it again and again
        rig.writing(offset).result(SOON)
    assert time.monotonic() - begin < SOON
    rig.thaw()
    until(lambda: rig.daemon.jobs.jobs["m"].user_paused)
    rig.run("job-resume", id="m")
    until(lambda: rig.run("query-block-jobs")[0]["actively-synced"])
    rig.run("job-complete", id="m")
    assert rig.ended("m") == "completed"
    rig.check()
    assert rig.daemon.graph.disk("vm").root.name == "far"


def test_a_cancel_comes_too_late_once_it_is_decided(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(rig, "background")
    refused: list[CowferryError] = []

    def record(moving: Any) -> None:
        try:
            rig.run("job-cancel", id="m")
        except CowferryError as error:
            refused.append(error)

    monkeypatch.setattr(moves, "record", record)
    rig.run("job-complete", id="m")
    assert rig.ended("m") == "completed"
    assert len(refused) == 1 and "being recorded" in refused[0].hint
    assert rig.daemon.graph.disk("vm").root.name == "far"


def test_a_member_of_a_group_that_hangs_is_given_up(rig: Rig, tmp_path: Path) -> None:
    create_image(str(tmp_path / "two.raw"), "raw", SIZE, {})
    rig.run("x-disk-add", device="two", filename=str(tmp_path / "two.raw"))
    uri = f"nbd+unix:///?socket={tmp_path / 'nk.sock'}"
    rig.run("blockdev-del", node_name="far")
    members = [
        {"device": "vm", "target": uri}, {"device": "two", "target": str(tmp_path / "copy.raw")},
    ]  # fmt: skip
    rig.run("x-group-start", id="g", type="copy", members=members)
    rig.told.wait("JOB_GROUP_READY", id="g")
    rig.freeze()
    rig.write(0)
    rig.run("x-group-complete", id="g")
    node = next(n for n in rig.daemon.graph.every_node() if n.driver == "nbd")
    until(lambda: getattr(node, "_since", {}))
    rig.run("x-group-cancel", id="g")
    rig.told.wait("JOB_GROUP_COMPLETED", id="g")
    rig.writing(SIZE // 2).result(SOON)
    rig.check()
    for disk in ("vm", "two"):
        assert "copy" not in rig.daemon.graph.disk(disk).root.filename
    assert not (tmp_path / "copy.raw").exists()


@pytest.mark.parametrize("limit", [0, 64 << 10])
def test_K2_a_backup_to_a_frozen_target_is_given_up(rig: Rig, limit: int) -> None:
    """With room for old bytes the guest does not notice; without, it waits until the cancel."""
    rig.freeze()
    rig.run(
        "blockdev-backup", job_id="b", device="vm", target="far", sync="full", x_scratch_limit=limit
    )
    rig.hangs("b")
    guests = [rig.writing(offset, 64 << 10) for offset in range(0, SIZE, 64 << 10)]
    if not limit:
        for guest in guests:
            guest.result(SOON)
    rig.run("job-cancel", id="b")
    assert rig.ended("b") == "cancelled"
    for guest in guests:
        guest.result(SOON)
    rig.check()


def frozen_chain(rig: Rig, tmp_path: Path, *names: str) -> None:
    """A disk `top` over images over the server's export."""
    view = memoryview(bytearray(b"s" * SIZE))
    rig.daemon.graph.nodes["far"].pwrite(view, 0)
    below = "far"
    for name in names:
        path = str(tmp_path / f"{name}.qcow2")
        create_image(path, "qcow2", SIZE, {})
        file = {"driver": "file", "filename": path}
        rig.run("blockdev-add", driver="qcow2", node_name=name, file=file, backing=below)
        rig.daemon.graph.disk(name).pwrite(memoryview(b"t" * (64 << 10)), 0)
        below = name


@pytest.mark.parametrize("what", ["block-stream", "active", "commit"])
def test_a_job_over_a_frozen_base_is_given_up(rig: Rig, tmp_path: Path, what: str) -> None:
    frozen_chain(rig, tmp_path, "mid", "top")
    rig.run("block-export-add", type="nbd", id="top", node_name="top", name="top", writable=True)
    assert rig.daemon.nbd is not None
    with NbdClient(rig.daemon.nbd.uri("top"), timeout=PATIENCE) as guest:
        if what == "commit":
            arguments = {"top-node": "mid", "base-node": "far"}
        else:
            arguments = {"base-node": "far"} if what == "active" else {}
        rig.freeze()
        rig.daemon.execute(
            "block-stream" if what == "block-stream" else "block-commit",
            {"job-id": "m", "device": "top", **arguments},
        )
        rig.hangs("m")
        done = threading.Event()

        def work() -> None:
            guest.pwrite(b"u" * (64 << 10), 0)
            done.set()

        threading.Thread(target=work, daemon=True).start()
        rig.run("job-cancel", id="m")
        assert rig.ended("m") == "cancelled"
        assert done.wait(SOON)
        rig.thaw()
        assert bytes(guest.pread(128 << 10, 0)) == b"u" * (64 << 10) + b"s" * (64 << 10)
    rig.run("block-export-del", id="top", mode="hard")
