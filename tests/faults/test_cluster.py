"""A Kafka of three nodes, as one runs it in earnest, of which one is away."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from tests.e2e.harness import Pool, eventually, pool
from tests.faults.conftest import Figure
from tests.faults.load import HELD_MAX, Load
from tests.kafka_server import JavaKafka, kafka_cluster

NODES = 3


@pytest.fixture
def nodes() -> Iterator[list[JavaKafka]]:
    with kafka_cluster(NODES) as running:
        yield running


@pytest.fixture
def cluster_pool(nodes: list[JavaKafka], tmp_path: Path) -> Iterator[Pool]:
    with pool(tmp_path, ",".join(node.address for node in nodes)) as made:
        yield made


@pytest.mark.timeout(900)
def test_nodes_of_kafka_leave_one_after_the_other(
    nodes: list[JavaKafka], cluster_pool: Pool, seconds: float, dice: random.Random, figure: Figure
) -> None:
    cluster_pool.create_topic(6)
    brokers = [cluster_pool.broker(f"broker-{n}", LEASE_SECONDS="5") for n in range(2)]
    load = Load(cluster_pool, brokers)
    load.await_more()
    admin = AdminClient({"bootstrap.servers": cluster_pool.kafka or "", "log_level": 0})
    ways = {"stopped": 0, "killed": 0}
    longest = 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end or sum(ways.values()) < NODES:
        node = nodes[sum(ways.values()) % NODES]
        way = dice.choice(list(ways))
        (node.stop if way == "stopped" else node.kill)()
        ways[way] += 1
        left = time.monotonic()
        load.await_more()
        longest = max(longest, time.monotonic() - left)
        # Longer than Kafka takes to notice that a node is gone, and the brokers to look who reads what.
        time.sleep(dice.uniform(0, 20))
        load.await_more()
        node.start()
        eventually("each node has everything again", lambda: _replicas_behind(admin, cluster_pool) == 0)
    figure(f"nodes {ways}; 200 tasks run within {longest:.1f} s after one has left; {load.finish()}")
    assert load.twice <= sum(ways.values()) * len(brokers) * 2 * HELD_MAX


def _replicas_behind(admin: AdminClient, pool: Pool) -> int:
    topics = [topic for name, topic in admin.list_topics(timeout=10).topics.items() if pool.topic in name]
    assert topics
    return sum(NODES - len(p.isrs) for topic in topics for p in topic.partitions.values())
