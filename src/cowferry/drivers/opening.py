"""Opening images: from options, from a path, and down a backing chain.

This is the only place where one image leads to another, and so the only place where an
image could talk us into opening something that its owner did not mean. Hence:

* a backing string is followed only with the format recorded beside it; a missing format is
  an error with the command that repairs it, never a guess (CVE-2008-2004 and its heirs);
* a backing string is a path. `json:...` and `proto:...` are refused (CVE-2024-4467), and an image
  that an NBD server gives us names no files of ours at all;
* a recorded data file is followed if it is a plain name in the image's own folder; one that
  lies elsewhere has to be named by whoever opens the image;
* a chain that comes back to a file already in it is refused by device and inode;
* if anything fails, everything opened on the way is closed again.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from cowferry.block import identity, keeper, moves, names
from cowferry.block.node import Node, chain
from cowferry.drivers import MAX_DEPTH, Common, driver, partial
from cowferry.drivers.formats import format_of
from cowferry.drivers.making import create_image, new_image
from cowferry.errors import CowferryError, ImageError

CHILDREN = ("file", "data-file")
Lookup = Callable[[str], Node]
Opened = Callable[[Node, Mapping[str, Any]], None]

PROTOCOL = re.compile(r"^[A-Za-z0-9_+.-]+:")  # a colon before any slash


def typed(struct: type[Common], options: Mapping[str, Any], driver_name: str) -> Common:
    """The driver's typed options. "on"/"off" and numbers in strings (keyval) are taken too.

    Raises `CowferryError` naming the option."""
    plain = {k: v for k, v in options.items() if k not in (*CHILDREN, "backing")}
    for field in _fields(struct):
        value = plain.get(field.encode_name)
        if field.type in (bool, bool | None):
            plain[field.encode_name] = _flag(value)
        elif field.encode_name in ("cache", "overlap-check") and isinstance(value, Mapping):
            plain[field.encode_name] = {k: _flag(v) for k, v in value.items()}
        if value is None:
            plain.pop(field.encode_name, None)
    known = {field.encode_name for field in _fields(struct)}
    for key in plain:
        if key not in known:
            raise CowferryError(
                f"Parameter '{key}' is unexpected", f"driver '{driver_name}' has no such option"
            )
    try:
        return msgspec.convert(plain, struct, strict=False)
    except msgspec.ValidationError as error:
        found = re.search(r"`([^`]+)`$", str(error))
        if "missing required field" in str(error) and found:
            raise CowferryError(f"Parameter '{found[1]}' is missing") from None
        where = re.search(r"\$\.([\w.-]+)", str(error))
        name = where[1] if where else "options"
        words = _words(struct, name)
        if words and isinstance(plain.get(name), str):
            raise CowferryError(
                f"Parameter '{name}' does not accept value '{plain[name]}'",
                f"it takes {', '.join(words)}",
            ) from None
        raise CowferryError(f"Parameter '{name}' of driver '{driver_name}': {error}") from None


@cache
def _fields(struct: type[Common]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Found out once: it takes as long as all the rest of opening a file."""
    return msgspec.structs.fields(struct)


def _words(struct: type[Common], name: str) -> list[str]:
    """The words that an option takes, if it takes any."""

    def of(kind: Any) -> list[str]:
        if get_origin(kind) is Literal:
            return list(get_args(kind))
        return [word for part in get_args(kind) for word in of(part)]

    return [w for f in _fields(struct) if f.encode_name == name for w in of(f.type)]


def _flag(value: Any) -> Any:
    return {"on": True, "off": False}.get(value, value) if isinstance(value, str) else value


class Absent(Node):
    """An external data file that is not opened, because only headers are looked at."""

    driver = "file"
    read_only = True

    def __init__(self, name: str) -> None:
        self.filename = name
        self.is_device = False

    def pread(self, buf: memoryview, offset: int) -> None:
        raise OSError(errno.EBADF, f"'{self.filename}' was not opened")


def open_node(
    options: Mapping[str, Any], lookup: Lookup | None = None, opened: Opened | None = None,
    *, headers: bool = False,
) -> Node:  # fmt: skip
    """The node that `blockdev-add`'s options describe, its children and its backing chain.

    A child given as a string is looked up by name, and stays its owner's. `opened` hears of
    every node opened here, children first, with the options it was opened from. With `headers` no
    external data file is opened: read-only, for the headers of the chain. Raises `CowferryError`;
    then nothing stays open."""
    made: list[Node] = []
    try:
        node = _open(options, lookup, made, opened, headers)
        share = _flag(options.get("force-share")) is True
        _follow(node, lookup, made, opened, share, headers)
    except BaseException:
        for m in reversed(made):
            m.close()
        raise
    return node


def open_image(
    path: str,
    format: str | None = None,
    *,
    read_only: bool = False,
    backing: bool = True,
    force_share: bool = False,
    opened: Opened | None = None,
    headers: bool = False,
    **more: Any,
) -> Node:
    """Open the image at `path`, with its backing chain (read-only) unless `backing` is False.

    The format is given or follows from the name (`format_of`). `more` are further driver options
    (`data_file="path"`, `lazy_refcounts=True`); `headers` as in `open_node`. Raises
    `CowferryError`."""
    options = image_options(path, format, read_only=read_only, force_share=force_share)
    for key, value in more.items():
        key = key.replace("_", "-")
        if key == "data-file" and isinstance(value, str):
            value = {**file_options(value), **_common(read_only, force_share)}
        options[key] = value
    if not backing:
        options["backing"] = None
    return open_node(options, opened=opened, headers=headers)


def current_image(path: str, format: str | None = None) -> tuple[str, str | None]:
    """The image that a disk which once was in `path` is in now, and its format if that is known.

    It follows the records of moves (`block/moves.py`). Raises `ImageError` if the image is no good
    by itself, because a commit into it, or a copy to it, was begun and not finished (C2)."""
    path = canonical(path)
    try:
        now = moves.follow(path, format)
    except OSError as error:
        raise ImageError(
            f"'{path}': which image is current cannot be told: {error.strerror or error}",
            "the images are as they were; look at the records beside them (*.moved)",
        ) from error
    if now.path != path and not os.path.exists(now.path) and now.path.startswith("/"):
        raise ImageError(
            f"the disk in '{path}' has moved to '{now.path}', which is not there",
            f"put it back; or, if '{path}' holds all of it again, remove "
            f"'{moves.place(path, moves.MOVED)}'",
        )
    check_whole(now.path)
    return now.path, now.format


def check_whole(path: str) -> None:
    """Raise `ImageError` if the image is no good by itself: a commit into it, or a copy to it, was
    begun and not finished (C2)."""
    try:
        top = moves.half_committed(path)
        copied = moves.half_copied(path)
    except OSError as error:
        raise ImageError(
            f"'{path}': cannot tell whether it is complete: {error.strerror or error}",
            "nothing was changed; the records beside it must be readable",
        ) from error
    if top is not None:
        raise ImageError(
            f"'{path}' cannot be used by itself: a commit of '{top}' may have changed it, or an "
            "image below it",
            f"'{top}' still reads as before: open it or an image over it, and run the commit again "
            "if it was not finished; after a finished commit the images between are of no use",
        )
    if copied is not None:
        raise ImageError(
            f"'{path}' holds an unfinished copy of '{copied['source']}'",
            f"open '{copied['source']}', and copy it to '{path}' again: the copy continues from "
            f"there. The record '{moves.place(path, moves.COPYING)}' marks '{path}' as incomplete: "
            "without the record, cowferry would take it for a complete image",
        )


def canonical(name: str) -> str:
    """A URI as the node over its export is called; a path as it is. Raises `CowferryError`."""
    if names.is_uri(name):
        from cowferry.drivers import nbd_link

        return nbd_link.canonical(name)
    return name


def file_options(path: str) -> dict[str, Any]:
    """The options of the protocol node for a host path, or for a URI. Raises `CowferryError`."""
    if names.is_uri(path):
        from cowferry.drivers import nbd

        return nbd.options_of(path)
    return {"driver": "file", "filename": path}


def _common(read_only: bool, force_share: bool) -> dict[str, Any]:
    return {"read-only": read_only, "force-share": force_share}


def image_options(
    path: str, format: str | None = None, *, read_only: bool = False, force_share: bool = False
) -> dict[str, Any]:
    """blockdev-add options for an image file, or an export that a URI names.

    Raises `ImageError` if its format is unclear."""
    common = _common(read_only, force_share)
    return {
        "driver": format or format_of(path),
        **common,
        "file": {**file_options(path), **common},
    }


def close_chain(node: Node | None) -> None:
    """Close `node` and all its backing nodes; the first error is raised after all were tried."""
    first: BaseException | None = None
    for n in list(chain(node)):
        try:
            n.close()
        except (OSError, CowferryError) as error:
            first = first or error
    if first is not None:
        raise first


def backing_path(image: str, recorded: str) -> str:
    """Where a recorded backing name leads, seen from the image that records it.

    Raises `ImageError` for anything that is not a plain path, and for an image that a server gave
    us: it would have us open files of its choice."""
    if names.is_uri(image):
        raise ImageError(
            f"'{image}': its backing file '{recorded[:200]}' is not followed, for the image is an "
            "NBD server's",
            "name the backing file with the option backing, or open the image without it "
            "(backing=null)",
        )
    if names.is_uri(recorded):
        raise ImageError(
            f"'{image}': its backing file '{recorded[:200]}' is an export, which is not followed "
            "because an image says so",
            "blockdev-add opens the image with that export, or another image, as its backing",
        )
    if PROTOCOL.match(recorded):
        raise ImageError(
            f"'{image}': its backing file '{recorded[:200]}' is not a plain path",
            "cowferry never follows json: and protocol names inside an image; a file with a colon "
            "in its name is ./NAME; name the backing file with rebase -u -b FILE -F FORMAT",
        )
    return os.path.join(os.path.dirname(image), recorded)


class Header(NamedTuple):
    """What an image records: its external data file, by its path, and its backing file."""

    data_file: str | None
    spec: tuple[str, str | None] | None


def _look(path: str, format: str | None) -> Header | None:
    """Read a header, beside whatever has the image open; None if that cannot be done.

    A server is not asked: some end when their first client leaves."""
    if names.is_uri(path):
        return None
    try:
        node = open_image(
            path, format, read_only=True, backing=False, force_share=True, headers=True
        )
    except (CowferryError, OSError):
        return None
    data, spec = getattr(node, "data", None), node.backing_spec
    node.close()
    if not isinstance(data, Absent):
        return Header(None, spec)
    return Header(os.path.join(os.path.dirname(path), data.filename), spec)


def data_file_of(path: str, format: str | None) -> str | None:
    """The path of the external data file that an image records, if it can be told."""
    header = _look(path, format)
    return header.data_file if header is not None else None


def check_circle(image: str, recorded: str, format: str | None) -> None:
    """Raise `ImageError` if `image`, with that backing file, would be a file of the chain below it.

    The files are compared by what they are. Only headers are read, and only as far as they can be:
    what is not there yet, or cannot be read, ends the search. `image` need not be there."""
    places = identity.of_path(image) if os.path.exists(image) else []

    def check(path: str, through: str) -> None:
        pairs = ((a, b) for a in places for b in identity.of_path(path))
        if names.same(path, image) or any(
            identity.meet(a, b) for a, b in pairs if not (a.within or b.within)
        ):
            way = f": '{through}' leads back to it" if through != image else ""
            raise ImageError(
                f"'{image}' cannot be its own backing file{way}", "nothing was changed"
            )

    above, seen = image, set[str]()
    while len(seen) < MAX_DEPTH:
        try:
            path = backing_path(above, recorded)
        except CowferryError:
            return
        check(path, above)
        if path in seen:
            return
        seen.add(path)
        header = _look(path, format)
        if header is None:
            return
        if header.data_file is not None:
            check(header.data_file, path)
        if header.spec is None:
            return
        spec = header.spec
        above, (recorded, format) = path, spec


def leads_to(image: str, recorded: str, filename: str) -> bool:
    """Whether the backing name that `image` records means the image `filename`.

    A URI is compared here, and never followed."""
    try:
        if names.is_uri(recorded):
            return canonical(recorded) == filename
        return names.same(backing_path(image, recorded), filename)
    except CowferryError:
        return False


def _beside(image: str, recorded: str) -> str | None:
    """The path of a file recorded in `image`, if it lies in the same folder."""
    if names.is_uri(image):
        return None
    folder = os.path.realpath(os.path.dirname(os.path.abspath(image)))
    path = os.path.join(os.path.dirname(image), recorded)
    inside = os.path.dirname(os.path.realpath(path)) == folder
    return path if inside and not PROTOCOL.match(recorded) else None


def _open(
    options: Mapping[str, Any], lookup: Lookup | None, made: list[Node], opened: Opened | None,
    headers: bool = False,
) -> Node:  # fmt: skip
    name = options.get("driver")
    if not isinstance(name, str):
        raise CowferryError("Parameter 'driver' is missing")
    cls = driver(name)
    given = typed(cls.Options, options, name)
    _check_together(given)
    children: dict[str, Node] = {}
    for key in CHILDREN:
        child = options.get(key)
        if child is None:
            continue
        if isinstance(child, str):
            if lookup is None:
                raise CowferryError(f"Cannot find device='' nor node-name='{child}'")
            children[key] = lookup(child)
        elif isinstance(child, Mapping):
            children[key] = _open({**_inherited(options), **child}, lookup, made, opened)
        else:
            raise CowferryError(f"Invalid parameter type for '{key}', expected: object or string")
    for key, child in children.items():
        if not cls.filter:  # several limits of one disk are as good as one
            _check_limits(child, name, key)
        if child.backing_spec is not None and not cls.filter:
            raise ImageError(
                f"'{child.filename}' has a backing file; no '{key}' of a '{name}' node may",
                "open it by itself",
            )
    try:
        for key, recorded in cls.companions(children).items():
            path = _beside(children["file"].filename, recorded)
            if headers:
                children[key] = Absent(recorded)
            elif path is not None:
                below = {**_inherited(options), **file_options(path)}
                children[key] = _open(below, lookup, made, opened)
        node = cls.open(given, children)
    except OSError as error:
        where = getattr(given, "filename", None) or _name(children)
        raise ImageError(
            f"Could not open '{where}': {error.strerror or error}",
        ) from error
    node.ignores_discard = given.discard in ("ignore", "off")
    node.detects_zeroes = "" if given.detect_zeroes == "off" else given.detect_zeroes
    node.name = given.node_name or ""
    node.lent = frozenset(key for key in CHILDREN if isinstance(options.get(key), str))
    if not node.filename:
        node.filename = _name(children)
    made.append(node)
    keeper.attach(node, given.repair)
    backing = options.get("backing", "")
    if backing is None or (isinstance(backing, Mapping) and not backing):
        node.backing_refused = backing is None
    elif isinstance(backing, Mapping):
        node.backing = _open({"read-only": True, **backing}, lookup, made, opened, headers)
        _follow(node.backing, lookup, made, opened, given.force_share, headers)
    elif isinstance(backing, str) and backing:
        if lookup is None:
            raise CowferryError(f"Cannot find device='' nor node-name='{backing}'")
        node.backing = lookup(backing)
    if node.backing is not None:
        _check_limits(node.backing, name, "backing")
        partial.check_bare(node.backing)
    if opened is not None:
        opened(node, options)
    return node


def _inherited(options: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for the files of an image, too, unless they say otherwise."""
    common = ("read-only", "auto-read-only", "force-share", "cache")
    return {k: options[k] for k in common if options.get(k) is not None}


def _check_together(given: Common) -> None:
    """Raise `CowferryError` for options of every node that contradict each other."""
    if given.discard in ("ignore", "off") and given.detect_zeroes == "unmap":
        raise CowferryError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to "
            "unmap",
            "say discard=unmap, or detect-zeroes=on",
        )


def _check_limits(child: Node, driver_name: str, role: str) -> None:
    """Raise `CowferryError` if a node is to lie where it limits nobody."""
    if child.throttle_group:
        raise CowferryError(
            f"A throttle node cannot be the '{role}' of a '{driver_name}' node: it limits the disk "
            "over it, and there is none",
            'put it on top: {"driver": "throttle", "throttle-group": ..., "file": {...}}',
        )


def _name(children: Mapping[str, Node]) -> str:
    return children["file"].filename if "file" in children else ""


def _follow(
    node: Node, lookup: Lookup | None, made: list[Node], opened: Opened | None, share: bool,
    headers: bool,
) -> None:  # fmt: skip
    """Open what the headers ask for, from `node` down. Iterative: chains may be long.

    With `share` beside whoever writes there, as the image above."""
    seen: identity.Index[Node] = identity.Index()
    depth = 0
    for n in chain(node):
        seen.add(_local(n), n)
        depth += 1
    while True:
        for last in chain(node):
            node = last
        if node.backing_spec is None or node.backing_refused:
            return
        recorded, format = node.backing_spec
        path = backing_path(node.filename, recorded)
        if not format:
            raise ImageError(
                f"'{node.filename}' does not record the format of its backing file '{recorded}'",
                f"record it: cowferry rebase -u -b '{recorded}' -F raw|qcow2|qed '{node.filename}'",
            )
        if format == "file" or format == "host_device":
            format = "raw"
        try:
            options = image_options(path, format, read_only=True, force_share=share)
            below = _open(options, lookup, made, opened, headers)
        except CowferryError as error:
            raise ImageError(
                f"Could not open backing file of '{node.filename}': {error.desc}",
                error.hint
                or "the overlay itself is intact; put the file back, or point the overlay at "
                f"its new place: cowferry rebase -u -b FILE -F {format} '{node.filename}'",
            ) from error
        depth += 1
        again = next(seen.find(_local(below)), None)
        if again is not None or depth > MAX_DEPTH:
            reason = "its backing chain comes back to it" if again is not None else "chain too long"
            raise ImageError(f"'{below.filename}': {reason} (through '{node.filename}')")
        seen.add(_local(below), below)
        node.backing = below


def _local(node: Node) -> list[identity.Place]:
    """The places of a node over local files. Of an export nothing is compared: its server may let
    several of its exports stand on one image."""
    bottom = node
    while bottom.file is not None:
        bottom = bottom.file
    return identity.of_node(node) if bottom.fd >= 0 else []


__all__ = [
    "backing_path",
    "close_chain",
    "create_image",
    "file_options",
    "image_options",
    "new_image",
    "open_image",
    "open_node",
    "typed",
]
