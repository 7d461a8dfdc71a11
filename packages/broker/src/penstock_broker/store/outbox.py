"""Rows that must leave through the log: dead letters, and what another broker goes on with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence

from penstock_broker.domain.activation import Activation, Route, Status, hash_id
from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.database import Database
from penstock_broker.store.memory import Memory
from penstock_broker.store.partitions import Exit
from penstock_broker.store.writer import Writer

# Of the store's meta: JSON of seq -> when it was first sent on, of what may start at most once.
SENT = "sent"
# A copy is known where it is read within the de-duplication window of whoever reads it. This share of it
# (5 minutes of an hour) may pass here; the rest is for what lies before it in the log.
SENT_AGAIN_SHARE = 12

_SEND_UNKNOWN = json.dumps(
    {"type": "send unknown", "message": "its broker ended when it had sent it on, and was back too late"}
)


class Outbox:
    """Each row is handed out once, until it is acknowledged or returned; none before it is covered."""

    def __init__(self, memory: Memory, writer: Writer) -> None:
        self._memory = memory
        self._writer = writer
        # Dead letters that cannot leave through Kafka and rest in the store.
        self.resting = memory.database.dead_letter_count()
        # Rows that were too large to leave for where another broker would go on with them.
        self.refused: set[int] = set()
        said: dict[str, int] = json.loads(str(memory.database.meta(SENT) or "{}"))
        self._sent_at = {int(seq): at for seq, at in said.items() if int(seq) in memory.forwarding}
        # Sent by a process that has ended: whether the log has them nobody knows.
        self._unanswered = frozenset(self._sent_at)

    def size(self) -> int:
        """Rows to forward, those in the log's hands included."""
        return sum(counts[Status.FORWARDING] for counts in self._memory.counts.values())

    def waits(self, route: Route) -> bool:
        """Whether there is one to take."""
        return bool(self._memory.outbox[route])

    async def take(self, route: Route, rows_max: int, bytes_max: int) -> list[Activation]:
        """Rows to forward, with their bodies, first come first: one, or as many as fit."""
        memory, waiting = self._memory, self._memory.outbox[route]
        seqs: list[int] = []
        while waiting and len(seqs) < rows_max and (not seqs or waiting[0].size <= bytes_max):
            seqs.append(waiting[0].seq)
            bytes_max -= waiting.popleft().size
        rows: list[Activation] = []

        def load(database: Database) -> None:
            rows[:] = database.load_forwarded(seqs)

        memory.batch.calls.append(load)
        await self._writer.committed()
        for row in rows:
            row.id_hash = hash_id(row.id)
        return self._present(rows)

    def _present(self, rows: Iterable[Activation]) -> list[Activation]:
        """Those that have not left meanwhile."""
        return [row for row in rows if row.seq in self._memory.forwarding]

    def give_back(self, route: Route, rows: Sequence[Activation]) -> None:
        """Not acknowledged: they will be taken again."""
        self._memory.outbox[route].extendleft(self._exits(route, reversed(rows)))

    def _exits(self, route: Route, rows: Iterable[Activation]) -> list[Exit]:
        return [Exit(row.seq, row.size, route) for row in self._present(rows)]

    async def may_leave(self, rows: Sequence[Activation]) -> list[Activation]:
        """Those of ``rows`` that may be sent on, to where another broker runs them. Durable.

        One that may start at most once, and was sent on before a restart so long ago that a copy might not
        be known where it is read, becomes a dead letter.
        """
        once = [row for row in self._present(rows) if row.at_most_once]
        if not once:
            return list(rows)
        memory, now = self._memory, self._memory.clock.wall_ms()
        bound = memory.limits.dedup_window_ms // SENT_AGAIN_SHARE
        late: set[int] = set()
        for row in once:
            # Also if the clock was set back, since nobody knows how far.
            age = now - self._sent_at.setdefault(row.seq, now)
            if row.seq in self._unanswered and not 0 <= age <= bound:
                row.error = _SEND_UNKNOWN
                late.add(row.seq)
        self._change_those_here([row for row in once if row.seq in late], Event.SEND_UNKNOWN)
        here = memory.forwarding
        self._sent_at = {seq: at for seq, at in self._sent_at.items() if seq in here and seq not in late}
        said = json.dumps(self._sent_at)
        memory.batch.calls.append(lambda database: database.set_meta(SENT, said))
        await self._writer.committed()
        return [row for row in rows if row.seq not in late]

    def forwarded(self, rows: Sequence[Activation]) -> asyncio.Future[None]:
        """The log acknowledged these: they leave. Resolves when durable."""
        return self._change(rows, Event.FORWARDED)

    def refuse(self, rows: Sequence[Activation]) -> asyncio.Future[None]:
        """These cannot go where another broker would go on with them: they stay. Resolves when durable."""
        self.refused.update(row.seq for row in rows)
        return self._change_those_here(rows, Event.REFUSED)

    def _change_those_here(self, rows: Sequence[Activation], event: Event) -> asyncio.Future[None]:
        """What came back from the log after all goes on as that."""
        came_back = [row for row in rows if not self._memory.is_live(row.id_hash, row.seq)]
        self._change(came_back, Event.FORWARDED)
        return self._change(rows, event)

    def _change(self, rows: Sequence[Activation], event: Event) -> asyncio.Future[None]:
        now = self._memory.clock.wall_ms()
        for row in self._present(rows):
            self._memory.resident[row.seq] = row
            self._memory.change(row, event, now)
        return self._writer.committed()

    def rest(self, rows: Sequence[Activation]) -> asyncio.Future[None]:
        """Dead letters that cannot leave through Kafka are kept in the store, with their story.

        Beyond the bound they stay in the outbox, behind those that Kafka may take. Resolves when durable.
        """
        room = max(0, self._memory.limits.dead_letters_rest_max - self.resting)
        rows, now = self._present(rows), self._memory.clock.wall_ms()
        rest = rows[:room]
        self._memory.outbox[Route.DEAD_LETTER].extend(self._exits(Route.DEAD_LETTER, rows[room:]))
        self.resting += len(rest)
        letters = [(r.seq, now, r.pair, r.id, r.taskname, r.reason, self._story(r), r.body) for r in rest]
        self._memory.batch.calls.append(lambda database: database.rest_dead_letters(letters))
        return self.forwarded(rest)

    async def drop_resting(self, seqs: Sequence[int]) -> int:
        """Remove these from the dead letters that are kept in the store: how many were there. Durable."""
        dropped = 0

        def drop(database: Database) -> None:
            nonlocal dropped
            dropped = database.drop_dead_letters(seqs)

        def account() -> None:
            self.resting -= dropped

        batch = self._memory.batch
        batch.calls.append(drop)
        # Also when nobody waits for it any more.
        batch.then.append(account)
        await self._writer.answerable(self._writer.committed())
        return dropped

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
