"""What Kafka says of the topic and of the group that reads it: asked now and then, never waited for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException, TopicCollection, Uuid
from confluent_kafka.admin import AdminClient, ConsumerGroupDescription, TopicDescription

from penstock_broker.config import Settings
from penstock_broker.ingest.kafka import admin_config

ASK_SECONDS_MAX = 5.0
# Of a Kafka whose topics have no ids.
NO_ID = str(Uuid(0, 0))

T = TypeVar("T")


class Cluster:
    """For one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AdminClient | None = None
        self._topic: Future[TopicDescription] | None = None
        self._group: Future[ConsumerGroupDescription] | None = None
        # Of the topic; 0: not known yet.
        self._partitions = 0
        # In so many answers in a row some were unread.
        self._unread = 0

    def topic_id(self, seconds: float = 0) -> str | None:
        """Which topic of its name Kafka has, as far as it has told since it was last asked; waits up to
        ``seconds``."""
        if self._topic is None:
            name = self._settings.kafka_topic
            asked = self._admin().describe_topics(TopicCollection([name]), request_timeout=ASK_SECONDS_MAX)
            self._topic = asked[name]
        try:
            topic = self._answer(self._topic, seconds)
        except TimeoutError:
            return None
        self._topic = None
        self._partitions = len(topic.partitions) if topic is not None else 0
        if topic is None:
            return None
        id = str(topic.topic_id)
        return None if id == NO_ID else id

    def unread(self) -> list[int] | None:
        """The partitions that no member of the group has been given to read, if this broker is the one to
        do something about it; None: Kafka has not answered yet since it was last asked.

        One that gave partitions up for others, was killed before it had said so, and is back within its
        session is given what it kept without a rebalance (static membership), and nobody what it gave up.
        """
        topic, name = self._settings.kafka_topic, self._settings.kafka_consumer_group
        if self._group is None:
            asked = self._admin().describe_consumer_groups([name], request_timeout=ASK_SECONDS_MAX)
            self._group = asked[name]
        try:
            group = self._answer(self._group)
        except TimeoutError:
            return None
        self._group = None
        if group is None or group.state != ConsumerGroupState.STABLE:
            self._unread = 0
            return []
        read = [
            (member.group_instance_id, [p for p in member.assignment.topic_partitions if p.topic == topic])
            for member in group.members
        ]
        unread = set(range(self._partitions)) - {p.partition for _, partitions in read for p in partitions}
        self._unread = self._unread + 1 if unread else 0
        # Whoever reads least is the first to do something; if it does not help, the next one at its next
        # look. At the first look the group may be between two rounds of a rebalance.
        order = [id for _, id in sorted((len(partitions), id or "") for id, partitions in read)]
        id = self._settings.broker_id
        if id not in order or self._unread <= 1 + order.index(id):
            return []
        self._unread = 0
        return sorted(unread)

    def _admin(self) -> AdminClient:
        if self._client is None:
            self._client = AdminClient(admin_config(self._settings))
        return self._client

    def _answer(self, asked: Future[T], seconds: float = 0) -> T | None:
        """None: Kafka is away, or does not have it, or does not say. Raises TimeoutError when it has not
        answered yet."""
        try:
            return asked.result(seconds)
        except KafkaException as error:
            if error.args[0].code() == KafkaError._TIMED_OUT:
                # This client may have lost it for good; whatever else it was asked it will not answer.
                self._client = self._topic = self._group = None
            return None
