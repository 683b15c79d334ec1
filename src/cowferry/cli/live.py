"""The live commands: what one asks of a running daemon."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from cowferry.cli.client import Client, QmpError, connect
from cowferry.cli.sizes import Size, human
from cowferry.errors import CowferryError

INTERRUPTED = 130  # exit status, as shells have it
OVER = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")

control = click.option(
    "-c", "--connect", "path", metavar="PATH", help="QMP socket [$COWFERRY_QMP, run folder]."
)


@click.command("stream")
@click.argument("disk")
@click.option("--base", metavar="IMAGE", help="Keep this image, and what is below it.")
@click.option("--speed", type=Size(), default=0, metavar="RATE", help="Bytes per second, e.g. 50M.")
@click.option(
    "--on-error", type=click.Choice(["report", "ignore", "enospc", "stop"]), default="report"
)
@click.option("--async", "in_background", is_flag=True, help="Return as soon as it runs.")
@click.option("--json", "as_json", is_flag=True, help="Progress and result as JSON lines.")
@control
def stream_command(
    disk: str, base: str | None, speed: int, on_error: str,
    in_background: bool, as_json: bool, path: str | None,
) -> int:  # fmt: skip
    """Fill DISK from its backing chain while its guest runs.

    At the end the image needs its old backing no more, and it may be deleted. With --base, what
    is between DISK and IMAGE is taken over, and IMAGE stays. Ctrl-C cancels; the disk then keeps
    its backing file, and streaming again goes on from there.
    """
    with connect(path) as client:
        job = f"stream-{disk}".replace("#", "").replace("/", "-")[:200]
        client.call(
            "block-stream", job_id=job, device=disk, base=base, speed=speed, on_error=on_error
        )
        if in_background:
            report = json.dumps({"job": job}) if as_json else f"job {job} runs: cowferry jobs"
            click.echo(report)
            return 0
        return wait_for(client, job, f"stream {disk}", as_json)


def wait_for(client: Client, job: str, title: str, as_json: bool) -> int:
    """Show a job's progress until it is over; its exit code."""
    show = progress(title, as_json)
    try:
        while True:
            for event in client.wait_events(0.2):
                data = event.get("data", {})
                if event["event"] == "BLOCK_JOB_ERROR" and data.get("device") == job:
                    if data["action"] == "stop":
                        show.note(f"paused after an error; then: cowferry job resume {job}")
                elif event["event"] in OVER and data.get("device") == job:
                    return finish(show, event["event"], data, title)
            for entry in client.call("query-block-jobs"):
                if entry["device"] == job:
                    show.update(entry["offset"], entry["len"], entry["status"])
    except KeyboardInterrupt:
        with contextlib.suppress(QmpError):  # it has just ended
            client.call("job-cancel", id=job)
        for event in client.wait_events(60):
            if event["event"] in OVER and event["data"].get("device") == job:
                return finish(show, event["event"], event["data"], title) and INTERRUPTED
        raise
    finally:
        show.close()


def finish(show: Progress, event: str, data: dict[str, Any], title: str) -> int:
    """The last words, and the exit code."""
    show.update(data["offset"], data["len"], "concluded")
    show.close()
    if event == "BLOCK_JOB_CANCELLED":
        show.result(data, "cancelled")
        click.echo(f"{title}: cancelled; the disk keeps its backing file", err=True)
        return 1
    if "error" in data:
        done = 100 * data["offset"] // max(data["len"], 1)
        show.result(data, "failed")
        raise CowferryError(
            f"{title} failed at {done}%: {data['error']}",
            "the disk is intact and keeps its backing file; once the cause is mended, run it again",
        )
    show.result(data, "completed")
    return 0


class Progress:
    """Where progress goes: nowhere."""

    def __init__(self, title: str) -> None:
        self.title = title

    def update(self, done: int, length: int, status: str) -> None:
        """So far."""

    def note(self, text: str) -> None:
        """Something that a person should know now."""
        click.echo(f"{self.title}: {text}", err=True)

    def result(self, data: dict[str, Any], outcome: str) -> None:
        """How it ended."""
        click.echo(f"{self.title}: {outcome}, {human(data['offset'])}")

    def close(self) -> None:
        """No more."""


class JsonLines(Progress):
    """One JSON object a line."""

    last: tuple[int, str] | None = None

    def update(self, done: int, length: int, status: str) -> None:
        if (done, status) != self.last:
            self.last = (done, status)
            click.echo(json.dumps({"offset": done, "len": length, "status": status}))

    def result(self, data: dict[str, Any], outcome: str) -> None:
        click.echo(json.dumps({"result": outcome, **data}))


class Bar(Progress):
    """A bar on a terminal."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Rich

        self.rich = Rich(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
            TransferSpeedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self.task = self.rich.add_task(title)
        self.rich.start()

    def update(self, done: int, length: int, status: str) -> None:
        paused = " (paused)" if status in ("paused", "standby") else ""
        self.rich.update(self.task, completed=done, total=length, description=self.title + paused)

    def close(self) -> None:
        self.rich.stop()


def progress(title: str, as_json: bool) -> Progress:
    """What suits where the output goes."""
    if as_json:
        return JsonLines(title)
    return Bar(title) if sys.stdout.isatty() else Progress(title)


@click.command("jobs")
@click.option("--json", "as_json", is_flag=True)
@control
def jobs_command(as_json: bool, path: str | None) -> int:
    """List the jobs of the daemon."""
    with connect(path) as client:
        entries = client.call("query-block-jobs")
    if as_json:
        click.echo(json.dumps(entries, indent=4))
        return 0
    if not entries:
        click.echo("No active jobs")
    for j in entries:
        share = 100 * j["offset"] / max(j["len"], 1)
        speed = f", limit {human(j['speed'])}/s" if j["speed"] else ""
        error = f": {j['error']}" if "error" in j else ""
        done = f"{share:.1f}% of {human(j['len'])}"
        click.echo(f"{j['device']}  {j['type']}  {j['status']}  {done}{speed}{error}")
    return 0


@click.group("job")
def job_command() -> None:
    """Pause, resume, cancel, slow or finish a job."""


def _verb(name: str, command: str, text: str) -> None:
    @job_command.command(name, help=text)
    @click.argument("id")
    @control
    def run(id: str, path: str | None) -> int:
        with connect(path) as client:
            client.call(command, id=id)
        return 0


_verb("pause", "job-pause", "Pause a job at its next chunk.")
_verb("resume", "job-resume", "Let a paused job go on.")
_verb("complete", "job-complete", "Let a ready job finish.")
_verb("finalize", "job-finalize", "Make a pending job's result true.")
_verb("dismiss", "job-dismiss", "Forget a concluded job.")


@job_command.command("cancel")
@click.argument("id")
@control
def cancel_job(id: str, path: str | None) -> int:
    """Call a job off, and wait until it has stopped. The disk keeps its backing file."""
    with connect(path) as client:
        client.call("job-cancel", id=id)
        for event in client.wait_events(60):
            if event["event"] in OVER and event["data"].get("device") == id:
                return 0
            if not any(j["id"] == id for j in client.call("query-jobs")):
                return 0
    return 0


@job_command.command("speed")
@click.argument("id")
@click.argument("rate", type=Size())
@control
def job_speed(id: str, rate: int, path: str | None) -> int:
    """Let a job move RATE bytes per second (0: as fast as it can)."""
    with connect(path) as client:
        client.call("block-job-set-speed", device=id, speed=rate)
    return 0


@click.command("tree")
@click.argument("disk", required=False)
@click.option("--json", "as_json", is_flag=True)
@control
def tree_command(disk: str | None, as_json: bool, path: str | None) -> int:
    """Draw the chain of DISK, or of every disk: base first, as in base <- sn1 <- vm.img."""
    with connect(path) as client:
        trees = client.call("x-query-tree", device=disk)
    if as_json:
        click.echo(json.dumps(trees, indent=4))
        return 0
    for t in trees:
        click.echo("\n".join(draw(t)))
    if not trees:
        click.echo("no disks")
    return 0


def draw(tree: dict[str, Any]) -> list[str]:
    """The chain on one line, then what each layer holds."""
    layers = tree["chain"]
    names = " <- ".join(os.path.basename(x["filename"]) for x in reversed(layers))
    lines = [f"{tree['device']} ({human(tree['size'])}): {names}"]
    width = max(len(os.path.basename(x["filename"])) for x in layers)
    for x in reversed(layers):
        name = os.path.basename(x["filename"]).ljust(width)
        share = 100 * x["data"] / max(x["virtual-size"], 1)
        zero = f", {human(x['zero'])} zero" if x["zero"] else ""
        lines.append(
            f"    {name}  {x['format']:<6} {human(x['virtual-size'])}, holds {human(x['data'])} "
            f"({share:.0f}%){zero}, {human(x.get('actual-size', 0))} on disk"
        )
    return lines


def _typed(value: str) -> Any:
    if value in ("true", "on"):
        return True
    if value in ("false", "off"):
        return False
    try:
        return json.loads(value)
    except ValueError:
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
        except ValueError as error:
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
    """Talk to the human monitor: one LINE, or a conversation until Ctrl-D."""
    with connect(path) as client:

        def say(text: str) -> None:
            click.echo(client.call("human-monitor-command", command_line=text), nl=False)

        if line:
            say(" ".join(line))
            return 0
        return converse(say)


def converse(say: Callable[[str], None]) -> int:
    """Lines from standard input, with editing where there is a terminal."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - importing it gives input() its history
    while True:
        try:
            text = input("(qemu) " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if text.strip():
            say(text)
        if text.strip() == "quit":
            return 0


@click.command("stop")
@control
def stop_command(path: str | None) -> int:
    """Stop the daemon cleanly: jobs are cancelled, everything is flushed."""
    with connect(path) as client:
        client.call("quit")
    return 0
