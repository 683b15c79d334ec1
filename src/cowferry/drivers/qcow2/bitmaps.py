"""Dirty bitmaps inside the image: reading them with suspicion, and changing them all or none.

The directory (`bitmap_directory.py`) names the bitmaps and their places. The whole is valid only
while the autoclear bit 0 is set: a program that writes to the image and does not know bitmaps has
cleared it.

**Changing them.** What differs from what is stored goes into new clusters, the directory, too; when
that is durable, with its refcounts, sector 0 changes in one write, and then the old clusters are
given back. If nothing but flags differs they are changed where they are, each by itself: this takes
no room, so an image whose refcounts are wrong can be opened to be repaired.

**In use.** While an image is open for writing its bitmaps are kept elsewhere and those stored are
flagged in_use, so others do not trust them. Our own mark says who keeps them: a private header
extension, 0x434F5746 ("COWF"), with 16 bytes of the keeper's, and the autoclear bit 63. Whoever
else opens the image for writing clears that bit, for he does not know it; extensions that he does
not know he leaves. So the token counts only with the bit, and then nobody else has written.
From rest to in use the mark comes first and the flags after it, and back the other way round, so
that there is no moment when flags are set and nobody is named.

**Nobody keeps them.** Until a keeper says that it does, an image that is open for writing hands out
no lease for writing in place, and the first change flags what records in use (`give_up`, B1).

**What we do not understand** (other types, flags, extra data) stays as it is, byte for byte.

**Damage.** A damaged bitmap is listed as inconsistent, with the reason. The next time the directory
is written it gets an empty table and the flag in_use, so that other programs can open the image and
remove the bitmap. Its old clusters are not given back, because they may be another owner's; they
leak until `check -r`.

Source: the qcow2 specification, sections Bitmaps extension and Bitmaps.
"""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bitarray import bitarray

from cowferry.block.bitmap import MOST_TOLD, Bitmap
from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2 import sources
from cowferry.drivers.qcow2.bitmap_directory import (
    ALL_ONES,
    AUTO,
    EXTENSION,
    EXTRA_COMPATIBLE,
    IN_USE,
    MAX_BITMAPS,
    MAX_BYTES,
    MAX_DIRECTORY,
    MAX_NAME,
    Directory,
    Entry,
    clusters,
    clusters_for,
    directory,
    look,
    own_places,
    places,
    text,
)
from cowferry.drivers.qcow2.refcounts import swapped
from cowferry.errors import CowferryError, ImageError, NotSupported

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

log = logging.getLogger(__name__)

TOKEN = 16  # bytes
BATCH = 1 << 20  # bytes of bits that are written at once


# Reading ------------------------------------------------------------------------------------


def read(image: Qcow2) -> list[Bitmap]:
    """What `Node.read_bitmaps` says. One that cannot be used has no bits if they do not fit."""
    out = []
    _warn_of_stale(image)
    for entry in directory(image):
        need = clusters_for(image.size, entry.granularity_bits, image.header.cluster_bits)
        usable = entry.usable and len(entry.table) == need
        bits = min(max(entry.granularity_bits, 9), 31)
        bitmap = Bitmap(entry.shown, image.size if usable else 0, 1 << bits, persistent=True)
        bitmap.recording = bool(entry.flags & AUTO)
        bitmap.inconsistent = not entry.usable or bool(entry.flags & IN_USE)
        if entry.flaw:
            bitmap.reason = f"it is damaged: {entry.flaw}"
        elif entry.unread:
            bitmap.reason = entry.unread
        elif not entry.understood:
            bitmap.reason = "it is of a kind that only the program that made it knows"
        if usable:
            _load(image, entry, bitmap.bits)
            bitmap.ones = bitmap.bits.count()
        out.append(bitmap)
    sources.read(image.header, out)
    return out


def _load(image: Qcow2, entry: Entry, bits: bitarray) -> None:
    """Into `bits`, which are clear. Of each byte the lowest bit comes first."""
    count = len(bits)
    step = image.cluster_size * 8
    for start, word in zip(range(0, count, step), entry.table, strict=True):
        stop = min(start + step, count)
        if word == ALL_ONES:
            bits[start:stop] = True
        elif word:
            data = bytearray((stop - start + 7) // 8)
            image.file.pread(memoryview(data), word)
            piece = bitarray(endian="little")
            piece.frombytes(bytes(data))
            bits[start:stop] = piece[: stop - start]


def info(image: Qcow2) -> list[dict[str, Any]]:
    """QMP: a list of Qcow2BitmapInfo, as qemu-img's info shows it."""
    try:
        found = look(image)
    except CowferryError as error:
        log.warning("%s", error.desc)
        return []
    _tell_of_problem(image, found)
    words = ((IN_USE, "in-use"), (AUTO, "auto"))
    return [
        {
            "flags": [word for flag, word in words if (e.flags | IN_USE * bool(e.flaw)) & flag],
            "name": e.shown,
            "granularity": 1 << min(e.granularity_bits, 63),
        }
        for e in found.entries
    ]


def _tell_of_problem(image: Qcow2, found: Directory) -> None:
    if found.problem:
        log.error(
            "'%s': %s: the rest of the directory cannot be used", image.filename, found.problem
        )


def _tell_of_damage(image: Qcow2, found: Directory) -> None:
    """No bitmap is lost in silence."""
    _tell_of_problem(image, found)
    damaged = [e for e in found.entries if e.flaw]
    for e in damaged[:MOST_TOLD]:
        log.error(
            "'%s': bitmap '%s' is damaged (%s) and cannot be used; the other bitmaps can",
            image.filename, e.shown, e.flaw,
        )  # fmt: skip
    if len(damaged) > MOST_TOLD:
        log.error("'%s': and so are %d more", image.filename, len(damaged) - MOST_TOLD)


def token(image: Qcow2) -> bytes:
    """What the keeper left, if nobody else opened the image for writing since; else b""."""
    h = image.header
    both = headers.BITMAPS_VALID | headers.BITMAPS_KEPT
    found = h.extension(headers.EXT_BITMAPS_KEPT) or b""
    return found if h.autoclear & both == both and len(found) == TOKEN else b""


# Opening for writing ------------------------------------------------------------------------


def prepare(image: Qcow2) -> int:
    """Get ready for the first write to the image. Return the autoclear bits that stay true.

    A directory that cannot be read, and bitmaps that another program let go stale, cannot be kept.
    Their clusters are not given back, because that program may have used them for something else;
    `check -r leaks` gives back those that nothing uses."""
    h = image.header
    try:
        found = look(image)
        _tell_of_damage(image, found)
        entries = found.entries
    except ImageError as error:
        log.error("%s: its bitmaps are lost", error.desc)
        entries = []
    _warn_of_stale(image)
    mark = token(image)
    stored = h.extension(headers.EXT_BITMAPS) if entries else None
    told = bool(entries) and sources.kept(h)
    if not told:
        h.extensions = sources.without(h.extensions)
    h.extensions = _extensions(h, stored, mark if entries else b"")
    note(image, entries)
    valid = headers.BITMAPS_VALID * bool(entries) | sources.VALID * told
    return valid | headers.BITMAPS_KEPT * bool(entries and mark)


def _warn_of_stale(image: Qcow2) -> None:
    h = image.header
    if h.extension(headers.EXT_BITMAPS) is not None and not h.autoclear & headers.BITMAPS_VALID:
        log.warning(
            "'%s': its bitmaps are void: a program that does not know them wrote to it",
            image.filename,
        )


def note(image: Qcow2, entries: list[Entry], kept: bool = False) -> None:
    """These are stored from now on."""
    with image.meta:
        image.metadata -= image.bitmap_clusters
        image.bitmap_clusters = set(places(image, entries))
        image.metadata |= image.bitmap_clusters
        image.unkept = not kept and any(e.tracks for e in entries)


def give_up(image: Qcow2) -> None:
    """The first change, and nobody keeps the bitmaps: those that should know of it are in use."""
    with image.flushing:
        if not image.unkept:
            return
        entries = [e.in_use() if e.tracks else e for e in directory(image)]
        _in_place(image, entries)
        image.unkept = False
    log.warning("'%s' is being written and nobody keeps its bitmaps: in use", image.filename)


# Changing -----------------------------------------------------------------------------------


def write(image: Qcow2, bitmaps: list[Bitmap], token: bytes = b"") -> None:
    """What `Node.write_bitmaps` says. Raises `CowferryError` if the format has no room for one."""
    if image.header.version < 3:
        raise NotSupported(f"'{image.filename}': a version 2 image has no room for bitmaps")
    if len(token) not in (0, TOKEN):
        raise ValueError(f"a token of {len(token)} bytes")
    if bitmaps:
        _make_room(image)
    beside = [
        (headers.EXT_BITMAPS, bytes(EXTENSION.size)),
        (headers.EXT_BITMAPS_KEPT, bytes(TOKEN)),
    ]
    with image.flushing, sources.recorded(image, bitmaps, beside):
        old = look(image)
        try:
            _store(image, old, bitmaps, token)
        except OSError:  # no room, perhaps: while they are in use the stored bits do not count
            entries = _stored(image, old.entries, bitmaps) if token else None
            if entries is None:
                raise
            _flags(image, old.entries, entries, token)


def _make_room(image: Qcow2) -> None:
    """QEMU has a backing name right behind the extensions, if clusters are small: move it away."""
    h = image.header
    try:
        fits(h, _extensions(h, bytes(EXTENSION.size), bytes(TOKEN)))
    except NotSupported:
        if h.backing_file is not None:
            image.set_backing(h.backing_file, h.backing_format)


def _store(image: Qcow2, old: Directory, bitmaps: list[Bitmap], token: bytes) -> None:
    """All of it. Under `flushing`."""
    known = {e.shown: e for e in old.entries}
    fresh = Fresh(image)
    try:
        made = (_entry(image, fresh, b, known.get(b.name), bool(token)) for b in bitmaps)
        entries = [e for e in made if e is not None]
        if old.sound and _same_but_flags(entries, old.entries):
            assert not fresh.taken
            return _flags(image, old.entries, entries, token)
        extensions = _publish(image, fresh, entries, token)
    except BaseException:
        fresh.undo()
        raise
    _replace(image, entries, extensions, kept=bool(token))


def _publish(
    image: Qcow2, fresh: Fresh, entries: list[Entry], token: bytes
) -> list[tuple[int, bytes]]:
    """Write a directory, durably; the header extensions that will name it. Under `flushing`."""
    data = b"".join(e.encode() for e in entries)
    if len(entries) > MAX_BITMAPS or len(data) > MAX_DIRECTORY:
        raise CowferryError(f"'{image.filename}': too many bitmaps ({len(entries)})")
    extension = fresh.directory(len(entries), data) if entries else None
    extensions = _extensions(image.header, extension, token if entries else b"")
    fits(image.header, extensions)
    image._write_tables()
    return extensions


def _replace(
    image: Qcow2, entries: list[Entry], extensions: list[tuple[int, bytes]], kept: bool
) -> None:
    """Let the header name a directory that is durable; what only the old one named goes."""
    gone = image.bitmap_clusters
    _switch(image, extensions)
    note(image, entries, kept=kept)
    give_back(image, gone - image.bitmap_clusters)


def mend(image: Qcow2, bad: Mapping[int, str], problem: str) -> list[str]:
    """Make damaged bitmaps such that other programs can open the image and remove them.

    `bad` are the numbers in the directory of bitmaps whose clusters may be another owner's, and
    why; `problem` is what is wrong with the directory itself. Returns what was done. Takes
    `flushing`. Raises `OSError`, `CowferryError`; then the old directory is in force."""
    done: list[str] = []
    if problem:
        done.append(f"Repairing: {problem}: a new directory has the bitmaps that can be read")
    with image.flushing:
        mine = token(image)
        try:
            found = look(image)
        except ImageError:
            found = Directory()
        note(image, found.entries, kept=bool(mine))
        if problem and found.size:
            image.bitmap_clusters -= set(clusters(image, found.offset, found.size))
        fresh = Fresh(image)
        try:
            entries = []
            for number, entry in enumerate(found.entries):
                why = entry.flaw or bad.get(number, "")
                if not why or entry.unread:
                    entries.append(entry)
                    continue
                done.append(
                    f"Repairing: bitmap '{entry.shown}' is damaged ({why}): it is kept without its "
                    "bits, as inconsistent; cowferry bitmap --remove removes it"
                )
                image.bitmap_clusters -= set(own_places(image, entry))
                emptied = _emptied(image, fresh, entry)
                if emptied is not None:
                    entries.append(emptied)
            if not done:
                return done
            extensions = _publish(image, fresh, entries, mine)
        except BaseException:
            fresh.undo()
            raise
        _replace(image, entries, extensions, kept=bool(mine))
    return done


def _emptied(image: Qcow2, fresh: Fresh, entry: Entry) -> Entry | None:
    """A damaged bitmap without its bits, in use by nothing known; None for a disk without bytes."""
    bits = entry.granularity_bits if 9 <= entry.granularity_bits <= 31 else 16
    while clusters_for(image.size, bits, image.header.cluster_bits) << image.header.cluster_bits > (
        MAX_BYTES
    ):
        bits += 1
    need = clusters_for(image.size, bits, image.header.cluster_bits)
    if not need:
        return None
    name = entry.name if text(entry.name) == entry.shown else entry.shown.encode()
    table = array("Q", bytes(8 * need))
    flags = entry.flags & AUTO | IN_USE
    return Entry(name, bits, flags, fresh.table(table), table, shown=entry.shown)


def _stored(image: Qcow2, old: list[Entry], bitmaps: list[Bitmap]) -> list[Entry] | None:
    """The entries that are stored, in use, if they are those of the bitmaps but for the bits."""
    if [e.shown for e in old] != [b.name for b in bitmaps]:
        return None
    out = []
    for e, b in zip(old, bitmaps, strict=True):
        if e.raw and b.inconsistent:
            out.append(e.in_use() if e.understood else e)
            continue
        need = clusters_for(image.size, e.granularity_bits, image.header.cluster_bits)
        alike = 1 << e.granularity_bits == b.granularity and len(e.table) == need
        if not (e.usable and alike):
            return None
        out.append(replace(e, flags=e.flags & EXTRA_COMPATIBLE | AUTO * b.recording | IN_USE))
    return out


def _entry(
    image: Qcow2, fresh: Fresh, bitmap: Bitmap, old: Entry | None, used: bool
) -> Entry | None:
    """The entry for a bitmap; what of `old` is still right stays where it is. None: there can be
    none, because the bitmap was damaged and the disk has no bytes."""
    if bitmap.inconsistent and old is not None:
        if not old.flaw:
            return old.in_use() if old.understood else old
        return _emptied(image, fresh, old)
    name = bitmap.name.encode()
    if old is not None and not old.flaw:
        name = old.name
    bits = bitmap.granularity.bit_length() - 1
    if not 1 <= len(name) <= MAX_NAME:
        raise CowferryError(f"a bitmap's name of {len(name)} bytes cannot be stored")
    if not 9 <= bits <= 31:
        raise CowferryError(f"bitmap '{bitmap.name}': granularity {1 << bits} cannot be stored")
    need = clusters_for(image.size, bits, image.header.cluster_bits)
    if not need or need * image.cluster_size > MAX_BYTES:
        raise CowferryError(
            f"bitmap '{bitmap.name}' of a disk of {image.size} bytes cannot be stored",
            "use a coarser granularity" if need else "the disk has no bytes",
        )
    if old is not None and not (old.usable and old.granularity_bits == bits):
        old = None
    flags = AUTO * bitmap.recording | IN_USE * (used or bitmap.inconsistent)
    if bitmap.inconsistent:
        table = array("Q", bytes(8 * need))
    else:
        if bitmap.size != image.size:
            raise CowferryError(
                f"bitmap '{bitmap.name}' is of a disk of {bitmap.size} bytes, and "
                f"'{image.filename}' has {image.size}"
            )
        table = fresh.bits(bitmap, need, old.table if old is not None else array("Q"))
    if old is not None:
        flags |= old.flags & EXTRA_COMPATIBLE
        if old.table == table:
            return replace(old, flags=flags)
    extra = old.extra if old is not None else b""
    return Entry(name, bits, flags, fresh.table(table), table, extra=extra, shown=bitmap.name)


def _same_but_flags(entries: list[Entry], old: list[Entry]) -> bool:
    return [replace(e, flags=0) for e in entries] == [replace(e, flags=0) for e in old]


class Fresh:
    """Clusters that are filled before anything refers to them. Under `flushing`."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.taken: list[tuple[int, int]] = []  # (cluster, how many)

    def bits(self, bitmap: Bitmap, need: int, old: array[int]) -> array[int]:
        """The table of a bitmap, whose clusters are where `old` has them, if they are the same."""
        image, size = self.image, self.image.cluster_size
        table = array("Q", bytes(8 * need))
        batch: list[tuple[int, bytes]] = []
        was = bytearray(size)
        for i in range(need):
            with bitmap.lock:
                piece = bitmap.bits[i * size * 8 : (i + 1) * size * 8]
            word = old[i] if i < len(old) else 0
            data = b""
            if word > ALL_ONES:
                data = piece.tobytes().ljust(size, b"\0")
                image.file.pread(memoryview(was), word)
            if (was == data) if word > ALL_ONES else (word and piece.all()):
                table[i] = word
            elif len(piece) == size * 8 and piece.all():  # a disk that grows has no ones behind it
                table[i] = ALL_ONES
            elif piece.any():
                batch.append((i, data or piece.tobytes().ljust(size, b"\0")))
                if len(batch) * size >= BATCH:
                    self._place(table, batch)
                    batch = []
        self._place(table, batch)
        return table

    def _place(self, table: array[int], batch: list[tuple[int, bytes]]) -> None:
        while batch:
            with self.image.meta:
                first, count = self.image.refcounts.allocate(len(batch))
                self._took(first, count)
            host = first << self.image.header.cluster_bits
            self.image._write(host, b"".join(data for _, data in batch[:count]))
            for number, (i, _) in enumerate(batch[:count]):
                table[i] = host + number * self.image.cluster_size
            batch = batch[count:]

    def table(self, words: array[int]) -> int:
        """Where a table lies from now on."""
        return self.row(swapped(words))

    def directory(self, number: int, data: bytes) -> bytes:
        """The header extension for a directory of these bytes."""
        return EXTENSION.pack(number, 0, len(data), self.row(data))

    def row(self, data: bytes) -> int:
        """Return the host offset where `data` lies from now on, in clusters in a row."""
        size = self.image.cluster_size
        count = -(-len(data) // size)
        with self.image.meta:
            first = self.image.refcounts.contiguous(count)
            self._took(first, count)
        self.image._write(first * size, data.ljust(count * size, b"\0"))
        return first * size

    def _took(self, first: int, count: int) -> None:
        self.taken.append((first, count))
        self.image.metadata.update(range(first, first + count))

    def undo(self) -> None:
        """Nothing refers to them."""
        with self.image.meta:
            free = self.image.refcounts.settle(self.taken)
            self.image._punch(free)
        self.taken = []


def give_back(image: Qcow2, gone: set[int]) -> None:
    """The header has let go of these clusters, durably. Under `flushing`."""
    if not gone:
        return
    with image.meta:
        free = image.refcounts.settle([(cluster, 1) for cluster in sorted(gone)])
        image._punch(free)
    with contextlib.suppress(OSError):  # the change has been made: a later flush tells
        image._write_tables()


def _extensions(
    h: headers.Header, bitmaps: bytes | None = None, token: bytes = b""
) -> list[tuple[int, bytes]]:
    """The header's extensions with these two of ours."""
    ours = (headers.EXT_BITMAPS, headers.EXT_BITMAPS_KEPT)
    out = [e for e in h.extensions if e[0] not in ours]
    if bitmaps is not None:
        out.append((headers.EXT_BITMAPS, bitmaps))
    if token:
        out.append((headers.EXT_BITMAPS_KEPT, token))
    return out


def fits(h: headers.Header, extensions: list[tuple[int, bytes]]) -> None:
    """Raises `NotSupported` if sector 0 has no room for these extensions."""
    headers.layout(replace(h, extensions=extensions), h.backing_offset)


def _switch(image: Qcow2, extensions: list[tuple[int, bytes]]) -> None:
    """One durable write of sector 0. If it fails nobody knows, and nothing is given back."""
    h = image.header
    with image.meta:
        was = h.extensions, h.autoclear
        set_extensions(h, extensions)
        try:
            image.write_header()
        except BaseException:
            h.extensions, h.autoclear = was
            raise


def set_extensions(h: headers.Header, extensions: list[tuple[int, bytes]]) -> None:
    """Extensions, and the autoclear bits that say that those of bitmaps are right."""
    h.extensions = extensions
    kinds = {kind for kind, _ in extensions}
    h.autoclear &= ~(headers.BITMAPS_VALID | headers.BITMAPS_KEPT)
    h.autoclear |= headers.BITMAPS_VALID * (headers.EXT_BITMAPS in kinds)
    h.autoclear |= headers.BITMAPS_KEPT * (headers.EXT_BITMAPS_KEPT in kinds)
    h.autoclear = h.autoclear & ~sources.VALID | sources.VALID * (sources.EXTENSION in kinds)


def _flags(image: Qcow2, old: list[Entry], entries: list[Entry], token: bytes) -> None:
    """Nothing but flags changes, and who keeps them. Under `flushing`."""
    h = image.header
    if not entries:
        return
    extensions = _extensions(h, h.extension(headers.EXT_BITMAPS), token)
    fits(h, extensions)
    if token:  # the mark before the flags
        _switch(image, extensions)
    if entries != old:
        _in_place(image, entries)
    if not token and extensions != h.extensions:
        _switch(image, extensions)
    note(image, entries, kept=bool(token))


def _in_place(image: Qcow2, entries: list[Entry]) -> None:
    """The directory where it is; only flags differ, which no tear cuts through."""
    extension = image.header.extension(headers.EXT_BITMAPS)
    assert extension is not None
    _, _, size, offset = EXTENSION.unpack(extension)
    data = b"".join(e.encode() for e in entries)
    image._write(offset, data[:size])
    image.file.flush()


def grown(image: Qcow2, size: int, fresh: Fresh) -> tuple[list[Entry], list[tuple[int, bytes]]]:
    """The bitmaps of a disk of `size` bytes, larger than it is, and the extensions that say so.

    What is new counts as clean. Raises `CowferryError` for a bitmap that cannot grow."""
    h = image.header
    mine = token(image)
    entries = []
    old = directory(image)
    for entry in old:
        bits = entry.granularity_bits
        have, need = (clusters_for(s, bits, h.cluster_bits) for s in (image.size, size))
        stale = entry.flags & IN_USE and not mine
        if not entry.usable or stale or len(entry.table) != have:
            what = "is inconsistent and cannot be resized with the disk"
        elif need << h.cluster_bits > MAX_BYTES:
            what = "would be too large"
        else:
            if need > have:
                table = entry.table + array("Q", bytes(8 * (need - have)))
                entry = replace(entry, table=table, table_offset=fresh.table(table))
            entries.append(entry)
            continue
        raise CowferryError(
            f"'{image.filename}': bitmap '{entry.shown}' {what}",
            "remove the bitmap first; nothing was changed",
        )
    if entries == old:
        return old, h.extensions
    data = b"".join(e.encode() for e in entries)
    return entries, _extensions(h, fresh.directory(len(entries), data), mine)
