"""Limits on disks that guests use: what waits is in nobody's way, and never done twice or torn."""

from __future__ import annotations

import errno
import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import chain_of_disks, contents, differs
from cowferry.block import limits
from cowferry.block.disk import Disk
from cowferry.daemon import Daemon
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError, DeviceNotFound
from cowferry.exports.nbd import NbdExport
from cowferry.exports.nbd_lane import PENDING
from cowferry.wire import nbd
from daemons import PATIENCE, Told
from timers import ByHand

SIZE = 4 << 20
BLOCK = 4096
LAYERS = ["base.raw", "sn1.qcow2", "vm.qcow2"]
NO_LIMITS = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}


def until(ready: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.001)


class Guest:
    """An NBD client that sends without waiting for the answers."""

    def __init__(self, path: Path, name: str = "vm") -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.settimeout(PATIENCE)
        self._receive(18)
        self.sock.sendall(struct.pack(">I", 3))
        wanted = name.encode()
        self.sock.sendall(nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, len(wanted)) + wanted)
        self._receive(10)
        self.sent = 0
        self.held: bytearray | None = None

    def _receive(self, length: int) -> bytes:
        out = b""
        while len(out) < length:
            part = self.sock.recv(length - len(out))
            if not part:
                raise EOFError
            out += part
        return out

    def send(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> int:
        """The request's cookie; cookies count from 1."""
        self.sent += 1
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, kind, self.sent, offset, length)
        if self.held is None:
            self.sock.sendall(head + data)
        else:
            self.held += head + data
        return self.sent

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is sent meanwhile goes out together: a socket takes few small pieces."""
        self.held = bytearray()
        yield
        self.sock.sendall(self.held)
        self.held = None

    def write(self, number: int, length: int = BLOCK) -> int:
        """Write the block of that number full of it."""
        return self.send(nbd.WRITE, number * BLOCK, length, bytes([number % 251 + 1]) * length)

    def read(self, number: int, length: int = BLOCK) -> int:
        return self.send(nbd.READ, number * BLOCK, length)

    def answer(self, length: int = 0) -> int:
        """The cookie of the next answer, which is no error and brings `length` bytes."""
        magic, code, cookie = nbd.SIMPLE.unpack(self._receive(16))
        assert (magic, code) == (nbd.SIMPLE_MAGIC, 0)
        self._receive(length)
        return int(cookie)

    def answers(self, count: int, length: int = 0) -> list[int]:
        return [self.answer(length) for _ in range(count)]

    def gone(self) -> bool:
        """Whether the server has hung up."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()


class House:
    """A daemon in this process whose disk `vm` stands on two layers, and is exported."""

    def __init__(self, folder: Path, daemon: Daemon, clock: ByHand) -> None:
        self.folder = folder
        self.daemon = daemon
        self.clock = clock
        self.told = Told(daemon)
        self.oracle = chain_of_disks(folder, LAYERS, SIZE)
        daemon.start_nbd({"type": "unix", "path": str(folder / "nbd")})
        self.disk = daemon.open_disk("vm", str(folder / LAYERS[-1]))
        self.export = daemon.add_export(self.disk, "vm")

    def guest(self, name: str = "vm") -> Guest:
        return Guest(self.folder / "nbd", name)

    def limit(self, device: str = "vm", /, **given: Any) -> None:
        self.daemon.execute("block_set_io_throttle", {"device": device, **NO_LIMITS, **given})

    def add(self, name: str) -> Disk:
        """One more disk, raw and empty, exported."""
        path = self.folder / f"{name}.raw"
        path.write_bytes(bytes(SIZE))
        disk = self.daemon.open_disk(name, str(path))
        self.daemon.add_export(disk, name)
        return disk

    def waiting(self, count: int, disk: Disk | None = None) -> None:
        """Until so many requests wait for their turn."""
        member = (disk or self.disk).limits
        assert member is not None
        until(lambda: member.waiting == count, f"{member.waiting} wait, not {count}")

    def wrote(self, *numbers: int) -> None:
        for n in numbers:
            self.oracle[n * BLOCK : (n + 1) * BLOCK] = bytes([n % 251 + 1]) * BLOCK

    def check(self) -> None:
        assert not differs(contents(self.disk.root), self.oracle)

    def export_of(self, name: str) -> NbdExport:
        found = self.daemon.exports[name]
        assert isinstance(found, NbdExport)
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ByHand:
    by_hand = ByHand()
    monkeypatch.setattr(limits, "TIMER", by_hand)
    return by_hand


@contextmanager
def a_house(folder: Path, clock: ByHand) -> Iterator[House]:
    daemon = Daemon()
    try:
        yield House(folder, daemon, clock)
    finally:
        daemon.close()


@pytest.fixture
def house(tmp_path: Path, clock: ByHand) -> Iterator[House]:
    with a_house(tmp_path, clock) as house:
        yield house


# What waits is in nobody's way ---------------------------------------------------------------


def test_D2_a_drain_does_not_wait_for_requests_that_wait_for_their_turn(house: House) -> None:
    house.limit(iops=1)
    guest = house.guest()
    for n in range(20):
        guest.write(n)
    assert guest.answer() == 1
    house.waiting(19)
    drained = threading.Event()

    def drain() -> None:
        with house.disk.exclusive():
            drained.set()

    threading.Thread(target=drain, daemon=True).start()
    assert drained.wait(PATIENCE)
    house.wrote(0)
    house.check()
    house.clock.advance(19)
    assert sorted(guest.answers(19)) == list(range(2, 21))
    house.wrote(*range(20))
    house.check()


def test_requests_that_wait_hold_no_thread(house: House) -> None:
    house.limit(iops=1)
    guest = house.guest()
    guest.read(0)
    guest.answer(BLOCK)
    before = threading.active_count()
    for n in range(PENDING - 4):
        guest.read(n)
    house.waiting(PENDING - 4)
    assert threading.active_count() == before
    # Whatever is no reading or writing is answered meanwhile, on this very connection, too.
    assert guest.send(nbd.FLUSH) == guest.answer()
    other = house.guest()
    assert other.send(nbd.FLUSH) == other.answer()
    house.clock.advance(PENDING - 4)
    assert len(guest.answers(PENDING - 4, BLOCK)) == PENDING - 4


def test_a_disk_that_waits_keeps_no_other_from_anything(house: House) -> None:
    house.add("free")
    house.limit(iops=1)
    slow, free = house.guest(), house.guest("free")
    with slow.at_once():
        for n in range(3 * PENDING):  # more than may be in work: the reader itself waits
            slow.read(n)
    house.waiting(PENDING)
    for n in range(100):
        free.write(n)
        free.read(n)
        assert sorted((free.answer(), free.answer(BLOCK))) == [2 * n + 1, 2 * n + 2]


def test_writes_that_are_limited_leave_reads_alone(house: House) -> None:
    house.limit(bps_wr=1)
    guest = house.guest()
    for n in range(10):
        guest.write(n)
    assert guest.answer() == 1
    assert guest.read(5) == guest.answer(BLOCK)


def test_a_request_that_is_admitted_at_once_needs_no_worker(house: House) -> None:
    house.limit(iops_rd=10**6, bps=10**9)
    guest = house.guest()
    guest.read(0)
    guest.answer(BLOCK)  # leased now
    had = len(house.export.workers._threads)
    for _ in range(200):
        guest.read(0)
    guest.answers(200, BLOCK)
    assert len(house.export.workers._threads) == had


def test_a_request_pays_once_whoever_serves_it(house: House) -> None:
    """Each of these goes to a worker after it has been admitted; and to another, if it waited."""
    house.limit(iops=1)
    large = 512 << 10
    kinds = (
        (nbd.READ, large), (nbd.WRITE, large), (nbd.CACHE, large), (nbd.TRIM, BLOCK),
        (nbd.WRITE_ZEROES, BLOCK),
    )  # fmt: skip
    guest = house.guest()
    for kind, length in kinds:
        for waits in (False, True):
            data = bytes(length) if kind == nbd.WRITE else b""
            cookie = guest.send(kind, 0, length, data)
            if waits:
                house.waiting(1)
                house.clock.advance(1)
            assert guest.answer(length if kind == nbd.READ else 0) == cookie
        house.clock.advance(2)
    with NbdClient(f"nbd+unix:///vm?socket={house.folder / 'nbd'}") as client:
        assert client.structured and client.pread(large, 0) == contents(house.disk.root)[:large]


def test_an_unlimited_disk_has_no_turnstile(house: House) -> None:
    assert house.disk.turnstiles == ()
    house.limit(iops=1)
    assert len(house.disk.turnstiles) == 1
    house.limit()
    assert house.disk.turnstiles == () and house.disk.limits is None


def test_what_is_refused_costs_nothing(house: House) -> None:
    house.limit(iops=1)
    guest = house.guest()
    for _ in range(20):
        guest.send(nbd.READ, SIZE, BLOCK)
        guest.send(nbd.WRITE_ZEROES, SIZE, BLOCK)
        guest.send(nbd.TRIM, SIZE - 1, BLOCK)
    for _ in range(60):
        _, code, _ = nbd.SIMPLE.unpack(guest._receive(16))
        assert code
    guest.read(0)
    assert guest.answer(BLOCK) == guest.sent


def test_zeroing_and_trimming_wait_as_operations(house: House) -> None:
    house.limit(iops_wr=1)
    guest = house.guest()
    guest.write(0)
    guest.answer()
    guest.send(nbd.WRITE_ZEROES, 0, 1 << 20)
    guest.send(nbd.TRIM, 1 << 20, 1 << 20)
    house.waiting(2)
    house.clock.advance(2)
    assert sorted(guest.answers(2)) == [2, 3]
    house.oracle[: 1 << 20] = bytes(1 << 20)
    assert contents(house.disk.root)[: 1 << 20] == house.oracle[: 1 << 20]


def test_one_who_uses_the_disk_in_this_process_waits_too(house: House) -> None:
    house.limit(iops=1)
    house.disk.pwrite(memoryview(b"\1" * BLOCK), 0)
    done = threading.Event()

    def write() -> None:
        house.disk.pwrite(memoryview(b"\2" * BLOCK), BLOCK)
        done.set()

    threading.Thread(target=write, daemon=True).start()
    house.waiting(1)
    assert not done.is_set()
    house.wrote(0)
    house.check()
    house.clock.advance(1)
    assert done.wait(PATIENCE)
    house.wrote(1)
    house.check()


def test_one_who_waits_in_this_process_is_told_that_the_disk_is_closed(house: House) -> None:
    """And does not write by leases whose descriptors are other files by then."""
    house.limit(iops=1)
    house.disk.pwrite(memoryview(b"\1" * BLOCK), 0)
    errors: list[int | None] = []

    def write() -> None:
        with pytest.raises(OSError) as error:
            house.disk.pwrite(memoryview(b"\2" * BLOCK), BLOCK)
        errors.append(error.value.errno)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    house.waiting(1)
    house.daemon.remove_disk("vm")
    thread.join(PATIENCE)
    assert errors == [errno.ESHUTDOWN]


# Those who leave ----------------------------------------------------------------------------


def test_what_a_client_that_is_gone_had_waiting_is_never_done(house: House) -> None:
    house.limit(iops=1, group="g")
    other = house.add("other")
    house.limit("other", iops=1, group="g")
    guest, neighbour = house.guest(), house.guest("other")
    for n in range(10):
        guest.write(n)
    assert guest.answer() == 1
    house.waiting(9)
    neighbour.write(0)
    house.waiting(1, other)
    guest.close()
    until(lambda: house.export.users == 0, "the connection is still there")
    house.waiting(0)
    house.clock.advance(1)
    assert neighbour.answer() == 1, "and its part goes to others"
    house.clock.advance(20)
    house.wrote(0)
    house.check()


def test_a_client_that_is_gone_is_noticed_by_a_reader_that_waits(house: House) -> None:
    house.limit(iops=1)
    guest = house.guest()
    with guest.at_once():
        for n in range(3 * PENDING):
            guest.read(n)
    house.waiting(PENDING)
    guest.close()
    until(lambda: house.export.users == 0, "it waits for requests of nobody")


def test_after_a_goodbye_what_waits_is_served_at_once(house: House) -> None:
    """The protocol: the server handles all outstanding requests before it closes."""
    house.limit(iops=1)
    guest = house.guest()
    for n in range(10):
        guest.write(n)
    guest.send(nbd.DISC)
    assert sorted(guest.answers(10)) == list(range(1, 11))
    assert guest.gone()
    house.wrote(*range(10))
    house.check()


@pytest.mark.parametrize("requests", [10, 3 * PENDING])
@pytest.mark.parametrize("end", ["block-export-del", "nbd-server-stop", "x-disk-remove"])
def test_an_export_goes_while_requests_wait(house: House, end: str, requests: int) -> None:
    house.limit(iops=1)
    guest = house.guest()
    with guest.at_once():
        for n in range(requests):
            guest.write(n, 512)
    house.waiting(min(requests - 1, PENDING))
    assert guest.answer() == 1
    image = house.folder / LAYERS[-1]
    arguments: dict[str, dict[str, Any]] = {
        "block-export-del": {"id": "vm", "mode": "hard"},
        "nbd-server-stop": {},
        "x-disk-remove": {"device": "vm", "force": True},
    }
    house.daemon.execute(end, arguments[end])
    house.told.wait("BLOCK_EXPORT_DELETED", id="vm")
    assert guest.gone()
    assert image.exists()
    if end != "x-disk-remove":
        house.oracle[:512] = bytes([1]) * 512
        house.check()


def test_a_daemon_ends_while_requests_wait(tmp_path: Path, clock: ByHand) -> None:
    with a_house(tmp_path, clock) as house:
        house.limit(bps=1)
        guest = house.guest()
        with guest.at_once():
            for n in range(3 * PENDING):
                guest.write(n, 512)
        house.waiting(PENDING)
        assert guest.answer() == 1
    assert guest.gone()


# Changes while requests wait ------------------------------------------------------------------


@pytest.mark.parametrize("then", [{"iops": 1000}, {"bps": 10**9}, {}])
def test_a_limit_that_is_changed_wakes_those_who_wait(house: House, then: dict[str, int]) -> None:
    house.limit(iops=1)
    guest = house.guest()
    for n in range(20):
        guest.write(n)
    house.waiting(19)
    house.limit(**then)
    assert sorted(guest.answers(20)) == list(range(1, 21))
    house.wrote(*range(20))
    house.check()


def test_a_group_is_left_and_the_others_stay_limited(house: House) -> None:
    other = house.add("other")
    house.limit(iops=1, group="g")
    house.daemon.execute("x-disk-limit", {"device": "other", "group": "g"})
    guest, neighbour = house.guest(), house.guest("other")
    for n in range(5):
        guest.write(n)
        neighbour.write(n)
    until(lambda: house.disk.limits.waiting + other.limits.waiting == 9, "who waits")  # type: ignore[union-attr]
    house.limit()  # QEMU: the rest of its members will not be affected
    guest.answers(5)
    until(lambda: other.limits is not None and other.limits.waiting >= 4, "they wait")
    assert other.limits is not None and other.limits.group.limits == limits.Limits.of({"iops": 1})


def snapshot(house: House) -> None:
    house.daemon.execute("x-disk-snapshot", {"disks": [{"device": "vm"}]})


def ends(house: House, command: str, ready: bool, **arguments: Any) -> None:
    """A job begins, and ends."""
    house.daemon.execute(command, {"device": "vm", "job-id": "j", **arguments})
    if ready:
        house.told.wait("BLOCK_JOB_READY", device="j")
        house.daemon.execute("job-complete", {"id": "j"})
    done = house.told.wait("BLOCK_JOB_COMPLETED", device="j")
    assert "error" not in done
    house.told.wait("JOB_STATUS_CHANGE", id="j", status="null")


OPERATIONS: dict[str, Callable[[House], None]] = {
    "snapshot": snapshot,
    "stream": lambda house: ends(house, "block-stream", False),
    "commit": lambda house: ends(house, "block-commit", False, top=str(house.folder / LAYERS[1])),
    "active commit": lambda house: ends(house, "block-commit", True),
    "copy": lambda house: ends(
        house, "drive-mirror", True, target=str(house.folder / "copy.qcow2"), sync="full"
    ),
    "blocking copy": lambda house: ends(
        house, "drive-mirror", True, target=str(house.folder / "copy.raw"), format="raw",
        sync="full", **{"copy-mode": "write-blocking"},
    ),
    "resize": lambda house: house.daemon.execute("block_resize", {"device": "vm", "size": SIZE}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_disk_changes_while_requests_wait_and_its_limits_stay(house: House, name: str) -> None:
    """What waits is done afterwards, on the root that is there then, once."""
    house.limit(iops=1)
    member, old = house.disk.limits, house.disk.root
    guest = house.guest()
    for n in range(8):
        guest.write(n)
    assert guest.answer() == 1
    house.waiting(7)
    OPERATIONS[name](house)
    house.wrote(0)
    house.check()
    frozen = hashlib.sha256(Path(old.filename).read_bytes()).digest() if name == "snapshot" else b""
    assert house.disk.limits is member and member is not None and member.waiting == 7
    assert (house.disk.root is old) == (name in ("stream", "commit", "resize"))
    house.clock.advance(7)
    assert sorted(guest.answers(7)) == list(range(2, 9))
    house.wrote(*range(8))
    house.check()
    if frozen:  # S2
        assert hashlib.sha256(Path(old.filename).read_bytes()).digest() == frozen
    (shown,) = house.daemon.execute("query-block", {})
    assert shown["inserted"]["iops"] == 1 and shown["inserted"]["group"] == "vm"


# Groups, as objects and by name ----------------------------------------------------------------


def refused(house: House, command: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(CowferryError) as error:
        house.daemon.execute(command, arguments)
    return error.value.desc


def throttled(house: House, name: str = "t0", group: str = "tg", **file: Any) -> None:
    """A throttle node over a raw file `NAME.raw`."""
    path = house.folder / f"{name}.raw"
    path.write_bytes(bytes(SIZE))
    below = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}, **file}
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
    house.daemon.execute("blockdev-reopen", reopened("fast"))
    guest.answers(10)
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
    text = refused(
        house, "blockdev-add",
        {"driver": "throttle", "node-name": "above", "throttle-group": "tg", "file": "t0"},
    )  # fmt: skip
    assert text.startswith(hidden.format("throttle"))
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
        f"Node '{below.name}' lies below '{house.disk.root.name}': no guest's request comes to it"
    )
    plain = house.folder / "plain.raw"
    plain.write_bytes(bytes(SIZE))
    house.daemon.execute(
        "blockdev-add", {"driver": "file", "node-name": "plain", "filename": str(plain)}
    )
    assert refused(house, "block_set_io_throttle", {"device": "plain", **one}) == (
        "Node 'plain' is not exported: no guest's request comes to it"
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
