"""Mistakes get a clear message, an exit code, no traceback; and nothing is lost."""

from __future__ import annotations

import socket
import sqlite3
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock_protocol.v1 import consumer_pb2 as pb
from tests.e2e.harness import Broker, Pool, Process, eventually
from tests.e2e.raw_worker import SERVICE
from tests.kafka_server import JavaKafka


def refused(process: Process, *words: str, code: int = 1) -> None:
    """It ended by itself and said why."""
    assert process.wait(20) == code, process.text()
    text = process.text()
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


@pytest.mark.timeout(90)
def test_two_brokers_of_one_id(kafka_pool: Pool) -> None:
    """Each with a database of its own; they take the group's membership from each other until one is told."""
    kafka_pool.create_topic(2)
    # Neither has a ledger, which would tell the second at once that its database is not the one.
    doubles = [kafka_pool.broker(name, BROKER_ID="double", KAFKA_LEDGER_TOPIC="none") for name in ("a", "b")]

    def told() -> list[str]:
        ended = [broker for broker in doubles if not broker.running]
        return [text for broker in ended if "another broker with the id 'double'" in (text := broker.text())]

    eventually("one of them stops", told)
    assert "each broker needs its own broker_id" in told()[0]


@pytest.mark.timeout(60)
def test_a_port_in_use(direct_pool: Pool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        broker = direct_pool.broker(start=False, GRPC_PORT=port)
        broker.start(serving=False)
        refused(broker, port, "in use", "TASKBROKER_GRPC_PORT")


@pytest.mark.timeout(60)
def test_a_database_of_another_broker(direct_pool: Pool) -> None:
    first = direct_pool.broker("first")
    second = direct_pool.broker("second", start=False, DB_PATH=str(first.database))
    second.start(serving=False)
    assert first.process is not None
    refused(second, "in use by another broker", str(first.process.pid), "TASKBROKER_DB_PATH")
    assert first.is_serving()


@pytest.mark.timeout(60)
def test_a_database_that_cannot_be_used(direct_pool: Pool, tmp_path: Path) -> None:
    text = tmp_path / "letter.sqlite"
    text.write_text("Dear reader, " * 500)
    newer = tmp_path / "newer.sqlite"
    ours = direct_pool.broker("ours", DB_PATH=str(newer))
    assert ours.terminate() == 0
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for path, word in ((text, "not a database"), (newer, "schema version 99"), (tmp_path, "cannot open")):
        broker = direct_pool.broker(f"broker-{path.name}", start=False, DB_PATH=str(path))
        broker.start(serving=False)
        refused(broker, str(path), word)
    assert text.read_text() == "Dear reader, " * 500


@pytest.mark.timeout(60)
def test_settings_that_are_wrong(direct_pool: Pool) -> None:
    wrong = direct_pool.broker("wrong", start=False, GRPC_PROT="50051", MAX_DELIVERIES="many")
    wrong.start(serving=False)
    refused(wrong, "TASKBROKER_GRPC_PROT", "TASKBROKER_GRPC_PORT", "max_deliveries", "many", code=2)
    open_to_all = direct_pool.broker("open", start=False, GRPC_ADDR="0.0.0.0")
    open_to_all.start(serving=False)
    refused(open_to_all, "TASKBROKER_GRPC_SHARED_SECRET", "TASKBROKER_INSECURE=1", code=2)


@pytest.mark.timeout(60)
def test_a_topic_that_does_not_exist(kafka_pool: Pool) -> None:
    broker = kafka_pool.broker("without", start=False)
    broker.start(serving=False)
    refused(broker, kafka_pool.topic, "TASKBROKER_CREATE_MISSING_TOPICS")
    creating = kafka_pool.broker("creating", CREATE_MISSING_TOPICS="1", DEFAULT_TOPIC_PARTITIONS="3")
    kafka_pool.worker([creating])
    ref = kafka_pool.app().tasks["noop"].delay().wait(10)
    assert kafka_pool.await_all([ref.id]) == {ref.id: 1}
    eventually("it has all three", lambda: creating.metrics()["penstock_kafka_partitions"] == 3, 20)


@pytest.mark.timeout(90)
def test_kafka_that_is_not_there_at_the_start(own_kafka: JavaKafka, kafka_pool: Pool) -> None:
    kafka_pool.create_topic(1)
    app = kafka_pool.app()
    ref = app.tasks["noop"].delay().wait(10)
    own_kafka.stop()
    try:
        broker = kafka_pool.broker()
        assert "Kafka cannot be reached" in broker.text()
        assert broker.metrics()["penstock_kafka_up"] == 0
    finally:
        own_kafka.start()
    kafka_pool.worker([broker])
    assert kafka_pool.await_all([ref.id]) == {ref.id: 1}


def call(broker: Broker, method: str, request: pb.GetTasksRequest | pb.SetTaskStatusesRequest) -> bytes:
    with grpc.insecure_channel(broker.address) as channel:
        raw: Any = channel.unary_unary(SERVICE + method)
        answer: bytes = raw(request.SerializeToString(), timeout=10)
    return answer


@pytest.mark.timeout(60)
def test_calls_that_are_wrong_and_reports_that_come_twice(direct_pool: Pool) -> None:
    broker = direct_pool.broker()
    with pytest.raises(grpc.RpcError) as error:
        call(broker, "GetTasks", pb.GetTasksRequest(namespaces=["main"], max_tasks=1))
    refusal: Any = error.value
    assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "application" in refusal.details()

    app = direct_pool.app(broker=broker.address)
    app.tasks["noop"].delay().wait(10)
    asked = pb.GetTasksRequest(request_id="r1", application="e2e", max_tasks=5, wait_ms=5_000)
    claimed = pb.GetTasksResponse.FromString(call(broker, "GetTasks", asked))
    # The answer was lost: the same request gives the same claims, bodies and all.
    repeated = pb.GetTasksResponse.FromString(call(broker, "GetTasks", asked))
    assert repeated.tasks == claimed.tasks
    (task,) = claimed.tasks

    def report(token: bytes, status: pb.TaskOutcomeStatus) -> int:
        outcome = pb.TaskOutcome(claim_token=token, status=status)
        answer = call(broker, "SetTaskStatuses", pb.SetTaskStatusesRequest(outcomes=[outcome]))
        return pb.SetTaskStatusesResponse.FromString(answer).answers[0]

    complete, failure = pb.TASK_OUTCOME_STATUS_COMPLETE, pb.TASK_OUTCOME_STATUS_FAILURE
    assert report(b"no token of ours", complete) == pb.OUTCOME_ANSWER_UNKNOWN
    assert report(task.claim_token, complete) == pb.OUTCOME_ANSWER_APPLIED
    assert report(task.claim_token, complete) == pb.OUTCOME_ANSWER_DUPLICATE
    assert report(task.claim_token, failure) == pb.OUTCOME_ANSWER_STALE
    direct_pool.await_empty(broker)


@pytest.mark.timeout(60)
def test_an_application_that_cannot_be_loaded(direct_pool: Pool) -> None:
    for path, words in (
        ("tests.e2e.nowhere:app", ["tests.e2e.nowhere"]),
        ("tests.e2e.tasks:make_app", ["make_app", "not a penstock_client.App"]),
        ("tests.e2e.harness:nothing", ["nothing"]),
    ):
        worker = Process(
            path.replace(":", "-"), direct_pool.folder, ["-m", "penstock_worker", "run", path], {}
        )
        direct_pool.processes.append(worker)
        worker.start()
        refused(worker, *words)
