"""Tasks that take their process with them: the slot comes back, the others go on, the evidence is kept."""

from __future__ import annotations

import re
import time

import pytest

from tests.e2e.harness import Pool, eventually
from tests.faults.conftest import Figure

DELIVERIES_MAX = 3
# The task, what its dead letter says, and what its last stack shows.
FATAL = {
    "exit": ("exited with code 3", ""),
    "crash": ("SIGSEGV", "in crash"),
    "recurse": ("SIGSEGV", "tests/e2e/tasks.py"),
    "bomb": ("SIGKILL", ""),
}


@pytest.mark.timeout(180)
def test_fatal_tasks_stop_at_max_deliveries_and_disturb_nobody(kafka_pool: Pool, figure: Figure) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker(MAX_DELIVERIES=str(DELIVERIES_MAX))
    worker = kafka_pool.worker([broker], slots=3)
    app = kafka_pool.app()
    siblings = [app.tasks["sleep"].delay(0.05).id for _ in range(300)]
    fatal = {app.tasks[name].delay().id: name for name in FATAL}
    letters = {fatal[letter.key]: letter for letter in kafka_pool.dead_letters(len(FATAL), seconds=90)}
    # In processes that may have died under them they had not begun: they have all run once.
    eventually("the siblings have run", lambda: set(siblings) <= kafka_pool.ended().keys())
    kafka_pool.await_empty(broker)
    started, ended = kafka_pool.started(), kafka_pool.ended()
    assert {started[id] for id in siblings} == {1}
    assert {started[id] for id in fatal} == {DELIVERIES_MAX}
    assert not ended.keys() & fatal.keys()
    for name, (said, stack) in FATAL.items():
        headers = letters[name].headers
        assert headers["penstock-reason"] == "max_deliveries"
        assert headers["penstock-deliveries-lost"] == str(DELIVERIES_MAX)
        assert said in headers["penstock-error-message"], name
        assert "peak RSS" in headers["penstock-error-message"]
        assert stack in headers.get("penstock-error-traceback", ""), name
    replaced = worker.text().count("child process gone, starting another")
    assert replaced == DELIVERIES_MAX * len(FATAL)
    message = letters["crash"].headers["penstock-error-message"]
    figure(f"{replaced} children replaced; a letter says: {message}")


@pytest.mark.timeout(120)
def test_a_slot_comes_back_at_once(direct_pool: Pool, figure: Figure) -> None:
    broker = direct_pool.broker(MAX_DELIVERIES="1")
    direct_pool.worker([broker], slots=1)
    app = direct_pool.app(broker=broker.address)
    first = app.tasks["noop"].delay().id
    direct_pool.await_all([first])
    times = []
    for _ in range(5):
        app.tasks["exit"].delay().wait(10)
        died = time.monotonic()
        after = app.tasks["noop"].delay().id
        eventually("the slot works again", lambda after=after: direct_pool.ended()[after] == 1)  # type: ignore[misc]
        times.append(time.monotonic() - died)
    figure(
        f"from the send of a task that exits to the end of the next, on one slot: {max(times):.2f} s at most"
    )


@pytest.mark.timeout(120)
def test_a_task_stuck_in_c_is_killed_at_its_deadline(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=2)
    app = kafka_pool.app()
    stuck = app.tasks["stuck_in_c"].delay()
    siblings = [app.tasks["sleep"].delay(0.02).id for _ in range(200)]
    (letter,) = kafka_pool.dead_letters(1)
    assert letter.key == stuck.id
    assert letter.headers["penstock-attempts"] == "1"
    assert "Killed at its deadline of 1 s" in letter.headers["penstock-error-message"]
    ran = re.search(r"running for ([0-9.]+) s", letter.headers["penstock-error-message"])
    assert ran is not None
    eventually("the siblings have run", lambda: set(siblings) <= kafka_pool.ended().keys())
    assert {kafka_pool.started()[id] for id in siblings} == {1}
    kafka_pool.await_empty(broker)


@pytest.mark.timeout(180)
def test_results_wait_for_a_broker_that_is_away(direct_pool: Pool, figure: Figure) -> None:
    """For longer than its lease: it gives every claim a new one when it is back."""
    broker = direct_pool.broker(LEASE_SECONDS="3")
    direct_pool.worker([broker], slots=8)
    gate = direct_pool.folder / "gate"
    app = direct_pool.app(broker=broker.address)
    ids = [app.tasks["wait_for"].delay(str(gate)).wait(10).id for _ in range(8)]
    eventually("all run", lambda: direct_pool.started().keys() == set(ids))
    broker.kill()
    gate.touch()
    eventually("all have ended", lambda: direct_pool.ended().keys() == set(ids))
    away = 8
    time.sleep(away)  # the outage
    broker.start()
    begun = time.monotonic()
    direct_pool.await_empty(broker)
    assert set(direct_pool.started().values()) == {1}
    figure(f"8 results accepted {time.monotonic() - begun:.1f} s after the end of an outage of {away} s")


@pytest.mark.timeout(300)
def test_no_start_beyond_the_retry_budget_when_the_broker_dies(kafka_pool: Pool, figure: Figure) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker(LEASE_SECONDS="3")
    kafka_pool.worker([broker], slots=4)
    app = kafka_pool.app()
    count, kills = 400, 5
    ids = {app.tasks["hopeless"].delay().id for _ in range(count)}
    assert app.flush() == 0
    for kill in range(1, kills + 1):
        wanted = kill * count * 3 // (kills + 1)
        eventually("under way", lambda wanted=wanted: sum(kafka_pool.started().values()) >= wanted)  # type: ignore[misc]
        broker.kill()
        broker.start()
    letters = kafka_pool.dead_letters(count, seconds=90)
    assert {letter.key for letter in letters} == ids
    # Of each attempt one report was accepted, and there is no fourth.
    assert {letter.headers["penstock-attempts"] for letter in letters} == {"3"}
    assert {letter.headers["penstock-reason"] for letter in letters} == {"attempts_exhausted"}
    assert max(e.attempt for e in kafka_pool.executions()) == 3
    kafka_pool.await_empty(broker)
    again = sum(kafka_pool.started().values()) - 3 * count
    figure(f"{kills} kills, {count} tasks of 3 attempts: {again} starts repeated, none accepted twice")
