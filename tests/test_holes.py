"""Where holes are: asked once, never wrong after a write, and not at all on devices."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chains import contents, make_base
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.holes import Runs
from cowferry.block.node import Node, State
from cowferry.cli.offline.info import info_command
from cowferry.cli.offline.map import map_command
from cowferry.drivers import opening
from cowferry.drivers.file import File
from loops import loop
from tests_support import need

MiB = 1 << 20
UNIT = 4096


# What is remembered ------------------------------------------------------------------------

ranges = st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 20))


@given(st.lists(ranges, max_size=30))
def test_runs_hold_what_was_added_and_not_what_was_removed(changes: list[Any]) -> None:
    runs, want = Runs(), set[int]()
    for add, start, length in changes:
        stop = start + length
        if add:
            runs.add(start, stop)
            want |= set(range(start, stop))
        else:
            runs.remove(start, stop)
            want -= set(range(start, stop))
        pairs = list(zip(runs.starts, runs.stops, strict=True))
        assert {i for a, b in pairs for i in range(a, b)} == want
        assert all(b < a for (_, b), (a, _) in itertools.pairwise(pairs))
        for at in range(85):
            stop = runs.around(at)
            assert (at in want) == bool(stop)
            assert not stop or (stop not in want and want >= set(range(at, stop)))
            assert runs.before(at) == max([b for a, b in pairs if a <= at], default=0)


def file_node(path: Path, read_only: bool = False, **more: Any) -> File:
    return File.open(
        File.Options(driver="file", filename=str(path), read_only=read_only, **more), {}
    )


def states(node: Node, offset: int, length: int) -> list[tuple[int, int, State]]:
    """(start, stop, state) of the runs of a range, equal neighbours joined."""
    out: list[tuple[int, int, State]] = []
    for e in node.extents(offset, length):
        if out and out[-1][2] is e.state:
            out[-1] = (out[-1][0], offset + e.length, e.state)
        else:
            out.append((offset, offset + e.length, e.state))
        offset += e.length
    return out


def check_no_data_is_called_a_hole(node: Node, want: bytes | bytearray) -> None:
    for start, stop, state in states(node, 0, len(want)):
        assert state is State.DATA or not any(want[start:stop]), f"lost {start} to {stop}"


changes = st.tuples(
    st.sampled_from(["pwrite", "lease", "punch", "zero", "unmap", "room", "resize", "clone"]),
    st.integers(0, 63),
    st.integers(1, 16),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(changes, max_size=12))
def test_a_hole_is_told_only_where_nothing_was_written(tmp_path: Path, work: list[Any]) -> None:
    path, other = tmp_path / "image", tmp_path / "other"
    size = 64 * UNIT
    path.write_bytes(b"")
    os.truncate(path, size)
    other.write_bytes(b"")
    os.truncate(other, size)
    want = bytearray(size)
    source = os.open(other, os.O_RDONLY)
    node = file_node(path)
    try:
        for what, first, count in work:
            offset = first * UNIT
            length = min(count * UNIT, size - offset)
            here = slice(offset, offset + length)
            list(node.extents(0, size))  # all of it is known now
            if what in ("pwrite", "lease"):
                data = b"x" * length
                if what == "pwrite":
                    node.pwrite(memoryview(data), offset)
                else:
                    sysio.pwrite(node.fd, data, offset)
                want[here] = data
            elif what == "room":
                node.take_room(offset, length)
            elif what == "resize":
                node.resize(offset)
                node.resize(size)
                want[offset:] = bytes(size - offset)
            elif what == "clone":
                sysio.copy_range(source, offset, node.fd, offset, length)
                want[here] = bytes(length)
            else:
                if what == "punch":
                    node.punch(offset, length)
                else:
                    node.zero(offset, length, unmap=what == "unmap")
                want[here] = bytes(length)
            check_no_data_is_called_a_hole(node, want)
            assert path.read_bytes() == want
            node.flush()  # what is written is data for the kernel, too, only then on some
            fresh = file_node(path, read_only=True, locking="off")
            told, expected = states(node, 0, size), states(fresh, 0, size)
            fresh.close()
            assert told == expected, f"after {what}"
    finally:
        node.close()
        os.close(source)


class Asked:
    """Counts the questions to the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.real: Callable[[int, int, int], int] = os.lseek
        monkeypatch.setattr(os, "lseek", self.lseek)

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        self.count += whence in (os.SEEK_DATA, os.SEEK_HOLE)
        return self.real(fd, offset, whence)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_first_writes_into_an_overlay_ask_once_for_each_region(
    tmp_path: Path, asked: Asked
) -> None:
    oracle = bytearray(random.Random(1).randbytes(8 * MiB))
    (tmp_path / "base.raw").write_bytes(oracle)
    options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    for name in ("vm.qcow2", "vm.qed"):
        opening.create_image(str(tmp_path / name), name[3:], len(oracle), options)
        disk = Disk(opening.open_image(str(tmp_path / name)), "vm")
        asked.count = 0
        want = bytearray(oracle)
        for i in range(len(oracle) // 65536 - 1, 0, -1):
            disk.pwrite(memoryview(b"z" * 512), i * 65536 + 4096)
            want[i * 65536 + 4096 : i * 65536 + 4096 + 512] = b"z" * 512
        assert asked.count <= 3
        assert contents(disk) == want
        opening.close_chain(disk.root)


def test_serving_a_file_that_guests_write_asks_nothing(tmp_path: Path, asked: Asked) -> None:
    make_base(tmp_path, 4 * MiB)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw")), "vm")
    buf = memoryview(bytearray(4096))
    for at in range(0, 4 * MiB, 65536):
        disk.pread(buf, at)
        disk.pwrite(buf, at)
        disk.zero(at, 512, unmap=True)
    assert asked.count == 0
    opening.close_chain(disk.root)


def test_the_holes_of_a_base_are_asked_for_once(tmp_path: Path, asked: Asked) -> None:
    path = tmp_path / "base.raw"
    with open(path, "wb") as f:
        for _ in range(16):
            f.write(b"d" * 65536)
            f.seek(65536 * 3, 1)
        f.truncate(4 * MiB)
    node = opening.open_image(str(path), read_only=True)
    first = states(node, 0, 4 * MiB)
    assert sum(s is State.ZERO for *_, s in first) == 16
    asked.count = 0
    for at in range(4 * MiB - 4096, -1, -4096):
        list(node.extents(at, 4096))
    assert states(node, 0, 4 * MiB) == first and asked.count == 0
    node.reopen(read_only=False)  # a commit into it begins
    node.pwrite(memoryview(b"c" * 4096), 2 * MiB - 8192)
    node.reopen(read_only=True)
    check_no_data_is_called_a_hole(node, path.read_bytes())
    node.close()


def test_holes_are_not_remembered_of_a_file_that_others_may_write(tmp_path: Path) -> None:
    path = tmp_path / "base.raw"
    path.write_bytes(b"")
    os.truncate(path, MiB)
    for more in ({"force_share": True}, {"locking": "off"}):
        node = file_node(path, read_only=True, **more)
        assert states(node, 0, MiB)[0][2] is State.ZERO
        with open(path, "r+b") as f:
            f.write(b"data")
        check_no_data_is_called_a_hole(node, path.read_bytes())
        node.close()
        os.truncate(path, 0)
        os.truncate(path, MiB)


def test_what_a_read_only_overlay_copies_of_a_sparse_base_stays_sparse(tmp_path: Path) -> None:
    path = tmp_path / "base.raw"
    path.write_bytes(b"")
    os.truncate(path, 64 * MiB)
    options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    top = tmp_path / "vm.qcow2"
    opening.create_image(str(top), "qcow2", 64 * MiB, {**options, "cluster_size": 2 * MiB})
    disk = Disk(opening.open_image(str(top)), "vm")
    for at in range(0, 64 * MiB, 2 * MiB):
        disk.pwrite(memoryview(b"x" * 4096), at + MiB)
    opening.close_chain(disk.root)
    assert top.stat().st_blocks * 512 < 8 * MiB, "zeroes were copied"


# Devices -----------------------------------------------------------------------------------


def qemu(*words: str) -> str:
    need("qemu-img", "qemu-io")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def drop_cache(device: str) -> None:
    subprocess.run(["blockdev", "--flushbufs", device], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "device.img"
    path.write_bytes(b"\xaa" * (12 * MiB))
    return path


@pytest.mark.parametrize("options", ["compat=1.1", "preallocation=metadata", "cluster_size=4k"])
def test_an_image_on_a_device_has_data_where_data_is(
    tmp_path: Path, image: Path, options: str
) -> None:
    with loop(image) as device:
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, device, "8M")
        for word in ("write -P 7 1M 2M", "write -P 8 5M 64k", "write -z 2M 512k"):
            qemu("qemu-io", "-f", "qcow2", "-c", word, device)
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", device, str(tmp_path / "want"))
        want = (tmp_path / "want").read_bytes()
        drop_cache(device)
        disk = Disk(opening.open_image(device, "qcow2", read_only=True), "vm")
        at = 0
        for e in disk.extents(0, disk.size):
            assert e.state is State.DATA or not any(want[at : at + e.length]), f"{at} is lost"
            at += e.length
        assert contents(disk) == want
        opening.close_chain(disk.root)
        told = CliRunner().invoke(map_command, ["-f", "qcow2", "--output", "json", device])
        theirs = qemu("qemu-img", "map", "-f", "qcow2", "--output", "json", device)
        assert zero_runs(told.output) == zero_runs(theirs)
        shown = CliRunner().invoke(info_command, ["-f", "qcow2", "--output", "json", device])
        assert json.loads(shown.output)["actual-size"] == 12 * MiB


def zero_runs(text: str) -> list[tuple[int, int]]:
    """(start, stop) of what reads as zero, by a map in JSON."""
    out: list[tuple[int, int]] = []
    for e in json.loads(text):
        start, stop = e["start"], e["start"] + e["length"]
        if e["zero"]:
            if out and out[-1][1] == start:
                out[-1] = (out[-1][0], stop)
            else:
                out.append((start, stop))
    return out


def test_a_data_file_and_a_base_on_devices_are_read_as_they_are(tmp_path: Path) -> None:
    for name, size in (("data.img", 4 * MiB), ("base.img", 4 * MiB)):
        (tmp_path / name).write_bytes(b"\xaa" * size)
    top, over = str(tmp_path / "top.qcow2"), str(tmp_path / "over.qcow2")
    with loop(tmp_path / "data.img") as data, loop(tmp_path / "base.img") as below:
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", top, "4M")
        qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 1M", top)
        drop_cache(data)
        disk = Disk(opening.open_image(top, data_file=data, read_only=True), "vm")
        found = [e for e in disk.extents(MiB, MiB) if e.state is not State.DATA]
        assert not found and contents(disk)[MiB : 2 * MiB] == b"\x09" * MiB
        opening.close_chain(disk.root)
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "raw", over)
        drop_cache(below)
        disk = Disk(opening.open_image(over), "vm")
        assert all(e.state is State.DATA for e in disk.extents(0, 4 * MiB))
        disk.pwrite(memoryview(b"x" * 512), 65536)
        assert contents(disk)[:65536] == b"\xaa" * 65536
        opening.close_chain(disk.root)


def test_a_device_that_was_made_smaller_fails_instead_of_reading_zeroes(image: Path) -> None:
    with loop(image) as device:
        disk = Disk(opening.open_image(device, "raw"), "vm")
        os.truncate(image, 4 * MiB)
        subprocess.run(["losetup", "-c", device], check=True)
        buf = memoryview(bytearray(65536))
        disk.pread(buf, 0)
        with pytest.raises(OSError, match=f"the device ends at {4 * MiB}"):
            disk.pread(buf, 8 * MiB)
        opening.close_chain(disk.root)
