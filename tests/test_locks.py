"""Locks that are refused: the error names the process that holds them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowferry.drivers import holders, opening
from cowferry.errors import CowferryError, DeviceInUse
from daemons import a_daemon
from loops import loop, partition
from tests_support import need

SIZE = 1 << 20

HOLD = """
import sys
from cowferry.drivers import opening
node = opening.open_image(sys.argv[1], "raw", read_only=sys.argv[2] == "read")
print("here", flush=True)
sys.stdin.read()
"""
LOCK_ALL = """
import fcntl, sys
f = open(sys.argv[1], "r+b")
fcntl.lockf(f, fcntl.LOCK_EX)
print("here", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(*command: str) -> Iterator[int]:
    """A program that says a line when it holds the image, until it is told to end."""
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.readline()
        yield child.pid
    finally:
        child.stdin.close()
        child.wait(30)
        child.stdout.close()


@contextmanager
def holding(script: str, path: str, how: str = "write") -> Iterator[int]:
    with running(sys.executable, "-c", script, path, how) as pid:
        yield pid


def refused(path: str, read_only: bool = False) -> str:
    with pytest.raises(DeviceInUse) as error:
        opening.open_image(path, "raw", read_only=read_only)
    assert "failed to get" in error.value.desc and "nothing was changed" in error.value.hint
    return error.value.desc


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "vm.raw"
    path.write_bytes(bytes(SIZE))
    return str(path)


def test_another_cowferry_is_named(image: str) -> None:
    with holding(HOLD, image) as pid:
        for read_only in (False, True):
            said = refused(image, read_only)
            assert f"process {pid} (" in said and os.path.basename(sys.executable) in said
    with holding(HOLD, image, "read") as pid:
        assert f"process {pid} (" in refused(image)
    opening.open_image(image, "raw").close()


def test_the_right_one_of_those_that_have_it_open_is_named(image: str) -> None:
    with holding(HOLD, image, "read") as reader, open(image, "rb"):
        opening.open_image(image, "raw", read_only=True).close()
        assert f"process {reader} (" in refused(image)


def greeted(path: Path) -> None:
    """A server at the socket has sent the first bytes of a handshake."""
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline
        with socket.socket(socket.AF_UNIX) as s:
            try:
                s.connect(str(path))
                s.settimeout(30)
                assert s.recv(8) == b"NBDMAGIC"
                return
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.01)


def test_QEMU_is_named(image: str, tmp_path: Path) -> None:
    need("qemu-nbd")
    where = tmp_path / "q.sock"
    child = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-k", str(where), image])
    try:
        greeted(where)
        said = refused(image)
        assert f"process {child.pid} (qemu-nbd " in said and len(said) < 300
    finally:
        child.terminate()
        child.wait(30)


def test_a_program_that_locked_the_whole_file_is_named(image: str) -> None:
    with holding(LOCK_ALL, image) as pid:
        assert f"process {pid} (" in refused(image)


def test_a_lock_of_this_process_is_its_own(image: str) -> None:
    node = opening.open_image(image, "raw")
    with pytest.raises(CowferryError) as error:
        opening.open_image(image, "raw", read_only=True)
    assert "this process has the image open" in error.value.desc
    node.close()


def test_the_holder_of_a_device_is_named(image: str) -> None:
    with loop(image) as device, holding(HOLD, device) as pid:
        assert f"process {pid} (" in refused(device)


def test_one_that_cannot_be_told_is_another_process(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "PATIENCE", -1.0)  # no time to look
    with holding(HOLD, image):
        assert "another process has the image open" in refused(image)


def test_a_disk_that_does_not_fit_tells_both_sizes(image: str) -> None:
    file = {"driver": "file", "filename": image}
    with pytest.raises(CowferryError, match=f"has {SIZE} bytes, and {2 * SIZE} bytes"):
        opening.open_node({"driver": "raw", "size": 2 * SIZE, "file": file})


# Other names of the same bytes -------------------------------------------------------------


def refused_for(path: str, pid: int, other: str) -> None:
    """Another process has the bytes open under another name."""
    with pytest.raises(DeviceInUse) as error:
        opening.open_image(path, "raw")
    assert f"process {pid} (" in error.value.desc and f"has '{other}' open" in error.value.desc
    assert "nothing was changed" in error.value.hint


def test_a_device_over_a_file_that_another_process_has_open_is_refused(image: str) -> None:
    with loop(image) as lower, loop(lower) as upper, partition(lower, 1, 0, SIZE // 2) as part:
        with holding(HOLD, image) as pid:
            for device in (lower, upper, part):
                refused_for(device, pid, image)
        for device in (lower, upper, part):
            opening.open_image(device, "raw").close()


def test_a_file_under_a_device_that_another_process_has_open_is_refused(image: str) -> None:
    with loop(image) as lower, loop(image) as beside, loop(lower) as upper:
        with holding(HOLD, upper) as pid:
            for path in (image, lower, beside):
                refused_for(path, pid, upper)
        with partition(lower, 1, 0, SIZE // 2) as part, holding(HOLD, part) as pid:
            for path in (image, lower, beside, upper):
                refused_for(path, pid, part)


def test_ranges_that_do_not_overlap_are_used_by_two_processes(image: str) -> None:
    half = str(SIZE // 2)
    with (
        loop(image, "--sizelimit", half) as first,
        loop(image, "-o", half) as second,
        holding(HOLD, first) as pid,
    ):
        opening.open_image(second, "raw").close()
        refused_for(image, pid, first)


def test_readers_share_the_bytes_under_every_name(image: str) -> None:
    with loop(image) as device, holding(HOLD, image, "read") as pid:
        opening.open_image(device, "raw", read_only=True).close()
        refused_for(device, pid, image)
        opening.open_image(device, "raw", read_only=True, force_share=True).close()


def test_an_image_that_is_opened_for_writing_later_is_compared_then(image: str) -> None:
    with loop(image) as device:
        node = opening.open_image(device, "raw", read_only=True)
        with holding(HOLD, image, "read"), pytest.raises((OSError, CowferryError)):
            node.reopen(False)
        node.reopen(False)
        node.close()


def test_what_this_process_has_open_is_told_by_its_user(image: str) -> None:
    with a_daemon() as daemon:
        daemon.open_disk("vm", image)
        with pytest.raises(DeviceInUse, match="is in use by disk 'vm'"):
            daemon.open_disk("other", image)
        with loop(image) as device, pytest.raises(DeviceInUse, match="in use by disk 'vm'"):
            daemon.open_disk("other", device)
