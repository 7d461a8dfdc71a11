"""P11: what claims and outcomes cost with payloads of 500 B, 50 KB and 1 MB."""

from __future__ import annotations

import uuid
from functools import partial

import grpc

from benchmarks.harness import Bench, Case, Claim, Figure, Figures, Target
from benchmarks.load import CHANNEL, COMPLETE, SERVICE
from benchmarks.processes import Meter, broker
from benchmarks.stored import make
from penstock_protocol.v1 import consumer_pb2, raw_pb2

# Of 1 MB an answer holds three: so many for all sizes, for what is done together shares a transaction.
BATCH, LARGER_BATCH = 3, 16


def phases(bench: Bench, body: int, tasks: int, batch: int = BATCH) -> Figures:
    """All are claimed, then all are reported: what each half costs the broker."""
    store = make(bench, bench.folder / f"p11-{uuid.uuid4().hex[:8]}", tasks, body, "bench")
    with broker(store.folder, store.settings) as server, grpc.insecure_channel(
        server.address, options=CHANNEL
    ) as channel:  # fmt: skip
        get = channel.unary_unary(
            SERVICE + "GetTasks",
            request_serializer=consumer_pb2.GetTasksRequest.SerializeToString,
            response_deserializer=raw_pb2.RawGetTasksResponse.FromString,
        )
        report = channel.unary_unary(
            SERVICE + "SetTaskStatuses",
            request_serializer=consumer_pb2.SetTaskStatusesRequest.SerializeToString,
            response_deserializer=consumer_pb2.SetTaskStatusesResponse.FromString,
        )
        written = server.process.io_counters().write_bytes
        meter = Meter(claim=server.process)
        tokens: list[bytes] = []
        while len(tokens) < tasks:
            request = consumer_pb2.GetTasksRequest(
                request_id=uuid.uuid4().hex, max_tasks=batch, wait_ms=10_000
            )
            tokens += [task.claim_token for task in get(request).tasks]
        figures = meter.cpu_us(tasks)
        claims_written = server.process.io_counters().write_bytes
        meter = Meter(outcome=server.process)
        for n in range(0, tasks, batch):
            outcomes = [
                consumer_pb2.TaskOutcome(claim_token=t, status=COMPLETE) for t in tokens[n : n + batch]
            ]
            report(consumer_pb2.SetTaskStatusesRequest(outcomes=outcomes))
        return {
            **figures,
            **meter.cpu_us(tasks),
            "claim_written_kb": (claims_written - written) / tasks / 1e3,
            "outcome_written_kb": (server.process.io_counters().write_bytes - claims_written) / tasks / 1e3,
        }


SMALL, MIDDLE, LARGE = "500 B", "50 KB", "1 MB"
SMALL_16, MIDDLE_16 = f"{SMALL}, {LARGER_BATCH} a call", f"{MIDDLE}, {LARGER_BATCH} a call"

WHY = (
    "the pages of the payload become free ones, each in SQLite's map of pages: 18 µs for 50 KB and 36 µs "
    "for 1 MB, SQLite alone (docs/adr/0002). They are not read."
)

CLAIM = Claim(
    name="P11",
    title="Payloads: what claims and outcomes cost",
    how=f"The tasks are stored; then all are claimed, {BATCH} in a call, and then all are reported. CPU is"
    f" the broker's,"
    " bytes written are what reaches the disk, the write-ahead log and its check-points included.",
    figures=(
        Figure("claim_cpu_us", "claim, µs of CPU", plotted=True),
        Figure("outcome_cpu_us", "outcome, µs of CPU", plotted=True),
        Figure("claim_written_kb", "claim, KB written"),
        Figure("outcome_written_kb", "outcome, KB written", plotted=True),
    ),
    cases=lambda bench: [
        Case(SMALL, "", partial(phases, body=500, tasks=bench.size(4_000, 20_000))),
        Case(MIDDLE, "", partial(phases, body=50_000, tasks=bench.size(2_000, 5_000))),
        Case(LARGE, "", partial(phases, body=1_000_000, tasks=bench.size(200, 500))),
        Case(SMALL_16, "", partial(phases, body=500, tasks=bench.size(4_000, 20_000), batch=LARGER_BATCH)),
        Case(MIDDLE_16, "", partial(phases, body=50_000, tasks=bench.size(2_000, 5_000), batch=LARGER_BATCH)),
    ],
    targets=(
        Target(
            "times the CPU of an outcome, 50 KB", MIDDLE, "outcome_cpu_us", at_most=1.25, of=SMALL, why=WHY
        ),
        Target("times the CPU of an outcome, 1 MB", LARGE, "outcome_cpu_us", at_most=1.25, of=SMALL, why=WHY),
        Target("times the bytes written by a claim, 1 MB", LARGE, "claim_written_kb", at_most=1.25, of=SMALL),
        Target(
            f"times the CPU of an outcome, {MIDDLE_16}",
            MIDDLE_16,
            "outcome_cpu_us",
            at_most=1.25,
            of=SMALL_16,
            why=WHY,
        ),
    ),
    pitfalls=("A claim carries the payload to the worker: that, and reading it, is in its CPU.",),
    seconds=(60, 420),
)
