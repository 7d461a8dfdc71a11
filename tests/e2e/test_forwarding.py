"""What leaves through Kafka to go on elsewhere: the overflow of a namespace, and retries with a topic."""

from __future__ import annotations

import itertools

import pytest

from tests.e2e.harness import Broker, Pool, eventually


def finished(broker: Broker, outcome: str) -> int:
    """Activations whose books ended in this term."""
    metrics = broker.metrics()
    return int(
        sum(
            n
            for name, n in metrics.items()
            if name.startswith("penstock_tasks_finished_total{") and f"outcome={outcome}" in name
        )
    )


@pytest.mark.timeout(180)
def test_a_flooded_namespace_is_in_nobodys_way(kafka_pool: Pool) -> None:
    """One partition, a small broker, and nobody who serves the flood: the others run at once."""
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker(MAX_PENDING_COUNT="400")
    app = kafka_pool.app()
    flood = [app.tasks["flood.noop"].delay().id for _ in range(3_000)]
    quiet = [app.tasks["quiet.noop"].delay().id for _ in range(300)]
    assert app.flush() == 0
    kafka_pool.worker([broker], name="quiet-worker", namespaces=("quiet",))
    kafka_pool.await_all(quiet, 60)
    assert broker.metrics()["penstock_tasks{state=pending}"] == 200
    eventually("the flood is in its topic", lambda: finished(broker, "overflow") >= 2_800)
    # It does not go round and round while it has no room.
    assert finished(broker, "overflow") < 3_500
    kafka_pool.worker([broker], name="flood-worker", namespaces=("flood",))
    ended = kafka_pool.await_all([*quiet, *flood], 120)
    assert set(ended.values()) == {1}
    kafka_pool.await_empty(broker)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("whose", ["its own", "another broker's"])
def test_retries_wait_in_their_topic(kafka_pool: Pool, whose: str) -> None:
    """The broker that sent it may be the one that consumes it: its id does not stand in its way."""
    kafka_pool.create_topic(2)
    brokers = [kafka_pool.broker(KAFKA_RETRY_TOPIC=kafka_pool.topic, start=False)]
    if whose == "another broker's":
        retries = kafka_pool.create_topic(2, f"{kafka_pool.topic}-retries")
        brokers = [
            kafka_pool.broker("first", KAFKA_RETRY_TOPIC=retries, start=False),
            kafka_pool.broker("retries", KAFKA_TOPIC=retries, KAFKA_RETRY_TOPIC=retries, start=False),
        ]
    for broker in brokers:
        broker.start()
        kafka_pool.worker([broker], name=f"worker of {broker.name}")
    app = kafka_pool.app()
    flaky = [app.tasks["flaky"].delay(2).id for _ in range(100)]
    hopeless = [app.tasks["hopeless"].delay().id for _ in range(20)]
    eventually("all flaky ones ended", lambda: set(flaky) <= kafka_pool.ended().keys())
    last = brokers[-1].environment["TASKBROKER_KAFKA_TOPIC"]
    letters = kafka_pool.dead_letters(20, last)
    kafka_pool.await_empty(*brokers)
    assert {letter.key for letter in letters} == set(hopeless)
    assert {letter.headers["penstock-attempts"] for letter in letters} == {"3"}
    starts = [e for e in kafka_pool.executions() if e.what == "start"]
    for id in flaky:
        mine = sorted((e.attempt, e.at) for e in starts if e.id == id)
        assert [attempt for attempt, _ in mine] == [1, 2, 3]
        assert all(later - earlier >= 0.3 for (_, earlier), (_, later) in itertools.pairwise(mine))
    assert [sum(e.id == id for e in starts) for id in hopeless] == [3] * 20
    assert sum(finished(broker, "retried") for broker in brokers) == 2 * 120
