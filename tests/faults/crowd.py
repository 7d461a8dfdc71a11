"""Many workers in one process: each with a connection of its own, long polling, completing what it gets.

``python -m tests.faults.crowd ADDRESS WORKERS NAMESPACE BATCH``; until killed.
"""

from __future__ import annotations

import asyncio
import sys
import uuid

import grpc

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.consumer_pb2_grpc import ConsumerServiceStub

_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 2_000))


async def work(address: str, namespace: str, batch: int) -> None:
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        stub = ConsumerServiceStub(channel)
        while True:
            request = pb.GetTasksRequest(
                request_id=uuid.uuid4().hex,
                application="e2e",
                namespaces=[namespace],
                max_tasks=batch,
                wait_ms=10_000,
            )
            try:
                claimed = (await stub.GetTasks(request, timeout=15)).tasks
                if claimed:
                    outcomes = [
                        pb.TaskOutcome(claim_token=one.claim_token, status=pb.TASK_OUTCOME_STATUS_COMPLETE)
                        for one in claimed
                    ]
                    await stub.SetTaskStatuses(pb.SetTaskStatusesRequest(outcomes=outcomes), timeout=15)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)


async def main(address: str, workers: int, namespace: str, batch: int) -> None:
    await asyncio.gather(*(work(address, namespace, batch) for _ in range(workers)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
