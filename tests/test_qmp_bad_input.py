"""Bad input over QMP: which class of error, which words, and that nothing has happened.

The classes and texts are qmp.md's (2.3 to 2.6), which are QEMU's; a client may match on the words,
so what is looked for is what it would look for. After each refusal the daemon has the nodes, jobs
and files that it had before, and at the end every disk still does what it should.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chains import make_base
from conversations import KINDS, OURS, READIED, SIZE, SLOW, Scene, Talk, speaking
from cowferry.errors import CowferryError
from daemons import a_daemon

GENERIC = "GenericError"
MISSING = "DeviceNotFound"
IN_USE = "DeviceInUse"
UNABLE = "NotSupported"


class Bad(NamedTuple):
    """A command that must be refused; `!` before a name is the path of a file of the scene."""

    command: str
    arguments: dict[str, Any]
    klass: str
    words: str
    hint: str = ""


def mirror(klass: str, words: str, hint: str = "", **more: Any) -> Bad:
    given = {"job_id": "j", "device": "vm", "target": "t", "sync": "full", **more}
    return Bad("blockdev-mirror", {k: v for k, v in given.items() if v is not None},
               klass, words, hint)  # fmt: skip


def drive(klass: str, words: str, hint: str = "", **more: Any) -> Bad:
    given = {"job_id": "j", "device": "vm", "target": "!new.qcow2", "sync": "full", **more}
    return Bad("drive-mirror", given, klass, words, hint)


def commit(klass: str, words: str, hint: str = "", **more: Any) -> Bad:
    given = {"job_id": "j", "device": "vm", **more}
    return Bad("block-commit", {k: v for k, v in given.items() if v is not None}, klass, words,
               hint)  # fmt: skip


def stream(klass: str, words: str, hint: str = "", **more: Any) -> Bad:
    return Bad("block-stream", {"job_id": "j", "device": "vm", **more}, klass, words, hint)


def snapshot(klass: str, words: str, hint: str = "", **more: Any) -> Bad:
    return Bad("blockdev-snapshot", {"node": "vm", "overlay": "new", **more}, klass, words, hint)


def sync(klass: str, words: str, hint: str = "", **more: Any) -> Bad:
    given = {"node_name": "vm", "snapshot_file": "!file.qcow2", "snapshot_node_name": "x", **more}
    given = {k: v for k, v in given.items() if v is not None}
    return Bad("blockdev-snapshot-sync", given, klass, words, hint)


def action(type: str, **data: Any) -> dict[str, Any]:
    return {"type": type, "data": data}


SNAP = action("blockdev-snapshot", node="vm", overlay="new")

BAD = (
    # mirror: what it reads and what it writes
    mirror(MISSING, "Device 'nope' not found", "vm", device="nope"),
    mirror(MISSING, "Device 'nope' not found", "vm", target="nope"),
    mirror(GENERIC, "Can't mirror node into itself", target="vm"),
    mirror(GENERIC, "into itself: .*is the image of disk 'vm'", target="twin"),
    mirror(IN_USE, "Node 'sn1' is busy: node is used as backing hd of 'vm'", target="sn1"),
    mirror(GENERIC, "Need a root block node", "lies below 'vm'", device="sn1"),
    mirror(GENERIC, "Block node is read-only", "for writing", target="ro"),
    mirror(IN_USE, "Node 'served' is in use", "nobody else", target="served"),
    mirror(UNABLE, "'vm' cannot be replaced|no backing file", "", sync="top"),
    mirror(UNABLE, "raw image, which has no backing file", "sync=full", sync="none"),
    mirror(GENERIC, "names another backing file", "sn1", target="over-other", sync="top"),
    # mirror: how
    mirror(GENERIC, "Parameter 'sync' is missing", sync=None),
    mirror(GENERIC, "Parameter 'sync' does not accept value 'some'", sync="some"),
    mirror(GENERIC, "Sync mode 'incremental' not supported", sync="incremental"),
    mirror(GENERIC, "Sync mode 'bitmap' not supported", sync="bitmap"),
    mirror(GENERIC, "Parameter 'granularity' expects a power of 2", granularity=3000),
    *(
        mirror(GENERIC, "Parameter 'granularity' expects a value in range", granularity=n)
        for n in (256, 128 << 20, -4096)
    ),
    mirror(GENERIC, "Invalid parameter 'buf-size'", "bytes", buf_size=-1),
    mirror(GENERIC, "Parameter 'copy-mode' does not accept value 'x'", copy_mode="x"),
    mirror(GENERIC, "Parameter 'on-source-error' does not accept", on_source_error="x"),
    mirror(GENERIC, "Parameter 'on-target-error' does not accept", on_target_error="x"),
    mirror(GENERIC, "Failed to find node with node-name='nope'", replaces="nope"),
    mirror(UNABLE, "'sn1' cannot be replaced", "'vm'", replaces="sn1"),
    mirror(GENERIC, "Parameter 'converge-by' expects a non-negative", converge_by=-1),
    mirror(GENERIC, "Parameter 'speed' expects a non-negative value", speed=-1),
    mirror(GENERIC, "Invalid parameter type for 'speed', expected: integer", speed=1 << 70),
    mirror(GENERIC, "Invalid parameter type for 'speed', expected: integer", speed="fast"),
    mirror(GENERIC, "Invalid parameter type for 'auto-finalize', expected: b", auto_finalize=1),
    mirror(GENERIC, "Parameter 'cut-short' is unexpected", cut_short=True),
    *(
        mirror(GENERIC, f"Invalid job ID '{re.escape(id)}'", job_id=id)
        for id in ("", "9j", "a b", "#j", "j/k", "é")
    ),
    mirror(GENERIC, r"Invalid job ID 'j\\n'", job_id="j\n"),  # told in one line
    mirror(GENERIC, "Invalid job ID ''", job_id=None),
    # drive-mirror
    drive(MISSING, "Device 'nope' not found", device="nope"),
    drive(GENERIC, "into itself: .*sn1.qcow2' is a backing file", target="!sn1.qcow2"),
    drive(IN_USE, "in use by node", "nothing was", target="!other.qcow2", mode="existing"),
    drive(GENERIC, "exists", "mode=existing", target="!spare.qcow2"),
    drive(GENERIC, "No such file or directory", target="/nowhere/x.qcow2"),
    drive(GENERIC, "Is a directory", target="!folder.raw", format="raw"),
    drive(GENERIC, "fifo.raw.*nvalid|neither a regular", target="!fifo.raw", format="raw"),
    drive(GENERIC, "nvalid argument|neither a regular", target="/dev/null", format="raw"),
    drive(GENERIC, "neither a regular", target="/dev/null", format="raw", mode="existing"),
    drive(GENERIC, "neither a regular", target="!fifo.raw", format="raw", mode="existing"),
    drive(GENERIC, "No such file or directory", target="!nope.qcow2", mode="existing"),
    drive(GENERIC, "Parameter 'mode' does not accept value 'some'", mode="some"),
    drive(GENERIC, "'bogus'", target="!new.x", format="bogus"),
    drive(UNABLE, "a raw image has no backing file", "qcow2", target="!x.raw", format="raw",
          sync="top"),
    drive(GENERIC, "Duplicate nodes with node-name='t'", target="!x.qcow2", node_name="t"),
    drive(GENERIC, "Invalid node-name: '9x'", "letter", target="!x.qcow2", node_name="9x"),
    drive(GENERIC, "Invalid job ID '9'", target="!x.qcow2", job_id="9"),
    drive(GENERIC, "granularity", target="!x.qcow2", granularity=1000),
    # commit
    commit(MISSING, "Device 'nope' not found", device="nope"),
    commit(MISSING, "Device 'nope' not found", device="nope", top_node="x", job_id="", speed=-1),
    commit(GENERIC, "Need a root block node", device="sn1"),
    commit(GENERIC, "'t' is not in this backing file chain", "base <- sn1", base_node="t"),
    commit(GENERIC, "'t' is not in this backing file chain", "base <- sn1", top_node="t"),
    commit(GENERIC, "'zz' is not in this backing file chain", base="zz"),
    commit(GENERIC, "'zz' is not in this backing file chain", top="zz"),
    commit(GENERIC, "cannot commit an image into itself", base_node="vm"),
    commit(GENERIC, "cannot commit an image into itself", base_node="sn1", top_node="sn1"),
    commit(GENERIC, "cannot commit an image into itself", top_node="base"),
    commit(GENERIC, "'sn1' is not in this backing file chain", base_node="sn1", top_node="base"),
    commit(GENERIC, "'backing-file' specified, but 'top' is the active layer", backing_file="x"),
    commit(GENERIC, "'base-node' and 'base' are mutually exclusive", base="a", base_node="b"),
    commit(GENERIC, "'top-node' and 'top' are mutually exclusive", top="a", top_node="b"),
    commit(UNABLE, "has no backing file", "tree", device="t"),
    commit(IN_USE, "is used as backing of 'stranger'", "would change", device="shared"),
    commit(GENERIC, "Parameter 'on-error' does not accept value 'x'", on_error="x"),
    commit(GENERIC, "Invalid job ID ''", job_id=None),
    # stream
    stream(MISSING, "Device 'nope' not found", device="nope"),
    stream(UNABLE, "raw image", "is lost", device="t"),
    stream(GENERIC, "Node 't' is not a backing image of 'vm'", "base <- sn1", base_node="t"),
    stream(GENERIC, "Node 'vm' is not a backing image of 'vm'", base_node="vm"),
    stream(GENERIC, "Image 'zz' is not a backing image of 'vm'", base="zz"),
    stream(GENERIC, "'base' and 'base-node' cannot be specified at the same time", base="a",
           base_node="b"),
    stream(GENERIC, "'base' and 'bottom' cannot be specified at the same time", base="a",
           bottom="b"),
    stream(GENERIC, "backing file specified, but streaming the entire chain", backing_file="x"),
    stream(GENERIC, "Parameter 'speed' expects a non-negative value", speed=-1),
    # snapshots
    snapshot(MISSING, "Device 'nope' not found", node="nope"),
    snapshot(GENERIC, "Cannot find device='nope' nor node-name='nope'", overlay="nope"),
    snapshot(GENERIC, "The overlay does not support backing images", overlay="t"),
    snapshot(GENERIC, "The overlay already has a backing image", overlay="stranger"),
    snapshot(GENERIC, "The overlay already has a backing image", overlay="vm"),
    snapshot(GENERIC, "The overlay is already in use", overlay="served"),
    snapshot(GENERIC, "The overlay 'ro' is read-only", overlay="ro"),
    snapshot(GENERIC, "The overlay has [0-9]+ bytes and 'vm' [0-9]+", "large", overlay="short"),
    snapshot(GENERIC, "is not empty", "would hide", overlay="full"),
    Bad("blockdev-snapshot", {"node": "vm"}, GENERIC, "Parameter 'overlay' is missing"),
    sync(GENERIC, "New overlay node-name missing", "snapshot-node-name", snapshot_node_name=None),
    sync(GENERIC, "Cannot find device='' nor node-name=''", node_name=None),
    sync(MISSING, "Device 'nope' not found", node_name="nope"),
    sync(UNABLE, "Format 'raw' does not support backing files", "qcow2", format="raw"),
    sync(GENERIC, "'bogus'", "qcow2", format="bogus"),
    sync(GENERIC, "No such file or directory", mode="existing"),
    sync(GENERIC, "No such file or directory", snapshot_file="/nowhere/x.qcow2"),
    sync(GENERIC, "exists", "mode=existing", snapshot_file="!spare.qcow2"),
    sync(GENERIC, "sn1.qcow2' is a backing file of disk 'vm'", snapshot_file="!sn1.qcow2",
         mode="existing"),
    sync(IN_USE, "in use by node", snapshot_file="!other.qcow2", mode="existing"),
    sync(GENERIC, "not in qcow2 format", snapshot_file="!t2.raw", mode="existing"),
    sync(GENERIC, "[0-9]+ bytes and 'vm'", snapshot_file="!short2.qcow2", mode="existing"),
    sync(GENERIC, "is not empty", snapshot_file="!full2.qcow2", mode="existing"),
    sync(GENERIC, "node-name='t'", snapshot_node_name="t"),
    sync(GENERIC, "Invalid node-name: '9x'", snapshot_node_name="9x"),
    sync(GENERIC, "Parameter 'mode' does not accept value 'x'", mode="x"),
    Bad("snapshot_blkdev", {"device": "vm", "snapshot_file": "!x.raw", "format": "raw"}, UNABLE,
        "does not support backing"),
    # transactions
    Bad("transaction", {}, GENERIC, "Parameter 'actions' is missing"),
    Bad("transaction", {"actions": {}}, GENERIC, "Invalid parameter type for 'actions', e"),
    Bad("transaction", {"actions": [action("x")]}, GENERIC,
        "Parameter 'type' does not accept value 'x'", "blockdev-snapshot"),
    Bad("transaction", {"actions": [SNAP, action("blockdev-snapshot", node="t")]}, GENERIC,
        "'overlay' is missing"),
    Bad("transaction", {"actions": [SNAP, action("abort")]}, GENERIC,
        "Transaction aborted using Abort action"),
    Bad("transaction", {"actions": [SNAP, SNAP]}, IN_USE, "is busy"),
    Bad("transaction", {"actions": [SNAP], "properties": {"completion_mode": "grouped"}}, GENERIC,
        "Action 'blockdev-snapshot' does not support transaction property completion-mode = "
        "grouped"),
    Bad("transaction", {"actions": [SNAP], "properties": {"completion_mode": "x"}}, GENERIC,
        "Parameter 'properties.completion-mode' does not accept value 'x'"),
    # reopening
    Bad("blockdev-reopen", {}, GENERIC, "Parameter 'options' is missing"),
    Bad("blockdev-reopen", {"options": [{"driver": "qcow2"}]}, GENERIC, "node-name not specified"),
    Bad("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "zz"}]}, GENERIC,
        "Failed to find node with node-name='zz'"),
    Bad("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "vm"}]}, GENERIC,
        "backing is missing for 'vm'"),
    Bad("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "vm", "backing": "sn1"}]},
        GENERIC, "Cannot change the option 'driver'", "qcow2"),
    *(
        Bad("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "vm", "backing": b}]},
            GENERIC, words)
        for b, words in (
            ("zz", "Cannot find device='zz' nor node-name='zz'"),
            ("vm", "would create a cycle"),
            ("served", "in use by a writable export"),
        )
    ),
    # the name in a header
    *(
        Bad("change-backing-file",
            {"device": device, "image_node_name": image, "backing_file": "x"}, klass, words)
        for device, image, klass, words in (
            ("nope", "vm", MISSING, "Device 'nope' not found"),
            ("sn1", "sn1", GENERIC, "Need a root block node"),
            ("vm", "nope", GENERIC, "Cannot find device='nope' nor node-name='nope'"),
            ("vm", "base", GENERIC, "not allowing backing file change on an image without a b"),
            ("vm", "stranger", GENERIC, "not in the same chain"),
            ("vm", "vm", GENERIC, "cannot be the backing file.*No such file"),
        )
    ),
    # change
    *(
        Bad("change", {"device": "vm", **more}, klass, words, hint)
        for more, klass, words, hint in (
            ({"device": "nope", "target": "!x"}, MISSING, "Device 'nope' not found", ""),
            ({"target": "!nope.qcow2"}, GENERIC, "No such file or directory", ""),
            ({"target": "!other.qcow2"}, IN_USE, "in use by node 'other'", ""),
            ({"target": "!t2.raw", "format": "qcow2"}, GENERIC, "not in qcow2 format", ""),
            ({"target": "!t2.raw", "format": "x"}, GENERIC, "Unknown driver 'x'", "qcow2"),
            ({"target": "!short2.qcow2", "notify": False}, GENERIC, "bytes and 'vm'", "notif"),
            ({"device": "vnc", "target": "password"}, UNABLE, "no VNC", ""),
        )
    ),
    # jobs that are not there
    *(
        Bad(f"job-{verb}", {"id": "zz"}, GENERIC, "Job not found", "query-jobs")
        for verb in ("pause", "resume", "cancel", "complete", "finalize", "dismiss")
    ),
    *(
        Bad(f"block-job-{verb}", {"device": "zz"}, "DeviceNotActive", "Block job 'zz' not found")
        for verb in ("pause", "resume", "cancel", "complete")
    ),
    Bad("block-job-set-speed", {"device": "zz", "speed": 1}, "DeviceNotActive", "'zz' not found"),
    # groups
    *(
        Bad("x-group-start", {"id": "g", "type": "copy", "members": members, **more}, klass, words)
        for members, more, klass, words in (
            ([], {}, GENERIC, "needs members"),
            ([{"device": "vm"}, {"device": "vm"}], {"type": "stream"}, GENERIC, "named twice"),
            ([{"device": "vm"}], {}, GENERIC, "member 'vm' needs a target"),
            ([{"device": "vm"}], {"type": "x"}, GENERIC, "'type' does not accept value 'x'"),
            ([{"device": "vm"}], {"policy": "x"}, GENERIC, "'policy' does not accept value 'x'"),
            ([{"device": "vm"}], {"id": "9"}, GENERIC, "Invalid job ID '9'"),
        )
    ),
    Bad("x-group-complete", {"id": "g"}, GENERIC, "Group 'g' not found", "none"),
)  # fmt: skip


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """One that is asked for what it cannot do, again and again."""
    with speaking(tmp_path_factory.mktemp("busy"), OURS) as talk:
        yield talk


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A daemon, and nodes of every kind that is no good for something."""
    with speaking(tmp_path_factory.mktemp("run"), OURS) as talk:
        folder = tmp_path_factory.mktemp("images")
        scene = Scene(talk, folder)
        for name in ("new", "other", "served", "ro", "spare", "full", "full2", "bottom"):
            scene.create(name)
        for name in ("short", "short2"):
            scene.create(name, SIZE // 2)
        for name in ("full", "full2", "spare"):
            scene.fill(name)
        (folder / "t2.raw").write_bytes(bytes(SIZE))
        for name, below in (("over-other", "other"), ("shared", "bottom"), ("stranger", "bottom")):
            scene.create(name, backing=below)
        for name in ("new", "other", "served", "short", "full"):
            scene.add(name)
        scene.add("ro", read_only=True)
        twin = {**scene.file("vm.qcow2"), "locking": "off"}
        talk("blockdev-add", driver="raw", node_name="twin", file=twin)
        (folder / "folder.raw").mkdir()
        os.mkfifo(folder / "fifo.raw")
        scene.add("over-other", backing=None)
        scene.add("shared", backing=scene.node("bottom"))
        scene.add("stranger", backing="bottom")
        where = {"type": "unix", "data": {"path": str(folder / "nbd")}}
        talk("nbd-server-start", addr=where)
        talk("block-export-add", type="nbd", id="e", node_name="served", writable=True)
        yield scene
        scene.start("mirror")  # after all this
        talk.until("BLOCK_JOB_READY")
        talk("job-complete", id="j")
        talk.until("null")
        talk("nbd-server-stop")
        scene.over()
        assert scene.holds("t.raw") == ""


def there(scene: Scene) -> list[object]:
    """Everything that a refused command leaves as it was."""
    talk = scene.talk
    nodes = talk.quietly("query-named-block-nodes", flat=True)
    return [
        [(n["node-name"], n["ro"], n.get("backing_file")) for n in nodes],
        talk.quietly("query-jobs"),
        talk.quietly("x-query-groups"),
        sorted(scene.folder.iterdir()),
        len(talk.events),
    ]


def paths(value: Any, folder: Path) -> Any:
    """`!name` as a path in the folder."""
    if isinstance(value, dict):
        return {k: paths(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [paths(v, folder) for v in value]
    return str(folder / value[1:]) if isinstance(value, str) and value[:1] == "!" else value


def told(bad: Bad) -> str:
    """What a failing test is called."""
    short = " ".join(f"{k}={v}" for k, v in bad.arguments.items())
    return f"{bad.command} {short}"[:90].replace("\n", "?")


@pytest.mark.parametrize("bad", BAD, ids=told)
def test_bad_input_is_refused_and_changes_nothing(scene: Scene, bad: Bad) -> None:
    before = there(scene)
    refused = scene.talk.refusal(bad.command, **paths(bad.arguments, scene.folder))
    assert re.fullmatch(bad.klass, refused.klass), refused
    assert re.search(bad.words, refused.desc), refused
    assert bad.hint in refused.hint, refused.hint
    assert "\n" not in refused.desc and "Traceback" not in refused.desc
    assert there(scene) == before


# What is refused because of what runs ------------------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path, daemon: Talk) -> Iterator[Scene]:
    """Closed at the end, however the test ends."""
    scene = Scene(daemon, tmp_path)
    yield scene
    scene.over()


def asked_of_a_busy_disk(scene: Scene) -> tuple[Bad, ...]:
    """Whatever else one may ask of `vm`; the word is how the refusal calls it."""
    top = str(scene.folder / "top.qcow2")
    reopened = {**scene.node("vm"), "backing": "sn1", "read-only": True}
    return (
        stream(IN_USE, "stream", job_id="k"),
        stream(IN_USE, "stream", job_id="k", base_node="base"),
        Bad("block_stream", {"device": "vm"}, IN_USE, "stream"),
        commit(IN_USE, "commit", job_id="k"),
        commit(IN_USE, "commit", job_id="k", top_node="sn1"),
        mirror(IN_USE, "mirror", job_id="k", target="new"),
        mirror(IN_USE, "mirror", job_id="k", device="new", target="vm"),
        drive(IN_USE, "mirror", job_id="k", target="!k.qcow2"),
        Bad("x-disk-copy", {"device": "vm", "job_id": "k", "target": "!k.qcow2"}, IN_USE, "mirror"),
        snapshot(IN_USE, "snapshot"),
        sync(IN_USE, "snapshot"),
        Bad("snapshot_blkdev", {"device": "vm", "snapshot_file": "!k.qcow2"}, IN_USE, "snapshot"),
        Bad("transaction", {"actions": [SNAP]}, IN_USE, "snapshot"),
        Bad("change", {"device": "vm", "target": top, "format": "qcow2"}, IN_USE, "change"),
        Bad("change-backing-file",
            {"device": "vm", "image_node_name": "vm", "backing_file": "sn1.qcow2"},
            IN_USE, "change-backing-file"),
        Bad("blockdev-reopen", {"options": [reopened]}, IN_USE, "blockdev-reopen"),
        Bad("block_resize", {"node_name": "vm", "size": 2 * SIZE}, IN_USE, "resize"),
        Bad("blockdev-del", {"node_name": "vm"}, IN_USE, "blockdev-del"),
        Bad("x-disk-lock", {"device": "vm", "reason": "x"}, IN_USE, "lock"),
        Bad("x-group-start", {"id": "g", "type": "stream", "members": [{"device": "vm"}]},
            IN_USE, "stream"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_disk_refuses_everything_with_both_names(
    tmp_path: Path, daemon: Talk, stage: Scene, kind: str
) -> None:
    scene = stage
    scene.create("new")
    scene.add("new", backing=None)
    scene.create("top", backing="vm")
    scene.start(kind, speed=SLOW)
    type = daemon.job("j")["type"]
    daemon("job-pause", id="j")
    daemon.until("paused")
    before = there(scene)
    for bad in asked_of_a_busy_disk(scene):
        refused = daemon.refusal(bad.command, **paths(bad.arguments, tmp_path))
        assert refused.klass == IN_USE, refused
        assert "'j'" in refused.desc and type in refused.desc, refused
        assert f"excludes {bad.words}" in refused.desc.replace(" a ", " "), refused
        assert "wait for job 'j', or cancel it" in refused.hint
        assert there(scene) == before, bad.command
    daemon("block-job-set-speed", device="j", speed=0)
    daemon("job-resume", id="j")
    if kind in READIED:
        daemon.until("BLOCK_JOB_READY")
        daemon("job-complete", id="j")
    assert "error" not in daemon.until("BLOCK_JOB_COMPLETED")
    daemon.until("null")
    scene.over()
    assert scene.holds({"active": "base.raw", "mirror": "t.raw"}.get(kind, "vm.qcow2")) == ""


def test_a_target_is_in_use_while_it_is_filled(tmp_path: Path, daemon: Talk, stage: Scene) -> None:
    scene = stage
    for name in ("other", "new"):
        scene.create(name)
    scene.add("other")
    scene.add("new", backing=None)
    where = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    daemon("nbd-server-start", addr=where)
    scene.start("mirror", speed=SLOW)
    before = there(scene)
    for bad in (
        mirror(IN_USE, "excludes mirror", job_id="k", device="other"),
        mirror(IN_USE, "excludes mirror", job_id="k", device="t", target="other"),
        drive(IN_USE, "in use by mirror job 'j'", job_id="k", device="other", target="!t.raw",
              format="raw", mode="existing"),
        drive(IN_USE, "in use by", job_id="k", device="other", target="!t.raw", format="raw"),
        stream(IN_USE + "|" + UNABLE, "'t'", job_id="k", device="t"),
        snapshot(IN_USE, "excludes snapshot", node="t"),
        sync(IN_USE, "in use by mirror job 'j'", node_name="other", snapshot_file="!t.raw",
             mode="existing"),
        Bad("block_resize", {"node_name": "t", "size": SIZE}, IN_USE, "excludes a resize"),
        Bad("blockdev-del", {"node_name": "t"}, IN_USE, "excludes blockdev-del"),
        Bad("change", {"device": "other", "target": "!t.raw", "format": "raw"}, IN_USE,
            "in use by mirror job 'j'"),
        Bad("block-export-add", {"type": "nbd", "id": "e", "node_name": "t"}, IN_USE, "export"),
        Bad("blockdev-reopen",
            {"options": [{"driver": "qcow2", "node-name": "other", "backing": "t"}]},
            IN_USE, "excludes blockdev-reopen"),
        Bad("blockdev-add", {**scene.node("new"), "node-name": "x", "backing": "t"},
            IN_USE, "t"),
    ):  # fmt: skip
        refused = daemon.refusal(bad.command, **paths(bad.arguments, tmp_path))
        assert re.fullmatch(bad.klass, refused.klass), refused
        assert re.search(bad.words, refused.desc), refused
        now = there(scene)
        assert now[0] == before[0] and now[3:] == before[3:], bad
    daemon("block-job-set-speed", device="j", speed=0)
    daemon.until("BLOCK_JOB_READY")
    daemon("job-complete", id="j")
    daemon.until("null")
    daemon("nbd-server-stop")
    scene.over()
    assert scene.holds("t.raw") == ""


def test_job_ids_are_taken_until_the_job_is_gone(
    tmp_path: Path, daemon: Talk, stage: Scene
) -> None:
    scene = stage
    scene.create("new")
    scene.add("new")
    scene.start("commit", auto_dismiss=False)
    daemon.until("concluded")
    copy = {"device": "t", "target": "new", "sync": "full"}
    for command, given in (
        ("blockdev-mirror", copy),
        ("block-stream", {"device": "vm"}),
        ("blockdev-create", {"options": {"driver": "file", "filename": "x", "size": 1}}),
    ):
        refused = daemon.refusal(command, job_id="j", **given)
        assert (refused.klass, refused.desc) == (GENERIC, "Job ID 'j' already in use")
    refused = daemon.refusal("x-group-start", id="j", type="stream", members=[{"device": "vm"}])
    assert refused.desc == "Job ID 'j' already in use"
    assert not (tmp_path / "x").exists()
    daemon("job-dismiss", id="j")
    daemon("block-stream", job_id="j", device="vm")
    daemon.until("null")
    scene.over()
    assert scene.holds("vm.qcow2") == ""


def test_sizes_that_differ_fail_the_job_and_nothing_else(
    tmp_path: Path, daemon: Talk, stage: Scene
) -> None:
    scene = stage
    scene.create("short", SIZE // 2)
    scene.create("long", SIZE * 2)
    for name in ("short", "long"):
        scene.add(name)
        daemon("blockdev-mirror", job_id="j", device="vm", target=name, sync="full")
        error = daemon.until("BLOCK_JOB_COMPLETED")["error"]
        assert error == "Source and target image have different sizes"
        daemon.until("null")
        step = str(daemon.steps[-1])
        assert step.endswith("| j created running aborting BLOCK_JOB_COMPLETED concluded null")
    scene.start("mirror")
    daemon.until("BLOCK_JOB_READY")
    daemon("job-complete", id="j")
    daemon.until("null")
    scene.over()
    assert scene.holds("t.raw") == ""


def test_a_group_of_which_one_cannot_start_starts_none(
    tmp_path: Path, daemon: Talk, stage: Scene
) -> None:
    scene = stage
    scene.create("new")
    scene.add("new")
    before = there(scene)[:-1]
    x = str(tmp_path / "x.qcow2")
    for device, target, words in (
        ("nope", "y.qcow2", "Device 'nope' not found"),
        ("new", "x.qcow2", "x.qcow2"),
    ):
        other = {"device": device, "target": str(tmp_path / target)}
        refused = daemon.refusal(
            "x-group-start", id="g", type="copy", members=[{"device": "vm", "target": x}, other]
        )
        assert words in refused.desc
        daemon.until("null", id="g-vm")
        assert "g-vm created aborting concluded null" in str(daemon.steps[-1])  # and no more
        left = there(scene)[:-1]
        assert left[:3] == before[:3]
    scene.over()
    assert scene.holds("vm.qcow2") == ""


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_can_be_no_name_of_a_file_is_refused_in_words(tmp_path: Path, name: str) -> None:
    make_base(tmp_path, 1 << 20)
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(tmp_path / "base.raw"))
        create = {"driver": "file", "filename": name, "size": 1}
        given: list[tuple[str, dict[str, Any]]] = [
            ("x-disk-add", {"device": "x", "filename": name}),
            ("change", {"device": "vm", "target": name}),
            ("x-disk-copy", {"device": "vm", "target": name}),
            ("snapshot_blkdev", {"device": "vm", "snapshot-file": name}),
            ("blockdev-add", {"driver": "file", "node-name": "n", "filename": name}),
            ("blockdev-create", {"job-id": "j", "options": create}),
        ]
        for command, arguments in given:
            with pytest.raises(CowferryError, match="cannot be the name of a file"):
                daemon.execute(command, arguments)
        assert not daemon.execute("query-jobs", {})
