"""Secrets and payloads are in no log, no error and no metric, whatever goes wrong."""

from __future__ import annotations

import json
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock_client import App
from penstock_client.settings import load_settings
from penstock_protocol import signature
from penstock_protocol.payload import compress, encode_parameters
from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1 import producer_pb2, raw_pb2
from penstock_protocol.v1.activation_pb2 import TaskActivation
from tests.e2e.harness import Broker, Pool, eventually

# One for each place, so that a leak says where it came from. None is a word of anything else.
SECRET, OLD_SECRET, WRONG_SECRET = "canary-secret-3f9a", "canary-older-77d1", "canary-wrong-51cc"
ARGUMENT, HEADER, POISON = "canary-argument-8e02", "canary-header-d4b7", "canary-poison-a6f3"
CANARIES = (SECRET, OLD_SECRET, WRONG_SECRET, ARGUMENT, HEADER, POISON)
SEND, GET = "/penstock.v1.ProducerService/SendTasks", "/penstock.v1.ConsumerService/GetTasks"


def call(broker: Broker, path: str, body: bytes, secret: str | None = SECRET) -> bytes:
    metadata = ((signature.HEADER, signature.sign(secret, path, body)),) if secret else ()
    with grpc.insecure_channel(broker.address) as channel:
        raw: Any = channel.unary_unary(path)
        answer: bytes = raw(body, metadata=metadata, timeout=10)
    return answer


def activation(taskname: str, parameters: bytes, **headers: str) -> bytes:
    message = TaskActivation(
        id=uuid.uuid4().hex,
        application="e2e",
        namespace="main",
        taskname=taskname,
        parameters_bytes=parameters,
        headers={"authorization": HEADER, **headers},
    )
    message.retry_state.max_attempts = 2
    message.retry_state.on_attempts_exceeded = 2  # type: ignore[assignment]
    return message.SerializeToString()


def all_that_can_go_wrong() -> list[bytes]:
    packed = encode_parameters([ARGUMENT], {})
    extra = encode_parameters([ARGUMENT], {"x": ARGUMENT, "y": [ARGUMENT]})
    broken = b"\xc1" + ARGUMENT.encode()
    old = TaskActivation(id="old", application="e2e", namespace="main", taskname="noop")
    old.parameters = '{"args": ["' + ARGUMENT
    return [
        activation("noop", packed),
        activation("sleep", packed),  # raises: not a number
        activation("flaky", packed),  # raises, and is retried
        activation("noop", extra),  # does not fit
        activation("hopeless", packed),  # neither
        activation("nobody.knows", packed),
        activation("noop", broken),
        activation("noop", broken, **{"compression-type": "zstd"}),
        activation("noop", compress(broken), **{"compression-type": "zstd"}),
        activation("stuck", encode_parameters([], {})),
        activation("exit", encode_parameters([], {})),
        activation("crash", encode_parameters([], {})),
        old.SerializeToString(),
        # No activations at all.
        json.dumps({"id": POISON}).encode(),
        b"\xff\xff" + POISON.encode(),
        TaskActivation(namespace="main", parameters_bytes=POISON.encode()).SerializeToString(),
    ]


def metrics_text(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.timeout(240)
def test_no_secret_and_no_payload_is_ever_shown(direct_pool: Pool) -> None:
    secrets = json.dumps([SECRET, OLD_SECRET])
    broker = direct_pool.broker(
        GRPC_SHARED_SECRET=secrets, LOG_LEVEL="debug", LEASE_SECONDS="5", MAX_DELIVERIES="2"
    )
    worker = direct_pool.worker([broker], TASKBROKER_GRPC_SHARED_SECRET=SECRET)
    stranger = direct_pool.worker([broker], name="stranger", TASKBROKER_GRPC_SHARED_SECRET=WRONG_SECRET)
    told: list[str] = []
    request = raw_pb2.RawSendTasksRequest(activations=all_that_can_go_wrong()).SerializeToString()
    answers = producer_pb2.SendTasksResponse.FromString(call(broker, SEND, request)).answers
    told += [answer.reason for answer in answers]
    assert sum(answer.result == producer_pb2.SEND_RESULT_REJECTED for answer in answers) == 3
    for path, body, secret in (
        (SEND, request, None),
        (SEND, request, WRONG_SECRET),
        (SEND, b"\xff" + POISON.encode(), SECRET),
        (GET, pb.GetTasksRequest(namespaces=[POISON]).SerializeToString(), SECRET),
        (GET, b"\xff" + POISON.encode(), OLD_SECRET),
    ):
        with pytest.raises(grpc.RpcError) as error:
            call(broker, path, body, secret)
        refusal: Any = error.value
        told.append(str(refusal.details()))

    def letters() -> float:
        return broker.metrics()["penstock_resting_dead_letters"]

    # The failed, the killed, the dead; what no worker knows or can call is offered again for an hour.
    eventually("what can end has", lambda: letters() >= 8 and broker.held() == 3, 90)
    eventually("the stranger was refused", lambda: "refuses this worker" in stranger.text())
    broker.kill()
    broker.start()
    eventually("the worker is back", lambda: worker.text().count("broker answers") >= 2)
    shown = {process.name: process.text() for process in direct_pool.processes}
    shown |= {"metrics": metrics_text(broker.metrics_port), "answers": "\n".join(told)}
    assert broker.terminate() == 0
    for where, text in shown.items():
        assert text, where
        assert "traceback" in text.lower() or where != "worker", "failures were shown"
        leaked = [canary for canary in CANARIES if canary in text]
        assert not leaked, f"{where} shows {leaked}:\n{text}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("secret", [SECRET, f'["{SECRET}"', f'["{SECRET}", 3]', f'{{"a": "{SECRET}"}}'])
def test_a_mistake_in_the_settings_does_not_show_the_secret(direct_pool: Pool, secret: str) -> None:
    broker = direct_pool.broker("wrong", start=False, GRPC_SHARED_SECRET=secret, MAX_DELIVERIES="many")
    broker.start(serving=False)
    assert broker.wait(20) != 0
    worker = direct_pool.worker(["127.0.0.1:1"], TASKBROKER_GRPC_SHARED_SECRET=secret)
    if secret.startswith("["):
        assert worker.wait(20) != 0
    else:
        eventually("it has tried", lambda: "does not answer" in worker.text())
    for process in direct_pool.processes:
        assert SECRET not in process.text(), process.text()


def test_settings_of_a_producer_do_not_show_the_secret(tmp_path: Path) -> None:
    settings = load_settings({"broker": "127.0.0.1:1", "grpc_shared_secret": SECRET})
    app = App("e2e", broker="127.0.0.1:1", grpc_shared_secret=SECRET)
    for shown in (repr(settings), str(settings), repr(app), repr(app.settings)):
        assert SECRET not in shown
