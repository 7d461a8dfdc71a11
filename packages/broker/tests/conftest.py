from __future__ import annotations

from pathlib import Path

import pytest
from ingest_helpers import MockKafka, kafka_settings

from penstock_broker.config import Settings


@pytest.fixture
def kafka() -> MockKafka:
    kafka = MockKafka()
    kafka.make_topic("tasks", "tasks-dlq")
    return kafka


@pytest.fixture
def settings(kafka: MockKafka, tmp_path: Path) -> Settings:
    return kafka_settings(kafka, tmp_path / "store.sqlite")
