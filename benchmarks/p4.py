"""P4: `delay()` from one process and one thread, until Kafka has acknowledged all of it."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Bench, Case, Claim, Elsewhere, Figure, Figures, Target, in_a_quiet_hour
from benchmarks.processes import Meter, Script, new_topic


def enqueue(bench: Bench, tasks: int) -> Figures:
    sending = {"PENSTOCK_KAFKA": bench.kafka, "PENSTOCK_TOPIC": new_topic(bench.kafka, 4)}
    producer = Script("benchmarks.send", tasks, environment=sending).ready()
    meter = Meter(kafka=bench.kafka_pid)
    result = producer.go().result()
    return {
        "tasks_per_second": tasks / (result["last"] - result["first"]),
        "producer_cpu_us": result["cpu"] / tasks * 1e6,
        **meter.cpu_us(tasks),
    }


RATE = "tasks_per_second"

CLAIM = Claim(
    name="P4",
    title="Sending: acknowledged calls of `delay()` from one thread",
    how="One process calls `delay(n)` in a loop and then waits until Kafka has acknowledged the last. The"
    " typed call,"
    " its encoding and a future for each are in it; the settings are the defaults (idempotent, acks=all,"
    " linger 1 ms).",
    figures=(
        Figure(RATE, "acknowledged calls/s", more_is_better=True, plotted=True, digits=0),
        Figure("producer_cpu_us", "producer CPU, µs a call"),
        Figure("kafka_cpu_us", "Kafka CPU, µs a call"),
    ),
    cases=lambda bench: [Case("Penstock", "", partial(enqueue, tasks=bench.size(60_000, 300_000)))],
    targets=(
        Target("acknowledged calls/s", "Penstock", RATE, at_least=40_000, why=in_a_quiet_hour("107,865")),
    ),
    elsewhere=tuple(
        Elsewhere(name, "", RATE, rate)
        for name, rate in {
            "taskbroker-client": 23_900,
            "Huey": 8_300,
            "Dramatiq": 5_100,
            "Taskiq": 3_200,
            "Celery": 1_900,
        }.items()
    ),
    pitfalls=(
        "Kafka shares the two cores with the producer.",
        "The others' figures are for their own transport, mostly Redis.",
    ),
    seconds=(20, 90),
)
