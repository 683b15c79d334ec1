"""The write log: what a run changed on disk, and every state that a crash could have left of it.

`Log` is put in front of `sysio` and records what happens to the files of some folders, in order:
writes, flushes and truncates of files; names made, renamed and removed in folders, and flushes of
folders; and marks of the test's own in between ("write 7 was answered"). `states` then says what
could be found after a power cut at each moment:

* each prefix of the log, as a kernel that writes everything at once would leave it;
* of what was written to a file since its last flush, any subset: all of them if there are at most
  `EXHAUSTIVE` changes, else samples; each file by itself, so files are permuted against each other;
* the last write of a subset torn at a sector;
* all of one file and nothing of another;
* of the names that changed in a folder since its last flush, any subset, too. A name points to a
  file: a durable name may lead to a file whose bytes are not, and durable bytes may have no name.

What a flush has covered is always there, and what comes after the cut never is. A rename is one
change: the old or the new name is there, never both and never neither.
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
AROUND = 2  # entries on each side of a change of names that are always looked at
NAMES = ("create", "rename", "unlink")


Attributes = dict[str, bytes]


class Entry(NamedTuple):
    """One thing that happened to `of`, a file's number or a folder's path.

    The kind is write, truncate, attribute, create, rename, unlink, flush or mark."""

    kind: str
    of: str = ""
    offset: int = 0
    data: bytes = b""
    file: str = ""  # what a new name points to
    name: str = ""  # the path made or removed; an attribute's; of a flush that covers those, too
    value: bytes | None = None  # of an attribute, if it was not removed
    target: str = ""  # of a rename
    mark: Any = None
    look: bool = False  # a mark whose moment is always looked at


class Log:
    """Records what happens to the files of folders; a context manager."""

    def __init__(self, *folders: Path) -> None:
        self.folders = [os.path.realpath(f) for f in folders]
        self.entries: list[Entry] = []
        self.names: dict[str, str] = {}  # as they are now
        self.start: dict[str, str] = {}  # as they were when the log began
        self.bytes: dict[str, bytes] = {}  # of each file, when the log began
        self.attributes: dict[str, Attributes] = {}  # of each file, when the log began
        self._files: dict[tuple[int, int], str] = {}  # by device and inode
        self._count = 0
        for folder in self.folders:
            for path in sorted(Path(folder).iterdir()):
                if path.is_file():
                    file = self._new(str(path))
                    self.start[str(path)] = file
                    self.bytes[file] = path.read_bytes()
                    self.attributes[file] = attributes(path)

    def __enter__(self) -> Log:
        assert sysio.recorder is None
        sysio.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        sysio.recorder = None

    def mark(self, mark: Any, look: bool = False) -> None:
        """Something that the test has to know about each state."""
        self.entries.append(Entry("mark", mark=mark, look=look))

    def _new(self, path: str) -> str:
        self._count += 1
        st = os.stat(path)
        file = self._files[st.st_dev, st.st_ino] = self.names[path] = f"#{self._count}"
        return file

    def _file(self, fd: int) -> str | None:
        """The file that a descriptor is of; None if it lies elsewhere, or has no name any more."""
        st = os.fstat(fd)
        found = self._files.get((st.st_dev, st.st_ino))
        if found is None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            assert os.path.dirname(path) not in self.folders or path.endswith(" (deleted)"), (
                f"'{path}' was not made by sysio.create"
            )
        return found

    def _ours(self, path: str) -> str | None:
        """The path as we know it, if it lies in one of the folders."""
        path = os.path.abspath(path)
        folder = os.path.realpath(os.path.dirname(path))
        return os.path.join(folder, os.path.basename(path)) if folder in self.folders else None

    def _forget(self, path: str) -> str | None:
        """A name goes: its inode may be another file's soon."""
        file = self.names.pop(path, None)
        for key in [k for k, f in self._files.items() if f == file]:
            del self._files[key]
        return file

    # sysio.Recorder
    def created(self, path: str) -> None:
        name = self._ours(path)
        if name is None:
            return
        if name in self.names:  # opened once more; a test that removed it has told us
            st = os.stat(name)
            known = self._files.get((st.st_dev, st.st_ino))
            assert known == self.names[name], f"'{name}' was removed behind our back"
        else:
            file = self._new(name)
            self.entries.append(Entry("create", os.path.dirname(name), file=file, name=name))

    def wrote(self, fd: int, offset: int, data: bytes) -> None:
        file = self._file(fd)
        if file is None:
            return
        # A device writes whole sectors, with what the page cache has of the rest of them.
        start = offset // SECTOR * SECTOR
        length = -(-(offset + len(data)) // SECTOR) * SECTOR - start
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)  # ours may be for writing only
        try:
            whole = os.pread(reader, length, start)
        finally:
            os.close(reader)
        self.entries.append(Entry("write", file, start, whole))

    def flushed(self, fd: int, attributes: bool = False) -> None:
        file = self._file(fd)
        if file is not None:
            self.entries.append(Entry("flush", file, name="attributes" if attributes else ""))

    def truncated(self, fd: int, size: int) -> None:
        file = self._file(fd)
        if file is not None:
            self.entries.append(Entry("truncate", file, size))

    def attributed(self, fd: int, name: str, value: bytes | None) -> None:
        file = self._file(fd)
        if file is not None:
            self.entries.append(Entry("attribute", file, name=name, value=value))

    def renamed(self, source: str, target: str) -> None:
        name, new = self._ours(source), self._ours(target)
        assert (name is None) == (new is None), "a file came from another folder"
        if name is None or new is None:
            return
        folder = os.path.dirname(name)
        assert folder == os.path.dirname(new)
        self._forget(new)
        file = self.names[new] = self.names.pop(name)
        self.entries.append(Entry("rename", folder, file=file, name=name, target=new))

    def unlinked(self, path: str) -> None:
        name = self._ours(path)
        if name is not None:
            self._forget(name)
            self.entries.append(Entry("unlink", os.path.dirname(name), name=name))

    def directory_flushed(self, path: str) -> None:
        folder = os.path.realpath(path)
        if folder in self.folders:
            self.entries.append(Entry("flush", folder))


class State(NamedTuple):
    """What a crash left: the bytes of each file by its path, and the marks that had been passed."""

    files: dict[str, bytearray]
    marks: list[Any]
    what: str  # for a failure's message
    attributes: dict[str, Attributes]  # extended ones, by path


def attributes(path: Path) -> Attributes:
    """The extended attributes that a user gave to a file; none where they cannot be."""
    try:
        names = [n for n in os.listxattr(path) if n.startswith("user.")]
    except OSError:
        return {}
    return {n: os.getxattr(path, n) for n in names}


def attribute(attributes: Attributes, e: Entry) -> None:
    """One change on a file's attributes."""
    if e.value is None:
        attributes.pop(e.name, None)
    else:
        attributes[e.name] = e.value


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


def name(names: dict[str, str], e: Entry) -> None:
    """One change on the names of a folder."""
    if e.kind == "create":
        names[e.name] = e.file
    else:
        names.pop(e.name, None)
        if e.kind == "rename":
            names[e.target] = e.file


class Disks:
    """What is durable, and what happened since: of every file and folder."""

    def __init__(self, log: Log) -> None:
        self.bytes = {file: bytearray(data) for file, data in log.bytes.items()}
        self.attributes = {file: dict(them) for file, them in log.attributes.items()}
        self.names = dict(log.start)
        self.pending: dict[str, list[Entry]] = {}

    def happen(self, e: Entry) -> None:
        """The next entry of the log."""
        if e.kind == "flush":
            for change in self.pending.pop(e.of, []):
                if change.kind in NAMES:
                    name(self.names, change)
                elif change.kind == "attribute" and not e.name:  # fdatasync leaves them
                    self.pending.setdefault(e.of, []).append(change)
                elif change.kind == "attribute":
                    attribute(self.attributes.setdefault(e.of, {}), change)
                else:
                    apply(self.bytes[e.of], change)
        elif e.kind != "mark":
            self.pending.setdefault(e.of, []).append(e)
            if e.kind == "create":
                self.bytes[e.file] = bytearray()

    def state(self, chosen: dict[str, list[Entry]], marks: list[Any], what: str) -> State:
        """What is found if of all that is pending just `chosen` arrived."""
        names = dict(self.names)
        for changes in chosen.values():
            for change in changes:
                if change.kind in NAMES:
                    name(names, change)
        found, found_attributes = {}, {}
        for path, file in names.items():
            data = bytearray(self.bytes[file])
            theirs = dict(self.attributes.get(file, {}))
            for change in chosen.get(file, []):
                if change.kind == "attribute":
                    attribute(theirs, change)
                else:
                    apply(data, change)
            found[path], found_attributes[path] = data, theirs
        return State(found, list(marks), what, found_attributes)


def states(log: Log, seed: int, samples: int, every: int = 1) -> Iterator[State]:
    """Crash states, in the log's order.

    `every`: at each so many-th entry, and at all around a change of names or the like."""
    rnd = random.Random(seed)
    disks = Disks(log)
    marks: list[Any] = []
    wanted = _wanted(log.entries, every)
    for number, e in enumerate(log.entries):
        if e.kind == "mark":
            marks.append(e.mark)
        disks.happen(e)
        if number not in wanted:
            continue
        everything = f"all of the first {number + 1}"
        yield disks.state(disks.pending, marks, everything)
        for picked in _subsets(disks.pending, rnd, samples):
            yield disks.state(picked, marks, f"a subset at {number + 1}")


def _wanted(entries: list[Entry], every: int) -> set[int]:
    wanted = set(range(0, len(entries), every))
    for number, e in enumerate(entries):
        if e.look:
            wanted.add(number)
        if e.kind in NAMES or (e.kind == "flush" and not e.of.startswith("#")):
            wanted.update(range(number - AROUND, number + AROUND + 1))
    return wanted


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
            for of, changes in pending.items():
                picked[of] = [c for i, c in enumerate(changes) if bits >> (n + i) & 1]
                n += len(changes)
            yield picked
        return
    for _ in range(samples):
        common = rnd.random()
        picked = {}
        for of, changes in pending.items():
            keep = rnd.choice([0.0, 1.0, common, common])
            picked[of] = [c for c in changes if rnd.random() < keep]
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
        self.sizes = [len(flat)]

    def grow(self, size: int) -> None:
        """Made larger, by zeroes: until the next flush it may be either."""
        self.flat.extend(bytes(size - len(self.flat)))
        self.sizes.append(size)

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
        del self.sizes[:-1]

    def value(self, sector: int) -> bytes:
        """The sector's last flushed value."""
        return bytes(self.flat[sector * SECTOR : (sector + 1) * SECTOR])

    def wrong(self, got: bytes | bytearray) -> str:
        """What no crash could have left, in words; empty if all is legal."""
        if len(got) not in self.sizes:
            return f"{len(got)} bytes, not {self.sizes}"
        got = bytes(got).ljust(len(self.flat), b"\0")  # what is not there yet holds nothing
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
        target = folder / os.path.basename(path)
        target.write_bytes(data)
        put_attributes(target, state.attributes[path])


def put_attributes(path: Path, wanted: Attributes) -> None:
    """Give a file these extended attributes and no others."""
    there = attributes(path)
    for key in set(there) - set(wanted):
        os.removexattr(path, key)
    for key, value in wanted.items():
        if there.get(key) != value:
            os.setxattr(path, key, value)
