"""`cowferry convert`: the target reads as the source, whatever lay there and lies below it."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from daemons import PATIENCE
from loops import loop, mounted, ran
from nbd_servers import nbdkit, uri
from offline import cowferry, program, signalled
from test_create import everything, unchanged
from tests_support import need

KiB, MiB = 1 << 10, 1 << 20
SIZE = 4 * MiB


def qemu_io(path: Path | str, *commands: str, format: str = "qcow2") -> None:
    need("qemu-io")
    options = [option for command in commands for option in ("-c", command)]
    ran("qemu-io", "-f", format, *options, str(path))


def qcow2(path: Path, *commands: str, size: int = SIZE, options: str = "") -> Path:
    """An image that qemu-img makes, and qemu-io writes."""
    need("qemu-img")
    more = ["-o", options] if options else []
    below = "backing_file" in options
    ran(
        "qemu-img", "create", "-q", "-f", "qcow2", *more, str(path), *([] if below else [str(size)])
    )
    if commands:
        qemu_io(path, *commands)
    return path


def same(a: Path | str, b: Path | str, format: str | None = None) -> None:
    """qemu-img says so."""
    more = ["-F", format] if format else []
    done = subprocess.run(
        ["qemu-img", "compare", *more, str(a), str(b)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data, a hole, zeroes that are known, zeroes that are written."""
    return qcow2(
        tmp_path / "source.qcow2",
        "write -P 1 0 100k", "write -z 1M 192k", "write -P 0 2M 256k", "write -P 7 3M 5k",
    )  # fmt: skip


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Makes devices full of old bytes."""
    with ExitStack() as stack:

        def make(size: int, *options: str) -> str:
            file = tmp_path / f"device{len(list(tmp_path.glob('device*')))}"
            file.write_bytes(b"\xff" * size)
            return stack.enter_context(loop(file, *options))

        yield make


# What lay there --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-n"], ["-S", "0"], ["-S", "64k"], ["-t", "none"]])
def test_a_device_has_no_old_bytes_where_the_source_is_zero(
    source: Path, device: Callable[..., str], flags: list[str]
) -> None:
    target = device(SIZE)
    cowferry("convert", *flags, "-O", "raw", source, target)
    same(source, target, "raw")


@pytest.mark.parametrize("options", [[], ["-b", "4096"]], ids=["512", "4096"])
@pytest.mark.parametrize("more", [0, MiB + 512])
def test_a_larger_device_ends_in_zeroes(
    source: Path, device: Callable[..., str], options: list[str], more: int
) -> None:
    target = device(SIZE + 4096 + more // 4096 * 4096, *options)
    cowferry("convert", "-O", "raw", source, target)
    same(source, target, "raw")


@pytest.mark.parametrize("sector", ["512", "4096"])
def test_what_follows_the_last_bytes_on_a_device_becomes_zero_at_once(
    tmp_path: Path, device: Callable[..., str], sector: str
) -> None:
    """The page of the device in which the data ends waits to be written, and the device is held
    with O_EXCL: there the kernel punches no hole (EBUSY)."""
    size = int(sector)
    small = qcow2(tmp_path / "small.qcow2", f"write -P 5 0 {size}", size=size)
    target = device(MiB, "-b", sector)
    cowferry("convert", "-O", "raw", small, target)
    assert Path(target).read_bytes() == b"\5" * size + bytes(MiB - size)


@pytest.mark.parametrize("how", ["off", "falloc", "full"])
def test_a_larger_device_ends_in_zeroes_also_with_preallocation(
    source: Path, device: Callable[..., str], how: str
) -> None:
    target = device(2 * SIZE)
    cowferry("convert", "-O", "raw", "-o", f"preallocation={how}", source, target)
    same(source, target, "raw")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("how", ["off", "metadata", "falloc", "full"])
def test_a_qcow2_image_on_a_device_shows_no_old_bytes(
    source: Path, device: Callable[..., str], how: str, compat: str
) -> None:
    target = device(2 * SIZE)
    options = f"preallocation={how},compat={compat}"
    cowferry("convert", "-O", "qcow2", "-o", options, source, target)
    same(source, target, "qcow2")
    ran("qemu-img", "check", "-f", "qcow2", target)


@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_data_file_on_a_device_shows_no_old_bytes(
    source: Path, device: Callable[..., str], raw: str, tmp_path: Path
) -> None:
    data, target = device(SIZE), tmp_path / "target.qcow2"
    options = f"data_file={data},data_file_raw={raw}"
    cowferry("convert", "-O", "qcow2", "-o", options, source, target)
    same(source, target)
    if raw == "on":
        same(source, data, "raw")


@pytest.mark.parametrize("flags", [[], ["-S", "0"], ["-S", "512"], ["-c"]])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_image_that_exists_shows_nothing_of_what_it_held(
    source: Path, tmp_path: Path, format: str, flags: list[str]
) -> None:
    if format == "raw":
        if "-c" in flags:
            return
        target = tmp_path / "target.raw"
        target.write_bytes(b"\xff" * (SIZE + MiB))
    else:
        target = qcow2(tmp_path / "t.qcow2", f"write -P 255 0 {SIZE + MiB}", size=SIZE + MiB)
    cowferry("convert", "-n", *flags, "-O", format, source, target)
    same(source, target, format)
    if format == "qcow2":
        ran("qemu-img", "check", str(target))


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
@pytest.mark.parametrize("flags", [[], ["-S", "0"], ["-S", "1M"], ["-W", "-m", "16"]])
def test_a_new_image_reads_as_the_source(
    source: Path, tmp_path: Path, format: str, flags: list[str]
) -> None:
    target = tmp_path / f"target.{format}"
    target.write_bytes(b"an old file")
    cowferry("convert", *flags, "-O", format, source, target)
    want, got = tmp_path / "want.raw", tmp_path / "got.raw"
    ran("qemu-img", "convert", "-O", "raw", str(source), str(want))
    ran("qemu-img", "convert", "-f", format, "-O", "raw", str(target), str(got))
    assert got.read_bytes() == want.read_bytes()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_zeroes_in_the_data_become_holes_as_S_says(tmp_path: Path) -> None:
    source, target = tmp_path / "s.raw", tmp_path / "t.raw"
    data = random.Random(1).randbytes(MiB)
    source.write_bytes(data + bytes(MiB) + data + bytes(64 * KiB) + data)

    def used(*flags: str, format: str = "raw") -> int:
        cowferry("convert", *flags, "-O", format, source, target)
        same(source, target, format)
        return target.stat().st_blocks * 512

    assert used() <= 3 * MiB + 64 * KiB
    assert used("-S", "4k") <= 3 * MiB + 64 * KiB
    assert 3 * MiB + 64 * KiB <= used("-S", "128k") <= 3 * MiB + 128 * KiB
    assert used("-S", "0") >= 4 * MiB + 64 * KiB
    assert used(format="qcow2") <= 4 * MiB
    assert used("-S", "0", format="qcow2") >= 4 * MiB + 64 * KiB


def test_the_room_that_was_preallocated_stays(tmp_path: Path, source: Path) -> None:
    for format, how in (("raw", "falloc"), ("raw", "full"), ("qcow2", "full")):
        target = tmp_path / f"{how}.{format}"
        cowferry("convert", "-O", format, "-o", f"preallocation={how}", source, target)
        same(source, target, format)
        assert target.stat().st_blocks * 512 >= SIZE


def test_target_is_zero_is_believed_and_needs_n(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "t.raw"
    target.write_bytes(b"\xff" * SIZE)
    text = cowferry("convert", "--target-is-zero", source, target, code=1)
    assert "requires use of -n" in text
    cowferry("convert", "-n", "--target-is-zero", source, target)
    data = target.read_bytes()
    assert data[:100] == b"\1" * 100 and data[MiB : MiB + 10] == b"\xff" * 10
    with open(target, "r+b") as f:
        f.truncate(0)
        f.truncate(SIZE)
    cowferry("convert", "-n", "--target-is-zero", source, target)
    same(source, target, "raw")


# What lies below -------------------------------------------------------------------------------


def test_an_overlay_with_bytes_of_its_own_reads_as_the_source(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "b.qcow2", "write -P 17 0 1M")
    over = f"backing_file={base},backing_fmt=qcow2"
    source = qcow2(tmp_path / "s.qcow2", "write -P 3 64k 64k", options=over)
    for commands in ((), ("write -P 51 512k 64k",), ("write -z 512k 1M", "discard 0 64k")):
        target = qcow2(tmp_path / "d.qcow2", *commands, options=over)
        cowferry("convert", "-n", "-O", "qcow2", source, target)
        same(source, target)
        info = json.loads(ran("qemu-img", "map", "--output=json", str(target)))
        assert any(e["depth"] == 1 for e in info)  # not all of the base was copied


def test_an_overlay_on_the_source_itself_needs_nothing_of_it(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "b.qcow2", "write -P 17 0 1M")
    over = f"backing_file={base},backing_fmt=qcow2"
    target = qcow2(tmp_path / "d.qcow2", "write -P 51 512k 64k", options=over)
    cowferry("convert", "-n", "-O", "qcow2", base, target)
    same(base, target)


@pytest.mark.parametrize("way", ["-B", "-n"])
@pytest.mark.parametrize("below", ["other format", "other bytes", "shorter", "copy", "same"])
def test_what_lies_below_the_target_is_compared_and_not_assumed(
    tmp_path: Path, below: str, way: str
) -> None:
    base = qcow2(tmp_path / "b.qcow2", "write -P 17 0 1M", "write -P 9 3M 64k")
    source = qcow2(
        tmp_path / "s.qcow2", "write -P 3 64k 64k", "write -z 512k 64k",
        options=f"backing_file={base},backing_fmt=qcow2",
    )  # fmt: skip
    file, format = base, "qcow2"
    if below == "other format":
        format = "raw"
    elif below == "other bytes":
        file = qcow2(tmp_path / "o.qcow2", "write -P 99 0 4M")
    elif below == "shorter":
        file = qcow2(tmp_path / "o.qcow2", "write -P 17 0 1M", size=2 * MiB)
    elif below == "copy":
        file = tmp_path / "o.qcow2"
        file.write_bytes(base.read_bytes())
    target = tmp_path / "t.qcow2"
    if way == "-B":
        cowferry("convert", "-O", "qcow2", "-B", file, "-F", format, source, target)
    else:
        qcow2(target, options=f"backing_file={file},backing_fmt={format},size={SIZE}")
        cowferry("convert", "-n", "-O", "qcow2", source, target)
    same(source, target)
    if below == "same":
        assert target.stat().st_blocks * 512 < MiB


def test_n_with_another_backing_file_than_B_says_is_refused(tmp_path: Path, source: Path) -> None:
    base, other = qcow2(tmp_path / "b.qcow2"), qcow2(tmp_path / "o.qcow2")
    target = qcow2(tmp_path / "t.qcow2", options=f"backing_file={base},backing_fmt=qcow2")
    with unchanged(tmp_path):
        text = cowferry(
            "convert", "-n", "-B", other, "-F", "qcow2", "-O", "qcow2", source, target, code=1
        )
        assert "another backing file" in text and str(base) in text
        text = cowferry("convert", "-n", "-o", "compat=0.10", "-O", "qcow2", source, target, code=1)
        assert "'compat' is an option for a new image" in text
    cowferry("convert", "-n", "-B", base, "-F", "qcow2", "-O", "qcow2", source, target)
    same(source, target)


# Into itself -----------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """base.raw <- mid.qcow2 <- top.qcow2, which has its bytes in data.raw."""
    need("qemu-img")
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(2).randbytes(SIZE))
    qcow2(tmp_path / "mid.qcow2", options=f"backing_file={base},backing_fmt=raw")
    options = f"backing_file={tmp_path / 'mid.qcow2'},backing_fmt=qcow2"
    options += f",data_file={tmp_path / 'data.raw'}"
    ran("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(tmp_path / "top.qcow2"))
    qemu_io(tmp_path / "top.qcow2", "write -P 4 0 64k")
    (tmp_path / "link").symlink_to(base)
    os.link(base, tmp_path / "hard")
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["-U"], ["-n"], ["-n", "-U"]])
def test_no_layer_of_the_source_is_written(layers: Path, flags: list[str]) -> None:
    top = layers / "top.qcow2"
    with unchanged(layers):
        for name in ("top.qcow2", "data.raw", "mid.qcow2", "base.raw", "link", "hard"):
            text = cowferry("convert", *flags, "-O", "raw", top, layers / name, code=1)
            found = [w for w in ("the source", "into itself", "the data file of") if w in text]
            assert found, text
        text = cowferry("convert", "-O", "raw", layers / "base.raw", layers / "hard", code=1)
        options = ["-o", f"data_file={layers / 'base.raw'}"]
        text = cowferry("convert", *options, "-O", "qcow2", top, layers / "new.qcow2", code=1)
        assert "a backing file of the source" in text


def test_a_loop_device_over_a_layer_is_that_layer(layers: Path) -> None:
    before = everything(layers)
    with loop(layers / "base.raw") as device:
        for flags in ([], ["-n"]):
            text = cowferry(
                "convert", *flags, "-U", "-O", "raw", layers / "top.qcow2", device, code=1
            )
            assert "a loop device over" in text and "a backing file of the source" in text
        text = cowferry("convert", "-U", "-O", "raw", device, layers / "base.raw", code=1)
        assert "loop device" in text
    assert everything(layers) == before


def test_the_data_file_of_an_image_that_exists_is_no_layer_of_the_source(layers: Path) -> None:
    options = f"data_file={layers / 'base.raw'}"
    target = layers / "target.qcow2"
    kept = (layers / "base.raw").read_bytes()
    ran("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(target), str(SIZE))
    (layers / "base.raw").write_bytes(kept)
    with unchanged(layers):
        for flags in ([], ["-U"]):
            source = layers / "base.raw"
            text = cowferry("convert", "-n", *flags, "-O", "qcow2", source, target, code=1)
            assert f"'{source}' is the image of the source" in text, text


def test_a_target_does_not_become_its_own_backing_file(layers: Path) -> None:
    with unchanged(layers):
        for below, format in (("mid.qcow2", "qcow2"), ("top.qcow2", "qcow2")):
            text = cowferry(
                "convert", "-B", layers / below, "-F", format, "-O", "qcow2",
                layers / "hard", layers / "mid.qcow2", code=1,
            )  # fmt: skip
            assert "own backing file" in text


# When it goes wrong ----------------------------------------------------------------------------


def test_a_full_file_system_keeps_what_was_there(tmp_path: Path) -> None:
    source = tmp_path / "s.raw"
    source.write_bytes(random.Random(3).randbytes(32 * MiB))
    with open(tmp_path / "disk", "wb") as f:
        f.truncate(24 * MiB)
    with loop(tmp_path / "disk") as device, mounted(device, tmp_path / "m") as small:
        (small / "t.raw").write_bytes(b"old" * 1000)
        free = os.statvfs(small).f_bfree
        for target in ("t.raw", "new.raw"):
            for format in ("raw", "qcow2"):
                with unchanged(small):
                    text = cowferry("convert", "-O", format, source, small / target, code=1)
                assert "No space left on device" in text and ".new" not in text
                assert "offset" in text
                assert os.statvfs(small).f_bfree >= free
        text = cowferry("convert", "-n", "-O", "raw", source, small / "t.raw", code=1)
        assert "fewer than" in text and str(32 * MiB) in text


def test_a_limit_of_the_size_of_files_keeps_what_was_there(tmp_path: Path) -> None:
    source = tmp_path / "s.raw"
    source.write_bytes(random.Random(3).randbytes(4 * MiB))
    (tmp_path / "t").write_bytes(b"old")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MiB, 2 * MiB))

    for format in ("raw", "qcow2"):
        with unchanged(tmp_path):
            text = program(
                "convert", "-O", format, source, tmp_path / "t", code=1, preexec_fn=limit
            )
        assert "File too large" in text


def test_a_source_that_cannot_be_read_is_named_with_the_offset(tmp_path: Path) -> None:
    """A compressed cluster whose bytes are none."""
    source = qcow2(tmp_path / "s.qcow2", "write -P 1 0 4M")
    data = bytearray(source.read_bytes())
    # the cluster of 2 MiB: a compressed entry that leads to rubbish
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ~(1 << 63)
    at = l2 + 8 * (2 * MiB // (64 * KiB))
    data[at : at + 8] = (1 << 62 | 5 * 65536).to_bytes(8, "big")
    source.write_bytes(data)
    (tmp_path / "t.raw").write_bytes(b"old")
    with unchanged(tmp_path):
        text = cowferry("convert", "-O", "raw", source, tmp_path / "t.raw", code=1)
    assert f"Could not read '{source}' at offset {2 * MiB}" in text, text
    target = tmp_path / "there.raw"
    target.write_bytes(bytes(SIZE))
    text = cowferry("convert", "-n", "-O", "raw", source, target, code=1)
    assert f"offset {2 * MiB}" in text and "is partly written" in text


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[str]:
    """An export whose bytes are none of them zero, and take their time."""
    need("nbdkit")
    path = tmp_path / "slow.sock"
    with nbdkit(path, "--filter=delay", "pattern", "256M", "rdelay=500ms"):
        yield uri(path)


@contextmanager
def converting(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A conversion that has begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cowferry", "convert", "-p", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.read(4)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGALRM, 142)],
)
def test_a_signal_leaves_what_was_there_and_no_other_file(
    tmp_path: Path, slow: str, number: int, code: int
) -> None:
    target = tmp_path / "t.qcow2"
    target.write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))
    with converting("-O", "qcow2", slow, str(target)) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, errors
    assert b"Traceback" not in errors
    assert sorted(os.listdir(tmp_path)) == before
    assert target.read_bytes() == b"old"


def test_an_interrupt_says_how_far_an_image_is_that_was_there(tmp_path: Path, slow: str) -> None:
    target = tmp_path / "t.raw"
    with open(target, "wb") as f:
        f.truncate(256 * MiB)
    with converting("-n", "-O", "raw", slow, str(target)) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"interrupted" in errors and b"is partly written" in errors


def test_a_signal_that_is_ignored_from_the_beginning_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "s.raw").write_bytes(random.Random(7).randbytes(MiB))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        target = tmp_path / "t.qcow2"
        given = ["convert", "-O", "qcow2", tmp_path / "s.raw", target]
        signalled(1, [signal.SIGHUP], *given, code=0)
        signalled(1, [signal.SIGHUP], "resize", "-q", target, "2M", code=0)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("after", [1, 3, 7, 15])
def test_a_signal_leaves_a_sound_image_where_one_was(tmp_path: Path, after: int) -> None:
    source, target = tmp_path / "s.raw", tmp_path / "t.qcow2"
    source.write_bytes(random.Random(7).randbytes(32 * MiB))
    qcow2(target, "write -P 9 1M 1M", size=32 * MiB)
    given = ["convert", "-n", "-O", "qcow2", source, target]
    text = signalled(after, [signal.SIGINT], *given, code=130)
    assert "interrupted" in text and "is partly written: up to offset" in text
    ran("qemu-img", "check", str(target))
    cowferry("convert", "-n", "-O", "qcow2", source, target)
    same(source, target)


def test_SIGUSR1_asks_for_the_progress(tmp_path: Path, slow: str) -> None:
    with converting("-O", "raw", slow, str(tmp_path / "t.raw")) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        assert process.stderr.readline().endswith(b"/100%)\n")


def test_wrong_options_are_named_and_change_nothing(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "t.raw"
    target.write_bytes(b"old")
    with unchanged(tmp_path):
        for flags, why in (
            (["-t", "fast"], "Invalid cache option: fast"),
            (["-T", "fast"], "Invalid source cache option: fast"),
            (["-S", "3"], "Invalid buffer size"),
            (["-S", "1G"], "Invalid buffer size"),
            (["-S", "x"], "Invalid size 'x'"),
            (["-m", "0"], "between 1 and 16"),
            (["-m", "x"], "not a valid integer"),
            (["-c"], "cannot hold compressed data"),
            (["-o", "nothing=1"], "no option 'nothing'"),
            (["-B", "x"], "without backing format"),
            (["-O", "vmdk"], "Unknown driver 'vmdk'"),
            (["--bogus"], "No such option"),
            (["--skip-broken-bitmaps"], "requires --bitmaps"),
        ):
            text = cowferry("convert", *flags, source, target, code=1)
            assert why in text, text


# Shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 511, 1000003, 65537])
@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_odd_sizes(tmp_path: Path, size: int, format: str) -> None:
    source, target, back = tmp_path / "s.raw", tmp_path / f"t.{format}", tmp_path / "b.raw"
    data = random.Random(size).randbytes(size)
    source.write_bytes(data)
    cowferry("convert", "-O", format, source, target)
    cowferry("convert", "-f", format, "-O", "raw", target, back)
    got = back.read_bytes()
    assert got[:size] == data and not any(got[size:]) and len(got) == -(-size // 512) * 512
    if format == "qcow2":
        ran("qemu-img", "check", str(target))


def test_a_disk_of_exabytes_is_converted_at_once(tmp_path: Path) -> None:
    source, target = tmp_path / "s.qcow2", tmp_path / "t.qcow2"
    cowferry("create", "-q", "-o", "cluster_size=2M", source, "4P")
    cowferry("convert", "-O", "qcow2", "-o", "cluster_size=2M", source, target)
    same(source, target)


def test_names_that_other_programs_take_for_options_or_protocols(tmp_path: Path) -> None:
    source, out = tmp_path / "s.raw", tmp_path / "out.raw"
    source.write_bytes(b"x" * KiB)
    for name in (
        "a b.raw",
        "a,b=c.raw",
        "nbd:x.raw",
        "json:{}.raw",
        "-dash.raw",
        "a\nb.raw",
        "é.raw",
    ):
        cowferry("convert", "-O", "raw", "--", source, name, cwd=tmp_path)
        assert (tmp_path / name).read_bytes() == source.read_bytes()
        cowferry("convert", "-O", "raw", "--", name, out, cwd=tmp_path)
        assert out.read_bytes() == source.read_bytes()
        (tmp_path / name).unlink()


def test_a_name_that_means_something_to_other_programs_is_explained(tmp_path: Path) -> None:
    for name in ('json:{"driver": "raw"}', "nbd:localhost:10809"):
        text = cowferry("convert", "-O", "raw", name, tmp_path / "out.raw", code=1)
        assert "No such file" in text and "--image-opts" in text and "nbd://HOST" in text


def test_several_sources_are_put_one_after_another(tmp_path: Path, source: Path) -> None:
    raw = tmp_path / "r.raw"
    raw.write_bytes(random.Random(5).randbytes(100 * KiB))
    packed = tmp_path / "p.qcow2"
    ran("qemu-img", "convert", "-c", "-O", "qcow2", str(source), str(packed))
    want = tmp_path / "want.raw"
    ran("qemu-img", "convert", "-O", "raw", *map(str, (source, raw, packed)), str(want))
    for format in ("raw", "qcow2"):
        target = tmp_path / f"t.{format}"
        cowferry("convert", "-O", format, source, raw, packed, target)
        same(want, target, format)
    text = cowferry("convert", "-O", "raw", source, raw, raw, code=1)
    assert "into itself" in text


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_bitmaps_come_along_under_the_name_of_the_new_image(tmp_path: Path, format: str) -> None:
    source, target = tmp_path / "s.qcow2", tmp_path / f"t.{format}"
    cowferry("create", "-q", source, SIZE)
    cowferry("bitmap", "--add", source, "b")
    target.write_bytes(b"old")
    cowferry("convert", "--bitmaps", "-O", format, source, target)
    (found,) = json.loads(cowferry("bitmap", "--json", target))
    assert found["name"] == "b" and not found.get("inconsistent")
    beside = [target.name, f"{target.name}.bitmaps"] if format == "raw" else [target.name]
    assert sorted(os.listdir(tmp_path)) == ["s.qcow2", *beside]


def test_data_is_shared_where_the_file_system_can(tmp_path: Path) -> None:
    with open(tmp_path / "disk", "wb") as f:
        f.truncate(320 * MiB)
    with loop(tmp_path / "disk") as device, mounted(device, tmp_path / "m", "xfs") as folder:
        source = folder / "s.raw"
        source.write_bytes(random.Random(6).randbytes(48 * MiB))
        os.sync()
        free = os.statvfs(folder).f_bfree * os.statvfs(folder).f_bsize
        for format in ("raw", "qcow2"):
            cowferry("convert", "-O", format, source, folder / f"t.{format}")
            same(source, folder / f"t.{format}", format)
        os.sync()
        assert free - os.statvfs(folder).f_bfree * os.statvfs(folder).f_bsize < 16 * MiB


def listens(path: Path) -> bool:
    """Whether a server listens on a unix socket: it has the flag SO_ACCEPTCON."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(row[3] == "00010000" and row[-1] == str(path) for row in rows)


def test_a_server_that_takes_one_client_is_asked_once(tmp_path: Path, source: Path) -> None:
    """qemu-nbd without -t ends when its first client leaves."""
    need("qemu-nbd")
    target, path = tmp_path / "t.raw", tmp_path / "s"
    with open(target, "wb") as f:
        f.truncate(SIZE)
    command = ["qemu-nbd", "-f", "raw", "-k", str(path), str(target)]
    with subprocess.Popen(command) as server:
        deadline = time.monotonic() + PATIENCE
        while not listens(path):  # to connect would be to be its client
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.02)
        cowferry("convert", "-n", "-O", "raw", source, uri(path))
        assert server.wait(PATIENCE) == 0
    same(source, target, "raw")
