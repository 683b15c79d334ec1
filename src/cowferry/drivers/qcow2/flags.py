"""COPIED flags of table entries: whether each agrees with a refcount.

The flag says that the refcount is exactly 1, so that what the entry points to may be written in
place. It counts only once a table is active. So in the L2 tables of snapshots it may be missing,
and in their L1 tables QEMU leaves it as it was. Clusters of an external data file have no refcount;
there the flag is always set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from cowferry.drivers.qcow2.clusters import COMPRESSED, COPIED
from cowferry.drivers.qcow2.refcounts import OFFSET
from cowferry.drivers.qcow2.references import References, Run
from cowferry.drivers.qcow2.stored import Stored


class Wrong(NamedTuple):
    """An entry whose flag is not what it should be."""

    position: int  # in the file
    entry: int
    right: bool


def contradictions(refs: References, stored: Stored, one: Callable[[int], bool]) -> Iterator[Wrong]:
    """Yield the entries whose flag is wrong. `one` says if a cluster's refcount is 1."""
    for root in refs.roots(active=True):
        cluster = (root.entry & OFFSET) >> refs.bits
        if refs.tables[cluster] and not root.entry & OFFSET & (refs.cluster_size - 1):
            right = one(cluster)
            if bool(root.entry & COPIED) is not right:
                yield Wrong(root.position, root.entry, right)
    for cluster, _, index in refs.each_table():
        table = refs.table(cluster) if not refs.blank[cluster] else None
        for run in refs.runs(table) if table is not None else ():
            skip = run.entry & COMPRESSED or run.entry & OFFSET & (refs.cluster_size - 1)
            if not skip and (index is not None or run.entry & COPIED):
                yield from _of_run(refs, stored, one, run, cluster << refs.bits)


def _of_run(
    refs: References, stored: Stored, one: Callable[[int], bool], run: Run, table: int
) -> Iterator[Wrong]:
    """Those of entries in a row, in the L2 table at a host offset."""
    external = refs.image.external
    first, flag = (run.entry & OFFSET) >> refs.bits, bool(run.entry & COPIED)
    if flag and (external or _all_one(refs, stored, first, run.clusters)):
        return
    for n in range(run.clusters):
        if external or 0 < first + n < refs.clusters:
            right = external or one(first + n)
            if flag is not right:
                position = table + 8 * (run.slot + n) * refs.words
                yield Wrong(position, run.entry + (n << refs.bits), right)


def _all_one(refs: References, stored: Stored, first: int, count: int) -> bool:
    """Whether all refcounts are 1 and right: the quick way through almost all entries."""
    if not stored.differs:
        return refs.counts[first] == 1 if count == 1 else refs.counts.all_are(first, count, 1)
    pages = range(first // stored.size, (first + count - 1) // stored.size + 1)
    return stored.differs.isdisjoint(pages) and refs.counts.all_are(first, count, 1)
