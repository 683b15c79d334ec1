"""Power cuts and persistent bitmaps: B1, B2.

A run is recorded in which a guest writes and bitmaps are added, cleared, disabled, removed, and
come to rest. In every state that a power cut may have left of image *and* bitmap file the image is
opened again, and of every bitmap it is asked: is each sector covered by a bit that is not what it
was when the bits were last cleared? And is any of them inconsistent? None may be.

A replay cannot have the inode and the time of change that the file was tied to. What stands for the
time here is a checksum of the image: it differs exactly if something was written, or lost.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

import crashes
from chains import contents
from cowferry.block import keeper
from cowferry.block.bitmap import Bitmap
from cowferry.block.bitmap_file import Stamp
from cowferry.block.disk import Disk
from cowferry.block.lane import DONE, Lane
from cowferry.block.node import Node
from cowferry.drivers import opening
from crashes import Judge
from writelog import Log, State, put, states

LARGE = (2 << 20) + (200 << 10)  # has more than one sector of fine bits
SIZE = 300 << 10
FINE = 512  # bytes
CLUSTERS = {"cluster_size": "4k"}

# What one bitmap has to cover: each difference between these bytes and those (None: the present).
Need = tuple[bytes, bytes | None]
Set = dict[str, tuple[Need, ...]]  # of all bitmaps, by name


def of_content(node: Node) -> Stamp:
    """A stamp that can be replayed: the same image, changed whenever a byte is another."""
    assert node.file is not None
    return Stamp(1, zlib.crc32(os.pread(node.file.fd, os.fstat(node.file.fd).st_size, 0)))


@contextmanager
def small() -> Iterator[None]:
    """Regions of a size that suits a small disk, and stamps that can be replayed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper, "stamp", of_content)
        patch.setattr(keeper, "REGION", 32 << 10)
        patch.setattr(keeper, "FEW_REGIONS", 1)
        patch.setattr(keeper, "HOLD", 4096)
        yield


class Kept:
    """A disk with persistent bitmaps, its guest, and what has to be found at each moment."""

    def __init__(
        self, folder: Path, format: str, size: int = SIZE, seed: int = 3, **options: Any
    ) -> None:
        self.here, self.there = folder / "here", folder / "there"
        self.here.mkdir()
        self.there.mkdir()
        self.drives: dict[str, Any] = {}
        self.format = format
        self.path = str(self.here / f"vm.{format}")
        opening.create_image(self.path, format, size, options)
        self.rnd = random.Random(seed)
        self.now: Set = {}
        self.open()

    def open(self, read_only: bool = False) -> None:
        """A disk over the image, as a daemon would have it."""
        self.disk = Disk(opening.open_image(self.path, self.format, read_only=read_only), "vm")
        self.lane = Lane(self.disk)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """What happens inside is in the log, and done as the guard of these tests breaks it."""
        self.log = Log(self.here, self.there)
        with self.log, pytest.MonkeyPatch.context() as patch:
            for broken in crashes.BREAK:
                broken(patch)
            yield
        opening.close_chain(self.disk.root)

    # The guest -----------------------------------------------------------------------------

    def churn(self, steps: int) -> None:
        """Requests by all ways into the disk."""
        for _ in range(steps):
            rnd, disk = self.rnd, self.disk
            length = rnd.choice([1, 512, 5000, 30_000])
            offset = rnd.randrange(disk.size - length)
            act = rnd.randrange(12)
            if act < 6:
                self.write(offset, rnd.randbytes(length), fua=act == 5)
            elif act < 9:
                data = memoryview(rnd.randbytes(512))
                offset = offset // 512 * 512
                if self.lane.write(data, offset, 512) != DONE:
                    disk.pwrite(data, offset)
            elif act == 9:
                disk.zero(offset, length, unmap=rnd.random() < 0.5)
            elif act == 10:
                disk.discard(offset // 65536 * 65536, 32768)
            else:
                disk.flush()

    def again_the_same(self) -> None:
        """Write where the file says already that it was written, if it does somewhere: nothing has
        to be marked."""
        found = self.disk.root.keeper
        assert found is not None
        for offset in range(0, self.disk.size - 512, 512):
            if not found.holds.any(offset, 512):
                self.write(offset, self.rnd.randbytes(512), fua=True)
                self.expect(self.now)
                return

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        self.disk.pwrite(memoryview(data), offset, fua)

    # What is done to bitmaps -----------------------------------------------------------------

    def bitmap(self, name: str) -> Bitmap:
        return self.disk.root.bitmaps[name]

    def expect(self, *alternatives: Set) -> None:
        """From here on one of these is found."""
        self.log.mark(("expect", alternatives), look=True)
        self.now = alternatives[-1]

    def change(self, name: str, needs: tuple[Need, ...] | None, do: Callable[[], object]) -> None:
        """Afterwards the bitmap has these needs, or is gone; the old or the new is found until."""
        after = {k: n for k, n in self.now.items() if k != name}
        if needs is not None:
            after[name] = needs
        self.expect(self.now, after)
        do()
        self.expect(after)

    def add(self, name: str, granularity: int) -> None:
        with self.disk.exclusive():
            root = self.disk.root
            bitmap = Bitmap(name, root.size, granularity)
            flat = bytes(contents(root))
            self.change(name, ((flat, None),), lambda: keeper.keep(root, bitmap))

    def clear(self, name: str) -> None:
        with self.disk.exclusive():
            root = self.disk.root
            self.bitmap(name).clear(0, root.size)
            self.change(name, ((bytes(contents(root)), None),), lambda: keeper.changed(root))

    def record(self, name: str, on: bool) -> None:
        with self.disk.exclusive():
            root = self.disk.root
            flat = bytes(contents(root))
            needs = tuple((a, flat if b is None else b) for a, b in self.now[name])
            self.bitmap(name).recording = on
            more: tuple[Need, ...] = ((flat, None),) if on else ()
            self.change(name, needs + more, lambda: keeper.changed(root))

    def remove(self, name: str) -> None:
        with self.disk.exclusive():
            root = self.disk.root
            root.bitmaps = {k: b for k, b in root.bitmaps.items() if k != name}
            self.change(name, None, lambda: keeper.changed(root))

    def checkpoint(self) -> None:
        with self.disk.exclusive():
            found = self.disk.root.keeper
            assert found is not None
            found.checkpoint()

    def coarse(self) -> int:
        found = self.disk.root.keeper
        return 0 if found is None else found.coarse

    def access(self, read_only: bool) -> None:
        """blockdev-reopen."""
        with self.disk.exclusive():
            self.disk.root.reopen(read_only)

    def again(self) -> None:
        """Closed in order, and opened again."""
        opening.close_chain(self.disk.root)
        assert contents_of(self.path, self.format) is not None
        self.open()


def contents_of(path: str, format: str) -> bytearray:
    """All bytes of an image, opened and closed."""
    node = opening.open_image(path, format, read_only=True)
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


def lacks(bits: Bitmap, then: bytes, now: bytes | bytearray) -> str:
    """The first sector that differs and is not covered, in words; empty if there is none."""
    length = min(len(then), len(now))  # what a resize adds or takes away is told by the size
    for at in range(0, length, 65536):
        if then[at : at + 65536] != now[at : at + 65536]:
            for sector in range(at, min(at + 65536, length), 512):
                if then[sector : sector + 512] != now[sector : sector + 512] and not bits.any(
                    sector, min(512, length - sector)
                ):
                    return f"bitmap '{bits.name}' misses the change at {sector}"
    return ""


class Bits(Judge):
    """Looks at the bitmaps of each state; now and then the image is used again, and crashes."""

    world: Kept  # type: ignore[assignment]

    def look(self, state: State) -> dict[str, bytearray]:
        self.put(state)
        expected: tuple[Set, ...] = ({},)
        for mark in state.marks:
            expected = mark[1]
        self.check(expected)
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen % (10 if crashes.SOAK else 60) == 0:
            self.crash_again(expected)
        return {}

    def check(self, expected: tuple[Set, ...], opened: Disk | None = None) -> None:
        """One of the sets is there, each bitmap of it a superset."""
        node = (
            opened.root
            if opened is not None
            else opening.open_image(self.world.path, self.world.format, read_only=True)
        )
        try:
            now = contents(node)
            wrong = [self.wrong(node, now, alternative) for alternative in expected]
            assert not all(wrong), "; or: ".join(wrong)
        finally:
            if opened is None:
                opening.close_chain(node)

    def wrong(self, node: Node, now: bytearray, expected: Set) -> str:
        if set(node.bitmaps) != set(expected):
            return f"there are {sorted(node.bitmaps)}, not {sorted(expected)}"
        for name, needs in expected.items():
            bitmap = node.bitmaps[name]
            if bitmap.inconsistent:
                return f"bitmap '{name}' is inconsistent: {bitmap.reason}"
            if bitmap.size != node.size:
                return f"bitmap '{name}' is of {bitmap.size} bytes"
            if bitmap.recording != (not needs or needs[-1][1] is None):
                return f"bitmap '{name}' is recording: {bitmap.recording}"
            for then, until in needs:
                found = lacks(bitmap, then, now if until is None else until)
                if found:
                    return found
        return ""

    def crash_again(self, expected: tuple[Set, ...]) -> None:
        """It is opened for writing and written; the power fails once more."""
        world = self.world
        with Log(*self.folders) as log:
            disk = Disk(opening.open_image(world.path, world.format), "again")
            self.check(expected, disk)
            for n in range(4):
                data = world.rnd.randbytes(3000)
                disk.pwrite(memoryview(data), world.rnd.randrange(disk.size - 3000))
                if n == 2:
                    with disk.exclusive():
                        if disk.root.keeper is not None:
                            disk.root.keeper.checkpoint()
            self.check(expected, disk)
            opening.close_chain(disk.root)
        self.forget()
        self.check(expected)
        for second in states(log, 1, 1, max(len(log.entries) // 12, 1)):
            self.put(second)
            self.check(expected)
        self.forget()

    def ask_qemu(self) -> None:
        """Bitmaps of ours are no concern of others here; see test_qcow2_bitmaps.py."""


def judged(world: Kept) -> None:
    """Every state is looked at."""
    judge = Bits(cast(Any, world))
    assert judge.each(1, count=25) > 20


FORMATS = [
    ("raw", {}),
    ("qcow2", CLUSTERS),
    ("qcow2", {**CLUSTERS, "compat": "0.10"}),
    ("qed", CLUSTERS),
]
formats = pytest.mark.parametrize(
    ("format", "options"), FORMATS, ids=["raw", "qcow2", "qcow2-0.10", "qed"]
)


@formats
def test_B1_B2_a_guest_writes_and_no_crash_loses_a_change(
    tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    with small():
        world = Kept(tmp_path, format, LARGE if format == "raw" else SIZE, **options)
        with world.recorded():
            world.churn(3)
            world.add("fine", FINE)
            world.churn(4)
            world.add("b0", 64 << 10)
            world.churn(6)
            assert world.coarse()
            world.checkpoint()
            assert not world.coarse()
            world.churn(6)
            world.checkpoint()
            world.churn(3)
        judged(world)


@formats
def test_B1_B2_bitmaps_are_cleared_disabled_and_removed(
    tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    with small():
        world = Kept(tmp_path, format, **options)
        with world.recorded():
            world.add("a", FINE)
            world.add("b", 4096)
            world.churn(4)
            world.clear("a")
            world.churn(3)
            world.record("b", on=False)
            world.churn(3)
            world.clear("a")
            world.record("a", on=False)
            world.churn(2)
            world.record("b", on=True)
            world.churn(2)
            world.remove("a")
            world.churn(2)
            world.remove("b")
            assert world.disk.root.keeper is None
            world.churn(2)
            world.add("c", 64 << 10)
            world.churn(2)
        judged(world)


@formats
def test_B1_B2_bitmaps_come_to_rest_and_are_used_again(
    tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    with small():
        world = Kept(tmp_path, format, **options)
        with world.recorded():
            world.add("a", FINE)
            world.churn(3)
            world.access(read_only=True)
            world.access(read_only=False)
            world.churn(3)
            world.again()
            world.again_the_same()
            world.churn(3)
            world.clear("a")
            world.again()
            world.access(read_only=True)
            world.access(read_only=False)
            world.remove("a")
            world.churn(2)
            world.again()
            world.churn(2)
        judged(world)


@pytest.mark.parametrize("by", [100 << 10, -(100 << 10)], ids=["larger", "smaller"])
def test_B2_a_disk_that_gets_another_size_keeps_its_bitmaps(tmp_path: Path, by: int) -> None:
    with small():
        world = Kept(tmp_path, "raw")
        with world.recorded():
            world.add("a", FINE)
            world.churn(3)
            world.disk.resize(SIZE + by)
            world.churn(4)
            world.checkpoint()
            world.disk.resize(SIZE)
            world.churn(2)
            world.again()
        judged(world)


def test_B2_after_a_crash_bitmaps_are_no_more_than_their_regions(tmp_path: Path) -> None:
    """A superset is no excuse for a full one."""
    with small():
        world = Kept(tmp_path, "raw")
        spare = tmp_path / "spare"
        spare.mkdir()
        with world.recorded():
            world.add("a", FINE)
            world.write(200_000, b"x" * 10)
            world.write(100_000, b"x" * 10)
        at_end = list(states(world.log, 1, 1))[-1]
        put(at_end, spare)
        node = opening.open_image(str(spare / "vm.raw"), "raw", read_only=True)
        assert 20 < node.bitmaps["a"].count() <= 2 * (32 << 10)
        opening.close_chain(node)


# What the guard of the crash tests runs (tests/test_crash_guard.py).


def guest(folder: Path) -> None:
    test_B1_B2_a_guest_writes_and_no_crash_loses_a_change(folder, "raw", {})


def changes(folder: Path) -> None:
    test_B1_B2_bitmaps_are_cleared_disabled_and_removed(folder, "raw", {})


def rests(folder: Path) -> None:
    test_B1_B2_bitmaps_come_to_rest_and_are_used_again(folder, "raw", {})


def rests_inside(folder: Path) -> None:
    test_B1_B2_bitmaps_come_to_rest_and_are_used_again(folder, "qcow2", CLUSTERS)


def resizes(folder: Path) -> None:
    test_B2_a_disk_that_gets_another_size_keeps_its_bitmaps(folder, -(100 << 10))
