"""A pytest plugin that writes down why tests failed: {"failures": [[test, exception, text], ...], ...}."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "planted",
    derandomize=True,
    deadline=None,
    database=None,
    # The first counter-example will do.
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=list(hypothesis.HealthCheck),
)

_failures: list[tuple[str, str, str]] = []
_passed: list[str] = []


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None:
        _failures.extend(
            (item.nodeid, type(leaf).__name__, str(leaf)[:300]) for leaf in _leaves(call.excinfo.value)
        )
    elif report.when == "call":
        _passed.append(item.nodeid)
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _failures.append((report.nodeid, "CollectionError", str(report.longrepr)[-300:]))


def pytest_sessionfinish() -> None:
    package = sys.modules.get(f"penstock_{os.environ['PLANTED_PACKAGE']}")
    told = {
        "failures": _failures,
        "passed": _passed,
        "imported": package.__file__ if package is not None else None,
    }
    Path(os.environ["PLANTED_VERDICT"]).write_text(json.dumps(told))
