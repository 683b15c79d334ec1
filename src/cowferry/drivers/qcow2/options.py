"""Options with which qcow2 images are opened, as QEMU takes them."""

from __future__ import annotations

from typing import Literal

import msgspec

from cowferry.drivers import Common
from cowferry.errors import CowferryError

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


class Qcow2Options(Common, kw_only=True, rename="kebab"):
    """QMP: BlockdevOptionsQcow2."""

    lazy_refcounts: bool | None = None  # allowed, and never needed: a flush writes both
    pass_discard_request: bool = True  # what a guest discards is given back to the host
    pass_discard_snapshot: bool = True
    pass_discard_other: bool = False
    # All checks are always made, so that each of these words is granted.
    overlap_check: Overlaps | OverlapTemplate | None = None
    cache_size: int | None = None  # bytes, of which the L2 tables have all
    l2_cache_size: int | None = None  # bytes
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int | None = None

    def check_caches(self, cluster: int) -> None:
        """Raise `CowferryError` for what no cache can be like. `cluster` is in bytes."""
        for name in ("cache_size", "l2_cache_size", "refcount_cache_size"):
            self._check(name, (getattr(self, name) or 0) >= 0, "a number of bytes")
        self._check("cache_clean_interval", (self.cache_clean_interval or 0) >= 0, "seconds")
        entry = self.l2_cache_entry_size or cluster
        fits = 512 <= entry <= cluster and not entry & (entry - 1)
        self._check("l2_cache_entry_size", fits, f"a power of two between 512 and {cluster} bytes")

    def _check(self, name: str, fits: bool, what: str) -> None:
        if not fits:
            value, name = getattr(self, name), name.replace("_", "-")
            raise CowferryError(f"Parameter '{name}' expects {what}, not {value}")
