from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock_worker.credit import PREFETCH_SECONDS, PREFETCH_TASKS_MAX, ServiceTime, room


def measured(*run_seconds: float) -> int:
    service_time = ServiceTime()
    for seconds in run_seconds:
        service_time.add(seconds)
    return service_time.prefetch()


def test_nothing_waits_before_anything_was_measured() -> None:
    assert measured() == 0


def test_short_tasks_wait_in_numbers_and_long_ones_not_at_all() -> None:
    assert measured(0.0) == PREFETCH_TASKS_MAX
    assert measured(0.004) == 12
    assert measured(2 * PREFETCH_SECONDS) == 0


def test_long_tasks_end_the_prefetch_and_short_ones_bring_it_back() -> None:
    assert measured(*[0.001] * 50, *[60.0] * 6) == 0
    assert measured(*[0.001] * 50, *[60.0] * 6, *[0.001] * 50) > 10


def test_one_short_task_that_was_held_up_does_not_empty_the_queues() -> None:
    assert measured(*[0.00002] * 50, 0.05) == PREFETCH_TASKS_MAX


def test_a_free_slot_is_filled_at_once() -> None:
    assert room(capacity=4, slots=4, held=3, asked_for=0) == 1
    assert room(capacity=4, slots=4, held=3, asked_for=1) == 0


def test_the_prefetch_is_topped_up_when_half_is_used() -> None:
    assert room(capacity=104, slots=4, held=100, asked_for=0) == 0
    assert room(capacity=104, slots=4, held=54, asked_for=0) == 50


@given(st.integers(0, 64), st.integers(0, 64 * 255), st.integers(0, 20_000), st.integers(0, 600))
def test_never_more_than_the_capacity(slots: int, prefetch: int, held: int, asked_for: int) -> None:
    wanted = room(slots + prefetch, slots, held, asked_for)
    assert wanted == 0 or held + asked_for + wanted <= slots + prefetch
