"""Dead letters: how they are named, and what a replay of one sends."""

from __future__ import annotations

import uuid

from google.protobuf.message import DecodeError

from penstock_protocol.sent_on import original_of
from penstock_protocol.v1.activation_pb2 import TaskActivation

# In the headers of a replayed activation: the id of the first of its line.
ROOT_ID = "penstock-root-id"

_FORWARDS = uuid.UUID("1c0b8d7e-52c5-5b86-8f39-9c3f0a7a54be")
_REPLAYS = uuid.UUID("0d5e3f5c-5a0b-5a7e-9a55-3f6a5f0e6b1d")


def forward_id(id: str, attempts: int, reason: str) -> str:
    """Of a dead letter: the same for the same activation, attempt and reason, so that a copy that was sent
    twice is known as one."""
    return str(uuid.uuid5(_FORWARDS, f"{id}/{attempts}/{reason}"))


def letter_name(forward_id: str, dead_at: int) -> str:
    """Of a dead letter, and of its copies. An id that is sent again can die again in the same way: that is
    another dead letter, by when it died (epoch ms)."""
    return f"{forward_id}/{dead_at}"


def replay_id(letter_name: str, number: int) -> str:
    """Of what the ``number``-th replay (from 1) of a dead letter sends: sent twice, it runs once within the
    de-duplication window."""
    return str(uuid.uuid5(_REPLAYS, f"{letter_name}/{number}"))


def replayed(value: bytes, letter_name: str, number: int, now_ms: int) -> TaskActivation | None:
    """The activation that the ``number``-th replay of a dead letter sends.

    A new one: ``received_at`` is ``now_ms`` (epoch), no attempt was made; its delay and expiry count anew,
    everything else is the original's. None: ``value`` is no activation that could run.
    """
    try:
        activation = TaskActivation.FromString(value)
    except DecodeError:
        return None
    if not (activation.id and activation.taskname):
        return None
    # Of the last broker's are a delay that is told from when the original was received, and a back-off.
    _, activation = original_of(value, activation)
    if ROOT_ID not in activation.headers:
        activation.headers[ROOT_ID] = activation.id
    activation.id = replay_id(letter_name, number)
    activation.received_at.FromMilliseconds(now_ms)
    if activation.HasField("retry_state"):
        activation.retry_state.attempts = 0
    # Deliveries that were lost, and when it was due, are the original's.
    activation.ClearField("sent_on")
    return activation
