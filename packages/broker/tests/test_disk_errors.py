"""Every I/O call failing once, or for good; the disk full at any byte. Nothing acknowledged is lost, what
can recover does, and after a failed sync nothing is acknowledged at all.

CI takes a sample of the calls. All of them, with other seeds: PENSTOCK_CRASH_SEEDS=N.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from pathlib import Path

import pytest
from crash_disk import Call, CrashDisk, Failing, Mark, abandon, disk_full, io_error
from crash_workload import CHECKPOINT_BYTES, LIMITS, TOPIC, Promises, Workload
from store_helpers import ManualClock, activation, open_store, settle_down

from penstock_broker.errors import FatalError
from penstock_broker.store import database, writer
from penstock_broker.store.database import DiskFailing

SEEDS = int(os.environ.get("PENSTOCK_CRASH_SEEDS", "0"))
STEPS = 40
# The sample of CI: every so many calls.
STRIDE = 1 if SEEDS else 23


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RETRY_SECONDS_MIN", 0.0)


class Life:
    """A broker's life on a disk that fails somewhere in it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.clock = ManualClock()
        self.disk = CrashDisk(journal=True)
        with self.disk.mounted():
            self.store = open_store(path, self.clock, LIMITS)
        self.store.database.checkpoint_bytes = CHECKPOINT_BYTES
        self.workload = Workload(self.store, self.clock, self.disk, random.Random(seed))

    async def check(self, how: str = "drop") -> None:
        """After a power cut everything acknowledged is there."""
        promises = Promises()
        promises.learn(entry.thing for entry in self.disk.journal if isinstance(entry, Mark))
        self.disk.before = lambda call: None
        self.disk.capacity = None
        self.disk.power_cut(random.Random(1), how)
        abandon(self.store.database)
        with self.disk.mounted():
            store = open_store(self.path, self.clock, LIMITS)
        await promises.check(store, self.clock)
        self.disk.kill()
        abandon(store.database)

    def end(self) -> None:
        self.disk.kill()
        abandon(self.store.database)


async def calls_of(path: Path, seed: int, kinds: tuple[str, ...]) -> int:
    """How many calls of these kinds the workload makes when nothing fails."""
    life, made = Life(path, seed), 0

    def count(call: Call) -> None:
        nonlocal made
        made += call.kind in kinds

    life.disk.before = count
    await life.workload.run(STEPS)
    life.end()
    return made


@pytest.mark.parametrize("seed", range(SEEDS or 1))
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("error", ["io error", "full"])
async def test_a_call_that_fails_and_then_works_again_loses_nothing(
    tmp_path: Path, seed: int, times: int, error: str
) -> None:
    path, kinds = tmp_path / "store.sqlite", ("read", "write", "truncate")
    calls = await calls_of(path, seed, kinds)
    assert calls > 200
    for at in range(0, calls, STRIDE):
        life = Life(path, seed)
        failing = Failing(kinds, at, io_error if error == "io error" else lambda call: disk_full(), times)
        life.disk.before = failing
        await life.workload.run(STEPS)
        assert failing.failed
        await life.check()


@pytest.mark.parametrize("seed", range(SEEDS or 1))
@pytest.mark.parametrize("how", ["drop", "keep"])
async def test_nothing_is_acknowledged_after_a_sync_that_failed(tmp_path: Path, seed: int, how: str) -> None:
    path = tmp_path / "store.sqlite"
    for at in range(0, await calls_of(path, seed, ("sync",)), max(1, STRIDE // 8)):
        life = Life(path, seed)
        life.disk.before = Failing(("sync",), at)
        with pytest.raises(FatalError, match=r"fsync failed.*nothing after that was acknowledged"):
            await life.workload.run(STEPS)
        told = len(life.disk.journal)
        stored = pytest.raises(Exception, match="the store has stopped")
        with stored:
            await life.store.insert([activation("later", life.clock)])
        with stored:
            await life.store.committed()
        assert not [entry for entry in life.disk.journal[told:] if isinstance(entry, Mark)]
        await life.check(how)


@pytest.mark.parametrize("seed", range(SEEDS or 1))
async def test_a_disk_that_is_full_at_any_byte_loses_nothing_and_is_used_again(
    tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "store.sqlite"
    life = Life(path, seed)
    empty = life.disk.contents.size()
    await life.workload.run(STEPS)
    full = life.disk.contents.size()
    life.end()
    filled = 0
    for capacity in range(empty, full, STRIDE * 211):
        life = Life(path, seed)
        life.disk.capacity = capacity

        def free_some(disk: CrashDisk = life.disk) -> None:
            nonlocal filled
            filled += 1
            assert disk.capacity is not None
            disk.capacity += 100_000

        life.store.writer.on_trouble.append(free_some)
        await life.workload.run(STEPS)
        await life.check()
    assert filled > 20


async def test_while_the_disk_fails_calls_are_refused_and_then_it_recovers_by_itself(tmp_path: Path) -> None:
    life = Life(tmp_path / "store.sqlite", 1)
    store, clock = life.store, life.clock
    await insert(store, [activation(f"before-{i}", clock) for i in range(2)])
    running = asyncio.create_task(store.writer.run())
    life.disk.before = Failing(("write",), 0, times=None)
    stored = store.insert([activation("meanwhile", clock)])
    with pytest.raises(DiskFailing):
        await store.answerable(store.committed())
    assert store.room() == 0
    assert store.intake_state() == ("PAUSED", "disk")
    assert store.claim(None, (), 10, 1 << 20) == []
    with pytest.raises(DiskFailing):
        store.require_disk()
    with pytest.raises(DiskFailing):
        await store.answerable(store.committed())
    assert not stored.done()
    life.disk.before = lambda call: None
    await stored
    assert store.intake_state() == ("OPEN", "")
    assert len(store.claim(None, (), 10, 1 << 20)) == 3
    store.writer.stop()
    await running
    life.end()


async def test_a_log_that_cannot_be_copied_back_has_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is the database's own file, and nothing else."""
    late = 8 * CHECKPOINT_BYTES
    monkeypatch.setattr(database, "WAL_BYTES_LATE", late)
    life = Life(tmp_path / "store.sqlite", 1)
    store = life.store

    def fails(call: Call) -> None:
        if call.kind == "write" and call.path == str(life.path):
            raise io_error(call)

    life.disk.before = fails
    running = asyncio.create_task(store.writer.run())
    written = 0
    while store.writer.trouble is None and written < 2 * late:
        store.insert([activation(f"{written}", life.clock, body=os.urandom(4000))])
        written += 4000
        with contextlib.suppress(DiskFailing):
            await store.answerable(store.committed())
    assert store.writer.trouble is not None
    assert late < life.disk.contents.size() < 2 * late
    life.disk.before = lambda call: None
    await store.committed()
    assert store.memory.rows * 4000 == written
    store.writer.stop()
    await running
    life.end()


async def test_a_broker_that_is_told_to_stop_does_not_wait_for_its_disk(tmp_path: Path) -> None:
    life = Life(tmp_path / "store.sqlite", 1)
    running = asyncio.create_task(life.store.writer.run())
    life.disk.before = Failing(("write",), 0, times=None)
    stored = life.store.insert([activation("a", life.clock)])
    with pytest.raises(DiskFailing):
        await life.store.answerable(life.store.committed())
    life.store.writer.stop()
    with pytest.raises(DiskFailing):
        await running
    with pytest.raises(Exception, match="the store has stopped"):
        await stored
    life.end()


async def insert(store, rows):
    stored = store.insert(rows)
    await settle_down(store)
    await stored


@pytest.mark.parametrize("seed", range(SEEDS or 1))
async def test_after_a_failed_sync_a_restart_believes_nothing_that_only_the_cache_holds(
    tmp_path: Path, seed: int
) -> None:
    """The kernel shows what it could not write to the next process, too; a power cut then shows the disk."""
    path = tmp_path / "store.sqlite"
    for at in range(0, await calls_of(path, seed, ("sync",)), max(1, STRIDE // 4)):
        life = Life(path, seed)
        life.disk.before = Failing(("sync",), at)
        with pytest.raises(FatalError, match="fsync failed"):
            await life.workload.run(STEPS)
        life.disk.before = lambda call: None
        life.disk.kill()
        abandon(life.store.database)
        with life.disk.mounted():
            life.store = open_store(path, life.clock, LIMITS)
        again = Workload(life.store, life.clock, life.disk, random.Random(seed + 1))
        again.ids, again.offset = 10_000, max(0, life.store.source(TOPIC, 0).next)
        await again.run(10)
        await life.check()


async def test_a_broker_that_stops_on_a_failing_disk_lets_go_of_its_database(tmp_path: Path) -> None:
    life = Life(tmp_path / "broker.sqlite", 1)
    await insert(life.store, [activation("t1", life.clock)])
    life.disk.before = Failing(("write", "truncate", "delete"), 0, times=None)
    life.store.database.close()
    life.disk.before = lambda call: None
    with life.disk.mounted():
        store = open_store(life.path, life.clock, LIMITS)
    assert store.memory.rows == 1
    store.database.close()
