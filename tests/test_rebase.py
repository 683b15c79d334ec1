"""`cowferry rebase` and what lies below: the same bytes, no circles, nothing on the way."""

from __future__ import annotations

import errno
import os
import random
import signal
from pathlib import Path

import pytest

import cowferry as library
from cowferry.block import sysio
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told, a_daemon
from loops import loop, ran
from offline import cowferry, signalled
from test_convert import MiB, qcow2, qemu_io, same
from test_create import unchanged

SIZE = 4 * MiB


def overlay(path: Path, below: Path, format: str, *commands: str, **options: str) -> Path:
    given = {"backing_file": str(below), "backing_fmt": format, **options}
    return qcow2(path, *commands, options=",".join(f"{k}={v}" for k, v in given.items()))


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path, Path]:
    """base.raw <- mid.qcow2 <- top.qcow2, each with bytes of its own."""
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    mid = overlay(tmp_path / "mid.qcow2", base, "raw", "write -P 2 1M 200k", "write -z 2M 192k")
    top = overlay(tmp_path / "top.qcow2", mid, "qcow2", "write -P 3 100k 50k", "discard 3M 64k")
    return base, mid, top


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=4k"])
@pytest.mark.parametrize("new", ["base.raw", "longer.raw", "shorter.raw", "zero.qcow2", ""])
def test_a_rebase_changes_no_byte(
    tmp_path: Path, chain: tuple[Path, Path, Path], options: str, new: str
) -> None:
    base, mid, top = chain
    if options:
        more = dict([options.split("=")])
        top.unlink()
        overlay(top, mid, "qcow2", "write -P 3 100k 50k", "write -z 3M 64k", **more)
    (tmp_path / "longer.raw").write_bytes(random.Random(2).randbytes(2 * SIZE))
    (tmp_path / "shorter.raw").write_bytes(base.read_bytes()[: SIZE // 2 + 512])
    qcow2(tmp_path / "zero.qcow2")
    want = tmp_path / "want.raw"
    ran("qemu-img", "convert", "-O", "raw", str(top), str(want))
    format = ["-F", new.rsplit(".")[1]] if new else []
    cowferry("rebase", "-p", "-b", new and str(tmp_path / new), *format, top)
    same(want, top)
    ran("qemu-img", "check", str(top))
    if new == "base.raw" and not options:
        assert top.stat().st_size < MiB  # what both chains have from the base was not copied
    mid.unlink()
    same(want, top)


def test_exabytes_are_rebased_at_once(tmp_path: Path) -> None:
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for path in (a, b):
        cowferry("create", "-q", "-o", "cluster_size=2M", path, "4P")
    qemu_io(a, "write -P 5 1P 64k")
    top = tmp_path / "top.qcow2"
    cowferry("create", "-q", "-b", a, "-F", "qcow2", "-o", "cluster_size=2M", top)
    cowferry("rebase", "-b", b, "-F", "qcow2", top)
    node = opening.open_image(str(top), read_only=True)
    data = memoryview(bytearray(MiB))
    node.pread(data, 1 << 50)
    assert data[: 64 << 10] == b"\5" * (64 << 10) and not any(data[64 << 10 :])
    opening.close_chain(node)


# Circles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_an_image_does_not_get_below_itself(
    tmp_path: Path, chain: tuple[Path, Path, Path], flags: list[str]
) -> None:
    _, mid, top = chain
    (tmp_path / "link.qcow2").symlink_to(top)
    os.link(top, tmp_path / "hard.qcow2")
    with unchanged(tmp_path):
        for image, below in (
            (top, top), (mid, top), (mid, mid), (mid, tmp_path / "link.qcow2"),
            (mid, tmp_path / "hard.qcow2"), (top, tmp_path / "hard.qcow2"),
        ):  # fmt: skip
            text = cowferry("rebase", *flags, "-b", below, "-F", "qcow2", image, code=1)
            assert "cannot be its own backing file" in text, text
        with loop(top) as device:
            text = cowferry("rebase", *flags, "-b", device, "-F", "qcow2", mid, code=1)
        assert "cannot be its own backing file" in text


def test_a_new_image_does_not_replace_what_lies_below_it(
    tmp_path: Path, chain: tuple[Path, Path, Path]
) -> None:
    base, mid, top = chain
    ext = overlay(tmp_path / "ext.qcow2", mid, "qcow2", data_file=str(tmp_path / "data.raw"))
    (tmp_path / "link").symlink_to(base)
    os.link(base, tmp_path / "hard")
    cases = [
        (below, target)
        for below, layers in (
            (top, (top, mid, base, "link", "hard")), (ext, (ext, "data.raw", mid, base)),
        )
        for target in layers
    ]  # fmt: skip
    with unchanged(tmp_path):
        for below, target in cases:
            for flags in ([], ["-u"]):
                text = cowferry(
                    "create", *flags, "-f", "qcow2", "-b", below, "-F", "qcow2",
                    tmp_path / target, "4M", code=1,
                )  # fmt: skip
                assert "cannot be its own backing file" in text, text
            with pytest.raises(CowferryError, match="its own backing file"):
                library.create(
                    str(tmp_path / target), SIZE, backing_file=str(below), backing_fmt="qcow2"
                )
        for name in (base, "link", "hard"):
            options = ["-o", f"data_file={tmp_path / name}", "-b", top, "-F", "qcow2"]
            text = cowferry("create", *options, tmp_path / "new.qcow2", code=1)
            assert "is a file below it" in text
        with loop(base) as device:
            text = cowferry("create", "-f", "qcow2", "-b", top, "-F", "qcow2", device, "1M", code=1)
        assert "cannot be its own backing file" in text


def test_create_u_makes_no_circle_of_images_that_are_not_there_yet(tmp_path: Path) -> None:
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    cowferry("create", "-q", "-u", "-b", "b.qcow2", "-F", "qcow2", a, "1M")
    with unchanged(tmp_path):
        text = cowferry("create", "-u", "-b", a, "-F", "qcow2", b, "1M", code=1)
        assert f"'{b}' cannot be its own backing file: '{a}' leads back to it" in text
    text = cowferry(
        "create", "-u", "-b", "c.qcow2", "-F", "qcow2", tmp_path / "c.qcow2", "1M", code=1
    )
    assert "its own backing file" in text


def test_blockdev_create_makes_no_circle(tmp_path: Path, chain: tuple[Path, Path, Path]) -> None:
    base, _, top = chain
    with a_daemon() as daemon, unchanged(tmp_path):
        told = Told(daemon)
        options = {
            "driver": "qcow2", "size": SIZE, "filename": str(base), "backing-file": str(top),
            "backing-fmt": "qcow2",
        }  # fmt: skip
        daemon.execute("blockdev-create", {"job-id": "c", "options": options})
        told.wait("JOB_STATUS_CHANGE", status="concluded")
        (job,) = daemon.execute("query-jobs", {})
        assert "its own backing file" in job["error"]


# When it goes wrong ----------------------------------------------------------------------------


def test_a_failed_rebase_leaves_the_old_backing_file(
    tmp_path: Path, chain: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mid, top = chain
    want = tmp_path / "want.raw"
    ran("qemu-img", "convert", "-O", "raw", str(top), str(want))
    qcow2(tmp_path / "zero.qcow2")
    plain, count = sysio.pwrite, 0

    def pwrite(fd: int, buf: memoryview, offset: int) -> None:
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(fd, buf, offset)

    monkeypatch.setattr(sysio, "pwrite", pwrite)
    text = cowferry("rebase", "-b", tmp_path / "zero.qcow2", "-F", "qcow2", top, code=1)
    assert "No space left on device, at offset" in text and "old one" in text
    monkeypatch.undo()
    same(want, top)
    node = opening.open_image(str(top), read_only=True)
    assert node.backing_spec == (str(mid), "qcow2")
    opening.close_chain(node)
    ran("qemu-img", "check", "-r", "leaks", str(top))


@pytest.mark.parametrize("name", ["top.qcow2", "none.qcow2", "x.qed", "whole.raw"])
def test_complete_is_for_raw_images_that_are_being_filled(
    tmp_path: Path, chain: tuple[Path, Path, Path], name: str
) -> None:
    cowferry("create", "-q", tmp_path / "x.qed", "1M")
    (tmp_path / "whole.raw").write_bytes(bytes(512))
    with unchanged(tmp_path):
        code = 0 if name == "whole.raw" else 1
        text = cowferry("rebase", "--complete", tmp_path / name, code=code)
        assert {"top.qcow2": "is a qcow2 image", "x.qed": "is a qed image"}.get(name, "") in text
        assert "-u and -F need -b" in cowferry(
            "rebase", "--complete", "-u", tmp_path / name, code=1
        )


def test_wrong_options_of_a_rebase_are_named(
    tmp_path: Path, chain: tuple[Path, Path, Path]
) -> None:
    base, _, top = chain
    with unchanged(tmp_path):
        for flags, why in (
            (["-t", "fast", "-b", base, "-F", "raw"], "Invalid cache option: fast"),
            (["-T", "fast", "-b", base, "-F", "raw"], "Invalid source cache option: fast"),
            (["-b", base], "without backing format"),
            (["-b", tmp_path / "none", "-F", "raw"], "No such file"),
            (["-b", base, "-F", "vmdk"], "backing format 'vmdk' is not known"),
            (["-b", "nbd://x/y", "-F", "raw"], "is an export"),
            (["-b", "json:{}", "-F", "raw"], "is not a plain path"),
            ([], "either -b or --complete"),
            (["--bogus"], "No such option"),
        ):
            text = cowferry("rebase", *flags, top, code=1)
            assert why in text, text
    cowferry("rebase", "-t", "none", "-T", "directsync", "-b", base, "-F", "raw", top)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [1, 2, 5, 12, 20, 33])
def test_a_signal_comes_when_nothing_is_half_done(tmp_path: Path, after: int, number: int) -> None:
    big = tmp_path / "big.raw"
    big.write_bytes(random.Random(4).randbytes(4 * MiB))
    top = overlay(tmp_path / "top.qcow2", big, "raw")
    code = 130 if number == signal.SIGINT else 143
    text = signalled(after, [signal.SIGUSR1, number], "rebase", "-p", "-b", "", top, code=code)
    assert "/100%)" in text
    same(big, top)
    ran("qemu-img", "check", str(top))
    node = opening.open_image(str(top), read_only=True)
    assert node.backing_spec == (str(big), "raw")
    opening.close_chain(node)
