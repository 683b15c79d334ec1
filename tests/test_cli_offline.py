"""The offline commands beside qemu-img: the same JSON, the same exit codes."""

from __future__ import annotations

import json
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chains import contents, make_base
from cowferry.drivers import opening
from tests_support import need

SIZE = 1 << 20


def cowferry(*arguments: object, code: int = 0) -> str:
    """Run the command line; its output. Never a traceback, and the exit code as expected."""
    done = subprocess.run(
        [sys.executable, "-m", "cowferry", *map(str, arguments)], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stdout + done.stderr


def qemu_img(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True)


def images(folder: Path) -> list[Path]:
    """One of each kind, made by qemu-img."""
    need("qemu-img", "qemu-io")
    rnd = random.Random(4)
    raw = folder / "plain.raw"
    raw.write_bytes(rnd.randbytes(SIZE // 4) + bytes(SIZE // 4) + rnd.randbytes(SIZE // 2))
    out = [raw]
    kinds = {
        "v3": "compat=1.1", "v2": "compat=0.10", "small": "cluster_size=4k",
        "ext": "extended_l2=on", "zstd": "compression_type=zstd", "lazy": "lazy_refcounts=on",
        "meta": "preallocation=metadata",
    }  # fmt: skip
    for name, options in kinds.items():
        path = folder / f"{name}.qcow2"
        assert qemu_img("convert", "-O", "qcow2", "-o", options, raw, path).returncode == 0
        out.append(path)
    packed = folder / "packed.qcow2"
    assert qemu_img("convert", "-c", "-O", "qcow2", raw, packed).returncode == 0
    over = folder / "over.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", "v3.qcow2", "-F", "qcow2", over, "1500k")
    for command in ("write -P 7 100k 50k", "write -z 700k 64k", "discard 0 128k"):
        subprocess.run(["qemu-io", "-c", command, str(over)], capture_output=True, check=True)
    snap = folder / "snap.qcow2"
    qemu_img("convert", "-O", "qcow2", raw, snap)
    qemu_img("snapshot", "-c", "one", snap)
    return [*out, packed, over, snap]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return images(tmp_path_factory.mktemp("matrix"))


def test_info_says_what_qemu_img_says(matrix: list[Path]) -> None:
    for path in matrix:
        format = "raw" if path.suffix == ".raw" else "qcow2"
        ours = json.loads(cowferry("info", "--output=json", path))
        theirs = json.loads(qemu_img("info", "-f", format, "--output=json", path).stdout)
        assert ours == theirs, path.name
    assert cowferry("info", matrix[1]).startswith(f"image: {matrix[1]}\nfile format: qcow2\n")


def test_map_says_what_qemu_img_says(matrix: list[Path]) -> None:
    for path in matrix:
        format = "raw" if path.suffix == ".raw" else "qcow2"
        ours = flat(json.loads(cowferry("map", "--output=json", path)))
        theirs = flat(json.loads(qemu_img("map", "-f", format, "--output=json", path).stdout))
        assert ours == theirs, path.name


def flat(entries: list[dict[str, Any]]) -> dict[int, tuple[Any, ...]]:
    """By 4 KiB: what is there, and where if it is data. Runs may be cut in different places."""
    out = {}
    for e in entries:
        for at in range(e["start"], e["start"] + e["length"], 4096):
            where = e["offset"] + at - e["start"] if e["data"] and "offset" in e else None
            depth = e["depth"] if e["present"] else None
            out[at] = (e["data"], e["zero"], e["present"], depth, where)
    return out


def test_check_says_what_qemu_img_says(matrix: list[Path]) -> None:
    for path in matrix[1:]:
        theirs = qemu_img("check", "--output=json", path)
        ours = cowferry("check", "--output=json", path, code=theirs.returncode)
        assert json.loads(ours) == json.loads(theirs.stdout), path.name
    cowferry("check", matrix[0], code=63)


def test_check_finds_and_mends_leaks_and_corruption(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    raw = tmp_path / "x.raw"
    raw.write_bytes(random.Random(1).randbytes(SIZE))
    qemu_img("convert", "-O", "qcow2", raw, path)
    with open(path, "r+b") as f:
        f.seek(48)
        (table,) = struct.unpack(">Q", f.read(8))
        f.seek(table)
        (block,) = struct.unpack(">Q", f.read(8))
        f.seek(0, 2)
        cluster = f.tell() // 65536
        f.write(bytes(65536))
        f.seek(block + 2 * cluster)
        f.write(struct.pack(">H", 1))
    cowferry("check", path, code=3)
    assert qemu_img("check", path).returncode == 3
    cowferry("check", "-r", "leaks", path)
    assert qemu_img("check", path).returncode == 0
    with open(path, "r+b") as f:
        f.seek(block + 2 * 6)
        f.write(struct.pack(">H", 0))
    cowferry("check", path, code=2)
    assert qemu_img("check", path).returncode == 2
    cowferry("check", "-r", "all", path)
    assert qemu_img("check", path).returncode == 0
    node = opening.open_image(str(path), read_only=True)
    assert contents(node) == raw.read_bytes()
    node.close()


def test_Q4_a_corrupt_image_is_opened_to_be_mended_and_not_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    cowferry("create", "-q", "-f", "qcow2", path, SIZE)
    data = bytearray(path.read_bytes())
    data[79] |= 2  # the corrupt bit
    path.write_bytes(data)
    assert "check -r all" in cowferry("resize", path, "2M", code=1)
    node = opening.open_image(str(path), repair=True)
    with pytest.raises(OSError, match="not writing"):
        node.pwrite(memoryview(b"x"), 0)
    node.close()
    assert path.read_bytes() == data
    cowferry("check", "-r", "all", path)
    cowferry("resize", path, "2M")


def test_convert_and_compare_round_trips(matrix: list[Path], tmp_path: Path) -> None:
    for path in matrix:
        for target in ("raw", "qcow2"):
            out = tmp_path / f"{path.stem}.{target}"
            cowferry("convert", "-O", target, path, out)
            assert cowferry("compare", path, out) == "Images are identical.\n"
            assert qemu_img("compare", path, out).returncode == 0
            if target == "qcow2":
                assert qemu_img("check", out).returncode == 0
            out.unlink()


def test_compare_says_where_they_differ(tmp_path: Path) -> None:
    need("qemu-img")
    a, b = tmp_path / "a.raw", tmp_path / "b.raw"
    data = bytearray(random.Random(2).randbytes(SIZE))
    a.write_bytes(data)
    data[70_001] ^= 1
    b.write_bytes(data)
    assert cowferry("compare", a, b, code=1) == "Content mismatch at offset 70001!\n"
    b.write_bytes(a.read_bytes() + bytes(SIZE))
    assert "Warning: Image size mismatch!" in cowferry("compare", a, b)
    cowferry("compare", "-s", a, b, code=1)
    cowferry("compare", a, tmp_path / "none.raw", code=2)


def test_create_resize_rebase(tmp_path: Path) -> None:
    need("qemu-img")
    oracle = make_base(tmp_path, SIZE)
    top = tmp_path / "top.qcow2"
    cowferry("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", top)
    assert qemu_img("check", top).returncode == 0
    cowferry("resize", top, "+512k")
    assert json.loads(cowferry("info", "--output=json", top))["virtual-size"] == SIZE + 512 * 1024
    assert "smaller" in cowferry("resize", "--shrink", top, "64k", code=1)
    other = tmp_path / "other.raw"
    other.write_bytes(random.Random(9).randbytes(SIZE // 2))
    cowferry("rebase", "-b", "other.raw", "-F", "raw", top)
    node = opening.open_image(str(top), read_only=True)
    assert node.backing is not None and node.backing.filename.endswith("other.raw")
    assert contents(node) == oracle + bytes(512 * 1024)
    opening.close_chain(node)
    cowferry("rebase", "-b", "", top)
    node = opening.open_image(str(top), read_only=True)
    assert node.backing is None and contents(node) == oracle + bytes(512 * 1024)
    node.close()
    cowferry("rebase", "-u", "-b", "base.raw", "-F", "raw", top)
    assert json.loads(cowferry("info", "--output=json", top))["backing-filename"] == "base.raw"
    assert qemu_img("check", top).returncode == 0


# Bad input ---------------------------------------------------------------------------------


def test_a_chain_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    need("qemu-img")
    for path, below in ((a, b), (b, a)):
        options = f"backing_file={below.name},backing_fmt=qcow2"
        assert qemu_img("create", "-u", "-f", "qcow2", "-o", options, path, "1M").returncode == 0
    assert "comes back to it" in cowferry("map", a, code=1)
    cowferry("rebase", "-u", "-b", "gone.raw", "-F", "raw", a)
    text = cowferry("map", a, code=1)
    assert "gone.raw" in text and "No such file" in text and "a.qcow2" in text
    cowferry("rebase", "-u", "-b", "base.raw", "-F", "qcow2", a)
    assert "not in qcow2 format" in cowferry("map", a, code=1)
    cowferry("info", a)  # opens nothing else
    assert "without backing format" in cowferry(
        "create", "-f", "qcow2", "-b", "base.raw", tmp_path / "c.qcow2", code=1
    )


def test_names_inside_images_lead_nowhere_but_to_files(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    cowferry("create", "-q", "-f", "qcow2", path, "1M")
    node = opening.open_image(str(path))
    node.set_backing('json:{"driver":"file","filename":"/etc/passwd"}', "raw")
    node.close()
    assert "is not a plain path" in cowferry("map", path, code=1)
    cowferry("info", path)


def test_a_header_that_a_guest_wrote_changes_no_format(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk", tmp_path / "x.qcow2"
    cowferry("create", "-q", "-f", "qcow2", image, "1M")
    disk.write_bytes(image.read_bytes())
    assert "its name does not say its format" in cowferry("info", disk, code=1)
    out = json.loads(cowferry("info", "-f", "raw", "--output=json", disk))
    assert out["format"] == "raw" and out["virtual-size"] == image.stat().st_size


FIELDS = {
    "cluster_bits": (20, ">I"), "size": (24, ">Q"), "crypt": (32, ">I"), "l1_size": (36, ">I"),
    "l1_offset": (40, ">Q"), "reftable_offset": (48, ">Q"), "reftable_clusters": (56, ">I"),
    "snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"), "incompatible": (72, ">Q"),
    "refcount_order": (96, ">I"), "header_length": (100, ">I"), "version": (4, ">I"),
    "backing_offset": (8, ">Q"), "backing_size": (16, ">I"),
}  # fmt: skip


def test_absurd_headers_end_with_one_line_and_little_memory(tmp_path: Path) -> None:
    """Every field at its boundaries: an answer or a clear refusal, within 512 MiB and 2 s each."""
    good = tmp_path / "good.qcow2"
    cowferry("create", "-q", "-f", "qcow2", good, "1M")
    whole = good.read_bytes()
    cases = []
    for name, (offset, code) in FIELDS.items():
        width = struct.calcsize(code) * 8
        for value in {0, 1, 2, 7, 64, 511, 1 << 16, (1 << 31) - 1, 1 << (width - 1), 2**width - 1}:
            if value >= 1 << width:
                continue
            data = bytearray(whole)
            struct.pack_into(code, data, offset, value)
            path = tmp_path / f"{name}-{value}.qcow2"
            path.write_bytes(data)
            cases.append(path)
    for length in (0, 3, 71, 103, 200, 65536, 65536 * 2):
        path = tmp_path / f"short-{length}.qcow2"
        path.write_bytes(whole[:length])
        cases.append(path)
    script = (
        "import sys, time\n"
        "from cowferry.drivers import opening\n"
        "from cowferry.errors import CowferryError\n"
        "for path in sys.argv[1:]:\n"
        "    begin = time.process_time()\n"
        "    try:\n"
        "        node = opening.open_image(path, read_only=True, backing=False)\n"
        "        buf = memoryview(bytearray(min(node.size, 1 << 16)))\n"
        "        try:\n"
        "            node.pread(buf, 0)\n"
        "        except OSError: pass\n"
        "        node.close()\n"
        "    except CowferryError as error:\n"
        "        assert chr(10) not in error.desc and len(error.desc) < 400, error.desc\n"
        "    assert time.process_time() - begin < 2, path\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))

    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, cases)],
        capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]


def test_encrypted_images_are_refused_with_one_line(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "secret.qcow2"
    made = qemu_img(
        "create", "--object", "secret,id=s,data=x", "-f", "qcow2",
        "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "1M",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "encrypted images are not supported" in cowferry("info", path, code=1)


def test_an_image_in_use_is_refused_both_ways(tmp_path: Path) -> None:
    need("qemu-io", "qemu-storage-daemon")
    path = tmp_path / "a.qcow2"
    cowferry("create", "-q", "-f", "qcow2", path, "1M")
    node = opening.open_image(str(path))
    done = subprocess.run(
        ["qemu-io", "-c", "write 0 4k", str(path)], capture_output=True, text=True
    )
    assert 'Failed to get "write" lock' in done.stdout + done.stderr
    assert qemu_img("info", path).returncode == 1
    assert qemu_img("info", "-U", path).returncode == 0
    assert "lock" in cowferry("check", path, code=1)
    cowferry("info", "-U", path)
    node.close()
    qemu = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", f"file,filename={path},node-name=f",
         "--blockdev", "qcow2,file=f,node-name=q", "--chardev", "stdio,id=m", "--monitor", "m"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert qemu.stdout is not None
        assert "QMP" in qemu.stdout.readline()
        assert "lock" in cowferry("resize", path, "2M", code=1)
        assert "lock" in cowferry("info", path, code=1)
        cowferry("info", "-U", path)
    finally:
        qemu.kill()
        qemu.communicate()
    cowferry("resize", path, "2M")
