"""A real guest: boots from the export, writes through its page cache while the disk is streamed."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

from chains import differs
from tests_support import need, unavailable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import guest

SIZE = 64 << 20
BLOCK = 4096


def cowferry(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line against the daemon of this test."""
    return subprocess.run(
        [sys.executable, "-m", "cowferry", *arguments],
        env={**os.environ, "COWFERRY_RUN": str(folder / "run")},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def qemu_check(path: Path) -> None:
    done = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_guest_writes_while_its_disks_are_streamed_and_the_bases_deleted(tmp_path: Path) -> None:
    need("qemu-img")
    if why := guest.missing():
        unavailable(why)
    rnd = random.Random(5)
    root, data = tmp_path / "root.raw", tmp_path / "data.raw"
    guest.root_image(root, tmp_path)
    oracle = bytearray(rnd.randbytes(SIZE))
    data.write_bytes(oracle)
    pattern = rnd.randbytes(3 << 20)
    for name, base in (("root", root), ("data", data)):
        cowferry(tmp_path, "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw",
                 str(tmp_path / f"{name}.qcow2"))  # fmt: skip
    daemon = subprocess.Popen(
        [sys.executable, "-m", "cowferry", "serve",
         *(f"{n}={tmp_path / n}.qcow2" for n in ("root", "data"))],
        env={**os.environ, "COWFERRY_RUN": str(tmp_path / "run")},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert daemon.stdout is not None
        uris = [daemon.stdout.readline().split(": ", 1)[1].strip() for _ in range(2)]
        with guest.Guest(uris, tmp_path) as vm:
            # The pattern comes from the disk itself: bytes that the oracle knows, moved about.
            plan = [(rnd.randrange(SIZE // BLOCK - 16), rnd.randrange(SIZE // BLOCK - 16))
                    for _ in range(60)]  # fmt: skip
            del pattern
            script = []
            for source, target in plan:
                piece = bytes(oracle[source * BLOCK : (source + 16) * BLOCK])
                oracle[target * BLOCK : (target + 16) * BLOCK] = piece
                script.append(
                    f"dd if=/dev/vdb of=/tmp/p bs={BLOCK} count=16 skip={source} 2>/dev/null && "
                    f"dd if=/tmp/p of=/dev/vdb bs={BLOCK} count=16 seek={target} conv=notrunc "
                    "2>/dev/null && sync"
                )
            cowferry(tmp_path, "stream", "data", "--speed", "40M", "--async")
            vm.run("dd if=/dev/urandom of=/data/x bs=4k count=300 2>/dev/null && sync")
            before = vm.run("md5sum /data/x").split()[0]
            for start in range(0, len(script), 6):
                vm.run(" && ".join(script[start : start + 6]))
            cowferry(tmp_path, "stream", "root")
            while cowferry(tmp_path, "jobs", "--json").stdout.strip() != "[]":
                vm.run("dd if=/dev/vdb of=/dev/null bs=1M count=8 2>/dev/null")
            root.unlink()
            data.unlink()
            vm.run("echo 3 > /proc/sys/vm/drop_caches")
            assert vm.run("md5sum /data/x").split()[0] == before
            whole = vm.run("md5sum /dev/vdb", 120).split()[0]
            assert whole == hashlib.md5(oracle).hexdigest(), "the guest reads something else"
            vm.poweroff()
    finally:
        daemon.terminate()
        assert daemon.wait(30) == 0
    for name in ("root", "data"):
        qemu_check(tmp_path / f"{name}.qcow2")
    flat = tmp_path / "flat.raw"
    subprocess.run(
        [
            "qemu-img",
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            str(tmp_path / "data.qcow2"),
            str(flat),
        ],
        check=True,
    )
    assert not differs(flat.read_bytes(), oracle)
