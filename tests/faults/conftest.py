from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.e2e.conftest import direct_pool, kafka, kafka_pool, own_kafka, pytest_runtest_makereport

__all__ = ["direct_pool", "kafka", "kafka_pool", "own_kafka", "pytest_runtest_makereport"]

Figure = Callable[[str], None]
# A property of a test's report, which comes home from whichever process ran the test.
_FIGURE = "figure"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--short", action="store_true", help="seconds of faults where it would be minutes")
    group.addoption("--seed", type=int, help="repeat the faults of a run that printed this seed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for how in ("passed", "failed") for report in terminalreporter.getreports(how)]
    found = [(report.nodeid, *one) for report in reports for one in report.user_properties]
    lines = [f"{test.partition('::')[2]}: {text}" for test, name, text in found if name == _FIGURE]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Prints a figure at the end of the run; none of them decides whether a test passes."""
    return lambda text: request.node.user_properties.append((_FIGURE, text))


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """For how long faults go on."""
    return 6.0 if request.config.getoption("--short") else 120.0


@pytest.fixture
def dice(request: pytest.FixtureRequest, figure: Figure) -> random.Random:
    """What chooses the faults."""
    given = request.config.getoption("--seed")
    seed = random.randrange(1 << 32) if given is None else int(given)
    figure(f"--seed {seed}")
    return random.Random(seed)
