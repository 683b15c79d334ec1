"""A power cut while a qcow2 image is repaired leaves it no worse, in a file and on a device.

Every state is opened: the guest's bytes are all there, and the same repair leads to the same end.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bitmapping import dirty, image_at, known, stored
from chains import differs
from cowferry.block import sysio
from cowferry.drivers.file import File
from cowferry.drivers.qcow2.repair import Rebuilt, Repair
from cowferry.errors import CowferryError, ImageError
from damage import COPIED, Image, check, make, verdict, wrong_bytes
from loops import loop
from test_bitmaps_damaged import break_it
from test_qcow2_peers import by_qemu
from test_qcow2_repair import by_qemu_or_us, without_size
from tests_support import need
from writelog import Log, put, states

SOAK = os.environ.get("COWFERRY_SOAK") is not None
Do = Callable[[Image], None]
Device = Callable[[Path], str]


def low_and_high(image: Image) -> None:
    """Refcounts that are too low and too high, and flags to go with them."""
    bits = image.bits
    image.set_refcount(image.host(0) >> bits, 0)
    image.set_refcount(image.host(image.size // 2) >> bits, 5)
    image.put(image.l1, image.get(image.l1) & ~COPIED)
    image.put(image.l2(image.cluster), image.get(image.l2(0)) | COPIED)  # in one place


def no_counts(image: Image) -> None:
    """No refcounts at all, and wrong flags."""
    image.put(image.table, 0)
    image.put(image.l2(image.cluster), image.get(image.l2(0)) | COPIED)


def over_data(image: Image) -> None:
    """The only refcount block lies over data of the guest."""
    image.put(image.table, image.host(0))


KINDS: dict[str, Do] = {"in place": low_and_high, "no counts": no_counts, "over data": over_data}


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    need("qemu-img", "qemu-io")
    path = tmp_path_factory.mktemp("seed") / "vm.qcow2"
    return path, make(path, "cluster_size=4k", 512 << 10)


@pytest.fixture
def device() -> Iterator[Device]:
    """Makes loop devices over files."""
    with ExitStack() as made:
        yield lambda path: made.enter_context(loop(path))


class DeviceLog(Log):
    """What happens to a device is written down as if it happened to the file behind it."""

    def __init__(self, folder: Path, device: str, path: Path) -> None:
        super().__init__(folder)
        self.device, self.behind = os.stat(device).st_rdev, self.names[str(path)]

    def _file(self, fd: int) -> str | None:
        st = os.fstat(fd)
        if stat.S_ISBLK(st.st_mode) and st.st_rdev == self.device:
            return self.behind
        return super()._file(fd)


def sectors(path: Path, size: int) -> None:
    """Make the file a device's worth of it, full of old bytes."""
    with open(path, "ab") as f:
        f.write(b"\xaa" * (size - f.tell()))


@pytest.mark.parametrize("where", ["file", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_in_a_repair_leaves_the_image_no_worse(
    tmp_path: Path, seed: tuple[Path, bytes], device: Device, kind: str, where: str
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    path = Path(shutil.copy(seed[0], here / "vm.qcow2"))
    KINDS[kind](Image(path))
    oracle = by_qemu(path)
    for left in here.iterdir():
        if left != path:
            left.unlink()
    name, log = str(path), Log(here)
    if where == "device":
        sectors(path, 2 << 20)
        name = device(path)
        log = DeviceLog(here, name, path)
    with log:
        assert check(name, "all").exit_code == 0
    assert any(e.kind == "write" for e in log.entries)
    number = 0
    copy = there / "vm.qcow2"
    for number, state in enumerate(states(log, 3, 60 if SOAK else 6), 1):
        put(state, there)
        assert not wrong_bytes(copy, oracle, set()), state.what
        again = check(copy, "all")
        assert again.exit_code == 0, f"{state.what}: {again}"
        assert not wrong_bytes(copy, oracle, set()), state.what
        if number % 8 == 0:
            assert verdict(copy) == 0, state.what
            assert not differs(by_qemu(copy), oracle), state.what
    assert number > 5


def test_a_power_cut_while_a_bitmap_and_a_snapshot_are_mended_costs_no_other_bitmap(
    tmp_path: Path, seed: tuple[Path, bytes]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    path = Path(shutil.copy(seed[0], here / "vm.qcow2"))
    names = ["b0", "b1", "b2"]
    with image_at(path) as image:
        image.write_bitmaps([dirty(n, 512 << 10, granularity=512) for n in names])
    others = known(b for b in stored(path) if b.name != "b1")
    break_it(path, "bits beyond the end")
    without_size(Image(path))
    oracle = by_qemu_or_us(path)
    for left in here.iterdir():
        if left != path:
            left.unlink()
    with Log(here) as log:
        assert check(path, "all").exit_code == 0
    number, copy = 0, there / "vm.qcow2"
    for number, state in enumerate(states(log, 3, 60 if SOAK else 4), 1):
        put(state, there)
        for _ in range(2):  # as the crash left it, and repaired again
            found = stored(copy)
            assert [b.name for b in found if b.inconsistent] == ["b1"], state.what
            assert known(b for b in found if not b.inconsistent) == others, state.what
            assert not wrong_bytes(copy, oracle, set()), state.what
            again = check(copy, "all")
            assert again.exit_code == 0, f"{state.what}: {again}"
        if number % 8 == 0:
            assert verdict(copy) == 0, state.what
    assert number > 10


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_repair_that_finds_no_room_leaves_the_image_as_it_was(
    tmp_path: Path, seed: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    path = Path(shutil.copy(seed[0], tmp_path / "vm.qcow2"))
    no_counts(Image(path))
    before, oracle = path.read_bytes(), by_qemu(path)
    calls, plain = 0, sysio.pwrite

    def full(fd: int, buf: Any, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(fd, buf, offset)

    with monkeypatch.context() as patch:
        patch.setattr(sysio, "pwrite", full)
        try:
            done = check(path, "all").exit_code == 0
        except (OSError, CowferryError) as error:
            done = False
            if nth <= 2:  # a block and the table come first
                assert isinstance(error, ImageError) and "as it was" in error.hint
    if nth <= 2:
        assert not done and path.read_bytes() == before
    assert not differs(by_qemu(path), oracle)
    assert check(path, "all").exit_code == 0 == verdict(path)


def test_on_a_device_new_refcounts_go_where_nothing_lies(
    tmp_path: Path, seed: tuple[Path, bytes], device: Device
) -> None:
    """A block and a table need two clusters; the place of the old block is one."""
    oracle = seed[1]
    used = check(seed[0]).image_end_offset
    for spare in (8, 1, 0):
        path = Path(shutil.copy(seed[0], tmp_path / f"{spare}.qcow2"))
        image = Image(path)
        image.put(image.table, image.host(0))
        assert path.stat().st_size >= used
        os.truncate(path, used)
        sectors(path, used + spare * image.cluster)
        before = path.read_bytes()
        name = device(path)
        result = check(name, "all")
        if spare:
            assert result.exit_code == 0, result
            assert verdict(Path(name)) == 0
        else:
            assert result.exit_code == 2
            assert "no room" in " ".join(result.repairs) and "nothing was changed" in str(result)
            assert Path(name).read_bytes() == before
        assert not wrong_bytes(Path(name), oracle, set())


@pytest.mark.parametrize("step", ["write", "_flags"])
def test_the_crash_test_of_repairs_notices_a_missing_flush(
    tmp_path: Path, seed: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Without a barrier behind them new refcounts may count before they are there. And if flags
    were cleared and the counts raised in one go, a flag might be left that allows a write."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    path = Path(shutil.copy(seed[0], here / "vm.qcow2"))
    (no_counts if step == "_flags" else over_data)(Image(path))
    owner: Any = Rebuilt if step == "write" else Repair
    plain = getattr(owner, step)

    def without(self: Any, *args: Any, **more: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(File, "flush", lambda self: None)
            plain(self, *args, **more)

    monkeypatch.setattr(owner, step, without)
    with Log(here) as log:
        check(path, "all")
    monkeypatch.undo()
    copy, flags = there / "vm.qcow2", Image(path)
    both = (flags.l2(0), flags.l2(flags.cluster)) if step == "_flags" else ()
    wrong = []
    for state in states(log, 3, 20):
        put(state, there)
        image = Image(copy)
        counted = image.get(image.block()) if image.block() < copy.stat().st_size else 0
        switched = image.table != Image(seed[0]).table
        allowed = any(image.get(at) & COPIED for at in both)
        wrong.append(switched and (not counted or allowed))
    assert any(wrong)
