"""The drivers: one module for one format or protocol, found by its class's registration.

To add one, write `drivers/NAME.py` with a `Node` subclass decorated by `@register`, whose
nested `Options` is a msgspec struct of what `blockdev-add` takes for it, and name the module
in `MODULES`. `file.py` is the example to copy.

A driver is opened with its options and with its children already open; it never opens
another node itself, so it cannot be talked into opening a host file by an image (the class
of CVE-2024-4467). Following a backing string is done here, in `open_backing`, and only with
the format that the image records for it.
"""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast

import msgspec

from cowferry.block import names
from cowferry.block.node import Node
from cowferry.drivers.plan import Plan
from cowferry.errors import CowferryError, ImageError

MODULES = {
    "file": "file", "host_device": "file", "raw": "raw", "qcow2": "qcow2", "qed": "qed",
    "throttle": "throttle", "nbd": "nbd",
}  # fmt: skip

#: Formats of images that have a backing file.
OVERLAYS = ("qcow2", "qed")

MAX_DEPTH = 1024  # nodes in a chain; 200 must work, a loop must not


class Cache(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """QMP: BlockdevCacheOptions.

    `direct`: the kernel forgets the bytes of the file at each flush. `no-flush`: what is written
    is not made durable."""

    direct: bool = False
    no_flush: bool = False


class Common(msgspec.Struct, kw_only=True, rename="kebab"):
    """What every driver's `Options` begins with (BlockdevOptions in QMP)."""

    driver: str
    node_name: str | None = None
    read_only: bool = False
    auto_read_only: bool = False
    discard: Literal["unmap", "ignore", "on", "off"] = "unmap"  # on is unmap, off is ignore
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    force_share: bool = False
    cache: Cache | None = None
    repair: bool = False  # to be mended: damage is no reason to refuse it


class Driver(Protocol):
    """The class side of a driver."""

    driver: str
    filter: str
    Options: type[Common]
    compress: Callable[..., Any]  # `Node.compress` of those that cannot

    @classmethod
    def open(cls, options: Any, children: Mapping[str, Node]) -> Node:
        """A node from typed options; `children` holds the opened node of each child option."""
        ...

    @classmethod
    def companions(cls, children: Mapping[str, Node]) -> Mapping[str, str]:
        """See `Node.companions`."""
        ...

    @classmethod
    def plan(cls, path: str, size: int, options: Mapping[str, Any]) -> Plan:
        """Return how to make a new image of `size` bytes, and change nothing.

        `options` are qemu-img's `-o` names; `path` is for messages. Raises `CowferryError` for a
        size or an option that is wrong."""
        ...


_drivers: dict[str, type[Node]] = {}
N = TypeVar("N", bound=type[Node])


def register(*names: str) -> Callable[[N], N]:
    """Class decorator: this class serves these driver names."""

    def keep(cls: N) -> N:
        for name in names:
            _drivers[name] = cls
        cls.driver = names[0]
        return cls

    return keep


def driver(name: str) -> Driver:
    """The driver class called `name`. Raises `CowferryError` for an unknown one."""
    if name not in _drivers and name in MODULES:
        importlib.import_module(f"cowferry.drivers.{MODULES[name]}")
    if name not in _drivers:
        from cowferry.drivers.formats import way_out

        known = f"known drivers: {', '.join(sorted(MODULES))}"
        raise CowferryError(f"Unknown driver '{name}'", way_out(name) or known)
    return cast(Driver, _drivers[name])


def actual_size(path: str) -> int:
    """Bytes that a file occupies on the host; none, if a server holds it. Raises `ImageError`.

    A device occupies all of its bytes, although the kernel counts no blocks for its name."""
    if names.is_uri(path):
        return 0
    try:
        st = os.stat(path)
        if stat.S_ISBLK(st.st_mode):
            number = f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
            with open(f"/sys/dev/block/{number}/size", encoding="ascii") as sectors:
                return int(sectors.read()) * 512
        return st.st_blocks * 512
    except OSError as error:
        raise ImageError(f"'{path}': {error.strerror}") from error
