"""The graph: names, who uses what, and what is closed when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import contents, make_base, overlay
from cowferry.block.disk import Disk
from cowferry.block.node import Node, chain
from cowferry.block.walk import parents_first
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceInUse, DeviceNotFound
from cowferry.graph import Graph

SIZE = 1 << 20


@pytest.fixture
def graph() -> Iterator[Graph]:
    made = Graph()
    yield made
    made.close()


def raw(path: Path, name: str | None = None, **more: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    return {**out, **({"node-name": name} if name else {}), **more}


def qcow2(path: Path, name: str | None = None, **more: Any) -> dict[str, Any]:
    return {**raw(path, name, **more), "driver": "qcow2"}


def fds() -> set[str]:
    """What this process has open."""
    out = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            out.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return out


def refused(graph: Graph, options: dict[str, Any]) -> str:
    before = dict(graph.nodes), fds()
    with pytest.raises(CowferryError) as error:
        graph.add_node(options)
    assert (dict(graph.nodes), fds()) == before, "something stayed behind"
    return error.value.desc


def test_names_of_nodes_are_checked(graph: Graph, tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    path = tmp_path / "base.raw"
    assert refused(graph, raw(path)) == "'node-name' must be specified for the root node"
    assert refused(graph, raw(path, "9bad")) == "Invalid node-name: '9bad'"
    long = "n" * 32
    assert refused(graph, raw(path, long)) == f"Invalid node-name: '{long}'"
    graph.add_node(raw(path, "n" * 31, **{"read-only": True}))
    twice = raw(path, "n" * 31)
    assert refused(graph, twice) == f"Duplicate nodes with node-name='{'n' * 31}'"
    nested = raw(path, "x")
    nested["file"]["node-name"] = "x"
    assert refused(graph, nested) == "Duplicate nodes with node-name='x'"
    missing = refused(graph, raw(tmp_path / "none", "m"))
    assert missing == f"Could not open '{tmp_path}/none': No such file or directory"


def test_implicit_children_get_names_and_go_with_their_parent(graph: Graph, tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    graph.add_node(qcow2(tmp_path / "vm.qcow2", "top"))
    assert len(graph.nodes) == 4  # vm and base, each with its file
    assert all(n == "top" or n.startswith("#block") for n in graph.nodes)
    graph.delete_node("top")
    assert not graph.nodes
    assert not {f for f in fds() if f.startswith(str(tmp_path))}


def test_backing_null_and_by_reference(graph: Graph, tmp_path: Path) -> None:
    oracle = make_base(tmp_path, SIZE)
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    graph.add_node(qcow2(tmp_path / "vm.qcow2", "alone", backing=None))
    assert graph.node("alone").backing is None
    graph.delete_node("alone")
    base = graph.add_node(raw(tmp_path / "base.raw", "base", **{"read-only": True}))
    graph.add_node(qcow2(tmp_path / "vm.qcow2", "top", backing="base"))
    assert graph.node("top").backing is base
    assert contents(graph.disk("top")) == oracle
    with pytest.raises(CowferryError) as error:
        graph.delete_node("base")
    assert error.value.desc == "Node 'base' is busy: node is used as backing hd of 'top'"
    graph.delete_node("top")
    assert [n for n in graph.nodes if not n.startswith("#")] == ["base"]
    assert contents(base) == oracle, "a node that somebody added stays open"


def test_unknown_nodes_and_disks(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(CowferryError, match=r"^Failed to find node with node-name='x'$"):
        graph.delete_node("x")
    with pytest.raises(DeviceNotFound, match="Device 'x' not found"):
        graph.disk("x")


def test_one_disk_per_root_however_it_is_called(graph: Graph, tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    options = raw(tmp_path / "base.raw")
    disk = graph.open_disk("d", options)
    assert graph.disk("d") is disk
    assert graph.disk(disk.root.name) is disk
    assert graph.disk_over(disk.root) is disk
    with pytest.raises(CowferryError, match="'d'"):
        graph.open_disk("d", options)


def test_claims_are_all_or_nothing(graph: Graph, tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    a = graph.add_node(raw(tmp_path / "base.raw", "a", **{"read-only": True}))
    b = graph.add_node(raw(tmp_path / "base.raw", "b", **{"read-only": True}))
    why = "block device is in use by block job: stream"
    graph.claim([b], why)
    with pytest.raises(DeviceInUse) as error:
        graph.claim([a, b], "resize")
    assert error.value.desc == f"Node 'b' is busy: {why}, which excludes resize"
    graph.claim([a], "resize")  # the failed claim left nothing on it
    with pytest.raises(CowferryError, match="Node 'b' is busy"):
        graph.delete_node("b")
    graph.release([b], why)
    graph.delete_node("b")


def test_find_base_by_every_name_it_has(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path, SIZE)
    overlay(tmp_path, "sn1.qcow2", "base.raw", "raw", SIZE)
    overlay(tmp_path, "vm.qcow2", "sn1.qcow2", "qcow2", SIZE)
    disk = graph.open_disk("vm", qcow2(tmp_path / "vm.qcow2"))
    sn1, base = list(chain(disk.root))[1:]
    assert graph.find_base(disk, "base.raw") is base  # as sn1 records it
    assert graph.find_base(disk, str(tmp_path / "base.raw")) is base
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sn1.qcow2")
    assert graph.find_base(disk, str(tmp_path / "elsewhere")) is sn1
    monkeypatch.chdir(tmp_path)
    assert graph.find_base(disk, "./sn1.qcow2") is sn1
    assert graph.find_base(disk, sn1.name, by_node=True) is sn1
    with pytest.raises(CowferryError, match="Node 'x' is not a backing image of 'vm'"):
        graph.find_base(disk, "x", by_node=True)
    with pytest.raises(CowferryError, match="not a backing image"):
        graph.find_base(disk, str(tmp_path / "vm.qcow2"))  # the top is not below itself


def detach_all(graph: Graph, disk: Disk) -> Node:
    old = disk.root.backing
    assert old is not None
    with disk.exclusive():
        disk.root.backing = None
    graph.detached(old, None)
    return old


def test_detached_nodes_are_closed_unless_somebody_added_them(graph: Graph, tmp_path: Path) -> None:
    oracle = make_base(tmp_path, SIZE)
    overlay(tmp_path, "sn1.qcow2", "base.raw", "raw", SIZE)
    overlay(tmp_path, "vm.qcow2", "sn1.qcow2", "qcow2", SIZE)
    graph.add_node(raw(tmp_path / "base.raw", "base", **{"read-only": True}))
    backing = qcow2(tmp_path / "sn1.qcow2", backing="base")
    disk = graph.open_disk("vm", qcow2(tmp_path / "vm.qcow2", backing=backing))
    graph.disk_over(next(n for n in chain(disk.root) if n is not disk.root))  # looked at by name
    detach_all(graph, disk)
    assert str(tmp_path / "sn1.qcow2") not in fds()
    assert all(d is disk for d in graph.all_disks()), "a disk over a closed node is kept"
    assert contents(graph.node("base")) == oracle


def test_a_detached_node_that_another_overlay_uses_stays(graph: Graph, tmp_path: Path) -> None:
    oracle = make_base(tmp_path, SIZE)
    for name in ("a", "b"):
        overlay(tmp_path, f"{name}.qcow2", "base.raw", "raw", SIZE)
    a = graph.open_disk("a", qcow2(tmp_path / "a.qcow2"))
    shared = a.root.backing
    assert shared is not None
    b = graph.open_disk("b", qcow2(tmp_path / "b.qcow2", backing=shared.name))
    detach_all(graph, a)
    assert contents(b) == oracle
    detach_all(graph, b)
    assert str(tmp_path / "base.raw") not in fds()


def test_an_exported_node_is_in_use_until_the_export_goes(graph: Graph, tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    graph.add_node(raw(tmp_path / "base.raw", "n"))
    graph.hold(graph.disk("n"), True)
    with pytest.raises(CowferryError, match=r"^Block device n is in use$"):
        graph.delete_node("n")
    graph.unhold(graph.disk("n"), True)
    graph.delete_node("n")


def test_one_writer_per_node(graph: Graph, tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    graph.add_node({"driver": "file", "filename": str(tmp_path / "base.raw"), "node-name": "f"})
    graph.add_node({"driver": "raw", "file": "f", "node-name": "base"})
    again = refused(graph, {"driver": "raw", "file": "f", "node-name": "again"})
    assert again == "Node 'f' is in use by 'base' as 'file'"
    with pytest.raises(CowferryError, match="Conflicts with use by 'base' as 'file'"):
        graph.hold(graph.disk("f"), True)
    graph.hold(graph.disk("base"), True)
    below = refused(graph, {"driver": "raw", "file": "base", "node-name": "over"})
    assert below == "Node 'base' is in use by a writable export"
    graph.unhold(graph.disk("base"), True)
    graph.add_node(qcow2(tmp_path / "vm.qcow2", "top", backing="base"))
    with pytest.raises(CowferryError, match="Conflicts with use by 'top' as 'backing'"):
        graph.hold(graph.disk("base"), True)
    graph.hold(graph.disk("base"), False)


def test_no_disk_is_read_past_a_node_that_writes_it(graph: Graph, tmp_path: Path) -> None:
    """Its leases would say where the bytes were before."""
    opening.create_image(str(tmp_path / "a.qcow2"), "qcow2", SIZE, {})
    graph.add_node(qcow2(tmp_path / "a.qcow2", "a"))
    above = {"driver": "raw", "file": "a", "node-name": "above"}
    graph.hold(graph.disk("a"), False)
    in_use = "Node 'a' is in use: it is a disk of its own, or exported"
    assert refused(graph, above) == in_use
    graph.unhold(graph.disk("a"), False)
    data, found = b"new" * 1000, memoryview(bytearray(3000))
    graph.disk("a").pread(found, 0)
    graph.add_node(above)
    with pytest.raises(CowferryError, match="use by 'above' as 'file', which writes 'a'"):
        graph.hold(graph.disk("a"), False)
    graph.disk("above").pwrite(memoryview(data), 0)
    graph.disk("a").pread(found, 0)
    assert found == data


def test_what_a_job_holds_is_not_laid_below_another_node(graph: Graph, tmp_path: Path) -> None:
    """Whoever wrote through that would be missed by the job."""
    make_base(tmp_path, SIZE)
    node = graph.add_node(raw(tmp_path / "base.raw", "n"))
    graph.claim([node], "block device is in use by block job: mirror", "j", served=node)
    text = refused(graph, {"driver": "raw", "file": "n", "node-name": "above"})
    assert text.startswith("Node 'n' is busy: block device is in use by block job: mirror 'j'")


def test_an_overlay_over_what_a_guest_writes_is_used_by_nobody_but_a_backup(
    graph: Graph, tmp_path: Path
) -> None:
    make_base(tmp_path, SIZE)
    for name in ("scratch.qcow2", "more.qcow2"):
        overlay(tmp_path, name, "base.raw", "raw", SIZE)
    base = graph.add_node(raw(tmp_path / "base.raw", "base"))
    graph.hold(graph.disk("base"), True)
    scratch = graph.add_node(qcow2(tmp_path / "scratch.qcow2", "scratch", backing="base"))
    why = "Node 'scratch' is busy: a writable export changes 'base' below it"
    for use in (
        lambda: graph.hold(graph.disk("scratch"), False),
        lambda: graph.claim([scratch], "a test"),
        lambda: graph.add_node(qcow2(tmp_path / "more.qcow2", "more", backing="scratch")),
        lambda: graph.claim([scratch, base], "a test", served=scratch),
    ):
        with pytest.raises(CowferryError, match=why):
            use()
    graph.claim([base, scratch], "a backup", "b", served=base, kept=scratch)
    graph.hold(graph.disk("scratch"), False)
    with pytest.raises(CowferryError, match="a backup 'b', which excludes an export"):
        graph.hold(graph.disk("scratch"), True)
    graph.unhold(graph.disk("base"), True)
    graph.hold(graph.disk("base"), True)  # the guest comes back meanwhile
    graph.release([base, scratch], "a backup", "b")
    with pytest.raises(CowferryError, match=why):
        graph.hold(graph.disk("scratch"), False)
    graph.unhold(graph.disk("scratch"), False)
    graph.delete_node("scratch")


def test_a_disk_that_moves_to_a_node_is_the_only_one_over_it(graph: Graph, tmp_path: Path) -> None:
    """Somebody may have looked at the node by itself before; two gates would let two in."""
    make_base(tmp_path, SIZE)
    disk = graph.disk_over(graph.add_node(raw(tmp_path / "base.raw", "base")))
    overlay(tmp_path, "top.qcow2", "base.raw", "raw", SIZE)
    top = graph.add_node(qcow2(tmp_path / "top.qcow2", "top", backing=None))
    assert graph.disk("top") is not disk
    disk.root = top
    graph.reroot(disk, top)
    assert graph.disk("top") is disk


def test_close_flushes_formats_before_the_files_that_hold_them(tmp_path: Path) -> None:
    opening.create_image(str(tmp_path / "a.qcow2"), "qcow2", SIZE, {})
    graph = Graph()
    graph.add_node({"driver": "file", "filename": str(tmp_path / "a.qcow2"), "node-name": "f"})
    graph.add_node({"driver": "qcow2", "file": "f", "node-name": "q"})
    assert [n.name for n in parents_first(list(graph.nodes.values()))] == ["q", "f"]
    graph.disk("q").pwrite(memoryview(b"x" * 4096), 65536)
    graph.close()
    assert not {f for f in fds() if f.startswith(str(tmp_path))}
    node = opening.open_image(str(tmp_path / "a.qcow2"))
    try:
        assert contents(node)[65536 : 65536 + 4096] == b"x" * 4096
    finally:
        node.close()
