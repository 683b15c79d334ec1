"""What a driver answers when it is asked for a new image: a plan, which changes nothing.

A plan exists only if the options and the size are valid. `drivers/making.py` carries it out: it
knows where the new image goes, holds the locks, and puts the image under its name once the image
is complete.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

#: Builds an image in a file, given the path of the file, and of the external data file or None.
Make = Callable[[str, str | None], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one new image is made. All numbers are bytes."""

    #: Size of the disk.
    size: int
    #: A device must have at least so many bytes for the image.
    needs: int
    #: Build the image in a file that is empty, or on a device that holds other bytes. The caller
    #: has the locks, and flushes the file afterwards. If the power is cut before that, the file is
    #: no image, or this one. Raises `OSError`, `CowferryError`.
    make: Make
    #: The new file takes so much room at once.
    takes: int = 0
    #: Why a device cannot hold the image; empty if it can.
    never_on_device: str = ""
    #: Whether the image reads as zeroes on a device, too, where it has no backing file.
    zero_on_device: bool = True
    #: Whether `make` writes a map of what is filled (`IMAGE.filling`) beside the file.
    has_map: bool = False
    #: The external data file.
    data: DataFile | None = None


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """An external data file that is made together with its image."""

    name: str  # as the image records it
    plan: Plan
    #: Whether the new image shows bytes of this file from the beginning. If it does not, it reads
    #: as zeroes over the old data file, too.
    shown: bool


def is_device(fd: int) -> bool:
    """Whether the descriptor is a block device's."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)
