"""Where the next tasks come from: which broker is asked, for how many, and how long it may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from uuid import uuid4

import grpc
import structlog
from grpc.aio import AioRpcError

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1 import raw_pb2
from penstock_worker.claim import Claim
from penstock_worker.frames import Assignment
from penstock_worker.link import GET_TASKS, BackOff, BrokerLink
from penstock_worker.metrics import Metrics

BATCH_TASKS_MAX = 512
# Well below what one answer may have, since only the size of the last tasks is known.
BATCH_BYTES = 8 * 1024 * 1024
# Every broker is asked at least this often while there is room, so that no task waits on a quiet one.
VISIT_SECONDS = 1.0
LONG_POLL_SECONDS = 10.0
ANSWER_SECONDS_MAX = 5.0
# What a call on its way may bring counts as taken for this long, and then no more: a broker that
# does not answer must not keep the slots from the others.
RESERVED_SECONDS = 0.25

log = structlog.get_logger("penstock_worker")


@dataclass(slots=True, eq=False)
class Source:
    """A broker, seen as a place tasks come from."""

    link: BrokerLink
    # Its last answer brought tasks, or it has not been asked yet.
    has_work: bool = True
    visited_at: float = float("-inf")
    asked_for: int = 0
    # As many as fit into an answer, going by the last one.
    batch_max: int = BATCH_TASKS_MAX
    call: asyncio.Task[None] | None = None
    # A request whose answer was lost: repeated, it returns the same claims.
    unanswered: pb.GetTasksRequest | None = None
    unanswered_since: float = 0.0
    backoff: BackOff = field(default_factory=BackOff)


@dataclass(frozen=True, slots=True)
class Wish:
    """What this worker asks every broker for."""

    application: str
    namespaces: Sequence[str]
    worker: pb.WorkerIdentity


class Fetcher:
    """Asks brokers for as many tasks as there is room for.

    One that has work is asked with `wait_ms=0` and for as much as fits; an empty one is left at
    once and then long-polled beside the others with whatever room they leave. What parallel polls
    bring too much the pool gives back.
    """

    def __init__(
        self,
        links: Sequence[BrokerLink],
        wish: Wish,
        room: Callable[[int], int],
        deliver: Callable[[list[Claim]], None],
        may_fetch: Callable[[BrokerLink], bool],
        metrics: Metrics,
    ) -> None:
        """`room(asked_for)` is how many more tasks are wanted; `deliver` takes what came."""
        self._sources = [Source(link) for link in links]
        self._wish, self._room, self._deliver, self._may_fetch = wish, room, deliver, may_fetch
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._stopping = False
        self._numbers = count(1)

    def wake(self) -> None:
        """There may be room now."""
        self._wake.set()

    async def run(self) -> None:
        """Fetch until stopped."""
        while not self._stopping:
            self._wake.clear()
            self._ask_brokers()
            try:
                async with asyncio.timeout(self._next_look_seconds()):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """Ask for nothing more. Polls still open are cut short by repeating them without waiting:
        the same request id returns what they may have claimed, so no claim is left behind."""
        self._stopping = True
        self._wake.set()
        for source in self._sources:
            if source.call is not None:
                source.call.cancel()
        await asyncio.gather(*(self._cut_short(source) for source in self._sources))

    async def _cut_short(self, source: Source) -> None:
        request = source.unanswered
        if request is None:
            return
        request.wait_ms = 0
        try:
            await self._fetch(source, request)
        except AioRpcError as error:
            log.info("last poll not answered", broker=source.link.address, code=error.code().name)

    def _next_look_seconds(self) -> float:
        now = monotonic()
        resting = [source.backoff.not_before - now for source in self._sources if source.call is None]
        return min([VISIT_SECONDS, *(max(0.01, seconds) for seconds in resting if seconds > 0)])

    def _ask_brokers(self) -> None:
        now = monotonic()
        idle = [
            source
            for source in self._sources
            if source.call is None and now >= source.backoff.not_before and self._may_fetch(source.link)
        ]

        def quiet_first(source: Source) -> tuple[bool, bool, float]:
            return (now - source.visited_at < VISIT_SECONDS, not source.has_work, source.visited_at)

        for source in sorted(idle, key=quiet_first):
            if source.unanswered is not None:
                self._start(source, source.unanswered)
                continue
            room = min(source.batch_max, self._room(sum(other.asked_for for other in self._sources)))
            if room <= 0:
                continue
            overdue = now - source.visited_at >= VISIT_SECONDS
            at_once = source.has_work or overdue
            if at_once and not source.backoff.failures:
                source.asked_for = room
                asyncio.get_running_loop().call_later(RESERVED_SECONDS, self._unreserve, source, room)
            source.unanswered_since = now
            self._start(source, self._request(room, 0 if at_once else LONG_POLL_SECONDS))

    def _unreserve(self, source: Source, room: int) -> None:
        # Only the call that reserved it: a later one of the same size is as good.
        if source.asked_for == room and source.call is not None:
            source.asked_for = 0
            self._wake.set()

    def _request(self, max_tasks: int, wait_seconds: float) -> pb.GetTasksRequest:
        return pb.GetTasksRequest(
            request_id=uuid4().hex,
            application=self._wish.application,
            namespaces=self._wish.namespaces,
            max_tasks=max_tasks,
            wait_ms=int(wait_seconds * 1000),
            worker=self._wish.worker,
        )

    def _start(self, source: Source, request: pb.GetTasksRequest) -> None:
        source.unanswered = request
        source.call = asyncio.get_running_loop().create_task(self._visit(source, request))

    async def _visit(self, source: Source, request: pb.GetTasksRequest) -> None:
        try:
            await self._fetch(source, request)
        except AioRpcError as error:
            self._unanswered(source, request, error)
        finally:
            source.asked_for = 0
            source.visited_at = monotonic()
            source.call = None
            self._wake.set()

    async def _fetch(self, source: Source, request: pb.GetTasksRequest) -> None:
        link = source.link
        wait_seconds = request.wait_ms / 1000
        asked_at = monotonic()
        body = await link.call(GET_TASKS, request, wait_seconds + ANSWER_SECONDS_MAX)
        answered_at = monotonic()
        response = raw_pb2.RawGetTasksResponse.FromString(body)
        source.unanswered = None
        source.asked_for = 0
        source.has_work = bool(response.tasks)
        if not response.tasks and answered_at - asked_at < wait_seconds / 2:
            # It did not wait: it is stopping, or paused. Asking on and on would not help it.
            source.backoff.failed()
        else:
            source.backoff.succeeded()
        link.learn_lease(response.lease_ms / 1000)
        self._metrics.fetched(link.address, "hit" if source.has_work else "empty")
        if response.tasks:
            mean_bytes = len(body) // len(response.tasks) + 1
            source.batch_max = max(1, min(BATCH_TASKS_MAX, BATCH_BYTES // mean_bytes))
            self._deliver([self._claim(link, task, answered_at) for task in response.tasks])

    def _claim(self, link: BrokerLink, task: raw_pb2.RawClaimedTask, answered_at: float) -> Claim:
        expires_at = None
        if task.HasField("expires_in_ms"):
            expires_at = answered_at + task.expires_in_ms / 1000
        assignment = Assignment(
            next(self._numbers), task.activation, task.claim_token, task.attempt, expires_at
        )
        return Claim(link, assignment, task.deadline_ms / 1000)

    def _unanswered(self, source: Source, request: pb.GetTasksRequest, error: AioRpcError) -> None:
        source.backoff.failed()
        source.has_work = True
        self._metrics.fetched(source.link.address, "error")
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            source.batch_max = max(1, source.batch_max // 4)
        lost_for = monotonic() - source.unanswered_since
        # Refused, not lost: nothing was claimed. Or so old that its claims have come back by themselves,
        # even those of the end of its wait.
        lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        if not lost or lost_for > source.link.lease_seconds + request.wait_ms / 1000:
            source.unanswered = None
