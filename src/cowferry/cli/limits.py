"""limit: how much a disk's guests may read and write, now and from now on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from cowferry.block.limits import RATES
from cowferry.cli.client import connect
from cowferry.cli.options import control, json_output
from cowferry.cli.sizes import Size, human
from cowferry.errors import CowferryError

F = TypeVar("F", bound=Callable[..., Any])

WHAT = {
    "bps": "Bytes per second, read and written.",
    "bps_rd": "Bytes per second, read.",
    "bps_wr": "Bytes per second, written.",
    "iops": "Requests per second.",
    "iops_rd": "Reads per second.",
    "iops_wr": "Writes per second.",
}

#: What `virsh blkdeviotune` calls them; taken, and not listed.
VIRSH = {
    f"{whose}-{what}-sec{end}": f"{rate}{part}{end.replace('-', '_')}"
    for what, rate in (("bytes", "bps"), ("iops", "iops"))
    for whose, part in (("total", ""), ("read", "_rd"), ("write", "_wr"))
    for end in ("", "-max", "-max-length")
} | {"size-iops-sec": "iops_size", "group-name": "group"}


def kind(name: str) -> Any:
    """The click type of a member."""
    if name == "group":
        return str
    counts = name.endswith("_length") or (name.startswith("iops") and name != "iops_size")
    return int if counts else Size()


def limit_options(function: F) -> F:
    """Three options for each rate, and libvirt's names for them."""
    for old, name in VIRSH.items():
        dashed = name.replace("_", "-")
        words = f"The same, by its name in virsh: --{dashed}."
        taken = click.option(f"--{old}", f"virsh_{name}", type=kind(name), hidden=True, help=words)
        function = taken(function)
    for name in reversed(RATES):
        dashed, unit = name.replace("_", "-"), "RATE" if name.startswith("bps") else "N"
        for end, metavar, text in (
            ("_max_length", "SECONDS", "For how long at a time [1]."),
            ("_max", unit, "In a burst, after a pause."),
            ("", unit, WHAT[name]),
        ):
            flag = f"--{dashed}{end.replace('_', '-')}"
            option = click.option(
                flag, name + end, type=kind(name + end), metavar=metavar, help=text
            )
            function = option(function)
    return function


@click.command("limit")
@click.argument("disk", required=False)
@limit_options
@click.option(
    "--iops-size", type=Size(), metavar="SIZE", help="A request is one for each so many bytes."
)
@click.option("--group", metavar="NAME", help="Share limits with the other disks of this group.")
@click.option("--off", is_flag=True, help="No limits any more.")
@json_output
@control
def limit_command(
    disk: str | None, off: bool, as_json: bool, path: str | None, **given: Any
) -> int:
    """Limit what the guests of DISK read and write. It counts at once, for what waits, too.

    Limits that are not named stay as they are; a total takes the place of what is said for reads
    and writes, and the reverse; 0 takes one away. With no options it shows the limits of DISK, or
    of every disk that has some. They are the disk's: a snapshot, a copy or a commit that it moves
    to changes nothing. Jobs have a limit of their own (--speed). RATE is in bytes, 50M is 50 MiB.
    Disks of one group share its limits fairly. The options of `virsh blkdeviotune` are known, too.

    \b
        cowferry limit vm --bps 50M --iops-wr 200
        cowferry limit vm --bps-max 200M --bps-max-length 10
        cowferry limit vda --group web --iops 1000; cowferry limit vdb --group web
        cowferry limit vm --off
    """
    changes = {k: v for k, v in given.items() if v is not None and not k.startswith("virsh_")}
    for key, value in given.items():
        name = key.removeprefix("virsh_")
        if key != name and value is not None:
            if changes.get(name, value) != value:
                raise click.UsageError(f"two values for {name}: {changes[name]} and {value}")
            changes[name] = value
    if disk is None and (changes or off):
        raise click.UsageError("which disk is to be limited?")
    with connect(path) as client:
        if changes or off:
            arguments = {**changes, "device": disk, **({"off": True} if off else {})}
            entries = [client.execute("x-disk-limit", arguments)]
        else:
            entries = client.call("x-query-limits", device=disk)
    if as_json:
        click.echo(json.dumps(entries, indent=4))
        return 0
    for entry in entries:
        click.echo("\n".join(in_words(entry)))
    if not entries:
        click.echo("No disk has limits")
    return 0


def numbers_in_words(limits: dict[str, int]) -> str:
    """What is limited, and to how much."""
    parts = []
    for name, unit in (
        ("bps", "/s"), ("bps_rd", "/s read"), ("bps_wr", "/s written"),
        ("iops", " requests/s"), ("iops_rd", " reads/s"), ("iops_wr", " writes/s"),
    ):  # fmt: skip
        if name in limits:
            parts.append(rate(name, limits[name]) + unit)
            if f"{name}_max" in limits:
                seconds = limits.get(f"{name}_max_length", 1)
                parts[-1] += f" ({rate(name, limits[name + '_max'])}/s for {seconds} s)"
    if "iops_size" in limits:
        parts.append(f"a request is {human(limits['iops_size'])}")
    return ", ".join(parts) or "no limits"


def in_words(entry: dict[str, Any]) -> list[str]:
    """A disk's limits on one line, and with whom it shares them below."""
    lines = [f"{entry['device']}: {numbers_in_words(entry['limits'])}"]
    if entry.get("with"):
        lines.append(f"    shared with {', '.join(entry['with'])} (group {entry['group']})")
    elif entry.get("group", entry["device"]) != entry["device"]:
        lines.append(f"    group {entry['group']}")
    lines += [
        f"    and {numbers_in_words(other['limits'])} (group {other['group']})"
        for other in entry.get("also", ())
    ]
    if entry["waiting"]:
        lines.append(f"    {entry['waiting']} requests wait")
    return lines


def rate(name: str, value: int) -> str:
    """A number with its unit."""
    return human(value) if name.startswith("bps") else str(value)


def numbers(given: dict[str, Any]) -> dict[str, Any]:
    """Limits of an option's text, in which numbers may have suffixes. Raises `CowferryError`."""
    from cowferry.cli.sizes import parse_size

    return {k: parse_size(v) if isinstance(v, str) else v for k, v in given.items()}


def parse_limits(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(disk, x-disk-limit's arguments) of `--limit DISK,bps-total=50M,...`.

    The names may be those of -drive (throttling.bps-total), of throttle groups (bps-total) or of
    QMP (bps). Raises `CowferryError`."""
    from cowferry.block.limits import QOM_NAMES

    flat = dict(options)
    nested = flat.pop("throttling", {})
    if not isinstance(nested, dict):
        raise CowferryError(
            "--limit: 'throttling' is the beginning of a name: throttling.bps-total"
        )
    flat |= nested
    disk = flat.pop("disk", None)
    if not isinstance(disk, str) or not disk:
        raise CowferryError("--limit expects DISK,NAME=VALUE,...", "--limit vm,bps-total=50M")
    group = flat.pop("group", None)
    ours = {qom: name for name, qom in QOM_NAMES.items()}
    out: dict[str, Any] = {"device": disk, **({"group": group} if group else {})}
    for name, value in flat.items():
        known = ours.get(name) or (name.replace("-", "_") if name.replace("-", "_") in QOM_NAMES
                                   else None)  # fmt: skip
        if known is None:
            raise CowferryError(
                f"--limit {disk}: there is no limit '{name}'", f"there are: {', '.join(ours)}"
            )
        out |= numbers({known: value})
    return disk, out
