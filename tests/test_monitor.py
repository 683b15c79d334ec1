"""The monitors as clients meet them: qemu.qmp, socat, malformed input, the words of 2011."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains import contents, differs
from cowferry.cli.client import Client as OurClient
from cowferry.cli.client import QmpError
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.monitor import hmp
from cowferry.monitor import qmp as monitors
from cowferry.wire import qmp
from daemons import Told, a_daemon, chain_of
from nbd_servers import until
from tests_support import need
from tracking import Tracker

SIZE = 4 << 20


class Client:
    """A raw socket: what is sent is exactly what the test says."""

    def __init__(self, path: Path, negotiate: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("r")
        self.greeting = json.loads(self.lines.readline())
        self.events: list[dict[str, Any]] = []
        if negotiate:
            assert self.ask('{"execute": "qmp_capabilities"}') == {"return": {}}

    def ask(self, text: str) -> dict[str, Any]:
        """Send bytes as they are; the next answer."""
        self.sock.sendall(text.encode())
        return self.answer()

    def answer(self) -> dict[str, Any]:
        while True:
            found: dict[str, Any] = json.loads(self.lines.readline())
            if "event" not in found:
                return found
            self.events.append(found)

    def run(self, command: str, **arguments: Any) -> Any:
        """Run a command; its result, or (class, text) of its error."""
        found = self.ask(json.dumps({"execute": command, "arguments": arguments}))
        if "error" in found:
            return found["error"]["class"], found["error"]["desc"]
        return found["return"]

    def until(self, event: str) -> dict[str, Any]:
        while True:
            for n, e in enumerate(self.events):
                if e["event"] == event:
                    del self.events[: n + 1]
                    return e
            self.events.append(json.loads(self.lines.readline()))

    def close(self) -> None:
        self.sock.close()


@contextmanager
def scene(folder: Path, *names: str) -> Iterator[tuple[Daemon, Client, bytearray]]:
    """A daemon with disks over one base, and a client."""
    oracle = bytearray()
    for name in names:
        oracle = chain_of(folder, name, SIZE)
    with a_daemon(folder / "qmp.sock") as daemon:
        for name in names:
            daemon.open_disk(name, str(folder / f"{name}.qcow2"))
        client = Client(folder / "qmp.sock")
        yield daemon, client, oracle
        client.close()


# Wire --------------------------------------------------------------------------------------

MESSAGES = [
    {"execute": "query-jobs"},
    {"execute": "x", "arguments": {"a": "}{\"\\ ' [", "b": [1, {"c": []}]}, "id": "é"},
    {"execute": "y", "id": {"deep": [[[]]]}},
]


@given(
    cuts=st.lists(st.integers(0, 400), max_size=12), newline=st.sampled_from(["", "\n", " \r\n"])
)
def test_a_stream_is_cut_into_objects_wherever_it_was_split(cuts: list[int], newline: str) -> None:
    text = newline.join(json.dumps(m, ensure_ascii=False) for m in MESSAGES).encode()
    splitter = qmp.Splitter()
    out: list[bytes | qmp.ParseError] = []
    last = 0
    for cut in sorted(min(c, len(text)) for c in cuts):
        out += splitter.feed(text[last:cut])
        last = cut
    out += splitter.feed(text[last:])
    assert [qmp.parse(t) for t in out if isinstance(t, bytes)] == MESSAGES


@given(st.binary(max_size=300))
def test_garbage_never_breaks_the_splitter(data: bytes) -> None:
    splitter = qmp.Splitter()
    for text in splitter.feed(data + b'"\n}\n'):
        if isinstance(text, bytes):
            with suppress(CowferryError):
                qmp.parse(text)
    assert len(splitter._text) <= qmp.MAX_MESSAGE


def test_single_quotes_and_limits() -> None:
    assert qmp.parse(b"{'execute': 'it\\'s \"so\"'}") == {"execute": 'it\'s "so"'}
    for bad in (b'{"a": ' + b"9" * 5000 + b"}", b'{"a": tru}', b'{"a" 1}', b'{"a": "\xff"}'):
        with pytest.raises(qmp.ParseError, match="JSON parse error"):
            qmp.parse(bad)
    splitter = qmp.Splitter()
    deep = splitter.feed(b'{"a":' * 100)
    assert any(isinstance(t, qmp.ParseError) for t in deep)
    long = qmp.Splitter().feed(b'{"a": "' + b"x" * (qmp.MAX_MESSAGE + 10))
    assert any(isinstance(t, qmp.ParseError) for t in long)


@given(
    st.lists(
        st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b"\n", b" ", b",", b"a", b"1"]),
        max_size=60,
    ).map(b"".join),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_a_stream_means_the_same_however_it_is_cut(text: bytes, cuts: list[int]) -> None:
    def told(parts: list[bytes]) -> list[str]:
        splitter = qmp.Splitter(most=20, deepest=3)
        return [str(t) for part in parts for t in splitter.feed(part)]

    places = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert told([text]) == told(pieces) == told([bytes([b]) for b in text])


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_a_client_may_send_64_levels_and_read_many_more() -> None:
    server, client = qmp.Splitter(), qmp.Splitter(qmp.MAX_ANSWER, qmp.MAX_ANSWER_DEPTH)
    assert server.feed(nested(64)) == client.feed(nested(64)) == [nested(64)]
    assert isinstance(server.feed(nested(65))[0], qmp.ParseError)
    assert client.feed(nested(qmp.MAX_ANSWER_DEPTH)) == [nested(qmp.MAX_ANSWER_DEPTH)]
    assert isinstance(client.feed(nested(qmp.MAX_ANSWER_DEPTH + 1))[0], qmp.ParseError)
    long = b'{"a": "' + b"x" * qmp.MAX_MESSAGE + b'"}'
    assert client.feed(b"\n" + long) == [long]


DEEP = 1100  # a chain has 1024 levels at most


def test_the_deepest_answer_is_made_and_read_by_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "s"
    deep: dict[str, Any] = {}
    for _ in range(DEEP):
        deep = {"a": deep}
    before = sys.getrecursionlimit()

    def serve(sock: socket.socket) -> None:
        with sock.accept()[0] as peer:
            peer.sendall(qmp.greeting({}))
            for answer in ({}, deep):
                number = json.loads(peer.makefile().readline())["id"]
                peer.sendall(qmp.result(answer, number))

    sys.setrecursionlimit(qmp.RECURSION)  # as the daemon has it
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            sock.listen()
            thread = threading.Thread(target=serve, args=(sock,))
            thread.start()
            command = [sys.executable, "-m", "cowferry", "qmp", "-c", str(path), "query-block"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            thread.join(60)
    finally:
        sys.setrecursionlimit(before)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count('"a"') == DEEP


def test_the_chain_of_a_disk_is_told_however_long_it_is(tmp_path: Path) -> None:
    size = 1 << 20
    opening.create_image(str(tmp_path / "0.qcow2"), "qcow2", size, {"cluster_size": "512"})
    for n in range(1, 120):
        below = {"backing_file": f"{n - 1}.qcow2", "backing_fmt": "qcow2", "cluster_size": "512"}
        opening.create_image(str(tmp_path / f"{n}.qcow2"), "qcow2", size, below)
    with a_daemon(tmp_path / "s") as daemon:
        daemon.open_disk("vm", str(tmp_path / "119.qcow2"))
        with OurClient(str(tmp_path / "s")) as client:
            inserted = client.call("query-block")[0]["inserted"]
            named = client.call("query-named-block-nodes", flat=True)
        assert inserted["backing_file_depth"] == 119
        assert len(named) == 240 and not any("backing-image" in n["image"] for n in named)
        image, depth = inserted["image"], 1
        while "backing-image" in image:
            image, depth = image["backing-image"], depth + 1
        assert depth == 120 and image["filename"].endswith("/0.qcow2")


def test_an_answer_that_cannot_be_told_is_an_error_and_the_session_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_daemon(tmp_path / "s") as daemon, OurClient(str(tmp_path / "s")) as client:
        deep: dict[str, Any] = {}
        for _ in range(50_000):
            deep = {"a": deep}
        with monkeypatch.context() as patch:
            patch.setattr(daemon, "execute", lambda name, arguments: deep)
            with pytest.raises(QmpError, match="nested too deeply"):
                client.call("query-block")
        assert client.call("query-block") == []
        while deep:  # not by a recursion of the interpreter's
            deep = deep.popitem()[1]


# QMP ---------------------------------------------------------------------------------------


def test_negotiation_comes_first_and_only_once(tmp_path: Path) -> None:
    with a_daemon(tmp_path / "s"):
        client = Client(tmp_path / "s", negotiate=False)
        version = client.greeting["QMP"]["version"]
        assert set(version["qemu"]) == {"major", "minor", "micro"}
        assert client.greeting["QMP"]["capabilities"] == ["oob"]
        error = client.run("query-jobs")
        assert error[0] == "CommandNotFound"
        enable = '{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 7}'
        assert client.ask(enable) == {"return": {}, "id": 7}
        assert client.run("qmp_capabilities") == (
            "CommandNotFound", "Capabilities negotiation is already complete, command ignored",
        )  # fmt: skip
        assert client.ask('{"exec-oob": "query-jobs", "id": "o"}') == {"return": [], "id": "o"}
        client.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"execute": "nope"}', ("CommandNotFound", "The command nope has not been found")),
        ('{"execute": "query-jobs", "arguments": {"a": 1}}', "Parameter 'a' is unexpected"),
        ('{"execute": "job-pause"}', "Parameter 'id' is missing"),
        (
            '{"execute": "job-pause", "arguments": {"id": 3}}',
            "Invalid parameter type for 'id', expected: string",
        ),
        (
            '{"execute":"block-export-add","arguments":{"type":"foo","id":"e","node-name":"n"}}',
            "Parameter 'type' does not accept value 'foo'",
        ),
        ('{"execute": "query-jobs", "foo": 1}', "QMP input member 'foo' is unexpected"),
        ('{"arguments": {}}', "QMP input lacks member 'execute'"),
        ("bad\n", "JSON parse error, invalid keyword 'bad'"),
        ("7\n", "QMP input must be a JSON object"),
        ('{"execute": 7}', "QMP input member 'execute' must be a string"),
        ('{"execute": "job-cancel", "arguments": {"id": "x"}}', "Job not found"),
        (
            '{"execute": "block-job-cancel", "arguments": {"device": "zz"}}',
            ("DeviceNotActive", "Block job 'zz' not found"),
        ),
        (
            '{"execute": "block_stream_cancel", "arguments": {"device": "vm"}}',
            ("DeviceNotActive", "No active stream on device 'vm'"),
        ),
        (
            '{"execute": "block_stream", "arguments": {"device": "zz"}}',
            ("DeviceNotFound", "Device 'zz' not found"),
        ),
    ],
)
def test_mistakes_get_the_words_that_clients_know(tmp_path: Path, text: str, expected: Any) -> None:
    with scene(tmp_path, "vm") as (_, client, _oracle):
        error = client.ask(text)["error"]
        if isinstance(expected, str):
            expected = ("GenericError", expected)
        assert (error["class"], error["desc"]) == expected
        assert client.run("query-jobs") == [], "the connection goes on"


def test_the_conversation_of_2011(tmp_path: Path) -> None:
    with scene(tmp_path, "virtio0") as (daemon, client, oracle):
        other = Client(tmp_path / "qmp.sock")
        assert client.run("query-block-stream") == []
        assert client.run("block_stream", device="virtio0") == {}
        event = client.until("BLOCK_STREAM_COMPLETED")
        assert event["data"] == {"device": "virtio0", "len": SIZE, "offset": SIZE}
        assert set(event["timestamp"]) == {"seconds", "microseconds"}
        other.until("BLOCK_STREAM_COMPLETED")
        other.close()
        assert client.run("query-block-stream") == []
        disk = daemon.graph.disk("virtio0")
        assert disk.root.backing is None
        assert not differs(contents(disk), oracle)


def test_a_busy_disk_and_a_cancel_as_in_2011(tmp_path: Path) -> None:
    with scene(tmp_path, "vm") as (daemon, client, _):
        # a job that has begun and waits: paused at its first chunk by a tiny speed
        assert client.run("block-stream", device="vm", speed=1) == {}
        assert client.run("block_stream", device="vm")[0] == "DeviceInUse"
        (active,) = client.run("query-block-stream")
        assert active["device"] == "vm" and active["len"] == SIZE
        words = client.run("human-monitor-command", **{"command-line": "info block-stream"})
        assert words.startswith("Streaming device vm: Completed ")
        assert words.endswith(f" of {SIZE} bytes\n")
        assert client.run("block_stream_cancel", device="vm") == {}
        assert client.run("query-block-stream") == []
        assert daemon.graph.disk("vm").root.backing is not None
        raw = tmp_path / "plain.raw"
        raw.write_bytes(bytes(1 << 20))
        daemon.open_disk("plain", str(raw))
        assert client.run("block_stream", device="plain")[0] == "NotSupported"


def test_job_events_arrive_in_qemus_order(tmp_path: Path) -> None:
    with scene(tmp_path, "vm") as (_, client, _oracle):
        arguments = {"device": "vm", "job-id": "j", "auto-finalize": False, "auto-dismiss": False}
        assert client.run("block-stream", **arguments) == {}
        client.until("BLOCK_JOB_PENDING")
        assert client.run("query-jobs")[0]["status"] == "pending"
        assert client.run("job-complete", id="j") == (
            "GenericError", "Job 'j' in state 'pending' cannot accept command verb 'complete'",
        )  # fmt: skip
        client.events.clear()
        assert client.run("job-finalize", id="j") == {}
        seen = [client.until("BLOCK_JOB_COMPLETED")]
        assert seen[0]["data"]["type"] == "stream"
        status = client.until("JOB_STATUS_CHANGE")["data"]
        assert status == {"id": "j", "status": "concluded"}
        assert client.run("job-dismiss", id="j") == {}
        assert client.until("JOB_STATUS_CHANGE")["data"] == {"id": "j", "status": "null"}


def test_qemu_qmp_from_pypi_drives_a_stream(tmp_path: Path) -> None:
    from qemu.qmp import QMPClient

    with scene(tmp_path, "vm") as (daemon, _, oracle):

        async def converse() -> None:
            client = QMPClient("test")
            await client.connect(str(tmp_path / "qmp.sock"))
            listed: Any = await client.execute("query-commands")
            names = {c["name"] for c in listed}
            assert {"block-stream", "block_stream", "job-pause", "quit"} <= names
            with client.listener("BLOCK_JOB_COMPLETED") as listener:
                await client.execute("block-stream", {"device": "vm", "job-id": "s"})
                event: Any = await asyncio.wait_for(listener.get(), 30)
            assert event["data"]["device"] == "s" and "error" not in event["data"]
            await client.disconnect()

        asyncio.run(converse())
        assert not differs(contents(daemon.graph.disk("vm")), oracle)


def test_a_hand_written_socat_session(tmp_path: Path) -> None:
    need("socat")
    with scene(tmp_path, "vm"):
        done = subprocess.run(
            ["socat", "-t5", "-", f"UNIX-CONNECT:{tmp_path / 'qmp.sock'}"],
            input='{"execute":"qmp_capabilities"}{"execute":"query-version"}\n{"execute":"query-',
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines[1] == {"return": {}}
        assert "package" in lines[2]["return"]


def test_a_client_that_never_reads_stalls_nobody(tmp_path: Path) -> None:
    with scene(tmp_path, "vm") as (daemon, client, _):
        deaf = Client(tmp_path / "qmp.sock")
        for n in range(10_000):  # more than its queue and its socket take
            daemon.events.emit("JOB_STATUS_CHANGE", {"id": f"x{n}", "status": "running" * 10})
            if n % 500 == 0:
                client.run("query-jobs")
                client.events.clear()
        assert client.run("query-jobs") == []
        deaf.close()


def test_the_schema_describes_every_command(tmp_path: Path) -> None:
    with scene(tmp_path, "vm") as (_, client, _oracle):
        schema = client.run("query-qmp-schema")
        names = {e["name"]: e for e in schema}
        assert len(names) == len(schema)
        for command in client.run("query-commands"):
            entry = names[command["name"]]
            assert entry["meta-type"] == "command"
            assert names[entry["arg-type"]]["meta-type"] == "object"
            assert entry["ret-type"] in names
        for entry in schema:
            for member in entry.get("members", []):
                assert isinstance(member, dict) and member.get("type", "str") in names | {"str": 0}
        stream = names[names["block-stream"]["arg-type"]]
        optional = {m["name"]: "default" in m for m in stream["members"]}
        assert optional["device"] is False and optional["base-node"] is True


def test_a_client_that_asks_and_does_not_read_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(monkeypatch, [monitors.Session])
    with a_daemon(tmp_path / "s"), OurClient(str(tmp_path / "s")) as other:
        flood = Client(tmp_path / "s")
        one = b'{"execute": "query-qmp-schema"}\n'
        flood.sock.sendall(one)
        size = len(flood.lines.readline())
        flood.sock.settimeout(1)
        sent = 0
        with suppress(TimeoutError):
            while True:
                flood.sock.sendall(one)
                sent += 1
        assert sent * size > monitors.ROOM
        waiting = [s.out.bytes for s in tracker.alive(monitors.Session)]
        assert max(waiting) <= monitors.ROOM + size
        assert other.call("query-jobs") == []
        flood.sock.settimeout(30)
        for _ in range(20):
            assert len(flood.lines.readline()) == size
        flood.sock.close()
        flood.lines.close()
        until(lambda: len(tracker.alive(monitors.Session)) == 1)


def test_a_client_that_does_not_read_its_events_is_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(monkeypatch, [monitors.Session])
    with a_daemon(tmp_path / "s") as daemon:
        deaf = Client(tmp_path / "s")
        until(lambda: len(daemon.events.listeners) == 1)
        for _ in range(monitors.BACKLOG * 4):
            daemon.events.emit("JOB_STATUS_CHANGE", {"id": "j", "status": "x" * 100})
        until(lambda: not daemon.events.listeners)
        deaf.sock.settimeout(30)
        while deaf.sock.recv(1 << 20):
            pass
        deaf.sock.close()
        deaf.lines.close()
        until(lambda: not tracker.alive(monitors.Session))


# The human monitor -------------------------------------------------------------------------


def test_the_human_monitor_speaks_as_in_2011(tmp_path: Path) -> None:
    with scene(tmp_path, "ide0-hd") as (daemon, _, _oracle):
        told = Told(daemon)

        def say(line: str) -> str:
            return hmp.run_line(daemon, line)

        assert say("info block-stream") == "No active stream\n"
        assert say("info block-jobs") == "No active jobs\n"
        assert say("block_stream ide0-hd 1") == ""
        assert say("info block-stream").startswith("Streaming device ide0-hd: Completed ")
        assert say("info block-jobs").endswith("bytes, speed limit 1 bytes/s\n")
        assert say("block_job_set_speed ide0-hd 1G") == ""
        told.wait("BLOCK_STREAM_COMPLETED", device="ide0-hd")
        assert say("info block-stream") == "No active stream\n"
        assert say("block_stream -a ide0-hd") == ""
        told.wait("BLOCK_STREAM_COMPLETED", device="ide0-hd")
        assert "ide0-hd" in say("info block")
        assert say("nonsense") == "unknown command: 'nonsense'\n"
        assert say("block_stream") == (
            "Error: wrong number of arguments  (usage: block_stream [-a] DEVICE [SPEED [BASE]])\n"
        )
        assert say("block_stream nope").startswith("Error: Device 'nope' not found")
        assert "block_stream [-a] DEVICE" in say("help")
        assert say("") == ""


def test_the_human_monitor_on_its_socket(tmp_path: Path) -> None:
    with scene(tmp_path, "vm") as (daemon, _, _oracle):
        server = hmp.server(daemon)
        server.listen_unix(str(tmp_path / "hmp.sock"))
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(30)
                sock.connect(str(tmp_path / "hmp.sock"))
                sock.sendall(b"info block-stream\ninfo version\n")
                got = b""
                while got.count(b"(qemu) ") < 3:
                    got += sock.recv(4096)
            assert b"No active stream\r\n" in got and b"cowferry" in got
        finally:
            server.stop()
