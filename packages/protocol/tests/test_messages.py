"""The messages: field numbers of taskbroker v1, and the views that carry an activation as bytes."""

from __future__ import annotations

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from penstock_protocol.v1 import activation_pb2, consumer_pb2, producer_pb2, raw_pb2

V1: dict[type[Message], dict[str, int]] = {
    activation_pb2.TaskActivation: {
        "id": 1, "namespace": 2, "taskname": 3, "parameters": 4, "headers": 5, "received_at": 6,
        "retry_state": 7, "processing_deadline_duration": 8, "expires": 9, "delay": 11, "application": 12,
        "parameters_bytes": 13,
    },
    activation_pb2.RetryState: {
        "attempts": 1, "max_attempts": 2, "on_attempts_exceeded": 3, "at_most_once": 4, "delay_on_retry": 5,
    },
    consumer_pb2.GetTaskRequest: {"namespace": 1, "application": 2},
    consumer_pb2.GetTaskResponse: {"task": 1},
    consumer_pb2.FetchNextTask: {"namespace": 1, "application": 2},
    consumer_pb2.SetTaskStatusRequest: {
        "id": 1, "status": 2, "fetch_next_task": 3, "max_attempts": 4, "delay_on_retry": 5,
    },
    consumer_pb2.SetTaskStatusResponse: {"task": 1},
    consumer_pb2.SetBatchActivationStatusRequest: {"updates": 1},
}  # fmt: skip


def test_the_numbers_are_those_of_taskbroker_v1() -> None:
    for message, numbers in V1.items():
        theirs = (f for f in message.DESCRIPTOR.fields if f.number < 100)
        assert {f.name: f.number for f in theirs} == numbers
    status = activation_pb2.TaskActivationStatus
    words = ("PENDING", "PROCESSING", "FAILURE", "RETRY", "COMPLETE")
    assert [status.Value(f"TASK_ACTIVATION_STATUS_{word}") for word in words] == [1, 2, 3, 4, 5]
    exceeded = activation_pb2.OnAttemptsExceeded
    assert [exceeded.Value(f"ON_ATTEMPTS_EXCEEDED_{n}") for n in ("DISCARD", "DEADLETTER")] == [1, 2]


def test_raw_views_are_wire_identical() -> None:
    views: dict[type[Message], type[Message]] = {
        raw_pb2.RawGetTaskResponse: consumer_pb2.GetTaskResponse,
        raw_pb2.RawSetTaskStatusResponse: consumer_pb2.SetTaskStatusResponse,
        raw_pb2.RawClaimedTask: consumer_pb2.ClaimedTask,
        raw_pb2.RawGetTasksResponse: consumer_pb2.GetTasksResponse,
        raw_pb2.RawSendTasksRequest: producer_pb2.SendTasksRequest,
    }
    for raw, whole in views.items():
        theirs = {f.number: f for f in whole.DESCRIPTOR.fields}
        assert theirs.keys() == {f.number for f in raw.DESCRIPTOR.fields}
        for field in raw.DESCRIPTOR.fields:
            other = theirs[field.number]
            assert field.name == other.name
            as_bytes = field.type == FieldDescriptor.TYPE_BYTES and other.type == FieldDescriptor.TYPE_MESSAGE
            assert as_bytes or field.type == other.type
    activation = activation_pb2.TaskActivation(id="a", headers={"k": "v"})
    response = raw_pb2.RawGetTasksResponse(lease_ms=3)
    response.tasks.add(activation=activation.SerializeToString(), claim_token=b"t", attempt=2)
    parsed = consumer_pb2.GetTasksResponse.FromString(response.SerializeToString())
    assert parsed.tasks[0].activation == activation
    assert (parsed.tasks[0].claim_token, parsed.tasks[0].attempt, parsed.lease_ms) == (b"t", 2, 3)


def test_of_a_retry_state_that_is_there_twice_the_last_counts() -> None:
    """The broker appends the current one to the stored bytes."""
    first = activation_pb2.TaskActivation(id="a", retry_state=activation_pb2.RetryState(max_attempts=3))
    second = activation_pb2.TaskActivation(retry_state=activation_pb2.RetryState(attempts=2))
    merged = activation_pb2.TaskActivation.FromString(first.SerializeToString() + second.SerializeToString())
    assert (merged.id, merged.retry_state.attempts, merged.retry_state.max_attempts) == ("a", 2, 3)
