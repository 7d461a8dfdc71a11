"""P1: one broker, a backlog in Kafka: stored, claimed and completed in batches; and River with one."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from functools import partial

import psutil

from benchmarks import river
from benchmarks.fill import fill
from benchmarks.harness import Bench, Case, Claim, Elsewhere, Figure, Figures, Target, in_a_quiet_hour
from benchmarks.processes import Meter, Script, broker, kafka_settings, new_topic, standing_still
from tests.kafka_server import free_port

# What a worker of ours with two children asks for when its tasks take no time: half of what it holds.
BATCH, WORKERS = 256, 8


@dataclass
class Run:
    """``warm``: tasks before it counts, so that the window of remembered ids is not empty."""

    body: int
    tasks: int
    warm: int
    partitions: int = 4
    batch: int = BATCH


def drain(bench: Bench, run: Run) -> Figures:
    topic = new_topic(bench.kafka, run.partitions)
    folder = bench.folder / f"p1-{uuid.uuid4().hex[:8]}"
    with broker(folder, kafka_settings(bench.kafka, topic)) as server:
        figures = measured(bench, run, server.address, server.process, topic)
    shutil.rmtree(folder)
    return figures


def bare(bench: Bench, run: Run) -> Figures:
    """The same with a broker of the same libraries that promises nothing."""
    topic, port = new_topic(bench.kafka, run.partitions), free_port()
    server = Script("benchmarks.bare", port, bench.kafka, topic).ready()
    try:
        return measured(bench, run, f"127.0.0.1:{port}", psutil.Process(server.pid), topic)
    finally:
        server.stop()


def measured(bench: Bench, run: Run, address: str, server: psutil.Process, topic: str) -> Figures:
    body, tasks = run.body, run.tasks

    def load() -> Script:
        return Script("benchmarks.load", address, "--batch", run.batch, "--workers", WORKERS).ready()

    fill(bench.kafka, topic, run.warm, body)
    load().result()
    # It waits already, so that nothing is stored when the first claim is answered.
    waiting = load()
    with standing_still(server):
        fill(bench.kafka, topic, tasks, body)
        meter = Meter(broker=server, kafka=bench.kafka_pid)
    result = waiting.result()
    done = int(result["done"])
    if done != tasks:
        raise SystemExit(f"{done} of {tasks} tasks were completed")
    seconds = result["last"] - result["first"]
    cpu = {**meter.cpu_us(done), "generator_cpu_us": result["cpu"] / done * 1e6}
    return {
        "tasks_per_second": done / seconds,
        "mb_per_second": done / seconds * body / 1e6,
        **cpu,
        "all_cpu_us": sum(cpu.values()),
        "broker_rss_mb": meter.rss_mb()["broker_rss_mb"],
    }


RATE, RIVER, BARE = "tasks_per_second", "River on PostgreSQL", "The libraries alone"


def name(body: int) -> str:
    return "300 B" if body == 300 else "5 KB"


def cases(bench: Bench) -> list[Case]:
    def run(body: int, **options: int) -> Run:
        part = 1 if body == 300 else 3
        tasks, warm = bench.size(60_000, 120_000) // part, bench.size(20_000, 100_000) // part
        return Run(body, tasks, warm, **options)

    found = [
        Case(
            f"Penstock, {partitions} partition{'s' if partitions > 1 else ''}",
            name(body),
            partial(drain, run=run(body, partitions=partitions)),
        )
        for body in (300, 5000)
        for partitions in ((4,) if bench.short else (1, 4, 12))
    ]
    found += [
        Case("Penstock, 64 tasks a call", name(300), partial(drain, run=run(300, batch=64))),
        Case(BARE, name(300), partial(bare, run=run(300))),
    ]
    if river.river(bench):
        tasks = bench.size(100_000, 120_000)
        found += [
            Case(RIVER, name(body), partial(river.drain, body=body, tasks=tasks // (1 if body == 300 else 3)))
            for body in (300, 5000)
        ]
    return found


PENSTOCK = "Penstock, 4 partitions, 300 B"
HOUR = in_a_quiet_hour("46,181 tasks/s, and River 31,264,")
PYTHON = (
    '"The libraries alone" is the part of Kafka\'s client, gRPC, protobuf and SQLite. The rest is what the'
    " promises take in Python: 215,000 instructions a task, counted in `benchmarks.stages`, in which no "
    "function has more than a tenth (docs/adr/0003)."
)

CLAIM = Claim(
    name="P1",
    title="One broker: a backlog in Kafka, stored, claimed, completed",
    how="The window of remembered ids is warm and the load generator waits. The broker stands still"
    " (SIGSTOP) while a backlog is written to Kafka. The time runs from the first answered claim to the last"
    " acknowledged outcome. River, a queue in PostgreSQL, gets a backlog in an empty table, and its client,"
    " warm, works it in process, with the settings of its own benchmark: the time runs from the first job"
    " worked until the database says that all are completed.",
    figures=(
        Figure(RATE, "tasks/s", more_is_better=True, plotted=True, compared=True, digits=0),
        Figure("mb_per_second", "MB/s", more_is_better=True),
        Figure("broker_cpu_us", "broker CPU, µs a task", plotted=True),
        Figure("kafka_cpu_us", "Kafka CPU, µs a task"),
        Figure("generator_cpu_us", "load generator CPU, µs a task"),
        Figure("postgres_cpu_us", "PostgreSQL CPU, µs a task"),
        Figure("river_cpu_us", "River's client CPU, µs a task"),
        Figure("all_cpu_us", "CPU of all, µs a task", plotted=True, compared=True),
        Figure("broker_rss_mb", "broker memory, MB", digits=0),
        Figure("river_mb", "PostgreSQL and River's client, MB", digits=0),
    ),
    cases=cases,
    targets=(
        Target("tasks/s, 300 B", PENSTOCK, RATE, at_least=31_000, why=HOUR),
        Target("times River on PostgreSQL, same run", PENSTOCK, RATE, at_least=1, of=f"{RIVER}, 300 B"),
        Target("µs of broker CPU a task, 300 B", PENSTOCK, "broker_cpu_us", at_most=30, why=PYTHON),
    ),
    elsewhere=(
        Elsewhere("River on PostgreSQL, workers in process", "300 B", RATE, 30_400),
        Elsewhere("Rust taskbroker", "300 B", RATE, 3_500),
    ),
    pitfalls=(
        (
            f"{WORKERS} workers claim {BATCH} tasks at a time: as many as a worker of ours with two"
            " children asks for when its tasks take no time. With 64 there are four times as many calls:"
            " in the runs of four days that was 0.71 to 1.03 times River's rate in the same run, with 256"
            " it was 1.00 to 1.48 times."
        ),
        (
            f'"{BARE}" is a broker of the same libraries that promises nothing: no claims, leases, retries,'
            " duplicates, namespaces, checksums, books, ledger (benchmarks/bare.py). What is above its CPU a"
            " task is the price of Penstock's promises. It has read all of Kafka by the time it is asked, so"
            " its tasks/s are of the second half only."
        ),
        (
            "Broker, Kafka and the load generator share two cores. What the broker could do alone is"
            " 1,000,000 divided by its CPU a task."
        ),
        (
            "River's workers are goroutines of its client, and its jobs are in the database before the time"
            " begins. Penstock's tasks are in Kafka then; storing them, handing them to another process, here"
            " the load generator, and taking its outcomes are all in the time."
        ),
        (
            "River has PostgreSQL's default settings and those of its command `river bench`: 2,000 workers,"
            " fetches 2 ms apart. 1,000 or 5,000 workers, 1 ms, more connections were not faster. Its table"
            " was empty and is vacuumed, nothing is inserted meanwhile, and no checkpoint comes due."
        ),
        "The memory includes the window of remembered ids, and up to a million rows that wait.",
        (
            "Python is the distribution's, built with profile-guided optimisation as that of the images is;"
            " with one that pyenv has built without, a task takes the broker 1.1 to 1.2 times the CPU."
        ),
        (
            "The machine these figures are from changes its speed by the hour: the same commit once"
            " reached 26,600 tasks/s at 41 µs, and another time 18,500 to 21,000 at 50 to 57 µs. Compare"
            " within a run."
        ),
    ),
    notes=river.notes,
    seconds=(100, 700),
)
