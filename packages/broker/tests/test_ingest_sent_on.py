"""What is sent on arrives as what it was, however often it is sent and whoever takes it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from ingest_helpers import task_bytes

from penstock_broker.domain.activation import Activation, Reason, Status
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.sent_on import sent_on
from penstock_protocol.v1.activation_pb2 import ON_ATTEMPTS_EXCEEDED_DEADLETTER as DEADLETTER
from penstock_protocol.v1.activation_pb2 import (
    RetryState,
    SentOn,
    TaskActivation,
)

NOW = 1_700_000_000_000
DAY_MS = 86_400_000


def admit(value: bytes, now: int = NOW, source: int = 1, offset: int = 0) -> Activation:
    row = Admission(AdmissionLimits()).admit(value, now, source, offset, "tasks", 0)
    assert row.taskname, row.error
    return row


def leave(row: Activation, reason: Reason = Reason.HANDED_OVER) -> bytes:
    row.reason = reason
    return sent_on(row, "tasks", row.id, "broker-1").value


@given(
    attempts=st.integers(0, 9),
    max_attempts=st.integers(1, 9),
    lost=st.integers(0, 9),
    wait_ms=st.integers(-5_000, 100_000),
    age_ms=st.integers(0, 9 * DAY_MS),
    expires=st.one_of(st.none(), st.integers(0, 30 * 86_400)),
    hops=st.integers(1, 4),
)
def test_where_it_stands_goes_with_it(attempts, max_attempts, lost, wait_ms, age_ms, expires, hops) -> None:
    fields = {} if expires is None else {"expires": expires}
    retry = RetryState(attempts=attempts // 2, max_attempts=3, on_attempts_exceeded=DEADLETTER)
    sent = TaskActivation.FromString(
        task_bytes("id-1", retry_state=retry, parameters_bytes=b"\x81", **fields)
    )
    sent.received_at.FromMilliseconds(NOW - age_ms)
    value = sent.SerializeToString()
    row = admit(value, NOW - age_ms)
    row.attempts, row.max_attempts, row.lost, row.ready_at = attempts, max_attempts, lost, NOW + wait_ms
    before = [getattr(row, name) for name in CARRIED]
    sizes, forward_ids = set(), set()
    for _ in range(hops):
        left = leave(row)
        message = TaskActivation.FromString(left)
        # For those that do not know the field: not too early by their clock, and not expired later.
        assert message.retry_state.attempts == attempts
        if wait_ms > 0:
            assert row.received_at + message.delay * 1000 >= row.ready_at
        assert left.startswith(value), "the bytes as they came"
        assert leave(row) == left, "a copy of it has another forward id"
        sizes.add(len(left))
        forward_ids.add(message.sent_on.forward_id)
        row = admit(left)
        assert [getattr(row, name) for name in CARRIED] == before
        assert row.status is (Status.DELAYED if wait_ms > 0 else Status.PENDING)
    assert len(forward_ids) == hops
    assert max(sizes) - min(sizes) <= 8


def test_what_was_encoded_anew_on_its_way_is_not_cut() -> None:
    """As by a program that reads and writes every field, this one unknown to it."""
    state = RetryState(max_attempts=5, on_attempts_exceeded=DEADLETTER, at_most_once=True)
    row = admit(task_bytes("id-1", parameters_bytes=b"x" * 100, retry_state=state, expires=90))
    for _ in range(3):
        left = admit(TaskActivation.FromString(leave(row)).SerializeToString())
        assert [getattr(left, name) for name in CARRIED] == [getattr(row, name) for name in CARRIED]
        row = left


def test_what_grew_when_it_was_encoded_anew_is_not_cut_by_as_much() -> None:
    """The attempts now stand before what the message ends with."""
    state = RetryState(max_attempts=5, on_attempts_exceeded=DEADLETTER)
    row = admit(TaskActivation(id="id-1", taskname="t", retry_state=state, expires=90).SerializeToString())
    expires_after = (row.expires_at or 0) - row.received_at
    row.attempts = 1
    for _ in range(3):
        row = admit(TaskActivation.FromString(leave(row)).SerializeToString())
        assert (row.attempts, row.expires_at) == (1, row.received_at + expires_after)


CARRIED = (
    "id", "application", "namespace", "taskname", "received_at", "ready_at", "expires_at", "deadline_ms",
    "max_attempts", "on_exceeded", "at_most_once", "retry_delay_ms", "attempts", "lost", "content",
)  # fmt: skip


@given(
    st.builds(
        SentOn,
        forward_id=st.text(max_size=300),
        received_at_ms=st.integers(0, 2**64 - 1),
        due_at_ms=st.integers(0, 2**64 - 1),
        deliveries_lost=st.integers(0, 2**32 - 1),
        size=st.integers(0, 2**64 - 1),
    ),
    st.booleans(),
)
def test_anybody_may_write_the_field(hop: SentOn, expires: bool) -> None:
    """It costs nobody but its author."""
    more = {"expires": 10} if expires else {}
    row = admit(task_bytes("id-1", sent_on=hop, **more))
    assert 0 <= row.received_at <= NOW + 60_000
    assert 0 <= row.ready_at <= NOW + 10 * 366 * DAY_MS
    assert row.expires_at is None or row.expires_at == row.received_at + 10_000
    assert TaskActivation.FromString(leave(row)).id == "id-1"


def test_a_forward_id_is_that_of_one_activation() -> None:
    hop = SentOn(forward_id="f")
    first, again, other = (admit(task_bytes(id, sent_on=hop)) for id in ("id-1", "id-1", "id-2"))
    assert first.sent_on == again.sent_on != other.sent_on


def test_whoever_sends_it_on_it_has_the_same_forward_id() -> None:
    """Restored or adopted, it may be sent on by another broker once more."""
    row = admit(task_bytes("id-1"))
    row.reason = Reason.HANDED_OVER
    messages = [TaskActivation.FromString(sent_on(row, "tasks", "k", who).value) for who in ("one", "two")]
    assert len({message.sent_on.forward_id for message in messages}) == 1


def test_nobody_sends_on_over_grpc() -> None:
    row = admit(task_bytes("id-1", sent_on=SentOn(forward_id="f", due_at_ms=NOW * 2)), source=0)
    assert (row.sent_on, row.status) == (0, Status.PENDING)
