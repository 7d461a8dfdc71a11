"""P3: end to end: from the first ``delay()`` to the last acknowledged outcome, beside three other systems."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from benchmarks.harness import Bench, Case, Claim, Elsewhere, Figure, Figures, Target, in_a_quiet_hour
from benchmarks.systems import (
    PRODUCERS,
    Running,
    celery,
    dramatiq,
    penstock,
    taskiq,
)

PENSTOCK = "Penstock + Kafka"
CELERY, DRAMATIQ, LIST = "Celery + Redis", "Dramatiq + Redis", "Taskiq + Redis list"
STREAM = "Taskiq + Redis stream"


def no_ops(bench: Bench, start: Callable[[Bench], AbstractContextManager[Running]], tasks: int) -> Figures:
    """Producers and workers at once, until everything is acknowledged."""
    with start(bench) as system:
        producers = [system.producer(tasks // PRODUCERS) for _ in range(PRODUCERS)]
        meter = system.meter()
        for producer in producers:
            producer.go()
        sent = [producer.result() for producer in producers]
        last = system.finish()
        first = min(s["first"] for s in sent)
        cpu = {**meter.cpu_us(tasks), "producers_cpu_us": sum(s["cpu"] for s in sent) / tasks * 1e6}
        return {
            "tasks_per_second": tasks / (last - first),
            "send_seconds": max(s["last"] for s in sent) - first,
            **cpu,
            "all_cpu_us": sum(cpu.values()),
            **meter.rss_mb(),
        }


def cases(bench: Bench) -> list[Case]:
    def case(
        name: str, start: Callable[[Bench], AbstractContextManager[Running]], short: int, full: int
    ) -> Case:
        return Case(name, "", partial(no_ops, start=start, tasks=bench.size(short, full)))

    return [
        case(PENSTOCK, penstock, 20_000, 100_000),
        case(CELERY, celery().running, 2_000, 10_000),
        case(DRAMATIQ, dramatiq().running, 4_000, 20_000),
        case(STREAM, taskiq("stream").running, 8_000, 40_000),
        case(LIST, taskiq("list").running, 8_000, 40_000),
    ]


RATE = "tasks_per_second"

WHY = (
    "the two cores are busy, with what the table says a task takes of each process; a tenth to a fifth of"
    " it is Kafka's, and another fifth the producers'."
)
SPEED = in_a_quiet_hour("24,630 tasks/s at 71 µs of CPU a task")

CLAIM = Claim(
    name="P3",
    title="End to end: call, execute in a child process, acknowledge",
    how="Two producer processes send no-ops while two children execute them; from the first call to the last"
    " acknowledged outcome. Everything has run once before. Each other system comes from its package, in an"
    " environment of its own, with Redis as Debian sets it up.",
    figures=(
        Figure(RATE, "tasks/s", more_is_better=True, plotted=True, compared=True, digits=0),
        Figure("send_seconds", "seconds until all were sent"),
        Figure("all_cpu_us", "CPU of all, µs a task", plotted=True, compared=True, digits=0),
        Figure("producers_cpu_us", "producers, µs a task", digits=0),
        Figure("kafka_cpu_us", "Kafka, µs a task", digits=0),
        Figure("server_cpu_us", "broker or Redis, µs a task", digits=0),
        Figure("worker_cpu_us", "worker's parent, µs a task", digits=0),
        Figure("children_cpu_us", "children, µs a task", digits=0),
        Figure("server_rss_mb", "broker or Redis, MB", compared=True, digits=0),
        Figure("worker_rss_mb", "worker's parent, MB", compared=True, digits=0),
        Figure("children_rss_mb", "two children, MB", compared=True, digits=0),
    ),
    cases=cases,
    targets=(
        Target("tasks/s", PENSTOCK, RATE, at_least=10_000, why=SPEED),
        Target("times Celery", PENSTOCK, RATE, at_least=10, of=CELERY),
        Target("times Dramatiq", PENSTOCK, RATE, at_least=5, of=DRAMATIQ, why=WHY),
        Target("times Taskiq with acknowledgement", PENSTOCK, RATE, at_least=2, of=STREAM),
        Target("µs of CPU a task, of all processes", PENSTOCK, "all_cpu_us", at_most=133, why=SPEED),
    ),
    elsewhere=(Elsewhere("Rust taskbroker, Python worker", "", RATE, 1_505),),
    pitfalls=(
        (
            "Redis keeps its data in memory and writes a snapshot now and then; Kafka and Penstock's broker"
            " write each task to disk before it counts."
        ),
        (
            "Taskiq's list queue acknowledges nothing: what a worker held when it died is lost. Celery"
            " acknowledges"
            " late here, which is its at-least-once mode, with a prefetch of 64 as its manual recommends for"
            " short tasks. Dramatiq runs 8 threads in each process and Taskiq 100 coroutines, their defaults."
        ),
        "Kafka's own CPU and memory are part of Penstock's price; they are shown apart.",
    ),
    seconds=(100, 900),
)
