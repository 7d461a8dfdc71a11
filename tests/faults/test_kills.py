"""Processes are killed or stand still, at any instant, under load."""

from __future__ import annotations

import random
import signal
import time

import psutil
import pytest

from tests.e2e.harness import Broker, Pool, eventually
from tests.faults.conftest import Figure
from tests.faults.load import HELD_MAX, Load, fill


@pytest.mark.timeout(600)
def test_sigkill_of_brokers_and_workers_at_random_instants(
    kafka_pool: Pool, seconds: float, dice: random.Random, figure: Figure
) -> None:
    kafka_pool.create_topic(6)
    brokers = [kafka_pool.broker(f"broker-{n}", LEASE_SECONDS="3") for n in range(2)]
    load = Load(kafka_pool, brokers)
    kills = {"broker": 0, "worker": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end or not all(kills.values()):
        time.sleep(dice.uniform(0.1, 2.5))  # the instant
        victim = dice.choice(load.processes())
        victim.kill()
        victim.start()
        kills["broker" if isinstance(victim, Broker) else "worker"] += 1
    figure(f"killed {kills}; {load.finish()}")
    assert load.twice <= sum(kills.values()) * 2 * HELD_MAX


@pytest.mark.timeout(300)
def test_a_broker_with_100_000_rows_serves_again(
    direct_pool: Pool, request: pytest.FixtureRequest, figure: Figure
) -> None:
    rows = 10_000 if request.config.getoption("--short") else 100_000
    broker = direct_pool.broker()
    fill(broker.address, rows)
    broker.kill()
    begun = time.monotonic()
    broker.start()
    again = time.monotonic() - begun
    assert broker.process is not None
    busy = sum(psutil.Process(broker.process.pid).cpu_times()[:2])
    assert broker.held() == rows
    broker.check_books()
    figure(
        f"{rows} rows: serving again {again:.1f} s after the start of its process, of which {busy:.1f} s busy"
    )


@pytest.mark.timeout(600)
def test_sigstop_of_brokers_and_workers(
    kafka_pool: Pool, seconds: float, dice: random.Random, figure: Figure
) -> None:
    """Shorter and longer than the lease, and than Kafka's session timeout."""
    kafka_pool.create_topic(6)
    brokers = [kafka_pool.broker(f"broker-{n}", LEASE_SECONDS="4") for n in range(2)]
    load = Load(kafka_pool, brokers)
    stops = {"broker": 0, "worker": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end or not all(stops.values()):
        victim = dice.choice(load.processes())
        assert victim.process is not None
        victim.process.send_signal(signal.SIGSTOP)
        time.sleep(dice.uniform(0.5, 9.0))  # the stand-still: shorter or longer than lease and session
        victim.process.send_signal(signal.SIGCONT)
        stops["broker" if isinstance(victim, Broker) else "worker"] += 1
        load.await_more()
    lost = sum(broker.metrics()["penstock_deliveries_lost_total"] for broker in brokers)
    figure(f"stood still {stops}; {lost:.0f} deliveries lost; {load.finish()}")
    # A worker's claims lapse; what a broker has not covered another may read.
    assert load.twice <= sum(stops.values()) * len(brokers) * HELD_MAX


@pytest.mark.timeout(120)
def test_after_a_stand_still_of_the_broker_no_lease_is_judged(direct_pool: Pool, figure: Figure) -> None:
    broker = direct_pool.broker(LEASE_SECONDS="3")
    direct_pool.worker([broker], slots=8)
    gate = direct_pool.folder / "gate"
    app = direct_pool.app(broker=broker.address)
    ids = [app.tasks["wait_for"].delay(str(gate)).wait(10).id for _ in range(8)]
    eventually("all run", lambda: direct_pool.started().keys() == set(ids))
    assert broker.process is not None
    for _ in range(3):
        broker.process.send_signal(signal.SIGSTOP)
        time.sleep(4)  # the stand-still, longer than the lease
        broker.process.send_signal(signal.SIGCONT)
        eventually("it answers again", broker.is_serving)
    assert "the broker stood still; leases are moved by that time" in broker.text()
    gate.touch()
    assert set(direct_pool.await_all(ids).values()) == {1}
    direct_pool.await_empty(broker)
    lost = broker.metrics()["penstock_deliveries_lost_total"]
    figure(f"3 stand-stills of 4 s at a lease of 3 s: {lost:.0f} deliveries lost")
    assert lost == 0
