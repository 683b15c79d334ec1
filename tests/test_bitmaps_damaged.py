"""A bitmap inside a qcow2 image that is damaged, or has a name that is no UTF-8, locks nobody out.

It costs no other bitmap anything, and whoever opens the image is told of it by name.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmapping import agree_with_qemu, dirty, image_at, info_of_qemu, known, make, stored
from chains import contents, differs
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.drivers.qcow2 import bitmap_directory as listing
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.bitmap_directory import MAX_NAME, text
from daemons import a_daemon
from damage import Image, check, io, verdict
from test_cli_offline import cowferry
from test_qcow2_peers import by_qemu
from tests_support import need

RAW = b"caf\xe9"
SHOWN = "caf\\xe9"


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """An image of QEMU's with two bitmaps; the name of one is no UTF-8."""
    need("qemu-img")
    path = tmp_path / "vm.qcow2"
    for command in (
        ["create", "-q", "-f", "qcow2", path, "4M"],
        ["bitmap", "--add", path, b"plain"],
        ["bitmap", "--add", path, RAW],
    ):
        subprocess.run(["qemu-img", *command], check=True)  # type: ignore[list-item]
    io(path, "write -P 5 1M 300k")
    return path


def names_on_disk(path: Path) -> list[bytes]:
    with image_at(path, read_only=True) as image:
        return [e.name for e in listing.directory(image)]


def test_a_name_that_is_no_utf8_is_kept_shown_and_typed(named: Path) -> None:
    shown = json.loads(cowferry("bitmap", "--json", named))
    assert [b["name"] for b in shown] == ["plain", SHOWN]
    assert SHOWN in cowferry("info", named)
    assert check(named, "all").exit_code == 0
    cowferry("resize", named, "8M")
    disk = Disk(opening.open_image(str(named)), "vm")  # as the daemon does
    disk.pwrite(memoryview(b"x" * 4096), 6 << 20)
    disk.flush()
    disk.root.close()
    assert names_on_disk(named) == [b"plain", RAW]
    assert verdict(named) == 0
    bitmap = next(b for b in stored(named) if b.name == SHOWN)
    assert not bitmap.inconsistent and bitmap.any(6 << 20, 1) and bitmap.any(1 << 20, 1)
    cowferry("bitmap", "--add", "--merge", SHOWN, named, "other")
    cowferry("bitmap", "--remove", named, SHOWN)
    assert names_on_disk(named) == [b"plain", b"other"]
    agree_with_qemu(named)


def test_a_name_can_be_given_as_the_bytes_that_it_has(named: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cowferry", "bitmap", "--remove", named, RAW], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert names_on_disk(named) == [b"plain"]


def test_a_client_is_told_such_a_name_in_json(named: Path) -> None:
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(named))
        found = daemon.execute("query-block", {})
        assert json.dumps(SHOWN) in json.dumps(found, ensure_ascii=False).encode().decode()
        daemon.execute("block-dirty-bitmap-clear", {"node": "vm", "name": SHOWN})
    assert names_on_disk(named) == [b"plain", RAW]


@pytest.mark.parametrize("name", [b"\xff" * 1023, b"a\0b", "größe".encode(), b"\xed\xa0\x80"])
def test_names_as_text_are_short_enough_and_utf8(name: bytes) -> None:
    shown = text(name)
    assert 1 <= len(shown.encode()) <= MAX_NAME and "\0" not in shown
    assert text(name) != text(name[:-1] + b"!")


def test_two_bitmaps_are_never_shown_by_one_name(tmp_path: Path) -> None:
    path = make(tmp_path / "vm.qcow2")
    with image_at(path) as image:
        image.write_bitmaps([dirty(SHOWN), dirty("xxxx")])
    data = bytearray(path.read_bytes())
    at = data.index(b"xxxx")
    data[at : at + 4] = RAW
    path.write_bytes(data)
    first, second = stored(path)
    assert first.name == SHOWN and second.name == SHOWN + "~2"
    with image_at(path) as image:
        image.write_bitmaps([second])
    assert names_on_disk(path) == [RAW]


# What is wrong with the second of three bitmaps.
Flaw = dict[str, Any]


def entries(path: Path) -> list[int]:
    """Where the entries of the directory are."""
    data = path.read_bytes()
    ext = data.index(struct.pack(">II", headers.EXT_BITMAPS, 24)) + 8
    at, out = struct.unpack_from(">Q", data, ext + 16)[0], []
    for _ in range(struct.unpack_from(">I", data, ext)[0]):
        out.append(at)
        name, extra = struct.unpack_from(">HI", data, at + 18)
        at += (24 + name + extra + 7) & ~7
    return out


def break_it(path: Path, how: str) -> None:
    image, at = Image(path), entries(path)[1]
    table = image.get(at)
    {
        "table beyond the end": lambda: image.put(at, 1 << 40),
        "table at an odd offset": lambda: image.put(at, table + 512),
        "table at the L1 table": lambda: image.put(at, image.l1),
        "table of another": lambda: image.put(at, image.get(entries(path)[0])),
        "wrong length": lambda: image.put(at + 8, 77, "I"),
        "too long": lambda: image.put(at + 8, 1 << 27, "I"),
        "granularity": lambda: image.put(at + 17, 40, "B"),
        "bits beyond the end": lambda: image.put(table, 1 << 40),
        "bits at an odd offset": lambda: image.put(table, 0x200),
        "bits at an L2 table": lambda: image.put(table, image.l2(0)),
        "bits of another": lambda: image.put(table, image.get(image.get(entries(path)[0]))),
        "same name": lambda: image.put(at + 24, int.from_bytes(b"b0", "big"), "H"),
    }[how]()


HOW = [
    "table beyond the end", "table at an odd offset", "table at the L1 table", "table of another",
    "wrong length", "too long", "granularity", "bits beyond the end", "bits at an odd offset",
    "bits at an L2 table", "bits of another", "same name",
]  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-img", "qemu-io")
    path = make(tmp_path_factory.mktemp("three") / "vm.qcow2", cluster_size="4k")
    io(path, "write -P 7 0 200k")
    with image_at(path) as image:
        image.write_bitmaps([dirty(n, granularity=512) for n in ("b0", "b1", "b2")])
    return path


@pytest.mark.parametrize(
    ("how", "verb"),
    [
        *((how, verb) for how in HOW for verb in ("serve", "check")),
        *((how, verb) for how in (HOW[1], HOW[-1]) for verb in ("remove", "resize")),
    ],
)
def test_a_damaged_bitmap_costs_no_other_one_anything(
    three: Path, tmp_path: Path, how: str, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copy(three, tmp_path / "vm.qcow2"))
    others = known(b for b in stored(path) if b.name != "b1")
    break_it(path, how)
    shown = "b0~2" if how == "same name" else "b1"
    bad = next(b for b in stored(path) if b.name == shown)
    assert bad.inconsistent and "damaged" in bad.reason
    assert check(path).corruptions
    left = [shown]
    if verb == "serve":
        disk = Disk(opening.open_image(str(path)), "vm")
        assert f"'{shown}' is damaged" in caplog.text
        assert disk.root.bitmaps[shown].inconsistent
        disk.pwrite(memoryview(b"y" * 4096), 3 << 20)
        for name in others:
            assert disk.root.bitmaps[name].any(3 << 20, 4096)
        disk.root.close()
    elif verb == "check":
        said = check(path, "all")
        assert said.exit_code == 0 and f"'{shown}' is damaged" in " ".join(said.repairs)
        assert known(b for b in stored(path) if b.name != shown) == others
    elif verb == "remove":
        listed = cowferry("bitmap", path)
        assert "inconsistent: it is damaged" in listed and shown in listed
        cowferry("bitmap", "--remove", path, shown)
        left = []
        assert known(stored(path)) == others
    else:
        cowferry("resize", path, "8M")
    found = stored(path)
    assert [b.name for b in found if b.inconsistent] == left
    assert sorted(b.name for b in found if not b.inconsistent) == ["b0", "b2"]
    assert verdict(path) in (0, 3) and not check(path).corruptions
    theirs = {b["name"]: b["flags"] for b in info_of_qemu(path)["bitmaps"]}
    assert set(theirs) == {"b0", "b2", *left}
    assert all(("in-use" in flags) == (name in left) for name, flags in theirs.items())
    check(path, "leaks")
    assert verdict(path) == 0
    assert by_qemu(path)[: 200 << 10] == b"\x07" * (200 << 10)


def test_a_bitmap_that_lies_over_guest_data_loses_its_bits_and_the_guest_nothing(
    three: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(three, tmp_path / "vm.qcow2"))
    image, oracle = Image(path), by_qemu(path)
    table = image.get(entries(path)[1])
    image.put(table, image.host(0))
    assert check(path).exit_code == 2 == verdict(path)
    done = check(path, "all")
    assert done.exit_code == 0 == verdict(path), done
    assert [b.name for b in stored(path) if b.inconsistent] == ["b1"]
    cowferry("bitmap", "--remove", path, "b1")
    disk = Disk(opening.open_image(str(path)), "vm")
    disk.pwrite(memoryview(b"z" * (1 << 20)), 2 << 20)
    assert not differs(contents(disk)[: 1 << 20], oracle[: 1 << 20])
    disk.root.close()
    assert verdict(path) == 0


@pytest.mark.parametrize("how", ["table beyond the end", "too much"])
@pytest.mark.parametrize("kept", [True, False])
def test_B1_a_bitmap_that_cannot_be_read_is_in_use_before_the_first_write(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, kept: bool
) -> None:
    """Another program may be able to read it, and would rely on it."""
    path = Path(shutil.copy(three, tmp_path / "vm.qcow2"))
    if how == "too much":  # of all bitmaps together, the third is one too many
        monkeypatch.setattr(listing, "MAX_BYTES", 2 * 4096)
        bad = 2
    else:
        break_it(path, how)
        bad = 1
    if kept:
        disk = Disk(opening.open_image(str(path)), "vm")
        disk.pwrite(memoryview(b"y" * 4096), 3 << 20)
        disk.root.close()
    else:
        with image_at(path) as image:  # nobody keeps the bitmaps
            image.pwrite(memoryview(b"y" * 4096), 3 << 20)
    with image_at(path, read_only=True) as image:
        flags = [e.flags & listing.IN_USE for e in listing.directory(image)]
    assert flags[bad] and (all(flags) or kept)
    image_now = Image(path)
    assert image_now.get(entries(path)[bad] + 12, "I") & listing.IN_USE


def test_of_a_directory_that_cannot_be_read_the_loss_is_told(
    three: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copy(three, tmp_path / "vm.qcow2"))
    data = path.read_bytes()
    ext = data.index(struct.pack(">II", headers.EXT_BITMAPS, 24)) + 8
    Image(path).put(ext + 16, 1 << 40)
    assert check(path).exit_code == 2
    copy = Path(shutil.copy(path, tmp_path / "copy.qcow2"))
    with image_at(path) as image:
        assert image.read_bitmaps() == []
    assert "its bitmaps are lost" in caplog.text and str(path) in caplog.text
    done = check(copy, "all")
    assert done.exit_code == 0 == verdict(copy) and "bitmap directory" in " ".join(done.repairs)
    assert os.path.getsize(copy)
