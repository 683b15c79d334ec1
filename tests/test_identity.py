"""Images are compared by what they are: no target is the disk itself, by whatever name (M5, C2).

Each refusal is made before anything is written: the files are compared byte by byte.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import cowferry
from chains import chain_of_disks, contents, overlay
from cowferry.block import identity
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.drivers.nbd import Nbd
from cowferry.errors import CowferryError
from cowferry.wire import nbd
from daemons import Told, a_daemon
from loops import loop, mounted, partition
from nbd_servers import nbdkit, uri
from tests_support import need

SIZE = 4 << 20
MIB = 1 << 20


def apart(one: str, other: str) -> bool:
    """Whether two paths share no bytes, either way round."""
    a, b = identity.of_path(one), identity.of_path(other)
    met = [any(identity.meet(x, y) for x in p for y in q) for p, q in ((a, b), (b, a))]
    assert met[0] == met[1]
    return not met[0]


def empty(path: Path, size: int = SIZE) -> str:
    with open(path, "wb") as f:
        f.truncate(size)
    return str(path)


# What a path is -----------------------------------------------------------------------------


def test_a_file_is_the_same_by_every_name(tmp_path: Path) -> None:
    file, other = empty(tmp_path / "a"), empty(tmp_path / "b")
    os.link(file, tmp_path / "hard")
    os.symlink(file, tmp_path / "soft")
    os.symlink(tmp_path, tmp_path / "folder")
    for name in ("a", "hard", "soft", "folder/a", "./a"):
        assert not apart(file, str(tmp_path / name)), name
    assert apart(file, other) and apart(file, str(tmp_path / "not there"))


def test_a_loop_device_is_the_bytes_of_its_file(tmp_path: Path) -> None:
    file, other = empty(tmp_path / "a"), empty(tmp_path / "b")
    with ExitStack() as devices:
        whole, strange = (devices.enter_context(loop(path)) for path in (file, other))
        end = devices.enter_context(loop(whole, "-o", str(MIB)))
        begin = devices.enter_context(loop(file, "--sizelimit", str(MIB)))
        assert not apart(file, whole) and not apart(file, end) and not apart(begin, whole)
        assert apart(begin, end), "they are different ranges of one file"
        assert apart(strange, file) and apart(strange, end)
        node = tmp_path / "another name"
        os.mknod(node, 0o600 | stat.S_IFBLK, os.stat(whole).st_rdev)
        assert not apart(str(node), file)
        os.rename(file, tmp_path / "renamed")
        assert not apart(str(tmp_path / "renamed"), end), "the kernel knows it by its inode"
        empty(tmp_path / "a")
        assert apart(file, end), "another file has the old name"


def test_partitions_are_ranges_of_their_device(tmp_path: Path) -> None:
    file = empty(tmp_path / "a")
    with ExitStack() as devices:
        whole = devices.enter_context(loop(file))
        one = devices.enter_context(partition(whole, 1, MIB, MIB))
        two = devices.enter_context(partition(whole, 2, 2 * MIB, MIB))
        assert apart(one, two)
        assert not apart(one, whole) and not apart(two, file)
        with loop(file, "-o", str(2 * MIB)) as end:
            assert apart(one, end) and not apart(two, end)


def test_a_file_is_within_the_device_of_its_file_system(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", 16 * MIB)
    with loop(disk) as device, mounted(device, tmp_path / "m") as folder:
        one, two = empty(folder / "one"), empty(folder / "two")
        for path in (one, str(folder / "to be made")):
            assert not apart(path, disk) and not apart(path, device)
        assert apart(one, two), "which bytes of the device are theirs is not known"
        assert apart(str(tmp_path / "to be made"), device)


def test_windows_of_one_device_are_apart(tmp_path: Path) -> None:
    file = empty(tmp_path / "a")

    def window(offset: int) -> list[identity.Place]:
        made = {"driver": "raw", "offset": offset, "size": MIB, "read-only": True,
                "file": {"driver": "file", "filename": file}}  # fmt: skip
        node = opening.open_node(made)
        try:
            return identity.of_node(node)
        finally:
            node.close()

    def met(a: list[identity.Place], b: list[identity.Place]) -> bool:
        return any(identity.meet(x, y) for x in a for y in b)

    one, two = window(0), window(MIB)
    assert not met(one, two) and met(one, window(MIB // 2)) and met(two, identity.of_path(file))


# Every verb, every name -----------------------------------------------------------------------


class Scene:
    """A daemon that serves `vm`, a chain base.raw <- sn1.qcow2 <- vm.qcow2, over NBD."""

    def __init__(self, folder: Path, daemon: Daemon, names: ExitStack) -> None:
        self.folder, self.daemon, self.names = folder, daemon, names
        self.told = Told(daemon)
        self.oracle = chain_of_disks(folder, ["base.raw", "sn1.qcow2", "vm.qcow2"], SIZE)
        daemon.start_nbd({"type": "unix", "path": str(folder / "nbd.sock")})
        assert daemon.nbd is not None
        self.port = daemon.nbd.listen_tcp("127.0.0.1", 0)
        self.disk = daemon.open_disk("vm", str(folder / "vm.qcow2"))
        daemon.add_export(self.disk, "vm")
        os.symlink(folder / "nbd.sock", folder / "other.sock")

    def name(self, which: str) -> tuple[str, str]:
        """(a name of bytes of the disk, and its format)."""
        if which == "unix":
            return uri(self.folder / "nbd.sock", "vm"), "raw"
        if which == "link":
            return uri(self.folder / "other.sock", "vm"), "raw"
        if which == "tcp":
            return f"nbd://localhost:{self.port}/vm", "raw"
        file, format = which.removeprefix("loop ").split(".")
        path = f"{self.folder}/{file}.{format}"
        if which.startswith("loop"):
            path = self.names.enter_context(loop(path))
        return path, format

    def state(self) -> dict[str, Any]:
        """Every byte, every name, and what the daemon has open."""
        files = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        graph = self.daemon.graph
        return {
            **files, "nodes": sorted(graph.nodes), "jobs": self.daemon.jobs.all(),
            "claims": graph.claims, "bitmaps": list(self.disk.root.bitmaps),
        }  # fmt: skip

    def refused(self, command: str, **arguments: Any) -> CowferryError:
        before = self.state()
        with pytest.raises(CowferryError) as found:
            self.daemon.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})
        assert self.state() == before
        assert contents(self.disk) == self.oracle
        return found.value


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as names, a_daemon() as daemon:
        yield Scene(tmp_path, daemon, names)


def mirror(scene: Scene, target: str, format: str) -> CowferryError:
    more = {"sync": "full", "mode": "existing", "format": format}
    return scene.refused("drive-mirror", device="vm", target=target, **more)


def backup(scene: Scene, target: str, format: str) -> CowferryError:
    more = {"sync": "full", "mode": "existing", "format": format, "job_id": "j"}
    return scene.refused("drive-backup", device="vm", target=target, **more)


def new_backup(scene: Scene, target: str, format: str) -> CowferryError:
    disks = [{"device": "vm", "target": target, "format": format}]
    return scene.refused("x-disk-backup", id="b", disks=disks, bitmap="b0")


def increment(scene: Scene, target: str, format: str) -> CowferryError:
    """Over a base that is the disk."""
    if "b0" not in scene.disk.root.bitmaps:
        scene.daemon.execute("block-dirty-bitmap-add", {"node": "vm", "name": "b0"})
    made = {"device": "vm", "target": str(scene.folder / "new.qcow2"), "base": target,
            "base-format": format}  # fmt: skip
    return scene.refused("x-disk-backup", id="b", disks=[made], bitmap="b0", mode="incremental")


def copy(scene: Scene, target: str, format: str) -> CowferryError:
    return scene.refused("x-disk-copy", device="vm", target=target, format=format)


def nodes(command: str) -> Callable[[Scene, str, str], CowferryError]:
    """Of a node that was opened before, by an option that turns the locks off."""

    def refused(scene: Scene, target: str, format: str) -> CowferryError:
        file: dict[str, Any] = {"driver": "file", "filename": target, "locking": "off"}
        if target.startswith("nbd"):
            file = opening.file_options(target)
        backing = {"backing": None} if format == "qcow2" else {}
        scene.daemon.execute(
            "blockdev-add", {"driver": format, "node-name": "t", "file": file, **backing}
        )
        try:
            return scene.refused(command, device="vm", target="t", sync="full", job_id="j")
        finally:
            scene.daemon.execute("blockdev-del", {"node-name": "t"})

    return refused


def snapshot(scene: Scene, target: str, format: str) -> CowferryError:
    return scene.refused(
        "blockdev-snapshot-sync", device="vm", snapshot_file=target, mode="existing", format=format
    )


def change(scene: Scene, target: str, format: str) -> CowferryError:
    return scene.refused("change", device="vm", target=target, format=format, notify=False)


def add(scene: Scene, target: str, format: str) -> CowferryError:
    return scene.refused("x-disk-add", device="again", filename=target, format=format)


VERBS = {
    "drive-mirror": mirror, "drive-backup": backup, "backup": new_backup, "increment": increment,
    "copy": copy, "blockdev-mirror": nodes("blockdev-mirror"), "snapshot": snapshot,
    "blockdev-backup": nodes("blockdev-backup"), "change": change, "add": add,
}  # fmt: skip
LOCAL = ("vm.qcow2", "base.raw", "loop vm.qcow2", "loop sn1.qcow2", "loop base.raw")
REMOTE = ("unix", "link", "tcp")
#: An export by itself may be opened twice, or be the next medium: its server lets both write.
NO_FILES = ("snapshot", "change", "add")


@pytest.mark.parametrize("verb", VERBS)
def test_the_disk_is_no_target_of_its_own_by_any_name(scene: Scene, verb: str) -> None:
    need("losetup")
    for which in LOCAL if verb in NO_FILES else LOCAL + REMOTE:
        name, format = scene.name(which)
        if verb == "snapshot" and format == "raw":
            continue
        error = VERBS[verb](scene, name, format)
        assert "exists" not in error.desc, (which, error.desc)
        if which.startswith("loop"):
            file = f"{scene.folder}/{which.removeprefix('loop ')}"
            assert name in error.desc and f"loop device over '{file}'" in error.desc, error.desc
        elif which in REMOTE:
            assert "' is an export of disk 'vm'" in error.desc, error.desc


def test_kept_layers_are_not_copied_over_the_chain(scene: Scene) -> None:
    target = str(scene.folder / "new.qcow2")
    error = scene.refused("x-disk-copy", device="vm", target=target, keep=["*"])
    assert "base.raw' is a backing file of disk 'vm'" in error.desc


@pytest.mark.parametrize("verb", ["copy", "backup", "drive-mirror"])
def test_no_target_is_stored_inside_the_disk(tmp_path: Path, verb: str) -> None:
    """A file system of the guest that is mounted on the host."""
    disk = empty(tmp_path / "vm.raw", 16 * MIB)
    with loop(disk) as device, mounted(device, tmp_path / "m") as folder, a_daemon() as daemon:
        daemon.open_disk("vm", disk)
        target = str(folder / "t.qcow2")
        arguments: dict[str, Any] = {"device": "vm", "target": target}
        if verb == "backup":
            arguments = {"id": "b", "disks": [arguments]}
        if verb == "drive-mirror":
            arguments |= {"sync": "full"}
        with pytest.raises(CowferryError, match=r"vm\.raw', which is the image of disk 'vm'"):
            daemon.execute(
                {"copy": "x-disk-copy", "backup": "x-disk-backup"}.get(verb, verb), arguments
            )
        more = {"id": "b", "disks": [{"device": "vm", "target": str(tmp_path / "t.qcow2")}]}
        with pytest.raises(CowferryError, match="scratch files of 'vm' cannot be there"):
            daemon.execute("x-disk-backup", {**more, "scratch": str(folder)})
        assert os.listdir(folder) == ["lost+found"] and not (tmp_path / "t.qcow2").exists()


def test_a_data_file_is_a_part_of_the_disk(tmp_path: Path) -> None:
    need("qemu-img")
    image = tmp_path / "vm.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data,"]
    subprocess.run([*command[:-1], command[-1] + "data_file_raw=on", str(image), "4M"], check=True)
    with loop(tmp_path / "data") as device, a_daemon() as daemon:
        daemon.open_disk("vm", str(image))
        with pytest.raises(CowferryError, match=r"is the data file of '.*vm\.qcow2'"):
            daemon.execute("x-disk-copy", {"device": "vm", "target": device, "format": "raw"})


def test_two_names_of_one_file_are_not_written_both(tmp_path: Path) -> None:
    file = empty(tmp_path / "a.raw")
    with loop(file) as device, loop(device) as over, a_daemon() as daemon:
        daemon.open_disk("a", file)
        for name in (device, over):
            with pytest.raises(CowferryError, match=f"'{name}' is a loop device over .*disk 'a'"):
                daemon.open_disk("b", name)
            with pytest.raises(CowferryError, match="in use by disk 'a'"):
                daemon.open_disk("b", name, read_only=True)
        daemon.remove_disk("a")
        daemon.open_disk("a", file, read_only=True)
        daemon.open_disk("b", device, read_only=True)


def test_C2_a_base_that_another_disk_reads_by_another_name_is_not_committed_into(
    scene: Scene,
) -> None:
    with loop(scene.folder / "base.raw") as device:
        scene.daemon.open_disk("b", device, "raw", read_only=True)
        error = scene.refused("block-commit", device="vm", job_id="c")
        assert "in use by disk 'b'" in error.desc and not list(scene.folder.glob("*.committing"))
        scene.daemon.remove_disk("b")


def test_a_chain_that_comes_back_by_another_name_is_not_opened(tmp_path: Path) -> None:
    need("qemu-img")
    file = tmp_path / "a.qcow2"
    cowferry.create(str(file), SIZE, "qcow2")
    with loop(file) as device:
        command = ["qemu-img", "rebase", "-u", "-b", device, "-F", "raw", str(file)]
        subprocess.run(command, check=True)
        with pytest.raises(CowferryError, match="its backing chain comes back to it"):
            opening.open_image(str(file))


# Over NBD ------------------------------------------------------------------------------------


@contextmanager
def another(folder: Path) -> Iterator[Daemon]:
    """A second daemon, with an NBD server of its own."""
    with a_daemon() as daemon:
        daemon.start_nbd({"type": "unix", "path": str(folder / "second.sock")})
        yield daemon


def over(daemon: Daemon, backing: str, path: Path) -> None:
    """A disk `b` of that daemon, exported, over an export."""
    cowferry.create(str(path), SIZE, "qcow2")
    raw = {"driver": "raw", "file": opening.file_options(backing)}
    options = {**opening.image_options(str(path), "qcow2"), "backing": raw}
    disk = daemon.graph.open_disk("b", options)
    daemon.add_export(disk, "b")


def test_a_circle_over_two_daemons_is_refused(scene: Scene) -> None:
    with another(scene.folder) as second:
        over(second, scene.name("unix")[0], scene.folder / "b.qcow2")
        there = uri(scene.folder / "second.sock", "b")
        for verb in ("copy", "drive-mirror", "backup", "drive-backup"):
            error = VERBS[verb](scene, there, "raw")
            assert f"'{there}' lies over disk 'vm'" in error.desc, error.desc
        # And from the other side: its disk must not be written through the first one.
        with pytest.raises(CowferryError, match="is an export of a backing file of disk 'b'"):
            second.execute("x-disk-copy", {"device": "b", "target": scene.name("link")[0]})


def test_a_file_that_another_daemon_serves_is_known(scene: Scene) -> None:
    base = str(scene.folder / "base.raw")
    with another(scene.folder) as second, loop(base) as device:
        disk = second.open_disk("b", device, "raw")
        second.add_export(disk, "b")
        error = copy(scene, uri(scene.folder / "second.sock", "b"), "raw")
        assert "is an export of a backing file of disk 'vm'" in error.desc


def test_disks_of_two_daemons_may_share_a_base(scene: Scene) -> None:
    with another(scene.folder) as second:
        overlay(scene.folder, "b.qcow2", "sn1.qcow2", "qcow2", SIZE)
        second.add_export(second.open_disk("b", str(scene.folder / "b.qcow2")), "b")
        there = uri(scene.folder / "second.sock", "b")
        scene.daemon.execute(
            "drive-mirror",
            {"device": "vm", "target": there, "sync": "full", "mode": "existing", "job-id": "j"},
        )
        scene.told.wait("BLOCK_JOB_READY", device="j")
        scene.daemon.execute("block-job-cancel", {"device": "j"})
        scene.told.wait("JOB_STATUS_CHANGE", id="j", status="null")
        assert contents(second.graph.disk("b")) == scene.oracle


def test_exports_of_other_servers_are_known_by_their_address(tmp_path: Path) -> None:
    need("nbdkit")
    os.symlink(tmp_path / "s", tmp_path / "link")
    with nbdkit(tmp_path / "s", "memory", "4M"), a_daemon() as daemon:
        daemon.open_disk("vm", uri(tmp_path / "s"))
        given = {"device": "vm", "target": uri(tmp_path / "link"), "sync": "full"}
        with pytest.raises(CowferryError, match="is the image of disk 'vm'"):
            daemon.execute("drive-mirror", {**given, "mode": "existing"})


def test_what_is_told_of_a_disk_follows_it(scene: Scene) -> None:
    """A client that is connected while the disk moves knows it still."""
    node = opening.open_node(opening.file_options(scene.name("unix")[0]))
    assert isinstance(node, Nbd)
    try:
        layers = identity.layers(scene.disk.root, "disk 'vm'", scene.disk.store)
        with pytest.raises(CowferryError, match="no: 'x' is an export of disk 'vm'"):
            identity.check_apart("no", "x", node.places(), layers)
        new = str(scene.folder / "new.raw")
        scene.daemon.execute("x-disk-copy", {"device": "vm", "target": new, "job-id": "j"})
        scene.told.wait("BLOCK_JOB_READY", device="j")
        scene.daemon.execute("job-complete", {"id": "j"})
        scene.told.wait("JOB_STATUS_CHANGE", id="j", status="null")
        layers = identity.layers(scene.disk.root, "disk 'vm'", scene.disk.store)
        with pytest.raises(CowferryError, match="no: 'x' is an export of disk 'vm'"):
            identity.check_apart("no", "x", node.places(), layers)
    finally:
        node.close()


def listed(path: Path, *queries: str) -> list[str]:
    """What LIST_META_CONTEXT answers."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as answers:
        sock.connect(str(path))
        assert len(answers.read(18)) == 18
        sock.sendall(struct.pack(">I", 1) + nbd.option(nbd.OPT_STRUCTURED_REPLY))
        sock.sendall(nbd.option(nbd.OPT_LIST_META_CONTEXT, nbd.meta("vm", queries)))
        out: list[str] = []
        while True:
            _, option, kind, length = nbd.OPTION_REPLY.unpack(answers.read(20))
            payload = answers.read(length)
            if option == nbd.OPT_LIST_META_CONTEXT and kind == nbd.REP_ACK:
                return out
            if kind == nbd.REP_META_CONTEXT:
                out.append(payload[4:].decode())


def test_only_a_client_that_asks_for_it_is_told_the_storage(scene: Scene) -> None:
    need("nbdinfo")
    path = scene.folder / "nbd.sock"
    known = {"base:allocation", "qemu:allocation-depth"}
    assert set(listed(path)) == known
    assert set(listed(path, "base:", "qemu:")) == known
    mine = listed(path, identity.STORAGE)
    assert mine and all(c.startswith(identity.STORAGE) for c in mine)
    assert not any(str(scene.folder) in c or "raw" in c for c in mine), "names are told to nobody"
    for command in (["--list"], ["--list", "--json"], ["--json"]):
        told = subprocess.run(
            ["nbdinfo", *command, uri(path, "vm")], capture_output=True, text=True, check=True
        )
        assert "cowferry-storage" not in told.stdout and "base:allocation" in told.stdout


@pytest.mark.parametrize(
    "context",
    ["", "own", "own:12:0-1", f"own:{'a' * 32}:1-", f"all:{'a' * 32}:0-1", f"own:{'A' * 32}:0-1",
     f"own:{'a' * 32}:0-{'9' * 40}", f"own:{'a' * 32}:0-1:without", f"own:{'a' * 32}:0-1\n"],
)  # fmt: skip
def test_what_a_server_says_that_makes_no_sense_is_left_out(context: str) -> None:
    good = f"{identity.STORAGE}own:{'b' * 32}:0-9"
    found = identity.heard([identity.STORAGE + context, good, context])
    assert [p.store for p in found] == ["b" * 32]


def test_what_is_told_is_bounded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    told = identity.told(scene.disk.root, scene.disk.store)
    assert len(told) == len(identity.heard(told)) == 6, (
        "the disk, three files, two times a file system"
    )
    monkeypatch.setattr(identity, "MAX_TOLD", 2)
    assert identity.told(scene.disk.root, scene.disk.store) == told[:2]
    assert len(identity.heard(told)) == 2
