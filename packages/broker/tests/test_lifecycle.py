"""The table of transitions, the policy that picks from it, and its drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_broker.domain.activation import Activation, OnExceeded, Reason, Status
from penstock_broker.domain.document import draw
from penstock_broker.domain.lifecycle import (
    GIVE_BACK_MAX_MS,
    GIVE_BACK_MIN_MS,
    OUTCOMES,
    TRANSITIONS,
    Change,
    Event,
    IllegalTransition,
    Limits,
    decide,
)

NOW = 1_700_000_000_000
LIMITS = Limits(max_deliveries=3, unknown_task_ms=600_000)


def row(status: Status = Status.PROCESSING, **changed: object) -> Activation:
    values: dict[str, Any] = {"max_attempts": 3, "on_exceeded": OnExceeded.DEADLETTER, **changed}
    return Activation(
        id="a",
        application="shop",
        namespace="pay",
        taskname="charge",
        body=b"",
        received_at=NOW,
        ready_at=NOW,
        status=status,
        **values,
    )


rows = st.builds(
    row,
    status=st.sampled_from(list(Status)),
    attempts=st.integers(0, 5),
    max_attempts=st.integers(0, 5),
    lost=st.integers(0, 5),
    claim=st.integers(0, 9),
    on_exceeded=st.sampled_from(list(OnExceeded)),
    at_most_once=st.booleans(),
    retry_delay_ms=st.integers(0, 10_000),
    given_back_at=st.one_of(st.none(), st.integers(NOW - 10**6, NOW)),
    reason=st.sampled_from([None, Reason.FAILED, Reason.HANDED_OVER]),
)


@given(rows, st.sampled_from(list(Event)), st.one_of(st.none(), st.integers(0, 10_000)))
def test_every_decision_is_in_the_table(activation: Activation, event: Event, delay: int | None) -> None:
    if (activation.status, event) not in TRANSITIONS:
        with pytest.raises(IllegalTransition):
            decide(activation, event, NOW, LIMITS, delay)
        return
    change = decide(activation, event, NOW, LIMITS, delay)
    assert change.status in TRANSITIONS[activation.status, event].to
    # An end is counted once in the books, a stay never.
    assert bool(change.term) == (change.status is Status.GONE)
    # No token survives the end of its claim.
    left = activation.status is Status.PROCESSING and change.status not in (Status.PROCESSING, Status.GONE)
    assert change.claim == activation.claim + 1 if left else change.claim >= activation.claim
    # Failures and lost deliveries are counted apart, and never both.
    assert 0 <= change.attempts - activation.attempts + change.lost - activation.lost <= 1
    if change.status is Status.FORWARDING:
        assert change.reason


@given(rows, st.sampled_from(list(Event)), st.one_of(st.none(), st.integers(0, 10_000)))
def test_an_at_most_once_task_never_starts_again(
    activation: Activation, event: Event, delay: int | None
) -> None:
    activation.at_most_once = True
    activation.status = Status.PROCESSING
    if (activation.status, event) not in TRANSITIONS:
        return
    change = decide(activation, event, NOW, LIMITS, delay)
    unstarted = event in (Event.RELEASE, Event.UNKNOWN_TASK, Event.ARGUMENTS_MISMATCH)
    if not unstarted:
        assert change.status in (Status.GONE, Status.FORWARDING)


def test_every_status_can_be_left_and_reached() -> None:
    reached = {target for transition in TRANSITIONS.values() for target in transition.to}
    assert reached == set(Status)
    assert {status for status, _ in TRANSITIONS} == set(Status) - {Status.GONE}
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert len(set(OUTCOMES.values())) == len(OUTCOMES)


def failed(starts: int, event: Event = Event.RETRY, **how: Any) -> list[Change]:
    """The changes of a task that fails at each of its starts."""
    activation, changes = row(**how), []
    for _ in range(starts):
        change = decide(activation, event, NOW, LIMITS)
        changes.append(change)
        activation.attempts, activation.lost = change.attempts, change.lost
        if change.status in (Status.GONE, Status.FORWARDING):
            break
    return changes


@pytest.mark.parametrize(("max_attempts", "starts"), [(0, 1), (1, 1), (2, 2), (5, 5)])
@pytest.mark.parametrize("event", [Event.RETRY, Event.DEADLINE_EXCEEDED])
def test_max_attempts_counts_starts(max_attempts: int, starts: int, event: Event) -> None:
    changes = failed(9, event, max_attempts=max_attempts)
    assert [change.attempts for change in changes] == list(range(1, starts + 1))
    assert changes[-1].status is Status.FORWARDING
    assert changes[-1].reason == Reason.ATTEMPTS_EXHAUSTED


def test_exhausted_without_a_dead_letter_policy_is_discarded_and_counted() -> None:
    for policy in (OnExceeded.UNSPECIFIED, OnExceeded.DISCARD):
        change = failed(9, max_attempts=2, on_exceeded=policy)[-1]
        assert (change.status, change.term) == (Status.GONE, "discarded:attempts_exhausted")


def test_lost_deliveries_are_bounded_apart_and_never_discarded() -> None:
    changes = failed(9, Event.LEASE_LOST, max_attempts=1, on_exceeded=OnExceeded.DISCARD)
    assert [change.lost for change in changes] == list(range(1, LIMITS.max_deliveries + 1))
    assert all(change.attempts == 0 for change in changes)
    assert (changes[-1].status, changes[-1].reason) == (Status.FORWARDING, Reason.MAX_DELIVERIES)


def test_a_lost_at_most_once_task_is_a_dead_letter_at_once() -> None:
    change = decide(row(at_most_once=True, on_exceeded=OnExceeded.DISCARD), Event.LEASE_LOST, NOW, LIMITS)
    assert (change.status, change.reason) == (Status.FORWARDING, Reason.START_UNKNOWN)


def test_backoff_of_the_report_comes_before_that_of_the_message() -> None:
    """It counts from the end of the millisecond in which the report came."""
    activation = row(retry_delay_ms=5_000)
    assert decide(activation, Event.RETRY, NOW, LIMITS).ready_at == NOW + 1 + 5_000
    assert decide(activation, Event.RETRY, NOW, LIMITS, 700).ready_at == NOW + 1 + 700
    assert decide(activation, Event.RETRY, NOW, LIMITS, 0).status is Status.PENDING


def test_a_given_back_task_waits_longer_each_time_then_becomes_a_dead_letter() -> None:
    activation, now, waits = row(), NOW, []
    while True:
        change = decide(activation, Event.UNKNOWN_TASK, now, LIMITS)
        if change.status is Status.FORWARDING:
            break
        assert change.attempts == change.lost == 0
        waits.append(change.ready_at - now)
        activation.given_back_at, now = change.given_back_at, change.ready_at
    assert waits[0] == GIVE_BACK_MIN_MS
    assert waits == sorted(waits)
    assert waits[-1] == GIVE_BACK_MAX_MS
    assert now - NOW >= LIMITS.unknown_task_ms
    assert change.reason == Reason.UNKNOWN_TASK


@pytest.mark.parametrize("event", [Event.RETRY, Event.DEADLINE_EXCEEDED])
def test_a_task_that_some_worker_ran_is_not_one_that_none_knows(event: Event) -> None:
    activation = row(max_attempts=5, given_back_at=NOW - 1_000)
    change = decide(activation, event, NOW, LIMITS, retry_delay_ms=2 * LIMITS.unknown_task_ms)
    assert change.given_back_at is None
    activation.given_back_at, activation.attempts = change.given_back_at, change.attempts
    # Its next start meets an older worker again.
    change = decide(activation, Event.UNKNOWN_TASK, change.ready_at, LIMITS)
    assert change.status is Status.DELAYED


@pytest.mark.parametrize("event", [Event.UNKNOWN_TASK, Event.ARGUMENTS_MISMATCH])
@pytest.mark.parametrize("policy", list(OnExceeded))
def test_what_no_worker_can_run_is_a_dead_letter_whatever_its_policy(
    event: Event, policy: OnExceeded
) -> None:
    given_back = NOW - LIMITS.unknown_task_ms
    for at_most_once in (False, True):
        activation = row(on_exceeded=policy, at_most_once=at_most_once, given_back_at=given_back)
        change = decide(activation, event, NOW, LIMITS)
        assert change.status is Status.FORWARDING
        assert change.reason == event.value.replace(" ", "_")


@pytest.mark.parametrize("event", [Event.HAND_OVER, Event.OVERFLOW])
def test_what_goes_on_elsewhere_is_not_due_earlier_there(event: Event) -> None:
    activation = row(Status.DELAYED)
    activation.ready_at = NOW + 5_000
    assert decide(activation, event, NOW, LIMITS).ready_at == NOW + 5_000


@pytest.mark.parametrize("event", [Event.HAND_OVER, Event.OVERFLOW])
@pytest.mark.parametrize("status", [Status.PENDING, Status.PROCESSING])
def test_what_is_ready_does_not_wait_elsewhere_for_a_clock_that_was_ahead(
    event: Event, status: Status
) -> None:
    activation = row(status)
    activation.ready_at = NOW + 86_400_000
    if (status, event) != (Status.PROCESSING, Event.OVERFLOW):
        assert decide(activation, event, NOW, LIMITS).ready_at == NOW


def test_what_stays_because_it_is_too_large_is_not_due_earlier() -> None:
    activation = row(Status.FORWARDING, reason=Reason.HANDED_OVER)
    activation.ready_at = NOW + 5_000
    change = decide(activation, Event.REFUSED, NOW, LIMITS)
    assert (change.status, change.ready_at) == (Status.DELAYED, NOW + 5_000)


@pytest.mark.parametrize("status", [Status.PENDING, Status.DELAYED])
def test_an_at_most_once_task_that_never_started_is_handed_over(status: Status) -> None:
    change = decide(row(status, at_most_once=True), Event.HAND_OVER, NOW, LIMITS)
    assert change.reason == Reason.HANDED_OVER


def test_the_drawing_is_the_table() -> None:
    drawn = (Path(__file__).parents[3] / "docs" / "lifecycle.md").read_text()
    assert drawn == draw(), "run: python -m penstock_broker.domain.document > docs/lifecycle.md"
