"""P12: tasks that take 0 to 100 ms, beside three other systems."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from benchmarks.harness import Bench, Case, Claim, Figure, Figures, percentile
from benchmarks.marks import milliseconds
from benchmarks.systems import (
    CHILDREN,
    PRODUCERS,
    Running,
    celery,
    dramatiq,
    penstock,
    taskiq,
)

LENGTHS_MS = (0, 0.1, 1, 10, 100)
# The paced half: not above half of what two slots can do, nor above what every system can.
RATE_MAX = 100.0


def sweep(
    bench: Bench,
    start: Callable[[Bench], AbstractContextManager[Running]],
    length_ms: float,
    tasks_max: int,
    seconds: float,
) -> Figures:
    """As fast as it goes, then paced: throughput of the first half, latency of the second."""
    work = length_ms / 1000
    ideal = CHILDREN / work if work else float("inf")
    tasks = int(min(tasks_max, ideal * seconds)) // PRODUCERS * PRODUCERS
    rate = min(RATE_MAX, ideal / 2)
    paced = int(rate * seconds)
    with start(bench) as system:
        meter = system.meter()
        producers = [system.producer(tasks // PRODUCERS, "--work", work) for _ in range(PRODUCERS)]
        sent = [producer.go() for producer in producers]
        first = min(producer.result()["first"] for producer in sent)
        throughput = tasks / (system.finish() - first)
        system.producer(paced, "--work", work, "--rate", rate).go().result()
        system.finish()
        latencies = [ms for ms in milliseconds(system.marks) if ms]
        return {
            "tasks_per_second": throughput,
            "p50_ms": percentile(latencies, 0.5),
            "p95_ms": percentile(latencies, 0.95),
            "p99_ms": percentile(latencies, 0.99),
            "rss_mb": sum(mb for name, mb in meter.rss_mb().items() if name != "kafka_rss_mb"),
        }


def cases(bench: Bench) -> list[Case]:
    systems: dict[str, tuple[Callable[[Bench], AbstractContextManager[Running]], int]] = {
        "Penstock": (penstock, 40_000),
        # As many tasks at a time as there are children: one in each.
        "Celery": (celery().running, 4_000),
        "Dramatiq": (dramatiq(threads=1).running, 8_000),
        "Taskiq, stream": (taskiq("stream", together=1).running, 16_000),
    }
    lengths = (0, 1, 10) if bench.short else LENGTHS_MS
    return [
        Case(
            name,
            f"{length:g} ms",
            partial(
                sweep,
                start=start,
                length_ms=length,
                tasks_max=tasks // bench.size(4, 1),
                seconds=bench.size(2, 5),
            ),
        )
        for length in lengths
        for name, (start, tasks) in systems.items()
    ]


CLAIM = Claim(
    name="P12",
    title="Tasks of 0 to 100 ms",
    how="Each task waits for its time (a sleep, as of one that waits for a database); two at a time in"
    " every system."
    " Throughput: all sent at once. Latency: paced, at half of what two slots can do and at most"
    f" {RATE_MAX:g} a second, from the call to the first line of the function.",
    figures=(
        Figure("tasks_per_second", "tasks/s", more_is_better=True, plotted=True, compared=True, digits=0),
        Figure("p50_ms", "p50, ms", compared=True),
        Figure("p95_ms", "p95, ms"),
        Figure("p99_ms", "p99, ms", plotted=True, compared=True),
        Figure("rss_mb", "memory of server and worker, MB", compared=True, digits=0),
    ),
    cases=cases,
    pitfalls=(
        (
            "Two at a time everywhere, so that the systems can be compared. For tasks that only wait,"
            " Taskiq's"
            " coroutines and Dramatiq's threads run many more in one process than Penstock, which gives each"
            " task a process."
        ),
        "The memory of Kafka (some 350 MB) is not in the figure; that of Redis is.",
        "The paced half has few tasks at 100 ms: its p99 is nearly its longest.",
    ),
    seconds=(180, 1800),
    repeat=(1, 5),
    logarithmic=True,
)
