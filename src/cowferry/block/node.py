"""Nodes: what a driver is, and what it answers.

A node is bytes with, perhaps, a backing node: a host file, a raw image in it, a qcow2
image in it. Its one interesting answer is `extents()`: which runs of a range are data, zero
or a hole to be looked up in the backing node and, where it can say so, *in which file
descriptor at which host offset the bytes lie*, and whether they may be overwritten there.
Everything else in the house is built on that answer: the lane serves guests from it, NBD
block status and `cowferry map` print it, jobs skip by it, and a copy clones by it.

Who calls what, and under which lock:

* `extents`, `pread` may be called by any thread at any time. A caller that is not inside
  the disk's gate gets an answer that may be stale the moment it arrives.
* `pwrite`, `zero`, `discard` and `link` change bytes or mapping: the caller holds
  `Disk.exclusive()` over every granule that the range touches. Two threads may be inside
  at once for different granules, so a driver guards its own tables with its own lock,
  which is always taken after the disk's range, never held over data I/O.
* `flush` may be called by any thread at any time; flushes that arrive together are one.
* `reserve`/`unreserve` hand out room that nothing points to, so they need no gate: a job
  fills the room outside the gate, then goes inside only to look again and `link`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from cowferry.errors import CowferryError, NotSupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cowferry.block.bitmap import Bitmap
    from cowferry.block.identity import Place
    from cowferry.block.keeper import Keeper


class State(Enum):
    """What a run of bytes is, as the node itself knows it."""

    DATA = 1
    ZERO = 2
    HOLE = 3  # ask the backing node; without one it reads as zero


class Extent(NamedTuple):
    """A run of bytes, and a lease on where they lie if `fd` is not negative."""

    length: int  # bytes
    state: State
    fd: int = -1  # >= 0: the bytes lie at fd:host
    host: int = 0  # bytes
    writable: bool = False  # may be overwritten in place at fd:host
    depth: int = 0  # 0: the node asked, 1: its backing, ... (filled in by `resolve`)
    compressed: bool = False  # DATA that has to go through `pread`


class Node:
    """One subclass per driver. Offsets and lengths are bytes; data paths raise `OSError`.

    Attributes: `size` and `align` in bytes; `granule` is the unit, a power of two of at
    least 512 bytes, in which the mapping changes (a qcow2 cluster), and so the unit in
    which ranges are locked; `backing` is the node that holes are looked up in.
    """

    driver: ClassVar[str] = ""
    name: str = ""  # node-name, given by the graph
    filename: str = ""  # what a person calls it
    size: int = 0
    align: int = 1
    granule: int = 64 << 10
    read_only: bool = False
    ignores_discard: bool = False  # of guests: the disk over it keeps its room
    detects_zeroes: str = ""  # "on", or "unmap": zeroes that a guest writes are zeroed
    #: Whether asking for its runs is asking a server: then whoever only wants bytes does not ask.
    remote: bool = False
    backing: Node | None = None
    #: (file name exactly as recorded, format or None) that the image's header asks for.
    backing_spec: tuple[str, str | None] | None = None
    backing_refused: bool = False  # opened with "backing": null
    #: The protocol node that holds this format's bytes, if it is a format.
    file: Node | None = None
    filter: ClassVar[str] = ""  # the driver's name, if `driver` is that of the node below
    throttle_group: str = ""  # whose limits hold for a disk over this node
    lent: frozenset[str] = frozenset()  # roles of children added by name, which outlive this node
    #: Whether what is a hole reads as zero once there is no backing node.
    holes_read_zero: bool = True
    room: int = 1 << 62  # bytes of room that a job takes at once, fills, and says so (`filled`)
    #: Whether room is where a guest's write into the same hole has to go, too, and so waits for it.
    room_is_place: bool = False
    fd: int = -1  # of the host file, if this is one
    is_device: bool = False  # a protocol node whose size is not ours to change: a device, an export
    from_start: bool = True  # its first byte is the first of what its file name means
    span: tuple[int, int] | None = None  # bytes of its file that it uses; None: all of it
    #: Whether the format has room for dirty bitmaps of its own (`read_bitmaps`, `write_bitmaps`).
    stores_bitmaps: bool = False
    stamps: bool = False  # the format has room to say which backup the image is
    #: Makes the persistent ones among `bitmaps` outlive a crash; None if there are none.
    keeper: Keeper | None = None

    @cached_property
    def bitmaps(self) -> dict[str, Bitmap]:
        """The dirty bitmaps of this node by name. Changed inside a drain of the disk over it."""
        return {}

    @classmethod
    def companions(cls, children: Mapping[str, Node]) -> Mapping[str, str]:
        """Further files that the image in `children["file"]` records: child's role -> name."""
        return {}

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The runs of `offset, length`, in order, adding up to `length`. Never resolves holes."""
        raise NotImplementedError

    def served(self, offset: int, length: int) -> Iterator[Extent]:
        """`extents` for a caller that only wants the bytes.

        What reads as zero may be called DATA where that is as quickly read as asked about: in a
        file that guests write, and on a server."""
        if self.remote:
            return iter((Extent(length, State.DATA, -1, offset, not self.read_only),))
        return self.extents(offset, length)

    def pread(self, buf: memoryview, offset: int) -> None:
        """Fill `buf` with the bytes at `offset`, holes looked up through the backing chain."""
        read(self, buf, offset)

    def read_run(self, buf: memoryview, offset: int, extent: Extent) -> None:
        """Fill `buf` from a DATA run of `extents()` that has no fd (compressed, say)."""
        raise OSError(errno.EIO, f"{self.filename}: a run without a place at offset {offset}")

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write; allocates and copies on write as needed. With `fua` durable on return."""
        raise NotImplementedError

    def zero(self, offset: int, length: int, unmap: bool = False, fast: bool = False) -> None:
        """Make the range read as zeroes; `unmap`: room may be given back.

        `fast`: raise `OSError(EOPNOTSUPP)` before changing anything rather than write zeroes."""
        raise NotImplementedError

    def discard(self, offset: int, length: int) -> None:
        """The guest needs the range no more. It reads zero or as before, never as backing."""

    def flush(self) -> None:
        """All that was written before the call is durable on return (N1). A failure sticks (N6)."""

    def resize(self, size: int) -> None:
        """Grow (or, where the driver can, shrink) to `size` bytes. New bytes read as zeroes."""
        raise NotSupported(f"{self.driver} node '{self.name or self.filename}' cannot be resized")

    def prepare_resize(self, size: int) -> None:
        """Do what `resize` needs and what takes long. The caller holds no drain.

        The node's bytes and size stay as they are. `resize` does it itself if it was not done.
        Raises `OSError`, `CowferryError`."""

    def change_size(self, size: int) -> None:
        """`resize`, and the bitmaps with it. Inside a drain of the disks over it.

        New bytes are a change, and recorded: the disk may have been larger once, and who has a copy
        of what was there then has to hear that it is zero by now."""
        before = self.size
        for bitmap in self.bitmaps.values():
            if not bitmap.fits(size):
                raise CowferryError(
                    f"'{self.filename}' cannot have {size} bytes: its bitmap '{bitmap.name}' would "
                    "be too large",
                    "remove the bitmap first, or use a larger granularity; nothing was changed",
                )
        if self.keeper is not None:
            self.keeper.resizing(size)
        try:
            self.resize(size)
        finally:
            for bitmap in self.bitmaps.values():
                bitmap.resize(self.size)
                if bitmap.recording:
                    bitmap.set(before, max(self.size - before, 0))
            if self.keeper is not None:
                self.keeper.resized()

    # Dirty bitmaps -----------------------------------------------------------------------

    def changing(self, offset: int, length: int) -> None:
        """The bytes are about to change: the bitmaps know, durably where they have to.

        A disk sees to this for its root. Whoever writes a node by itself (a commit into a base, a
        copy into a target) calls it first, inside the range of a disk over the node. Raises
        `OSError`; then nothing may be written."""
        for bitmap in self.bitmaps.values():
            bitmap.mark(offset, length)
        if self.keeper is not None and self.keeper.holds.any(offset, length):
            self.keeper.protect(offset, length)

    def read_bitmaps(self) -> list[Bitmap]:
        """The bitmaps that the image itself holds; one in use by somebody who is gone is
        `inconsistent`. Raises `ImageError`."""
        return []

    def write_bitmaps(self, bitmaps: list[Bitmap], token: bytes = b"") -> None:
        """Durably make these the bitmaps that the image holds, all or none of it.

        With a `token` of 16 bytes they are in use, by the keeper whose file has that token: others
        must not rely on them, and `bitmap_token` tells whether others have written meanwhile.
        Without, they are at rest. Raises `OSError`, `CowferryError`."""
        raise NotSupported(f"{self.driver} images have no room for bitmaps")

    def bitmap_token(self) -> bytes:
        """The token that `write_bitmaps` left, if nobody else has opened the image for writing
        since; else b""."""
        return b""

    def read_stamp(self) -> tuple[bytes, bool]:
        """What `write_stamp` left, and whether nobody has opened the image for writing since."""
        return b"", False

    def write_stamp(self, data: bytes) -> None:
        """Say durably which backup the image is, until it is opened for writing the next time.

        Raises `OSError`, `CowferryError`."""
        raise NotSupported(f"{self.driver} images have no room for that")

    # Placing bytes in two steps: room first, mapping later -------------------------------

    def reserve(self, offset: int, length: int) -> list[Extent] | None:
        """Room for `offset, length` (granule-aligned, or up to the end) that nothing points to.

        None: this driver cannot; write inside the gate instead. The extents give fd:host for
        consecutive pieces of the range; fill them, then `link` or `unreserve` each."""
        return None

    def link(self, offset: int, room: Extent) -> None:
        """Point `offset, room.length` at reserved room whose bytes have been written.

        Raises `OSError`; then it is reserved room still."""
        raise NotImplementedError

    def filled(self, room: list[Extent]) -> None:
        """Nobody writes to this reserved room any more; whether or not it was filled."""

    def unreserve(self, room: Extent) -> None:
        """Give reserved room back."""
        raise NotImplementedError

    def check_compression(self) -> None:
        """Raise `NotSupported` unless this node can hold compressed data."""
        raise NotSupported(
            f"format {self.driver} cannot hold compressed data", "qcow2 can; or do not compress"
        )

    def compress(self, buf: memoryview) -> list[Extent | None]:
        """Room for each granule of `buf` with its bytes in it, compressed; where they would not
        shrink None, and they are to be written as they are.

        `buf` is whole granules, but for the disk's last. `link` makes such room the granule at an
        offset; its `length` is that of what lies in it. Needs no gate, and takes its time."""
        raise OSError(errno.EOPNOTSUPP, f"format {self.driver} cannot hold compressed data")

    def take_room(self, offset: int, length: int) -> None:
        """Have blocks set aside for bytes that are written later, where that can be promised.

        The bytes stay as they are. Raises `OSError` if there is no room for them."""

    def refresh_size(self) -> int:
        """Of a protocol node: look at the size of the storage again. Keep and return it, in bytes.

        A device may have grown since it was opened."""
        return self.size

    # The image as a whole ----------------------------------------------------------------

    shares: bool = False  # of a protocol node: others may write it meanwhile, its user said

    def places(self) -> Sequence[Place]:
        """Where the bytes of a protocol node lie. `block/identity.py` asks, and knows the rest."""
        return ()

    @property
    def unflushed(self) -> bool:
        """Whether mapping changes wait in memory: then FUA needs a flush, not one fdatasync."""
        return False

    @property
    def crowded(self) -> bool:
        """Whether a flush is due, because half as much waits for it as may.

        A disk then flushes outside its gate. If all that may wait does, the next change flushes by
        itself, inside the gate."""
        return False

    @property
    def preallocated(self) -> bool:
        """Whether places were given out that the file has no bytes for yet."""
        return False

    def check_backing(self, filename: str, format: str | None) -> None:
        """Raise `CowferryError` if the header has no way to record that backing file."""

    def set_backing(self, filename: str | None, format: str | None) -> None:
        """Durably record another backing file (None: no backing file) in the header (Q6).

        Only the header; the caller swaps `backing` itself, inside the gate."""
        raise NotSupported(f"{self.driver} images have no backing file")

    def info(self) -> dict[str, Any]:
        """The `format-specific` data of qemu-img's info (empty if the format has none)."""
        return {}

    def extents_with_data(self) -> Iterator[Extent]:
        """The node's own runs that are no holes."""
        return (e for e in self.extents_in_pieces() if e.state is not State.HOLE)

    def extents_in_pieces(self) -> Iterator[Extent]:
        """All runs, asked for a piece at a time, in some thousands of pieces at most.

        A driver may hold its lock, and memory, for all runs of a question."""
        step = max(PIECE, self.size // self.granule // PIECES) * self.granule
        for at in range(0, self.size, step):
            yield from self.extents(at, min(step, self.size - at))

    def reopen(self, read_only: bool) -> None:
        """Change access, under a drain of every disk above. Raises `OSError`, `CowferryError`.

        Made read-only, everything is flushed and not one byte of the file changes any more."""
        raise NotSupported(f"{self.driver} node '{self.name or self.filename}' cannot be reopened")

    def close(self) -> None:
        """Flush, mark clean, let the file go. Idempotent; closes an owned `file`, not `backing`."""

    def abort(self, patience: float = 0.0) -> None:
        """Fail blocked I/O now, where it can be blocked for long: on a server. By any thread.

        With `patience` only if some of it has been waiting for so many seconds. What is begun later
        is tried again: to be rid of a worker, repeat until it has ended."""
        if self.file is not None:
            self.file.abort(patience)


def resolve(
    node: Node | None,
    offset: int,
    length: int,
    base: Node | None = None,
    serve: bool = False,
) -> Iterator[Extent]:
    """Extents of the chain under `node`: no HOLE is left, `depth` says who answered.

    With `base`, what only `base` or a node below it could answer stays a HOLE. A hole that
    no node answers is ZERO with depth -1 (qemu:allocation-depth 0). Only the top node's runs
    keep `writable`. To `serve`, the nodes say what `served` does.
    Iterative: a chain may be hundreds of nodes deep."""
    # A stack of pending runs, deepest first, in place of recursion.
    stack: list[tuple[Node | None, int, int, int]] = [(node, offset, length, 0)]
    while stack:
        current, at, left, depth = stack.pop()
        if base is not None and current is base:
            yield Extent(left, State.HOLE, depth=depth)
            continue
        if current is None or at >= current.size:
            yield Extent(left, State.ZERO, depth=-1)
            continue
        if at + left > current.size:  # the backing is shorter: the rest reads as zero
            stack.append((None, current.size, at + left - current.size, depth))
            left = current.size - at
        pending: list[tuple[Node | None, int, int, int]] = []
        for e in current.served(at, left) if serve else current.extents(at, left):
            if e.state is State.HOLE:
                pending.append((current.backing, at, e.length, depth + 1))
            elif pending:
                pending.append((current, at, e.length, depth))
            else:
                yield e._replace(depth=depth, writable=e.writable and depth == 0)
            at += e.length
        stack.extend(reversed(pending))


def with_holes(node: Node, offset: int, length: int) -> Iterator[Extent]:
    """`resolve`, and where a preallocated image has a place that is a hole in its file, ZERO.

    Such a run keeps its `fd` and `host`. Slower; for those who tell, not for those who serve."""
    sparse = {depth: list(files(n)) for depth, n in enumerate(chain(node)) if n.preallocated}
    for e in resolve(node, offset, length):
        file = None
        if e.state is State.DATA and e.fd >= 0:
            file = next((f for f in sparse.get(e.depth, ()) if f.fd == e.fd), None)
        if file is None:
            yield e
            continue
        at = e.host
        for run in file.extents(at, e.length):
            yield e._replace(length=run.length, host=at, state=run.state)
            at += run.length


def files(node: Node) -> Iterator[Node]:
    """The protocol nodes that an image keeps its bytes in."""
    if node.file is None:
        yield node
        return
    yield from files(node.file)
    data = getattr(node, "data", None)  # of an image with an external data file
    if isinstance(data, Node) and data is not node.file:
        yield from files(data)


def chain(node: Node | None) -> Iterator[Node]:
    """`node`, its backing node, and so on to the bottom."""
    while node is not None:
        yield node
        node = node.backing


def read(node: Node | None, buf: memoryview, offset: int, flags: int = 0) -> None:
    """Fill `buf` through the chain under `node`; `flags` as in `read_fully`. Raises `OSError`."""
    read_runs(node, resolve(node, offset, len(buf), serve=True), buf, offset, flags)


def read_runs(
    node: Node | None, runs: Iterable[Extent], buf: memoryview, offset: int, flags: int = 0
) -> None:
    """Fill `buf`, or as much of it as there are runs, from what `resolve` said of `node`."""
    nodes = list(chain(node))
    for e in runs:
        part, buf = buf[: e.length], buf[e.length :]
        if e.state is State.ZERO:
            clear(part)
        elif e.fd >= 0:
            read_fully(e.fd, part, e.host, flags)
        else:
            nodes[e.depth].read_run(part, offset, e)
        offset += e.length


def part(runs: Iterable[Extent], skip: int, length: int) -> Iterator[Extent]:
    """Of the bytes that the runs are, those from `skip` on."""
    for e in runs:
        n = min(e.length - skip, length)
        if n > 0:
            yield e if n == e.length else e._replace(length=n, host=e.host + skip)
            length -= n
        skip = max(skip - e.length, 0)


def served_plainly(node: Node) -> bool:
    """Whether a server holds the bytes, and no format of ours is over them: nothing that the node
    says of its runs is remembered, so its bytes may be changed under a reader of the disk."""
    return node.remote or (node.driver == "raw" and node.backing is None and bool(far(node)))


def far(node: Node | None) -> list[Node]:
    """The nodes of the chain under `node` whose bytes a server holds."""
    return [n for n in chain(node) if _remote(n)]


def _remote(node: Node | None) -> bool:
    """Whether it is, or the file of a format or filter."""
    while node is not None and not node.remote:
        node = node.file
    return node is not None


PIECE, PIECES = 1 << 14, 1 << 12  # granules asked about at once, and questions, by themselves
ZEROES = bytes(1 << 20)
ONCE = 0x80  # RWF_DONTCACHE, Linux 6.14: for bytes of which one copy in memory is enough


def clear(buf: memoryview) -> None:
    """Fill `buf` with zeroes without allocating its length."""
    while len(buf) > len(ZEROES):
        buf[: len(ZEROES)] = ZEROES
        buf = buf[len(ZEROES) :]
    buf[:] = ZEROES[: len(buf)]


NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # fail rather than wait for a disk
PROBE = (bytearray(1),)  # whose byte nobody looks at


def cached(fd: int, host: int) -> bool:
    """Return whether the byte of a file can be read without waiting for a disk.

    True also if the file system cannot tell, and past the end of the file."""
    try:
        os.preadv(fd, PROBE, host, NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a read of the byte tells the error
    return True


def read_fully(fd: int, buf: memoryview, host: int, flags: int = 0) -> None:
    """`preadv` until `buf` is full; past the end of the file the bytes are zeroes.

    A device has no bytes past its end: it has been made smaller, and reading fails with EIO.

    With `ONCE` pages that it brings into memory leave it at once, where the kernel can do that."""
    while len(buf):
        try:
            n = os.preadv(fd, [buf], host, flags)
        except OSError as error:
            if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            flags = 0
            continue
        if n == 0:
            if stat.S_ISBLK(os.fstat(fd).st_mode):
                end = os.lseek(fd, 0, os.SEEK_END)
                raise OSError(errno.EIO, f"the device ends at {end}, before the bytes at {host}")
            clear(buf)
            return
        buf, host = buf[n:], host + n
