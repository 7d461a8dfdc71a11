"""What a lost disk has left, from the ledger, the committed offsets and their owners."""

from __future__ import annotations

import zlib

import pytest
from store_helpers import ManualClock, activation

from penstock_broker.domain.activation import Status
from penstock_broker.domain.lifecycle import Limits
from penstock_broker.ingest.intake import Found
from penstock_broker.ingest.ledger_records import (
    Account,
    Head,
    Taken,
    head_record,
    range_record,
    read_account,
    segment_record,
)
from penstock_broker.ingest.ledger_restore import Left, become, left_of
from penstock_broker.ingest.ownership import Me, Owner
from penstock_broker.store.ledger import SEGMENT_OFFSETS, Segment, State, offsets_of

LOST, HEIR, OTHER = Me("a", "1"), Me("a", "2"), Me("b", "9")
STATE = State(2, 1, 7_000, None, False, 5, 4, 300)


def segment(*offsets: int, **states: State) -> Segment:
    one = bytearray(SEGMENT_OFFSETS)
    for offset in offsets:
        one[offset % SEGMENT_OFFSETS] = 1
    return Segment(bytes(one), {int(n[1:]): state for n, state in states.items()})


def left(
    taken: Taken | None,
    unfinished: tuple[int, ...],
    committed: int | None,
    *owners: tuple[int, Me],
    low: int = 0,
    high: int = 1000,
) -> Left | None:
    segments = {0: segment(*unfinished)} if unfinished else {}
    found = Found(3, committed, tuple(Owner(start, me, 1) for start, me in owners))
    all_ = left_of("tasks", taken, segments, found, LOST)
    return all_ and all_.within(low, high)


@pytest.mark.parametrize(
    ("taken", "unfinished", "committed", "owners", "expected"),
    [
        # Recorded to the end: what the record says, and nothing else.
        (Taken(0, 10, 10), (2, 7), 10, [(0, LOST)], (0, 10, [2, 7])),
        # Taken and committed since the record: unfinished.
        (Taken(0, 10, 10), (2,), 13, [(0, LOST)], (0, 13, [2, 10, 11, 12])),
        # Stored but not committed: whoever reads on, reads it again.
        (Taken(0, 10, 4), (2, 6, 8), 7, [(0, LOST)], (0, 7, [2, 6])),
        # The partition went to another broker: its start is the end, whatever was committed since.
        (Taken(0, 10, 8), (2, 9), 500, [(8, OTHER), (0, LOST)], (0, 8, [2])),
        (Taken(0, 6, 6), (2,), 500, [(8, OTHER), (0, LOST)], (0, 8, [2, 6, 7])),
        # It came back from another: what that one read between is not ours.
        (Taken(0, 10, 10), (2,), 60, [(50, LOST), (0, OTHER)], (50, 60, [2, *range(50, 60)])),
        # The disk was lost before the first record.
        (None, (), 5, [(3, LOST), (0, OTHER)], (3, 5, [3, 4])),
        # Nothing was ever committed: all of it is read again, but for what an old commit had covered.
        (Taken(0, 10, 0), (2,), None, [], (0, 0, [])),
        (Taken(5, 10, 7), (6, 8), None, [], (5, 7, [6])),
        # The group's offset was set back by hand: covered is covered.
        (Taken(0, 10, 10), (2, 7), 5, [], (0, 10, [2, 7])),
    ],
)
def test_what_is_left(
    taken: Taken | None,
    unfinished: tuple[int, ...],
    committed: int | None,
    owners: list[tuple[int, Me]],
    expected: tuple[int, int, list[int]],
) -> None:
    found = left(taken, unfinished, committed, *owners)
    assert found is not None
    assert (found.start, found.end, list(found.offsets)) == expected
    assert not found.expired


def test_a_partition_that_was_never_read_has_nothing_left() -> None:
    assert left(None, (), 50, (0, OTHER)) is None
    assert left(None, (), 50, (0, HEIR)) is None


def test_what_kafka_no_longer_holds_is_counted() -> None:
    found = left(Taken(0, 10, 10), (2, 7), 12, (0, LOST), low=7, high=12)
    assert found is not None
    assert (list(found.offsets), list(found.expired)) == ([7, 10, 11], [2])


def test_records_say_what_was_written() -> None:
    full = Segment(bytes([1]) * SEGMENT_OFFSETS, {})
    some = segment(0, 5, SEGMENT_OFFSETS - 1, n5=STATE)
    head = Head("1", 4, 99, 1_000, successor=OTHER, handed=True)
    records = [
        range_record("g", "a", "tasks", 3, Taken(1, 2, 1)),
        segment_record("g", "a", ("tasks", 3, 8), full),
        segment_record("g", "a", ("tasks", 3, 9), full),
        head_record("g", "a", head._replace(successor=None)),
        head_record("g", "other", head._replace(sequence=1)),
        head_record("other", "a", head._replace(sequence=2)),
        range_record("g", "a", "tasks", 3, Taken(1, 20, 10), "id"),
        range_record("g", "a", "tasks", 4, Taken(1, 2, 1), "id"),
        range_record("g", "a", "tasks", 4, None),
        head_record("g", "a", head),
        segment_record("g", "a", ("tasks", 3, 9), Segment(None, {})),
        segment_record("g", "a", ("tasks", 3, 2), some),
    ]
    account = read_account(records, "g", "a")
    assert account == Account(
        head,
        {("tasks", 3): Taken(1, 20, 10)},
        {("tasks", 3, 8): full, ("tasks", 3, 2): some},
        {("tasks", 3): "id"},
    )
    assert offsets_of(2 * SEGMENT_OFFSETS, some) == [
        2 * SEGMENT_OFFSETS,
        2 * SEGMENT_OFFSETS + 5,
        3 * SEGMENT_OFFSETS - 1,
    ]


def test_a_full_segment_with_states_is_below_what_kafka_takes() -> None:
    """In the worst case, a state of its own for every offset. Kafka's default is 1 MiB, compressed."""
    states = {
        n: State(
            3, 2, 1_700_000_000_000 + n * 7919, "attempts_exhausted", False, 1_700_000_000_000, 5, 60_000
        )
        for n in range(SEGMENT_OFFSETS)
    }
    _, value = segment_record("g", "a", ("tasks", 0, 0), Segment(bytes([1]) * SEGMENT_OFFSETS, states))
    assert value is not None
    assert len(zlib.compress(value, 1)) < 500_000
    assert len(value) < 2 * 1024 * 1024


def test_a_row_becomes_what_it_was() -> None:
    clock = ManualClock()
    now, limits = clock.wall, Limits()

    def made(state: State | None, **how: object) -> tuple[Status, int, int, str | None]:
        row = activation("x", clock, **how)  # type: ignore[arg-type]
        become(row, state, now, limits)
        return row.status, row.attempts, row.lost, row.reason

    plain = State(0, 0, 0, None, False, None, 1, 0)
    assert made(None) == (Status.PENDING, 0, 0, None)
    assert made(None, delay_ms=500) == (Status.DELAYED, 0, 0, None)
    assert made(plain._replace(attempts=2, lost=1)) == (Status.PENDING, 2, 1, None)
    assert made(plain._replace(attempts=2, due_at=now + 1)) == (Status.DELAYED, 2, 0, None)
    assert made(plain._replace(attempts=2, due_at=now)) == (Status.PENDING, 2, 0, None)
    assert made(plain._replace(reason="failed", attempts=1)) == (Status.FORWARDING, 1, 0, "failed")
    claimed = plain._replace(claimed=True)
    assert made(claimed, at_most_once=True) == (Status.FORWARDING, 0, 1, "start_unknown")
    row = activation("x", clock)
    become(row, STATE, now, limits)
    assert (row.given_back_at, row.max_attempts, row.retry_delay_ms) == (5, 4, 300)
    # What is to leave for where it is run on is not due earlier there.
    become(row, plain._replace(reason="retried", due_at=now + 9), now, limits)
    assert (row.status, row.ready_at) == (Status.FORWARDING, now + 9)
    # A delay that was over when it was started is over.
    assert made(plain._replace(attempts=1), delay_ms=500) == (Status.PENDING, 1, 0, None)
