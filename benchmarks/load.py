"""A no-op worker for load: claims batches, reports them complete, runs nothing.

``python -m benchmarks.load ADDRESS TASKS BATCH STREAMS`` prints one JSON line when it has
completed its share.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
import uuid

import grpc
import uvloop

from penstock_protocol.v1 import consumer_pb2, raw_pb2

SERVICE = "/penstock.v1.ConsumerService/"
IDLE_POLLS_MAX = 20
COMPLETE = consumer_pb2.TASK_OUTCOME_STATUS_COMPLETE


async def run(address: str, batch: int, streams: int) -> dict[str, float]:
    """Complete tasks until nothing has been pending for a while."""
    done, first, last = 0, 0.0, 0.0
    async with grpc.aio.insecure_channel(
        address, options=(("grpc.max_receive_message_length", 64 << 20),)
    ) as channel:
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

        async def stream() -> None:
            nonlocal done, first, last
            idle = 0
            while idle < IDLE_POLLS_MAX:
                answer = await get(
                    consumer_pb2.GetTasksRequest(request_id=uuid.uuid4().hex, max_tasks=batch, wait_ms=100)
                )
                if not answer.tasks:
                    idle = idle + 1 if done else 0
                    continue
                idle = 0
                first = first or time.time()
                outcomes = [
                    consumer_pb2.TaskOutcome(claim_token=task.claim_token, status=COMPLETE)
                    for task in answer.tasks
                ]
                answers = (await report(consumer_pb2.SetTaskStatusesRequest(outcomes=outcomes))).answers
                if any(a != consumer_pb2.OUTCOME_ANSWER_APPLIED for a in answers):
                    raise SystemExit(f"an outcome was not applied: {list(answers)}")
                done += len(answers)
                last = time.time()

        await asyncio.gather(*(stream() for _ in range(streams)))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"done": done, "first": first, "last": last, "cpu": usage.ru_utime + usage.ru_stime}


if __name__ == "__main__":
    address, batch, streams = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.stdout.write(json.dumps(runner.run(run(address, batch, streams))) + "\n")
