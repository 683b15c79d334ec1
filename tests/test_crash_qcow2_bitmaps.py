"""Power cuts and failed writes while the bitmaps in a qcow2 image change: B1, B2, Q1, Q6.

Every state has the old bitmaps or the new ones, all of them, in use only if one of both is and then
by whom; and it is sound, and the guest finds its bytes.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bitmapping import (
    MIB,
    OTHER,
    SMALL,
    SOAK,
    TOKEN,
    Known,
    dirty,
    image_at,
    known,
    make,
    opened,
    stored,
)
from chains import contents
from cowferry.block import sysio
from cowferry.block.bitmap import Bitmap
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.errors import CowferryError
from test_crash_guard import Without
from tests_support import need
from writelog import Log, Oracle, State, put, states


class Recorded:
    """Changes of an image's bitmaps under a log; at each mark what may be there from then on."""

    def __init__(self, folder: Path, **options: str) -> None:
        self.folder = folder / "run"
        self.folder.mkdir()
        self.states = folder / "states"
        self.states.mkdir()
        self.path = make(self.folder / "vm.qcow2", SMALL, **options)
        self.moments: list[tuple[Known, bytes, int]] = [({}, b"", SMALL)]  # bitmaps, token, size

    def record(self, broken: Without | None = None) -> None:
        """Rest, in use, changed, grown, rest, fewer, none; with guest bytes in between."""
        rnd = random.Random(3)
        image = opened(self.path)
        self.flat = bytearray(SMALL)
        patch = pytest.MonkeyPatch()
        self.log = Log(self.folder)
        with self.log:
            if broken is not None:
                broken(patch)
            try:
                self._work(image, rnd)
            finally:
                patch.undo()
        image.close()

    def _work(self, image: Qcow2, rnd: random.Random) -> None:
        b0, b1, b2 = dirty("b0", SMALL, 512), dirty("b1", SMALL), dirty("b2", SMALL, 4096)
        self.write(image, [b0, b1])
        self.write(image, [b0, b1], TOKEN)
        self.guest(image, rnd)
        b0.set(0, MIB // 2)
        b1.clear(0, MIB // 2)
        self.write(image, [b0, b1, b2], TOKEN)
        self.guest(image, rnd)
        self.write(image, [b0, b1, b2])
        self.write(image, [b0, b1, b2], OTHER)
        size = 3 * MIB  # in clusters of 512 bytes the table of b0 gets longer
        for b in (b0, b1, b2):
            b.resize(size)
        self.moment([b0, b1, b2], OTHER, size)
        self.log.mark(("grow", size))
        image.resize(size)
        self.log.mark(("done",))
        self.guest(image, rnd)
        b2.set(2 * MIB, MIB)
        self.write(image, [b0, b1, b2])
        b1.recording = False
        self.write(image, [b0, b1, b2])
        self.write(image, [b2, b0])
        self.write(image, [b2, b0], TOKEN)
        self.write(image, [])

    def moment(self, bitmaps: list[Bitmap], token: bytes, size: int) -> None:
        self.moments.append((known(bitmaps), token if bitmaps else b"", size))
        self.log.mark(("begin", len(self.moments) - 1))

    def write(self, image: Qcow2, bitmaps: list[Bitmap], token: bytes = b"") -> None:
        self.moment(bitmaps, token, image.size)
        image.write_bitmaps(bitmaps, token)
        self.log.mark(("done",))

    def guest(self, image: Qcow2, rnd: random.Random) -> None:
        """Writes, some of them flushed."""
        for _ in range(3):
            at, data = rnd.randrange(SMALL - 9000), rnd.randbytes(9000)
            self.log.mark(("write", at, data))
            image.pwrite(memoryview(data), at)
        image.flush()
        self.log.mark(("flushed",))

    def judge(self, state: State) -> None:
        """The old bitmaps or the new ones, each in use only if one of both is; guests' bytes."""
        put(state, self.states)
        oracle, at, done = Oracle(self.flat), 0, True
        for kind, *more in state.marks:
            if kind == "begin":
                at, done = more[0], False
            elif kind == "done":
                done = True
            elif kind == "grow":
                oracle.grow(more[0])
            elif kind == "write":
                oracle.write(more[0], more[1])
            else:
                oracle.flush()
        may_be = self.moments[at : at + 1] if done else self.moments[at - 1 : at + 1]
        with image_at(self.states / "vm.qcow2", read_only=True) as image:
            result = image.check()
            assert not result.corruptions, result.messages[:3]
            wrong = oracle.wrong(contents(image))
            assert not wrong, wrong
            found, token = image.read_bitmaps(), image.bitmap_token()
            assert not token or all(b.size == image.size for b in found)
        assert (known(found), image.size) in [(k, s) for k, _, s in may_be], "which bitmaps?"
        assert token in [t for _, t, _ in may_be], "whose token?"
        if any(b.inconsistent for b in found):
            assert token, "in use, and nobody says by whom"
        if done and token:
            assert all(b.inconsistent for b in found), "B1: not marked, and it may be written"


CRASHES = [{"cluster_size": "4k"}, {"cluster_size": "512"}, {"cluster_size": "64k"}]


@pytest.mark.parametrize("options", CRASHES, ids=lambda o: str(o["cluster_size"]))
def test_B1_B2_after_a_crash_they_are_the_old_ones_or_the_new_ones(
    tmp_path: Path, options: dict[str, str]
) -> None:
    need("qemu-img")
    run = Recorded(tmp_path, **options)
    run.record()
    number = 0
    every = 1 if SOAK else max(len(run.log.entries) // 60, 1)
    for number, state in enumerate(states(run.log, 4, 40 if SOAK else 3, every), 1):
        try:
            run.judge(state)
        except AssertionError as error:
            raise AssertionError(f"{state.what}: {error}") from error
        if number % 100 == 0:
            done = subprocess.run(
                ["qemu-img", "check", run.states / "vm.qcow2"], capture_output=True, text=True
            )
            assert done.returncode in (0, 3), f"{state.what}: {done.stdout}{done.stderr}"
    assert number > 100


@pytest.mark.parametrize(
    "broken",
    [Without("Qcow2._write_tables"), Without("_in_place"), Without("_switch"), Without("grow")],
    ids=["what the header refers to", "flags", "header", "growing"],
)
def test_the_crash_test_of_bitmaps_notices_a_missing_flush(tmp_path: Path, broken: Without) -> None:
    run = Recorded(tmp_path, cluster_size="4k")
    run.record(broken)
    with pytest.raises((AssertionError, OSError, CowferryError)):
        for state in states(run.log, 1, 12, every=2):
            run.judge(state)


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_write_that_fails_leaves_the_old_bitmaps_and_the_image_sound(
    tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "vm.qcow2", cluster_size="4k")
    old, new = [dirty("b0", granularity=512)], [dirty("b0", granularity=512, seed=2), dirty("b1")]
    image = opened(path)
    image.write_bitmaps(old)
    calls = itertools.count(1)
    plain = sysio.pwrite

    def failing(fd: int, buf: Any, offset: int) -> None:
        if next(calls) == nth:
            raise OSError(28, os.strerror(28))
        plain(fd, buf, offset)

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "pwrite", failing)
        try:
            image.write_bitmaps(new)
            want = new
        except OSError:
            want = old
    assert known(image.read_bitmaps()) == known(want)
    result = image.check()
    assert not result.corruptions, result.messages
    image.write_bitmaps(new)
    assert known(image.read_bitmaps()) == known(new)
    image.close()
    assert known(stored(path)) == known(new)
