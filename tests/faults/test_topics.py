"""Topics that grow or are made anew, late acknowledgements, poison, a loop that is blocked."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from tests.e2e.harness import Pool, eventually
from tests.faults.conftest import Figure
from tests.faults.load import HELD_MAX, Load
from tests.faults.network import proxy
from tests.kafka_server import JavaKafka


@pytest.mark.timeout(180)
def test_partitions_are_added(kafka_pool: Pool) -> None:
    """What is produced to them before a broker has noticed is consumed, too."""
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker])
    admin = AdminClient({"bootstrap.servers": kafka_pool.kafka or ""})
    before = [kafka_pool.app().tasks["noop"].delay().wait(30).id for _ in range(100)]
    for future in admin.create_partitions([NewPartitions(kafka_pool.topic, 4)]).values():
        future.result(30)
    app = kafka_pool.app()  # one that knows the new partitions at once
    after = [app.tasks["noop"].delay().wait(30).id for _ in range(400)]
    assert set(kafka_pool.await_all([*before, *after], 120).values()) == {1}
    assert broker.metrics()["penstock_kafka_partitions"] == 4
    kafka_pool.await_empty(broker)


@pytest.mark.xfail(reason="not met, see B8 in docs/faults.md", strict=False)
@pytest.mark.timeout(180)
def test_a_topic_is_deleted_and_made_anew(kafka_pool: Pool) -> None:
    """The same offsets are other tasks now: they are new."""
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker])
    before = [kafka_pool.app().tasks["noop"].delay().wait(30).id for _ in range(200)]
    kafka_pool.await_all(before)
    kafka_pool.await_empty(broker)
    admin = AdminClient({"bootstrap.servers": kafka_pool.kafka or ""})
    admin.delete_topics([kafka_pool.topic])[kafka_pool.topic].result(30)
    eventually("it is gone", lambda: kafka_pool.topic not in admin.list_topics(timeout=10).topics)
    admin.create_topics([NewTopic(kafka_pool.topic, 1, 1)])[kafka_pool.topic].result(30)
    app = kafka_pool.app()
    after = [app.tasks["noop"].delay().wait(60).id for _ in range(300)]
    assert set(kafka_pool.await_all([*before, *after], 60).values()) == {1}
    kafka_pool.await_empty(broker)


@pytest.mark.timeout(180)
def test_slow_acknowledgements_hold_up_the_outbox_only(
    own_kafka: JavaKafka, kafka_pool: Pool, figure: Figure
) -> None:
    kafka_pool.create_topic(2)
    with proxy(own_kafka.behind_port, own_kafka.before_port) as to_kafka:
        broker = kafka_pool.broker(KAFKA_CLUSTER=f"127.0.0.1:{own_kafka.before_port}")
        kafka_pool.worker([broker], slots=4)
        app = kafka_pool.app()
        warm = [app.tasks["noop"].delay().id for _ in range(200)]
        kafka_pool.await_all(warm)
        to_kafka.delay_seconds = 1.0
        failing = [app.tasks["hopeless"].delay().id for _ in range(20)]
        ids = [app.tasks["noop"].delay().id for _ in range(2_000)]
        begun = time.monotonic()
        eventually("all run", lambda: set(ids) <= kafka_pool.ended().keys())
        took = time.monotonic() - begun
        letters = kafka_pool.dead_letters(len(failing), seconds=60)
        assert {letter.key for letter in letters} == set(failing)
        to_kafka.delay_seconds = 0
        kafka_pool.await_empty(broker)
        figure(f"each answer of Kafka 1 s late: {len(ids)} tasks ran within {took:.1f} s")


@pytest.mark.timeout(180)
def test_a_blocked_event_loop_keeps_its_place_in_the_group(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(4)
    brokers = [kafka_pool.broker(f"broker-{n}", start=False, LEASE_SECONDS="3") for n in range(2)]
    blocked, other = brokers
    path = f"{Path(__file__).parent / 'stall'}:{Path(__file__).parents[2]}"
    # Longer than the session, and than a lease.
    blocked.environment |= {"PYTHONPATH": path, "PENSTOCK_TEST_STALL": "9"}
    for broker in brokers:
        broker.start()

    def partitions() -> list[float]:
        return [broker.metrics()["penstock_kafka_partitions"] for broker in brokers]

    eventually("both have theirs", lambda: partitions() == [2, 2])
    load = Load(kafka_pool, brokers)
    assert blocked.process is not None
    blocked.process.send_signal(signal.SIGUSR2)
    threading.Event().wait(1)  # it has come to the signal
    assert not blocked.is_serving(), "health is told while the loop is blocked"
    most = 0.0
    while not blocked.is_serving():
        most = max(most, other.metrics()["penstock_kafka_partitions"])
    assert (most, partitions()) == (2, [2, 2]), "its partitions were given away"
    load.await_more()
    load.finish()
    assert load.twice <= HELD_MAX


@pytest.mark.timeout(240)
def test_a_flood_of_poison_delays_nobody(
    kafka_pool: Pool, request: pytest.FixtureRequest, figure: Figure
) -> None:
    count = 3_000 if request.config.getoption("--short") else 50_000
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker(start=False)
    producer = Producer({"bootstrap.servers": kafka_pool.kafka or "", "linger.ms": 20})
    for _ in range(count):
        producer.produce(kafka_pool.topic, b"\xff" + uuid.uuid4().bytes)
        producer.poll(0)
    assert producer.flush(60) == 0
    ids = [kafka_pool.app().tasks["noop"].delay().wait(30).id for _ in range(20)]
    begun = time.monotonic()
    broker.start()
    kafka_pool.worker([broker])
    assert set(kafka_pool.await_all(ids, 120).values()) == {1}
    letters = kafka_pool.dead_letters(count, seconds=120)
    took = time.monotonic() - begun
    assert len({letter.headers["penstock-forward-id"] for letter in letters}) == count
    kafka_pool.await_empty(broker)
    figure(
        f"{count} poison messages in the dead letters {took:.1f} s after the start of the broker's process"
    )
