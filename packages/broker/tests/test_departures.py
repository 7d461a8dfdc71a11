"""``penstock-broker drain`` and ``adopt`` on a real broker without Kafka."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from process_helpers import command, running, settings_in

from penstock_broker import remote
from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_protocol import signature
from penstock_protocol.v1 import admin_pb2, consumer_pb2, producer_pb2
from penstock_protocol.v1.activation_pb2 import TaskActivation

SECRET = "departing"


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A broker runs; the settings of it."""
    with running(settings_in(tmp_path, SECRET), tmp_path / "log") as environment:
        yield environment


def call(environment: dict[str, str], service: str, method: str, request: object) -> bytes:
    path, body = f"/penstock.v1.{service}/{method}", request.SerializeToString()  # type: ignore[attr-defined]
    metadata = ((signature.HEADER, signature.sign(SECRET, path, body)),)
    with grpc.insecure_channel(f"127.0.0.1:{environment['TASKBROKER_GRPC_PORT']}") as channel:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        return unary(body, timeout=20, metadata=metadata)


def test_a_drain_says_what_could_not_leave_and_goes_on_when_asked_again(environment: dict[str, str]) -> None:
    activations = [
        TaskActivation(id=f"t{n}", application="shop", namespace="pay", taskname="t") for n in "ab"
    ]
    call(environment, "ProducerService", "SendTasks", producer_pb2.SendTasksRequest(activations=activations))
    drained = command(environment, "drain", "--grace-seconds", "2.5")
    assert drained.returncode == 1
    assert "finishing tasks: 0 ended here" in drained.stdout
    assert "left: 2 pending" in drained.stdout.splitlines()[-1]
    assert "no topic to hand tasks over to" in drained.stderr
    with pytest.raises(grpc.RpcError, match="drain"):
        call(
            environment,
            "ProducerService",
            "SendTasks",
            producer_pb2.SendTasksRequest(activations=activations),
        )
    request = consumer_pb2.GetTasksRequest(max_tasks=9)
    claimed = consumer_pb2.GetTasksResponse.FromString(
        call(environment, "ConsumerService", "GetTasks", request)
    )
    complete = consumer_pb2.TASK_OUTCOME_STATUS_COMPLETE
    outcomes = [consumer_pb2.TaskOutcome(claim_token=t.claim_token, status=complete) for t in claimed.tasks]
    reports = consumer_pb2.SetTaskStatusesRequest(outcomes=outcomes)
    call(environment, "ConsumerService", "SetTaskStatuses", reports)
    drained = command(environment, "drain", "--grace-seconds", "5")
    assert drained.returncode == 0, drained.stderr
    assert drained.stdout.splitlines()[-1] == "drained: 2 ended here, 0 handed over; left: none"


def test_mistakes_are_explained(environment: dict[str, str]) -> None:
    adopted = command(environment, "adopt", "broker-2")
    assert adopted.returncode == 1
    assert "this broker consumes no topic" in adopted.stderr
    wrong = command(environment | {"TASKBROKER_GRPC_SHARED_SECRET": "other"}, "drain")
    assert wrong.returncode == 1
    assert "TASKBROKER_GRPC_SHARED_SECRET" in wrong.stderr
    nobody = command(environment, "drain", "--grpc-port", "1")
    assert nobody.returncode == 1
    assert "no broker answers at 127.0.0.1:1" in nobody.stderr


@pytest.mark.parametrize(
    "why",
    [
        "the broker's disk does not take what is written (disk I/O error): repeat the call",
        "the broker is stopping",
    ],
)
def test_a_broker_that_cannot_do_it_now_says_why(why: str) -> None:
    def refuse(_: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, why)
        return b""

    class Failing(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined]
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Failing()])
    settings = Settings(grpc_port=server.add_insecure_port("127.0.0.1:0"))
    server.start()
    try:
        with pytest.raises(FatalError) as caught:
            remote.call(settings, "Drain", admin_pb2.DrainRequest(), admin_pb2.DrainResponse)
    finally:
        server.stop(None)
    assert caught.value.message == f"the broker at 127.0.0.1:{settings.grpc_port}: {why}"
    assert not caught.value.hint
