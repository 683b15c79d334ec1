"""A job that failed is listed until it is run again or dismissed: its terminal may be gone, or it
was started with --async."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cowferry
from cowferry.cli import main
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.jobs import job as jobs
from daemons import PATIENCE, Told, a_daemon
from mounts import Mount, mount

__all__ = ["mount"]

SIZE = 1 << 20
AT = 64 << 10


class Scene(NamedTuple):
    """A disk `vm`, and `wrong.raw`, which differs from it at `AT`."""

    folder: Path
    daemon: Daemon
    told: Told
    capture: pytest.CaptureFixture[str]

    def change(self, to: str, job: str) -> str | None:
        """Move the disk by a job, and return its error."""
        target = str(self.folder / to)
        self.daemon.execute(
            "change", {"device": "vm", "target": target, "notify": False, "x-job-id": job}
        )
        return self.told.wait("BLOCK_JOB_COMPLETED", device=job).get("error")

    def failed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.daemon.execute("x-query-failed-jobs", {})
        return found

    def run(self, *words: str) -> tuple[int, str]:
        self.capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*words, "-c", str(self.folder / "qmp.sock")])
        out, err = self.capture.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out + err


@pytest.fixture
def scene(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Scene]:
    for name in ("vm", "same", "wrong"):
        cowferry.create(str(tmp_path / f"{name}.raw"), SIZE, "raw")
    with open(tmp_path / "wrong.raw", "r+b") as f:
        f.seek(AT)
        f.write(b"!")
    with a_daemon(tmp_path / "qmp.sock") as daemon:
        daemon.open_disk("vm", str(tmp_path / "vm.raw"))
        yield Scene(tmp_path, daemon, Told(daemon), capsys)


def test_a_job_that_failed_is_listed_with_its_error(scene: Scene) -> None:
    assert scene.run("jobs") == (0, "No active jobs\n")
    error = scene.change("wrong.raw", "j")
    assert error is not None and f"at offset {AT}" in error
    assert scene.daemon.execute("query-jobs", {}) == []
    assert scene.daemon.execute("query-block-jobs", {}) == []
    status, text = scene.run("jobs")
    assert status == 0 and "j  change  failed  at " in text and error in text
    (entry,) = json.loads(scene.run("jobs", "--json")[1])
    assert (entry["device"], entry["status"], entry["error"]) == ("j", "concluded", error)
    status, text = scene.run("job", "cancel", "j")
    assert status == 1 and "Job 'j' has failed" in text and "Traceback" not in text


def test_a_job_that_failed_is_forgotten_when_it_is_dismissed(scene: Scene) -> None:
    assert scene.change("wrong.raw", "j")
    assert scene.run("job", "dismiss", "j") == (0, "")
    assert scene.run("jobs") == (0, "No active jobs\n")
    status, text = scene.run("job", "dismiss", "j")
    assert status == 1 and "Job 'j' not found" in text
    with pytest.raises(CowferryError, match="Job not found"):
        scene.daemon.execute("job-dismiss", {"id": "j"})


def test_a_job_that_is_run_again_is_not_listed_as_failed(scene: Scene) -> None:
    assert scene.change("wrong.raw", "j")
    assert scene.change("same.raw", "j") is None
    assert scene.failed() == []


def test_a_job_that_was_cancelled_or_that_a_client_dismisses_is_not_listed(scene: Scene) -> None:
    copy = {"device": "vm", "target": str(scene.folder / "t.raw"), "speed": 4096}
    scene.daemon.execute("x-disk-copy", {**copy, "job-id": "c"})
    scene.daemon.execute("job-cancel", {"id": "c"})
    scene.told.wait("BLOCK_JOB_CANCELLED", device="c")
    target = str(scene.folder / "none" / "t.raw")
    create = {"driver": "file", "filename": target, "size": SIZE}
    scene.daemon.execute("blockdev-create", {"job-id": "k", "options": create})
    made = scene.daemon.jobs.get("k")
    assert made is not None and made.wait(PATIENCE)
    assert made.error
    scene.daemon.execute("job-dismiss", {"id": "k"})
    assert scene.failed() == []


def test_the_list_of_jobs_that_failed_is_bounded(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_FAILURES", 2)
    for name in ("a", "b", "c"):
        assert scene.change("wrong.raw", name)
    assert [entry["device"] for entry in scene.failed()] == ["b", "c"]


@pytest.mark.parametrize("verb", ["copy", "backup", "commit"])
def test_an_error_says_which_file_could_not_be_written(
    scene: Scene, mount: Mount, verb: str
) -> None:
    """QEMU's clients are told the error alone, in the words of the system."""
    small = mount("tmpfs", "1m")
    base, over = small / "base.raw", scene.folder / "over.qcow2"
    cowferry.create(str(base), 4 * SIZE, "raw")
    opening.create_image(
        str(over), "qcow2", 4 * SIZE, {"backing_file": str(base), "backing_fmt": "raw"}
    )
    disk = scene.daemon.open_disk("full", str(over))
    disk.pwrite(memoryview(b"d" * 3 * SIZE), 0)
    words = {"copy": ["--finish", "--format", "raw"], "backup": ["--format", "raw"], "commit": []}
    to = [] if verb == "commit" else [str(small / "t.raw")]
    status, text = scene.run(verb, "full", *to, *words[verb])
    full = os.strerror(errno.ENOSPC)
    place = f"writing '{base if verb == 'commit' else to[0]}': {full}"
    assert status == 1 and place in text, text
    assert scene.told.wait("BLOCK_JOB_COMPLETED")["error"] == full
    assert place in scene.run("jobs")[1]
