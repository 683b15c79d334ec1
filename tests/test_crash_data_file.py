"""A power cut while a disk with an external data file grows: the old size or the new one.

With data_file_raw the data file has to read right by itself at each moment: as long as the header
tells, and zero where the disk has grown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs
from cowferry.drivers import opening
from cowferry.drivers.qcow2.image import Qcow2
from writelog import Log, put, states

KIB = 1 << 10
OLD, NEW = 256 * KIB, 768 * KIB


def grow(folder: Path, behind: bytes) -> set[int]:
    """Grow such a disk under a write log, and look at each state that a power cut may leave.

    `behind` lies in the data file behind the disk. Returns the sizes that were found."""
    here, spare = folder / "here", folder / "spare"
    here.mkdir()
    spare.mkdir()
    path, data = here / "vm.qcow2", here / "vm.data"
    options = {"data_file": "vm.data", "data_file_raw": "on", "cluster_size": "4k"}
    opening.create_image(str(path), "qcow2", OLD, options)
    image = opening.open_image(str(path))
    image.pwrite(memoryview(b"x" * OLD), 0)
    opening.close_chain(image)
    with open(data, "ab") as f:
        f.write(behind)
    image = opening.open_image(str(path))
    with Log(here) as log:
        image.change_size(NEW)
        log.mark("grown")
    opening.close_chain(image)
    found: set[int] = set()
    for state in states(log, 1, 20):
        put(state, spare)
        disk = opening.open_image(str(spare / "vm.qcow2"), read_only=True)
        found.add(disk.size)
        assert disk.size == NEW or not state.marks, state.what
        wanted = b"x" * OLD + bytes(disk.size - OLD)
        assert not differs(contents(disk), wanted), state.what
        opening.close_chain(disk)
        alone = state.files[str(data)]
        assert len(alone) >= disk.size, state.what
        assert not differs(alone[: disk.size], wanted), state.what
    return found


@pytest.mark.parametrize("behind", [b"", b"old" * 200_000], ids=["as long", "longer"])
def test_a_power_cut_leaves_a_disk_and_its_data_file_as_before_or_grown(
    tmp_path: Path, behind: bytes
) -> None:
    assert grow(tmp_path, behind) == {OLD, NEW}


@pytest.mark.parametrize("behind", [b"", b"old" * 200_000], ids=["as long", "longer"])
def test_that_test_notices_a_data_file_that_is_not_flushed(
    tmp_path: Path, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_data(image: Any) -> None:
        image.file.flush()

    monkeypatch.setattr(Qcow2, "_barrier", without_data)
    with pytest.raises(AssertionError):
        grow(tmp_path, behind)
