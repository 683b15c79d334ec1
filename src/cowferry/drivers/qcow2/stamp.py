"""The stamp of a qcow2 image that is a backup: which backup it is (`block/lineage.py`).

It is a private header extension, 0x434F5742 ("COWB"), and counts as long as the autoclear bit 62 is
set. A program that opens an image for writing clears each autoclear bit that it does not know, and
keeps extensions that it does not know. So an extension without the bit says that the image was that
backup, and may have been written since. cowferry clears the bit like any other program, because an
image that is opened for writing is about to become something else.

Source: the qcow2 specification, sections Header (autoclear_features) and Header extensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cowferry.drivers.qcow2 import header as headers

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

EXTENSION = 0x434F5742
INTACT = 1 << 62  # autoclear


def read(image: Qcow2) -> tuple[bytes, bool]:
    """Return the stamp, b"" without one, and whether the image was not opened for writing since."""
    h = image.header
    return h.extension(EXTENSION) or b"", bool(h.autoclear & INTACT)


def write(image: Qcow2, data: bytes) -> None:
    """Put a stamp into the header, durably. The image has been flushed.

    Raises `NotSupported` if sector 0 has no room for it, `OSError`."""
    with image.flushing, image.meta:
        h = image.header
        was = h.extensions, h.autoclear
        extensions = [e for e in h.extensions if e[0] != EXTENSION] + [(EXTENSION, data)]
        headers.layout(replace(h, extensions=extensions), h.backing_offset)
        h.extensions, h.autoclear = extensions, h.autoclear | INTACT
        try:
            image.write_header()
        except BaseException:
            h.extensions, h.autoclear = was
            raise
