"""What a broker appended to an activation that it sent on through Kafka, told from the original."""

from __future__ import annotations

import contextlib

from google.protobuf.message import DecodeError

from penstock_protocol.v1.activation_pb2 import TaskActivation


def original_of(body: bytes, message: TaskActivation) -> tuple[bytes, TaskActivation]:
    """``body``, and ``message`` parsed from it, without what a broker appended, if that can be told."""
    if message.HasField("sent_on"):
        begin = body[: message.sent_on.size]
        with contextlib.suppress(DecodeError):
            original = TaskActivation.FromString(begin)
            # Whoever encoded it anew on its way has put the fields elsewhere.
            if _unchanged(original) == _unchanged(message):
                return begin, original
    return body, message


def _unchanged(message: TaskActivation) -> TaskActivation:
    """What no broker changes."""
    kept = TaskActivation()
    kept.CopyFrom(message)
    for name in ("sent_on", "delay"):
        kept.ClearField(name)
    for name in ("attempts", "max_attempts", "delay_on_retry"):
        kept.retry_state.ClearField(name)
    return kept
