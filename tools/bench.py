"""Benchmarks against qemu-nbd and qemu-storage-daemon: ratios, measured in one run, interleaved.

Every line is run by us and by the peer in turn, a few rounds, on the same files with the same
client (fio's nbd engine); the median of each side makes the ratio. Machines differ and are noisy;
a ratio of two things measured within seconds of each other says something all the same.

    make bench                         all of it, about five minutes
    tools/bench.py --only nbd --rounds 5
    tools/bench.py --check             exit code 1 if a ratio is below the project's aim
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
from rich.console import Console
from rich.table import Table

from cowferry.cli.client import Client
from cowferry.errors import CowferryError

T = TypeVar("T")

GIB = 1 << 30
OURS, QSD = "cowferry", "qemu-storage-daemon"


class Line(NamedTuple):
    """One thing measured: ours and theirs in `unit`; `ratio` above one means that we are better."""

    name: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    aim: float  # 0: nothing is promised


def median(values: list[float]) -> float:
    return statistics.median(values)


def run(*command: str) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return done.stdout


def patiently(what: Callable[[], T], seconds: float = 20) -> T:
    """The first result of `what` that is not an error: a daemon takes a moment to come up."""
    end = time.monotonic() + seconds
    while True:
        try:
            return what()
        except (OSError, CowferryError):
            if time.monotonic() > end:
                raise
            time.sleep(0.005)


class Daemon:
    """A storage daemon: ours or QEMU's, started with the very same options."""

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        self.socket = folder / "nbd.sock"
        monitor = folder / "qmp.sock"
        for path in (self.socket, monitor):
            path.unlink(missing_ok=True)
        program = [QSD] if name == QSD else [sys.executable, "-m", "cowferry", "serve"]
        self.child = subprocess.Popen(
            [
                *program,
                *options,
                "--chardev", f"socket,id=c,path={monitor},server=on,wait=off",
                "--monitor", "chardev=c",
            ],
            env={**os.environ, "COWFERRY_RUN": str(folder / "run")},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.qmp = patiently(lambda: Client(str(monitor)))

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()
        self.child.terminate()
        self.child.wait(30)

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """MiB."""
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise LookupError("VmRSS")

    def job(self, command: str, **arguments: object) -> float:
        """Run a block job to its end (a ready one is completed); the seconds it took."""
        begin = time.monotonic()
        self.qmp.call(command, job_id="j", **arguments)
        for event in self.qmp.wait_events(600):
            name, data = event["event"], event["data"]
            if name == "BLOCK_JOB_READY":
                self.qmp.call("job-complete", id="j")
            if name == "BLOCK_JOB_COMPLETED":
                if "error" in data:
                    raise RuntimeError(data["error"])
                break
        took = time.monotonic() - begin
        self.qmp.events.clear()
        return took


def fio(uri: str, depth: int, kind: str, seconds: int) -> dict[str, float]:
    """4 KiB random requests for a while; requests per second and the 99th percentile in us."""
    out = run(
        "fio", "--name=j", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", "--bs=4k",
        f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--output-format=json",
        "--size=256m", "--randrepeat=1",
    )  # fmt: skip
    job = json.loads(out[out.index("{") :])["jobs"][0]["read" if "read" in kind else "write"]
    return {"iops": job["iops"], "p99": job["clat_ns"]["percentile"]["99.000000"] / 1000}


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


def random_file(path: Path, size: int) -> None:
    block = random.Random(1).randbytes(4 << 20)
    with open(path, "wb") as f:
        f.writelines(n.to_bytes(8, "big") + block[8:] for n in range(0, size, len(block)))
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def reflink_folder(stack: ExitStack) -> Iterator[Path | None]:
    """A folder on a file system that shares extents; None if this user cannot mount one."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    image, mount = place / "xfs.img", place / "mnt"
    mount.mkdir()
    with open(image, "wb") as f:
        f.truncate(8 * GIB)
    try:
        run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        run("mount", "-o", "loop", str(image), str(mount))
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield mount
    finally:
        run("umount", str(mount))


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


SECTIONS = {"nbd": bench_nbd, "stream": bench_stream, "start": bench_start}


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
        table = Table("", "unit", "cowferry", "QEMU", "ratio", "aim")
        for x in lines:
            aim = f"{x.aim:g}" if x.aim else ""
            table.add_row(
                x.name, x.unit, f"{x.ours:,.4g}", f"{x.theirs:,.4g}", f"{x.ratio:.2f}", aim
            )
        Console().print(table)
    if check and any(line.ratio < line.aim for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
