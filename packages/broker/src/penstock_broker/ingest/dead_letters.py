"""What a dead letter looks like on Kafka: the original bytes, untouched, and its story in headers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import NamedTuple

from penstock_broker.domain.activation import Activation
from penstock_broker.ingest.admission import is_position_id
from penstock_broker.store.partitions import Source
from penstock_protocol import replay

ERROR_TYPE_CHARS_MAX = 256
ERROR_MESSAGE_CHARS_MAX = 2000
TRACEBACK_CHARS_MAX = 4000


class Letter(NamedTuple):
    """A message to produce."""

    topic: str
    key: str
    value: bytes
    headers: list[tuple[str, str | bytes | None]]


def forward_id(row: Activation) -> str:
    """The same for the same activation, attempt and reason, so that a copy sent twice is known as one."""
    if is_position_id(row):
        return row.id
    return replay.forward_id(row.id, row.attempts, row.reason or "")


def letter(row: Activation, source: Source | None, topic: str, trimmed: bool = False) -> Letter:
    """The dead letter of ``row`` for ``topic``. It came from ``source``; None: over gRPC.

    ``trimmed``: without what can be missed, for a message that Kafka refused as too large.
    """
    headers: dict[str, object] = {"penstock-reason": row.reason or "", "penstock-forward-id": forward_id(row)}
    if source is not None:
        headers |= {
            "penstock-origin-topic": source.topic,
            "penstock-origin-partition": source.partition,
            "penstock-origin-offset": row.offset,
        }
    headers |= {
        "penstock-attempts": row.attempts,
        "penstock-deliveries-lost": row.lost,
        # A row that is on its way out was ready to leave when it died.
        "penstock-dead-at": _time(row.ready_at),
    }
    if not trimmed:
        error = _error(row.error)
        headers |= {
            "penstock-error-type": error.get("type", "")[:ERROR_TYPE_CHARS_MAX],
            "penstock-error-message": error.get("message", "")[:ERROR_MESSAGE_CHARS_MAX],
            "penstock-error-traceback": _both_ends(error.get("traceback", "")),
            "penstock-received-at": _time(row.received_at),
        }
    encoded: list[tuple[str, str | bytes | None]] = [
        (name, str(value).encode("utf-8", "replace")) for name, value in headers.items()
    ]
    return Letter(topic, row.id, row.body or b"", encoded)


def _both_ends(stack: str) -> str:
    """Where it happened is at the end of a traceback, and at the beginning of a crashed child's stack."""
    if len(stack) <= TRACEBACK_CHARS_MAX:
        return stack
    half = TRACEBACK_CHARS_MAX // 2
    return f"{stack[:half]}\n...\n{stack[-half:]}"


def _time(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _error(stored: str | None) -> dict[str, str]:
    """The last error as the store keeps it: JSON of an object."""
    error = json.loads(stored) if stored else {}
    return {name: str(value) for name, value in error.items()}
