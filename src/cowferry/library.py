"""What `import cowferry` offers: disks of this process, and every operation on them.

The disks that a program has open live in one daemon without sockets, made when the first is opened
and gone with the last, so that an operation over several of them is one operation, and whatever a
monitor refuses is refused here in the same words. An operation runs as a job and blocks until it
is over; guests of `serve` may write meanwhile.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cowferry.block import names
from cowferry.errors import CowferryError

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.daemon import Daemon
    from cowferry.exports.nbd import NbdServer
    from cowferry.jobs.group import Group
    from cowferry.jobs.job import Job

Watcher = Callable[[int, int], None]  # called with (bytes done, bytes in all) from time to time

TICK = 0.1  # seconds between calls of a watcher

_lock = threading.Lock()  # guards the two below
_house: Daemon | None = None
_open: dict[int, str] = {}  # id of each disk that is open or being opened -> its name
_numbers = itertools.count(1)


# Disks ------------------------------------------------------------------------------------


def create(path: str, size: int, format: str = "qcow2", **options: Any) -> None:
    """Make a new image of `size` bytes. `options` are qemu-img's `-o` names.

    Raises `CowferryError`."""
    from cowferry.drivers import opening

    if options.get("backing_file"):
        opening.check_circle(path, str(options["backing_file"]), options.get("backing_fmt"))
    opening.create_image(path, format, size, options)


@contextmanager
def open(
    path: str, format: str | None = None, *, read_only: bool = False, copy_on_read: bool = False
) -> Iterator[Disk]:
    """The disk in the image at `path`, with its backing chain; flushed and closed at the end.

    A disk that has moved to another image since (a snapshot, a copy) is opened there. Raises
    `CowferryError` if the image, or one below it, cannot be opened, `OSError` if the last flush
    fails."""
    from cowferry.daemon import Daemon

    global _house
    with _lock:
        if _house is None:
            _house = Daemon()
        daemon = _house
        stem = os.path.basename(path).rsplit(".", 1)[0] or "disk"
        taken = set(_open.values())
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        name = next(n for n in names if n not in taken)
        opening = object()
        _open[id(opening)] = name  # keeps the name and the daemon, whatever the others do
    try:
        # Without the lock: storage that hangs holds up nobody else.
        disk = daemon.open_disk(name, path, format, copy_on_read=copy_on_read, read_only=read_only)
    except BaseException:
        with _lock:
            del _open[id(opening)]
            _leave()
        raise
    with _lock:
        _open[id(disk)] = _open.pop(id(opening))
    try:
        yield disk
    finally:
        try:
            daemon.remove_disk(disk.name, force=True)
        finally:
            with _lock:
                del _open[id(disk)]
                _leave()


def _leave() -> None:
    """The last one closes the house. Caller holds `_lock`."""
    global _house
    if not _open and _house is not None:
        daemon, _house = _house, None
        daemon.close()


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


# Operations -------------------------------------------------------------------------------


def stream(
    disk: Disk,
    base: str | None = None,
    *,
    speed: int = 0,
    progress: Watcher | None = None,
) -> None:
    """Fill the disk from its backing chain, down to `base` (a file in it) or all of it.

    `speed` is bytes per second (0: no limit). Afterwards what was taken over is closed. Raises
    `CowferryError`, with the disk as valid as before."""
    _run(disk, "block-stream", progress, base=base, speed=speed)


def snapshot(
    disks: Mapping[Disk, str] | Disk,
    file: str | None = None,
    *,
    quiesce: Sequence[str] = (),
    timeout: float = 10,
) -> list[str]:
    """Put a new overlay on top of one disk (in `file`) or of several (disk -> file), at one moment.

    `quiesce` names sockets of guest agents: the guests' file systems are frozen meanwhile, for
    `timeout` seconds at most. Returns the overlays' files. Raises `CowferryError`; then every disk
    is as it was."""
    chosen = dict(disks) if isinstance(disks, Mapping) else {disks: file}
    wanted = [
        {"device": _name(d), **({"snapshot-file": names.absolute(f)} if f is not None else {})}
        for d, f in chosen.items()
    ]
    arguments: dict[str, Any] = {"disks": wanted}
    if quiesce:
        arguments |= {"quiesce": list(quiesce), "quiesce-timeout": timeout}
    done = _daemon().execute("x-disk-snapshot", arguments)
    return [entry["snapshot-file"] for entry in done["disks"]]


def commit(
    disk: Disk,
    *,
    top: str | None = None,
    base: str | None = None,
    backing_file: str | None = None,
    pivot: bool = True,
    speed: int = 0,
    progress: Watcher | None = None,
) -> None:
    """Put what the layers from `top` (the active one) down hold into `base` (the lowest).

    After a commit of the active layer the base is the disk; without `pivot` it is a copy of that
    moment, and the disk stays where it is. Raises `CowferryError`, with the disk as valid as
    before."""
    _run(
        disk, "block-commit", progress, pivot,
        top=top, base=base, backing_file=backing_file, speed=speed, x_carry_bitmaps=True,
    )  # fmt: skip


def copy(
    disk: Disk,
    target: str,
    *,
    format: str | None = None,
    shallow: bool = False,
    keep: Sequence[str] = (),
    pivot: bool = False,
    copy_mode: str = "background",
    granularity: int = 0,
    speed: int = 0,
    converge_by: float = 0,
    progress: Watcher | None = None,
) -> None:
    """Copy the disk to a new image while its guests write; `pivot` moves the disk over to it.

    Without `pivot` the copy is the disk of the moment at which this returns. `keep` names layers
    that become images of their own beside `target` ("*": all), `shallow` makes it an overlay on
    the present backing file. Raises `CowferryError`, with the disk untouched."""
    _run(
        disk, "x-disk-copy", progress, pivot,
        target=names.absolute(target), format=format, shallow=shallow, keep=list(keep) or None,
        copy_mode=copy_mode, granularity=granularity, speed=speed, converge_by=converge_by,
    )  # fmt: skip


def group(
    operation: str,
    disks: Mapping[Disk, str | None] | Sequence[Disk],
    *,
    policy: str = "all",
    pivot: bool = True,
    speed: int = 0,
    progress: Watcher | None = None,
) -> None:
    """Stream, commit or copy several disks as one: they end together, at one point in time.

    `disks` says of each disk its target (copy) or base (stream, commit; None: the whole chain).
    With `policy` "all" one failure calls the others off, with "each" it does not. Raises
    `CowferryError` that says which failed."""
    daemon = _daemon()
    pairs = dict(disks) if isinstance(disks, Mapping) else dict.fromkeys(disks)
    role = "target" if operation == "copy" else "base"
    members = []
    for disk, value in pairs.items():
        if value is not None and role == "target":
            value = names.absolute(value)
        members.append({"device": _name(disk), **({role: value} if value is not None else {})})
    name = f"library-{next(_numbers)}"
    over = threading.Event()
    outcome: dict[str, Any] = {}

    def hear(event: str, data: dict[str, Any]) -> None:
        if event == "JOB_GROUP_COMPLETED" and data["id"] == name:
            outcome.update(data)
            over.set()

    daemon.events.listen(hear)
    try:
        daemon.execute(
            "x-group-start",
            {"id": name, "type": operation, "members": members, "policy": policy, "speed": speed},
        )
        found = daemon.jobs.groups.get(name)
        try:
            _attend(found, over, pivot, progress)
        except BaseException:
            if found is not None:
                found.cancel()
                over.wait()
            raise
    finally:
        daemon.events.forget(hear)
    if outcome.get("error") or outcome.get("cancelled"):
        raise CowferryError(
            f"{operation} of {len(members)} disks failed: {outcome.get('error', 'cancelled')}",
            "the disks that did not finish are as they were",
        )


def backup(
    disks: Mapping[Disk, str] | Disk,
    target: str | None = None,
    *,
    mode: str = "full",
    bitmap: str | None = None,
    bitmap_mode: str = "on-success",
    base: Mapping[Disk, str] | str | None = None,
    base_format: str | None = None,
    unsafe: bool = False,
    format: str | None = None,
    compress: bool = False,
    scratch: str | None = None,
    speed: int = 0,
    progress: Watcher | None = None,
) -> None:
    """Copy what one disk holds (to `target`), or several (disk -> target), at this one moment.

    `mode` "full" with a `bitmap` begins to record what changes from this moment on; "incremental"
    copies what it says into an overlay of `base`, the backup before. Unless it is `unsafe`, a base
    is refused if the bitmap counts from another one, or if it was written since. "top" copies the
    disk's own image into an overlay of its backing file. `compress`: into compressed clusters of a
    qcow2 target. `scratch` is a folder for old data that waits for a slow target. Raises
    `CowferryError`; then what was made is gone, and bitmaps keep every bit."""
    daemon = _daemon()
    chosen = dict(disks) if isinstance(disks, Mapping) else {disks: target}
    before = base if isinstance(base, Mapping) else dict.fromkeys(chosen, base)
    wanted = []
    for disk, path in chosen.items():
        if path is None:
            raise CowferryError(f"disk '{_name(disk)}' needs a target")
        under = before.get(disk)
        one = {
            "device": _name(disk), "target": names.absolute(path), "format": format,
            "base": names.absolute(under) if under is not None else None,
            "base-format": base_format, "unsafe": unsafe,
        }  # fmt: skip
        wanted.append({k: v for k, v in one.items() if v is not None})
    name = f"library-{next(_numbers)}"
    arguments = {
        "id": name, "disks": wanted, "mode": mode, "bitmap": bitmap, "bitmap-mode": bitmap_mode,
        "compress": compress, "speed": speed, "auto-dismiss": False,
        "scratch": os.path.abspath(scratch) if scratch is not None else None,
    }  # fmt: skip
    daemon.execute("x-disk-backup", {k: v for k, v in arguments.items() if v is not None})
    ids = [name] if len(wanted) == 1 else [f"{name}-{w['device']}" for w in wanted]
    jobs = [job for job in map(daemon.jobs.get, ids) if job is not None]
    try:
        for job in jobs:
            while not job.wait(TICK):
                if progress is not None:
                    progress(sum(j.offset for j in jobs), sum(j.length for j in jobs))
    except BaseException:
        for job in jobs:
            with suppress(CowferryError):
                job.cancel()
        for job in jobs:
            job.wait()
        raise
    finally:
        for job in jobs:
            job.dismiss()
    errors = [f"{w['device']}: {j.error}" for w, j in zip(wanted, jobs, strict=True) if j.error]
    if errors or any(job.cancelled for job in jobs):
        raise CowferryError(
            f"the backup failed: {'; '.join(errors) or 'cancelled'}",
            "the disks are intact, what was made is gone, and bitmaps keep every bit",
        )


@contextmanager
def pull(
    *disks: Disk, bitmap: str | None = None, anew: bool = True, scratch: str | None = None
) -> Iterator[dict[Disk, str]]:
    """Disks as they are at this one moment, each exported read-only under an NBD URI.

    With a `bitmap` the exports say what has changed (qemu:dirty-bitmap:NAME); if the block ends
    without an exception it counts `anew` from the moment on, otherwise it keeps every bit. Raises
    `CowferryError`, in the end if a moment was lost because old data could not be kept."""
    daemon = _daemon()
    names = {_name(disk): disk for disk in disks}
    id = f"library-{next(_numbers)}"
    with tempfile.TemporaryDirectory(prefix="cowferry-") as folder:
        mine = daemon.nbd is None
        if mine:
            daemon.start_nbd({"type": "unix", "path": os.path.join(folder, "nbd.sock")})
        try:
            arguments = {
                "id": id, "disks": [{"device": name} for name in names], "bitmap": bitmap,
                "anew": anew, "scratch": os.path.abspath(scratch) if scratch is not None else None,
            }  # fmt: skip
            given = {k: v for k, v in arguments.items() if v is not None}
            found = daemon.execute("x-backup-export", given)
            try:
                yield {names[d["device"]]: d["uris"][0] for d in found["disks"]}
            except BaseException:
                with suppress(CowferryError):  # a moment was lost: the first error says more
                    daemon.execute("x-backup-export-end", {"id": id, "failed": True})
                raise
            daemon.execute("x-backup-export-end", {"id": id})
        finally:
            if mine:
                daemon.stop_nbd()


def _attend(
    group: Group | None, over: threading.Event, pivot: bool, progress: Watcher | None
) -> None:
    """Until the group is over; a ready one is told how to end."""
    told = False
    while not over.wait(TICK):
        if group is None:
            continue
        state = group.query()
        if progress is not None:
            progress(state["offset"], state["len"])
        if state["status"] == "ready" and not told:
            told = True
            with suppress(CowferryError):  # its members end by themselves (streams)
                if pivot:
                    group.complete()
                else:
                    group.cancel(force=False)


def change_backing_file(disk: Disk, image: str, backing_file: str, *, unsafe: bool = False) -> None:
    """Record another name for the backing file of `image`, a file in the disk's chain.

    It has to lead to the same bytes, which is looked at unless `unsafe`. Raises
    `CowferryError`."""
    from cowferry.block.node import chain

    daemon = _daemon()
    named = [n for n in chain(disk.root) if daemon.graph.means(n, image)]
    node = named[0] if named else daemon.graph.find_base(disk, image)
    daemon.execute(
        "change-backing-file",
        {
            "device": _name(disk), "image-node-name": node.name,
            "backing-file": backing_file, "unsafe": unsafe,
        },
    )  # fmt: skip


def limit(
    disk: Disk, *, group: str | None = None, off: bool = False, **limits: int
) -> dict[str, int]:
    """Limit what is read and written of a disk, here and by guests; what the limits are then.

    `limits` are named as in QMP: bps, bps_rd, bps_wr (bytes per second), iops, iops_rd, iops_wr
    (requests per second), each with _max and _max_length (seconds) for bursts, and iops_size.
    Those that are not given stay; 0 takes one away, `off` all. Disks of one `group` share its
    limits. Raises `CowferryError` for one that cannot take effect."""
    arguments: dict[str, Any] = {"device": _name(disk), **limits}
    if group is not None:
        arguments["group"] = group
    if off:
        arguments["off"] = True
    if len(arguments) == 1:
        (found,) = _daemon().execute("x-query-limits", arguments)
    else:
        found = _daemon().execute("x-disk-limit", arguments)
    return dict(found["limits"])


def change(
    disk: Disk, target: str, format: str | None = None, *, notify: bool = False,
    unsafe: bool = False,
) -> None:  # fmt: skip
    """Switch the disk to another image, under a drain.

    It has to hold the same bytes, which are compared, unless the guest is to `notify` another
    medium, or it is `unsafe`. Raises `CowferryError`, with the disk where it was."""
    arguments: dict[str, Any] = {
        "device": _name(disk), "target": names.absolute(target), "notify": notify,
        "unsafe": unsafe,
    }  # fmt: skip
    if format is not None:
        arguments["format"] = format
    _daemon().execute("change", arguments)


# Dirty bitmaps ----------------------------------------------------------------------------


def bitmap_add(
    disks: Sequence[Disk] | Disk,
    name: str,
    *,
    granularity: int | None = None,
    persistent: bool = True,
    disabled: bool = False,
) -> None:
    """Record from now on which granules are written, on several disks from one moment on.

    `granularity` is bytes for each bit. A `persistent` one is kept in the image, or beside it if
    its format has no room. Raises `CowferryError`; then no disk has it."""
    more = {} if granularity is None else {"granularity": granularity}
    _change_bitmaps("add", disks, name, persistent=persistent, disabled=disabled, **more)


def bitmap_remove(disks: Sequence[Disk] | Disk, name: str) -> None:
    """Stop recording, and forget what was recorded. Raises `CowferryError`."""
    _change_bitmaps("remove", disks, name)


def bitmap_clear(disks: Sequence[Disk] | Disk, name: str) -> None:
    """Forget what was recorded, and go on, on several disks at one moment."""
    _change_bitmaps("clear", disks, name)


def bitmap_enable(disks: Sequence[Disk] | Disk, name: str) -> None:
    """Record (again), on several disks from one moment on."""
    _change_bitmaps("enable", disks, name)


def bitmap_disable(disks: Sequence[Disk] | Disk, name: str) -> None:
    """Keep what was recorded and record no more, on several disks from one moment on."""
    _change_bitmaps("disable", disks, name)


def bitmap_merge(disk: Disk, name: str, *sources: str | tuple[Disk, str]) -> None:
    """Add what other bitmaps have recorded, of this disk or of others as large."""
    named = [(disk, s) if isinstance(s, str) else s for s in sources]
    merged = [{"node": _node_of(of, source), "name": source} for of, source in named]
    _change_bitmaps("merge", disk, name, bitmaps=merged)


def bitmaps(disk: Disk) -> list[dict[str, Any]]:
    """The bitmaps of the disk's chain, top first: name, count (of dirty bytes), granularity,
    recording, persistent, filename (of the image), and kept-in, used-by, inconsistent."""
    found: list[dict[str, Any]] = _daemon().execute("x-query-bitmaps", {"device": _name(disk)})
    return found


def dirty(disk: Disk, name: str) -> Iterator[tuple[int, int]]:
    """(offset, length) of each run that the bitmap has recorded. Raises `CowferryError`."""
    arguments = {"node": _node_of(disk, name), "name": name}
    at: int | None = 0
    while at is not None:
        found = _daemon().execute("x-query-bitmap-extents", {**arguments, "offset": at})
        for run in found["extents"]:
            yield run["offset"], run["length"]
        at = found.get("next")


def _change_bitmaps(verb: str, disks: Sequence[Disk] | Disk, name: str, **more: Any) -> None:
    chosen = disks if isinstance(disks, Sequence) else [disks]
    role = "target" if verb == "merge" else "name"
    actions = [
        {
            "type": f"block-dirty-bitmap-{verb}",
            "data": {"node": _name(d) if verb == "add" else _node_of(d, name), role: name, **more},
        }
        for d in chosen
    ]
    _daemon().execute("transaction", {"actions": actions})


def _node_of(disk: Disk, name: str) -> str:
    """The topmost node of the chain that has a bitmap of that name; else the disk."""
    found = (entry["node-name"] for entry in bitmaps(disk) if entry.get("name") == name)
    return str(next(found, _name(disk)))


# Jobs -------------------------------------------------------------------------------------


def _daemon() -> Daemon:
    if _house is None:
        raise CowferryError("no disk is open", "open one: with cowferry.open(...) as disk")
    return _house


def _name(disk: Disk) -> str:
    name = _open.get(id(disk))
    if name is None:
        raise CowferryError(
            f"disk '{disk.name}' is not one of cowferry.open, or has been closed",
            "operations work on the disks that cowferry.open gives",
        )
    return name


def _run(
    disk: Disk, command: str, progress: Watcher | None, pivot: bool = True, **arguments: Any
) -> None:
    """Start a job and see it through to its end. An interrupted caller calls it off."""
    name = _name(disk)
    daemon = _daemon()
    job_id = f"library-{next(_numbers)}"
    given = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
    daemon.execute(command, {"device": name, "job-id": job_id, "auto-dismiss": False, **given})
    job = daemon.jobs.get(job_id)
    assert job is not None
    try:
        _see_through(job, pivot, progress)
    except BaseException:
        with suppress(CowferryError):
            job.cancel()
        job.wait()
        raise
    finally:
        job.dismiss()
    if job.error is not None:
        raise CowferryError(
            f"{job.type} of '{name}' failed: {job.error}",
            "the disk is intact, and where it was",
        )
    if progress is not None:
        progress(job.length, job.length)


def _see_through(job: Job, pivot: bool, progress: Watcher | None) -> None:
    from cowferry.jobs.states import Status

    told = False
    while not job.wait(TICK):
        if progress is not None:
            progress(job.offset, job.length)
        if job.status is Status.READY and not told:
            told = True
            if pivot:
                job.complete()
            else:
                job.cancel(force=False)
