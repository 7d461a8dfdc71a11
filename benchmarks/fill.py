"""Tasks in Kafka, as fast as librdkafka takes them, for claims that are about what comes after."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator

from confluent_kafka import Producer

from penstock_protocol.v1 import activation_pb2


def activations(tasks: int, body: int, application: str = "bench") -> Iterator[bytes]:
    """No-op activations of about ``body`` bytes each."""
    activation = activation_pb2.TaskActivation(
        namespace="bench", application=application, taskname="bench.noop", processing_deadline_duration=30
    )
    activation.retry_state.on_attempts_exceeded = activation_pb2.ON_ATTEMPTS_EXCEEDED_DEADLETTER
    activation.received_at.FromSeconds(int(time.time()))
    activation.id = uuid.uuid4().hex
    activation.parameters_bytes = os.urandom(max(0, body - activation.ByteSize() - 4))
    for _ in range(tasks):
        activation.id = uuid.uuid4().hex
        yield activation.SerializeToString()


def fill(kafka: str, topic: str, tasks: int, body: int, application: str = "bench") -> None:
    """No-op activations of about ``body`` bytes each, acknowledged when this returns."""
    producer = Producer(
        {
            "bootstrap.servers": kafka,
            "linger.ms": 20,
            "queue.buffering.max.messages": 1_000_000,
            "message.max.bytes": 2 << 20,
        }
    )
    for n, value in enumerate(activations(tasks, body, application)):
        while True:
            try:
                producer.produce(topic, value)
                break
            except BufferError:
                producer.poll(0.05)
        if n % 10_000 == 0:
            producer.poll(0)
    if left := producer.flush(120):
        raise SystemExit(f"Kafka did not acknowledge {left} of {tasks} tasks")
