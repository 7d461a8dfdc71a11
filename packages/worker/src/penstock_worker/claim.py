"""A task this worker holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from penstock_protocol.v1.activation_pb2 import TaskActivation
from penstock_worker.errors import bounded
from penstock_worker.frames import Assignment

if TYPE_CHECKING:
    from penstock_worker.link import BrokerLink


@dataclass(slots=True, eq=False)
class Claim:
    """Held from the answer that brought it until its broker has answered its outcome."""

    link: BrokerLink
    assignment: Assignment
    # Execution budget, counted from the start.
    deadline_seconds: float
    # Monotonic clock; None: not started.
    started_at: float | None = None
    ended: bool = False
    # Set when the broker took it back: what for ("stale", "unknown", "cancelled").
    revoked: str | None = None

    @property
    def number(self) -> int:
        return self.assignment.number

    @property
    def token(self) -> bytes:
        return self.assignment.claim_token

    @property
    def title(self) -> str:
        """What logs call it. Read from the activation only then: the parent parses no others."""
        try:
            activation = TaskActivation.FromString(self.assignment.activation)
        except DecodeError:
            return "not an activation"
        return bounded(f"{activation.taskname} {activation.id}", 300)

    @property
    def size_bytes(self) -> int:
        return len(self.assignment.activation)
