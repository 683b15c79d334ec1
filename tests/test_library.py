"""`import cowferry`: a chain opened, served, streamed and looked at from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cowferry
from chains import contents, make_base
from cowferry.block.node import State
from cowferry.drivers.nbd_client import NbdClient

SIZE = 4 << 20


def images(folder: Path) -> bytearray:
    oracle = make_base(folder, SIZE)
    for name, below, kind in (("sn1", "base.raw", "raw"), ("vm", "sn1.qcow2", "qcow2")):
        path = str(folder / f"{name}.qcow2")
        cowferry.create(path, SIZE, backing_file=below, backing_fmt=kind)
    return oracle


def test_extents_say_who_holds_what(tmp_path: Path) -> None:
    images(tmp_path)
    with cowferry.open(str(tmp_path / "vm.qcow2")) as disk:
        disk.pwrite(memoryview(b"x" * 65536), 65536)
        found = [(e.length, e.state, e.depth) for e in disk.extents(0, 262144)]
    assert found == [
        (65536, State.DATA, 2),
        (65536, State.DATA, 0),
        (131072, State.DATA, 2),
    ]


def test_serve_and_stream_while_a_client_writes(tmp_path: Path) -> None:
    oracle = images(tmp_path)
    calls: list[tuple[int, int]] = []
    with (
        cowferry.open(str(tmp_path / "vm.qcow2")) as disk,
        cowferry.serve(vm=disk) as server,
        NbdClient(server.uri("vm")) as client,
    ):
        client.pwrite(b"g" * 3000, 777)
        oracle[777:3777] = b"g" * 3000
        cowferry.stream(disk, progress=lambda done, length: calls.append((done, length)))
        (tmp_path / "base.raw").unlink()
        (tmp_path / "sn1.qcow2").unlink()
        assert client.pread(SIZE, 0) == oracle
    assert calls[-1] == (SIZE, SIZE)
    with cowferry.open(str(tmp_path / "vm.qcow2"), read_only=True) as disk:
        assert contents(disk) == oracle
        assert disk.root.backing is None


def test_stream_to_a_base_keeps_it(tmp_path: Path) -> None:
    oracle = images(tmp_path)
    with cowferry.open(str(tmp_path / "vm.qcow2")) as disk:
        cowferry.stream(disk, base="base.raw")
        assert disk.root.backing is not None
        assert disk.root.backing.filename == str(tmp_path / "base.raw")
        with pytest.raises(cowferry.CowferryError, match="not a backing image"):
            cowferry.stream(disk, base="sn1.qcow2")
    (tmp_path / "sn1.qcow2").unlink()
    with cowferry.open(str(tmp_path / "vm.qcow2"), read_only=True) as disk:
        assert contents(disk) == oracle


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "base.raw").unlink()
    with (
        pytest.raises(cowferry.CowferryError, match=r"base\.raw"),
        cowferry.open(str(tmp_path / "vm.qcow2")),
    ):
        pass
    with pytest.raises(cowferry.CowferryError, match=r"no option|unexpected|unknown"):
        cowferry.create(str(tmp_path / "x.qcow2"), SIZE, no_such_option="1")
    assert not (tmp_path / "x.qcow2").exists()


def test_importing_it_imports_almost_nothing() -> None:
    text = "import sys, cowferry; print(*[m for m in sys.modules if m.startswith('cowferry')])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"cowferry", "cowferry.errors"}
