"""Where copies and backups go: files that are made here, files that exist, devices, exports."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cowferry.block import identity, names, origin, sysio
from cowferry.block.node import Node
from cowferry.drivers import EXTENSIONS, OVERLAYS, fdsets, opening
from cowferry.errors import CowferryError, NotSupported

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.daemon import Daemon


def create(
    path: str, format: str, size: int, like: Node, backing: Node | None, made: list[str],
    *, goal: bool = True,
) -> None:  # fmt: skip
    """Make the image over `backing`, with the permissions of `like`, and of its shape if it has
    the same format. Add a file that was not there to `made`. `goal`: a disk has yet to move there.
    Raises `CowferryError`."""
    if os.path.exists(path) and os.path.isfile(path) and os.path.getsize(path):
        raise CowferryError(
            f"'{path}' exists", "remove it, or use mode=existing to have it overwritten"
        )
    options: dict[str, Any] = {}
    if format in OVERLAYS:
        if like.driver == format:
            options |= getattr(like, "geometry", {"cluster_size": like.granule})
        if backing is not None:
            below = names.absolute(backing.filename)
            options |= {"backing_file": below, "backing_fmt": backing.driver}
            if os.path.dirname(below) == os.path.dirname(os.path.abspath(path)):
                options["backing_file"] = os.path.basename(below)
    existed = os.path.exists(path)
    opening.create_image(path, format, size, options, goal=goal, like=origin.of_node(like))
    if not existed:
        made.append(path)


def opened(
    daemon: Daemon, path: str, format: str, backing: Node | None, made: list[str],
    size: int, node_name: str | None = None,
) -> Node:  # fmt: skip
    """Open it, over `backing` and nothing else. Raises `CowferryError`; then what was `made` is
    removed."""
    options = opening.image_options(path, format)
    if node_name is not None:
        options["node-name"] = node_name
    if format == "raw":
        if is_there(path):
            options["size"] = size  # it may be larger
    else:
        options["backing"] = backing.name if backing is not None else None
    try:
        return daemon.graph.adopt(options, explicit=node_name is not None)
    except BaseException:
        unmake(made)
        raise


def is_there(path: str) -> bool:
    """Whether it is there already, and of a size of its own: a device, or an export of a server."""
    return names.is_uri(path) or (os.path.exists(path) and not os.path.isfile(path))


def format_by_name(target: str) -> str | None:
    """The format that a new image's name says. What a server exports is the disk: raw."""
    if names.is_uri(target):
        return "raw"
    return EXTENSIONS.get(os.path.splitext(target)[1].lower())


def unmake(made: list[str]) -> None:
    """Remove what was made."""
    while made:
        path = made.pop()
        if os.path.exists(path):
            sysio.unlink(path)


def check_path(refusal: str, disk: Disk, path: str, hint: str = "") -> None:
    """Raise `CowferryError` if a write to what is at `path`, or to a file made there, would change
    a byte that the disk reads. To be asked before it is made or opened; `refusal` begins the error.

    A URI passes: ask `check_node` once the export is open, before it is written."""
    places = identity.of_path(fdsets.path_of(path))
    identity.check_apart(refusal, path, places, layers(disk), hint)


def check_node(refusal: str, disk: Disk, node: Node) -> None:
    """Raise `CowferryError` if a write to an open node would change a byte that the disk reads."""
    identity.check_apart(refusal, node.filename, identity.of_node(node), layers(disk))


def check_folder(refusal: str, disk: Disk, folder: str) -> None:
    """Raise `CowferryError` if files made in a folder would be stored inside the disk itself."""
    identity.check_apart(refusal, folder, identity.of_folder(folder), layers(disk))


def layers(disk: Disk) -> list[identity.Layer]:
    """All that a disk lies in, for `identity.check_apart`."""
    return identity.layers(disk.root, f"disk '{disk.name}'", disk.store)


def check_backing(target: Node, backing: Node | None) -> None:
    """Raise unless the target can show what lies below it, now and when it is opened again."""
    if backing is None or target.backing is not None:
        return
    if target.driver in ("raw", "file"):
        raise NotSupported(
            f"'{target.filename}' is a {target.driver} image, which has no backing file: what is "
            "not copied would read as zeroes",
            "use sync=full, or a qcow2 target",
        )
    if target.backing_spec is not None:
        recorded = target.backing_spec[0]
        if not opening.leads_to(target.filename, recorded, backing.filename):
            raise CowferryError(
                f"'{target.filename}' names another backing file: '{recorded}'",
                f"make it over '{backing.filename}', which is not copied",
            )
    else:
        target.check_backing(names.absolute(backing.filename), backing.driver)
