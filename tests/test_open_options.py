"""Options with which images are opened: each is honoured, or refused with the words it takes."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import contents
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.drivers import fdsets, opening
from cowferry.errors import CowferryError
from daemons import Told, a_daemon
from offline import cowferry
from tests_support import need

MiB = 1 << 20
SIZE = 4 * MiB


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Disk]:
    given = {k.replace("_", "-"): v for k, v in options.items()}
    file = {"driver": "file", "filename": str(path), **given.pop("file", {})}
    node = opening.open_node({"driver": path.suffix[1:], "file": file, **given})
    disk = Disk(node, "vm")
    try:
        yield disk
    finally:
        disk.flush()
        opening.close_chain(disk.root)


@pytest.fixture(params=["raw", "qcow2", "qed"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Full of bytes."""
    path = tmp_path / f"vm.{request.param}"
    opening.create_image(str(path), request.param, SIZE, {})
    with opened(path) as disk:
        disk.pwrite(memoryview(random.Random(1).randbytes(SIZE)), 0)
    return path


def used(path: Path) -> int:
    os.sync()
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("way", ["the image", "its file", "a filter over it"])
def test_discard_ignore_keeps_the_room(image: Path, way: str) -> None:
    before = used(image)
    options: dict[str, Any] = {"discard": "ignore"}
    if way == "its file":
        options = {"file": options}
    with a_daemon() as daemon:
        given: dict[str, Any] = {
            "driver": image.suffix[1:], "node-name": "q",
            "file": {"driver": "file", "filename": str(image), **options.get("file", {})},
            **({"discard": "ignore"} if way == "the image" else {}),
        }  # fmt: skip
        if way == "a filter over it":
            daemon.execute("object-add", {"qom-type": "throttle-group", "id": "g"})
            given = {
                "driver": "throttle", "throttle-group": "g", "node-name": "t", "file": given,
                "discard": "ignore",
            }  # fmt: skip
        daemon.execute("blockdev-add", given)
        disk = daemon.graph.disk(given["node-name"])
        want = contents(disk)
        disk.discard(0, SIZE)
        disk.flush()
        if way != "its file" or image.suffix == ".raw":
            assert contents(disk) == want
        disk.zero(MiB, MiB, unmap=True)
        disk.flush()
        assert not any(contents(disk)[MiB : 2 * MiB])
    assert used(image) >= before


def test_discards_are_honoured_if_nothing_is_said(image: Path) -> None:
    before = used(image)
    for word in ({}, {"discard": "unmap"}, {"discard": "on"}):
        with opened(image, **word) as disk:
            disk.discard(0, MiB)
    assert used(image) <= before - MiB or image.suffix == ".qed"


def test_clusters_that_are_not_passed_on_stay_allocated_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    opening.create_image(str(path), "qcow2", SIZE, {})
    for passed, room in ((False, SIZE), (True, 0)):
        with opened(path, pass_discard_request=passed) as disk:
            disk.pwrite(memoryview(b"x" * SIZE), 0)
            disk.flush()
            disk.discard(0, SIZE)
            disk.flush()
            assert not any(contents(disk))
        assert room <= used(path) < room + MiB


@pytest.mark.parametrize("word", ["on", "unmap"])
def test_zeroes_that_a_guest_writes_are_zeroed(image: Path, word: str) -> None:
    with opened(image, detect_zeroes=word) as disk:
        want = contents(disk)
        disk.pwrite(memoryview(bytes(MiB)), MiB)
        disk.pwrite(memoryview(bytes(512) + b"x" * 512), 3 * MiB)  # not all of it
        assert not disk.try_pwrite(memoryview(bytes(512)), 3 * MiB + 4096)
        disk.pwrite(memoryview(bytes(512)), 3 * MiB + 4096, fua=True)
        want[MiB : 2 * MiB] = bytes(MiB)
        want[3 * MiB : 3 * MiB + 1024] = bytes(512) + b"x" * 512
        want[3 * MiB + 4096 : 3 * MiB + 4608] = bytes(512)
        assert contents(disk) == want
        runs = disk.root.extents(MiB, MiB)
        if image.suffix == ".qcow2":
            assert all(e.state.name == "ZERO" for e in runs)
    if word == "unmap" and image.suffix != ".qed":
        assert used(image) <= SIZE


def test_detect_zeroes_of_the_file_holds_for_the_disk_and_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "vm.raw"
    opening.create_image(str(path), "raw", SIZE, {})
    with a_daemon() as daemon:
        file = {"driver": "file", "filename": str(path), "detect-zeroes": "unmap"}
        daemon.execute("blockdev-add", {"driver": "raw", "node-name": "r", "file": file})
        disk = daemon.graph.disk("r")
        disk.pwrite(memoryview(bytes(MiB)), 0)
        disk.flush()
        assert used(path) == 0
        other: dict[str, Any] = {
            "driver": "raw", "node-name": "s", "read-only": True, "force-share": True,
            "file": {"driver": "file", "filename": str(path)},
            "detect-zeroes": "on", "cache": {"direct": True, "no-flush": False},
        }  # fmt: skip
        daemon.execute("blockdev-add", other)
        (info,) = (
            n for n in daemon.execute("query-named-block-nodes", {}) if n["node-name"] == "s"
        )
        assert info["detect_zeroes"] == "on"
        assert info["cache"] == {"writeback": True, "direct": True, "no-flush": False}


def resident(path: Path) -> int:
    """Pages of a file that the kernel has in memory."""
    need("fincore")
    done = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "PAGES", str(path)],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    return int(done.stdout)


def test_with_cache_direct_the_kernel_forgets_the_bytes_at_each_flush(image: Path) -> None:
    with opened(image, cache={"direct": True}) as disk:
        contents(disk)
        disk.pwrite(memoryview(b"x" * MiB), 0)
        assert resident(image) * mmap.PAGESIZE >= SIZE // 2
        disk.flush()
        assert resident(image) * mmap.PAGESIZE <= SIZE // 4


def test_with_no_flush_nothing_waits_for_the_disk(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(image, cache={"no-flush": True}) as disk:
        flushed: list[int] = []
        monkeypatch.setattr(sysio, "fdatasync", flushed.append)
        disk.pwrite(memoryview(b"x" * MiB), 0)
        disk.flush()
        assert not flushed
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("discard=some", "does not accept value 'some'\n  it takes unmap, ignore, on, off"),
        ("detect-zeroes=some", "does not accept value 'some'\n  it takes off, on, unmap"),
        ("detect-zeroes=unmap,discard=ignore", "not allowed without setting discard"),
        ("cache.direct=some", "Expected `bool`"),
        ("cache.some=on", "unknown field `some`"),
        ("overlap-check=some", "it takes none, constant, cached, all"),
        ("overlap-check.some=on", "unknown field `some`"),
        ("overlap-check.template=some", "Invalid enum value 'some'"),
        ("lazy-refcounts=some", "Expected `bool"),
        ("l2-cache-size=some", "Expected `int"),
        ("l2-cache-size=-1", "expects a number of bytes, not -1"),
        ("cache-clean-interval=-1", "'cache-clean-interval' expects seconds, not -1"),
        ("l2-cache-entry-size=1000", "expects a power of two between 512 and 65536 bytes"),
        ("l2-cache-entry-size=131072", "expects a power of two between 512 and 65536 bytes"),
        ("file.aio=native", "aio=native is not supported"),
        ("file.locking=some", "it takes auto, on, off"),
        ("some=thing", "Parameter 'some' is unexpected"),
    ],
)
def test_words_that_mean_nothing_are_refused(tmp_path: Path, options: str, why: str) -> None:
    path = tmp_path / "vm.qcow2"
    opening.create_image(str(path), "qcow2", SIZE, {})
    text = cowferry("info", "--image-opts", f"driver=qcow2,file.filename={path},{options}", code=1)
    assert why in text, text
    opening.close_chain(opening.open_image(str(path)))  # nothing was left open


@pytest.mark.parametrize(
    "options",
    [
        "discard=ignore", "discard=on", "detect-zeroes=unmap", "cache.direct=on,cache.no-flush=off",
        "overlap-check=all", "overlap-check=none",
        "overlap-check.template=cached,overlap-check.active-l1=on",
        "lazy-refcounts=on", "lazy-refcounts=off", "l2-cache-size=1048576", "cache-size=2097152",
        "l2-cache-entry-size=4096,cache-clean-interval=0",
        "pass-discard-request=off", "file.aio=threads", "file.locking=off", "auto-read-only=on",
    ],
)  # fmt: skip
def test_words_of_qemu_are_taken(tmp_path: Path, options: str) -> None:
    path = tmp_path / "vm.qcow2"
    opening.create_image(str(path), "qcow2", SIZE, {})
    cowferry("map", "--image-opts", f"driver=qcow2,file.filename={path},{options}")


@pytest.mark.parametrize("unmap", [True, False])
def test_drive_mirror_keeps_the_room_of_zeroes_if_it_is_not_to_unmap(
    tmp_path: Path, unmap: bool
) -> None:
    source, target = tmp_path / "vm.raw", tmp_path / "target.raw"
    source.write_bytes(b"x" * MiB + bytes(SIZE - MiB))
    os.truncate(source, MiB)
    os.truncate(source, SIZE)
    target.write_bytes(b"t" * SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(source))
        copy = {"target": str(target), "format": "raw", "mode": "existing", "sync": "full"}
        daemon.execute("drive-mirror", {"device": "vm", "job-id": "j", "unmap": unmap, **copy})
        told.wait("BLOCK_JOB_READY")
        disk.zero(0, MiB // 2, unmap=True)
        daemon.execute("job-complete", {"id": "j"})
        told.wait("JOB_STATUS_CHANGE", id="j", status="null")
    assert target.read_bytes() == bytes(MiB // 2) + b"x" * (MiB // 2) + bytes(SIZE - MiB)
    assert (used(target) >= SIZE) is not unmap


def test_options_of_other_exports_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vm.raw").write_bytes(bytes(MiB))
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(tmp_path / "vm.raw"))
        for option in ({"mountpoint": "/mnt"}, {"addr": {"type": "unix", "path": "s"}}):
            export = {"type": "nbd", "id": "e", "node-name": "vm", **option}
            with pytest.raises(CowferryError, match=f"'{next(iter(option))}' is unexpected"):
                daemon.execute("block-export-add", export)


def test_lazy_refcounts_need_version_3(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    opening.create_image(str(path), "qcow2", SIZE, {"compat": "0.10"})
    with (
        pytest.raises(CowferryError, match="lazy refcounts require"),
        opened(path, lazy_refcounts=True),
    ):
        pass


def test_auto_read_only_holds_for_the_file_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.raw"
    opening.create_image(str(path), "raw", SIZE, {})
    plain = fdsets.open_fd

    def denied(filename: str, flags: int) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return plain(filename, flags)

    monkeypatch.setattr(fdsets, "open_fd", denied)
    options = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    with pytest.raises(CowferryError, match="Permission denied"):
        opening.open_node(options)
    node = opening.open_node({**options, "auto-read-only": True})
    assert node.read_only
    opening.close_chain(node)
