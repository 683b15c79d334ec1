"""Conversations with a daemon in a process of its own: ours, or qemu-storage-daemon.

Both are started with the same options and are spoken to on a raw socket, so a conversation is a
script that can be held with either. `Talk.story` is the part of what was said that clients rely
on: of each answer whether it is a return or which class of error, of each event its name, of each
change of a job's state the new state, in the order in which they came.
"""

from __future__ import annotations

import functools
import json
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chains import chain_of_disks, contents, differs
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from daemons import PATIENCE, environment

SIZE = 2 << 20
SLOW = 64 << 10  # bytes a second: a job at this speed stays in its state for as long as we need

OURS = (sys.executable, "-m", "cowferry", "serve")
QEMU = ("qemu-storage-daemon",)

KINDS = ("stream", "commit", "active", "mirror")
READIED = ("active", "mirror")  # they become ready, and have to be completed


class Refused(Exception):
    """An error that a daemon answered with."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(f"{error['class']}: {error['desc']}")
        self.klass = error["class"]
        self.desc = error["desc"]
        self.hint = error.get("hint", "")


class Step:
    """A command, its answer, and what each job said until the next command."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.answer = ""
        self.early: list[str] = []  # told before the answer
        self.told: dict[str, list[str]] = {}

    def __str__(self) -> str:
        parts = [f"{self.what}: {self.answer}" if self.answer else self.what]
        return " | ".join(parts + [f"{k} {' '.join(self.told[k])}" for k in sorted(self.told)])

    __repr__ = __str__


class Talk:
    """A QMP client on a raw socket, and everything that it was told, in order."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.text = b""
        self.read = 0  # events that `until` has gone past
        self.events: list[dict[str, Any]] = []
        self.steps: list[Step] = []
        self.greeting = self._next()
        self("qmp_capabilities")
        self.steps.clear()

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a command, `a_b` as `a-b` in its arguments; its result. Raises `Refused`."""
        return self._run(Step(command), arguments)

    def passing(self, fd: int, command: str, **arguments: Any) -> Any:
        """Run a command that a descriptor goes along with."""
        return self._run(Step(command), arguments, [fd])

    def _run(self, step: Step, arguments: Any, fds: Sequence[int] = (), keep: bool = True) -> Any:
        message = {"execute": step.what, "arguments": hyphens(arguments)}
        if keep:
            self.steps.append(step)
        socket.send_fds(self.sock, [json.dumps(message).encode()], fds)
        while "event" in (answer := self._next()):
            self._heard(answer)
        if "error" in answer:
            step.answer = answer["error"]["class"]
            raise Refused(answer["error"])
        step.answer = "return"
        return answer["return"]

    def refusal(self, command: str, **arguments: Any) -> Refused:
        """Run a command that must be refused; its error."""
        try:
            got = self(command, **arguments)
        except Refused as error:
            return error
        raise AssertionError(f"{command} {arguments} was not refused: {got}")

    def until(self, what: str, **members: Any) -> dict[str, Any]:
        """The data of the next event of that name, or (in small letters) of the next change of a
        job to that state; `members` as it must have."""
        end = time.monotonic() + PATIENCE
        while True:
            while self.read < len(self.events):
                event = self.events[self.read]
                self.read += 1
                data: dict[str, Any] = event.get("data", {})
                name = data["status"] if event["event"] == "JOB_STATUS_CHANGE" else event["event"]
                if name == what and all(data.get(k) == v for k, v in members.items()):
                    return data
            assert time.monotonic() < end, f"no {what} {members} in {self.steps}"
            self._heard(self._next(end))

    def job(self, id: str) -> dict[str, Any]:
        """Its entry in query-block-jobs; asking leaves no trace in the transcript."""
        found = self.quietly("query-block-jobs")
        return next((j for j in found if j["device"] == id), {"status": "null"})

    def quietly(self, command: str, **arguments: Any) -> Any:
        """Run a command that leaves no trace in the story."""
        return self._run(Step(command), arguments, keep=False)

    def note(self, fact: str) -> None:
        """Put something that was found out into the story."""
        self.steps.append(Step(fact))

    def story(self) -> list[str]:
        """A line for each command: its answer, and what was told until the next, job by job.

        A job may say more before its command returns, if it is quick, so the answer comes
        first; what jobs say at once has no order among them."""
        return [str(step) for step in self.steps]

    def poll(self, ready: Callable[[], bool], what: str) -> None:
        """Until `ready` says so."""
        end = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < end, f"{what} never came: {self.steps}"
            time.sleep(0.01)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def _heard(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        name, data = event["event"], event.get("data", {})
        told = data["status"] if name == "JOB_STATUS_CHANGE" else name
        if self.steps:
            step = self.steps[-1]
            step.told.setdefault(data.get("device", data.get("id", "")), []).append(told)
            if not step.answer:
                step.early.append(told)

    def _next(self, end: float | None = None) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE if end is None else end
        while b"\n" not in self.text:
            ready = select.select([self.sock], [], [], max(end - time.monotonic(), 0))[0]
            assert ready, f"nothing was said any more after {self.steps}"
            more = self.sock.recv(65536)
            assert more, f"the daemon hung up after {self.steps}"
            self.text += more
        line, _, self.text = self.text.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def hyphens(value: Any) -> Any:
    """With `-` for each `_` in names of members."""
    if isinstance(value, dict):
        return {k.replace("_", "-"): hyphens(v) for k, v in value.items()}
    return [hyphens(v) for v in value] if isinstance(value, list) else value


@contextmanager
def speaking(run: Path, command: tuple[str, ...], **more: Any) -> Iterator[Talk]:
    """The daemon `command` as a process, its monitor in the folder `run`, and a client of it."""
    path = run / "qmp"
    arguments = [
        *command,
        "--chardev", f"socket,id=c,path={path},server=on,wait=off",
        "--monitor", "chardev=c",
    ]  # fmt: skip
    more.setdefault("env", environment(run))
    with open(run / "log", "w+") as log:
        child = subprocess.Popen(arguments, stdout=log, stderr=log, **more)
    try:
        talk = _met(child, path, run / "log")
        try:
            yield talk
        finally:
            talk.close()
        assert child.poll() is None, f"the daemon died:\n{(run / 'log').read_text()}"
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise


def _met(child: subprocess.Popen[bytes], path: Path, log: Path) -> Talk:
    """A client of a daemon that is just starting."""
    end = time.monotonic() + PATIENCE
    while True:
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < end, "the daemon does not listen"
        try:
            return Talk(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)


@functools.cache
def template(size: int) -> tuple[tempfile.TemporaryDirectory[str], bytes]:
    """The images of a scene, made once, and what `vm` reads as."""
    folder = tempfile.TemporaryDirectory()
    oracle = chain_of_disks(Path(folder.name), ["base.raw", "sn1.qcow2", "vm.qcow2"], size)
    return folder, bytes(oracle)


class Scene:
    """A disk `vm` over `sn1` over `base`, a raw node `t` to copy it to, and job `j` on it."""

    def __init__(self, talk: Talk, folder: Path, size: int = SIZE) -> None:
        self.talk = talk
        self.folder = folder
        images, oracle = template(size)
        self.oracle = bytearray(oracle)
        for image in Path(images.name).iterdir():
            shutil.copy(image, folder)
        with open(folder / "t.raw", "wb") as f:
            f.truncate(size)
        base = {"driver": "raw", "node-name": "base", "file": self.file("base.raw")}
        self.add("vm", backing=self.node("sn1", backing=base))
        self.add("t", "raw")

    def file(self, name: str) -> dict[str, str]:
        """The protocol node for a file of the folder."""
        return {"driver": "file", "filename": str(self.folder / name)}

    def node(self, name: str, driver: str = "qcow2", **more: Any) -> dict[str, Any]:
        """What blockdev-add wants for the node `name` over the file of that name."""
        file = self.file(f"{name}.{driver}")
        return {"driver": driver, "node-name": name, "file": file, **more}

    def add(self, name: str, driver: str = "qcow2", **more: Any) -> None:
        """Open such a node."""
        self.talk.quietly("blockdev-add", **self.node(name, driver, **more))

    def create(self, name: str, size: int = SIZE, backing: str | None = None) -> None:
        """A new qcow2 image `name.qcow2`."""
        under = {"backing_file": f"{backing}.qcow2", "backing_fmt": "qcow2"} if backing else {}
        opening.create_image(str(self.folder / f"{name}.qcow2"), "qcow2", size, under)

    def fill(self, name: str) -> None:
        """Write something into `name.qcow2`."""
        node = opening.open_image(str(self.folder / f"{name}.qcow2"))
        node.pwrite(memoryview(name.encode() * 1000), 0)
        opening.close_chain(node)

    def look(self, *names: str) -> None:
        """Note of each node whether it may be written, and what it lies over."""
        nodes = {n["node-name"]: n for n in self.talk.quietly("query-named-block-nodes")}
        for name in names:
            found = nodes.get(name)
            if found is None:
                self.talk.note(f"{name} is gone")
                continue
            # QEMU writes json:{...} where options went beyond the file's name
            below = Path(found.get("backing_file", "nothing")).name.rstrip('"}')
            self.talk.note(f"{name} is {'ro' if found['ro'] else 'rw'} over {below}")

    def start(self, kind: str, **options: Any) -> None:
        """Begin one of `KINDS` as job `j`."""
        given = {"job_id": "j", "device": "vm", **options}
        if kind == "stream":
            self.talk("block-stream", **given)
        elif kind == "commit":
            self.talk("block-commit", top_node="sn1", **given)
        elif kind == "active":
            self.talk("block-commit", base_node="base", **given)
        else:
            self.talk("blockdev-mirror", target="t", sync="full", **given)

    def hold(self, kind: str, state: str) -> None:
        """Begin one of `KINDS`, and have it in that state for as long as nobody asks for more."""
        if state in ("running", "paused"):
            # By default QEMU's mirror takes 16 MiB at a time: all of it, before it looks at the
            # speed, and whatever wakes it up then finds it ready.
            self.start(kind, speed=SLOW, **({"buf_size": 64 << 10} if kind == "mirror" else {}))
        else:
            self.start(kind, auto_finalize=state != "pending", auto_dismiss=state != "concluded")
            if kind in READIED:
                self.talk.until("BLOCK_JOB_READY")
        if state in ("paused", "standby"):
            self.talk("job-pause", id="j")
        if state in ("pending", "concluded") and kind in READIED:
            self.talk("job-complete", id="j")
        if state != "ready":
            self.talk.until("BLOCK_JOB_PENDING" if state == "pending" else state)

    def over(self) -> None:
        """Cancel what runs, close every node: nothing may be in the way."""
        for job in self.talk.quietly("query-jobs"):
            if job["status"] == "concluded":
                self.talk.quietly("job-dismiss", id=job["id"])
            else:
                self.talk.quietly("job-cancel", id=job["id"])
            self.talk.until("null", id=job["id"])
        while names := [n["node-name"] for n in self.talk.quietly("query-named-block-nodes")]:
            before = len(names)
            for name in names:
                with suppress(Refused):
                    self.talk.quietly("blockdev-del", node_name=name)
            left = self.talk.quietly("query-named-block-nodes")
            assert len(left) < before, f"nodes that cannot be closed: {names}"

    @contextmanager
    def guest(self, node: str = "vm") -> Iterator[NbdClient]:
        """Somebody who reads and writes the disk over NBD."""
        path = self.folder / "nbd"
        where = {"type": "unix", "data": {"path": str(path)}}
        self.talk.quietly("nbd-server-start", addr=where)
        self.talk.quietly("block-export-add", type="nbd", id="e", node_name=node, writable=True)
        try:
            with NbdClient(f"nbd+unix:///{node}?socket={path}") as client:
                yield client
        finally:
            self.talk.quietly("nbd-server-stop")

    def holds(self, name: str) -> str:
        """How the image in that file differs from what the disk must read as; empty if not."""
        node = opening.open_image(str(self.folder / name))
        try:
            return differs(contents(node), self.oracle)
        finally:
            opening.close_chain(node)
