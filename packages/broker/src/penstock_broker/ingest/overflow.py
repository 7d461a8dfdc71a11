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
PROBE_ROWS_MAX = 512
BACK_OFF_SECONDS_MIN = 1.0
BACK_OFF_SECONDS_MAX = 60.0
# A namespace that overflowed this long ago may have records behind those of others.
RECENT_MS = 3_600_000


class Overflow:
    """How much of the topic may be read: what the namespaces last met in it have room for.

    A record whose namespace has none goes to the end of the topic, so that it is in nobody's way. Then
    nothing is read for a while, or until that namespace has room. Twice as long each time; but while
    another one, which has room, may have records behind these, they are passed over once a second. So a
    namespace that is alone and has nowhere to go is looked at once a minute, and no more.
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
        return min(self._store.room(), max([PROBE_ROWS_MAX, *map(memory.share_room, self._met)]))

    def _inserted(self, rows: Sequence[Activation]) -> None:
        accepted = [row for row in rows if row.seq]
        again = [row for row in accepted if row.reason == Reason.OVERFLOW]
        self._met = {row.pair for row in accepted}
        self._store.memory.overflowed_at.update(dict.fromkeys(self._met, self._store.clock.mono_ms()))
        if not again:
            self._back_off = 0.0
            return
        self._full |= {row.pair for row in again}
        if len(again) < len(accepted):
            self._back_off = 0.0
        if self._timer is None:
            longest = BACK_OFF_SECONDS_MIN if self._others_have_room() else BACK_OFF_SECONDS_MAX
            self._back_off = min(max(2 * self._back_off, BACK_OFF_SECONDS_MIN), longest)
            self._timer = asyncio.get_running_loop().call_later(self._back_off, self._open)
            self.consumer.intake.open()

    def _others_have_room(self) -> bool:
        memory, since = self._store.memory, self._store.clock.mono_ms() - RECENT_MS
        recent = (pair for pair, at in memory.overflowed_at.items() if at >= since)
        return any(pair not in self._full and memory.share_room(pair) > 0 for pair in recent)

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
