"""One accepted activation, as the broker keeps it in a row and in memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from hashlib import blake2b
from struct import Struct


class Status(IntEnum):
    """Where an activation is. The numbers are stored."""

    GONE = 0
    PENDING = 1
    DELAYED = 2
    PROCESSING = 3
    FORWARDING = 4


# By themselves, for where each task passes: to look one up in the class costs ten times as much.
GONE, PENDING, DELAYED, PROCESSING, FORWARDING = Status


class OnExceeded(IntEnum):
    """What becomes of a task that ran out of attempts or expired (RetryState.on_attempts_exceeded)."""

    UNSPECIFIED = 0
    DISCARD = 1
    DEADLETTER = 2


class Reason(StrEnum):
    """Why an activation left without being done. Used in headers, metrics and books."""

    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    FAILED = "failed"
    EXPIRED = "expired"
    MAX_DELIVERIES = "max_deliveries"
    START_UNKNOWN = "start_unknown"
    UNKNOWN_TASK = "unknown_task"
    ARGUMENTS_MISMATCH = "arguments_mismatch"
    CANCELLED = "cancelled"
    NOT_AN_ACTIVATION = "not_an_activation"
    INVALID = "invalid"
    CONFLICT = "conflict"
    UNCLAIMED = "unclaimed"
    HANDED_OVER = "handed_over"
    OVERFLOW = "overflow"
    RETRIED = "retried"


class Route(StrEnum):
    """Where a row that must leave goes. Each has a queue and a pace of its own."""

    DEAD_LETTER = "dead letters"
    HAND_OVER = "handed over tasks"
    OVERFLOW = "overflow"
    RETRY = "retries"


_ROUTES: dict[str, Route] = {
    Reason.HANDED_OVER: Route.HAND_OVER,
    Reason.OVERFLOW: Route.OVERFLOW,
    Reason.RETRIED: Route.RETRY,
}


def route_of(reason: str | None) -> Route:
    """Where a row leaves to for this reason."""
    return _ROUTES.get(reason or "", Route.DEAD_LETTER)


# The source of what came over gRPC: it has no position in a log, so nothing to cover.
NO_SOURCE = 0


@dataclass(slots=True, eq=False)
class Activation:
    """An activation with its mutable state.

    Times ending in ``_at`` are epoch milliseconds of the broker's wall clock, ``_ms`` durations
    in milliseconds. ``seq`` is 0 until the store has numbered it.
    """

    id: str
    application: str
    namespace: str
    taskname: str
    # The serialized TaskActivation exactly as it arrived; None while only the row holds it.
    body: bytes | None
    received_at: int
    # PENDING: place in the order of hand-out. DELAYED: when it becomes pending.
    ready_at: int
    expires_at: int | None = None
    deadline_ms: int = 0
    max_attempts: int = 1
    on_exceeded: OnExceeded = OnExceeded.UNSPECIFIED
    at_most_once: bool = False
    retry_delay_ms: int = 0
    source: int = NO_SOURCE
    offset: int = -1

    status: Status = Status.PENDING
    # Claims that ended with the row kept; part of every claim token.
    claim: int = 0
    # Boot epoch under which the current claim was made; 0 when there is none.
    claim_epoch: int = 0
    # Failed starts, the number the message arrived with included.
    attempts: int = 0
    # Deliveries whose worker died or vanished.
    lost: int = 0
    # The outcome that ended claim number ``claim - 1``; 0 when there was none.
    last_outcome: int = 0
    # When a worker first gave it back as unknown or unfit; None when none did.
    given_back_at: int | None = None
    # FORWARDING: why it leaves.
    reason: str | None = None
    # JSON of the last error or evidence, bounded.
    error: str | None = None

    # What it asks for, as a number below 2**CONTENT_BITS; 0: not known.
    content: int = 0

    seq: int = 0
    pair: int = 0
    # 0: not hashed yet.
    id_hash: int = 0
    # Length of the body in bytes, also while only the row holds it.
    size: int = 0
    # Monotonic milliseconds until which the current claim is held.
    lease_until: int = 0
    # Monotonic milliseconds at which the worker said it started; 0 before.
    started: int = 0
    # Who holds the claim, as far as it has said so since the start.
    worker: str = ""
    # Served without a token (taskbroker v1): reports name the id.
    tokenless: bool = False
    # Pending, and the index may not hold it: it is paged in from the rows when its turn comes.
    spilled: int = 0
    # Room in memory is reserved for it.
    reserved: bool = False
    # While it is accepted: hash of what a copy of it is known by, if a broker sent it on; else 0.
    sent_on: int = 0

    def die(self, reason: Reason, now: int) -> None:
        """It is refused before it is stored: a dead letter since ``now``, or since it became one before."""
        if self.status is not FORWARDING:
            self.ready_at = now
        self.status, self.reason = FORWARDING, reason


CONTENT_BITS = 27
CONTENT_MASK = (1 << CONTENT_BITS) - 1


# Copied for each hash: cheaper than to set one up.
_hasher = blake2b(digest_size=8)
_signed = Struct(">q").unpack


def hash_id(id: str) -> int:
    """A stable signed 64-bit hash of an activation id."""
    hasher = _hasher.copy()
    hasher.update(id.encode("utf-8", "surrogatepass"))
    number: int
    (number,) = _signed(hasher.digest())
    return number
