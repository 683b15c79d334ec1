"""From which backups the bitmaps in a qcow2 image count (`block/lineage.py`).

The directory of the bitmaps has no room for it: QEMU refuses a bitmap with extra data. So there is
a private header extension, 0x434F5753 ("COWS"), with 24 bytes for each such bitmap: the first 8 of
the SHA-256 of its name, and the id of the backup. It counts as long as the autoclear bit 61 is set:
a program that does not know it, and opens the image for writing, may let a bitmap count from
elsewhere, and clears that bit. Without it nothing is known, and increments are refused.

The extension changes together with the bitmaps, in the one write of sector 0.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cowferry.block.bitmap import Bitmap
from cowferry.drivers.qcow2 import header as headers
from cowferry.errors import NotSupported

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

EXTENSION = 0x434F5753
VALID = 1 << 61  # autoclear
KEY, ID = 8, 16  # bytes


def read(h: headers.Header, bitmaps: Iterable[Bitmap]) -> None:
    """Set `since` of the bitmaps that an image has."""
    data = h.extension(EXTENSION) or b""
    if not h.autoclear & VALID or len(data) % (KEY + ID):
        return
    found = {data[at : at + KEY]: data[at + KEY :][:ID] for at in range(0, len(data), KEY + ID)}
    for bitmap in bitmaps:
        bitmap.since = found.get(_key(bitmap), b"")


@contextlib.contextmanager
def recorded(
    image: Qcow2, bitmaps: Iterable[Bitmap], beside: list[tuple[int, bytes]]
) -> Iterator[None]:
    """The next header that is written says from which backups these bitmaps count, if there is
    room for it beside other extensions. If an error leaves the context, the header says what it
    said. Under `flushing`."""
    h = image.header
    was = h.extensions
    data = b"".join(_key(b) + b.since for b in bitmaps if b.since and not b.inconsistent)
    h.extensions = [e for e in was if e[0] != EXTENSION]
    if data:
        with contextlib.suppress(NotSupported):  # no room: it is not known after a restart
            wanted = [*h.extensions, (EXTENSION, data)]
            headers.layout(replace(h, extensions=[*wanted, *beside]), h.backing_offset)
            h.extensions = wanted
    try:
        yield
    except BaseException:
        h.extensions = was
        raise


def kept(h: headers.Header) -> bool:
    """Whether the extension may stay when the image is opened for writing by us."""
    return h.extension(EXTENSION) is not None and bool(h.autoclear & VALID)


def without(extensions: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The extensions but for this one."""
    return [e for e in extensions if e[0] != EXTENSION]


def _key(bitmap: Bitmap) -> bytes:
    name = bitmap.name.encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).digest()[:KEY]
