"""The gate: who is inside which range of a disk.

Requests enter shared and pass each other. An exclusive section waits for the requests that
overlap its range, holds back new ones, and lets everything else through; over the whole disk
it is a drain. A claim holds back newcomers from the moment it is made, so a busy guest
cannot starve a job (D2).

Entering is on the path of every guest request, so it takes no lock when nobody is
exclusive. Each consumer owns a *slot*; it writes its range into the slot and only then looks
whether any claim is standing. A claimer appends its claim and only then looks at the slots.
Whichever comes second sees the other (the interpreter's stores are not reordered; a
compiled lane puts the same two steps under a mutex, at 25 ns). The slow path, and every
claim, is under `changed`.

Fairness among exclusives is by ticket: a claim waits for the overlapping claims that were
made before it and for nothing that came later, so no two can wait for each other.

A wait ends early if a scope of its thread ends (`block/scope.py`): a claim is withdrawn then, and
nobody is held back any more.
"""

from __future__ import annotations

import threading

from cowferry.block import scope

END = (1 << 63) - 1  # an end beyond every disk (off_t): a drain covers growth, too


class Slot:
    """One consumer's place in the in-flight table. Used by one thread at a time."""

    __slots__ = ("end", "start")

    def __init__(self) -> None:
        self.start = 0  # bytes; empty when start >= end
        self.end = 0


class Claim:
    """An exclusive section, standing from the moment it was asked for."""

    __slots__ = ("end", "owner", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.owner = threading.get_ident()


class Gate:
    """The in-flight table of one disk."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        # Guarded by `changed`, but read without it on the fast path. Replaced, never mutated:
        # a reader sees the old tuple or the new one.
        self.claims: tuple[Claim, ...] = ()
        self.slots: tuple[Slot, ...] = ()  # guarded by `changed`; replaced, never mutated

    def slot(self) -> Slot:
        """A place for one more consumer (a lane, a worker, a caller)."""
        mine = Slot()
        with self.changed:
            self.slots = (*self.slots, mine)
        return mine

    def drop(self, slot: Slot) -> None:
        """The consumer is gone."""
        with self.changed:
            self.slots = tuple(s for s in self.slots if s is not slot)
            self.changed.notify_all()

    def try_enter(self, slot: Slot, start: int, end: int) -> bool:
        """Enter if that needs no waiting. On False nothing has been entered."""
        slot.start = start
        slot.end = end
        for c in self.claims:
            if c.start < end and start < c.end:
                slot.end = slot.start = 0
                with self.changed:  # the claimer may have seen us for a moment
                    self.changed.notify_all()
                return False
        return True

    def enter(self, slot: Slot, start: int, end: int) -> None:
        """Enter, after the exclusive sections that overlap. Raises `CalledOff`."""
        while not self.try_enter(slot, start, end):
            with self.changed:
                while any(c.start < end and start < c.end for c in self.claims):
                    scope.wait(self.changed)

    def leave(self, slot: Slot) -> None:
        """Every enter is followed by one leave, whatever happened between."""
        slot.end = slot.start = 0
        if self.claims:
            with self.changed:
                self.changed.notify_all()

    def claim(self, start: int, end: int) -> Claim:
        """Wait until [start, end) is ours alone. The caller is not inside: it left first.

        Raises `CalledOff`."""
        mine = Claim(start, end)
        with self.changed:
            earlier = self.claims
            assert not any(
                c.owner == mine.owner and c.start < end and start < c.end for c in earlier
            ), "a thread claims a range that it holds already"
            self.claims = (*earlier, mine)
            try:
                while self._blocked(mine, earlier):
                    scope.wait(self.changed)
            except BaseException:
                self.claims = tuple(c for c in self.claims if c is not mine)
                self.changed.notify_all()
                raise
        return mine

    def try_claim(self, start: int, end: int) -> Claim | None:
        """Claim [start, end) if that needs no waiting. On None nothing has been claimed.

        The caller is not inside: it left first."""
        mine = Claim(start, end)
        with self.changed:
            earlier = self.claims
            self.claims = (*earlier, mine)
            if not self._blocked(mine, earlier):
                return mine
            self.claims = earlier
            self.changed.notify_all()  # a newcomer may have seen the claim for a moment
        return None

    def _blocked(self, mine: Claim, earlier: tuple[Claim, ...]) -> bool:
        now = self.claims
        return any(c in now and c.start < mine.end and mine.start < c.end for c in earlier) or any(
            s.start < mine.end and mine.start < s.end for s in self.slots if s.start < s.end
        )

    def release(self, mine: Claim) -> None:
        """Let the held-back ones go on."""
        with self.changed:
            self.claims = tuple(c for c in self.claims if c is not mine)
            self.changed.notify_all()

    @property
    def contended(self) -> bool:
        """Whether anybody is, or wants to be, exclusive just now."""
        return bool(self.claims)
