"""Keepers: what makes the persistent dirty bitmaps of a node outlive a crash (B1, B2).

A bit in memory dies with the process, and to write it before every guest's write would cost an
fdatasync each. So what is on disk is coarse while the image is written: before the first write to a
*region* that is not marked there, all bits of the region are set, in the file beside the image
(`block/bitmap_file.py`), durably. Then the guest writes into the region without asking anybody, and
memory has the precise bits. Whoever crashed and whenever, the file has a superset of what changed.

`holds` says where a write has to come to us first: the disk hands out no write lease there
(`block/lease.py`). It is the complement of what the file has set, so what is dirty is never held.
A *checkpoint*, inside a drain, makes the file precise again, and holds what it has cleared.

Where bitmaps are at rest, while nobody writes the image:

* in the image, if its format has room for them (`Node.stores_bitmaps`). Before the image is
  written they are put into the file, in use, and marked in use in the image, with the file's
  *token*. After a crash the file counts if the image has its token, which goes when another program
  writes the image. And other programs see that the bitmaps are in use, and do not rely on them;
* in the file otherwise. At rest it says the image's inode and time of change, and counts if they
  are the same. In use it counts if the inode is the same: who crashed could not say the time.

Nothing is written for an image that is only opened. A file at rest is taken into use by its header,
which is put back if nothing was written. An image that holds its bitmaps itself has no file yet, so
its keeper *waits*: all of the image is held, and the first write takes the file into use. A keeper
also waits where storage is too full for the file. A write for which there is no room fails.

Bitmaps that cannot be relied on any more are *inconsistent*: listed, and removed, no more.

The order of things, at each of which the power may fail:

    open for writing   file in use, durable (of an image that holds its bitmaps: at the first
                       write, and the token in the image, durable); the guest
    other bitmaps, or bits cleared   the guest's data durable, for somebody has a copy of it; the
                       file anew, in use, renamed over the old one
    a new size         the file with both sizes; the image; the file with the new size
    rest               the guest's data durable, the image's time of change too; the file at rest
                       (or the bitmaps into the image; then the file goes)
    no bitmaps left    the file made void, durable, so that its name may come back; the file goes

Lock order: the disk's range, then the keeper's, then bitmaps' and the image's metadata.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Collection, Iterator

from bitarray import bitarray

from cowferry.block import bitmap_file, moves, origin, sysio
from cowferry.block.bitmap import Bitmap, folded, tell_of_bad
from cowferry.block.bitmap_file import (
    Contents,
    Damaged,
    Entry,
    Marks,
    Stamp,
    entry_of,
    fitted,
    placeholder,
)
from cowferry.block.node import Node
from cowferry.errors import CowferryError, ImageError, NotSupported

log = logging.getLogger(__name__)

SUFFIX = ".bitmaps"
COPY = "copy-"  # bitmaps of unfinished copies (`block/unfinished.py`): they stay with their image
REGION = 4 << 20  # bytes that are marked together, at least, but in a small disk
FEW_REGIONS = 256  # in a small disk
REGIONS = 1 << 15  # at most so many in a disk
AHEAD = 64 << 20  # bytes that are marked at once for a guest that writes on and on
HOLD = 64 << 10  # bytes for which `holds` has a bit, at least


def stamp(node: Node) -> Stamp:
    """Return the stamp that ties a bitmap file to the image under `node` as the image is now."""
    return bitmap_file.stamp_of(_file(node).fd)


class Keeper:
    """The durable side of one node's persistent bitmaps. Thread-safe.

    There is one as long as the node has such bitmaps; on a read-only node, and between `rest` and
    `resume`, it is at rest and does nothing. `holds` is for disks to read: outside of a drain they
    see bits go, never come."""

    holds: Bitmap  # where a change of the node is not yet marked durably

    def __init__(self, node: Node, generation: int = 0, token: bytes = b"") -> None:
        # A weak one, because the node has us: an image that was let go goes at once.
        self.node: Node = weakref.proxy(node)
        # Duty: the file, its picture and `holds` change together; guards all that follows. Held
        # over writes of the file, never over its fdatasync on behalf of a guest's write.
        self._lock = threading.Lock()
        self._marks: Marks | None = None  # None: at rest
        self._waiting = False  # at rest until the first write, or until there is room for the file
        self._entries: dict[int, Entry] = {}  # id(bitmap) -> what the file has of it
        self._epoch = 0  # how often bits in the file may have been cleared
        self._run = 0, 0  # where the last range that was marked ends, and its length
        self._broken = False  # the file may not be what a power cut leaves: write a new one
        self._generation = generation
        self._token = token  # of the file in use; b"" none yet
        self._told = False  # whether an image with room for bitmaps has the token
        self._path = ""  # of the file, while it is in use
        self._next_size: int | None = None  # during a resize
        self._seen = stamp(node)  # at rest: to notice that it did not stay there
        self._shape()

    # What the guest waits for ----------------------------------------------------------------

    def protect(self, offset: int, length: int) -> tuple[int, int]:
        """Mark the regions of the range durably; [start, end) in bytes of what is marked now.

        The caller is inside the range. Raises `OSError`; then nothing may be written."""
        start = offset // self.region * self.region
        end = -(-(offset + length) // self.region) * self.region
        with self._lock:
            if start == self._run[0]:  # on from where it came last: mark more and more
                end = max(end, start + min(2 * self._run[1], AHEAD))
            self._run = end, end - start
        while True:
            with self._lock:
                if self._waiting:
                    self._wake((start, end))
                    self.holds.clear(start, end - start)
                    return start, end
                if self._marks is None:
                    raise OSError(errno.EROFS, f"{self._name}: its bitmaps are at rest")
                pairs = [(b, self._entries.get(id(b))) for b in self._kept()]
                stale = any(e is None or not (e.recording or e.guarded) for _, e in pairs)
                if self._broken or stale:
                    with _as_os_error():
                        self._renew(precise=False, mark=(start, end))
                    self.holds.clear(start, end - start)
                    return start, end
                for bitmap, entry in pairs:
                    assert entry is not None
                    granularity = bitmap.granularity
                    self._marks.set(entry, start // granularity, -(-end // granularity))
                marks, epoch = self._marks, self._epoch
            try:
                marks.flush()
            except OSError as error:
                with self._lock:
                    if self._marks is marks:  # or it was closed under us, for a new one
                        log.warning("%s; writing a new one", error)
                        self._broken = True
                continue
            with self._lock:
                if self._epoch == epoch:  # or it was cleared again before it was flushed
                    self.holds.clear(start, end - start)
                    return start, end

    # Inside a drain of every disk over the node ------------------------------------------------

    def checkpoint(self) -> None:
        """What is on disk becomes precise again, sooner or later. Raises `OSError`, which does no
        harm: it says more than it has to, then."""
        self._settle()
        with self._lock:
            if self._marks is None:
                return
            if self._broken or self._counts_anew():
                self._renew()
                return
            self._epoch += 1
            try:
                for bitmap in self._persistent():
                    entry = self._entries.get(id(bitmap))
                    if entry is not None and not entry.inconsistent:
                        self._marks.replace(entry, _bits(bitmap))
            finally:
                self._hold()

    def _counts_anew(self) -> bool:
        """Whether a bitmap counts from another backup than the file says: then its bits and the
        backup have to change together, and not the bits by themselves. Under `_lock`."""
        entries = ((b, self._entries.get(id(b))) for b in self._persistent())
        return any(entry is not None and entry.since != b.since for b, entry in entries)

    def changed(self) -> None:
        """Bitmaps were added, removed, enabled, disabled or cleared: durable on return.

        Without any persistent one left the keeper is gone, too. Raises `OSError`, `CowferryError`;
        then the old set is on disk, or the new one, and the caller undoes its change."""
        self._settle()
        with self._lock:
            waited = self._waiting
            if waited:
                self._begin()
            if self._marks is None:
                raise CowferryError(
                    f"'{self._name}' is read-only, and so are its persistent bitmaps"
                )
            if self._persistent():
                if not waited:
                    self._renew()
                return
            try:
                self._remove()
            except BaseException:
                self._distrust()
                raise
            self._marks.close()
            self._marks = None
            self.node.keeper = None

    def resizing(self, size: int) -> None:
        """The node is about to have another size: either is right from now on, durably.

        Raises `OSError`, `CowferryError`; then it must stay as it is."""
        with self._lock:
            self._next_size = size
            try:
                if self._waiting:
                    self._begin()
                elif self._marks is not None:
                    self._renew()
            except BaseException:
                self._next_size = None
                raise

    def resized(self) -> None:
        """The node has another size now, or has not after all, and so have its bitmaps.

        A failure does no harm: the file goes on saying both."""
        with self._lock:
            self._next_size = None
            self._shape()
            if self._marks is None:
                return
            try:
                self._renew()
            except (OSError, CowferryError) as error:
                log.warning("the bitmaps of '%s' say its old size, too: %s", self._name, error)

    def rest(self) -> None:
        """Nobody writes the image any more: precise bits, durable, that others may rely on.

        Before the node is closed or becomes read-only, after its driver's last write. Raises
        `OSError`, `CowferryError`; then they are in use still."""
        with self._lock:
            self._waiting = False
            if self._marks is None:
                return
            try:
                self._rest()
            except BaseException as error:
                if not self._counts_still():
                    self._distrust()
                if isinstance(error, OSError):
                    why = error.strerror or error
                    text = f"the bitmaps of '{self._name}' are left as by a crash: {why}"
                    raise OSError(error.errno, text) from error
                raise
            self._marks.close()
            self._marks = None
            self._entries = {}
            self._seen = stamp(self.node)

    def resume(self) -> None:
        """The image may be written again; before anybody does. Raises `OSError`, `CowferryError`;
        then nobody may."""
        with self._lock:
            if self._marks is None:
                if stamp(self.node) != self._seen and not self.node.stores_bitmaps:
                    for bitmap in self._persistent():
                        _distrusted(bitmap, "the image was changed by another program")
                if self.node.stores_bitmaps and not self._token:
                    self._wait()
                else:
                    self._begin()

    def begin(self) -> None:
        """The first bitmaps of the node are in use from now on, durably. Inside a drain.

        Raises `OSError`, `CowferryError`; then they are not kept."""
        with self._lock:
            self._begin()

    def wait(self) -> None:
        """There was no room for the file: hold all of the image, and let each write try again.

        Before there is a disk over the node."""
        with self._lock:
            self._wait()

    def wake(self) -> None:
        """A waiting keeper takes the file into use, for a change that no bitmap records.

        Raises `OSError`; then nothing may be written."""
        with self._lock:
            if self._waiting:
                self._wake((0, 0))

    def close(self) -> None:
        """Let the file go as it is: after `rest` has failed, or as if the power had."""
        with self._lock:
            if self._marks is not None:
                self._marks.close()
                self._marks = None

    # What others may know ----------------------------------------------------------------------

    @property
    def coarse(self) -> int:
        """Bytes that the file says are dirty and the bitmaps do not, of the worst of them."""
        with self._lock:
            return max(
                (
                    entry.bits.count() * bitmap.granularity - bitmap.count()
                    for bitmap in self._kept()
                    if (entry := self._entries.get(id(bitmap))) is not None
                ),
                default=0,
            )

    def _settle(self) -> None:
        """What somebody copied when bits were cleared in memory is durable before they are clear on
        disk: or a crash takes it back, and no bit says that it has changed again."""
        if not self.node.read_only:
            self.node.flush()

    # Under `_lock` -------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self.node.filename

    def _persistent(self) -> list[Bitmap]:
        return [b for b in self.node.bitmaps.values() if b.persistent]

    def _kept(self) -> list[Bitmap]:
        """Those that a write has to be marked in before it is done."""
        return [b for b in self._persistent() if not b.inconsistent and (b.recording or b.guarded)]

    def _shape(self) -> None:
        """Sizes that follow from those of the disk and of the bitmaps; holds everything kept."""
        size, kept = self.node.size, self._kept()
        unit = max([HOLD, *(b.granularity for b in kept)])
        self.region = REGION
        while self.region > unit and self.region * FEW_REGIONS > size:
            self.region //= 2
        self.region = max(self.region, unit)
        while self.region * REGIONS < size:
            self.region *= 2
        self.holds = Bitmap(f"#{self._name}", size, unit)
        if kept:
            self.holds.set(0, size)

    def _hold(self) -> None:
        """Hold what the file does not have set of all that are kept. Inside a drain."""
        self._shape()
        holds = self.holds
        lacking = bitarray(len(holds.bits), endian="little")
        lacking.setall(False)
        for bitmap in self._kept():
            entry = self._entries.get(id(bitmap))
            if entry is None or not (entry.recording or entry.guarded):
                return  # and all is held
            factor = holds.granularity // bitmap.granularity
            lacking |= folded(~fitted(entry.bits, len(lacking) * factor), factor)
        holds.replace(lacking)

    def _renew(self, precise: bool = True, mark: tuple[int, int] = (0, 0)) -> None:
        """A new file instead, in use, with what the bitmaps are now; durable on return.

        Not `precise`, which is inside a drain only: what the old one had, and the range `mark`. On
        an error the old file is there, and all is as it was, or nothing is relied on."""
        old = self._marks
        if precise:
            self._shape()
        size = max(self.node.size, self._next_size or 0)
        entries = {}
        kept = {id(bitmap) for bitmap in self._kept()}
        for bitmap in self._persistent():
            if bitmap.inconsistent and self.node.stores_bitmaps:
                entries[id(bitmap)] = placeholder(bitmap)
                continue
            before = self._entries.get(id(bitmap))
            bits = fitted(_bits(bitmap), -(-size // bitmap.granularity))
            if size > self.node.size and bitmap.recording:  # as `change_size` is going to
                bits[self.node.size // bitmap.granularity :] = True
            if not precise:
                if before is not None:
                    bits |= fitted(before.bits, len(bits))
                if id(bitmap) in kept:
                    first, stop = mark[0] // bitmap.granularity, -(-mark[1] // bitmap.granularity)
                    bits[first : min(stop, len(bits))] = True
            entries[id(bitmap)] = entry_of(bitmap, bits)
        try:
            self._marks = Marks(
                self._path,
                Contents(
                    size=self.node.size,
                    next_size=self._next_size,
                    generation=self._generation,
                    token=self._token,
                    in_use=True,
                    stamp=stamp(self.node)._replace(mtime_ns=0),
                    region=self.region,
                    entries=list(entries.values()),
                ),
                origin.beside(_file(self.node).fd),
                at_rest=old is None,
            )
        except BaseException:
            if old is None or not old.named:
                self._broken = True
                if precise:
                    self._entries = {}
            if precise:
                self._hold()
            raise
        if old is not None:
            old.close()
        self._entries = entries
        self._epoch += 1
        if self.node.stores_bitmaps and not self._told:
            self._broken = True
            self._tell()
        self._broken = False
        if precise:
            self._hold()

    def _tell(self) -> None:
        """Let an image with room for bitmaps say that they are in use, and in which file."""
        self.node.write_bitmaps(self._persistent(), self._token)
        self._told = True

    def _counts_still(self) -> bool:
        """After a `rest` that failed: whether the file in use is what counts, as before. Or every
        write of a guest would need a new file, and fail with it where there is no room for one."""
        assert self._marks is not None
        if not self._marks.named:
            return False
        if self.node.stores_bitmaps and not self._told:
            try:
                self._tell()
            except (OSError, CowferryError):
                return False
        return True

    def _distrust(self) -> None:
        """What is on disk is unclear: nobody writes before there is a new file. Inside a drain."""
        self._broken = True
        self._entries = {}
        self._hold()

    def _wait(self) -> None:
        """Hold all of the image; the first write takes the file into use."""
        self._waiting = True
        self.holds.set(0, self.node.size)

    def _wake(self, mark: tuple[int, int]) -> None:
        """`_begin` outside a drain, with a range that is marked."""
        with _as_os_error():
            self._begin(mark)

    def _begin(self, mark: tuple[int, int] | None = None) -> None:
        """In use from now on; outside a drain with a range to `mark`."""
        self._generation += 1
        self._token = self._token or secrets.token_bytes(16)
        self._told = False
        self._path = moves.place(self._name, SUFFIX)
        try:
            self._renew(precise=mark is None, mark=mark or (0, 0))
            self._waiting = False
            for path in moves.places(self._name, SUFFIX):
                if path != self._path:
                    bitmap_file.remove(path)
        except BaseException:
            if self._marks is not None:
                self._marks.close()
                self._marks = None
            raise

    def _rest(self) -> None:
        bitmaps = self._persistent()
        if self.node.stores_bitmaps:
            self._told = False
            self.node.write_bitmaps(bitmaps)
            self._token = b""
            with contextlib.suppress(OSError):  # without its token in the image it does not count
                bitmap_file.remove(self._path)
            return
        image = _file(self.node)
        assert self._marks is not None
        if stamp(self.node) == self._seen and self._marks.put_back():
            return
        image.flush()  # which tells of one that has failed before (N6)
        sysio.fsync(image.fd)  # or the image might lose its time of change
        bitmap_file.write(
            self._path,
            Contents(
                size=self.node.size,
                generation=self._generation,
                token=self._token,
                stamp=stamp(self.node),
                region=self.region,
                entries=[entry_of(b, _bits(b)) for b in bitmaps],
            ),
            origin.beside(image.fd),
        )

    def _remove(self) -> None:
        """There is none left."""
        if not self.node.stores_bitmaps:
            bitmap_file.remove(self._path)
            return
        self._told = False
        self.node.write_bitmaps([])
        with contextlib.suppress(OSError):
            bitmap_file.remove(self._path)


# Finding them -----------------------------------------------------------------------------------


def attach(node: Node, repair: bool = False) -> None:
    """A format node was opened: its persistent bitmaps are there, and kept if it is writable.

    A node that is opened for `repair` and stores its bitmaps itself is left alone: a repair changes
    no byte of the disk, so the bitmaps stay right where they are. Raises `ImageError` if they
    cannot be kept, though they should; then the node is not to be written, unless it is opened for
    `repair`. What is wrong with a bitmap itself makes it inconsistent, and is told in the log."""
    if repair and node.stores_bitmaps:
        return
    if not can_keep(node):
        if node.file is not None and not node.filter:
            check_bypass(node)
        return
    try:
        found, generation, token = _find(node)
        for bitmap in found:
            bitmap.persistent = True
            node.bitmaps[bitmap.name] = bitmap
        tell_of_bad(found, node.filename)
        if found:
            node.keeper = Keeper(node, generation, token)
            if not node.read_only:
                _resume(node.keeper)
    except (OSError, CowferryError) as error:
        node.keeper = None
        if isinstance(error, CowferryError):
            why = error.desc
        else:
            why = (f"'{error.filename}': " if error.filename else "") + (error.strerror or "")
        if node.read_only or repair:
            log.warning("'%s': its bitmaps cannot be kept: %s", node.filename, why)
            return
        hint = error.hint if isinstance(error, CowferryError) else ""
        raise ImageError(
            f"'{node.filename}': its bitmaps cannot be kept: {why}",
            hint or "the image and its bitmaps are intact; it can be opened read-only meanwhile",
        ) from error


def _resume(keeper: Keeper) -> None:
    """Take bitmaps into use, or let them wait for room. Raises `OSError`, `CowferryError`."""
    try:
        keeper.resume()
    except OSError as error:
        if error.errno not in bitmap_file.FULL:
            raise
        log.warning(
            "'%s' can be read, but not written: there is no room for its bitmaps (%s)",
            keeper.node.filename,
            error.strerror,
        )
        keeper.wait()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Bitmaps that cannot be kept make a guest's write fail."""
    try:
        yield
    except CowferryError as error:
        raise OSError(errno.EIO, error.desc) from error


def keep(node: Node, bitmap: Bitmap) -> None:
    """One more persistent bitmap of a node, durable on return. Inside a drain of the disks over it.

    Raises `OSError`, `CowferryError`; then it is not there."""
    bitmap.persistent = True
    before = node.bitmaps
    node.bitmaps = {**before, bitmap.name: bitmap}
    try:
        changed(node)
    except BaseException:
        node.bitmaps = before
        raise


def changed(node: Node) -> None:
    """The node's persistent bitmaps are others, or have other bits than a guest's writes set:
    durable on return. See `Keeper.changed`; here there need not be a keeper yet."""
    if node.keeper is not None:
        node.keeper.changed()
        return
    if not any(b.persistent for b in node.bitmaps.values()):
        return
    if not can_keep(node):
        raise NotSupported(
            f"'{node.filename}' cannot have persistent bitmaps",
            "they need an image in a local file or device, from its beginning on; without "
            "persistent it can have one",
        )
    if node.read_only:
        raise CowferryError(f"'{node.filename}' is read-only")
    node.flush()  # as in `_settle`
    fresh(node.filename)  # if there is anything, it does not count
    keeper = Keeper(node)
    try:
        keeper.begin()
    except BaseException:
        try:  # it might be found after a crash, and nobody would have kept it
            fresh(node.filename)
        except OSError as error:
            log.critical(
                "'%s%s' must not be there, and cannot be removed: %s", node.filename, SUFFIX, error
            )
        raise
    node.keeper = keeper


def carry(old: Node, new: Node) -> dict[str, Bitmap]:
    """The disk in `old` is about to go on in `new`, and its bitmaps with it; those that `old` keeps
    tell no more than what was changed there. Inside a drain. Returns what `new` had, to put back.

    One of the same name that `new` has may go further back: both count. Raises `OSError`,
    `CowferryError`; then `new` is as it was."""
    before = new.bitmaps
    going: dict[str, Bitmap] = {}
    for bitmap in old.bitmaps.values():
        if not bitmap.inconsistent and not bitmap.name.startswith(COPY):
            copy = going[bitmap.name] = bitmap.copy()
            copy.recording, copy.persistent = bitmap.recording, bitmap.persistent
            own = before.get(bitmap.name)
            if own is not None and not own.inconsistent:
                copy.merge(own)
    if not going:
        return before
    new.bitmaps = {**before, **going}
    try:
        try:
            changed(new)
        except NotSupported as error:
            log.warning("'%s' keeps no bitmaps over a restart: %s", new.filename, error.desc)
            for bitmap in going.values():
                bitmap.persistent = False
    except BaseException:
        new.bitmaps = before
        raise
    return before


def put_back(node: Node, before: dict[str, Bitmap]) -> None:
    """Undo `carry`. Raises `OSError`, `CowferryError`."""
    if node.bitmaps is not before:
        node.bitmaps = before
        changed(node)


def check_bypass(node: Node) -> None:
    """Raise `ImageError` if whoever writes this node passes by bitmaps that lie beside the image:
    as a plain file, or a window of it. After a crash they would be relied on."""
    file = node if node.file is None else node.file
    bare = node.file is None or not node.from_start
    if bare and file.fd >= 0 and not node.read_only and there(file.filename):
        raise ImageError(
            f"'{file.filename}' has persistent bitmaps, which nobody would keep",
            f"write the whole image by its format; or remove '{file.filename}{SUFFIX}'",
        )


def there(image: str) -> bool:
    """Whether there is a bitmap file of the image, whatever it says."""
    return any(os.path.lexists(path) for path in moves.places(image, SUFFIX))


def fresh(image: str, keep: Collection[str] = ()) -> None:
    """Durably remove the bitmap files of an older image under this name, but for those to `keep`.

    Raises `OSError`."""
    for path in moves.places(image, SUFFIX):
        if path not in keep:
            bitmap_file.remove(path)


def _find(node: Node) -> tuple[list[Bitmap], int, bytes]:
    """The bitmaps of the image, the generation of its file, and the token that they share.

    Raises `OSError`, `ImageError`."""
    file: Contents | None = None
    damaged: Damaged | None = None
    for path in moves.places(node.filename, SUFFIX):
        try:
            found = bitmap_file.read(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Damaged as error:
            log.warning("%s", error)
            damaged = error
            continue
        if found is not None and (file is None or found.generation > file.generation):
            file = found
    generation = file.generation if file is not None else 0
    token = node.bitmap_token() if node.stores_bitmaps else b""
    if node.stores_bitmaps and not (file and file.in_use and token and file.token == token):
        return _in_image(node, file, damaged), generation, b""
    if damaged is not None:
        gone = [Bitmap(name, node.size, granularity) for name, granularity in damaged.names]
        for bitmap in gone:
            _distrusted(bitmap, f"its file is {damaged.what}")
        return gone, generation, b""
    if file is None:
        return [], 0, b""
    why = _objection(node, file)
    bitmaps = []
    lost = node.stores_bitmaps and any(e.inconsistent for e in file.entries)
    stored = {b.name: b for b in node.read_bitmaps()} if lost else {}
    for entry in file.entries:
        if entry.kind == "dirty" and entry.inconsistent and entry.name in stored:
            bitmap = stored[entry.name]
            _distrusted(bitmap, bitmap.reason or "nobody kept it for a while")
            bitmaps.append(bitmap)
        elif entry.kind == "dirty":
            bitmap = Bitmap(entry.name, node.size if entry.bits else 0, entry.granularity)
            bitmap.recording, bitmap.guarded = entry.recording, entry.guarded
            bitmap.since = entry.since
            bitmap.replace(fitted(entry.bits, len(bitmap.bits)))
            if entry.inconsistent:
                _distrusted(bitmap, "nobody kept it for a while")
            elif why:
                _distrusted(bitmap, why)
            bitmaps.append(bitmap)
    return bitmaps, generation, file.token if node.stores_bitmaps else b""


def _in_image(node: Node, file: Contents | None, damaged: Damaged | None) -> list[Bitmap]:
    """What an image with room for bitmaps says itself."""
    why = "it was in use by a program that did not close the image"
    if damaged is not None:
        why = f"its file is {damaged.what}"
    elif file is not None and file.in_use:
        why = "the image was changed by another program"
    bitmaps = node.read_bitmaps()
    for bitmap in bitmaps:
        if bitmap.inconsistent and not bitmap.reason:
            bitmap.reason = why
    return bitmaps


def _objection(node: Node, file: Contents) -> str:
    """Why a file is not about this image as it is; empty if it is."""
    if node.size not in (file.size, file.next_size):
        return f"it is of another size: {file.size} bytes, and the image has {node.size}"
    if node.stores_bitmaps:  # the image has its token
        return ""
    now = stamp(node)
    if (now.inode, now.version) != (file.stamp.inode, file.stamp.version):
        return "it is of another image"
    if not file.in_use and now.mtime_ns != file.stamp.mtime_ns:
        return "the image was changed by another program"
    return ""


def _distrusted(bitmap: Bitmap, why: str) -> None:
    bitmap.inconsistent = True
    bitmap.reason = why


def can_keep(node: Node) -> bool:
    """Whether the node can have persistent bitmaps: a format, right over a local file or device."""
    if node.filter or node.file is None:
        return False
    return node.from_start and node.file.file is None and node.file.fd >= 0


def _file(node: Node) -> Node:
    """The node of the host file that the image is."""
    assert node.file is not None
    return node.file


def _bits(bitmap: Bitmap) -> bitarray:
    """Its bits at this moment."""
    with bitmap.lock:
        return bitmap.bits.copy()
