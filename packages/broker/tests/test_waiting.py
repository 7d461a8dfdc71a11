"""Long polls: answered when work appears, shared, and gone when whoever waited has gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of

from penstock_broker.dispatch.service import COVER_SECONDS_MAX, Consumers
from penstock_broker.dispatch.waiting import Waiting, Wanted
from penstock_broker.domain.activation import Activation
from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.leases import BUCKET_MS
from penstock_protocol.v1.consumer_pb2 import GetTasksRequest
from penstock_protocol.v1.raw_pb2 import RawGetTasksResponse

ANY = Wanted(None, ())


@pytest.fixture
async def store(tmp_path: Path):
    store = open_store(tmp_path / "store.sqlite", ManualClock())
    yield store
    store.database.close()


async def insert(store: Inflight, *ids: str, namespace: str = "pay") -> None:
    store.insert([activation(id, store.clock, namespace=namespace) for id in ids])  # type: ignore[arg-type]
    await settle_down(store)


def polls(
    waiting: Waiting, count: int, wanted: Wanted = ANY, rows: int = 10
) -> list[asyncio.Task[list[Activation]]]:
    return [asyncio.create_task(waiting.wait(wanted, rows, 30)) for _ in range(count)]


async def test_work_that_appears_is_shared_among_those_who_wait(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    tasks = polls(waiting, 4)
    await asyncio.sleep(0)
    assert len(waiting) == 4
    await insert(store, *(str(n) for n in range(8)))
    assert [len(rows) for rows in await asyncio.gather(*tasks)] == [2, 2, 2, 2]
    assert len(waiting) == 0


async def test_only_who_wants_it_gets_it(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    (mail,) = polls(waiting, 1, Wanted("shop", ("mail",)))
    (pay,) = polls(waiting, 1, Wanted("shop", ("pay",)))
    await asyncio.sleep(0)
    await insert(store, "a")
    assert [row.id for row in await pay] == ["a"]
    assert not mail.done()
    waiting.close()
    assert await mail == []


async def test_what_a_worker_gave_back_goes_to_another(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    clock = store.clock
    await insert(store, "a", "b")
    (a,) = waiting.claim(ANY, 1, "old")
    store.settle(token_of(store, a), Event.UNKNOWN_TASK, clock.wall_ms())
    store.refusals.add(a.seq, "old", clock.mono_ms())
    await settle_down(store)
    assert [row.id for row in waiting.claim(ANY, 5, "old")] == ["b"]
    old = asyncio.create_task(waiting.wait(ANY, 5, 30, "old"))
    new = asyncio.create_task(waiting.wait(ANY, 5, 30, "new"))
    await asyncio.sleep(0)
    clock.advance(1_000)  # type: ignore[attr-defined]
    await settle_down(store)
    assert [row.id for row in await new] == ["a"]
    assert not old.done()
    check_store(store)
    store.release(await new)
    await settle_down(store)
    assert not old.done()
    clock.advance(60_000)  # type: ignore[attr-defined]
    assert [row.id for row in waiting.claim(ANY, 5, "old")] == ["a"]
    waiting.close()
    assert await old == []


async def test_whoever_gives_up_leaves_nothing_behind(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    assert await waiting.wait(ANY, 1, 0.01) == []
    (gone,) = polls(waiting, 1)
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert len(waiting) == 0


async def test_a_poll_that_is_cancelled_after_its_match_gives_the_claims_back(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    (gone,) = polls(waiting, 1)
    await asyncio.sleep(0)
    await insert(store, "a")  # matched, and not yet taken by the poll
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await settle_down(store)
    check_store(store)
    assert [row.id for row in waiting.claim(ANY, 1)] == ["a"]


async def test_after_closing_nothing_is_handed_out(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    await insert(store, "a")
    waiting.close()
    assert waiting.claim(ANY, 1) == []
    assert await waiting.wait(ANY, 1, 30) == []


async def poll_for_what_must_be_durable(store: Inflight) -> asyncio.Task[bytes]:
    """It has claimed two tasks, and waits for the tick that stores so."""
    consumers = Consumers(store, Waiting(store, 1 << 20))
    store.insert([activation("once", store.clock, at_most_once=True), activation("often", store.clock)])  # type: ignore[arg-type]
    await settle_down(store)
    poll = asyncio.create_task(consumers.get_tasks(GetTasksRequest(max_tasks=2).SerializeToString()))
    await asyncio.sleep(0)
    return poll


async def test_a_lease_starts_when_the_claim_is_handed_out(store: Inflight) -> None:
    poll = await poll_for_what_must_be_durable(store)
    clock = store.clock
    clock.advance(store.limits.lease_ms + 1000)  # type: ignore[attr-defined]
    assert store.lapse(clock.mono_ms()) == 0
    await settle_down(store)
    assert len(RawGetTasksResponse.FromString(await poll).tasks) == 2
    clock.advance(store.limits.lease_ms - 1)  # type: ignore[attr-defined]
    assert store.lapse(clock.mono_ms()) == 0
    clock.advance(BUCKET_MS + 1)  # type: ignore[attr-defined]
    assert store.lapse(clock.mono_ms()) == 2


async def test_a_claim_that_is_lost_before_it_is_durable_is_not_handed_out(store: Inflight) -> None:
    poll = await poll_for_what_must_be_durable(store)
    store.clock.advance(store.limits.lease_ms + round(COVER_SECONDS_MAX * 1000) + BUCKET_MS)  # type: ignore[attr-defined]
    assert store.lapse(store.clock.mono_ms()) == 2
    await settle_down(store)
    assert not RawGetTasksResponse.FromString(await poll).tasks
