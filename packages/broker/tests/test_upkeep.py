"""What time moves, and what it must not."""

from __future__ import annotations

import asyncio
from pathlib import Path

from store_helpers import ManualClock, activation, open_store, settle_down

from penstock_broker.domain.activation import Status
from penstock_broker.upkeep.chores import Upkeep

BYTES = 1 << 20


async def test_what_is_due_since_long_is_not_taken_for_a_standstill(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "store.sqlite", clock)
    store.insert([activation("vanished", clock, expires_ms=1000)])
    await settle_down(store)
    store.claim(None, (), 1, BYTES)
    await settle_down(store)
    clock.advance(store.limits.lease_ms + 1000)
    store.insert([activation("held", clock)])
    await settle_down(store)
    (held,) = store.claim(None, (), 1, BYTES)
    lease_until = held.lease_until

    upkeep = asyncio.create_task(Upkeep(store).run())
    # The lease of the one is over, and so, since long, is its expiry: it leaves.
    while not store.memory.counts[1][Status.FORWARDING]:
        await asyncio.sleep(0)
        await settle_down(store)
    for _ in range(10):
        await asyncio.sleep(0)
    upkeep.cancel()
    assert held.lease_until == lease_until
    store.database.close()
