"""The command line and a daemon that does not answer, or is to end: real processes and signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from cowferry.cli import client, live
from cowferry.cli.client import Client
from cowferry.drivers.nbd_client import NbdClient
from cowferry.drivers.opening import create_image, open_image
from daemons import PATIENCE, environment, program
from frozen_fs import frozen_fs
from nbd_servers import freeze, frozen, until

SIZE = 4 << 20


class Served:
    """A daemon of its own process that serves `vm`."""

    def __init__(self, folder: Path, child: subprocess.Popen[str], uri: str) -> None:
        self.folder, self.child, self.uri = folder, child, uri
        self.run = folder / "run"

    def verb(self, *arguments: str) -> subprocess.Popen[str]:
        """A verb of the command line, running."""
        return subprocess.Popen(
            [sys.executable, "-m", "cowferry", *arguments], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment(self.run),
        )  # fmt: skip

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Its exit status, and what it prints."""
        with self.verb(*arguments) as child:
            out, err = child.communicate(timeout=PATIENCE)
            return child.returncode, out, err

    def client(self) -> Client:
        return Client(str(self.run / "qmp.sock"))

    def frozen(self) -> AbstractContextManager[None]:
        """The daemon is stopped inside."""
        return frozen(self.child)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    create_image(str(tmp_path / "vm.qcow2"), "qcow2", SIZE, {})
    with program(tmp_path / "run", f"vm={tmp_path / 'vm.qcow2'}") as (child, line):
        yield Served(tmp_path, child, line().partition(": ")[2].strip())


# A daemon that does not answer ---------------------------------------------------------------


VERBS = (
    "tree", "jobs", "locks", "limit vm", "snapshot vm", "stop", "qmp query-status", "group list",
    "monitor info version", "copy vm x.raw --pivot", "job cancel x", "backup vm y.raw",
)  # fmt: skip


def test_every_live_verb_gives_a_stopped_daemon_so_much_time(served: Served) -> None:
    with served.frozen():
        begin = time.monotonic()
        running = [served.verb(*verb.split(), "--timeout", "0.5") for verb in VERBS]
        told = [verb.communicate(timeout=PATIENCE)[1] for verb in running]
        assert time.monotonic() - begin < PATIENCE
    for verb, err in zip(running, told, strict=True):
        assert verb.returncode == 1 and "has not answered within 0.5 s" in err, (verb.args, err)
        assert f"pid {served.child.pid} (" in err and "which is stopped" in err
        assert str(served.run / "qmp.sock") in err and "kill -CONT" in err
        assert "Traceback" not in err


def test_without_a_timeout_a_stopped_daemon_is_noticed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a command is under way, and before."""
    monkeypatch.setattr(client, "GREETING_SECONDS", 0.5)
    monkeypatch.setattr(client, "ALIVE_SECONDS", 0.2)
    with served.client() as q:
        with served.frozen():
            with pytest.raises(client.Silent, match="which is stopped"):
                q.call("query-status")
            with pytest.raises(client.Silent, match="which is stopped"):
                served.client()
        assert q.call("query-status")["running"]  # and goes on where it was


def test_a_command_that_takes_long_is_no_daemon_that_does_not_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ALIVE_SECONDS", 0.1)
    mute = socket.socket(socket.AF_UNIX)
    mute.bind(str(served.folder / "mute.sock"))
    mute.listen()
    with mute, served.client() as q, pytest.raises(client.QmpError) as refused:
        # It takes the connection, says nothing for a while, and then hangs up.
        threading.Timer(1.0, lambda: mute.accept()[0].close()).start()
        q.call("x-disk-add", device="far", filename=f"nbd+unix:///?socket={mute.getsockname()}")
    assert "far" in str(refused.value) or "mute.sock" in str(refused.value)


def test_a_command_that_waits_hears_that_the_daemon_has_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is gone before the command is answered; and it is killed with a request unread."""
    monkeypatch.setattr(client, "ALIVE_SECONDS", 0.1)
    with served.client() as waiting, served.client() as late:
        freeze(served.child)
        waiting.sock.sendall(b'{"execute": "query-status", "id": 0}')
        (served.run / "qmp.sock").unlink()
        served.child.kill()
        for q in (waiting, late):
            with pytest.raises(client.HungUp, match="has ended before it answered"):
                q.call("query-status")


def test_a_command_is_answered_by_a_daemon_that_takes_nobody_any_more(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while it ends: the client looks for it, does not find it, and waits on."""
    monkeypatch.setattr(client, "ALIVE_SECONDS", 0.1)
    with served.client() as q:
        os.rename(served.run / "qmp.sock", served.run / "away")
        with served.frozen():
            threading.Timer(1.0, served.child.send_signal, (signal.SIGCONT,)).start()
            assert q.call("query-status")["running"]
        os.rename(served.run / "away", served.run / "qmp.sock")


def test_a_verb_that_follows_a_job_says_that_the_job_goes_on(served: Served) -> None:
    target = served.folder / "copy.raw"
    with NbdClient(served.uri, timeout=PATIENCE) as guest:
        guest.pwrite(b"g" * SIZE, 0)
    copy = ("copy", "vm", str(target), "--pivot", "--speed", "256k", "--timeout", "3", "--json")
    with served.verb(*copy) as copying, served.client() as q:
        assert copying.stdout is not None and copying.stdout.readline()  # it follows the job
        with served.frozen():
            err = copying.communicate(timeout=PATIENCE)[1]
        assert copying.returncode == 1 and "job copy-vm goes on as soon as the daemon does" in err
        assert f"kill -CONT {served.child.pid}" in err
        q.call("block-job-set-speed", device="copy-vm", speed=0)
        until(lambda: not q.call("query-block-jobs"))
        assert q.call("query-block")[0]["inserted"]["file"] == str(target)
    assert target.read_bytes() == b"g" * SIZE


def test_stop_says_that_a_stopped_daemon_has_not_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "STOP_SECONDS", 0.2)
    pid = served.child.pid
    process = os.pidfd_open(pid)
    with served.client() as q, served.frozen():
        assert live._await_end(q, pid, process) == 1
    os.close(process)
    err = capsys.readouterr().err
    assert f"pid {pid} (" in err and "which is stopped" in err and f"kill -CONT {pid}" in err


def test_a_second_daemon_is_refused_while_the_first_is_stopped(served: Served) -> None:
    """Also once so many wait for the first that it takes nobody any more."""
    with served.frozen(), ExitStack() as waiting:
        for full in (False, True):
            while full:
                sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                try:
                    sock.connect(str(served.run / "qmp.sock"))
                except BlockingIOError:
                    break
            status, _, err = served("serve", f"vm={served.folder / 'vm.qcow2'}")
            assert status == 1 and "another server listens there" in err
            assert f"pid {served.child.pid} (" in err and "which is stopped" in err


# The end -------------------------------------------------------------------------------------


def test_stop_returns_when_everything_is_free(served: Served) -> None:
    with NbdClient(served.uri, timeout=PATIENCE) as guest:
        guest.pwrite(b"x" * 4096, 0)
    assert served("stop")[0] == 0
    assert served.child.poll() is not None or served.child.wait(0.5) == 0
    assert not list(served.run.iterdir())
    node = open_image(str(served.folder / "vm.qcow2"))
    view = memoryview(bytearray(4096))
    node.pread(view, 0)
    node.close()
    assert view == b"x" * 4096


def test_stop_is_refused_while_clients_are_connected(served: Served) -> None:
    with NbdClient(served.uri, timeout=PATIENCE) as guest:
        assert served("copy", "vm", str(served.folder / "copy.raw"), "--async")[0] == 0
        status, _, err = served("stop")
        assert status == 1
        assert f"'vm': pid {os.getpid()} (" in err and "'copy-vm'" in err and "--force" in err
        guest.pwrite(b"y" * 512, 0)  # nothing has happened to it
        assert served.child.poll() is None
    status, _, err = served("stop")
    assert status == 0 and "job copy-vm is cancelled" in err


def test_stop_waits_for_clients_or_does_not(served: Served) -> None:
    with (
        NbdClient(served.uri, timeout=PATIENCE) as guest,
        served.verb("stop", "--drain", str(PATIENCE)) as stopping,
    ):
        guest.pwrite(b"z" * 512, 0)
        with served.client() as q:
            assert q.call("query-status")["running"] and stopping.poll() is None
        guest.close()
        _, err = stopping.communicate(timeout=PATIENCE)
        assert stopping.returncode == 0, err


def test_stop_by_force_answers_what_was_asked(served: Served) -> None:
    with NbdClient(served.uri, timeout=PATIENCE) as guest:
        guest.pwrite(b"f" * 512, 0)
        assert served("stop", "--force")[0] == 0
        with pytest.raises(OSError):
            guest.pread(512, 0)
    assert served.child.wait(PATIENCE) == 0


def test_signals_that_come_again_and_again_change_nothing_about_the_end(served: Served) -> None:
    with NbdClient(served.uri, timeout=PATIENCE) as guest:
        guest.pwrite(b"x" * 4096, 0)
    while served.child.poll() is None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            served.child.send_signal(number)
        time.sleep(0.002)
    assert served.child.returncode == 0
    assert not list(served.run.iterdir())


def test_stop_names_what_hangs_and_frees_the_rest(tmp_path: Path) -> None:
    """A disk with data that is not flushed lies on a frozen file system; another one does not."""
    with frozen_fs(tmp_path) as fs:
        for folder in (fs.path, tmp_path):
            create_image(str(folder / "d.qcow2"), "qcow2", SIZE, {})
        disks = [f"far={fs.path / 'd.qcow2'}", f"near={tmp_path / 'd.qcow2'}"]
        with program(tmp_path / "run", "--json", *disks) as (child, line):
            served = Served(tmp_path, child, "")
            uris = {d["name"]: d["uri"] for d in json.loads(line())["disks"]}
            for uri in uris.values():
                with NbdClient(uri, timeout=PATIENCE) as guest:
                    guest.pwrite(b"x" * 4096, 0)
            fs.freeze()
            try:
                begin = time.monotonic()
                status, _, err = served("stop")
                assert time.monotonic() - begin < 20 and status == 1, err
                assert "disk 'far'" in err and "near" not in err
                node = open_image(str(tmp_path / "d.qcow2"))  # nobody holds its lock
                view = memoryview(bytearray(4096))
                node.pread(view, 0)
                node.close()
                assert view == b"x" * 4096
                assert not list(served.run.iterdir())
            finally:
                fs.thaw()
            child.wait(PATIENCE)


def test_a_daemon_that_still_opens_its_disks_can_be_stopped(tmp_path: Path) -> None:
    mute = socket.socket(socket.AF_UNIX)
    mute.bind(str(tmp_path / "mute.sock"))
    mute.listen()
    option = (
        f"driver=nbd,node-name=n,open-timeout=600,server.type=unix,server.path={mute.getsockname()}"
    )
    with mute, program(tmp_path / "run", "--blockdev", option) as (child, _):
        mute.accept()
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 1
        assert child.stderr is not None and "was told to stop" in child.stderr.read()


# What belongs to a job -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--pivot", "--finish"])
def test_a_copy_ends_as_it_was_told_although_its_verb_is_gone(served: Served, how: str) -> None:
    """As a lost terminal does it (SIGHUP), before the copy is ready."""
    target = served.folder / "copy.raw"
    with NbdClient(served.uri, timeout=PATIENCE) as guest, served.client() as q:
        guest.pwrite(b"p" * SIZE, 0)
        with served.verb("copy", "vm", str(target), how, "--speed", "1M") as copying:
            until(lambda: [j for j in q.call("query-block-jobs") if j["offset"]])
            assert q.call("query-block-jobs")[0]["x-on-ready"] in ("complete", "cancel")
            intent = "moves its disk over" if how == "--pivot" else "ends as a copy of that moment"
            assert f"once it is ready it {intent}" in served("jobs")[1]
            copying.send_signal(signal.SIGHUP)
            copying.wait(PATIENCE)
        q.call("block-job-set-speed", device="copy-vm", speed=0)
        until(lambda: not q.call("query-block-jobs"))
        root = q.call("query-block")[0]["inserted"]["file"]
        assert root == (str(target) if how == "--pivot" else str(served.folder / "vm.qcow2"))
    assert target.read_bytes() == b"p" * SIZE


def test_a_group_and_a_commit_end_as_they_were_told(served: Served) -> None:
    assert served("snapshot", "vm")[0] == 0
    with NbdClient(served.uri, timeout=PATIENCE) as guest:
        guest.pwrite(b"g" * SIZE, 0)
    with served.client() as q:
        assert served("commit", "vm", "--pivot", "--async")[0] == 0
        until(lambda: not q.call("query-block-jobs"))
        assert q.call("query-block")[0]["inserted"]["file"] == str(served.folder / "vm.qcow2")
        target = served.folder / "copy.raw"
        copy = ("group", "copy", f"vm={target}", "--id", "g", "--pivot", "--async")
        assert served(*copy, "--speed", "256k")[0] == 0
        assert q.call("query-block-jobs")[0]["x-on-ready"] == "complete"
        assert "once it is ready it moves its disks over" in served("group", "list")[1]
        q.call("block-job-set-speed", device="g-vm", speed=0)
        until(lambda: not q.call("query-block-jobs"))
        assert q.call("query-block")[0]["inserted"]["file"] == str(target)
