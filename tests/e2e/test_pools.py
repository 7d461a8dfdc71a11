"""Many tasks, several brokers, many workers; routes; no Kafka at all."""

from __future__ import annotations

import pytest

from tests.e2e.harness import Pool, eventually


@pytest.mark.timeout(180)
def test_three_brokers_twelve_workers_twenty_thousand_tasks(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(12)
    brokers = [kafka_pool.broker(f"broker-{n}") for n in range(3)]
    for n in range(12):
        kafka_pool.worker(brokers, name=f"worker-{n}", slots=2)
    app = kafka_pool.app()
    refs = [app.tasks["noop"].delay(n) for n in range(20_000)]
    assert app.flush() == 0
    ended = kafka_pool.await_all([ref.id for ref in refs], 150)
    kafka_pool.await_empty(*brokers)
    # Nothing failed here, so nothing ran twice; and every broker had its share.
    assert set(ended.values()) == {1}
    for broker in brokers:
        assert broker.metrics()["penstock_claimed_tasks_total"] > 1_000


@pytest.mark.timeout(60)
def test_no_kafka_at_all(direct_pool: Pool) -> None:
    broker = direct_pool.broker()
    direct_pool.worker([broker], slots=2)
    app = direct_pool.app(broker=broker.address)
    refs = [app.tasks["noop"].delay(n) for n in range(2_000)]
    failed = app.tasks["hopeless"].delay()
    for ref in (refs[-1], failed):
        ref.wait(10)
    assert set(direct_pool.await_all([ref.id for ref in refs]).values()) == {1}
    direct_pool.await_empty(broker)
    assert broker.metrics()["penstock_resting_dead_letters"] == 1
    assert direct_pool.started()[failed.id] == 3


@pytest.mark.timeout(120)
def test_pools_that_differ_in_their_topic_do_not_disturb_each_other(kafka_pool: Pool) -> None:
    """One is flooded and its broker restarted; the other's tasks do not wait for that."""
    flooded, quiet = kafka_pool.topic, f"{kafka_pool.topic}-quiet"
    kafka_pool.create_topic(2, flooded)
    kafka_pool.create_topic(2, quiet)
    first = kafka_pool.broker("broker-flood", KAFKA_TOPIC=flooded)
    second = kafka_pool.broker("broker-quiet", KAFKA_TOPIC=quiet)
    kafka_pool.worker([first], name="worker-flood", namespaces=("flood",))
    kafka_pool.worker([second], name="worker-quiet", namespaces=("quiet",))
    app = kafka_pool.app(route_overrides={"quiet": quiet})
    flood = [app.tasks["flood.sleep"].delay(0.02) for _ in range(1_500)]
    lone = app.tasks["quiet.noop"].delay()
    kafka_ids = {ref.id for ref in flood}
    eventually("the quiet pool has run its task", lambda: kafka_pool.ended()[lone.id] == 1, 30)
    first.kill()
    second_lone = app.tasks["quiet.noop"].delay()
    eventually(
        "and another while the other broker is gone", lambda: kafka_pool.ended()[second_lone.id] == 1, 30
    )
    first.start()
    # The flood was still under way: the quiet pool did not wait for it.
    assert len(kafka_ids - kafka_pool.ended().keys()) > 100
    kafka_pool.await_all([*kafka_ids, lone.id, second_lone.id], 90)
    kafka_pool.await_empty(first, second)
    assert second.done("quiet") == 2


@pytest.mark.timeout(90)
def test_a_new_route_under_load_loses_nothing(kafka_pool: Pool) -> None:
    old, new = kafka_pool.topic, f"{kafka_pool.topic}-new"
    kafka_pool.create_topic(2, old)
    kafka_pool.create_topic(2, new)
    brokers = [kafka_pool.broker("broker-old"), kafka_pool.broker("broker-new", KAFKA_TOPIC=new)]
    for n, broker in enumerate(brokers):
        kafka_pool.worker([broker], name=f"worker-{n}", namespaces=("other",))
    before, after = kafka_pool.app(), kafka_pool.app(route_overrides={"other": new})
    refs = []
    for n in range(2_000):
        app = before if n < 1_000 else after
        refs.append(app.tasks["other.noop"].delay(n))
    assert set(kafka_pool.await_all([ref.id for ref in refs]).values()) == {1}
    kafka_pool.await_empty(*brokers)
    assert [b.done("other") for b in brokers] == [1_000, 1_000]
