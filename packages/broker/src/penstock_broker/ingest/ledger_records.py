"""The ledger's records: JSON keys and values, so that an operator can read them; offsets as a bitmap.

A ``broker`` record says which store wrote last, and who has taken over from it; a ``range`` record what
was taken of a partition, and which topic of its name that is of; a ``segment`` record which of
SEGMENT_OFFSETS offsets are unfinished. All records of a broker have its name in their keys and are written
by nobody else, its adopter excepted.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from penstock_broker.errors import FatalError
from penstock_broker.ingest.ownership import Me
from penstock_broker.store.ledger import SEGMENT_OFFSETS, Segment, State

_FORMAT = 1
_KINDS = ("broker", "range", "segment")
_TO_DIGITS = bytes.maketrans(b"\0\1", b"01")
_FROM_DIGITS = bytes.maketrans(b"01", b"\0\1")

# Key and value as they are produced; None: the record is void.
Record = tuple[bytes, bytes | None]
# Topic, partition, number of the segment.
Where = tuple[str, int, int]


class Head(NamedTuple):
    """The ``broker`` record."""

    store_id: str
    epoch: int
    # Raised, durably in the store, before each record: an old copy of a database has a lower one.
    sequence: int
    # Epoch ms.
    written_at: int
    # Who has taken over, and whether it has all.
    successor: Me | None = None
    handed: bool = False


class Taken(NamedTuple):
    """A ``range`` record: see ``store.partitions.Source``."""

    start: int
    next: int
    covered: int


@dataclass(slots=True)
class Account:
    """All that the ledger says of one broker."""

    head: Head | None = None
    ranges: dict[tuple[str, int], Taken] = field(default_factory=dict)
    segments: dict[Where, Segment] = field(default_factory=dict)
    # Of which topic of its name each range is; none: an older version wrote it, or Kafka had not said.
    topic_ids: dict[tuple[str, int], str] = field(default_factory=dict)


def head_record(group: str, broker_id: str, head: Head) -> Record:
    return _key("broker", group, broker_id), _value(head._asdict())


def range_record(
    group: str, broker_id: str, topic: str, partition: int, taken: Taken | None, topic_id: str = ""
) -> Record:
    key = _key("range", group, broker_id, topic, partition)
    return key, _value({**taken._asdict(), "topic_id": topic_id}) if taken is not None else None


def segment_record(group: str, broker_id: str, where: Where, segment: Segment) -> Record:
    key = _key("segment", group, broker_id, *where)
    if segment.offsets is None:
        return key, None
    bits = int(segment.offsets.translate(_TO_DIGITS), 2).to_bytes(SEGMENT_OFFSETS // 8, "big")
    states = [[n, *state] for n, state in segment.states.items()]
    unfinished = base64.b64encode(zlib.compress(bits, 1)).decode()
    return key, _value({"unfinished": unfinished, "states": states})


def read_account(records: Iterable[Record], group: str, broker_id: str) -> Account:
    """What ``records``, oldest first, say of one broker; others' are passed over.

    Raises FatalError when one of its own cannot be understood.
    """
    account = Account()
    for key, value in latest(records).items():
        kind, of_group, of_broker, *where = key
        if (of_group, of_broker) != (group, broker_id):
            continue
        try:
            _enter(account, kind, where, json.loads(value))
        except (ValueError, TypeError, KeyError, IndexError, zlib.error):
            raise FatalError(
                f"the record {json.dumps(key)} in the ledger's topic is none that this version can read",
                "if a newer version of the broker wrote it, start that one again; whatever else is under a"
                " broker's keys does not belong there: ask who writes to the topic",
            ) from None
    return account


def _enter(account: Account, kind: str, where: Sequence[Any], data: dict[str, Any]) -> None:
    if data.pop("penstock") != _FORMAT:
        raise ValueError("another format")
    if kind == "broker":
        successor = data.pop("successor")
        account.head = Head(**data, successor=Me(*successor) if successor else None)
    elif kind == "range":
        if topic_id := data.pop("topic_id", ""):
            account.topic_ids[where[0], where[1]] = topic_id
        account.ranges[where[0], where[1]] = Taken(**data)
    else:
        account.segments[where[0], where[1], where[2]] = _segment(data)


def latest(records: Iterable[Record]) -> dict[tuple[Any, ...], bytes]:
    """The last value of each key that is not void."""
    found: dict[tuple[Any, ...], bytes] = {}
    for key, value in records:
        parts = parts_of(key)
        if parts is None:
            continue
        if value is None:
            found.pop(parts, None)
        else:
            found[parts] = value
    return found


def parts_of(key: bytes) -> tuple[Any, ...] | None:
    """What a record is of; None: it is no broker's, but somebody else's who has the topic."""
    try:
        kind, group, broker_id, *where = json.loads(key)
    except (ValueError, TypeError, RecursionError):
        return None
    parts = (kind, group, broker_id, *where)
    return parts if kind in _KINDS and all(isinstance(part, (str, int)) for part in parts) else None


def _segment(data: dict[str, Any]) -> Segment:
    bits = zlib.decompress(base64.b64decode(data["unfinished"]))
    digits = format(int.from_bytes(bits, "big"), f"0{SEGMENT_OFFSETS}b").encode()
    return Segment(digits.translate(_FROM_DIGITS), {n: State(*state) for n, *state in data["states"]})


def _key(*parts: str | int) -> bytes:
    return json.dumps(parts, separators=(",", ":")).encode()


def _value(data: dict[str, object]) -> bytes:
    return json.dumps({"penstock": _FORMAT, **data}, separators=(",", ":")).encode()
