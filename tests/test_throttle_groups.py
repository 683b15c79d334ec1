"""Throttle groups, throttle nodes and block_set_io_throttle: what they do, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks, contents, differs
from cowferry.block import limits
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceNotFound
from cowferry.wire import nbd
from limited import BLOCK, LAYERS, NO_LIMITS, SIZE, House, a_house, until
from timers import ByHand


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ByHand:
    by_hand = ByHand()
    monkeypatch.setattr(limits, "TIMER", by_hand)
    return by_hand


@pytest.fixture
def house(tmp_path: Path, clock: ByHand) -> Iterator[House]:
    with a_house(tmp_path, clock) as house:
        yield house


def refused(house: House, command: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(CowferryError) as error:
        house.daemon.execute(command, arguments)
    return error.value.desc


def throttled(house: House, name: str = "t0", group: str = "tg", **file: Any) -> None:
    """A throttle node over a raw file `NAME.raw`."""
    path = house.folder / f"{name}.raw"
    path.write_bytes(bytes(SIZE))
    below = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    below |= {k.replace("_", "-"): v for k, v in file.items()}
    house.daemon.execute(
        "blockdev-add",
        {"driver": "throttle", "node-name": name, "throttle-group": group, "file": below},
    )


def object_add(house: House, id: str, **given: int) -> None:
    house.daemon.execute(
        "object-add",
        {"qom-type": "throttle-group", "id": id,
         "limits": {k.replace("_", "-"): v for k, v in given.items()}},
    )  # fmt: skip


def test_an_export_of_a_throttle_node_keeps_to_its_groups_limits(house: House) -> None:
    object_add(house, "tg", iops_total=1)
    throttled(house)
    throttled(house, "t1")
    for name in ("t0", "t1"):
        house.daemon.execute(
            "block-export-add", {"type": "nbd", "id": name, "node-name": name, "writable": True}
        )
    guest, other = house.guest("t0"), house.guest("t1")
    guest.write(0)
    guest.answer()
    for n in range(4):
        guest.write(n)
        other.write(n)
    first, second = (house.daemon.graph.disk(n) for n in ("t0", "t1"))
    house.waiting(4, first)
    house.waiting(4, second)
    house.clock.advance(4)
    house.waiting(2, first)
    house.waiting(2, second)
    house.daemon.execute(
        "qom-set", {"path": "tg", "property": "limits", "value": {"iops-total": 0}}
    )
    guest.answers(4)
    other.answers(4)
    assert first.leases.tables, "leases lead straight through it"
    nodes = {n["node-name"]: n for n in house.daemon.execute("query-named-block-nodes", {})}
    assert nodes["t0"]["drv"] == "throttle" and nodes["t0"]["group"] == "tg"


def nested(house: House, *, top: str, below: str) -> None:
    """A throttle node of one group over one of another, exported as `t0`."""
    file = {"driver": "throttle", "node-name": "t1", "throttle-group": below, "file": {}}
    path = house.folder / "nested.raw"
    path.write_bytes(bytes(SIZE))
    file["file"] = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    house.daemon.execute(
        "blockdev-add",
        {"driver": "throttle", "node-name": "t0", "throttle-group": top, "file": file},
    )
    house.daemon.execute(
        "block-export-add", {"type": "nbd", "id": "t0", "node-name": "t0", "writable": True}
    )


@pytest.mark.parametrize("strict", ["t0", "t1"])
def test_a_disk_over_several_throttle_nodes_keeps_to_the_limits_of_all(
    house: House, clock: ByHand, strict: str
) -> None:
    """As QEMU's documentation has it: each disk its own limits, and all together those of one."""
    object_add(house, "few", iops_total=1)
    object_add(house, "many", iops_total=1000)
    groups = {"t0": "few", "t1": "many"} if strict == "t0" else {"t0": "many", "t1": "few"}
    nested(house, top=groups["t0"], below=groups["t1"])
    disk = house.daemon.graph.disk("t0")
    guest = house.guest("t0")
    guest.write(0)
    assert guest.answer() == 1
    for n in range(1, 10):
        guest.write(n)

    def waiting(count: int) -> None:
        until(lambda: sum(m.waiting for m in disk.members) == count, f"not {count} wait")

    waiting(9)
    clock.advance(3)
    waiting(6)
    guest.answers(3)
    (entry,) = house.daemon.execute("x-query-limits", {"device": "t0"})
    assert (entry["group"], entry["also"][0]["group"]) == (groups["t0"], groups["t1"])
    assert entry["waiting"] == 6
    in_use = "object '{}' is in use, can not be deleted"
    for name in groups.values():
        assert refused(house, "object-del", {"id": name}) == in_use.format(name)
    object_add(house, "fast", iops_total=1000)
    options = {"driver": "throttle", "node-name": strict, "throttle-group": "fast"}
    house.daemon.execute("blockdev-reopen", {"options": [options]})
    clock.advance(0.1)
    guest.answers(6)
    house.daemon.execute("object-del", {"id": "few"})
    assert refused(house, "x-disk-limit", {"device": "t0", "off": True}) == (
        "The limits of 't0' come from throttle node 't0'"
    )
    overlay = house.folder / "over.qcow2"
    house.daemon.execute(
        "blockdev-snapshot-sync",
        {"node-name": "t0", "snapshot-file": str(overlay), "snapshot-node-name": "over"},
    )
    assert len(house.daemon.graph.disk("over").turnstiles) == 2


@pytest.mark.parametrize("goodbye", [False, True])
def test_who_leaves_waits_at_none_of_several_limits(
    house: House, clock: ByHand, goodbye: bool
) -> None:
    object_add(house, "few", iops_total=1)
    object_add(house, "fewer", iops_total=1)
    nested(house, top="few", below="fewer")
    disk = house.daemon.graph.disk("t0")
    guest = house.guest("t0")
    for n in range(10):
        guest.write(n)
    assert guest.answer() == 1
    until(lambda: sum(m.waiting for m in disk.members) == 9, "not 9 wait")
    if goodbye:
        guest.send(nbd.DISC)
        guest.answers(9)
        assert guest.gone()
    guest.close()
    until(lambda: house.export_of("t0").users == 0, "the connection is still there")
    assert not any(m.waiting for m in disk.members)
    wrote = [contents(disk.root)[n * BLOCK] for n in range(10)]
    assert wrote == [n + 1 if goodbye or not n else 0 for n in range(10)]


def test_a_throttle_node_takes_another_group_live(house: House) -> None:
    object_add(house, "slow", iops_total=1)
    object_add(house, "fast", iops_total=1000)
    throttled(house, group="slow")
    house.daemon.execute(
        "block-export-add", {"type": "nbd", "id": "t0", "node-name": "t0", "writable": True}
    )
    guest = house.guest("t0")
    for n in range(10):
        guest.write(n)
    house.waiting(9, house.daemon.graph.disk("t0"))

    def reopened(group: str) -> dict[str, Any]:
        return {"options": [{"driver": "throttle", "node-name": "t0", "throttle-group": group}]}

    assert refused(house, "blockdev-reopen", reopened("none")) == (
        "Throttle group 'none' does not exist"
    )
    other = {"file": "somewhere"}
    assert (
        refused(
            house, "blockdev-reopen", {"options": [{**reopened("fast")["options"][0], **other}]}
        )
        == "the 'file' of throttle node 't0' cannot be replaced"
    )
    house.daemon.execute("blockdev-reopen", reopened("fast"))
    guest.answers(10)
    assert (
        refused(
            house,
            "blockdev-reopen",
            {"options": [{**reopened("slow")["options"][0], "read-only": True}]},
        )
        == "'t0' is in use by a writable export"
    )
    assert house.daemon.graph.node("t0").throttle_group == "fast"
    house.daemon.execute("object-del", {"id": "slow"})
    assert refused(house, "object-del", {"id": "fast"}) == (
        "object 'fast' is in use, can not be deleted"
    )


def test_a_throttle_node_goes_with_all_that_it_is_made_of(house: House) -> None:
    object_add(house, "tg", bps_total=1000)
    before = set(house.daemon.graph.nodes)
    throttled(house)
    assert refused(house, "object-del", {"id": "tg"}).startswith("object 'tg' is in use")
    house.daemon.execute("blockdev-del", {"node-name": "t0"})
    assert set(house.daemon.graph.nodes) == before
    house.daemon.execute("object-del", {"id": "tg"})
    assert refused(house, "object-del", {"id": "tg"}) == "object 'tg' not found"


def test_a_disk_is_one_whether_the_filter_or_the_node_below_is_named(house: House) -> None:
    """Two gates over one image, and a stream would undo what a guest writes, a backup miss it."""
    object_add(house, "tg", bps_total=10**9)
    throttled(house, node_name="below")
    graph = house.daemon.graph
    disk = graph.disk("below")
    assert disk is graph.disk("t0") and disk.limits is not None
    house.daemon.execute(
        "block-export-add", {"type": "nbd", "id": "e", "node-name": "below", "writable": True}
    )
    assert graph.exported(graph.node("t0"))
    assert refused(house, "blockdev-del", {"node-name": "t0"}) == "Block device t0 is in use"
    house.daemon.execute("block-export-del", {"id": "e"})
    house.daemon.execute("blockdev-del", {"node-name": "t0"})


def test_a_filter_is_not_laid_over_a_disk_that_somebody_uses(house: House) -> None:
    object_add(house, "tg", bps_total=10**9)
    path = house.folder / "a.qcow2"
    opening.create_image(str(path), "qcow2", SIZE, {})
    file = {"driver": "file", "filename": str(path)}
    below = {"driver": "qcow2", "node-name": "below", "file": file}
    house.daemon.execute("blockdev-add", below)
    graph, found = house.daemon.graph, memoryview(bytearray(BLOCK))
    graph.disk("below").pread(found, 0)  # it has leases now
    above = {"driver": "throttle", "node-name": "t", "throttle-group": "tg", "file": "below"}
    house.daemon.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "below"})
    assert refused(house, "blockdev-add", above) == (
        "Node 'below' is in use: it is a disk of its own, or exported"
    )
    house.daemon.execute("block-export-del", {"id": "e"})
    house.daemon.execute("blockdev-add", above)
    graph.disk("t").pwrite(memoryview(b"x" * BLOCK), 0)
    house.daemon.execute("blockdev-del", {"node-name": "t"})
    graph.disk("below").pread(found, 0)
    assert found == b"x" * BLOCK, "and not where it was before"


def test_a_snapshot_over_a_throttle_node_keeps_its_limits_and_records_the_image(
    house: House,
) -> None:
    object_add(house, "tg", bps_total=1000)
    throttled(house)
    overlay = house.folder / "over.qcow2"
    house.daemon.execute(
        "blockdev-snapshot-sync",
        {"node-name": "t0", "snapshot-file": str(overlay), "snapshot-node-name": "over"},
    )
    disk = house.daemon.graph.disk("over")
    assert disk.limits is not None and disk.limits.group.name == "tg"
    assert disk.root.backing_spec == (str(house.folder / "t0.raw"), "raw")


def test_a_limit_is_an_error_where_no_guests_request_comes(house: House) -> None:
    object_add(house, "tg", bps_total=1000)
    throttled(house)
    hidden = "A throttle node cannot be the 'file' of a '{}' node: it limits the disk over it"
    for driver in ("raw", "qcow2"):
        text = refused(
            house, "blockdev-add", {"driver": driver, "node-name": "above", "file": "t0"}
        )
        assert text.startswith(hidden.format(driver))
    empty = house.folder / "empty.qcow2"
    house.daemon.execute(
        "blockdev-create",
        {"job-id": "c", "options": {"driver": "qcow2", "filename": str(empty), "size": SIZE}},
    )
    house.told.wait("JOB_STATUS_CHANGE", id="c", status="concluded")
    text = refused(
        house, "blockdev-add",
        {"driver": "qcow2", "node-name": "above", "backing": "t0",
         "file": {"driver": "file", "filename": str(empty)}},
    )  # fmt: skip
    assert text.startswith("A throttle node cannot be the 'backing' of a 'qcow2' node")
    assert (
        refused(
            house,
            "blockdev-mirror",
            {"device": "vm", "target": "t0", "sync": "full", "job-id": "j"},
        )
        == "Filters cannot be used as targets"
    )
    assert refused(house, "blockdev-snapshot", {"node": "vm", "overlay": "t0"}) == (
        "Filters cannot be used as overlays"
    )
    below = house.disk.root.file
    assert below is not None
    one = {**NO_LIMITS, "iops": 1}
    assert refused(house, "block_set_io_throttle", {"device": below.name, **one}) == (
        f"Image '{below.filename}' lies below '{house.disk.name}': no guest "
        "sends requests to it directly"
    )
    plain = house.folder / "plain.raw"
    plain.write_bytes(bytes(SIZE))
    house.daemon.execute(
        "blockdev-add", {"driver": "file", "node-name": "plain", "filename": str(plain)}
    )
    assert refused(house, "block_set_io_throttle", {"device": "plain", **one}) == (
        "Node 'plain' is not exported: no guest sends requests to it"
    )
    house.daemon.execute("block-export-add", {"type": "nbd", "id": "p", "node-name": "plain"})
    house.limit("plain", iops=1)


def test_what_is_no_limit_or_names_nobody_is_an_error(house: House) -> None:
    read_only = house.folder / "ro.raw"
    read_only.write_bytes(bytes(SIZE))
    house.daemon.open_disk("ro", str(read_only), read_only=True)
    one = {**NO_LIMITS, "iops": 1}
    table: list[tuple[str, dict[str, Any], str]] = [
        ("block_set_io_throttle", {"device": "vm"}, "Parameter 'bps' is missing"),
        ("block_set_io_throttle", {**one}, "Need exactly one of 'device' and 'id'"),
        ("block_set_io_throttle", {**one, "device": "nope"}, "Device 'nope' not found"),
        ("block_set_io_throttle", {**one, "device": "vm", "iops": "5"},
         "Invalid parameter type for 'iops', expected: integer"),
        ("block_set_io_throttle", {**one, "device": "vm", "group": ""},
         "Parameter 'group' expects a name"),
        ("block_set_io_throttle", {**one, "device": "vm", "bps_max": 5},
         "bps_max/iops_max require corresponding bps/iops values"),
        ("block_set_io_throttle", {**NO_LIMITS, "device": "ro", "bps_wr": 5},
         "Disk 'ro' is read-only: a limit for its writes has no effect"),
        ("x-disk-limit", {"device": "vm"}, "no limit was given for 'vm'"),
        ("x-disk-limit", {"device": "vm", "group": "nope"},
         "Throttle group 'nope' does not exist"),
        ("x-disk-limit", {"device": "vm", "off": True, "bps": 5},
         "'off' takes all limits away, and goes with no other limit"),
        ("x-disk-limit", {"device": "vm", "bps_foo": 5}, "Parameter 'bps_foo' is unexpected"),
        ("object-add", {"qom-type": "iothread", "id": "x", "limits": {"bps-total": 1}},
         "Parameter 'limits' is unexpected"),
        ("object-add", {"qom-type": "throttle-group", "id": "9"},
         "Parameter 'id' expects an identifier"),
        ("object-add", {"qom-type": "throttle-group", "id": "x", "limits": {"bps-foo": 1}},
         "Parameter 'limits.bps-foo' is unexpected"),
        ("object-add", {"qom-type": "throttle-group", "id": "x", "limits": {"bps-read": 1},
                        "x-bps-read": 2},
         "Parameters 'limits.bps-read' and 'x-bps-read' differ"),
        ("object-add", {"qom-type": "throttle-group", "id": "tg"},
         "attempt to add duplicate property 'tg' to object (type 'container')"),
        ("qom-set", {"path": "tg", "property": "limits", "value": 5},
         "Invalid parameter type for 'limits', expected: object"),
        ("qom-set", {"path": "tg", "property": "limits", "value": {"bps-foo": 1}},
         "Parameter 'limits.bps-foo' is unexpected"),
        ("qom-set", {"path": "tg", "property": "limits", "value": {"bps-read": 1}},
         "bps/iops/max total values and read/write values cannot be used at the same time"),
        ("qom-set", {"path": "tg", "property": "x-bps-total", "value": 1},
         "Property cannot be set after initialization"),
        ("qom-get", {"path": "tg", "property": "nope"},
         "Property 'throttle-group.nope' not found"),
        ("qom-get", {"path": "/objects/nope", "property": "limits"},
         "Device '/objects/nope' not found"),
        ("blockdev-add", {"driver": "throttle", "node-name": "n", "throttle-group": "nope",
                          "file": {"driver": "file", "filename": str(read_only)}},
         "Throttle group 'nope' does not exist"),
        ("blockdev-add", {"driver": "throttle", "node-name": "n",
                          "file": {"driver": "file", "filename": str(read_only)}},
         "Parameter 'throttle-group' is missing"),
        ("blockdev-add", {"driver": "throttle", "node-name": "n", "throttle-group": "tg"},
         "A block device must be specified for 'file'"),
    ]  # fmt: skip
    object_add(house, "tg", bps_total=1000)
    for command, arguments, text in table:
        assert refused(house, command, arguments) == text, (command, arguments)
    with pytest.raises(DeviceNotFound):
        house.daemon.execute("block_set_io_throttle", {**one, "device": "nope"})
    assert house.disk.limits is None
    limits_now = house.daemon.execute("qom-get", {"path": "/objects/tg", "property": "limits"})
    assert limits_now["bps-total"] == 1000 and limits_now["bps-read"] == 0


def test_the_limits_of_a_throttle_node_are_changed_by_its_group(house: House) -> None:
    object_add(house, "tg", bps_total=1000)
    throttled(house, "another")
    throttled(house)
    house.daemon.execute("block-export-add", {"type": "nbd", "id": "t", "node-name": "t0"})
    text = "The limits of 't0' come from throttle node 't0'"
    assert refused(house, "block_set_io_throttle", {"device": "t0", **NO_LIMITS}) == text
    assert (
        refused(
            house,
            "block_set_io_throttle",
            {"device": "t0", **NO_LIMITS, "bps": 1, "group": "other"},
        )
        == text
    )
    house.limit("t0", bps=77)
    value = house.daemon.execute("qom-get", {"path": "tg", "property": "x-bps-total"})
    assert value == 77


def test_a_group_made_by_a_limit_goes_with_its_last_disk(house: House) -> None:
    house.add("other")
    house.limit(iops=5, group="g")
    house.daemon.execute("x-disk-limit", {"device": "other", "group": "g"})
    assert (
        refused(house, "object-add", {"qom-type": "throttle-group", "id": "g"})
        == "A group with this name already exists"
    )
    house.limit("other")
    house.limit()
    object_add(house, "g")
    listed = house.daemon.execute("qom-list", {"path": "/objects"})
    assert {"name": "g", "type": "child<throttle-group>"} in listed


def test_every_number_is_told_as_it_was_given(house: House) -> None:
    given = {
        "bps_rd": 1000, "bps_rd_max": 5000, "bps_rd_max_length": 3, "bps_wr": 7,
        "iops": 9, "iops_max": 11, "iops_size": 4096,
    }  # fmt: skip
    house.limit(group="g", **given)
    (block,) = house.daemon.execute("query-block", {})
    nodes = house.daemon.execute("query-named-block-nodes", {"flat": True})
    (root,) = [n for n in nodes if n["node-name"] == house.disk.root.name]
    wanted = {**NO_LIMITS, **given, "iops_max_length": 1, "group": "g"}
    for shown in (block["inserted"], root):
        told = {k: v for k, v in shown.items() if k[:3] in ("bps", "iop") or k == "group"}
        assert told == wanted
    text = house.daemon.human("info block")
    assert "I/O throttling:   bps=0 bps_rd=1000 bps_wr=7 bps_max=0 bps_rd_max=5000" in text
    assert text.rstrip().endswith("iops_size=4096 group=g")
    house.daemon.human("block_set_io_throttle vm 1M 0 0 0 0 0")
    (entry,) = house.daemon.execute("x-query-limits", {})
    assert entry == {
        "device": "vm", "group": "g", "with": [], "waiting": 0, "limits": {"bps": 1 << 20},
    }  # fmt: skip


ON_FILTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("block-stream", {}),
    "commit": ("block-commit", {"top": "sn1.qcow2"}),
    "active commit": ("block-commit", {}),
    "copy": ("drive-mirror", {"target": "copy.qcow2", "format": "qcow2", "sync": "full"}),
    "shallow copy": ("drive-mirror", {"target": "copy.qcow2", "format": "qcow2", "sync": "top"}),
    "backup": ("drive-backup", {"target": "copy.qcow2", "format": "qcow2", "sync": "full"}),
}


@pytest.mark.parametrize("name", ON_FILTERS)
def test_operations_on_a_disk_over_a_throttle_node(house: House, name: str) -> None:
    """To all of them it is the node below: no header and no record speaks of a throttle."""
    folder = house.folder / "x"
    folder.mkdir()
    oracle = chain_of_disks(folder, LAYERS, SIZE)
    object_add(house, "tg", bps_total=10**12)
    file = {"driver": "file", "filename": str(folder / LAYERS[-1])}
    house.daemon.execute(
        "blockdev-add",
        {"driver": "throttle", "node-name": "t0", "throttle-group": "tg",
         "file": {"driver": "qcow2", "file": file}},
    )  # fmt: skip
    house.daemon.execute(
        "block-export-add", {"type": "nbd", "id": "t0", "node-name": "t0", "writable": True}
    )
    disk = house.daemon.graph.disk("t0")
    disk.pwrite(memoryview(b"new" * 1000), 100_000)
    oracle[100_000:103_000] = b"new" * 1000
    command, arguments = ON_FILTERS[name]
    paths = {k: str(folder / v) for k, v in arguments.items() if k in ("top", "target")}
    house.daemon.execute(command, {"device": "t0", "job-id": "j", **arguments, **paths})
    if name in ("active commit", "copy", "shallow copy"):
        house.told.wait("BLOCK_JOB_READY", device="j")
        house.daemon.execute("job-complete", {"id": "j"})
    assert "error" not in house.told.wait("BLOCK_JOB_COMPLETED", device="j")
    assert not differs(contents(disk), oracle)
    assert disk.limits is not None and disk.limits.group.name == "tg"
    house.daemon.close()
    for image in folder.iterdir():
        if image.suffix != ".raw":
            assert b"throttle" not in image.read_bytes()[:65536], image.name
    now, format = opening.current_image(str(folder / LAYERS[-1]), "qcow2")
    node = opening.open_image(now, format)
    assert not differs(contents(node), oracle)
    opening.close_chain(node)


def bursting(house: House, way: str) -> None:
    """Set the same limits once more, in one of the ways that there are."""
    given = {"device": "vm", "iops": 1, "iops_max": 20}
    execute = house.daemon.execute
    if way == "block_set_io_throttle":
        house.limit(iops=1, iops_max=20)
    elif way == "x-disk-limit":
        execute("x-disk-limit", given)
    elif way == "another limit":
        execute("x-disk-limit", {"device": "vm", "bps": 10**9})
    elif way == "another group":
        execute("x-disk-limit", given | {"group": "other"})
        execute("x-disk-limit", given | {"group": "vm"})
    elif way == "qom-set":
        value = {"iops-total": 1, "iops-total-max": 20}
        execute("qom-set", {"path": "owned", "property": "limits", "value": value})
    elif way == "human":
        assert not house.daemon.human("block_set_io_throttle vm 0 0 0 1 0 0")
        house.limit(iops=1, iops_max=20)


@pytest.mark.parametrize(
    "way",
    ["block_set_io_throttle", "x-disk-limit", "another limit", "another group", "qom-set", "human"],
)
def test_the_same_limits_again_refill_no_burst(house: House, way: str) -> None:
    group = {}
    if way == "qom-set":
        object_add(house, "owned", iops_total=1, iops_total_max=20)
        group = {"group": "owned"}
    house.limit(iops=1, iops_max=20, **group)
    guest = house.guest()
    for n in range(60):
        guest.write(n)
    house.waiting(39)  # twenty, and the one that fills the bucket
    for _ in range(5):
        bursting(house, way)
        member = house.disk.limits
        assert member is not None
        assert member.waiting >= 39 - 10  # a bucket that is just full lets one pass
    house.limit()
    guest.answers(60)


def test_limits_taken_away_and_set_again_refill_no_burst(house: House) -> None:
    for _ in range(3):
        house.limit(iops=1, iops_max=20)
        guest = house.guest()
        for n in range(40):
            guest.write(n)
        until(lambda: house.disk.limits is not None and house.disk.limits.waiting > 0, "none waits")
        house.clock.advance(0)
        member = house.disk.limits
        assert member is not None
        until(lambda member=member: member.waiting >= 19, "they wait")  # type: ignore[misc]
        house.limit()
        guest.answers(40)
        guest.close()
        house.limit(iops=1, iops_max=20)
        member = house.disk.limits
        assert member is not None and not member.admit(1, 4096)
        house.limit()
