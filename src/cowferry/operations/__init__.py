"""Operations: what a command asks for, as a job or a change of the graph.

Here names become nodes, what excludes what is decided, and a job is made of its parts. One module
for each operation.

An operation runs in the turn of its command, in this order, so that two of them never meet:

1. `wait_for_disk`: no other command is at work on the disk, and the file systems answer;
2. look at names and options, and claim the disk's nodes and the job's id (`Claim`);
3. make and open files, apart: a server or file system that hangs holds up this command alone, and
   the claim keeps everybody else away from the disk meanwhile;
4. claim what was opened (`Claim.add`), look at it, and start the job (`begin`).

If one of these fails, what was claimed is given back and what was made is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from cowferry.block import names
from cowferry.block.disk import Disk
from cowferry.block.held import BY_JOB
from cowferry.block.moves import Move
from cowferry.block.node import Node, chain
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.jobs.job import Job

if TYPE_CHECKING:
    from cowferry.daemon import Daemon
    from cowferry.jobs.group import Group


def wait_for_disk(daemon: Daemon, device: str, *paths: str | None) -> None:
    """Wait, apart, until no other command works on a disk, and until the file systems of its images
    and of `paths` answer.

    Later steps look at the same files in the command's turn: a file system that hangs is met here,
    where it holds up nobody else."""
    graph = daemon.graph
    graph.await_commands(device)
    with graph.lock:
        disk = graph.disks.get(device)
        root = disk.root if disk is not None else graph.nodes.get(device)
    with daemon.apart():
        for path in (*(n.filename for n in chain(root)), *paths):
            if path and not names.is_uri(path):
                with suppress(OSError, ValueError):  # whoever needs the file says what is wrong
                    os.stat(path)
    graph.await_commands(device)


def job_name(daemon: Daemon, device: str, job_id: str | None) -> str:
    """The id that a job gets: the one given, else a named disk's name. Raises if it is taken."""
    if job_id is None:
        with daemon.graph.lock:
            job_id = device if device in daemon.graph.disks else ""
    daemon.jobs.check_id(job_id)
    return job_id


def find(daemon: Daemon, name: str) -> Node:
    """The node of that name, for an argument that names one. Raises `CowferryError`."""
    with daemon.graph.lock:
        found = daemon.graph.nodes.get(name)
    if found is None:
        raise CowferryError(f"Cannot find device='{name}' nor node-name='{name}'")
    daemon.graph.check_kept(found)
    return found


def check_unlimited(node: Node, what: str) -> None:
    """Raise `CowferryError` for a throttle node where it would limit nobody."""
    if node.throttle_group:
        raise CowferryError(
            f"Filters cannot be used as {what}",
            f"'{node.name}' limits the guests of a disk over it, and backups into it; the disk "
            "keeps its own limits wherever it moves: open the image without the filter",
        )


def root_disk(daemon: Daemon, device: str) -> Disk:
    """The disk of that name, over which nothing else lies.

    Raises `DeviceNotFound` before anything else: clients probe so. Else `CowferryError`."""
    disk = daemon.graph.disk(device)
    over = daemon.graph.stranger(disk.root, [])
    if over is not None:
        free(daemon, device, "another operation")
        daemon.graph.check_free(disk.root, "another operation")  # a job's own target, perhaps
        raise CowferryError(
            "Need a root block node", f"'{device}' lies below '{daemon.graph.short(over)}'"
        )
    return disk


def free(daemon: Daemon, device: str, wanted: str, beside: str = "") -> None:
    """Raise `DeviceInUse` if a job runs on the disk, naming it and what was `wanted`, unless it is
    of the type that may run `beside` what is wanted."""
    for running in daemon.jobs_on(device):
        if running.type != beside and running.status.value not in ("concluded", "null"):
            raise DeviceInUse(
                f"Device '{device}' is in use: job '{running.id}' ({running.type}) is active on "
                f"it, which excludes {wanted}",
                f"wait for job '{running.id}', or cancel it",
            )


class Claim:
    """Nodes and an id held for a job, from before its files are opened until it is over.

    Guests may go on writing through `root`, and through no other node."""

    def __init__(
        self, daemon: Daemon, nodes: list[Node], root: Node, job_type: str, job_id: str,
        brief: bool = True,
    ) -> None:  # fmt: skip
        """Without a `job_id` a command holds the nodes by itself; not `brief`, for a long time.
        Raises `CowferryError`; then nothing is held."""
        self.daemon = daemon
        self.nodes: list[Node] = []
        self.root = root
        self.job_type = job_type
        self.why = f"{BY_JOB}{job_type}" if job_id else job_type
        self.holder = job_id
        self.brief = brief
        if job_id:
            daemon.jobs.reserve(job_id)
        try:
            self.add(*nodes)
        except BaseException:
            daemon.jobs.unreserve(job_id)
            raise

    def add(self, *nodes: Node) -> None:
        """Hold these as well. Raises `DeviceInUse`; then none of them is held."""
        self.daemon.graph.claim(
            list(nodes), self.why, self.holder, wanted=self.job_type, served=self.root,
            brief=self.brief,
        )  # fmt: skip
        self.nodes += nodes

    def release(self) -> None:
        """Give the nodes back. May be called again."""
        self.daemon.graph.release(self.nodes, self.why, self.holder)

    def withdraw(self) -> None:
        """There will be no job: give everything back."""
        self.daemon.jobs.unreserve(self.holder)
        self.release()

    def end(self) -> None:
        """The job is over: give the nodes back, and close those that the disk has left."""
        self.release()
        self.daemon.graph.tidy(self.nodes)


def begin(
    daemon: Daemon,
    disk: Disk,
    held: Claim,
    make: Callable[[Claim], Job],
    group: Group | None = None,
) -> Job:
    """Make the job and start it. Raises `CowferryError`; then nothing has begun, and nothing is
    held any more."""
    try:
        job = make(held)
        daemon.works_on[job] = disk
        if group is not None:
            group.add(job)
        return daemon.jobs.start(job, held.holder, reserved=True)
    except BaseException:
        held.withdraw()
        raise


def check_mode(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise unless an option has one of its values."""
    if value not in known:
        raise CowferryError(f"Parameter '{name}' does not accept value '{value}'")


def move_of(disk: Disk, left: Node, current: Node) -> Move:
    """The move of a disk from one image to another, to be recorded.

    A raw image on a device, or on an export, has its size recorded: the disk must not grow when it
    is opened again and the device is, or has become, larger."""
    size = None
    image = current
    while image.filter and image.file is not None:
        image = image.file
    if image.driver == "raw" and image.file is not None and image.file.is_device:
        size = current.size
    return Move(disk.name, left.filename, current.filename, current.driver, size, disk.origin)
