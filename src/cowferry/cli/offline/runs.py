"""Runs of a disk, as `map` shows them and other commands compare them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from cowferry.block.node import Extent, Node, State, chain, files, resolve, with_holes

WINDOW = 64 << 20  # bytes whose runs are looked up together, at first
MANY = 1 << 20  # granules whose runs are looked up together, at most


class Windows:
    """Ranges of disks, one after another, whose runs are looked up together. Iterable once.

    They grow as long as the caller finds little in them (`busy` was not called), because a disk
    may have exabytes of nothing; and they stay so small that their runs fit into memory."""

    def __init__(self, start: int, end: int, *nodes: Node | None) -> None:
        self.start = start
        self.end = end
        layers = [layer for node in nodes for layer in chain(node)]
        self.granule = max((layer.granule for layer in layers), default=WINDOW)
        plain = all(layer.driver in ("raw", "file") for layer in layers)
        self.most = end if plain else self.granule * MANY  # a file's runs are found one by one
        self.length = self._rounded(WINDOW)

    def _rounded(self, length: int) -> int:
        return max(length // self.granule, 1) * self.granule

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of each; the first begins at `start`, and all others at a granule."""
        at = self.start
        while at < self.end:
            stop = min(at // self.granule * self.granule + self.length, self.end)
            self.length = self._rounded(min(self.length * 2, max(self.most, WINDOW)))
            yield at, stop - at
            at = stop

    def busy(self) -> None:
        """There is something in this one: the next one is small."""
        self.length = self._rounded(WINDOW)


class Run(NamedTuple):
    """Bytes of a disk with one status: qemu-img's MapEntry.

    `offset` is where they lie in `file`, None if that cannot be said."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    file: Node | None

    @property
    def status(self) -> tuple[bool, ...]:
        """What tells runs apart whose places and layers do not matter."""
        return self.present, self.zero, self.data, self.offset is not None


def runs(node: Node, start: int, end: int) -> Iterator[Run]:
    """The runs of bytes `start` to `end`, equal neighbours joined."""
    last: Run | None = None
    windows = Windows(start, end, node)
    for offset, length in windows:
        for run in _runs(node, offset, length):
            if last is not None and _joins(last, run):
                last = last._replace(length=last.length + run.length)
                continue
            if last is not None:
                windows.busy()
                yield last
            last = run
    if last is not None:
        yield last


def _runs(node: Node, start: int, length: int) -> Iterator[Run]:
    layers = list(chain(node))
    for e in with_holes(node, start, length):
        if e.depth < 0:
            yield Run(start, e.length, len(layers) - 1, False, True, False, None, None)
        else:
            layer = layers[e.depth]
            own = next(files(layer))
            file = next((f for f in files(layer) if e.fd >= 0 and f.fd == e.fd), own)
            apart = file is not own  # QEMU does not look for holes in an external data file
            zero = e.state is not State.DATA and not apart
            data = e.state is State.DATA or apart or (e.fd >= 0 and layer.preallocated)
            if e.fd < 0 and zero:
                yield from _zeroes(layer, e.depth, start, e.length)
            else:
                place = e.host if e.fd >= 0 or (data and not e.compressed) else None
                yield Run(start, e.length, e.depth, True, zero, data, place, file)
        start += e.length


def _zeroes(layer: Node, depth: int, start: int, length: int) -> Iterator[Run]:
    """Zeroes that a format knows of; the place may be kept for later."""
    kept = getattr(layer, "kept_places", None)
    pieces: Iterator[tuple[int, int]] = iter([(length, 0)])
    if kept is not None:
        pieces = kept(start, length)
    for n, host in pieces:
        *_, file = files(layer)
        yield Run(start, n, depth, True, True, False, host or None, file)
        start += n


def _joins(a: Run, b: Run) -> bool:
    """Whether `b` goes on where `a` ends."""
    if a.status != b.status or a.depth != b.depth or a.file is not b.file:
        return False
    return a.offset is None or a.offset + a.length == b.offset


# Two disks -----------------------------------------------------------------------------------


def may_differ(
    a: Node | None, b: Node | None, start: int, length: int
) -> Iterator[tuple[int, int]]:
    """(offset, length) of what two chains do not say to be the same bytes, neighbours joined."""
    end = start + length
    left, right = (iter(resolve(n, start, length)) for n in (a, b))
    x, y = next(left), next(right)
    begin = -1
    while start < end:
        n = min(x.length, y.length)
        if _same(x, y):
            if begin >= 0:
                yield begin, start - begin
            begin = -1
        elif begin < 0:
            begin = start
        start += n
        if start < end:
            x = _behind(x, n) if x.length > n else next(left)
            y = _behind(y, n) if y.length > n else next(right)
    if begin >= 0:
        yield begin, end - begin


def _behind(e: Extent, length: int) -> Extent:
    return e._replace(length=e.length - length, host=e.host + length)


def _same(a: Extent, b: Extent) -> bool:
    """Whether two runs are zeroes, or lie in one file at one place."""
    if a.state is State.ZERO and b.state is State.ZERO:
        return True
    if a.fd < 0 or b.fd < 0 or a.host != b.host or a.state is not b.state:
        return False
    return os.path.samestat(os.fstat(a.fd), os.fstat(b.fd))
