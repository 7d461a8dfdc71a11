"""What other brokers have taken of a partition that comes: looked through before anything new of it is read.

What was sent twice is run once because whoever reads the second message knows the id of the first. Both are
in one partition (what may be sent twice is keyed by its id), but another broker may have read the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from penstock_broker.clock import Clock
from penstock_broker.config import Settings
from penstock_broker.domain.activation import Status, hash_id
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.intake import Tail
from penstock_broker.ingest.kafka import Connections, reader_config, statistics_config
from penstock_broker.ingest.taking import ReadMessage

log = structlog.get_logger("ingest")

# Of one partition; what was sent twice was mostly sent twice soon.
OFFSETS_MAX = 200_000
# Read at a time, the newest first: what there is no time for is the oldest.
CHUNK_OFFSETS = 10_000
# From when Kafka has said where the log begins and ends.
READ_MS_MAX = 30_000
LOOKUP_SECONDS_MAX = 5.0
# At a turn: other partitions wait for it.
MESSAGES_MAX = 1_000


# Given a source, (id hash -> content), and (hash of a forward id -> offset).
Remember = Callable[[int, Mapping[int, int], Mapping[int, int]], object]


class KeyedMessage(ReadMessage, Protocol):
    """What is used of a message besides."""

    def key(self) -> bytes | None: ...
    def timestamp(self) -> tuple[int, int]: ...


@dataclass(slots=True)
class _Reading:
    """A tail that is read, [first, end of the tail). Of its chunk, [begin, end), next is read next."""

    tail: Tail
    first: int
    begin: int
    next: int
    end: int
    # Monotonic ms.
    deadline: int
    # What was sent before this is outside the window; epoch ms, None: not known yet.
    since: int | None = None
    # When the newest message of the chunk was sent; epoch ms.
    newest: int = 0
    ids: dict[int, int] = field(default_factory=dict)
    forwards: dict[int, int] = field(default_factory=dict)


class Tails:
    """The tails of one topic's partitions. Used on the consumer's thread, by turns with everything else
    there; ``remember`` is called on it, too."""

    def __init__(self, settings: Settings, clock: Clock, remember: Remember) -> None:
        self._settings = settings
        self._clock = clock
        self._remember = remember
        self._topic = settings.kafka_topic
        self._window_ms = int(settings.dedup_window_seconds * 1000)
        # Its counts are of no interest: what is refused here was refused before.
        self._admission = Admission(AdmissionLimits.of(settings))
        self._consumer: Consumer | None = None
        self._connections = Connections()
        self._reading: dict[int, _Reading] = {}
        # partition -> end of the tail that was looked through.
        self._done: dict[int, int] = {}
        # Offsets for which there was no time. Read by the metrics, too.
        self.unseen = 0

    def __bool__(self) -> bool:
        """Whether any is being read."""
        return bool(self._reading)

    def __contains__(self, partition: int) -> bool:
        return partition in self._reading

    def is_done(self, tail: Tail) -> bool:
        """Whether it has been looked through, or there was no time for it."""
        return self._done.get(tail.partition, -1) >= tail.end

    def add(self, tail: Tail) -> None:
        """Read it, from now on. Raises KafkaException."""
        consumer = self._consumer or self._connect()
        try:
            low, high = self._watermarks(consumer, tail.partition)
        except KafkaException:
            self._close_unused()
            raise
        first = max(tail.first, low, tail.end - OFFSETS_MAX)
        if tail.end > high or first >= tail.end:
            # Of another topic of that name, or no longer there.
            self._done[tail.partition] = tail.end
            self._close_unused()
            return
        deadline = self._clock.mono_ms() + READ_MS_MAX
        self._reading[tail.partition] = _Reading(tail, first, tail.end, tail.end, tail.end, deadline)
        self._next_chunk(consumer, self._reading[tail.partition])

    def _connect(self) -> Consumer:
        self._connections = connections = Connections()
        config = reader_config(self._settings, "earliest", self._topic)
        self._consumer = Consumer(config | statistics_config(lambda text: connections.look(json.loads(text))))
        return self._consumer

    def remove(self, partition: int) -> None:
        """It has begun, or has gone."""
        self._done.pop(partition, None)
        if partition in self._reading:
            self._drop(partition)

    def close(self) -> None:
        """The client ends."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None

    def turn(self) -> bool:
        """Take what has arrived. Whether a tail has come to its end."""
        assert self._consumer is not None
        if self._connections.lost:
            self.close()
            self._connect().incremental_assign(
                [TopicPartition(self._topic, p, reading.next) for p, reading in self._reading.items()]
            )
        before = len(self._reading)
        passed: set[int] = set()
        for message in self._consumer.consume(MESSAGES_MAX, 0):
            partition, offset = message.partition(), message.offset()
            if partition is None or offset is None or partition in passed:
                continue
            reading = self._reading.get(partition)
            if reading is not None and self._take(reading, message, offset):
                # What is left of it here lies behind the chunk.
                passed.add(partition)
                self._end_chunk(self._consumer, reading)
        now = self._clock.mono_ms()
        overdue = [reading for reading in self._reading.values() if now >= reading.deadline]
        away = bool(overdue) and self._is_away(self._consumer, overdue[0].tail.partition)
        for reading in overdue:
            if away:
                # What comes next cannot be read either.
                reading.deadline = now + READ_MS_MAX
            else:
                self._give_up(reading)
        return len(self._reading) < before

    def _watermarks(self, consumer: Consumer, partition: int) -> tuple[int, int]:
        """First offset and end of the log. Asked over the connection of the topic's consumer it would wait
        for a fetch that waits for messages."""
        asked = TopicPartition(self._topic, partition)
        low, high = consumer.get_watermark_offsets(asked, timeout=LOOKUP_SECONDS_MAX)
        return low, high

    def _is_away(self, consumer: Consumer, partition: int) -> bool:
        try:
            self._watermarks(consumer, partition)
        except KafkaException:
            return True
        return False

    def _take(self, reading: _Reading, message: KeyedMessage, offset: int) -> bool:
        """Whether the chunk ends with it."""
        if (error := message.error()) is not None:
            ended = error.code() == KafkaError._PARTITION_EOF
            if not ended:
                log.debug("a tail meets an error", partition=reading.tail.partition, error=error.str())
            return ended
        reading.next = offset + 1
        if offset < reading.end:
            reading.newest = max(reading.newest, message.timestamp()[1])
            if message.key() is not None:
                self._note(reading, message, offset)
        return reading.next >= reading.end

    def _note(self, reading: _Reading, message: KeyedMessage, offset: int) -> None:
        tail = reading.tail
        now = self._clock.wall_ms()
        row = self._admission.admit(message.value(), now, tail.source, offset, self._topic, tail.partition)
        if row.status is Status.FORWARDING:
            return
        # The first one has the id.
        reading.ids.setdefault(hash_id(row.id), row.content)
        if row.sent_on:
            reading.forwards.setdefault(row.sent_on, offset)

    def _end_chunk(self, consumer: Consumer, reading: _Reading) -> None:
        self._tell(reading)
        if reading.since is None and reading.newest:
            # It counts from what was taken last: what is read next was sent after that, however long ago.
            reading.since = min(reading.newest, self._clock.wall_ms()) - self._window_ms
        too_old = reading.since is not None and 0 < reading.newest < reading.since
        if too_old or reading.begin <= reading.first:
            log.debug(
                "what other brokers have taken was looked through",
                topic=self._topic,
                partition=reading.tail.partition,
                first=reading.begin,
                end=reading.tail.end,
            )
            self._finish(reading)
        else:
            self._leave(reading.tail.partition)
            self._next_chunk(consumer, reading)

    def _next_chunk(self, consumer: Consumer, reading: _Reading) -> None:
        reading.end = reading.begin
        reading.begin = reading.next = max(reading.first, reading.end - CHUNK_OFFSETS)
        reading.newest = 0
        consumer.incremental_assign([TopicPartition(self._topic, reading.tail.partition, reading.begin)])

    def _tell(self, reading: _Reading) -> None:
        if reading.ids:
            self._remember(reading.tail.source, reading.ids, reading.forwards)
            reading.ids, reading.forwards = {}, {}

    def _give_up(self, reading: _Reading) -> None:
        self._tell(reading)
        unseen = reading.end - reading.next + reading.begin - reading.first
        self.unseen += unseen
        log.error(
            "what other brokers have taken of a partition could not be looked through in time: a message that"
            " was sent twice may run twice, if the first is among these offsets",
            topic=self._topic,
            partition=reading.tail.partition,
            first=reading.first,
            count=unseen,
        )
        self._finish(reading)

    def _finish(self, reading: _Reading) -> None:
        self._done[reading.tail.partition] = reading.tail.end
        self._drop(reading.tail.partition)

    def _drop(self, partition: int) -> None:
        del self._reading[partition]
        self._leave(partition)
        self._close_unused()

    def _close_unused(self) -> None:
        """Nobody polls it while nothing is read."""
        if not self._reading:
            self.close()

    def _leave(self, partition: int) -> None:
        if self._consumer is not None:
            self._consumer.incremental_unassign([TopicPartition(self._topic, partition)])
