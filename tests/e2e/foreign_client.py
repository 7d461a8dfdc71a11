"""A client of taskbroker v1 with its published stubs; run by an interpreter that has sentry-protos.

``foreign_client.py BROKER KAFKA TOPIC TASKS SECRET``: completes TASKS tasks of application "v1" by
unary calls that know nothing of tokens, and prints what it saw as JSON.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from collections import Counter
from typing import Any

import grpc
from sentry_protos.taskbroker.v1 import taskbroker_pb2 as pb
from sentry_protos.taskbroker.v1 import taskbroker_pb2_grpc as pb_grpc


class Signing(grpc.UnaryUnaryClientInterceptor):
    """The published client's signature, by its definition."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        body = request.SerializeToString()
        signature = hmac.new(self._secret, method.encode() + b":" + body, hashlib.sha256).hexdigest()
        metadata = [*(details.metadata or ()), ("sentry-signature", signature)]
        return continuation(details._replace(metadata=metadata), request)


def main(broker: str, tasks: int, secret: str) -> dict[str, object]:
    with grpc.insecure_channel(broker) as plain:
        channel = grpc.intercept_channel(plain, Signing(secret)) if secret else plain
        stub = pb_grpc.ConsumerServiceStub(channel)
        completed: Counter[str] = Counter()
        attempts: list[int] = []
        refused = {}
        # A namespace without an application matches nothing.
        refused["namespace only"] = _code(lambda: stub.GetTask(pb.GetTaskRequest(namespace="ns")))
        refused["another application"] = _code(lambda: stub.GetTask(pb.GetTaskRequest(application="nobody")))
        request = pb.SetTaskStatusRequest(id="x", status=pb.TASK_ACTIVATION_STATUS_PENDING)
        refused["status pending"] = _code(lambda: stub.SetTaskStatus(request))
        unknown = pb.SetTaskStatusRequest(id="unknown", status=pb.TASK_ACTIVATION_STATUS_COMPLETE)
        stub.SetTaskStatus(unknown)
        if secret:
            refused["unsigned"] = _code(
                lambda: pb_grpc.ConsumerServiceStub(plain).GetTask(pb.GetTaskRequest())
            )
        task = None
        while sum(completed.values()) < tasks:
            if task is None:
                try:
                    task = stub.GetTask(pb.GetTaskRequest(application="v1", namespace="ns"), timeout=5).task
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
                    continue
            status, how = pb.TASK_ACTIVATION_STATUS_COMPLETE, {}
            if task.taskname == "retry_once" and not task.retry_state.attempts:
                status, how = pb.TASK_ACTIVATION_STATUS_RETRY, {"max_attempts": 3, "delay_on_retry": 0}
            elif task.taskname == "fail":
                status = pb.TASK_ACTIVATION_STATUS_FAILURE
            if status != pb.TASK_ACTIVATION_STATUS_RETRY:
                completed[task.id] += 1
                attempts.append(task.retry_state.attempts)
            report = pb.SetTaskStatusRequest(
                id=task.id,
                status=status,
                fetch_next_task=pb.FetchNextTask(application="v1", namespace="ns"),
                **how,
            )
            answer = stub.SetTaskStatus(report)
            task = answer.task if answer.HasField("task") else None
        return {
            "completed": len(completed),
            "most": max(completed.values()),
            "retried": sum(attempts),
            "refused": refused,
        }


def _code(call: Any) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""))
    )
