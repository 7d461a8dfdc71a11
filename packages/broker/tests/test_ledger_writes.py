"""When the ledger says what: on a log in memory."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException
from ingest_helpers import running_store, task_bytes, until
from store_helpers import token_of

from penstock_broker.config import Settings
from penstock_broker.domain.lifecycle import Event
from penstock_broker.ingest import ledger as ledger_module
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.intake import Found
from penstock_broker.ingest.ledger import Ledger
from penstock_broker.ingest.ledger_records import Account, Record, read_account
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.inflight import Inflight

GROUP = "penstock-tasks"


class Log:
    """The ledger's topic, which outlives brokers."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.takes = threading.Event()
        self.takes.set()
        self.refuses = 0
        # Writes that have begun.
        self.begun = 0

    def write(self, records: Sequence[Record]) -> None:
        self.begun += 1
        assert self.takes.wait(30)
        if self.refuses:
            self.refuses -= 1
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        self.records += records

    def account(self) -> Account:
        return read_account(self.records, GROUP, "broker-1")

    def read(self) -> list[Record]:
        return list(self.records)

    def is_there(self) -> bool:
        return True

    def fence(self) -> None: ...

    def close(self) -> None: ...

    def look_up(self, topic: str, partitions: Sequence[int] | None) -> list[Found]:
        return []


class Broker:
    """A store with its ledger, which reads one partition."""

    def __init__(self, store: Inflight, ledger: Ledger) -> None:
        self.store, self.ledger = store, ledger
        self.source = store.source("tasks", 0)
        if self.source.start < 0:
            store.begin_range(self.source, 0)
        self._admission = Admission(AdmissionLimits())

    async def take(self, first: int, end: int) -> None:
        """Until it is durable and covered; a message that is none of a task takes the last offset."""
        now = self.store.clock.wall_ms()
        rows = [
            self._admission.admit(task_bytes(f"{n}"), now, self.source.id, n) for n in range(first, end - 1)
        ]
        await self.store.insert(rows, {self.source.id: end})
        self.store.cover(self.source, end)
        await self.store.committed()

    async def finish(self) -> None:
        """All that it holds."""
        for row in self.store.claim(None, (), 1000, 1 << 20):
            self.store.settle(token_of(self.store, row), Event.COMPLETE, self.store.clock.wall_ms())
        await self.store.committed()


@contextlib.asynccontextmanager
async def broker(path: Path, log: Log, killed: bool = False) -> AsyncIterator[Broker]:
    """``killed``: it says nothing more at its end."""
    settings = Settings(kafka_topic="tasks", broker_id="broker-1", db_path=path)
    async with running_store(path) as store:
        ledger = Ledger(store, settings)
        ledger.log = log  # type: ignore[assignment]
        ledger.start()
        await ledger.open(lambda: None)
        await store.recorded()
        try:
            yield Broker(store, ledger)
        finally:
            ledger.is_open = ledger.is_open and not killed
            log.takes.set()
            await ledger.stop()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture(autouse=True)
def _waits_for_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(ledger_module, "HEARTBEAT_SECONDS", 3600)


async def test_what_was_not_recorded_before_a_crash_is_at_the_next_start(path: Path, log: Log) -> None:
    async with broker(path, log, killed=True) as one:
        await one.take(0, 20)
        await one.store.recorded()
        log.takes.clear()
        await one.take(20, 25)
        await one.finish()
        log.refuses = 1000
    log.refuses = 0
    assert len(log.account().segments) == 1
    async with broker(path, log):
        account = log.account()
        assert account.segments == {}
        assert account.ranges["tasks", 0] == (0, 25, 25)


async def test_what_changes_while_it_is_written_is_written_next(path: Path, log: Log) -> None:
    """Also where no task came or went: a copy that was absorbed must not be restored as one."""
    async with broker(path, log) as one:
        await one.take(0, 10)
        await one.store.recorded()
        log.takes.clear()
        begun = log.begun
        await one.take(10, 15)
        await until(lambda: log.begun > begun)
        await one.take(15, 16)
        log.takes.set()
        await until(lambda: log.account().ranges["tasks", 0] == (0, 16, 16))


async def test_who_asks_while_it_is_written_waits_for_the_next(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        log.takes.clear()
        begun = log.begun
        first = asyncio.ensure_future(one.store.recorded())
        await until(lambda: log.begun > begun)
        await one.take(0, 10)
        second = asyncio.ensure_future(one.store.recorded())
        await asyncio.sleep(0.01)
        log.takes.set()
        await first
        await second
        assert log.account().ranges["tasks", 0] == (0, 10, 10)


async def test_what_is_not_durable_yet_is_waited_for(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        disk, write = threading.Event(), one.store.database.write

        def slow(batch: Batch) -> Written:
            disk.wait(30)
            return write(batch)

        one.store.database.write = slow  # type: ignore[method-assign]
        takes = asyncio.create_task(one.take(0, 10))
        await asyncio.sleep(0)
        waits = asyncio.ensure_future(one.store.recorded())
        await asyncio.sleep(0.05)
        told_too_soon = waits.done()
        disk.set()
        assert not told_too_soon
        await takes
        await waits
        assert log.account().segments


async def test_what_an_adopter_says_is_said_again_when_it_was_not_taken(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        log.refuses = 2
        await one.ledger.record_with([(b'["void"]', b"{}")])
        assert (b'["void"]', b"{}") in log.records


async def test_it_ends_at_the_moment_of_a_change(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        await one.take(0, 10)
    assert log.account().ranges["tasks", 0] == (0, 10, 10)
