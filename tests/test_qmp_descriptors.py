"""Descriptors handed to a daemon that may open nothing itself.

The daemon runs as `nobody`; the images are root's, some in a folder that nobody else may even
enter. What it is to work on is opened here and goes over its QMP socket (SCM_RIGHTS, add-fd).
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base
from conversations import OURS, SIZE, Refused, Talk, speaking
from cowferry.block import moves
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from daemons import environment
from tests_support import unavailable


def interpreter(env: dict[str, str]) -> str:
    """A Python that `nobody` may run, and that finds what ours finds."""
    for python in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        try:
            done = subprocess.run(
                [python, "-c", "import cowferry.cli"], env=env, user="nobody", group="nogroup",
                extra_groups=[], capture_output=True, cwd="/",
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode == 0:
            return python
    unavailable("no Python here may be run by another user")
    raise AssertionError


class Place:
    """Where the test is: the images, the daemon's own folders, and its monitor."""

    def __init__(self, images: Path, own: Path, talk: Talk) -> None:
        self.images, self.own, self.talk = images, own, talk

    def create(self, name: str, backing: str | None = None, size: int = SIZE) -> Path:
        """An image of root's."""
        path = self.images / name
        under = {"backing_file": backing, "backing_fmt": "raw"} if backing else {}
        opening.create_image(str(path), path.suffix[1:], size, under)
        path.chmod(0o600)
        return path

    def hand_over(self, path: Path, flags: int = os.O_RDWR, **more: Any) -> dict[str, int]:
        """Open it here, for the daemon."""
        fd = os.open(path, flags)
        try:
            got: dict[str, int] = self.talk.passing(fd, "add-fd", **more)
            return got
        finally:
            os.close(fd)

    def holds(self, name: str) -> bytearray:
        """The bytes of an image, with what is below it."""
        node = opening.open_image(str(self.images / name), read_only=True, force_share=True)
        try:
            return contents(node)
        finally:
            opening.close_chain(node)


@pytest.fixture(params=["seen", "hidden"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A daemon of `nobody`'s; it may look into the folder of the images, or not even that."""
    if os.geteuid() != 0:
        unavailable("becoming another user needs root")
    with a_folder(0o755) as top:
        images, own = top / "images", top / "own"
        images.mkdir(mode=0o755 if request.param == "seen" else 0o700)
        own.mkdir()
        nobody = pwd.getpwnam("nobody")
        os.chown(own, nobody.pw_uid, nobody.pw_gid)
        monkeypatch.setenv("COWFERRY_STATE", str(own / "state"))
        env = environment(own)
        env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HOME": str(own)}
        command = (interpreter(env), *OURS[1:])
        with speaking(
            own, command, env=env, user="nobody", group="nogroup", extra_groups=[], cwd="/"
        ) as talk:
            yield Place(images, own, talk)


@contextmanager
def a_folder(mode: int) -> Iterator[Path]:
    """Pytest's own folders are closed to other users."""
    path = Path(tempfile.mkdtemp(prefix="cf-"))
    path.chmod(mode)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def test_a_snapshot_into_an_overlay_that_was_handed_over(place: Place) -> None:
    """By file (blockdev-snapshot-sync mode=existing), and then by node, each time under a guest."""
    talk = place.talk
    oracle = make_base(place.images, SIZE)
    base = place.images / "base.raw"
    base.chmod(0o600)
    for name in ("sn1.qcow2", "sn2.qcow2"):
        place.create(name, None if name == "sn2.qcow2" else "base.raw")
    with pytest.raises(Refused) as refused:
        file = {"driver": "file", "filename": str(base)}
        talk("blockdev-add", driver="raw", node_name="vm", file=file)
    assert "Permission denied" in refused.value.desc

    assert place.hand_over(base)["fdset-id"] == 0
    file = {"driver": "file", "filename": "/dev/fdset/0"}
    talk("blockdev-add", driver="raw", node_name="vm", file=file)
    where = {"type": "unix", "data": {"path": str(place.own / "nbd")}}
    talk("nbd-server-start", addr=where)
    talk("block-export-add", type="nbd", id="vm", node_name="vm", writable=True)
    with NbdClient(f"nbd+unix:///vm?socket={place.own / 'nbd'}") as guest:

        def write(at: int, data: bytes) -> None:
            guest.pwrite(data, at)
            oracle[at : at + len(data)] = data

        write(4096, b"before" * 100)
        snap = {"node_name": "vm", "snapshot_node_name": "one"}
        no = str(place.images / "no.qcow2")
        denied = talk.refusal("blockdev-snapshot-sync", snapshot_file=no, **snap)
        assert "Permission denied" in denied.desc
        below = bytes(oracle)

        assert place.hand_over(place.images / "sn1.qcow2", fdset_id=7)["fdset-id"] == 7
        talk("blockdev-snapshot-sync", snapshot_file="/dev/fdset/7", mode="existing", **snap)
        write(70_000, b"after" * 1000)
        assert differs(guest.pread(SIZE, 0), oracle) == ""
        assert base.read_bytes() == below, "S2: the old image changes no more"
        assert talk("query-fdsets")[1]["fdset-id"] == 7
        talk("remove-fd", fdset_id=7)  # an image that is open keeps its own
        write(0, b"x" * 512)
        middle = bytes(oracle)

        number = place.hand_over(place.images / "sn2.qcow2")["fdset-id"]
        file = {"driver": "file", "filename": f"/dev/fdset/{number}"}
        talk("blockdev-add", driver="qcow2", node_name="two", backing=None, file=file)
        talk("blockdev-snapshot", node="one", overlay="two")
        write(SIZE - 512, b"y" * 512)
        guest.flush()
        assert differs(guest.pread(SIZE, 0), oracle) == ""
    assert differs(place.holds("sn1.qcow2"), middle) == ""
    assert differs(place.holds("sn2.qcow2"), oracle) == "", "the header was written by descriptor"

    # What is current is decidable from what is on disk, and the daemon could write that only in
    # its own folder.
    assert sorted(p.name for p in place.images.iterdir()) == [
        "base.raw", "sn1.qcow2", "sn2.qcow2",
    ]  # fmt: skip
    assert moves.follow(str(base)).path == str(place.images / "sn2.qcow2")


def test_a_transaction_over_descriptors_is_all_or_none(place: Place) -> None:
    talk = place.talk
    actions: list[dict[str, Any]] = []
    for n in (0, 1):
        disk, top = place.create(f"d{n}.raw"), place.create(f"d{n}.qcow2")
        a, b = (place.hand_over(p)["fdset-id"] for p in (disk, top))
        file = {"driver": "file", "filename": f"/dev/fdset/{a}"}
        talk("blockdev-add", driver="raw", node_name=f"d{n}", file=file)
        data = {"node-name": f"d{n}", "snapshot-node-name": f"top{n}", "mode": "existing"}
        data["snapshot-file"] = f"/dev/fdset/{b}"
        actions.append({"type": "blockdev-snapshot-sync", "data": data})
    before = talk("query-named-block-nodes")
    lost = {**actions[1], "data": {**actions[1]["data"], "snapshot-file": "/dev/fdset/99"}}
    assert "/dev/fdset/99" in talk.refusal("transaction", actions=[actions[0], lost]).desc
    assert talk("query-named-block-nodes") == before
    talk("transaction", actions=actions)
    names = {n["node-name"]: n.get("backing_file") for n in talk("query-named-block-nodes")}
    assert [names["top0"], names["top1"]] == [str(place.images / f"d{n}.raw") for n in (0, 1)]


def test_descriptors_of_the_wrong_kind(place: Place) -> None:
    talk = place.talk
    r, w = os.pipe()
    pair = socket.socketpair()
    null = os.open(os.devnull, os.O_RDWR)
    folder = os.open(place.images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for fd in (r, w, pair[0].fileno(), null, folder):
            with pytest.raises(Refused) as refused:
                talk.passing(fd, "add-fd")
            assert refused.value.klass == "GenericError"
            assert "neither a regular file nor a block device" in refused.value.desc
            assert "image" in refused.value.hint
    finally:
        for fd in (r, w, null, folder):
            os.close(fd)
        for s in pair:
            s.close()
    for missing in (talk.refusal("add-fd"), talk.refusal("getfd", fdname="x")):
        assert missing.desc == "No file descriptor supplied via SCM_RIGHTS"
    assert talk("query-fdsets") == []
    assert "'fdset-id:3' not found" in talk.refusal("remove-fd", fdset_id=3).desc
    assert "'x' not found" in talk.refusal("closefd", fdname="x").desc


def test_access_is_what_was_handed_over(place: Place) -> None:
    talk = place.talk
    image = place.create("d.raw")
    place.hand_over(image, os.O_RDONLY, fdset_id=1, opaque="mine")
    add = {"driver": "raw", "node_name": "d"}
    file = {"driver": "file", "filename": "/dev/fdset/1"}
    refused = talk.refusal("blockdev-add", file=file, **add)
    assert "no descriptor of the set has that access" in refused.desc
    talk("blockdev-add", file=file, read_only=True, **add)
    talk("blockdev-del", node_name="d")
    place.hand_over(image, os.O_RDWR, fdset_id=1)
    talk("blockdev-add", file=file, **add)
    sets = talk("query-fdsets")
    assert [s["fdset-id"] for s in sets] == [1]
    assert [f.get("opaque") for f in sets[0]["fds"]] == ["mine", None]
    missing = talk.refusal("remove-fd", fdset_id=1, fd=9999)
    assert "File descriptor named 'fdset-id:1, fd:9999' not found" in missing.desc
    talk("remove-fd", fdset_id=1, fd=sets[0]["fds"][0]["fd"])
    talk("remove-fd", fdset_id=1)
    assert talk("query-fdsets") == []
    gone = talk.refusal("blockdev-add", driver="raw", node_name="e", file=file)
    assert "No such fdset" in gone.desc


def test_a_commit_and_a_mirror_over_descriptors(place: Place) -> None:
    """What jobs need of the files (growing, reopening, records) they can do without their names."""
    talk = place.talk
    oracle = make_base(place.images, SIZE)
    (place.images / "base.raw").chmod(0o600)
    place.create("vm.qcow2", "base.raw")
    place.create("t.raw")
    numbers = {
        name: place.hand_over(place.images / name)["fdset-id"]
        for name in ("base.raw", "vm.qcow2", "t.raw")
    }

    def node(name: str, **more: Any) -> dict[str, Any]:
        file = {"driver": "file", "filename": f"/dev/fdset/{numbers[name]}"}
        return {"driver": Path(name).suffix[1:], "node-name": Path(name).stem, "file": file, **more}

    talk("blockdev-add", **node("vm.qcow2", backing=node("base.raw")))
    talk("blockdev-add", **node("t.raw"))
    for number in numbers.values():
        talk("remove-fd", fdset_id=number)
    talk("block-commit", job_id="j", device="vm")
    talk.until("BLOCK_JOB_READY")
    talk("job-complete", id="j")
    assert "error" not in talk.until("BLOCK_JOB_COMPLETED")
    talk.until("null")
    talk("blockdev-del", node_name="vm")
    talk("blockdev-mirror", job_id="j", device="base", target="t", sync="full")
    talk.until("BLOCK_JOB_READY")
    talk("job-complete", id="j")
    assert "error" not in talk.until("BLOCK_JOB_COMPLETED")
    talk.until("null")
    assert differs(place.holds("t.raw"), oracle) == ""
    found = moves.follow(str(place.images / "vm.qcow2"))
    assert found.path == str(place.images / "t.raw")
