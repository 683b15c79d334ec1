"""Mending an image, so that a crash at any moment leaves it no worse than it was.

The tables that lead from the header to the guest's data are believed, and what contradicts them is
corrected:

1. refcounts, in place, if each refcount block certainly is one. Else all of them are counted anew
   and written, with a new refcount table, into clusters that nothing refers to, and one write of
   sector 0 makes them count. Until then the old ones do;
2. COPIED flags. One that is wrongly set goes before the refcounts change, and one that is wrongly
   clear is set afterwards. So no flag ever allows a write into a cluster with two owners;
3. entries that can be right in one way only: a zero cluster needs no place in the file, reserved
   bits are zero. What the guest reads stays the same;
4. damaged bitmaps are kept without their bits; snapshots get the fields that version 3 demands.

No cluster that is referenced is overwritten, but for the corrected words of tables, and of those
only such that lie over nothing else. If a table cannot be followed, clusters that look unused may
belong to it. Then refcounts are raised only, and new ones are written behind the end of the file.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowferry.drivers.qcow2 import bitmaps, snapshots, sources, stamp
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.bitmap_directory import clusters
from cowferry.drivers.qcow2.clusters import COPIED
from cowferry.drivers.qcow2.counts import Counts
from cowferry.drivers.qcow2.flags import contradictions
from cowferry.drivers.qcow2.refcounts import swapped
from cowferry.drivers.qcow2.references import References
from cowferry.drivers.qcow2.stored import Stored, pack
from cowferry.errors import CowferryError, ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

SPAN = 64 << 10  # bytes of a table that are written at once
# What these say stays true, because a repair changes no byte of the disk.
KNOWN_AUTOCLEAR = headers.BITMAPS_VALID | headers.BITMAPS_KEPT | headers.DATA_FILE_RAW
KNOWN_AUTOCLEAR |= sources.VALID | stamp.INTACT


class Repair:
    """One round of mending what `refs` and `stored` found."""

    def __init__(self, image: Qcow2, refs: References, stored: Stored, fix: str) -> None:
        self.image, self.refs, self.stored, self.fix = image, refs, stored, fix
        self.said: list[str] = []  # for people
        self.changed = False

    def run(self) -> bool:
        """Mend what can be mended. Return whether the image was changed."""
        refs, stored = self.refs, self.stored
        if refs.result.check_errors:
            self.said.append("Nothing is repaired, because a part of the image cannot be read")
            return False
        if refs.lost:
            self.said.append(
                f"Clusters that look leaked are left alone: they may belong to what cannot be "
                f"followed ({refs.lost})"
            )
        if self.fix == "leaks":
            return self._give_back_leaks()
        rebuilt = self._new_refcounts() if stored.why else None
        if stored.why and rebuilt is None:
            return False
        self._forget_strangers()
        self._forget_snapshot_table()
        self._edit()
        self._flags(right=False)
        if rebuilt is not None:
            rebuilt.switch()
            self.said.append(
                f"Repairing: the refcounts are counted anew, because {stored.why}; they take "
                f"{rebuilt.clusters} clusters, and their table lies at file offset "
                f"{rebuilt.table << refs.bits:#x}"
            )
            self.changed = True
        else:
            self._counts()
        if not refs.lost:
            self._flags(right=True)
        if not self.image.checking:
            self.image.reload()
        self._small_things()
        return self.changed

    def _new_refcounts(self) -> Rebuilt | None:
        """Write new refcounts that do not count yet; None, and nothing is written, if there is no
        room for them. Raises `ImageError` if they cannot be written."""
        try:
            rebuilt = Rebuilt(self.image, self.refs, self.stored)
        except ImageError as error:
            self.said.append(f"ERROR {error.desc}: {error.hint}")
            return None
        try:
            rebuilt.write()
        except OSError as error:
            raise ImageError(
                f"'{self.image.filename}': new refcounts cannot be written: "
                f"{error.strerror or error}",
                "the image is as it was; make room, or convert the image",
            ) from error
        return rebuilt

    def _give_back_leaks(self) -> bool:
        """Lower counts. Flags are set only if nothing else is wrong."""
        if self.stored.why:
            self.said.append(
                f"Leaks are left alone, because the refcounts cannot be relied on "
                f"({self.stored.why}); -r all repairs them"
            )
            return False
        if not self.refs.result.leaks or self.refs.lost:
            return False
        self._forget_strangers()
        self._counts()
        if not self.refs.result.corruptions:
            self._flags(right=True)
        if not self.image.checking:
            self.image.reload()
        return self.changed

    def _forget_strangers(self) -> None:
        """Autoclear bits that we do not know go before anything changes (Q5)."""
        h = self.image.header
        if h.autoclear & ~KNOWN_AUTOCLEAR:
            h.autoclear &= KNOWN_AUTOCLEAR
            self.image.write_header()

    def _forget_snapshot_table(self) -> None:
        """Without snapshots there is no table. QEMU opens no image that names an odd place."""
        h = self.image.header
        if self.refs.stray_snapshot_table:
            h.snapshots_offset = 0
            self.image.write_header()
            self.said.append("Repairing: the header names no snapshot table any more")
            self.changed = True

    # Tables --------------------------------------------------------------------------------

    def _edit(self) -> None:
        patches = Patches(self.image, self.refs)
        for position, value in zip(*self.refs.edits, strict=True):
            patches.add(position, value)
        self._finish(patches, "table entries are corrected")

    def _flags(self, right: bool) -> None:
        """Clear the COPIED flags that are wrongly set, or set those that are wrongly clear."""
        refs, stored = self.refs, self.stored
        patches = Patches(self.image, refs)

        def one(cluster: int) -> bool:
            # A refcount that is too narrow stays wrong. Then no flag is better than another.
            wanted = refs.counts[cluster]
            return wanted == 1 or (wanted > stored.max and not right)

        for wrong in contradictions(refs, stored, one):
            if wrong.right is right:
                patches.add(wrong.position, wrong.entry & ~COPIED | COPIED * right)
        self._finish(patches, f"COPIED flags are {'set' if right else 'cleared'}")

    def _finish(self, patches: Patches, what: str) -> None:
        patches.flush()
        if patches.count:
            self.image.file.flush()
            self.said.append(f"Repairing: {patches.count} {what}")
            self.changed = True

    # Counts --------------------------------------------------------------------------------

    def _counts(self) -> None:
        """Correct counts where they are. Each block is known to hold nothing else."""
        refs, stored = self.refs, self.stored
        number = 0
        for page in sorted(stored.differs):
            have, want = stored.page(page), refs.counts.numbers(page)
            assert have is not None
            new = array(have.typecode, have)
            for at, (h, w) in enumerate(zip(have, want, strict=True)):
                lower = h > w and not refs.lost
                if lower or (h < w and self.fix == "all"):
                    new[at] = min(w, stored.max)
                    number += new[at] != h
            if new != have:
                index, within = divmod(page, stored.pages)
                offset = (stored.places[index] << refs.bits) + within * stored.page_bytes
                self.image._write(offset, pack(stored.order, new))
        if number:
            self.image.file.flush()
            self.said.append(f"Repairing: {number} refcounts are corrected")
            self.changed = True

    # The rest ------------------------------------------------------------------------------

    def _small_things(self) -> None:
        """What takes room, and so needs refcounts that are right."""
        refs, image = self.refs, self.image
        damaged = bool(refs.bad_bitmaps or refs.bitmap_problem)
        if not damaged and not refs.incomplete_snapshots:
            return
        if refs.lost:  # what the refcounts call free may belong to it
            self.said.append(
                "Bitmaps and snapshots are left as they are, because a table cannot be followed "
                f"({refs.lost})"
            )
            return
        try:
            image.reload()
            if image.overlap:
                raise ImageError(f"'{image.filename}': {image.overlap}")
            if damaged:
                done = bitmaps.mend(image, refs.bad_bitmaps, refs.bitmap_problem)
                self.said += done
                self.changed |= bool(done)
            self._snapshots()
        except (OSError, CowferryError) as error:
            why = (error.strerror if isinstance(error, OSError) else error.desc) or error
            self.said.append(f"Bitmaps and snapshots are left as they are: {why}")

    def _snapshots(self) -> None:
        """Write the snapshot table anew if entries lack fields, but none is damaged otherwise."""
        image, h = self.image, self.image.header
        if not self.refs.incomplete_snapshots or self.refs.lost:
            return
        table = snapshots.scan(image)
        data = b"".join(s.completed(h.size) for s in table.snapshots)
        old = h.snapshots_offset
        with image.flushing:
            fresh = bitmaps.Fresh(image)
            try:
                offset = fresh.row(data)
                image._write_tables()
            except BaseException:
                fresh.undo()
                raise
            h.snapshots_offset = offset
            try:
                image.write_header()
            except BaseException:
                h.snapshots_offset = old
                raise
            bitmaps.give_back(image, set(clusters(image, old, table.size)))
        image.snapshots = snapshots.read(image)
        self.said.append(
            f"Repairing: {self.refs.incomplete_snapshots} entries of the snapshot table got the "
            "size of the disk"
        )
        self.changed = True


class Patches:
    """Words of tables that are written in place, many at once."""

    def __init__(self, image: Qcow2, refs: References) -> None:
        self.image, self.refs = image, refs
        self.count = 0
        self._words: dict[int, int] = {}  # position in the file -> value
        self._start = 0

    def add(self, position: int, value: int) -> None:
        """Write the word unless its table lies over something else."""
        if position >> self.refs.bits in self.refs.clashing:
            return
        if not self._start <= position < self._start + SPAN:
            self.flush()
            self._start = position // SPAN * SPAN
        self._words[position] = value

    def flush(self) -> None:
        """Write what waits; no barrier."""
        if not self._words:
            return
        first, last = min(self._words), max(self._words)
        data = bytearray(last + 8 - first)
        self.image.file.pread(memoryview(data), first)
        before = bytes(data)
        for position, value in self._words.items():
            struct.pack_into(">Q", data, position - first, value)
        if data != before:
            self.count += len(self._words)
            self.image._write(first, bytes(data))
        self._words.clear()


class Rebuilt:
    """New refcount blocks and a new table, in clusters that nothing refers to.

    Raises `ImageError` if there is no room for them; nothing is changed before `write`."""

    def __init__(self, image: Qcow2, refs: References, stored: Stored) -> None:
        self.image, self.refs, self.stored = image, refs, stored
        self.file_size = image.file.size
        used = refs.counts
        for first, count in stored.own:  # they are not needed any more
            used.add(first, count, -1)
        indexes = {n // stored.pages for n in used.pages() if any(used.numbers(n))}
        if refs.lost:
            indexes |= {i for i, place in enumerate(stored.places) if place}
        for first, count in stored.own:  # but until the header changes they have to stay
            used.add(first, count)
        self._place(indexes)
        for first, count in stored.own:
            used.add(first, count, -1)
        used.add(self.table, self.table_clusters)
        for place in self.blocks.values():
            used.add(place)

    @property
    def clusters(self) -> int:
        """How many clusters the new structures take."""
        return self.table_clusters + len(self.blocks)

    def _place(self, indexes: set[int]) -> None:
        """Find room for a block for each index, for the table, and for what counts those."""
        image, per_block = self.image, self.refs.per_block
        while True:
            need = max(indexes, default=0) + 1
            self.table_clusters = -(-need * 8 // image.cluster_size)
            if self.table_clusters * image.cluster_size > headers.MAX_REFTABLE:
                raise ImageError(
                    f"'{image.filename}': the refcount table would be too large",
                    "nothing was changed; convert the image, with larger clusters",
                )
            found = self._rooms(len(indexes))
            self.table, places = found
            count = self.table_clusters
            more = {c // per_block for c in (*range(self.table, self.table + count), *places)}
            if more <= indexes:
                self.blocks = dict(zip(sorted(indexes), places, strict=True))
                return
            indexes |= more

    def _rooms(self, blocks: int) -> tuple[int, list[int]]:
        """(first cluster of the table, clusters of the blocks)."""
        image, refs = self.image, self.refs
        beyond = refs.counts.end() > refs.clusters  # it must not become a part of the file
        if image.on_device or beyond:
            limit = min(image.file.size >> refs.bits, refs.clusters)
            starts = [refs.counts.end(), 1]
        else:
            limit = 1 << 62
            starts = [max(refs.counts.end(), refs.clusters * bool(refs.lost))]
        for start in starts:
            table, places = -1, list[int]()
            for first, count in self._certain(start, limit):
                if table < 0 and count >= self.table_clusters:
                    table = first
                    first, count = first + self.table_clusters, count - self.table_clusters
                take = min(count, blocks - len(places))
                places += range(first, first + take)
                if table >= 0 and len(places) == blocks:
                    return table, places
        need = self.table_clusters + blocks
        what = "on the device" if image.on_device else "within the file, which was cut short"
        raise ImageError(
            f"'{image.filename}': no room for new refcounts",
            f"they need {need} free clusters of {image.cluster_size} bytes {what}; nothing was "
            "changed; convert the image, or move it to where there is more room",
        )

    def _certain(self, start: int, limit: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of clusters that may be used: those without a reference. Within a file
        with lost tables they must be free by the old refcounts, too."""
        refs, stored = self.refs, self.stored
        runs = free_runs(refs.counts, start, limit)
        if not refs.lost or start >= refs.clusters:
            yield from runs
            return
        for first, count in runs:
            begin = first
            while first < begin + count:
                number, at = divmod(first, stored.size)
                stop = min(begin + count, first - at + stored.size)
                have = stored.page(number)
                free = 0
                for cluster in range(first, stop):
                    if have is not None and not have[cluster - first + at]:
                        free += 1
                    elif free:
                        yield cluster - free, free
                        free = 0
                if free:
                    yield stop - free, free
                first = stop

    def write(self) -> None:
        """Write the new structures, durably. Nothing refers to them. Raises `OSError`; then the
        file is as it was."""
        image, stored = self.image, self.stored
        table = array("Q", bytes(self.table_clusters * image.cluster_size))
        pages = self.refs.counts.pages()
        try:
            for index, place in self.blocks.items():
                table[index] = place << self.refs.bits
                first = bisect_left(pages, index * stored.pages)
                last = bisect_left(pages, (index + 1) * stored.pages)
                image._write(table[index], self._block(index, pages[first:last]))
            image._write(self.table << self.refs.bits, swapped(table))
            image.file.flush()
        except BaseException:
            if not image.on_device:
                with contextlib.suppress(OSError):
                    image.file.resize(self.file_size)
            raise

    def _block(self, index: int, pages: list[int]) -> bytes:
        refs, stored = self.refs, self.stored
        data = bytearray(refs.cluster_size)
        if refs.lost:  # what is counted may belong to what cannot be followed
            data = stored.block(index) or data
        for number in pages:
            numbers = [min(n, stored.max) for n in refs.counts.numbers(number)]
            if refs.lost:
                have = stored.page(number)
                if have is not None:
                    numbers = [max(n, h) for n, h in zip(numbers, have, strict=True)]
            at = (number - index * stored.pages) * stored.page_bytes
            data[at : at + stored.page_bytes] = pack(stored.order, numbers)
        return bytes(data)

    def switch(self) -> None:
        """One write of sector 0: from now on the new structures count, durably."""
        h = self.image.header
        was = h.reftable_offset, h.reftable_clusters
        h.reftable_offset, h.reftable_clusters = self.table << self.refs.bits, self.table_clusters
        try:
            self.image.write_header()
        except BaseException:
            h.reftable_offset, h.reftable_clusters = was
            raise


def free_runs(counts: Counts, start: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of clusters from `start` on that have no reference, below `limit`."""
    at = start
    for number in counts.pages():
        base = number * counts.size
        if base + counts.size <= start:
            continue
        for i, n in enumerate(counts.numbers(number)):
            if n:
                if at < min(base + i, limit):
                    yield at, min(base + i, limit) - at
                at = max(at, base + i + 1)
    if at < limit:
        yield at, limit - at
