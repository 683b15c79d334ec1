"""What several test files share."""

from __future__ import annotations

import os
import shutil

import pytest


def need(*programs: str) -> None:
    """Skip the calling test, or fail it under CI, if a program is not installed."""
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        unavailable(f"not installed: {', '.join(missing)}")


def unavailable(reason: str) -> None:
    """This machine lacks a component: a skip on a laptop, a failure under CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run this test, but: {reason}")
    pytest.skip(reason)
