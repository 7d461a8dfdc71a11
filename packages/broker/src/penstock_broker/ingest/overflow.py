"""The overflow topic, consumed again as the namespaces in it have room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock_broker.config import Settings
from penstock_broker.domain.activation import Activation, Reason
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.ledger import Ledger
from penstock_broker.ingest.topics import topic_exists
from penstock_broker.store.inflight import Inflight

# Read at a time, to see whose records come next, while it is not known that they have room.
PROBE_ROWS_MAX = 256
BACK_OFF_SECONDS_MIN = 1.0
BACK_OFF_SECONDS_MAX = 60.0


class Overflow:
    """How much of the topic may be read: what the namespaces last met in it have room for.

    A record whose namespace has none goes to the end of the topic, so that it is in nobody's way. Then
    nothing is read for a while, twice as long each time that none of a batch had room, or until one of
    those namespaces has: a backlog that has nowhere to go is looked at a little once a minute.
    """

    def __init__(self, store: Inflight, settings: Settings, ledger: Ledger | None = None) -> None:
        self._store = store
        self._met: set[int] = set()
        self._full: set[int] = set()
        self._back_off = 0.0
        self._timer: asyncio.TimerHandle | None = None
        topic = settings.kafka_overflow_topic
        group = settings.group_of(topic)
        own = {"kafka_topic": topic, "kafka_consumer_group": group, "kafka_auto_offset_reset": "earliest"}
        self.consumer = KafkaConsumer(
            store,
            settings.model_copy(update=own),
            ledger,
            room=self._room,
            topics_ready=topic_exists,
        )
        self.consumer.intake.on_inserted = self._inserted
        store.writer.on_committed.append(self._look)

    def _room(self) -> int:
        if self._timer is not None:
            return 0
        memory = self._store.memory
        probe = min(PROBE_ROWS_MAX, max(1, memory.share_rows_max // 20))
        return min(self._store.room(), max([probe, *map(memory.share_room, self._met)]))

    def _inserted(self, rows: Sequence[Activation]) -> None:
        accepted = [row for row in rows if row.seq]
        again = [row for row in accepted if row.reason == Reason.OVERFLOW]
        self._met = {row.pair for row in accepted}
        if not again:
            self._back_off = 0.0
            return
        self._full |= {row.pair for row in again}
        if len(again) < len(accepted):
            self._back_off = 0.0
        if self._timer is None:
            self._back_off = min(max(2 * self._back_off, BACK_OFF_SECONDS_MIN), BACK_OFF_SECONDS_MAX)
            self._timer = asyncio.get_running_loop().call_later(self._back_off, self._open)

    def _look(self) -> None:
        """After a tick: whether one that had no room has."""
        if self._timer is not None and any(map(self._store.has_share_room, self._full)):
            self._back_off = 0.0
            self._open()

    def _open(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._full.clear()
        self.consumer.intake.open()
