"""Connections of the NBD server: clients that are gone without a word, and clients that take every
place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cowferry.block.disk import Disk
from cowferry.drivers.nbd_client import NbdClient
from cowferry.drivers.opening import create_image, open_image
from cowferry.errors import CowferryError
from cowferry.exports.nbd import NbdServer, export_of
from cowferry.wire import nbd
from daemons import PATIENCE, a_daemon
from nbd_servers import until
from tests_support import need, unavailable

SIZE = 1 << 20

CLIENT = """
import sys
from cowferry.drivers.nbd_client import NbdClient
client = NbdClient(sys.argv[1], timeout=30)
client.pread(512, 0)
print("connected", flush=True)
if sys.argv[2] == "busy":
    sys.stdin.readline()  # the link is down: what is asked from now on never arrives
sys.stdin.read()
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    create_image(str(tmp_path / "vm.raw"), "raw", SIZE, {})
    node = open_image(str(tmp_path / "vm.raw"))
    yield Disk(node, "vm")
    node.close()


@contextmanager
def serving(disk: Disk, **options: float) -> Iterator[NbdServer]:
    server = NbdServer(**options)  # type: ignore[arg-type]
    try:
        server.add(export_of(disk, "vm"))
        yield server
    finally:
        server.stop(PATIENCE)


@contextmanager
def network() -> Iterator[tuple[str, str]]:
    """A network namespace, and our end's address of the only cable to it."""
    need("ip")
    name = f"cwf{os.getpid()}"
    ours, theirs = f"{name}a", f"{name}b"

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            unavailable(f"no network namespaces here: {done.stderr.strip()}")

    if os.geteuid():
        unavailable("only root may make network namespaces")
    third = os.getpid() % 250 + 1
    with ExitStack() as made:
        ip("netns", "add", name)
        made.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        made.callback(
            subprocess.run, ["ip", "link", "del", ours], check=False, stderr=subprocess.DEVNULL
        )
        ip("addr", "add", f"10.213.{third}.1/24", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", name, "addr", "add", f"10.213.{third}.2/24", "dev", theirs)
        ip("-n", name, "link", "set", theirs, "up")
        yield name, f"10.213.{third}.1"


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_a_client_whose_host_is_gone_gives_its_place_back(disk: Disk, how: str) -> None:
    """It says no goodbye, and no packet of it comes any more. `busy`: an answer is on its way."""
    with network() as (name, address), serving(disk, peer_seconds=1) as server:
        server.listen_tcp(address, 0)
        export = server.exports["vm"]
        command = [sys.executable, "-c", CLIENT, server.uri("vm"), how]
        child = subprocess.Popen(
            ["ip", "netns", "exec", name, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert child.stdout is not None and child.stdout.readline() == b"connected\n"
            until(lambda: export.users == 1)
            subprocess.run(["ip", "-n", name, "link", "set", f"{name}b", "down"], check=True)
            if how == "busy":  # as if it had asked just before: our answer is not acknowledged
                (lane,) = export.lanes
                lane.sock.send(nbd.SIMPLE.pack(nbd.SIMPLE_MAGIC, 0, 1))
            until(lambda: not export.users and not server.connections)
        finally:
            child.kill()
            child.communicate()


def test_each_listener_has_places_of_its_own(disk: Disk, tmp_path: Path) -> None:
    with serving(disk, max_connections=3) as server, ExitStack() as clients:
        server.listen_tcp("127.0.0.1", 0)
        server.listen_unix(str(tmp_path / "nbd.sock"))
        tcp, unix = server.uris("vm")
        for uri in (tcp, unix):
            for _ in range(3):
                clients.enter_context(NbdClient(uri, timeout=PATIENCE))
        for uri in (tcp, unix):
            with pytest.raises(CowferryError):
                NbdClient(uri, timeout=PATIENCE)


def test_one_host_does_not_keep_the_others_out(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(disk, max_connections=20) as server, ExitStack() as clients:
        port = server.listen_tcp("127.0.0.1", 0)

        def connect(own: str) -> socket.socket:
            sock = clients.enter_context(socket.socket())
            sock.bind((own, 0))
            sock.settimeout(PATIENCE)
            sock.connect(("127.0.0.1", port))
            return sock

        greeted = [connect("127.0.0.5").recv(8) for _ in range(12)]
        assert greeted == [b"NBDMAGIC"] * 10 + [b""] * 2
        assert connect("127.0.0.6").recv(8) == b"NBDMAGIC"
        complaints = [
            r.getMessage() for r in caplog.records if "refused a connection" in r.getMessage()
        ]
        assert len(complaints) == 1
        assert f"127.0.0.1:{port}: 127.0.0.5 has 10 of 20" in complaints[0]


def test_places_come_back_when_clients_leave(disk: Disk, tmp_path: Path) -> None:
    with serving(disk, max_connections=2) as server:
        server.listen_unix(str(tmp_path / "nbd.sock"))
        uri = server.uri("vm")
        for _ in range(5):
            with NbdClient(uri, timeout=PATIENCE), NbdClient(uri, timeout=PATIENCE):
                pass
            until(lambda: not server.connections)


# The end of connections ----------------------------------------------------------------------


def test_what_clients_have_asked_is_answered_when_the_server_stops(tmp_path: Path) -> None:
    """Sixty-four writes and a flush are on their way when the daemon ends."""
    create_image(str(tmp_path / "vm.qcow2"), "qcow2", 64 << 20, {})
    with a_daemon() as daemon:
        server = daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd.sock")})
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        daemon.add_export(disk, "vm")
        with NbdClient(server.uri("vm"), timeout=PATIENCE) as guest:
            with disk.exclusive():  # nothing is answered yet
                calls = [
                    guest.link.submit(nbd.WRITE, 0, at << 20, 4096, b"w" * 4096) for at in range(63)
                ]
                calls.append(guest.link.submit(nbd.FLUSH, 0, 0, 0))
                until(lambda: next(iter(daemon.exports["vm"].lanes)).pending == 64)  # type: ignore[attr-defined]
                closing = threading.Thread(target=daemon.close)
                closing.start()
                until(lambda: server.stopping)
            for call in calls:
                guest.link.wait(call)
            closing.join(PATIENCE)
    node = open_image(str(tmp_path / "vm.qcow2"))
    view = memoryview(bytearray(4096))
    for at in range(63):
        node.pread(view, at << 20)
        assert view == b"w" * 4096
    node.close()
