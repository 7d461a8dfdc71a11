"""The overflow topic: consumed as there is room, in nobody's way, and at rest while there is none."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from ingest_helpers import PARTITIONS, MockKafka, kafka_settings, running_store, task_bytes, until
from store_helpers import ManualClock, activation

from penstock_broker.config import Settings
from penstock_broker.domain.activation import Reason, Status, hash_id
from penstock_broker.domain.lifecycle import Event
from penstock_broker.ingest import overflow, parts
from penstock_broker.ingest.intake import Intake
from penstock_broker.ingest.ledger import Ledger
from penstock_broker.ingest.parts import Ingest
from penstock_broker.metrics import Metrics
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits

LIMITS = StoreLimits(rows_max=400)
SHARE = 200


@pytest.fixture
def kafka() -> MockKafka:
    kafka = MockKafka()
    kafka.make_topic("tasks", "tasks-dlq", "tasks-overflow")
    return kafka


@pytest.fixture
def settings(kafka: MockKafka, tmp_path: Path) -> Settings:
    return kafka_settings(kafka, tmp_path / "store.sqlite")


@contextlib.asynccontextmanager
async def ingesting(
    settings: Settings, limits: StoreLimits = LIMITS
) -> AsyncIterator[tuple[Inflight, Ingest]]:
    async with running_store(settings.db_path, LIMITS) as store:
        ingest = Ingest(settings, store, Metrics())
        await ingest.start()
        try:
            yield store, ingest
        finally:
            await ingest.stop_intake()
            await ingest.stop()


def ended(store: Inflight, term: str) -> int:
    return sum(n for (_, name), n in store.memory.books.items() if name == term)


def held(store: Inflight, namespace: str) -> int:
    queue = store.memory.index.pair("shop", namespace)
    if queue is None:
        return 0
    return sum(store.memory.counts[queue.pair][status] for status in (Status.PENDING, Status.DELAYED))


def tasks(namespace: str, count: int) -> list[bytes]:
    return [task_bytes(f"{namespace}-{n}", namespace=namespace) for n in range(count)]


async def complete(store: Inflight, ids: list[str]) -> None:
    for id in ids:
        store.settle_by_id(hash_id(id), Event.COMPLETE, 0)
    await store.committed()


async def test_a_flood_leaves_room_for_others_and_rests(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "PROBE_ROWS_MAX", 50)
    monkeypatch.setattr(overflow, "BACK_OFF_SECONDS_MIN", 0.05)
    kafka.produce("tasks", tasks("flood", 1000))
    kafka.produce("tasks", tasks("quiet", 100))
    async with ingesting(settings) as (store, ingest):
        await until(lambda: held(store, "quiet") == 100)
        await until(lambda: ended(store, "overflow") >= 800)
        assert held(store, "flood") == SHARE
        assert ingest.overflow is not None
        # Each look costs no more than a few records, and comes later than the one before.
        looks = [ended(store, "overflow")]
        for _ in range(4):
            await until(lambda: ended(store, "overflow") > looks[-1])
            await until(lambda: store.outbox.size() == 0)
            looks.append(ended(store, "overflow"))
        assert looks[-1] - looks[0] <= 4 * 2 * 50
        # As it has room, what is in the topic comes.
        while ended(store, "done") < 1100:
            await complete(store, await store.read(lambda database: [key[2] for key in database.positions()]))
        await until(lambda: store.memory.rows == 0)
        assert ended(store, "done") == 1100
        assert store.imbalance() == 0


async def test_who_has_room_gets_past_those_who_have_none(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one partition, the others first."""
    monkeypatch.setattr(overflow, "BACK_OFF_SECONDS_MIN", 0.05)
    kafka.produce("tasks", tasks("flood", SHARE))
    async with ingesting(settings) as (store, _):
        await until(lambda: held(store, "flood") == SHARE)
        behind = [task_bytes(f"more-{n}", namespace="flood") for n in range(600)]
        kafka.produce("tasks-overflow", [*behind, *tasks("quiet", 10)])
        await until(lambda: held(store, "quiet") == 10)
        assert held(store, "flood") == SHARE


async def test_of_the_overflow_nothing_is_skipped_whatever_is_of_the_topic(
    kafka: MockKafka, settings: Settings
) -> None:
    kafka.produce("tasks", tasks("before", 3))
    kafka.produce("tasks-overflow", tasks("over", 3))
    latest = settings.model_copy(update={"kafka_auto_offset_reset": "latest"})
    async with ingesting(latest) as (store, ingest):
        consumer = ingest.consumer
        assert consumer is not None
        await until(lambda: len(consumer.assignment) == PARTITIONS)
        kafka.produce("tasks", tasks("after", 3))
        await until(lambda: store.source("tasks", 0).next == 6)
        assert (held(store, "before"), held(store, "after")) == (0, 3)
        await until(lambda: store.source("tasks-overflow", 0).next == 3)
        assert held(store, "over") == 3


async def test_what_was_read_of_the_overflow_is_no_orphan_after_a_restart(settings: Settings) -> None:
    """It is consumed, too: another broker may have read its rows again."""
    clock = ManualClock()
    async with running_store(settings.db_path) as store:
        source = store.source("tasks-overflow", 0)
        rows = [activation(f"over-{n}", clock, source=source.id, offset=n) for n in range(3)]
        await store.insert(rows, {source.id: 3})
    async with ingesting(settings) as (store, _):
        source = store.source("tasks-overflow", 0)
        assert (len(source.uncovered), source.covered) == (3, 0)


async def test_what_is_read_of_the_overflow_takes_part_in_an_adoption(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics: list[str] = []

    async def adopt(ledger: Ledger, intakes: Sequence[Intake], broker_id: str, force: bool) -> None:
        topics.extend(intake.topic for intake in intakes)

    monkeypatch.setattr(parts, "adopt", adopt)
    async with ingesting(settings) as (_, ingest):
        await ingest.adopt("gone", False)
    assert topics == ["tasks", "tasks-overflow"]


async def test_the_overflow_is_read_on_as_soon_as_one_that_was_full_has_room(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "BACK_OFF_SECONDS_MIN", 60.0)
    async with running_store(settings.db_path) as store:
        reads = overflow.Overflow(store, settings)
        rows = [activation("t", ManualClock(), namespace=name) for name in ("full", "free")]
        for pair, row in enumerate(rows, 1):
            row.seq, row.pair, row.reason = pair, pair, Reason.OVERFLOW
        room: set[int] = set()
        monkeypatch.setattr(store, "has_share_room", room.__contains__)
        for queue in ("full", "free"):
            store.pair("shop", queue)
        reads._inserted(rows)
        store.watch_disk()
        await store.committed()
        assert reads._room() == 0
        room.add(2)
        store.watch_disk()
        await store.committed()
        assert reads._room() > 0
