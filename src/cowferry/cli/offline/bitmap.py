"""`cowferry bitmap`: dirty bitmaps of an image that nobody uses, or of a disk of the daemon.

Both are done by the daemon's own commands: with `--live` by the daemon that serves the disk, else
by one of this process that opens the image for the moment. So what is looked at, and the words,
are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import click

from cowferry.cli.client import connect, in_options
from cowferry.cli.keyval import parse_option
from cowferry.cli.offline.interrupts import Interrupts
from cowferry.cli.options import F, control, json_output
from cowferry.cli.sizes import Size, human
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.qcow2.bitmap_directory import text as shown
from cowferry.errors import CowferryError, ImageError, one_line

ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")
OTHER = "the image merged from"  # its name as a disk, beside that of the image itself


class Ask(Protocol):
    """Runs a QMP command; None leaves an argument out. Raises `CowferryError`."""

    def __call__(self, command: str, **arguments: Any) -> Any: ...


class Action(NamedTuple):
    """Something to be done to the bitmap; `source` is merged into it."""

    verb: str
    source: str | None


class InOrder(click.Command):
    """A command whose actions count in the order in which they are given: `ctx.obj` has them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        sources = iter(given.get("merge", ()))
        ctx.obj = [
            Action(p.name, next(sources) if p.name == "merge" else None)
            for p in order
            if p.name in ACTIONS
        ]
        return super().parse_args(ctx, args)


def action(name: str, help: str, **more: Any) -> Callable[[F], F]:
    """An option that is found in `ctx.obj`."""
    return click.option(f"--{name}", expose_value=False, help=help, **more)


@click.command("bitmap", cls=InOrder)
@action("add", "Begin to record what is written.", is_flag=True)
@action("remove", "Forget the bitmap.", is_flag=True)
@action("clear", "Forget what was recorded, and go on recording.", is_flag=True)
@action("enable", "Record (again).", is_flag=True)
@action("disable", "Keep what was recorded, and record no more.", is_flag=True)
@action("merge", "Add what the bitmap SOURCE has recorded.", multiple=True, metavar="SOURCE")
@click.option("-b", "--source-file", metavar="FILE", help="SOURCE is a bitmap of that image.")
@click.option("-F", "--source-format", metavar="FORMAT", help="Format of that image [by the name].")
@click.option("-g", "--granularity", type=Size(), help="With --add: bytes that have one bit.")
@click.option("--transient", is_flag=True, help="With --live --add: in the daemon's memory only.")
@click.option("--list", "listing", is_flag=True, help="Show the bitmaps (if nothing else is said).")
@click.option("--map", "mapping", is_flag=True, help="Show which bytes are dirty.")
@click.option("--live", is_flag=True, help="FILENAME is a disk that the daemon serves.")
@click.option("-f", "--format", "format", help="Format [by the name].")
@click.option("--image-opts", is_flag=True, help="FILENAME is an option string.")
@click.option("-U", "--force-share", is_flag=True, help="Look even while another process has it.")
@json_output
@control
@click.argument("filename")
@click.argument("name", required=False)
@click.pass_context
def bitmap_command(
    ctx: click.Context, source_file: str | None, source_format: str | None,
    granularity: int | None, transient: bool, listing: bool, mapping: bool, live: bool,
    format: str | None, image_opts: bool, force_share: bool, as_json: bool, path: str | None,
    filename: str, name: str | None,
) -> int:  # fmt: skip
    """Dirty bitmap NAME of FILENAME: which of its bytes have changed since some moment.

    It is kept in the image if the format has room for it (qcow2), else in FILENAME.bitmaps beside
    it. Actions are done in the order in which they are given.

    A byte of a name that is no UTF-8 is shown, and may be typed, as \\xNN.

    \b
        cowferry bitmap --add vm.raw monday             record from now on
        cowferry bitmap --live --add vm monday          the same while a guest runs
        cowferry bitmap vm.raw                          which bitmaps are there?
        cowferry bitmap --map vm.raw monday             what has changed since?
        cowferry bitmap --add --merge monday --disable vm.raw until-now
    """
    actions: list[Action] = ctx.obj
    verbs = {a.verb for a in actions}
    name, actions = _typed(name), [a._replace(source=_typed(a.source)) for a in actions]
    for wrong, text in (
        ((actions or mapping) and name is None, "the NAME of a bitmap is missing"),
        (actions and (listing or mapping), "--list and --map go without actions"),
        (source_file and "merge" not in verbs, "-b goes with --merge only"),
        (source_format and (live or not source_file), "-F goes with -b, and not with --live"),
        (granularity is not None and "add" not in verbs, "-g goes with --add only"),
        (transient and not (live and "add" in verbs), "--transient goes with --live --add only"),
        (force_share and actions, "-U goes without actions"),
        (live and (format or image_opts or force_share), "-f, --image-opts, -U: not with --live"),
    ):
        if wrong:
            raise click.UsageError(text)
    other = None if source_file is None else (source_file, source_format)
    house = (
        _served(path, filename, source_file)
        if live
        else _opened(filename, format, image_opts, force_share, other, read_only=not actions)
    )
    with nullcontext() if live or not actions else Interrupts(), house as bitmaps:
        try:
            if actions and name is not None:
                bitmaps.change(name, actions, granularity, not transient)
            elif mapping and name is not None:
                show_map(bitmaps.runs(name), as_json)
            else:
                show(bitmaps.all(name), as_json)
        except CowferryError as error:
            raise CowferryError(f"'{filename}': {error.desc}", error.hint) from error
    return 0


def _typed(name: str | None) -> str | None:
    """Return a name as the list shows it, if bytes were typed that are no UTF-8."""
    try:
        (name or "").encode()
        return name
    except UnicodeEncodeError:
        return shown(os.fsencode(name or ""))


class Bitmaps:
    """The bitmaps of a disk's chain, asked of the daemon that has it. `other` is the disk or node
    that bitmaps are merged from, if it is not this one."""

    def __init__(self, ask: Ask, disk: str, other: str | None) -> None:
        self.ask = ask
        self.disk = disk
        self.other = other

    def all(self, name: str | None = None) -> list[dict[str, Any]]:
        """Those of the chain, top first; with a `name` those of that name. Raises if there are
        none."""
        found: list[dict[str, Any]] = self.ask("x-query-bitmaps", device=self.disk)
        if name is None:
            return found
        named = [entry for entry in found if entry.get("name") == name]
        if not named:
            names = ", ".join(sorted({entry["name"] for entry in found if "name" in entry}))
            raise CowferryError(
                f"Dirty bitmap '{name}' not found", f"there are: {names}" if names else ""
            )
        return named

    def place(self, name: str) -> str:
        """The topmost node that has a bitmap of that name."""
        node: str = self.all(name)[0]["node-name"]
        return node

    def change(
        self, name: str, actions: list[Action], granularity: int | None, persistent: bool
    ) -> None:
        """All at one moment, or none of it; but what comes after a removal comes after it."""
        done: list[str] = []
        while actions:
            verbs = [a.verb for a in actions]
            n = verbs.index("remove") + 1 if "remove" in verbs else len(actions)
            node = self.disk if verbs[0] == "add" else self.place(name)
            parts = [self._action(node, name, a, granularity, persistent) for a in actions[:n]]
            try:
                self.ask("transaction", actions=parts)
            except CowferryError as error:
                if done:
                    error.hint = f"{error.hint}; done before that: {', '.join(done)}".lstrip("; ")
                raise
            done += [f"--{verb}" for verb in verbs[:n]]
            actions = actions[n:]

    def _action(
        self, node: str, name: str, action: Action, granularity: int | None, persistent: bool
    ) -> dict[str, Any]:
        data: dict[str, Any] = {"node": node, "name": name}
        if action.verb == "add":
            data["persistent"] = persistent
            if granularity is not None:
                data["granularity"] = granularity
        elif action.source is not None:
            of = Bitmaps(self.ask, self.other or self.disk, None).place(action.source)
            data = {
                "node": node,
                "target": name,
                "bitmaps": [{"node": of, "name": action.source}],
            }
        return {"type": f"block-dirty-bitmap-{action.verb}", "data": data}

    def runs(self, name: str) -> Iterator[dict[str, int]]:
        """The dirty runs, in bytes."""
        node = self.place(name)
        at: int | None = 0
        while at is not None:
            found = self.ask("x-query-bitmap-extents", node=node, name=name, offset=at)
            yield from found["extents"]
            at = found.get("next")


@contextmanager
def _served(path: str | None, disk: str, other: str | None) -> Iterator[Bitmaps]:
    """Those of a disk of the daemon."""
    with connect(path) as client:
        yield Bitmaps(client.call, disk, other)


@contextmanager
def _opened(
    filename: str,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    other: tuple[str, str | None] | None,
    read_only: bool,
) -> Iterator[Bitmaps]:
    """Those of an image, without the images below it."""
    if image_opts:
        if format is not None:
            raise CowferryError("--image-opts and --format are mutually exclusive")
        options = {"read-only": read_only, **parse_option(filename, "driver")}
        name = "the image"
    else:
        options = _options(filename, format, read_only, force_share)
        name = os.path.basename(filename)
        if not name.isprintable():  # bytes that are no UTF-8, say: no disk has such a name
            name = "the image"
    daemon = Daemon()
    try:

        def ask(command: str, **arguments: Any) -> Any:
            given = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
            try:
                return daemon.execute(command, given)
            except CowferryError as error:
                error.hint = in_options(error.hint)
                raise

        daemon.graph.open_disk(name, options)
        if other is not None:
            daemon.graph.open_disk(OTHER, _options(*other, read_only=True))
        yield Bitmaps(ask, name, OTHER if other is not None else None)
    finally:
        daemon.close()


def _options(
    filename: str, format: str | None, read_only: bool, force_share: bool = False
) -> dict[str, Any]:
    if not os.path.exists(filename):
        raise ImageError(f"Could not open '{filename}': No such file or directory")
    options = opening.image_options(filename, format, read_only=read_only, force_share=force_share)
    return options if options["driver"] == "raw" else {**options, "backing": None}


def show(found: list[dict[str, Any]], as_json: bool) -> None:
    """What there is, one on a line."""
    if as_json:
        click.echo(json.dumps(found, indent=4))
        return
    if not found:
        click.echo("no bitmaps")
        return
    rows = [("bitmap", "granularity", "dirty", "state")]
    rows += [
        (
            one_line(e.get("name", "(of a job)")),
            human(e["granularity"]),
            human(e["count"]),
            state(e),
        )
        for e in found
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    for row in rows:
        click.echo(
            "  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[3]])
        )


def state(entry: dict[str, Any]) -> str:
    """In words."""
    if entry.get("inconsistent"):
        words = [f"inconsistent: {entry.get('reason') or 'nobody kept it for a while'}"]
    else:
        words = ["recording" if entry["recording"] else "disabled"]
    if "used-by" in entry:
        words.append(f"in use: {entry['used-by']}")
    image, kept = entry["filename"], entry.get("kept-in")
    if kept is None:
        words.append("in memory only")
    else:
        words.append("in the image" if kept == image else f"in {os.path.basename(kept)}")
    return one_line(", ".join(words))


def show_map(runs: Iterator[dict[str, int]], as_json: bool) -> None:
    """Which bytes are dirty. Nothing is shown if that cannot be told."""
    if as_json:
        lines = ",\n".join(json.dumps(run) for run in runs)
        click.echo(f"[{lines}]")
        return
    first = list(islice(runs, 1))
    click.echo(f"{'Offset':<16}Length")
    for run in chain(first, runs):
        click.echo(f"{run['offset']:<#16x}{run['length']:#x}")
