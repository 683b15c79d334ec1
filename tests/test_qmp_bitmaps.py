"""Dirty bitmaps, spoken of with our daemon and with qemu-storage-daemon, word for word.

Each script is held with both, on the same images and with the same writes of a guest; every answer
is compared with its text, every listed bitmap member by member, its bits by their hash. What is
different on purpose stands in `DIFFERENCES`, with the reason; one that is there no more fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conversations import OURS, QEMU, SIZE, Refused, Scene, Talk, speaking
from cowferry.drivers import opening
from tests_support import need

Script = Callable[[Talk, Scene], None]
SCRIPTS: dict[str, Script] = {}

KIB = 1 << 10


class Differs(NamedTuple):
    """A line of QEMU's, and the one that stands in its place in ours."""

    qemu: str
    ours: str
    why: str


READ_ONLY = "nobody would write it: QEMU takes it and loses it when the node is closed"
NO_TRAP = "QEMU crashes"
DIFFERENCES: dict[str, list[Differs]] = {
    "names": [
        Differs(
            "add sn1/p persistent -> {}",
            "add sn1/p persistent -> GenericError: Can't make bitmap 'p' persistent in 'sn1': it "
            "is read-only",
            READ_ONLY,
        ),
        Differs(
            "remove sn1/p -> {}",
            "remove sn1/p -> GenericError: Dirty bitmap 'p' not found",
            READ_ONLY,
        ),
    ],
    "exports": [
        Differs(
            "blockdev-del other: better not",
            "blockdev-del other -> GenericError: Node 'other' is busy: export 'e' uses its bitmap "
            "'o0'",
            NO_TRAP,
        ),
    ],
}


def script(function: Script) -> Script:
    """Hold this conversation with both daemons."""
    SCRIPTS[function.__name__] = function
    return function


def ask(talk: Talk, what: str, command: str, **arguments: Any) -> None:
    """Run a command, and note its answer in full under the name of `what` it is about."""
    try:
        answer = json.dumps(talk.quietly(command, **arguments), sort_keys=True)
    except Refused as refused:
        answer = str(refused)
    talk.note(f"{what} -> {answer}")


def bitmap(talk: Talk, verb: str, where: str, **more: Any) -> None:
    """One of block-dirty-bitmap-*, on NODE/NAME."""
    node, name = where.split("/")
    noted = " ".join([k if v is True else f"{k}={v}" for k, v in more.items()])
    key = "target" if verb == "merge" else "name"
    what = f"{verb} {where} {noted}".strip()
    ask(talk, what, f"block-dirty-bitmap-{verb}", node=node, **{key: name}, **more)


def action(verb: str, where: str, **more: Any) -> dict[str, Any]:
    """The same as an action."""
    node, name = where.split("/")
    key = "target" if verb == "merge" else "name"
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, key: name, **more}}


def transaction(talk: Talk, *actions: dict[str, Any], **more: Any) -> None:
    what = ", ".join(
        f"{a['type'].removeprefix('block-dirty-bitmap-')} {a['data']}" for a in actions
    )
    ask(talk, f"[{what}]", "transaction", actions=list(actions), **more)


def look(talk: Talk) -> None:
    """Note every bitmap that there is."""
    nodes = talk.quietly("query-named-block-nodes")
    for node in sorted(nodes, key=lambda n: str(n["node-name"])):
        for entry in node.get("dirty-bitmaps", []):
            talk.note(f"{node['node-name']}: {json.dumps(entry, sort_keys=True)}")


def hashes(talk: Talk, *names: str) -> None:
    """Note the bits themselves."""
    for where in names:
        node, name = where.split("/")
        ask(talk, f"bits of {where}", "x-debug-block-dirty-bitmap-sha256", node=node, name=name)


def export(talk: Talk, id: str, *bitmaps: Any, **more: Any) -> None:
    """An export of `vm` that offers bitmaps."""
    given = {"type": "nbd", "id": id, "node_name": "vm", "name": id, **more}
    ask(talk, f"export {id} with {list(bitmaps)} {more}", "block-export-add",
        bitmaps=list(bitmaps), **given)  # fmt: skip


@script
def names(talk: Talk, scene: Scene) -> None:
    scene.create("small", SIZE // 2)
    scene.add("small")
    for name, size in (("fine", 512), ("coarse", 2 << 20)):
        image = str(scene.folder / f"{name}.qcow2")
        opening.create_image(image, "qcow2", SIZE, {"cluster_size": size})
        scene.add(name)
        bitmap(talk, "add", f"{name}/b")  # as fine as nobody asked for
    bitmap(talk, "add", "nope/b")
    bitmap(talk, "add", "vm/")
    for length in (1023, 1024):
        for more in ({}, {"persistent": True}):
            bitmap(talk, "add", f"vm/{'x' * length}", **more)
            bitmap(talk, "remove", f"vm/{'x' * length}")
    bitmap(talk, "add", f"vm/{'ä' * 512}")
    for granularity in (0, 100, 256, 1000, 1 << 31):
        bitmap(talk, "add", "vm/g", granularity=granularity)
    for granularity in (-1, 1 << 32):
        bitmap(talk, "add", "vm/h", granularity=granularity)
    bitmap(talk, "add", "vm/b0", granularity=512)
    bitmap(talk, "add", "vm/b0")
    bitmap(talk, "add", "vm/b0", granularity=3)
    bitmap(talk, "add", "vm/b0", persistent=True)
    bitmap(talk, "add", "vm/p0", persistent=True, disabled=True)
    bitmap(talk, "add", "vm/p0")
    bitmap(talk, "add", "vm/p0", persistent=True)
    bitmap(talk, "add", "sn1/b0")
    bitmap(talk, "add", "sn1/p", persistent=True)
    bitmap(talk, "add", "t/t0")
    bitmap(talk, "add", "small/s0")
    for verb in ("remove", "clear", "enable", "disable"):
        bitmap(talk, verb, "vm/zz")
        bitmap(talk, verb, "nope/zz")
    bitmap(talk, "clear", "sn1/b0")
    bitmap(talk, "merge", "vm/zz", bitmaps=["b0"])
    bitmap(talk, "merge", "nope/zz", bitmaps=["b0"])
    bitmap(talk, "merge", "vm/b0", bitmaps=["zz"])
    bitmap(talk, "merge", "vm/b0", bitmaps=["b0"])
    bitmap(talk, "merge", "vm/b0", bitmaps=["p0", {"node": "t", "name": "t0"}])
    for node, source in (("t", "zz"), ("nope", "t0"), ("small", "s0")):
        bitmap(talk, "merge", "vm/b0", bitmaps=[{"node": node, "name": source}])
    bitmap(talk, "merge", "vm/b0", bitmaps=[{"node": "t"}])
    for arguments in ({"node": "vm"}, {"name": "b"}, {"node": "vm", "name": 3},
                      {"node": "vm", "name": "c", "disabled": 3}):  # fmt: skip
        ask(talk, f"add {arguments}", "block-dirty-bitmap-add", **arguments)
    hashes(talk, "vm/zz", "nope/b0")
    for where in ("vm/p0", "vm/g", "sn1/p"):
        bitmap(talk, "remove", where)
    look(talk)


@script
def what_a_guest_writes(talk: Talk, scene: Scene) -> None:
    bitmap(talk, "add", "vm/fine", granularity=512)
    bitmap(talk, "add", "vm/b0")
    bitmap(talk, "add", "vm/coarse", granularity=256 * KIB)
    bitmap(talk, "add", "vm/off", disabled=True)
    with scene.guest() as guest:
        guest.pwrite(b"x", 0)
        guest.pwrite(b"y" * 1024, 100 * KIB - 512)
        guest.zero(65536, 3 * 65536)
        guest.pread(4096, 512 * KIB)
        guest.pwrite(b"end", SIZE - 3)
        look(talk)
        hashes(talk, "vm/fine", "vm/b0", "vm/coarse", "vm/off")
        bitmap(talk, "disable", "vm/b0")
        bitmap(talk, "enable", "vm/off")
        guest.pwrite(b"z", 900 * KIB)
        look(talk)
        bitmap(talk, "merge", "vm/b0", bitmaps=["off"])
        bitmap(talk, "merge", "vm/coarse", bitmaps=["fine"])
        bitmap(talk, "add", "vm/again", granularity=4096, disabled=True)
        bitmap(talk, "merge", "vm/again", bitmaps=["coarse", "b0"])
        hashes(talk, "vm/fine", "vm/b0", "vm/coarse", "vm/off", "vm/again")
        bitmap(talk, "clear", "vm/fine")
        guest.pwrite(b"w", 1 << 20)
        look(talk)
        hashes(talk, "vm/fine", "vm/b0", "vm/coarse", "vm/off", "vm/again")
    look(talk)


@script
def a_snapshot_leaves_them_with_the_old_image(talk: Talk, scene: Scene) -> None:
    bitmap(talk, "add", "vm/b0")
    with scene.guest() as guest:
        guest.pwrite(b"before", 0)
        scene.create("top")
        scene.add("top", backing=None)
        snapshot = {"type": "blockdev-snapshot", "data": {"node": "vm", "overlay": "top"}}
        transaction(talk, snapshot, action("add", "top/b0"), action("add", "vm/late"))
        guest.pwrite(b"after", 1 << 20)
        look(talk)
        hashes(talk, "vm/b0", "vm/late", "top/b0")
        bitmap(talk, "merge", "top/b0", bitmaps=[{"node": "vm", "name": "b0"}])
        bitmap(talk, "clear", "vm/b0")
        hashes(talk, "vm/b0", "top/b0")


@script
def transactions(talk: Talk, scene: Scene) -> None:
    bitmap(talk, "add", "vm/a")
    bitmap(talk, "add", "t/far")
    abort = {"type": "abort", "data": {}}
    with scene.guest() as guest:
        guest.pwrite(b"x", 0)
        transaction(talk, action("add", "vm/b"), action("merge", "vm/b", bitmaps=["a"]),
                    action("disable", "vm/b"), action("clear", "vm/a"))  # fmt: skip
        guest.pwrite(b"x", 1 << 20)
        look(talk)
        hashes(talk, "vm/a", "vm/b")
        far = [{"node": "vm", "name": "a"}, "far"]
        everything = [
            action("add", "vm/c"), action("enable", "vm/c"), action("merge", "vm/c", bitmaps=["a"]),
            action("clear", "vm/a"), action("disable", "vm/a"), action("enable", "vm/b"),
            action("merge", "t/far", bitmaps=far), action("remove", "vm/b"),
        ]  # fmt: skip
        transaction(talk, *everything, abort)
        transaction(talk, *everything, action("clear", "vm/zz"))
        transaction(talk, abort, *everything)
        look(talk)
        hashes(talk, "vm/a", "vm/b", "t/far")
        transaction(talk, action("add", "vm/c"), action("add", "vm/a"))
        transaction(talk, action("add", "vm/c"), action("add", "vm/c"))
        transaction(talk, action("remove", "vm/a"), action("add", "vm/a"))
        for verb in ("remove", "clear", "disable"):
            transaction(talk, action("remove", "vm/a"), action(verb, "vm/a"))
        transaction(talk, action("remove", "vm/a"), action("merge", "vm/b", bitmaps=["a"]))
        transaction(talk, action("merge", "vm/zz", bitmaps=["zz"]))
        transaction(talk, action("add", "vm/n", persistent=True), action("remove", "vm/n"))
        transaction(talk, action("add", "vm/n", granularity=7))
        look(talk)
        transaction(talk, *everything)
        guest.pwrite(b"x", 500 * KIB)
        look(talk)
        hashes(talk, "vm/a", "vm/c", "t/far")


@script
def exports(talk: Talk, scene: Scene) -> None:
    scene.create("other")
    scene.add("other")
    for where in ("vm/on", "sn1/below", "base/deep", "other/o0", "vm/below"):
        bitmap(talk, "add", where)
    bitmap(talk, "add", "vm/off", disabled=True)
    bitmap(talk, "remove", "vm/below")
    serve(talk, scene)
    export(talk, "e", "zz")
    export(talk, "e", "on")
    export(talk, "e", {"node": "vm", "name": "zz"})
    export(talk, "e", {"node": "zz", "name": "on"})
    export(talk, "e", "off", "below", "deep")
    export(talk, "e", "zz")
    export(talk, "f", "off")
    export(talk, "f", "zz", name="e")
    export(talk, "f", "on", "off", writable=True)
    look(talk)
    hashes(talk, "vm/off")
    for verb in ("remove", "clear", "enable", "disable"):
        bitmap(talk, verb, "vm/off")
    bitmap(talk, "merge", "vm/off", bitmaps=["on"])
    bitmap(talk, "merge", "vm/on", bitmaps=["off"])
    transaction(talk, action("add", "vm/new"), action("clear", "vm/off"))
    talk.quietly("block-export-del", id="e")
    look(talk)
    export(talk, "e", {"node": "other", "name": "o0"}, "on", writable=True)
    look(talk)
    if is_qemu(talk):
        talk.note("blockdev-del other: better not")
    else:
        ask(talk, "blockdev-del other", "blockdev-del", node_name="other")
    talk.quietly("nbd-server-stop")
    look(talk)
    bitmap(talk, "remove", "vm/on")


@script
def a_read_only_image(talk: Talk, scene: Scene) -> None:
    stored(scene, "good", "off")
    scene.add("kept", read_only=True)
    look(talk)
    serve(talk, scene)
    for verb in ("clear", "remove"):
        bitmap(talk, verb, "kept/good")
    bitmap(talk, "merge", "kept/good", bitmaps=["good"])
    export(talk, "e", "good", node_name="kept")
    bitmap(talk, "merge", "kept/off", bitmaps=["good"])
    talk.quietly("block-export-del", id="e")
    bitmap(talk, "add", "kept/memory")
    bitmap(talk, "merge", "kept/memory", bitmaps=["good"])
    bitmap(talk, "disable", "kept/good")
    bitmap(talk, "enable", "kept/off")
    hashes(talk, "kept/good")
    look(talk)
    talk.quietly("nbd-server-stop")


@script
def an_inconsistent_one_can_be_removed(talk: Talk, scene: Scene) -> None:
    stored(scene, "bad", "off")
    spoil(scene)
    scene.add("kept")
    look(talk)
    serve(talk, scene)
    bitmap(talk, "add", "kept/bad")
    bitmap(talk, "add", "kept/bad", persistent=True)
    bitmap(talk, "add", "kept/m")
    for verb in ("clear", "enable", "disable"):
        bitmap(talk, verb, "kept/bad")
    bitmap(talk, "merge", "kept/bad", bitmaps=["m"])
    bitmap(talk, "merge", "kept/m", bitmaps=["bad"])
    for writable in (False, True):
        export(talk, "e", "bad", node_name="kept", writable=writable)
    transaction(talk, action("clear", "kept/m"), action("clear", "kept/bad"))
    bitmap(talk, "remove", "kept/bad")
    look(talk)
    talk.quietly("nbd-server-stop")


def serve(talk: Talk, scene: Scene) -> None:
    """An NBD server."""
    where = {"type": "unix", "data": {"path": str(scene.folder / "nbd")}}
    talk.quietly("nbd-server-start", addr=where)


def stored(scene: Scene, on: str, off: str) -> None:
    """`kept.qcow2`, made by qemu-img, with a bitmap that records and one that does not."""
    path = str(scene.folder / "kept.qcow2")
    for command in (
        ["create", "-q", "-f", "qcow2", path, str(SIZE)],
        ["bitmap", "--add", path, on],
        ["bitmap", "--add", "--disable", path, off],
    ):
        subprocess.run(["qemu-img", *command], check=True)


def spoil(scene: Scene) -> None:
    """A daemon of QEMU's that has `kept.qcow2` open dies."""
    folder = scene.folder / "dies"
    folder.mkdir()
    with suppress(AssertionError), speaking(folder, QEMU) as talk:
        talk("blockdev-add", **scene.node("kept"))
        pid = int(subprocess.run(["pgrep", "-nf", f"path={folder}/qmp"], check=True,
                                 capture_output=True, text=True).stdout)  # fmt: skip
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def is_qemu(talk: Talk) -> bool:
    """Who it is that we speak with."""
    return not any(c["name"].startswith("x-query-tree") for c in talk.quietly("query-commands"))


def held(who: tuple[str, ...], folder: Path, name: str) -> list[str]:
    """The story of a script."""
    folder.mkdir()
    with speaking(folder, who) as talk:
        scene = Scene(talk, folder)
        talk.steps.clear()
        SCRIPTS[name](talk, scene)
        return [step.what for step in talk.steps]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_words(tmp_path: Path, name: str) -> None:
    need("qemu-storage-daemon", "qemu-img")
    theirs = held(QEMU, tmp_path / "q", name)
    ours = held(OURS, tmp_path / "o", name)
    for d in DIFFERENCES.get(name, []):
        assert d.qemu in theirs and d.ours in ours, f"no difference any more: {d}"
        theirs[theirs.index(d.qemu)] = d.ours
    assert ours == theirs
