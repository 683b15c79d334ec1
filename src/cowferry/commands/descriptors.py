"""Descriptors handed over with SCM_RIGHTS: add-fd and its kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowferry.commands import Args, NoArgs, command
from cowferry.drivers import fdsets
from cowferry.errors import CowferryError

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class AddFd(Args):
    fdset_id: int | None = None
    opaque: str | None = None


@command("add-fd")
def add_fd(daemon: Daemon, args: AddFd) -> dict[str, int]:
    """Put the descriptor that came with this command into a set; open it as /dev/fdset/N."""
    if args.fdset_id is not None and args.fdset_id < 0:
        raise CowferryError("Parameter 'fdset-id' expects a non-negative value")
    fd = fdsets.take()
    return {"fdset-id": fdsets.add(fd, args.fdset_id, args.opaque), "fd": fd}


class RemoveFd(Args):
    fdset_id: int
    fd: int | None = None


@command("remove-fd")
def remove_fd(daemon: Daemon, args: RemoveFd) -> None:
    """Close a set, or one descriptor of it. Images opened from it keep their own."""
    fdsets.remove(args.fdset_id, args.fd)


@command("query-fdsets", locked=False)
def query_fdsets(daemon: Daemon, args: NoArgs) -> list[dict[str, Any]]:
    """Every set and its descriptors."""
    out: list[dict[str, Any]] = []
    for number, members in fdsets.all_sets().items():
        fds: list[dict[str, Any]] = [
            {"fd": p.fd, **({"opaque": p.opaque} if p.opaque is not None else {})} for p in members
        ]
        out.append({"fdset-id": number, "fds": fds})
    return out


class FdName(Args):
    fdname: str


@command("getfd")
def getfd(daemon: Daemon, args: FdName) -> None:
    """Keep the descriptor that came with this command under a name."""
    fdsets.name(args.fdname, fdsets.take())


@command("closefd")
def closefd(daemon: Daemon, args: FdName) -> None:
    """Close a descriptor that has a name."""
    fdsets.unname(args.fdname)
