"""QED by itself: headers that lie, damage, NEED_CHECK, room, and what may fail in between.

Clusters of 4 KiB and tables of one cluster make everything small: a table has 512 entries.
"""

from __future__ import annotations

import errno
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from chains import contents, differs, make_base
from cowferry.block import sysio
from cowferry.block.disk import Disk
from cowferry.block.node import State
from cowferry.drivers import opening
from cowferry.drivers.qed import header
from cowferry.drivers.qed.image import Qed
from cowferry.drivers.result import Result
from cowferry.errors import CowferryError, ImageError, NotSupported
from orders import failing, on_call
from test_cli_offline import cowferry

CLUSTER = 4096
SPAN = 512 * CLUSTER  # bytes of the disk in one L2 table
SIZE = 1 << 20
L1, FIRST = CLUSTER, 2 * CLUSTER  # host offsets of the L1 table and of the first regular cluster

FIELDS = {
    "magic": (0, "<I"), "cluster_size": (4, "<I"), "table_size": (8, "<I"),
    "header_size": (12, "<I"), "features": (16, "<Q"), "compat": (24, "<Q"),
    "autoclear": (32, "<Q"), "l1_offset": (40, "<Q"), "size": (48, "<Q"),
    "name_offset": (56, "<I"), "name_length": (60, "<I"),
}  # fmt: skip


def make(folder: Path, name: str = "vm.qed", size: int = SIZE, **options: Any) -> Path:
    path = folder / name
    given = {"cluster_size": CLUSTER, "table_size": 1, **options}
    opening.create_image(str(path), "qed", size, given)
    return path


def over_base(folder: Path, size: int = SIZE, **options: Any) -> tuple[Path, bytearray]:
    """An overlay on `base.raw`, and what it reads as."""
    oracle = make_base(folder, size)
    return make(folder, size=size, backing_file="base.raw", backing_fmt="raw", **options), oracle


def opened(path: Path, **how: Any) -> Qed:
    node = opening.open_image(str(path), "qed", **how)
    assert isinstance(node, Qed)
    return node


def put(image: Qed, oracle: bytearray, offset: int, data: bytes) -> None:
    image.pwrite(memoryview(data), offset)
    oracle[offset : offset + len(data)] = data


def field(path: Path, name: str, value: int | None = None) -> int:
    """A field of the header; set, if a value is given."""
    offset, code = FIELDS[name]
    with open(path, "r+b") as f:
        if value is not None:
            f.seek(offset)
            f.write(struct.pack(code, value))
        f.seek(offset)
        found: int = struct.unpack(code, f.read(struct.calcsize(code)))[0]
    return found


def entry(path: Path, at: int, value: int | None = None) -> int:
    """The table entry at a host offset; set, if a value is given."""
    with open(path, "r+b") as f:
        if value is not None:
            f.seek(at)
            f.write(struct.pack("<Q", value))
        f.seek(at)
        found: int = struct.unpack("<Q", f.read(8))[0]
    return found


def written(path: Path, clusters: int = 4) -> tuple[bytearray, int]:
    """Write the first clusters; what the disk reads as now, and where its L2 table lies."""
    image = opened(path)
    oracle = contents(image)
    put(image, oracle, 0, random.Random(1).randbytes(clusters * CLUSTER))
    opening.close_chain(image)
    return oracle, entry(path, L1)


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


def check(path: Path, fix: Literal["leaks", "all"] | None = None) -> Result:
    """As `cowferry check` does it."""
    image = opened(path, read_only=fix is None, repair=fix is not None, backing=False)
    try:
        return image.check(fix)
    finally:
        image.close()


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


def test_an_entry_that_is_no_place_is_dropped_by_a_repair_and_others_stay(tmp_path: Path) -> None:
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
        assert (found.leaks, found.leaks_fixed) == ((0, 5) if "table" in kind else (1, 0))
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


# NEED_CHECK ------------------------------------------------------------------------------------


def test_it_is_durable_before_the_first_table_and_gone_when_all_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path)
    image = opened(path)
    oracle = bytearray(SIZE)
    order: list[tuple[str, int]] = []
    plain, sync = sysio.pwrite, sysio.fdatasync

    def pwrite(fd: int, buf: Any, offset: int) -> None:
        order.append(("write", offset))
        plain(fd, buf, offset)

    def fdatasync(fd: int) -> None:
        order.append(("flush", 0))
        sync(fd)

    monkeypatch.setattr(sysio, "pwrite", pwrite)
    monkeypatch.setattr(sysio, "fdatasync", fdatasync)
    put(image, oracle, 0, b"a" * CLUSTER)
    assert field(path, "features") == 0
    image.flush()
    flush = ("flush", 0)
    table = ("write", 3 * CLUSTER)
    assert order == [("write", FIRST), ("write", 0), flush, table, flush, ("write", L1), flush]
    assert field(path, "features") == header.NEED_CHECK
    put(image, oracle, CLUSTER, b"b" * CLUSTER)
    order.clear()
    image.close()
    assert order[-3:] == [flush, ("write", 0), flush] and order.count(table) == 1
    assert field(path, "features") == 0


def test_reads_and_writes_in_place_need_no_check(tmp_path: Path) -> None:
    path = make(tmp_path)
    oracle, _ = written(path)
    image = opened(path)
    put(image, oracle, 100, b"x" * CLUSTER)
    image.zero(CLUSTER, 700, unmap=True)
    image.discard(2 * CLUSTER, CLUSTER)
    image.flush()
    assert field(path, "features") == 0 and not image.unflushed
    image.close()


def test_a_writer_that_crashed_before_the_file_had_grown(tmp_path: Path) -> None:
    """Its entries point beyond the end. Nothing had been promised, so they are dropped."""
    path = make(tmp_path)
    written(path, 1)
    oracle, l2 = written(path, 6)
    with open(path, "r+b") as f:  # the last two clusters never came, half of one did
        f.truncate(path.stat().st_size - 2 * CLUSTER + 1000)
    oracle[4 * CLUSTER : 6 * CLUSTER] = bytes(2 * CLUSTER)
    field(path, "features", header.NEED_CHECK)
    before = path.read_bytes()
    image = opened(path, read_only=True)
    buf = memoryview(bytearray(CLUSTER))
    image.pread(buf, 3 * CLUSTER)
    with pytest.raises(OSError):
        image.pread(buf, 4 * CLUSTER)
    image.close()
    assert path.read_bytes() == before
    image = opened(path)
    assert field(path, "features") == 0
    assert not differs(contents(image), oracle)
    put(image, oracle, 5 * CLUSTER, b"new" * 1000)
    image.close()
    assert check(path).exit_code == 0
    assert entry(path, l2 + 8 * 4) == 0


def test_leaks_at_the_end_are_cut_off_and_others_are_told(tmp_path: Path) -> None:
    path = make(tmp_path)
    oracle, l2 = written(path, 4)
    tight = path.stat().st_size
    with open(path, "ab") as f:
        f.write(b"junk" * 5000)
    assert check(path).exit_code == 3
    assert check(path, "leaks").exit_code == 0
    assert path.stat().st_size == tight
    with open(path, "ab") as f:
        f.write(b"junk" * 5000)
    field(path, "features", header.NEED_CHECK)
    image = opened(path)
    assert path.stat().st_size == tight and not differs(contents(image), oracle)
    image.close()
    entry(path, l2 + 8, 0)
    assert "1 leaked clusters" in cowferry("check", "-r", "all", path, code=3)


def test_a_file_whose_end_is_not_aligned_is_read_and_grows_behind_it(tmp_path: Path) -> None:
    path = make(tmp_path)
    oracle, _ = written(path)
    with open(path, "ab") as f:
        f.write(b"tail" * 300)
    size = path.stat().st_size
    image = opened(path)
    assert not differs(contents(image), oracle)
    put(image, oracle, 9 * CLUSTER + 5, b"more")
    image.close()
    assert path.read_bytes()[size - 1200 : size] == b"tail" * 300
    assert path.stat().st_size % CLUSTER == 0
    image = opened(path)
    assert not differs(contents(image), oracle)
    assert image.check().leaks == 1
    image.close()


# Room ------------------------------------------------------------------------------------------


def test_room_that_was_not_needed_is_used_next_and_what_is_left_goes_back_to_the_host(
    tmp_path: Path,
) -> None:
    path, oracle = over_base(tmp_path)
    image = opened(path)
    room = image.reserve(0, 4 * CLUSTER)
    assert room is not None and sum(r.length for r in room) == 4 * CLUSTER
    for r in room:
        sysio.pwrite(r.fd, b"old bytes of nobody.." * 780, r.host)
        image.unreserve(r)
    put(image, oracle, 100, b"in the first of them")  # its rest comes from below, not from before
    put(image, oracle, SIZE - 10, b"0123456789")
    image.close()
    image = opened(path)
    assert not differs(contents(image), oracle)
    assert image.check().leaks == 2  # between the data and the table that came later
    assert path.stat().st_blocks * 512 <= path.stat().st_size - 2 * CLUSTER
    opening.close_chain(image)


def test_reserved_room_is_filled_and_linked(tmp_path: Path) -> None:
    path, oracle = over_base(tmp_path, SIZE + 512)
    image = opened(path)
    at = SIZE - 4 * CLUSTER
    for r in image.reserve(at, SIZE + 512 - at) or []:
        sysio.pwrite(r.fd, b"w" * r.length, r.host)
        image.link(at, r)
        oracle[at : at + r.length] = b"w" * r.length
        at += r.length
    assert at == SIZE + 512 and not differs(contents(image), oracle)
    image.resize(SIZE + CLUSTER)
    oracle.extend(bytes(CLUSTER - 512))
    assert not differs(contents(image), oracle)
    opening.close_chain(image)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_changes_nothing_and_its_room_is_used_again(
    tmp_path: Path, code: int
) -> None:
    path, oracle = over_base(tmp_path)
    image = opened(path)
    for offset, data in ((0, b"w" * 3 * CLUSTER), (5000, b"part")):
        with pytest.MonkeyPatch.context() as patch:
            on_call(patch, sysio, "pwrite", failing(code))
            with pytest.raises(OSError):
                image.pwrite(memoryview(data), offset)
        assert not differs(contents(image), oracle)
    put(image, oracle, 0, b"w" * 3 * CLUSTER)
    image.close()
    assert opened(path, read_only=True).check().leaks == 0


def test_E2_a_flush_that_fails_at_any_step_forgets_nothing(tmp_path: Path) -> None:
    step = 0
    while True:
        step += 1
        (tmp_path / str(step)).mkdir()
        path, oracle = over_base(tmp_path / str(step))
        image = opened(path)
        put(image, oracle, 0, b"1" * CLUSTER)
        with pytest.MonkeyPatch.context() as patch:
            on_call(patch, sysio, "pwrite", failing(errno.ENOSPC), step)
            try:
                image.flush()
            except OSError:
                failed = True
            else:
                failed = False
        put(image, oracle, 3 * CLUSTER, b"2" * 100)
        assert not differs(contents(image), oracle)
        image.flush()
        image.close()
        image = opened(path)
        assert not differs(contents(image), oracle) and image.check().exit_code == 0
        opening.close_chain(image)
        if not failed:
            assert step == 4  # the header, a page, the L1 entry
            return


def test_N6_a_failed_flush_is_sticky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    disk = Disk(opened(path), "vm")
    disk.pwrite(memoryview(b"x" * 4096), 0)
    with monkeypatch.context() as patch:
        patch.setattr(sysio, "fdatasync", _broken)
        with pytest.raises(OSError):
            disk.flush()
    for _ in range(2):
        with pytest.raises(OSError) as error:
            disk.flush()
        assert error.value.errno == errno.EIO
    with pytest.raises(OSError):
        opening.close_chain(disk.root)


def _broken(fd: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


# Zeroes, sizes, pages --------------------------------------------------------------------------


def states(image: Qed) -> list[tuple[int, State]]:
    return [(e.length // CLUSTER, e.state) for e in image.extents(0, image.size)]


def test_ST4_zeroes_and_discards_never_show_the_backing(tmp_path: Path) -> None:
    path, oracle = over_base(tmp_path, 8 * CLUSTER)
    image = opened(path)
    put(image, oracle, 0, b"d" * CLUSTER)
    image.zero(0, 3 * CLUSTER)
    image.discard(4 * CLUSTER, CLUSTER)
    oracle[: 3 * CLUSTER] = bytes(3 * CLUSTER)
    oracle[4 * CLUSTER : 5 * CLUSTER] = bytes(CLUSTER)
    assert states(image) == [
        (1, State.DATA), (2, State.ZERO), (1, State.HOLE), (1, State.ZERO), (3, State.HOLE),
    ]  # fmt: skip
    image.zero(5 * CLUSTER + 100, 2 * CLUSTER)  # parts of two, and one between
    oracle[5 * CLUSTER + 100 : 7 * CLUSTER + 100] = bytes(2 * CLUSTER)
    assert not differs(contents(image), oracle)
    put(image, oracle, CLUSTER + 7, b"into a zero cluster")
    assert not differs(contents(image), oracle)
    opening.close_chain(image)
    image = opened(path)
    assert not differs(contents(image), oracle) and image.check().exit_code == 0
    opening.close_chain(image)


def test_zeroes_without_a_backing_file_take_no_room(tmp_path: Path) -> None:
    path = make(tmp_path)
    size = path.stat().st_size
    image = opened(path)
    image.zero(0, SIZE)
    image.discard(0, SIZE)
    image.zero(1000, 5000)
    image.close()
    assert path.stat().st_size == size


def test_what_is_discarded_goes_back_to_the_host(tmp_path: Path) -> None:
    path = make(tmp_path, cluster_size="64k", size=8 << 20)
    image = opened(path)
    image.pwrite(memoryview(b"x" * (8 << 20)), 0)
    image.flush()
    full = path.stat().st_blocks
    image.discard(1 << 20, 6 << 20)
    image.flush()
    assert path.stat().st_blocks * 512 < (full * 512) - (5 << 20)  # of 6; extents cost blocks, too
    assert image.check().leaks == 0
    image.close()


@pytest.mark.parametrize("below", [SIZE - 3000, SIZE + 3000, SIZE + 5 * CLUSTER + 512])
@pytest.mark.parametrize("size", [SIZE - 512, SIZE - CLUSTER, SIZE - 7 * 512])
def test_what_a_disk_grows_by_reads_as_zero_whatever_lies_below(
    tmp_path: Path, size: int, below: int
) -> None:
    oracle = make_base(tmp_path, below)[:size].ljust(size, b"\0")
    path = make(tmp_path, size=size, backing_file="base.raw", backing_fmt="raw")
    for start in (0, 1):  # with its last cluster in place, and without
        image = opened(path)
        if start:
            put(image, oracle, image.size - 100, b"e" * 100)
        bigger = image.size + 3 * CLUSTER + 512
        image.resize(bigger)
        oracle.extend(bytes(bigger - len(oracle)))
        assert not differs(contents(image), oracle)
        opening.close_chain(image)
        image = opened(path, read_only=True)
        assert not differs(contents(image), oracle) and image.check().exit_code == 0
        opening.close_chain(image)


def test_entries_beyond_the_end_of_the_disk_do_not_become_its_bytes(tmp_path: Path) -> None:
    path = make(tmp_path, size=2 * CLUSTER)
    _, l2 = written(path, 2)
    entry(path, l2 + 8 * 5, entry(path, l2))
    entry(path, L1 + 8, l2)
    image = opened(path)
    image.resize(2 * SPAN)
    assert not any(contents(image)[2 * CLUSTER :])
    image.close()
    assert entry(path, l2 + 8 * 5) == 0 and entry(path, L1 + 8) == 0
    assert check(path).exit_code == 0


def test_it_cannot_shrink_nor_outgrow_its_tables(tmp_path: Path) -> None:
    image = opened(make(tmp_path))
    with pytest.raises(NotSupported, match="cannot be made smaller"):
        image.resize(SIZE - 512)
    with pytest.raises(CowferryError, match="its tables can map"):
        image.resize((1 << 30) + 512)
    image.resize(SIZE + 1)
    assert image.size == SIZE + 512
    image.resize(1 << 30)
    image.close()


def test_tables_are_read_in_pages_and_few_are_kept(tmp_path: Path) -> None:
    """A table of 256 KiB has four pages; only those that changed are written."""
    path = make(tmp_path, size=16 << 30, cluster_size="64k", table_size=4)
    image = opened(path)
    image.tables.keep = 3
    rnd = random.Random(5)
    wrote = {}
    for _ in range(60):
        at = rnd.randrange(16 << 30) // 512 * 512
        wrote[at] = rnd.randbytes(512)
        image.pwrite(memoryview(wrote[at]), at)
        if rnd.random() < 0.2:
            image.flush()
            image.extents(0, image.size)
            assert len(image.tables.pages) <= 4
    for _ in range(2):
        for at, data in wrote.items():
            buf = memoryview(bytearray(512))
            image.pread(buf, at)
            assert bytes(buf) == data
        image.close()
        image = opened(path)
        image.tables.keep = 3
    assert image.check().exit_code == 0
    image.close()


def test_clusters_of_64_MiB_are_copied_on_write_in_pieces(tmp_path: Path) -> None:
    size = (64 << 20) + 512
    with open(tmp_path / "base.raw", "wb") as f:
        f.write(b"head" * 100_000)
        f.truncate(size)
    path = make(
        tmp_path, size=size, cluster_size="64M", table_size=16,
        backing_file="base.raw", backing_fmt="raw",
    )  # fmt: skip
    oracle = bytearray((tmp_path / "base.raw").read_bytes())
    image = opened(path)
    put(image, oracle, (3 << 20) - 7, b"across two pieces" * 10)
    assert not differs(contents(image), oracle)
    opening.close_chain(image)
    assert path.stat().st_blocks * 512 < 8 << 20
    image = opened(path, read_only=True)
    assert not differs(contents(image), oracle) and image.check().exit_code == 0
    opening.close_chain(image)


def test_a_device_or_a_file_too_large_is_refused_with_one_line(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open(path, "r+b") as f:
        f.truncate(5 << 40)
    assert "too large to be checked" in cowferry("check", path, code=1)
    with pytest.raises(ImageError, match="is a device"):
        opening.create_image("/dev/null", "qed", SIZE, {})


def test_access_changes_and_the_image_is_clean_whenever_nobody_writes(tmp_path: Path) -> None:
    path, oracle = over_base(tmp_path)
    image = opened(path)
    put(image, oracle, 0, b"one")
    image.reopen(True)
    assert field(path, "features") == header.BACKING_FILE | header.RAW_BACKING
    with pytest.raises(OSError, match="read-only"):
        image.pwrite(memoryview(b"x"), 0)
    image.reopen(False)
    put(image, oracle, CLUSTER, b"two")
    assert not differs(contents(image), oracle)
    opening.close_chain(image)
    image = opened(path)
    assert not differs(contents(image), oracle) and image.check().exit_code == 0
    opening.close_chain(image)
