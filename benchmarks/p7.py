"""P7: throughput with a million rows pending, of the same application and of another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.fill import fill
from benchmarks.harness import Bench, Case, Claim, Figure, Figures, Target
from benchmarks.processes import Meter, Script, broker, standing_still
from benchmarks.stored import Stored, stored


def drain(bench: Bench, before: Callable[[], Stored], tasks: int) -> Figures:
    """As many rows come in as are completed: the rows that were there stay as many."""
    store = before()
    with broker(store.folder, store.settings) as server:
        with standing_still(server.process):
            fill(bench.kafka, store.topic, tasks, 300)
            load = Script("benchmarks.load", server.address, "--limit", tasks).ready()
            meter = Meter(broker=server.process)
        result = load.result()
        if result["done"] != tasks:
            raise SystemExit(f"{result['done']} of {tasks} tasks were completed")
        return {
            "tasks_per_second": tasks / (result["last"] - result["first"]),
            **meter.cpu_us(tasks),
            **meter.rss_mb(),
        }


FEW, MANY, OTHERS = "1,000 rows", "a million rows", "a million of another application"


def cases(bench: Bench) -> list[Case]:
    many, tasks = bench.size(250_000, 1_000_000), bench.size(40_000, 150_000)
    kinds: dict[str, Callable[[], Stored]] = {
        FEW: lambda: stored(bench, 1_000),
        MANY: lambda: stored(bench, many),
        OTHERS: lambda: stored(bench, many, application="other"),
    }
    return [Case(name, "", partial(drain, before=before, tasks=tasks)) for name, before in kinds.items()]


RATE = "tasks_per_second"

WHY = (
    "each task is handed out behind so many others that it is read from the disk again: an index entry, a"
    " row, its checksum and an object, 4 to 6 of 30 µs on this machine at its full speed (docs/adr/0001);"
    " in the runs of two days the ratio was 0.84 to 0.92."
)

CLAIM = Claim(
    name="P7",
    title="Throughput with a million rows pending",
    how="The broker has been filled through Kafka. As many tasks as will be completed are written to Kafka"
    " while it"
    " stands still; then it stores them and hands out tasks at the same time, as in P1, and is left with"
    " as many"
    " rows as before.",
    figures=(
        Figure(RATE, "tasks/s", more_is_better=True, plotted=True, digits=0),
        Figure("broker_cpu_us", "broker CPU, µs a task", plotted=True),
        Figure("broker_rss_mb", "broker memory, MB", digits=0),
    ),
    cases=cases,
    targets=(
        Target("of the throughput with 1,000 rows", MANY, RATE, at_least=0.9, of=FEW, why=WHY),
        Target("the same, rows of another application", OTHERS, RATE, at_least=0.9, of=FEW),
    ),
    pitfalls=(
        "`max_pending_count` is 3,000,000 in all cases; its default, a million, would pause the intake.",
        "In the short form the million is 250,000.",
    ),
    seconds=(120, 600),
)
