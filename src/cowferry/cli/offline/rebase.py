"""`cowferry rebase`: another backing file, with the same content or without looking."""

from __future__ import annotations

import os
from collections.abc import Iterator

import click

from cowferry.block import scope
from cowferry.block.node import Node, State, read
from cowferry.cli.offline import cached, forget, image
from cowferry.cli.offline.interrupts import Interrupts
from cowferry.cli.offline.progress import Report
from cowferry.cli.offline.runs import Windows, may_differ
from cowferry.drivers import formats, opening, partial
from cowferry.drivers.options import check_format
from cowferry.errors import CowferryError, ImageError, NotSupported, reason

STEP = 1 << 20  # bytes compared at once


@click.command("rebase")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("-u", "unsafe", is_flag=True, help="Only change the name in the header.")
@click.option("-b", "backing", metavar="FILE", help='New backing file, or "".')
@click.option("-F", "backing_format", metavar="FMT", help="Its format.")
@click.option(
    "--complete",
    is_flag=True,
    help="Declare that FILENAME, a raw image whose .filling is lost, is completely filled.",
)
@click.option("-p", "show_progress", is_flag=True, help="Show progress.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.option("-t", "cache", metavar="MODE", help="none: keep FILENAME out of the page cache.")
@click.option(
    "-T", "source_cache", metavar="MODE", help="none: keep the backing files out of the page cache."
)
@click.argument("filename")
def rebase_command(
    format: str | None, unsafe: bool, backing: str | None, backing_format: str | None,
    complete: bool, show_progress: bool, quiet: bool, cache: str | None, source_cache: str | None,
    filename: str,
) -> int:  # fmt: skip
    """Give FILENAME another backing file.

    Without -u, FILENAME reads the same afterwards: cowferry first copies into it what differs
    between the old and the new backing file. With -u only the name changes, which is right if the
    file has moved; a file with other contents changes what FILENAME reads as. An image cannot be
    its own backing file.

    A raw image that is being filled has the file FILENAME.filling beside it. If that file is
    missing, damaged or out of date, cowferry refuses the image. --complete declares that the image
    holds all of its bytes nevertheless; if it does not, the missing ones read as anything.

    Exit code: 0 done, 1 failed, 130 interrupted. After an error or an interrupt FILENAME reads as
    before, over its old backing file."""
    if complete == (backing is not None):
        raise click.UsageError("either -b or --complete is needed")
    drop, drop_below = not cached(cache), not cached(source_cache, "source ")
    if backing is None:
        if unsafe or backing_format:
            raise click.UsageError("-u and -F need -b")
        with Interrupts():
            _declare_complete(filename, format)
        return 0
    if backing and not backing_format:
        raise CowferryError("backing file specified without backing format", "add -F FORMAT")
    if backing:
        check_format(backing_format)
        opening.check_circle(filename, backing, backing_format)
    with (
        Interrupts(),
        image(filename, format, read_only=False, backing=not unsafe) as node,
    ):
        if node.driver == "raw" and node.backing_spec is None:
            raise ImageError(f"'{filename}': raw images have no backing file")
        if not unsafe:
            with Report(node.size, show_progress and not quiet) as report:
                _settle(node, backing, backing_format, report, drop_below)
        elif backing:
            opening.backing_path(filename, backing)
        try:
            node.set_backing(backing or None, backing_format if backing else None)
        except OSError as error:
            raise ImageError(
                f"Could not record the backing file of '{filename}': {reason(error, filename)}",
                "it reads as before, over its old backing file",
            ) from error
        if drop:
            forget(node)
    return 0


def _declare_complete(filename: str, format: str | None) -> None:
    """Take the word of the user that a raw image lacks nothing. Raises `CowferryError`."""
    if not os.path.exists(filename):
        raise ImageError(f"Could not open '{filename}': No such file or directory")
    kind = format or formats.format_of(filename)
    if kind != "raw":
        raise NotSupported(
            f"'{filename}' is a {kind} image, and --complete is only for raw images that are being "
            "filled",
            "nothing was changed; leave out --complete",
        )
    file = opening.open_node(opening.file_options(filename))
    try:
        partial.declare_complete(file)
    finally:
        file.close()


def _settle(node: Node, backing: str, format: str | None, report: Report, drop: bool) -> None:
    """Copy into the overlay what would read otherwise on the new backing file. Durable."""
    new: Node | None = None
    if backing:
        path = opening.backing_path(node.filename, backing)
        new = opening.open_image(path, format, read_only=True)
    at = 0
    try:
        try:
            for at in _copy_differences(node, new):
                report.at(at)
            node.flush()
        except OSError as error:
            raise ImageError(
                f"Could not rebase '{node.filename}': {reason(error, node.filename)}, at "
                f"offset {at} or after it",
                "its backing file is the old one, and it reads as before",
            ) from error
        if drop:
            forget(node.backing)
            forget(new)
    finally:
        opening.close_chain(new)


def _copy_differences(node: Node, new: Node | None) -> Iterator[int]:
    """Yield how far it is, in bytes. What reads the same below is left where it is."""
    was, will = memoryview(bytearray(STEP)), memoryview(bytearray(STEP))
    windows = Windows(0, node.size, node, new)
    for start, length in windows:
        for hole, size in list(_holes(node, start, length)):
            for at, n in may_differ(node.backing, new, hole, size):
                windows.busy()
                for offset in range(at, at + n, STEP):
                    scope.check()
                    step = min(STEP, at + n - offset)
                    read(node.backing, was[:step], offset)
                    read(new, will[:step], offset)
                    _copy(node, was[:step], will[:step], offset)
                    yield offset
        yield start + length


def _holes(node: Node, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the runs that the image has from below."""
    for e in node.extents(offset, length):
        if e.state is State.HOLE:
            yield offset, e.length
        offset += e.length


def _copy(node: Node, was: memoryview, will: memoryview, offset: int) -> None:
    """Write the granules of the image that would read otherwise."""
    if was == will:
        return
    first = offset
    end = offset + len(was)
    while first < end:
        last = min((first // node.granule + 1) * node.granule, end)
        here = slice(first - offset, last - offset)
        if was[here] != will[here]:
            node.pwrite(was[here], first)  # `zero` would see that it reads as zero already
        first = last
