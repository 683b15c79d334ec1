"""Checking an image: count every reference, compare with the refcounts, and mend what can be.

A *leak* is a cluster counted more often than it is referenced: room lost, nothing worse. A
*corruption* is the opposite, or a COPIED flag that contradicts the refcount, or a table entry that
cannot be right: then two owners may overwrite each other, or the guest reads what it did not write.

`references.py` counts, `stored.py` compares, and `repair.py` mends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cowferry.drivers.qcow2 import header as headers
from cowferry.drivers.qcow2.flags import contradictions
from cowferry.drivers.qcow2.refcounts import OFFSET
from cowferry.drivers.qcow2.references import References
from cowferry.drivers.qcow2.repair import Repair
from cowferry.drivers.qcow2.stored import Stored
from cowferry.drivers.result import Result

if TYPE_CHECKING:
    from cowferry.drivers.qcow2.image import Qcow2

ROUNDS = 4  # of looking and mending; the second one has little left to do


def check(image: Qcow2, fix: Literal["leaks", "all"] | None = None) -> Result:
    """Check, and mend if asked and open for writing. The caller lets no other thread write.

    `leaks` lowers refcounts that are too high. `all` mends all that can be mended without a doubt,
    and believes the tables more than the refcounts. Return counts as qemu-img has them; after a
    repair they say what is left. Raises `OSError` if the image cannot be read or written, and
    `CowferryError`; then a repair may be incomplete, and the image is no worse than before."""
    if not image.read_only and not image.broken:
        image.close_tables()
    refs, stored = _look(image)
    first, messages = refs.result, refs.notes.lines
    said: list[str] = []
    for _ in range(ROUNDS):
        wrong = refs.result.corruptions or refs.result.leaks
        if fix is None or not wrong:
            break
        repair = Repair(image, refs, stored, fix)
        changed = repair.run()
        said += [text for text in repair.said if text not in said]
        if not changed:
            break
        refs, stored = _look(image)
    result = refs.result
    if fix is not None:
        result.corruptions_fixed = max(first.corruptions - result.corruptions, 0)
        result.leaks_fixed = max(first.leaks - result.leaks, 0)
        result.left = refs.notes.lines if result is not first else ()
        if not (result.corruptions or result.check_errors):
            _mark_clean(image)
    result.messages, result.repairs = messages, tuple(said)
    return result


def _look(image: Qcow2) -> tuple[References, Stored]:
    refs = References(image)
    stored = Stored(refs)
    stored.compare()
    for position, entry, right in contradictions(refs, stored, stored.has_one):
        cluster = (entry & OFFSET) >> refs.bits
        refs.bad(
            f"the COPIED flag at file offset {position} is {'clear' if right else 'set'}, but the "
            f"refcount of cluster {cluster} is {'' if right else 'not '}1"
        )
    end = min(stored.end, max(refs.clusters, 1))
    refs.result.image_end_offset = end << image.header.cluster_bits
    return refs, stored


def _mark_clean(image: Qcow2) -> None:
    """The header says of a sound image neither that it is dirty nor that it is corrupt."""
    h = image.header
    if h.incompatible & (headers.DIRTY | headers.CORRUPT):
        h.incompatible &= ~(headers.DIRTY | headers.CORRUPT)
        image.write_header()
        image.broken = image.checking
