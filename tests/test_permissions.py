"""Files that are made from an image, or beside it, are no more open to others than the image is."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chains import make_base
from cowferry.block import keeper, moves, origin, sysio
from cowferry.block.bitmap import Bitmap
from cowferry.block.disk import Disk
from cowferry.block.node import Node
from cowferry.cli.offline.convert import convert_command
from cowferry.cli.offline.create import create_command
from cowferry.drivers import opening
from daemons import Told, a_daemon
from tests_support import unavailable

SIZE = 1 << 20
OWNER, GROUP = 12345, 23456


NEW = re.compile(r"^\.(.*)\.[0-9a-f]{8}\.new")  # a new image before it has its name


class Watch:
    """A recorder that looks at each file in the moment in which it was made, and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = set(folder.rglob("*"))
        self.made: list[str] = []
        self.wide: list[str] = []

    def created(self, path: str) -> None:
        self.made.append(NEW.sub(r"\1", os.path.basename(path)))
        self.look(path)

    def look(self, path: str) -> None:
        st = os.stat(path)
        mode = stat.S_IMODE(st.st_mode)
        scratch = ".cowferry-scratch-" in path  # of the daemon alone, and without a name soon
        private = mode == 0o600 and (scratch or (st.st_uid, st.st_gid) == (OWNER, GROUP))
        if not private:
            self.wide.append(f"{path}: {mode:o} of {st.st_uid}:{st.st_gid}")

    def finish(self, *expected: str) -> None:
        """All was private, and files whose names begin so were among it."""
        for path in set(self.folder.rglob("*")) - self.before:
            if path.is_file():
                self.look(str(path))
        assert not self.wide
        for name in expected:
            assert any(made.startswith(name) for made in self.made), (name, self.made)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """A private image `base.raw` of another user, and a look at all that is made from now on."""
    if os.geteuid():
        unavailable("only root may give files to other users")
    monkeypatch.setenv("COWFERRY_STATE", str(tmp_path / "state"))
    make_base(tmp_path, SIZE)
    make_private(tmp_path / "base.raw")
    monkeypatch.setattr(sysio, "recorder", watch := Watch(tmp_path))
    old = os.umask(0)  # or it might hide what is too wide
    yield watch
    os.umask(old)


def make_private(path: Path) -> None:
    os.chmod(path, 0o600)
    os.chown(path, OWNER, GROUP)


def test_what_a_daemon_makes_of_a_private_image_is_private(watch: Watch, tmp_path: Path) -> None:
    with a_daemon() as daemon:
        told = Told(daemon)
        run = daemon.execute

        def done(command: str, **arguments: Any) -> None:
            run(command, {"device": "vm", "job-id": "j"} | arguments)
            if command != "drive-backup":
                told.wait("BLOCK_JOB_READY")
                run("job-complete", {"id": "j"})
            assert "error" not in told.wait("BLOCK_JOB_COMPLETED")
            told.wait("JOB_STATUS_CHANGE", status="null")

        daemon.open_disk("vm", str(tmp_path / "base.raw"))
        bitmap = {"node": "vm", "name": "b0", "persistent": True}
        run("block-dirty-bitmap-add", bitmap)
        run("blockdev-snapshot-sync", {"device": "vm", "snapshot-file": str(tmp_path / "s.qcow2")})
        daemon.graph.disk("vm").pwrite(memoryview(b"x" * 4096), 0)
        for kind in ("raw", "qcow2", "qed"):
            backup = {"sync": "full", "format": kind, "target": str(tmp_path / f"backup.{kind}")}
            done("drive-backup", **backup)
            done("drive-mirror", **backup | {"target": str(tmp_path / f"mirror.{kind}")})
        overlay = {"device": "vm", "snapshot-file": str(tmp_path / "t.qcow2")}
        run("blockdev-snapshot-sync", overlay)
        done("block-commit")
        done("x-disk-copy", target=str(tmp_path / "copy.raw"), format="raw")
        run("blockdev-snapshot-sync", overlay | {"snapshot-file": str(tmp_path / "u.qed")})
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}}
        run("nbd-server-start", {"addr": address})
        run("x-backup-export", {"id": "p", "disks": [{"device": "vm"}]})
        run("x-backup-export-end", {"id": "p"})
    made = [".cowferry-scratch-", "s.qcow2", "backup.", "mirror.", "t.qcow2", "copy.raw", "u.qed"]
    watch.finish("base.raw.bitmaps", "base.raw.moved", "mirror.qed.committing", *made)
    assert any(name.startswith("copy.raw.copying") for name in watch.made)


def test_what_the_command_line_makes_of_a_private_image_is_private(
    watch: Watch, tmp_path: Path
) -> None:
    base = str(tmp_path / "base.raw")
    run = CliRunner().invoke
    for name in ("over.qcow2", "over.qed", "filled.raw"):
        made = run(create_command, ["-b", base, "-F", "raw", str(tmp_path / name)])
        assert made.exit_code == 0, made.output
    options = ["-o", "data_file=data.raw,data_file_raw=off"]
    for name, more in (("a.raw", []), ("b.qcow2", []), ("c.qed", []), ("d.qcow2", options)):
        form = name.split(".")[1]
        done = run(convert_command, ["-O", form, *more, base, str(tmp_path / name)])
        assert done.exit_code == 0, done.output
    watch.finish("over.qcow2", "over.qed", "filled.raw", "filled.raw.filling", "data.raw")


def test_side_files_have_the_permissions_of_their_image(watch: Watch, tmp_path: Path) -> None:
    for format in ("raw", "qcow2"):
        path = tmp_path / f"vm.{format}"
        opening.create_image(str(path), format, SIZE, {})
        make_private(path)
    watch.wide.clear()
    for format in ("raw", "qcow2"):
        disk = Disk(opening.open_image(str(tmp_path / f"vm.{format}")), "vm")
        with disk.exclusive():
            keeper.keep(disk.root, Bitmap("b0", SIZE))
        disk.pwrite(memoryview(b"x"), 0)
        opening.close_chain(disk.root)
    moved = [str(tmp_path / f"vm.{f}") for f in ("raw", "qcow2")]
    moves.record([moves.Move("vm", left, f"{left}.new", "raw") for left in moved])
    watch.finish("vm.raw.bitmaps", "vm.qcow2.bitmaps", "vm.raw.moved")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o660, 0o400, 0o604, 0o6777])
def test_a_new_file_is_never_wider_than_its_origin(tmp_path: Path, mode: int) -> None:
    image = tmp_path / "image"
    image.touch()
    os.chmod(image, mode)
    path = tmp_path / "new"
    like = origin.of(str(image))
    assert like is not None
    os.close(sysio.create(str(path), os.O_RDWR, like))
    got = stat.S_IMODE(path.stat().st_mode)
    assert got == mode & 0o666 | 0o600, "the owner may always write, others as before"


def test_a_file_that_exists_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.touch()
    os.chmod(path, 0o640)
    os.close(sysio.create(str(path), os.O_RDWR, origin.Origin(0o666)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link"
    link.symlink_to("not-there-yet")
    os.close(sysio.create(str(link), os.O_RDWR, origin.Origin(0o604)))
    assert stat.S_IMODE((tmp_path / "not-there-yet").stat().st_mode) == 0o604
    with pytest.raises(FileExistsError):
        sysio.create(str(link), os.O_RDWR | os.O_EXCL, origin.Origin(0o600))


def test_the_umask_holds_for_what_a_user_makes(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    os.chmod(base, 0o664)
    old = os.umask(0o027)
    try:
        options = {"backing_file": "base.raw", "backing_fmt": "raw"}
        opening.create_image(str(tmp_path / "a.qcow2"), "qcow2", SIZE, options)
        opening.create_image(str(tmp_path / "b.qcow2"), "qcow2", SIZE, {})
    finally:
        os.umask(old)
    assert {stat.S_IMODE((tmp_path / f"{n}.qcow2").stat().st_mode) for n in "ab"} == {0o640}


def test_a_copy_of_a_chain_is_no_wider_than_any_image_in_it(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(bytes(SIZE))
    options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    opening.create_image(str(top), "qcow2", SIZE, options)
    os.chmod(top, 0o664)
    for mode, want in ((0o600, 0o600), (0o644, 0o644), (0o640, 0o640), (0o666, 0o664)):
        os.chmod(base, mode)
        node: Node = opening.open_image(str(top))
        found = origin.of_node(node)
        opening.close_chain(node)
        assert found is not None and found.mode == want


GIVE = """
import os, sys
from cowferry.block import origin, sysio
os.umask(0)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for mode in (0o600, 0o660, 0o664, 0o646, 0o606):
    fd = sysio.create(f"{sys.argv[1]}/{mode:o}", os.O_RDWR, origin.Origin(mode, 0, 0))
    print(oct(os.fstat(fd).st_mode & 0o777)[2:], end=" ")
"""


def test_a_group_that_cannot_be_kept_gets_what_others_have() -> None:
    if os.geteuid():
        unavailable("only root may become another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        done = subprocess.run(
            [sys.executable, "-c", GIVE, folder],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout.split() == ["600", "600", "644", "644", "600"], done.stderr
