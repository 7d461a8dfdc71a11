"""Workers that gave a task back because they do not know it, or its arguments do not fit their code."""

from __future__ import annotations

# For so long a worker is not offered again what it gave back.
REFUSED_MS = 60_000
REFUSALS_MAX = 100_000
WORKERS_MAX = 1_000


class Refusals:
    """Kept in memory only: after a restart a worker may be asked once more."""

    def __init__(self) -> None:
        # seq -> worker -> monotonic ms until which it is not asked; the oldest first.
        self._refused: dict[int, dict[str, int]] = {}

    def add(self, seq: int, worker: str, mono: int) -> None:
        """``worker`` gave the row back at ``mono`` (monotonic ms)."""
        workers = self._refused.pop(seq, {})
        workers.pop(worker, None)
        workers[worker] = mono + REFUSED_MS
        if len(workers) > WORKERS_MAX:
            del workers[next(iter(workers))]
        self._refused[seq] = workers
        while len(self._refused) > REFUSALS_MAX:
            del self._refused[next(iter(self._refused))]

    def by(self, seq: int, worker: str, mono: int) -> bool:
        """Whether ``worker`` is not to be asked at ``mono``."""
        workers = self._refused.get(seq)
        return workers is not None and workers.get(worker, 0) > mono
