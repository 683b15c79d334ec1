"""How exactly limits are kept: fio against a limited disk for a while, ours and QEMU's.

tools/limits.py [--seconds 10]      exit code 1 if ours is off by more than 5 per cent
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click
from bench_common import OURS, QSD, Daemon, random_file

OFF = 0.05


class Case(NamedTuple):
    """A limit, and clients (as fio options) of one disk each that are to make `wanted` together."""

    name: str
    limit: str
    clients: tuple[str, ...]
    wanted: float
    what: str  # "bw_bytes" or "iops"


SMALL, LARGE = "--bs=4k --iodepth=32", "--bs=256k --iodepth=8"
BPS, IOPS = "limits.bps-total=20000000", "limits.iops-total=500"
CASES = (
    Case("20 MB/s, small reads", BPS, (f"--rw=randread {SMALL}",), 20e6, "bw_bytes"),
    Case("20 MB/s, large writes", BPS, (f"--rw=write {LARGE}",), 20e6, "bw_bytes"),
    Case("20 MB/s, mixed", BPS, (f"--rw=randrw {SMALL}",), 20e6, "bw_bytes"),
    Case("500 iops, reads", IOPS, (f"--rw=randread {SMALL}",), 500, "iops"),
    Case("500 iops, writes, depth 1", IOPS, ("--rw=randwrite --bs=4k --iodepth=1",), 500, "iops"),
    Case(
        "20 MB/s, two disks",
        BPS,
        (f"--rw=randread {SMALL}", f"--rw=read {LARGE}"),
        20e6,
        "bw_bytes",
    ),
)


def measure(name: str, case: Case, folder: Path, seconds: int) -> list[float]:
    """What each client got per second."""
    options = ["--object", f"throttle-group,id=g,{case.limit}"]
    options += ["--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'}"]
    for n, _ in enumerate(case.clients):
        file = f"file.driver=raw,file.file.driver=file,file.file.filename={folder / f'{n}.raw'}"
        options += ["--blockdev", f"driver=throttle,node-name=d{n},throttle-group=g,{file}"]
        options += ["--export", f"type=nbd,id=e{n},node-name=d{n},name=d{n},writable=on"]
    got = []
    with Daemon(name, folder, *options) as daemon:
        running = [
            subprocess.Popen(
                ["fio", "--name=j", "--ioengine=nbd", f"--uri=nbd+unix:///d{n}?socket={daemon.socket}",
                 *client.split(), "--time_based", f"--runtime={seconds}", "--output-format=json"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for n, client in enumerate(case.clients)
        ]  # fmt: skip
        for child in running:
            out = child.communicate()[0]
            job = json.loads(out[out.index("{") :])["jobs"][0]
            got.append(float(job["read"][case.what] + job["write"][case.what]))
    return got


@click.command()
@click.option("--seconds", default=10, show_default=True, help="Of each measurement.")
def main(seconds: int) -> None:
    """Measure every case, one line each."""
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="limits-") as place:
        folder = Path(place)
        for n in range(2):
            random_file(folder / f"{n}.raw", 256 << 20)
        for case in CASES:
            line = f"{case.name:28}"
            for name in (OURS, QSD):
                got = measure(name, case, folder, seconds)
                off = sum(got) / case.wanted - 1
                shares = " + ".join(f"{100 * x / sum(got):.0f}%" for x in got[1:] and got)
                line += f"  {name} {100 * off:+.1f}%" + (f" ({shares})" if shares else "")
                worst = max(worst, abs(off) if name == OURS else 0.0)
            click.echo(line)
    sys.exit(worst > OFF)


if __name__ == "__main__":
    main()
