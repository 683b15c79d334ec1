"""Power cuts around what changes a disk at one moment: snapshots, transactions, `change`, headers.

S1 to S4: the overlay and its name are durable before the switch, the image that is left never
changes a byte, which image is current is decidable, and a group of disks moves all or none.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chains import make_base, overlay
from cowferry.block import moves, sysio
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from crashes import CLUSTER, SIZE, Again, Judge, World, a_disk, hear, sound, the_job
from daemons import Told
from writelog import Oracle, State


def carelessly(path: Path, backing: tuple[str, str] | None, size: int = SIZE) -> None:
    """An overlay made by somebody who flushes nothing."""
    elsewhere = path.parent.parent / f"draft-{path.name}"
    options = {"cluster_size": CLUSTER}
    if backing is not None:
        options |= {"backing_file": backing[0], "backing_fmt": backing[1]}
    opening.create_image(str(elsewhere), "qcow2", size, options)
    fd = sysio.create(str(path), os.O_RDWR)
    sysio.pwrite(fd, elsewhere.read_bytes(), 0)
    os.close(fd)


def snapshots(*wanted: tuple[str, Path]) -> Again:
    """Take them once more, all at one point in time, unless they are there."""

    def again(daemon: Daemon, told: Told) -> None:
        actions = []
        for name, path in wanted:
            if daemon.graph.disk(name).root.filename != str(path):
                if path.exists():  # as the hint says, if something was left there
                    sysio.unlink(str(path))
                data = {"device": name, "snapshot-file": str(path), "format": path.suffix[1:]}
                actions.append({"type": "blockdev-snapshot-sync", "data": data})
        daemon.execute("transaction", {"actions": actions})

    return again


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_S1_S2_S3_a_snapshot_into_a_new_file(tmp_path: Path, format: str) -> None:
    world = World(tmp_path)
    path = a_disk(world, format)
    new = world.there / ("overlay.qed" if format == "qed" else "overlay.qcow2")
    kind = new.suffix[1:]
    world.open("vm", path, new)
    world.freezes[str(path)] = "vm"
    with world:
        world.churn(15)
        world.now("blockdev-snapshot-sync", device="vm", snapshot_file=str(new), format=kind)
        world.churn(15)
    judge = Judge(world)
    judge.each(1, again=snapshots(("vm", new)))
    assert judge.outcomes == {False, True}


@pytest.mark.parametrize("recorded", [True, False], ids=["backing in header", "none"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_S1_S2_S3_an_overlay_that_somebody_else_made_and_did_not_flush(
    tmp_path: Path, format: str, recorded: bool
) -> None:
    world = World(tmp_path)
    path = a_disk(world, format)
    new = world.there / "overlay.qcow2"
    world.open("vm", path, new)
    world.freezes[str(path)] = "vm"
    with world:
        world.churn(10)
        carelessly(new, (str(path), format) if recorded else None)
        file = {"driver": "file", "filename": str(new)}
        world.execute("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
        world.churn(5)
        world.now("blockdev-snapshot", node="vm", overlay="over")
        world.churn(10)
    judge = Judge(world)
    judge.each(2)
    assert judge.outcomes == {False, True}


def test_S1_S3_an_existing_overlay_by_its_name(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    new = world.there / "overlay.qcow2"
    world.open("vm", path, new)
    world.freezes[str(path)] = "vm"
    with world:
        world.churn(10)
        carelessly(new, (str(path), "qcow2"))
        world.now("blockdev-snapshot-sync", device="vm", snapshot_file=str(new), mode="existing")
        world.churn(10)
    assert Judge(world).each(3)


def test_S4_two_disks_in_two_folders_are_snapshotted_both_or_neither(tmp_path: Path) -> None:
    world = World(tmp_path)
    paths = {
        "one": a_disk(world, "qcow2", "one", world.here),
        "two": a_disk(world, "raw", "two", world.there),
    }
    news = {"one": world.there / "one-1.qcow2", "two": world.here / "two-1.qcow2"}
    for name, path in paths.items():
        world.open(name, path, news[name])
        world.freezes[str(path)] = name
    with world:
        world.churn(8)
        actions = [
            {"type": "blockdev-snapshot-sync", "data": {"device": d, "snapshot-file": str(p)}}
            for d, p in news.items()
        ]
        world.now("transaction", actions=actions)
        world.churn(8)
    judge = Judge(world)
    judge.each(4, again=snapshots(*news.items()))
    assert judge.outcomes == {False, True}


def test_S3_one_snapshot_after_another_each_record_leads_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = a_disk(world, "raw")
    steps = [world.there / "s1.qcow2", world.here / "s2.qcow2", world.there / "s3.qcow2"]
    world.open("vm", path)
    with world:
        for step in steps:
            world.churn(5)
            world.now("blockdev-snapshot-sync", device="vm", snapshot_file=str(step))
        world.churn(5)
    judge = Judge(world)
    seen: set[int] = set()

    def also(state: State) -> None:
        """How many were told is how far the disk is at least."""
        at = places.index(opening.current_image(str(path))[0])
        told = sum(m[0] == "done" for m in state.marks)
        assert told <= at <= sum(m[0] == "finish" for m in state.marks)
        seen.add(at)

    places = [str(path), *map(str, steps)]
    world.drives["vm"].new, world.drives["vm"].between = places[-1], places[1:-1]
    judge.each(5, also=also)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_quiet_change_to_an_image_over_the_present_one(tmp_path: Path, format: str) -> None:
    """`change` with `notify` false moves the disk, and says so durably."""
    world = World(tmp_path)
    path = a_disk(world, format)
    new = world.there / "other.qcow2"
    world.open("vm", path, new)
    world.freezes[str(path)] = "vm"
    with world:
        world.churn(10)
        carelessly(new, (str(path), format))
        world.execute("change", device="vm", target=str(new), notify=False, x_job_id="vm")
        job = the_job(world)
        world.end([job], world.ready(job))
        world.churn(10)
    judge = Judge(world)
    judge.each(6)
    assert judge.outcomes == {False, True}


def test_a_change_that_guests_are_told_of_leaves_the_old_medium_whole(tmp_path: Path) -> None:
    """It is another disk's worth of bytes: the old name goes on meaning the old one."""
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    make_base(world.there, SIZE, seed=9)
    new = world.there / "base.raw"
    world.open("vm", path)
    world.drives["vm"].until = "switched"
    before = new.read_bytes()
    with world:
        world.churn(10)
        world.now("change", device="vm", target=str(new))
        world.churn(5)
    judge = Judge(world)

    def also(state: State) -> None:
        """Writes from `switched` on went to the new medium."""
        oracle, now = Oracle(before), False
        for kind, *more in state.marks:
            now = now or kind == "switched"
            if now and more:
                hear(oracle, kind, *more[1:])
        wrong = oracle.wrong(sound(str(new), "raw", state.what))
        assert not wrong, wrong

    judge.each(7, also=also)


@pytest.mark.parametrize("layer", ["vm", "mid"])
def test_Q6_another_backing_name_for_a_running_disk_or_a_layer(tmp_path: Path, layer: str) -> None:
    world = World(tmp_path)
    a_disk(world, "qcow2", "mid")
    path = overlay(world.here, "vm.qcow2", "mid.qcow2", "qcow2", SIZE, cluster_size=CLUSTER)
    disk = world.open("vm", path)
    node = disk.root if layer == "vm" else disk.root.backing
    assert node is not None and node.backing is not None
    below = node.backing.filename
    with world:
        for name in (
            os.path.join("..", "here", os.path.basename(below)),
            below,
            "./" + os.path.basename(below),
        ):
            world.churn(4)
            world.execute(
                "change-backing-file", device="vm", image_node_name=node.name, backing_file=name
            )
        world.churn(4)
    Judge(world).each(8)


def test_reopened_read_only_and_writable_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = a_disk(world, "qcow2")
    disk = world.open("vm", path)
    name, below = disk.root.name, disk.root.backing
    assert below is not None
    with world:
        for read_only in (True, False, True, False):
            options = {"driver": "qcow2", "node-name": name, "backing": below.name,
                       "read-only": read_only}  # fmt: skip
            world.execute("blockdev-reopen", options=[options])
            if not read_only:
                world.churn(8)
    Judge(world).each(9)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_disk_that_grows_is_small_or_large_and_never_loses_what_was_flushed(
    tmp_path: Path, format: str
) -> None:
    world = World(tmp_path)
    path = a_disk(world, format)
    world.open("vm", path)
    with world:
        for size in (SIZE + (64 << 10), 3 * SIZE):
            world.churn(6)
            world.log.mark(("grow", "vm", size))
            world.execute("block_resize", device="vm", size=size)
            world.log.mark(("grown", "vm", size))
            world.churn(6)
            world.flush()
    Judge(world).each(10)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": "512"},  # the L1 table has to grow, too
        {"cluster_size": "4k", "compat": "0.10"},  # no zero clusters
        {"cluster_size": "16k", "extended_l2": "on"},
    ],
    ids=["small clusters", "version 2", "subclusters"],
)
def test_a_disk_that_grows_never_shows_what_its_longer_base_has_there(
    tmp_path: Path, options: dict[str, str]
) -> None:
    """What hides it is durable before the new size is."""
    world = World(tmp_path)
    make_base(world.here, SIZE)
    world.open("vm", overlay(world.here, "vm.qcow2", "base.raw", "raw", SIZE - 99_840, **options))
    with world:
        for size in (SIZE - 97_280, SIZE - 20_992, SIZE + 9_728):
            world.churn(3)
            world.log.mark(("grow", "vm", size))
            world.execute("block_resize", device="vm", size=size)
            world.log.mark(("grown", "vm", size))
            world.churn(3)
    Judge(world).each(11, count=30)


def test_a_state_folder_made_for_a_record_is_durable_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "new" / "state"
    monkeypatch.setenv("COWFERRY_STATE", str(state))
    flushed: list[str] = []
    plain = sysio.flush_directory

    def noting(path: str) -> None:
        plain(path)
        flushed.append(path)

    monkeypatch.setattr(sysio, "flush_directory", noting)
    moves.record([moves.Move("vm", "/dev/loop999", str(tmp_path / "b"), "raw")])
    assert moves.follow("/dev/loop999").path == str(tmp_path / "b")
    for folder in (tmp_path, tmp_path / "new", state):
        assert str(folder) in flushed
