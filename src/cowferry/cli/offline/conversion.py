"""Making one image read as another one: the work of `cowferry convert`.

What the target shows already is left alone, and that is looked at, never assumed: a new image reads
as zeroes (`New.blank`), a device and an image that was there show what they show. What lies below
the target counts as a part of the source only if both are one image with one format, all the way
down (`identity.one_image`); where an image that was there has bytes of its own over it, these are
compared.

Runs of zero bytes in the source's data become holes, as with qemu-img. Where the file system can
share extents (reflink), data is shared as it is, and nobody reads it to look for zeroes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from cowferry.block import identity, scope
from cowferry.block.compress import Compressed
from cowferry.block.copy import Copier, Kind, Span, differing, spans
from cowferry.block.node import Extent, Node, State, chain, far, read, resolve, with_holes
from cowferry.block.scope import CalledOff
from cowferry.cli.offline import forget
from cowferry.cli.offline.progress import Report
from cowferry.cli.offline.runs import Windows
from cowferry.errors import CowferryError, ImageError, reason

STEP = 16 << 20  # bytes between two looks at the progress, and at what else is wanted
CHUNK = 2 << 20  # bytes that are searched for zeroes at once
TOGETHER = 4 << 20  # bytes compressed together; a multiple of every granule
FETCH = 16 << 20  # bytes asked of a server at once
PAGE = 4096  # bytes; no file system makes a smaller hole
SPARSE = 4096  # bytes; a shorter run of zeroes is data
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Conversion:
    """One source, one target that nobody else uses. Used by one thread.

    `blank`: so many bytes at the beginning of the target read as zeroes, but for its backing file.
    `sparse`: bytes; a run of as many zero bytes becomes a hole; 0: all is written; None: as it is
    best. `done` is how far the target has been written, in bytes."""

    def __init__(
        self, source: Node, target: Node, *, blank: int, sparse: int | None, compress: bool,
        drop_source: bool = False, drop_target: bool = False,
    ) -> None:  # fmt: skip
        self.source = source
        self.target = target
        self.blank = blank if target.backing is None else 0
        self.sparse = SPARSE if sparse is None else sparse
        self.compress = compress
        self.dropped = [source] * drop_source + [target] * drop_target
        self.base = _shown(source, target)
        self.copier = Copier()
        self.granule = max(source.granule, target.granule)
        self.unit = self._unit()
        # Whether bytes are moved without a look at them: all are wanted, a server is the target, or
        # the files can share extents, which the first bytes show.
        self.blind: bool | None = None if sparse is None else sparse == 0
        if sparse is None and far(target):
            self.blind = True
        self.done = 0
        self._side = ""  # "read" or "write" while only one of the two can fail

    def _unit(self) -> int:
        """Bytes that are looked at together, and become a hole of the target or not."""
        if self.target.driver == "raw":
            return min(PAGE, self.sparse) or PAGE
        return self.target.granule

    def run(self, report: Report) -> None:
        """Copy everything, and flush. Raises `CowferryError`, which says where it has failed."""
        source, target = self.source, self.target
        try:
            for span in self._spans():
                scope.check()
                self.done = span.offset
                self._span(span)
                report.at(span.offset + span.length)
                for node in self.dropped:
                    forget(node)
            self.done = source.size
            self._zero(source.size, target.size - source.size)
            target.flush()
        except CalledOff:
            raise  # neither side has failed
        except OSError as error:
            raise self._told(error) from error

    def _spans(self) -> Iterator[Span]:
        """What is to be done, in steps."""
        windows = Windows(0, self.source.size, self.source, self.target)
        for start, length in windows:
            for span in spans(self.source, start, length, self.granule, self.base):
                quick = span.kind is not Kind.COPY and span.offset + span.length <= self.blank
                step = span.length if quick else STEP
                if span.kind is Kind.COPY:
                    windows.busy()
                for at in range(0, span.length, step):
                    yield Span(span.offset + at, min(step, span.length - at), span.kind)

    def _span(self, span: Span) -> None:
        if span.kind is Kind.KEEP:
            if span.offset + span.length > self.blank:
                here = span.offset, span.length
                for at, n in differing(self.base, self.target, *here, PAGE, holes=False):
                    scope.check()
                    self.copier.place(self.source, self.target, Span(at, n, Kind.COPY))
        elif span.kind is Kind.ZERO and self.sparse:
            self._zero(span.offset, span.length)
        else:
            self._copy(span.offset, span.length)

    def _zero(self, offset: int, length: int) -> None:
        """Zeroes where the target shows something else."""
        end = offset + length
        offset = max(offset, self.blank)
        if offset >= end:
            return
        for at, n in _not_zero(self.target, offset, end - offset):
            for start in range(at, at + n, STEP):  # a device that has to write them takes its time
                scope.check()
                n_now = min(STEP, at + n - start)
                self.target.changing(start, n_now)
                self.target.zero(start, n_now, unmap=True)

    def _copy(self, offset: int, length: int) -> None:
        """Bytes of the source, which may hold zeroes."""
        if self.blind is None and not self.compress:
            first = min(length, self.granule)
            self.copier.place(self.source, self.target, Span(offset, first, Kind.COPY))
            self.blind = self.copier.cloned > 0
            offset, length = offset + first, length - first
        if self.blind and not self.compress:
            self.copier.place(self.source, self.target, Span(offset, length, Kind.COPY))
            return
        remote = bool(far(self.source))
        step = max(FETCH if remote else TOGETHER if self.compress else CHUNK, self.unit)
        buffer = memoryview(bytearray(0 if remote else min(step, length)))
        for at in range(offset, offset + length, step):
            n = min(step, offset + length - at)
            scope.check()
            self.done = at
            self._side = "read"
            if remote:
                data = self.copier.fetch(self.source, at, n)
            else:
                data = buffer[:n]
                read(self.source, data, at)
            self._side = "write"
            self._write(data, at)
            self._side = ""

    def _write(self, data: memoryview, offset: int) -> None:
        """Put bytes into the target, but for zeroes that it shows already."""
        for start, stop, zero in self._runs(data):
            at, n = offset + start, stop - start
            if zero:
                self._zero(at, n)
                continue
            self.target.changing(at, n)
            if self.compress:
                with Compressed(self.target, at, data[start:stop]) as packed:
                    packed.put()
            else:
                self.target.pwrite(data[start:stop], at)

    def _runs(self, data: memoryview) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether they are zeroes that become a hole) of runs of `data`."""
        unit, size = self.unit, len(data)
        if not self.sparse:
            yield 0, size, False
            return
        zeroes = bytes(unit)
        begin = 0  # of data that waits for its end
        start = -1  # of zeroes that wait for theirs
        for at in [*range(0, size, unit), size]:
            if at < size and data[at : at + unit] == zeroes[: min(unit, size - at)]:
                start = at if start < 0 else start
                continue
            least = self.sparse if at < size else min(self.sparse, (size - 1) % unit + 1)
            if start >= 0 and at - start >= least:
                if start > begin:
                    yield begin, start, False
                yield start, at, True
                begin = at
            start = -1
        if size > begin:
            yield begin, size, False

    def _told(self, error: OSError) -> CowferryError:
        """The error, with the side and the place where it happened."""
        source, target = self.source, self.target
        if self._side != "write" and error.errno not in FULL:
            length = min(STEP, source.size - self.done)
            at = _unreadable(source, self.done, length)
            if at is None and self._side == "read":
                at = self.done  # it can be read by now
            if at is not None:
                return ImageError(
                    f"Could not read '{source.filename}' at offset {at}: "
                    f"{reason(error, source.filename)}"
                )
        return ImageError(
            f"Could not write '{target.filename}' at offset {self.done} or after it: "
            f"{reason(error, target.filename)}"
        )


def _shown(source: Node, target: Node) -> Node | None:
    """The node of the source's chain that the target shows by its backing file, if there is one."""
    below = target.backing
    if below is None:
        return None
    return next((n for n in chain(source) if identity.one_image(n, below)), None)


def _not_zero(node: Node, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the runs that a node does not say to be zero, neighbours joined."""
    start, at = -1, offset
    for e in with_holes(node, offset, length):
        if e.state is State.ZERO:
            if start >= 0:
                yield start, at - start
                start = -1
        elif start < 0:
            start = at
        at += e.length
    if start >= 0:
        yield start, at - start


def _unreadable(node: Node, offset: int, length: int) -> int | None:
    """The first place of a range that cannot be read, to 512 bytes; None if all can be."""
    buffer = memoryview(bytearray(CHUNK))
    for step in (CHUNK, 64 << 10, 4096, 512):
        failed = None
        for at in range(offset, offset + length, step):
            try:
                read(node, buffer[: min(step, offset + length - at)], at)
            except OSError:
                failed = at
                break
        if failed is None:
            return None
        offset, length = failed, min(step, offset + length - failed)
    return offset


class Concatenated(Node):
    """Images one after another, as one to be read."""

    driver = "raw"
    read_only = True

    def __init__(self, parts: Sequence[Node]) -> None:
        self.parts = parts
        self.filename = parts[0].filename
        self.size = sum(p.size for p in parts)
        self.granule = max(p.granule for p in parts)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The runs of the parts, with their chains."""
        for part, at, n in self._within(offset, length):
            for e in resolve(part, at, n):
                # A part reads its own runs, unless they are plain bytes of a file.
                plain = e.fd >= 0 or e.state is State.ZERO
                yield (
                    Extent(e.length, e.state, e.fd, e.host)
                    if plain
                    else Extent(e.length, State.DATA)
                )

    def read_run(self, buf: memoryview, offset: int, extent: Extent) -> None:
        """Ask the parts."""
        for part, at, n in self._within(offset, len(buf)):
            read(part, buf[:n], at)
            buf = buf[n:]

    def _within(self, offset: int, length: int) -> Iterator[tuple[Node, int, int]]:
        """(part, offset in it, length) of each piece of a range."""
        for part in self.parts:
            if length and offset < part.size:
                n = min(length, part.size - offset)
                yield part, offset, n
                offset, length = offset + n, length - n
            offset = max(offset - part.size, 0)
