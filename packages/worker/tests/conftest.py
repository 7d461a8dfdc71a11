from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from memory_broker import MemoryBroker


@pytest.fixture
async def broker() -> AsyncIterator[MemoryBroker]:
    broker = MemoryBroker()
    await broker.start()
    yield broker
    await broker.stop()
