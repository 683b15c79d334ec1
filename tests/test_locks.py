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
from loops import loop
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
