"""A disk that is killed again and again: its daemon, its guest, and what must be found after each.

`Rig` is a guest with one or two disks. `round` starts a daemon by the names that the disks had at
first, puts a guest to work, brings an operation into a state, kills the daemon with SIGKILL and
looks at what is on disk: which image is current, is it sound, are its bytes what the guest may
have written. Nothing is remembered from one round to the next but the names and the bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chains import contents, make_base
from cowferry.block.node import chain
from cowferry.cli.client import Client
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from nursery import Nursery
from test_kill import Sectors
from tests_support import need

KILLS = 10 if os.environ.get("COWFERRY_SOAK") is None else 200  # in each state
SIZE = 4 << 20
SECTOR = 512
PATIENCE = 60.0
SLOW = 64 << 10  # bytes a second: a job at this speed is running for as long as we need


class Guest:
    """Writes and flushes to one disk until its server is gone."""

    def __init__(self, uri: str, sectors: Sectors, seed: int) -> None:
        self.client = NbdClient(uri)
        self.sectors = sectors
        self.rnd = random.Random(seed)
        self.written = 0
        self.wrote = threading.Condition()
        self.thread = threading.Thread(target=self._write)
        self.thread.start()

    def _write(self) -> None:
        rnd = self.rnd
        try:
            while True:
                data = rnd.randbytes(SECTOR * rnd.choice([1, 8, 8, 33, 130]))
                offset = rnd.randrange((self.client.size - len(data)) // SECTOR) * SECTOR
                self.sectors.write(offset, data)
                self.client.pwrite(data, offset)
                if rnd.random() < 0.2:
                    self.client.flush()
                    self.sectors.flushed()
                with self.wrote:
                    self.written += 1
                    self.wrote.notify_all()
                time.sleep(0.001)  # a guest thinks, too, and there are other tests
        except (OSError, EOFError):
            return

    def until(self, more: int) -> None:
        """That many more requests are answered."""
        with self.wrote:
            goal = self.written + more
            assert self.wrote.wait_for(lambda: self.written >= goal, PATIENCE), "the guest hangs"

    def over(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.client.abort()


class Drive:
    """A disk: the name it had first, where it was found last, and what it may hold."""

    def __init__(self, original: Path) -> None:
        self.original = original
        node = opening.open_image(str(original), read_only=True)
        self.sectors = Sectors(contents(node))
        opening.close_chain(node)
        self.at = str(original)
        self.chain = [self.at]


class Talk:
    """QMP with a daemon that is about to die, and what it told."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.told: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, command: str, **arguments: Any) -> Any:
        return self.client.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def send(self, command: str, **arguments: Any) -> None:
        """And do not wait for the answer."""
        plain = {k.replace("_", "-"): v for k, v in arguments.items()}
        message = {"execute": command, "arguments": plain, "id": "last"}
        self.client.sock.sendall(json.dumps(message).encode() + b"\n")

    def answer(self) -> None:
        """Of what was sent: a return."""
        while True:
            answer = self.client._message(None)
            assert answer is not None
            if "event" not in answer:
                assert "return" in answer, answer
                return

    def until(self, name: str, **members: Any) -> dict[str, Any]:
        """The next event of that name; a job that fails meanwhile is no success."""
        for event in self.client.wait_events(PATIENCE):
            data = event["data"]
            self.told.append((event["event"], data))
            assert "error" not in data, event
            if event["event"] == name and members.items() <= data.items():
                return dict(data)
        raise AssertionError(f"no {name} {members} came")

    def state(self, status: str, id: str = "vm") -> None:
        """The job gets into a state."""
        self.until("JOB_STATUS_CHANGE", id=id, status=status)

    def heard(self, name: str) -> bool:
        """Whether an event came before the end, as far as it had been sent."""
        try:
            for event in self.client.wait_events(0.01):
                self.told.append((event["event"], event["data"]))
        except (CowferryError, OSError):
            pass
        return any(n == name and "error" not in d for n, d in self.told)


Act = Callable[[Talk], None]
State = Callable[[Any, Talk], None]  # brings an operation there
Kind = Callable[["Rig"], Any]  # an operation


class Rig:
    """Disks that are killed. Used by one thread; a context manager."""

    def __init__(self, nursery: Nursery, folder: Path, seed: int) -> None:
        self.nursery = nursery
        self.folder = folder
        self.rnd = random.Random(seed)
        self.drives: dict[str, Drive] = {}
        self.guests: list[Guest] = []
        self.checked: dict[str, tuple[int, int]] = {}
        self.completed = False  # in the last round, whoever asked was told of success
        self.run = Path(tempfile.mkdtemp(prefix="cf-"))  # a short name, for sockets

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.run)

    def add(self, name: str, original: Path) -> None:
        """A disk, by the image that it is in at first."""
        self.drives[name] = Drive(original)

    def round(self, act: Act) -> bool:
        """One life and its end; whether the disks have moved in it."""
        names = {name: drive.original for name, drive in self.drives.items()}
        child = self.nursery.serve(self.run, **names)
        talk = Talk(child.qmp)
        self.guests = []
        try:
            for name, drive in self.drives.items():
                with NbdClient(child.uris[name]) as client:
                    assert client.pread(SIZE, 0) == drive.sectors.flat, "the wrong bytes are served"
                seed = self.rnd.randrange(1 << 30)
                self.guests.append(Guest(child.uris[name], drive.sectors, seed))
            self.work(3)
            act(talk)
        finally:
            child.kill()
            for guest in self.guests:
                guest.over()
        self.completed = talk.heard("BLOCK_JOB_COMPLETED")
        child.qmp.close()
        moved = self.look()
        assert moved in (set(), set(self.drives)), f"of the group only {moved} moved"
        return bool(moved)

    def work(self, most: int = 12) -> None:
        """Let the guests have a random number of requests answered."""
        for guest in self.guests:
            guest.until(self.rnd.randint(1, most))

    def snapshot(self, talk: Talk, name: str) -> None:
        """Another layer. Once that is answered, it is where the disk is."""
        path = self.file(name)
        talk("blockdev-snapshot-sync", device=name, snapshot_file=str(path))
        drive = self.drives[name]
        drive.at = str(path)
        drive.chain.insert(0, drive.at)

    def look(self) -> set[str]:
        """What is on disk, and nothing else, says which image is current; it is sound."""
        moved = set()
        for name, drive in self.drives.items():
            path, format = opening.current_image(str(drive.original))
            node = opening.open_image(path, format, read_only=True)
            try:
                wrong = drive.sectors.adopt(contents(node))
                assert not wrong, f"{name} in '{path}': {wrong}"
                images = [n.filename for n in chain(node)]
                formats = {n.filename: n.driver for n in chain(node)}
            finally:
                opening.close_chain(node)
            for image in images:
                if formats[image] == "qcow2":
                    self.check(image)
            if path != drive.at:
                moved.add(name)
            drive.at, drive.chain = path, images
        self.tidy()
        return moved

    def check(self, image: str) -> None:
        """By qemu-img, unless nothing was written there since the last time."""
        st = os.stat(image)
        now = (st.st_ino, st.st_mtime_ns)
        if self.checked.get(image) != now:
            done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True)
            assert done.returncode in (0, 3), done.stdout + done.stderr
            self.checked[image] = now

    def tidy(self) -> None:
        """An administrator removes images that no disk needs any more; records stay."""
        needed = {image for drive in self.drives.values() for image in drive.chain}
        for path in self.folder.iterdir():
            if path.suffix in (".qcow2", ".raw") and str(path) not in needed:
                path.unlink()

    def file(self, label: str, format: str = "qcow2") -> Path:
        """A file for a new image; the names come round again."""
        for number in range(100):
            path = self.folder / f"{label}-{number}.{format}"
            if not path.exists():
                return path
        raise AssertionError("nobody tidies up")

    def moment(self, seconds: float) -> None:
        """A random one."""
        time.sleep(self.rnd.uniform(0, seconds))


def a_disk(folder: Path, name: str) -> Path:
    """A qcow2 image of known bytes, without a backing file."""
    make_base(folder, SIZE, seed=len(name))
    path = folder / f"{name}.qcow2"
    opening.create_image(str(path), "qcow2", SIZE, {})
    node = opening.open_image(str(path))
    node.pwrite(memoryview((folder / "base.raw").read_bytes()), 0)
    opening.close_chain(node)
    (folder / "base.raw").unlink()
    return path


def each_state(
    folder: Path,
    names: tuple[str, ...],
    kind: Kind,
    states: Sequence[State],
    last: State,
    moved: Mapping[State, bool | None],
) -> dict[str, set[bool]]:
    """Kill in each state, two guests at a time, and in the end let the operation complete.

    `moved` says of a state whether the disks are in their new images then (None: either), if it
    is an operation that moves them. Returns what was found."""
    need("qemu-img")
    outcomes: dict[str, set[bool]] = {}

    def life(rig: Rig, op: Any, state: State) -> None:
        def act(talk: Talk) -> None:
            op.prepare(talk)
            state(op, talk)

        found = rig.round(act)
        outcomes.setdefault(state.__name__, set()).add(found)
        expected = moved.get(state, False) if op.moves else False
        assert expected in (found, None), f"{state.__name__}: moved: {found}"
        if rig.completed and (expected is not False or not op.moves):
            op.check()

    def work(share: int, mine: Sequence[State]) -> None:
        place = folder / str(share)
        place.mkdir()
        with Rig(nursery, place, share) as rig:
            for name in names:
                rig.add(name, a_disk(place, name))
            op = kind(rig)
            for _ in range(KILLS):
                for state in mine:
                    life(rig, op, state)
            life(rig, op, last)

    with Nursery(folder) as nursery, ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, n, states[n::2]) for n in range(2)]:
            done.result()
    return outcomes
