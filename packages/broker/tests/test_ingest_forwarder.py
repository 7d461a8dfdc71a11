"""Dead letters leave through the log with their story, or stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError, Producer
from ingest_helpers import MockKafka, kafka_settings, running_store, until
from store_helpers import ManualClock, activation, check_store
from structlog.testing import capture_logs

from penstock_broker.domain.activation import Activation, Reason, Route, Status, hash_id
from penstock_broker.ingest.admission import Admission, AdmissionLimits, position_id
from penstock_broker.ingest.dead_letters import Letter, forward_id, letter
from penstock_broker.ingest.forwarder import BATCH_BYTES_MAX, Forwarder, Lines
from penstock_broker.ingest.publisher import Publisher
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.partitions import Source

MIB = 1024 * 1024
# What the producer itself refuses: message_bytes_max and a MiB more.
REFUSED_BYTES = MIB + 1024


def dead(
    id: str = "id-1",
    body: bytes = b"original",
    *,
    source: int = 0,
    offset: int = -1,
    error: str | None = None,
) -> Activation:
    return Activation(
        id, "shop", "emails", "send", body, received_at=1_800_000_000_000, ready_at=1_800_000_060_500,
        attempts=3, lost=1, source=source, offset=offset, status=Status.FORWARDING,
        reason=Reason.ATTEMPTS_EXHAUSTED, error=error, size=len(body),
    )  # fmt: skip


def headers_of(headers: object) -> dict[str, str]:
    assert isinstance(headers, list)
    return {name: value.decode() for name, value in headers if isinstance(value, bytes)}


def test_a_dead_letter_carries_its_story() -> None:
    stack = "here\n" + "deep down\n" * 1_000 + "or here"
    error = json.dumps({"type": "builtins.ValueError", "message": "no such ü", "traceback": stack})
    row = dead(source=4, offset=17, error=error)
    made = letter(row, Source(4, "tasks", 2), "tasks-dlq")
    assert (made.topic, made.key, made.value) == ("tasks-dlq", "id-1", b"original")
    assert headers_of(made.headers) == {
        "penstock-reason": "attempts_exhausted",
        "penstock-forward-id": forward_id(row),
        "penstock-origin-topic": "tasks",
        "penstock-origin-partition": "2",
        "penstock-origin-offset": "17",
        "penstock-attempts": "3",
        "penstock-deliveries-lost": "1",
        "penstock-error-type": "builtins.ValueError",
        "penstock-error-message": "no such ü",
        "penstock-error-traceback": f"{stack[:2000]}\n...\n{stack[-2000:]}",
        "penstock-received-at": "2027-01-15T08:00:00.000Z",
        "penstock-dead-at": "2027-01-15T08:01:00.500Z",
    }


def test_only_headers_are_trimmed() -> None:
    made = letter(dead(error=json.dumps({"message": "x" * 5000})), None, "tasks-dlq", trimmed=True)
    assert made.value == b"original"
    assert sum(len(name) + len(str(value)) for name, value in made.headers) < 400
    known_by = {"penstock-reason", "penstock-forward-id", "penstock-dead-at"}
    assert known_by <= headers_of(made.headers).keys()


def test_a_forward_id_is_that_of_activation_attempt_and_reason() -> None:
    row, later, other = dead(), dead(), dead("id-2")
    later.attempts = 4
    assert forward_id(row) == forward_id(dead())
    assert len({forward_id(r) for r in (row, later, other)}) == 3


def test_poison_is_known_by_its_position() -> None:
    row = Admission(AdmissionLimits()).admit(b"{}", 0, 4, 17, "tasks", 2)
    assert (
        letter(row, Source(4, "tasks", 2), "tasks-dlq").key == forward_id(row) == position_id("tasks", 2, 17)
    )


async def test_many_dead_letters_are_few_lines_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_broker.ingest.forwarder.TELL_EVERY_SECONDS", 0.05)
    lines = Lines()
    with capture_logs() as logs:
        lines.add([dead("first")], "tasks-dlq")
        for n in range(1000):
            lines.add([dead(f"{n}"), dead(f"{n} too")], "tasks-dlq")
        assert [(line["count"], line["first"]) for line in logs] == [(1, "send first")]
        await until(lambda: len(logs) == 2)
        lines.add([dead("last")], "tasks-dlq")
        lines.stop()
    assert [line["count"] for line in logs] == [1, 2000, 1]
    assert logs[1]["first"] == "send 0"
    assert logs[1]["reasons"] == {Reason.ATTEMPTS_EXHAUSTED: 2000}


class Failures:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, topic: str, count: int) -> None:
        assert topic == "tasks-dlq"
        self.count += count


@contextlib.asynccontextmanager
async def forwarding(
    store: Inflight, publisher: Publisher | None
) -> AsyncIterator[tuple[Forwarder, Failures]]:
    failures = Failures()

    def compose(row: Activation, trimmed: bool) -> Letter:
        return letter(row, store.memory.partitions.get(row.source), "tasks-dlq", trimmed)

    forwarder = Forwarder(store, Route.DEAD_LETTER, publisher, compose, failures)
    forwarder.start()
    try:
        yield forwarder, failures
    finally:
        await forwarder.stop()
        if publisher is not None:
            await publisher.stop()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Inflight]:
    async with running_store(tmp_path / "store.sqlite", StoreLimits(dead_letters_rest_max=5)) as store:
        yield store


@pytest.fixture
def kafka() -> MockKafka:
    kafka = MockKafka()
    kafka.make_topic("tasks-dlq")
    return kafka


async def test_dead_letters_leave_once_acknowledged(
    kafka: MockKafka, store: Inflight, tmp_path: Path
) -> None:
    source = store.source("tasks", 2)
    store.cover(source, 8)
    row = dead("from-kafka", b"bytes as they came", source=source.id, offset=7)
    await store.insert([row, *(dead(f"{n}") for n in range(1000))])
    publisher = Publisher(kafka_settings(kafka, tmp_path))
    async with forwarding(store, publisher) as (_, failures):
        await store.insert([dead("last")])
        await until(lambda: store.memory.rows == 0)
        assert store.outbox.size() == 0
        assert store.imbalance() == 0
        assert failures.count == 0
    messages = {m.key(): m for m in kafka.read("tasks-dlq", 1002)}
    assert len(messages) == 1002
    message = messages[b"from-kafka"]
    assert message.value() == b"bytes as they came"
    headers = headers_of(message.headers())
    assert headers["penstock-origin-topic"] == "tasks"
    assert (headers["penstock-origin-partition"], headers["penstock-origin-offset"]) == ("2", "7")


async def test_what_kafka_refuses_as_too_large_is_trimmed_or_rests(
    kafka: MockKafka, store: Inflight, tmp_path: Path
) -> None:
    error = json.dumps({"type": "E", "message": "x" * 2000})
    fits_trimmed = dead("trimmed", b"x" * (REFUSED_BYTES - 1000), error=error)
    never_fits = dead("resting", b"x" * REFUSED_BYTES, error=error)
    await store.insert([dead("small"), fits_trimmed, never_fits])
    settings = kafka_settings(kafka, tmp_path, message_bytes_max=1024)
    async with forwarding(store, Publisher(settings)) as (forwarder, failures):
        await until(lambda: store.memory.rows == 0)
        assert store.outbox.resting == 1
        assert (failures.count, forwarder.alarm) == (0, "")
    messages = {m.key(): m for m in kafka.read("tasks-dlq", 2)}
    assert messages.keys() == {b"small", b"trimmed"}
    assert messages[b"trimmed"].value() == fits_trimmed.body
    assert "penstock-error-message" not in headers_of(messages[b"trimmed"].headers())


async def test_a_failed_publish_keeps_the_row_and_raises_an_alarm(
    kafka: MockKafka, store: Inflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_broker.ingest.forwarder.BACK_OFF_SECONDS_MIN", 0.05)
    monkeypatch.setattr("penstock_broker.ingest.publisher.DELIVERY_MS_MAX", 500)
    settings = kafka_settings(kafka, tmp_path, kafka_cluster="127.0.0.1:9")
    async with forwarding(store, Publisher(settings)) as (forwarder, failures):
        await store.insert([dead("patient")])
        await until(lambda: failures.count >= 2)
        assert forwarder.alarm
        assert store.outbox.size() == 1
    publisher = Publisher(kafka_settings(kafka, tmp_path))
    async with forwarding(store, publisher):
        await until(lambda: store.memory.rows == 0)
    (message,) = kafka.read("tasks-dlq", 1)
    assert headers_of(message.headers())["penstock-forward-id"] == forward_id(dead("patient"))


class Refusing:
    """A producer that takes nothing."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def produce(self, *message: object, **more: object) -> None:
        raise self._error

    def poll(self, seconds: float) -> None:
        time.sleep(0.01)

    def purge(self) -> None: ...


async def test_what_a_full_queue_does_not_take_is_not_safe(kafka: MockKafka, tmp_path: Path) -> None:
    publisher = Publisher(kafka_settings(kafka, tmp_path))
    publisher._producer = Refusing(BufferError())  # type: ignore[assignment]
    (error,) = await publisher.publish([Letter("tasks-dlq", "a", b"a", [])])
    assert error is not None
    await publisher.stop()


# As librdkafka 2.16 tells of a client that knows no server of Kafka any more.
NO_SERVERS = json.dumps({"brokers": {}})


@pytest.mark.parametrize("why", ["fatal", "lost"])
async def test_a_producer_that_cannot_go_on_is_followed_by_another(
    kafka: MockKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """And what it has not answered can be published again, long before its time is over."""
    configs: list[Any] = []

    def made(config: dict[str, object]) -> Producer:
        configs.append(config)
        # The first one reaches nobody.
        return Producer(config if len(configs) > 1 else config | {"bootstrap.servers": "127.0.0.1:1"})

    monkeypatch.setattr("penstock_broker.ingest.publisher.Producer", made)
    publisher = Publisher(kafka_settings(kafka, tmp_path))
    letters = [Letter("tasks-dlq", "a", b"a", [])]
    publishing = asyncio.create_task(publisher.publish(letters))
    await asyncio.sleep(0)
    if why == "fatal":
        configs[0]["error_cb"](KafkaError(KafkaError._FATAL, "out of order", fatal=True))
    else:
        for _ in range(3):
            assert not publishing.done()
            configs[0]["stats_cb"](NO_SERVERS)
    answered, _ = await asyncio.wait({publishing}, timeout=10)
    assert answered
    (error,) = publishing.result()
    assert error is not None
    assert await publisher.publish(letters) == [None]
    assert len(configs) == 2
    await publisher.stop()


async def test_without_kafka_dead_letters_rest_in_the_store_up_to_its_bound(store: Inflight) -> None:
    async with forwarding(store, None) as (forwarder, _):
        await store.insert([dead(f"{n}") for n in range(4)])
        await until(lambda: store.memory.rows == 0)
        assert (store.outbox.resting, forwarder.alarm) == (4, "")
        await store.insert([dead(f"more-{n}") for n in range(3)])
        await until(lambda: forwarder.alarm)
        assert "dead_letters_rest_max" in forwarder.alarm
        assert (store.outbox.resting, store.outbox.size()) == (5, 2)
        assert store.imbalance() == 0


async def test_what_no_place_takes_holds_up_nothing_behind_it(
    kafka: MockKafka, store: Inflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka refuses it as too large, and the store has no more room for such."""
    monkeypatch.setattr("penstock_broker.ingest.forwarder.BACK_OFF_SECONDS_MIN", 0.05)
    count = 2 * (5 + BATCH_BYTES_MAX // REFUSED_BYTES)
    too_large = [dead(f"large-{n}", b"x" * REFUSED_BYTES) for n in range(count)]
    settings = kafka_settings(kafka, tmp_path, message_bytes_max=1024)
    async with forwarding(store, Publisher(settings)) as (forwarder, _):
        await store.insert(too_large)
        await until(lambda: forwarder.alarm)
        assert store.outbox.resting == 5
        await store.insert([dead(f"small-{n}") for n in range(3)])
        await until(lambda: forwarder.forwarded == 3)
        assert "dead_letters_rest_max" in forwarder.alarm
        assert (store.outbox.resting, store.outbox.size()) == (5, count - 5)


async def test_nothing_leaves_before_it_is_covered(kafka: MockKafka, store: Inflight, tmp_path: Path) -> None:
    """Until then another broker may read it, too, and would send it, too."""
    source = store.source("tasks", 0)
    rows = [dead(f"offset-{n}", source=source.id, offset=n) for n in range(4)]
    await store.insert(rows, {source.id: 4})
    async with forwarding(store, Publisher(kafka_settings(kafka, tmp_path))) as (forwarder, _):
        await store.insert([dead("over gRPC")])
        await until(lambda: forwarder.forwarded == 1)
        store.cover(source, 2)
        await until(lambda: forwarder.forwarded == 3)
        assert await store.drop_uncovered(source, 2) == 2
        assert source.held_exits == []
        await store.insert([dead("later")])
        await until(lambda: forwarder.forwarded == 4)
        assert (store.memory.rows, store.imbalance()) == (0, 0)
    sent = {message.key() for message in kafka.read("tasks-dlq", 4)}
    assert sent == {b"over gRPC", b"offset-0", b"offset-1", b"later"}


async def test_what_must_not_start_twice_leaves_when_the_ledger_says_that_it_does(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restored from what it said before, it would start here, and where it went."""
    monkeypatch.setattr("penstock_broker.ingest.forwarder.BACK_OFF_SECONDS_MIN", 0.01)
    monkeypatch.setattr("penstock_broker.ingest.forwarder.RECORD_SECONDS_MAX", 0.01)
    sent: list[str] = []

    class Taking:
        async def publish(self, letters: list[Letter]) -> list[None]:
            sent.extend(letter.key or "" for letter in letters)
            return [None] * len(letters)

    recorded = asyncio.Event()
    store.recorded = recorded.wait  # type: ignore[assignment]
    source = store.source("tasks", 0)
    rows = [dead(id, source=source.id, offset=n) for n, id in enumerate(("once", "other"))]
    for row in rows:
        row.status, row.reason, row.at_most_once = Status.PENDING, None, row.id == "once"
    await store.insert(rows, {source.id: 2})
    store.cover(source, 2)
    forwarder = Forwarder(
        store,
        Route.HAND_OVER,
        Taking(),  # type: ignore[arg-type]
        lambda row, trimmed: Letter("tasks", row.id, b"", []),
        lambda topic, count: None,
    )
    forwarder.start()
    await store.hand_over(9, running=False)
    await until(lambda: sent)
    await asyncio.sleep(0.1)
    assert sent == ["other"]
    assert forwarder.alarm
    recorded.set()
    await until(lambda: store.memory.rows == 0)
    assert sent == ["other", "once"]
    await forwarder.stop()


@pytest.mark.parametrize(
    ("away_ms", "again"), [(1_000, {"once", "back", "other"}), (600_000, {"other"}), (-1_000, {"other"})]
)
async def test_what_may_have_left_long_ago_is_not_sent_again_to_start_twice(
    tmp_path: Path, away_ms: int, again: set[str]
) -> None:
    """Killed between produce and mark, and back when a copy is not known any more where it is read."""
    clock, sent = ManualClock(), list[str]()

    class Silent:
        async def publish(self, letters: list[Letter]) -> list[None]:
            sent.extend(letter.key for letter in letters)
            await asyncio.Event().wait()
            return []

    class Taking:
        async def publish(self, letters: list[Letter]) -> list[None]:
            sent.extend(letter.key for letter in letters)
            return [None] * len(letters)

    def handing_over(store: Inflight, publisher: object) -> Forwarder:
        forwarder = Forwarder(
            store,
            Route.HAND_OVER,
            publisher,  # type: ignore[arg-type]
            lambda row, trimmed: Letter("tasks", row.id, b"", []),
            lambda topic, count: None,
        )
        forwarder.start()
        return forwarder

    def task(id: str) -> Activation:
        return activation(id, clock, at_most_once=id != "other")

    async with running_store(tmp_path / "killed", clock=clock) as store:
        await store.insert([task(id) for id in ("once", "back", "other")])
        forwarder = handing_over(store, Silent())
        await store.hand_over(9, running=False)
        await until(lambda: len(sent) == 3)
        # Not sent yet: it is known that it has not started elsewhere.
        await store.insert([task("waits")])
        await store.hand_over(9, running=False)
        await forwarder.stop()
    sent.clear()
    clock.advance(away_ms)
    async with running_store(tmp_path / "killed", clock=clock) as store:
        source = store.source("tasks", 0)
        came_back = activation("back", clock, at_most_once=True, source=source.id, offset=0)
        came_back.sent_on = hash_id("forward id of back")
        await store.insert([came_back], {source.id: 1})
        forwarder = handing_over(store, Taking())
        await until(lambda: not store.outbox.waits(Route.HAND_OVER) and len(sent) > len(again))
        await forwarder.stop()
        assert set(sent) == {*again, "waits"}
        letters = await store.outbox.take(Route.DEAD_LETTER, 9, 1 << 20)
        lost = [] if "once" in again else [("once", Reason.START_UNKNOWN)]
        assert [(row.id, row.reason) for row in letters] == lost
        store.outbox.give_back(Route.DEAD_LETTER, letters)
        await store.committed()
        check_store(store)


class TooLarge:
    """A publisher of what is not large."""

    def __init__(self) -> None:
        self.takes_large = False

    async def publish(self, letters: list[Letter]) -> list[KafkaError | None]:
        too_large = KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)
        return [too_large if not self.takes_large and letter.key[0] == "l" else None for letter in letters]


@contextlib.asynccontextmanager
async def full(store: Inflight) -> AsyncIterator[tuple[Forwarder, Any]]:
    """Of "large-0" to "large-7" three found no room in the store."""
    publisher: Any = TooLarge()
    forwarder = Forwarder(
        store,
        Route.DEAD_LETTER,
        publisher,
        lambda row, trimmed: letter(row, None, "tasks-dlq", trimmed),
        lambda topic, count: None,
    )
    await store.insert([dead(f"large-{n}") for n in range(8)])
    await forwarder._forward(await store.outbox.take(Route.DEAD_LETTER, 9, MIB), publisher)
    assert (store.outbox.resting, store.outbox.size()) == (5, 3)
    assert "dead_letters_rest_max" in forwarder.alarm
    yield forwarder, publisher
    forwarder._lines.stop()


async def test_the_alarm_of_a_full_store_lasts_whatever_else_leaves(store: Inflight) -> None:
    async with full(store) as (forwarder, publisher):
        await forwarder._forward([dead("small")], publisher)
        assert "dead_letters_rest_max" in forwarder.alarm


async def test_the_alarm_of_a_full_store_ends_when_what_found_no_room_has_left(store: Inflight) -> None:
    """Kafka takes larger ones now; the store's own stay."""
    async with full(store) as (forwarder, publisher):
        publisher.takes_large = True
        for waiting in (2, 1, 0):
            assert "dead_letters_rest_max" in forwarder.alarm
            await forwarder._forward(await store.outbox.take(Route.DEAD_LETTER, 1, MIB), publisher)
            assert store.outbox.size() == waiting
        assert (store.outbox.resting, forwarder.alarm) == (5, "")
