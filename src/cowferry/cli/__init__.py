"""The command line: one click group whose commands are imported when they are used.

Importing everything for every `--help` would cost half a second; each command lives in a module
named in `COMMANDS`, under a variable of the same name (dashes as underscores).
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import click

from cowferry.cli.signals import end_at_once, heard
from cowferry.errors import CowferryError
from cowferry.wire import qmp

COMMANDS = {
    # offline
    "create": ("offline.create", "Make a new image."),
    "info": ("offline.info", "Show what an image is."),
    "map": ("offline.map", "Show where an image's bytes lie."),
    "check": ("offline.check", "Check an image, and mend it."),
    "convert": ("offline.convert", "Copy an image into another format."),
    "compare": ("offline.compare", "Compare what two images hold."),
    "resize": ("offline.resize", "Change an image's size, or that of a disk in use."),
    "rebase": ("offline.rebase", "Give an overlay another backing file."),
    "bitmap": ("offline.bitmap", "Record what changes in an image, or in a disk in use."),
    "current": ("offline.current", "Print where a disk is now that once was in a file."),
    # the daemon
    "serve": ("serve", "Serve disks to guests, until stopped."),
    "stop": ("live", "Stop the daemon cleanly."),
    # live: what changes a disk
    "snapshot": ("disks", "Put a new image on top of disks, at one point in time."),
    "stream": ("moving", "Fill a disk from its backing chain."),
    "commit": ("moving", "Merge layers of a disk's chain downwards."),
    "copy": ("moving", "Copy a disk elsewhere, and move it there."),
    "backup": ("backup", "Back up disks as they are at one moment."),
    "group": ("groups", "Stream, copy or commit several disks as one."),
    "change": ("disks", "Switch a disk to another image."),
    "backing": ("disks", "Record another backing file name in a header."),
    "add": ("disks", "Open one more disk."),
    "remove": ("disks", "Let go of a disk."),
    "limit": ("limits", "Limit what a disk's guests read and write."),
    "lock": ("disks", "Let nobody change a disk."),
    "unlock": ("disks", "Undo a lock."),
    # live: what looks
    "locks": ("disks", "List the locks."),
    "jobs": ("jobs", "List the jobs."),
    "job": ("jobs", "Pause, resume, slow, complete or cancel a job."),
    "tree": ("live", "Draw the chain of a disk."),
    "qmp": ("live", "Send one QMP command."),
    "monitor": ("live", "Talk to the human monitor."),
}
OFFLINE = {name for name, (module, _) in COMMANDS.items() if module.startswith("offline.")}
#: What a wrong command line ends these commands with; all others with 2. It is no result of theirs:
#: 2 says that check has found corruption, and 1 that compare has found a difference.
WRONG_USAGE = dict.fromkeys(OFFLINE - {"bitmap", "current"}, 1) | {"compare": os.EX_USAGE}


class Lazy(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"cowferry.cli.{COMMANDS[name][0]}")
        found: click.Command = getattr(module, f"{name}_command")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named. See `WRONG_USAGE`."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.show()
            sys.exit(WRONG_USAGE.get(ctx.invoked_subcommand or "", error.exit_code))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cowferry", prog_name="cowferry")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Serve virtual disks, and change them while their guests run.

    COMMAND --help says what each takes. Live commands talk to the daemon of the run folder
    ($COWFERRY_RUN), or to the QMP socket given by -c or $COWFERRY_QMP.

    A command that fails exits with 1. On a wrong command line it exits with 2, but qemu-img's
    commands exit with 1, and compare with 64. The help of check and compare lists their further
    exit codes.
    """
    if ctx.invoked_subcommand in OFFLINE:
        for number in heard():
            signal.signal(number, _ended)


def _ended(number: int, frame: FrameType | None) -> None:
    """A signal has come where a command only reads: whatever writes is inside `Interrupts`.

    An exception here might leave a lock taken for which the way out waits."""
    end_at_once(128 + number)


def complain(error: CowferryError) -> None:
    """One line, and what to do next."""
    click.echo(f"cowferry: {error.desc}", err=True)
    if error.hint:
        click.echo(f"  {error.hint}", err=True)


def show_every_name() -> None:
    """Have names of files that are no UTF-8 printed as the bytes that they are, in every locale."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        utf8 = codecs.lookup(out.encoding).name == "utf-8"
        with contextlib.suppress(OSError):  # descriptor 1 was exchanged below: it stays as it is
            out.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def main(argv: list[str] | None = None) -> Any:
    """The entry point: never a traceback for a mistake of the user's."""
    show_every_name()
    sys.setrecursionlimit(max(sys.getrecursionlimit(), qmp.RECURSION))
    if threading.current_thread() is threading.main_thread():
        # Their default action is the end of the process. Commands that show progress set SIGUSR1.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    try:
        status = group.main(argv, prog_name="cowferry", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        end_at_once(128 + signal.SIGINT)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CowferryError as error:
        complain(error)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        click.echo(f"cowferry: {error.strerror or error}", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
