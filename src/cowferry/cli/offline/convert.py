"""`cowferry convert`: copy what an image holds into a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from cowferry.block import identity, names
from cowferry.block.bitmap import Bitmap
from cowferry.block.keeper import keep
from cowferry.block.node import Node
from cowferry.block.origin import Origin, of_node
from cowferry.cli.offline import cached, check_backing, closed, creation_options, image
from cowferry.cli.offline.conversion import Concatenated, Conversion
from cowferry.cli.offline.interrupts import Interrupts
from cowferry.cli.offline.progress import Report
from cowferry.cli.sizes import parse_size
from cowferry.drivers import driver, formats, opening
from cowferry.errors import CowferryError, ImageError, NotSupported

MAX_SPARSE = 16 << 20  # bytes


@click.command("convert")
@click.option("-f", "--format", "source_format", help="Format of SOURCE [by its name].")
@click.option("-O", "--target-format", metavar="FMT", help="Format of TARGET [raw].")
@click.option("-o", "options", multiple=True, metavar="OPTS", help="Options of the target format.")
@click.option("-B", "-b", "--backing", metavar="FILE", help="Backing file of TARGET; needs -F.")
@click.option("-F", "--backing-format", metavar="FMT", help="Format of the backing file.")
@click.option("-n", "no_create", is_flag=True, help="TARGET exists: write into it.")
@click.option("--target-is-zero", is_flag=True, help="With -n: assume that TARGET is all zeroes.")
@click.option("-p", "show_progress", is_flag=True, help="Show progress.")
@click.option("-c", "compress", is_flag=True, help="Write compressed clusters.")
@click.option("--bitmaps", is_flag=True, help="Copy the persistent dirty bitmaps, too.")
@click.option("--skip-broken-bitmaps", is_flag=True, help="With --bitmaps: skip inconsistent ones.")
@click.option("-U", "--force-share", is_flag=True, help="SOURCE may be open elsewhere.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.option(
    "-S", "sparse", metavar="SIZE",
    help="Turn at least this many zero bytes in a row into a hole; 0: allocate all of TARGET. "
    "[4k; no search for zeroes if TARGET is a server or shares extents with SOURCE]",
)  # fmt: skip
@click.option(
    "-m", "coroutines", type=int, metavar="N", help="Accepted for compatibility (1 to 16)."
)
@click.option("-W", "unordered", is_flag=True, help="Accepted for compatibility.")
@click.option("-t", "cache", metavar="MODE", help="none: keep TARGET out of the page cache.")
@click.option("-T", "source_cache", metavar="MODE", help="none: keep SOURCE out of the page cache.")
@click.option("--image-opts", is_flag=True, help="SOURCE is an option string.")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.argument("target")
def convert_command(
    source_format: str | None, target_format: str | None, options: tuple[str, ...],
    backing: str | None, backing_format: str | None, no_create: bool, target_is_zero: bool,
    show_progress: bool, compress: bool, bitmaps: bool, skip_broken_bitmaps: bool,
    force_share: bool, quiet: bool, sparse: str | None, coroutines: int | None, unordered: bool,
    cache: str | None, source_cache: str | None, image_opts: bool, sources: tuple[str, ...],
    target: str,
) -> int:  # fmt: skip
    """Copy SOURCE, with what its backing chain holds, into TARGET. Zeroes stay zeroes.

    A new TARGET gets its name when it is complete: until then, and after an error, a file that has
    that name stays as it was. A device is written in place, and so is an image that exists (-n);
    bytes beyond the size of SOURCE are zeroed. Several SOURCEs are put one after another.

    Exit code: 0 done, 1 failed, 130 interrupted."""
    if target_format is None:
        target_format = _default_format(target, no_create)
    given = _checked(
        target_format, options, backing, backing_format, no_create, target_is_zero, compress,
        bitmaps, skip_broken_bitmaps, coroutines, len(sources),
    )  # fmt: skip
    least = _sparse(sparse)
    drop = {
        "drop_source": not cached(source_cache, "source "),
        "drop_target": not cached(cache),
    }
    for name in sources:
        if names.same(name, target):
            raise CowferryError(f"'{name}' cannot be converted into itself", "nothing was changed")
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        parts = [
            stack.enter_context(
                image(name, source_format, force_share=force_share, image_opts=image_opts)
            )
            for name in sources
        ]
        source = parts[0] if len(parts) == 1 else Concatenated(parts)
        copies = _bitmaps(source, skip_broken_bitmaps) if bitmaps else []
        apart = [layer for part in parts for layer in identity.layers(part, "the source")]
        if no_create:
            opened = _existing(target, target_format, given, apart)
        else:
            like = _permissions(parts)
            opened = _new(target, target_format, source.size, given, like, apart)
        out, blank, stays = stack.enter_context(opened)
        _check_target(out, target, source, compress, copies)
        work = Conversion(
            source,
            out,
            blank=out.size if target_is_zero else blank,
            sparse=least,
            compress=compress,
            **drop,
        )
        try:
            with Report(source.size, show_progress and not quiet) as report:
                work.run(report)
            for bitmap in copies:
                bitmap.resize(out.size)
                keep(out, bitmap)
        except (CowferryError, OSError) as error:
            if stays and interrupts.number:
                click.echo(f"cowferry: interrupted: {_partly(target, work.done)}", err=True)
            elif stays and isinstance(error, CowferryError):
                error.hint = _partly(target, work.done)
            raise
    return 0


def _default_format(target: str, exists: bool) -> str:
    """The format of a target for which no -O is given: raw, as with qemu-img.

    Raises `CowferryError` for a name that says a format that cannot be written, and for an image
    that exists and is not raw, because writing raw bytes would destroy it."""
    if not exists:
        formats.of_new(target)
    elif (found := formats.format_of(target)) != "raw":
        raise CowferryError(
            f"'{target}' is, by its name, a {found} image, and without -O it would be written as "
            "raw",
            f"say -O {found}, or -O raw; nothing was written",
        )
    return "raw"


def _partly(target: str, done: int) -> str:
    return (
        f"'{target}' is partly written: up to offset {done} it has the bytes of the source, what "
        "follows may be old, new or mixed"
    )


def _checked(
    target_format: str, options: tuple[str, ...], backing: str | None, backing_format: str | None,
    no_create: bool, target_is_zero: bool, compress: bool, bitmaps: bool,
    skip_broken_bitmaps: bool, coroutines: int | None, count: int,
) -> dict[str, Any]:  # fmt: skip
    """The options of the target format, if all options go together. Raises `CowferryError`."""
    if compress and driver(target_format).compress is Node.compress:
        raise NotSupported(f"format {target_format} cannot hold compressed data", "-O qcow2 can")
    if skip_broken_bitmaps and not bitmaps:
        raise CowferryError("Use of --skip-broken-bitmaps requires --bitmaps")
    if target_is_zero and not no_create:
        raise CowferryError("--target-is-zero requires use of -n flag")
    if coroutines is not None and not 1 <= coroutines <= 16:
        raise CowferryError("Invalid number of coroutines: -m takes a number between 1 and 16")
    given = creation_options(options)
    if backing is not None:
        given |= {"backing_file": backing}
    if backing_format is not None:
        given |= {"backing_fmt": backing_format}
    check_backing(given)
    if no_create and (others := given.keys() - {"backing_file", "backing_fmt"}):
        raise CowferryError(
            f"'{min(others)}' is an option for a new image, and with -n no image is made",
            "leave out -n or -o",
        )
    if count > 1 and given.get("backing_file"):
        raise CowferryError("several images put one after another cannot have a backing file")
    if count > 1 and bitmaps:
        raise CowferryError("several images put one after another have no bitmaps in common")
    return given


def _sparse(text: str | None) -> int | None:
    """Bytes, from what was typed. Raises `CowferryError`."""
    if text is None:
        return None
    size = parse_size(text)
    if size % 512 or size > MAX_SPARSE:
        raise CowferryError(
            f"Invalid buffer size for sparse output specified: {text}",
            f"-S takes multiples of 512 up to {MAX_SPARSE}, and 0 for no holes at all",
        )
    return size


Opened = tuple[Node, int, bool]  # the target, see `New.blank`, whether it stays


@contextmanager
def _existing(
    target: str, format: str, options: dict[str, Any], apart: list[identity.Layer]
) -> Iterator[Opened]:
    refusal = f"Could not convert into '{target}'"
    for name in (target, opening.data_file_of(target, format)):
        if name is not None:
            identity.check_apart(refusal, name, identity.of_path(name), apart)
    with image(target, format, read_only=False) as out:
        identity.check_apart(refusal, target, identity.of_node(out), apart)
        _check_backing(out, target, options)
        yield out, 0, True


def _check_backing(out: Node, target: str, options: dict[str, Any]) -> None:
    """Raise `CowferryError` if an image that exists has another backing file than -B says."""
    wanted, format = options.get("backing_file"), options.get("backing_fmt")
    if not wanted:
        return
    below = out.backing
    if (
        below is None
        or format not in (None, below.driver)
        or not opening.leads_to(target, str(wanted), below.filename)
    ):
        has = f"'{below.filename}', format {below.driver}" if below is not None else "none"
        raise CowferryError(
            f"'{target}' has another backing file than '{wanted}', format {format}: {has}",
            "nothing was written; leave out -B, or give the image that backing file: "
            "cowferry rebase",
        )


def _permissions(parts: list[Node]) -> Origin | None:
    """For a new image with bytes of all of these."""
    found = of_node(parts[0])
    for more in map(of_node, parts[1:]):
        found = found.narrowed(more) if found is not None and more is not None else found
    return found and found.masked()


@contextmanager
def _new(
    target: str, format: str, size: int, options: dict[str, Any], like: Origin | None,
    apart: list[identity.Layer],
) -> Iterator[Opened]:  # fmt: skip
    if options.get("backing_file"):
        given = str(options["backing_file"]), str(options["backing_fmt"])
        opening.check_circle(target, *given)
    making = opening.new_image(target, format, size, options, like=like, apart=apart)
    with making as new:
        out = opening.open_node(new.options)
        with closed(out):
            yield out, new.blank, new.stays


def _check_target(
    out: Node, target: str, source: Node, compress: bool, copies: list[Bitmap]
) -> None:
    """Raise `CowferryError` if the target cannot hold the source. Nothing was written yet."""
    if out.size < source.size:
        raise ImageError(
            f"'{target}' has {out.size} bytes, fewer than the {source.size} of '{source.filename}'",
            "nothing was written",
        )
    if compress:
        out.check_compression()
    for bitmap in copies:
        if bitmap.name in out.bitmaps:
            raise CowferryError(
                f"Bitmap already exists: '{bitmap.name}' in '{target}'",
                f"remove it: cowferry bitmap --remove '{target}' '{bitmap.name}'; nothing was "
                "written",
            )


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
