"""Telling brokers what became of their tasks, in batches, until they have answered."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import cast

import grpc
import structlog
from grpc.aio import AioRpcError

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.claim import Claim
from penstock_worker.errors import bounded
from penstock_worker.frames import Outcome
from penstock_worker.link import RELEASE_TASKS, SET_TASK_STATUSES, BackOff, BrokerLink, was_held
from penstock_worker.metrics import Metrics

BATCH_REPORTS_MAX = 512
BATCH_BYTES_MAX = 1024 * 1024
# An answer may wait for a Kafka commit; other reports must not wait behind it.
CALLS_MAX = 16
# Longer than a broker holds an answer.
CALL_TIMEOUT_SECONDS = 15.0
# How long a first report waits for company while short tasks are running.
LINGER_SECONDS = 0.004
# Results of a broker that does not answer: beyond this number nothing is fetched from it,
# beyond this age they are given up.
WAITING_REPORTS_MAX = 10_000
WAITING_SECONDS_MAX = 900.0
_DETAIL_CHARACTERS_MAX = 500
# What a report has to say that its broker refused as too large: enough for the smallest message_bytes_max.
_CUT_CHARACTERS_MAX = 100
_CUT_TRACEBACK = "left out: too large for this broker (message_bytes_max)"

log = structlog.get_logger("penstock_worker")


@dataclass(slots=True)
class Report:
    claim: Claim
    message: pb.TaskOutcome | pb.ReleasedTask
    bytes: int
    ended_at: float = field(default_factory=monotonic)

    def cut(self) -> bool:
        """To what a broker must know. Whether it became smaller."""
        if isinstance(self.message, pb.ReleasedTask):
            self.message.detail = bounded(self.message.detail, _CUT_CHARACTERS_MAX)
        elif self.message.HasField("error"):
            error = self.message.error
            error.type = bounded(error.type, _CUT_CHARACTERS_MAX)
            error.message = bounded(error.message, _CUT_CHARACTERS_MAX)
            if len(error.traceback) > len(_CUT_TRACEBACK):
                error.traceback = _CUT_TRACEBACK
        before, self.bytes = self.bytes, self.message.ByteSize()
        return self.bytes < before


class Reporter:
    """Everything one broker has still to be told. `lingering`: short tasks are coming in numbers."""

    def __init__(self, link: BrokerLink, worker_id: str, metrics: Metrics) -> None:
        self.link = link
        self.lingering = False
        outcomes = ReportQueue(link, SET_TASK_STATUSES, worker_id, metrics)
        releases = ReportQueue(link, RELEASE_TASKS, worker_id, metrics)
        self._outcomes, self._releases = outcomes, releases

    def settle(self, claim: Claim, outcome: Outcome) -> None:
        """Queue what became of a claim."""
        if outcome.release_reason:
            detail = outcome.error.message if outcome.error else ""
            self._releases.add(
                claim,
                pb.ReleasedTask(
                    claim_token=claim.token,
                    reason=cast("pb.ReleaseReason", outcome.release_reason),
                    detail=bounded(detail, _DETAIL_CHARACTERS_MAX),
                ),
                linger=False,
            )
        else:
            self._outcomes.add(claim, _outcome_message(claim, outcome), linger=self.lingering)

    def waiting(self) -> int:
        """Reports without an answer."""
        return self._outcomes.waiting() + self._releases.waiting()

    async def flush(self, timeout_seconds: float) -> int:
        """Wait until all is answered, or the time is over; the number still without an answer."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._outcomes.drained()
                await self._releases.drained()
        except TimeoutError:
            log.warning("stopping with results a broker has not answered", broker=self.link.address)
        return self.waiting()

    def close(self) -> None:
        self._outcomes.close()
        self._releases.close()


def _outcome_message(claim: Claim, outcome: Outcome) -> pb.TaskOutcome:
    message = pb.TaskOutcome(claim_token=claim.token, status=cast("pb.TaskOutcomeStatus", outcome.status))
    if outcome.error is not None:
        message.error.type = outcome.error.type
        message.error.message = outcome.error.message
        message.error.traceback = outcome.error.traceback
    if outcome.retry_delay_ms is not None:
        message.retry_delay_ms = outcome.retry_delay_ms
    return message


class ReportQueue:
    """Reports of one kind to one broker. What was not answered is sent again, apart from what is new."""

    def __init__(self, link: BrokerLink, path: str, worker_id: str, metrics: Metrics) -> None:
        self._link, self._path, self._worker_id, self._metrics = link, path, worker_id, metrics
        self._fresh: deque[Report] = deque()
        self._again: deque[Report] = deque()
        # As many as the broker takes in one call, going by its last answers.
        self._batch_bytes_max = BATCH_BYTES_MAX
        self._on_the_way = 0
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._unanswered = BackOff()
        self._drained = asyncio.Event()
        self._drained.set()

    def add(self, claim: Claim, message: pb.TaskOutcome | pb.ReleasedTask, *, linger: bool) -> None:
        self._fresh.append(Report(claim, message, message.ByteSize()))
        self._drained.clear()
        if linger and len(self._fresh) < BATCH_REPORTS_MAX:
            self._send_later(LINGER_SECONDS)
        else:
            self._send_later(0)

    def waiting(self) -> int:
        return len(self._fresh) + len(self._again) + self._on_the_way

    async def drained(self) -> None:
        await self._drained.wait()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for call in self._calls:
            call.cancel()

    def _send_later(self, seconds: float) -> None:
        now = monotonic()
        due_at = max(now + seconds, self._unanswered.not_before)
        if self._timer is not None:
            if self._due_at <= due_at:
                return
            self._timer.cancel()
        self._due_at = due_at
        self._timer = asyncio.get_running_loop().call_later(due_at - now, self._send)

    def _send(self) -> None:
        self._timer = None
        if monotonic() < self._unanswered.not_before:
            self._send_later(0)
            return
        for queue in (self._again, self._fresh):
            while queue and len(self._calls) < CALLS_MAX:
                batch = _take_batch(queue, self._batch_bytes_max)
                self._on_the_way += len(batch)
                self._calls.add(asyncio.get_running_loop().create_task(self._report(batch)))

    async def _report(self, batch: list[Report]) -> None:
        called_at = monotonic()
        try:
            answers = await self._call(batch)
        except AioRpcError as error:
            self._failed(batch, error, monotonic() - called_at)
        else:
            self._unanswered.succeeded()
            taken = min(BATCH_BYTES_MAX, 2 * _bytes(batch))
            self._batch_bytes_max = max(self._batch_bytes_max, taken)
            self._settled(batch, answers)
        finally:
            self._on_the_way -= len(batch)
            # Not when the task is done: what is sent next may be sent before that is known.
            self._calls.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        if not self.waiting():
            self._drained.set()
        elif self._timer is None and (self._fresh or self._again):
            self._send_later(0)

    async def _call(self, batch: list[Report]) -> Sequence[pb.OutcomeAnswer]:
        if self._path == SET_TASK_STATUSES:
            outcomes = [report.message for report in batch if isinstance(report.message, pb.TaskOutcome)]
            request = pb.SetTaskStatusesRequest(outcomes=outcomes, worker_id=self._worker_id)
            body = await self._link.call(self._path, request, CALL_TIMEOUT_SECONDS)
            return pb.SetTaskStatusesResponse.FromString(body).answers
        releases = [report.message for report in batch if isinstance(report.message, pb.ReleasedTask)]
        release = pb.ReleaseTasksRequest(tasks=releases, worker_id=self._worker_id)
        body = await self._link.call(self._path, release, CALL_TIMEOUT_SECONDS)
        return pb.ReleaseTasksResponse.FromString(body).answers

    def _failed(self, batch: list[Report], error: AioRpcError, seconds: float) -> None:
        self._metrics.report_failed(error.code().name, len(batch))
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and self._made_smaller(batch):
            self._again.extend(batch)
            return
        # New reports need not wait for those the broker holds.
        if not was_held(error, seconds):
            self._unanswered.failed()
        oldest = monotonic() - WAITING_SECONDS_MAX
        for report in batch:
            if report.ended_at > oldest:
                self._again.append(report)
            else:
                self._forget(report, "given_up")

    def _made_smaller(self, batch: list[Report]) -> bool:
        """Whether less is sent the next time of what was refused as too large."""
        self._batch_bytes_max = min(self._batch_bytes_max, _bytes(batch) // 2)
        if len(batch) > 1:
            return True
        cut = batch[0].cut()
        if cut:
            log.warning(
                "what a task ended with is too large for its broker",
                task=batch[0].claim.title,
                broker=self._link.address,
                hint="it is told shortened; raise the broker's message_bytes_max",
            )
        return cut

    def _settled(self, batch: list[Report], answers: Sequence[pb.OutcomeAnswer]) -> None:
        for report, answer in zip(batch, answers, strict=False):
            self._forget(report, pb.OutcomeAnswer.Name(answer).removeprefix("OUTCOME_ANSWER_").lower())
        if len(answers) < len(batch):
            log.error("broker answered too few reports", broker=self._link.address, call=self._path)
            self._unanswered.failed()
            self._again.extend(batch[len(answers) :])

    def _forget(self, report: Report, answer: str) -> None:
        claim = report.claim
        self._link.claims.pop(claim.number, None)
        self._metrics.reported(answer)
        if answer not in ("applied", "duplicate"):
            log.warning(
                "outcome not accepted",
                answer=answer,
                task=claim.title,
                broker=self._link.address,
                hint="its claim was lost: another worker runs it, or has",
            )


def _bytes(batch: list[Report]) -> int:
    return sum(report.bytes for report in batch)


def _take_batch(queue: deque[Report], bytes_max: int) -> list[Report]:
    """At least one."""
    batch = [queue.popleft()]
    size = batch[0].bytes
    while queue and len(batch) < BATCH_REPORTS_MAX and size + queue[0].bytes <= bytes_max:
        batch.append(queue.popleft())
        size += batch[-1].bytes
    return batch
