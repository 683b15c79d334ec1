"""Options and arguments that several live commands share, and how their texts are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

from cowferry.block import names
from cowferry.cli.client import TIMEOUT
from cowferry.cli.sizes import Seconds, Size
from cowferry.errors import CowferryError

F = TypeVar("F", bound=Callable[..., Any])

socket_path = click.option(
    "-c", "--connect", "path", metavar="PATH", help="QMP socket [$COWFERRY_QMP, run folder]."
)


def _keep_timeout(ctx: click.Context, parameter: click.Parameter, value: float | None) -> None:
    if value is not None:
        ctx.meta[TIMEOUT] = value


answer_timeout = click.option(
    "--timeout", type=Seconds(), metavar="SECONDS", expose_value=False, callback=_keep_timeout,
    help="How long to wait for the daemon [as long as it answers others].",
)  # fmt: skip


def control(function: F) -> F:
    """How a live verb reaches its daemon."""
    return socket_path(answer_timeout(function))


json_output = click.option("--json", "as_json", is_flag=True, help="The answer as JSON.")
json_lines = click.option(
    "--json", "as_json", is_flag=True, help="Progress and result as JSON lines."
)
in_background = click.option(
    "--async", "in_background", is_flag=True, help="Return as soon as it runs."
)
no_waiting = click.option("--async", "in_background", is_flag=True, help="Do not wait for the end.")
speed = click.option(
    "--speed", type=Size(), default=0, metavar="RATE", help="Bytes per second, e.g. 50M."
)
POLICIES = ("report", "ignore", "enospc", "stop")


def on_error(name: str = "--on-error", whose: str = "an") -> Callable[[F], F]:
    """What a job does when it meets one."""
    return click.option(
        name,
        type=click.Choice(POLICIES),
        default="report",
        show_default=True,
        help=f"After {whose} error: report fails at once, ignore goes on and fails at the end, "
        "enospc pauses if the storage is full (else fails), stop pauses.",
    )


copy_mode = click.option(
    "--copy-mode",
    type=click.Choice(["background", "write-blocking"]),
    default="background",
    show_default=True,
    help="Copy behind the guest's writes, or hold each until both sides have it.",
)


def ending(pivot: str, finish: str) -> Callable[[F], F]:
    """How a job ends that is ready. The texts are the help's."""

    def both(function: F) -> F:
        last = click.option("--finish", is_flag=True, help=finish)(function)
        return click.option("--pivot", is_flag=True, help=pivot)(last)

    return both


def exclusive(pivot: bool, finish: bool) -> Literal["pivot", "finish", None]:
    """Which of the two was chosen, if any. Raises `UsageError` for both."""
    if pivot and finish:
        raise click.UsageError("--pivot and --finish exclude each other")
    return "pivot" if pivot else "finish" if finish else None


#: What the daemon is told to do with a job that is ready, whether or not we are still there then.
ON_READY = {"pivot": "complete", "finish": "cancel", "stay": None}


def job_id(verb: str, disk: str) -> str:
    """The id of a verb's job on a disk: what a person would call it, within the rules of ids."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{verb}-{disk.replace('#', '')}")[:200]


def absolute(file: str) -> str:
    """A file for the daemon, which may run in another folder; or a URI as it is.

    Raises `CowferryError` for none."""
    if not file:
        raise CowferryError("an empty file name")
    return names.absolute(file)


def image(name: str | None) -> str | None:
    """An image of a chain: a file as one sees it from here, a name that a header records, or a
    node-name. What exists here is meant as a file."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


def pair(text: str) -> tuple[str, str | None]:
    """(disk, the rest) of DISK or DISK=REST. Raises `CowferryError`."""
    disk, equals, rest = text.partition("=")
    if not disk or (equals and not rest):
        raise CowferryError(f"'{text}' is not DISK or DISK=FILE")
    return disk, rest if equals else None
