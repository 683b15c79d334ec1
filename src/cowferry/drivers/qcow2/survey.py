"""A look through all L2 tables, before room is used that only the refcounts call free.

The refcounts of an image that others made, or that was damaged, may call a cluster free that a
table still points to. If such a cluster were handed out, two owners would overwrite each other. So
the allocator uses free room that it did not free itself only after each L2 table, also those of
internal snapshots, was looked at once. The clusters that a table uses although their refcount is 0
are withheld; everything else about them stays as it is, until `check -r` repairs the counts.

The work is done a few tables at a time, by the writes that need room, so that opening a large
image stays quick. The image's `meta` lock guards everything here, and the caller holds it.
"""

from __future__ import annotations

import logging
import weakref
from array import array
from typing import TYPE_CHECKING

from cowferry.drivers.qcow2.refcounts import OFFSET

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

log = logging.getLogger(__name__)

COMPRESSED = 1 << 62
TABLES = 8  # looked at for one allocation; about 2 ms each if full
MAX_WITHHELD = 4096  # clusters; an image with more is damaged


class Survey:
    """Which L2 tables are still to be looked at, and what those before have shown."""

    def __init__(self, image: Qcow2) -> None:
        # A weak one, so that an image that was let go goes at once, with its tables.
        self.image: Qcow2 = weakref.proxy(image)
        self.withheld: set[int] = set()  # clusters in use whose refcount is 0
        self._indexes: list[int] | None = None  # active tables to look at; None: not begun
        self._others: list[int] = []  # host offsets of the tables of snapshots

    @property
    def done(self) -> bool:
        """Whether every table was looked at."""
        return self._indexes is not None and not self._indexes and not self._others

    def advance(self, tables: int = TABLES) -> bool:
        """Look at up to `tables` more tables, and return `done`.

        Raises `OSError` if a table cannot be read, or if too many refcounts are wrong."""
        image = self.image
        if image.external:  # no cluster of the image's own file holds guest data
            self._indexes, self._others = [], []
        if self._indexes is None:
            self._indexes = list(image.map.walk())[::-1]
            self._others = sorted(image.inactive_tables, reverse=True)
        found = len(self.withheld)
        for _ in range(tables):
            if self._indexes:
                table = image.map.peek(self._indexes.pop())
            elif self._others:
                table = image.map.load(self._others.pop())
            else:
                break
            if table is not None:
                self._look(table[:: image.map.words])
        if len(self.withheld) > found:
            log.warning(
                "'%s': %d cluster(s) of tables have the refcount 0; cowferry writes nothing else "
                "there (repair: cowferry check -r all)",
                image.filename, len(self.withheld),
            )  # fmt: skip
            if len(self.withheld) > MAX_WITHHELD:
                raise image.damaged("the refcounts call thousands of clusters free that are in use")
        return self.done

    def _look(self, entries: array[int]) -> None:
        refs, bits = self.image.refcounts, self.image.header.cluster_bits
        for entry in entries:
            if not entry:
                continue
            if entry & COMPRESSED:
                first, last = self.image.map.compressed_clusters(entry)
            else:
                first = last = (entry & OFFSET) >> bits
            for cluster in range(first, last + 1):
                if cluster and not refs.get(cluster):
                    self.withheld.add(cluster)
