"""What is an activation, what of it is believed, and what the others are told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_broker.domain.activation import Activation, OnExceeded, Reason, Status
from penstock_broker.ingest.admission import (
    COUNTED_MAX,
    DURATION_SECONDS_MAX,
    ID_CHARS_MAX,
    NAMESPACE_CHARS_MAX,
    TASKNAME_CHARS_MAX,
    Admission,
    AdmissionLimits,
    position_id,
)
from penstock_protocol.v1.activation_pb2 import (
    ON_ATTEMPTS_EXCEEDED_DEADLETTER,
    RetryState,
    TaskActivation,
)

NOW = 1_800_000_000_000
DAY_MS = 86_400_000
LIMITS = AdmissionLimits(message_bytes_max=100_000, deadline_default_ms=30_000)


def task(**fields: object) -> TaskActivation:
    message = TaskActivation(id="id-1", namespace="emails", taskname="shop.send", application="shop")
    message.received_at.FromMilliseconds(NOW - 1000)
    message.MergeFrom(TaskActivation(**fields))  # type: ignore[arg-type]
    return message


def admit(message: TaskActivation | bytes | None, admission: Admission | None = None) -> Activation:
    value = message.SerializeToString() if isinstance(message, TaskActivation) else message
    admission = admission or Admission(LIMITS)
    return admission.admit(value, NOW, source=3, offset=17, topic="tasks", partition=2)


def why(row: Activation) -> str:
    assert row.status is Status.FORWARDING
    assert row.error is not None
    return str(json.loads(row.error)["message"])


def test_an_activation_keeps_its_bytes_and_gives_its_fields() -> None:
    message = task(
        retry_state=RetryState(
            attempts=1,
            max_attempts=4,
            on_attempts_exceeded=ON_ATTEMPTS_EXCEEDED_DEADLETTER,
            at_most_once=True,
            delay_on_retry=7,
        ),
        processing_deadline_duration=9,
        expires=60,
        parameters_bytes=b"\x80",
    )
    row = admit(message)
    assert row.body == message.SerializeToString()
    assert row.size == len(row.body)
    assert (row.id, row.application, row.namespace, row.taskname) == ("id-1", "shop", "emails", "shop.send")
    assert (row.received_at, row.ready_at, row.expires_at) == (NOW - 1000, NOW - 1000, NOW + 59_000)
    assert (row.deadline_ms, row.retry_delay_ms) == (9000, 7000)
    assert (row.attempts, row.max_attempts, row.on_exceeded) == (1, 4, OnExceeded.DEADLETTER)
    assert row.at_most_once
    assert (row.source, row.offset, row.status) == (3, 17, Status.PENDING)


def test_what_is_absent_has_a_meaning() -> None:
    row = admit(TaskActivation(id="a", taskname="t"))
    assert (row.application, row.namespace) == ("", "")
    assert (row.received_at, row.ready_at, row.expires_at) == (NOW, NOW, None)
    assert (row.deadline_ms, row.max_attempts, row.retry_delay_ms) == (30_000, 1, 0)
    assert row.on_exceeded is OnExceeded.UNSPECIFIED
    assert not row.at_most_once
    assert admit(task(retry_state=RetryState())).max_attempts == 1


@pytest.mark.parametrize(
    ("delay", "status", "ready_at"),
    [
        (0, Status.PENDING, NOW - 1000),
        (1, Status.PENDING, NOW),
        (2, Status.DELAYED, NOW + 1000),
        (2**64 - 1, Status.DELAYED, NOW - 1000 + DURATION_SECONDS_MAX * 1000),
    ],
)
def test_a_delay_counts_from_when_it_was_sent(delay: int, status: Status, ready_at: int) -> None:
    row = admit(task(delay=delay))
    assert (row.status, row.ready_at) == (status, ready_at)


@pytest.mark.parametrize("sent_at", [NOW - 1, NOW - 999, NOW - 1_001])
@pytest.mark.parametrize(("beyond_ns", "later"), [(0, 0), (1, 1), (999_999, 1)])
def test_a_delay_counts_from_the_millisecond_it_was_sent(sent_at: int, beyond_ns: int, later: int) -> None:
    """From its end, if it was sent within one; an expiry from its beginning."""
    message = task(delay=3, expires=5)
    message.received_at.FromNanoseconds(sent_at * 1_000_000 + beyond_ns)
    row = admit(message)
    assert (row.received_at, row.ready_at) == (sent_at, sent_at + 3_000 + later)
    assert row.expires_at == sent_at + 5_000


def test_expiry_in_the_same_second_is_kept_and_left_to_the_store() -> None:
    assert admit(task(expires=0)).expires_at == NOW - 1000


def test_content_is_the_task_and_its_arguments_not_when_or_how_it_was_sent() -> None:
    first = admit(task(parameters_bytes=b"1")).content
    again = task(parameters_bytes=b"1", headers={"traceparent": "x"}, delay=3, expires=9)
    again.received_at.FromMilliseconds(NOW)
    assert admit(again).content == first > 0
    others = (
        task(parameters_bytes=b"2"),
        task(parameters_bytes=b"1", parameters="{}"),
        task(parameters_bytes=b"1", taskname="shop.sent"),
        task(parameters_bytes=b"1", namespace="shop.send"),
        task(parameters_bytes=b"1", application="other"),
    )
    assert first not in [admit(other).content for other in others]


def test_huge_numbers_are_bounded() -> None:
    most = 2**64 - 1
    row = admit(
        task(
            expires=most,
            processing_deadline_duration=most,
            retry_state=RetryState(delay_on_retry=most, max_attempts=2**32 - 1, attempts=2**32 - 1),
        )
    )
    ten_years = DURATION_SECONDS_MAX * 1000
    assert (row.expires_at, row.deadline_ms) == (NOW - 1000 + ten_years, ten_years)
    assert (row.retry_delay_ms, row.max_attempts) == (ten_years, 2**32 - 1)
    assert row.attempts == COUNTED_MAX


@pytest.mark.parametrize("policy", [0, 3, 77, 2**31 - 1, -1])
def test_a_policy_that_is_unspecified_or_unknown_is_none(policy: int) -> None:
    message = task(retry_state=RetryState(max_attempts=2))
    message.retry_state.on_attempts_exceeded = policy  # type: ignore[assignment]
    assert admit(message).on_exceeded is OnExceeded.UNSPECIFIED


@pytest.mark.parametrize(
    ("sent_at", "believed"),
    [
        (NOW, True),
        (NOW + 60_000, True),
        (NOW + 60_001, False),
        (NOW - 7 * DAY_MS, True),
        (NOW - 7 * DAY_MS - 1, False),
        (NOW + 365 * DAY_MS, False),
        (-62_135_596_800_000, False),
    ],
)
def test_a_clock_that_is_wrong_is_replaced_by_ours(sent_at: int, believed: bool) -> None:
    message, admission = task(delay=5), Admission(LIMITS)
    message.received_at.FromMilliseconds(sent_at)
    row = admit(message, admission)
    assert row.received_at == (sent_at if believed else NOW)
    assert row.ready_at == row.received_at + 5000
    assert admission.clocks_corrected == (not believed)


def test_a_timestamp_beyond_any_calendar_is_replaced() -> None:
    message = task()
    message.received_at.seconds, message.received_at.nanos = 2**63 - 1, -(2**31)
    assert admit(message).received_at == NOW


BAD_UTF8 = b"\x0a\x02\xff\xfe" + task().SerializeToString()

POISON = {
    "none": (None, Reason.NOT_AN_ACTIVATION, "empty"),
    "empty": (b"", Reason.NOT_AN_ACTIVATION, "empty"),
    "JSON": (b'{"id": "1", "task": "x"}', Reason.NOT_AN_ACTIVATION, "JSON"),
    "text": (b"hello world, this is no protobuf", Reason.NOT_AN_ACTIVATION, "no serialized"),
    "zeros": (b"\x00" * 64, Reason.NOT_AN_ACTIVATION, "no serialized"),
    "cut": (task().SerializeToString()[:-3], Reason.NOT_AN_ACTIVATION, "no serialized"),
    "bad UTF-8": (BAD_UTF8, Reason.NOT_AN_ACTIVATION, "UTF-8"),
    "other message": (b"\x88\x27\x01", Reason.INVALID, "neither an id nor a taskname"),
    "no id": (TaskActivation(taskname="t"), Reason.INVALID, "no id"),
    "no taskname": (TaskActivation(id="i"), Reason.INVALID, "no taskname"),
    "long id": (task(id="x" * (ID_CHARS_MAX + 1)), Reason.INVALID, "the id has 257 characters; 256"),
    "long namespace": (task(namespace="x" * (NAMESPACE_CHARS_MAX + 1)), Reason.INVALID, "the namespace has"),
    "long application": (task(application="x" * 300), Reason.INVALID, "the application has 300"),
    "long taskname": (task(taskname="x" * (TASKNAME_CHARS_MAX + 1)), Reason.INVALID, "the taskname has"),
    "too large": (task(parameters_bytes=b"x" * 100_000), Reason.INVALID, "message_bytes_max is 100000"),
}


@pytest.mark.parametrize("name", POISON)
def test_poison_becomes_a_dead_letter_that_says_why(name: str) -> None:
    value, reason, text = POISON[name]
    admission = Admission(LIMITS)
    row = admit(value, admission)
    assert text in why(row)
    assert row.reason == reason
    assert admission.refused == {reason: 1}
    original = value.SerializeToString() if isinstance(value, TaskActivation) else value or b""
    assert (row.body, row.size) == (original, len(original))
    assert (row.application, row.namespace, row.taskname) == ("", "", "")
    assert (row.source, row.offset) == (3, 17)
    assert row.id == position_id("tasks", 2, 17)


def test_a_message_at_its_bound_is_admitted() -> None:
    most = LIMITS.message_bytes_max - len(task(parameters="x" * 90_000).SerializeToString()) + 90_000
    row = admit(task(parameters="x" * most))
    assert (row.size, row.status) == (LIMITS.message_bytes_max, Status.PENDING)
    assert "message_bytes_max" in why(admit(task(parameters="x" * (most + 1))))


def test_tasks_of_one_name_keep_their_namespace_and_application() -> None:
    admission = Admission(LIMITS)
    names = [("shop", "emails"), ("shop", "sms"), ("bank", "emails")]
    rows = [admit(task(application=a, namespace=n), admission) for a, n in [*names, *names]]
    assert [(row.application, row.namespace) for row in rows] == [*names, *names]
    assert len({row.content for row in rows}) == 3


def test_labels_at_their_bounds_are_admitted() -> None:
    row = admit(
        task(id="ü" * ID_CHARS_MAX, namespace="n" * NAMESPACE_CHARS_MAX, taskname="t" * TASKNAME_CHARS_MAX)
    )
    assert row.status is Status.PENDING


def test_the_id_of_poison_is_its_position() -> None:
    positions = [("t", 1, 11), ("t", 11, 1), ("u", 1, 11), ("t", 1, 12)]
    assert len({position_id(*position) for position in positions}) == len(positions)
    assert position_id("t", 1, 11) == position_id("t", 1, 11)


@given(st.binary(max_size=300))
def test_no_bytes_are_too_strange(value: bytes) -> None:
    row = admit(value)
    assert row.body == value
    assert (row.status is Status.FORWARDING) == (row.reason is not None)
    assert row.id


@given(st.binary(max_size=40), st.integers(0, 60))
def test_no_damage_is_too_strange(junk: bytes, at: int) -> None:
    good = task(retry_state=RetryState(max_attempts=3), expires=5, delay=3).SerializeToString()
    row = admit(good[:at] + junk + good[at:])
    assert row.received_at <= NOW + 60_000
    assert row.ready_at >= row.received_at or row.status is Status.FORWARDING
    assert 0 <= row.deadline_ms <= DURATION_SECONDS_MAX * 1000
