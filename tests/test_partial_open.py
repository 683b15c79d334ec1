"""Raw images that are being filled, opened: whoever opens one finds the rest of it, or is refused.

Its map may be lost, damaged or another image's; then nobody gets what is in the file for a disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base, overlay
from cowferry.block import bitmap_file, sysio
from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.drivers import opening, partial
from cowferry.drivers.partial import ATTRIBUTE, FILLING, GRANULE, Partial
from cowferry.drivers.raw import Raw
from cowferry.errors import CowferryError, ImageError
from daemons import a_daemon
from test_cli_offline import cowferry
from test_partial import SIZE, a_partial, complete, filling_of, opened, put

# Every way of opening it ------------------------------------------------------------------------


def test_every_way_of_opening_a_raw_image_finds_the_rest(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        put(Disk(node), oracle, 70_000, b"some bytes")
    ways: list[dict[str, Any]] = [
        {},
        {"format": "raw"},
        {"read_only": True},
        {"read_only": True, "force_share": True},
    ]
    for how in ways:
        with opened(path, **how) as node:
            assert isinstance(node, Partial) and node.driver == "raw"
            assert not differs(contents(node), oracle)
    over = overlay(tmp_path, "over.qcow2", "vm.raw", "raw", SIZE)
    with opened(over) as node:
        assert not differs(contents(node), oracle)
    with a_daemon() as daemon:
        file = {"driver": "file", "filename": str(path)}
        daemon.execute("blockdev-add", {"driver": "raw", "node-name": "n", "file": file})
        assert not differs(contents(daemon.graph.disk("n")), oracle)
        daemon.execute("blockdev-del", {"node-name": "n"})
        daemon.execute("blockdev-add", {**file, "node-name": "f"})
        daemon.execute("blockdev-add", {"driver": "raw", "node-name": "n", "file": "f"})
        assert not differs(contents(daemon.graph.disk("n")), oracle)


def test_what_cannot_find_the_rest_is_refused(tmp_path: Path) -> None:
    path, _ = a_partial(tmp_path)
    file = {"driver": "file", "filename": str(path)}
    raw = {"driver": "raw", "file": file}
    bad: list[tuple[dict[str, Any], str]] = [
        ({**raw, "offset": 512}, "no windows"),
        ({**raw, "size": 4096}, "no windows"),
        ({"driver": "raw", "file": raw}, "has a backing file"),
        ({"driver": "qcow2", "file": raw}, "has a backing file"),
    ]
    for options, words in bad:
        with pytest.raises(CowferryError, match=words):
            opening.open_node(options)
    over = overlay(tmp_path, "over.qcow2", "vm.raw", "raw", SIZE)
    with pytest.raises(ImageError, match="part only"):
        opening.open_node(
            {"driver": "qcow2", "file": {"driver": "file", "filename": str(over)}, "backing": file}
        )
    with a_daemon() as daemon:
        daemon.execute("blockdev-add", {**file, "node-name": "f"})
        with pytest.raises(ImageError, match="part only"):
            daemon.graph.disk("f")  # an export's, or a copy's


def test_two_do_not_write_it_and_a_reader_beside_a_writer_has_to_say_so(tmp_path: Path) -> None:
    path, _ = a_partial(tmp_path)
    with opened(path):
        for read_only in (False, True):
            with pytest.raises(CowferryError, match="lock"):
                opening.open_image(str(path), read_only=read_only)
        with pytest.raises(CowferryError, match="lock"):
            opening.create_image(str(path), "raw", SIZE, {})
        assert filling_of(path).exists(), "the map of an image in use went"
        with opened(path, read_only=True, force_share=True):
            pass


def test_a_new_image_under_the_name_has_nothing_of_the_old_one(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        put(Disk(node), oracle, 0, b"old")
    opening.create_image(str(path), "raw", 4096, {})
    assert complete(path) and path.read_bytes() == bytes(4096)
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        assert not differs(contents(node), oracle)
    path.unlink()  # and its map stays
    path, oracle = a_partial(tmp_path, 8192)
    with opened(path) as node:
        assert not differs(contents(node), oracle)


# The map is lost, damaged, or another image's ------------------------------------------------

Harm = Callable[[Path], None]


def lost(path: Path) -> None:
    filling_of(path).unlink()


def cut_short(path: Path) -> None:
    os.truncate(filling_of(path), 4100)


def empty(path: Path) -> None:
    os.truncate(filling_of(path), 0)


def flipped(at: int) -> Harm:
    def flip(path: Path) -> None:
        data = bytearray(filling_of(path).read_bytes())
        data[at] ^= 4
        filling_of(path).write_bytes(data)

    return flip


def changed(**members: Any) -> Harm:
    """A sound file that says something else."""

    def change(path: Path) -> None:
        found = bitmap_file.read(str(filling_of(path)))
        assert found is not None
        for name, value in members.items():
            setattr(found, name, value)
        if "size" in members:
            found.entries[0].bits = found.entries[0].bits[: found.bits(GRANULE)]
        bitmap_file.write(str(filling_of(path)), found)

    return change


def of_no_kind(path: Path) -> None:
    found = bitmap_file.read(str(filling_of(path)))
    assert found is not None
    found.entries[0].kind = "dirty"
    bitmap_file.write(str(filling_of(path)), found)


def without_mark(path: Path) -> None:
    os.removexattr(path, ATTRIBUTE)


def other_mark(path: Path) -> None:
    os.setxattr(path, ATTRIBUTE, b"no token at all")


def shorter(path: Path) -> None:
    os.truncate(path, SIZE - 512)


def a_folder(path: Path) -> None:
    filling_of(path).unlink()
    filling_of(path).mkdir()


HARM: dict[str, tuple[Harm, str]] = {
    "lost": (lost, r"vm.raw.filling', which says which part, is not there"),
    "cut short": (cut_short, "cut short"),
    "empty": (empty, "cut short: 0 bytes"),
    "header": (flipped(17), "header's checksum"),
    "magic": (flipped(0), "does not begin like one"),
    "bits": (flipped(4096), "checksum of bitmap 'filling'"),
    "of another image": (changed(token=b"x" * 16), "is of another image than"),
    "of another image that is complete": (
        changed(token=b"x" * 16, backing=None), "is of another image than",
    ),
    "of another size": (changed(size=SIZE - 4096), rf"of {SIZE - 4096} bytes, and '.*' has {SIZE}"),
    "the image is shorter": (shorter, f"of an image of {SIZE} bytes, and '.*' has {SIZE - 512}"),
    "of another kind": (of_no_kind, "other bitmaps"),
    "no mark": (without_mark, "is of another image than"),
    "another mark": (other_mark, "is of another image than"),
    "no file": (a_folder, "part only"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARM)
def test_without_its_map_it_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path, _ = a_partial(tmp_path)
    with opened(path) as node:
        Disk(node).pwrite(memoryview(b"x" * 4096), 0)
    harm, words = HARM[kind]
    harm(path)
    before = path.read_bytes()
    for read_only, backing in ((False, True), (True, True), (True, False)):
        with pytest.raises(ImageError, match=words) as refused:
            opening.open_image(str(path), read_only=read_only, backing=backing)
        assert "vm.raw" in refused.value.desc and refused.value.hint
    assert path.read_bytes() == before


def test_a_map_that_cannot_be_written_is_told_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, oracle = a_partial(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sysio, "fdatasync", lambda fd: crash(fd))
        with pytest.raises(ImageError, match=r"vm.raw.filling' cannot be written: the power fails"):
            opening.open_image(str(path))
    with opened(path, read_only=True) as node:
        assert not differs(contents(node), oracle)
    a_folder(path)
    with pytest.raises(ImageError, match="is in the way"), contextlib.closing(raw_file(path)) as f:
        partial.declare_complete(f)


def raw_file(path: Path) -> Node:
    return opening.open_node(opening.file_options(str(path)))


def test_where_there_are_no_attributes_the_map_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*arguments: object) -> bytes:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "getxattr", unable)
    monkeypatch.setattr(os, "setxattr", unable)
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        put(Disk(node), oracle, 70_000, b"guest")
    with opened(path) as node:
        assert isinstance(node, Partial) and not differs(contents(node), oracle)
        node.set_backing(None, None)
    assert not filling_of(path).exists()


def test_a_map_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path, _ = a_partial(tmp_path)
    data = bytearray(filling_of(path).read_bytes())
    sector = data[: bitmap_file.SECTOR]
    sector[8] = 99
    filling_of(path).write_bytes(bitmap_file._sealed(bytes(sector[:-4])) + data[len(sector) :])
    with pytest.raises(ImageError, match="version 99") as refused:
        opening.open_image(str(path))
    assert "remove" not in refused.value.hint


def crash(path: str) -> None:
    raise OSError(errno.EIO, "the power fails")


@pytest.mark.parametrize("how", ["complete", "void", "complete and not marked"])
def test_whoever_opens_it_after_a_crash_a_moment_after_the_end_tidies_up(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = a_partial(tmp_path)
    oracle = bytes(range(256)) * (SIZE // 256)
    path.write_bytes(oracle)
    found = bitmap_file.read(str(filling_of(path)))
    assert found is not None
    found.backing = None
    bitmap_file.write(str(filling_of(path)), found)
    if how != "complete":
        os.removexattr(path, ATTRIBUTE)
    if how == "void":
        with monkeypatch.context() as patch:
            patch.setattr(sysio, "unlink", crash)
            bitmap_file.remove(str(filling_of(path)))
    for read_only in (True, False):
        with opened(path, read_only=read_only) as node:
            assert type(node) is Raw and bytes(contents(node)) == oracle
        assert complete(path) != read_only
    assert complete(path)


def test_a_copy_without_attributes_is_put_right_as_the_hint_says(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    without_mark(path)
    with pytest.raises(ImageError) as refused:
        opening.open_image(str(path))
    token = refused.value.hint.split(" -v ")[1].split()[0]
    assert f"setfattr -n {ATTRIBUTE} -v {token} '{path}'" in refused.value.hint
    os.setxattr(path, ATTRIBUTE, token.encode())
    with opened(path) as node:
        assert not differs(contents(node), oracle)


def test_what_another_program_has_changed_at_rest_is_refused_until_somebody_answers_for_it(
    tmp_path: Path,
) -> None:
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        put(Disk(node), oracle, 70_000, b"guest")
    copied = path.with_name("copied.raw")
    for suffix in ("", FILLING):
        shutil.copy2(f"{path}{suffix}", f"{copied}{suffix}")
    with open(path, "r+b") as f:  # into a hole, say, where nobody would ever see it
        f.seek(SIZE - 512)
        f.write(b"x" * 512)
    for read_only in (True, False):
        with pytest.raises(ImageError, match="another program has changed it since") as refused:
            opening.open_image(str(path), read_only=read_only)
    hint = refused.value.hint
    assert f"cowferry rebase --complete '{path}'" in hint
    subprocess.run(hint[hint.index("touch ") : hint.index("'. ") + 1], shell=True, check=True)
    for found in (path, copied):  # of the copy nobody knows when it was written
        os.utime(copied)
        with opened(found) as node:
            assert not differs(contents(node), oracle)


def test_a_name_that_is_no_plain_path_is_not_followed(tmp_path: Path) -> None:
    path, _ = a_partial(tmp_path)
    for name, said in (("json:{}", "not a plain path"), ("nbd://127.0.0.1/x", "is an export")):
        changed(backing=(name, "raw"))(path)
        with pytest.raises(ImageError, match=said):
            opening.open_image(str(path))
    changed(backing=("base.raw", ""))(path)
    with pytest.raises(ImageError, match="does not record the format"):
        opening.open_image(str(path))
    changed(backing=("gone.raw", "raw"))(path)
    with pytest.raises(ImageError, match=r"backing file of .*vm.raw"):
        opening.open_image(str(path))
    changed(backing=("vm.raw", "raw"))(path)
    with pytest.raises(CowferryError):
        opening.open_image(str(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backing_file": "base.raw"}, "without backing format"),
        ({"backing_fmt": "raw"}, "with a backing file"),
        ({"granularity": 4096}, "with a backing file"),
        ({"backing_file": "base.raw", "backing_fmt": "raw", "granularity": 5000}, "power of two"),
        ({"backing_file": "base.raw", "backing_fmt": "raw", "granularity": "4M"}, "power of two"),
        ({"backing_file": "base.raw", "backing_fmt": "raw", "granularity": "x"}, "a size"),
        ({"backing_file": "x" * 5000, "backing_fmt": "raw"}, "longer than"),
        ({"backing_file": "base.raw", "backing_fmt": "raw", "cluster_size": 4096}, "no option"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(CowferryError, match=words):
        opening.create_image(str(tmp_path / "vm.raw"), "raw", SIZE, options)
    assert not list(tmp_path.iterdir())


# The command line ---------------------------------------------------------------------------------


def test_the_offline_commands(tmp_path: Path) -> None:
    oracle = make_base(tmp_path, SIZE)
    vm, base, flat = tmp_path / "vm.raw", tmp_path / "base.raw", tmp_path / "flat.raw"
    told = cowferry("create", "-f", "raw", "-b", "base.raw", "-F", "raw", vm)
    assert f"size={SIZE} backing_file=base.raw backing_fmt=raw" in told
    with opened(vm) as node:
        put(Disk(node), oracle, 100_000, b"guest")
    info = json.loads(cowferry("info", "--output=json", vm))
    assert info["format"] == "raw" and info["backing-filename"] == "base.raw"
    assert info["filling"] == {
        "filename": str(filling_of(vm)), "filled": GRANULE, "granularity": GRANULE,
    }  # fmt: skip
    assert "being filled: 64 KiB of 3 MiB (2%)" in cowferry("info", vm)
    runs = json.loads(cowferry("map", "--output=json", vm))
    assert [(r["start"], r["depth"]) for r in runs][:3] == [(0, 1), (65536, 0), (131072, 1)]
    cowferry("convert", "-O", "raw", vm, flat)
    assert not differs(flat.read_bytes(), oracle)
    assert "identical" in cowferry("compare", flat, vm)
    assert "mismatch at offset" in cowferry("compare", base, vm, code=1)
    cowferry("check", vm, code=63)
    cowferry("resize", vm, "+64k")
    oracle.extend(bytes(64 << 10))
    base.rename(tmp_path / "moved.raw")
    assert "base.raw" in cowferry("compare", flat, vm, code=2)
    cowferry("rebase", "-u", "-b", "moved.raw", "-F", "raw", vm)
    lost = tmp_path / "lost"
    filling_of(vm).rename(lost)
    assert "which says which part, is not there" in cowferry("info", vm, code=1)
    lost.rename(filling_of(vm))
    assert "is not complete" in cowferry("rebase", "--complete", vm, code=1)
    cowferry("rebase", "-b", "", vm)
    assert complete(vm) and not differs(vm.read_bytes(), oracle)
    cowferry("rebase", "-b", "x.raw", "-F", "raw", vm, code=1)


def test_only_who_says_so_gets_an_image_whose_map_is_lost(tmp_path: Path) -> None:
    path, oracle = a_partial(tmp_path)
    with opened(path) as node:
        put(Disk(node), oracle, 0, bytes(oracle))
    for harm in (lost, empty):
        opening.create_image(
            str(path), "raw", SIZE, {"backing_file": "base.raw", "backing_fmt": "raw"}
        )
        with opened(path) as node:
            put(Disk(node), oracle, 0, bytes(oracle))
        harm(path)
        assert "--complete" in cowferry("info", path, code=1)
        cowferry("rebase", "--complete", path)
        assert complete(path)
        with opened(path) as node:
            assert not differs(contents(node), oracle)
