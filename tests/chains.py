"""Chains of images for tests: a raw base of known bytes, overlays on it, and a flat oracle."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.drivers import opening


def make_base(folder: Path, size: int, seed: int = 1) -> bytearray:
    """`base.raw` of random bytes with a hole in its third quarter; returns its bytes."""
    oracle = bytearray(random.Random(seed).randbytes(size))
    hole = slice(size // 2, size // 2 + size // 4)
    oracle[hole] = bytes(len(oracle[hole]))
    path = folder / "base.raw"
    with open(path, "wb") as f:
        f.write(oracle[: hole.start])
        f.seek(hole.stop)
        f.write(oracle[hole.stop :])
        f.truncate(size)
    return oracle


def overlay(folder: Path, name: str, backing: str, format: str, size: int, **options: str) -> Path:
    """An overlay `folder/name`, qcow2 or QED by its name, on `backing` (in the same folder)."""
    path = folder / name
    kind = "qed" if path.suffix == ".qed" else "qcow2"
    opening.create_image(
        str(path), kind, size, {"backing_file": backing, "backing_fmt": format, **options}
    )
    return path


def chain_of_disks(folder: Path, names: list[str], size: int) -> bytearray:
    """Images over each other, base first, each with bytes of its own; what the top reads as."""
    oracle = make_base(folder, size)
    assert names[0] == "base.raw"
    rnd = random.Random(2)
    for below, name in itertools.pairwise(names):
        format = "raw" if below.endswith(".raw") else "qcow2"
        node = opening.open_image(str(overlay(folder, name, below, format, size)))
        for _ in range(8):
            data = rnd.randbytes(rnd.choice([512, 30_000, 65_536]))
            offset = rnd.randrange(size - len(data))
            node.pwrite(memoryview(data), offset)
            oracle[offset : offset + len(data)] = data
        opening.close_chain(node)
    return oracle


def overlay_disk(folder: Path, size: int, **options: str) -> tuple[Disk, bytearray]:
    """A disk over `vm.qcow2` <- `base.raw`, and the flat bytes that it must read as."""
    oracle = make_base(folder, size)
    path = overlay(folder, "vm.qcow2", "base.raw", "raw", size, **options)
    return Disk(opening.open_image(str(path)), "vm"), oracle


def contents(target: Disk | Node) -> bytearray:
    """All bytes of a disk or node."""
    got = bytearray(target.size)
    target.pread(memoryview(got), 0)
    return got


def differs(got: bytes | bytearray, want: bytes | bytearray) -> str:
    """Where two byte strings first differ, in words; empty if nowhere."""
    if got == want:
        return ""
    if len(got) != len(want):
        return f"{len(got)} bytes, not {len(want)}"
    at = next(i for i in range(len(got)) if got[i] != want[i])
    wrong = sum(
        got[i : i + 512] != want[i : i + 512] for i in range(at // 512 * 512, len(got), 512)
    )
    return f"first at {at}; {wrong} sectors"
