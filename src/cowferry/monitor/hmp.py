"""The human monitor: lines in, words out, on top of the same commands as QMP.

The words of the 2011 discussion are kept to the letter: `block_stream -a ide0-hd`,
"Streaming device ide0-hd: Completed 512 of 34359738368 bytes", "No active stream",
`snapshot_blkdev virtio-blk0 destination.$fmt $fmt`, `change -n virtio-blk0 /srv/images/vm_1.img`.

File names are the daemon's: one that is not absolute is looked for in the daemon's own folder.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from cowferry.errors import CowferryError, one_line

if TYPE_CHECKING:
    from cowferry.daemon import Daemon
    from cowferry.monitor.qmp import Server, Stream

log = logging.getLogger(__name__)

PROMPT = b"(qemu) "
MAX_LINE = 4096

Run = Callable[["Daemon", list[str]], str]


class Verb(NamedTuple):
    """A command of the human monitor."""

    name: str
    usage: str
    help: str
    run: Run


VERBS: dict[str, Verb] = {}
INFO: dict[str, Verb] = {}


def verb(name: str, usage: str, help: str, table: dict[str, Verb] = VERBS) -> Callable[[Run], Run]:
    """Register a command; `table=INFO` for a topic of `info`."""

    def keep(run: Run) -> Run:
        table[name] = Verb(name, usage, help, run)
        return run

    return keep


class Said(NamedTuple):
    """What a line printed, and whether it failed."""

    text: str
    failed: bool = False


def run(daemon: Daemon, line: str) -> Said:
    """Run one line; its text ends with a newline if there is any. Never raises."""
    try:
        words = shlex.split(line)
        if not words:
            return Said("")
        found = VERBS.get(words[0])
        if found is None:
            return Said(f"unknown command: '{one_line(words[0])}'\n", True)
        out = found.run(daemon, words[1:])
    except CowferryError as error:
        hint = f"  ({error.hint})" if error.hint else ""
        return Said(f"Error: {error.desc}{hint}\n", True)
    except ValueError as error:
        return Said(f"Error: {error}\n", True)
    except OSError as error:
        return Said(f"Error: {error.strerror or error}\n", True)
    except Exception as error:
        log.exception("a line of the human monitor failed: %s", line)
        return Said(f"Error: internal error: {error}\n", True)
    return Said(out + "\n" if out and not out.endswith("\n") else out)


def run_line(daemon: Daemon, line: str) -> str:
    """Run one line, and return what it prints. Never raises."""
    return run(daemon, line).text


def arguments(
    words: list[str], usage: str, least: int, most: int, flags: str = ""
) -> tuple[set[str], list[str]]:
    """(flags given, positional words). Raises `CowferryError` with the usage."""
    given: set[str] = set()
    rest: list[str] = []
    for word in words:
        if re.fullmatch(r"-[a-z]+", word) and not rest:
            for letter in word[1:]:
                if letter not in flags:
                    raise CowferryError(f"unsupported option -{letter}", f"usage: {usage}")
                given.add(letter)
        else:
            rest.append(word)
    if not least <= len(rest) <= most:
        raise CowferryError("wrong number of arguments", f"usage: {usage}")
    return given, rest


SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def size(text: str, default: str = "") -> int:
    """Bytes from "10", "4k", "1.5G". Raises `CowferryError`."""
    found = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)([bkmgtpe]?)", text.strip().lower())
    value = Fraction(found[1]) * (1 << SUFFIXES[found[2] or default]) if found else -1
    if not 0 <= value < 1 << 63:
        raise CowferryError(f"invalid size '{text}'", "a number, with k, M, G or T if you like")
    return int(value)


@verb(
    "block_stream", "block_stream [-a] DEVICE [SPEED [BASE]]", "fill a disk from its backing chain"
)
def block_stream(daemon: Daemon, words: list[str]) -> str:
    """-a (all) is what the 2011 discussion types; there is no other way, so it changes nothing."""
    _, rest = arguments(words, VERBS["block_stream"].usage, 1, 3, "a")
    given: dict[str, Any] = {"device": rest[0]}
    if len(rest) > 1:
        given["speed"] = size(rest[1])
    if len(rest) > 2:
        given["base"] = rest[2]
    daemon.execute("block-stream", given)
    return ""


@verb(
    "block_stream_cancel", "block_stream_cancel DEVICE", "stop filling a disk; it keeps its backing"
)
def block_stream_cancel(daemon: Daemon, words: list[str]) -> str:
    _, rest = arguments(words, VERBS["block_stream_cancel"].usage, 1, 1)
    daemon.execute("block_stream_cancel", {"device": rest[0]})
    return ""


@verb("block_job_set_speed", "block_job_set_speed DEVICE VALUE", "bytes per second; 0 is unlimited")
def block_job_set_speed(daemon: Daemon, words: list[str]) -> str:
    _, rest = arguments(words, VERBS["block_job_set_speed"].usage, 2, 2)
    daemon.execute("block-job-set-speed", {"device": rest[0], "speed": size(rest[1])})
    return ""


@verb(
    "block_job_cancel",
    "block_job_cancel [-f] DEVICE",
    "call a job off; a ready copy ends as a copy (-f: at once, even a paused one)",
)
def block_job_cancel(daemon: Daemon, words: list[str]) -> str:
    flags, rest = arguments(words, VERBS["block_job_cancel"].usage, 1, 1, "f")
    daemon.execute("block-job-cancel", {"device": rest[0], "force": "f" in flags})
    return ""


def _simple(name: str, command: str, text: str) -> None:
    @verb(name, f"{name} DEVICE", text)
    def run(daemon: Daemon, words: list[str]) -> str:
        _, rest = arguments(words, VERBS[name].usage, 1, 1)
        daemon.execute(command, {"device": rest[0]})
        return ""


@verb(
    "snapshot_blkdev", "snapshot_blkdev [-n] DEVICE [FILE] [FORMAT]",
    "put a new image on top of a disk (-n: one that exists)",
)  # fmt: skip
def snapshot_blkdev(daemon: Daemon, words: list[str]) -> str:
    """Without FILE it was once meant to be taken inside the image; it never was, in QEMU either."""
    usage = VERBS["snapshot_blkdev"].usage
    flags, rest = arguments(words, usage, 1, 3, "n")
    if len(rest) < 2:
        raise CowferryError("Parameter 'snapshot_file' is missing", f"usage: {usage}")
    given = {"device": rest[0], "snapshot-file": rest[1]}
    given |= {"format": rest[2]} if len(rest) > 2 else {}
    given["mode"] = "existing" if "n" in flags else "absolute-paths"
    daemon.execute("blockdev-snapshot-sync", given)
    return ""


@verb(
    "drive_mirror", "drive_mirror [-n] [-f] DEVICE TARGET [FORMAT]",
    "copy a disk, then follow it (-n: TARGET exists, -f: all of it, not the top alone)",
)  # fmt: skip
def drive_mirror(daemon: Daemon, words: list[str]) -> str:
    flags, rest = arguments(words, VERBS["drive_mirror"].usage, 2, 3, "nf")
    given = {
        "device": rest[0],
        "target": rest[1],
        "mode": "existing" if "n" in flags else "absolute-paths",
        "sync": "full" if "f" in flags else "top",
    }
    given |= {"format": rest[2]} if len(rest) > 2 else {}
    daemon.execute("drive-mirror", given)
    return ""


@verb(
    "drive_backup", "drive_backup [-n] [-f] [-c] DEVICE TARGET [FORMAT]",
    "back a disk up (-n: TARGET exists, -f: all of it, not the top alone, -c: compress)",
)  # fmt: skip
def drive_backup(daemon: Daemon, words: list[str]) -> str:
    flags, rest = arguments(words, VERBS["drive_backup"].usage, 2, 3, "nfc")
    given = {
        "device": rest[0],
        "target": rest[1],
        "mode": "existing" if "n" in flags else "absolute-paths",
        "sync": "full" if "f" in flags else "top",
        "compress": "c" in flags,
    }
    given |= {"format": rest[2]} if len(rest) > 2 else {}
    daemon.execute("drive-backup", given)
    return ""


@verb(
    "block_commit", "block_commit DEVICE [TOP [BASE]]",
    "merge images of a disk's chain, from TOP down into BASE",
)  # fmt: skip
def block_commit(daemon: Daemon, words: list[str]) -> str:
    """Not `commit`: that is QEMU's word for one that stops the guest's writes."""
    _, rest = arguments(words, VERBS["block_commit"].usage, 1, 3)
    given = dict(zip(("device", "top", "base"), rest, strict=False))
    daemon.execute("block-commit", given)
    return ""


@verb(
    "change", "change [-n] DEVICE TARGET [FORMAT]",
    "switch a disk to another image (-n: the same disk elsewhere, do not tell the guest)",
)  # fmt: skip
def change(daemon: Daemon, words: list[str]) -> str:
    flags, rest = arguments(words, VERBS["change"].usage, 2, 3, "n")
    given: dict[str, Any] = {"device": rest[0], "target": rest[1], "notify": "n" not in flags}
    given |= {"format": rest[2]} if len(rest) > 2 else {}
    daemon.execute("change", given)
    return ""


_simple("block_job_pause", "block-job-pause", "pause a job")
_simple("block_job_resume", "block-job-resume", "let a paused job go on")
_simple("block_job_complete", "block-job-complete", "let a ready job finish: a disk moves over")


@verb("block_resize", "block_resize DEVICE SIZE", "change a disk's size (MiB without a suffix)")
def block_resize(daemon: Daemon, words: list[str]) -> str:
    _, rest = arguments(words, VERBS["block_resize"].usage, 2, 2)
    daemon.execute("block_resize", {"device": rest[0], "size": size(rest[1], "m")})
    return ""


RATES = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


@verb(
    "block_set_io_throttle", "block_set_io_throttle DEVICE " + " ".join(RATES).upper(),
    "limit what guests read and write of a disk; 0 is unlimited",
)  # fmt: skip
def block_set_io_throttle(daemon: Daemon, words: list[str]) -> str:
    _, rest = arguments(words, VERBS["block_set_io_throttle"].usage, 7, 7)
    limits = dict(zip(RATES, map(size, rest[1:]), strict=True))
    daemon.execute("block_set_io_throttle", {"device": rest[0], **limits})
    return ""


@verb("quit", "quit", "stop the daemon cleanly")
def quit_daemon(daemon: Daemon, words: list[str]) -> str:
    daemon.execute("quit", {})
    return ""


@verb("help", "help [COMMAND]", "what there is")
def help_text(daemon: Daemon, words: list[str]) -> str:
    chosen = [VERBS[w] for w in words if w in VERBS] if words else list(VERBS.values())
    if not words or words == ["info"]:
        chosen = ([] if words else chosen) + list(INFO.values())
    if not chosen:
        raise CowferryError(f"unknown command: '{words[0]}'", "help lists the commands")
    return "\n".join(f"{v.usage} -- {v.help}" for v in chosen)


VERBS["?"] = VERBS["help"]._replace(name="?", usage="? [COMMAND]", help="the same as help")


@verb("info", "info TOPIC", "show something; `help info` lists the topics")
def info(daemon: Daemon, words: list[str]) -> str:
    if not words:
        return "\n".join(f"{v.usage} -- {v.help}" for v in INFO.values())
    found = INFO.get(words[0])
    if found is None:
        raise CowferryError(f"unknown command: 'info {words[0]}'", "help info lists the topics")
    return found.run(daemon, words[1:])


@verb("block-stream", "info block-stream", "the progress of active streams", INFO)
def info_block_stream(daemon: Daemon, words: list[str]) -> str:
    active = daemon.execute("query-block-stream", {})
    return "\n".join(
        f"Streaming device {s['device']}: Completed {s['offset']} of {s['len']} bytes"
        for s in active
    ) or "No active stream"  # fmt: skip


@verb("block-jobs", "info block-jobs", "the progress of all jobs", INFO)
def info_block_jobs(daemon: Daemon, words: list[str]) -> str:
    lines = []
    for job in daemon.execute("query-block-jobs", {}):
        what = (
            f"Streaming device {job['device']}"
            if job["type"] == "stream"
            else f"Type {job['type']}, device {job['device']}"
        )
        lines.append(
            f"{what}: Completed {job['offset']} of {job['len']} bytes, "
            f"speed limit {job['speed']} bytes/s"
        )
    return "\n".join(lines) or "No active jobs"


@verb("block", "info block [DEVICE]", "disks and their images", INFO)
def info_block(daemon: Daemon, words: list[str]) -> str:
    out = []
    for disk in daemon.execute("query-block", {}):
        if words and disk["device"] != words[0]:
            continue
        inserted = disk["inserted"]
        mode = ", read-only" if inserted["ro"] else ""
        out.append(
            f"{disk['device']} ({inserted['node-name']}): {inserted['file']} "
            f"({inserted['drv']}{mode})"
        )
        out.append("    Cache mode:       writeback")
        if "backing_file" in inserted:
            depth = inserted["backing_file_depth"]
            out.append(f"    Backing file:     {inserted['backing_file']} (chain depth: {depth})")
        if "group" in inserted:
            names = [n + end for kind in ("bps", "iops") for end in ("", "_max")
                     for n in (kind, f"{kind}_rd", f"{kind}_wr")]  # fmt: skip
            limits = " ".join(f"{n}={inserted.get(n, 0)}" for n in (*names, "iops_size"))
            out.append(f"    I/O throttling:   {limits} group={inserted['group']}")
    if words and not out:
        raise CowferryError(f"Device '{words[0]}' not found")
    return "\n".join(out)


@verb("version", "info version", "the version", INFO)
def info_version(daemon: Daemon, words: list[str]) -> str:
    return str(daemon.execute("query-version", {})["package"])


def serve(daemon: Daemon, stream: Stream) -> None:
    """One client of the human monitor, line by line, until it leaves."""
    version = daemon.execute("query-version", {})["package"]
    try:
        stream.sendall(f"{version} monitor - type 'help' for more information\r\n".encode())
        stream.sendall(PROMPT)
        pending = b""
        while data := stream.recv(4096):
            pending += data
            while b"\n" in pending:
                line, pending = pending.split(b"\n", 1)
                text = run_line(daemon, line.decode("utf-8", "replace").strip("\r\x04 "))
                stream.sendall(text.replace("\n", "\r\n").encode() + PROMPT)
            if len(pending) > MAX_LINE:
                stream.sendall(b"line too long\r\n" + PROMPT)
                pending = b""
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def server(daemon: Daemon) -> Server:
    """A human-monitor server on a daemon."""
    from cowferry.monitor.qmp import Server

    return Server(lambda stream: serve(daemon, stream), "hmp")
