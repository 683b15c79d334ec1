"""Lineage: which backup an image is, and from which backup a dirty bitmap counts.

An increment holds what its bitmap says. It restores the right bytes only over the very backup from
which the bitmap counts, and only as long as that backup reads as it did. So each backup that begins
or continues a bitmap has an *id*, drawn at its moment:

* the image has it as its *stamp*, together with the id of the backup below it (its parent);
* the bitmap has it (`Bitmap.since`) from the moment on at which it counts from that backup, durably
  and together with its bits (`block/keeper.py`).

An increment is refused unless the two agree. A disk that was rolled back has its bitmaps rolled
back with it, in the image or in the file beside it. They then count from an older backup, and say
so.

**The stamp of a qcow2 image** (version 3) is a header extension under an autoclear bit of our own
(`drivers/qcow2/stamp.py`). It stays with the image wherever that is moved or copied. Each program
that opens the image for writing clears the bit, cowferry included.

**The stamp of any other image** is a record beside it, `IMAGE.backup` (of a device or an export in
the state folder). It says the size, a checksum of some places, and of a file the identity and the
time of change. The same file with another time of change was written. Another file is a copy, and a
device has no such time: then the checksum decides, which may miss a small change.

The order of things, at each of which the power may fail: the backup is durable, then its stamp,
then the bitmap with both its new bits and the id. Before that last step the bitmap has every bit,
and the old id.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import stat
import time
from typing import Any, NamedTuple

from cowferry.block import moves, names, sysio
from cowferry.block.node import Node, chain, read
from cowferry.errors import CowferryError, NotSupported

ID = 16  # bytes: 6 of the time in milliseconds, and 10 that are random
NONE = bytes(ID)
PLACES, PLACE = 1024, 4096  # of an image that is looked at, and bytes of each


class Stamp(NamedTuple):
    """What an image says of itself: which backup it is, and over which it was made.

    `written`: it says so, but was written since."""

    id: bytes
    parent: bytes = NONE
    written: bool = False

    def packed(self) -> bytes:
        """As an image has it."""
        return self.id + self.parent


def new_id() -> bytes:
    """Draw the id of a backup."""
    return int(time.time() * 1000).to_bytes(6, "big") + secrets.token_bytes(ID - 6)


def when(id: bytes) -> str:
    """The local time at which an id was drawn, for a person; two backups may be of one second."""
    seconds, milliseconds = divmod(int.from_bytes(id[:6], "big"), 1000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{milliseconds:03}"


def unpacked(data: bytes, written: bool = False) -> Stamp | None:
    """The stamp in the bytes of an image; None if they are none."""
    if len(data) != 2 * ID or not any(data[:ID]):
        return None
    return Stamp(data[:ID], data[ID:], written)


# Stamps of images -----------------------------------------------------------------------------


def stamp(node: Node, made: Stamp) -> None:
    """Record durably which backup an image is. It was flushed, and nobody writes it any more: where
    the record is beside it, the image becomes read-only, so that it does not change when it is
    closed.

    Raises `OSError`, `CowferryError`."""
    if node.stamps:
        try:
            node.write_stamp(made.packed())
            moves.no_backup(node.filename)
            return
        except NotSupported:  # its header is full
            pass
    if not node.read_only:
        node.reopen(True)
    body: dict[str, Any] = {
        "id": made.id.hex(), "parent": made.parent.hex(), "size": node.size,
        "sample": _sample(node, made.id),
    }  # fmt: skip
    moves.backed_up(node.filename, body | _file(node.filename, durable=True))


def stamp_of(node: Node) -> Stamp | None:
    """Return the stamp of an open image, if it has one. Raises `OSError`."""
    found, valid = node.read_stamp()
    in_image = unpacked(found, written=not valid)
    body = None if in_image is not None and valid else moves.backup_of(node.filename)
    if body is None:
        return in_image
    try:
        ids = bytes.fromhex(body["id"] + body["parent"])
        found_stamp = unpacked(ids)
        if found_stamp is None:
            return None
        now = _file(node.filename)
        same = body["size"] == node.size
        if same and now and now["inode"] == body.get("inode"):
            same = now["mtime_ns"] == body.get("mtime_ns")
        elif same:
            same = body["sample"] == _sample(node, found_stamp.id)
    except (KeyError, TypeError, ValueError) as error:
        raise OSError(f"the record of backup '{node.filename}' is damaged: {error}") from error
    return found_stamp._replace(written=not same)


def _file(path: str, durable: bool = False) -> dict[str, Any]:
    """What tells a file from others, and since when it is as it is; nothing of a device."""
    if names.is_uri(path) or not os.path.isfile(path):
        return {}
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if durable:
            sysio.fsync(fd)  # or the file might lose its time of change
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            return {}
        return {"inode": names.version(fd) << 64 | st.st_ino, "mtime_ns": st.st_mtime_ns}
    finally:
        os.close(fd)


def _sample(node: Node, seed: bytes) -> str:
    """A checksum of some places of an image, which depend on the backup. Raises `OSError`."""
    count = -(-node.size // PLACE)
    found = hashlib.sha256()
    buf = memoryview(bytearray(PLACE))
    for number in sorted(random.Random(seed).sample(range(count), min(count, PLACES))):
        n = min(PLACE, node.size - number * PLACE)
        read(node, buf[:n], number * PLACE)
        found.update(buf[:n])
    return found.hexdigest()


# Binding ----------------------------------------------------------------------------------------


def check(base: Node, since: bytes, bitmap: str, disk: str, hint: str) -> bytes:
    """Return the id of the backup `base`, over which an increment by a bitmap is to be laid.

    Raises `CowferryError` unless the bitmap counts from that backup, and the backup and all that it
    lies over are as they were made. Raises `OSError`."""
    if not since:
        raise CowferryError(
            f"bitmap '{bitmap}' of '{disk}' does not say from which backup it counts",
            "another program or an older version of cowferry began it, or it was cleared or "
            f"disabled; make a full backup with this bitmap; {hint}",
        )
    wanted, above, first = since, "", b""
    for node in chain(base):
        found = stamp_of(node)
        name = node.filename
        if found is None:
            raise CowferryError(
                f"'{name}'{above} does not say which backup it is",
                "a backup without a bitmap made it, or another program has written it since: make "
                f"a full backup; {hint}",
            )
        if found.written:
            raise CowferryError(
                f"'{name}'{above} was opened for writing since the backup of {when(found.id)} was "
                "made",
                f"an increment over it may restore wrong bytes: make a full backup; {hint}",
            )
        if found.id != wanted and node is base:
            raise CowferryError(
                f"bitmap '{bitmap}' of '{disk}' counts from the backup of {when(wanted)}, and "
                f"'{name}' is that of {when(found.id)}",
                f"name the backup from which the bitmap counts, or make a full one; {hint}",
            )
        if found.id != wanted:
            raise CowferryError(
                f"'{name}'{above} is the backup of {when(found.id)}, and not that of "
                f"{when(wanted)}, over which the increment was made",
                f"restore the chain of backups as it was; {hint}",
            )
        first = first or found.id
        wanted, above = found.parent, f", on which '{name}' lies,"
        if wanted == NONE:
            break
    else:
        raise CowferryError(
            f"the backup of {when(wanted)}, on which '{name}' lies, is missing",
            f"restore the chain of backups as it was; {hint}",
        )
    return first
