"""Names of images: paths, and URIs of exports of NBD servers.

A URI is taken where a person names an image, and in what we record of a move. Inside an image it
is never followed (`drivers/opening.py`).
"""

from __future__ import annotations

import os
import re

URI = re.compile(r"nbds?(\+[a-z]+)?://")


def is_uri(name: str) -> bool:
    """Whether `name` is a URI, and so no path."""
    return URI.match(name) is not None


def absolute(name: str) -> str:
    """The absolute path, or the URI as it is."""
    return name if is_uri(name) else os.path.abspath(name)


def real(name: str) -> str:
    """The absolute path without symbolic links, or the URI as it is."""
    return name if is_uri(name) else os.path.realpath(name)


def same(a: str, b: str) -> bool:
    """Whether both name one image, however a path is spelled. A file need not be there."""
    try:
        return os.path.samefile(a, b)
    except OSError:  # one is not there, or in a folder that is closed to us, or no path
        return real(a) == real(b)
