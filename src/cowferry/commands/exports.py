"""Commands on exports: the NBD server, and what it offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cowferry.commands import Args, NoArgs, command, event
from cowferry.commands.bitmaps import BitmapOfNode, named
from cowferry.errors import CowferryError, NotSupported
from cowferry.exports.nbd import NbdExport, NbdServer
from cowferry.jobs.job import valid_id
from cowferry.operations.bitmaps import for_export

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class NbdServerStart(Args):
    addr: dict[str, Any]
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: int = 100
    handshake_max_seconds: int = 10


@command("nbd-server-start")
def nbd_server_start(daemon: Daemon, args: NbdServerStart) -> None:
    """Listen for NBD clients on a unix socket or a TCP address."""
    if daemon.nbd is not None:
        raise CowferryError("NBD server already running")
    if args.tls_creds is not None or args.tls_authz is not None:
        raise NotSupported(
            "Parameter 'tls-creds' is not supported", "this server has no TLS; use a unix socket"
        )
    daemon.start_nbd(
        args.addr, max_connections=args.max_connections, handshake=args.handshake_max_seconds
    )


@command("nbd-server-stop")
def nbd_server_stop(daemon: Daemon, args: NoArgs) -> None:
    """Close every connection and forget the NBD exports."""
    running(daemon)
    daemon.stop_nbd()


def running(daemon: Daemon) -> NbdServer:
    """The NBD server. Raises `CowferryError` if there is none."""
    if daemon.nbd is None:
        raise CowferryError("NBD server not running", "start it with nbd-server-start")
    return daemon.nbd


class BlockExportAdd(Args):
    type: Literal["nbd", "vhost-user-blk", "fuse", "vduse-blk"]
    id: str
    node_name: str
    writable: bool = False
    writethrough: bool = False
    iothread: str | None = None
    fixed_iothread: bool = False
    allow_inactive: bool = False
    name: str | None = None
    description: str | None = None
    bitmaps: list[str | BitmapOfNode] | None = None
    allocation_depth: bool = False
    addr: dict[str, Any] | None = None
    mountpoint: str | None = None


@command("block-export-add")
def block_export_add(daemon: Daemon, args: BlockExportAdd) -> None:
    """Offer a disk or node to clients."""
    if args.type != "nbd":
        raise NotSupported(f"Export type '{args.type}' is not supported", "type=nbd is")
    for name, value in (("addr", args.addr), ("mountpoint", args.mountpoint)):
        if value is not None:
            raise CowferryError(f"Parameter '{name}' is unexpected", "type=nbd has no such option")
    if args.iothread is not None and args.iothread not in daemon.iothreads:
        raise CowferryError(f'iothread "{args.iothread}" not found')
    if len((args.description or "").encode(errors="surrogatepass")) > 4096:
        raise CowferryError("description 'description' too long")
    if not valid_id(args.id):
        raise CowferryError("Invalid block export id", "a letter, then letters, digits, -._")
    if args.id in daemon.exports:
        raise CowferryError(f"Block export id '{args.id}' is already in use")
    server = running(daemon)
    with daemon.graph.lock:
        known = args.node_name in daemon.graph.nodes or args.node_name in daemon.graph.disks
    if not known:
        raise CowferryError(f"Cannot find device='' nor node-name='{args.node_name}'")
    disk = daemon.graph.disk(args.node_name)
    if args.writable and disk.read_only:
        raise CowferryError("Cannot export read-only node as writable")
    name = args.name if args.name is not None else args.node_name
    if args.bitmaps:  # they are looked for after that, as in QEMU
        server.check_name(name)
    export = NbdExport(
        args.id,
        disk,
        name=name,
        writable=args.writable,
        description=args.description or "",
        allocation_depth=args.allocation_depth,
        writethrough=args.writethrough,
        bitmaps=tuple(for_export(daemon, disk, named(args.bitmaps or []), args.writable)),
    )
    daemon.offer(export)


class BlockExportDel(Args):
    id: str
    mode: Literal["safe", "hard"] = "safe"


@command("block-export-del")
def block_export_del(daemon: Daemon, args: BlockExportDel) -> None:
    """Withdraw an export; `safe` refuses while clients are connected."""
    export = daemon.exports.get(args.id)
    if export is None:
        raise CowferryError(f"Export '{args.id}' is not found")
    if args.mode == "safe" and export.users:
        raise CowferryError(
            f"export '{args.id}' still in use",
            f"{export.users} client(s) are connected; mode=hard disconnects them",
        )
    daemon.drop_export(export)


@command("query-block-exports", locked=False)
def query_block_exports(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """Every export, under the node that is its disk's root now."""
    return [
        {
            "id": e.id,
            "type": e.type,
            "node-name": e.disk.root.name,
            "shutting-down": e.shutting_down,
        }
        for e in list(daemon.exports.values())
    ]


@event("BLOCK_EXPORT_DELETED")
class BlockExportDeleted(msgspec.Struct):
    id: str
