"""The run folder: where a daemon's sockets are, and where the live commands look for them."""

from __future__ import annotations

import os

from cowferry.errors import CowferryError


def run_folder() -> str:
    """$COWFERRY_RUN, else $XDG_RUNTIME_DIR/cowferry, else /run/cowferry."""
    if chosen := os.environ.get("COWFERRY_RUN"):
        return chosen
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(session, "cowferry")
    return "/run/cowferry"


def make_run_folder() -> str:
    """The run folder, made if need be, for this user only. Raises `CowferryError`."""
    path = run_folder()
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise CowferryError(
            f"cannot make the run folder '{path}': {error.strerror}",
            "name another one with COWFERRY_RUN",
        ) from error
    return path
