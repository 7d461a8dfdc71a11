"""Workers seen lately, by what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock_protocol.v1 import consumer_pb2

WORKERS_MAX = 2_000
# Of those that a worker asks for.
NAMESPACES_SHOWN = 100
# A worker that is there asks, or says what it holds, far more often.
SEEN_MS_MAX = 600_000


@dataclass(slots=True)
class Seen:
    """One worker process. ``at``: monotonic ms of its last call."""

    at: int
    identity: consumer_pb2.WorkerIdentity
    application: str | None = None
    namespaces: tuple[str, ...] = ()


class Roster:
    """Bounded: whoever was not seen for longest is forgotten first."""

    def __init__(self) -> None:
        self._workers: dict[str, Seen] = {}

    def asked(self, request: consumer_pb2.GetTasksRequest, mono: int) -> None:
        """A worker asks for tasks, and says who it is."""
        worker = request.worker
        if not worker.worker_id:
            return
        identity = consumer_pb2.WorkerIdentity()
        identity.CopyFrom(worker)  # which is part of the request, and would keep all of it
        identity.DiscardUnknownFields()
        # Whoever was seen last comes last.
        self._workers.pop(worker.worker_id, None)
        self._workers[worker.worker_id] = Seen(
            mono,
            identity,
            request.application if request.HasField("application") else None,
            tuple(request.namespaces[:NAMESPACES_SHOWN]),
        )
        if len(self._workers) > WORKERS_MAX:
            del self._workers[next(iter(self._workers))]

    def held(self, worker_id: str, mono: int) -> None:
        """A worker says what it holds."""
        if (seen := self._workers.get(worker_id)) is not None:
            seen.at = mono

    def heard_since(self, worker_id: str, since: int) -> bool:
        """Whether a worker was seen at ``since`` (monotonic ms) or later."""
        return (seen := self._workers.get(worker_id)) is not None and seen.at >= since

    def lately(self, mono: int) -> Iterator[Seen]:
        """Those seen within the last minutes."""
        return (seen for seen in self._workers.values() if mono - seen.at <= SEEN_MS_MAX)
