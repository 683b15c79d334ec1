"""Power cuts around copies: mirrors in both modes, chains, groups. M1 to M4, and decidability.

The old image is current until the target is durable with all its bytes, with its name, and with
the layers that it lies over; from then on the target is. A copy that was told to be finished is
the disk as it was at that moment, whatever is cut afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cowferry.block import moves, sysio
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from crashes import SIZE, SPEED, Again, Judge, World, a_chain, a_disk, sound, the_job, wait_over
from daemons import Told
from writelog import State


def moved(command: str, goal: Path, **arguments: Any) -> Again:
    """Copy once more and pivot, unless the disk is there already."""

    def again(daemon: Daemon, told: Told) -> None:
        if daemon.graph.disk("vm").root.filename != str(goal):
            for left in goal.parent.iterdir():  # as the hint says, if something was left there
                if left.suffix in (".qcow2", ".qed", ".raw"):
                    sysio.unlink(str(left))
            given = {k.replace("_", "-"): v for k, v in arguments.items()}
            daemon.execute(command, {"device": "vm", "target": str(goal), **given})
            told.wait("BLOCK_JOB_READY", device="vm")
            daemon.execute("job-complete", {"id": "vm"})
            wait_over(told)
        assert daemon.graph.disk("vm").root.filename == str(goal)

    return again


def mirrored(world: World, command: str, copy_mode: str = "background", **arguments: Any) -> None:
    """A copy with a guest at work, and the pivot."""
    world.churn(5)
    world.execute(command, device="vm", speed=SPEED, copy_mode=copy_mode, **arguments)
    job = the_job(world)
    work = world.ready(job)
    job.complete()
    world.end([job], work)
    world.churn(8)


FORMATS = [("raw", "raw"), ("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")]
FORMATS += [("qed", "qed")]


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize(("source", "target"), FORMATS)
def test_M1_M2_a_full_copy_into_a_new_file_and_the_pivot(
    tmp_path: Path, source: str, target: str, mode: str
) -> None:
    world = World(tmp_path)
    path = a_disk(world, source)
    goal = world.there / f"copy.{target}"
    world.open("vm", path, goal)
    options = {"target": str(goal), "sync": "full", "format": target}
    with world:
        mirrored(world, "drive-mirror", mode, **options)
    judge = Judge(world)
    judge.each(1, again=moved("drive-mirror", goal, sync="full", format=target))
    assert judge.outcomes == {False, True}


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_M1_M2_a_copy_into_a_node_whose_file_somebody_else_made(
    tmp_path: Path, target: str
) -> None:
    """Neither its bytes nor its name were flushed by whoever made it."""
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    goal = world.there / f"copy.{target}"
    world.open("vm", path, goal)
    with world:
        carelessly(goal, target)
        file = {"driver": "file", "filename": str(goal)}
        world.execute("blockdev-add", driver=target, node_name="goal", file=file)
        mirrored(world, "blockdev-mirror", target="goal", sync="full")
    judge = Judge(world)
    judge.each(2)
    assert judge.outcomes == {False, True}


def carelessly(path: Path, format: str) -> None:
    elsewhere = path.parent.parent / f"draft.{format}"
    opening.create_image(str(elsewhere), format, SIZE, {})
    fd = sysio.create(str(path), 2)
    sysio.pwrite(fd, elsewhere.read_bytes(), 0)
    elsewhere.unlink()


@pytest.mark.parametrize("sync", ["top", "none"])
def test_M1_M2_a_copy_over_the_layers_of_the_disk(tmp_path: Path, sync: str) -> None:
    world = World(tmp_path)
    _, images = a_chain(world, "mid", "vm")
    goal = world.there / "copy.qcow2"
    world.open("vm", images[-1], goal)
    with world:
        mirrored(world, "drive-mirror", target=str(goal), sync=sync, format="qcow2")
    judge = Judge(world)
    judge.each(3, again=moved("drive-mirror", goal, sync=sync, format="qcow2"))
    assert judge.outcomes == {False, True}


@pytest.mark.parametrize("keep", [["*"], ["base.raw"], None], ids=["all", "base", "none"])
def test_a_copy_of_a_chain_with_the_layers_that_are_kept(
    tmp_path: Path, keep: list[str] | None
) -> None:
    world = World(tmp_path)
    _, images = a_chain(world, "mid", "vm")
    goal = world.there / "copy.qcow2"
    world.open("vm", images[-1], goal)
    with world:
        mirrored(world, "x-disk-copy", target=str(goal), keep=keep)
    judge = Judge(world)

    def also(state: State) -> None:
        """The new chain does not need the old one."""
        if "switched" in {m[0] for m in state.marks}:
            gone = [world.here / name for name in ("base.raw", "mid.qcow2", "vm.qcow2")]
            for old in gone:
                old.rename(old.with_suffix(".gone"))
            try:
                sound(str(goal), "qcow2", state.what)
            finally:
                for old in gone:
                    old.with_suffix(".gone").rename(old)

    judge.each(4, also=also, again=moved("x-disk-copy", goal, keep=keep))
    assert judge.outcomes == {False, True}


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_M4_a_copy_that_is_finished_is_the_disk_at_that_moment(
    tmp_path: Path, target: str, mode: str
) -> None:
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    goal, other = world.there / f"copy.{target}", world.there / "other.raw"
    other.touch()
    moves.record([moves.Move("other", str(goal), str(other), "raw")])  # an older image's tale
    world.open("vm", path)
    world.freezes[str(goal)] = "vm"
    with world:
        world.churn(5)
        world.execute(
            "drive-mirror", device="vm", target=str(goal), sync="full", format=target,
            speed=SPEED, copy_mode=mode,
        )  # fmt: skip
        job = the_job(world)
        work = world.ready(job)
        job.cancel(force=False)
        world.end([job], work)
        world.churn(8)

    def also(state: State) -> None:
        passed = {m[0] for m in state.marks}
        leads_to = moves.follow(str(goal)).path
        if "done" in passed:
            assert leads_to == str(goal)
        elif "finish" not in passed:
            assert leads_to == str(other)

    Judge(world).each(5, also=also)


@pytest.mark.parametrize("when", ["half way", "ready"])
def test_a_copy_that_is_called_off_leaves_the_disk_where_it_is(tmp_path: Path, when: str) -> None:
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    goal = world.there / "copy.qcow2"
    world.open("vm", path)
    with world:
        world.churn(5)
        world.execute(
            "drive-mirror", device="vm", target=str(goal), sync="full", speed=SPEED,
            copy_mode="write-blocking",
        )  # fmt: skip
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
    judge.each(6, again=moved("drive-mirror", goal, sync="full"))


def test_a_disk_that_was_copied_away_comes_back_under_its_first_name(tmp_path: Path) -> None:
    """To faster storage and back again: the name is old, the file is new, and not yet current."""
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    away = world.there / "away.qcow2"
    world.open("vm", path)
    world.drives["vm"].between = [str(away)]
    with world:
        mirrored(world, "drive-mirror", target=str(away), sync="full", format="qcow2")
        sysio.unlink(str(path))  # the administrator: it is not needed any more
        sysio.flush_directory(str(path.parent))
        world.log.mark(("back",))
        mirrored(world, "drive-mirror", target=str(path), sync="full", format="qcow2")
    judge = Judge(world)

    def also(state: State) -> None:
        at, _ = opening.current_image(str(path))
        told = sum(m[0] == "done" for m in state.marks)
        begun = sum(m[0] == "finish" for m in state.marks)
        assert at in [str(path), str(away), str(path)][told : begun + 1]

    judge.each(7, also=also)


def test_a_copy_under_a_name_that_the_disk_had_once_does_not_end_its_way(tmp_path: Path) -> None:
    """From the first name one comes by there to where the disk is now."""
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    once, now = world.there / "once.qcow2", world.there / "now.qcow2"
    for name in (once, now):
        opening.create_image(str(name), "qcow2", SIZE, {})
    copied = sound(str(path), None, "before")
    for name in (once, now):
        node = opening.open_image(str(name))
        node.pwrite(memoryview(copied), 0)
        opening.close_chain(node)
    moves.record([moves.Move("vm", str(path), str(once), "qcow2")])
    moves.record([moves.Move("vm", str(once), str(now), "qcow2")])
    world.open("vm", path)
    once.unlink()
    world.freezes[str(once)] = "vm"
    with world:
        world.churn(5)
        world.execute("drive-mirror", device="vm", target=str(once), sync="full", speed=SPEED)
        job = the_job(world)
        work = world.ready(job)
        job.cancel(force=False)
        world.end([job], work)
        world.churn(8)
    assert Judge(world).each(8)


@pytest.mark.parametrize("kind", ["copy", "snapshot"])
def test_what_is_recorded_of_an_older_image_under_the_new_name_does_not_count(
    tmp_path: Path, kind: str
) -> None:
    """Another disk left it once, and a commit into it was never finished."""
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    goal, other = world.there / "copy.qcow2", world.there / "other.raw"
    opening.create_image(str(goal), "qcow2", SIZE, {})
    other.touch()
    moves.record([moves.Move("other", str(goal), str(other), "raw")])
    moves.committing(str(goal), str(other))
    world.open("vm", path, goal)
    with world:
        if kind == "copy":
            mirrored(world, "drive-mirror", target=str(goal), sync="full", mode="existing")
        else:
            world.churn(5)
            world.now(
                "blockdev-snapshot-sync", device="vm", snapshot_file=str(goal), mode="existing"
            )
            world.churn(5)
    judge = Judge(world)
    judge.each(9)
    assert judge.outcomes == {False, True}


@pytest.mark.parametrize("type", ["copy", "commit"])
def test_S4_a_group_of_two_disks_moves_both_or_neither(tmp_path: Path, type: str) -> None:
    world = World(tmp_path)
    members = []
    for name in ("one", "two"):
        base, images = a_chain(world, name, name=f"{name}-base")
        goal = world.there / f"{name}-copy.qcow2" if type == "copy" else base
        world.open(name, images[-1], goal)
        members.append({"device": name} | ({"target": str(goal)} if type == "copy" else {}))
    with world:
        world.churn(3)
        world.execute("x-group-start", id="both", type=type, members=members, speed=SPEED)
        jobs = [the_job(world, f"both-{name}") for name in ("one", "two")]
        work = world.ready(*jobs)
        world.execute("x-group-complete", id="both")
        world.end(jobs, work)
        world.churn(5)
    judge = Judge(world)

    def again(daemon: Daemon, told: Told) -> None:
        drives = world.drives.values()
        if all(daemon.graph.disk(d.name).root.filename == d.new for d in drives):
            return
        for left in world.there.iterdir():
            sysio.unlink(str(left))
        daemon.execute("x-group-start", {"id": "both", "type": type, "members": members})
        told.wait("JOB_GROUP_READY", id="both")
        daemon.execute("x-group-complete", {"id": "both"})
        assert "error" not in told.wait("JOB_GROUP_COMPLETED", id="both")
        assert all(daemon.graph.disk(d.name).root.filename == d.new for d in drives)

    judge.each(10, again=again)
    assert judge.outcomes == {False, True}


def test_a_group_of_streams_ends_as_one(tmp_path: Path) -> None:
    """Nothing moves; once it is told, neither disk needs its base."""
    world = World(tmp_path)
    members, bases = [], []
    for name in ("one", "two"):
        base, images = a_chain(world, name, name=f"{name}-base")
        world.open(name, images[-1])
        bases.append(base)
        members.append({"device": name})
    with world:
        world.churn(3)
        world.execute("x-group-start", id="both", type="stream", members=members, speed=SPEED)
        jobs = [the_job(world, f"both-{name}") for name in ("one", "two")]
        work = world.ready(*jobs)
        world.end(jobs, work)
        world.churn(5)

    def also(state: State) -> None:
        if "done" in {m[0] for m in state.marks}:
            for drive in world.drives.values():
                node = opening.open_image(drive.original, read_only=True)
                opening.close_chain(node)
                assert node.backing is None

    Judge(world).each(11, also=also)
