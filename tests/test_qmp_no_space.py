"""A full file system at every stage of every operation, and what it costs: never a byte.

The file system is a small tmpfs, filled up with a ballast that is thrown out when the test wants
room. What the error policies promise (qmp.md, 2.4): `report` fails the job, `stop` and `enospc`
pause it and hold the request, which runs once after the resume (E1), `ignore` goes on trying.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs
from conversations import OURS, Refused, Scene, Talk, speaking
from cowferry.drivers import opening
from tests_support import need, unavailable

SIZE = 6 << 20
ROOM = 1 << 20
FULL = "No space left on device"


class Small:
    """A file system of `size` bytes, with room for little."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ballast = path / "ballast"

    def fill(self, room: int = 0) -> None:
        """Leave so much room (in whole pages) and no more."""
        with open(self.ballast, "ab", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(1 << 16))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            f.truncate(f.tell() - room)

    def empty(self) -> None:
        """Room."""
        self.ballast.unlink()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    """A small file system."""
    need("mount")
    if os.geteuid() != 0:
        unavailable("mounting needs root")
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,huge=never", "none", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        unavailable(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield Small(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """One for all: it has to live through everything."""
    with speaking(tmp_path_factory.mktemp("run"), OURS) as talk:
        yield talk


@pytest.fixture
def scene(tmp_path: Path, small: Small, daemon: Talk) -> Iterator[Scene]:
    """Closed before the small file system goes."""
    scene = Scene(daemon, tmp_path, SIZE)
    yield scene
    scene.over()


def target(scene: Scene, small: Small, format: str) -> Path:
    """A node `there` over an image in the small file system."""
    path = small.path / f"there.{format}"
    opening.create_image(str(path), format, SIZE, {})
    scene.talk.quietly("blockdev-add", driver=format, node_name="there",
                       file={"driver": "file", "filename": str(path)})  # fmt: skip
    return path


def reads(path: Path) -> bytearray:
    """All bytes of an image and what is below it."""
    node = opening.open_image(str(path))
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


def pivot(talk: Talk) -> None:
    """A ready job is completed, and ends well."""
    talk("job-complete", id="j")
    assert "error" not in talk.until("BLOCK_JOB_COMPLETED")
    talk.until("null")


def failed(talk: Talk, operation: str = "write") -> None:
    """Job `j` tells of the error, and ends with it."""
    assert talk.until("BLOCK_JOB_ERROR") == {
        "device": "j", "operation": operation, "action": "report",
    }  # fmt: skip
    assert talk.until("BLOCK_JOB_COMPLETED")["error"] == FULL
    talk.until("null")


def stopped(talk: Talk, state: str = "paused", operation: str = "write") -> None:
    """Job `j` tells of the error, and waits."""
    assert talk.until("BLOCK_JOB_ERROR") == {
        "device": "j", "operation": operation, "action": "stop",
    }  # fmt: skip
    talk.until(state)
    entry = talk.job("j")
    assert (entry["io-status"], entry["paused"], entry["status"]) == ("nospace", True, state)


def resumed(talk: Talk) -> None:
    """It goes on."""
    talk("job-resume", id="j")
    assert talk.job("j").get("io-status", "ok") == "ok"


# Mirror --------------------------------------------------------------------------------------


def begin(scene: Scene, policy: str, **more: Any) -> None:
    scene.talk("blockdev-mirror", job_id="j", device="vm", target="there", sync="full",
               on_target_error=policy, **more)  # fmt: skip


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "ignore"])
def test_E1_the_target_of_a_mirror_is_full(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk, policy: str, format: str
) -> None:
    path = target(scene, small, format)
    small.fill(ROOM)
    begin(scene, policy)
    if policy == "report":
        failed(daemon)
        scene.look("vm")
        assert daemon.story()[-1] == "vm is rw over sn1.qcow2"
        small.empty()
        begin(scene, policy)  # the job that failed has left nothing in the way
    elif policy == "ignore":
        for _ in range(3):
            assert daemon.until("BLOCK_JOB_ERROR")["action"] == "ignore"
        assert daemon.job("j")["status"] == "running"
        small.empty()
    else:
        stopped(daemon)
        daemon("job-resume", id="j")  # to no avail
        stopped(daemon)
        small.empty()
        resumed(daemon)
    daemon.until("BLOCK_JOB_READY")
    pivot(daemon)
    scene.over()
    assert differs(reads(path), scene.oracle) == ""


@pytest.mark.parametrize("policy", ["report", "stop", "ignore"])
def test_E1_the_target_is_full_while_the_guest_writes_to_both(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk, policy: str
) -> None:
    """M3: what the target refuses is dirty, and told; the guest's write is good all the same."""
    daemon("blockdev-snapshot-sync", node_name="t", snapshot_node_name="disk",
           snapshot_file=str(tmp_path / "disk.qcow2"))  # fmt: skip
    path = target(scene, small, "qcow2")
    daemon("blockdev-mirror", job_id="j", device="disk", target="there", sync="full",
           on_target_error=policy, copy_mode="write-blocking")  # fmt: skip
    daemon.until("BLOCK_JOB_READY")
    small.fill()
    oracle = bytearray(SIZE)
    with scene.guest("disk") as guest:
        for n in range(4):
            oracle[n << 20 : (n << 20) + 200_000] = data = random.Random(n).randbytes(200_000)
            guest.pwrite(data, n << 20)
        assert differs(guest.pread(SIZE, 0), oracle) == ""
        if policy == "report":
            failed(daemon)
            small.empty()
            assert differs(guest.pread(SIZE, 0), oracle) == ""
            path = tmp_path / "disk.qcow2"
        else:
            if policy == "stop":
                stopped(daemon, "standby")
                small.empty()
                resumed(daemon)
            else:
                assert daemon.until("BLOCK_JOB_ERROR")["action"] == "ignore"
                small.empty()
            daemon.poll(lambda: daemon.job("j")["actively-synced"], "the target has it all")
            pivot(daemon)
            assert differs(guest.pread(SIZE, 0), oracle) == ""
    scene.over()
    assert differs(reads(path), oracle) == ""


def test_the_source_of_a_mirror_is_full(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk
) -> None:
    """The guest is told, its disk and the copy agree, and the copy has room."""
    source = small.path / "disk.qcow2"
    opening.create_image(str(source), "qcow2", SIZE, {})
    file = {"driver": "file", "filename": str(source)}
    daemon("blockdev-add", driver="qcow2", node_name="disk", file=file)
    small.fill(3 * 64 << 10)
    daemon("blockdev-mirror", job_id="j", device="disk", target="t", sync="full")
    daemon.until("BLOCK_JOB_READY")
    oracle = bytearray(SIZE)
    with scene.guest("disk") as guest:
        wrote = 0
        with pytest.raises(OSError) as refused:
            for n in range(100):
                guest.pwrite(b"%03d" % n * 1000, n << 16)
                oracle[n << 16 : (n << 16) + 3000] = b"%03d" % n * 1000
                wrote += 1
        assert refused.value.errno == errno.ENOSPC and wrote
        assert differs(guest.pread(SIZE, 0), oracle) == ""
        assert daemon.job("j")["status"] == "ready"
        small.empty()  # the record of the move wants to lie beside the source
        pivot(daemon)
        guest.pwrite(b"on", SIZE - 2)
        oracle[-2:] = b"on"
        assert differs(guest.pread(SIZE, 0), oracle) == ""
    scene.over()
    assert (tmp_path / "t.raw").read_bytes() == oracle


def test_no_room_for_the_record_of_a_pivot(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk
) -> None:
    """No record always means the source: so the pivot does not happen, and nothing is lost."""
    source = small.path / "disk.raw"
    source.write_bytes(scene.oracle)
    file = {"driver": "file", "filename": str(source)}
    daemon("blockdev-add", driver="raw", node_name="disk", file=file)
    small.fill()
    for _ in range(2):
        daemon("blockdev-mirror", job_id="j", device="disk", target="t", sync="full")
        daemon.until("BLOCK_JOB_READY")
        daemon("job-complete", id="j")
        done = daemon.until("BLOCK_JOB_COMPLETED")
        daemon.until("null")
        if small.ballast.exists():
            assert FULL in done["error"]
            scene.look("disk")
            assert daemon.story()[-1] == "disk is rw over nothing"
            assert sorted(p.name for p in small.path.iterdir()) == ["ballast", "disk.raw"]
            small.empty()
    assert "error" not in done
    scene.over()
    assert scene.holds("t.raw") == ""


@pytest.mark.parametrize("command", ["drive-mirror", "x-disk-copy"])
def test_no_room_to_make_a_target(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk, command: str
) -> None:
    small.fill()
    given = {"job_id": "j", "device": "vm", "target": str(small.path / "new.qcow2")}
    given |= {"sync": "full"} if command == "drive-mirror" else {}
    refused = daemon.refusal(command, format="qcow2", **given)
    assert FULL in refused.desc and "new.qcow2" in refused.desc
    assert [p.name for p in small.path.iterdir()] == ["ballast"], "a half-made file is left"
    assert daemon("query-jobs") == []
    small.empty()
    daemon(command, format="qcow2", **given)
    daemon.until("BLOCK_JOB_READY")
    pivot(daemon)
    scene.over()
    assert differs(reads(small.path / "new.qcow2"), scene.oracle) == ""


# Snapshot ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["blockdev-snapshot-sync", "transaction"])
def test_no_room_to_make_an_overlay(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk, command: str
) -> None:
    scene.create("b", SIZE)
    scene.add("b")
    small.fill()
    data = {"node-name": "vm", "snapshot-file": str(small.path / "o.qcow2"),
            "snapshot-node-name": "o"}  # fmt: skip
    other = {"node-name": "b", "snapshot-file": str(tmp_path / "p.qcow2"),
             "snapshot-node-name": "p"}  # fmt: skip

    def ask() -> None:
        if command == "transaction":
            both = [{"type": "blockdev-snapshot-sync", "data": d} for d in (other, data)]
            daemon(command, actions=both)
        else:
            daemon(command, **data)

    with pytest.raises(Refused) as refused:
        ask()
    assert FULL in refused.value.desc and "o.qcow2" in refused.value.desc
    scene.look("vm", "b", "o", "p")
    assert daemon.story()[-4:] == [
        "vm is rw over sn1.qcow2", "b is rw over nothing", "o is gone", "p is gone",
    ]  # fmt: skip
    assert [p.name for p in small.path.iterdir()] == ["ballast"]
    assert not (tmp_path / "p.qcow2").exists()
    small.empty()
    ask()
    with scene.guest("o") as guest:
        guest.pwrite(b"z" * 5000, 12345)
        scene.oracle[12345 : 12345 + 5000] = b"z" * 5000
    scene.over()
    assert differs(reads(small.path / "o.qcow2"), scene.oracle) == ""


def test_no_room_for_the_record_of_a_snapshot(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk
) -> None:
    disk = small.path / "disk.raw"
    disk.write_bytes(scene.oracle)
    file = {"driver": "file", "filename": str(disk)}
    daemon("blockdev-add", driver="raw", node_name="disk", file=file)
    small.fill()
    given = {"node_name": "disk", "snapshot_node_name": "o"}
    given["snapshot_file"] = str(tmp_path / "o.qcow2")
    assert FULL in daemon.refusal("blockdev-snapshot-sync", **given).desc
    scene.look("disk", "o")
    assert daemon.story()[-2:] == ["disk is rw over nothing", "o is gone"]
    assert not (tmp_path / "o.qcow2").exists()
    with scene.guest("disk") as guest:
        guest.pwrite(b"still", 0)  # it may be written as before
        scene.oracle[:5] = b"still"
    small.empty()
    daemon("blockdev-snapshot-sync", **given)
    scene.over()
    assert scene.holds("o.qcow2") == ""


def test_an_overlay_runs_full_under_its_guest(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk
) -> None:
    overlay = small.path / "o.qcow2"
    daemon("blockdev-snapshot-sync", node_name="vm", snapshot_file=str(overlay),
           snapshot_node_name="o")  # fmt: skip
    small.fill(2 * 64 << 10)
    oracle = scene.oracle
    with scene.guest("o") as guest:
        with pytest.raises(OSError) as refused:
            for n in range(50):
                guest.pwrite(b"%03d" % n * 1000, n << 16)
                oracle[n << 16 : (n << 16) + 3000] = b"%03d" % n * 1000
        assert refused.value.errno == errno.ENOSPC
        assert differs(guest.pread(SIZE, 0), oracle) == ""
        small.empty()
        guest.pwrite(b"room" * 1000, 3 << 20)
        oracle[3 << 20 : (3 << 20) + 4000] = b"room" * 1000
        guest.flush()
        assert differs(guest.pread(SIZE, 0), oracle) == ""
    scene.over()
    assert differs(reads(overlay), oracle) == ""


# Commit and stream -----------------------------------------------------------------------------


def chain_on(scene: Scene, small: Small, where: str) -> Path:
    """A chain `bottom` <- `middle` <- `disk`, `where` of it in the small file system."""
    folders = dict.fromkeys(("bottom", "middle", "disk"), scene.folder)
    folders[where] = small.path
    below = None
    for n, name in enumerate(folders):
        path = folders[name] / f"{name}.qcow2"
        under: dict[str, Any] = {}
        if below is not None:
            under = {"backing_file": str(below), "backing_fmt": "qcow2"}
        opening.create_image(str(path), "qcow2", SIZE, under)
        node = opening.open_image(str(path))
        for k in range(n, n + 3):  # three MiB each, some of it over what is below
            data = random.Random(10 * n + k).randbytes(1 << 20)
            node.pwrite(memoryview(data), k << 20)
            scene.oracle[k << 20 : (k << 20) + len(data)] = data
        opening.close_chain(node)
        below = path
    used = range(5 << 20, SIZE)
    scene.oracle[used.start : used.stop] = bytes(len(used))
    spec = None
    for name, folder in folders.items():
        file = {"driver": "file", "filename": str(folder / f"{name}.qcow2")}
        given: dict[str, Any] = {"driver": "qcow2", "node-name": name, "file": file}
        spec = {**given, "backing": spec} if spec else given
    assert spec is not None
    scene.talk("blockdev-add", **spec)
    assert below is not None
    return below


@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "ignore"])
@pytest.mark.parametrize("kind", ["commit", "active"])
def test_E1_the_base_of_a_commit_is_full(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk, kind: str, policy: str
) -> None:
    top = chain_on(scene, small, "bottom")
    small.fill(ROOM)
    given = {"job_id": "j", "device": "disk", "base_node": "bottom"}
    given |= {"top_node": "middle"} if kind == "commit" else {}

    def told() -> None:
        if policy == "ignore":
            assert daemon.until("BLOCK_JOB_ERROR")["action"] == "ignore"
        else:
            stopped(daemon)

    daemon("block-commit", on_error=policy, **given)
    if policy == "report":
        failed(daemon)
        with scene.guest("disk") as guest:
            assert differs(guest.pread(SIZE, 0), scene.oracle) == ""
        small.empty()
        daemon("block-commit", on_error=policy, **given)
    elif policy == "ignore" and kind == "commit":
        # as a stream does: it goes on to its end, and fails there
        done = daemon.until("BLOCK_JOB_COMPLETED")
        assert done["error"] == FULL and done["offset"] == done["len"]
        daemon.until("null")
        small.empty()
        daemon("block-commit", on_error=policy, **given)
    else:
        told()
        small.empty()
        if policy != "ignore":
            resumed(daemon)
    if kind == "active":
        daemon.until("BLOCK_JOB_READY")
        daemon("job-complete", id="j")
    assert "error" not in daemon.until("BLOCK_JOB_COMPLETED")
    daemon.until("null")
    scene.over()
    current = top if kind == "commit" else small.path / "bottom.qcow2"
    assert differs(reads(current), scene.oracle) == ""


@pytest.mark.parametrize("policy", ["report", "stop", "ignore"])
def test_E1_the_overlay_of_a_stream_is_full(
    tmp_path: Path, small: Small, scene: Scene, daemon: Talk, policy: str
) -> None:
    top = chain_on(scene, small, "disk")
    small.fill(ROOM)
    daemon("block-stream", job_id="j", device="disk", on_error=policy)
    if policy == "stop":
        error = daemon.until("BLOCK_JOB_ERROR")
        assert error["action"] == "stop"
        daemon.until("paused")
        assert daemon.job("j")["io-status"] == "nospace"
        small.empty()
        resumed(daemon)
    else:
        assert daemon.until("BLOCK_JOB_COMPLETED")["error"] == FULL
        daemon.until("null")
        scene.look("disk")
        assert daemon.story()[-1] == "disk is rw over middle.qcow2"
        with scene.guest("disk") as guest:
            assert differs(guest.pread(SIZE, 0), scene.oracle) == ""
        small.empty()
        daemon("block-stream", job_id="j", device="disk")
    assert "error" not in daemon.until("BLOCK_JOB_COMPLETED")
    daemon.until("null")
    scene.over()
    (tmp_path / "middle.qcow2").unlink()
    assert differs(reads(top), scene.oracle) == ""
