"""Commands about the monitor and the daemon themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cowferry.commands import COMMANDS, Args, NoArgs, command, event
from cowferry.errors import CommandNotFound, CowferryError

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

VERSION = {"qemu": {"micro": 0, "minor": 1, "major": 10}, "package": "cowferry 0.1.0"}


class Capabilities(Args):
    enable: list[str] | None = None


@command("qmp_capabilities")
def qmp_capabilities(daemon: Daemon, args: Capabilities) -> None:
    """Begin the session; the monitor answers this itself before anything else."""
    raise CommandNotFound("Capabilities negotiation is already complete, command ignored")


@command("query-version", locked=False)
def query_version(daemon: Daemon, args: NoArgs) -> dict[str, Any]:
    """The version of QMP that is spoken here, and of cowferry in `package`."""
    return VERSION


class CommandInfo(msgspec.Struct):
    name: str


@command("query-commands", locked=False)
def query_commands(daemon: Daemon, args: NoArgs) -> list[CommandInfo]:
    """The names of all commands."""
    return [CommandInfo(name) for name in sorted(COMMANDS)]


@command("query-qmp-schema", locked=False)
def query_qmp_schema(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """All commands, events and types, for clients that look before they ask."""
    return daemon.schema()


class Status(msgspec.Struct):
    running: bool
    status: str


@command("query-status", locked=False)
def query_status(daemon: Daemon, args: NoArgs) -> Status:
    """Always running: there is no guest here to be stopped."""
    return Status(running=True, status="running")


class HumanMonitor(Args):
    command_line: str
    cpu_index: int | None = None
    x_errors: bool = False


@command("human-monitor-command", locked=False)
def human_monitor_command(daemon: Daemon, args: HumanMonitor) -> str:
    """Run a line of the human monitor, and return what it prints, also if it fails.

    With `x-errors` the text of a line that fails is an error instead."""
    return daemon.human(args.command_line, args.x_errors)


@command("quit", locked=False)
def quit_daemon(daemon: Daemon, args: NoArgs) -> None:
    """Stop cleanly: jobs are cancelled, everything is flushed."""
    daemon.quit()


class Stop(Args):
    force: bool = False
    drain: float = 1.0


class Stopping(msgspec.Struct):
    jobs: list[str]


@command("x-stop", locked=False)
def stop(daemon: Daemon, args: Stop) -> Stopping:
    """Stop cleanly, unless clients are still connected after `drain` seconds. The ids of the jobs
    that are cancelled."""
    if not 0 <= args.drain < 1 << 31:
        raise CowferryError("Parameter 'drain' expects a number of seconds")
    return Stopping(daemon.stop(args.force, args.drain))


@event("X_STOP_UNFINISHED")
class StopUnfinished(msgspec.Struct):
    what: list[str]


@event("SHUTDOWN")
class Shutdown(msgspec.Struct):
    guest: bool
    reason: str
