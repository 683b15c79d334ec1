"""Exports: a disk made available to somebody outside.

A new kind of export is one module in this folder with a subclass of `Export`.
"""

from __future__ import annotations

import math
from typing import ClassVar

from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk


class Export:
    """One disk, offered under one id."""

    type: ClassVar[str] = ""

    def __init__(self, id: str, disk: Disk, writable: bool) -> None:
        self.id = id
        self.disk = disk
        self.writable = writable
        self.shutting_down = False
        self.bitmaps: tuple[Bitmap, ...] = ()  # nobody else's while the export is there

    @property
    def users(self) -> int:
        """Clients connected now."""
        return 0

    def clients(self) -> list[str]:
        """Who is connected, in words."""
        return []

    def stop(self, force: bool = False, seconds: float = math.inf) -> bool:
        """Take no new client; with `force` drop those there are. Returns when all are gone: False
        if that takes longer than `seconds`."""
        raise NotImplementedError
