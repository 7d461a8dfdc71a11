"""A small file system of its own that fills up: the intake pauses before, what is in flight goes on."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import apsw
import pytest
from crash_disk import CrashDisk, Failing, abandon
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of

from penstock_broker.domain.activation import Route
from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.batch import Answer
from penstock_broker.store.database import CHECKPOINT_BYTES, REWRITE_BYTES
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.space import Space

SIZE = 96 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", folder], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"this user cannot mount a file system: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def store(small_disk: Path) -> Iterator[Inflight]:
    store = open_store(small_disk / "store.sqlite", ManualClock())
    store.database.space = Space(store.database.path)
    yield store
    store.database.close()


def fill(folder: Path) -> Path:
    """Somebody else takes all that is free."""
    path = folder / "somebody else's"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    assert os.statvfs(folder).f_bavail == 0
    return path


async def insert_until_paused(store: Inflight, clock: ManualClock) -> int:
    count = 0
    while store.room():
        rows = [activation(f"t{count + i}", clock, body=os.urandom(4000)) for i in range(100)]
        count += len(rows)
        stored = store.insert(rows)
        await settle_down(store)
        await stored
    return count


async def finish(store: Inflight, clock: ManualClock, count: int, event: Event) -> int:
    """Claim and settle; how many."""
    done = 0
    while done < count and (rows := store.claim(None, (), min(200, count - done), 1 << 30)):
        for row in rows:
            row.body = None
            assert (
                store.settle(token_of(store, row), event, clock.wall, error=json.dumps("e" * 2000))
                is Answer.APPLIED
            )
        await settle_down(store)
        done += len(rows)
    return done


async def test_the_intake_pauses_before_the_disk_is_full_and_opens_when_there_is_room(
    store: Inflight,
) -> None:
    clock = store.clock
    assert isinstance(clock, ManualClock)
    await insert_until_paused(store, clock)
    assert store.intake_state() == ("PAUSED", "disk")
    space = store.database.space
    assert space is not None
    assert space.path.stat().st_size == space.reserve_bytes, "it paused only when the reserve was needed"
    assert not store.memory.tally.disk_failures
    # Rows that are finished free pages of the database, not of the disk: nothing opens by itself.
    assert await finish(store, clock, 1000, Event.COMPLETE) == 1000
    assert store.intake_state() == ("PAUSED", "disk")


async def test_on_a_full_disk_outcomes_claims_and_dead_letters_go_on_and_then_it_recovers(
    store: Inflight, small_disk: Path
) -> None:
    clock = store.clock
    assert isinstance(clock, ManualClock)
    rows = [activation(f"t{i}", clock, body=os.urandom(1000)) for i in range(5000)]
    stored = store.insert(rows)
    await settle_down(store)
    await stored
    theirs = fill(small_disk)
    assert await finish(store, clock, 2000, Event.COMPLETE) == 2000
    assert store.intake_state() == ("PAUSED", "disk")
    assert store.room() == 0
    assert await finish(store, clock, 2500, Event.FAIL) == 2500
    letters = asyncio.ensure_future(store.outbox.take(Route.DEAD_LETTER, 100, 1 << 22))
    await asyncio.sleep(0)
    await settle_down(store)
    store.outbox.rest(await letters)
    await settle_down(store)
    assert store.outbox.resting == 100
    assert not store.memory.tally.disk_failures, "the reserve did not suffice"
    theirs.unlink()
    store.watch_disk()
    await settle_down(store)
    assert store.intake_state() == ("OPEN", "")
    assert store.database.space is not None
    assert store.database.space.path.exists(), "the reserve was not taken again"
    check_store(store)


async def test_a_start_on_a_full_disk_uses_the_reserve_that_was_left(small_disk: Path) -> None:
    clock = ManualClock()
    path = small_disk / "store.sqlite"
    first = open_store(path, clock)
    first.database.space = space = Space(path)
    await settle_down(first)
    first.watch_disk()
    await settle_down(first)
    assert space.path.exists()
    # Killed: nothing is tidied up.
    first.database.connection.close(True)
    first.database.release_lock()
    fill(small_disk)
    second = open_store(path, clock)
    assert second.epoch == first.epoch + 1
    second.database.close()


async def test_the_log_has_its_length_from_the_start(tmp_path: Path) -> None:
    """A sync that lengthens a file takes the file system half as long again."""
    clock, path = ManualClock(), tmp_path / "store.sqlite"
    log_file = path.with_name("store.sqlite-wal")
    store = open_store(path, clock)
    store.database.watch_space(Space(path))
    length = log_file.stat().st_size
    assert length == CHECKPOINT_BYTES
    for n in range(20):
        store.insert([activation(f"t{n}", clock)])
        await settle_down(store)
    assert log_file.stat().st_size == length
    # Killed: what was written into it is what the next start finds.
    store.database.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    abandon(store.database)
    assert log_file.stat().st_size == length
    again = open_store(path, clock)
    assert again.epoch == store.epoch + 1
    assert again.memory.rows == 20
    await settle_down(again)
    check_store(again)
    again.database.close()


def test_on_a_small_disk_the_log_is_laid_out_in_proportion(small_disk: Path) -> None:
    path = small_disk / "store.sqlite"
    store = open_store(path, ManualClock())
    space = Space(path)
    store.database.watch_space(space)
    assert path.with_name("store.sqlite-wal").stat().st_size == space.reserve_bytes // 6
    store.database.close()


def test_on_a_disk_that_is_nearly_full_the_log_is_not_laid_out(small_disk: Path) -> None:
    path = small_disk / "store.sqlite"
    store = open_store(path, ManualClock())
    before = path.with_name("store.sqlite-wal").stat().st_size
    theirs = fill(small_disk)
    os.truncate(theirs, theirs.stat().st_size - SIZE // 4)
    store.database.watch_space(Space(path))
    assert path.with_name("store.sqlite-wal").stat().st_size == before
    store.database.close()


async def goes_on(store: Inflight, clock: ManualClock, disk: CrashDisk) -> None:
    """It takes in what comes; then it is gone."""
    store.insert([activation("a", clock)])
    await settle_down(store)
    check_store(store)
    disk.kill()
    abandon(store.database)


async def test_a_log_for_which_there_is_no_room_is_as_it_was(tmp_path: Path) -> None:
    clock, path, disk = ManualClock(), tmp_path / "store.sqlite", CrashDisk()
    with disk.mounted():
        store = open_store(path, clock)
        size = disk.contents.size()
        disk.capacity = size + REWRITE_BYTES + 1
        store.database.lay_out_log(CHECKPOINT_BYTES)
    assert disk.contents.size() == size
    await goes_on(store, clock, disk)


@pytest.mark.parametrize("kind", ["open", "size", "write", "sync"])
async def test_a_disk_that_fails_while_the_log_is_laid_out_ends_no_start(tmp_path: Path, kind: str) -> None:
    clock, path, disk = ManualClock(), tmp_path / "store.sqlite", CrashDisk()
    with disk.mounted():
        store = open_store(path, clock)
        size = disk.contents.size()
        disk.before, ended_by = Failing([kind], 0), None
        try:
            store.database.lay_out_log(CHECKPOINT_BYTES)
        except apsw.Error as error:
            ended_by = error
    assert ended_by is None
    assert disk.contents.size() == size
    await goes_on(store, clock, disk)


def test_while_the_reserve_is_not_held_space_is_low(tmp_path: Path) -> None:
    """Who frees enough for what is needed now has not freed enough for the next time."""
    space = Space(tmp_path / "store.sqlite")
    space.reserve_bytes, free = 1000, 5000
    space._free = lambda: free  # type: ignore[method-assign]
    assert not space.watch()
    assert space.give_up()
    free = 1999
    assert space.watch()
    free = 2000
    assert not space.watch()
    space.close()
