"""Who writes the ledger of a broker: whoever fenced it last, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.ingest.ledger_log import Fenced, LedgerLog
from tests.e2e.harness import Pool
from tests.kafka_server import JavaKafka


@pytest.mark.timeout(120)
def test_nothing_is_written_after_the_fence(own_kafka: JavaKafka, kafka_pool: Pool, tmp_path: Path) -> None:
    kafka_pool.create_topic(1)
    settings = Settings(
        kafka_cluster=own_kafka.address,
        kafka_topic=kafka_pool.topic,
        kafka_ledger_topic=f"{kafka_pool.topic}-ledger",
        broker_id="broker-1",
        db_path=tmp_path / "store.sqlite",
    )
    first, other = (LedgerLog(settings, SystemClock(), broker_id) for broker_id in ("broker-1", "broker-2"))
    for log in (first, other):
        log.fence()
    first.write([(b"key", b"first")])
    adopter = LedgerLog(settings, SystemClock(), "broker-1")
    adopter.fence()
    with pytest.raises(Fenced):
        first.write([(b"key", b"after the fence")])
    adopter.write([(b"key", b"adopted")])
    # Another broker's id is its own.
    other.write([(b"other", b"untouched")])
