"""What must not happen to a disk while an operation runs on it, and who may forbid what.

The exceptions of the 2011 discussion: a disk with an operation is not unplugged (or the operation
is cancelled first); devices can be locked by the administrator, and never by a guest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks, contents, differs
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError, DeviceInUse
from daemons import PATIENCE, Told, a_daemon

SIZE = 4 << 20
SLOW = 64 << 10  # bytes per second: a job that is there for the whole test


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A disk `vm` of three layers, exported over NBD."""
    with a_daemon() as daemon:
        daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd.sock")})
        chain_of_disks(tmp_path, ["base.raw", "sn1.qcow2", "vm.qcow2"], SIZE)
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        daemon.add_export(disk, "vm")
        yield daemon


def operations(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every operation that runs for a while."""
    slow = {"device": "vm", "job-id": "j", "speed": SLOW}
    return {
        "stream": ("block-stream", slow),
        "commit of the active layer": ("block-commit", slow),
        "commit": ("block-commit", {**slow, "top": "sn1.qcow2"}),
        "drive-mirror": ("drive-mirror", {**slow, "target": str(folder / "m"), "sync": "full"}),
        "copy": ("x-disk-copy", {**slow, "target": str(folder / "c.qcow2")}),
    }


def attempts(folder: Path) -> dict[str, Callable[[Daemon], Any]]:
    """Whatever an operation excludes."""

    def execute(name: str, **arguments: Any) -> Callable[[Daemon], Any]:
        plain = {k.replace("_", "-"): v for k, v in arguments.items()}
        return lambda daemon: daemon.execute(name, plain)

    return {
        "remove": execute("x-disk-remove", device="vm"),
        "resize": execute("block_resize", device="vm", size=2 * SIZE),
        "second writer": execute(
            "block-export-add", type="nbd", id="two", node_name="vm", writable=True
        ),
        "snapshot": execute(
            "blockdev-snapshot-sync", device="vm", snapshot_file=str(folder / "over.qcow2")
        ),
        "stream": execute("block-stream", device="vm", job_id="k"),
        "commit": execute("block-commit", device="vm", job_id="k"),
        "mirror": execute(
            "drive-mirror", device="vm", job_id="k", target=str(folder / "k"), sync="full"
        ),
        "copy": execute("x-disk-copy", device="vm", job_id="k", target=str(folder / "k.qcow2")),
        "change": execute("change", device="vm", target=str(folder / "other.raw")),
        "lock": execute("x-disk-lock", device="vm", reason="moving the rack"),
        "2011 stream": execute("block_stream", device="vm"),
    }


@pytest.mark.parametrize("running", list(operations(Path())))
def test_a_disk_with_an_operation_is_left_alone_and_both_names_are_said(
    daemon: Daemon, tmp_path: Path, running: str
) -> None:
    opening.create_image(str(tmp_path / "other.raw"), "raw", SIZE, {})
    name, arguments = operations(tmp_path)[running]
    daemon.execute(name, arguments)
    kind = daemon.execute("query-jobs", {})[0]["type"]
    for what, attempt in attempts(tmp_path).items():
        with pytest.raises(DeviceInUse) as error:
            attempt(daemon)
        text = error.value.desc
        assert "'j'" in text, f"{what}: the running job is not named: {text}"
        assert kind in text and "excludes" in text, text
        assert error.value.hint
    assert [j["id"] for j in daemon.execute("query-jobs", {})] == ["j"]
    assert sorted(daemon.exports) == ["vm"]
    assert not (tmp_path / "k").exists() and not (tmp_path / "k.qcow2").exists()
    assert not (tmp_path / "over.qcow2").exists()


def test_a_second_writer_may_come_when_nothing_runs(daemon: Daemon) -> None:
    two = {"type": "nbd", "id": "two", "node-name": "vm", "name": "two", "writable": True}
    daemon.execute("block-export-add", two)
    assert sorted(daemon.exports) == ["two", "vm"]


def test_the_target_of_a_copy_is_exported_to_nobody(daemon: Daemon, tmp_path: Path) -> None:
    opening.create_image(str(tmp_path / "t.raw"), "raw", SIZE, {})
    daemon.execute(
        "blockdev-add",
        {
            "driver": "raw",
            "node-name": "t",
            "file": {"driver": "file", "filename": str(tmp_path / "t.raw")},
        },
    )
    daemon.execute(
        "blockdev-mirror",
        {"device": "vm", "job-id": "j", "target": "t", "sync": "full", "speed": SLOW},
    )
    for writable in (False, True):
        with pytest.raises(DeviceInUse, match="mirror 'j', which excludes an export"):
            daemon.execute(
                "block-export-add",
                {"type": "nbd", "id": "t", "node-name": "t", "writable": writable},
            )


@pytest.mark.parametrize("running", list(operations(Path())))
def test_with_force_the_operation_is_cancelled_first(
    daemon: Daemon, tmp_path: Path, running: str
) -> None:
    told = Told(daemon)
    before = contents(daemon.graph.disk("vm"))
    name, arguments = operations(tmp_path)[running]
    daemon.execute(name, arguments)
    daemon.execute("block_resize", {"device": "vm", "size": 2 * SIZE, "force": True})
    told.wait("BLOCK_JOB_CANCELLED", device="j")
    assert daemon.execute("query-jobs", {}) == []
    assert not differs(contents(daemon.graph.disk("vm")), before + bytes(SIZE))
    assert not (tmp_path / "m").exists() and not (tmp_path / "c.qcow2").exists()
    daemon.execute(name, arguments)
    daemon.execute("x-disk-remove", {"device": "vm", "force": True})
    told.wait("BLOCK_EXPORT_DELETED", id="vm")
    assert daemon.execute("query-jobs", {}) == []
    assert daemon.execute("query-block", {}) == []
    assert daemon.graph.nodes == {}, "a node of the removed disk stayed open"
    daemon.execute("x-disk-add", {"device": "vm", "filename": str(tmp_path / "vm.qcow2")})
    assert not differs(contents(daemon.graph.disk("vm")), before + bytes(SIZE))


def test_a_disk_with_clients_is_removed_by_force_only(daemon: Daemon, tmp_path: Path) -> None:
    assert daemon.nbd is not None
    client = NbdClient(daemon.nbd.uris("vm")[0])
    try:
        client.pwrite(b"here", 0)
        with pytest.raises(DeviceInUse, match="1 client"):
            daemon.execute("x-disk-remove", {"device": "vm"})
        client.pwrite(b"still there", 0)
        daemon.execute("x-disk-remove", {"device": "vm", "force": True})
        with pytest.raises((OSError, EOFError)):
            client.pwrite(b"gone", 0)
    finally:
        client.abort()


def test_a_locked_disk_takes_no_operation_even_with_force(daemon: Daemon, tmp_path: Path) -> None:
    opening.create_image(str(tmp_path / "other.raw"), "raw", SIZE, {})
    daemon.execute("x-disk-lock", {"device": "vm", "reason": "moving the rack"})
    assert daemon.execute("x-query-locks", {}) == [{"device": "vm", "reason": "moving the rack"}]
    tries = attempts(tmp_path)
    del tries["lock"], tries["second writer"]
    for what, attempt in tries.items():
        with pytest.raises(DeviceInUse, match=r"locked.*moving the rack"):
            attempt(daemon)
            pytest.fail(f"{what} ran on a locked disk")
    for name, arguments in operations(tmp_path).values():
        with pytest.raises(DeviceInUse, match="moving the rack"):
            daemon.execute(name, arguments)
    for name in ("x-disk-remove", "block_resize"):
        more = {"size": 2 * SIZE} if name == "block_resize" else {}
        with pytest.raises(DeviceInUse, match="moving the rack"):
            daemon.execute(name, {"device": "vm", "force": True, **more})
    with pytest.raises(CowferryError, match="locked already: moving the rack"):
        daemon.execute("x-disk-lock", {"device": "vm", "reason": "again"})
    daemon.execute("x-disk-unlock", {"device": "vm"})
    with pytest.raises(CowferryError, match="not locked"):
        daemon.execute("x-disk-unlock", {"device": "vm"})
    daemon.execute("block_resize", {"device": "vm", "size": 2 * SIZE})


def test_nothing_that_a_client_does_takes_or_keeps_a_lock(daemon: Daemon) -> None:
    """Every request of the protocol, and a client that stays: the administrator may do all."""
    assert daemon.nbd is not None
    told = Told(daemon)
    client = NbdClient(daemon.nbd.uris("vm")[0])
    try:
        client.pwrite(b"x" * 4096, 0)
        client.flush()
        assert bytes(client.pread(4096, 0)) == b"x" * 4096
        assert daemon.execute("x-query-locks", {}) == []
        assert daemon.graph.claims == {}
        daemon.execute("block_resize", {"device": "vm", "size": 2 * SIZE})
        daemon.execute("block-stream", {"device": "vm", "job-id": "j"})
        told.wait("BLOCK_JOB_COMPLETED", device="j")
    finally:
        client.abort()
    assert daemon.jobs.get("j") is None or daemon.jobs.get("j").wait(PATIENCE)  # type: ignore[union-attr]
