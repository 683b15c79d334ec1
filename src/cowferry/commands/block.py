"""Commands on nodes and disks: add, delete, create, resize, and look."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from typing import TYPE_CHECKING, Any

import msgspec

from cowferry.block.held import BY_JOB
from cowferry.block.node import Node, chain, files
from cowferry.block.scope import CalledOff, Scope
from cowferry.commands import Args, NoArgs, check_names, command
from cowferry.commands.throttle import shown
from cowferry.drivers import MAX_DEPTH, actual_size, driver, opening
from cowferry.drivers.file import File
from cowferry.errors import CowferryError, NotSupported
from cowferry.jobs.create import Create

LAYER_SECONDS = 5.0  # that a server may take to tell which parts of a layer hold data

if TYPE_CHECKING:
    from cowferry.block.disk import Disk
    from cowferry.daemon import Daemon


class BlockdevAdd(msgspec.Struct, kw_only=True, rename="kebab"):
    """Open: the further members are the driver's own, and checked by it."""

    driver: str
    node_name: str | None = None


@command("blockdev-add")
def blockdev_add(daemon: Daemon, args: dict[str, Any]) -> None:
    """Open a node, with its children and its backing chain."""
    if not isinstance(args.get("driver"), str):
        raise CowferryError("Parameter 'driver' is missing")
    daemon.graph.add_node(args)


class BlockdevDel(Args):
    node_name: str
    force: bool = False


@command("blockdev-del", locked=False)
def blockdev_del(daemon: Daemon, args: BlockdevDel) -> None:
    """Close a node that nobody uses; with force a job on it is cancelled first."""
    if args.force:
        daemon.cancel_on(args.node_name)
    with daemon.turn():
        daemon.graph.delete_node(args.node_name)


class BlockdevCreate(Args):
    job_id: str
    options: dict[str, Any]


@command("blockdev-create")
def blockdev_create(daemon: Daemon, args: BlockdevCreate) -> None:
    """Make an image, as a job that is dismissed by hand.

    The image lies in the file of the node that `file` names, or in a new file. `file` describes the
    new file by its driver and filename, or (an extension) `filename` names it. Likewise `data-file`
    describes or (an extension) names an external data file, which is made, too."""
    check_names(args.options)
    options = dict(args.options)
    kind = options.pop("driver", None)
    if not isinstance(kind, str):
        raise CowferryError("Parameter 'options.driver' is missing")
    driver(kind)  # there is such a driver
    size = options.pop("size", None)
    if not isinstance(size, int) or isinstance(size, bool):
        raise CowferryError("Parameter 'options.size' is missing")
    target, node = _where(daemon, options)
    plain = _creation_options(daemon, options)

    def make() -> None:
        if plain.get("backing_file"):
            _check_circles(target, plain)
        opening.create_image(target, kind, size, plain, node=node)
        if node is not None:
            node.refresh_size()

    why = f"{BY_JOB}create"
    if node is not None:
        daemon.graph.check_idle(node)
        daemon.graph.claim([node], why, args.job_id)

    def released() -> None:
        if node is not None:
            daemon.graph.release([node], why, args.job_id)

    try:
        daemon.jobs.start(Create(make, released), args.job_id)
    except BaseException:
        released()
        raise


def _where(daemon: Daemon, options: dict[str, Any]) -> tuple[str, File | None]:
    """Take the path of the new image out of `options`, and the node of its file if there is one."""
    path, file = options.pop("filename", None), options.pop("file", None)
    if path is not None and file is not None:
        raise CowferryError("Parameters 'options.file' and 'options.filename' exclude each other")
    if isinstance(file, str):
        found = daemon.graph.nodes.get(file)
        if found is None:
            raise CowferryError(f"Cannot find device='' nor node-name='{file}'")
        if not isinstance(found, File) or found.read_only:
            raise CowferryError(f"Node '{file}' is not a host file open for writing")
        return found.filename, found
    if file is not None:
        path = _described(file, "options.file")
    if not isinstance(path, str):
        raise CowferryError("Parameter 'options.file' is missing")
    return path, None


def _described(file: Any, name: str) -> str:
    """Return the path of a file that its driver and filename describe. Raises `CowferryError`."""
    if not isinstance(file, dict):
        raise CowferryError(f"Invalid parameter type for '{name}', expected: object or string")
    if others := file.keys() - {"driver", "filename"}:
        raise CowferryError(
            f"Parameter '{name}.{min(others)}' is unexpected",
            "a new file is described by its driver and filename; blockdev-add takes more options",
        )
    if file.get("driver", "file") not in ("file", "host_device"):
        raise CowferryError(
            f"Parameter '{name}.driver' does not accept value '{file['driver']}'",
            "an image is made in a host file or a device",
        )
    if not isinstance(path := file.get("filename"), str):
        raise CowferryError(f"Parameter '{name}.filename' is missing")
    return path


def _creation_options(daemon: Daemon, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a new image under their names in qemu-img. Raises `CowferryError`."""
    out: dict[str, Any] = {}
    for key, value in options.items():
        if key == "data-file" and isinstance(value, dict):
            value = _described(value, "options.data-file")
        elif key == "data-file" and value in daemon.graph.nodes:
            raise NotSupported(
                f"'{value}' is a node, and an external data file is made with its image",
                'describe the file: "data-file": {"driver": "file", "filename": ...}',
            )
        words = key in ("data-file", "backing-file", "backing-fmt")
        if not isinstance(value, str if words else (str, int)):
            raise CowferryError(f"Invalid parameter type for 'options.{key}'")
        out["compat" if key == "version" else key.replace("-", "_")] = value
    return out


def _check_circles(target: str, options: dict[str, Any]) -> None:
    """Raise `ImageError` if the backing file of a new image would lead to a file that is made."""
    recorded, format = options["backing_file"], options.get("backing_fmt")
    opening.check_circle(target, recorded, format)
    if data := options.get("data_file"):
        folder = os.path.dirname(target)
        opening.check_circle(os.path.join(folder, data), os.path.join(folder, recorded), format)


class BlockResize(Args):
    size: int
    device: str | None = None
    node_name: str | None = None
    force: bool = False


@command("block_resize", locked=False)
def block_resize(daemon: Daemon, args: BlockResize) -> None:
    """Change a disk's size while it is in use. Guests learn of it as their transport allows.

    With force a job on it is cancelled first."""
    name = args.device or args.node_name
    if name is None:
        raise CowferryError("Either 'device' or 'node-name' must be given")
    if args.size < 0:
        raise CowferryError("Parameter 'size' expects a >0 size")
    if args.force:
        daemon.cancel_on(name)
    with daemon.turn():
        daemon.resize(name, args.size)


def image_info(node: Node, with_backing: bool = True) -> dict[str, Any]:
    """QMP: ImageInfo of a node, with its backing images nested."""
    out: dict[str, Any] = {
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
    }
    with contextlib.suppress(CowferryError):
        out["actual-size"] = actual_size(node.filename)
    if hasattr(node, "cluster_size"):
        out["cluster-size"] = node.granule
        out["dirty-flag"] = bool(getattr(node, "dirty_flag", False))
    specific = node.info()
    if specific:
        out["format-specific"] = {"type": node.driver, "data": specific}
    if node.backing is not None:
        out["backing-filename"] = (node.backing_spec or (node.backing.filename, None))[0]
        out["full-backing-filename"] = node.backing.filename
        out["backing-filename-format"] = node.backing.driver
    return out


def device_info(
    node: Node, disk: Disk | None = None, levels: int = MAX_DEPTH, lay: str | None = None
) -> dict[str, Any]:
    """QMP: BlockDeviceInfo of a node, with so many levels of backing images. `lay` is the file over
    which it lay until a commit cut it off (`Graph.forsake`)."""
    nodes = list(chain(node))
    bottom = next(files(node))
    direct, no_flush = getattr(bottom, "direct", False), getattr(bottom, "no_flush", False)
    images = [image_info(n) for n in nodes[: levels + 1]]
    for above, below in itertools.pairwise(images):
        above["backing-image"] = below
    out: dict[str, Any] = {
        "file": node.filename,
        "node-name": node.name,
        "ro": node.read_only,
        "drv": node.filter or node.driver,
        "encrypted": False,
        "detect_zeroes": node.detects_zeroes or "off",
        "backing_file_depth": len(nodes) - 1,
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": direct, "no-flush": no_flush},
        "image": images[0],
    }  # fmt: skip
    if node.backing is not None:
        out["backing_file"] = node.backing.filename
    elif lay is not None:
        out["backing_file"] = lay
    if disk is not None and disk.limits is not None:
        group = disk.limits.group
        out |= shown(group.limits) | {"group": group.name}
    # The newest first, as in QEMU; those of the node below are that one's.
    bitmaps = [] if node.filter else [*reversed(node.bitmaps.values())]
    bitmaps += [] if disk is None else disk.bitmaps.values()
    if bitmaps:
        out["dirty-bitmaps"] = [b.info() for b in bitmaps]
    return out


class QueryNodes(Args):
    flat: bool = False


@command("query-named-block-nodes", locked=False)
def query_named_block_nodes(daemon: Daemon, args: QueryNodes) -> list[dict[str, Any]]:
    """Every node by name, with its backing images, 200 levels at most; with `flat` without them.

    The bound is there because the answer grows with the square of a chain's length."""
    levels = 0 if args.flat else 200
    with daemon.graph.lock:
        nodes = list(daemon.graph.nodes.values())
        disks = {id(disk.root): disk for disk in daemon.graph.all_disks()}
        lay = dict(daemon.graph.forsaken)
    return [device_info(n, disks.get(id(n)), levels, lay.get(n.name)) for n in nodes]


@command("query-block", locked=False)
def query_block(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """Every named disk."""
    with daemon.graph.lock:
        disks = list(daemon.graph.disks.values())
    return [
        {
            "device": disk.name,
            "type": "unknown",
            "removable": False,
            "locked": False,
            "inserted": device_info(disk.root, disk),
        }
        for disk in disks
    ]


class Tree(Args):
    device: str | None = None


@command("x-query-tree", locked=False)
def query_tree(daemon: Daemon, args: Tree) -> list[dict[str, Any]]:
    """The chain of each disk, top first, with what each layer holds in bytes (for `tree`)."""
    graph = daemon.graph
    if args.device is not None:
        disks = [graph.disk(args.device)]
    else:
        with graph.lock:
            disks = list(graph.disks.values()) or [graph.disk(n) for n in sorted(graph.explicit)]
            disks = [d for d in disks if d.root.driver != "file"]
    return [
        {"device": d.name, "size": d.size, "chain": [layer(n, d.size) for n in chain(d.root)]}
        for d in disks
    ]


def layer(node: Node, size: int) -> dict[str, Any]:
    """One layer: how much of the disk it answers for itself. Where a server does not tell, because
    it does not answer, `x-note` says so instead of `data` and `zero`."""
    counts = {"DATA": 0, "ZERO": 0, "HOLE": 0}
    out: dict[str, Any] = {}
    try:
        with Scope(LAYER_SECONDS, "its server has not answered"):
            for e in node.extents_in_pieces():
                counts[e.state.name] += e.length
        out = {"data": counts["DATA"], "zero": counts["ZERO"]}
    except CalledOff as error:
        if error.errno != errno.ETIMEDOUT:
            raise
        out = {"x-note": error.strerror}
    out |= {
        "node-name": node.name,
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
        "read-only": node.read_only,
    }
    with contextlib.suppress(CowferryError):
        out["actual-size"] = actual_size(node.filename)
    return out
