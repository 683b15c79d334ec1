"""Guests that stand still for a snapshot: file systems frozen and thawed through guest agents.

One deadline covers everything from the first word to the switch. The order is the one in which a
guest is frozen for the shortest time, and never for ever:

    greet     every agent answers, and nobody else has frozen its guest
              (here the overlays are made and claimed)
    freeze    all guests at once; each says how many file systems, and that they are frozen
              (here the disks are switched, under one drain)
    thaw      all guests at once; each says that it is thawed

Once a freeze has been sent a thaw follows, whatever comes: after a refusal, after silence, after
the other end hung up, when the daemon ends. At the deadline a watchdog thaws even while a drain is
still waiting; the snapshot looks at the deadline inside that drain, so a guest that was thawed too
early is never taken for a frozen one.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from cowferry.errors import CowferryError
from cowferry.jobs.ending import Ending
from cowferry.wire import qga

log = logging.getLogger(__name__)

SLICE = 0.1  # seconds after which a wait looks whether it has been called off
THAW_LEAST, THAW_MOST = 1.0, 10.0  # seconds that a thaw may take, beyond the deadline
LAST = 5.0  # seconds more that the end of the daemon waits for a roll-back
LINGER = 600.0  # seconds that a line is kept open for the answer to a thaw
TIMEOUT_MOST = 3600.0

SILENT = (
    "is qemu-ga running in the guest? its socket serves one client at a time: "
    "does somebody else (libvirt) hold it?"
)
SLOW = "a busy guest takes long to write everything back: raise quiesce-timeout"
HANGS = (
    "if the guest hangs: send guest-fsfreeze-thaw again, or `fsfreeze --unfreeze` its mount points "
    "on its console"
)


class HungUp(CowferryError):
    """The other end of an agent's socket has closed it."""


class Until:
    """A moment up to which one waits, unless somebody calls it off."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.moment = time.monotonic() + seconds
        self.called_off = threading.Event()

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.moment - time.monotonic(), 0.0)

    def wait(self, missing: str, hint: str) -> float:
        """How long to wait before one asks again. Raises `CowferryError` when it is over."""
        if self.called_off.is_set():
            raise CowferryError("the daemon is stopping")
        left = self.left
        if left <= 0:
            raise CowferryError(f"{missing} within {self.seconds:g} s", hint)
        return min(left, SLICE)


class Agent:
    """One guest, by its agent's unix socket. All raise `CowferryError` that names the socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.freezing = False  # a freeze was sent: a thaw has to follow
        self.frozen = 0  # file systems
        self.trouble: CowferryError | None = None  # why it may not be thawed as it should be
        self._sock: socket.socket | None = None
        self._answers = qga.Answers()
        self._heard: deque[qga.Answer] = deque()
        self._asked: deque[str] = deque()  # what has been sent and is not answered

    def __str__(self) -> str:
        return f"guest agent '{self.path}'"

    # The line ------------------------------------------------------------------------------

    def connect(self) -> None:
        """Take the line."""
        self.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(0)  # a unix socket connects at once or not at all
            sock.connect(self.path)
        except (OSError, ValueError) as error:
            sock.close()
            why = getattr(error, "strerror", None) or error
            raise CowferryError(
                f"cannot reach {self}: {why}",
                "name the host's socket of the guest's channel org.qemu.guest_agent.0 "
                "(-chardev socket,path=...,server=on)",
            ) from error
        self._sock = sock

    def close(self) -> None:
        """Hang up."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None

    def ask(self, *commands: str, afresh: bool = False) -> None:
        """Send commands; `afresh`: nothing that was said before counts, or is waited for."""
        data = b""
        if afresh:
            self._heard.clear()
            self._asked.clear()
            data = self._answers.sync()
        if self._sock is None:
            raise HungUp(f"{self} has hung up")
        self._asked += commands
        try:
            self._sock.settimeout(1.0)  # it has room for thousands of these
            self._sock.sendall(data + b"".join(qga.command(c) for c in commands))
        except OSError as error:
            raise HungUp(f"{self} has hung up: {error.strerror or error}") from error

    def hear(self, until: Until) -> Any:
        """What the oldest unanswered command returned."""
        while not self._heard:
            self._more(until)
        asked, answer = self._asked.popleft(), self._heard.popleft()
        if answer.refusal is not None:
            raise CowferryError(f"{self} refuses {asked}: {answer.refusal}")
        return answer.value

    def _more(self, until: Until) -> None:
        if self._sock is None:
            raise HungUp(f"{self} has hung up")
        asked, hint = (qga.SYNC, SILENT) if self._answers.syncing else (self._asked[0], SLOW)
        self._sock.settimeout(until.wait(f"{self} did not answer {asked}", hint))
        try:
            data = self._sock.recv(1 << 16)
        except TimeoutError:
            return
        except OSError as error:
            raise HungUp(f"{self} has hung up: {error.strerror or error}") from error
        if not data:
            raise HungUp(f"{self} has hung up", "is the guest still running?")
        try:
            self._heard += self._answers.feed(data)
        except qga.Garbage as error:
            raise CowferryError(f"{self} sent {error.desc}", "is that a guest agent?") from None

    def hear_count(self, until: Until) -> int:
        """The same, for a command that returns a number of file systems."""
        asked, value = self._asked[0], self.hear(until)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CowferryError(f"{self} answered {asked} with {value!r:.80}, which is no number")
        return value

    # What it is for ------------------------------------------------------------------------

    def greet(self, until: Until) -> None:
        """It answers, and the guest is not frozen."""
        status = self.hear(until)
        if status != "thawed":
            raise CowferryError(
                f"the guest of {self} is frozen already (it says {status!r:.80})",
                "somebody else has frozen it, or was killed while it was; when they are done: "
                "guest-fsfreeze-thaw",
            )

    def freeze(self, until: Until) -> None:
        """Hear that everything is frozen."""
        self.frozen = self.hear_count(until)
        status = self.hear(until)
        if not self.frozen:
            raise CowferryError(
                f"{self} froze no file system",
                "the guest has none mounted that can be frozen; snapshot without quiesce",
            )
        if status != "frozen":
            raise CowferryError(
                f"{self} froze {self.frozen} file systems, then said {status!r:.80}"
            )

    def ask_thaw(self) -> None:
        """Send a thaw; over a new line if the old one is gone."""
        try:
            self.ask(qga.THAW, qga.STATUS, afresh=True)
        except HungUp:
            self.connect()
            self.ask(qga.THAW, qga.STATUS, afresh=True)

    def thaw(self, until: Until) -> None:
        """Hear that everything is thawed."""
        try:
            self._thawed(until)
        except HungUp:
            self.connect()
            self.ask_thaw()
            self._thawed(until)

    def _thawed(self, until: Until) -> None:
        thawed = self.hear_count(until)
        status = self.hear(until)
        if status != "thawed":
            raise CowferryError(f"{self} was told to thaw, then said {status!r:.80}", HANGS)
        if thawed < self.frozen:
            raise CowferryError(
                f"{self} froze {self.frozen} file systems and found {thawed} of them to thaw",
                "somebody thawed the others too early: they may be as after a power cut",
            )

    @property
    def pending(self) -> bool:
        """Whether an answer may still come."""
        return self._sock is not None and bool(self._asked)

    def linger(self) -> None:
        """Stay on the line until the thaw is answered: an agent may hang at an answer that nobody
        takes, and so never come to the thaw."""
        until = Until(LINGER)
        status: Any = "not known"
        try:
            while self._asked:
                status = self.hear(until)
            log.warning("%s has answered the thaw at last; its guest is %s", self, status)
        except CowferryError as error:
            log.error("%s; %s", error.desc, HANGS)
        finally:
            self.close()


class Guests(Ending):
    """The guests of one snapshot, none or many. Enter it, `greet`, and use `frozen`.

    It is one more ending for `finish`, after those of the disks: its part is to say, once no guest
    can write any more, whether all of them are frozen still."""

    def __init__(self, sockets: list[str], seconds: float) -> None:
        if not 0 < seconds <= TIMEOUT_MOST:
            raise CowferryError(
                f"Parameter 'quiesce-timeout' does not accept value {seconds:g}",
                f"seconds, above 0 and at most {TIMEOUT_MOST:g}",
            )
        for path in sockets:
            if [os.path.abspath(p) for p in sockets].count(os.path.abspath(path)) > 1:
                raise CowferryError(f"the guest agent '{path}' is named twice")
        self.agents = [Agent(path) for path in sockets]
        self.until = Until(seconds)
        self.over = threading.Event()
        self.began = self.ended = 0.0  # of the frozen time, from the first request to the last word
        self.lock = threading.Lock()  # guards `thawing`, and the agents' lines while they thaw
        self.thawing = False

    def call_off(self) -> None:
        """The daemon ends: wait for no agent, thaw. Returns when that is done."""
        self.until.called_off.set()
        self.over.wait(min(THAW_MOST, self.until.seconds) + LAST)

    def __enter__(self) -> Guests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for agent in self.agents:
            if agent.pending and agent.freezing:
                threading.Thread(target=agent.linger, name="guest agent", daemon=True).start()
            else:
                agent.close()
        self.over.set()
        if isinstance(error, CowferryError) and self.agents:
            told = [error.hint, "no disk was switched", *self._states()]
            error.hint = "; ".join(t for t in told if t)

    def _states(self) -> Iterator[str]:
        """What has become of each guest."""
        if not any(agent.freezing for agent in self.agents):
            yield "no guest was frozen"
        for agent in self.agents:
            if agent.trouble is not None:
                yield f"guest-fsfreeze-thaw was sent, but {agent.trouble.desc}; {HANGS}"
            elif agent.freezing:
                yield f"the guest of '{agent.path}' is thawed"

    # The steps -----------------------------------------------------------------------------

    def greet(self) -> None:
        """All are there, and none is frozen."""
        for agent in self.agents:
            agent.connect()
            agent.ask(qga.STATUS, afresh=True)
        for agent in self.agents:
            agent.greet(self.until)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All guests stand still inside; and are thawed on every way out, or at the deadline."""
        watchdog = None
        self.began = time.monotonic()
        try:
            for agent in self.agents:
                agent.freezing = True
                agent.ask(qga.FREEZE, qga.STATUS)
            for agent in self.agents:
                agent.freeze(self.until)
            if self.agents:
                watchdog = threading.Timer(self.until.left, self.thaw)
                watchdog.daemon = True
                watchdog.start()
            yield
        finally:
            if watchdog is not None:
                watchdog.cancel()
            self.thaw()

    def thaw(self) -> None:
        """Once: all that a freeze was sent to. What goes wrong is each agent's `trouble`."""
        with self.lock:
            if self.thawing:
                return
            self.thawing = True
            until = Until(min(max(self.until.seconds, THAW_LEAST), THAW_MOST))
            for step in (Agent.ask_thaw, lambda agent: agent.thaw(until)):
                for agent in self.agents:
                    if agent.freezing and agent.trouble is None:
                        try:
                            step(agent)
                        except CowferryError as error:
                            agent.trouble = error
            self.ended = time.monotonic()

    def check(self) -> None:
        """After a snapshot that stands. Raises `CowferryError` if a guest may be frozen still, or
        was not frozen all the time."""
        for agent in self.agents:
            if agent.trouble is not None:
                raise CowferryError(
                    f"the snapshot was taken, but {agent.trouble.desc}",
                    f"the snapshot stands, and the disks are on it; {agent.trouble.hint or HANGS}",
                )

    @property
    def patience(self) -> float:
        """How long frozen guests may wait for their turn; without any there is no hurry: -1."""
        return self.until.left if self.agents else -1.0

    @property
    def seconds(self) -> float:
        """How long the guests stood still."""
        return self.ended - self.began

    @property
    def filesystems(self) -> int:
        """How many were frozen."""
        return sum(agent.frozen for agent in self.agents)

    # As an ending of `finish` --------------------------------------------------------------

    def settle(self) -> None:
        """All disks are drained, and nothing has been switched: is every guest frozen still?

        Thawed from here on they do no harm: what they write waits for the end of the drain."""
        if self.agents and (self.thawing or not self.until.left):
            raise CowferryError(
                f"the disks could not be switched within {self.until.seconds:g} s",
                "something kept them busy; raise quiesce-timeout",
            )
