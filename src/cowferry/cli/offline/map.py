"""`cowferry map`: where an image's bytes lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from cowferry.block.node import Node, State, chain, with_holes
from cowferry.cli.offline import image
from cowferry.cli.sizes import Size
from cowferry.errors import CowferryError

STEP = 1 << 30  # bytes resolved at once


@click.command("map")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("--output", type=click.Choice(["human", "json"]), default="human")
@click.option("-s", "--start-offset", type=Size(), default=0)
@click.option("-l", "--max-length", type=Size(), default=None)
@click.option("-U", "--force-share", is_flag=True, help="Even while another process has it open.")
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.argument("filename")
def map_command(
    format: str | None, output: str, start_offset: int, max_length: int | None,
    force_share: bool, image_opts: bool, filename: str,
) -> int:  # fmt: skip
    """Show each run of FILENAME's bytes: in which file of its chain it lies, and where."""
    with image(filename, format, force_share=force_share, image_opts=image_opts) as node:
        end = node.size if max_length is None else min(start_offset + max_length, node.size)
        found = entries(node, start_offset, end)
        if output == "json":
            lines = ",\n".join(json.dumps(e) for e in found)
            click.echo(f"[{lines}]")
        else:
            table(node, found)
    return 0


def entries(node: Node, start: int, end: int) -> Iterator[dict[str, Any]]:
    """qemu-img's MapEntry for each run, equal neighbours joined."""
    depth = len(list(chain(node)))
    preallocated = [n.preallocated for n in chain(node)]
    last: dict[str, Any] | None = None
    while start < end:
        length = min(STEP, end - start)
        for e in with_holes(node, start, length):
            data = e.state is State.DATA or (e.fd >= 0 and preallocated[e.depth])
            entry: dict[str, Any] = {
                "start": start,
                "length": e.length,
                "depth": e.depth if e.depth >= 0 else depth - 1,
                "present": e.depth >= 0,
                "zero": e.state is not State.DATA,
                "data": data,
            }
            if e.fd >= 0 or (e.state is State.DATA and not e.compressed):
                entry["offset"] = e.host
            start += e.length
            if last is not None and joins(last, entry):
                last["length"] += entry["length"]
                continue
            if last is not None:
                yield last
            last = entry
    if last is not None:
        yield last


def joins(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether b goes on where a ends."""
    if any(a[k] != b[k] for k in ("depth", "present", "zero", "data")):
        return False
    if "offset" not in a or "offset" not in b:
        return ("offset" in a) == ("offset" in b)
    return bool(a["offset"] + a["length"] == b["offset"])


def table(node: Node, found: Iterator[dict[str, Any]]) -> None:
    """The runs of data, as qemu-img prints them."""
    files = [n.filename for n in chain(node)]
    click.echo(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for e in found:
        if not e["data"]:
            continue
        if "offset" not in e:
            raise CowferryError("File contains external, encrypted or compressed clusters.")
        click.echo(f"{e['start']:<#16x}{e['length']:<#16x}{e['offset']:<#16x}{files[e['depth']]}")
