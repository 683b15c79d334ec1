"""Snapshots that freeze their guests: with agents that behave, and with every kind that does not.

The agent here speaks the protocol over a real socket and can be told to misbehave at one command;
`test_guest_snapshot.py` has the real one in a real guest. The rule throughout: whatever comes, a
guest that was told to freeze is told to thaw, and disks are switched all or not at all (S4).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from chains import contents, differs, make_base, overlay
from cowferry.cli.client import Client
from cowferry.daemon import Daemon
from cowferry.errors import CowferryError, DeviceInUse
from cowferry.operations import quiesce
from cowferry.wire import qga
from daemons import PATIENCE, a_daemon, program

SIZE = 1 << 20
HANG_UP = None
HANGS = b""  # says nothing more until it is asked to sync again
GREETING = [qga.SYNC, qga.STATUS]
FROZEN = [*GREETING, qga.FREEZE, qga.STATUS]
WHOLE = [*FROZEN, qga.SYNC, qga.THAW, qga.STATUS]

Odd = Callable[[], bytes | None]


def answer(value: Any) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


def refusal(text: str) -> bytes:
    return json.dumps({"error": {"class": "GenericError", "desc": text}}).encode() + b"\n"


def says(data: bytes | None) -> Odd:
    """An odd way to answer: with these bytes, by hanging, or by hanging up."""
    return lambda: data


class Agent:
    """A guest agent with its guest's state. `odd` says what it does instead at a command."""

    def __init__(self, path: Path, first: bytes = b"") -> None:
        self.path = str(path)
        self.odd: dict[str, Odd] = {}
        self.heard: list[str] = []
        self.frozen = 0  # file systems
        self.changed = threading.Condition()  # guards `heard` and `gone`
        self.stuck = False
        self.gone = 0  # clients that have hung up, or were hung up on
        self.first = first  # what a client finds on the line
        self.line: socket.socket | None = None
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def never_answers(self, command: str) -> None:
        """The daemon's deadline passes when it waits for that."""
        Deadline.never.add(f"guest agent '{self.path}' did not answer {command}")

    def _serve(self) -> None:
        """One client at a time, as QEMU's socket does."""
        while True:
            try:
                self.line, _ = self.listener.accept()
            except OSError:
                return
            with self.line:
                self._talk(self.line)
            with self.changed:
                self.gone += 1
                self.changed.notify_all()

    def _talk(self, line: socket.socket) -> None:
        try:
            line.sendall(self.first)
            with line.makefile("rb") as lines:
                for text in lines:
                    request = json.loads(text.replace(qga.SENTINEL, b""))
                    said = self._one(request["execute"], request.get("arguments", {}))
                    if said is HANG_UP:
                        return
                    line.sendall(said)
        except OSError:
            return

    def _one(self, name: str, arguments: dict[str, Any]) -> bytes | None:
        with self.changed:
            self.heard.append(name)
            self.changed.notify_all()
        if self.stuck and name != qga.SYNC:
            return b""
        odd = self.odd.get(name)
        said = odd() if odd is not None else self.usual(name, arguments)
        self.stuck = said == HANGS
        return said

    def usual(self, name: str, arguments: dict[str, Any] | None = None) -> bytes:
        """What an agent in order does and says."""
        if name == qga.SYNC:
            return qga.SENTINEL + answer((arguments or {})["id"])
        if name == qga.STATUS:
            return answer("frozen" if self.frozen else "thawed")
        if name == qga.FREEZE:
            self.frozen = 2
            return answer(2)
        assert name == qga.THAW
        was, self.frozen = self.frozen, 0
        return answer(was)

    def wait(self, name: str, times: int = 1) -> None:
        """Until a command has come in that often."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.heard.count(name) >= times, PATIENCE), name

    def wait_gone(self) -> None:
        """Until a client is gone."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.gone, PATIENCE)

    def close(self) -> None:
        """The guest is gone."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        if self.line is not None and self.line.fileno() >= 0:
            self.line.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE)


class Deadline(quiesce.Until):
    """It has passed as soon as somebody waits for what never comes, and not before: how quick this
    machine is does not matter."""

    never: ClassVar[set[str]] = set()  # what is missing, in the words of the error; once each

    def wait(self, missing: str, hint: str) -> float:
        if missing in self.never:
            self.never.remove(missing)
            self.moment = time.monotonic()
        return super().wait(missing, hint)


class World:
    """A daemon with two disks, `vm` and `data`, a folder, and agents."""

    def __init__(self, daemon: Daemon, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.daemon = daemon
        self.folder = folder
        self.pool = pool
        self.agents: list[Agent] = []
        self.oracle = make_base(folder, SIZE)
        for name in ("vm", "data"):
            overlay(folder, f"{name}.qcow2", "base.raw", "raw", SIZE)
            daemon.open_disk(name, str(folder / f"{name}.qcow2"))
        self.files = sorted(os.listdir(folder))

    def agent(self, name: str = "agent", **kwargs: Any) -> Agent:
        made = Agent(self.folder / name, **kwargs)
        self.agents.append(made)
        self.files = sorted([*self.files, name])
        return made

    def snapshot(self, *agents: Agent, timeout: float = PATIENCE, **more: Any) -> Any:
        arguments = {
            "disks": [{"device": "vm"}, {"device": "data"}],
            "quiesce": [a.path for a in agents],
            "quiesce-timeout": timeout,
            **more,
        }
        return self.daemon.execute("x-disk-snapshot", arguments)

    def begin(self, *agents: Agent, timeout: float = PATIENCE) -> Future[Any]:
        """The same, in a thread."""
        return self.pool.submit(self.snapshot, *agents, timeout=timeout)

    def tops(self) -> list[str]:
        """The names of the images that the disks are on."""
        return [os.path.basename(self.daemon.graph.disk(d).root.filename) for d in ("vm", "data")]

    def check_untouched(self) -> None:
        """Everything is as it was before, and can be used."""
        assert self.tops() == ["vm.qcow2", "data.qcow2"]
        assert sorted(os.listdir(self.folder)) == self.files, "something was left behind"
        assert not self.daemon.graph.claims
        for name in ("vm", "data"):
            disk = self.daemon.graph.disk(name)
            disk.pwrite(memoryview(b"w" * 512), 4096)  # its image can still be written
            disk.pwrite(memoryview(self.oracle[4096:4608]), 4096)
            assert not differs(contents(disk), self.oracle)
        self.snapshot()
        assert self.tops() == ["vm.snap1.qcow2", "data.snap1.qcow2"]

    def check_switched(self) -> None:
        """All disks are on their snapshots, and read as before."""
        assert self.tops() == ["vm.snap1.qcow2", "data.snap1.qcow2"]
        assert not self.daemon.graph.claims
        for name in ("vm", "data"):
            assert not differs(contents(self.daemon.graph.disk(name)), self.oracle)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    folder = tmp_path / "w"
    folder.mkdir()
    Deadline.never.clear()
    monkeypatch.setattr(quiesce, "Until", Deadline)
    with ThreadPoolExecutor() as pool, a_daemon(tmp_path / "qmp.sock") as daemon:
        made = World(daemon, folder, pool)
        try:
            yield made
        finally:
            for agent in made.agents:
                agent.close()


@contextmanager
def refused() -> Iterator[list[CowferryError]]:
    """What is done inside is refused; the error is put into the list."""
    kept: list[CowferryError] = []
    with pytest.raises(CowferryError) as caught:
        yield kept
    kept.append(caught.value)
    assert "\n" not in caught.value.desc


# Guests that behave -------------------------------------------------------------------------------


def test_S4_the_disks_are_switched_while_the_guest_is_frozen_and_only_then(world: World) -> None:
    agent = world.agent()
    seen: list[tuple[str, list[str], list[bool]]] = []

    def look(name: str) -> Odd:
        def odd() -> bytes:
            made = [(world.folder / f"{d}.snap1.qcow2").exists() for d in ("vm", "data")]
            seen.append((name, world.tops(), made))
            return agent.usual(name)

        return odd

    agent.odd = {qga.FREEZE: look(qga.FREEZE), qga.THAW: look(qga.THAW)}
    taken = world.snapshot(agent)
    assert agent.heard == WHOLE and not agent.frozen
    assert seen == [
        # The overlays are there already: the guest does not stand still for their making.
        (qga.FREEZE, ["vm.qcow2", "data.qcow2"], [True, True]),
        (qga.THAW, ["vm.snap1.qcow2", "data.snap1.qcow2"], [True, True]),
    ]
    assert taken["filesystems"] == 2 and taken["frozen-seconds"] > 0
    nodes = [world.daemon.graph.disk(d).root.name for d in ("vm", "data")]
    assert taken["disks"] == [
        {"device": d, "snapshot-file": str(world.folder / f"{d}.snap1.qcow2"), "node-name": n}
        for d, n in zip(("vm", "data"), nodes, strict=True)
    ]
    world.check_switched()


def test_S4_all_guests_are_frozen_before_the_switch_and_thawed_after(world: World) -> None:
    agents = [world.agent("one"), world.agent("two")]
    frozen: list[list[int]] = []

    def thaw(agent: Agent) -> Odd:
        def odd() -> bytes:
            frozen.append([a.frozen for a in agents])
            assert world.tops() == ["vm.snap1.qcow2", "data.snap1.qcow2"]
            return agent.usual(qga.THAW)

        return odd

    agents[0].odd[qga.THAW] = thaw(agents[0])
    together = threading.Barrier(2)

    def freeze(agent: Agent) -> Odd:
        def odd() -> bytes:
            together.wait(PATIENCE)  # neither answers before the other has been asked
            return agent.usual(qga.FREEZE)

        return odd

    for agent in agents:
        agent.odd[qga.FREEZE] = freeze(agent)
    assert world.snapshot(*agents)["filesystems"] == 4
    assert [a.heard for a in agents] == [WHOLE, WHOLE]
    assert frozen[0][0] == 2 and not any(a.frozen for a in agents)
    world.check_switched()


def test_what_an_agent_still_had_to_say_to_somebody_else_is_skipped(world: World) -> None:
    stale = b'"half": 1}\n' + answer("frozen") + qga.SENTINEL + answer(7) + refusal("old") + b'{"re'
    agent = world.agent(first=stale)
    assert world.snapshot(agent)["filesystems"] == 2
    assert agent.heard == WHOLE
    world.check_switched()


def test_answers_that_come_byte_by_byte(world: World) -> None:
    codec = qga.Answers()
    number = json.loads(codec.sync()[1:])["arguments"]["id"]
    stream = b"x\xff" + answer(number - 1) + b"\xff" + answer(number) + answer(2) + refusal("no")
    got = [a for n in range(len(stream)) for a in codec.feed(stream[n : n + 1])]
    assert got == [qga.Answer(2), qga.Answer(None, "no")]


def test_without_an_agent_nothing_is_frozen(world: World) -> None:
    taken = world.snapshot()
    assert taken["filesystems"] == 0 and "frozen-seconds" not in taken
    world.check_switched()


def test_names_are_counted_up_beside_the_image(world: World) -> None:
    def top() -> str:
        disks = [{"device": "vm"}]
        taken = world.daemon.execute("x-disk-snapshot", {"disks": disks})["disks"][0]
        return str(Path(taken["snapshot-file"]).relative_to(world.folder))

    assert [top(), top()] == ["vm.snap1.qcow2", "vm.snap2.qcow2"]
    (world.folder / "vm.snap3.qcow2").write_bytes(b"somebody's")
    assert top() == "vm.snap4.qcow2"
    assert (world.folder / "vm.snap3.qcow2").read_bytes() == b"somebody's"
    given = {"device": "vm", "snapshot-file": str(world.folder / "x.qcow2"), "node-name": "mine"}
    taken = world.daemon.execute("x-disk-snapshot", {"disks": [given]})["disks"][0]
    assert taken["node-name"] == "mine" and top() == "x.snap1.qcow2"


# Guests that do not -------------------------------------------------------------------------------

# The command at which the agent is odd and what it says then; the error; whether it was to freeze.
ODDITIES: dict[str, tuple[str, bytes | None, str, bool]] = {
    "never answers": (qga.SYNC, HANGS, "did not answer guest-sync-delimited within", False),
    "never syncs": (qga.SYNC, b"hello\n\xff" * 9, "did not answer guest-sync-delimited", False),
    "never stops": (qga.SYNC, b"\xff" + b"x" * 200000, "more than 65536 bytes", False),
    "hangs up at once": (qga.SYNC, HANG_UP, "has hung up", False),
    "no agent": (qga.STATUS, b"\0\1\2\n", "no JSON object: ???", False),
    "refuses": (
        qga.STATUS,
        refusal("not\nallowed"),
        "refuses guest-fsfreeze-status: not?all",
        False,
    ),
    "is frozen": (qga.STATUS, answer("frozen"), "is frozen already", False),
    "freezes nothing": (qga.FREEZE, answer(0), "froze no file system", True),
    "cannot freeze": (qga.FREEZE, refusal("/b: EIO"), "guest-fsfreeze-freeze: /b: EIO", True),
    "hangs": (qga.FREEZE, HANGS, "did not answer guest-fsfreeze-freeze within", True),
    "dies": (qga.FREEZE, HANG_UP, "has hung up", True),
    "raves": (qga.FREEZE, b'{"return": [1}\n', "no JSON object", True),
    "is no answer": (qga.FREEZE, b'{"event": "x"}\n', "no answer", True),
    "no number": (qga.FREEZE, answer("two"), "which is no number", True),
    "no end": (qga.FREEZE, b"[" * 200000, "more than 65536 bytes", True),
}


@pytest.mark.parametrize("what", list(ODDITIES))
def test_S4_an_agent_that_misbehaves_changes_nothing_and_is_thawed(world: World, what: str) -> None:
    command, said, text, frozen = ODDITIES[what]
    agent, sound = world.agent(), world.agent("sound")
    agent.odd[command] = says(said)
    if "within" in text or what == "never syncs":
        agent.never_answers(command)
    with refused() as error:
        world.snapshot(sound, agent)
    assert text in error[0].desc and f"guest agent '{agent.path}'" in error[0].desc
    assert "no disk was switched" in error[0].hint
    for a in (agent, sound):
        assert (qga.FREEZE in a.heard) == (qga.THAW in a.heard) == frozen
        if frozen:
            assert f"the guest of '{a.path}' is thawed" in error[0].hint
    assert not agent.frozen and not sound.frozen
    if not frozen:
        assert "no guest was frozen" in error[0].hint
    agent.wait_gone()
    world.check_untouched()


def test_S4_a_guest_that_is_only_partly_frozen_is_thawed(world: World) -> None:
    agent = world.agent()

    def freeze() -> bytes:
        agent.frozen = 1
        return refusal("failed to freeze /c")

    agent.odd[qga.FREEZE] = freeze
    with refused() as error:
        world.snapshot(agent)
    assert "failed to freeze /c" in error[0].desc and "is thawed" in error[0].hint
    assert agent.heard == [*FROZEN, qga.SYNC, qga.THAW, qga.STATUS] and not agent.frozen
    world.check_untouched()


def test_S4_a_guest_that_says_it_is_not_frozen_after_all(world: World) -> None:
    agent = world.agent()
    agent.odd[qga.FREEZE] = says(answer(2))  # and its status stays "thawed"
    with refused() as error:
        world.snapshot(agent)
    assert "froze 2 file systems, then said 'thawed'" in error[0].desc
    assert qga.THAW in agent.heard
    world.check_untouched()


def test_a_socket_that_is_not_there_or_is_none(world: World) -> None:
    for path in (world.folder / "nobody", world.folder / "base.raw", Path("/" + "x" * 200)):
        with refused() as error:
            world.snapshot(quiesce=[str(path)])
        assert f"cannot reach guest agent '{path}'" in error[0].desc
        assert "no guest was frozen" in error[0].hint
    world.check_untouched()


def test_a_disk_that_cannot_be_snapshotted_freezes_nobody(world: World) -> None:
    agent = world.agent()
    disks = [{"device": "vm"}, {"device": "data", "snapshot-file": str(world.folder / "vm.qcow2")}]
    with refused() as error:
        world.snapshot(agent, disks=disks)
    assert "vm.qcow2' exists" in error[0].desc and "no guest was frozen" in error[0].hint
    assert agent.heard == GREETING
    world.check_untouched()


@pytest.mark.parametrize("reconnects", [True, False])
def test_S4_a_guest_that_dies_at_the_thaw(world: World, reconnects: bool) -> None:
    agent = world.agent()
    deaths = 1 if reconnects else 2

    def thaw() -> bytes | None:
        died = agent.heard.count(qga.THAW) <= deaths
        return HANG_UP if died else agent.usual(qga.THAW)

    agent.odd[qga.THAW] = thaw
    if reconnects:
        assert world.snapshot(agent)["filesystems"] == 2
    else:
        with refused() as error:
            world.snapshot(agent)
        assert "the snapshot was taken, but" in error[0].desc
    assert agent.heard.count(qga.THAW) == 2
    world.check_switched()


@pytest.mark.parametrize(
    ("command", "said", "desc", "hint"),
    [
        (qga.THAW, refusal("EBUSY"), "refuses guest-fsfreeze-thaw: EBUSY", "if the guest hangs"),
        (qga.THAW, answer(1), "froze 2 file systems and found 1 of them", "after a power cut"),
        (qga.THAW, b"\n\n?\n", "sent what is no JSON object", "the snapshot stands"),
    ],
)
def test_a_snapshot_stands_if_the_thaw_fails_and_both_are_said(
    world: World, command: str, said: bytes, desc: str, hint: str
) -> None:
    agent = world.agent()

    def odd() -> bytes:
        agent.usual(command)
        return said

    agent.odd[command] = odd
    with refused() as error:
        world.snapshot(agent)
    assert error[0].desc.startswith("the snapshot was taken, but") and desc in error[0].desc
    assert "the snapshot stands" in error[0].hint and hint in error[0].hint
    assert agent.path in error[0].desc
    world.check_switched()


def test_a_thaw_that_is_not_answered_in_time_is_waited_for_on_the_line(world: World) -> None:
    """An agent may hang at an answer that nobody takes: so nobody hangs up on it."""
    agent = world.agent()
    agent.odd[qga.FREEZE] = says(HANGS)
    agent.odd[qga.THAW] = says(HANGS)
    agent.never_answers(qga.FREEZE)
    agent.never_answers(qga.THAW)
    with refused() as error:
        world.snapshot(agent)
    assert f"did not answer guest-fsfreeze-freeze within {PATIENCE:g} s" in error[0].desc
    assert "guest-fsfreeze-thaw was sent, but" in error[0].hint
    assert "if the guest hangs" in error[0].hint
    assert agent.line is not None and not agent.gone
    agent.line.sendall(answer(2) + answer("thawed"))
    agent.wait_gone()
    world.check_untouched()


# The deadline, and everybody else -----------------------------------------------------------------


def hold(agent: Agent, name: str, until: threading.Event) -> None:
    """The agent answers a command when the event comes."""

    def odd() -> bytes:
        assert until.wait(PATIENCE)
        return agent.usual(name)

    agent.odd[name] = odd


def test_others_are_served_while_an_agent_hangs(world: World, tmp_path: Path) -> None:
    agent, go = world.agent(), threading.Event()
    hold(agent, qga.FREEZE, go)
    pending = world.begin(agent)
    agent.wait(qga.FREEZE)
    with Client(str(tmp_path / "qmp.sock")) as client:
        listed = client.call("query-block")
        assert {d["device"] for d in listed} >= {"vm", "data"}
        options = {"driver": "file", "filename": str(world.folder / "base.raw"), "read-only": True}
        client.execute("blockdev-add", {"node-name": "other", **options})
        # The guest writes everything back while it is being frozen.
        disk = world.daemon.graph.disk("vm")
        disk.pwrite(memoryview(b"s" * 4096), 8192)
        disk.flush()
        world.oracle[8192 : 8192 + 4096] = b"s" * 4096
        for refuse in ("block-stream", "blockdev-snapshot-sync"):
            more = {"snapshot-file": str(world.folder / "y")} if "snap" in refuse else {}
            with pytest.raises(DeviceInUse, match="snapshot"):
                world.daemon.execute(refuse, {"device": "vm", **more})
    assert not pending.done() and world.tops() == ["vm.qcow2", "data.qcow2"]
    go.set()
    assert pending.result(PATIENCE)["filesystems"] == 2
    assert world.tops() == ["vm.snap1.qcow2", "data.snap1.qcow2"]
    assert not differs(contents(world.daemon.graph.disk("vm")), world.oracle)


def test_D2_a_drain_that_outlasts_the_deadline_thaws_and_switches_nothing(world: World) -> None:
    agent = world.agent()
    with world.daemon.graph.disk("data").shared(0, 512):  # a request that hangs
        pending = world.begin(agent, timeout=2)
        agent.wait(qga.THAW)  # by the watchdog: the drain still waits
        assert not pending.done()
    with refused() as error:
        pending.result(PATIENCE)
    assert "could not be switched within 2 s" in error[0].desc
    assert "is thawed" in error[0].hint and agent.heard == WHOLE
    world.check_untouched()


def test_D2_a_busy_daemon_does_not_keep_a_guest_frozen(world: World) -> None:
    agent, go = world.agent(), threading.Event()
    hold(agent, qga.FREEZE, go)
    pending = world.begin(agent)
    agent.wait(qga.FREEZE)
    with world.daemon.turn():  # another command has its turn
        go.set()
        pending.result(PATIENCE)
    assert agent.heard == WHOLE


def test_an_operation_that_fails_under_the_drain_thaws(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the last moment: here the record of the move cannot be written."""
    agent = world.agent()

    def full() -> bytes:
        # Where the record is to be renamed to there is a folder with something in it.
        (world.folder / "vm.qcow2.moved" / "x").mkdir(parents=True)
        return agent.usual(qga.FREEZE)

    agent.odd[qga.FREEZE] = full
    with refused() as error:
        world.snapshot(agent)
    assert "the snapshot failed" in error[0].desc
    assert "every disk is as it was" in error[0].hint and "is thawed" in error[0].hint
    assert agent.heard == WHOLE and world.tops() == ["vm.qcow2", "data.qcow2"]


@pytest.mark.parametrize("at", [qga.STATUS, qga.FREEZE])
def test_a_daemon_that_ends_thaws_its_guests_first(tmp_path: Path, at: str) -> None:
    make_base(tmp_path, SIZE)
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    agent = Agent(tmp_path / "agent")
    # It freezes, and does not say so (or does not say anything from the start).
    agent.odd[at] = lambda: HANGS if agent.usual(at) else None
    with program(tmp_path / "run", str(tmp_path / "vm.qcow2")) as (child, read_line):
        read_line()
        with Client(str(tmp_path / "run" / "qmp.sock")) as client:
            request = {"disks": [{"device": "vm"}], "quiesce": [agent.path], "quiesce-timeout": 600}
            message = {"execute": "x-disk-snapshot", "arguments": request}
            client.sock.sendall(json.dumps(message).encode())
            agent.wait(at)
            child.send_signal(signal.SIGTERM)
            with pytest.raises(CowferryError, match="the daemon is stopping"):
                client.execute("query-status", {})  # the first answer is to the first command
        assert child.wait(PATIENCE) == 0
    assert (qga.THAW in agent.heard) == (at == qga.FREEZE) and not agent.frozen
    assert not (tmp_path / "vm.snap1.qcow2").exists()
    assert not (tmp_path / "vm.qcow2.moved").exists()
    agent.close()


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"disks": []}, "names no disk"),
        ({"disks": [{"device": "vm"}, {"device": "vm"}]}, "'vm' is named twice"),
        ({"disks": [{"device": "nope"}]}, "Device 'nope' not found"),
        ({"disks": [{"device": "vm", "mode": "existing"}]}, "'snapshot-file' is missing"),
        ({"disks": [{"device": "vm", "format": "raw"}]}, "does not support backing files"),
        ({"quiesce": ["/a", "/b/../a"]}, "'/a' is named twice"),
        ({"quiesce-timeout": 0}, "'quiesce-timeout' does not accept value 0"),
        ({"quiesce-timeout": -1.5}, "'quiesce-timeout' does not accept value -1.5"),
        ({"quiesce-timeout": float("nan")}, "'quiesce-timeout' does not accept value nan"),
        ({"quiesce-timeout": 1e9}, "'quiesce-timeout' does not accept value 1e+09"),
        ({"quiesce-timeout": "1"}, "Invalid parameter type for 'quiesce-timeout'"),
    ],
)
def test_arguments_that_make_no_sense(world: World, given: dict[str, Any], text: str) -> None:
    with refused() as error:
        world.snapshot(**given)
    assert text in error[0].desc
    world.check_untouched()


def test_an_image_that_is_no_plain_file_needs_a_name(world: World) -> None:
    with open(world.folder / "base.raw", "rb") as f:
        world.daemon.execute(
            "blockdev-add",
            {"driver": "raw", "node-name": "odd", "read-only": True,
             "file": {"driver": "file", "filename": f"/dev/fd/{f.fileno()}", "read-only": True}},
        )  # fmt: skip
        with refused() as error:
            world.daemon.execute("x-disk-snapshot", {"disks": [{"device": "odd"}]})
        assert "no plain file to put a snapshot beside" in error[0].desc
        world.daemon.execute("blockdev-del", {"node-name": "odd"})
    world.check_untouched()
