"""The ground of the daemon's model: two disks with their guests, how the model asks the daemon for
something, and what has to hold after whatever was done. The rules are in test_model_graph.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cowferry.block import moves
from cowferry.block.held import Held
from cowferry.block.node import Node, chain
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.jobs.backup import Backup
from cowferry.jobs.job import Job
from cowferry.jobs.mirror import Mirror
from cowferry.jobs.states import Status
from modelling import (
    Frozen,
    Guest,
    Layer,
    ReinedJobs,
    Reins,
    chains_of_layers,
    files_of,
    image_bytes,
    make_chain,
    open_files,
    small_steps,
)

MEMORY = "/dev/shm"  # knows neither RWF_NOWAIT nor the zeroing of ranges
which = st.sampled_from("ab")


class Request(NamedTuple):
    """Of a guest: where as a part of the disk, how many bytes, by which way, what."""

    at: float
    length: int
    via: str
    what: str


whats = ["write"] * 5 + ["fua", "zero", "unmap", "trim", "flush", "tick", "nothing"]
requests = st.lists(
    st.builds(
        Request,
        st.floats(0, 1),
        st.sampled_from([1, 511, 512, 513, 4096, 4097, 30_000, 65_536, 150_000]),
        st.sampled_from(["disk", "lane", "lane", "nbd"]),
        st.sampled_from(whats),
    ),
    min_size=2,
    max_size=10,
)


WORKING = (Status.CREATED, Status.RUNNING, Status.PAUSED, Status.READY, Status.STANDBY)


class Running:
    """A job of the model's, and what is to be true when it has ended."""

    def __init__(self, reins: Reins, guest: Guest, done: Callable[[], None], may_fail: bool):
        self.reins = reins
        self.job: Job = reins.job
        self.guest = guest
        self.done = done  # called if it completed
        self.may_fail = may_fail
        self.stale = False  # something was done since its result may have become true
        self.chain = list(chain(guest.root))  # as it was


class Ground(RuleBasedStateMachine):
    """Two disks of one daemon, and their guests."""

    stepped = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path()
        self.daemon = Daemon()
        self.jobs = ReinedJobs(self.daemon, free=not self.stepped)
        self.clean_up = contextlib.ExitStack()
        self.rnd = random.Random(0)
        self.guests: dict[str, Guest] = {}
        self.running: list[Running] = []
        self.ends: dict[str, str | None] = {}  # of each job: "", "cancelled" or its error
        self.frozen: dict[str, Frozen] = {}  # S2: images that nobody may change
        self.locked: set[str] = set()
        self.number = 0
        self.daemon.events.listen(self.hear)

    def hear(self, name: str, data: dict[str, Any]) -> None:
        if name == "BLOCK_JOB_COMPLETED":
            self.ends[data["device"]] = data.get("error", "")
        elif name == "BLOCK_JOB_CANCELLED":
            self.ends[data["device"]] = "cancelled"

    @initialize(
        layers=st.tuples(chains_of_layers, chains_of_layers),
        shared=st.sampled_from([False, False, True]),
        copy_on_read=st.sampled_from([False, False, True]),
        chunk=st.sampled_from([32 << 10, 64 << 10, 128 << 10]),
        nbd=st.booleans(),
        memory=st.sampled_from([True, True, False]),
        seed=st.integers(0, 1 << 20),
    )
    def build(
        self, layers: tuple[list[Layer], list[Layer]], shared: bool, copy_on_read: bool,
        chunk: int, nbd: bool, memory: bool, seed: int,
    ) -> None:  # fmt: skip
        self.rnd = random.Random(seed)
        place = MEMORY if memory and os.path.isdir(MEMORY) else None  # another file system
        self.folder = Path(tempfile.mkdtemp(prefix="graph-", dir=place))
        self.clean_up.callback(shutil.rmtree, self.folder)
        self.clean_up.enter_context(small_steps(chunk, 0.0 if self.stepped else 0.002))
        base: Path | None = None
        if shared:  # a template below both
            base = self.folder / "base.raw"
            base.write_bytes(self.rnd.randbytes(self.rnd.randrange(1, 300_000)))
        for name, specs in zip("ab", layers, strict=True):
            under = base if len(specs) > 1 else None
            path, oracle = make_chain(self.folder, name, specs, self.rnd, under)
            disk = self.daemon.open_disk(name, str(path), copy_on_read=copy_on_read)
            self.guests[name] = Guest(disk, path, oracle)
        if nbd and not self.stepped:
            socket = str(self.folder / "n.sock")
            addr = {"type": "unix", "path": socket}
            self.daemon.execute("nbd-server-start", {"addr": addr})
            for name, guest in self.guests.items():
                export = {"type": "nbd", "id": f"e{name}", "node-name": name, "writable": True}
                self.daemon.execute("block-export-add", export)
                guest.connect(f"nbd+unix:///{name}?socket={socket}")

    # What a guest does -----------------------------------------------------------------------

    @rule(g=which, ops=requests)
    def guest(self, g: str, ops: list[Request]) -> None:
        for op in ops:
            self.request(g, op)

    def request(self, g: str, op: Request) -> None:
        guest = self.guests[g]
        self.touch()
        offset, end = guest.range(op.at, op.length)
        if op.what == "flush":
            guest.disk.flush()
            if not self.running and not guest.burst:
                assert not guest.root.unflushed
        elif op.what == "tick":  # what the daemon does every few seconds
            for disk in self.daemon.graph.all_disks():
                if disk.root.unflushed:
                    disk.flush()
        elif offset == end or op.what == "nothing":
            return
        elif guest.disk.read_only:
            try:
                guest.disk.pwrite(memoryview(b"x"), offset)
            except PermissionError:
                return
            guest.oracle[offset : offset + 1] = b"x"
            moved = not self.stepped and not guest.disk.read_only  # a job has, meanwhile
            assert moved, "a read-only disk was written"
        elif op.what in ("write", "fua"):
            data = self.rnd.randbytes(end - offset)
            guest.write(offset, data, op.via, op.what == "fua")
        elif op.what == "trim":
            guest.trim(offset, end - offset, op.via)
        else:
            guest.zero(offset, end - offset, op.what == "unmap", op.via)

    def touch(self) -> None:
        """Something is about to be done: what a job has brought about may then be otherwise."""
        for running in self.running:
            running.stale = True

    # How the model asks ----------------------------------------------------------------------

    def path(self, name: str) -> Path:
        self.number += 1
        return self.folder / f"{name}{self.number}"

    def picture(self) -> Any:
        """What a refused command leaves as it was."""
        graph = self.daemon.graph
        nodes = {
            n.name: (n.filename, n.read_only, n.backing.name if n.backing else None)
            for n in graph.every_node()
        }
        sizes = [g.disk.size for g in self.guests.values()]
        files = sorted(str(p) for p in self.folder.rglob("*"))
        roots = [g.root.name for g in self.guests.values()]
        held = sorted(h.node.name for h in self.held())
        return nodes, sizes, files, roots, held, [j.id for j in self.daemon.jobs.all()]

    def ask(self, command: str, arguments: dict[str, Any], may: tuple[bool | None, bool]) -> bool:
        """Run a command. Refused, it did nothing, and said `DeviceInUse` if that is the reason."""
        self.touch()
        still = self.stepped or not self.running
        before = self.picture() if still else None
        try:
            self.daemon.execute(command, arguments)
        except CowferryError as error:
            event(f"{command} refused: {type(error).__name__}")
            assert may[0] is not True, f"{command} {arguments}: {error.desc} ({error.hint})"
            if may[1]:
                assert isinstance(error, DeviceInUse), f"{command}: {error.desc}"
            if still:
                now = self.picture()
                assert now == before, f"{command} failed ({error.desc}): {before} -> {now}"
            return False
        event(f"{command} done")
        assert may[0] is not False, f"{command} {arguments} was to be refused"
        return True

    def held(self) -> list[Held]:
        """Every claim."""
        return [held for holders in self.daemon.graph.claims.values() for held in holders]

    def busy(self, *nodes: Node, sharing: bool = False) -> bool:
        """Whether somebody holds one of the nodes, and does not share it if that is asked for."""
        return any(h.node in nodes and not (sharing and h.shared) for h in self.held())

    def may(
        self, g: str, *nodes: Node, bad: bool = False, sharing: bool = False
    ) -> tuple[bool | None, bool]:
        """Whether something may be done to nodes of a disk (None: whichever), and whether it is
        only others who stand against it. `bad`: it is not to be done anyway. `sharing`: it is a
        backup, and goes on beside others."""
        if not self.stepped and self.running:
            return None, False  # whatever is so may be otherwise at any moment
        if bad:
            return False, False
        if g in self.locked or self.busy(*nodes, sharing=sharing):
            return False, True
        others = [r for r in self.working(g) if not (sharing and isinstance(r.job, Backup))]
        return None if others else True, False

    def working(self, g: str) -> list[Running]:
        return [r for r in self.running if r.guest is self.guests[g]]

    def begin(
        self, g: str, command: str, arguments: dict[str, Any], may: tuple[bool | None, bool],
        done: Callable[[Running], None], may_fail: bool = False,
    ) -> bool:  # fmt: skip
        """Start a job, or a group of them."""
        known = len(self.jobs.reins)
        if not self.ask(command, arguments, may):
            del self.jobs.reins[known:]
            return False
        for reins in self.jobs.reins[known:]:
            disk = self.daemon.works_on[reins.job]
            guest = next((x for x in self.guests.values() if x.disk is disk), self.guests[g])
            running = Running(reins, guest, lambda: None, may_fail)
            running.done = lambda r=running: done(r)  # type: ignore[misc]
            self.running.append(running)
            if self.stepped:
                reins.look = self.look
                reins.settle()
        return True

    def thaw(self, *nodes: Node) -> None:
        """An operation may change these images from now on."""
        for node in nodes:
            self.frozen.pop(node.filename, None)
            for guest in self.guests.values():
                guest.left.pop(node.filename, None)

    def freeze(self, node: Node) -> None:
        self.frozen[node.filename] = Frozen(node.filename)

    def options(self, name: str, auto_finalize: bool, **more: Any) -> dict[str, Any]:
        self.number += 1
        return {"job-id": f"j{self.number}", "auto-finalize": auto_finalize, "device": name, **more}

    def odd(self, g: str) -> bool:
        """Such a size a qcow2 image cannot have."""
        return bool(self.guests[g].disk.size % 512)

    def add(self, path: Path, format: str, **more: Any) -> str:
        """blockdev-add; `sweep` takes it away again when nobody uses it."""
        self.number += 1
        name = f"n{self.number}"
        file = {"driver": "file", "filename": str(path)}
        self.daemon.execute(
            "blockdev-add", {"driver": format, "node-name": name, "file": file, **more}
        )
        return name

    def used(self) -> set[int]:
        """The nodes that somebody has a use for."""
        heads = [g.root for g in self.guests.values()] + [h.node for h in self.held()]
        return {id(n) for head in heads for n in chain(head)}

    def sweep(self) -> None:
        """blockdev-del of what was added, and has no use any more."""
        again = True
        while again:
            again = False
            used = self.used()
            for name in sorted(self.daemon.graph.explicit):
                node = self.daemon.graph.nodes[name]
                if id(node) not in used and self.daemon.graph.stranger(node, []) is None:
                    self.daemon.execute("blockdev-del", {"node-name": name})
                    again = True

    def compare(self, node: Node, guest: Guest) -> None:
        """Whoever opens the image now reads what the disk reads."""
        with self.daemon.graph.lock:  # or a job might close one of them meanwhile
            for n in self.daemon.graph.every_node():
                n.flush()
        wrong = guest.same(image_bytes(node.filename, node.driver))
        assert not wrong, f"'{node.filename}': {wrong}"

    # What must hold ----------------------------------------------------------------------------

    def look(self, reins: Reins) -> None:
        """At each stop of a mirror. M1: once it has been looked at, it differs only
        where a bit is set. M2: ready is equal."""
        job = reins.job
        if not isinstance(job, Mirror) or f"#{job.id}" not in job.disk.bitmaps:
            return
        source, target = bytearray(job.disk.size), bytearray(job.target.size)
        job.source.pread(memoryview(source), 0)
        job.target.pread(memoryview(target), 0)
        if source != target and job.first is not None:
            assert len(source) == len(target)
            step = job.granularity
            for at in range(0, len(source), step):
                if source[at : at + step] != target[at : at + step]:
                    assert job.dirty.bits[at // step], f"M1: granule at {at} differs unnoticed"
        if reins.last is not None and reins.last.ready:
            assert not job.dirty.count() and not job.target.unflushed, "M2"

    def harvest(self) -> None:
        """What has ended: in the way it was to end."""
        for running in self.running if self.stepped else []:
            running.reins.settle()
        for running in [r for r in self.running if r.reins.over]:
            self.running.remove(running)
            job, end = running.job, self.ends.pop(running.job.id, None)
            event(f"{job.type} ended: {'' if end is None else end[:40]}")
            assert end is not None, f"{job.id} ended without a word"
            if end == "" and (self.stepped or not running.stale):
                running.done()
            elif end == "":
                continue
            else:
                assert end == "cancelled" or running.may_fail, f"{job.id} failed: {end}"
        for running in self.running:
            if running.job.status in WORKING:
                running.stale = False  # its last drain, or whatever ends it, is still to come

    @invariant()
    def holds(self) -> None:
        if not self.guests:
            return
        for running in self.running if self.stepped else []:
            if running.reins.held:
                self.look(running.reins)
        self.harvest()
        self.sweep()
        for name, guest in self.guests.items():
            assert self.daemon.graph.disk(name) is guest.disk
            for via in ("disk", "lane"):
                wrong = guest.same(guest.read(0, len(guest.oracle), via))
                assert not wrong, f"disk {name} by {via}: {wrong}"
            for via in ("lane", "nbd"):
                offset, end = guest.range(self.rnd.random(), self.rnd.choice([1, 513, 9000]))
                got = guest.read(offset, end - offset, via)
                assert got == guest.oracle[offset:end], f"disk {name} by {via} at {offset}"
        for image in self.frozen.values():
            image.check()
        if self.stepped or not self.running:
            self.nothing_is_left_behind()

    def nothing_is_left_behind(self) -> None:
        graph = self.daemon.graph
        used = self.used()
        used |= {id(n.file) for n in graph.every_node() if id(n) in used}
        idle = [n.filename for n in graph.every_node() if id(n) not in used]
        assert not idle, f"open, and of no use: {idle}"
        assert sorted(open_files(self.folder)) == sorted(files_of(self.daemon))
        if not any(g.burst for g in self.guests.values()):
            assert not any(disk.gate.claims for disk in graph.all_disks())
        if self.running:
            return
        assert not graph.claims, [h.why for h in self.held()]
        for guest in self.guests.values():
            disk = guest.disk
            assert not disk.taps and not disk.bitmaps and disk.brake is None
            for node in list(chain(disk.root))[1:]:
                assert node.read_only, f"'{node.filename}' below a disk stayed writable"

    # The end -----------------------------------------------------------------------------------

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None:  # what comes now would only hide it
            self.leave()
            return
        try:
            for guest in self.guests.values():
                if guest.burst is not None:
                    guest.burst.end()
                guest.leave()
                guest.lane.close()
            self.daemon.close()
            for image in self.frozen.values():
                image.check(thoroughly=True)
            assert not open_files(self.folder)
            for guest in self.guests.values():
                self.comes_back(guest)
            for path in self.folder.rglob("*"):
                if path.is_file():
                    self.check(path)
        finally:
            self.leave()

    def leave(self) -> None:
        for guest in self.guests.values():
            if guest.burst is not None:
                guest.burst.join()
            guest.leave()
        self.daemon.close()
        self.clean_up.close()

    def comes_back(self, guest: Guest) -> None:
        """Who opens the disk where it once was finds it where it is."""
        path, format = opening.current_image(str(guest.path))
        assert path == moves.follow(str(guest.path)).path
        format = format or {".raw": "raw", ".qed": "qed"}.get(Path(path).suffix, "qcow2")
        wrong = guest.same(image_bytes(path, format))
        assert not wrong, f"opened anew, '{path}': {wrong}"
        if shutil.which("qemu-img") and self.rnd.random() < 0.05:
            out = self.folder / "qemu.raw"
            command = ["qemu-img", "convert", "-f", format, "-O", "raw", path, str(out)]
            subprocess.run(command, check=True)
            assert not guest.same(out.read_bytes()[: len(guest.oracle)]), "qemu-img reads otherwise"

    def check(self, path: Path) -> None:
        with open(path, "rb") as f:
            format = {b"QFI\xfb": "qcow2", b"QED\0": "qed"}.get(f.read(4))
        if format is None:
            return
        image: Any = opening.open_image(str(path), format, backing=False, read_only=True)
        found = image.check()
        image.close()
        wasted = found.leaks and format == "qcow2"  # QED has nowhere to note what room is free
        assert not found.corruptions and not wasted, f"'{path}': {found.messages[:3]}"
        if shutil.which("qemu-img") and self.rnd.random() < 0.03:
            command = ["qemu-img", "check", "-f", format, str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == (3 if found.leaks else 0), done.stdout + done.stderr
