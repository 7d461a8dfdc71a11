"""What a broker sends on through Kafka for another to go on with: the activation, and where it stands.

The bytes stay as they came; what has changed is appended, which protobuf merges.
"""

from __future__ import annotations

import uuid

from penstock_broker.domain.activation import Activation
from penstock_broker.ingest.dead_letters import Letter
from penstock_protocol.sent_on import original_of
from penstock_protocol.v1.activation_pb2 import TaskActivation

_HOPS = uuid.UUID("0d1c9a52-4f0e-5c53-9a3a-7f6f2b1f6a70")


def sent_on(row: Activation, topic: str, key: str, broker_id: str) -> Letter:
    """``row`` as it goes on in ``topic``. The same row gives the same forward id, whenever it is sent."""
    body = row.body or b""
    message = TaskActivation.FromString(body)
    before = message.sent_on
    # What the broker before appended would grow with each of them.
    body, original = original_of(body, message)
    added = TaskActivation()
    hop = added.sent_on
    hop.forward_id = str(uuid.uuid5(_HOPS, f"{before.forward_id or row.id}/{row.attempts}/{row.reason}"))
    hop.broker = broker_id
    hop.received_at_ms = row.received_at
    hop.due_at_ms = row.ready_at
    hop.deliveries_lost = row.lost
    hop.size = len(body)
    _append_retry_state(row, original, added)
    if row.ready_at > row.received_at:
        # For readers that do not know ``sent_on``: whole seconds, never too early.
        added.delay = -(-(row.ready_at - row.received_at) // 1000)
    return Letter(topic, key, body + added.SerializeToString(), [])


def _append_retry_state(row: Activation, original: TaskActivation, added: TaskActivation) -> None:
    """What a failure, or a taskbroker v1 client with it, has changed."""
    state = original.retry_state
    if row.attempts != state.attempts:
        added.retry_state.attempts = row.attempts
    if row.max_attempts != (state.max_attempts or 1):
        added.retry_state.max_attempts = row.max_attempts
    if row.retry_delay_ms // 1000 != state.delay_on_retry:
        added.retry_state.delay_on_retry = row.retry_delay_ms // 1000
