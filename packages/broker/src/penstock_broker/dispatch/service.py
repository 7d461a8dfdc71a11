"""ConsumerService: bytes in, bytes out. The first three calls are taskbroker v1's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from penstock_broker.dispatch.roster import Roster
from penstock_broker.dispatch.waiting import ANSWER_SECONDS_MAX, Waiting, Wanted, still_claimed
from penstock_broker.domain.activation import Activation, hash_id
from penstock_broker.domain.lifecycle import COMPLETE, Event
from penstock_broker.domain.token import decode_token, encode_parts
from penstock_broker.store.batch import Answer, Report
from penstock_broker.store.database import DiskFailing
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.writer import StoreStopped
from penstock_broker.wire import FIELDS_MAX, has_too_many_fields
from penstock_protocol.v1 import activation_pb2, consumer_pb2, raw_pb2

TASKS_MAX = 1000
# So many answers are remembered whatever has become of their claims; more, as long as these are held.
ANSWERS_MIN = 1000
WAIT_SECONDS_MAX = 60.0
COVER_SECONDS_MAX = 10.0
ERROR_CHARS_MAX = 16_384
NAME_CHARS_MAX = 256
# Ten years.
DELAY_MS_MAX = 315_360_000_000

_EVENTS = {
    consumer_pb2.TASK_OUTCOME_STATUS_COMPLETE: Event.COMPLETE,
    consumer_pb2.TASK_OUTCOME_STATUS_IGNORED: Event.IGNORE,
    consumer_pb2.TASK_OUTCOME_STATUS_FAILURE: Event.FAIL,
    consumer_pb2.TASK_OUTCOME_STATUS_RETRY: Event.RETRY,
    consumer_pb2.TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED: Event.DEADLINE_EXCEEDED,
    consumer_pb2.TASK_OUTCOME_STATUS_WORKER_DIED: Event.WORKER_DIED,
    consumer_pb2.TASK_OUTCOME_STATUS_EXPIRED: Event.EXPIRED_AT_START,
}
_RELEASES = {
    consumer_pb2.RELEASE_REASON_UNKNOWN_TASK: Event.UNKNOWN_TASK,
    consumer_pb2.RELEASE_REASON_ARGUMENTS_MISMATCH: Event.ARGUMENTS_MISMATCH,
}
_V1_EVENTS = {
    activation_pb2.TASK_ACTIVATION_STATUS_COMPLETE: Event.COMPLETE,
    activation_pb2.TASK_ACTIVATION_STATUS_FAILURE: Event.FAIL,
    activation_pb2.TASK_ACTIVATION_STATUS_RETRY: Event.RETRY,
}


M = TypeVar("M", bound=Message)


class Refused(Exception):
    """A call that is answered with a gRPC status instead of a message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Consumers:
    """What workers call."""

    def __init__(self, store: Inflight, waiting: Waiting) -> None:
        self.store = store
        self.waiting = waiting
        self.roster = Roster()
        waiting.heard_since = self.roster.heard_since
        self._nonce = store.database.nonce
        # request id -> when (monotonic ms), and the claims it was answered with, for a worker whose answer
        # was lost. The oldest first.
        self._answered: dict[str, tuple[int, list[tuple[int, int]]]] = {}

    # -- taskbroker v1: one task a call, no tokens

    async def get_task(self, request: bytes) -> bytes:
        asked = parse(consumer_pb2.GetTaskRequest, request)
        wanted = _wanted(asked)
        if wanted is not None:
            self.store.asked(wanted.application, wanted.namespaces)
        self.store.require_disk()
        rows = await self._claim_one(wanted)
        if not rows:
            raise Refused(grpc.StatusCode.NOT_FOUND, "no pending task")
        response = raw_pb2.RawGetTaskResponse(task=_body(rows[0]))
        rows[0].body = None
        return response.SerializeToString()

    async def _claim_one(self, wanted: Wanted | None) -> list[Activation]:
        rows = self.waiting.claim(wanted, 1, tokenless=True) if wanted is not None else []
        if rows and rows[0].at_most_once:
            try:
                rows = await self.waiting.make_durable(rows, ANSWER_SECONDS_MAX)
            except (TimeoutError, StoreStopped, DiskFailing):
                # With it may go the answer to a report, which is accepted and must not be repeated.
                return []
        return still_claimed(rows)

    async def set_task_status(self, request: bytes) -> bytes:
        report = parse(consumer_pb2.SetTaskStatusRequest, request)
        await self._finish([self._settle_by_id(report)], [hash_id(report.id)], by_id=True)
        response = raw_pb2.RawSetTaskStatusResponse()
        # Not before: what is claimed is handed out at once.
        wanted = _wanted(report.fetch_next_task) if report.HasField("fetch_next_task") else None
        if rows := await self._claim_one(wanted):
            response.task = _body(rows[0])
            rows[0].body = None
        return response.SerializeToString()

    async def set_batch_activation_status(self, request: bytes) -> bytes:
        batch = parse(consumer_pb2.SetBatchActivationStatusRequest, request)
        for report in batch.updates:
            _v1_event(report)
        settled = [self._settle_by_id(report) for report in batch.updates]
        await self._finish(settled, [hash_id(report.id) for report in batch.updates], by_id=True)
        return consumer_pb2.SetBatchActivationStatusResponse().SerializeToString()

    def _settle_by_id(self, report: consumer_pb2.SetTaskStatusRequest) -> Answer | Report:
        return self.store.settle_by_id(
            hash_id(report.id),
            _v1_event(report),
            self.store.clock.wall_ms(),
            max_attempts=report.max_attempts if report.HasField("max_attempts") else None,
            retry_delay_ms=(
                _delay(1000 * report.delay_on_retry) if report.HasField("delay_on_retry") else None
            ),
        )

    # -- penstock.v1: batches with claim tokens

    async def get_tasks(self, request: bytes) -> bytes:
        asked = parse(consumer_pb2.GetTasksRequest, request)
        worker = asked.worker
        _bounded(asked.request_id, worker.worker_id, worker.hostname, worker.version)
        _bounded(asked.application, *asked.namespaces)
        mono = self.store.clock.mono_ms()
        self.roster.asked(asked, mono)
        self._forget_answers(mono)
        if asked.namespaces and not asked.HasField("application"):
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                "GetTasks names a namespace but no application: set application, or leave namespaces empty",
            )
        wanted = Wanted(asked.application if asked.HasField("application") else None, tuple(asked.namespaces))
        self.store.asked(wanted.application, wanted.namespaces)
        self.store.require_disk()
        await self.waiting.end(asked.request_id)
        rows = await self._claimed_before(asked.request_id)
        if not rows:
            rows = await self.waiting.wait(
                wanted,
                min(max(asked.max_tasks, 1), TASKS_MAX),
                min(asked.wait_ms / 1000, WAIT_SECONDS_MAX),
                asked.worker.worker_id,
                asked.request_id,
            )
            rows = still_claimed(rows)
        response = raw_pb2.RawGetTasksResponse(lease_ms=self.store.limits.lease_ms)
        if rows:
            self._remember(asked.request_id, rows)
            self._fill(response, rows)
        else:
            for application, namespace, pending in self.store.pending():
                response.pending.add(application=application, namespace=namespace, pending=pending)
        return response.SerializeToString()

    def _fill(self, response: raw_pb2.RawGetTasksResponse, rows: Sequence[Activation]) -> None:
        now, add = self.store.clock.wall_ms(), response.tasks.add
        for row in rows:
            task = add(
                activation=_body(row),
                claim_token=encode_parts(row.claim_epoch, row.seq, row.id_hash, self._nonce, row.claim),
                deadline_ms=row.deadline_ms,
                attempt=row.attempts + 1,
            )
            if row.expires_at is not None:
                task.expires_in_ms = max(0, row.expires_at - now)
            row.body = None

    def _remember(self, request_id: str, rows: Sequence[Activation]) -> None:
        if not request_id:
            return
        self._answered.pop(request_id, None)
        self._answered[request_id] = (self.store.clock.mono_ms(), [(row.seq, row.claim) for row in rows])
        if len(self._answered) > ANSWERS_MIN:
            # Two for each that comes: those of which nothing is held any more do not gather.
            for oldest in list(islice(self._answered, 2)):
                answered = self._answered.pop(oldest)
                if self._is_held(answered[1]):
                    self._answered[oldest] = answered

    def _is_held(self, claims: Iterable[tuple[int, int]]) -> bool:
        """Whether any of these (seq, claim) is."""
        resident = self.store.memory.resident
        return any((row := resident.get(seq)) is not None and row.claim == claim for seq, claim in claims)

    def _forget_answers(self, mono: int) -> None:
        """Those whose claims have come back, should they have been lost."""
        before = mono - 2 * self.store.limits.lease_ms
        while self._answered and self._answered[first := next(iter(self._answered))][0] < before:
            del self._answered[first]

    async def _claimed_before(self, request_id: str) -> list[Activation]:
        """The claims a repeated request was answered with, as far as they are still held."""
        answered = self._answered.get(request_id) if request_id else None
        if answered is None:
            return []
        return await self.store.claimed_again(answered[1])

    async def set_task_statuses(self, request: bytes) -> bytes:
        reports = parse(consumer_pb2.SetTaskStatusesRequest, request)
        now, settle = self.store.clock.wall_ms(), self.store.settle
        settled: list[Answer | Report] = []
        ids: list[int] = []
        # A call that is refused has settled nothing.
        events = _events(reports.outcomes)
        for outcome, event in zip(reports.outcomes, events, strict=True):
            token = decode_token(outcome.claim_token)
            if token is None:
                settled.append(Answer.UNKNOWN)
                ids.append(0)
                continue
            delay = error = None
            if event is not COMPLETE:
                delay = _delay(outcome.retry_delay_ms) if outcome.HasField("retry_delay_ms") else None
                error = _error(outcome.error) if outcome.HasField("error") else None
            settled.append(settle(token, event, now, delay, error))
            ids.append(token.id_hash)
        answers = await self._finish(settled, ids)
        return consumer_pb2.SetTaskStatusesResponse(answers=answers).SerializeToString()

    async def release_tasks(self, request: bytes) -> bytes:
        released = parse(consumer_pb2.ReleaseTasksRequest, request)
        _bounded(released.worker_id)
        now = self.store.clock.wall_ms()
        settled: list[Answer | Report] = []
        ids: list[int] = []
        refused: dict[int, int] = {}
        for task in released.tasks:
            token = decode_token(task.claim_token)
            event = _RELEASES.get(task.reason, Event.RELEASE)
            error = None
            if event is not Event.RELEASE:
                error = json.dumps({"type": event.value, "message": task.detail[:ERROR_CHARS_MAX]})
            answer = Answer.UNKNOWN if token is None else self.store.settle(token, event, now, error=error)
            if token is not None and event is not Event.RELEASE and released.worker_id:
                refused[len(settled)] = token.seq
            settled.append(answer)
            ids.append(token.id_hash if token else 0)
        answers = await self._finish(settled, ids)
        for i, seq in refused.items():
            # Whoever does not hold it has nothing to refuse.
            if answers[i] == consumer_pb2.OUTCOME_ANSWER_APPLIED:
                self.store.refusals.add(seq, released.worker_id, self.store.clock.mono_ms())
        return consumer_pb2.ReleaseTasksResponse(answers=answers).SerializeToString()

    async def extend_claims(self, request: bytes) -> bytes:
        held = parse(consumer_pb2.ExtendClaimsRequest, request)
        _bounded(held.worker_id)
        self.roster.held(held.worker_id, self.store.clock.mono_ms())
        answers = [self._extend(claim, held.worker_id) for claim in held.claims]
        return consumer_pb2.ExtendClaimsResponse(answers=answers).SerializeToString()

    def _extend(self, claim: consumer_pb2.HeldClaim, worker: str) -> consumer_pb2.ClaimAnswer:
        token = decode_token(claim.claim_token)
        if token is None:
            return consumer_pb2.CLAIM_ANSWER_UNKNOWN
        answer = self.store.extend(token, claim.started, worker)
        if answer is Answer.STALE and self.store.control.was_cancelled(token):
            return consumer_pb2.CLAIM_ANSWER_CANCELLED
        return _CLAIM_ANSWERS[answer]

    # -- what must be true before an answer leaves

    async def _finish(
        self, settled: Sequence[Answer | Report], ids: Sequence[int], *, by_id: bool = False
    ) -> list[consumer_pb2.OutcomeAnswer]:
        """Answers, once they are durable and no other broker can run again what they acknowledge.

        ``by_id``: a report without a token that is repeated finds nothing, and is answered as the first.
        """
        await self.store.answerable(self.store.committed())
        answers = [s.answer if isinstance(s, Report) else s for s in settled]
        if held := [i for i in self.store.all_held(ids) if by_id or answers[i] <= Answer.DUPLICATE]:
            try:
                async with asyncio.timeout(COVER_SECONDS_MAX):
                    covered = await self.store.covered([ids[i] for i in held])
            except TimeoutError:
                raise Refused(
                    grpc.StatusCode.UNAVAILABLE,
                    "the outcome is stored, but Kafka has not acknowledged the offset it depends on:"
                    " repeat the call",
                ) from None
            for i, ours in zip(held, covered, strict=True):
                if not ours:
                    answers[i] = Answer.STALE
        counts = self.store.memory.tally.answers
        for answer in answers:
            counts[answer] += 1
        return [_ANSWERS[answer] for answer in answers]


_ANSWERS = {
    Answer.APPLIED: consumer_pb2.OUTCOME_ANSWER_APPLIED,
    Answer.DUPLICATE: consumer_pb2.OUTCOME_ANSWER_DUPLICATE,
    Answer.STALE: consumer_pb2.OUTCOME_ANSWER_STALE,
    Answer.UNKNOWN: consumer_pb2.OUTCOME_ANSWER_UNKNOWN,
}
_CLAIM_ANSWERS = {
    Answer.APPLIED: consumer_pb2.CLAIM_ANSWER_EXTENDED,
    Answer.STALE: consumer_pb2.CLAIM_ANSWER_STALE,
    Answer.UNKNOWN: consumer_pb2.CLAIM_ANSWER_UNKNOWN,
}


def parse(kind: type[M], request: bytes) -> M:
    """The message in a request. Raises Refused."""
    if has_too_many_fields(request):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the {kind.DESCRIPTOR.name} has more than {FIELDS_MAX} entries: send fewer at a time",
        )
    try:
        return kind.FromString(request)
    except DecodeError:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"the request is no {kind.DESCRIPTOR.name}") from None


def _bounded(*names: str) -> None:
    """Raises Refused for names in calls, which are kept, that are longer than any."""
    if any(len(name) > NAME_CHARS_MAX for name in names):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the request's id, what a worker is called, and what it asks for have at most {NAME_CHARS_MAX}"
            " characters each",
        )


def _body(row: Activation) -> bytes:
    """The stored bytes; a retry state that differs from theirs is appended, which protobuf merges."""
    body = row.body or b""
    if not row.attempts:
        return body
    state = activation_pb2.RetryState(
        attempts=row.attempts, max_attempts=row.max_attempts, delay_on_retry=row.retry_delay_ms // 1000
    )
    return body + activation_pb2.TaskActivation(retry_state=state).SerializeToString()


def _wanted(asked: consumer_pb2.GetTaskRequest | consumer_pb2.FetchNextTask) -> Wanted | None:
    """None: nothing. A namespace without its application matches no task."""
    if asked.HasField("namespace") and not asked.HasField("application"):
        return None
    return Wanted(
        asked.application if asked.HasField("application") else None,
        (asked.namespace,) if asked.HasField("namespace") else (),
    )


def _events(outcomes: Iterable[consumer_pb2.TaskOutcome]) -> list[Event]:
    statuses = [outcome.status for outcome in outcomes]
    try:
        return [_EVENTS[status] for status in statuses]
    except KeyError as unknown:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"status {unknown} is no outcome") from None


def _v1_event(report: consumer_pb2.SetTaskStatusRequest) -> Event:
    event = _V1_EVENTS.get(report.status)
    if event is None:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"status {report.status} of task {report.id!r}: only COMPLETE, FAILURE and RETRY can be reported",
        )
    return event


def _delay(milliseconds: int) -> int:
    """Bounded."""
    return min(milliseconds, DELAY_MS_MAX)


def _error(summary: consumer_pb2.ErrorSummary) -> str:
    return json.dumps(
        {
            "type": summary.type[:256],
            "message": summary.message[:ERROR_CHARS_MAX],
            "traceback": summary.traceback[-ERROR_CHARS_MAX:],
        }
    )
