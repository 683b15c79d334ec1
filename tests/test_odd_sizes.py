"""Images that end inside a sector: the disk has whole sectors, as QEMU has it."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chains import contents, differs
from cowferry.block import keeper
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.cli.offline.convert import convert_command
from cowferry.cli.offline.create import create_command
from cowferry.cli.offline.info import info_command
from cowferry.cli.offline.resize import resize_command
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told, a_daemon
from damage import verdict
from offline import cowferry
from tests_support import need

ODD = 1_000_003
WHOLE = 1_000_448


def odd_image(folder: Path, name: str = "odd.raw") -> tuple[Path, bytearray]:
    """A raw image, and what its disk reads as."""
    path = folder / name
    data = random.Random(4).randbytes(ODD)
    path.write_bytes(data)
    return path, bytearray(data.ljust(WHOLE, b"\0"))


def qemu_sees(path: Path, format: str, oracle: bytes | bytearray, folder: Path) -> None:
    need("qemu-img")
    flat = folder / "flat"
    command = ["qemu-img", "convert", "-U", "-f", format, "-O", "raw", str(path), str(flat)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not differs(flat.read_bytes(), bytes(oracle))


def test_the_last_sector_is_read_and_written(tmp_path: Path) -> None:
    path, oracle = odd_image(tmp_path)
    disk = Disk(opening.open_image(str(path)), "vm")
    assert disk.size == WHOLE and not differs(contents(disk), oracle)
    assert path.stat().st_size == ODD, "it was only read"
    assert sum(e.length for e in disk.extents(0, WHOLE)) == WHOLE
    buf = memoryview(bytearray(b"x" * 512))
    disk.pread(buf, WHOLE - 512)
    assert buf == oracle[-512:]
    disk.pwrite(memoryview(b"y" * 100), WHOLE - 100)
    oracle[-100:] = b"y" * 100
    disk.zero(WHOLE - 600, 200, unmap=True)
    oracle[-600:-400] = bytes(200)
    disk.discard(0, 4096)
    oracle[:4096] = bytes(4096)
    with pytest.raises(OSError):
        disk.pwrite(memoryview(b"z"), WHOLE)
    disk.flush()
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)
    assert path.read_bytes() == oracle
    qemu_sees(path, "raw", oracle, tmp_path)


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_an_overlay_of_it_is_as_large_and_commits_back(tmp_path: Path, format: str) -> None:
    path, oracle = odd_image(tmp_path)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(path))
        overlay = tmp_path / f"over.{format}"
        snapshot = {"device": "vm", "snapshot-file": str(overlay), "format": format}
        daemon.execute("blockdev-snapshot-sync", snapshot)
        assert disk.size == WHOLE
        disk.pwrite(memoryview(b"end"), WHOLE - 3)
        disk.flush()
        oracle[-3:] = b"end"
        assert not differs(contents(disk), oracle)
        qemu_sees(overlay, format, oracle, tmp_path)
        daemon.execute("block-commit", {"device": "vm", "job-id": "c"})
        told.wait("BLOCK_JOB_READY")
        daemon.execute("job-complete", {"id": "c"})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED")
        assert not differs(contents(disk), oracle)
    assert path.read_bytes() == oracle


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
@pytest.mark.parametrize("command", ["x-disk-copy", "drive-mirror", "drive-backup"])
def test_it_is_copied_into_every_format(tmp_path: Path, command: str, format: str) -> None:
    path, oracle = odd_image(tmp_path)
    target = tmp_path / f"copy.{format}"
    more = {} if command == "x-disk-copy" else {"sync": "full"}
    with a_daemon() as daemon:
        told = Told(daemon)
        daemon.open_disk("vm", str(path))
        given: dict[str, Any] = {"device": "vm", "target": str(target), "format": format, **more}
        daemon.execute(command, {**given, "job-id": "j"})
        if command != "drive-backup":
            told.wait("BLOCK_JOB_READY")
            daemon.execute("job-complete", {"id": "j"})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED")
        told.wait("JOB_STATUS_CHANGE", status="null")
    qemu_sees(target, format, oracle, tmp_path)


def test_a_copy_to_a_raw_file_that_ends_inside_a_sector_is_accepted(tmp_path: Path) -> None:
    path, oracle = odd_image(tmp_path)
    target = tmp_path / "there.raw"
    target.write_bytes(b"\xff" * ODD)
    with a_daemon() as daemon:
        told = Told(daemon)
        daemon.open_disk("vm", str(path))
        there = {"target": str(target), "format": "raw", "sync": "full", "mode": "existing"}
        daemon.execute("drive-mirror", {"device": "vm", "job-id": "j", **there})
        told.wait("BLOCK_JOB_READY")
        daemon.execute("job-complete", {"id": "j"})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED")
    assert target.read_bytes().ljust(WHOLE, b"\0") == oracle


def test_the_command_line_makes_and_tells_whole_sectors(tmp_path: Path) -> None:
    path, oracle = odd_image(tmp_path)
    run = CliRunner().invoke
    shown = run(info_command, ["--output", "json", str(path)])
    assert json.loads(shown.output)["virtual-size"] == WHOLE
    for format in ("raw", "qcow2", "qed"):
        target = tmp_path / f"c.{format}"
        done = run(convert_command, ["-O", format, str(path), str(target)])
        assert done.exit_code == 0, done.output
        qemu_sees(target, format, oracle, tmp_path)
        overlay = tmp_path / f"o{format}.qcow2"
        done = run(create_command, ["-b", str(path), "-F", "raw", str(overlay)])
        assert done.exit_code == 0, done.output
        qemu_sees(overlay, "qcow2", oracle, tmp_path)
    made = tmp_path / "made.raw"
    assert run(create_command, [str(made), str(ODD)]).exit_code == 0
    assert made.stat().st_size == WHOLE
    assert run(resize_command, [str(made), str(WHOLE + 1)]).exit_code == 0
    assert made.stat().st_size == WHOLE + 512


def test_its_bitmaps_stay_right(tmp_path: Path) -> None:
    path, _ = odd_image(tmp_path)
    disk = Disk(opening.open_image(str(path)), "vm")
    with disk.exclusive():
        keeper.keep(disk.root, Bitmap("b0", disk.size))
    disk.pwrite(memoryview(b"end"), WHOLE - 3)
    opening.close_chain(disk.root)
    disk = Disk(opening.open_image(str(path)), "vm")
    bitmap = disk.root.bitmaps["b0"]
    assert not bitmap.inconsistent and bitmap.any(WHOLE - 3, 3) and not bitmap.any(0, 4096)
    disk.resize(2 * ODD)
    assert disk.size == disk.root.bitmaps["b0"].size == 2_000_384
    opening.close_chain(disk.root)


def test_a_window_keeps_the_size_that_it_was_given(tmp_path: Path) -> None:
    path, oracle = odd_image(tmp_path)
    file = {"driver": "file", "filename": str(path)}
    node = opening.open_node({"driver": "raw", "file": file, "offset": 512, "size": 1001})
    assert node.size == 1001
    node.close()
    node = opening.open_node({"driver": "raw", "file": file, "offset": 512})
    assert contents(node) == oracle[512:]
    node.close()
    for options in ({"offset": 2 * ODD}, {"size": WHOLE + 1}):
        with pytest.raises(CowferryError, match="fit"):
            opening.open_node({"driver": "raw", "file": file, **options})


def test_an_image_that_is_filled_has_whole_sectors(tmp_path: Path) -> None:
    base, oracle = odd_image(tmp_path)
    path = tmp_path / "vm.raw"
    options = {"backing_file": str(base), "backing_fmt": "raw"}
    opening.create_image(str(path), "raw", ODD, options)
    disk = Disk(opening.open_image(str(path)), "vm")
    assert not differs(contents(disk), oracle)
    disk.pwrite(memoryview(b"end"), WHOLE - 3)
    oracle[-3:] = b"end"
    opening.close_chain(disk.root)
    disk = Disk(opening.open_image(str(path)), "vm")
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)


def test_a_qcow2_header_with_an_odd_size_has_the_whole_sectors_before_it(tmp_path: Path) -> None:
    """As for QEMU. Every file of our own making has whole sectors."""
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    data = bytearray(path.read_bytes())
    data[24:32] = ((1 << 20) - 1).to_bytes(8, "big")
    path.write_bytes(data)
    info = json.loads(cowferry("info", "--output=json", path))
    size = info["virtual-size"]
    assert size == (1 << 20) - 512
    disk = Disk(opening.open_image(str(path)), "vm")
    disk.pwrite(memoryview(b"e" * 512), size - 512)
    with pytest.raises(OSError):
        disk.pwrite(memoryview(b"e" * 511), size)
    disk.root.close()
    cowferry("convert", "-O", "raw", path, tmp_path / "ours.raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, tmp_path / "theirs.raw"], check=True)
    ours = (tmp_path / "ours.raw").read_bytes()
    assert ours == (tmp_path / "theirs.raw").read_bytes() and ours.endswith(b"e" * 512)
    cowferry("create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", tmp_path / "top.qcow2")
    cowferry("convert", "-O", "qcow2", path, tmp_path / "copy.qcow2")
    cowferry("compare", "-s", path, tmp_path / "top.qcow2")
    cowferry("resize", path, "2M")
    assert cowferry("check", path) and verdict(path) == 0
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, tmp_path / "theirs.raw"], check=True)
    assert (tmp_path / "theirs.raw").read_bytes() == ours + bytes((1 << 20) + 512)
