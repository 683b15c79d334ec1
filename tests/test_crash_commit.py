"""Power cuts around commits: C1 to C3, and for the active layer the pivot (M2, M4).

The base is grown before it is filled, marked as no good by itself while it is half full, and
durable before anything above it lets go of what it took over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from cowferry.block import sysio
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import ImageError
from crashes import SIZE, SPEED, Judge, World, a_chain, sound, the_job, wait_over
from daemons import Told
from writelog import State


def half_full(base: Path, ends: str) -> Callable[[State], None]:
    """C2: while the base holds part of what is above it, nobody gets it alone."""
    before = sound(str(base), None, "before")

    def also(state: State) -> None:
        passed = {m[0] for m in state.marks}
        now = sound(str(base), None, state.what)
        if ends in passed:  # good by itself again
            opening.current_image(str(base))
        elif now != before and "finish" not in passed:
            assert refused(base), "it holds a part of what is above it, and is served alone"

    return also


def refused(base: Path) -> bool:
    try:
        opening.current_image(str(base))
    except ImageError as error:
        return "cannot be used by itself" in error.desc
    return False


@pytest.mark.parametrize("above", ["root", "layer"])
@pytest.mark.parametrize(
    ("base", "base_size"),
    [
        ("raw", SIZE),
        ("raw", SIZE - (40 << 10)),
        ("raw", SIZE + (64 << 10)),
        ("qcow2", SIZE - (40 << 10)),
        ("qed", SIZE - (40 << 10)),
    ],
    ids=["raw", "raw smaller", "raw larger", "qcow2 smaller", "qed smaller"],
)
def test_C1_C2_C3_a_commit_of_a_layer_that_nobody_writes(
    tmp_path: Path, base: str, base_size: int, above: str
) -> None:
    world = World(tmp_path)
    layers = ["mid", "vm"] if above == "root" else ["mid", "next", "vm"]
    bottom, images = a_chain(world, *layers, base=base, base_size=base_size)
    world.open("vm", images[-1])
    marked = half_full(bottom, "done")
    with world:
        world.churn(5)
        world.execute("block-commit", device="vm", top=str(images[0]), speed=SPEED)
        job = the_job(world)
        work = world.ready(job)
        world.end([job], work)
        world.churn(6)
    judge = Judge(world)

    def also(state: State) -> None:
        marked(state)
        if "done" in {m[0] for m in state.marks}:  # J3: what was committed is not needed
            images[0].rename(images[0].with_suffix(".gone"))
            try:
                sound(str(images[-1]), None, state.what)
            finally:
                images[0].with_suffix(".gone").rename(images[0])

    def again(daemon: Daemon, told: Told) -> None:
        if daemon.graph.disk("vm").root.backing is None:
            return
        names = [n.filename for n in daemon.graph.every_node()]
        if str(images[0]) in names:
            daemon.execute("block-commit", {"device": "vm", "top": str(images[0])})
            wait_over(told)
        assert str(images[0]) not in [n.filename for n in daemon.graph.every_node()]

    judge.each(1, also=also, again=again)


def commit_active(told: Told, daemon: Daemon, base: Path) -> None:
    """All the way, unless the disk is there already."""
    if daemon.graph.disk("vm").root.filename != str(base):
        daemon.execute("block-commit", {"device": "vm"})
        told.wait("BLOCK_JOB_READY", device="vm")
        daemon.execute("job-complete", {"id": "vm"})
        wait_over(told)
    assert daemon.graph.disk("vm").root.filename == str(base)


KINDS = list(itertools.product(["raw", "qcow2"], ["background", "write-blocking"], [0, 40 << 10]))
KINDS += [("qed", "background", 40 << 10)]


@pytest.mark.parametrize(("base", "mode", "smaller"), KINDS)
def test_C1_C2_M2_an_active_commit_and_its_pivot(
    tmp_path: Path, base: str, mode: str, smaller: int
) -> None:
    world = World(tmp_path)
    bottom, images = a_chain(world, "mid", "vm", base=base, base_size=SIZE - smaller)
    world.open("vm", images[-1], bottom)
    also = half_full(bottom, "switched")
    with world:
        world.churn(5)
        world.execute("block-commit", device="vm", speed=SPEED)
        job = the_job(world)
        job.change("write-blocking") if mode == "write-blocking" else None
        work = world.ready(job)
        job.complete()
        world.end([job], work)
        world.churn(8)
    judge = Judge(world)
    judge.each(2, also=also, again=lambda d, t: commit_active(t, d, bottom))
    assert judge.outcomes == {False, True}


def test_M4_an_active_commit_that_is_ended_softly_leaves_the_disk_where_it_is(
    tmp_path: Path,
) -> None:
    """The base is a copy of that moment, good by itself; the overlay is the disk as before."""
    world = World(tmp_path)
    bottom, images = a_chain(world, "vm")
    world.open("vm", images[-1])
    world.freezes[str(bottom)] = "vm"
    also = half_full(bottom, "done")
    with world:
        world.churn(5)
        world.execute("block-commit", device="vm", speed=SPEED)
        job = the_job(world)
        work = world.ready(job)
        job.cancel(force=False)
        world.end([job], work)
        world.churn(8)
    assert Judge(world).each(3, also=also)


@pytest.mark.parametrize("when", ["half way", "ready"])
def test_C2_an_active_commit_that_is_called_off_leaves_the_overlay_right(
    tmp_path: Path, when: str
) -> None:
    world = World(tmp_path)
    bottom, images = a_chain(world, "mid", "vm", base="qcow2", base_size=SIZE - (40 << 10))
    world.open("vm", images[-1])
    also = half_full(bottom, "never")
    with world:
        world.churn(3)
        world.execute("block-commit", device="vm", speed=SPEED)
        job = the_job(world)
        if when == "ready":
            (work,) = world.ready(job)
        else:
            work = iter(job.run())
            for _ in range(4):
                next(work)
                world.churn(1)
        world.call_off(job, work)
        world.churn(6)
    judge = Judge(world)
    judge.each(4, also=also, again=lambda d, t: commit_active(t, d, bottom))


def test_a_disk_that_was_snapshotted_comes_back_to_its_first_image(tmp_path: Path) -> None:
    """The circle: base, overlay, base, overlay again. The first name leads to it all the while."""
    world = World(tmp_path)
    bottom, _ = a_chain(world)
    over = world.there / "over.qcow2"
    world.open("vm", bottom)
    world.drives["vm"].new, world.drives["vm"].between = str(bottom), [str(over)]
    with world:
        for _ in range(2):
            world.churn(3)
            world.log.mark(("to", str(over)))
            world.now("blockdev-snapshot-sync", device="vm", snapshot_file=str(over))
            world.churn(4)
            world.execute("block-commit", device="vm", speed=SPEED)
            job = the_job(world)
            work = world.ready(job)
            job.complete()
            world.log.mark(("to", str(bottom)))
            world.end([job], work)
            sysio.unlink(str(over))  # an administrator tidies up
        world.churn(3)
    judge = Judge(world)

    def also(state: State) -> None:
        at, _ = opening.current_image(str(bottom))
        way = [str(bottom), *(m[1] for m in state.marks if m[0] == "to")]
        told = 1 + sum(m[0] == "done" for m in state.marks)
        assert at in way[told - 1 :]

    judge.each(5, also=also)
