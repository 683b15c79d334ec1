"""What fails half-way leaves nothing behind: full targets, servers that die, cancels, Ctrl-C.

As in test_unchanged.py all files around are compared before and after. What was made is gone,
what was there is untouched, and the error gives no bad advice. Two things may stay, because they
are meant to: what a stream or a commit has done so far, with which the disk reads as before; and a
copy to a raw image, which the same command goes on with.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base, overlay
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.monitor import qmp
from cowferry.wire import nbd
from daemons import PATIENCE, Told
from houses import Witness
from nbd_servers import Forgetful, uri
from scenes import Failed, cowferry, qemu
from storages import Folder, Mounts
from tests_support import need

SIZE = 2 << 20
ROOM = 300 << 10  # bytes on a file system that "fills": some of an image

#: Cases that fail because of a fault that is known and not mended yet, by that fault.
FAULTS: dict[str, tuple[str, ...]] = {}
PENDING = {row: why for why, rows in FAULTS.items() for row in rows}


@pytest.fixture(scope="module")
def ground() -> Iterator[Mounts]:
    """The file systems of this worker."""
    with Mounts() as made:
        yield made


class Site:
    """Disks `vm` (qcow2 over base.raw) and `two` (raw), images in `here`, and a folder `there` on
    a file system of its own, with images of its own. A daemon of this process serves the disks."""

    def __init__(self, folder: Path, there: Folder) -> None:
        self.here = folder / "here"
        self.here.mkdir()
        self.storage = there
        self.there = there.path
        self.state = folder / "state"
        self.run = folder / "run"
        self.run.mkdir()
        self.state.mkdir()
        h, t = self.here, self.there
        self.oracle = make_base(h, SIZE)
        overlay(h, "vm.qcow2", "base.raw", "raw", SIZE)
        self.two = bytes(self.oracle)
        (h / "two.raw").write_bytes(self.two)
        qemu("qemu-img", "convert", "-O", "qcow2", h / "base.raw", h / "source.qcow2")
        with opened(h / "vm.qcow2") as node:
            node.pwrite(memoryview(b"v" * 200_000), 100)
        self.oracle[100:200_100] = b"v" * 200_000
        (t / "old.raw").write_bytes(b"o" * 4096)
        opening.create_image(str(t / "old.qcow2"), "qcow2", SIZE, {})
        opening.create_image(str(t / "old.qed"), "qed", SIZE, {})
        os.chmod(t / "old.qcow2", 0o600)
        self._serve()

    def _serve(self) -> None:
        self._held = contextlib.ExitStack()
        self.daemon = Daemon()
        self._held.callback(self.daemon.close)
        server = qmp.server(self.daemon)
        server.listen_unix(str(self.run / "qmp.sock"))
        self._held.callback(server.stop)
        self._held.callback(server.stop_listening)
        self.daemon.start_nbd({"type": "unix", "path": str(self.run / "nbd.sock")})
        self.told = Told(self.daemon)
        for name, file in (("vm", "vm.qcow2"), ("two", "two.raw")):
            self.daemon.add_export(self.daemon.open_disk(name, str(self.here / file)), name)

    def close(self) -> None:
        """End the daemon."""
        self.storage.relieve()
        self._held.close()

    def witness(self) -> Witness:
        """Remember all files, and the state folder."""
        return Witness(self.here, self.there, self.state)

    def line(self, text: str, **more: object) -> list[str]:
        """The words of a command line; {h} and {t} are the folders."""
        return shlex.split(text.format(h=self.here, t=self.there, **more))

    def reads(self) -> None:
        """The disks read as ever."""
        assert not differs(contents(self.daemon.graph.disk("vm")), self.oracle)
        assert not differs(contents(self.daemon.graph.disk("two")), self.two)
        assert self.daemon.graph.disk("vm").root.filename == str(self.here / "vm.qcow2")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    node = opening.open_image(str(path))
    try:
        yield node
    finally:
        opening.close_chain(node)


@pytest.fixture
def site(
    tmp_path: Path, ground: Mounts, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Site]:
    need("qemu-img")
    monkeypatch.setenv("COWFERRY_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COWFERRY_QMP", str(tmp_path / "run" / "qmp.sock"))
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case in PENDING:
        request.applymarker(pytest.mark.xfail(reason=PENDING[case], strict=True))
    with (
        contextlib.closing(Folder(ground.get("tmpfs"), ROOM)) as there,
        contextlib.closing(Site(tmp_path, there)) as made,
    ):
        yield made


def unchanged(site: Site, witness: Witness, text: str, *may_change: str) -> None:
    """Nothing is different but files whose paths end in one of `may_change`; the disks read as
    ever, no job is left, and the text gives no bad advice."""
    assert text, "an error without a word"
    assert "[Errno" not in text and all(t.count("far.sock") < 2 for t in text.splitlines()), text
    problems = [
        d for d in witness.differences() if not any(f"{name} " in f"{d} " for name in may_change)
    ]
    problems += witness.advice(text)
    assert not problems, f"{text}\n" + "\n".join(problems)
    site.reads()
    assert site.daemon.execute("query-jobs", {}) == []


def fails(words: list[str]) -> str:
    """Run a command line that has to fail; its error."""
    with pytest.raises(Failed) as error:
        cowferry(*words)
    return error.value.text


# Full ----------------------------------------------------------------------------------------

#: What finds no room in {t}. Where it ends with "..." a raw copy may stay, to be gone on with.
FULL = """
    create -f raw -o preallocation=full {t}/new.raw 2M
    create -f raw -o preallocation=falloc {t}/new.raw 2M
    create -f qcow2 -o preallocation=full {t}/new.qcow2 2M
    create -f qcow2 -o preallocation=falloc {t}/new.qcow2 2M
    create -f qcow2 -o data_file={t}/new.data,preallocation=full {t}/new.qcow2 2M
    create -f qcow2 -o data_file={t}/new.data,data_file_raw=on,preallocation=falloc {h}/new.qcow2 2M
    create -f raw -o preallocation=full {t}/old.raw 2M
    create -f qcow2 -o preallocation=falloc {t}/old.qcow2 2M
    create -f raw -o preallocation=full {t}/old.qcow2 2M
    convert {h}/source.qcow2 {t}/new.raw
    convert -O qcow2 {h}/source.qcow2 {t}/new.qcow2
    convert -O qcow2 -c {h}/source.qcow2 {t}/new.qcow2
    convert -O qed {h}/source.qcow2 {t}/new.qed
    convert -O qcow2 -o data_file={t}/new.data {h}/source.qcow2 {t}/new.qcow2
    convert -O qcow2 -o data_file={t}/new.data {h}/source.qcow2 {h}/new.qcow2
    convert {h}/source.qcow2 {t}/old.raw
    convert -O qcow2 {h}/source.qcow2 {t}/old.qcow2
    convert -O qed {h}/vm.qcow2 -U {t}/old.qed
    copy vm {t}/new.raw --pivot ...
    copy vm {t}/new.qcow2 --pivot
    copy vm {t}/new.qed --finish
    copy two {t}/new.qcow2 --format qcow2 --finish
    copy vm {t}/new.qcow2 --chain --pivot
    copy vm {t}/new.qcow2 --copy-mode write-blocking --pivot
    backup vm {t}/new.raw
    backup vm {t}/new.qcow2
    backup vm {t}/new.qed
    backup vm {t}/new.qcow2 --compress
    backup vm {t}/new.qcow2 --bitmap b0
    backup vm={h}/new.qcow2 two={t}/new.qcow2
    group copy vm={h}/new.qcow2 two={t}/new.qcow2 --pivot
    group copy vm={t}/new.qcow2 two={h}/new.qcow2 --pivot
"""

#: What finds no room where not one byte is left.
LAST_BYTE = """
    create {t}/new.qcow2 2M
    create -f qed {t}/new.qed 2M
    create -f raw -b {h}/base.raw -F raw {t}/new.raw
    create {t}/old.raw -f qcow2 2M
    snapshot vm={t}/new.qcow2
    snapshot vm={t}/new.qed
    snapshot vm={h}/new.qcow2 two={t}/new.qcow2
    snapshot two={h}/new.qcow2 vm={t}/new.qcow2
    bitmap --add {t}/old.raw b0
    bitmap --add {t}/old.qcow2 b0
    bitmap --add {t}/old.qed b0
    backup vm {t}/new.qcow2 --top
    copy vm {t}/new.qcow2 --shallow --pivot
    copy vm {t}/new.raw --finish ...
    convert -O qcow2 -U {h}/vm.qcow2 {t}/new.qcow2
"""


def rows(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("case", rows(FULL))
def test_unchanged_after_storage_has_filled_up(case: str, site: Site) -> None:
    no_room(case, site)


@pytest.mark.parametrize("case", rows(LAST_BYTE))
def test_unchanged_where_storage_is_full(case: str, site: Site) -> None:
    site.storage.room = 0
    no_room(case, site)


def no_room(case: str, site: Site) -> None:
    line = case.removesuffix("...")
    goes_on = ("new.raw", "new.raw.copying", "vm.qcow2", "vm.qcow2.bitmaps") if line != case else ()
    bitmap = ("vm.qcow2", "vm.qcow2.bitmaps") if "--bitmap" in line else ()
    site.storage.squeeze()
    witness = site.witness()
    text = fails(site.line(line))
    unchanged(site, witness, text, *goes_on, *bitmap)
    site.storage.relieve()
    if goes_on:
        cowferry(*site.line(line))
        assert not differs((site.there / "new.raw").read_bytes(), site.oracle)


@pytest.mark.parametrize("command", ["drive-mirror", "drive-backup", "blockdev-create"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_unchanged_after_a_job_has_found_no_room(command: str, format: str, site: Site) -> None:
    site.storage.squeeze()
    witness = site.witness()
    path = str(site.there / "new")
    if command == "blockdev-create":
        options = {"driver": "file", "filename": path, "size": SIZE, "preallocation": "full"}
        if format == "qcow2":
            options = {"driver": "qcow2", "size": SIZE, "preallocation": "full",
                       "file": {"driver": "file", "filename": path}}  # fmt: skip
        arguments: dict[str, Any] = {"options": options}
    else:
        arguments = {
            "device": "vm", "target": path, "format": format, "sync": "full", "auto-dismiss": False
        }  # fmt: skip
    try:
        site.daemon.execute(command, {"job-id": "j", **arguments})
    except CowferryError as error:
        unchanged(site, witness, error.desc + "\n" + error.hint)
    else:
        site.told.wait("JOB_STATUS_CHANGE", id="j", status="concluded")
        (job,) = site.daemon.execute("query-jobs", {})
        site.daemon.execute("job-dismiss", {"id": "j"})
        unchanged(site, witness, job["error"])


# In place ------------------------------------------------------------------------------------

#: What changes an image in {t}, or needs room beside it, where not one byte is left. {t}/far.qcow2
#: over {t}/mid.qcow2 over {h}/base.raw is served, {t}/idle.qcow2 has the same content, and
#: {t}/bad.qcow2 no refcounts. After "..." stand files that may change, but read as before.
IN_PLACE = """
    resize {t}/idle.qcow2 64G
    rebase -b "" {t}/idle.qcow2 ... idle.qcow2
    rebase -b {h}/two.raw -F raw {t}/idle.qcow2 ... idle.qcow2
    check -r all {t}/bad.qcow2
    bitmap --add {t}/idle.qcow2 b0
    convert -n -O qcow2 {h}/source.qcow2 {t}/old.qcow2 ... old.qcow2
    convert -n -O qed {h}/source.qcow2 {t}/old.qed ... old.qed
    resize --live far 64G
    snapshot far={h}/new.qcow2
    snapshot vm={h}/new.qcow2 far={h}/new2.qcow2
    snapshot far
    copy far {h}/new.qcow2 --pivot
    group copy vm={h}/new.qcow2 far={h}/new2.qcow2 --pivot
    change far {h}/same.qcow2 --no-notify
    stream far ... far.qcow2
    commit far --base mid.qcow2 --pivot
    backup --pull far --scratch {t} --async
"""


@pytest.mark.parametrize("case", rows(IN_PLACE))
def test_unchanged_in_place_where_storage_is_full(case: str, site: Site) -> None:
    h, t = site.here, site.there
    line, _, changes = case.partition("...")
    small = {"cluster_size": "4096"}
    for name, below in (
        ("mid", h / "base.raw"),
        ("far", t / "mid.qcow2"),
        ("idle", h / "base.raw"),
    ):
        options = {"backing_file": str(below), "backing_fmt": below.suffix[1:], **small}
        opening.create_image(str(t / f"{name}.qcow2"), "qcow2", SIZE, options)
        with opened(t / f"{name}.qcow2") as node:
            if name != "mid":
                node.pwrite(memoryview(b"f" * 20_000), 4000)
    opening.create_image(str(t / "bad.qcow2"), "qcow2", SIZE, small)
    with opened(t / "bad.qcow2") as node:
        node.pwrite(memoryview(b"b" * 20_000), 4000)
    with open(t / "bad.qcow2", "r+b") as f:
        f.seek(4096)  # the refcount table
        f.write(bytes(4096))
    qemu("qemu-img", "convert", "-O", "qcow2", t / "far.qcow2", h / "same.qcow2")
    site.daemon.add_export(site.daemon.open_disk("far", str(t / "far.qcow2")), "far")
    far, idle = contents(site.daemon.graph.disk("far")), flat(t / "idle.qcow2")
    site.storage.room = 0
    site.storage.squeeze()
    witness = site.witness()
    text = fails(site.line(line))
    unchanged(site, witness, text, *changes.split())
    if line.startswith(("snapshot vm", "copy", "group", "change", "commit")):
        assert ".moved' cannot be written" in text or "mid.qcow2.committing' cannot" in text, text
    assert not differs(contents(site.daemon.graph.disk("far")), far)
    assert site.daemon.graph.disk("far").root.filename == str(t / "far.qcow2")
    site.storage.relieve()
    site.daemon.graph.disk("far").pwrite(memoryview(b"g" * 512), 0)
    site.daemon.graph.disk("far").flush()
    assert flat(t / "idle.qcow2") == idle
    for name in ("idle", "old"):
        qemu("qemu-img", "check", t / f"{name}.qcow2")


def flat(path: Path) -> bytes:
    """What qemu-img reads in an image."""
    qemu("qemu-img", "convert", "-O", "raw", path, path.parent / "flat.raw")
    try:
        return (path.parent / "flat.raw").read_bytes()
    finally:
        (path.parent / "flat.raw").unlink()


# Cancelled -----------------------------------------------------------------------------------

#: A slow job, and how it is called off. After "..." stand files that may change.
CANCELLED = """
    copy vm {t}/new.qcow2 --speed 64k --async; job cancel copy-vm
    copy vm {t}/new.qed --speed 64k --async; job cancel copy-vm
    copy vm {t}/new.raw --speed 64k --async; job cancel copy-vm ... vm.qcow2
    copy two {t}/new.raw --speed 64k --async; job cancel copy-two
    copy vm {t}/new.qcow2 --chain --speed 64k --async; job cancel copy-vm
    copy vm {t}/new.qcow2 --speed 64k --async; job cancel --soft copy-vm
    copy vm {h}/new.qcow2; job cancel copy-vm
    copy two {h}/new.raw; job cancel copy-two
    backup vm {t}/new.raw --speed 64k --async; job cancel backup-vm
    backup vm {t}/new.qcow2 --speed 64k --async; job cancel backup-vm
    backup vm {t}/new.qcow2 --compress --speed 64k --async; job cancel backup-vm
    backup vm={t}/new.qcow2 two={t}/new2.qcow2 --speed 64k --async; group cancel backup-group
    backup --pull vm two --async; backup --end --failed
    backup --pull vm two --async; backup --end
    group copy vm={t}/new.qcow2 two={t}/new2.qcow2 --speed 64k --async; group cancel copy-group
    group copy vm={h}/new.qcow2 two={h}/new2.qcow2; group cancel copy-group
    stream vm --speed 64k --async; job cancel stream-vm ... vm.qcow2
    commit vm --speed 64k --async; job cancel commit-vm ... base.raw base.raw.committing
    group stream vm --speed 64k --async; group cancel stream-group ... vm.qcow2
    group commit vm --speed 64k --async; group cancel commit-group ... base.raw base.raw.committing
"""


@pytest.mark.parametrize("case", rows(CANCELLED))
def test_unchanged_after_a_cancel(case: str, site: Site) -> None:
    lines, _, changes = case.partition("...")
    start, cancel = lines.split(";")
    witness = site.witness()
    cowferry(*site.line(start))
    try:
        text = cowferry(*site.line(cancel))
    except Failed as error:
        text = error.text
    unchanged(site, witness, text or "called off", *changes.split())


# Dead servers --------------------------------------------------------------------------------


@pytest.fixture
def server(site: Site) -> Iterator[Forgetful]:
    """A server of a disk in memory, which dies when the first byte is read or written."""
    made = Forgetful(site.run / "far.sock", SIZE)
    made.volatile[:] = made.durable[:] = bytes(site.oracle)

    def die(kind: int) -> None:
        if kind in (nbd.READ, nbd.WRITE, nbd.WRITE_ZEROES):
            made.crash()

    made.before = die
    yield made
    made.crash()


DEAD = """
    convert {far} {t}/new.raw -f raw
    convert {far} {t}/new.qcow2 -f raw -O qcow2
    convert {far} {t}/old.qcow2 -f raw -O qcow2
    convert {far} {t}/new.qcow2 -f raw -O qcow2 -c
    convert {h}/source.qcow2 {far} -n
    compare -f raw {far} {h}/source.qcow2
    compare {h}/source.qcow2 {far} -F raw
    copy vm {far} --pivot
    copy two {far} --finish
    backup vm {far}
    backup vm={t}/new.qcow2 two={far}
    change two {far} --no-notify
    group copy vm={t}/new.qcow2 two={far} --pivot
"""


@pytest.mark.parametrize("case", rows(DEAD))
def test_unchanged_after_a_server_has_died(case: str, site: Site, server: Forgetful) -> None:
    witness = site.witness()
    text = fails(site.line(case, far=uri(server.path)))
    unchanged(site, witness, text)


@pytest.mark.parametrize("command", ["blockdev-mirror", "blockdev-backup"])
def test_unchanged_after_the_server_of_a_node_has_died(
    command: str, site: Site, server: Forgetful
) -> None:
    address = {"type": "unix", "path": str(server.path)}
    node = {"driver": "nbd", "node-name": "far", "server": address}
    site.daemon.execute("blockdev-add", node)
    witness = site.witness()
    given = {"job-id": "j", "device": "vm", "target": "far", "sync": "full", "auto-dismiss": False}
    site.daemon.execute(command, given)
    site.told.wait("JOB_STATUS_CHANGE", id="j", status="concluded")
    (job,) = site.daemon.execute("query-jobs", {})
    site.daemon.execute("job-dismiss", {"id": "j"})
    unchanged(site, witness, job["error"])
    site.daemon.execute("blockdev-del", {"node-name": "far"})


# Ctrl-C --------------------------------------------------------------------------------------

#: Targets of a conversion; "old" ones are there already.
TARGETS = [f"{name}.{format}" for name in ("new", "old") for format in ("raw", "qcow2", "qed")]


@pytest.mark.parametrize("case", TARGETS)
def test_unchanged_after_ctrl_c_in_a_convert(case: str, site: Site) -> None:
    """The source does not answer, so the target has been begun."""
    server = Forgetful(site.run / "far.sock", SIZE)
    asked, go_on = threading.Event(), threading.Event()

    def hang(kind: int) -> None:
        if kind == nbd.READ:
            asked.set()
            go_on.wait(PATIENCE)

    server.before = hang
    witness = site.witness()
    format = case.partition(".")[2]
    words = site.line(f"convert {uri(server.path)} {{t}}/{case} -f raw -O {format}")
    try:
        with running(*words) as child:
            assert asked.wait(PATIENCE)
            child.send_signal(signal.SIGINT)
            assert child.wait(PATIENCE) == 130
    finally:
        go_on.set()
        server.crash()
    unchanged(site, witness, "interrupted")


LIVE = """
    copy vm {t}/new.qcow2 --speed 64k --pivot --json
    backup vm {t}/new.qcow2 --speed 64k --json
    group copy vm={t}/new.qcow2 two={t}/new2.qcow2 --speed 64k --pivot --json
    change two {h}/source.qcow2 --no-notify --speed 64k --json
    stream vm --speed 64k --json ... vm.qcow2
    commit vm --speed 64k --json ... base.raw base.raw.committing
"""


@pytest.mark.parametrize("case", rows(LIVE))
def test_unchanged_after_ctrl_c_in_a_live_verb(case: str, site: Site) -> None:
    witness = site.witness()
    line, _, changes = case.partition("...")
    with running(*site.line(line)) as child:
        assert child.stdout is not None
        child.stdout.readline()  # the first progress
        child.send_signal(signal.SIGINT)
        _, text = child.communicate(timeout=PATIENCE)
        assert child.returncode == 130
    unchanged(site, witness, text or "interrupted", *changes.split())


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command line as a program; killed at the end, if it still runs."""
    command = [sys.executable, "-m", "cowferry", *arguments]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        try:
            yield child
        finally:
            child.kill()
