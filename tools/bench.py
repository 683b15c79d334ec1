"""Benchmarks against qemu-nbd and qemu-storage-daemon: ratios, measured in one run, interleaved.

Every line is run by us and by the peer in turn, a few rounds, on the same files with the same
client (fio's nbd engine); the median of each side makes the ratio. Machines differ and are noisy;
a ratio of two things measured within seconds of each other says something all the same.

    make bench                         all of it, about twenty minutes
    tools/bench.py --only nbd --rounds 5
    tools/bench.py --check             exit code 1 if a ratio is below the project's aim
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from bench_common import (
    GIB,
    OURS,
    QSD,
    Daemon,
    Line,
    fio,
    median,
    patiently,
    random_file,
    reflink_folder,
    run,
)
from bench_copies import bench_copies, bench_slow_target
from bench_first_writes import bench_first_writes
from rich.console import Console
from rich.table import Table


@contextmanager
def served(name: str, folder: Path, path: Path, format: str) -> Iterator[str]:
    """`path` over NBD by qemu-nbd or by us; gives the URI."""
    if name == OURS:
        with Daemon(
            OURS, folder,
            "--blockdev", f"driver={format},node-name=d,file.driver=file,file.filename={path}",
            "--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'}",
            "--export", "type=nbd,id=e,node-name=d,name=d,writable=on",
        ) as daemon:  # fmt: skip
            yield f"nbd+unix:///d?socket={daemon.socket}"
        return
    sock = folder / "peer.sock"
    sock.unlink(missing_ok=True)
    child = subprocess.Popen(
        ["qemu-nbd", "-t", "-e", "8", "-k", str(sock), "-f", format, "-x", "d", str(path)]
    )
    try:
        patiently(sock.stat)
        yield f"nbd+unix:///d?socket={sock}"
    finally:
        child.terminate()
        child.wait(30)


def bench_nbd(folder: Path, rounds: int) -> Iterator[Line]:
    """4 KiB random requests on raw and preallocated qcow2, deep and shallow."""
    raw, qcow2 = folder / "d.raw", folder / "d.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=full", str(raw), "256M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", str(qcow2), "256M")
    for path, format in ((raw, "raw"), (qcow2, "qcow2")):
        for depth, aim in ((32, 2.0), (1, 0.9)):
            for kind in ("randread", "randwrite"):
                found: dict[str, list[float]] = {OURS: [], "qemu-nbd": []}
                for _ in range(rounds):
                    for name in found:
                        with served(name, folder, path, format) as uri:
                            found[name].append(fio(uri, depth, kind, 3)["iops"])
                a, b = median(found[OURS]), median(found["qemu-nbd"])
                yield Line(f"{format} 4k {kind} depth {depth}", "IOPS", a, b, a / b, aim)
    raw.unlink()
    qcow2.unlink()


def stream_once(name: str, folder: Path, base: Path) -> tuple[float, float]:
    """(seconds, seconds of processor time) to stream `base` into a new overlay."""
    top = folder / "top.qcow2"
    top.unlink(missing_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top))
    os.sync()
    with Daemon(
        name, folder,
        "--blockdev", f"driver=raw,node-name=b,read-only=on,file.driver=file,file.filename={base}",
        "--blockdev", f"driver=qcow2,node-name=t,backing=b,file.driver=file,file.filename={top}",
    ) as daemon:  # fmt: skip
        before = daemon.cpu()
        took = daemon.job("block-stream", device="t")
        return took, daemon.cpu() - before


def bench_stream(folder: Path, rounds: int) -> Iterator[Line]:
    """A raw base of 1 GiB streamed into qcow2: a plain file system, and one that can clone."""
    with ExitStack() as stack:
        shared = stack.enter_context(reflink_folder(stack))
        for place, what, aim in ((folder, "plain", 1.5), (shared, "reflink", 20.0)):
            if place is None:
                continue
            base = place / "base.raw"
            random_file(base, GIB)
            found: dict[str, list[tuple[float, float]]] = {OURS: [], QSD: []}
            for _ in range(rounds):
                for name in found:
                    found[name].append(stream_once(name, place, base))
            a, b = (median([t for t, _ in found[n]]) for n in (OURS, QSD))
            yield Line(f"stream 1 GiB, {what}", "s", a, b, b / a, aim)
            a, b = (median([c for _, c in found[n]]) for n in (OURS, QSD))
            yield Line(f"stream 1 GiB, {what}, processor", "s", a, b, b / max(a, 0.01), 0)
            base.unlink()
            (place / "top.qcow2").unlink()


def bench_start(folder: Path, rounds: int) -> Iterator[Line]:
    """From `exec` to the first byte over NBD, and memory with a disk of 1 TiB."""
    path = folder / "big.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1T")
    times: dict[str, list[float]] = {OURS: [], QSD: []}
    memory: dict[str, list[float]] = {OURS: [], QSD: []}
    for _ in range(rounds):
        for name in times:
            begin = time.monotonic()
            with Daemon(
                name, folder,
                "--blockdev", f"driver=qcow2,node-name=d,file.driver=file,file.filename={path}",
                "--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'}",
                "--export", "type=nbd,id=e,node-name=d,name=d,writable=on",
            ) as daemon:  # fmt: skip
                uri = f"nbd+unix:///d?socket={daemon.socket}"
                first_byte(daemon.socket)
                times[name].append(time.monotonic() - begin)
                fio(uri, 32, "randwrite", 2)
                memory[name].append(daemon.resident())
    a, b = median(times[OURS]), median(times[QSD])
    yield Line("start to first byte (aim: 0.5 s)", "s", a, b, 0.5 / a, 1)
    a, b = median(memory[OURS]), median(memory[QSD])
    yield Line("memory, disk of 1 TiB (aim: 80 MiB)", "MiB", a, b, 80 / a, 1)
    path.unlink()


def first_byte(path: Path) -> None:
    """The shortest NBD conversation that reads something: EXPORT_NAME, then READ."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(path))
        got = s.makefile("rb")
        got.read(18)
        s.sendall((3).to_bytes(4, "big") + b"IHAVEOPT" + bytes([0, 0, 0, 1, 0, 0, 0, 1]) + b"d")
        got.read(10)
        s.sendall(bytes.fromhex("25609513") + bytes(20) + (512).to_bytes(4, "big"))
        if len(got.read(16 + 512)) != 16 + 512:
            raise OSError("no first byte")


SECTIONS = {
    "nbd": bench_nbd,
    "first": bench_first_writes,
    "stream": bench_stream,
    "copies": bench_copies,
    "slow": bench_slow_target,
    "start": bench_start,
}


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Just this part.")
@click.option("--rounds", default=3, show_default=True, help="Times that each side runs.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files lie.")
@click.option("--check", is_flag=True, help="Exit code 1 if a ratio is below its aim.")
@click.option("--json", "as_json", is_flag=True, help="Lines as JSON.")
def main(
    only: tuple[str, ...], rounds: int, folder: Path | None, check: bool, as_json: bool
) -> None:
    for need in ("qemu-nbd", QSD, "fio"):
        if shutil.which(need) is None:
            raise click.ClickException(f"{need} is not installed; see tools/setup.sh")
    console = Console(stderr=True)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as place:
        for name, section in SECTIONS.items():
            if only and name not in only:
                continue
            for line in section(Path(place), rounds):
                lines.append(line)
                console.print(f"{line.name}: {line.ratio:.2f}", style="dim")
    if as_json:
        click.echo(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        table = Table("", "unit", "cowferry", "QEMU", "ratio", "aim", "")
        for x in lines:
            aim = f"{x.aim:g}" if x.aim else ""
            table.add_row(
                x.name, x.unit, f"{x.ours:,.4g}", f"{x.theirs:,.4g}", f"{x.ratio:.2f}", aim,
                "[red]missed" if x.missed else "",
            )  # fmt: skip
        Console().print(table)
    missed = [line.name for line in lines if line.missed]
    if missed:
        console.print(f"{len(missed)} of {len(lines)} below their aim: {'; '.join(missed)}")
    if check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
