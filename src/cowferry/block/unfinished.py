"""A copy to a raw image that is not finished, and can be gone on with after a crash.

A raw image cannot say which of its parts it has, and while the copy runs the disk goes on changing
in its source. So two things are kept as long as the copy is not finished:

* beside the target, `TARGET.copying`: the source, and the name of
* a persistent dirty bitmap of the source, which says what the target lacks. It is kept like any
  other (`block/keeper.py`): a guest's write is marked in it, durably where it was clean, whether or
  not a job runs, and also after a restart, before anybody has thought of the copy.

The bitmap begins with all bits set. Now and then a *checkpoint* lets it follow the job: the target
is flushed, then the bits go of what was copied before. So at every moment a bit that is clear on
disk means bytes that are on the target's disk, and going on costs what was copied since the last
checkpoint, no more.

The order of things, at each of which the power may fail:

    begin     the target, empty; the bitmap, durable; the record. Without the record nobody goes on
    rest      the target, with its time of change; the record says that: who writes the target
              then is noticed. Who crashed could not say the time: then a part is looked at
    go on     the record without the time
    end       the record of a pivot, if there is one, after which the target is the disk; then our
              record goes, then the bitmap. A bitmap without a record costs its upkeep, no more
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import stat

from cowferry.block import keeper, moves, names, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node, read, read_fully
from cowferry.errors import CowferryError

log = logging.getLogger(__name__)

PROBES = 256  # places that are looked at before a copy is gone on with
GRANULARITY = 64 << 10  # bytes: what is copied again is worth no more bits


class Unfinished:
    """The copy of `source` to the raw image `target`, from its beginning to its end."""

    def __init__(self, source: Node, target: str, bitmap: Bitmap, resumed: bool) -> None:
        self.source = source
        self.target = target
        self.bitmap = bitmap
        self.resumed = resumed  # `bitmap` says what is left; else everything is

    def checkpoint(self, dirty: Bitmap) -> None:
        """The target lacks, durably, what `dirty` says and nothing else. Inside a drain.

        Raises `OSError`, which does no harm: more will be copied again than has to, then."""
        left = Bitmap("", self.bitmap.size, self.bitmap.granularity)
        left.merge(dirty)
        self.bitmap.replace(left.bits)
        if self.source.keeper is not None:
            self.source.keeper.checkpoint()

    def record(self, mtime_ns: int = 0) -> None:
        """Have it on record that there is this copy; see `moves.copying`. Raises `OSError`."""
        target, bitmap = self.target, self.bitmap
        moves.copying(
            target, self.source.filename, bitmap.name, bitmap.size, names.identity(target), mtime_ns
        )

    def rest(self) -> None:
        """Nobody writes the target any more, and the copy is not finished."""
        self.bitmap.busy = ""
        try:
            self.record(_changed(self.target))
        except OSError as error:  # it may go on saying that the target is being written
            log.warning("'%s': when it was written last is not on record: %s", self.target, error)

    def over(self) -> None:
        """The copy is finished, or nobody wants it. The source is not written just now.

        Raises `OSError`, `CowferryError`; what is left behind then costs room, no more."""
        moves.copied(self.target)
        if self.source.bitmaps.get(self.bitmap.name) is self.bitmap:
            forget(self.source, self.bitmap.name)


def name_of(target: str) -> str:
    """The name of the source's bitmap for a target."""
    return keeper.COPY + hashlib.sha256(os.path.realpath(target).encode()).hexdigest()[:12]


def _changed(target: str) -> int:
    """The time of change of a file that nobody writes, durably; 0 of a device."""
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            sysio.fsync(fd)
            return os.fstat(fd).st_mtime_ns
        return 0
    finally:
        os.close(fd)


def _as_left(disk: Disk, target: str, bitmap: Bitmap) -> bool:
    """Whether some of what the target has, here and there, is what the disk has.

    A raw image has no mark of its own that would go when somebody else writes it (a logical volume
    that was used for something else, say). Raises `OSError`."""
    count, size = len(bitmap.bits), bitmap.granularity
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for number in random.sample(range(count), min(count, PROBES)):
            at = number * size
            n = min(size, bitmap.size - at)
            ours, theirs = bytearray(n), bytearray(n)
            with disk.exclusive(at, n):
                if bitmap.any(at, n):
                    continue
                read(disk.root, memoryview(ours), at)
                read_fully(fd, memoryview(theirs), at)
            if ours != theirs:
                return False
        return True
    finally:
        os.close(fd)


def forget(source: Node, name: str) -> None:
    """Remove a bitmap of the source. Inside a drain, or when nobody writes it."""
    before = source.bitmaps
    source.bitmaps = {k: v for k, v in before.items() if k != name}
    try:
        keeper.changed(source)
    except BaseException:
        source.bitmaps = before
        raise


def begin(disk: Disk, target: str) -> Unfinished:
    """The target was just made. Durable on return. Raises `OSError`, `CowferryError`."""
    source, name = disk.root, name_of(target)
    bitmap = Bitmap(name, disk.size, GRANULARITY)
    bitmap.set(0, disk.size)
    bitmap.busy = "copy"
    source.flush()  # most of what is flushed inside the drain
    with disk.exclusive():
        if name in source.bitmaps:
            forget(source, name)
        keeper.keep(source, bitmap)
    made = Unfinished(source, target, bitmap, resumed=False)
    try:
        made.record()
    except BaseException:
        with disk.exclusive():
            made.over()
        raise
    return made


def find(disk: Disk, target: str) -> Unfinished | None:
    """The copy to `target` that was not finished, if there is one.

    Raises `CowferryError` if there is one, and it cannot be told what it lacks."""
    try:
        body = moves.half_copied(target)
    except OSError as error:
        raise CowferryError(
            f"'{target}': the record of a copy to it cannot be read: {error.strerror or error}",
            f"'{disk.name}' is intact; to begin anew, copy it to another place",
        ) from error
    if body is None or not os.path.exists(target):
        return None

    def refused(why: str) -> CowferryError:
        return CowferryError(
            f"'{target}' holds a part of a copy, and which part is not known: {why}",
            f"'{disk.name}' is intact; to begin anew, copy it to another place. (The record "
            f"'{moves.place(target, moves.COPYING)}' marks '{target}' as incomplete)",
        )

    source = disk.root
    there = names.is_uri(source.filename) or os.path.exists(source.filename)
    if not there or names.real(source.filename) != body["source"]:
        raise refused(f"it is one of '{body['source']}', and '{disk.name}' is not there any more")
    if names.identity(target) != body["inode"]:
        raise refused("another image was put in its place")
    held = disk.size
    if os.path.isfile(target):
        held = -(-os.path.getsize(target) // 512) * 512  # a raw disk has whole sectors
    if body["size"] != disk.size or held != disk.size:
        raise refused(f"it was of {body['size']} bytes, and the disk has {disk.size}")
    bitmap = source.bitmaps.get(str(body["bitmap"]))
    if bitmap is None or not bitmap.persistent:
        raise refused(f"bitmap '{body['bitmap']}' of '{source.filename}' is gone")
    if bitmap.inconsistent:
        why = bitmap.reason or "inconsistent"
        raise refused(f"bitmap '{bitmap.name}' of '{source.filename}': {why}")
    if body.get("mtime_ns", 0) not in (0, _changed(target)) or not _as_left(disk, target, bitmap):
        raise refused("another program has written there since")
    found = Unfinished(source, target, bitmap, resumed=True)
    if "mtime_ns" in body:
        found.record()
    bitmap.busy = "copy"
    return found
