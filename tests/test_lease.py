"""The table of leases: what filling it costs. What the leases say is tested in test_disk.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cowferry.block.lease import DATA, SPAN, Leases
from cowferry.drivers import opening

PIECE = 8 << 10  # bytes from one written block to the next: eight to a granule


def calls_of_one_fill(path: Path, granules: int, read_only: bool) -> int:
    """How many functions one fill calls, of a raw file in as many pieces as there can be."""
    opening.create_image(str(path), "raw", granules << 16, {})
    fd = os.open(path, os.O_WRONLY)
    for at in range(0, granules << 16, PIECE):
        os.pwrite(fd, b"x", at)
    os.close(fd)
    node = opening.open_image(str(path), "raw", read_only=read_only)
    leases = Leases(node.granule)
    assert granules <= SPAN
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        leases.fill(node, 0, node.size)
    finally:
        sys.setprofile(None)
    assert read_only or leases.tables[0][0] & DATA
    node.close()
    return calls


@pytest.mark.parametrize("read_only", [False, True])
def test_filling_from_a_fragmented_file_costs_as_much_for_each_piece(
    tmp_path: Path, read_only: bool
) -> None:
    """Written in place, its pieces are one lease; read-only, each is looked at by itself."""
    some, more = (calls_of_one_fill(tmp_path / f"{n}.raw", n, read_only) for n in (32, 128))
    assert more < 5 * some, "four times the pieces"
