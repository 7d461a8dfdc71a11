"""P5: how long it takes, on an idle system, from `delay()` to the first line of the function."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Bench, Case, Claim, Elsewhere, Figure, Figures, Target, percentile
from benchmarks.marks import milliseconds
from benchmarks.systems import penstock

TASKS_PER_SECOND = 20


def idle(bench: Bench, tasks: int) -> Figures:
    with penstock(bench) as system:
        meter = system.meter()
        system.producer(tasks, "--rate", TASKS_PER_SECOND).go().result()
        system.finish()
        latencies = [ms for ms in milliseconds(system.marks) if ms]
        cpu = meter.cpu_seconds()
        return {
            "p50_ms": percentile(latencies, 0.5),
            "p95_ms": percentile(latencies, 0.95),
            "p99_ms": percentile(latencies, 0.99),
            "max_ms": max(latencies),
            **{f"{name}_cpu_ms": seconds / tasks * 1000 for name, seconds in cpu.items()},
        }


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
        Figure("server_cpu_ms", "broker CPU, ms a task", digits=2),
        Figure("worker_cpu_ms", "worker's parent CPU, ms a task", digits=2),
        Figure("kafka_cpu_ms", "Kafka CPU, ms a task", digits=2),
    ),
    cases=lambda bench: [Case("Penstock", "", partial(idle, tasks=bench.size(200, 1_000)))],
    targets=(
        Target("p50 in ms", "Penstock", "p50_ms", at_most=5),
        Target("p99 in ms", "Penstock", "p99_ms", at_most=20),
    ),
    elsewhere=(
        Elsewhere("Rust taskbroker, until claimable", "", "p50_ms", 750),
        Elsewhere("River on PostgreSQL", "", "p50_ms", 51),
    ),
    pitfalls=("The longest of a run on a machine that does other things too says more about them.",),
    seconds=(40, 360),
    logarithmic=True,
)
