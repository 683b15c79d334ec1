"""A qcow2 image's ordered flush and its resize: what may come between their steps, or fail there.

Clusters of 512 bytes make every table small: 64 clusters in an L2 table, 256 in a refcount block.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs
from cowferry.block.disk import Disk
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.qcow2 import header, refcounts
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.errors import CowferryError
from orders import Other, failing, on_call, until

CLUSTER = 512
SPAN = 64 * CLUSTER  # bytes of the disk in one L2 table
SIZE = 256 << 10


def make(folder: Path, name: str, size: int = SIZE, **options: Any) -> Path:
    path = folder / name
    opening.create_image(str(path), "qcow2", size, {"cluster_size": CLUSTER, **options})
    return path


def opened(path: Path, **how: Any) -> Qcow2:
    node = opening.open_image(str(path), "qcow2", **how)
    assert isinstance(node, Qcow2)
    return node


def put(image: Qcow2, oracle: bytearray, offset: int, data: bytes) -> None:
    image.pwrite(memoryview(data), offset)
    oracle[offset : offset + len(data)] = data


def judge(path: Path, *oracles: bytearray) -> None:
    """What is on disk is sound, but for leaks (Q2), and each cluster reads as one of these."""
    image = opened(path, read_only=True, force_share=True)
    assert image.check().corruptions == 0
    got = contents(image)
    image.close()
    if len(oracles) == 1:
        assert not differs(got, oracles[0])
    for at in range(0, len(got), CLUSTER):
        assert any(got[at : at + CLUSTER] == want[at : at + CLUSTER] for want in oracles), at


# What a flush is writing is not read again from the file before it is there -------------------


def test_Q1_an_L2_table_stays_in_memory_while_a_flush_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guests go on meanwhile, and need room for other tables."""
    path, oracle = make(tmp_path, "vm.qcow2"), bytearray(SIZE)
    image = opened(path)
    for table in range(1, 8):
        put(image, oracle, table * SPAN, b"o" * CLUSTER)
    image.close()
    image = opened(path)
    image.map.keep = 2
    put(image, oracle, 0, b"A" * CLUSTER)
    seen = bytearray(CLUSTER)

    def guests() -> None:
        for table in range(1, 8):
            image.pread(memoryview(bytearray(CLUSTER)), table * SPAN)
        image.pread(memoryview(seen), 0)
        put(image, oracle, CLUSTER, b"B" * CLUSTER)  # into the same table

    on_call(monkeypatch, image.file, "flush", guests)
    image.flush()
    assert seen == b"A" * CLUSTER
    image.flush()
    assert not differs(contents(image), oracle)
    judge(path, oracle)
    image.close()


def test_Q1_a_refcount_block_stays_in_memory_while_a_flush_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a cluster that was just taken would count as free, and be taken twice."""
    monkeypatch.setattr(refcounts, "CLEAN_BLOCKS", 1)
    path, oracle = make(tmp_path, "vm.qcow2", 1 << 20), bytearray(1 << 20)
    image = opened(path)
    put(image, oracle, 0, b"o" * SIZE)
    image.flush()
    image.discard(SIZE // 2, 8 * CLUSTER)
    oracle[SIZE // 2 : SIZE // 2 + 8 * CLUSTER] = bytes(8 * CLUSTER)
    image.close()
    image = opened(path)
    counts = image.refcounts
    put(image, oracle, 600 << 10, b"A" * CLUSTER)
    (taken,) = (e.host // CLUSTER for e in image.extents(600 << 10, CLUSTER))
    block = taken // counts.per_block
    assert block in counts.dirty
    seen: list[int] = []

    def guests() -> None:
        for index in range(len(counts.table)):
            if index != block:
                counts.block(index)
        seen.append(counts.get(taken))
        counts.forget_free()  # so that it looks for free clusters
        put(image, oracle, 800 << 10, b"B" * CLUSTER)

    on_call(monkeypatch, image, "_write", guests)
    image.flush()
    assert seen == [1]
    image.flush()
    assert not differs(contents(image), oracle)
    judge(path, oracle)
    image.close()


def test_E2_a_flush_that_fails_at_any_write_forgets_nothing(tmp_path: Path) -> None:
    nth, failed = 0, True
    while failed:
        nth += 1
        with pytest.MonkeyPatch.context() as patch:
            path, oracle = make(tmp_path, f"{nth}.qcow2"), bytearray(SIZE)
            image = opened(path)
            for table in range(3):
                put(image, oracle, table * SPAN, b"A" * CLUSTER)
            on_call(patch, image, "_write", failing(errno.ENOSPC), nth)
            try:
                image.flush()
                failed = False
            except OSError:
                judge(path, bytearray(SIZE), oracle)
            patch.undo()
            put(image, oracle, 3 * SPAN, b"B" * CLUSTER)
            image.flush()
            judge(path, oracle)
            image.close()
    assert nth > 4, "refcounts, L2 tables and L1 entries"


# Resize ---------------------------------------------------------------------------------------


def test_Q1_a_flush_that_comes_in_a_resize_does_not_free_the_L1_table_in_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, oracle = make(tmp_path, "vm.qcow2"), bytearray(SIZE)
    image = opened(path)
    put(image, oracle, 0, b"A" * SIZE)
    image.flush()
    flushes: list[Other] = []
    cut = tmp_path / "cut.qcow2"

    def flush() -> None:
        """It comes while the new table is being made, and is the next to have its turn."""
        flushes.append(Other(image.flush))
        until(image.flushing.locked, "the flush has its turn, or the resize has")

    on_call(monkeypatch, image, "_write", flush)
    on_call(monkeypatch, image, "write_header", lambda: shutil.copy(path, cut))
    image.resize(2 * SIZE)
    flushes[0].end()
    judge(cut, oracle)
    judge(path, oracle + bytes(SIZE))
    image.close()


def test_E2_a_resize_that_fails_at_any_write_leaves_the_image_on_its_old_tables(
    tmp_path: Path,
) -> None:
    """What is mapped and flushed later is there after the image is opened again."""
    nth, failed = 0, True
    while failed:
        nth += 1
        with pytest.MonkeyPatch.context() as patch:
            path, oracle = make(tmp_path, f"{nth}.qcow2"), bytearray(SIZE)
            image = opened(path)
            put(image, oracle, 0, b"A" * CLUSTER)
            image.flush()
            on_call(patch, image, "_write", failing(errno.ENOSPC), nth)
            try:
                image.resize(2 * SIZE)
                failed = False
                oracle += bytes(SIZE)
            except OSError:
                assert image.size == SIZE
            patch.undo()
            put(image, oracle, 5 * SPAN, b"B" * CLUSTER)
            image.flush()
            judge(path, oracle)
            if failed:
                image.resize(2 * SIZE)
                put(image, oracle, 6 * SPAN, b"C" * CLUSTER)
                image.flush()
                judge(path, oracle + bytes(SIZE))
            image.close()
    assert nth > SIZE // SPAN, "each entry of the new table, and the header"


# Access ---------------------------------------------------------------------------------------


def mark_corrupt(path: Path) -> None:
    with open(path, "r+b") as f:
        f.seek(72)
        f.write(header.CORRUPT.to_bytes(8, "big"))


def test_Q4_an_image_marked_corrupt_is_not_made_writable_later(tmp_path: Path) -> None:
    path = make(tmp_path, "vm.qcow2")
    mark_corrupt(path)
    before = path.read_bytes()
    image = opened(path, read_only=True)
    with pytest.raises(CowferryError, match="marked corrupt"):
        image.reopen(False)
    assert image.read_only and image.file.read_only
    with pytest.raises(OSError):
        image.pwrite(memoryview(b"x" * CLUSTER), 0)
    image.close()
    assert path.read_bytes() == before


def test_a_reopen_that_fails_halfway_is_undone(tmp_path: Path) -> None:
    """The file was opened for writing and the data file could not be: neither is."""
    path, data = make(tmp_path, "vm.qcow2", data_file="vm.data"), tmp_path / "vm.data"
    image = opened(path, read_only=True)
    other = opening.open_image(str(data), "raw", read_only=True)  # shares no writing
    with pytest.raises(CowferryError, match=r"vm\.data"):
        image.reopen(False)
    assert image.read_only and image.file.read_only and image.data.read_only
    other.close()
    reader = opened(path, read_only=True)  # as before, others may read it beside us
    reader.close()
    image.reopen(False)
    image.pwrite(memoryview(b"x" * CLUSTER), 0)
    image.close()


def test_a_reopen_of_several_nodes_is_all_or_none(tmp_path: Path) -> None:
    sound, corrupt = make(tmp_path, "sound.qcow2"), make(tmp_path, "corrupt.qcow2")
    mark_corrupt(corrupt)
    daemon = Daemon()
    try:
        for path, read_only in ((sound, False), (corrupt, True)):
            options = opening.image_options(str(path), "qcow2", read_only=read_only)
            daemon.execute("blockdev-add", {**options, "node-name": path.stem})
        disk: Disk = daemon.graph.disk("sound")
        changes = [
            {"driver": "qcow2", "node-name": "sound", "read-only": True},
            {"driver": "qcow2", "node-name": "corrupt", "read-only": False},
        ]
        with pytest.raises(CowferryError, match="marked corrupt"):
            daemon.execute("blockdev-reopen", {"options": changes})
        assert not disk.read_only
        assert daemon.graph.node("corrupt").read_only
        disk.pwrite(memoryview(b"x" * CLUSTER), 0)
        assert contents(disk)[:CLUSTER] == b"x" * CLUSTER
        assert not daemon.graph.claims
    finally:
        daemon.close()
