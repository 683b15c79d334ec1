"""Dirty bitmaps of a daemon: the moment when they begin, what undoes them, who gets to see them.

In this process, with real disks, real clients and real files. What the commands answer is compared
with QEMU elsewhere (test_qmp_bitmaps.py), what a crash leaves in test_crash_bitmaps.py.
"""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cowferry
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.node import Node, State
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from cowferry.wire import nbd
from daemons import PATIENCE, Told
from test_nbd import ask, greet, named
from tests_support import need

SIZE = 4 << 20
CLUSTER = 64 << 10
FORMATS = {
    "raw": ("raw", {}),
    "qcow2": ("qcow2", {}),
    "qcow2 v2": ("qcow2", {"compat": "0.10"}),
    "qed": ("qed", {}),
}


class House:
    """A daemon, and images in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemon = Daemon()

    def image(self, name: str, kind: str = "qcow2", size: int = SIZE) -> str:
        """A new empty image; its path."""
        format, options = FORMATS[kind]
        path = str(self.folder / f"{name}.{format}")
        opening.create_image(path, format, size, options)
        return path

    def open(self, name: str, kind: str = "qcow2", **more: Any) -> Disk:
        """The disk in it, made if it is not there."""
        format, _ = FORMATS[kind]
        path = self.folder / f"{name}.{format}"
        if not path.exists():
            self.image(name, kind)
        self("blockdev-add", node_name=name, driver=format, **more,
             file={"driver": "file", "filename": str(path)})  # fmt: skip
        return self.daemon.graph.disk(name)

    def __call__(self, command: str, **arguments: Any) -> Any:
        return self.daemon.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def bitmap(self, verb: str, node: str, name: str, **more: Any) -> None:
        self("transaction", actions=[action(verb, node, name, **more)])

    def bits(self, node: str, name: str) -> list[tuple[int, int]]:
        """The dirty runs, in bytes."""
        return list(self.daemon.graph.node(node).bitmaps[name].runs())


def action(verb: str, node: str, name: str, **more: Any) -> dict[str, Any]:
    key = "target" if verb == "merge" else "name"
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, key: name, **more}}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    try:
        yield house
    finally:
        house.daemon.close()


# One moment -------------------------------------------------------------------------------


@contextmanager
def in_turn(*disks: Disk, begin: int = 0) -> Iterator[list[int]]:
    """A guest writes cluster n of the first disk, of the second, ..., then n + 1; the list has the
    next one."""
    written = [begin]
    over = threading.Event()

    def work() -> None:
        data = memoryview(bytes(512))
        while not over.is_set():
            for disk in disks:
                disk.pwrite(data, written[0] * CLUSTER % disk.size)
            written[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield written
    finally:
        over.set()
        thread.join()


def some_more(written: list[int], count: int = 10) -> None:
    """Until so many more have been written."""
    wanted, end = written[0] + count, time.monotonic() + PATIENCE
    while written[0] < wanted:
        assert time.monotonic() < end
        time.sleep(0.0005)


def test_S4_bitmaps_begin_at_the_moment_of_the_snapshot_on_every_disk(house: House) -> None:
    """What is in an overlay was written after the moment, and the bitmap says exactly that."""
    disks = [house.open("vda"), house.open("vdb")]
    with in_turn(*disks) as written:
        for n in range(4):
            actions = []
            for disk in disks:
                overlay = f"{disk.root.name[:3]}-{n}"
                house.open(overlay, backing=None)
                data = {"node": disk.root.name, "overlay": overlay}
                actions.append({"type": "blockdev-snapshot", "data": data})
                actions.append(action("add", overlay, "b"))
            some_more(written)
            house("transaction", actions=actions)
            some_more(written)
    for disk in disks:
        for name in (f"{disk.root.name[:3]}-{n}" for n in range(4)):
            node = house.daemon.graph.node(name)
            assert house.bits(name, "b") == allocated(node) != []


def allocated(node: Node) -> list[tuple[int, int]]:
    """The runs that the node itself has something for."""
    runs: list[tuple[int, int]] = []
    at = 0
    for e in node.extents(0, node.size):
        if e.state is not State.HOLE:
            if runs and sum(runs[-1]) == at:
                runs[-1] = (runs[-1][0], runs[-1][1] + e.length)
            else:
                runs.append((at, e.length))
        at += e.length
    return runs


@pytest.mark.parametrize("verb", ["add", "clear", "enable"])
def test_a_transaction_is_one_moment_for_several_disks(house: House, verb: str) -> None:
    """One guest writes the disks in turn. On each, what is recorded is the end of what it wrote,
    and none begins more than one write before another."""
    for name, format in (("vda", "qcow2"), ("vdb", "raw")):
        opening.create_image(str(house.folder / f"{name}.{format}"), format, 1 << 32, {})
    disks = [house.open("vda"), house.open("vdb", "raw")]
    names, next = ("vda", "vdb"), 0
    for n in range(8):
        name = f"b{n}"
        for node in names if verb != "add" else ():
            house.bitmap("add", node, name, disabled=verb == "enable", granularity=CLUSTER)
        with in_turn(*disks, begin=next) as written:
            some_more(written)
            house("transaction", actions=[action(verb, node, name) for node in names])
            some_more(written)
        next = written[0]
        (vda,), (vdb,) = (house.bits(node, name) for node in names)
        assert sum(vda) == sum(vdb) == next * CLUSTER <= 1 << 32
        assert vda[0] - vdb[0] in (0, CLUSTER)
        for node in names:
            house.bitmap("remove", node, name)


def test_a_bitmap_of_a_target_tells_what_the_copy_writes_there(house: House) -> None:
    """It is added while a mirror runs, and goes on when the disk has moved there."""
    vm = house.open("vm")
    target = house.open("t", "raw").root
    told = Told(house.daemon)
    house("blockdev-mirror", job_id="j", device="vm", target="t", sync="full")
    told.wait("BLOCK_JOB_READY")
    house.bitmap("add", "t", "b")
    vm.pwrite(memoryview(b"x" * 512), 3 * CLUSTER)
    house("job-complete", id="j")
    told.wait("JOB_STATUS_CHANGE", id="j", status="null")
    assert vm.root is target
    vm.pwrite(memoryview(b"y" * 512), 9 * CLUSTER)
    dirty = house.bits("t", "b")
    assert (3 * CLUSTER, CLUSTER) in dirty and (9 * CLUSTER, CLUSTER) in dirty
    assert sum(length for _, length in dirty) < SIZE // 2


# All or none ------------------------------------------------------------------------------


def state(house: House) -> Any:
    """Everything about every bitmap, in memory; and what the images store."""
    nodes = sorted(house.daemon.graph.every_node(), key=lambda n: n.name)
    memory = [
        (n.name, b.name, b.bits.tobytes(), b.count(), b.recording, b.persistent, b.busy)
        for n in nodes
        for b in n.bitmaps.values()
    ]
    return memory, [(n.name, n.keeper is not None) for n in nodes]


@pytest.mark.parametrize("seed", range(12))
def test_a_transaction_that_fails_leaves_nothing_of_it(house: House, seed: int) -> None:
    """Whatever it was made of. The last action fails: in its preparation, or in its storing."""
    rnd = random.Random(seed)
    nodes = {"a": house.open("a", rnd.choice(list(FORMATS))), "b": house.open("b", "raw")}
    have = {node: [f"{node}{n}" for n in range(4)] for node in nodes}
    for node, names in have.items():
        for name in names:
            house.bitmap(
                "add",
                node,
                name,
                persistent=rnd.random() < 0.5,
                disabled=rnd.random() < 0.3,
                granularity=1 << rnd.randrange(9, 20),
            )
            nodes[node].pwrite(memoryview(bytes(512)), rnd.randrange(SIZE - 512))
    actions = []
    for number in range(rnd.randrange(1, 9)):
        node = rnd.choice("ab")
        verb = rnd.choice(["add", "remove", "clear", "enable", "disable", "merge"])
        if verb == "add":
            new = f"new{number}"
            actions.append(action("add", node, new, persistent=rnd.random() < 0.5))
            have[node].append(new)
        elif have[node]:
            name = rnd.choice(have[node])
            other = rnd.choice("ab")
            more = {}
            if verb == "merge" and have[other]:
                more = {"bitmaps": [{"node": other, "name": rnd.choice(have[other])}]}
            elif verb == "merge":
                more = {"bitmaps": []}
            if verb == "remove":
                have[node].remove(name)
            actions.append(action(verb, node, name, **more))
    before = state(house)
    with pytest.raises(CowferryError, match=r"abort|not found"):
        last = rnd.choice([{"type": "abort"}, action("clear", "a", "nope")])
        house("transaction", actions=[*actions, last])
    assert state(house) == before
    actions.append(action("add", "b", "kept", persistent=True))
    with no_storing("b.raw.bitmaps.new"), pytest.raises(CowferryError, match="Input/output error"):
        house("transaction", actions=actions)
    assert state(house) == before
    house("transaction", actions=actions)
    kept = {n: stored(house, n) for n in nodes}
    house.daemon.close()
    again = House(house.folder)
    try:
        for node in nodes:
            again.open(node, "raw" if node == "b" else kind_of(house.folder, node))
            assert stored(again, node) == kept[node], "what was answered is there afterwards"
    finally:
        again.daemon.close()


def kind_of(folder: Path, name: str) -> str:
    return next(path.suffix[1:] for path in folder.iterdir() if path.stem == name)


def stored(house: House, node: str) -> Any:
    """The persistent bitmaps, which are there after a restart."""
    found = house.daemon.graph.node(node).bitmaps.values()
    return sorted(
        (b.name, b.granularity, b.bits.to01(), b.recording, b.inconsistent)
        for b in found
        if b.persistent
    )


@contextmanager
def no_storing(name: str) -> Iterator[None]:
    """Files of that name cannot be flushed."""
    plain = sysio.fdatasync

    def broken(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysio, "fdatasync", broken)
        yield


# What is recorded -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_B2_every_change_is_in_it_and_nothing_else(house: House, kind: str) -> None:
    """Writes, zeroes and discards, of any length; also after the image was closed and opened."""
    rnd = random.Random(kind)
    disk = house.open("vm", kind)
    sizes = {"fine": 512, "plain": 64 << 10, "coarse": 1 << 20}
    for name, granularity in sizes.items():
        house.bitmap("add", "vm", name, granularity=granularity, persistent=True)
    want: dict[str, set[int]] = {name: set() for name in sizes}
    for round in range(3):
        for _ in range(40):
            offset = rnd.randrange(SIZE)
            length = min(rnd.choice([1, 512, 5000, 70_000]), SIZE - offset)
            how = rnd.randrange(4)
            if how == 0:
                disk.zero(offset, length)
            elif how == 1:
                disk.discard(offset, length)
            else:
                disk.pwrite(memoryview(bytes(length)), offset)
            for name, granularity in sizes.items():
                want[name].update(
                    range(offset // granularity, -(-(offset + length) // granularity))
                )
        if round == 1:
            house.daemon.close()
            house.daemon = Daemon()
            disk = house.open("vm", kind)
        for name, granularity in sizes.items():
            got = {
                at // granularity
                for start, length in house.bits("vm", name)
                for at in range(start, start + length, granularity)
            }
            assert got == want[name]
            entry = dict_of(house, "vm")[name]
            assert entry["count"] == len(want[name]) * granularity and entry["persistent"]
        for name in sizes:
            if round == 0:
                house.bitmap("clear", "vm", name)
                want[name].clear()


def dict_of(house: House, node: str) -> dict[str, Any]:
    """What query-named-block-nodes says of each bitmap of a node."""
    nodes = {n["node-name"]: n for n in house("query-named-block-nodes", flat=True)}
    return {entry["name"]: entry for entry in nodes[node].get("dirty-bitmaps", [])}


@pytest.mark.parametrize("kind", FORMATS)
def test_where_the_last_one_goes_nothing_is_left(house: House, kind: str) -> None:
    """No file, and an image as it was made."""
    path = house.image("vm", kind)
    house.open("vm", kind)
    before = sorted(os.listdir(house.folder))
    house.bitmap("add", "vm", "b", persistent=True)
    house.bitmap("add", "vm", "c", persistent=True)
    house("transaction", actions=[action("remove", "vm", "b"), action("remove", "vm", "c")])
    assert sorted(os.listdir(house.folder)) == before
    house("blockdev-del", node_name="vm")
    house.open("vm", kind)
    assert dict_of(house, "vm") == {}
    house("blockdev-del", node_name="vm")
    if kind != "raw":
        need("qemu-img")
        subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_it_grows_with_the_disk_and_records_that(house: House) -> None:
    disk = house.open("vm", "raw")
    for name, persistent in (("p", True), ("m", False)):
        house.bitmap("add", "vm", name, persistent=persistent)
    house.bitmap("add", "vm", "off", disabled=True)
    house("block_resize", node_name="vm", size=2 * SIZE)
    for name in "pm":
        assert house.bits("vm", name) == [(SIZE, SIZE)]
        house.bitmap("clear", "vm", name)
    disk.pwrite(memoryview(b"x"), 2 * SIZE - 1)
    for name in "pm":
        assert house.bits("vm", name) == [(2 * SIZE - CLUSTER, CLUSTER)]
    assert house.bits("vm", "off") == []


# Nobody is passed by ----------------------------------------------------------------------


def refusal(house: House, command: str, **arguments: Any) -> str:
    with pytest.raises(CowferryError) as caught:
        house(command, **arguments)
    return caught.value.desc


def test_a_node_that_is_written_through_another_has_none(house: House) -> None:
    """Nobody would set its bits."""
    file = {"driver": "file", "filename": house.image("vm", "raw"), "node-name": "f"}
    house("blockdev-add", **{"node-name": "r", "driver": "raw", "file": file})
    assert "written through 'r'" in refusal(house, "block-dirty-bitmap-add", node="f", name="b")
    house("blockdev-del", node_name="r")
    house("blockdev-add", **file)
    house.bitmap("add", "f", "b")
    given = {"node-name": "r", "driver": "raw", "file": "f"}
    assert "has dirty bitmaps" in refusal(house, "blockdev-add", **given)
    house.bitmap("remove", "f", "b")
    house("blockdev-add", **given)


def test_what_is_no_image_of_its_own_has_bitmaps_in_memory_only(house: House) -> None:
    """A node over an export, a raw node over a part of a file: nothing is beside those."""
    house.open("vm", "raw")
    uri = {"type": "unix", "path": listen(house)}
    house("block-export-add", type="nbd", id="e", node_name="vm", name="d", writable=True)
    file = {"driver": "file", "filename": house.image("part", "raw")}
    house("blockdev-add", node_name="far", driver="nbd", server=uri, export="d")
    house("blockdev-add", node_name="part", driver="raw", file=file, offset=65536, size=1 << 20)
    for node in ("far", "part"):
        given = {"node": node, "name": "b", "persistent": True}
        text = f"Can't store persistent bitmaps to {node}: Operation not supported"
        assert refusal(house, "block-dirty-bitmap-add", **given) == text
        house.bitmap("add", node, "b")
        house.daemon.graph.disk(node).pwrite(memoryview(b"x"), 0)
        assert house.bits(node, "b") == [(0, CLUSTER)]
    house("blockdev-del", node_name="far")
    house("nbd-server-stop")


def test_a_filter_has_the_bitmaps_of_the_node_below(house: House) -> None:
    """Whether they were added before it was there, to the one or to the other."""
    house.open("vm")
    house.bitmap("add", "vm", "before")
    house("object-add", **{"qom-type": "throttle-group", "id": "g"})
    given = {"driver": "throttle", "throttle-group": "g", "file": "vm", "node-name": "f"}
    house("blockdev-add", **given)
    house.bitmap("add", "vm", "below", persistent=True)
    house.bitmap("add", "f", "above", persistent=True)
    house("transaction", actions=[action("add", "vm", "both"), action("disable", "f", "both")])
    again = {"node": "vm", "name": "above"}
    assert refusal(house, "block-dirty-bitmap-add", **again) == "Bitmap already exists: above"
    house.daemon.graph.disk("f").pwrite(memoryview(b"x"), 0)
    names = ["before", "below", "above", "both"]
    dirty = {name: entry["count"] for name, entry in dict_of(house, "vm").items()}
    assert dirty == dict.fromkeys(names, CLUSTER) | {"both": 0}
    assert dict_of(house, "f") == {}
    for device in ({"device": "f"}, {}):
        found = house("x-query-bitmaps", **device)
        assert [(b["node-name"], b["name"]) for b in found] == [("vm", name) for name in names]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x\udfff"])
def test_a_name_is_text(house: House, name: str) -> None:
    """Half of a character cannot be stored, and C strings end at a NUL."""
    house.open("vm")
    for persistent in (True, False):
        text = refusal(house, "block-dirty-bitmap-add", node="vm", name=name, persistent=persistent)
        assert text.endswith("contains an invalid character") and text.isprintable()


def test_an_error_tells_a_few_names_and_how_many_more_there_are(house: House) -> None:
    house.open("vm")
    for n in range(23):
        house.bitmap("add", "vm", f"b{n:02}")
    with pytest.raises(CowferryError) as error:
        house.bitmap("clear", "vm", "monday")
    assert error.value.hint.endswith("b18, b19, and 3 more")


def test_a_bitmap_has_no_more_bits_than_memory_is_for(house: House) -> None:
    path = str(house.folder / "huge.raw")
    opening.create_image(path, "raw", 1 << 42, {})
    house.open("huge", "raw")
    text = refusal(house, "block-dirty-bitmap-add", node="huge", name="b", granularity=512)
    assert "8589934592 bits" in text
    house.bitmap("add", "huge", "b")


# The library ------------------------------------------------------------------------------


def test_the_library_does_the_same_on_several_disks(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.raw", "b.qcow2")]
    for path in paths:
        cowferry.create(path, SIZE, path.rsplit(".")[-1])
    with cowferry.open(paths[0]) as a, cowferry.open(paths[1]) as b:
        cowferry.bitmap_add([a, b], "m", granularity=4096)
        cowferry.bitmap_add(a, "memory", persistent=False, disabled=True)
        for disk in (a, b):
            disk.pwrite(memoryview(b"x" * 5000), 8192)
        assert [*cowferry.dirty(a, "m")] == [*cowferry.dirty(b, "m")] == [(8192, 8192)]
        assert [*cowferry.dirty(a, "memory")] == []
        cowferry.bitmap_merge(a, "memory", "m", (b, "m"))
        cowferry.bitmap_clear([a, b], "m")
        cowferry.bitmap_disable(b, "m")
        cowferry.bitmap_enable(a, "memory")
        for disk in (a, b):
            disk.pwrite(memoryview(b"y"), SIZE - 1)
        assert [*cowferry.dirty(a, "memory")] == [(0, CLUSTER), (SIZE - CLUSTER, CLUSTER)]
        with pytest.raises(CowferryError, match="already exists"):
            cowferry.bitmap_add([b, a], "memory")
        assert [entry["name"] for entry in cowferry.bitmaps(b)] == ["m"]
        cowferry.snapshot(b, str(tmp_path / "top.qcow2"))
        cowferry.bitmap_add(b, "above")
        cowferry.bitmap_merge(b, "above", "m")
        found = cowferry.bitmaps(b)
        assert [(Path(entry["filename"]).name, entry["name"]) for entry in found] == [
            ("top.qcow2", "m"), ("top.qcow2", "above"), ("b.qcow2", "m"),
        ]  # fmt: skip
    with cowferry.open(paths[0]) as a:
        (entry,) = cowferry.bitmaps(a)
        assert (entry["name"], entry["count"], entry["recording"]) == ("m", 4096, True)
        cowferry.bitmap_remove(a, "m")
    assert not Path(f"{paths[0]}.bitmaps").exists()


# Exports ----------------------------------------------------------------------------------


def listen(house: House) -> str:
    """The NBD server's socket."""
    path = str(house.folder / "s")
    house("nbd-server-start", addr={"type": "unix", "path": path})
    return path


def offer(house: House, *bitmaps: Any, **more: Any) -> None:
    given = {"type": "nbd", "id": "e", "node-name": "vm", "name": "d", "bitmaps": list(bitmaps)}
    house("block-export-add", **{**given, **more})


def test_an_exported_bitmap_is_nobody_elses_until_the_export_is_gone(house: House) -> None:
    house.open("vm")
    house.bitmap("add", "vm", "b", disabled=True)
    path = listen(house)
    told = Told(house.daemon)
    offer(house, "b")
    with NbdClient(f"nbd+unix:///d?socket={path}") as client:
        client.pread(512, 0)
        assert "in use by another" in refusal(
            house, "block-dirty-bitmap-clear", node="vm", name="b"
        )
        assert "still in use" in refusal(house, "block-export-del", id="e")
        assert dict_of(house, "vm")["b"]["busy"]
        house("block-export-del", id="e", mode="hard")
        told.wait("BLOCK_EXPORT_DELETED", id="e")
    house.bitmap("clear", "vm", "b")
    offer(house)
    with pytest.raises(CowferryError, match="already in use"):
        offer(house, "b", name="other")
    house.bitmap("clear", "vm", "b")  # an export that was refused has not got it
    offer(house, "b", id="f", name="f")
    house("nbd-server-stop")
    house.bitmap("remove", "vm", "b")


def test_two_bitmaps_of_one_name_are_not_told_apart(house: House) -> None:
    for node in ("vm", "other"):
        house.open(node)
        house.bitmap("add", node, "b", disabled=True)
    listen(house)
    with pytest.raises(CowferryError, match="Two of the bitmaps are named 'b'"):
        offer(house, "b", {"node": "other", "name": "b"})
    offer(house, "b", {"node": "vm", "name": "b"})


def test_the_namespaces_are_listed_and_select_nothing(house: House) -> None:
    """The NBD specification, section "Metadata querying", and QEMU's docs/interop/nbd.txt."""
    house.open("vm")
    for name in ("b0", "b1", "other"):
        house.bitmap("add", "vm", name, disabled=True)
    listen(house)
    offer(house, "b0", "b1", **{"allocation-depth": True})
    sock = greet(house.folder)
    ask(sock, nbd.OPT_STRUCTURED_REPLY)
    bitmaps = ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
    for query, want in (
        (None, ["base:allocation", "qemu:allocation-depth", *bitmaps]),
        ("base:", ["base:allocation"]),
        ("qemu:", ["qemu:allocation-depth", *bitmaps]),
        ("qemu:dirty-bitmap:", bitmaps),
        ("qemu:dirty-bitmap:b1", bitmaps[1:]),
        ("qemu:dirty-bitmap:other", []),
        ("qemu:dirty-bitmap", []),
        ("dirty-bitmap:b0", []),
    ):
        queries = b"" if query is None else named(query.encode())
        data = named(b"d") + struct.pack(">I", query is not None) + queries
        for option in (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
            *found, last = ask(sock, option, data)
            assert last == (nbd.REP_ACK, b"")
            exact = query is not None and not query.endswith(":")
            if option == nbd.OPT_LIST_META_CONTEXT or exact:
                assert [text[4:].decode() for _, text in found] == want, query
            else:
                assert found == [], query
    sock.close()


def test_other_programs_read_the_bitmaps_of_an_export(house: House) -> None:
    """nbdinfo, nbdcopy and qemu-img, of bitmaps in the disk's root, below it and beside it."""
    need("nbdinfo", "nbdcopy", "qemu-img")
    base = house.open("base")
    house.bitmap("add", "base", "below", granularity=512)
    base.pwrite(memoryview(b"b" * 512), 512)
    other = house.open("other", "raw")
    house.bitmap("add", "other", "beside")
    other.pwrite(memoryview(b"o" * 512), SIZE - 512)
    house.open("vm", backing=None)
    house("blockdev-snapshot", node="base", overlay="vm")
    vm = house.daemon.graph.disk("vm")
    house.bitmap("add", "vm", "b0")
    house.bitmap("add", "vm", "b1", granularity=1 << 20)
    vm.pwrite(memoryview(b"v" * (2 * CLUSTER)), 3 * CLUSTER)
    path = listen(house)
    offer(house, "b0", "b1", "below", {"node": "other", "name": "beside"}, writable=True)
    uri = f"nbd+unix:///d?socket={path}"
    want = {
        "b0": [(0, 3 * CLUSTER, 0), (3 * CLUSTER, 2 * CLUSTER, 1)],
        "b1": [(0, 1 << 20, 1)],
        "below": [(0, 512, 0), (512, 512, 1)],
        "beside": [(0, SIZE - CLUSTER, 0), (SIZE - CLUSTER, CLUSTER, 1)],
    }
    told = json.loads(output("nbdinfo", "--json", uri))["exports"][0]["contexts"]
    assert told == ["base:allocation", *(f"qemu:dirty-bitmap:{name}" for name in want)]
    for name, runs in want.items():
        context = f"qemu:dirty-bitmap:{name}"
        end = runs[-1][0] + runs[-1][1]
        if end < SIZE:
            runs.append((end, SIZE - end, 0))
        told = json.loads(output("nbdinfo", f"--map={context}", "--json", uri))
        assert [(t["offset"], t["length"], t["type"]) for t in told] == runs
        # QEMU reads what is dirty as what has no data.
        options = (
            f"driver=nbd,server.type=unix,server.path={path},export=d,x-dirty-bitmap={context}"
        )
        told = json.loads(output("qemu-img", "map", "--image-opts", "--output=json", options))
        assert [(t["start"], t["length"], int(not t["data"])) for t in told] == runs
    copy = house.folder / "copy.raw"
    output("nbdcopy", uri, str(copy))
    got = bytearray(SIZE)
    vm.pread(memoryview(got), 0)
    assert copy.read_bytes() == got


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
