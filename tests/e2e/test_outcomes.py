"""What becomes of a task: retried, dead-lettered, discarded, delayed, expired, killed at its deadline."""

from __future__ import annotations

import time

import pytest

from penstock_protocol.v1.activation_pb2 import TaskActivation
from tests.e2e.harness import Pool, eventually


@pytest.mark.timeout(120)
def test_failures_are_retried_dead_lettered_or_discarded(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=4)
    app = kafka_pool.app()
    flaky = [app.tasks["flaky"].delay(failures).id for failures in (1, 2, 3) for _ in range(20)]
    hopeless = [app.tasks["hopeless"].delay().id for _ in range(20)]
    unimportant = [app.tasks["unimportant"].delay().id for _ in range(20)]
    unknown = app.send_task("nobody.registered.this", queue="main")
    assert app.flush() == 0
    assert set(kafka_pool.await_all(flaky).values()) == {1}
    letters = kafka_pool.dead_letters(20)
    # Only what no worker knows is left: it is offered again for an hour.
    eventually("all else has left", lambda: broker.held() == 1)
    broker.check_books()
    starts = kafka_pool.started()
    assert [starts[id] for id in flaky] == [failures + 1 for failures in (1, 2, 3) for _ in range(20)]
    assert {starts[id] for id in hopeless} == {3}
    assert {starts[id] for id in unimportant} == {2}
    assert starts[unknown.id] == 0
    # The back-off was kept: no start before it was over.
    times: dict[str, list[float]] = {}
    for execution in sorted(kafka_pool.executions(), key=lambda e: e.at):
        if execution.what == "start":
            times.setdefault(execution.id, []).append(execution.at)
    assert all(
        later - earlier >= 0.3
        for id in flaky
        for earlier, later in zip(times[id], times[id][1:], strict=False)
    )
    # Dead letters carry their story; discarded tasks are counted, and nowhere else.
    assert {letter.key for letter in letters} == set(hopeless)
    for letter in letters:
        assert TaskActivation.FromString(letter.value).id == letter.key
        headers = letter.headers
        assert headers["penstock-reason"] == "attempts_exhausted"
        assert headers["penstock-attempts"] == "3"
        assert headers["penstock-origin-topic"] == kafka_pool.topic
        assert headers["penstock-origin-partition"] in ("0", "1")
        assert int(headers["penstock-origin-offset"]) >= 0
        assert headers["penstock-error-type"] == "builtins.ValueError"
        assert headers["penstock-error-message"] == "it never works"
    discarded = [
        v
        for k, v in broker.metrics().items()
        if "outcome=discarded:attempts_exhausted" in k and "_total" in k
    ]
    assert discarded == [20]


@pytest.mark.timeout(90)
def test_delays_are_kept_and_what_expired_never_starts(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    app = kafka_pool.app()
    noop = app.tasks["noop"]
    sent = {
        noop.options(countdown=seconds).delay().id: (time.time(), seconds)
        for seconds in (1, 2, 3)
        for _ in range(30)
    }
    # No worker yet: these expire while they wait, delayed or not.
    expiring = [noop.options(expires=1).delay().id for _ in range(10)]
    expiring += [noop.options(countdown=2, expires=1).delay().id for _ in range(10)]
    alive = [noop.options(expires="1h").delay().id for _ in range(10)]
    letters = kafka_pool.dead_letters(20)
    assert {letter.key for letter in letters} == set(expiring)
    assert {letter.headers["penstock-reason"] for letter in letters} == {"expired"}
    kafka_pool.worker([broker], slots=2)
    kafka_pool.await_all([*sent, *alive])
    kafka_pool.await_empty(broker)
    for execution in kafka_pool.executions():
        if execution.id in sent:
            at, seconds = sent[execution.id]
            assert execution.at >= at + seconds, "early"


@pytest.mark.timeout(90)
def test_a_task_beyond_its_deadline_is_killed_and_the_others_go_on(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=2)
    app = kafka_pool.app()
    stuck = app.tasks["stuck"].delay()
    ids = [app.tasks["sleep"].delay(0.01).id for _ in range(200)]
    assert set(kafka_pool.await_all(ids).values()) == {1}
    (letter,) = kafka_pool.dead_letters(1)
    assert letter.key == stuck.id
    assert letter.headers["penstock-attempts"] == "1"
    kafka_pool.await_empty(broker)
    assert kafka_pool.started()[stuck.id] == 1


@pytest.mark.timeout(90)
def test_a_task_that_blocks_for_long_does_not_hold_up_its_partition(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=2)
    app = kafka_pool.app()
    gate = kafka_pool.folder / "gate"
    blocked = app.tasks["wait_for"].delay(str(gate))
    ids = [app.tasks["noop"].delay(n).id for n in range(2_000)]
    eventually("all behind it are done", lambda: set(ids) <= kafka_pool.ended().keys())
    assert kafka_pool.ended()[blocked.id] == 0
    eventually("only it is held", lambda: broker.held() == 1)
    # Its offset was passed long ago: a restart brings it back from the store, not from Kafka.
    broker.kill()
    broker.start()
    gate.touch()
    assert set(kafka_pool.await_all([blocked.id, *ids]).values()) == {1}
    kafka_pool.await_empty(broker)
