"""The consumer against librdkafka's mock of a cluster, with a real store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from ingest_helpers import PARTITIONS, MockKafka, kafka_settings, running_store, task_bytes, until

from penstock_broker.config import Settings
from penstock_broker.domain.activation import Activation, Reason, Status, hash_id
from penstock_broker.domain.lifecycle import Event
from penstock_broker.errors import FatalError
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.ownership import Me, Owner, decode, encode
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits

GROUP = "penstock-tasks"


@pytest.fixture
def kafka() -> Iterator[MockKafka]:
    kafka = MockKafka()
    kafka.make_topic("tasks", "tasks-dlq")
    yield kafka


@pytest.fixture
def settings(kafka: MockKafka, tmp_path: Path) -> Settings:
    return kafka_settings(kafka, tmp_path / "store.sqlite")


@contextlib.asynccontextmanager
async def consuming(
    settings: Settings, limits: StoreLimits | None = None
) -> AsyncIterator[tuple[Inflight, KafkaConsumer]]:
    """A broker's intake, until it has its partitions; stopped at the end."""
    async with running_store(settings.db_path, limits) as store:
        consumer = KafkaConsumer(store, settings)
        await consumer.start()
        try:
            await until(lambda: len(consumer.assignment) == PARTITIONS)
            yield store, consumer
        finally:
            await consumer.stop()


def acknowledged(consumer: KafkaConsumer, offset: int, partition: int = 0) -> bool:
    reading = consumer.intake.readings.get(partition)
    return reading is not None and reading.acknowledged >= offset


async def rows_of(store: Inflight) -> list[Activation]:
    def load(database: Database) -> list[Activation]:
        return database.load([key[0] for key in database.positions()])

    return sorted(await store.read(load), key=lambda row: row.offset)


async def test_messages_are_stored_committed_and_covered(kafka: MockKafka, settings: Settings) -> None:
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(500)])
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 500))
        assert [row.id for row in await rows_of(store)] == [f"id-{n}" for n in range(500)]
        source = store.source("tasks", 0)
        assert (source.start, source.next, source.covered) == (0, 500, 500)
        assert not source.uncovered
        me = Me("broker-1", store.store_id)
    position = kafka.committed(GROUP, "tasks")
    assert position.offset == 500
    assert decode(position.metadata) == (Owner(0, me, 1),)


async def test_every_partition_gets_its_owner_at_once(kafka: MockKafka, settings: Settings) -> None:
    async with consuming(settings) as (_, consumer):
        await until(lambda: all(acknowledged(consumer, 0, p) for p in range(PARTITIONS)))
    for partition in range(PARTITIONS):
        position = kafka.committed(GROUP, "tasks", partition)
        assert (position.offset, len(decode(position.metadata))) == (0, 1)


async def test_poison_goes_to_the_outbox_among_the_good(kafka: MockKafka, settings: Settings) -> None:
    kafka.produce("tasks", [task_bytes("a"), b"{}", None, task_bytes("b"), b"", task_bytes("a")])
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 6))
        rows = await rows_of(store)
        assert [(row.offset, row.status) for row in rows] == [
            (0, Status.PENDING),
            (1, Status.FORWARDING),
            (2, Status.FORWARDING),
            (3, Status.PENDING),
            (4, Status.FORWARDING),
        ]
        assert {row.reason for row in rows} == {None, Reason.NOT_AN_ACTIVATION}
        assert store.memory.tally.duplicates == 1
        assert consumer.admission.refused == {Reason.NOT_AN_ACTIVATION: 3}


async def test_a_restart_goes_on_where_it_was(kafka: MockKafka, settings: Settings) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(10)])
    async with consuming(settings) as (_, consumer):
        await until(lambda: acknowledged(consumer, 10))
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(10, 15)])
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 15))
        assert [row.offset for row in await rows_of(store)] == list(range(15))
        assert store.memory.tally.duplicates == 0
        assert store.source("tasks", 0).start == 0
    assert decode(kafka.committed(GROUP, "tasks").metadata)[0].epoch == 2


async def test_rows_that_another_broker_reads_again_are_dropped(
    kafka: MockKafka, settings: Settings
) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(10)])
    async with running_store(settings.db_path) as store:
        # As a crash leaves it: 0..8 taken, 0..4 covered, 5..6 committed but never acknowledged here.
        source = store.source("tasks", 0)
        store.begin_range(source, 0)
        rows = [
            Activation(f"{n}", "", "", "t", b"x", 0, 0, source=source.id, offset=n, size=1) for n in range(8)
        ]
        await store.insert(rows, {source.id: 8})
        store.cover(source, 4)
        await store.committed()
        me, other = Me("broker-1", store.store_id), Me("broker-2", "0" * 8)
    kafka.commit(GROUP, "tasks", 9, encode([Owner(6, other, 3), Owner(0, me, 1)]))
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 10))
        assert [row.offset for row in await rows_of(store)] == [0, 1, 2, 3, 4, 5, 9]
        source = store.source("tasks", 0)
        assert (source.start, source.next, source.covered) == (9, 10, 10)
        assert store.imbalance() == 0
    owners = decode(kafka.committed(GROUP, "tasks").metadata)
    assert [(owner.start, owner.me) for owner in owners] == [(9, me), (0, other)]


async def test_a_partition_that_goes_to_another_broker_is_committed_first(
    kafka: MockKafka, settings: Settings, tmp_path: Path
) -> None:
    for partition in range(PARTITIONS):
        kafka.produce("tasks", [task_bytes(f"{partition}-{n}") for n in range(50)], partition)
    async with consuming(settings) as (first, one):
        await until(lambda: sum(source.next for source in first.sources()) == 50 * PARTITIONS)
        second_settings = kafka_settings(kafka, tmp_path / "two.sqlite", broker_id="broker-2")
        async with running_store(second_settings.db_path) as second:
            two = KafkaConsumer(second, second_settings)
            await two.start()
            await until(lambda: len(two.assignment) == len(one.assignment) == PARTITIONS // 2)
            assert sorted([*one.assignment, *two.assignment]) == list(range(PARTITIONS))
            assert await rows_of(second) == []
            assert len(await rows_of(first)) == 50 * PARTITIONS
            for partition in range(PARTITIONS):
                kafka.produce("tasks", [task_bytes(f"{partition}-more")], partition)
            await until(lambda: all(acknowledged(two, 51, p) for p in two.assignment))
            assert {row.id for row in await rows_of(second)} == {f"{p}-more" for p in two.assignment}
            moved = two.assignment[0]
            assert first.source("tasks", moved).covered == 50
            assert second.source("tasks", moved).start == 50
            await two.stop()
            owners = decode(kafka.committed(GROUP, "tasks", moved).metadata)
            assert [(o.start, o.me.broker_id) for o in owners] == [(50, "broker-2"), (0, "broker-1")]


async def test_an_offset_moved_ahead_is_an_alarm(kafka: MockKafka, settings: Settings) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(10)])
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 10))
        me = Me("broker-1", store.store_id)
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(10, 20)])
    kafka.commit(GROUP, "tasks", 15, encode([Owner(0, me, 1)]))
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 20))
        assert consumer.intake.offsets_skipped == 5
        assert [row.offset for row in await rows_of(store)] == [*range(10), *range(15, 20)]


async def test_an_offset_outside_the_log_starts_at_its_beginning(
    kafka: MockKafka, settings: Settings
) -> None:
    """As after the topic was made anew."""
    kafka.produce("tasks", [task_bytes(f"new-{n}") for n in range(3)])
    kafka.commit(GROUP, "tasks", 1000, encode([Owner(0, Me("gone", "0" * 8), 1)]))
    async with consuming(settings) as (store, _):
        await until(lambda: store.source("tasks", 0).next == 3)
        assert [row.id for row in await rows_of(store)] == ["new-0", "new-1", "new-2"]


async def test_latest_skips_what_was_there_and_nothing_after(kafka: MockKafka, tmp_path: Path) -> None:
    settings = kafka_settings(kafka, tmp_path / "store.sqlite", kafka_auto_offset_reset="latest")
    kafka.produce("tasks", [task_bytes("before")])
    async with consuming(settings) as (store, consumer):
        kafka.produce("tasks", [task_bytes("after")])
        await until(lambda: acknowledged(consumer, 2))
        assert [row.id for row in await rows_of(store)] == ["after"]


async def test_a_full_store_pauses_and_goes_on_without_losing_its_membership(
    kafka: MockKafka, settings: Settings
) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(100)])
    async with consuming(settings, StoreLimits(rows_max=40)) as (store, consumer):
        await until(lambda: consumer.paused)
        assert store.memory.rows == 40
        assert store.intake_state() == ("PAUSED", "rows")
        members = consumer.assignment
        while (rows := await rows_of(store)) or store.source("tasks", 0).next < 100:
            for row in rows:
                store.settle_by_id(hash_id(row.id), Event.COMPLETE, 0)
            await store.committed()
        assert consumer.assignment == members
        assert store.imbalance() == 0
        await until(lambda: acknowledged(consumer, 100))
        assert not consumer.paused


async def test_kafka_away_at_the_start_is_waited_for(kafka: MockKafka, tmp_path: Path) -> None:
    settings = kafka_settings(kafka, tmp_path / "store.sqlite", kafka_cluster="127.0.0.1:9")
    async with running_store(settings.db_path) as store:
        consumer = KafkaConsumer(store, settings)
        await consumer.start()
        assert not consumer.connected
        assert consumer.assignment == []
        await consumer.stop()


async def test_a_missing_topic_is_said(kafka: MockKafka, tmp_path: Path) -> None:
    settings = kafka_settings(kafka, tmp_path / "store.sqlite", kafka_topic="absent")
    async with running_store(settings.db_path) as store:
        consumer = KafkaConsumer(store, settings)
        with pytest.raises(FatalError) as caught:
            await consumer.start()
        assert "'absent' does not exist" in caught.value.message
        assert kafka.address in caught.value.message
        assert "TASKBROKER_CREATE_MISSING_TOPICS" in caught.value.hint
        await consumer.stop()


async def test_a_store_that_stops_ends_the_intake_quietly(kafka: MockKafka, settings: Settings) -> None:
    async with running_store(settings.db_path) as store:
        consumer = KafkaConsumer(store, settings)
        await consumer.start()
        store.writer.stop()
        kafka.produce("tasks", [task_bytes("late")])
        await consumer.stop()
        await asyncio.wait_for(consumer.run(), 1)
