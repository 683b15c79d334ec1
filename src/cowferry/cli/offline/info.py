"""`cowferry info`: what an image is. It opens that file and no other, unless told to."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from cowferry.block import keeper, moves, names
from cowferry.block.node import Node, chain
from cowferry.cli.offline import image
from cowferry.cli.sizes import human
from cowferry.drivers import actual_size, opening
from cowferry.drivers.partial import Partial
from cowferry.errors import one_line


@click.command("info")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("--output", type=click.Choice(["human", "json"]), default="human")
@click.option("--backing-chain", "whole", is_flag=True, help="The backing files, too.")
@click.option("-U", "--force-share", is_flag=True, help="Even while another process has it open.")
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.argument("filename")
def info_command(
    format: str | None, output: str, whole: bool, force_share: bool, image_opts: bool, filename: str
) -> int:
    """Show what FILENAME is: format, sizes, backing file, snapshots.

    Only the header of FILENAME is read, and with --backing-chain those of the images below it.

    Exit code: 0 done, 1 failed."""
    with image(
        filename, format, backing=whole, force_share=force_share, image_opts=image_opts,
        headers=True,
    ) as node:  # fmt: skip
        infos = [describe(n) for n in (chain(node) if whole else [node])]
    if output == "json":
        click.echo(json.dumps(infos if whole else infos[0], indent=4))
    else:
        click.echo("\n\n".join(in_words(i) for i in infos))
    return 0


def describe(node: Node) -> dict[str, Any]:
    """qemu-img's ImageInfo."""
    out: dict[str, Any] = {}
    taken = getattr(node, "snapshots", None)
    if taken:
        out["snapshots"] = [s.info() for s in taken]
    out["virtual-size"] = node.size
    out["filename"] = node.filename
    if hasattr(node, "cluster_size"):
        out["cluster-size"] = node.granule
    out["format"] = node.driver
    remote = names.is_uri(node.filename)
    if not remote:
        out["actual-size"] = actual_size(node.filename)
    specific = node.info()
    if specific:
        out["format-specific"] = {"type": node.driver, "data": specific}
    if node.backing_spec is not None:
        name, format = node.backing_spec
        out["backing-filename"] = name
        if not (remote or opening.PROTOCOL.match(name)):
            out["full-backing-filename"] = opening.backing_path(node.filename, name)
        if format:
            out["backing-filename-format"] = format
    if isinstance(node, Partial):
        out["filling"] = {
            "filename": node.filling.path,
            "filled": node.held,
            "granularity": node.granule,
        }
    if node.bitmaps and not node.stores_bitmaps:
        out["bitmaps"] = {
            "filename": moves.place(node.filename, keeper.SUFFIX),
            "bitmaps": [bitmap.info() for bitmap in node.bitmaps.values()],
        }
    out["dirty-flag"] = bool(getattr(node, "dirty_flag", False))
    return out


def in_words(info: dict[str, Any]) -> str:
    """As qemu-img prints it."""
    lines = [
        f"image: {info['filename']}",
        f"file format: {info['format']}",
        f"virtual size: {human(info['virtual-size'])} ({info['virtual-size']} bytes)",
        f"disk size: {human(info['actual-size']) if 'actual-size' in info else 'unavailable'}",
    ]
    if info["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if "backing-filename" in info:
        name, full = info["backing-filename"], info.get("full-backing-filename")
        actual = f" (actual path: {full})" if full and full != name else ""
        lines.append(one_line(f"backing file: {name}{actual}"))
        if "backing-filename-format" in info:
            lines.append(one_line(f"backing file format: {info['backing-filename-format']}"))
    if "filling" in info:
        filled, whole = info["filling"]["filled"], info["virtual-size"]
        lines.append(
            f"being filled: {human(filled)} of {human(whole)} ({100 * filled // max(whole, 1)}%)"
            f" are here, says {info['filling']['filename']}"
        )
    if "bitmaps" in info:
        lines.append(f"bitmaps in {info['bitmaps']['filename']}:")
        for b in info["bitmaps"]["bitmaps"]:
            state = "recording" if b["recording"] else "disabled"
            state = (
                "inconsistent" if b.get("inconsistent") else f"{human(b['count'])} dirty, {state}"
            )
            lines.append(
                f"    {one_line(b['name'])}: granularity {human(b['granularity'])}, {state}"
            )
    if info.get("snapshots"):
        lines.append("Snapshot list:")
        lines.append("ID        TAG               VM SIZE                DATE")
        for s in info["snapshots"]:
            date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(s["date-sec"]))
            tag, size = one_line(s["name"]), human(s["vm-state-size"])
            lines.append(f"{one_line(s['id']):<9} {tag:<16} {size:>8} {date}")
    if "format-specific" in info:
        lines.append("Format specific information:")
        lines += _nested(info["format-specific"]["data"], "    ")
    return "\n".join(lines)


def _nested(value: dict[str, Any] | list[Any], indent: str) -> list[str]:
    """Lists and what has names, as qemu-img prints them in one another."""
    lines = []
    named = isinstance(value, dict)
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        label = f"{indent}{str(key).replace('-', ' ') if named else f'[{key}]'}:"
        if isinstance(inner, dict | list):
            lines += [label, *_nested(inner, indent + "    ")]
        else:
            text = str(inner).lower() if isinstance(inner, bool) else one_line(str(inner))
            lines.append(f"{label} {text}")
    return lines
