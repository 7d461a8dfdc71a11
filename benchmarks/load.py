"""A no-op worker for load: claims batches, reports them complete, runs nothing.

``python -m benchmarks.load ADDRESS --batch N --workers N [--limit N]`` connects as soon as somebody
listens, and prints one JSON line when it has completed ``--limit`` tasks, or when nothing has been
pending for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
import uuid
from dataclasses import dataclass

import grpc
import uvloop

from penstock_protocol.v1 import consumer_pb2, raw_pb2

SERVICE = "/penstock.v1.ConsumerService/"
IDLE_POLLS_MAX = 10
COMPLETE = consumer_pb2.TASK_OUTCOME_STATUS_COMPLETE
CHANNEL = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 50),
)


@dataclass
class Progress:
    limit: int | None
    claimed: int = 0
    done: int = 0
    first: float = 0.0
    last: float = 0.0

    def wanted(self, batch: int) -> int:
        return batch if self.limit is None else min(batch, self.limit - self.claimed)


async def work(options: argparse.Namespace, total: Progress) -> None:
    """One worker: complete tasks until nothing has been pending for a while, or the limit is reached."""
    settings = (*CHANNEL, ("grpc.use_local_subchannel_pool", int(options.connections)))
    async with grpc.aio.insecure_channel(options.address, options=settings) as channel:
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
        idle = 0
        while idle < IDLE_POLLS_MAX and (wanted := total.wanted(options.batch)) > 0:
            total.claimed += wanted
            request = consumer_pb2.GetTasksRequest(
                request_id=uuid.uuid4().hex,
                application=options.application,
                max_tasks=wanted,
                wait_ms=options.wait_ms,
            )
            tasks = (await get(request, wait_for_ready=True)).tasks
            total.claimed -= wanted - len(tasks)
            if not tasks:
                idle = idle + 1 if total.done else 0
                continue
            idle = 0
            total.first = total.first or time.time()
            outcomes = [consumer_pb2.TaskOutcome(claim_token=t.claim_token, status=COMPLETE) for t in tasks]
            answers = (await report(consumer_pb2.SetTaskStatusesRequest(outcomes=outcomes))).answers
            if any(answer != consumer_pb2.OUTCOME_ANSWER_APPLIED for answer in answers):
                raise SystemExit(f"an outcome was not applied: {list(answers)}")
            total.done += len(answers)
            total.last = time.time()


async def run(options: argparse.Namespace) -> dict[str, float]:
    total = Progress(options.limit)
    await asyncio.gather(*(work(options, total) for _ in range(options.workers)))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "done": total.done,
        "first": total.first,
        "last": total.last,
        "cpu": usage.ru_utime + usage.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--application", default="bench")
    parser.add_argument("--wait-ms", type=int, default=200, help="of a call while nothing is pending")
    parser.add_argument("--connections", action="store_true", help="one connection for each worker")
    options = parser.parse_args()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.stdout.write(json.dumps(runner.run(run(options))) + "\n")


if __name__ == "__main__":
    main()
