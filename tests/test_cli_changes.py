"""The verbs that change a chain, as a person types them, against a daemon that is a program."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from chains import chain_of_disks, contents, differs
from cowferry.cli import COMMANDS, group, main
from cowferry.cli.client import Client, QmpError
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from daemons import PATIENCE, environment, program
from test_quiesce import Agent
from tests_support import need, unavailable

SIZE = 4 << 20
BLOCK = 64 << 10
LAYERS = ["base.raw", "sn1.qcow2", "disk.qcow2"]
ROOT = os.geteuid() == 0

Ran = tuple[int, str, str]


def cowferry(capture: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """(exit status, standard output, standard error) of `cowferry ARGUMENTS`."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capture.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


class Scene(NamedTuple):
    """A daemon with disks over base <- sn1 <- disk, each in a folder of its own name."""

    folder: Path
    daemon: Path  # its run folder
    oracles: dict[str, bytearray]
    capture: pytest.CaptureFixture[str]

    def run(self, *arguments: str) -> Ran:
        return cowferry(self.capture, *arguments)

    def good(self, *arguments: str) -> str:
        """What a command prints that has to succeed."""
        status, out, err = self.run(*arguments)
        assert status == 0, (arguments, out, err)
        return out

    def guest(self, name: str = "vda") -> NbdClient:
        return NbdClient(f"nbd+unix:///{name}?socket={self.daemon / 'nbd.sock'}")

    def write(self, offset: int, byte: bytes, name: str = "vda") -> None:
        """The guest writes a block, and flushes."""
        data = byte * BLOCK
        with self.guest(name) as guest:
            guest.pwrite(data, offset)
            guest.flush()
        self.oracles[name][offset : offset + BLOCK] = data

    def check(self, name: str = "vda") -> None:
        """The guest reads what it should."""
        with self.guest(name) as guest:
            assert not differs(guest.pread(SIZE, 0), self.oracles[name])

    def chain(self, name: str = "vda") -> list[str]:
        """The names of a disk's images, base first."""
        (tree,) = json.loads(self.good("tree", name, "--json"))
        return [os.path.basename(x["filename"]) for x in reversed(tree["chain"])]


def bytes_of(path: Path, format: str | None = None) -> bytearray:
    """What an image reads as, whoever has it open."""
    node = opening.open_image(str(path), format, read_only=True, force_share=True)
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def serving(folder: Path, *names: str) -> Iterator[dict[str, bytearray]]:
    """A daemon as a program; its run folder is `folder/run`."""
    (folder / "run").mkdir()
    oracles = {name: images(folder / name) for name in names}
    disks = [f"{name}={folder / name / LAYERS[-1]}" for name in names]
    with program(folder / "run", *disks) as (_, line):
        for name in names:
            assert line().startswith(name)
        yield oracles


def images(folder: Path) -> bytearray:
    """A chain in a new folder; what it reads as."""
    folder.mkdir()
    return chain_of_disks(folder, LAYERS, SIZE)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all tests, which bring their disks; the path of its run folder."""
    folder = tmp_path_factory.mktemp("daemon")
    with serving(folder, "spare"):
        yield folder / "run"


@pytest.fixture
def scene(
    tmp_path: Path,
    daemon: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Scene]:
    """Two disks; the commands are typed in the folder above theirs."""
    monkeypatch.setenv("COWFERRY_RUN", str(daemon))
    monkeypatch.delenv("COWFERRY_QMP", raising=False)
    monkeypatch.chdir(tmp_path)
    oracles = {name: images(tmp_path / name) for name in ("vda", "vdb")}
    with Client(str(daemon / "qmp.sock")) as client:
        for name in oracles:
            client.call("x-disk-add", device=name, filename=str(tmp_path / name / LAYERS[-1]))
        yield Scene(tmp_path, daemon, oracles, capsys)
        for name in oracles:
            with suppress(QmpError):  # the test may have removed it itself
                client.call("x-disk-remove", device=name, force=True)


# Snapshot ----------------------------------------------------------------------------------


def test_snapshot_names_a_file_beside_or_takes_a_path_as_seen_from_here(scene: Scene) -> None:
    scene.write(0, b"1")
    before = bytes(scene.oracles["vda"])
    out = scene.good("snapshot", "vda")
    assert out == f"vda: {scene.folder}/vda/disk.snap1.qcow2\n"
    scene.write(0, b"2")
    assert bytes_of(scene.folder / "vda" / "disk.qcow2") == before, "the old image stands still"
    # Both at once, one with a name: relative to where it is typed, not to the daemon's folder.
    out = scene.good("snapshot", "vda", "vdb=vdb/new.qcow2", "--json")
    (told,) = lines(out)
    files = {d["device"]: d["snapshot-file"] for d in told["disks"]}
    assert files == {
        "vda": str(scene.folder / "vda" / "disk.snap2.qcow2"),
        "vdb": str(scene.folder / "vdb" / "new.qcow2"),
    }
    assert scene.chain("vdb") == [*LAYERS, "new.qcow2"]
    scene.check("vda")
    scene.check("vdb")
    status, _, err = scene.run("snapshot", "vda", "vdb=vdb/new.qcow2")
    assert status == 1 and "new.qcow2' is the image of disk 'vdb'" in err
    assert scene.chain("vda")[-1] == "disk.snap2.qcow2", "all or none"


def test_snapshot_freezes_the_guest_and_says_for_how_long(scene: Scene) -> None:
    with closing(Agent(scene.folder / "agent")) as agent:
        out = scene.good("snapshot", "vda", "vdb", "--quiesce", "agent", "--timeout", "20")
    assert re.fullmatch(r"frozen for \d+\.\d{3} s: 2 file systems", out.splitlines()[-1])
    assert "guest-fsfreeze-thaw" in agent.heard and scene.chain("vdb")[-1] == "disk.snap1.qcow2"


def test_snapshot_takes_an_overlay_that_somebody_else_made(scene: Scene) -> None:
    scene.good("create", "-q", "-f", "qcow2", "vda/mine.qcow2", str(SIZE))
    scene.good("snapshot", "vda=vda/mine.qcow2", "--reuse-external")
    scene.write(BLOCK, b"3")
    assert scene.chain() == [*LAYERS, "mine.qcow2"]
    scene.check()


def test_snapshot_hands_over_descriptors_which_outlive_their_sets(scene: Scene) -> None:
    # Each set is gone when the next is made, and the next gets its number.
    for n in (1, 2, 3):
        scene.good("create", "-q", "-f", "qcow2", f"vda/over{n}.qcow2", str(SIZE))
        scene.write(n * BLOCK, b"%d" % n)
        scene.good("snapshot", f"vda=vda/over{n}.qcow2", "--pass-fd")
        assert json.loads(scene.good("qmp", "query-fdsets")) == []
    scene.write(4 * BLOCK, b"4")
    scene.check()
    assert scene.chain() == [*LAYERS, "over1.qcow2", "over2.qcow2", "over3.qcow2"]
    scene.good("commit", "vda", "--top", "vda/over2.qcow2", "--base", "vda/over1.qcow2")
    scene.good("commit", "vda")
    scene.check()
    assert scene.chain() == ["base.raw"]
    assert bytes_of(scene.folder / "vda" / "base.raw") == scene.oracles["vda"]


def test_a_daemon_without_rights_is_handed_the_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("setpriv")
    if not ROOT:
        unavailable("only root can run a daemon as somebody else")
    folder = tmp_path / "images"
    oracle = images(folder)
    run, state = tmp_path / "run", tmp_path / "state"
    for made in (run, state):
        made.mkdir(mode=0o777)
        made.chmod(0o777)
    nobody = 65534
    os.chown(folder / LAYERS[-1], nobody, nobody)
    for above in [*list(tmp_path.parents)[:-1], tmp_path]:
        if not above.stat().st_mode & 0o001:
            above.chmod(0o711)  # pytest's folders are for one user only
    child = subprocess.Popen(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m",
         "cowferry", "serve", f"vda={folder / LAYERS[-1]}"],
        stdout=subprocess.PIPE, text=True,
        env={**environment(run), "COWFERRY_STATE": str(state)},
    )  # fmt: skip
    assert child.stdout is not None
    try:
        if not child.stdout.readline().startswith("vda: "):
            unavailable("this interpreter is not readable for everybody")
        monkeypatch.setenv("COWFERRY_RUN", str(run))
        scene = Scene(tmp_path, run, {"vda": oracle}, capsys)
        over = folder / "over.qcow2"
        status, _, err = scene.run("snapshot", f"vda={over}")
        assert status == 1 and "Permission denied" in err and "add --pass-fd" in err
        scene.good("create", "-q", "-f", "qcow2", str(over), str(SIZE))
        over.chmod(0o600)
        assert scene.run("snapshot", f"vda={over}", "--reuse-external")[0] == 1
        scene.good("snapshot", f"vda={over}", "--pass-fd")
        scene.write(0, b"n")
        scene.check()
        assert scene.chain() == [*LAYERS, "over.qcow2"]
    finally:
        child.terminate()
        child.wait(PATIENCE)
        child.stdout.close()
    assert bytes_of(over) == oracle


# Commit ------------------------------------------------------------------------------------


def test_commit_of_layers_between_just_runs_to_the_end(scene: Scene) -> None:
    scene.good("snapshot", "vda")
    scene.write(0, b"c")
    out = scene.good(
        "commit", "vda", "--top", "vda/disk.qcow2", "--base", "base.raw",
        "--backing-file", "./base.raw",
    )  # fmt: skip
    assert out == "commit vda: completed, 4 MiB\n"
    assert scene.chain() == ["base.raw", "disk.snap1.qcow2"]
    scene.check()
    info = json.loads(scene.good("info", "-U", "--output", "json", "vda/disk.snap1.qcow2"))
    assert info["backing-filename"] == "./base.raw"


def test_commit_pivots_unless_it_is_told_to_finish(scene: Scene) -> None:
    scene.write(0, b"p")
    out = scene.good("commit", "vda", "--finish", "--base", "base.raw")
    assert "and vda stays where it is" in out and scene.chain() == LAYERS
    base = scene.folder / "vda" / "base.raw"
    assert bytes_of(base) == scene.oracles["vda"], "the base is a copy of that moment"
    status, out, err = scene.run("current", str(base))
    assert (status, out, err) == (0, f"{base}\n", ""), "and good by itself"
    scene.write(BLOCK, b"q")
    told = lines(scene.good("commit", "vda", "--json"))
    assert told[-1]["result"] == "completed" and told[-1]["type"] == "commit"
    assert scene.chain() == ["base.raw"]
    scene.check()
    assert bytes_of(base) == scene.oracles["vda"]


def test_C2_commit_into_a_base_of_another_disk_fails_and_marks_nothing(scene: Scene) -> None:
    scene.good("create", "-q", "-f", "qcow2", "-b", "vda/base.raw", "-F", "raw", "other.qcow2")
    scene.good("add", "other=other.qcow2")
    try:
        status, _, err = scene.run("commit", "vda")
    finally:
        scene.good("remove", "other")
    assert status == 1 and "base.raw' is in use by disk 'other'" in err
    assert list(scene.folder.rglob("*.committing")) == []
    assert scene.chain() == LAYERS
    scene.check()


def test_commit_in_the_background_is_completed_by_its_job(scene: Scene) -> None:
    job = json.loads(scene.good("commit", "vda", "--async", "--json"))["job"]
    until_ready(scene, job)
    assert f"cowferry job complete {job} moves over" in scene.good("jobs")
    out = scene.good("job", "complete", job)
    assert out.startswith(f"job {job}: completed, ") and out.endswith("moved over\n")
    assert scene.chain() == ["base.raw"]
    scene.check()


def until_ready(scene: Scene, job: str) -> None:
    """Wait for the event itself, or see that it has come already."""
    with Client(str(scene.daemon / "qmp.sock")) as client:
        if all(j["status"] == "running" for j in client.call("query-jobs") if j["id"] == job):
            for event in client.wait_events(PATIENCE):
                if event["event"] == "BLOCK_JOB_READY" and event["data"]["device"] == job:
                    return
            pytest.fail("it was never ready")


# Copy --------------------------------------------------------------------------------------


def test_copy_moves_over_or_leaves_a_copy(scene: Scene) -> None:
    scene.write(0, b"a")
    out = scene.good("copy", "vda", "copied.raw", "--finish")
    assert out.endswith(f"'{scene.folder}/copied.raw' is a copy of that moment\n")
    assert scene.chain() == LAYERS
    assert bytes_of(scene.folder / "copied.raw") == scene.oracles["vda"]
    out = scene.good("copy", "vda", "moved.qcow2", "--pivot", "--granularity", "64k")
    assert out.endswith(f"vda is on '{scene.folder}/moved.qcow2' now\n")
    scene.write(BLOCK, b"b")
    assert scene.chain() == ["moved.qcow2"]
    scene.check()
    assert scene.good("current", "vda/disk.qcow2") == f"{scene.folder}/moved.qcow2\n"


def test_copy_stays_ready_and_says_how_to_go_on(scene: Scene) -> None:
    out = scene.good("copy", "vda", "to.raw", "--copy-mode", "write-blocking")
    assert out.startswith("copy vda: ready\n")
    assert "cowferry job complete copy-vda" in out and "cancel --soft copy-vda" in out
    assert "write-blocking" in scene.good("jobs")
    scene.good("job", "mode", "copy-vda", "background")
    scene.write(0, b"w")
    assert "write-blocking" not in scene.good("jobs")
    out = scene.good("job", "cancel", "--soft", "copy-vda")
    assert out.endswith("its target is a copy of that moment\n")
    assert bytes_of(scene.folder / "to.raw") == scene.oracles["vda"]
    told = lines(scene.good("copy", "vda", "to.raw", "--reuse-external", "--json"))
    assert told[-1]["result"] == "ready" and told[-1]["job"] == "copy-vda"
    told = lines(scene.good("job", "complete", "copy-vda", "--json"))
    assert told[-1]["result"] == "completed"
    assert scene.chain() == ["to.raw"]
    scene.check()


def test_copy_keeps_the_chain_or_a_part_of_it(scene: Scene) -> None:
    (scene.folder / "dst").mkdir()
    scene.good("copy", "vda", "dst/disk.qcow2", "--chain", "--pivot")
    assert scene.chain() == LAYERS
    (tree,) = json.loads(scene.good("tree", "vda", "--json"))
    assert {os.path.dirname(x["filename"]) for x in tree["chain"]} == {str(scene.folder / "dst")}
    scene.check()
    status, _, err = scene.run("copy", "vda", "vda/disk.qcow2", "--chain")
    assert status == 1 and "base.raw' exists\n  --chain and --keep copy to new files only" in err
    scene.good("copy", "vdb", "two.qcow2", "--keep", "vdb/sn1.qcow2", "--finish")
    assert (scene.folder / "sn1.qcow2").exists() and not (scene.folder / "base.raw").exists()
    assert bytes_of(scene.folder / "two.qcow2") == scene.oracles["vdb"]
    scene.good("copy", "vdb", "three.qcow2", "--shallow", "--pivot")
    assert scene.chain("vdb") == ["base.raw", "sn1.qcow2", "three.qcow2"]
    scene.check("vdb")


def test_a_copy_that_had_to_be_helped_says_so(scene: Scene) -> None:
    stop = threading.Event()

    def write_again_and_again() -> None:
        with scene.guest() as guest:
            while not stop.is_set():
                for offset in range(0, SIZE, BLOCK):
                    guest.pwrite(b"h" * BLOCK, offset)

    writer = threading.Thread(target=write_again_and_again)
    writer.start()
    try:
        status, out, err = scene.run(
            "copy", "vda", "hot.raw", "--speed", "2M", "--converge-by", "1", "--finish", "--json"
        )
    finally:
        stop.set()
        writer.join(PATIENCE)
    assert (status, err) == (0, "")
    *steps, result = lines(out)
    assert result["result"] == "completed"
    assert any(note.startswith("to converge: ") for note in result["notes"])
    assert any("notes" in step and "dirty-rate" in step for step in steps)


def test_a_copy_into_too_little_room_pauses_says_so_and_goes_on(scene: Scene) -> None:
    with small_file_system(scene.folder / "small") as mounted:
        child = subprocess.Popen(
            [sys.executable, "-m", "cowferry", "copy", "vda", f"{mounted}/c.raw",
             "--on-target-error", "enospc", "--finish"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(scene.daemon),
        )  # fmt: skip
        try:
            assert child.stderr is not None
            note = child.stderr.readline()
            assert note == ("copy vda: paused: no space left; then: cowferry job resume copy-vda\n")
            assert "paused: no space left" in scene.good("jobs")
            subprocess.run(["mount", "-o", "remount,size=16m", mounted], check=True)
            scene.good("job", "resume", "copy-vda")
            out, _ = child.communicate(timeout=PATIENCE)
        finally:
            child.kill()
            child.wait()
        assert child.returncode == 0 and "completed" in out
        assert bytes_of(Path(mounted) / "c.raw") == scene.oracles["vda"]


@contextmanager
def small_file_system(where: Path) -> Iterator[str]:
    """A mount with room for 3 MiB."""
    need("mount", "umount")
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "small", str(where)]).returncode:
        unavailable("mounting a small file system needs root")
    try:
        yield str(where)
    finally:
        subprocess.run(["umount", "-l", str(where)], check=False)


def test_ctrl_c_even_twice_cancels_the_copy_and_says_what_is_left(scene: Scene) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "cowferry", "copy", "vda", str(scene.folder / "c.raw"),
         "--speed", "64k", "--json", "--pivot"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(scene.daemon),
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["status"] == "running"
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=PATIENCE)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert lines(out)[-1]["result"] == "cancelled"
    assert "vda stays where it is" in err and f"'{scene.folder}/c.raw' is removed" in err
    assert "copy-vda" not in scene.good("jobs")
    assert scene.chain() == LAYERS


# Groups ------------------------------------------------------------------------------------


def test_group_copy_is_one_thing_with_its_members(scene: Scene) -> None:
    out = scene.good("group", "copy", "vda=a.raw", "vdb=b.raw", "--id", "night")
    assert out.startswith("group night: ready\n") and "cowferry group complete night" in out
    shown = scene.good("group", "show", "night")
    assert shown.startswith("night  ready  100.0% of ")
    assert "    night-vda  mirror  ready" in shown and "    night-vdb  mirror  ready" in shown
    assert scene.good("group", "list") == shown
    scene.write(0, b"g", "vda")
    assert [g["id"] for g in json.loads(scene.good("group", "list", "--json"))] == ["night"]
    assert "a member of group night" in scene.good("jobs")
    status, _, err = scene.run("job", "complete", "night-vda")
    assert status == 1 and "member of group 'night'" in err
    out = scene.good("group", "complete", "night")
    assert out.splitlines()[0].endswith("every disk has moved")
    assert out.splitlines()[1:] == ["    night-vda: completed", "    night-vdb: completed"]
    assert (scene.chain("vda"), scene.chain("vdb")) == (["a.raw"], ["b.raw"])
    scene.check("vda")
    scene.check("vdb")


def test_group_commit_pivots_and_group_stream_takes_bases(scene: Scene) -> None:
    told = lines(scene.good("group", "stream", "vda=vda/base.raw", "vdb", "--json"))
    assert told[-1]["result"] == "completed"
    assert told[-1]["members"] == {"stream-group-vda": "completed", "stream-group-vdb": "completed"}
    assert all(len(step["members"]) == 2 for step in told if "members" in step and "len" in step)
    assert (scene.chain("vda"), scene.chain("vdb")) == (["base.raw", "disk.qcow2"], ["disk.qcow2"])
    scene.good("snapshot", "vda", "vdb")
    scene.write(0, b"s", "vdb")
    out = scene.good("group", "commit", "vda", "vdb")
    assert "every disk has moved" in out
    assert (scene.chain("vda"), scene.chain("vdb")) == (["base.raw"], ["disk.qcow2"])
    scene.check("vda")
    scene.check("vdb")


def test_group_cancel_softly_or_not(scene: Scene) -> None:
    scene.good("group", "copy", "vda=a.raw", "vdb=b.raw")
    out = scene.good("group", "cancel", "copy-group", "--soft")
    assert out.splitlines()[0].endswith("there is a copy of each at one moment")
    assert bytes_of(scene.folder / "b.raw") == scene.oracles["vdb"]
    slow = ("--speed", "64k", "--async")
    out = scene.good("group", "copy", "vda=c.raw", "vdb=d.raw", "--id", "g", *slow)
    assert out == "group g runs: cowferry group list\n"
    status, out, err = scene.run("group", "cancel", "g", "--soft")
    assert status == 0 and "g-vda: cancelled" in out and "it was not ready" in err
    assert scene.good("group", "list") == "No active groups\n"
    status, _, err = scene.run("group", "complete", "g")
    assert status == 1 and err.splitlines()[0] == "cowferry: Group 'g' not found"


def test_a_member_that_fails_is_told_with_the_policy_each(scene: Scene) -> None:
    with small_file_system(scene.folder / "small") as mounted:
        members = ("vda=a.raw", f"vdb={mounted}/b.raw")
        status, out, err = scene.run("group", "copy", *members, "--policy", "each", "--pivot")
    assert status == 1
    assert out.splitlines() == [
        "group copy-group: failed",
        "    copy-group-vda: completed",
        f"    copy-group-vdb: failed: writing '{mounted}/b.raw': No space left on device",
    ]
    assert "every disk is intact" in err
    assert (scene.chain("vda"), scene.chain("vdb")) == (["a.raw"], LAYERS)
    scene.check("vda")
    scene.check("vdb")


# At one moment -----------------------------------------------------------------------------


def test_change_is_another_medium_or_the_same_disk_elsewhere(scene: Scene) -> None:
    scene.good("copy", "vda", "same.raw", "--finish")
    scene.good("change", "vda", "same.raw", "--no-notify")
    scene.check()
    assert scene.chain() == ["same.raw"]
    assert scene.good("current", "vda/disk.qcow2") == f"{scene.folder}/same.raw\n"
    scene.good("create", "-q", "-f", "raw", "other.img", "1M")
    status, _, err = scene.run("change", "vda", "other.img", "--no-notify")
    assert status == 1 and "has 1048576 bytes and 'vda' 4194304" in err
    scene.good("copy", "vda", "x.raw", "--speed", "64k", "--async")
    status, _, err = scene.run("change", "vda", "other.img")
    assert status == 1 and "copy-vda" in err
    scene.good("change", "vda", "other.img", "--force")
    assert scene.chain() == ["other.img"]
    assert "copy-vda" not in scene.good("jobs")


def test_backing_records_a_name_that_leads_to_the_same_bytes(scene: Scene) -> None:
    shutil.copy(scene.folder / "vda" / "base.raw", scene.folder / "moved.raw")
    scene.good("backing", "vda", "vda/sn1.qcow2", "../moved.raw")
    info = json.loads(scene.good("info", "-U", "--output", "json", "vda/sn1.qcow2"))
    assert info["backing-filename"] == "../moved.raw"
    status, _, err = scene.run("backing", "vda", "sn1.qcow2", "nowhere.raw")
    assert status == 1 and "nowhere.raw' cannot be the backing file" in err and "--unsafe" in err
    scene.good("backing", "vda", "sn1.qcow2", "nowhere.raw", "--unsafe")
    status, _, err = scene.run("backing", "vda", "vdb/sn1.qcow2", "base.raw")
    assert status == 1 and "is not in the chain of 'vda'" in err
    scene.check()


def test_add_resize_and_remove(scene: Scene) -> None:
    scene.good("create", "-q", "-f", "qcow2", "new.qcow2", "1M")
    scene.good("add", "data=new.qcow2")
    assert scene.chain("data") == ["new.qcow2"]
    assert scene.good("resize", "--live", "data", "+1M") == "Image resized.\n"
    (tree,) = json.loads(scene.good("tree", "data", "--json"))
    assert tree["size"] == 2 << 20
    status, _, err = scene.run("resize", "--live", "data", "-1M")
    assert status == 1 and "shrinking it from 2097152 to 1048576" in err
    with scene.guest("data") as guest:
        assert guest.pread(512, 0) == bytes(512)
        status, _, err = scene.run("remove", "data")
        assert status == 1 and "1 client" in err and "--force" in err
        scene.good("remove", "data", "--force")
    status, _, err = scene.run("tree", "data")
    assert status == 1 and "there are: " in err
    scene.good("stream", "vda", "--speed", "64k", "--async")
    status, _, err = scene.run("remove", "vda")
    assert status == 1 and "stream-vda" in err
    scene.good("resize", "--live", "vda", "+1M", "--force")
    scene.good("remove", "vda")
    assert bytes_of(scene.folder / "vda" / "disk.qcow2")[:SIZE] == scene.oracles["vda"]


def test_a_locked_disk_refuses_and_says_why(scene: Scene) -> None:
    assert scene.good("locks") == "No disk is locked\n"
    scene.good("lock", "vda", "--reason", "ask Ada")
    assert scene.good("locks") == "vda: ask Ada\n"
    assert json.loads(scene.good("locks", "--json")) == [{"device": "vda", "reason": "ask Ada"}]
    assert scene.good("tree", "vda").endswith("    locked: ask Ada\n")
    for verb in (
        ["stream", "vda"], ["commit", "vda"], ["copy", "vda", "x.raw"], ["snapshot", "vda"],
        ["change", "vda", "vdb/base.raw"], ["remove", "vda", "--force"],
        ["resize", "--live", "vda", "+1M"], ["group", "stream", "vda", "vdb"],
    ):  # fmt: skip
        status, _, err = scene.run(*verb)
        assert status == 1, verb
        assert "is locked" in err and "ask Ada" in err and "cowferry unlock vda" in err, verb
    assert not (scene.folder / "x.raw").exists()
    scene.write(0, b"l")  # the guest does not care
    scene.good("unlock", "vda")
    scene.good("stream", "vda")
    scene.check()


def test_current_warns_of_a_commit_that_was_cut_off(tmp_path: Path, scene: Scene) -> None:
    folder = tmp_path / "cut"
    images(folder)
    run = tmp_path / "run2"
    run.mkdir()
    where = ("-c", str(run / "qmp.sock"))
    with program(run, f"vm={folder / 'disk.qcow2'}") as (child, line):
        line()
        scene.good("commit", "vm", "--speed", "64k", "--async", *where)
        with Client(str(run / "qmp.sock")) as client:
            while client.call("query-block-jobs")[0]["offset"] == 0:
                next(client.wait_events(0.05), None)
        child.kill()
        child.wait()
    status, out, err = scene.run("current", str(folder / "base.raw"))
    assert (status, out) == (0, f"{folder}/base.raw\n")
    assert "is of no use by itself" in err and f"serve '{folder}/disk.qcow2'" in err
    told = json.loads(scene.run("current", "--json", str(folder / "base.raw"))[1])
    assert told["half-committed"] == str(folder / "disk.qcow2") and told["generation"] == 0
    status, out, err = scene.run("current", str(folder / "disk.qcow2"))
    assert (out, err) == (f"{folder}/disk.qcow2\n", "")
    status, _, err = scene.run("current", str(folder / "none.raw"))
    assert status == 1 and "none.raw': No such file" in err


# What cannot be ---------------------------------------------------------------------------


class Refused(NamedTuple):
    """What is typed, and what is said."""

    typed: str
    says: str
    status: int = 1


REFUSED = [
    *(
        Refused(f"{verb} nope {more}".strip(), "Device 'nope' not found")
        for verb, more in [
            ("snapshot", ""), ("stream", ""), ("commit", ""), ("copy", "x.raw"),
            ("group stream", ""), ("group commit", ""),
            ("change", "free/base.raw"), ("backing", "a b"), ("remove", ""), ("unlock", ""),
            ("lock", "--reason x"), ("resize --live", "1M"), ("tree", ""),
        ]
    ),
    Refused("snapshot free=free/base.raw", "base.raw' is a backing file of disk 'free'"),
    Refused("snapshot free=file", "use --reuse-external if it is an empty overlay"),
    Refused("snapshot free=", "'free=' is not DISK or DISK=FILE"),
    Refused("snapshot free free", "'free' is named twice"),
    Refused("snapshot free --reuse-external", "which file is to be used for 'free'?"),
    Refused("snapshot free=none.qcow2 --reuse-external", "none.qcow2': No such file"),
    Refused("snapshot free=none.qcow2 --pass-fd", "make it first: cowferry create"),
    Refused("snapshot free=run --pass-fd", "run' cannot be opened: Is a directory"),
    Refused("snapshot free=small.qcow2 --reuse-external", "The overlay has 1048576 bytes"),
    Refused("snapshot free=none/x.qcow2", "none/x.qcow2: No such file or directory"),
    Refused("snapshot free --quiesce none.sock", "cannot reach guest agent"),
    Refused("snapshot free --quiesce x --timeout never", "'never' is not a number of seconds", 2),
    Refused("commit free --base none.raw", "'none.raw' is not in this backing file chain"),
    Refused("commit free --top none.raw", "'none.raw' is not in this backing file chain"),
    Refused("commit free --base free/disk.qcow2", "cannot commit an image into itself"),
    Refused("commit free --top sn1.qcow2 --base sn1.qcow2", "cannot commit an image into itself"),
    Refused("commit free --backing-file x", "'top' is the active layer"),
    Refused("commit free --pivot --finish", "exclude each other", 2),
    Refused("copy free file", "use --reuse-external to overwrite what it holds"),
    Refused("copy free run", "run' is a folder"),
    Refused("copy free none/x.raw", "none/x.raw: No such file or directory"),
    Refused("copy free free/base.raw", "base.raw' is a backing file of disk 'free'"),
    Refused("copy free busy/disk.qcow2 --reuse-external", "in use by disk 'busy'"),
    Refused("copy free small.qcow2 --reuse-external", "has 1048576 bytes and 'free' 4194304"),
    Refused("group copy free=file", "a group only copies to new files"),
    Refused("copy free x.qcow2 --granularity 3000", "expects a power of 2"),
    Refused("copy free x.qcow2 --granularity 128M", "expects a value in range"),
    Refused("copy free x.qcow2 --granularity 3x", "Invalid size '3x'", 2),
    Refused("copy free x.qcow2 --speed -1", "Invalid size '-1'", 2),
    Refused("copy free x.qcow2 --converge-by nan", "'nan' is not a number of seconds", 2),
    Refused("copy free x.qcow2 --converge-by -1", "'-1' is not a number of seconds", 2),
    Refused("copy free x.qcow2 --pivot --finish", "exclude each other", 2),
    Refused("copy free x.qcow2 --chain --shallow", "excludes", 2),
    Refused("copy free x.qcow2 --keep none.raw", "'none.raw' is not a backing image of 'free'"),
    Refused("copy free x.raw --shallow", "use --format qcow2"),
    Refused("copy free x.qcow2 --format vmdk", "Unknown driver 'vmdk'"),
    Refused("group copy free", "'free' needs a destination"),
    Refused("group copy free=a.raw free=b.raw", "a disk is named twice"),
    Refused("group copy free=a.raw busy=b.raw", "job 'copy-busy'"),
    Refused("group show none", "Group 'none' not found"),
    Refused("group cancel none", "Group 'none' not found"),
    Refused("job complete none", "there are: copy-busy"),
    Refused("job cancel none", "there are: copy-busy"),
    Refused("job mode none background", "there are: copy-busy"),
    Refused("job complete copy-busy", "in state 'running' cannot accept command verb 'complete'"),
    Refused("lock free", "Missing option '--reason'", 2),
    Refused("lock free --reason ''", "an empty --reason"),
    Refused("unlock free", "Disk 'free' is not locked"),
    Refused("add free=file", "named 'free' already"),
    Refused("add none.qcow2", "none.qcow2': No such file"),
    Refused("change free none.raw", "none.raw': No such file"),
    Refused("backing free base.raw x", "on an image without a backing file"),
    *(
        Refused(typed, "copy-busy")
        for typed in [
            "snapshot busy", "stream busy", "commit busy", "copy busy x.raw", "group stream busy",
            "change busy file", "backing busy disk.qcow2 x --unsafe", "remove busy",
            "lock busy --reason x", "resize --live busy +1M",
        ]
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A daemon that nothing here changes: one disk is free, and on one a copy runs for long."""
    folder = tmp_path_factory.mktemp("strict")
    with serving(folder, "free", "busy"):
        (folder / "file").write_bytes(bytes(512))
        opening.create_image(str(folder / "small.qcow2"), "qcow2", 1 << 20, {})
        with Client(str(folder / "run" / "qmp.sock")) as client:
            copy = str(folder / "copy")
            client.call("x-disk-copy", job_id="copy-busy", device="busy", target=copy, speed=4096)
        yield folder


@pytest.mark.parametrize("refused", REFUSED, ids=[r.typed for r in REFUSED])
def test_what_cannot_be_is_said_in_words_and_changes_nothing(
    refused: Refused,
    strict: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COWFERRY_RUN", str(strict / "run"))
    monkeypatch.delenv("COWFERRY_QMP", raising=False)
    monkeypatch.chdir(strict)
    words = [w if w != "''" else "" for w in refused.typed.split()]
    before = sorted(os.listdir(strict))
    status, out, err = cowferry(capsys, *words)
    assert status == refused.status, (out, err)
    assert refused.says in err and "Traceback" not in err
    assert refused.status == 2 or err.startswith("cowferry: "), err
    assert len(err.splitlines()) <= 2 or refused.status == 2, "a line, and a hint"
    left = sorted(set(os.listdir(strict)) - set(before))
    assert left == [], "what was begun is not left behind"
    with Client(str(strict / "run" / "qmp.sock")) as client:
        assert [j["id"] for j in client.call("query-jobs")] == ["copy-busy"]
        assert client.call("x-query-groups") == client.call("x-query-locks") == []


def test_the_client_passes_descriptors_and_knows_its_own_answers(strict: Path) -> None:
    with Client(str(strict / "run" / "qmp.sock")) as client, open(strict / "file", "rb") as f:
        # As after a Ctrl-C between a question and its answer.
        client.sock.sendall(b'{"execute": "query-version", "id": 999}')
        assert client.call("query-fdsets") == []
        number = client.call("add-fd", fds=[f.fileno()])["fdset-id"]
        assert [s["fdset-id"] for s in client.call("query-fdsets")] == [number]
        client.call("remove-fd", fdset_id=number)
        with pytest.raises(QmpError, match="No file descriptor supplied"):
            client.call("add-fd")
        with pytest.raises(QmpError, match="neither a regular file nor a block device"):
            client.call("add-fd", fds=[client.sock.fileno()])


# Help --------------------------------------------------------------------------------------

VERBS = [
    "snapshot", "stream", "commit", "copy", "change", "backing", "add", "remove", "lock",
    "group", "group stream", "group copy", "group commit", "current", "resize",
    "job complete", "job cancel", "job mode",
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = cowferry(capsys, *verb.split(), "--help")
    assert status == 0
    assert out.startswith(f"Usage: cowferry {verb} ")
    assert f"    cowferry {verb}" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def commands(of: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command, with the words that lead to it."""
    context = click.Context(of)
    for name in of.list_commands(context):
        command = of.get_command(context, name)
        assert command is not None, name
        yield f"{above}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")


def test_every_command_and_option_has_words_of_its_own() -> None:
    found = dict(commands(group))
    assert set(COMMANDS) <= set(found) and set(VERBS) <= set(found)
    offline = {name for name, (module, _) in COMMANDS.items() if module.startswith("offline")}
    for name, command in found.items():
        assert command.help, name
        for option in command.params:
            if isinstance(option, click.Option) and name not in offline:
                assert option.help, (name, option.name)
