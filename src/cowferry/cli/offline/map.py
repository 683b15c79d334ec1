"""`cowferry map`: where an image's bytes lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from cowferry.block.node import Node
from cowferry.cli.offline import image
from cowferry.cli.offline.runs import Run, runs
from cowferry.cli.sizes import Size
from cowferry.errors import CowferryError, one_line


@click.command("map")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("--output", type=click.Choice(["human", "json"]), default="human")
@click.option("-s", "--start-offset", type=Size(), default=0, help="Begin at this offset. [0]")
@click.option("-l", "--max-length", type=Size(), default=None, help="Show at most this many bytes.")
@click.option("-U", "--force-share", is_flag=True, help="Even while another process has it open.")
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.argument("filename")
def map_command(
    format: str | None, output: str, start_offset: int, max_length: int | None,
    force_share: bool, image_opts: bool, filename: str,
) -> int:  # fmt: skip
    """Show for each run of FILENAME's bytes in which file of its chain it lies, and where.

    For an image with an external data file, the data file is shown.

    Exit code: 0 done, 1 failed."""
    with image(filename, format, force_share=force_share, image_opts=image_opts) as node:
        end = node.size if max_length is None else min(start_offset + max_length, node.size)
        if output == "json":
            lines = ",\n".join(json.dumps(e) for e in entries(node, start_offset, end))
            click.echo(f"[{lines}]")
            return 0
        click.echo(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        for run in runs(node, start_offset, end):
            if run.data and not run.zero:
                click.echo(line(run))
    return 0


def entries(node: Node, start: int, end: int) -> Iterator[dict[str, Any]]:
    """qemu-img's MapEntry for each run of bytes `start` to `end`."""
    for run in runs(node, start, end):
        out = {k: getattr(run, k) for k in ("start", "length", "depth", "present", "zero", "data")}
        yield out if run.offset is None else {**out, "offset": run.offset}


def line(run: Run) -> str:
    """A run of data, as qemu-img prints it. Raises `CowferryError` if it lies nowhere."""
    if run.offset is None or run.file is None:
        raise CowferryError(
            "File contains external, encrypted or compressed clusters.",
            f"the bytes at offset {run.start} have no place of their own; --output=json shows all",
        )
    numbers = (f"{n:#x}" if n else "0" for n in (run.start, run.length, run.offset))
    return "".join(f"{n:<16}" for n in numbers) + one_line(run.file.filename)
