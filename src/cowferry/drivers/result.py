"""What a format's `check` found: the counts of qemu-img's check, and messages."""

from __future__ import annotations

from dataclasses import dataclass

MOST_NOTES = 100  # messages that are kept; a damaged table may cause millions


class Notes:
    """Messages in order. The first `MOST_NOTES` are kept, the others are counted."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._left_out = 0

    def add(self, text: str, count: int = 1) -> None:
        """Add a message that stands for `count` findings."""
        if self.full:
            self._left_out += count
        else:
            self._kept.append(text)

    def extend(self, others: Notes) -> None:
        """Add the messages of others, and their count of the rest."""
        for text in others._kept:
            self.add(text)
        self._left_out += others._left_out

    @property
    def full(self) -> bool:
        """Whether the text of a further message would be dropped."""
        return len(self._kept) >= MOST_NOTES

    @property
    def lines(self) -> tuple[str, ...]:
        """The messages, and how many more there were."""
        more = (f"... and {self._left_out} more like these",) if self._left_out else ()
        return (*self._kept, *more)


@dataclass
class Result:
    """What qemu-img's check counts; `image_end_offset` in bytes.

    After a repair `corruptions` and `leaks` count what is left, and `_fixed` what was repaired."""

    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    check_errors: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0
    messages: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()  # what a repair did, and what it left alone and why
    left: tuple[str, ...] = ()  # messages about what is wrong still, after a repair

    @property
    def exit_code(self) -> int:
        """qemu-img's: 0 clean, 1 the check failed, 2 corrupt, 3 leaks."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0
