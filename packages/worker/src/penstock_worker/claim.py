"""A task this worker holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    # What logs call it, known once a child has parsed it.
    title: str = "task not yet read"

    @property
    def number(self) -> int:
        return self.assignment.number

    @property
    def token(self) -> bytes:
        return self.assignment.claim_token

    @property
    def size_bytes(self) -> int:
        return len(self.assignment.activation)
