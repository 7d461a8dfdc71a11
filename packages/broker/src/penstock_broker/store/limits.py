"""Bounds of the store."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock_broker.domain.lifecycle import Limits


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bytes count bodies."""

    # The intake pauses at these.
    rows_max: int = 1_000_000
    bytes_max: int = 8 * 1024**3
    # Of both, the part that one namespace may hold; what more comes of it goes to the overflow.
    namespace_share_max: float = 0.5
    # Pending rows held in memory.
    window_rows_max: int = 100_000
    window_bytes_max: int = 64 * 1024**2
    # New rows in one tick.
    batch_rows_max: int = 4096
    dedup_window_ms: int = 3_600_000
    dedup_ids_max: int = 2_000_000
    dead_letters_rest_max: int = 10_000
    # A claim without a heartbeat for this long is lost.
    lease_ms: int = 15_000
    # What a worker gets beyond the deadline before the broker takes a task back by itself.
    grace_ms: int = 3_000
    # Pending rows that no worker asks for become dead letters at this age; 0: never.
    unclaimable_ms: int = 7 * 86_400_000
    lifecycle: Limits = field(default_factory=Limits)
