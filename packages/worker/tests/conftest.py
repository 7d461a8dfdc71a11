from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from memory_broker import MemoryBroker

from penstock_worker.settings import Settings
from penstock_worker.worker import Worker

RunWorker = Callable[..., AbstractAsyncContextManager[Worker]]


@pytest.fixture
async def broker() -> AsyncIterator[MemoryBroker]:
    broker = MemoryBroker()
    await broker.start()
    yield broker
    await broker.stop()


@pytest.fixture
def run_worker(monkeypatch: pytest.MonkeyPatch) -> RunWorker:
    """A worker in this process, its children real: `async with run_worker(broker, slots=2)`."""
    # Children import from the current directory.
    monkeypatch.chdir(Path(__file__).parent)

    @asynccontextmanager
    async def run(*brokers: MemoryBroker, slots: int = 1, **settings: object) -> AsyncIterator[Worker]:
        addresses = tuple(broker.address for broker in brokers)
        worker = Worker(Settings("worker_tasks:app", addresses, slots, **settings))  # type: ignore[arg-type]
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await running

    return run
