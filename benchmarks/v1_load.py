"""No-op workers of taskbroker v1's protocol: ``GetTask``, then ``SetTaskStatus`` that fetches the next.

``python -m benchmarks.v1_load ADDRESS --workers N`` prints one JSON line when nothing has been pending
for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from typing import Any

import grpc
import uvloop

from benchmarks.load import CHANNEL
from penstock_protocol.v1 import activation_pb2, consumer_pb2

SERVICE = "/sentry_protos.taskbroker.v1.ConsumerService/"
IDLE_SECONDS = 0.02
# For so long a worker asks again when there is nothing.
PATIENCE_SECONDS = 1.0


class Load:
    def __init__(self) -> None:
        self.done = 0
        self.first = self.last = 0.0
        self.call_seconds: list[float] = []

    async def work(self, address: str) -> None:
        """One worker, as the published one works: an outcome is reported with the wish for the next task."""
        options = (*CHANNEL, ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            get = channel.unary_unary(
                SERVICE + "GetTask",
                request_serializer=consumer_pb2.GetTaskRequest.SerializeToString,
                response_deserializer=consumer_pb2.GetTaskResponse.FromString,
            )
            report = channel.unary_unary(
                SERVICE + "SetTaskStatus",
                request_serializer=consumer_pb2.SetTaskStatusRequest.SerializeToString,
                response_deserializer=consumer_pb2.SetTaskStatusResponse.FromString,
            )
            idle_since = 0.0
            while not idle_since or not self.done or time.time() - idle_since < PATIENCE_SECONDS:
                try:
                    task = (await get(consumer_pb2.GetTaskRequest(), wait_for_ready=True)).task
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
                    idle_since = idle_since or time.time()
                    await asyncio.sleep(IDLE_SECONDS)
                    continue
                idle_since = 0.0
                self.first = self.first or time.time()
                await self._chain(report, task)

    async def _chain(self, report: Any, task: activation_pb2.TaskActivation) -> None:
        while True:
            request = consumer_pb2.SetTaskStatusRequest(
                id=task.id,
                status=activation_pb2.TASK_ACTIVATION_STATUS_COMPLETE,
                fetch_next_task=consumer_pb2.FetchNextTask(),
            )
            called_at = time.perf_counter()
            answer = await report(request)
            self.call_seconds.append(time.perf_counter() - called_at)
            self.done += 1
            self.last = time.time()
            if not answer.HasField("task"):
                return
            task = answer.task


async def run(address: str, workers: int) -> dict[str, object]:
    load = Load()
    await asyncio.gather(*(load.work(address) for _ in range(workers)))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "done": load.done,
        "first": load.first,
        "last": load.last,
        "cpu": usage.ru_utime + usage.ru_stime,
        "call_ms": [round(seconds * 1000, 3) for seconds in load.call_seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.stdout.write(json.dumps(runner.run(run(options.address, options.workers))) + "\n")


if __name__ == "__main__":
    main()
