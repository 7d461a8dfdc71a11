"""Waiting for a condition, with a deadline: the only way to wait in these tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.05


def until(condition: Callable[[], T], what: str | Callable[[], str], seconds: float = 60) -> T:
    """The first truthy value of ``condition``. AssertionError with ``what`` when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what if isinstance(what, str) else what()}")
        time.sleep(POLL_SECONDS)
