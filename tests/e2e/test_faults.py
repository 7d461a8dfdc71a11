"""Brokers, workers and Kafka are killed, stopped and started under load: nothing is lost, and nothing
that was acknowledged is handed out again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

import pytest

from tests.e2e.harness import Broker, Pool, eventually
from tests.e2e.raw_worker import Acknowledgements, RawWorker
from tests.kafka_server import JavaKafka


class Producing(threading.Thread):
    """Sends tasks at a steady rate until stopped; ``ids`` are those that were acknowledged."""

    def __init__(self, pool: Pool, taskname: str, per_second: int) -> None:
        super().__init__(name="producer", daemon=True)
        self._task = pool.app().tasks[taskname]
        self._app = self._task.app
        self._pause = 1 / per_second
        self._stopping = threading.Event()
        self.ids: list[str] = []

    def run(self) -> None:
        while not self._stopping.wait(self._pause):
            self.ids.append(self._task.delay().id)

    def stop(self) -> list[str]:
        self._stopping.set()
        self.join()
        assert self._app.flush() == 0
        return self.ids


def raw_workers(brokers: Sequence[Broker], books: Acknowledgements, each: int = 1) -> list[RawWorker]:
    workers = [RawWorker(broker.address, books) for broker in brokers for _ in range(each)]
    for worker in workers:
        worker.start()
    return workers


def check_acknowledged(books: Acknowledgements, ids: Sequence[str]) -> None:
    assert books.violations == [], "acknowledged, and handed out again"
    assert books.acknowledged == set(ids)


@pytest.mark.timeout(180)
def test_a_broker_is_killed_under_load_and_restarted(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(4)
    broker = kafka_pool.broker()
    books = Acknowledgements()
    app = kafka_pool.app()
    raw_ids = [app.tasks["raw.noop"].delay().id for _ in range(4_000)]
    ids = [app.tasks["noop"].delay().id for _ in range(4_000)]
    assert app.flush() == 0
    kafka_pool.worker([broker], slots=2)
    workers = raw_workers([broker], books, each=2)
    for share in (0.1, 0.35, 0.6):
        eventually(f"{share:.0%} done", lambda share=share: len(books.acknowledged) >= share * len(raw_ids))  # type: ignore[misc]
        broker.kill()
        broker.start()
    eventually("all acknowledged", lambda: len(books.acknowledged) == len(raw_ids), 60)
    ended = kafka_pool.await_all(ids)
    kafka_pool.await_empty(broker)
    for worker in workers:
        worker.stop()
    check_acknowledged(books, raw_ids)
    # The worker's own reports survive a restart, too: it ran nothing twice but what was given out
    # again because its claim or its report was not durable, a handful at each kill.
    twice = sum(n - 1 for n in ended.values())
    assert twice <= 3 * 64, f"{twice} tasks ran twice"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("killed", [False, True])
def test_brokers_join_and_leave_while_producing(kafka_pool: Pool, killed: bool) -> None:
    """Partitions move back and forth; what one broker acknowledged, no other runs."""
    kafka_pool.create_topic(8)
    books = Acknowledgements()
    stays = kafka_pool.broker("stays")
    joins = kafka_pool.broker("joins", start=False)
    producing = Producing(kafka_pool, "raw.noop", 1_500)
    producing.start()
    workers = raw_workers([stays, joins], books, each=2)
    eventually("under load", lambda: len(books.acknowledged) > 1_000)
    joins.start()
    eventually("the newcomer has partitions", lambda: joins.metrics()["penstock_kafka_partitions"] == 4, 40)
    before = joins.metrics()["penstock_claimed_tasks_total"]
    eventually("and works", lambda: joins.metrics()["penstock_claimed_tasks_total"] > before + 500)
    # It leaves, in order or not; the other takes over what it has not taken.
    if killed:
        joins.kill()
    else:
        assert joins.terminate() == 0
    eventually("the other reads all", lambda: stays.metrics()["penstock_kafka_partitions"] == 8, 40)
    # What the one that left still holds is its own, and it finishes that when it comes back.
    joins.start()
    ids = producing.stop()
    eventually("all acknowledged", lambda: len(books.acknowledged) == len(ids), 60)
    kafka_pool.await_empty(stays, joins)
    for worker in workers:
        worker.stop()
    check_acknowledged(books, ids)


@pytest.mark.timeout(120)
def test_workers_are_killed(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker(LEASE_SECONDS="3")
    app = kafka_pool.app()
    ids = [app.tasks["sleep"].delay(0.005).id for _ in range(3_000)]
    workers = [kafka_pool.worker([broker], name=f"worker-{n}", slots=2) for n in range(3)]
    for n, worker in enumerate(workers[:2]):
        eventually("under way", lambda n=n: len(kafka_pool.ended()) > 400 * (n + 1))  # type: ignore[misc]
        worker.kill()
    ended = kafka_pool.await_all(ids)
    kafka_pool.await_empty(broker)
    lost = broker.metrics()["penstock_deliveries_lost_total"]
    twice = sum(n - 1 for n in ended.values())
    # Only what a killed worker held can have run twice, and each such delivery was counted.
    assert lost > 0
    assert twice <= lost


@pytest.mark.timeout(180)
def test_kafka_stops_and_starts_in_the_middle(own_kafka: JavaKafka, kafka_pool: Pool) -> None:
    kafka_pool.create_topic(4)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=2)
    app = kafka_pool.app()
    ids = [app.tasks["sleep"].delay(0.002).id for _ in range(2_000)]
    assert app.flush() == 0
    eventually("all taken", lambda: broker.metrics().get("penstock_kafka_up") == 1 and broker.held() > 200)
    own_kafka.stop()
    done = len(kafka_pool.ended())
    eventually("what is stored goes on without Kafka", lambda: len(kafka_pool.ended()) > done + 100)
    assert broker.is_serving()
    own_kafka.start()
    ids += [app.tasks["noop"].delay().id for _ in range(500)]
    assert app.flush() == 0
    ended = kafka_pool.await_all(ids)
    kafka_pool.await_empty(broker)
    assert sum(n - 1 for n in ended.values()) == 0


@pytest.mark.timeout(180)
def test_sigterm_under_load_ends_in_order(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(4)
    brokers = [kafka_pool.broker(f"broker-{n}") for n in range(2)]
    books = Acknowledgements()
    app = kafka_pool.app()
    raw_ids = [app.tasks["raw.noop"].delay().id for _ in range(6_000)]
    ids = [app.tasks["sleep"].delay(0.002).id for _ in range(3_000)]
    assert app.flush() == 0
    workers = [kafka_pool.worker(brokers, name=f"worker-{n}") for n in range(2)]
    raw = raw_workers(brokers, books)
    eventually("under load", lambda: len(books.acknowledged) > 500 and len(kafka_pool.ended()) > 300)
    assert workers[0].terminate() == 0
    for broker in brokers:
        assert broker.terminate(10) == 0
        broker.start()
    kafka_pool.worker(brokers, name="worker-new")
    eventually("all acknowledged", lambda: len(books.acknowledged) == len(raw_ids), 60)
    ended = kafka_pool.await_all(ids)
    kafka_pool.await_empty(*brokers)
    for thread in raw:
        thread.stop()
    check_acknowledged(books, raw_ids)
    # Everybody left in order, so every result was reported, and nothing reported ran again.
    assert set(ended.values()) == {1}


@pytest.mark.timeout(90)
def test_a_broker_that_stood_still_takes_no_task_from_a_living_worker(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker(LEASE_SECONDS="4")
    kafka_pool.worker([broker], slots=2)
    gate = kafka_pool.folder / "gate"
    ref = kafka_pool.app().tasks["wait_for"].delay(str(gate)).wait(10)
    eventually("it runs", lambda: kafka_pool.started()[ref.id] == 1)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    threading.Event().wait(6)  # the stand-still itself, longer than the lease
    broker.process.send_signal(signal.SIGCONT)
    eventually("it answers again", broker.is_serving)
    gate.touch()
    assert kafka_pool.await_all([ref.id]) == {ref.id: 1}
    kafka_pool.await_empty(broker)
    assert broker.metrics()["penstock_deliveries_lost_total"] == 0
