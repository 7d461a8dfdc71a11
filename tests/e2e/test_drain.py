"""A broker goes: what it holds is finished there or goes on elsewhere, and what was done stays done."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock_client import App
from tests.e2e.harness import Pool, eventually
from tests.e2e.raw_worker import Acknowledgements
from tests.e2e.test_faults import Producing, check_acknowledged, raw_workers
from tests.e2e.test_forwarding import finished


def apart(app: App, task: str, count: int) -> list[str]:
    """Send these, and pause: what is sent within 10 ms goes to one partition, and so to one broker."""
    ids = [app.tasks[task].delay().id for _ in range(count)]
    time.sleep(0.012)
    return ids


@pytest.mark.timeout(180)
def test_a_broker_is_drained_under_load(kafka_pool: Pool, tmp_path: Path) -> None:
    kafka_pool.create_topic(8)
    leaves = kafka_pool.broker("leaves")
    stays = kafka_pool.broker("stays")
    eventually("they share", lambda: leaves.metrics()["penstock_kafka_partitions"] == 4, 40)
    books = Acknowledgements()
    workers = raw_workers([leaves, stays], books, each=2)
    producing = Producing(kafka_pool, "raw.noop", 500)
    producing.start()
    app = kafka_pool.app()
    # Nobody serves these yet, on either of them.
    waiting = [id for _ in range(40) for id in apart(app, "quiet.noop", 50)]
    gate = tmp_path / "gate"
    kafka_pool.worker([leaves], name="worker-of-leaves", slots=4)
    main = [app.tasks["wait_for"].delay(str(gate)).id for _ in range(2)]
    main += [id for _ in range(40) for id in apart(app, "patient", 1)]
    assert app.flush() == 0
    eventually("under load", lambda: len(books.acknowledged) > 1_000)
    eventually("some failed", lambda: leaves.metrics().get("penstock_tasks{state=delayed}", 0) > 5)
    draining = kafka_pool.drain(leaves, grace_seconds=4)
    eventually("handing over", lambda: "drain: handing over" in leaves.text(), 30)
    gate.touch()
    assert draining.wait(60) == 0, draining.text()
    assert f"{finished(leaves, 'handed_over'):,} handed over; left: none" in draining.text()
    assert finished(leaves, "handed_over") > 500
    leaves.check_books()
    assert leaves.terminate() == 0
    leaves.database.unlink()
    before = kafka_pool.started()
    kafka_pool.worker([stays], name="worker-of-stays", namespaces=("main", "quiet"))
    ids = producing.stop()
    eventually("all acknowledged", lambda: len(books.acknowledged) == len(ids), 60)
    ended = kafka_pool.await_all([*waiting, *main])
    kafka_pool.await_empty(stays)
    for worker in workers:
        worker.stop()
    check_acknowledged(books, ids)
    assert set(ended.values()) == {1}
    # A failed attempt was counted wherever it was, and what it was put off by.
    starts = [e for e in kafka_pool.executions() if e.what == "start" and e.id in main[2:]]
    moved = [id for id in main[2:] if before[id] == 1]
    assert moved
    for id in moved:
        first, second = sorted((e for e in starts if e.id == id), key=lambda e: e.at)
        assert (first.attempt, second.attempt) == (1, 2)
        assert second.at - first.at >= 15


@pytest.mark.timeout(120)
def test_what_cannot_leave_is_told(direct_pool: Pool) -> None:
    """Without Kafka there is no topic to hand over to; new tasks are refused meanwhile."""
    broker = direct_pool.broker()
    app = direct_pool.app(broker=broker.address)
    ids = [app.tasks["noop"].delay().id for _ in range(10)]
    assert app.flush() == 0
    draining = direct_pool.drain(broker, grace_seconds=1)
    assert draining.wait(30) == 1
    assert "0 handed over; left: 10 pending" in draining.text()
    assert "there is no topic to hand tasks over to" in draining.text()
    with grpc.insecure_channel(broker.address) as channel:
        send: Any = channel.unary_unary("/penstock.v1.ProducerService/SendTasks")
        with pytest.raises(grpc.RpcError, match=r"UNAVAILABLE[^$]*this broker is being drained"):
            send(b"", timeout=10)
    # It goes on with what it holds.
    direct_pool.worker([broker])
    direct_pool.await_all(ids)
    assert direct_pool.drain(broker, grace_seconds=1).wait(30) == 0
