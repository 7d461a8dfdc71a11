"""More rules of the store, one by one: what is remembered, what is in time, what is bounded and counted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of

from penstock_broker.domain.activation import Activation, OnExceeded, Reason, Route, Status
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store import database, finished, inflight, writer
from penstock_broker.store.batch import Answer, Batch, Report, Written
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.leases import BUCKET_MS
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.partitions import Source

BYTES = 1 << 22


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(tmp_path: Path, clock: ManualClock):
    store = open_store(tmp_path / "store.sqlite", clock)
    yield store
    store.database.close()


async def insert(store: Inflight, *rows: Activation, taken: dict[int, int] | None = None) -> None:
    store.insert(rows, taken)
    await settle_down(store)


def claim(store: Inflight, count: int = 1, *namespaces: str) -> list[Activation]:
    return store.claim("shop" if namespaces else None, namespaces, count, BYTES)


def ids(rows: list[Activation]) -> list[str]:
    return [row.id for row in rows]


def is_known(store: Inflight, id: str) -> bool:
    """In flight here, or within the de-duplication window."""
    return store.content_of(id) is not None


async def settled(store: Inflight, token: ClaimToken, event: Event, delay: int | None = None) -> Answer:
    answer = store.settle(token, event, store.clock.wall_ms(), delay)
    await settle_down(store)
    return answer.answer if isinstance(answer, Report) else answer


async def take_outbox(store: Inflight, route: Route = Route.DEAD_LETTER) -> list[Activation]:
    taking = asyncio.ensure_future(store.outbox.take(route, 99, BYTES))
    await asyncio.sleep(0)
    await settle_down(store)
    return await taking


def reopen(store: Inflight, clock: ManualClock, limits: StoreLimits | None = None) -> Inflight:
    store.database.close()
    return open_store(store.database.path, clock, limits)


async def steps() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# -- nothing is acknowledged before its commit


async def test_nothing_is_acknowledged_while_its_tick_is_being_written(
    tmp_path: Path, clock: ManualClock
) -> None:
    disk = asyncio.Event()

    async def slow(write: Callable[[Batch], Written], batch: Batch) -> Written:
        await disk.wait()
        return write(batch)

    limits = StoreLimits()
    store = Inflight(Database(tmp_path / "store.sqlite", limits.lifecycle, 0), clock, limits, slow)
    stored = store.insert([activation("a", clock)])
    told = asyncio.ensure_future(store.committed())
    tick = asyncio.create_task(store.writer.tick())
    await steps()
    # Also whoever asks now: what it depends on is on its way, and not there.
    later = asyncio.ensure_future(store.committed())
    await steps()
    assert [wait.done() for wait in (stored, told, later)] == [False] * 3
    disk.set()
    await asyncio.gather(stored, told, later, tick)
    assert [key[2] for key in store.database.positions()] == ["a"]
    store.database.close()


async def test_a_flood_of_new_tasks_does_not_hold_up_an_outcome(tmp_path: Path, clock: ManualClock) -> None:
    limits = StoreLimits(batch_rows_max=10)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, activation("running", clock))
    (row,) = claim(store)
    await settle_down(store)
    for n in range(100):
        store.insert([activation(f"{n}-{i}", clock) for i in range(5)])
    store.settle(token_of(store, row), Event.COMPLETE, clock.wall_ms())
    outcome = asyncio.ensure_future(store.committed())
    await store.writer.tick()
    await steps()
    # In the first tick, beside no more new rows than one tick may have.
    assert outcome.done()
    assert "running" not in [key[2] for key in store.database.positions()]
    assert store.database.connection.execute("SELECT count(*) FROM activation").get <= 10
    await settle_down(store)
    check_store(store)
    store.database.close()


# -- what is remembered


@pytest.mark.parametrize("restarts", [0, 1])
async def test_an_id_is_known_for_the_whole_window_and_not_for_ever(
    tmp_path: Path, clock: ManualClock, restarts: int
) -> None:
    limits = StoreLimits(dedup_window_ms=8_000)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, activation("a", clock))
    await settled(store, token_of(store, claim(store)[0]), Event.COMPLETE)
    for _ in range(79):
        clock.advance(100)
        store.forget_finished()
        await settle_down(store)
        assert is_known(store, "a")
    for _ in range(restarts):
        store = reopen(store, clock, limits)
        assert is_known(store, "a")
    clock.advance(9_000)
    store.forget_finished()
    await settle_down(store)
    assert not is_known(store, "a")
    assert store.database.connection.execute("SELECT count(*) FROM finished").get == 0
    store.database.close()


async def test_what_is_within_the_window_stays_known_when_what_is_older_goes(
    tmp_path: Path, clock: ManualClock
) -> None:
    limits = StoreLimits(dedup_window_ms=8_000)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    for n in range(60):
        await insert(store, activation(str(n), clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD))
        clock.advance(500)
        store.forget_finished()
        await settle_down(store)
    for _ in range(2):
        assert all(is_known(store, str(n)) for n in range(45, 60))
        assert not any(is_known(store, str(n)) for n in range(40))
        store = reopen(store, clock, limits)
    store.database.close()


async def test_no_more_ids_are_remembered_than_the_bound(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(dedup_ids_max=80))
    for n in range(20):
        names = [f"{n}-{i}" for i in range(10)]
        await insert(
            store,
            *(activation(name, clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD) for name in names),
        )
        store.forget_finished()
        await settle_down(store)
    assert len(store.memory.finished) <= 80 * 9 // 8
    assert all(is_known(store, f"{n}-{i}") for n in range(12, 20) for i in range(10))
    store.database.close()


@pytest.mark.parametrize("limits", [StoreLimits(dedup_ids_max=8), StoreLimits(dedup_window_ms=5)])
async def test_a_small_bound_of_ids_holds_at_any_time_and_after_a_restart(
    tmp_path: Path, clock: ManualClock, limits: StoreLimits
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    for n in range(300):
        clock.advance(100)
        await insert(store, activation(str(n), clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD))
        # However few they are, a look-up goes through few buckets.
        assert len(store.memory.finished._buckets) <= finished.BUCKETS + 1
    for _ in range(2):
        assert is_known(store, "299")
        assert not is_known(store, "190")
        clock.advance(1)
        store = reopen(store, clock, limits)
        limits = dataclasses.replace(limits, dedup_window_ms=3_600_000, dedup_ids_max=8)
    assert len(store.memory.finished) <= 9
    store.database.close()


async def test_ids_are_forgotten_in_time_after_the_clock_was_ahead(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Of a broker that has a row of that time still."""
    limits = StoreLimits(dedup_window_ms=8_000, dedup_ids_max=800)
    ahead = ManualClock(clock.wall + 86_400_000)
    store = open_store(tmp_path / "store.sqlite", ahead, limits)
    await insert(store, activation("waits", ahead, namespace="other"))
    store = reopen(store, clock, limits)
    for n in range(60):
        await insert(store, activation(str(n), clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD))
        clock.advance(500)
        store.forget_finished()
        await settle_down(store)
    assert store.database.connection.execute("SELECT count(*) FROM finished").get <= 20
    for _ in range(2):
        assert all(is_known(store, str(n)) for n in range(45, 60))
        assert not any(is_known(store, str(n)) for n in range(40))
        store = reopen(store, clock, limits)
    store.database.close()


async def test_what_was_finished_while_the_clock_was_ahead_is_in_nobodys_way(
    tmp_path: Path, clock: ManualClock
) -> None:
    limits = StoreLimits(dedup_window_ms=8_000, dedup_ids_max=80)
    ahead = ManualClock(clock.wall + 86_400_000)
    store = open_store(tmp_path / "store.sqlite", ahead, limits)
    for n in range(30):
        await insert(store, activation(f"ahead-{n}", ahead, expires_ms=0, on_exceeded=OnExceeded.DISCARD))
    store = reopen(store, clock, limits)
    for n in range(15):
        await insert(store, activation(str(n), clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD))
        clock.advance(500)
        store.forget_finished()
        await settle_down(store)
    for _ in range(2):
        assert all(is_known(store, str(n)) for n in range(15))
        store = reopen(store, clock, limits)
    store.database.close()


async def test_what_was_dropped_after_the_clock_was_ahead_is_new_when_it_comes_again(
    tmp_path: Path, clock: ManualClock
) -> None:
    ahead = ManualClock(clock.wall + 86_400_000)
    store = open_store(tmp_path / "store.sqlite", ahead)
    source = store.source("tasks", 0)
    await insert(store, activation("a", ahead, source=source.id, offset=0), taken={source.id: 1})
    await settled(store, token_of(store, claim(store)[0]), Event.COMPLETE)
    store = reopen(store, clock)
    store.drop_uncovered(store.source("tasks", 0), 0)
    await settle_down(store)
    store = reopen(store, clock)
    assert not is_known(store, "a")
    store.database.close()


async def test_what_was_done_long_before_it_was_dropped_is_new_when_it_comes_again(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    await insert(store, activation("a", clock, source=source.id, offset=0), taken={source.id: 1})
    await settled(store, token_of(store, claim(store)[0]), Event.COMPLETE)
    clock.advance(store.limits.dedup_window_ms // 2)
    await insert(store, activation("b", clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD))
    store.drop_uncovered(source, 0)
    await settle_down(store)
    await insert(store, activation("a", clock, source=source.id, offset=0), taken={source.id: 1})
    assert ids(claim(store)) == ["a"]


@pytest.mark.parametrize("event", [Event.RETRY, Event.RELEASE, Event.WORKER_DIED, Event.FAIL])
async def test_the_answer_to_an_outcome_is_repeated_while_its_row_stays(
    tmp_path: Path, clock: ManualClock, event: Event
) -> None:
    """Wherever the row is now: in memory, only in the file, on its way out."""
    limits = StoreLimits(window_rows_max=1)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, activation("a", clock, max_attempts=9))
    token = token_of(store, claim(store)[0])
    # Fill what little room there is, so that the row that comes back stays outside.
    await insert(store, activation("b", clock), activation("c", clock))
    assert await settled(store, token, event, 0) is Answer.APPLIED
    for _ in range(2):
        assert await settled(store, token, event, 0) is Answer.DUPLICATE
        other = Event.COMPLETE
        assert await settled(store, token, other, 0) is Answer.STALE
        store = reopen(store, clock, limits)
        await settle_down(store)
    check_store(store)
    store.database.close()


@pytest.mark.parametrize("event", [Event.COMPLETE, Event.RETRY])
async def test_the_answer_under_a_forgotten_claim_of_what_is_only_in_the_file_is_repeated(
    tmp_path: Path, clock: ManualClock, event: Event
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, *(activation(id, clock, max_attempts=3) for id in "ab"))
    forgotten = token_of(store, claim(store, 2)[1])
    limits = StoreLimits(window_rows_max=1)
    store = reopen(store, clock, limits)
    await settle_down(store)
    assert forgotten.seq not in store.memory.resident
    for answer in (Answer.APPLIED, Answer.DUPLICATE):
        assert await settled(store, forgotten, event, 0) is answer
    store = reopen(store, clock, limits)
    await settle_down(store)
    assert await settled(store, forgotten, event, 0) is Answer.DUPLICATE
    store.database.close()


async def reported_while_it_is_read(store: Inflight, report: Callable[[], Answer | Report]) -> list[Report]:
    """What is reported, while the rows that follow the first are read from the file."""
    write = store.writer._handoff
    reports: list[Answer | Report] = []

    async def meanwhile(tick: Callable[[Batch], Written], batch: Batch) -> Written:
        written: Written = await write(tick, batch)
        if batch.pages and not reports:
            reports.append(report())
        return written

    store.writer._handoff = meanwhile
    assert ids(claim(store)) == ["a"]
    await settle_down(store)
    return [report for report in reports if isinstance(report, Report)]


@pytest.mark.parametrize("event", [Event.COMPLETE, Event.RETRY])
async def test_what_is_reported_on_while_it_is_read_is_answered_and_repeated(
    tmp_path: Path, clock: ManualClock, event: Event
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, *(activation(id, clock, max_attempts=3) for id in "ab"))
    forgotten = token_of(store, claim(store, 2)[1])
    store = reopen(store, clock, StoreLimits(window_rows_max=1))
    await settle_down(store)
    now = clock.wall_ms()
    (report,) = await reported_while_it_is_read(store, lambda: store.settle(forgotten, event, now, 60_000))
    assert report.answer is Answer.APPLIED
    assert await settled(store, forgotten, event) is Answer.DUPLICATE
    check_store(store)
    store.database.close()


async def test_a_zombies_report_on_what_is_read_meanwhile_changes_nothing(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, *(activation(id, clock, max_attempts=3) for id in "ab"))
    zombies = [token_of(store, row) for row in claim(store, 2)]
    for zombie in zombies:
        await settled(store, zombie, Event.WORKER_DIED)
    store = reopen(store, clock, StoreLimits(window_rows_max=1))
    await settle_down(store)
    now = clock.wall_ms()
    (report,) = await reported_while_it_is_read(store, lambda: store.settle(zombies[1], Event.COMPLETE, now))
    assert report.answer is Answer.STALE
    assert ids(claim(store)) == ["b"]
    store.database.close()


async def test_a_retry_by_id_of_what_somebody_else_has_claimed_meanwhile_is_stale(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, *(activation(id, clock, max_attempts=3) for id in "ab"))
    b = claim(store, 2)[1]
    store = reopen(store, clock, StoreLimits(window_rows_max=1))
    await settle_down(store)
    claimed: list[Activation] = []
    store.writer.on_committed.append(lambda: claimed.extend(claim(store)))
    now = clock.wall_ms()
    (report,) = await reported_while_it_is_read(
        store, lambda: store.settle_by_id(b.id_hash, Event.RETRY, now)
    )
    assert report.answer is Answer.STALE
    assert [(row.id, row.status) for row in claimed] == [("b", Status.PROCESSING)]
    store.database.close()


@pytest.mark.parametrize("back_off", [0, 60_000])
async def test_a_dead_letter_of_what_expired_tells_how_it_failed_before(
    store: Inflight, clock: ManualClock, back_off: int
) -> None:
    """Whoever reported that is still given the same answer."""
    await insert(store, activation("a", clock, max_attempts=3, expires_ms=5_000))
    token = token_of(store, claim(store)[0])
    store.settle(token, Event.RETRY, clock.wall_ms(), back_off, '{"type":"boom"}')
    await settle_down(store)
    clock.advance(5_000)
    await settle_down(store)
    assert await settled(store, token, Event.RETRY) is Answer.DUPLICATE
    (letter,) = await take_outbox(store)
    assert (letter.reason, letter.attempts, letter.error) == (Reason.EXPIRED, 1, '{"type":"boom"}')
    store.outbox.forwarded([letter])
    assert await settled(store, token, Event.RETRY) is Answer.DUPLICATE
    assert await settled(store, token, Event.COMPLETE) is Answer.STALE


async def test_a_report_on_what_left_is_no_repetition_of_one_on_what_came_back(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Both rows have one id, and each its claims from the first."""
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(lifecycle=Limits(retry_topic=True)))
    tokens = []
    for sent_on in (0, 77):
        row = activation("a", clock, max_attempts=3)
        row.sent_on = sent_on
        await insert(store, row)
        if not sent_on:
            tokens.append(token_of(store, claim(store)[0]))
            clock.advance(store.limits.lease_ms + BUCKET_MS)
            store.lapse(clock.mono_ms())
            await settle_down(store)
        tokens.append(token_of(store, claim(store)[0]))
        assert await settled(store, tokens[-1], Event.RETRY) is Answer.APPLIED
        store.outbox.forwarded(await take_outbox(store, Route.RETRY))
        await settle_down(store)
    lost, first, second = tokens
    assert (lost.claim, first.claim, second.claim) == (0, 1, 0)
    assert await settled(store, lost, Event.RETRY) is Answer.STALE
    assert await settled(store, second, Event.RETRY) is Answer.DUPLICATE
    store.database.close()


async def answered(store: Inflight, clock: ManualClock, number: int) -> list[int]:
    """So many wait for one tick; what is returned grows with each of those after it."""
    store.insert([activation("first", clock)])
    await asyncio.gather(*(store.committed() for _ in range(number)))
    await steps()
    ticks: list[int] = []
    store.writer.on_committed.append(lambda: ticks.append(store.memory.rows))
    return ticks


@pytest.mark.parametrize(("number", "later_ms", "waits"), [(2, 0, True), (1, 0, False), (2, 2, False)])
async def test_a_tick_waits_for_those_who_were_answered_just_now(
    store: Inflight, clock: ManualClock, monkeypatch: pytest.MonkeyPatch,
    number: int, later_ms: int, waits: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "GATHER_SECONDS", 1.0)
    running = asyncio.create_task(store.writer.run())
    ticks = await answered(store, clock, number)
    clock.advance(later_ms)
    store.insert([activation("second", clock)])
    one = store.committed()
    await steps()
    assert (one.done(), bool(ticks)) == (not waits, not waits)
    store.insert([activation("third", clock)])
    await asyncio.wait_for(asyncio.gather(one, store.committed()), 5)
    assert ticks == ([3] if waits else [2, 3])
    store.writer.stop()
    await running


async def test_a_tick_waits_for_those_who_came_while_the_one_before_it_was_written(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "GATHER_SECONDS", 1.0)
    disk = asyncio.Event()

    async def slow(write: Callable[[Batch], Written], batch: Batch) -> Written:
        await disk.wait()
        return write(batch)

    limits = StoreLimits()
    store = Inflight(Database(tmp_path / "store.sqlite", limits.lifecycle, 0), clock, limits, slow)
    running = asyncio.create_task(store.writer.run())
    store.insert([activation("first", clock)])
    first = asyncio.ensure_future(store.committed())
    await steps()
    store.insert([activation("second", clock)])
    second = asyncio.ensure_future(store.committed())
    disk.set()
    await asyncio.wait_for(first, 5)
    await steps()
    assert not second.done(), "who was answered first may be back at once"
    store.insert([activation("third", clock)])
    await asyncio.wait_for(asyncio.gather(second, store.committed()), 5)
    store.writer.stop()
    await running
    store.database.close()


async def test_those_who_do_not_come_back_hold_a_tick_up_for_a_moment(
    store: Inflight, clock: ManualClock
) -> None:
    running = asyncio.create_task(store.writer.run())
    await answered(store, clock, 2)
    store.insert([activation("second", clock)])
    done, _ = await asyncio.wait([store.committed()], timeout=5)
    assert done
    store.writer.stop()
    await running


# -- leases


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_client_without_heartbeats_has_until_the_deadline_and_the_grace(
    tmp_path: Path, clock: ManualClock, restarted: bool
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    row = activation("a", clock)
    row.deadline_ms = 60_000
    await insert(store, row)
    store.claim(None, (), 1, BYTES, tokenless=True)
    await settle_down(store)
    if restarted:
        clock.advance(30_000)
        store = reopen(store, clock)
    clock.advance(60_000 + store.limits.grace_ms - 1)
    assert store.lapse(clock.mono_ms()) == 0
    clock.advance(store.limits.lease_ms)
    assert store.lapse(clock.mono_ms()) == 1
    store.database.close()


# -- time


async def test_a_delayed_task_is_not_woken_with_another_that_is_due(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, *(activation(str(ms), clock, delay_ms=ms) for ms in (100, 101, 350, 700)))
    for now in range(701):
        await settle_down(store)
        due = [ms for ms in (100, 101, 350, 700) if ms <= now]
        assert store.memory.counts[1][Status.PENDING] == len(due)
        clock.advance(1)
    assert ids(claim(store, 9)) == ["100", "101", "350", "700"]


async def test_what_expires_leaves_though_nobody_asks_for_it(store: Inflight, clock: ManualClock) -> None:
    await insert(
        store,
        activation("letter", clock, expires_ms=1_000),
        activation("discarded", clock, expires_ms=1_000, on_exceeded=OnExceeded.DISCARD),
        activation("delayed", clock, expires_ms=1_000, delay_ms=5_000),
        activation("was delayed", clock, expires_ms=1_000, delay_ms=500),
        activation("stays", clock, expires_ms=1_001),
    )
    for _ in range(2):
        clock.advance(500)
        await settle_down(store)
    assert store.outbox.size() == 3
    assert store.memory.books[1, "discarded:expired"] == 1
    assert ids(claim(store, 9)) == ["stays"]
    await settle_down(store)
    check_store(store)


@pytest.mark.parametrize("what", ["due", "expired"])
async def test_more_than_one_tick_looks_at_is_due_and_expires_all_the_same(
    store: Inflight, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(database, "DUE_ROWS_MAX", 3)
    rows = [activation(str(n), clock, delay_ms=1_000) for n in range(10)]
    if what == "expired":
        discard = OnExceeded.DISCARD
        rows = [activation(str(n), clock, expires_ms=1_000, on_exceeded=discard) for n in range(10)]
    await insert(store, *rows)
    clock.advance(1_000)
    await settle_down(store)
    assert store.memory.counts[1][Status.PENDING] == store.memory.rows == (10 if what == "due" else 0)
    check_store(store)


async def test_what_expires_before_it_arrives_is_counted(store: Inflight, clock: ManualClock) -> None:
    late = activation("late", clock, expires_ms=0, on_exceeded=OnExceeded.DISCARD)
    await insert(store, late, activation("letter", clock, expires_ms=0))
    assert claim(store, 9) == []
    assert store.memory.books == {(1, "accepted"): 2, (1, "discarded:expired"): 1}
    assert store.outbox.size() == 1
    assert is_known(store, "late")
    check_store(store)


# -- the order of hand-out, and what is outside memory


async def test_a_backlog_larger_than_memory_is_handed_out_whole_after_a_restart(
    tmp_path: Path, clock: ManualClock
) -> None:
    limits = StoreLimits(window_rows_max=20)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, *(activation(f"{n:03}", clock) for n in range(200)))
    store = reopen(store, clock, limits)
    handed_out: list[str] = []
    await settle_down(store)
    # Nothing but the claims themselves asks for the next page.
    while rows := claim(store, 7):
        handed_out += ids(rows)
        await settle_down(store)
    assert handed_out == [f"{n:03}" for n in range(200)]
    store.database.close()


async def test_rows_that_are_dropped_while_they_are_read_leave_nobody_behind_them_stuck(
    tmp_path: Path, clock: ManualClock
) -> None:
    dropping: list[Callable[[], object]] = []

    async def write_and_drop(write: Callable[[Batch], Written], batch: Batch) -> Written:
        written = write(batch)
        if batch.pages and dropping:
            dropping.pop()()
        return written

    limits = StoreLimits(window_rows_max=2)
    store = Inflight(Database(tmp_path / "store.sqlite", limits.lifecycle, 0), clock, limits, write_and_drop)
    source = store.source("tasks", 0)
    from_log = [activation(f"log-{n}", clock, source=source.id, offset=n) for n in range(4)]
    await insert(store, *from_log, taken={source.id: 4})
    await insert(store, activation("behind", clock))
    assert store.memory.index.pairs[1].spilled
    dropping.append(lambda: store.drop_uncovered(source, 0))
    claim(store, 9)
    await settle_down(store)
    assert not dropping
    assert "behind" in ids(claim(store, 9))
    await settle_down(store)
    check_store(store)
    store.database.close()


async def test_what_is_dropped_while_it_is_stored_leaves_nobody_behind_it_stuck(
    tmp_path: Path, clock: ManualClock
) -> None:
    dropping: list[Callable[[], object]] = []

    async def write_and_drop(write: Callable[[Batch], Written], batch: Batch) -> Written:
        written = write(batch)
        if dropping:
            dropping.pop()()
        return written

    limits = StoreLimits(window_rows_max=2)
    store = Inflight(Database(tmp_path / "store.sqlite", limits.lifecycle, 0), clock, limits, write_and_drop)
    goes, stays = store.source("tasks", 0), store.source("tasks", 1)
    others = [activation(name, clock, namespace=name) for name in ("b", "c", "d")]
    await insert(store, *others)  # nobody claims them: memory is full
    dropping.append(lambda: store.drop_uncovered(goes, 0))
    first = activation("first", clock, source=goes.id, offset=0)
    await insert(
        store, first, activation("behind", clock, source=stays.id, offset=0), taken={goes.id: 1, stays.id: 1}
    )
    assert ids(claim(store, 9, "pay")) == ["behind"]
    await settle_down(store)
    check_store(store)
    store.database.close()


async def test_turns_are_kept_from_call_to_call(store: Inflight, clock: ManualClock) -> None:
    """A worker that fetches one task at a time serves its namespaces in turn all the same."""
    for namespace in ("x", "y", "z"):
        await insert(store, *(activation(f"{namespace}{n}", clock, namespace=namespace) for n in range(4)))
    named = [claim(store, 1, "x", "y", "z")[0].namespace for _ in range(6)]
    assert sorted(named[:3]) == sorted(named[3:]) == ["x", "y", "z"]
    rest = [store.claim("shop", (), 1, BYTES)[0].namespace for _ in range(6)]
    assert sorted(rest[:3]) == sorted(rest[3:]) == ["x", "y", "z"]


async def test_one_answer_holds_no_more_bytes_than_asked_for(store: Inflight, clock: ManualClock) -> None:
    """But one task at a time whatever its size."""
    await insert(store, *(activation(str(n), clock, body=bytes(3_000)) for n in range(8)))
    await insert(store, activation("other", clock, namespace="other", body=bytes(3_000)))
    sizes = [len(store.claim(None, (), 9, bytes_max)) for bytes_max in (7_000, 1, 6_000, 99_000)]
    assert sizes == [3, 1, 2, 3]


async def test_a_broker_that_is_left_hands_nothing_out(store: Inflight, clock: ManualClock) -> None:
    await insert(store, activation("a", clock))
    store.claiming = False
    assert claim(store) == []
    store.claiming = True
    assert ids(claim(store)) == ["a"]


# -- limits


async def test_the_intake_pauses_at_its_limit_in_bytes(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(bytes_max=10_000))
    await insert(store, *(activation(str(n), clock, body=bytes(5_000)) for n in range(2)))
    assert store.room() == 0
    assert store.intake_state() == ("PAUSED", "bytes")
    await settled(store, token_of(store, claim(store)[0]), Event.COMPLETE)
    assert store.intake_state() == ("OPEN", "")
    assert store.room() > 0
    store.database.close()


async def test_namespaces_beyond_the_limit_are_dead_letters_that_say_so(
    store: Inflight, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflight, "PAIRS_MAX", 3)
    await insert(store, *(activation(f"n{n}", clock, namespace=f"n{n}") for n in range(10)))
    # Those that are known go on; what came too late takes one place more, for all of it.
    assert len(store.memory.counts) == 4
    assert sorted(ids(claim(store, 99))) == ["n0", "n1", "n2"]
    letters = await take_outbox(store)
    assert sorted(ids(letters)) == [f"n{n}" for n in range(3, 10)]
    assert all("namespaces" in json.loads(row.error or "")["message"] for row in letters)
    store.outbox.forwarded(letters)
    await settle_down(store)
    check_store(store)


# -- cover


async def test_each_of_those_who_wait_is_told_when_its_own_task_is_covered(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(4)]
    await insert(store, *rows, taken={source.id: 4})
    for row in claim(store, 4):
        await settled(store, token_of(store, row), Event.COMPLETE)
    told = [asyncio.ensure_future(store.covered([row.id_hash])) for row in rows]
    for covered in range(5):
        store.cover(source, covered)
        await steps()
        assert [wait.done() for wait in told] == [n < covered for n in range(4)]


async def test_what_left_before_a_restart_is_covered_in_its_place_in_the_log(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(2)]
    await insert(store, *rows, taken={source.id: 2})
    await settled(store, token_of(store, claim(store)[0]), Event.COMPLETE)
    store = reopen(store, clock)
    store.cover(store.source("tasks", 0), 1)
    assert [store.is_held(row.id_hash) for row in rows] == [False, True]
    store.database.close()


async def test_an_outcome_of_what_is_only_in_the_file_is_held_over_a_restart(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(window_rows_max=1))
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(3)]
    await insert(store, *rows, taken={source.id: 3})
    assert rows[2].seq not in store.memory.resident
    store.settle_by_id(rows[2].id_hash, Event.COMPLETE, clock.wall_ms())
    await settle_down(store)
    store = reopen(store, clock)
    assert store.is_held(rows[2].id_hash)
    store.cover(store.source("tasks", 0), 3)
    assert not store.is_held(rows[2].id_hash)
    store.database.close()


async def test_covered_tasks_stay_when_the_partition_goes(store: Inflight, clock: ManualClock) -> None:
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(6)]
    await insert(store, *rows, taken={source.id: 6})
    store.cover(source, 4)
    for boundary in (5, 0):
        store.drop_uncovered(source, boundary)
        await settle_down(store)
    assert ids(claim(store, 9)) == ["0", "1", "2", "3"]
    assert source.next == 4, "they are not read again"
    await settle_down(store)
    check_store(store)


async def test_what_waits_for_its_tick_moves_no_range_back(store: Inflight, clock: ManualClock) -> None:
    source = store.source("tasks", 0)
    store.insert([activation("a", clock, source=source.id, offset=0)], {source.id: 1})
    store.begin_range(source, 10)
    await settle_down(store)
    assert (source.start, source.next) == (10, 10)
    assert ids(claim(store)) == ["a"]


async def test_what_is_covered_stays_so_when_older_rows_are_restored(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    await insert(store, activation("a", clock, source=source.id, offset=3), taken={source.id: 4})
    store.cover(source, 4)
    store.begin_restored(source, -1, 2)
    (row,) = claim(store)
    await settled(store, token_of(store, row), Event.COMPLETE)
    assert not store.is_held(row.id_hash)


async def test_what_is_read_again_from_further_back_is_not_covered(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    await insert(store, activation("a", clock, source=source.id, offset=3), taken={source.id: 4})
    store.cover(source, 4)
    store.begin_range(source, 2)
    again = activation("b", clock, source=source.id, offset=2)
    await insert(store, again, taken={source.id: 3})
    for row in claim(store, 2):
        await settled(store, token_of(store, row), Event.COMPLETE)
    assert store.is_held(again.id_hash)


async def range_that_is_set_back(store: Inflight, clock: ManualClock) -> tuple[Source, list[Activation]]:
    """Ten rows were covered, all but the last two are claimed, and the group's offset is set to the sixth."""
    source = store.source("tasks", 0)
    await insert(store, *set_back_rows(source, clock, 0), taken={source.id: 10})
    store.cover(source, 10)
    claimed = claim(store, 8)
    await settle_down(store)
    store.begin_range(source, 5)
    await settle_down(store)
    return source, claimed


def set_back_rows(source: Source, clock: ManualClock, start: int) -> list[Activation]:
    """The last but one starts at most once."""
    return [
        activation(str(n), clock, source=source.id, offset=n, at_most_once=n == 8) for n in range(start, 10)
    ]


async def test_what_was_covered_before_the_offset_was_set_back_is_answered(
    store: Inflight, clock: ManualClock
) -> None:
    source, claimed = await range_that_is_set_back(store, clock)
    for event in (Event.COMPLETE, Event.COMPLETE):
        await settled(store, token_of(store, claimed[7]), event)
        told = asyncio.ensure_future(store.covered([claimed[7].id_hash]))
        await steps()
        assert told.done()
        assert told.result() == [True]
        # And once more when all is read, and covered, again.
        await insert(store, *set_back_rows(source, clock, 5), taken={source.id: 10})
        store.cover(source, 10)
        await settle_down(store)
        check_store(store)


async def test_what_was_covered_before_the_offset_was_set_back_stays_when_the_partition_goes(
    store: Inflight, clock: ManualClock
) -> None:
    source, claimed = await range_that_is_set_back(store, clock)
    assert ids(claim(store, 9)) == ["9"], "what starts at most once may start elsewhere now"
    await settled(store, token_of(store, claimed[7]), Event.FAIL)
    store.drop_uncovered(source, 5)
    await settle_down(store)
    check_store(store)
    letters = await take_outbox(store)
    assert ids(letters) == ["7"]
    store.outbox.forwarded(letters)
    # It comes back.
    store.begin_range(source, 5)
    await insert(store, *set_back_rows(source, clock, 5), taken={source.id: 10})
    assert not claim(store, 9)
    store.cover(source, 10)
    assert ids(claim(store, 9)) == ["8"]
    await settle_down(store)
    check_store(store)


async def test_what_was_not_covered_before_the_log_began_further_back_is_not_after_it(
    store: Inflight, clock: ManualClock
) -> None:
    """A log that lost its end is read from its beginning."""
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(4)]
    await insert(store, *rows, taken={source.id: 4})
    store.cover(source, 2)
    store.begin_range(source, 0)
    for row in claim(store, 4):
        await settled(store, token_of(store, row), Event.FAIL)
    assert [store.is_held(row.id_hash) for row in rows] == [False, False, True, True]
    check_store(store)
    assert ids(await take_outbox(store)) == ["0", "1"]


# -- the order of hand-out


async def test_what_comes_back_while_a_page_is_read_need_not_be_in_it(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Nor is the database damaged when all else that was to be in it has left in the same tick."""
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(window_rows_max=1))
    await insert(store, activation("a", clock))
    claimed = claim(store)
    await insert(store, activation("b", clock), activation("c", clock))
    assert sum(queue.spilled for queue in store.memory.index.pairs.values()) == 1
    handing = asyncio.ensure_future(store.hand_over(9, running=False))
    await asyncio.sleep(0)
    await store.writer.tick()  # finds b and c
    await asyncio.sleep(0)
    write = store.writer._handoff

    async def meanwhile(tick: Callable[[Batch], Written], batch: Batch) -> Written:
        written: Written = await write(tick, batch)
        store.release(claimed)
        return written

    store.writer._handoff = meanwhile
    await store.writer.tick()  # lets both go, and looks for c
    store.writer._handoff = write
    await settle_down(store)
    assert await handing == 2
    assert ids(claim(store)) == ["a"]
    await settle_down(store)
    check_store(store)
    store.database.close()


async def test_what_is_given_back_is_handed_out_again_though_nothing_else_comes(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock))
    claimed = claim(store)
    await settle_down(store)
    assert await settled(store, token_of(store, claimed[0]), Event.RELEASE) is Answer.APPLIED
    assert ids(claim(store)) == ["a"]


async def test_what_comes_back_may_be_dropped_while_that_is_written(
    store: Inflight, clock: ManualClock
) -> None:
    """A worker gives up its call, and the partition is lost in the same moment: no page lacks anything."""
    source = store.source("tasks", 0)
    await insert(store, activation("a", clock, source=source.id, offset=0), taken={source.id: 1})
    claimed = claim(store)
    await settle_down(store)
    write, drops = store.writer._handoff, []

    async def meanwhile(tick: Callable[[Batch], Written], batch: Batch) -> Written:
        written: Written = await write(tick, batch)
        drops.append(store.drop_uncovered(source, 0))
        return written

    store.writer._handoff = meanwhile
    store.release(claimed)
    await store.writer.tick()
    store.writer._handoff = write
    await settle_down(store)
    assert await drops[0] == 1
    check_store(store)
    await insert(store, activation("a", clock, source=source.id, offset=0), taken={source.id: 1})
    assert ids(claim(store)) == ["a"]


async def test_what_becomes_due_when_new_tasks_come_is_handed_out(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("late", clock, delay_ms=1_000))
    clock.advance(1_000)
    await insert(store, activation("new", clock))
    check_store(store)
    assert ids(claim(store, 9)) == ["new", "late"]


@pytest.mark.parametrize("running", [False, True])
async def test_what_is_claimed_while_a_drain_looks_for_tasks_stays_with_its_worker(
    store: Inflight, clock: ManualClock, running: bool
) -> None:
    """Until running ones are to leave, and what must not start twice even then."""
    await insert(store, activation("a", clock, at_most_once=running))
    write, claimed = store.writer._handoff, []

    async def meanwhile(tick: Callable[[Batch], Written], batch: Batch) -> Written:
        written: Written = await write(tick, batch)
        claimed.extend(claim(store))
        return written

    store.writer._handoff = meanwhile
    handing = asyncio.ensure_future(store.hand_over(9, running))
    await asyncio.sleep(0)
    await store.writer.tick()
    store.writer._handoff = write
    await asyncio.sleep(0)
    await settle_down(store)
    await handing
    assert await settled(store, token_of(store, claimed[0]), Event.COMPLETE) is Answer.APPLIED


async def test_what_is_dropped_is_in_the_books_when_its_rows_are_gone(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Whatever happens after that tick."""
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)
    await insert(store, activation("a", clock, source=source.id, offset=0), taken={source.id: 1})
    dropped = store.drop_uncovered(source, 0)
    await store.writer.tick()
    assert await dropped == 1
    store.database.close()
    store = open_store(tmp_path / "store.sqlite", clock)
    assert store.memory.rows == store.imbalance() == 0
    store.database.close()


async def test_what_is_dropped_is_not_read_with_its_bodies(
    store: Inflight, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a partition's uncovered rows go at once."""
    loaded: list[Activation] = []
    load = Database.load

    def remembering(*args: Any, **kwargs: Any) -> list[Activation]:
        loaded.extend(rows := load(*args, **kwargs))
        return rows

    monkeypatch.setattr(Database, "load", remembering)
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n, body=b"x" * 2000) for n in range(3)]
    await insert(store, *rows, taken={source.id: 3})
    dropped = store.drop_uncovered(source, 0)
    await settle_down(store)
    assert await dropped == 3
    assert not any(row.body for row in loaded)
    check_store(store)


# -- the outbox


async def test_a_dead_letter_leaves_after_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock))
    await settled(store, token_of(store, claim(store)[0]), Event.FAIL)
    store = reopen(store, clock)
    assert store.outbox.waits(Route.DEAD_LETTER)
    assert ids(await take_outbox(store)) == ["a"]
    store.database.close()


# -- attempts


async def test_a_budget_of_attempts_holds_over_restarts(tmp_path: Path, clock: ManualClock) -> None:
    store, starts = open_store(tmp_path / "store.sqlite", clock), 0
    await insert(store, activation("a", clock, max_attempts=3))
    while rows := claim(store):
        starts += 1
        assert starts <= 3
        assert await settled(store, token_of(store, rows[0]), Event.RETRY, 0) is Answer.APPLIED
        store = reopen(store, clock)
        await settle_down(store)
    assert starts == 3
    assert store.outbox.size() == 1
    store.database.close()
