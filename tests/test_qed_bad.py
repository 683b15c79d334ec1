"""QED headers that lie, and damage: one clear line, in little memory, and nothing is written."""

from __future__ import annotations

import errno
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chains import contents, differs, make_base
from cowferry.drivers import opening
from cowferry.drivers.qed import header
from cowferry.errors import CowferryError, ImageError
from qeds import (
    CLUSTER,
    FIELDS,
    L1,
    SIZE,
    SPAN,
    check,
    entry,
    field,
    make,
    opened,
    over_base,
    written,
)
from test_cli_offline import cowferry

# The header ------------------------------------------------------------------------------------


def test_every_field_at_its_boundaries_is_an_answer_or_one_line_in_little_memory(
    tmp_path: Path,
) -> None:
    good = make(tmp_path, "good.qed", backing_file="base.raw", backing_fmt="raw")
    make_base(tmp_path, SIZE)
    written(good)
    whole = good.read_bytes()
    cases = []
    for name, (offset, code) in FIELDS.items():
        bits = struct.calcsize(code) * 8
        values = {0, 1, 2, 3, 16, 17, 63, 64, 511, 512, 1023, 1024, 4095, 4096, 8192, 1 << 16}
        values |= {1 << 26, 1 << 27, (1 << 31) - 1, 1 << bits - 2, 1 << bits - 1, (1 << bits) - 1}
        for value in values:
            data = bytearray(whole)
            struct.pack_into(code, data, offset, value)
            path = tmp_path / f"{name}-{value}.qed"
            path.write_bytes(data)
            cases.append(path)
    for length in (0, 3, 63, 64, 65, 4096, 8191, 8192, 8200):
        path = tmp_path / f"short-{length}.qed"
        path.write_bytes(whole[:length])
        cases.append(path)
    for cluster, table in ((1 << 26, 16), (1 << 20, 16), (4096, 16)):  # large tables, huge disks
        data = bytearray(64)
        size = min((table * cluster // 8) ** 2 * cluster, 1 << 62)
        header.LAYOUT.pack_into(
            data, 0, b"QED\0", cluster, table, 1, header.NEED_CHECK, 0, 0, cluster, size, 0, 0
        )
        path = tmp_path / f"large-{cluster}.qed"
        path.write_bytes(data)
        with open(path, "r+b") as f:
            f.truncate((1 + 3 * table) * cluster)
            f.seek(cluster)
            f.write(struct.pack("<Q", (1 + table) * cluster))
        cases.append(path)
    path = tmp_path / "garbage.qed"
    make(tmp_path, path.name, 4 << 30, cluster_size="64k", table_size=16)
    with open(path, "r+b") as f:  # a table of nothing but what can be no place
        f.seek(64 << 10)
        f.write(struct.pack("<Q", 17 << 16))
        f.seek(17 << 16)
        f.write(random.Random(1).randbytes(512 << 10))
        f.truncate(33 << 16)
    field(path, "features", header.NEED_CHECK)
    cases.append(path)
    script = (
        "import sys, time\n"
        "from cowferry.drivers import opening\n"
        "from cowferry.errors import CowferryError\n"
        "for path in sys.argv[1:]:\n"
        "    for read_only in (True, False):\n"
        "        begin = time.process_time()\n"
        "        try:\n"
        "            node = opening.open_image(path, read_only=read_only, backing=False)\n"
        "            buf = memoryview(bytearray(min(node.size, 1 << 16)))\n"
        "            try:\n"
        "                node.pread(buf, 0)\n"
        "                node.check()\n"
        "            except OSError: pass\n"
        "            node.close()\n"
        "        except CowferryError as error:\n"
        "            assert chr(10) not in error.desc and len(error.desc) < 400, error.desc\n"
        "            assert path in error.desc, error.desc\n"
        "        assert time.process_time() - begin < 2, path\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))

    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, cases)],
        capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("magic", 0x00444552, "not in QED format"),
        ("cluster_size", 2048, "invalid cluster size"),
        ("cluster_size", 128 << 20, "invalid cluster size"),
        ("cluster_size", 12288, "invalid cluster size"),
        ("table_size", 0, "invalid table size"),
        ("table_size", 3, "invalid table size"),
        ("table_size", 32, "invalid table size"),
        ("header_size", 0, "invalid header size"),
        ("header_size", 2, "L1 table has the invalid offset"),
        ("features", 8, "unsupported QED feature.s.: bit 3"),
        ("features", 1 << 63, "unsupported QED feature.s.: bit 63"),
        ("l1_offset", 0, "L1 table has the invalid offset"),
        ("l1_offset", 4097, "L1 table has the invalid offset"),
        ("l1_offset", 1 << 40, "lies beyond the end of the file"),
        ("size", 1000, "no multiple of 512"),
        ("size", 1 << 40, "absurd size"),
        ("name_offset", 8, "outside the header's clusters"),
        ("name_offset", 4095, "outside the header's clusters"),
        ("name_length", 1024, "is too long"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path, name: str, value: int, said: str
) -> None:
    path, _ = over_base(tmp_path)
    field(path, name, value)
    before = path.read_bytes()
    with pytest.raises(ImageError, match=said):
        opened(path)
    assert path.read_bytes() == before


def test_a_name_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    path, _ = over_base(tmp_path)
    image = opened(path)
    image.set_backing('json:{"driver":"file","filename":"/etc/passwd"}', "raw")
    opening.close_chain(image)
    with pytest.raises(ImageError, match="not a plain path"):
        opened(path)
    assert "/etc/passwd" in cowferry("info", path)


def test_fields_without_their_feature_say_nothing(tmp_path: Path) -> None:
    path = make(tmp_path)
    field(path, "name_offset", 0xFFFFFFFF)
    field(path, "name_length", 0xFFFFFFFF)
    field(path, "compat", 0xFFFFFFFF)
    image = opened(path)
    assert image.backing_spec is None
    image.set_backing("base.raw", "raw")
    image.close()
    assert field(path, "compat") == 0xFFFFFFFF
    assert opened(path, read_only=True, backing=False).backing_spec == ("base.raw", "raw")


def test_unknown_autoclear_bits_go_before_the_first_write_and_not_for_a_reader(
    tmp_path: Path,
) -> None:
    path = make(tmp_path)
    field(path, "autoclear", 5)
    opened(path, read_only=True).close()
    assert field(path, "autoclear") == 5
    image = opened(path)
    assert field(path, "autoclear") == 0
    image.close()


@pytest.mark.parametrize("names", [("a", "b" * 400, "c"), ("x" * 1023, "y" * 1000, "z" * 1023)])
def test_backing_names_of_any_length_replace_each_other(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    path = make(tmp_path)
    for name in names:
        image = opened(path, backing=False)
        image.set_backing(name, "raw")
        image.close()
        again = opened(path, backing=False, read_only=True)
        assert again.backing_spec == (name, "raw")
        again.close()


def test_what_a_header_cannot_record_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path, _ = over_base(tmp_path)
    image = opened(path)
    before = path.read_bytes()
    for name, format in (
        ("disk.img", "qcow2"), ("disk.qed", "qcow2"), ("disk.raw", "qed"), ("disk", None),
        ("n" * 1024, "raw"),
    ):  # fmt: skip
        with pytest.raises(CowferryError):
            image.set_backing(name, format)
        with pytest.raises(CowferryError):
            image.check_backing(name, format)
    assert path.read_bytes() == before
    assert image.backing_spec == ("base.raw", "raw")
    for name, format in (("disk.qcow2", "qcow2"), ("d.QED", "qed"), ("disk.qcow2", "raw")):
        image.set_backing(name, format)
        assert image.backing_spec == (name, format)
    opening.close_chain(image)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 2048}, {"cluster_size": 5000}, {"cluster_size": "128M"},
        {"table_size": 0}, {"table_size": 5}, {"table_size": 32}, {"cluster_size": "x"},
        {"preallocation": "full"}, {"backing_file": "b.img", "backing_fmt": "qcow2"},
        {"backing_file": "b.qcow2"},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_made_is_refused_and_leaves_no_file(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CowferryError):
        make(tmp_path, **options)
    with pytest.raises(CowferryError, match="bytes at most"):
        make(tmp_path, size=(1 << 30) + 1)
    assert list(tmp_path.iterdir()) == []


# Damage ----------------------------------------------------------------------------------------

Damage = Callable[[Path, int], None]
DAMAGE: dict[str, tuple[str, Damage]] = {
    "unaligned": ("invalid offset", lambda p, l2: void(entry(p, l2, entry(p, l2) + 512))),
    "reserved bit": ("invalid offset", lambda p, l2: void(entry(p, l2, entry(p, l2) | 2))),
    "in the header": ("invalid offset", lambda p, l2: void(entry(p, l2, 2))),
    "beyond the end": ("invalid offset", lambda p, l2: void(entry(p, l2, 1 << 40))),
    "far beyond": ("invalid offset", lambda p, l2: void(entry(p, l2, (1 << 64) - CLUSTER))),
    "in the L1 table": ("in a table", lambda p, l2: void(entry(p, l2, L1))),
    "in its own table": ("in a table", lambda p, l2: void(entry(p, l2, l2))),
    "a table unaligned": ("invalid offset", lambda p, l2: void(entry(p, L1, l2 + 8))),
    "a table beyond": ("invalid offset", lambda p, l2: void(entry(p, L1, 1 << 50))),
    "a table in the header": ("invalid offset", lambda p, l2: void(entry(p, L1, 1))),
    "the L1 table itself": ("invalid offset", lambda p, l2: void(entry(p, L1, L1))),
    "a table twice": ("invalid offset", lambda p, l2: void(entry(p, L1 + 8, l2))),
}


def void(_: object) -> None:
    """An expression as a statement."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_ends_in_EIO_for_its_own_range_and_in_no_more_writes(
    tmp_path: Path, kind: str
) -> None:
    said, damage = DAMAGE[kind]
    path = make(tmp_path, size=4 * SPAN)
    image = opened(path)
    image.pwrite(memoryview(b"q" * CLUSTER), 3 * SPAN)
    image.close()
    _, l2 = written(path)
    damage(path, l2)
    before = path.read_bytes()
    image = opened(path)
    buf = memoryview(bytearray(CLUSTER))
    image.pread(buf, 3 * SPAN)
    assert bytes(buf) == b"q" * CLUSTER
    for _ in range(2):
        with pytest.raises(OSError, match=said) as error:
            image.pread(buf, 0)
        assert error.value.errno == errno.EIO
    writes: list[Callable[[], object]] = [
        lambda: image.pwrite(buf, 3 * SPAN),
        lambda: image.zero(3 * SPAN, CLUSTER),
        lambda: image.discard(3 * SPAN, CLUSTER),
        lambda: image.reserve(0, CLUSTER),
        lambda: image.resize(5 * SPAN),
        lambda: image.set_backing(None, None),
    ]
    for write in writes:
        with pytest.raises(OSError, match="not writing"):
            write()
    assert not any(e.writable for e in image.extents(3 * SPAN, CLUSTER))
    image.close()
    assert path.read_bytes() == before
    assert check(path).exit_code == 2


def test_an_entry_that_is_no_place_is_cleared_by_a_repair_and_others_stay(tmp_path: Path) -> None:
    for number, kind in enumerate(("unaligned", "in the header", "a table beyond")):
        path = make(tmp_path, f"{number}.qed")
        oracle, l2 = written(path)
        DAMAGE[kind][1](path, l2)
        found = check(path)
        assert found.exit_code == 2 and "invalid offset" in found.messages[0]
        assert check(path, "leaks").exit_code == 2
        lost = 4 * CLUSTER if "table" in kind else CLUSTER
        found = check(path, "all")
        assert (found.corruptions, found.corruptions_fixed) == (0, 1)
        assert (found.leaks, found.leaks_fixed) == ((5 if "table" in kind else 1), 0)
        assert "cleared" in found.repairs[0] and "left alone" in found.repairs[1]
        oracle[:lost] = bytes(lost)
        image = opened(path)
        assert not differs(contents(image), oracle)
        image.close()


def test_a_cluster_of_two_owners_is_told_and_left_to_a_person(tmp_path: Path) -> None:
    path = make(tmp_path)
    oracle, l2 = written(path)
    entry(path, l2 + 8, entry(path, l2))
    field(path, "features", header.NEED_CHECK)
    assert "where something else lies, too" in cowferry("check", path, code=2)
    with pytest.raises(ImageError, match="not closed cleanly and is damaged") as refused:
        opened(path)
    assert "cowferry check" in refused.value.hint
    assert check(path, "all").exit_code == 2
    assert field(path, "features") == header.NEED_CHECK
    assert "damaged" in cowferry("resize", path, "2M", code=1)
    image = opened(path, read_only=True)
    oracle[CLUSTER : 2 * CLUSTER] = oracle[:CLUSTER]
    assert contents(image) == oracle
    image.close()


def test_a_table_of_two_owners_is_told_and_no_part_of_it_is_mended(tmp_path: Path) -> None:
    path = make(tmp_path, size=2 * SPAN)
    _, l2 = written(path)
    entry(path, L1 + 8, l2)
    entry(path, l2, 3)
    before = path.read_bytes()
    found = check(path, "all")
    assert found.corruptions == 2 and "lies over another table" in found.messages[0]
    assert path.read_bytes() == before
