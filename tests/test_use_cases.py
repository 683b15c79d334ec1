"""Use cases 3a, 4, 5 and 6 of the discussion of 2011, while a guest writes and checks itself.

Each is done as a person would: `cowferry serve`, a guest (fio) that writes all the while, the
operation, `job-complete` while it writes, the chain as `cowferry tree` draws it before and after.
The guest verifies all that it wrote; then every byte of the live disk is compared with what
`qemu-img` makes of the images that are left.
"""

from __future__ import annotations

import hashlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import differs, make_base, overlay
from cowferry.block.disk import Disk
from cowferry.block.gate import Slot
from cowferry.cli.client import Client
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.exports.nbd import NbdExport, NbdServer
from daemons import PATIENCE, environment, program
from fio import Guest, guest, need_fio, report
from tests_support import need

SIZE = 48 << 20
SPEED = 64_000_000  # bytes per second of a copy: slow enough to be overtaken by the guest
PIECE = 1 << 20


class Vm:
    """A running daemon and its disks."""

    def __init__(self, run: Path, uris: dict[str, str], process: subprocess.Popen[str]) -> None:
        self.run = run
        self.uris = uris
        self.process = process
        self.client = Client(str(run / "qmp.sock"))

    def tree(self, disk: str) -> tuple[str, list[Path]]:
        """The chain as `cowferry tree` draws it, and the folders of its files, base first."""
        done = subprocess.run(
            [sys.executable, "-m", "cowferry", "tree", disk], env=environment(self.run),
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        name, line = done.stdout.splitlines()[0].split(": ")
        assert name == f"{disk} (48 MiB)"
        (told,) = self.client.call("x-query-tree", device=disk)
        return line, [Path(layer["filename"]).parent for layer in reversed(told["chain"])]

    def event(self, name: str, **members: Any) -> dict[str, Any]:
        """Wait for an event with those members; a job that fails is not waited for."""
        for event in self.client.wait_events(PATIENCE):
            data = event["data"]
            assert "error" not in data, event
            if event["event"] == name and members.items() <= data.items():
                return event
        raise AssertionError(f"no {name} came")

    def pivot(self, job: str) -> None:
        """Wait until a mirror is ready, complete it, and wait until it is over."""
        self.event("BLOCK_JOB_READY", device=job)
        self.client.call("job-complete", id=job)
        self.event("BLOCK_JOB_COMPLETED", device=job)

    def live(self, disk: str) -> bytearray:
        """Every byte of a disk, as its export shows it."""
        with NbdClient(self.uris[disk]) as client:
            got = bytearray()
            for at in range(0, client.size, PIECE):
                got += client.pread(min(PIECE, client.size - at), at)
        return got

    def stop(self) -> None:
        """A clean end: from now on the images stand for themselves."""
        self.client.call("quit")
        assert self.process.wait(PATIENCE) == 0


@contextmanager
def serving(folder: Path, **disks: Path) -> Iterator[Vm]:
    """A daemon of its own on `disks`."""
    run = folder / "run"
    with program(run, *(f"{name}={path}" for name, path in disks.items())) as (process, line):
        uris = {name: line().split(": ", 1)[1].strip() for name in disks}
        vm = Vm(run, uris, process)
        try:
            yield vm
        finally:
            vm.client.close()


class Scene:
    """A source folder, a destination folder, a daemon and a guest that writes."""

    def __init__(self, folder: Path, vm: Vm, *fios: Guest) -> None:
        self.src = folder / "src"
        self.dst = folder / "dst"
        self.folder = folder
        self.vm = vm
        self.fios = fios

    def goes_on(self, times: int) -> None:
        """Every guest writes, and verifies, so many rounds more."""
        for fio in self.fios:
            fio.goes_on(times)

    def copy(self, target: str, **options: Any) -> None:
        """Start copying the disk vm to `target` in the destination, and move over."""
        path = str(self.dst / target)
        self.vm.client.call(
            "x-disk-copy", device="vm", target=path, job_id="j", speed=SPEED, **options
        )
        self.goes_on(1)
        self.vm.pivot("j")

    def compare(self, **ends: Path) -> None:
        """The guest's own check, then every byte: each live disk against its image `ends`."""
        self.goes_on(2)
        for fio in self.fios:
            fio.stop()
            fio.verify()
        live = {name: self.vm.live(name) for name in ends}
        self.vm.stop()
        for name, path in ends.items():
            wrong = differs(converted(path), live[name])
            assert not wrong, f"{path} is not what the guest saw: {wrong}"


@contextmanager
def scene(folder: Path, *chain: str) -> Iterator[Scene]:
    """The disk vm over `chain` in src, base first, each layer with bytes of its own."""
    need("qemu-img")
    need_fio()
    with ExitStack() as held:
        (folder / "dst").mkdir()
        path = make_chain(folder / "src", *chain)
        vm = held.enter_context(serving(folder, vm=path))
        running = held.enter_context(guest(folder / "fio", vm.uris["vm"], SIZE))
        running.goes_on(1)
        yield Scene(folder, vm, running)


def make_chain(folder: Path, base: str, *overlays: str) -> Path:
    """`base`, and overlays that each hold parts of their own; the path of the topmost."""
    folder.mkdir()
    make_base(folder, SIZE)
    (folder / "base.raw").rename(folder / base)
    below, kind = base, "raw"
    for n, name in enumerate(overlays):
        overlay(folder, name, below, kind, SIZE)
        node = opening.open_image(str(folder / name))
        for at in range(n * 192 << 10, SIZE, 5 << 20):
            node.pwrite(memoryview(bytes([n + 65]) * (300 << 10)), at)
        node.zero(n * 7 << 20, 2 << 20)
        node.flush()
        opening.close_chain(node)
        below, kind = name, Path(name).suffix[1:]
    return folder / below


def converted(path: Path) -> bytes:
    """What `qemu-img` reads from an image and its chain."""
    flat = path.with_name(path.name + ".flat")
    kind = path.suffix[1:]
    subprocess.run(
        ["qemu-img", "convert", "-f", kind, "-O", "raw", str(path), str(flat)],
        check=True, timeout=60,
    )  # fmt: skip
    got = flat.read_bytes()
    flat.unlink()
    return got


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_use_case_3a_basic_live_copy_of_a_single_image(tmp_path: Path) -> None:
    with scene(tmp_path, "base.raw") as s:
        assert s.vm.tree("vm") == ("base.raw", [s.src])
        s.copy("base.raw")
        left = digest(s.src / "base.raw")
        assert s.vm.tree("vm") == ("base.raw", [s.dst])
        s.compare(vm=s.dst / "base.raw")
        assert digest(s.src / "base.raw") == left, "the source was written after the pivot"


def test_use_case_3a_basic_live_copy_of_a_cow_image_to_raw(tmp_path: Path) -> None:
    with scene(tmp_path, "base.raw", "vm.qcow2") as s:
        assert s.vm.tree("vm") == ("base.raw <- vm.qcow2", [s.src, s.src])
        path = str(s.dst / "vm.raw")
        s.vm.client.call(
            "drive-mirror", device="vm", target=path, format="raw", sync="full", speed=SPEED
        )
        s.vm.pivot("vm")
        left = digest(s.src / "vm.qcow2")
        assert s.vm.tree("vm") == ("vm.raw", [s.dst])
        s.compare(vm=s.dst / "vm.raw")
        assert digest(s.src / "vm.qcow2") == left


def test_use_case_3a_multiple_block_devices_of_the_vm_move_at_one_point(tmp_path: Path) -> None:
    need("qemu-img")
    need_fio()
    system = make_chain(tmp_path / "src", "system.raw")
    data = make_chain(tmp_path / "src2", "base.raw", "data.qcow2")
    (tmp_path / "dst").mkdir()
    with ExitStack() as held:
        vm = held.enter_context(serving(tmp_path, system=system, data=data))
        guests = [
            held.enter_context(guest(tmp_path / f"fio-{name}", uri, SIZE, rate="4m"))
            for name, uri in vm.uris.items()
        ]
        s = Scene(tmp_path, vm, *guests)
        s.goes_on(1)
        assert vm.tree("system") == ("system.raw", [s.src])
        assert vm.tree("data") == ("base.raw <- data.qcow2", [tmp_path / "src2"] * 2)
        members = [
            {"device": "system", "target": str(s.dst / "system.raw")},
            {"device": "data", "target": str(s.dst / "data.qcow2")},
        ]
        vm.client.call("x-group-start", id="g", type="copy", members=members, speed=SPEED)
        vm.event("JOB_GROUP_READY", id="g")
        s.goes_on(1)
        vm.client.call("x-group-complete", id="g")
        vm.event("JOB_GROUP_COMPLETED", id="g")
        left = [digest(system), digest(data)]
        assert vm.tree("system") == ("system.raw", [s.dst])
        assert vm.tree("data") == ("data.qcow2", [s.dst])
        s.compare(system=s.dst / "system.raw", data=s.dst / "data.qcow2")
        assert [digest(system), digest(data)] == left


def test_use_case_4_cow_chains_that_preserve_the_full_structure(tmp_path: Path) -> None:
    chain = ("base.raw", "sn1.qcow2", "snx.qcow2")
    with scene(tmp_path, *chain) as s:
        assert s.vm.tree("vm") == ("base.raw <- sn1.qcow2 <- snx.qcow2", [s.src] * 3)
        s.copy("snx.qcow2", keep=["*"])
        left = digest(s.src / "snx.qcow2")
        assert s.vm.tree("vm") == ("base.raw <- sn1.qcow2 <- snx.qcow2", [s.dst] * 3)
        s.compare(vm=s.dst / "snx.qcow2")
        assert digest(s.src / "snx.qcow2") == left
        for layer in chain[:-1]:
            same(s.dst / layer, s.src / layer)
        holds_the_same(s.dst / "sn1.qcow2", s.src / "sn1.qcow2")


@pytest.mark.parametrize(
    ("keep", "after"),
    [
        (["base.raw", "sn1.qcow2"], "base.raw <- sn1.qcow2 <- sny.qcow2"),
        (["base.raw"], "base.raw <- sny.qcow2"),
        (["sn2.qcow2"], "sn2.qcow2 <- sny.qcow2"),
        ([], "sny.qcow2"),
    ],
    ids=["keep-base-and-sn1", "keep-base", "keep-sn2", "keep-none"],
)
def test_use_case_5_like_4_but_the_chain_can_collapse(
    tmp_path: Path, keep: list[str], after: str
) -> None:
    with scene(tmp_path, "base.raw", "sn1.qcow2", "sn2.qcow2", "snx.qcow2") as s:
        before = "base.raw <- sn1.qcow2 <- sn2.qcow2 <- snx.qcow2"
        assert s.vm.tree("vm") == (before, [s.src] * 4)
        s.copy("sny.qcow2", keep=keep)
        left = digest(s.src / "snx.qcow2")
        assert s.vm.tree("vm") == (after, [s.dst] * (len(keep) + 1))
        s.compare(vm=s.dst / "sny.qcow2")
        assert digest(s.src / "snx.qcow2") == left
        for layer in keep:
            same(s.dst / layer, s.src / layer)


def test_use_case_5_the_destination_shares_what_is_below_the_leaf(tmp_path: Path) -> None:
    with scene(tmp_path, "base.raw", "sn1.qcow2", "snx.qcow2") as s:
        shared = digest(s.src / "sn1.qcow2")
        s.copy("sny.qcow2", shallow=True)
        after = "base.raw <- sn1.qcow2 <- sny.qcow2"
        assert s.vm.tree("vm") == (after, [s.src, s.src, s.dst])
        s.compare(vm=s.dst / "sny.qcow2")
        assert digest(s.src / "sn1.qcow2") == shared


def test_use_case_6_live_snapshot(tmp_path: Path) -> None:
    with scene(tmp_path, "base.raw", "s1.qcow2", "sx.qcow2") as s:
        assert s.vm.tree("vm") == ("base.raw <- s1.qcow2 <- sx.qcow2", [s.src] * 3)
        s.vm.client.call(
            "blockdev-snapshot-sync", device="vm", snapshot_file=str(s.src / "sx+1.qcow2")
        )
        point = digest(s.src / "sx.qcow2")
        drawn = "base.raw <- s1.qcow2 <- sx.qcow2 <- sx+1.qcow2"
        assert s.vm.tree("vm") == (drawn, [s.src] * 4)
        s.compare(vm=s.src / "sx+1.qcow2")
        assert digest(s.src / "sx.qcow2") == point, "S2: the old top changed after the snapshot"


def test_a_write_that_meets_a_snapshot_waits_and_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the drain the old image is read-only already, and still the disk's root."""
    make_base(tmp_path, SIZE)
    disk = Disk(opening.open_image(str(tmp_path / "base.raw"), "raw"), "vm")
    happened: queue.Queue[str] = queue.Queue()
    enter = disk.gate.enter

    def entering(slot: Slot, start: int, end: int) -> None:
        happened.put("waits")
        enter(slot, start, end)

    def write() -> None:
        try:
            with NbdClient(server.uri("vm")) as client:
                client.pwrite(b"new" * 1024, 4096)
            happened.put("written")
        except OSError as error:
            happened.put(f"refused: {error}")

    server = NbdServer()
    server.add(NbdExport("vm", disk))
    server.listen_unix(str(tmp_path / "s"))
    writer = threading.Thread(target=write)
    try:
        with disk.exclusive():
            disk.root.reopen(True)
            monkeypatch.setattr(disk.gate, "enter", entering)
            writer.start()
            assert happened.get(timeout=PATIENCE) == "waits"
            disk.root.reopen(False)
        writer.join(PATIENCE)
        while (outcome := happened.get(timeout=PATIENCE)) == "waits":
            pass
        assert outcome == "written"
    finally:
        writer.join(PATIENCE)
        server.stop()
        disk.root.close()


def same(copied: Path, source: Path) -> None:
    """A layer that was copied reads, with what is below it, as the source's does."""
    wrong = differs(converted(copied), converted(source))
    assert not wrong, f"{copied} is not {source}: {wrong}"


def holds_the_same(copied: Path, source: Path) -> None:
    """A preserved layer answers for the same bytes itself: nothing from below was taken in."""
    assert held(copied) == held(source)


def held(path: Path) -> list[tuple[int, int]]:
    """(start, end) of each run that the image itself has, data or zero."""
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", str(path)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    runs: list[tuple[int, int]] = []
    for e in json.loads(done.stdout):
        if e["depth"] == 0 and e["present"]:
            start, end = e["start"], e["start"] + e["length"]
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, end))
    return runs


def test_a_guest_that_finds_a_wrong_byte_says_so(tmp_path: Path) -> None:
    """The tests above are worth what this one shows: one bit, and fio's check fails."""
    need_fio()
    image = tmp_path / "vm.raw"
    with open(image, "wb") as f:
        f.truncate(SIZE)
    with serving(tmp_path, vm=image) as vm:
        with guest(tmp_path / "fio", vm.uris["vm"], SIZE) as running:
            running.goes_on(1)
            running.stop()
            with NbdClient(vm.uris["vm"]) as client:
                written = vm.live("vm")
                at = next(i for i in range(4 << 20, SIZE, 4096) if any(written[i : i + 4096]))
                client.pwrite(bytes([written[at + 100] ^ 1]), at + 100)
                with pytest.raises(AssertionError, match="verify"):
                    running.verify()
        vm.stop()
    assert report(tmp_path / "fio")["once"]["error"]
