"""Bitmap files that do not fit their image, and images that others have written: B2."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cowferry.block import keeper
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceInUse, ImageError
from test_keeper import K64, REGION, SIZE, a_disk, crash, keep, look, on_disk, write
from tests_support import need


@pytest.fixture(autouse=True)
def _regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as in a large disk."""
    monkeypatch.setattr(keeper, "FEW_REGIONS", 1)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "vm.raw"
    opening.create_image(str(path), "raw", SIZE, {})
    return path


def larger(path: Path) -> None:
    os.truncate(path, SIZE + 4096)


def another(path: Path) -> None:
    shutil.copy2(path, path.parent / "copy")
    os.replace(path.parent / "copy", path)


def made_anew(path: Path) -> None:
    """File systems use an inode number again at once."""
    path.unlink()
    with open(path, "wb") as f:
        f.truncate(SIZE)


def touched(path: Path) -> None:
    with open(path, "r+b") as f:
        f.write(b"by somebody else")


def cut(path: Path) -> None:
    os.truncate(f"{path}.bitmaps", 4100)


def scratched(path: Path) -> None:
    with open(f"{path}.bitmaps", "r+b") as f:
        f.seek(4096)
        f.write(b"\xff")


def test_a_file_in_use_is_not_asked_for_the_time(raw: Path) -> None:
    """Whoever crashed could not note it; and what it may miss is said in docs/bitmaps.md."""
    disk = a_disk(raw)
    keep(disk)
    write(disk, 0)
    crash(disk)
    touched(raw)
    assert not look(raw)["b0"].inconsistent


@pytest.mark.parametrize(
    ("crashed", "harm", "why"),
    [
        (False, larger, "of another size: 25165824 bytes, and the image has 25169920"),
        (True, larger, "of another size"),
        (False, another, "of another image"),
        (True, another, "of another image"),
        (True, made_anew, "of another image"),
        (False, touched, "changed by another program"),
        (False, cut, "cut short"),
        (True, cut, "cut short"),
        (False, scratched, "checksum of bitmap 'b0' is wrong"),
    ],
)
def test_B2_bitmaps_that_cannot_be_relied_on_are_listed_and_removed_no_more(
    raw: Path, crashed: bool, harm: Callable[[Path], None], why: str
) -> None:
    disk = a_disk(raw)
    keep(disk)
    write(disk, 0)
    if crashed:
        crash(disk)
    else:
        opening.close_chain(disk.root)
    harm(raw)
    found = look(raw)["b0"]
    assert found.inconsistent and why in found.reason
    disk = a_disk(raw)  # the disk itself is there
    found = disk.root.bitmaps["b0"]
    assert found.inconsistent and why in found.reason
    write(disk, 0)
    good = keep(disk, "good")
    write(disk, 9 << 20)
    opening.close_chain(disk.root)
    again = look(raw)  # and what was inconsistent stays so
    assert again["b0"].inconsistent and again["b0"].reason
    assert not again["good"].inconsistent and again["good"].bits == good.bits
    disk = a_disk(raw)
    with disk.exclusive():
        disk.root.bitmaps = {"good": disk.root.bitmaps["good"]}
        keeper.changed(disk.root)
    opening.close_chain(disk.root)
    assert list(look(raw)) == ["good"]


def test_a_damaged_header_is_told_and_the_disk_goes_on(
    raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = a_disk(raw)
    keep(disk)
    opening.close_chain(disk.root)
    with open(f"{raw}.bitmaps", "r+b") as f:
        f.seek(20)
        f.write(b"?")
    disk = a_disk(raw)
    assert "vm.raw.bitmaps': the bitmap file is damaged" in caplog.text
    assert not disk.root.bitmaps and disk.root.keeper is None
    write(disk, 0)
    keep(disk)  # which replaces it
    write(disk, 0)
    opening.close_chain(disk.root)
    assert look(raw)["b0"].count() == K64


def test_a_file_of_a_later_version_is_not_made_wrong_by_us(raw: Path) -> None:
    disk = a_disk(raw)
    keep(disk)
    opening.close_chain(disk.root)
    path = Path(f"{raw}.bitmaps")
    sector = bytearray(path.read_bytes()[:512])
    sector[8] = 2
    sector[508:] = struct.pack("<I", zlib.crc32(sector[:508]))
    path.write_bytes(sector + path.read_bytes()[512:])
    with pytest.raises(ImageError, match="has version 2") as error:
        opening.open_image(str(raw), "raw")
    assert "remove the file" in error.value.hint
    assert look(raw) == {}  # it can be read
    assert path.read_bytes()[:512] == sector


@pytest.mark.parametrize("crashed", [False, True])
def test_B2_a_qcow2_image_that_qemu_has_written_is_not_believed(
    tmp_path: Path, crashed: bool
) -> None:
    need("qemu-io")
    path = tmp_path / "vm.qcow2"
    opening.create_image(str(path), "qcow2", SIZE, {})
    disk = a_disk(path, "qcow2")
    keep(disk)
    write(disk, 0)
    disk.flush()
    if crashed:
        crash(disk)
    else:
        opening.close_chain(disk.root)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 9M 64k", str(path)],
        check=True, capture_output=True,
    )  # fmt: skip
    found = look(path, "qcow2")["b0"]
    assert found.inconsistent == crashed  # closed in order, QEMU has kept it, as it does
    if crashed:
        assert "another program" in found.reason
    else:
        assert list(found.runs()) == [(0, K64), (9 << 20, K64)]


def _window(path: Path) -> Node:
    return opening.open_node({**opening.image_options(str(path), "raw"), "offset": 65536})


def _plain(path: Path) -> Node:
    return opening.open_node(opening.file_options(str(path)))


def _read_only(path: Path) -> Node:
    return opening.open_image(str(path), "raw", read_only=True)


@pytest.mark.parametrize(
    ("opened", "says"), [(_window, "from its beginning"), (_plain, "from its"), (_read_only, "")]
)
def test_who_cannot_have_persistent_bitmaps_is_told(
    raw: Path, opened: Callable[[Path], Node], says: str
) -> None:
    node = opened(raw)
    with pytest.raises(CowferryError) as error:
        keeper.keep(node, Bitmap("b0", node.size))
    assert "vm.raw'" in error.value.desc and says in error.value.hint
    assert not node.bitmaps and node.keeper is None
    opening.close_chain(node)
    assert os.listdir(raw.parent) == ["vm.raw"]


@pytest.mark.parametrize("end", [crash, lambda d: opening.close_chain(d.root)])
def test_B2_nobody_writes_past_bitmaps(raw: Path, end: Callable[[Disk], None]) -> None:
    disk = a_disk(raw)
    keep(disk)
    end(disk)
    with pytest.raises(ImageError, match="bitmaps, which nobody would keep"):
        _window(raw)
    daemon = Daemon()
    try:
        daemon.graph.add_node({**opening.file_options(str(raw)), "node-name": "plain"})
        plain = daemon.graph.disk("plain")
        daemon.graph.hold(plain, writable=False)
        with pytest.raises(ImageError, match="bitmaps, which nobody would keep") as error:
            daemon.graph.hold(plain, writable=True)
        assert "vm.raw.bitmaps" in error.value.hint
        daemon.graph.unhold(plain, writable=False)
    finally:
        daemon.close()
    assert not look(raw)["b0"].inconsistent


def test_a_new_image_has_no_bitmaps_of_an_older_one(raw: Path) -> None:
    for end in (crash, lambda d: opening.close_chain(d.root)):
        disk = a_disk(raw)
        keep(disk)
        write(disk, 0)
        with pytest.raises(DeviceInUse):  # and of one that is in use they are left alone
            opening.create_image(str(raw), "raw", SIZE, {})
        assert on_disk(raw).count() == REGION
        end(disk)
        opening.create_image(str(raw), "raw", SIZE, {})
        assert os.listdir(raw.parent) == ["vm.raw"]
