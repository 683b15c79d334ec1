"""`cowferry rebase`: another backing file, with the same content or without looking."""

from __future__ import annotations

import os

import click

from cowferry.block.node import Node, read
from cowferry.cli.offline import image
from cowferry.drivers import opening, partial
from cowferry.errors import CowferryError, ImageError

STEP = 1 << 20


@click.command("rebase")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("-u", "unsafe", is_flag=True, help="Only change the name in the header.")
@click.option("-b", "backing", metavar="FILE", help='New backing file, or "".')
@click.option("-F", "backing_format", metavar="FMT", help="Its format.")
@click.option(
    "--complete", is_flag=True, help="FILENAME, a raw image, holds all of it: its .filling is lost."
)
@click.option("-p", "show_progress", is_flag=True, help="Taken for compatibility.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-t", "cache", metavar="MODE", help="Taken for compatibility.")
@click.option("-T", "source_cache", metavar="MODE", help="Taken for compatibility.")
@click.argument("filename")
def rebase_command(
    format: str | None, unsafe: bool, backing: str | None, backing_format: str | None,
    complete: bool, show_progress: bool, quiet: bool, cache: str | None, source_cache: str | None,
    filename: str,
) -> int:  # fmt: skip
    """Let FILENAME have another backing file.

    Without -u what FILENAME reads as does not change: what differs between the old and the new
    backing file is first copied into it. With -u only the name changes, which is right if the file
    has moved, and destroys the content if it is another one.

    A raw image that is being filled has FILENAME.filling beside it, and is refused without it or
    with one that is no good. --complete says that the image holds all of its bytes nevertheless; if
    that is not so, the others read as anything.
    """
    if complete == (backing is not None):
        raise click.UsageError("either -b or --complete is needed")
    if backing is None:
        file = opening.open_node(opening.file_options(filename))
        try:
            partial.declare_complete(file)
        finally:
            file.close()
        return 0
    if backing and not backing_format:
        raise CowferryError("backing file specified without backing format", "add -F FORMAT")
    with image(filename, format, read_only=False, backing=not unsafe) as node:
        if node.driver == "raw" and node.backing_spec is None:
            raise ImageError(f"'{filename}': raw images have no backing file")
        if not unsafe:
            _settle(node, backing, backing_format)
        elif backing:
            opening.backing_path(filename, backing)
        node.set_backing(backing or None, backing_format if backing else None)
    return 0


def _settle(node: Node, backing: str, backing_format: str | None) -> None:
    """Copy into the overlay what would read otherwise on the new backing file. Durable."""
    new: Node | None = None
    if backing:
        path = opening.backing_path(node.filename, backing)
        if os.path.realpath(path) == os.path.realpath(node.filename):
            raise ImageError(f"'{node.filename}' cannot be its own backing file")
        new = opening.open_image(path, backing_format, read_only=True)
    try:
        _copy_differences(node, new)
    finally:
        opening.close_chain(new)
    node.flush()


def _copy_differences(node: Node, new: Node | None) -> None:
    from cowferry.block.node import State

    was, will = memoryview(bytearray(STEP)), memoryview(bytearray(STEP))
    for start in range(0, node.size, STEP):
        at = start
        for e in list(node.extents(start, min(STEP, node.size - start))):
            if e.state is State.HOLE:
                old, fresh = was[: e.length], will[: e.length]
                read(node.backing, old, at)
                read(new, fresh, at)
                if old != fresh:
                    node.pwrite(old, at)
            at += e.length
