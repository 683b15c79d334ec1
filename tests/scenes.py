"""Scenes for the storage matrix: images on one storage, a daemon, a guest, and the judge.

qemu-img makes the images and says what they read as. `Scene.oracle` is that, and every byte that
the guest has written since. `live` compares it with what the export shows to nbdcopy. `at_rest`
compares it with what qemu-img and we read after the daemon has ended and the page cache was
dropped, and lets `qemu-img check` look at each image.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import random
import re
import shutil
import signal
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chains import contents, differs
from cowferry.block import moves
from cowferry.block.disk import Disk
from cowferry.block.node import chain
from cowferry.cli import main
from cowferry.cli.signals import ENDING
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from cowferry.monitor import qmp
from daemons import Told
from storages import FILLING, Devices, Storage, up

SIZE = 4 << 20
SECTOR = 512
NO_ROOM = (errno.ENOSPC, errno.EFBIG)
FORMATS = ("raw", "qcow2", "data", "qed")  # "data" is qcow2 with an external data file


class Failed(Exception):
    """A verb of the command line ended with an error; its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"exit {status}: {text}")
        self.status = status
        self.text = text


def cowferry(*arguments: object) -> str:
    """Run the command line in this process; what it prints. Raises `Failed`."""
    out, err = io.StringIO(), io.StringIO()
    with handlers_kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    assert "Traceback" not in err.getvalue(), err.getvalue()
    if status:
        raise Failed(status, out.getvalue() + err.getvalue())
    return out.getvalue()


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Undo what the command line does to this process's signals."""
    numbers = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def qemu(*command: object) -> str:
    """Run a program of QEMU's or libnbd's that has to succeed; what it prints.

    A limit on the size of files is ours, and not the judge's."""
    words = ["prlimit", "--fsize=unlimited", *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


class Image(NamedTuple):
    """An image of a scene: where it is, and as what it is opened."""

    path: str
    format: str  # as -f takes it
    kind: str  # one of FORMATS


# What qemu-img makes ------------------------------------------------------------------------


def flat(seed: int) -> bytearray:
    """SIZE bytes: random ones, zeroes, and the end of the disk in use."""
    rnd = random.Random(seed)
    out = bytearray(SIZE)
    for start, length in ((0, 1 << 20), (1664 << 10, 700_000), (SIZE - 70_000, 70_000)):
        out[start : start + length] = rnd.randbytes(length)
    return out


def write_sparse(path: str | Path, data: bytes | bytearray) -> None:
    """Write a file that has holes where `data` is zero."""
    step = 64 << 10
    with open(path, "wb") as f:
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            if any(piece):
                f.seek(at)
                f.write(piece)
        f.truncate(len(data))


@functools.cache
def needed(kind: str, size: int, options: str) -> int:
    """The bytes that the file of a fully allocated image takes, as QEMU lays it out."""
    if kind == "raw":
        return size
    if kind == "qed":
        table = 4 * (64 << 10)
        return (64 << 10) + table + table * -(-size // (2 << 30)) + up(size, 64 << 10)
    more = ["-o", options] if options else []
    told = qemu("qemu-img", "measure", "-O", "qcow2", *more, "--size", size)
    found = re.search(r"fully allocated size: (\d+)", told)
    assert found, told
    whole = int(found[1])
    return whole - up(size, 64 << 10) if kind == "data" else whole


# The scene ----------------------------------------------------------------------------------


class Scene:
    """One test's images on a storage, and a daemon in this process. Close it at the end."""

    def __init__(
        self, storage: Storage, kind: str, folder: Path, seed: str, options: str = ""
    ) -> None:
        """`folder` is for what lies elsewhere: sockets, sources, what programs print.

        `options` are those with which images of the scene's own kind are made (-o)."""
        self.storage = storage
        self.kind = kind
        self.folder = folder
        self.rnd = random.Random(zlib.crc32(seed.encode()))
        self.options = options
        self.oracle = bytearray(SIZE)
        self.served: Image | None = None  # the image by whose name the disk vm was opened
        self.others: dict[Image, bytes] = {}  # further images, and what they must read as
        self.beside: dict[str, str] = {}  # the external data file of an image, by its path
        self.alone: dict[str, str] = {}  # of these the data file reads right by itself
        self.kept: set[str] = set()  # files that an operation may leave although it has failed
        self.refusals = 0  # requests of the guest for which there was no room
        self.bitmap_bytes = 0  # room in an image for bitmaps
        self.daemon: Daemon | None = None
        self.relieved = not storage.scarce
        self._numbers = 0

    def close(self) -> None:
        """End the daemon, whatever state it is in."""
        self.storage.relieve()
        self.end()

    # Images --------------------------------------------------------------------------------

    def place(self, name: str, kind: str | None = None, now: int = 0) -> str:
        """A path for a new image, which takes `now` bytes at first."""
        kind = kind or self.kind
        full = needed(kind, len(self.oracle), self.options if kind == self.kind else "")
        if kind != "raw":
            full += self.bitmap_bytes
        self._numbers += 1
        return self.storage.place(f"{name}{self._numbers}.{kind}", now, full)

    def image(self, name: str, kind: str | None = None, over: Image | None = None) -> Image:
        """A new image made by qemu-img, with bytes of its own in it. The oracle is what it reads
        as from now on.

        The overlay of a raw disk is a raw image that is being filled, which only we can make."""
        kind = kind or self.kind
        if over is not None:
            return self._overlay(name, kind, over)
        self.oracle = flat(zlib.crc32(name.encode()))
        made = self.load(name, kind, self.oracle)
        if kind == "raw" and isinstance(self.storage, Devices):  # all of the device is the disk
            rest = self.storage.made[made.path].size - SIZE
            self.oracle += bytes([FILLING]) * rest
        return made

    def load(self, name: str, kind: str, data: bytes | bytearray) -> Image:
        """A new image that reads as `data`, made by qemu-img."""
        source = self.folder / f"{name}.flat"
        write_sparse(source, data)
        if kind == "raw":
            path = self.place(name, kind, SIZE)
            if isinstance(self.storage, Devices):
                with open(path, "r+b") as f:
                    f.write(data)
            else:
                write_sparse(path, data)
            return Image(path, "raw", kind)
        format = "qed" if kind == "qed" else "qcow2"
        options = self.options if kind == self.kind else ""
        if kind == "data":
            beside = self.place(f"{name}-data", "raw", SIZE)
            path = self.place(name, kind, needed("data", SIZE, options))
            self.beside[path] = self.alone[path] = beside
            given = f"data_file={beside},data_file_raw=on" + (f",{options}" if options else "")
            qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", given, path, SIZE)
            qemu("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", source, path)
            return Image(path, "qcow2", kind)
        given = f"-o{options}" if options else "-q"
        made = self.folder / f"{name}.made"
        qemu("qemu-img", "convert", given, "-f", "raw", "-O", format, source, made)
        return self._put(made, name, kind, format)

    def _put(self, made: Path, name: str, kind: str, format: str) -> Image:
        """Move an image that was made elsewhere to its place."""
        path = self.place(name, kind, up(made.stat().st_size, 64 << 10))
        with open(path, "r+b" if os.path.exists(path) else "wb") as f, open(made, "rb") as source:
            shutil.copyfileobj(source, f)
        made.unlink()
        return Image(path, format, kind)

    def _overlay(self, name: str, kind: str, over: Image) -> Image:
        below = {"backing_file": over.path, "backing_fmt": over.format}
        format = "raw" if kind == "raw" else "qed" if kind == "qed" else "qcow2"
        pieces = self._pieces()
        if kind == "raw":
            path = self.place(name, kind, len(self.oracle))
            opening.create_image(path, "raw", len(self.oracle), below)
            node = opening.open_image(path, "raw")
            for offset, data in pieces:
                node.pwrite(memoryview(data), offset)
            opening.close_chain(node)
        else:
            options = self.options if kind == self.kind else ""
            given = [f"{key}={value}" for key, value in below.items()] + [o for o in [options] if o]
            if kind == "data":
                beside = self.place(f"{name}-data", "raw", len(self.oracle))
                given.append(f"data_file={beside}")
                made = Path(self.place(name, kind, needed("data", len(self.oracle), options)))
            else:
                made = self.folder / f"{name}.made"
            qemu(
                "qemu-img",
                "create",
                "-q",
                "-f",
                format,
                "-o",
                ",".join(given),
                made,
                len(self.oracle),
            )
            commands: list[str] = []
            for n, (offset, data) in enumerate(pieces):
                file = self.folder / f"piece{n}"
                file.write_bytes(data)
                commands += ["-c", f"write -s {file} {offset} {len(data)}"]
            qemu("qemu-io", "-f", format, *commands, made)
            path = str(made) if kind == "data" else self._put(made, name, kind, format).path
        if kind == "raw" and isinstance(self.storage, Devices):  # all of the device is the disk
            self.oracle += bytes(self.storage.made[path].size - len(self.oracle))
        for offset, data in pieces:
            self.oracle[offset : offset + len(data)] = data
        return Image(path, format, kind)

    def _pieces(self) -> list[tuple[int, bytes]]:
        """What an overlay holds: (offset, bytes)."""
        return [
            (300_032, self.rnd.randbytes(130_560)),
            (1_200_128, self.rnd.randbytes(65_536)),
            (3 << 20, bytes(1 << 17)),
        ]

    # The daemon ----------------------------------------------------------------------------

    @property
    def disk(self) -> Disk:
        """The disk `vm` of the daemon that runs."""
        assert self.daemon is not None
        return self.daemon.graph.disk("vm")

    @property
    def uri(self) -> str:
        """Where the guest of `vm` connects to."""
        return f"nbd+unix:///vm?socket={self.folder / 'nbd.sock'}"

    def serve(self, image: Image) -> None:
        """Start a daemon with the disk `vm` in that image, or where that has moved."""
        self.served = image
        self.daemon = Daemon()
        self._server = qmp.server(self.daemon)
        self._server.listen_unix(str(self.folder / "qmp.sock"))
        self.told = Told(self.daemon)
        self.daemon.start_nbd({"type": "unix", "path": str(self.folder / "nbd.sock")})
        self.daemon.add_export(self.daemon.open_disk("vm", image.path, image.format), "vm")

    def end(self) -> None:
        """End the daemon, if one runs."""
        if self.daemon is not None:
            daemon, self.daemon = self.daemon, None
            self._server.stop_listening()
            try:
                daemon.close()
            finally:
                self._server.stop()

    def verb(self, *arguments: object) -> str:
        """Run a live verb against the daemon. Raises `Failed`."""
        return cowferry(*arguments, "-c", self.folder / "qmp.sock")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command. Raises `CowferryError`."""
        assert self.daemon is not None
        plain = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
        return self.daemon.execute(command, plain)

    def over(self, job: str) -> None:
        """Wait until a job is gone. Raises `Failed` if it failed."""
        data = self.told.wait("BLOCK_JOB_COMPLETED", device=job)
        self.told.wait("JOB_STATUS_CHANGE", id=job, status="null")
        if "error" in data:
            raise Failed(1, data["error"])

    # The guest -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def guest(self) -> Iterator[NbdClient]:
        """A client of the disk `vm`."""
        with NbdClient(self.uri) as client:
            yield client

    def write(self, client: NbdClient, offset: int, data: bytes) -> None:
        """The guest writes. Raises `OSError` if the disk refuses: each sector is old or new."""
        self.change(client, offset, data, lambda: client.pwrite(data, offset))

    def change(
        self, client: NbdClient, offset: int, data: bytes, request: Callable[[], None]
    ) -> None:
        """A request after which the range reads as `data`. What it leaves if it fails is read."""
        end = offset + len(data)
        try:
            request()
        except OSError:
            self.settle(client, offset, data)
            raise
        self.oracle[offset:end] = data

    def settle(self, client: NbdClient, offset: int, data: bytes | bytearray) -> None:
        """Read what a range holds of which each sector may read as before, or as `data`."""
        start, end = offset // SECTOR * SECTOR, up(offset + len(data), SECTOR)
        old = self.oracle[start:end]
        new = bytearray(old)
        new[offset - start : offset - start + len(data)] = data
        got = client.pread(end - start, start)
        for at in range(0, len(got), SECTOR):
            sector = got[at : at + SECTOR]
            assert sector in (old[at : at + SECTOR], new[at : at + SECTOR]), (
                f"the sector at {start + at} is neither as before nor as it was written"
            )
        self.oracle[start:end] = got

    def scribble(self, client: NbdClient, count: int = 12) -> None:
        """The guest writes here and there, aligned and not, and flushes. What does not fit fails,
        which is an error of the disk once there is room."""
        for _ in range(count):
            length = self.rnd.choice([512, 4096, 5000, 65_536, 100_000])
            offset = self.rnd.randrange(len(self.oracle) - length)
            with self.tolerated():
                self.write(client, offset, self.rnd.randbytes(length))
        self.flush(client)

    def flush(self, client: NbdClient) -> None:
        """The guest flushes, which has to succeed: what was answered has its room."""
        try:
            client.flush()
        except OSError as error:
            raise AssertionError(f"a flush failed: {error}") from error

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """Storage that is full is no surprise, until it is relieved."""
        try:
            yield
        except OSError as error:
            if self.relieved or error.errno not in NO_ROOM:
                raise
            self.refusals += 1

    # The judge -----------------------------------------------------------------------------

    def live(self) -> None:
        """nbdcopy reads from the export what the oracle says."""
        if self.daemon is None:
            return
        got = self.folder / "live.flat"
        qemu("nbdcopy", self.uri, got)
        wrong = differs(got.read_bytes(), self.oracle)
        assert not wrong, f"the running disk: {wrong}"
        got.unlink()

    def at_rest(self) -> None:
        """End the daemon; then the disk, by its first name, and all other images read right.

        Bitmaps may be left as by a crash if there is no room to write them: they still say all."""
        images = dict(self.others)
        if self.served is not None:
            if self.daemon is not None:
                with self.guest() as client:
                    self.flush(client)
            try:
                self.end()
            except OSError as error:
                if self.relieved or "left as by a crash" not in str(error):
                    raise
            now, format = opening.current_image(self.served.path, self.served.format)
            images[Image(now, format or self.served.format, "")] = bytes(self.oracle)
        for image, data in images.items():
            self.judge(image, data)

    def judge(self, image: Image, data: bytes | bytearray) -> None:
        """An image that nobody has open reads as `data`, to us and to qemu-img, and is in order."""
        filling = image.format == "raw" and os.path.exists(image.path + ".filling")
        for node in opened_chain(image):
            self.storage.drop_cache(node)
        self.read_by_us(image, data)
        if image.format == "raw" and (filling or self.in_state(image.path, "filling")):
            return  # qemu-img does not know what is missing
        theirs = self.folder / "theirs.flat"
        convert = ("qemu-img", "convert", "-f", image.format, "-O", "raw", image.path, theirs)
        qemu(*convert)
        wrong = differs(theirs.read_bytes()[: len(data)], data)
        assert not wrong, f"'{image.path}' as qemu-img reads it: {wrong}"
        theirs.unlink()
        if image.path in self.alone:
            self.storage.drop_cache(self.alone[image.path])
            wrong = differs(Path(self.alone[image.path]).read_bytes()[: len(data)], data)
            assert not wrong, f"the data file of '{image.path}': {wrong}"
        if image.format != "raw":
            qemu("qemu-img", "check", "-q", "-f", image.format, image.path)

    def in_state(self, path: str, suffix: str) -> bool:
        """Whether the state folder has a record of that kind about a device."""
        return os.path.exists(moves.place(path, "." + suffix))

    def read_by_us(self, image: Image, data: bytes | bytearray) -> None:
        """We read an image from cold as `data`."""
        node = opening.open_image(image.path, image.format, read_only=True)
        try:
            got = contents(node)[: len(data)]
        finally:
            opening.close_chain(node)
        wrong = differs(got, data)
        assert not wrong, f"'{image.path}' as we read it: {wrong}"


def opened_chain(image: Image) -> list[str]:
    """The files of an image and of all that is below it."""
    top = opening.open_image(image.path, image.format, read_only=True)
    try:
        return [n.filename for n in chain(top)]
    finally:
        opening.close_chain(top)


def refused(error: BaseException) -> bool:
    """Whether an error says that there is no room."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    text = error.text if isinstance(error, Failed) else str(error)
    return isinstance(error, (Failed, CowferryError)) and any(
        word in text
        for word in (
            "No space left",
            "too large",
            "too small",
            "smaller than",
            "is full",
            "do not fit",
            " needs ",
        )
    )
