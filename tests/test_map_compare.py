"""`map` and `compare` beside qemu-img: the same JSON, the same words, the same exit codes."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemons import PATIENCE
from loops import loop, ran
from nbd_servers import nbdkit, uri
from offline import cowferry
from test_convert import MiB, qcow2, qemu_io
from test_create import unchanged
from tests_support import need

SIZE = MiB


def qemu_img(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One disk and its like, allocated in all ways."""
    need("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("images")
    data = folder / "data.raw"
    with open(data, "wb") as f:
        f.write(random.Random(1).randbytes(64 << 10))
        f.truncate(SIZE)
    (folder / "zero.raw").write_bytes(bytes(SIZE))
    with open(folder / "hole.raw", "wb") as f:
        f.truncate(SIZE)
    ran("qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=falloc",
        str(folder / "fall.raw"), "1M")  # fmt: skip
    for name, flags in {
        "data.qcow2": [], "packed.qcow2": ["-c"], "full.qcow2": ["-S", "0"], "data.qed": [],
        "sub.qcow2": ["-o", "extended_l2=on"], "small.qcow2": ["-o", "cluster_size=512"],
    }.items():  # fmt: skip
        kind = name.split(".")[1]
        ran("qemu-img", "convert", "-O", kind, *flags, str(data), str(folder / name))
    qcow2(folder / "hole.qcow2", size=SIZE)
    qcow2(folder / "zeroes.qcow2", "write -z -u 0 1M", size=SIZE)
    qcow2(
        folder / "kept.qcow2",
        "write -P 1 0 512k",
        "write -z 64k 128k",
        "write -z -u 0 64k",
        size=SIZE,
    )
    qcow2(folder / "kept-sub.qcow2", "write -P 1 0 512k", "write -z 66k 4k", size=SIZE,
          options="extended_l2=on")  # fmt: skip
    qcow2(folder / "meta.qcow2", size=SIZE, options="preallocation=metadata")
    qcow2(folder / "written.qcow2", "write -P 0 0 1M", size=SIZE)
    for raw in ("on", "off"):
        options = f"data_file={folder}/ext-{raw}.data,data_file_raw={raw}"
        commands = ("write -P 7 128k 100k", "write -z 512k 64k", "discard 640k 64k")
        qcow2(folder / f"ext-{raw}.qcow2", *commands, size=SIZE, options=options)
    for name, below in (
        ("over", "data.qcow2"),
        ("over-raw", "hole.raw"),
        ("over-ext", "ext-off.qcow2"),
    ):
        kind = below.split(".")[1]
        options = f"backing_file={folder}/{below},backing_fmt={kind}"
        qcow2(folder / f"{name}.qcow2", "write -P 9 256k 64k", options=options)
    return {p.name: p for p in sorted(folder.iterdir()) if p.suffix != ".data"}


def joined(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours that go on: QEMU cuts its runs at tables."""
    out: list[dict[str, Any]] = []
    for e in entries:
        last = out[-1] if out else None
        keys = ("depth", "present", "zero", "data")
        if (
            last is not None
            and all(last[k] == e[k] for k in keys)
            and last.get("offset", 0) + last["length"] == e.get("offset", last["length"])
        ):
            last["length"] += e["length"]
            continue
        out.append(dict(e))
    return out


def formats(*paths: Path) -> list[str]:
    flags = itertools.cycle(("-f", "-F"))
    return [word for path in paths for word in (next(flags), path.suffix[1:])]


def test_map_says_what_qemu_img_says(images: dict[str, Path]) -> None:
    for name, path in images.items():
        _, theirs = qemu_img("map", "--output=json", *formats(path), path)
        ours = json.loads(cowferry("map", "--output=json", *formats(path), path))
        assert joined(ours) == joined(json.loads(theirs)), name
        for flags in (["-s", "64k"], ["-s", "100", "-l", "100"], ["-l", "96k"]):
            _, theirs = qemu_img("map", "--output=json", *flags, *formats(path), path)
            ours = json.loads(cowferry("map", "--output=json", *flags, *formats(path), path))
            assert joined(ours) == joined(json.loads(theirs)), (name, flags)


def test_map_names_the_file_in_which_the_bytes_lie(images: dict[str, Path]) -> None:
    for name, path in images.items():
        code, theirs = qemu_img("map", *formats(path), path)
        assert cowferry("map", *formats(path), path, code=code).startswith(theirs), name
    assert "ext-on.data" in cowferry("map", images["ext-on.qcow2"])


def test_compare_says_what_qemu_img_says(images: dict[str, Path]) -> None:
    for a, b in itertools.combinations_with_replacement(images.values(), 2):
        strictly = "small.qcow2" not in (a.name, b.name)  # of such clusters QEMU tells more
        for flags in (["-s"] if strictly else [], [])[: 1 + (a.name == "data.raw")]:
            code, theirs = qemu_img("compare", *flags, *formats(a, b), a, b)
            ours = cowferry("compare", *flags, *formats(a, b), a, b, code=code)
            assert code or ours == theirs, (a, b)


def test_strictly_is_about_places_and_not_about_kinds(tmp_path: Path) -> None:
    """Both have data and zeroes within one MiB, but not in the same places."""
    a = qcow2(tmp_path / "a.qcow2", "write -P 0 0 64k", size=SIZE)
    b = qcow2(tmp_path / "b.qcow2", "write -P 0 256k 64k", size=SIZE)
    assert cowferry("compare", a, b) == "Images are identical.\n"
    text = cowferry("compare", "-s", a, b, code=1)
    assert text == "Strict mode: Offset 0 block status mismatch!\n"
    qemu_io(a, "write -P 0 256k 64k")
    qemu_io(b, "write -P 0 0 64k")
    assert (
        cowferry("compare", "-s", a, b) == "Images are identical.\n"
    )  # in other places of the file
    qemu_io(a, "write -P 1 257k 512")
    assert cowferry("compare", "-s", a, b, code=1) == f"Content mismatch at offset {257 << 10}!\n"
    longer = qcow2(tmp_path / "c.qcow2", size=2 * SIZE)
    assert "size mismatch" in cowferry("compare", "-s", b, longer, code=1)
    assert "Warning: Image size mismatch!" in cowferry("compare", b, longer)
    qemu_io(longer, "write -P 1 1100k 512")
    assert f"offset {1100 << 10}!" in cowferry("compare", b, longer, code=1)


@pytest.mark.parametrize("size", [0, 1, 511, 1000003])
def test_odd_sizes(tmp_path: Path, size: int) -> None:
    a, b = tmp_path / "a.raw", tmp_path / "b.qcow2"
    a.write_bytes(random.Random(2).randbytes(size))
    cowferry("convert", "-O", "qcow2", a, b)
    cowferry("compare", a, b)
    ours = json.loads(cowferry("map", "--output=json", a))
    assert sum(e["length"] for e in ours) == -(-size // 512) * 512


def test_exabytes_are_compared_and_mapped_at_once(tmp_path: Path) -> None:
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for path in (a, b):
        cowferry("create", "-q", "-o", "cluster_size=2M", path, "4P")
    cowferry("compare", "-s", a, b)
    qemu_io(a, "write -P 5 1P 64k")
    assert f"offset {1 << 50}!" in cowferry("compare", a, b, code=1)
    assert len(json.loads(cowferry("map", "--output=json", a))) == 3


def test_exit_codes_are_qemu_imgs(tmp_path: Path) -> None:
    a, b = tmp_path / "a.raw", tmp_path / "b.raw"
    a.write_bytes(bytes(SIZE))
    b.write_bytes(bytes(SIZE))
    none = tmp_path / "none"
    lines: list[list[object]] = [
        ["compare", "-T", "fast", a, b], ["compare", none, b], ["compare", a, b],
        ["check"], ["check", "--bogus", a], ["check", "-r", "some", a], ["check", none],
        ["check", "-T", "fast", a], ["check", a],
        ["map"], ["map", "--output", "xml", a], ["map", "-s", "x", a], ["map", none],
        ["info"], ["info", "--output", "xml", a], ["info", none],
        ["create"], ["create", "-f", "bogus", none, "1M"], ["create", none], ["create", none, "1Q"],
        ["convert"], ["convert", a], ["convert", "-m", "99", a, none],
        ["resize"], ["resize", a], ["resize", a, "1Q"],
        ["rebase"], ["rebase", "--bogus"],
    ]  # fmt: skip
    with unchanged(tmp_path):
        for line in lines:
            given = [
                *line[:1],
                *(["-f", "raw"] if len(line) > 1 and line[0] != "create" else []),
                *line[1:],
            ]
            code, _ = qemu_img(*given)
            cowferry(*given, code=code)
        # qemu-img's code would say that the images differ.
        for wrong in (
            [], [a], ["--bogus", a, b], [a, b, b], ["-f"], ["--image-opts", "-F", "raw", a, b],
        ):  # fmt: skip
            assert "Error:" in cowferry("compare", *wrong, code=64)
    # Our own commands have no code that a wrong command line could be taken for.
    for verb in ("current", "serve", "stream", "jobs", "bitmap"):
        assert "No such option" in cowferry(verb, "--bogus", a, code=2)


def test_compare_tells_a_read_error_from_a_difference(tmp_path: Path) -> None:
    need("nbdkit")
    a = tmp_path / "a.raw"
    a.write_bytes(bytes(SIZE))
    with nbdkit(tmp_path / "s", "--filter=error", "pattern", "1M", "error-pread-rate=100%"):
        text = cowferry("compare", "-f", "raw", "-F", "raw", a, uri(tmp_path / "s"), code=4)
    assert f"Could not read '{uri(tmp_path / 's')}' at offset 0:" in text
    packed = qcow2(tmp_path / "p.qcow2", "write -P 0 0 1M", "write -P 1 100k 512", size=SIZE)
    data = bytearray(packed.read_bytes())
    data[262144 + 16 : 262144 + 24] = (1 << 62 | 5 * 65536).to_bytes(8, "big")
    packed.write_bytes(data)
    assert f"offset {100 << 10}!" in cowferry("compare", packed, a, code=1)  # before the bad one
    qemu_io(packed, "write -P 0 100k 512")
    assert f"'{packed}' at offset {128 << 10}" in cowferry("compare", packed, a, code=4)


def test_cache_modes_and_progress(tmp_path: Path) -> None:
    a = qcow2(tmp_path / "a.qcow2", "write -P 1 0 1M", size=SIZE)
    text = cowferry("compare", "-T", "fast", a, a, code=2)
    assert "Invalid source cache option: fast" in text
    for mode in ("none", "writeback", "writethrough", "directsync", "unsafe"):
        assert "identical" in cowferry("compare", "-T", mode, a, a)
    assert "(100.00/100%)" in cowferry("compare", "-p", a, a)
    assert cowferry("compare", "-p", "-q", a, a) == ""
    options = f"driver=qcow2,file.filename={a}"
    assert "identical" in cowferry("compare", "--image-opts", options, options)


def test_SIGUSR1_during_a_comparison(tmp_path: Path) -> None:
    need("nbdkit")
    server = nbdkit(tmp_path / "s", "--filter=delay", "pattern", "64M", "rdelay=300ms")
    command = ["compare", "-p", uri(tmp_path / "s"), uri(tmp_path / "s")]
    with server, subprocess.Popen(
        [sys.executable, "-m", "cowferry", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr.readline().endswith(b"/100%)\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


def test_a_loop_device_is_compared_and_mapped(tmp_path: Path) -> None:
    a = tmp_path / "a.raw"
    a.write_bytes(random.Random(3).randbytes(SIZE))
    with loop(a) as device:
        assert "identical" in cowferry("compare", "-U", a, device)
        (run,) = json.loads(cowferry("map", "--output=json", device))
        assert (run["start"], run["length"], run["data"], run["offset"]) == (0, SIZE, True, 0)
