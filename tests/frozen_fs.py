"""A file system of our own that can be frozen: whoever writes there hangs in the kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests_support import need, unavailable

LONGEST = 60  # seconds after which it is thawed, whatever became of the test


class FrozenFs:
    """A mounted ext4."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frozen = False

    def freeze(self) -> None:
        """From now on writes, and whatever makes or removes files, hang."""
        subprocess.run(["fsfreeze", "-f", self.path], check=True)
        self.frozen = True

    def thaw(self) -> None:
        """They go on. May be called again."""
        if self.frozen:
            subprocess.run(["fsfreeze", "-u", self.path], check=False)
            self.frozen = False


@contextmanager
def frozen_fs(folder: Path, size: int = 32 << 20) -> Iterator[FrozenFs]:
    """A file system in `folder`, thawed and unmounted at the end. Skips where we may not mount."""
    need("mkfs.ext4", "fsfreeze", "mount", "umount")
    if os.geteuid():
        unavailable("only root may mount a file system")
    image, point = folder / "fs.img", folder / "mnt"
    point.mkdir()
    with open(image, "wb") as f:
        f.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, point], check=False).returncode:
        unavailable("no file system can be mounted here")
    # Not one of our threads: it has to work even if this process is killed.
    late = f"sleep {LONGEST}; fsfreeze -u '{point}'"
    watchdog = subprocess.Popen(["sh", "-c", late], stderr=subprocess.DEVNULL)
    made = FrozenFs(point)
    try:
        yield made
    finally:
        made.thaw()
        watchdog.kill()
        watchdog.wait()
        subprocess.run(["umount", "-l", point], check=False)
