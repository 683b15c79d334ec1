"""Which objects are still there. Unlike `gc.get_objects`, this is safe beside other threads, whose
tuples that function shows before they are made."""

from __future__ import annotations

import enum
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class Tracker:
    """Knows all objects of some classes that are made from now on, without keeping them."""

    def __init__(self, patch: pytest.MonkeyPatch, kinds: Iterable[type]) -> None:
        self.made: list[weakref.ref[Any]] = []
        for kind in kinds:
            patch.setattr(kind, "__init__", self._wrapped(kind.__init__))  # type: ignore[misc]

    def _wrapped(self, original: Callable[..., None]) -> Callable[..., None]:
        def init(this: Any, *arguments: Any, **named: Any) -> None:
            if this.__class__.__init__ is init:  # not for each of its bases once more
                self.made.append(weakref.ref(this))
            original(this, *arguments, **named)

        return init

    def alive(self, kind: type[T]) -> list[T]:
        """Those of a class that are still there."""
        found = (ref() for ref in list(self.made))
        return [thing for thing in found if isinstance(thing, kind)]

    def counts(self) -> Counter[str]:
        """How many there are of each class."""
        found = [ref() for ref in list(self.made)]
        return Counter(
            f"{type(x).__module__}.{type(x).__qualname__}" for x in found if x is not None
        )


def of_the_house() -> list[type]:
    """Every class of ours whose objects can be tracked."""
    found: dict[type, None] = {}
    for name, module in list(sys.modules.items()):
        for thing in vars(module).values() if name.startswith("cowferry.") else ():
            if not isinstance(thing, type) or thing.__module__ != name:
                continue
            if issubclass(thing, enum.Enum) or not thing.__weakrefoffset__:
                continue
            if "__init__" in vars(thing):
                found[thing] = None
    return list(found)
