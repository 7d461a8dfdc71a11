"""P5: how long it takes, on an idle system, from `delay()` to the first line of the function."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

from benchmarks.harness import (
    Bench,
    Case,
    Claim,
    Elsewhere,
    Figure,
    Figures,
    Target,
    in_a_quiet_hour,
    percentile,
)
from benchmarks.marks import milliseconds
from benchmarks.processes import new_topic
from benchmarks.systems import penstock

TASKS_PER_SECOND = 20
SLEEP_SECONDS = 0.005
ALONE = "Kafka alone"


def idle(bench: Bench, tasks: int) -> Figures:
    with penstock(bench) as system:
        meter = system.meter()
        with sleeping() as late:
            system.producer(tasks, "--rate", TASKS_PER_SECOND).go().result()
            system.finish()
        latencies = [ms for ms in milliseconds(system.marks) if ms]
        cpu = meter.cpu_seconds()
        return {
            **_percentiles(latencies),
            **{f"{name}_cpu_ms": seconds / tasks * 1000 for name, seconds in cpu.items()},
            "sleep_p99_ms": percentile(late, 0.99),
            "sleep_max_ms": max(late),
            "tick_max_ms": system.longest_tick_ms(),
        }


@contextlib.contextmanager
def sleeping() -> Iterator[list[float]]:
    """How late somebody wakes up meanwhile who only sleeps, in ms: what the machine adds to every step."""
    late: list[float] = []
    stop = threading.Event()

    def sleep() -> None:
        while not stop.is_set():
            until = time.monotonic() + SLEEP_SECONDS
            time.sleep(SLEEP_SECONDS)
            late.append((time.monotonic() - until) * 1000)

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    try:
        yield late
    finally:
        stop.set()
        sleeper.join()


def kafka_alone(bench: Bench, tasks: int) -> Figures:
    """What no broker could be faster than: a producer that sends at once, as the client does with what is
    alone, and a consumer that polls."""
    topic = new_topic(bench.kafka, 1)
    kafka = {"bootstrap.servers": bench.kafka}
    consumer = Consumer(kafka | {"group.id": topic})
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    producer = Producer(kafka | {"enable.idempotence": True, "acks": "all", "linger.ms": 0})
    latencies: list[float] = []

    def send() -> None:
        first = time.time()
        for n in range(tasks):
            time.sleep(max(0.0, first + n / TASKS_PER_SECOND - time.time()))
            producer.produce(topic, struct.pack("d", time.time()))
            producer.poll(0)
        producer.flush(30)

    # Both are connected before it counts.
    producer.produce(topic, b"")
    if producer.flush(30) or consumer.poll(30) is None:
        raise SystemExit("nothing comes through Kafka")
    sending = threading.Thread(target=send)
    sending.start()
    while len(latencies) < tasks:
        message = consumer.poll(10)
        if message is None or message.error():
            raise SystemExit(f"{len(latencies)} of {tasks} messages came through Kafka")
        (sent_at,) = struct.unpack("d", message.value() or b"")
        latencies.append((time.time() - sent_at) * 1000)
    sending.join()
    consumer.close()
    return _percentiles(latencies)


def _percentiles(latencies: Sequence[float]) -> Figures:
    return {
        "p50_ms": percentile(latencies, 0.5),
        "p95_ms": percentile(latencies, 0.95),
        "p99_ms": percentile(latencies, 0.99),
        "max_ms": max(latencies),
    }


WHY = (
    f'"{ALONE}" is the largest part of it. The rest, in a copy that says when each stage is reached: 0.5 ms '
    "from the consumer's poll to the transaction, 0.7 for that (durable before it is handed out), 0.24 "
    "until it is claimed, 0.8 for the answer over gRPC, 0.5 through the pipe to the child. And "
    + in_a_quiet_hour("3.0 ms, and Kafka alone 0.8 ms,")
)
WHY_LONGEST = in_a_quiet_hour("6.9 ms, and Kafka alone 1.3 ms,")

CLAIM = Claim(
    name="P5",
    title="Idle latency: from `delay()` to the first line of the function",
    how=f"Everything is idle; one task every {1000 // TASKS_PER_SECOND} ms goes through Kafka, broker,"
    f" worker and"
    " child, with the producer's settings of P4.",
    figures=(
        Figure("p50_ms", "p50, ms", plotted=True),
        Figure("p95_ms", "p95, ms"),
        Figure("p99_ms", "p99, ms", plotted=True),
        Figure("max_ms", "longest, ms"),
        Figure("sleep_p99_ms", "a sleeper wakes up late, p99, ms"),
        Figure("sleep_max_ms", "the same, longest, ms"),
        Figure("tick_max_ms", "a transaction, at most, ms"),
        Figure("server_cpu_ms", "broker CPU, ms a task", digits=2),
        Figure("worker_cpu_ms", "worker's parent CPU, ms a task", digits=2),
        Figure("kafka_cpu_ms", "Kafka CPU, ms a task", digits=2),
    ),
    cases=lambda bench: [
        Case("Penstock", "", partial(idle, tasks=bench.size(200, 1_000))),
        Case(ALONE, "", partial(kafka_alone, tasks=bench.size(200, 1_000))),
    ],
    targets=(
        Target("p50 in ms", "Penstock", "p50_ms", at_most=5, why=WHY),
        Target("p99 in ms", "Penstock", "p99_ms", at_most=20, why=WHY_LONGEST),
    ),
    elsewhere=(
        Elsewhere("Rust taskbroker, until claimable", "", "p50_ms", 750),
        Elsewhere("River on PostgreSQL", "", "p50_ms", 51),
    ),
    pitfalls=(
        (
            "The longest of a run on a machine that does other things too says more about them; in the short"
            " form two of 200 tasks are above the p99."
        ),
        (
            f'"{ALONE}" is a producer that sends at once and a consumer that polls, nothing else: what'
            " this Kafka on this machine takes for itself. The rest is Penstock's: a synced transaction,"
            " a gRPC answer, a pipe to the child."
        ),
    ),
    seconds=(40, 360),
    logarithmic=True,
)
