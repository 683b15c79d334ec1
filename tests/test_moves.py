"""The records of moves: which image is current is decidable from what is on disk alone.

S3, S4, M1 to M5's last step, and the invariant of pivots: "no record" always means the image that
was left, "record" always the one that it names, whoever crashed and whenever.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cowferry
from cowferry.block import moves, sysio
from cowferry.block.moves import Move, follow
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import ImageError

Cut = Callable[[], None]


class PowerCut(Exception):
    """The moment at which a test stops everything."""


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Every changing call from the `number`-th on fails as if the power were gone."""
    calls = [0]

    def guard(name: str) -> None:
        plain = getattr(sysio, name)

        def wrapped(*arguments: object) -> None:
            calls[0] += 1
            if calls[0] > number:
                raise PowerCut
            plain(*arguments)

        monkeypatch.setattr(sysio, name, wrapped)

    for name in ("pwrite", "fdatasync", "rename", "unlink", "flush_directory"):
        guard(name)
    return calls


def image(folder: Path, name: str) -> str:
    path = folder / name
    path.touch()
    return str(path)


def move(*pairs: tuple[str, str], origins: tuple[str, ...] = ("", "")) -> None:
    moves.record([Move(f"d{n}", a, b, "raw", origin=origins[n]) for n, (a, b) in enumerate(pairs)])


def test_without_a_record_the_image_itself_is_current(tmp_path: Path) -> None:
    a = image(tmp_path, "a")
    assert follow(a, "qcow2") == (a, "qcow2", 0, None)


def test_a_record_leads_on_however_far(tmp_path: Path) -> None:
    names = [image(tmp_path, f"i{n}") for n in range(20)]
    for left, current in itertools.pairwise(names):
        move((left, current))
    for name in names:
        assert follow(name).path == names[-1]


@pytest.mark.parametrize("seed", range(30))
def test_wherever_a_disk_wanders_every_image_on_its_way_leads_to_it(
    tmp_path: Path, seed: int
) -> None:
    rnd = random.Random(seed)
    names = [image(tmp_path, f"i{n}") for n in range(5)]
    at, visited = names[0], {names[0]}
    for _ in range(30):
        to = rnd.choice([n for n in names if n != at])
        move((at, to), origins=(names[0] if seed % 2 else "",))
        at = to
        visited.add(at)
        assert follow(names[0]).path == at
        for name in visited:
            assert follow(name).path == at, "an image that was left leads elsewhere"


def test_the_name_by_which_a_disk_was_opened_leads_straight_to_it(tmp_path: Path) -> None:
    """Whoever makes another image under a name in between takes nothing from the way."""
    a, p, q, r = (str(tmp_path / f"{n}.raw") for n in "apqr")
    for path in (a, p, q, r):
        opening.create_image(path, "raw", 1 << 20, {})
    for left, current in ((a, p), (p, q), (q, r)):
        moves.record([Move("vm", left, current, "raw", origin=a)])
        assert follow(a).path == current
    for gone in (p, q):
        os.unlink(gone)
        opening.create_image(gone, "raw", 1 << 20, {})
        assert follow(gone).path == gone
        assert follow(a).path == r
    moves.record([Move("vm", r, a, "raw", origin=a)])  # home again
    assert follow(a).path == a and follow(r).path == a


@pytest.mark.parametrize("seed", range(6))
def test_a_power_cut_at_each_call_leaves_the_old_or_the_new_and_never_a_third(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two disks wander as one; each move is cut after each number of calls."""
    rnd = random.Random(seed)
    ones = [image(tmp_path, f"a{n}") for n in range(3)]
    twos = [image(tmp_path, f"b{n}") for n in range(3)]
    at = (ones[0], twos[0])
    outcomes = set()
    for _ in range(4):
        to = (
            rnd.choice([n for n in ones if n != at[0]]),
            rnd.choice([n for n in twos if n != at[1]]),
        )
        cut = 0
        while True:
            before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
            with monkeypatch.context() as patch:
                patch.setattr(moves, "_void", lambda path: None)  # nobody is there to mend
                calls = cut_at(patch, cut)
                try:
                    move((at[0], to[0]), (at[1], to[1]), origins=(ones[0], twos[0]))
                    done = calls[0] <= cut
                except PowerCut:
                    done = False
            now = (follow(ones[0]).path, follow(twos[0]).path)
            assert now in (at, to), f"a third place, cut at call {cut}"
            outcomes.add(now == to)
            if done:
                assert now == to
                break
            for p in tmp_path.iterdir():
                p.unlink()
            for name, data in before.items():
                (tmp_path / name).write_bytes(data)
            cut += 1
        at = to
    assert outcomes == {False, True}


@pytest.mark.parametrize("failing", ["pwrite", "fdatasync", "rename", "flush_directory"])
@pytest.mark.parametrize("disks", [1, 2])
def test_a_record_that_could_not_be_made_durable_does_not_count(
    tmp_path: Path, failing: str, disks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk goes on in its old image: a record must not contradict it after a crash."""
    pairs = [(image(tmp_path, f"a{n}"), image(tmp_path, f"b{n}")) for n in range(disks)]
    plain = getattr(sysio, failing)
    decided = False
    for good in itertools.count():
        calls = [0]

        def once(*arguments: object, good: int = good, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == good + 1:
                raise OSError(errno.EIO, "Input/output error")
            plain(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(sysio, failing, once)
            try:
                move(*pairs)
            except OSError:
                for left, _ in pairs:
                    assert follow(left).path == left
                assert not list(tmp_path.glob("*.moved*"))
                continue
        decided = True
        for left, current in pairs:
            assert follow(left).path == current
        if calls[0] <= good:
            break
        for p in tmp_path.glob("*.moved*"):
            p.unlink()
    assert decided


def test_a_new_image_under_an_old_name_has_no_past(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.qcow2"), image(tmp_path, "b")
    opening.create_image(a, "qcow2", 1 << 20, {})
    move((a, b))
    moves.committing(a, b)
    os.unlink(a)
    opening.create_image(a, "qcow2", 1 << 20, {})
    assert follow(a).path == a
    assert moves.half_committed(a) is None


def test_C2_a_mark_of_a_commit_stands_until_the_move_is_recorded(tmp_path: Path) -> None:
    base, top = image(tmp_path, "base"), image(tmp_path, "top")
    moves.committing(base, top)
    assert moves.half_committed(base) == top
    move((top, base))  # the active commit's pivot; then the power is cut before the mark goes
    assert moves.half_committed(base) is None
    moves.committed(base)
    assert moves.half_committed(base) is None


def test_records_lie_in_the_state_folder_where_they_cannot_lie_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWFERRY_STATE", str(tmp_path / "state"))
    a, b = "/dev/loop999", image(tmp_path, "b")
    move((a, b))
    assert follow(a) == (b, "raw", 1, None)
    folder = tmp_path / "theirs"
    folder.mkdir()
    c, d = image(folder, "c"), image(folder, "d")
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(folder))
    move((c, d), (b, a))
    assert [p.name for p in sorted(folder.iterdir())] == ["c", "d"]
    assert follow(c).path == d
    assert follow(b).path == a
    assert follow(a).path == a


def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    a = image(tmp_path, "a")
    (tmp_path / "a.moved").write_text("{")
    with pytest.raises(OSError, match=r"a\.moved' is damaged"):
        follow(a)


def test_S3_serving_the_old_name_opens_the_image_that_the_disk_is_in(tmp_path: Path) -> None:
    path, state = tmp_path / "vm.qcow2", tmp_path / "b.qcow2"
    opening.create_image(str(path), "qcow2", 1 << 20, {})
    daemon = Daemon()
    try:
        disk = daemon.open_disk("vm", str(path))
        disk.pwrite(memoryview(b"old" * 100), 0)
        daemon.execute("blockdev-snapshot-sync", {"device": "vm", "snapshot-file": str(state)})
        disk.pwrite(memoryview(b"new" * 100), 0)
    finally:
        daemon.close()
    with cowferry.open(str(path)) as disk:
        assert disk.root.filename == str(state)
        got = bytearray(3)
        disk.pread(memoryview(got), 0)
        assert got == b"new"
    state.unlink()
    with pytest.raises(ImageError, match=r"has moved to .* which is not there"):
        opening.current_image(str(path))


def test_C2_a_mark_is_about_the_file_that_was_marked(tmp_path: Path) -> None:
    """Not about one that another tool makes under its name; and about a copy of both."""
    base, top = Path(image(tmp_path, "base")), image(tmp_path, "top")
    moves.committing(str(base), top)
    restored = tmp_path / "restored" / "base"
    restored.parent.mkdir()
    for suffix in ("", moves.COMMITTING):
        shutil.copy2(f"{base}{suffix}", f"{restored}{suffix}")
    assert moves.half_committed(str(restored)) == top
    assert moves.half_committed(str(base)) == top
    base.unlink()
    base.write_bytes(b"new")
    assert moves.half_committed(str(base)) is None
    moves.committing(str(base), top)
    assert moves.half_committed(str(base)) == top


def test_C2_a_half_committed_base_is_not_served_alone(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    opening.create_image(str(base), "raw", 1 << 20, {})
    opening.create_image(
        str(top), "qcow2", 1 << 20, {"backing_file": "base.raw", "backing_fmt": "raw"}
    )
    moves.committing(str(base), str(top))
    with pytest.raises(ImageError, match="cannot be used by itself"):
        opening.current_image(str(base))
    with cowferry.open(str(top)) as disk:  # in its chain it is as good as ever
        assert disk.root.backing is not None
