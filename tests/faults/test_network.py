"""Networks between workers, brokers and Kafka that lose everything, are slow, or cut connections."""

from __future__ import annotations

import random
import time
from contextlib import closing

import pytest
from confluent_kafka import Producer

from penstock_client import App
from tests.e2e.harness import Pool, eventually
from tests.faults.conftest import Figure
from tests.faults.load import HELD_MAX, Load
from tests.faults.network import FencedKafka, namespace, proxy
from tests.kafka_server import JavaKafka


@pytest.mark.timeout(300)
def test_a_worker_behind_a_dead_network_is_replaced(
    direct_pool: Pool, request: pytest.FixtureRequest, figure: Figure
) -> None:
    """Real packets, really lost: nobody is told, every connection is half open."""
    gone_seconds = 25 if request.config.getoption("--short") else 60
    with namespace() as net:
        broker = direct_pool.broker(start=False, GRPC_ADDR=net.here, INSECURE="true")
        broker.address = f"{net.here}:{broker.port}"
        broker.start()
        cut_off = direct_pool.worker([broker], name="cut-off", slots=4, within=net.prefix)
        gate = direct_pool.folder / "gate"
        app = direct_pool.app(broker=broker.address)
        ids = [app.tasks["wait_for"].delay(str(gate)).wait(10).id for _ in range(4)]
        eventually("all run", lambda: direct_pool.started().keys() == set(ids))
        net.lose()
        lost_at = time.monotonic()
        direct_pool.worker([broker], name="reachable", slots=4)
        eventually("all run elsewhere", lambda: set(direct_pool.started().values()) == {2}, 40)
        elsewhere = time.monotonic() - lost_at
        eventually("the worker knows", lambda: "broker does not answer" in cut_off.text(), 40)
        knew = time.monotonic() - lost_at
        gate.touch()
        direct_pool.await_empty(broker)
        while time.monotonic() < lost_at + gone_seconds:
            time.sleep(0.5)
        net.heal()
        begun = time.monotonic()
        eventually("its results are refused", lambda: cut_off.text().count("outcome not accepted") == 4)
        refused = time.monotonic() - begun
        more = [app.tasks["noop"].delay().id for _ in range(200)]
        direct_pool.await_all([*ids, *more])
        direct_pool.await_empty(broker)
    assert all(n <= 2 for n in direct_pool.started().values())
    figure(
        f"network namespace, all packets lost for {gone_seconds} s: 4 tasks in flight run elsewhere after"
        f" {elsewhere:.1f} s, the worker knew within {knew:.1f} s, its results were refused"
        f" {refused:.1f} s after the end"
    )


@pytest.mark.timeout(120)
def test_results_of_a_short_partition_arrive_with_their_token(direct_pool: Pool, figure: Figure) -> None:
    with namespace() as net:
        broker = direct_pool.broker(start=False, GRPC_ADDR=net.here, INSECURE="true")
        broker.address = f"{net.here}:{broker.port}"
        broker.start()
        direct_pool.worker([broker], slots=4, within=net.prefix)
        gate = direct_pool.folder / "gate"
        app = direct_pool.app(broker=broker.address)
        ids = [app.tasks["wait_for"].delay(str(gate)).wait(10).id for _ in range(4)]
        eventually("all run", lambda: direct_pool.started().keys() == set(ids))
        net.lose()
        gate.touch()
        eventually("all have ended", lambda: direct_pool.ended().keys() == set(ids))
        time.sleep(6)  # the partition, well within the lease
        assert broker.held() == 4
        net.heal()
        begun = time.monotonic()
        direct_pool.await_empty(broker)
        figure(f"4 results arrive {time.monotonic() - begun:.1f} s after a partition of 6 s")
    assert set(direct_pool.started().values()) == {1}
    assert broker.metrics()["penstock_deliveries_lost_total"] == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("where", ["workers", "kafka"])
def test_partitions_delays_and_resets(
    own_kafka: JavaKafka, kafka_pool: Pool, seconds: float, dice: random.Random, figure: Figure, where: str
) -> None:
    """Through a proxy that swallows everything, is slow, or cuts all connections at any byte."""
    kafka_pool.create_topic(6)
    kafka = f"127.0.0.1:{own_kafka.before_port}" if where == "kafka" else own_kafka.address
    with proxy(own_kafka.behind_port, own_kafka.before_port) as to_kafka:
        broker = kafka_pool.broker("behind", LEASE_SECONDS="5", KAFKA_CLUSTER=kafka)
        other = kafka_pool.broker("other", LEASE_SECONDS="5")
        with proxy(broker.port) as to_broker:
            addresses = [to_broker.address if where == "workers" else broker.address, other.address]
            load = Load(kafka_pool, [broker, other], addresses=addresses)
            wire = to_broker if where == "workers" else to_kafka
            faults = {"black hole": 0, "delay": 0, "reset": 0}
            end = time.monotonic() + seconds
            while time.monotonic() < end or not all(faults.values()):
                fault = dice.choice(list(faults))
                faults[fault] += 1
                if fault == "black hole":
                    wire.black_hole()
                elif fault == "delay":
                    wire.delay_seconds = dice.uniform(0.01, 0.3)
                else:
                    wire.reset()
                time.sleep(dice.uniform(0.5, 9.0))  # the fault
                wire.heal()
                wire.delay_seconds = 0
                load.await_more()
            figure(f"{faults}; {load.finish()}")
    assert load.twice <= sum(faults.values()) * 4 * HELD_MAX


@pytest.mark.timeout(400)
def test_a_kafka_that_names_no_server_is_found_again(
    own_kafka: JavaKafka, kafka_pool: Pool, figure: Figure
) -> None:
    """For a while, as it does when it has stood still. librdkafka alone does not find it again."""
    kafka_pool.create_topic(6)
    with closing(FencedKafka(own_kafka.behind_port, own_kafka.before_port)) as to_kafka:
        address = f"127.0.0.1:{own_kafka.before_port}"
        brokers = [
            kafka_pool.broker(f"broker-{n}", LEASE_SECONDS="5", KAFKA_CLUSTER=address) for n in range(2)
        ]
        load = Load(kafka_pool, brokers)
        to_kafka.fenced = True
        eventually(
            "a client has lost it",
            lambda: any("a new client joins" in broker.text() for broker in brokers),
            seconds=120,
        )
        to_kafka.fenced = False
        begun = time.monotonic()
        eventually("both read", lambda: all(b.metrics()["penstock_kafka_partitions"] == 3 for b in brokers))
        took = time.monotonic() - begun
        load.await_more()
        figure(f"both brokers read again {took:.1f} s after it names itself; {load.finish()}")
    assert load.twice <= 2 * len(brokers) * 2 * HELD_MAX


@pytest.mark.timeout(400)
def test_a_producer_finds_a_kafka_again_that_left(
    own_kafka: JavaKafka,
    kafka_pool: Pool,
    figure: Figure,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its last answer can make librdkafka forget where it is. What a client sends meanwhile arrives."""
    kafka_pool.create_topic(2)
    # Asked more often, it happens sooner.
    monkeypatch.setattr(
        "penstock_client.transports.kafka.Producer",
        lambda config: Producer(config | {"topic.metadata.refresh.interval.ms": 300}),
    )
    with closing(FencedKafka(own_kafka.behind_port, own_kafka.before_port)) as to_kafka:
        address = f"127.0.0.1:{own_kafka.before_port}"
        broker = kafka_pool.broker("broker", KAFKA_CLUSTER=address)
        app = App(
            "e2e", kafka=address, topic=kafka_pool.topic, strict_kwargs="off", delivery_timeout_seconds=120
        )
        task = app.namespace("n").task(name="t", retry=None)(_nothing)
        expired = task.options(expires=1)
        refs = [expired.delay()]

        def all_left() -> bool:
            letters = broker.metrics().get("penstock_dead_letters_total{reason=expired}", 0)
            return letters == len(refs) and not broker.held()

        eventually("a dead letter has left", all_left, seconds=30)
        to_kafka.leaves = True
        times = 0
        while caplog.text.count("the Kafka producer cannot go on") < 2:
            to_kafka.fenced = True
            to_kafka.reset()
            refs += [expired.delay() for _ in range(10)]
            time.sleep(2.5)  # it is gone
            to_kafka.fenced = False
            times += 1
            time.sleep(8.0)  # it is back
        begun = time.monotonic()
        for ref in refs:
            ref.wait(60)
        took = time.monotonic() - begun
        eventually("all dead letters have left", all_left, seconds=60)
        app.close()
        figure(f"gone {times} times: {len(refs)} sends acknowledged {took:.1f} s later, and dead letters")


def _nothing() -> None: ...
