"""`cowferry info` opens the file that it is asked about, and no other that is named in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loops import ran
from offline import cowferry
from test_convert import qcow2
from tests_support import need

SIZE = 1 << 20


def opened(*arguments: object) -> set[str]:
    """The paths that the command opened, or tried to."""
    need("strace")
    done = subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=open,openat,openat2", sys.executable, "-m", "cowferry",
         *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    return set(re.findall(r'open\w*\((?:AT_FDCWD, )?"([^"]*)"', done.stderr))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """top.qcow2 with a data file, over mid.qcow2 with one, over base.raw."""
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    below, format = tmp_path / "base.raw", "raw"
    for name in ("mid", "top"):
        options = f"backing_file={below},backing_fmt={format},data_file={tmp_path / name}.raw"
        below, format = qcow2(tmp_path / f"{name}.qcow2", options=options), "qcow2"
    return below


def ours(paths: set[str], folder: Path) -> set[str]:
    """The images among them, without what we keep beside an image."""
    names = {os.path.basename(p) for p in paths if p.startswith(str(folder))}
    return {n for n in names if n.endswith((".qcow2", ".raw"))}


def test_info_opens_no_data_file_and_no_backing_file(image: Path, tmp_path: Path) -> None:
    assert ours(opened("info", image), tmp_path) == {"top.qcow2"}
    chain = {"top.qcow2", "mid.qcow2", "base.raw"}
    assert ours(opened("info", "--backing-chain", image), tmp_path) == chain


def test_info_does_not_need_the_data_file(image: Path, tmp_path: Path) -> None:
    want = json.loads(ran("qemu-img", "info", "--output=json", str(image)))
    for name in ("top.raw", "mid.raw", "base.raw"):
        (tmp_path / name).unlink()
    assert json.loads(cowferry("info", "--output=json", image)) == want
    data = bytearray(image.read_bytes())
    at = data.index(str(tmp_path / "top.raw").encode())
    data[at : at + 5] = b"/etc/"  # a name that leads elsewhere
    image.write_bytes(data)
    found = json.loads(cowferry("info", "--output=json", image))
    assert found["format-specific"]["data"]["data-file"].startswith("/etc/")
    assert "No such file" in cowferry("map", tmp_path / "mid.qcow2", code=1)


@pytest.mark.parametrize("command", ["info", "map", "check", "compare", "convert", "resize"])
def test_what_is_no_image_is_refused_at_once(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    other: dict[str, list[object]] = {
        "compare": ["/dev/null"],
        "convert": [tmp_path / "x.raw"],
        "resize": ["1M"],
    }
    code = 2 if command == "compare" else 1
    for name, why in (
        (tmp_path / "fifo", "neither a regular file nor a block device"),
        ("/dev/zero", "neither a regular file nor a block device"),
        (tmp_path / "folder", "neither a regular file nor a block device|Is a directory"),
        (tmp_path / "none", "No such file or directory"),
    ):
        for format in ([], ["-f", "raw"], ["-f", "qcow2"]):
            text = cowferry(command, *format, name, *other.get(command, []), code=code)
            assert re.search(why, text), text
