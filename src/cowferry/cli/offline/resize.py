"""`cowferry resize`: another size for an image that nobody uses, or for a disk of the daemon."""

from __future__ import annotations

import click

from cowferry.cli.client import connect
from cowferry.cli.offline import image
from cowferry.cli.offline.interrupts import Interrupts
from cowferry.cli.options import control
from cowferry.cli.sizes import parse_size
from cowferry.errors import CowferryError, reason


@click.command("resize", context_settings={"ignore_unknown_options": True})
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("--shrink", is_flag=True, help="Allow a smaller size: what lies beyond is lost.")
@click.option("--preallocation", type=click.Choice(["off"]), default="off")
@click.option("-q", "--quiet", is_flag=True)
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.option("--live", is_flag=True, help="FILENAME is a disk that the daemon serves.")
@click.option("--force", is_flag=True, help="With --live: cancel what runs on the disk first.")
@control
@click.argument("filename")
@click.argument("size", metavar="[+-]SIZE", type=click.UNPROCESSED)
def resize_command(
    format: str | None, shrink: bool, preallocation: str, quiet: bool, image_opts: bool,
    live: bool, force: bool, path: str | None, filename: str, size: str,
) -> int:  # fmt: skip
    """Set FILENAME's size, or change it by +SIZE or -SIZE. New bytes read as zeroes.

    With --live this is a disk of the daemon, and its guest learns of it as its transport allows.

    \b
        cowferry resize vm.qcow2 +10G
        cowferry resize --live vm +10G

    Exit code: 0 done, 1 failed, 130 interrupted."""
    if live:
        with connect(path) as client:
            (tree,) = client.call("x-query-tree", device=filename)
            wanted = new_size(filename, tree["size"], size, shrink)
            client.call("block_resize", device=filename, size=wanted, force=force or None)
    else:
        with (
            Interrupts(),
            image(filename, format, read_only=False, image_opts=image_opts) as node,
        ):
            wanted = new_size(filename, node.size, size, shrink)
            try:
                node.change_size(wanted)
                node.flush()
            except OSError as error:
                raise CowferryError(
                    f"'{filename}' cannot be resized to {wanted} bytes: {reason(error, filename)}",
                    f"it has {node.size} bytes",
                ) from error
    if not quiet:
        click.echo("Image resized.")
    return 0


def new_size(name: str, now: int, size: str, shrink: bool) -> int:
    """Bytes, from what was typed. Raises `CowferryError`."""
    if size[:1] == "+":
        wanted = now + parse_size(size[1:])
    elif size[:1] == "-":
        wanted = now - parse_size(size[1:])
    else:
        wanted = parse_size(size)
    if wanted < 0 or (wanted == 0 and size[:1] == "-"):
        raise CowferryError(f"'{name}': a new size of {wanted} bytes is not positive")
    if wanted < now and not shrink:
        raise CowferryError(
            f"'{name}': shrinking it from {now} to {wanted} bytes loses data",
            "Use the --shrink option if that is meant; nothing was changed",
        )
    return wanted
