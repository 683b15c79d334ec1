"""Values of creation options, as qemu-img's `-o` takes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cowferry.block import names
from cowferry.drivers import OVERLAYS
from cowferry.errors import CowferryError

#: Formats of backing files; the last two are names that QEMU has recorded for raw ones.
BACKING = {"raw", *OVERLAYS, "file", "host_device"}
SUFFIXES = {"k": 10, "m": 20, "g": 30, "t": 40}


def check_known(options: Mapping[str, Any], known: Collection[str], kind: str) -> None:
    """Raise `CowferryError` for an option that images of a kind do not have."""
    unknown = set(options) - set(known)
    if unknown:
        raise CowferryError(
            f"{kind} images have no option '{min(unknown)}'",
            f"they have {', '.join(sorted(known))}",
        )


def check_backing(options: Mapping[str, Any]) -> None:
    """Raise `CowferryError` for the format of a backing file that is not named or not known."""
    if options.get("backing_fmt") and not options.get("backing_file"):
        raise CowferryError(
            "Backing format cannot be used without backing file", "name the backing file, too"
        )
    if not names.is_uri(str(options.get("backing_file", ""))):  # else its driver may be nbd
        check_format(options.get("backing_fmt"))


def check_format(name: object) -> None:
    """Raise `CowferryError` if no backing file can have this format."""
    if name and str(name) not in BACKING:
        raise CowferryError(
            f"backing format '{name}' is not known", f"it can be {', '.join(sorted(BACKING))}"
        )


def number(options: Mapping[str, Any], key: str, default: int) -> int:
    """Return a number, which may have a suffix of `SUFFIXES`. Raises `CowferryError`."""
    value = str(options.get(key, default)).strip().lower().removesuffix("b")
    shift = SUFFIXES.get(value[-1:], 0)
    try:
        return int(value[:-1] if shift else value) << shift
    except ValueError:
        raise CowferryError(f"Parameter '{key}' expects a size, not '{options[key]}'") from None


def flag(options: Mapping[str, Any], key: str) -> bool:
    """Return whether an option is on; without it, False. Raises `CowferryError`."""
    value = options.get(key, False)
    if value in (True, "on", "yes", "true", "y"):
        return True
    if value in (False, "off", "no", "false", "n"):
        return False
    raise CowferryError(f"Parameter '{key}' expects 'on' or 'off', not '{value}'")


def word(options: Mapping[str, Any], key: str, *words: str) -> str:
    """Return the value of an option that takes one of `words`; without it, the first of them.

    Raises `CowferryError`."""
    value = str(options.get(key, words[0]))
    if value not in words:
        raise CowferryError(
            f"Parameter '{key}' does not accept value '{value}'", f"it takes {', '.join(words)}"
        )
    return value
