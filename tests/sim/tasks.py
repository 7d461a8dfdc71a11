"""The tasks of a history: what they are, and what happens when they run."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from penstock_protocol.v1.activation_pb2 import OnAttemptsExceeded, RetryState, TaskActivation
from penstock_protocol.v1.consumer_pb2 import (
    TASK_OUTCOME_STATUS_COMPLETE,
    TASK_OUTCOME_STATUS_FAILURE,
    TASK_OUTCOME_STATUS_IGNORED,
    TASK_OUTCOME_STATUS_RETRY,
)

DISCARD: OnAttemptsExceeded = OnAttemptsExceeded.ON_ATTEMPTS_EXCEEDED_DISCARD
DEADLETTER: OnAttemptsExceeded = OnAttemptsExceeded.ON_ATTEMPTS_EXCEEDED_DEADLETTER
APPLICATIONS = {"shop": ("pay", "mail", "stock"), "blog": ("feed",)}


@dataclass(slots=True)
class Claim:
    """A claim as its worker and the world see it."""

    token: bytes
    task: Task
    broker: str
    boot: int
    attempt: int
    request: str
    # Broker's monotonic ms of the hand-out or of the last heartbeat that was answered.
    touched_ms: int
    # A report, a release or a cancelled poll has reached the broker, or could have.
    ended: bool = False
    reported: set[int] = field(default_factory=set)
    applied: int = 0
    applied_at: float = 0.0
    # The disk that knew it is gone.
    forgotten: bool = False
    started_ms: int | None = None
    # Of Kafka, when it was made.
    rebalances: int = 0
    generations: int = 0


@dataclass(slots=True)
class Task:
    """One activation, and what the world knows of it."""

    id: str
    application: str
    namespace: str
    body: bytes
    received_ms: int
    delay_ms: int
    expires_ms: int | None
    max_attempts: int
    discard: bool
    at_most_once: bool
    deadline_ms: int
    # What each attempt ends in, the last one again and again; and how long it takes.
    plan: tuple[int, ...]
    seconds: float
    poison: bool = False
    # Its produce was acknowledged: from now on it is promised.
    promised: bool = False
    # (partition, offset) of its copies in the log; the broker it was sent to otherwise.
    positions: list[tuple[int, int]] = field(default_factory=list)
    sent_to: str = ""
    # How often it has reached one.
    sends: int = 0
    # Sent to a broker, and handed out by one astray: what must not start twice may have started elsewhere.
    elsewhere: bool = False
    claims: dict[bytes, Claim] = field(default_factory=dict)
    # Hand-outs that were not given back.
    unreleased: int = 0
    starts: int = 0
    # A report that ends it has reached a broker.
    ended: bool = False
    # Its end was acknowledged: it may never run again.
    final: str = ""
    # attempt -> token of the acknowledged outcome.
    acknowledged: dict[int, bytes] = field(default_factory=dict)
    # Not before that, by the wall clock of the broker that was told so.
    # By the token of the report: (broker, attempt, wall clock).
    retry_at: dict[bytes, tuple[str, int, int]] = field(default_factory=dict)
    retry_delay_ms: int = 0
    letters: int = 0
    # How often a broker sent it to where another one goes on with it.
    passed_on: int = 0
    # forward id -> who sent it on last, and when.
    hops: dict[str, tuple[str, float]] = field(default_factory=dict)
    # It was sent on, and that was newer than the ledger when the disk of its broker was lost.
    doubled: bool = False
    # How often a row of it is gone from a store.
    left: int = 0
    # Handed out to a client without tokens.
    v1: bool = False

    def outcome(self, attempt: int) -> int:
        return self.plan[min(attempt, len(self.plan)) - 1]


def make_task(rng: random.Random, number: int, now_ms: int, *, quiet: bool) -> Task:
    """A task out of the seed; ``quiet``: nothing that depends on who is faster."""
    id = f"t{number:04d}"
    application = rng.choice(sorted(APPLICATIONS))
    namespace = rng.choice(APPLICATIONS[application])
    max_attempts = rng.choice((0, 1, 1, 2, 3, 5))
    on_exceeded = DISCARD if rng.random() < 0.4 else DEADLETTER
    at_most_once = rng.random() < 0.15
    plan = tuple(
        rng.choices(
            (
                TASK_OUTCOME_STATUS_COMPLETE,
                TASK_OUTCOME_STATUS_RETRY,
                TASK_OUTCOME_STATUS_FAILURE,
                TASK_OUTCOME_STATUS_IGNORED,
            ),
            (70, 20, 5, 5),
            k=rng.randint(1, 4),
        )
    )
    message = TaskActivation(
        id=id,
        application=application,
        namespace=namespace,
        taskname="work",
        retry_state=RetryState(
            max_attempts=max_attempts, on_attempts_exceeded=on_exceeded, at_most_once=at_most_once
        ),
        processing_deadline_duration=rng.choice((5, 20, 60)),
    )
    message.received_at.FromMilliseconds(now_ms)
    if rng.random() < 0.5:
        message.retry_state.delay_on_retry = rng.randint(0, 8)
    if rng.random() < 0.2:
        message.delay = rng.randint(1, 20)
    if rng.random() < 0.15 and not quiet:
        message.expires = rng.randint(1, 40)
    if rng.random() < 0.1:
        message.parameters_bytes = rng.randbytes(rng.randint(500, 3000))
    poison = rng.random() < 0.03
    body = rng.randbytes(rng.randint(1, 30)) if poison else message.SerializeToString()
    if poison:
        # No field has the number 31 and the type 7. Dead letters are told apart by their bytes.
        body = b"\xff" + body + id.encode()
    return Task(
        id=id,
        application=application,
        namespace=namespace,
        body=body,
        received_ms=now_ms,
        delay_ms=message.delay * 1000,
        expires_ms=message.expires * 1000 if message.HasField("expires") else None,
        max_attempts=max(1, max_attempts),
        discard=on_exceeded == DISCARD,
        at_most_once=at_most_once,
        deadline_ms=message.processing_deadline_duration * 1000,
        plan=plan,
        retry_delay_ms=message.retry_state.delay_on_retry * 1000,
        seconds=rng.choice((0.0, 0.01, 0.1, 0.5, 2.0, 8.0 if not quiet else 1.0)),
        poison=poison,
    )
