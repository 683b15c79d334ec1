"""A hostile NBD server: every field of what it says takes absurd values, and it ends at every byte.

Each time there is one line for a person or an EIO, soon, and in little memory; and whatever is
taken for an answer is one.
"""

from __future__ import annotations

import errno
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowferry.block.node import State
from cowferry.drivers import opening
from cowferry.drivers.nbd import MANY, Nbd
from cowferry.drivers.nbd_link import Link, connect
from cowferry.errors import CowferryError
from cowferry.wire import nbd
from cowferry.wire.address import parse_uri
from daemons import PATIENCE
from nbd_servers import (
    CONTEXT,
    ENOUGH,
    EVERYTHING,
    GONE,
    STRUCTURED,
    Forgetful,
    Scripted,
    blocks,
    chunk,
    data,
    export,
    hello,
    reply,
    uri,
)  # fmt: skip

SIZE = 4 << 20
READ = 65536  # bytes that are asked for
ABSURD = (0, 1, 2, 0xFFFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDE = (*ABSURD, SIZE - 1, SIZE, SIZE + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
MEMORY = 256 << 20  # bytes of address space beyond what is there already


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Scripted]:
    server = Scripted(tmp_path / "s", b"")
    yield server
    server.close()


def opened(path: Path) -> Nbd:
    node = opening.open_node({"driver": "nbd", "server": {"type": "unix", "path": str(path)}})
    assert isinstance(node, Nbd)
    return node


def handshakes() -> Iterator[tuple[str, bytes]]:
    """Every field of a handshake with absurd values."""
    greeting = nbd.greeting()
    for value in WIDE:
        yield "magic", struct.pack(">QQH", value, nbd.IHAVEOPT, 3)
        yield "oldstyle", struct.pack(">QQ", nbd.NBDMAGIC, value) + bytes(200)
    for flags in (0, 2, 0xFFFC):
        yield "flags", struct.pack(">QQH", nbd.NBDMAGIC, nbd.IHAVEOPT, flags)
    for value in WIDE:
        head = nbd.OPTION_REPLY.pack(value, nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK, 0)
        yield "reply magic", greeting + head
    for value in ABSURD:
        yield "reply option", greeting + nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, value, 1, 0)
        for kind in (nbd.REP_ACK, nbd.REP_INFO, nbd.REP_ERR_UNSUP, 0xFFFFFFFF):
            if value:
                head = nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, 8, kind, value)
                yield f"reply length {value} of {kind:#x}", greeting + head
    yield "replies without end", greeting + reply(8, nbd.REP_INFO) * 5000
    start = greeting + STRUCTURED
    for payload in (b"", b"abc", bytes(4), bytes(4) + b"x:y", bytes(4) + b"\xff\xfe"):
        yield "context", start + reply(10, nbd.REP_META_CONTEXT, payload) + ENOUGH
    yield "context twice", start + CONTEXT + CONTEXT + ENOUGH
    start += CONTEXT + ENOUGH
    for size in WIDE:
        if size > 1 << 62:
            yield f"size {size}", start + export(size) + GONE
    yield "no transmission flags", start + export(SIZE, 0) + GONE
    yield "no export", start + GONE
    for length in range(12):
        yield "short export", start + reply(7, nbd.REP_INFO, bytes(length)) + GONE
    yield "long export", start + reply(7, nbd.REP_INFO, nbd.info_export(SIZE, 1) + b"x") + GONE
    for minimum, preferred, maximum in (
        (0, 4096, 1 << 20), (3, 4096, 1 << 20), (1 << 17, 1 << 17, 1 << 20), (512, 256, 1 << 20),
        (1, 4095, 1 << 20), (1, 4096, 0), (1, 4096, 4095), (4096, 4096, 4097),
        (1, 1 << 31, 1 << 31), (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    ):  # fmt: skip
        sizes = blocks(minimum, preferred, maximum)
        yield f"blocks of {minimum}, {preferred}, {maximum}", start + sizes + export(SIZE) + GONE
    yield "a torn block", start + blocks(4096, 4096, 1 << 20) + export(SIZE + 1) + GONE
    for error in (nbd.REP_ERR_UNKNOWN, nbd.REP_ERR_TLS_REQD, nbd.ERROR | 77):
        for text in (b"", b"\x1b[2J\n\xff" * 20, b"x" * 60_000):
            yield f"error {error:#x}", start + reply(7, error, text)


def test_every_absurd_handshake_is_refused_in_one_line(server: Scripted, tmp_path: Path) -> None:
    count = 0
    for what, says in handshakes():
        server.says = says
        with pytest.raises(CowferryError) as refused:
            opened(tmp_path / "s").close()
            pytest.fail(f"taken: {what}")
        text = refused.value.desc
        assert text.isprintable() and len(text) < 5000, what
        assert str(tmp_path) in text
        count += 1
    assert count > 100


def test_what_is_odd_and_right_is_taken(server: Scripted, tmp_path: Path) -> None:
    start = nbd.greeting() + STRUCTURED + CONTEXT + ENOUGH
    for size in (0, 1, 1 << 62):
        server.says = start + export(size) + GONE
        node = opened(tmp_path / "s")
        assert node.size == size
        node.close()
    server.says = start + blocks(1, 4096, 0xFFFFFFFF) + export(SIZE, 0xFFFF ^ nbd.READ_ONLY) + GONE
    node = opened(tmp_path / "s")
    assert node.maximum == nbd.MAX_REQUEST
    node.close()


def test_a_trickle_does_not_hold_the_door_open(tmp_path: Path) -> None:
    server = Scripted(tmp_path / "s", hello(SIZE)[:50])
    server.stays = True
    address, name = parse_uri(uri(tmp_path / "s"))
    with pytest.raises(TimeoutError):
        Link(connect(address, 5), name, "there", timeout=0.2)
    server.close()


CONTENT = bytes(range(256)) * (READ // 256)


def answers_to_a_read() -> Iterator[tuple[str, bytes]]:
    """Wrong answers to a read of READ bytes at READ."""
    for magic in WIDE:
        yield "magic", struct.pack(">QQI", magic, 1, 0)
    for cookie in WIDE:
        if cookie != 1:
            yield f"cookie {cookie}", data(READ, CONTENT, cookie)
            yield f"simple cookie {cookie}", nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, cookie)
    yield "simple reply", nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, 1) + CONTENT
    for offset in (*WIDE, READ - 1, READ + 1):
        if offset != READ:
            yield f"offset {offset}", data(offset, CONTENT)
            yield f"hole at {offset}", chunk(nbd.CHUNK_HOLE, struct.pack(">QI", offset, READ))
    for size in ABSURD:
        if size != READ:
            yield f"hole of {size}", chunk(nbd.CHUNK_HOLE, struct.pack(">QI", READ, size))
        head = nbd.CHUNK.pack(nbd.CHUNK_MAGIC, 1, nbd.CHUNK_DATA, 1, size)
        yield f"data in {size}", head + struct.pack(">Q", READ) + bytes(20)
        for kind in (nbd.CHUNK_NONE, nbd.CHUNK_STATUS, 3, 4, 6, 0x7FFF, 0x8001, 0x8002, 0xFFFF):
            if size or kind:
                yield f"{kind} in {size}", nbd.CHUNK.pack(nbd.CHUNK_MAGIC, 1, kind, 1, size)
    yield "nothing", chunk(nbd.CHUNK_NONE)
    yield "half", data(READ, CONTENT[: READ // 2])
    yield "half, and none", data(READ, CONTENT[: READ // 2], flags=0) + chunk(nbd.CHUNK_NONE)
    yield "twice", data(READ, CONTENT, flags=0) + data(READ, CONTENT)
    yield "overlap", data(READ, CONTENT[:40_000], flags=0) + data(READ + 30_000, CONTENT[30_000:])
    yield "none without an end", chunk(nbd.CHUNK_NONE, flags=0) * 100_000
    yield "empty data without an end", data(READ, b"", flags=0) * 100
    yield "errors without an end", chunk(0x8001, struct.pack(">IH", 5, 0), flags=0) * 70_000
    yield "status", chunk(nbd.CHUNK_STATUS, nbd.block_status(7, [(READ, 0)]))
    yield "no error", chunk(0x8001, struct.pack(">IH", 0, 0))
    yield "error text beyond", chunk(0x8001, struct.pack(">IH", 5, 60_000) + b"x")


def test_every_absurd_answer_to_a_read_is_EIO_for_good(server: Scripted, tmp_path: Path) -> None:
    count = 0
    for what, answer in answers_to_a_read():
        server.says = hello(SIZE) + answer
        node = opened(tmp_path / "s")
        buf = memoryview(bytearray(READ))
        for _ in range(2):  # it is not asked again, or every request would be a new attempt
            with pytest.raises(OSError) as failed:
                node.pread(buf, READ)
                pytest.fail(f"taken: {what}")
            assert failed.value.errno == errno.EIO, what
            server.says = hello(SIZE) + data(READ, CONTENT)
            if not node._over:  # it hung up in the middle: that may happen to anybody
                break
        node.close()
        count += 1
    assert count > 150


def test_good_answers_in_every_shape(server: Scripted, tmp_path: Path) -> None:
    """Or the tests above would pass for a client that refuses everything."""
    third = READ // 3
    pieces = [(READ + a, CONTENT[a:b]) for a, b in ((0, third), (third, 99), (99, READ)) if b > a]
    shapes = {
        "whole": data(READ, CONTENT),
        "then done": data(READ, CONTENT, flags=0) + chunk(nbd.CHUNK_NONE),
        "backwards": data(READ + third, CONTENT[third:], flags=0) + data(READ, CONTENT[:third]),
        "byte by byte": b"".join(
            data(READ + i, CONTENT[i : i + 1], flags=i == READ // 2 - 1) for i in range(READ // 2)
        ),
    }
    assert pieces
    for what, answer in shapes.items():
        server.says = hello(SIZE) + answer
        node = opened(tmp_path / "s")
        length = READ // 2 if what == "byte by byte" else READ
        buf = memoryview(bytearray(length))
        node.pread(buf, READ)
        assert bytes(buf) == CONTENT[:length], what
        node.close()
    server.says = hello(SIZE) + chunk(nbd.CHUNK_HOLE, struct.pack(">QI", READ, READ))
    node = opened(tmp_path / "s")
    buf = memoryview(bytearray(b"x" * READ))
    node.pread(buf, READ)
    assert bytes(buf) == bytes(READ)
    node.close()


def statuses() -> Iterator[tuple[str, bytes]]:
    """Wrong answers to a question about all SIZE bytes."""
    for runs in (
        [], [(0, 0)], [(0, 3), (SIZE, 0)], [(SIZE, 0), (1, 0)], [(SIZE * 2, 0), (SIZE, 3)],
        [(4096, 0), (0, 0)], [(0xFFFFFFFF, 3)] * 3, [(512, 3)] * (SIZE // 512 + 1),
    ):  # fmt: skip
        yield f"runs {runs[:3]}", chunk(nbd.CHUNK_STATUS, nbd.block_status(7, runs))
    for context in ABSURD:
        yield "context", chunk(nbd.CHUNK_STATUS, nbd.block_status(context, [(SIZE, 0)]))
    good = chunk(nbd.CHUNK_STATUS, nbd.block_status(7, [(SIZE, 0)]), flags=0)
    yield "twice", good + chunk(nbd.CHUNK_STATUS, nbd.block_status(7, [(SIZE, 3)]))
    yield "none", chunk(nbd.CHUNK_NONE)
    yield "data", data(0, bytes(SIZE))
    yield "simple", nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, 1)
    for length in (0, 1, 4, 8, 11, 13):
        yield f"{length} bytes", chunk(nbd.CHUNK_STATUS, bytes(length))
    yield "2 GiB", nbd.CHUNK.pack(nbd.CHUNK_MAGIC, 1, nbd.CHUNK_STATUS, 1, 1 << 31)


def test_every_absurd_block_status_is_EIO(server: Scripted, tmp_path: Path) -> None:
    for what, answer in statuses():
        server.says = hello(SIZE) + answer
        node = opened(tmp_path / "s")
        with pytest.raises(OSError) as failed:
            list(node.extents(0, SIZE))
            pytest.fail(f"taken: {what}")
        assert failed.value.errno == errno.EIO, what
        node.close()
    # Beyond the range only the last run may go; it is clipped.
    for runs in ([(1 << 31, 3)], [(4096, 0), (0xFFFFFFFF, 3)]):
        server.says = hello(SIZE) + chunk(nbd.CHUNK_STATUS, nbd.block_status(7, runs))
        node = opened(tmp_path / "s")
        found = list(node.extents(0, SIZE))
        assert sum(e.length for e in found) == SIZE and found[-1].state is State.ZERO
        node.close()


class Miser(Forgetful):
    """Tells of one byte at a time."""

    def _answer(self, kind: int, *rest: Any) -> bytes:
        if kind == nbd.BLOCK_STATUS:
            flags, cookie, offset, _, payload = rest
            rest = (flags, cookie, offset, 1, payload)
        return super()._answer(kind, *rest)


def test_a_server_that_tells_one_byte_at_a_time_is_not_asked_for_ever(tmp_path: Path) -> None:
    server = Miser(tmp_path / "s", SIZE)
    node = opened(tmp_path / "s")
    assert sum(e.length for e in node.extents(0, SIZE)) == SIZE
    assert len(server.asked) <= 16 + SIZE // MANY
    node.close()
    server.crash()


def test_it_hangs_up_after_every_byte(server: Scripted, tmp_path: Path) -> None:
    """Of the handshake, and of an answer."""
    handshake = hello(SIZE)
    for n in range(len(handshake)):
        server.says = handshake[:n]
        with pytest.raises(CowferryError):
            opened(tmp_path / "s")
            pytest.fail(f"taken: {n} bytes")
    small = data(0, b"0123456789" * 10, flags=0) + chunk(nbd.CHUNK_NONE)
    for n in range(len(small) + 1):
        server.says = handshake + small[:n]
        node = opened(tmp_path / "s")
        buf = memoryview(bytearray(100))
        if n == len(small):
            node.pread(buf, 0)
            assert bytes(buf) == b"0123456789" * 10
        else:
            with pytest.raises(OSError) as failed:
                node.pread(buf, 0)
                pytest.fail(f"taken: {n} bytes")
            assert failed.value.errno == errno.EIO
        node.close()


def test_nobodys_buffer_changes_after_his_request_has_failed(
    server: Scripted, tmp_path: Path
) -> None:
    """Eight requests, one wrong answer: all fail, and what comes later is nobody's."""
    server.says = hello(SIZE) + data(0, b"a" * 512, cookie=99) + data(0, b"b" * 512, cookie=1)
    node = opened(tmp_path / "s")
    buffers = [memoryview(bytearray(512)) for _ in range(8)]
    failed: list[int | None] = []

    def read(buf: memoryview) -> None:
        try:
            node.pread(buf, 0)
        except OSError as error:
            failed.append(error.errno)

    threads = [threading.Thread(target=read, args=(b,)) for b in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert failed == [errno.EIO] * 8
    assert all(bytes(b) == bytes(512) for b in buffers)
    node.close()


def test_error_texts_are_clipped_and_made_plain(server: Scripted, tmp_path: Path) -> None:
    text = b"\x1b[31m\n\xff" * 1000
    payload = struct.pack(">IH", nbd.ERRNOS[errno.ENOSPC], len(text)) + text
    server.says = hello(SIZE, EVERYTHING) + chunk(nbd.CHUNK_ERROR, payload)
    node = opened(tmp_path / "s")
    with pytest.raises(OSError) as failed:
        node.pwrite(memoryview(b"x"), 0)
    assert failed.value.errno == errno.ENOSPC
    assert str(failed.value).isprintable() and len(str(failed.value)) < 20_000
    node.close()
