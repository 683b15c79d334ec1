"""Exports as images: below formats, as bases and targets of jobs, as names on the command line."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chains import contents, differs, make_base
from cowferry.block import moves
from cowferry.block.moves import Move
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.wire import nbd
from daemons import PATIENCE, Told, a_daemon
from nbd_servers import Forgetful, empty, qemu_nbd, until, uri, view
from tests_support import need

SIZE = 4 << 20


# Below formats, and as a target --------------------------------------------------------------


@pytest.mark.parametrize("extra", ["", "extended_l2=on,cluster_size=128k"])
def test_qcow2_over_nbd_is_what_qemu_reads(extra: str, tmp_path: Path) -> None:
    need("qemu-nbd", "qemu-img")
    rnd = random.Random(5)
    image = tmp_path / "disk.qcow2"
    more = ["-o", extra] if extra else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *more, image, str(SIZE)], check=True)
    os.truncate(image, 2 * SIZE)  # an export does not grow
    make_base(tmp_path, SIZE)
    with qemu_nbd(tmp_path / "s", image):
        node = opening.open_image(uri(tmp_path / "s"), "qcow2")
        node.backing = opening.open_image(str(tmp_path / "base.raw"), "raw", read_only=True)
        model = bytearray((tmp_path / "base.raw").read_bytes())
        for _ in range(120):
            offset, length = rnd.randrange(SIZE - 200_000), rnd.randrange(1, 200_000)
            step = rnd.choice(["write", "write", "zero", "trim", "flush"])
            if step == "write":
                content = rnd.randbytes(length)
                node.pwrite(memoryview(content), offset)
                model[offset : offset + length] = content
            elif step == "zero":
                node.zero(offset, length, unmap=bool(rnd.randrange(2)))
                model[offset : offset + length] = bytes(length)
            elif step == "trim":
                node.discard(offset, length)
                model = contents(node)
            else:
                node.flush()
        assert not differs(contents(node), model)
        opening.close_chain(node)
    subprocess.run(
        ["qemu-img", "rebase", "-q", "-u", "-b", "base.raw", "-F", "raw", image], check=True
    )
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, tmp_path / "plain.raw"], check=True)
    assert not differs((tmp_path / "plain.raw").read_bytes(), model)


def test_E2_a_qcow2_that_fills_its_export_says_ENOSPC_and_stays_whole(tmp_path: Path) -> None:
    need("qemu-nbd", "qemu-img")
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    os.truncate(image, 1 << 20)
    with qemu_nbd(tmp_path / "s", image):
        node = opening.open_image(uri(tmp_path / "s"), "qcow2")
        with pytest.raises(OSError) as full:
            for cluster in range(64):
                node.pwrite(view(b"x" * 65536), cluster << 16)
                node.flush()
        assert full.value.errno == errno.ENOSPC
        assert cluster > 4
        model = contents(node)
        node.close()
    done = subprocess.run(["qemu-img", "check", "-q", image])
    assert done.returncode in (0, 3)
    node = opening.open_image(str(image), read_only=True)
    assert contents(node)[: cluster << 16] == model[: cluster << 16]
    node.close()


def test_a_disk_is_backed_up_and_mirrored_to_a_node_that_a_server_holds(tmp_path: Path) -> None:
    need("qemu-nbd")
    make_base(tmp_path, SIZE)
    image = empty(tmp_path / "far.raw")
    with qemu_nbd(tmp_path / "s", image), a_daemon() as daemon:
        told = Told(daemon)
        daemon.open_disk("vm", str(tmp_path / "base.raw"))
        daemon.execute(
            "blockdev-add",
            {
                "driver": "nbd", "node-name": "far",
                "server": {"type": "unix", "path": str(tmp_path / "s")},
            },
        )  # fmt: skip
        daemon.execute(
            "blockdev-backup", {"job-id": "b", "device": "vm", "target": "far", "sync": "full"}
        )
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="b")
        assert not differs(image.read_bytes(), (tmp_path / "base.raw").read_bytes())
        disk = daemon.graph.disk("vm")
        disk.pwrite(view(b"later"), 12345)
        daemon.execute(
            "blockdev-mirror", {"job-id": "m", "device": "vm", "target": "far", "sync": "full"}
        )
        told.wait("BLOCK_JOB_READY", device="m")
        daemon.execute("job-complete", {"id": "m"})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="m")
        disk.pwrite(view(b"there"), 54321)
        disk.flush()
        now = image.read_bytes()
        assert now[12345:12350] == b"later" and now[54321:54326] == b"there"
    assert (tmp_path / "base.raw").read_bytes()[54321:54326] != b"there"


@pytest.mark.parametrize("recorded", ["uri", "nothing"])
def test_a_disk_whose_base_is_remote_is_streamed_and_needs_it_no_more(
    recorded: str, tmp_path: Path
) -> None:
    """It is booted from its far base, written to, and filled."""
    need("qemu-nbd", "qemu-img")
    make_base(tmp_path, SIZE)
    far, top = uri(tmp_path / "s"), tmp_path / "top.qcow2"
    names = ["-u", "-b", far, "-F", "raw"] if recorded == "uri" else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *names, top, str(SIZE)], check=True)
    model = bytearray((tmp_path / "base.raw").read_bytes())
    with qemu_nbd(tmp_path / "s", tmp_path / "base.raw", "-r"), a_daemon() as daemon:
        told = Told(daemon)
        daemon.execute(
            "blockdev-add",
            {
                "driver": "qcow2", "node-name": "top",
                "file": {"driver": "file", "filename": str(top)},
                "backing": {"driver": "raw", "file": opening.file_options(far)},
            },
        )  # fmt: skip
        disk = daemon.graph.disk("top")
        assert not differs(contents(disk), model)
        disk.pwrite(view(b"mine"), 100_000)
        model[100_000:100_004] = b"mine"
        daemon.execute("block-stream", {"job-id": "s", "device": "top"})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="s")
        assert disk.root.backing is None
        assert not differs(contents(disk), model)
        daemon.execute("blockdev-del", {"node-name": "top"})
    node = opening.open_image(str(top), read_only=True)
    assert not differs(contents(node), model)
    node.close()


# Names -----------------------------------------------------------------------------------------


def cowferry(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cowferry", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_URIs_are_names_of_images_on_the_command_line(tmp_path: Path) -> None:
    need("qemu-nbd", "qemu-img")
    make_base(tmp_path, SIZE)
    far = empty(tmp_path / "far.raw")
    with qemu_nbd(tmp_path / "a", tmp_path / "base.raw"), qemu_nbd(tmp_path / "b", far):
        a, b = uri(tmp_path / "a"), uri(tmp_path / "b")
        told = json.loads(cowferry("info", "--output=json", a).stdout)
        assert told["virtual-size"] == SIZE and told["format"] == "raw"
        mapped = json.loads(cowferry("map", "--output=json", a).stdout)
        theirs = json.loads(
            subprocess.run(
                ["qemu-img", "map", "--output=json", a], capture_output=True, check=True
            ).stdout
        )
        keys = ("start", "length", "depth", "present", "zero", "data")
        assert [[e[k] for k in keys] for e in mapped] == [[e[k] for k in keys] for e in theirs]
        refused = cowferry("convert", "-O", "raw", a, b)
        assert refused.returncode == 1 and "convert -n" in refused.stderr
        assert cowferry("compare", a, b).returncode == 1
        done = cowferry("convert", "-n", "-O", "raw", a, b)
        assert done.returncode == 0, done.stderr
        assert cowferry("compare", a, b).returncode == 0
        assert not differs(far.read_bytes(), (tmp_path / "base.raw").read_bytes())


def test_S3_a_disk_that_has_left_an_export_is_found_by_its_URI_and_records_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot, a copy and a backup over an export name it as what it is."""
    need("qemu-nbd")
    make_base(tmp_path, SIZE)
    monkeypatch.setenv("COWFERRY_STATE", str(tmp_path / "state"))
    with qemu_nbd(tmp_path / "s", tmp_path / "base.raw"), a_daemon() as daemon:
        told = Told(daemon)
        far = uri(tmp_path / "s")
        spelled = far.replace("nbd+unix:///?", "nbd+unix://?")
        disk = daemon.open_disk("vm", spelled)
        daemon.execute(
            "blockdev-snapshot-sync",
            {"device": "vm", "snapshot-file": str(tmp_path / "snap.qcow2"), "format": "qcow2"},
        )
        assert disk.root.backing_spec == (far, "raw")
        common = {"device": "vm", "job-id": "j", "sync": "top", "format": "qcow2"}
        daemon.execute("drive-backup", {**common, "target": str(tmp_path / "backup.qcow2")})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="j")
        daemon.execute("drive-mirror", {**common, "target": str(tmp_path / "copy.qcow2")})
        told.wait("BLOCK_JOB_READY", device="j")
        daemon.execute("job-complete", {"id": "j"})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="j")
        assert disk.root.filename == str(tmp_path / "copy.qcow2")
        for made in ("backup.qcow2", "copy.qcow2"):
            node = opening.open_image(str(tmp_path / made), backing=False, force_share=True)
            assert node.backing_spec == (far, "raw")
            node.close()
        assert opening.current_image(spelled) == (str(tmp_path / "copy.qcow2"), "qcow2")
        assert cowferry("current", far).stdout == f"{tmp_path / 'copy.qcow2'}\n"
        # And back: a circle, whose youngest record counts.
        moves.record([Move("vm", str(tmp_path / "copy.qcow2"), far, "raw")])
        assert opening.current_image(far)[0] == far
        assert opening.current_image(str(tmp_path / "copy.qcow2"))[0] == far
        moves.record([Move("vm", far, str(tmp_path / "snap.qcow2"), "qcow2")])
        refused = cowferry("convert", "-n", "-O", "raw", far, far)
        assert "cannot be converted into itself" in refused.stderr


def test_D2_an_interrupt_ends_a_copy_to_a_server_that_hangs(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    server = Forgetful(tmp_path / "s", SIZE)
    goes_on = threading.Event()

    def hang(kind: int) -> None:
        if kind == nbd.WRITE:
            goes_on.wait(PATIENCE)

    server.before = hang
    command = ["convert", "-n", "-O", "raw", str(tmp_path / "base.raw"), uri(tmp_path / "s")]
    with subprocess.Popen([sys.executable, "-m", "cowferry", *command]) as child:
        until(lambda: nbd.WRITE in server.asked)
        child.send_signal(signal.SIGINT)
        assert child.wait(PATIENCE) != 0
    goes_on.set()
    server.crash()


def test_an_image_from_a_server_names_no_files_of_ours(tmp_path: Path) -> None:
    """And an image of ours names no server."""
    need("qemu-nbd", "qemu-img")
    make_base(tmp_path, SIZE)
    image = tmp_path / "top.qcow2"
    for recorded in (tmp_path / "base.raw", "base.raw"):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", recorded, "-F", "raw", image],
            check=True, cwd=tmp_path,
        )  # fmt: skip
        with qemu_nbd(tmp_path / "s", image):
            with pytest.raises(CowferryError, match="is not followed"):
                opening.open_image(uri(tmp_path / "s"), "qcow2", read_only=True)
            node = opening.open_image(uri(tmp_path / "s"), "qcow2", read_only=True, backing=False)
            node.close()
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", uri(tmp_path / "s"), "-F", "raw",
         image, str(SIZE)],
        check=True,
    )  # fmt: skip
    with pytest.raises(CowferryError, match="an export, which is not followed"):
        opening.open_image(str(image), "qcow2", read_only=True)
