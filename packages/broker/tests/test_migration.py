"""An older database is brought to the schema of today, whatever interrupts it."""

from __future__ import annotations

import random
from pathlib import Path

import apsw
from crash_disk import HOWS, CrashDisk, abandon, crash_points
from store_helpers import ManualClock, check_store, open_store, settle_down, token_of

from penstock_broker.domain.activation import Status
from penstock_broker.domain.lifecycle import Event
from penstock_broker.store.batch import Answer
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.schema import SCHEMA, SCHEMA_VERSION

VERSION_1 = (Path(__file__).parent / "data_v1.sql").read_text()
BYTES = 1 << 20


def version_1(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.execute(VERSION_1)
    assert connection.pragma("user_version") == 1
    connection.close()


async def check_migrated(store: Inflight) -> None:
    """Nothing of the rows is lost, and the tables are those of a new store."""
    await settle_down(store)
    check_store(store)
    connection = store.database.connection
    assert connection.pragma("user_version") == SCHEMA_VERSION
    assert tables(connection) == tables(new_database())
    rows = store.database.load([position[0] for position in store.database.positions()])
    assert [(row.id, row.status) for row in rows] == [
        ("t1", Status.FORWARDING),
        ("t2", Status.PROCESSING),
        ("t3", Status.PENDING),
        ("t4", Status.DELAYED),
        ("t5", Status.PENDING),
    ]
    assert rows[4].body == b"body 5" * 300
    assert store.memory.quarantined == 0


def tables(connection: apsw.Connection) -> dict[str, list[tuple[object, ...]]]:
    """Table -> its columns, with types and defaults, in any order: an added column comes last."""
    names = [n for (n,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return {
        name: sorted(row[1:] for row in connection.execute(f"PRAGMA table_info({name})")) for name in names
    }


def new_database() -> apsw.Connection:
    connection = apsw.Connection(":memory:")
    connection.execute(SCHEMA)
    return connection


async def test_a_database_of_version_1_is_migrated_and_goes_on(tmp_path: Path) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    version_1(path)
    store = open_store(path, clock)
    await check_migrated(store)
    source = store.source("tasks", 0)
    store.settle_dispute(source)
    claimed = store.claim(None, (), 10, BYTES)
    assert [row.id for row in claimed] == ["t3", "t5"]
    for row in claimed:
        assert store.settle(token_of(store, row), Event.COMPLETE, clock.wall) is Answer.APPLIED
    await settle_down(store)
    check_store(store)
    store.database.close()


async def test_a_migration_that_is_interrupted_anywhere_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    version_1(path)
    disk = CrashDisk({str(path): path.read_bytes()}, journal=True)
    begun = disk.contents.files()
    with disk.mounted():
        store = open_store(path, ManualClock())
    disk.kill()
    abandon(store.database)
    rng = random.Random(1)
    checked = 0
    for point in crash_points(disk.journal, begun):
        for how in HOWS:
            image = CrashDisk(point.contents.image(rng, how))
            with image.mounted():
                store = open_store(path, ManualClock())
            await check_migrated(store)
            image.kill()
            abandon(store.database)
            checked += 1
    assert checked > 50
