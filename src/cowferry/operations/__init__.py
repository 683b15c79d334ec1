"""Operations: what a command asks for, as a job or a change of the graph.

Here names become nodes, what excludes what is decided, and a job is made of its parts. One module
for each operation; `begin` is the way in which all of them start a job: nodes are claimed first,
all or none, and given back when the job is over or could not start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cowferry.block.disk import Disk
from cowferry.block.moves import Move
from cowferry.block.node import Node
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.jobs.job import Job

if TYPE_CHECKING:
    from cowferry.daemon import Daemon
    from cowferry.jobs.group import Group


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
        raise CowferryError("Need a root block node", f"'{device}' lies below '{over.name}'")
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
    """Nodes held for a job; guests may go on writing through `root`, and through no other."""

    def __init__(
        self, daemon: Daemon, nodes: list[Node], root: Node, job_type: str, job_id: str
    ) -> None:
        self.daemon = daemon
        self.nodes = nodes
        self.why = f"block device is in use by block job: {job_type}"
        self.holder = job_id
        daemon.graph.claim(nodes, self.why, job_id, wanted=job_type, served=root)

    def release(self) -> None:
        """Give them back. May be called again."""
        self.daemon.graph.release(self.nodes, self.why, self.holder)

    def end(self) -> None:
        """The job is over: give them back, and close those that the disk has left meanwhile."""
        self.release()
        self.daemon.graph.tidy(self.nodes)


def begin(
    daemon: Daemon,
    disk: Disk,
    job_id: str,
    job_type: str,
    nodes: list[Node],
    make: Callable[[Claim], Job],
    group: Group | None = None,
) -> Job:
    """Claim, make, start. Raises `CowferryError`; then nothing has begun."""
    held = Claim(daemon, nodes, disk.root, job_type, job_id)
    try:
        job = make(held)
        daemon.works_on[job] = disk
        if group is not None:
            group.add(job)
        return daemon.jobs.start(job, job_id)
    except BaseException:
        held.release()
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
