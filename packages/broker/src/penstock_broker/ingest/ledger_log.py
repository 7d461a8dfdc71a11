"""The ledger's topic, and the log it speaks of: every call to Kafka that the ledger makes.

All of it blocks, and is called on the ledger's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from penstock_broker.clock import Clock
from penstock_broker.config import Settings
from penstock_broker.ingest.cluster import describe_group, describe_topic, id_of
from penstock_broker.ingest.intake import Found
from penstock_broker.ingest.kafka import admin_config, ledger_producer_config, reader_config
from penstock_broker.ingest.ledger_records import Record
from penstock_broker.ingest.ownership import decode
from penstock_broker.store.ledger import runs

# Nothing blocks the thread for longer, so that a broker can stop.
LOOKUP_SECONDS_MAX = 5.0
OPEN_SECONDS_MAX = 5.0
WRITE_SECONDS_MAX = 5.0
# A transaction of a broker that vanished keeps others from being read until it is given up.
READ_MS_MAX = 60_000
READ_MESSAGES_MAX = 1000
POLL_SECONDS = 0.5
# Offsets between two wanted ones that are rather read than jumped over.
GAP_MAX = 2000

# What Kafka says of a topic that is not there, and a node of it that is coming up of any; the second, of a
# name that none can have, as the old one of a topic that was made anew has here.
_UNKNOWN = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_EXCEPTION)
_FENCED = (KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH)


class Fenced(Exception):
    """Another process has opened the transactional id; or Kafka has given up a transaction of ours."""


class Message(NamedTuple):
    """What is read again of the log: offset, value, and when it was sent (epoch ms; 0: unknown)."""

    offset: int
    value: bytes | None
    sent_at: int
    # It may have been sent twice.
    keyed: bool = False


class LedgerLog:
    """Reads everybody's records; writes under the transactional id of one broker, which fences others."""

    def __init__(self, settings: Settings, clock: Clock, broker_id: str) -> None:
        self._settings = settings
        self._clock = clock
        self._transactional_id = f"penstock-ledger/{settings.kafka_consumer_group}/{broker_id}"
        self._producer: Producer | None = None
        self._closed = False

    def close(self) -> None:
        """From any thread: what is under way gives up soon."""
        self._closed = True

    def is_there(self) -> bool:
        """Whether the topic exists."""
        admin = AdminClient(admin_config(self._settings))
        return self._settings.kafka_ledger_topic in admin.list_topics(timeout=LOOKUP_SECONDS_MAX).topics

    # -- writing

    def fence(self) -> None:
        """From now on nobody else can write under this id. Raises KafkaException."""
        producer = Producer(ledger_producer_config(self._settings, self._transactional_id))
        producer.init_transactions(OPEN_SECONDS_MAX)
        self._producer = producer

    def write(self, records: Sequence[Record]) -> None:
        """Write all of ``records`` or nothing. Raises Fenced, or KafkaException when it is not known."""
        producer = self._producer
        if producer is None:
            raise Fenced("the write before this one has failed")
        try:
            producer.begin_transaction()
            for key, value in records:
                self._produce(producer, key, value)
            producer.commit_transaction(WRITE_SECONDS_MAX)
        except KafkaException as error:
            # Opened anew, the id says by itself what became of the transaction.
            self._producer = None
            if error.args[0].code() in _FENCED:
                raise Fenced(error.args[0].str()) from None
            raise

    def _produce(self, producer: Producer, key: bytes, value: bytes | None) -> None:
        topic = self._settings.kafka_ledger_topic
        while True:
            try:
                producer.produce(topic, value, key)
            except BufferError:
                producer.poll(0.1)
            else:
                return

    # -- reading

    def read(self) -> list[Record]:
        """All records of the topic, as far as it went when asked; oldest first within a key."""
        topic, records = self._settings.kafka_ledger_topic, []
        consumer = Consumer(reader_config(self._settings, "earliest"))
        try:
            partitions = _partitions(consumer, topic)
            if not partitions:
                # It was here a moment ago, and nothing recorded is another answer than none.
                raise KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))
            ends = {}
            for partition in partitions:
                asked = TopicPartition(topic, partition)
                low, high = consumer.get_watermark_offsets(asked, timeout=LOOKUP_SECONDS_MAX)
                if high > low:
                    ends[partition] = high
            consumer.assign([TopicPartition(topic, number, 0) for number in ends])
            deadline = self._clock.mono_ms() + READ_MS_MAX
            while ends:
                if self._closed or self._clock.mono_ms() > deadline:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
                for message in _next(consumer):
                    error, number, offset = message.error(), message.partition(), message.offset()
                    assert number is not None
                    assert offset is not None
                    if error is None:
                        records.append((message.key() or b"", message.value()))
                        offset += 1
                    elif error.code() != KafkaError._PARTITION_EOF:
                        raise KafkaException(error)
                    if offset >= ends.get(number, offset + 1):
                        del ends[number]
        finally:
            consumer.close()
        return records

    def look_up(self, topic: str, partitions: Sequence[int] | None) -> list[Found]:
        """What the group has committed of ``partitions``; None: of all. Nothing of those that this node of
        Kafka does not know: only several answers say that they are not there."""
        consumer = Consumer(reader_config(self._settings, "error", topic))
        try:
            present, found = _partitions(consumer, topic), []
            wanted = present if partitions is None else present & set(partitions)
            asked = [TopicPartition(topic, number) for number in sorted(wanted)]
            for answer in consumer.committed(asked, timeout=LOOKUP_SECONDS_MAX) if asked else ():
                if answer.error is not None:
                    raise KafkaException(answer.error)
                committed = answer.offset if answer.offset >= 0 else None
                found.append(Found(answer.partition, committed, decode(answer.metadata)))
            return found
        finally:
            consumer.close()

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """Where the log of a partition begins and ends. Raises KafkaException, without a leader too."""
        consumer = Consumer(reader_config(self._settings, "error", topic))
        try:
            asked = TopicPartition(topic, partition)
            low, high = consumer.get_watermark_offsets(asked, timeout=LOOKUP_SECONDS_MAX)
            return low, high
        finally:
            consumer.close()

    def topic_id(self, topic: str) -> str:
        """Which topic of its name Kafka has; "" when it has none, or its topics have no ids."""
        admin = AdminClient(admin_config(self._settings))
        try:
            return id_of(describe_topic(admin, topic, LOOKUP_SECONDS_MAX).result())
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return ""
            raise

    def messages(self, topic: str, partition: int, offsets: Sequence[int]) -> Iterator[list[Message]]:
        """Those of ``offsets`` (ascending, inside the log) that are still there, in batches, in order."""
        wanted = set(offsets)
        consumer = Consumer(reader_config(self._settings, "earliest"))
        try:
            for run in runs(offsets, GAP_MAX):
                yield from self._run(consumer, TopicPartition(topic, partition, run[0]), run[-1], wanted)
        finally:
            consumer.close()

    def _run(
        self, consumer: Consumer, begin: TopicPartition, last: int, wanted: set[int]
    ) -> Iterator[list[Message]]:
        consumer.assign([begin])
        at, deadline = begin.offset, self._clock.mono_ms() + READ_MS_MAX
        while at <= last:
            batch = []
            for message in _next(consumer):
                error, offset = message.error(), message.offset()
                assert offset is not None
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                # An end before the last one is told too early: Kafka has said that the log has more.
                at = offset if error is not None else offset + 1
                if error is None and offset in wanted and offset <= last:
                    sent_at, keyed = max(0, message.timestamp()[1]), message.key() is not None
                    batch.append(Message(offset, message.value(), sent_at, keyed))
                deadline = self._clock.mono_ms() + READ_MS_MAX
            if batch:
                yield batch
                # It may have waited for room.
                deadline = self._clock.mono_ms() + READ_MS_MAX
            elif self._closed or self._clock.mono_ms() > deadline:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    def is_member(self, broker_id: str) -> bool:
        """Whether a broker of that name is in one of the pool's consumer groups. Raises KafkaException."""
        settings = self._settings
        groups = [settings.kafka_consumer_group, settings.group_of(settings.kafka_overflow_topic)]
        admin = AdminClient(admin_config(settings))
        described = [describe_group(admin, group, LOOKUP_SECONDS_MAX) for group in groups]
        return any(member.client_id == broker_id for group in described if group for member in group.members)


def _partitions(consumer: Consumer, topic: str) -> set[int]:
    """Those of a topic; none of one that this node of Kafka does not know. Raises KafkaException."""
    answer = consumer.list_topics(topic, timeout=LOOKUP_SECONDS_MAX).topics[topic]
    if answer.error is not None and answer.error.code() not in _UNKNOWN:
        raise KafkaException(answer.error)
    return set(answer.partitions)


def _next(consumer: Consumer) -> list[confluent_kafka.Message[bytes, bytes]]:
    """What is there, as soon as something is: asked for many, the client would wait for all of them."""
    first = consumer.consume(1, POLL_SECONDS)
    return [*first, *consumer.consume(READ_MESSAGES_MAX - 1, 0)] if first else []
