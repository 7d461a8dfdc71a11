"""What every test of the repository has around it."""

import logging
from collections.abc import Iterator

import hypothesis
import pytest
import structlog

# The same examples every time, so that a run says something about a change. To look for more:
# pytest --hypothesis-profile=default --hypothesis-seed=N
hypothesis.settings.register_profile(
    # How long an example takes is the machine's affair.
    "fixed",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """A test that starts a command in this process sets up its logs, on a stream that ends with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
