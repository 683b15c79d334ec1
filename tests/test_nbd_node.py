"""The nbd node: its bytes against a model over every peer, and what it does when a server fails.

What is said to whom is in drivers/nbd.py; what a hostile server may do is in test_nbd_hostile.py.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base
from cowferry.block.copy import Copier, Kind, Span
from cowferry.block.disk import Disk
from cowferry.block.node import Extent, State
from cowferry.drivers import nbd as driver
from cowferry.drivers import nbd_link, opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from cowferry.exports.nbd import NbdExport, NbdServer
from cowferry.jobs.job import Jobs
from cowferry.jobs.mirror import Mirror
from cowferry.wire import nbd
from daemons import PATIENCE
from nbd_servers import (
    EVERYTHING,
    Forgetful,
    bytes_of,
    empty,
    nbdkit,
    node_of,
    qemu_nbd,
    until,
    uri,
    view,
)
from tests_support import need

SIZE = 4 << 20


@contextmanager
def ours(path: Path, folder: Path) -> Iterator[None]:
    """Our own server over a raw image."""
    disk = Disk(opening.open_image(str(empty(folder / "ours.raw"))), "d")
    server = NbdServer()
    server.add(NbdExport("", disk, default=True))
    server.listen_unix(str(path))
    try:
        yield
    finally:
        server.stop()
        disk.root.close()


PEERS: dict[str, Callable[[Path, Path], Any]] = {
    "qemu-nbd": lambda path, folder: qemu_nbd(path, empty(folder / "disk.raw")),
    "ours": ours,
    "nbdkit": lambda path, folder: nbdkit(path, "memory", str(SIZE)),
    "without zeroing": lambda path, folder: nbdkit(path, "--filter=nozero", "memory", str(SIZE)),
    "without runs": lambda path, folder: nbdkit(
        path, "--filter=fua", "--filter=noextents", "memory", str(SIZE), "fuamode=emulate"
    ),
    "a slow line": lambda path, folder: nbdkit(
        path, "--filter=rate", "memory", str(SIZE), "rate=500M"
    ),
    "blocks of 4096": lambda path, folder: nbdkit(
        path, "--filter=blocksize-policy", "memory", str(SIZE), "blocksize-error-policy=error",
        "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64k",
    ),
    "blocks of 65536": lambda path, folder: nbdkit(
        path, "--filter=blocksize-policy", "memory", str(SIZE), "blocksize-error-policy=error",
        "blocksize-minimum=64k", "blocksize-preferred=64k", "blocksize-maximum=1M",
    ),
}  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
def test_N5_bytes_are_a_models_whatever_the_server_can(peer: str, tmp_path: Path) -> None:
    need("qemu-nbd", "nbdkit")
    rnd = random.Random(peer)
    model = bytearray(SIZE)
    with PEERS[peer](tmp_path / "s", tmp_path):
        node = node_of(tmp_path / "s")
        assert node.size == SIZE
        for _ in range(150):
            offset = rnd.choice([rnd.randrange(SIZE), rnd.randrange(SIZE // 4096) * 4096])
            length = min(rnd.choice([1, 511, 4096, 70_000, 300_000]), SIZE - offset)
            step = rnd.choice(["write", "write", "write", "fua", "zero", "unmap", "fast", "trim"])
            if step in ("write", "fua"):
                content = rnd.randbytes(length)
                node.pwrite(memoryview(content), offset, fua=step == "fua")
                model[offset : offset + length] = content
            elif step == "trim":
                node.discard(offset, length)
                now = bytes_of(node, offset, length)
                kept = model[offset : offset + length]
                assert all(b in (0, a) for a, b in zip(kept, now, strict=True))
                model[offset : offset + length] = now
            else:
                try:
                    node.zero(offset, length, unmap=step != "zero", fast=step == "fast")
                except OSError as error:
                    assert step == "fast" and error.errno == errno.EOPNOTSUPP
                    continue
                model[offset : offset + length] = bytes(length)
        assert not differs(bytes_of(node), model)
        assert not differs(contents(node), model)  # by its runs: what is said to be zero is
        for _ in range(20):
            offset = rnd.randrange(SIZE)
            length = rnd.randrange(SIZE - offset + 1)
            assert sum(e.length for e in node.extents(offset, length)) == length
        node.flush()
        node.close()
        node.close()
        again = node_of(tmp_path / "s", read_only="on")
        assert not differs(bytes_of(again), model)
        with pytest.raises(OSError) as refused:
            again.pwrite(view(b"x"), 0)
        assert refused.value.errno == errno.EPERM
        again.close()


def test_who_wants_bytes_does_not_ask_about_runs(tmp_path: Path) -> None:
    """And who wants to know is told what the server says at that time."""
    server = Forgetful(tmp_path / "s", SIZE)
    node = opening.open_image(uri(tmp_path / "s"))
    disk = Disk(node, "d")
    disk.pread(memoryview(bytearray(4096)), 8192)
    disk.pwrite(view(b"x" * 4096), 8192)
    assert server.asked == [nbd.READ, nbd.WRITE]  # a guest's request is one request
    for offset, length in ((0, SIZE), (8192, 512)):
        assert sum(e.length for e in disk.extents(offset, length)) == length
        assert server.asked[2:] == [nbd.BLOCK_STATUS]
        del server.asked[2:]
    node.close()
    server.crash()


def test_eight_threads_share_a_connection(tmp_path: Path) -> None:
    need("qemu-nbd")
    model = bytearray(SIZE)
    with qemu_nbd(tmp_path / "s", empty(tmp_path / "disk.raw")):
        node = node_of(tmp_path / "s")
        part = SIZE // 8
        wrong: list[str] = []

        def work(index: int) -> None:
            rnd = random.Random(index)
            for _ in range(150):
                length = rnd.choice([512, 4096, 100_000])
                offset = index * part + rnd.randrange(part - length)
                content = rnd.randbytes(length)
                node.pwrite(memoryview(content), offset)
                model[offset : offset + length] = content
                at = index * part + rnd.randrange(part - length)
                if bytes_of(node, at, length) != model[at : at + length]:
                    wrong.append(f"thread {index} at {at}")
                if not rnd.randrange(20):
                    node.flush()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not wrong
        node.close()
    assert not differs((tmp_path / "disk.raw").read_bytes(), model)


def test_who_waits_reads_on_when_the_reader_has_its_answer(tmp_path: Path) -> None:
    """The second answer comes when the first thread, which read, has gone."""
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s")
    asked, first_may, second_may = (threading.Event() for _ in range(3))
    turns = iter([first_may, second_may])

    def before(kind: int) -> None:
        asked.set()
        assert next(turns).wait(PATIENCE)

    server.before = before
    threads = [threading.Thread(target=bytes_of, args=(node, i, 1)) for i in range(2)]
    threads[0].start()
    assert asked.wait(PATIENCE)
    threads[1].start()
    link = node._link
    assert link is not None
    until(lambda: link._reading and len(link._asleep) == 1)
    first_may.set()
    threads[0].join(PATIENCE)
    second_may.set()
    threads[1].join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    node.close()
    server.crash()


def test_N1_a_flush_covers_nothing_that_is_answered_after_it(tmp_path: Path) -> None:
    """The server does a flush before the write that was sent first, and crashes after both."""
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s", reconnect_delay=20)
    node.pwrite(view(b"a"), 0)
    server.overtaken = nbd.WRITE
    write = threading.Thread(target=node.pwrite, args=(view(b"b"), 1))
    write.start()
    until(lambda: server.asked == [nbd.WRITE, nbd.WRITE])
    node.flush()
    write.join(PATIENCE)
    assert server.volatile[:2] == b"ab" and server.durable[:2] == b"a\0"
    server.overtaken = -1
    server.crash()
    server.up()
    node.flush()
    assert server.durable[:2] == b"ab"
    node.close()
    server.crash()


def test_a_guests_requests_over_a_remote_disk_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Our server over a node over another server, which hangs: eight writes are on their way."""
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s")
    disk = Disk(node, "d")
    front = NbdServer()
    front.add(NbdExport("", disk, default=True))
    front.listen_unix(str(tmp_path / "front"))
    goes_on = threading.Event()

    def hang(kind: int) -> None:
        goes_on.wait(PATIENCE)

    server.before = hang
    with NbdClient(uri(tmp_path / "front")) as guest:
        calls = [
            guest.link.submit(nbd.WRITE, 0, i << 16, 4096, bytes([i]) * 4096) for i in range(8)
        ]
        link = node._link
        assert link is not None
        until(lambda: len(link._calls) == 8)
        goes_on.set()
        for call in calls:
            guest.link.wait(call)
    assert all(server.volatile[i << 16] == i for i in range(8))
    front.stop()
    node.close()
    server.crash()


def test_a_copy_that_fails_has_nothing_on_its_way_any_more(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "s", 16 << 20)
    node = node_of(tmp_path / "s")
    make_base(tmp_path, 16 << 20)
    source = opening.open_image(str(tmp_path / "base.raw"), "raw", read_only=True)
    copier = Copier()
    copier.place(source, node, Span(0, 16 << 20, Kind.COPY))
    assert not differs(server.volatile, contents(source))
    server.before = lambda kind: server.fails.update({nbd.WRITE: nbd.ERRNOS[errno.ENOSPC]})
    with pytest.raises(OSError) as full:
        copier.place(source, node, Span(0, 16 << 20, Kind.COPY))
    assert full.value.errno == errno.ENOSPC
    assert node._link is not None and not node._link._calls
    # And the other way: from a server into a file that is made.
    server.before = lambda kind: None
    with open(tmp_path / "here.raw", "w+b") as f:
        copier.fill(node, 0, [Extent(16 << 20, State.DATA, f.fileno(), 0, True)])
        assert not differs(f.read(), contents(source))
    source.close()
    node.close()
    server.crash()


# Errors ------------------------------------------------------------------------------------


def test_a_servers_error_is_one_requests(tmp_path: Path) -> None:
    need("nbdkit")
    bad = tmp_path / "bad"
    with nbdkit(
        tmp_path / "s", "--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%", f"error-pwrite-file={bad}",
    ):  # fmt: skip
        node = node_of(tmp_path / "s")
        node.pwrite(view(b"a" * 4096), 0)
        bad.touch()
        with pytest.raises(OSError) as full:
            node.pwrite(view(b"b" * 4096), 0)
        assert full.value.errno == errno.ENOSPC
        bad.unlink()
        assert bytes_of(node, 0, 4096) == b"a" * 4096
        node.flush()
        with pytest.raises(OSError) as past:
            node.pwrite(view(b"b"), SIZE)
        assert past.value.errno == errno.ENOSPC
        assert bytes_of(node, SIZE - 1, 3) == bytes(3)
        node.close()


def test_N6_a_failed_flush_fails_for_good(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s")
    node.flush()  # nothing was written: nobody is asked
    assert server.asked == []
    node.pwrite(view(b"x"), 0)
    server.fails = {nbd.FLUSH: 5}
    for _ in range(2):
        with pytest.raises(OSError, match="every later flush fails"):
            node.flush()
        server.fails = {}
    with pytest.raises(OSError, match="every later flush fails"):
        node.pwrite(view(b"y"), 0, fua=True)
    assert bytes_of(node, 0, 1) == b"y"
    node.close()
    server.crash()


# A connection that is lost -----------------------------------------------------------------


def test_without_a_delay_a_loss_is_EIO_and_puts_what_was_not_flushed_in_doubt(
    tmp_path: Path,
) -> None:
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s")
    node.pwrite(view(b"a"), 0)
    node.flush()
    server.crash()
    with pytest.raises(OSError) as lost:
        bytes_of(node, 0, 1)
    assert lost.value.errno == errno.EIO
    server.up()
    node._next_attempt = 0
    assert bytes_of(node, 0, 1) == b"a"  # it came back
    node.pwrite(view(b"b"), 0)
    node.flush()  # and nothing had been in doubt
    node.pwrite(view(b"c"), 0)
    server.crash()
    server.up()
    with pytest.raises(OSError):
        bytes_of(node, 0, 1)
    assert bytes_of(node, 0, 1) == b"b"  # it is lost, indeed
    node.pwrite(view(b"d"), 1)
    with pytest.raises(OSError, match="every later flush fails"):
        node.flush()
    node.close()
    server.crash()


def test_N1_with_a_delay_a_flush_covers_what_a_server_has_lost(tmp_path: Path) -> None:
    """The server crashes at every moment of a run of writes, and forgets."""
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s", reconnect_delay="20")
    rnd = random.Random(3)
    model = bytearray(SIZE)
    restarts: list[threading.Thread] = []
    for _ in range(12):
        left = [rnd.randrange(12)]

        def crash(kind: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                restarts.append(threading.Thread(target=server.restart))
                restarts[-1].start()

        server.before = crash
        for _ in range(10):
            offset, length = rnd.randrange(SIZE - 8192), rnd.randrange(1, 8192)
            if rnd.randrange(4):
                content = rnd.randbytes(length)
                node.pwrite(memoryview(content), offset)
            else:
                content = bytes(length)
                node.zero(offset, length, unmap=True)
            model[offset : offset + length] = content
        node.flush()
        for thread in restarts:
            thread.join(PATIENCE)
        assert not differs(server.durable, model)
    assert len(restarts) > 6
    assert not node._kept and not node._kept_bytes
    node.close()
    server.crash()


def test_what_is_kept_for_a_server_that_may_come_back_is_bounded(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s", reconnect_delay=20)
    piece = view(b"x" * (1 << 20))
    for _ in range(40):
        node.pwrite(piece, 0)
        assert node._kept_bytes <= driver.KEEP + (2 << 20)
    assert server.asked.count(nbd.FLUSH) >= 2
    node.close()
    server.crash()


def test_threads_wait_for_a_server_that_was_killed(tmp_path: Path) -> None:
    need("qemu-nbd")
    image = empty(tmp_path / "disk.raw")
    model = bytearray(SIZE)
    part = SIZE // 4
    wrong: list[str] = []
    with ExitStack() as stack:
        first = stack.enter_context(qemu_nbd(tmp_path / "s", image))
        node = node_of(tmp_path / "s", reconnect_delay=25)
        stop = threading.Event()
        rounds = [0] * 4

        def work(index: int) -> None:
            rnd = random.Random(index)
            try:
                while not stop.is_set():
                    offset = index * part + rnd.randrange(part - 4096)
                    content = rnd.randbytes(4096)
                    node.pwrite(memoryview(content), offset)
                    model[offset : offset + 4096] = content
                    assert bytes_of(node, offset, 4096) == content
                    rounds[index] += 1
            except BaseException as error:
                wrong.append(repr(error))

        def another_round() -> None:
            before = list(rounds)
            until(lambda: wrong or all(a > b for a, b in zip(rounds, before, strict=True)))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        child = first
        for _ in range(3):
            another_round()
            child.kill()
            child.wait()
            child = stack.enter_context(qemu_nbd(tmp_path / "s", image))
        another_round()
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert not wrong
        node.flush()
        node.close()
    assert not differs(image.read_bytes(), model)


def test_the_delay_ends(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s", reconnect_delay=1)
    server.crash()
    with pytest.raises(OSError) as lost:
        bytes_of(node, 0, 1)
    assert lost.value.errno == errno.EIO
    node.close()


def test_another_export_under_the_same_name_is_not_written_to(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s", reconnect_delay=20)
    server.crash()
    other = Forgetful(tmp_path / "s", SIZE * 2)
    with pytest.raises(OSError, match="another export"):
        node.pwrite(view(b"x"), 0)
    assert other.asked == []
    node.close()
    other.crash()


# Giving up ---------------------------------------------------------------------------------


def test_D2_abort_fails_what_hangs_at_once(tmp_path: Path) -> None:
    """In flight, in eight threads, or waiting for a server that is gone."""
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s", reconnect_delay=600)
    goes_on = threading.Event()

    def hang(kind: int) -> None:
        goes_on.wait(PATIENCE)

    for setup in ("hangs", "gone"):
        failed: list[int | None] = []

        def read(failed: list[int | None] = failed) -> None:
            try:
                bytes_of(node, 0, 4096)
            except OSError as error:
                failed.append(error.errno)

        if setup == "hangs":
            server.before = hang
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        if setup == "hangs":
            until(lambda: node._link is not None and len(node._link._calls) == 8)
        else:
            until(lambda: node._connecting or node._next_attempt)
        node.abort()
        for thread in threads:
            thread.join(PATIENCE)
        assert failed == [errno.EIO] * 8
        goes_on.set()
        server.before = lambda kind: None
        if setup == "hangs":
            assert bytes_of(node, 0, 1) == b"\0"  # later requests connect anew
            server.crash()
    node.close()


def test_what_was_not_flushed_before_an_abort_is_in_doubt(tmp_path: Path) -> None:
    """Without a delay. With one it is written again, as after any loss."""
    for delay in (0, 20):
        server = Forgetful(tmp_path / "s", SIZE)
        node = node_of(tmp_path / "s", reconnect_delay=delay)
        node.pwrite(view(b"a"), 0)
        node.abort()
        server.restart()
        if delay:
            node.flush()
            assert server.durable[:1] == b"a"
        else:
            with pytest.raises(OSError, match="every later flush fails"):
                node.flush()
        node.close()
        server.crash()


def test_closing_says_what_may_be_lost_and_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s")
    node.pwrite(view(b"a"), 0)
    server.restart()
    with pytest.raises(OSError, match="every later flush fails"):
        node.close()
    node.close()
    monkeypatch.setattr(driver, "PATIENCE", 0.05)
    node = node_of(tmp_path / "s")
    node.pwrite(view(b"a"), 0)
    goes_on = threading.Event()

    def hang(kind: int) -> None:
        goes_on.wait(PATIENCE)

    server.before = hang
    with pytest.raises(OSError, match="every later flush fails"):
        node.close()
    goes_on.set()
    server.crash()


def test_D2_a_copy_whose_target_hangs_is_called_off(tmp_path: Path) -> None:
    need("nbdkit")
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw"), "raw"), "vm")
    with nbdkit(tmp_path / "s", "--filter=delay", "memory", str(SIZE), "delay-write=1000"):
        target = node_of(tmp_path / "s")
        jobs = Jobs(lambda name, data: None)
        job = jobs.start(Mirror(disk, target, auto_dismiss=False), "copy")
        until(lambda: target._link is not None and target._link._calls)
        job.cancel()
        assert not job.wait(0.05)  # the write hangs
        target.abort()
        assert job.wait(PATIENCE)
        target.close()
    disk.root.close()


# Options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "server"),
        ({"server": {"path": "/x"}}, "server.type"),
        ({"server": {"type": "fd", "str": "1"}}, "server.type"),
        ({"server": {"type": "unix"}}, "server.path"),
        ({"server": {"type": "unix", "path": "x" * 200}}, "server.path"),
        ({"server": {"type": "unix", "path": "/x", "abstract": "on"}}, "server.abstract"),
        ({"server": {"type": "inet", "host": "::1"}}, "server.port"),
        ({"server": {"type": "inet", "host": "::1", "port": "nbd"}}, "server.port"),
        ({"server": {"type": "inet", "host": "::1", "port": 70000}}, "server.port"),
        ({"tls-creds": "t"}, "tls-creds"),
        ({"x-dirty-bitmap": "b0"}, "x-dirty-bitmap"),
        ({"reconnect-delay": "-1"}, "reconnect-delay"),
        ({"open-timeout": "soon"}, "open-timeout"),
        ({"export": "x" * 5000}, "export"),
        ({"server": {"type": "unix", "path": "/nonexistent/s"}}, "Could not open"),
        ({"server": {"type": "inet", "host": "127.0.0.1", "port": 1}}, "refused"),
    ],
)  # fmt: skip
def test_bad_options_are_told_in_one_line(options: dict[str, Any], words: str) -> None:
    if options and "server" not in options:
        options = {"server": {"type": "unix", "path": "/nonexistent/s"}, **options}
    with pytest.raises(CowferryError, match=words):
        opening.open_node({"driver": "nbd", **options})


def test_a_read_only_export_is_read(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "s", SIZE, EVERYTHING | nbd.READ_ONLY)
    with pytest.raises(CowferryError, match="read-only export"):
        node_of(tmp_path / "s")
    for option in ("read_only", "auto_read_only"):
        node = node_of(tmp_path / "s", **{option: "on"})
        assert node.read_only and bytes_of(node, 0, 2) == b"\0\0"
        with pytest.raises(OSError):
            node.reopen(False)
        node.close()
    server.crash()


def test_open_timeout_waits_for_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[Forgetful] = []

    def connect(*arguments: Any) -> Any:
        try:
            return nbd_link.connect(*arguments)
        except OSError:  # it was refused once: now there is one
            servers.append(Forgetful(tmp_path / "s", SIZE))
            raise

    monkeypatch.setattr(driver, "connect", connect)
    node = node_of(tmp_path / "s", open_timeout="25")
    node.close()
    servers[0].crash()


def test_reopen_changes_access(tmp_path: Path) -> None:
    server = Forgetful(tmp_path / "s", SIZE)
    node = node_of(tmp_path / "s")
    node.pwrite(view(b"x"), 0)
    node.reopen(True)
    assert server.durable[0:1] == b"x"
    with pytest.raises(OSError):
        node.pwrite(view(b"y"), 0)
    node.reopen(False)
    node.pwrite(view(b"y"), 0)
    with pytest.raises(OSError) as grown:
        node.resize(SIZE * 2)
    assert grown.value.errno == errno.ENOSPC
    with pytest.raises(CowferryError):
        node.resize(1)
    node.close()
    assert server.durable[0:1] == b"y"  # close flushes
    server.crash()
