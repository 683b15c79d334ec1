"""The option overlap-check of qcow2 images, as QEMU takes it.

Every check is always made before a write. So each value is granted, and only checked.
"""

from __future__ import annotations

from typing import Literal

import msgspec

OverlapTemplate = Literal["none", "constant", "cached", "all"]


class Overlaps(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """QMP: Qcow2OverlapCheckFlags."""

    template: OverlapTemplate | None = None
    main_header: bool | None = None
    active_l1: bool | None = None
    active_l2: bool | None = None
    refcount_table: bool | None = None
    refcount_block: bool | None = None
    snapshot_table: bool | None = None
    inactive_l1: bool | None = None
    inactive_l2: bool | None = None
    bitmap_directory: bool | None = None
