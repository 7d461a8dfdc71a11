"""P8: the same throughput with 4, 100 and 500 workers; and what 500 idle ones cost."""

from __future__ import annotations

import shutil
import time
import uuid
from functools import partial

from benchmarks.fill import fill
from benchmarks.harness import Bench, Case, Claim, Figure, Figures, Target
from benchmarks.processes import Meter, Script, broker, kafka_settings, new_topic, standing_still, wait_until

# What a worker of ours waits for in one call.
LONG_POLL_MS = 10_000
IDLE_WORKERS = 500


def busy(bench: Bench, workers: int, tasks: int) -> Figures:
    topic = new_topic(bench.kafka, 4)
    folder = bench.folder / f"p8-{uuid.uuid4().hex[:8]}"
    with broker(folder, kafka_settings(bench.kafka, topic)) as server:
        load = Script("benchmarks.load", server.address, "--workers", workers, "--connections").ready()
        wait_until("all workers wait", lambda: server.count("penstock_waiting_requests") >= workers * 0.9)
        with standing_still(server.process):
            fill(bench.kafka, topic, tasks, 300)
            meter = Meter(broker=server.process)
        result = load.result()
        if result["done"] != tasks:
            raise SystemExit(f"{result['done']} of {tasks} tasks were completed")
        figures = {
            "tasks_per_second": tasks / (result["last"] - result["first"]),
            **meter.cpu_us(tasks),
            "generator_cpu_us": result["cpu"] / tasks * 1e6,
        }
    shutil.rmtree(folder)
    return figures


def idle(bench: Bench, seconds: int) -> Figures:
    """Long polls that nobody answers, until each ends and is made again."""
    folder = bench.folder / f"p8-{uuid.uuid4().hex[:8]}"
    with broker(folder, kafka_settings(bench.kafka, new_topic(bench.kafka, 4))) as server:
        workers = ("--workers", IDLE_WORKERS, "--connections", "--wait-ms", LONG_POLL_MS)
        load = Script("benchmarks.load", server.address, *workers).ready()
        try:
            wait_until(
                "all workers wait", lambda: server.count("penstock_waiting_requests") >= IDLE_WORKERS * 0.9
            )
            meter, begun = Meter(broker=server.process), time.monotonic()
            time.sleep(seconds)
            cpu = meter.cpu_seconds()["broker"] / (time.monotonic() - begun)
            return {"core_percent": cpu * 100, **meter.rss_mb()}
        finally:
            load.stop()


def cases(bench: Bench) -> list[Case]:
    tasks = bench.size(40_000, 150_000)
    return [
        *(
            Case("at work", f"{workers} workers", partial(busy, workers=workers, tasks=tasks))
            for workers in (4, 100, 500)
        ),
        Case("idle", f"{IDLE_WORKERS} workers", partial(idle, seconds=bench.size(10, 30))),
    ]


RATE = "tasks_per_second"

CONNECTIONS = (
    "on the same two cores the load generator's 500 connections take four times the CPU a task that four of"
    " them take."
)

CLAIM = Claim(
    name="P8",
    title="Many workers on one broker",
    how="As P1, with each worker on a connection of its own, claiming 64 tasks at a time. Idle: 500"
    " workers wait in long"
    f" polls of {LONG_POLL_MS // 1000} s, as ours do.",
    figures=(
        Figure(RATE, "tasks/s", more_is_better=True, plotted=True, digits=0),
        Figure("broker_cpu_us", "broker CPU, µs a task"),
        Figure("generator_cpu_us", "load generator CPU, µs a task"),
        Figure("core_percent", "broker, % of a core", digits=2),
        Figure("broker_rss_mb", "broker memory, MB", digits=0),
    ),
    cases=cases,
    targets=(
        Target("of the throughput of 4 workers, with 100", "at work, 100 workers", RATE, at_least=0.95,
               of="at work, 4 workers"),
        Target("of the throughput of 4 workers, with 500", "at work, 500 workers", RATE, at_least=0.95,
               of="at work, 4 workers", why=CONNECTIONS),
        Target("% of a core for 500 idle workers", "idle, 500 workers", "core_percent", at_most=5),
    ),
    pitfalls=("The connections end in one process of the load generator, beside the broker.",),
    seconds=(90, 480),
)  # fmt: skip
