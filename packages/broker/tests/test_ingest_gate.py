"""How fast the intake goes: as memory has room, and past what nobody claims."""

import pytest

from penstock_broker.ingest.gate import LEAD_MS_MAX, Gate

ROWS, BYTES = 800, 80_000


@pytest.fixture
def gate() -> Gate:
    gate = Gate(ROWS, BYTES)
    gate.open(1_000_000)
    return gate


def test_no_more_is_taken_than_memory_has_room_for(gate: Gate) -> None:
    assert gate.pace(1000, 0) == ROWS
    gate.take(500, 500 * 10)
    assert gate.pace(1000, 0) == 300
    gate.stored(500, 500 * 10, 1_000_000)
    gate.lead(250, BYTES)
    assert gate.pace(1000, 0) == 250
    gate.lead(700, 20_000)
    gate.take(1, 100)
    gate.stored(1, 100, 1_000_000)
    assert gate.pace(1000, 0) == 200, "rows of 100 bytes, and room for 20,000"


def test_it_waits_while_workers_make_room(gate: Gate) -> None:
    gate.lead(ROWS // 8, BYTES)
    assert gate.pace(1000, 0) == gate.pace(1000, LEAD_MS_MAX - 1) == 0
    gate.lead(ROWS // 2, BYTES)
    assert gate.pace(1000, LEAD_MS_MAX - 1) == ROWS // 2
    gate.lead(0, BYTES)
    assert gate.pace(1000, LEAD_MS_MAX + 1) == 0, "the wait begins anew"


@pytest.mark.parametrize("lead", [0, -1, -ROWS])
def test_what_nobody_claims_holds_up_nobody_for_long(gate: Gate, lead: int) -> None:
    gate.lead(lead, 0)
    assert gate.pace(1000, 0) == 0
    assert gate.pace(1000, LEAD_MS_MAX) == 1000
    assert gate.pace(1000, LEAD_MS_MAX) == 0, "one batch for each wait"
    assert gate.pace(1000, 2 * LEAD_MS_MAX) == 1000


def test_behind_a_large_backlog_it_does_not_wait(gate: Gate) -> None:
    gate.lead(-ROWS - 1, 0)
    assert [gate.pace(1000, 0) for _ in range(3)] == [1000] * 3


def test_messages_that_memory_never_has_room_for_are_taken_one_by_one(gate: Gate) -> None:
    gate.take(1, 2 * BYTES)
    gate.stored(1, 2 * BYTES, 1_000_000)
    assert gate.pace(1000, 0) == 1
