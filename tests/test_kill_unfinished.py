"""A copy to a raw image, killed 20 times while the guest writes, and gone on with each time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chains import make_base
from cowferry.block import moves
from killing import SIZE, Rig, Talk, a_disk
from nursery import Nursery

KILLS = 20
SPEED = 2 << 20  # bytes a second: so one life is too short


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_2c_a_copy_to_raw_goes_on_after_each_of_20_kills(tmp_path: Path, format: str) -> None:
    place, there = tmp_path / "place", tmp_path / "there"
    place.mkdir()
    there.mkdir()
    target = there / "copy.raw"
    if format == "raw":
        make_base(place, SIZE)
        source = place / "base.raw"
    else:
        source = a_disk(place, "vm")
    arguments = {"device": "vm", "target": str(target)}
    there_already: list[float] = []  # MB, as each life found it

    def interrupted(talk: Talk) -> None:
        talk("x-disk-copy", **arguments, speed=rig.rnd.choice([0, SPEED]))
        rig.work(30)
        rig.moment(0.25)
        (job,) = talk("query-block-jobs")
        found = re.search(r"went on .* ([0-9.]+) MB of", job.get("x-note", ""))
        there_already.append(float(found[1]) if found else 0)

    def completed(talk: Talk) -> None:
        talk("x-disk-copy", **arguments)
        talk.until("BLOCK_JOB_READY")
        rig.work()
        talk("job-complete", id="vm")
        talk.until("BLOCK_JOB_COMPLETED")
        rig.work()

    with Nursery(tmp_path) as nursery, Rig(nursery, place, seed=2) as rig:
        rig.add("vm", source)
        for _ in range(KILLS):
            assert not rig.round(interrupted)
            assert moves.half_copied(str(target)), "there is something to go on with"
        assert rig.round(completed), "the disk is in its copy"
        assert rig.drives["vm"].at == str(target)
    assert max(there_already) > 0.2, "what was copied in one life was there in the next"
    assert moves.half_copied(str(target)) is None
