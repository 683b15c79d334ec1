"""The NBD server as other people's programs see it: libnbd, QEMU, fio."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chains import contents, make_base, overlay_disk
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.drivers import opening
from cowferry.exports.nbd import NbdExport, NbdServer
from tests_support import need

SIZE = 8 << 20


@contextmanager
def served(folder: Path, disk: Disk, **options: object) -> Iterator[str]:
    """The URI under which `disk` is served; its root is closed at the end."""
    server = NbdServer()
    try:
        server.add(NbdExport("d", disk, description="demo", **options))  # type: ignore[arg-type]
        server.listen_unix(str(folder / "s"))
        yield server.uri("d")
    finally:
        server.stop()
        node = disk.root
        node.close()
        if node.backing is not None:
            node.backing.close()


def run(*command: str, input: str | None = None) -> str:
    env = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}  # nbdsh wants its own python3
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def raw_disk(folder: Path) -> tuple[Disk, bytearray]:
    oracle = make_base(folder, SIZE)
    return Disk(opening.open_image(str(folder / "base.raw"), "raw"), "base"), oracle


def test_nbdinfo_lists_sizes_and_maps(tmp_path: Path) -> None:
    need("nbdinfo")
    disk, _ = raw_disk(tmp_path)
    with served(tmp_path, disk) as uri:
        assert run("nbdinfo", "--size", uri).strip() == str(SIZE)
        listed = json.loads(run("nbdinfo", "--list", "--json", uri))["exports"]
        assert [e["export-name"] for e in listed] == ["d"]
        assert listed[0]["description"] == "demo" and listed[0]["can_multi_conn"]
        found = json.loads(run("nbdinfo", "--map", "--json", uri))
        assert [(e["offset"], e["length"], e["type"]) for e in found] == [
            (0, SIZE // 2, 0),
            (SIZE // 2, SIZE // 4, 3),
            (3 * SIZE // 4, SIZE // 4, 0),
        ]
        for flag in ("fua", "trim", "zero", "fast-zero", "df", "cache", "flush", "multi-conn"):
            run("nbdinfo", "--can", flag, uri)


def test_nbdinfo_allocation_depth_of_an_overlay(tmp_path: Path) -> None:
    need("nbdinfo")
    disk, _ = overlay_disk(tmp_path, SIZE)
    disk.pwrite(memoryview(b"x" * 65536), 65536)
    with served(tmp_path, disk) as uri:
        told = json.loads(run("nbdinfo", "--map=qemu:allocation-depth", "--json", uri))
        assert [(e["length"], e["type"]) for e in told][:3] == [
            (65536, 2),
            (65536, 1),
            (SIZE - 131072, 2),
        ]


def test_nbdcopy_both_ways_and_qemu_img_compare(tmp_path: Path) -> None:
    need("nbdcopy", "qemu-img")
    disk, oracle = raw_disk(tmp_path)
    with served(tmp_path, disk) as uri:
        run("nbdcopy", uri, str(tmp_path / "out.raw"))
        assert (tmp_path / "out.raw").read_bytes() == oracle
        sparse = os.stat(tmp_path / "out.raw").st_blocks * 512
        assert sparse <= SIZE - SIZE // 8, "the hole was copied as data"
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "out.raw"), uri)
        other = random.Random(9).randbytes(SIZE)
        (tmp_path / "in.raw").write_bytes(other)
        run("nbdcopy", "--connections=4", "--flush", str(tmp_path / "in.raw"), uri)
    assert (tmp_path / "base.raw").read_bytes() == other


def test_nbdcopy_into_an_overlay(tmp_path: Path) -> None:
    need("nbdcopy", "qemu-img")
    disk, _ = overlay_disk(tmp_path, SIZE)
    source = tmp_path / "in.raw"
    source.write_bytes(random.Random(9).randbytes(SIZE))
    with served(tmp_path, disk) as uri:
        run("nbdcopy", "--connections=4", "--flush", str(source), uri)
        assert contents(disk) == source.read_bytes()
    run("qemu-img", "check", "-f", "qcow2", str(tmp_path / "vm.qcow2"))
    run("qemu-img", "compare", "-F", "raw", "-f", "qcow2", str(tmp_path / "vm.qcow2"), str(source))


SHELL = """
assert h.get_size() == %d
assert h.get_structured_replies_negotiated()
h.pwrite(b"hello" * 1000, 4097, nbd.CMD_FLAG_FUA)
assert h.pread(5000, 4097) == b"hello" * 1000
h.zero(1000, 5000, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1000, 5000) == bytearray(1000)
h.trim(65536, 65536, nbd.CMD_FLAG_FUA)
h.cache(65536, 0)
h.flush()
seen = []
h.block_status(65536, 0, lambda name, at, e, err: seen.append((name, at, e)))
assert {name for name, _, _ in seen} == {"base:allocation", "qemu:allocation-depth"}, seen
h.set_strict_mode(0)
import errno
for call, want in (
    (lambda: h.pread(2, h.get_size() - 1), errno.EINVAL),
    (lambda: h.pwrite(b"xy", h.get_size() - 1), errno.ENOSPC),
    (lambda: h.pread(2, (1 << 63) - 1), errno.EINVAL),
):
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == want, e
    else:
        raise AssertionError(want)
print("held")
"""


def test_nbdsh_conversation(tmp_path: Path) -> None:
    need("nbdsh")
    disk, _ = raw_disk(tmp_path)
    with served(tmp_path, disk) as uri:
        script = (
            'h.add_meta_context("base:allocation"); '
            'h.add_meta_context("qemu:allocation-depth"); '
            f'h.connect_uri("{uri}")\n' + SHELL % SIZE
        )
        assert "held" in run("/usr/bin/nbdsh", "-c", script)


def test_qemu_io(tmp_path: Path) -> None:
    need("qemu-io")
    disk, _ = overlay_disk(tmp_path, SIZE)
    commands = (
        "write -P 17 1000 70000", "read -P 17 1000 70000", "write -z -u 512k 100k",
        "read -P 0 512k 100k", "discard 1M 64k", "write -f -P 3 2M 1M", "read -P 3 2M 1M",
        "flush",
    )  # fmt: skip
    with served(tmp_path, disk) as uri:
        args = [a for c in commands for a in ("-c", c)]
        told = run("qemu-io", "-f", "raw", *args, uri)
        assert "failed" not in told.lower() and "error" not in told.lower(), told


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_fio_verifies_random_mixed_writes_of_four_jobs_with_trim(
    tmp_path: Path, format: str
) -> None:
    need("fio")
    disk = raw_disk(tmp_path)[0] if format == "raw" else overlay_disk(tmp_path, SIZE)[0]
    with served(tmp_path, disk) as uri:
        run(
            "fio", "--name=mixed", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite",
            "--bsrange=512-128k", "--bs_unaligned=0", "--blockalign=512", "--iodepth=16",
            "--numjobs=4", f"--size={SIZE // 4}", f"--offset_increment={SIZE // 4}",
            "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=64", "--thread",
            f"--aux-path={tmp_path}", "--verify_state_save=0",
        )  # fmt: skip
        run(
            "fio", "--name=trim", "--ioengine=nbd", f"--uri={uri}", "--rw=randtrim",
            "--bs=64k", "--iodepth=8", f"--size={SIZE}", "--thread",
        )  # fmt: skip


def test_a_writethrough_export_answers_a_write_once_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("nbdsh")
    disk, _ = raw_disk(tmp_path)
    flushed: list[int] = []
    whole = sysio.fdatasync

    def counted(fd: int) -> None:
        whole(fd)
        flushed.append(fd)

    monkeypatch.setattr(sysio, "fdatasync", counted)
    with served(tmp_path, disk, writethrough=True) as uri:
        run("nbdsh", "-u", uri, "-c", "h.pwrite(b'x' * 512, 0); h.pread(512, 0)")
        assert len(flushed) == 1
        run("nbdsh", "-u", uri, "-c", "h.zero(512, 0); h.pwrite(b'y' * 5000, 1)")
        assert len(flushed) == 3
