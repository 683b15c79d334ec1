"""Every verb in every state of every kind of job, by every name that the verb has.

qmp.md, sections 2.2 and 2.3, written down again as two tables: `SAYS` has what a verb brings about
in the states that accept it, and every other state refuses it in the same words. Most of it is
asked of qemu-storage-daemon as well, so the tables are not only what we believe.

A job is held in `running` by a low speed, in `pending` and `concluded` by leaving the last steps
to a client, in `paused` and `standby` by a pause; in `waiting` by a group whose other member is
not there yet; and in `aborting` by a group whose other member cannot stop, for its file system is
frozen. `created` lasts no longer than the command that makes the job.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chains import chain_of_disks, contents, differs
from conversations import KINDS, OURS, QEMU, READIED, SIZE, SLOW, Scene, Talk, speaking
from cowferry.drivers import opening
from tests_support import need, unavailable

DONE = "BLOCK_JOB_COMPLETED concluded null"
GONE = "aborting BLOCK_JOB_CANCELLED concluded null"
RESULT = {"stream": "vm.qcow2", "commit": "vm.qcow2", "active": "base.raw", "mirror": "t.raw"}

STATES = {
    "stream": ("running", "paused", "pending", "concluded"),
    "commit": ("running", "paused", "pending", "concluded"),
    "active": ("running", "paused", "ready", "standby", "pending", "concluded"),
    "mirror": ("running", "paused", "ready", "standby", "pending", "concluded"),
}


class Command(NamedTuple):
    """One of the names of a verb."""

    verb: str
    name: str
    arguments: dict[str, Any]


COMMANDS = (
    Command("cancel", "job-cancel", {"id": "j"}),
    Command("cancel", "block-job-cancel", {"device": "j", "force": True}),
    Command("cancel softly", "block-job-cancel", {"device": "j"}),
    Command("pause", "job-pause", {"id": "j"}),
    Command("pause", "block-job-pause", {"device": "j"}),
    Command("resume", "job-resume", {"id": "j"}),
    Command("resume", "block-job-resume", {"device": "j"}),
    Command("set-speed", "block-job-set-speed", {"device": "j", "speed": SLOW // 2}),
    Command("complete", "job-complete", {"id": "j"}),
    Command("complete", "block-job-complete", {"device": "j"}),
    Command("finalize", "job-finalize", {"id": "j"}),
    Command("finalize", "block-job-finalize", {"id": "j"}),
    Command("dismiss", "job-dismiss", {"id": "j"}),
    Command("dismiss", "block-job-dismiss", {"id": "j"}),
)

ALREADY = "Job is already paused"
NEVER = "Can't resume a job that was not paused"
PAUSED = "The block job for device 'j' is currently paused"

#: What is told after a verb, or (in REFUSED) the words with which it is refused all the same.
SAYS = {
    "running": {"cancel": GONE, "cancel softly": GONE, "pause": "paused", "set-speed": ""},
    "paused": {"cancel": f"running {GONE}", "resume": "running", "set-speed": ""},
    "ready": {
        "cancel": GONE,
        "cancel softly": f"waiting pending {DONE}",
        "pause": "standby",
        "set-speed": "",
        "complete": f"waiting pending {DONE}",
    },
    "standby": {
        "cancel": f"ready {GONE}",
        "resume": "ready",
        "set-speed": "",
        "complete": "",  # it is done when the job is resumed
    },
    "waiting": {"cancel": GONE, "cancel softly": GONE},
    "pending": {"cancel": GONE, "cancel softly": GONE, "finalize": DONE},
    "aborting": {},
    "concluded": {"dismiss": "null"},
}
REFUSED = {
    "running": {"resume": NEVER},
    "paused": {"pause": ALREADY, "cancel softly": PAUSED},
    "ready": {"resume": NEVER},
    "standby": {"pause": ALREADY, "cancel softly": PAUSED},
}


def refusal(state: str, verb: str, id: str = "j") -> str:
    """The words with which a verb is refused in that state."""
    word = verb.partition(" ")[0]
    plain = f"Job '{id}' in state '{state}' cannot accept command verb '{word}'"
    return REFUSED.get(state, {}).get(verb, plain)


@pytest.fixture(scope="module", params=["ours", "qemu"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each of the two daemons, for all tests of this file."""
    if request.param == "qemu":
        need("qemu-storage-daemon")
    command = OURS if request.param == "ours" else QEMU
    with speaking(tmp_path_factory.mktemp(request.param), command) as talk:
        yield talk


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """Ours alone."""
    with speaking(tmp_path_factory.mktemp("alone"), OURS) as talk:
        yield talk


def status(talk: Talk, id: str = "j") -> str:
    """The state that query-jobs has for it."""
    states: dict[str, str] = {j["id"]: j["status"] for j in talk.quietly("query-jobs")}
    return states.get(id, "null")


@pytest.mark.parametrize(("kind", "state"), [(k, s) for k in KINDS for s in STATES[k]])
def test_verbs_that_a_state_refuses(
    tmp_path: Path, daemon: Talk, kind: str, state: str, request: pytest.FixtureRequest
) -> None:
    qemu = request.node.callspec.params["daemon"] == "qemu"
    scene = Scene(daemon, tmp_path)
    try:
        scene.hold(kind, state)
        assert status(daemon) == state
        for verb, name, arguments in COMMANDS:
            if verb in SAYS[state]:
                continue
            told = len(daemon.events)
            refused = daemon.refusal(name, **arguments)
            words = refusal(state, verb)
            if qemu and verb == "resume" and state in ("pending", "concluded"):
                words = NEVER  # it asks whether the job is paused before anything else
            assert (refused.klass, refused.desc) == ("GenericError", words), name
            assert status(daemon) == state and len(daemon.events) == told, name
    finally:
        scene.over()
    left = RESULT[kind] if state == "concluded" else "vm.qcow2"
    assert scene.holds(left) == "", "a refused verb has done something"


@pytest.mark.parametrize(("kind", "state"), [(k, s) for k in KINDS for s in STATES[k]])
def test_verbs_that_a_state_accepts(tmp_path: Path, daemon: Talk, kind: str, state: str) -> None:
    for n, (verb, name, arguments) in enumerate(COMMANDS):
        if verb not in SAYS[state]:
            continue
        folder = tmp_path / str(n)
        folder.mkdir()
        scene = Scene(daemon, folder)
        try:
            scene.hold(kind, state)
            words = SAYS[state][verb].split()
            daemon(name, **arguments)
            step = daemon.steps[-1]
            if words:
                daemon.until(words[-1])
            elif verb == "set-speed":
                assert daemon.job("j")["speed"] == arguments["speed"]
            else:  # completing in standby
                assert status(daemon) == "standby" and not step.told
                daemon("job-resume", id="j")
                step, words = daemon.steps[-1], f"ready waiting pending {DONE}".split()
                daemon.until("null")
            after = words[-1] if words else state
            assert status(daemon) == after and step.told.get("j", []) == words, name
        finally:
            scene.over()
        done = "BLOCK_JOB_COMPLETED" in words or state == "concluded"
        assert scene.holds(RESULT[kind] if done else "vm.qcow2") == "", name


@pytest.mark.parametrize(
    ("kind", "state"), [(k, s) for k in KINDS for s in STATES[k] if s != "concluded"]
)
@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_a_guest_writes_while_a_job_is_held(
    tmp_path: Path, ours: Talk, kind: str, state: str, end: str
) -> None:
    """Whatever the job was waiting for, in the end every byte is where the disk is.

    (QEMU holds every write back while a mirror is pending, for as long as the client likes.)"""
    daemon = ours
    scene = Scene(daemon, tmp_path)
    try:
        with scene.guest() as guest:
            scene.hold(kind, state)
            for at in (0, 100_000, SIZE // 2 + 512, SIZE - 4096):
                data = random.Random(at).randbytes(4096)
                guest.pwrite(data, at)
                scene.oracle[at : at + len(data)] = data
            guest.flush()
            if end == "cancel":
                daemon("job-cancel", id="j")
            else:
                if state in ("paused", "standby"):
                    daemon("job-resume", id="j")
                if state in ("running", "paused"):
                    daemon("block-job-set-speed", device="j", speed=0)
                if state in ("running", "paused") and kind in READIED:
                    daemon.until("BLOCK_JOB_READY")
                if state == "pending":
                    daemon("job-finalize", id="j")
                elif kind in READIED:
                    daemon("job-complete", id="j")
            daemon.until("BLOCK_JOB_COMPLETED" if end == "finish" else "BLOCK_JOB_CANCELLED")
            daemon.until("null")
            assert differs(guest.pread(SIZE, 0), scene.oracle) == ""
    finally:
        scene.over()
    assert scene.holds(RESULT[kind] if end == "finish" else "vm.qcow2") == ""


def test_verbs_for_a_job_that_is_no_more(tmp_path: Path, daemon: Talk) -> None:
    scene = Scene(daemon, tmp_path)
    scene.hold("mirror", "running")
    daemon("job-cancel", id="j")
    daemon.until("null")
    for _, name, arguments in COMMANDS:
        refused = daemon.refusal(name, **arguments)
        if name.startswith("block-"):
            assert (refused.klass, refused.desc) == ("DeviceNotActive", "Block job 'j' not found")
        else:
            assert (refused.klass, refused.desc) == ("GenericError", "Job not found")
    scene.over()


# block-job-change, which qemu-storage-daemon 7.2 does not have -----------------------------------


@pytest.mark.parametrize(("kind", "state"), [(k, s) for k in KINDS for s in STATES[k]])
def test_change_in_every_state(tmp_path: Path, ours: Talk, kind: str, state: str) -> None:
    scene = Scene(ours, tmp_path)
    try:
        scene.hold(kind, state)

        def refused(**arguments: Any) -> str:
            error = ours.refusal("block-job-change", **{"id": "j", "type": "mirror", **arguments})
            assert error.klass == "GenericError" and status(ours) == state
            return error.desc

        blocking = {"copy_mode": "write-blocking"}
        if state in ("pending", "concluded"):
            assert refused(**blocking) == refusal(state, "change")
        elif kind != "mirror":
            assert refused(**blocking) == "Job type does not support change"
            if kind != "active":  # it is a mirror into the base, and may be changed as one
                type_ = ours.job("j")["type"]
                assert refused(type=type_, **blocking) == "Job type does not support change"
        else:
            assert refused(type="commit", **blocking) == "Job type does not support change"
            bad = "Parameter 'copy-mode' does not accept value 'slow'"
            assert refused(copy_mode="slow") == bad
            assert refused() == "Parameter 'copy-mode' is missing"
            for mode in ("write-blocking", "background"):
                ours("block-job-change", id="j", type="mirror", copy_mode=mode)
                assert ours.job("j")["copy-mode"] == mode and status(ours) == state
        missing = ours.refusal("block-job-change", id="zz", type="mirror", **blocking)
        assert (missing.klass, missing.desc) == ("DeviceNotActive", "Block job 'zz' not found")
    finally:
        scene.over()


# Groups: waiting, and aborting -------------------------------------------------------------------


GROUPS = ("stream", "commit", "copy")


def another_disk(talk: Talk, folder: Path) -> bytearray:
    """A disk `b`, whose images lie in that folder; what it reads as."""
    oracle = chain_of_disks(folder, ["base.raw", "b.qcow2"], SIZE)
    file = {"driver": "file", "filename": str(folder / "b.qcow2")}
    talk.quietly("blockdev-add", driver="qcow2", node_name="b", file=file)
    return oracle


def group(talk: Talk, type: str, folder: Path, **more: Any) -> None:
    """Begin a group `g` of both disks."""
    members = [{"device": d, "target": str(folder / f"{d}-copy.qcow2")} for d in ("vm", "b")]
    for m in members:
        if type != "copy":
            del m["target"]
    talk("x-group-start", id="g", type=type, members=members, **more)


def hold_waiting(talk: Talk, type: str, folder: Path) -> None:
    """Have `g-vm` wait for `g-b`."""
    if type == "stream":
        group(talk, type, folder, speed=SLOW)
        talk("block-job-set-speed", device="g-vm", speed=0)
    else:
        group(talk, type, folder)
        talk.until("JOB_GROUP_READY")
        talk("job-pause", id="g-b")
        talk.until("standby", id="g-b")
        talk("x-group-complete", id="g")
    talk.until("waiting", id="g-vm")


def go_on(talk: Talk, type: str) -> None:
    """Let `g-b` come, too."""
    if type == "stream":
        talk("block-job-set-speed", device="g-b", speed=0)
    else:
        talk("job-resume", id="g-b")


def of(command: Command, id: str) -> dict[str, Any]:
    """Its arguments, for another job."""
    return {k: id if v == "j" else v for k, v in command.arguments.items()}


@pytest.mark.parametrize("type", GROUPS)
def test_verbs_that_waiting_refuses(tmp_path: Path, ours: Talk, type: str) -> None:
    scene = Scene(ours, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    another_disk(ours, other)
    try:
        hold_waiting(ours, type, other)
        for command in COMMANDS:
            if command.verb in SAYS["waiting"]:
                continue
            told = len(ours.events)
            refused = ours.refusal(command.name, **of(command, "g-vm"))
            assert refused.desc == refusal("waiting", command.verb, "g-vm"), command.name
            assert refused.klass == "GenericError" and status(ours, "g-vm") == "waiting"
            assert len(ours.events) == told
        refused = ours.refusal("block-job-change", id="g-vm", type="mirror", copy_mode="background")
        assert refused.desc == refusal("waiting", "change", "g-vm")
        go_on(ours, type)
        assert "error" not in ours.until("JOB_GROUP_COMPLETED")
    finally:
        scene.over()
    now = {"stream": "vm.qcow2", "commit": "base.raw", "copy": "other/vm-copy.qcow2"}
    assert scene.holds(now[type]) == ""


@pytest.mark.parametrize("type", GROUPS)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_waiting_accepts_a_cancel(tmp_path: Path, ours: Talk, type: str, n: int) -> None:
    """The other member is called off first, and says so first."""
    scene = Scene(ours, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    another_disk(ours, other)
    try:
        hold_waiting(ours, type, other)
        told = len(ours.events)
        ours(COMMANDS[n].name, **of(COMMANDS[n], "g-vm"))
        assert ours.until("JOB_GROUP_COMPLETED")["cancelled"] is True
        step = ours.steps[-1]
        assert step.told["g-vm"] == GONE.split()
        assert step.told["g-b"] == (["ready"] if type != "stream" else []) + GONE.split()
        gone = [e["data"]["device"] for e in ours.events[told:] if "CANCELLED" in e["event"]]
        assert gone == ["g-b", "g-vm"]
        assert ours("x-query-groups") == []
    finally:
        scene.over()
    assert scene.holds("vm.qcow2") == ""


@contextmanager
def frozen(folder: Path) -> Iterator[tuple[Path, Any]]:
    """A file system of its own in `folder`, and a function that freezes or thaws it."""
    need("mkfs.ext4", "fsfreeze", "mount")
    if os.geteuid() != 0:
        unavailable("mounting needs root")
    image, mounted = folder / "fs.img", folder / "fs"
    with open(image, "wb") as f:
        f.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    mounted.mkdir()
    done = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, text=True)
    if done.returncode != 0:
        unavailable(f"cannot mount a loop device: {done.stderr.strip()}")
    ice: list[bool] = []

    def freeze(on: bool) -> None:
        subprocess.run(["fsfreeze", "--freeze" if on else "--unfreeze", mounted], check=True)
        ice[:] = [on] if on else []

    try:
        yield mounted, freeze
    finally:
        if ice:
            freeze(False)
        subprocess.run(["umount", mounted], check=True)


def test_aborting_refuses_every_verb(tmp_path: Path, ours: Talk) -> None:
    """A member that was cancelled is not over before the others are, and one of them cannot stop:
    nobody ever cancels a write in flight."""
    with frozen(tmp_path) as (mounted, freeze):
        scene = Scene(ours, tmp_path)
        oracle = another_disk(ours, mounted)
        try:
            freeze(True)
            group(ours, "stream", mounted, speed=SLOW)
            ours.poll(lambda: ours.job("g-b")["busy"] is True, "a write that does not return")
            ours("job-cancel", id="g-vm")
            ours.until("aborting", id="g-vm")
            told = len(ours.events)
            for command in COMMANDS:
                refused = ours.refusal(command.name, **of(command, "g-vm"))
                words = refusal("aborting", command.verb, "g-vm")
                assert (refused.klass, refused.desc) == ("GenericError", words), command.name
            change = {"id": "g-vm", "type": "mirror", "copy_mode": "background"}
            refused = ours.refusal("block-job-change", **change)
            assert refused.desc == refusal("aborting", "change", "g-vm")
            assert status(ours, "g-vm") == "aborting" and status(ours, "g-b") == "running"
            assert len(ours.events) == told
            freeze(False)
            ours.until("JOB_GROUP_COMPLETED")
            assert ours.steps[-1].told["g-b"] == GONE.split()
        finally:
            if status(ours, "g-b") == "running":
                freeze(False)
            scene.over()
        node = opening.open_image(str(mounted / "b.qcow2"))
        assert differs(contents(node), oracle) == ""
        opening.close_chain(node)
    assert scene.holds("vm.qcow2") == ""
