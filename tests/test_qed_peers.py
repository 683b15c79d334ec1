"""QED both ways with qemu-img: its images read the same here, ours pass its check."""

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
from cowferry.cli.offline import check, image, info, map
from cowferry.drivers import opening
from cowferry.drivers.qed import header
from cowferry.drivers.qed.image import Qed
from cowferry.errors import ImageError
from test_cli_offline import cowferry, flat
from test_qcow2_peers import SIZE, by_qemu, churn, qemu_img, source
from tests_support import need

# Neither tables of one cluster, nor such as map more than 2^64 bytes: they are valid, but qemu-img
# 7.2 opens no image that has them.
GEOMETRIES = [("4k", 2), ("4k", 16), ("64k", 4), ("1M", 2), ("4M", 2)]


def qemu_io(path: Path, *commands: str) -> None:
    need("qemu-io")
    arguments = [x for command in commands for x in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qed", *arguments, str(path)], capture_output=True, check=True)


def need_check(path: Path) -> bool:
    return bool(path.read_bytes()[16] & header.NEED_CHECK)


@pytest.mark.parametrize(("cluster", "table"), GEOMETRIES)
def test_images_of_qemu_read_the_same_and_stay_right_when_written(
    tmp_path: Path, cluster: str, table: int
) -> None:
    need("qemu-img")
    raw = source(tmp_path)
    path = tmp_path / "image.qed"
    options = f"cluster_size={cluster},table_size={table}"
    qemu_img("convert", "-f", "raw", "-O", "qed", "-o", options, raw, path)
    disk = Disk(opening.open_image(str(path)))
    oracle = bytearray(raw.read_bytes())
    assert not differs(contents(disk), oracle)
    churn(disk, oracle, random.Random(options))
    assert not differs(contents(disk), oracle)
    disk.flush()
    disk.root.close()
    assert not differs(by_qemu(path, "qed"), oracle)
    qemu_img("check", "-f", "qed", path)


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
@pytest.mark.parametrize("backing_size", [SIZE // 2, SIZE, SIZE * 2])
def test_overlays_of_qemu_on_shorter_and_longer_backing(
    tmp_path: Path, backing_size: int, format: str
) -> None:
    need("qemu-img")
    raw = source(tmp_path, backing_size)
    base, path = tmp_path / f"base.{format}", tmp_path / "over.qed"
    qemu_img("convert", "-f", "raw", "-O", format, raw, base)
    qemu_img("create", "-f", "qed", "-b", base, "-F", format, path, SIZE + 512)
    oracle = bytearray(raw.read_bytes().ljust(SIZE + 512, b"\0")[: SIZE + 512])
    disk = Disk(opening.open_image(str(path)))
    assert disk.root.backing is not None and disk.root.backing.driver == format
    assert not differs(contents(disk), oracle)
    churn(disk, oracle, random.Random(2))
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)
    assert not differs(by_qemu(path, "qed"), oracle)
    qemu_img("check", path)


def test_a_raw_backing_file_is_recorded_as_raw_and_nobody_looks_into_it(tmp_path: Path) -> None:
    """QED_F_BACKING_FORMAT_NO_PROBE: what a guest wrote there is no header."""
    need("qemu-img")
    base = tmp_path / "base"
    qemu_img("create", "-f", "qcow2", base, SIZE)
    with open(base, "r+b") as f:
        f.truncate(SIZE)
    ours, theirs = tmp_path / "ours.qed", tmp_path / "theirs.qed"
    cowferry("create", "-b", base, "-F", "raw", ours)
    qemu_img("create", "-f", "qed", "-b", base, "-F", "raw", theirs)
    for path in (ours, theirs):
        assert path.read_bytes()[16] == header.BACKING_FILE | header.RAW_BACKING
        node = opening.open_image(str(path))
        assert contents(node) == base.read_bytes()
        opening.close_chain(node)
        assert by_qemu(path, "qed") == base.read_bytes()


def test_a_backing_file_whose_format_nobody_says_is_not_guessed(tmp_path: Path) -> None:
    need("qemu-img")
    base, path = tmp_path / "base", tmp_path / "over.qed"
    qemu_img("create", "-f", "qcow2", base, SIZE)
    qemu_img("create", "-f", "qed", "-b", base, "-F", "qcow2", path)
    with pytest.raises(ImageError, match="does not record the format of its backing file"):
        opening.open_image(str(path))
    refused = cowferry("create", "-b", base, "-F", "qcow2", tmp_path / "ours.qed", code=1)
    assert "cannot record" in refused and not (tmp_path / "ours.qed").exists()
    base.rename(tmp_path / "base.qcow2")
    cowferry("rebase", "-u", "-b", tmp_path / "base.qcow2", "-F", "qcow2", path)
    node = opening.open_image(str(path))
    assert node.backing is not None and node.backing.driver == "qcow2"
    opening.close_chain(node)
    qemu_img("check", path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of every state that a cluster can be in, made by qemu-img and by us."""
    need("qemu-img")
    folder = tmp_path_factory.mktemp("qed")
    raw = folder / "base.raw"
    raw.write_bytes(random.Random(4).randbytes(SIZE))
    empty, full, over, ours = (folder / f"{n}.qed" for n in ("empty", "full", "over", "ours"))
    qemu_img("create", "-f", "qed", empty, "0")
    qemu_img("convert", "-f", "raw", "-O", "qed", "-o", "cluster_size=4k", raw, full)
    qemu_img("create", "-f", "qed", "-b", "base.raw", "-F", "raw", over, "1500k")
    qemu_io(over, "write -P 7 100k 50k", "write -z 704k 64k", "write 0 64k", "write -z 0 64k")
    cowferry("convert", "-O", "qed", "-o", "table_size=2", raw, ours)
    node = opening.open_image(str(ours))
    node.pwrite(memoryview(b"x" * 70000), 100)
    node.close()
    leaky = folder / "leaky.qed"
    leaky.write_bytes(full.read_bytes() + bytes(3 * 4096))
    return [empty, full, over, ours, leaky]


def test_info_says_what_qemu_img_says(images: list[Path]) -> None:
    for path in images:
        theirs = json.loads(qemu_img("info", "-f", "qed", "--output=json", path))
        with image(str(path), backing=False) as node:
            assert info.describe(node) == theirs, path.name


def test_map_says_what_qemu_img_says(images: list[Path]) -> None:
    for path in images:
        theirs = flat(json.loads(qemu_img("map", "-f", "qed", "--output=json", path)))
        with image(str(path)) as node:
            assert flat(list(map.entries(node, 0, node.size))) == theirs, path.name


def test_check_says_what_qemu_img_says(images: list[Path]) -> None:
    for path in images:
        theirs = subprocess.run(
            ["qemu-img", "check", "-f", "qed", "--output=json", str(path)],
            capture_output=True,
            text=True,
        )
        with image(str(path), backing=False) as node:
            assert isinstance(node, Qed)
            found = node.check()
        assert found.exit_code == theirs.returncode
        assert check.as_json(str(path), "qed", found) == json.loads(theirs.stdout), path.name


def test_convert_and_compare_round_trips(images: list[Path], tmp_path: Path) -> None:
    path = images[2]
    for target in ("raw", "qcow2", "qed"):
        out = tmp_path / f"{path.stem}.{target}"
        cowferry("convert", "-O", target, path, out)
        qemu_img("compare", "-f", "qed", "-F", target, path, out)
    cowferry("compare", path, out)
    qemu_img("check", "-f", "qed", out)


def test_resize_and_rebase(images: list[Path], tmp_path: Path) -> None:
    raw = images[1].parent / "base.raw"
    path = tmp_path / "vm.qed"
    cowferry("create", "-b", raw, "-F", "raw", path, "600k")
    cowferry("resize", path, "+1M")
    assert by_qemu(path, "qed") == raw.read_bytes()[: 600 << 10].ljust((600 << 10) + SIZE, b"\0")
    assert "cannot be made smaller" in cowferry("resize", "--shrink", path, "1k", code=1)
    assert "its tables can map" in cowferry("resize", path, "1000T", code=1)
    before = by_qemu(path, "qed")
    cowferry("rebase", "-b", images[3], "-F", "qed", path)
    assert by_qemu(path, "qed") == before
    cowferry("rebase", "-b", "", path)
    assert by_qemu(path, "qed") == before
    assert "backing" not in qemu_img("info", path)
    qemu_img("check", path)


def test_what_qemu_left_in_a_crash_is_mended_when_it_is_written_and_not_when_it_is_read(
    tmp_path: Path,
) -> None:
    need("qemu-img", "qemu-io")
    path = tmp_path / "vm.qed"
    qemu_img("create", "-f", "qed", path, SIZE)
    subprocess.run(
        ["qemu-io", "-f", "qed", "-c", "write -P 5 0 128k", "-c", "abort", str(path)],
        capture_output=True,
    )
    assert need_check(path)
    left = path.read_bytes()
    node = opening.open_image(str(path), read_only=True)
    assert contents(node)[: 128 << 10] == b"\5" * (128 << 10)
    assert info.describe(node)["dirty-flag"]
    node.close()
    assert path.read_bytes() == left
    node = opening.open_image(str(path))
    assert not need_check(path)
    node.pwrite(memoryview(b"z" * 512), 512 << 10)
    node.flush()
    assert need_check(path)
    node.close()
    assert not need_check(path)
    qemu_img("check", path)


@pytest.mark.parametrize("length", [3, 12])
def test_chains_of_all_formats(tmp_path: Path, length: int) -> None:
    need("qemu-img")
    raw = source(tmp_path)
    oracle = bytearray(raw.read_bytes())
    below, format = raw, "raw"
    rnd = random.Random(length)
    for n in range(length):
        above = ("qed", "qcow2", "qed")[n % 3]
        path = tmp_path / f"sn{n}.{above}"
        options = {"backing_file": below.name, "backing_fmt": format}
        opening.create_image(str(path), above, SIZE, options)
        disk = Disk(opening.open_image(str(path)))
        churn(disk, oracle, rnd, 3)
        opening.close_chain(disk.root)
        below, format = path, above
    disk = Disk(opening.open_image(str(below), read_only=True))
    assert not differs(contents(disk), oracle)
    opening.close_chain(disk.root)
    assert not differs(by_qemu(below, format), oracle)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cluster=st.sampled_from([4096, 8192, 65536, 1 << 20]),
    table=st.sampled_from([2, 4, 16]),
    seed=st.integers(0, 1 << 30),
    sectors=st.integers(1, 5000),
)
def test_what_we_create_and_write_passes_the_check_of_qemu(
    tmp_path_factory: Any, cluster: int, table: int, seed: int, sectors: int
) -> None:
    need("qemu-img")
    folder = tmp_path_factory.mktemp("ours")
    path, size = folder / "ours.qed", sectors * 512
    opening.create_image(str(path), "qed", size, {"cluster_size": cluster, "table_size": table})
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
    assert not differs(by_qemu(path, "qed"), oracle)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert info["virtual-size"] == len(oracle)
