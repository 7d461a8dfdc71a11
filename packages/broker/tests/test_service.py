"""What workers call: what an answer says, and what must be true before it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable
from pathlib import Path

import apsw
import grpc
import pytest
from ingest_helpers import task_bytes
from store_helpers import ManualClock, activation, check_store, open_store, settle_down

from penstock_broker.dispatch import service
from penstock_broker.dispatch.roster import NAMESPACES_SHOWN
from penstock_broker.dispatch.service import Consumers, Refused
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.domain.activation import Activation, Status
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.store.database import DiskFailing
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.refusals import WORKERS_MAX
from penstock_broker.store.unclaimable import UNASKED_MS
from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.activation_pb2 import (
    TASK_ACTIVATION_STATUS_COMPLETE,
    TASK_ACTIVATION_STATUS_RETRY,
    RetryState,
    TaskActivation,
)

BYTES = 1 << 20
COMPLETE, RETRY = pb.TASK_OUTCOME_STATUS_COMPLETE, pb.TASK_OUTCOME_STATUS_RETRY
APPLIED, DUPLICATE, STALE = (
    pb.OUTCOME_ANSWER_APPLIED,
    pb.OUTCOME_ANSWER_DUPLICATE,
    pb.OUTCOME_ANSWER_STALE,
)


class Broker:
    """The service over a store whose ticks are in the test's hands."""

    def __init__(self, path: Path) -> None:
        self.clock = ManualClock()
        self.store: Inflight = open_store(path, self.clock)
        self.consumers = Consumers(self.store, Waiting(self.store, BYTES))

    def reopen(self) -> None:
        """It is started again."""
        path = self.store.database.path
        self.store.database.close()
        self.store = open_store(path, self.clock)
        self.consumers = Consumers(self.store, Waiting(self.store, BYTES))

    async def put(self, *ids: str, **how: object) -> None:
        rows = [activation(id, self.clock, body=task_bytes(id), **how) for id in ids]  # type: ignore[arg-type]
        self.store.insert(rows)
        await settle_down(self.store)

    async def step(self, times: int = 5) -> None:
        """Let calls go on as far as they can without a commit."""
        for _ in range(times):
            await asyncio.sleep(0)

    async def answered(self, call: Awaitable[bytes]) -> bytes:
        """The answer, committing what it waits for."""
        task = asyncio.ensure_future(call)
        while not task.done():
            await self.step()
            await settle_down(self.store)
        return await task

    async def fetch(self, request_id: str = "", count: int = 1) -> list[pb.ClaimedTask]:
        asked = pb.GetTasksRequest(request_id=request_id, max_tasks=count)
        answer = await self.answered(self.consumers.get_tasks(asked.SerializeToString()))
        return list(pb.GetTasksResponse.FromString(answer).tasks)

    def reporting(self, task: pb.ClaimedTask, status: pb.TaskOutcomeStatus = COMPLETE) -> Awaitable[bytes]:
        outcome = pb.TaskOutcome(claim_token=task.claim_token, status=status)
        return self.consumers.set_task_statuses(
            pb.SetTaskStatusesRequest(outcomes=[outcome]).SerializeToString()
        )

    async def report(self, task: pb.ClaimedTask, status: pb.TaskOutcomeStatus = COMPLETE) -> int:
        answer = await self.answered(self.reporting(task, status))
        return pb.SetTaskStatusesResponse.FromString(answer).answers[0]

    async def give_back(self, task: pb.ClaimedTask, reason: pb.ReleaseReason) -> int:
        released = pb.ReleasedTask(claim_token=task.claim_token, reason=reason, detail="because")
        request = pb.ReleaseTasksRequest(tasks=[released])
        answer = await self.answered(self.consumers.release_tasks(request.SerializeToString()))
        return pb.ReleaseTasksResponse.FromString(answer).answers[0]

    async def extend(self, task: pb.ClaimedTask, started: bool) -> int:
        held = pb.HeldClaim(claim_token=task.claim_token, started=started)
        answer = await self.consumers.extend_claims(pb.ExtendClaimsRequest(claims=[held]).SerializeToString())
        return pb.ExtendClaimsResponse.FromString(answer).answers[0]

    def rows(self) -> list[Activation]:
        """What is in the file."""
        return self.store.database.load([key[0] for key in self.store.database.positions()])


@pytest.fixture
async def broker(tmp_path: Path):
    broker = Broker(tmp_path / "store.sqlite")
    yield broker
    broker.store.database.close()


def code_of(refused: pytest.ExceptionInfo[Refused]) -> grpc.StatusCode:
    return refused.value.code


# -- nothing leaves before what it depends on


async def test_an_outcome_is_answered_when_it_is_in_the_file(broker: Broker) -> None:
    await broker.put("a")
    (task,) = await broker.fetch()
    call = asyncio.ensure_future(broker.reporting(task))
    await broker.step()
    assert not call.done()
    await settle_down(broker.store)
    await broker.step()
    assert call.done()
    assert broker.rows() == []


async def test_an_outcome_is_answered_when_it_is_covered(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = broker.store.source("tasks", 0)
    await broker.put("a", source=source.id, offset=0)
    (task,) = await broker.fetch()
    call = asyncio.ensure_future(broker.reporting(task))
    await broker.step()
    await settle_down(broker.store)
    await broker.step()
    assert not call.done()
    broker.store.cover(source, 1)
    assert pb.SetTaskStatusesResponse.FromString(await broker.answered(call)).answers[0] == APPLIED


async def test_without_cover_the_caller_is_told_to_repeat(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "COVER_SECONDS_MAX", 0.01)
    source = broker.store.source("tasks", 0)
    await broker.put("a", source=source.id, offset=0)
    (task,) = await broker.fetch()
    for _ in range(2):
        with pytest.raises(Refused, match="repeat the call") as refused:
            await broker.report(task)
        assert code_of(refused) is grpc.StatusCode.UNAVAILABLE
    broker.store.cover(source, 1)
    assert await broker.report(task) == DUPLICATE


async def test_a_report_by_id_that_is_repeated_waits_for_cover_as_the_first(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "COVER_SECONDS_MAX", 0.01)
    source = broker.store.source("tasks", 0)
    await broker.put("a", source=source.id, offset=0)
    broker.store.claim(None, (), 1, BYTES, tokenless=True)
    await settle_down(broker.store)
    report = pb.SetTaskStatusRequest(id="a", status=TASK_ACTIVATION_STATUS_COMPLETE).SerializeToString()
    for _ in range(2):
        with pytest.raises(Refused, match="repeat the call"):
            await broker.answered(broker.consumers.set_task_status(report))
    broker.store.cover(source, 1)
    await broker.answered(broker.consumers.set_task_status(report))


async def test_a_claim_that_may_start_once_only_is_in_the_file_when_handed_out(broker: Broker) -> None:
    await broker.put("a", at_most_once=True)
    call = asyncio.ensure_future(broker.consumers.get_tasks(pb.GetTasksRequest().SerializeToString()))
    await broker.step()
    assert not call.done()
    assert [row.status for row in broker.rows()] == [Status.PENDING]
    await settle_down(broker.store)
    assert [row.status for row in broker.rows()] == [Status.PROCESSING]
    assert len(pb.GetTasksResponse.FromString(await call).tasks) == 1


async def test_a_claim_of_a_task_from_the_log_that_may_start_once_only_is_in_the_ledger_first(
    broker: Broker,
) -> None:
    """Else it would start again on the broker that restores it from there."""
    recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    broker.store.recorded = lambda: recorded  # type: ignore[method-assign]
    source = broker.store.source("tasks", 0)
    await broker.put("a", at_most_once=True, source=source.id, offset=0)
    broker.store.cover(source, 1)
    await settle_down(broker.store)
    call = asyncio.ensure_future(broker.consumers.get_tasks(pb.GetTasksRequest().SerializeToString()))
    await broker.step()
    await settle_down(broker.store)
    await broker.step()
    assert not call.done()
    recorded.set_result(None)
    assert len(pb.GetTasksResponse.FromString(await broker.answered(call)).tasks) == 1


@pytest.mark.parametrize("how", ["get_task", "set_task_status"])
async def test_so_it_is_for_a_client_without_tokens(broker: Broker, how: str) -> None:
    await broker.put("a", at_most_once=True)
    if how == "get_task":
        call = asyncio.ensure_future(broker.consumers.get_task(b""))
    else:
        report = pb.SetTaskStatusRequest(id="unknown", status=TASK_ACTIVATION_STATUS_COMPLETE)
        report.fetch_next_task.SetInParent()
        call = asyncio.ensure_future(broker.consumers.set_task_status(report.SerializeToString()))
    await broker.step()
    assert not call.done()
    await settle_down(broker.store)
    assert [row.status for row in broker.rows()] == [Status.PROCESSING]
    assert pb.GetTaskResponse.FromString(await call).task.id == "a"


async def test_nothing_is_claimed_for_a_call_that_is_not_answered_yet(broker: Broker) -> None:
    """While it waits, the task could be cancelled or its lease could end."""
    await broker.put("a", "b")
    answer = await broker.answered(broker.consumers.get_task(b""))
    first = pb.GetTaskResponse.FromString(answer).task.id
    report = pb.SetTaskStatusRequest(id=first, status=TASK_ACTIVATION_STATUS_COMPLETE)
    report.fetch_next_task.SetInParent()
    call = asyncio.ensure_future(broker.consumers.set_task_status(report.SerializeToString()))
    await broker.step()
    assert [task.activation.id for task in await broker.fetch()] == ["b"]
    assert not pb.SetTaskStatusResponse.FromString(await broker.answered(call)).HasField("task")


# -- answers that got lost


async def test_a_repeated_request_gives_what_is_still_held_of_its_first_answer(broker: Broker) -> None:
    await broker.put("a", "b", "c")
    first = await broker.fetch("request", 3)
    assert await broker.fetch("request", 3) == first
    assert await broker.report(first[0]) == APPLIED
    assert await broker.give_back(first[1], pb.RELEASE_REASON_SHUTDOWN) == APPLIED
    assert await broker.fetch("request", 3) == first[2:]
    (other,) = await broker.fetch("other", 3)
    assert other.activation.id == "b"
    # It has it under a claim of its own, which the first request is not given.
    assert other.claim_token != first[1].claim_token
    assert await broker.fetch("request", 3) == first[2:]
    await settle_down(broker.store)
    check_store(broker.store)


@pytest.mark.parametrize("how", ["get_task", "get_tasks"])
async def test_what_was_claimed_for_a_call_that_failed_is_handed_out_again(broker: Broker, how: str) -> None:
    await broker.put("a", at_most_once=True)
    call = asyncio.ensure_future(getattr(broker.consumers, how)(b""))
    await broker.step()
    call.cancel()
    await broker.step()
    await settle_down(broker.store)
    assert [task.activation.id for task in await broker.fetch()] == ["a"]


async def test_claims_are_remembered_for_an_answer_that_got_lost_as_long_as_they_may_be_held(
    broker: Broker,
) -> None:
    await broker.put(*(str(n) for n in range(3)))
    for n in range(3):
        await broker.fetch(f"request {n}")
        broker.clock.advance(broker.store.limits.lease_ms - 1)
    assert len(broker.consumers._answered) == 3
    broker.clock.advance(2 * broker.store.limits.lease_ms)
    await broker.fetch()
    assert not broker.consumers._answered


# -- what a worker is told


async def test_a_claimed_task_says_what_the_worker_must_know(broker: Broker) -> None:
    await broker.put("a", expires_ms=5_000, max_attempts=3)
    broker.clock.advance(2_000)
    (task,) = await broker.fetch()
    assert (task.attempt, task.deadline_ms, task.expires_in_ms) == (1, 10_000, 3_000)
    assert await broker.report(task, RETRY) == APPLIED
    (again,) = await broker.fetch()
    assert again.attempt == 2
    assert again.activation.retry_state == RetryState(attempts=1, max_attempts=3, delay_on_retry=0)
    assert again.activation.taskname == "send"


async def test_a_client_without_tokens_learns_the_attempts_from_the_message(broker: Broker) -> None:
    await broker.put("a", max_attempts=3)
    await broker.answered(broker.consumers.get_task(b""))
    report = pb.SetTaskStatusRequest(id="a", status=TASK_ACTIVATION_STATUS_RETRY)
    await broker.answered(broker.consumers.set_task_status(report.SerializeToString()))
    answer = await broker.answered(broker.consumers.get_task(b""))
    task: TaskActivation = pb.GetTaskResponse.FromString(answer).task
    assert (task.retry_state.attempts, task.retry_state.max_attempts) == (1, 3)


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_a_client_without_tokens_says_of_retries_holds_for_those_after_too(
    broker: Broker, restarted: bool
) -> None:
    await broker.put("a", max_attempts=2)
    report = pb.SetTaskStatusRequest(id="a", status=TASK_ACTIVATION_STATUS_RETRY)
    first = pb.SetTaskStatusRequest(
        id="a", status=TASK_ACTIVATION_STATUS_RETRY, max_attempts=9, delay_on_retry=5
    )
    if restarted:
        broker.reopen()
    else:
        await broker.answered(broker.consumers.get_task(b""))
    await broker.answered(broker.consumers.set_task_status(first.SerializeToString()))
    broker.clock.advance(1 + 5_000)
    broker.store.writer.wake()
    await settle_down(broker.store)
    answer = await broker.answered(broker.consumers.get_task(b""))
    state = pb.GetTaskResponse.FromString(answer).task.retry_state
    assert state == RetryState(attempts=1, max_attempts=9, delay_on_retry=5)
    await broker.answered(broker.consumers.set_task_status(report.SerializeToString()))
    (row,) = broker.rows()
    assert (row.status, row.ready_at) == (Status.DELAYED, broker.clock.wall + 1 + 5_000)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("claimed_since", [False, True])
async def test_a_late_report_by_id_settles_what_waits_only_because_a_restart_lost_its_claim(
    broker: Broker, claimed_since: bool, in_memory: bool
) -> None:
    await broker.put("a", max_attempts=3)
    broker.reopen()
    if claimed_since:
        await settle_down(broker.store)
        await broker.answered(broker.consumers.get_task(b""))
        broker.clock.advance(10_000 + broker.store.limits.grace_ms + 1_000)
        assert broker.store.lapse(broker.clock.mono) == 1
    if in_memory:
        await settle_down(broker.store)
    assert len(broker.store.memory.resident) == in_memory
    report = pb.SetTaskStatusRequest(id="a", status=TASK_ACTIVATION_STATUS_RETRY)
    await broker.answered(broker.consumers.set_task_status(report.SerializeToString()))
    (row,) = broker.rows()
    assert (row.attempts, row.lost) == ((0, 1) if claimed_since else (1, 0))
    check_store(broker.store)


async def test_a_report_by_id_is_accepted_though_the_next_task_cannot_be_handed_out(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to repeat it, the client might settle what another one has claimed since."""
    monkeypatch.setattr(service, "ANSWER_SECONDS_MAX", 0.01)
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    broker.store.recorded = lambda: never  # type: ignore[method-assign]
    source = broker.store.source("tasks", 0)
    await broker.put("a", max_attempts=3)
    await broker.answered(broker.consumers.get_task(b""))
    await broker.put("once", at_most_once=True, source=source.id, offset=0)
    broker.store.cover(source, 1)
    await settle_down(broker.store)
    report = pb.SetTaskStatusRequest(id="a", status=TASK_ACTIVATION_STATUS_RETRY, delay_on_retry=60)
    report.fetch_next_task.SetInParent()
    call = asyncio.ensure_future(broker.consumers.set_task_status(report.SerializeToString()))
    with contextlib.suppress(Refused, TimeoutError):
        await broker.answered(call)
    assert call.exception() is None
    assert not pb.SetTaskStatusResponse.FromString(call.result()).HasField("task")
    await settle_down(broker.store)
    assert [(row.id, row.status, row.attempts) for row in broker.rows()] == [
        ("a", Status.DELAYED, 1),
        ("once", Status.PENDING, 0),
    ]


async def test_a_client_without_tokens_says_how_a_task_is_tried_again(broker: Broker) -> None:
    await broker.put("a", "b", max_attempts=2)
    reports = [
        pb.SetTaskStatusRequest(
            id="a", status=TASK_ACTIVATION_STATUS_RETRY, max_attempts=9, delay_on_retry=5
        ),
        pb.SetTaskStatusRequest(id="b", status=TASK_ACTIVATION_STATUS_RETRY),
    ]
    for report in reports:
        await broker.answered(broker.consumers.get_task(b""))
        await broker.answered(broker.consumers.set_task_status(report.SerializeToString()))
    a, b = broker.rows()
    assert (a.status, a.max_attempts, a.ready_at) == (Status.DELAYED, 9, broker.clock.wall + 1 + 5_000)
    assert (b.status, b.max_attempts) == (Status.PENDING, 2)


async def test_a_client_without_tokens_names_a_namespace_with_its_application(broker: Broker) -> None:
    await broker.put("a")
    asked = pb.GetTaskRequest(namespace="pay")
    with pytest.raises(Refused) as refused:
        await broker.answered(broker.consumers.get_task(asked.SerializeToString()))
    assert code_of(refused) is grpc.StatusCode.NOT_FOUND
    asked.application = "shop"
    answer = await broker.answered(broker.consumers.get_task(asked.SerializeToString()))
    assert pb.GetTaskResponse.FromString(answer).task.id == "a"


@pytest.mark.parametrize(("said", "waits"), [(None, 1 + 4_000), (0, 0), (700, 1 + 700)])
async def test_a_task_says_how_long_a_retry_waits_unless_its_worker_does(
    broker: Broker, said: int | None, waits: int
) -> None:
    row = activation("a", broker.clock, max_attempts=3, body=task_bytes("a"))
    row.retry_delay_ms = 4_000
    broker.store.insert([row])
    await settle_down(broker.store)
    (task,) = await broker.fetch()
    outcome = pb.TaskOutcome(claim_token=task.claim_token, status=RETRY, retry_delay_ms=said)
    request = pb.SetTaskStatusesRequest(outcomes=[outcome])
    await broker.answered(broker.consumers.set_task_statuses(request.SerializeToString()))
    (row,) = broker.rows()
    assert (row.ready_at - broker.clock.wall if row.status is Status.DELAYED else 0) == waits


@pytest.mark.parametrize("started", [False, True])
async def test_the_deadline_counts_from_the_heartbeat_that_says_started(
    broker: Broker, started: bool
) -> None:
    await broker.put("a")
    (task,) = await broker.fetch()
    lapsed = 0
    for _ in range(40):
        broker.clock.advance(1_000)
        await broker.extend(task, started)
        lapsed += broker.store.lapse(broker.clock.mono)
    assert lapsed == started


async def test_what_workers_do_not_know_is_not_offered_to_them_again_at_once(broker: Broker) -> None:
    await broker.put("a")

    async def fetch(worker: str) -> list[pb.ClaimedTask]:
        asked = pb.GetTasksRequest(worker=pb.WorkerIdentity(worker_id=worker))
        answer = await broker.answered(broker.consumers.get_tasks(asked.SerializeToString()))
        return list(pb.GetTasksResponse.FromString(answer).tasks)

    for worker in ("old", "older"):
        (task,) = await fetch(worker)
        released = pb.ReleasedTask(claim_token=task.claim_token, reason=pb.RELEASE_REASON_UNKNOWN_TASK)
        request = pb.ReleaseTasksRequest(tasks=[released], worker_id=worker)
        await broker.answered(broker.consumers.release_tasks(request.SerializeToString()))
        broker.clock.advance(3_000)
        await settle_down(broker.store)
    assert await fetch("old") == await fetch("older") == []
    assert [task.activation.id for task in await fetch("new")] == ["a"]


@pytest.mark.parametrize("call", ["get_task", "get_tasks"])
async def test_while_the_disk_fails_who_asks_for_work_is_refused_at_once(broker: Broker, call: str) -> None:
    broker.store.writer.trouble = DiskFailing(apsw.IOError("it fails"))
    with pytest.raises(DiskFailing):
        await getattr(broker.consumers, call)(b"")


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (pb.RELEASE_REASON_UNKNOWN_TASK, Status.DELAYED),
        (pb.RELEASE_REASON_ARGUMENTS_MISMATCH, Status.DELAYED),
        (pb.RELEASE_REASON_SURPLUS, Status.PENDING),
        (pb.RELEASE_REASON_SHUTDOWN, Status.PENDING),
        (77, Status.PENDING),
    ],
)
async def test_what_is_given_back_waits_or_is_ready_at_once(
    broker: Broker, reason: pb.ReleaseReason, status: Status
) -> None:
    await broker.put("a")
    (task,) = await broker.fetch()
    assert await broker.give_back(task, reason) == APPLIED
    (row,) = broker.rows()
    assert (row.status, row.attempts, row.lost) == (status, 0, 0)
    assert (row.error is not None) == (status is Status.DELAYED)


async def test_the_last_error_is_kept_within_bounds(broker: Broker) -> None:
    await broker.put("a")
    (task,) = await broker.fetch()
    outcome = pb.TaskOutcome(claim_token=task.claim_token, status=pb.TASK_OUTCOME_STATUS_FAILURE)
    outcome.error.type, outcome.error.message = "T" * 10**6, "m" * 10**6
    outcome.error.traceback = "t" * 10**6 + "the end"
    request = pb.SetTaskStatusesRequest(outcomes=[outcome])
    await broker.answered(broker.consumers.set_task_statuses(request.SerializeToString()))
    (row,) = broker.rows()
    assert row.error is not None
    assert len(row.error) < 40_000
    assert json.loads(row.error)["traceback"].endswith("the end")


async def test_what_is_kept_of_a_call_is_bounded(broker: Broker) -> None:
    long = "x" * 257
    identity = pb.WorkerIdentity
    consumers = broker.consumers
    for call, request in (
        (consumers.get_tasks, pb.GetTasksRequest(request_id=long)),
        (consumers.get_tasks, pb.GetTasksRequest(worker=identity(worker_id=long))),
        (consumers.get_tasks, pb.GetTasksRequest(worker=identity(worker_id="w", hostname=long))),
        (consumers.get_tasks, pb.GetTasksRequest(application=long)),
        (consumers.get_tasks, pb.GetTasksRequest(application="a", namespaces=[long])),
        (consumers.extend_claims, pb.ExtendClaimsRequest(worker_id=long)),
        (consumers.release_tasks, pb.ReleaseTasksRequest(worker_id=long)),
    ):
        with pytest.raises(Refused) as refused:
            await call(request.SerializeToString())
        assert code_of(refused) is grpc.StatusCode.INVALID_ARGUMENT
    many = pb.GetTasksRequest(application="a", namespaces=["n"] * 9_000, worker=identity(worker_id="w"))
    await broker.answered(consumers.get_tasks(many.SerializeToString()))
    unknown = b"\xfa\x3e\x03abc"  # a field of number 1007
    worker = identity(worker_id="w").SerializeToString() + unknown
    await broker.answered(
        consumers.get_tasks(many.SerializeToString() + b"\x32" + bytes([len(worker)]) + worker)
    )
    (seen,) = consumers.roster.lately(broker.clock.mono)
    assert len(seen.namespaces) == NAMESPACES_SHOWN
    assert seen.identity.SerializeToString() == identity(worker_id="w").SerializeToString()


async def test_a_back_off_is_ten_years_at_most(broker: Broker) -> None:
    await broker.put("a", max_attempts=3)
    (task,) = await broker.fetch()
    outcome = pb.TaskOutcome(claim_token=task.claim_token, status=RETRY, retry_delay_ms=2**64 - 1)
    request = pb.SetTaskStatusesRequest(outcomes=[outcome])
    await broker.answered(broker.consumers.set_task_statuses(request.SerializeToString()))
    (row,) = broker.rows()
    assert (row.status, row.ready_at) == (Status.DELAYED, broker.clock.wall + 1 + service.DELAY_MS_MAX)


async def test_a_task_that_says_it_was_started_more_often_than_a_number_holds_is_handed_out(
    broker: Broker,
) -> None:
    most = RetryState(attempts=2**32 - 1, max_attempts=2**32 - 1)
    sent = TaskActivation(id="a", taskname="charge", retry_state=most)
    await broker.put("b")
    broker.store.insert([Admission(AdmissionLimits()).admit(sent.SerializeToString(), broker.clock.wall)])
    await settle_down(broker.store)
    for _ in range(2):
        tasks = await broker.fetch(count=2)
        assert tasks[-1].activation.id == "a"
        assert await broker.report(tasks[-1], RETRY) == APPLIED


async def test_no_worker_is_handed_more_than_one_answer_may_hold(broker: Broker) -> None:
    await broker.put(*(str(n) for n in range(1200)))
    assert len(await broker.fetch(count=2**31)) == 1000


async def test_a_token_of_another_length_is_unknown(broker: Broker) -> None:
    await broker.put("a")
    (task,) = await broker.fetch()
    for wrong in (b"", task.claim_token[:-1], task.claim_token + b"x"):
        assert await broker.report(pb.ClaimedTask(claim_token=wrong)) == pb.OUTCOME_ANSWER_UNKNOWN
    assert await broker.report(task) == APPLIED


async def test_one_wrong_status_in_a_batch_settles_nothing(broker: Broker) -> None:
    await broker.put("a", "b")
    first, second = await broker.fetch(count=2)
    outcomes = [
        pb.TaskOutcome(claim_token=first.claim_token, status=COMPLETE),
        pb.TaskOutcome(claim_token=second.claim_token, status=99),  # type: ignore[arg-type]
    ]
    request = pb.SetTaskStatusesRequest(outcomes=outcomes).SerializeToString()
    with pytest.raises(Refused, match="no outcome") as refused:
        await broker.answered(broker.consumers.set_task_statuses(request))
    assert code_of(refused) is grpc.StatusCode.INVALID_ARGUMENT
    assert [await broker.report(task) for task in (first, second)] == [APPLIED, APPLIED]


async def test_one_wrong_status_in_a_batch_by_id_settles_nothing(broker: Broker) -> None:
    await broker.put("a", "b")
    for _ in range(2):
        await broker.answered(broker.consumers.get_task(b""))
    updates = [
        pb.SetTaskStatusRequest(id="a", status=TASK_ACTIVATION_STATUS_COMPLETE),
        pb.SetTaskStatusRequest(id="b", status=99),  # type: ignore[arg-type]
    ]
    request = pb.SetBatchActivationStatusRequest(updates=updates)
    with pytest.raises(Refused, match="of task 'b'"):
        await broker.answered(broker.consumers.set_batch_activation_status(request.SerializeToString()))
    await settle_down(broker.store)
    assert [row.id for row in broker.rows()] == ["a", "b"]
    request.updates[1].status = TASK_ACTIVATION_STATUS_COMPLETE
    await broker.answered(broker.consumers.set_batch_activation_status(request.SerializeToString()))
    assert broker.rows() == []


@pytest.mark.parametrize("why", ["drain", "disk"])
async def test_a_worker_that_is_given_nothing_has_asked(broker: Broker, why: str) -> None:
    """Nobody is sent to look for workers that are there."""
    await broker.put("a")
    if why == "drain":
        broker.store.claiming = False
    else:
        broker.store.writer.trouble = DiskFailing(apsw.FullError("full"))
    v1 = pb.GetTaskRequest(application="shop", namespace="pay").SerializeToString()
    ours = pb.GetTasksRequest(application="shop", namespaces=["pay"], max_tasks=1).SerializeToString()
    for call, request in ((broker.consumers.get_task, v1), (broker.consumers.get_tasks, ours)):
        broker.clock.advance(UNASKED_MS + 1)
        assert broker.store.unclaimable.pending(), "it sees who does not ask"
        with contextlib.suppress(DiskFailing, Refused):
            await call(request)
        assert broker.store.unclaimable.pending() == []


async def test_a_namespace_without_its_application_is_asked_for_by_nobody(broker: Broker) -> None:
    """Who names it so is given nothing, ever: what waits for others is told."""
    await broker.put("a")
    broker.clock.advance(UNASKED_MS + 1)
    alone = pb.GetTaskRequest(namespace="pay").SerializeToString()
    with pytest.raises(Refused, match="no pending task") as refused:
        await broker.consumers.get_task(alone)
    assert code_of(refused) is grpc.StatusCode.NOT_FOUND
    next_task = pb.FetchNextTask(namespace="pay")
    report = pb.SetTaskStatusRequest(
        id="nobody's", status=TASK_ACTIVATION_STATUS_COMPLETE, fetch_next_task=next_task
    )
    answer = await broker.answered(broker.consumers.set_task_status(report.SerializeToString()))
    assert not pb.SetTaskStatusResponse.FromString(answer).HasField("task")
    assert [(queue.namespace, rows) for queue, rows in broker.store.unclaimable.pending()] == [("pay", 1)]


async def test_what_is_remembered_of_refusals_is_bounded(broker: Broker) -> None:
    """A caller who gives back under ever new names, or what it does not hold."""
    await broker.put("a")
    (task,) = await broker.fetch()
    reason = pb.RELEASE_REASON_UNKNOWN_TASK
    released = pb.ReleasedTask(claim_token=task.claim_token, reason=reason)
    for n in range(3):
        request = pb.ReleaseTasksRequest(tasks=[released], worker_id=f"worker {n}")
        await broker.answered(broker.consumers.release_tasks(request.SerializeToString()))
    seq = broker.rows()[0].seq
    now = broker.clock.mono_ms()
    by = [broker.store.refusals.by(seq, f"worker {n}", now) for n in range(3)]
    assert by == [True, False, False], "only the first one held it"
    for n in range(WORKERS_MAX + 1):
        broker.store.refusals.add(seq, f"new {n}", now)
    by = [broker.store.refusals.by(seq, f"new {n}", now) for n in (0, 1, WORKERS_MAX)]
    assert by == [False, True, True]


async def test_a_repeated_request_is_answered_and_the_call_that_nobody_hears_ends(broker: Broker) -> None:
    asked = pb.GetTasksRequest(request_id="request", max_tasks=1, wait_ms=60_000).SerializeToString()
    unheard = asyncio.ensure_future(broker.consumers.get_tasks(asked))
    await broker.step()
    again = asyncio.ensure_future(broker.consumers.get_tasks(asked))
    await broker.step()
    assert not pb.GetTasksResponse.FromString(await broker.answered(unheard)).tasks
    await broker.put("a", "b")
    (task,) = pb.GetTasksResponse.FromString(await broker.answered(again)).tasks
    assert await broker.fetch("request") == [task]


async def test_a_request_that_is_repeated_while_its_call_is_handed_tasks_gives_the_same(
    broker: Broker,
) -> None:
    asked = pb.GetTasksRequest(request_id="request", max_tasks=1, wait_ms=60_000).SerializeToString()
    unheard = asyncio.ensure_future(broker.consumers.get_tasks(asked))
    await broker.step()
    await broker.put("a", "b")  # matched, and not yet taken by the call
    commits = asyncio.create_task(broker.answered(asyncio.sleep(60, b"")))
    again = pb.GetTasksResponse.FromString(await broker.consumers.get_tasks(asked))
    commits.cancel()
    assert [task.activation.id for task in again.tasks] == ["a"]
    assert pb.GetTasksResponse.FromString(await unheard) == again


async def test_what_is_held_of_an_answer_is_given_again_however_many_came_after_it(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ANSWERS_MIN", 3)
    await broker.put(*(f"task {n:02}" for n in range(20)))
    first = await broker.fetch("first")
    for n in range(15):
        (task,) = await broker.fetch(f"request {n}")
        await broker.report(task)
    assert await broker.fetch("first") == first
    # Answers of which nothing is held do not gather.
    assert len(broker.consumers._answered) <= 5


async def test_a_client_without_tokens_is_handed_nothing_that_has_expired_while_it_was_recorded(
    broker: Broker,
) -> None:
    source = broker.store.source("tasks", 0)
    broker.store.cover(source, 1)
    await broker.put("a", at_most_once=True, expires_ms=1_000, source=source.id, offset=0)

    async def recorded() -> None:
        await broker.store.committed()
        broker.clock.advance(1_000)

    broker.store.recorded = recorded
    with pytest.raises(Refused, match="no pending task"):
        await broker.answered(broker.consumers.get_task(b""))
    await settle_down(broker.store)
    assert broker.store.memory.counts[1][Status.FORWARDING] == 1
    check_store(broker.store)
