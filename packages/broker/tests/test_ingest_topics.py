"""Topics that are created at the start: what passes is tried again, what an operator has to mend is said."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata
from confluent_kafka.cimpl import NewTopic
from ingest_helpers import MockKafka, kafka_settings, running_store, until
from structlog.testing import capture_logs

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.ingest import consumer as consumer_module
from penstock_broker.ingest import topics
from penstock_broker.ingest.consumer import KafkaConsumer

CODES = KafkaError
PASSING = (
    CODES._TIMED_OUT,
    CODES._TRANSPORT,
    CODES.REQUEST_TIMED_OUT,
    CODES.NOT_CONTROLLER,
    CODES.INVALID_REPLICATION_FACTOR,
    CODES.THROTTLING_QUOTA_EXCEEDED,
)
LASTING = (
    CODES.TOPIC_AUTHORIZATION_FAILED,
    CODES.CLUSTER_AUTHORIZATION_FAILED,
    CODES.POLICY_VIOLATION,
    CODES.INVALID_CONFIG,
    CODES.INVALID_PARTITIONS,
    CODES.TOPIC_EXCEPTION,
)


class Creating:
    """Says what the mock of a cluster knows, and creates what the mock cannot be asked to."""

    def __init__(self, kafka: MockKafka, *refusals: dict[str, int]) -> None:
        self._kafka, self._refusals = kafka, list(refusals)
        # Of those that it was asked to create.
        self.configs: dict[str, dict[str, str]] = {}

    def __call__(self, config: dict[str, str | int | float | bool]) -> Creating:
        self.list_topics = AdminClient(config).list_topics
        return self

    def create_topics(self, new: Sequence[NewTopic], request_timeout: float) -> dict[str, Future[None]]:
        refused = self._refusals.pop(0) if self._refusals else {}
        futures: dict[str, Future[None]] = {}
        for topic in new:
            future: Future[None] = Future()
            futures[topic.topic] = future
            self.configs[topic.topic] = topic.config or {}
            if topic.topic in refused:
                future.set_exception(KafkaException(KafkaError(refused[topic.topic])))
            else:
                self._kafka.make_topic(topic.topic)
                future.set_result(None)
        return futures


@pytest.fixture
def creating(kafka: MockKafka, tmp_path: Path) -> Settings:
    path = tmp_path / "store.sqlite"
    return kafka_settings(
        kafka, path, kafka_topic="new", kafka_deadletter_topic="new-dlq", create_missing_topics=True
    )


def outcome(settings: Settings) -> Exception | None:
    try:
        topics.ensure_topics(settings, 5)
    except (FatalError, KafkaException) as error:
        return error
    return None


def test_what_passes_is_to_be_tried_again_and_what_lasts_is_said(
    kafka: MockKafka, creating: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in PASSING:
        monkeypatch.setattr(topics, "AdminClient", Creating(kafka, {"new": code, "new-dlq": code}))
        error = outcome(creating)
        assert isinstance(error, KafkaException), (code, error)
        text = error.args[0].str()
        assert "the topic 'new' is not created" in text
        assert KafkaError(code).str() in text
    for code in LASTING:
        refusals = {"new": CODES._TIMED_OUT, "new-dlq": code}
        monkeypatch.setattr(topics, "AdminClient", Creating(kafka, refusals))
        error = outcome(creating)
        assert isinstance(error, FatalError), (code, error)
        assert f"'new-dlq' cannot be created on the Kafka cluster {kafka.address}" in error.message
        assert KafkaError(code).str() in error.message
    monkeypatch.setattr(topics, "AdminClient", Creating(kafka, {"new": CODES.TOPIC_ALREADY_EXISTS}))
    assert outcome(creating) is None


def test_the_ledger_is_compacted_and_nothing_else_is(
    kafka: MockKafka, creating: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By age it would forget what a broker that is lost has held for long."""
    cluster = Creating(kafka)
    monkeypatch.setattr(topics, "AdminClient", cluster)
    assert outcome(creating) is None
    policies = {topic: config.get("cleanup.policy") for topic, config in cluster.configs.items()}
    assert policies.pop(creating.kafka_ledger_topic) == "compact"
    assert policies == {"new": None, "new-dlq": None, creating.kafka_overflow_topic: None}


@pytest.mark.parametrize(("again_seconds", "times"), [(60, 1), (0, 3)])
async def test_creating_is_tried_again_and_said_now_and_then(
    kafka: MockKafka,
    creating: Settings,
    monkeypatch: pytest.MonkeyPatch,
    again_seconds: float,
    times: int,
) -> None:
    refusals = [{"new": CODES.INVALID_REPLICATION_FACTOR}] * 3
    monkeypatch.setattr(topics, "AdminClient", Creating(kafka, *refusals))
    monkeypatch.setattr(consumer_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(consumer_module, "WARN_AGAIN_SECONDS", again_seconds)
    async with running_store(creating.db_path) as store:
        consumer = KafkaConsumer(store, creating)
        with capture_logs() as logs:
            await consumer.start()
            await until(lambda: bool(consumer.assignment))
        await consumer.stop()
    warnings = [entry["error"] for entry in logs if "trying again" in entry["event"]]
    assert warnings == ["the topic 'new' is not created: Broker: Invalid replication factor"] * times


class Forgetful:
    """A cluster whose first answers, as of a node that is coming up, do not name a topic that is there."""

    def __init__(self, topic: str, times: int) -> None:
        self._topic, self._times = topic, times

    def __call__(self, config: dict[str, str | int | float | bool]) -> Forgetful:
        self._admin = AdminClient(config)
        return self

    def list_topics(self, timeout: float) -> ClusterMetadata:
        metadata = self._admin.list_topics(timeout=timeout)
        if self._times:
            self._times -= 1
            del metadata.topics[self._topic]
        return metadata


async def ended(consumer: KafkaConsumer) -> str:
    """Why it cannot start."""
    try:
        await consumer.start()
    except FatalError as error:
        return error.message
    return ""


async def test_a_topic_that_was_read_before_is_asked_for_again_when_an_answer_lacks_it(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored is served meanwhile. A topic that nobody here has read is said to be missing."""
    monkeypatch.setattr(consumer_module, "RETRY_SECONDS", 0.01)
    async with running_store(settings.db_path) as store:
        monkeypatch.setattr(topics, "AdminClient", Forgetful("tasks", 1))
        assert "the topic 'tasks' does not exist" in await ended(KafkaConsumer(store, settings))
        store.source("tasks", 0)
        await store.committed()
        monkeypatch.setattr(topics, "AdminClient", Forgetful("tasks", 3))
        consumer = KafkaConsumer(store, settings)
        with capture_logs() as logs:
            assert not await ended(consumer)
            await until(lambda: bool(consumer.assignment))
        await consumer.stop()
    warnings = [entry["error"] for entry in logs if "trying again" in entry["event"]]
    assert warnings == [f"the topic 'tasks' does not exist on the Kafka cluster {kafka.address}"]
