"""What operators do to a pool: the command ``penstock`` on brokers, workers and a real Kafka."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.harness import ROOT, Broker, Pool, Process, eventually


def run(*arguments: str, brokers: list[Broker] | None = None) -> subprocess.CompletedProcess[str]:
    addresses = ",".join(broker.address for broker in brokers or [])
    ran = subprocess.run(
        [sys.executable, "-m", "penstock_client", *arguments],
        env={**os.environ, "PENSTOCK_RPC_HOST_LIST": addresses},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=90,
        check=False,
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


def told(*arguments: str, brokers: list[Broker] | None = None) -> Any:
    ran = run(*arguments, "-o", "json", brokers=brokers)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def check_namespaces(*brokers: Broker) -> None:
    """The books of each namespace balance, by the metric and by the command."""
    for broker in brokers:
        differences = {k: v for k, v in broker.metrics().items() if "namespace_books_difference" in k}
        assert differences
        assert set(differences.values()) == {0}, differences
    namespaces = told("namespaces", "ls", brokers=list(brokers))
    assert {namespace["books_difference"] for namespace in namespaces} == {0}


@pytest.mark.timeout(120)
def test_a_running_task_that_is_cancelled_is_killed_and_its_slot_is_free(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker(LEASE_SECONDS="3")
    kafka_pool.worker([broker], slots=1)
    app = kafka_pool.app()
    blocked = app.tasks["wait_for"].delay(str(kafka_pool.folder / "never")).id
    eventually("it runs", lambda: kafka_pool.started()[blocked])
    eventually(
        "its worker has said so", lambda: "it runs on" in run("explain", blocked, brokers=[broker]).stdout
    )
    others = [app.tasks["noop"].delay(n).id for n in range(20)]
    (cancelled,) = told("tasks", "cancel", blocked, brokers=[broker])
    assert cancelled == {"id": blocked, "result": "killed"}
    assert set(kafka_pool.await_all(others, 30).values()) == {1}
    kafka_pool.await_empty(broker)
    assert kafka_pool.started()[blocked] == 1
    explained = run("explain", blocked, brokers=[broker])
    assert "cancelled by an operator" in explained.stdout
    check_namespaces(broker)
    terms = {k: v for k, v in broker.metrics().items() if "outcome=cancelled" in k and "_total" in k}
    assert list(terms.values()) == [1]


@pytest.mark.timeout(180)
def test_a_namespace_paused_under_load_starts_nothing_and_loses_nothing(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(4)
    brokers = [kafka_pool.broker("one"), kafka_pool.broker("two")]
    # One that is killed below while it gives partitions up is another fault (B4).
    eventually("both read", lambda: all(b.metrics()["penstock_kafka_partitions"] == 2 for b in brokers))
    kafka_pool.worker(brokers, slots=2, namespaces=("main", "flood"))
    app = kafka_pool.app()
    ids = [app.tasks[name].delay(n).id for n in range(400) for name in ("noop", "flood.noop")]
    assert app.flush() == 0
    eventually("both run", lambda: kafka_pool.ended().keys() & set(ids[1::2]))
    assert {p["paused"] for p in told("namespaces", "pause", "e2e/flood", brokers=brokers)} == {True}
    # What was fetched before runs to its end; then nothing of it starts, whatever comes in.
    eventually("none is claimed", lambda: all(n["processing"] == 0 for n in _floods(brokers)))
    paused = {e.id for e in kafka_pool.executions() if e.namespace == "flood"}
    more = [app.tasks[name].delay(n).id for n in range(600) for name in ("noop", "flood.noop")]
    assert app.flush() == 0
    mains = set(ids[::2] + more[::2])
    eventually("the other namespace goes on", lambda: mains <= kafka_pool.ended().keys())
    waiting = 1000 - len(paused)
    eventually("all are kept", lambda: sum(n["pending"] for n in _floods(brokers)) == waiting)
    assert {e.id for e in kafka_pool.executions() if e.namespace == "flood"} == paused
    # Over a restart, too.
    brokers[0].kill()
    brokers[0].start()
    assert all(n["paused_at"] for n in _floods(brokers))
    check_namespaces(*brokers)
    again = [app.tasks["noop"].delay(n).id for n in range(50)]
    eventually("the restarted one serves", lambda: set(again) <= kafka_pool.ended().keys())
    assert {e.id for e in kafka_pool.executions() if e.namespace == "flood"} == paused
    told("namespaces", "resume", "e2e/flood", brokers=brokers)
    assert set(kafka_pool.await_all([*ids, *more, *again]).values()) == {1}
    kafka_pool.await_empty(*brokers)
    check_namespaces(*brokers)


def _floods(brokers: list[Broker]) -> list[dict[str, Any]]:
    return [n for n in told("namespaces", "ls", brokers=brokers) if n["namespace"] == "flood"]


@pytest.mark.timeout(240)
def test_dead_letters_on_kafka_are_replayed_once_each_whatever_interrupts_it(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=2)
    app = kafka_pool.app()
    gate = kafka_pool.folder / "gate"
    ids = [app.tasks["needs"].delay(str(gate)).id for _ in range(40)]
    hopeless = app.tasks["hopeless"].delay().id
    kafka_pool.dead_letters(41)
    everything = ("dlq", "ls", "--limit", "1000")
    listed = told(*everything, brokers=[broker])
    assert {letter["id"] for letter in listed} == {*ids, hopeless}
    assert {letter["taskname"] for letter in listed} == {"needs", "hopeless"}
    shown = run("dlq", "show", hopeless, brokers=[broker]).stdout
    assert "it never works" in shown
    explained = run("explain", ids[0], brokers=[broker])
    assert "finished" in explained.stdout

    gate.touch()
    chosen = ("dlq", "replay", "--taskname", "needs", "--yes")
    assert run("dlq", "replay", "--taskname", "needs", brokers=[broker]).returncode == 5
    # Killed in the middle, without a chance to say goodbye: it would take 80 s.
    environment = {"PENSTOCK_RPC_HOST_LIST": broker.address}
    command = ["-m", "penstock_client", *chosen, "--rate", "0.5"]
    slow = Process("replay", kafka_pool.folder, command, environment)
    kafka_pool.processes.append(slow)
    slow.start()
    eventually("some were replayed", lambda: len(kafka_pool.ended()) >= 3)
    assert slow.running, slow.text()
    slow.kill()
    assert len(kafka_pool.ended()) < 40
    # The same command goes on; meanwhile the broker restarts.
    broker.kill()
    broker.start()
    rest = told(*chosen, brokers=[broker])
    assert 0 < rest["done"] < 40
    assert (rest["left"], rest["failed"]) == (0, 0)
    eventually("each has run", lambda: len(kafka_pool.ended()) >= 40)
    kafka_pool.await_empty(broker)
    assert set(kafka_pool.ended().values()) == {1}
    assert len(kafka_pool.ended()) == 40, "each of them once"
    assert kafka_pool.ended().keys().isdisjoint(ids), "under new ids"

    # What was handled is left out, and stays to be seen.
    assert told(*chosen, brokers=[broker])["matched"] == 0
    assert [letter["id"] for letter in told(*everything, brokers=[broker])] == [hopeless]
    handled = [
        letter["handled"] for letter in told(*everything, "--all", brokers=[broker]) if letter["handled"]
    ]
    assert len(handled) == 40
    assert {record["action"] for record in handled} == {"replayed"}
    assert {record["new_id"] for record in handled} == kafka_pool.ended().keys()

    # Once more on request, under yet other ids.
    again = told("dlq", "replay", ids[0], "--again", "--yes", brokers=[broker])
    assert again["done"] == 1
    eventually("it has run again", lambda: len(kafka_pool.ended()) == 41)

    # Without any broker: Kafka is enough.
    kafka_pool.await_empty(broker)
    check_namespaces(broker)
    broker.kill()
    direct = ("--kafka", str(kafka_pool.kafka), "--topic", f"{kafka_pool.topic}-dlq")
    assert told("dlq", "discard", hopeless, "--yes", *direct)["done"] == 1
    assert told(*everything, *direct) == []
    missing = run("dlq", "ls", "--kafka", str(kafka_pool.kafka), "--topic", "no-such-topic")
    assert (missing.returncode, "no topic no-such-topic" in missing.stderr) == (1, True)
    away = run("dlq", "ls", "--kafka", "127.0.0.1:1", "--topic", "any")
    assert (away.returncode, "cannot be reached" in away.stderr) == (3, True)


@pytest.mark.timeout(90)
def test_status_tells_of_kafka_workers_and_what_needs_attention(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=3)
    app = kafka_pool.app()
    ids = [app.tasks["noop"].delay(n).id for n in range(50)]
    kafka_pool.await_all(ids)
    kafka_pool.await_empty(broker)
    (status,) = told("status", brokers=[broker])
    assert (status["healthy"], status["books_difference"], status["ended"]) == (True, 0, 50)
    assert status["kafka"]["topic"] == kafka_pool.topic
    assert status["kafka"]["connected"] is True
    assert len(status["kafka"]["partitions"]) == 2
    (worker,) = told("workers", "ls", brokers=[broker])
    assert (worker["slots"], worker["application"], worker["namespaces"]) == (3, "e2e", ["main"])
    told("namespaces", "pause", "main", brokers=[broker])
    (status,) = told("status", "--sample", "0", brokers=[broker])
    assert ["paused" in line for line in status["attention"]] == [True]


def broker_command(broker: Broker, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``penstock-broker`` with the settings of a broker."""
    ran = subprocess.run(
        [sys.executable, "-m", "penstock_broker", *arguments],
        env=broker.environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=110,
        check=False,
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


@pytest.mark.timeout(180)
def test_the_command_drain_hands_over_what_cannot_end_here(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    leaves = kafka_pool.broker("leaves")
    app = kafka_pool.app()
    ids = [app.tasks["noop"].delay(n).id for n in range(300)]
    assert app.flush() == 0
    eventually("it holds them", lambda: leaves.held() == 300)
    stays = kafka_pool.broker("stays")
    drained = broker_command(leaves, "drain", "--grace-seconds", "1")
    assert drained.returncode == 0, drained.stderr
    assert "300 handed over; left: none" in drained.stdout.splitlines()[-1]
    check_namespaces(leaves)
    assert leaves.terminate() == 0
    kafka_pool.worker([stays])
    assert set(kafka_pool.await_all(ids).values()) == {1}
    kafka_pool.await_empty(stays)
    check_namespaces(stays)


@pytest.mark.timeout(240)
def test_the_command_adopt_takes_over_what_a_lost_broker_left(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    lost = kafka_pool.broker("lost")
    app = kafka_pool.app()
    ids = [app.tasks["noop"].delay(n).id for n in range(300)]
    assert app.flush() == 0
    eventually("it holds them", lambda: lost.held() == 300)
    assert lost.terminate() == 0
    lost.database.unlink()
    heir = kafka_pool.broker("heir")
    name = lost.environment["TASKBROKER_BROKER_ID"]
    unknown = broker_command(heir, "adopt", "nobody")
    assert (unknown.returncode, "knows no broker 'nobody'" in unknown.stderr) == (1, True)
    adopted = broker_command(heir, "adopt", name, "--force")
    assert adopted.returncode == 0, adopted.stderr
    assert "adopted 300 unfinished tasks" in adopted.stdout
    again = broker_command(heir, "adopt", name, "--force")
    assert (again.returncode, "already" in again.stderr) == (1, True)
    kafka_pool.worker([heir])
    assert set(kafka_pool.await_all(ids).values()) == {1}
    kafka_pool.await_empty(heir)
    check_namespaces(heir)
