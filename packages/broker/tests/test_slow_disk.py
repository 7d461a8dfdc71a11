"""A slow disk, and the length of the write-ahead log."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apsw
from crash_disk import Call, CrashDisk, abandon
from store_helpers import ManualClock, activation, open_store, settle_down, token_of

from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.batch import Answer, Batch, Written
from penstock_broker.store.database import WAL_BYTES_MAX, Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits

BYTES = 1 << 30


class SlowSyncs:
    """Each sync waits until the test lets it go."""

    def __init__(self) -> None:
        self.count = 0
        self.begun = threading.Event()
        self._go = threading.Event()

    def __call__(self, call: Call) -> None:
        if call.kind == "sync":
            self.count += 1
            self.begun.set()
            self._go.wait()

    def let_go(self) -> None:
        self._go.set()

    def hold(self) -> None:
        self.begun.clear()
        self._go.clear()


async def test_on_a_slow_disk_a_tick_takes_all_that_waits_and_claims_keep_their_leases(
    tmp_path: Path,
) -> None:
    clock, disk = ManualClock(), CrashDisk()
    with disk.mounted():
        database = Database(tmp_path / "store.sqlite", StoreLimits().lifecycle, clock.wall_ms())
    thread = ThreadPoolExecutor(1)

    async def handoff(write, batch: Batch) -> Written:
        return await asyncio.get_running_loop().run_in_executor(thread, write, batch)

    store = Inflight(database, clock, StoreLimits(), handoff)
    running = asyncio.create_task(store.writer.run())
    await store.insert([activation(f"held-{i}", clock) for i in range(50)])
    held = [token_of(store, row) for row in store.claim(None, (), 50, BYTES)]
    await store.committed()

    syncs = SlowSyncs()
    disk.before = syncs
    first = store.insert([activation("first", clock)])
    await asyncio.to_thread(syncs.begun.wait)
    # The disk stands still for a minute, in which 4,000 more come, each on its own.
    later = [store.insert([activation(f"later-{i}", clock)]) for i in range(4000)]
    for _ in range(12):
        clock.advance(5_000)
        assert all(store.extend(token, started=False) is Answer.APPLIED for token in held)
        assert store.lapse(clock.mono) == 0, "a lease was lost to the disk"
    assert not first.done()
    assert not any(stored.done() for stored in later)
    before = syncs.count
    syncs.let_go()
    await asyncio.gather(first, *later)
    assert syncs.count - before <= 2, "what waited was not written together"
    answers = [store.settle(token, Event.COMPLETE, clock.wall) for token in held]
    await store.committed()
    assert answers == [Answer.APPLIED] * 50
    store.writer.stop()
    await running
    thread.shutdown()
    disk.kill()
    abandon(database)


async def test_the_write_ahead_log_stays_below_64_mib(tmp_path: Path) -> None:
    """With 100 MiB in flight, a long read of the broker's own in between, and after a kill."""
    path, clock = tmp_path / "store.sqlite", ManualClock()
    log = path.with_name(path.name + "-wal")
    lengths: list[int] = []
    store = open_store(path, clock)
    store.writer.on_committed.append(lambda: lengths.append(log.stat().st_size))
    body = os.urandom(1000)
    stored = [
        store.insert([activation(f"t{n}-{i}", clock, body=body) for i in range(1000)]) for n in range(70)
    ]
    # More than a tick should take at once.
    stored.append(store.insert([activation(f"large-{i}", clock, body=bytes(1 << 20)) for i in range(30)]))
    reading = asyncio.ensure_future(store.read(lambda database: len(list(database.positions()))))
    await asyncio.sleep(0)
    await settle_down(store)
    await asyncio.gather(*stored)
    assert await reading >= 0
    for _ in range(10):
        for row in store.claim(None, (), 500, BYTES):
            row.body = None
            store.settle(token_of(store, row), Event.RETRY, clock.wall, 1000)
        await settle_down(store)
    assert 16 << 20 < max(lengths) <= WAL_BYTES_MAX
    kill(store)
    store = open_store(path, clock)
    assert log.stat().st_size <= WAL_BYTES_MAX, "the start wrote too much at once"
    await settle_down(store)
    assert store.memory.rows > 60_000
    store.database.close()


def kill(store: Inflight) -> None:
    """The process dies: nothing is copied back."""
    store.database.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    store.database.connection.close(True)
    store.database.release_lock()
