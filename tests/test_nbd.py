"""The NBD server spoken to byte by byte: what a polite, a careless and a hostile client gets."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from cowferry.exports.nbd import NbdExport, NbdServer
from cowferry.wire import nbd

SIZE = 4 << 20
BOTH = ("base:allocation", "qemu:allocation-depth")
Made = TypeVar("Made")


@contextmanager
def serving(folder: Path, size: int = SIZE, **options: object) -> Iterator[tuple[NbdServer, Disk]]:
    """A server with one export "d" of a sparse raw disk, on the socket `folder/s`."""
    path = folder / "disk.raw"
    if not path.exists():
        path.write_bytes(b"")
        os.truncate(path, size)
    server = NbdServer(handshake_seconds=float(options.pop("handshake", 10.0)))  # type: ignore[arg-type]
    server.max_connections = int(options.pop("connections", 100))  # type: ignore[call-overload]
    node = opening.open_image(str(path), "raw")
    disk = Disk(node, "d")
    try:
        server.add(NbdExport("d", disk, name="d", **options))  # type: ignore[arg-type]
        server.listen_unix(str(folder / "s"))
        yield server, disk
    finally:
        server.stop()
        node.close()


def dial(folder: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(folder / "s"))  # blocking: waits while the backlog is full
    sock.settimeout(20)
    return sock


def receive(sock: socket.socket, length: int) -> bytes:
    out = b""
    while len(out) < length:
        part = sock.recv(length - len(out))
        if not part:
            raise EOFError
        out += part
    return out


def option(number: int, data: bytes = b"") -> bytes:
    return nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data)) + data


def named(name: bytes) -> bytes:
    return struct.pack(">I", len(name)) + name


def go(name: bytes = b"d") -> bytes:
    return option(nbd.OPT_GO, named(name) + bytes(2))


def replies(sock: socket.socket) -> list[tuple[int, bytes]]:
    """Replies to one option, up to the ACK or error."""
    out = []
    while True:
        magic, _, kind, length = nbd.OPTION_REPLY.unpack(receive(sock, 20))
        assert magic == nbd.REPLY_MAGIC
        out.append((kind, receive(sock, length)))
        if kind == nbd.REP_ACK or kind & nbd.ERROR:
            return out


def greet(folder: Path) -> socket.socket:
    sock = dial(folder)
    assert receive(sock, 18) == nbd.greeting()
    sock.sendall(struct.pack(">I", 3))
    return sock


def ask(sock: socket.socket, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    sock.sendall(option(number, data))
    return replies(sock)


def request(kind: int, offset: int, length: int, flags: int = 0, cookie: int = 7) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, cookie, offset, length)


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def uri(folder: Path, name: str = "d") -> str:
    return f"nbd+unix:///{name}?socket={folder / 's'}"


# Handshake ---------------------------------------------------------------------------------


def test_options_in_a_polite_conversation(tmp_path: Path) -> None:
    with serving(tmp_path, description="a disk"):
        sock = greet(tmp_path)
        assert ask(sock, nbd.OPT_LIST) == [
            (nbd.REP_SERVER, named(b"d") + b"a disk"),
            (nbd.REP_ACK, b""),
        ]
        assert ask(sock, nbd.OPT_STARTTLS)[0][0] == nbd.REP_ERR_POLICY
        assert ask(sock, 77, b"what")[0][0] == nbd.REP_ERR_UNSUP
        assert ask(sock, nbd.OPT_LIST, b"x")[0][0] == nbd.REP_ERR_INVALID
        unknown = ask(sock, nbd.OPT_INFO, named(b"nope") + bytes(2))
        assert unknown[0][0] == nbd.REP_ERR_UNKNOWN and b"nope" in unknown[0][1]
        wanted = struct.pack(">HHHH", 3, nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE)
        infos = {
            struct.unpack(">H", data[:2])[0]: data[2:]
            for kind, data in ask(sock, nbd.OPT_INFO, named(b"") + wanted)
            if kind == nbd.REP_INFO
        }
        size, flags = struct.unpack(">QH", infos[nbd.INFO_EXPORT])
        assert size == SIZE
        assert flags & nbd.CAN_MULTI_CONN and flags & nbd.SEND_FUA
        assert not flags & nbd.SEND_DF, "DF without structured replies is forbidden"
        assert infos[nbd.INFO_DESCRIPTION] == b"a disk" and infos[nbd.INFO_NAME] == b"d"
        assert struct.unpack(">III", infos[nbd.INFO_BLOCK_SIZE]) == (1, 4096, 32 << 20)
        assert ask(sock, nbd.OPT_ABORT)[0][0] == nbd.REP_ACK
        assert is_closed(sock)


def test_export_name_with_and_without_zeroes(tmp_path: Path) -> None:
    with serving(tmp_path):
        for flags, padding in ((3, 0), (1, 124), (0, 124)):
            sock = dial(tmp_path)
            receive(sock, 18)
            sock.sendall(struct.pack(">I", flags) + option(nbd.OPT_EXPORT_NAME, b"d"))
            size, _ = struct.unpack(">QH", receive(sock, 10))
            assert size == SIZE and receive(sock, padding) == bytes(padding)
            sock.sendall(request(nbd.READ, 0, 512))
            assert nbd.SIMPLE.unpack(receive(sock, 16)) == (nbd.SIMPLE_MAGIC, 0, 7)
            assert receive(sock, 512) == bytes(512)
            sock.close()
        sock = greet(tmp_path)
        sock.sendall(option(nbd.OPT_EXPORT_NAME, b"nope"))
        assert is_closed(sock)


def test_meta_contexts_need_structured_replies_and_hold_for_their_export(tmp_path: Path) -> None:
    with serving(tmp_path):
        sock = greet(tmp_path)
        query = named(b"d") + struct.pack(">I", 1) + named(b"base:allocation")
        assert ask(sock, nbd.OPT_SET_META_CONTEXT, query)[0][0] == nbd.REP_ERR_INVALID
        ask(sock, nbd.OPT_STRUCTURED_REPLY)
        every = ask(sock, nbd.OPT_LIST_META_CONTEXT, named(b"d") + bytes(4))
        assert [data[4:].decode() for _, data in every[:-1]] == list(BOTH)
        some = named(b"d") + struct.pack(">I", 1) + named(b"qemu:")
        assert len(ask(sock, nbd.OPT_LIST_META_CONTEXT, some)) == 2
        assert ask(sock, nbd.OPT_SET_META_CONTEXT, some) == [(nbd.REP_ACK, b"")]
        assert ask(sock, nbd.OPT_SET_META_CONTEXT, query)[0][0] == nbd.REP_META_CONTEXT
        # A failed SET leaves none.
        assert ask(sock, nbd.OPT_SET_META_CONTEXT, query[:-1])[0][0] == nbd.REP_ERR_INVALID
        sock.sendall(go())
        replies(sock)
        sock.sendall(request(nbd.BLOCK_STATUS, 0, 4096))
        magic, flags, kind, cookie, length = nbd.CHUNK.unpack(receive(sock, 20))
        assert (magic, flags, kind, cookie) == (nbd.CHUNK_MAGIC, 1, nbd.CHUNK_ERROR, 7)
        assert receive(sock, length)[:4] == struct.pack(">I", 22)
        sock.close()


def test_limits_of_options(tmp_path: Path) -> None:
    with serving(tmp_path):
        sock = greet(tmp_path)
        assert ask(sock, nbd.OPT_INFO, bytes(100_000))[0][0] == nbd.REP_ERR_TOO_BIG
        long_name = ask(sock, nbd.OPT_INFO, named(b"n" * 5000) + bytes(2))
        assert long_name[0][0] in (nbd.REP_ERR_UNKNOWN, nbd.REP_ERR_INVALID)
        assert len(long_name[0][1]) <= 4096
        sock.sendall(nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_LIST, (32 << 20) + 1))
        assert is_closed(sock)


def test_cut_off_at_every_byte_and_garbage_leave_nothing_behind(tmp_path: Path) -> None:
    talk = (
        struct.pack(">I", 3)
        + option(nbd.OPT_STRUCTURED_REPLY)
        + option(
            nbd.OPT_SET_META_CONTEXT, named(b"d") + struct.pack(">I", 1) + named(BOTH[0].encode())
        )
        + go()
        + request(nbd.WRITE, 0, 16)
        + bytes(16)
        + request(nbd.READ, 0, 16)
    )
    before = open_now()
    threads = set(threading.enumerate())
    with serving(tmp_path) as (server, _):
        for cut in range(len(talk)):
            with dial(tmp_path) as sock:
                sock.sendall(talk[:cut])
        rng = random.Random(5)
        for _ in range(60):
            at = rng.randrange(len(talk))
            with dial(tmp_path) as sock:
                sock.sendall(talk[:at] + rng.randbytes(40))
        with NbdClient(uri(tmp_path)) as client:  # a polite one is still served
            assert client.pread(512, 4096) == bytes(512)
        server.stop()
        assert not server.connections and not server.threads
    assert not set(threading.enumerate()) - threads
    assert not open_now() - before


def open_now() -> set[tuple[str, str]]:
    """Every descriptor of this process, and what it is of."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that the listing was read from
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found


def in_time(connect: Callable[[], Made]) -> Made:
    """A handshake within a short deadline, on a machine that may stop for a moment."""
    for _ in range(50):
        with suppress(OSError, EOFError, CowferryError):
            return connect()
    raise AssertionError("nobody gets in")


def test_handshake_deadline_covers_all_of_a_slow_handshake(tmp_path: Path) -> None:
    with serving(tmp_path, handshake=0.3):
        slow = in_time(lambda: greet(tmp_path))
        for _ in range(10_000_000):  # each option in time, and yet no end
            try:
                slow.sendall(option(nbd.OPT_LIST))
                replies(slow)
            except (OSError, EOFError):
                break
        else:
            pytest.fail("ten million options and the deadline never came")
        with in_time(lambda: NbdClient(uri(tmp_path))) as client:
            silent = dial(tmp_path)
            receive(silent, 18)
            assert is_closed(silent)
            # The deadline of one who came earlier has passed, but ended with its handshake.
            assert client.pread(1, 0) == b"\0"


def test_the_101st_connection_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    with serving(tmp_path, connections=100):
        clients = [NbdClient(uri(tmp_path)) for _ in range(100)]
        with pytest.raises(CowferryError):
            NbdClient(uri(tmp_path))
        assert all(c.pread(1, 0) == b"\0" for c in clients)
        for c in clients:
            c.close()


def test_stop_under_connecting_clients(tmp_path: Path) -> None:
    done = threading.Event()

    def connect() -> None:
        while not done.is_set():
            try:
                with NbdClient(uri(tmp_path), timeout=5) as client:
                    client.pread(512, 0)
            except (CowferryError, OSError):
                pass

    threads = [threading.Thread(target=connect) for _ in range(4)]
    for t in threads:
        t.start()
    try:
        for _ in range(40):
            with serving(tmp_path) as (server, disk):
                pass
            assert not server.connections
            assert not os.path.exists(tmp_path / "s")
            assert not disk.gate.slots or all(s.start >= s.end for s in disk.gate.slots)
    finally:
        done.set()
        for t in threads:
            t.join()


# Exports -----------------------------------------------------------------------------------


def test_empty_name_is_the_only_export_or_the_default(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, disk):
        with NbdClient(uri(tmp_path, "")) as client:
            assert client.size == SIZE
        server.add(NbdExport("e", disk))
        with pytest.raises(CowferryError):
            NbdClient(uri(tmp_path, ""))
        server.add(NbdExport("f", disk, writable=False, default=True))
        with NbdClient(uri(tmp_path, "")) as client:
            assert client.flags & nbd.READ_ONLY
        with pytest.raises(CowferryError, match="already has export named 'e'"):
            server.add(NbdExport("e2", disk, name="e"))


def test_remove_safe_refuses_hard_disconnects(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, _):
        export = server.exports["d"]
        with NbdClient(uri(tmp_path)) as client:
            client.pread(1, 0)
            with pytest.raises(CowferryError, match="export 'd' still in use"):
                server.remove(export)
            assert client.pread(1, 0) == b"\0"
            server.remove(export, force=True)
            assert export.users == 0
            with pytest.raises(OSError):
                client.pread(1, 0)
        with pytest.raises(CowferryError):
            NbdClient(uri(tmp_path))


def test_listen_never_removes_a_file_that_is_no_socket(tmp_path: Path) -> None:
    precious = tmp_path / "vm.qcow2"
    precious.write_bytes(b"data")
    server = NbdServer()
    with pytest.raises(CowferryError, match="not a socket"):
        server.listen_unix(str(precious))
    server.stop()
    assert precious.read_bytes() == b"data"


def test_tcp_and_a_socket_handed_over(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, _):
        port = server.listen_tcp("127.0.0.1", 0)
        given = socket.create_server(("127.0.0.1", 0))
        server.listen_socket(given)
        for p in (port, given.getsockname()[1]):
            with NbdClient(f"nbd://127.0.0.1:{p}/d") as client:
                client.pwrite(b"hello", 100)
                assert client.pread(5, 100) == b"hello"
        assert server.uri("d") == uri(tmp_path)


# Transmission ------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
def test_N5_unaligned_requests_are_exact(tmp_path: Path, structured: bool) -> None:
    oracle = bytearray(SIZE)
    rng = random.Random(3)
    with serving(tmp_path):
        client = NbdClient(uri(tmp_path), BOTH)
        with client:
            for _ in range(400):
                offset = rng.randrange(SIZE)
                length = min(rng.choice([1, 7, 511, 513, 4096, 70_001, 600_000]), SIZE - offset)
                what = rng.randrange(4)
                if what == 0:
                    data = rng.randbytes(length)
                    client.pwrite(data, offset, fua=rng.random() < 0.1)
                    oracle[offset : offset + length] = data
                elif what == 1:
                    client.zero(length, offset, rng.choice([0, nbd.CMD_NO_HOLE, nbd.CMD_FUA]))
                    oracle[offset : offset + length] = bytes(length)
                elif what == 2 and length % 512 == 0:
                    client.trim(length, offset)
                    oracle[offset : offset + length] = client.pread(length, offset)
                else:
                    flags = rng.choice([0, nbd.CMD_DF]) if structured else 0
                    got = client.pread(length, offset, flags)
                    assert got == oracle[offset : offset + length]
            client.flush()
            assert client.pread(SIZE, 0) == oracle
    assert (tmp_path / "disk.raw").read_bytes() == oracle


def test_bounds_and_flags_get_an_errno_and_the_connection_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path), NbdClient(uri(tmp_path), BOTH) as client:
        for offset in (SIZE - 1, SIZE, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            with pytest.raises(OSError) as read:
                client.pread(2, offset)
            assert read.value.errno == errno.EINVAL
            with pytest.raises(OSError) as write:
                client.pwrite(b"xy", offset)
            assert write.value.errno == errno.ENOSPC
            for call in (client.trim, client.zero):
                with pytest.raises(OSError) as other:
                    call(2, offset)
                assert other.value.errno in (errno.ENOSPC, errno.EINVAL)
            with pytest.raises(OSError):
                client.block_status(2, offset)
        with pytest.raises(OSError):
            client.pread((32 << 20) + 1, 0)
        with pytest.raises(OSError) as unknown:
            client.pread(1, 0, 1 << 9)
        assert unknown.value.errno == errno.EINVAL
        with pytest.raises(OSError) as command:
            client.link.wait(client.link.submit(99, 0, 0, 0))
        assert command.value.errno == errno.EINVAL
        assert client.pread(0, 0) == b""
        assert client.pread(2, SIZE - 2) == b"\0\0"


def test_a_write_larger_than_allowed_ends_only_its_connection(tmp_path: Path) -> None:
    with serving(tmp_path), NbdClient(uri(tmp_path)) as good:
        with NbdClient(uri(tmp_path)) as bad:
            call = bad.link.submit(nbd.WRITE, 0, 0, 0xFFFFFFFF)
            with pytest.raises(OSError):
                bad.link.wait(call)
        assert good.pread(1, 0) == b"\0"


def test_32_MiB_requests(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(1 << 20) * 32
    with serving(tmp_path, size=64 << 20), NbdClient(uri(tmp_path)) as client:
        client.pwrite(data, 12345)
        assert client.pread(32 << 20, 12345) == data
        client.pwrite(b"after", 0)
        assert client.pread(5, 0) == b"after"


def test_read_only_export_says_EPERM(tmp_path: Path) -> None:
    with serving(tmp_path, writable=False), NbdClient(uri(tmp_path)) as client:
        assert client.flags & nbd.READ_ONLY and not client.flags & nbd.SEND_TRIM
        calls: list[Callable[[], None]] = [
            lambda: client.pwrite(b"x" * 4096, 0),
            lambda: client.zero(1, 0),
        ]
        for call in calls:
            with pytest.raises(OSError) as refused:
                call()
            assert refused.value.errno == errno.EPERM
        assert client.pread(4096, 0) == bytes(4096)


def test_many_requests_in_one_segment_are_all_answered(tmp_path: Path) -> None:
    with serving(tmp_path):
        sock = greet(tmp_path)
        sock.sendall(go())
        replies(sock)
        batch = b"".join(
            request(nbd.WRITE, 512 * i, 512, cookie=i) + bytes([i]) * 512 for i in range(200)
        )
        sock.sendall(batch)
        assert {nbd.SIMPLE.unpack(receive(sock, 16)) for _ in range(200)} == {
            (nbd.SIMPLE_MAGIC, 0, i) for i in range(200)
        }
        sock.sendall(b"".join(request(nbd.READ, 512 * i, 512, cookie=i) for i in range(200)))
        for _ in range(200):
            _, code, i = nbd.SIMPLE.unpack(receive(sock, 16))
            assert code == 0 and receive(sock, 512) == bytes([i]) * 512
        sock.close()


class Recorder:
    """What reached the file, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def wrote(self, fd: int, offset: int, data: bytes) -> None:
        self.seen.append("write")

    def flushed(self, fd: int) -> None:
        self.seen.append("flush")

    def truncated(self, fd: int, size: int) -> None: ...
    def renamed(self, source: str, target: str) -> None: ...
    def directory_flushed(self, path: str) -> None: ...


def test_N2_fua_is_durable_before_its_reply_on_write_trim_and_zeroes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path), NbdClient(uri(tmp_path)) as client:
        client.pwrite(b"x" * 4096, 0)
        calls: list[Callable[[], None]] = [
            lambda: client.pwrite(b"y" * 4096, 0, fua=True),
            lambda: client.trim(4096, 0, fua=True),
            lambda: client.zero(4096, 0, nbd.CMD_FUA),
        ]
        for call in calls:
            recorder = Recorder()
            monkeypatch.setattr(sysio, "recorder", recorder)
            call()
            assert recorder.seen == ["write", "flush"]


def test_N3_a_flush_on_one_connection_covers_replies_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path), NbdClient(uri(tmp_path)) as a, NbdClient(uri(tmp_path)) as b:
        recorder = Recorder()
        monkeypatch.setattr(sysio, "recorder", recorder)
        a.pwrite(b"x", 0)
        b.flush()
        assert recorder.seen == ["write", "flush"]


def test_N6_a_failed_flush_is_EIO_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "injected")

    with serving(tmp_path), NbdClient(uri(tmp_path)) as client:
        client.pwrite(b"x", 0)
        with monkeypatch.context() as patch:
            patch.setattr(sysio, "fdatasync", fail)
            with pytest.raises(OSError) as first:
                client.flush()
        with pytest.raises(OSError) as later:
            client.flush()
        assert first.value.errno == later.value.errno == errno.EIO


def test_a_failed_write_marks_the_bitmap_and_tells_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buf: object, offset: int) -> None:
        raise OSError(errno.ENOSPC, "injected")

    from cowferry.block.bitmap import Bitmap

    with serving(tmp_path) as (_, disk), NbdClient(uri(tmp_path)) as client:
        with disk.exclusive():
            disk.bitmaps["b"] = Bitmap("b", disk.size)
        with monkeypatch.context() as patch:
            patch.setattr(sysio, "pwrite", fail)
            with pytest.raises(OSError) as full:
                client.pwrite(b"x" * 512, 65536)
        assert full.value.errno == errno.ENOSPC
        assert list(disk.bitmaps["b"].runs()) == [(65536, 65536)]
        client.pwrite(b"x", 0)
        assert list(disk.bitmaps["b"].runs()) == [(0, 131072)]


def test_block_status_is_merged_clamped_and_says_one_if_asked(tmp_path: Path) -> None:
    size = 6 << 30
    with serving(tmp_path, size=size), NbdClient(uri(tmp_path), BOTH) as client:
        client.pwrite(b"x" * 65536, 1 << 20)
        runs = client.block_status(0xFFFFFFFF, 0)
        base = runs["base:allocation"]
        assert base[:2] == [(1 << 20, 3), (65536, 0)]
        assert sum(n for n, _ in base) == 0xFFFFFFFF
        assert runs["qemu:allocation-depth"] == [(0xFFFFFFFF, 1)]
        one = client.block_status(2 << 20, 0, nbd.CMD_REQ_ONE)
        assert one["base:allocation"] == [(1 << 20, 3)]


def test_an_exclusive_section_delays_only_what_it_overlaps(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, disk), NbdClient(uri(tmp_path)) as client:
        client.pread(512, 0)
        with disk.exclusive(0, 65536):
            first, second = (memoryview(bytearray(512)) for _ in range(2))
            held = client.link.submit(nbd.READ, 0, 0, 512, into=first)  # in a worker's hands
            # The other overtakes it on the same connection.
            client.link.wait(client.link.submit(nbd.READ, 0, 1 << 20, 512, into=second))
            assert not held.done
        client.link.wait(held)


def test_a_client_that_does_not_read_stalls_only_itself(tmp_path: Path) -> None:
    with serving(tmp_path, size=64 << 20) as (server, _), NbdClient(uri(tmp_path)) as good:
        good.pwrite(b"x" * (4 << 20), 0)  # data: a hole would fit into the socket's buffer
        stuck = [NbdClient(uri(tmp_path)) for _ in range(10)]
        for client in stuck:
            client.sock.settimeout(0.2)
            for _ in range(12):  # more than the workers, more than any budget
                client.link.submit(nbd.READ, 0, 0, 4 << 20)
        for _ in range(50):
            good.pread(1 << 20, 0)  # beyond INLINE: needs a worker
            good.flush()
        held = [lane.held for lane in server.exports["d"].lanes]
        assert len(held) == 11 and 0 < max(held) <= 34 << 20
        for client in stuck:
            client.abort()
            client.sock.close()
