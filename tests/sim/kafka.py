"""Kafka as brokers meet it: logs, one consumer group with cooperative rebalances, and its failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from confluent_kafka import KafkaError

from tests.sim.hub import EPOCH_MS, Hub, Process
from tests.sim.network import Network

if TYPE_CHECKING:
    from tests.sim.kafka_client import Consumer, Producer

NAME = "kafka"


class Record(NamedTuple):
    key: object
    value: bytes | None
    headers: list[tuple[str, bytes]]
    # When a consumer that waits for it has it.
    visible_at: float
    at_ms: int


@dataclass(slots=True)
class Member:
    """A static member of the group, as its coordinator knows it."""

    id: int
    consumer: Consumer
    seen_at: float
    owned: frozenset[int]
    joined: bool = False
    assigned: frozenset[int] = frozenset()


class Cluster:
    """Topics, and whether they can be reached."""

    def __init__(self, hub: Hub, network: Network) -> None:
        self.hub = hub
        self.network = network
        self.up = True
        self.slow = 1.0
        # Of produces to a topic, while it lasts: refused, or their acknowledgement lost.
        self.refuses: dict[str, KafkaError] = {}
        self.topics: dict[str, list[list[Record]]] = {}
        self.groups: dict[str, Group] = {}
        self.consumers: list[Consumer] = []
        self.producers: list[Producer] = []
        # Of transactional ids: how often it was opened, by whom last, and when the last transaction began
        # in which the broker of its name told of its own store.
        self.epochs: dict[str, int] = {}
        self.openers: dict[str, str] = {}
        self.recorded_at: dict[str, float] = {}
        # By brokers' names: called once, when they give partitions up next.
        self.when_given_up: dict[str, Callable[[], None]] = {}
        # Members that their group forgets when they commit, and how often yet.
        self.forgets: dict[Consumer, int] = {}
        # Told when one is opened.
        self.on_opened: Callable[[], None] = lambda: None
        # Told of each record: topic, partition, offset; and by whom, if it is of a transaction.
        self.on_append: Callable[[str, int, int, Record, Process | None], None] = lambda *told: None
        # Told of each commit that is accepted: who, topic, partition, offset before, offset; and of those
        # by one who does not have the partition.
        self.on_commit: Callable[[Process, str, int, int, int], None] = lambda *told: None
        self.on_foreign_commit: Callable[[Process, int, int], None] = lambda *told: None

    def add_topic(self, topic: str, partitions: int) -> None:
        self.topics[topic] = [[] for _ in range(partitions)]

    def group(self, name: str, topic: str) -> Group:
        if name not in self.groups:
            self.groups[name] = Group(self, topic)
        return self.groups[name]

    def rebalances(self) -> int:
        return sum(group.rebalances for group in self.groups.values())

    def generations(self) -> int:
        """Of all groups together: the same as long as nobody has been assigned anything new."""
        return sum(group.generation for group in self.groups.values())

    def reachable(self, process: Process) -> bool:
        return self.up and process.alive and self.network.delivers(process.name, NAME)

    def latency(self) -> float:
        return self.hub.between(0.0005, 0.006) * self.slow

    def append(
        self,
        topic: str,
        partition: int,
        key: object,
        value: bytes | None,
        headers: list[tuple[str, bytes]],
        by: Process | None = None,
    ) -> int:
        log = self.topics[topic][partition]
        now = self.hub.now
        log.append(Record(key, value, headers, now + self.latency(), EPOCH_MS + int(now * 1000)))
        self.on_append(topic, partition, len(log) - 1, log[-1], by)
        for consumer in self.consumers:
            consumer.appended(topic, partition, log[-1].visible_at)
        return len(log) - 1


@dataclass(slots=True)
class Group:
    """The coordinator of a consumer group of one topic.

    A rebalance is two rounds at most: what is to move is first given up by its owner, who joins again,
    and then given to its new one.
    """

    cluster: Cluster
    topic: str
    session_seconds: float = 6.0
    generation: int = 0
    preparing: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    committed: dict[int, tuple[int, str]] = field(default_factory=dict)
    rebalances: int = 0
    _last_id: int = 0

    def owner(self, partition: int) -> str | None:
        return next((name for name, m in self.members.items() if partition in m.assigned), None)

    def is_member(self, consumer: Consumer) -> bool:
        member = self.members.get(consumer.instance)
        return member is not None and member.consumer is consumer

    # -- what members ask

    def heartbeat(self, consumer: Consumer) -> str:
        member = self.members.get(consumer.instance)
        if member is None:
            return "unknown"
        if member.consumer is not consumer:
            return "fenced"
        member.seen_at = self.cluster.hub.now
        self._expect(member)
        if self.preparing:
            return "ok" if member.joined else "rebalance"
        return "ok" if consumer.generation == self.generation else "sync"

    def _expect(self, member: Member) -> None:
        """It is out when nothing is heard of it for the session timeout."""
        seen = member.seen_at

        def look() -> None:
            if self.members.get(member.consumer.instance) is member and member.seen_at == seen:
                self.remove(member)

        self.cluster.hub.later(self.session_seconds, look)

    def remove(self, member: Member) -> None:
        self.cluster.hub.tell(NAME, f"{member.consumer.instance} is out: {sorted(member.assigned)}")
        del self.members[member.consumer.instance]
        self._rebalance()

    def join(self, consumer: Consumer, owned: frozenset[int]) -> None:
        now = self.cluster.hub.now
        member = self.members.get(consumer.instance)
        if member is None:
            self._last_id += 1
            member = self.members[consumer.instance] = Member(self._last_id, consumer, now, owned)
            self._expect(member)
        elif member.consumer is not consumer:
            # The same broker started anew: it goes on where its predecessor was.
            self._last_id += 1
            member.id, member.consumer, member.seen_at, member.owned = self._last_id, consumer, now, owned
            self._expect(member)
            if not self.preparing:
                self._send(member)
                return
        member.owned, member.joined = owned, True
        if not self.preparing:
            self._rebalance(member)
        self._complete()

    def sync(self, consumer: Consumer) -> None:
        """It did not get its assignment: once more."""
        if self.is_member(consumer) and not self.preparing:
            self._send(self.members[consumer.instance])

    def _rebalance(self, by: Member | None = None) -> None:
        self.rebalances += 1
        self.preparing = True
        for member in self.members.values():
            member.joined = member is by
        self._complete()

    def _complete(self) -> None:
        if not self.preparing or not all(member.joined for member in self.members.values()):
            return
        self.preparing = False
        self.generation += 1
        self._assign()
        told = {name: sorted(member.assigned) for name, member in self.members.items()}
        self.cluster.hub.tell(NAME, f"generation {self.generation}: {told}")
        for member in self.members.values():
            self._send(member)

    def _assign(self) -> None:
        """Balanced, and each keeps what it has as far as that is fair. What is to move is nobody's yet."""
        partitions = range(len(self.cluster.topics[self.topic]))
        names = sorted(self.members)
        if not names:
            return
        most = -(-len(partitions) // len(names))
        wanted: dict[str, set[int]] = {name: set() for name in names}
        owner_of = {p: name for name in names for p in sorted(self.members[name].owned)}
        for partition in partitions:
            owner = owner_of.get(partition)
            if owner is not None and len(wanted[owner]) < most:
                wanted[owner].add(partition)
        taken = {p for owned in wanted.values() for p in owned}
        for partition in partitions:
            if partition not in taken:
                wanted[min(names, key=lambda name: (len(wanted[name]), name))].add(partition)
        for name in names:
            self.members[name].assigned = frozenset(
                p for p in wanted[name] if owner_of.get(p) in (None, name)
            )

    def _send(self, member: Member) -> None:
        cluster, generation, id = self.cluster, self.generation, member.id
        consumer, assigned = member.consumer, member.assigned

        def arrive() -> None:
            if cluster.reachable(consumer.process):
                consumer.process.enter(lambda: consumer.synced(id, generation, assigned))

        cluster.hub.later(cluster.latency(), arrive)

    def commit(
        self, consumer: Consumer, id: int, generation: int, positions: Iterable[tuple[int, int, str]]
    ) -> KafkaError | None:
        """``id`` and ``generation`` as the member knew them when it sent this."""
        if self.cluster.forgets.get(consumer) and consumer.in_group:
            self.cluster.forgets[consumer] -= 1
            consumer.put_out()
        member = self.members.get(consumer.instance)
        if member is None or (member.consumer is consumer and member.id != id):
            return KafkaError(KafkaError.UNKNOWN_MEMBER_ID, "unknown member")
        if member.consumer is not consumer:
            return KafkaError(KafkaError.FENCED_INSTANCE_ID, "fenced", fatal=True)
        if generation != self.generation:
            return KafkaError(KafkaError.ILLEGAL_GENERATION, "another generation")
        for partition, offset, metadata in positions:
            before = self.committed.get(partition, (0, ""))[0]
            if partition not in member.assigned | member.owned:
                self.cluster.on_foreign_commit(consumer.process, partition, offset)
            self.committed[partition] = (offset, metadata)
            self.cluster.on_commit(consumer.process, self.topic, partition, before, offset)
        return None
