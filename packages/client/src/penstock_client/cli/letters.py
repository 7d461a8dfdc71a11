"""Dead letters where they rest: in the topic on Kafka, and in the stores of brokers."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from google.protobuf.message import DecodeError

from penstock_client.cli.brokers import Broker, Brokers, me
from penstock_client.cli.failures import UNREACHABLE, WRONG, Failure
from penstock_protocol import replay
from penstock_protocol.v1 import admin_pb2 as pb
from penstock_protocol.v1.activation_pb2 import TaskActivation

KAFKA_SECONDS = 10.0
DELIVERY_SECONDS = 30.0
CHUNK = 50
# Produced and not acknowledged. What is produced beyond these fits into a producer's buffer (1 GiB).
UNACKNOWLEDGED_MAX = 1_000
UNACKNOWLEDGED_BYTES_MAX = 256 * 1024 * 1024
HANDLED = "-handled"


@dataclass(slots=True)
class Letter:
    """A dead letter. ``where``: its place, for people; ``handled``: what was done with it, if anything."""

    where: str
    id: str
    application: str
    namespace: str
    taskname: str
    reason: str
    dead_at: int
    size: int
    story: dict[str, Any] = field(default_factory=dict)
    # What it is known by; empty when it rests in a store.
    name: str = ""
    handled: dict[str, Any] | None = None
    # Its bytes; empty when they rest in a store and were not asked for.
    value: bytes = b""
    seq: int = 0

    def as_json(self) -> dict[str, Any]:
        names = ("id", "application", "namespace", "taskname", "reason", "dead_at", "size")
        values = {name: getattr(self, name) for name in names}
        return {"where": self.where, **values, "story": self.story, "handled": self.handled}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which dead letters; None and empty match all. ``handled``: those handled before, too."""

    application: str | None = None
    namespace: str | None = None
    taskname: str | None = None
    reason: str | None = None
    from_at: int | None = None
    until_at: int | None = None
    ids: Collection[str] = ()
    handled: bool = False

    def matches(self, letter: Letter) -> bool:
        pairs = (
            (self.application, letter.application),
            (self.namespace, letter.namespace),
            (self.taskname, letter.taskname),
            (self.reason, letter.reason),
        )
        return (
            all(wanted in (None, found) for wanted, found in pairs)
            and (self.from_at is None or letter.dead_at >= self.from_at)
            and (self.until_at is None or letter.dead_at < self.until_at)
            and (not self.ids or letter.id in self.ids)
            and (self.handled or letter.handled is None)
        )


@dataclass(slots=True)
class Done:
    """What became of dead letters that were handled."""

    done: int = 0
    # Not activations that could run, or gone meanwhile.
    left: int = 0
    failed: int = 0
    error: str = ""
    # Of what was sent, by the id of the dead letter.
    ids: dict[str, str] = field(default_factory=dict)

    def add(self, other: Done) -> None:
        self.done, self.left = self.done + other.done, self.left + other.left
        self.failed, self.error = self.failed + other.failed, self.error or other.error
        self.ids |= other.ids


# -- in a broker's store


class StoreLetters:
    """Those that rest with one broker: it does the work, in chunks."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        # How many are handled in a call.
        self.chunk = CHUNK
        self._replays: list[Letter] = []
        self._discards: list[Letter] = []
        self._done = Done()

    def read(self, wanted: Wanted) -> Iterator[Letter]:
        chosen = pb.DeadLetterFilter(
            application=wanted.application,
            namespace=wanted.namespace,
            taskname=wanted.taskname,
            reason=wanted.reason,
            from_at=wanted.from_at,
            until_at=wanted.until_at,
        )
        after = 0
        while True:
            request = pb.ListDeadLettersRequest(filter=chosen, after_seq=after)
            page = self._broker.call("ListDeadLetters", request, pb.ListDeadLettersResponse)
            found = (self._letter(letter) for letter in page.letters)
            yield from (letter for letter in found if wanted.matches(letter))
            if not page.HasField("next_after_seq"):
                return
            after = page.next_after_seq

    def _letter(self, letter: pb.DeadLetter) -> Letter:
        return Letter(
            where=self._broker.address,
            id=letter.id,
            application=letter.application,
            namespace=letter.namespace,
            taskname=letter.taskname,
            reason=letter.reason,
            dead_at=letter.dead_at,
            size=letter.bytes,
            story=json.loads(letter.story),
            seq=letter.seq,
        )

    def find(self, id: str) -> Letter | None:
        """The latest of a task, with its bytes."""
        request = pb.GetDeadLetterRequest(id=id)
        answer = self._broker.call("GetDeadLetter", request, pb.GetDeadLetterResponse)
        if not answer.HasField("letter"):
            return None
        letter = self._letter(answer.letter)
        letter.value = answer.activation
        return letter

    def replay(self, letter: Letter) -> None:
        self._replays.append(letter)
        if len(self._replays) >= self.chunk:
            self._replay()

    def _replay(self) -> None:
        letters, self._replays = self._replays, []
        request = pb.ReplayDeadLettersRequest(seqs=[letter.seq for letter in letters], by=me())
        answer = self._broker.call("ReplayDeadLetters", request, pb.ReplayDeadLettersResponse)
        for letter, replayed in zip(letters, answer.replayed, strict=True):
            if replayed.result == pb.REPLAY_RESULT_SENT:
                self._done.done += 1
                self._done.ids[letter.id] = replayed.id
            else:
                self._done.left += 1

    def discard(self, letter: Letter) -> None:
        self._discards.append(letter)
        if len(self._discards) >= self.chunk:
            self._discard()

    def _discard(self) -> None:
        letters, self._discards = self._discards, []
        request = pb.DiscardDeadLettersRequest(seqs=[letter.seq for letter in letters], by=me())
        answer = self._broker.call("DiscardDeadLetters", request, pb.DiscardDeadLettersResponse)
        self._done.done += answer.discarded
        self._done.left += len(letters) - answer.discarded

    def finish(self) -> Done:
        if self._replays:
            self._replay()
        if self._discards:
            self._discard()
        return self._done


# -- on Kafka


class TopicLetters:
    """Those in a dead-letter topic.

    A topic cannot lose single records, so what was done with each is a record of its own, keyed by the
    dead letter's name, in the compacted topic ``<topic>-handled``. It is written once what was
    sent is acknowledged: a replay that is interrupted goes on where it was, and what it had sent without
    a record of it has the same id again.
    """

    def __init__(self, kafka: str, topic: str, to: str, must: bool) -> None:
        """``to``: the topic of those that do not say where they came from. ``must``: there has to be such a
        topic; else there are no dead letters yet. Raises Failure."""
        self.topic = topic
        self._kafka = kafka
        self._to = to
        self._books = topic + HANDLED
        self._batch = uuid.uuid4().hex[:12]
        self._producer: Producer | None = None
        self._open = self._open_bytes = 0
        self._done = Done()
        partitions = self._metadata(topic)
        if partitions is None and must:
            raise Failure(
                f"Kafka at {kafka} has no topic {topic}",
                "it is created with the first dead letter; or name it with --topic",
                WRONG,
            )
        self._partitions = partitions or []
        self._handled: dict[str, dict[str, Any]] = {}
        for message in self._messages(self._books, self._metadata(self._books) or []):
            if message.value():
                self._handled[_text(message.key())] = json.loads(message.value() or b"{}")

    def _metadata(self, topic: str) -> list[int] | None:
        """The partitions of a topic; None: there is none."""
        try:
            found = AdminClient(self._config()).list_topics(timeout=KAFKA_SECONDS).topics.get(topic)
        except KafkaException as error:
            raise Failure(
                f"Kafka at {self._kafka} cannot be reached: {error.args[0].str()}",
                "is the address right from this machine? Say another with --kafka",
                UNREACHABLE,
            ) from None
        return None if found is None or found.error is not None else sorted(found.partitions)

    def _config(self) -> dict[str, Any]:
        return {"bootstrap.servers": self._kafka, "client.id": "penstock", "log_level": 2}

    def _messages(self, topic: str, partitions: list[int]) -> Iterator[Message]:
        """What a topic holds now, partition by partition."""
        if not partitions:
            return
        consumer = Consumer(
            self._config()
            | {
                "group.id": f"penstock-{uuid.uuid4().hex}",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
            }
        )
        try:
            for partition in partitions:
                low, high = consumer.get_watermark_offsets(
                    TopicPartition(topic, partition), timeout=KAFKA_SECONDS
                )
                if low < high:
                    yield from self._partition(consumer, TopicPartition(topic, partition, low), high)
        except KafkaException as error:
            raise Failure(f"reading {topic} failed: {error.args[0].str()}", code=UNREACHABLE) from None
        finally:
            consumer.close()

    def _partition(self, consumer: Consumer, start: TopicPartition, high: int) -> Iterator[Message]:
        consumer.assign([start])
        quiet = 0.0
        while True:
            message = consumer.poll(1.0)
            if message is None:
                quiet += 1.0
                if quiet >= DELIVERY_SECONDS:
                    raise Failure(f"Kafka sends nothing of {start.topic}/{start.partition}", code=UNREACHABLE)
                continue
            quiet = 0.0
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    return
                raise KafkaException(error)
            if (message.offset() or 0) >= high:
                return
            yield message
            if (message.offset() or 0) == high - 1:
                return

    def read(self, wanted: Wanted) -> Iterator[Letter]:
        for message in self._messages(self.topic, self._partitions):
            letter = self._letter(message)
            if wanted.matches(letter):
                yield letter

    def _letter(self, message: Message) -> Letter:
        headers = {name: _text(value) for name, value in _headers(message)}
        said = {k.removeprefix("penstock-"): v for k, v in headers.items() if k.startswith("penstock-")}
        value = message.value() or b""
        where = f"{self.topic}/{message.partition()}/{message.offset()}"
        dead_at = _epoch_ms(said.get("dead-at")) or message.timestamp()[1]
        name = replay.letter_name(said.get("forward-id") or where, dead_at)
        activation = _activation(value)
        return Letter(
            where=where,
            id=_text(message.key()) or activation.id,
            application=activation.application,
            namespace=activation.namespace,
            taskname=activation.taskname,
            reason=said.get("reason", ""),
            dead_at=dead_at,
            size=len(value),
            story=said,
            name=name,
            handled=self._handled.get(name),
            value=value,
        )

    def _serve(self) -> None:
        """Let what was sent be acknowledged, and wait if that is much. Not in a callback of the producer."""
        producer = self._open_books()
        producer.poll(0)
        while self._open >= UNACKNOWLEDGED_MAX or self._open_bytes >= UNACKNOWLEDGED_BYTES_MAX:
            producer.poll(0.1)

    def replay(self, letter: Letter) -> None:
        self._serve()
        number = 1 + (letter.handled or {}).get("number", 0)
        activation = replay.replayed(letter.value, letter.name, number, int(time.time() * 1000))
        if activation is None:
            self._done.left += 1
            return
        # Of a topic that was made anew since, a broker names the old one topic@id.
        topic = letter.story.get("origin-topic", "").partition("@")[0] or self._to

        def sent(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failed(error)
            else:
                self._done.ids[letter.id] = activation.id
                self._record(letter, "replayed", number=number, new_id=activation.id, topic=topic)

        # Its id is its key: copies meet in one partition.
        self._produce(topic, activation.SerializeToString(), activation.id, sent)

    def discard(self, letter: Letter) -> None:
        self._serve()
        self._record(letter, "discarded", number=(letter.handled or {}).get("number", 0))

    def _record(self, letter: Letter, action: str, **more: Any) -> None:
        record = {
            "action": action,
            "id": letter.id,
            "where": letter.where,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": me(),
            "batch": self._batch,
            **more,
        }

        def written(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failed(error)
            else:
                self._handled[letter.name] = record
                self._done.done += 1

        self._produce(self._books, json.dumps(record).encode(), letter.name, written)

    def _produce(self, topic: str, value: bytes, key: str, told: Any) -> None:
        producer = self._open_books()

        def count(messages: int) -> None:
            self._open += messages
            self._open_bytes += messages * len(value)

        def delivered(error: KafkaError | None, message: Message) -> None:
            count(-1)
            told(error, message)

        count(1)
        try:
            producer.produce(topic, value, key, on_delivery=delivered)
        except KafkaException as error:
            count(-1)
            self._failed(error.args[0])

    def _open_books(self) -> Producer:
        """The producer, once the topic of what was handled is there."""
        if self._producer is None:
            if self._metadata(self._books) is None:
                new = NewTopic(self._books, 1, config={"cleanup.policy": "compact"})
                admin = AdminClient(self._config())
                for future in admin.create_topics([new]).values():
                    try:
                        future.result(KAFKA_SECONDS)
                    except KafkaException as error:
                        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                            raise Failure(
                                f"the topic {self._books} cannot be created: {error.args[0].str()}",
                                "it records what was handled; create it, compacted",
                            ) from None
            self._producer = Producer(
                self._config()
                | {
                    "enable.idempotence": True,
                    "acks": "all",
                    "linger.ms": 5,
                    "delivery.timeout.ms": int(DELIVERY_SECONDS * 1000),
                    "message.max.bytes": 100_000_000,
                }
            )
        return self._producer

    def _failed(self, error: KafkaError) -> None:
        self._done.failed += 1
        self._done.error = error.str()

    def finish(self) -> Done:
        while self._producer is not None and self._open:
            self._producer.poll(0.5)
        return self._done


def sources(
    brokers: Brokers | None, kafka: str | None, topic: str | None
) -> list[StoreLetters | TopicLetters]:
    """Where dead letters rest: the stores of the brokers, and the topics they say they forward to.

    ``kafka`` and ``topic``, if given, are taken instead of what the brokers say; with both, none is asked.
    """
    found: list[StoreLetters | TopicLetters] = []
    if kafka and topic:
        return [TopicLetters(kafka, topic, topic.removesuffix("-dlq"), must=True)]
    assert brokers is not None
    topics: dict[tuple[str, str], str] = {}
    for broker, status in brokers.each("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse):
        found.append(StoreLetters(broker))
        if status.HasField("kafka"):
            there = (kafka or status.kafka.address, topic or status.kafka.deadletter_topic)
            topics[there] = status.kafka.topic
    must = topic is not None
    return found + [TopicLetters(address, name, to, must) for (address, name), to in topics.items()]


def replay_ids(brokers: Brokers, ids: Collection[str]) -> list[str]:
    """Replay the dead letters of these tasks; those that were found and sent."""
    sent: list[str] = []
    for source in sources(brokers, None, None):
        for letter in source.read(Wanted(ids=ids)):
            source.replay(letter)
        sent += source.finish().ids
    return sent


def _activation(value: bytes) -> TaskActivation:
    try:
        return TaskActivation.FromString(value)
    except DecodeError:
        return TaskActivation()


def _headers(message: Message) -> list[tuple[str, Any]]:
    headers: Any = message.headers() or ()
    return list(headers)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _epoch_ms(text: str | None) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000) if text else 0
    except ValueError:
        return 0
