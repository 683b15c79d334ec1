"""The errors a person or a QMP client sees.

Two kinds never mix. A *data path* (reading, writing, flushing a node) raises `OSError` with
an errno, because that is what an NBD client gets as an answer. Everything else that is
somebody's mistake or somebody's broken file raises `CowferryError`: one line that names the
disk, the file, the offset or the option, and a hint that says what is still intact and what
to do next. A traceback is a bug of ours.
"""

from __future__ import annotations

from typing import ClassVar


class CowferryError(Exception):
    """A mistake told in one line. `desc` is the line, `hint` what to do next (may be empty)."""

    klass: ClassVar[str] = "GenericError"  # the QMP error class

    def __init__(self, desc: str, hint: str = "") -> None:
        super().__init__(one_line(desc))
        self.desc = one_line(desc)
        self.hint = one_line(hint)


def one_line(text: str) -> str:
    """Return text in which nothing moves a cursor or ends a line, whatever a name out of an image
    or off a socket holds. Bytes that are no UTF-8 are shown as `\\xNN`."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    byte = ord(c) - 0xDC00  # as file names are decoded
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(c)[1:-1]


def reason(error: Exception, name: str = "") -> str:
    """Return why a call failed, on one line, without the `name` of the image with which an error of
    a node begins."""
    text = getattr(error, "strerror", None) or str(error)
    return one_line(text).removeprefix(f"{one_line(name)}: ")


class ImageError(CowferryError):
    """An image that cannot be opened or used: damaged, of another format, unsupported."""


class DeviceNotFound(CowferryError):
    """No disk or node has that name."""

    klass = "DeviceNotFound"


class DeviceInUse(CowferryError):
    """The disk is held by a job, an export or another process."""

    klass = "DeviceInUse"


class DeviceNotActive(CowferryError):
    """No job runs on that disk."""

    klass = "DeviceNotActive"


class NotSupported(CowferryError):
    """The disk, or its format, cannot do that."""

    klass = "NotSupported"


class CommandNotFound(CowferryError):
    """The monitor has no such command (or not yet: capabilities are not negotiated)."""

    klass = "CommandNotFound"
