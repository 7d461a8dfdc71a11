"""What a worker is handed, and told, while the ledger has not acknowledged what it depends on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from store_helpers import ManualClock, activation, open_store, settle_down

from penstock_broker.dispatch import waiting
from penstock_broker.dispatch.service import Consumers
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.writer import StoreStopped
from penstock_protocol.v1 import consumer_pb2, raw_pb2

REQUEST = consumer_pb2.GetTasksRequest(max_tasks=10).SerializeToString()


async def with_rows(folder: Path, *, from_log: bool, at_most_once: bool) -> Inflight:
    clock = ManualClock()
    store = open_store(folder / "store.sqlite", clock)
    row = activation("one", clock, at_most_once=at_most_once)
    if from_log:
        source = store.source("tasks", 0)
        row.source, row.offset = source.id, 0
        store.insert([row], {source.id: 1})
        await settle_down(store)
        store.cover(source, 1)
    else:
        store.insert([row])
    await settle_down(store)
    return store


async def ask(store: Inflight) -> asyncio.Task[bytes]:
    call = asyncio.create_task(Consumers(store, Waiting(store, 1 << 20)).get_tasks(REQUEST))
    for _ in range(10):
        await asyncio.sleep(0)
        await settle_down(store)
    return call


def handed_out(answer: bytes) -> int:
    return len(raw_pb2.RawGetTasksResponse.FromString(answer).tasks)


@pytest.mark.parametrize(
    ("from_log", "at_most_once", "waits"), [(True, True, True), (True, False, False), (False, True, False)]
)
async def test_an_at_most_once_task_is_handed_out_when_it_is_recorded(
    tmp_path: Path, from_log: bool, at_most_once: bool, waits: bool
) -> None:
    store = await with_rows(tmp_path, from_log=from_log, at_most_once=at_most_once)
    recorded = asyncio.Event()

    async def wait_for_it() -> None:
        await recorded.wait()

    store.recorded = wait_for_it
    call = await ask(store)
    assert call.done() is not waits
    recorded.set()
    assert handed_out(await call) == 1


async def test_a_claim_that_is_not_recorded_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await with_rows(tmp_path, from_log=True, at_most_once=True)
    monkeypatch.setattr(waiting, "RECORD_SECONDS_MAX", 0.01)
    monkeypatch.setattr(waiting, "ANSWER_SECONDS_MAX", 0.1)
    store.recorded = asyncio.Event().wait  # type: ignore[assignment]
    assert handed_out(await (await ask(store))) == 0
    await settle_down(store)
    assert [row.id for row in store.claim(None, (), 1, 1 << 20)] == ["one"]


async def test_while_the_ledger_cannot_be_written_none_starts(tmp_path: Path) -> None:
    store = await with_rows(tmp_path, from_log=True, at_most_once=True)
    store.hold_at_most_once(True)
    assert store.claim(None, (), 1, 1 << 20) == []
    store.hold_at_most_once(False)
    assert [row.id for row in store.claim(None, (), 1, 1 << 20)] == ["one"]


async def test_a_broker_whose_tasks_another_one_has_tells_nothing(tmp_path: Path) -> None:
    store = await with_rows(tmp_path, from_log=True, at_most_once=False)
    claimed = raw_pb2.RawGetTasksResponse.FromString(await (await ask(store))).tasks
    report = consumer_pb2.SetTaskStatusesRequest()
    report.outcomes.add(claim_token=claimed[0].claim_token, status=consumer_pb2.TASK_OUTCOME_STATUS_COMPLETE)
    consumers = Consumers(store, Waiting(store, 1 << 20))
    under_way = asyncio.create_task(consumers.set_task_statuses(report.SerializeToString()))
    await asyncio.sleep(0)
    store.writer.refuse()
    await settle_down(store)
    for call in (under_way, consumers.set_task_statuses(report.SerializeToString())):
        with pytest.raises(StoreStopped):
            await call
