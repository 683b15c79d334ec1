"""Which image is current: small durable records of the moments when a disk moved to another one.

When a disk's root is switched (a snapshot, a pivot of a mirror, the end of an active commit), the
image that is left gets a record beside it, `IMAGE.moved`, *before* the first write can go to the
new one. So from what is on disk alone it is decidable, whoever crashed and whenever:

    no record    the image itself is current
    a record     the image it names is current, unless that one has a newer record

Records carry a generation, which grows along the way, so a disk that moves there and back is told
right while both records are still there. A group of disks moves as one: its records are void
until a decision file, named in all of them, exists; that file's rename is the moment.

While a commit runs, its base and the layers that it skips are no good by themselves: they hold
part of what was above them. `IMAGE.committing` says so from before the first write until the end
is durable (C2).

Images that are not plain files (devices, remote disks) have their records in the state folder:
`$COWFERRY_STATE`, else `/var/lib/cowferry` for root and `$XDG_STATE_HOME/cowferry` for others.

Everything here is durable on return and raises `OSError`. One caller at a time for each image.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from typing import Any, NamedTuple
from urllib.parse import quote

from cowferry.block import sysio

MOVED, COMMITTING = ".moved", ".committing"


class Move(NamedTuple):
    """A disk leaves one image for another; both are named as one opens them."""

    disk: str
    left: str
    current: str
    format: str


class Current(NamedTuple):
    """What `follow` found: the image to open, its format if a record said so, its generation."""

    path: str
    format: str | None
    generation: int


def state_folder() -> str:
    """Where records lie that cannot lie beside their image."""
    given = os.environ.get("COWFERRY_STATE")
    if given:
        return given
    if os.geteuid() == 0:
        return "/var/lib/cowferry"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(home, "cowferry")


def place(image: str, suffix: str) -> str:
    """The path of an image's record."""
    if os.path.isfile(image) and not image.startswith(("/dev/", "/proc/")):
        return os.path.realpath(image) + suffix
    return os.path.join(state_folder(), quote(image, safe="") + suffix)


def record(moves: list[Move]) -> None:
    """All of the disks move, or none of them."""
    records: dict[str, dict[str, Any]] = {}
    for m in moves:
        here, there = place(m.left, MOVED), place(m.current, MOVED)
        known = [r["generation"] for r in (_load(here), _load(there)) if r is not None]
        records[here] = {
            "disk": m.disk,
            "current": os.path.realpath(m.current) if os.path.exists(m.current) else m.current,
            "format": m.format,
            "generation": max(known, default=0) + 1,
        }
    if len(records) == 1:
        for path, body in records.items():
            _store(path, body)
        return
    decision = f"{next(iter(records))}-{secrets.token_hex(8)}"
    for path, body in records.items():
        _store(path, {**body, "group": decision})
    _store(decision, {"disks": [m.disk for m in moves]})  # this is the moment
    for path, body in records.items():
        _store(path, body)
    _remove(decision)


def settled(image: str) -> None:
    """`image` is current: an older record that says otherwise goes."""
    with contextlib.suppress(OSError):
        _remove(place(image, MOVED))


def follow(image: str, format: str | None = None) -> Current:
    """The current image of the disk that once was in `image`."""
    generation = 0
    while True:
        body = _load(place(image, MOVED))
        if body is None or body["generation"] <= generation:
            return Current(image, format, generation)
        image, format, generation = body["current"], body["format"], body["generation"]


def committing(image: str, top: str) -> None:
    """From now on `image` is no good without `top` (C2)."""
    _store(place(image, COMMITTING), {"top": top})


def committed(image: str) -> None:
    """`image` is good by itself again."""
    _remove(place(image, COMMITTING))


def half_committed(image: str) -> str | None:
    """The image whose commit into `image` was begun and not finished, if there is one."""
    body = _load(place(image, COMMITTING))
    return None if body is None else str(body.get("top"))


def _load(path: str) -> dict[str, Any] | None:
    """A record that counts, or None. A torn one cannot be: they are renamed into place."""
    try:
        with open(path, encoding="utf-8") as f:
            body = json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OSError(f"the record '{path}' is damaged: {error}") from error
    group = body.get("group")
    return body if group is None or os.path.exists(group) else None


def _store(path: str, body: dict[str, Any]) -> None:
    folder = os.path.dirname(path)
    if folder == state_folder():
        os.makedirs(folder, exist_ok=True)
    fresh = f"{path}.{secrets.token_hex(4)}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            sysio.pwrite(fd, json.dumps(body, indent=1).encode() + b"\n", 0)
            sysio.fdatasync(fd)
        finally:
            os.close(fd)
        sysio.rename(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    sysio.flush_directory(folder)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        sysio.unlink(path)
        sysio.flush_directory(os.path.dirname(path))
