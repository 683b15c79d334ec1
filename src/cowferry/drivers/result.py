"""What a format's `check` found: the counts of qemu-img's check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Result:
    """What qemu-img's check counts; `image_end_offset` in bytes."""

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

    @property
    def exit_code(self) -> int:
        """qemu-img's: 0 clean, 1 the check failed, 2 corrupt, 3 leaks."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0
