"""Keepers: what makes the persistent dirty bitmaps of a node outlive a crash."""

from __future__ import annotations

from cowferry.block.bitmap import Bitmap


class Keeper:
    """The durable side of one node's persistent bitmaps."""

    holds: Bitmap  # where a change of the node is not yet marked durably

    def protect(self, offset: int, length: int) -> tuple[int, int]:
        """Mark the regions of the range durably; [start, end) in bytes of what is marked now."""
        raise NotImplementedError

    def resized(self) -> None:
        """The node has another size now."""
        raise NotImplementedError

    def checkpoint(self) -> None:
        """What is on disk becomes the precise bits again. Inside a drain of every disk above."""
        raise NotImplementedError

    def rest(self) -> None:
        """Nobody will write any more: the precise bits go to where they are at rest."""
        raise NotImplementedError

    def resume(self) -> None:
        """The node may be written again."""
        raise NotImplementedError
