"""The live commands that look at a daemon, or talk to it in its own words."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from cowferry.block import names
from cowferry.block.peers import STOPPED, called
from cowferry.cli.client import ALIVE_SECONDS, TIMEOUT, Client, HungUp, QmpError, connect
from cowferry.cli.keyval import parse_option
from cowferry.cli.options import control, json_output
from cowferry.cli.sizes import Seconds, human
from cowferry.errors import CowferryError

STOP_SECONDS = 10.0  # that a daemon may take to end
MOMENT = 1.0  # seconds


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
        remote = names.is_uri(x["filename"])
        place = "on a server" if remote else f"{human(x.get('actual-size', 0))} on disk"
        if "data" in x:
            share = 100 * x["data"] / max(x["virtual-size"], 1)
            zero = f", {human(x['zero'])} zero" if x["zero"] else ""
            held = f"holds {human(x['data'])} ({share:.0f}%){zero}"
        else:
            held = x["x-note"]
        lines.append(f"    {name}  {x['format']:<6} {human(x['virtual-size'])}, {held}, {place}")
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


def _message(text: str, more: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Return the command and the arguments of a message of QMP. Raises `CowferryError`."""
    message = parse_option(text)
    command, given = message.get("execute"), message.get("arguments", {})
    if more or message.keys() - {"execute", "arguments"}:
        raise CowferryError(
            'a whole message has only the members "execute" and "arguments", and no words follow it'
        )
    if not isinstance(command, str) or not isinstance(given, dict):
        raise CowferryError('a whole message is {"execute": "COMMAND", "arguments": {...}}')
    return command, given


@click.command("qmp")
@click.argument("command")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]... | JSON")
@control
def qmp_command(command: str, arguments: tuple[str, ...], path: str | None) -> int:
    """Send one QMP COMMAND and print what it returns.

    A VALUE that is JSON (a number, true, {...}) is sent as JSON, any other as a string. Dots in KEY
    nest: a.b=1 sends {"a": {"b": 1}}. The arguments, or the whole message with "execute" and
    "arguments", may also be one JSON object.
    """
    given: dict[str, Any] = {}
    if command.startswith("{"):
        command, given = _message(command, arguments)
    elif len(arguments) == 1 and arguments[0].startswith("{"):
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
                    raise CowferryError(
                        f"'{argument}': '{part}' already has a value, so it cannot have members"
                    )
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
@click.option(
    "--drain", type=Seconds(), metavar="SECONDS",
    help="Wait up to SECONDS for the clients of all disks to leave.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Disconnect clients; their further I/O fails.")
@control
def stop_command(drain: float | None, force: bool, path: str | None) -> int:
    """Stop the daemon cleanly: cancel its jobs, flush everything, and close all images.

    While clients are connected to a disk, the daemon refuses, and names them, because their I/O
    would fail. The command returns when the process has ended. If storage or a server does not
    answer, the daemon stops waiting after at most ten seconds, and says what hangs.

    \b
        cowferry stop --drain 60
    """
    with connect(path) as client:
        pid = client.pid
        try:
            process = os.pidfd_open(pid) if pid and pid != os.getpid() else -1
        except OSError:  # it has ended, or we may not look
            process = -1
        try:
            cancelled = _ask_to_stop(client, drain, force)
            for job in cancelled:
                click.echo(f"stop: job {job} is cancelled", err=True)
            return _await_end(client, pid, process)
        finally:
            if process >= 0:
                os.close(process)


def _ask_to_stop(client: Client, drain: float | None, force: bool) -> list[str]:
    """Ask for the end; the jobs that are cancelled. Raises `CowferryError`."""
    context = click.get_current_context()
    if drain is not None and context.meta.get(TIMEOUT) is None:
        client.timeout = drain + ALIVE_SECONDS
    try:
        answer = client.call("x-stop", drain=drain, force=force)
    except QmpError as error:
        if error.error_class != "CommandNotFound":  # of another daemon that speaks QMP
            raise
        client.call("quit")
        return []
    except HungUp:
        return []
    return [str(job) for job in answer["jobs"]]


def _await_end(client: Client, pid: int, process: int) -> int:
    """Until the daemon's process has ended; the exit status."""
    until = time.monotonic() + STOP_SECONDS
    late: list[str] = []
    with contextlib.suppress(HungUp):  # then its sockets are gone, and its images nearly
        while time.monotonic() < until and pid != os.getpid():
            for event in client.wait_events(max(until - time.monotonic(), 0)):
                if event["event"] == "X_STOP_UNFINISHED":
                    late = event["data"]["what"]
    if process < 0:
        return 0
    if late:  # what it does not wait for may keep its process for long
        until = min(until, time.monotonic() + MOMENT)
    ended = select.select([process], [], [], max(until - time.monotonic(), 0.1))[0]
    if ended and not late:
        return 0
    if not late:  # it does not get that far
        who = called(pid)
        go_on = f"continue it: kill -CONT {pid}" if STOPPED in who else "its log may say more"
        click.echo(
            f"stop: told to stop, the daemon has not ended within {STOP_SECONDS:g} s: {who}\n"
            f"  its images may still be in use; it ends as soon as it can; {go_on}",
            err=True,
        )
        return 1
    still = "" if ended else f", and its process {pid} is still there"
    click.echo(
        f"stop: the daemon ends without waiting for what hangs: {', '.join(late)}{still}\n"
        "  every other image is flushed and free; what hangs may lose unflushed writes",
        err=True,
    )
    return 1
