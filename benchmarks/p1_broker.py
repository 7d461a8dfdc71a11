"""P1: one broker, a backlog in a real Kafka, stored, claimed and completed in batches.

``python -m benchmarks.p1_broker [--tasks N] [--body BYTES] [--partitions N] [--repeat N]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks.harness import broker, save, spread
from penstock_protocol.v1 import activation_pb2
from tests.kafka_server import kafka_server


def produce(kafka: str, topic: str, tasks: int, body: int) -> None:
    """Fill ``topic`` with no-op activations of about ``body`` bytes."""
    producer = Producer(
        {"bootstrap.servers": kafka, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000}
    )
    activation = activation_pb2.TaskActivation(
        namespace="bench", application="bench", taskname="bench.noop", processing_deadline_duration=30
    )
    activation.retry_state.on_attempts_exceeded = activation_pb2.ON_ATTEMPTS_EXCEEDED_DEADLETTER
    activation.received_at.FromSeconds(int(time.time()))
    activation.id = uuid.uuid4().hex
    activation.parameters_bytes = os.urandom(max(0, body - activation.ByteSize() - 4))
    for n in range(tasks):
        activation.id = uuid.uuid4().hex
        producer.produce(topic, activation.SerializeToString())
        if n % 10_000 == 0:
            producer.poll(0)
    producer.flush()


def once(kafka: str, tasks: int, body: int, partitions: int, batch: int, generators: int) -> dict[str, float]:
    """One run on a fresh topic and a fresh database."""
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic(topic, partitions, 1)])[topic].result(30)
    produce(kafka, topic, tasks, body)
    settings = {"KAFKA_CLUSTER": kafka, "KAFKA_TOPIC": topic, "CREATE_MISSING_TOPICS": "1"}
    with contextlib.ExitStack() as stack:
        started = time.time()
        server = stack.enter_context(broker(settings))
        idle = server.cpu_seconds()
        load = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load", server.address, str(batch), "4"],
                stdout=subprocess.PIPE, text=True,
            )
            for _ in range(generators)
        ]  # fmt: skip
        results = [json.loads(process.communicate()[0]) for process in load]
        cpu = server.cpu_seconds() - idle
        done = sum(result["done"] for result in results)
        if done != tasks:
            raise SystemExit(f"{done} of {tasks} tasks were completed")
        seconds = max(r["last"] for r in results) - min(r["first"] for r in results)
        return {
            "tasks_per_second": done / seconds,
            "from_start_seconds": max(r["last"] for r in results) - started,
            "broker_cpu_us_per_task": cpu / done * 1e6,
            "generator_cpu_us_per_task": sum(r["cpu"] for r in results) / done * 1e6,
            "broker_rss_mb": server.rss_bytes() / 2**20,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--body", type=int, default=300)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--generators", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    shape = (options.tasks, options.body, options.partitions, options.batch, options.generators)
    with kafka_server() as kafka:
        once(kafka.address, *shape)  # warm-up
        runs = []
        for n in range(options.repeat):
            runs.append(once(kafka.address, *shape))
            figures = "  ".join(f"{name} {value:,.1f}" for name, value in runs[-1].items())
            print(f"run {n + 1} of {options.repeat}: {figures}", flush=True)
    summary = {name: spread([run[name] for run in runs]) for name in runs[0]}
    for name, values in summary.items():
        print(f"{name:28} {values['median']:12,.1f}   ({values['min']:,.1f} to {values['max']:,.1f})")
    path = save("p1-broker", {"shape": vars(options), "summary": summary, "runs": runs})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
