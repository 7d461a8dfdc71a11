"""A server of taskbroker v1's calls that does nothing: it answers each at once, with the same task.

``python -m benchmarks.answers PORT --tasks N`` hands out N of them. What a call costs here is gRPC's, not the
broker's: the same server of the same library, with handlers of bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import grpc
import uvloop

from benchmarks.fill import activations
from benchmarks.v1_load import SERVICE
from penstock_protocol.v1 import raw_pb2


async def serve(port: int, tasks: int) -> None:
    (body,) = activations(1, 300)
    task = raw_pb2.RawGetTaskResponse(task=body).SerializeToString()
    settled = raw_pb2.RawSetTaskStatusResponse(task=body).SerializeToString()
    left = tasks

    async def get_task(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        nonlocal left
        if left <= 0:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no pending task")
        left -= 1
        return task

    async def set_task_status(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        nonlocal left
        if left <= 0:
            return b""
        left -= 1
        return settled

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "GetTask": grpc.unary_unary_rpc_method_handler(get_task),
        "SetTaskStatus": grpc.unary_unary_rpc_method_handler(set_task_status),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.strip("/"), handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--tasks", type=int, default=10_000)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, options.tasks))


if __name__ == "__main__":
    main()
