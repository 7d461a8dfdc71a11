"""A store that ticks by itself, and librdkafka's own mock of a Kafka cluster."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from confluent_kafka import Consumer, Message, Producer, TopicPartition

from penstock_broker.clock import Clock, SystemClock
from penstock_broker.config import Settings
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_protocol.v1.activation_pb2 import TaskActivation

PARTITIONS = 4  # what the mock gives every topic


def task_bytes(id: str, **fields: object) -> bytes:
    message = TaskActivation(id=id, namespace="emails", taskname="send", application="shop")
    message.MergeFrom(TaskActivation(**fields))  # type: ignore[arg-type]
    return message.SerializeToString()


@contextlib.asynccontextmanager
async def running_store(
    path: Path, limits: StoreLimits | None = None, clock: Clock | None = None
) -> AsyncIterator[Inflight]:
    """A store whose ticks are written on a thread, as in the broker."""
    limits, clock = limits or StoreLimits(), clock or SystemClock()
    with ThreadPoolExecutor(1) as thread:

        async def handoff(write: Callable[[Batch], Written], batch: Batch) -> Written:
            return await asyncio.get_running_loop().run_in_executor(thread, write, batch)

        store = Inflight(Database(path, limits.lifecycle, clock.wall_ms()), clock, limits, handoff)
        writer = asyncio.create_task(store.writer.run())
        try:
            yield store
        finally:
            store.writer.stop()
            await writer
            store.database.close()


class MockKafka:
    """Reached over loopback like a real one; forgets everything at the end."""

    def __init__(self) -> None:
        self._producer = Producer(
            {"test.mock.num.brokers": 1, "bootstrap.servers": "mock", "log_level": 2, "linger.ms": 0}
        )
        brokers = self._producer.list_topics(timeout=10).brokers.values()
        self.address = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        self.producer = Producer({"bootstrap.servers": self.address, "log_level": 2, "linger.ms": 0})

    def make_topic(self, *topics: str) -> None:
        """The mock makes a topic when somebody asks for it by name."""
        for topic in topics:
            self._producer.list_topics(topic, timeout=10)

    def produce(
        self, topic: str, values: Sequence[bytes | None], partition: int = 0, key: str | None = None
    ) -> None:
        for value in values:
            self.producer.produce(topic, value, key, partition=partition)
        assert self.producer.flush(10) == 0

    def committed(self, group: str, topic: str, partition: int = 0) -> TopicPartition:
        with self.consumer(group) as consumer:
            return consumer.committed([TopicPartition(topic, partition)], timeout=10)[0]

    def commit(self, group: str, topic: str, offset: int, metadata: str = "", partition: int = 0) -> None:
        """As somebody else would, from outside the group."""
        with self.consumer(group) as consumer:
            position = TopicPartition(topic, partition, offset, metadata)
            consumer.commit(offsets=[position], asynchronous=False)

    @contextlib.contextmanager
    def consumer(self, group: str) -> Iterator[Consumer]:
        consumer = Consumer(
            {
                "bootstrap.servers": self.address,
                "group.id": group,
                "enable.auto.commit": False,
                "log_level": 2,
            }
        )
        try:
            yield consumer
        finally:
            consumer.close()

    def read(self, topic: str, count: int, partition: int | None = None) -> list[Message[bytes, bytes]]:
        """The first ``count`` messages of a topic."""
        messages: list[Message[bytes, bytes]] = []
        partitions = range(PARTITIONS) if partition is None else (partition,)
        with self.consumer("reader") as consumer:
            consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
            while len(messages) < count:
                message = consumer.poll(10)
                assert message is not None, f"{len(messages)} of {count} messages are in {topic}"
                assert message.error() is None, message.error()
                messages.append(message)
        return messages


def kafka_settings(kafka: MockKafka, path: Path, **fields: object) -> Settings:
    values: dict[str, object] = {
        "kafka_cluster": kafka.address,
        "kafka_topic": "tasks",
        "kafka_session_timeout_seconds": 6,
        "broker_id": "broker-1",
        "db_path": path,
    }
    return Settings(**(values | fields))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def consuming(
    settings: Settings, assigned: Sequence[int] = range(PARTITIONS), limits: StoreLimits | None = None
) -> AsyncIterator[tuple[Inflight, KafkaConsumer]]:
    """A broker's intake, from when these partitions have begun; stopped at the end."""
    async with running_store(settings.db_path, limits) as store:
        consumer = KafkaConsumer(store, settings)
        await consumer.start()
        try:
            await until(lambda: list(consumer.assignment) == list(assigned))
            yield store, consumer
        finally:
            await consumer.stop()


async def until(holds: Callable[[], object]) -> None:
    """Look after each step of the event loop's work; pytest's timeout ends a test that waits in vain."""
    while not holds():  # noqa: ASYNC110 - what is looked at is written by another thread
        await asyncio.sleep(0.005)
