"""Addresses of sockets, names of exports, and signals: what is taken, and what is refused."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains import make_base
from cowferry.cli import serve
from cowferry.daemon import Daemon
from cowferry.drivers.nbd import options_of
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError
from cowferry.exports.nbd import NbdServer
from cowferry.exports.sockets import bind_tcp
from cowferry.wire import address, nbd
from cowferry.wire.address import Address
from daemons import PATIENCE, a_daemon, environment, program
from tests_support import need, unavailable

SIZE = 1 << 20
V6 = "::1"


def need_ipv6() -> None:
    try:
        bind_tcp(Address("", V6)).close()
    except CowferryError:
        unavailable("this machine has no IPv6")


# What is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "last"),
    [
        ("localhost:10809", "localhost", 10809, 0),
        ("127.0.0.1:0", "127.0.0.1", 0, 0),
        (":65535", "", 65535, 0),
        ("[::1]:1", "::1", 1, 0),
        ("[fe80::1%eth0]:10809", "fe80::1%eth0", 10809, 0),
        ("host:1000-1010", "host", 1000, 1010),
    ],
)
def test_tcp_addresses_as_a_person_types_them(text: str, host: str, port: int, last: int) -> None:
    found = address.parse_tcp(text, "--tcp")
    assert (found.host, found.port, found.last) == (host, port, last)
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "here", "here:", "::1:10809", "::1", "[::1]", "[::1", "::1]:1", "[]:1", "[localhost]:1",
        "[127.0.0.1]:1", "h:65536", "h:99999999999999999999", "h:-1", "h:1x", "h: 1", "h:1e3",
        "h:\u0663", "h:5-4", "h:5-", "h:-5", "a b:1", "a..b:1", "x" * 64 + ":1", "a/b:1", "a\0:1",
        "unix:/tmp/s", "tcp:h:1", "h:1-70000",
    ],
)  # fmt: skip
def test_a_tcp_address_that_is_wrong_is_told_with_its_option(text: str) -> None:
    with pytest.raises(CowferryError) as refused:
        address.parse_tcp(text, "--tcp")
    assert "--tcp" in refused.value.desc


SERVERS: list[tuple[dict[str, Any], str]] = [
    ({}, "Parameter 'addr.type' is missing"),
    ({"type": "vsock"}, "Parameter 'addr.type' does not accept value 'vsock'"),
    ({"type": "unix"}, "Parameter 'addr.path' is missing"),
    ({"type": "unix", "path": ""}, "is no path of a socket"),
    ({"type": "unix", "path": "a\0b"}, "is no path of a socket"),
    ({"type": "unix", "path": "x" * 108}, "is too long"),
    ({"type": "unix", "path": "s", "port": 1}, "Parameter 'addr.port' is unexpected"),
    ({"type": "unix", "path": ["s"]}, "Invalid parameter type for 'addr.path', expected: string"),
    ({"type": "unix", "data": ["s"]}, "Invalid parameter type for 'addr.data', expected: object"),
    ({"type": "unix", "data": {}}, "Parameter 'addr.path' is missing"),
    ({"type": "unix", "data": {"path": "s"}, "path": "t"}, "members beside 'data', which belong"),
    ({"type": "inet", "host": "h"}, "Parameter 'addr.port' is missing"),
    ({"type": "inet", "port": "1"}, "Parameter 'addr.host' is missing"),
    ({"type": "inet", "host": "h", "port": True}, "Invalid parameter type for 'addr.port'"),
    ({"type": "inet", "host": "h", "port": None}, "Invalid parameter type for 'addr.port'"),
    ({"type": "inet", "host": "h", "port": "65536"}, "port 65536 is higher than 65535"),
    ({"type": "inet", "host": "h", "port": -1}, "'-1' is no port number"),
    ({"type": "inet", "host": "h", "port": "nbd"}, "'nbd' is no port number"),
    ({"type": "inet", "host": "[::1", "port": 1}, "'[::1' is no IPv6 address"),
    ({"type": "inet", "host": "1:2", "port": 1}, "'1:2' is no IPv6 address"),
    ({"type": "inet", "host": "a b", "port": 1}, "'a b' is no host name"),
    ({"type": "inet", "host": "h", "port": 5, "to": 4}, "port 4 is lower than port 5"),
    ({"type": "inet", "host": "h", "port": 5, "ipv4": "maybe"}, "expects 'on' or 'off'"),
    ({"type": "inet", "host": "h", "port": 5, "ipv4": "off", "ipv6": False}, "leave no protocol"),
    ({"type": "inet", "host": "h", "port": 5, "keep-alive": True}, "'addr.keep-alive' is unexp"),
]


@pytest.mark.parametrize(("wrong", "text"), SERVERS)
def test_a_socket_address_of_qmp_that_is_wrong_is_told_by_its_member(
    wrong: dict[str, Any], text: str
) -> None:
    for listen in (True, False):
        with pytest.raises(CowferryError) as refused:
            address.from_qmp(wrong, "addr", listen)
        if listen or not {"to", "ipv4"} & set(wrong):
            assert text in refused.value.desc


def test_socket_addresses_of_qmp() -> None:
    inet = {"type": "inet", "host": "h", "port": "10809"}
    assert address.from_qmp(inet) == Address("", "h", 10809)
    for host in (V6, f"[{V6}]"):
        assert address.from_qmp({**inet, "host": host}) == Address("", V6, 10809)
    legacy = {"type": "inet", "data": {"host": "h", "port": 10809}}
    assert address.from_qmp(legacy) == Address("", "h", 10809)
    more = {**inet, "to": 10900, "ipv4": "off", "ipv6": True}
    assert address.from_qmp(more, listen=True) == Address("", "h", 10809, 10900, False, True)
    assert address.from_qmp({**inet, "host": "", "port": 0}, listen=True) == Address("", "")
    with pytest.raises(CowferryError, match="port 0"):
        address.from_qmp({**inet, "port": 0})


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://[::1/x", "nbd://::1/x", "nbd://h:65536/x", "nbd://h:0/x", "nbd://h:x/y",
        "nbd://[zz]/x", "nbd://a..b/x", "nbd+unix:///x", "nbd+unix:///x?socket=", "nbds://h/x",
        "nbd+unix:///x?socket=" + "y" * 108, "nbd+unix:///x?socket=a%00b", "nbd://h/%ff",
    ],
)  # fmt: skip
def test_a_uri_that_is_wrong_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(CowferryError):
        address.parse_uri(uri)
    with pytest.raises(CowferryError):
        serve.disk_name(uri)


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
HOSTS = ["h", "example.org", "127.0.0.1", "::1", "2001:db8::7", "fe80::1%eth0"]


@settings(max_examples=50)
@given(
    NAMES.filter(bool).map(Address)
    | st.tuples(st.just(""), st.sampled_from(HOSTS), st.integers(1, 65535)).map(
        lambda parts: Address(*parts)
    ),
    NAMES,
)
def test_a_uri_means_what_it_was_made_of(where: Address, export: str) -> None:
    assert address.parse_uri(where.uri(export)) == (where, export)


# What is listened on ---------------------------------------------------------------------


def connects(where: Address) -> bool:
    with socket.create_connection((where.host, where.port), PATIENCE) as sock:
        return bool(sock.recv(1))


def test_ipv6_is_served_and_its_uri_can_be_used(tmp_path: Path) -> None:
    need_ipv6()
    base = make_base(tmp_path, SIZE)
    run = tmp_path / "run"
    with program(run, "--tcp", "[::1]:0", f"{tmp_path}/base.raw") as (_, line):
        unix, tcp = line().split(": ", 1)[1].strip(), line().split(": ", 1)[1].strip()
        assert unix.startswith("nbd+unix:") and tcp.startswith("nbd://[::1]:")
        with NbdClient(tcp) as client:
            assert client.pread(SIZE, 0) == base
        need("nbdinfo")
        assert (
            subprocess.check_output(["nbdinfo", "--size", tcp], timeout=PATIENCE) == b"%d\n" % SIZE
        )
        assert options_of(tcp)["server"]["host"] == V6


def test_ports_in_a_range_are_tried_until_one_is_free() -> None:
    servers = [NbdServer() for _ in range(3)]
    try:
        first = servers[0].listen(Address("", "127.0.0.1"))
        where = first._replace(last=min(first.port + 20, 65535))
        second = servers[1].listen(where)
        assert first.port < second.port <= where.last
        assert connects(second)
        with pytest.raises(CowferryError) as refused:
            servers[2].listen(first)
        assert refused.value.desc == f"cannot listen on {first}: Address already in use"
    finally:
        for server in servers:
            server.stop()


def test_a_protocol_can_be_chosen() -> None:
    need_ipv6()
    for wanted, family in (({"ipv6": True}, socket.AF_INET6), ({"ipv4": True}, socket.AF_INET)):
        with bind_tcp(Address("", "", 0, **wanted)) as sock:
            assert sock.family == family
    with bind_tcp(Address("", "::", 0)) as sock:  # both
        port = sock.getsockname()[1]
        for host in ("127.0.0.1", V6):
            socket.create_connection((host, port), PATIENCE).close()
    with bind_tcp(Address("", "::", 0, ipv4=False)) as sock, pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", sock.getsockname()[1]), PATIENCE)
    with pytest.raises(CowferryError, match="cannot listen on 127"):
        bind_tcp(Address("", "127.0.0.1", ipv6=True))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tcp", "localhost:65536"], "port 65536 is higher than 65535"),
        (["--tcp", "::1:10809"], "put an IPv6 address in brackets"),
        (["--tcp", "[::1]"], "--tcp expects HOST:PORT or [IPV6]:PORT"),
        (["--tcp", ""], "--tcp expects HOST:PORT"),
        (["--socket", ""], "is not a socket"),
        (["--pidfile", ""], "cannot write pidfile ''"),
        (["--chardev", ""], "'id' is missing"),
        (["--tcp", "x" * 64 + ":1"], "is no host name"),
        (["--nbd-server", "addr.type=inet,addr.host=h,addr.port=70000"], "higher than 65535"),
        (["--nbd-server", "addr.type=inet,addr.host=[x],addr.port=1"], "'x' is no IPv6 address"),
        (["--nbd-server", "addr.type=inet,addr.host=h,addr.port=1,addr.x=1"], "'addr.x' is unex"),
        (["--chardev", "socket,id=c,host=::1,port=70000,server=on"], "higher than 65535"),
        (["--chardev", "socket,id=c,port=1,host=a b"], "is no host name"),
        (["--chardev", "socket,id=c,path=p,port=1"], "'path' and 'port' exclude each other"),
        (["--chardev", "socket,id=c"], "'path' or 'port' is missing"),
        (["--chardev", "socket,id=c,path=p,telnet=on"], "Parameter 'telnet' is unexpected"),
        (["--chardev", "socket,id=c,path=p,server=perhaps"], "'server' expects 'on' or 'off'"),
        (["nbd://[::1/x"], "nbd://[::1/x"),
        (["vm=nbd://h:99999/x"], "nbd://h:99999/x"),
    ],
)
def test_a_wrong_address_ends_serve_with_one_line(
    tmp_path: Path, arguments: list[str], text: str
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    if arguments[0] in ("--tcp", "--chardev", "--socket", "--pidfile"):
        arguments = [*arguments, str(base)]
    with program(tmp_path / "run", *arguments) as (child, _):
        assert child.wait(PATIENCE) == 1
        assert child.stderr is not None
        said = child.stderr.read()
        assert text in said and "Traceback" not in said, said


def test_a_monitor_listens_on_ipv6(tmp_path: Path) -> None:
    need_ipv6()
    with bind_tcp(Address("", V6)) as taken:
        port = taken.getsockname()[1]
    chardev = f"socket,id=c,host={V6},port={port},to={port + 20},server=on,wait=off"
    make_base(tmp_path, SIZE)
    with program(
        tmp_path / "run", "--chardev", chardev, "--monitor", "c", f"{tmp_path}/base.raw"
    ) as (_, line):
        line()
        for attempt in range(port, port + 21):
            try:
                with socket.create_connection((V6, attempt), PATIENCE) as sock:
                    assert b'"QMP"' in sock.recv(100)
                    break
            except ConnectionRefusedError:
                continue
        else:
            pytest.fail("no port of the range answers")


# Names of exports ------------------------------------------------------------------------

ODD = ["a\0b", "a\nb", "\x1b[2J", "a\x7f", "a\u2028b", "\ud800", "x" * 4097, "\x85"]


@pytest.mark.parametrize("name", ODD)
def test_an_export_name_that_would_break_lists_is_refused(tmp_path: Path, name: str) -> None:
    make_base(tmp_path, SIZE)
    path = tmp_path / "nbd"
    with a_daemon() as daemon:
        daemon.start_nbd({"type": "unix", "path": str(path)})
        disk = daemon.open_disk("vm", str(tmp_path / "base.raw"))
        daemon.add_export(disk, "vm")
        given: dict[str, Any] = {"type": "nbd", "id": "e", "node-name": "vm"}
        for member in ("name", "description"):
            with pytest.raises(CowferryError) as refused:
                daemon.execute("block-export-add", {**given, member: name})
            assert member in refused.value.desc
        wanted = {"device": "vm", "name": name}
        with pytest.raises(CowferryError):
            daemon.execute("x-backup-export", {"id": "b", "disks": [wanted]})
        assert not daemon.jobs.all() and list(daemon.exports) == ["vm"]
        with pytest.raises(CowferryError):
            daemon.open_disk(name, str(tmp_path / "base.raw"))
        server = {"type": "unix", "path": str(path)}
        node = {"driver": "nbd", "node-name": "n", "server": server, "export": name}
        with pytest.raises(CowferryError, match="Parameter 'export'"):
            daemon.execute("blockdev-add", node)
        need("nbdinfo")
        listed = subprocess.check_output(
            ["nbdinfo", "--list", "--json", f"nbd+unix:///?socket={path}"], timeout=PATIENCE
        )
        assert [e["export-name"] for e in json.loads(listed)["exports"]] == ["vm"]


@pytest.mark.parametrize("name", ["a b", "Büro 🐄", "a/b", "/", "x" * 4096, "%41", "a\u00a0b"])
def test_other_export_names_are_served_and_listed(tmp_path: Path, name: str) -> None:
    make_base(tmp_path, SIZE)
    path = tmp_path / "nbd"
    with a_daemon() as daemon:
        daemon.start_nbd({"type": "unix", "path": str(path)})
        daemon.open_disk("vm", str(tmp_path / "base.raw"))
        daemon.execute(
            "block-export-add", {"type": "nbd", "id": "e", "node-name": "vm", "name": name}
        )
        server = daemon.nbd
        assert server is not None
        with NbdClient(server.uri(name)) as client:
            assert client.size == SIZE
        need("nbdinfo")
        uri = server.uri(name)
        assert int(subprocess.check_output(["nbdinfo", "--size", uri], timeout=PATIENCE)) == SIZE


def test_strings_of_nbd() -> None:
    nbd.check_string("", "it")
    nbd.check_string("é" * 2048, "it")
    with pytest.raises(CowferryError, match="it has 4098 bytes; 4096 are allowed"):
        nbd.check_string("é" * 2049, "it")


# Signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE])
def test_a_daemon_survives_signals_that_mean_nothing_to_it(tmp_path: Path, number: int) -> None:
    make_base(tmp_path, SIZE)
    with program(tmp_path / "run", f"{tmp_path}/base.raw") as (child, line):
        uri = line().split(": ", 1)[1].strip()
        for _ in range(3):
            child.send_signal(number)
            with NbdClient(uri) as client:
                client.pread(512, 0)
        assert child.poll() is None


@pytest.mark.parametrize("number", ["HUP", "ALRM", "PWR"])
def test_signals_that_would_kill_end_a_daemon_cleanly(tmp_path: Path, number: str) -> None:
    make_base(tmp_path, SIZE)
    with program(tmp_path / "run", f"{tmp_path}/base.raw") as (child, line):
        line()
        child.send_signal(signal.Signals[f"SIG{number}"])
        assert child.wait(PATIENCE) == 0


def test_SIGHUP_that_is_ignored_from_the_beginning_does_not_end_a_daemon(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    command = [sys.executable, "-m", "cowferry", "serve", f"{tmp_path}/base.raw"]
    run = environment(tmp_path / "run")
    with subprocess.Popen(["nohup", *command], stdout=subprocess.PIPE, env=run, text=True) as child:
        assert child.stdout is not None
        try:
            uri = child.stdout.readline().split(": ", 1)[1].strip()
            child.send_signal(signal.SIGHUP)
            with NbdClient(uri) as client:
                client.pread(512, 0)
            assert child.poll() is None
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE) == 0


def test_SIGUSR1_has_a_verb_that_waits_tell_its_progress(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    run = tmp_path / "run"
    run.mkdir()
    with a_daemon(run / "qmp.sock") as daemon:
        daemon.open_disk("vm", str(tmp_path / "base.raw"))
        command = [sys.executable, "-m", "cowferry", "backup", "vm", f"{tmp_path}/b.raw"]
        with subprocess.Popen(
            [*command, "--speed", "64K"], env=environment(run), stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stderr is not None
            said: list[str] = []
            reader = threading.Thread(target=said.extend, args=(child.stderr,))
            reader.start()
            started(daemon)
            deadline = time.monotonic() + PATIENCE
            while not any("backup vm: running" in line for line in said):
                assert child.poll() is None and time.monotonic() < deadline, said
                child.send_signal(signal.SIGUSR1)
                time.sleep(0.02)
            assert "% of 1 MiB" in said[-1]
            child.send_signal(signal.SIGUSR2)
            daemon.jobs.all()[0].set_speed(0)
            assert child.wait(PATIENCE) == 0
            reader.join(PATIENCE)


def started(daemon: Daemon) -> None:
    deadline = time.monotonic() + PATIENCE
    while not daemon.jobs.all():
        assert time.monotonic() < deadline
        time.sleep(0.01)
