"""A partition comes from another broker: what is sent a second time is not run a second time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from ingest_helpers import PARTITIONS, MockKafka, consuming, kafka_settings, running_store, task_bytes, until

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.domain.activation import Reason, hash_id
from penstock_broker.ingest import tails as module
from penstock_broker.ingest.intake import Tail
from penstock_broker.ingest.membership import STALL_MS, Membership
from penstock_broker.ingest.ownership import Me, Owner, encode
from penstock_broker.ingest.tails import Tails
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight
from penstock_protocol.v1.activation_pb2 import SentOn

GROUP = "penstock-tasks"
OTHER = encode([Owner(0, Me("another", "0" * 8), 1)])
HOUR_MS = 3_600_000


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_OFFSETS", 10)


async def ids_of(store: Inflight) -> dict[str, str | None]:
    """Of the rows: id -> why it leaves."""

    def load(database: Database) -> dict[str, str | None]:
        rows = database.load([key[0] for key in database.positions()])
        return {row.id: row.reason for row in rows}

    return await store.read(load)


def produce(kafka: MockKafka, *ids: str, **fields: object) -> None:
    """With a key, as what may be sent twice has one."""
    for id in ids:
        kafka.produce("tasks", [task_bytes(id, **fields)], key=id)


def taken(store: Inflight, offset: int, partition: int = 0) -> bool:
    return store.source("tasks", partition).next == offset


async def test_what_another_broker_took_is_not_run_again(
    kafka: MockKafka, settings: Settings, small_chunks: None
) -> None:
    ids = [f"id-{n}" for n in range(35)]
    produce(kafka, *ids)
    kafka.produce("tasks", [b"{}", None], key="poison")
    kafka.produce("tasks", [task_bytes("without a key")])
    produce(kafka, "id-3", parameters_bytes=b"another task")
    kafka.commit(GROUP, "tasks", 39, OTHER)
    produce(kafka, *ids, "new")
    produce(kafka, "id-3", parameters_bytes=b"another task")
    async with consuming(settings) as (store, _):
        await until(lambda: taken(store, 76))
        left = await ids_of(store)
        assert left.pop("new") is None
        assert list(left.values()) == [Reason.CONFLICT]
        assert store.memory.tally.duplicates == 35
        assert store.content_of("without a key") is None
    # A restart knows it, and has nothing to look through.
    produce(kafka, "id-0", "newer")
    async with consuming(settings) as (store, consumer):
        await until(lambda: taken(store, 78))
        assert set(await ids_of(store)) == {*left, "new", "newer"}
        assert consumer._poller.tails._consumer is None


class Message:
    """One that was read."""

    def __init__(self, offset: int, id: str, **fields: object) -> None:
        self._offset, self._id, self._fields = offset, id, fields

    def error(self) -> None:
        return None

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def key(self) -> bytes:
        return self._id.encode()

    def value(self) -> bytes:
        return task_bytes(self._id, **self._fields)

    def timestamp(self) -> tuple[int, int]:
        return 1, 1


class Log:
    """A consumer of a log that has these messages."""

    def __init__(self, *messages: Message) -> None:
        self._messages = list(messages)

    def get_watermark_offsets(self, partition: TopicPartition, timeout: float) -> tuple[int, int]:
        return 0, 100

    def incremental_assign(self, partitions: list[TopicPartition]) -> None: ...

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None: ...

    def close(self) -> None: ...

    def consume(self, count: int, timeout: float) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages


def test_what_follows_a_tail_that_ends_in_no_message_is_new(settings: Settings) -> None:
    """As with the end of a transaction, which takes an offset."""
    told: dict[int, int] = {}
    tails = Tails(settings, SystemClock(), lambda source, ids, forwards: told.update(ids))
    tails._consumer = Log(Message(0, "known"), Message(2, "new"))  # type: ignore[assignment]
    tails.add(Tail(partition=0, source=1, first=0, end=2))
    assert tails.turn()
    assert set(told) == {hash_id("known")}


def test_of_two_under_one_id_the_first_has_it(settings: Settings) -> None:
    """What comes again is compared with what has run."""
    first, second = Message(0, "a", parameters_bytes=b"1"), Message(1, "a", parameters_bytes=b"2")

    def known(*messages: Message) -> dict[int, int]:
        told: dict[int, int] = {}
        tails = Tails(settings, SystemClock(), lambda source, ids, forwards: told.update(ids))
        tails._consumer = Log(*messages, Message(2, "behind"))  # type: ignore[assignment]
        tails.add(Tail(partition=0, source=1, first=0, end=2))
        tails.turn()
        return told

    assert known(first, second) == known(first) != known(second)


async def test_what_was_handed_over_goes_on_once(
    kafka: MockKafka, settings: Settings, small_chunks: None
) -> None:
    """By a broker that had it; what it sent on twice may be there twice, too."""
    produce(kafka, "a", "b")
    produce(kafka, "b", sent_on=SentOn(forward_id="of b", received_at_ms=1, due_at_ms=1))
    kafka.commit(GROUP, "tasks", 3, OTHER)
    produce(kafka, "a", sent_on=SentOn(forward_id="of a", received_at_ms=1, due_at_ms=1))
    produce(kafka, "a", sent_on=SentOn(forward_id="of a", received_at_ms=1, due_at_ms=1))
    produce(kafka, "b", sent_on=SentOn(forward_id="of b", received_at_ms=1, due_at_ms=1))
    async with consuming(settings) as (store, _):
        await until(lambda: taken(store, 6))
        assert set(await ids_of(store)) == {"a"}
        assert store.memory.tally.duplicates == 2


@pytest.fixture
def held_tails(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No tail is read before this is set."""
    turn, go_on = Tails.turn, threading.Event()
    monkeypatch.setattr(Tails, "turn", lambda self: go_on.is_set() and turn(self))
    return go_on


async def test_nothing_is_taken_before_the_tail_is_known_and_others_go_on(
    kafka: MockKafka, settings: Settings, held_tails: threading.Event
) -> None:
    produce(kafka, "a", "b")
    kafka.commit(GROUP, "tasks", 2, OTHER)
    produce(kafka, "a", "c")
    async with consuming(settings, assigned=(1, 2, 3)) as (store, consumer):
        kafka.produce("tasks", [task_bytes("other")], partition=1)
        await until(lambda: taken(store, 1, partition=1))
        assert await ids_of(store) == {"other": None}
        assert kafka.committed(GROUP, "tasks").metadata == OTHER
        held_tails.set()
        await until(lambda: taken(store, 4))
        assert set(await ids_of(store)) == {"other", "c"}
        assert list(consumer.assignment) == [0, 1, 2, 3]


async def test_a_partition_that_waits_for_the_ledger_holds_up_no_other(
    kafka: MockKafka, settings: Settings, held_tails: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consumer's thread turns meanwhile: it reads others, and nothing of them is in doubt."""
    kafka.produce("tasks", [task_bytes("old"), task_bytes("new")])
    kafka.commit(GROUP, "tasks", 1, OTHER)
    asked_at: list[int] = []
    turns: list[int] = []
    recordable = asyncio.Event()
    async with consuming(settings, assigned=(1, 2, 3)) as (store, consumer):

        async def record() -> None:
            asked_at.append(store.clock.mono_ms())
            await recordable.wait()

        def turn(membership: Membership) -> None:
            turns.append(store.clock.mono_ms())
            turned(membership)

        turned = Membership.turned
        monkeypatch.setattr(Membership, "turned", turn)
        store.recorded = record  # type: ignore[method-assign]
        held_tails.set()
        await until(lambda: asked_at)
        kafka.produce("tasks", [task_bytes("other")], partition=1)
        await until(lambda: store.clock.mono_ms() > asked_at[0] + 1_500)
        # One that stands still for STALL_MS puts in doubt what is not covered.
        assert sum(0 < at - asked_at[0] < STALL_MS for at in turns) > 3
        assert len(asked_at) == 1
        assert set(await ids_of(store)) == {"other"}
        recordable.set()
        await until(lambda: taken(store, 2))
        assert set(await ids_of(store)) == {"other", "new"}
        assert list(consumer.assignment) == [0, 1, 2, 3]


async def test_a_partition_that_goes_while_its_tail_is_read_is_left_alone(
    kafka: MockKafka, settings: Settings, tmp_path: Path, held_tails: threading.Event
) -> None:
    for partition in range(PARTITIONS):
        for id in (f"{partition}-a", f"{partition}-b"):
            kafka.produce("tasks", [task_bytes(id)], partition, key=id)
        kafka.commit(GROUP, "tasks", 2, OTHER, partition)
    second = kafka_settings(kafka, tmp_path / "second.sqlite", broker_id="broker-2")
    async with consuming(settings, ()) as (one, first_consumer):
        first = first_consumer._poller
        await until(lambda: all(partition in first.tails for partition in range(PARTITIONS)))
        async with consuming(second, ()) as (two, second_consumer):
            await until(lambda: sum(partition in first.tails for partition in range(PARTITIONS)) == 2)
            held_tails.set()
            await until(lambda: len(first_consumer.assignment) == len(second_consumer.assignment) == 2)
            assert {*first_consumer.assignment, *second_consumer.assignment} == set(range(PARTITIONS))
            for partition in range(PARTITIONS):
                for id in (f"{partition}-a", f"{partition}-c"):
                    kafka.produce("tasks", [task_bytes(id)], partition, key=id)
            for store, consumer in ((one, first_consumer), (two, second_consumer)):
                for partition in consumer.assignment:
                    await until(lambda s=store, p=partition: taken(s, 4, p))  # type: ignore[misc]
                assert set(await ids_of(store)) == {f"{partition}-c" for partition in consumer.assignment}


@pytest.mark.parametrize("away", [False, True])
async def test_no_more_time_is_spent_than_there_is(
    kafka: MockKafka, settings: Settings, small_chunks: None, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """Unless Kafka is away: then it is waited for."""
    ids = [f"id-{n}" for n in range(35)]
    produce(kafka, *ids)
    kafka.commit(GROUP, "tasks", 35, OTHER)
    produce(kafka, "id-0", "id-34")
    end_chunk = Tails._end_chunk

    def too_late(self: Tails, consumer: object, reading: module._Reading) -> None:
        end_chunk(self, consumer, reading)  # type: ignore[arg-type]
        reading.deadline = 0

    monkeypatch.setattr(Tails, "_end_chunk", too_late)
    monkeypatch.setattr(Tails, "_is_away", lambda *arguments: away)
    async with consuming(settings) as (store, consumer):
        await until(lambda: taken(store, 37))
        # The newest were looked at first.
        assert set(await ids_of(store)) == (set() if away else {"id-0"})
        assert consumer.unseen == (0 if away else 25)


@pytest.mark.parametrize(
    ("sent_ms_ago", "known"),
    [
        pytest.param([0] * 40, range(40), id="within the window"),
        pytest.param([3 * HOUR_MS] * 40, range(40), id="a backlog: it counts from what was taken last"),
        pytest.param([2 * HOUR_MS] * 25 + [0] * 15, range(10, 40), id="older ones are left, in whole chunks"),
        pytest.param([2 * HOUR_MS] * 39 + [-9 * HOUR_MS], range(20, 40), id="a clock that is ahead"),
        pytest.param([0] * 20 + [9 * HOUR_MS] + [0] * 19, range(40), id="a clock that is behind"),
    ],
)
async def test_what_is_outside_the_window_is_not_read(
    kafka: MockKafka, settings: Settings, small_chunks: None, sent_ms_ago: Sequence[int], known: range
) -> None:
    async with running_store(settings.db_path) as store:
        now = store.clock.wall_ms()
        for n, ago in enumerate(sent_ms_ago):
            id = f"id-{n}"
            kafka.producer.produce("tasks", task_bytes(id), id, partition=0, timestamp=now - ago)
        kafka.producer.flush(10)
    kafka.commit(GROUP, "tasks", 40, OTHER)
    async with consuming(settings) as (store, _):
        assert [n for n in range(40) if store.content_of(f"id-{n}") is not None] == list(known)


async def test_no_more_is_read_than_the_bound(
    kafka: MockKafka, settings: Settings, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OFFSETS_MAX", 15)
    produce(kafka, *(f"id-{n}" for n in range(40)))
    kafka.commit(GROUP, "tasks", 40, OTHER)
    async with consuming(settings) as (store, consumer):
        known = [n for n in range(40) if store.content_of(f"id-{n}") is not None]
        assert known == list(range(25, 40))
        assert consumer.unseen == 0


async def test_tasks_of_a_topic_that_was_made_anew_are_not_taken_for_old_ones(
    kafka: MockKafka, settings: Settings
) -> None:
    """Its log ends before what the group has passed of the old one."""
    produce(kafka, "a", "b")
    kafka.commit(GROUP, "tasks", 1000, OTHER)
    async with consuming(settings) as (store, _):
        await until(lambda: taken(store, 2))
        assert set(await ids_of(store)) == {"a", "b"}


async def test_kafka_that_cannot_be_read_yet_is_asked_again(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce(kafka, "a")
    kafka.commit(GROUP, "tasks", 1, OTHER)
    produce(kafka, "a", "b")
    add = Tails.add
    failures = iter([KafkaError._TIMED_OUT])

    def fail_once(self: Tails, tail: Tail) -> None:
        if (code := next(failures, None)) is not None:
            raise KafkaException(KafkaError(code))
        add(self, tail)

    monkeypatch.setattr(Tails, "add", fail_once)
    async with consuming(settings) as (store, _):
        await until(lambda: taken(store, 3))
        assert set(await ids_of(store)) == {"b"}
        assert next(failures, None) is None
