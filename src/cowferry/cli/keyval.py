"""QEMU's option syntax: `key=value,...` with dots for nesting, or JSON.

`driver=qcow2,file.driver=file,file.filename=a,,b.img` becomes nested objects; a comma in a value
is doubled; the first word may go without its key; a key whose parts are all numbers makes a
list. Values stay strings: whoever knows their type converts them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cowferry.errors import CowferryError

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*|\d+")
MAX_KEY = 127


def parse_keyval(text: str, implied: str | None = None) -> dict[str, Any]:
    """Nested dicts and lists of strings. Raises `CowferryError` naming the part that is wrong."""
    root: dict[str, Any] = {}
    for number, part in enumerate(split(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if number == 0 and implied is not None:
                key, value = implied, part
            else:
                raise CowferryError(f"Expected '=' after parameter '{part}'")
        _store(root, key, value)
    result = _lists(root, "")
    assert isinstance(result, dict)
    return result


def split(text: str) -> list[str]:
    """The parts between single commas; a doubled comma is one that belongs to the text."""
    if not text:
        return []
    parts = re.split(r"(?<!,)((?:,,)*),(?!,)", text)
    out: list[str] = []
    for i in range(0, len(parts), 2):
        commas = parts[i + 1] if i + 1 < len(parts) else ""
        out.append((parts[i] + commas).replace(",,", ","))
    if out and out[-1] == "":
        out.pop()  # a comma at the end is allowed
    return out


def _store(root: dict[str, Any], key: str, value: str) -> None:
    here = root
    parts = key.split(".")
    for n, part in enumerate(parts):
        if not KEY.fullmatch(part) or len(part) > MAX_KEY:
            raise CowferryError(f"Invalid parameter '{key}'")
        if n == len(parts) - 1:
            if isinstance(here.get(part), dict):
                raise CowferryError(f"Parameters '{key}.*' used inconsistently")
            here[part] = value
        else:
            below = here.setdefault(part, {})
            if not isinstance(below, dict):
                raise CowferryError(
                    f"Parameters '{'.'.join(parts[: n + 1])}.*' used inconsistently"
                )
            here = below


def _lists(value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        return value
    done = {k: _lists(v, f"{path}{k}.") for k, v in value.items()}
    numbers = [k for k in done if k.isdigit()]
    if not numbers:
        return done
    if len(numbers) < len(done):
        raise CowferryError(f"Parameters '{path}*' used inconsistently")
    wanted = [str(i) for i in range(len(done))]
    missing = [i for i in wanted if i not in done]
    if missing:
        raise CowferryError(f"Parameter '{path}{missing[0]}' missing")
    return [done[i] for i in wanted]


def parse_option(text: str, implied: str | None = None) -> dict[str, Any]:
    """keyval, or JSON if it begins with a brace. Raises `CowferryError`."""
    if not text.lstrip().startswith("{"):
        return parse_keyval(text, implied)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CowferryError(f"JSON parse error in '{text[:60]}': {error}") from None
    if not isinstance(value, dict):
        raise CowferryError(f"'{text[:60]}' is not a JSON object")
    return value
