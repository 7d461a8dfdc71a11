"""The consumer against librdkafka's mock of a cluster, with a real store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from ingest_helpers import PARTITIONS, MockKafka, consuming, kafka_settings, running_store, task_bytes, until

from penstock_broker.config import Settings
from penstock_broker.domain.activation import Activation, Reason, Status, hash_id
from penstock_broker.domain.lifecycle import Event
from penstock_broker.errors import FatalError
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.intake import Begun, Found, Position
from penstock_broker.ingest.kafka import consumer_config, producer_config
from penstock_broker.ingest.ownership import Me, Owner, decode, encode
from penstock_broker.ingest.poller import Poller, _Fenced
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits

GROUP = "penstock-tasks"


def acknowledged(consumer: KafkaConsumer, offset: int, partition: int = 0) -> bool:
    reading = consumer.intake.readings.get(partition)
    return reading is not None and reading.acknowledged >= offset


async def rows_of(store: Inflight) -> list[Activation]:
    def load(database: Database) -> list[Activation]:
        return database.load([key[0] for key in database.positions()])

    return sorted(await store.read(load), key=lambda row: row.offset)


def test_what_kafka_acknowledges_is_on_all_replicas_and_offsets_are_committed_here(
    settings: Settings,
) -> None:
    config = producer_config(settings, lambda error: None, lambda text: None, 1000)
    assert (config["acks"], config["enable.idempotence"]) == ("all", True)
    config = consumer_config(settings, lambda error: None, None, None)
    assert not config["enable.auto.commit"]
    assert not config["enable.auto.offset.store"]
    assert config["auto.offset.reset"] == "error"


async def test_messages_are_stored_committed_and_covered(kafka: MockKafka, settings: Settings) -> None:
    good = [task_bytes(f"id-{n}") for n in range(500)]
    kafka.produce("tasks", [*good, b"{}", None, task_bytes("late"), b"", task_bytes("id-7")])
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 505))
        rows = await rows_of(store)
        assert [row.id for row in rows[:500]] == [f"id-{n}" for n in range(500)]
        poison = [(row.offset, row.reason) for row in rows if row.status is Status.FORWARDING]
        assert poison == [(offset, Reason.NOT_AN_ACTIVATION) for offset in (500, 501, 503)]
        assert store.memory.tally.duplicates == 1
        source = store.source("tasks", 0)
        assert (source.start, source.next, source.covered) == (0, 505, 505)
        assert not source.uncovered
        assert consumer.connected
        me = Me("broker-1", store.store_id)
        await until(lambda: all(acknowledged(consumer, 0, p) for p in range(PARTITIONS)))
    position = kafka.committed(GROUP, "tasks")
    assert position.offset == 505
    assert decode(position.metadata) == (Owner(0, me, 1),)
    for partition in range(1, PARTITIONS):
        position = kafka.committed(GROUP, "tasks", partition)
        assert (position.offset, len(decode(position.metadata))) == (0, 1)


async def test_an_offset_outside_the_log_starts_at_its_beginning(
    kafka: MockKafka, settings: Settings
) -> None:
    """As after the topic was made anew."""
    kafka.produce("tasks", [task_bytes(f"new-{n}") for n in range(3)])
    kafka.commit(GROUP, "tasks", 1000, encode([Owner(0, Me("gone", "0" * 8), 1)]))
    async with consuming(settings) as (store, _):
        await until(lambda: store.source("tasks", 0).next == 3)
        assert [row.id for row in await rows_of(store)] == ["new-0", "new-1", "new-2"]


async def test_what_was_lost_is_resolved_by_itself(kafka: MockKafka, settings: Settings) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(10)])
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 10))
        source = store.source("tasks", 0)
        await consumer.intake.lost([0])
        # Read, and not committed before the loss.
        rows = [
            Activation(f"x{n}", "", "", "t", b"x", 0, 0, source=source.id, offset=n, size=1) for n in (10, 11)
        ]
        await store.insert(rows)
        await consumer.intake.lost([0])
        assert consumer.intake.unresolved == {0}
        await until(lambda: not consumer.intake.unresolved)
        assert [row.offset for row in await rows_of(store)] == list(range(10))


async def test_an_assignment_that_cannot_be_looked_up_is_begun_later(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(10)])
    look_up = Poller._look_up
    failures = iter([KafkaError._TIMED_OUT, KafkaError._TIMED_OUT])

    def fail_twice(self: Poller, *arguments: object, **more: object) -> list[Found]:
        if (code := next(failures, None)) is not None:
            raise KafkaException(KafkaError(code))
        return look_up(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Poller, "_look_up", fail_twice)
    async with consuming(settings) as (store, consumer):
        await until(lambda: acknowledged(consumer, 10))
        assert [row.offset for row in await rows_of(store)] == list(range(10))
        kafka.produce("tasks", [task_bytes("later")])
        await until(lambda: acknowledged(consumer, 11))


class Asked:
    """The commits that a poller starts."""

    def __init__(self) -> None:
        self.offsets: list[list[tuple[int, int]]] = []

    def commit(self, offsets: list[TopicPartition], asynchronous: bool) -> None:
        self.offsets.append([(p.partition, p.offset) for p in offsets])

    def incremental_assign(self, partitions: list[TopicPartition]) -> None: ...

    def resume(self, partitions: list[TopicPartition]) -> None: ...


class Answered(NamedTuple):
    """What Kafka says of a partition."""

    partition: int
    offset: int
    error: KafkaError | None
    metadata: str = ""


class Told:
    """What a poller tells and asks of the event loop."""

    def __init__(self) -> None:
        self.done: list[object] = []

    def tell(self, call: object, *arguments: object) -> None:
        self.done.append(arguments)

    def ask(self, asked: Coroutine[None, None, None]) -> None:
        asked.close()


def reading_two(store: Inflight, settings: Settings) -> tuple[Poller, Asked, Told]:
    """A poller that reads two partitions, without its thread."""
    poller, told = KafkaConsumer(store, settings)._poller, Told()
    poller._loop = told  # type: ignore[assignment]
    poller._stopping = threading.Event()
    for partition in (0, 1):
        poller.tracks.add(partition, 1, 0)
    return poller, Asked(), told


async def test_what_was_to_be_committed_of_a_partition_that_has_left_is_not(settings: Settings) -> None:
    async with running_store(settings.db_path) as store:
        poller, asked, told = reading_two(store, settings)
        poller.hand_commit([Position(0, 5, ""), Position(1, 7, "")])
        poller._forget([1])
        poller._commit(asked)  # type: ignore[arg-type]
        assert asked.offsets == [[(0, 5)]]
        # Nor when it has come back meanwhile, and others have read on.
        poller.hand_commit([Position(0, 6, "")])
        poller._forget([0])
        poller._read(asked, [Begun(0, 1, 9)])  # type: ignore[arg-type]
        poller._commit(asked)  # type: ignore[arg-type]
        assert asked.offsets == [[(0, 5)]]
        # The intake waits for an answer all the same.
        assert told.done[-1] == ([],)


async def test_what_is_revoked_while_the_broker_stops_is_not_committed_any_more(settings: Settings) -> None:
    async with running_store(settings.db_path) as store:
        poller, asked, _ = reading_two(store, settings)
        poller._stopping.set()
        poller._on_revoke(asked, [TopicPartition("tasks", 1)])  # type: ignore[arg-type]
        poller.hand_commit([Position(0, 5, ""), Position(1, 7, "")])
        poller._commit(asked)  # type: ignore[arg-type]
        assert asked.offsets == [[(0, 5)]]


async def test_what_was_lost_is_not_committed_any_more(settings: Settings) -> None:
    async with running_store(settings.db_path) as store:
        poller, asked, told = reading_two(store, settings)
        poller.hand_commit([Position(0, 5, ""), Position(1, 7, "")])
        poller._on_lost(asked, [TopicPartition("tasks", 1)])  # type: ignore[arg-type]
        poller._commit(asked)  # type: ignore[arg-type]
        assert asked.offsets == [[(0, 5)]]
        assert told.done == [([1],)]


async def test_a_commit_is_refused_for_each_partition_by_itself(settings: Settings) -> None:
    fenced = KafkaError(KafkaError.ILLEGAL_GENERATION)
    answers = [Answered(0, 5, None), Answered(1, 7, fenced)]
    async with running_store(settings.db_path) as store:
        poller, asked, told = reading_two(store, settings)
        poller._on_commit(None, answers)  # type: ignore[arg-type]
        assert told.done == [([(0, 5, None), (1, 7, str(fenced))],)]
        asked.commit = lambda offsets, asynchronous: answers  # type: ignore[assignment, return-value]
        refused = poller._commit_now(asked, [Position(0, 5, ""), Position(1, 7, "")])  # type: ignore[arg-type]
        assert refused == str(fenced)


async def test_an_offset_that_kafka_does_not_tell_is_not_none(settings: Settings) -> None:
    """Else the partition would be read from its beginning."""
    async with running_store(settings.db_path) as store:
        poller, asked, _ = reading_two(store, settings)
        unknown = Answered(0, -1001, KafkaError(KafkaError.NOT_COORDINATOR))
        asked.committed = lambda partitions, timeout: [unknown]  # type: ignore[attr-defined]
        with pytest.raises(KafkaException):
            poller._look_up(asked, [0])  # type: ignore[arg-type]


async def test_what_the_event_loop_has_no_time_to_give_up_is_lost(settings: Settings) -> None:
    async with running_store(settings.db_path) as store:
        poller, asked, told = reading_two(store, settings)

        def ask(asked: Coroutine[None, None, None]) -> None:
            asked.close()
            raise TimeoutError

        told.ask = ask  # type: ignore[method-assign]
        poller._on_revoke(asked, [TopicPartition("tasks", 1)])  # type: ignore[arg-type]
        assert told.done == [([1],)]


async def test_who_is_fenced_loses_all_and_waits_for_no_answer(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fenced(Asked):
        def subscribe(self, topics: list[str], **callbacks: object) -> None: ...

        def poll(self, seconds: float) -> None:
            poller._on_error(KafkaError(KafkaError.FENCED_INSTANCE_ID))

        def close(self) -> None: ...

    monkeypatch.setattr("penstock_broker.ingest.poller.Consumer", lambda config: Fenced())
    async with running_store(settings.db_path) as store:
        poller, _, told = reading_two(store, settings)
        poller.hand_commit([Position(0, 5, "")])
        with pytest.raises(_Fenced):
            poller._consume()
        assert told.done == [([0, 1],), ([],)]
        assert not list(poller.tracks)


async def test_who_is_fenced_twice_has_a_double_unless_kafka_was_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_store(settings.db_path) as store:
        poller, _, told = reading_two(store, settings)
        turns, stopping = iter(["fenced", "away", "fenced", "away", "fenced", "fenced"]), threading.Event()

        def consume() -> None:
            turn = next(turns, None)
            if turn == "fenced":
                raise _Fenced(turn)
            poller._set_connected(False)
            if turn is None:
                stopping.set()

        monkeypatch.setattr(poller, "_consume", consume)
        with pytest.raises(FatalError, match="another broker with the id"):
            poller.run(told, stopping)  # type: ignore[arg-type]
        assert not list(turns)


async def test_a_full_store_pauses_and_goes_on_without_losing_its_membership(
    kafka: MockKafka, settings: Settings
) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}") for n in range(100)])
    async with consuming(settings, limits=StoreLimits(rows_max=40, namespace_share_max=1)) as (
        store,
        consumer,
    ):
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
