"""Clients that hear nothing from Kafka, or that have forgotten where it is."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException
from ingest_helpers import MockKafka, running_store, task_bytes

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.domain.activation import hash_id
from penstock_broker.errors import FatalError
from penstock_broker.ingest import cluster
from penstock_broker.ingest.cluster import Cluster
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.intake import Tail
from penstock_broker.ingest.kafka import Connections
from penstock_broker.ingest.poller import Poller, _Fenced
from penstock_broker.ingest.tails import Tails


def statistics(*brokers: tuple[str, int, str, float]) -> dict[str, dict[str, object]]:
    """As seen of librdkafka 2.16. Each: source, id, state, seconds since it was heard (-1: never)."""
    return {
        "brokers": {
            f"{source}/{id}": {"source": source, "nodeid": id, "state": state, "rxidle": int(idle * 1e6)}
            for source, id, state, idle in brokers
        }
    }


CONNECTED = statistics(("learned", 1, "UP", 0.1), ("logical", -1, "UP", 1.5))
STOOD_STILL = statistics(("learned", 1, "UP", 7.0), ("logical", -1, "APIVERSION_QUERY", -1))
OF_NO_PARTITION = statistics(("learned", 1, "UP", 20.0), ("logical", -1, "UP", 1.9))
AWAY = statistics(("configured", -1, "INIT", -1), ("logical", -1, "TRY_CONNECT", -1))
RECONNECTS = statistics(("learned", 1, "TRY_CONNECT", -1), ("learned", 2, "INIT", -1))
FORGOTTEN = statistics(("learned", 1, "INIT", -1), ("logical", -1, "TRY_CONNECT", -1))
NOTHING_LEFT = statistics(("logical", -1, "INIT", -1))


@pytest.mark.parametrize(
    ("seen", "up", "silent", "lost"),
    [
        ([CONNECTED, CONNECTED], True, False, False),
        ([OF_NO_PARTITION, OF_NO_PARTITION], True, False, False),
        ([STOOD_STILL, STOOD_STILL], True, True, False),
        ([AWAY, AWAY, AWAY], False, True, False),
        ([RECONNECTS, RECONNECTS, RECONNECTS], False, True, False),
        ([FORGOTTEN, FORGOTTEN], False, True, False),
        ([FORGOTTEN, FORGOTTEN, CONNECTED, FORGOTTEN], False, True, False),
        ([FORGOTTEN, FORGOTTEN, FORGOTTEN], False, True, True),
        ([NOTHING_LEFT, NOTHING_LEFT, NOTHING_LEFT], False, True, True),
        # An admin client.
        ([statistics(), statistics(), statistics()], False, True, True),
    ],
)
def test_what_the_statistics_of_a_client_say(
    seen: Sequence[dict[str, dict[str, object]]], up: bool, silent: bool, lost: bool
) -> None:
    connections = Connections()
    for one in seen:
        connections.look(one)
    assert (connections.up, connections.silent, connections.lost) == (up, silent, lost)


class Loop:
    """Notes what a poller tells the event loop."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def tell(self, call: object, *arguments: object) -> None:
        self.told.append(arguments)

    def ask(self, asked: Coroutine[None, None, None]) -> None:
        asked.close()


class Client:
    """Of which the first has lost Kafka, and the second is there when the broker stops."""

    closed = False

    def __init__(self, polled: Callable[[], None]) -> None:
        self.poll = lambda seconds: polled()

    def subscribe(self, topics: list[str], **callbacks: object) -> None: ...

    def close(self) -> None:
        self.closed = True


def why_ended(poller: Poller, loop: Loop, stopping: threading.Event) -> str | None:
    try:
        poller.run(loop, stopping)  # type: ignore[arg-type]
    except FatalError as error:
        return error.message
    return None


async def test_a_client_that_has_lost_kafka_is_replaced(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, if need be: that has nothing to do with a second broker of its id."""
    stopping, loop = threading.Event(), Loop()
    made: list[Client] = []
    async with running_store(settings.db_path) as store:
        poller = KafkaConsumer(store, settings)._poller

        def forget() -> None:
            poller._on_statistics(json.dumps(FORGOTTEN | {"topics": {}}))

        turns = [forget, forget, forget, stopping.set]

        def make(config: object) -> Client:
            made.append(Client(turns[len(made)]))
            return made[-1]

        monkeypatch.setattr("penstock_broker.ingest.poller.Consumer", make)
        monkeypatch.setattr(poller, "_commit_last", lambda consumer: None)
        for partition in (0, 1):
            poller.tracks.add(partition, 1, 0)
        assert why_ended(poller, loop, stopping) is None
        # One that has lost Kafka would wait for its answers.
        assert [client.closed for client in made] == [False, False, False, True]
        assert loop.told == [([0, 1],), ([],), ([],)]
        assert not list(poller.tracks)


async def test_who_hears_nothing_from_kafka_has_no_double(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one without a partition to lose: a Kafka that stands still closes no connection."""
    async with running_store(settings.db_path) as store:
        poller, stopping = KafkaConsumer(store, settings)._poller, threading.Event()
        turns = iter(["fenced", "silent", "fenced", "silent", "fenced", "silent"])

        def consume() -> None:
            match next(turns, None):
                case "fenced":
                    raise _Fenced("by another member")
                case "silent":
                    poller._on_statistics(json.dumps(STOOD_STILL | {"topics": {}}))
                case None:
                    stopping.set()

        monkeypatch.setattr(poller, "_consume", consume)
        assert why_ended(poller, Loop(), stopping) is None
        assert poller.connected


def test_a_tail_is_read_on_by_another_client(kafka: MockKafka, settings: Settings) -> None:
    kafka.produce("tasks", [task_bytes(f"id-{n}") for n in range(20)], key="one")
    known: dict[int, int] = {}
    tails = Tails(settings, SystemClock(), lambda source, ids, forwards: known.update(ids))
    tails.add(Tail(partition=0, source=1, first=0, end=20))
    forgetful = tails._consumer
    assert forgetful is not None
    forgetful.incremental_unassign(forgetful.assignment())
    for _ in range(3):
        tails._connections.look(FORGOTTEN)
    until = time.monotonic() + 10
    while not tails.turn() and time.monotonic() < until:
        pass
    assert set(known) == {hash_id(f"id-{n}") for n in range(20)}


def test_who_cannot_say_where_a_log_ends_is_not_asked_again(
    kafka: MockKafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tails = Tails(settings, SystemClock(), lambda source, ids, forwards: None)
    monkeypatch.setattr(Tails, "_watermarks", _fail)
    with pytest.raises(KafkaException):
        tails.add(Tail(partition=0, source=1, first=0, end=20))
    assert tails._consumer is None


def _fail(*arguments: object) -> tuple[int, int]:
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


class Admin:
    """Answers as ``topic`` and ``group`` say, at once; each client anew."""

    topic: Iterator[object]
    group: Iterator[object]

    def __init__(self, config: object) -> None:
        self._topic = next(self.topic)

    def describe_topics(self, asked: object, request_timeout: float) -> dict[str, Future[object]]:
        return {"tasks": _answered(self._topic)}

    def list_groups(self, group: str, timeout: float) -> list[object]:
        answer = next(self.group)
        if isinstance(answer, KafkaException):
            raise answer
        return [one for one in [answer] if one is not None]


def _answered(answer: object) -> Future[object]:
    answered: Future[object] = Future()
    if isinstance(answer, KafkaException):
        answered.set_exception(answer)
    elif answer is not None:
        answered.set_result(answer)
    return answered


def test_who_cannot_say_which_topic_it_is_is_not_asked_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_out = KafkaException(KafkaError(KafkaError._TIMED_OUT))
    Admin.topic = iter([timed_out, SimpleNamespace(topic_id="the topic's", partitions=[])])
    monkeypatch.setattr(cluster, "AdminClient", Admin)
    seen = Cluster(settings)
    assert seen.topic_id() is None
    assert seen.topic_id() == "the topic's"


def test_of_a_topic_that_is_gone_nothing_is_unread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))
    answers = iter([SimpleNamespace(topic_id="the topic's", partitions=range(4)), unknown])
    monkeypatch.setattr(Admin, "describe_topics", lambda *asked, **more: {"tasks": _answered(next(answers))})
    monkeypatch.setattr(cluster, "AdminClient", Admin)
    Admin.topic, Admin.group = iter([None]), iter([TWO_LEFT] * 3)
    seen = Cluster(settings.model_copy(update={"broker_id": "broker"}))
    seen.topic_id()
    assert seen.unread(1) == []
    assert seen.topic_id() is None
    assert seen.unread(1) == []


def _group(state: str = "Stable", **members: Sequence[int]) -> object:
    """``members``: the partitions of each."""
    return SimpleNamespace(
        id="penstock-tasks",
        error=None,
        state=state,
        members=[
            SimpleNamespace(client_id=name.rstrip("12"), assignment=_assignment(others=[3], tasks=partitions))
            for name, partitions in members.items()
        ],
    )


def _assignment(**topics: Sequence[int]) -> bytes:
    data = struct.pack(">hi", 1, len(topics))
    for topic, partitions in topics.items():
        data += struct.pack(f">h{len(topic)}s", len(topic), topic.encode())
        data += struct.pack(f">i{len(partitions)}i", len(partitions), *partitions)
    return data + struct.pack(">i", -1)


ALL = _group(broker=[0, 1], other=[2, 3])
TWO_LEFT = _group(broker=[], other=[0, 1])
OF_MANY = _group(broker=[0, 1], other=[2])
MOVING = _group("PreparingRebalance", broker=[], other=[0, 1])
NOT_OURS = _group(other=[0, 1])


@pytest.mark.parametrize(
    ("group", "unread"),
    [
        ([ALL, ALL, ALL], [[], [], []]),
        # Once it may be a rebalance.
        ([TWO_LEFT, TWO_LEFT], [[], [2, 3]]),
        ([TWO_LEFT, ALL, TWO_LEFT], [[], [], []]),
        ([TWO_LEFT, MOVING, TWO_LEFT], [[], [], []]),
        # Who reads more leaves it to the other at first.
        ([OF_MANY] * 6, [[], [], [3], [], [], [3]]),
        # Those of no name, who will do nothing, read as well.
        ([_group(broker=[0], unnamed1=[1, 2], unnamed2=[3])] * 3, [[], [], []]),
        ([NOT_OURS] * 5, [[]] * 5),
        ([None], [[]]),
    ],
)
def test_partitions_that_nobody_reads_are_somebodys_to_mend(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    group: Sequence[object],
    unread: Sequence[list[int]],
) -> None:
    Admin.topic = iter([SimpleNamespace(topic_id="the topic's", partitions=range(4))])
    Admin.group = iter(group)
    monkeypatch.setattr(cluster, "AdminClient", Admin)
    seen = Cluster(settings.model_copy(update={"broker_id": "broker"}))
    seen.topic_id()
    assert [seen.unread(1) for _ in group] == unread


REFUSED = SimpleNamespace(
    id="penstock-tasks", error=KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED), state="", members=[]
)


@pytest.mark.parametrize("answer", [KafkaException(KafkaError(KafkaError._PARTIAL)), REFUSED])
def test_who_waits_for_a_server_that_has_left_is_not_asked_for_the_group_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    topic = SimpleNamespace(topic_id="the topic's", partitions=range(4))
    Admin.topic, Admin.group = iter([topic, None]), iter([answer, TWO_LEFT, TWO_LEFT])
    monkeypatch.setattr(cluster, "AdminClient", Admin)
    seen = Cluster(settings.model_copy(update={"broker_id": "broker"}))
    seen.topic_id()
    with pytest.raises(KafkaException):
        seen.unread(1)
    assert [seen.unread(1) for _ in range(2)] == [[], [2, 3]]
    assert next(Admin.topic, "both have been made") == "both have been made"


async def test_whoever_reads_least_joins_again_for_what_nobody_reads(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To subscribe once more alone would change nothing for Kafka."""
    unread = iter([[], [2, 3]])
    monkeypatch.setattr(Cluster, "unread", lambda self, seconds: next(unread))
    did: list[str] = []
    consumer = SimpleNamespace(
        subscribe=lambda topics, **callbacks: did.append("subscribe"),
        unsubscribe=lambda: did.append("unsubscribe"),
    )
    async with running_store(settings.db_path) as store:
        poller = KafkaConsumer(store, settings)._poller
        poller.connected = True
        poller._look_for_unread(consumer)  # type: ignore[arg-type]
        assert did == []
        poller._look_for_unread_at = 0
        poller._look_for_unread(consumer)  # type: ignore[arg-type]
        assert did == ["unsubscribe", "subscribe"]
