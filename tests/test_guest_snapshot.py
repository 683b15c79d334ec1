"""A real guest, frozen by its real qemu-ga, and two of its disks snapshotted at one point in time.

What the old images hold afterwards is what the guest had on its file systems when it stood still:
they need no journal replayed, and two logs that are written in turn agree to the line.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowferry.cli.client import Client, QmpError
from daemons import PATIENCE, program
from tests_support import need, unavailable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import guest

SIZE = 64 << 20
ROUNDS = 4  # the first of them with deadlines that are too short

# The same numbers to both logs, in turn and each durably, until it is told to stop.
WRITER = (
    "{ (n=0; while [ ! -e /run/stop ]; do n=$((n+1)); for d in b c; do "
    "echo $n | dd of=/$d/log oflag=append conv=notrunc,fsync; done; done; "
    "touch /run/stopped) >/dev/null 2>&1 & }"
)


def tool(*command: str) -> str:
    """What a program prints; it has to succeed."""
    found = guest.find(command[0])
    assert found is not None, f"{command[0]} is not installed"
    done = subprocess.run([found, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


class FileSystem:
    """The ext4 in an image, looked at while nobody mounts it."""

    def __init__(self, image: Path, format: str, flat: Path) -> None:
        tool("qemu-img", "convert", "-f", format, "-O", "raw", str(image), str(flat))
        self.flat = str(flat)

    def clean(self) -> bool:
        """Whether it can be mounted without its journal being replayed."""
        features = re.search(
            r"^Filesystem features:(.*)$", tool("dumpe2fs", "-h", self.flat), re.MULTILINE
        )
        assert features is not None
        return "needs_recovery" not in features[1].split()

    def check(self) -> None:
        tool("e2fsck", "-fn", self.flat)

    def log(self) -> list[int]:
        """What is in the log, by a real mount of the file system."""
        point = Path(f"{self.flat}.mounted")
        point.mkdir(exist_ok=True)
        mounted = subprocess.run(
            ["mount", "-o", "loop,ro", self.flat, str(point)], capture_output=True, text=True
        )
        if mounted.returncode:
            unavailable(f"cannot mount here: {mounted.stderr.strip()}")
        try:
            return [int(line) for line in (point / "log").read_text().split()]
        finally:
            tool("umount", str(point))


@contextmanager
def running(folder: Path) -> Iterator[tuple[guest.Guest, Client, Path]]:
    """A guest with root, /b on a qcow2 image and /c on a raw one, all served by a daemon."""
    socket = folder / "agent.sock"
    guest.root_image(folder / "root.raw", folder, agent=True)
    for name in ("b", "c"):
        with open(folder / f"{name}.raw", "wb") as f:
            f.truncate(SIZE)
        tool("mke2fs", "-q", "-F", "-t", "ext4", str(folder / f"{name}.raw"))
    tool("qemu-img", "convert", "-O", "qcow2", str(folder / "b.raw"), str(folder / "b.qcow2"))
    images = [str(folder / name) for name in ("root.raw", "b.qcow2", "c.raw")]
    with program(folder / "run", *images) as (_, read_line):
        uris = [read_line().split(": ", 1)[1].strip() for _ in images]
        with (
            guest.Guest(uris, folder, agent=socket) as vm,
            Client(str(folder / "run" / "qmp.sock")) as client,
        ):
            vm.run("mkdir -p /b /c; mount -t ext4 /dev/vdb /b && mount -t ext4 /dev/vdc /c")
            yield vm, client, socket
            vm.run("umount /b && umount /c")
            vm.poweroff()


def snapshot(client: Client, quiesce: list[str], seconds: float = 10) -> dict[str, Any]:
    """Both data disks; what the daemon answers."""
    taken: dict[str, Any] = client.execute(
        "x-disk-snapshot",
        {
            "disks": [{"device": "b"}, {"device": "c"}],
            "quiesce": quiesce,
            "quiesce-timeout": seconds,
        },
    )
    return taken


def impatient(client: Client, quiesce: list[str], meanwhile: Callable[[], None]) -> dict[str, Any]:
    """A snapshot with a deadline too short, and longer and longer ones until it is met: before the
    agent answers, while the guest is being frozen, while it is frozen."""
    seconds = 0.01
    while True:
        try:
            return snapshot(client, quiesce, seconds)
        except QmpError as error:
            assert "within" in error.desc and "no disk was switched" in error.hint
            assert seconds < PATIENCE, error.desc
        meanwhile()
        seconds *= 2


def test_S4_two_disks_of_a_frozen_guest_are_snapshotted_clean_and_at_one_point_in_time(
    tmp_path: Path,
) -> None:
    need("qemu-img")
    if why := guest.missing(agent=True):
        unavailable(why)

    def last() -> int:
        return int(vm.run("tail -n1 /c/log"))

    def wait_past(number: int) -> None:
        vm.run(f"while [ $(tail -n1 /c/log) -le {number} ]; do sleep 0.05; done", PATIENCE)

    left: list[tuple[Path, Path]] = []  # the images of b and c that each snapshot left behind
    tops = (tmp_path / "b.qcow2", tmp_path / "c.raw")
    seen: list[int] = []
    frozen: list[float] = []
    with running(tmp_path) as (vm, client, agent):
        vm.run(WRITER)
        vm.run("until [ -s /c/log ]; do sleep 0.05; done", PATIENCE)
        # Last comes one that freezes nobody: it shows that the others were worth it.
        for n in range(ROUNDS + 1):
            seen.append(last())
            quiesce = [str(agent)] if n < ROUNDS else []
            if n == 0:
                taken = impatient(client, quiesce, lambda: wait_past(last()))
            else:
                taken = snapshot(client, quiesce)
            assert taken["filesystems"] == 3 * len(quiesce)  # root, b and c
            frozen.append(taken.get("frozen-seconds", 0.0))
            left.append(tops)
            b, c = (Path(d["snapshot-file"]) for d in taken["disks"])
            tops = (b, c)
            wait_past(last() + 2)  # the guest goes on
        vm.run("touch /run/stop; until [ -e /run/stopped ]; do sleep 0.05; done", PATIENCE)
        end = last()
    # This machine may stop for a moment, as everybody's tests run on it; not twice in three times.
    assert 0 < statistics.median(frozen[1:ROUNDS]) < 1, f"the guest stood still for {frozen} s"
    for n, images in enumerate([*left, tops]):
        quiesced, unmounted = n < ROUNDS, n == len(left)
        both = [
            FileSystem(image, image.suffix[1:], tmp_path / f"{n}.{image.name}.flat")
            for image in images
        ]
        for fs in both:
            assert fs.clean() == (quiesced or unmounted)
            if fs.clean():
                fs.check()
        if n == ROUNDS:
            continue
        one, two = (fs.log() for fs in both)
        # The writer goes to b first, so c has what b has, or all but the last line.
        assert one == list(range(1, len(one) + 1)) and two in (one, one[:-1]), "they do not agree"
        assert len(one) == end if unmounted else seen[n] <= len(one) <= end
