"""cowferry: live storage. Serve virtual disks to guests, and change them while they run.

    import cowferry

    with cowferry.open("vm.qcow2") as disk:
        for extent in disk.extents(0, disk.size):
            print(extent.length, extent.state, extent.depth)
        with cowferry.serve(vm=disk) as server:
            print(server.uri("vm"))
            cowferry.stream(disk)          # the guest goes on; then the base may be deleted

Everything is blocking and thread-safe; offsets and lengths are bytes. Mistakes raise
`CowferryError`, I/O raises `OSError`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cowferry.errors import CowferryError

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.exports.nbd import NbdServer

__version__ = "0.1.0"
__all__ = ["CowferryError", "create", "open", "serve", "stream"]


def create(path: str, size: int, format: str = "qcow2", **options: Any) -> None:
    """Make a new image of `size` bytes. `options` are qemu-img's `-o` names.

    Raises `CowferryError`."""
    from cowferry.drivers import opening

    opening.create_image(path, format, size, options)


@contextmanager
def open(
    path: str, format: str | None = None, *, read_only: bool = False, copy_on_read: bool = False
) -> Iterator[Disk]:
    """The disk in the image at `path`, with its backing chain; flushed and closed at the end.

    A disk that has moved to another image since (a snapshot, a copy) is opened there. Raises
    `CowferryError` if the image, or one below it, cannot be opened."""
    from cowferry.block.disk import Disk
    from cowferry.drivers import opening

    name = os.path.basename(path).rsplit(".", 1)[0]
    path, format = opening.current_image(path, format)
    disk = Disk(opening.open_image(path, format, read_only=read_only), name, copy_on_read)
    try:
        yield disk
    finally:
        opening.close_chain(disk.root)


@contextmanager
def serve(*, socket: str | None = None, **disks: Disk) -> Iterator[NbdServer]:
    """Serve disks by name over NBD on a unix socket (a temporary one by default).

    `server.uri(name)` says where. Raises `CowferryError`."""
    from cowferry.exports.nbd import NbdExport, NbdServer

    with tempfile.TemporaryDirectory(prefix="cowferry-") as folder:
        server = NbdServer()
        try:
            server.listen_unix(socket or os.path.join(folder, "nbd.sock"))
            for name, disk in disks.items():
                server.add(NbdExport(name, disk))
            yield server
        finally:
            server.stop()


def stream(
    disk: Disk,
    base: str | None = None,
    *,
    speed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the disk from its backing chain, down to `base` (a file in it) or all of it.

    Blocks until the end; guests may write meanwhile. `speed` is bytes per second (0: no limit);
    `progress(done, length)` is called from time to time. Afterwards what was taken over is closed.
    Raises `CowferryError`, with the disk as valid as before."""
    from cowferry.graph import Graph
    from cowferry.jobs.job import Jobs
    from cowferry.jobs.stream import Stream

    graph = Graph()
    below = graph.find_base(disk, base) if base is not None else None
    jobs = Jobs(lambda name, data: None)
    job = Stream(
        disk,
        below,
        backing=graph.backing_name(disk.root, below),
        detached=graph.detached,
        speed=speed,
        auto_dismiss=False,
    )
    jobs.start(job, "stream")
    try:
        while not job.wait(0.1):
            if progress is not None:
                progress(job.offset, job.length)
    except BaseException:
        jobs.shutdown()
        raise
    if job.error is not None:
        raise CowferryError(
            f"streaming '{disk.name}' failed: {job.error}", "the disk keeps its backing file"
        )
    if progress is not None:
        progress(job.length, job.length)
