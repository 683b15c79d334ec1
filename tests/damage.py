"""qcow2 images that are damaged on purpose: where their tables are, and what may go wrong there.

Images are made by qemu-img, and places are found by a reader of its own, so that no code that is
tested decides what is right.
"""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chains import differs
from cowferry.drivers import opening
from cowferry.drivers.result import Result
from test_qcow2_peers import by_qemu, qemu_img

OFFSET = 0x00FFFFFFFFFFFE00
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1


class Image:
    """The words of an image file, read and written in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bits, self.size = self.get(20, "I"), self.get(24)
        self.cluster = 1 << self.bits
        self.l1, self.l1_size = self.get(40), self.get(36, "I")
        self.table, self.table_clusters = self.get(48), self.get(56, "I")
        self.snapshots = self.get(64)
        version = self.get(4, "I")
        self.words = 2 if version > 2 and self.get(72) & 16 else 1
        self.first_block = self.block()

    def get(self, at: int, code: str = "Q") -> int:
        if at >= 1 << 43:  # no file is so large
            return 0
        with open(self.path, "rb") as f:
            f.seek(at)
            data = f.read(struct.calcsize(">" + code)).ljust(8, b"\0")
        return int(struct.unpack_from(">" + code, data)[0])

    def put(self, at: int, value: int, code: str = "Q") -> None:
        with open(self.path, "r+b") as f:
            f.seek(at)
            f.write(struct.pack(">" + code, value))

    @property
    def per_table(self) -> int:
        """Guest clusters of one L2 table."""
        return self.cluster // 8 // self.words

    def l2(self, guest: int) -> int:
        """Where the L2 entry of a guest offset is; 0 if there is no table."""
        index, slot = divmod(guest >> self.bits, self.per_table)
        table = self.get(self.l1 + 8 * index) & OFFSET
        return table + 8 * self.words * slot if table else 0

    def block(self, index: int = 0) -> int:
        """Where a refcount block is."""
        return self.get(self.table + 8 * index) & OFFSET

    def host(self, guest: int) -> int:
        """Where the data of a guest offset is."""
        return self.get(self.l2(guest)) & OFFSET

    def set_refcount(self, cluster: int, value: int) -> None:
        """Of 16 bits."""
        self.put(self.block(cluster * 2 >> self.bits) + cluster * 2 % self.cluster, value, "H")


def make(
    path: Path, options: str = "", size: int = 1 << 20, snapshot: bool = True, packed: bool = False
) -> bytes:
    """An image with data, zeroes, holes, and perhaps a snapshot; returns the guest's bytes."""
    rnd = random.Random(options)
    raw = path.with_suffix(".source")
    data = bytearray(size)
    for start in range(0, size, size // 8):
        if rnd.random() < 0.7:
            data[start : start + size // 12] = rnd.randbytes(size // 12)
    raw.write_bytes(data)
    plain = ",".join(o for o in options.split(",") if not o.startswith("data_file"))
    if packed:
        qemu_img("convert", "-c", "-O", "qcow2", *(["-o", plain] if plain else []), raw, path)
    else:
        qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, size)
        qemu_img("convert", "-n", "-O", "qcow2", raw, path)
    if snapshot:
        qemu_img("snapshot", "-c", "one", path)
        io(path, f"write -P 17 0 {size // 16}", f"write -P 18 {size // 2} 5k")
    if not options.startswith("compat=0.10"):
        io(path, f"write -z {size // 4} {size // 16}", f"write -z {size - size // 16} {size // 16}")
    return by_qemu(path)


def io(path: Path, *commands: str) -> None:
    """Commands of qemu-io."""
    more = [word for c in commands for word in ("-c", c)]
    subprocess.run(["qemu-io", "-f", "qcow2", *more, path], check=True, capture_output=True)


def check(path: Path | str, fix: Any = None) -> Result:
    """As `cowferry check` does it."""
    node: Any = opening.open_image(
        str(path), "qcow2", read_only=fix is None, backing=False, repair=True
    )
    try:
        result: Result = node.check(fix)
        return result
    finally:
        node.close()


def verdict(path: Path) -> int:
    """The exit code of qemu-img's check, which looks for a data file in its own folder."""
    return subprocess.run(
        ["qemu-img", "check", path], capture_output=True, cwd=path.parent
    ).returncode


def wrong_bytes(path: Path, want: bytes, touched: set[int]) -> str:
    """Where the guest reads something else, outside of the `touched` clusters; empty if nowhere."""
    node = opening.open_image(str(path), "qcow2", read_only=True, backing=False)
    try:
        step = node.granule
        for at in range(0, len(want), step):
            if at // step not in touched:
                got = bytearray(min(step, len(want) - at))
                node.pread(memoryview(got), at)
                wrong = differs(got, want[at : at + step])
                if wrong:
                    return f"cluster {at // step}: {wrong}"
        return ""
    finally:
        node.close()


@dataclass
class Damage:
    """What was done to an image."""

    guest: set[int] = field(default_factory=set)  # clusters whose mapping was changed
    counts_only: bool = True  # nothing but refcount structures
    done: list[str] = field(default_factory=list)


def damage(image: Image, rnd: random.Random, count: int) -> Damage:
    """Change `count` words of tables at random."""
    out = Damage()
    kinds: list[Callable[[Image, random.Random, Damage], None]] = [
        _table_entry, _table_entry, _block, _block, _l1, _l2, _l2, _snapshot_table, _snapshot_l1,
    ]  # fmt: skip
    for _ in range(count):
        rnd.choice(kinds)(image, rnd, out)
    return out


def _value(image: Image, rnd: random.Random, old: int) -> int:
    """Something that may stand where an offset stands."""
    places = [
        0, image.l1, image.table, image.block(), image.snapshots, image.host(0), image.l2(0),
        image.get(image.l1) & OFFSET, rnd.randrange(40) << image.bits,
    ]  # fmt: skip
    return rnd.choice(
        [
            0,
            rnd.getrandbits(64),
            rnd.choice(places) | rnd.choice([0, COPIED, ZERO, COPIED | ZERO]),
            old + 512 if image.cluster > 512 else old + 256,
            old ^ 1 << rnd.randrange(64),
            (rnd.randrange(1, 50) << image.bits) + (1 << 40),
        ]
    )


def _word(image: Image, rnd: random.Random, out: Damage, name: str, at: int) -> None:
    old = image.get(at)
    new = _value(image, rnd, old)
    image.put(at, new)
    out.done.append(f"{name} at {at:#x}: {old:#x} -> {new:#x}")


def _table_entry(image: Image, rnd: random.Random, out: Damage) -> None:
    _word(image, rnd, out, "refcount table", image.table + 8 * rnd.randrange(3))


def _block(image: Image, rnd: random.Random, out: Damage) -> None:
    at = image.first_block
    for _ in range(rnd.randrange(1, 6)):
        with open(image.path, "r+b") as f:
            f.seek(at + rnd.randrange(min(image.cluster, 128)))
            f.write(rnd.choice([b"\0", b"\1", rnd.randbytes(1)]))
    out.done.append("refcounts")


def _l1(image: Image, rnd: random.Random, out: Damage) -> None:
    index = rnd.randrange(image.l1_size)
    out.guest.update(range(index * image.per_table, (index + 1) * image.per_table))
    out.counts_only = False
    _word(image, rnd, out, "L1 table", image.l1 + 8 * index)


def _l2(image: Image, rnd: random.Random, out: Damage) -> None:
    cluster = rnd.randrange(image.size >> image.bits)
    at = image.l2(cluster << image.bits)
    size = image.path.stat().st_size
    if at and at + 8 <= size and image.l1 + 8 * (cluster // image.per_table):
        out.guest.add(cluster)
        out.counts_only = False
        _word(image, rnd, out, "L2 table", at)


def _snapshot_table(image: Image, rnd: random.Random, out: Damage) -> None:
    if image.snapshots:
        at = image.snapshots + rnd.randrange(48)
        with open(image.path, "r+b") as f:
            f.seek(at)
            f.write(rnd.randbytes(rnd.choice([1, 4])))
        out.counts_only = False
        out.done.append(f"snapshot table at {at:#x}")


def _snapshot_l1(image: Image, rnd: random.Random, out: Damage) -> None:
    at = image.get(image.snapshots) if image.snapshots else 0
    if at and at + 8 < image.path.stat().st_size:
        out.counts_only = False
        _word(image, rnd, out, "snapshot's L1 table", at)
