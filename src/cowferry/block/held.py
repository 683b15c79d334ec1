"""Nodes that a job or a command holds, and the words in which others hear of it."""

from __future__ import annotations

from typing import NamedTuple

from cowferry.block.node import Node
from cowferry.errors import DeviceInUse

BY_JOB = "block device is in use by block job: "  # QEMU's words; the type of the job follows


class Held(NamedTuple):
    """A node that is not to be changed by anybody else: why, and the job's id if it is a job.

    `served`: exports may be added over it meanwhile, one of them for writing. `kept`: exports that
    only read may; it lies over a node that is being written, and shows it as it was. `shared`: its
    holder only reads it, as a disk, and so may others that hold it in this way."""

    node: Node
    why: str
    holder: str
    brief: bool  # by a command that waits for no stranger: another command waits for it
    thread: int  # of the command that claimed it
    served: bool
    kept: bool = False
    shared: bool = False

    @property
    def user(self) -> str:
        """The job or the command that holds the node, in words."""
        what = self.why.removeprefix(BY_JOB)
        return f"{what} job '{self.holder}'" if self.holder else what


def refuse_held(held: Held, whose: str, wanted: str) -> DeviceInUse:
    """The refusal of what is `wanted` of a node that is held, and that is called `whose`."""
    job = f" '{held.holder}'" if held.holder else ""
    return DeviceInUse(
        f"{whose} is busy: {held.why}{job}, which excludes {wanted}",
        f"wait for job{job}, or cancel it" if job else "wait for it",
    )


def refuse_floating(whose: str, below: str, wanted: str) -> DeviceInUse:
    """The refusal of what is `wanted` of an overlay, called `whose`, over a node that is being
    written."""
    return DeviceInUse(
        f"{whose} is busy: a writable export changes '{below}' below it, so it shows no point in "
        f"time, which excludes {wanted}",
        "start blockdev-backup with sync=none first: it preserves the moment of its start",
    )
