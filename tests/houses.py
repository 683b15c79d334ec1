"""A house full of images and records, and the witness that nothing in it has changed.

`House` is a folder where people have put all kinds of things: disks that a daemon of this process
serves, images with records and bitmaps beside them, images that another process has open, files
that are no images. `Witness` remembers all of it, byte by byte, and tells what is different.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from chains import make_base, overlay
from cowferry.block import moves
from cowferry.daemon import Daemon
from cowferry.drivers import opening
from cowferry.monitor import qmp
from daemons import Told
from limited import until
from scenes import cowferry, qemu
from storages import Loop, Mounts

SIZE = 256 << 10
RECORDS = (".moved", ".committing", ".copying", ".filling", ".bitmaps")
OWNER = 1234  # of some files, as a hypervisor's user would be


class Entry(NamedTuple):
    """What is known of a file, a folder or a device."""

    kind: str
    mode: int
    owner: tuple[int, int]
    size: int
    content: str  # a digest, or where a symbolic link leads


def entry(path: Path) -> Entry:
    """Look at a file, without following it if it is a symbolic link."""
    st = path.lstat()
    content, size = "", st.st_size
    if stat.S_ISLNK(st.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(st.st_mode) or stat.S_ISBLK(st.st_mode):
        with open(path, "rb") as f:
            content = hashlib.file_digest(f, "blake2b").hexdigest()
            size = f.seek(0, os.SEEK_END)
    else:
        size = 0
    kind = stat.filemode(st.st_mode)[0]
    return Entry(kind, stat.S_IMODE(st.st_mode), (st.st_uid, st.st_gid), size, content)


class Witness:
    """Remembers folders and devices as they are now."""

    def __init__(self, *places: Path) -> None:
        self.places = places
        self.seen = self._look()

    def _look(self) -> dict[Path, Entry]:
        out = {}
        for place in self.places:
            if not os.path.lexists(place):
                continue
            out[place] = entry(place)
            if place.is_dir():
                out |= {p: entry(p) for p in place.rglob("*")}
        return out

    def differences(self) -> list[str]:
        """What was made, is gone, or is not as it was, in words."""
        now = self._look()
        out = [f"{p} was made" for p in sorted(now.keys() - self.seen.keys())]
        out += [f"{p} is gone" for p in sorted(self.seen.keys() - now.keys())]
        for path in sorted(now.keys() & self.seen.keys()):
            before, after = self.seen[path], now[path]
            for what, old, new in zip(Entry._fields, before, after, strict=True):
                if old != new:
                    shown = "" if what == "content" else f": {old} became {new}"
                    out.append(f"{what} of {path} changed{shown}")
        return out

    def advice(self, text: str) -> list[str]:
        """Bad advice in the text of an error: to remove what we did not make, or what is gone.

        A path in a sentence that tells the reader to remove something must be there, and must not
        have been there before."""
        text = re.sub(r"(cowferry|with) bitmap --remove[^;\n]*", "", text)
        text = re.sub(r"block-dirty-bitmap-remove[^;\n]*|remove the bitmap", "", text)
        out = []
        for sentence in re.split(r"[;\n]|\. ", text):
            if not ADVICE.search(sentence):
                continue
            named = re.findall(r"'(/[^']*)'", sentence) or re.findall(r"'(/[^']*)'", text)
            for path in map(Path, named):
                if path.suffix in RECORDS:  # those are ours
                    continue
                if path in self.seen:
                    out.append(f"told to remove {path}, which was there before: {text!r}")
                elif not os.path.lexists(path):
                    out.append(f"told to remove {path}, which is not there: {text!r}")
        return out


#: The imperative, not "was removed" or "is removed".
ADVICE = re.compile(
    r"\b(remove|delete|unlink|rm)\b|\b(to|may) be (removed|deleted)\b", re.IGNORECASE
)


class House:
    """All kinds of files, and a daemon of this process that serves some of them.

    Disks: `vm` (qcow2 over base.raw), `two` (raw), `busy` (a copy of it is ready: job `j`, to
    busy.copy.raw), `ro` (read-only), `kept` (locked by an administrator)."""

    def __init__(self, folder: Path, mounts: Mounts) -> None:
        self.folder = folder / "images"
        self.folder.mkdir()
        self.state = folder / "state"
        self.run = folder / "run"
        self.run.mkdir()
        self.state.mkdir()
        self._held = contextlib.ExitStack()
        try:
            self._build(mounts)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the daemon and everything beside it."""
        self._held.close()

    def path(self, name: str) -> str:
        """The path of a file of the house, or of its device."""
        return self.device if name == "DEVICE" else str(self.folder / name)

    def witness(self) -> Witness:
        """Remember everything as it is now."""
        return Witness(self.folder, self.state, Path(self.device), Path(self.tiny))

    def known(self) -> Any:
        """What the daemon knows: nodes, jobs, exports, locks, groups, limits."""
        ask = self.daemon.execute
        queries = (
            "query-named-block-nodes", "query-jobs", "query-block-exports", "x-query-locks",
            "x-query-groups", "x-query-limits", "x-query-bitmaps", "query-fdsets",
            "x-query-backup-exports",
        )  # fmt: skip
        return {q: ask(q, {}) for q in queries}

    # Building ------------------------------------------------------------------------------

    def _build(self, mounts: Mounts) -> None:
        f = self.folder
        make_base(f, SIZE)
        overlay(f, "vm.qcow2", "base.raw", "raw", SIZE)
        os.chmod(f / "vm.qcow2", 0o600)
        os.chown(f / "vm.qcow2", OWNER, OWNER)
        for name in ("two", "busy", "ro", "kept", "plain", "smaller", "other"):
            data = make_base(self.run, SIZE // 2 if name == "smaller" else SIZE, seed=len(name))
            (f / f"{name}.raw").write_bytes(data)
        os.chmod(f / "plain.raw", 0o640)
        self._images()
        self._records()
        (f / "user.txt").write_text("not an image\n")
        (f / "folder").mkdir()
        (f / "folder" / "letter.txt").write_text("Dear Ada\n")
        (f / "link.raw").symlink_to("nowhere.raw")
        (f / "alias.qcow2").symlink_to("vm.qcow2")
        os.mkfifo(f / "fifo.raw")
        self._devices(mounts)
        self._locked()
        self._serve()

    def _images(self) -> None:
        f = self.folder
        opening.create_image(str(f / "alone.qcow2"), "qcow2", SIZE, {})
        opening.create_image(str(f / "small.qcow2"), "qcow2", SIZE // 2, {})
        opening.create_image(str(f / "alone.qed"), "qed", SIZE, {})
        overlay(f, "over.qcow2", "base.raw", "raw", SIZE)
        for name in ("alone.qcow2", "over.qcow2"):
            node = opening.open_image(str(f / name))
            node.pwrite(memoryview(name.encode() * 3000), 1000)
            opening.close_chain(node)
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o",
             f"data_file={f}/ext.data,data_file_raw=on", f / "ext.qcow2", SIZE)  # fmt: skip
        with open(f / "ext.data", "r+b") as data:
            data.write(b"d" * 9000)

    def _records(self) -> None:
        """Images with something beside them that says more about them."""
        f = self.folder
        cowferry("bitmap", "--add", f / "plain.raw", "b0")
        cowferry("bitmap", "--add", f / "alone.qcow2", "b0")
        opening.create_image(str(f / "part.raw"), "raw", SIZE,
                             {"backing_file": "base.raw", "backing_fmt": "raw"})  # fmt: skip
        for name in ("moved", "half", "copied"):
            opening.create_image(str(f / f"{name}.qcow2"), "qcow2", SIZE, {})
        overlay(f, "moved.snap1.qcow2", "moved.qcow2", "qcow2", SIZE)
        left, current = str(f / "moved.qcow2"), str(f / "moved.snap1.qcow2")
        moves.record([moves.Move("moved", left, current, "qcow2")])
        moves.committing(str(f / "half.qcow2"), str(f / "over.qcow2"))
        st = os.stat(f / "copied.qcow2")
        moves.copying(str(f / "copied.qcow2"), str(f / "vm.qcow2"), "copy", SIZE, st.st_ino)

    def _devices(self, mounts: Mounts) -> None:
        """A device that is large enough for whatever is tried, and one that is too small."""
        files = Path(self._held.enter_context(tempfile.TemporaryDirectory(dir=mounts.folder)))
        self.device, self.tiny = "", ""
        for name, size in (("device", 2 * SIZE), ("tiny", SIZE // 4)):
            loop = Loop(files / name, size, 512)
            self._held.callback(loop.close)
            setattr(self, name, loop.path)

    def _locked(self) -> None:
        """Images that a process of QEMU's has open for writing, with records beside them."""
        f = self.folder
        for name, format in (("locked.qcow2", "qcow2"), ("locked.raw", "raw")):
            opening.create_image(str(f / name), format, SIZE, {})
        cowferry("bitmap", "--add", f / "locked.raw", "b0")
        moves.record([moves.Move("l", str(f / "locked.qcow2"), str(f / "locked.raw"), "raw")])
        file = "file.driver=file,file.filename"
        child = subprocess.Popen(
            ["qemu-storage-daemon", "--pidfile", self.run / "pid",
             "--blockdev", f"qcow2,node-name=a,{file}={f}/locked.qcow2",
             "--blockdev", f"raw,node-name=b,{file}={f}/locked.raw",
             "--nbd-server", f"addr.type=unix,addr.path={self.run}/qsd.sock",
             "--export", "nbd,id=a,node-name=a,writable=on",
             "--export", "nbd,id=b,node-name=b,writable=on"],
        )  # fmt: skip
        self._held.callback(child.wait, 30)
        self._held.callback(child.terminate)
        until((self.run / "pid").exists, "qemu-storage-daemon did not start")

    def _serve(self) -> None:
        self.daemon = Daemon()
        self._held.callback(self.daemon.close)
        server = qmp.server(self.daemon)
        server.listen_unix(str(self.run / "qmp.sock"))
        self._held.callback(server.stop)
        self._held.callback(server.stop_listening)
        self.daemon.start_nbd({"type": "unix", "path": str(self.run / "nbd.sock")})
        told = Told(self.daemon)
        f = self.folder
        for name, file in (("vm", "vm.qcow2"), ("two", "two.raw"), ("busy", "busy.raw"),
                           ("ro", "ro.raw"), ("kept", "kept.raw")):  # fmt: skip
            disk = self.daemon.open_disk(name, str(f / file), read_only=name == "ro")
            self.daemon.add_export(disk, name, writable=name != "ro")
        ask = self.daemon.execute
        ask("x-disk-lock", {"device": "kept", "reason": "it is Ada's"})
        ask("block-dirty-bitmap-add", {"node": "vm", "name": "b0"})
        copy = {"device": "busy", "job-id": "j", "target": str(f / "busy.copy.raw")}
        ask("x-disk-copy", copy)
        told.wait("BLOCK_JOB_READY")
