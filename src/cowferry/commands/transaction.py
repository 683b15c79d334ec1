"""Transactions: several actions at one point in time.

A type of action is a function `(daemon, args, so_far) -> Part` under a name, in the module of the
command that does the same by itself: `@action("blockdev-snapshot")`. Its arguments are those of the
command. It looks at everything that may be wrong; `so_far` has the parts before it, whose effects
it has to reckon with.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import msgspec

from cowferry.commands import Args, command, convert
from cowferry.errors import CowferryError
from cowferry.jobs.group import Group
from cowferry.operations.transaction import Part, Transaction

if TYPE_CHECKING:
    from cowferry.daemon import Daemon

_numbers = itertools.count(1)


class Action(NamedTuple):
    """A type of action: its arguments, how it is prepared, and whether it is a job."""

    args: type[Args]
    prepare: Callable[[Daemon, Any, Transaction], Part]
    is_job: bool


ACTIONS: dict[str, Action] = {}

F = TypeVar("F", bound=Callable[..., Part])


def action(name: str, is_job: bool = False) -> Callable[[F], F]:
    """Register a function as a type of action. Its second parameter's annotation gives the types.

    With `is_job` it may end with others (completion-mode=grouped): it joins `so_far.group`."""

    def keep(function: F) -> F:
        hints = typing.get_type_hints(
            function, localns={"Daemon": Any, "Transaction": Transaction, "Part": Part}
        )
        ACTIONS[name] = Action(hints["args"], function, is_job)
        return function

    return keep


def alone(
    daemon: Daemon, what: str, prepare: Callable[[Daemon, Any, Transaction], Part], args: Args
) -> None:
    """A transaction of one action. Raises `CowferryError`."""
    with Transaction(daemon, what) as so_far:
        so_far.parts.append(prepare(daemon, args, so_far))
        so_far.finish()


class Abort(Args):
    pass


@action("abort")
def abort(daemon: Daemon, args: Abort, so_far: Transaction) -> Part:
    """Nothing at all, for tests of the roll-back."""
    raise CowferryError("Transaction aborted using Abort action")


class TransactionAction(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    data: dict[str, Any] = {}


class Properties(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    completion_mode: Literal["individual", "grouped"] = "individual"


class TransactionActions(Args):
    actions: list[TransactionAction]
    properties: Properties | None = None


@command("transaction")
def transaction(daemon: Daemon, args: TransactionActions) -> None:
    """Several actions at one point in time: all, or none and everything as it was."""
    chosen = []
    for n, wanted in enumerate(args.actions):
        known = ACTIONS.get(wanted.type)
        if known is None:
            raise CowferryError(
                f"Parameter 'type' does not accept value '{wanted.type}'",
                f"in action {n}; there are: {', '.join(ACTIONS)}",
            )
        chosen.append((known, convert(known.args, wanted.data)))
    group = None
    if args.properties is not None and args.properties.completion_mode == "grouped":
        for wanted, (known, _) in zip(args.actions, chosen, strict=True):
            if not known.is_job:
                raise CowferryError(
                    f"Action '{wanted.type}' does not support transaction property "
                    "completion-mode = grouped"
                )
        group = Group(f"transaction-{next(_numbers)}", emit=_nobody, gone=_nothing)
    with Transaction(daemon, "transaction", group) as so_far:
        for known, given in chosen:
            so_far.parts.append(known.prepare(daemon, given, so_far))
        so_far.finish()


def _nobody(name: str, data: dict[str, Any]) -> None:
    """QEMU has no events for a group."""


def _nothing(group: Group) -> None:
    """It is in no list."""
