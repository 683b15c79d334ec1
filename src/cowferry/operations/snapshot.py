"""A live snapshot: another image goes on top, at one moment for all disks named.

    before: base <- sx            after:  base <- sx <- sx+1

`Snapshot` is a part of a transaction, so any number of them go through `finish` under one drain:
all the disks' old images stand at the same point in time (S4), and never change a byte afterwards
(S2). The overlay and its name are durable
before the switch (S1), and so is the record that says which image is current (S3).
"""

from __future__ import annotations

import itertools
import os
import re
from typing import TYPE_CHECKING

from cowferry.block import keeper, names, origin, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.moves import Move
from cowferry.block.node import Node, chain
from cowferry.drivers import OVERLAYS, driver, opening
from cowferry.errors import CowferryError, NotSupported
from cowferry.operations import (
    check_unlimited,
    find,
    free,
    move_of,
    root_disk,
    targets,
    wait_for_disk,
)
from cowferry.operations.transaction import Part

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class Snapshot(Part):
    """One disk's part: `with_node` or `with_file` first; then `finish` or `abort`."""

    def __init__(
        self, daemon: Daemon, device: str, carry: bool = False, path: str | None = None,
        brief: bool = True,
    ) -> None:  # fmt: skip
        """`path`: the file that `with_file` is about to make or open. `brief`: nobody waits for a
        guest's agent before the snapshot is taken."""
        self.daemon = daemon
        self.graph = daemon.graph
        self.device = device
        self.carry = carry  # the bitmaps go along with the disk; else they stay, as in QEMU
        self.before: dict[str, Bitmap] | None = None  # the overlay's, if they went
        wait_for_disk(daemon, device, path)
        self.disk: Disk = root_disk(daemon, device)
        self.old: Node = self.disk.root
        self.overlay: Node | None = None
        self.adopted = False  # the overlay was opened here
        self.made: list[targets.Made] = []  # a file made here
        self.reopened = False
        self.named = False  # the header of the overlay did not name the disk's image before
        self.why = "snapshot"
        self.brief = brief
        self.claimed: list[Node] = []

    # Where the overlay comes from ----------------------------------------------------------

    def with_node(self, name: str) -> Snapshot:
        """An overlay that was opened with `"backing": null`. Raises `CowferryError`."""
        overlay = find(self.daemon, name)
        check_unlimited(overlay, "overlays")
        if overlay.driver in ("raw", "file", "nbd"):
            raise CowferryError("The overlay does not support backing images")
        if overlay.backing is not None:
            raise CowferryError("The overlay already has a backing image")
        if any(n is overlay for n in chain(self.old)):
            raise CowferryError("Making this node a backing child would create a cycle")
        if (
            self.graph.stranger(overlay, []) is not None
            or self.graph.exported(overlay)
            or any(d.root is overlay for d in self.graph.disks.values())
        ):
            raise CowferryError("The overlay is already in use")
        if overlay.read_only:
            raise CowferryError(f"The overlay '{name}' is read-only")
        return self._take(overlay)

    def with_file(
        self,
        path: str,
        format: str = "qcow2",
        mode: str = "absolute-paths",
        node_name: str | None = None,
    ) -> Snapshot:
        """An overlay made here, or one that exists already. Raises `CowferryError`."""
        free(self.daemon, self.device, "snapshot")
        driver(format)  # there is such a format
        if format not in OVERLAYS:
            raise NotSupported(f"Format '{format}' does not support backing files", "use qcow2")
        if mode not in ("absolute-paths", "existing"):
            raise CowferryError(f"Parameter 'mode' does not accept value '{mode}'")
        targets.check_path("cannot be the overlay", self.disk, path)
        if mode == "absolute-paths" and os.path.exists(path) and os.path.getsize(path):
            raise CowferryError(
                f"'{path}' exists",
                "name another file, or use mode=existing if it is an empty overlay",
            )
        options = {**opening.image_options(path, format), "backing": None}
        if node_name is not None:
            options["node-name"] = node_name
        self._claim(self.old)
        try:
            with self.graph.making(path):
                targets.check_unused(self.daemon, path)
                if mode == "absolute-paths":
                    self._make(path, format)
                overlay = self.graph.adopt(options)
        except BaseException:
            self.abort()
            raise
        self.adopted = True
        return self._take(overlay)

    def _make(self, path: str, format: str) -> None:
        backing = {"backing_file": self._old_name(), "backing_fmt": self.old.driver}
        like = origin.of_node(self.old)
        existed = os.path.lexists(path)
        with self.graph.turn.apart():
            opening.create_image(path, format, self.old.size, backing, goal=True, like=like)
        if os.path.isfile(path):
            self.made.append(targets.Made(path, existed))

    def _claim(self, node: Node) -> None:
        self.graph.claim([node], self.why, served=self.old, brief=self.brief)
        self.claimed.append(node)

    def _old_name(self) -> str:
        return names.absolute(self.old.filename)

    def _take(self, overlay: Node) -> Snapshot:
        self.overlay = overlay
        try:
            targets.check_node("cannot be the overlay", self.disk, overlay)
            if overlay.size != self.old.size:
                raise CowferryError(
                    f"The overlay has {overlay.size} bytes and '{self.device}' {self.old.size}",
                    "make it as large as the disk",
                )
            spec = overlay.backing_spec
            if spec is not None and not opening.leads_to(
                overlay.filename, spec[0], self.old.filename
            ):
                raise CowferryError(
                    f"the header of the overlay '{overlay.filename}' names '{spec[0]}', and "
                    f"'{self.device}' is in '{self.old.filename}'",
                    "make it with that backing file, or with none",
                )
            if spec is None:
                overlay.check_backing(self._old_name(), self.old.driver)
            if self.old not in self.claimed:
                self._claim(self.old)
            self._claim(overlay)
            with self.daemon.apart():
                empty = not any(overlay.extents_with_data())
            if not empty:
                raise CowferryError(
                    f"The overlay '{overlay.filename}' is not empty",
                    "what it holds would hide the disk's own bytes; make a new one",
                )
        except BaseException:
            self.abort()
            raise
        return self

    # The end -------------------------------------------------------------------------------

    def approach(self) -> None:
        """Most of the flush, outside the drain; and the overlay's name is durable (S1)."""
        assert self.overlay is not None
        self.old.flush()
        self.overlay.flush()
        if os.path.isfile(self.overlay.filename):
            sysio.flush_directory(os.path.dirname(os.path.abspath(self.overlay.filename)))

    def drains(self) -> list[Disk]:
        return [self.disk]

    def settle(self) -> None:
        assert self.overlay is not None
        self.old.flush()
        if self.overlay.backing_spec is None:
            self.overlay.set_backing(self._old_name(), self.old.driver)
            self.named = True
        if self.carry:
            self.before = keeper.carry(self.old, self.overlay)
        if not self.old.read_only:
            try:
                self.old.reopen(True)  # S2: from here on not one byte of it changes
                self.reopened = True
            except NotSupported:
                self.old.flush()

    def unsettle(self) -> None:
        if self.reopened:
            self.old.reopen(False)
            self.reopened = False
        if self.before is not None and self.overlay is not None:
            before, self.before = self.before, None
            keeper.put_back(self.overlay, before)
        if self.named and self.overlay is not None:
            self.named = False
            self.overlay.set_backing(None, None)

    def moves(self) -> list[Move]:
        assert self.overlay is not None
        return [move_of(self.disk, self.old, self.overlay)]

    def switch(self) -> None:
        assert self.overlay is not None
        self.overlay.backing = self.old
        self.disk.root = self.overlay

    def parted(self) -> None:
        assert self.overlay is not None
        self.graph.reroot(self.disk, self.overlay)
        self.graph.release(self.claimed, self.why)

    def becomes(self, disk: Disk) -> Node | None:
        return self.overlay if disk is self.disk else None

    def abort(self) -> None:
        """Nothing has been switched: everything is as it was."""
        self.graph.release(self.claimed, self.why)
        if self.overlay is not None and self.disk.root is self.overlay:
            return  # interrupted after the switch: that stands, or the guest's writes were lost
        if self.adopted and self.overlay is not None:
            targets.let_go(self.daemon, [self.overlay], True)
        targets.unmake(self.daemon, self.made)


def beside(image: str) -> str:
    """A name for an overlay next to an image: vm.qcow2, vm.snap1.qcow2, vm.snap2.qcow2.

    Raises `CowferryError` where no file can be put."""
    if not os.path.isfile(image) or image.startswith(("/dev/", "/proc/")):
        raise CowferryError(f"'{image}' is no plain file to put a snapshot beside", "name one")
    stem = os.path.splitext(os.path.abspath(image))[0]
    counted = re.fullmatch(r"(.+)\.snap([0-9]{1,9})", stem)
    name, last = (counted[1], int(counted[2])) if counted else (stem, 0)
    numbers = itertools.count(last + 1)
    return next(p for n in numbers if not os.path.lexists(p := f"{name}.snap{n}.qcow2"))
