"""`cowferry resize`: another size for an image that nobody uses."""

from __future__ import annotations

import click

from cowferry.cli.offline import image
from cowferry.cli.sizes import parse_size
from cowferry.errors import CowferryError


@click.command("resize", context_settings={"ignore_unknown_options": True})
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("--shrink", is_flag=True, help="Allow a smaller size: what lies beyond is lost.")
@click.option("--preallocation", type=click.Choice(["off"]), default="off")
@click.option("-q", "--quiet", is_flag=True)
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.argument("filename")
@click.argument("size", metavar="[+-]SIZE", type=click.UNPROCESSED)
def resize_command(
    format: str | None, shrink: bool, preallocation: str, quiet: bool, image_opts: bool,
    filename: str, size: str,
) -> int:  # fmt: skip
    """Set FILENAME's size, or change it by +SIZE or -SIZE. New bytes read as zeroes."""
    with image(filename, format, read_only=False, image_opts=image_opts) as node:
        if size[:1] == "+":
            wanted = node.size + parse_size(size[1:])
        elif size[:1] == "-":
            wanted = node.size - parse_size(size[1:])
        else:
            wanted = parse_size(size)
        if wanted < 0 or (wanted == 0 and size[:1] == "-"):
            raise CowferryError(f"'{filename}': a new size of {wanted} bytes is not positive")
        if wanted < node.size and not shrink:
            raise CowferryError(
                f"'{filename}': shrinking it from {node.size} to {wanted} bytes loses data",
                "Use the --shrink option if that is meant; nothing was changed",
            )
        node.resize(wanted)
        node.flush()
    if not quiet:
        click.echo("Image resized.")
    return 0
