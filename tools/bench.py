"""`make bench`: ratios against qemu-nbd and qemu-storage-daemon, in the same run, interleaved.

Absolute figures of a shared machine mean little; what both sides did in the same minute does. Every
figure is the median of several rounds, and in each round ours and the peer's turn follow one
another. `--check` makes the exit code say whether the targets were met, `--quick` takes one short
round (to see that it works; its figures mean nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cowferry.drivers.nbd_client import NbdClient

MIB = 1 << 20
STREAMED = 1 << 30  # bytes of the base
SERVED = 256 * MIB  # bytes of the images under random load
HUGE = 1 << 40  # bytes of the disk whose server's memory is weighed
PATIENCE = 60.0  # seconds


class Result(NamedTuple):
    """One line of the report. `goal` is a least ratio, or a greatest value with `upper`."""

    what: str
    ours: str
    peers: str
    value: float
    goal: float
    upper: bool
    unit: str

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.upper else self.value >= self.goal


class Bench:
    """All measurements of one run, in a folder of its own."""

    def __init__(self, folder: Path, rounds: int, seconds: float, only: str) -> None:
        self.folder = folder
        self.rounds = rounds
        self.seconds = seconds
        self.only = only
        self.results: list[Result] = []
        self.number = 0

    def note(self, result: Result) -> None:
        """Report a line as soon as it is known."""
        self.results.append(result)
        verdict = "ok  " if result.met else "MISS"
        sign = "<=" if result.upper else ">="
        print(
            f"{verdict} {result.what:<46} {result.ours:>12} {result.peers:>12}  "
            f"{result.value:7.2f}{result.unit} (goal {sign} {result.goal:g}{result.unit})",
            flush=True,
        )

    def run(self) -> None:
        """Everything that this machine has the programs for."""
        print(f"     {'':<46} {'cowferry':>12} {'QEMU':>12}  ratio")
        parts: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
            "start": (self.start, ()),
            "memory": (self.memory, ("fio",)),
            "random": (self.random, ("fio", "qemu-nbd", "qemu-img")),
            "stream": (lambda: self.stream(self.folder, "plain", 1.5), ("qemu-storage-daemon",)),
            "reflink": (self.reflink, ("qemu-storage-daemon", "mkfs.xfs")),
        }
        for name, (part, programs) in parts.items():
            missing = [p for p in programs if shutil.which(p) is None]
            if self.only and name not in self.only.split(","):
                continue
            if missing:
                print(f"     {name}: left out, not installed: {', '.join(missing)}")
            else:
                part()

    # servers -----------------------------------------------------------------------------

    @contextmanager
    def cowferry(self, image: Path) -> Iterator[tuple[int, str, Path]]:
        """(pid, URI, QMP socket) of ours."""
        self.number += 1
        run = self.folder / f"run{self.number}"
        child = subprocess.Popen(
            [sys.executable, "-m", "cowferry", "serve", f"vm={image}"],
            env={**os.environ, "COWFERRY_RUN": str(run)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            if not line:
                sys.exit(f"bench: cowferry serve {image} failed")
            yield child.pid, line.split(": ", 1)[1].strip(), run / "qmp.sock"
        finally:
            end(child)

    @contextmanager
    def qemu_nbd(self, image: Path, format: str) -> Iterator[str]:
        """The URI of qemu-nbd's export, in the mode in which guests' disks run."""
        self.number += 1
        path = self.folder / f"peer{self.number}.sock"
        child = subprocess.Popen(
            ["qemu-nbd", "-k", str(path), "-t", "-e", "8", "-f", format,
             "--cache=writeback", "--discard=unmap", str(image)],
            stderr=subprocess.DEVNULL,  # it complains of every client that leaves
        )  # fmt: skip
        try:
            there(path, child)
            yield f"nbd+unix:///?socket={path}"
        finally:
            end(child)

    @contextmanager
    def qsd(self, image: Path) -> Iterator[Path]:
        """The QMP socket of a qemu-storage-daemon that has `image` open as node vm."""
        self.number += 1
        path = self.folder / f"qsd{self.number}.sock"
        child = subprocess.Popen(
            ["qemu-storage-daemon",
             "--blockdev", f"driver=file,filename={image},node-name=f",
             "--blockdev", "driver=qcow2,file=f,node-name=vm,discard=unmap",
             "--chardev", f"socket,id=c,path={path},server=on,wait=off",
             "--monitor", "chardev=c"],
        )  # fmt: skip
        try:
            there(path, child)
            yield path
        finally:
            end(child)

    # measurements ------------------------------------------------------------------------

    def start(self) -> None:
        """From the start of the process to the first byte that a client holds."""
        image = self.folder / "start.qcow2"
        tool("create", "-f", "qcow2", str(image), "10G")
        took = []
        for _ in range(max(self.rounds, 3)):
            begin = time.monotonic()
            with self.cowferry(image) as (_, uri, _), NbdClient(uri) as client:
                client.pread(512, 0)
                took.append(time.monotonic() - begin)
        value = statistics.median(took)
        self.note(
            Result("start to first served byte", f"{value:.2f} s", "", value, 0.5, True, " s")
        )

    def memory(self) -> None:
        """Resident memory of a server whose 1 TiB disk is written and read all over."""
        image = self.folder / "huge.qcow2"
        tool("create", "-f", "qcow2", str(image), str(HUGE))
        with self.cowferry(image) as (pid, uri, _):
            idle = resident(pid)
            fio(uri, "randwrite", 32, self.seconds, "--number_ios=6000", f"--size={HUGE}")
            fio(uri, "randread", 32, self.seconds, "--number_ios=20000", f"--size={HUGE}")
            loaded = resident(pid)
        image.unlink()
        for when, value in (("idle", idle), ("after random load", loaded)):
            self.note(
                Result(f"memory, 1 TiB disk, {when}", f"{value:.0f} MiB", "", value, 80, True, "")
            )

    def random(self) -> None:
        """4 KiB random requests over NBD, on images of equal content."""
        for format in ("raw", "qcow2"):
            images = [self.folder / f"{who}.{format}" for who in ("ours", "peer")]
            for image in images:
                extra = ["-o", "preallocation=full"] if format == "qcow2" else []
                subprocess.run(
                    ["qemu-img", "create", "-q", "-f", format, *extra, str(image), str(SERVED)],
                    check=True,
                )
            with ExitStack() as stack:
                _, ours, _ = stack.enter_context(self.cowferry(images[0]))
                peer = stack.enter_context(self.qemu_nbd(images[1], format))
                for uri in (ours, peer):
                    fill(uri)
                for depth, goal in ((32, 2.0), (1, 0.9)):
                    for kind in ("randread", "randwrite"):
                        pairs = [
                            [fio(uri, kind, depth, self.seconds) for uri in (ours, peer)]
                            for _ in range(self.rounds)
                        ]
                        mine, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
                        ratio = statistics.median(p[0] / p[1] for p in pairs)
                        what = f"4 KiB {kind}, depth {depth}, {format}"
                        self.note(
                            Result(what, f"{mine / 1e3:.1f} k/s", f"{theirs / 1e3:.1f} k/s",
                                   ratio, goal, False, "x")
                        )  # fmt: skip
            for image in images:
                image.unlink()

    def stream(self, folder: Path, where: str, goal: float) -> None:
        """A whole raw base into a qcow2 overlay: from the command to the completion event.

        Ours includes the flushes that make the event true; the peer sends it without."""
        base = folder / "base.raw"
        block = os.urandom(MIB)
        with open(base, "wb") as f:
            f.writelines(i.to_bytes(8, "big") + block[8:] for i in range(STREAMED // MIB))
        top = folder / "vm.qcow2"
        pairs = []
        for _ in range(self.rounds):
            pair = []
            for ours in (True, False):
                tool("create", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top))
                os.sync()  # nobody pays for what another one wrote
                with ExitStack() as stack:
                    if ours:
                        _, _, path = stack.enter_context(self.cowferry(top))
                    else:
                        path = stack.enter_context(self.qsd(top))
                    pair.append(stream(path))
                top.unlink()
            pairs.append(pair)
        base.unlink()
        mine, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        ratio = statistics.median(p[1] / p[0] for p in pairs)
        self.note(
            Result(f"stream 1 GiB raw into qcow2, {where}", f"{mine:.3f} s", f"{theirs:.3f} s",
                   ratio, goal, False, "x")
        )  # fmt: skip

    def reflink(self) -> None:
        """The same on a file system that shares blocks: XFS on a loop device."""
        image, where = self.folder / "xfs.img", self.folder / "xfs"
        where.mkdir()
        with open(image, "wb") as f:
            f.truncate(6 << 30)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
        done = subprocess.run(
            ["mount", "-o", "loop", str(image), str(where)], capture_output=True, text=True
        )
        if done.returncode:
            print(f"     reflink: left out, no loop mounts here: {done.stderr.strip()}")
            return
        try:
            self.stream(where, "reflink", 20)
        finally:
            subprocess.run(["umount", str(where)], check=True)
            image.unlink()


# tools -----------------------------------------------------------------------------------


def end(child: subprocess.Popen[Any]) -> None:
    """Stop a server that we started."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


def there(path: Path, child: subprocess.Popen[bytes]) -> None:
    """Wait until somebody listens on a socket."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and child.poll() is None:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            return
        time.sleep(0.01)
    sys.exit(f"bench: {child.args!r} does not listen")


def tool(*arguments: str) -> None:
    """An offline command of ours."""
    subprocess.run(
        [sys.executable, "-m", "cowferry", arguments[0], "-q", *arguments[1:]], check=True
    )


def fill(uri: str) -> None:
    """Give every block content, by way of the server."""
    block = os.urandom(MIB)
    with NbdClient(uri) as client:
        for offset in range(0, SERVED, MIB):
            client.pwrite(block, offset)
        client.flush()


def fio(uri: str, kind: str, depth: int, seconds: float, *more: str) -> float:
    """Requests per second."""
    timed = () if more else ("--time_based", f"--runtime={seconds}")
    done = subprocess.run(
        ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", "--bs=4k",
         f"--iodepth={depth}", "--norandommap", "--output-format=json", *timed, *more],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"bench: fio on {uri} failed: {done.stderr}{done.stdout[-2000:]}")
    report = json.loads(done.stdout[done.stdout.index("{") :])
    return float(report["jobs"][0]["read" if kind == "randread" else "write"]["iops"])


def resident(pid: int) -> float:
    """MiB of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError(pid)


def stream(path: Path) -> float:
    """Seconds from the command to the event of a whole stream of vm."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(600)
        sock.connect(str(path))
        lines = sock.makefile("r")
        lines.readline()
        sock.sendall(b'{"execute": "qmp_capabilities"}\n')
        lines.readline()
        begin = time.monotonic()
        sock.sendall(b'{"execute": "block-stream", "arguments": {"device": "vm", "job-id": "j"}}\n')
        while True:
            message = json.loads(lines.readline())
            if "error" in message or message.get("data", {}).get("error"):
                sys.exit(f"bench: the stream failed: {message}")
            if message.get("event") == "BLOCK_JOB_COMPLETED":
                return time.monotonic() - begin


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each fio run")
    parser.add_argument("--only", default="", help="start,memory,random,stream,reflink")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    given = parser.parse_args()
    rounds, seconds = (1, 0.5) if given.quick else (given.rounds, given.seconds)
    with tempfile.TemporaryDirectory(prefix="cowferry-bench-") as folder:
        bench = Bench(Path(folder), rounds, seconds, given.only)
        bench.run()
    if given.json:
        Path(given.json).write_text(
            json.dumps([r._asdict() | {"met": r.met} for r in bench.results], indent=1) + "\n"
        )
    missed = [r.what for r in bench.results if not r.met]
    if missed:
        print(f"\n{len(missed)} of {len(bench.results)} targets missed.")
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
