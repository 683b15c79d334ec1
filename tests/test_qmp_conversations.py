"""The same conversations with our daemon and with qemu-storage-daemon, line by line.

What is compared is what clients rely on: answers, classes of errors, events and states in their
order; and afterwards every byte of the image that is the disk's by then. Where the two differ,
`DIFFERENCES` says so line by line, and why: a difference that is not there, or one that is there
no more, fails the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conversations import OURS, QEMU, READIED, SIZE, SLOW, Refused, Scene, Talk, speaking
from tests_support import need

Script = Callable[[Talk, Scene], str]  # returns the files that hold the disk at the end
SCRIPTS: dict[str, Script] = {}


class Differs(NamedTuple):
    """A line of QEMU's story, and the one that stands in its place in ours."""

    qemu: str
    ours: str
    why: str


def script(function: Script) -> Script:
    """Hold this conversation with both daemons."""
    SCRIPTS[function.__name__] = function
    return function


def asks(talk: Talk, command: str, **arguments: Any) -> None:
    """Run a command that may be refused: the story tells."""
    try:
        talk(command, **arguments)
    except Refused:
        return


# Commit --------------------------------------------------------------------------------------


@script
def commit_of_an_intermediate_layer(talk: Talk, scene: Scene) -> str:
    scene.start("commit")
    talk.until("null")
    scene.look("vm", "sn1", "base")
    return "vm.qcow2"


@script
def commit_of_the_active_layer(talk: Talk, scene: Scene) -> str:
    scene.start("active")
    talk.until("BLOCK_JOB_READY")
    talk("job-complete", id="j")
    talk.until("null")
    scene.look("vm", "sn1", "base")
    return "base.raw"


@script
def commit_called_off(talk: Talk, scene: Scene) -> str:
    for kind in ("commit", "active"):
        scene.start(kind, speed=SLOW)
        talk("job-cancel", id="j")
        talk.until("null")
    for verb in ("job-cancel", "block-job-cancel"):
        scene.start("active")
        talk.until("BLOCK_JOB_READY")
        talk(verb, **{"id" if verb == "job-cancel" else "device": "j"})
        talk.until("null")
    scene.look("vm", "sn1")
    return "vm.qcow2"


# Mirror --------------------------------------------------------------------------------------


@script
def mirror_and_pivot(talk: Talk, scene: Scene) -> str:
    scene.start("mirror")
    talk.until("BLOCK_JOB_READY")
    talk("block-job-complete", device="j")
    talk.until("null")
    scene.look("t", "vm")
    return "t.raw"


@script
def mirror_write_blocking(talk: Talk, scene: Scene) -> str:
    scene.start("mirror", copy_mode="write-blocking", granularity=65536, buf_size=1 << 20)
    talk.until("BLOCK_JOB_READY")
    talk("job-complete", id="j")
    talk.until("null")
    return "t.raw"


@script
def mirror_of_the_top_layer(talk: Talk, scene: Scene) -> str:
    scene.create("top", backing="sn1")
    scene.add("top", backing=None)
    talk("blockdev-mirror", job_id="j", device="vm", target="top", sync="top")
    talk.until("BLOCK_JOB_READY")
    talk("job-complete", id="j")
    talk.until("null")
    scene.look("vm", "top")
    return "top.qcow2"


@script
def mirror_cancelled_softly_when_ready(talk: Talk, scene: Scene) -> str:
    scene.start("mirror")
    talk.until("BLOCK_JOB_READY")
    talk("block-job-cancel", device="j")
    talk.until("null")
    scene.look("vm", "t")
    return "t.raw vm.qcow2"


@script
def mirror_cancelled_by_force(talk: Talk, scene: Scene) -> str:
    for ready in (True, False):
        for verb, given in (("job-cancel", {"id": "j"}), ("block-job-cancel", {"device": "j"})):
            scene.start("mirror", **({} if ready else {"speed": SLOW}))
            if ready:
                talk.until("BLOCK_JOB_READY")
            force = {"force": True} if ready and verb == "block-job-cancel" else {}
            talk(verb, **given, **force)
            talk.until("null")
    scene.look("vm", "t")
    return "vm.qcow2"


@script
def mirror_between_different_sizes(talk: Talk, scene: Scene) -> str:
    scene.create("short", SIZE // 2)
    scene.add("short")
    talk("blockdev-mirror", job_id="j", device="vm", target="short", sync="full")
    error = talk.until("BLOCK_JOB_COMPLETED")["error"]
    assert error == "Source and target image have different sizes"
    talk.until("null")
    return "vm.qcow2"


# The life of a job ---------------------------------------------------------------------------


def _manual(kind: str) -> Script:
    def talk_of(talk: Talk, scene: Scene) -> str:
        for verb in ("cancel", "finalize"):
            scene.start(kind, auto_finalize=False, auto_dismiss=False)
            if kind in READIED:
                talk.until("BLOCK_JOB_READY")
                talk("job-complete", id="j")
            talk.until("BLOCK_JOB_PENDING")
            scene.look("vm")  # nothing has changed yet
            for other in ("pause", "dismiss", "complete"):
                asks(talk, f"job-{other}", id="j")
            talk(f"job-{verb}", id="j")
            talk.until("concluded")
            entry = talk.quietly("query-jobs")[0]
            talk.note(f"{entry['status']} {entry['type']} {entry.get('error')}")
            for other in ("finalize", "cancel"):
                asks(talk, f"job-{other}", id="j")
            talk("job-dismiss", id="j")
            talk.until("null")
            asks(talk, "job-dismiss", id="j")
        return {"active": "base.raw", "mirror": "t.raw"}.get(kind, "vm.qcow2")

    return talk_of


def _paused(kind: str) -> Script:
    def talk_of(talk: Talk, scene: Scene) -> str:
        scene.start(kind, speed=SLOW)
        asks(talk, "job-resume", id="j")
        talk("job-pause", id="j")
        talk.until("paused")
        for command in ("job-pause", "block-job-pause", "block-job-cancel", "job-complete"):
            asks(talk, command, **{"id" if command.startswith("job") else "device": "j"})
        asks(talk, "block-job-set-speed", device="j", speed=-1)
        talk("block-job-set-speed", device="j", speed=0)
        talk("block-job-resume", device="j")
        if kind in READIED:
            talk.until("BLOCK_JOB_READY")
            talk("block-job-pause", device="j")
            talk.until("standby")
            asks(talk, "block-job-cancel", device="j")
            talk("block-job-set-speed", device="j", speed=1 << 30)
            talk("job-complete", id="j")
            talk.note(f"completing, it is {talk.job('j')['status']}")
            talk("job-resume", id="j")
        talk.until("null")
        return {"active": "base.raw", "mirror": "t.raw"}.get(kind, "vm.qcow2")

    return talk_of


for _kind in ("stream", "commit", "active", "mirror"):
    SCRIPTS[f"{_kind}_finalized_and_dismissed_by_hand"] = _manual(_kind)
    SCRIPTS[f"{_kind}_paused_and_resumed"] = _paused(_kind)


def _busy(kind: str) -> Script:
    """What else is asked of a disk while a job runs on it."""

    def talk_of(talk: Talk, scene: Scene) -> str:
        for name in ("new", "other"):
            scene.create(name)
            scene.add(name, backing=None)
        scene.start(kind, speed=SLOW)
        asks(talk, "block-stream", job_id="k", device="vm")
        asks(talk, "block-commit", job_id="k", device="vm")
        asks(talk, "block-commit", job_id="k", device="vm", top_node="sn1")
        asks(talk, "blockdev-mirror", job_id="k", device="vm", target="other", sync="full")
        asks(talk, "blockdev-mirror", job_id="j", device="other", target="new", sync="full")
        asks(talk, "block_resize", node_name="vm", size=SIZE * 2)
        if kind != "commit":  # QEMU closes the disk and ends the job
            asks(talk, "blockdev-del", node_name="vm")
        talk("job-cancel", id="j")
        talk.until("null")
        talk("blockdev-snapshot", node="vm", overlay="new")
        scene.look("new", "vm")
        return "vm.qcow2"

    return talk_of


for _kind in ("stream", "commit", "active", "mirror"):
    SCRIPTS[f"{_kind}_excludes_others"] = _busy(_kind)


# Snapshots and transactions ------------------------------------------------------------------


def _two_disks(scene: Scene) -> list[dict[str, Any]]:
    for name in ("a", "b"):
        scene.create(name)
        scene.add(name)
        scene.create(f"{name}-top", backing=name)
        scene.add(f"{name}-top", backing=None)
    return [
        {"type": "blockdev-snapshot", "data": {"node": name, "overlay": f"{name}-top"}}
        for name in ("a", "b")
    ]


@script
def snapshot(talk: Talk, scene: Scene) -> str:
    scene.create("top", backing="vm")
    scene.add("top", backing=None)
    talk("blockdev-snapshot", node="vm", overlay="top")
    scene.look("top", "vm", "sn1")
    asks(talk, "blockdev-snapshot", node="vm", overlay="top")
    asks(talk, "blockdev-del", node_name="vm")
    return "top.qcow2"


@script
def transaction_of_two_snapshots(talk: Talk, scene: Scene) -> str:
    actions = _two_disks(scene)
    talk("transaction", actions=actions)
    scene.look("a", "b", "a-top", "b-top")
    asks(talk, "transaction", actions=actions)
    talk("transaction", actions=[])
    return "vm.qcow2"


@script
def transaction_rolled_back(talk: Talk, scene: Scene) -> str:
    actions = _two_disks(scene)
    missing = {"type": "blockdev-snapshot", "data": {"node": "b", "overlay": "nope"}}
    taken = {"type": "blockdev-snapshot", "data": {"node": "vm", "overlay": "a-top"}}
    for last in (
        {"type": "abort", "data": {}},
        {"type": "nonsense", "data": {}},
        {"type": "blockdev-snapshot", "data": {"node": "b"}},
        missing,
        taken,
    ):
        asks(talk, "transaction", actions=[actions[0], last])
        asks(talk, "transaction", actions=[last, actions[0]])
    grouped = {"completion_mode": "grouped"}
    asks(talk, "transaction", actions=actions, properties=grouped)
    scene.look("a", "b", "a-top", "b-top", "vm")
    talk("transaction", actions=actions)  # nothing of it is left
    scene.look("a", "b", "a-top", "b-top")
    return "vm.qcow2"


# Reopening -----------------------------------------------------------------------------------


@script
def reopen(talk: Talk, scene: Scene) -> str:
    scene.create("other")
    scene.add("other")
    vm = {**scene.node("vm"), "backing": "sn1"}
    other = scene.node("other")
    without = scene.node("vm")
    for options in (
        [without],
        [{**vm, "read-only": True}],
        [vm],
        [{**other, "read-only": True}, without],
        [{**vm, "read-only": True}, {**other, "read-only": True}],
        [vm, other],
        [{**vm, "backing": "nope"}],
        [{**vm, "backing": "vm"}],
        [{**vm, "node-name": "nope"}],
        [{**vm, "driver": "raw"}],
        [{**vm, "backing": "base"}],
        [{**vm, "backing": None}],
        [{**vm, "backing": "base"}],
    ):
        asks(talk, "blockdev-reopen", options=options)
        scene.look("vm", "sn1", "base", "other")
    return "vm.qcow2"


@script
def change_of_the_recorded_backing_file(talk: Talk, scene: Scene) -> str:
    for image, name in (
        ("vm", str(scene.folder / "sn1.qcow2")),
        ("base", "sn1.qcow2"),
        ("t", "sn1.qcow2"),
        ("nope", "sn1.qcow2"),
    ):
        asks(talk, "change-backing-file", device="vm", image_node_name=image, backing_file=name)
    asks(talk, "change-backing-file", device="sn1", image_node_name="sn1", backing_file="base.raw")
    scene.look("vm", "sn1", "base")
    return "vm.qcow2"


# The table of differences --------------------------------------------------------------------

SAFE = "the image that was left is never writable beside the one that is current (M5)"
ALIAS = "the event of 2011 is told beside today's"
SHINES = (
    "QEMU leaves it to the client to open the target over the right backing node, and the guest "
    "reads zeroes from where that was forgotten; here the target lies over it from the start"
)
IN_USE = "a disk that is in use is DeviceInUse here for every command, as 2011 has it"

ENDED = "running waiting pending BLOCK_JOB_COMPLETED concluded null"
TOLD = "BLOCK_JOB_COMPLETED concluded"
BUSY = tuple(
    Differs(f"{command}: GenericError", f"{command}: DeviceInUse", IN_USE)
    for command in ("block-stream", "block-commit", "blockdev-mirror", "block_resize")
)
BUSY_ROOT = (
    *BUSY,
    Differs("blockdev-del: GenericError", "blockdev-del: DeviceInUse", IN_USE),
)
LEFT = Differs("vm is rw over sn1.qcow2", "vm is ro over sn1.qcow2", SAFE)

DIFFERENCES: dict[str, tuple[Differs, ...]] = {
    "mirror_and_pivot": (LEFT,),
    "mirror_of_the_top_layer": (
        LEFT,
        Differs("top is rw over nothing", "top is rw over sn1.qcow2", SHINES),
    ),
    "stream_finalized_and_dismissed_by_hand": (
        Differs(
            f"job-finalize: return | j {TOLD}",
            f"job-finalize: return | j {TOLD} | vm BLOCK_STREAM_COMPLETED",
            ALIAS,
        ),
    ),
    "stream_paused_and_resumed": (
        Differs(
            f"block-job-resume: return | j {ENDED}",
            f"block-job-resume: return | j {ENDED} | vm BLOCK_STREAM_COMPLETED",
            ALIAS,
        ),
    ),
    "stream_excludes_others": BUSY_ROOT,
    "active_excludes_others": BUSY_ROOT,
    "mirror_excludes_others": BUSY_ROOT,
    "commit_excludes_others": BUSY,
}


# The test ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Talk]]:
    """Both daemons. A conversation leaves nothing behind, so they last for all of them."""
    need("qemu-storage-daemon")
    with ExitStack() as running:
        yield {
            name: running.enter_context(speaking(tmp_path_factory.mktemp(name), command))
            for name, command in (("qemu", QEMU), ("ours", OURS))
        }


def held(talk: Talk, folder: Path, name: str) -> list[str]:
    """The story of a conversation; the bytes are checked."""
    folder.mkdir()
    talk.steps.clear()
    scene = Scene(talk, folder)
    try:
        files = SCRIPTS[name](talk, scene)
        for step in talk.steps:
            if step.what in ("block-stream", "block-commit", "blockdev-mirror"):
                begun = step.early[:2] == ["created", "running"]
                assert begun == (step.answer == "return"), f"{step.early} before {step}"
    finally:
        scene.over()
    for file in files.split():
        assert scene.holds(file) == "", file
    return talk.story()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_conversation(tmp_path: Path, name: str, pair: dict[str, Talk]) -> None:
    theirs = held(pair["qemu"], tmp_path / "q", name)
    ours = held(pair["ours"], tmp_path / "c", name)
    assert len(ours) == len(theirs), "\n".join(["ours:", *ours, "theirs:", *theirs])
    known = {(d.qemu, d.ours) for d in DIFFERENCES.get(name, ())}
    found = {(q, o) for q, o in zip(theirs, ours, strict=True) if q != o}
    assert found == known, "\n".join(f"qemu: {q}\nours: {o}" for q, o in found ^ known)


def shapes(talk: Talk, folder: Path, kind: str) -> dict[str, set[str]]:
    """The members of every event and answer about a job, from its start to its end."""
    folder.mkdir()
    scene = Scene(talk, folder)
    first = len(talk.events)
    try:
        scene.start(kind, speed=SLOW, auto_finalize=False, auto_dismiss=False)
        seen = {"running": set(talk.job("j")), "info": set(talk("query-jobs")[0])}
        talk("block-job-set-speed", device="j", speed=0)
        if kind in READIED:
            talk.until("BLOCK_JOB_READY")
            talk("job-complete", id="j")
        talk.until("BLOCK_JOB_PENDING")
        talk("job-cancel", id="j")
        talk.until("concluded")
        seen |= {"cancelled": set(talk("query-jobs")[0]), "entry": set(talk.job("j"))}
        talk("job-dismiss", id="j")
        talk.until("null")
        scene.start(kind)
        if kind in READIED:
            talk.until("BLOCK_JOB_READY")
            talk("job-complete", id="j")
        talk.until("null")
        for event in talk.events[first:]:
            seen[event["event"]] = set(event["data"]) | set(event["timestamp"])
    finally:
        scene.over()
    return seen


OURS_ALONE = {
    "actively-synced", "copy-mode", "x-remaining", "x-dirty-rate", "x-copy-rate", "x-note",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["stream", "commit", "active", "mirror"])
def test_the_same_members(tmp_path: Path, kind: str, pair: dict[str, Talk]) -> None:
    """Nothing that a client reads is missing, and what is added is named so or newer."""
    theirs = shapes(pair["qemu"], tmp_path / "q", kind)
    ours = shapes(pair["ours"], tmp_path / "c", kind)
    assert set(ours) - set(theirs) <= {"BLOCK_STREAM_COMPLETED"}
    for name, members in theirs.items():
        assert members <= ours[name], name
        assert ours[name] - members <= OURS_ALONE, name


# What only we can say ------------------------------------------------------------------------
# qemu-storage-daemon has none of these: they are for whole guests, from 2011, or newer than 7.2.


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """Ours."""
    with speaking(tmp_path_factory.mktemp("ours"), OURS) as talk:
        yield talk


@contextmanager
def a_scene(talk: Talk, folder: Path) -> Iterator[Scene]:
    """A conversation that begins, and leaves nothing behind."""
    scene = Scene(talk, folder)
    talk.steps.clear()
    try:
        yield scene
    finally:
        scene.over()


READY = "created running ready BLOCK_JOB_READY"
DONE = "waiting pending BLOCK_JOB_COMPLETED concluded null"
GONE = "aborting BLOCK_JOB_CANCELLED concluded null"


@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
def test_drive_mirror(tmp_path: Path, daemon: Talk, mode: str) -> None:
    with a_scene(daemon, tmp_path) as scene:
        if mode == "existing":
            scene.create("d")
        daemon(
            "drive-mirror", job_id="j", device="vm", target=str(tmp_path / "d.qcow2"), sync="full",
            format="qcow2", mode=mode, node_name="d",
        )  # fmt: skip
        daemon.until("BLOCK_JOB_READY")
        daemon("job-complete", id="j")
        daemon.until("null")
        scene.look("vm", "d")
        assert daemon.story() == [
            f"drive-mirror: return | j {READY}",
            f"job-complete: return | j {DONE}",
            "vm is ro over sn1.qcow2",
            "d is rw over nothing",
        ]
    assert scene.holds("d.qcow2") == ""


def test_a_cancelled_drive_mirror_closes_its_target(tmp_path: Path, daemon: Talk) -> None:
    with a_scene(daemon, tmp_path) as scene:
        target = str(tmp_path / "d.qcow2")
        daemon("drive-mirror", job_id="j", device="vm", target=target, sync="top", node_name="d")
        daemon.until("BLOCK_JOB_READY")
        daemon("job-cancel", id="j")
        daemon.until("null")
        scene.look("vm", "d")
        assert daemon.story() == [
            f"drive-mirror: return | j {READY}",
            f"job-cancel: return | j {GONE}",
            "vm is rw over sn1.qcow2",
            "d is gone",
        ]
    assert scene.holds("vm.qcow2") == ""


def test_a_target_lies_over_the_shared_image_only_while_it_is_a_copy(
    tmp_path: Path, daemon: Talk
) -> None:
    """With sync top and none, what is not copied shines through the target, or is nothing."""
    with a_scene(daemon, tmp_path) as scene:
        scene.create("new")  # its header names no backing file
        scene.add("new")
        for sync, over in (("top", "sn1.qcow2"), ("none", "vm.qcow2")):
            daemon("blockdev-mirror", job_id="j", device="vm", target="new", sync=sync)
            daemon.until("BLOCK_JOB_READY")
            scene.look("new")
            daemon("job-cancel", id="j")
            daemon.until("null")
            scene.look("new")
            assert daemon.story() == [
                f"blockdev-mirror: return | j {READY}",
                f"new is rw over {over}",
                f"job-cancel: return | j {GONE}",
                "new is rw over nothing",
            ]
            daemon.steps.clear()
        daemon("blockdev-mirror", job_id="j", device="vm", target="new", sync="top")
        daemon.until("BLOCK_JOB_READY")
        daemon("job-complete", id="j")
        daemon.until("null")
    assert scene.holds("new.qcow2") == "", "the header does not say what lies below"


def _named(scene: Scene, node: str, name: str) -> dict[str, Any]:
    path = str(scene.folder / f"{name}.qcow2")
    data = {"node-name": node, "snapshot-file": path, "snapshot-node-name": name}
    return {"type": "blockdev-snapshot-sync", "data": data}


def test_snapshots_into_files(tmp_path: Path, daemon: Talk) -> None:
    with a_scene(daemon, tmp_path) as scene:
        daemon("blockdev-snapshot-sync", **_named(scene, "vm", "one")["data"])
        daemon("snapshot_blkdev", device="one", snapshot_file=str(tmp_path / "two.qcow2"))
        scene.look("vm", "one")
        assert daemon.story() == [
            "blockdev-snapshot-sync: return",
            "snapshot_blkdev: return",
            "vm is ro over sn1.qcow2",
            "one is ro over vm.qcow2",
        ]
    assert scene.holds("two.qcow2") == ""


def test_a_transaction_of_files_rolled_back_leaves_no_file(tmp_path: Path, daemon: Talk) -> None:
    with a_scene(daemon, tmp_path) as scene:
        scene.create("a")
        scene.add("a")
        before = sorted(tmp_path.iterdir())
        both = [_named(scene, "vm", "vm-top"), _named(scene, "a", "a-top")]
        asks(daemon, "transaction", actions=[*both, {"type": "abort", "data": {}}])
        asks(daemon, "transaction", actions=[both[0], _named(scene, "nope", "x")])
        asks(daemon, "transaction", actions=[both[0], _named(scene, "vm", "again")])
        asks(daemon, "transaction", actions=[both[0], _named(scene, "a", "vm-top")])
        asks(daemon, "transaction", actions=[both[0], _named(scene, "a", "9x")])
        scene.look("vm", "a", "vm-top", "a-top")
        assert daemon.story() == [
            "transaction: GenericError",
            "transaction: DeviceNotFound",
            "transaction: DeviceInUse",
            "transaction: GenericError",
            "transaction: GenericError",
            "vm is rw over sn1.qcow2",
            "a is rw over nothing",
            "vm-top is gone",
            "a-top is gone",
        ]
        assert sorted(tmp_path.iterdir()) == before
        daemon("transaction", actions=both)
        scene.look("vm-top", "a-top")
        assert daemon.story()[-2:] == ["vm-top is rw over vm.qcow2", "a-top is rw over a.qcow2"]
    assert scene.holds("vm-top.qcow2") == ""


def test_change(tmp_path: Path, daemon: Talk) -> None:
    with a_scene(daemon, tmp_path) as scene:
        scene.create("top", backing="vm")
        scene.create("short", SIZE // 2)
        given = {"device": "vm", "format": "qcow2", "notify": False}
        asks(daemon, "change", target=str(tmp_path / "short.qcow2"), **given)
        asks(daemon, "change", target=str(tmp_path / "nope.qcow2"), **given)
        scene.start("stream", speed=SLOW)
        asks(daemon, "change", target=str(tmp_path / "top.qcow2"), **given)
        daemon("job-cancel", id="j")
        daemon.until("null")
        asks(daemon, "change", target=str(tmp_path / "top.qcow2"), **given)
        scene.look("vm")
        assert daemon.story() == [
            "change: GenericError",
            "change: GenericError",
            "block-stream: return | j created running",
            "change: DeviceInUse",
            f"job-cancel: return | j {GONE}",
            "change: return",
            "vm is ro over sn1.qcow2",
        ]
    assert scene.holds("top.qcow2") == ""


def test_a_recorded_backing_file_keeps_its_format(tmp_path: Path, daemon: Talk) -> None:
    """QEMU records the overlay's own format for it, and a raw base cannot be read any more."""
    with a_scene(daemon, tmp_path) as scene:
        (tmp_path / "copy.raw").write_bytes((tmp_path / "base.raw").read_bytes())
        given = {"device": "vm", "image_node_name": "sn1"}
        daemon("change-backing-file", backing_file=str(tmp_path / "copy.raw"), **given)
        other = scene.file("t.raw")["filename"]
        refused = daemon.refusal("change-backing-file", backing_file=other, **given)
        assert "differs from" in refused.desc and "unsafe" in refused.hint
    (tmp_path / "base.raw").unlink()
    assert scene.holds("vm.qcow2") == ""


def test_the_copy_mode_is_switched_both_ways(tmp_path: Path, daemon: Talk) -> None:
    with a_scene(daemon, tmp_path) as scene:
        scene.start("mirror", speed=SLOW)
        for mode in ("write-blocking", "background", "write-blocking"):
            daemon("block-job-change", id="j", type="mirror", copy_mode=mode)
            entry = daemon.job("j")
            assert entry["copy-mode"] == mode and entry["actively-synced"] is False
        daemon("block-job-set-speed", device="j", speed=0)
        daemon.until("BLOCK_JOB_READY")
        assert daemon.job("j")["actively-synced"] is True
        daemon("block-job-change", id="j", type="mirror", copy_mode="background")
        assert daemon.job("j")["actively-synced"] is False
        daemon("job-complete", id="j")
        daemon.until("null")
    assert scene.holds("t.raw") == ""


def test_a_group_is_ready_once_and_ends_once(tmp_path: Path, daemon: Talk) -> None:
    with a_scene(daemon, tmp_path) as scene:
        scene.create("b")
        scene.create("b-top", backing="b")
        scene.add("b-top")
        members = [{"device": "vm"}, {"device": "b-top"}]
        daemon("x-group-start", id="g", type="commit", members=members)
        daemon.until("JOB_GROUP_READY")
        asks(daemon, "job-complete", id="g-vm")
        asks(daemon, "x-group-complete", id="nope")
        daemon("x-group-complete", id="g")
        assert daemon.until("JOB_GROUP_COMPLETED") == {
            "id": "g", "members": ["g-vm", "g-b-top"],
        }  # fmt: skip
        story = daemon.story()
        assert story == [
            f"x-group-start: return | g JOB_GROUP_READY | g-b-top {READY} | g-vm {READY}",
            "job-complete: GenericError",
            "x-group-complete: GenericError",
            f"x-group-complete: return | g JOB_GROUP_COMPLETED | g-b-top {DONE} | g-vm {DONE}",
        ]
    assert scene.holds("base.raw") == ""
