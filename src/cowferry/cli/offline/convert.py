"""`cowferry convert`: copy what an image holds into a new one."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click

from cowferry.block import names
from cowferry.block.bitmap import Bitmap
from cowferry.block.compress import Compressed
from cowferry.block.copy import Copier, Kind, Span, spans
from cowferry.block.keeper import keep
from cowferry.block.node import Node, chain, read
from cowferry.block.origin import of_node
from cowferry.cli.offline import creation_options, image
from cowferry.drivers import driver, formats, opening
from cowferry.errors import CowferryError, ImageError, NotSupported

STEP = 64 << 20  # bytes between two looks at the progress
TOGETHER = 4 << 20  # bytes compressed together; a multiple of every granule


@click.command("convert")
@click.option("-f", "--format", "source_format", help="Format of SOURCE [by its name].")
@click.option("-O", "--target-format", metavar="FMT", help="Format of TARGET [raw].")
@click.option("-o", "options", multiple=True, metavar="OPTS", help="Options of the target format.")
@click.option("-B", "-b", "--backing", metavar="FILE", help="Backing file of TARGET; needs -F.")
@click.option("-F", "--backing-format", metavar="FMT", help="Format of the backing file.")
@click.option("-n", "no_create", is_flag=True, help="TARGET exists: write into it.")
@click.option("-p", "show_progress", is_flag=True, help="Show progress.")
@click.option("-c", "compress", is_flag=True, help="Into compressed clusters of TARGET.")
@click.option("--bitmaps", is_flag=True, help="The persistent dirty bitmaps of SOURCE, too.")
@click.option("--skip-broken-bitmaps", is_flag=True, help="Of those, not the inconsistent ones.")
@click.option("-U", "--force-share", is_flag=True, help="SOURCE may be open elsewhere.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-S", "sparse", metavar="SIZE", help="Taken for compatibility.")
@click.option("-m", "coroutines", type=int, help="Taken for compatibility.")
@click.option("-W", "unordered", is_flag=True, help="Taken for compatibility.")
@click.option("-t", "cache", metavar="MODE", help="Taken for compatibility.")
@click.option("-T", "source_cache", metavar="MODE", help="Taken for compatibility.")
@click.option("--image-opts", is_flag=True, help="SOURCE is an option string.")
@click.argument("source")
@click.argument("target")
def convert_command(
    source_format: str | None, target_format: str | None, options: tuple[str, ...],
    backing: str | None, backing_format: str | None, no_create: bool, show_progress: bool,
    compress: bool, bitmaps: bool, skip_broken_bitmaps: bool, force_share: bool, quiet: bool,
    sparse: str | None, coroutines: int | None, unordered: bool, cache: str | None,
    source_cache: str | None, image_opts: bool, source: str, target: str,
) -> int:  # fmt: skip
    """Copy SOURCE, with what its backing chain holds, into TARGET. Zeroes stay zeroes."""
    if target_format is None:
        formats.named(target)  # which may say what we cannot write
        target_format = "raw"
    if compress and driver(target_format).compress is Node.compress:
        raise NotSupported(f"format {target_format} cannot hold compressed data", "-O qcow2 can")
    if skip_broken_bitmaps and not bitmaps:
        raise CowferryError("Use of --skip-broken-bitmaps requires --bitmaps")
    given = creation_options(options)
    if backing:
        given |= {"backing_file": backing}
    if backing_format:
        given |= {"backing_fmt": backing_format}
    if given.get("backing_file") and not given.get("backing_fmt"):
        raise CowferryError("backing file specified without backing format", "add -F FORMAT")
    if names.same(source, target):
        raise CowferryError(f"'{source}' cannot be converted into itself")
    with image(source, source_format, force_share=force_share, image_opts=image_opts) as node:
        wanted = _bitmaps(node, skip_broken_bitmaps) if bitmaps else []
        if not no_create:
            origin = of_node(node)
            opening.create_image(
                target, target_format, node.size, given, like=origin and origin.masked()
            )
        with image(target, target_format, read_only=False) as out:
            if out.size < node.size:
                raise ImageError(
                    f"'{target}' has {out.size} bytes, fewer than the {node.size} of '{source}'",
                    "nothing was written",
                )
            if compress:
                out.check_compression()
            for bitmap in wanted:
                if bitmap.name in out.bitmaps:
                    raise CowferryError(
                        f"Bitmap already exists: '{bitmap.name}' in '{target}'",
                        f"remove it: cowferry bitmap --remove '{target}' '{bitmap.name}'; nothing "
                        "was written",
                    )
            _copy(node, out, not no_create, compress, show=show_progress and not quiet)
            out.flush()
            for bitmap in wanted:
                bitmap.resize(out.size)
                keep(out, bitmap)
    return 0


def _bitmaps(source: Node, skip_broken: bool) -> list[Bitmap]:
    """Copies of the persistent bitmaps of the image itself, not of those below it."""
    copies = []
    for bitmap in source.bitmaps.values():
        if bitmap.inconsistent and not skip_broken:
            raise CowferryError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}' of '{source.filename}'",
                f"use --skip-broken-bitmaps, or remove it: cowferry bitmap --remove "
                f"'{source.filename}' '{bitmap.name}'; nothing was written",
            )
        if bitmap.inconsistent:
            click.echo(f"warning: Skipping inconsistent bitmap '{bitmap.name}'", err=True)
        else:
            copy = bitmap.copy()
            copy.recording = bitmap.recording
            copies.append(copy)
    return copies


def _copy(source: Node, target: Node, fresh: bool, compress: bool, show: bool) -> None:
    # Of a target on a backing file, what the source has from that same file may stay there.
    base = None
    if target.backing is not None:
        below = target.backing.filename
        base = next(
            (n for n in chain(source) if n is not source and names.same(n.filename, below)), None
        )
    skip_zero = fresh and target.backing is None
    copier = Copier()
    report = Report(source.size, show)
    granule = max(source.granule, target.granule)
    for start in range(0, source.size, STEP):
        length = min(STEP, source.size - start)
        for span in spans(source, start, length, granule, base):
            if span.kind is Kind.ZERO and skip_zero:
                continue
            if compress and span.kind is Kind.COPY:
                _compress(source, target, span)
            else:
                copier.place(source, target, span)
        report.at(start + length)
    if target.size > source.size and not skip_zero:
        rest = Span(source.size, target.size - source.size, Kind.ZERO)
        copier.place(source, target, rest)
    report.end()


def _compress(source: Node, target: Node, span: Span) -> None:
    target.changing(span.offset, span.length)
    for at in range(span.offset, span.offset + span.length, TOGETHER):
        data = memoryview(bytearray(min(TOGETHER, span.offset + span.length - at)))
        read(source, data, at)
        with Compressed(target, at, data) as packed:
            packed.put()


class Report:
    """Progress on standard output with -p, and on standard error at SIGUSR1."""

    def __init__(self, total: int, show: bool) -> None:
        self.total = max(total, 1)
        self.show = show
        self.done = 0
        signal.signal(signal.SIGUSR1, self._asked)

    def at(self, done: int) -> None:
        """So far."""
        self.done = done
        if self.show:
            click.echo(f"    ({100 * done / self.total:.2f}/100%)\r", nl=False)
            sys.stdout.flush()

    def end(self) -> None:
        """A new line after the last."""
        if self.show:
            click.echo()

    def _asked(self, number: int, frame: FrameType | None) -> None:
        click.echo(f"    ({100 * self.done / self.total:.2f}/100%)", err=True)
