"""Limits as a person sets them: `cowferry limit`, `serve --limit`, the library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowferry
from cowferry.cli.limits import VIRSH, in_words
from cowferry.errors import CowferryError
from daemons import program
from test_cli_changes import Ran
from test_cli_changes import cowferry as command

SIZE = 1 << 20


class Scene:
    """A daemon with the disks vm, which is limited from the beginning, and data."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def run(self, *arguments: str) -> Ran:
        return command(self.capture, "limit", *arguments)

    def good(self, *arguments: str) -> str:
        status, out, err = self.run(*arguments)
        assert (status, err) == (0, ""), (arguments, out, err)
        return out

    def bad(self, *arguments: str) -> str:
        status, out, err = self.run(*arguments)
        assert status and not out, (arguments, out)
        return err


@contextmanager
def serving(folder: Path) -> Iterator[Path]:
    """A daemon with limits from the beginning; its run folder."""
    for name in ("vm", "data"):
        (folder / f"{name}.raw").write_bytes(bytes(SIZE))
    options = (
        "--object", "throttle-group,id=web,limits.bps-total=10M,limits.iops-write=100",
        "--limit", "vm,throttling.bps-total=20M,throttling.iops-write=2k",
        "--limit", "data,group=web",
    )  # fmt: skip
    disks = (f"vm={folder / 'vm.raw'}", f"data={folder / 'data.raw'}")
    with program(folder / "run", *disks, *options) as (_, line):
        line()
        line()
        yield folder / "run"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all tests, which may come in any order, and leave whatever limits they set."""
    with serving(tmp_path_factory.mktemp("l")) as run:
        yield run


@pytest.fixture
def scene(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Scene:
    monkeypatch.setenv("COWFERRY_RUN", str(served))
    return Scene(capsys)


def test_limits_are_there_from_the_beginning_and_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path) as run:
        monkeypatch.setenv("COWFERRY_RUN", str(run))
        assert Scene(capsys).good() == (
            "vm: 20 MiB/s, 2048 writes/s\n"
            "data: 10 MiB/s, 100 writes/s\n"
            "    group web\n"
        )  # fmt: skip


def test_a_limit_is_changed_shown_shared_and_taken_away(scene: Scene) -> None:
    assert scene.good("vm", "--off") == "vm: no limits\n"
    assert scene.good("vm", "--bps", "50M", "--iops-wr", "200") == "vm: 50 MiB/s, 200 writes/s\n"
    burst = scene.good("vm", "--bps-max", "200M", "--bps-max-length", "10")
    assert burst == "vm: 50 MiB/s (200 MiB/s for 10 s), 200 writes/s\n"
    assert scene.good("vm", "--bps-rd", "1G") == "vm: 1 GiB/s read, 200 writes/s\n"
    shared = scene.good("vm", "--group", "web")
    assert shared == "vm: 10 MiB/s, 100 writes/s\n    shared with data (group web)\n"
    (entry,) = json.loads(scene.good("vm", "--json"))
    assert entry["limits"] == {"bps": 10 << 20, "iops_wr": 100} and entry["with"] == ["data"]
    assert scene.good("vm", "--off") == scene.good("vm") == "vm: no limits\n"
    assert scene.good("data") == "data: 10 MiB/s, 100 writes/s\n    group web\n"


def test_what_virsh_blkdeviotune_calls_them_is_understood(scene: Scene) -> None:
    scene.good("vm", "--off")
    given = {
        "total-bytes-sec": "1M", "total-bytes-sec-max": "2M", "total-bytes-sec-max-length": "3",
        "read-iops-sec": "400", "size-iops-sec": "4096", "group-name": "db",
    }  # fmt: skip
    scene.good("vm", *(part for name, value in given.items() for part in (f"--{name}", value)))
    (entry,) = json.loads(scene.good("vm", "--json"))
    assert entry["group"] == "db"
    assert entry["limits"] == {
        "bps": 1 << 20, "bps_max": 2 << 20, "bps_max_length": 3, "iops_rd": 400, "iops_size": 4096,
    }  # fmt: skip
    assert len(VIRSH) == 20 and set(given) < set(VIRSH)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nope", "--bps", "1M"], "cowferry: Device 'nope' not found"),
        (["vm", "--bps", "fast"], "Invalid size 'fast'"),
        (["vm", "--iops", "-5"], "bps/iops/max values must be within [0, 1000000000000000]"),
        (["vm", "--bps", "4E"], "bps/iops/max values must be within [0, 1000000000000000]"),
        (["vm", "--iops-rd-max", "5"], "bps_max/iops_max require corresponding bps/iops values"),
        (["vm", "--bps", "1M", "--bps-rd", "1M"], "cannot be used at the same time"),
        (["vm", "--bps", "1M", "--total-bytes-sec", "2M"], "two values for bps"),
        (["vm", "--iops-size", "4K"], "iops size requires an iops value to be set"),
        (["vm", "--group", "none"], "Throttle group 'none' does not exist"),
        (["vm", "--off", "--bps", "1M"], "'off' takes all limits away"),
        (["--bps", "1M"], "which disk is to be limited?"),
    ],
)
def test_what_has_no_effect_is_refused_in_a_line_and_changes_nothing(
    scene: Scene, arguments: list[str], text: str
) -> None:
    scene.good("vm", "--off")
    err = scene.bad(*arguments)
    assert text in err and "Traceback" not in err
    assert scene.good("vm") == "vm: no limits\n"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("vm", "no limit was given for 'vm'"),
        ("bps-total=5", "--limit expects DISK,NAME=VALUE,..."),
        ("nope,bps-total=5", "Device 'nope' not found"),
        ("vm,bps-toal=5", "--limit vm: there is no limit 'bps-toal'"),
        ("vm,bps-total=fast", "Invalid size 'fast'"),
        ("vm,bps-total=5,bps-read=5", "cannot be used at the same time"),
        ("vm,throttling=5", "--limit: 'throttling' is the beginning of a name"),
    ],
)
def test_a_daemon_does_not_begin_with_a_limit_that_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    option: str, text: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("COWFERRY_RUN", str(tmp_path / "r"))
    (tmp_path / "vm.raw").write_bytes(bytes(SIZE))
    status, _, err = command(capsys, "serve", str(tmp_path / "vm.raw"), "--limit", option)
    assert status == 1 and text in err and "Traceback" not in err


def test_words_for_all_that_can_be_limited() -> None:
    entry = {
        "device": "vm", "group": "g", "with": ["a", "b"], "waiting": 3,
        "limits": {"bps_wr": 1 << 20, "iops": 5, "iops_max": 9, "iops_max_length": 1,
                   "iops_size": 4096},
        "also": [{"group": "all", "limits": {"bps": 2 << 20}}],
    }  # fmt: skip
    assert in_words(entry) == [
        "vm: 1 MiB/s written, 5 requests/s (9/s for 1 s), a request is 4 KiB",
        "    shared with a, b (group g)",
        "    and 2 MiB/s (group all)",
        "    3 requests wait",
    ]


def test_the_library_limits_its_own_disks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cowferry.create(str(tmp_path / f"{name}.qcow2"), SIZE)
    with (
        cowferry.open(str(tmp_path / "a.qcow2")) as a,
        cowferry.open(str(tmp_path / "b.qcow2")) as b,
    ):
        assert cowferry.limit(a) == {}
        assert cowferry.limit(a, bps=10**9, iops_wr=10**6) == {"bps": 10**9, "iops_wr": 10**6}
        assert cowferry.limit(b, group="a") == cowferry.limit(a)
        cowferry.snapshot(a, str(tmp_path / "over.qcow2"))
        assert a.limits is not None and b.limits is not None
        assert a.limits.group is b.limits.group
        a.pwrite(memoryview(b"x" * 4096), 0)
        assert cowferry.limit(a, off=True) == {} and a.turnstiles == ()
        with pytest.raises(CowferryError, match="bps_foo"):
            cowferry.limit(a, bps_foo=5)
        with pytest.raises(CowferryError, match="require corresponding"):
            cowferry.limit(a, bps_max=5)
