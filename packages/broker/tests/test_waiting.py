"""Long polls: answered when work appears, shared, and gone when whoever waited has gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ingest_helpers import task_bytes
from store_helpers import (
    LoopClock,
    ManualClock,
    activation,
    check_store,
    open_store,
    run_virtually,
    settle_down,
    token_of,
)

from penstock_broker.dispatch import waiting as waiting_module
from penstock_broker.dispatch.service import Consumers
from penstock_broker.dispatch.waiting import RECORD_SECONDS_MAX, Waiting, Wanted
from penstock_broker.domain.activation import Activation, Status, hash_id
from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.leases import BUCKET_MS
from penstock_broker.upkeep.chores import Upkeep
from penstock_protocol.v1.activation_pb2 import TaskActivation
from penstock_protocol.v1.consumer_pb2 import (
    OUTCOME_ANSWER_APPLIED,
    TASK_OUTCOME_STATUS_COMPLETE,
    ExtendClaimsRequest,
    GetTasksRequest,
    HeldClaim,
    SetTaskStatusesRequest,
    SetTaskStatusesResponse,
    WorkerIdentity,
)
from penstock_protocol.v1.raw_pb2 import RawClaimedTask, RawGetTasksResponse

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
    waited_ms = round(RECORD_SECONDS_MAX * 1000)
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


async def from_log(store: Inflight, once: int, often: int = 0, expires_ms: int | None = None) -> None:
    """So many tasks of each kind, in namespaces of their own."""
    source = store.source("tasks", 0)
    kinds = [("once", n) for n in range(once)] + [("often", n) for n in range(often)]
    rows = [
        activation(
            f"{kind} {n}",
            store.clock,  # type: ignore[arg-type]
            namespace=kind,
            at_most_once=kind == "once",
            expires_ms=expires_ms,
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
    for _ in range(3):
        await asyncio.sleep(0)
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


@pytest.mark.parametrize("why", ["its worker is not heard of again", "the ledger does not take it"])
async def test_at_most_once_claims_that_are_not_handed_out_go_back(
    store: Inflight, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    store.limits = replace(store.limits, lease_ms=30)
    monkeypatch.setattr(waiting_module, "ANSWER_SECONDS_MAX", 0)
    if why == "the ledger does not take it":
        monkeypatch.setattr(waiting_module, "RECORD_SECONDS_MAX", 0)
    waiting, ledger = Waiting(store, 1 << 20), SlowLedger(store)
    await from_log(store, once=2)
    assert await waiting.wait(ANY, 2, 0, "w") == []
    if why == "its worker is not heard of again":
        await ledger.under_way()
        ledger.write()
        await asyncio.sleep(0.001)
        store.clock.advance(31)  # type: ignore[attr-defined]
    while store.memory.counts[1][Status.PENDING] < 2:
        await asyncio.sleep(0.001)
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


async def test_claims_that_go_back_have_their_places_again(store: Inflight) -> None:
    await insert(store, *"abcdefg")
    first, second = store.claim(None, (), 2, 1 << 20), store.claim(None, (), 2, 1 << 20)
    store.release(first[1:])
    await settle_down(store)
    store.release(reversed(second))
    await settle_down(store)
    check_store(store)
    await insert(store, "h")
    assert [row.id for row in store.claim(None, (), 9, 1 << 20)] == list("bcdefgh")
    await settle_down(store)
    check_store(store)


async def test_recorded_claims_are_for_whoever_asks_next_for_their_namespace(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await with_two_recorded_after_a_call(store, monkeypatch)
    await insert(store, "a", namespace="often")
    assert ids(await waiting.wait(Wanted("shop", ("often",)), 1, 0, "other")) == ["a"]
    rows = await waiting.wait(Wanted("shop", ("once", "often")), 1, 0, "another")
    assert [(row.id, row.worker) for row in rows] == [("once 0", "another")]
    assert [row.lease_until for row in rows] == [store.clock.mono_ms() + store.limits.lease_ms]
    assert ids(await waiting.wait(Wanted("shop", ()), 2, 0, "w")) == ["once 1"]
    waiting.close()


async def test_recorded_claims_of_several_namespaces_are_handed_out_in_turn(store: Inflight) -> None:
    waiting = Waiting(store, 1 << 20)
    for namespace in ("pay", "mail"):
        rows = [
            activation(f"{namespace} {n}", store.clock, namespace=namespace, at_most_once=True)  # type: ignore[arg-type]
            for n in range(2)
        ]
        store.insert(rows)
    await settle_down(store)
    gone = asyncio.create_task(waiting.wait(ANY, 4, 30, "w"))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    await settle_down(store)
    for _ in range(3):
        await asyncio.sleep(0)
    asked = [await waiting.wait(ANY, 1, 0, "w") for _ in range(4)]
    assert [row.id for rows in asked for row in rows] == ["pay 0", "mail 0", "pay 1", "mail 1"]
    waiting.close()


async def test_whoever_gave_an_at_most_once_task_back_is_not_handed_it_when_it_is_recorded(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await with_two_recorded_after_a_call(store, monkeypatch)
    for seq in list(store.memory.resident)[:1]:
        store.refusals.add(seq, "old", store.clock.mono_ms())
    assert ids(await waiting.wait(ANY, 2, 0, "old")) == ["once 1"]
    assert ids(await waiting.wait(ANY, 2, 0, "new")) == ["once 0"]
    waiting.close()


async def test_recorded_claims_go_to_those_who_wait(store: Inflight) -> None:
    waiting, ledger = Waiting(store, 1 << 20), SlowLedger(store)
    await from_log(store, once=2)
    gone = asyncio.create_task(waiting.wait(ANY, 2, 30, "gone"))
    await ledger.under_way()
    waits = asyncio.create_task(waiting.wait(ANY, 2, 30, "waits"))
    await asyncio.sleep(0)
    gone.cancel()
    ledger.write()
    assert ids(await waits) == ["once 0", "once 1"]
    waiting.close()


@pytest.mark.parametrize("when", ["recording", "recorded"])
@pytest.mark.parametrize("why", ["paused", "drained", "expired", "cancelled"])
async def test_at_most_once_tasks_that_must_not_start_any_more_do_not(
    store: Inflight, when: str, why: str
) -> None:
    waiting, ledger = Waiting(store, 1 << 20), SlowLedger(store)
    await from_log(store, once=2, expires_ms=1_000)
    wanted = Wanted("shop", ("once",))
    poll = asyncio.create_task(waiting.wait(wanted, 2, 30, "w"))
    await ledger.under_way()
    if when == "recorded":
        poll.cancel()
        ledger.write()
        for _ in range(3):
            await asyncio.sleep(0)
        assert store.memory.counts[1][Status.PROCESSING] == 2
    if why == "paused":
        assert store.control.pause(store.memory.index.pairs[1])
    elif why == "drained":
        store.claiming = False
        store.watch_disk()  # a commit
    elif why == "cancelled":
        for id in ("once 0", "once 1"):
            store.control.cancel(hash_id(id))
    else:
        store.clock.advance(1_000)  # type: ignore[attr-defined]
    await settle_down(store)
    if when == "recording":
        ledger.write()
        for _ in range(3):
            await asyncio.sleep(0)
    await settle_down(store)
    if why in ("paused", "drained"):
        assert store.memory.counts[1][Status.PENDING] == 2
    ask = asyncio.create_task(waiting.wait(wanted, 2, 0, "v"))
    await asyncio.sleep(0)
    await settle_down(store)
    waiting.close()
    assert await ask == []
    if when == "recording":
        assert await poll == []
    await settle_down(store)
    check_store(store)
    counts = store.memory.counts[1]
    ended = {"paused": 0, "drained": 0, "expired": counts[Status.FORWARDING], "cancelled": 2 - sum(counts)}
    assert counts[Status.PENDING] == 2 - ended[why]
    assert ended[why] == (2 if why in ("expired", "cancelled") else 0)


async def test_who_waits_for_the_ledger_is_not_asked_one_by_one_at_each_commit(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Waiting(store, 1 << 20)
    SlowLedger(store)
    await from_log(store, once=40)
    polls = [asyncio.create_task(waiting.wait(ANY, 2, 30, f"w{n}")) for n in range(10)]
    await asyncio.sleep(0)
    await settle_down(store)
    asking: list[str] = []
    claim = store.claim

    def counted(*asked: Any) -> list[Activation]:
        asking.append(asked[4])
        return claim(*asked)

    monkeypatch.setattr(store, "claim", counted)
    store.insert([activation("a", store.clock)])  # type: ignore[arg-type]
    await store.writer.tick()
    # One is handed it, and one finds that all else is for those who may claim more.
    assert asking == ["w0", "w1"]
    waiting.close()
    assert sorted(map(len, await asyncio.gather(*polls))) == [0] * 9 + [1]


# -- busy workers

SLOTS, TASK_SECONDS, RECORD_SECONDS = 2, 48.0, 0.4


class BusyWorker:
    """Its slots ask for one task at a time, one after the other; it says what it holds every 5 s."""

    def __init__(self, name: str, store: Inflight, consumers: Consumers, started: list[str]) -> None:
        self.name = name
        self.store = store
        self.consumers = consumers
        self.started = started
        self.held: list[bytes] = []
        self.asking = asyncio.Lock()

    async def run(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            heart = asyncio.create_task(self.beat())
            for slot in range(SLOTS):
                group.create_task(self.work(slot * TASK_SECONDS / SLOTS, until))
        heart.cancel()

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(5)
            held = [HeldClaim(claim_token=token, started=True) for token in self.held]
            request = ExtendClaimsRequest(claims=held, worker_id=self.name)
            await self.consumers.extend_claims(request.SerializeToString())

    async def work(self, begin: float, until: float) -> None:
        asked = GetTasksRequest(
            max_tasks=1, wait_ms=1000, application="shop", worker=WorkerIdentity(worker_id=self.name)
        )
        await asyncio.sleep(begin)
        while asyncio.get_running_loop().time() < until:
            async with self.asking:
                answer = RawGetTasksResponse.FromString(
                    await self.consumers.get_tasks(asked.SerializeToString())
                )
            for task in answer.tasks:
                await self.execute(task)

    async def execute(self, task: RawClaimedTask) -> None:
        token = task.claim_token
        self.started.append(TaskActivation.FromString(task.activation).id)
        self.held.append(token)
        await asyncio.sleep(TASK_SECONDS)
        self.held.remove(token)
        report = SetTaskStatusesRequest()
        report.outcomes.add(claim_token=token, status=TASK_OUTCOME_STATUS_COMPLETE)
        answer = await self.consumers.set_task_statuses(report.SerializeToString())
        assert SetTaskStatusesResponse.FromString(answer).answers == [OUTCOME_ANSWER_APPLIED]


async def start_with_busy_workers(
    path: Path, workers: int, namespaces: tuple[str, ...], *, from_log: bool
) -> list[str]:
    """What workers start, all of whose slots are taken for longer than a lease, in twenty minutes."""
    loop = asyncio.get_running_loop()
    store = open_store(path, LoopClock(loop))
    writer, upkeep = asyncio.create_task(store.writer.run()), asyncio.create_task(Upkeep(store).run())

    async def recorded() -> None:
        await store.committed()
        await asyncio.sleep(RECORD_SECONDS)

    store.recorded = recorded
    waiting = Waiting(store, 1 << 20)
    consumers = Consumers(store, waiting)
    source = store.source("tasks", 0)
    kinds = [(namespace, n) for n in range(100) for namespace in namespaces]
    if len(namespaces) == 1:
        kinds = [(kind, n) for n in range(100) for kind in ("once", "often")]
    rows = [
        activation(
            id := f"{kind} {n:02}",
            store.clock,  # type: ignore[arg-type]
            namespace=kind if kind in namespaces else namespaces[0],
            body=task_bytes(id),
            at_most_once=kind.startswith("once"),
            source=source.id if from_log else 0,
            offset=offset if from_log else -1,
        )
        for offset, (kind, n) in enumerate(kinds)
    ]
    for row in rows:
        row.deadline_ms = 60_000
    store.cover(source, len(rows))
    await store.insert(rows, {source.id: len(rows)} if from_log else {})
    started: list[str] = []
    async with asyncio.TaskGroup() as group:
        for n in range(workers):
            group.create_task(BusyWorker(f"w{n}", store, consumers, started).run(1200))
    waiting.close()
    store.writer.stop()
    await writer
    upkeep.cancel()
    check_store(store)
    # What was promised and not taken is not lost, nor ended.
    assert len(started) == len(rows) - store.memory.rows
    store.database.close()
    return started


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("from_log", [True, False])
@pytest.mark.parametrize("namespaces", [("all",), ("once", "often"), ("once", "once too", "often")])
def test_at_most_once_tasks_have_their_turns_among_others_where_workers_are_busy(
    tmp_path: Path, workers: int, namespaces: tuple[str, ...], from_log: bool
) -> None:
    started = run_virtually(
        start_with_busy_workers(tmp_path / "store.sqlite", workers, namespaces, from_log=from_log)
    )
    assert len(started) >= workers * SLOTS * 24
    assert len(set(started)) == len(started)
    for kind in ("once", "often") if len(namespaces) == 1 else namespaces:
        of_kind = [int(number) for name, _, number in (id.rpartition(" ") for id in started) if name == kind]
        # Who cannot start one at once starts an ordinary one meanwhile.
        assert len(of_kind) >= len(started) // (2 * max(2, len(namespaces)) - 1) - workers, kind
        # A slot has at most one that was promised it: none overtakes many.
        assert all(abs(at - number) <= workers * SLOTS for at, number in enumerate(of_kind)), of_kind
