"""Which image is current: small durable records of the moments when a disk moved to another one.

When a disk's root is switched (a snapshot, a pivot of a mirror, the end of an active commit), the
image that is left gets a record beside it, `IMAGE.moved`, *before* the first write can go to the
new one. So from what is on disk alone it is decidable, whoever crashed and whenever:

    no record    the image itself is current
    a record     what `follow` finds from the image that it names

A disk that comes back to an image it has left closes a circle; the record of the image it comes
to is removed once the new one is durable. A power cut between the two leaves the circle, and then
the record with the highest generation was the last move: each is higher than all that can be
reached from the two images it is about. What is recorded of another disk, that had an image under
the new name once, is removed before.

A group of disks moves as one: its records are void until a decision file, named in all of them,
exists; that file's rename is the moment. What could not be made durable is made void again before
the error is told, so that a disk which goes on in its old image is not contradicted by a record.

While a commit runs, its base and the layers that it skips are no good by themselves: they hold
part of what was above them. `IMAGE.committing` says so from before the first write until the end
is durable (C2); beside layers that were skipped, for good. A commit that ends badly before it has
changed a byte of the base removes it again. It is about that very file: another one that is made
under the name later is not meant.

A disk at the beginning of a larger device has its size in the record of its move. When it is
resized there, `DEVICE.size` in the state folder says the new size.

While a copy to a raw image runs that can be gone on with after a crash (`block/unfinished.py`),
`IMAGE.copying` beside it says so, and which bitmap of the source tells what it lacks.

Images that are not plain files (devices, remote disks), and those in a folder where we may not
write, have their records in the state folder: `$COWFERRY_STATE`, else `/var/lib/cowferry` for
root and `$XDG_STATE_HOME/cowferry` for others.

Everything here is durable on return and raises `OSError`. One caller at a time for each image.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from cowferry.block import names, origin, sysio
from cowferry.block.origin import Origin
from cowferry.errors import reason

log = logging.getLogger(__name__)

MOVED, COMMITTING, COPYING, SIZE = ".moved", ".committing", ".copying", ".size"
BACKUP = ".backup"  # of an image that is a backup: which one (`block/lineage.py`)
MAX_NAME = 200  # characters of a record's name in the state folder
LONGEST = 255  # bytes of a file's name
NEW = 9  # bytes that a record's name has in addition while it is being written


class Move(NamedTuple):
    """A disk leaves one image for another; both are named as one opens them.

    `size` in bytes if the disk is the beginning of something larger (a device). `origin` is the
    image by whose name the disk was opened, if that is known."""

    disk: str
    left: str
    current: str
    format: str
    size: int | None = None
    origin: str = ""


class Current(NamedTuple):
    """What `follow` found: the image to open, its format if a record said so, its generation.

    `size` as in `Move`."""

    path: str
    format: str | None
    generation: int
    size: int | None = None


class _Step(NamedTuple):
    """One record on the way from an image to the current one."""

    left: str
    generation: int
    current: str
    format: str
    size: int | None


def state_folder() -> str:
    """Where records lie that cannot lie beside their image."""
    given = os.environ.get("COWFERRY_STATE")
    if given:
        return given
    if os.geteuid() == 0:
        return "/var/lib/cowferry"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(home, "cowferry")


def places(image: str, suffix: str) -> list[str]:
    """Where an image's record may lie: beside it, if it is a file, or in the state folder."""
    name = _named(image)
    text = quote(os.fsencode(name), safe="")
    if len(text) > MAX_NAME:
        text = hashlib.sha256(text.encode()).hexdigest()
    apart = os.path.join(state_folder(), text + suffix)
    elsewhere = name.startswith(("/dev/", "/proc/")) or names.is_uri(name)
    # An image may have been handed over as a descriptor, out of a folder that is closed to us.
    elsewhere = elsewhere or not os.access(os.path.dirname(name), os.X_OK)
    elsewhere = elsewhere or len(os.fsencode(os.path.basename(name) + suffix)) + NEW > LONGEST
    return [apart] if elsewhere else [name + suffix, apart]


def place(image: str, suffix: str) -> str:
    """The one of its `places` that can be written."""
    found = places(image, suffix)
    beside = os.access(os.path.dirname(found[0]), os.W_OK | os.X_OK)
    return found[0] if beside else found[-1]


def record(moves: list[Move]) -> None:
    """All of the disks move, or none of them: on an error no record says that they did."""
    files = [os.path.abspath(m.current) for m in moves if not names.is_uri(m.current)]
    for folder in sorted({os.path.dirname(path) for path in files}):
        if os.access(folder, os.R_OK | os.X_OK):  # a name that may vanish is none to lead to
            sysio.flush_directory(folder)
    for m in moves:
        _forget_others(m)
        _forget_size(m.current)
    images = [i for m in moves for i in (m.left, m.current)]
    generation = max((s.generation for i in images for s in _steps(i)), default=0) + 1
    bodies = {m.left: _body(m, generation) for m in moves}
    if len(bodies) == 1:
        for left, body in bodies.items():
            _mark(left, MOVED, body)
    else:
        _record_together(bodies, [m.disk for m in moves])
    with contextlib.suppress(OSError):  # this only tidies up: `follow` tells it right already
        for m in moves:
            settled(m.current)
        for m in moves:
            _shorten(m, generation)


def _body(m: Move, generation: int) -> dict[str, Any]:
    return {
        "disk": m.disk,
        "current": _named(m.current),
        "format": m.format,
        "generation": generation,
        **({} if m.size is None else {"size": m.size}),
    }


def _shorten(m: Move, generation: int) -> None:
    """Let the name by which a disk is opened lead straight to it: whoever makes another image
    under a name in between takes nothing from the way."""
    if m.origin and _named(m.origin) not in (_named(m.left), _named(m.current)):
        steps = list(_steps(m.origin))
        if len(steps) > 1 and follow(m.origin).path == _named(m.current):
            _mark(m.origin, MOVED, _body(m, generation), undo=False)


def _forget_others(m: Move) -> None:
    """What is recorded of `m.current`, but not of this disk, is about an older image there."""
    if all(_named(s.current) != _named(m.left) for s in _steps(m.current)):
        settled(m.current)
    top = half_committed(m.current)
    if top is not None and _named(top) != _named(m.left):
        committed(m.current)


def _record_together(bodies: dict[str, dict[str, Any]], disks: list[str]) -> None:
    first = next(iter(bodies))
    decision = f"{place(first, MOVED)}-{secrets.token_hex(8)}"
    stored: list[str] = []
    try:
        for left, body in bodies.items():
            stored.append(_mark(left, MOVED, {**body, "group": decision}))
        _store(decision, {"disks": disks}, origin.beside(first))  # this is the moment
    except BaseException:
        for path in stored:
            _void(path)
        raise
    with contextlib.suppress(OSError):  # decided: an error from here on changes nothing
        for left, body in bodies.items():
            _mark(left, MOVED, body, undo=False)
        _remove(decision)


def settled(image: str) -> None:
    """`image` is current: an older record that says otherwise goes."""
    for path in places(image, MOVED):
        _remove(path)


def fresh(image: str) -> None:
    """There is a new image under this name: records of an older one go.

    The last one is that of a move: as long as it is there it leads to the disk of the old image."""
    committed(image)
    copied(image)
    no_backup(image)
    _forget_size(image)
    settled(image)


def apart(copy: str, disk: str) -> None:
    """A finished copy of the disk in the image `disk` is an image of its own: what is recorded of
    an older one goes. But a name that leads to the disk goes on leading there, or another one that
    leads there by way of it would end at the copy."""
    if _named(follow(copy).path) == _named(disk):
        log.warning("'%s' is a copy, but as a name it goes on meaning the disk it once was", copy)
        committed(copy)
        _forget_size(copy)
    else:
        fresh(copy)


def follow(image: str, format: str | None = None) -> Current:
    """The current image of the disk that once was in `image`.

    Raises `OSError` for a damaged record, which names it."""
    steps = list(_steps(image))
    if not steps:
        return Current(image, format, 0)
    last = steps[-1]
    started = [i for i, s in enumerate(steps) if names.real(s.left) == _named(last.current)]
    if started:  # a circle: its youngest record was the last move
        last = max(steps[started[0] :], key=lambda s: s.generation)
    size = last.size
    if size is not None and (resized := _load(last.current, SIZE)) is not None:
        size = int(resized["size"])
    return Current(last.current, last.format, last.generation, size)


def resized(image: str, size: int) -> None:
    """The disk at the beginning of the device or export `image` has `size` bytes from now on.

    The records of its move there say the size that it had then. There may be several, under names
    that this process does not know, so the new size stands in a record of its own."""
    _mark(image, SIZE, {"size": size, "generation": 1}, undo=False)


def _forget_size(image: str) -> None:
    """What `resized` recorded is about another disk, or an older state of this one."""
    for path in places(image, SIZE):
        _remove(path)


def committing(image: str, top: str) -> None:
    """From now on `image` is no good without `top` (C2)."""
    body: dict[str, Any] = {"top": _named(top), "generation": 1}
    if os.path.isfile(image):
        # Handed over by its descriptor it may be closed to us: then whatever has its name is meant.
        with contextlib.suppress(PermissionError):
            body["image"] = names.identity(image)
    _mark(image, COMMITTING, body, undo=False, own="mark")


def committed(image: str) -> None:
    """`image` is good by itself again."""
    for path in places(image, COMMITTING):
        _remove(path)


def half_committed(image: str) -> str | None:
    """The image whose commit into `image` was begun and not finished, if there is one.

    An active commit is finished by the record of its move, whether or not the mark is gone. And
    the mark of an older file that had the name says nothing."""
    for path in places(image, COMMITTING):
        body = _read(path)
        if body is not None and not _replaced(image, path, body):
            top = str(body.get("top"))
            return None if _named(follow(top).path) == _named(image) else top
    return None


def _replaced(image: str, path: str, body: dict[str, Any]) -> bool:
    """Whether another file was put under the name since it was marked. If the mark is another
    file than then, too, both were copied together, and it counts."""
    if "image" not in body or not os.path.isfile(image):
        return False
    try:
        return body["image"] != names.identity(image) and body.get("mark") == names.identity(path)
    except PermissionError:
        return False


def copying(image: str, source: str, bitmap: str, size: int, inode: int, mtime_ns: int = 0) -> None:
    """From now on `image`, of `size` bytes, lacks what `bitmap` of the image `source` says.

    `mtime_ns` is its time of change, if nobody is writing it any more; 0 for a device."""
    body = {"source": _named(source), "bitmap": bitmap, "size": size, "inode": inode}
    body |= {"mtime_ns": mtime_ns} if mtime_ns else {}
    _mark(image, COPYING, {**body, "generation": 1}, undo=False)


def copied(image: str) -> None:
    """`image` lacks nothing, or is of no use."""
    for path in places(image, COPYING):
        _remove(path)


def half_copied(image: str) -> dict[str, Any] | None:
    """What `copying` recorded, if that copy was not finished; a pivot finishes it."""
    body = _load(image, COPYING)
    if body is None:
        return None
    return None if _named(follow(str(body.get("source"))).path) == _named(image) else body


def backed_up(image: str, body: dict[str, Any]) -> None:
    """Record which backup `image` is."""
    _mark(image, BACKUP, {**body, "generation": 1}, undo=False)


def backup_of(image: str) -> dict[str, Any] | None:
    """What `backed_up` recorded."""
    return _load(image, BACKUP)


def no_backup(image: str) -> None:
    """`image` is another one than the backup that had the name."""
    for path in places(image, BACKUP):
        _remove(path)


def _named(image: str) -> str:
    return os.path.realpath(image) if os.path.exists(image) else image


def _steps(image: str) -> Iterator[_Step]:
    """The records on the way from `image`, each once."""
    seen: set[str] = set()
    while _named(image) not in seen:
        seen.add(_named(image))
        body = _load(image, MOVED)
        if body is None:
            return
        yield _Step(image, body["generation"], body["current"], body["format"], body.get("size"))
        image = body["current"]


def _load(image: str, suffix: str) -> dict[str, Any] | None:
    """The record that counts, or None."""
    found = [body for path in places(image, suffix) if (body := _read(path)) is not None]
    return max(found, key=lambda body: int(body["generation"]), default=None)


def _read(path: str) -> dict[str, Any] | None:
    """A record, or None if it is not there or void. A torn one cannot be: it was renamed there."""
    try:
        with open(path, encoding="utf-8") as f:
            body = json.load(f)
        if not isinstance(body, dict):
            raise ValueError("it is no object")
        group = body.get("group")
        if body.get("void") or (group is not None and _read(group) is None):
            return None
        if "disks" not in body and not isinstance(body.get("generation"), int):
            raise ValueError("it has no generation")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise OSError(errno.EIO, f"the record '{path}' is damaged: {error}") from error
    return body


def _mark(image: str, suffix: str, body: dict[str, Any], undo: bool = True, own: str = "") -> str:
    """Write a record of `image`, with the image's permissions. Return its path. See `_store`."""
    path = place(image, suffix)
    _store(path, body, origin.beside(image), undo, own)
    return path


def _store(path: str, body: dict[str, Any], like: Origin, undo: bool = True, own: str = "") -> None:
    """Write and rename into place. On an error, which names it, the record is the old one, or void.

    Without `undo` it is the old or the new one. As `own` it says which file it is itself."""
    try:
        _replace(path, body, like, undo, own)
    except OSError as error:
        text = f"the record '{path}' cannot be written: {reason(error)}"
        raise OSError(error.errno, text) from error


def _replace(path: str, body: dict[str, Any], like: Origin, undo: bool, own: str) -> None:
    folder = os.path.dirname(path)
    if folder == state_folder():
        make_folder(folder)
    new = f"{path}.{secrets.token_hex(4)}"
    fd = sysio.create(new, os.O_WRONLY | os.O_EXCL | os.O_NOFOLLOW, like)
    renamed = False
    try:
        if own:
            body = {**body, own: names.identity(new)}
        sysio.pwrite(fd, json.dumps(body, indent=1).encode() + b"\n", 0)
        sysio.fdatasync(fd)
        sysio.rename(new, path)
        renamed = True
        sysio.flush_directory(folder)
    except BaseException:
        if not renamed:
            with contextlib.suppress(OSError):
                sysio.unlink(new)
        elif undo:
            _void(path)
        raise
    finally:
        os.close(fd)


def make_folder(folder: str) -> None:
    """Make a folder for records, with those above it, each durably in its own."""
    if not os.path.isdir(folder):
        above = os.path.dirname(os.path.abspath(folder))
        make_folder(above)
        os.makedirs(folder, exist_ok=True)
        sysio.flush_directory(above)


def _void(path: str) -> None:
    """A record whose name may or may not be durable says nothing any more, either way."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # in place and within its length, so that no name has to change for it
            length = os.fstat(fd).st_size
            sysio.pwrite(fd, b'{"void": true}'.ljust(length), 0)
            sysio.fdatasync(fd)
        finally:
            os.close(fd)
        _remove(path)
    except OSError as error:
        log.critical("the record '%s' must not be there, and cannot be removed: %s", path, error)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        sysio.unlink(path)
        sysio.flush_directory(os.path.dirname(path))
