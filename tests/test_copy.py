"""`spans` agrees with a naive look at every byte; `fill` and `place` write what was there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from cowferry.block.copy import Copier, Kind, spans
from cowferry.block.node import Extent, Node, State, resolve
from cowferry.drivers import opening

UNIT = 512


class Painted(Node):
    """A node whose every 512 bytes are of a given state: a map to walk, with no bytes behind."""

    def __init__(self, states: list[State], backing: Node | None = None) -> None:
        self.states, self.backing, self.size = states, backing, UNIT * len(states)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        while length > 0:
            n = min(length, UNIT - offset % UNIT)
            yield Extent(n, self.states[offset // UNIT])
            offset, length = offset + n, length - n


states = st.lists(st.sampled_from(State), min_size=1, max_size=48)


@given(top=states, middle=states, bottom=states, granule=st.sampled_from([512, 1024, 4096]))
def test_spans_say_of_each_granule_what_it_needs(
    top: list[State], middle: list[State], bottom: list[State], granule: int
) -> None:
    base = Painted(bottom)
    source = Painted(top, Painted(middle, base))
    for stop in (None, base):
        answer: list[tuple[int, int, Kind]] = []
        for s in spans(source, 0, source.size, granule, stop):
            assert not answer or answer[-1][2] is not s.kind, "neighbours are not joined"
            answer.append(s)
        for start in range(0, source.size, granule):
            n = min(granule, source.size - start)
            kinds = {e.state for e in resolve(source, start, n, stop)}
            want = {
                frozenset([State.ZERO]): Kind.ZERO,
                frozenset([State.HOLE]): Kind.KEEP,
            }.get(frozenset(kinds), Kind.COPY)
            got = [k for o, length, k in answer if o <= start and start + n <= o + length]
            assert got == [want]


def test_a_chain_two_hundred_deep_resolves_without_recursion() -> None:
    node: Node | None = None
    for n in range(300):
        node = Painted([State.HOLE] * n + [State.DATA] + [State.HOLE] * (299 - n), node)
    assert node is not None
    found = list(resolve(node, 0, node.size))
    assert [e.depth for e in found] == [299 - n for n in range(300)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_place_makes_the_target_read_as_the_source(tmp_path_factory: object, seed: int) -> None:
    rnd = random.Random(seed)
    folder = tmp_path_factory.mktemp("copy")  # type: ignore[attr-defined]
    assert isinstance(folder, Path)
    size = 1 << 20
    want = bytearray(size)
    with open(folder / "source.raw", "wb") as f:
        f.truncate(size)
        for _ in range(rnd.randrange(8)):
            at, data = rnd.randrange(size), rnd.randbytes(rnd.randrange(1, 90_000))
            data = data[: size - at]
            f.seek(at)
            f.write(data)
            want[at : at + len(data)] = data
    format = rnd.choice(["raw", "qcow2"])
    target_path = str(folder / f"target.{format}")
    opening.create_image(target_path, format, size, {})
    source = opening.open_image(str(folder / "source.raw"), read_only=True)
    target = opening.open_image(target_path)
    copier = Copier()
    for span in spans(source, 0, size, target.granule):
        copier.place(source, target, span)
    target.flush()
    got = bytearray(size)
    target.pread(memoryview(got), 0)
    opening.close_chain(target)
    opening.close_chain(source)
    assert got == want
