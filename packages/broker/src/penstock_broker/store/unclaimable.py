"""Pending activations that no worker asks for: told, counted, and at last dead letters."""

from __future__ import annotations

import json
from itertools import islice

import structlog

from penstock_broker.domain.activation import Activation, Status
from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.batch import Report
from penstock_broker.store.database import Database
from penstock_broker.store.index import PairQueue
from penstock_broker.store.memory import Memory

log = structlog.get_logger("store")

# Longer than any poll waits: who has not asked for this long is not there.
UNASKED_MS = 120_000
# Rows that become dead letters in one go.
AGED_ROWS_MAX = 1000
LOOK_EVERY_MS = 60_000
GO_ON_MS = 1_000


class Unclaimable:
    """Every method is called on the event loop, but for ``pending``."""

    def __init__(self, memory: Memory, age_ms_max: int) -> None:
        self._memory = memory
        # 0: they are kept for ever.
        self._age_ms_max = age_ms_max
        self._told: set[int] = set()
        self.look_at = memory.clock.mono_ms() + LOOK_EVERY_MS

    def pending(self) -> list[tuple[PairQueue, int]]:
        """(pair, pending rows) of those that nobody asks for, paused ones apart. Any thread may call it."""
        memory, since = self._memory, self._memory.clock.mono_ms() - UNASKED_MS
        return [
            (queue, n)
            for queue in list(memory.index.pairs.values())
            if (n := memory.counts[queue.pair][Status.PENDING])
            and queue.paused_at is None
            and memory.index.asked_at(queue) < since
        ]

    def look(self, mono: int) -> None:
        """Tell of those that are new, and age out those that nobody has asked for too long. ``mono``:
        monotonic ms."""
        unclaimable = self.pending()
        for queue, rows in unclaimable:
            if queue.pair not in self._told:
                log.warning(
                    "no worker asks for these tasks; they wait",
                    application=queue.application,
                    namespace=queue.namespace,
                    tasks=rows,
                )
        self._told = {queue.pair for queue, _ in unclaimable}
        self.look_at = mono + LOOK_EVERY_MS
        if self._age_ms_max:
            for queue, _ in unclaimable:
                if mono - self._memory.index.asked_at(queue) >= self._age_ms_max:
                    self._age_out(queue)

    def _age_out(self, queue: PairQueue) -> None:
        memory, now = self._memory, self._memory.clock.wall_ms()
        before = now - self._age_ms_max
        error = json.dumps(
            {
                "type": "unclaimed",
                "message": f"no worker has asked for namespace {queue.namespace!r} of application"
                f" {queue.application!r} for {self._age_ms_max / 1000:g} s (unclaimable_seconds)",
            }
        )
        waiting = (row for row in queue.ready if row.reserved and row.ready_at <= before)
        old: list[Activation] = list(islice(waiting, AGED_ROWS_MAX))
        for row in old:
            memory.change(row, Event.UNCLAIMED, now, error=error)
        if not old and queue.spilled:
            spilled: list[int] = []

            def find(database: Database) -> None:
                spilled[:] = database.spilled_before(queue.pair, before, AGED_ROWS_MAX)

            def report() -> None:
                only = frozenset((Status.PENDING,))
                memory.batch.reports += [
                    Report(Event.UNCLAIMED, now, seq, only=only, error=error) for seq in spilled
                ]
                if spilled:
                    self.look_at = memory.clock.mono_ms() + GO_ON_MS
                    memory.work.set()

            memory.batch.calls.append(find)
            memory.batch.then.append(report)
            memory.work.set()
        elif old:
            self.look_at = memory.clock.mono_ms() + GO_ON_MS
