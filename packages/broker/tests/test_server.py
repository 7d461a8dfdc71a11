"""A whole broker, without Kafka: what it answers when it stops, and what it says of its health."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import apsw
import grpc
import pytest
from ingest_helpers import until

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.dispatch import rpc
from penstock_broker.server import Broker
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.database import DiskFailing
from penstock_broker.store.writer import TICK_MS_MAX
from penstock_protocol.v1 import consumer_pb2 as pb


@pytest.fixture
async def broker(tmp_path: Path) -> Broker:
    settings = Settings(ingest="grpc", db_path=tmp_path / "store.sqlite", grpc_port=0, metrics_port=0)
    broker = Broker(settings, SystemClock())
    await broker.start()
    return broker


async def test_polls_are_answered_empty_when_the_broker_stops(broker: Broker) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{broker.port}") as channel:
        get_tasks: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/{rpc.CONSUMER}/GetTasks"
        )
        poll = get_tasks(pb.GetTasksRequest(wait_ms=60_000).SerializeToString())
        await until(lambda: len(broker.waiting))
        await broker.stop()
        assert await poll.code() is grpc.StatusCode.OK
        assert not pb.GetTasksResponse.FromString(await poll).tasks


async def test_health_is_that_of_the_disk_and_of_the_parts(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert broker.healthy()
    broker.store.writer.trouble = DiskFailing(apsw.IOError("it fails"))
    assert not broker.healthy()
    broker.store.writer.trouble = None
    assert broker.healthy()
    writing, write = threading.Event(), broker.database.write

    def hang(batch: Batch) -> Written:
        loop.call_soon_threadsafe(begun.set)
        writing.wait()
        return write(batch)

    loop, begun, clock = asyncio.get_running_loop(), asyncio.Event(), broker.store.clock
    monkeypatch.setattr(broker.database, "write", hang)
    meta = broker.store.set_meta("test", 1)
    await begun.wait()
    assert broker.healthy()
    now = clock.mono_ms()
    with monkeypatch.context() as later:
        later.setattr(clock, "mono_ms", lambda: now + TICK_MS_MAX + 1)
        assert not broker.healthy()
        writing.set()
        await meta
        assert broker.healthy()
    broker._tasks["upkeep"].cancel()
    await asyncio.wait([broker._tasks["upkeep"]])
    assert not broker.healthy()
    await broker.stop()
    assert not broker.healthy()
