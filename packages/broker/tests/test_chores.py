"""What time moves is moved when it is due, though nobody calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from ingest_helpers import until
from store_helpers import ManualClock, activation, open_store, settle_down

from penstock_broker.domain.activation import OnExceeded, Status
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_broker.upkeep import chores
from penstock_broker.upkeep.chores import Upkeep

BYTES = 1 << 20


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@contextlib.asynccontextmanager
async def kept(path: Path, clock: ManualClock, limits: StoreLimits | None = None) -> AsyncIterator[Inflight]:
    """A store with its chores and its writer, in the test's time."""
    store = open_store(path, clock, limits)
    tasks = [asyncio.create_task(Upkeep(store).run()), asyncio.create_task(store.writer.run())]
    try:
        yield store
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        store.database.close()


def pending(store: Inflight) -> int:
    return sum(counts[Status.PENDING] for counts in store.memory.counts.values())


async def test_a_delay_that_is_shorter_than_the_sleep_ends_it(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "LOOK_AT_DISK_EVERY_MS", chores.SLEEP_MS_MAX)
    async with kept(tmp_path / "store.sqlite", clock) as store:
        await asyncio.sleep(0)  # asleep, for a minute at most
        await store.insert([activation("a", clock, delay_ms=30)])
        # Real time wakes it up; by the broker's clock the delay is not over until the test says so.
        clock.advance(29)
        await asyncio.sleep(0.1)
        assert pending(store) == 0
        clock.advance(1)
        await until(lambda: pending(store) == 1)


async def test_a_vanished_workers_lease_ends(tmp_path: Path, clock: ManualClock) -> None:
    async with kept(tmp_path / "store.sqlite", clock, StoreLimits(lease_ms=400)) as store:
        await store.insert([activation("a", clock)])
        await until(lambda: store.memory.index.rows)
        assert store.claim(None, (), 1, BYTES)
        await store.committed()
        for _ in range(40):
            clock.advance(20)
            await asyncio.sleep(0.02)
        await until(lambda: pending(store) == 1)


async def test_a_broker_that_stood_still_judges_no_lease_by_that_time(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "WATCH_MS", 50)
    async with kept(tmp_path / "store.sqlite", clock) as store:
        await store.insert([activation("a", clock)])
        await until(lambda: store.memory.index.rows)
        (row,) = store.claim(None, (), 1, BYTES)
        await store.committed()
        await asyncio.sleep(0.05)
        lease_until = row.lease_until
        # Asleep for the length of a watch, it wakes up a minute later.
        clock.advance(60_000)
        await until(lambda: row.lease_until != lease_until or row.status is not Status.PROCESSING)
        assert row.status is Status.PROCESSING
        assert row.lease_until - lease_until == pytest.approx(60_000, abs=100)


async def test_what_is_outside_the_window_is_forgotten(tmp_path: Path, clock: ManualClock) -> None:
    limits = StoreLimits(dedup_window_ms=1_000)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    store.insert([activation("a", clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD)])
    await settle_down(store)
    assert store.content_of("a") is not None
    upkeep = Upkeep(store)
    clock.advance(chores.FORGET_EVERY_MS)
    for chore in upkeep.chores:
        due = chore.due()
        if due is not None and due <= clock.mono_ms():
            chore.run(clock.mono_ms())
    await settle_down(store)
    assert store.content_of("a") is None
    assert store.database.connection.execute("SELECT count(*) FROM finished").get == 0
    store.database.close()
