"""The other side of the wire, as small as it can be: a gRPC server over a list."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

import grpc
import grpc.aio
import msgspec

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.activation_pb2 import TaskActivation
from penstock_protocol.v1.consumer_pb2_grpc import (
    ConsumerServiceServicer,
    add_ConsumerServiceServicer_to_server,
)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class Entry:
    """One activation and how it is to be handed out."""

    activation: TaskActivation
    deadline_ms: int = 60_000
    expires_in_ms: int | None = None


@dataclass
class MemoryBroker(ConsumerServiceServicer):
    lease_ms: int = 15_000
    # Whether an empty poll is held.
    waits: bool = True
    address: str = ""
    pending: deque[Entry] = field(default_factory=deque)
    claims: dict[bytes, Entry] = field(default_factory=dict)
    # (activation id, outcome) in the order they came.
    outcomes: list[tuple[str, pb.TaskOutcome]] = field(default_factory=list)
    released: list[tuple[str, pb.ReleasedTask]] = field(default_factory=list)
    fetches: list[pb.GetTasksRequest] = field(default_factory=list)
    reports: list[int] = field(default_factory=list)
    metadata: list[tuple[tuple[str, str | bytes], ...]] = field(default_factory=list)
    # token -> (heartbeats, heartbeats that said started)
    heartbeats: Counter[bytes] = field(default_factory=Counter)
    started_heartbeats: Counter[bytes] = field(default_factory=Counter)
    # What the next heartbeats are answered, by activation id.
    revoked: dict[str, pb.ClaimAnswer] = field(default_factory=dict)
    # How many answers with tasks get lost on the way.
    losses: int = 0
    before_report: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._numbers = count(1)
        self._answered: dict[str, pb.GetTasksResponse] = {}
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        add_ConsumerServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    def put(self, taskname: str, *args: object, id: str = "", **options: object) -> str:
        """Make a task pending; options: kwargs, namespace, deadline_ms, expires_in_ms."""
        body = msgspec.msgpack.encode({"args": args, "kwargs": options.pop("kwargs", {})})
        activation = TaskActivation(
            id=id or uuid4().hex,
            application="worker-tests",
            namespace=str(options.pop("namespace", "tests")),
            taskname=taskname,
            parameters_bytes=body,
        )
        self.pending.append(Entry(activation, **options))  # type: ignore[arg-type]
        self._notify()
        return activation.id

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something this broker sees; the test's own timeout ends it."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def settled(self, number: int) -> dict[str, pb.TaskOutcome]:
        """The outcomes by id, once there are this many."""
        await self.until(lambda: len(self.outcomes) >= number)
        return dict(self.outcomes)

    def is_polled(self) -> bool:
        return any(request.wait_ms for request in self.fetches)

    def _notify(self) -> None:
        self._changed.set()

    async def GetTasks(  # noqa: N802
        self, request: pb.GetTasksRequest, context: Context
    ) -> pb.GetTasksResponse:
        self.fetches.append(request)
        self.metadata.append(tuple(context.invocation_metadata() or ()))
        self._notify()
        repeated = self._answered.get(request.request_id)
        if repeated is not None:
            return repeated
        if not self.pending and request.wait_ms and self.waits:
            try:
                async with asyncio.timeout(request.wait_ms / 1000):
                    await self.until(lambda: bool(self.pending))
            except TimeoutError:
                pass
        taken = [self.pending.popleft() for _ in range(min(len(self.pending), request.max_tasks))]
        response = pb.GetTasksResponse(tasks=[self._claim(entry) for entry in taken], lease_ms=self.lease_ms)
        self._answered[request.request_id] = response
        if taken and self.losses:
            self.losses -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
        return response

    def _claim(self, entry: Entry) -> pb.ClaimedTask:
        token = f"token-{next(self._numbers)}".encode()
        self.claims[token] = entry
        return pb.ClaimedTask(
            activation=entry.activation,
            claim_token=token,
            deadline_ms=entry.deadline_ms,
            expires_in_ms=entry.expires_in_ms,
            attempt=entry.activation.retry_state.attempts + 1,
        )

    async def SetTaskStatuses(  # noqa: N802
        self, request: pb.SetTaskStatusesRequest, context: Context
    ) -> pb.SetTaskStatusesResponse:
        self.before_report()
        self.reports.append(len(request.outcomes))
        answers = []
        for outcome in request.outcomes:
            entry = self.claims.pop(outcome.claim_token, None)
            answers.append(pb.OUTCOME_ANSWER_STALE if entry is None else pb.OUTCOME_ANSWER_APPLIED)
            if entry is not None:
                self.outcomes.append((entry.activation.id, outcome))
        self._notify()
        return pb.SetTaskStatusesResponse(answers=answers)

    async def ExtendClaims(  # noqa: N802
        self, request: pb.ExtendClaimsRequest, context: Context
    ) -> pb.ExtendClaimsResponse:
        answers = []
        for claim in request.claims:
            self.heartbeats[claim.claim_token] += 1
            self.started_heartbeats[claim.claim_token] += claim.started
            entry = self.claims.get(claim.claim_token)
            id = entry.activation.id if entry else ""
            answers.append(self.revoked.get(id, pb.CLAIM_ANSWER_EXTENDED))
        self._notify()
        return pb.ExtendClaimsResponse(answers=answers)

    async def ReleaseTasks(  # noqa: N802
        self, request: pb.ReleaseTasksRequest, context: Context
    ) -> pb.ReleaseTasksResponse:
        for released in request.tasks:
            entry = self.claims.pop(released.claim_token)
            self.released.append((entry.activation.id, released))
            if released.reason in (pb.RELEASE_REASON_SURPLUS, pb.RELEASE_REASON_SHUTDOWN):
                self.pending.append(entry)
        self._notify()
        return pb.ReleaseTasksResponse(answers=[pb.OUTCOME_ANSWER_APPLIED] * len(request.tasks))
