"""What was read becomes a batch for the store: pure, on the poll thread, once per message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from confluent_kafka import KafkaError

from penstock_broker.domain.activation import Activation
from penstock_broker.ingest.admission import Admission


class ReadMessage(Protocol):
    """What is used of a message of the Kafka client."""

    def error(self) -> KafkaError | None: ...
    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def value(self) -> bytes | None: ...


class Batch(NamedTuple):
    """Rows in the order of the log, their bytes, and partition -> (source, next offset to read)."""

    rows: list[Activation]
    size: int
    taken: dict[int, tuple[int, int]]
    errors: list[ReadMessage]


class Tracks:
    """The partitions being read, each with its source and the next offset expected."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        # partition -> [source id, next offset]
        self._tracks: dict[int, list[int]] = {}
        # Messages skipped because their position was read before.
        self.replayed = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._tracks)

    def add(self, partition: int, source: int, offset: int) -> None:
        """``partition`` is read from ``offset`` on."""
        self._tracks[partition] = [source, offset]

    def remove(self, partition: int) -> None:
        """It is no longer read; what still arrives of it is dropped."""
        self._tracks.pop(partition, None)

    def next(self, partition: int) -> int:
        """The offset expected next; 0 for one that is not read."""
        track = self._tracks.get(partition)
        return track[1] if track is not None else 0

    def take(self, messages: Sequence[ReadMessage], admission: Admission, now: int) -> Batch:
        """Admit what is new in ``messages``. ``now``: wall clock, epoch ms."""
        rows: list[Activation] = []
        errors: list[ReadMessage] = []
        touched: dict[int, list[int]] = {}
        size = 0
        topic, tracks, admit = self._topic, self._tracks, admission.admit
        for message in messages:
            if message.error() is not None:
                errors.append(message)
                continue
            partition, offset = message.partition(), message.offset()
            if partition is None or offset is None or (track := tracks.get(partition)) is None:
                continue
            if offset < track[1]:
                self.replayed += 1
                continue
            track[1] = offset + 1
            touched[partition] = track
            row = admit(message.value(), now, track[0], offset, topic, partition)
            size += row.size
            rows.append(row)
        return Batch(rows, size, {p: (t[0], t[1]) for p, t in touched.items()}, errors)
