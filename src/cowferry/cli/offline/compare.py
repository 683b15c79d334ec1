"""`cowferry compare`: do two images hold the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import click

from cowferry.block.node import Node, read
from cowferry.cli import complain
from cowferry.cli.offline import cached, forget, image
from cowferry.cli.offline.progress import Report
from cowferry.cli.offline.runs import Run, Windows, may_differ, runs
from cowferry.errors import CowferryError, one_line, reason

STEP = 1 << 20  # bytes compared at once
SECTOR = 512  # bytes; the unit in which reads fail
SAME, DIFFERENT, NOT_OPENED, NO_STATUS, NOT_READ = 0, 1, 2, 3, 4  # exit codes

Say = Callable[[str], None]


@click.command("compare")
@click.option("-f", "first_format", metavar="FMT", help="Format of FIRST [by its name].")
@click.option("-F", "second_format", metavar="FMT", help="Format of SECOND [by its name].")
@click.option("-s", "strict", is_flag=True, help="Compare sizes and allocation, too.")
@click.option("-U", "--force-share", is_flag=True, help="Even while open elsewhere.")
@click.option("-p", "show_progress", is_flag=True, help="Show progress.")
@click.option("-q", "--quiet", is_flag=True, help="Print no result: the exit code tells it.")
@click.option("-T", "cache", metavar="MODE", help="none: keep both out of the page cache.")
@click.option("--image-opts", is_flag=True, help="FIRST and SECOND are option strings.")
@click.argument("first")
@click.argument("second")
def compare_command(
    first_format: str | None, second_format: str | None, strict: bool, force_share: bool,
    show_progress: bool, quiet: bool, cache: str | None, image_opts: bool, first: str, second: str,
) -> int:  # fmt: skip
    """Compare what FIRST and SECOND hold. The part by which one is longer must be zero.

    With -s they also differ if their sizes differ, or if at some offset one has data, zeroes or
    nothing, and the other does not.

    \b
    Exit code:
        0   they are identical
        1   they are different
        2   one could not be opened
        3   the allocation could not be read
        4   a read failed
        64  the command line is wrong
    """
    if image_opts and (first_format or second_format):
        raise click.UsageError("--image-opts and -f or -F are mutually exclusive")

    def say(text: str) -> None:
        if not quiet:
            click.echo(text)

    try:
        drop = not cached(cache, "source ")
        with (
            image(first, first_format, force_share=force_share, image_opts=image_opts) as a,
            image(second, second_format, force_share=force_share, image_opts=image_opts) as b,
            Report(max(a.size, b.size), show_progress and not quiet) as report,
        ):
            code = compare(a, b, strict, say, report)
            if drop:
                forget(a)
                forget(b)
            return code
    except CowferryError as error:
        complain(error)
        sys.exit(NOT_OPENED)


def compare(a: Node, b: Node, strict: bool, say: Say, report: Report) -> int:
    """The exit code; in the end `say` is told the result."""
    if strict and a.size != b.size:
        say("Strict mode: Image size mismatch!")
        return DIFFERENT
    try:
        at = _other_status(a, b) if strict else None
    except OSError as error:
        click.echo(f"cowferry: cannot read the allocation: {reason(error)}", err=True)
        return NO_STATUS
    shorter, longer = sorted((a, b), key=lambda n: n.size)
    content = None
    for side, other, start, end in (
        (a, b, 0, shorter.size), (longer, None, shorter.size, longer.size),
    ):  # fmt: skip
        if content is None:
            try:
                content = _mismatch(side, other, start, end if at is None else min(at, end), report)
            except _Unread as error:
                click.echo(f"cowferry: {error}", err=True)
                return NOT_READ
        if start == 0 and content is None and a.size != b.size:
            say("Warning: Image size mismatch!")
    if content is not None:
        say(f"Content mismatch at offset {content}!")
        return DIFFERENT
    if at is not None:
        say(f"Strict mode: Offset {at} block status mismatch!")
        return DIFFERENT
    say("Images are identical.")
    return SAME


def _other_status(a: Node, b: Node) -> int | None:
    """The first offset at which the two disks, of one size, are not allocated in the same way."""
    left, right = (_stops(runs(n, 0, n.size)) for n in (a, b))
    x, y = next(left, None), next(right, None)
    start = 0
    while x is not None and y is not None:
        if x[1] != y[1]:
            return start
        start = min(x[0], y[0])
        if x[0] == start:
            x = next(left, None)
        if y[0] == start:
            y = next(right, None)
    return None


def _stops(found: Iterator[Run]) -> Iterator[tuple[int, tuple[bool, ...]]]:
    """(end, status) of each run."""
    for run in found:
        yield run.start + run.length, run.status


class _Unread(Exception):
    """What cannot be read, in one line."""


def _mismatch(a: Node, b: Node | None, start: int, end: int, report: Report) -> int | None:
    """The first offset at which two disks differ; without `b`, at which one is not zero."""
    left, right = memoryview(bytearray(STEP)), memoryview(bytearray(STEP))
    windows = Windows(start, end, a, b)
    for begin, length in windows:
        for at, n in may_differ(a, b, begin, length):
            windows.busy()
            for offset in range(at, at + n, STEP):
                step = min(STEP, at + n - offset)
                found = _differ(a, b, left[:step], right[:step], offset)
                if found is not None:
                    return found
                report.at(offset)
        report.at(begin + length)
    return None


def _differ(
    a: Node, b: Node | None, left: memoryview, right: memoryview, offset: int
) -> int | None:
    """The first offset at which two disks differ, within the length of the buffers."""
    for node, buffer in ((a, left), (b, right)):
        try:
            read(node, buffer, offset)
        except OSError as error:
            if len(buffer) > SECTOR:  # what comes before it may differ, and says more
                return _by_sectors(a, b, left, right, offset)
            name = one_line(node.filename) if node is not None else ""
            why = reason(error, name)
            raise _Unread(f"Could not read '{name}' at offset {offset}: {why}") from error
    return offset + _first(left, right) if left != right else None


def _by_sectors(
    a: Node, b: Node | None, left: memoryview, right: memoryview, offset: int
) -> int | None:
    for at in range(0, len(left), SECTOR):
        here = slice(at, at + SECTOR)
        found = _differ(a, b, left[here], right[here], offset + at)
        if found is not None:
            return found
    return None


def _first(a: memoryview, b: memoryview) -> int:
    """The first place at which two buffers of one length differ."""
    low, high = 0, len(a)
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] != b[low:middle]:
            high = middle
        else:
            low = middle
    return low
