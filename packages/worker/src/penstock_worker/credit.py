"""How many tasks a worker may hold: short ones in large batches, long ones never hoarded."""

from __future__ import annotations

from math import exp, log

# A slot holds as many waiting tasks as it works off in this time.
PREFETCH_SECONDS = 0.05
PREFETCH_TASKS_MAX = 255
# A slot that has been busy with one task for this long takes nothing behind it, and what waits there
# is taken back. Longer than a busy machine lets a process wait for its turn.
BLOCKED_SECONDS = 0.2
# Waiting activations of one worker; above it there is no prefetch.
PREFETCH_BYTES_MAX = 32 * 1024 * 1024
_WEIGHT_OF_LATEST = 0.1
_SECONDS_MIN = 1e-6


class ServiceTime:
    """The typical run time of recent tasks: a geometric mean, so that one that was held up for a
    moment among thousands does not empty the queues."""

    def __init__(self) -> None:
        self._log_seconds: float | None = None

    def add(self, run_seconds: float) -> None:
        latest = log(max(run_seconds, _SECONDS_MIN))
        mean = self._log_seconds
        self._log_seconds = latest if mean is None else mean + _WEIGHT_OF_LATEST * (latest - mean)

    def prefetch(self) -> int:
        """Tasks that may wait behind the running one, per slot. Nothing measured: none."""
        if self._log_seconds is None:
            return 0
        return min(PREFETCH_TASKS_MAX, int(PREFETCH_SECONDS / exp(self._log_seconds)))


def room(capacity: int, slots: int, held: int, asked_for: int) -> int:
    """How many tasks to ask for now.

    A free slot is filled at once; the prefetch is topped up when half of it is used, so that
    short tasks come in few large batches. `asked_for` is what calls on their way may bring.
    """
    free = capacity - held - asked_for
    if free <= 0:
        return 0
    if held + asked_for < slots or free >= (capacity - slots) / 2:
        return free
    return 0
