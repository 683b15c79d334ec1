"""`import cowferry`: a chain opened, served, streamed and looked at from Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cowferry
from chains import contents, make_base
from cowferry.block.disk import Disk
from cowferry.block.node import State, chain
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError

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


def drawn(disk: Disk) -> str:
    """The chain as the 2011 discussion draws it."""
    return " <- ".join(os.path.basename(n.filename) for n in reversed(list(chain(disk.root))))


def test_a_chain_changes_under_a_client(tmp_path: Path) -> None:
    """Snapshot, both commits, a copy and a move, with a guest's writes between all of them."""
    oracle = images(tmp_path)
    with (
        cowferry.open(str(tmp_path / "vm.qcow2")) as disk,
        cowferry.serve(vm=disk) as server,
        NbdClient(server.uri("vm")) as client,
    ):

        def write(mark: bytes) -> None:
            at = (mark[0] * 7919) % (SIZE - 9000)
            client.pwrite(mark * 9000, at)
            oracle[at : at + 9000] = mark * 9000

        write(b"a")
        assert cowferry.snapshot(disk, str(tmp_path / "sx.qcow2")) == [str(tmp_path / "sx.qcow2")]
        write(b"b")
        assert drawn(disk) == "base.raw <- sn1.qcow2 <- vm.qcow2 <- sx.qcow2"
        cowferry.commit(disk, top="vm.qcow2", base="sn1.qcow2")
        write(b"c")
        assert drawn(disk) == "base.raw <- sn1.qcow2 <- sx.qcow2"
        cowferry.commit(disk)
        write(b"d")
        assert drawn(disk) == "base.raw"
        then = bytes(oracle)
        cowferry.copy(disk, str(tmp_path / "copy.qcow2"))
        write(b"e")
        assert drawn(disk) == "base.raw"
        cowferry.copy(disk, str(tmp_path / "new.qcow2"), pivot=True)
        write(b"f")
        assert drawn(disk) == "new.qcow2"
        assert client.pread(SIZE, 0) == oracle
    with cowferry.open(str(tmp_path / "copy.qcow2"), read_only=True) as disk:
        assert contents(disk) == then
    with cowferry.open(str(tmp_path / "vm.qcow2"), read_only=True) as disk:
        assert drawn(disk) == "new.qcow2", "the first name leads to where the disk is now"
        assert contents(disk) == oracle


def test_two_disks_as_one(tmp_path: Path) -> None:
    for n in "ab":
        cowferry.create(str(tmp_path / f"{n}.qcow2"), SIZE)
    with (
        cowferry.open(str(tmp_path / "a.qcow2")) as a,
        cowferry.open(str(tmp_path / "b.qcow2")) as b,
    ):
        a.pwrite(memoryview(b"a" * 512), 0)
        b.pwrite(memoryview(b"b" * 512), 0)
        done = cowferry.snapshot({a: str(tmp_path / "a1.qcow2"), b: str(tmp_path / "b1.qcow2")})
        assert [os.path.basename(x) for x in done] == ["a1.qcow2", "b1.qcow2"]
        with pytest.raises(CowferryError, match="is the image of disk"):  # none
            cowferry.snapshot({a: str(tmp_path / "a2.qcow2"), b: str(tmp_path / "b1.qcow2")})
        assert not (tmp_path / "a2.qcow2").exists()
        seen: list[tuple[int, int]] = []
        cowferry.group("stream", [a, b], progress=lambda *x: seen.append(x))
        assert drawn(a) == "a1.qcow2" and drawn(b) == "b1.qcow2"
        cowferry.group("copy", {a: str(tmp_path / "ca.raw"), b: str(tmp_path / "cb.raw")})
        assert drawn(a) == "ca.raw" and drawn(b) == "cb.raw"
        with pytest.raises(CowferryError, match="into itself"):
            cowferry.group("copy", {a: str(tmp_path / "da.raw"), b: str(tmp_path / "cb.raw")})
        assert drawn(a) == "ca.raw" and not (tmp_path / "da.raw").exists()


def test_the_backing_name_is_changed_only_to_the_same_bytes(tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "moved.raw").write_bytes((tmp_path / "base.raw").read_bytes())
    (tmp_path / "other.raw").write_bytes(bytes(SIZE))
    with cowferry.open(str(tmp_path / "vm.qcow2")) as disk:
        with pytest.raises(CowferryError, match="differs"):
            cowferry.change_backing_file(disk, "sn1.qcow2", "other.raw")
        cowferry.change_backing_file(disk, "sn1.qcow2", "moved.raw")
    (tmp_path / "base.raw").unlink()
    with cowferry.open(str(tmp_path / "vm.qcow2")) as disk:
        assert drawn(disk) == "moved.raw <- sn1.qcow2 <- vm.qcow2"


def test_a_disk_that_is_closed_is_refused_in_one_line(tmp_path: Path) -> None:
    images(tmp_path)
    with cowferry.open(str(tmp_path / "vm.qcow2")) as disk:
        with pytest.raises(CowferryError, match="not in this backing file chain"):
            cowferry.commit(disk, base="nowhere.raw")
        with pytest.raises(CowferryError, match="mirror node into itself"):
            cowferry.copy(disk, str(tmp_path / "vm.qcow2"))
    with pytest.raises(CowferryError, match="has been closed"):
        cowferry.commit(disk)
