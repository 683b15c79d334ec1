"""Loop devices, partitions and mounts for tests; all go when the `with` ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests_support import need, unavailable


def ran(*command: str) -> str:
    """What a program prints that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.strip()


@contextmanager
def loop(path: Path | str, *options: str) -> Iterator[str]:
    """A loop device over a file that is there; `options` are losetup's."""
    need("losetup")
    done = subprocess.run(
        ["losetup", "-f", "--show", *options, str(path)], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        unavailable(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        ran("losetup", "-d", device)


@contextmanager
def partition(device: str, number: int, start: int, length: int) -> Iterator[str]:
    """A partition of a device, from byte `start` on."""
    need("addpart", "delpart")
    ran("addpart", device, str(number), str(start // 512), str(length // 512))
    try:
        yield f"{device}p{number}"
    finally:
        ran("delpart", device, str(number))


@contextmanager
def mounted(device: str, folder: Path, kind: str = "ext4") -> Iterator[Path]:
    """A new file system on a device."""
    need(f"mkfs.{kind}", "mount")
    ran(f"mkfs.{kind}", "-q", device)
    folder.mkdir()
    done = subprocess.run(
        ["mount", device, str(folder)], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        unavailable(f"no mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        os.sync()
        ran("umount", str(folder))
