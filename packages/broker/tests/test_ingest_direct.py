"""Sending straight to the broker: durable when answered, and every answer is true."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest
from ingest_helpers import running_store, task_bytes

from penstock_broker.domain.lifecycle import Limits
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.direct import Direct, IntakePaused, InvalidRequest
from penstock_broker.store.database import Database, DiskFailing
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_protocol.v1 import producer_pb2
from penstock_protocol.v1.raw_pb2 import RawSendTasksRequest

ACCEPTED = producer_pb2.SEND_RESULT_ACCEPTED
DUPLICATE = producer_pb2.SEND_RESULT_DUPLICATE
REJECTED = producer_pb2.SEND_RESULT_REJECTED


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Inflight]:
    async with running_store(tmp_path / "store.sqlite", StoreLimits(rows_max=20)) as store:
        yield store


async def send(store: Inflight, *values: bytes) -> list[producer_pb2.SendAnswer]:
    direct = Direct(store, Admission(AdmissionLimits()))
    answer = await direct.send(RawSendTasksRequest(activations=values).SerializeToString())
    return list(producer_pb2.SendTasksResponse.FromString(answer).answers)


def stored_ids(store: Inflight) -> list[str]:
    """What the file holds now: what a broker would find after this one was killed."""
    original = store.database.path
    copy = original.with_name("copy.sqlite")
    for suffix in ("", "-wal"):
        shutil.copy(f"{original}{suffix}", f"{copy}{suffix}")
    database = Database(copy, Limits(), 0)
    try:
        return sorted(row.id for row in database.load([key[0] for key in database.positions()]))
    finally:
        database.close()
        for suffix in ("", "-wal"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)


async def test_what_is_accepted_is_in_the_file_when_answered(store: Inflight) -> None:
    answers = await send(store, task_bytes("a"), task_bytes("b", delay=3600))
    assert [answer.result for answer in answers] == [ACCEPTED, ACCEPTED]
    assert stored_ids(store) == ["a", "b"]


async def test_each_answer_is_its_own(store: Inflight) -> None:
    await send(store, task_bytes("old"))
    answers = await send(
        store, task_bytes("new"), b"{}", task_bytes("old"), task_bytes("new"), task_bytes("")
    )
    assert [a.result for a in answers] == [ACCEPTED, REJECTED, DUPLICATE, DUPLICATE, REJECTED]
    assert answers[1].reason == (
        "not_an_activation: the message looks like JSON; a serialized TaskActivation is expected"
    )
    assert answers[4].reason == "invalid: the TaskActivation has no id"
    assert stored_ids(store) == ["new", "old"]


async def test_an_id_taken_for_something_else_is_rejected(store: Inflight) -> None:
    await send(store, task_bytes("a", parameters_bytes=b"1"))
    answers = await send(
        store,
        task_bytes("a", parameters_bytes=b"2"),
        task_bytes("a", parameters_bytes=b"1", delay=3),
        task_bytes("b", taskname="one"),
        task_bytes("b", taskname="other"),
    )
    assert [a.result for a in answers] == [REJECTED, DUPLICATE, ACCEPTED, REJECTED]
    assert answers[0].reason.startswith("conflict: the id a belongs to another task already")
    assert stored_ids(store) == ["a", "b"]


async def test_a_duplicate_is_answered_once_its_first_copy_is_durable(store: Inflight) -> None:
    first = asyncio.create_task(send(store, task_bytes("a")))
    second = asyncio.create_task(send(store, task_bytes("a")))
    (answer,) = await second
    assert answer.result == DUPLICATE
    assert stored_ids(store) == ["a"]
    await first


async def test_nothing_to_send_is_answered(store: Inflight) -> None:
    assert await send(store) == []


async def test_no_room_for_all_stores_nothing_and_names_the_limit(store: Inflight) -> None:
    await send(store, *(task_bytes(f"{n}") for n in range(18)))
    with pytest.raises(IntakePaused, match=r"3 more activations, only for 2: .* max_pending_count"):
        await send(store, *(task_bytes(f"more-{n}") for n in range(3)))
    assert len(stored_ids(store)) == 18
    assert [a.result for a in await send(store, task_bytes("x"), task_bytes("y"))] == [ACCEPTED, ACCEPTED]
    with pytest.raises(IntakePaused, match="only for 0"):
        await send(store, task_bytes("z"))
    assert [a.result for a in await send(store, task_bytes("x"))] == [DUPLICATE]


async def test_bytes_that_are_no_request(store: Inflight) -> None:
    with pytest.raises(InvalidRequest, match="no SendTasksRequest"):
        await Direct(store, Admission(AdmissionLimits())).send(b"\x0a\xff")


async def test_while_the_disk_fails_a_send_is_told_so_and_leaves_nothing_behind(store: Inflight) -> None:
    store.writer.trouble = DiskFailing(apsw.IOError())
    with pytest.raises((DiskFailing, IntakePaused)) as refused:
        await send(store, task_bytes("a"))
    store.writer.trouble = None
    assert refused.type is DiskFailing, "the limit that is reached is none"
    assert [a.result for a in await send(store, task_bytes("a"))] == [ACCEPTED]
