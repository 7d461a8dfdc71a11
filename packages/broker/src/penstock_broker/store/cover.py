"""Topic partitions this broker took from, and which of their rows another broker could still run.

A row is *covered* once an acknowledged offset commit of this broker has passed it. Until then
whoever takes the partition over reads it again, so no outcome of it may be acknowledged.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock_broker.domain.activation import Activation


@dataclass(slots=True)
class Source:
    """One topic partition this broker has taken from."""

    id: int
    topic: str
    partition: int
    # Everything in [start, next) is stored, finished or skipped. -1: nothing taken yet.
    start: int = -1
    next: int = -1
    # Every offset below was passed by an acknowledged commit of this broker.
    covered: int = 0
    # (offset, seq, id hash) of stored rows at or above ``covered``, in the order of the log.
    uncovered: deque[tuple[int, int, int]] = field(default_factory=deque)
    # At-most-once rows that may not start before they are covered.
    held_starts: deque[Activation] = field(default_factory=deque)
    # (offset, tie breaker, future of whether it was covered) of those who wait.
    waiting: list[tuple[int, int, asyncio.Future[bool]]] = field(default_factory=list)

    def is_covered(self, offset: int) -> bool:
        return offset < self.covered


class Cover:
    """Who waits for which offset."""

    def __init__(self, start: Callable[[Activation], None]) -> None:
        # Puts an at-most-once row into the order of hand-out.
        self._start = start
        self._tie = 0

    def wait(self, source: Source, offset: int) -> asyncio.Future[bool]:
        """True once ``offset`` is covered, False when the row became another broker's."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._tie += 1
        heapq.heappush(source.waiting, (offset, self._tie, future))
        return future

    def advance(self, source: Source, offset: int) -> list[int]:
        """An acknowledged commit passed everything below ``offset``. The id hashes it covers."""
        covered: list[int] = []
        source.covered = max(source.covered, offset)
        while source.uncovered and source.uncovered[0][0] < offset:
            covered.append(source.uncovered.popleft()[2])
        while source.held_starts and source.held_starts[0].offset < offset:
            self._start(source.held_starts.popleft())
        while source.waiting and source.waiting[0][0] < offset:
            future = heapq.heappop(source.waiting)[2]
            if not future.done():
                future.set_result(True)
        return covered

    def drop(self, source: Source, boundary: int) -> list[tuple[int, int]]:
        """Uncovered rows at or above ``boundary`` are someone else's. Their (seq, id hash)."""
        kept, dropped = deque[tuple[int, int, int]](), []
        for entry in source.uncovered:
            if entry[0] >= boundary:
                dropped.append(entry[1:])
            else:
                kept.append(entry)
        source.uncovered = kept
        source.held_starts = deque(row for row in source.held_starts if row.offset < boundary)
        source.next = min(source.next, boundary) if source.next >= 0 else -1
        waiting, source.waiting = source.waiting, []
        for entry in waiting:
            if entry[0] < boundary:
                heapq.heappush(source.waiting, entry)
            elif not entry[2].done():
                entry[2].set_result(False)
        return dropped
