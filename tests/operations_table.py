"""Every operation of the storage matrix, as a small function over a scene.

A function prepares images with as much room as it wants, and returns the act. The act does the
operation, keeps `Scene.oracle` and `Scene.others` true, and raises if the operation fails. It may
be called again after a failure: then the storage was relieved meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cowferry.errors import CowferryError
from cowferry.wire import nbd
from scenes import FORMATS, SIZE, Failed, Image, Scene, cowferry, qemu
from storages import Devices

Act = Callable[[], None]
Prepare = Callable[[Scene], Act]

SLOW = 256 << 10  # bytes per second: a job at this speed runs until it is told to hurry
OVERLAYS = ("qcow2", "data", "qed")


class Operation(NamedTuple):
    """An operation, the formats that it is for, and whether it has to write new clusters."""

    prepare: Prepare
    formats: tuple[str, ...]
    needs_room: bool


OPERATIONS: dict[str, Operation] = {}


def operation(
    name: str, formats: tuple[str, ...] = FORMATS, needs_room: bool = True
) -> Callable[[Prepare], Prepare]:
    """Put a function into the table."""

    def keep(prepare: Prepare) -> Prepare:
        OPERATIONS[name] = Operation(prepare, formats, needs_room)
        return prepare

    return keep


def format_of(kind: str) -> str:
    """What -f takes for an image of that kind."""
    return "qcow2" if kind == "data" else kind


def overlay_kind(s: Scene) -> str:
    """The kind of an overlay over an image of the scene's kind."""
    return "qed" if s.kind == "qed" else "qcow2"


# A guest -------------------------------------------------------------------------------------


@operation("serve", needs_room=False)
def serve(s: Scene) -> Act:
    s.serve(s.image("vm"))

    def act() -> None:
        told = json.loads(qemu("nbdinfo", "--json", s.uri))
        assert told["exports"][0]["export-size"] == len(s.oracle)
        assert not told["exports"][0]["is_read_only"]
        s.live()

    return act


@operation("read-cold", needs_room=False)
def read_cold(s: Scene) -> Act:
    vm = s.image("vm", over=s.image("base")) if s.kind in OVERLAYS else s.image("vm")
    s.serve(vm)

    def act() -> None:
        with s.guest() as guest:
            for _ in range(12):
                for path in {vm.path, *layers(s)}:
                    s.storage.drop_cache(path)
                length = s.rnd.choice([1, 512, 4096, 70_000])
                offset = s.rnd.randrange(len(s.oracle) - length)
                got = guest.pread(length, offset)
                assert got == s.oracle[offset : offset + length], f"{length} bytes at {offset}"

    return act


def layers(s: Scene) -> list[str]:
    """The files of the disk's chain, top first."""
    (tree,) = s.execute("x-query-tree", device="vm")
    return [layer["filename"] for layer in tree["chain"]]


@operation("read-warm", needs_room=False)
def read_warm(s: Scene) -> Act:
    s.serve(s.image("vm"))

    def act() -> None:
        with s.guest() as guest:
            for step in (64 << 10, 64 << 10, 37_000):
                for at in range(0, len(s.oracle), step):
                    length = min(step, len(s.oracle) - at)
                    assert guest.pread(length, at) == s.oracle[at : at + length], f"at {at}"
            for at in (0, 5000, 900_001):
                s.write(guest, at, s.rnd.randbytes(9000))  # over data: this needs no room
                assert guest.pread(len(s.oracle), 0) == s.oracle

    return act


def write_all_over(s: Scene) -> None:
    """The guest writes a piece of each 96 KiB, in any order, and here and there."""
    with s.guest() as guest:
        places = list(range(0, len(s.oracle) - (96 << 10), 96 << 10))
        s.rnd.shuffle(places)
        for at in places:
            with s.tolerated():
                s.write(guest, at + 512, s.rnd.randbytes(80_000))
        s.flush(guest)
        s.scribble(guest)
        assert guest.pread(len(s.oracle), 0) == s.oracle


@operation("write")
def write(s: Scene) -> Act:
    s.serve(s.image("vm"))
    return lambda: write_all_over(s)


@operation("write-overlay")
def write_overlay(s: Scene) -> Act:
    s.serve(s.image("vm", over=s.image("base")))
    return lambda: write_all_over(s)


@operation("trim", needs_room=False)
def trim(s: Scene) -> Act:
    s.serve(s.image("vm"))

    def act() -> None:
        with s.guest() as guest:
            for offset, length in (
                (0, 1 << 18),
                (300_000, 70_000),
                (len(s.oracle) - (1 << 17), 1 << 17),
            ):
                with s.tolerated():
                    guest.trim(length, offset)
                s.settle(guest, offset, bytes(length))
            s.flush(guest)
            assert guest.pread(len(s.oracle), 0) == s.oracle, "it reads otherwise a moment later"
            s.scribble(guest, 4)

    return act


@operation("zero", needs_room=False)
def zero(s: Scene) -> Act:
    s.serve(s.image("vm"))

    def act() -> None:
        flags = itertools.cycle([0, nbd.CMD_NO_HOLE, nbd.CMD_FUA])
        with s.guest() as guest:
            for offset, length in (
                (0, 1 << 18),
                (300_000, 70_000),
                (len(s.oracle) - 9000, 9000),
                (2 << 20, 1),
            ):
                with s.tolerated():
                    s.change(
                        guest, offset, bytes(length),
                        lambda o=offset, n=length: guest.zero(n, o, next(flags)),  # type: ignore[misc]
                    )  # fmt: skip
            s.flush(guest)
            assert guest.pread(len(s.oracle), 0) == s.oracle
            s.scribble(guest, 4)

    return act


@operation("status", needs_room=False)
def status(s: Scene) -> Act:
    vm = s.image("vm", over=s.image("base")) if s.kind in ("qcow2", "qed") else s.image("vm")
    told = json.loads(qemu("qemu-img", "map", "--output=json", "-f", vm.format, vm.path))
    theirs = zero_runs([(e["start"], e["length"], e["zero"]) for e in told])
    s.serve(vm)

    def act() -> None:
        told = json.loads(qemu("nbdinfo", "--map", "--json", s.uri))
        ours = zero_runs([(e["offset"], e["length"], bool(e["type"] & 2)) for e in told])
        if "extended_l2" in s.options:  # qemu-img does not find all that lies below subclusters
            found = [any(a <= start and end <= b for a, b in ours) for start, end in theirs]
            assert all(found), f"{ours} lacks some of {theirs}"
        else:
            assert ours == theirs
        for start, end in ours:
            assert not any(s.oracle[start:end]), f"{start} to {end} is said to read as zero"

    return act


def zero_runs(found: list[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    """(start, end) of each run that reads as zero, of (start, length, whether it does)."""
    runs: list[tuple[int, int]] = []
    for start, length, is_zero in found:
        if not is_zero:
            continue
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, start + length))
    return runs


# Offline -------------------------------------------------------------------------------------


def creation(s: Scene, *more: str) -> tuple[Image, list[str]]:
    """A place for a new image of the scene's kind, and the options that it is made with."""
    given = [s.options] if s.options else []
    beside = s.place("new-data", "raw") if s.kind == "data" else ""
    if beside:
        given += [f"data_file={beside}", "data_file_raw=on"]
    given += more
    path = s.place("new")
    if beside:
        s.alone[path] = beside
    return Image(path, format_of(s.kind), s.kind), ["-o", ",".join(given)] if given else []


@operation("create", needs_room=False)
def create(s: Scene) -> Act:
    image, options = creation(s)

    def act() -> None:
        cowferry("create", "-q", "-f", image.format, *options, image.path, SIZE)
        if s.kind in ("qcow2", "qed") or not isinstance(s.storage, Devices):
            s.others[image] = bytes(SIZE)  # what is raw on a device is as it was

    return act


@operation("preallocate", ("raw", "qcow2"))
def preallocate(s: Scene) -> Act:
    made = [creation(s, f"preallocation={how}") for how in ("full", "falloc")]

    def act() -> None:
        for image, options in made:
            cowferry("create", "-q", "-f", image.format, *options, image.path, SIZE)
            s.others[image] = bytes(SIZE)

    return act


@operation("convert")
def convert(s: Scene) -> Act:
    source = s.image("source", "qcow2", over=s.image("base", "raw"))
    image, options = creation(s)

    def act() -> None:
        cowferry(
            "convert", "-f", source.format, "-O", image.format, *options, source.path, image.path
        )
        s.others[image] = bytes(s.oracle)

    return act


@operation("check", OVERLAYS, needs_room=False)
def check(s: Scene) -> Act:
    vm = s.image("vm")
    if s.kind == "qed":
        need_check(vm)
    else:
        unlink_qcow2_cluster(s, vm)

    def act() -> None:
        cowferry("check", "-q", "-f", vm.format, "-r", "all", vm.path)
        s.others[vm] = bytes(s.oracle)

    return act


def unlink_qcow2_cluster(s: Scene, image: Image) -> None:
    """Damage: the disk's first cluster is referenced no more, the second's refcount is zero."""
    s.alone.pop(image.path, None)  # the data file goes on holding what is no longer linked
    with open(image.path, "r+b") as f:

        def word(offset: int) -> int:
            f.seek(offset)
            return int(struct.unpack(">Q", f.read(8))[0])

        mask = (1 << 56) - 512
        f.seek(20)
        cluster = 1 << struct.unpack(">I", f.read(4))[0]
        entry = 16 if word(72) & 16 else 8  # bytes of an L2 entry; larger with subclusters
        l2 = word(word(40)) & mask
        second = word(l2 + entry) & mask
        block = word(word(48))
        f.seek(l2)
        f.write(bytes(entry))
        if s.kind == "qcow2":
            f.seek(block + second // cluster * 2)
            f.write(bytes(2))
    s.oracle[:cluster] = bytes(cluster)


def need_check(image: Image) -> None:
    """Set the bit of a QED image that says that its writer has crashed."""
    with open(image.path, "r+b") as f:
        f.seek(16)
        features = int.from_bytes(f.read(8), "little")
        f.seek(16)
        f.write((features | 2).to_bytes(8, "little"))


@operation("resize", needs_room=False)
def resize(s: Scene) -> Act:
    s.serve(s.image("vm"))

    def act() -> None:
        size = len(s.oracle) + (1 << 20)
        assert s.served is not None
        if s.kind == "data" and isinstance(s.storage, Devices):
            s.storage.made[s.beside[s.served.path]].grow(size)
        if s.kind == "raw" and isinstance(s.storage, Devices):
            s.storage.made[s.served.path].grow(size)
            with open(s.served.path, "r+b") as f:
                f.seek(len(s.oracle))
                f.write(bytes(size - len(s.oracle)))
        s.verb("resize", "-q", "--live", "vm", size)
        s.oracle.extend(bytes(1 << 20))
        with s.guest() as guest:
            assert guest.size == size
            assert guest.pread(size, 0) == s.oracle

    return act


@operation("rebase")
def rebase(s: Scene) -> Act:
    base = s.image("base")
    top = s.image("top", over=base)
    below = s.oracle[:]
    for at in range(0, SIZE, 1 << 19):
        below[at : at + 70_000] = s.rnd.randbytes(70_000)
    other = s.load("other", s.kind, below)
    s.others[other] = bytes(below)

    def act() -> None:
        cowferry("rebase", "-q", "-f", top.format, "-b", other.path, "-F", other.format, top.path)
        s.others[top] = bytes(s.oracle)

    return act


# Live ----------------------------------------------------------------------------------------


@operation("snapshot", needs_room=False)
def snapshot(s: Scene) -> Act:
    vm = s.image("vm")
    s.serve(vm)
    overlay = s.place("snap", overlay_kind(s))

    def act() -> None:
        with s.guest() as guest:
            s.scribble(guest, 4)
            before = bytes(s.oracle)
            s.verb("snapshot", f"vm={overlay}")
            s.others[vm] = before
            s.scribble(guest)

    return act


@operation("stream")
def stream(s: Scene) -> Act:
    s.serve(s.image("vm", over=s.image("base")))

    def act() -> None:
        with s.guest() as guest:
            s.scribble(guest, 4)
            s.verb("stream", "vm")
            s.scribble(guest, 4)
        assert s.disk.root.backing is None

    return act


@contextlib.contextmanager
def half_committed(s: Scene, base: Image) -> Iterator[None]:
    """A commit that fails may leave a record beside the base if it has changed the base."""
    files = [Path(base.path), *([Path(s.beside[base.path])] if base.path in s.beside else [])]
    before = [path.read_bytes() for path in files]
    try:
        yield
    except Failed:
        if [path.read_bytes() for path in files] != before:
            s.kept.add(f"{base.path}.committing")
        raise


@operation("commit")
def commit(s: Scene) -> Act:
    base = s.image("base")
    s.serve(s.image("vm", overlay_kind(s), over=base))

    def act() -> None:
        with s.guest() as guest, half_committed(s, base):
            s.scribble(guest, 4)
            s.verb("commit", "vm")
            assert s.disk.root.filename == base.path
            s.scribble(guest, 4)

    return act


@operation("commit-middle")
def commit_middle(s: Scene) -> Act:
    base = s.image("base")
    middle = s.image("middle", overlay_kind(s), over=base)
    s.serve(s.image("vm", overlay_kind(s), over=middle))

    def act() -> None:
        with s.guest() as guest, half_committed(s, base):
            s.scribble(guest, 4)
            s.verb("commit", "vm", "--top", middle.path)
            assert layers(s)[1:] == [base.path]
            s.scribble(guest, 4)

    return act


@operation("copy", ("raw", "qcow2", "qed"))
def copy(s: Scene) -> Act:
    vm = s.image("vm", overlay_kind(s), over=s.image("base"))
    s.serve(vm)
    target = s.place("copy")
    if s.kind == "raw":  # the same command goes on from there
        s.kept |= {target, f"{target}.copying", f"{vm.path}.bitmaps"}

    def act() -> None:
        with s.guest() as guest:
            s.scribble(guest, 4)
            s.verb("copy", "vm", target, "--format", s.kind, "--pivot")
            assert s.disk.root.filename == target
            s.scribble(guest, 4)

    return act


def run_backup(s: Scene, target: str, format: str, **more: object) -> bytes:
    """A push backup under a guest that writes; the disk as of its start. Raises `Failed`."""
    with s.guest() as guest:
        before = bytes(s.oracle)
        given = {"device": "vm", "target": target, "format": format}
        base = more.pop("base", None)
        if isinstance(base, Image):
            given |= {"base": base.path, "base-format": base.format}
        s.execute("x-disk-backup", id="j", disks=[given], speed=SLOW, **more)
        s.scribble(guest, 6)
        with contextlib.suppress(CowferryError):  # it may be over by now
            s.execute("block-job-set-speed", device="j", speed=0)
        s.over("j")
    return before


@operation("push", ("raw", "qcow2", "qed"))
def push(s: Scene) -> Act:
    s.serve(s.image("vm", overlay_kind(s), over=s.image("base")))
    target = Image(s.place("backup"), s.kind, s.kind)

    def act() -> None:
        s.others[target] = run_backup(s, target.path, s.kind)

    return act


@operation("increment")
def increment(s: Scene) -> Act:
    s.bitmap_bytes = (16 << 20) if "2M" in s.options else 1 << 20
    vm = s.image("vm")
    s.serve(vm)
    kind = overlay_kind(s)
    first = Image(s.place("first", kind, 2 << 20), kind, kind)
    second = Image(s.place("second", kind), kind, kind)

    def act() -> None:
        if first not in s.others:
            s.kept.add(f"{vm.path}.bitmaps")
            s.others[first] = run_backup(s, first.path, kind, bitmap="b0")
            s.kept.add(f"{first.path}.backup")  # which backup it is
        s.others[second] = run_backup(
            s, second.path, kind, bitmap="b0", mode="incremental", base=first
        )

    return act


@operation("pull", needs_room=False)
def pull(s: Scene) -> Act:
    s.serve(s.image("vm"))
    got = s.folder / "pulled"

    def act() -> None:
        with s.guest() as guest:
            before = bytes(s.oracle)
            told = json.loads(s.verb("backup", "--pull", "vm", "--async", "--json"))
            try:
                s.scribble(guest, 6)
                qemu("nbdcopy", told["disks"][0]["uris"][0], got)
                assert got.read_bytes() == before
            finally:
                s.verb("backup", "--end")

    return act


@operation("bitmap", needs_room=False)
def bitmap(s: Scene) -> Act:
    s.bitmap_bytes = (16 << 20) if "2M" in s.options else 1 << 20
    vm = s.image("vm")
    s.serve(vm)

    def act() -> None:
        if not s.execute("x-query-bitmaps", device="vm"):
            s.verb("bitmap", "--live", "--add", "vm", "b0")
            s.kept.add(f"{vm.path}.bitmaps")
        before = bytes(s.oracle)
        with s.guest() as guest:
            s.scribble(guest, 4)
        changed = {
            at
            for at in range(0, len(before), 65_536)
            if before[at : at + 65_536] != s.oracle[at : at + 65_536]
        }
        s.live()
        s.end()
        told = json.loads(cowferry("bitmap", "-f", vm.format, "--map", "--json", vm.path, "b0"))
        dirty = {
            at
            for e in told
            for at in range(e["offset"] // 65_536 * 65_536, e["offset"] + e["length"], 65_536)
        }
        assert changed <= dirty
        assert len(dirty) < len(before) // 65_536, "more is said to be dirty than was written"

    return act
