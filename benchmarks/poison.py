"""What poison costs those who send none: ``python -m benchmarks.poison [--rate N] [--seconds N]``.

Good tasks arrive at half of what P1 reaches on this machine, once alone and once with half as many messages
between them that are no activations. Printed: how fast the good ones were completed, and how fast the poison
became dead letters. Then a backlog of nothing but poison: how fast it becomes dead letters.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from itertools import chain

from confluent_kafka import Producer

from benchmarks.fill import activations
from benchmarks.harness import Bench, session
from benchmarks.processes import Meter, Script, broker, kafka_settings, new_topic, wait_until

BACKLOG = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=10_000, help="good tasks a second")
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with session(short=True) as bench:
        for _ in range(options.rounds):
            alone = run(bench, options.rate, options.seconds, poisoned=False)
            mixed = run(bench, options.rate, options.seconds, poisoned=True)
            sys.stdout.write(
                f"good tasks: {alone['good']:,.0f} a second alone, {mixed['good']:,.0f} with poison"
                f" ({mixed['good'] / alone['good']:.2f}); dead letters: {mixed['poison']:,.0f} a second;"
                f" broker CPU a good task: {alone['cpu']:.0f} and {mixed['cpu']:.0f} µs\n"
            )
            sys.stdout.write(f"poison alone: {backlog(bench, BACKLOG):,.0f} dead letters a second\n")


def run(bench: Bench, rate: int, seconds: int, *, poisoned: bool) -> dict[str, float]:
    topic, tasks = new_topic(bench.kafka, 4), rate * seconds
    folder = bench.folder / f"poison-{uuid.uuid4().hex[:8]}"
    with broker(folder, kafka_settings(bench.kafka, topic)) as server:
        load = Script("benchmarks.load", server.address, "--limit", tasks).ready()
        meter, begun = Meter(broker=server.process), time.time()
        poisonous = produce(bench.kafka, topic, rate, tasks, poisoned=poisoned)
        result = load.result()
        cpu = meter.cpu_us(tasks)["broker_cpu_us"]
        wait_until("all poison has left", lambda: server.count("penstock_dead_letters_total") >= poisonous)
        left = time.time()
    return {
        "good": tasks / (result["last"] - result["first"]),
        "poison": poisonous / (left - begun),
        "cpu": cpu,
    }


def backlog(bench: Bench, messages: int) -> float:
    """Dead letters a second, from a backlog that was there before the broker."""
    topic = new_topic(bench.kafka, 4)
    producer = Producer({"bootstrap.servers": bench.kafka, "queue.buffering.max.messages": messages})
    for _ in range(messages):
        producer.produce(topic, poison())
    if left := producer.flush(60):
        raise SystemExit(f"Kafka did not acknowledge {left} messages")
    folder = bench.folder / f"poison-{uuid.uuid4().hex[:8]}"
    with broker(folder, kafka_settings(bench.kafka, topic)) as server:

        def letters() -> float:
            return server.count("penstock_dead_letters_total")

        wait_until("the first poison has left", lambda: letters() > messages / 10)
        before, begun = letters(), time.time()
        wait_until("all poison has left", lambda: letters() >= messages)
        return (messages - before) / (time.time() - begun)


def poison() -> bytes:
    return b"\xff" + os.urandom(100)


def produce(kafka: str, topic: str, rate: int, tasks: int, *, poisoned: bool) -> int:
    """How many of the messages were poison."""
    producer = Producer(
        {"bootstrap.servers": kafka, "linger.ms": 5, "queue.buffering.max.messages": 1_000_000}
    )
    poisonous, begun = 0, time.time()
    for n, value in enumerate(activations(tasks, 300)):
        extra = [poison()] if poisoned and n % 2 else []
        for message in chain([value], extra):
            producer.produce(topic, message)
        poisonous += len(extra)
        if n % 100 == 0:
            producer.poll(0)
            time.sleep(max(0.0, begun + n / rate - time.time()))
    if left := producer.flush(60):
        raise SystemExit(f"Kafka did not acknowledge {left} messages")
    return poisonous


if __name__ == "__main__":
    main()
