"""P2: one-task unary calls of taskbroker v1's protocol."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial

from benchmarks import golang
from benchmarks.fill import fill
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
from benchmarks.processes import Meter, Program, Script, broker, kafka_settings, new_topic, standing_still
from tests.kafka_server import free_port

# Of Python, where there is no Go.
GENERATORS = 2


def load_of(bench: Bench, address: str, workers: int) -> list[Program]:
    """So many workers, about to call."""
    if program := golang.program(bench, "unary"):
        return [Program("unary", [str(program), "-workers", str(workers), address], {}).ready()]
    return [
        Script("benchmarks.v1_load", address, "--workers", workers // GENERATORS).ready()
        for _ in range(GENERATORS)
    ]


def unary(bench: Bench, workers: int, tasks: int) -> Figures:
    topic = new_topic(bench.kafka, 4)
    folder = bench.folder / f"p2-{uuid.uuid4().hex[:8]}"
    with broker(folder, kafka_settings(bench.kafka, topic)) as server:
        load = load_of(bench, server.address, workers)
        with standing_still(server.process):
            fill(bench.kafka, topic, tasks, 300)
            meter = Meter(broker=server.process)
        return finished(load, meter, tasks)


def nothing_but_grpc(bench: Bench, workers: int, tasks: int) -> Figures:
    """The same calls to a server of the same library that answers at once."""
    port = free_port()
    server = Script("benchmarks.answers", port, "--tasks", tasks).ready()
    try:
        meter = Meter(broker=server.pid)
        return finished(load_of(bench, f"127.0.0.1:{port}", workers), meter, tasks)
    finally:
        server.stop()


def finished(load: Sequence[Program], meter: Meter, tasks: int) -> Figures:
    results = [script.result() for script in load]
    done = sum(result["done"] for result in results)
    if done != tasks:
        raise SystemExit(f"{done} of {tasks} tasks were completed")
    seconds = max(r["last"] for r in results) - min(r["first"] for r in results)
    calls = [ms for r in results for ms in r["call_ms"]]
    return {
        "tasks_per_second": done / seconds,
        **meter.cpu_us(done),
        "generator_cpu_us": sum(r["cpu"] for r in results) / done * 1e6,
        "call_p50_ms": percentile(calls, 0.5),
        "call_p99_ms": percentile(calls, 0.99),
    }


def cases(bench: Bench) -> list[Case]:
    tasks = bench.size(6_000, 20_000)
    return [
        Case(name, f"{workers} workers", partial(drain, workers=workers, tasks=tasks))
        for name, drain in (("Penstock", unary), ("gRPC alone", nothing_but_grpc))
        for workers in (4, 16, 64, 128)
    ]


def notes(bench: Bench) -> Sequence[str]:
    if golang.program(bench, "unary"):
        version = golang.said("unary", "list", "-m", "-f", "{{.Version}}", "google.golang.org/grpc")
        return [f"The workers are goroutines of one process, with grpc-go {version}."]
    return ["Without Go the workers are two processes of Python, which cost as much as the broker."]


RATE = "tasks_per_second"
WHY = (
    '"gRPC alone" is what such a call costs without a broker. A transaction of its own takes 227 µs, '
    "113 of them CPU (benchmarks.store_settings), and is shared by those who report while the one "
    "before it is written or within a millisecond of its end (docs/adr/0003). One that answers before "
    "it has written has none of it. And "
    + in_a_quiet_hour("3,085 tasks/s with 4 workers, 4,139 with 16 and 4,419 with 64,")
)
RUST_DEFAULTS = {4: 2467, 16: 2665, 64: 2275, 128: 2206}

CLAIM = Claim(
    name="P2",
    title="One task a call: the protocol of taskbroker v1",
    how="A backlog of 300 B tasks lies in Kafka. Workers, each with a connection of its own, call GetTask"
    " once and then SetTaskStatus with fetch_next_task until nothing is left.",
    figures=(
        Figure(RATE, "tasks/s", more_is_better=True, plotted=True, digits=0),
        Figure("broker_cpu_us", "server CPU, µs a task", digits=0),
        Figure("generator_cpu_us", "load generator CPU, µs a task", digits=0),
        Figure("call_p50_ms", "p50 of a call, ms"),
        Figure("call_p99_ms", "p99 of a call, ms"),
    ),
    cases=cases,
    targets=(
        *(
            Target(
                f"tasks/s with {workers} workers",
                f"Penstock, {workers} workers",
                RATE,
                at_least=2_700,
                why=WHY,
            )
            for workers in RUST_DEFAULTS
        ),
        Target("tasks/s at its best", "Penstock, 64 workers", RATE, at_least=3_515, why=WHY),
    ),
    elsewhere=tuple(
        Elsewhere("Rust taskbroker, defaults", f"{workers} workers", RATE, rate)
        for workers, rate in RUST_DEFAULTS.items()
    ),
    pitfalls=(
        (
            '"gRPC alone" is a server of the same library whose handlers answer at once and do nothing else:'
            " no task is stored, claimed or settled, nothing is synced. What is left to the broker is the"
            " difference."
        ),
    ),
    notes=notes,
    seconds=(100, 700),
)
