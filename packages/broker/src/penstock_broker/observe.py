"""What the parts of the broker know, as metrics: counted per batch where it happens, read at the scrape."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.domain.activation import Activation, Status
from penstock_broker.domain.lifecycle import OUTCOMES
from penstock_broker.metrics import Metrics
from penstock_broker.store.batch import ARRIVALS, Batch
from penstock_broker.store.inflight import Inflight

# A scrape does not wait longer for the event loop; what it would have told stays as it was.
LOOP_SECONDS_MAX = 2.0


class Observer:
    """Fills the metrics of one broker from its store."""

    def __init__(self, metrics: Metrics, store: Inflight, waiting: Waiting) -> None:
        self._metrics = metrics
        self._store = store
        self._waiting = waiting
        self._loop = asyncio.get_running_loop()
        # What the counters were told of the store's own totals.
        self._told: dict[object, int] = {key: n for key, n in store.memory.books.items()}  # noqa: C416 - wider
        self._hit = metrics.claims.labels("hit")
        self._empty = metrics.claims.labels("empty")
        waiting.on_claimed = self._claimed
        metrics.before_scrape(self._refresh)

    def _claimed(self, rows: Sequence[Activation]) -> None:
        if not rows:
            self._empty.inc()
            return
        now = self._store.clock.wall_ms()
        self._hit.inc()
        self._metrics.claimed.inc(len(rows))
        self._metrics.queue_latency.observe_all([max(0, now - row.ready_at) / 1000 for row in rows])

    def called(self, path: str, code: str, seconds: float) -> None:
        self._metrics.rpc.labels(path, code).observe(seconds)

    def written(self, batch: Batch, seconds: float) -> None:
        self._metrics.commit_time.observe(seconds)
        self._metrics.tick_rows.observe(
            len(batch.rows) + len(batch.claims) + len(batch.moves) + len(batch.gone)
        )

    def _since(self, key: object, total: int) -> int:
        """How much a total of the store has grown since it was last told."""
        grown = total - self._told.get(key, 0)
        self._told[key] = total
        return max(0, grown)

    def _refresh(self) -> None:
        """In the thread of the scrape: reads, and copies what may change meanwhile."""
        self._tasks()
        self._books()
        self._differences()
        store, metrics = self._store, self._metrics
        for answer, count in list(store.memory.tally.answers.items()):
            metrics.reports.labels(answer.name.lower()).inc(self._since(("answer", answer), count))
        for event, number in OUTCOMES.items():
            outcome = event.value.replace(" ", "_")
            metrics.attempts.labels(outcome).inc(self._since(event, store.memory.tally.outcomes[number]))
        metrics.duplicates.inc(self._since("duplicates", store.memory.tally.duplicates))
        metrics.deliveries_lost.inc(self._since("lost", store.memory.tally.lost))
        state, reason = store.intake_state()
        metrics.intake(state.lower(), reason)
        metrics.waiting.set(len(self._waiting))
        metrics.quarantined.set(store.memory.quarantined)
        metrics.disk_errors.inc(self._since("disk errors", store.memory.tally.disk_failures))
        metrics.dead_letters_resting.set(store.outbox.resting)
        self._disk()

    def _tasks(self) -> None:
        store, metrics = self._store, self._metrics
        by_state = dict.fromkeys(list(Status)[1:], 0)
        pending: dict[tuple[str, ...], float] = {}
        paused: dict[tuple[str, ...], float] = {}
        oldest: list[int] = []
        for queue in list(store.memory.index.pairs.values()):
            counts = store.memory.counts[queue.pair]
            for status in by_state:
                by_state[status] += counts[status]
            if counts[Status.PENDING]:
                pending[queue.application, queue.namespace] = counts[Status.PENDING]
                if queue.paused_at is not None:
                    paused[queue.application, queue.namespace] = counts[Status.PENDING]
            if (head := queue.head()) is not None:
                oldest.append(head.ready_at)
        for status, count in by_state.items():
            metrics.tasks.labels(status.name.lower()).set(count)
        metrics.pending.replace(pending)
        metrics.unclaimable.replace(
            {(queue.application, queue.namespace): n for queue, n in store.unclaimable.pending()}
        )
        metrics.paused.replace(paused)
        age = store.clock.wall_ms() - min(oldest) if oldest else 0
        metrics.oldest_pending.set(max(0, age) / 1000)

    def _books(self) -> None:
        store, metrics = self._store, self._metrics
        for (pair, term), total in list(store.memory.books.items()):
            queue = store.memory.index.pairs[pair]
            names = (queue.application, queue.namespace)
            grown = self._since((pair, term), total)
            if term in ARRIVALS:
                family = metrics.added if term == "accepted" else metrics.restored
                family.labels(*names).inc(grown)
                continue
            metrics.finished.labels(*names, term).inc(grown)
            if term.startswith("dead:"):
                metrics.dead_letters.labels(term.removeprefix("dead:")).inc(grown)

    def _differences(self) -> None:
        """Between two ticks' steps the books are in motion: they are read on the event loop."""
        told = asyncio.run_coroutine_threadsafe(self._balances(), self._loop)
        try:
            balances = told.result(LOOP_SECONDS_MAX)
        except TimeoutError:  # the event loop is busy
            told.cancel()
            return
        self._metrics.books_difference.set(sum(map(abs, balances.values())))
        self._metrics.namespace_books_difference.replace(balances)

    async def _balances(self) -> dict[tuple[str, ...], float]:
        pairs = self._store.memory.index.pairs
        balances = self._store.control.balances().items()
        return {(pairs[pair].application, pairs[pair].namespace): n for pair, n in balances}

    def _disk(self) -> None:
        database, wal, free = disk_usage(self._store.database.path)
        self._metrics.database_size.set(database)
        self._metrics.wal_size.set(wal)
        self._metrics.disk_free.set(free)


def disk_usage(path: Path) -> tuple[int, int, int]:
    """Bytes of a database and of its write-ahead log, and those that are free where it is."""
    disk = os.statvfs(path.parent)
    wal = path.with_name(path.name + "-wal")
    return path.stat().st_size, wal.stat().st_size if wal.exists() else 0, disk.f_bavail * disk.f_frsize
