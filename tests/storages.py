"""Storages of every kind for tests: folders on file systems, and block devices.

A `Storage` says where the images of one test lie. There are two kinds. A `Folder` lies on a file
system: a mounted one, or the one under the tests with a limit on the size of files. `Devices`
makes a loop device for each image. Both can be short of room, and both can be relieved later.

Nothing outlives the test process, however it ends. A loop device is opened with autoclear, so the
kernel detaches it when its last descriptor is closed. A janitor process unmounts what this process
has mounted, and removes the files below it, when the pipe between the two breaks.

Making devices and mounting file systems needs root; `Mounts` and `Loop` skip the test otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests_support import need, unavailable

FILLING = 0xAA  # the byte that a new device is full of: what reads as zero was really zeroed
CLUSTER = 64 << 10

LOOP_SET_CAPACITY = 0x4C07
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_AUTOCLEAR = 4
BLKFLSBUF = 0x1261
# struct loop_config: fd, block size, then struct loop_info64 whose only set field is lo_flags.
LOOP_CONFIG = struct.Struct("=II 52x I 176x 64x")


# Block devices ------------------------------------------------------------------------------


class Loop:
    """A loop device over a file of its own, full of 0xaa."""

    def __init__(self, file: Path, size: int, sector: int) -> None:
        """Attach a device of `size` bytes, rounded up to `sector`, over the new file `file`."""
        self.sector = sector
        self.size = up(size, sector)
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._fill(0)
        try:
            self.path, self._fd = self._attach()
        except OSError as error:
            os.close(self._file)
            unavailable(f"no loop device: {error}")

    def _attach(self) -> tuple[str, int]:
        config = LOOP_CONFIG.pack(self._file, self.sector, LO_FLAGS_AUTOCLEAR)
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            while True:
                path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, LOOP_CONFIGURE, config)
                except OSError as error:
                    os.close(fd)
                    if error.errno != errno.EBUSY:  # EBUSY: another process took that one
                        raise
                else:
                    return path, fd
        finally:
            os.close(control)

    def _fill(self, start: int) -> None:
        piece = bytes([FILLING]) * min(1 << 20, self.size)
        for at in range(start, self.size, len(piece)):
            os.pwrite(self._file, piece[: self.size - at], at)

    def grow(self, size: int) -> None:
        """Make the device larger while it is open, as `losetup -c` after `truncate` does."""
        before, self.size = self.size, max(self.size, up(size, self.sector))
        self._fill(before)
        fcntl.ioctl(self._fd, LOOP_SET_CAPACITY)

    def drop_cache(self) -> None:
        """Write dirty pages out and drop all pages of the device from the page cache."""
        os.fsync(self._fd)
        fcntl.ioctl(self._fd, BLKFLSBUF)

    def close(self) -> None:
        """Detach the device once its last user has closed it."""
        os.close(self._fd)
        os.close(self._file)


# File systems -------------------------------------------------------------------------------


class FileSystem:
    """A mounted file system, and the ballast that fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, room: int = 0) -> None:
        """Take all space but `room` bytes, so that the next write finds no more than that."""
        piece = 1 << 40
        with open(self._ballast, "ab", buffering=0) as f:
            while piece >= 4096:
                end = f.seek(0, os.SEEK_END)
                with contextlib.suppress(OSError):
                    os.posix_fallocate(f.fileno(), end, piece)
                    continue
                f.truncate(end)  # a failed call may leave a part
                piece //= 2
            f.truncate(max(f.seek(0, os.SEEK_END) - room, 0))
            os.fsync(f.fileno())

    def empty(self) -> None:
        """Throw the ballast out."""
        self._ballast.unlink(missing_ok=True)


class Mounts:
    """File systems of this process, each mounted when it is first asked for, and a folder for the
    files under devices. A context manager; at its end everything is gone."""

    def __init__(self) -> None:
        self._mounted: dict[str, FileSystem] = {}
        # A flush of a device costs milliseconds if its file lies on a disk, and nothing in memory.
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="cowferry-storages-", dir=shm))
        # Not below /dev, where an image counts as a device and has its records elsewhere.
        self._points = Path(tempfile.mkdtemp(prefix="cowferry-mounts-"))
        script = 'cat; for p in "$2"/*/; do umount -l "$p" 2>/dev/null; done; rm -rf "$1" "$2"'
        self._janitor = subprocess.Popen(
            ["sh", "-c", script, "sh", self.folder, self._points],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Mounts:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        self._janitor.wait(30)

    def get(self, kind: str) -> FileSystem:
        """The file system of that kind. Skips the test if it cannot be mounted here."""
        if kind not in self._mounted:
            self._mounted[kind] = self._mount(kind)
        return self._mounted[kind]

    def _mount(self, kind: str) -> FileSystem:
        need("mount", *([] if kind == "tmpfs" else [f"mkfs.{kind}"]))
        if os.geteuid() != 0:
            unavailable("mounting needs root")
        path = self._points / kind
        path.mkdir(exist_ok=True)
        if kind == "tmpfs":
            what = ["-t", "tmpfs", "-o", "size=24m,huge=never", "none"]
        else:
            size, options = {
                "ext4": (64 << 20, ["-q", "-m", "0", "-F"]),
                "xfs": (300 << 20, ["-q", "-m", "reflink=1"]),  # mkfs.xfs makes no smaller one
            }[kind]
            image = self.folder / f"{kind}.img"
            with open(image, "wb") as f:
                f.truncate(size)
            subprocess.run([f"mkfs.{kind}", *options, image], check=True, timeout=60)
            what = ["-o", "loop", str(image)]
        done = subprocess.run(["mount", *what, path], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            unavailable(f"cannot mount {kind}: {done.stderr.strip()}")
        return FileSystem(path)


# Storages -----------------------------------------------------------------------------------


class Storage:
    """Where the images of one test lie. A context manager; at its end everything is gone.

    `scarce` says that `squeeze` will leave too little room for what the test wants to do."""

    scarce = False

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def place(self, name: str, now: int, full: int) -> str:
        """Return the path of a new file that does not exist, or of a new device.

        The image there takes `now` bytes at first, and `full` once it is fully allocated."""
        raise NotImplementedError

    def squeeze(self) -> None:
        """From now on storage is as scarce as it is going to be."""

    def relieve(self) -> None:
        """There is room again. Images may be open."""

    def drop_cache(self, path: str) -> None:
        """The next read of `path` comes from the storage, if it has a page cache of its own."""
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def names(self) -> set[str]:
        """The files that are there."""
        return set()

    def close(self) -> None:
        """Remove everything."""


class Folder(Storage):
    """A new folder on a file system. `room` is how many bytes `squeeze` leaves, None for all."""

    def __init__(self, system: FileSystem, room: int | None = None) -> None:
        self.system = system
        self.room = room
        self.scarce = room is not None
        self.path = Path(tempfile.mkdtemp(dir=system.path))

    def place(self, name: str, now: int, full: int) -> str:
        return str(self.path / name)

    def squeeze(self) -> None:
        if self.room is not None:
            self.system.fill(self.room)

    def relieve(self) -> None:
        self.system.empty()

    def names(self) -> set[str]:
        return {str(p) for p in self.path.rglob("*")}

    def close(self) -> None:
        self.system.empty()
        shutil.rmtree(self.path)


class Limited(Folder):
    """A folder where no file may grow beyond what the largest has, and `room` bytes.

    The limit is this process's (RLIMIT_FSIZE): programs that are started meanwhile have it, too."""

    def __init__(self, path: Path, room: int) -> None:
        super().__init__(FileSystem(path), room)

    def squeeze(self) -> None:
        largest = max((os.path.getsize(p) for p in self.names()), default=0)
        assert self.room is not None
        _limit(largest + self.room)

    def relieve(self) -> None:
        _limit(resource.RLIM_INFINITY)

    def close(self) -> None:
        self.relieve()
        super().close()


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


Fit = Callable[[int, int], int]  # (bytes used at first, bytes used at most) -> size of the device

FITS: dict[str, Fit] = {
    "exact": lambda now, full: full,
    "larger": lambda now, full: full * 3 // 2 + 3 * 4096,
    "full": lambda now, full: now,
    "fills": lambda now, full: now + (full - now) // 2,
}


class Devices(Storage):
    """A loop device of its own for each image."""

    def __init__(self, folder: Path, sector: int, fit: str) -> None:
        """`folder` is for the files under the devices."""
        self.sector = sector
        self.fit = fit
        self.scarce = fit in ("full", "fills")
        self.made: dict[str, Loop] = {}
        self._full: dict[str, int] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="devices-", dir=folder))

    def place(self, name: str, now: int, full: int) -> str:
        size = max(FITS[self.fit](now, full), self.sector)
        loop = Loop(self._folder / str(len(self.made)), size, self.sector)
        self.made[loop.path] = loop
        self._full[loop.path] = full
        return loop.path

    def relieve(self) -> None:
        for path, loop in self.made.items():
            loop.grow(self._full[path])

    def drop_cache(self, path: str) -> None:
        if path in self.made:
            self.made[path].drop_cache()
        else:
            super().drop_cache(path)

    def close(self) -> None:
        for loop in self.made.values():
            loop.close()
        shutil.rmtree(self._folder)


def up(size: int, unit: int) -> int:
    """Round `size` up to a multiple of `unit`."""
    return -(-size // unit) * unit


# The kinds, by name -------------------------------------------------------------------------

ROOM = 640 << 10  # bytes that are left where storage "fills": some of what each operation needs

AMPLE = (
    "ext4", "xfs", "tmpfs",
    "loop512-exact", "loop512-larger", "loop4096-exact", "loop4096-larger",
)  # fmt: skip
SCARCE = (
    *(f"{kind}-{how}" for kind in ("ext4", "xfs", "tmpfs", "rlimit") for how in ("full", "fills")),
    *(f"loop{sector}-{how}" for sector in (512, 4096) for how in ("full", "fills")),
)


@contextlib.contextmanager
def storage(name: str, mounts: Mounts, folder: Path) -> Iterator[Storage]:
    """The storage of that name; `folder` is for what needs no mount."""
    kind, _, how = name.partition("-")
    room = {"": None, "full": 0, "fills": ROOM}.get(how)
    made: Storage
    if kind.startswith("loop"):
        made = Devices(mounts.folder, int(kind[4:]), how)
    elif kind == "rlimit":
        assert room is not None
        made = Limited(folder, room)
    else:
        made = Folder(mounts.get(kind), room)
    with made:
        yield made
