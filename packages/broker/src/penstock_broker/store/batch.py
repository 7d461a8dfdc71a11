"""What one tick writes and reads: gathered on the event loop, carried out in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from penstock_broker.domain.activation import (
    DELAYED,
    PENDING,
    PROCESSING,
    Activation,
    Status,
)
from penstock_broker.domain.lifecycle import Change, Event
from penstock_broker.store.ledger import State

if TYPE_CHECKING:
    from penstock_broker.store.database import Database


# Of new bodies in one tick; the last arrival may exceed it.
TICK_BYTES_MAX = 8 * 1024 * 1024


# Terms of the books by which rows come in: from their producer, or as what is left of a broker's disk.
ARRIVALS = ("accepted", "restored", "adopted")


class Move(NamedTuple):
    """The new mutable state of a row that stays, and the status and claim it is expected to have."""

    seq: int
    from_status: int
    from_claim: int
    status: int
    ready_at: int
    wake_at: int | None
    spilled: int
    claim: int
    attempts: int
    lost: int
    last_outcome: int
    given_back_at: int | None
    reason: str | None
    error: str | None
    max_attempts: int
    retry_delay_ms: int
    claim_epoch: int


def wake_at(status: int, ready_at: int, expires_at: int | None) -> int | None:
    """When time alone changes a row in its state; None when it does not."""
    if status == DELAYED:
        return ready_at if expires_at is None else min(ready_at, expires_at)
    return expires_at if status == PENDING else None


def move(row: Activation, change: Change, last_outcome: int, ready_at: int, error: str | None) -> Move:
    """The write that makes the stored row what ``change`` says; a pending one leaves memory (spilled)."""
    return Move(
        row.seq,
        int(row.status),
        row.claim,
        int(change.status),
        ready_at,
        wake_at(change.status, ready_at, row.expires_at),
        int(change.status is PENDING),
        change.claim,
        change.attempts,
        change.lost,
        row.last_outcome if change.claim == row.claim else last_outcome,
        change.given_back_at,
        change.reason,
        error or row.error,
        row.max_attempts,
        row.retry_delay_ms,
        row.claim_epoch,
    )


class PageRequest(NamedTuple):
    """The next spilled rows of a pair, after the order key of the last one in memory."""

    pair: int
    after_ready_at: int
    after_seq: int
    rows: int
    bytes: int


class Answer(IntEnum):
    """What became of a report. The numbers are those of OutcomeAnswer on the wire."""

    APPLIED = 1
    DUPLICATE = 2
    STALE = 3
    UNKNOWN = 4


def repeated(row: Activation, claim: int, epoch: int, outcome: int) -> Answer:
    """The answer to a report under another claim than the row's: the one before it, once more, or stale.

    The epoch belongs to it: a claim that a restart forgot has the number of the one that was made anew.
    """
    same = row.claim == claim + 1 and row.claim_epoch == epoch and row.last_outcome == outcome
    return Answer.DUPLICATE if same else Answer.STALE


@dataclass(slots=True)
class Report:
    """An event for a row that memory does not hold; decided against the row, in the tick.

    ``claim`` None: the row's own claim, whatever it is (what time or an operator causes).
    """

    event: Event
    now: int
    seq: int
    claim: int | None = None
    # The epoch of that claim.
    epoch: int = 0
    # The number of the outcome; 0 for what time or the broker causes.
    outcome: int = 0
    # Only from these states; what a client without tokens may settle.
    only: frozenset[Status] = frozenset(Status)
    retry_delay_ms: int | None = None
    max_attempts: int | None = None
    error: str | None = None
    # Only if the row was last claimed before this epoch.
    before_epoch: int | None = None
    # Filled by the tick: the row as it was, what it became, and the answer.
    row: Activation | None = None
    change: Change | None = None
    answer: Answer = Answer.STALE

    def may_meet(self, row: Activation) -> bool:
        """Whether ``row``, under the claim that it names, is in a state that this is for."""
        before = self.before_epoch
        if row.status in self.only and (before is None or row.claim_epoch < before):
            return True
        # A heartbeat may have re-established that claim since this was told.
        return self.claim is not None and row.status is PROCESSING and row.claim_epoch == self.epoch

    def repeats(self, other: Report) -> bool:
        """Whether it says the same of the same claim as ``other``, which was applied."""
        if self.claim is None or other.answer is not Answer.APPLIED:
            return False
        return (self.seq, self.claim, self.epoch, self.outcome) == (
            other.seq,
            other.claim,
            other.epoch,
            other.outcome,
        )


def keep_said(row: Activation, max_attempts: int | None, retry_delay_ms: int | None) -> None:
    """What a taskbroker v1 client says with a retry is the row's from then on."""
    if max_attempts is not None:
        row.max_attempts = max_attempts
    if retry_delay_ms is not None:
        row.retry_delay_ms = retry_delay_ms


@dataclass(slots=True)
class Batch:
    """One tick's work. Claims and outcomes are never refused; rows are limited by the writer."""

    rows: list[Activation] = field(default_factory=list)
    claims: list[int] = field(default_factory=list)
    # Claims that a restart had forgotten, under their epoch: (seq, epoch).
    reclaims: list[tuple[int, int]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    # Those of ``gone`` whose body has a row of its own.
    gone_payloads: list[int] = field(default_factory=list)
    # Of those of ``gone`` that may be asked about again, one after the other: id hash, packed claim and
    # outcome.
    finished: list[int] = field(default_factory=list)
    # Wall clock of the tick.
    now: int = 0
    # Rows that are new take this place in the order of hand-out; rows that come back take the place
    # after it, so that nothing ever enters before what memory holds. The wall clock, unless that was ahead.
    stamp: int = 0
    reports: list[Report] = field(default_factory=list)
    # Wall clock up to which delays and expiries are due; None: do not look.
    due_at: int | None = None
    pages: list[PageRequest] = field(default_factory=list)
    new_pairs: list[tuple[int, str, str]] = field(default_factory=list)
    # For the ledger: places in the log whose rows leave, and those whose rows have another state.
    left: list[int] = field(default_factory=list)
    kept: list[tuple[int, State | None]] = field(default_factory=list)
    # source id -> (topic, partition, start, next, covered, topic id)
    sources: dict[int, tuple[str, int, int, int, int, str]] = field(default_factory=dict)
    books: dict[tuple[int, str], int] = field(default_factory=dict)
    # Rare work on the database that belongs into the tick's order, after the writes above. A tick that
    # the disk did not take is written again: so may each of these be called again.
    calls: list[Callable[[Database], None]] = field(default_factory=list)
    # What the event loop does when the tick is committed.
    then: list[Callable[[], None]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.rows
            or self.claims
            or self.reclaims
            or self.moves
            or self.gone
            or self.reports
            or self.due_at is not None
            or self.pages
            or self.new_pairs
            or self.sources
            or self.books
            or self.calls
        )

    def reenters(self) -> bool:
        """Whether rows may come back to pending in this tick."""
        return bool(self.moves or self.reports or self.due_at is not None)

    def count(self, pair: int, term: str, n: int = 1) -> None:
        key = (pair, term)
        self.books[key] = self.books.get(key, 0) + n


class Damaged(NamedTuple):
    """A row that was set aside, as memory counts it."""

    seq: int
    pair: int
    status: int
    size: int


@dataclass(slots=True)
class Written:
    """What a tick found out."""

    # The disk is nearly full.
    disk_low: bool = False
    damaged: list[Damaged] = field(default_factory=list)
    # Delayed rows that became pending (and spilled), per pair.
    due: dict[int, int] = field(default_factory=dict)
    # Rows whose expiry has passed.
    expired: list[int] = field(default_factory=list)
    # Next wall clock time at which a delay or expiry is due; filled when due_at was set.
    next_wake_at: int | None = None
    pages: dict[int, list[Activation]] = field(default_factory=dict)
