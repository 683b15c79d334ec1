"""`cowferry create`: a new image."""

from __future__ import annotations

import click

from cowferry.block import identity
from cowferry.cli.offline import check_backing, creation_options, image
from cowferry.cli.offline.interrupts import Interrupts
from cowferry.cli.sizes import Size, parse_size
from cowferry.drivers import formats, opening
from cowferry.errors import CowferryError


@click.command("create")
@click.option("-f", "--format", "format", default=None, help="Format [by the name, else raw].")
@click.option("-b", "--backing", metavar="FILE", help="Backing file; needs -F.")
@click.option("-F", "--backing-format", metavar="FMT", help="Format of the backing file.")
@click.option("-o", "options", multiple=True, metavar="OPTS", help="Options of the format.")
@click.option("-u", "unsafe", is_flag=True, help="Do not open the backing file.")
@click.option("-q", "--quiet", is_flag=True)
@click.argument("filename")
@click.argument("size", type=Size(), required=False)
def create_command(
    format: str | None, backing: str | None, backing_format: str | None,
    options: tuple[str, ...], unsafe: bool, quiet: bool, filename: str, size: int | None,
) -> int:  # fmt: skip
    """Make an image of SIZE bytes (suffixes k, M, G, T) at FILENAME.

    With a backing file SIZE may be left out: it is then the backing file's. `cowferry stream` fills
    a raw image from its backing file: FILENAME.filling says what the image holds already.

    An image that has the name FILENAME stays as it was until the new one is complete. A file of the
    backing chain is never replaced.

    \b
        cowferry create vm.qcow2 20G
        cowferry create -f raw -b base.raw -F raw vm.raw

    Exit code: 0 done, 1 failed."""
    kind = format or formats.of_new(filename) or "raw"
    given = creation_options(options)
    if "size" in given:
        if size is not None:
            raise CowferryError(
                "The image size must be specified only once", "leave out SIZE, or -o size"
            )
        size = parse_size(str(given.pop("size")))
    if backing is not None:
        given["backing_file"] = backing
    if backing_format is not None:
        given["backing_fmt"] = backing_format
    check_backing(given)
    below = given.get("backing_file")
    apart: list[identity.Layer] = []
    if below:
        opening.check_circle(filename, str(below), str(given["backing_fmt"]))
        path = opening.backing_path(filename, str(below))
        if not unsafe:
            with image(path, given["backing_fmt"], force_share=True) as node:
                size = node.size if size is None else size
                apart = [f._replace(role="a file below it") for f in identity.layers(node, "")]
    if size is None:
        raise CowferryError("Image creation needs a size parameter", "cowferry create FILE 10G")
    with Interrupts():
        opening.create_image(filename, kind, size, given, apart=apart)
    if not quiet:
        extra = "".join(f" {k}={v}" for k, v in sorted(given.items()))
        click.echo(f"Formatting '{filename}', fmt={kind} size={size}{extra}")
    return 0
