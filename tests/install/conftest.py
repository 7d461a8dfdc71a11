"""Built wheels, and environments that hold nothing but what a package asks for."""

import os
import sys
from pathlib import Path

import pytest

# What would change what is tested: settings of interpreters, of tools and of Penstock itself.
FOREIGN = ("PYTHON", "UV_", "PENSTOCK_", "TASKBROKER_")


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The directory with the four wheels that the session `build` has just made."""
    directory = os.environ.get("PENSTOCK_WHEELS")
    if not directory:
        pytest.fail("PENSTOCK_WHEELS names no directory of wheels. Next: nox -s build", pytrace=False)
    return Path(directory)


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """The environment of a shell in which nobody has activated anything, with this very Python first."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    inherited.pop("VIRTUAL_ENV", None)
    return inherited | {"PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"}
