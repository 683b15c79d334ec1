"""The guard of the crash tests: with a flush left out, or a step in the wrong order, they fail.

Each row breaks one thing while a real crash test of the other files records, and demands that the
judge finds a state that is wrong. A flush is named by the function that asks for it. A last test
sees to it that no operation asks for a flush that has no row here, and is on no list of those that
may be lost, with the reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import crashes
import test_crash_bitmaps as bitmaps
import test_crash_commit as commits
import test_crash_create as creates
import test_crash_moves as copies
import test_crash_partial as partials
import test_crash_snapshot as snapshots
from cowferry.block import bitmap_file, keeper, moves, sysio
from cowferry.block.keeper import Keeper
from cowferry.drivers import opening, partial
from cowferry.drivers.file import File
from cowferry.drivers.partial import Partial
from cowferry.jobs.ending import Ending
from cowferry.jobs.mirror import Mirror
from cowferry.operations import change as change_operation
from cowferry.operations import transaction as transactions

Break = Callable[[pytest.MonkeyPatch], None]
Scenario = Callable[[Path], None]
SOURCE = os.sep + os.path.join("src", "cowferry") + os.sep
FLUSHES = ("fdatasync", "fsync", "flush_directory")

# How a flush goes down to the file: whoever is above these has asked for it.
WAY_DOWN = {
    "Qcow2.flush", "Qcow2._barrier", "Qcow2._write_tables", "write_tables", "_write_durably",
    "Qcow2.write_header", "Qcow2.reopen",
    "Qcow2.close_tables", "Qcow2.close", "Qcow2.set_backing", "Qcow2.resize", "Qcow2._bound_dirty",
    "Qcow2.pwrite", "Qcow2.zero", "Qcow2.discard", "Qcow2.link", "record_backing", "grow",
    "give_back",
    "Qed.flush", "Qed._write_tables", "Qed.mark_clean", "Qed.set_backing", "Qed.resize",
    "Qed.reopen",
    "Qed.close", "Qed.bound_dirty", "Qed.pwrite", "Qed.zero", "Qed.discard", "Qed.link",
    "Raw.flush", "Raw.reopen", "Raw.close", "Raw.resize", "Raw.pwrite", "File.flush", "File.pwrite",
    "Disk.pwrite", "Disk.zero", "Disk.discard", "Disk.flush", "Disk.resize",
    "_flushed", "Job.attempt", "_remove", "settled", "committed", "fresh",
    "Barrier.flush", "Barrier._sync", "Marks.flush", "Node.change_size", "Raw.change_size",
    "Partial.pwrite", "Partial.reopen", "Partial.set_backing",
}  # fmt: skip

# Flushes whose loss no crash can show, and why.
MAY_BE_LOST = {
    "Mirror.approach": "it makes the drain short; settle flushes again",
    "_start.<locals>.make.<locals>.detached": "the image that was left is closed",
    "Marks.put_back": "a file that is in use says the same as one at rest",
    "Graph._close": "an image that is left is closed; nobody reads it again under that name",
}


def callers() -> list[str]:
    """Functions of the house from which we were called, innermost first, up to the world's."""
    found = []
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != crashes.__file__:
        if SOURCE in frame.f_code.co_filename:
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back  # type: ignore[assignment]
    return found


class Without:
    """No flush that one of these asked for is done, unless it did so by way of another."""

    def __init__(self, *names: str, unless: str = "") -> None:
        self.names = set(names)
        self.unless = unless

    def __call__(self, patch: pytest.MonkeyPatch) -> None:
        for flush in FLUSHES:
            plain = getattr(sysio, flush)

            def forgetful(what: Any, plain: Callable[[Any], None] = plain) -> None:
                asked = callers()
                if self.unless in asked or not self.names & set(asked):
                    plain(what)

            patch.setattr(sysio, flush, forgetful)


def instead(owner: Any, name: str, new: Any) -> Break:
    """A function does something else."""
    return lambda patch: patch.setattr(owner, name, new)


def record_last(patch: pytest.MonkeyPatch) -> None:
    """The guests go on, and then it is recorded where."""

    def finish(jobs: Iterable[Ending]) -> None:
        jobs = list(jobs)
        for job in jobs:
            job.approach()
        with ExitStack() as drained:
            for disk in {id(d): d for job in jobs for d in job.drains()}.values():
                drained.enter_context(disk.exclusive())
            for job in jobs:
                job.settle()
            moving = [m for job in jobs for m in job.moves()]
            for job in jobs:
                job.switch()
        for job in jobs:
            job.parted()
        moves.record(moving)

    for module in (crashes, transactions, change_operation):
        patch.setattr(module, "finish", finish)


def record_apart(bodies: dict[str, dict[str, Any]], disks: list[str]) -> None:
    """A group's records one after another, with no decision."""
    for left, body in bodies.items():
        moves._mark(left, moves.MOVED, body)


def not_kept(path: str, format: str, size: int, options: Any, **_: Any) -> None:
    plain_create(path, format, size, options)


plain_create = opening.create_image


def snapshot(folder: Path) -> None:
    snapshots.test_S1_S2_S3_a_snapshot_into_a_new_file(folder, "qcow2")


def qed_snapshot(folder: Path) -> None:
    snapshots.test_S1_S2_S3_a_snapshot_into_a_new_file(folder, "qed")


def given_overlay(folder: Path) -> None:
    snapshots.test_S1_S2_S3_an_overlay_that_somebody_else_made_and_did_not_flush(
        folder, "qcow2", True
    )


def transaction(folder: Path) -> None:
    snapshots.test_S4_two_disks_in_two_folders_are_snapshotted_both_or_neither(folder)


def quiet_change(folder: Path) -> None:
    snapshots.test_a_quiet_change_to_an_image_over_the_present_one(folder, "qcow2")


def copy(folder: Path) -> None:
    copies.test_M1_M2_a_full_copy_into_a_new_file_and_the_pivot(
        folder, "raw", "qcow2", "background"
    )


def raw_copy(folder: Path) -> None:
    copies.test_M4_a_copy_that_is_finished_is_the_disk_at_that_moment(folder, "raw", "background")


def given_target(folder: Path) -> None:
    copies.test_M1_M2_a_copy_into_a_node_whose_file_somebody_else_made(folder, "raw")


def chain(folder: Path) -> None:
    copies.test_a_copy_of_a_chain_with_the_layers_that_are_kept(folder, ["*"])


def there_and_back(folder: Path) -> None:
    copies.test_a_disk_that_was_copied_away_comes_back_under_its_first_name(folder)


def older_record(folder: Path) -> None:
    copies.test_what_is_recorded_of_an_older_image_under_the_new_name_does_not_count(folder, "copy")


def group(folder: Path) -> None:
    copies.test_S4_a_group_of_two_disks_moves_both_or_neither(folder, "commit")


def commit(folder: Path) -> None:
    commits.test_C1_C2_C3_a_commit_of_a_layer_that_nobody_writes(
        folder, "qcow2", crashes.SIZE - (40 << 10), "layer"
    )


def qed_commit(folder: Path) -> None:
    commits.test_C1_C2_C3_a_commit_of_a_layer_that_nobody_writes(
        folder, "qed", crashes.SIZE - (40 << 10), "layer"
    )


def qed_copy(folder: Path) -> None:
    copies.test_M1_M2_a_full_copy_into_a_new_file_and_the_pivot(folder, "qed", "qed", "background")


def guest(folder: Path) -> None:
    partials.test_N1_ST4_what_was_flushed_is_there_and_no_bit_has_no_bytes(folder)


def filled(folder: Path) -> None:
    partials.test_ST1_ST2_ST3_a_stream_to_its_end(folder)


def grows(folder: Path) -> None:
    partials.test_a_disk_grows_while_it_is_being_filled(folder)


def made(folder: Path) -> None:
    partials.test_no_crash_while_it_is_made_leaves_an_image_that_reads_wrong(folder, "partial")


def map_first(self: Partial) -> None:
    """The bits are durable before the bytes."""
    with self.flushing:
        assert self.have is not None
        self.filling.mark(self.have.copy())
        self.file.flush()


def gone_at_once(file: File, path: str) -> None:
    """The map goes before the mark."""
    bitmap_file.remove(path)
    partial.unmark(file.fd)


def replaced(folder: Path) -> None:
    with creates.as_replayed():
        creates.test_a_new_image_takes_the_place_of_an_old_one_at_one_moment(
            folder, "qcow2", creates.plain, {"old", "new"}
        )


def with_data_file(folder: Path) -> None:
    with creates.as_replayed():
        creates.test_an_image_and_its_data_file_change_together(folder, "on", "metadata")


def in_place(folder: Path, format: str = "qcow2") -> None:
    creates.test_in_place_one_finds_the_old_image_or_the_new_one_or_a_refusal(
        folder, format, creates.with_bitmap_in_use
    )


def qed_in_place(folder: Path) -> None:
    in_place(folder, "qed")


def raw_in_place(folder: Path) -> None:
    in_place(folder, "raw")


def filled_in_place(folder: Path) -> None:
    with creates.as_replayed():
        creates.made_over_a_partial_image(folder, "whole", in_place=True)


def kept(image: str, keep: Any = ()) -> None:
    """Bitmap files of an older image stay."""


def retired(image: str) -> Callable[[], None]:
    """The map of an older image stays as it is until the end."""
    return lambda: None


def active(folder: Path) -> None:
    commits.test_C1_C2_M2_an_active_commit_and_its_pivot(folder, "raw", "background", 40 << 10)


def unmarked(self: Keeper, offset: int, length: int) -> tuple[int, int]:
    """A region is written before it is marked."""
    start = offset // self.region * self.region
    end = -(-(offset + length) // self.region) * self.region
    self.holds.clear(start, end - start)
    return start, end


ROWS: list[tuple[str, Scenario, Break]] = [
    (
        "a new overlay's bytes",
        snapshot,
        Without("_make", "_Target.complete", "Snapshot.approach"),
    ),
    (
        "a new overlay's name",
        snapshot,
        Without("_Target.replace", "Snapshot.approach", "record", unless="_store"),
    ),
    ("the record's bytes and name", snapshot, Without("_store", "_replace")),
    ("the old image of a snapshot", snapshot, Without("Snapshot.settle")),
    (
        "a new QED overlay's bytes",
        qed_snapshot,
        Without("_make", "_Target.complete", "Snapshot.approach"),
    ),
    ("the QED target at the pivot", qed_copy, Without("Mirror.settle")),
    (
        "the QED base of a commit",
        qed_commit,
        Without("Commit.approach", "Commit.settle", unless="Commit._name"),
    ),
    ("a given overlay's bytes", given_overlay, Without("Snapshot.approach")),
    ("a group's records", transaction, Without("_record_together")),
    ("the old image of a change", quiet_change, Without("Change.settle")),
    ("the other image's bytes", quiet_change, Without("Change.approach")),
    ("the other image's name", quiet_change, Without("record", unless="_store")),
    ("the target before ready", copy, Without("Mirror._catch_up")),
    ("the target at the pivot", copy, Without("Mirror.settle")),
    ("the copy's record", copy, Without("_store")),
    ("a finished copy's bytes", raw_copy, Without("Mirror.settle")),
    ("a finished copy's name", raw_copy, Without("_Target.replace")),
    ("a finished copy's past", raw_copy, Without("apart")),
    ("a given target's name", given_target, Without("record", unless="_store")),
    ("the layers of a copied chain", chain, Without("Mirror._copy_layer")),
    (
        "the base of a commit",
        commit,
        Without("Commit.approach", "Commit.settle", unless="Commit._name"),
    ),
    ("the header over a commit", commit, Without("Commit._name", "Commit.clean")),
    ("a commit's mark", commit, Without("Into.begin")),
    ("a commit's mark is gone", commit, Without("Into.end")),
    ("the base at the pivot", active, Without("Mirror.settle")),
    ("the base before ready", active, Without("Mirror._catch_up")),
    ("another disk's record is gone", older_record, Without("_forget_others")),
    ("recorded last: snapshot", snapshot, record_last),
    ("recorded last: copy", copy, record_last),
    ("recorded last: change", quiet_change, record_last),
    ("recorded last: active commit", active, record_last),
    ("recorded apart: transaction", transaction, instead(moves, "_record_together", record_apart)),
    ("recorded apart: group", group, instead(moves, "_record_together", record_apart)),
    ("the last bits", copy, instead(Mirror, "_copy_all", lambda self: None)),
    ("no mark of a commit", active, instead(moves, "committing", lambda image, top: None)),
    ("a bitmap's region is marked", bitmaps.guest, Without("Keeper.protect")),
    ("a bitmap file", bitmaps.changes, Without("Marks.__init__", "Marks._replace")),
    ("a bitmap file is in use", bitmaps.rests, Without("Marks._take_over")),
    ("a bitmap file is gone", bitmaps.changes, Without("remove")),
    ("what a new bitmap begins with", bitmaps.guest, Without("changed", unless="Keeper._renew")),
    ("what a cleared bitmap begins with", bitmaps.changes, Without("Keeper._settle")),
    (
        "the time of an image whose bitmaps rest",
        bitmaps.rests,
        Without("Keeper._rest", unless="Marks.__init__"),
    ),
    ("no region is marked", bitmaps.guest, instead(Keeper, "protect", unmarked)),
    ("one size", bitmaps.resizes, instead(Keeper, "resizing", lambda self, size: None)),
    ("bytes before their bits", guest, Without("Partial.flush", unless="Filling.mark")),
    ("the bits", guest, Without("Filling.mark")),
    ("bits before their bytes", guest, instead(Partial, "flush", map_first)),
    ("another map", filled, Without("Filling.store")),
    ("the mark is gone", filled, Without("unmark")),
    ("the map is gone", filled, Without("remove")),
    ("the map goes first", filled, instead(partial, "end", gone_at_once)),
    ("the map of a larger file", grows, Without("Partial.resize", unless="Filling.store")),
    ("a new map", made, Without("Marks.__init__", "Marks._replace")),
    ("a new mark", made, Without("mark", "_Target.complete")),
    ("a new raw image", made, Without("_Target.replace")),
    ("the old name's record", there_and_back, instead(opening, "create_image", not_kept)),
    (
        "a replaced image's bytes",
        replaced,
        Without("_Target.complete", "_make", "_preallocate"),
    ),
    ("a replaced image's name", replaced, Without("_Target.replace")),
    ("a data file's old name", with_data_file, Without("_Target.set_aside")),
    ("both old names are gone", with_data_file, Without("_Target.forget")),
    ("the header of an image that is made in place", in_place, Without("_make")),
    ("the bytes of an image that is lost", qed_in_place, Without("_Target.begin")),
    ("bitmaps of an image that is lost", raw_in_place, instead(keeper, "fresh", kept)),
    ("the map of an image that is lost", filled_in_place, instead(partial, "retire", retired)),
    ("another disk's record", older_record, instead(moves, "_forget_others", lambda m: None)),
]


@pytest.mark.parametrize(
    ("scenario", "broken"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_the_crash_tests_notice(
    tmp_path: Path, scenario: Scenario, broken: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crashes, "BREAK", [broken])
    with pytest.raises(crashes.Wrong):
        scenario(tmp_path)


class Recorded(Exception):
    """All that was wanted of a crash test."""


def test_every_flush_of_an_operation_has_a_row_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking: set[str] = set()

    def note(patch: pytest.MonkeyPatch) -> None:
        for flush in FLUSHES:
            plain = getattr(sysio, flush)

            def noting(what: Any, plain: Callable[[Any], None] = plain) -> None:
                asking.update([c for c in callers() if c not in WAY_DOWN][:1])
                plain(what)

            patch.setattr(sysio, flush, noting)

    def each(*_: Any, **__: Any) -> int:
        raise Recorded

    monkeypatch.setattr(crashes, "BREAK", [note])
    monkeypatch.setattr(crashes.Judge, "each", each)
    monkeypatch.setattr(creates, "states", each)
    for number, scenario in enumerate(dict.fromkeys(row[1] for row in ROWS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Recorded):
            scenario(folder)
    rows = set[str]().union(*(row[2].names for row in ROWS if isinstance(row[2], Without)))
    assert asking - rows - set(MAY_BE_LOST) == set()
    assert set(MAY_BE_LOST) <= asking
