"""A crash after any write or sync: all that was acknowledged is there, nothing that was finished is back.

CI takes a sample of the crash points. All of them, with other seeds: PENSTOCK_CRASH_SEEDS=N.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from crash_disk import HOWS, CrashDisk, CrashPoint, abandon, crash_points
from crash_workload import CHECKPOINT_BYTES, LIMITS, Promises, Workload
from store_helpers import ManualClock, open_store

SEEDS = int(os.environ.get("PENSTOCK_CRASH_SEEDS", "0"))
STEPS = 60


async def run_workload(path: Path, seed: int, disk: CrashDisk) -> None:
    """A broker's life on ``disk``, ended by a crash at its end."""
    clock = ManualClock()
    with disk.mounted():
        store = open_store(path, clock, LIMITS)
        if seed % 2:
            store.database.lay_out_log(CHECKPOINT_BYTES)
    store.database.checkpoint_bytes = CHECKPOINT_BYTES
    await Workload(store, clock, disk, random.Random(seed)).run(STEPS)
    disk.kill()
    abandon(store.database)


async def check_image(path: Path, files: dict[str, bytes], promises: Promises, drain: bool = True) -> None:
    disk = CrashDisk(files)
    clock = ManualClock()
    clock.wall = max(clock.wall, promises.wall)
    with disk.mounted():
        store = open_store(path, clock, LIMITS)
    await promises.check(store, clock, drain)
    disk.kill()
    abandon(store.database)


def promised(point: CrashPoint) -> Promises:
    promises = Promises()
    promises.learn(point.marks)
    return promises


async def crash_everywhere(path: Path, seed: int, share: float) -> int:
    disk = CrashDisk(journal=True)
    await run_workload(path, seed, disk)
    rng = random.Random(seed)
    checked = 0
    for point in crash_points(disk.journal):
        for how in HOWS:
            if rng.random() < share:
                files = point.contents.image(rng, how)
                try:
                    await check_image(path, files, promised(point), drain=rng.random() < 0.3)
                except BaseException as error:
                    error.add_note(f"seed {seed}, crash after change {point.number}, unsynced writes: {how}")
                    raise
                checked += 1
    return checked


@pytest.mark.parametrize("seed", range(SEEDS or 3))
async def test_a_crash_after_any_write_loses_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    checked = await crash_everywhere(tmp_path / "store.sqlite", seed, share=1 if SEEDS else 0.15)
    assert checked > 100


async def test_a_sync_that_lies_is_caught(tmp_path: Path) -> None:
    """A disk that loses what it said was synced breaks the promises, and these tests see it."""
    path = tmp_path / "store.sqlite"
    disk = CrashDisk(journal=True)
    clock = ManualClock()
    with disk.mounted():
        store = open_store(path, clock, LIMITS)
    workload = Workload(store, clock, disk, random.Random(1))
    await workload.run(20)
    disk.lies = True
    await workload.run(20)
    disk.kill()
    abandon(store.database)
    *_, last = crash_points(disk.journal)
    with pytest.raises(AssertionError, match=r"acknowledged|next offset|not there|epoch"):
        await check_image(path, last.contents.image(random.Random(1), "drop"), promised(last))
