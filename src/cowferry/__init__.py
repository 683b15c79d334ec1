"""cowferry: live storage. Serve virtual disks to guests, and change them while they run.

    import cowferry

    with cowferry.open("vm.qcow2") as disk:
        for extent in disk.extents(0, disk.size):
            print(extent.length, extent.state, extent.depth)
        with cowferry.serve(vm=disk) as server:
            print(server.uri("vm"))
            cowferry.stream(disk)                       # then the base may be deleted
            cowferry.snapshot(disk, "vm.1.qcow2")       # vm.qcow2 never changes again
            cowferry.commit(disk)                       # and back into it
            cowferry.backup(disk, "/backup/vm.qcow2", bitmap="b0")   # as of this moment
            print(*cowferry.dirty(disk, "b0"))          # and what has changed since
            cowferry.copy(disk, "/other/vm.qcow2", pivot=True)   # the guests never notice

Everything is blocking and thread-safe; offsets and lengths are bytes. Mistakes raise
`CowferryError`, I/O raises `OSError`. What is not used is not loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowferry.errors import CowferryError

if TYPE_CHECKING:
    from cowferry.library import (
        backup,
        bitmap_add,
        bitmap_clear,
        bitmap_disable,
        bitmap_enable,
        bitmap_merge,
        bitmap_remove,
        bitmaps,
        change,
        change_backing_file,
        commit,
        copy,
        create,
        dirty,
        group,
        limit,
        open,
        pull,
        serve,
        snapshot,
        stream,
    )

__version__ = "0.1.0"
__all__ = [
    "CowferryError",
    "backup",
    "bitmap_add",
    "bitmap_clear",
    "bitmap_disable",
    "bitmap_enable",
    "bitmap_merge",
    "bitmap_remove",
    "bitmaps",
    "change",
    "change_backing_file",
    "commit",
    "copy",
    "create",
    "dirty",
    "group",
    "limit",
    "open",
    "pull",
    "serve",
    "snapshot",
    "stream",
]


def __getattr__(name: str) -> Any:
    """The functions of `library`, loaded when one is asked for."""
    if name in __all__:
        from cowferry import library

        return getattr(library, name)
    raise AttributeError(f"module 'cowferry' has no attribute '{name}'")
