"""The rules of claims, retries, time and ownership, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of
from structlog.testing import capture_logs

from penstock_broker.domain.activation import Activation, OnExceeded, Reason, Route, Status, hash_id
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store.batch import Answer, Batch, Report, Written
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import OVERFLOW_CALM_MS, Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.partitions import Source
from penstock_broker.store.writer import StoreStopped

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


def claim_one(store: Inflight, **how: object) -> Activation:
    (row,) = store.claim(None, (), 1, BYTES, **how)  # type: ignore[arg-type]
    return row


async def settled(store: Inflight, token: ClaimToken, event: Event, delay: int | None = None) -> Answer:
    answer = store.settle(token, event, store.clock.wall_ms(), delay)
    await settle_down(store)
    return answer.answer if isinstance(answer, Report) else answer


async def take_outbox(store: Inflight, route: Route = Route.DEAD_LETTER) -> list[Activation]:
    taking = asyncio.ensure_future(store.outbox.take(route, 10, BYTES))
    await asyncio.sleep(0)
    await settle_down(store)
    return await taking


def reopen(store: Inflight, clock: ManualClock, limits: StoreLimits | None = None) -> Inflight:
    """As after SIGKILL: what was not in a tick is gone."""
    store.database.close()
    return open_store(store.database.path, clock, limits)


async def with_forgotten_claim(tmp_path: Path, clock: ManualClock) -> tuple[Inflight, ClaimToken]:
    """A store whose restart has forgotten a claim, which never reached the row, and its token."""
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock))
    token = token_of(store, claim_one(store))
    return reopen(store, clock), token


async def test_a_report_under_an_earlier_boots_claim_is_applied_once(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("durable", clock), activation("forgotten", clock))
    durable = token_of(store, claim_one(store))
    await settle_down(store)
    forgotten = token_of(store, claim_one(store))  # this claim never reaches the rows
    store = reopen(store, clock)
    await settle_down(store)
    assert await settled(store, durable, Event.COMPLETE) is Answer.APPLIED
    assert await settled(store, forgotten, Event.COMPLETE) is Answer.APPLIED
    assert await settled(store, forgotten, Event.COMPLETE) is Answer.DUPLICATE
    assert store.memory.rows == 0
    store.database.close()


async def test_a_forgotten_claim_is_stale_once_somebody_else_has_the_task(
    tmp_path: Path, clock: ManualClock
) -> None:
    store, forgotten = await with_forgotten_claim(tmp_path, clock)
    await settle_down(store)
    current = token_of(store, claim_one(store))
    await settle_down(store)
    for event in (Event.COMPLETE, Event.RETRY, Event.FAIL, Event.RELEASE):
        assert await settled(store, forgotten, event) is Answer.STALE
    assert store.extend(forgotten, started=True) is Answer.STALE
    assert await settled(store, current, Event.COMPLETE) is Answer.APPLIED
    store.database.close()


async def test_a_heartbeat_re_establishes_a_claim_that_a_restart_had_forgotten(
    tmp_path: Path, clock: ManualClock
) -> None:
    store, token = await with_forgotten_claim(tmp_path, clock)
    await settle_down(store)
    assert store.extend(token, started=True) is Answer.APPLIED
    await settle_down(store)
    assert store.claim(None, (), 1, BYTES) == []
    check_store(store)
    store = reopen(store, clock)
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED
    store.database.close()


async def test_a_claim_that_a_heartbeat_re_established_ends_when_its_worker_vanishes(
    tmp_path: Path, clock: ManualClock
) -> None:
    store, token = await with_forgotten_claim(tmp_path, clock)
    await settle_down(store)
    assert store.extend(token, started=False) is Answer.APPLIED
    clock.advance(store.limits.lease_ms + 1_000)
    assert store.lapse(clock.mono_ms()) == 1
    store.database.close()


async def test_an_answer_is_repeated_after_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock, max_attempts=2))
    first = token_of(store, claim_one(store))
    assert await settled(store, first, Event.RETRY, 0) is Answer.APPLIED
    second = token_of(store, claim_one(store))
    assert await settled(store, second, Event.COMPLETE) is Answer.APPLIED
    store = reopen(store, clock)
    assert await settled(store, second, Event.COMPLETE) is Answer.DUPLICATE
    assert await settled(store, second, Event.FAIL) is Answer.STALE
    assert await settled(store, first, Event.RETRY) is Answer.STALE
    store.database.close()


@pytest.mark.parametrize("event", [Event.COMPLETE, Event.RETRY])
async def test_a_claim_made_anew_after_a_restart_is_not_the_one_it_forgot(
    tmp_path: Path, clock: ManualClock, event: Event
) -> None:
    """Both have the same number; an outcome of the one says nothing of the other."""
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock, max_attempts=2))
    forgotten = token_of(store, claim_one(store))
    store = reopen(store, clock)
    await settle_down(store)
    anew = token_of(store, claim_one(store))
    assert forgotten.claim == anew.claim
    assert await settled(store, anew, event) is Answer.APPLIED
    assert await settled(store, forgotten, event) is Answer.STALE
    assert await settled(store, anew, event) is Answer.DUPLICATE
    store.database.close()


async def test_an_uncovered_outcome_is_held_over_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)
    await insert(store, activation("a", clock, source=source.id, offset=0), taken={source.id: 1})
    row = claim_one(store)
    token = token_of(store, row)
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED
    store = reopen(store, clock)
    assert await settled(store, token, Event.COMPLETE) is Answer.DUPLICATE
    assert store.is_held(row.id_hash)
    told = asyncio.ensure_future(store.covered([row.id_hash]))
    await asyncio.sleep(0)
    store.drop_uncovered(store.source("tasks", 0), 0)
    await settle_down(store)
    assert await told == [False], "another broker runs it again"
    store.database.close()


async def test_tokens_that_were_never_given_are_unknown(store: Inflight, clock: ManualClock) -> None:
    await insert(store, activation("a", clock))
    token = token_of(store, claim_one(store))
    garbled = token._replace(id_hash=token.id_hash ^ 1)
    for wrong in (token._replace(nonce=token.nonce ^ 1), token._replace(epoch=99), garbled):
        assert await settled(store, wrong, Event.COMPLETE) is Answer.UNKNOWN
        assert store.extend(wrong, started=False) is Answer.UNKNOWN
    assert await settled(store, token._replace(claim=5), Event.COMPLETE) is Answer.STALE


async def test_retries_wait_in_the_store_and_then_carry_their_attempts(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock, max_attempts=3))
    assert await settled(store, token_of(store, claim_one(store)), Event.RETRY, 2_000) is Answer.APPLIED
    clock.advance(2_000)
    await settle_down(store)
    assert store.claim(None, (), 1, BYTES) == []
    clock.advance(1)
    await settle_down(store)
    row = claim_one(store)
    assert (row.attempts, row.claim) == (1, 1)
    assert row.body == b"body of a"


async def test_a_delay_survives_a_restart_and_is_never_early(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock, delay_ms=5_000))
    store = reopen(store, clock)
    clock.advance(4_999)
    await settle_down(store)
    assert store.claim(None, (), 1, BYTES) == []
    clock.advance(1)
    await settle_down(store)
    assert claim_one(store).id == "a"
    store.database.close()


async def test_what_became_due_while_the_broker_was_away_is_due(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("delay", clock, delay_ms=5_000))
    await insert(store, activation("expiry", clock, delay_ms=9_000, expires_ms=5_000))
    clock.advance(5_000)
    store = reopen(store, clock)
    await settle_down(store)
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["delay"]
    assert [row.id for row in await take_outbox(store)] == ["expiry"]
    store.database.close()


@pytest.mark.parametrize("policy", [OnExceeded.DISCARD, OnExceeded.DEADLETTER])
async def test_what_expires_never_starts(store: Inflight, clock: ManualClock, policy: OnExceeded) -> None:
    await insert(
        store,
        activation("pending", clock, expires_ms=1_000, on_exceeded=policy),
        activation("delayed", clock, expires_ms=1_000, delay_ms=2_000, on_exceeded=policy),
    )
    clock.advance(1_000)
    assert store.claim(None, (), 2, BYTES) == []
    await settle_down(store)
    clock.advance(5_000)
    await settle_down(store)
    assert store.claim(None, (), 2, BYTES) == []
    await settle_down(store)
    assert store.outbox.size() == (2 if policy is OnExceeded.DEADLETTER else 0)
    if policy is OnExceeded.DISCARD:
        assert store.memory.books[1, "discarded:expired"] == 2
    check_store(store)


async def test_a_lease_that_is_not_extended_gives_the_task_to_another(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock))
    first = token_of(store, claim_one(store))
    clock.advance(14_000)
    assert store.extend(first, started=True) is Answer.APPLIED
    clock.advance(14_000)
    assert store.lapse(clock.mono_ms()) == 0
    clock.advance(2_000)
    assert store.lapse(clock.mono_ms()) == 1
    await settle_down(store)
    row = claim_one(store)
    assert (row.attempts, row.lost) == (0, 1)
    assert await settled(store, first, Event.COMPLETE) is Answer.STALE
    assert await settled(store, token_of(store, row), Event.COMPLETE) is Answer.APPLIED


async def test_a_started_task_is_not_extended_past_its_deadline(store: Inflight, clock: ManualClock) -> None:
    """The worker kills it at the deadline; should it not, the broker's own bound takes it back."""
    await insert(store, activation("a", clock))
    token = token_of(store, claim_one(store))
    store.extend(token, started=True)
    lapsed = 0
    for _ in range(40):
        clock.advance(1_000)
        store.extend(token, started=True)
        lapsed += store.lapse(clock.mono_ms())
    assert lapsed == 1


def of_an_hour(id: str, clock: ManualClock) -> Activation:
    row = activation(id, clock)
    row.deadline_ms = 3_600_000
    return row


async def test_claims_get_a_full_lease_after_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock))
    token = token_of(store, claim_one(store))
    await settle_down(store)
    clock.advance(14_000)
    store = reopen(store, clock)
    clock.advance(14_000)
    assert store.lapse(clock.mono_ms()) == 0
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED
    store.database.close()


@pytest.mark.parametrize(("tokenless", "seconds"), [(False, 15), (True, 3_615)])
async def test_only_a_client_without_heartbeats_gets_its_deadline_after_a_restart(
    tmp_path: Path, clock: ManualClock, tokenless: bool, seconds: int
) -> None:
    """Where worker and broker went down together, its task waits no longer for it than for any other."""
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, of_an_hour("a", clock))
    (row,) = store.claim(None, (), 1, BYTES, tokenless=tokenless)
    await settle_down(store)
    store = reopen(store, clock)
    clock.advance(seconds * 1000 - 1)
    store.lapse(clock.mono_ms())
    assert store.memory.counts[row.pair][Status.PROCESSING] == 1
    clock.advance(252)
    assert store.lapse(clock.mono_ms()) >= 1
    assert store.memory.counts[row.pair][Status.PROCESSING] == 0
    store.database.close()


async def test_a_worker_that_dies_after_a_restart_is_missed_as_soon_as_ever(
    tmp_path: Path, clock: ManualClock
) -> None:
    """The lease that a restart gives may be longer than one of its heartbeats."""
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, of_an_hour("a", clock))
    (row,) = store.claim(None, (), 1, BYTES, tokenless=True)
    token = token_of(store, row)
    await settle_down(store)
    store = reopen(store, clock)
    assert store.extend(token, started=True) is Answer.APPLIED
    clock.advance(store.limits.lease_ms + 251)
    assert store.lapse(clock.mono_ms()) == 1
    store.database.close()


async def test_a_claim_that_memory_does_not_hold_yet_is_not_taken_from_its_worker(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock), activation("gone", clock))
    gone = token_of(store, claim_one(store))
    token = token_of(store, claim_one(store))
    store = reopen(store, clock)
    # Before the first tick pages them in.
    assert store.extend(token, started=True) is Answer.APPLIED
    assert await settled(store, gone, Event.COMPLETE) is Answer.APPLIED
    assert store.extend(gone, started=True) is Answer.STALE
    assert store.extend(token, started=True) is Answer.APPLIED
    assert store.claim(None, (), 1, BYTES) == []
    store.database.close()


async def test_a_heartbeat_that_overtakes_a_report_does_not_spoil_it(
    tmp_path: Path, clock: ManualClock
) -> None:
    store, token = await with_forgotten_claim(tmp_path, clock)
    report = store.settle(token, Event.COMPLETE, clock.wall_ms())
    assert isinstance(report, Report)
    # It came while the tick was written that pages the row in.
    store.memory.batch.reports.remove(report)
    await store.writer.tick()
    store.memory.batch.reports.append(report)
    assert store.extend(token, started=True) is Answer.APPLIED
    await settle_down(store)
    assert report.answer is Answer.APPLIED
    assert store.memory.rows == 0
    store.database.close()


async def test_a_report_that_comes_twice_for_one_tick_is_a_duplicate(
    tmp_path: Path, clock: ManualClock
) -> None:
    store, token = await with_forgotten_claim(tmp_path, clock)
    events = (Event.COMPLETE, Event.COMPLETE, Event.FAIL)
    told = [store.settle(token, event, clock.wall_ms()) for event in events]
    await settle_down(store)
    answers = [report.answer for report in told if isinstance(report, Report)]
    assert answers == [Answer.APPLIED, Answer.DUPLICATE, Answer.STALE]
    store.database.close()


async def test_a_report_that_is_repeated_as_its_dead_letter_leaves_is_a_duplicate(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock))
    token = token_of(store, claim_one(store))
    assert await settled(store, token, Event.FAIL) is Answer.APPLIED
    letters = await take_outbox(store)
    again = store.settle(token, Event.FAIL, clock.wall_ms())
    store.outbox.forwarded(letters)
    await settle_down(store)
    assert isinstance(again, Report)
    assert again.answer is Answer.DUPLICATE


async def test_a_broker_that_stood_still_gives_a_started_task_that_time_too(
    store: Inflight, clock: ManualClock
) -> None:
    """A machine that was suspended: its workers did not run meanwhile either."""
    await insert(store, activation("a", clock))
    token = token_of(store, claim_one(store))
    store.extend(token, started=True)
    clock.advance(3_600_000)
    store.postpone_leases(3_600_000)
    for _ in range(4):
        clock.advance(5_000)
        assert store.extend(token, started=True) is Answer.APPLIED
        assert store.lapse(clock.mono_ms()) == 0
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED


async def test_a_broker_that_stood_still_judges_no_lease_by_that_time(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock))
    claim_one(store)
    clock.advance(60_000)
    store.postpone_leases(60_000)
    assert store.lapse(clock.mono_ms()) == 0


async def test_an_outcome_waits_for_cover_and_so_does_its_repetition(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 3)
    await insert(store, activation("a", clock, source=source.id, offset=7), taken={source.id: 8})
    row = claim_one(store)
    token = token_of(store, row)
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED
    told = [asyncio.ensure_future(store.covered([row.id_hash])) for _ in range(2)]
    store.cover(source, 7)
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in told)
    assert await settled(store, token, Event.COMPLETE) is Answer.DUPLICATE
    assert store.is_held(row.id_hash)
    store.cover(source, 8)
    assert await asyncio.gather(*told) == [[True], [True]]
    assert not store.is_held(row.id_hash)


async def test_an_uncovered_outcome_is_refused_when_another_broker_reads_the_task_again(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(4)]
    await insert(store, *rows, taken={source.id: 4})
    store.cover(source, 2)
    claimed = store.claim(None, (), 3, BYTES)
    for row in claimed:
        await settled(store, token_of(store, row), Event.COMPLETE)
    waiting = asyncio.ensure_future(store.covered([row.id_hash for row in claimed]))
    await asyncio.sleep(0)
    dropping = store.drop_uncovered(source, 2)
    await settle_down(store)
    # Offset 3 was never claimed and is dropped; offset 2 was done here, but not acknowledged.
    assert await dropping == 1
    assert await waiting == [True, True, False]
    assert store.memory.rows == 0
    check_store(store)
    # Whoever reads it next may be this broker again.
    await insert(store, activation("3", clock, source=source.id, offset=3), taken={source.id: 4})
    assert claim_one(store).id == "3"


@pytest.mark.parametrize("event", [Event.FAIL, Event.RETRY])
async def test_of_an_outcome_and_a_drop_in_one_tick_nothing_is_left_in_the_ledger(
    store: Inflight, clock: ManualClock, event: Event
) -> None:
    source = store.source("tasks", 0)
    row = activation("a", clock, source=source.id, offset=0)
    await insert(store, row, taken={source.id: 1})
    claimed = claim_one(store)
    await settle_down(store)
    store.settle(token_of(store, claimed), event, clock.wall_ms())
    store.drop_uncovered(source, 0)
    await settle_down(store)
    await insert(store, activation("a", clock, source=source.id, offset=0), taken={source.id: 1})
    check_store(store)


async def test_a_range_that_begins_further_back_is_not_undone_by_what_still_waits(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    store.begin_range(source, 100)
    await settle_down(store)
    store.insert([activation("a", clock, source=source.id, offset=119)], {source.id: 120})
    store.begin_range(source, 0)
    await settle_down(store)
    assert (source.start, source.next) == (0, 0)


async def test_an_outcome_whose_row_is_dropped_while_it_is_written_is_refused(
    store: Inflight, clock: ManualClock
) -> None:
    """Of a row that memory does not hold."""
    source = store.source("tasks", 0)
    later = activation("a", clock, source=source.id, offset=0, delay_ms=60_000)
    await insert(store, later, taken={source.id: 1})
    cancelled = store.control.cancel(later.id_hash)
    handoff = store.writer._handoff

    async def dropping(write: Callable[[Batch], Written], batch: Batch) -> Written:
        written: Written = await handoff(write, batch)
        store.writer._handoff = handoff
        store.drop_uncovered(source, 0)
        return written

    store.writer._handoff = dropping
    await settle_down(store)
    assert isinstance(cancelled, Report)
    assert cancelled.answer is Answer.APPLIED
    told = asyncio.ensure_future(store.covered([later.id_hash]))
    await asyncio.wait({told}, timeout=1)
    assert told.done()
    assert told.result() == [False]
    # Nobody was told that it is done: the log brings it back.
    again = activation("a", clock, source=source.id, offset=0)
    await insert(store, again, taken={source.id: 1})
    assert [row.id for row in store.claim(None, (), 1, BYTES)] == ["a"]
    await settle_down(store)
    check_store(store)


async def test_an_outcome_is_refused_also_when_its_row_is_read_again_while_others_are_waited_for(
    store: Inflight, clock: ManualClock
) -> None:
    """One of the same call, of a partition that stays; and this broker itself reads the row again."""
    stays, goes = store.source("tasks", 0), store.source("tasks", 1)
    for id, source in (("stays", stays), ("goes", goes)):
        await insert(store, activation(id, clock, source=source.id, offset=0), taken={source.id: 1})
    claimed = store.claim(None, (), 2, BYTES)
    for row in claimed:
        await settled(store, token_of(store, row), Event.COMPLETE)
    waiting = asyncio.ensure_future(store.covered([row.id_hash for row in claimed]))
    await asyncio.sleep(0)
    store.drop_uncovered(goes, 0)
    await settle_down(store)
    await insert(store, activation("goes", clock, source=goes.id, offset=0), taken={goes.id: 1})
    store.cover(stays, 1)
    assert dict(zip([row.id for row in claimed], await waiting, strict=True)) == {
        "stays": True,
        "goes": False,
    }


@pytest.mark.parametrize(
    ("when", "status"),
    [
        (lambda batch: batch.rows, Status.PENDING),
        (lambda batch: batch.rows, Status.FORWARDING),
        (lambda batch: batch.due_at is not None, Status.PENDING),
        (lambda batch: batch.reports, Status.DELAYED),
    ],
    ids=["stored", "stored to leave", "its expiry noticed", "its expiry written"],
)
async def test_a_task_may_be_dropped_in_the_middle_of_a_tick(
    tmp_path: Path, clock: ManualClock, when: Callable[[Batch], object], status: Status
) -> None:
    drops: list[asyncio.Future[int]] = []

    async def handoff(write: Callable[[Batch], Written], batch: Batch) -> Written:
        written = write(batch)
        if not drops and when(batch):
            drops.append(store.drop_uncovered(source, 0))
        return written

    limits = StoreLimits()
    database = Database(tmp_path / "store.sqlite", limits.lifecycle, clock.wall_ms())
    store = Inflight(database, clock, limits, handoff)
    source = store.source("tasks", 0)
    row = activation("a", clock, source=source.id, offset=0, expires_ms=1000)
    row.on_exceeded = OnExceeded.DEADLETTER
    row.status, row.ready_at = status, row.ready_at + 5000 * (status is Status.DELAYED)
    row.reason = Reason.EXPIRED if status is Status.FORWARDING else None
    await insert(store, row, taken={source.id: 1})
    clock.advance(1000)
    await settle_down(store)
    assert [await drop for drop in drops] == [1]
    check_store(store)
    store.database.close()


async def test_after_a_restart_an_uncovered_task_does_not_start_before_it_is_known_whose_it_is(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Another broker may have taken the partition over, and have finished it."""
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(4)]
    await insert(store, *rows, taken={source.id: 4})
    store.cover(source, 1)
    await settle_down(store)
    store = reopen(store, clock)
    await settle_down(store)
    source = store.source("tasks", 0)
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["0"]
    store.drop_uncovered(source, 3)
    store.settle_dispute(source)
    await settle_down(store)
    check_store(store)
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["1", "2"]
    store.database.close()


async def test_a_lost_partitions_uncovered_tasks_do_not_start(store: Inflight, clock: ManualClock) -> None:
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, source=source.id, offset=n) for n in range(3)]
    await insert(store, *rows, taken={source.id: 3})
    store.cover(source, 1)
    store.dispute(source)
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["0"]
    await settle_down(store)
    check_store(store)
    store.cover(source, 2)
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["1"]
    store.settle_dispute(source)
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["2"]


async def test_an_at_most_once_task_waits_for_cover_before_it_starts(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    careful = activation("careful", clock, source=source.id, offset=0, at_most_once=True)
    plain = activation("plain", clock, source=source.id, offset=1)
    await insert(store, careful, plain, taken={source.id: 2})
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["plain"]
    store.cover(source, 2)
    assert [row.id for row in store.claim(None, (), 9, BYTES)] == ["careful"]


async def test_what_was_covered_stays_so_whatever_offset_is_told_later(
    store: Inflight, clock: ManualClock
) -> None:
    """One that was asked for before the last commit, or none at all."""
    source = store.source("tasks", 0)
    rows = [activation(f"{n}", clock, at_most_once=True, source=source.id, offset=n) for n in range(3)]
    await insert(store, *rows, taken={source.id: 3})
    for offset in (3, 1, 0):
        store.cover(source, offset)
        await settle_down(store)
        assert source.covered == 3
    assert len(store.claim(None, (), 9, BYTES)) == 3


@pytest.mark.parametrize("first", ["waits", "waits in its row", "is claimed", "is done"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_an_id_taken_for_something_else_is_a_conflict(
    tmp_path: Path, clock: ManualClock, first: str, restarted: bool
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock, delay_ms=1000 if first == "waits in its row" else 0))
    if first in ("is claimed", "is done"):
        token = token_of(store, claim_one(store))
    if first == "is done":
        await settled(store, token, Event.COMPLETE)
    if restarted:
        store = reopen(store, clock)
    before = store.memory.rows
    for _ in range(2):
        await insert(store, activation("a", clock, content=b"something else", body=b"other"))
    assert store.memory.rows == before + 1
    (letter,) = await take_outbox(store)
    assert (letter.reason, letter.body) == (Reason.CONFLICT, b"other")
    assert "the id a belongs to another task already" in (letter.error or "")
    await insert(store, activation("a", clock))
    assert store.memory.rows == before + 1
    store.outbox.give_back(Route.DEAD_LETTER, [letter])
    check_store(store)


async def test_each_that_is_in_conflict_with_an_id_is_a_dead_letter(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    contents = (b"the first", b"x", b"y", b"x")
    await insert(store, *(activation("a", clock, content=content) for content in contents))
    sent_on = [read_back("a", clock, source, 0), read_back("a", clock, source, 1)]
    sent_on[0].content += 1
    store.insert(sent_on, {source.id: 2})
    store.cover(source, 2)
    await settle_down(store)
    assert [letter.reason for letter in await take_outbox(store)] == [Reason.CONFLICT] * 4
    assert claim_one(store).content == activation("a", clock, content=contents[0]).content


async def test_what_is_dead_when_it_arrives_died_then(
    store: Inflight, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = 3_600_000
    sent_at, late = clock.wall, activation("late", clock, expires_ms=hour)
    clock.advance(3 * hour)
    await insert(store, activation("first", clock), late)
    await insert(store, activation("first", clock, content=b"something else", delay_ms=24 * hour))
    monkeypatch.setattr("penstock_broker.store.inflight.PAIRS_MAX", 1)
    await insert(store, activation("one too many", clock, namespace="another", delay_ms=24 * hour))
    letters = await take_outbox(store)
    assert [letter.reason for letter in letters] == [Reason.EXPIRED, Reason.CONFLICT, Reason.INVALID]
    assert [letter.ready_at for letter in letters] == [sent_at + 3 * hour] * 3
    # Restored, it died when it did.
    died = activation("first", clock, content=b"a third thing")
    died.status, died.reason, died.ready_at = Status.FORWARDING, Reason.CONFLICT, sent_at
    await insert(store, died)
    assert [letter.ready_at for letter in await take_outbox(store)] == [sent_at]


@pytest.mark.parametrize("contents", [(0, 1), (1, 0)])
async def test_a_copy_is_no_conflict_where_it_is_not_known_what_it_asks_for(
    store: Inflight, clock: ManualClock, contents: tuple[int, int]
) -> None:
    for content in contents:
        row = activation("a", clock)
        row.content = content
        await insert(store, row)
    assert (store.memory.rows, store.memory.tally.duplicates) == (1, 1)
    assert store.outbox.size() == 0


async def test_what_nobody_asks_for_ages_out_to_the_dead_letters(tmp_path: Path, clock: ManualClock) -> None:
    day = 86_400_000
    limits = StoreLimits(window_rows_max=2, unclaimable_ms=7 * day)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    rows = [
        activation(f"{namespace} {n}", clock, namespace=namespace) for n in range(5) for namespace in "ab"
    ]
    await insert(store, *rows)

    async def look() -> int:
        store.unclaimable.look(clock.mono_ms())
        await settle_down(store)
        check_store(store)
        return store.outbox.size()

    clock.advance(6 * day)
    assert store.claim("shop", ("b",), 1, 0) == []
    await insert(store, activation("late", clock, namespace="a"))
    clock.advance(day - 1)
    assert await look() == 0
    assert [queue.namespace for queue, _ in store.unclaimable.pending()] == ["a", "b"]
    clock.advance(1)
    while store.outbox.size() < 5:
        assert await look() > 0
    assert await look() == 5
    assert store.memory.rows == 11
    (letter, *others) = await take_outbox(store)
    assert (letter.reason, len(others)) == (Reason.UNCLAIMED, 4)
    assert "no worker has asked for namespace 'a' of application 'shop' for 604800 s" in (letter.error or "")


async def test_what_nobody_asks_for_ages_out_however_much_it_is(tmp_path: Path, clock: ManualClock) -> None:
    """All of it in memory, in which what has left leaves its place behind for a while."""
    day = 86_400_000
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(unclaimable_ms=day))
    await insert(store, *(activation(str(n), clock) for n in range(2_500)))
    clock.advance(day)
    for letters in (1_000, 2_000, 2_500):
        store.unclaimable.look(clock.mono_ms())
        await settle_down(store)
        assert store.outbox.size() == letters
    store.database.close()


async def test_what_came_lately_does_not_age_out(tmp_path: Path, clock: ManualClock) -> None:
    """Though nobody has asked for its namespace for longer, and most of it is not in memory."""
    day = 86_400_000
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(window_rows_max=2, unclaimable_ms=day))
    store.pair("shop", "pay")
    clock.advance(2 * day)
    await insert(store, *(activation(str(n), clock) for n in range(5)))
    clock.advance(day - 1)
    for _ in range(3):
        store.unclaimable.look(clock.mono_ms())
        await settle_down(store)
    assert store.outbox.size() == 0
    store.database.close()


@pytest.mark.parametrize("asked", [None, (None, ()), ("shop", ()), ("shop", ("mail", "pay"))])
async def test_what_a_worker_asked_for_lately_stays_and_so_it_does_after_a_restart(
    tmp_path: Path, clock: ManualClock, asked: tuple[str | None, tuple[str, ...]] | None
) -> None:
    day = 86_400_000
    limits = StoreLimits(unclaimable_ms=day)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, activation("a", clock))
    clock.advance(2 * day)
    if asked is None:
        store = reopen(store, clock, limits)
        await settle_down(store)
    else:
        assert store.claim(*asked, 1, 0) == []
    assert store.unclaimable.pending() == []
    store.unclaimable.look(clock.mono_ms())
    await settle_down(store)
    assert claim_one(store).id == "a"
    store.database.close()


async def test_the_same_id_is_absorbed_while_it_is_here_and_after_it_left(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock), activation("a", clock))
    assert (store.memory.rows, store.memory.tally.duplicates) == (1, 1)
    await settled(store, token_of(store, claim_one(store)), Event.COMPLETE)
    await insert(store, activation("a", clock))
    store = reopen(store, clock)
    await insert(store, activation("a", clock))
    assert store.memory.rows == 0
    clock.advance(2 * 3_600_000)
    store.forget_finished()
    await settle_down(store)
    await insert(store, activation("a", clock))
    assert store.memory.rows == 1
    store.database.close()


def taken_by_another(store: Inflight, *rows: Activation) -> None:
    store.remember(1, {hash_id(row.id): row.content for row in rows}, {})


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_another_broker_has_taken_is_known_here_when_it_comes_again(
    tmp_path: Path, clock: ManualClock, restarted: bool
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)
    taken_by_another(store, activation("a", clock))
    # What is older in the log is looked through later, and goes before it.
    taken_by_another(store, activation("b", clock, content=b"newer"))
    taken_by_another(store, activation("b", clock))
    await settle_down(store)
    if restarted:
        store = reopen(store, clock)
    await insert(store, activation("a", clock), activation("b", clock))
    assert (store.memory.rows, store.memory.tally.duplicates) == (0, 2)
    await insert(store, activation("b", clock, content=b"newer"))
    (letter,) = await take_outbox(store)
    assert letter.reason == Reason.CONFLICT
    store.outbox.give_back(Route.DEAD_LETTER, [letter])
    # What was sent on goes on, once.
    for offset in (0, 1):
        store.insert([read_back("a", clock, store.source("tasks", 0), offset)], {source.id: offset + 1})
    await settle_down(store)
    assert store.memory.rows == 2
    check_store(store)
    store.database.close()


async def test_what_was_sent_on_and_taken_by_another_broker_is_taken_once(
    store: Inflight, clock: ManualClock
) -> None:
    source = store.source("tasks", 0)
    row = read_back("a", clock, source, 7)
    # Newer copies are met first.
    store.remember(source.id, {hash_id("a"): row.content}, {row.sent_on: 5})
    store.remember(source.id, {hash_id("a"): row.content}, {row.sent_on: 3})
    await insert(store, row)
    assert (store.memory.rows, store.memory.tally.duplicates) == (0, 1)
    # The very one that was taken is restored, or adopted.
    store.insert([read_back("a", clock, source, 3)], {}, "adopted")
    await settle_down(store)
    assert store.memory.rows == 1
    check_store(store)


async def test_what_another_broker_has_taken_is_adopted(store: Inflight, clock: ManualClock) -> None:
    taken_by_another(store, activation("a", clock), activation("b", clock))
    await insert(store, activation("a", clock))
    assert store.memory.rows == 0
    for _ in range(2):
        store.insert([activation("a", clock)], {}, "adopted")
        await settle_down(store)
    assert (store.memory.rows, store.memory.tally.duplicates) == (1, 2)
    # What is known of it here is newer than what the other one had of it.
    clock.advance(store.limits.dedup_window_ms // 2)
    token = token_of(store, claim_one(store))
    for answer in (Answer.APPLIED, Answer.DUPLICATE):
        assert await settled(store, token, Event.COMPLETE) is answer
    store.insert([activation("a", clock)], {}, "adopted")
    await settle_down(store)
    assert store.memory.rows == 0
    check_store(store)


async def test_what_is_known_here_goes_before_what_another_broker_has_taken(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("done", clock))
    token = token_of(store, claim_one(store))
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED
    await insert(store, activation("here", clock))
    others = [activation(id, clock, content=b"something else") for id in ("done", "here")]
    taken_by_another(store, *others)
    await settle_down(store)
    assert await settled(store, token, Event.COMPLETE) is Answer.DUPLICATE
    await insert(store, activation("done", clock), activation("here", clock))
    assert (store.memory.rows, store.memory.tally.duplicates) == (1, 2)
    assert await settled(store, token_of(store, claim_one(store)), Event.COMPLETE) is Answer.APPLIED
    check_store(store)


async def test_the_intake_pauses_at_the_limit_and_opens_with_room(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(rows_max=10))
    opened: list[bool] = []
    store.on_room(lambda: opened.append(True))
    await insert(store, *(activation(str(n), clock) for n in range(10)))
    assert store.room() == 0
    assert store.intake_state() == ("PAUSED", "rows")
    for row in store.claim(None, (), 2, BYTES):
        await settled(store, token_of(store, row), Event.COMPLETE)
    assert opened
    assert store.intake_state() == ("OPEN", "")
    store.database.close()


async def test_a_flood_in_one_namespace_leaves_room_in_memory_and_turns_to_another(
    tmp_path: Path, clock: ManualClock
) -> None:
    limits = StoreLimits(window_rows_max=100, batch_rows_max=1000)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, *(activation(f"f{n}", clock, namespace="flood") for n in range(5_000)))
    await insert(store, *(activation(f"q{n}", clock, namespace="quiet") for n in range(20)))
    check_store(store)
    assert store.memory.index.rows <= limits.window_rows_max * 11 // 10
    turns = [row.namespace for row in store.claim("shop", (), 20, BYTES)]
    assert turns.count("quiet") >= 9
    check_order: list[int] = []
    while rows := store.claim("shop", ("flood",), 64, BYTES):
        check_order += [int(row.id[1:]) for row in rows]
        await settle_down(store)
    assert check_order == sorted(check_order)
    store.database.close()


async def test_turns_go_round_applications_then_namespaces(store: Inflight, clock: ManualClock) -> None:
    rows = [
        activation(f"{app}-{namespace}-{n}", clock, application=app, namespace=namespace)
        for app, namespace in (("a", "x"), ("a", "y"), ("b", "x"))
        for n in range(8)
    ]
    await insert(store, *rows)
    first = [row.id.rsplit("-", 1)[0] for row in store.claim(None, (), 8, BYTES)]
    assert {name: first.count(name) for name in first} == {"a-x": 2, "a-y": 2, "b-x": 4}
    assert [row.namespace for row in store.claim("a", ("y", "x"), 4, BYTES)].count("x") == 2


async def test_a_failed_commit_stops_the_store_and_answers_nobody(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock))
    token = token_of(store, claim_one(store))
    await settle_down(store)

    arrived: list[asyncio.Future[None]] = []

    def fail(batch: object) -> None:
        arrived.append(store.insert([activation("meanwhile", clock)]))
        raise OSError("fsync failed")

    store.database.write = fail  # type: ignore[method-assign, assignment]
    store.settle(token, Event.COMPLETE, clock.wall_ms())
    waiting = store.committed()
    with pytest.raises(OSError, match="fsync"):
        await store.writer.tick()
    for answer in (waiting, *arrived):
        assert answer.done()
        with pytest.raises(StoreStopped):
            await answer
    with pytest.raises(StoreStopped):
        store.insert([activation("b", clock)])


async def test_a_dead_letter_leaves_only_when_it_was_acknowledged(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock))
    assert await settled(store, token_of(store, claim_one(store)), Event.FAIL) is Answer.APPLIED

    (letter,) = await take_outbox(store)
    assert (letter.reason, letter.body, letter.attempts) == (Reason.FAILED, b"body of a", 1)
    assert await take_outbox(store) == []
    store.outbox.give_back(Route.DEAD_LETTER, [letter])
    (again,) = await take_outbox(store)
    store.outbox.forwarded([again])
    await settle_down(store)
    assert store.memory.rows == store.outbox.size() == 0
    assert store.memory.books[1, "dead:failed"] == 1


async def test_dead_letters_rest_in_the_store_up_to_the_bound(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(dead_letters_rest_max=2))
    await insert(store, *(activation(str(n), clock) for n in range(3)))
    for row in store.claim(None, (), 3, BYTES):
        await settled(store, token_of(store, row), Event.FAIL)
    for _ in range(2):
        store.outbox.rest(await take_outbox(store))
        await settle_down(store)
        assert store.outbox.size() == 1
        assert [letter.id for letter in store.database.dead_letters(0, None, None, None, 10)] == ["0", "1"]
        check_store(store)
    assert [letter.id for letter in await take_outbox(store)] == ["2"], "it waits for room"
    store.database.close()


async def test_large_bodies_have_a_row_of_their_own_that_goes_with_them(
    store: Inflight, clock: ManualClock
) -> None:
    body = bytes(50_000)
    await insert(store, activation("a", clock, body=body))
    count = "SELECT count(*) FROM payload"
    assert store.database.connection.execute(count).get == 1
    row = claim_one(store)
    assert row.body == body
    assert await settled(store, token_of(store, row), Event.COMPLETE) is Answer.APPLIED
    assert store.database.connection.execute(count).get == 0


async def test_a_client_without_tokens_settles_by_id(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(lifecycle=Limits()))
    await insert(
        store, activation("a", clock, max_attempts=3), activation("b", clock), activation("c", clock)
    )
    first = claim_one(store, tokenless=True)
    assert store.settle_by_id(first.id_hash, Event.RETRY, clock.wall_ms(), retry_delay_ms=0) is Answer.APPLIED
    # Pending and never claimed: a retry or failure is not this client's to report.
    await settle_down(store)
    assert store.settle_by_id(first.id_hash, Event.FAIL, clock.wall_ms()) is Answer.STALE
    # Completed all the same: a report may come late.
    assert store.settle_by_id(first.id_hash, Event.COMPLETE, clock.wall_ms()) is Answer.APPLIED
    assert store.settle_by_id(12345, Event.COMPLETE, clock.wall_ms()) is Answer.UNKNOWN
    with_token = claim_one(store)
    assert store.settle_by_id(with_token.id_hash, Event.FAIL, clock.wall_ms()) is Answer.STALE
    lost = claim_one(store, tokenless=True)
    store = reopen(store, clock)
    await settle_down(store)
    assert store.settle_by_id(lost.id_hash, Event.FAIL, clock.wall_ms()) is Answer.APPLIED
    await settle_down(store)
    check_store(store)
    store.database.close()


async def test_a_client_without_tokens_cannot_fail_what_waits_in_the_file(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(window_rows_max=1))
    await insert(store, activation("here", clock), activation("in the file", clock))
    for event in (Event.FAIL, Event.RETRY):
        assert store.settle_by_id(hash_id("in the file"), event, clock.wall_ms()) is Answer.STALE
    await settle_down(store)
    assert store.memory.counts[1][Status.PENDING] == 2
    store.database.close()


@pytest.mark.parametrize("written", [False, True])
async def test_a_client_without_tokens_reports_on_what_it_had_before_a_restart(
    tmp_path: Path, clock: ManualClock, written: bool
) -> None:
    """Whether the claim was in the file or not."""
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock, max_attempts=3))
    row = claim_one(store, tokenless=True)
    if written:
        await settle_down(store)
    store = reopen(store, clock)
    await settle_down(store)
    assert store.settle_by_id(row.id_hash, Event.RETRY, clock.wall_ms(), retry_delay_ms=0) is Answer.APPLIED
    await settle_down(store)
    assert claim_one(store).attempts == 1
    store.database.close()


async def test_everything_is_as_it_was_after_any_restart(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(
        store, *(activation(str(n), clock, delay_ms=100 * (n % 3), max_attempts=2) for n in range(50))
    )
    for row in store.claim(None, (), 5, BYTES):
        await settled(store, token_of(store, row), Event.RETRY, 300)
    for _ in range(3):
        store = reopen(store, clock)
        await settle_down(store)
        check_store(store)
    statuses = {
        status: sum(counts[status] for counts in store.memory.counts.values()) for status in list(Status)[1:]
    }
    assert statuses == {Status.PENDING: 12, Status.DELAYED: 38, Status.PROCESSING: 0, Status.FORWARDING: 0}
    store.database.close()


def read_back(
    id: str, clock: ManualClock, source: Source, offset: int, forward_id: str = "its forward id", **how: Any
) -> Activation:
    """As a broker has sent it on."""
    row = activation(id, clock, source=source.id, offset=offset, **how)
    row.sent_on = hash_id(forward_id)
    return row


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("before_the_answer", [False, True])
async def test_what_was_sent_on_is_taken_once(
    tmp_path: Path, clock: ManualClock, restarted: bool, before_the_answer: bool
) -> None:
    """By the broker that sent it, too, whose window has its id, and whose row may not be gone yet."""
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock))
    handing = asyncio.ensure_future(store.hand_over(10, running=False))
    while not handing.done():
        await asyncio.sleep(0)
        await settle_down(store)
    (sent,) = await take_outbox(store, Route.HAND_OVER)
    if not before_the_answer:
        store.outbox.forwarded([sent])
        await settle_down(store)
        await insert(store, activation("a", clock))
        assert store.memory.rows == 0, "without the forward id it is a duplicate"
    source = store.source("tasks", 0)
    store.insert([read_back("a", clock, source, 0)], {source.id: 1})
    await settle_down(store)
    if before_the_answer:
        if restarted:
            store = reopen(store, clock)
            (sent,) = await take_outbox(store, Route.HAND_OVER)
        store.outbox.forwarded([sent])
        await settle_down(store)
    source = store.source("tasks", 0)
    store.cover(source, 1)
    await settle_down(store)
    check_store(store)
    assert store.memory.rows == 1, "it goes on nowhere"
    token = token_of(store, claim_one(store))
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED
    if restarted:
        store = reopen(store, clock)
        source = store.source("tasks", 0)
    store.insert([read_back("a", clock, source, 1)], {source.id: 2})
    await settle_down(store)
    assert store.memory.rows == 0, "a copy ran again"
    assert store.memory.books[1, "done"] == 1
    check_store(store)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("at_most_once", [False, True])
async def test_what_was_sent_on_and_has_ended_is_not_read_again(
    tmp_path: Path, clock: ManualClock, restarted: bool, at_most_once: bool
) -> None:
    """Where the offset of its partition is set back."""
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)

    def the_same() -> Activation:
        return read_back("a", clock, source, 0, at_most_once=at_most_once)

    store.insert([the_same()], {source.id: 1})
    store.cover(source, 1)
    await settle_down(store)
    token = token_of(store, claim_one(store))
    assert await settled(store, token, Event.COMPLETE) is Answer.APPLIED
    if restarted:
        store = reopen(store, clock)
        source = store.source("tasks", 0)
    assert await settled(store, token, Event.COMPLETE) is Answer.DUPLICATE
    store.begin_range(source, 0)
    store.insert([the_same()], {source.id: 1})
    await settle_down(store)
    assert (store.memory.rows, store.memory.books[1, "done"]) == (0, 1)
    check_store(store)


async def test_what_was_sent_on_and_dropped_is_new_when_it_is_read_again(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Whether it had ended or not: nobody was told."""
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)
    store.insert([read_back(id, clock, source, at, f"of {id}") for at, id in enumerate("ab")], {source.id: 2})
    await settle_down(store)
    token = token_of(store, claim_one(store))
    store.settle(token, Event.COMPLETE, clock.wall_ms())
    await settle_down(store)
    store.drop_uncovered(source, 0)
    await settle_down(store)
    assert store.memory.rows == 0
    store = reopen(store, clock)
    source = store.source("tasks", 0)
    store.insert([read_back(id, clock, source, at, f"of {id}") for at, id in enumerate("ab")], {source.id: 2})
    await settle_down(store)
    assert store.memory.rows == 2
    check_store(store)


async def test_what_came_back_before_it_was_refused_goes_on_as_that(
    store: Inflight, clock: ManualClock
) -> None:
    await insert(store, activation("a", clock))
    handing = asyncio.ensure_future(store.hand_over(10, running=False))
    while not handing.done():
        await asyncio.sleep(0)
        await settle_down(store)
    (sent,) = await take_outbox(store, Route.HAND_OVER)
    source = store.source("tasks", 0)
    await insert(store, read_back("a", clock, source, 0), taken={source.id: 1})
    store.outbox.refuse([sent])
    await store.writer.tick()
    assert store.memory.rows == 1
    await settle_down(store)
    assert [row.offset for row in store.claim(None, (), 9, BYTES)] == [0]
    await settle_down(store)
    check_store(store)


async def test_an_answer_is_repeated_when_a_retry_comes_back_before_its_row_is_gone(
    tmp_path: Path, clock: ManualClock
) -> None:
    limits = StoreLimits(lifecycle=Limits(retry_topic=True))
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, activation("a", clock, max_attempts=3))
    token = token_of(store, claim_one(store))
    assert await settled(store, token, Event.RETRY) is Answer.APPLIED
    (sent,) = await take_outbox(store, Route.RETRY)
    source = store.source("tasks", 0)
    await insert(store, read_back("a", clock, source, 0), taken={source.id: 1})
    assert await settled(store, token, Event.RETRY) is Answer.DUPLICATE
    store.outbox.forwarded([sent])
    assert await settled(store, token, Event.RETRY) is Answer.DUPLICATE
    assert claim_one(store).offset == 0
    store.database.close()


async def test_a_copy_of_what_was_here_when_it_came_back_is_known_after_a_restart(
    tmp_path: Path, clock: ManualClock
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock)
    source = store.source("tasks", 0)
    await insert(store, activation("a", clock))
    await insert(store, read_back("a", clock, source, 0), taken={source.id: 1})
    assert store.memory.tally.duplicates == 1
    assert await settled(store, token_of(store, claim_one(store)), Event.COMPLETE) is Answer.APPLIED
    store = reopen(store, clock)
    await insert(store, read_back("a", clock, source, 1), taken={source.id: 2})
    assert store.memory.rows == 0, "a copy ran again"
    store.database.close()


async def test_what_was_not_stored_is_no_copy_of_itself(tmp_path: Path, clock: ManualClock) -> None:
    """Killed between the tick that holds the row and the one before, it is read again."""
    limits = StoreLimits(batch_rows_max=1)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    source = store.source("tasks", 0)
    await settle_down(store)
    store.insert([activation("before", clock, source=source.id, offset=0)], {source.id: 1})
    store.insert([read_back("a", clock, source, 1)], {source.id: 2})
    await store.writer.tick()
    store = reopen(store, clock, limits)
    source = store.source("tasks", 0)
    assert source.next == 1
    store.insert([read_back("a", clock, source, 1)], {source.id: 2})
    await settle_down(store)
    assert store.content_of("a") is not None
    assert store.memory.rows == 2
    check_store(store)


async def test_a_namespace_holds_its_share_and_others_have_room(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(rows_max=20, bytes_max=10_000))
    source = store.source("tasks", 0)
    rows = [activation(f"flood {n}", clock, source=source.id, offset=n) for n in range(15)]
    rows += [
        activation("large", clock, namespace="large", body=bytes(6_000), source=source.id, offset=15),
        activation("larger", clock, namespace="large", source=source.id, offset=16),
        activation("quiet", clock, namespace="quiet", source=source.id, offset=17),
    ]
    store.insert(rows, {source.id: 18})
    await settle_down(store)
    check_store(store)
    over = [row.id for row in rows if row.reason == Reason.OVERFLOW]
    assert over == [*(f"flood {n}" for n in range(10, 15)), "larger"]
    # Its offset passes like any other, and then it leaves.
    assert await take_outbox(store, Route.OVERFLOW) == []
    store.cover(source, 18)
    store.outbox.forwarded(await take_outbox(store, Route.OVERFLOW))
    await settle_down(store)
    # As it works its tasks off, it has room.
    row = claim_one(store)
    assert await settled(store, token_of(store, row), Event.COMPLETE) is Answer.APPLIED
    store.insert([read_back("flood 14", clock, source, 20)], {source.id: 21})
    store.insert([activation("flood 15", clock, source=source.id, offset=21)], {source.id: 22})
    await settle_down(store)
    check_store(store)
    assert store.outbox.size() == 1
    assert sum(n for (_, term), n in store.memory.books.items() if term == "overflow") == 6
    assert store.imbalance() == 0


async def test_a_namespace_at_its_share_is_two_lines_of_the_log(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(rows_max=20))
    source = store.source("tasks", 0)
    with capture_logs() as logs:
        offset = 0
        for _ in range(10):
            rows = [activation(f"{n}", clock, source=source.id, offset=n) for n in range(offset, offset + 12)]
            offset += 12
            await insert(store, *rows, taken={source.id: offset})
            for row in store.claim(None, (), 9, 1 << 20):
                assert await settled(store, token_of(store, row), Event.COMPLETE) is Answer.APPLIED
            store.cover(source, offset)
            store.outbox.forwarded(await take_outbox(store, Route.OVERFLOW))
            await settle_down(store)
        clock.advance(OVERFLOW_CALM_MS)
        store.watch_disk()
        await settle_down(store)
    told = [line["event"] for line in logs if "share" in line["event"]]
    assert [event.split(" (")[0] for event in told] == [
        "a namespace holds its share of the store",
        "a namespace has room in its share again",
    ]


@pytest.mark.parametrize("state", ["delayed", "claimed"])
async def test_what_waits_for_a_time_or_runs_counts_towards_the_share(
    tmp_path: Path, clock: ManualClock, state: str
) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(rows_max=10))
    source, delay = store.source("tasks", 0), 60_000 if state == "delayed" else 0
    rows = [activation(str(n), clock, delay_ms=delay, source=source.id, offset=n) for n in range(5)]
    await insert(store, *rows, taken={source.id: 5})
    assert len(store.claim(None, (), 5, BYTES)) == (5 if state == "claimed" else 0)
    over = activation("over", clock, source=source.id, offset=5)
    await insert(store, over, taken={source.id: 6})
    assert over.reason == Reason.OVERFLOW
    store.database.close()


async def test_a_few_large_tasks_are_a_share_too(tmp_path: Path, clock: ManualClock) -> None:
    store = open_store(tmp_path / "store.sqlite", clock, StoreLimits(rows_max=1_000, bytes_max=10_000))
    source = store.source("tasks", 0)
    rows = [activation(str(n), clock, body=bytes(3_000), source=source.id, offset=n) for n in range(4)]
    # What came over gRPC is in no log to wait in.
    rows.append(activation("grpc", clock, body=bytes(3_000)))
    await insert(store, *rows, taken={source.id: 4})
    assert [row.id for row in rows if row.reason == Reason.OVERFLOW] == ["2", "3"]
    store.database.close()


async def test_what_is_taken_to_leave_is_bounded_in_bytes(store: Inflight, clock: ManualClock) -> None:
    """But one at a time whatever its size."""
    await insert(store, *(activation(f"{n}", clock, body=bytes(3_000), expires_ms=0) for n in range(4)))
    sizes = []
    for bytes_max in (7_000, 1, 3_000):
        taking = asyncio.ensure_future(store.outbox.take(Route.DEAD_LETTER, 10, bytes_max))
        await asyncio.sleep(0)
        await settle_down(store)
        sizes.append(len(await taking))
    assert sizes == [2, 1, 1]


async def test_what_is_passed_over_keeps_its_place(store: Inflight, clock: ManualClock) -> None:
    rows = [activation(id, clock, at_most_once=id != "c") for id in ("a", "b", "c", "d")]
    await insert(store, *rows)
    assert [row.id for row in store.claim(None, (), 2, 1 << 20, at_most_once=False)] == ["c"]
    assert [row.id for row in store.claim(None, (), 4, 1 << 20)] == ["a", "b", "d"]


async def test_what_comes_back_within_a_millisecond_is_not_overtaken_by_what_comes_new(
    tmp_path: Path, clock: ManualClock
) -> None:
    """Also where memory does not hold it: it would be read behind those that came after it, or not at all."""
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, activation("a", clock), activation("b", clock))
    forgotten = [token_of(store, row) for row in store.claim(None, (), 2, BYTES)]
    store = reopen(store, clock, StoreLimits(window_rows_max=1))
    await settle_down(store)
    assert await settled(store, forgotten[1], Event.RELEASE) is Answer.APPLIED
    await insert(store, *(activation(id, clock) for id in ("c", "d", "e")))
    check_store(store)
    ended = []
    while rows := store.claim(None, (), 9, BYTES):
        for row in rows:
            ended.append(row.id)
            store.settle(token_of(store, row), Event.COMPLETE, clock.wall)
        await settle_down(store)
        check_store(store)
    assert ended == ["a", "b", "c", "d", "e"]
    store.database.close()
