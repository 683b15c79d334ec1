"""A real guest for tests and the demo: QEMU with `-accel tcg`, Debian's cloud kernel, busybox.

The guest's root file system lies on the disk that is served; the initramfs only loads the virtio
modules and switches to it. One talks to the guest through a shell on its serial console, and to
the guest agent, if there is one, through the socket of its virtio port.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "guest"
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev",
           "virtio_pci", "virtio_blk", "virtio_console")  # fmt: skip
AGENT = CACHE / "agent" / "usr" / "sbin" / "qemu-ga"  # unpacked by tools/setup.sh
CHANNEL = "org.qemu.guest_agent.0"
BOOT_SECONDS = 120.0  # a noisy machine; usually 4

INITRAMFS = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in {modules}; do insmod /modules/$m.ko; done
n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
mount -t ext4 /dev/vda /root || echo GUEST-NO-ROOT
exec switch_root /root /sbin/init
"""

INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tmpfs run /run
# Its own files lie in memory: while the file systems are frozen it must not wait for one of them.
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name 2>/dev/null)" = {channel} ] &&
        qemu-ga -d -m virtio-serial -p /dev/${{port##*/}} -t /run -f /run/qemu-ga.pid \
            -l /run/qemu-ga.log
done
echo GUEST-READY
while true; do setsid cttyhack sh -c 'stty -echo; PS1= exec sh' ; done
"""


def missing(agent: bool = False) -> str:
    """Why a guest (with its agent) cannot run on this machine; empty if it can."""
    lacking = [p for p in ("qemu-system-x86_64", "busybox", "cpio", "mke2fs") if not find(p)]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    if not (CACHE / "vmlinuz").exists():
        return "no guest kernel in .cache/guest (tools/setup.sh test)"
    if agent:
        if not AGENT.exists():
            return "no qemu-ga in .cache/guest (tools/setup.sh test)"
        lacking = [str(path) for path in libraries(AGENT) if not path.exists()]
        if lacking:
            return f"qemu-ga needs {', '.join(lacking)}"
    return ""


def libraries(program: Path) -> list[Path]:
    """The shared libraries that a program needs; one that is not here by its mere name."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True)
    found = re.findall(r"(\S+) => not found|(/\S+) \(0x", done.stdout)
    return [Path(name or path) for name, path in found]


def find(program: str) -> str | None:
    """Where a program lies; those for file systems may not be on the path."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def initramfs(folder: Path) -> Path:
    """The initramfs, made once and kept beside the kernel."""
    out = CACHE / "initrd.gz"
    if out.exists() and out.stat().st_mtime > Path(__file__).stat().st_mtime:
        return out
    tree = folder / "initramfs"
    for name in ("bin", "proc", "sys", "dev", "root", "modules"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(find("busybox") or "", tree / "bin" / "busybox")
    for module in MODULES:
        source = next((CACHE / "root").rglob(f"{module}.ko"))
        shutil.copy(source, tree / "modules")
    init = tree / "init"
    init.write_text(INITRAMFS.format(modules=" ".join(MODULES)))
    init.chmod(0o755)
    names = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*")))
    done = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        input=names.encode(), cwd=tree, capture_output=True, check=True,
    )  # fmt: skip
    fresh = out.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(gzip.compress(done.stdout, 1))
    fresh.rename(out)
    return out


def root_image(path: Path, folder: Path, size: int = 48 << 20, agent: bool = False) -> None:
    """A raw image at `path` with an ext4 root file system on it. Needs no root rights."""
    tree = folder / "rootfs"
    for name in ("bin", "sbin", "proc", "sys", "dev", "tmp", "data", "etc", "run"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(find("busybox") or "", tree / "bin" / "busybox")
    applets = subprocess.run(
        ["busybox", "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    for applet in applets:
        link = tree / "bin" / applet
        if applet != "busybox" and not link.exists():
            link.symlink_to("busybox")
    init = tree / "sbin" / "init"
    init.write_text(INIT.format(channel=CHANNEL))
    init.chmod(0o755)
    if agent:
        shutil.copy(AGENT, tree / "sbin" / "qemu-ga")
        for library in libraries(AGENT):
            place = tree / library.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)
    with open(path, "wb") as f:
        f.truncate(size)
    subprocess.run(
        [find("mke2fs") or "mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(path)],
        check=True, capture_output=True,
    )  # fmt: skip


class GuestError(Exception):
    """The guest did not do what was asked; the text has the end of its console."""


class Guest:
    """A running guest. Its disks are NBD URIs, in order vda, vdb, ...

    With `agent` its root is to hold one, which then answers on the unix socket of that path."""

    def __init__(
        self, disks: list[str], folder: Path, memory: int = 256, agent: Path | None = None
    ) -> None:
        command = [
            "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", str(memory),
            "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
            "-kernel", str(CACHE / "vmlinuz"), "-initrd", str(initramfs(folder)),
            "-append", "console=ttyS0 quiet panic=-1 tsc=unstable",
        ]  # fmt: skip
        for disk in disks:
            # a comma in an option is doubled
            command += ["-drive", f"file={disk.replace(',', ',,')},format=raw,if=virtio"]
        if agent is not None:
            where = str(agent).replace(",", ",,")
            command += [
                "-chardev", f"socket,id=agent,path={where},server=on,wait=off",
                "-device", "virtio-serial-pci",
                "-device", f"virtserialport,chardev=agent,name={CHANNEL}",
            ]  # fmt: skip
        self.console = bytearray()
        self.heard = threading.Condition()  # guards `console` and `ended`
        self.ended = False
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._listen, name="guest console", daemon=True).start()
        self.number = 0
        try:
            self._wait(re.compile(rb"GUEST-READY"), BOOT_SECONDS)
            self.run("true", BOOT_SECONDS)
        except BaseException:
            self.kill()
            raise

    def _listen(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            with self.heard:
                self.console += data
                self.heard.notify_all()
        with self.heard:
            self.ended = True
            self.heard.notify_all()

    def _wait(self, pattern: re.Pattern[bytes], seconds: float, start: int = 0) -> re.Match[bytes]:
        deadline = time.monotonic() + seconds
        with self.heard:
            while True:
                found = pattern.search(self.console, start)
                if found:
                    return found
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    tail = bytes(self.console[-4000:]).decode("utf-8", "replace")
                    why = "it has ended" if self.ended else f"not within {seconds} s"
                    raise GuestError(f"waiting for {pattern.pattern!r}: {why}\n{tail}")
                self.heard.wait(left)

    def start(self, command: str) -> int:
        """Begin a command; `finish` with the number returned waits for it."""
        assert self.process.stdin is not None
        self.number += 1
        # The marks are put together by the shell, so that an echo of the line is not one.
        line = f"echo BEG''IN{self.number}; {command}; echo E''ND{self.number}:$?\n"
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()
        return self.number

    def finish(self, number: int, seconds: float = 60.0) -> str:
        """What the command printed. Raises `GuestError` if it failed or takes too long."""
        pattern = re.compile(rb"BEGIN%d\r?\n(.*?)END%d:(\d+)" % (number, number), re.DOTALL)
        found = self._wait(pattern, seconds)
        output = found[1].replace(b"\r", b"").decode("utf-8", "replace")
        if found[2] != b"0":
            raise GuestError(f"exit code {found[2].decode()}:\n{output}")
        return output

    def run(self, command: str, seconds: float = 60.0) -> str:
        """Run a command in the guest and wait for it."""
        return self.finish(self.start(command), seconds)

    def poweroff(self, seconds: float = 30.0) -> None:
        """Write everything back and turn it off."""
        assert self.process.stdin is not None
        self.run("sync", seconds)
        self.process.stdin.write(b"poweroff -f\n")
        self.process.stdin.flush()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Pull the plug."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
