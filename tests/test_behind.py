"""What a long copy has written leaves memory behind it, and is on disk all the same."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from cowferry.block import behind
from cowferry.block.behind import Behind

PIECE = 1 << 20


def resident(path: Path, length: int) -> int:
    """How many bytes of a file are in the page cache."""
    fd = os.open(path, os.O_RDWR)
    view = mmap.mmap(fd, length)
    os.close(fd)
    flags = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), flags) == 0
    return sum(f & 1 for f in flags) * mmap.PAGESIZE


def test_all_but_the_end_of_the_trail_leaves_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "KEEP", 4 * PIECE)
    path, want = tmp_path / "copy.raw", os.urandom(16 * PIECE)
    trail = Behind()
    with open(path, "w+b", buffering=0) as f:
        for at in range(0, len(want), PIECE):
            os.pwrite(f.fileno(), want[at : at + PIECE], at)
            trail.wrote(f.fileno(), at, PIECE)
            trail.catch_up()
        there = resident(path, len(want))
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(path, len(want)):
            pytest.skip("a file system in memory lets go of nothing")
        assert 0 < there <= 5 * PIECE
        trail.close()
    assert path.read_bytes() == want


def test_a_trail_needs_no_descriptor_when_it_is_over(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    trail = Behind()
    with open(tmp_path / "a", "wb", buffering=0) as a, open(tmp_path / "b", "wb", buffering=0) as b:
        for f in (a, b):
            f.write(bytes(PIECE))
            trail.wrote(f.fileno(), 0, PIECE)
            trail.wrote(f.fileno(), 0, 4096)  # too little to be looked after
    trail.close()
    assert set(os.listdir("/proc/self/fd")) == before
