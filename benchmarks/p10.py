"""P10: how long a broker that was killed takes until it serves again, with many rows."""

from __future__ import annotations

import time
import uuid
from functools import partial

import grpc

from benchmarks.harness import Bench, Case, Claim, Figure, Figures, Target
from benchmarks.load import SERVICE
from benchmarks.processes import Meter, broker
from benchmarks.stored import stored
from penstock_protocol.v1 import consumer_pb2


def restart(bench: Bench, rows: int) -> Figures:
    store = stored(bench, rows)
    with broker(store.folder, store.settings) as server:
        server.process.kill()
        server.process.wait()
    started = time.monotonic()
    with broker(store.folder, store.settings) as server:
        claim_one(server.address)
        seconds = time.monotonic() - started
        meter = Meter(broker=server.process)
        return {
            "serving_seconds": server.serving_seconds,
            "first_claim_seconds": seconds,
            "cpu_seconds": sum(server.process.cpu_times()[:2]),
            **meter.rss_mb(),
        }


def claim_one(address: str) -> None:
    """A task is handed out, and given back."""
    with grpc.insecure_channel(address) as channel:
        get = channel.unary_unary(
            SERVICE + "GetTasks",
            request_serializer=consumer_pb2.GetTasksRequest.SerializeToString,
            response_deserializer=consumer_pb2.GetTasksResponse.FromString,
        )
        release = channel.unary_unary(
            SERVICE + "ReleaseTasks",
            request_serializer=consumer_pb2.ReleaseTasksRequest.SerializeToString,
            response_deserializer=consumer_pb2.ReleaseTasksResponse.FromString,
        )
        request = consumer_pb2.GetTasksRequest(request_id=uuid.uuid4().hex, max_tasks=1, wait_ms=60_000)
        (task,) = get(request, timeout=70).tasks
        released = consumer_pb2.ReleasedTask(
            claim_token=task.claim_token, reason=consumer_pb2.RELEASE_REASON_SHUTDOWN
        )
        release(consumer_pb2.ReleaseTasksRequest(tasks=[released]), timeout=70)


def cases(bench: Bench) -> list[Case]:
    return [
        Case(SMALL, "", partial(restart, rows=bench.size(25_000, 100_000))),
        Case(LARGE, "", partial(restart, rows=bench.size(250_000, 1_000_000))),
    ]


SMALL, LARGE = "100,000 rows", "a million rows"

CLAIM = Claim(
    name="P10",
    title="Restart of a killed broker",
    how="A broker that holds the rows, 300 B each, is killed with SIGKILL and started again, until its"
    " health says"
    " that it serves, and until it has handed out a task.",
    figures=(
        Figure("serving_seconds", "serves after, s", plotted=True, digits=2),
        Figure("first_claim_seconds", "first task handed out after, s", digits=2),
        Figure("cpu_seconds", "CPU of the start, s", digits=2),
        Figure("broker_rss_mb", "memory, MB", digits=0),
    ),
    cases=cases,
    targets=(
        Target("s with a million rows", LARGE, "first_claim_seconds", at_most=10),
        Target("s with 100,000 rows", SMALL, "first_claim_seconds", at_most=3),
    ),
    pitfalls=("In the short form the rows are 25,000 and 250,000.", "The file is in the page cache."),
    seconds=(40, 240),
)
