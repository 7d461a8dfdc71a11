"""Clients of taskbroker v1, and messages that no client of ours would send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka import Producer

from penstock_protocol.v1 import activation_pb2 as pb
from tests.e2e.harness import Pool, eventually


def v1_messages(pool: Pool) -> int:
    """Messages as a producer of taskbroker v1 sends them. How many."""
    producer = Producer({"bootstrap.servers": pool.kafka or ""})
    names = ["noop"] * 200 + ["retry_once"] * 20 + ["fail"] * 5
    for n, name in enumerate(names):
        message = pb.TaskActivation(
            id=f"v1-{n}",
            application="v1",
            namespace="ns",
            taskname=name,
            parameters='{"args": [], "kwargs": {}}',
            processing_deadline_duration=10,
            retry_state=pb.RetryState(max_attempts=1),
        )
        message.received_at.GetCurrentTime()
        producer.produce(pool.topic, message.SerializeToString())
    assert producer.flush(10) == 0
    return len(names)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("secret", ["", "a secret"])
def test_the_published_stubs_of_taskbroker_v1_work(kafka_pool: Pool, secret: str) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker(GRPC_SHARED_SECRET=json.dumps(["an older one", secret]) if secret else "")
    tasks = v1_messages(kafka_pool)
    python = os.environ.get("PENSTOCK_FOREIGN_PYTHON", sys.executable)
    client = subprocess.run(
        [python, str(Path(__file__).with_name("foreign_client.py")), broker.address, str(tasks), secret],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert client.returncode == 0, client.stderr
    saw = json.loads(client.stdout)
    assert saw["completed"] == tasks
    assert (saw["most"], saw["retried"]) == (1, 20)
    expected = {
        "namespace only": "NOT_FOUND",
        "another application": "NOT_FOUND",
        "status pending": "INVALID_ARGUMENT",
    }
    assert saw["refused"] == expected | ({"unsigned": "UNAUTHENTICATED"} if secret else {})
    kafka_pool.await_empty(broker)
    finished = {k: v for k, v in broker.metrics().items() if k.startswith("penstock_tasks_finished_total")}
    assert {k.split("outcome=")[1].rstrip("}"): v for k, v in finished.items()} == {
        "done": 220,
        "discarded:failed": 5,
    }


def good(**changed: object) -> pb.TaskActivation:
    message = pb.TaskActivation(id="", application="e2e", namespace="main", taskname="noop")
    message.received_at.GetCurrentTime()
    for name, value in changed.items():
        setattr(message, name, value)
    return message


def poison() -> dict[str, bytes]:
    """Thirty messages that are no usable activation."""
    whole = good(id="whole", parameters_bytes=b"x" * 50).SerializeToString()
    broken = {f"cut at {n}": whole[:n] for n in (1, 3, 5, 10, 17, len(whole) - 1)}
    random = {
        f"random {seed}": bytes((seed * 37 + n * n * 11) % 251 | 0x80 for n in range(seed * 7 + 3))
        for seed in range(1, 9)
    }
    return {
        "empty": b"",
        "text": b"this is no protobuf, it is a sentence",
        "json": b'{"id": "1", "taskname": "noop"}',
        "xml": b"<task/>",
        "zeros": bytes(64),
        "ones": b"\xff" * 64,
        "endless varint": b"\x80" * 40,
        "length beyond the end": b"\x0a\xff\xff\xff\xff\x07abc",
        "group never ended": b"\x0b\x08\x01",
        "bad UTF-8 in the id": b"\x0a\x04\xff\xfe\xfd\xfc" + good().SerializeToString(),
        "bad UTF-8 in the taskname": good(id="u").SerializeToString() + b"\x1a\x02\xc3\x28",
        "no id": good().SerializeToString(),
        "no taskname": good(id="nameless", taskname="").SerializeToString(),
        "an id of 100,000 characters": good(id="i" * 100_000).SerializeToString(),
        "a taskname of 100,000 characters": good(id="t", taskname="n" * 100_000).SerializeToString(),
        "a namespace of 100,000 characters": good(id="n", namespace="n" * 100_000).SerializeToString(),
        **broken,
        **random,
    }


@pytest.mark.timeout(90)
def test_poison_between_good_messages_goes_to_the_dead_letters(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(1)
    broker = kafka_pool.broker()
    kafka_pool.worker([broker], slots=2)
    producer = Producer({"bootstrap.servers": kafka_pool.kafka or ""})
    kinds = poison()
    assert len(kinds) == 30
    ids = []
    for n, value in enumerate(kinds.values()):
        producer.produce(kafka_pool.topic, value)
        ids.append(f"good-{n}")
        producer.produce(kafka_pool.topic, good(id=ids[-1]).SerializeToString())
    # Strange, but usable: an unknown enum value, huge durations, clocks that are wrong by years.
    odd = good(id="unknown enum")
    odd.retry_state.on_attempts_exceeded = 77  # type: ignore[assignment]
    huge = good(id="huge durations", expires=2**64 - 1, processing_deadline_duration=2**64 - 1)
    future, past = good(id="from the future"), good(id="from the past", expires=3600)
    future.received_at.FromSeconds(4_000_000_000)
    past.received_at.FromSeconds(1)
    nowhere = good(id="no clock at all")
    nowhere.ClearField("received_at")
    bare = pb.TaskActivation(id="next to nothing", application="e2e", namespace="main", taskname="noop")
    for message in (odd, huge, future, past, nowhere, bare):
        ids.append(message.id.replace(" ", "_"))
        message.id = ids[-1]
        producer.produce(kafka_pool.topic, message.SerializeToString())
    assert producer.flush(10) == 0
    assert set(kafka_pool.await_all(ids).values()) == {1}
    letters = kafka_pool.dead_letters(len(kinds))
    kafka_pool.await_empty(broker)
    # The value is the original, to the byte; the headers say what is wrong and where it came from.
    assert sorted(letter.value for letter in letters) == sorted(kinds.values())
    for letter in letters:
        assert letter.headers["penstock-reason"] in ("not_an_activation", "invalid"), letter
        assert letter.headers["penstock-error-message"]
        assert letter.headers["penstock-origin-topic"] == kafka_pool.topic
    offsets = sorted(int(letter.headers["penstock-origin-offset"]) for letter in letters)
    assert offsets == list(range(0, 60, 2))
    eventually("it is still well", broker.is_serving)
