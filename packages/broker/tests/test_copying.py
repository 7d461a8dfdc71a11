"""A backup while ticks write: it is the database as of a commit, and holds up nothing."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import apsw
import grpc
import pytest
from ingest_helpers import until
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.dispatch import looking
from penstock_broker.dispatch.service import Refused
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.server import Broker
from penstock_broker.store import copying
from penstock_broker.store.copying import STEP_PAGES, CannotCopy, backup_of, is_own
from penstock_broker.store.database import PAGE_BYTES, Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.space import Space
from penstock_protocol.v1 import admin_pb2 as pb

BODY = os.urandom(2000)


async def some(store: Inflight, count: int, prefix: str = "t") -> None:
    clock = store.clock
    assert isinstance(clock, ManualClock)
    store.insert([activation(f"{prefix}{n}", clock, body=BODY) for n in range(count)])
    await settle_down(store)


def contents(connection: apsw.Connection) -> dict[str, list[object]]:
    """Every row of every table."""
    names = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
    return {str(n): list(connection.execute(f"SELECT * FROM {n} ORDER BY 1, 2")) for (n,) in names}


async def test_the_copy_is_the_database_as_of_a_commit_though_ticks_write_meanwhile(tmp_path: Path) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    store = open_store(path, clock)
    await some(store, 3000)
    database, steps = store.database, 0
    copy = backup_of(path, 1)
    database.begin_copy(copy)
    before = contents(database.connection)
    while True:
        # Early pages and late ones, and as it is committed before each step.
        rows = store.claim(None, (), 50, 1 << 22)
        await settle_down(store)
        for row in rows:
            store.settle(token_of(store, row), Event.COMPLETE, clock.wall)
        await some(store, 20, f"s{steps}-")
        if steps == 2:
            # A transaction that has spilled into the WAL and is rolled back.
            database.connection.pragma("cache_size", 10)
            database.connection.execute("BEGIN; UPDATE payload SET body = x'00'; ROLLBACK")
            database.connection.pragma("cache_size", -8192)
        committed = contents(database.connection)
        copied, pages = database.copy_on()
        steps += 1
        if copied == pages:
            break
    assert steps > 6
    await some(store, 20, "later-")
    with apsw.Connection(str(copy)) as made:
        assert made.pragma("integrity_check") == "ok"
        said = contents(made)
    assert said == committed
    assert said != before
    assert said != contents(database.connection)
    made.close()
    check_store(store)
    database.close()


async def test_the_write_ahead_log_stays_bounded_while_a_copy_is_made(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    log = path.with_name("store.sqlite-wal")
    store = open_store(path, ManualClock())
    store.database.checkpoint_bytes = 1 << 20
    for n in range(10):
        await some(store, 1000, f"{n}-")
    store.database._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
    store.database.begin_copy(backup_of(path, 1))
    longest = copied = steps = 0
    pages = 1
    while copied < pages:
        copied, pages = store.database.copy_on()
        await some(store, 100, f"s{steps}-")
        steps += 1
        longest = max(longest, log.stat().st_size)
    assert steps >= 20
    assert 1 << 20 < longest < 2 << 20
    store.database.close()


async def test_there_must_be_room_for_it_and_what_broke_off_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.sqlite"
    store = open_store(path, ManualClock())
    await some(store, 2000)
    store.database.space = Space(path)
    free, real = 0, os.statvfs(tmp_path)

    def statvfs(_: object) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=real.f_blocks * real.f_frsize)

    monkeypatch.setattr(os, "statvfs", statvfs)
    reserve = store.database.space.reserve_bytes
    size = copying.size_of(store.database.connection)
    free = size + reserve - 1
    with pytest.raises(CannotCopy, match=rf"needs {size + reserve:,} bytes in .*, and {free:,} are free"):
        store.database.begin_copy(backup_of(path, 1))
    assert not backup_of(path, 1).exists()
    free = 3 * reserve + size
    store.database.begin_copy(backup_of(path, 1))
    assert store.database.copy_on()[0] >= STEP_PAGES
    # Somebody else fills the disk.
    free = reserve - 1
    with pytest.raises(CannotCopy, match="the disk is nearly full"):
        store.database.copy_on()
    store.database.drop_copy()
    assert not backup_of(path, 1).exists()
    await some(store, 5, "later-")
    check_store(store)
    store.database.close()


def test_what_was_left_is_deleted_at_the_start_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    names = [
        "store.sqlite.backup-12",
        "store.sqlite.backup-",
        "other.sqlite.backup-1",
        "store.sqlite.backup-1.mine",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"left")
    Database(path, Limits(), 0).close()
    assert [name for name in names if (tmp_path / name).exists()] == names[1:]
    # Of a database with such a name, none of its own files.
    Database(tmp_path / "other.sqlite.backup-1x", Limits(), 0).close()
    assert (tmp_path / "other.sqlite.backup-1").exists()


@pytest.mark.parametrize("name", ["backup-7", "lock", "reserve"])
def test_a_name_of_the_brokers_own_is_known(tmp_path: Path, name: str) -> None:
    path = tmp_path / "store.sqlite"
    assert is_own(path, tmp_path / f"store.sqlite.{name}")
    assert not is_own(path, tmp_path / f"other.sqlite.{name}")
    assert not is_own(path, tmp_path / "store.sqlite.bak")


# -- of a broker that runs


@pytest.fixture
async def broker(tmp_path: Path) -> Broker:
    settings = Settings(ingest="grpc", db_path=tmp_path / "store.sqlite", grpc_port=0, metrics_port=0)
    broker = Broker(settings, SystemClock())
    await broker.start()
    clock = ManualClock(SystemClock().wall_ms())
    await broker.store.insert([activation(f"t{n}", clock, body=BODY) for n in range(2000)])
    return broker


async def back_up(broker: Broker, id: str) -> pb.BackUpDatabaseResponse:
    request = pb.BackUpDatabaseRequest(id=id, by="test").SerializeToString()
    return pb.BackUpDatabaseResponse.FromString(await broker.looking.back_up_database(request))


async def test_a_backup_goes_on_unasked_and_tells_whoever_began_it_how_it_ended(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "ANSWER_SECONDS", 0)
    first = await back_up(broker, "one")
    assert not first.finished
    with pytest.raises(Refused, match="a backup is being made already"):
        await back_up(broker, "two")
    assert broker.looking._copying is not None
    await broker.looking._copying
    told = await back_up(broker, "one")
    assert told == await back_up(broker, "one")
    assert (told.finished, told.number, told.pages_copied) == (True, 1, told.pages)
    made = backup_of(broker.database.path, 1)
    assert made.stat().st_size == told.pages * PAGE_BYTES
    # The next one takes its place.
    assert (await back_up(broker, "two")).number == 2
    await broker.looking._copying
    assert not made.exists()
    assert backup_of(broker.database.path, 2).exists()
    with pytest.raises(Refused, match="characters") as refused:
        await back_up(broker, "")
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    await broker.stop()


async def test_a_backup_that_failed_says_why_and_leaves_nothing(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(copying.os, "fdatasync", fail)  # type: ignore[attr-defined]
        with pytest.raises(Refused, match=r"the backup has failed: .*No space left"):
            await back_up(broker, "one")
    assert not backup_of(broker.database.path, 1).exists()
    assert (await back_up(broker, "two")).number == 2
    await broker.store.insert([activation("later", ManualClock())])
    await broker.stop()


@pytest.mark.parametrize("failed", [False, True])
async def test_a_broker_that_stops_deletes_what_is_not_finished(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    monkeypatch.setattr(looking, "ANSWER_SECONDS", 0)
    monkeypatch.setattr(looking, "PAUSE_SECONDS", 0.2)
    await back_up(broker, "one")
    await until(backup_of(broker.database.path, 1).exists)
    if failed:
        broker.store.writer.refuse()
    async with asyncio.timeout(20):
        await broker.stop()
    assert not backup_of(broker.database.path, 1).exists()
