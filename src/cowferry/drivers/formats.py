"""Which format a file has: its name says it, and its content can only contradict.

A guest can write any bytes into its disk, so a format is never guessed from content. The content is
looked at for one reason: to refuse. An image that begins, or ends, like a container must not be
served raw by accident. The guest would see the container's metadata, and overwrite it. The user can
say `-f raw` if a guest wrote those bytes.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from cowferry.block import names
from cowferry.drivers import fdsets
from cowferry.errors import ImageError

#: File name extensions that say what format a file has.
EXTENSIONS = {
    ".qcow2": "qcow2",
    ".qcow": "qcow2",
    ".qed": "qed",
    ".raw": "raw",
    ".iso": "raw",
    ".bin": "raw",
}

LOOK = 512  # bytes at each end of a file that are looked at


class Container(NamedTuple):
    """A kind of file that holds a disk and is no raw image.

    `format` is QEMU's name of it, or empty. `magic` are (offset, bytes), any of which tells it; a
    negative offset counts from the end of the file. `unpack` is a command for what QEMU does not
    read."""

    name: str
    format: str
    extensions: tuple[str, ...]
    magic: tuple[tuple[int, bytes], ...]
    unpack: str = ""

    def command(self, path: str) -> str:
        """Return the command that makes an image that we can use."""
        if self.unpack:
            return f"{self.unpack} '{path}'"
        return f"qemu-img convert -f {self.format} -O qcow2 '{path}' NEW.qcow2"


OURS = (
    Container("qcow2", "qcow2", (), ((0, b"QFI\xfb\0\0\0\2"), (0, b"QFI\xfb\0\0\0\3"))),
    Container("QED", "qed", (), ((0, b"QED\0"),)),
)

VMDK_TEXT = b"# Disk DescriptorFile"
VMDK_SPARSE = b"\xbe\xba\xfe\xca\0\0\0\0"  # an extent of a snapshot (SESparse)
VHD = b"conectix"
PARALLELS, PARALLELS_2 = b"WithoutFreeSpace", b"WithouFreSpacExt"

#: Containers for which there is no driver.
FOREIGN = (
    Container(
        "VMDK", "vmdk", (".vmdk",),
        ((0, b"KDMV"), (0, b"COWD"), (0, VMDK_TEXT), (0, VMDK_SPARSE)),
    ),
    Container("VDI", "vdi", (".vdi",), ((64, b"\x7f\x10\xda\xbe"),)),
    Container("VHD", "vpc", (".vhd", ".vpc", ".avhd"), tuple((at, VHD) for at in (0, -512, -511))),
    Container("VHDX", "vhdx", (".vhdx", ".avhdx"), ((0, b"vhdxfile"),)),
    Container("LUKS", "luks", (".luks",), ((0, b"LUKS\xba\xbe"),)),
    Container("Parallels", "parallels", (".hds", ".hdd"), ((0, PARALLELS), (0, PARALLELS_2))),
    Container("qcow version 1", "qcow", (), ((0, b"QFI\xfb\0\0\0\1"),)),
    Container("newer qcow2", "qcow2", (), ((0, b"QFI\xfb"),)),  # those that we know come before
    Container("Bochs", "bochs", (".bochs", ".redolog"), ((0, b"Bochs Virtual HD Image"),)),
    Container("cloop", "cloop", (".cloop",), ((0, b"#!/bin/sh\n#V2.0 Format\n"),)),
    Container("DMG", "dmg", (".dmg",), ((-512, b"koly"),)),
    Container("Android sparse", "", (".simg",), ((0, b"\x3a\xff\x26\xed\x01\0"),), "simg2img"),
    Container("gzip", "", (".gz", ".tgz"), (), "gunzip"),
    Container("xz", "", (".xz",), ((0, b"\xfd7zXZ\0"),), "unxz"),
    Container("zstd", "", (".zst",), (), "unzstd"),
    Container("bzip2", "", (".bz2",), (), "bunzip2"),
    Container("zip", "", (".zip",), (), "unzip"),
    Container("tar", "", (".ova", ".tar"), (), "tar -xf"),
)  # fmt: skip


def format_of(path: str) -> str:
    """Return the format that a file's name says; "raw" if it says none, or is a device or a URI.

    Raises `ImageError` for a container that no driver can read, by its name or its content, and for
    content that begins like qcow2 or QED in a file whose name says something else."""
    if names.is_uri(path):
        return "raw"  # what a server exports is the disk, whatever the export is called
    found = named(path)
    if found not in (None, "raw"):
        return found
    container = _recognized(path)
    if container is None:
        return "raw"
    if container in OURS:
        begins = f"it begins like a {container.name} image, and its name does not say its format"
        hint = (
            "give the format explicitly (-f qcow2 or qed, or -f raw if a guest wrote that header); "
            "formats are never guessed from the content"
        )
        raise ImageError(f"'{path}': {begins}", hint)
    raise _refused(path, container, "is")


def named(path: str) -> str | None:
    """Return the format that a file's name says, None if it says none. The file need not exist.

    Raises `ImageError` if the name says that it is a container that no driver knows."""
    extension = os.path.splitext(fdsets.path_of(path))[1].lower()
    container = next((c for c in FOREIGN if extension in c.extensions), None)
    if container is not None:
        raise _refused(path, container, "is, by its name,")
    return EXTENSIONS.get(extension)


def of_new(path: str) -> str | None:
    """Return the format that the name of a file that is to be made says, None if it says none.

    Raises `ImageError` if the name says a format that cannot be made."""
    extension = os.path.splitext(fdsets.path_of(path))[1].lower()
    container = next((c for c in FOREIGN if extension in c.extensions), None)
    if container is not None:
        raise ImageError(
            f"'{path}' would be, by its name, a {container.name} file, which cowferry cannot make",
            "choose another name, or give the format explicitly, e.g. raw or qcow2",
        )
    return EXTENSIONS.get(extension)


def way_out(format: str) -> str:
    """Return the command for an image of a format that QEMU knows and we do not; else empty."""
    for container in FOREIGN:
        if format and format == container.format:
            return f"a {container.name} image can be converted: {container.command('OLD')}"
    return ""


def _refused(path: str, container: Container, word: str) -> ImageError:
    return ImageError(
        f"'{path}' {word} a {container.name} file, which cannot be used as it is",
        f"convert it first: {container.command(path)}; or, if it is a raw image whose guest wrote "
        "these bytes, give the format explicitly: -f raw",
    )


def _recognized(path: str) -> Container | None:
    """The container that a file's content looks like."""
    try:
        fd = fdsets.open_fd(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None  # opening it again will say why
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return None
        end = os.lseek(fd, 0, os.SEEK_END)
        head, tail = os.pread(fd, LOOK, 0), os.pread(fd, LOOK, max(end - LOOK, 0))
    except OSError:
        return None
    finally:
        os.close(fd)
    tail = tail.rjust(LOOK, b"\0")
    for container in (*OURS, *FOREIGN):
        for offset, magic in container.magic:
            if offset >= 0 and head[offset:].startswith(magic):
                return container
            if offset < 0 and tail[LOOK + offset :].startswith(magic):
                return container
    return None
