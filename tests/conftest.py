"""For every test: records that cannot lie beside their image go to a folder of the run; which
examples Hypothesis tries.

On a laptop they are new ones each time, and CI tries the same ones each time: that a change is
right must not hang on chance. Hypothesis takes some of its numbers from our source, of the modules
that it finds loaded; so all are loaded, whichever tests came before.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import cowferry

settings.register_profile("laptop", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "CI", settings.get_profile("laptop"), derandomize=True, database=None, print_blob=True
)
settings.load_profile("CI" if os.environ.get("CI") == "true" else "laptop")
for module in pkgutil.walk_packages(cowferry.__path__, "cowferry."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


# A shell that starts the suite in the background, and nohup, have us ignore these. Programs that
# tests start would inherit that, and some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _state_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Daemons that tests start as programs inherit it, too."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["COWFERRY_STATE"] = str(folder)
    yield folder
