"""`cowferry current`: where a disk is now that once was in a file."""

from __future__ import annotations

import json
import os

import click

from cowferry.block import moves, names
from cowferry.drivers import opening
from cowferry.errors import CowferryError, ImageError


@click.command("current")
@click.option("--json", "as_json", is_flag=True, help="The answer as JSON.")
@click.argument("filename")
def current_command(as_json: bool, filename: str) -> int:
    """Print which image is current for the disk that once was in FILENAME.

    Snapshots, copies and commits move a disk from one image to another, and leave a record of it
    beside the image that they leave. This command follows the records, and needs no daemon. It
    warns of an image that cannot be used by itself, because a commit may have changed it or an
    image below it.

    \b
        cowferry current /images/vm.qcow2
    """
    try:
        found = moves.follow(names.absolute(opening.canonical(filename)))
        top = moves.half_committed(found.path)
    except OSError as error:
        raise CowferryError(str(error.strerror or error)) from error
    if not (names.is_uri(found.path) or os.path.exists(found.path)):
        came = "" if found.generation == 0 else f", where the disk of '{filename}' has moved"
        raise ImageError(f"Could not open '{found.path}'{came}: No such file or directory")
    if as_json:
        out = {
            "filename": found.path,
            "format": found.format,
            "generation": found.generation,
            "half-committed": top,
        }
        click.echo(json.dumps(out, indent=4))
    else:
        click.echo(found.path)
    if top is not None:
        click.echo(
            f"cowferry: '{found.path}' is of no use by itself: a commit of '{top}' went into it, "
            f"or past it\n  {advice(top)}",
            err=True,
        )
    return 0


def advice(top: str) -> str:
    """What to do about an image that a commit of `top` has left unusable."""
    now = moves.follow(top).path
    if now != top:
        return f"the disk of '{top}' is in '{now}' now"
    return f"if that commit was not finished, serve '{top}' and commit again"
