"""Names that are no UTF-8, or hold control characters: files, and what images record.

No command ends with a traceback because of one, and none lets it reach the terminal as it is, but
for the names of files, which are printed as the bytes that they are.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from damage import io
from tests_support import need

BASE = b"ba\xe9se.qcow2"


def run(folder: Path, *arguments: str | bytes, code: int = 0) -> tuple[bytes, str]:
    """(output, errors) of the command line, in a locale of UTF-8 as most users have it."""
    done = subprocess.run(
        [sys.executable, "-m", "cowferry", *arguments],
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    errors = done.stderr.decode(errors="replace")
    assert done.returncode == code and "Traceback" not in errors, errors
    return done.stdout, errors


def qemu_img(folder: Path, *arguments: str | bytes) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An overlay over a file whose name is no UTF-8, with a snapshot of such a name."""
    need("qemu-img", "qemu-io")
    qemu_img(tmp_path, "create", "-q", "-f", "qcow2", BASE, "1M")
    io(Path(os.fsdecode(bytes(tmp_path) + b"/" + BASE)), "write -P 5 64k 64k")
    qemu_img(tmp_path, "create", "-q", "-f", "qcow2", "-b", BASE, "-F", "qcow2", "top.qcow2")
    qemu_img(tmp_path, "snapshot", "-c", b"sn\xe9\x1b[31mp", "top.qcow2")
    return tmp_path


def test_files_whose_names_are_no_utf8_are_made_and_looked_at(folder: Path) -> None:
    made, _ = run(folder, "create", "-f", "qcow2", "-b", BASE, "-F", "qcow2", b"n\xe9w.qcow2")
    assert b"'n\xe9w.qcow2'" in made and b"backing_file=ba\xe9se.qcow2" in made
    shown, _ = run(folder, "info", b"n\xe9w.qcow2")
    assert b"image: n\xe9w.qcow2\n" in shown and rb"backing file: ba\xe9se.qcow2" in shown
    shown, _ = run(folder, "info", "--output=json", "--backing-chain", b"n\xe9w.qcow2")
    assert os.fsencode(json.loads(shown)[1]["filename"]) == BASE
    assert (folder / os.fsdecode(BASE)).exists()
    said = run(folder, "info", b"n\xe9", code=1)[1]
    assert r"'n\xe9'" in said


def test_bitmaps_of_such_a_file_are_kept_and_listed(folder: Path) -> None:
    for name in (BASE, b"x\xe9.raw"):
        if name != BASE:
            run(folder, "create", "-q", "-f", "raw", name, "1M")
        run(folder, "bitmap", "--add", name, "since")
        assert b"since" in run(folder, "bitmap", name)[0]
    assert rb"x\xe9.raw.bitmaps" in run(folder, "bitmap", b"x\xe9.raw")[0]


def test_names_in_an_image_reach_no_terminal_as_they_are(folder: Path) -> None:
    top = folder / "top.qcow2"
    data = bytearray(top.read_bytes())
    at = data.index(struct.pack(">I", 0xE2792ACA)) + 8  # the backing file's format
    data[at : at + 5] = b"\x1b[\xe91m"
    top.write_bytes(data)
    shown, _ = run(folder, "info", "top.qcow2")
    assert b"\x1b" not in shown and rb"format: \x1b[\xe91" in shown and b"31mp" in shown
    assert rb"\x1b[\xe91" in run(folder, "map", "top.qcow2", code=1)[1].encode()
    run(folder, "check", "top.qcow2")
    assert top.read_bytes() == data
    run(folder, "rebase", "-u", "-b", BASE, "-F", "qcow2", "top.qcow2")
    assert b"0x10000" in run(folder, "map", "top.qcow2")[0]


def test_a_data_file_whose_name_has_a_nul_byte_is_refused_in_a_line(tmp_path: Path) -> None:
    need("qemu-img")
    qemu_img(tmp_path, "create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "vm.qcow2", "1M")
    data = (tmp_path / "vm.qcow2").read_bytes().replace(b"data.raw", b"data\0raw")
    (tmp_path / "vm.qcow2").write_bytes(data)
    for verb in ("info", "check", "map"):
        assert "NUL" in run(tmp_path, verb, "vm.qcow2", code=1)[1]


def test_names_of_features_are_shown_without_control_characters(tmp_path: Path) -> None:
    need("qemu-img")
    qemu_img(tmp_path, "create", "-q", "-f", "qcow2", "vm.qcow2", "1M")
    data = bytearray((tmp_path / "vm.qcow2").read_bytes())
    at = data.index(struct.pack(">I", 0x6803F857)) + 8
    data[at : at + 12] = b"\0\x28new\xff\x1b[31m\0"
    struct.pack_into(">Q", data, 72, 1 << 40)
    (tmp_path / "vm.qcow2").write_bytes(data)
    said = run(tmp_path, "info", "vm.qcow2", code=1)[1]
    assert "new\ufffd[31m" in said and "\x1b" not in said
