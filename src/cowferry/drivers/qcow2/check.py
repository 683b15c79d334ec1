"""Checking an image: count every reference, compare with the refcounts, and mend what can be.

A *leak* is a cluster counted more often than it is referenced: room lost, nothing worse. A
*corruption* is the opposite, or a COPIED flag that contradicts the refcount, or a table entry
that cannot be: then two owners may overwrite each other. `leaks` lowers counts; `all` sets every
count and every flag to what the references say. The tables themselves are taken as the truth.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from cowferry.drivers.qcow2 import bitmaps, snapshots
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.clusters import ALL, COMPRESSED, COPIED, ZERO_FLAG
from cowferry.drivers.qcow2.refcounts import OFFSET, big_endian
from cowferry.drivers.result import Result
from cowferry.errors import ImageError

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2


class Counter:
    """References found so far, one count per host cluster."""

    def __init__(self, image: Qcow2) -> None:
        self.bits = image.header.cluster_bits
        self.limit = max(-(-image.file.size >> self.bits), image.refcounts.end, 1) + 1
        self.counts: array[int] = array("I", bytes(4 * self.limit))
        self.outside = 0

    def add(self, first: int, count: int = 1) -> bool:
        """One more reference to each. False: the cluster lies beyond the file."""
        if first < 0 or first + count > self.limit:
            self.outside += 1
            return False
        for cluster in range(first, first + count):
            self.counts[cluster] += 1
        return True

    def add_bytes(self, offset: int, length: int) -> bool:
        """One more reference to each cluster that the bytes touch."""
        if length <= 0:
            return True
        first = offset >> self.bits
        return self.add(first, ((offset + length - 1) >> self.bits) - first + 1)


def check(image: Qcow2, fix: Literal["leaks", "all"] | None = None) -> Result:
    """Check, and mend if asked and open for writing. Not while anybody writes.

    Raises `OSError` if the image cannot be read. After a repair the counts say what was
    left, and the `_fixed` counts what was mended."""
    if not image.read_only:
        image.flush()
    result = Result()
    messages: list[str] = []
    counter = Counter(image)
    _count(image, counter, result, messages)
    wrong = _compare(image, counter, result, messages)
    copied = _copied_flags(image, counter, result, messages)
    end = counter.limit
    while end > 1 and not counter.counts[end - 1] and not image.refcounts.get(end - 1):
        end -= 1
    result.image_end_offset = end << image.header.cluster_bits
    if fix is not None:
        _mend(image, fix, wrong, copied, result)
    result.messages = tuple(messages)
    return result


def _count(image: Qcow2, counter: Counter, result: Result, messages: list[str]) -> None:
    h, refs = image.header, image.refcounts
    result.total_clusters = -(-h.size // h.cluster_size)

    def bad(text: str) -> None:
        result.corruptions += 1
        messages.append(f"ERROR {text}")

    counter.add(0)
    counter.add_bytes(refs.table_offset, len(refs.table) * 8)
    for i, offset in enumerate(refs.table):
        if offset and (
            offset & (h.cluster_size - 1) or not counter.add((offset & OFFSET) >> h.cluster_bits)
        ):
            bad(f"refcount block {i} has the invalid offset {offset:#x}")
    _count_l1(image, counter, image.map.l1_offset, image.map.l1, result, bad, active=True)
    for s in image.snapshots:
        counter.add_bytes(h.snapshots_offset if s is image.snapshots[0] else 0, 0)
        data = bytearray(s.l1_size * 8)
        image.file.pread(memoryview(data), s.l1_offset)
        _count_l1(image, counter, s.l1_offset, big_endian("Q", data), result, bad, active=False)
    if image.snapshots:
        counter.add_bytes(h.snapshots_offset, snapshots.table_size(image))
    try:
        for cluster in bitmaps.places(image, bitmaps.directory(image)):
            counter.add(cluster)
    except ImageError as error:  # opened for writing the image has none any more
        bad(error.desc)


def _count_l1(
    image: Qcow2,
    counter: Counter,
    offset: int,
    l1: array[int],
    result: Result,
    bad: object,
    active: bool,
) -> None:
    assert callable(bad)
    bits, words = image.header.cluster_bits, image.map.words
    counter.add_bytes(offset, len(l1) * 8)
    last = -1
    for index, entry in enumerate(l1):
        place = entry & OFFSET
        if not place:
            continue
        if place & ((1 << bits) - 1) or not counter.add(place >> bits):
            bad(f"L2 table {index} has the invalid offset {place:#x}")
            continue
        table = image.map.table(index) if active else None
        if table is None:
            data = bytearray(1 << bits)
            image.file.pread(memoryview(data), place)
            table = big_endian("Q", data)
        for slot, e in enumerate(table[::words]):
            if not e and words == 1:
                continue
            guest = (index * image.map.per_table + slot) << bits
            if e & COMPRESSED:
                first, stop = image.map.compressed_clusters(e)
                if not counter.add(first, stop - first + 1):
                    bad(f"compressed cluster at guest offset {guest} lies outside the file")
                if active:
                    result.compressed_clusters += 1
                    result.allocated_clusters += 1
                    result.fragmented_clusters += 1
                continue
            host = e & OFFSET
            if not host and not (image.external and e & COPIED):
                continue
            if host & ((1 << bits) - 1):
                bad(f"cluster at guest offset {guest} has the odd host offset {host:#x}")
                continue
            bitmap = table[slot * 2 + 1] if words == 2 else 0
            if words == 2 and bitmap & ALL & (bitmap >> 32):
                bad(f"cluster at guest offset {guest} has an invalid subcluster bitmap")
            if not image.external and not counter.add(host >> bits):
                bad(f"cluster at guest offset {guest} lies outside the file")
            if active and not e & ZERO_FLAG:
                result.allocated_clusters += 1
                if last >= 0 and host != last + (1 << bits):
                    result.fragmented_clusters += 1
                last = host


def _compare(
    image: Qcow2, counter: Counter, result: Result, messages: list[str]
) -> list[tuple[int, int, int]]:
    """(cluster, counted, referenced) wherever the two differ."""
    wrong: list[tuple[int, int, int]] = []
    refs = image.refcounts
    for index in range(-(-counter.limit // refs.per_block)):
        base = index * refs.per_block
        want = counter.counts[base : base + refs.per_block]
        block = refs.block(index)
        have = block[: len(want)] if block is not None else array("I", bytes(4 * len(want)))
        if have.tolist() == want.tolist():
            continue
        for i, (h, w) in enumerate(zip(have, want, strict=True)):
            if h == w:
                continue
            wrong.append((base + i, h, w))
            if h > w:
                result.leaks += 1
                messages.append(f"Leaked cluster {base + i} refcount={h} reference={w}")
            else:
                result.corruptions += 1
                messages.append(f"ERROR cluster {base + i} refcount={h} reference={w}")
    for index in range(-(-counter.limit // refs.per_block), len(refs.table)):
        block = refs.block(index)
        for i, h in enumerate(block or ()):
            if h:
                wrong.append((index * refs.per_block + i, h, 0))
                result.leaks += 1
    return wrong


def _entries(image: Qcow2) -> Iterator[tuple[int, int, int]]:
    """(L1 index, slot in words, entry) of every mapped entry of the active table."""
    step = image.map.words
    for index in image.map.walk():
        table = image.map.table(index)
        for slot in range(0, len(table or ()), step):
            assert table is not None
            if table[slot] & OFFSET and not table[slot] & COMPRESSED:
                yield index, slot, table[slot]


def _copied_flags(
    image: Qcow2, counter: Counter, result: Result, messages: list[str]
) -> list[tuple[int, int, bool]]:
    """(L1 index, slot or -1 for the L1 entry, right flag) where COPIED contradicts the refcount."""
    wrong: list[tuple[int, int, bool]] = []
    bits = image.header.cluster_bits

    def judge(index: int, slot: int, entry: int) -> None:
        cluster = (entry & OFFSET) >> bits
        if (entry & OFFSET) & ((1 << bits) - 1) or cluster >= counter.limit:
            return
        right = counter.counts[cluster] == 1
        counted = image.refcounts.get(cluster) == 1
        if bool(entry & COPIED) is not right or bool(entry & COPIED) is not counted:
            if bool(entry & COPIED) is not counted:
                result.corruptions += 1
                messages.append(f"ERROR OFLAG_COPIED of cluster {cluster} contradicts its refcount")
            if bool(entry & COPIED) is not right:
                wrong.append((index, slot, right))

    for index in image.map.walk():
        judge(index, -1, image.map.l1[index])
    if not image.external:
        for index, slot, entry in _entries(image):
            judge(index, slot, entry)
    return wrong


def _mend(
    image: Qcow2,
    fix: str,
    wrong: list[tuple[int, int, int]],
    copied: list[tuple[int, int, bool]],
    result: Result,
) -> None:
    with image.meta:
        if fix == "all":
            # Raise counts before anything is taken, so that room in use is not handed out.
            for cluster, have, want in sorted(wrong, key=lambda w: w[1] > w[2]):
                image.refcounts.put(cluster, want)
                if have > want:
                    result.leaks_fixed += 1
            for index, slot, right in copied:
                table = image.map.table(index)
                assert table is not None
                if slot < 0:
                    image.map.l1[index] = image.map.l1[index] & ~COPIED | (COPIED * right)
                    image.map.l1_dirty.add(index)
                else:
                    table[slot] = table[slot] & ~COPIED | (COPIED * right)
                    image.map.dirty.add(index)
            image.refcounts.forget_free()
        else:
            for cluster, have, want in wrong:
                if have > want:
                    image.refcounts.put(cluster, want)
                    result.leaks_fixed += 1
    image.close_tables()
    if fix == "all" and result.corruptions:
        again = check(image)
        result.corruptions_fixed = result.corruptions - again.corruptions
        result.corruptions, result.leaks = again.corruptions, again.leaks
    else:
        result.leaks -= result.leaks_fixed
    if fix == "all" and not result.corruptions and image.header.incompatible & headers.CORRUPT:
        image.header.incompatible &= ~headers.CORRUPT
        image.broken = False
        image.write_header()
