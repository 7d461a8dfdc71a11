"""A broker goes: what it holds is finished there or goes on elsewhere, and what was done stays done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import Pool, eventually
from tests.e2e.raw_worker import Acknowledgements
from tests.e2e.test_faults import Producing, check_acknowledged, raw_workers


@pytest.mark.timeout(180)
def test_a_broker_is_drained_under_load(kafka_pool: Pool, tmp_path: Path) -> None:
    kafka_pool.create_topic(8)
    leaves = kafka_pool.drainable("leaves", grace_seconds=4)
    app = kafka_pool.app()
    # More than it will finish: nobody serves these yet.
    waiting = [app.tasks["quiet.noop"].delay().id for _ in range(2_000)]
    gate = tmp_path / "gate"
    running = app.tasks["wait_for"].delay(str(gate)).id
    failed_once = [app.tasks["patient"].delay().id for _ in range(20)]
    assert app.flush() == 0
    first = kafka_pool.worker([leaves], name="worker-of-leaves", slots=2)
    eventually(
        "all wait for their second attempt",
        lambda: leaves.metrics().get("penstock_tasks{state=delayed}") == len(failed_once),
    )
    eventually("one runs", lambda: kafka_pool.started()[running] == 1)
    stays = kafka_pool.broker("stays")
    books = Acknowledgements()
    workers = raw_workers([leaves, stays], books, each=2)
    producing = Producing(kafka_pool, "raw.noop", 500)
    producing.start()
    eventually("under load", lambda: len(books.acknowledged) > 1_000)
    leaves.drain()
    eventually("handing over", lambda: "drain: handing over" in leaves.text(), 30)
    gate.touch()
    eventually("drained", leaves.report, 60)
    report = leaves.report()
    assert report == {**(report or {}), "finished": True, "phase": "drained", "left": {}, "reasons": []}
    assert report["handed_over"] >= len(waiting) + len(failed_once)
    leaves.check_books()
    assert leaves.terminate() == 0
    leaves.database.unlink()
    kafka_pool.worker([stays], namespaces=("main", "quiet"))
    first.terminate()
    ids = producing.stop()
    eventually("all acknowledged", lambda: len(books.acknowledged) == len(ids), 60)
    ended = kafka_pool.await_all([*waiting, *failed_once, running])
    kafka_pool.await_empty(stays)
    for worker in workers:
        worker.stop()
    check_acknowledged(books, ids)
    assert set(ended.values()) == {1}
    # The attempt that had failed was counted, and what it was put off by.
    for id in failed_once:
        starts = [e for e in kafka_pool.executions() if e.id == id and e.what == "start"]
        assert sorted(e.attempt for e in starts) == [1, 2]
        assert max(e.at for e in starts) - min(e.at for e in starts) >= 8


@pytest.mark.timeout(120)
def test_what_cannot_leave_is_told(direct_pool: Pool) -> None:
    """Without Kafka there is no topic to hand over to; new tasks are refused meanwhile."""
    broker = direct_pool.drainable("broker", grace_seconds=1)
    app = direct_pool.app(broker=broker.address)
    ids = [app.tasks["noop"].delay().id for _ in range(10)]
    assert app.flush() == 0
    broker.drain()
    eventually("it ends", broker.report, 30)
    report = broker.report() or {}
    assert (report["left"], report["handed_over"]) == ({"pending": 10}, 0)
    assert "there is no topic to hand tasks over to" in report["reasons"][0]
    refused = app.tasks["noop"].delay()
    with pytest.raises(Exception, match="being drained"):
        refused.wait(10)
    # It goes on with what it holds.
    broker.database.with_suffix(".report").unlink()
    direct_pool.worker([broker])
    direct_pool.await_all(ids)
    broker.drain()
    eventually("drained", broker.report, 30)
    assert (broker.report() or {})["left"] == {}
