"""The live commands, against a daemon: what they say, do, and exit with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chains import contents, overlay
from cowferry.block.disk import Disk
from cowferry.cli import main
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.monitor import hmp
from daemons import PATIENCE, Told, a_daemon, chain_of, environment

SIZE = 4 << 20
SLOW = 64 << 10  # bytes a second: a job goes on for as long as we need


class Scene(NamedTuple):
    daemon: Daemon
    told: Told
    disk: Disk
    oracle: bytearray
    folder: Path
    capture: pytest.CaptureFixture[str]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit status, standard output, standard error) of `cowferry ARGUMENTS`."""
        self.capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = self.capture.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err


@pytest.fixture
def scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Scene]:
    """A daemon with the disk vm: base.raw <- sn1.qcow2 <- vm.qcow2; $COWFERRY_RUN names it."""
    oracle = chain_of(tmp_path, "sn1", SIZE)
    overlay(tmp_path, "vm.qcow2", "sn1.qcow2", "qcow2", SIZE)
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("COWFERRY_RUN", str(run))
    monkeypatch.delenv("COWFERRY_QMP", raising=False)
    with a_daemon(run / "qmp.sock") as daemon:
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        yield Scene(daemon, Told(daemon), disk, oracle, tmp_path, capsys)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_stream_waits_and_the_disk_stands_alone(scene: Scene) -> None:
    status, out, err = scene.run("stream", "vm")
    assert (status, err) == (0, "")
    assert out == "stream vm: completed, 4 MiB\n"
    assert scene.disk.root.backing is None
    (scene.folder / "base.raw").unlink()
    assert contents(scene.disk) == scene.oracle


def test_stream_json_tells_progress_and_the_result(scene: Scene) -> None:
    status, out, _ = scene.run("stream", "vm", "--speed", "16M", "--json", "--base", "base.raw")
    assert status == 0
    *steps, result = lines(out)
    offsets = [s["offset"] for s in steps]
    assert offsets == sorted(offsets) and steps[-1]["offset"] == SIZE
    assert result["result"] == "completed" and result["speed"] == 16 << 20
    assert scene.disk.root.backing is not None
    assert scene.disk.root.backing.filename == str(scene.folder / "base.raw")


def test_stream_in_the_background_and_the_verbs_on_its_job(scene: Scene) -> None:
    status, out, _ = scene.run("stream", "vm", "--async", "--json", "--speed", str(SLOW))
    assert status == 0
    job = json.loads(out)["job"]
    assert scene.run("job", "pause", job)[0] == 0
    scene.told.wait("JOB_STATUS_CHANGE", id=job, status="paused")
    assert "paused" in scene.run("jobs")[1]
    assert scene.run("job", "pause", job)[::2] == (1, "cowferry: Job is already paused\n")
    assert scene.run("job", "resume", job)[0] == 0
    assert scene.run("job", "speed", job, "32k")[0] == 0
    assert [j["speed"] for j in json.loads(scene.run("jobs", "--json")[1])] == [32 << 10]
    assert scene.run("job", "cancel", job)[0] == 0
    scene.told.wait("BLOCK_JOB_CANCELLED", device=job)
    scene.told.wait("JOB_STATUS_CHANGE", id=job, status="null")
    assert scene.run("jobs")[1] == "No active jobs\n"
    assert scene.disk.root.backing is not None and contents(scene.disk) == scene.oracle


def test_what_cannot_be_streamed_says_why_and_what_there_is(scene: Scene) -> None:
    status, out, err = scene.run("stream", "nope")
    assert (status, out) == (1, "")
    assert err.splitlines() == ["cowferry: Device 'nope' not found", "  there are: vm"]
    status, _, err = scene.run("stream", "vm", "--base", "other.raw")
    assert status == 1 and "'other.raw' is not a backing image of 'vm'" in err
    assert scene.run("stream", "vm", "--speed", "fast")[0] == 2
    assert not scene.daemon.jobs.all()


def test_a_failed_stream_says_what_is_intact(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scene.disk.root, "reserve", full)
    status, _, err = scene.run("stream", "vm")
    assert status == 1
    assert err.startswith(
        f"cowferry: stream vm failed at 0%: filling '{scene.disk.root.filename}': "
    )
    assert "No space left" in err.splitlines()[0]
    assert "the disk is intact and keeps its backing file" in err
    assert contents(scene.disk) == scene.oracle


def test_ctrl_c_cancels_the_stream_and_says_so(scene: Scene) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "cowferry", "stream", "vm", "--speed", str(SLOW), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(scene.folder / "run"),
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["status"] == "running"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=PATIENCE)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert lines(out)[-1]["result"] == "cancelled"
    assert err == "stream vm: cancelled; the disk keeps its backing file\n"
    scene.told.wait("BLOCK_JOB_CANCELLED", device="stream-vm")
    assert scene.disk.root.backing is not None


def test_a_stream_that_somebody_else_cancels_is_a_failure(scene: Scene) -> None:
    def cancel(name: str, data: dict[str, Any]) -> None:
        if name == "JOB_STATUS_CHANGE" and data["status"] == "running":
            job = scene.daemon.jobs.get(data["id"])
            assert job is not None
            job.cancel()

    scene.daemon.events.listen(cancel)
    status, _, err = scene.run("stream", "vm", "--speed", str(SLOW))
    assert status == 1 and "cancelled" in err


def test_tree_draws_the_chain_before_and_after(scene: Scene) -> None:
    scene.disk.pwrite(memoryview(b"x" * 65536), 0)
    scene.disk.flush()
    status, out, _ = scene.run("tree", "vm")
    assert status == 0
    first, *layers = out.splitlines()
    assert first == "vm (4 MiB): base.raw <- sn1.qcow2 <- vm.qcow2"
    assert [x.split()[0] for x in layers] == ["base.raw", "sn1.qcow2", "vm.qcow2"]
    assert "holds 3 MiB (75%)" in layers[0] and "holds 64 KiB" in layers[2]
    scene.run("stream", "vm")
    assert scene.run("tree")[1].splitlines()[0] == "vm (4 MiB): vm.qcow2"
    told = json.loads(scene.run("tree", "--json")[1])
    assert [(t["device"], len(t["chain"])) for t in told] == [("vm", 1)]
    assert scene.run("tree", "nope")[0] == 1


def test_qmp_sends_typed_arguments_and_shows_errors(scene: Scene) -> None:
    status, out, _ = scene.run("qmp", "query-named-block-nodes", "flat=true")
    assert status == 0
    assert {n["node-name"] for n in json.loads(out)} == set(scene.daemon.graph.nodes)
    scene.run("qmp", "block_resize", "device=vm", f"size={2 * SIZE}")
    assert scene.disk.size == 2 * SIZE
    address = f"addr.data.path={scene.folder}/s"
    assert scene.run("qmp", "nbd-server-start", "addr.type=unix", address)[0] == 0
    assert (scene.folder / "s").exists()
    status, out, _ = scene.run("qmp", "query-jobs", '{"x": 1}')
    assert status == 1
    assert json.loads(out)["error"] == {
        "class": "GenericError", "desc": "Parameter 'x' is unexpected"
    }  # fmt: skip
    whole = '{"execute": "query-named-block-nodes", "arguments": {"flat": true}}'
    assert (
        scene.run("qmp", whole)[:2] == scene.run("qmp", "query-named-block-nodes", "flat=true")[:2]
    )
    for message, more in (('{"execute": 1}', ()), ('{"id": 1}', ()), (whole, ("x=1",))):
        status, _, err = scene.run("qmp", message, *more)
        assert status == 1 and "a whole message" in err
    assert scene.run("qmp", "query-jobs", "x")[::2] == (1, "cowferry: 'x' is not KEY=VALUE\n")


def test_monitor_runs_a_line_or_a_conversation(scene: Scene) -> None:
    assert scene.run("monitor", "info", "block-stream")[1] == "No active stream\n"
    for lines, status, said in (
        ("info block-jobs\n\ninfo block-stream\n", 0, "No active jobs\nNo active stream\n"),
        ("nonsense\ninfo block-jobs\n", 1, "unknown command: 'nonsense'\nNo active jobs\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cowferry", "monitor"],
            input=lines, capture_output=True, text=True,
            timeout=PATIENCE, env=environment(scene.folder / "run"),
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (status, said)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("frobnicate", "unknown command: 'frobnicate'"),
        ("info frobnicate", "Error: unknown command: 'info frobnicate'"),
        ("help frobnicate", "Error: unknown command: 'frobnicate'"),
        ("info block none", "Error: Device 'none' not found"),
        ("block_stream", "Error: wrong number of arguments"),
        ("block_stream none", "Error: Device 'none' not found"),
        ("block_job_cancel -x vm", "Error: unsupported option -x"),
        ("block_job_set_speed vm " + "9" * 400, "Error: invalid size"),
        ("block_resize vm 8E", "Error: invalid size '8E'"),
        ("block_stream 'vm", "Error: No closing quotation"),
        ("change vm 'a\0b'", "Error: "),
    ],
)
def test_a_line_of_the_monitor_that_fails_has_status_1_and_tells_why(
    scene: Scene, line: str, text: str
) -> None:
    status, out, err = scene.run("monitor", line)
    assert status == 1 and not out
    assert err.startswith(text) and err.count("\n") == 1
    # A QMP client gets the text as QEMU gives it, unless it asks for an error.
    given = {"command-line": line}
    assert scene.daemon.execute("human-monitor-command", given) == err
    with pytest.raises(CowferryError) as failed:
        scene.daemon.execute("human-monitor-command", given | {"x-errors": True})
    assert failed.value.desc + "\n" == err


def test_an_error_in_the_daemon_is_a_line_of_the_monitor_that_fails(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = hmp.VERBS["block_resize"]._replace(run=lambda daemon, words: str(1 // 0))
    monkeypatch.setitem(hmp.VERBS, "block_resize", broken)
    status, out, err = scene.run("monitor", "block_resize", "vm", "1")
    assert (status, out) == (1, "")
    assert err == "Error: internal error: integer division or modulo by zero\n"


def test_sizes_in_the_human_monitor_are_exact() -> None:
    assert hmp.size("9223372036854775807") == (1 << 63) - 1
    assert hmp.size("1.5k") == 1536 and hmp.size("2", "m") == 2 << 20
    for wrong in ("", "x", "1x", "-1", "1.", ".5", "9223372036854775808", "8e", "1e9"):
        with pytest.raises(CowferryError):
            hmp.size(wrong)


def test_another_daemon_by_option_and_by_environment(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_daemon(scene.folder / "other") as other:
        opening.create_image(str(scene.folder / "o.qcow2"), "qcow2", SIZE, {})
        other.open_disk("o", str(scene.folder / "o.qcow2"))
        assert scene.run("tree", "-c", str(scene.folder / "other"))[1].startswith("o (4 MiB)")
        monkeypatch.setenv("COWFERRY_QMP", str(scene.folder / "other"))
        assert scene.run("tree")[1].startswith("o (4 MiB)")
    status, _, err = scene.run("jobs")
    assert status == 1
    assert err.startswith(f"cowferry: no daemon answers at '{scene.folder}/other': No such file")


def test_stop_ends_the_daemon(scene: Scene) -> None:
    assert scene.run("stop")[0] == 0
    assert scene.daemon.stopped.wait(PATIENCE)
