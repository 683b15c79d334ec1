"""Power cuts while a new image is made where an old one lies.

At each moment one finds the old disk, or the new image, or a refusal; and nothing that belongs to
the old image, a record or a bitmap file, is believed of the new one. Once the command has answered
it is the new image.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import crashes
from chains import contents
from cowferry.block import bitmap_file, keeper, moves, names
from cowferry.block.bitmap import Bitmap
from cowferry.block.bitmap_file import Stamp
from cowferry.block.moves import Move
from cowferry.drivers import opening
from cowferry.drivers import partial as maps
from cowferry.drivers.formats import format_of
from cowferry.errors import ImageError
from crashes import Wrong
from writelog import Log, State, put_attributes, states

SIZE = 64 << 10
OLD, ELSEWHERE, BASE = (bytes([n]) * SIZE for n in (17, 34, 51))
NEW = bytes(2 * SIZE)
HALF = OLD[: SIZE // 2] + BASE[SIZE // 2 :]


@contextmanager
def as_replayed(in_place: bool = False) -> Iterator[None]:
    """A replay has other files: an image is told from another by its bytes, a record is itself.

    An image that is made in place is the same file as the old one, with another time of change."""

    def stamp_of(fd: int) -> Stamp:
        now = zlib.crc32(os.pread(fd, os.fstat(fd).st_size, 0))
        return Stamp(1, now) if in_place else Stamp(now, 1)

    def identity(path: str) -> int:
        same = in_place or "committing" in path
        return 1 if same else zlib.crc32(Path(path).read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap_file, "stamp_of", stamp_of)
        patch.setattr(names, "identity", identity)
        yield


@pytest.fixture(autouse=True)
def replayed() -> Iterator[None]:
    with as_replayed():
        yield


def written(path: Path, data: bytes, format: str | None = None, **options: str) -> None:
    """An image that holds these bytes."""
    opening.create_image(str(path), format or path.suffix[1:], len(data), options)
    node = opening.open_image(str(path), format)
    node.pwrite(memoryview(data), 0)
    node.flush()
    opening.close_chain(node)


def with_bitmap(path: Path, format: str | None = None) -> None:
    """The image gets a bitmap, all clean, and is closed."""
    node = opening.open_image(str(path), format)
    keeper.keep(node, Bitmap("b", node.size, 4096, persistent=True))
    opening.close_chain(node)


def with_bitmap_in_use(path: Path, format: str | None = None) -> None:
    """The same, and its daemon was killed."""
    with_bitmap(path, format)
    node = opening.open_image(str(path), format)
    node.changing(0, 512)
    assert node.keeper is not None
    node.keeper.close()
    node.keeper = None
    opening.close_chain(node)


def moved(path: Path) -> None:
    """The disk has moved on to another image."""
    there = path.parent / "elsewhere.raw"
    there.write_bytes(ELSEWHERE)
    moves.record([Move("vm", str(path), str(there), "raw")])


def half_committed(path: Path) -> None:
    moves.committing(str(path), str(path.parent / "top.qcow2"))


def half_copied(path: Path) -> None:
    moves.copying(str(path), str(path.parent / "source.raw"), "b", SIZE, 1)


def plain(path: Path) -> None:
    """Nothing is recorded of it."""


def linked(path: Path) -> None:
    """The file has another name, so it cannot be replaced."""
    os.link(path, path.parent / "another name")


def both(*kinds: Callable[[Path], None]) -> Callable[[Path], None]:
    def each(path: Path) -> None:
        for kind in kinds:
            kind(path)

    return each


def look(path: Path) -> str:
    """What is found under the name: the old disk, the new one, nothing, or a refusal."""
    try:
        current, format = opening.current_image(str(path))
        if not os.path.exists(current):
            return "nothing"
        data = bytes(crashes.sound(current, format, "found"))
        node = opening.open_image(current, format, read_only=True)
    except ImageError:
        return "refused"
    try:
        if current != str(path):
            assert data == ELSEWHERE
            return "moved"
        known = {OLD: "old", NEW: "new", BASE: "base", HALF: "half", b"": "empty"}
        if format_of(current) == "raw":
            known[bytes(SIZE)] = "new"
        found = known.get(data, f"wrong: {len(data)} bytes, {data[:1]!r} to {data[-1:]!r}")
        believed = [b for b in node.bitmaps.values() if not b.inconsistent]
        assert found == "old" or not believed, f"{found}, with a bitmap of the old image"
        return found
    finally:
        opening.close_chain(node)


def judge(folder: Path, path: Path, make: Callable[[], None]) -> set[str]:
    """Make it under a write log, and look at each state. Returns what was found before the end."""
    with pytest.MonkeyPatch.context() as patch:
        for breaks in crashes.BREAK:
            breaks(patch)
        with Log(folder) as log:
            make()
            log.mark("made", look=True)
    found = set()
    for state in states(log, 3, samples=8):
        put(folder, state)
        try:
            what = look(path)
            assert "wrong" not in what, what
            if "made" in state.marks:
                assert what in ("new", "base"), what
                left = [p for p in state.files if p.endswith((".new", ".old"))]
                assert not left, left
        except AssertionError as error:
            raise Wrong(f"{state.what}: {error}") from error
        found.add(what)
    return found


def put(folder: Path, state: State) -> None:
    for left in folder.iterdir():
        left.unlink()
    for name, data in state.files.items():
        Path(name).write_bytes(data)
        put_attributes(Path(name), state.attributes[name])


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (plain, {"old", "new"}),
        (moved, {"moved", "new"}),
        (half_committed, {"refused", "new"}),
        (half_copied, {"refused", "new"}),
        (with_bitmap, {"old", "new"}),
        (with_bitmap_in_use, {"old", "new"}),
        (both(with_bitmap, half_committed, moved), {"moved", "new"}),
    ],
    ids=["plain", "moved", "half committed", "half copied", "bitmap", "in use", "all"],
)
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_new_image_takes_the_place_of_an_old_one_at_one_moment(
    tmp_path: Path, format: str, kind: Callable[[Path], None], found: set[str]
) -> None:
    path = tmp_path / f"vm.{format}"
    written(path, OLD)
    kind(path)
    options = {"preallocation": "metadata"} if format == "qcow2" else {}
    make = partial(opening.create_image, str(path), format, len(NEW), options)
    assert judge(tmp_path, path, make) == found


@pytest.mark.parametrize(("old", "new"), [("qcow2", "raw"), ("raw", "qcow2"), ("qed", "qcow2")])
def test_an_image_of_another_format_takes_the_place_at_one_moment(
    tmp_path: Path, old: str, new: str
) -> None:
    """Each state is an image of one of the two formats, and no bitmap of the old one is believed
    of the new one."""
    path = tmp_path / "vm"
    written(path, OLD, old)
    with_bitmap_in_use(path, old)
    with Log(tmp_path) as log:
        opening.create_image(str(path), new, len(NEW), {})
        log.mark("made", look=True)
    for state in states(log, 3, samples=8):
        put(tmp_path, state)
        found = {}
        for format in (old, new):
            with suppress(ImageError):
                node = opening.open_image(str(path), format, read_only=True)
                found[format] = bytes(contents(node))
                believed = [b for b in node.bitmaps.values() if not b.inconsistent]
                opening.close_chain(node)
                assert found[old] == OLD if believed else True, state.what
        assert found.get(old) == OLD or found.get(new) == NEW, state.what
        assert "made" not in state.marks or found[new] == NEW


@pytest.mark.parametrize("raw", ["on", "off"])
@pytest.mark.parametrize("how", ["off", "metadata"])
def test_an_image_and_its_data_file_change_together(tmp_path: Path, raw: str, how: str) -> None:
    path = tmp_path / "vm.qcow2"
    options = {"data_file": "data.raw", "data_file_raw": raw}
    written(path, OLD, **options)

    def make() -> None:
        opening.create_image(str(path), "qcow2", len(NEW), {**options, "preallocation": how})

    found = judge(tmp_path, path, make)
    assert found == {"old", "new", "nothing"}  # then both old files have names that end in .old


def test_a_data_file_that_is_there_is_kept_until_the_image_is_there(tmp_path: Path) -> None:
    """As a raw image it has records of its own."""
    path, data = tmp_path / "vm.qcow2", tmp_path / "data.raw"
    data.write_bytes(OLD)
    with_bitmap(data)

    def make() -> None:
        opening.create_image(str(path), "qcow2", len(NEW), {"data_file": "data.raw"})

    assert judge(tmp_path, path, make) == {"nothing", "new"}
    assert not os.path.exists(f"{data}.bitmaps")


@pytest.mark.parametrize("attributes", [True, False], ids=["attributes", "no attributes"])
@pytest.mark.parametrize("new", ["whole", "partial"])
@pytest.mark.parametrize("in_place", [False, True], ids=["renamed", "in place"])
def test_the_map_of_a_raw_image_that_was_being_filled_is_not_believed_of_the_new_one(
    tmp_path: Path, new: str, attributes: bool, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not attributes:
        monkeypatch.setattr(maps, "marked", lambda fd: None)
    found = made_over_a_partial_image(tmp_path, new, in_place) - {"refused"}
    good = "base" if new == "partial" else "new"
    assert found == {"half", good} or (in_place and found <= {"half", good})


def made_over_a_partial_image(folder: Path, new: str, in_place: bool) -> set[str]:
    """What is found at each moment."""
    (folder / "base.raw").write_bytes(BASE)
    path = folder / "vm.raw"
    below = {"backing_file": "base.raw", "backing_fmt": "raw", "granularity": "4096"}
    opening.create_image(str(path), "raw", SIZE, below)
    node = opening.open_image(str(path))
    node.pwrite(memoryview(OLD)[: SIZE // 2], 0)
    opening.close_chain(node)
    if in_place:
        linked(path)
    options = below if new == "partial" else {}
    return judge(folder, path, partial(opening.create_image, str(path), "raw", SIZE, options))


@pytest.mark.parametrize("kind", [plain, with_bitmap, with_bitmap_in_use, half_committed, moved])
@pytest.mark.parametrize("format", ["qcow2", "qed", "raw"])
def test_in_place_one_finds_the_old_image_or_the_new_one_or_a_refusal(
    tmp_path: Path, format: str, kind: Callable[[Path], None]
) -> None:
    path = tmp_path / f"vm.{format}"
    with as_replayed(in_place=True):
        written(path, OLD)
        kind(path)
        linked(path)
        options = {"preallocation": "metadata"} if format == "qcow2" else {}
        size = SIZE if format == "raw" else len(NEW)  # a raw image has no header to tell them apart
        make = partial(opening.create_image, str(path), format, size, options)
        found = judge(tmp_path, path, make)
    assert found <= {"old", "new", "refused", "moved", "empty"}
    assert format == "raw" or "empty" not in found
