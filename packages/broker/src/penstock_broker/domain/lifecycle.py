"""The life of an activation: one table of legal transitions, and the policy that picks among them.

``TRANSITIONS`` says which states an event may lead to; ``decide`` says which one it is for a
given activation. Both are pure. Nothing else in the broker chooses a status.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from penstock_broker.domain.activation import (
    DELAYED,
    FORWARDING,
    GONE,
    PENDING,
    PROCESSING,
    Activation,
    OnExceeded,
    Reason,
    Route,
    Status,
    route_of,
)


class Event(StrEnum):
    """What can happen to an activation."""

    CLAIM = "claim"
    COMPLETE = "complete"
    IGNORE = "ignore"
    FAIL = "fail"
    RETRY = "retry"
    DEADLINE_EXCEEDED = "deadline exceeded"
    WORKER_DIED = "worker died"
    LEASE_LOST = "lease lost"
    RELEASE = "release"
    UNKNOWN_TASK = "unknown task"
    ARGUMENTS_MISMATCH = "arguments mismatch"
    DUE = "due"
    RUN_NOW = "run now"
    EXPIRE = "expire"
    EXPIRED_AT_START = "expired at start"
    UNCLAIMED = "unclaimed"
    CANCEL = "cancel"
    HAND_OVER = "hand over"
    OVERFLOW = "overflow"
    FORWARDED = "forwarded"
    REFUSED = "refused"
    SEND_UNKNOWN = "send unknown"


COMPLETE = Event.COMPLETE


class Transition(NamedTuple):
    """Where an event may lead, and why in one sentence."""

    to: frozenset[Status]
    why: str


_P, _D, _R, _F, _G = PENDING, DELAYED, PROCESSING, FORWARDING, GONE


def _t(why: str, *to: Status) -> Transition:
    return Transition(frozenset(to), why)


TRANSITIONS: dict[tuple[Status, Event], Transition] = {
    (_P, Event.CLAIM): _t("A worker fetched it.", _R),
    (_P, Event.COMPLETE): _t("Reported under a claim that a restart had forgotten.", _G),
    (_P, Event.IGNORE): _t("Reported under a claim that a restart had forgotten.", _G),
    (_P, Event.FAIL): _t("Reported under a claim that a restart had forgotten.", _F, _G),
    (_P, Event.RETRY): _t("Reported under a claim that a restart had forgotten.", _P, _D, _F, _G),
    (_P, Event.DEADLINE_EXCEEDED): _t("Reported under a claim that a restart had forgotten.", _P, _D, _F, _G),
    (_P, Event.WORKER_DIED): _t("Reported under a claim that a restart had forgotten.", _P, _F),
    (_P, Event.RELEASE): _t("Given back under a claim that a restart had forgotten.", _P),
    (_P, Event.UNKNOWN_TASK): _t("Given back under a claim that a restart had forgotten.", _D, _F),
    (_P, Event.ARGUMENTS_MISMATCH): _t("Given back under a claim that a restart had forgotten.", _D, _F),
    (_P, Event.EXPIRED_AT_START): _t("Reported under a claim that a restart had forgotten.", _F, _G),
    (_P, Event.EXPIRE): _t("Its time to start has passed.", _F, _G),
    (_P, Event.UNCLAIMED): _t("No worker has asked for its namespace for too long.", _F),
    (_P, Event.CANCEL): _t("An operator cancelled it.", _G),
    (_P, Event.HAND_OVER): _t("The broker is being drained; another one runs it.", _F),
    (_P, Event.OVERFLOW): _t("Its namespace has its share of the store; it waits in Kafka.", _F),
    (_D, Event.DUE): _t("Its delay or back-off is over.", _P),
    (_D, Event.RUN_NOW): _t("An operator wants it now, whatever is left of its delay or back-off.", _P),
    (_D, Event.EXPIRE): _t("Its time to start has passed.", _F, _G),
    (_D, Event.CANCEL): _t("An operator cancelled it.", _G),
    (_D, Event.HAND_OVER): _t("The broker is being drained; another one runs it.", _F),
    (_D, Event.OVERFLOW): _t("Its namespace has its share of the store; it waits in Kafka.", _F),
    (_R, Event.COMPLETE): _t("The worker finished it.", _G),
    (_R, Event.IGNORE): _t("It ended in an exception that counts as done.", _G),
    (_R, Event.FAIL): _t("It failed for good: dead letter, or discarded by its policy.", _F, _G),
    (_R, Event.RETRY): _t("It failed and has attempts left, or has run out of them.", _P, _D, _F, _G),
    (_R, Event.DEADLINE_EXCEEDED): _t(
        "Its worker killed it at the deadline: a failed attempt.", _P, _D, _F, _G
    ),
    (_R, Event.WORKER_DIED): _t("The process that ran it died: a lost delivery.", _P, _F),
    (_R, Event.LEASE_LOST): _t(
        "Its worker vanished, or its bound on this side passed: a lost delivery.", _P, _F
    ),
    (_R, Event.RELEASE): _t("Given back before it started.", _P),
    (_R, Event.UNKNOWN_TASK): _t("This worker does not know it; another may.", _D, _F),
    (_R, Event.ARGUMENTS_MISMATCH): _t("Its arguments do not fit this worker's code; another's may.", _D, _F),
    (_R, Event.EXPIRED_AT_START): _t("It had expired when the worker was about to start it.", _F, _G),
    (_R, Event.CANCEL): _t("An operator cancelled it; its worker learns so and kills it.", _G),
    (_R, Event.HAND_OVER): _t("The broker is being drained, and it did not end in time.", _F),
    (_F, Event.REFUSED): _t("The log refuses it as too large: it stays.", _P, _D),
    (_F, Event.SEND_UNKNOWN): _t("It may have gone where it starts, too long ago to be sent again.", _F),
    (_F, Event.FORWARDED): _t("The log acknowledged it, or it rests in the store's own dead letters.", _G),
}

# Outcomes that may be reported a second time, with the number that is stored for them; and how a claim
# ends that an operator cancelled, so that its worker is told.
OUTCOMES: dict[Event, int] = {
    Event.COMPLETE: 1,
    Event.IGNORE: 2,
    Event.FAIL: 3,
    Event.RETRY: 4,
    Event.DEADLINE_EXCEEDED: 5,
    Event.WORKER_DIED: 6,
    Event.EXPIRED_AT_START: 7,
    Event.RELEASE: 8,
    Event.UNKNOWN_TASK: 9,
    Event.ARGUMENTS_MISMATCH: 10,
    Event.CANCEL: 11,
}

GIVE_BACK_MIN_MS = 1_000
GIVE_BACK_MAX_MS = 60_000


class IllegalTransition(Exception):
    """An event met an activation in a state the table does not allow: a broken invariant."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The operator's bounds that the policy needs."""

    max_deliveries: int = 5
    unknown_task_ms: int = 3_600_000
    # Retries wait in a topic, not in the store.
    retry_topic: bool = False


class Change(NamedTuple):
    """What an event makes of an activation.

    ``term`` is the term of the books it ends in; empty while it is in flight.
    """

    status: Status
    ready_at: int
    claim: int
    attempts: int
    lost: int
    given_back_at: int | None
    reason: str | None
    term: str


def decide(
    row: Activation, event: Event, now: int, limits: Limits, retry_delay_ms: int | None = None
) -> Change:
    """What ``event`` makes of ``row`` at ``now`` (epoch ms).

    ``retry_delay_ms`` replaces the activation's own back-off. Raises IllegalTransition when the
    table has no such event for the row's status.
    """
    legal = TRANSITIONS.get((row.status, event))
    if legal is None:
        raise IllegalTransition(f"{event.value} on a {row.status.name.lower()} activation {row.id!r}")
    change = _DECISIONS[event](row, event, now, limits, retry_delay_ms)
    if change.status not in legal.to:
        raise IllegalTransition(
            f"{event.value}: {row.status.name} -> {change.status.name} is not in the table"
        )
    return change


def _keep(  # noqa: PLR0913 - one for each field that may change
    row: Activation,
    status: Status,
    ready_at: int,
    *,
    claim: int | None = None,
    attempts: int | None = None,
    lost: int | None = None,
    given_back_at: int | None = None,
    reason: str | None = None,
    term: str = "",
) -> Change:
    """``row`` with only what is named changed."""
    return Change(
        status,
        ready_at,
        row.claim if claim is None else claim,
        row.attempts if attempts is None else attempts,
        row.lost if lost is None else lost,
        row.given_back_at if given_back_at is None else given_back_at,
        reason or row.reason,
        term,
    )


# Once for each task, so without _keep and its keywords.
def _claim(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return Change(
        PROCESSING, row.ready_at, row.claim, row.attempts, row.lost, row.given_back_at, row.reason, ""
    )


def _done(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    term = "done" if event is COMPLETE else "done:ignored"
    return Change(GONE, row.ready_at, row.claim, row.attempts, row.lost, row.given_back_at, row.reason, term)


def _give_up(
    row: Activation, reason: Reason, now: int, attempts: int | None = None, ends_claim: bool = True
) -> Change:
    """Dead letter or discard, as the task's policy says; unspecified means discard (taskbroker v1)."""
    if row.on_exceeded is OnExceeded.DEADLETTER:
        return _dead(row, reason, now, attempts=attempts, ends_claim=ends_claim)
    return _keep(row, GONE, now, attempts=attempts, reason=reason, term=f"discarded:{reason}")


def _dead(
    row: Activation,
    reason: Reason,
    now: int,
    attempts: int | None = None,
    lost: int | None = None,
    ends_claim: bool = True,
) -> Change:
    claim = row.claim + ends_claim
    return _keep(row, FORWARDING, now, claim=claim, attempts=attempts, lost=lost, reason=reason)


def _fail(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _give_up(row, Reason.FAILED, now, attempts=row.attempts + 1)


def _retry(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    attempts = row.attempts + 1
    if row.at_most_once or attempts >= row.max_attempts:
        return _give_up(row, Reason.ATTEMPTS_EXHAUSTED, now, attempts=attempts)
    delay = row.retry_delay_ms if delay is None else delay
    if delay:
        delay += 1  # `now` is cut to the millisecond
    if limits.retry_topic:
        return _leave(row, now + delay, Reason.RETRIED, row.claim + 1, attempts)
    # Whoever gave it back before: there is a worker that can run it.
    return _later(row, now, delay, attempts=attempts)._replace(given_back_at=None)


def _leave(
    row: Activation, ready_at: int, reason: Reason, claim: int | None = None, attempts: int | None = None
) -> Change:
    """It goes on elsewhere, not before ``ready_at``."""
    return _keep(row, FORWARDING, ready_at, claim=claim, attempts=attempts, reason=reason)


def _due_at(row: Activation, now: int) -> int:
    """Before which it must not run. The place of one that is ready may be in the future: in the order of a
    clock that was ahead."""
    return row.ready_at if row.status is DELAYED else min(row.ready_at, now)


def _later(
    row: Activation,
    now: int,
    delay_ms: int,
    attempts: int | None = None,
    lost: int | None = None,
    given_back_at: int | None = None,
) -> Change:
    return _keep(
        row,
        DELAYED if delay_ms > 0 else PENDING,
        now + delay_ms,
        claim=row.claim + 1,
        attempts=attempts,
        lost=lost,
        given_back_at=given_back_at,
    )


def _lost(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    lost = row.lost + 1
    if row.at_most_once:
        return _dead(row, Reason.START_UNKNOWN, now, lost=lost)
    if lost >= limits.max_deliveries:
        return _dead(row, Reason.MAX_DELIVERIES, now, lost=lost)
    return _later(row, now, 0, lost=lost)


def _release(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _later(row, now, 0)


def _give_back(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    """Another worker may know it: wait as long as it has waited so far, within bounds."""
    since = now if row.given_back_at is None else row.given_back_at
    if now - since >= limits.unknown_task_ms:
        reason = Reason.UNKNOWN_TASK if event is Event.UNKNOWN_TASK else Reason.ARGUMENTS_MISMATCH
        return _dead(row, reason, now)
    wait = min(max(now - since, GIVE_BACK_MIN_MS), GIVE_BACK_MAX_MS)
    return _later(row, now, wait, given_back_at=since)


def _due(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _keep(row, PENDING, now)


def _expire(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _give_up(row, Reason.EXPIRED, now, ends_claim=event is Event.EXPIRED_AT_START)


def _unclaimed(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _dead(row, Reason.UNCLAIMED, now, ends_claim=False)


def _cancel(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _keep(row, GONE, now, reason=Reason.CANCELLED, term="cancelled")


def _hand_over(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    if row.at_most_once and row.status is PROCESSING:
        return _dead(row, Reason.START_UNKNOWN, now)
    return _leave(row, _due_at(row, now), Reason.HANDED_OVER, row.claim + (row.status is PROCESSING))


def _overflow(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _leave(row, _due_at(row, now), Reason.OVERFLOW)


def _refused(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _keep(row, DELAYED if row.ready_at > now else PENDING, row.ready_at)


def _send_unknown(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    return _dead(row, Reason.START_UNKNOWN, now, ends_claim=False)


def _forwarded(row: Activation, event: Event, now: int, limits: Limits, delay: int | None) -> Change:
    dead = route_of(row.reason) is Route.DEAD_LETTER
    return _keep(row, GONE, now, term=f"dead:{row.reason}" if dead else str(row.reason))


_DECISIONS = {
    Event.CLAIM: _claim,
    Event.COMPLETE: _done,
    Event.IGNORE: _done,
    Event.FAIL: _fail,
    Event.RETRY: _retry,
    Event.DEADLINE_EXCEEDED: _retry,
    Event.WORKER_DIED: _lost,
    Event.LEASE_LOST: _lost,
    Event.RELEASE: _release,
    Event.UNKNOWN_TASK: _give_back,
    Event.ARGUMENTS_MISMATCH: _give_back,
    Event.DUE: _due,
    Event.RUN_NOW: _due,
    Event.EXPIRE: _expire,
    Event.EXPIRED_AT_START: _expire,
    Event.UNCLAIMED: _unclaimed,
    Event.CANCEL: _cancel,
    Event.HAND_OVER: _hand_over,
    Event.OVERFLOW: _overflow,
    Event.REFUSED: _refused,
    Event.SEND_UNKNOWN: _send_unknown,
    Event.FORWARDED: _forwarded,
}
