"""An increment lies over the very backup from which its bitmap counts, as that was made.

Everything else is refused by name, after a restart as well: restores are compared with the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cowferry
from chains import contents, differs
from cowferry.block import lineage, moves
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from daemons import Told
from loops import loop
from tests_support import need

SIZE = 2 << 20
BLOCK = 64 << 10
FORMATS = ("qcow2", "raw", "qed")


class Failed(Exception):
    """A backup's error."""


class Scene:
    """A disk `vm`, its guest, and backups of it in a folder of their own."""

    def __init__(self, folder: Path, format: str = "qcow2") -> None:
        need("qemu-img", "qemu-io")
        self.folder, self.format = folder, format
        self.image = folder / f"vm.{format}"
        self.store = folder / "store"
        self.store.mkdir()
        cowferry.create(str(self.image), SIZE, format)
        self.number = 0
        self.start()

    def start(self) -> None:
        self.daemon = Daemon()
        self.told = Told(self.daemon)
        self.open()

    def open(self, name: str = "vm") -> None:
        self.disk = self.daemon.open_disk(name, str(self.folder / f"{name}.{self.format}"))

    def restart(self) -> None:
        self.daemon.close()
        self.start()

    def write(self, block: int, disk: str = "vm") -> None:
        self.number += 1
        data = self.number.to_bytes(2, "big") * (BLOCK // 2)
        self.daemon.graph.disk(disk).pwrite(memoryview(data), block * BLOCK)

    def path(self, name: str) -> str:
        return str(self.store / name)

    def backup(self, name: str, base: str | None = None, **more: Any) -> bytes:
        """A full one, or an increment over `base`; what the disk read as."""
        disk = more.pop("disk", "vm")
        want = bytes(contents(self.daemon.graph.disk(disk)))
        target: dict[str, Any] = {"device": disk, "target": self.path(name)}
        if base is not None:
            target |= {"base": base if "/" in base else self.path(base)}
            target |= {k: more.pop(k) for k in ("unsafe", "base-format") if k in more}
            more = {"mode": "incremental", **more}
        self.daemon.execute("x-disk-backup", {"id": "b", "disks": [target], "bitmap": "b0", **more})
        done = self.told.wait("BLOCK_JOB_COMPLETED", device="b")
        self.told.wait("JOB_STATUS_CHANGE", id="b", status="null")
        if "error" in done:
            raise Failed(done["error"])
        return want

    def refused(self, base: str, words: str, name: str = "new.qcow2", **more: Any) -> CowferryError:
        before = {p.name: p.read_bytes() for p in self.store.iterdir()}
        with pytest.raises(CowferryError, match=words) as found:
            self.backup(name, base, **more)
        assert {p.name: p.read_bytes() for p in self.store.iterdir()} == before
        assert not self.daemon.jobs.all() and not self.daemon.graph.claims
        return found.value

    def restores(self, name: str, want: bytes) -> None:
        out = self.folder / "restored"
        command = ["qemu-img", "convert", "-O", "raw", self.path(name), str(out)]
        subprocess.run(command, check=True, timeout=60)
        assert not differs(out.read_bytes(), want)


@pytest.fixture(params=FORMATS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path, request.param)
    yield made
    made.daemon.close()


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.daemon.close()


def qemu_writes(path: str, format: str) -> None:
    command = ["qemu-io", "-f", format, "-c", "write -P 99 512k 4k", path]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


# The chain that is right ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("restarts", [False, True])
def test_increments_go_on_over_restarts(scene: Scene, kind: str, restarts: bool) -> None:
    """The full backup is of any format."""
    again = scene.restart if restarts else lambda: None
    scene.write(1)
    wants = {f"sun.{kind}": scene.backup(f"sun.{kind}")}
    before = f"sun.{kind}"
    for day in ("mon", "tue"):
        again()
        scene.write(2)
        scene.write(len(wants) + 4)
        wants[f"{day}.qcow2"] = scene.backup(f"{day}.qcow2", before)
        before = f"{day}.qcow2"
        again()
    for name, want in wants.items():
        scene.restores(name, want)
    # A differential one: the bitmap goes on counting from the same backup.
    scene.write(9)
    want = scene.backup("diff1.qcow2", before, **{"bitmap-mode": "never"})
    scene.write(10)
    scene.refused("diff1.qcow2", "counts from the backup of")
    want = scene.backup("diff2.qcow2", before, **{"bitmap-mode": "never"})
    scene.restores("diff2.qcow2", want)


def test_a_backup_that_was_moved_or_copied_is_the_same_one(scene: Scene) -> None:
    scene.write(1)
    scene.backup("sun.qcow2")
    os.rename(scene.path("sun.qcow2"), scene.path("moved.qcow2"))
    scene.write(2)
    scene.restores("mon.qcow2", scene.backup("mon.qcow2", "moved.qcow2"))
    (scene.folder / "far").mkdir()
    for name in ("moved.qcow2", "mon.qcow2"):
        shutil.copyfile(scene.path(name), scene.folder / "far" / name)
    scene.write(3)
    scene.backup("tue.qcow2", str(scene.folder / "far" / "mon.qcow2"))


@pytest.mark.parametrize("kind", ["raw", "qed"])
def test_a_record_beside_a_backup_goes_along_with_it(one: Scene, kind: str) -> None:
    one.write(1)
    want = one.backup(f"sun.{kind}")
    one.restores(f"sun.{kind}", want)
    for suffix in ("", moves.BACKUP):
        shutil.copyfile(one.path(f"sun.{kind}{suffix}"), one.path(f"copy.{kind}{suffix}"))
    one.write(2)
    one.restores("mon.qcow2", one.backup("mon.qcow2", f"copy.{kind}"))
    os.unlink(one.path(f"sun.{kind}{moves.BACKUP}"))
    one.refused(f"sun.{kind}", "does not say which backup it is")


def test_a_backup_on_a_device_is_known(one: Scene) -> None:
    with open(one.folder / "device", "wb") as f:
        f.truncate(SIZE)
    with loop(one.folder / "device") as device:
        one.write(1)
        target = {"device": "vm", "target": device}
        one.daemon.execute("x-disk-backup", {"id": "b", "disks": [target], "bitmap": "b0"})
        one.told.wait("JOB_STATUS_CHANGE", id="b", status="null")
        one.write(2)
        one.restart()
        one.restores("mon.qcow2", one.backup("mon.qcow2", device))
        qemu_writes(device, "raw")
        one.refused(device, "was opened for writing since")
        one.write(3)
        one.refused("mon.qcow2", f"'{device}', on which '.*mon.qcow2' lies, was opened for writing")


# Strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
def test_an_older_backup_is_refused_by_name(scene: Scene, restarts: bool) -> None:
    scene.backup("sun.qcow2")
    scene.write(1)
    scene.backup("mon.qcow2", "sun.qcow2")
    scene.write(2)
    if restarts:
        scene.restart()
    error = scene.refused("sun.qcow2", "bitmap 'b0' of 'vm' counts from the backup of .*sun.qcow2'")
    assert "use unsafe" in error.hint
    want = scene.backup("tue.qcow2", "mon.qcow2")
    scene.restores("tue.qcow2", want)


def test_a_newer_full_backup_takes_its_bitmap_along(scene: Scene) -> None:
    scene.backup("sun.qcow2")
    scene.write(1)
    scene.backup("again.qcow2")
    scene.refused("sun.qcow2", "counts from")
    scene.restores("mon.qcow2", scene.backup("mon.qcow2", "again.qcow2"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_backup_that_another_program_wrote_is_refused(one: Scene, kind: str) -> None:
    one.backup(f"sun.{kind}")
    one.write(1)
    qemu_writes(one.path(f"sun.{kind}"), kind)
    one.refused(f"sun.{kind}", f"sun.{kind}' was opened for writing since")
    one.write(1)
    one.backup("mon.qcow2", f"sun.{kind}", unsafe=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_backup_that_we_wrote_is_refused(one: Scene, kind: str) -> None:
    one.backup(f"sun.{kind}")
    one.write(1)
    with cowferry.open(one.path(f"sun.{kind}")) as disk:
        disk.pwrite(memoryview(b"x"), 5)
    one.refused(f"sun.{kind}", "was opened for writing since")


def test_a_backup_that_was_only_read_is_the_same_one(one: Scene) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    for command in (["check"], ["info"], ["map"], ["convert", "-O", "raw"]):
        more = [str(one.folder / "out")] if command[0] == "convert" else []
        subprocess.run(
            ["qemu-img", *command, one.path("sun.qcow2"), *more],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    with cowferry.open(one.path("sun.qcow2"), read_only=True) as disk:
        contents(disk)
    one.restores("mon.qcow2", one.backup("mon.qcow2", "sun.qcow2"))


@pytest.mark.parametrize("kind", FORMATS)
def test_what_lies_below_the_base_is_looked_at_as_well(one: Scene, kind: str) -> None:
    one.backup(f"sun.{kind}")
    one.write(1)
    one.backup("mon.qcow2", f"sun.{kind}")
    one.write(2)
    qemu_writes(one.path(f"sun.{kind}"), kind)
    one.refused("mon.qcow2", f"sun.{kind}', on which '.*mon.qcow2' lies, was opened for writing")


def test_an_increment_that_lies_over_another_backup_is_refused(one: Scene) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    one.backup("mon.qcow2", "sun.qcow2")
    one.write(2)
    one.backup("tue.qcow2", "mon.qcow2")
    os.rename(one.path("sun.qcow2"), one.path("mon.qcow2"))
    one.refused("tue.qcow2", "over which the increment was made")


def test_the_backup_of_another_disk_is_refused(scene: Scene) -> None:
    cowferry.create(str(scene.folder / f"other.{scene.format}"), SIZE, scene.format)
    scene.open("other")
    scene.backup("vm.qcow2")
    scene.backup("other.qcow2", disk="other")
    scene.write(1)
    scene.write(1, "other")
    scene.refused("other.qcow2", "bitmap 'b0' of 'vm' counts from")
    scene.refused("vm.qcow2", "bitmap 'b0' of 'other' counts from", disk="other")


def test_what_is_no_backup_is_refused(one: Scene) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    copy = ["qemu-img", "convert", "-O", "qcow2", one.path("sun.qcow2"), one.path("new.img.qcow2")]
    subprocess.run(copy, check=True)
    one.refused("new.img.qcow2", "does not say which backup it is")
    cowferry.create(one.path("small.qcow2"), SIZE // 2)
    one.refused("small.qcow2", "does not say which backup it is")


# Bitmaps --------------------------------------------------------------------------------------


def rolled_back(scene: Scene, kept: dict[str, bytes]) -> None:
    """The image as it was, with all that lies beside it."""
    scene.daemon.close()
    for path in scene.folder.glob("vm.*"):
        with open(path, "r+b") as f:  # in place: the same inode, as a volume manager does it
            f.truncate(0)
            f.write(kept[path.name])
    scene.start()


def test_a_disk_that_was_rolled_back_counts_from_an_older_backup(scene: Scene) -> None:
    scene.write(1)
    scene.backup("sun.qcow2")
    scene.write(2)
    scene.daemon.close()
    kept = {p.name: p.read_bytes() for p in scene.folder.glob("vm.*")}
    times = {p: os.stat(p) for p in scene.folder.glob("vm.*")}
    scene.start()
    scene.backup("mon.qcow2", "sun.qcow2")
    scene.write(3)
    rolled_back(scene, kept)
    if scene.format != "qcow2":  # the file beside the image notices it, unless its time is put back
        scene.daemon.close()
        for path, st in times.items():
            path.write_bytes(kept[path.name])
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
        scene.start()
    scene.write(4)
    scene.refused("mon.qcow2", "'b0' of 'vm' counts from the backup of .*mon.qcow2' is that of")
    scene.restores("tue.qcow2", scene.backup("tue.qcow2", "sun.qcow2"))


@pytest.mark.parametrize("how", ["clear", "disable", "remove"])
def test_a_bitmap_that_lost_its_backup_says_so(scene: Scene, how: str) -> None:
    scene.backup("sun.qcow2")
    scene.write(1)
    node = {"node": "vm", "name": "b0"}
    if how == "clear":
        scene.daemon.execute("block-dirty-bitmap-clear", node)
    elif how == "disable":
        scene.daemon.execute("block-dirty-bitmap-disable", node)
        scene.write(2)
        scene.daemon.execute("block-dirty-bitmap-enable", node)
    else:
        scene.daemon.execute("block-dirty-bitmap-remove", node)
        scene.daemon.execute("block-dirty-bitmap-add", {**node, "persistent": True})
    scene.write(3)
    scene.refused("sun.qcow2", "does not say from which backup it counts")
    scene.backup("mon.qcow2", "sun.qcow2", unsafe=True)
    scene.write(4)
    scene.backup("tue.qcow2", "mon.qcow2")


def test_a_bitmap_that_qemu_may_have_changed_says_so(one: Scene) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    one.daemon.close()
    qemu_writes(str(one.image), "qcow2")
    one.start()
    one.write(3)
    one.refused("sun.qcow2", "does not say from which backup it counts")
    one.restores("mon.qcow2", one.backup("mon.qcow2", "sun.qcow2", unsafe=True))


def test_a_refused_change_of_a_bitmap_leaves_it_its_backup(one: Scene) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    actions = [
        {"type": "block-dirty-bitmap-clear", "data": {"node": "vm", "name": "b0"}},
        {"type": "block-dirty-bitmap-disable", "data": {"node": "vm", "name": "b0"}},
        {"type": "abort", "data": {}},
    ]
    with pytest.raises(CowferryError):
        one.daemon.execute("transaction", {"actions": actions})
    one.restores("mon.qcow2", one.backup("mon.qcow2", "sun.qcow2"))


def test_a_bitmap_goes_along_with_its_disk(scene: Scene) -> None:
    scene.backup("sun.qcow2")
    scene.write(1)
    scene.daemon.execute("x-disk-snapshot", {"disks": [{"device": "vm"}]})
    scene.write(2)
    scene.restores("mon.qcow2", scene.backup("mon.qcow2", "sun.qcow2"))
    scene.restart()
    scene.write(3)
    scene.refused("sun.qcow2", "counts from")
    scene.restores("tue.qcow2", scene.backup("tue.qcow2", "mon.qcow2"))


def test_a_copy_of_a_bitmap_of_the_same_disk_counts_from_the_same_backup(one: Scene) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    one.daemon.execute("block-dirty-bitmap-add", {"node": "vm", "name": "b1"})
    one.daemon.execute(
        "block-dirty-bitmap-merge", {"node": "vm", "target": "b1", "bitmaps": ["b0"]}
    )
    one.write(2)
    one.restores("mon.qcow2", one.backup("mon.qcow2", "sun.qcow2", bitmap="b1"))


def test_qemus_own_backup_takes_the_bitmap_away_from_ours(one: Scene) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    one.daemon.execute(
        "drive-backup",
        {"device": "vm", "target": one.path("q.qcow2"), "sync": "incremental", "bitmap": "b0",
         "job-id": "q"},
    )  # fmt: skip
    one.told.wait("JOB_STATUS_CHANGE", id="q", status="null")
    one.write(2)
    one.refused("sun.qcow2", "counts from")


# What goes wrong ------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Callable[[], None]:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, fail)
    return monkeypatch.undo


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_backup_that_cannot_be_stamped_fails(
    one: Scene, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.backup("sun.qcow2")
    one.write(1)
    undo = failing(monkeypatch, lineage, "stamp")
    with pytest.raises(Failed, match="No space left"):
        one.backup("mon.qcow2", "sun.qcow2")
    undo()
    assert sorted(p.name for p in one.store.iterdir()) == ["sun.qcow2"]
    one.restores("mon.qcow2", one.backup("mon.qcow2", "sun.qcow2"))
    undo = failing(monkeypatch, lineage, "stamp")
    with pytest.raises(Failed, match="No space left"):
        one.backup(f"full.{kind}")
    undo()
    assert not (one.store / f"full.{kind}").exists()
    assert not (one.store / f"full.{kind}{moves.BACKUP}").exists()
    one.write(2)
    one.restores("tue.qcow2", one.backup("tue.qcow2", "mon.qcow2"))


def test_a_stamp_that_finds_no_room_in_the_header_lies_beside_it(one: Scene) -> None:
    deep = one.store / ("x" * 120) / ("y" * 120) / ("z" * 100)
    deep.mkdir(parents=True)
    base = str(deep / "sun.qcow2")
    target = {"device": "vm", "target": base}
    one.daemon.execute("x-disk-backup", {"id": "b", "disks": [target], "bitmap": "b0"})
    one.told.wait("JOB_STATUS_CHANGE", id="b", status="null")
    one.write(1)
    one.restores("mon.qcow2", one.backup("mon.qcow2", base))
    one.write(2)
    one.restores("tue.qcow2", one.backup("tue.qcow2", "mon.qcow2"))


def test_increments_of_several_disks_are_each_bound_to_their_own(one: Scene) -> None:
    cowferry.create(str(one.folder / "other.qcow2"), SIZE)
    one.open("other")

    def both(name: str, base: str | None = None, swapped: bool = False) -> None:
        disks = []
        for disk in ("vm", "other"):
            entry = {"device": disk, "target": one.path(f"{disk}-{name}.qcow2")}
            if base is not None:
                whose = {"vm": "other", "other": "vm"}[disk] if swapped else disk
                entry["base"] = one.path(f"{whose}-{base}.qcow2")
            disks.append(entry)
        mode = "full" if base is None else "incremental"
        one.daemon.execute(
            "x-disk-backup", {"id": "g", "disks": disks, "bitmap": "b0", "mode": mode}
        )
        assert "error" not in one.told.wait("JOB_GROUP_COMPLETED", id="g")

    both("sun")
    one.write(1)
    one.write(2, "other")
    with pytest.raises(CowferryError, match="bitmap 'b0' of 'vm' counts from"):
        both("mon", "sun", swapped=True)
    assert len(list(one.store.iterdir())) == 2 and not one.daemon.jobs.groups
    both("mon", "sun")
    for disk in ("vm", "other"):
        one.restores(f"{disk}-mon.qcow2", bytes(contents(one.daemon.graph.disk(disk))))


# Pulled ---------------------------------------------------------------------------------------


def test_a_pull_says_from_which_backup_its_bitmap_counts(one: Scene) -> None:
    one.daemon.start_nbd({"type": "unix", "path": str(one.folder / "s")})

    def pull(**more: Any) -> dict[str, Any]:
        given = {"disks": [{"device": "vm", **more}], "bitmap": "b0"}
        (disk,) = one.daemon.execute("x-backup-export", given)["disks"]
        one.daemon.execute("x-backup-export-end", {})
        return dict(disk)

    first = pull()
    assert "since" not in first
    one.write(1)
    one.restart()
    one.daemon.start_nbd({"type": "unix", "path": str(one.folder / "s")})
    second = pull()
    assert second["since"] == first["backup-id"] != second["backup-id"]
    one.backup("sun.qcow2")
    one.write(2)
    third = pull(base=one.path("sun.qcow2"))
    assert third["since"] == lineage_of(one.path("sun.qcow2"))
    before = one.daemon.graph.every_node()
    with pytest.raises(CowferryError, match="counts from the backup of"):
        pull(base=one.path("sun.qcow2"))
    assert one.daemon.graph.every_node() == before and not one.daemon.pulls


def lineage_of(path: str) -> str:
    node = opening.open_image(path, read_only=True)
    try:
        found = lineage.stamp_of(node)
        assert found is not None and not found.written
        return found.id.hex()
    finally:
        node.close()
