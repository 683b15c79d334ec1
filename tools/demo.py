"""`make demo`: the main job, on a fresh machine, with every byte checked at the end."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import guest

from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient

SIZE = 64 << 20
BLOCK = 4096


class Demo:
    """One run in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "COWFERRY_RUN": str(folder / "run")}
        self.oracle = bytearray()
        self.tuesday = b""  # what the disk held when that backup began

    def cowferry(self, *arguments: str, show: bool = True) -> str:
        """Run the command line, showing what a person would type and see."""
        if show:
            print(f"$ cowferry {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "cowferry", *arguments],
            env=self.env, cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"demo: that failed: {done.stderr}")
        if show and done.stdout:
            print("".join(f"  {line}\n" for line in done.stdout.splitlines()), end="", flush=True)
        return done.stdout

    def build(self) -> None:
        """base.raw <- sn1.qcow2 <- data.qcow2, and the guest's own root disk."""
        rnd = random.Random(2011)
        self.oracle = bytearray(rnd.randbytes(SIZE))
        (self.folder / "base.raw").write_bytes(self.oracle)
        overlay = ("create", "-q", "-f", "qcow2")
        self.cowferry(*overlay, "-b", "base.raw", "-F", "raw", "sn1.qcow2")
        self.cowferry(*overlay, "-b", "sn1.qcow2", "-F", "qcow2", "data.qcow2")
        node = opening.open_image(str(self.folder / "sn1.qcow2"))
        change = rnd.randbytes(5 << 20)
        node.pwrite(memoryview(change), 20 << 20)
        opening.close_chain(node)
        self.oracle[20 << 20 : 25 << 20] = change

    def run(self) -> None:
        """The story, start to end."""
        begin = time.monotonic()
        why_not = guest.missing()
        print("1. A chain of images; the base has 64 MiB of known bytes\n")
        self.build()
        disks = ["data.qcow2"]
        if not why_not:
            guest.root_image(self.folder / "root.raw", self.folder)
            self.cowferry(
                "create", "-q", "-f", "qcow2", "-b", "root.raw", "-F", "raw", "root.qcow2"
            )
            disks.insert(0, "root.qcow2")
        print("\n2. The daemon serves it\n")
        print(f"$ cowferry serve {' '.join(disks)} &")
        daemon = subprocess.Popen(
            [sys.executable, "-m", "cowferry", "serve", *disks],
            env=self.env, cwd=self.folder, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert daemon.stdout is not None
            uris = {}
            for _ in disks:
                name, uri = daemon.stdout.readline().strip().split(": ", 1)
                uris[name] = uri
                print(f"  {name}: {uri}")
            self.cowferry("tree", "data")
            if why_not:
                print(
                    f"\n3. No guest can run here ({why_not}); our own NBD client writes instead\n"
                )
                self.drive_client(uris["data"])
            else:
                print("\n3. A real guest boots from it, and writes while it is streamed\n")
                self.drive_guest(list(uris.values()))
        finally:
            daemon.terminate()
            daemon.wait(30)
        self.verify()
        print(f"\nDone in {time.monotonic() - begin:.1f} s.")

    def drive_guest(self, uris: list[str]) -> None:
        """Boot, write under the stream, delete the bases, read back."""
        begin = time.monotonic()
        with guest.Guest(uris, self.folder) as vm:
            print(f"  guest is up after {time.monotonic() - begin:.1f} s: {vm.run('uname -sr')}")
            self.cowferry("stream", "data", "--speed", "40M", "--async")
            rnd = random.Random(7)
            writes = 0

            def write() -> None:
                source, target = (rnd.randrange(SIZE // BLOCK - 32) for _ in range(2))
                piece = bytes(self.oracle[source * BLOCK : (source + 32) * BLOCK])
                self.oracle[target * BLOCK : (target + 32) * BLOCK] = piece
                vm.run(
                    f"dd if=/dev/vdb of=/tmp/p bs={BLOCK} count=32 skip={source} 2>/dev/null && "
                    f"dd if=/tmp/p of=/dev/vdb bs={BLOCK} count=32 seek={target} conv=notrunc "
                    "2>/dev/null && sync"
                )

            while self.cowferry("jobs", "--json", show=False).strip() != "[]" or writes < 20:
                write()
                writes += 1
                if writes % 10 == 1:
                    self.cowferry("monitor", "info block-stream")
            print(f"  the guest wrote {writes} times, each with a sync, meanwhile")
            self.cowferry("stream", "root")
            self.cowferry("tree")
            self.delete("base.raw", "sn1.qcow2", "root.raw")
            vm.run("echo 3 > /proc/sys/vm/drop_caches; ls -lR / >/dev/null 2>&1; true")
            print("  the guest lives on without them: " + vm.run("mount | head -1").strip())
            self.change(write, "root", "data")
            vm.poweroff()

    def drive_client(self, uri: str) -> None:
        """The same without a guest."""
        rnd = random.Random(7)
        client = NbdClient(uri)
        self.cowferry("stream", "data", "--speed", "40M", "--async")

        def write() -> None:
            offset = rnd.randrange(SIZE - 100_000)
            piece = rnd.randbytes(100_000)
            client.pwrite(piece, offset)
            client.flush()
            self.oracle[offset : offset + len(piece)] = piece

        while self.cowferry("jobs", "--json", show=False).strip() != "[]":
            write()
        self.cowferry("tree")
        self.delete("base.raw", "sn1.qcow2")
        self.change(write, "data")
        client.close()

    def change(self, write: Callable[[], None], *disks: str) -> None:
        """The chain changes under whoever writes: upwards, downwards, and to another folder."""
        print("\n4. Snapshot, merge and move, and it goes on writing\n")
        self.cowferry("snapshot", *disks)
        write()
        self.cowferry("tree", "data")
        self.cowferry("commit", "data")
        write()
        (self.folder / "fast").mkdir()
        self.cowferry("copy", "data", "fast/data.raw", "--pivot")
        write()
        self.cowferry("tree", "data")
        self.cowferry("current", "data.qcow2")
        print("\n5. Backups, each as of its moment\n")
        self.cowferry("backup", "data", "mon.qcow2", "--bitmap", "b0")
        write()
        self.tuesday = bytes(self.oracle)
        self.cowferry(
            "backup", "data", "tue.qcow2", "--incremental", "--bitmap", "b0", "--base", "mon.qcow2"
        )
        write()

    def delete(self, *names: str) -> None:
        """What a stream has made superfluous."""
        print(f"$ rm {' '.join(names)}")
        for name in names:
            (self.folder / name).unlink()

    def verify(self) -> None:
        """Byte for byte, and by the checkers."""
        print("\n6. Every byte\n")
        self.cowferry("check", "data.qcow2")
        size = SIZE >> 20
        if self.reads("fast/data.raw") != self.oracle:
            sys.exit("demo: fast/data.raw does NOT hold what the guest wrote")
        print(f"  fast/data.raw stands alone; its {size} MiB equal what was written, all of it")
        if self.reads("tue.qcow2") != self.tuesday:
            sys.exit("demo: tue.qcow2 is NOT the disk of its moment")
        print(f"  tue.qcow2 over mon.qcow2: {size} MiB as they were when that backup began")

    def reads(self, name: str) -> bytearray:
        """All bytes of an image and what it lies over."""
        node = opening.open_image(str(self.folder / name), read_only=True)
        got = bytearray(node.size)
        node.pread(memoryview(got), 0)
        opening.close_chain(node)
        return got


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="cowferry-demo-") as where:
        Demo(Path(where)).run()
