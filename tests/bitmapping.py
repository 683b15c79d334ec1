"""Images with dirty bitmaps in them for tests, and how QEMU sees those: it and we have to agree.

The images are opened alone, as if nobody kept their bitmaps.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chains import contents
from cowferry.block.bitmap import Bitmap
from cowferry.drivers import driver, opening
from cowferry.drivers.qcow2.image import Qcow2
from test_qcow2_peers import qemu_img
from tests_support import need

MIB = 1 << 20
SIZE = 4 * MIB
SMALL = 1 * MIB
SOAK = os.environ.get("COWFERRY_SOAK") is not None
TOKEN, OTHER = b"the first token.", b"another token..."
Known = dict[str, tuple[bytes, bool]]  # the bits of each bitmap, and whether it records


def opened(path: Path, read_only: bool = False) -> Qcow2:
    """The image alone: no keeper."""
    files: Any = driver("file")

    def file(path: Path) -> Any:
        options = files.Options(driver="file", filename=str(path), read_only=read_only)
        return files.open(options, {})

    children = {"file": file(path)}
    try:
        for role, name in Qcow2.companions(children).items():
            children[role] = file(path.parent / name)
        return Qcow2.open(Qcow2.Options(driver="qcow2", read_only=read_only), children)
    except BaseException:
        for child in children.values():
            child.close()
        raise


@contextmanager
def image_at(path: Path, read_only: bool = False) -> Iterator[Qcow2]:
    """Open, and closed again."""
    image = opened(path, read_only)
    try:
        yield image
    finally:
        image.close()


def make(path: Path, size: int = SIZE, **options: Any) -> Path:
    """An empty image."""
    opening.create_image(str(path), "qcow2", size, options)
    return path


def dirty(
    name: str, size: int = SIZE, granularity: int = 64 << 10, seed: int = 1, share: float = 0.3
) -> Bitmap:
    """A bitmap with runs of dirty granules, and its last one."""
    bitmap = Bitmap(name, size, granularity, persistent=True)
    rnd = random.Random(f"{name}{seed}")
    for _ in range(60):
        if rnd.random() < share:
            bitmap.set(rnd.randrange(size), rnd.randrange(1, 9) * granularity)
    bitmap.set(size - 1, 1)
    return bitmap


def known(bitmaps: Iterable[Bitmap]) -> Known:
    return {b.name: (b.bits.tobytes(), b.recording) for b in bitmaps}


def stored(path: Path) -> list[Bitmap]:
    """As another process finds them."""
    with image_at(path, read_only=True) as image:
        return image.read_bitmaps()


class StorageDaemon:
    """qemu-storage-daemon with `path` as node `n`, spoken to in QMP."""

    def __init__(self, path: Path, read_only: bool = True) -> None:
        need("qemu-storage-daemon", "nbdinfo")
        self.socket = path.with_suffix(".sock")
        file = f"file.driver=file,file.filename={path}"
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev",
             f"driver=qcow2,node-name=n,{file},read-only={'on' if read_only else 'off'}",
             "--chardev", "stdio,id=m", "--monitor", "chardev=m"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdin is not None
        self.out, self.into = self.process.stdout, self.process.stdin
        assert "QMP" in self.out.readline()
        self.call("qmp_capabilities")

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def kill(self) -> None:
        """No chance to store anything."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def call(self, command: str, **arguments: Any) -> Any:
        self.into.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.into.flush()
        while True:
            answer = json.loads(self.out.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """By name, as the node shows them."""
        (node,) = (n for n in self.call("query-named-block-nodes") if n["node-name"] == "n")
        return {b["name"]: b for b in node.get("dirty-bitmaps", [])}

    def export(self, *bitmaps: str) -> None:
        addr = {"type": "unix", "data": {"path": str(self.socket)}}
        self.call("nbd-server-start", addr=addr)
        self.call("block-export-add", type="nbd", id="e", **{"node-name": "n"}, bitmaps=bitmaps)

    def runs(self, bitmap: str) -> list[tuple[int, int]]:
        """The dirty runs, by way of an NBD client."""
        done = subprocess.run(
            ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}",
             f"nbd+unix:///n?socket={self.socket}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [(e["offset"], e["length"]) for e in json.loads(done.stdout) if e["type"] & 1]


def info_of_qemu(path: Path) -> Any:
    """The format-specific data of qemu-img's info."""
    shown = json.loads(qemu_img("info", "-U", "--output=json", path))
    return shown["format-specific"]["data"]


def agree_with_qemu(path: Path) -> None:
    """QEMU finds nothing wrong, shows what we show, and each bit is what we read."""
    qemu_img("check", "-U", path)
    with image_at(path, read_only=True) as image:
        bitmaps, info = image.read_bitmaps(), image.info()
        result = image.check()
    assert not result.corruptions and not result.leaks, result.messages
    assert info_of_qemu(path) == info
    usable = [b.name for b in bitmaps if not b.inconsistent]
    with StorageDaemon(path) as qsd:
        seen = qsd.bitmaps()
        assert list(seen) == [b.name for b in reversed(bitmaps)] or set(seen) == {
            b.name for b in bitmaps
        }
        for b in bitmaps:
            theirs = seen[b.name]
            assert theirs["granularity"] == b.granularity
            assert theirs["persistent"] and theirs.get("inconsistent", False) == b.inconsistent
            if not b.inconsistent:
                assert theirs["count"] == b.count()
                assert theirs["recording"] == b.recording
        if usable:
            qsd.export(*usable)
        for b in bitmaps:
            if not b.inconsistent:
                assert qsd.runs(b.name) == list(b.runs())


def contents_of(path: Path) -> bytes:
    with image_at(path, read_only=True) as image:
        return bytes(contents(image))
