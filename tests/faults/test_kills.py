"""Processes are killed or stand still, at any instant, under load."""

from __future__ import annotations

import random
import time

import pytest

from tests.e2e.harness import Broker, Pool
from tests.faults.conftest import Figure
from tests.faults.load import HELD_MAX, Load


@pytest.mark.timeout(600)
def test_sigkill_of_brokers_and_workers_at_random_instants(
    kafka_pool: Pool, seconds: float, dice: random.Random, figure: Figure
) -> None:
    kafka_pool.create_topic(6)
    brokers = [kafka_pool.broker(f"broker-{n}", LEASE_SECONDS="3") for n in range(2)]
    load = Load(kafka_pool, brokers)
    kills = {"broker": 0, "worker": 0}
    again: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(dice.uniform(0.1, 2.5))  # the instant, chosen by the dice
        victim = dice.choice(load.processes())
        victim.kill()
        started = time.monotonic()
        victim.start()
        if isinstance(victim, Broker):
            kills["broker"] += 1
            again.append(time.monotonic() - started)
        else:
            kills["worker"] += 1
    figure(f"killed {kills}; a broker serves again after {max(again, default=0):.1f} s at most")
    figure(load.finish())
    assert load.twice <= sum(kills.values()) * 4 * HELD_MAX
