"""What a query may do, and what it may take: nothing but reading, for a bounded time, of bounded size."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import apsw
import grpc
import pytest
from ingest_helpers import until
from store_helpers import ManualClock, activation, check_store, open_store, settle_down

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.dispatch import rpc
from penstock_broker.dispatch.service import Refused
from penstock_broker.domain.lifecycle import Limits
from penstock_broker.errors import FatalError
from penstock_broker.server import Broker
from penstock_broker.store import lock, looking
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.database import Database, DiskFailing
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.looking import CannotQuery, opened, query
from penstock_broker.store.schema import SCHEMA_VERSION
from penstock_broker.store.writer import StoreStopped
from penstock_protocol.v1 import admin_pb2 as pb

FOREVER = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT max(x) FROM r"

MANY_MEGABYTES = "SELECT zeroblob(1000000) UNION ALL SELECT x FROM r"


@pytest.fixture
async def store(tmp_path: Path) -> Inflight:
    store = open_store(tmp_path / "store.sqlite", ManualClock())
    store.insert([activation(f"t{n}", ManualClock()) for n in range(5)])
    await settle_down(store)
    return store


def ask(store: Inflight, sql: str, limit: int = 1000, ms_a_look: int = 0) -> looking.Answer:
    passed = itertools.count(0, ms_a_look) if ms_a_look else itertools.repeat(0)
    return query(store.database.connection, sql, limit, lambda: next(passed))


def refusal(store: Inflight, sql: str, **bounds: int) -> str:
    """Why it is refused; empty when it is not."""
    try:
        ask(store, sql, **bounds)
    except CannotQuery as error:
        return str(error)
    return ""


async def require_unharmed(store: Inflight) -> None:
    """Nothing of a query is left, and ticks work."""
    connection = store.database.connection
    assert connection.authorizer is None
    assert connection.limit(apsw.SQLITE_LIMIT_LENGTH) > looking.VALUE_BYTES_MAX
    assert apsw.hard_heap_limit(-1) == 0
    assert not connection.in_transaction
    # It says so if a statement is open still.
    frames, copied = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert frames == copied
    store.insert([activation(f"after-{store.memory.rows}", ManualClock())])
    await settle_down(store)
    check_store(store)


async def test_it_says_what_the_rows_say(store: Inflight) -> None:
    found = ask(
        store, "SELECT id, seq > 0 AS numbered, body, error FROM activation ORDER BY seq LIMIT 2; -- ok"
    )
    assert found.columns == ["id", "numbered", "body", "error"]
    assert found.rows == [("t0", 1, b"body of t0", None), ("t1", 1, b"body of t1", None)]
    assert not found.more
    assert ask(store, "SELECT id FROM activation WHERE id = 'x'") == (["id"], [], False)
    assert ask(store, "PRAGMA user_version").rows == [(SCHEMA_VERSION,)]
    assert "retry_delay_ms" in [row[1] for row in ask(store, "PRAGMA table_info(activation)").rows]
    assert ask(store, "SELECT count(*) FROM pragma_table_info('pair')").rows == [(4,)]
    await require_unharmed(store)
    store.database.close()


@pytest.mark.parametrize(
    "sql",
    [
        # As the ticks write them, prepared already, too.
        "BEGIN IMMEDIATE",
        "COMMIT",
        "ROLLBACK",
        "DELETE FROM finished WHERE at < 5",
        "INSERT INTO meta VALUES ('a', 1)",
        "UPDATE activation SET status = 1",
        "DROP TABLE pair",
        "CREATE TEMP TABLE x (y)",
        "ATTACH '{folder}/other.sqlite' AS other",
        "VACUUM",
        "VACUUM INTO '{folder}/other.sqlite'",
        "SAVEPOINT x",
        "REINDEX",
        "ANALYZE",
        "PRAGMA user_version = 9",
        "PRAGMA journal_mode = delete",
        "PRAGMA query_only(1)",
        "PRAGMA wal_checkpoint",
        "PRAGMA locking_mode",
        "PRAGMA integrity_check",
        "SELECT load_extension('x')",
        "EXPLAIN DELETE FROM pair",
        "SELECT 1; DELETE FROM pair",
        "WITH x AS (SELECT 1) DELETE FROM pair",
    ],
)
async def test_it_only_reads(store: Inflight, tmp_path: Path, sql: str) -> None:
    before = store.database.connection.total_changes()
    assert "queries only read" in refusal(store, sql.format(folder=tmp_path))
    assert store.database.connection.total_changes() == before
    assert not (tmp_path / "other.sqlite").exists()
    await require_unharmed(store)
    store.database.close()


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("SELEC 1", 'near "SELEC": syntax error'),
        ("SELECT * FROM tasks", "no such table: tasks"),
        ("SELECT ?", "bindings"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("", "no statement"),
        ("-- nothing", "no statement"),
        ("SELECT 'a\0b'", "unrecognized token"),
        ("SELECT CAST(x'ff' AS TEXT)", "CAST(... AS BLOB)"),
        ("SELECT zeroblob(1000000000)", "1 MiB"),
        ("SELECT printf('%.*c', 1000000000, 'x')", "1 MiB"),
        ("SELECT zeroblob(1000000), zeroblob(1000000)", "a row has more than 1 MiB"),
        (
            f"WITH RECURSIVE r(x) AS ({MANY_MEGABYTES}) SELECT x FROM r ORDER BY x",
            "64 MiB of memory",
        ),
        (f"SELECT {'1,' * 40_000} 1", "64 KiB"),
    ],
)
async def test_what_is_wrong_is_said(store: Inflight, sql: str, why: str) -> None:
    assert why in refusal(store, sql)
    await require_unharmed(store)
    store.database.close()


async def test_it_is_interrupted_after_a_second(store: Inflight) -> None:
    assert "interrupted after 1 s" in refusal(store, FOREVER, ms_a_look=10)
    await require_unharmed(store)
    assert ask(store, "SELECT count(*) FROM activation", ms_a_look=10).rows == [(6,)]
    store.database.close()


async def test_an_answer_has_so_many_rows_and_bytes_and_says_that_there_is_more(store: Inflight) -> None:
    series = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT {}) SELECT {} FROM r"
    found = ask(store, series.format(20, "x"), 10)
    assert (len(found.rows), found.more) == (10, True)
    found = ask(store, series.format(10, "x"), 10)
    assert (len(found.rows), found.more) == (10, False)
    found = ask(store, series.format(20, "zeroblob(100000)"))
    assert (len(found.rows), found.more) == (10, True)
    await require_unharmed(store)
    store.database.close()


# -- the file of a broker that is stopped


def bytes_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name)}


@pytest.fixture
async def killed(store: Inflight) -> Path:
    """The database of a broker that was killed: what it wrote is in the WAL."""
    store.database.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    store.database.connection.close(True)
    store.database.release_lock()
    assert len(bytes_of(store.database.path)["store.sqlite-wal"]) > 10_000
    return store.database.path


async def test_what_a_killed_broker_left_is_read_and_stays_as_it_is(killed: Path) -> None:
    before = bytes_of(killed)
    with opened(killed) as connection:
        assert query(connection, "SELECT count(*) FROM activation", 1, SystemClock().mono_ms).rows == [(5,)]
        with pytest.raises(apsw.ReadOnlyError):
            connection.execute("DELETE FROM activation")
    assert bytes_of(killed) == before


async def test_what_was_stopped_in_order_stays_as_it_is(store: Inflight) -> None:
    store.database.close()
    before = bytes_of(store.database.path)
    with opened(store.database.path) as connection:
        assert query(connection, "SELECT count(*) FROM activation", 1, SystemClock().mono_ms).rows == [(5,)]
    assert bytes_of(store.database.path) == before


async def test_a_broker_that_starts_meanwhile_says_who_looks(killed: Path) -> None:
    held = lock.take(killed, lock.LOOKING)
    with pytest.raises(FatalError, match=r"is in use by penstock-broker db \(process \d+\)"):
        Database(killed, Limits(), 0)
    os.close(held)
    Database(killed, Limits(), 0).close()


@pytest.fixture(params=["newer", "another program's", "no database", "cut"])
def strange(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "strange.sqlite"
    if request.param == "no database":
        path.write_bytes(b"this is no database, but long enough to look like one" * 100)
    elif request.param == "another program's":
        with sqlite3.connect(path) as theirs:
            theirs.execute("CREATE TABLE theirs (x)")
        theirs.close()
    else:
        Database(path, Limits(), 0).close()
    if request.param == "newer":
        with apsw.Connection(str(path)) as newer:
            newer.pragma("user_version", SCHEMA_VERSION + 1)
        newer.close()
    elif request.param == "cut":
        path.write_bytes(path.read_bytes()[:9000])
    return path


def test_what_no_broker_would_start_on_can_be_asked_or_it_is_said_why_not(strange: Path) -> None:
    before = bytes_of(strange)
    try:
        with opened(strange) as connection:
            answer = query(connection, "SELECT name FROM sqlite_schema", 9, SystemClock().mono_ms)
            assert answer.rows
    except (FatalError, CannotQuery) as error:
        assert str(strange) in str(error) or "malformed" in str(error)  # noqa: PT017
        assert b"this is no database" in before["strange.sqlite"] or len(before["strange.sqlite"]) == 9000
    assert bytes_of(strange) == before


# -- a broker that runs


@pytest.fixture
async def broker(tmp_path: Path) -> Broker:
    settings = Settings(ingest="grpc", db_path=tmp_path / "store.sqlite", grpc_port=0, metrics_port=0)
    broker = Broker(settings, SystemClock())
    await broker.start()
    return broker


async def asked(broker: Broker, sql: str) -> pb.QueryDatabaseResponse:
    request = pb.QueryDatabaseRequest(sql=sql).SerializeToString()
    return pb.QueryDatabaseResponse.FromString(await broker.looking.query_database(request))


async def test_queries_and_ticks_do_not_disturb_each_other(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "QUERY_MS_MAX", 20)
    clock, store = ManualClock(SystemClock().wall_ms()), broker.store
    wrong = ("SELECT count(*) FROM activation", FOREVER, "BEGIN IMMEDIATE", "COMMIT", "SELECT * FROM nothing")
    answers = 0

    async def look() -> None:
        nonlocal answers
        for sql in itertools.islice(itertools.cycle(wrong), 30):
            try:
                told = await asked(broker, sql)
            except Refused as refused:
                assert refused.code is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017
            else:
                answers += 1
                assert told.rows[0].values[0].integer % 10 == 0, "it looked into a tick"

    lookers = [asyncio.create_task(look()) for _ in range(2)]
    batches = 0
    while not all(looker.done() for looker in lookers):
        await store.insert([activation(f"{batches}-{n}", clock) for n in range(10)])
        batches += 1
    await asyncio.gather(*lookers)
    assert answers == 12
    assert batches > 20
    assert (await asked(broker, "SELECT count(*) FROM activation")).rows[0].values[0].integer == 10 * batches
    assert store.database._wal_bytes > 0
    store.database._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert store.database._wal_bytes == 0, "a statement is open"
    await broker.stop()


async def test_a_query_is_answered_while_the_disk_takes_nothing(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Batch) -> Written:
        raise DiskFailing(apsw.IOError("it fails"))

    with monkeypatch.context() as failing:
        failing.setattr(broker.database, "write", fail)
        stored = broker.store.insert([activation("t", ManualClock())])
        await until(lambda: broker.store.writer.trouble)
        asking = asyncio.create_task(asked(broker, "SELECT count(*) FROM activation"))
        await asyncio.wait([asking], timeout=5)
        assert asking.done(), "it waits for the disk"
        assert (await asking).rows[0].values[0].integer == 0
        assert not stored.done()
    await stored
    await broker.stop()


async def test_a_query_whose_caller_has_given_up_is_one_at_a_time_too(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, ask_it = threading.Event(), threading.Event(), query

    def slow(*arguments: Any) -> looking.Answer:
        begun.set()
        goes_on.wait()
        return ask_it(*arguments)

    monkeypatch.setattr(looking, "query", slow)
    first = asyncio.create_task(asked(broker, "SELECT 1"))
    await until(begun.is_set)
    begun.clear()
    first.cancel()
    second = asyncio.create_task(asked(broker, "SELECT 2"))
    stored = broker.store.insert([activation("t", ManualClock())])
    await asyncio.sleep(0.05)
    assert broker.looking._asking.locked()
    assert broker._writer_thread._waiting.qsize() == 1, "more than a tick waits for the writer"
    goes_on.set()
    await stored
    assert (await second).rows[0].values[0].integer == 2
    assert first.cancelled()
    await broker.stop()


async def test_every_query_ends_when_the_broker_stops(broker: Broker) -> None:
    request = pb.QueryDatabaseRequest(sql="SELECT count(*) FROM boot").SerializeToString()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{broker.port}") as channel:
        ask_it: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/{rpc.ADMIN}/QueryDatabase"
        )
        await ask_it(request)
        calls = [ask_it(request) for _ in range(50)]
        await until(broker.looking._asking.locked)
        direct = [asyncio.create_task(asked(broker, "SELECT 1")) for _ in range(50)]
        await broker.stop()
        codes = {await call.code() for call in calls}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    _, pending = await asyncio.wait([*direct, asyncio.create_task(asked(broker, "SELECT 1"))], timeout=5)
    assert not pending, "a query hangs"
    ends = [task.exception() for task in direct]
    assert all(end is None or isinstance(end, StoreStopped) for end in ends), ends
