"""The daemon: disks, exports, streams and its life, in this process and as a program."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cowferry.daemon
import nbd_servers
from chains import contents, differs, make_base, overlay
from cowferry.block import chores
from cowferry.cli.client import Client
from cowferry.cli.serve import serve_command
from cowferry.drivers import opening
from cowferry.drivers.nbd_client import NbdClient
from cowferry.errors import CowferryError, DeviceInUse, DeviceNotFound, NotSupported
from cowferry.operations import stream
from daemons import PATIENCE, Told, a_daemon, chain_of, environment, program
from tests_support import need

SIZE = 4 << 20
SLOW = 64 << 10  # bytes a second: such a stream is still running when a test looks at it


def image_bytes(path: Path, **options: Any) -> bytearray:
    node = opening.open_image(str(path), **options)
    try:
        return contents(node)
    finally:
        opening.close_chain(node)


def checked(path: Path) -> None:
    need("qemu-img")
    done = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Streams ---------------------------------------------------------------------------------


def test_two_disks_stream_at_once_and_one_is_cancelled(tmp_path: Path) -> None:
    oracle = chain_of(tmp_path, "a", SIZE)
    overlay(tmp_path, "b.qcow2", "base.raw", "raw", SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        for name in ("a", "b"):
            daemon.open_disk(name, str(tmp_path / f"{name}.qcow2"))
            stream.start(daemon, name, speed=SLOW)
        both = daemon.execute("query-block-jobs", {})
        assert {j["device"]: j["status"] for j in both} == {"a": "running", "b": "running"}
        daemon.execute("job-cancel", {"id": "a"})
        told.wait("BLOCK_JOB_CANCELLED", device="a")
        daemon.execute("block-job-set-speed", {"device": "b", "speed": 0})
        done = told.wait("BLOCK_JOB_COMPLETED", device="b")
        assert "error" not in done and done["offset"] == done["len"] == SIZE
        told.wait("JOB_STATUS_CHANGE", id="b", status="null")
        assert daemon.graph.disk("a").root.backing is not None
        assert contents(daemon.graph.disk("a")) == oracle
    assert image_bytes(tmp_path / "a.qcow2") == oracle
    (tmp_path / "base.raw").unlink()
    assert differs(image_bytes(tmp_path / "b.qcow2"), oracle) == ""
    with pytest.raises(CowferryError, match=r"base\.raw"):
        image_bytes(tmp_path / "a.qcow2")
    checked(tmp_path / "b.qcow2")


def test_stream_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    chain_of(tmp_path, "vm", SIZE)
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        daemon.open_disk("raw", str(tmp_path / "base.raw"), read_only=True)
        daemon.graph.add_node(
            {**opening.image_options(str(tmp_path / "vm.qcow2"), read_only=True,
                                     force_share=True), "node-name": "ro"}
        )  # fmt: skip

        def refusal(kind: type[CowferryError], device: str, **options: Any) -> str:
            with pytest.raises(kind) as error:
                stream.start(daemon, device, **options)
            assert type(error.value) is kind
            assert not daemon.jobs.all() and not daemon.graph.claims
            return error.value.desc

        assert refusal(DeviceNotFound, "nope") == "Device 'nope' not found"
        assert "raw image" in refusal(NotSupported, "raw")
        assert "read-only" in refusal(NotSupported, "ro", job_id="j")
        assert refusal(CowferryError, "vm", base_node="x") == (
            "Node 'x' is not a backing image of 'vm'"
        )
        assert "cannot be specified" in refusal(CowferryError, "vm", base="a", bottom="b")
        assert refusal(CowferryError, "vm", backing_file="x") == (
            "backing file specified, but streaming the entire chain"
        )
        assert refusal(CowferryError, "vm", speed=-1) == (
            "Parameter 'speed' expects a non-negative value"
        )
        assert refusal(CowferryError, "vm", job_id="9") == "Invalid job ID '9'"


def test_a_streaming_disk_refuses_a_second_stream_and_a_resize(tmp_path: Path) -> None:
    chain_of(tmp_path, "vm", SIZE)
    with a_daemon() as daemon:
        daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        job = stream.start(daemon, "vm", speed=SLOW)
        with pytest.raises(DeviceInUse):
            stream.start(daemon, "vm", job_id="other")
        with pytest.raises(DeviceInUse) as error:
            daemon.resize("vm", 2 * SIZE)
        assert error.value.desc.endswith(
            f"is busy: block device is in use by block job: stream '{job.id}', "
            "which excludes a resize"
        )
        job.cancel()
        assert job.wait(PATIENCE)
        daemon.resize("vm", 2 * SIZE)
        assert daemon.graph.disk("vm").size == 2 * SIZE


@pytest.mark.parametrize("by", ["base", "base_node", "bottom"])
def test_stream_down_to_a_base_keeps_the_base(tmp_path: Path, by: str) -> None:
    oracle = chain_of(tmp_path, "sn1", SIZE)
    overlay(tmp_path, "vm.qcow2", "sn1.qcow2", "qcow2", SIZE)
    with a_daemon() as daemon:
        disk = daemon.open_disk("sn1", str(tmp_path / "sn1.qcow2"))
        disk.pwrite(memoryview(b"s" * 70000), 65536)
        oracle[65536 : 65536 + 70000] = b"s" * 70000
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        sn1 = disk.root.backing
        assert sn1 is not None and sn1.backing is not None
        base = sn1.backing
        given = {"base": "base.raw", "base_node": base.name, "bottom": sn1.name}[by]
        stream.start(daemon, "vm", **{by: given})  # type: ignore[arg-type]
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="vm")
        told.wait("JOB_STATUS_CHANGE", id="vm", status="null")
        assert disk.root.backing is base
        assert sn1.name not in daemon.graph.nodes and base.name in daemon.graph.nodes
        assert contents(disk) == oracle
    (tmp_path / "sn1.qcow2").unlink()
    assert image_bytes(tmp_path / "vm.qcow2") == oracle


# Exports ---------------------------------------------------------------------------------


def test_an_export_follows_its_disk_through_a_stream(tmp_path: Path) -> None:
    oracle = chain_of(tmp_path, "vm", SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        server = daemon.start_nbd({"type": "unix", "path": str(tmp_path / "s")})
        daemon.add_export(disk, "vm")
        before = daemon.execute("query-block-exports", {})
        with NbdClient(server.uri("vm")) as client:
            stream.start(daemon, "vm", speed=SLOW)
            client.pwrite(b"g" * 5000, 123456)
            oracle[123456 : 123456 + 5000] = b"g" * 5000
            daemon.execute("block-job-set-speed", {"device": "vm", "speed": 0})
            told.wait("BLOCK_JOB_COMPLETED", device="vm")
            (tmp_path / "base.raw").unlink()
            assert differs(client.pread(SIZE, 0), oracle) == ""
            client.pwrite(b"h" * 512, 0)
            oracle[:512] = b"h" * 512
        assert daemon.execute("query-block-exports", {}) == before
    assert image_bytes(tmp_path / "vm.qcow2") == oracle


def test_an_export_in_use_goes_only_hard_and_says_so_when_it_is_gone(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("d", str(tmp_path / "base.raw"))
        server = daemon.start_nbd({"type": "unix", "data": {"path": str(tmp_path / "s")}})
        daemon.add_export(disk, "d")
        with NbdClient(server.uri("d")) as client:
            client.pread(512, 0)
            with pytest.raises(CowferryError, match="export 'd' still in use"):
                daemon.execute("block-export-del", {"id": "d"})
            client.pread(512, 0)  # a refusal leaves the client alone
            daemon.execute("block-export-del", {"id": "d", "mode": "hard"})
            told.wait("BLOCK_EXPORT_DELETED", id="d")
            assert daemon.execute("query-block-exports", {}) == []
            assert not daemon.graph.users
            with pytest.raises(OSError):
                client.pread(512, 0)
        daemon.add_export(disk, "d")
        daemon.execute("nbd-server-stop", {})
        told.wait("BLOCK_EXPORT_DELETED", id="d")
        assert told.queue.empty(), "one deletion, one event"
        assert not (tmp_path / "s").exists()


def test_nbd_server_addresses(tmp_path: Path) -> None:
    with a_daemon() as daemon:

        def refusal(**arguments: Any) -> str:
            with pytest.raises(CowferryError) as error:
                daemon.execute("nbd-server-start", arguments)
            assert daemon.nbd is None
            return error.value.desc

        assert refusal() == "Parameter 'addr' is missing"
        assert refusal(addr={}) == "Parameter 'addr.type' is missing"
        assert refusal(addr={"type": "unix", "data": {}}) == "Parameter 'addr.path' is missing"
        vsock = refusal(addr={"type": "vsock", "cid": "1", "port": "1"})
        assert vsock == "Parameter 'addr.type' does not accept value 'vsock'"
        assert "tls-creds" in refusal(
            **{"addr": {"type": "unix", "path": str(tmp_path / "s")}, "tls-creds": "t"}
        )
        assert "too long" in refusal(addr={"type": "unix", "path": "/" + "x" * 200})
        inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        daemon.execute("nbd-server-start", {"addr": inet, "max-connections": 3})
        assert daemon.nbd is not None and daemon.nbd.max_connections == 3
        assert daemon.nbd.uri("x").startswith("nbd://127.0.0.1:")


# Sizes -----------------------------------------------------------------------------------


def test_the_file_below_a_format_cannot_be_resized(tmp_path: Path) -> None:
    oracle = chain_of(tmp_path, "vm", SIZE)
    with a_daemon() as daemon:
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        assert disk.root.file is not None and disk.root.backing is not None
        before = (tmp_path / "vm.qcow2").stat().st_size
        for node in (disk.root.file, disk.root.backing):
            with pytest.raises(CowferryError, match=r"Image '.*' is busy: node is used as"):
                daemon.execute("block_resize", {"node-name": node.name, "size": 0})
        assert (tmp_path / "vm.qcow2").stat().st_size == before
        assert (tmp_path / "base.raw").stat().st_size == SIZE
        with pytest.raises(CowferryError, match="Parameter 'size' expects a >0 size"):
            daemon.execute("block_resize", {"device": "vm", "size": -1})
        assert contents(disk) == oracle
    with a_daemon() as daemon:
        daemon.open_disk("ro", str(tmp_path / "base.raw"), read_only=True)
        with pytest.raises(CowferryError, match="read-only"):
            daemon.execute("block_resize", {"device": "ro", "size": 0})


# Life ------------------------------------------------------------------------------------


def test_what_waits_in_memory_is_flushed_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening.create_image(str(tmp_path / "a.qcow2"), "qcow2", SIZE, {})
    monkeypatch.setattr(cowferry.daemon, "FLUSH_EVERY", 0.02)
    with a_daemon() as daemon:
        disk = daemon.open_disk("a", str(tmp_path / "a.qcow2"))
        flushed = threading.Event()
        really = disk.root.flush

        def flush() -> None:
            really()
            flushed.set()

        monkeypatch.setattr(disk.root, "flush", flush)
        disk.pwrite(memoryview(b"x" * 512), 0)
        assert flushed.wait(PATIENCE)
        # What a kill -9 would leave on the host now:
        after = tmp_path / "after.qcow2"
        after.write_bytes((tmp_path / "a.qcow2").read_bytes())
    assert image_bytes(after)[:512] == b"x" * 512


def test_a_hung_server_holds_up_no_other_disk_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("qemu-nbd")
    for name in ("far", "near"):
        opening.create_image(str(tmp_path / name), "qcow2", SIZE, {})
    os.truncate(tmp_path / "far", 2 * SIZE)  # an export does not grow
    monkeypatch.setattr(cowferry.daemon, "FLUSH_EVERY", 0.02)
    monkeypatch.setattr(cowferry.daemon, "HUNG", 0.2)
    monkeypatch.setattr(chores, "MOMENT", 0.02)
    address = {"type": "unix", "path": str(tmp_path / "s")}
    over = {"driver": "qcow2", "file": {"driver": "nbd", "server": address}}
    with nbd_servers.qemu_nbd(tmp_path / "s", tmp_path / "far") as server, a_daemon() as daemon:
        far = daemon.graph.open_disk("far", over)
        near = daemon.open_disk("near", str(tmp_path / "near"), "qcow2")
        really, asked = far.root.flush, threading.Semaphore(0)

        def flush() -> None:
            asked.release()
            really()

        with far.exclusive():  # the ticker waits for us
            far.root.pwrite(memoryview(b"x" * 512), 0)
            server.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(far.root, "flush", flush)
        try:
            assert asked.acquire(timeout=PATIENCE)
            for letter in b"ab":
                near.pwrite(memoryview(bytes([letter]) * 512), letter << 12)
                nbd_servers.until(lambda: not near.root.unflushed)
            assert not asked.acquire(blocking=False), "it was asked again while it hung"
            with pytest.raises(OSError, match="nbd"):
                daemon.close()
        finally:
            server.send_signal(signal.SIGCONT)
    assert image_bytes(tmp_path / "near", format="qcow2")[ord("b") << 12] == ord("b")


def test_close_calls_off_a_running_stream_and_leaves_a_clean_image(tmp_path: Path) -> None:
    oracle = chain_of(tmp_path, "vm", SIZE)
    with a_daemon() as daemon:
        told = Told(daemon)
        disk = daemon.open_disk("vm", str(tmp_path / "vm.qcow2"))
        server = daemon.start_nbd({"type": "unix", "path": str(tmp_path / "s")})
        daemon.add_export(disk, "vm")
        with NbdClient(server.uri("vm")) as client:
            client.pwrite(b"g" * 4096, 8192)
            oracle[8192 : 8192 + 4096] = b"g" * 4096
            stream.start(daemon, "vm", speed=SLOW)
            daemon.close()
        told.wait("BLOCK_JOB_CANCELLED", device="vm")
        told.wait("BLOCK_EXPORT_DELETED", id="vm")
        told.wait("SHUTDOWN")
    checked(tmp_path / "vm.qcow2")
    assert image_bytes(tmp_path / "vm.qcow2") == oracle


# As a program ----------------------------------------------------------------------------


def test_serve_prints_uris_and_stops_cleanly_on_SIGTERM(tmp_path: Path) -> None:
    oracle = chain_of(tmp_path, "vm", SIZE)
    run = tmp_path / "run"
    with program(run, f"disk={tmp_path}/vm.qcow2") as (child, line):
        name, uri = line().strip().split(": ")
        assert name == "disk"
        assert {p.name: oct(p.stat().st_mode & 0o777) for p in run.iterdir()} == {
            "nbd.sock": "0o600", "qmp.sock": "0o600", "hmp.sock": "0o600"
        }  # fmt: skip
        assert run.stat().st_mode & 0o777 == 0o700
        with NbdClient(uri) as client:
            assert client.pread(SIZE, 0) == oracle
            client.pwrite(b"w" * 1000, 10)
            oracle[10:1010] = b"w" * 1000
            with Client(str(run / "qmp.sock")) as q:
                q.call("block-stream", device="disk", speed=SLOW)
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE) == 0
        assert not list(run.iterdir())
        assert child.stderr is not None and child.stderr.read() == ""
    checked(tmp_path / "vm.qcow2")
    assert image_bytes(tmp_path / "vm.qcow2") == oracle


def test_a_second_daemon_is_refused_and_a_dead_ones_sockets_are_replaced(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    run, base = tmp_path / "run", str(tmp_path / "base.raw")
    with program(run, base) as (first, line):
        assert line()
        with program(run, base) as (second, _):
            assert second.wait(PATIENCE) == 1
            assert second.stderr is not None
            told = second.stderr.read().splitlines()
            assert told[0].startswith(f"cowferry: '{run}/qmp.sock': another server listens there")
            assert f"pid {first.pid} " in told[0] and len(told) == 2
        with Client(str(run / "qmp.sock")) as q:
            assert [d["device"] for d in q.call("query-block")] == ["base"]
        first.kill()
        first.wait(PATIENCE)
        assert (run / "qmp.sock").exists()
    with program(run, base) as (_, line):
        assert line().startswith("base: nbd+unix:")


def test_bad_arguments_end_with_one_line_and_leave_nothing(tmp_path: Path) -> None:
    make_base(tmp_path, SIZE)
    run = tmp_path / "run"
    for arguments, status, text in (
        ([f"{tmp_path}/none.qcow2"], 1, f"Could not open '{tmp_path}/none.qcow2'"),
        (["--object", "secret,id=s"], 1, "invalid object type: secret"),
        (["--chardev", "pty,id=c"], 1, "backend 'pty' is not supported"),
        (["--monitor", "chardev=c"], 1, "Character device 'c' not found"),
        (["--export", "nbd,id=e,node-name=x"], 1, "NBD server not running"),
        (["--tcp", "here", f"{tmp_path}/base.raw"], 1, "--tcp expects HOST:PORT"),
        ([], 2, "nothing to serve"),
    ):
        with program(run, *arguments) as (child, _):
            assert child.wait(PATIENCE) == status, arguments
            assert child.stderr is not None
            said = child.stderr.read()
            assert text in said and "Traceback" not in said
        assert not run.exists() or not list(run.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tcp", ":0"], "--tcp is for FILEs"),
        (["--socket", "s"], "--socket is for FILEs"),
        (["-r"], "--read-only is for FILEs"),
        (["-f", "raw"], "--format is for FILEs"),
        (["--json"], "--json is for FILEs"),
        (
            ["--nbd-server", "addr.type=unix,addr.path=s", "--socket", "t", "f"],
            "exclude each other",
        ),
    ],
)
def test_serve_refuses_options_that_would_mean_nothing(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(serve_command, [*arguments, "--blockdev", "driver=file"])
    assert done.exit_code == 2 and text in done.output


def swap(command: list[str], folder: Path, image: Path) -> tuple[bytearray, list[dict[str, Any]]]:
    """What a storage daemon serves and says when it is started with one set of options."""
    folder.mkdir()
    arguments = [
        "--daemonize", "--pidfile", str(folder / "pid"),
        "--chardev", f"socket,path={folder}/qmp,server=on,wait=off,id=c",
        "--monitor", "chardev=c",
        "--blockdev", f"driver=file,node-name=f,filename={image}",
        "--blockdev", '{"driver": "qcow2", "node-name": "top", "file": "f"}',
        "--nbd-server", f"addr.type=unix,addr.path={folder}/nbd",
        "--export", "type=nbd,id=e,node-name=top,name=disk,writable=on",
    ]  # fmt: skip
    subprocess.run([*command, *arguments], check=True, timeout=PATIENCE, env=environment(folder))
    pid = int((folder / "pid").read_text())
    try:
        with NbdClient(f"nbd+unix:///disk?socket={folder}/nbd") as client:
            client.pwrite(b"swap" * 256, 4096 + 100)
            client.flush()
            got = client.pread(SIZE, 0)
        with Client(str(folder / "qmp")) as q:
            said = [
                {k: n[k] for k in ("node-name", "drv", "ro")}
                for n in q.call("query-named-block-nodes")
                if not n["node-name"].startswith("#")
            ]
            exports = q.call("query-block-exports")
            ended = os.pidfd_open(pid)
            q.call("quit")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    import select

    assert select.select([ended], [], [], PATIENCE)[0], "it has not ended"
    os.close(ended)
    return got, sorted(said, key=lambda n: str(n["node-name"])) + exports


def test_qemu_storage_daemons_options_serve_the_same_bytes(tmp_path: Path) -> None:
    need("qemu-storage-daemon")
    oracle = chain_of(tmp_path, "vm", SIZE)
    oracle[4196 : 4196 + 1024] = b"swap" * 256
    image = tmp_path / "vm.qcow2"
    theirs = swap(["qemu-storage-daemon"], tmp_path / "theirs", image)
    ours = swap([sys.executable, "-m", "cowferry", "serve"], tmp_path / "ours", image)
    assert differs(theirs[0], oracle) == "" and differs(ours[0], oracle) == ""
    assert ours[1] == theirs[1]
    assert not (tmp_path / "ours" / "pid").exists()
    checked(image)


@pytest.mark.parametrize(
    "options",
    [
        "cache.direct=off,cache.no-flush=off,locking=off,aio=threads,discard=unmap",
        "read-only=on,force-share=on",
        "auto-read-only=on,detect-zeroes=on",
    ],
)
def test_blockdev_options_of_the_file_driver_are_taken_as_qemu_takes_them(
    tmp_path: Path, options: str
) -> None:
    need("qemu-storage-daemon")
    make_base(tmp_path, SIZE)
    arguments = [
        "--blockdev", f"driver=file,node-name=f,filename={tmp_path}/base.raw,{options}",
        "--blockdev", "driver=raw,node-name=r,file=f",
        "--chardev", "stdio,id=c", "--monitor", "c",
    ]  # fmt: skip
    words = ("qmp_capabilities", "query-named-block-nodes", "quit")
    said = []
    for command in (["qemu-storage-daemon"], [sys.executable, "-m", "cowferry", "serve"]):
        done = subprocess.run(
            [*command, *arguments],
            input="".join(json.dumps({"execute": w}) for w in words),
            capture_output=True, text=True, timeout=PATIENCE, env=environment(tmp_path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        nodes = json.loads(done.stdout.splitlines()[2])["return"]
        said.append({n["node-name"]: (n["drv"], n["image"]["virtual-size"]) for n in nodes})
    assert said[0] == said[1] == {"f": ("file", SIZE), "r": ("raw", SIZE)}


def test_driver_flags_may_be_on_and_off(tmp_path: Path) -> None:
    opening.create_image(str(tmp_path / "a.qcow2"), "qcow2", SIZE, {})
    options = f"driver=qcow2,node-name=q,file.driver=file,file.filename={tmp_path}/a.qcow2"
    more = "lazy-refcounts=on,cache.direct=on,pass-discard-other=off,l2-cache-size=1048576"
    run, socket_path = tmp_path / "run", tmp_path / "q"
    old = f"socket,path={socket_path},server,nowait,id=c"
    arguments = ("--blockdev", f"{options},{more}", "--chardev", old, "--monitor", "c")
    command = [sys.executable, "-m", "cowferry", "serve", "--daemonize", *arguments]
    subprocess.run(command, check=True, timeout=PATIENCE, env=environment(run))
    with Client(str(socket_path)) as q:
        assert "q" in [n["node-name"] for n in q.call("query-named-block-nodes")]
        q.call("quit")


def test_a_stream_into_a_middle_layer_changes_nothing_for_the_disk_above(tmp_path: Path) -> None:
    oracle = chain_of(tmp_path, "mid", SIZE)
    overlay(tmp_path, "vm.qcow2", "mid.qcow2", "qcow2", SIZE)
    mid = opening.image_options(str(tmp_path / "mid.qcow2"))
    with a_daemon() as daemon:
        told = Told(daemon)
        daemon.graph.add_node({**mid, "node-name": "mid"})
        options = opening.image_options(str(tmp_path / "vm.qcow2"))
        daemon.graph.add_node({**options, "node-name": "top", "backing": "mid"})
        disk = daemon.graph.disk("top")
        assert contents(disk) == oracle  # the leases now lead to the base
        stream.start(daemon, "mid", job_id="j", speed=SLOW)
        with pytest.raises(DeviceInUse, match="Node 'mid' is busy"):
            stream.start(daemon, "top", job_id="k")
        disk.pwrite(memoryview(b"t" * 1000), 3000)
        oracle[3000:4000] = b"t" * 1000
        daemon.execute("block-job-set-speed", {"device": "j", "speed": 0})
        assert "error" not in told.wait("BLOCK_JOB_COMPLETED", device="j")
        told.wait("JOB_STATUS_CHANGE", id="j", status="null")
        os.truncate(tmp_path / "base.raw", 0)
        assert differs(contents(disk), oracle) == ""
    (tmp_path / "base.raw").unlink()
    assert image_bytes(tmp_path / "vm.qcow2") == oracle


def test_who_finds_a_monitor_finds_all_that_the_options_ask_for(tmp_path: Path) -> None:
    """Wherever it is among them: one of the others may take its time."""
    make_base(tmp_path, SIZE)
    slow = socket.socket(socket.AF_UNIX)
    slow.bind(str(tmp_path / "slow"))
    slow.listen()
    slow.settimeout(PATIENCE)
    far = f"driver=nbd,node-name=far,server.type=unix,server.path={tmp_path}/slow,export=vm"
    options = (
        "--chardev", f"socket,path={tmp_path}/m,server=on,wait=off,id=c", "--monitor", "chardev=c",
        "--blockdev", far, "--object", "iothread,id=late",
    )  # fmt: skip
    with (
        a_daemon() as daemon,
        program(tmp_path / "run", *options),
        socket.socket(socket.AF_UNIX) as client,
    ):
        calling, _ = slow.accept()  # it opens the node, and has its monitor
        client.settimeout(PATIENCE)
        client.connect(str(tmp_path / "m"))
        client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-version"}')
        client.sendall(b'{"execute": "qom-list", "arguments": {"path": "/objects"}}')
        server = daemon.start_nbd({"type": "unix", "path": str(tmp_path / "s")})
        daemon.add_export(daemon.open_disk("vm", str(tmp_path / "base.raw")), "vm")
        assert not select.select([client], [], [], 0)[0], "it is told nothing yet"
        server._spawn(lambda: server._connection(calling), "slow at last")
        answers = client.makefile()
        greeting, *_, objects = (json.loads(answers.readline()) for _ in range(4))
    slow.close()
    assert "QMP" in greeting
    assert {"name": "late", "type": "child<iothread>"} in objects["return"]


def test_a_monitor_on_stdio_and_one_that_calls_out(tmp_path: Path) -> None:
    hello = '{"execute":"qmp_capabilities"}{"execute":"quit"}'
    command = [sys.executable, "-m", "cowferry", "serve", "--chardev", "stdio,id=c"]
    done = subprocess.run(
        [*command, "--monitor", "c"], input=hello, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0 and done.stdout.splitlines()[1:3] == ['{"return": {}}'] * 2
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "l"))
        listener.listen()
        listener.settimeout(PATIENCE)
        with program(
            tmp_path / "run",
            "--chardev", f"socket,id=c,path={tmp_path}/l", "--monitor", "chardev=c",
        ) as (child, _):  # fmt: skip
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(PATIENCE)
                assert b'"QMP"' in peer.recv(4096)
                peer.sendall(hello.encode())
                assert child.wait(PATIENCE) == 0


# A conversation, by QEMU's own client ----------------------------------------------------


Ask = Callable[..., Any]


def converse(path: Path, talk: Callable[[Ask], Any]) -> None:
    """Run `talk` with a function that sends one command by qemu.qmp: its result or its error."""
    qemu_qmp = pytest.importorskip("qemu.qmp")

    async def main() -> None:
        client = qemu_qmp.QMPClient("test")
        await client.connect(str(path))

        async def ask(command: str, **arguments: Any) -> Any:
            try:
                plain = {k.replace("_", "-"): v for k, v in arguments.items()}
                return await asyncio.wait_for(client.execute(command, plain or None), PATIENCE)
            except qemu_qmp.ExecuteError as error:
                return error.error_class, str(error)

        try:
            await talk(ask)
        finally:
            await client.disconnect()

    asyncio.run(main())


def test_blocks_and_exports_spoken_by_qemu_qmp(tmp_path: Path) -> None:
    image = str(tmp_path / "n.qcow2")

    async def created(ask: Ask, **options: Any) -> Any:
        answer = await ask("blockdev-create", job_id="c", options=options)
        if answer != {}:
            return answer
        while (job := (await ask("query-jobs"))[0])["status"] != "concluded":
            await asyncio.sleep(0)
        assert await ask("job-dismiss", id="c") == {}
        return job.get("error")

    def generic(text: str) -> tuple[str, str]:
        return "GenericError", text

    async def talk(ask: Ask) -> None:
        assert await created(ask, driver="file", filename=image, size=0) is None
        assert await ask("blockdev-add", driver="file", filename=image, node_name="f") == {}
        assert await created(ask, driver="qcow2", file="f", size=SIZE) is None
        assert await created(ask, driver="qcow2", file="zz", size=SIZE) == generic(
            "Cannot find device='' nor node-name='zz'"
        )
        assert await ask("blockdev-add", driver="qcow2", file="f", node_name="q") == {}
        assert await created(ask, driver="qcow2", file="f", size=SIZE) == generic(
            "Node 'f' is busy: node is used as file of 'q'"
        )
        assert await ask("blockdev-add", node_name="x") == generic("Parameter 'driver' is missing")
        assert await ask("blockdev-add", driver="zz", node_name="x") == generic(
            "Unknown driver 'zz'"
        )
        assert await ask("blockdev-add", driver="qcow2", file="f", node_name="x", zz=1) == generic(
            "Node 'f' is in use by 'q' as 'file'"
        )
        assert await ask("block_resize", node_name="q", size=2 * SIZE) == {}
        nodes = {n["node-name"]: n for n in await ask("query-named-block-nodes", flat=True)}
        assert nodes["q"]["image"]["virtual-size"] == 2 * SIZE
        assert nodes["q"]["drv"] == "qcow2" and not nodes["q"]["ro"]
        assert nodes["q"]["image"]["format-specific"]["type"] == "qcow2"

        address = {"type": "unix", "path": str(tmp_path / "s")}
        add = {"type": "nbd", "node_name": "q", "name": "disk"}
        assert await ask("block-export-add", id="e", **add) == generic("NBD server not running")
        assert await ask("nbd-server-start", addr=address) == {}
        assert await ask("nbd-server-start", addr=address) == generic("NBD server already running")
        assert await ask("block-export-add", id="9", **add) == generic("Invalid block export id")
        assert await ask("block-export-add", id="e", writable=True, **add) == {}
        assert await ask("block-export-add", id="e", **add) == generic(
            "Block export id 'e' is already in use"
        )
        assert await ask("block-export-add", id="e2", **add) == generic(
            "NBD server already has export named 'disk'"
        )
        other = {**add, "name": "other"}
        assert await ask("block-export-add", id="e2", bitmaps=["zz"], **other) == generic(
            "Bitmap 'zz' is not found"
        )
        assert await ask("block-export-add", type="nbd", id="e2", node_name="zz") == generic(
            "Cannot find device='' nor node-name='zz'"
        )
        assert await ask("query-block-exports") == [
            {"id": "e", "type": "nbd", "node-name": "q", "shutting-down": False}
        ]
        assert await ask("blockdev-del", node_name="q") == generic("Block device q is in use")
        assert await ask("blockdev-del", node_name="zz") == generic(
            "Failed to find node with node-name='zz'"
        )
        assert await ask("block-export-del", id="zz") == generic("Export 'zz' is not found")
        assert await ask("block-export-del", id="e") == {}
        assert await ask("blockdev-del", node_name="q") == {}
        ro = {"driver": "qcow2", "file": "f", "read_only": True, "node_name": "ro"}
        assert await ask("blockdev-add", **ro) == {}
        assert await ask(
            "block-export-add", type="nbd", id="w", node_name="ro", writable=True
        ) == generic("Cannot export read-only node as writable")
        assert await ask("blockdev-del", node_name="ro") == {}
        assert await ask("blockdev-del", node_name="f") == {}
        assert await ask("nbd-server-stop") == {}
        assert await ask("nbd-server-stop") == generic("NBD server not running")
        assert await ask("query-named-block-nodes") == []
        assert await ask("query-block") == []

    with a_daemon(tmp_path / "qmp"):
        converse(tmp_path / "qmp", talk)
