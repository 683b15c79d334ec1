"""Small file systems and devices for tests, and how to fill them. `mount` and `device` are fixtures
to import."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from loops import loop
from tests_support import need, unavailable

Mount = Callable[..., Path]
Device = Callable[[int], str]
MiB = 1 << 20


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a small file system of a type."""
    need("mount", "umount")
    mounted: list[Path] = []

    def make(kind: str, size: str = "3m") -> Path:
        point = tmp_path / f"mounted{len(mounted)}"
        point.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "small"]
        if kind != "tmpfs":
            need(f"mkfs.{kind}")
            image = tmp_path / f"{point.name}.img"
            with open(image, "wb") as f:
                f.truncate(300 * MiB)
            subprocess.run([f"mkfs.{kind}", "-q", image], check=True, timeout=60)
            options = ["-o", "loop", str(image)]
        if subprocess.run(["mount", *options, point], timeout=60).returncode:
            unavailable("mounting a file system needs root")
        mounted.append(point)
        return point

    yield make
    for point in reversed(mounted):
        subprocess.run(["umount", "-l", str(point)], check=False, timeout=60)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Makes loop devices of so many bytes, full of what is not zero."""
    monkeypatch.setenv("COWFERRY_STATE", str(tmp_path / "state"))
    numbers = itertools.count()
    with ExitStack() as made:

        def make(size: int) -> str:
            file = tmp_path / f"device{next(numbers)}"
            file.write_bytes(b"\xaa" * size)
            return made.enter_context(loop(file))

        yield make


def fill(point: Path, room: int = 0) -> None:
    """Leave only so many bytes of room."""
    with open(point / "ballast", "wb", buffering=0) as f:
        piece = 64 * MiB
        while piece >= 4096:
            end = f.seek(0, os.SEEK_END)
            try:
                os.posix_fallocate(f.fileno(), end, piece)
            except OSError:
                f.truncate(end)
                piece //= 2
        f.truncate(max(f.seek(0, os.SEEK_END) - room, 0))
        os.fsync(f.fileno())


def empty(point: Path) -> None:
    """There is room again."""
    (point / "ballast").unlink()


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file of this process may grow beyond that meanwhile (RLIMIT_FSIZE)."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
