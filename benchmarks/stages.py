"""Where the CPU of a task goes in the broker, without Kafka and gRPC around it.

``python -m benchmarks.stages [--tasks N] [--rounds N]`` takes messages through the broker's own code, one
stage after the other, and prints the CPU of each, that of reading the answers included. What P1 costs beyond
their sum is the Kafka client, gRPC, the ledger, and threads that wait for each other.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.fill import activations
from penstock_broker.clock import SystemClock
from penstock_broker.dispatch.service import Consumers
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.server import RESPONSE_BYTES_MAX, SWITCH_INTERVAL_SECONDS, rarely_collect
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_protocol.v1 import consumer_pb2

MESSAGES = 1000
CLAIMS = 64
# Calls under way at a time.
CALLS = 4


@dataclass
class Costs:
    """Seconds of CPU, by stage: of all threads, and of the writer's."""

    all: dict[str, float] = field(default_factory=dict)
    sql: dict[str, float] = field(default_factory=dict)
    writer_seconds: float = 0.0
    _at: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._at = time.process_time(), self.writer_seconds

    def end(self, stage: str) -> None:
        begun, written = self._at
        self.all[stage] = time.process_time() - begun
        self.sql[stage] = self.writer_seconds - written
        self.start()


async def measure(folder: Path, tasks: int, rounds: int) -> list[Costs]:
    clock, limits = SystemClock(), StoreLimits()
    current = Costs()
    with ThreadPoolExecutor(1) as thread:

        def timed(write: Callable[[Batch], Written], batch: Batch) -> Written:
            begun = time.thread_time()
            try:
                return write(batch)
            finally:
                current.writer_seconds += time.thread_time() - begun

        async def handoff(write: Callable[[Batch], Written], batch: Batch) -> Written:
            return await asyncio.get_running_loop().run_in_executor(thread, timed, write, batch)

        database = Database(folder / "stages.sqlite", limits.lifecycle, clock.wall_ms())
        store = Inflight(database, clock, limits, handoff)
        writing = asyncio.create_task(store.writer.run())
        rarely_collect()
        measured = []
        for number in range(rounds):
            current = Costs()
            await one_round(store, current, number * tasks, tasks)
            measured.append(current)
        store.writer.stop()
        await writing
        database.close()
    return measured


async def one_round(store: Inflight, costs: Costs, first: int, tasks: int) -> None:
    consumers = Consumers(store, Waiting(store, RESPONSE_BYTES_MAX))
    admission, source = Admission(AdmissionLimits()), store.source("stages", 0)
    if first == 0:
        store.begin_range(source, 0)
    messages = list(activations(tasks, 300))
    costs.start()
    now = store.clock.wall_ms()
    rows = [admission.admit(m, now, source.id, first + n) for n, m in enumerate(messages)]
    costs.end("admitted")
    for at in range(0, tasks, MESSAGES):
        part = rows[at : at + MESSAGES]
        await store.insert(part, {source.id: first + at + len(part)})
        store.cover(source, first + at + len(part))
    costs.end("stored")
    requests: list[bytes] = []
    while len(requests) * CLAIMS < tasks:
        asked = consumer_pb2.GetTasksRequest(request_id=uuid.uuid4().hex, max_tasks=CLAIMS, wait_ms=100)
        answer = await consumers.get_tasks(asked.SerializeToString())
        claims = consumer_pb2.GetTasksResponse.FromString(answer).tasks
        outcomes = [
            consumer_pb2.TaskOutcome(
                claim_token=claim.claim_token, status=consumer_pb2.TASK_OUTCOME_STATUS_COMPLETE
            )
            for claim in claims
        ]
        requests.append(consumer_pb2.SetTaskStatusesRequest(outcomes=outcomes).SerializeToString())
        if len(requests) % CALLS == 0:
            await store.committed()
    await store.committed()
    costs.end("claimed")
    for at in range(0, len(requests), CALLS):
        await asyncio.gather(*(consumers.set_task_statuses(r) for r in requests[at : at + CALLS]))
    costs.end("completed")
    if store.memory.rows:
        raise SystemExit(f"{store.memory.rows} tasks were not completed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=64_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    with (
        tempfile.TemporaryDirectory(prefix="penstock-stages-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        measured = runner.run(measure(Path(folder), options.tasks, options.rounds))
    sys.stdout.write("µs of CPU a task, median of the rounds\n")
    total = 0.0
    for stage in measured[0].all:
        everything = statistics.median(c.all[stage] for c in measured) / options.tasks * 1e6
        sql = statistics.median(c.sql[stage] for c in measured) / options.tasks * 1e6
        total += everything
        sys.stdout.write(f"  {stage:10} {everything:6.1f}, of it {sql:4.1f} on the writer's thread\n")
    sys.stdout.write(f"  {'all':10} {total:6.1f}\n")


if __name__ == "__main__":
    main()
