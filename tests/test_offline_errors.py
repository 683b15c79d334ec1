"""Errors of the offline commands say what, where, why, what is intact, and what to do next."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from loops import loop, mounted
from nbd_servers import nbdkit, uri
from offline import cowferry, program
from test_convert import MiB, qcow2
from test_create import unchanged
from tests_support import need


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    qcow2(tmp_path / "a.qcow2", "write -P 1 0 1M", size=MiB)
    (tmp_path / "b.raw").write_bytes(bytes(MiB))
    (tmp_path / "t.txt").write_text("hello")
    (tmp_path / "noext").write_bytes((tmp_path / "a.qcow2").read_bytes())
    (tmp_path / "d").mkdir()
    qcow2(tmp_path / "below.qcow2", size=MiB)
    qcow2(tmp_path / "o.qcow2", options="backing_file=below.qcow2,backing_fmt=qcow2")
    (tmp_path / "below.qcow2").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("create x.qcow2", ["needs a size", "cowferry create FILE 10G"]),
        ("create x.qcow2 1Q", ["Invalid size '1Q'", "suffix k, M, G"]),
        ("create d/none/x.qcow2 1M", ["d/none/x.qcow2", "No such file", "there is no folder"]),
        ("create d 1M", ["d: Is a directory", "nothing was changed"]),
        ("create x.raw 7E", ["x.raw: File too large", "ulimit", "nothing was changed"]),
        ("create x.qed 7E", ["70368744177664 bytes at most", "cluster_size=1M"]),
        ("create -o foo=1 x.qcow2 1M", ["no option 'foo'", "they have backing_file"]),
        ("create -o foo=1 x.qed 1M", ["no option 'foo'", "table_size"]),
        ("create -o foo=1 x.raw 1M", ["no option 'foo'", "granularity, nocow, preallocation"]),
        ("create -o cluster_size=3 x.qcow2 1M", ["power of two between 512 and 2048k"]),
        ("create -o cluster_size=x x.qcow2 1M", ["'cluster_size' expects a size, not 'x'"]),
        ("create -o lazy_refcounts=1 x.qcow2 1M", ["expects 'on' or 'off', not '1'"]),
        ("create -o preallocation=1 x.qcow2 1M", ["it takes off, metadata, falloc, full"]),
        ("create -b b.raw x.qcow2", ["without backing format", "add -F"]),
        ("create -b b.raw -F foo x.qcow2", ["format 'foo' is not known", "qcow2, qed, raw"]),
        ("create -u -b b.raw -F foo x.qcow2 1M", ["format 'foo' is not known"]),
        ("create -u -b json:{} -F raw x.qcow2 1M", ["is not a plain path"]),
        ("create -u -b nbd://h/x -F raw x.qcow2 1M", ["is an export", "not followed"]),
        ("create -o size=1M x.qcow2 1M", ["specified only once", "-o size"]),
        ("create -o data_file= x.qcow2 1M", ["'data_file' is empty"]),
        ("create -o data_file=d/none/x x.qcow2 1M", ["d/none/x: No such", "no folder", "d/none'"]),
        ("convert -O qcow2 -o size=1M b.raw x.qcow2", ["no option 'size'"]),
        ("create -b none -F raw x.qcow2", ["Could not open 'none': No such file"]),
        ("create -b b.raw -F qcow2 x.qcow2", ["'b.raw'", "not in qcow2 format", "-f raw"]),
        ("create a.qcow2/ 1M", ["a.qcow2/: no name of a file", "nothing was changed"]),
        ("create -F raw x.qcow2 1M", ["Backing format cannot be used without backing file"]),
        ("create -b a:b.raw -F raw x.qcow2", ["is not a plain path", "is ./NAME"]),
        ("create x.vmdk 1M", ["'x.vmdk' would be", "VMDK", "cowferry cannot make", "another name"]),
        ("create nbd://h/x 1M", ["is an export", "convert -n"]),
        ("convert a.qcow2 x.vdi", ["'x.vdi' would be", "VDI", "cowferry cannot make"]),
        ("convert a.qcow2 d", ["d: Is a directory"]),
        ("convert -n a.qcow2 none.raw", ["Could not open 'none.raw': No such file"]),
        ("convert -n a.qcow2 t.txt", ["'t.txt' has 512 bytes", "1048576", "nothing was written"]),
        ("convert a.qcow2 nbd://h/x", ["is an export", "convert -n"]),
        ("convert o.qcow2 x.raw", ["backing file of 'o.qcow2'", "rebase -u -b FILE"]),
        ("convert noext x.raw", ["begins like a qcow2 image", "-f qcow2"]),
        ("info -f qcow2 t.txt", ["'t.txt'", "too short for a header", "was not changed"]),
        ("info -f foo a.qcow2", ["Unknown driver 'foo'", "known drivers: file"]),
        ("map --image-opts -f raw a.qcow2", ["mutually exclusive"]),
        ("map --image-opts {", ["JSON parse error in '{'"]),
        ("map --image-opts driver=qcow2", ["must be specified for 'file'"]),
        ("resize a.qcow2 64k", ["shrinking it from 1048576 to 65536", "--shrink"]),
        ("resize a.qcow2 --shrink 64k", ["cannot be made smaller", "convert", "nothing"]),
        ("resize b.raw +7E", ["'b.raw' cannot be resized to", "File too large", "1048576"]),
        ("resize b.raw -- -2M", ["new size of -1048576 bytes"]),
        ("rebase -b b.raw -F raw o.qcow2", ["backing file of 'o.qcow2'", "is intact"]),
        ("rebase -u -b b.raw -F foo o.qcow2", ["format 'foo' is not known"]),
        ("rebase -b b.raw -F raw b.raw", ["cannot be its own backing file"]),
        ("rebase --complete a.qcow2", ["is a qcow2 image", "nothing was changed"]),
        ("compare a.qcow2 none", ["Could not open 'none': No such file"]),
    ],
)
def test_what_cannot_be_done_is_said_in_two_lines_at_most(
    here: Path, line: str, words: list[str]
) -> None:
    with unchanged(here):
        text = cowferry(*line.split(), code=2 if line.startswith("compare") else 1)
    for word in words:
        assert word in text, text
    said = [part for part in text.splitlines() if not part.startswith(("Usage:", "Try", "\n"))]
    assert len([part for part in said if part]) <= 2, text
    assert "Errno" not in text and ".new" not in text and "Traceback" not in text


def test_an_empty_name_is_no_name(here: Path) -> None:
    with unchanged(here):
        assert "no name of a file" in cowferry("create", "", "1M", code=1)
        for command in (["create", "x.qcow2", "1M"], ["convert", "b.raw", "x.raw"]):
            text = cowferry(*command, "-b", "", "-F", "raw", code=1)
            assert "got empty string" in text


@pytest.mark.parametrize("command", ["convert", "compare"])
def test_a_server_is_named_once_and_with_the_offset(here: Path, command: str) -> None:
    need("nbdkit")
    with nbdkit(here / "s", "--filter=error", "pattern", "1M", "error-pread-rate=100%"):
        where = uri(here / "s")
        more, code = (
            (["-f", "raw", where, "b.raw"], 4) if command == "compare" else ([where, "x"], 1)
        )
        text = cowferry(command, *more, code=code)
    assert text.count(where) == 1 and "offset 0: Input/output error" in text, text


def test_a_server_whose_read_fails_now_and_then_is_not_taken_for_the_target(here: Path) -> None:
    need("nbdkit")
    rule = "error-pread-file=" + str(here / "fail")
    with nbdkit(here / "s", "--filter=error", "pattern", "1M", "error-pread-rate=100%", rule):
        (here / "fail").touch()
        text = cowferry("convert", uri(here / "s"), "x.raw", code=1)
    assert text.startswith(f"cowferry: Could not read '{uri(here / 's')}'"), text
    assert not (here / "x.raw").exists()


def test_a_target_that_a_server_holds_is_named_once(here: Path) -> None:
    need("nbdkit")
    options = ["memory", "1M", "error-pwrite-rate=100%", "error=ENOSPC"]
    with nbdkit(here / "s", "--filter=error", *options):
        text = cowferry("convert", "-n", "a.qcow2", uri(here / "s"), code=1)
    assert "at offset 0 or after it: No space left on device" in text
    assert text.splitlines()[0].count(uri(here / "s")) == 1
    assert "is partly written: up to offset 0" in text


def test_a_full_file_system_says_how_much_is_free(here: Path) -> None:
    with open(here / "disk", "wb") as f:
        f.truncate(24 * MiB)
    with loop(here / "disk") as device, mounted(device, here / "m") as small:
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        text = cowferry("create", "-o", "preallocation=full", small / "x.raw", "64M", code=1)
        assert f"{64 * MiB} bytes are needed" in text
        told = int(text.split(" are free")[0].split()[-1])
        assert abs(told - free) < MiB
        options = f"data_file={small}/x.data,preallocation=full"
        text = cowferry("create", "-o", options, here / "x.qcow2", "64M", code=1)
        assert f"{small}/x.data: No space left" in text and f"{64 * MiB} bytes are needed" in text
        told = int(text.split(" are free")[0].split()[-1])
        assert abs(told - free) < MiB


def test_the_holder_of_a_lock_is_named(here: Path) -> None:
    need("qemu-io")
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "a.qcow2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"read 0 512\n")
        process.stdin.flush()
        assert process.stdout.readline()
        for line in (
            "create a.qcow2 1M",
            "convert b.raw a.qcow2",
            "convert -n b.raw a.qcow2 -O qcow2",
        ):
            text = program(*line.split(), code=1)
            assert f"process {process.pid} (qemu-io" in text and "'a.qcow2'" in text, text
    finally:
        process.kill()
        process.communicate()
