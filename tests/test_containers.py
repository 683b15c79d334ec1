"""Containers that no driver reads are refused by name and by content, and never served raw."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cowferry.cli.offline.convert import convert_command
from cowferry.cli.offline.create import create_command
from cowferry.cli.offline.info import info_command
from cowferry.cli.offline.map import map_command
from cowferry.drivers import opening
from cowferry.drivers.formats import FOREIGN, format_of
from cowferry.errors import CowferryError, ImageError
from daemons import a_daemon
from loops import loop
from tests_support import need

MiB = 1 << 20
#: How qemu-img makes each kind that it can make, and what each is called.
MADE = {
    "vmdk": ("vmdk", "VMDK"),
    "vmdk -o subformat=streamOptimized": ("vmdk", "VMDK"),
    "vmdk -o subformat=monolithicFlat": ("vmdk", "VMDK"),
    "vmdk -o subformat=twoGbMaxExtentSparse": ("vmdk", "VMDK"),
    "vdi": ("vdi", "VDI"),
    "vpc": ("vpc", "VHD"),
    "vpc -o subformat=fixed": ("vpc", "VHD"),
    "vhdx": ("vhdx", "VHDX"),
    "parallels": ("parallels", "Parallels"),
    "qcow": ("qcow", "qcow version 1"),
}
#: Those that it cannot make: begin and end of a file.
WRITTEN = {
    "COWD": (b"COWD" + bytes(508), b""),
    "parallels 2": (b"WithouFreSpacExt", b""),
    "bochs": (b"Bochs Virtual HD Image\0", b""),
    "cloop": (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", b""),
    "dmg": (b"", b"koly" + bytes(508)),
    "old VHD": (b"", b"conectix" + bytes(503)),
    "SESparse": (b"\xbe\xba\xfe\xca\0\0\0\0\1\0\0\0\2\0\0\0", b""),
    "qcow2 of a version to come": (b"QFI\xfb\0\0\0\4", b""),
    "luks": (b"LUKS\xba\xbe\0\1", b""),
    "luks2": (b"LUKS\xba\xbe\0\2", b""),
    "simg": (b"\x3a\xff\x26\xed\1\0\0\0", b""),
}


def made(folder: Path, what: str, name: str) -> Path:
    need("qemu-img")
    path = folder / name
    kind, *options = what.split()
    command = ["qemu-img", "create", "-q", "-f", kind, *options, str(path), "4M"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return path


def refused(path: Path | str, name: str) -> None:
    with pytest.raises(ImageError) as error:
        format_of(str(path))
    said = f"{error.value.desc} {error.value.hint}"
    assert name in said and "-f raw" in said and str(path) in said


@pytest.mark.parametrize("what", MADE)
def test_what_qemu_makes_is_known_by_its_content(tmp_path: Path, what: str) -> None:
    kind, name = MADE[what]
    for file in ("disk", "disk.img", "disk.raw", "disk.bin"):
        path = made(tmp_path, what, file)
        refused(path, name)
        with pytest.raises(ImageError, match=name):
            opening.open_image(str(path), read_only=True)
        opening.open_image(str(path), "raw", read_only=True).close()  # the user knows better
    with pytest.raises(CowferryError) as error:
        opening.open_image(str(path), kind)
    assert name in error.value.hint and f"qemu-img convert -f {kind}" in error.value.hint


@pytest.mark.parametrize("what", WRITTEN)
def test_what_others_make_is_known_by_its_content(tmp_path: Path, what: str) -> None:
    head, tail = WRITTEN[what]
    path = tmp_path / "disk.img"
    path.write_bytes(head.ljust(MiB, b"\0") + tail)
    with pytest.raises(ImageError, match="cannot be used as it is"):
        format_of(str(path))
    path.write_bytes(b"x" + head.ljust(MiB, b"\0") + tail + b"xx")
    assert format_of(str(path)) == "raw"


@pytest.mark.parametrize("what", ["vdi", "vpc -o subformat=fixed", "qcow2", "qcow"])
def test_a_device_is_looked_at_like_a_file(tmp_path: Path, what: str) -> None:
    path = made(tmp_path, what, "image")
    with loop(path) as device, pytest.raises(ImageError):
        format_of(device)


@pytest.mark.parametrize("name", [e for c in FOREIGN for e in c.extensions])
def test_a_name_is_believed_when_it_says_what_we_cannot_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"disk{name.upper()}"
    path.write_bytes(bytes(MiB))
    with pytest.raises(ImageError, match="by its name"):
        format_of(str(path))
    new = str(tmp_path / f"new{name}")
    run = CliRunner().invoke
    assert run(create_command, [new, "1M"]).exit_code == 1
    assert not Path(new).exists()
    assert run(create_command, ["-f", "raw", new, "1M"]).exit_code == 0
    opening.open_image(new, "raw").close()


def test_qcow2_and_QED_are_not_served_raw_because_of_a_name(tmp_path: Path) -> None:
    for kind in ("qcow2", "qed"):
        path = made(tmp_path, kind, "disk.raw")
        refused(path, kind)
    assert format_of(str(made(tmp_path, "qcow2", "disk.QCOW2"))) == "qcow2"
    version_1 = made(tmp_path, "qcow", "disk.qcow")
    with pytest.raises(CowferryError, match="version 1"):
        opening.open_image(str(version_1))


COMMANDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "x-disk-snapshot": lambda path: {"disks": [{"device": "vm", "snapshot-file": path}]},
    "drive-mirror": lambda path: {
        "device": "vm", "target": path, "sync": "full", "mode": "existing",
    },
    "drive-backup": lambda path: {
        "device": "vm", "target": path, "sync": "full", "mode": "existing",
    },
    "x-disk-copy": lambda path: {"device": "vm", "target": path},
    "x-disk-backup": lambda path: {"id": "b", "disks": [{"device": "vm", "target": path}]},
    "x-disk-add": lambda path: {"device": "other", "filename": path},
    "change": lambda path: {"device": "vm", "target": path},
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_takes_a_name_refuses_a_container(tmp_path: Path, command: str) -> None:
    need("qemu-img")
    disk = tmp_path / "vm.raw"
    disk.write_bytes(bytes(4 * MiB))
    path = made(tmp_path, "vmdk", "other.vmdk")
    before = path.read_bytes()
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(disk))
        with pytest.raises(CowferryError, match="VMDK"):
            daemon.execute(command, COMMANDS[command](str(path)))
        assert path.read_bytes() == before and not daemon.jobs.all()


@pytest.mark.parametrize("what", ["vmdk", "vpc -o subformat=fixed", "qcow2"])
def test_an_image_that_exists_is_not_written_raw_without_O(tmp_path: Path, what: str) -> None:
    target = made(tmp_path, what, "target.qcow2" if what == "qcow2" else "target.img")
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * 65536)
    before = target.read_bytes()
    done = CliRunner().invoke(convert_command, ["-n", str(source), str(target)])
    assert isinstance(done.exception, CowferryError)
    assert target.read_bytes() == before


def test_the_command_line_refuses_a_container(tmp_path: Path) -> None:
    path = str(made(tmp_path, "vhdx", "disk.img"))
    new = str(tmp_path / "new.qcow2")
    run = CliRunner().invoke
    for command, words in (
        (info_command, [path]),
        (map_command, [path]),
        (convert_command, ["-O", "qcow2", path, new]),
        (convert_command, [new, str(tmp_path / "new.vmdk")]),
        (create_command, ["-b", path, "-F", "vhdx", new]),
    ):
        done = run(command, words)
        error = done.exception
        assert isinstance(error, CowferryError) or done.exit_code == 1, words
    assert not Path(new).exists()
