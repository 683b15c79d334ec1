"""qcow2 both ways with qemu-img: its images read the same here, ours pass its check."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chains import contents, differs
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from tests_support import need

SIZE = 1 << 20


def qemu_img(*args: object) -> str:
    """Run qemu-img; its output. The test fails with its words."""
    done = subprocess.run(
        ["qemu-img", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
    return done.stdout


def by_qemu(path: Path, format: str = "qcow2") -> bytes:
    """The guest's bytes as qemu-img reads them."""
    flat = path.with_suffix(".flat")
    qemu_img("convert", "-U", "-f", format, "-O", "raw", path, flat)
    return flat.read_bytes()


def source(folder: Path, size: int = SIZE, seed: int = 7) -> Path:
    """A raw file with data, zeroes and holes."""
    rnd = random.Random(seed)
    path = folder / "source.raw"
    with open(path, "wb") as f:
        f.truncate(size)
        for _ in range(12):
            f.seek(rnd.randrange(size))
            f.write(rnd.randbytes(rnd.randrange(1, 40_000)))
        f.truncate(size)
    return path


MATRIX = [
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=64k",
    "refcount_bits=1",
    "refcount_bits=4,cluster_size=4k",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full,cluster_size=4k",
]


@pytest.mark.parametrize("options", MATRIX)
def test_images_of_qemu_read_the_same_and_stay_right_when_written(
    tmp_path: Path, options: str
) -> None:
    need("qemu-img")
    raw = source(tmp_path)
    path = tmp_path / "image.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    disk = Disk(opening.open_image(str(path)))
    oracle = bytearray(raw.read_bytes())
    assert not differs(contents(disk), oracle)
    churn(disk, oracle, random.Random(options))
    assert not differs(contents(disk), oracle)
    disk.flush()
    disk.root.close()
    assert not differs(by_qemu(path), oracle)
    qemu_img("check", path)


def churn(disk: Disk, oracle: bytearray, rnd: random.Random, steps: int = 60) -> None:
    """Writes, zeroes and discards of any alignment, on disk and oracle."""
    for _ in range(steps):
        offset = rnd.randrange(disk.size)
        length = min(rnd.choice([1, 512, 4096, 70_000, 200_000]), disk.size - offset)
        act = rnd.randrange(5)
        if act <= 2:
            data = rnd.randbytes(length)
            disk.pwrite(memoryview(data), offset)
        elif act == 3:
            data = bytes(length)
            disk.zero(offset, length, unmap=rnd.random() < 0.5)
        else:
            offset = offset // 65536 * 65536
            length = min(65536 * 2, disk.size - offset)
            disk.discard(offset, length)
            back = bytearray(length)
            disk.pread(memoryview(back), offset)
            data = bytes(back)
            want = oracle[offset : offset + length]
            for i in range(0, length, 512):
                got = data[i : i + 512]
                assert got == want[i : i + 512] or not any(got), "discard re-exposed something"
        oracle[offset : offset + length] = data
        if rnd.random() < 0.1:
            disk.flush()


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_images_read_the_same(tmp_path: Path, kind: str) -> None:
    need("qemu-img")
    raw = source(tmp_path)
    path = tmp_path / "image.qcow2"
    qemu_img(
        "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, path
    )
    disk = Disk(opening.open_image(str(path)))
    oracle = bytearray(raw.read_bytes())
    assert not differs(contents(disk), oracle)
    churn(disk, oracle, random.Random(1))
    disk.root.close()
    assert not differs(by_qemu(path), oracle)
    qemu_img("check", path)


@pytest.mark.parametrize("backing_size", [SIZE // 2, SIZE, SIZE * 2])
@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "extended_l2=on"])
def test_overlays_of_qemu_on_shorter_and_longer_backing(
    tmp_path: Path, backing_size: int, options: str
) -> None:
    need("qemu-img")
    raw = source(tmp_path, backing_size)
    path = tmp_path / "over.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", options, "-b", raw, "-F", "raw", path, SIZE + 512)
    oracle = bytearray(raw.read_bytes().ljust(SIZE + 512, b"\0")[: SIZE + 512])
    disk = Disk(opening.open_image(str(path)))
    assert not differs(contents(disk), oracle)
    churn(disk, oracle, random.Random(2))
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)
    assert not differs(by_qemu(path), oracle)
    qemu_img("check", path)


@pytest.mark.parametrize("raw_file", ["off", "on"])
def test_external_data_files(tmp_path: Path, raw_file: str) -> None:
    need("qemu-img")
    raw = source(tmp_path)
    path, data = tmp_path / "image.qcow2", tmp_path / "data.raw"
    options = f"data_file={data},data_file_raw={raw_file}"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    disk = Disk(opening.open_image(str(path), data_file=str(data)))
    oracle = bytearray(raw.read_bytes())
    assert not differs(contents(disk), oracle)
    churn(disk, oracle, random.Random(3))
    disk.root.close()
    assert not differs(by_qemu(path), oracle)
    if raw_file == "on":
        assert not differs(data.read_bytes(), oracle)
    qemu_img("check", path)


def test_internal_snapshots_are_left_undamaged(tmp_path: Path) -> None:
    need("qemu-img")
    raw = source(tmp_path)
    path = tmp_path / "image.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
    qemu_img("snapshot", "-c", "before", path)
    oracle = bytearray(raw.read_bytes())
    node = opening.open_image(str(path))
    disk = Disk(node)
    assert [s.name for s in getattr(node, "snapshots")] == ["before"]  # noqa: B009
    churn(disk, oracle, random.Random(4))
    disk.root.close()
    qemu_img("check", path)
    assert not differs(by_qemu(path), oracle)
    qemu_img("snapshot", "-a", "before", path)
    assert not differs(by_qemu(path), raw.read_bytes())


@pytest.mark.parametrize("length", [1, 3, 50])
def test_chains(tmp_path: Path, length: int) -> None:
    need("qemu-img")
    raw = source(tmp_path)
    oracle = bytearray(raw.read_bytes())
    below, format = raw, "raw"
    rnd = random.Random(length)
    for n in range(length):
        path = tmp_path / f"sn{n}.qcow2"
        qemu_img("create", "-f", "qcow2", "-b", below, "-F", format, path)
        disk = Disk(opening.open_image(str(path)))
        churn(disk, oracle, rnd, 3)
        opening.close_chain(disk.root)
        below, format = path, "qcow2"
    disk = Disk(opening.open_image(str(below), read_only=True))
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)
    assert not differs(by_qemu(below), oracle)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    options=st.fixed_dictionaries(
        {
            "compat": st.sampled_from(["0.10", "1.1"]),
            "cluster_size": st.sampled_from([512, 1024, 4096, 65536, 1 << 20]),
        },
        optional={"refcount_bits": st.sampled_from([1, 2, 4, 8, 16, 32, 64])},
    ),
    seed=st.integers(0, 1 << 30),
    sectors=st.integers(1, 3000),
)
def test_what_we_create_and_write_passes_the_check_of_qemu(
    tmp_path_factory: Any, options: dict[str, Any], seed: int, sectors: int
) -> None:
    need("qemu-img")
    if options["compat"] == "0.10":
        options.pop("refcount_bits", None)
    folder = tmp_path_factory.mktemp("ours")
    path, size = folder / "ours.qcow2", sectors * 512
    opening.create_image(str(path), "qcow2", size, options)
    qemu_img("check", path)
    disk = Disk(opening.open_image(str(path)))
    oracle = bytearray(size)
    churn(disk, oracle, random.Random(seed), 25)
    if seed % 2:
        bigger = size + 512 * (seed % 5000)
        disk.resize(bigger)
        oracle.extend(bytes(bigger - size))
        churn(disk, oracle, random.Random(seed), 10)
    assert not differs(contents(disk), oracle)
    disk.root.close()
    qemu_img("check", path)
    assert not differs(by_qemu(path), oracle)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert info["virtual-size"] == len(oracle)
