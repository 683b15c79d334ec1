"""The daemon: graph, jobs, exports and monitors under one roof.

Commands are functions on this object, so it offers what several of them share and no more. It
also keeps promises of its own: every few seconds disks with changes in memory are flushed, so that
a killed process costs seconds of unflushed work; every minute what is on disk of persistent bitmaps
is made precise, if it is not, one disk not held up by another whose server hangs; and it ends in
order: no new clients, jobs cancelled, exports closed, everything flushed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from cowferry.block import moves
from cowferry.block.chores import Chores
from cowferry.block.disk import Disk, in_order
from cowferry.block.keeper import Keeper
from cowferry.block.node import Node
from cowferry.block.scope import CalledOff, Scope
from cowferry.block.turn import Turn
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.exports import Export
from cowferry.exports.nbd import NbdExport, NbdServer
from cowferry.graph import Graph
from cowferry.jobs.job import Job, Jobs
from cowferry.jobs.states import Status
from cowferry.wire.address import from_qmp

if TYPE_CHECKING:
    from cowferry.operations.pull import Pull

log = logging.getLogger(__name__)

FLUSH_EVERY = 5.0  # seconds
REFINE_EVERY = 60.0  # seconds
COARSE = 64 << 20  # bytes that a bitmap file may say are dirty without need
STOPPING = 60.0  # seconds that a cancelled job may take
HUNG = 4.0  # seconds that a server may take to answer when the daemon ends
END_SECONDS = 7.0  # that the daemon takes to end, whatever hangs
CLOSE_SECONDS = 2.5  # of those, kept for flushing and closing images
CLIENTS_SECONDS = 10.0  # that requests of clients who were sent away may take
COMMAND_SECONDS = 60.0  # that a command waits for a server, or for guests
ANSWER_SECONDS = 2.0  # that the end waits for commands that run
LOOK = 0.5  # seconds between looks whether one takes longer

Listener = Callable[[str, dict[str, Any]], None]


class Events:
    """Tells every listener of every event, in one order for all."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # guards `listeners`, and the order of events
        self.listeners: list[Listener] = []

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """A listener must not block: monitors put events on a queue."""
        with self.lock:
            for listener in list(self.listeners):
                try:
                    listener(name, data)
                except Exception:
                    log.exception("a listener failed on event %s", name)

    def listen(self, listener: Listener) -> None:
        """Hear every event from now on."""
        with self.lock:
            self.listeners.append(listener)

    def forget(self, listener: Listener) -> None:
        """Hear no more."""
        with self.lock:
            # By value: each look at a bound method makes another object.
            self.listeners = [x for x in self.listeners if x != listener]


class Daemon:
    """Thread-safe in the sense of its parts. Commands take turns while they look at what is in
    memory and change it, and wait for nothing meanwhile (`block/turn.py`)."""

    def __init__(self) -> None:
        self.events = Events()
        self._turn = Turn()  # guards `nbd`, `exports` and `pulls`, and orders changes of the graph
        self.graph = Graph(self._turn)
        self.jobs = Jobs(self._job_event)
        self.nbd: NbdServer | None = None
        self.exports: dict[str, Export] = {}
        self.pulls: dict[str, Pull] = {}  # pull backups that are going on
        # Names only, for options that refer to one: here each connection has its own thread.
        self.iothreads: set[str] = set()
        self._letting_go: list[Callable[[], None]] = []
        self.stopped = threading.Event()  # somebody asked the daemon to end
        self._idle = threading.Condition()
        self._scopes: set[Scope] = set()  # of commands that run; guarded by `_idle`
        self.unfinished: list[str] = []  # what hung when it ended, in words
        self._running = 0  # commands that run, or whose answer is on its way; guarded by `_idle`
        # The disk that a job runs on.
        self.works_on: weakref.WeakKeyDictionary[Job, Disk] = weakref.WeakKeyDictionary()
        self._closing = threading.Event()
        self._chores = Chores()  # what the ticker asks for
        self._ticker = threading.Thread(target=self._tick, name="flush", daemon=True)
        self._ticker.start()
        self._closed = False

    # Disks -------------------------------------------------------------------------------

    def open_disk(
        self,
        name: str,
        path: str,
        format: str | None = None,
        *,
        copy_on_read: bool = False,
        read_only: bool = False,
    ) -> Disk:
        """A named disk over the image at `path`, or the one it has moved to, and its chain.

        Raises `CowferryError`."""
        path = opening.canonical(path)
        with self.apart():
            now, format = opening.current_image(path, format)
            window = moves.follow(path).size
            options = opening.image_options(now, format, read_only=read_only)
        if window is not None:
            options["size"] = window
        return self.graph.open_disk(name, options, copy_on_read, origin=path)

    def remove_disk(self, device: str, force: bool = False) -> None:
        """Close a named disk and withdraw its exports.

        Raises `DeviceInUse` while a job works on it, or clients are connected; with `force` they
        are called off and disconnected first."""
        if force:
            self.cancel_on(device)
        with self.turn():
            self.graph.await_commands(device)
            disk = self.graph.disk(device)
            why = "it is being removed"
            nodes = [disk.root]
            self.graph.claim(nodes, why, wanted="its removal")
            try:
                mine = [e for e in self.exports.values() if e.disk is disk]
                clients = sum(e.users for e in mine)
                if clients and not force:
                    raise DeviceInUse(
                        f"Device '{device}' is in use by {clients} client(s)",
                        "disconnect them, or use force",
                    )
                with self.apart():
                    for export in mine:
                        self.drop_export(export, wait=True)
            finally:
                self.graph.release(nodes, why)
            self.graph.remove_disk(device)

    def resize(self, device: str, size: int) -> None:
        """Resize a disk. Raises `DeviceInUse` while a job depends on its size."""
        self.graph.await_commands(device)
        disk = self.graph.disk(device)
        nodes = [disk.root]
        self.graph.check_free(disk.root, "a resize")
        self.graph.check_top(disk.root)  # its size is part of what the node above says
        if disk.read_only:
            raise CowferryError(f"Cannot resize '{device}': it is read-only")
        why = "resize"
        self.graph.claim(nodes, why)
        try:
            with self.apart():
                disk.resize(size)
        except OSError as error:
            raise CowferryError(f"Cannot resize '{device}': {error.strerror or error}") from error
        finally:
            self.graph.release(nodes, why)

    # Exports -----------------------------------------------------------------------------

    def start_nbd(
        self, addr: Mapping[str, Any], *, max_connections: int = 100, handshake: float = 10
    ) -> NbdServer:
        """Start the NBD server on a QMP SocketAddress. Raises `CowferryError`."""
        if self.nbd is not None:
            raise CowferryError("NBD server already running")
        server = NbdServer(max_connections, handshake)
        address = from_qmp(addr, listen=True)
        try:
            with self.apart():  # another server may have to be asked whether it is there
                server.listen(address)
            if self.nbd is not None:
                raise CowferryError("NBD server already running")
        except BaseException:
            server.stop()
            raise
        self.nbd = server
        return server

    def stop_nbd(self, seconds: float = math.inf) -> bool:
        """Stop it; its exports are gone, and say so. Return False if requests of its clients have
        not finished within `seconds`."""
        server, self.nbd = self.nbd, None
        if server is None:
            return True
        mine = [e for e in self.exports.values() if isinstance(e, NbdExport)]
        with self._turn.apart():
            ended = server.stop(seconds)
        for export in mine:
            self._export_gone(export)
        return ended

    def add_export(self, disk: Disk, name: str, *, writable: bool = True) -> NbdExport:
        """Offer a disk under its name on the running NBD server."""
        assert self.nbd is not None
        return self.offer(NbdExport(name, disk, name=name, writable=writable))

    def offer(self, export: NbdExport) -> NbdExport:
        """Put an export on the running NBD server. Raises `CowferryError`."""
        assert self.nbd is not None
        self.graph.hold(export.disk, export.writable)
        try:
            self.nbd.add(export)
        except BaseException:
            self.graph.unhold(export.disk, export.writable)
            raise
        self.exports[export.id] = export
        for bitmap in export.bitmaps:
            bitmap.busy = f"export '{export.id}'"
        return export

    def _export_gone(self, export: Export) -> None:
        """Told once, however many ways lead here: a hard delete and a stop may meet."""
        if self.exports.get(export.id) is export:
            del self.exports[export.id]
            self.graph.unhold(export.disk, export.writable)
            for bitmap in export.bitmaps:
                bitmap.busy = ""
            self.events.emit("BLOCK_EXPORT_DELETED", {"id": export.id})

    def drop_export(self, export: Export, wait: bool = False) -> None:
        """Withdraw an export, in the background unless `wait`: its clients may take a moment.

        Raises `DeviceInUse` if their requests do not finish in time; it goes on in the background
        then."""
        export.shutting_down = True

        def drop() -> None:
            if isinstance(export, NbdExport) and self.nbd is not None:
                self.nbd.remove(export, force=True)
            else:
                export.stop(force=True)
            self._export_gone(export)

        dropping = threading.Thread(target=drop, name="export stop", daemon=True)
        dropping.start()
        if wait or not export.users:
            with self._turn.apart():
                dropping.join(CLIENTS_SECONDS)
            if dropping.is_alive():
                raise DeviceInUse(
                    f"export '{export.id}' is withdrawn, but requests of its clients have not "
                    f"finished within {CLIENTS_SECONDS:g} s",
                    "their storage, or a server, does not answer",
                )

    # Jobs --------------------------------------------------------------------------------

    def _job_event(self, name: str, data: dict[str, Any]) -> None:
        self.events.emit(name, data)
        if name in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") and data["type"] == "stream":
            job = self.jobs.spoken_of(data["device"])
            device = self.device_of(job) if job is not None else data["device"]
            old = {"device": device, "len": data["len"], "offset": data["offset"]}
            if name == "BLOCK_JOB_CANCELLED":
                return  # the discussion: a cancelled stream returns from its command instead
            if "error" in data:
                old["error"] = data["error"]
            self.events.emit("BLOCK_STREAM_COMPLETED", old)

    def device_of(self, job: Job) -> str:
        """The name of the disk that a job runs on."""
        disk = self.works_on.get(job)
        return disk.name if disk is not None else job.id

    def job_on(self, device: str) -> Job | None:
        """The first of `jobs_on`."""
        return next(iter(self.jobs_on(device)), None)

    def jobs_on(self, device: str) -> list[Job]:
        """The job with that id, then those that run on that disk or node (several, if they are
        backups), and last those that are over and that nobody has dismissed yet."""
        named = self.jobs.get(device)
        found = [] if named is None else [named]
        for job in self.jobs.all():
            disk = self.works_on.get(job)
            if disk is not None and job is not named and device in (disk.name, disk.root.name):
                found.append(job)
        return sorted(found, key=lambda j: j is not named and j.status is Status.CONCLUDED)

    def cancel_on(self, device: str) -> None:
        """Call off the jobs on a disk and wait until they are over (`--force`).

        Not to be called in one's turn. Raises `DeviceInUse` for a job that does not stop."""
        jobs = self.jobs_on(device)
        for job in jobs:
            with contextlib.suppress(CowferryError):
                job.cancel(force=True)
        for job in jobs:
            if not job.wait(STOPPING):
                raise DeviceInUse(
                    f"job '{job.id}' on '{device}' was cancelled and has not stopped yet",
                    "some I/O of it hangs; it stops when that returns",
                )

    # Monitors ----------------------------------------------------------------------------

    def execute(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Run a QMP command. Raises `CowferryError`."""
        from cowferry.commands import execute

        late = f"'{name}' has not finished"
        with self.answering(), Scope(COMMAND_SECONDS, late) as scope:
            with self._idle:
                self._scopes.add(scope)
                if self._closing.is_set():
                    scope.call_off("the daemon is stopping")
            try:
                return execute(self, name, arguments)
            except CalledOff as error:
                raise CowferryError(
                    error.strerror or str(error), "its storage, or a server, does not answer"
                ) from error
            finally:
                with self._idle:
                    self._scopes.discard(scope)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """A command runs inside, and its answer gets on its way: the end of the daemon waits for
        that for a moment."""
        with self._idle:
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    @contextmanager
    def turn(self, patience: float = -1.0) -> Iterator[None]:
        """Hold the turn: no other command looks at the graph or changes it meanwhile.

        `patience`: seconds to wait for the turn, if not negative. Raises `CowferryError` when they
        are over, and when the daemon ends."""
        if not self._turn.acquire(timeout=patience):
            raise CowferryError("other commands kept the daemon busy for too long", "try again")
        try:
            if self._closed:
                raise CowferryError("the daemon is stopping")
            yield
        finally:
            self._turn.release()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Give the turn away inside, in order to wait for storage, a server, guests or a job.

        What the caller knows of the graph may have changed afterwards, unless it has claimed it.
        Raises `CowferryError` afterwards if the daemon has begun to end meanwhile."""
        with self._turn.apart():
            yield
        if self._closed:
            raise CowferryError("the daemon is stopping")

    @contextmanager
    def at_end(self, let_go: Callable[[], None]) -> Iterator[None]:
        """If the daemon ends meanwhile, `let_go` is called before the exports are closed."""
        self._letting_go.append(let_go)
        try:
            yield
        finally:
            self._letting_go.remove(let_go)

    def human(self, line: str, errors: bool = False) -> str:
        """Run a line of the human monitor, and return what it prints.

        With `errors`, raise that as a `CowferryError` if the line failed."""
        from cowferry.monitor import hmp

        said = hmp.run(self, line)
        if errors and said.failed:
            raise CowferryError(said.text.rstrip("\n"))
        return said.text

    def schema(self) -> list[dict[str, Any]]:
        """The QAPI introspection of everything that is registered."""
        from cowferry.monitor.schema import schema

        return schema()

    # Life --------------------------------------------------------------------------------

    def _tick(self) -> None:
        refined = time.monotonic()
        while not self._closing.wait(FLUSH_EVERY):
            if time.monotonic() - refined >= REFINE_EVERY:
                self.refine()
                refined = time.monotonic()
            for disk in self.graph.all_disks():
                if disk.root.unflushed:
                    self._chores.do(disk, partial(_flush, disk))
                if disk.late:
                    self._chores.do((disk, "late"), disk.do_late)

    def refine(self) -> None:
        """Bitmap files that say much more than the bitmaps do say the same again.

        A node that a job fills is left alone: the job's writes are not held up by these drains."""
        for node in self.graph.every_node():
            keeper = None if node.filter else node.keeper
            filled = not all(held.served for held in self.graph.holders(node))
            if keeper is None or keeper.coarse < COARSE or filled:
                continue
            self._chores.do(node, partial(self._refine, node, keeper))

    def _refine(self, node: Node, keeper: Keeper) -> None:
        try:
            node.flush()  # most of what is flushed inside the drain
            with contextlib.ExitStack() as drained:
                for disk in in_order(self.graph.disks_above(node)):
                    drained.enter_context(disk.exclusive())
                keeper.checkpoint()
        except OSError as error:
            log.error("the bitmaps of '%s' stay coarse: %s", node.filename, error)

    @property
    def ending(self) -> bool:
        """Whether it is about to close: what is called off now may be gone on with."""
        return self._closing.is_set()

    def quit(self) -> None:
        """Ask for the end; whoever runs the daemon calls `close`."""
        self.stopped.set()

    def stop(self, force: bool, seconds: float) -> list[str]:
        """Ask for the end, once no client is connected to an export any more; with `force` at once.
        Return the ids of the jobs that will be cancelled.

        Raises `DeviceInUse` if clients are still connected after `seconds`, because their I/O would
        fail."""
        until = time.monotonic() + seconds
        while not force:
            users = {e.id: e.clients() for e in list(self.exports.values()) if e.users}
            if not users:
                break
            if time.monotonic() >= until:
                named = "; ".join(f"'{id}': {', '.join(who)}" for id, who in users.items())
                running = ", ".join(f"'{job.id}'" for job in self._active())
                raise DeviceInUse(
                    f"clients are connected, whose I/O would fail: {named}"
                    + (f"; jobs that run would be cancelled: {running}" if running else ""),
                    "shut the guests down first, or disconnect them; use drain to wait for them, "
                    "or force",
                )
            if self.stopped.wait(LOOK / 5):
                break
        ids = [job.id for job in self._active()]
        self.quit()
        return ids

    def _active(self) -> list[Job]:
        """The jobs that are not over."""
        over = (Status.CONCLUDED, Status.NULL)
        return [job for job in self.jobs.all() if job.status not in over]

    def close(self) -> None:
        """End in order. Raises the first `OSError` met while flushing."""
        self._turn.acquire()
        before, self._closed = self._closed, True
        self._turn.release()
        if before:
            return
        until = time.monotonic() + END_SECONDS

        def left(reserved: float = CLOSE_SECONDS) -> float:
            return max(until - reserved - time.monotonic(), 0.1)

        with self._idle:
            self._closing.set()
            for scope in self._scopes:
                scope.call_off("the daemon is stopping")
        ends = [
            threading.Thread(target=let_go, name="end", daemon=True)
            for let_go in list(self._letting_go)
        ]
        for end in ends:
            end.start()
        for end in ends:
            end.join(left())
        with self._idle:  # those that fail now put things back, and those that are over answer
            self._idle.wait_for(lambda: not self._running, min(ANSWER_SECONDS, left()))
        with self._given_up():
            late = [f"job '{job.id}'" for job in self.jobs.shutdown(left() / 2)]
            if not self.stop_nbd(left()):
                late.append("requests of clients")
            self._ticker.join(left())
            if not self._chores.end(left()):
                late.append("a flush")
            try:
                late += self.graph.close(left(reserved=0))
            finally:
                self.unfinished = late
                if late:
                    log.error("the daemon ends without waiting for what hangs: %s", ", ".join(late))
                    self.events.emit("X_STOP_UNFINISHED", {"what": late})
        self.events.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """What a server does not answer for long is given up meanwhile, so that it ends."""
        nodes = [*self.graph.every_node(), *self.graph.closing]
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK):
                for node in nodes:
                    node.abort(HUNG)

        looking = threading.Thread(target=look, name="give up", daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join()


def _flush(disk: Disk) -> None:
    try:
        disk.flush()
    except OSError as error:
        log.error("disk '%s' cannot be flushed: %s", disk.name, error)
