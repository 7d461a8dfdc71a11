"""What Kafka does not yet know, or says too late: of a topic that is made anew, and of partitions that go."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from ingest_helpers import running_store, task_bytes

from penstock_broker.config import Settings
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.event_loop import EventLoop
from penstock_broker.ingest.ownership import Me, Owner, encode
from penstock_broker.ingest.poller import Poller


class Client:
    """A consumer. Who asks for the end of a log is told so of these partitions."""

    def __init__(self) -> None:
        self.without_leader: set[int] = set()
        # How often such a one was asked.
        self.in_vain = 0
        # By partition: what the group has.
        self.metadata: dict[int, str] = {}
        self.read: dict[int, int] = {}
        self.sent: list[tuple[int, int]] = []

    def committed(self, asked: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        return [
            TopicPartition(p.topic, p.partition, 9, self.metadata[p.partition])
            if p.partition in self.metadata
            else TopicPartition(p.topic, p.partition, -1001)
            for p in asked
        ]

    def get_watermark_offsets(self, asked: TopicPartition, timeout: float) -> tuple[int, int]:
        if asked.partition in self.without_leader:
            self.in_vain += 1
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
        return 0, 9

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        self.read.update({p.partition: p.offset for p in partitions})

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        for p in partitions:
            del self.read[p.partition]

    def pause(self, partitions: list[TopicPartition]) -> None: ...

    def resume(self, partitions: list[TopicPartition]) -> None: ...

    def commit(self, offsets: list[TopicPartition], asynchronous: bool) -> None:
        self.sent += [(p.partition, p.offset) for p in offsets]

    def consume(self, count: int, seconds: float) -> list[object]:
        return []

    def close(self) -> None: ...


class Anew:
    """A poller, and the topic it reads."""

    def __init__(self, poller: Poller, client: Client) -> None:
        self.poller, self.client = poller, client

    async def call(self, call: Callable[..., object], *arguments: object) -> None:
        await asyncio.to_thread(call, *arguments)
        # What it has told the loop.
        await asyncio.sleep(0.01)

    async def take(self, partition: int, *offsets: int) -> None:
        messages = [
            SimpleNamespace(
                error=lambda: None,
                partition=lambda: partition,
                offset=lambda at=at: at,
                value=lambda at=at: task_bytes(f"{self.poller._topic_id} {partition} {at}"),
            )
            for at in offsets
        ]
        await self.call(self.poller._take, messages)

    async def read_outside(self, partition: int) -> None:
        """The client says that what it is to read next is not in the log."""
        error = KafkaError(KafkaError._AUTO_OFFSET_RESET)
        message = SimpleNamespace(error=lambda: error, partition=lambda: partition, offset=lambda: 3)
        await self.call(self.poller._take, [message])

    async def lose(self, partition: int) -> None:
        """And the others are committed."""
        await self.call(self.poller._on_lost, self.client, [TopicPartition("tasks", partition)])
        while self.poller._intake.busy:
            await self.call(self.poller._commit, self.client)
            sent, self.client.sent = self.client.sent, []
            if sent:
                committed = [TopicPartition("tasks", *position) for position in sent]
                await self.call(self.poller._on_commit, None, committed)
        assert self.poller._intake.unresolved == {partition}

    async def look(self) -> None:
        self.poller._look_which_at = 0
        await self.call(self.poller._chores, self.client)
        await self.call(concurrent.futures.wait, self.poller._beginning.values())
        await self.call(self.poller._read_anew, self.client, self.poller._have_begun())


@pytest.fixture
async def unread(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Anew]:
    topics = iter(["old"])
    monkeypatch.setattr(
        "penstock_broker.ingest.poller.Cluster",
        lambda settings: SimpleNamespace(topic_id=lambda seconds: next(topics, "new"), unread=lambda s: []),
    )
    async with running_store(settings.db_path) as store:
        poller, client = KafkaConsumer(store, settings)._poller, Client()
        poller._loop, poller._stopping = EventLoop(), threading.Event()
        made = Anew(poller, client)
        await made.look()
        yield made


@pytest.fixture
async def anew(unread: Anew) -> Anew:
    """It reads two partitions, of which three messages each were taken, and a topic made anew."""
    assigned = [TopicPartition("tasks", p) for p in (0, 1)]
    await unread.call(unread.poller._on_assign, unread.client, assigned)
    for partition in (0, 1):
        await unread.take(partition, 0, 1, 2)
    return unread


async def test_a_partition_without_a_leader_begins_when_it_has_one(anew: Anew) -> None:
    anew.client.without_leader = {0, 1}
    await anew.look()
    consumed = anew.poller.consumed
    # From where the old one was read.
    await anew.take(0, 3, 4)
    await anew.call(anew.poller._commit, anew.client)
    assert (anew.poller.consumed, anew.client.sent) == (consumed, [])
    anew.client.without_leader = set()
    await anew.look()
    assert anew.client.read == {0: 0, 1: 0}
    assert anew.poller._intake.readings.keys() == {0, 1}
    await anew.take(0, 0, 1)
    assert anew.poller.consumed == consumed + 2


async def test_a_partition_that_is_not_there_any_more_holds_up_no_other(anew: Anew) -> None:
    anew.client.without_leader = {0}
    await anew.look()
    assert anew.client.read[1] == 0
    assert anew.poller._intake.readings.keys() == {1}
    await anew.call(anew.poller._on_revoke, anew.client, [TopicPartition("tasks", 0)])
    anew.client.without_leader = set()
    await anew.look()
    assert anew.poller._intake.readings.keys() == {1}


async def test_what_is_said_of_a_partition_that_has_gone_is_of_no_interest(anew: Anew) -> None:
    anew.poller._topic_id = "new"
    await anew.lose(1)
    await anew.read_outside(1)
    await anew.look()
    # Its rows are somebody else's: Kafka knows of no commit.
    assert anew.poller._intake.readings.keys() == {0}
    assert anew.poller._intake.unresolved == frozenset()


async def test_whose_rows_are_is_found_out_while_another_partition_has_no_leader(anew: Anew) -> None:
    anew.poller._topic_id = "new"
    await anew.lose(1)
    anew.client.without_leader = {0}
    await anew.read_outside(0)
    for _ in range(2):
        await anew.look()
    assert anew.poller._outside == {0}
    assert anew.poller._intake.unresolved == frozenset()


async def test_partitions_without_a_leader_keep_no_others_from_beginning(
    unread: Anew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than one of them is asked in a round: who asks waits for seconds."""
    poller, client, looking = unread.poller, unread.client, Client()

    def connect() -> Client:
        poller.tails._consumer = looking  # type: ignore[assignment]
        return looking

    monkeypatch.setattr(poller.tails, "_connect", connect)
    poller._topic_id = "new"
    # Of 2, 3 and 4 something is to be looked through; 5 needs no leader to begin.
    theirs = encode([Owner(0, Me("another", "0" * 8), 1)])
    client.metadata = dict.fromkeys((2, 3, 4), theirs) | {5: encode([Owner(9, poller._intake.me, 1)])}
    client.without_leader = looking.without_leader = {0, 2, 3}
    assigned = [TopicPartition("tasks", p) for p in range(6)]
    await unread.call(poller._on_assign, client, assigned)
    assert set(poller.tracks) == {5}
    for rounds in range(1, 7):
        await unread.look()
        assert client.in_vain + looking.in_vain <= 1 + rounds
    assert set(poller.tracks) == {1, 5}
    assert [p for p in range(6) if p in poller.tails] == [4]
    client.without_leader = looking.without_leader = set()
    await unread.look()
    assert set(poller.tracks) == {0, 1, 5}
    assert [p for p in range(6) if p in poller.tails] == [2, 3, 4]
    poller.tails._consumer = None


async def test_partitions_without_a_leader_keep_no_others_outside_their_logs(anew: Anew) -> None:
    anew.poller._topic_id = "new"
    for partition in (0, 1):
        await anew.read_outside(partition)
    anew.client.without_leader = {0}
    for rounds in range(1, 4):
        await anew.look()
        assert anew.client.in_vain <= rounds
    assert anew.poller._outside == {0}
    assert anew.client.read[1] == 3
