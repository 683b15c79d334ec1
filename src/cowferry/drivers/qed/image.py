"""A QED image as a node: the data path, and the ordered flush that makes it durable.

What a guest writes goes to the file at once; what the *tables* say changes in memory only, and
reaches the disk in `flush`, in this order, each step durable before the next:

1. all data and copied-on-write bytes, the file's new end, and in the header NEED_CHECK;
2. pages of L2 tables;
3. L1 entries of new L2 tables.

So whatever subset of a step's writes survives a crash, nothing points to what is not there: room
at the end of the file may be leaked, and that is all. NEED_CHECK is not what saves us from worse.
It is there for others, and for what others left: an image that has it is checked before it is
written (see `check`). It goes when the image is closed, or made read-only, and all is flushed.

A mapping changes in memory only after the file system has set blocks aside for what a flush will
write because of it: the page, the L1 entry, the header (`File.take_room`). So on full storage a
guest's write fails, and no flush does.

Room is only ever taken at the end of the file. A cluster that is zeroed or discarded keeps its
place, and the room goes back to the host as a hole in the file. Room that was reserved and not
needed is used for the next clusters. What is left of it when the image is closed is cut off, or,
if other clusters lie behind it, leaked with no bytes in it.

Locks: `meta` guards every table and the file's end, and is a leaf but for loading tables from the
file; no data I/O happens under it. `flushing` makes flushes take turns; it is taken before `meta`.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from cowferry.block.node import Extent, Node, State, part, read_runs, resolve
from cowferry.drivers import Common, register
from cowferry.drivers.plan import Plan
from cowferry.drivers.qed import header as headers
from cowferry.drivers.qed.tables import ZERO, Tables, bytes_of
from cowferry.drivers.result import Result
from cowferry.errors import CowferryError, ImageError, NotSupported

MAX_DIRTY = 32 << 20  # bytes of L2 pages that may wait for a flush
PIECE = 1 << 20  # bytes; of a cluster no more is in memory at once


@register("qed")
class Qed(Node):
    """A QED image. Thread-safe in the manner of `Node`."""

    class Options(Common, kw_only=True, rename="kebab"):
        """QMP: BlockdevOptionsGenericCOWFormat."""

    def __init__(self, file: Node, header: headers.Header, read_only: bool) -> None:
        self.file: Node = file
        self.filename = file.filename
        self.data_fd: int = file.fd
        self.read_only = read_only
        self.meta = threading.RLock()  # guards tables, end, whole, spare, broken
        self.flushing = threading.Lock()  # one ordered flush at a time; guards the header
        self.broken = False  # found damaged: no more writes
        self._closed = False
        self._adopt(header)

    def _adopt(self, header: headers.Header) -> None:
        """What follows from the file as it is now."""
        self.header = header
        self.size = header.size
        self.granule = self.cluster_size = header.cluster_size
        self.backing_spec = None
        if header.backing_file is not None:
            self.backing_spec = (header.backing_file, header.backing_format)
        bits = header.bits
        self.whole = self.file.size >> bits << bits  # an entry points below this
        self.end = -(-self.file.size >> bits) << bits  # new room begins here
        self.spare: list[tuple[int, int]] = []  # (host offset, clusters) taken and not needed
        self.tables = Tables(self)

    @classmethod
    def open(cls, options: Qed.Options, children: Mapping[str, Node]) -> Qed:
        """Open an image. Read-only, it writes nothing. Raises `ImageError`, `OSError`.

        Opened for writing, an image with NEED_CHECK is checked and mended, and unknown autoclear
        bits are cleared. One with damage beyond that is refused, unless it is opened to be
        mended (`repair`)."""
        if "file" not in children:
            raise CowferryError("A block device must be specified for 'file'")
        file = children["file"]
        image = cls(file, headers.parse(file), options.read_only or file.read_only)
        if not image.read_only:
            image._prepare_for_writing(options.repair)
        return image

    @classmethod
    def plan(cls, path: str, size: int, options: Mapping[str, Any]) -> Plan:
        """See `create.plan`."""
        from cowferry.drivers.qed import create

        return create.plan(path, size, options)

    def _prepare_for_writing(self, repair: bool = False) -> None:
        if self.file.is_device:
            raise ImageError(
                f"'{self.filename}' cannot grow, and a QED image takes its room at its file's end",
                "open it read-only, or convert it",
            )
        if self.header.features & headers.NEED_CHECK and repair:
            self.broken = True  # until `check` is called, and says what it does
        elif self.header.features & headers.NEED_CHECK:
            result = self.check("crash")
            self.broken = bool(result.corruptions)
            if self.broken:
                raise ImageError(
                    f"'{self.filename}' was not closed cleanly and is damaged: "
                    f"{(result.left or result.messages)[0].removeprefix('ERROR ')}",
                    "it can still be read; cowferry check says what is wrong, and with -r all "
                    "drops entries that lead nowhere",
                )
        if self.header.autoclear:
            self._write_header(replace(self.header, autoclear=0))
            self.file.flush()

    # Reading -----------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Runs as the tables have them."""
        with self.meta:
            found = self.tables.runs(offset, length)
        return iter(found)

    def read_run(self, buf: memoryview, offset: int, extent: Extent) -> None:
        """Of a file without a descriptor."""
        self.file.pread(buf, extent.host)

    def holds(self, host: int, length: int) -> bool:
        """Whether clusters can lie there: aligned, behind the header, within the file."""
        if host % self.cluster_size or host < self.header.header_bytes:
            return False
        if host + length > self.whole and self.read_only and self.data_fd >= 0:
            # somebody else may have it open, and it grows
            size = os.lseek(self.data_fd, 0, os.SEEK_END)
            self.whole = size // self.cluster_size * self.cluster_size
        return host + length <= self.whole

    # Room. Caller holds `meta` -------------------------------------------------------------

    def at_the_end(self, clusters: int) -> int:
        """Return the host offset of new clusters in a row, which have never been written.

        The file reaches over them. Raises `OSError` (EFBIG) if it may not; then nothing changed."""
        host = self.end
        end = host + clusters * self.cluster_size
        if self.file.size < end:  # all that was handed out before lies in front of this end
            self.file.resize(end)
        self.end = self.whole = end
        return host

    def _room(self, clusters: int) -> tuple[int, int, bool]:
        """(host offset, how many, whether never written) of room for `clusters` or fewer."""
        if not self.spare:
            return self.at_the_end(clusters), clusters, True
        host, count = self.spare.pop()
        if count > clusters:
            self.spare.append((host + clusters * self.cluster_size, count - clusters))
        return host, min(count, clusters), False

    def give_back(self, host: int, clusters: int) -> None:
        """Keep room that nothing points to for the next clusters."""
        with self.meta:
            self.spare.append((host, clusters))

    def _take_back(self, host: int, clusters: int) -> None:
        """As `give_back`, after a write that failed: the part of it that was written goes."""
        with suppress(OSError):
            self.file.discard(host, clusters * self.cluster_size)
        self.give_back(host, clusters)

    # Writing -----------------------------------------------------------------------------

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Caller holds `exclusive` over the clusters. Allocates, copies on write, links."""
        self._check_writable()
        for e in list(self.extents(offset, len(buf))):
            if e.state is State.DATA:
                self.file.pwrite(buf[: e.length], e.host)
            else:
                self._write_new(buf[: e.length], offset)
            buf, offset = buf[e.length :], offset + e.length
        self.bound_dirty()
        if fua:
            self.flush()

    def _write_new(self, buf: memoryview, offset: int) -> None:
        """Into clusters that have no place yet."""
        size = self.cluster_size
        while len(buf):
            within = offset % size
            clusters = 1 if within else max(len(buf) // size, 1)
            with self.meta:
                self.tables.prepare(offset // size, clusters)
                host, clusters, fresh = self._room(clusters)
            n = min(len(buf), clusters * size - within)
            try:
                if n == clusters * size:
                    self.file.pwrite(buf[:n], host)
                else:
                    self._put(offset - within, host, within, buf[:n], fresh)
            except BaseException:
                self._take_back(host, clusters)
                raise
            self._link(offset // size, clusters, host)
            buf, offset = buf[n:], offset + n

    def _link(self, cluster: int, count: int, host: int) -> None:
        """Let the tables point there, or give the room back. Raises `OSError`."""
        try:
            with self.meta:
                self.tables.link(cluster, count, host)
        except BaseException:
            self._take_back(host, count)
            raise

    def _put(self, guest: int, host: int, within: int, data: memoryview, fresh: bool) -> None:
        """A cluster at `host`: what it reads as now, with `data` at `within`.

        In a place that was never written (`fresh`), zeroes need not be."""
        size, end = self.cluster_size, within + len(data)
        old = list(resolve(self, guest, max(min(size, self.size - guest), 0)))
        start, stop = 0, size
        if fresh and all(e.state is State.ZERO for e in part(old, 0, within)):
            start = within
        if fresh and all(e.state is State.ZERO for e in part(old, end, size - end)):
            stop = end
        for at in range(start, stop, PIECE):
            view = memoryview(bytearray(min(PIECE, stop - at)))
            until = at + len(view)
            for a, b in ((at, min(until, within)), (max(at, end), until)):
                if a < b:
                    read_runs(self, part(old, a, b - a), view[a - at : b - at], guest + a)
            a, b = max(at, within), min(until, end)
            if a < b:
                view[a - at : b - at] = data[a - within : b - within]
            self.file.pwrite(view, host + at)

    # Zeroes ------------------------------------------------------------------------------

    def zero(self, offset: int, length: int, unmap: bool = False, fast: bool = False) -> None:
        """Where bytes have a place, there; else by zero clusters, the parts of some by writing."""
        self._check_writable()
        runs = list(self.extents(offset, length))
        at = offset
        for e in runs:  # first, because it is here that `fast` may fail
            if e.state is State.DATA:
                self.file.zero(e.host, e.length, unmap, fast)
        for e in runs:
            if e.state is State.HOLE:
                self._zero_hole(at, at + e.length)
            at += e.length
        self.bound_dirty()

    def _zero_hole(self, start: int, end: int) -> None:
        first, last = self._whole_clusters(start, end)
        if first >= last:
            return self._zero_part(start, end)
        self._zero_part(start, first * self.cluster_size)
        if self._has_below():
            with self.meta:
                self.tables.fill(first, last - first, ZERO)
        self._zero_part(last * self.cluster_size, end)

    def _zero_part(self, start: int, end: int) -> None:
        """Less than two clusters without a place."""
        while start < end:
            n = min(end - start, PIECE, self.cluster_size - start % self.cluster_size)
            if any(e.state is not State.ZERO for e in resolve(self, start, n)):
                self.pwrite(memoryview(bytes(n)), start)
            start += n

    def _whole_clusters(self, start: int, end: int) -> tuple[int, int]:
        """[first, last) of the clusters that the range covers; the last of a disk is whole."""
        size = self.cluster_size
        return -(-start // size), -(-end // size) if end == self.size else end // size

    def _has_below(self) -> bool:
        """Whether a hole may show something, now or when the image is opened with its backing."""
        return self.backing is not None or self.backing_spec is not None

    def discard(self, offset: int, length: int) -> None:
        """What has a place becomes a hole in the file; a hole never shows the backing (ST4)."""
        self._check_writable()
        for e in list(self.extents(offset, length)):
            first, last = self._whole_clusters(offset, offset + e.length)
            if e.state is State.DATA:
                self.file.discard(e.host, e.length)
            elif e.state is State.HOLE and first < last and self._has_below():
                with self.meta:
                    self.tables.fill(first, last - first, ZERO)
            offset += e.length
        self.bound_dirty()

    # Room first, mapping later -----------------------------------------------------------

    def reserve(self, offset: int, length: int) -> list[Extent] | None:
        """Clusters that no table points to; a crash leaks them."""
        self._check_writable()
        if self.data_fd < 0:
            return None
        out: list[Extent] = []
        with self.meta:
            # So that `link` does not fail for lack of room when the bytes have been written.
            self.tables.prepare(offset // self.cluster_size, -(-length // self.cluster_size))
            while length > 0:
                host, count, _ = self._room(-(-length // self.cluster_size))
                n = min(count * self.cluster_size, length)
                out.append(Extent(n, State.DATA, self.data_fd, host, True))
                length -= n
        return out

    def link(self, offset: int, room: Extent) -> None:
        """Point guest clusters at room whose bytes are written. Under `exclusive`."""
        size = self.cluster_size
        clusters = -(-room.length // size)
        tail = clusters * size - room.length
        if tail:  # the disk's last cluster: beyond the end it holds zeroes, too
            self.file.zero(room.host + room.length, tail)
        with self.meta:
            self.tables.link(offset // size, clusters, room.host)
        self.bound_dirty()

    def unreserve(self, room: Extent) -> None:
        """Room that was not needed."""
        self.give_back(room.host, -(-room.length // self.cluster_size))

    # Durability --------------------------------------------------------------------------

    @property
    def unflushed(self) -> bool:
        """Whether tables in memory differ from those on disk."""
        return bool(self.tables.dirty or self.tables.l1_dirty)

    def flush(self) -> None:
        """The ordered flush. Flushes that arrive while one runs share the next."""
        if self.read_only:
            return
        with self.flushing:
            if self.unflushed:
                self._write_tables()
            else:
                self.file.flush()

    def _write_tables(self) -> None:
        tables = self.tables
        with self.meta:  # one moment's picture of all tables
            pages = [(tables.place(p), bytes_of(tables.pages[p])) for p in sorted(tables.dirty)]
            roots = [
                (self.header.l1_offset + 8 * i, struct.pack("<Q", tables.l1[i]))
                for i in sorted(tables.l1_dirty)
            ]
            was = tables.dirty, tables.l1_dirty
            tables.dirty, tables.l1_dirty = set(), set()
            tables.writing = was[0]  # not to be read again from the file before it is there
        try:
            if not self.header.features & headers.NEED_CHECK:
                marked = replace(self.header, features=self.header.features | headers.NEED_CHECK)
                self._write(0, marked.packed())
                self.file.flush()
                self.header = marked
            else:
                self.file.flush()
            for step in (pages, roots):
                for offset, data in step:
                    self._write(offset, data)
                if step:
                    self.file.flush()
        except BaseException:
            with self.meta:  # nothing is forgotten: the next flush, if one can, writes it all
                tables.dirty |= was[0]
                tables.l1_dirty |= was[1]
            raise
        finally:
            with self.meta:
                tables.writing = set()

    def _write(self, offset: int, data: bytes) -> None:
        self.file.pwrite(memoryview(data), offset)

    def _write_header(self, header: headers.Header) -> None:
        """The next barrier makes it durable. No name may have changed."""
        self._write(0, header.packed())
        self.header = header

    def take_room_for_header(self) -> None:
        """Blocks for NEED_CHECK, which the next flush sets. Raises `OSError`."""
        if not self.header.features & headers.NEED_CHECK:
            self.file.take_room(0, headers.LAYOUT.size)

    def bound_dirty(self) -> None:
        """Flush if too much waits for it."""
        if len(self.tables.dirty) * self.tables.page_bytes > MAX_DIRTY:
            self.flush()

    @property
    def crowded(self) -> bool:
        """Whether half as much waits for a flush as may."""
        return len(self.tables.dirty) * self.tables.page_bytes > MAX_DIRTY // 2

    def mark_clean(self) -> None:
        """All is flushed, and then the header says so. Of a damaged image it says nothing."""
        self.flush()
        with self.flushing, self.meta:
            self._cut()
            if self.header.features & headers.NEED_CHECK and not self.broken:
                features = self.header.features & ~headers.NEED_CHECK
                self._write_header(replace(self.header, features=features))
            self.file.flush()

    def _cut(self) -> None:
        """Room that nobody needed is given back to the host; elsewhere than at the end it leaks."""
        end = self.end
        for host, clusters in sorted(self.spare, reverse=True):
            length = clusters * self.cluster_size
            if host + length == end:
                end = host
            else:
                self.file.discard(host, length)
        self.spare.clear()
        if end < self.file.size:
            self.cut_off(end)

    def cut_off(self, end: int) -> None:
        """The file ends there: nothing beyond is used. Caller holds `meta`."""
        self.file.resize(end)
        self.end = self.whole = end

    # The image as a whole ----------------------------------------------------------------

    def check_backing(self, filename: str, format: str | None) -> None:
        """A header has one bit for the format: see `header`."""
        headers.with_backing(self.header, filename, format)

    def set_backing(self, filename: str | None, format: str | None) -> None:
        """Record another backing file, or none, so that a tear leaves the old or the new (Q6)."""
        self._check_writable()
        with self.flushing, self.meta:
            changed, name = headers.with_backing(self.header, filename, format)
            sector = changed.packed()
            if changed.name_offset == headers.LAYOUT.size:
                sector += name
            elif name:
                self._write(changed.name_offset, name)
                self.file.flush()
            self._write(0, sector)
            self.file.flush()
            self.header = changed
            self.backing_spec = (filename, changed.backing_format) if filename else None

    def resize(self, size: int) -> None:
        """Grow, to a multiple of 512 bytes. What is new reads as zero before the header has it."""
        self._check_writable()
        size = -(-size // headers.SECTOR) * headers.SECTOR
        if size < self.size:
            raise NotSupported(
                f"'{self.filename}': a QED image cannot be made smaller",
                "convert it into a new, smaller image; nothing was changed",
            )
        if size > self.header.max_size:
            raise CowferryError(
                f"'{self.filename}': its tables can map {self.header.max_size} bytes, not {size}",
                "convert it with larger clusters or tables (-o cluster_size=1M,table_size=16)",
            )
        if size == self.size:
            return
        old = self.size
        old_clusters, new_clusters = -(-old // self.cluster_size), -(-size // self.cluster_size)
        within = old % self.cluster_size
        below = min(self.backing.size if self.backing is not None else 0, size)
        if within:  # what its last cluster holds beyond the end becomes visible
            (last,) = self.extents(old - 1, 1)
            tail = self.cluster_size - within
            if last.state is State.DATA:
                self.file.zero(last.host + 1, tail)
            elif last.state is State.HOLE and below > old:
                self._write_new(memoryview(bytes(tail)), old)
        with self.meta:
            self.tables.grow(old_clusters, new_clusters)
            if below > old_clusters * self.cluster_size:  # or the backing file's bytes would show
                count = -(-below // self.cluster_size) - old_clusters
                self.tables.fill(old_clusters, count, ZERO)
        self.flush()
        with self.flushing, self.meta:
            self._write_header(replace(self.header, size=size))
            self.file.flush()
            self.size = size

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, f"{self.filename} is open read-only")
        if self.broken:
            raise OSError(errno.EIO, f"{self.filename}: damaged metadata was found; not writing")

    @property
    def writable(self) -> bool:
        """Whether bytes may be overwritten in place."""
        return not (self.read_only or self.broken)

    def damaged(self, what: str) -> OSError:
        """Note damage: the image takes no more writes. Returns the error."""
        self.broken = self.broken or not self.read_only
        return OSError(errno.EIO, f"{self.filename}: damaged image: {what} (see: cowferry check)")

    @property
    def geometry(self) -> dict[str, int]:
        """Options that make an image with tables like ours."""
        return {"cluster_size": self.cluster_size, "table_size": self.header.table_size}

    @property
    def dirty_flag(self) -> bool:
        """Whether the header says NEED_CHECK."""
        return bool(self.header.features & headers.NEED_CHECK)

    def check(self, fix: Literal["crash", "leaks", "all"] | None = None) -> Result:
        """See `check.check`."""
        from cowferry.drivers.qed.check import check

        return check(self, fix)

    def reopen(self, read_only: bool) -> None:
        """Change access. Made writable, an image is prepared as if it were opened so."""
        if read_only == self.read_only:
            return
        if read_only:
            self.mark_clean()
            if self.keeper is not None:
                self.keeper.rest()
        try:
            self.file.reopen(read_only)  # a node that was lent has no other writer
        except BaseException:
            if read_only and self.keeper is not None:
                self.keeper.resume()
            raise
        self.read_only = read_only
        if read_only:
            return
        try:
            with self.meta:
                self._adopt(headers.parse(self.file))
            self._prepare_for_writing()
            if self.keeper is not None:
                self.keeper.resume()
        except BaseException:
            self.read_only = True
            self.file.reopen(True)
            raise

    def close(self) -> None:
        """Flush what waits, mark clean, and let the file go."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only:
                self.mark_clean()
                if self.keeper is not None:
                    self.keeper.rest()
        finally:
            if "file" not in self.lent:
                self.file.close()
