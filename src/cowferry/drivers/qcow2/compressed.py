"""Compressed clusters: raw deflate, or zstd.

A compressed cluster is a *piece*: bytes anywhere in the file, one behind the other and aligned to
nothing, so that several share a host cluster, which is counted once for each. Its L2 entry has the
piece's offset and how many sectors it touches; where it ends in the last of them only the stream
itself tells, and the next piece may begin there. (Specification, "Compressed Clusters Descriptor".)

It is written in the two steps of `Node.reserve` and `link`: compressed and written to room that
nothing points to, without any gate, then linked inside it. So the order of the image's flush holds
for it as for other data. A cluster that it replaces is given back after that flush, as ever.

A bomb gets no further than one cluster: the output is capped, and what is short is an error.
"""

from __future__ import annotations

import errno
import sys
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cowferry.block.node import Extent, State, read
from cowferry.drivers.qcow2.clusters import COMPRESSED
from cowferry.errors import NotSupported

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

ZSTD = 1  # compression type; 0 is deflate
SECTOR = 512
WINDOW = 12  # bits: what QEMU reads with knows no larger one
MEMORY = 9  # zlib's most, for speed
WORKERS = 4  # both libraries work without the interpreter's lock
TOGETHER = 64 << 10  # bytes that a worker takes at once, if clusters are small


def _zstd() -> Any:
    """The library, which is part of Python since 3.14. It is loaded by the first image with zstd
    clusters, because that takes a while."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def deflate(kind: int, data: memoryview) -> bytes:
    """The bytes of one cluster, compressed."""
    if kind == ZSTD:
        return bytes(_zstd().compress(data))
    stream = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -WINDOW, MEMORY)
    return stream.compress(data) + stream.flush()


def inflate(name: str, kind: int, data: bytes, size: int, offset: int) -> bytes:
    """One cluster of `size` bytes out of `data`; `offset` is the guest's, for the error.

    `data` ends somewhere behind the stream's end. Raises `OSError`."""
    try:
        if kind != ZSTD:
            out = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        else:
            out = _zstd().ZstdDecompressor().decompress(data, size)
    except Exception as error:  # each library has its own class
        raise OSError(
            errno.EIO, f"{name}: damaged compressed cluster at offset {offset}: {error}"
        ) from error
    if len(out) != size:
        raise OSError(errno.EIO, f"{name}: short compressed cluster at offset {offset}")
    return out


class Pieces:
    """The compressed clusters of one image. Thread-safe in the manner of `Node`."""

    def __init__(self, image: Qcow2) -> None:
        # A weak one, so that an image that was let go goes at once, with its tables.
        self.image: Qcow2 = weakref.proxy(image)
        # Guarded by the image's `meta`, as the tables are:
        self._last: tuple[int, bytes] = (0, b"")  # the entry and the bytes of the last one read
        self._linked = 0  # how often anything was: the same entry may mean other bytes since

    # Reading -----------------------------------------------------------------------------

    def read(self, buf: memoryview, offset: int) -> None:
        """Fill `buf` from compressed clusters. Raises `OSError`."""
        image, size = self.image, self.image.cluster_size
        while len(buf):
            cluster, within = divmod(offset, size)
            n = min(len(buf), size - within)
            with image.meta:
                entry, _ = image.map.entry(cluster)
                last, plain = self._last
                linked = self._linked
            if not entry & COMPRESSED:  # written meanwhile, in another place
                read(image, buf[:n], offset)
            else:
                if last != entry:
                    place, length = image.map.compressed_place(entry)
                    raw = bytearray(min(length, max(image.file.size - place, 0)))
                    image.file.pread(memoryview(raw), place)
                    with image.meta:  # through an overlay one comes by another gate
                        if image.map.entry(cluster)[0] != entry or self._linked != linked:
                            continue  # written meanwhile, and the place given back, perhaps
                    kind = image.header.compression_type
                    plain = inflate(image.filename, kind, bytes(raw), size, offset)
                    with image.meta:
                        if self._linked == linked:
                            self._last = (entry, plain)
                buf[:n] = plain[within : within + n]
            buf, offset = buf[n:], offset + n

    # Writing -----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `NotSupported` unless pieces can be written."""
        image = self.image
        if image.external:
            raise NotSupported(
                f"'{image.filename}' keeps its data in another file, which holds no compressed data"
            )

    def write(self, buf: memoryview) -> list[Extent | None]:
        """Room with each of the clusters that `buf` holds; None: it would not shrink.

        The last may be cut short by the disk's end. Raises `OSError`; then there is no room."""
        image, size = self.image, self.image.cluster_size
        wholes = [buf[at : at + size] for at in range(0, len(buf), size)]
        if len(wholes[-1]) < size:
            wholes[-1] = memoryview(bytes(wholes[-1]).ljust(size, b"\0"))
        packed = self._compressed(wholes)
        out: list[Extent | None] = []
        try:
            with image.meta:
                out.extend(self._room(len(p)) if len(p) < size else None for p in packed)
            self._fill(packed, out)
        except BaseException:
            for room in out:
                if room is not None:
                    self.release(room)
            raise
        return out

    def _compressed(self, wholes: list[memoryview]) -> list[bytes]:
        kind = self.image.header.compression_type
        few = max(TOGETHER // self.image.cluster_size, 1)
        starts = iter(range(0, len(wholes), few))
        out = [b""] * len(wholes)

        def work() -> None:
            for start in starts:  # one step of the interpreter
                for n, data in enumerate(wholes[start : start + few], start):
                    out[n] = deflate(kind, data)

        if len(wholes) <= few:
            work()
        else:
            with ThreadPoolExecutor(WORKERS, "compress") as pool:
                for worker in [pool.submit(work) for _ in range(WORKERS)]:
                    worker.result()
        return out

    def _room(self, length: int) -> Extent | None:
        """Under `meta`. None: so far behind in the file that no entry can tell."""
        at = self.image.refcounts.pack(length)
        room = Extent(length, State.DATA, host=at, compressed=True)
        if at + length > 1 << min(self.image.map.compressed_shift, 56):
            self.release(room)
            return None
        return room

    def _fill(self, packed: list[bytes], rooms: list[Extent | None]) -> None:
        """Neighbours in one write."""
        at, together = 0, bytearray()
        for data, room in zip(packed, rooms, strict=True):
            if room is None:
                continue
            if together and room.host != at + len(together):
                self.image.file.pwrite(memoryview(together), at)
                together = bytearray()
            if not together:
                at = room.host
            together += data
        if together:
            self.image.file.pwrite(memoryview(together), at)

    def link(self, cluster: int, room: Extent) -> None:
        """Guest cluster `cluster` is the piece in `room` from now on. Under `exclusive`."""
        table = self.image.map
        sectors = (room.host + room.length - 1) // SECTOR - room.host // SECTOR
        with self.image.meta:
            table.set(cluster, COMPRESSED | sectors << table.compressed_shift | room.host)
            self._last = (0, b"")
            self._linked += 1

    def release(self, room: Extent) -> None:
        """Room that nothing points to goes back at once."""
        image = self.image
        first = room.host // image.cluster_size
        last = (room.host + room.length - 1) // image.cluster_size
        with image.meta:
            image.refcounts.settle([(first, last - first + 1)])
