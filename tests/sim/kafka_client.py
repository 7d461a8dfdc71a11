"""The Kafka client as the broker uses it: confluent_kafka's names and behaviour, on virtual time."""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from greenlet import GreenletExit

from tests.sim.hub import Thread
from tests.sim.kafka import Cluster, Record

STATISTICS_SECONDS = 2.0
REQUEST_SECONDS_MAX = 8.0


@dataclass(slots=True)
class Answer:
    """A TopicPartition of a response: those of the client cannot be given an error."""

    topic: str
    partition: int
    offset: int
    metadata: str | None = None
    error: KafkaError | None = None


class Message:
    __slots__ = ("_error", "_offset", "_partition", "_record")

    def __init__(
        self, partition: int, offset: int, record: Record | None, error: KafkaError | None = None
    ) -> None:
        self._partition = partition
        self._offset = offset
        self._record = record
        self._error = error

    def error(self) -> KafkaError | None:
        return self._error

    def key(self) -> Any:
        return self._record.key if self._record is not None else None

    def timestamp(self) -> tuple[int, int]:
        return 1, self._record.at_ms if self._record is not None else 0

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset

    def value(self) -> bytes | None:
        return self._record.value if self._record is not None else None


def _error(code: int) -> KafkaException:
    return KafkaException(KafkaError(code))


class Client:
    """What consumers, producers and admins share: a thread of the broker waits for Kafka."""

    def __init__(self, cluster: Cluster, config: dict[str, Any]) -> None:
        self.cluster = cluster
        self.hub = cluster.hub
        assert self.hub.process is not None, "a client is made by a process"
        self.process = self.hub.process
        self.config = config
        # It knows no server of Kafka any more.
        self.lost = False

    @property
    def reachable(self) -> bool:
        return not self.lost and self.cluster.reachable(self.process)

    @property
    def thread(self) -> Thread:
        assert self.hub.thread is not None, "the event loop would wait for Kafka"
        if not self.process.alive:
            raise GreenletExit
        return self.hub.thread

    def statistics(self, topics: dict[str, Any]) -> str:
        state = "INIT" if self.lost else "UP" if self.reachable else "DOWN"
        server = {"nodeid": 1, "source": "learned", "state": state, "rxidle": 0 if state == "UP" else -1}
        return json.dumps({"brokers": {"1": server}, "topics": topics})

    def request(self, seconds: float) -> None:
        """Wait for a request and its answer, or raise that there was none."""
        thread = self.thread
        if self.reachable:
            thread.wait(self.cluster.latency())
            if self.reachable:
                return
        thread.wait(seconds)
        raise _error(KafkaError._TIMED_OUT)


class Consumer(Client):
    """One static member of the group."""

    def __init__(self, cluster: Cluster, config: dict[str, Any]) -> None:
        super().__init__(cluster, config)
        self.instance: str = config["group.instance.id"]
        self.session_seconds = config["session.timeout.ms"] / 1000
        self.generation = -1
        self._id = -1
        # What the group has given us, and where each of them is read.
        self.owned: frozenset[int] = frozenset()
        self.positions: dict[int, int] = {}
        self._paused: set[int] = set()
        self._closed = False
        self._waiting: Thread | None = None
        # What poll has to call.
        self._ops: deque[Callable[[], None]] = deque()
        # A rebalance is being carried out by poll.
        self._busy = False
        self._joining = False
        # It has given up what is to move, and the group has not heard of it yet.
        self._rejoins = False
        # The group has heard of us, as far as we know.
        self._member = False
        self._heard_at = self.hub.now
        self._next_heartbeat = self.hub.now
        self._connected = True
        self._sent_until = 0.0
        self._topic = ""
        self._subscribed = False
        cluster.consumers.append(self)
        self.process.on_death.append(self._gone)

    # -- the application's side

    def subscribe(self, topics: Sequence[str], **callbacks: Callable[..., None]) -> None:
        (self._topic,) = topics
        self._group = self.cluster.group(self.config["group.id"], self._topic)
        self._callbacks = callbacks
        if self._subscribed:
            # Once it has given up everything, it joins as the member it was.
            return
        self._subscribed = True
        self._join()
        self._beat()
        self._tell_statistics()

    def unsubscribe(self) -> None:
        """Only to subscribe again at once."""
        self._busy = True

        def give_up() -> None:
            self._carry_out(frozenset())
            self._rejoins = True
            self._join()

        self._call(give_up)

    def poll(self, timeout: float) -> Message | None:
        thread = self.thread
        until = self.hub.now + timeout
        while True:
            while self._ops:
                self._ops.popleft()()
            if (message := self._next()) is not None:
                return message
            if self.hub.now >= until:
                return None
            self._waiting = thread
            next_at = min([until, *self._next_visible()])
            thread.wait(next_at - self.hub.now)
            self._waiting = None

    def consume(self, num_messages: int, timeout: float) -> list[Message]:
        assert timeout == 0
        messages: list[Message] = []
        while len(messages) < num_messages and (message := self._next()) is not None:
            messages.append(message)
        return messages

    def _log(self, partition: int) -> Any:
        return self.cluster.topics[self._topic][partition]

    def _readable(self) -> Iterable[tuple[int, int]]:
        for partition, position in self.positions.items():
            if position < len(self._log(partition)) and partition not in self._paused:
                yield partition, position

    def _next(self) -> Message | None:
        if self.lost or not self.cluster.up or not self.cluster.network.reaches(self.process.name, "kafka"):
            return None
        for partition, position in self._readable():
            record = self._log(partition)[position]
            if record.visible_at <= self.hub.now:
                # The next partition has its turn first.
                del self.positions[partition]
                self.positions[partition] = position + 1
                return Message(partition, position, record)
        return None

    def _next_visible(self) -> list[float]:
        now = self.hub.now
        times = [self._log(partition)[position].visible_at for partition, position in self._readable()]
        return [at for at in times if at > now]

    def appended(self, topic: str, partition: int, visible_at: float) -> None:
        """A record was appended somewhere."""
        if self._waiting is not None and topic == self._topic and partition in self.positions:
            self.process.later(visible_at - self.hub.now, self._wake)

    def _wake(self) -> None:
        if self._waiting is not None:
            self._waiting.wake()

    def assignment(self) -> list[TopicPartition]:
        return [TopicPartition(self._topic, p) for p in self.positions]

    def incremental_assign(self, partitions: Iterable[TopicPartition]) -> None:
        for p in partitions:
            self.positions[p.partition] = p.offset if p.offset >= 0 else 0
            self._paused.discard(p.partition)

    def incremental_unassign(self, partitions: Iterable[TopicPartition]) -> None:
        for p in partitions:
            self.positions.pop(p.partition, None)

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self._paused.update(p.partition for p in partitions)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self._paused.difference_update(p.partition for p in partitions)

    def committed(self, partitions: Sequence[TopicPartition], timeout: float) -> list[Answer]:
        self.request(timeout)
        known = self._group.committed
        answers = []
        for p in partitions:
            offset, metadata = known.get(p.partition, (-1001, ""))
            answers.append(Answer(self._topic, p.partition, offset, metadata))
        return answers

    def get_watermark_offsets(self, partition: TopicPartition, timeout: float) -> tuple[int, int]:
        self.request(timeout)
        return 0, len(self._log(partition.partition))

    def commit(self, offsets: Sequence[TopicPartition], asynchronous: bool) -> list[Answer] | None:
        done: list[KafkaError | None] = []
        positions = [(p.partition, p.offset, p.metadata or "") for p in offsets]
        answers = [Answer(self._topic, *position) for position in positions]
        if asynchronous:
            on_commit = self.config["on_commit"]
            self._send_commit(positions, lambda error: self._call(lambda: on_commit(error, answers)))
            return None
        thread = self.thread

        def answered(error: KafkaError | None) -> None:
            done.append(error)
            thread.wake()

        self._send_commit(positions, answered)
        while not done:
            thread.wait(None)
        if done[0] is not None:
            raise KafkaException(done[0])
        return answers

    def _send_commit(
        self, positions: list[tuple[int, int, str]], answered: Callable[[KafkaError | None], object]
    ) -> None:
        """Requests of one connection arrive in their order. An answer that is lost does not undo one."""
        cluster, hub, process = self.cluster, self.hub, self.process
        id, generation = self._id, self.generation

        def lost() -> None:
            process.later(
                hub.between(0.5, REQUEST_SECONDS_MAX), lambda: answered(KafkaError(KafkaError._TIMED_OUT))
            )

        def arrive() -> None:
            if not cluster.up:
                lost()
                return
            error = self._group.commit(self, id, generation, positions)
            if self.reachable:
                process.later(cluster.latency(), lambda: answered(error))
            else:
                lost()

        if self.reachable:
            self._sent_until = max(hub.now + cluster.latency(), self._sent_until + 1e-6)
            hub.at(self._sent_until, arrive)
        else:
            lost()

    def close(self) -> None:
        """A static member leaves without a word: its place is kept for the session timeout."""
        if not self.process.alive:
            return
        self._closed = True
        if self.owned:
            self._callbacks["on_revoke"](self, self._named(self.owned))
        self._gone()

    def _gone(self) -> None:
        if self in self.cluster.consumers:
            self.cluster.consumers.remove(self)

    # -- the group's side, in the client's own threads

    def _call(self, op: Callable[[], None]) -> None:
        self._ops.append(op)
        self._wake()

    def _named(self, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, p) for p in sorted(partitions)]

    def _join(self) -> None:
        if self._joining or self._closed or not self.reachable:
            return
        self._joining = True
        hub, group, owned = self.hub, self._group, self.owned

        def arrive() -> None:
            self._joining = False
            if self.cluster.up and self.process.alive and not self._closed:
                self._heard_at = hub.now
                self._member = True
                self._rejoins = False
                group.join(self, owned)

        # After what was sent before it.
        self._sent_until = max(hub.now + self.cluster.latency(), self._sent_until + 1e-6)
        hub.at(self._sent_until, arrive)

    def _beat(self) -> None:
        if self._closed or not self.process.alive:
            self._gone()
            return
        reachable = self.reachable
        if self.hub.now - self._heard_at > self.session_seconds and self.generation >= 0:
            # By its own clock it is out.
            self._lose()
        elif reachable and self.hub.now >= self._next_heartbeat:
            interval = self.config["heartbeat.interval.ms"] / 1000
            self._next_heartbeat = self.hub.now + interval * self.hub.between(0.9, 1.0)
            self._heartbeat()
        if reachable != self._connected:
            self._connected = reachable
            if not (reachable or self.lost):
                on_error = self.config["error_cb"]
                self._call(lambda: on_error(KafkaError(KafkaError._ALL_BROKERS_DOWN)))
        self.process.later(self.hub.between(0.3, 0.6), self._beat)

    def _heartbeat(self) -> None:
        if not self._member:
            if not self._busy:
                self._join()
            return
        answer = self._group.heartbeat(self)
        if answer == "fenced":
            on_error = self.config["error_cb"]
            error = KafkaError(KafkaError.FENCED_INSTANCE_ID, "fenced by another member", fatal=True)
            self._call(lambda: on_error(error))
        elif answer == "unknown":
            self._member = False
            if self.generation >= 0:
                self._lose()
            elif not self._busy:
                self._join()
        else:
            self._heard_at = self.hub.now
            if (answer == "rebalance" or self._rejoins) and not self._busy:
                self._join()
            elif answer == "sync" and not self._busy:
                self._group.sync(self)

    @property
    def in_group(self) -> bool:
        return self._member and not self._closed and self._group.is_member(self)

    def put_out(self) -> None:
        """The coordinator does not know us any more, and says so."""
        self._group.remove(self._group.members[self.instance])
        self._heartbeat()

    def _lose(self) -> None:
        """The group goes on without us."""
        self.generation = -1
        self._member = False
        self._busy = True

        def lost() -> None:
            partitions, self.owned = self.owned, frozenset()
            if partitions:
                self._callbacks["on_lost"](self, self._named(partitions))
                for partition in partitions:
                    self.positions.pop(partition, None)
            self._busy = False
            self._join()

        self._call(lost)

    def synced(self, id: int, generation: int, assigned: frozenset[int]) -> None:
        """Our part of a new generation."""
        group = self._group
        # Late: it has said already with what it goes into the next one.
        late = self._joining or group.preparing or generation != group.generation
        if self._closed or self._busy or late or not group.is_member(self):
            return
        self._id, self.generation = id, generation
        if assigned != self.owned:
            self._busy = True
            self._call(lambda: self._carry_out(assigned))

    def _carry_out(self, assigned: frozenset[int]) -> None:
        revoked, added = self.owned - assigned, assigned - self.owned
        if revoked:
            self._callbacks["on_revoke"](self, self._named(revoked))
            self.owned -= revoked
            for partition in revoked:
                self.positions.pop(partition, None)
            if then := self.cluster.when_given_up.pop(self.process.name, None):
                self.hub.later(0, then)
        if added:
            self.owned |= added
            self._callbacks["on_assign"](self, self._named(added))
        self._busy = False
        if revoked:
            self._rejoins = True
            self._join()

    def _tell_statistics(self) -> None:
        if self._closed or not self.process.alive:
            return
        ends = {str(p): {"hi_offset": len(log)} for p, log in enumerate(self.cluster.topics[self._topic])}
        text = self.statistics({self._topic: {"partitions": ends}})
        self._call(lambda: self.config["stats_cb"](text))
        self.process.later(STATISTICS_SECONDS, self._tell_statistics)


class Producer(Client):
    """Idempotent: what is sent again by itself is appended once."""

    def __init__(self, cluster: Cluster, config: dict[str, Any]) -> None:
        super().__init__(cluster, config)
        self._delivery_seconds = config["delivery.timeout.ms"] / 1000
        self._answers: deque[Callable[[], None]] = deque()
        self._waiting: Thread | None = None
        # Sent, and not answered.
        self._open: dict[_Sent, None] = {}
        cluster.producers.append(self)
        self.process.on_death.append(lambda: cluster.producers.remove(self))
        self._tell_statistics()

    def produce(
        self,
        topic: str,
        value: bytes | None = None,
        key: object = None,
        *,
        headers: Sequence[tuple[str, bytes]] = (),
        on_delivery: Callable[[KafkaError | None, object], None],
    ) -> None:
        sent = _Sent(
            self, topic, value, key, list(headers), on_delivery, self.hub.now + self._delivery_seconds
        )
        self._open[sent] = None
        sent.attempt()

    def answered(self, sent: _Sent, error: KafkaError | None) -> None:
        if self._open.pop(sent, 0) is None:
            self._call(lambda: sent.on_delivery(error, SimpleNamespace()))

    def _call(self, answer: Callable[[], None]) -> None:
        self._answers.append(answer)
        if self._waiting is not None:
            self._waiting.wake()

    def _tell_statistics(self) -> None:
        if self.process.alive:
            text = self.statistics({})
            self._call(lambda: self.config["stats_cb"](text))
            self.process.later(STATISTICS_SECONDS, self._tell_statistics)

    def poll(self, timeout: float) -> int:
        thread = self.thread
        if not self._answers:
            self._waiting = thread
            thread.wait(timeout)
            self._waiting = None
        called = 0
        while self._answers:
            self._answers.popleft()()
            called += 1
        return called

    def purge(self) -> None:
        for sent in list(self._open):
            self.answered(sent, KafkaError(KafkaError._PURGE_QUEUE))

    def __len__(self) -> int:
        """Of an answer that is not taken yet, too."""
        return len(self._open) + len(self._answers)


class _Sent:
    """A message until its answer is known."""

    def __init__(
        self,
        producer: Producer,
        topic: str,
        value: bytes | None,
        key: object,
        headers: list[tuple[str, bytes]],
        on_delivery: Callable[[KafkaError | None, object], None],
        until: float,
    ) -> None:
        self.producer = producer
        self.topic = topic
        self.value = value
        self.key = key
        self.headers = headers
        self.on_delivery = on_delivery
        self.until = until
        self.appended = False

    def attempt(self) -> None:
        producer = self.producer
        hub = producer.hub
        if self not in producer._open:
            return
        if hub.now >= self.until:
            producer.answered(self, KafkaError(KafkaError._MSG_TIMED_OUT))
        elif producer.reachable:
            hub.later(producer.cluster.latency(), self._arrive)
        else:
            producer.process.later(hub.between(0.1, 1.0), self.attempt)

    def _arrive(self) -> None:
        producer = self.producer
        cluster, process = producer.cluster, producer.process
        error = cluster.refuses.get(self.topic)
        if producer.lost or not cluster.up:
            process.later(producer.hub.between(0.1, 1.0), self.attempt)
            return
        if error is None and not self.appended:
            self.appended = True
            partitions = len(cluster.topics[self.topic])
            partition = sum(str(self.key).encode()) % partitions
            cluster.append(self.topic, partition, self.key, self.value, self.headers)
        if producer.reachable:
            process.later(cluster.latency(), lambda: producer.answered(self, error))
        else:
            process.later(producer.hub.between(0.1, 1.0), self.attempt)


class TransactionalProducer(Client):
    """All of a transaction is in the log once it is committed, or nothing."""

    def __init__(self, cluster: Cluster, config: dict[str, Any]) -> None:
        super().__init__(cluster, config)
        self._id: str = config["transactional.id"]
        self._epoch = -1
        self._begun_at = 0.0
        self._messages: list[tuple[str, bytes, bytes | None]] = []

    def init_transactions(self, timeout: float) -> None:
        self.request(timeout)
        self._epoch = self.cluster.epochs[self._id] = self.cluster.epochs.get(self._id, 0) + 1
        self.cluster.openers[self._id] = self.process.name
        self.cluster.on_opened()

    def begin_transaction(self) -> None:
        self._begun_at = self.hub.now
        self._messages = []

    def produce(self, topic: str, value: bytes | None, key: bytes) -> None:
        self._messages.append((topic, key, value))

    def commit_transaction(self, timeout: float) -> None:
        """One whose answer is lost may have been carried out."""
        thread, cluster = self.thread, self.cluster
        if not cluster.reachable(self.process):
            thread.wait(timeout)
            raise _error(KafkaError._TIMED_OUT)
        done: list[bool] = []
        messages, epoch, begun_at = self._messages, self._epoch, self._begun_at

        def answered(fenced: bool) -> None:
            done.append(fenced)
            thread.wake()

        def arrive() -> None:
            if not cluster.up:
                return
            fenced = cluster.epochs[self._id] != epoch
            if not fenced:
                if self._id.endswith(f"/{self.process.name}") and not _names_successor(messages[0][2]):
                    cluster.recorded_at[self._id] = begun_at
                for topic, key, value in messages:
                    partition = sum(key) % len(cluster.topics[topic])
                    cluster.append(topic, partition, key, value, [], self.process)
            if cluster.reachable(self.process):
                self.process.later(cluster.latency(), partial(answered, fenced))

        self.hub.later(cluster.latency(), arrive)
        until = self.hub.now + timeout
        while not done and self.hub.now < until:
            thread.wait(until - self.hub.now)
        if not done:
            raise _error(KafkaError._TIMED_OUT)
        if done[0]:
            raise _error(KafkaError._FENCED)


def _names_successor(head: bytes | None) -> bool:
    """It says who takes over from a store, and nothing of what that one has finished."""
    return head is not None and json.loads(head)["successor"] is not None


class Reader(Client):
    """A consumer without a group: it reads what it is told to, to the end."""

    def __init__(self, cluster: Cluster, config: dict[str, Any]) -> None:
        super().__init__(cluster, config)
        self._positions: dict[int, int] = {}
        self._topic = ""
        self._ended: set[int] = set()

    def list_topics(self, topic: str, timeout: float) -> SimpleNamespace:
        self.request(timeout)
        logs = self.cluster.topics.get(topic, [])
        error = None if logs else KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)
        named = SimpleNamespace(partitions=dict.fromkeys(range(len(logs))), error=error)
        return SimpleNamespace(topics={topic: named})

    def get_watermark_offsets(self, partition: TopicPartition, timeout: float) -> tuple[int, int]:
        self.request(timeout)
        return 0, len(self.cluster.topics[partition.topic][partition.partition])

    def committed(self, partitions: Sequence[TopicPartition], timeout: float) -> list[Answer]:
        self.request(timeout)
        group = self.cluster.groups.get(self.config["group.id"])
        known = group.committed if group is not None else {}
        return [Answer(p.topic, p.partition, *known.get(p.partition, (-1001, ""))) for p in partitions]

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        self._positions = {p.partition: p.offset for p in partitions}
        self._topic = partitions[0].topic if partitions else ""
        self._ended.clear()

    def incremental_assign(self, partitions: Sequence[TopicPartition]) -> None:
        for p in partitions:
            self._topic = p.topic
            self._positions[p.partition] = p.offset
            self._ended.discard(p.partition)

    def incremental_unassign(self, partitions: Sequence[TopicPartition]) -> None:
        for p in partitions:
            del self._positions[p.partition]

    def consume(self, num_messages: int, timeout: float) -> list[Message]:
        """Waits for the whole of ``timeout``, or until there are as many."""
        if not timeout:
            return self._read(num_messages) if self.cluster.reachable(self.process) else []
        thread, until = self.thread, self.hub.now + timeout
        messages: list[Message] = []
        while self.hub.now < until and len(messages) < num_messages:
            thread.wait(min(self.cluster.latency(), until - self.hub.now))
            if self.cluster.reachable(self.process):
                messages += self._read(num_messages - len(messages))
        return messages

    def _read(self, num_messages: int) -> list[Message]:
        messages: list[Message] = []
        for partition, position in self._positions.items():
            log = self.cluster.topics[self._topic][partition]
            read = log[position : position + num_messages - len(messages)]
            messages += [Message(partition, position + n, record) for n, record in enumerate(read)]
            self._positions[partition] = position + len(read)
            at_end = position + len(read) == len(log) and partition not in self._ended
            if at_end and len(messages) < num_messages:
                self._ended.add(partition)
                messages.append(Message(partition, len(log), None, KafkaError(KafkaError._PARTITION_EOF)))
        return messages

    def close(self) -> None:
        pass


def consumer(cluster: Cluster, config: dict[str, Any]) -> Consumer | Reader:
    return Consumer(cluster, config) if "group.instance.id" in config else Reader(cluster, config)


def producer(cluster: Cluster, config: dict[str, Any]) -> Producer | TransactionalProducer:
    return (
        TransactionalProducer(cluster, config) if "transactional.id" in config else Producer(cluster, config)
    )


class AdminClient(Client):
    def describe_topics(self, topics: object, request_timeout: float) -> dict[str, _Described]:
        """No topic is made anew here."""
        return {
            topic: _Described(self, partial(self._topic, topic), request_timeout)
            for topic in self.cluster.topics
        }

    def _topic(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(topic_id="the only one", partitions=self.cluster.topics[name])

    def list_topics(self, timeout: float) -> SimpleNamespace:
        self.request(timeout)
        return SimpleNamespace(topics=dict.fromkeys(self.cluster.topics))

    def list_groups(self, group: str, timeout: float) -> list[SimpleNamespace]:
        if not self.reachable:
            self.request(timeout)
        found = self.cluster.groups.get(group)
        if found is None:
            return []
        state = "PreparingRebalance" if found.preparing else "Stable"
        members = [
            SimpleNamespace(client_id=instance, assignment=_encoded(found.topic, member.assigned))
            for instance, member in sorted(found.members.items())
        ]
        return [SimpleNamespace(id=group, error=None, state=state, members=members)]


def _encoded(topic: str, partitions: frozenset[int]) -> bytes:
    """An assignment, as Kafka's consumers encode it."""
    name = topic.encode()
    head = struct.pack(f">hih{len(name)}si", 1, 1, len(name), name, len(partitions))
    return head + struct.pack(f">{len(partitions)}ii", *sorted(partitions), -1)


@dataclass(slots=True)
class _Described:
    """Kafka's answer, from when somebody takes it."""

    client: Client
    answer: Callable[[], SimpleNamespace]
    seconds_max: float

    def result(self, timeout: float | None = None) -> SimpleNamespace:
        if timeout is None:
            self.client.request(self.seconds_max)
        elif not self.client.reachable:
            raise _error(KafkaError._TIMED_OUT)
        return self.answer()
