"""A client that reacts to the end of a job at once finds nothing of it in use any more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks, contents, differs
from cowferry import operations
from cowferry.block.node import chain
from cowferry.daemon import Daemon
from cowferry.drivers.file import File
from cowferry.jobs.states import Status
from daemons import Told, a_daemon

SIZE = 2 << 20
LAYERS = ["base.raw", "sn1.qcow2", "vm.qcow2"]
ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


class House:
    """A daemon with the disk vm, which looks at itself whenever a job says that it is over."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder = folder
        self.daemon = daemon
        self.oracle = chain_of_disks(folder, LAYERS, SIZE)
        self.disk = daemon.open_disk("vm", str(folder / LAYERS[-1]))
        self.faults: list[str] = []
        self.looked: list[str] = []
        self.dismissed = True  # the job goes by itself
        daemon.events.listen(self.hear)
        self.told = Told(daemon)

    def hear(self, name: str, data: dict[str, Any]) -> None:
        over = name == "JOB_STATUS_CHANGE" and data["status"] in ("concluded", "null")
        if not (over or name in ENDS):
            return
        self.looked.append(name)
        ident = data.get("device") or data["id"]
        checks: list[Callable[[], object]] = [
            lambda: operations.free(self.daemon, "vm", "another job"),
            lambda: self.daemon.graph.check_free(self.disk.root, "another job"),
        ]
        if self.dismissed:
            checks.append(lambda: self.daemon.jobs.check_id(ident))
        for check in checks:
            try:
                check()
            except Exception as error:
                self.faults.append(f"{name} {data}: {error}")
        job = self.daemon.jobs.get(ident)
        if (job is not None) == self.dismissed or (job and job.status is not Status.CONCLUDED):
            self.faults.append(f"{name} {data}: the job is {job}")
        files = {os.path.realpath(n.filename) for n in chain(self.disk.root)}
        for node in self.daemon.graph.every_node():
            if os.path.realpath(node.filename) not in files:
                self.faults.append(f"{name} {data}: '{node.filename}' is still open")
        for fd in os.listdir("/proc/self/fd"):
            try:
                path = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
            if path.startswith(str(self.folder)) and path not in files:
                self.faults.append(f"{name} {data}: {path} has descriptor {fd}")

    def run(self, command: str, **given: Any) -> None:
        named = {k.replace("_", "-"): v for k, v in given.items()}
        self.daemon.execute(command, named)

    def check(self, looks: int) -> None:
        assert not self.faults
        assert len(self.looked) == looks
        assert not differs(contents(self.disk.root), self.oracle)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with a_daemon() as daemon:
        yield House(tmp_path, daemon)


def start(house: House, kind: str, **more: Any) -> str:
    """Start a job on vm; its id."""
    target = str(house.folder / "target.qcow2")
    if kind == "stream":
        house.run("block-stream", device="vm", **more)
    elif kind == "commit":
        house.run("block-commit", device="vm", top=str(house.folder / "sn1.qcow2"), **more)
    elif kind == "active commit":
        house.run("block-commit", device="vm", **more)
    elif kind == "mirror":
        house.run("drive-mirror", device="vm", target=target, sync="full", **more)
    elif kind == "backup":
        house.run("drive-backup", device="vm", target=target, sync="full", **more)
    return "vm"


KINDS = ["stream", "commit", "active commit", "mirror", "backup"]
READIED = ("active commit", "mirror")


@pytest.mark.parametrize("dismiss", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_when_a_job_has_completed(house: House, kind: str, dismiss: bool) -> None:
    house.dismissed = dismiss
    ident = start(house, kind, auto_dismiss=dismiss)
    if kind in READIED:
        house.told.wait("BLOCK_JOB_READY")
        house.run("job-complete", id=ident)
    assert "error" not in house.told.wait("BLOCK_JOB_COMPLETED")
    if kind == "stream":
        assert house.told.wait("BLOCK_STREAM_COMPLETED")["device"] == "vm"
    house.told.wait("JOB_STATUS_CHANGE", status="null" if dismiss else "concluded")
    house.check(3 if dismiss else 2)
    if not dismiss:
        house.dismissed = True
        house.run("job-dismiss", id=ident)
        house.told.wait("JOB_STATUS_CHANGE", status="null")
        house.check(3)


@pytest.mark.parametrize("kind", KINDS)
def test_when_a_job_was_cancelled(house: House, kind: str) -> None:
    ident = start(house, kind, speed=1)
    house.run("job-cancel", id=ident)
    house.told.wait("BLOCK_JOB_CANCELLED")
    house.told.wait("JOB_STATUS_CHANGE", status="null")
    house.check(3)
    start(house, kind)  # the same again, at once


def test_when_a_job_has_failed(house: House) -> None:
    small = house.folder / "small.raw"
    small.write_bytes(bytes(SIZE // 2))
    node = {"driver": "raw", "node-name": "small"}
    file = {"driver": "file", "filename": str(small)}
    house.daemon.execute("blockdev-add", node | {"file": file})
    house.faults.clear()
    house.run("blockdev-mirror", device="vm", target="small", sync="full", job_id="m")
    assert "different sizes" in house.told.wait("BLOCK_JOB_COMPLETED")["error"]
    house.told.wait("JOB_STATUS_CHANGE", status="null")
    house.faults = [f for f in house.faults if "small.raw" not in f]  # it was added by itself
    house.check(3)
    house.run("blockdev-del", node_name="small")
    with open(small, "r+b") as f:  # and can be locked by anybody
        File.open(File.Options(driver="file", filename=f.name), {}).close()


@pytest.mark.parametrize("cancelled", [True, False])
def test_when_a_group_has_ended(house: House, cancelled: bool) -> None:
    ended: list[str] = []

    def hear(name: str, data: dict[str, Any]) -> None:
        if name == "JOB_GROUP_COMPLETED":
            try:
                house.daemon.jobs.check_id("g")
                ended.append("")
            except Exception as error:
                ended.append(str(error))

    house.daemon.events.listen(hear)
    given: dict[str, Any] = {"id": "g", "type": "stream", "members": [{"device": "vm"}]}
    house.daemon.execute("x-group-start", given | ({"speed": 1} if cancelled else {}))
    if cancelled:
        house.run("x-group-cancel", id="g")
    house.told.wait("JOB_GROUP_COMPLETED")
    assert ended == [""]
    house.check(3)
