"""A drain ends when the store is empty, or says what could not leave and why."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from ingest_helpers import MockKafka, kafka_settings, running_store, task_bytes, until

from penstock_broker import departures
from penstock_broker.config import Settings
from penstock_broker.domain.activation import Activation
from penstock_broker.domain.lifecycle import Event
from penstock_broker.domain.token import ClaimToken
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.direct import Draining
from penstock_broker.ingest.drain import Drain
from penstock_broker.ingest.parts import Ingest
from penstock_broker.metrics import Metrics
from penstock_broker.store.batch import Answer
from penstock_broker.store.inflight import Inflight
from penstock_protocol.v1.activation_pb2 import RetryState, TaskActivation
from penstock_protocol.v1.admin_pb2 import DrainRequest, DrainResponse, GetStatusResponse


@pytest.fixture
def kafka() -> MockKafka:
    kafka = MockKafka()
    kafka.make_topic("tasks", "tasks-dlq", "tasks-overflow")
    return kafka


@contextlib.asynccontextmanager
async def ingesting(settings: Settings) -> AsyncIterator[tuple[Inflight, Ingest]]:
    async with running_store(settings.db_path) as store:
        ingest = Ingest(settings, store, Metrics())
        await ingest.start()
        try:
            yield store, ingest
        finally:
            await ingest.stop_intake()
            await ingest.stop()


async def insert(store: Inflight, *values: bytes) -> None:
    admission, now = Admission(AdmissionLimits()), store.clock.wall_ms()
    await store.insert([admission.admit(value, now) for value in values])


def token(store: Inflight, row: Activation) -> ClaimToken:
    return ClaimToken(row.claim_epoch, row.seq, row.id_hash, store.database.nonce, row.claim)


async def test_all_that_waits_is_handed_over_with_where_it_stands(kafka: MockKafka, tmp_path: Path) -> None:
    kafka.produce("tasks", [task_bytes(f"{n}", retry_state=RetryState(max_attempts=3)) for n in range(20)])
    async with ingesting(kafka_settings(kafka, tmp_path / "store.sqlite")) as (store, ingest):
        await insert(store, task_bytes("over gRPC", retry_state=RetryState(max_attempts=3)))
        await until(lambda: store.memory.rows == 21)
        (row,) = store.claim(None, (), 1, 1 << 20)
        retried = row.id
        store.settle(token(store, row), Event.RETRY, store.clock.wall_ms(), 60_000)
        await store.committed()
        report = await ingest.drain(0)
        assert (report.finished, report.left, report.handed_over, report.reasons) == (True, {}, 21, ())
        assert store.memory.rows == 0
        assert store.imbalance() == 0
        with pytest.raises(Draining):
            await ingest.direct.send(b"")
        status = GetStatusResponse()
        ingest.describe(status)
        assert (store.intake_state(), store.room()) == (("PAUSED", "drain"), 0)
        assert list(status.kafka.partitions) == []
        # Once more: there is nothing to do.
        assert (await ingest.drain(0)).left == {}
    messages = [m for m in kafka.read("tasks", 41) if b"broker-1" in (m.value() or b"")]
    assert len(messages) == 21
    (again,) = (TaskActivation.FromString(m.value() or b"") for m in messages if m.key() == retried.encode())
    assert again.retry_state.attempts == 1
    assert again.sent_on.due_at_ms > store.clock.wall_ms() + 30_000


async def test_what_still_runs_goes_elsewhere_but_not_what_must_not_start_twice(
    kafka: MockKafka, tmp_path: Path
) -> None:
    async with ingesting(kafka_settings(kafka, tmp_path / "store.sqlite")) as (store, ingest):
        once = RetryState(max_attempts=1, at_most_once=True)
        await insert(store, task_bytes("often"), task_bytes("once", retry_state=once))
        rows = {row.id: row for row in store.claim(None, (), 2, 1 << 20)}
        assert len(rows) == 2
        tokens = {id: token(store, row) for id, row in rows.items()}
        report = await ingest.drain(0.2)
        assert (report.left, report.handed_over) == ({"processing": 1}, 1)
        assert "1 tasks are running that must not start twice" in report.reasons[0]
        now = store.clock.wall_ms()
        assert store.settle(tokens["often"], Event.COMPLETE, now) is Answer.STALE
        assert store.settle(tokens["once"], Event.COMPLETE, now) is Answer.APPLIED
        assert (await ingest.drain(0)).left == {}


async def test_what_is_running_may_end(kafka: MockKafka, tmp_path: Path) -> None:
    async with ingesting(kafka_settings(kafka, tmp_path / "store.sqlite")) as (store, ingest):
        await insert(store, *(task_bytes(f"{n}") for n in range(10)))
        (row,) = store.claim(None, (), 1, 1 << 20)
        draining = asyncio.create_task(ingest.drain(60))
        await until(lambda: (report := ingest.drain_report()) and report.phase == "finishing tasks")
        # Claims go on.
        rows = store.claim(None, (), 9, 1 << 20)
        assert len(rows) == 9
        for claimed in (row, *rows):
            assert not draining.done()
            store.settle(token(store, claimed), Event.COMPLETE, store.clock.wall_ms())
            await store.committed()
        report = await draining
        assert (report.left, report.ended, report.handed_over) == ({}, 10, 0)


async def test_for_the_last_half_of_its_time_what_runs_may_end_and_nothing_starts(
    kafka: MockKafka, tmp_path: Path
) -> None:
    async with ingesting(kafka_settings(kafka, tmp_path / "store.sqlite")) as (store, ingest):
        await insert(store, task_bytes("running"), task_bytes("waiting"))
        (row,) = store.claim(None, (), 1, 1 << 20)
        draining = asyncio.create_task(ingest.drain(8))
        await until(lambda: (report := ingest.drain_report()) and report.phase == "handing over")
        await insert(store, task_bytes("late"))
        assert store.claim(None, (), 1, 1 << 20) == []
        await until(lambda: (report := ingest.drain_report()) and report.handed_over == 2)
        answer = store.settle(token(store, row), Event.COMPLETE, store.clock.wall_ms())
        assert answer is Answer.APPLIED
        report = await draining
        assert (report.left, report.handed_over) == ({}, 2)


async def test_it_ends_when_the_ledger_says_what_has_left(tmp_path: Path) -> None:
    recorded = asyncio.Event()

    async def in_the_ledger() -> None:
        await recorded.wait()

    async with running_store(tmp_path / "store.sqlite") as store:
        store.recorded = in_the_ledger
        drain = Drain(store, [], can_hand_over=True)
        ends = asyncio.create_task(drain.run(0))
        await until(lambda: drain.report().phase not in ("", "finishing tasks"))
        await store.committed()
        await asyncio.sleep(0.05)
        assert not ends.done()
        recorded.set()
        assert (await ends).phase == "drained"


async def test_what_ends_while_the_ledger_is_told_is_told_to_it_too(tmp_path: Path) -> None:
    told: list[int] = []

    async with running_store(tmp_path / "store.sqlite") as store:
        await insert(store, task_bytes("once", retry_state=RetryState(max_attempts=1, at_most_once=True)))
        (row,) = store.claim(None, (), 1, 1 << 20)

        async def tell_the_ledger() -> None:
            told.append(store.memory.rows)
            if len(told) == 1:
                store.settle(token(store, row), Event.COMPLETE, store.clock.wall_ms())
                await store.committed()

        store.recorded = tell_the_ledger
        assert (await Drain(store, [], can_hand_over=True).run(0)).phase == "drained"
        assert told == [1, 0]


async def test_what_ends_after_a_drain_is_not_recorded_until_the_next(
    kafka: MockKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departures, "ANSWER_SECONDS", 0.01)
    async with ingesting(kafka_settings(kafka, tmp_path / "store.sqlite")) as (store, ingest):
        await insert(store, task_bytes("once", retry_state=RetryState(max_attempts=1, at_most_once=True)))
        (row,) = store.claim(None, (), 1, 1 << 20)
        operator = departures.Departures(ingest)

        async def asked() -> DrainResponse:
            return DrainResponse.FromString(await operator.drain(DrainRequest().SerializeToString()))

        assert not (await asked()).finished
        await until(lambda: (report := ingest.drain_report()) and report.finished)
        store.settle(token(store, row), Event.COMPLETE, store.clock.wall_ms())
        await store.committed()
        told = await asked()
        assert told.finished
        assert [of.state for of in told.left] == ["processing"]
        assert "drain again when they have ended" in told.reasons[0]
        while not (told := await asked()).finished:
            pass
        assert not told.left


async def test_with_kafka_away_it_says_what_is_left(
    kafka: MockKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_broker.ingest.publisher.DELIVERY_MS_MAX", 500)
    settings = kafka_settings(kafka, tmp_path / "store.sqlite", kafka_cluster="127.0.0.1:9")
    async with ingesting(settings) as (store, ingest):
        await insert(store, *(task_bytes(f"{n}") for n in range(10)))
        report = await ingest.drain(0)
        assert (report.phase, report.left) == ("ended, with tasks left", {"forwarding": 10})
        assert any(why.startswith("handed over tasks cannot be forwarded: tasks: ") for why in report.reasons)
        assert any("the ledger cannot be written" in why for why in report.reasons)


async def test_what_is_too_large_stays_a_task(kafka: MockKafka, tmp_path: Path) -> None:
    """With what must go with it, that is: it would fit as it came."""
    settings = kafka_settings(kafka, tmp_path / "store.sqlite", message_bytes_max=1024)
    async with ingesting(settings) as (store, ingest):
        large = task_bytes("large", parameters_bytes=bytes(1024 * 1024 + 1024))
        await insert(store, large, task_bytes("small"))
        report = await ingest.drain(0)
        assert (report.left, report.handed_over) == ({"pending": 1}, 1)
        assert "1 tasks are too large for Kafka" in report.reasons[0]
        store.claiming = True
        (row,) = store.claim(None, (), 2, 1 << 22)
        assert (row.id, row.body) == ("large", large)
