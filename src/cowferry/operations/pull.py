"""A pull backup: disks exported read-only over NBD as they were at one moment, while guests write.

    guest -> disk's root <- scratch overlay -> export

The overlay keeps what the guest overwrites (a backup job with sync none), and shows the rest of the
moment through the root. Its file has no name any more as soon as it is open, so that whatever ends
the daemon, nothing stays behind.

A bitmap is bound to the same moment: what it says then is what the export offers. It is not
cleared yet, neither in memory nor on disk, for the backup may fail, or the daemon crash: the job
counts apart what is written from the moment on, and only if the backup ends well is that what the
bitmap says.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from cowferry.block import spill, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.drivers import opening
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.exports.nbd import NbdExport
from cowferry.jobs.job import valid_id
from cowferry.jobs.states import Status
from cowferry.operations import bitmaps, wait_for_disk
from cowferry.operations.backup import (
    Hold,
    Start,
    all_dirty,
    check_before,
    check_scratch,
    check_source,
    node_named,
    opened_before,
)
from cowferry.operations.transaction import Transaction

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

STOPPING = 60.0  # seconds that a job may take to end


class Wanted(NamedTuple):
    """A disk, and the name of its export. `base` is the backup before, from which the bitmap has
    to count."""

    device: str
    name: str
    base: str | None = None
    base_format: str | None = None


class Kept(Start):
    """One disk of a pull backup."""

    def __init__(
        self,
        daemon: Daemon,
        so_far: Transaction,
        wanted: Wanted,
        job_id: str,
        *,
        bitmap: Bitmap | None,
        first: bool,
        anew: bool,
        scratch: str | None,
        on_cbw_error: str,
    ) -> None:
        self.device, self.name = wanted.device, wanted.name
        self.first = first
        self.frozen: Bitmap | None = None  # the bitmap as it was at the moment
        self.export: NbdExport | None = None
        disk = daemon.graph.disk(wanted.device)
        check_scratch(disk, scratch)
        held = Hold(daemon, disk, job_id, bitmap)
        overlay: Node | None = None
        try:
            if wanted.base is not None:
                _check_base(daemon, wanted, wanted.base, bitmap)
            overlay = _scratch(daemon, disk, scratch)
            super().__init__(
                daemon, so_far, disk, overlay, held, sync="none",
                bitmap_mode="on-success" if anew else "never", adopted=True, lasting=False,
                on_cbw_error=on_cbw_error,
            )  # fmt: skip
        except BaseException:
            held.withdraw()
            if overlay is not None:
                daemon.graph.let_go(overlay)
            raise

    def settle(self) -> None:
        super().settle()
        if self.bitmap is not None:
            self.frozen = self.bitmap.copy()

    def offer(self) -> None:
        """Export it. Raises `CowferryError`."""
        if self.daemon.nbd is None:
            raise CowferryError("NBD server not running", "start it with nbd-server-start")
        export = NbdExport(
            self.job_id,
            self.target,
            name=self.name,
            writable=False,
            description=f"{self.device} as it was at the moment of backup {self.job_id}",
            bitmaps=() if self.frozen is None else (self.frozen,),
        )
        self.export = self.daemon.offer(export)

    def close(self) -> None:
        """Let go of the overlay, if its export was there longer than its job."""
        with contextlib.suppress(OSError, CowferryError):  # full, perhaps; nobody needs it any more
            self.daemon.graph.let_go(self.target.root)

    @property
    def over(self) -> bool:
        """Whether the moment is lost."""
        return self.job.status in (Status.ABORTING, Status.CONCLUDED, Status.NULL)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the scratch file has on the host."""
        file = self.target.root.file
        fd = getattr(file, "fd", -1)
        try:
            return os.fstat(fd).st_blocks * 512 if fd >= 0 else 0
        except OSError:  # it has just been closed
            return 0


class Pull:
    """One pull backup. `parts` is empty while it begins."""

    def __init__(self, id: str, parts: list[Kept]) -> None:
        self.id = id
        self.parts = parts


def begin(
    daemon: Daemon,
    id: str,
    disks: list[Wanted],
    *,
    bitmap: str | None = None,
    anew: bool = True,
    scratch: str | None = None,
    on_cbw_error: str = "break-snapshot",
) -> Pull:
    """Export the disks as they are now. Raises `CowferryError`; then nothing has begun."""
    if not valid_id(id):
        raise CowferryError(f"Invalid backup id '{id}'", "a letter, then letters, digits, -._")
    if id in daemon.pulls:
        raise DeviceInUse(
            f"Backup '{id}' is going on already",
            "end it with x-backup-export-end, or give yours another id",
        )
    if daemon.nbd is None:
        raise CowferryError("NBD server not running", "start it with nbd-server-start")
    parts: list[Kept] = []
    daemon.pulls[id] = begun = Pull(id, [])
    try:
        with Transaction(daemon, "backup") as so_far:
            for wanted in disks:
                part = _part(daemon, so_far, wanted, id, bitmap, anew, scratch, on_cbw_error)
                parts.append(part)
                so_far.parts.append(part)
            so_far.finish()
        begun.parts = parts
        for part in parts:
            part.offer()
    except BaseException:
        for part in begun.parts:
            _withdraw(daemon, part)
            with contextlib.suppress(CowferryError):  # it has just ended
                part.job.cancel()
        del daemon.pulls[id]
        raise
    return begun


def _part(
    daemon: Daemon, so_far: Transaction, wanted: Wanted, id: str, bitmap: str | None, anew: bool,
    scratch: str | None, on_cbw_error: str,
) -> Kept:  # fmt: skip
    """One disk of the backup `id`. Raises `CowferryError`."""
    wait_for_disk(daemon, wanted.device, scratch, wanted.base)
    job_id = f"{id}-{wanted.device}"
    if daemon.nbd is None:
        raise CowferryError("NBD server not running", "start it with nbd-server-start")
    if job_id in daemon.exports:
        raise CowferryError(f"Block export id '{job_id}' is already in use")
    daemon.nbd.check_name(wanted.name)
    source = node_named(daemon, wanted.device)
    check_source(daemon, daemon.graph.disk(wanted.device), wanted.device, None)
    found, first = _bitmap(daemon, so_far, source, wanted.device, bitmap, anew)
    if wanted.base is not None and found is None:
        raise CowferryError(
            f"base '{wanted.base}' is given without a bitmap",
            "name the bitmap that counts from that backup",
        )
    return Kept(
        daemon, so_far, wanted, job_id, bitmap=found, first=first, anew=anew, scratch=scratch,
        on_cbw_error=on_cbw_error,
    )  # fmt: skip


def _check_base(daemon: Daemon, wanted: Wanted, base: str, bitmap: Bitmap | None) -> None:
    """Raise `CowferryError` unless the bitmap counts from the backup in the file `base`."""
    before = opened_before(daemon, base, wanted.base_format)
    try:
        check_before(daemon, before, bitmap, wanted.device, unsafe=False)
    finally:
        daemon.graph.let_go(before)


def _bitmap(
    daemon: Daemon, so_far: Transaction, source: Node, device: str, name: str | None, anew: bool
) -> tuple[Bitmap | None, bool]:
    """The bitmap, and whether it begins now."""
    if name is None:
        return None, False
    found = bitmaps.find(source, name, so_far)
    if found is None:
        if not anew:
            raise bitmaps.not_found(f"Bitmap '{name}' of '{device}' could not be found", [source])
        added = all_dirty(so_far, device, name)
        so_far.parts.append(added)
        return added.bitmap, True
    bitmaps.check_usable(source, found, changing=anew)
    return found, False


def end(daemon: Daemon, id: str, failed: bool) -> None:
    """Withdraw everything. Raises `CowferryError` if a moment was lost; all is withdrawn then, too,
    and the bitmaps keep every bit."""
    with daemon.turn():
        found = daemon.pulls.get(id)
        if found is None:
            known = ", ".join(daemon.pulls) or "none"
            raise CowferryError(f"Backup '{id}' not found", f"there are: {known}")
        if not found.parts:
            raise DeviceInUse(f"Backup '{id}' is just beginning", "try again in a moment")
        del daemon.pulls[id]
    for part in found.parts:
        _withdraw(daemon, part)
    # Now that nobody reads any more: either all of them were kept until now, or none ends well.
    lost = [part for part in found.parts if part.over or part.job.broke is not None]
    for part in found.parts:
        if part in lost:
            continue  # it ends by itself
        if failed or lost:
            with contextlib.suppress(CowferryError):  # it has just ended
                part.job.cancel()
        else:
            part.job.suffice()
    for part in found.parts:
        if not part.job.wait(STOPPING):
            raise DeviceInUse(f"job '{part.job_id}' has not stopped yet", "some I/O of it hangs")
        part.close()
    lost = lost or [part for part in found.parts if part.job.error and not failed]
    if lost:
        names = ", ".join(f"'{part.device}' ({part.job.error or 'cancelled'})" for part in lost)
        raise CowferryError(
            f"the moment of backup '{id}' was lost on {names}",
            "what was read of it is no good; the disks are intact, the bitmaps keep every bit: "
            "begin a new one",
        )


def _withdraw(daemon: Daemon, part: Kept) -> None:
    export, part.export = part.export, None
    if export is not None and daemon.exports.get(export.id) is export:
        daemon.drop_export(export, wait=True)


def _scratch(daemon: Daemon, disk: Disk, folder: str | None) -> Node:
    """An empty image that has no name. Raises `CowferryError`."""
    folder = folder or spill.beside(disk.root.filename)
    with daemon.apart():
        try:
            fd, path = tempfile.mkstemp(".qcow2", ".cowferry-scratch-", folder)
        except OSError as error:
            raise CowferryError(
                f"no scratch file can be made in '{folder}': {error.strerror}",
                "name another folder for it",
            ) from error
        os.close(fd)
    node: Node | None = None
    try:
        with daemon.apart():
            opening.create_image(path, "qcow2", disk.size, {}, goal=True)
        node = daemon.graph.adopt({**opening.image_options(path, "qcow2"), "backing": None})
    finally:
        try:
            with daemon.graph.turn.apart():
                sysio.unlink(path)
        except BaseException:
            if node is not None:
                daemon.graph.let_go(node)
            raise
    return node
