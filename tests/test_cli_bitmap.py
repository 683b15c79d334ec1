"""`cowferry bitmap`: the same on images of every format at rest, and on a disk that is served."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chains import make_base, overlay
from cowferry.block.disk import Disk
from cowferry.cli import main
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from daemons import a_daemon
from tests_support import need

SIZE = 4 << 20
KIB = 1 << 10

Run = Callable[..., tuple[int, str, str]]
IMAGES = {
    "vm.raw": ("raw", {}),
    "vm.qcow2": ("qcow2", {}),
    "old.qcow2": ("qcow2", {"compat": "0.10"}),
    "vm.qed": ("qed", {}),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`cowferry bitmap ARGUMENTS` in the test's folder: (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COWFERRY_RUN", str(tmp_path))
    monkeypatch.delenv("COWFERRY_QMP", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["bitmap", *arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty image in the test's folder."""
    name = str(request.param)
    format, options = IMAGES[name]
    opening.create_image(str(tmp_path / name), format, SIZE, options)
    return name


def done(result: tuple[int, str, str]) -> None:
    """It worked, and said nothing."""
    assert result == (0, "", "")


def listed(run: Run, *arguments: str) -> dict[str, dict[str, Any]]:
    status, out, err = run("--json", *arguments)
    assert (status, err) == (0, "")
    return {entry["name"]: entry for entry in json.loads(out)}


def mapped(run: Run, *arguments: str) -> list[tuple[int, int]]:
    status, out, _ = run("--map", "--json", *arguments)
    assert status == 0
    return [(entry["offset"], entry["length"]) for entry in json.loads(out)]


def written(image: str, *offsets: int) -> None:
    """Somebody opens the image and writes there."""
    node = opening.open_image(image)
    disk = Disk(node, "x")
    for offset in offsets:
        disk.pwrite(memoryview(b"x"), offset)
    disk.flush()
    opening.close_chain(node)


def test_one_tool_for_every_format(run: Run, image: str) -> None:
    inside = image == "vm.qcow2"
    place = "in the image" if inside else f"in {image}.bitmaps"
    assert run(image) == (0, "no bitmaps\n", "")
    done(run("--add", image, "monday"))
    written(image, 0, 200 * KIB)
    status, out, _ = run(image)
    assert status == 0 and out.splitlines() == [
        "bitmap  granularity  dirty    state",
        f"monday  64 KiB       128 KiB  recording, {place}",
    ]
    assert mapped(run, image, "monday") == [(0, 64 * KIB), (192 * KIB, 64 * KIB)]
    status, out, _ = run("--map", image, "monday")
    assert out.splitlines() == [
        "Offset          Length", "0x0             0x10000", "0x30000         0x10000",
    ]  # fmt: skip
    done(run("--add", "-g", "4K", "--disable", "--merge", "monday", image, "until-now"))
    done(run("--clear", image, "monday"))
    written(image, 1000 * KIB)
    both = listed(run, image)
    assert both["until-now"]["count"] == 128 * KIB and not both["until-now"]["recording"]
    assert both["until-now"]["granularity"] == 4096
    assert mapped(run, image, "monday") == [(960 * KIB, 64 * KIB)]
    done(run("--enable", image, "until-now"))
    done(run("--disable", image, "monday"))
    written(image, 0, 2000 * KIB)
    assert mapped(run, image, "until-now")[-1] == (2000 * KIB, 4 * KIB)
    assert listed(run, image, "monday")["monday"]["count"] == 64 * KIB
    done(run("--remove", image, "monday"))
    done(run("--remove", image, "until-now"))
    assert run(image) == (0, "no bitmaps\n", "")
    assert not Path(f"{image}.bitmaps").exists()


def test_info_shows_what_is_kept_beside_an_image(
    run: Run, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done(run("--add", image, "on"))
    done(run("--add", "--disable", "-g", "1M", image, "off"))
    written(image, 0)
    shown = {}
    for output in ("human", "json"):
        with pytest.raises(SystemExit):
            main(["info", "--output", output, image])
        shown[output] = capsys.readouterr().out
    if image == "vm.qcow2":
        assert "bitmaps" not in json.loads(shown["json"])  # qemu-img's way is another test's
        return
    beside = json.loads(shown["json"])["bitmaps"]
    assert Path(beside["filename"]).name == f"{image}.bitmaps"
    assert [(b["name"], b["count"], b["recording"]) for b in beside["bitmaps"]] == [
        ("on", 65536, True), ("off", 0, False),
    ]  # fmt: skip
    assert "    on: granularity 64 KiB, 64 KiB dirty, recording\n" in shown["human"]
    assert "    off: granularity 1 MiB, 0 B dirty, disabled\n" in shown["human"]


def test_actions_are_done_in_order(run: Run, image: str) -> None:
    done(run("--add", image, "b"))
    written(image, 0)
    done(run("--add", image, "c"))
    done(run("--clear", "--merge", "b", image, "c"))
    assert mapped(run, image, "c") == [(0, 64 * KIB)]
    done(run("--merge", "b", "--clear", image, "c"))
    assert mapped(run, image, "c") == []
    done(run("--remove", "--add", "-g", "1M", "--merge", "b", "--disable", "--enable", image, "c"))
    assert (
        listed(run, image)["c"] | {"granularity": 1 << 20, "count": 1 << 20}
        == (listed(run, image)["c"])
    )
    assert listed(run, image)["c"]["recording"]
    # All of it, or none; but what comes after a removal comes after it.
    status, _, err = run("--clear", "--disable", "--merge", "nope", image, "c")
    assert status == 1 and "'nope' not found" in err and "there are: b, c" in err
    assert listed(run, image)["c"]["recording"] and listed(run, image)["c"]["count"]
    status, _, err = run("--remove", "--add", "-g", "5", image, "c")
    assert status == 1 and "power of 2" in err and "done before that: --remove" in err
    assert list(listed(run, image)) == ["b"]


def test_bitmaps_are_merged_from_other_images(run: Run, image: str, tmp_path: Path) -> None:
    done(run("--add", image, "b"))
    for name in ("other.raw", "other.qcow2"):
        opening.create_image(str(tmp_path / name), name.rsplit(".")[-1], SIZE, {})
        done(run("--add", "-g", "512", name, "src"))
        written(name, 300 * KIB, SIZE - 1)
        done(run("--merge", "src", "-b", name, image, "b"))
        assert mapped(run, image, "b") == [(256 * KIB, 64 * KIB), (SIZE - 64 * KIB, 64 * KIB)]
        done(run("--clear", image, "b"))
        done(run("--merge", "src", "-b", name, "-F", name.rsplit(".")[-1], image, "b"))
    opening.create_image(str(tmp_path / "small.raw"), "raw", SIZE // 2, {})
    done(run("--add", "small.raw", "src"))
    status, _, err = run("--merge", "src", "-b", "small.raw", image, "b")
    assert status == 1 and "different sizes" in err


@pytest.mark.parametrize("theirs", [True, False])
def test_qemu_img_and_we_write_the_same_bitmaps(run: Run, tmp_path: Path, theirs: bool) -> None:
    """One of the two does each step, the other one looks."""
    need("qemu-img")
    path = str(tmp_path / "vm.qcow2")
    opening.create_image(path, "qcow2", SIZE, {})

    def step(*arguments: str) -> None:
        if theirs:
            subprocess.run(["qemu-img", "bitmap", *arguments], check=True)
        else:
            done(run(*arguments))

    step("--add", path, "a")
    if theirs:
        command = ["qemu-io", "-c", "write 1M 64K", path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        written(path, 1 << 20)
    step("--add", "-g", "4K", "--disable", "--merge", "a", path, "b")
    step("--clear", path, "a")
    step("--add", "--disable", path, "c")
    step("--remove", path, "c")
    out = subprocess.run(["qemu-img", "info", "--output=json", path], check=True,
                         capture_output=True, text=True).stdout  # fmt: skip
    stored = json.loads(out)["format-specific"]["data"]["bitmaps"]
    assert sorted((b["name"], b["granularity"], b["flags"]) for b in stored) == [
        ("a", 65536, ["auto"]), ("b", 4096, []),
    ]  # fmt: skip
    ours = listed(run, path)
    assert {name: (e["granularity"], e["count"], e["recording"]) for name, e in ours.items()} == {
        "a": (65536, 0, True), "b": (4096, 65536, False),
    }  # fmt: skip
    assert mapped(run, path, "b") == [(1 << 20, 64 * KIB)]
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_one_that_nobody_kept_can_be_removed(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "vm.raw")
    opening.create_image(path, "raw", SIZE, {})
    done(run("--add", path, "b"))
    with open(path, "r+b") as f:  # another program
        f.write(b"behind our back")
    status, out, _ = run(path)
    assert "inconsistent: the image was changed by another program, in vm.raw.bitmaps" in out
    status, _, err = run("--clear", path, "b")
    assert status == 1 and "Bitmap 'b' is inconsistent and cannot be used" in err
    assert "remove it with cowferry bitmap --remove" in err and "full backup" in err
    status, out, err = run("--map", path, "b")
    assert (status, out) == (1, "") and "inconsistent" in err
    done(run("--remove", path, "b"))
    done(run("--add", path, "b"))


WRONG = [
    (["--add", "vm.raw"], 2, "the NAME of a bitmap is missing"),
    (["--map", "vm.raw"], 2, "the NAME of a bitmap is missing"),
    (["--add", "--list", "vm.raw", "b"], 2, "go without actions"),
    (["--add", "--map", "vm.raw", "b"], 2, "go without actions"),
    (["--add", "-b", "vm.raw", "vm.raw", "b"], 2, "-b goes with --merge only"),
    (["--merge", "a", "-F", "raw", "vm.raw", "b"], 2, "-F goes with -b"),
    (["--clear", "-g", "64K", "vm.raw", "b"], 2, "-g goes with --add only"),
    (["--add", "--transient", "vm.raw", "b"], 2, "--transient goes with --live"),
    (["-U", "--add", "vm.raw", "b"], 2, "-U goes without actions"),
    (["--live", "-f", "raw", "vm"], 2, "not with --live"),
    (["--add", "nofile.raw", "b"], 1, "'nofile.raw'"),
    (["--add", "-f", "nope", "vm.raw", "b"], 1, "nope"),
    (["--add", "--image-opts", "-f", "raw", "vm.raw", "b"], 1, "mutually exclusive"),
    (["--merge", "a", "-b", "nofile.raw", "vm.raw", "b"], 1, "'nofile.raw'"),
    (["--add", "vm.raw", "b" * 1024], 1, "exceeds maximum"),
    (["--add", "vm.raw", ""], 1, "Bitmap name cannot be empty"),
    (["--add", "-g", "100", "vm.raw", "b"], 1, "Granularity must be power of 2"),
    (["--remove", "vm.raw", "b"], 1, "'vm.raw': Dirty bitmap 'b' not found"),
    (["--map", "vm.raw", "b"], 1, "'vm.raw': Dirty bitmap 'b' not found"),
    (["vm.raw", "b"], 1, "'vm.raw': Dirty bitmap 'b' not found"),
    (["--live", "vm"], 1, "no daemon answers"),
]


@pytest.mark.parametrize("arguments, status, text", WRONG)
def test_bad_input_is_told_in_a_line(
    run: Run, tmp_path: Path, arguments: list[str], status: int, text: str
) -> None:
    opening.create_image(str(tmp_path / "vm.raw"), "raw", SIZE, {})
    got, out, err = run(*arguments)
    assert (got, out) == (status, "") and text in err
    assert "Traceback" not in err and sorted(p.name for p in tmp_path.iterdir()) == ["vm.raw"]


def test_options_as_a_string(run: Run, image: str) -> None:
    string = f"driver={IMAGES[image][0]},file.driver=file,file.filename={image}"
    done(run("--image-opts", "--add", string, "b"))
    assert list(listed(run, "--image-opts", string)) == ["b"]


# Live -------------------------------------------------------------------------------------


@pytest.fixture
def daemon(run: Run, tmp_path: Path) -> Iterator[Daemon]:
    """With the disks vm (base.raw <- vm.qcow2) and data (data.raw)."""
    make_base(tmp_path, SIZE)
    overlay(tmp_path, "vm.qcow2", "base.raw", "raw", SIZE)
    opening.create_image(str(tmp_path / "data.raw"), "raw", SIZE, {})
    with a_daemon(tmp_path / "qmp.sock") as daemon:
        daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        daemon.open_disk("data", str(tmp_path / "data.raw"))
        yield daemon


@pytest.mark.parametrize("name", ["vm", "data"])
def test_the_same_while_a_guest_runs(run: Run, daemon: Daemon, name: str) -> None:
    file = "vm.qcow2" if name == "vm" else "data.raw"
    disk = daemon.graph.disk(name)
    assert run("--live", name) == (0, "no bitmaps\n", "")
    done(run("--live", "--add", name, "monday"))
    done(run("--live", "--add", "--transient", "-g", "4K", name, "short"))
    disk.pwrite(memoryview(b"x"), 500 * KIB)
    place = "in the image" if name == "vm" else "in data.raw.bitmaps"
    assert run("--live", name)[1].splitlines() == [
        "bitmap  granularity  dirty   state",
        f"monday  64 KiB       64 KiB  recording, {place}",
        "short   4 KiB        4 KiB   recording, in memory only",
    ]
    assert mapped(run, "--live", name, "short") == [(500 * KIB, 4 * KIB)]
    status, _, err = run("--add", file, "other")
    assert status == 1 and file in err  # it is in use
    done(run("--live", "--clear", "--disable", name, "monday"))
    other = "data" if name == "vm" else "vm"
    done(run("--live", "--add", other, "far"))
    done(run("--live", "--merge", "short", "-b", name, other, "far"))
    assert mapped(run, "--live", other, "far") == [(448 * KIB, 64 * KIB)]
    status, _, err = run("--live", "--merge", "nope", name, "monday")
    assert status == 1 and f"'{name}': Dirty bitmap 'nope' not found" in err
    daemon.remove_disk(name)
    assert (
        listed(run, file)["monday"] | {"recording": False, "count": 0}
        == (listed(run, file)["monday"])
    )
    assert "short" not in listed(run, file)


def test_a_bitmap_of_a_lower_layer_is_found(run: Run, daemon: Daemon, tmp_path: Path) -> None:
    """A snapshot leaves it with the old image; it goes on in the new one by a merge."""
    disk = daemon.graph.disk("vm")
    done(run("--live", "--add", "vm", "b"))
    disk.pwrite(memoryview(b"x"), 0)
    path = str(tmp_path / "top.qcow2")
    daemon.execute("blockdev-snapshot-sync", {"device": "vm", "snapshot-file": path})
    done(run("--live", "--add", "--merge", "b", "vm", "b2"))
    disk.pwrite(memoryview(b"x"), SIZE - 1)
    found = listed(run, "--live", "vm")
    assert Path(found["b"]["filename"]).name == "vm.qcow2" and found["b2"]["filename"] == path
    assert mapped(run, "--live", "vm", "b2") == [(0, 64 * KIB), (SIZE - 64 * KIB, 64 * KIB)]
    status, _, err = run("--live", "--clear", "vm", "b")
    assert status == 1 and "readonly and cannot be modified" in err


def test_a_long_map_comes_in_pieces(run: Run, daemon: Daemon) -> None:
    disk = daemon.graph.disk("data")
    size = 16 << 20
    daemon.execute("block_resize", {"device": "data", "size": size})
    done(run("--live", "--add", "--transient", "-g", "512", "data", "b"))
    for at in range(0, size, 1024):
        disk.root.bitmaps["b"].set(at, 512)
    assert mapped(run, "--live", "data", "b") == [(at, 512) for at in range(0, size, 1024)]


def test_who_uses_it_is_said(run: Run, daemon: Daemon, tmp_path: Path) -> None:
    done(run("--live", "--add", "--disable", "data", "b"))
    daemon.start_nbd({"type": "unix", "path": str(tmp_path / "nbd")})
    given = {"type": "nbd", "id": "e", "node-name": "data", "bitmaps": ["b"]}
    daemon.execute("block-export-add", given)
    assert "disabled, in use: export 'e', in data.raw.bitmaps" in run("--live", "data")[1]
    status, _, err = run("--live", "--remove", "data", "b")
    assert status == 1 and "export 'e' has it" in err
