"""What is read is taken once, in order, and no more of it than there is room for."""

from __future__ import annotations

from dataclasses import dataclass

from confluent_kafka import KafkaError
from ingest_helpers import task_bytes

from penstock_broker.domain.activation import Status
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.gate import IN_FLIGHT_BYTES_MAX, Gate
from penstock_broker.ingest.taking import Tracks

NOW = 1_800_000_000_000


@dataclass
class Message:
    """What the Kafka client hands over."""

    at: int
    text: bytes | None
    of: int = 0
    problem: KafkaError | None = None

    def error(self) -> KafkaError | None:
        return self.problem

    def partition(self) -> int:
        return self.of

    def offset(self) -> int:
        return self.at

    def value(self) -> bytes | None:
        return self.text


def message(at: int, of: int = 0) -> Message:
    return Message(at, task_bytes(f"{of}-{at}"), of)


def tracks() -> Tracks:
    tracks = Tracks("tasks")
    tracks.add(0, source=7, offset=10)
    tracks.add(1, source=8, offset=0)
    return tracks


def test_a_position_that_was_read_is_not_taken_again() -> None:
    """Not even when the de-duplication window has forgotten its id."""
    reading, admission = tracks(), Admission(AdmissionLimits())
    first = reading.take([message(9), message(10), message(12), message(3, of=1)], admission, NOW)
    assert [(row.source, row.offset) for row in first.rows] == [(7, 10), (7, 12), (8, 3)]
    assert first.taken == {0: (7, 13), 1: (8, 4)}
    again = reading.take([message(10), message(12), message(13), message(13)], admission, NOW)
    assert [row.offset for row in again.rows] == [13]
    assert reading.replayed == 4


def test_what_arrives_of_a_partition_that_went_is_dropped() -> None:
    reading, admission = tracks(), Admission(AdmissionLimits())
    reading.remove(1)
    batch = reading.take([message(0, of=1), message(10), message(5, of=2)], admission, NOW)
    assert [row.offset for row in batch.rows] == [10]
    assert set(batch.taken) == {0}


def test_poison_is_taken_like_anything_else() -> None:
    """Its offset is passed only because a row of it leaves as a dead letter."""
    values = [None, b"", b"{}", b"\xff" * 20, task_bytes(""), task_bytes("x", taskname="t" * 600)]
    messages = [Message(10 + n, value) for n, value in enumerate(values)]
    batch = tracks().take([*messages, message(16)], Admission(AdmissionLimits()), NOW)
    assert [row.offset for row in batch.rows] == list(range(10, 17))
    assert [row.status for row in batch.rows] == [Status.FORWARDING] * 6 + [Status.PENDING]
    assert batch.size == sum(len(value or b"") for value in values) + len(task_bytes("0-16"))


def test_an_error_among_messages_holds_up_none_of_them() -> None:
    broken = Message(0, None, problem=KafkaError(KafkaError._TRANSPORT))
    batch = tracks().take([message(10), broken, message(11)], Admission(AdmissionLimits()), NOW)
    assert [row.offset for row in batch.rows] == [10, 11]
    assert batch.errors == [broken]


def test_what_is_on_its_way_counts_as_taken() -> None:
    gate = Gate(1000, 1_000_000)
    gate.open(100)
    assert gate.allowance() == 100
    gate.take(60, 6_000)
    assert gate.allowance() == 40
    gate.take(40, 4_000)
    assert (gate.allowance(), gate.wait(0)) == (0, False)


def test_what_is_stored_makes_room_for_more() -> None:
    gate = Gate(1000, 1_000_000)
    gate.open(100)
    for _ in range(5):
        gate.take(1, IN_FLIGHT_BYTES_MAX)
        assert gate.allowance() == 0
        gate.stored(1, IN_FLIGHT_BYTES_MAX, 100)
        assert gate.allowance() == 100
    assert not gate.in_flight
