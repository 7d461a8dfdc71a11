"""Kafka is killed, stopped, frozen or away for longer than a session; brokers come and go."""

from __future__ import annotations

import random
import re
import time
from functools import partial

import pytest
from confluent_kafka import Consumer, Producer

from penstock_protocol.v1.activation_pb2 import TaskActivation
from tests.e2e.harness import Broker, Pool, eventually
from tests.e2e.raw_worker import Acknowledgements, RawWorker
from tests.faults.conftest import Figure
from tests.faults.load import HELD_MAX, Load
from tests.faults.network import proxy
from tests.kafka_server import JavaKafka

SESSION_SECONDS = 6.0
# Of the load's workers: four children, tasks of 5 ms.
RUNS_PER_SECOND_MAX = 4 / 0.005


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["stopped", "killed", "frozen"])
def test_kafka_is_away_under_load(
    own_kafka: JavaKafka, kafka_pool: Pool, seconds: float, dice: random.Random, figure: Figure, how: str
) -> None:
    kafka_pool.create_topic(6)
    brokers = [kafka_pool.broker(f"broker-{n}", LEASE_SECONDS="5") for n in range(2)]
    load = Load(kafka_pool, brokers)
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        away = dice.uniform(0.2, 2 * SESSION_SECONDS)
        leave, come_back = {
            "stopped": (own_kafka.stop, own_kafka.start),
            "killed": (own_kafka.kill, own_kafka.start),
            "frozen": (own_kafka.pause, own_kafka.resume),
        }[how]
        leave()
        try:
            time.sleep(away)  # the outage
            for broker in brokers:
                assert broker.is_serving(), "a broker with its disk serves on without Kafka"
        finally:
            come_back()
        times.append(away)
        load.await_more()
    longest = max(times)
    figure(
        f"{how} {len(times)} times, {longest:.1f} s at most (session {SESSION_SECONDS} s); {load.finish()}"
    )
    # What is not covered when Kafka leaves is run on until that puts it in doubt: half a session.
    uncovered = RUNS_PER_SECOND_MAX * SESSION_SECONDS / 2
    assert load.twice <= len(times) * (len(brokers) * 2 * HELD_MAX + uncovered)


@pytest.mark.timeout(300)
def test_kafka_is_away_for_longer_than_a_session(
    own_kafka: JavaKafka, kafka_pool: Pool, request: pytest.FixtureRequest, figure: Figure
) -> None:
    """What is stored is served on; nothing is lost; the brokers come back by themselves."""
    away = SESSION_SECONDS + 4 if request.config.getoption("--short") else 10 * SESSION_SECONDS
    kafka_pool.create_topic(6)
    brokers = [kafka_pool.broker(f"broker-{n}") for n in range(2)]
    load = Load(kafka_pool, brokers)
    own_kafka.kill()
    time.sleep(away)  # the outage
    for broker in brokers:
        assert broker.is_serving()
        assert broker.metrics()["penstock_kafka_up"] == 0
    own_kafka.start()
    begun = time.monotonic()
    load.await_more()
    again = time.monotonic() - begun
    figure(f"away {away:.0f} s; 200 tasks run within {again:.1f} s after it answers; {load.finish()}")
    assert load.twice <= len(brokers) * 2 * HELD_MAX


@pytest.mark.timeout(600)
def test_brokers_join_and_leave_again_and_again(
    kafka_pool: Pool, seconds: float, dice: random.Random, figure: Figure
) -> None:
    kafka_pool.create_topic(12)
    brokers = [kafka_pool.broker(f"broker-{n}", LEASE_SECONDS="3") for n in range(3)]
    load = Load(kafka_pool, brokers, per_second=600)
    moves = {"stopped": 0, "killed": 0, "joined": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end or not moves["joined"]:
        broker = dice.choice(brokers[1:])  # one stays
        if not broker.running:
            broker.start()
            eventually("it has partitions", lambda b=broker: b.metrics()["penstock_kafka_partitions"] > 0)  # type: ignore[misc]
            moves["joined"] += 1
        elif dice.random() < 0.5:
            broker.kill()
            moves["killed"] += 1
        else:
            assert broker.terminate() == 0
            moves["stopped"] += 1
        load.await_more()
    for broker in brokers:
        if not broker.running:
            broker.start()
    figure(f"{moves}; {load.finish()}")
    assert load.twice <= sum(moves.values()) * 2 * HELD_MAX


@pytest.mark.timeout(600)
def test_what_is_sent_again_after_a_move_is_not_run_again(
    kafka_pool: Pool, request: pytest.FixtureRequest, figure: Figure
) -> None:
    """A broker joins, the other is killed; each time all is sent once more, to whoever reads it now."""
    partitions, count = 4, 5_000 if request.config.getoption("--short") else 50_000
    kafka_pool.create_topic(partitions)
    one, two = (kafka_pool.broker(f"broker-{n}", start=n == 0) for n in range(2))
    books = Acknowledgements()
    workers = [RawWorker(broker.address, books, batch=200) for broker in (one, two)]
    for worker in workers:
        worker.start()
    producer = Producer({"bootstrap.servers": kafka_pool.kafka or "", "linger.ms": 20})
    ids = {f"id-{n}" for n in range(count)}

    def send_all(last: str) -> None:
        """And wait until somebody has read it to its end."""
        for id in sorted(ids):
            _send(producer, kafka_pool.topic, id, id)
        ends = {f"{last}-{partition}" for partition in range(partitions)}
        producer.flush()
        for partition, id in enumerate(sorted(ends)):
            _send(producer, kafka_pool.topic, id, None, partition)
        producer.flush()
        eventually("all is read", lambda: ends | ids <= books.acknowledged, 180)

    send_all("first")
    two.start()
    eventually("both read", lambda: _reads(one) == _reads(two) == partitions // 2)
    send_all("second")
    one.kill()
    assigned = re.compile(f"partitions assigned .*topic={kafka_pool.topic}$", re.MULTILINE)
    eventually("it is assigned all", lambda: len(assigned.findall(two.text())) == 2)
    begun = time.monotonic()
    eventually("it reads all", lambda: _reads(two) == partitions)
    seconds = time.monotonic() - begun
    send_all("third")
    for worker in workers:
        worker.stop()
    twice = sum(n - 1 for n in books.handed_out.values())
    figure(
        f"{count:,} ids sent three times, with moves in between: {twice} ran twice; {count:,} keyed messages"
        f" of two partitions looked through in {seconds:.1f} s"
    )
    assert books.violations == [], "acknowledged, and handed out again"
    # What was killed in the middle of a claim would be.
    assert twice == 0
    assert two.metrics()["penstock_unseen_offsets_total"] == 0


def _send(producer: Producer, topic: str, id: str, key: str | None, partition: int = -1) -> None:
    task = TaskActivation(id=id, application="e2e", namespace="raw", taskname="raw.noop")
    while True:
        try:
            producer.produce(topic, task.SerializeToString(), key, partition)
        except BufferError:
            producer.poll(0.1)
        else:
            return


def _reads(broker: Broker) -> float:
    return broker.metrics()["penstock_kafka_partitions"]


@pytest.mark.timeout(180)
def test_a_broker_that_kafka_takes_for_another_joins_again(kafka_pool: Pool, figure: Figure) -> None:
    """Somebody joins its group by its name, for a moment. Kafka itself can do so after an outage."""
    kafka_pool.create_topic(4)
    brokers = [kafka_pool.broker(f"broker-{n}", LEASE_SECONDS="3") for n in range(2)]
    load = Load(kafka_pool, brokers)
    impostor = Consumer(
        {
            "bootstrap.servers": kafka_pool.kafka or "",
            "group.id": f"penstock-{kafka_pool.topic}",
            "group.instance.id": brokers[0].environment["TASKBROKER_BROKER_ID"],
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": 6_000,
            # What it reads it does not keep.
            "enable.auto.commit": False,
        }
    )
    impostor.subscribe([kafka_pool.topic])
    eventually("it has the partitions", lambda: impostor.poll(0.1) or impostor.assignment())
    eventually("the broker is fenced", lambda: "it joins again" in brokers[0].text())
    impostor.close()
    begun = time.monotonic()
    eventually(
        "both consume",
        lambda: all(broker.metrics()["penstock_kafka_partitions"] > 0 for broker in brokers),
    )
    load.await_more(1_000)
    figure(f"it has partitions again {time.monotonic() - begun:.1f} s later; {load.finish()}")
    assert load.twice <= 4 * HELD_MAX


def _says_more(broker: Broker, what: str, before: int) -> bool:
    return broker.text().count(what) > before


@pytest.mark.timeout(300)
def test_what_a_killed_broker_gave_up_is_read_again(
    own_kafka: JavaKafka, kafka_pool: Pool, figure: Figure
) -> None:
    """It is killed before it has told so, and back within its session: Kafka starts no rebalance for it."""
    kafka_pool.create_topic(4)
    with proxy(own_kafka.behind_port, own_kafka.before_port) as to_kafka:
        address = f"127.0.0.1:{own_kafka.before_port}"
        killed = kafka_pool.broker("killed", LEASE_SECONDS="3", KAFKA_CLUSTER=address)
        other = kafka_pool.broker("other", start=False, LEASE_SECONDS="3")
        for _ in range(3):
            revoked = killed.text().count("partitions revoked")
            eventually("it reads all", lambda: _reads(killed) == 4, seconds=60)
            to_kafka.delay_seconds = 0.5
            other.start()
            eventually("it gives up", partial(_says_more, killed, "partitions revoked", revoked))
            killed.kill()
            # What it has said since is not heard.
            to_kafka.reset()
            to_kafka.delay_seconds = 0
            killed.start()
            begun = time.monotonic()
            eventually("it reads the rest", lambda: _reads(killed) == 2)
            if _reads(other) == 0:
                break
            # It had told so, half a second after all.
            other.terminate()
        assert _reads(other) == 0, "there is nothing to mend"
        load = Load(kafka_pool, [killed, other])
        eventually("all are read", lambda: _reads(killed) + _reads(other) == 4, seconds=60)
        took = time.monotonic() - begun
        assert "read by no broker" in killed.text() + other.text()
        figure(f"what it gave up is read again {took:.1f} s later; {load.finish()}")
    assert load.twice <= 2 * HELD_MAX


@pytest.mark.timeout(120)
def test_of_two_brokers_with_one_id_one_stops(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(4)
    brokers = [kafka_pool.broker(f"broker-{n}", start=False, BROKER_ID="twin") for n in range(2)]
    for broker in brokers:
        broker.start()
    eventually("one stops", lambda: not all(broker.running for broker in brokers))
    (stopped,) = (broker for broker in brokers if not broker.running)
    assert stopped.wait() == 1
    assert "twin" in stopped.text().splitlines()[-2], stopped.text()
