"""Backups, spoken of with our daemon and with qemu-storage-daemon; chains of increments both ways.

Each script is held with both, on the same images and with the same writes of a guest: answers, with
their texts where something is refused, states and events in their order, bitmaps by their hash, and
afterwards every byte. What is different on purpose stands in `DIFFERENCES`, with the reason."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chains import contents, differs
from conversations import OURS, QEMU, SIZE, SLOW, Refused, Scene, Talk, speaking
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from daemons import a_daemon
from tests_support import need

Script = Callable[[Talk, Scene], None]
SCRIPTS: dict[str, Script] = {}
KIB, MIB = 1 << 10, 1 << 20
#: A backup that runs for as long as we need, with QEMU as well.
STEADY = {"speed": SLOW, "x_perf": {"max_workers": 1, "max_chunk": 64 * KIB}}


class Differs(NamedTuple):
    """A line of QEMU's, and the one that stands in its place in ours."""

    qemu: str
    ours: str
    why: str


NO_FILTER = "there is no filter node here that would be made first"
BUSY = "it says which job, and has a class that tells"
DIFFERENCES: dict[str, list[Differs]] = {
    "what_is_refused": [
        Differs(
            "speed: GenericError: Parameter 'speed' expects a non-negative value | j created null",
            "speed: GenericError: Parameter 'speed' expects a non-negative value",
            "here a job that cannot be is not created first",
        ),
        Differs(
            "read-only: GenericError: Could not create node: Block node is read-only",
            "read-only: GenericError: Block node is read-only: 'ro'",
            NO_FILTER,
        ),
        Differs(
            "in the chain: GenericError: Could not create node: Block node is read-only",
            "in the chain: GenericError: Block node is read-only: 'sn1'",
            NO_FILTER,
        ),
        Differs(
            "filter name: GenericError: Could not create node: Invalid node-name: '9'",
            "filter name: GenericError: Invalid node-name: '9'",
            NO_FILTER,
        ),
        Differs(
            "compressed: GenericError: Compression is not supported for this drive ",
            "compressed: NotSupported: Compression is not supported for this drive t: format raw "
            "cannot hold compressed data",
            "it says why, and has a class that tells",
        ),
        Differs(
            "target busy: GenericError: Node 'other' is busy: block device is in use by block "
            "job: backup",
            "target busy: DeviceInUse: Node 'other' is busy: block device is in use by block "
            "job: backup 'j', which excludes backup",
            BUSY,
        ),
        Differs(
            "not there: GenericError: Unknown file format 'zzz'",
            "not there: GenericError: Unknown driver 'zzz'",
            "the same words as everywhere here",
        ),
        Differs(
            "raw over something: GenericError: Backing file not supported for file format 'raw'",
            "raw over something: NotSupported: Backing file not supported for file format 'raw'",
            "it has a class that tells",
        ),
    ],
    "transactions": [
        Differs(
            "grouped with an abort: GenericError: Transaction aborted using Abort action | j "
            "created aborting concluded null",
            "grouped with an abort: GenericError: Action 'abort' does not support transaction "
            "property completion-mode = grouped",
            "QEMU 10 says so, too: jobs alone end together",
        ),
    ],
    "a_pull_backup_step_by_step": [
        Differs(
            "before the moment: ok | x BLOCK_EXPORT_DELETED",
            "before the moment: DeviceInUse: Node 'f' is busy: a writable export changes 'vm' "
            "below it, so it shows no point in time, which excludes an export",
            "its client would see bytes of all moments",
        ),
        Differs(
            "gone too early: GenericError: Node f is in use",
            "gone too early: DeviceInUse: Node 'f' is busy: block device is in use by block job: "
            "backup 'j', which excludes blockdev-del",
            BUSY,
        ),
    ],
}


def script(function: Script) -> Script:
    """Hold this conversation with both daemons."""
    SCRIPTS[function.__name__] = function
    return function


def ask(talk: Talk, what: str, command: str, **arguments: Any) -> bool:
    """Run a command; in the story it stands under the name of what it is about, with the text."""
    try:
        talk(command, **arguments)
        text = "ok"
    except Refused as refused:
        text = str(refused)
    talk.steps[-1].what, talk.steps[-1].answer = what, text
    return text == "ok"


def told(talk: Talk) -> list[str]:
    """The story; QEMU's jobs pause for a moment whenever the disk is drained."""
    lines = [re.sub(r"(running|ready)( (paused|standby) \1)+", r"\1", x) for x in talk.story()]
    return [re.sub(r" \| \w+ paused running(?= |$)", "", line) for line in lines]


def idle(talk: Talk) -> None:
    """Nothing runs any more."""
    talk.poll(lambda: not talk.quietly("query-jobs"), "the end of all jobs")


def bits(talk: Talk, *names: str) -> None:
    """Note what each bitmap of the disk says."""
    for name in names:
        hashed = talk.quietly("x-debug-block-dirty-bitmap-sha256", node="vm", name=name)
        talk.note(f"{name}: {hashed['sha256'][:16]}")


def write(scene: Scene, client: NbdClient, offset: int, length: int) -> None:
    """A guest writes; the same with both daemons."""
    data = random.Random(offset).randbytes(length)
    client.pwrite(data, offset)
    scene.oracle[offset : offset + length] = data


def job(**more: Any) -> dict[str, Any]:
    """The arguments of a full backup of `vm` into `other`, and what differs from that."""
    given = {"job_id": "j", "device": "vm", "target": "other", "sync": "full", **more}
    return {k: v for k, v in given.items() if v is not None}


# What is refused, and in which words ---------------------------------------------------------


@script
def what_is_refused(talk: Talk, scene: Scene) -> None:
    scene.create("ro")
    scene.add("ro", read_only=True)
    scene.create("small", SIZE // 2)
    scene.add("small")
    talk.quietly("block-dirty-bitmap-add", node="vm", name="b0")

    def no(what: str, **more: Any) -> None:
        assert not ask(talk, what, "blockdev-backup", **job(**more))

    no("no device", device="nope")
    no("no target", target="nope")
    no("neither", device="nope", target="nil")
    no("no mode", sync="foo")
    no("itself", target="vm")
    no("too small", target="small")
    no("read-only", target="ro")
    no("in the chain", target="sn1")
    no("compressed", target="t", compress=True)
    no("no bitmap for incremental", sync="incremental")
    no("no bitmap for bitmap", sync="bitmap", bitmap_mode="never")
    no("incremental, never", sync="incremental", bitmap="b0", bitmap_mode="never")
    no("unknown bitmap", sync="incremental", bitmap="zz")
    no("unknown bitmap, no mode", bitmap="zz")
    no("bitmap without mode", bitmap="b0")
    no("bitmap without mode, bitmap", sync="bitmap", bitmap="b0")
    no("mode without bitmap", bitmap_mode="always")
    no("none with bitmap", sync="none", bitmap="b0", bitmap_mode="always")
    no("full, never", bitmap="b0", bitmap_mode="never")
    no("top, never", sync="top", bitmap="b0", bitmap_mode="never")
    no("workers", x_perf={"max_workers": 0})
    no("chunk", x_perf={"max_chunk": -1})
    no("small chunk", x_perf={"max_chunk": 100})
    no("unknown perf", x_perf={"foo": 1})
    no("speed", speed=-1)
    no("no id", job_id=None)
    no("bad id", job_id="9")
    no("filter name", filter_node_name="9")
    path = str(scene.folder / "new")
    for what, more in {
        "no such disk": {"device": "nope"},
        "not there": {"format": "zzz"},
        "raw over something": {"format": "raw", "sync": "top"},
        "no file": {"target": f"{path}.qcow2", "mode": "existing"},
        "no bitmap": {"sync": "incremental", "format": "qcow2"},
    }.items():
        given = job(**{"target": path, **more})
        assert not ask(talk, what, "drive-backup", **given)
    talk("blockdev-backup", **job(sync="none"))
    talk.until("running", id="j")
    no("target busy", job_id="k", device="t")
    talk("job-cancel", id="j")
    talk.until("null", id="j")


# How it goes ---------------------------------------------------------------------------------


@script
def every_way_to_end(talk: Talk, scene: Scene) -> None:
    talk("blockdev-backup", **job())
    talk.until("null")
    talk("blockdev-backup", **job(auto_finalize=False, auto_dismiss=False))
    talk.until("BLOCK_JOB_PENDING")
    talk("job-finalize", id="j")
    talk.until("concluded")
    talk("job-dismiss", id="j")
    talk("blockdev-backup", **job(**STEADY))
    talk.until("running")
    talk("block-job-set-speed", device="j", speed=2 * SLOW)
    talk("block-job-cancel", device="j", force=True)
    talk.until("null")
    talk("blockdev-backup", **job(sync="none"))
    talk("job-cancel", id="j")
    talk.until("null")


@script
def what_a_bitmap_says_afterwards(talk: Talk, scene: Scene) -> None:
    talk.quietly("block-dirty-bitmap-add", node="vm", name="b0")
    with scene.guest() as client:
        for n, mode in enumerate(["never", "on-success", "always"]):
            write(scene, client, n * 128 * KIB, 70 * KIB)
            bits(talk, "b0")
            talk("blockdev-backup", **job(sync="bitmap", bitmap="b0", bitmap_mode=mode))
            talk.until("null", id="j")
            bits(talk, "b0")
        for mode in ("never", "on-success"):
            write(scene, client, 900 * KIB, 100 * KIB)
            slow = {**STEADY, "bitmap": "b0", "bitmap_mode": mode}
            talk("blockdev-backup", **job(sync="bitmap", **slow))
            talk.until("running", id="j")
            write(scene, client, 1500 * KIB, 10 * KIB)
            talk("job-cancel", id="j")
            talk.until("null", id="j")
            bits(talk, "b0")
        for sync in ("full", "top"):
            talk("blockdev-backup", **job(sync=sync, bitmap="b0", bitmap_mode="on-success"))
            talk.until("null", id="j")
            bits(talk, "b0")
            write(scene, client, 64 * KIB, 512)


@script
def transactions(talk: Talk, scene: Scene) -> None:
    scene.create("vm3")
    scene.add("vm3")
    one = {"type": "blockdev-backup", "data": job()}
    nowhere = {"type": "blockdev-backup", "data": job(device="vm3", target="nope", job_id="k")}
    other = {"type": "blockdev-backup", "data": job(device="vm3", target="t", job_id="k")}
    same = {"type": "blockdev-backup", "data": job(device="vm3", target="t")}
    abort: dict[str, Any] = {"type": "abort", "data": {}}
    added = {"type": "block-dirty-bitmap-add", "data": {"node": "vm", "name": "b0"}}
    by_it = {
        "type": "blockdev-backup", "data": job(sync="bitmap", bitmap="b0", bitmap_mode="always"),
    }  # fmt: skip
    grouped = {"completion_mode": "grouped"}
    chosen: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("the second has no target", [one, nowhere], {}),
        ("one id for two", [one, same], {}),
        ("called off", [one, abort], {}),
        ("both", [one, other], {}),
        ("grouped", [one, other], {"properties": grouped}),
        ("grouped with an abort", [one, abort], {"properties": grouped}),
        ("a bitmap of the moment", [added, by_it], {}),
        (
            "a bitmap that was not to be",
            [{**added, "data": {"node": "vm", "name": "c"}}, abort],
            {},
        ),
    ]
    for what, actions, more in chosen:
        ask(talk, what, "transaction", actions=actions, **more)
        idle(talk)
    bits(talk, "b0")
    ask(talk, "c", "block-dirty-bitmap-remove", node="vm", name="c")


@script
def a_group_ends_as_one(talk: Talk, scene: Scene) -> None:
    scene.create("vm3")
    scene.add("vm3")
    quick = {"type": "blockdev-backup", "data": job(device="vm3", target="t", job_id="k")}
    slow = {"type": "blockdev-backup", "data": job(**STEADY)}
    talk("transaction", actions=[slow, quick], properties={"completion_mode": "grouped"})
    talk.until("waiting", id="k")
    talk("job-cancel", id="j")
    idle(talk)


@script
def a_pull_backup_step_by_step(talk: Talk, scene: Scene) -> None:
    """As libvirt does it."""
    uri = f"nbd+unix:///f?socket={scene.folder}/nbd"
    with scene.guest() as client:
        talk.quietly("block-dirty-bitmap-add", node="vm", name="b0")
        write(scene, client, 100 * KIB, 10 * KIB)
        scene.create("f")
        scene.add("f", backing="vm")
        if ask(talk, "before the moment", "block-export-add", type="nbd", id="x", node_name="f"):
            talk.quietly("block-export-del", id="x")
            talk.until("BLOCK_EXPORT_DELETED", id="x")
        actions = [
            {"type": "block-dirty-bitmap-disable", "data": {"node": "vm", "name": "b0"}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "vm", "name": "b1"}},
            {"type": "blockdev-backup", "data": job(target="f", sync="none")},
        ]
        talk("transaction", actions=actions)
        moment = bytes(scene.oracle)
        write(scene, client, 0, 300 * KIB)
        write(scene, client, MIB, 512)
        talk("block-export-add", type="nbd", id="x", node_name="f", bitmaps=["b0"])
        write(scene, client, 1200 * KIB, 100 * KIB)
        talk.poll(lambda: talk.job("j")["offset"] == 9 * 64 * KIB, "what was saved")
        ask(talk, "gone too early", "blockdev-del", node_name="f")
        copied = scene.folder / "copied"
        subprocess.run(["nbdcopy", uri, str(copied)], check=True, timeout=60)
        assert not differs(copied.read_bytes(), moment)
        command = ["nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", uri]
        said = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        talk.note(f"changed: {[(m['offset'], m['length'], m['type']) for m in json.loads(said)]}")
        talk("block-export-del", id="x")
        talk.until("BLOCK_EXPORT_DELETED", id="x")
        talk("job-cancel", id="j")
        talk.until("null", id="j")
        talk("blockdev-del", node_name="f")
        bits(talk, "b0", "b1")
        write(scene, client, 0, 512)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_with_qemu(tmp_path: Path, name: str) -> None:
    need("qemu-storage-daemon", "nbdcopy", "nbdinfo")
    stories = {}
    for who, command in {"ours": OURS, "theirs": QEMU}.items():
        folder = tmp_path / who
        folder.mkdir()
        with speaking(folder, command) as talk:
            scene = Scene(talk, folder)
            scene.create("other")
            scene.add("other")
            SCRIPTS[name](talk, scene)
            idle(talk)
            scene.over()
        assert not scene.holds("vm.qcow2")
        stories[who] = [line.replace(str(folder), "") for line in told(talk)]
    wanted = list(stories["theirs"])
    for difference in DIFFERENCES.get(name, []):
        assert difference.qemu in wanted, f"QEMU does not say any more: {difference.qemu}"
        wanted[wanted.index(difference.qemu)] = difference.ours
    assert stories["ours"] == wanted


# Chains of increments, both ways -------------------------------------------------------------

DAEMONS = {"ours": OURS, "theirs": QEMU}


def increments(talk: Talk, scene: Scene) -> list[bytes]:
    """A full backup and three increments over each other; what the disk read as at each."""
    moments: list[bytes] = []
    talk.quietly("block-dirty-bitmap-add", node="vm", name="b0")
    with scene.guest() as client:
        for n in range(4):
            name = f"b{n}"
            under = f"b{n - 1}" if n else None
            scene.create(name, backing=under)
            below = {"driver": "qcow2", "read_only": True, "file": scene.file(f"b{n - 1}.qcow2")}
            if n:
                scene.add(name, backing=below)
            else:
                scene.add(name)
            given = {"sync": "incremental"} if n else {"bitmap_mode": "on-success"}
            moments.append(bytes(scene.oracle))
            talk("blockdev-backup", **job(target=name, bitmap="b0", speed=4 * MIB, **given))
            write(scene, client, (n * 300 + 50) * KIB, 90 * KIB)
            client.zero(65 * KIB, (n * 200 + 700) * KIB)
            start = (n * 200 + 700) * KIB
            scene.oracle[start : start + 65 * KIB] = bytes(65 * KIB)
            ended = talk.until("BLOCK_JOB_COMPLETED", device="j")
            assert "error" not in ended
            talk.until("null", id="j")
            talk.quietly("blockdev-del", node_name=name)
    return moments


@pytest.mark.parametrize(
    ("who", "restored"), [("ours", "theirs"), ("ours", "ours"), ("theirs", "ours")]
)
def test_a_chain_of_increments_is_restored_by_either(
    tmp_path: Path, who: str, restored: str
) -> None:
    need("qemu-storage-daemon", "qemu-img")
    with speaking(tmp_path, DAEMONS[who]) as talk:
        scene = Scene(talk, tmp_path)
        moments = increments(talk, scene)
        scene.over()
    for n, moment in enumerate(moments):
        image = str(tmp_path / f"b{n}.qcow2")
        subprocess.run(["qemu-img", "check", "-q", image], check=True, timeout=60)
        if restored == "theirs":
            out = tmp_path / "restored.raw"
            command = ["qemu-img", "convert", "-O", "raw", image, str(out)]
            subprocess.run(command, check=True, timeout=60)
            got: bytes | bytearray = out.read_bytes()
        else:
            node = opening.open_image(image, read_only=True)
            got = contents(node)
            opening.close_chain(node)
        assert not differs(got, moment), f"backup {n}"


@pytest.mark.parametrize("first", DAEMONS)
def test_a_bitmap_begun_by_one_is_used_by_the_other(tmp_path: Path, first: str) -> None:
    """A full backup by the one, an increment by the other."""
    need("qemu-storage-daemon", "qemu-img")
    second = "theirs" if first == "ours" else "ours"
    for turn, who in enumerate((first, second)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if turn:
            for image in (tmp_path / "0").glob("*.*"):
                image.rename(folder / image.name)
        with speaking(tmp_path, DAEMONS[who]) as talk:
            if not turn:
                scene = Scene(talk, folder)
                scene.create("full")
                scene.add("full")
                given = {"node": "vm", "name": "b0", "persistent": True}
                actions = [
                    {"type": "block-dirty-bitmap-add", "data": given},
                    {"type": "blockdev-backup", "data": job(
                        target="full", bitmap="b0", bitmap_mode="on-success")},
                ]  # fmt: skip
                talk("transaction", actions=actions)
                idle(talk)
                with scene.guest() as client:
                    write(scene, client, 333 * KIB, 200 * KIB)
            else:
                scene.folder, scene.talk = folder, talk
                sn1 = {"driver": "qcow2", "read_only": True, "file": scene.file("sn1.qcow2")}
                scene.add("vm", backing=sn1)
                scene.create("inc", backing="full")
                below = {"driver": "qcow2", "read_only": True, "file": scene.file("full.qcow2")}
                scene.add("inc", backing=below)
                talk("blockdev-backup", **job(target="inc", sync="incremental", bitmap="b0"))
                idle(talk)
            scene.over()
    image = folder / "inc.qcow2"
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True, timeout=60)
    assert not scene.holds("inc.qcow2")
    node = opening.open_image(str(image), backing=False)
    try:
        assert sum(e.length for e in node.extents_with_data()) <= 256 * KIB + 64 * KIB
    finally:
        node.close()


# Ours ----------------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Our daemon, and a target `other`."""
    with speaking(tmp_path, OURS) as talk:
        scene = Scene(talk, tmp_path)
        scene.create("other")
        scene.add("other")
        yield scene
        scene.over()


def done(talk: Talk, command: str, **arguments: Any) -> dict[str, Any]:
    """Run a command that starts the job `j`, and wait for its end."""
    talk(command, **arguments)
    ended = talk.until("BLOCK_JOB_COMPLETED", device="j")
    talk.until("null", id="j")
    return ended


def nodes(talk: Talk) -> set[str]:
    """The names of all nodes."""
    return {n["node-name"] for n in talk.quietly("query-named-block-nodes")}


def test_backups_share_a_disk_and_nobody_else_does(scene: Scene) -> None:
    talk = scene.talk
    talk("blockdev-backup", **job(sync="none"))
    refused = talk.refusal("blockdev-backup", **job(job_id="k"))  # into the same target
    assert refused.klass == "DeviceInUse" and "backup 'j', which excludes backup" in refused.desc
    talk("blockdev-backup", **job(job_id="k", target="t", auto_dismiss=False))
    assert "error" not in talk.until("BLOCK_JOB_COMPLETED", device="k")
    talk.until("concluded", id="k")
    others: dict[str, dict[str, Any]] = {
        "block-stream": {"device": "vm"},
        "blockdev-snapshot-sync": {"device": "vm", "snapshot_file": str(scene.folder / "s")},
        "block_resize": {"node_name": "vm", "size": SIZE * 2},
    }
    for command, more in others.items():
        assert "which excludes" in str(talk.refusal(command, **more))


@pytest.mark.parametrize("sync", ["full", "top", "none"])
def test_drive_backup_makes_a_file_that_goes_if_it_fails(scene: Scene, sync: str) -> None:
    talk = scene.talk
    path = scene.folder / "made.qcow2"
    given = job(target=str(path), sync=sync, **(STEADY if sync != "none" else {}))
    talk("drive-backup", **given)
    assert path.exists()
    talk("job-cancel", id="j")
    talk.until("null", id="j")
    assert not path.exists()
    if sync != "none":
        assert "error" not in done(talk, "drive-backup", **job(target=str(path), sync=sync))
        assert not scene.holds("made.qcow2")
        again = talk.refusal("drive-backup", **job(target=str(path), sync=sync))
        assert "exists" in again.desc and "mode=existing" in again.hint


def test_drive_backup_into_what_exists_never_guesses_its_format(scene: Scene) -> None:
    talk = scene.talk
    opening.create_image(str(scene.folder / "there"), "qcow2", SIZE, {})
    assert "format" in talk.refusal("drive-backup", **job(
        target=str(scene.folder / "there"), mode="existing")).desc  # fmt: skip
    given = job(target=str(scene.folder / "there"), mode="existing", format="qcow2")
    assert "error" not in done(talk, "drive-backup", **given)
    node = opening.open_image(str(scene.folder / "there"), "qcow2")
    try:
        assert not differs(contents(node), scene.oracle)
    finally:
        node.close()


def test_an_increment_into_an_overlay_that_exists(scene: Scene) -> None:
    talk = scene.talk
    talk("block-dirty-bitmap-add", node="vm", name="b0")
    full = job(target=str(scene.folder / "full.qcow2"), bitmap="b0", bitmap_mode="on-success")
    assert "error" not in done(talk, "drive-backup", **full)
    with scene.guest() as client:
        write(scene, client, 70 * KIB, 10 * KIB)
    scene.create("inc", backing="full")
    given = job(target=str(scene.folder / "inc.qcow2"), mode="existing", sync="incremental")
    assert "error" not in done(talk, "drive-backup", **given, bitmap="b0")
    assert not scene.holds("inc.qcow2")


def test_what_is_lent_to_a_target_is_taken_back(scene: Scene) -> None:
    talk = scene.talk
    talk("block-dirty-bitmap-add", node="vm", name="b0")
    for sync in ("top", "incremental", "full"):
        bitmap = "b0" if sync == "incremental" else None
        assert "error" not in done(talk, "blockdev-backup", **job(sync=sync, bitmap=bitmap))
        known = {n["node-name"]: n for n in talk("query-named-block-nodes")}
        assert "backing_file" not in known["other"]
    talk("blockdev-backup", **job(sync="none"))
    talk("job-cancel", id="j")
    talk.until("null", id="j")
    talk("blockdev-del", node_name="other")
    assert not scene.holds("other.qcow2"), "the full one was the last to write"


def test_a_backup_of_the_top_into_larger_clusters_is_filled_from_the_base(scene: Scene) -> None:
    """The target was opened without what its header names."""
    talk = scene.talk
    with scene.guest() as client:
        write(scene, client, 700 * KIB, 512)
    under = {"backing_file": "sn1.qcow2", "backing_fmt": "qcow2", "cluster_size": MIB}
    opening.create_image(str(scene.folder / "wide.qcow2"), "qcow2", SIZE, under)
    scene.add("wide", backing=None)
    assert "error" not in done(talk, "blockdev-backup", **job(target="wide", sync="top"))
    talk("blockdev-del", node_name="wide")
    assert not scene.holds("wide.qcow2")


def test_a_bitmap_that_is_made_in_the_same_transaction(scene: Scene) -> None:
    """As libvirt does it: what changed since the checkpoint is merged into a bitmap of the backup's
    own, and a new checkpoint begins, all at one moment."""
    talk = scene.talk
    assert "error" not in done(talk, "blockdev-backup", **job(target="other"))
    talk("block-dirty-bitmap-add", node="vm", name="c1")
    with scene.guest() as client:
        write(scene, client, 70 * KIB, 10 * KIB)
        write(scene, client, 900 * KIB, 10 * KIB)
        client.zero(128 * KIB, 256 * KIB)  # which must not be left out: `other` has older bytes
        scene.oracle[256 * KIB : 384 * KIB] = bytes(128 * KIB)
        scene.create("inc", backing="other")
        scene.add("inc", backing=None)
        moment = bytes(scene.oracle)
        actions = [
            {"type": "block-dirty-bitmap-add",
             "data": {"node": "vm", "name": "tmp", "disabled": True}},
            {"type": "block-dirty-bitmap-merge",
             "data": {"node": "vm", "target": "tmp", "bitmaps": ["c1"]}},
            {"type": "block-dirty-bitmap-disable", "data": {"node": "vm", "name": "c1"}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "vm", "name": "c2"}},
            {"type": "blockdev-backup",
             "data": job(target="inc", sync="incremental", bitmap="tmp", speed=MIB)},
        ]  # fmt: skip
        talk("transaction", actions=actions)
        write(scene, client, 1500 * KIB, 10 * KIB)
        write(scene, client, 72 * KIB, KIB)
        talk.until("null", id="j")
        talk("block-dirty-bitmap-remove", node="vm", name="tmp")
        known = {b["name"]: b["count"] for n in talk("query-named-block-nodes")
                 if n["node-name"] == "vm" for b in n["dirty-bitmaps"]}  # fmt: skip
    assert known == {"c1": 256 * KIB, "c2": 128 * KIB}
    talk("blockdev-del", node_name="inc")
    talk("blockdev-del", node_name="other")
    node = opening.open_image(str(scene.folder / "inc.qcow2"))
    try:
        assert not differs(contents(node), moment)
    finally:
        opening.close_chain(node)


def test_a_pull_backup_that_cannot_begin_leaves_nothing(scene: Scene) -> None:
    talk = scene.talk
    scene.create("vm3")
    scene.add("vm3")
    disks = [{"device": "vm"}, {"device": "vm3"}]
    assert "NBD server not running" in talk.refusal("x-backup-export", disks=disks).desc
    with scene.guest():
        before = nodes(talk)
        for wanted, why in [
            ([{"device": "vm"}, {"device": "nope"}], "nope"),
            ([{"device": "vm"}, {"device": "vm"}], "named twice"),
            ([], "names no disk"),
            ([{"device": "vm"}, {"device": "vm3", "name": "vm"}], "export named 'vm'"),
            ([{"device": "vm"}, {"device": "vm3", "name": "pull-vm"}], "export named 'pull-vm'"),
        ]:
            assert why in talk.refusal("x-backup-export", disks=wanted, bitmap="b0").desc
            talk.poll(lambda: nodes(talk) == before, "the end of everything that was begun")
            idle(talk)
        assert len(talk("query-block-exports")) == 1
        talk("x-backup-export", disks=disks)
        assert "going on already" in talk.refusal("x-backup-export", disks=disks).desc
        (found,) = talk("x-query-backup-exports")
        assert [d["state"] for d in found["disks"]] == ["kept", "kept"]
        talk("job-cancel", id="pull-vm")
        # Not by its event: those that could not begin had the same name, and have told theirs.
        talk.poll(lambda: len(talk.quietly("query-jobs")) == 1, "the end of one of the jobs")
        (found,) = talk("x-query-backup-exports")
        assert [d["state"] for d in found["disks"]] == ["lost", "kept"]
        assert "lost on 'vm' (cancelled)" in talk.refusal("x-backup-export-end").desc
        idle(talk)
        assert nodes(talk) == before
        assert not talk("x-query-backup-exports")
    assert not list(scene.folder.glob(".cowferry*"))


def test_B3_a_bitmap_that_somebody_has_or_nobody_kept_is_refused(tmp_path: Path) -> None:
    with a_daemon() as daemon:
        for name in ("vm", "other"):
            path = str(tmp_path / f"{name}.qcow2")
            opening.create_image(path, "qcow2", SIZE, {})
            options = {**opening.image_options(path), "node-name": name}
            daemon.execute("blockdev-add", options)
        daemon.execute("block-dirty-bitmap-add", {"node": "vm", "name": "b0"})
        where = {"type": "unix", "path": str(tmp_path / "nbd")}
        daemon.execute("nbd-server-start", {"addr": where})
        given = {
            "job-id": "j", "device": "vm", "target": "other", "sync": "incremental",
            "bitmap": "b0",
        }  # fmt: skip
        pulled = {"disks": [{"device": "vm"}], "bitmap": "b0"}
        exported = {
            "type": "nbd",
            "id": "e",
            "node-name": "vm",
            "writable": True,
            "bitmaps": ["b0"],
        }
        daemon.execute("block-export-add", exported)
        bitmap = daemon.graph.node("vm").bitmaps["b0"]
        for command, arguments in (("blockdev-backup", given), ("x-backup-export", pulled)):
            with pytest.raises(
                CowferryError, match="'b0' is currently in use by another operation"
            ):
                daemon.execute(command, arguments)
        daemon.execute("block-export-del", {"id": "e"})
        bitmap.inconsistent = True
        for command, arguments in (("blockdev-backup", given), ("x-backup-export", pulled)):
            with pytest.raises(CowferryError, match="'b0' is inconsistent and cannot be used"):
                daemon.execute(command, arguments)
        assert not daemon.graph.claims and not bitmap.busy
        assert len(daemon.graph.nodes) == 4
