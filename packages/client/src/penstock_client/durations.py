"""Durations as people write them."""

from __future__ import annotations

import re
from datetime import timedelta

Duration = int | float | str | timedelta

# Without end: some three hundred years.
SECONDS_MAX = 1e10
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")


def seconds(name: str, value: Duration) -> float:
    """``value`` in seconds: a number, a timedelta, or a text like "90s", "5m", "1h".

    Raises ValueError or TypeError naming the argument.
    """
    if isinstance(value, timedelta):
        number = value.total_seconds()
    elif isinstance(value, str):
        match = _TEXT.fullmatch(value.strip())
        if match is None:
            raise ValueError(
                f'{name}={value!r} is no duration: give seconds, or a text like "90s", "5m", "1h"'
            )
        number = float(match[1]) * _UNITS[match[2]]
    elif type(value) in (int, float):
        number = float(value)
    else:
        raise TypeError(
            f"{name} is a number of seconds, a timedelta or a text, not {type(value).__qualname__}"
        )
    if not 0 <= number < SECONDS_MAX:
        raise ValueError(f"{name}={value!r}: a duration cannot be negative or without end")
    return number


def expiry(value: Duration) -> int:
    """``expires=`` in whole seconds, as brokers count it: rounded down, for nothing starts after it.

    Raises ValueError or TypeError naming the argument.
    """
    number = seconds("expires", value)
    if 0 < number < 1:
        raise ValueError(
            f"expires={value!r}: brokers count it in whole seconds, so it would be over at once: give at"
            " least 1"
        )
    return int(number)
