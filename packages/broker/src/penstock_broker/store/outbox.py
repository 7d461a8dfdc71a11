"""Rows that must leave through the log: dead letters, and what is handed over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from penstock_broker.domain.activation import Activation, Status, hash_id
from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.database import Database
from penstock_broker.store.memory import Memory
from penstock_broker.store.writer import Writer


class Outbox:
    """Each row is handed out once, until it is acknowledged or returned."""

    def __init__(self, memory: Memory, writer: Writer) -> None:
        self._memory = memory
        self._writer = writer
        # Dead letters that cannot leave through Kafka and rest in the store.
        self.resting = memory.database.dead_letter_count()

    def size(self) -> int:
        """Rows to forward, those in the log's hands included."""
        return sum(counts[Status.FORWARDING] for counts in self._memory.counts.values())

    def waits(self) -> bool:
        """Whether there is one to take."""
        return bool(self._memory.outbox)

    async def take(self, limit: int) -> list[Activation]:
        """Rows to forward, with their bodies, first come first."""
        memory = self._memory
        seqs = [memory.outbox.popleft() for _ in range(min(limit, len(memory.outbox)))]
        rows: list[Activation] = []

        def load(database: Database) -> None:
            rows[:] = database.load_forwarded(seqs)

        memory.batch.calls.append(load)
        await self._writer.committed()
        for row in rows:
            row.id_hash = hash_id(row.id)
        return self._present(rows)

    def _present(self, rows: Sequence[Activation]) -> list[Activation]:
        """Those that have not become another broker's meanwhile."""
        return [row for row in rows if self._memory.is_live(row.id_hash, row.seq)]

    def give_back(self, rows: Sequence[Activation]) -> None:
        """Not acknowledged: they will be taken again."""
        self._memory.outbox.extendleft(row.seq for row in reversed(self._present(rows)))

    def forwarded(self, rows: Sequence[Activation]) -> asyncio.Future[None]:
        """The log acknowledged these: they leave. Resolves when durable."""
        now = self._memory.clock.wall_ms()
        for row in self._present(rows):
            self._memory.resident[row.seq] = row
            self._memory.change(row, Event.FORWARDED, now)
        return asyncio.ensure_future(self._writer.committed())

    def rest(self, rows: Sequence[Activation]) -> asyncio.Future[None]:
        """Dead letters that cannot leave through Kafka are kept in the store, with their story.

        Beyond the bound they stay in the outbox. Resolves when durable.
        """
        room = max(0, self._memory.limits.dead_letters_rest_max - self.resting)
        rows, now = self._present(rows), self._memory.clock.wall_ms()
        rest = rows[:room]
        self.give_back(rows[room:])
        self.resting += len(rest)
        letters = [(r.seq, now, r.pair, r.id, r.taskname, r.reason, self._story(r), r.body) for r in rest]
        self._memory.batch.calls.append(lambda database: database.rest_dead_letters(letters))
        return self.forwarded(rest)

    def _story(self, row: Activation) -> str:
        source = self._memory.partitions.get(row.source)
        return json.dumps(
            {
                "topic": source.topic if source else None,
                "partition": source.partition if source else None,
                "offset": row.offset if source else None,
                "attempts": row.attempts,
                "deliveries_lost": row.lost,
                "received_at": row.received_at,
                "error": json.loads(row.error) if row.error else None,
            }
        )
