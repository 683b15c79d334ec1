"""jobs, job: what runs, and the verbs on it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from cowferry.cli.client import Client, QmpError, connect
from cowferry.cli.options import control, json_lines, json_output, no_waiting
from cowferry.cli.sizes import Size, human
from cowferry.cli.waiting import JobWork, Words, follow, notes_of, placed
from cowferry.errors import CowferryError


def extra(client: Client, query: str) -> list[dict[str, Any]]:
    """What a query of our own answers; nothing with a daemon that has no such query."""
    try:
        found: list[dict[str, Any]] = client.call(query)
    except QmpError as error:
        if error.error_class == "CommandNotFound":
            return []
        raise
    return found


def groups(client: Client) -> list[dict[str, Any]]:
    """Every group of jobs."""
    return extra(client, "x-query-groups")


def failures(client: Client) -> list[dict[str, Any]]:
    """The last jobs that failed, and have not been dismissed or tried again."""
    return extra(client, "x-query-failed-jobs")


def job(client: Client, id: str) -> dict[str, Any]:
    """A job's entry in query-jobs. Raises `CowferryError`."""
    entries: list[dict[str, Any]] = client.call("query-jobs")
    for entry in entries:
        if entry["id"] == id:
            return entry
    for failed in failures(client):
        if failed["device"] == id:
            raise CowferryError(f"Job '{id}' has failed: {placed(failed)}", "see cowferry jobs")
    known = ", ".join(e["id"] for e in entries) or "none"
    raise CowferryError(f"Job '{id}' not found", f"there are: {known}")


@click.command("jobs")
@json_output
@control
def jobs_command(as_json: bool, path: str | None) -> int:
    """List the jobs of the daemon: how far each is, and what there is to know or to do.

    Jobs that failed are listed below them, until they are run again or dismissed. In JSON they have
    the status "concluded", an "error" and the time of their end.
    """
    with connect(path) as client:
        entries = client.call("query-block-jobs")
        failed = failures(client)
        member_of = {m["device"]: g["id"] for g in groups(client) for m in g["members"]}
    if as_json:
        click.echo(json.dumps(entries + failed, indent=4))
        return 0
    if not entries:
        click.echo("No active jobs")
    for entry in entries:
        click.echo("\n".join(in_words(entry, member_of.get(entry["device"]))))
    for entry in failed:
        click.echo("\n".join(failure_in_words(entry)))
    return 0


def failure_in_words(entry: dict[str, Any]) -> list[str]:
    """A job that failed, in two lines."""
    id, at = entry["device"], datetime.fromtimestamp(entry["x-ended"])
    share = 100 * entry["offset"] / max(entry["len"], 1)
    return [
        f"{id}  {entry['type']}  failed  at {share:.1f}% of {human(entry['len'])}, on "
        f"{at:%Y-%m-%d %H:%M:%S}: {placed(entry)}",
        f"    run it again, or forget it: cowferry job dismiss {id}",
    ]


def in_words(entry: dict[str, Any], group: str | None = None) -> list[str]:
    """A job on one line, and its notes below."""
    share = 100 * entry["offset"] / max(entry["len"], 1)
    parts = [f"{share:.1f}% of {human(entry['len'])}"]
    if entry["speed"]:
        parts.append(f"limit {human(entry['speed'])}/s")
    if entry["status"] == "running" and entry.get("x-copy-rate"):
        parts.append(
            f"copies {human(entry['x-copy-rate'])}/s, "
            f"the guest writes {human(entry.get('x-dirty-rate', 0))}/s"
        )
    if entry.get("copy-mode") == "write-blocking":
        parts.append("write-blocking")
    error = f": {entry['error']}" if "error" in entry else ""
    lines = [f"{entry['device']}  {entry['type']}  {entry['status']}  {', '.join(parts)}{error}"]
    notes = notes_of(entry) + intent_of(entry)
    if entry.get("ready"):
        id = entry["device"]
        notes.append(
            f"a member of group {group}: cowferry group complete {group}"
            if group
            else f"cowferry job complete {id} moves over; cowferry job cancel --soft {id} does not"
        )
    return lines + [f"    {note}" for note in notes]


def intent_of(entry: dict[str, Any]) -> list[str]:
    """What a job or a group does by itself once it is ready, as a note."""
    several = "members" in entry
    intents = {
        "complete": f"moves {'its disks' if several else 'its disk'} over",
        "cancel": f"ends as {'copies' if several else 'a copy'} of that moment",
    }
    return [f"once it is ready it {v}" for k, v in intents.items() if k == entry.get("x-on-ready")]


@click.group("job")
def job_command() -> None:
    """Pause, resume, slow, complete or cancel a job.

    ID is what the verb that started the job said, and what `cowferry jobs` lists.
    """


def _verb(name: str, command: str, text: str) -> None:
    @job_command.command(name, help=text)
    @click.argument("id")
    @control
    def run(id: str, path: str | None) -> int:
        with connect(path) as client:
            job(client, id)
            client.call(command, id=id)
        return 0


_verb("pause", "job-pause", "Pause a job at its next chunk.")
_verb("resume", "job-resume", "Let a paused job go on, with the chunk that failed if one did.")
_verb("finalize", "job-finalize", "Make a pending job's result true.")


@job_command.command("dismiss")
@click.argument("id")
@control
def dismiss_job(id: str, path: str | None) -> int:
    """Forget a job that has concluded or failed."""
    with connect(path) as client:
        if id not in (entry["device"] for entry in failures(client)):
            job(client, id)
        client.call("job-dismiss", id=id)
    return 0


@job_command.command("complete", short_help="Let a ready job finish: its disk moves.")
@click.argument("id")
@no_waiting
@json_lines
@control
def complete_job(id: str, in_background: bool, as_json: bool, path: str | None) -> int:
    """Let a ready job finish, and wait until it has: a copy or a commit moves its disk over.

    \b
        cowferry copy vm /fast/vm.raw
        cowferry job complete copy-vm
    """
    with connect(path) as client:
        job(client, id)
        work = JobWork(client, id)
        work.complete()
        if in_background:
            return 0
        words = Words(
            f"job {id}", "its disk stays where it is", "its disk is intact and stays where it is",
            pivoted="its disk has moved over",
        )  # fmt: skip
        return follow(work, words, as_json)


@job_command.command("cancel", short_help="Call a job off, softly or not.")
@click.argument("id")
@click.option("--soft", is_flag=True, help="A ready copy ends as a copy of this moment.")
@json_lines
@control
def cancel_job(id: str, soft: bool, as_json: bool, path: str | None) -> int:
    """Call a job off, and wait until it has stopped. Its disk stays where it is.

    What a cancelled copy has made is removed; what a stream has filled is kept. With --soft a
    job that is ready ends well instead: the target is a consistent copy of this moment. One that
    is not ready is cancelled all the same.

    \b
        cowferry job cancel --soft copy-vm
    """
    with connect(path) as client:
        job(client, id)
        work = JobWork(client, id)
        work.cancel(force=not soft)
        cancelled = "it was not ready, so its target is incomplete" if soft else ""
        words = Words(
            f"job {id}", cancelled, "its disk is intact and stays where it is",
            finished="its target is a copy of that moment",
        )  # fmt: skip
        return follow(work, words, as_json, asked_to_stop=True)


@job_command.command("mode", short_help="Copy behind the guest's writes, or hold them.")
@click.argument("id")
@click.argument("mode", type=click.Choice(["background", "write-blocking"]))
@control
def job_mode(id: str, mode: str, path: str | None) -> int:
    """Let a copy run behind the guest's writes, or hold each write until both sides have it.

    A copy that does not converge in the background does so when it blocks.

    \b
        cowferry job mode copy-vm write-blocking
    """
    with connect(path) as client:
        client.call("block-job-change", id=id, type=job(client, id)["type"], copy_mode=mode)
    return 0


@job_command.command("speed", short_help="Let a job move so many bytes per second.")
@click.argument("id")
@click.argument("rate", type=Size())
@control
def job_speed(id: str, rate: int, path: str | None) -> int:
    """Let a job move RATE bytes per second (0: as fast as it can)."""
    with connect(path) as client:
        job(client, id)
        client.call("block-job-set-speed", device=id, speed=rate)
    return 0
