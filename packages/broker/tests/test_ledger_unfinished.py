"""What the ledger would be told equals the rows, whatever happens to them, restarts included."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from store_helpers import ManualClock, activation, check_store, open_store, settle_down, token_of

from penstock_broker.domain.activation import Activation, Reason, Status
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.ingest.ledger_restore import become
from penstock_broker.store.finished import place
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.ledger import (
    SEGMENT_BITS,
    SEGMENT_OFFSETS,
    SPARSE_MAX,
    Unfinished,
    runs,
    segment_key,
    segment_of,
)
from penstock_broker.store.limits import StoreLimits


async def taken(store: Inflight, clock: ManualClock, count: int, **how) -> list[Activation]:
    """Rows from the log, covered, so that they may start."""
    source = store.source("tasks", 0)
    first = max(0, source.next)
    rows = [
        activation(f"t{n}", clock, source=source.id, offset=n, **how) for n in range(first, first + count)
    ]
    store.insert(rows, {source.id: first + count})
    await settle_down(store)
    store.cover(source, first + count)
    await settle_down(store)
    return rows


@pytest.mark.parametrize(
    "event",
    [Event.COMPLETE, Event.FAIL, Event.RETRY, Event.WORKER_DIED, Event.RELEASE, Event.UNKNOWN_TASK],
)
@pytest.mark.parametrize("at_most_once", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
async def test_outcomes(tmp_path: Path, event: Event, at_most_once: bool, restarted: bool) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    await taken(store, clock, 5, max_attempts=3, at_most_once=at_most_once)
    (one, two) = store.claim(None, (), 2, 1 << 20)
    await settle_down(store)
    check_store(store)
    claimed = [state and state.claimed for state in store.memory.unfinished.places().values()]
    assert claimed == [at_most_once or None] * 2 + [None] * 3
    token, source = token_of(store, one), one.source
    if restarted:
        store.database.close()
        store = open_store(tmp_path / "s", clock)
        check_store(store) if not store.writer.work_waits() else None
    before = store.memory.unfinished.places()
    store.memory.unfinished.dirty.clear()
    store.settle(token, event, clock.wall, retry_delay_ms=500)
    await settle_down(store)
    check_store(store)
    known = store.memory.unfinished.places()
    assert known == before or store.memory.unfinished.dirty, "what has changed will be recorded"
    gone = event is Event.COMPLETE
    assert (place(source, one.offset) in known) is not gone
    state = known.get(place(source, one.offset))
    if event is Event.RETRY and not at_most_once:
        assert state is not None
        assert (state.attempts, state.due_at) == (1, clock.wall + 1 + 500)
        clock.advance(1000)
        await settle_down(store)
        check_store(store)
    if event is Event.WORKER_DIED:
        assert state is not None
        assert (state.lost, state.reason) == (1, "start_unknown" if at_most_once else None)
    if event is Event.RELEASE:
        assert state is None
    assert (two.status is Status.PROCESSING) or restarted
    store.database.close()


async def test_rows_that_memory_does_not_hold(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock, StoreLimits(window_rows_max=1))
    rows = await taken(store, clock, 3)
    assert len(store.memory.resident) == 1
    store.settle_by_id(rows[2].id_hash, Event.COMPLETE, clock.wall)
    late = await taken(store, clock, 1, delay_ms=5_000, expires_ms=1_000)
    clock.advance(2_000)
    await settle_down(store)
    check_store(store)
    known = store.memory.unfinished.places()
    assert place(rows[2].source, rows[2].offset) not in known
    state = known[place(late[0].source, late[0].offset)]
    assert state is not None
    assert state.reason == "expired"
    store.database.close()


async def test_dropped_rows_and_rows_read_again(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    source = store.source("tasks", 0)
    rows = [activation(f"t{n}", clock, source=source.id, offset=n) for n in range(10)]
    store.insert(rows, {source.id: 10})
    await settle_down(store)
    # Dropped, and stored anew in the same tick.
    store.drop_uncovered(source, 4)
    store.begin_range(source, 4)
    again = [activation(f"again{n}", clock, source=source.id, offset=n) for n in range(4, 7)]
    store.insert(again, {source.id: 7})
    await settle_down(store)
    check_store(store)
    assert [at & 0xFF for at in store.memory.unfinished.places()] == [0, 1, 2, 3, 4, 5, 6]
    store.database.close()


async def test_what_is_taken_is_to_be_recorded(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    for _ in range(2):
        store.memory.unfinished.dirty.clear()
        (row,) = await taken(store, clock, 1)
        assert store.memory.unfinished.dirty == {place(row.source, row.offset) >> SEGMENT_BITS}
    store.database.close()


async def test_what_is_read_again_has_nothing_of_what_was_dropped(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    source = store.source("tasks", 0)

    async def read() -> None:
        store.insert([activation("t", clock, source=source.id, offset=0, max_attempts=3)], {source.id: 1})
        await settle_down(store)

    await read()
    (row,) = store.claim(None, (), 1, 1 << 20)
    store.settle(token_of(store, row), Event.RETRY, clock.wall, 0)
    await settle_down(store)
    store.drop_uncovered(source, 0)
    await settle_down(store)
    await read()
    check_store(store)
    assert list(store.memory.unfinished.places().values()) == [None]
    store.database.close()


async def test_since_when_nobody_knows_a_task_is_known_after_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    await taken(store, clock, 1)
    (row,) = store.claim(None, (), 1, 1 << 20)
    since = clock.wall
    store.settle(token_of(store, row), Event.UNKNOWN_TASK, since)
    await settle_down(store)
    clock.advance(60_000)
    await settle_down(store)
    for _ in range(2):
        (state,) = store.memory.unfinished.places().values()
        assert state is not None
        assert state.given_back_at == since
        store.database.close()
        store = open_store(tmp_path / "s", clock)
    store.database.close()


async def test_what_is_retired_is_to_be_recorded_under_both_names(tmp_path: Path) -> None:
    """Under the old one, that nothing of it is unfinished: another log has that name now."""
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    (row,) = await taken(store, clock, 1)
    store.memory.unfinished.dirty.clear()
    store.retire(store.source("tasks", 0), "tasks of old")
    await settle_down(store)
    heir = store.source("tasks", 0)
    assert heir.id != row.source
    assert store.memory.unfinished.dirty >= {segment_key(row.source, 0), segment_key(heir.id, 0)}
    store.database.close()


async def test_rows_over_grpc_are_not_in_it(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    store.insert([activation(f"t{n}", clock, max_attempts=5) for n in range(3)])
    await settle_down(store)
    for row in store.claim(None, (), 3, 1 << 20):
        store.settle(token_of(store, row), Event.RETRY, clock.wall)
    await settle_down(store)
    assert store.memory.unfinished.places() == {}
    assert store.memory.unfinished.dirty == set()
    store.database.close()


def test_segments_in_both_forms_equal_a_set() -> None:
    """Filled and emptied at random, looked at now and then, which changes their form."""
    dice, unfinished, model = random.Random(1), Unfinished(), set()
    for step in range(3000):
        first = dice.choice([0, SEGMENT_OFFSETS - 30, 5 * SEGMENT_OFFSETS + 7])
        source = dice.choice([1, 2])
        offsets = [first + n for n in range(dice.choice([1, 40, SPARSE_MAX]))]
        if dice.random() < 0.4:
            rows = [Activation("", "", "", "", b"", 0, 0, source=source, offset=o) for o in offsets]
            unfinished.took(rows)
            model |= {place(source, o) for o in offsets}
        else:
            left = dice.sample(sorted(model), min(len(model), len(offsets)))
            unfinished.left(left)
            model -= set(left)
        if step % 50 == 0:
            assert unfinished.places().keys() == model
            assert len(unfinished.keys()) == len({at >> SEGMENT_BITS for at in model})


def test_keys_and_runs() -> None:
    assert segment_of(segment_key(7, 123)) == (7, 123)
    assert segment_key(7, 123) == place(7, 123 * SEGMENT_OFFSETS + 5) >> SEGMENT_BITS
    assert list(runs([], 5)) == []
    assert list(runs([1, 2, 7, 13, 14], 5)) == [[1, 2, 7], [13, 14]]


async def test_a_retry_that_was_to_leave_is_not_due_earlier_when_it_is_restored(tmp_path: Path) -> None:
    clock, limits = ManualClock(), StoreLimits(lifecycle=Limits(retry_topic=True))
    store = open_store(tmp_path / "s", clock, limits)
    await taken(store, clock, 1, max_attempts=3)
    (row,) = store.claim(None, (), 1, 1 << 20)
    store.settle(token_of(store, row), Event.RETRY, clock.wall, 5_000)
    await settle_down(store)
    check_store(store)
    (state,) = store.memory.unfinished.places().values()
    again = activation("t0", clock)
    become(again, state, clock.wall, limits.lifecycle)
    assert (again.status, again.reason, again.attempts) == (Status.FORWARDING, Reason.RETRIED, 1)
    assert again.ready_at == clock.wall + 1 + 5_000
    store.database.close()


async def test_a_dead_letter_died_when_it_did_also_when_it_is_restored(tmp_path: Path) -> None:
    """Sent a second time, it is known as the first."""
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    await taken(store, clock, 1)
    (row,) = store.claim(None, (), 1, 1 << 20)
    store.settle(token_of(store, row), Event.FAIL, clock.wall)
    await settle_down(store)
    (state,) = store.memory.unfinished.places().values()
    died_at = clock.wall_ms()
    clock.advance(60_000)
    again = activation("t0", clock)
    become(again, state, clock.wall, store.limits.lifecycle)
    assert (again.reason, again.ready_at) == (Reason.FAILED, died_at)
    store.database.close()


@pytest.mark.parametrize("term", ["restored", "adopted"])
async def test_what_a_restored_task_has_become_is_recorded_anew(tmp_path: Path, term: str) -> None:
    """Or its attempts would begin again when the next disk is lost."""
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    source = store.source("tasks", 0)
    row = activation("t0", clock, source=source.id, offset=0, max_attempts=3)
    row.attempts, row.lost, row.given_back_at = 2, 1, clock.wall_ms()
    store.insert([row], {source.id: 1}, term)
    await settle_down(store)
    for _ in range(2):
        (state,) = store.memory.unfinished.places().values()
        assert state is not None
        assert (state.attempts, state.lost, state.given_back_at) == (2, 1, row.given_back_at)
        store.database.close()
        store = open_store(tmp_path / "s", clock)
        await settle_down(store)
        check_store(store)
    store.database.close()


async def test_why_and_when_a_dead_letter_died_is_known_after_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock)
    await taken(store, clock, 1)
    (row,) = store.claim(None, (), 1, 1 << 20)
    store.settle(token_of(store, row), Event.FAIL, clock.wall, error="why")
    late = await taken(store, clock, 1, expires_ms=1_000)
    clock.advance(2_000)
    await settle_down(store)
    for _ in range(2):
        known = store.memory.unfinished.places()
        states = [known[place(one.source, one.offset)] for one in (row, *late)]
        assert [state and state.reason for state in states] == [Reason.FAILED, Reason.EXPIRED]
        assert [state and state.due_at for state in states] == [clock.wall - 2_000, clock.wall]
        store.database.close()
        store = open_store(tmp_path / "s", clock)
    store.database.close()
