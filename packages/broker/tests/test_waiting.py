"""Long polls: answered when work appears, shared, and gone when whoever waited has gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of

from penstock_broker.dispatch import waiting as waiting_module
from penstock_broker.dispatch.service import Consumers
from penstock_broker.dispatch.waiting import KEPT_SECONDS_MAX, RECORD_SECONDS_MAX, Waiting, Wanted
from penstock_broker.domain.activation import Activation, Status
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
    store.insert([activation(id, store.clock, at_most_once=True) for id in ("a", "b")])  # type: ignore[arg-type]
    await settle_down(store)
    poll = asyncio.create_task(consumers.get_tasks(GetTasksRequest(max_tasks=2).SerializeToString()))
    for _ in range(2):
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
    waited_ms = round((RECORD_SECONDS_MAX + KEPT_SECONDS_MAX) * 1000)
    store.clock.advance(store.limits.lease_ms + waited_ms + BUCKET_MS)  # type: ignore[attr-defined]
    assert store.lapse(store.clock.mono_ms()) == 2
    await settle_down(store)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not poll.done()
    poll.cancel()


# -- at-most-once claims that the ledger takes long to record


class SlowLedger:
    """Its writes end when the test says so."""

    def __init__(self, store: Inflight) -> None:
        self.store = store
        self._waiters: list[asyncio.Future[None]] = []
        self.asked = asyncio.Event()
        store.recorded = self._recorded

    async def _recorded(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self.asked.set()
        await waiter

    async def under_way(self) -> None:
        await self.asked.wait()
        self.asked.clear()
        await settle_down(self.store)

    def write(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set_result(None)


async def from_log(store: Inflight, once: int, often: int = 0) -> None:
    """So many tasks of each kind, in namespaces of their own."""
    source = store.source("tasks", 0)
    kinds = [("once", n) for n in range(once)] + [("often", n) for n in range(often)]
    rows = [
        activation(
            f"{kind} {n}",
            store.clock,  # type: ignore[arg-type]
            namespace=kind,
            at_most_once=kind == "once",
            source=source.id,
            offset=offset,
        )
        for offset, (kind, n) in enumerate(kinds)
    ]
    store.insert(rows, {source.id: len(rows)})
    await settle_down(store)
    store.cover(source, len(rows))
    await settle_down(store)


def ids(rows: list[Activation]) -> list[str]:
    return sorted(row.id for row in rows)


async def test_ordinary_tasks_do_not_wait_for_at_most_once_ones(store: Inflight) -> None:
    waiting, ledger = Waiting(store, 1 << 20), SlowLedger(store)
    await from_log(store, once=3, often=6)
    assert ids(await waiting.wait(ANY, 4, 0, "w")) == ["often 0", "often 1"]
    await ledger.under_way()
    # As long as it has not got these, it claims no more of their kind.
    assert ids(await waiting.wait(ANY, 4, 0, "w")) == ["often 2", "often 3", "often 4", "often 5"]
    assert store.memory.counts[1][Status.PENDING] == 1
    poll = asyncio.create_task(waiting.wait(ANY, 4, 0, "w"))
    await asyncio.sleep(0)
    assert not poll.done()
    ledger.write()
    assert ids(await poll) == ["once 0", "once 1"]
    rest = asyncio.create_task(waiting.wait(ANY, 4, 0, "w"))
    await ledger.under_way()
    ledger.write()
    assert ids(await rest) == ["once 2"]
    await settle_down(store)
    check_store(store)


async def test_what_is_ready_answers_who_waits_for_the_ledger(store: Inflight) -> None:
    waiting, ledger = Waiting(store, 1 << 20), SlowLedger(store)
    await from_log(store, once=1)
    poll = asyncio.create_task(waiting.wait(ANY, 4, 0, "w"))
    await ledger.under_way()
    await insert(store, "a")
    assert ids(await poll) == ["a"]
    waiting.close()


async def with_two_recorded_after_a_call(store: Inflight, monkeypatch: pytest.MonkeyPatch) -> Waiting:
    """The call has claimed them, and had to end before the ledger took that."""
    monkeypatch.setattr(waiting_module, "ANSWER_SECONDS_MAX", 0.01)
    waiting, ledger = Waiting(store, 1 << 20), SlowLedger(store)
    await from_log(store, once=2)
    assert await waiting.wait(ANY, 2, 0, "w") == []
    await ledger.under_way()
    ledger.write()
    monkeypatch.setattr(waiting_module, "ANSWER_SECONDS_MAX", 30)
    return waiting


async def test_a_call_does_not_wait_for_the_ledger_for_ever_and_the_next_has_what_it_claimed(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await with_two_recorded_after_a_call(store, monkeypatch)
    # As many as it asks for.
    first, second = await waiting.wait(ANY, 1, 0, "w"), await waiting.wait(ANY, 1, 0, "w")
    assert ids(first + second) == ["once 0", "once 1"]
    assert [row.claim for row in first + second] == [0, 0]
    await settle_down(store)
    check_store(store)


async def test_what_is_ready_is_handed_out_in_place_of_claims_that_are_lost(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await with_two_recorded_after_a_call(store, monkeypatch)
    assert ids(await waiting.wait(ANY, 1, 0, "w")) == ["once 0"]
    store.clock.advance(store.limits.lease_ms * 10)  # type: ignore[attr-defined]
    assert store.lapse(store.clock.mono_ms()) == 2
    await insert(store, "a")
    assert ids(await waiting.wait(ANY, 2, 0, "w")) == ["a"]
    waiting.close()


@pytest.mark.parametrize("why", ["its worker does not ask again", "the ledger does not take it"])
async def test_at_most_once_claims_that_are_not_handed_out_go_back(
    store: Inflight, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(waiting_module, "ANSWER_SECONDS_MAX", 0)
    monkeypatch.setattr(waiting_module, "KEPT_SECONDS_MAX", 0)
    if why == "the ledger does not take it":
        monkeypatch.setattr(waiting_module, "RECORD_SECONDS_MAX", 0)
    waiting, ledger = Waiting(store, 1 << 20), SlowLedger(store)
    await from_log(store, once=2)
    assert await waiting.wait(ANY, 2, 0, "w") == []
    if why == "its worker does not ask again":
        await ledger.under_way()
        ledger.write()
    while store.memory.counts[1][Status.PENDING] < 2:
        await asyncio.sleep(0)
        await settle_down(store)
    await settle_down(store)
    check_store(store)
    assert ids(store.claim(None, (), 2, 1 << 20)) == ["once 0", "once 1"]


async def test_a_broker_that_stops_gives_back_at_most_once_claims(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    SlowLedger(store)
    await from_log(store, once=2)
    poll = asyncio.create_task(waiting.wait(ANY, 2, 0, "w"))
    await asyncio.sleep(0)
    await settle_down(store)
    waiting.close()
    assert await poll == []
    await settle_down(store)
    assert store.memory.counts[1][Status.PENDING] == 2
    check_store(store)


async def test_at_most_once_tasks_in_front_of_a_namespace_are_passed_over_and_keep_their_place(
    store: Inflight,
) -> None:
    await insert(store, "a")
    store.insert([activation("b", store.clock, at_most_once=True), activation("c", store.clock)])  # type: ignore[arg-type]
    await settle_down(store)
    assert ids(store.claim(None, (), 3, 1 << 20, at_most_once=False)) == ["a", "c"]
    await settle_down(store)
    check_store(store)
    assert ids(store.claim(None, (), 3, 1 << 20)) == ["b"]
