"""The same image through our export and through qemu-nbd: every byte, and what is called zero."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chains import differs
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.exports.nbd import NbdExport, NbdServer
from nbd_servers import program
from test_qcow2_peers import qemu_img, source
from tests_support import need

SIZE = 3 << 20


def image(folder: Path, format: str, options: str) -> Path:
    """An image of known content, made by qemu-img."""
    path = folder / f"image.{format}"
    given = ["-o", options] if options else []
    qemu_img("convert", "-f", "raw", "-O", format, *given, source(folder, SIZE), path)
    return path


def compressed(folder: Path, kind: str) -> Path:
    path = folder / "image.qcow2"
    options = f"compression_type={kind}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source(folder, SIZE), path)
    return path


def chain(folder: Path, length: int, top: str, size: int = SIZE) -> Path:
    """`length` images, each with bytes of its own; the topmost made with `top`, `size` long."""
    below, format = source(folder, SIZE), "raw"
    for n in range(1, length):
        path = folder / f"l{n}.qcow2"
        last = n == length - 1
        options = ["-o", top] if top and last else []
        qemu_img(
            "create", "-q", "-f", "qcow2", *options, "-b", below.name, "-F", format, path,
            size if last else SIZE,
        )  # fmt: skip
        write = f"write -P {n % 255 + 1} {(n * 77_824) % (SIZE // 4)} {8192 + 512 * n}"
        zero = f"write -z {(n * 131_072) % (SIZE // 4)} {65_536}"
        subprocess.run(["qemu-io", "-c", write, "-c", zero, str(path)], check=True, stdout=-3)
        below, format = path, "qcow2"
    return below


CASES: dict[str, Callable[[Path], Path]] = {
    "raw": lambda f: image(f, "raw", ""),
    "raw falloc": lambda f: image(f, "raw", "preallocation=falloc"),
    **{
        f"{compat} {cluster}": partial(
            image, format="qcow2", options=f"compat={compat},cluster_size={cluster}"
        )
        for compat in ("0.10", "1.1")
        for cluster in ("512", "4k", "64k", "2M")
    },
    "extended L2 16k": lambda f: image(f, "qcow2", "extended_l2=on,cluster_size=16k"),
    "extended L2 128k": lambda f: image(f, "qcow2", "extended_l2=on,cluster_size=128k"),
    "zlib": lambda f: compressed(f, "zlib"),
    "zstd": lambda f: compressed(f, "zstd"),
    **{
        f"preallocation {how}": partial(image, format="qcow2", options=f"preallocation={how}")
        for how in ("metadata", "falloc", "full")
    },
    "external data file": lambda f: image(f, "qcow2", f"data_file={f}/data.bin"),
    "external raw data file": lambda f: image(
        f, "qcow2", f"data_file={f}/data.bin,data_file_raw=on"
    ),
    "chain of 1": lambda f: chain(f, 1, ""),
    "chain of 3": lambda f: chain(f, 3, ""),
    "chain of 50": lambda f: chain(f, 50, ""),
    "backing longer": lambda f: chain(f, 2, "", SIZE // 2 + 512),
    "backing shorter": lambda f: chain(f, 2, "", SIZE * 2 + 512),
    "v2 backing shorter": lambda f: chain(f, 3, "compat=0.10", SIZE * 2 + 512),
    "extended L2 over a chain": lambda f: chain(f, 3, "extended_l2=on"),
}


@contextmanager
def by_us(path: Path) -> Iterator[str]:
    format = "raw" if path.suffix == ".raw" else "qcow2"
    data = path.with_name("data.bin")
    more: dict[str, Any] = (
        {"data-file": {"driver": "file", "filename": str(data)}} if data.exists() else {}
    )
    node = opening.open_image(str(path), format, read_only=True, **more)
    server = NbdServer()
    try:
        server.add(NbdExport("d", Disk(node, "d"), writable=False))
        server.listen_unix(str(path.with_name("ours.sock")))
        yield server.uri("d")
    finally:
        server.stop()
        opening.close_chain(node)


@contextmanager
def by_qemu_nbd(path: Path) -> Iterator[str]:
    format = "raw" if path.suffix == ".raw" else "qcow2"
    sock = path.with_name("theirs.sock")
    options = ("-r", "-t", "-e", "8", "-k", str(sock), "-f", format, "-x", "d", str(path))
    with program(sock, "qemu-nbd", *options):
        yield f"nbd+unix:///d?socket={sock}"


def look(uri: str, flat: Path) -> tuple[bytes, list[tuple[int, bool]]]:
    """The bytes behind a URI, and its runs as (end, whether it is said to read as zero)."""
    subprocess.run(["nbdcopy", uri, str(flat)], check=True)
    done = subprocess.run(["nbdinfo", "--map", "--json", uri], check=True, stdout=subprocess.PIPE)
    runs: list[tuple[int, bool]] = []
    for e in json.loads(done.stdout):
        zero = bool(e["type"] & 2)
        if runs and runs[-1][1] is zero:
            runs.pop()
        runs.append((e["offset"] + e["length"], zero))
    return flat.read_bytes(), runs


@pytest.mark.parametrize("case", CASES)
def test_our_export_and_qemu_nbd_agree(tmp_path: Path, case: str) -> None:
    need("qemu-img", "qemu-io", "qemu-nbd", "nbdcopy", "nbdinfo")
    path = CASES[case](tmp_path)
    with by_us(path) as uri:
        ours, our_map = look(uri, tmp_path / "ours.flat")
    with by_qemu_nbd(path) as uri:
        theirs, their_map = look(uri, tmp_path / "theirs.flat")
    assert any(theirs)
    assert not differs(ours, theirs)
    assert our_map == their_map
