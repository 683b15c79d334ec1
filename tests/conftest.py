"""For every test: records that cannot lie beside their image go to a folder of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _state_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Daemons that tests start as programs inherit it, too."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["COWFERRY_STATE"] = str(folder)
    yield folder
