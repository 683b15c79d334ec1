"""Power cuts around raw images that are being filled: N1, ST1 to ST4, and no image without its map.

The raw file and the file that says which part it holds are permuted against each other: a bit
without its bytes is what must never be found, and neither is an image that nobody opens, or one
that is taken for complete.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from chains import make_base, overlay
from cowferry.block import bitmap_file
from cowferry.block.bitmap_file import Stamp
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.partial import ATTRIBUTE, FILLING
from cowferry.errors import ImageError
from crashes import SIZE, SPEED, Judge, World, fill, sound, the_job, wait_over
from daemons import Told
from writelog import State

GRANULE = 4096


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay has other times: an image at rest was changed since if a byte is another."""

    def stamp_of(fd: int) -> Stamp:
        return Stamp(1, zlib.crc32(os.pread(fd, os.fstat(fd).st_size, 0)))

    monkeypatch.setattr(bitmap_file, "stamp_of", stamp_of)


def a_partial(folder: Path, base: str = "base.raw", size: int = SIZE) -> Path:
    """`vm.raw`, to be filled from an image beside it."""
    path = folder / "vm.raw"
    options = {"backing_file": base, "backing_fmt": base.split(".")[1], "granularity": GRANULE}
    opening.create_image(str(path), "raw", size, options)
    return path


def streamed(daemon: Daemon, told: Told) -> None:
    """All of it, unless that has been done."""
    if daemon.graph.disk("vm").root.backing is not None:
        daemon.execute("block-stream", {"device": "vm"})
        wait_over(told)
    assert daemon.graph.disk("vm").root.backing is None


def test_N1_ST4_what_was_flushed_is_there_and_no_bit_has_no_bytes(tmp_path: Path) -> None:
    world = World(tmp_path)
    make_base(world.here, SIZE)
    world.open("vm", a_partial(world.here))
    with world:
        world.churn(45)
    Judge(world).each(1, count=60, again=streamed)


def test_ST1_ST2_ST3_a_stream_to_its_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    make_base(world.here, SIZE)
    path = a_partial(world.here)
    world.open("vm", path)
    with world:
        world.churn(5)
        world.execute("block-stream", device="vm", speed=SPEED)
        job = the_job(world)
        work = world.ready(job)
        world.end([job], work)
        world.churn(6)
    base = world.here / "base.raw"

    def also(state: State) -> None:
        if "done" in {m[0] for m in state.marks}:  # ST2, J3: a raw image like others
            assert str(path) + FILLING not in state.files
            assert ATTRIBUTE not in state.attributes[str(path)]
            base.rename(base.with_suffix(".gone"))
            try:
                sound(str(path), "raw", state.what)
            finally:
                base.with_suffix(".gone").rename(base)

    Judge(world).each(2, also=also, again=streamed)


def test_ST2_a_stream_down_to_a_base(tmp_path: Path) -> None:
    world = World(tmp_path)
    make_base(world.here, SIZE)
    fill(overlay(world.here, "sn1.qcow2", "base.raw", "raw", SIZE), 1)
    path = a_partial(world.here, "sn1.qcow2")
    world.open("vm", path)
    with world:
        world.churn(5)
        base = str(world.here / "base.raw")
        world.execute("block-stream", device="vm", base=base, speed=SPEED)
        job = the_job(world)
        work = world.ready(job)
        world.end([job], work)
        world.churn(6)
    middle = world.here / "sn1.qcow2"

    def also(state: State) -> None:
        if "done" in {m[0] for m in state.marks}:
            middle.rename(middle.with_suffix(".gone"))
            try:
                sound(str(path), "raw", state.what)
            finally:
                middle.with_suffix(".gone").rename(middle)

    Judge(world).each(3, also=also, again=streamed)


def test_a_disk_grows_while_it_is_being_filled(tmp_path: Path) -> None:
    """And the base, which is longer, does not show where it has grown."""
    world = World(tmp_path)
    make_base(world.here, 2 * SIZE)
    world.open("vm", a_partial(world.here, size=SIZE - 1024))
    with world:
        world.churn(4)
        for size in (SIZE + 512, SIZE + 40_000):
            size = size // 512 * 512
            world.log.mark(("grow", "vm", size))
            world.execute("block_resize", device="vm", size=size)
            world.log.mark(("grown", "vm", size))
            world.churn(4)
    Judge(world).each(4, count=60, again=streamed)


def test_a_snapshot_goes_over_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    make_base(world.here, SIZE)
    over = world.here / "over.qcow2"
    world.open("vm", a_partial(world.here), over)
    with world:
        world.churn(5)
        world.now("blockdev-snapshot-sync", device="vm", snapshot_file=str(over))
        world.churn(5)
    Judge(world).each(5, again=streamed)


@pytest.mark.parametrize("before", ["nothing", "raw", "partial"])
def test_no_crash_while_it_is_made_leaves_an_image_that_reads_wrong(
    tmp_path: Path, before: str
) -> None:
    """It is not there, or refused, or reads as the base; or it is still the old one."""
    world = World(tmp_path)
    oracle = bytes(make_base(world.here, SIZE))
    path, old = world.here / "vm.raw", b""
    if before != "nothing":
        old = bytes(range(256)) * (SIZE // 256)
        path.write_bytes(old)
    if before == "partial":
        node = opening.open_image(str(a_partial(world.here)))
        node.pwrite(memoryview(old), 0)
        opening.close_chain(node)
    with world:
        a_partial(world.here)
        world.log.mark(("made",), look=True)
    found = set()

    def also(state: State) -> None:
        what = look(path, {oracle: "new", old: "old", b"": "nothing"})
        assert what == "new" or (what != "wrong" and not state.marks), what
        found.add(what)

    Judge(world).each(6, samples=20, also=also)
    assert found == {"new", "refused", "old" if old else "nothing"}


def look(path: Path, known: dict[bytes, str]) -> str:
    """What one finds under the name: nothing, one of these, or it is refused."""
    if not os.path.exists(path):
        return "nothing"
    try:
        return known.get(bytes(sound(str(path), "raw", "look")), "wrong")
    except ImageError:
        return "refused"
