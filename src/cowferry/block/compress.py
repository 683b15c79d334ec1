"""Writing bytes compressed into a node that can hold them so (`Node.compress`).

In two steps, as other bytes that get a new place: the work, and the writing into room that nothing
points to, outside the gate; then `put` inside it. Only whole granules of the target are compressed.
What does not shrink, and what is not a whole granule, is written plainly in `put`.
"""

from __future__ import annotations

from types import TracebackType

from cowferry.block.node import Extent, Node


class Compressed:
    """`data`, on its way to `offset` of `target`, which has passed `check_compression`.

    A context manager: room that was not put to use is given back. For one thread."""

    def __init__(self, target: Node, offset: int, data: memoryview) -> None:
        """Compress. Raises `OSError`."""
        self.target, self.offset, self.data = target, offset, data
        granule, end = target.granule, offset + len(data)
        first = -(-offset // granule) * granule
        last = end if end == target.size else end // granule * granule
        self.rooms: dict[int, Extent] = {}  # by the offset of the granule
        if first < last:
            rooms = target.compress(data[first - offset : last - offset])
            self.rooms = {
                first + n * granule: room for n, room in enumerate(rooms) if room is not None
            }

    def put(self) -> None:
        """The target has the bytes. Inside its gate. Raises `OSError`."""
        at, end = self.offset, self.offset + len(self.data)
        for start, room in list(self.rooms.items()):
            self._write(at, start)
            self.target.link(start, room)
            del self.rooms[start]
            at = min(start + self.target.granule, end)
        self._write(at, end)

    def _write(self, start: int, stop: int) -> None:
        if start < stop:
            self.target.pwrite(self.data[start - self.offset : stop - self.offset], start)

    def __enter__(self) -> Compressed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for room in self.rooms.values():
            self.target.unreserve(room)
