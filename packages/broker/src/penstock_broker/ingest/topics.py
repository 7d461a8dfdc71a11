"""The topics a broker needs: looked up once at the start, created when the settings allow it."""

from __future__ import annotations

import structlog
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.ingest.kafka import admin_config

log = structlog.get_logger("ingest")

CREATE_SECONDS_MAX = 10.0
# What only a person can mend. Anything else may pass, as too few nodes for the replicas do.
_LASTING = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.POLICY_VIOLATION,
    KafkaError.INVALID_CONFIG,
    KafkaError.INVALID_PARTITIONS,
    KafkaError.INVALID_REQUEST,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.UNSUPPORTED_VERSION,
    KafkaError._INVALID_ARG,
    KafkaError._UNSUPPORTED_FEATURE,
)
# Small segments, rolled often: what is not compacted yet is read at every start of a broker.
_COMPACTED = {
    "cleanup.policy": "compact",
    "segment.bytes": str(16 * 1024 * 1024),
    "segment.ms": "3600000",
    "min.cleanable.dirty.ratio": "0.1",
}


class NoTopic(FatalError):
    """There is no topic to consume, and none may be created."""


def topic_exists(settings: Settings, seconds: float) -> bool:
    """Whether there is a topic to consume. Raises KafkaException when Kafka cannot be reached."""
    admin = AdminClient(admin_config(settings))
    return settings.kafka_topic in admin.list_topics(timeout=seconds).topics


def ensure_topics(settings: Settings, seconds: float) -> bool:
    """See that the consumed topic and those that are produced to exist; blocks for up to ``seconds``.

    Raises KafkaException when Kafka cannot be reached, or does not create a topic now; NoTopic when the
    consumed topic does not exist and may not be created; FatalError when Kafka refuses to create one.
    Others that are missing are only warned of: what is for them waits; of a missing ledger topic the ledger
    warns.
    True: there is a topic to consume.
    """
    admin = AdminClient(admin_config(settings))
    present = admin.list_topics(timeout=seconds).topics
    waiting = {
        settings.kafka_deadletter_topic: "dead letters",
        settings.kafka_overflow_topic: "what is more than a namespace's share of the store",
        settings.kafka_retry_topic: "retries",
    }
    wanted = (settings.kafka_topic, *waiting, settings.kafka_ledger_topic)
    missing = [topic for topic in wanted if topic is not None and topic not in present]
    if not missing:
        return True
    if settings.create_missing_topics:
        _create(admin, missing, settings)
    elif settings.kafka_topic in missing:
        raise NoTopic(
            f"the topic {settings.kafka_topic!r} does not exist on the Kafka cluster"
            f" {settings.kafka_cluster}",
            "create it, or let the broker do so with create_missing_topics"
            " (TASKBROKER_CREATE_MISSING_TOPICS=1), or name another one with kafka_topic"
            " (TASKBROKER_KAFKA_TOPIC)",
        )
    else:
        for topic in waiting.keys() & set(missing):
            log.warning(
                f"a topic does not exist: {waiting[topic]} will wait in the store until it does"
                " (create it, or set create_missing_topics)",
                topic=topic,
                cluster=settings.kafka_cluster,
            )
    return True


def _create(admin: AdminClient, topics: list[str], settings: Settings) -> None:
    partitions = settings.default_topic_partitions
    futures = admin.create_topics(
        [
            NewTopic(topic, num_partitions=1, config=_COMPACTED)
            if topic == settings.kafka_ledger_topic
            else NewTopic(topic, num_partitions=partitions)
            for topic in topics
        ],
        request_timeout=CREATE_SECONDS_MAX,
    )
    passing: KafkaError | None = None
    for topic, future in futures.items():
        try:
            future.result()
        except KafkaException as caught:
            error = caught.args[0]
            if error.code() in _LASTING:
                raise FatalError(
                    f"the topic {topic!r} cannot be created on the Kafka cluster {settings.kafka_cluster}:"
                    f" {error.str()}",
                    "create it by hand, and check default_topic_partitions"
                    " (TASKBROKER_DEFAULT_TOPIC_PARTITIONS)",
                ) from None
            # Else another broker of the pool was faster.
            if error.code() != KafkaError.TOPIC_ALREADY_EXISTS and passing is None:
                passing = KafkaError(error.code(), f"the topic {topic!r} is not created: {error.str()}")
        else:
            log.info("topic created", topic=topic, partitions=partitions)
    if passing is not None:
        raise KafkaException(passing)
