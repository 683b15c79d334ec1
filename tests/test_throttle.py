"""Limits on disks that guests use: what waits is in nobody's way, and never done twice or torn."""

from __future__ import annotations

import errno
import hashlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs
from cowferry.block import limits
from cowferry.block.throttle import LONGEST, Brake
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.exports.nbd import WORKERS
from cowferry.exports.nbd_lane import PENDING, Connection
from cowferry.wire import nbd
from daemons import PATIENCE
from limited import BLOCK, LAYERS, SIZE, House, a_house, until
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
    assert PENDING - 4 > WORKERS, "or there would be threads to spare"
    for n in range(PENDING - 4):
        guest.read(n)
    house.waiting(PENDING - 4)
    # Whatever is no reading or writing is answered meanwhile, on this very connection, too.
    assert guest.send(nbd.FLUSH) == guest.answer()
    other = house.guest()
    assert other.send(nbd.FLUSH) == other.answer()
    house.clock.advance(PENDING - 4)
    assert len(guest.answers(PENDING - 4, BLOCK)) == PENDING - 4


def test_writes_that_are_braked_hold_no_thread_either(house: House) -> None:
    guest = house.guest()
    guest.write(0)
    guest.answer()
    guest.send(nbd.FLUSH)
    guest.answer()
    house.disk.brake = Brake(1, lambda: house.clock.now, house.clock)
    assert WORKERS < 20, "or there would be threads to spare"
    for n in range(20):
        guest.write(n)
    assert guest.send(nbd.FLUSH) == guest.answer()
    assert guest.read(30) == guest.answer(BLOCK)
    house.clock.advance(LONGEST)
    assert len(guest.answers(20)) == 20
    house.disk.brake = None
    assert house.disk.turnstiles == ()
    house.wrote(*range(20))
    house.check()


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


def test_an_answer_that_comes_while_the_client_hangs_up_is_waited_for_by_nobody(
    house: House,
) -> None:
    """The reader finds out in the middle of sending. What a worker could not send meanwhile, for
    the reader was sending, is dropped by the reader; or the connection would never end."""
    workers, sending = ThreadPoolExecutor(1), threading.Event()
    workers.submit(sending.wait)

    class Leaving(socket.socket):
        def sendall(self, *_: Any) -> None:
            sending.set()
            workers.submit(int).result(PATIENCE)  # so the flush has been answered
            assert connection.queue
            raise BrokenPipeError

    ours, theirs = socket.socketpair()
    leaving = Leaving(fileno=ours.detach())
    connection = Connection(leaving, house.disk, True, False, [], workers, workers)
    house.disk.pread(memoryview(bytearray(BLOCK)), 0)  # leased now: the reader answers by itself
    requests = [(nbd.READ, BLOCK), (nbd.FLUSH, 0)]
    head = nbd.REQUEST.pack
    theirs.sendall(b"".join(head(nbd.REQUEST_MAGIC, 0, kind, 1, 0, n) for kind, n in requests))
    reader = threading.Thread(target=connection.run, daemon=True)
    reader.start()
    reader.join(PATIENCE)
    assert not reader.is_alive() and not connection.pending
    connection.close()
    for s in (leaving, theirs):
        s.close()
    workers.shutdown()


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
    done = [1, *guest.rest()]  # what was sent is served at once, and answered
    assert sorted(done) == list(range(1, len(done) + 1))
    assert len(done) >= min(requests, PENDING)
    for n in done:
        house.oracle[(n - 1) * BLOCK : (n - 1) * BLOCK + 512] = bytes([(n - 1) % 251 + 1]) * 512
    if end != "x-disk-remove":
        assert image.exists()
        house.check()
        return
    node = opening.open_image(str(image), read_only=True)
    assert not differs(contents(node), house.oracle)
    opening.close_chain(node)


def test_a_daemon_ends_while_requests_wait(tmp_path: Path, clock: ByHand) -> None:
    with a_house(tmp_path, clock) as house:
        house.limit(bps=1)
        guest = house.guest()
        with guest.at_once():
            for n in range(3 * PENDING):
                guest.write(n, 512)
        house.waiting(PENDING)
        assert guest.answer() == 1
    assert len(guest.rest()) >= PENDING  # what was sent is served at once, and answered


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


def test_another_medium_is_limited_as_the_last_one_was(house: House) -> None:
    house.limit(iops=1)
    guest = house.guest()
    for n in range(5):
        guest.write(n)
    assert guest.answer() == 1
    house.waiting(4)
    medium = house.folder / "medium.raw"
    medium.write_bytes(bytes(SIZE))
    house.daemon.execute("change", {"device": "vm", "target": str(medium)})
    house.waiting(4)
    house.clock.advance(4)
    guest.answers(4)
    house.oracle = bytearray(SIZE)
    house.wrote(1, 2, 3, 4)
    house.check()


def test_every_request_is_answered_once_however_often_limits_change(tmp_path: Path) -> None:
    """With the process's own timer: rates, groups and none at all, while three guests write."""
    with a_house(tmp_path, ByHand()) as house:
        names = ["vm", "a", "b"]
        for name in names[1:]:
            house.add(name)
        over = threading.Event()
        heard: dict[str, list[int]] = {}

        def guest_of(name: str) -> None:
            guest = house.guest(name)
            mine = heard.setdefault(name, [])
            for n in range(1500):
                guest.write(n % 1000)
                if n >= 32:
                    mine.append(guest.answer())
            mine.extend(guest.answers(32))

        def flip() -> None:
            chance = random.Random(3)
            while not over.is_set():
                rates = chance.choice([{}, {"iops": 2000}, {"bps_wr": 10**7}, {"iops_wr": 10**4}])
                group = {"group": chance.choice("gh")} if rates and chance.random() < 0.7 else {}
                house.limit(chance.choice(names), **rates, **group)

        guests = [threading.Thread(target=guest_of, args=(n,), daemon=True) for n in names]
        flipper = threading.Thread(target=flip, daemon=True)
        for thread in (*guests, flipper):
            thread.start()
        for thread in guests:
            thread.join(PATIENCE)
        over.set()
        flipper.join(PATIENCE)
        for name in names:
            assert sorted(heard[name]) == list(range(1, 1501)), name
        house.wrote(*range(1000))
        house.check()
