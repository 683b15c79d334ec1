"""`cowferry serve`: the daemon, in its own habit and in qemu-storage-daemon's.

With FILEs it opens the disks, exports them on a unix socket and opens QMP and human monitor
sockets, all in the run folder. With qemu-storage-daemon's options it does exactly what those say,
so that one program can be swapped for the other; both may be mixed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import click

from cowferry.block import names
from cowferry.block.closing import Closing
from cowferry.block.scope import Scope
from cowferry.cli.keyval import parse_option, split
from cowferry.cli.limits import numbers, parse_limits
from cowferry.cli.pidfile import Pidfile
from cowferry.cli.run import make_run_folder, run_folder
from cowferry.cli.signals import end_at_once, heard
from cowferry.errors import CowferryError
from cowferry.wire.address import Address, from_qmp, parse_tcp, parse_uri

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

# Seconds. A signal's handler runs between two steps of the main thread; one that comes just before
# it falls asleep does not wake it.
LOOK = 0.5
START_SECONDS = 5.0  # that a daemon which is told to stop while it begins has for that
CONNECT_SECONDS = 10.0  # that the other end of a monitor may take to accept
LATE_SECONDS = 60.0  # that a flush may take longer than the rest of the end
# Seconds that a thread of the interpreter may go on while others wait for it (by itself 5 ms).
# A lane lets go of it with each system call: beside a thread that calculates (a bitmap, a large
# reply) it served 190 requests a second, and so 3700.
SWITCH = 0.0002


def disk_name(argument: str) -> tuple[str, str]:
    """(name, path) of NAME=FILE or FILE, whose name is then its stem; a URI's is the export's."""
    if names.is_uri(argument):
        export = parse_uri(argument)[1].rpartition("/")[2]
        return export or "nbd", argument
    name, equals, path = argument.partition("=")
    if equals and name and "/" not in name and not os.path.exists(argument):
        return name, path
    stem = os.path.basename(argument).rsplit(".", 1)[0]
    return stem or os.path.basename(argument), argument


class OrderedOptions(click.Command):
    """Remembers the order in which options were given: qemu-storage-daemon acts in that order."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        opts, _, order = self.make_parser(ctx).parse_args(args=list(args))
        taken: dict[str, int] = {}
        ordered: list[tuple[str, str]] = []
        for parameter in order:
            name = parameter.name
            values = opts.get(name) if name else None
            if isinstance(parameter, click.Option) and parameter.multiple and values and name:
                index = taken.get(name, 0)
                taken[name] = index + 1
                ordered.append((name, values[index]))
        ctx.meta["cowferry.ordered"] = ordered
        return super().parse_args(ctx, args)


@click.command("serve", cls=OrderedOptions)
@click.argument("disks", metavar="[NAME=]FILE...", nargs=-1)
@click.option("-f", "--format", "image_format", help="Format of the FILEs, else by their names.")
@click.option("--copy-on-read", is_flag=True, help="Keep what is read from the backing chain.")
@click.option("-r", "--read-only", is_flag=True, help="Open the FILEs read-only.")
@click.option("--socket", "socket_path", metavar="PATH", help="NBD socket [run folder/nbd.sock].")
@click.option(
    "--tcp", metavar="HOST:PORT",
    help="Serve NBD over TCP as well. IPv6 needs brackets; FIRST-LAST takes the first free port.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what is served as JSON.")
@click.option("--blockdev", multiple=True, metavar="OPTS", help="Open a node (QMP blockdev-add).")
@click.option("--export", multiple=True, metavar="OPTS", help="Export a node.")
@click.option("--nbd-server", multiple=True, metavar="OPTS", help="Listen for NBD clients.")
@click.option(
    "--object", "objects", multiple=True, metavar="OPTS",
    help="An iothread that exports may name, or a throttle-group.",
)  # fmt: skip
@click.option(
    "--limit", multiple=True, metavar="DISK,OPTS",
    help="Limit a disk: vm,bps-total=50M,iops-write=200,group=web (see `cowferry limit`).",
)  # fmt: skip
@click.option("--chardev", multiple=True, metavar="OPTS", help="A socket, or stdio, for a monitor.")
@click.option("--monitor", multiple=True, metavar="OPTS", help="A QMP (or readline) monitor.")
@click.option("--pidfile", metavar="PATH", help="Write the process id there.")
@click.option("--daemonize", is_flag=True, help="Go into the background once everything is up.")
@click.option("-v", "--verbose", is_flag=True, help="Log to standard error.")
@click.pass_context
def serve_command(ctx: click.Context, /, **given: Any) -> None:
    """Serve disks over NBD until SIGINT, SIGTERM or SIGHUP (unless it is ignored, as by nohup).

    Each FILE is exported under NAME (or the file's own name); its NBD URI is printed once it can
    be used. The sockets nbd.sock, qmp.sock and hmp.sock lie in the run folder.
    """
    ordered = ctx.meta["cowferry.ordered"]
    if not given["disks"] and not ordered:
        raise click.UsageError("nothing to serve: give a FILE, or --blockdev and --export")
    useless = [option for option, name in OF_FILES.items() if given[name] not in (None, False)]
    if useless and not given["disks"]:
        raise click.UsageError(f"{useless[0]} is for FILEs, and no FILE is given")
    if given["socket_path"] is not None and given["nbd_server"]:
        raise click.UsageError("--socket and --nbd-server exclude each other")
    ready = detach() if given["daemonize"] else None
    level = logging.INFO if given["verbose"] else logging.ERROR
    logging.basicConfig(stream=sys.stderr, level=level, format="cowferry: %(message)s")
    Serving(given, ordered).run(ready)


#: Options that mean nothing without a FILE, and the names of their values.
OF_FILES = {
    "--format": "image_format", "--copy-on-read": "copy_on_read", "--read-only": "read_only",
    "--socket": "socket_path", "--tcp": "tcp", "--json": "as_json",
}  # fmt: skip


class Serving:
    """One run of the daemon, from its options to its end."""

    def __init__(self, given: dict[str, Any], ordered: list[tuple[str, str]]) -> None:
        self.given = given
        self.ordered = ordered
        self.chardevs: dict[str, dict[str, Any]] = {}
        self.servers: list[Any] = []
        self.limits: list[tuple[str, dict[str, Any]]] = []  # of disks that are not there yet
        self.pidfile: Pidfile | None = None
        self.up = threading.Event()  # everything is there that the options ask for, or it failed

    def run(self, ready: int | None) -> None:
        """Until somebody asks for the end."""
        from cowferry.daemon import Daemon

        sys.setswitchinterval(SWITCH)
        daemon = Daemon()
        starting = Scope()
        for number in heard():
            # In a thread of its own: the main one may hold the event's lock just now.
            signal.signal(number, lambda *_: self._ask_to_quit(daemon, starting))
        try:
            with starting:
                self._begin(daemon)
            self.up.set()
            if ready is not None:
                os.write(ready, b"+")
                os.close(ready)
                null = os.open(os.devnull, os.O_RDWR)
                for fd in range(3):
                    os.dup2(null, fd)
            while not daemon.stopped.wait(LOOK):
                pass
        finally:
            self.up.set()
            for server in self.servers:
                with contextlib.suppress(OSError):
                    server.stop_listening()
            try:
                daemon.close()
            finally:
                for server in self.servers:
                    server.stop()
                self._leave(daemon)

    def _begin(self, daemon: Daemon) -> None:
        """Do what the options ask for."""
        if self.given["pidfile"] is not None:
            self.pidfile = Pidfile(self.given["pidfile"])
        self.limits = [parse_limits(parse_option(t, "disk")) for t in self.given["limit"]]
        for option, text in self.ordered:
            if option != "limit":
                getattr(self, f"_{option}")(daemon, text)
        listed = self._disks(daemon) if self.given["disks"] else []
        for name in list(dict.fromkeys(disk for disk, _ in self.limits)):
            self._limit(daemon, name)
        if self.pidfile is not None:
            self.pidfile.write()
        if self.given["disks"]:
            self._tell(listed)
        for server in self.servers:
            server.ready.set()

    def _ask_to_quit(self, daemon: Daemon, starting: Scope) -> None:
        threading.Thread(target=self._quit, args=(daemon, starting), daemon=True).start()

    def _quit(self, daemon: Daemon, starting: Scope) -> None:
        """Somebody asks for the end, perhaps while the daemon still waits for a server or for
        storage that it needs to begin."""
        daemon.quit()
        starting.call_off("the daemon was told to stop")
        if not self.up.wait(START_SECONDS):
            click.echo(
                "cowferry: ended while a disk was being opened, because its storage or server does "
                "not answer",
                err=True,
            )
            for server in self.servers:
                with contextlib.suppress(OSError):
                    server.stop_listening()
            self._forget_pidfile()
            end_at_once(1)

    def _forget_pidfile(self) -> None:
        if self.pidfile is not None:
            self.pidfile.drop()

    def _leave(self, daemon: Daemon) -> None:
        """The daemon has ended. What hangs in the kernel keeps its own image, and no other; a flush
        that is merely slow has some more time."""
        self._forget_pidfile()
        for number in heard():  # one that comes once more must not change the exit status
            signal.signal(number, signal.SIG_IGN)
        if daemon.unfinished:
            until = time.monotonic() + LATE_SECONDS
            for thread in threading.enumerate():
                if isinstance(thread, Closing):
                    thread.join(max(until - time.monotonic(), 0))
            end_at_once(1)

    # cowferry's own way ------------------------------------------------------------------

    def _disks(self, daemon: Daemon) -> list[dict[str, Any]]:
        """Open the disks and the sockets; what is to be told of each disk."""
        from cowferry.monitor import hmp, qmp

        folder = make_run_folder()
        control = self._held(qmp.server(daemon))
        # First of all, so that a second daemon on this folder stops before it opens a disk.
        control.listen_unix(os.path.join(folder, "qmp.sock"))
        human = self._held(hmp.server(daemon))
        human.listen_unix(os.path.join(folder, "hmp.sock"))
        if daemon.nbd is None:
            path = self.given["socket_path"]
            if path is None:
                path = os.path.join(folder, "nbd.sock")
            daemon.start_nbd({"type": "unix", "path": os.path.abspath(path)})
        assert daemon.nbd is not None
        if self.given["tcp"] is not None:
            daemon.nbd.listen(parse_tcp(self.given["tcp"], "--tcp", "127.0.0.1"))
        from cowferry.drivers import opening

        listed: list[dict[str, Any]] = []
        for argument in self.given["disks"]:
            name, path = disk_name(argument)
            disk = daemon.open_disk(
                name,
                path,
                self.given["image_format"],
                copy_on_read=self.given["copy_on_read"],
                read_only=self.given["read_only"],
            )
            if not names.same(opening.canonical(path), disk.root.filename):
                click.echo(f"{name}: '{path}' has moved to '{disk.root.filename}'", err=True)
            self._limit(daemon, name)  # before the first guest comes
            daemon.add_export(disk, name, writable=not disk.read_only)
            uris = daemon.nbd.uris(name)
            listed.append({"name": name, "uri": uris[0], "uris": uris, "size": disk.size})
        return listed

    def _tell(self, listed: list[dict[str, Any]]) -> None:
        """Print where the disks can be reached. Everything else is up by now."""
        if self.given["as_json"]:
            click.echo(json.dumps({"disks": listed, "run": run_folder()}))
        else:
            for item in listed:
                click.echo("\n".join(f"{item['name']}: {uri}" for uri in item["uris"]))
        sys.stdout.flush()

    def _held(self, server: Any) -> Any:
        """A monitor that begins once everything is there that the options ask for: somebody may
        take its socket for the sign of that."""
        server.ready.clear()
        self.servers.append(server)
        return server

    def _limit(self, daemon: Daemon, name: str) -> None:
        """What --limit says of a disk."""
        for arguments in [a for disk, a in self.limits if disk == name]:
            daemon.execute("x-disk-limit", arguments)
        self.limits = [(disk, a) for disk, a in self.limits if disk != name]

    # qemu-storage-daemon's options, in the order given -----------------------------------

    def _blockdev(self, daemon: Daemon, text: str) -> None:
        daemon.execute("blockdev-add", parse_option(text, "driver"))

    def _nbd_server(self, daemon: Daemon, text: str) -> None:
        options = parse_option(text)
        if "addr" not in options:
            raise CowferryError(
                "Parameter 'addr' is missing", "--nbd-server addr.type=unix,addr.path=..."
            )
        daemon.execute(
            "nbd-server-start", retyped(options, {"max-connections", "handshake-max-seconds"})
        )

    def _export(self, daemon: Daemon, text: str) -> None:
        flags = {"writable", "writethrough", "allocation-depth", "fixed-iothread", "allow-inactive"}
        daemon.execute("block-export-add", retyped(parse_option(text, "type"), flags))

    def _objects(self, daemon: Daemon, text: str) -> None:
        options = parse_option(text, "qom-type")
        if options.get("qom-type") == "throttle-group":
            older = {k: v for k, v in options.items() if k.startswith("x-")}
            options |= numbers(older)
            if isinstance(options.get("limits"), dict):
                options["limits"] = numbers(options["limits"])
        daemon.execute("object-add", options)

    def _chardev(self, daemon: Daemon, text: str) -> None:
        if not text.startswith("{"):  # old habits: a bare `server` is on, `nowait` is wait=off
            parts = split(text)
            parts[1:] = [
                p if "=" in p else f"{p[2:]}=off" if p.startswith("no") else f"{p}=on"
                for p in parts[1:]
            ]
            text = ",".join(p.replace(",", ",,") for p in parts)
        options = parse_option(text, "backend")
        kind, ident = options.get("backend"), options.get("id")
        if not isinstance(ident, str):
            raise CowferryError("Parameter 'id' is missing", f"in --chardev {text}")
        if kind not in ("socket", "stdio"):
            raise CowferryError(
                f"--chardev: backend '{kind}' is not supported", "socket and stdio are"
            )
        if ident in self.chardevs:
            raise CowferryError(f"Chardev with id '{ident}' already exists")
        known = CHARDEV if kind == "socket" else {"backend", "id"}
        for name in sorted(set(options) - known):
            raise CowferryError(f"--chardev {ident}: Parameter '{name}' is unexpected")
        self.chardevs[ident] = options
        if kind == "socket":
            chardev_address(options)

    def _monitor(self, daemon: Daemon, text: str) -> None:
        from cowferry.drivers import nbd_link
        from cowferry.monitor import hmp, qmp

        options = parse_option(text, "chardev")
        ident = options.get("chardev")
        chardev = self.chardevs.get(str(ident))
        if chardev is None:
            raise CowferryError(f"Character device '{ident}' not found")
        mode = options.get("mode", "control")
        if mode not in ("control", "readline"):
            raise CowferryError(f"Parameter 'mode' does not accept value '{mode}'")
        server = self._held((qmp if mode == "control" else hmp).server(daemon))
        if chardev["backend"] == "stdio":
            thread = server.attach(qmp.Pipe(0, 1))
            del thread
            return
        address, listen = chardev_address(chardev)
        if listen:
            server.listen_at(address)
            return
        try:
            sock = nbd_link.connect(address, CONNECT_SECONDS)
        except OSError as error:
            raise CowferryError(
                f"chardev '{ident}': cannot connect to '{address}': {error.strerror}"
            ) from error
        server.connect(sock)


#: Options of a socket chardev. `wait` is taken and changes nothing: cowferry never waits.
CHARDEV = {"backend", "id", "path", "host", "port", "to", "ipv4", "ipv6", "server", "wait"}


def chardev_address(options: dict[str, Any]) -> tuple[Address, bool]:
    """Where a socket chardev is, and whether it listens there. Raises `CowferryError`."""
    flags = retyped(
        {k: v for k, v in options.items() if k in ("server", "wait")}, {"server", "wait"}
    )
    listen = bool(flags.get("server"))
    members = {
        k: options[k] for k in options.keys() & {"path", "host", "port", "to", "ipv4", "ipv6"}
    }
    if "path" in members:
        if len(members) > 1:
            other = min(set(members) - {"path"})
            raise CowferryError(
                f"chardev '{options['id']}': 'path' and '{other}' exclude each other"
            )
        return from_qmp({"type": "unix", **members}, "chardev", listen), listen
    if "port" not in members:
        raise CowferryError(f"chardev '{options['id']}': 'path' or 'port' is missing")
    return from_qmp({"type": "inet", "host": "127.0.0.1", **members}, "chardev", listen), listen


def retyped(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Flags and numbers of keyval options as QMP has them. Raises `CowferryError`."""
    out = dict(options)
    for name in names & set(out):
        value = out[name]
        if isinstance(value, str):
            if value in ("on", "off"):
                out[name] = value == "on"
            elif value.isdigit():
                out[name] = int(value)
            else:
                raise CowferryError(f"Parameter '{name}' expects 'on' or 'off'")
    return out


def detach() -> int:
    """Fork; the parent waits for the word that everything is up, and leaves with its status."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        sys.exit(0 if os.read(reader, 1) == b"+" else 1)
    os.close(reader)
    os.setsid()
    return writer
