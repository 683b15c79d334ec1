"""Compressed clusters that we write: in which places, and what becomes of these; backups into them.

What a power cut leaves of them is in test_crash_backup.py; test_model.py mixes them with whatever
else may be done to an image.
"""

from __future__ import annotations

import errno
import itertools
import json
import random
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cowferry
from chains import contents, differs
from cowferry.block.compress import Compressed
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.qcow2.image import Qcow2
from cowferry.errors import CowferryError
from daemons import Told
from orders import failing, on_call
from test_cli_backup import Served, reads, served
from test_cli_changes import cowferry as typed
from tests_support import need

__all__ = ["served"]

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 4 * KIB
SIZE = 64 * CLUSTER


def text(n: int, seed: int = 0) -> bytes:
    """Bytes that shrink to less than half."""
    return random.Random(seed).randbytes(n).translate(bytes(b"etaoinsh"[i % 8] for i in range(256)))


def make(folder: Path, name: str = "t.qcow2", size: int = SIZE, **options: Any) -> Qcow2:
    path = folder / name
    opening.create_image(str(path), "qcow2", size, {"cluster_size": CLUSTER, **options})
    node = opening.open_image(str(path))
    assert isinstance(node, Qcow2)
    return node


def put(image: Qcow2, offset: int, data: bytes) -> None:
    with Compressed(image, offset, memoryview(data)) as packed:
        packed.put()


def place(image: Qcow2, offset: int) -> tuple[int, int]:
    """First and last host cluster of the piece at `offset` of the disk."""
    (run,) = image.extents(offset, image.cluster_size)
    assert run.compressed
    return image.map.compressed_clusters(image.map.entry(offset // image.cluster_size)[0])


def checked(path: Path | str) -> dict[str, Any]:
    """What qemu-img says of an image that has to be sound, with no leaks."""
    need("qemu-img")
    command = ["qemu-img", "check", "--output=json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


# Places --------------------------------------------------------------------------------------


def test_pieces_share_a_host_cluster_that_is_free_when_the_last_of_them_has_gone(
    tmp_path: Path,
) -> None:
    image = make(tmp_path)
    put(image, 0, text(5 * CLUSTER))
    image.flush()
    first, last = place(image, 0)
    shared = [n * CLUSTER for n in range(5) if place(image, n * CLUSTER) == (first, first)]
    assert first == last
    assert len(shared) >= 2
    want = image.refcounts.get(first)
    assert want >= len(shared)
    for offset in shared[1:]:  # by a guest, by zeroes, by another piece
        image.pwrite(memoryview(b"g"), offset + 100)
        image.flush()
        want -= 1
        assert image.refcounts.get(first) == want
    put(image, 0, bytes(CLUSTER))
    image.discard(CLUSTER, 4 * CLUSTER)
    image.flush()
    assert image.refcounts.get(first) == 0
    image.close()
    assert checked(tmp_path / "t.qcow2")["compressed-clusters"] == 1


def test_the_place_that_is_free_is_not_packed_into_any_more(tmp_path: Path) -> None:
    """What was packed last has gone, and a guest has its cluster."""
    image = make(tmp_path)
    put(image, 0, text(CLUSTER))
    first, _ = place(image, 0)
    image.discard(0, CLUSTER)
    image.flush()
    guest = random.Random(1).randbytes(CLUSTER)
    image.pwrite(memoryview(guest), CLUSTER)
    assert next(image.extents(CLUSTER, CLUSTER)).host == first * CLUSTER, "it is used again"
    put(image, 2 * CLUSTER, text(CLUSTER))
    assert contents(image)[: 3 * CLUSTER] == bytes(CLUSTER) + guest + text(CLUSTER)
    image.close()
    checked(tmp_path / "t.qcow2")


def test_where_a_cluster_is_counted_once_each_piece_has_its_own(tmp_path: Path) -> None:
    image = make(tmp_path, refcount_bits=1)
    put(image, 0, text(8 * CLUSTER))
    clusters = [place(image, n * CLUSTER) for n in range(8)]
    assert all(first == last for first, last in clusters)
    assert len(set(clusters)) == 8
    image.close()
    checked(tmp_path / "t.qcow2")
    assert not differs(reads(tmp_path / "t.qcow2"), text(8 * CLUSTER).ljust(SIZE, b"\0"))


def test_a_piece_in_the_place_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    """Its entry is the same."""
    image = make(tmp_path, refcount_bits=1)
    data = [text(CLUSTER, seed) for seed in range(20)]
    put(image, 0, data[0])
    entry, _ = image.map.entry(0)
    assert contents(image)[:CLUSTER] == data[0]
    again = 0
    for old, new in itertools.pairwise(data):
        assert contents(image)[:CLUSTER] == old
        image.discard(0, CLUSTER)
        image.flush()
        put(image, 0, new)
        again += image.map.entry(0)[0] == entry
    assert again
    image.close()


def test_what_does_not_shrink_is_as_it_is_and_zeroes_stay_zeroes(tmp_path: Path) -> None:
    image = make(tmp_path, size=SIZE + 1536)
    dense = random.Random(2).randbytes(CLUSTER)
    data = text(CLUSTER) + dense + text(CLUSTER)
    put(image, CLUSTER, data)
    put(image, SIZE, text(1536))  # the disk ends inside a cluster
    put(image, 5 * CLUSTER + 1, text(CLUSTER))  # no whole one
    runs = [next(image.extents(n * CLUSTER, CLUSTER)) for n in range(7)]
    assert [e.compressed for e in runs] == [False, True, False, True, False, False, False]
    assert next(image.extents(SIZE, 1536)).compressed
    oracle = bytes(CLUSTER) + data + bytes(CLUSTER + 1) + text(CLUSTER)
    oracle = oracle.ljust(SIZE, b"\0") + text(1536)
    assert not differs(contents(image), oracle)
    image.resize(SIZE + CLUSTER)
    image.close()
    checked(tmp_path / "t.qcow2")
    got = reads(tmp_path / "t.qcow2")
    assert not differs(got, oracle.ljust(SIZE + CLUSTER, b"\0"))


def test_E2_room_that_could_not_be_filled_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make(tmp_path)
    with monkeypatch.context() as broken:
        on_call(broken, image.file, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            put(image, 0, text(10 * CLUSTER))
    with Compressed(image, 0, memoryview(text(10 * CLUSTER))):
        pass  # and room that nobody wants after all
    assert not any(contents(image))
    put(image, 0, text(3 * CLUSTER))
    image.close()
    assert checked(tmp_path / "t.qcow2")["compressed-clusters"] == 3


# Backups -------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 4096, "compression_type": "zstd", "refcount_bits": 2},
    {"cluster_size": 65536, "extended_l2": "on", "compression_type": "zstd"},
    {"cluster_size": 65536, "refcount_bits": 1},
    {"cluster_size": 2 * MIB},
]


class Bench:
    """A daemon with a disk `vm` of text, dense bytes and holes, that is no multiple of clusters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.size = 5 * MIB + 7 * 512
        self.rnd = random.Random(5)
        self.daemon = Daemon()
        self.told = Told(self.daemon)
        opening.create_image(str(folder / "vm.qcow2"), "qcow2", self.size, {})
        self.disk = self.daemon.open_disk("vm", str(folder / "vm.qcow2"))
        self.oracle = bytearray(self.size)
        self.write(0, text(2 * MIB))
        self.write(2 * MIB + 3000, self.rnd.randbytes(300 * KIB))
        self.write(self.size - MIB, text(MIB))

    def write(self, offset: int, data: bytes) -> None:
        self.disk.pwrite(memoryview(data), offset)
        self.oracle[offset : offset + len(data)] = data

    def guest(self, writes: int) -> None:
        for _ in range(writes):
            self.write(self.rnd.randrange(self.size - 9000), text(9000, self.rnd.randrange(99)))

    def add(self, name: str, **more: Any) -> None:
        file = {"driver": "file", "filename": str(self.folder / f"{name}.qcow2")}
        self.daemon.execute(
            "blockdev-add", {"node-name": name, "driver": "qcow2", "file": file, **more}
        )

    def backup(self, target: str, **more: Any) -> bytes:
        """Begin one, write while it runs, see it end; what the disk was when it began."""
        moment = bytes(self.oracle)
        self.daemon.execute(
            "blockdev-backup",
            {"device": "vm", "target": target, "job-id": "j", "compress": True, **more},
        )
        self.guest(20)
        done = self.told.wait("BLOCK_JOB_COMPLETED", device="j")
        assert "error" not in done, done
        return moment


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.daemon.close()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_K1_a_compressed_backup_and_its_increment_are_of_their_moments(
    bench: Bench, tmp_path: Path, shape: dict[str, Any]
) -> None:
    bench.daemon.execute("block-dirty-bitmap-add", {"node": "vm", "name": "b0"})
    for name, over in (
        ("full", {}),
        ("inc", {"backing_file": "full.qcow2", "backing_fmt": "qcow2"}),
    ):
        opening.create_image(
            str(tmp_path / f"{name}.qcow2"), "qcow2", bench.size, {**shape, **over}
        )
    bench.add("full")
    begun = {"bitmap": "b0", "bitmap-mode": "on-success"}
    bench.backup("full", sync="full", **begun)
    moments = [bench.backup("full", sync="full", **begun)]  # over what is there already
    bench.daemon.execute("blockdev-del", {"node-name": "full"})
    bench.add("inc")
    moments.append(bench.backup("inc", sync="bitmap", **begun))
    assert not differs(contents(bench.disk), bench.oracle)
    bench.daemon.close()
    for name, moment in zip(("full", "inc"), moments, strict=True):
        assert checked(tmp_path / f"{name}.qcow2")["compressed-clusters"] > 1
        assert not differs(reads(tmp_path / f"{name}.qcow2"), moment)


def test_K1_what_a_guest_overwrites_goes_into_the_overlay_compressed(
    bench: Bench, tmp_path: Path
) -> None:
    opening.create_image(str(tmp_path / "f.qcow2"), "qcow2", bench.size, {})
    bench.add("f")
    moment = bytes(bench.oracle)
    bench.daemon.execute(
        "blockdev-backup",
        {"device": "vm", "target": "f", "job-id": "j", "compress": True, "sync": "none"},
    )
    bench.guest(20)
    root = bench.daemon.graph.disk("f").root
    assert any(e.compressed for e in root.extents(0, bench.size))
    assert not differs(contents(bench.daemon.graph.disk("f")), moment)


def test_who_cannot_hold_compressed_data_says_so_at_once(bench: Bench, tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    opening.create_image(str(tmp_path / "ext.qcow2"), "qcow2", bench.size, {"data_file": str(data)})
    bench.add("ext")
    file = {"driver": "file", "filename": str(tmp_path / "t.raw")}
    (tmp_path / "t.raw").write_bytes(bytes(bench.size))
    bench.daemon.execute("blockdev-add", {"node-name": "raw", "driver": "raw", "file": file})
    given = {"device": "vm", "job-id": "j", "compress": True, "sync": "full"}
    for target, why in {
        "raw": "format raw cannot hold compressed",
        "ext": "keeps its data",
    }.items():
        with pytest.raises(CowferryError, match=why):
            bench.daemon.execute("blockdev-backup", {**given, "target": target})
    for format in ("raw", "qed"):
        new = tmp_path / f"new.{format}"
        with pytest.raises(CowferryError, match=f"format {format} cannot hold compressed"):
            bench.daemon.execute("drive-backup", {**given, "target": str(new), "format": format})
        assert not new.exists()
    assert not bench.daemon.jobs.jobs


def test_one_types_it_or_calls_it(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot hold compressed" in served.bad("backup", "data", "d.raw", "--compress")
    assert not (tmp_path / "d.raw").exists()
    served.good("backup", "vm=v.qcow2", "data=d.qcow2", "--compress")
    for name, path in (("vm", "v.qcow2"), ("data", "d.qcow2")):
        assert not differs(reads(tmp_path / path), served.oracles[name])
    page = text(SIZE)
    (tmp_path / "page.raw").write_bytes(page)
    with cowferry.open(str(tmp_path / "page.raw")) as disk:
        cowferry.backup(disk, str(tmp_path / "page.qcow2"), compress=True)
    options = ("-O", "qcow2", "-o", "cluster_size=4k")
    assert not typed(capsys, "convert", "-c", *options, "page.raw", "again.qcow2")[0]
    for path, clusters in (("page.qcow2", 4), ("again.qcow2", 64)):
        assert checked(tmp_path / path)["compressed-clusters"] == clusters
        assert not differs(reads(tmp_path / path), page)
    assert "-O qcow2" in typed(capsys, "convert", "-c", "page.raw", "x.raw")[2]


def test_zstd_needs_nothing_that_the_default_install_lacks(tmp_path: Path) -> None:
    """The library is a dependency of the package, and no extra of it."""
    need("qemu-img")
    with open(Path(__file__).parent.parent / "pyproject.toml", "rb") as f:
        project = tomllib.load(f)["project"]
    assert any(d.startswith("backports.zstd") for d in project["dependencies"])
    assert "zstd" not in project["optional-dependencies"]
    raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(b"some text" * 10000)
    options = ["-c", "-o", "compression_type=zstd"]
    subprocess.run(
        ["qemu-img", "convert", "-O", "qcow2", *options, str(raw), str(image)], check=True
    )
    node = opening.open_image(str(image), read_only=True)
    assert contents(node)[:90000] == raw.read_bytes()
    node.close()
