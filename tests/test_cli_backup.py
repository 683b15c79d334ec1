"""`cowferry backup` as a person types it, and what it is worth: under load, full, killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cowferry
from chains import contents, differs
from cowferry.cli.client import Client
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from daemons import PATIENCE, environment, program
from fio import fio, need_fio
from loops import loop
from orders import until
from test_cli_changes import Ran
from test_cli_changes import cowferry as typed
from test_qmp_no_space import Small, small
from tests_support import need

__all__ = ["small"]

SIZE = 4 << 20
KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB


class Served(NamedTuple):
    """A daemon with disks `vm` (qcow2) and `data` (raw), and what they read as."""

    folder: Path
    oracles: dict[str, bytearray]
    capture: pytest.CaptureFixture[str]
    child: subprocess.Popen[str]

    def run(self, *arguments: str) -> Ran:
        return typed(self.capture, *arguments)

    def good(self, *arguments: str) -> str:
        """What a command prints that has to succeed."""
        status, out, err = self.run(*arguments)
        assert status == 0, (arguments, out, err)
        return out

    def bad(self, *arguments: str) -> str:
        """What a command says that is refused."""
        status, out, err = self.run(*arguments)
        assert status == 1, (arguments, status, out, err)
        return err

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.folder / 'run' / 'nbd.sock'}"

    def write(self, offset: int, byte: bytes, name: str = "vm", length: int = BLOCK) -> None:
        """The guest writes, and flushes."""
        with NbdClient(self.uri(name)) as guest:
            guest.pwrite(byte * length, offset)
            guest.flush()
        self.oracles[name][offset : offset + length] = byte * length

    def bits(self, name: str = "vm") -> list[int] | None:
        """The blocks that bitmap b0 has set; None: there is no such bitmap."""
        with Client(str(self.folder / "run" / "qmp.sock")) as client:
            (found,) = [d for d in client.call("query-block") if d["device"] == name]
            known = found["inserted"].get("dirty-bitmaps", [])
            if not any(b.get("name") == "b0" for b in known):
                return None
            node = found["inserted"]["node-name"]
            client.call(
                "block-export-add", type="nbd", id="bits", name="bits", node_name=node,
                writable=True, bitmaps=["b0"],
            )  # fmt: skip
            try:
                return dirty(self.uri("bits"))
            finally:
                client.call("block-export-del", id="bits", mode="hard")
                hear(client, "BLOCK_EXPORT_DELETED", id="bits")

    def clean(self) -> None:
        """Nothing is left behind in memory or on disk."""
        with Client(str(self.folder / "run" / "qmp.sock")) as client:
            until(lambda: not client.call("query-jobs"), "the end of all jobs")
            assert {e["id"] for e in client.call("query-block-exports")} == {"vm", "data"}
            nodes = client.call("query-named-block-nodes")
            assert not [n for n in nodes if n["drv"] in ("lost", "unknown")]
            assert len(nodes) == 4, nodes
        assert not list(self.folder.glob(".cowferry*"))


def dirty(uri: str) -> list[int]:
    """The blocks that are set in the export's bitmap b0."""
    with NbdClient(uri, ("qemu:dirty-bitmap:b0",)) as client:
        out: list[int] = []
        at = 0
        for length, flags in client.block_status(client.size, 0)["qemu:dirty-bitmap:b0"]:
            if flags:
                out += range(at // BLOCK, -(-(at + length) // BLOCK))
            at += length
    return out


def reads(path: Path) -> bytes:
    """An image and what it lies over, as qemu-img restores it."""
    out = path.parent / "restored"
    command = ["qemu-img", "convert", "-O", "raw", str(path), str(out)]
    subprocess.run(command, check=True, timeout=60)
    got = out.read_bytes()
    out.unlink()
    return got


def images(folder: Path) -> dict[str, bytearray]:
    """The two disks, half full."""
    oracles = {}
    for name, kind in (("vm", "qcow2"), ("data", "raw")):
        path = str(folder / f"{name}.{kind}")
        cowferry.create(path, SIZE, kind)
        half = random.Random(name).randbytes(SIZE // 2)
        with cowferry.open(path) as disk:
            disk.pwrite(memoryview(half), 0)
        oracles[name] = bytearray(half + bytes(SIZE // 2))
    return oracles


@contextmanager
def serving(
    folder: Path, oracles: dict[str, bytearray], capture: pytest.CaptureFixture[str]
) -> Iterator[Served]:
    (folder / "run").mkdir(exist_ok=True)
    disks = [f"vm={folder}/vm.qcow2", f"data={folder}/data.raw"]
    with program(folder / "run", *disks) as (child, line):
        assert line().startswith("vm")
        assert line().startswith("data")
        yield Served(folder, oracles, capture, child)


@pytest.fixture
def served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Served]:
    need("qemu-img")
    monkeypatch.setenv("COWFERRY_RUN", str(tmp_path / "run"))
    monkeypatch.delenv("COWFERRY_QMP", raising=False)
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path, images(tmp_path), capsys) as scene:
        yield scene


@contextmanager
def typing(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`cowferry ARGUMENTS` in a process of its own, to be interrupted."""
    child = subprocess.Popen(
        [sys.executable, "-m", "cowferry", *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(folder / "run"),
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


# Push ----------------------------------------------------------------------------------------


def test_a_chain_of_increments_is_restored_from_its_last(served: Served) -> None:
    moments = [bytes(served.oracles["vm"])]
    served.good("backup", "vm", "b0.qcow2", "--bitmap", "b0")
    for n in range(1, 4):
        served.write(n * 5 * BLOCK, bytes([n]))
        served.write(SIZE - BLOCK, bytes([n]), length=512)
        moments.append(bytes(served.oracles["vm"]))
        out = served.good(
            "backup", "vm", f"b{n}.qcow2", "--incremental", "--bitmap", "b0",
            "--base", f"b{n - 1}.qcow2",
        )  # fmt: skip
        assert "completed, 128 KiB" in out
        assert served.bits() == []
    served.clean()
    for n, moment in enumerate(moments):
        assert not differs(reads(served.folder / f"b{n}.qcow2"), moment), n
    served.good("convert", "b3.qcow2", "whole.raw")
    assert not differs((served.folder / "whole.raw").read_bytes(), moments[-1])


def test_several_disks_as_of_one_moment(served: Served) -> None:
    before = {name: bytes(oracle) for name, oracle in served.oracles.items()}
    disks = ("vm=a.qcow2", "data=b.raw")
    assert "as of one moment" in served.good("backup", *disks, "--bitmap", "b0")
    assert not differs(reads(served.folder / "a.qcow2"), before["vm"])
    assert not differs((served.folder / "b.raw").read_bytes(), before["data"])
    served.write(0, b"1", "vm")
    served.write(BLOCK, b"2", "data")
    served.good(
        "backup", "vm=a1.qcow2", "data=b1.qcow2", "--incremental", "--bitmap", "b0",
        "--base", "vm=a.qcow2", "--base", "data=b.raw",
    )  # fmt: skip
    for name, image in (("vm", "a1.qcow2"), ("data", "b1.qcow2")):
        assert not differs(reads(served.folder / image), served.oracles[name])
    served.clean()


def test_two_backups_of_a_disk_at_once_are_each_of_its_own_moment(served: Served) -> None:
    first = bytes(served.oracles["vm"])
    served.good("backup", "vm", "slow.bak", "--bitmap", "b0", "--speed", "64k", "--async")
    served.write(0, b"1")
    served.good("backup", "vm", "quick.qcow2", "--speed", "1M", "--async")
    second = bytes(served.oracles["vm"])
    served.write(BLOCK, b"2")
    with Client(str(served.folder / "run" / "qmp.sock")) as client:
        for id in ("backup-vm", "backup-vm2"):
            client.call("block-job-set-speed", device=id, speed=0)
    served.clean()
    assert not differs(reads(served.folder / "slow.bak"), first)
    assert not differs(reads(served.folder / "quick.qcow2"), second)
    increment = ("backup", "vm", "inc.qcow2", "--incremental", "--bitmap", "b0")
    assert "its name does not say its format" in served.bad(*increment, "--base", "slow.bak")
    served.good(*increment, "--base", "slow.bak", "--base-format", "qcow2")
    assert not differs(reads(served.folder / "inc.qcow2"), served.oracles["vm"])


def test_the_top_alone_lies_over_the_disks_backing_file(served: Served) -> None:
    served.good("snapshot", "vm=vm.1.qcow2")
    served.write(7 * BLOCK, b"7")
    served.good("backup", "vm", "top.qcow2", "--top")
    assert not differs(reads(served.folder / "top.qcow2"), served.oracles["vm"])
    info = json.loads(served.good("info", "top.qcow2", "--output", "json"))
    assert os.path.basename(info["backing-filename"]) == "vm.qcow2"
    assert info["actual-size"] < SIZE // 4


def test_what_is_refused_says_what_to_do(served: Served) -> None:
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0")
    refused = {
        ("vm", "full.qcow2"): "full.qcow2' exists\n  a backup overwrites no file",
        ("vm", "vm.qcow2"): "vm.qcow2' is the image of disk 'vm'",
        ("vm", "."): "is a folder",
        ("vm", ""): "an empty file name",
        ("nope", "x"): "Cannot find device='nope'",
        ("vm=a", "data"): "'data' needs a destination",
        ("vm", "x", "--incremental", "--bitmap", "b0"): "--base FILE names it",
        ("vm", "x", "--incremental", "--base", "full.qcow2"): "--bitmap NAME names it",
        ("vm", "x", "--base", "full.qcow2"): "no other has one",
        ("vm", "x", "--incremental", "--bitmap", "zz", "--base", "full.qcow2"): "there are: b0",
        ("vm", "x", "--incremental", "--bitmap", "b0", "--base", "no.qcow2"): "is not there",
        ("vm=a", "data=b", "--base", "x=full.qcow2"): "--base x is for none of the disks",
        ("vm", "x.raw", "--incremental", "--bitmap", "b0", "--base", "full.qcow2"):
            "a raw image has no backing file",
        ("vm", "x", "--format", "zzz"): "Unknown driver 'zzz'",
        ("vm", "x", "--scratch", "nowhere"): "is no folder for scratch files",
        ("--end",): "Backup 'pull' not found",
        ("--pull", "nope"): "'nope'",
    }  # fmt: skip
    for arguments, why in refused.items():
        said = served.bad("backup", *arguments)
        assert why in said and "Traceback" not in said, (arguments, said)
        assert not (served.folder / "x").exists()
    for arguments in (
        (), ("vm", "x", "--end"), ("--pull", "--end"), ("vm", "x", "--failed"),
        ("vm", "x", "--top", "--incremental"), ("vm", "--pull", "--top"),
    ):  # fmt: skip
        assert served.run("backup", *arguments)[0] == 2, arguments
    served.write(0, b"x")
    assert served.bits() == [0]
    served.clean()


def test_a_device_that_is_too_small_is_not_said_to_be_removed(served: Served) -> None:
    served.write(0, b"x", length=1 << 20)
    little = served.folder / "little"
    little.write_bytes(bytes(512 << 10))
    with loop(little) as device:
        err = served.bad("backup", "vm", device, "--format", "qcow2")
    assert "is full" in err and f"'{device}' may hold a part of the backup" in err
    assert "removed" not in err


def test_B3_an_interrupted_backup_leaves_nothing_and_every_bit(served: Served) -> None:
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0")
    for block in (1, 20, 40):
        served.write(block * BLOCK, b"1")
    arguments = ("vm", "inc.qcow2", "--incremental", "--bitmap", "b0", "--base", "full.qcow2")
    with typing(served.folder, "backup", *arguments, "--speed", "16k", "--json") as child:
        assert child.stdout is not None
        assert child.stdout.readline()
        served.write(50 * BLOCK, b"2")
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130, (out, err)
    assert "a DEST that the backup made is removed; the bitmap keeps every bit" in err
    assert not (served.folder / "inc.qcow2").exists()
    assert served.bits() == [1, 20, 40, 50]
    served.good("backup", *arguments)
    assert not differs(reads(served.folder / "inc.qcow2"), served.oracles["vm"])
    served.clean()


def test_B3_a_bitmap_whose_first_backup_failed_says_that_all_is_dirty(served: Served) -> None:
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0", "--speed", "16k", "--async")
    served.good("job", "cancel", "backup-vm")
    assert not (served.folder / "full.qcow2").exists()
    assert served.bits() == list(range(SIZE // BLOCK))
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0")
    assert served.bits() == []


def test_B3_what_was_copied_stays_where_the_bitmap_lets_go_of_it(served: Served) -> None:
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0")
    for block in (1, 20, 40):
        served.write(block * BLOCK, b"1")
    always = ("--bitmap", "b0", "--bitmap-mode", "always")
    arguments = ("vm", "inc.qcow2", "--incremental", "--base", "full.qcow2", *always)
    with typing(served.folder, "backup", *arguments, "--speed", "16k", "--json") as child:
        assert child.stdout is not None
        until(lambda: json.loads(child.stdout.readline())["offset"] > 0, "a first block")  # type: ignore[union-attr]
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130, (out, err)
    assert "what was copied stays" in err
    left = served.bits()
    assert left and 1 not in left
    served.good("backup", "vm", "more.qcow2", "--incremental", "--base", "inc.qcow2", *always)
    assert not differs(reads(served.folder / "more.qcow2"), served.oracles["vm"])
    served.clean()


# Pull ----------------------------------------------------------------------------------------


def test_a_pull_backup_is_of_one_moment_and_the_bitmap_goes_on_from_there(served: Served) -> None:
    need("nbdcopy")
    first = json.loads(served.good("backup", "--pull", "vm", "data", "--bitmap", "b0", "--async",
                                   "--json"))  # fmt: skip
    moment = {name: bytes(oracle) for name, oracle in served.oracles.items()}
    for name in moment:
        served.write(3 * BLOCK, b"3", name)
    for disk in first["disks"]:
        copy = served.folder / f"{disk['device']}.copy"
        subprocess.run(["nbdcopy", disk["uris"][0], str(copy)], check=True, timeout=60)
        assert not differs(copy.read_bytes(), moment[disk["device"]])
        assert dirty(disk["uris"][0]) == list(range(SIZE // BLOCK)), "the first: all is new"
    assert "in use" in served.bad("backup", "vm", "x.qcow2", "--bitmap", "b0")
    served.good("backup", "--end")
    served.clean()
    assert served.bits("vm") == served.bits("data") == [3]
    served.good("backup", "--pull", "vm", "--bitmap", "b0", "--async")
    served.write(5 * BLOCK, b"5")
    assert dirty(served.uri("pull-vm")) == [3]
    with NbdClient(served.uri("pull-vm")) as client:
        assert client.pread(BLOCK, 5 * BLOCK) != b"5" * BLOCK
        served.good("backup", "--end", "--failed")  # with a client
        with pytest.raises((OSError, EOFError)):
            client.pread(BLOCK, 0)
    assert served.bits() == [3, 5]
    served.clean()


@pytest.mark.parametrize("how", ["Ctrl-C", "--end"])
def test_a_pull_backup_is_held_until_it_is_ended(served: Served, how: str) -> None:
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0")
    served.write(3 * BLOCK, b"3")
    with typing(served.folder, "backup", "--pull", "vm", "--bitmap", "b0") as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline().strip() == f"vm: {served.uri('pull-vm')}"
        assert "kept until it is ended with: cowferry backup --end" in child.stderr.readline()
        served.write(5 * BLOCK, b"5")
        if how == "Ctrl-C":
            child.send_signal(signal.SIGINT)
        else:
            served.good("backup", "--end")
        out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == (130 if how == "Ctrl-C" else 0), (out, err)
    assert ("called off" if how == "Ctrl-C" else "ended") in err
    assert served.bits() == ([3, 5] if how == "Ctrl-C" else [5])
    served.clean()


def test_a_daemon_that_stops_ends_a_pull_backup(served: Served) -> None:
    served.good("backup", "--pull", "vm", "--bitmap", "b0", "--async")
    served.write(3 * BLOCK, b"3")
    with NbdClient(served.uri("pull-vm")):
        served.good("stop", "--force")
        assert served.child.wait(PATIENCE) == 0
    assert not list(served.folder.glob(".cowferry*"))
    with serving(served.folder, served.oracles, served.capture) as again:
        assert again.bits() == list(range(SIZE // BLOCK)), "the backup was not ended well"


# No room -------------------------------------------------------------------------------------


def test_a_scratch_file_that_is_full_costs_the_backup_and_not_the_guest(
    served: Served, small: Small
) -> None:
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0")
    served.write(3 * BLOCK, b"3")
    arguments = ("--pull", "vm", "data", "--bitmap", "b0", "--scratch", str(small.path))
    with typing(served.folder, "backup", *arguments) as child:
        assert child.stdout is not None
        assert child.stdout.readline()
        small.fill(128 * KIB)
        for block in range(10, 20):
            served.write(block * BLOCK, b"x")
        out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 1, (out, err)
    assert "the moment of 'vm' is lost" in err and "No space left on device" in err
    assert served.bits() == [3, *range(10, 20)]
    with NbdClient(served.uri("vm")) as guest:
        assert not differs(guest.pread(SIZE, 0), served.oracles["vm"])
    served.clean()


@pytest.mark.parametrize("policy", ["report", "enospc"])
def test_a_destination_that_is_full(served: Served, small: Small, policy: str) -> None:
    small.fill(MIB)
    dest = small.path / "full.qcow2"
    moment = bytes(served.oracles["vm"])
    arguments = ("backup", "vm", str(dest), "--on-target-error", policy)
    if policy == "report":
        said = served.bad(*arguments)
        assert "No space left on device" in said and "run it again" in said
        assert not dest.exists()
        served.clean()
        return
    with typing(served.folder, *arguments) as child:
        assert child.stderr is not None
        assert "cowferry job resume backup-vm" in child.stderr.readline()
        for block in range(40):
            served.write(block * BLOCK, b"x")
        small.empty()
        served.good("job", "resume", "backup-vm")
        out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, (out, err)
    assert not differs(reads(dest), moment)
    served.clean()


def test_a_group_of_backups_ends_well_or_leaves_nothing(served: Served, small: Small) -> None:
    served.good("backup", "vm=v0.qcow2", "data=d0.qcow2", "--bitmap", "b0")
    for name in ("vm", "data"):
        served.write(0, b"1", name, length=2 * MIB)
    small.fill(MIB)
    arguments = (
        "backup", "vm=v1.qcow2", f"data={small.path}/d1.qcow2", "--incremental", "--bitmap", "b0",
        "--base", "vm=v0.qcow2", "--base", "data=d0.qcow2",
    )  # fmt: skip
    said = served.bad(*arguments)
    assert "backup-group-data: No space left on device" in said
    assert "DESTs that the backup made are removed; the bitmap keeps every bit" in said
    assert not (served.folder / "v1.qcow2").exists() and not (small.path / "d1.qcow2").exists()
    assert served.bits("vm") == served.bits("data") == list(range(2 * MIB // BLOCK))
    served.clean()
    small.empty()
    served.good(*arguments)
    assert not differs(reads(served.folder / "v1.qcow2"), served.oracles["vm"])
    assert served.bits("vm") == served.bits("data") == []


def test_a_backup_goes_to_a_server_and_the_human_monitor_makes_one(
    served: Served, tmp_path: Path
) -> None:
    need("nbdkit")
    where = tmp_path / "t.sock"
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(where), "memory", str(SIZE)])
    try:
        until(where.exists, "nbdkit's socket")
        uri = f"nbd+unix:///?socket={where}"
        served.good("backup", "vm", uri)
        with NbdClient(uri) as far:
            assert not differs(far.pread(SIZE, 0), served.oracles["vm"])
    finally:
        server.terminate()
        server.wait(PATIENCE)
    served.good("monitor", f"drive_backup -c -f vm {tmp_path}/m.qcow2 qcow2")
    served.clean()
    assert not differs(reads(tmp_path / "m.qcow2"), served.oracles["vm"])
    assert "Compression is not supported" in served.bad("monitor", "drive_backup -c vm x.raw raw")


def test_a_destination_that_fails_for_a_while(served: Served, tmp_path: Path) -> None:
    """nbdkit's error filter: writes fail as long as a file is there."""
    need("nbdkit")
    broken = tmp_path / "broken"
    broken.touch()
    where = tmp_path / "t.sock"
    command = [
        "nbdkit", "-f", "-U", str(where), "--filter=error", "memory", str(SIZE),
        "error-pwrite-rate=100%", f"error-file={broken}",
    ]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        until(where.exists, "nbdkit's socket")
        with Client(str(served.folder / "run" / "qmp.sock")) as client:
            at = {"type": "unix", "path": str(where)}
            client.call("blockdev-add", driver="nbd", node_name="far", server=at)
            moment = bytes(served.oracles["data"])
            client.call(
                "blockdev-backup", job_id="j", device="data", target="far", sync="full",
                on_target_error="stop",
            )  # fmt: skip
            hear(client, "BLOCK_JOB_ERROR", operation="write", action="stop")
            for block in range(0, SIZE // BLOCK, 2):
                served.write(block * BLOCK, b"y", "data")
            broken.unlink()
            until(lambda: client.call("query-jobs")[0]["status"] == "paused", "the pause")
            client.call("job-resume", id="j")
            assert "error" not in hear(client, "BLOCK_JOB_COMPLETED")
            client.call("blockdev-del", node_name="far")
        with NbdClient(f"nbd+unix:///?socket={where}") as far:
            assert not differs(far.pread(SIZE, 0), moment)
    finally:
        server.terminate()
        server.wait(PATIENCE)


def test_K2_a_destination_that_hangs_does_not_hold_the_guest(
    served: Served, tmp_path: Path
) -> None:
    """nbdkit's pause filter: it answers no more until it is told to. Not one write of the guest
    needs an answer of the destination: from the first, and while there is room for old data."""
    need("nbdkit")
    where, control = tmp_path / "t.sock", tmp_path / "control"
    server = subprocess.Popen([
        "nbdkit", "-f", "-U", str(where), "--filter=pause", "memory", str(SIZE),
        f"pause-control={control}",
    ])  # fmt: skip
    try:
        until(where.exists, "nbdkit's socket")
        with (
            socket.socket(socket.AF_UNIX) as told,
            Client(str(tmp_path / "run/qmp.sock")) as client,
        ):
            at = {"type": "unix", "path": str(where)}
            client.call("blockdev-add", driver="nbd", node_name="far", server=at)
            told.connect(str(control))
            told.sendall(b"p")
            assert told.recv(1) == b"P"
            moment = bytes(served.oracles["data"])
            client.call("blockdev-backup", job_id="j", device="data", target="far", sync="full")
            for block in range(SIZE // BLOCK):
                served.write(block * BLOCK, b"z", "data", length=5000)
            (job,) = client.call("query-block-jobs")
            assert job["offset"] == 0, "it did not hang"
            told.sendall(b"r")
            assert told.recv(1) == b"R"
            assert "error" not in hear(client, "BLOCK_JOB_COMPLETED")
            client.call("blockdev-del", node_name="far")
        with NbdClient(f"nbd+unix:///?socket={where}") as far:
            assert not differs(far.pread(SIZE, 0), moment)
    finally:
        server.kill()  # which it may not hear otherwise, while it is paused
        server.wait(PATIENCE)


def hear(client: Client, event: str, **members: Any) -> dict[str, Any]:
    """The next event of that name, which has those members."""
    for heard in client.wait_events(PATIENCE):
        if heard["event"] == event:
            data: dict[str, Any] = heard["data"]
            assert {k: data[k] for k in members} == members
            return data
    raise AssertionError(f"no {event}")


# Killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["full", "increment", "pull"])
def test_B2_after_kill_9_the_disk_is_right_and_the_bitmap_a_superset(
    served: Served, what: str
) -> None:
    served.good("backup", "vm", "full.qcow2", "--bitmap", "b0")
    for block in (1, 20, 40):
        served.write(block * BLOCK, b"1")
    slowly = ("--bitmap", "b0", "--speed", "16k", "--async")
    if what == "full":
        served.good("backup", "vm", "again.qcow2", *slowly)
    elif what == "increment":
        served.good("backup", "vm", "inc.qcow2", "--incremental", "--base", "full.qcow2", *slowly)
    else:
        served.good("backup", "--pull", "vm", "--bitmap", "b0", "--async")
    served.write(30 * BLOCK, b"2")
    served.child.kill()
    served.child.wait(PATIENCE)
    assert not list(served.folder.glob(".cowferry*")), "a scratch file stayed behind"
    with serving(served.folder, served.oracles, served.capture) as again:
        found = again.bits()
        assert found is not None and {1, 20, 30, 40} <= set(found)
        with NbdClient(again.uri("vm")) as guest:
            assert not differs(guest.pread(SIZE, 0), again.oracles["vm"])
        (again.folder / "inc.qcow2").unlink(missing_ok=True)
        again.good("backup", "vm", "inc.qcow2", "--incremental", "--bitmap", "b0",
                   "--base", "full.qcow2")  # fmt: skip
        assert not differs(reads(again.folder / "inc.qcow2"), again.oracles["vm"])
        again.clean()


# Under load ----------------------------------------------------------------------------------


class Writer(threading.Thread):
    """A guest with three disks. Generation n is written to the first, then to the second, then to
    the third, each answered before the next: at one moment they are n, n, n, or n+1, n, n, or
    n+1, n+1, n. What a generation writes follows from its number, so each disk can be told."""

    PART = 2 * MIB  # bytes at the beginning of each disk that it writes to

    def __init__(self, uris: list[str]) -> None:
        super().__init__(daemon=True)
        self.uris = uris
        self.done = threading.Event()
        self.generation = 0
        self.failed: BaseException | None = None

    @classmethod
    def write(cls, disk: int, generation: int) -> tuple[int, bytes]:
        """(offset, data) of a generation: its number at the start of the disk, every other time."""
        rnd = random.Random(disk << 40 | generation)
        length = 512 * rnd.choice([1, 8, 40, 200])
        offset = 512 * rnd.randrange(1, (cls.PART - length) // 512)
        return offset, rnd.randbytes(length)

    def run(self) -> None:
        try:
            with ExitStack() as stack:
                disks = [stack.enter_context(NbdClient(uri)) for uri in self.uris]
                while not self.done.is_set():
                    generation = self.generation + 1
                    for n, disk in enumerate(disks):
                        offset, data = self.write(n, generation)
                        disk.pwrite(data, offset)
                    self.generation = generation
        except BaseException as error:
            self.failed = error

    def told(self, disk: int, got: bytes, least: int, most: int) -> set[int]:
        """The generations that a disk may be at which reads so."""
        part = bytearray(self.PART)
        found = set()
        for generation in range(1, most + 1):
            offset, data = self.write(disk, generation)
            part[offset : offset + len(data)] = data
            if generation >= least and part == got[: self.PART]:
                found.add(generation)
        return found


def test_K1_a_pull_backup_of_three_disks_under_load_is_of_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """fio writes to the rest of each disk. Taken by nbdcopy, and again by qemu-img."""
    need_fio()
    need("nbdcopy", "qemu-img", "nbdinfo")
    monkeypatch.setenv("COWFERRY_RUN", str(tmp_path / "run"))
    monkeypatch.delenv("COWFERRY_QMP", raising=False)
    monkeypatch.chdir(tmp_path)
    size = 12 * MIB
    names = {"one": "qcow2", "two": "raw", "three": "qcow2"}
    for name, kind in names.items():
        cowferry.create(str(tmp_path / f"{name}.{kind}"), size, kind)
    (tmp_path / "run").mkdir()
    where = tmp_path / "run" / "nbd.sock"
    disks = [f"{name}={tmp_path}/{name}.{kind}" for name, kind in names.items()]
    with program(tmp_path / "run", *disks) as (_, line):
        for name in names:
            assert line().startswith(name)
        uris = {name: f"nbd+unix:///{name}?socket={where}" for name in names}
        writer = Writer(list(uris.values()))
        load = fio(tmp_path, [
            [f"name={name}", "ioengine=nbd", f"uri={uri}", "rw=randwrite", "bsrange=4k-128k",
             f"offset={writer.PART}", f"size={size - writer.PART}", "iodepth=4", "rate=8m",
             "loops=1000000", "verify=crc32c", "verify_fatal=1", "do_verify=1"]
            for name, uri in uris.items()
        ])  # fmt: skip
        try:
            writer.start()
            for turn in range(2):
                until(lambda: writer.generation > 40 * (turn + 1), "the guest's writes")  # noqa: B023
                least = writer.generation
                status, out, err = typed(
                    capsys, "backup", "--pull", *names, "--bitmap", "b0", "--async", "--json"
                )
                most = writer.generation + 1
                assert status == 0, (out, err)
                taken = taken_twice(tmp_path, json.loads(out), writer, turn)
                told = [
                    writer.told(n, taken[name], least, most + 1) for n, name in enumerate(names)
                ]
                assert all(told), "a disk is of no moment at all"
                assert any(
                    a - 1 <= c <= b <= a for a in told[0] for b in told[1] for c in told[2]
                ), f"the disks are of different moments: {told}"
                assert typed(capsys, "backup", "--end")[0] == 0
            assert load.poll() is None and writer.failed is None
        finally:
            writer.done.set()
            load.send_signal(signal.SIGINT)
            said, _ = load.communicate(timeout=PATIENCE)
            writer.join(PATIENCE)
        assert writer.failed is None
        assert "verify: bad" not in said, said


def taken_twice(folder: Path, found: dict[str, Any], writer: Writer, turn: int) -> dict[str, bytes]:
    """What nbdcopy reads of each disk, and qemu-img again, with the guest on its way meanwhile."""
    taken: dict[str, bytes] = {}
    for disk in found["disks"]:
        name, (uri,) = disk["device"], disk["uris"]
        first, second = folder / f"{name}.1", folder / f"{name}.2"
        subprocess.run(["nbdcopy", uri, str(first)], check=True, timeout=60)
        before = writer.generation
        until(lambda: writer.generation > before + 20, "the guest's writes")  # noqa: B023
        command = ["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(second)]
        subprocess.run(command, check=True, timeout=60)
        taken[name] = first.read_bytes()
        assert not differs(second.read_bytes(), taken[name]), "the view has changed"
        command = ["nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", uri]
        said = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        changed = sum(m["length"] for m in json.loads(said) if m["type"])
        assert changed == len(taken[name]) if turn == 0 else changed
        if turn:  # what changed since the last time, laid over that, is this time
            last = bytearray((folder / f"{name}.last").read_bytes())
            for m in json.loads(said):
                if m["type"]:
                    part = slice(m["offset"], m["offset"] + m["length"])
                    last[part] = taken[name][part]
            assert not differs(last, taken[name]), "a change was missed"
        first.rename(folder / f"{name}.last")
    return taken


# The library ---------------------------------------------------------------------------------


def test_the_library_backs_up(tmp_path: Path) -> None:
    oracles = images(tmp_path)
    seen: list[tuple[int, int]] = []
    with (
        cowferry.open(str(tmp_path / "vm.qcow2")) as vm,
        cowferry.open(str(tmp_path / "data.raw")) as data,
    ):
        both = {vm: str(tmp_path / "a.qcow2"), data: str(tmp_path / "b.raw")}
        cowferry.backup(both, bitmap="b0", progress=lambda done, all: seen.append((done, all)))
        vm.pwrite(memoryview(b"n" * 512), 0)
        cowferry.backup(
            vm, str(tmp_path / "a1.qcow2"), mode="incremental", bitmap="b0",
            base=str(tmp_path / "a.qcow2"),
        )  # fmt: skip
        with pytest.raises(CowferryError, match="exists"):
            cowferry.backup(vm, str(tmp_path / "a1.qcow2"))
        with pytest.raises(CowferryError, match="needs a target"):
            cowferry.backup(vm)
    for name, image in (("vm", "a.qcow2"), ("data", "b.raw")):
        assert not differs(reads_as(tmp_path / image), oracles[name])
    oracles["vm"][:512] = b"n" * 512
    assert not differs(reads_as(tmp_path / "a1.qcow2"), oracles["vm"])


def test_the_library_s_pull_is_a_context(tmp_path: Path) -> None:
    oracles = images(tmp_path)
    with cowferry.open(str(tmp_path / "vm.qcow2")) as vm:
        with cowferry.pull(vm, bitmap="b0") as uris, NbdClient(uris[vm]) as client:
            vm.pwrite(memoryview(b"n" * BLOCK), BLOCK)
            assert not differs(client.pread(SIZE, 0), oracles["vm"])
        bitmap = vm.root.bitmaps["b0"]
        assert list(bitmap.runs()) == [(BLOCK, BLOCK)]
        with pytest.raises(ZeroDivisionError), cowferry.pull(vm, bitmap="b0"):
            vm.pwrite(memoryview(b"m" * BLOCK), 3 * BLOCK)
            1 / 0  # noqa: B018
        assert list(bitmap.runs()) == [(BLOCK, BLOCK), (3 * BLOCK, BLOCK)]
        assert not vm.taps
    assert not list(tmp_path.glob(".cowferry*"))


def reads_as(path: Path) -> bytearray:
    """All bytes of an image and what it lies over."""
    node = opening.open_image(str(path), read_only=True)
    try:
        return contents(node)
    finally:
        opening.close_chain(node)
