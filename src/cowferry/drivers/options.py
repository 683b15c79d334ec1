"""Values of creation options, as qemu-img's `-o` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cowferry.errors import CowferryError

SUFFIXES = {"k": 10, "m": 20, "g": 30, "t": 40}


def number(options: Mapping[str, Any], key: str, default: int) -> int:
    """A number, which may have a suffix of `SUFFIXES`. Raises `CowferryError`."""
    value = str(options.get(key, default)).strip().lower().removesuffix("b")
    shift = SUFFIXES.get(value[-1:], 0)
    try:
        return int(value[:-1] if shift else value) << shift
    except ValueError:
        raise CowferryError(f"Parameter '{key}' expects a size, not '{options[key]}'") from None
