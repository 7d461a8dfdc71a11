"""When a failed task is started again: a policy as a value."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

from penstock_client.durations import SECONDS_MAX

ExceptionTypes = tuple[type[BaseException], ...]
OnExceeded = Literal["deadletter", "discard"]


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < SECONDS_MAX:
        raise ValueError(f"{name} is a number of seconds and cannot be {value}")


# What a message can carry.
ATTEMPTS_MAX = 2**32 - 1


class Verdict(Enum):
    """What an exception means for its task."""

    RETRY = "retry"
    FAIL = "fail"
    IGNORE = "ignore"


class Backoff(Protocol):
    """How long to wait before the start that follows a failed one."""

    def seconds(self, attempt: int) -> float:
        """The wait after failed start number ``attempt`` (from 1), in seconds."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same wait each time, in seconds."""

    wait: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("wait", self.wait)

    def seconds(self, attempt: int) -> float:
        return self.wait


@dataclass(frozen=True, slots=True)
class Exponential:
    """``base`` seconds, multiplied by ``factor`` with each failure, at most ``cap``.

    ``jitter``: the share of the wait that is left to chance, from 0 to 1, so that tasks which failed
    together do not come back together.
    """

    base: float = 1.0
    cap: float = 3600.0
    factor: float = 2.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        _not_negative("base", self.base)
        _not_negative("cap", self.cap)
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, not {self.factor}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be from 0 to 1, not {self.jitter}")

    def seconds(self, attempt: int) -> float:
        # Bounded before the power is taken: it overflows at a few thousand attempts.
        steps = min(max(attempt - 1, 0), 1000)
        try:
            wait = min(self.base * self.factor**steps, self.cap)
        except OverflowError:
            wait = self.cap
        return wait * (1 - self.jitter * random.random())


@dataclass(frozen=True, slots=True)
class Retry:
    """Which failures are retried, how often, after how long, and what then.

    ``max_attempts`` counts starts: 1 is no retry. ``on`` is retried, ``exclude`` fails at once,
    ``ignore`` counts as done; ignore comes before exclude before on, and an exception in none of
    them fails at once. ``on_exceeded``: what becomes of a task that has run out of attempts.
    """

    max_attempts: int = 1
    backoff: Backoff = Fixed(0.0)
    on: ExceptionTypes = (Exception,)
    exclude: ExceptionTypes = ()
    ignore: ExceptionTypes = ()
    on_exceeded: OnExceeded = "deadletter"

    def __post_init__(self) -> None:
        if type(self.max_attempts) is not int or not 1 <= self.max_attempts <= ATTEMPTS_MAX:
            raise ValueError(
                f"max_attempts counts starts and must be from 1 to {ATTEMPTS_MAX}, not {self.max_attempts!r}"
            )
        if not callable(getattr(self.backoff, "seconds", None)):
            raise TypeError(f"backoff= takes Fixed(...) or Exponential(...), not {self.backoff!r}")
        if self.on_exceeded not in ("deadletter", "discard"):
            raise ValueError(f'on_exceeded must be "deadletter" or "discard", not {self.on_exceeded!r}')
        for word in ("on", "exclude", "ignore"):
            object.__setattr__(self, word, exception_types(word, getattr(self, word)))

    def classify(self, error: BaseException) -> Verdict:
        """What ``error`` means for the task that raised it."""
        if isinstance(error, self.ignore):
            return Verdict.IGNORE
        if isinstance(error, self.exclude):
            return Verdict.FAIL
        return Verdict.RETRY if isinstance(error, self.on) else Verdict.FAIL

    def delay_seconds(self, attempt: int) -> float:
        """The wait after failed start number ``attempt`` (from 1), in seconds."""
        return self.backoff.seconds(attempt)


def exception_types(word: str, given: object) -> ExceptionTypes:
    """A type, or several, as a tuple. Raises TypeError naming what is no exception type."""
    types = given if isinstance(given, tuple | list | set | frozenset) else (given,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(f"{word}= takes exception types, not {kind!r}")
    return tuple(types)
