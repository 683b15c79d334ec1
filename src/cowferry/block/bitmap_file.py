"""The bitmap file: bits about an image, in a file beside it (`docs/bitmaps.md` has each field).

An image whose format has no room for bitmaps has them in `IMAGE.bitmaps`; every image has them
there while it is written, because a file of our own can be marked in place, a few sectors and one
fdatasync at a time. A raw image that is still being filled from another one has `IMAGE.filling`,
in the same format: which of its granules it holds already.

There is one way to make or replace the file, `write`: a new file, flushed, renamed into place, the
folder flushed. A crash leaves the old file or the new one. Where only the header changes, because a
file at rest is taken into use, the header's sector is written in place: this needs no room. If
nothing else has happened until the file comes to rest, the old header is put back, and every byte
is as it was. And there is one way to change the bits, `Marks`: the sectors of some bits are written
in place. Sectors do not tear, so a crash leaves each of them as it was before or after. Bits whose
meaning is "perhaps" may be so.

The checksums of the bits count in a file *at rest* only. One *in use* has bits that somebody was
setting, and that may say more than they have to, never less. One that is *void* does not count at
all: it was about to be removed.

Nothing that a file says is believed before it is checked, and no more is allocated than `MAX_BITS`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
import zlib
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from bitarray import bitarray

from cowferry.block import moves, names, sysio
from cowferry.block.barrier import Barrier
from cowferry.block.bitmap import Bitmap
from cowferry.block.origin import PRIVATE, Origin
from cowferry.errors import ImageError

MAGIC = b"CFBITMAP"
VERSION = 1
SECTOR = 512
UNIT = 8 * SECTOR  # bits in a sector
ALIGN = 4096  # of each bitmap's bits in the file
MAX_BITMAPS = 65535
MAX_NAME = 1023  # bytes
MAX_BACKING = 4095  # bytes
MAX_DIRECTORY = 8 << 20
MAX_BITS = 512 << 20  # bytes of bits in one file
MIN_GRANULARITY, MAX_GRANULARITY = 512, 1 << 31

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errnos that say that there is no room

AT_REST, IN_USE, VOID = 0, 1, 2  # what state a file is in
KINDS = ("dirty", "allocated")
RECORDING, GUARDED, INCONSISTENT = 1, 2, 4  # flags of a bitmap
NO_SIZE = (1 << 64) - 1
SINCE = 1  # compatible feature: the directory ends with the backup that each bitmap counts from
ID = 16  # bytes of that

# magic, version, header length, incompatible, compatible; state, bitmaps, generation, token;
# size, next size, inode, mtime_ns, region; directory: offset, length, crc32; backing name, format;
# version of the inode
HEADER = struct.Struct("<8sIIQQ IIQ16s QQQqQ QII HHI")
CHECKSUM = struct.Struct("<I")  # of all bytes of the sector before it, in its last four bytes
# offset and length of the bits, their crc32, kind, granularity, flags, bytes of the name
ENTRY = struct.Struct("<QQIIIIH6x")


class Stamp(NamedTuple):
    """What ties a file to an image: the image's inode and its time of change, 0 for a device.

    `version` tells it from an older file that had the same inode number (FS_IOC_GETVERSION); 0
    where a file system has no such thing. `inode` of a device is of what is known of it, or 0."""

    inode: int = 0
    mtime_ns: int = 0
    version: int = 0


NO_STAMP = Stamp()


def stamp_of(fd: int) -> Stamp:
    """Return the stamp that ties a bitmap file to the image in `fd` as the image is now."""
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode):
        return Stamp(names.of_device(st.st_rdev))
    return Stamp(st.st_ino, st.st_mtime_ns, names.version(fd))


@dataclass
class Entry:
    """One bitmap. `granularity` in bytes; one bit for each granule, little-endian.

    `recording`: it follows writes; `guarded`: regions are marked before a write, although writes
    are not recorded; `inconsistent`: it was not kept for a while and may be removed, no more. Then
    it may have no bits."""

    name: str
    kind: str  # one of KINDS
    granularity: int
    bits: bitarray
    recording: bool = True
    guarded: bool = False
    inconsistent: bool = False
    since: bytes = b""  # 16 bytes: see `Bitmap.since`


@dataclass
class Contents:
    """What a file says. `size` is the image's, in bytes; the bits are for the larger of it and
    `next_size`, which an image has instead that was about to be resized.

    `backing` is the name and format of the image that has the granules without a bit, if this is
    `IMAGE.filling`."""

    size: int
    generation: int = 1
    token: bytes = bytes(16)
    in_use: bool = False
    stamp: Stamp = NO_STAMP
    region: int = 0  # bytes that are marked together, 0 if nothing is
    backing: tuple[str, str] | None = None
    entries: list[Entry] = field(default_factory=list)
    next_size: int | None = None

    def bits(self, granularity: int) -> int:
        """How many a bitmap of this image has."""
        return -(-max(self.size, self.next_size or 0) // granularity)


class Damaged(ImageError):
    """A file that cannot be used. `names` are those of its bitmaps, as far as they can be told."""

    def __init__(self, path: str, what: str, names: list[tuple[str, int]] | None = None) -> None:
        super().__init__(
            f"'{path}': the bitmap file is {what}",
            "the image is intact; its bitmaps are not: remove them, and make a full backup",
        )
        self.what = what
        self.names = names or []  # (name, granularity)


class Unknown(ImageError):
    """A sound file of a version or with a feature that we do not know."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(
            f"'{path}': the bitmap file has {what}, which this version of cowferry does not know",
            "use the version that made it; or remove the file, and the bitmaps in it, to go on "
            "without",
        )


def read(path: str) -> Contents | None:
    """What the file says; None if it is void.

    Raises `Damaged` (an `ImageError`; cut short, damaged, absurd), `Unknown` (an `ImageError`),
    `OSError` if it cannot be read, FileNotFoundError if it is not there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise Damaged(path, "no file")
        return _read(path, fd, st.st_size)
    finally:
        os.close(fd)


def _read(path: str, fd: int, length: int) -> Contents | None:
    sector = os.pread(fd, SECTOR, 0)
    if len(sector) < SECTOR:
        raise Damaged(path, f"cut short: {length} bytes")
    (magic, version, header_length, incompatible, compatible, state, count, generation, token,
     size, next_size, inode, mtime_ns, region,
     at, directory_length, directory_crc, name_length, format_length, inode_version,
     ) = HEADER.unpack_from(sector)  # fmt: skip
    if magic != MAGIC:
        raise Damaged(path, "no bitmap file: it does not begin like one")
    if zlib.crc32(sector[:-4]) != CHECKSUM.unpack_from(sector, SECTOR - 4)[0]:
        raise Damaged(path, "damaged: its header's checksum is wrong")
    if version != VERSION:
        raise Unknown(path, f"version {version}")
    if incompatible:
        raise Unknown(path, f"features {incompatible:#x}")
    if state == VOID:
        return None
    if header_length < HEADER.size or header_length > SECTOR - 4:
        raise Damaged(path, f"damaged: a header of {header_length} bytes")
    if state not in (AT_REST, IN_USE):
        raise Damaged(path, f"damaged: there is no state {state}")
    if size >> 63 or (next_size != NO_SIZE and next_size >> 63):
        raise Damaged(path, "damaged: no image has its size")
    if generation >> 63:
        raise Damaged(path, f"damaged: no image was opened {generation} times")
    if count > MAX_BITMAPS or directory_length > MAX_DIRECTORY or at < SECTOR:
        raise Damaged(path, f"damaged: {count} bitmaps, {directory_length} bytes about them")
    if at + directory_length > length:
        raise Damaged(path, f"cut short: {length} bytes, its directory ends later")
    directory = os.pread(fd, directory_length, at)
    if len(directory) < directory_length or zlib.crc32(directory) != directory_crc:
        raise Damaged(path, "damaged: its directory's checksum is wrong")
    contents = Contents(
        size=size,
        generation=generation,
        token=token,
        in_use=state == IN_USE,
        stamp=Stamp(inode, mtime_ns, inode_version),
        region=region,
        next_size=None if next_size == NO_SIZE else next_size,
    )
    try:
        if name_length:
            name = directory[:name_length].decode()
            contents.backing = name, directory[name_length:][:format_length].decode()
        places = _entries(contents, directory, name_length + format_length, count, compatible)
    except (ValueError, struct.error) as error:
        raise Damaged(path, f"damaged: {error}") from None
    names = [(e.name, e.granularity) for e, *_ in places]
    if any(n and offset + n > length for _, offset, n, _ in places):
        raise Damaged(path, f"cut short: {length} bytes, its bits end later", names)
    for e, offset, n, crc in places:
        bits = os.pread(fd, n, offset)
        if len(bits) < n:
            raise Damaged(path, "cut short while it was read", names)
        if not contents.in_use and zlib.crc32(bits) != crc:
            raise Damaged(path, f"damaged: the checksum of bitmap '{e.name}' is wrong", names)
        e.bits.frombytes(bits)
        del e.bits[contents.bits(e.granularity) :]
        contents.entries.append(e)
    return contents


def _entries(
    contents: Contents, directory: bytes, at: int, count: int, compatible: int
) -> list[tuple[Entry, int, int, int]]:
    """(bitmap without its bits, their offset, length and checksum). Raises `ValueError`."""
    places = []
    total = 0
    seen: set[str] = set()
    for _ in range(count):
        at = -(-at // 8) * 8
        offset, n, crc, kind, granularity, flags, length = ENTRY.unpack_from(directory, at)
        at += ENTRY.size
        name = directory[at : at + length].decode()
        at += length
        if at > len(directory) or not 0 < length <= MAX_NAME or name in seen:
            raise ValueError("the name of a bitmap is wrong")
        seen.add(name)
        if kind >= len(KINDS):
            raise ValueError(f"bitmap '{name}' is of no known kind")
        if granularity & granularity - 1 or not (MIN_GRANULARITY <= granularity <= MAX_GRANULARITY):
            raise ValueError(f"bitmap '{name}' has granules of {granularity} bytes")
        total += n
        none = flags & INCONSISTENT and not n
        if (n != -(-contents.bits(granularity) // 8) and not none) or total > MAX_BITS:
            raise ValueError(f"bitmap '{name}' has {n} bytes of bits")
        if offset < SECTOR or offset % ALIGN:
            raise ValueError(f"bitmap '{name}' has its bits at {offset}")
        entry = Entry(
            name,
            KINDS[kind],
            granularity,
            bitarray(endian="little"),
            recording=bool(flags & RECORDING),
            guarded=bool(flags & GUARDED),
            inconsistent=bool(flags & INCONSISTENT),
        )
        places.append((entry, offset, n, crc))
    ids = directory[-(-at // 8) * 8 :]
    if compatible & SINCE and len(ids) >= ID * count:
        for number, (entry, *_) in enumerate(places):
            found = ids[number * ID : (number + 1) * ID]
            entry.since = found if any(found) else b""
    return places


def write(path: str, contents: Contents, like: Origin = PRIVATE) -> None:
    """Make or replace the file, durably. On an error the old or the new one is there.

    The file gets the permissions `like`: those of the image (`origin.beside`). One caller at a time
    for each path. Raises `OSError`, and `ImageError` for bitmaps that are too many or too large."""
    Marks(path, contents, like).close()


class Marks:
    """A file that was just written and is open, to be marked in place.

    The bits of `contents` are the picture in memory of what the file holds, and changed by us
    alone. Thread-safe: `set` and `replace` may come while a `flush` runs."""

    def __init__(
        self, path: str, contents: Contents, like: Origin = PRIVATE, *, at_rest: bool = False
    ) -> None:
        """`write`, and keep it open. Raises as that does.

        `at_rest`: the file that is there may be at rest, and say the same. Then it is taken into
        use by its header, and `put_back` undoes that."""
        self.path = path
        self.contents = contents
        self._fd = -1
        self._old = b""  # the header of the file that was adopted, while no other byte has changed
        sector, directory, places = _layout(path, contents)
        self._offsets = {id(e): offset for e, offset in zip(contents.entries, places, strict=True)}
        # Duty: what is written of a sector is the picture, and no older one is written after it.
        self._writing = threading.Lock()
        folder = os.path.dirname(os.path.abspath(path))
        if folder == moves.state_folder():
            moves.make_folder(folder)
        new = f"{path}.new"
        with contextlib.suppress(FileNotFoundError):
            sysio.unlink(new)  # of somebody who crashed
        if at_rest and self._adopt(sector, directory):
            return
        try:
            self._replace(new, sector, directory, like)
        except OSError as error:
            if error.errno not in FULL or not self._adopt(sector, directory):
                raise
            return
        try:
            sysio.flush_directory(folder)
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise

    def _replace(self, new: str, sector: bytes, directory: bytes, like: Origin) -> None:
        """Write the file anew, as `new`, and let it have the name."""
        self._fd = sysio.create(new, os.O_RDWR | os.O_EXCL | os.O_NOFOLLOW, like)
        self._barrier = Barrier(self._fd)
        try:
            sysio.pwrite(self._fd, directory, SECTOR)
            # With the rest of the last sector: marking lets nothing grow.
            for e in self.contents.entries:
                self._put(e, 0, len(e.bits))
            sysio.pwrite(self._fd, sector, 0)
            sysio.fdatasync(self._fd)
            sysio.rename(new, self.path)
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):
                sysio.unlink(new)
            raise

    def _adopt(self, sector: bytes, directory: bytes) -> bool:
        """Use the file that is there, if it only has to say that it is in use: that needs no room.

        Return False, and leave it as it was, if more of it differs."""
        if not self.contents.in_use:
            return False
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        places = [(self._offsets[id(e)], _sectors(e.bits)) for e in self.contents.entries]
        try:
            old = os.pread(fd, SECTOR, 0)
            there = os.pread(fd, len(directory), SECTOR)
            count = len(places)
            same = _unsummed(there, old, count) == _unsummed(directory, sector, count) and all(
                os.pread(fd, len(bits), offset) == bits for offset, bits in places
            )
            if same:
                sysio.take_room(
                    fd, 0, max([SECTOR + len(directory), *(o + len(b) for o, b in places)])
                )
                self._take_over(fd, old, _with_sum(sector, there), places)
        except OSError:
            same = False
        if same:
            self._fd, self._barrier = fd, Barrier(fd)
            if _state(old) == AT_REST:
                self._old = old
        else:
            os.close(fd)
        return same

    def put_back(self) -> bool:
        """Undo taking the file into use, durably, if no byte but the header has changed since.

        Return False if the file has to come to rest by being written. Raises `OSError`."""
        with self._writing:
            if not self._old or not self.named:
                return False
            sysio.pwrite(self._fd, self._old, 0)
            sysio.fdatasync(self._fd)
            return True

    @staticmethod
    def _take_over(fd: int, old: bytes, sector: bytes, places: list[tuple[int, bytes]]) -> None:
        """Write another header, durably. Raises `OSError`; then the old one is there, or this one.

        The bits are what they were, and written once more. A process before may have seen its
        fdatasync fail: then they are in memory only, and no later fdatasync writes them."""
        try:
            for offset, bits in places:
                sysio.pwrite(fd, bits, offset)
            sysio.pwrite(fd, sector, 0)
            sysio.fdatasync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                sysio.pwrite(fd, old, 0)
            raise

    def set(self, entry: Entry, first: int, stop: int) -> None:
        """Set the bits, in the picture and in the file; durable after `flush`."""
        with self._writing:
            stop = min(stop, len(entry.bits))
            if first < stop and entry.bits.find(0, first, stop) >= 0:
                entry.bits[first:stop] = True
                self._put(entry, first, stop)

    def replace(self, entry: Entry, bits: bitarray) -> None:
        """These bits instead, in the picture and in the file; durable after `flush`.

        Until then any sector may be found as it was. Bits that are missing are clear."""
        with self._writing:
            new = bits[: len(entry.bits)]
            new.extend(bitarray(len(entry.bits) - len(new), endian="little"))
            if len(bits) < len(new):
                new[len(bits) :] = False
            changed = entry.bits ^ new
            entry.bits[:] = new
            at = changed.find(1)
            while at >= 0:  # sectors that lie together are written at once
                first = at // UNIT
                stop = first + 1
                while changed.find(1, stop * UNIT, (stop + 1) * UNIT) >= 0:
                    stop += 1
                self._put(entry, first * UNIT, min(stop * UNIT, len(new)))
                at = changed.find(1, stop * UNIT)

    def _put(self, entry: Entry, first: int, stop: int) -> None:
        """Write the sectors that hold these bits, as they are in the picture."""
        self._old = b""
        a, b = first // UNIT, -(-stop // UNIT)
        step = (1 << 20) // SECTOR
        for at in range(a, b, step):
            part = _sectors(entry.bits[at * UNIT : min(at + step, b) * UNIT])
            try:
                sysio.pwrite(self._fd, part, self._offsets[id(entry)] + at * SECTOR)
            except OSError as error:
                self._barrier.fail(error)  # the picture is not what the file holds
                raise

    def flush(self) -> None:
        """All that was set before the call is durable on return; those who wait together wait for
        one fdatasync. Raises `OSError`, and goes on doing so once it has: write a new file then."""
        try:
            self._barrier.flush()
        except OSError as error:
            raise OSError(
                error.errno, f"the bitmap file '{self.path}' cannot be flushed: {error.strerror}"
            ) from None

    @property
    def named(self) -> bool:
        """Whether its name leads to it still."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def close(self) -> None:
        """Let the file go. Idempotent; does not flush."""
        if self._fd >= 0:
            self._barrier.close()
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)


def _unsummed(directory: bytes, sector: bytes, count: int) -> bytes:
    """A directory without the checksums of the bits: in a file in use they are out of date.

    Empty if it is not of this many bitmaps."""
    out = bytearray(directory)
    try:
        # Behind the backing file's name and format.
        at = sum(HEADER.unpack_from(sector)[-3:-1])
        for _ in range(count):
            at = -(-at // 8) * 8
            entry = list(ENTRY.unpack_from(out, at))
            entry[2] = 0
            ENTRY.pack_into(out, at, *entry)
            at += ENTRY.size + entry[6]
    except struct.error:
        return b""
    return bytes(out)


def _with_sum(sector: bytes, directory: bytes) -> bytes:
    """A header's sector for that directory."""
    fields = list(HEADER.unpack_from(sector))
    fields[-4] = zlib.crc32(directory)
    return _sealed(HEADER.pack(*fields))


def fitted(bits: bitarray, length: int) -> bitarray:
    """Return so many of the bits, with clear ones at the end if there are fewer. A copy."""
    fitted = bits[:length]
    have = len(fitted)
    fitted.extend(bitarray(length - have))
    fitted[have:] = False
    return fitted


def entry_of(bitmap: Bitmap, bits: bitarray) -> Entry:
    """Return what a bitmap file records about a bitmap."""
    return Entry(
        bitmap.name,
        "dirty",
        bitmap.granularity,
        bits,
        recording=bitmap.recording,
        guarded=bitmap.guarded,
        inconsistent=bitmap.inconsistent,
        since=bitmap.since,
    )


def placeholder(bitmap: Bitmap) -> Entry:
    """Return the entry of an inconsistent bitmap, without its bits: they have no use any more."""
    return replace(entry_of(bitmap, bitarray(endian="little")), inconsistent=True)


def _state(header: bytes) -> int:
    """Return the state that the header of a bitmap file records."""
    return int(HEADER.unpack_from(header)[5])


def _sectors(bits: bitarray) -> bytes:
    """Bits as they are written: whole sectors."""
    data = bits.tobytes()
    return data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0")


def remove(path: str) -> None:
    """Durably: nothing that may be there counts any more. Raises `OSError`.

    It is made void before its name goes, for the name may come back after a power cut."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no file", path)
            header = HEADER.pack(
                MAGIC, VERSION, HEADER.size, 0, 0, VOID, 0, 0, bytes(16), *[0] * 11
            )
            sysio.pwrite(fd, _sealed(header), 0)
            sysio.fdatasync(fd)
        finally:
            os.close(fd)
    for name in (path, f"{path}.new"):
        with contextlib.suppress(OSError):
            sysio.unlink(name)
            sysio.flush_directory(os.path.dirname(os.path.abspath(path)))


def _sealed(header: bytes) -> bytes:
    """The header's sector with its checksum."""
    sector = header.ljust(SECTOR - 4, b"\0")
    return sector + CHECKSUM.pack(zlib.crc32(sector))


def _layout(path: str, contents: Contents) -> tuple[bytes, bytes, list[int]]:
    """The header's sector, the directory, and where each bitmap's bits go. Raises `ImageError`."""
    name, format = (text.encode() for text in contents.backing or ("", ""))
    if len(name) > MAX_BACKING or len(format) > MAX_BACKING:
        raise ImageError(
            f"'{path}': the name of the backing file is longer than {MAX_BACKING} bytes"
        )
    names = [e.name.encode() for e in contents.entries]
    length = -(-(len(name) + len(format)) // 8) * 8
    length += sum(ENTRY.size + -(-len(n) // 8) * 8 for n in names)
    known = any(e.since for e in contents.entries)
    length += ID * len(names) if known else 0
    full = [e for e in contents.entries if e.bits or not e.inconsistent]
    total = sum(-(-contents.bits(e.granularity) // 8) for e in full)
    if len(names) > MAX_BITMAPS or length > MAX_DIRECTORY or total > MAX_BITS:
        raise ImageError(
            f"'{path}': {len(names)} bitmaps with {total >> 20} MiB of bits are too many",
            f"a bitmap file holds {MAX_BITS >> 20} MiB; use larger granules",
        )
    directory = bytearray(name + format)
    at = -(-(SECTOR + length) // ALIGN) * ALIGN
    places = []
    for e, text in zip(contents.entries, names, strict=True):
        if not 0 < len(text) <= MAX_NAME:
            raise ImageError(f"a bitmap's name has 1 to {MAX_NAME} bytes, not {len(text)}")
        bits = contents.bits(e.granularity) if e.bits or not e.inconsistent else 0
        assert len(e.bits) == bits, f"bitmap '{e.name}' has {len(e.bits)} bits, not {bits}"
        flags = RECORDING * e.recording | GUARDED * e.guarded | INCONSISTENT * e.inconsistent
        data = e.bits.tobytes()
        directory.extend(bytes(-len(directory) % 8))
        directory += ENTRY.pack(
            at, len(data), zlib.crc32(data), KINDS.index(e.kind), e.granularity, flags, len(text)
        )
        directory += text
        places.append(at)
        at += -(-len(data) // ALIGN) * ALIGN
    if known:
        directory.extend(bytes(-len(directory) % 8))
        directory += b"".join(e.since.ljust(ID, b"\0") for e in contents.entries)
    header = HEADER.pack(
        MAGIC, VERSION, HEADER.size, 0, SINCE if known else 0,
        IN_USE if contents.in_use else AT_REST, len(names), contents.generation, contents.token,
        contents.size, NO_SIZE if contents.next_size is None else contents.next_size,
        contents.stamp.inode, contents.stamp.mtime_ns, contents.region,
        SECTOR, len(directory), zlib.crc32(directory), len(name), len(format),
        contents.stamp.version,
    )  # fmt: skip
    return _sealed(header), bytes(directory), places
