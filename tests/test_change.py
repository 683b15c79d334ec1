"""Another image for a disk, or another name in a header: the guest reads the same bytes, or nothing
has changed."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cowferry
from chains import chain_of_disks, contents, differs, overlay
from cowferry.block import moves
from cowferry.block import node as node_module
from cowferry.block.node import chain
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError, ImageError
from cowferry.jobs import verify
from cowferry.jobs.ending import finish
from cowferry.jobs.verify import Verify
from cowferry.operations import change as operation
from daemons import Told, a_daemon
from nbd_servers import uri
from tests_support import need

SIZE = 4 << 20


class Scene:
    """`vm`: base.raw <- sn1.qcow2 <- vm.qcow2, and images that hold the same bytes, or nearly."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder, self.daemon, self.told = folder, daemon, Told(daemon)
        self.oracle = chain_of_disks(folder, ["base.raw", "sn1.qcow2", "vm.qcow2"], SIZE)
        self.disk = daemon.open_disk("vm", str(folder / "vm.qcow2"))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def copy(self, name: str, wrong_at: int | None = None, format: str = "raw") -> str:
        """An image with the disk's bytes, but for one."""
        data = bytearray(self.oracle)
        if wrong_at is not None:
            data[wrong_at] ^= 1
        path = self.folder / name
        cowferry.create(str(path), SIZE, format)
        with cowferry.open(str(path)) as disk:
            disk.pwrite(memoryview(data), 0)
        return str(path)

    def change(self, target: str, **more: Any) -> None:
        given = {"device": "vm", "target": target, "notify": False, **more}
        self.daemon.execute("change", given)

    def state(self) -> dict[str, Any]:
        files = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        graph = self.daemon.graph
        nodes = [n.name for n in graph.every_node()]
        return {**files, "nodes": nodes, "claims": graph.claims, "jobs": self.daemon.jobs.all(),
                "bitmaps": self.disk.bitmaps}  # fmt: skip

    def refused(self, words: str, command: str, **more: Any) -> CowferryError:
        self.disk.flush()
        before = self.state()
        with pytest.raises(CowferryError, match=words) as found:
            self.daemon.execute(command, {"device": "vm", **more})
        assert self.state() == before
        assert contents(self.disk) == self.oracle
        return found.value


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with a_daemon() as daemon:
        yield Scene(tmp_path, daemon)


# change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1 << 20, SIZE // 2 + 70_001, SIZE - 1])
def test_an_image_with_other_bytes_is_refused_with_the_first_offset(scene: Scene, at: int) -> None:
    wrong = scene.copy("wrong.raw", at)
    error = scene.refused(
        f"wrong.raw' differs from 'vm' at offset {at}", "change", target=wrong, notify=False
    )
    assert "use unsafe" in error.hint
    assert moves.follow(scene.path("vm.qcow2")).path == scene.path("vm.qcow2")


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_an_image_with_the_same_bytes_becomes_the_disk(scene: Scene, format: str) -> None:
    new = scene.copy(f"new.{format}", format=format)
    scene.change(new)
    assert scene.disk.root.filename == new and contents(scene.disk) == scene.oracle
    assert not scene.disk.bitmaps and not scene.daemon.graph.claims
    scene.daemon.remove_disk("vm")
    again = scene.daemon.open_disk("vm", scene.path("vm.qcow2"))
    assert again.root.filename == new and contents(again) == scene.oracle


def test_what_is_unsafe_is_not_looked_at(scene: Scene) -> None:
    wrong = scene.copy("wrong.raw", 5)
    scene.change(wrong, unsafe=True)
    assert scene.disk.root.filename == wrong


def test_another_medium_is_not_compared(scene: Scene) -> None:
    other = scene.copy("wrong.raw", 5)
    scene.daemon.execute("change", {"device": "vm", "target": other})
    assert scene.disk.root.filename == other


@pytest.mark.parametrize("below", ["vm.qcow2", "sn1.qcow2", "base.raw"])
def test_an_overlay_of_the_chain_is_compared_where_it_hides_it(scene: Scene, below: str) -> None:
    """Over the disk itself an empty one is the same disk, also while the guest writes."""
    kind = os.path.splitext(below)[1][1:]
    new = str(overlay(scene.folder, "new.qcow2", below, kind, SIZE))
    if below != "vm.qcow2":
        scene.refused("differs from 'vm' at offset", "change", target=new, notify=False)
        with opened(new) as node:
            node.pwrite(memoryview(scene.oracle), 0)
    scene.change(new)
    assert [os.path.basename(n.filename) for n in chain(scene.disk.root)][:2] == [
        "new.qcow2",
        below,
    ]
    scene.disk.pwrite(memoryview(b"more"), 77)
    scene.oracle[77:81] = b"more"
    assert contents(scene.disk) == scene.oracle


class opened:
    """An image by itself, for a moment."""

    def __init__(self, path: str) -> None:
        self.node = opening.open_image(path, backing=False)

    def __enter__(self) -> Any:
        return self.node

    def __exit__(self, *_: object) -> None:
        self.node.close()


def test_an_overlay_that_hides_a_byte_is_refused(scene: Scene) -> None:
    new = str(overlay(scene.folder, "new.qcow2", "vm.qcow2", "qcow2", SIZE))
    cluster = bytearray(scene.oracle[1 << 20 : (1 << 20) + (64 << 10)])
    cluster[1000] ^= 255
    with opened(new) as node:
        node.pwrite(memoryview(cluster), 1 << 20)
    scene.refused(f"at offset {(1 << 20) + 1000}", "change", target=new, notify=False)


def stepped(scene: Scene, target: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Verify, Any]:
    """The job of a change, which the test steps."""
    with monkeypatch.context() as patch:
        patch.setattr(Verify, "start", lambda job: None)
        scene.change(target, **{"x-job-id": "c"})
    job = scene.daemon.jobs.get("c")
    assert isinstance(job, Verify)
    return job, job.run()


def test_what_the_guest_writes_meanwhile_is_compared_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a range that was compared already; the guest writes what the other image has not."""
    new = scene.copy("new.raw")
    job, work = stepped(scene, new, monkeypatch)
    next(work)
    scene.disk.pwrite(memoryview(b"!"), 4711)
    scene.oracle[4711:4712] = b"!"
    with pytest.raises(CowferryError, match="differs from 'vm' at offset 4711"):
        for _ in work:
            pass
        finish([job])
    job.clean()
    assert contents(scene.disk) == scene.oracle and scene.disk.root.filename != new


def test_a_write_right_before_the_drain_is_compared_inside_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = scene.copy("new.raw")
    job, work = stepped(scene, new, monkeypatch)
    for _ in work:
        pass
    approach = operation.Change.approach

    def late(part: operation.Change) -> None:
        approach(part)
        scene.disk.pwrite(memoryview(b"!"), 4711)

    monkeypatch.setattr(operation.Change, "approach", late)
    with pytest.raises(CowferryError, match="differs from 'vm' at offset 4711"):
        finish([job])
    job.clean()
    assert scene.disk.root.filename == scene.path("vm.qcow2") and not scene.disk.bitmaps
    scene.disk.pwrite(memoryview(b"x"), 0)  # it is writable, and not held


def test_a_guest_that_writes_the_same_bytes_holds_nothing_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, work = stepped(scene, scene.copy("new.raw"), monkeypatch)
    for number, _ in enumerate(work):
        at = number % 4 * 1000
        scene.disk.pwrite(memoryview(scene.oracle)[at : at + 512], at)
    finish([job])
    job.clean()
    assert scene.disk.root.filename == scene.path("new.raw")


def test_a_guest_that_writes_all_the_time_moves_to_an_overlay(scene: Scene) -> None:
    new = str(overlay(scene.folder, "new.qcow2", "vm.qcow2", "qcow2", SIZE))
    stop, oracle = threading.Event(), scene.oracle

    def guest() -> None:
        number = 0
        while not stop.is_set():
            at = number * 7919 % (SIZE - 512)
            data = number.to_bytes(4, "big") * 128
            scene.disk.pwrite(memoryview(data), at)
            oracle[at : at + 512] = data
            number += 1

    thread = threading.Thread(target=guest)
    thread.start()
    try:
        scene.change(new)
    finally:
        stop.set()
        thread.join()
    assert scene.disk.root.filename == new and not differs(contents(scene.disk), oracle)


def test_a_change_can_be_watched_and_called_off(scene: Scene) -> None:
    new = scene.copy("new.raw")
    scene.change(new, speed=1 << 20, **{"x-job-id": "c"})
    (seen,) = scene.daemon.execute("query-block-jobs", {})
    assert (seen["type"], seen["len"], seen["speed"]) == ("change", SIZE, 1 << 20)
    with pytest.raises(CowferryError, match=r"busy|in use"):
        scene.daemon.execute("x-disk-remove", {"device": "vm"})
    scene.daemon.execute("job-cancel", {"id": "c"})
    scene.told.wait("BLOCK_JOB_CANCELLED", device="c")
    scene.told.wait("JOB_STATUS_CHANGE", id="c", status="null")
    assert not scene.daemon.graph.claims and not scene.disk.bitmaps
    assert scene.disk.root.filename == scene.path("vm.qcow2")
    scene.change(new)


def test_an_image_that_cannot_be_read_is_no_match(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = scene.copy("new.raw")
    plain = node_module.read

    def broken(node: Any, buf: memoryview, offset: int, flags: int = 0) -> None:
        if node is not None and node.filename == new and offset >= 2 << 20:
            raise OSError(5, "Input/output error")
        plain(node, buf, offset, flags)

    monkeypatch.setattr(verify, "read", broken)
    scene.refused("could not be compared: Input/output error", "change", target=new, notify=False)


@pytest.mark.parametrize("notify", [False, True])
def test_half_an_image_is_no_medium(scene: Scene, notify: bool) -> None:
    half = scene.copy("half.raw")
    moves.committing(half, scene.path("vm.qcow2"))
    scene.refused("cannot be used by itself", "change", target=half, notify=notify)


@pytest.mark.parametrize("notify", [False, True])
def test_a_disk_does_not_move_to_its_own_export(scene: Scene, notify: bool) -> None:
    scene.daemon.start_nbd({"type": "unix", "path": scene.path("s")})
    scene.daemon.add_export(scene.disk, "vm")
    own = uri(scene.folder / "s", "vm")
    scene.refused("is an export of", "change", target=own, notify=notify)
    over = {"driver": "raw", "file": opening.file_options(own)}
    scene.daemon.execute("blockdev-add", {**over, "node-name": "own", "read-only": True})
    scene.daemon.execute("blockdev-del", {"node-name": "own"})


# Names in headers -------------------------------------------------------------------------------


def test_a_name_that_leads_to_the_same_file_is_recorded_at_once(scene: Scene) -> None:
    os.link(scene.path("sn1.qcow2"), scene.path("link.qcow2"))
    for name in ("./sn1.qcow2", scene.path("sn1.qcow2"), "link.qcow2"):
        given = {"image-node-name": scene.disk.root.name, "backing-file": name}
        assert scene.daemon.execute(
            "change-backing-file", {"device": "vm", **given, "x-job-id": "r"}
        ) == {}  # fmt: skip
        assert scene.disk.root.backing_spec == (name, "qcow2")


def test_a_name_that_leads_to_a_copy_is_recorded_after_it_was_compared(scene: Scene) -> None:
    data = (scene.folder / "sn1.qcow2").read_bytes()
    (scene.folder / "copy.qcow2").write_bytes(data)
    given = {"image-node-name": scene.disk.root.name, "backing-file": "copy.qcow2"}
    found = scene.daemon.execute("change-backing-file", {"device": "vm", **given, "x-job-id": "r"})
    assert found == {"job": "r"}
    assert "error" not in scene.told.wait("BLOCK_JOB_COMPLETED", device="r")
    assert scene.disk.root.backing_spec == ("copy.qcow2", "qcow2")
    scene.told.wait("JOB_STATUS_CHANGE", id="r", status="null")
    assert not scene.daemon.graph.claims and not scene.disk.bitmaps


@pytest.mark.parametrize("job", [False, True])
def test_a_name_that_leads_to_other_bytes_is_refused(scene: Scene, job: bool) -> None:
    filled = str(overlay(scene.folder, "other.qcow2", "base.raw", "raw", SIZE))
    given = {"image-node-name": scene.disk.root.name, "backing-file": "other.qcow2"}
    if job:
        scene.daemon.execute("change-backing-file", {"device": "vm", **given, "x-job-id": "r"})
        error = scene.told.wait("BLOCK_JOB_COMPLETED", device="r")["error"]
        assert "differs from" in error and "at offset" in error
        scene.told.wait("JOB_STATUS_CHANGE", id="r", status="null")
    scene.refused(f"'{filled}' differs from .* at offset", "change-backing-file", **given)


@pytest.mark.parametrize("unsafe", [False, True])
def test_no_image_lies_over_itself(scene: Scene, unsafe: bool) -> None:
    """Not directly, nor by way of another name, nor by way of another image."""
    os.symlink(scene.path("vm.qcow2"), scene.path("link.qcow2"))
    overlay(scene.folder, "over.qcow2", "vm.qcow2", "qcow2", SIZE)
    node, below = scene.disk.root.name, scene.disk.root.backing
    assert below is not None
    for name, image in (
        ("vm.qcow2", node), ("link.qcow2", node), ("over.qcow2", node),
        ("vm.qcow2", below.name),
        ("sn1.qcow2", below.name),
    ):  # fmt: skip
        given = {"image-node-name": image, "backing-file": name, "unsafe": unsafe}
        scene.refused("cannot have the backing file", "change-backing-file", **given)
    scene.daemon.remove_disk("vm")
    assert contents(scene.daemon.open_disk("vm", scene.path("vm.qcow2"))) == scene.oracle


@pytest.mark.parametrize("verb", ["block-commit", "block-stream"])
def test_a_job_records_a_name_that_leads_to_the_base(scene: Scene, verb: str) -> None:
    base = scene.path("base.raw")
    more: dict[str, Any] = {"base": base, "job-id": "j"}
    if verb == "block-commit":
        more |= {"top": scene.path("sn1.qcow2")}
    for name, words in (
        ("nowhere.raw", "does not lead to"),
        ("sn1.qcow2", "does not lead to"),
        ("vm.qcow2", "cannot have the backing file"),
        ("json:{}", "not a plain path"),
        ("nbd://localhost/x", "is not followed"),
    ):
        scene.refused(words, verb, **more, **{"backing-file": name})
    name = f"../{scene.folder.name}/./base.raw"
    scene.daemon.execute(verb, {"device": "vm", **more, "backing-file": name})
    assert "error" not in scene.told.wait("BLOCK_JOB_COMPLETED", device="j")
    scene.told.wait("JOB_STATUS_CHANGE", id="j", status="null")
    assert scene.disk.root.backing_spec == (name, "raw")
    scene.daemon.remove_disk("vm")
    assert contents(scene.daemon.open_disk("vm", scene.path("vm.qcow2"))) == scene.oracle


@pytest.mark.parametrize("verb", ["block-commit", "block-stream"])
def test_a_job_records_any_other_name_only_if_that_is_wanted(scene: Scene, verb: str) -> None:
    more: dict[str, Any] = {"base": scene.path("base.raw"), "job-id": "j", "x-unsafe": True}
    if verb == "block-commit":
        more |= {"top": scene.path("sn1.qcow2")}
    scene.refused("cannot have the backing", verb, **more, **{"backing-file": "vm.qcow2"})
    scene.daemon.execute(verb, {"device": "vm", **more, "backing-file": "elsewhere.raw"})
    assert "error" not in scene.told.wait("BLOCK_JOB_COMPLETED", device="j")
    assert scene.disk.root.backing_spec == ("elsewhere.raw", "raw")


# As a person types them ---------------------------------------------------------------------------


def test_the_verbs_show_progress_and_say_what_is_wrong(tmp_path: Path) -> None:
    need("qemu-img")
    from daemons import environment, program

    chain_of_disks(tmp_path, ["base.raw", "sn1.qcow2", "vm.qcow2"], SIZE)
    convert = ["qemu-img", "convert", "-O", "raw", str(tmp_path / "vm.qcow2")]
    for name in ("same.raw", "wrong.raw"):
        subprocess.run([*convert, str(tmp_path / name)], check=True)
    with open(tmp_path / "wrong.raw", "r+b") as f:
        f.seek(3 << 20)
        f.write(b"!")
    (tmp_path / "run").mkdir()

    def run(*words: str) -> tuple[int, str]:
        import sys

        command = [sys.executable, "-m", "cowferry", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=60,
            env=environment(tmp_path / "run"),
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    with program(tmp_path / "run", f"vm={tmp_path}/vm.qcow2") as (_, line):
        line()
        status, text = run("change", "vm", "wrong.raw", "--no-notify")
        assert status == 1 and f"at offset {3 << 20}" in text and "--unsafe" in text
        status, text = run("backing", "vm", "vm.qcow2", "vm.qcow2")
        assert status == 1 and "cannot have the backing file 'vm.qcow2'" in text
        status, text = run("backing", "vm", "vm.qcow2", "base.raw")
        assert status == 1 and "--unsafe" in text
        status, text = run("backing", "vm", "vm.qcow2", "./sn1.qcow2")
        assert (status, text) == (0, "")
        status, text = run("change", "vm", "same.raw", "--no-notify", "--json")
        assert status == 0 and json.loads(text.splitlines()[-1])["result"] == "completed"
        status, text = run("tree", "vm")
        assert "same.raw" in text.splitlines()[0]


def test_a_record_of_half_an_image_is_told_without_bad_advice(tmp_path: Path) -> None:
    path = str(tmp_path / "half.raw")
    cowferry.create(path, SIZE, "raw")
    moves.copying(path, str(tmp_path / "vm.qcow2"), "b", SIZE, 1)
    with pytest.raises(ImageError) as found:
        opening.check_whole(path)
    assert "remove" not in found.value.hint
