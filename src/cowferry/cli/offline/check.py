"""`cowferry check`: is an image consistent, and can it be mended."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import click

from cowferry.cli.offline import cached, forget, image
from cowferry.cli.offline.interrupts import Interrupts
from cowferry.errors import one_line


@click.command("check")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option(
    "-r", "--repair", type=click.Choice(["leaks", "all"]), help="Mend what can be mended."
)
@click.option("--output", type=click.Choice(["human", "json"]), default="human")
@click.option("-U", "--force-share", is_flag=True, help="Even while another process has it open.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-T", "cache", metavar="MODE", help="none: keep the image out of the page cache.")
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.argument("filename")
def check_command(
    format: str | None, repair: str | None, output: str, force_share: bool, quiet: bool,
    cache: str | None, image_opts: bool, filename: str,
) -> int:  # fmt: skip
    """Check FILENAME, and with -r repair it.

    A repair leaves alone what it cannot correct without doubt, and says so. It never overwrites
    what the image refers to.

    \b
    Exit code:
        0   no errors were found, or all were repaired
        1   the check could not be done, or the command line is wrong
        2   the image is corrupt, or a part of it still is
        3   it has leaked clusters, which waste room and do no harm
        63  the format has no check
    """
    keep = cached(cache)
    with ExitStack() as stack:
        if repair is not None:
            stack.enter_context(Interrupts())
        node = stack.enter_context(
            image(
                filename, format, read_only=repair is None, backing=False,
                force_share=force_share, image_opts=image_opts, repair=True,
            )
        )  # fmt: skip
        checker = getattr(node, "check", None)
        if checker is None:
            if not quiet:
                click.echo("This image format does not support checks", err=output == "json")
            return 63
        result = checker(repair)
        if not keep:
            forget(node)
    if not quiet:
        for message in (*result.messages, *result.repairs):
            click.echo(one_line(message), err=True)
        if result.left:
            click.echo("After the repair:", err=True)
        for message in result.left:
            click.echo(one_line(message), err=True)
    if output == "json":
        click.echo(json.dumps(as_json(filename, node.driver, result), indent=4))
    elif not quiet:
        in_words(result)
    return int(result.exit_code)


def as_json(filename: str, format: str, r: Any) -> dict[str, Any]:
    """qemu-img's ImageCheck: counts that are zero are left out. `repairs` is ours."""
    out: dict[str, Any] = {}
    if r.image_end_offset:
        out["image-end-offset"] = r.image_end_offset
    counts = {
        "total-clusters": r.total_clusters,
        "fragmented-clusters": r.fragmented_clusters,
        "allocated-clusters": r.allocated_clusters,
        "compressed-clusters": r.compressed_clusters,
        "corruptions": r.corruptions,
        "leaks": r.leaks,
        "corruptions-fixed": r.corruptions_fixed,
        "leaks-fixed": r.leaks_fixed,
    }
    out |= {k: v for k, v in counts.items() if v}
    if r.repairs:
        out["repairs"] = list(r.repairs)
    return out | {"check-errors": r.check_errors, "filename": filename, "format": format}


def in_words(r: Any) -> None:
    """As qemu-img prints it."""
    if r.corruptions_fixed or r.leaks_fixed:
        click.echo(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {r.leaks_fixed} leaked clusters\n    {r.corruptions_fixed} corruptions\n"
        )
    if r.check_errors:
        click.echo(f"\n{r.check_errors} parts of the image could not be read.")
    if not (r.corruptions or r.leaks or r.check_errors):
        click.echo("No errors were found on the image.")
    if r.corruptions:
        click.echo(
            f"\n{r.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if r.leaks:
        click.echo(
            f"\n{r.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if r.total_clusters:
        share = 100 * r.allocated_clusters / r.total_clusters
        allocated = max(r.allocated_clusters, 1)
        click.echo(
            f"{r.allocated_clusters}/{r.total_clusters} = {share:.2f}% allocated, "
            f"{100 * r.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * r.compressed_clusters / allocated:.2f}% compressed clusters"
        )
    if r.image_end_offset:
        click.echo(f"Image end offset: {r.image_end_offset}")
