"""A qcow2 image as a node: the data path, and the image as a whole.

What a guest writes goes to the file at once; what the *tables* say changes in memory only, and
reaches the disk in an ordered flush (`flush.py`). The cost is a bound on what may wait: the daemon
flushes every few seconds, and so does an image with many dirty tables.

Locks: `meta` guards every table, and is a leaf but for loading tables from the file; no data
I/O happens under it. `flushing` makes flushes take turns; it is taken before `meta`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, TypeVar

from cowferry.block.bitmap import Bitmap
from cowferry.block.node import ZEROES, Extent, Node, State, part, read_runs, resolve
from cowferry.drivers import register
from cowferry.drivers.plan import Plan
from cowferry.drivers.qcow2 import bitmaps as store
from cowferry.drivers.qcow2 import changes, flush, metadata, snapshots, stamp
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.clusters import (
    ALL,
    COMPRESSED,
    COPIED,
    SUBCLUSTERS,
    ZERO_FLAG,
    Map,
)
from cowferry.drivers.qcow2.compressed import Pieces
from cowferry.drivers.qcow2.options import Qcow2Options
from cowferry.drivers.qcow2.refcounts import OFFSET, Refcounts
from cowferry.drivers.qcow2.survey import Survey
from cowferry.errors import CowferryError, ImageError

MAX_DIRTY = 32 << 20  # bytes of L2 tables that may wait for a flush
MAX_PENDING = 32 << 20  # bytes that were let go of and may wait for a flush; or an eighth of all
PUNCH = 16 << 20  # bytes given back to the file system at once

T = TypeVar("T")


@register("qcow2")
class Qcow2(Node):
    """A qcow2 image. Thread-safe in the manner of `Node`."""

    Options = Qcow2Options

    passes_discard = True  # clusters that are let go of are given back to the host
    INFO_TYPES: ClassVar[dict[int, str]] = {0: "zlib", 1: "zstd"}

    def __init__(
        self,
        file: Node,
        data: Node | None,
        header: headers.Header,
        read_only: bool,
        checking: bool = False,
    ) -> None:
        self.file: Node = file
        self.filename = file.filename
        self.header = header
        self.external = data is not None
        self.data = data or file
        self.data_fd: int = getattr(self.data, "fd", -1)
        self.on_device: bool = file.is_device
        self.size = header.size // headers.SECTOR * headers.SECTOR  # as QEMU has it
        self.granule = self.cluster_size = header.cluster_size
        self.read_only = read_only
        if header.backing_file is not None:
            self.backing_spec = (header.backing_file, header.backing_format)
        self.meta = threading.RLock()  # guards map, refcounts, metadata, header, broken
        self.flushing = threading.Lock()  # one ordered flush at a time
        self.metadata: set[int] = {0}  # host clusters that hold tables
        self.bitmap_clusters: set[int] = set()  # of them, those of stored bitmaps
        self.unkept = False  # stored bitmaps should know of writes, and nobody sees to it
        self.stores_bitmaps = self.stamps = header.version >= 3
        self.checking = checking  # opened to be checked, and perhaps repaired: it serves no bytes
        self.broken = checking  # found damaged: no more writes (Q4)
        self._closed = False
        self.snapshots: list[snapshots.Snapshot] = []
        if not checking:  # no table is believed before `check` has seen it
            self.snapshots = snapshots.read(self)
            self._load_tables()

    @classmethod
    def open(cls, options: Qcow2Options, children: Mapping[str, Node]) -> Qcow2:
        """Open an image. Read-only, it writes nothing. Raises `ImageError`, `OSError`.

        Opened for writing, an image that was not closed cleanly has its refcounts repaired
        (Q3), unknown autoclear bits are cleared (Q5), and one marked corrupt is refused (Q4).
        Opened for `repair` nothing is changed before `check` is called, and damaged tables are no
        reason to refuse an image; but the disk takes no writes."""
        if "file" not in children:
            raise CowferryError("A block device must be specified for 'file'")
        file = children["file"]
        read_only = options.read_only or file.read_only
        header = cls._header(file, options.repair)
        data = children.get("data-file")
        if header.incompatible & headers.DATA_FILE and data is None:
            raise ImageError(
                f"'{file.filename}' keeps its data in another file "
                f"('{header.data_file or 'unnamed'}')",
                "it is not beside the image; name it with the option data-file",
            )
        if data is not None and not header.incompatible & headers.DATA_FILE:
            raise ImageError(
                f"'{file.filename}': 'data-file' can only be set for an image with one"
            )
        if not (read_only or options.repair) and header.incompatible & headers.CORRUPT:
            raise ImageError(
                f"'{file.filename}' is marked corrupt; it cannot be opened for writing",
                "it can still be read; repair it with: cowferry check -r all",
            )
        if options.lazy_refcounts and header.version < 3:
            raise ImageError(
                f"'{file.filename}': lazy refcounts require an image of version 3 (compat=1.1)",
                "leave lazy-refcounts out",
            )
        options.check_caches(header.cluster_size)
        image = cls(file, data, header, read_only, options.repair)
        image.passes_discard = options.pass_discard_request
        cache_size = options.l2_cache_size or options.cache_size
        if cache_size is not None:
            image.map.keep = max(cache_size >> header.cluster_bits, 4)
        if not (read_only or options.repair):
            image._prepare_for_writing()
        return image

    @classmethod
    def _header(cls, file: Node, checking: bool = False) -> headers.Header:
        start = bytearray(min(file.size, headers.SECTOR))
        file.pread(memoryview(start), 0)
        start = bytearray(min(file.size, headers.first_cluster(bytes(start))))
        file.pread(memoryview(start), 0)
        return headers.parse(file.filename, bytes(start), file.size, checking)

    @classmethod
    def companions(cls, children: Mapping[str, Node]) -> Mapping[str, str]:
        """The external data file, if there is one and the header names it."""
        if "file" not in children or "data-file" in children:
            return {}
        header = cls._header(children["file"], checking=True)
        if not header.incompatible & headers.DATA_FILE:
            return {}
        return {"data-file": header.data_file or ""}  # it may have no name

    @classmethod
    def plan(cls, path: str, size: int, options: Mapping[str, Any]) -> Plan:
        """See `create.plan`."""
        from cowferry.drivers.qcow2 import create

        return create.plan(path, size, options)

    def _prepare_for_writing(self) -> None:
        h = self.header
        if h.incompatible & headers.DIRTY:
            result = self.check("all")
            if result.corruptions or result.check_errors:
                why = next(m for m in (*result.left, *result.messages) if m.startswith("ERROR"))
                raise ImageError(
                    f"'{self.filename}' was not closed cleanly, and its damage cannot be repaired: "
                    f"{why.removeprefix('ERROR ')}",
                    "it can still be read, and converted; cowferry check says what is wrong",
                )
        kept = store.prepare(self) | headers.DATA_FILE_RAW
        if h.autoclear & ~kept:
            h.autoclear &= kept
            self.write_header()

    def reload(self) -> None:
        """Read the tables again, because `check` changed them in the file. Raises `OSError`, and
        `ImageError` if they cannot be used."""
        with self.meta:
            self.snapshots = snapshots.scan(self).snapshots
            self._load_tables()

    def _load_tables(self) -> None:
        """Read the L1 and refcount tables, and note where tables lie. Raises `OSError`."""
        self.map = Map(self)
        self.refcounts = Refcounts(self)
        self.pieces = Pieces(self)
        self.survey = Survey(self)  # guarded by `meta`
        self.inactive_tables: set[int] = set()  # host offsets of the L2 tables of snapshots
        self.overlap = ""  # the place that two tables share, in words: then nothing is written
        metadata.note(self)

    # Reading -----------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Runs as the cluster map has them; compressed clusters have no place."""
        if self.checking:
            raise OSError(errno.EPERM, f"{self.filename} is open to be checked, not to be read")
        with self.meta:
            found = self.map.runs(offset, length)
        return iter(found)

    def kept_places(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(length, host offset or 0) of the pieces of a run of zeroes."""
        with self.meta:
            return iter(list(self.map.kept_places(offset, length)))

    def read_run(self, buf: memoryview, offset: int, extent: Extent) -> None:
        """Decompress as many clusters as the run touches; or ask a file without a descriptor."""
        if not extent.compressed:
            self.data.pread(buf, extent.host)
            return
        self.pieces.read(buf, offset)

    # Writing -----------------------------------------------------------------------------

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Caller holds `exclusive` over the clusters. Allocates, copies on write, links.

        Raises `OSError`; then the clusters before some point are written and the others are not."""
        self._change()
        size = self.cluster_size
        while len(buf):
            cluster, within = divmod(offset, size)
            n = 0
            if not within and len(buf) >= size:
                n = self._with_room(partial(self._write_whole, cluster, buf))
            if not n:
                n = min(len(buf), size - within)
                self._with_room(partial(self._write_part, cluster, within, buf[:n]))
            buf, offset = buf[n:], offset + n
        self._bound_dirty()
        if fua:
            self.flush()

    def _with_room(self, work: Callable[[], T]) -> T:
        """See `flush.with_room`."""
        return flush.with_room(self, work)

    def _write_whole(self, cluster: int, buf: memoryview) -> int:
        """Write whole clusters that need a new place, as many as lie in a row. 0: none does."""
        want = len(buf) // self.cluster_size
        with self.meta:
            count = 0
            while count < want and not self._in_place(*self.map.entry(cluster + count)):
                count += 1
            if not count:
                return 0
            first, count = self._room(cluster, count)
        host = first << self.header.cluster_bits
        try:
            self.data.pwrite(buf[: count * self.cluster_size], host)
            with self.meta:
                self.map.link(cluster, count, host)
        except BaseException:
            self._give_back(first, count)
            raise
        return count * self.cluster_size

    def _write_part(self, cluster: int, within: int, data: memoryview) -> None:
        """Write inside one cluster, filling the rest of what must be filled from below."""
        size = self.cluster_size
        sub = size // SUBCLUSTERS
        extended = self.map.words == 2
        with self.meta:
            entry, bitmap = self.map.entry(cluster)
            ours = self._in_place(entry, bitmap)
            fresh = False
            if ours:
                first = (entry & OFFSET) // size
            else:
                # Beyond what was ever handed out and the file's first end nothing was written.
                # (The file's size would not tell: reserved room is filled behind its back.)
                untouched = self.refcounts.untouched
                first, _ = self._room(cluster, 1)
                fresh = first >= untouched and not self.external
        host = first * size
        first_sub, last_sub = within // sub, (within + len(data) - 1) // sub
        touched = ((1 << (last_sub + 1)) - 1) & ~((1 << first_sub) - 1)
        whole = not extended and (entry & ZERO_FLAG or not ours)
        if ours and not whole and (not extended or bitmap & touched == touched):
            self.data.pwrite(data, host + within)
            return
        if extended and (ours or not entry & (OFFSET | COMPRESSED)):
            start, stop = first_sub * sub, (last_sub + 1) * sub
            alloc = (bitmap | touched) & ALL
            zero = (bitmap >> SUBCLUSTERS) & ~touched
            new_bitmap = zero << SUBCLUSTERS | alloc
        else:
            start, stop, new_bitmap = 0, size, ALL
        try:
            self._put(cluster * size, host, start, stop, within, data, fresh)
            with self.meta:
                self.map.set(cluster, host | COPIED, new_bitmap)
        except BaseException:
            if self.external or not ours:
                self._give_back(first, 1)
            raise

    def _put(
        self,
        guest: int,
        host: int,
        start: int,
        stop: int,
        within: int,
        data: memoryview,
        fresh: bool,
    ) -> None:
        """Bytes `start..stop` of a cluster: the old ones, with `data` at `within`.

        In a place that was never written (`fresh`), zeroes need not be."""
        end = within + len(data)
        old = list(resolve(self, guest + start, max(min(stop, self.size - guest) - start, 0)))
        head = list(part(old, 0, within - start))
        tail = list(part(old, end - start, stop - end))  # the disk may end before the cluster
        if fresh and all(e.state is State.ZERO for e in head):
            start = within
        if fresh and all(e.state is State.ZERO for e in tail):
            stop = end
        if start == within and stop == end:
            self.data.pwrite(data, host + within)
            return
        view = memoryview(bytearray(stop - start))
        if start < within:
            read_runs(self, head, view[: within - start], guest + start)
        if end < stop:
            read_runs(self, tail, view[end - start :], guest + end)
        view[within - start : end - start] = data
        self.data.pwrite(view, host + start)

    def _reads_zero(self, offset: int, length: int) -> bool:
        length = min(length, self.size - offset)
        return length <= 0 or all(e.state is State.ZERO for e in resolve(self, offset, length))

    def _in_place(self, entry: int, bitmap: int) -> bool:
        """Whether the cluster has a place of its own that may be written. Caller holds `meta`.

        Raises EIO, and the image is marked corrupt, if that place holds a table."""
        if not entry & COPIED or entry & COMPRESSED:
            return False
        if self.external:
            return True
        found = self.map.host_clusters(entry)
        return bool(found) and self.map.ours(found[0], 1)

    def _room(self, cluster: int, count: int) -> tuple[int, int]:
        """(first host cluster, how many) for new data of guest `cluster`. Caller holds `meta`.

        The tables that are to point there have their room, too, so that a flush finds it."""
        if self.external:
            self.map.prepare(cluster, count)
            return cluster, count  # an external data file is laid out like the disk
        first, got = self.refcounts.allocate(count)
        try:
            self.map.prepare(cluster, got)
        except BaseException:
            self.refcounts.settle([(first, got)])
            raise
        return first, got

    def _give_back(self, first: int, count: int) -> None:
        """Room that nothing on disk or in memory points to goes back at once, its bytes too."""
        if self.external:
            return self._blank_again(first, count)
        with self.meta:
            self._punch(self.refcounts.settle([(first, count)]))

    def _blank_again(self, first: int, count: int) -> None:
        """After a write that failed: let an external data file read as zero where the image does,
        if it has to read right by itself."""
        if not self.header.autoclear & headers.DATA_FILE_RAW:
            return
        at, end = first * self.cluster_size, min((first + count) * self.cluster_size, self.size)
        with contextlib.suppress(OSError):
            for e in self.extents(at, end - at):
                if e.state is not State.DATA:
                    self.data.zero(at, e.length, unmap=True)
                at += e.length

    def take_room(self, offset: int, length: int) -> None:
        """Have room in the file system for bytes of the image's own file. Raises `OSError`."""
        self.file.take_room(offset, length)

    # Zeroes ------------------------------------------------------------------------------

    def zero(self, offset: int, length: int, unmap: bool = False, fast: bool = False) -> None:
        """Zero clusters where the version has them; else zero bytes, unless `fast`."""
        self._change()
        size, end = self.cluster_size, offset + length
        flags = self.header.version >= 3
        if fast and not flags and self.backing is not None:
            raise OSError(errno.EOPNOTSUPP, f"{self.filename}: version 2 has no zero clusters")
        first = -(-offset // size)
        last = -(-end // size) if end == self.size else end // size
        if first >= last or (not flags and self.backing is not None) or self.external:
            return self._zero_bytes(offset, end, unmap)
        if offset < first * size:
            self._zero_bytes(offset, first * size, unmap)
        while first < last:
            first += self._with_room(
                partial(self._zero_clusters, first, last - first, unmap, flags)
            )
        if last * size < end:
            self._zero_bytes(last * size, end, unmap)
        self._bound_dirty()

    def _zero_clusters(self, cluster: int, count: int, unmap: bool, flags: bool) -> int:
        """Zero a few whole clusters; returns how many."""
        index, slot = divmod(cluster, self.map.per_table)
        count = min(count, self.map.per_table - slot)
        with self.meta:
            if self.map.table(index) is None and self.backing is None:
                return count  # nothing there, nothing below
            for c in range(cluster, cluster + count):
                entry, bitmap = self.map.entry(c)
                if not entry and not bitmap and self.backing is None:
                    continue
                keep = entry & ~ZERO_FLAG if not unmap and self._in_place(entry, bitmap) else 0
                if self.map.words == 2:
                    self.map.set(c, keep, ALL << SUBCLUSTERS)
                else:
                    self.map.set(c, keep | ZERO_FLAG if flags else 0)
        return count

    def zero_in_place(self, cluster: int, count: int) -> None:
        """Let clusters that have a place read as zeroes, and keep the place, which may hold other
        bytes. For version 3."""
        with self.meta:
            while count:
                n = self._zero_clusters(cluster, count, unmap=False, flags=True)
                cluster, count = cluster + n, count - n

    def _zero_bytes(self, offset: int, end: int, unmap: bool) -> None:
        while offset < end:
            n = min(end - offset, len(ZEROES), self.cluster_size - offset % self.cluster_size)
            if self.external:
                self._zero_external(offset, n, unmap)
            elif not self._reads_zero(offset, n):
                self.pwrite(memoryview(ZEROES)[:n], offset)
            offset += n

    def _zero_external(self, offset: int, length: int, unmap: bool) -> None:
        """Zero a part of one cluster whose data is in an external file.

        Where the cluster has its place, the bytes there become zeroes, and nothing else is told.
        With data_file_raw this is so everywhere: the file has to read right by itself."""
        cluster, within = divmod(offset, self.cluster_size)
        with self.meta:
            entry, bitmap = self.map.entry(cluster)
        in_place = self._in_place(entry, bitmap) and not entry & ZERO_FLAG and bitmap in (0, ALL)
        blank = not in_place and self._reads_zero(offset, length)
        if in_place or (blank and self.header.autoclear & headers.DATA_FILE_RAW):
            self.data.zero(offset, length, unmap)
        elif not blank:
            self._write_part(cluster, within, memoryview(ZEROES)[:length])

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters become holes that read as zero, never as the backing (ST4)."""
        self._change()
        size, end = self.cluster_size, offset + length
        if self.external:
            return self.zero(offset, length, unmap=True)
        first = -(-offset // size)
        last = -(-end // size) if end == self.size else end // size
        flags = self.header.version >= 3
        if first >= last or (not flags and self.backing is not None):
            return None
        while first < last:
            first += self._with_room(partial(self._zero_clusters, first, last - first, True, flags))
        self._bound_dirty()
        return None

    # Room first, mapping later -----------------------------------------------------------

    def reserve(self, offset: int, length: int) -> list[Extent] | None:
        """Clusters with a refcount that no table points to; a crash leaks them (Q2)."""
        self._change()
        if self.external or self.data_fd < 0:
            return None
        return self._with_room(partial(self._reserve, offset, length))

    def _reserve(self, offset: int, length: int) -> list[Extent]:
        size, bits = self.cluster_size, self.header.cluster_bits
        clusters = -(-length // size)
        out: list[Extent] = []
        with self.meta:
            try:
                self.map.prepare(offset // size, clusters)
                while clusters:
                    first, count = self.refcounts.allocate(clusters)
                    clusters -= count
                    n = min(count * size, length)
                    out.append(Extent(n, State.DATA, self.data_fd, first * size, True))
                    length -= n
                end = max(e.host + e.length for e in out)
                if not self.on_device and self.file.size < end:
                    # What is linked lies in the file, also where the job leaves a hole.
                    self.file.resize(-(-end >> bits) << bits)
            except BaseException:
                self.refcounts.settle([(e.host // size, -(-e.length // size)) for e in out])
                raise
        return out

    def link(self, offset: int, room: Extent) -> None:
        """Point guest clusters at room whose bytes are written. Under `exclusive`."""
        size = self.cluster_size
        if room.compressed:
            self.pieces.link(offset // size, room)
            return self._bound_dirty()
        if room.length % size:  # the disk's last cluster: beyond the end it holds zeroes, too
            tail = size - room.length % size
            at = room.host + room.length
            while tail:
                n = min(tail, len(ZEROES))
                self.data.pwrite(memoryview(ZEROES)[:n], at)
                at, tail = at + n, tail - n
        with self.meta:
            self.map.link(offset // size, -(-room.length // size), room.host)
        return self._bound_dirty()

    def unreserve(self, room: Extent) -> None:
        """Room that was not needed."""
        if room.compressed:
            return self.pieces.release(room)
        size = self.cluster_size
        return self._give_back(room.host // size, -(-room.length // size))

    def check_compression(self) -> None:
        """See `Node` and `compressed`."""
        self.pieces.check()

    def compress(self, buf: memoryview) -> list[Extent | None]:
        """See `Node` and `compressed`."""
        self._change()
        return self._with_room(partial(self.pieces.write, buf))

    # Durability --------------------------------------------------------------------------

    @property
    def unflushed(self) -> bool:
        """Whether tables in memory differ from those on disk."""
        return bool(self.map.dirty or self.map.l1_dirty)

    def flush(self) -> None:
        """The ordered flush. Flushes that arrive while one runs share the next."""
        if self.read_only:
            return
        with self.flushing:
            with self.meta:
                nothing = not (self.map.dirty or self.map.l1_dirty or self.refcounts.pending)
            if nothing:
                self._barrier()
                return
            self._write_tables()

    def _barrier(self) -> None:
        self.file.flush()
        if self.external:
            self.data.flush()

    def _write_tables(self) -> None:
        """The ordered flush. Caller holds `flushing`."""
        flush.write_tables(self)

    def _write(self, offset: int, data: bytes) -> None:
        self.file.pwrite(memoryview(data), offset)

    def _punch(self, free: list[tuple[int, int]]) -> None:
        """Room goes back to the file system, unless somebody has taken it again."""
        if not self.passes_discard:
            return
        bits = self.header.cluster_bits
        punch = getattr(self.file, "punch", None)
        step = max(PUNCH >> bits, 1)  # others wait for the lock meanwhile
        pieces = ((a, min(step, f + n - a)) for f, n in free for a in range(f, f + n, step))
        for first, count in pieces:
            with self.meta:
                idle = all(self.refcounts.get(c) == 0 for c in range(first, first + count))
                if punch is not None and idle:
                    # under the lock, or a new owner's bytes might be the ones to go
                    punch(first << bits, count << bits)

    def _bound_dirty(self) -> None:
        """Flush before too much waits for it: tables in memory, or room that is to be reused."""
        if self._waits(1):
            self.flush()

    def _waits(self, part: int) -> bool:
        """Whether more waits for a flush than a `part`-th of what may."""
        refs, bits = self.refcounts, self.header.cluster_bits
        dirty, pending = part * len(self.map.dirty) << bits, part * refs.pending_clusters
        return dirty > MAX_DIRTY or (pending << bits > MAX_PENDING and pending > refs.end >> 3)

    @property
    def crowded(self) -> bool:
        """Whether half as much waits for a flush as may."""
        return self._waits(2)

    def write_header(self) -> None:
        """Sector 0 as `header` says, then a barrier (Q6). No name may have changed."""
        h = self.header
        self._write(0, headers.layout(h, h.backing_offset)[: headers.SECTOR])
        self.file.flush()

    def set_backing(self, filename: str | None, format: str | None) -> None:
        """Record another backing file, or none, so that a tear leaves the old or the new (Q6)."""
        self._writable()
        changes.record_backing(self, filename, format)

    def resize(self, size: int) -> None:
        """Grow. The new L1 table is durable before the header names it."""
        self._writable()
        changes.grow(self, size)

    # Dirty bitmaps -----------------------------------------------------------------------

    def read_bitmaps(self) -> list[Bitmap]:
        """See `Node` and `bitmaps`."""
        return store.read(self)

    def write_bitmaps(self, bitmaps: list[Bitmap], token: bytes = b"") -> None:
        """In new clusters, and one write of sector 0; or in place, if only flags change."""
        self._writable()
        store.write(self, bitmaps, token)

    def bitmap_token(self) -> bytes:
        """What `write_bitmaps` left, if the autoclear bit beside it is still there."""
        return store.token(self)

    def read_stamp(self) -> tuple[bytes, bool]:
        return stamp.read(self)

    def write_stamp(self, data: bytes) -> None:
        self._writable()
        stamp.write(self, data)

    # The image as a whole ----------------------------------------------------------------

    def _writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, f"{self.filename} is open read-only")
        if self.checking:
            raise OSError(errno.EPERM, f"{self.filename} is open to be checked; not writing")
        if self.overlap and not self.broken:
            raise self.damaged(self.overlap)
        if self.broken:
            raise OSError(errno.EIO, f"{self.filename}: damaged metadata was found; not writing")

    def _change(self) -> None:
        """Bytes of the disk are about to change."""
        self._writable()
        if self.unkept and self.keeper is not None:
            self.keeper.wake()
        if self.unkept:
            store.give_up(self)

    @property
    def leasable(self) -> bool:
        """Whether clusters may be written in place, without asking us."""
        return not (self.read_only or self.unkept)

    def check_overlap(self, first: int, count: int) -> None:
        """Room about to be handed out must not hold a table, whatever the refcounts say (Q4)."""
        clusters = range(first, first + count)
        if not self.metadata.isdisjoint(clusters):
            cluster = min(self.metadata.intersection(clusters))
            raise self.damaged(
                f"the table at host offset {cluster * self.cluster_size:#x} is counted as free"
            )

    def damaged(self, what: str) -> OSError:
        """Note damage: the image is marked corrupt and takes no more writes. Returns the error."""
        if not self.read_only and not self.broken:
            self.broken = True
            if self.header.version >= 3:
                self.header.incompatible |= headers.CORRUPT
                with contextlib.suppress(OSError):  # without the mark it is found again
                    self.write_header()
        return OSError(errno.EIO, f"{self.filename}: damaged image: {what} (see: cowferry check)")

    @cached_property
    def preallocated(self) -> bool:
        """Whether many clusters had a place but no room in the file when first asked.

        QEMU's measure: a tenth, and at least two, more clusters are counted than occupied."""
        if self.data_fd < 0 or self.data.is_device:
            return False  # a device has bytes for every place
        occupied = -(-os.fstat(self.data_fd).st_blocks * 512 // self.cluster_size)
        enough = max(occupied * 10 // 9, occupied + 2)
        counted = 0
        for index in self.refcounts.filled_blocks():
            with self.meta:  # for a moment only: guests need it, too
                counted += self.refcounts.used(index)
            if counted >= enough:
                return True
        return False

    @property
    def dirty_flag(self) -> bool:
        """Whether the header says that refcounts may be out of date."""
        return bool(self.header.incompatible & headers.DIRTY)

    def info(self) -> dict[str, Any]:
        """qemu-img's format-specific data."""
        h = self.header
        if h.version == 2:
            return {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
        out: dict[str, Any] = {
            "compat": "1.1",
            "compression-type": self.INFO_TYPES[h.compression_type],
            "lazy-refcounts": bool(h.compatible & headers.LAZY_REFCOUNTS),
            **({"bitmaps": bitmaps} if (bitmaps := store.info(self)) else {}),
            "refcount-bits": 1 << h.refcount_order,
            "corrupt": bool(h.incompatible & headers.CORRUPT),
            "extended-l2": h.extended_l2,
        }
        if h.incompatible & headers.DATA_FILE:
            if h.data_file is not None:
                out["data-file"] = h.data_file
            out["data-file-raw"] = bool(h.autoclear & headers.DATA_FILE_RAW)
        return out

    def check(self, fix: Literal["leaks", "all"] | None = None) -> Any:
        """See `check.check`."""
        from cowferry.drivers.qcow2.check import check

        return check(self, fix)

    def close_tables(self) -> None:
        """Flush, and write the refcounts of what was freed, too: nothing is leaked."""
        self.flush()
        with self.flushing, self.meta:
            if self.refcounts.dirty or self.refcounts.new:
                # an entry added for a repair is linked by the ordered flush
                self._write_tables()
            self._barrier()

    def reopen(self, read_only: bool) -> None:
        """Change access. Made writable, an image is prepared as if it were opened so."""
        if read_only == self.read_only:
            return
        if not read_only and self.header.incompatible & headers.CORRUPT:
            raise ImageError(
                f"'{self.filename}' is marked corrupt; it cannot be opened for writing",
                "it can still be read; repair it with: cowferry check -r all",
            )
        if read_only and not self.broken:
            if self.keeper is not None:
                self.close_tables()
                self.keeper.rest()
            self.close_tables()
        # A child that was lent has no other writer: its access is what we need.
        children = [self.file, self.data] if self.external else [self.file]
        changed: list[Node] = []
        try:
            for child in children:
                changed.append(child)
                child.reopen(read_only)
            self.read_only = read_only
            if not read_only:
                with self.meta:
                    self._load_tables()
                self._prepare_for_writing()
                if self.keeper is not None:
                    self.keeper.resume()
        except BaseException:
            self.read_only = not read_only
            for child in changed:
                with contextlib.suppress(OSError, CowferryError):
                    child.reopen(not read_only)
            if read_only and self.keeper is not None:  # if not even that: see `unkept`
                with contextlib.suppress(OSError, CowferryError):
                    self.keeper.resume()
            raise

    def close(self) -> None:
        """Flush what waits, with the refcounts of what was freed, and let the file go."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only and not self.broken:
                try:
                    if self.keeper is not None:
                        self.close_tables()
                        self.keeper.rest()
                finally:
                    self.close_tables()
        finally:
            if "file" not in self.lent:
                self.file.close()
            if self.external and "data-file" not in self.lent:
                self.data.close()
