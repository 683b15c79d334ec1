"""Every operation over every kind of storage, in every format.

A cell is an operation, a format and a storage: `test_matrix_storage[commit-qcow2-loop4096-exact]`.
Where there is room the operation has to succeed. Where storage is full, or fills up under the
operation, it may fail: then every byte that was answered is there, also after a restart, nothing
has leaked, and the operation succeeds when it is repeated once there is room. Storage is relieved
after the restart where it was full from the start, and while the images are open where it filled
up on the way.

The oracle is qemu-img's (see `scenes.py`). COWFERRY_SOAK=1 runs more cells, and more kinds of
images.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cowferry.errors import CowferryError
from operations_table import OPERATIONS
from scenes import FORMATS, Failed, Scene, refused
from storages import AMPLE, SCARCE, Mounts, storage
from tests_support import need

SOAK = os.environ.get("COWFERRY_SOAK") is not None

#: Cells that fail because of a fault that is known and not mended yet, by that fault.
FAULTS: dict[str, str] = {}
PENDING = {cell: why for why, cells in FAULTS.items() for cell in cells.split()}


#: Kinds of images beside `FORMATS` that a long run tries, too: options of qcow2 and QED.
MORE = {
    "qcow2.4k": "cluster_size=4k",
    "qcow2.512": "cluster_size=512,refcount_bits=64",
    "qcow2.2M": "cluster_size=2M",
    "qcow2.v2": "compat=0.10",
    "qcow2.ext": "extended_l2=on,cluster_size=16k",
    "qcow2.lazy": "lazy_refcounts=on",
    "qed.4k": "cluster_size=4k",
}
#: Of two file systems that fill up alike, each has half of the kinds; a long run has all.
HALF = {
    f"{system}-{how}": kinds
    for system, kinds in (("ext4", ("qcow2", "raw")), ("xfs", ("data", "qed")))
    for how in ("full", "fills")
}
READING = ("serve", "read-cold", "read-warm", "status")  # what needs no room


def applies(operation: str, kind: str, where: str) -> bool:
    """Whether there is such a cell."""
    device = where.startswith("loop")
    if operation in READING and where.endswith("-fills"):
        return False  # as where it is full
    if kind == "qcow2.2M" and not device:
        return False  # a few of its clusters fill the file systems
    if where in HALF and kind not in HALF[where] and not SOAK:
        return False
    # A QED image grows at the end of its file. No device has preallocated room.
    return not (device and (kind.startswith("qed") or operation == "preallocate"))


def cells() -> list[str]:
    """The names of all cells."""
    return [
        f"{name}-{kind}-{where}"
        for where in (*AMPLE, *SCARCE)
        for name, operation in OPERATIONS.items()
        for kind in (*FORMATS, *(MORE if SOAK else ()))
        if kind.partition(".")[0] in operation.formats and applies(name, kind, where)
    ]


@pytest.fixture(scope="session")
def mounts() -> Iterator[Mounts]:
    """The file systems of this worker."""
    with Mounts() as made:
        yield made


@pytest.mark.parametrize("cell", cells())
def test_matrix_storage(
    cell: str,
    mounts: Mounts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    need("qemu-img", "qemu-io", "nbdcopy", "nbdinfo")
    if cell in PENDING:
        request.applymarker(pytest.mark.xfail(reason=PENDING[cell], strict=True))
    name, kind, where = split(cell)
    monkeypatch.setenv("COWFERRY_STATE", str(tmp_path / "state"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    plain = kind.partition(".")[0]
    with (
        storage(where, mounts, elsewhere) as place,
        contextlib.closing(Scene(place, plain, tmp_path, cell, MORE.get(kind, ""))) as scene,
    ):
        operation = OPERATIONS[name]
        act = operation.prepare(scene)
        if place.scarce:
            happened = scarce(scene, act, where)
            assert happened or not must_fail(name, kind, where), "there was room after all"
        else:
            act()
        scene.live()
        scene.at_rest()


def split(cell: str) -> tuple[str, str, str]:
    """("commit", "qcow2", "loop4096-exact") of a cell's name."""
    where = next(w for w in (*AMPLE, *SCARCE) if cell.endswith(f"-{w}"))
    name, _, kind = cell.removesuffix(f"-{where}").rpartition("-")
    return name, kind, where


def must_fail(name: str, kind: str, where: str) -> bool:
    """Whether the operation cannot succeed on storage as scarce as that."""
    if name in ("convert", "rebase") and where.startswith("rlimit"):
        return False  # what grows may become as large as the source or the base is
    return OPERATIONS[name].needs_room and kind in ("qcow2", "qed") and where.endswith("-full")


def scarce(scene: Scene, act: Callable[[], None], where: str) -> bool:
    """Do the operation where there may be no room for it, and again once there is.

    Returns whether there was none."""
    before = scene.storage.names()
    scene.storage.squeeze()
    failed = False
    try:
        act()
    except (CowferryError, Failed, OSError) as error:
        failed = True
        assert refused(error), error
        now = scene.storage.names()
        assert before <= now, f"gone after '{error}': {before - now}"
        kept = {image.path for image in scene.others} | scene.kept
        left = {os.path.basename(p) for p in now - before - kept}
        assert not left, f"left after '{error}': {left}"
    if not failed and not scene.refusals:
        return False
    scene.live()
    if where.endswith("-full"):
        scene.at_rest()
    scene.storage.relieve()
    scene.relieved = True
    if scene.daemon is None and scene.served is not None:
        scene.serve(scene.served)
    if failed:
        act()
    else:
        with scene.guest() as guest:
            scene.scribble(guest)
    return True
