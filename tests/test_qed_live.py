"""QED in a daemon: everything that is done to qcow2 disks, under a guest that checks itself."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from chains import contents, differs, make_base
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.drivers.qed import header
from cowferry.errors import CowferryError
from daemons import PATIENCE, Told, a_daemon, program
from fio import need_fio
from test_cli_offline import cowferry
from test_use_cases import digest, scene
from tests_support import need

SIZE = 1 << 20


def test_a_disk_goes_through_every_operation_in_QED_while_its_guest_writes(tmp_path: Path) -> None:
    need("qemu-img")
    need_fio()
    with scene(tmp_path, "base.raw", "s1.qed", "vm.qed") as s:
        call, event, src = s.vm.client.call, s.vm.event, s.src
        assert s.vm.tree("vm")[0] == "base.raw <- s1.qed <- vm.qed"

        next_, last = str(src / "next.qed"), str(src / "last.qed")
        call("blockdev-snapshot-sync", device="vm", snapshot_file=next_, format="qed")
        frozen = digest(src / "vm.qed")
        s.goes_on(1)
        assert digest(src / "vm.qed") == frozen, "S2: the old top changed after the snapshot"

        call(
            "block-commit",
            device="vm",
            job_id="c",
            top=str(src / "vm.qed"),
            base=str(src / "s1.qed"),
        )
        event("BLOCK_JOB_COMPLETED", device="c")
        assert s.vm.tree("vm")[0] == "base.raw <- s1.qed <- next.qed"

        call("block-stream", device="vm", job_id="s", base=str(src / "base.raw"))
        event("BLOCK_JOB_COMPLETED", device="s")
        assert s.vm.tree("vm")[0] == "base.raw <- next.qed"

        call("x-disk-snapshot", disks=[{"device": "vm", "snapshot-file": last}])
        s.goes_on(1)
        call("block-commit", device="vm", job_id="a", base=next_)
        s.vm.pivot("a")
        assert s.vm.tree("vm")[0] == "base.raw <- next.qed"

        s.copy("copy.qed", keep=["*"])
        assert s.vm.tree("vm") == ("base.raw <- copy.qed", [s.dst, s.dst])
        call("block-stream", device="vm", job_id="w")
        event("BLOCK_JOB_COMPLETED", device="w")
        assert s.vm.tree("vm")[0] == "copy.qed"
        s.compare(vm=s.dst / "copy.qed")
        for image in (s.dst / "copy.qed", src / "next.qed"):
            assert not image.read_bytes()[16] & header.NEED_CHECK
            done = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True)
            assert done.returncode in (0, 3), done.stdout + done.stderr


def test_a_daemon_that_is_killed_leaves_what_was_flushed_and_says_that_it_must_be_checked(
    tmp_path: Path,
) -> None:
    path = tmp_path / "vm.qed"
    oracle = make_base(tmp_path, SIZE)
    cowferry("create", "-q", "-b", "base.raw", "-F", "raw", path)
    run = tmp_path / "run"
    for round in range(2):
        with (
            program(run, f"vm={path}") as (process, line),
            NbdClient(line().split(": ", 1)[1].strip()) as client,
        ):
            assert client.pread(SIZE, 0) == oracle
            data = os.urandom(70_000)
            at = round * 300_000 + 77
            client.pwrite(data, at)
            client.flush()
            oracle[at : at + len(data)] = data
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
        assert path.read_bytes()[16] & header.NEED_CHECK
    assert not differs(contents_of(path), oracle)
    cowferry("check", path)


def contents_of(path: Path) -> bytearray:
    node = opening.open_image(str(path))
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


def disk(daemon: Daemon, folder: Path, name: str, format: str) -> Path:
    path = folder / name
    opening.create_image(str(path), format, SIZE, {})
    daemon.open_disk("vm", str(path), format)
    return path


def test_an_overlay_that_could_not_say_what_it_lies_on_is_not_made(tmp_path: Path) -> None:
    with a_daemon() as daemon:
        path = disk(daemon, tmp_path, "vm.img", "qcow2")
        new = tmp_path / "new.qed"
        given = {"device": "vm", "snapshot-file": str(new), "format": "qed"}
        with pytest.raises(CowferryError, match="cannot record that its backing file"):
            daemon.execute("blockdev-snapshot-sync", given)
        assert not new.exists() and daemon.graph.disk("vm").root.filename == str(path)
        opening.create_image(str(new), "qed", SIZE, {})
        file = {"driver": "file", "filename": str(new)}
        daemon.execute(
            "blockdev-add", {"driver": "qed", "node-name": "o", "file": file, "backing": None}
        )
        with pytest.raises(CowferryError, match="cannot record that its backing file"):
            daemon.execute("blockdev-snapshot", {"node": "vm", "overlay": "o"})
        for target in ("blockdev-mirror", "drive-mirror"):
            where = {"target": "o"} if target == "blockdev-mirror" else {
                "target": str(tmp_path / "t.qed"), "format": "qed",
            }  # fmt: skip
            with pytest.raises(CowferryError, match="cannot record that its backing file"):
                daemon.execute(target, {"device": "vm", "sync": "none", **where})
        assert not (tmp_path / "t.qed").exists() and not daemon.graph.claims


def test_a_stream_or_commit_whose_end_could_not_be_recorded_does_not_begin(tmp_path: Path) -> None:
    base, mid, low = tmp_path / "base.img", tmp_path / "mid.qcow2", tmp_path / "low.qcow2"
    opening.create_image(str(base), "qcow2", SIZE, {})
    below, format = base, "qcow2"
    for path in (low, mid, tmp_path / "vm.qed"):
        options = {"backing_file": below.name, "backing_fmt": format}
        opening.create_image(str(path), path.suffix[1:], SIZE, options)
        below = path
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(below))
        for command, more in (
            ("block-stream", {"base": str(base)}),
            ("block-commit", {"top": str(mid), "base": str(base)}),
        ):
            with pytest.raises(CowferryError, match="cannot record that its backing file"):
                daemon.execute(command, {"device": "vm", **more})
        assert not daemon.jobs.all() and not daemon.graph.claims
        told = Told(daemon)
        daemon.execute("block-stream", {"device": "vm", "base": str(low)})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="vm")
        assert daemon.graph.disk("vm").root.backing_spec == ("low.qcow2", "qcow2")
