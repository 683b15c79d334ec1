"""The write log: what a run changed on disk, and every state that a crash could have left of it.

`Log` is put in front of `sysio` and records writes, flushes, truncates and renames of all files in
one folder, in order, with marks of the test's own in between ("write 7 was answered"). `states`
then says what could be found after a power cut at each moment:

* each prefix of the log, as a kernel that writes everything at once would leave it;
* of what was written to a file since its last flush, any subset: all of them if there are at most
  `EXHAUSTIVE`, else samples; each file by itself, so files are permuted against each other;
* the last write of a subset torn at a sector.

What a flush has covered is always there, and what comes after the cut never is.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cowferry.block import sysio

SECTOR = 512
EXHAUSTIVE = 5


class Entry(NamedTuple):
    """One thing that happened: kind is write, truncate, flush or mark."""

    kind: str
    path: str = ""
    offset: int = 0
    data: bytes = b""
    mark: Any = None


class Log:
    """Records what happens to the files of a folder; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self.start: dict[str, bytes] = {
            str(p): p.read_bytes() for p in folder.iterdir() if p.is_file()
        }

    def __enter__(self) -> Log:
        assert sysio.recorder is None
        sysio.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        sysio.recorder = None

    def mark(self, mark: Any) -> None:
        """Something that the test has to know about each state."""
        self.entries.append(Entry("mark", mark=mark))

    def _path(self, fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    # sysio.Recorder
    def wrote(self, fd: int, offset: int, data: bytes) -> None:
        # A device writes whole sectors, with what the page cache has of the rest of them.
        start = offset // SECTOR * SECTOR
        length = -(-(offset + len(data)) // SECTOR) * SECTOR - start
        whole = os.pread(fd, length, start)
        self.entries.append(Entry("write", self._path(fd), start, whole))

    def flushed(self, fd: int) -> None:
        self.entries.append(Entry("flush", self._path(fd)))

    def truncated(self, fd: int, size: int) -> None:
        self.entries.append(Entry("truncate", self._path(fd), size))

    def renamed(self, source: str, target: str) -> None:
        raise AssertionError("nothing renames images yet; teach the log when something does")

    def unlinked(self, path: str) -> None:
        raise AssertionError("nothing unlinks images")

    def directory_flushed(self, path: str) -> None:
        """New names: the files of these tests exist from the start."""


class State(NamedTuple):
    """What a crash left: the bytes of each file, and the marks that had been passed."""

    files: dict[str, bytearray]
    marks: list[Any]
    what: str  # for a failure's message


def apply(data: bytearray, e: Entry) -> None:
    """One change on a file's bytes."""
    if e.kind == "truncate":
        if e.offset < len(data):
            del data[e.offset :]
        else:
            data.extend(bytes(e.offset - len(data)))
        return
    end = e.offset + len(e.data)
    if len(data) < end:
        data.extend(bytes(end - len(data)))
    data[e.offset : end] = e.data


def states(log: Log, seed: int, samples: int, every: int = 1) -> Iterator[State]:
    """Crash states, in the log's order. `every`: only at each so many-th entry."""
    rnd = random.Random(seed)
    durable = {p: bytearray(b) for p, b in log.start.items()}
    pending: dict[str, list[Entry]] = {p: [] for p in durable}
    marks: list[Any] = []
    for number, e in enumerate(log.entries):
        if e.kind == "mark":
            marks.append(e.mark)
        elif e.kind == "flush":
            for change in pending.get(e.path, []):
                apply(durable[e.path], change)
            pending[e.path] = []
        elif e.path in durable:
            pending[e.path].append(e)
        if number % every:
            continue
        yield _state(durable, pending, marks, f"all of the first {number + 1}")
        for picked in _subsets(pending, rnd, samples):
            yield _state(durable, picked, marks, f"a subset at {number + 1}")


def _state(
    durable: dict[str, bytearray], chosen: dict[str, list[Entry]], marks: list[Any], what: str
) -> State:
    files = {}
    for path, data in durable.items():
        copy = bytearray(data)
        for change in chosen.get(path, []):
            apply(copy, change)
        files[path] = copy
    return State(files, list(marks), what)


def _subsets(
    pending: dict[str, list[Entry]], rnd: random.Random, samples: int
) -> Iterator[dict[str, list[Entry]]]:
    total = sum(map(len, pending.values()))
    if not total:
        return
    if 1 << total <= min(1 << EXHAUSTIVE, samples * 2):
        for bits in range((1 << total) - 1):
            picked: dict[str, list[Entry]] = {}
            n = 0
            for path, changes in pending.items():
                picked[path] = [c for i, c in enumerate(changes) if bits >> (n + i) & 1]
                n += len(changes)
            yield picked
        return
    for _ in range(samples):
        keep = rnd.random()
        picked = {p: [c for c in cs if rnd.random() < keep] for p, cs in pending.items()}
        for changes in picked.values():
            if changes and changes[-1].kind == "write" and rnd.random() < 0.5:
                last = changes[-1]
                cut = rnd.randrange(len(last.data) // SECTOR + 1) * SECTOR
                changes[-1] = last._replace(data=last.data[:cut])
        yield picked


class Oracle:
    """Per sector: the last flushed value, and whatever was written since."""

    def __init__(self, flat: bytes | bytearray) -> None:
        self.flat = bytearray(flat)
        self.since: dict[int, list[bytes]] = {}

    def write(self, offset: int, data: bytes) -> None:
        """Sent, or answered: both may be there or not."""
        first, last = offset // SECTOR, (offset + len(data) - 1) // SECTOR
        for sector in range(first, last + 1):
            values = self.since.setdefault(sector, [self.value(sector)])
            whole = bytearray(values[-1])
            a = max(offset - sector * SECTOR, 0)
            b = min(offset + len(data) - sector * SECTOR, SECTOR)
            whole[a:b] = data[sector * SECTOR + a - offset : sector * SECTOR + b - offset]
            values.append(bytes(whole))

    def flush(self) -> None:
        """Answered: only the last value of each sector is legal now."""
        for sector, values in self.since.items():
            self.flat[sector * SECTOR : sector * SECTOR + len(values[-1])] = values[-1]
        self.since.clear()

    def value(self, sector: int) -> bytes:
        """The sector's last flushed value."""
        return bytes(self.flat[sector * SECTOR : (sector + 1) * SECTOR])

    def wrong(self, got: bytearray) -> str:
        """What no crash could have left, in words; empty if all is legal."""
        if len(got) != len(self.flat):
            return f"{len(got)} bytes, not {len(self.flat)}"
        if got == self.flat:
            return ""
        for sector in range(len(self.flat) // SECTOR):
            at = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if got[at] != self.flat[at] and bytes(got[at]) not in self.since.get(sector, []):
                return f"sector {sector} (offset {sector * SECTOR}) has what was never there"
        return ""


def put(state: State, folder: Path) -> None:
    """Write the files of a state into another folder."""
    for path, data in state.files.items():
        (folder / os.path.basename(path)).write_bytes(data)
