"""Whole pools in simulation: the real broker on virtual time. ``python -m tests.sim --help``."""

import sys
from pathlib import Path

# The comparison of memory and rows is the broker's tests'.
_TESTS = str(Path(__file__).parents[2] / "packages" / "broker" / "tests")
if _TESTS not in sys.path:
    sys.path.append(_TESTS)
