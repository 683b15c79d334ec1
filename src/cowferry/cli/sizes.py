"""Sizes as people type and read them: 10, 512K, 1.5G."""

from __future__ import annotations

import re
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any

import click

from cowferry.errors import CowferryError

UNITS = "KMGTPE"
LIMIT = 1 << 63


def parse_size(text: str) -> int:
    """Bytes. A suffix is a power of 1024, as in qemu-img. Raises `CowferryError`."""
    found = re.fullmatch(r"\s*(\d+)(\.\d+)?\s*([bBkKmMgGtTpPeE]?)(?:i?[bB])?\s*", text)
    unit = found[3].upper() if found else ""
    if not found or (found[2] and unit in ("", "B")):
        raise CowferryError(
            f"Invalid size '{text}'",
            "a number of bytes, or with a suffix k, M, G, T, P or E (powers of 1024)",
        )
    factor = 1 << 10 * (UNITS.index(unit) + 1) if unit in UNITS and unit else 1
    value = int(found[1]) * factor + int(float(found[2] or 0) * factor)
    if value >= LIMIT:
        raise CowferryError(f"Image size must be less than 8 EiB! ('{text}')")
    return value


def human(count: float) -> str:
    """As qemu-img prints sizes: 196 KiB, 1 GiB, 1.5 GiB."""
    units = ["B", *(f"{u}iB" for u in UNITS)]
    n = 0
    while count >= 1000 and n < len(units) - 1:
        count /= 1024
        n += 1
    text = f"{count:.3g}"
    return f"{text} {units[n]}"


if TYPE_CHECKING:
    _Size = click.ParamType[int, Any]
    _Seconds = click.ParamType[float, Any]
else:
    _Size = _Seconds = click.ParamType


class Size(_Size):
    """A click type for sizes."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Bytes, or click's own error."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except CowferryError as error:
            hint = f": {error.hint}" if error.hint else ""
            raise click.BadParameter(f"{error.desc}{hint}", ctx, param) from None


class Seconds(_Seconds):
    """A click type for a time to wait: more than nothing, and no longer than the system can."""

    name = "SECONDS"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Seconds, or click's own error."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= TIMEOUT_MAX:
            raise click.BadParameter(f"'{value}' is not a number of seconds", ctx, param)
        return seconds
