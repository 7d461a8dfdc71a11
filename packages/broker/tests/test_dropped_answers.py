"""What a worker is told of outcomes whose tasks another broker runs again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from store_helpers import ManualClock, activation, open_store, settle_down

from penstock_broker.dispatch.service import Consumers
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.domain.activation import Activation
from penstock_broker.domain.token import encode_parts
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.partitions import Source
from penstock_protocol.v1 import consumer_pb2

ROWS = 3
BYTES = 1 << 22
STALE = [consumer_pb2.OUTCOME_ANSWER_STALE] * ROWS


async def claimed(folder: Path) -> tuple[Inflight, Source, bytes]:
    """A store with uncovered rows that are claimed, and the report that they are complete."""
    clock = ManualClock()
    store = open_store(folder / "store.sqlite", clock)
    source = store.source("tasks", 0)
    store.insert(
        [activation(str(n), clock, source=source.id, offset=n) for n in range(ROWS)], {source.id: ROWS}
    )
    await settle_down(store)
    rows = store.claim(None, (), ROWS, BYTES)
    await settle_down(store)
    return store, source, report(store, rows)


def report(store: Inflight, rows: Sequence[Activation]) -> bytes:
    request = consumer_pb2.SetTaskStatusesRequest()
    for row in rows:
        token = encode_parts(row.claim_epoch, row.seq, row.id_hash, store.database.nonce, row.claim)
        request.outcomes.add(claim_token=token, status=consumer_pb2.TASK_OUTCOME_STATUS_COMPLETE)
    return request.SerializeToString()


def send(store: Inflight, request: bytes) -> asyncio.Task[bytes]:
    return asyncio.create_task(Consumers(store, Waiting(store, BYTES)).set_task_statuses(request))


async def settle_calls(store: Inflight) -> None:
    """Let calls go on as far as they can without cover."""
    for _ in range(10):
        await settle_down(store)
        await asyncio.sleep(0)


async def answers(call: asyncio.Task[bytes]) -> list[int]:
    return list(consumer_pb2.SetTaskStatusesResponse.FromString(await call).answers)


async def test_a_report_that_waits_for_cover_is_refused_as_a_whole(tmp_path: Path) -> None:
    store, source, request = await claimed(tmp_path)
    call = send(store, request)
    await settle_calls(store)
    assert not call.done()
    store.drop_uncovered(source, 0)
    await settle_calls(store)
    assert await answers(call) == STALE


async def test_a_report_that_is_repeated_too_late_is_refused(tmp_path: Path) -> None:
    store, source, request = await claimed(tmp_path)
    call = send(store, request)
    await settle_calls(store)
    call.cancel()
    store.drop_uncovered(source, 0)
    again = send(store, request)
    await settle_calls(store)
    assert await answers(again) == STALE


async def test_a_report_whose_tick_comes_after_the_drop_is_refused(tmp_path: Path) -> None:
    store, source, request = await claimed(tmp_path)
    call = send(store, request)
    await asyncio.sleep(0)
    store.drop_uncovered(source, 0)
    await settle_calls(store)
    assert await answers(call) == STALE


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_refused_task_runs_again_where_its_partition_comes_back(
    tmp_path: Path, restarted: bool
) -> None:
    store, source, request = await claimed(tmp_path)
    call = send(store, request)
    await settle_calls(store)
    store.drop_uncovered(source, 0)
    await settle_calls(store)
    assert await answers(call) == STALE
    clock = ManualClock()
    if restarted:
        store.database.close()
        store = open_store(tmp_path / "store.sqlite", clock)
        source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(ROWS)]
    store.insert(rows, {source.id: ROWS})
    store.cover(source, ROWS)
    await settle_down(store)
    again = store.claim(None, (), ROWS, BYTES)
    assert [row.id for row in again] == ["0", "1", "2"]
    late = send(store, request)
    await settle_calls(store)
    assert await answers(late) == STALE
    done = send(store, report(store, again))
    await settle_calls(store)
    assert await answers(done) == [consumer_pb2.OUTCOME_ANSWER_APPLIED] * ROWS
