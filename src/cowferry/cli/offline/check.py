"""`cowferry check`: is an image consistent, and can it be mended."""

from __future__ import annotations

import json
from typing import Any

import click

from cowferry.cli.offline import image


@click.command("check")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option(
    "-r", "--repair", type=click.Choice(["leaks", "all"]), help="Mend what can be mended."
)
@click.option("--output", type=click.Choice(["human", "json"]), default="human")
@click.option("-U", "--force-share", is_flag=True, help="Even while another process has it open.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-T", "cache", metavar="MODE", help="Taken for compatibility.")
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.argument("filename")
def check_command(
    format: str | None, repair: str | None, output: str, force_share: bool, quiet: bool,
    cache: str | None, image_opts: bool, filename: str,
) -> int:  # fmt: skip
    """Check FILENAME. Exit code: 0 clean, 1 could not check, 2 corrupt, 3 leaks, 63 no checker."""
    with image(
        filename, format, read_only=repair is None, backing=False, force_share=force_share,
        image_opts=image_opts, repair=repair is not None,
    ) as node:  # fmt: skip
        checker = getattr(node, "check", None)
        if checker is None:
            if not quiet:
                click.echo("This image format does not support checks", err=output == "json")
            return 63
        result = checker(repair)
    if output == "json":
        click.echo(json.dumps(as_json(filename, node.driver, result), indent=4))
    elif not quiet:
        in_words(result)
    return int(result.exit_code)


def as_json(filename: str, format: str, r: Any) -> dict[str, Any]:
    """qemu-img's ImageCheck: counts that are zero are left out."""
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
    return out | {"check-errors": r.check_errors, "filename": filename, "format": format}


def in_words(r: Any) -> None:
    """As qemu-img prints it."""
    for message in r.messages[:100]:
        click.echo(message, err=True)
    if r.corruptions_fixed or r.leaks_fixed:
        click.echo(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {r.leaks_fixed} leaked clusters\n    {r.corruptions_fixed} corruptions\n"
        )
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
