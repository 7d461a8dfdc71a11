"""Time, as a port: the only place that reads a clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import structlog

log = structlog.get_logger("clock")

# What is corrected of a difference to the system's clock, of the time that passes: a little more than a
# clock that runs wrong needs.
SLEW = 1000
JUMP_NS = 1_000_000_000


class Clock(Protocol):
    def wall_ms(self) -> int:
        """Epoch milliseconds, for delays and expiry."""

    def mono_ms(self) -> int:
        """Monotonic milliseconds, for leases and deadlines."""


# A suspended machine's sleep included, where that can be known.
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _elapsed_ns() -> int:
    """Since some time in the past."""
    return time.clock_gettime_ns(_ELAPSED)


class SystemClock:
    """The wall clock is the system's at the start, and from then on what has passed: a system clock that
    is set while the broker runs starts no task early and expires none. It is followed at a thousandth of
    the time that passes, which is enough for one that is disciplined."""

    def __init__(
        self, system_ns: Callable[[], int] = time.time_ns, elapsed_ns: Callable[[], int] = _elapsed_ns
    ) -> None:
        self._system_ns = system_ns
        self._elapsed_ns = elapsed_ns
        self._wall = system_ns()
        self._at = elapsed_ns()
        self._jumped = False
        # The loop asks, and the threads of the Kafka clients.
        self._lock = threading.Lock()

    def wall_ms(self) -> int:
        with self._lock:
            # In this order a pause between the two makes nothing early.
            system, now = self._system_ns(), self._elapsed_ns()
            passed, self._at = now - self._at, now
            wall = self._wall + passed
            ahead = system - wall
            most = passed // SLEW
            self._wall = wall + max(-most, min(ahead, most))
            if (abs(ahead) > JUMP_NS) != self._jumped:
                self._tell(ahead)
            return self._wall // 1_000_000

    def _tell(self, ahead: int) -> None:
        self._jumped = not self._jumped
        if self._jumped:
            log.warning(
                "the system clock was set; delays and expiry go on by the time that passes, and follow it"
                " slowly; a restart of the broker takes it at once",
                seconds=ahead / 1e9,
            )
        else:
            log.info("the clock agrees with the system clock again")

    def mono_ms(self) -> int:
        return time.clock_gettime_ns(_ELAPSED) // 1_000_000
