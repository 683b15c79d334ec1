"""The live commands that look at a daemon, or talk to it in its own words."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from cowferry.block import names
from cowferry.cli.client import QmpError, connect
from cowferry.cli.options import control, json_output
from cowferry.cli.sizes import human
from cowferry.errors import CowferryError


@click.command("tree")
@click.argument("disk", required=False)
@json_output
@control
def tree_command(disk: str | None, as_json: bool, path: str | None) -> int:
    """Draw the chain of DISK, or of every disk: base first, as in base <- sn1 <- vm.img."""
    with connect(path) as client:
        trees = client.call("x-query-tree", device=disk)
        locks = {lock["device"]: lock["reason"] for lock in client.call("x-query-locks")}
    for tree in trees:
        if tree["device"] in locks:
            tree["locked"] = locks[tree["device"]]
    if as_json:
        click.echo(json.dumps(trees, indent=4))
        return 0
    for tree in trees:
        click.echo("\n".join(draw(tree)))
    if not trees:
        click.echo("no disks")
    return 0


def draw(tree: dict[str, Any]) -> list[str]:
    """The chain on one line, then what each layer holds."""
    layers = tree["chain"]
    short = {x["filename"]: _short(x["filename"]) for x in layers}
    line = " <- ".join(short[x["filename"]] for x in reversed(layers))
    lines = [f"{tree['device']} ({human(tree['size'])}): {line}"]
    width = max(map(len, short.values()))
    for x in reversed(layers):
        name = short[x["filename"]].ljust(width)
        share = 100 * x["data"] / max(x["virtual-size"], 1)
        zero = f", {human(x['zero'])} zero" if x["zero"] else ""
        remote = names.is_uri(x["filename"])
        place = "on a server" if remote else f"{human(x.get('actual-size', 0))} on disk"
        lines.append(
            f"    {name}  {x['format']:<6} {human(x['virtual-size'])}, holds {human(x['data'])} "
            f"({share:.0f}%){zero}, {place}"
        )
    if "locked" in tree:
        lines.append(f"    locked: {tree['locked']}")
    return lines


def _short(filename: str) -> str:
    """A path without its folders; a URI as it is."""
    return filename if names.is_uri(filename) else os.path.basename(filename)


def _typed(value: str) -> Any:
    if value in ("true", "on"):
        return True
    if value in ("false", "off"):
        return False
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


@click.command("qmp")
@click.argument("command")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]... | JSON")
@control
def qmp_command(command: str, arguments: tuple[str, ...], path: str | None) -> int:
    """Send one QMP COMMAND and print what it returns.

    Values are JSON where they can be (numbers, true, {...}) and strings otherwise; dots nest.
    """
    given: dict[str, Any] = {}
    if len(arguments) == 1 and arguments[0].startswith("{"):
        try:
            given = json.loads(arguments[0])
        except (ValueError, RecursionError) as error:
            raise CowferryError(f"not JSON: {error}") from None
    else:
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals:
                raise CowferryError(f"'{argument}' is not KEY=VALUE")
            here = given
            *outer, last = key.split(".")
            for part in outer:
                here = here.setdefault(part, {})
                if not isinstance(here, dict):
                    raise CowferryError(f"'{argument}': '{part}' has a value of its own already")
            here[last] = _typed(value)
    with connect(path) as client:
        try:
            result = client.execute(command, given)
        except QmpError as error:
            body = {"class": error.error_class, "desc": error.desc}
            click.echo(json.dumps({"error": body | ({"hint": error.hint} if error.hint else {})}))
            return 1
    click.echo(json.dumps(result, indent=4))
    return 0


@click.command("monitor")
@click.argument("line", nargs=-1)
@control
def monitor_command(line: tuple[str, ...], path: str | None) -> int:
    """Talk to the human monitor: one LINE, or a conversation until Ctrl-D.

    The exit status is 1 if LINE fails. A conversation from a file or pipe goes on after a line that
    fails, and its exit status is 1 then, too.
    """
    with connect(path) as client:

        def say(text: str) -> tuple[str, bool]:
            try:
                return client.call("human-monitor-command", command_line=text, x_errors=True), True
            except QmpError as error:
                return error.desc + "\n", False

        if line:
            said, well = say(" ".join(line))
            click.echo(said, nl=False, err=not well)
            return 0 if well else 1
        return converse(say)


def converse(say: Callable[[str], tuple[str, bool]]) -> int:
    """Lines from standard input, with editing where there is a terminal; the exit status."""
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401 - importing it gives input() its history
    status = 0
    while True:
        try:
            text = input("(qemu) " if person else "")
        except EOFError:
            return status
        if text.strip():
            said, well = say(text)
            click.echo(said, nl=False)
            if not (well or person):
                status = 1
        if text.strip() == "quit":
            return status


@click.command("stop")
@control
def stop_command(path: str | None) -> int:
    """Stop the daemon cleanly: jobs are cancelled, everything is flushed."""
    with connect(path) as client:
        client.call("quit")
    return 0
