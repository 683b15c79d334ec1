"""Power cuts in the life of a QED image, and the guard: with any flush left out, they show.

Every state is opened read-only, checked and compared with the oracle; some are then opened for
writing, which mends them, and compared once more, here and by qemu-img.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chains import contents, differs, make_base, overlay
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.drivers import opening, qed
from cowferry.drivers.file import File
from cowferry.drivers.qed import header
from cowferry.drivers.qed.image import Qed
from cowferry.errors import CowferryError
from cowferry.jobs.stream import Stream
from crashes import hear
from test_crash import churn, contents_of, recorded, stream_under_writes, verify
from tests_support import need
from writelog import Log, Oracle, State, put, states

SOAK = os.environ.get("COWFERRY_SOAK") is not None
NAME = "vm.qed"
SIZE = 256 << 10
SMALL = {"cluster_size": "4k", "table_size": "2"}
LARGE = {"cluster_size": "64k", "table_size": "4"}
AUTOCLEAR = 32  # host offset of the field


class Marked(Log):
    """The moments of answers are always looked at."""

    def mark(self, mark: Any, look: bool = False) -> None:
        super().mark(mark, look or mark[0] != "write")


class Run:
    """A log of what is done to an image, and a folder to put its states into."""

    def __init__(self, folder: Path) -> None:
        self.here, self.spare = folder / "run", folder / "states"
        self.here.mkdir()
        self.spare.mkdir()
        self.path = self.here / NAME
        self.base = make_base(self.here, SIZE)
        self.log: Log

    def make(self, options: dict[str, str], size: int = SIZE) -> None:
        """The image, an overlay on the base."""
        overlay(self.here, NAME, "base.raw", "raw", size, **options)
        self.flat = self.base[:size]

    def disk(self) -> Disk:
        return Disk(opening.open_image(str(self.path)), "vm")

    def write(self, disk: Disk, offset: int, fua: bool = False) -> None:
        """Some bytes, to the image itself."""
        data = random.Random(offset).randbytes(9000)
        self.log.mark(("write", offset, data))
        disk.root.pwrite(memoryview(data), offset, fua)
        if fua:
            self.log.mark(("flushed", 0, b""))

    def clean(self) -> None:
        """From here on all is flushed, and the header says so until somebody writes."""
        self.log.mark(("flushed", 0, b""))
        self.log.mark(("clean", 0, b""))

    def judge(self, seed: int, samples: int, count: int, damaged: bool = False) -> None:
        """Look at states of about `count` moments. Raises if one is wrong.

        An image that was `damaged` before may be so for as long as it says that it is dirty."""
        self.damaged = damaged
        samples, count = (samples * 10, 3000) if SOAK else (samples, count)
        every = max(len(self.log.entries) // count, 1)
        self.oracle, self.heard = Oracle(self.flat), 0
        for number, state in enumerate(states(self.log, seed, samples, every), 1):
            put(state, self.spare)
            self.sound(state, read_only=True)
            if number % 4 == 0:
                self.sound(state, read_only=False)
            if number % 100 == 4:
                done = subprocess.run(
                    ["qemu-img", "check", str(self.spare / NAME)], capture_output=True, text=True
                )
                assert done.returncode in (0, 3), f"{state.what}: {done.stdout}{done.stderr}"

    def sound(self, state: State, read_only: bool) -> None:
        """The image has no corruption, and the bytes that it may have."""
        for kind, *more in state.marks[self.heard :]:  # states come in order
            if kind != "clean":
                hear(self.oracle, kind, *more)
        self.heard = len(state.marks)
        image = opening.open_image(str(self.spare / NAME), read_only=read_only)
        try:
            assert isinstance(image, Qed)
            if state.marks and state.marks[-1][0] == "clean":
                assert not image.dirty_flag, f"{state.what}: clean, and it is not"
            result = image.check()
            known = self.damaged and image.dirty_flag
            assert not result.corruptions or known, f"{state.what}: {result.messages}"
            if not result.corruptions:
                wrong = self.oracle.wrong(contents(image))
                assert not wrong, f"{state.what}: {wrong}"
        finally:
            opening.close_chain(image)


# What is done --------------------------------------------------------------------------------

Scenario = Callable[[Path], None]


def write(folder: Path, count: int = 20, options: dict[str, str] = SMALL, samples: int = 3) -> None:
    """Requests of all kinds, made read-only and writable again, and closed."""
    run = Run(folder)
    run.make(options)
    with Marked(run.here) as run.log:
        disk = run.disk()
        run.write(disk, 60_000)
        run.write(disk, 90_000, fua=True)
        run.write(disk, 120_000)
        disk.root.reopen(True)
        run.clean()
        disk.root.reopen(False)
        run.write(disk, 220_000)  # into a table that is there
        disk.flush()
        run.log.mark(("flushed", 0, b""))
        churn(disk, run.log, random.Random(3), 30)
        run.write(disk, 30_000)
        opening.close_chain(disk.root)
        run.clean()
    run.judge(1, samples, count)


def every_moment(folder: Path) -> None:
    write(folder, 1000, samples=12)


def grow(folder: Path, count: int = 20, options: dict[str, str] = SMALL) -> None:
    """What lies below is longer, and shows neither before nor after."""
    run = Run(folder)
    run.make(options, 100 << 10)
    rnd = random.Random(4)
    with Marked(run.here) as run.log:
        disk = run.disk()
        for more in (512, 50_176, 120 << 10):
            churn(disk, run.log, rnd, 4)
            size = disk.size + more
            run.log.mark(("grow", size))
            disk.root.resize(size)  # not by the disk, which flushes what was flushed
            run.log.mark(("grown", size))
        opening.close_chain(disk.root)
        run.clean()
    run.judge(2, 3, count)


def rename(folder: Path) -> None:
    """Backing names in the header's sector and beyond: the last one done is there, or the next."""
    names = ["base.raw", "./" * 300 + "base.raw", "./base.raw", "./" * 450 + "base.raw", ""]
    run = Run(folder)
    run.make(SMALL)
    with Log(run.here) as run.log:
        image = opening.open_image(str(run.path))
        for name in names[1:]:
            image.set_backing(name or None, "raw" if name else None)
            run.log.mark(name)
        opening.close_chain(image)
    seen = set()
    for state in states(run.log, 1, 20):
        put(state, run.spare)
        image = opening.open_image(str(run.spare / NAME), read_only=True)
        name = image.backing_spec[0] if image.backing_spec else ""
        done = names.index(state.marks[-1]) if state.marks else 0
        assert name in names[done : done + 2], f"{state.what}: '{name}'"
        seen.add(name)
        opening.close_chain(image)
    assert len(seen) == len(names)


def mend(folder: Path) -> None:
    """An image whose writer crashed before the file had grown, opened for writing."""
    run = Run(folder)
    run.make(SMALL)
    image = opening.open_image(str(run.path))
    image.pwrite(memoryview(b"first"), 0)
    image.flush()
    image.pwrite(memoryview(bytes(range(256)) * 64), 32 << 10)
    opening.close_chain(image)
    data = bytearray(run.path.read_bytes())
    data[16] |= header.NEED_CHECK
    run.path.write_bytes(data[: -8 << 10])
    run.flat[:5] = b"first"
    run.flat[32 << 10 : 40 << 10] = bytes(range(256)) * 32
    with Log(run.here) as run.log:
        disk = run.disk()
        run.clean()
        churn(disk, run.log, random.Random(1), 6)
        opening.close_chain(disk.root)
        run.clean()
    run.judge(3, 6, 40, damaged=True)


def unknown(folder: Path) -> None:
    """Autoclear bits of somebody else's: gone before the first byte of the guest is there (Q5)."""
    run = Run(folder)
    run.make(SMALL)
    with open(run.path, "r+b") as f:
        f.seek(AUTOCLEAR)
        f.write(b"\x04")
    before = run.path.read_bytes()
    with Log(run.here) as run.log:
        disk = run.disk()
        disk.pwrite(memoryview(b"x" * 5000), 4096)
        disk.flush()
        opening.close_chain(disk.root)
    for state in states(run.log, 1, 20):
        data = state.files[str(run.path)]
        assert data[4096:] == before[4096:] or not data[AUTOCLEAR], state.what


def create(folder: Path) -> None:
    """A new image is not there, or is no image, or all of it is there."""
    run = Run(folder)
    name = "./" * 300 + "base.raw"
    with Log(run.here) as run.log:
        options = {**SMALL, "backing_file": name, "backing_fmt": "raw"}
        opening.create_image(str(run.path), "qed", SIZE, options)
        run.log.mark("made")
    for state in states(run.log, 1, 20):
        put(state, run.spare)
        data = state.files.get(str(run.path), b"")
        assert data[:4] == b"QED\0" or not state.marks
        if data[:4] == b"QED\0":
            image = opening.open_image(str(run.spare / NAME), read_only=True)
            assert image.backing_spec == (name, "raw") and contents(image) == run.base
            opening.close_chain(image)


@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["4k", "64k"])
@pytest.mark.parametrize("scenario", [write, grow])
def test_Q2_N1_N2_no_crash_corrupts_or_loses_what_was_flushed(
    tmp_path: Path, scenario: Callable[..., None], options: dict[str, str]
) -> None:
    need("qemu-img")
    scenario(tmp_path, 40, options)


@pytest.mark.parametrize("scenario", [rename, mend, unknown, create])
def test_Q5_Q6_no_crash_leaves_half_a_change_of_the_header(
    tmp_path: Path, scenario: Scenario
) -> None:
    need("qemu-img")
    scenario(tmp_path)


@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["4k", "64k"])
def test_ST1_to_ST4_every_crash_of_a_stream_leaves_the_right_bytes(
    tmp_path: Path, options: dict[str, str]
) -> None:
    log, base, spare = recorded(tmp_path, options, stream_under_writes(), NAME)
    every = max(len(log.entries) // (3000 if SOAK else 40), 1)
    again = 0
    for number, state in enumerate(states(log, 2, 30 if SOAK else 3, every)):
        done = any(m[0] == "done" for m in state.marks)
        if done:  # ST2: the event is true after a power cut: the base is not needed
            state.files.pop(str(tmp_path / "run" / "base.raw"))
            (spare / "base.raw").unlink(missing_ok=True)
        verify(state, spare, base, NAME)
        if not done and number % 40 == 0:  # ST3: stream again, and it completes
            again += 1
            before = contents_of(spare / NAME)
            disk = Disk(opening.open_image(str(spare / NAME)), "vm")
            old = disk.root.backing
            job = Stream(disk)
            for _ in job.run():
                pass
            job.prepare()
            opening.close_chain(disk.root)
            opening.close_chain(old)
            (spare / "base.raw").unlink()
            assert not differs(contents_of(spare / NAME), before)
    assert again


# The guard -----------------------------------------------------------------------------------


class Site(NamedTuple):
    """A line of the driver that asks for a flush."""

    file: str
    line: int


def sites() -> dict[str, Site]:
    """All of them, by function and number; found by reading the code."""
    found: dict[str, Site] = {}
    for path in sorted(Path(qed.__file__).parent.glob("*.py")):
        function, number = "", 0
        for line, text in enumerate(path.read_text().splitlines(), 1):
            if named := re.match(r" *def (\w+)", text):
                function, number = named[1], 0
            if re.search(r"\.(flush|fdatasync|mark_clean|_write_tables)\(", text):
                number += 1
                found[f"{path.stem}.{function} {number}"] = Site(str(path), line)
    return found


#: Who notices that a flush was left out.
NOTICED: dict[str, Scenario] = {
    "check._drop 1": mend,
    "check.check 2": mend,
    "image._prepare_for_writing 1": unknown,
    "image._write_tables 1": every_moment,
    "image._write_tables 2": every_moment,
    "image._write_tables 3": every_moment,
    "image.close 1": write,
    "image.flush 1": write,
    "image.flush 2": write,
    "image.mark_clean 1": write,
    "image.mark_clean 2": write,
    "image.pwrite 1": write,
    "image.reopen 1": write,
    "image.resize 1": grow,
    "image.resize 2": grow,
    "image.set_backing 1": rename,
    "image.set_backing 2": rename,
}
#: Whose loss no crash can show, and why.
MAY_BE_LOST = {
    "check.check 1": "nothing waits when an image is being opened",
    "create._make 1": "a file gets its name when all of it is durable",
    "image.bound_dirty 1": "a bound on memory",
}


def test_every_flush_of_the_driver_is_known() -> None:
    assert NOTICED.keys() | MAY_BE_LOST.keys() == sites().keys()


@pytest.mark.parametrize("name", NOTICED)
def test_the_crash_tests_notice_a_flush_that_is_left_out(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = sites()[name]
    left_out = []
    for owner, function in (
        (sysio, "fdatasync"), (File, "flush"), (Qed, "flush"), (Qed, "mark_clean"),
        (Qed, "_write_tables"),
    ):  # fmt: skip
        plain = getattr(owner, function)

        def forgetful(*args: Any, plain: Callable[..., Any] = plain) -> Any:
            caller = sys._getframe(1)
            if (caller.f_code.co_filename, caller.f_lineno) == site:
                left_out.append(site)
                return None
            return plain(*args)

        monkeypatch.setattr(owner, function, forgetful)
    with pytest.raises((AssertionError, OSError, CowferryError)):
        NOTICED[name](tmp_path)
    assert left_out
