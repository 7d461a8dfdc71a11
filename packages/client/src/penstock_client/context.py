"""What a task may know of its own execution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from penstock_client.durations import Duration, seconds
from penstock_client.errors import RetryRequested
from penstock_protocol.v1.activation_pb2 import TaskActivation

_current: ContextVar[TaskContext | None] = ContextVar("penstock_task", default=None)


@dataclass(frozen=True, slots=True)
class TaskContext:
    """One start of one task.

    ``attempt`` counts starts from 1. ``claim_token`` is different for every start that a broker hands
    out, and can serve as a fencing token downstream. ``deadline_seconds`` counts from the start.
    """

    id: str
    taskname: str
    namespace: str
    attempt: int = 1
    max_attempts: int = 1
    claim_token: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    received_at: datetime | None = None
    expires_at: datetime | None = None
    deadline_seconds: int = 0

    @classmethod
    def from_activation(cls, activation: TaskActivation, attempt: int, claim_token: bytes) -> TaskContext:
        received_at = expires_at = None
        # A message's clock may say anything; what is no date is not shown.
        with contextlib.suppress(ValueError, OverflowError):
            received_at = activation.received_at.ToDatetime(tzinfo=UTC)
            if activation.HasField("expires"):
                expires_at = received_at + timedelta(seconds=activation.expires)
        return cls(
            activation.id,
            activation.taskname,
            activation.namespace,
            attempt,
            max(1, activation.retry_state.max_attempts),
            claim_token,
            dict(activation.headers),
            received_at,
            expires_at,
            activation.processing_deadline_duration,
        )

    def retry(self, countdown: Duration | None = None) -> RetryRequested:
        """To be raised: start the task again, after ``countdown`` (seconds) if its attempts allow."""
        if isinstance(countdown, str | timedelta):
            countdown = seconds("countdown", countdown)
        return RetryRequested(countdown)

    @contextlib.contextmanager
    def entered(self) -> Iterator[TaskContext]:
        """Make this the context that ``current_task`` returns."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)


def current_task() -> TaskContext | None:
    """The context of the task that is running here, if one is."""
    return _current.get()
