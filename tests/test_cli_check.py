"""`cowferry check` as a user meets it: what it says, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.drivers.file import File
from damage import COPIED, OFFSET, Image, check, make, verdict
from test_cli_offline import cowferry
from test_qcow2_peers import by_qemu
from tests_support import need


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-img", "qemu-io")
    path = tmp_path_factory.mktemp("seed") / "vm.qcow2"
    make(path)
    return path


@pytest.fixture
def image(seed: Path, tmp_path: Path) -> Image:
    return Image(Path(shutil.copy(seed, tmp_path / "vm.qcow2")))


@pytest.mark.parametrize(
    "arguments",
    [["--bogus"], ["-r", "some"], ["-r"], ["a", "-r"], ["--output", "xml"], [], ["a", "b"]],
    ids=" ".join,
)
def test_a_usage_error_does_not_say_that_an_image_is_corrupt(arguments: list[str]) -> None:
    said = cowferry("check", *arguments, code=1)
    assert "Usage:" in said or "requires an argument" in said


def test_the_cache_mode_is_a_known_one(image: Image) -> None:
    assert "sometimes" in cowferry("check", "-T", "sometimes", image.path, code=1)
    cowferry("check", "-T", "none", image.path)
    cowferry("check", "-T", "writeback", image.path)


def test_an_image_that_is_not_there_cannot_be_checked(tmp_path: Path) -> None:
    assert "No such file" in cowferry("check", tmp_path / "none.qcow2", code=1)
    (tmp_path / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(600))
    assert "version" in cowferry("check", tmp_path / "bad.qcow2", code=1)


def test_a_repair_says_what_it_did_and_what_it_left(image: Image) -> None:
    image.put(image.table, image.host(0))
    image.put(image.l2(image.size // 2), 1 << 40)
    said = cowferry("check", "-r", "all", image.path, code=2)
    assert "refcount block 0" in said and "lies over something else" in said
    assert "Repairing: the refcounts are counted anew" in said
    left = said[said.index("After the repair:") :]
    assert "beyond the end of the file" in left and "refcount block" not in left
    assert "errors were found" in said and "repaired:" in said
    again = json.loads(
        subprocess.run(
            [sys.executable, "-m", "cowferry", "check", "--output=json", image.path],
            capture_output=True,
            text=True,
        ).stdout
    )
    assert again["corruptions"] == 1 and "repairs" not in again


def test_the_json_of_a_repair_has_what_was_done(image: Image) -> None:
    image.put(image.table, 0)
    shown = json.loads(cowferry("check", "-r", "all", "--output=json", image.path))
    assert shown["corruptions-fixed"] > 5 and "corruptions" not in shown
    assert any("counted anew" in text for text in shown["repairs"])


def test_messages_are_capped_and_the_rest_is_counted(image: Image) -> None:
    os.truncate(image.path, 2000 * image.cluster)
    for n in range(1000, 1500):
        image.set_refcount(n, 1)
    said = cowferry("check", image.path, code=3)
    assert said.count("Leaked cluster") == 100
    assert "... and 400 more" in said and "500 leaked clusters" in said


def test_leaks_are_left_alone_while_the_refcounts_cannot_be_relied_on(image: Image) -> None:
    image.put(image.table + 8, 1 << 40)
    os.truncate(image.path, 2000 * image.cluster)
    image.set_refcount(1000, 1)
    before = image.path.read_bytes()
    said = cowferry("check", "-r", "leaks", image.path, code=2)
    assert "-r all" in said
    assert image.path.read_bytes() == before
    cowferry("check", "-r", "all", image.path)
    assert verdict(image.path) == 0


def test_leaks_of_a_dirty_image_are_given_back_and_it_is_clean_then(image: Image) -> None:
    os.truncate(image.path, 2000 * image.cluster)
    image.set_refcount(1000, 1)
    image.put(72, 1)
    cowferry("check", image.path, code=3)
    cowferry("check", "-r", "leaks", image.path)
    assert image.get(72) == 0 and verdict(image.path) == 0


def test_what_may_belong_to_a_lost_table_is_not_given_back(image: Image) -> None:
    """QEMU counts it as leaked, and puts new data there."""
    first = image.get(image.l1)
    oracle = by_qemu(image.path)
    image.put(image.l1, 1 << 40)
    image.put(image.table + 8, 1 << 40)  # and the refcounts are counted anew
    said = cowferry("check", "-r", "all", image.path, code=2)
    assert "left alone" in said
    after = Image(image.path)
    assert after.table != image.table
    after.put(after.l1, first)  # somebody knows where it was
    assert check(image.path, "all").exit_code == 0 == verdict(image.path)
    assert by_qemu(image.path) == oracle


@pytest.mark.parametrize("damaged", [False, True])
def test_a_dirty_image_is_repaired_when_it_is_opened_or_refused(
    image: Image, damaged: bool
) -> None:
    oracle = by_qemu(image.path)
    image.put(72, 1)
    image.put(image.table, image.host(0))
    if damaged:
        image.put(image.l2(image.size // 2), 1 << 40)
    said = cowferry("resize", image.path, image.size * 2, code=int(damaged))
    if damaged:
        assert "not closed cleanly" in said and "beyond the end of the file" in said
        assert "can still be read" in said
        cowferry("info", image.path)
        return
    assert by_qemu(image.path)[: image.size] == oracle
    assert verdict(image.path) == 0


def unreadable(monkeypatch: pytest.MonkeyPatch, start: int, length: int) -> None:
    """A bad sector of the file."""
    plain = File.pread

    def pread(self: File, buf: memoryview, offset: int) -> None:
        if offset < start + length and start < offset + len(buf):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(self, buf, offset)

    monkeypatch.setattr(File, "pread", pread)


def test_refcounts_that_cannot_be_read_are_counted_anew(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = by_qemu(image.path)
    for table in (False, True):
        start = image.table if table else image.block()
        with monkeypatch.context() as patch:
            unreadable(patch, start, image.cluster)
            found = check(image.path)
            assert found.exit_code == 2 and "cannot be read" in found.messages[0]
            assert check(image.path, "all").exit_code == 0
        image = Image(image.path)
    assert verdict(image.path) == 0 and by_qemu(image.path) == oracle


def test_an_image_with_a_table_that_cannot_be_read_is_not_repaired(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.put(image.table, 0)
    before = image.path.read_bytes()
    for start in (image.get(image.l1) & OFFSET, image.l1, image.snapshots):
        with monkeypatch.context() as patch:
            unreadable(patch, start, 512)
            for fix in (None, "leaks", "all"):
                found = check(image.path, fix)
                assert found.exit_code == 1
                assert any("cannot be read" in m for m in found.messages)
    assert image.path.read_bytes() == before


def test_guests_of_an_image_that_was_cut_off_write_over_no_cluster_in_use(tmp_path: Path) -> None:
    """The repair counts what lies beyond the end, so that it is not taken for free."""
    need("qemu-img", "qemu-io")
    make(tmp_path / "vm.qcow2", snapshot=False)
    image = Image(tmp_path / "vm.qcow2")
    os.truncate(image.path, 0x90000)
    assert check(image.path, "all").exit_code == 2
    disk = Disk(opening.open_image(str(image.path)))
    disk.pwrite(memoryview(b"n" * (512 << 10)), 128 << 10)
    disk.flush()
    disk.root.close()
    used = [
        image.get(at) & OFFSET
        for at in map(Image(image.path).l2, range(0, image.size, image.cluster))
        if at and image.get(at) & OFFSET
    ]
    assert len(used) == len(set(used))


def test_counts_that_refcounts_are_too_narrow_for_stay_wrong_and_are_told(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    make(path, "refcount_bits=1", snapshot=False)
    image = Image(path)
    at = [a for a in map(image.l2, range(0, image.size, image.cluster)) if image.get(a) & COPIED]
    image.put(at[0], image.get(at[1]))
    expected, oracle = verdict(path), by_qemu(path)
    said = cowferry("check", "-r", "all", path, code=2)
    assert expected == 2 and "more than it can be" in said
    flags = [image.get(a) & COPIED for a in at[:2]]
    assert flags == [COPIED, COPIED]  # without them one owner would give the cluster back
    assert by_qemu(path) == oracle
