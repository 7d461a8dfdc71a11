"""What operators do to the store, one rule at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

import apsw
import pytest
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of

from penstock_broker.domain.activation import Activation, Status, hash_id
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store.batch import Answer, Report
from penstock_broker.store.database import Database
from penstock_broker.store.index import PairQueue
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.schema import SCHEMA_VERSION

BYTES = 1 << 22


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(tmp_path: Path, clock: ManualClock):
    """Closed by the test if it opens the file again."""
    store = open_store(tmp_path / "store.sqlite", clock)
    yield store
    with contextlib.suppress(apsw.ConnectionClosedError, OSError):
        store.database.close()


async def insert(store: Inflight, *rows: Activation) -> None:
    store.insert(rows)
    await settle_down(store)


async def told(store: Inflight, answer: Answer | Report) -> Answer:
    await settle_down(store)
    return answer.answer if isinstance(answer, Report) else answer


def ids(store: Inflight, *wanted: object, rows: int = 100) -> list[str]:
    application, *namespaces = wanted or (None,)
    return [row.id for row in store.claim(application, tuple(namespaces), rows, BYTES)]  # type: ignore[arg-type]


def pay(store: Inflight) -> PairQueue:
    queue = store.memory.index.pair("shop", "pay")
    assert queue is not None
    return queue


def open_again(store: Inflight, clock: ManualClock) -> Inflight:
    store.database.close()
    return open_store(store.database.path, clock)


def term(store: Inflight, name: str) -> int:
    return sum(n for (_, term), n in store.database.books().items() if term == name)


# -- cancel


async def test_what_waits_is_cancelled_wherever_it_is(tmp_path: Path, clock: ManualClock) -> None:
    limits = StoreLimits(window_rows_max=2)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(
        store, *(activation(f"t{n}", clock) for n in range(6)), activation("late", clock, delay_ms=900)
    )
    assert store.memory.index.pairs[1].spilled, "some are only in their rows"
    for id in ("t0", "t5", "late"):
        assert await told(store, store.control.cancel(hash_id(id))) is Answer.APPLIED
        assert store.control.cancel(hash_id(id)) is Answer.UNKNOWN
    assert term(store, "cancelled") == 3
    check_store(store)
    clock.advance(1_000)
    await settle_down(store)
    handed: list[str] = []
    while taken := ids(store):
        handed += taken
        await settle_down(store)
    assert handed == ["t1", "t2", "t3", "t4"]
    store.database.close()


async def test_who_runs_a_cancelled_task_learns_it_and_his_report_is_refused(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock, max_attempts=3))
    (row,) = store.claim(None, (), 1, BYTES)
    token = token_of(store, row)
    assert store.control.cancel(row.id_hash) is Answer.APPLIED
    await settle_down(store)
    is_told(store, token, clock)
    again = open_again(store, clock)
    is_told(again, token, clock)
    again.database.close()


def is_told(store: Inflight, token: ClaimToken, clock: ManualClock) -> None:
    assert store.extend(token, True) is Answer.STALE
    assert store.control.was_cancelled(token)
    for event in (Event.COMPLETE, Event.RETRY, Event.RELEASE):
        assert store.settle(token, event, clock.wall) is Answer.STALE
    assert store.memory.rows == 0
    check_store(store)


async def test_only_the_claim_that_was_cancelled_says_so(store: Inflight, clock: ManualClock) -> None:
    await insert(store, activation("a", clock, max_attempts=3))
    (row,) = store.claim(None, (), 1, BYTES)
    earlier = token_of(store, row)
    store.settle(earlier, Event.RETRY, clock.wall)
    await settle_down(store)
    assert await told(store, store.control.cancel(hash_id("a"))) is Answer.APPLIED
    # It waited for its next start: nobody is to be killed, and the repeated report is still known.
    assert not store.control.was_cancelled(earlier)
    assert store.settle(earlier, Event.RETRY, clock.wall) is Answer.DUPLICATE


async def test_what_is_on_its_way_out_cannot_be_cancelled(store: Inflight, clock: ManualClock) -> None:
    await insert(store, activation("a", clock))
    (row,) = store.claim(None, (), 1, BYTES)
    store.settle(token_of(store, row), Event.FAIL, clock.wall)
    await settle_down(store)
    assert await told(store, store.control.cancel(hash_id("a"))) is Answer.STALE
    (held,) = store.database.load([key[0] for key in store.database.positions()])
    assert held.status is Status.FORWARDING
    check_store(store)


async def test_an_unknown_id_is_said_to_be(store: Inflight) -> None:
    assert store.control.cancel(hash_id("nobody")) is Answer.UNKNOWN
    assert store.control.run_now(hash_id("nobody")) is Answer.UNKNOWN


# -- run now


async def test_a_delay_or_back_off_is_skipped(store: Inflight, clock: ManualClock) -> None:
    await insert(
        store, activation("late", clock, delay_ms=60_000), activation("failed", clock, max_attempts=3)
    )
    (row,) = store.claim(None, (), 1, BYTES)
    store.settle(token_of(store, row), Event.RETRY, clock.wall, 60_000)
    await settle_down(store)
    assert ids(store) == []
    for id in ("late", "failed"):
        assert await told(store, store.control.run_now(hash_id(id))) is Answer.APPLIED
        assert await told(store, store.control.run_now(hash_id(id))) is Answer.STALE
    check_store(store)
    assert sorted(ids(store)) == ["failed", "late"]
    await settle_down(store)
    clock.advance(61_000)
    store.writer.wake()
    await settle_down(store)
    assert ids(store) == [], "they do not come a second time when the delay is over"
    check_store(store)


async def test_what_does_not_wait_for_a_time_is_left_alone(store: Inflight, clock: ManualClock) -> None:
    await insert(store, activation("pending", clock), activation("claimed", clock, namespace="mail"))
    (row,) = store.claim("shop", ("mail",), 1, BYTES)
    for id in ("pending", "claimed"):
        assert await told(store, store.control.run_now(hash_id(id))) is Answer.STALE
    assert row.status is Status.PROCESSING
    check_store(store)


# -- pause and resume


async def test_a_paused_pair_is_accepted_counted_and_not_handed_out(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock), activation("other", clock, namespace="mail"))
    assert store.control.pause(pay(store))
    assert not store.control.pause(pay(store))
    await insert(store, activation("b", clock))
    check_store(store)
    assert ids(store, "shop", "pay") == []
    assert ids(store) == ["other"]
    assert store.memory.counts[pay(store).pair][Status.PENDING] == 2
    assert ("shop", "pay", 2) not in store.pending(), "workers are not told to come for it"
    assert store.control.resume(pay(store))
    assert not store.control.resume(pay(store))
    await settle_down(store)
    check_store(store)
    assert ids(store) == ["a", "b"]


async def test_a_pause_is_kept_over_a_restart(store: Inflight, clock: ManualClock) -> None:
    await insert(store, activation("a", clock))
    store.control.pause(pay(store))
    await settle_down(store)
    again = open_again(store, clock)
    await settle_down(again)
    assert pay(again).paused_at == clock.wall
    assert ids(again) == []
    again.control.resume(pay(again))
    await settle_down(again)
    last = open_again(again, clock)
    await settle_down(last)
    assert ids(last) == ["a"]
    last.database.close()


async def test_a_paused_flood_larger_than_memory_comes_back_in_order(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(window_rows_max=4))
    await insert(store, *(activation(f"{n:02}", clock) for n in range(10)))
    store.control.pause(pay(store))
    await insert(store, *(activation(f"{n:02}", clock) for n in range(10, 20)))
    await insert(store, *(activation(f"mail{n}", clock, namespace="mail") for n in range(6)))
    handed: list[str] = []
    while taken := ids(store):
        handed += taken
        await settle_down(store)
    assert handed == [f"mail{n}" for n in range(6)], "others are served"
    store.control.resume(pay(store))
    await settle_down(store)
    check_store(store)
    handed = []
    while taken := ids(store, "shop", "pay"):
        handed += taken
        await settle_down(store)
    assert handed == [f"{n:02}" for n in range(20)]
    store.database.close()


async def test_what_runs_when_its_pair_is_paused_comes_to_its_end(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock), activation("b", clock, max_attempts=2))
    first, second = store.claim(None, (), 2, BYTES)
    store.control.pause(pay(store))
    assert store.extend(token_of(store, first), True) is Answer.APPLIED
    assert store.settle(token_of(store, first), Event.COMPLETE, clock.wall) is Answer.APPLIED
    assert store.settle(token_of(store, second), Event.RETRY, clock.wall) is Answer.APPLIED
    await settle_down(store)
    check_store(store)
    assert ids(store) == [], "the retry waits for the pause to end"
    store.control.resume(pay(store))
    await settle_down(store)
    assert ids(store) == ["b"]


# -- the books


async def test_the_books_are_kept_for_each_pair_so_that_errors_cannot_cancel_out(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock), activation("b", clock, namespace="mail"))
    assert store.control.balances() == {1: 0, 2: 0}
    # What a bug could do: one pair counts the end of another's task.
    store.memory.add_to_books({(1, "done"): 1, (2, "done"): -1})
    assert store.control.balances() == {1: -1, 2: 1}
    assert store.imbalance() == 2


# -- the schema


async def test_a_database_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    old = apsw.Connection(str(tmp_path / "old.sqlite"))
    old.pragma("journal_mode", "wal")
    old.execute((Path(__file__).parent / "schema_v1.sql").read_text())
    old.execute("INSERT INTO meta VALUES ('store_id', 'abcd1234')")
    old.execute("INSERT INTO pair VALUES (1, 'shop', 'pay')")
    old.pragma("user_version", 1)
    old.close()
    migrated = Database(tmp_path / "old.sqlite", Limits(), 0)
    fresh = Database(tmp_path / "new.sqlite", Limits(), 0)
    for database in (migrated, fresh):
        assert database.connection.pragma("user_version") == SCHEMA_VERSION
    assert migrated.store_id == "abcd1234"
    assert migrated.pairs() == [(1, "shop", "pay", None)]
    assert columns(migrated) == columns(fresh)
    migrated.close()
    fresh.close()


def columns(database: Database) -> set[tuple[object, ...]]:
    """Of every table: name, type, whether it may be NULL, and its default."""
    tables = [
        name for (name,) in database.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
    ]
    return {
        (table, name, kind, notnull, default)
        for table in tables
        for _, name, kind, notnull, default, _ in database.connection.execute(f"PRAGMA table_info({table})")
    }
