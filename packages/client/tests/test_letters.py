"""Dead letters on a mock cluster: each replay is sent as what it is, and written down when it is safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from penstock_client.cli.dlq import _do
from penstock_client.cli.letters import TopicLetters, Wanted
from penstock_protocol.v1.activation_pb2 import RetryState, TaskActivation

ALL = Wanted(handled=True)


class Kafka:
    def __init__(self) -> None:
        self._cluster = Producer({"bootstrap.servers": "unused", "test.mock.num.brokers": 1})
        broker = next(iter(self._cluster.list_topics(timeout=10).brokers.values()))
        self.address = f"{broker.host}:{broker.port}"
        for topic in ("tasks", "orders", "tasks-dlq", "tasks-dlq-handled"):
            self._cluster.list_topics(topic, timeout=10)

    def die(
        self,
        id: str,
        *,
        origin: str | None = None,
        at: str = "2026-01-31T08:00:00.000Z",
        parameters: bytes = b"",
    ) -> None:
        """A broker forwards a dead letter, each time in the same way."""
        state = RetryState(attempts=3, max_attempts=3)
        task = TaskActivation(id=id, taskname="t", retry_state=state, parameters_bytes=parameters)
        value = task.SerializeToString()
        headers = {"penstock-forward-id": f"of {id}", "penstock-reason": "failed"}
        headers["penstock-dead-at"] = at
        if origin is not None:
            headers["penstock-origin-topic"] = origin
        producer = Producer({"bootstrap.servers": self.address, "log_level": 2})
        producer.produce("tasks-dlq", value, id, partition=0, headers=list(headers.items()))
        assert producer.flush(10) == 0

    def letters(self) -> TopicLetters:
        """As a command that begins sees them."""
        return TopicLetters(self.address, "tasks-dlq", "tasks", must=True)

    def replay(self, wanted: Wanted) -> dict[str, str]:
        """The id of each dead letter, and of what was sent."""
        return _do([self.letters()], wanted, "replay", 100, None).ids

    def sent(self, topic: str, count: int) -> list[Message]:
        consumer = Consumer({"bootstrap.servers": self.address, "group.id": "reader", "log_level": 2})
        try:
            consumer.assign([TopicPartition(topic, partition, 0) for partition in range(4)])
            messages = [consumer.poll(10) for _ in range(count)]
            assert consumer.poll(0.2) is None
            return [message for message in messages if message is not None]
        finally:
            consumer.close()


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


def test_a_dead_letter_is_replayed_to_where_it_came_from(kafka: Kafka) -> None:
    kafka.die("a")
    kafka.die("b", origin="orders")
    sent = kafka.replay(Wanted())
    assert sent.keys() == {"a", "b"}
    for topic, id in (("tasks", "a"), ("orders", "b")):
        (message,) = kafka.sent(topic, 1)
        activation = TaskActivation.FromString(message.value() or b"")
        assert (activation.id, activation.retry_state.attempts) == (sent[id], 0)
        # Sent twice, the copies meet in one partition.
        assert message.key() == sent[id].encode()


def test_each_time_it_is_replayed_it_has_another_id(kafka: Kafka) -> None:
    kafka.die("a")
    ids = [kafka.replay(Wanted())["a"]]
    assert kafka.replay(Wanted()) == {}
    ids.append(kafka.replay(ALL)["a"])
    assert _do([kafka.letters()], ALL, "discard", 100, None).done == 1
    ids.append(kafka.replay(ALL)["a"])
    assert len(set(ids)) == 3


def test_what_dies_again_in_the_same_way_is_another_dead_letter(kafka: Kafka) -> None:
    """As one whose id is sent each month; a copy of a dead letter is none."""
    kafka.die("monthly")
    ids = {kafka.replay(Wanted())["monthly"]}
    kafka.die("monthly")
    assert kafka.replay(Wanted()) == {}
    kafka.die("monthly", at="2026-02-28T08:00:00.000Z")
    assert [letter.where for letter in kafka.letters().read(Wanted())] == ["tasks-dlq/0/2"]
    ids.add(kafka.replay(Wanted())["monthly"])
    assert len(ids) == 2
    assert kafka.replay(Wanted()) == {}


class Refusing:
    """A producer to which Kafka acknowledges no task."""

    def __init__(self) -> None:
        self.topics: list[str] = []

    def produce(
        self, topic: str, value: bytes, key: str, on_delivery: Callable[[object, object], None]
    ) -> None:
        self.topics.append(topic)
        on_delivery(KafkaError(KafkaError._MSG_TIMED_OUT) if topic == "tasks" else None, None)

    def poll(self, seconds: float) -> None: ...


def test_what_was_not_acknowledged_is_not_written_down_as_replayed(kafka: Kafka) -> None:
    kafka.die("a")
    letters, producer = kafka.letters(), Refusing()
    letters._producer = producer  # type: ignore[assignment]
    done = _do([letters], Wanted(), "replay", 100, None)
    assert (done.done, done.failed, done.ids) == (0, 1, {})
    assert producer.topics == ["tasks"]


class Counting:
    """A producer that keeps what it is given until it is asked for what became of it."""

    def __init__(self) -> None:
        self.told: list[Callable[[], None]] = []
        self.bytes = self.bytes_max = 0

    def produce(
        self, topic: str, value: bytes, key: str, on_delivery: Callable[[object, object], None]
    ) -> None:
        def tell() -> None:
            self.bytes -= len(value)
            on_delivery(None, None)

        self.told.append(tell)
        self.bytes += len(value)
        self.bytes_max = max(self.bytes_max, self.bytes)

    def poll(self, seconds: float) -> None:
        if seconds and self.told:
            self.told.pop(0)()


def test_a_replay_of_large_letters_waits_before_a_producer_is_full(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_client.cli.letters.UNACKNOWLEDGED_BYTES_MAX", 1_000_000)
    for n in range(30):
        kafka.die(f"large-{n}", parameters=b"x" * 100_000)
    letters, producer = kafka.letters(), Counting()
    letters._producer = producer  # type: ignore[assignment]
    assert _do([letters], Wanted(), "replay", 100, None).done == 30
    assert 1_000_000 <= producer.bytes_max < 1_200_000


def test_no_more_are_handled_than_were_asked_for(kafka: Kafka) -> None:
    for id in "abcde":
        kafka.die(id)
    first, second = kafka.letters(), kafka.letters()
    assert _do([first, second], ALL, "discard", 7, None).done == 7
