"""What Kafka says of the topic and of the group that reads it."""

from __future__ import annotations

import struct
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection, Uuid
from confluent_kafka.admin import AdminClient, TopicDescription

from penstock_broker.config import Settings
from penstock_broker.ingest.kafka import admin_config

ASK_SECONDS_MAX = 5.0
# Of a Kafka whose topics have no ids.
NO_ID = str(Uuid(0, 0))


class Cluster:
    """For one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AdminClient | None = None
        self._topic: Future[TopicDescription] | None = None
        # Of the topic; 0: not known yet.
        self._partitions = 0
        # In so many answers in a row some were unread.
        self._unread = 0

    def topic_id(self, seconds: float = 0) -> str | None:
        """Which topic of its name Kafka has, as far as it has told since it was last asked; waits up to
        ``seconds``."""
        if self._topic is None:
            self._topic = describe_topic(self._admin(), self._settings.kafka_topic, ASK_SECONDS_MAX)
        topic = None
        try:
            topic = self._topic.result(seconds)
        except TimeoutError:
            return None
        except KafkaException as error:
            # It is away, or has no such topic.
            if error.args[0].code() == KafkaError._TIMED_OUT:
                # This client may have lost it for good.
                self._drop()
        self._topic = None
        self._partitions = len(topic.partitions) if topic is not None else 0
        if topic is None:
            return None
        return id_of(topic) or None

    def unread(self, seconds: float) -> list[int]:
        """The partitions that no member of the group has been given to read, if this broker is the one to
        do something about it. Waits up to ``seconds``. Raises KafkaException.

        One that gave partitions up for others, was killed before it had said so, and is back within its
        session is given what it kept without a rebalance (static membership), and nobody what it gave up.
        """
        name = self._settings.kafka_consumer_group
        try:
            group = describe_group(self._admin(), name, seconds)
        except KafkaException:
            # This client waits for each server that it has ever known, also for one that has left.
            self._drop()
            raise
        if group is None or group.state != "Stable":
            self._unread = 0
            return []
        topic = self._settings.kafka_topic
        read = [(member.client_id, _assigned(member.assignment, topic)) for member in group.members]
        unread = set(range(self._partitions)) - {p for _, partitions in read for p in partitions}
        self._unread = self._unread + 1 if unread else 0
        # Whoever reads least is the first to do something; if it does not help, the next one at its next
        # look. At the first look the group may be between two rounds of a rebalance.
        order = [id for _, id in sorted((len(partitions), id) for id, partitions in read)]
        id = self._settings.broker_id
        if id not in order or self._unread <= 1 + order.index(id):
            return []
        self._unread = 0
        return sorted(unread)

    def _drop(self) -> None:
        """The next question is asked by another client."""
        self._client = self._topic = None

    def _admin(self) -> AdminClient:
        if self._client is None:
            self._client = AdminClient(admin_config(self._settings))
        return self._client


def describe_topic(admin: AdminClient, name: str, seconds: float) -> Future[TopicDescription]:
    return admin.describe_topics(TopicCollection([name]), request_timeout=seconds)[name]


def id_of(topic: TopicDescription) -> str:
    """Which topic of its name it is; "" when Kafka's topics have no ids."""
    id = str(topic.topic_id)
    return "" if id == NO_ID else id


def describe_group(admin: AdminClient, name: str, seconds: float) -> Any:
    """The consumer group of that name as a GroupMetadata (whose types are wrong), or None. Waits up to
    ``seconds``. Raises KafkaException."""
    # describe_consumer_groups can abort the process when a connection ends (librdkafka, its issue 4605).
    groups: list[Any] = admin.list_groups(name, timeout=seconds)
    group = next((group for group in groups if group.id == name), None)
    if group is not None and group.error is not None:
        raise KafkaException(group.error)
    return group


def _assigned(data: bytes, topic: str) -> list[int]:
    """The partitions of ``topic`` in an assignment, as Kafka's consumers encode it: a version, and of each
    topic the name and the partitions."""
    if not data:
        return []
    (topics,), at = struct.unpack_from(">i", data, 2), 6
    for _ in range(topics):
        (size,) = struct.unpack_from(">h", data, at)
        name, at = data[at + 2 : at + 2 + size].decode(), at + 2 + size
        (count,) = struct.unpack_from(">i", data, at)
        partitions, at = struct.unpack_from(f">{count}i", data, at + 4), at + 4 + 4 * count
        if name == topic:
            return list(partitions)
    return []
