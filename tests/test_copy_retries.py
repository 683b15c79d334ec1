"""A copy that ignores errors tries again: less and less often, and it says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowferry.cli.jobs import in_words
from cowferry.daemon import Daemon
from cowferry.drivers.opening import create_image
from cowferry.jobs import mirror
from daemons import Told, a_daemon
from nbd_servers import nbdkit, until
from tests_support import need

SIZE = 1 << 20


class Failing:
    """A server whose reads or writes fail as long as a file is there."""

    def __init__(self, daemon: Daemon, broken: Path, uri: str) -> None:
        self.daemon, self.broken, self.uri = daemon, broken, uri
        self.told = Told(daemon)

    def errors(self) -> int:
        """How many errors were told so far."""
        while not self.told.queue.empty():
            self.told.seen.append(self.told.queue.get())
        return sum(name == "BLOCK_JOB_ERROR" for name, _ in self.told.seen)

    def job(self) -> dict[str, Any]:
        (entry,) = self.daemon.execute("query-block-jobs", {})
        return dict(entry)


@pytest.fixture(params=["pread", "pwrite"])
def failing(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Failing]:
    need("nbdkit")
    monkeypatch.setattr(mirror, "IDLE", 0.01)
    monkeypatch.setattr(mirror, "RETRY_MOST", 0.5)
    broken, socket = tmp_path / "broken", tmp_path / "nk"
    create_image(str(tmp_path / "near.raw"), "raw", SIZE, {})
    with (
        nbdkit(
            socket, "--filter=error", "memory", str(SIZE), f"error-{request.param}-rate=100%",
            f"error-file={broken}",
        ),
        a_daemon() as daemon,
    ):  # fmt: skip
        uri = f"nbd+unix:///?socket={socket}"
        source, target = (
            (uri, str(tmp_path / "copy.raw")) if request.param == "pread"
            else (str(tmp_path / "near.raw"), uri)
        )  # fmt: skip
        daemon.open_disk("vm", source).pwrite(memoryview(b"x" * SIZE), 0)
        yield Failing(daemon, broken, target)


def start(failing: Failing) -> None:
    failing.daemon.execute(
        "x-disk-copy",
        {
            "device": "vm", "target": failing.uri, "job-id": "c", "on-source-error": "ignore",
            "on-target-error": "ignore",
        },
    )  # fmt: skip


def test_a_copy_that_ignores_errors_backs_off_and_says_so(
    failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LOST_SECONDS", 1000)
    failing.broken.touch()
    start(failing)
    until(lambda: failing.errors() >= 3)
    before, begin = failing.errors(), time.monotonic()
    until(lambda: failing.errors() >= before + 3)
    took = time.monotonic() - begin
    assert took > 4 * mirror.IDLE  # each time later, and not as often as it looks
    entry = failing.job()
    assert entry["status"] == "running"
    assert "an error is ignored, and the copy tried again every" in entry["x-note"]
    assert entry["x-note"] in "\n".join(in_words(entry))
    failing.broken.unlink()
    failing.told.wait("BLOCK_JOB_READY", device="c")
    assert "tried again" not in failing.job().get("x-note", "")


def test_a_copy_whose_errors_do_not_go_away_fails_in_the_end(
    failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first, and when it is to complete."""
    monkeypatch.setattr(mirror, "LOST_SECONDS", 0.3)
    failing.broken.touch()
    start(failing)
    end = failing.told.wait("BLOCK_JOB_COMPLETED", device="c")
    assert failing.errors() > 2
    assert f"{SIZE} bytes could not be copied, even after repeated tries" in end["error"]
    failing.broken.unlink()
    start(failing)
    failing.told.wait("BLOCK_JOB_READY", device="c")
    disk = failing.daemon.graph.disk("vm")
    before = disk.root.filename
    failing.broken.touch()
    disk.pwrite(memoryview(b"y" * 4096), 0)
    failing.daemon.execute("job-complete", {"id": "c"})
    assert "4096 bytes" in failing.told.wait("BLOCK_JOB_COMPLETED", device="c")["error"]
    assert disk.root.filename == before


def test_a_ready_copy_that_fails_backs_off(failing: Failing) -> None:
    start(failing)
    failing.told.wait("BLOCK_JOB_READY", device="c")
    failing.broken.touch()
    failing.daemon.graph.disk("vm").pwrite(memoryview(b"y" * 4096), 0)
    until(lambda: failing.errors() >= 5)
    waits = [mirror.IDLE * 2**n for n in range(1, 9)]
    begin = time.monotonic()
    until(lambda: failing.errors() >= 6)
    assert time.monotonic() - begin > waits[3] / 2
    failing.broken.unlink()
    until(lambda: not failing.job()["x-remaining"])
    failing.daemon.execute("block-job-cancel", {"device": "c"})
    failing.told.wait("BLOCK_JOB_COMPLETED", device="c")
