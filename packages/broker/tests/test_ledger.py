"""The ledger against librdkafka's mock of a cluster, which has transactions but fences nobody: what needs
a fence is tested on a real Kafka, in tests/e2e."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from ingest_helpers import PARTITIONS, MockKafka, kafka_settings, running_store, task_bytes, until
from store_helpers import token_of

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.domain.activation import Status
from penstock_broker.domain.lifecycle import Event
from penstock_broker.domain.token import ClaimToken
from penstock_broker.errors import OldDatabase, Replaced
from penstock_broker.ingest import ledger as ledger_module
from penstock_broker.ingest import ledger_log, ledger_restore
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.intake import Found
from penstock_broker.ingest.ledger import Ledger
from penstock_broker.ingest.ledger_log import LedgerLog
from penstock_broker.ingest.ledger_records import Account, Record, head_record, read_account
from penstock_broker.ingest.ownership import Me
from penstock_broker.store.batch import Answer, Batch, Written
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.ledger import offsets_of
from penstock_protocol.v1.activation_pb2 import RetryState

GROUP = "penstock-tasks"


@pytest.fixture
def kafka() -> MockKafka:
    kafka = MockKafka()
    kafka.make_topic("tasks", "tasks-dlq", "penstock-ledger")
    return kafka


@pytest.fixture
def settings(kafka: MockKafka, tmp_path: Path) -> Settings:
    return kafka_settings(kafka, tmp_path / "store.sqlite")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(ledger_restore, "LOOK_SECONDS", 0.05)
    # The mock does not tell who is in a group. Of those here none lives on.
    monkeypatch.setattr(LedgerLog, "is_member", lambda log, broker_id: False)


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Topic -> how many more answers Kafka gives as a node of it does that is coming up: it knows none."""
    answers: dict[str, int] = {}

    class Asks(Consumer):
        def list_topics(self, topic: str, timeout: float) -> object:  # type: ignore[override]
            found = super().list_topics(topic, timeout=timeout)
            if answers.get(topic, 0) > 0:
                answers[topic] -= 1
                found.topics[topic].partitions = {}
                found.topics[topic].error = KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)
            return found

    monkeypatch.setattr(ledger_log, "Consumer", Asks)
    return answers


class Broker:
    """An intake with its ledger."""

    def __init__(self, store: Inflight, settings: Settings) -> None:
        self.store = store
        self.ledger = Ledger(store, settings)
        self.consumer = KafkaConsumer(store, settings, self.ledger)

    def account(self) -> Account:
        records = self.ledger.log_of("reader").read()
        return read_account(records, GROUP, "broker-1")

    def recorded(self) -> dict[int, list[int]]:
        """Partition -> unfinished offsets."""
        found: dict[int, list[int]] = {}
        for (_, partition, number), segment in self.account().segments.items():
            found.setdefault(partition, []).extend(offsets_of(number << 14, segment))
        return found

    def taken(self, count: int, partition: int = 0) -> bool:
        """Whether the first offsets are here and covered."""
        source = self.store.memory.partitions.find("tasks", partition)
        return source is not None and source.covered >= count

    async def claim(self, count: int = 1) -> list[tuple[str, ClaimToken]]:
        rows = self.store.claim(None, (), count, 1 << 20)
        await self.store.recorded()
        return [(row.id, token_of(self.store, row)) for row in rows]

    async def settle(self, token: ClaimToken, event: Event, **how: object) -> None:
        answer = self.store.settle(token, event, self.store.clock.wall_ms(), **how)  # type: ignore[arg-type]
        assert answer is Answer.APPLIED
        await self.store.recorded()


@contextlib.asynccontextmanager
async def broker(settings: Settings, reading: bool = True) -> AsyncIterator[Broker]:
    """Once its partitions are assigned, or (much sooner) its ledger is known; stopped at the end."""
    async with running_store(settings.db_path) as store:
        made = Broker(store, settings)
        made.ledger.start()
        try:
            await made.consumer.start()
            await until(
                lambda: (
                    len(made.consumer.assignment) == PARTITIONS
                    if reading
                    else made.ledger.is_open or made.ledger._failed
                )
            )
            yield made
        finally:
            await made.consumer.stop()
            await made.ledger.stop()


def lose_disk(settings: Settings) -> None:
    for path in settings.db_path.parent.glob(settings.db_path.name + "*"):
        path.unlink()


async def test_what_is_unfinished_is_recorded(kafka: MockKafka, settings: Settings) -> None:
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(50)])
    kafka.produce("tasks", [task_bytes("there")], partition=2)
    async with broker(settings) as one:
        await until(lambda: one.taken(50) and one.taken(1, 2))
        await one.store.recorded()
        assert one.recorded() == {0: list(range(50)), 2: [0]}
        for _, token in await one.claim(51):
            await one.settle(token, Event.COMPLETE) if token.seq % 2 else None
        left = {p: offsets for p, offsets in one.recorded().items() if offsets}
        assert sum(map(len, left.values())) == one.store.memory.rows
        for row in list(one.store.memory.resident.values()):
            await one.settle(token_of(one.store, row), Event.COMPLETE)
        assert one.account().segments == {}
        assert one.account().ranges["tasks", 0] == (0, 50, 50)
        assert one.ledger.age_seconds() == 0


async def test_a_lost_disk_is_restored_as_it_was(kafka: MockKafka, settings: Settings) -> None:
    ids = ["done", "waiting", "retried", "lost", "failed", "running", "unknown"]
    retry = {"max_attempts": 3, "on_attempts_exceeded": 2}
    kafka.produce("tasks", [task_bytes(id, retry_state=retry) for id in ids])
    kafka.produce("tasks", [task_bytes("once", retry_state={"at_most_once": True}), b"poison"])
    async with broker(settings) as one:
        await until(lambda: one.taken(9))
        await one.store.recorded()
        tokens: dict[str, ClaimToken] = {}
        while len(tokens) < 8:
            tokens |= dict(await one.claim(10))
        await one.settle(tokens["waiting"], Event.RELEASE)
        await one.settle(tokens["done"], Event.COMPLETE)
        await one.settle(tokens["retried"], Event.RETRY, retry_delay_ms=3_600_000)
        await one.settle(tokens["lost"], Event.WORKER_DIED)
        await one.settle(tokens["failed"], Event.FAIL)
        await one.settle(tokens["unknown"], Event.UNKNOWN_TASK)
        given_back_at = one.store.clock.wall_ms()
    lose_disk(settings)
    async with broker(settings) as two:
        rows = {
            row.id: row for row in await two.store.read(lambda d: d.load([key[0] for key in d.positions()]))
        }
        (poison,) = rows.keys() - {*ids, "once"}
        found = {id: (row.status, row.attempts, row.lost, row.reason) for id, row in rows.items()}
        assert found == {
            "waiting": (Status.PENDING, 0, 0, None),
            "running": (Status.PENDING, 0, 0, None),
            "retried": (Status.DELAYED, 1, 0, None),
            "lost": (Status.PENDING, 0, 1, None),
            "failed": (Status.FORWARDING, 1, 0, "failed"),
            "once": (Status.FORWARDING, 0, 1, "start_unknown"),
            "unknown": (rows["unknown"].status, 0, 0, None),
            poison: (Status.FORWARDING, 0, 0, "not_an_activation"),
        }
        assert given_back_at - 60_000 < (rows["unknown"].given_back_at or 0) <= given_back_at
        assert rows["retried"].ready_at > two.store.clock.wall_ms() + 3_000_000
        assert sum(n for (_, term), n in two.store.memory.books.items() if term == "restored") == 8
        assert two.store.imbalance() == 0
        # It goes on where the lost one was, and its own ledger says what it has.
        kafka.produce("tasks", [task_bytes("new")])
        await until(lambda: two.taken(10))
        await two.store.recorded()
        assert two.recorded()[0] == list(range(1, 10))
        assert two.store.memory.tally.duplicates == 0


@pytest.mark.parametrize("topic", ["tasks", "penstock-ledger"])
async def test_a_node_of_kafka_that_is_coming_up_loses_nothing_of_a_lost_disk(
    kafka: MockKafka, settings: Settings, unknown: dict[str, int], topic: str
) -> None:
    """It answers that it does not know a topic that is there."""
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(10)])
    async with broker(settings) as one:
        await until(lambda: one.taken(10))
        for _, token in await one.claim(10):
            await one.settle(token, Event.COMPLETE) if token.seq % 2 else None
        left = one.store.memory.rows
    lose_disk(settings)
    unknown[topic] = 2
    async with broker(settings, reading=False) as two:
        await until(lambda: two.ledger.is_open)
        assert two.store.memory.rows == left
        assert two.ledger.unrestorable == 0


def test_what_a_node_of_kafka_does_not_know_is_no_answer(
    kafka: MockKafka, settings: Settings, unknown: dict[str, int]
) -> None:
    """Least of all that nobody has committed anything."""
    kafka.produce("tasks", [task_bytes("one")])
    log = LedgerLog(settings, SystemClock(), "broker-1")
    unknown["tasks"] = 1
    assert log.look_up("tasks", [0, PARTITIONS]) == []
    assert log.look_up("tasks", [0, PARTITIONS]) == [Found(0, None, ())]
    assert log.ends("tasks", 0) == (0, 1)
    unknown["penstock-ledger"] = 1
    with pytest.raises(KafkaException):
        log.read()
    assert log.read() == []


async def test_an_end_that_is_told_too_early_ends_no_restore(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node does that leads a partition since a moment ago."""
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(30)])
    async with broker(settings) as one:
        await until(lambda: one.taken(30))
        await one.store.recorded()
    lose_disk(settings)
    following, early = ledger_log._next, [SimpleNamespace(error=_end, partition=lambda: 0, offset=lambda: 0)]

    def first_an_end(consumer: Consumer):  # type: ignore[no-untyped-def]
        of_tasks = consumer.assignment()[0].topic == "tasks"
        return [early.pop()] if early and of_tasks else following(consumer)

    monkeypatch.setattr(ledger_log, "_next", first_an_end)
    async with broker(settings, reading=False) as two:
        assert not early
        assert two.store.memory.rows == 30
        assert two.ledger.unrestorable == 0


def _end() -> KafkaError:
    return KafkaError(KafkaError._PARTITION_EOF)


async def test_what_was_taken_since_the_last_record_is_restored(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(10)])
    write = LedgerLog.write
    async with broker(settings) as one:
        await until(lambda: one.taken(10))
        await one.store.recorded()
        monkeypatch.setattr(LedgerLog, "write", _refusing)
        kafka.produce("tasks", [task_bytes(f"late-{n}") for n in range(10)])
        once = RetryState(at_most_once=True)
        kafka.produce("tasks", [task_bytes("once", retry_state=once)])
        kafka.produce("tasks", [task_bytes("maybe a copy", retry_state=once)], key="maybe a copy")
        await until(lambda: one.taken(22))
        assert one.recorded() == {0: list(range(10))}
    monkeypatch.setattr(LedgerLog, "write", write)
    lose_disk(settings)
    async with broker(settings, reading=False) as two:
        assert two.store.memory.rows == 22
        assert len(two.store.memory.forwarding) == 1
        assert two.ledger.unrestorable == 0


def _refusing(self: LedgerLog, records: Sequence[Record]) -> None:
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


async def test_a_restore_that_is_interrupted_goes_on(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(30)])
    kafka.produce("tasks", [task_bytes(f"other-{n}") for n in range(5)], partition=1)
    async with broker(settings) as one:
        await until(lambda: one.taken(30) and one.taken(5, 1))
        await one.store.recorded()
    lose_disk(settings)
    messages, parts = LedgerLog.messages, []

    def few(self: LedgerLog, topic: str, partition: int, offsets: Sequence[int]):  # type: ignore[no-untyped-def]
        parts.append(offsets)
        yield from messages(self, topic, partition, offsets[:7])
        if len(offsets) > 7:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    monkeypatch.setattr(LedgerLog, "messages", few)
    monkeypatch.setattr(ledger_module, "RETRY_SECONDS", 3600)
    finished = 0
    for _ in range(4):
        async with broker(settings, reading=False) as two:
            assert not two.consumer.assignment
            # What has been restored can be done at once, and is not restored again.
            rows = two.store.claim(None, (), 3, 1 << 20)
            for row in rows:
                two.store.settle(token_of(two.store, row), Event.COMPLETE, two.store.clock.wall_ms())
            await two.store.committed()
            finished += len(rows)
            assert two.store.imbalance() == 0
    assert finished == 12
    async with broker(settings, reading=False) as three:
        assert three.store.memory.rows == 35 - finished
        assert sum(n for (_, term), n in three.store.memory.books.items() if term == "restored") == 35
        assert [len(offsets) for offsets in parts] == [30, 23, 16, 9, 2, 5]
        assert three.store.memory.tally.duplicates == 0


async def test_a_new_store_that_was_stopped_before_its_first_record_is_the_right_one(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with broker(settings):
        pass
    lose_disk(settings)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write_once", _stopped)
        async with broker(settings, reading=False) as two:
            assert two.store.database.meta("restore") == "done"
    async with broker(settings, reading=False) as three:
        assert three.ledger.is_open


async def _stopped(self: Ledger) -> None:
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


async def test_a_record_is_not_ahead_of_what_is_durable(kafka: MockKafka, settings: Settings) -> None:
    """A tick is being written; what it takes and what it finishes is in no record yet."""
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(10)])
    async with broker(settings) as one:
        await until(lambda: one.taken(10))
        ((_, token),) = await one.claim()
        writing, may_commit = asyncio.Event(), asyncio.Event()
        handoff = one.store.writer._handoff

        async def slow(write: Callable[[Batch], Written], batch: Batch) -> Written:
            written: Written = await handoff(write, batch)
            writing.set()
            await may_commit.wait()
            return written

        one.store.writer._handoff = slow
        one.store.settle(token, Event.COMPLETE, one.store.clock.wall_ms())
        kafka.produce("tasks", [task_bytes("more")])
        await writing.wait()
        taken = one.ledger._take()
        assert not any(part.next > 10 for part in taken.ranges.values())
        known = one.store.memory.unfinished.places()
        assert sorted(at & 0xFFFF for at in known) == list(range(10))
        one.store.memory.unfinished.dirty.update(taken.segments)
        one.store.memory.unfinished.dirty_ranges.update(taken.ranges)
        may_commit.set()
        await until(lambda: one.taken(11))
        await one.store.recorded()
        assert len(one.recorded()[0]) == 10


async def test_an_at_most_once_claim_waits_for_the_ledger(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka.produce("tasks", [task_bytes("once", retry_state={"at_most_once": True}), task_bytes("often")])
    written: list[Sequence[Record]] = []
    write = LedgerLog.write

    def noting(self: LedgerLog, records: Sequence[Record]) -> None:
        write(self, records)
        written.append(records)

    async with broker(settings) as one:
        await until(lambda: one.taken(2))
        await one.store.recorded()
        monkeypatch.setattr(LedgerLog, "write", noting)
        tokens = dict(await one.claim(2))
        assert tokens.keys() == {"once", "often"}
        assert any(b'"states":[[0,' in (value or b"") for batch in written for _, value in batch)
        (segment,) = one.account().segments.values()
        assert segment.states[0].claimed
        await one.settle(tokens["once"], Event.RELEASE)
        # While it cannot be written, no other is handed out; an ordinary one is.
        monkeypatch.setattr(LedgerLog, "write", _refusing)
        one.store.settle(tokens["often"], Event.RELEASE, one.store.clock.wall_ms())  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(one.store.recorded())
        await until(lambda: one.store.memory.partitions.unrecorded)
        await one.store.committed()
        assert [row.id for row in one.store.claim(None, (), 2, 1 << 20)] == ["often"]
        monkeypatch.setattr(LedgerLog, "write", write)
        await waiting
        assert not one.store.memory.partitions.unrecorded
        assert [id for id, _ in await one.claim(2)] == ["once"]


async def test_without_its_topic_the_broker_serves_and_says_so(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = MockKafka()
    bare.make_topic("tasks", "tasks-dlq")
    bare.produce("tasks", [task_bytes("once", retry_state={"at_most_once": True})])
    monkeypatch.setattr(ledger_module, "LOOK_AGAIN_SECONDS", 0.1)
    async with broker(kafka_settings(bare, tmp_path / "bare.sqlite")) as one:
        await until(lambda: one.taken(1))
        assert one.ledger.off
        assert not one.ledger.is_open
        assert [id for id, _ in await one.claim()] == ["once"]
        bare.make_topic("penstock-ledger")
        await until(lambda: one.ledger.is_open)
        await one.store.recorded()
        assert one.recorded() == {0: [0]}


async def test_an_old_copy_is_refused(kafka: MockKafka, settings: Settings, tmp_path: Path) -> None:
    kafka.produce("tasks", [task_bytes("first")])
    async with broker(settings) as one:
        await until(lambda: one.taken(1))
    shutil.copy(settings.db_path, tmp_path / "copy")
    async with broker(settings, reading=False) as one:
        await one.claim()
    shutil.move(tmp_path / "copy", settings.db_path)
    with pytest.raises(OldDatabase, match="old copy"):
        async with broker(settings, reading=False):
            pass


async def test_a_database_that_was_replaced_is_refused(
    kafka: MockKafka, settings: Settings, unknown: dict[str, int]
) -> None:
    kafka.produce("tasks", [task_bytes("first")])
    async with broker(settings) as one:
        await until(lambda: one.taken(1))
        log = one.ledger.log_of("broker-1")
    kept = settings.db_path.rename(settings.db_path.with_name("kept"))
    async with broker(settings, reading=False) as two:
        assert two.store.memory.rows == 1
    lose_disk(settings)
    kept.rename(settings.db_path)
    with pytest.raises(OldDatabase, match="not the one"):
        async with broker(settings, reading=False):
            pass
    head = one.account().head
    assert head is not None
    log.fence()
    log.write([head_record(GROUP, "broker-1", head._replace(successor=Me("heir", "x"), handed=True))])
    # Also where the first node of Kafka that is asked does not know the ledger yet.
    unknown["penstock-ledger"] = 1
    async with running_store(settings.db_path) as store:
        with pytest.raises(Replaced, match="adopted by broker 'heir'"):
            await Ledger(store, settings).open(lambda: None)


async def test_nothing_recorded_and_nothing_committed_starts_empty(settings: Settings) -> None:
    async with broker(settings, reading=False) as one:
        assert one.store.database.meta("restore") == "done"
        await one.store.recorded()
        assert one.account().head is not None
