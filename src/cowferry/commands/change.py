"""Another image for a disk or a node: change, change-backing-file, blockdev-reopen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowferry.commands import Args, command
from cowferry.errors import CowferryError, NotSupported
from cowferry.jobs.job import finish
from cowferry.operations import reopen
from cowferry.operations.snapshot import Change

if TYPE_CHECKING:
    from cowferry.daemon import Daemon


class ChangeMedium(Args):
    device: str
    target: str
    arg: str | None = None
    format: str | None = None
    notify: bool = True
    force: bool = False


@command("change", locked=False)
def change(daemon: Daemon, args: ChangeMedium) -> None:
    """Switch a disk to another image, under a drain (`format` may stand in `arg`, too).

    With `notify` false the guest is not told: the image has to be of the same size, and the move
    is recorded. An image whose backing file is the present one goes on top of it."""
    if args.device == "vnc":
        raise NotSupported("there is no VNC here")
    if args.force:
        daemon.cancel_on(args.device)
    with daemon.turn():
        part = Change(daemon, args.device, args.target, args.format or args.arg, not args.notify)
        try:
            with daemon.graph.turn.apart():
                finish([part])
        except BaseException as error:
            part.abort()
            if isinstance(error, OSError):
                raise CowferryError(
                    f"'{args.device}' could not be changed: {error.strerror or error}",
                    "it is as it was",
                ) from error
            raise


class ChangeBackingFile(Args):
    device: str
    image_node_name: str
    backing_file: str
    unsafe: bool = False


@command("change-backing-file", locked=False)
def change_backing_file(daemon: Daemon, args: ChangeBackingFile) -> None:
    """Write another backing file name into an image's header, if it leads to the same bytes.

    With `unsafe` it is not looked at."""
    reopen.change_backing_file(
        daemon, args.device, args.image_node_name, args.backing_file, args.unsafe
    )


class BlockdevReopen(Args):
    options: list[dict[str, Any]]


@command("blockdev-reopen")
def blockdev_reopen(daemon: Daemon, args: BlockdevReopen) -> None:
    """Change access, backing or file of nodes: all of them, or none."""
    reopen.reopen(daemon, args.options)
